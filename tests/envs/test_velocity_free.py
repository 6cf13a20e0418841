"""Classic control without velocities: what is seen, and that all else is the inner environment's own."""

import copy
import pickle

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.random import clone

from jaxrl_dist.envs import check_env, make
from jaxrl_dist.envs.velocity_free import POSITIONS, velocity_free


@pytest.mark.parametrize("env_id", POSITIONS)
def test_it_keeps_the_contract(env_id):
    env, params = make(f"velocity_free/{env_id}")
    assert [warning for warning in check_env(env, params) if "compiles twice" not in warning] == []
    assert env.name == f"velocity_free/{env_id}"
    assert env.observation_space(params).shape == (len(POSITIONS[env_id]),)


def test_positions_are_those_of_the_environment_and_velocities_are_gone():
    """CartPole, step by step, beyond the end of an episode."""
    plain, params = gymnax.make("CartPole-v1")
    env, _ = make("velocity_free/CartPole-v1")
    start_key, *keys = jax.random.split(jax.random.key(0), 21)
    (full, state), (seen, same) = (one.reset(clone(start_key), params) for one in (plain, env))
    np.testing.assert_array_equal(seen, full[np.array([0, 2])])
    ended = 0
    for key in keys:
        expected, found = (
            one.step(clone(key), inner, 1, params) for one, inner in ((plain, state), (env, same))
        )  # fmt: skip
        np.testing.assert_array_equal(found[0], expected[0][np.array([0, 2])])
        np.testing.assert_array_equal(found[5]["final_observation"], expected[5]["final_observation"][np.array([0, 2])])
        assert found[2:5] == expected[2:5]
        state, same = expected[1], found[1]
        ended += bool(expected[3])
    assert ended
    first, second = jax.random.split(jax.random.key(1))
    np.testing.assert_array_equal(
        env.reset_env(first, params)[0], env.get_obs(env.reset_env(clone(first), params)[1])[np.array([0, 2])]
    )
    assert env.step_env(second, state, 1, params)[0].shape == (2,)


def test_no_component_that_is_kept_is_a_velocity():
    """Of states that differ in their velocities alone."""
    for env_id, kept in POSITIONS.items():
        plain, params = gymnax.make(env_id)
        state = plain.reset_env(jax.random.key(0), params)[1]
        names = {"x_dot", "theta_dot", "velocity", "joint_vel1", "joint_vel2", "velocity_1", "velocity_2"}
        moving = {name: jnp.float32(0.7) for name in vars(state) if name in names}
        assert moving, vars(state)
        one, other = (plain.get_obs(x, params=params) for x in (state, state.replace(**moving)))
        np.testing.assert_array_equal(np.flatnonzero(np.asarray(one == other)), kept)


def test_options_are_those_of_the_environment():
    _, params = make("velocity_free/CartPole-v1", max_steps_in_episode="77")
    assert params.max_steps_in_episode == 77
    with pytest.raises(ValueError, match="unknown, nearest"):
        make("velocity_free/CartPole-v2")


def test_wrappers_of_one_environment_are_equal():
    env, _ = make("velocity_free/CartPole-v1")
    assert env == type(env)(env.env, env.kept)
    assert hash(env) == hash(type(env)(env.env, env.kept))
    assert copy.deepcopy(env).kept == pickle.loads(pickle.dumps(env)).kept == (0, 2)
    assert velocity_free("Pendulum-v1").kept == (0, 1)

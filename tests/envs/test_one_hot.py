import copy
import pickle

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces
from jax.random import clone
from toy_environments import Line

from jaxrl_dist.envs import check_env, make, one_hot_observations, rescale_actions


def test_numbers_of_states_become_vectors():
    """Along an episode of FrozenLake, beside the environment without the wrapper."""
    plain, params = gymnax.make("FrozenLake-misc")
    env, _ = make("FrozenLake-misc")
    assert env.observation_space(params).shape == (16,)
    assert (env.name, env.num_actions) == ("FrozenLake-misc", 4)
    start_key, *keys = jax.random.split(jax.random.key(0), 41)
    (number, state), (vector, same) = (one.reset(clone(start_key), params) for one in (plain, env))
    np.testing.assert_array_equal(vector, np.eye(16)[number])
    ended = 0
    for time, key in enumerate(keys):
        expected = plain.step(clone(key), state, time % 4, params)
        result = env.step(clone(key), same, time % 4, params)
        np.testing.assert_array_equal(result[0], np.eye(16)[expected[0]])
        np.testing.assert_array_equal(result[5]["final_observation"], np.eye(16)[expected[5]["final_observation"]])
        assert result[2:5] == expected[2:5]
        state, same = expected[1], result[1]
        ended += bool(expected[3])
    assert ended

    def without_automatic_reset(one):
        first, second = jax.random.split(jax.random.key(1))
        return one.reset_env(first, params)[0], one.step_env(second, state, 1, params)[0]

    for number, vector in zip(*map(jax.jit(without_automatic_reset, static_argnums=0), (plain, env)), strict=True):
        np.testing.assert_array_equal(vector, np.eye(16)[number])


def test_wrappers_of_one_environment_are_equal():
    env, params = make("FrozenLake-misc")
    assert one_hot_observations(env, params) is env
    assert one_hot_observations(env.env, params) == env
    assert hash(one_hot_observations(env.env, params)) == hash(env)
    assert copy.deepcopy(env).n == pickle.loads(pickle.dumps(env)).n == 16


class Cells(Line):
    """The walk on a line, seen as one of 21 cells; with actions that must be rescaled."""

    bound = 2.0

    def observation_space(self, params=None):
        return spaces.Discrete(21)

    def observe(self, state):
        return (state.position + 10).astype(jnp.int32)


def test_it_goes_with_rescaling_and_keeps_the_contract():
    env = rescale_actions(one_hot_observations(Cells(), Cells.default_params), Cells.default_params)
    assert check_env(env) == []
    assert env.env.action_space(None).high == 2

"""Environments of other packages; each is tried where its package is installed, and skipped with a word elsewhere."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.envs.check import check_env
from jaxrl_dist.envs.packages import Bare, Packaged, spaces

EXAMPLES = {
    "craftax/Craftax-Classic-Symbolic-v1": ("craftax", (1345,), 17, 10_000),
    "navix/Navix-Empty-5x5-v0": ("navix", (5, 5, 3), 7, 100),
    "navix/Navix-DoorKey-5x5-v0": ("navix", (5, 5, 3), 7, 100),
    "jumanji/Snake-v1": ("jumanji", (725,), 4, 2**30),
    "jumanji/Knapsack-v1": ("jumanji", (200,), 50, 2**30),
    "playground/CartpoleBalance": ("mujoco_playground", (5,), 1, 1000),
}


def counting(limit: int = 5) -> Packaged:
    """Counts; dies at 100, and truncates itself at 7."""

    def reset(key):
        return jnp.stack([jax.random.uniform(key), 0.0]), (jax.random.uniform(key), 0)

    def step(key, state, action):
        start, count = state
        count += 1
        observation = jnp.stack([start, count.astype(jnp.float32)])
        return observation, (start, count), 1.0, count >= 100, count >= 7

    return Packaged("counting/it", Bare(reset, step, spaces.Discrete(2), limit))


def test_limits_truncate_and_successors_are_true():
    env = counting()
    assert check_env(env, env.default_params) == []
    observation, state = env.reset(jax.random.key(0), env.default_params)
    for count in range(1, 6):
        following, state, _, terminated, truncated, info = env.step(
            jax.random.key(count), state, jnp.int32(0), env.default_params
        )
        assert (bool(terminated), bool(truncated)) == (False, count == 5)
        np.testing.assert_allclose(info["final_observation"], [observation[0], count])
    assert following[1] == 0.0
    assert following[0] != observation[0]


def test_an_environments_own_truncation_is_one():
    env = counting(limit=50)
    _, state = env.reset(jax.random.key(0), env.default_params)
    found = []
    for count in range(8):
        _, state, _, terminated, truncated, _ = env.step(jax.random.key(count), state, jnp.int32(0), env.default_params)
        found.append((bool(terminated), bool(truncated)))
    assert found == [(False, False)] * 6 + [(False, True), (False, False)]


@pytest.mark.parametrize("env_id", ["craftax/Craftax-Symbolic-v1", "navix/N", "jumanji/Snake-v1", "playground/P"])
def test_a_missing_package_is_named_with_what_installs_it(env_id, monkeypatch):
    package = env_id.partition("/")[0]
    monkeypatch.setitem(__import__("sys").modules, {"playground": "mujoco_playground"}.get(package, package), None)
    with pytest.raises(ConfigurationError, match=rf"pip install 'jaxrl_dist\[{package}\]'"):
        envs.make(env_id)


@pytest.mark.parametrize("env_id", EXAMPLES)
def test_the_contract_holds(env_id):
    package, shape, actions, limit = EXAMPLES[env_id]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'jaxrl_dist[{env_id.partition('/')[0]}]'")
    env, params = envs.make(env_id)
    assert env.observation_space(params).shape == shape
    assert env.num_actions == actions
    assert params.max_steps_in_episode == limit
    assert all("not checked" in warning for warning in check_env(env, params))


def test_a_name_that_a_package_does_not_know():
    pytest.importorskip("navix")
    with pytest.raises(ConfigurationError, match="navix cannot make"):
        envs.make("navix/Navix-Nowhere-v0")

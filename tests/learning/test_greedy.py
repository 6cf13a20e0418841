"""Greedy and epsilon-greedy policies of known values."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import greedy

SETTINGS = dataclasses.replace(greedy.Settings(), epsilon_start=0.9, epsilon_end=0.1, exploration_steps=6000)


class State(NamedTuple):
    env_steps: jax.Array
    favourite: jax.Array = jnp.int32(2)


def values(state, observation):
    """The favourite action is worth 1, the others nothing."""
    return jnp.broadcast_to(jax.nn.one_hot(state.favourite, 3), (len(observation), 3))


OBSERVATION = jnp.zeros((6000, 1))


def test_the_action_of_largest_value_of_equals_the_first():
    policy = greedy.policy_of(SETTINGS, values)
    action = policy.act(State(jnp.int32(0)), OBSERVATION, jax.random.key(0))
    assert action.dtype == jnp.int32
    assert (action == 2).all()
    followed, bonus = policy.follow(State(jnp.int32(0)), OBSERVATION, jax.random.key(0))
    np.testing.assert_array_equal(followed, action)
    np.testing.assert_array_equal(bonus, np.zeros(6000))
    equal = greedy.policy_of(SETTINGS, lambda state, observation: jnp.zeros((len(observation), 3)))
    assert (equal.act(State(jnp.int32(0)), OBSERVATION, jax.random.key(0)) == 0).all()


@pytest.mark.parametrize(
    ("env_steps", "epsilon"), [(0, 0.9), (1500, 0.7), (3000, 0.5), (4500, 0.3), (6000, 0.1), (9000, 0.1)]
)
def test_share_of_random_actions_falls_in_a_line(env_steps, epsilon):
    """With probability 1 - epsilon + epsilon / 3 the action is the greedy one; the others are equally frequent."""
    policy = greedy.policy_of(SETTINGS, values)
    action = policy.explore(State(jnp.int32(env_steps)), OBSERVATION, jax.random.key(env_steps))
    shares = np.bincount(action, minlength=3) / 6000
    np.testing.assert_allclose(shares, [epsilon / 3, epsilon / 3, 1 - epsilon * 2 / 3], atol=0.025)


def test_an_agent_that_draws_its_values_explores_by_what_it_draws():
    def drawn(state, observation, key):
        return jax.nn.one_hot(jax.random.bernoulli(key, shape=(len(observation),)).astype(int), 3)

    settings = dataclasses.replace(SETTINGS, epsilon_start=0.0, epsilon_end=0.0)
    policy = greedy.policy_of(settings, values, drawn)
    with jax.debug_key_reuse(True):
        action = policy.explore(State(jnp.int32(0)), OBSERVATION, jax.random.key(0))
    np.testing.assert_allclose(np.bincount(action, minlength=3) / 6000, [0.5, 0.5, 0], atol=0.025)
    assert (policy.act(State(jnp.int32(0)), OBSERVATION, jax.random.key(0)) == 2).all()


def test_presets_are_settings():
    for preset in (greedy.CARTPOLE, greedy.ACROBOT, greedy.CATCH, greedy.BREAKOUT, greedy.ATARI):
        settings = {name: value for name, value in preset.items() if name != "total_steps"}
        check_configuration(dataclasses.replace(greedy.Settings(), **settings))

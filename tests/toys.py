"""A toy environment whose every number is known, in gymnax's contract but without its code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import spaces


class ToyParams(NamedTuple):
    shortest: int = 2
    longest: int = 6
    max_steps_in_episode: int = 100
    noise: float = 0.0

    def replace(self, **changes):
        return self._replace(**changes)


class ToyState(NamedTuple):
    label: jax.Array
    time: jax.Array
    length: jax.Array


class Toy:
    """Episodes of a length drawn at reset; they terminate after it, or are truncated at the limit if that comes first.

    Observation (label, time, length), where the label is drawn at reset. Reward of the step at time t: t + the action's
    sum + noise. Its faults are those of real environments: `time` is weakly typed after a reset, and reward and flags
    come in odd types.
    """

    name = "Toy"
    default_params = ToyParams()

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (2,))

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (3,))

    def reset(self, key, params):
        label_key, length_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), params.shortest, params.longest + 1)
        state = ToyState(jax.random.uniform(label_key), 0, length)
        return self.observe(state), state

    def step(self, key, state, action, params):
        reset_key, noise_key = jax.random.split(key)
        reward = state.time + action.sum() + params.noise * jax.random.normal(noise_key)
        moved = state._replace(time=state.time + 1)
        terminated = moved.time == moved.length
        truncated = moved.time >= params.max_steps_in_episode
        fresh_observation, fresh = self.reset(reset_key, params)
        done = terminated | truncated
        following = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, moved)
        observation = jnp.where(done, fresh_observation, self.observe(moved))
        info = {"final_observation": self.observe(moved)}
        return observation, following, reward.astype(jnp.float16), terminated.astype(jnp.float32), truncated, info

    def observe(self, state):
        return jnp.stack([state.label, state.time, state.length]).astype(jnp.float32)

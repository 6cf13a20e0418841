"""Observations that are the number of a state become vectors, since agents take arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments import spaces

from jaxrl_dist.envs.wrapper import Wrapper
from jaxrl_dist.learning.spaces import kind_of, spaces_of


def one_hot_observations(env: Any, params: Any) -> Any:
    """The environment with one-hot vectors `[n]` for Discrete(n) observations; `env` itself where they are others."""
    _, space = spaces_of(env, params)
    return OneHotObservations(env, int(space.n)) if kind_of(space) == "discrete" else env


@dataclasses.dataclass(frozen=True)
class OneHotObservations(Wrapper):
    """An environment whose observations are `[n]`, 1 at the present state."""

    n: int

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.n,))

    def seen(self, observation: jax.Array) -> jax.Array:
        return jax.nn.one_hot(observation, self.n, dtype=jnp.float32)

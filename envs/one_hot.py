"""Observations that are the number of a state become vectors, since agents take arrays."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments import spaces

from jaxrl_dist.learning.spaces import kind_of, spaces_of


def one_hot_observations(env: Any, params: Any) -> Any:
    """The environment with one-hot vectors `[n]` for Discrete(n) observations; `env` itself where they are others."""
    _, space = spaces_of(env, params)
    return OneHotObservations(env, int(space.n)) if kind_of(space) == "discrete" else env


@dataclasses.dataclass(frozen=True)
class OneHotObservations:
    """An environment whose observations are `[n]`, 1 at the present state; everything else is the inner one's own.

    Frozen, so that two wrappers of one environment are equal and share their compiled step.
    """

    env: Any
    n: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "env":  # `copy` and `pickle` look before `env` is there
            raise AttributeError(name)
        return getattr(self.env, name)

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.n,))

    def _vector(self, observation: jax.Array) -> jax.Array:
        return jax.nn.one_hot(observation, self.n, dtype=jnp.float32)

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: Any = None) -> tuple:
        observation, state = self.env.reset(key, self.env.default_params if params is None else params)
        return self._vector(observation), state

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        observation, state, *rest, info = self.env.step(key, state, action, params)
        info = info | {"final_observation": self._vector(info["final_observation"])}
        return self._vector(observation), state, *rest, info

    @property
    def reset_env(self) -> Callable:
        inner = self.env.reset_env  # where there is one: it is no part of the contract

        def reset_env(key: jax.Array, params: Any) -> tuple:
            observation, state = inner(key, params)
            return self._vector(observation), state

        return reset_env

    @property
    def step_env(self) -> Callable:
        inner = self.env.step_env

        def step_env(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
            observation, *rest = inner(key, state, action, params)
            return self._vector(observation), *rest

        return step_env

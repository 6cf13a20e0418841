"""An environment around another one: it says what it changes, and everything else is the inner one's own."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """`env` with other actions (`inner_action` and `action_space`) or observations (`seen` and `observation_space`).

    Frozen, so that two wrappers of one environment are equal and share their compiled step.
    """

    env: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "env":  # `copy` and `pickle` look before `env` is there
            raise AttributeError(name)
        return getattr(self.env, name)

    def inner_action(self, action: jax.Array, params: Any) -> jax.Array:
        """The inner environment's action for one of this one's."""
        return action

    def seen(self, observation: jax.Array) -> jax.Array:
        """What this environment shows of an observation of the inner one."""
        return observation

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: Any = None) -> tuple:
        observation, state = self.env.reset(key, self.env.default_params if params is None else params)
        return self.seen(observation), state

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        observation, *rest, info = self.env.step(key, state, self.inner_action(action, params), params)
        if "final_observation" in info:
            info = info | {"final_observation": self.seen(info["final_observation"])}
        return self.seen(observation), *rest, info

    # Without resets, as gymnax has them. These two are no part of the contract: where the inner environment lacks them,
    # so does this one.

    @property
    def reset_env(self) -> Callable:
        inner = self.env.reset_env

        def reset_env(key: jax.Array, params: Any) -> tuple:
            observation, state = inner(key, params)
            return self.seen(observation), state

        return reset_env

    @property
    def step_env(self) -> Callable:
        inner = self.env.step_env

        def step_env(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
            observation, *rest = inner(key, state, self.inner_action(action, params), params)
            return self.seen(observation), *rest

        return step_env

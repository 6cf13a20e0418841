"""Classic control without velocities: where things are is seen, and how fast they move must be remembered.

An old test of memory: no policy of the present observation alone balances a pole that it does not see moving (Wierstra,
Foerster, Peters, Schmidhuber, "Recurrent policy gradients", 2010). Nothing else is changed, so that what an agent loses
against the environment with velocities is what it does not remember.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

POSITIONS = {
    "CartPole-v1": (0, 2),
    "Pendulum-v1": (0, 1),
    "Acrobot-v1": (0, 1, 2, 3),
    "MountainCar-v0": (0,),
    "MountainCarContinuous-v0": (0,),
}
"""gymnax's environments, and which components of their observations are no velocities."""


def velocity_free(env_id: str, **options: Any) -> "VelocityFree":
    """One of the environments of `POSITIONS`, by its id, with options of its constructor."""
    return VelocityFree(gymnax.make(env_id, **options)[0], POSITIONS[env_id])


@dataclasses.dataclass(frozen=True)
class VelocityFree:
    """An environment of whose observations `[n]` only the components `kept` are seen; all else is its own.

    Frozen, so that two wrappers of one environment are equal and share their compiled step.
    """

    env: Any
    kept: tuple[int, ...]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "env":  # `copy` and `pickle` look before `env` is there
            raise AttributeError(name)
        return getattr(self.env, name)

    @property
    def name(self) -> str:
        return f"velocity_free/{self.env.name}"

    def observation_space(self, params: Any = None) -> spaces.Box:
        inner = self.env.observation_space(self.env.default_params if params is None else params)
        low, high = (jnp.broadcast_to(bound, inner.shape)[np.array(self.kept)] for bound in (inner.low, inner.high))
        return spaces.Box(low, high, (len(self.kept),), inner.dtype)

    def _seen(self, observation: jax.Array) -> jax.Array:
        return observation[np.array(self.kept)]

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: Any = None) -> tuple:
        observation, state = self.env.reset(key, self.env.default_params if params is None else params)
        return self._seen(observation), state

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        observation, state, *rest, info = self.env.step(key, state, action, params)
        info = info | {"final_observation": self._seen(info["final_observation"])}
        return self._seen(observation), state, *rest, info

    @property
    def reset_env(self) -> Callable:
        def reset_env(key: jax.Array, params: Any) -> tuple:
            observation, state = self.env.reset_env(key, params)
            return self._seen(observation), state

        return reset_env

    @property
    def step_env(self) -> Callable:
        def step_env(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
            observation, *rest = self.env.step_env(key, state, action, params)
            return self._seen(observation), *rest

        return step_env

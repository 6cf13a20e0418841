"""Classic control without velocities: where things are is seen, and how fast they move must be remembered.

An old test of memory: no policy of the present observation alone balances a pole that it does not see moving (Wierstra,
Foerster, Peters, Schmidhuber, "Recurrent policy gradients", 2010). Nothing else is changed, so that what an agent loses
against the environment with velocities is what it does not remember.
"""

import dataclasses
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from jaxrl_dist.envs.wrapper import Wrapper

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
class VelocityFree(Wrapper):
    """An environment of whose observations `[n]` only the components `kept` are seen."""

    kept: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"velocity_free/{self.env.name}"

    def observation_space(self, params: Any = None) -> spaces.Box:
        inner = self.env.observation_space(self.env.default_params if params is None else params)
        low, high = (jnp.broadcast_to(bound, inner.shape)[np.array(self.kept)] for bound in (inner.low, inner.high))
        return spaces.Box(low, high, (len(self.kept),), inner.dtype)

    def seen(self, observation: jax.Array) -> jax.Array:
        return observation[np.array(self.kept)]

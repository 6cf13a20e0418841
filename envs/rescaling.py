"""Continuous actions always live in Box(-1, 1): the agent never learns an environment's units."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from jaxrl_dist.envs.wrapper import Wrapper
from jaxrl_dist.learning.spaces import SEVERAL, bounds_of, kind_of, spaces_of


def rescale_actions(env: Any, params: Any) -> Any:
    """The environment with actions in Box(-1, 1): `env` itself where that holds already or actions are choices.

    The bounds are read once, at `params`; environments whose bounds depend on parameters (Pendulum's `max_torque`)
    follow the parameters given to each step. Raises ValueError for other spaces than these, for an action that is
    unbounded, and for a bound that is not a number.
    """
    space, _ = spaces_of(env, params)
    kind = kind_of(space)
    if kind in ("discrete", SEVERAL):
        return env
    if kind != "continuous":
        raise ValueError(
            f"actions of {env.name} are {kind}, allowed: one choice (Discrete) or several at once (MultiDiscrete), or "
            "floats with finite bounds (Box)"
        )
    low, high = bounds_of(space)
    with np.errstate(over="ignore", invalid="ignore"):
        span = high - low  # infinite also for bounds of ±float32's largest number, which mean "unbounded"
    if not np.all(np.isfinite(span) & (span > 0)):
        raise ValueError(f"action_space of {env.name} is {space!r}, allowed: finite bounds with low < high")
    if np.all(low == -1) and np.all(high == 1):
        return env
    return RescaledActions(env)


@dataclasses.dataclass(frozen=True)
class RescaledActions(Wrapper):
    """An environment that takes actions in Box(-1, 1)."""

    def action_space(self, params: Any = None) -> spaces.Box:
        inner = self.env.action_space(self.env.default_params if params is None else params)
        return spaces.Box(-1.0, 1.0, inner.shape, inner.dtype)

    def inner_action(self, action: jax.Array, params: Any) -> jax.Array:
        """Affine map of [-1, 1] to the inner bounds; what lies outside is clipped to them."""
        space = self.env.action_space(params)
        low, high = jnp.asarray(space.low, space.dtype), jnp.asarray(space.high, space.dtype)
        # Around the centre, and clipped after the map: exact at 0, and no rounding can leave the bounds.
        return jnp.clip((low + high) / 2 + action * (high - low) / 2, low, high)

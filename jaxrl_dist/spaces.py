"""What an environment's spaces are, read by what they have rather than by class: many packages have their own ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def spaces_of(env, env_params) -> tuple[Any, Any]:
    """The action and the observation space.

    Agents ask while they are traced. There the bounds that an environment builds with jnp would be tracers; here they
    are numbers, unless they depend on parameters that are traced themselves.
    """
    with jax.ensure_compile_time_eval():
        return env.action_space(env_params), env.observation_space(env_params)


def kind_of(space: Any) -> str:
    """In words: "discrete" is one choice of n, "continuous" a box of floats, "integers" a box of anything else."""
    if hasattr(space, "spaces"):
        return "a tuple" if isinstance(space.spaces, tuple | list) else "a dict"
    if hasattr(space, "nvec") or (hasattr(space, "n") and space.shape != ()):
        return "several choices at once"
    if hasattr(space, "n"):
        return "discrete"
    if hasattr(space, "low") and hasattr(space, "high"):
        return "continuous" if jnp.issubdtype(space.dtype, jnp.floating) else "integers"
    return f"a {type(space).__name__}"


def bounds_of(box: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Lowest and highest values, each of the box's shape; None where they depend on traced parameters."""
    if any(isinstance(bound, jax.core.Tracer) for bound in (box.low, box.high)):
        return None
    return tuple(np.broadcast_to(np.asarray(bound, np.float32), box.shape) for bound in (box.low, box.high))

"""What an environment's spaces are, read by what they have rather than by class: many packages have their own ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.configuration import ConfigurationError

SEVERAL = "several choices at once"
"""What `kind_of` calls spaces like Gymnasium's MultiDiscrete and MultiBinary, and `envs.factored.MultiDiscrete`."""


def spaces_of(env, env_params) -> tuple[Any, Any]:
    """The action and the observation space.

    Agents ask while they are traced. There the bounds that an environment builds with jnp would be tracers; here they
    are numbers, unless they depend on parameters that are traced themselves.
    """
    with jax.ensure_compile_time_eval():
        return env.action_space(env_params), env.observation_space(env_params)


def kind_of(space: Any) -> str:
    """In words: "discrete" is one choice of n, "continuous" a box of floats, "integers" a box of anything else, and
    `SEVERAL` one choice of several for each of some factors."""
    if hasattr(space, "spaces"):
        return "a tuple" if isinstance(space.spaces, tuple | list) else "a dict"
    if hasattr(space, "nvec") or (hasattr(space, "n") and space.shape != ()):
        return SEVERAL
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


def counts_of(space: Any) -> np.ndarray:
    """Numbers of choices of a space of one or several, of the space's shape."""
    if hasattr(space, "nvec"):
        return np.asarray(space.nvec)
    return np.asarray(space.n) if space.shape == () else np.full(space.shape, 2)


# -- what an algorithm can take ----------------------------------------------------------------------------------------


class UnsupportedEnvironment(ConfigurationError):
    """An environment that an algorithm cannot take; `why` says in a few words what is in the way."""

    def __init__(self, env, why: str, needed: str):
        super().__init__(f"--env-id is {env.name}, whose {why}; this algorithm needs {needed}")
        self.why = why


def continuous_action_size(env, env_params) -> int:
    """Number of action components of an environment with vector observations and actions in [-1, 1]^n."""
    action_space, observation_space = spaces_of(env, env_params)
    kind = kind_of(action_space)
    require_environment(kind == "continuous", env, f"actions are {kind}", "continuous actions")
    bounds = bounds_of(action_space)
    needed = "a vector in [-1, 1] (jaxrl_dist.envs.rescale_actions maps finite bounds)"
    require_environment(bounds is not None, env, "actions have bounds that depend on traced parameters", needed)
    low, high = bounds
    require_environment(
        len(action_space.shape) == 1 and bool(np.all(low == -1) and np.all(high == 1)),
        env, f"actions have shape {action_space.shape} and bounds {_shown(low)} to {_shown(high)}", needed,
    )  # fmt: skip
    _check_observations(env, observation_space, (1,), "vectors")
    return action_space.shape[0]


def discrete_action_count(env, env_params) -> int:
    """Number of actions of an environment with a finite choice of them and array observations."""
    action_space, observation_space = spaces_of(env, env_params)
    kind, start = kind_of(action_space), getattr(action_space, "start", 0)
    require_environment(kind == "discrete", env, f"actions are {kind}", "a finite choice of actions")
    require_environment(start == 0, env, f"actions begin at {start}", "actions that are numbered from 0")
    require_environment(action_space.n >= 1, env, f"actions are {action_space.n} in number", "at least one")
    _check_observations(env, observation_space, (1, 2, 3), "vectors, matrices or images [height, width, channels]")
    shape = observation_space.shape
    require_environment(
        len(shape) < 3 or min(shape[:2]) >= 3, env, f"images have shape {shape}", "at least 3 x 3 pixels"
    )
    return int(action_space.n)


def factored_action_counts(env, env_params) -> tuple[int, ...]:
    """Numbers of choices for each factor of an environment with several choices at once and vector observations."""
    action_space, observation_space = spaces_of(env, env_params)
    kind, needed = kind_of(action_space), f"{SEVERAL} (discretised/NAME makes them of continuous actions)"
    require_environment(kind == SEVERAL, env, f"actions are {kind}", needed)
    counts, start = counts_of(action_space), np.asarray(getattr(action_space, "start", 0))
    require_environment(
        counts.ndim == 1 and counts.size > 0, env, f"actions have shape {counts.shape}", "a vector of choices"
    )
    require_environment(not start.any(), env, f"actions begin at {_shown(start)}", "actions that are numbered from 0")
    require_environment(
        bool((counts >= 1).all()), env, f"actions are of {_shown(counts)} choices", "at least one for each factor"
    )
    _check_observations(env, observation_space, (1,), "vectors")
    return tuple(int(count) for count in counts)


def require_environment(condition: bool, env, why: str, needed: str) -> None:
    """Raise UnsupportedEnvironment unless `condition` holds: "..., whose `why`; this algorithm needs `needed`"."""
    if not condition:
        raise UnsupportedEnvironment(env, why, needed)


def _check_observations(env, space, dimensions: tuple[int, ...], needed: str) -> None:
    kind = kind_of(space)
    hint = f"{needed} (jaxrl_dist.envs.one_hot_observations makes them)" if kind == "discrete" else needed
    require_environment(kind in ("continuous", "integers"), env, f"observations are {kind}", hint)
    fits = len(space.shape) in dimensions and 0 not in space.shape
    require_environment(fits, env, f"observations have shape {space.shape}", needed)


def _shown(bound: np.ndarray) -> str:
    """A bound, as one number where all components have the same."""
    return f"{bound.flat[0]:g}" if bound.size and np.all(bound == bound.flat[0]) else str(bound.tolist())

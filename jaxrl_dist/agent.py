"""The contract every algorithm file fulfils, and configurations that can be swept and checked."""

import dataclasses
import math
import numbers
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxrl_dist.distributional.law import Law
from jaxrl_dist.spaces import bounds_of, kind_of, spaces_of
from jaxrl_dist.wording import alternatives


class ConfigurationError(ValueError):
    """A setting that cannot work; the message names the argument, its value and what is allowed."""


class UnsupportedEnvironment(ConfigurationError):
    """An environment that an algorithm cannot take; `why` says in a few words what is in the way."""

    def __init__(self, env, why: str, needed: str):
        super().__init__(f"--env-id is {env.name}, whose {why}; this algorithm needs {needed}")
        self.why = why


class Agent(NamedTuple):
    """One algorithm on one environment, as pure functions that can be jitted, vmapped over runs, and sharded.

    Observations and actions carry a leading batch axis in `act`, `target_policy` and `predict`.
    """

    init: Callable[[jax.Array], Any]
    """`init(key) -> state`: parameters, replay filled by uniform random actions, environments in mid-episode."""
    step: Callable[[Any], tuple[Any, dict]]
    """`step(state) -> (state, metrics)`: one iteration, interact and then learn; metrics are `interaction.Average`s."""
    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """`act(state, observation, key) -> action`: what evaluation runs, without exploration."""
    target_policy: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """`target_policy(state, observation, key) -> (action, bonus)`: the policy whose return the critic learns, and what
    that return adds to each reward after the first (the entropy bonus of soft agents, else 0), `[batch]`."""
    predict: Callable[[Any, jax.Array, jax.Array], Law]
    """`predict(state, observation, action) -> law`: the learned return distribution as weighted atoms `[batch, atoms]`;
    agents that learn a mean return one atom per critic, see `learns_mean`."""
    export: Callable[[Any], dict[str, jax.Array]]
    """`export(state) -> arrays`: the evaluation policy for `portable.save_policy`."""
    warmup_steps: int
    """Environment steps taken by `init`."""
    steps_per_iteration: int
    """Environment steps taken by one `step`, over all environments."""
    updates_per_iteration: int
    """Gradient updates of the critic in one `step`."""
    learns_mean: bool = False
    """Whether the critic learns the mean of the return and not its distribution, whatever the number of atoms: two
    critics' means are no law of two atoms, and an agent with one quantile still learns a law."""


# -- configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """Allowed values of a numeric field, attached to its type with `Annotated`."""

    low: float
    high: float
    open_below: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_below else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        opening = "(" if self.open_below or math.isinf(self.low) else "["
        low, high = (str(x) if isinstance(x, int) else f"{x:g}" for x in (self.low, self.high))
        return f"{opening}{low}, {high}{')' if math.isinf(self.high) else ']'}"


Real = Annotated[float, Range(-math.inf, math.inf)]
Positive = Annotated[float, Range(0, math.inf, open_below=True)]
NonNegative = Annotated[float, Range(0, math.inf)]
Fraction = Annotated[float, Range(0, 1)]
LARGEST = 2**31 - 1
"""The largest size and number of steps: counters on the device are int32."""
Count = Annotated[int, Range(1, LARGEST)]
Natural = Annotated[int, Range(0, LARGEST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""What makes a key of its own: `jax.random.key` wraps beyond 32 bits."""
Layers = Annotated[tuple[int, ...], Range(1, LARGEST)]
"""Widths of one or more hidden layers; a plain `tuple[int, ...]` may be empty."""


def configuration(cls):
    """Class decorator: a frozen dataclass whose floats are traced leaves of a pytree and whose other fields are static.

    So one compiled program serves every value of a float, and `jax.vmap` sweeps it; sizes and choices select programs.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    hints = typing.get_type_hints(cls)
    leaves = [field.name for field in dataclasses.fields(cls) if hints[field.name] is float]
    static = [field.name for field in dataclasses.fields(cls) if hints[field.name] is not float]
    return jax.tree_util.register_dataclass(cls, leaves, static)


def check_configuration(config) -> None:
    """Raise ConfigurationError for the first field whose value is not of its type, not finite or out of its range."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        check_value(option(field.name), hints[field.name], getattr(config, field.name))


def check_value(name: str, hint: Any, value: Any) -> None:
    """Raise ConfigurationError unless `value` is one of the type `hint`; a float may be an array, as in sweeps.

    Numbers must fit what computes with them: sizes and counters int32, all others float32.
    """
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    hint = hint.__origin__ if ranges else hint
    series = typing.get_origin(hint) is tuple
    of = typing.get_args(hint)[0] if series else hint
    each = [value]
    if series:
        each = value if isinstance(value, tuple) and (value or not ranges) else [None]
    elif of is float:
        each = np.ravel(value).tolist()
    if typing.get_origin(of) is Literal:
        fits, allowed, value = value in typing.get_args(of), alternatives(typing.get_args(of)), repr(value)
    elif of is int:
        ranges = ranges or [Range(1 if series else -LARGEST - 1, LARGEST)]
        allowed = f"{'whole numbers' if series else 'a whole number'} in {ranges[0]}"
        fits = all(isinstance(x, numbers.Integral) and not isinstance(x, bool) and x in ranges[0] for x in each)
    elif of is float:
        allowed = " and ".join(["finite", *(f"in {r}" for r in ranges if not math.isinf(r.low))])
        right = all(isinstance(x, numbers.Real) and _within(x, ranges) for x in each)
        fits = right and all(_within(as_float32(x), ranges) for x in each)
        allowed += ", also as float32" * right
    else:
        allowed = "True or False" if of is bool else "text"
        fits = of not in (bool, str) or all(isinstance(x, of) for x in each)
    require(fits, f"{name} is {value}; it must be {allowed}")


def _within(number: float, ranges: Sequence[Range]) -> bool:
    return math.isfinite(number) and all(number in allowed for allowed in ranges)


def as_float32(number: float) -> float:
    """As programs see it: huge numbers become infinite, and tiny ones 0 (XLA has no subnormal numbers)."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(number)
    return 0.0 if abs(rounded) < np.finfo(np.float32).tiny else float(rounded)


def option(field_name: str) -> str:
    """The command-line spelling of a field: `batch_size` -> `--batch-size`."""
    return "--" + field_name.replace("_", "-")


def require(condition: bool, message: str) -> None:
    """Raise ConfigurationError unless `condition` holds; the message names argument, value and what is allowed."""
    if not condition:
        raise ConfigurationError(message)


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


def check_replay(config) -> None:
    """The relations between sizes that every replay-based algorithm needs, before anything compiles."""
    rows = {"replay_capacity": config.replay_capacity, "num_envs": config.num_envs * getattr(config, "num_steps", 1)}
    for name, count in rows.items():
        require(
            count <= LARGEST // 2,
            f"{option(name)} is {getattr(config, name)}, {count} rows; at most {LARGEST // 2}, since rows are "
            "numbered in int32 and their numbers added",
        )
    require(
        config.batch_size <= config.warmup_steps,
        f"--batch-size is {config.batch_size}; it must be at most --warmup-steps = {config.warmup_steps}, "
        "so that the first batch holds rows that were written",
    )
    require(
        config.warmup_steps <= config.replay_capacity,
        f"--replay-capacity is {config.replay_capacity}; it must be at least --warmup-steps = {config.warmup_steps}",
    )
    require(
        config.num_envs <= config.warmup_steps,
        f"--num-envs is {config.num_envs}; it must be at most --warmup-steps = {config.warmup_steps}",
    )


def check_policy_delay(config) -> None:
    """Rounds of `policy_delay` critic updates and one of the actor must fill an iteration."""
    require(
        config.updates_per_iteration % config.policy_delay == 0,
        f"--updates-per-iteration is {config.updates_per_iteration}; it must be a multiple of --policy-delay = "
        f"{config.policy_delay}",
    )

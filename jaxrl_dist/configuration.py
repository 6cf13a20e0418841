"""Configurations that can be swept and checked: whose floats are traced, and whose every field has its range."""

import dataclasses
import math
import numbers
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from jaxrl_dist.wording import alternatives


class ConfigurationError(ValueError):
    """A setting that cannot work; the message names the argument, its value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Bounds:
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


Real = Annotated[float, Bounds(-math.inf, math.inf)]
Positive = Annotated[float, Bounds(0, math.inf, open_below=True)]
NonNegative = Annotated[float, Bounds(0, math.inf)]
Fraction = Annotated[float, Bounds(0, 1)]
LARGEST = 2**31 - 1
"""The largest size and number of steps: counters on the device are int32."""
Count = Annotated[int, Bounds(1, LARGEST)]
Natural = Annotated[int, Bounds(0, LARGEST)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
"""What makes a key of its own: `jax.random.key` wraps beyond 32 bits."""
Layers = Annotated[tuple[int, ...], Bounds(1, LARGEST)]
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
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bounds)]
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
        ranges = ranges or [Bounds(1 if series else -LARGEST - 1, LARGEST)]
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


def _within(number: float, ranges: Sequence[Bounds]) -> bool:
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

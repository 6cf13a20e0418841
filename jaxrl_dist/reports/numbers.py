"""Numbers over seeds with their intervals, and how they are written."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxrl_dist.records import statistics
from jaxrl_dist.reports.runs import NONE


class Estimate(NamedTuple):
    """A number over seeds with its 95 % interval, which is NaN where there is one seed."""

    value: float
    low: float = math.nan
    high: float = math.nan


def estimate(scores: np.ndarray, statistic: Callable[..., np.ndarray] = statistics.interquartile_mean) -> Estimate:
    """A statistic of scores `[seeds]` or `[seeds, tasks]` with its 95 % interval; NaN of no seeds."""
    if len(scores) == 0:
        return Estimate(math.nan)
    value = float(statistic(np.reshape(scores, (1, -1)), axis=1)[0])
    return Estimate(value, *statistics.bootstrap_interval(scores, statistic)) if len(scores) > 1 else Estimate(value)


def improvement(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Probability that a run of X scores above one of Y, with its 95 % interval."""
    interval = statistics.improvement_interval(x, y) if min(len(x), len(y)) > 1 else ()
    return Estimate(statistics.probability_of_improvement(x, y), *interval)


def digits_for(largest: float) -> int:
    """Digits after the point that a table shows of numbers up to this size."""
    if 0 < largest < 1:
        return 3 + math.floor(-math.log10(largest))
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def number(value: float, digits: int = 1) -> str:
    """A number for people: thousands apart, a true minus sign, a dash for none."""
    if not math.isfinite(value):
        return NONE
    return f"{round(float(value), digits) + 0.0:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    """`.013`, and `<.001` for what is less."""
    return "<.001" if p < 0.0005 else f"{p:.3f}".removeprefix("0")

"""Statistics over seeds and tasks: interquartile mean, stratified bootstrap intervals, conditional value at risk.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264
(IQM and stratified bootstrap); Rockafellar and Uryasev, "Conditional value-at-risk for general loss distributions",
Journal of Banking and Finance 26, 2002 (splitting the boundary atom).
"""

from collections.abc import Callable

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike


def interquartile_mean(values: ArrayLike, axis: int | None = None) -> np.ndarray | float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut off at each end.

    values: any shape; `axis=None` pools all of them, an integer reduces that axis. Raises ValueError when there is
    nothing to average or when a value is NaN, which a trimmed mean would otherwise sort to the end and cut off.
    Source: arXiv 2108.13264, section 4.3.
    """
    return scipy.stats.trim_mean(_checked("values", values), 0.25, axis=axis)


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of all scores, resampling the seeds of each task apart.

    scores: `[seeds]` or `[seeds, tasks]`, at least two seeds. statistic: called as `statistic(pooled, axis=1)` on
    `[resamples, seeds * tasks]`, as np.mean, np.median and interquartile_mean can be. Returns (low, high) in the units
    of the scores. The same `seed` always gives the same interval. Source: arXiv 2108.13264, section 4.1.
    """
    scores = _checked("scores", scores)
    if scores.ndim not in (1, 2):
        raise ValueError(f"scores has shape {scores.shape}, but must be [seeds] or [seeds, tasks]")
    if len(scores) < 2:
        raise ValueError(f"scores has shape {scores.shape}: an interval over seeds needs at least two of them")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1")
    confidence = _checked_fraction("confidence", confidence)

    scores = scores.reshape(len(scores), -1)
    seeds, tasks = scores.shape
    # Tasks are fixed, seeds are what chance chose: every task draws its own seeds, no task is ever left out.
    chosen = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds, tasks))
    pooled = scores[chosen, np.arange(tasks)].reshape(resamples, seeds * tasks)
    outside = (1 - confidence) / 2
    low, high = np.quantile(statistic(pooled, axis=1), [outside, 1 - outside])
    return float(low), float(high)


def conditional_value_at_risk(returns: ArrayLike, level: float) -> float:
    """Mean of the worst (lowest) `level` fraction of the returns; `level=1` is the mean.

    returns: any shape, pooled; level: in (0, 1]. Where `level` of the sample is no whole number of returns, the return
    at the boundary counts with the fraction that is missing, so the value is exact for the empirical distribution and
    continuous in `level`. Source: Rockafellar and Uryasev 2002, proposition 8.
    """
    level = _checked_fraction("level", level)
    worst_first = np.sort(_checked("returns", returns), axis=None)
    worst = level * len(worst_first)
    weights = np.clip(worst - np.arange(len(worst_first)), 0.0, 1.0)
    counted = weights > 0  # a weight of zero times an infinite return would be NaN
    return float(np.sum(weights[counted] * worst_first[counted]) / worst)


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError(f"{name} is empty (shape {values.shape})")
    if np.isnan(values).any():
        raise ValueError(f"{name} holds {np.isnan(values).sum()} NaN of {values.size} values; leave them out knowingly")
    return values


def _checked_fraction(name: str, value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, but must lie in (0, 1]")
    return float(value)

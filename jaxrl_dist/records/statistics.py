"""Statistics over seeds and tasks: aggregates, comparisons and their stratified bootstrap intervals, value at risk.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264
(interquartile mean, optimality gap, probability of improvement, performance profiles, stratified bootstrap);
Rockafellar and Uryasev, "Conditional value-at-risk for general loss distributions", Journal of Banking and Finance 26,
2002 (splitting the boundary atom).
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike


def interquartile_mean(values: ArrayLike, axis: int | None = None) -> np.ndarray | float:
    """Mean of the middle half: a quarter of the values, rounded down, is cut off at each end.

    values: any shape; `axis=None` pools all of them, an integer reduces that axis. Raises ValueError when there is
    nothing to average or when a value is NaN, which a trimmed mean would otherwise sort to the end and cut off.
    Source: arXiv 2108.13264, section 4.3.
    """
    # As `scipy.stats.trim_mean` of a quarter, whose import takes as long as all of JAX's, at the start of every run.
    values = _checked("values", values)
    values = values.ravel() if axis is None else np.moveaxis(values, axis, -1)
    cut = values.shape[-1] // 4
    return np.partition(values, (cut, values.shape[-1] - cut - 1))[..., cut : values.shape[-1] - cut].mean(-1)


def optimality_gap(scores: ArrayLike, threshold: float = 1.0, axis: int | None = None) -> np.ndarray | float:
    """Mean amount by which normalized scores miss `threshold`; what lies beyond it counts as no more than it.

    scores: any shape; `axis=None` pools all of them, an integer reduces that axis. 0 is best; in units of the scores.
    Source: arXiv 2108.13264, section 4.3.
    """
    return threshold - np.mean(np.minimum(_checked("scores", scores), threshold), axis=axis)


def performance_profile(scores: ArrayLike, taus: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Fraction of runs that score above each tau, `[taus]`; `axis` as for `optimality_gap`, then `[..., taus]`.

    Its pointwise band is `bootstrap_interval(scores, functools.partial(performance_profile, taus=taus))`.
    Source: arXiv 2108.13264, section 4.2 (run-score distribution).
    """
    scores = _checked("scores", scores)
    return np.stack([np.mean(scores > tau, axis=axis) for tau in _checked("taus", taus)], axis=-1)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """How likely a run of X scores above a run of Y on the same task, mean over tasks; ties count half.

    x: `[seeds]` or `[seeds, tasks]`; y: the same tasks, any number of seeds. Source: arXiv 2108.13264, section 4.3
    (the Mann-Whitney U statistic over the number of pairs).
    """
    return float(_improvement(*_same_tasks(x, y)))


def improvement_interval(
    x: ArrayLike, y: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `probability_of_improvement`, resampling both algorithms' seeds per task."""
    confidence = _checked_fraction("confidence", confidence)
    rng = np.random.default_rng(seed)
    outcomes = _improvement(*(_resampled(scores, resamples, rng) for scores in _same_tasks(x, y)))
    return _percentiles(outcomes, confidence)


def area_under_curve(env_steps: ArrayLike, returns: ArrayLike) -> np.ndarray | float:
    """Mean return over training: the trapezoid area under the learning curve over the env steps that it spans.

    env_steps: `[points]`, increasing, at least two; returns: `[..., points]`. In units of return.
    """
    env_steps, returns = _checked("env_steps", env_steps), _checked("returns", returns)
    if env_steps.ndim != 1 or len(env_steps) < 2 or returns.shape[-1:] != env_steps.shape:
        raise ValueError(
            f"env_steps has shape {env_steps.shape} and returns {returns.shape}; they must be [points] and "
            "[..., points] with at least two points"
        )
    if (np.diff(env_steps) <= 0).any():
        raise ValueError(f"env_steps must increase, but is {env_steps.tolist()}")
    return np.trapezoid(returns, env_steps, axis=-1) / (env_steps[-1] - env_steps[0])


def bootstrap_interval(
    scores: ArrayLike,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of a statistic of all scores, resampling the seeds of each task apart.

    scores: `[seeds]` or `[seeds, tasks]`, at least two seeds. statistic: called as `statistic(pooled, axis=1)` on
    `[resamples, seeds * tasks]`, as np.mean, np.median and interquartile_mean can be. Returns (low, high) in the units
    of the scores, arrays where the statistic has several values. The same `seed` always gives the same interval.
    Source: arXiv 2108.13264, section 4.1.
    """
    confidence = _checked_fraction("confidence", confidence)
    pooled = _resampled(_by_task("scores", scores), resamples, np.random.default_rng(seed))
    return _percentiles(statistic(pooled.reshape(resamples, -1), axis=1), confidence)


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


def _by_task(name: str, scores: ArrayLike) -> np.ndarray:
    """Scores as `[seeds, tasks]`."""
    scores = _checked(name, scores)
    if scores.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {scores.shape}, but must be [seeds] or [seeds, tasks]")
    return scores.reshape(len(scores), -1)


def _same_tasks(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _by_task("x", x), _by_task("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x has {x.shape[1]} tasks and y has {y.shape[1]}, but they must be the same ones")
    return x, y


def _improvement(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`[..., seeds of x, tasks]` against `[..., seeds of y, tasks]`: part of the pairs that x wins, `[...]`."""
    rows = np.moveaxis(x, -2, 0)[..., None, :]  # one seed of x at a time: all pairs of all resamples would be large
    return sum(np.mean((row > y) + 0.5 * (row == y), axis=(-2, -1)) for row in rows) / len(rows)


def _resampled(scores: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap resamples `[resamples, seeds, tasks]` of scores `[seeds, tasks]`."""
    seeds, tasks = scores.shape
    if seeds < 2:
        raise ValueError(f"scores has shape {scores.shape}: an interval over seeds needs at least two of them")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1")
    # Tasks are fixed, seeds are what chance chose: every task draws its own seeds, no task is ever left out.
    chosen = rng.integers(seeds, size=(resamples, seeds, tasks))
    return scores[chosen, np.arange(tasks)]


def _percentiles(outcomes: np.ndarray, confidence: float) -> tuple:
    """The central interval of outcomes `[resamples, ...]`, as numbers where there is one outcome per resample."""
    outside = (1 - confidence) / 2
    low, high = np.quantile(outcomes, [outside, 1 - outside], axis=0)
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


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

"""Statistics over seeds and tasks: aggregates, comparisons and their stratified bootstrap intervals, value at risk;
tests of two algorithms, Holm's correction, and how many seeds such a test needs.

Sources: Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264
(interquartile mean, optimality gap, probability of improvement, performance profiles, stratified bootstrap);
Rockafellar and Uryasev, "Conditional value-at-risk for general loss distributions", Journal of Banking and Finance 26,
2002 (splitting the boundary atom); Colas, Sigaud and Oudeyer, "How many random seeds? Statistical power analysis in
deep reinforcement learning experiments", arXiv 1806.08295 (Welch's test of seeds, and its power); Holm, "A simple
sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979; Janssen, "Studentized
permutation tests for non-i.i.d. hypotheses and the generalized Behrens-Fisher problem", Statistics and Probability
Letters 36, 1997.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


# -- two algorithms on one task ---------------------------------------------------------------------------------------

# Where there are at most so many signs or ways to deal the seeds out, a test goes through all of them; else through so
# many drawn at random.
MOST_PERMUTATIONS = 9999
# Seeds per side (pairs) from which on a test that goes through all permutations can reach p = .05 at all.
FEWEST_SEEDS, FEWEST_PAIRS = 4, 6


class PermutationTest(NamedTuple):
    """Two-sided p of a permutation test, and the smallest that it could have had with so many seeds."""

    p: float
    smallest: float


def difference_interval(
    x: ArrayLike,
    y: ArrayLike,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    *,
    paired: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of statistic(x) - statistic(y), resampling the seeds of each side, or the pairs.

    x, y: `[seeds]`, at least two; paired: x[i] and y[i] belong together. statistic: as in `bootstrap_interval`, of
    `[resamples, seeds]`. In units of the scores. Source: arXiv 2108.13264, section 4.1.
    """
    confidence = _checked_fraction("confidence", confidence)
    x, y = _two_sides(x, y, paired)
    rng = np.random.default_rng(seed)
    if paired:
        chosen = _resampled(np.arange(len(x))[:, None], resamples, rng)[..., 0]
        of_x, of_y = x[chosen], y[chosen]
    else:
        of_x, of_y = (_resampled(side[:, None], resamples, rng)[..., 0] for side in (x, y))
    return _percentiles(statistic(of_x, axis=1) - statistic(of_y, axis=1), confidence)


def paired_test(x: ArrayLike, y: ArrayLike, *, most: int = MOST_PERMUTATIONS, seed: int = 0) -> PermutationTest:
    """Sign-flip test of no difference between pairs: each x[i] - y[i] would be as likely with the other sign.

    x, y: `[pairs]`, at least two. The statistic is the mean difference; with up to `most` sets of signs all are tried,
    and p is exact, else `most` random ones (drawn from `seed`) and the given one. Source: Fisher, "The Design of
    Experiments", 1935, section 21; computed by `scipy.stats.permutation_test`.
    """
    x, y = _two_sides(x, y, paired=True)
    smallest = _smallest_p(2 ** len(x), most)
    if (x == y).all():
        return PermutationTest(1.0, smallest)
    return PermutationTest(_permuted((x - y,), lambda of, axis: of.mean(axis), "samples", most, seed), smallest)


def unpaired_test(x: ArrayLike, y: ArrayLike, *, most: int = MOST_PERMUTATIONS, seed: int = 0) -> PermutationTest:
    """Permutation test of equal means by Welch's t: which of all seeds were x's is as good as drawn.

    x, y: `[seeds]`, at least two each, their numbers may differ. Exact where both have the same distribution; since t
    is studentized it also holds, for many seeds, where they share the mean alone. `most`, `seed`: as in `paired_test`.
    Source: Janssen 1997; computed by `scipy.stats.permutation_test`.
    """
    x, y = _two_sides(x, y)
    smallest = _smallest_p(math.comb(len(x) + len(y), len(x)), most)
    scale = np.abs(np.concatenate([x, y]) - x.mean()).max()
    if scale == 0:
        return PermutationTest(1.0, smallest)
    # Where both sides are dealt equal scores, no spread is left to divide by: so small a one that no t is beyond.
    floor = 1e-9 * scale

    def welch(of_x: np.ndarray, of_y: np.ndarray, axis: int) -> np.ndarray:
        parts = [side.var(axis, ddof=1) / side.shape[axis] for side in (of_x, of_y)]
        return (of_x.mean(axis) - of_y.mean(axis)) / np.maximum(np.sqrt(sum(parts)), floor)

    return PermutationTest(_permuted((x, y), welch, "independent", most, seed), smallest)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of several tests, in the order given: rejecting those below a level keeps the probability of
    any false rejection below it, however the tests depend on each other. Source: Holm 1979."""
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values are {p.tolist()}, but must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    # The smallest of k counts k times, the next k - 1 times, and none less than one before it.
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def power(
    x: ArrayLike,
    y: ArrayLike,
    seeds: int,
    *,
    paired: bool = False,
    level: float = 0.05,
    simulations: int = 2000,
    seed: int = 0,
) -> float:
    """Probability that a test of `seeds` new seeds per side (pairs) tells x from y, if x and y are what is to be known
    of them.

    Simulated: new seeds are drawn from those at hand, with their deviations from the mean stretched by
    sqrt(k / (k - 1)) of k seeds, so that their variance is the unbiased estimate. The test is Welch's t (Student's for
    pairs), which stands for the permutation tests above: those would take as long again for every simulated study.
    Source: arXiv 1806.08295, section 3.
    """
    from scipy.special import stdtr  # as scipy.stats, but quick to import

    x, y = _two_sides(x, y, paired)
    rng = np.random.default_rng(seed)
    if paired:
        drawn = _new_seeds(x - y, simulations, seeds, rng)
        squared = drawn.var(1, ddof=1) / seeds
        difference, freedom = drawn.mean(1), np.float64(seeds - 1)
    else:
        of_x, of_y = (_new_seeds(side, simulations, seeds, rng) for side in (x, y))
        parts = np.stack([side.var(1, ddof=1) / seeds for side in (of_x, of_y)])
        squared, difference = parts.sum(0), of_x.mean(1) - of_y.mean(1)
        with np.errstate(invalid="ignore"):
            freedom = np.where(squared > 0, (seeds - 1) * squared**2 / (parts**2).sum(0), seeds - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0, np.abs(difference) / np.sqrt(squared))
    return float(np.mean(2 * stdtr(freedom, -t) <= level))


def seeds_needed(
    x: ArrayLike,
    y: ArrayLike,
    *,
    paired: bool = False,
    target: float = 0.8,
    level: float = 0.05,
    most: int = 1000,
    simulations: int = 2000,
    seed: int = 0,
) -> int | None:
    """Fewest seeds per side (pairs) with which `power` reaches `target`; None where `most` do not.

    No fewer than `FEWEST_SEEDS` (`FEWEST_PAIRS`), with which an exact test can reach p = .05. It takes the difference
    and the spread at hand for the true ones, which few seeds tell badly: `seeds_needed_of` at the ends of the
    difference's interval says how badly.
    """
    low, high = FEWEST_PAIRS if paired else FEWEST_SEEDS, most

    def enough(seeds: int) -> bool:
        found = power(x, y, seeds, paired=paired, level=level, simulations=simulations, seed=seed)
        return found >= _checked_fraction("target", target)

    if enough(low):
        return low
    if not enough(high):
        return None
    while high - low > 1:  # `low` are too few, `high` are enough
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def seeds_needed_of(difference: float, variance: float, *, target: float = 0.8, level: float = 0.05) -> float:
    """Seeds per side (pairs) that a two-sided test of normal scores needs: the closed form; inf for no difference.

    variance: that of a seed's score, summed over both sides; of pairs that of their difference. n = (z(1 - level / 2) +
    z(target))^2 variance / difference^2, not rounded, for known variances. Source: arXiv 1806.08295, section 3.
    """
    from scipy.special import ndtri

    if difference == 0:
        return math.inf
    z = ndtri(1 - _checked_fraction("level", level) / 2) + ndtri(_checked_fraction("target", target))
    return float(z**2 * variance / difference**2)


# -- small things -----------------------------------------------------------------------------------------------------


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


def _two_sides(x: ArrayLike, y: ArrayLike, paired: bool = False) -> tuple[np.ndarray, np.ndarray]:
    sides = _checked("x", x), _checked("y", y)
    for name, side in zip("xy", sides, strict=True):
        if side.ndim != 1 or len(side) < 2:
            raise ValueError(f"{name} has shape {side.shape}, but must be [seeds] with at least two of them")
        if not np.isfinite(side).all():
            raise ValueError(f"{name} holds infinite values; leave them out knowingly")
    if paired and len(x) != len(y):
        raise ValueError(f"x has {len(x)} seeds and y has {len(y)}, but pairs have one of each")
    return sides


def _smallest_p(permutations: int, most: int) -> float:
    """Of a two-sided test: the given scores and their mirror image, or one tail of random draws, doubled."""
    return min(1.0, 2 / permutations if permutations <= most else 2 / (most + 1))


def _permuted(data: tuple, statistic: Callable, kind: str, most: int, seed: int) -> float:
    import scipy.stats  # here, since its import takes as long as all of JAX's

    found = scipy.stats.permutation_test(
        data, statistic, permutation_type=kind, vectorized=True, n_resamples=most,
        random_state=np.random.default_rng(seed), axis=-1,
    )  # fmt: skip
    return float(found.pvalue)


def _new_seeds(scores: np.ndarray, simulations: int, seeds: int, rng: np.random.Generator) -> np.ndarray:
    """Scores `[simulations, seeds]` as those at hand have them, with the unbiased estimate of their variance."""
    mean, k = scores.mean(), len(scores)
    return mean + math.sqrt(k / (k - 1)) * (scores - mean)[rng.integers(k, size=(simulations, seeds))]

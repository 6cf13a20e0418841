import functools
import importlib
import itertools
import sys
import types

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

# rliable.library needs `arch` for its bootstrap, and arch 7.2 fails to import beside pandas 3; its metrics do import.
# The bootstrap is therefore checked against scipy's and against a slow loop.
from rliable import metrics as rliable_metrics

from jaxrl_dist.records.statistics import (
    area_under_curve,
    bootstrap_interval,
    conditional_value_at_risk,
    difference_interval,
    holm,
    improvement_interval,
    interquartile_mean,
    optimality_gap,
    paired_test,
    performance_profile,
    power,
    probability_of_improvement,
    seeds_needed,
    seeds_needed_of,
    unpaired_test,
)

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)
SHAPES = [(1, 1), (3, 1), (10, 1), (10, 6), (7, 5)]


@pytest.fixture(scope="module")
def rliable_library():
    """rliable.library with a stand-in for arch, of which its performance profiles need nothing."""
    stand_in = types.ModuleType("arch.bootstrap")
    stand_in.IIDBootstrap = stand_in.IndependentSamplesBootstrap = object
    package = types.ModuleType("arch")
    package.bootstrap = stand_in
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "arch", package)
        patch.setitem(sys.modules, "arch.bootstrap", stand_in)
        library = importlib.import_module("rliable.library")
        yield library
    sys.modules.pop("rliable.library")


def test_interquartile_mean_by_hand():
    # Eight values: two go at each end whatever they are, (3 + 4 + 5 + 8) / 4 stays.
    assert interquartile_mean([1e9, 3, 8, 1, 4, 2e9, -7, 5]) == pytest.approx(5.0)
    # Five values: a quarter is 1.25, rounded down to one at each end.
    assert interquartile_mean([0, 1, 2, 6, 100]) == pytest.approx(3.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_interquartile_mean_is_rliables(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(rliable_metrics.aggregate_iqm(scores), rel=1e-12)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("count", range(1, 14))
def test_interquartile_mean_is_scipys_trimmed_mean(count, axis):
    values = np.random.default_rng(count).normal(size=(count, 5))
    np.testing.assert_allclose(interquartile_mean(values, axis), scipy.stats.trim_mean(values, 0.25, axis), rtol=1e-12)


def test_interquartile_mean_along_an_axis():
    scores = np.random.default_rng(1).normal(size=(9, 4))
    by_column = [interquartile_mean(scores[:, task]) for task in range(4)]
    np.testing.assert_allclose(interquartile_mean(scores, axis=0), by_column)


@pytest.mark.parametrize("wrong", [[], [1.0, np.nan]])
def test_interquartile_mean_rejects(wrong):
    with pytest.raises(ValueError, match="values"):
        interquartile_mean(wrong)


def test_optimality_gap_by_hand():
    # 3 counts as 1: 1 - (0.5 + 1 - 1 + 1) / 4.
    assert optimality_gap([0.5, 3.0, -1.0, 1.0]) == pytest.approx(0.625)
    assert optimality_gap([[0.5, 3.0], [-1.0, 1.0]], threshold=2.0) == pytest.approx(2 - (0.5 + 2 - 1 + 1) / 4)
    np.testing.assert_allclose(optimality_gap([[0.5, 3.0], [-1.0, 1.0]], axis=1), [0.25, 1.0])
    assert optimality_gap([1.0, 7.0]) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_optimality_gap_is_rliables(shape):
    scores = np.random.default_rng(6).normal(0.8, size=shape)
    theirs = rliable_metrics.aggregate_optimality_gap(scores)
    assert optimality_gap(scores) == pytest.approx(theirs, rel=1e-12)
    theirs = rliable_metrics.aggregate_optimality_gap(scores, gamma=0.3)
    assert optimality_gap(scores, threshold=0.3) == pytest.approx(theirs, rel=1e-12)


def test_performance_profile_by_hand():
    # Above, not at: of 0, 1, 1 and 4, three are above 0.5 and only one is above 1.
    np.testing.assert_array_equal(performance_profile([[0, 1], [1, 4]], [-1, 0, 0.5, 1, 4]), [1, 0.75, 0.75, 0.25, 0])
    np.testing.assert_array_equal(performance_profile([[0, 1], [1, 4]], [0, 2], axis=1), [[0.5, 0], [1, 0.5]])


@pytest.mark.parametrize("shape", SHAPES)
def test_performance_profile_is_rliables(shape, rliable_library):
    scores = np.random.default_rng(7).integers(0, 4, size=shape).astype(float)
    taus = np.linspace(-1, 5, 25)
    np.testing.assert_allclose(performance_profile(scores, taus), rliable_library.score_distributions(scores, taus))


def test_performance_band_equals_the_slow_loop():
    scores = np.random.default_rng(8).normal(size=(6, 3)) + [0, 0.5, 1]
    taus = np.linspace(-1, 2, 7)
    low, high = bootstrap_interval(scores, functools.partial(performance_profile, taus=taus), 0.9, 300, seed=5)
    for tau, below, above in zip(taus, low, high, strict=True):
        slow = slow_bootstrap(scores, lambda resampled: np.mean(resampled > tau), 0.9, 300, 5)
        np.testing.assert_allclose((below, above), slow)


def test_probability_of_improvement_by_hand():
    # Of the six pairs, 3 beats 1 and 2, 2 beats 1 and ties with 2, 1 ties with 1: 3 wins and 2 ties.
    assert probability_of_improvement([1, 2, 3], [1, 2]) == pytest.approx(4 / 6)
    assert probability_of_improvement([1, 2], [1, 2, 3]) == pytest.approx(2 / 6)
    # First task: X always wins. Second task: all tied.
    assert probability_of_improvement([[5, 0], [6, 0]], [[4, 0], [-9, 0], [3, 0]]) == pytest.approx(0.75)
    assert probability_of_improvement([1.0], [1.0]) == 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_probability_of_improvement_is_rliables(shape):
    rng = np.random.default_rng(9)
    x, y = (rng.integers(0, 5, size=size).astype(float) for size in (shape, (4, shape[1])))
    theirs = rliable_metrics.probability_of_improvement(x, y)
    assert probability_of_improvement(x, y) == pytest.approx(theirs, rel=1e-12)


def test_improvement_interval_equals_the_slow_loop():
    rng = np.random.default_rng(10)
    x, y = rng.integers(0, 5, size=(5, 3)), rng.integers(0, 4, size=(4, 3))
    rng, choices = np.random.default_rng(7), []
    for scores in (x, y):
        choices.append(rng.integers(len(scores), size=(200, *scores.shape)))
    outcomes = []
    for chosen_x, chosen_y in zip(*choices, strict=True):
        by_task = []
        for task in range(3):
            pairs = [(x[i, task], y[j, task]) for i in chosen_x[:, task] for j in chosen_y[:, task]]
            by_task.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))
        outcomes.append(np.mean(by_task))
    slow = np.percentile(outcomes, [10, 90])
    np.testing.assert_allclose(improvement_interval(x, y, confidence=0.8, resamples=200, seed=7), slow)


def test_improvement_interval_keeps_tasks_apart_and_has_no_side():
    assert improvement_interval([[1, 7], [2, 9]], [[0, 8], [0.5, 8]])[0] >= 0.5  # the first task is always won
    assert improvement_interval([1, 2], [3, 4]) == (0.0, 0.0)
    low, high = improvement_interval(range(8), range(8))
    assert low < 0.5 < high


def test_area_under_curve_by_hand():
    # 0 to 10 over 2 steps, then level for 6: (2 * 5 + 6 * 10) / 8.
    assert area_under_curve([1, 3, 9], [0.0, 10.0, 10.0]) == pytest.approx(8.75)
    np.testing.assert_allclose(area_under_curve([1, 3, 9], [[0, 10, 10], [2, 2, 2]]), [8.75, 2.0])
    rng = np.random.default_rng(11)
    steps, returns = np.cumsum(rng.uniform(0.1, 1, size=9)), rng.normal(size=9)
    fine = np.linspace(steps[0], steps[-1], 200_001)
    assert area_under_curve(steps, returns) == pytest.approx(np.mean(np.interp(fine, steps, returns)), abs=1e-4)


@pytest.mark.parametrize(
    ("steps", "returns", "message"),
    [
        ([1], [1], "at least two points"),
        ([1, 2], [1, 2, 3], r"shape \(2,\) and returns \(3,\)"),
        ([1, 1], [1, 2], "env_steps must increase"),
        ([1, 2], [1, np.nan], "returns holds 1 NaN"),
    ],
)
def test_area_under_curve_rejects(steps, returns, message):
    with pytest.raises(ValueError, match=message):
        area_under_curve(steps, returns)


def test_comparisons_reject():
    with pytest.raises(ValueError, match="x has 1 tasks and y has 2"):
        probability_of_improvement([1, 2], [[1, 2]])
    with pytest.raises(ValueError, match=r"y has shape \(1, 1, 1\)"):
        probability_of_improvement([1, 2], [[[1]]])
    with pytest.raises(ValueError, match="at least two"):
        improvement_interval([1, 2], [1])
    with pytest.raises(ValueError, match="confidence is 2"):
        improvement_interval([1, 2], [1, 2], confidence=2)
    with pytest.raises(ValueError, match="taus is empty"):
        performance_profile([1.0], [])


def slow_bootstrap(scores, statistic, confidence, resamples, seed):
    """One resample and one task at a time, from the same random numbers."""
    seeds, tasks = scores.shape
    chosen = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds, tasks))
    outcomes = []
    for resample in range(resamples):
        resampled = np.empty_like(scores)
        for task in range(tasks):
            for row in range(seeds):
                resampled[row, task] = scores[chosen[resample, row, task], task]
        outcomes.append(statistic(resampled))
    return np.percentile(outcomes, [50 * (1 - confidence), 50 * (1 + confidence)])


@pytest.mark.parametrize("statistic", [interquartile_mean, np.mean, np.median])
def test_bootstrap_equals_the_slow_loop(statistic):
    scores = np.random.default_rng(2).normal(size=(6, 3)) + [0, 10, 100]
    fast = bootstrap_interval(scores, statistic, confidence=0.9, resamples=300, seed=5)
    np.testing.assert_allclose(fast, slow_bootstrap(scores, statistic, 0.9, 300, 5))


def test_bootstrap_agrees_with_scipy_for_one_task():
    scores = np.random.default_rng(3).normal(size=30)
    theirs = scipy.stats.bootstrap(
        (scores,), interquartile_mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrap_interval(scores, resamples=20_000)
    # Both carry resampling noise of about 1 % of the interval's width.
    np.testing.assert_allclose(ours, theirs, atol=0.04 * (theirs.high - theirs.low))


def test_bootstrap_is_stratified():
    # Within a task all seeds agree, so no resample can change anything. Pooled resampling would give a wide interval.
    scores = np.tile([0.0, 100.0], (5, 1))
    assert bootstrap_interval(scores, np.mean) == (50.0, 50.0)


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    intervals = np.array([bootstrap_interval(rng.normal(size=40), np.mean, 0.8, resamples=400) for _ in range(300)])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.7 < covered < 0.87  # 0.8 less the known small-sample shortfall; the standard error here is 0.023


def test_bootstrap_depends_on_its_seed_only():
    scores = np.random.default_rng(5).normal(size=10)
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(list(scores), seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)


def test_full_confidence_spans_every_resample():
    low, high = bootstrap_interval([0.0, 1.0], np.mean, confidence=1.0)
    assert (low, high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 0.0}, "confidence is 0.0"),
        ({"confidence": 1.01}, "confidence is 1.01"),
        ({"confidence": np.nan}, "confidence is nan"),
        ({"resamples": 0}, "resamples is 0"),
        ({"scores": [1.0]}, "at least two"),
        ({"scores": []}, "scores is empty"),
        ({"scores": [1.0, np.nan]}, "scores holds 1 NaN"),
        ({"scores": np.zeros((2, 2, 2))}, r"shape \(2, 2, 2\)"),
    ],
)
def test_bootstrap_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**{"scores": [1.0, 2.0], **arguments})


def test_conditional_value_at_risk_by_hand():
    returns = [4.0, -10.0, 2.0, 0.0, 6.0]
    assert conditional_value_at_risk(returns, 0.2) == pytest.approx(-10.0)
    assert conditional_value_at_risk(returns, 0.4) == pytest.approx(-5.0)
    # Half of five is two and a half: (-10 + 0 + 0.5 * 2) / 2.5.
    assert conditional_value_at_risk(returns, 0.5) == pytest.approx(-3.6)
    # Less than one return: the worst one, alone.
    assert conditional_value_at_risk(returns, 0.01) == pytest.approx(-10.0)
    assert conditional_value_at_risk(returns, 1.0) == pytest.approx(0.4)
    assert conditional_value_at_risk([1.0, np.inf], 0.5) == 1.0


@settings(deadline=None)
@given(values, st.integers(1, 20))
def test_conditional_value_at_risk_with_every_return_repeated(returns, parts):
    # Repeating each return makes any level k / parts fall between returns: no boundary, a plain mean of the worst.
    level = np.random.default_rng(parts).integers(1, parts + 1) / parts
    repeated = np.sort(np.repeat(returns, parts))
    worst = repeated[: round(level * len(repeated))]
    assert conditional_value_at_risk(returns, level) == pytest.approx(np.mean(worst), rel=1e-9, abs=1e-6)


@settings(deadline=None)
@given(values, st.floats(0.01, 1), st.floats(0.01, 1))
def test_conditional_value_at_risk_rises_with_the_level(returns, one, other):
    low, high = sorted([one, other])
    scale = 1 + np.max(np.abs(returns))
    assert conditional_value_at_risk(returns, low) <= conditional_value_at_risk(returns, high) + 1e-9 * scale


@pytest.mark.parametrize("level", [0, -0.1, 1.1, np.nan])
def test_conditional_value_at_risk_rejects_levels(level):
    with pytest.raises(ValueError, match="level is"):
        conditional_value_at_risk([1.0], level)


def test_conditional_value_at_risk_rejects_returns():
    with pytest.raises(ValueError, match="returns is empty"):
        conditional_value_at_risk([], 0.5)
    with pytest.raises(ValueError, match="returns holds 1 NaN"):
        conditional_value_at_risk([np.nan], 0.5)


# -- two algorithms on one task ---------------------------------------------------------------------------------------


def test_a_paired_test_by_hand():
    # Differences 1, 2, 3, -1: of their 16 sets of signs, the means 7/4 (all one way), 5/4 in three sets (+-1 apart:
    # both ones may be turned, and both together) are as far out as 5/4 on the right, and as many on the left.
    # Sums >= 5: 1+2+3+1 = 7, and with one of the two ones turned 5, 5: three sets. Two-sided 2 * 3 / 16.
    found = paired_test([2, 4, 6, 0], [1, 2, 3, 1])
    assert found.p == pytest.approx(6 / 16)
    assert found.smallest == 2 / 16
    # All one way: the smallest p there is.
    assert paired_test([5, 6, 7, 9], [1, 2, 3, 4]) == (2 / 16, 2 / 16)
    assert paired_test([5, 6, 7], [5, 6, 7]).p == 1
    # An offset that both share, as the start states of an evaluation give it, is not in the differences.
    shared = np.array([0, 100, 200, 300])
    assert paired_test(shared + [2, 4, 6, 0], shared + [1, 2, 3, 1]).p == pytest.approx(6 / 16)


def test_an_unpaired_test_by_hand():
    # Three against three: of the 20 ways to deal 1 ... 6, that of all large ones and its mirror image are the farthest.
    assert unpaired_test([4, 5, 6], [1, 2, 3]) == (2 / 20, 2 / 20)
    # [3, 5, 6] against [1, 2, 4]: sums of 14; as large and, with less spread, beyond is [4, 5, 6] alone. Welch's t of
    # the two: means 14/3 and 7/3, variances 7/3 and 7/3, t = (7/3) / sqrt(14/9) = 1.87, against 3 / sqrt(2/3) = 3.67.
    assert unpaired_test([3, 5, 6], [1, 2, 4]).p == pytest.approx(4 / 20)
    assert unpaired_test([500.0] * 4, [500.0] * 5).p == 1, "all seeds solve the task"
    assert unpaired_test([500.0] * 4, [499.0] * 4).p == 2 / 70, "no spread at all"
    assert unpaired_test([500.0] * 4, [500, 500, 500, 480]).p == 1


def slow_signs(differences):
    signs = np.array(list(itertools.product([1, -1], repeat=len(differences))))
    means = np.abs((signs * differences).mean(1))
    return np.mean(means >= abs(np.mean(differences)) - 1e-12)


def slow_welch(x, y):
    pooled, outcomes = np.array([*x, *y]), []
    t = lambda a, b: scipy.stats.ttest_ind(a, b, equal_var=False).statistic  # noqa: E731
    for chosen in itertools.combinations(range(len(pooled)), len(x)):
        rest = [i for i in range(len(pooled)) if i not in chosen]
        outcomes.append(t(pooled[list(chosen)], pooled[rest]))
    outcomes, seen = np.array(outcomes), t(x, y)
    return min(1, 2 * min(np.mean(outcomes >= seen - 1e-12), np.mean(outcomes <= seen + 1e-12)))


def permuted_means(x, y, draws):
    rng, pooled = np.random.default_rng(0), np.concatenate([x, y])
    dealt = rng.permuted(np.tile(pooled, (draws, 1)), axis=1)
    far = np.abs(dealt[:, : len(x)].mean(1) - dealt[:, len(x) :].mean(1)) >= abs(x.mean() - y.mean())
    return (1 + far.sum()) / (1 + draws)


@pytest.mark.parametrize("seed", range(5))
def test_permutation_tests_equal_slow_ones(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=7), rng.normal(0.7, 2, size=7)
    assert paired_test(x, y).p == pytest.approx(slow_signs(x - y))
    assert unpaired_test(x[:5], y[:4]).p == pytest.approx(slow_welch(x[:5], y[:4]))


def test_many_permutations_are_drawn_at_random_and_from_the_seed():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.6, size=20), rng.normal(size=20)
    exact, drawn = paired_test(x[:12], y[:12]), paired_test(x[:12], y[:12], most=2000)
    assert drawn.smallest == 2 / 2001
    assert drawn.p == pytest.approx(exact.p, abs=0.04)
    assert drawn == paired_test(x[:12], y[:12], most=2000)
    assert drawn.p != paired_test(x[:12], y[:12], most=2000, seed=1).p
    # With many seeds the permuted t is Student's.
    assert unpaired_test(x, y).p == pytest.approx(scipy.stats.ttest_ind(x, y, equal_var=False).pvalue, abs=0.02)
    assert unpaired_test(x, y).smallest == 2 / 10_000


def test_false_positives_come_at_their_level():
    """Seeds of the same law are told apart in one study of twenty; of 252 (256) outcomes 12 are below .05."""
    rng, studies = np.random.default_rng(1), 400
    skewed = rng.exponential(size=(studies, 2, 8)) ** 2  # far from normal, as returns are
    apart = np.mean([unpaired_test(x[:5], y[:5]).p <= 0.05 for x, y in skewed])
    pairs = np.mean([paired_test(x, y).p <= 0.05 for x, y in skewed])
    error = 3 * np.sqrt(0.05 * 0.95 / studies)
    assert apart == pytest.approx(12 / 252, abs=error)
    assert pairs == pytest.approx(12 / 256, abs=error)
    # Equal means, but more seeds on the side with a third of the spread: about right, where plain means are far off.
    spread = [(rng.normal(0, 1, 40), rng.normal(0, 3, 15)) for _ in range(200)]
    assert np.mean([unpaired_test(x, y, most=499).p <= 0.05 for x, y in spread]) < 0.1
    assert np.mean([permuted_means(x, y, 499) <= 0.05 for x, y in spread]) > 0.12


def test_holm_by_hand():
    # Sorted .005, .01, .03, .04 times 4, 3, 2, 1, none below one before it.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.3]) == [0.3]
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p_values are"):
        holm([0.5, 1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_statsmodels_rule(p):
    order = np.argsort(p)
    slow, highest = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        highest = slow[index] = max(highest, min(1, (len(p) - rank) * p[index]))
    np.testing.assert_allclose(holm(p), slow)


def standard(seeds, seed):
    """Scores of mean 0 and variance 1 (unbiased), exactly, of a normal shape."""
    scores = np.random.default_rng(seed).normal(size=seeds)
    return (scores - scores.mean()) / scores.std(ddof=1)


def test_seeds_needed_by_hand():
    # z(.975) + z(.8) = 1.960 + 0.842 = 2.802; squared 7.849; times (1 + 1) / 0.5^2 = 62.8.
    assert seeds_needed_of(0.5, 2) == pytest.approx(62.79, abs=0.01)
    assert seeds_needed_of(-0.5, 1) == pytest.approx(31.40, abs=0.01)
    assert seeds_needed_of(0, 1) == np.inf


@pytest.mark.parametrize(("shift", "spread"), [(0.5, 1.0), (1.0, 1.0), (1.0, 2.0)])
def test_seeds_needed_agree_with_the_normal_formula(shift, spread):
    """The t test that is simulated needs about z(.975)^2 / 4, a seed more than one with known variances (half of that
    is z^2 / 2 for pairs)."""
    x, y = standard(200, 0) + shift, spread * standard(200, 1)
    expected = seeds_needed_of(shift, 1 + spread**2)
    assert seeds_needed(x, y) == pytest.approx(expected + 1, rel=0.08)
    pairs = spread * standard(200, 2)
    assert seeds_needed(x + pairs, y + pairs, paired=True) == pytest.approx(
        seeds_needed_of(shift, np.var(x - y, ddof=1)) + 2, rel=0.08
    )


def test_power_is_that_of_the_t_test():
    x, y = standard(500, 0) + 0.8, standard(500, 1)
    # Of two-sample t at n = 25 and d = 0.8: noncentral t with 48 degrees and 0.8 * sqrt(12.5) = 2.83.
    beyond = scipy.stats.t.ppf(0.975, 48)
    expected = scipy.stats.nct.sf(beyond, 48, 0.8 * np.sqrt(12.5))
    assert power(x, y, 25) == pytest.approx(expected, abs=0.04)
    assert power(x, y, 25, level=0.01) < power(x, y, 25) < power(x, y, 50)
    assert power(x - 0.8, y, 25, simulations=4000) == pytest.approx(0.05, abs=0.015)
    # And that of the permutation test, for which it stands.
    rng = np.random.default_rng(3)
    told = [unpaired_test(rng.choice(x, 8), rng.choice(y, 8), most=499).p <= 0.05 for _ in range(200)]
    assert power(x, y, 8) == pytest.approx(np.mean(told), abs=0.1)


def test_seeds_needed_at_the_ends():
    certain = [500.0] * 4, [10.0] * 4
    assert seeds_needed(*certain) == 4, "with three against three p = .1 at best"
    assert seeds_needed(*certain, paired=True) == 6
    assert seeds_needed([1.0, 2.0], [1.0, 2.0]) is None
    assert seeds_needed(standard(20, 0) + 0.05, standard(20, 1)) is None, "more than a thousand"
    # What two sides share does not count where they are paired.
    shared = 100 * standard(10, 3)
    x, y = shared + standard(10, 0) + 1.5, shared + standard(10, 1)
    assert seeds_needed(x, y, paired=True) < 20
    assert seeds_needed(x, y) is None


def test_the_interval_of_a_difference_equals_the_slow_loop():
    rng = np.random.default_rng(9)
    shared = 10 * rng.normal(size=9)
    x, y = shared + rng.normal(1, 1, 9), shared + rng.normal(0, 1, 9)
    slow_rng, outcomes = np.random.default_rng(4), []
    of_x, of_y = (slow_rng.integers(9, size=(300, 9, 1))[..., 0] for _ in "xy")
    outcomes = [interquartile_mean(x[a]) - interquartile_mean(y[b]) for a, b in zip(of_x, of_y, strict=True)]
    np.testing.assert_allclose(difference_interval(x, y, resamples=300, seed=4), np.quantile(outcomes, [0.025, 0.975]))
    slow_rng = np.random.default_rng(4)
    outcomes = [np.mean((x - y)[chosen]) for chosen in slow_rng.integers(9, size=(300, 9, 1))[..., 0]]
    found = difference_interval(x, y, np.mean, paired=True, resamples=300, seed=4)
    np.testing.assert_allclose(found, np.quantile(outcomes, [0.025, 0.975]))
    wide = np.ptp(difference_interval(x, y, np.mean))
    assert np.ptp(found) < 0.3 * wide, "pairs cancel what they share"


@pytest.mark.parametrize(
    ("function", "x", "y", "message"),
    [
        (paired_test, [1, 2], [1, 2, 3], "x has 2 seeds and y has 3, but pairs"),
        (unpaired_test, [1], [1, 2], r"x has shape \(1,\)"),
        (unpaired_test, [1, 2], [1, np.nan], "y holds 1 NaN"),
        (unpaired_test, [1, np.inf], [1, 2], "x holds infinite values"),
        (difference_interval, [[1, 2]], [1, 2], r"x has shape \(1, 2\)"),
        (seeds_needed, [1, 2], [], "y is empty"),
    ],
)
def test_tests_of_two_sides_reject(function, x, y, message):
    with pytest.raises(ValueError, match=message):
        function(x, y)
    with pytest.raises(ValueError, match="target is 0"):
        seeds_needed([1, 2], [3, 5], target=0)

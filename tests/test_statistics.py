import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

# rliable.library (its bootstrap) needs `arch`, whose 7.2 fails to import beside pandas 3; its metrics do import. The
# bootstrap is therefore checked against scipy's and against a slow loop.
from rliable import metrics as rliable_metrics

from jaxrl_dist.statistics import bootstrap_interval, conditional_value_at_risk, interquartile_mean

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def test_interquartile_mean_by_hand():
    # Eight values: two go at each end whatever they are, (3 + 4 + 5 + 8) / 4 stays.
    assert interquartile_mean([1e9, 3, 8, 1, 4, 2e9, -7, 5]) == pytest.approx(5.0)
    # Five values: a quarter is 1.25, rounded down to one at each end.
    assert interquartile_mean([0, 1, 2, 6, 100]) == pytest.approx(3.0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (10, 1), (10, 6), (7, 5)])
def test_interquartile_mean_is_rliables(shape):
    scores = np.random.default_rng(0).normal(size=shape)
    assert interquartile_mean(scores) == pytest.approx(rliable_metrics.aggregate_iqm(scores), rel=1e-12)


def test_interquartile_mean_along_an_axis():
    scores = np.random.default_rng(1).normal(size=(9, 4))
    by_column = [interquartile_mean(scores[:, task]) for task in range(4)]
    np.testing.assert_allclose(interquartile_mean(scores, axis=0), by_column)


@pytest.mark.parametrize("wrong", [[], [1.0, np.nan]])
def test_interquartile_mean_rejects(wrong):
    with pytest.raises(ValueError, match="values"):
        interquartile_mean(wrong)


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

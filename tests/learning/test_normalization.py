import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.learning import normalization

update = jax.jit(normalization.update)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([1, 2, 3, 8]), min_size=1, max_size=8), st.floats(-100, 100), st.integers(0, 999))
def test_batches_of_any_sizes_give_the_statistics_of_all_observations(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    batches = [(offset + rng.normal(0, [1, 10], (size, 2))).astype(np.float32) for size in sizes]
    statistics = normalization.create((2,))
    for batch in batches:
        statistics = update(statistics, batch)
    seen = np.concatenate(batches).astype(np.float64)
    assert float(statistics.count) == len(seen)
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(statistics.variance, seen.var(0), rtol=1e-3, atol=1e-3)


def test_hand_worked_and_clipped():
    statistics = update(normalization.create((1,)), jnp.array([[2.0], [4.0]]))  # mean 3, variance 1
    values = normalization.normalize(statistics, jnp.array([[3.0], [5.0], [-100.0], [100.0]]))
    np.testing.assert_allclose(values, [[0], [2], [-10], [10]], rtol=1e-6)
    closer = normalization.normalize(statistics, jnp.array([[4.5], [-100.0], [100.0]]), bound=5)
    np.testing.assert_allclose(closer, [[1.5], [-5], [5]], rtol=1e-6)


def test_a_component_that_never_varies_stays_finite():
    statistics = update(normalization.create((1,)), jnp.full((4, 1), 7.0))
    np.testing.assert_array_equal(normalization.normalize(statistics, jnp.array([7.0, 8.0])), [0, 10])


def test_identity_without_statistics_and_before_the_first_observation():
    observation = jnp.array([[-3.0, 0.0, 9.0]])
    np.testing.assert_array_equal(normalization.normalize(None, observation), observation)
    assert normalization.normalize(None, jnp.uint8(200)) == 200  # pixels pass as they are
    np.testing.assert_allclose(normalization.normalize(normalization.create((3,)), observation), observation, rtol=1e-6)


def test_beyond_the_largest_count_old_observations_fade():
    full = normalization.RunningStatistics(jnp.float32(normalization.MAX_COUNT), jnp.zeros(1), jnp.ones(1))
    batch = jnp.full((1000, 1), 5.0)
    statistics = update(full, batch)
    assert float(statistics.count) == normalization.MAX_COUNT
    assert float(statistics.mean[0]) == pytest.approx(5 * 1000 / (normalization.MAX_COUNT + 1000), rel=1e-4)
    # Every further batch moves the mean on by the same share of the distance: it is never frozen.
    further = update(statistics, batch)
    assert float(further.mean[0]) > 1.99 * float(statistics.mean[0])
    # One observation, the smallest batch there is, still counts.
    assert float(update(full, jnp.full((1, 1), 5.0)).mean[0]) == pytest.approx(5 / normalization.MAX_COUNT, rel=1e-3)


def test_observations_of_any_rank_and_type():
    frames = np.random.default_rng(0).integers(0, 255, (5, 3, 2)).astype(np.uint8)
    statistics = update(normalization.create((3, 2)), frames)
    np.testing.assert_allclose(statistics.mean, frames.mean(0), rtol=1e-5)
    np.testing.assert_allclose(statistics.variance, frames.var(0), rtol=1e-4)


def test_rewards_are_divided_by_the_deviation_of_their_discounted_sums():
    rng = np.random.default_rng(3)
    reward = rng.normal(1, 30, (2, 7, 3)).astype(np.float32)  # two rollouts of three environments
    done = rng.random((2, 7, 3)) < 0.3
    reward[1, 4, 2], done[1, 4, 2] = 50_000, True
    scale, sums, seen = normalization.create_scale(3), np.zeros(3), []
    for rollout in range(2):
        scale, scaled = normalization.scale_rewards(scale, reward[rollout], done[rollout], 0.9)
        for step in range(7):
            sums = 0.9 * sums + reward[rollout, step]
            seen.append(sums)
            sums = np.where(done[rollout, step], 0, sums)
        deviation = np.std(seen)
        np.testing.assert_allclose(scale.sums, sums, rtol=1e-4)
        assert float(normalization.unit(scale)) == pytest.approx(deviation, rel=1e-4)
        np.testing.assert_allclose(scaled, np.clip(reward[rollout] / deviation, -10, 10), rtol=1e-4)
    # The largest sum of n is at most sqrt(n) deviations.
    statistics = normalization.RunningStatistics(jnp.float32(1e6), jnp.float32(0), jnp.float32(1))
    scale = normalization.RewardScale(jnp.zeros(1), statistics)
    assert normalization.scale_rewards(scale, jnp.array([[50.0]]), jnp.array([[True]]), 0.9)[1] == 10


def test_rewards_without_a_scale_stay_what_they_are():
    scale, reward = normalization.scale_rewards(None, jnp.array([[2.0]]), jnp.array([[True]]), 0.9)
    assert scale is None
    assert reward == 2
    assert normalization.unit(None) == 1
    assert normalization.scaled(None, jnp.array([200.0])) == 200

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import returns
from jaxrl_dist.learning.returns import bootstrap_discount, n_step


def test_only_termination_stops_the_bootstrap():
    # A transition cut by a time limit has terminated = False, whatever its truncated says: it keeps its gamma.
    terminated = jnp.array([[False, True], [True, False]])
    discount = bootstrap_discount(0.9, terminated)
    assert discount.dtype == jnp.float32
    np.testing.assert_allclose(discount, [[0.9, 0], [0, 0.9]], rtol=1e-7)
    swept = jax.vmap(bootstrap_discount, in_axes=(0, None))(jnp.array([0.5, 1.0]), terminated[0])
    np.testing.assert_allclose(swept, [[0.5, 0], [1, 0]])


NO, YES = [False] * 3, [True] * 3


@pytest.mark.parametrize(
    ("terminated", "truncated", "available", "expected"),
    [
        (NO, NO, YES, (5.23, 0.729, 3)),
        ([False, True, False], NO, YES, (2.8, 0, 2)),
        (NO, [False, True, False], YES, (2.8, 0.81, 2)),
        ([False, True, False], [False, True, False], YES, (2.8, 0, 2)),  # termination wins
        (NO, NO, [True, True, False], (2.8, 0.81, 2)),
        (NO, NO, [True, False, False], (1, 0.9, 1)),
        ([False, False, True], NO, [True, True, False], (2.8, 0.81, 2)),  # what is not recorded does not count
        ([True, False, False], NO, YES, (1, 0, 1)),
        ([False, False, True], NO, YES, (5.23, 0, 3)),
        (NO, [True, False, False], YES, (1, 0.9, 1)),
        ([False, True, False], [True, False, False], YES, (1, 0.9, 1)),  # a later episode's end
    ],
)
def test_n_step_hand_worked(terminated, truncated, available, expected):
    reward = jnp.array([1.0, 2.0, 3.0])
    actual = n_step(reward, jnp.array(terminated), jnp.array(truncated), jnp.array(available), 0.9)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert [x.dtype for x in actual] == [jnp.float32, jnp.float32, jnp.int32]


def windows(num_steps, shape=(40,), seed=0):
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(num_steps, *shape)).astype(np.float32)
    terminated, truncated = rng.uniform(size=(2, num_steps, *shape)) < 0.2
    recorded = rng.integers(1, num_steps + 1, shape)
    return reward, terminated, truncated, np.arange(num_steps).reshape(-1, *[1] * len(shape)) < recorded


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_n_step_agrees_with_a_loop_for_every_gamma(num_steps):
    reward, terminated, truncated, available = inputs = windows(num_steps, (20, 3))
    gammas = np.float32([0, 0.5, 0.97, 1])
    actual = jax.jit(jax.vmap(n_step, in_axes=(None, None, None, None, 0)))(*inputs, gammas)
    for which, gamma in enumerate(gammas):
        for place in np.ndindex(20, 3):
            total, steps, discount = 0.0, 0, 1.0
            while steps < num_steps and available[(steps, *place)]:
                here = (steps, *place)
                total, discount, steps = total + discount * reward[here], discount * gamma, steps + 1
                if terminated[here]:
                    discount = 0.0
                if terminated[here] or truncated[here]:
                    break
            got = [float(x[(which, *place)]) for x in actual]
            np.testing.assert_allclose(got, [total, discount, steps], rtol=1e-5, atol=1e-6)


def test_one_step_is_the_one_step_target_to_the_last_bit():
    reward, terminated, truncated, available = windows(1)
    actual = n_step(reward, terminated, truncated, available, 0.97)
    np.testing.assert_array_equal(actual.reward, reward[0])
    np.testing.assert_array_equal(actual.discount, bootstrap_discount(0.97, jnp.asarray(terminated[0])))
    np.testing.assert_array_equal(actual.steps, np.ones(40))


def test_what_lies_outside_a_window_cannot_reach_it():
    reward = jnp.array([[1.0], [2.0], [jnp.nan]])
    flags = jnp.zeros((3, 1), bool)
    assert float(n_step(reward, flags, flags.at[1].set(True), ~flags, 0.5).reward[0]) == 2.0
    assert float(n_step(reward, flags, flags, ~flags.at[2].set(True), 0.5).reward[0]) == 2.0


# -- advantages -------------------------------------------------------------------------------------------------------


def gae(reward, values, last, terminated=(), truncated=(), final=None, gamma=0.9, decay=0.8):
    """Of one environment; `final` is the value of the true successor where an episode was cut."""
    steps = np.arange(len(reward))
    following = np.append(values[1:], last)
    if final is not None:
        following[list(truncated)] = final
    numbers = np.float32(reward), np.float32(values), np.float32(following)
    flags = np.isin(steps, terminated), np.isin(steps, truncated)
    return returns.gae(*map(jnp.asarray, (*numbers, *flags)), gamma, decay)


def test_advantages_by_hand():
    reward, values = [1, 0, 2, 1], [0.5, 0.4, 0.3, 0.2]
    np.testing.assert_allclose(gae(reward, values, 0.6, terminated=[1]), [0.572, -0.4, 2.8448, 1.34], rtol=1e-5)
    cut = gae(reward, values, 0.6, truncated=[1], final=0.7)
    np.testing.assert_allclose(cut[:2], [1.0256, 0.23], rtol=1e-5)
    ones, values = [1, 1, 1], [0.5, 0.4, 0.3]
    np.testing.assert_allclose(gae(ones, values, 0.2), [1.942592, 1.5036, 0.88], rtol=1e-6)
    np.testing.assert_allclose(gae(ones, values, 0.2, terminated=[1]), [1.292, 0.6, 0.88], rtol=1e-6)
    np.testing.assert_allclose(gae(ones, values, 0.2, truncated=[1], final=0.6), [1.6808, 1.14, 0.88], rtol=1e-6)


def test_advantages_are_sums_of_errors_within_the_episode():
    """Every lambda, against sums written out: A_t = sum over k of (gamma lambda)^k delta_{t+k}, up to the end."""
    rng = np.random.default_rng(0)
    reward, value, following = rng.normal(size=(3, 20, 4)).astype(np.float32)
    terminated, truncated = rng.random((2, 20, 4)) < 0.15
    for decay in (0.0, 0.7, 1.0):
        found = returns.gae(*map(jnp.asarray, (reward, value, following, terminated, truncated)), 0.9, decay)
        delta = reward + 0.9 * ~terminated * following - value
        for t in range(20):
            for env in range(4):
                total, weight = 0.0, 1.0
                for k in range(t, 20):
                    total += weight * delta[k, env]
                    weight *= 0.9 * decay
                    if terminated[k, env] or truncated[k, env]:
                        break
                assert found[t, env] == pytest.approx(total, abs=1e-5)


def test_the_sum_of_rewards_and_the_one_step_target_are_the_ends_of_lambda():
    reward, values = [1, 0, 2, 1], np.float32([0.5, 0.4, 0.3, 0.2])
    full = gae(reward, values, 0.6, decay=1.0) + values
    assert full[0] == pytest.approx(1 + 0.81 * 2 + 0.729 + 0.9**4 * 0.6)
    one_step = gae(reward, values, 0.6, decay=0.0) + values
    np.testing.assert_allclose(one_step, reward + 0.9 * np.append(values[1:], 0.6), rtol=1e-6)

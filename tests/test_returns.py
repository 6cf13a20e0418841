import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.returns import bootstrap_discount, discounted_sum


def test_only_termination_stops_the_bootstrap():
    # A transition cut by a time limit has terminated = False, whatever its truncated says: it keeps its gamma.
    terminated = jnp.array([[False, True], [True, False]])
    discount = bootstrap_discount(0.9, terminated)
    assert discount.dtype == jnp.float32
    np.testing.assert_allclose(discount, [[0.9, 0], [0, 0.9]], rtol=1e-7)
    swept = jax.vmap(bootstrap_discount, in_axes=(0, None))(jnp.array([0.5, 1.0]), terminated[0])
    np.testing.assert_allclose(swept, [[0.5, 0], [1, 0]])


def test_discounted_sum_hand_worked():
    # 1 + .5 (2 + .5 (3 + .5 * 8)) and, with the end after the second reward, 1 + .5 (2 + 0).
    rewards = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    discounts = jnp.array([[0.5, 0.5], [0.5, 0.0], [0.5, 0.5]])
    np.testing.assert_array_equal(discounted_sum(rewards, discounts, jnp.array([8.0, 8.0])), [3.75, 2.0])


def test_discounted_sum_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(9, 4, 3)).astype(np.float32)
    discounts = (rng.uniform(size=rewards.shape) * (rng.uniform(size=rewards.shape) > 0.2)).astype(np.float32)
    bootstrap = rng.normal(size=(4, 3)).astype(np.float32)
    expected, weight = np.zeros((4, 3)), np.ones((4, 3))
    for time in range(9):
        expected += weight * rewards[time]
        weight = weight * discounts[time]
    expected += weight * bootstrap
    np.testing.assert_allclose(jax.jit(discounted_sum)(rewards, discounts, bootstrap), expected, rtol=1e-4, atol=1e-5)

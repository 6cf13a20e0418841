import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.distributional import mmd
from jaxrl_dist.distributional.metrics import energy_distance

X, Y = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.5, 1.5, 4.0])
TEN = mmd.gaussian_mixture(range(1, 11))
KERNELS = {
    "ten": TEN,
    "one": mmd.gaussian_mixture([1.0]),
    "weighted": mmd.gaussian_mixture([0.5, 4.0], [2.0, 0.25]),
    "energy": mmd.energy(),
    "energy 1.5": mmd.energy(1.5),
}
SLOW_KERNELS = {
    "ten": lambda d: sum(np.exp(-(d**2) / h) for h in range(1, 11)),
    "one": lambda d: np.exp(-(d**2)),
    "weighted": lambda d: 2 * np.exp(-2 * d**2) + 0.25 * np.exp(-(d**2) / 4),
    "energy": lambda d: -abs(d),
    "energy 1.5": lambda d: -(abs(d) ** 1.5),
}


def slow_squared_mmd(a, b, kernel, biased):
    """The definition, one pair at a time, in float64."""

    def average(left, right, same):
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if biased or not same or i != j]
        return sum(kernel(float(left[i]) - float(right[j])) for i, j in pairs) / len(pairs)

    return average(a, a, True) + average(b, b, True) - 2 * average(a, b, False)


@pytest.mark.parametrize(
    ("name", "expected"), [("ten", 1.235913), ("one", 0.173211), ("energy", 0.666667), ("energy 1.5", 1.063078)]
)
def test_hand_worked(name, expected):
    assert float(mmd.squared_mmd(X, Y, KERNELS[name])) == pytest.approx(expected, abs=2e-6)
    assert float(mmd.squared_mmd(X, X[::-1], KERNELS[name])) == pytest.approx(0, abs=1e-6)


def test_two_points_hand_worked():
    zero, one = jnp.zeros(1), jnp.ones(1)
    assert float(mmd.squared_mmd(zero, one, TEN)) == pytest.approx(4.631988, abs=2e-6)
    # Two-sample unbiased: within pairs at distance 1 and 2, across 0, 3, 1, 2: -1 - 2 + 2 * 6 / 4.
    value = mmd.squared_mmd(jnp.array([0.0, 1.0]), jnp.array([0.0, -2.0]), mmd.energy(), biased=False)
    assert float(value) == pytest.approx(-1 - 2 + 2 * (0 + 2 + 1 + 3) / 4)


def test_gradient_hand_worked():
    gradient = jax.grad(mmd.squared_mmd)(X, Y, TEN)
    np.testing.assert_allclose(gradient, [-0.057595, -0.373972, -0.768206], atol=2e-6)
    # One particle, energy kernel: 2 |x - y|, whose gradient is a sign.
    np.testing.assert_array_equal(jax.grad(mmd.squared_mmd)(jnp.array([3.0]), jnp.array([7.0]), mmd.energy()), [-2])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_value_and_gradient_agree_with_the_definition(name, biased):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(1, 2, (3, 6)).astype(np.float32)

    def total(a):
        values = mmd.squared_mmd(a, b, KERNELS[name], biased=biased)
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(a)
    step = 1e-5
    for row in range(3):
        expected = slow_squared_mmd(a[row], b[row], SLOW_KERNELS[name], biased)
        assert float(values[row]) == pytest.approx(expected, rel=1e-5, abs=2e-6)
        for i in range(4):
            shift = step * np.eye(4)[i]
            ends = [slow_squared_mmd(a[row] + s, b[row], SLOW_KERNELS[name], biased) for s in (shift, -shift)]
            assert gradient[row, i] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("biased", [True, False])
def test_collapsed_particles_have_equal_and_finite_gradients(name, biased):
    gradient = jax.grad(mmd.squared_mmd)(jnp.zeros(3), jnp.array([0.0, 1.5, 4.0]), KERNELS[name], biased=biased)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient, gradient[:1].repeat(3))
    assert gradient[0] < 0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_energy_kernel_gives_the_energy_distance(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = np.round(rng.normal(size=n), 1), np.round(rng.normal(1, 2, m), 1)
    value = mmd.squared_mmd(np.float32(a), np.float32(b), mmd.energy())
    assert float(value) == pytest.approx(energy_distance(a, b), abs=2e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_invariances(name):
    kernel = KERNELS[name]
    value = float(mmd.squared_mmd(X, Y, kernel))
    assert float(mmd.squared_mmd(X[jnp.array([2, 0, 1])], Y[::-1], kernel)) == pytest.approx(value, abs=1e-6)
    assert float(mmd.squared_mmd(X + 7, Y + 7, kernel)) == pytest.approx(value, abs=1e-6)
    assert float(mmd.squared_mmd(Y, X, kernel)) == pytest.approx(value, abs=1e-6)


def test_scaling_of_the_energy_kernel_and_so_its_contraction():
    for exponent in (1.0, 1.5):
        kernel = mmd.energy(exponent)
        before, after = (mmd.squared_mmd(*pair, kernel) for pair in ((X, Y), (0.7 + 0.9 * X, 0.7 + 0.9 * Y)))
        assert float(after / before) == pytest.approx(0.9**exponent, rel=1e-5)


def test_the_gaussian_kernel_does_not_contract():
    kernel = KERNELS["one"]
    far, near = (mmd.squared_mmd(jnp.zeros(1), jnp.full(1, distance), kernel) for distance in (10.0, 5.0))
    assert float(far) == pytest.approx(2)
    assert float(near) == pytest.approx(2)


@pytest.mark.parametrize("name", ["ten", "energy"])
def test_particles_descend_to_a_fixed_target(name):
    target = jnp.array([0.25, 0.75, 1.25, 1.75])
    # The gradient of the energy kernel does not fade near the target, so its steps must.
    rates = np.repeat([0.1], 20000) if name == "ten" else np.repeat([0.1, 0.01, 0.001, 0.0001], 2000)

    def descend(particles, rate):
        return particles - rate * jax.grad(mmd.squared_mmd)(particles, target, KERNELS[name]), None

    start = jnp.array([-0.1, 0.0, 0.1, 0.2])
    particles, _ = jax.jit(lambda start: jax.lax.scan(descend, start, jnp.asarray(rates)))(start)
    np.testing.assert_allclose(np.sort(particles), target, atol=1e-3)


def test_a_traced_bandwidth_and_vmap_over_it():
    scales = jnp.array([0.5, 2.0])
    values = jax.vmap(lambda h: mmd.squared_mmd(X, Y, mmd.gaussian_mixture([h, 2 * h])))(scales)
    for scale, value in zip(scales.tolist(), values, strict=True):
        expected = slow_squared_mmd(X, Y, lambda d: np.exp(-(d**2) / scale) + np.exp(-(d**2) / (2 * scale)), True)
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mmd.gaussian_mixture([1.0, 0.0]), r"bandwidths are \[1.0, 0.0\]; each must be finite and above 0"),
        (lambda: mmd.gaussian_mixture([float("nan")]), "bandwidths are"),
        (lambda: mmd.gaussian_mixture([1.0], [-1.0]), r"weights are \[-1.0\]; each must be finite and at least 0"),
        (lambda: mmd.gaussian_mixture([1.0, 2.0], [1.0]), r"weights are \[1.0\]; it must be one per bandwidth"),
        (lambda: mmd.energy(2.0), r"exponent is 2.0; it must be in \(0, 2\)"),
        (lambda: mmd.squared_mmd(X, Y[:1], TEN, biased=False), r"samples_b has shape \(1,\).*at least 2"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()

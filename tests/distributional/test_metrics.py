import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.distributional.metrics import wasserstein_1

samples = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


def test_hand_worked():
    # Mass 1/2 at 0 and 1/2 at 1 against mass 1 at 3: half travels 3, half travels 2.
    assert wasserstein_1([1.0, 0.0], [3.0]) == pytest.approx(2.5)
    # Thirds at 0, 1, 2 against halves at 0, 2. Quantile functions on (0,1/3), (1/3,1/2), (1/2,2/3), (2/3,1):
    # 0|0, 1|0, 1|2, 2|2, so the area is 1/6 + 1/6.
    assert wasserstein_1([0.0, 1.0, 2.0], [2.0, 0.0]) == pytest.approx(1 / 3)


@settings(deadline=None)
@given(samples, samples)
def test_agrees_with_scipy(a, b):
    expected = scipy.stats.wasserstein_distance(a, b)
    assert wasserstein_1(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(samples, st.floats(-1e3, 1e3))
def test_translation_moves_by_its_length(a, shift):
    assert wasserstein_1(a, np.asarray(a) + shift) == pytest.approx(abs(shift), abs=1e-9)


def test_batched_under_jit_equals_numpy_row_by_row():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 25)).astype(np.float32), rng.normal(1, 2, size=(4, 37)).astype(np.float32)
    batched = jax.jit(wasserstein_1)(jnp.asarray(a), jnp.asarray(b))
    assert batched.shape == (4,)
    assert isinstance(batched, jax.Array)
    for row in range(4):
        assert float(batched[row]) == pytest.approx(scipy.stats.wasserstein_distance(a[row], b[row]), rel=1e-5)
    np.testing.assert_allclose(jax.vmap(wasserstein_1, in_axes=(0, None))(a, b[0]), wasserstein_1(a, b[0]), rtol=1e-5)


def test_gradient_of_a_sample_is_its_mass():
    # All of a lies below all of b: pushing one of four samples up brings a quarter of the mass closer.
    gradient = jax.grad(lambda a: wasserstein_1(a, jnp.array([10.0, 11.0])))(jnp.arange(4.0))
    np.testing.assert_allclose(gradient, -0.25)


def test_numpy_stays_numpy_and_keeps_double_precision():
    distance = wasserstein_1(np.array([1.0]), np.array([1.0 + 1e-12]))
    assert isinstance(distance, np.floating)
    assert 0 < distance < 2e-12


@pytest.mark.parametrize(("a", "b", "name"), [([], [1.0], "samples_a"), ([1.0], 2.0, "samples_b")])
def test_rejects_no_samples(a, b, name):
    with pytest.raises(ValueError, match=name):
        wasserstein_1(a, b)

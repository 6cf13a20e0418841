import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.metrics import cramer, energy_distance, total_variation, wasserstein_1

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


@pytest.mark.parametrize(("a", "b", "name"), [([], [1.0], "a"), ([1.0], 2.0, "b")])
def test_rejects_no_samples(a, b, name):
    with pytest.raises(ValueError, match=rf"^{name} has shape"):
        wasserstein_1(a, b)


# -- weighted laws, and the other distances ---------------------------------------------------------------------------


def random_law(rng, count):
    atoms = np.round(rng.normal(0, 3, count), 1)  # rounded, so that atoms of the two laws meet
    return Law(atoms, rng.dirichlet(np.ones(count)))


def test_weighted_laws_hand_worked():
    # F_a is 1/4 on [0, 2), F_b is 1/2 on [1, 4); a - b on [0, 1), [1, 2), [2, 4): 1/4, -1/4, 1/2.
    a, b = Law(np.array([2.0, 0.0]), np.array([0.75, 0.25])), Law(np.array([1.0, 4.0]), np.array([0.5, 0.5]))
    assert wasserstein_1(a, b) == 0.25 + 0.25 + 1
    assert cramer(a, b) == 1 / 16 + 1 / 16 + 1 / 2
    assert energy_distance(a, b) == 1.25
    assert cramer(a, [1.0, 4.0]) == cramer(a, b)
    assert cramer([0.0, 1.0, 2.0], [0.5, 1.5, 4.0]) == pytest.approx(1 / 3)  # the sheet of MMD-DQN, item 2


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_weighted_laws_agree_with_scipy_and_with_the_double_sum(seed, n, m):
    rng = np.random.default_rng(seed)
    a, b = random_law(rng, n), random_law(rng, m)
    weighted = a.atoms, b.atoms, a.masses, b.masses
    assert wasserstein_1(a, b) == pytest.approx(scipy.stats.wasserstein_distance(*weighted), abs=1e-9)
    assert energy_distance(a, b) == pytest.approx(scipy.stats.energy_distance(*weighted) ** 2, abs=1e-9)

    def expected_gap(p, q):
        return p.masses @ np.abs(p.atoms[:, None] - q.atoms) @ q.masses

    double_sum = 2 * expected_gap(a, b) - expected_gap(a, a) - expected_gap(b, b)
    assert energy_distance(a, b) == pytest.approx(double_sum, abs=1e-9)
    # Cramer is what it is called: the integral of the squared difference, here by its definition on each interval.
    grid = np.unique(np.concatenate([a.atoms, b.atoms]))
    functions = [(law.masses * (law.atoms <= grid[:, None])).sum(1) for law in (a, b)]
    integral = (np.subtract(*functions)[:-1] ** 2 * np.diff(grid)).sum()
    assert cramer(a, b) == pytest.approx(integral, abs=1e-9)


def test_laws_broadcast_under_jit_and_keep_jax_arrays():
    rng = np.random.default_rng(3)
    masses = rng.dirichlet(np.ones(6), size=(2, 5)).astype(np.float32)
    a, samples = Law(np.linspace(-1, 1, 6, dtype=np.float32), jnp.asarray(masses)), rng.normal(size=(5, 9))
    for distance in (wasserstein_1, cramer, energy_distance):
        batched = jax.jit(distance)(a, jnp.asarray(samples))
        assert batched.shape == (2, 5)
        assert isinstance(batched, jax.Array)
        for i, j in np.ndindex(2, 5):
            assert float(batched[i, j]) == pytest.approx(distance(Law(a.atoms, masses[i, j]), samples[j]), rel=1e-4)


def test_whole_numbers_are_samples_too():
    assert wasserstein_1(jnp.array([0, 1]), jnp.array([3])) == 2.5


def test_total_variation_by_hand():
    edges = np.array([0.0, 1, 2])
    a, b = np.array([[0.5], [1.5], [1.5], [1.5]]), np.array([[0.5], [0.5], [1.5], [9.0]])
    assert total_variation(a, a, edges) == 0
    assert total_variation(a, b, edges) == pytest.approx(0.5)  # shares .25 .75 0 against .5 .25 .25
    assert total_variation(a, np.full((3, 1), 9.0), edges) == 1  # beyond the edges is not clipped into a bin
    assert total_variation(np.full((2, 1), -9.0), np.full((3, 1), 9.0), edges) == 1
    corners = np.array([[0.5, 0.5], [1.5, 1.5]])
    assert total_variation(corners, corners[:, ::-1], edges) == 0
    assert total_variation(corners, np.array([[0.5, 1.5], [1.5, 0.5]]), edges) == 1  # the same marginals

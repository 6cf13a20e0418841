import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional.law import Law

ATOMS = jnp.array([[6.0, -3.0, 2.0, 0.0, 10.0, 1.0, -1.0, 3.0, 8.0, 4.0]])  # sorted: -3 -1 0 1 2 3 4 6 8 10
WEIGHTED = Law(jnp.array([1.0, -10.0, 0.0]), jnp.array([0.7, 0.1, 0.2]))


def random_law(seed, shape=(3, 7)):
    rng = np.random.default_rng(seed)
    atoms = np.round(rng.normal(0, 2, shape), 1).astype(np.float32)  # rounded: some atoms are equal
    return Law(atoms, rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32))


def test_hand_worked():
    law = laws.equally_weighted(ATOMS)
    np.testing.assert_allclose(law.masses, np.full((1, 10), 0.1), rtol=1e-6)
    np.testing.assert_allclose(laws.mean(law), [3], rtol=1e-6)
    np.testing.assert_allclose(laws.variance(law), [15], rtol=1e-6)  # mean of squares 24, less 9
    probabilities = laws.cumulative_probability(law, jnp.array([-4.0, -3.0, 0.5, 10.0]))
    np.testing.assert_allclose(probabilities, [[0, 0.1, 0.3, 1]], rtol=1e-6)
    np.testing.assert_array_equal(laws.quantile(law, jnp.array([0.05, 0.1, 0.11, 0.5, 1.0])), [[-3, -3, -1, 2, 10]])


def test_weighted_hand_worked():
    assert float(laws.mean(WEIGHTED)) == pytest.approx(-0.3)
    assert float(laws.variance(WEIGHTED)) == pytest.approx(10 + 0.7 - 0.09)
    probabilities = laws.cumulative_probability(WEIGHTED, jnp.array([-10.5, -10.0, 0.0, 0.5, 1.0]))
    np.testing.assert_allclose(probabilities, [0, 0.1, 0.3, 0.3, 1], rtol=1e-6)
    quantiles = laws.quantile(WEIGHTED, jnp.array([0.1, 0.1001, 0.3, 0.3001, 1.0]))
    np.testing.assert_array_equal(quantiles, [-10, 0, 0, 1, 1])


def test_variance_does_not_cancel_far_from_zero():
    assert float(laws.variance(laws.equally_weighted(jnp.array([1000.0, 1000.5])))) == pytest.approx(0.0625)


@pytest.mark.parametrize("count", [3, 10, 51, 200])
def test_quantiles_at_the_jumps_in_spite_of_rounding(count):
    # F reaches i/n exactly at atom i, though the float32 sum of i masses may stay just below the float32 number i/n.
    law = laws.equally_weighted(jnp.arange(count, dtype=jnp.float32))
    jumps = np.arange(1, count + 1) / count
    np.testing.assert_array_equal(jax.jit(laws.quantile)(law, jumps), np.arange(count))
    np.testing.assert_array_equal(jax.jit(laws.quantile)(law, jumps - 0.5 / count), np.arange(count))
    np.testing.assert_array_equal(jax.jit(laws.quantile)(law, jumps[:-1] + 0.5 / count), np.arange(1, count))


def test_quantiles_are_atoms_with_mass():
    law = Law(jnp.array([-5.0, 0.0, 1.0, 7.0]), jnp.array([0.0, 0.5, 0.5, 0.0]))
    np.testing.assert_array_equal(laws.quantile(law, jnp.array([1e-7, 0.5, 1.0])), [0, 0, 1])


def test_agrees_with_loops_over_atoms():
    law = random_law(0)
    values, fractions = np.linspace(-4, 4, 9, dtype=np.float32), np.linspace(0.033, 0.97, 9)
    probabilities = jax.jit(laws.cumulative_probability)(law, values)
    quantiles = jax.jit(laws.quantile)(law, fractions)
    for i, (atoms, masses) in enumerate(zip(law.atoms.astype(float), law.masses.astype(float), strict=True)):
        mean = sum(z * p for z, p in zip(atoms, masses, strict=True))
        assert float(laws.mean(law)[i]) == pytest.approx(mean, abs=1e-5)
        square = sum((z - mean) ** 2 * p for z, p in zip(atoms, masses, strict=True))
        assert float(laws.variance(law)[i]) == pytest.approx(square, rel=1e-5)
        for j in range(9):
            below = sum(p for z, p in zip(atoms, masses, strict=True) if z <= values[j])
            assert float(probabilities[i, j]) == pytest.approx(below, abs=1e-6)
            reached = [z for z in atoms if sum(masses[atoms <= z]) >= fractions[j]]
            assert quantiles[i, j] == min(reached)


def test_atoms_shared_by_all_rows_broadcast_under_vmap_too():
    masses = random_law(1).masses
    shared, spelled_out = Law(jnp.arange(7.0), masses), Law(jnp.tile(jnp.arange(7.0), (3, 1)), masses)
    points = jnp.array([0.2, 0.9, 3.5])
    for function in (laws.mean, laws.variance, laws.sort):
        jax.tree.map(np.testing.assert_array_equal, function(shared), function(spelled_out))
    for function in (laws.cumulative_probability, laws.quantile):
        expected = function(spelled_out, points)
        np.testing.assert_array_equal(function(shared, points), expected)
        mapped = jax.vmap(function, in_axes=(Law(None, 0), None))(shared, points)
        np.testing.assert_allclose(mapped, expected, rtol=1e-6)


def test_sort_keeps_each_mass_with_its_atom():
    ordered = laws.sort(WEIGHTED)
    np.testing.assert_array_equal(ordered.atoms, [-10, 0, 1])
    np.testing.assert_array_equal(ordered.masses, WEIGHTED.masses[jnp.array([1, 2, 0])])

"""Joint laws by hand: what marginals do not show, discrepancies of vectors, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.distributional import joint, mmd
from jaxrl_dist.distributional import law as laws

WIDTHS = tuple(2.0**i for i in range(-8, 9))
PAPERS = joint.gaussian_mixture(WIDTHS, jnp.sqrt(jnp.array(WIDTHS)))
# Two diagonals of a square: the same to each component.
RISING, FALLING = jnp.array([[0.0, 0], [1, 1]]), jnp.array([[0.0, 1], [1, 0]])


def random_sets(seed: int, *shape: int):
    return tuple(np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32))


# -- laws -------------------------------------------------------------------------------------------------------------


def test_moments_by_hand():
    law = joint.JointLaw(jnp.array([[0.0, 0], [2, 4], [0, 4]]), jnp.array([0.25, 0.5, 0.25]))
    np.testing.assert_allclose(joint.mean(law), [1, 3])
    np.testing.assert_allclose(joint.covariance(law), [[1, 1], [1, 3]])
    np.testing.assert_allclose(joint.correlation(law), [[1, 1 / np.sqrt(3)], [1 / np.sqrt(3), 1]], rtol=1e-6)
    assert np.isnan(joint.correlation(joint.equally_weighted(jnp.ones((3, 2))))).all()
    total = joint.total(law)
    np.testing.assert_allclose(total.atoms, [0, 6, 4])
    assert laws.variance(total) == pytest.approx(1 + 3 + 2)  # of a sum: with twice the covariance


def test_laws_have_leading_axes():
    atoms = jnp.stack([RISING, FALLING])
    law = joint.equally_weighted(atoms)
    assert law.masses.shape == (2, 2)
    np.testing.assert_allclose(joint.correlation(law)[:, 0, 1], [1, -1])
    np.testing.assert_allclose(joint.probability_above(law, [1, 1]), [0.5, 0])


def test_constraints_ask_for_the_joint_law():
    """Two of three vectors keep either bound, one of three keeps both; independent ones would do so in 4 of 9."""
    law = joint.equally_weighted(jnp.array([[1.0, 0], [0, 1], [1, 1]]))
    assert joint.probability_above(law, [1, 1]) == pytest.approx(1 / 3)
    alone = joint.JointLaw(*map(jnp.asarray, joint.independent(law)))
    assert joint.probability_above(alone, [1, 1]) == pytest.approx(4 / 9)


def test_independent_components_keep_their_marginals():
    law = joint.JointLaw(np.array([[0, 0, 5], [2, 4, 5], [0, 4, 5]]), np.array([0.25, 0.5, 0.25]))
    alone = joint.independent(law)
    assert len(alone.masses) == 4
    assert alone.masses.sum() == pytest.approx(1)
    np.testing.assert_allclose(joint.mean(alone), joint.mean(law))
    np.testing.assert_allclose(joint.covariance(alone), [[1, 0, 0], [0, 3, 0], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(alone.atoms, [[0, 0, 5], [0, 4, 5], [2, 0, 5], [2, 4, 5]])
    np.testing.assert_allclose(alone.masses, [0.125, 0.375, 0.125, 0.375])


def test_energy_distance_by_hand():
    rising, falling = joint.equally_weighted(RISING), joint.equally_weighted(FALLING)
    assert joint.energy_distance(rising, falling) == pytest.approx(2 - np.sqrt(2))
    assert joint.energy_distance(rising, rising) == pytest.approx(0)
    # Weighted laws against the same with repeated atoms, and in one dimension twice the squared Cramer distance.
    weighted = joint.JointLaw(RISING, jnp.array([0.75, 0.25]))
    repeated = joint.equally_weighted(jnp.concatenate([RISING, RISING[:1], RISING[:1]]))
    assert joint.energy_distance(weighted, falling) == pytest.approx(joint.energy_distance(repeated, falling))
    ones = joint.equally_weighted(jnp.array([[0.0], [1], [2]])), joint.equally_weighted(jnp.array([[0.5], [1.5], [4]]))
    assert joint.energy_distance(*ones) == pytest.approx(2 / 3)
    # More atoms than are looked at in one go.
    many = joint.equally_weighted(np.random.default_rng(0).normal(size=(3000, 2)))
    assert joint.energy_distance(many, many) == pytest.approx(0, abs=1e-9)


# -- discrepancies ----------------------------------------------------------------------------------------------------


def test_diagonals_differ_jointly_and_in_no_component():
    """sum_i w_i (1 + exp(-1/h_i) - 2 exp(-.5/h_i)): across, half of each squared distance is 0; within, all or none."""
    expected = sum(h**0.5 * (1 + np.exp(-1 / h) - 2 * np.exp(-0.5 / h)) for h in WIDTHS)
    assert joint.squared_mmd(RISING, FALLING, PAPERS) == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(1.967458, abs=1e-6)
    assert joint.squared_mmd(RISING, FALLING, joint.energy()) == pytest.approx(2 - np.sqrt(2), rel=1e-6)
    for component in range(2):
        alone = [x[:, component] for x in (RISING, FALLING)]
        one_kernel = mmd.gaussian_mixture(WIDTHS, [h**0.5 for h in WIDTHS])
        assert mmd.squared_mmd(*alone, one_kernel) == pytest.approx(0, abs=1e-5)


def test_one_component_is_the_discrepancy_of_numbers():
    """The spec's numbers of `mmd`, and equal to it bit for bit: loss and gradient."""
    particles, targets = jnp.array([[[0.0], [1], [2]]]), jnp.array([[[0.5], [1.5], [4]]])
    official = joint.gaussian_mixture(tuple(range(1, 11)), jnp.ones(10))
    assert joint.squared_mmd(particles, targets, official)[0] == pytest.approx(1.235913, rel=1e-5)
    assert joint.squared_mmd(particles, targets, joint.energy())[0] == pytest.approx(0.666667, rel=1e-5)
    a, b = random_sets(0, 5, 7, 1)
    weights = jnp.sqrt(jnp.array(WIDTHS))

    def of_vectors(a):
        return joint.squared_mmd(a, b, joint.gaussian_mixture(WIDTHS, weights)).mean()

    def of_numbers(a):
        return mmd.squared_mmd(a[..., 0], b[..., 0], mmd.gaussian_mixture(WIDTHS, weights)).mean()

    found, expected = (jax.jit(jax.value_and_grad(function))(a) for function in (of_vectors, of_numbers))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    pairs = [
        jax.value_and_grad(lambda a: joint.squared_mmd(a, b, joint.energy()).mean())(a),
        jax.value_and_grad(lambda a: mmd.squared_mmd(a[..., 0], b[..., 0], mmd.energy()).mean())(a),
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), *pairs)


def test_discounting_scales_the_energy_and_common_rewards_do_nothing():
    a, b = random_sets(1, 6, 3)
    reward = np.float32([1, -0.5, 2])
    plain = float(joint.squared_mmd(a, b, joint.energy()))
    assert joint.squared_mmd(reward + 0.9 * a, reward + 0.9 * b, joint.energy()) == pytest.approx(0.9 * plain, rel=1e-4)


@pytest.mark.parametrize("kernel", [PAPERS, joint.energy()], ids=["gaussian", "energy"])
def test_what_may_be_permuted(kernel):
    """Particles, and components if in both sets alike; in one set alone, components may not."""
    a, b = random_sets(2, 6, 3)
    plain = float(joint.squared_mmd(a, b, kernel))
    assert joint.squared_mmd(a[::-1], b[[1, 0, 2, 5, 3, 4]], kernel) == pytest.approx(plain, rel=1e-4)
    assert joint.squared_mmd(a[:, ::-1], b[:, ::-1], kernel) == pytest.approx(plain, rel=1e-4)
    assert abs(joint.squared_mmd(a[:, ::-1], b, kernel) - plain) > 1e-3 * plain
    # Nor may the components of particles be paired anew, which leaves all marginals as they are.
    mixed = np.stack([a[:, 0], np.sort(a[:, 1]), a[:, 2]], axis=-1)
    assert abs(joint.squared_mmd(mixed, b, kernel) - plain) > 1e-3 * plain


@pytest.mark.parametrize("kernel", [PAPERS, joint.energy()], ids=["gaussian", "energy"])
def test_gradients_are_central_differences(kernel):
    with jax.enable_x64(True):
        a, b = (jnp.asarray(x, jnp.float64) for x in random_sets(3, 3, 2))
        gradient = jax.grad(joint.squared_mmd)(a, b, kernel)
        for index in np.ndindex(3, 2):
            moved = [float(joint.squared_mmd(a.at[index].add(sign * 1e-5), b, kernel)) for sign in (1, -1)]
            assert gradient[index] == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-7)


def test_equal_particles_have_finite_gradients():
    a = jnp.zeros((3, 2))
    assert jnp.isfinite(jax.grad(joint.squared_mmd)(a, a, joint.energy())).all()

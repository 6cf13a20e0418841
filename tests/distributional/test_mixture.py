"""Mixtures against scipy, and their samples against their moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_dist.distributional import mixture as mixtures


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_density_of_two_components_by_hand():
    mixture = mixtures.Mixture(
        jnp.log(jnp.array([0.5, 0.5])), jnp.array([[1.0], [-1]]), jnp.log(jnp.full((2, 1), 0.1)), jnp.ones((2, 1, 1))
    )
    assert mixtures.mixture_log_likelihood(mixture, jnp.array([1.0])) == pytest.approx(0.690500, abs=2e-6)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_density_against_scipy(dimension):
    head = normal(dimension, 6, mixtures.mixture_size(4, dimension))
    values = 2 * normal(9, 6, dimension)
    mixture = mixtures.mixture_of(head, 4, dimension, 1.0)
    found = mixtures.mixture_log_likelihood(mixture, values)
    weights, means, log_std, mixing = (np.asarray(x, np.float64) for x in mixture)
    for row in range(6):
        density = 0.0
        for k in range(4):
            whitening = mixing[row, k] @ np.diag(np.exp(-log_std[row, k]))
            covariance = np.linalg.inv(whitening.T @ whitening)
            of_component = scipy.stats.multivariate_normal(means[row, k], covariance).pdf(values[row])
            density += np.exp(weights[row, k]) * of_component
        assert found[row] == pytest.approx(np.log(density), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(np.exp(weights).sum(-1), 1, rtol=1e-5)


def test_every_output_has_its_place():
    # One component in 2-D: logit, two means, two log deviations, one entry below the diagonal.
    head = jnp.array([0.3, 1.0, 2.0, -1.0, -2.0, 0.5])
    mixture = mixtures.mixture_of(head, 1, 2, 0.0)
    np.testing.assert_allclose(mixture.log_weights, [0], atol=1e-7)
    np.testing.assert_allclose(mixture.means, [[1, 2]])
    softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
    expected = [-5 + softplus(2 - softplus(2 - x) + 5) for x in (-1.0, -2.0)]
    np.testing.assert_allclose(mixture.log_std, [expected], rtol=1e-5)
    np.testing.assert_allclose(mixture.mixing, [[[1, 0], [0.5, 1]]])


def test_deviations_are_bounded_and_far_values_are_finite():
    low = mixtures.mixture_of(jnp.full(mixtures.mixture_size(3, 2), -1e4), 3, 2, 0.0).log_std
    high = mixtures.mixture_of(jnp.full(mixtures.mixture_size(3, 2), 1e4), 3, 2, 0.0).log_std
    np.testing.assert_allclose(low, np.full((3, 2), -5.0), atol=1e-4)
    np.testing.assert_allclose(high, np.full((3, 2), 2.0), atol=2e-3)

    def far(head):
        return mixtures.mixture_log_likelihood(mixtures.mixture_of(head, 3, 1, 1.0), jnp.array([500.0]))

    value, gradient = jax.value_and_grad(far)(normal(0, mixtures.mixture_size(3, 1)))
    assert value < -1_000  # the density itself underflows
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_components_start_apart():
    means = mixtures.mixture_of(jnp.zeros(mixtures.mixture_size(10, 2)), 10, 2, 1.5).means
    assert len(np.unique(np.asarray(means))) == 20
    assert 0.75 < np.std(means) < 2.25


def test_samples_of_a_mixture_follow_its_moments():
    head = normal(3, mixtures.mixture_size(3, 2))
    mixture = mixtures.mixture_of(jnp.tile(head, (200_000, 1)), 3, 2, 1.0)
    samples = np.asarray(jax.jit(mixtures.sample_mixture)(jax.random.key(0), mixture))
    weights, means, log_std, mixing = (np.asarray(x[0], np.float64) for x in mixture)
    weights = np.exp(weights)
    mean = weights @ means
    covariance = np.zeros((2, 2))
    for k in range(3):
        whitening = mixing[k] @ np.diag(np.exp(-log_std[k]))
        away = means[k] - mean
        covariance += weights[k] * (np.linalg.inv(whitening.T @ whitening) + np.outer(away, away))
    np.testing.assert_allclose(samples.mean(0), mean, atol=6 * np.sqrt(covariance.max() / 200_000))
    np.testing.assert_allclose(np.cov(samples.T), covariance, atol=0.03 * covariance.max())
    # The share within one component's ellipse shows whether weights and components belong together.
    one = jax.tree.map(lambda x: x[:1], mixture)
    found = np.asarray(mixtures.mixture_log_likelihood(one, samples[:20_000, None][:, 0]))
    again = np.asarray(jax.jit(mixtures.sample_mixture)(jax.random.key(1), mixture))[:20_000]
    other = np.asarray(mixtures.mixture_log_likelihood(one, again))
    assert scipy.stats.ks_2samp(found, other).pvalue > 1e-3


# -- models -----------------------------------------------------------------------------------------------------------

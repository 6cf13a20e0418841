"""Gaussian laws: hand-worked gradients, scipy and the generic atoms as oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_dist.distributional import gaussian, quantile
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.metrics import wasserstein_1

MEAN, STD = jnp.array([1.0, -200.0, 0.3]), jnp.array([2.0, 50.0, 1e-3])


def test_law_has_the_moments_and_quantiles_of_the_gaussian():
    law = gaussian.law(MEAN, STD)
    assert law.atoms.shape == (3, 51)
    np.testing.assert_allclose(laws.mean(law), MEAN, rtol=1e-5)
    np.testing.assert_allclose(jnp.sqrt(laws.variance(law)) / STD, 0.988, atol=1e-3)
    np.testing.assert_allclose(law.atoms[0], scipy.stats.norm.ppf(quantile.midpoints(51), 1, 2), rtol=1e-4, atol=1e-5)
    samples = MEAN[0] + STD[0] * jax.random.normal(jax.random.key(0), (20_000,))
    assert wasserstein_1(laws.Law(law.atoms[0], law.masses[0]), samples) < 0.07


def test_negative_log_likelihood_is_scipys():
    target = jnp.array([8.0, -120.0, 0.301])
    expected = -scipy.stats.norm.logpdf(target, MEAN, STD)
    np.testing.assert_allclose(gaussian.negative_log_likelihood(MEAN, STD, target), expected, rtol=1e-4)
    assert gaussian.negative_log_likelihood(1.0, 2.0, 8.0) == pytest.approx(7.7370857)


def test_clipped_target_by_hand():
    assert gaussian.clip_target(jnp.float32(1), jnp.float32(8), 5.0) == 6
    assert gaussian.clip_target(jnp.float32(1), jnp.float32(-8), 5.0) == -4
    assert gaussian.clip_target(jnp.float32(1), jnp.float32(3), 5.0) == 3
    assert jax.grad(gaussian.clip_target)(jnp.float32(1), jnp.float32(8), 5.0) == 0  # the mean is a constant here


def gradients(mean, std, mean_target, std_target, bias):
    def summed(mean, std):
        return gaussian.likelihood_surrogate(mean, std, mean_target, std_target, bias).sum()

    return jax.grad(summed, argnums=(0, 1))(mean, std)


@pytest.mark.parametrize(("bias", "expected"), [(0.0, (-1.75, -2.625)), (0.1, (-1.7073171, -2.5925926))])
def test_surrogate_gradients_by_hand(bias, expected):
    found = gradients(jnp.float32(1), jnp.float32(2), jnp.float32(8), jnp.float32(6), bias)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_surrogate_has_the_likelihoods_gradients():
    def likelihood(mean, std):
        return gaussian.negative_log_likelihood(mean, std, target).sum()

    key_of_mean, key_of_std, key_of_target = jax.random.split(jax.random.key(1), 3)
    mean, target = jax.random.normal(key_of_mean, (20,)), 3 * jax.random.normal(key_of_target, (20,))
    std = jnp.exp(jax.random.normal(key_of_std, (20,)))
    expected = jax.grad(likelihood, argnums=(0, 1))(mean, std)
    for found, wanted in zip(gradients(mean, std, target, target, 0.0), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_no_gradient_reaches_the_targets():
    def surrogate(mean_target, std_target):
        return gaussian.likelihood_surrogate(jnp.float32(1), jnp.float32(2), mean_target, std_target, 0.1)

    assert jax.grad(surrogate, argnums=(0, 1))(jnp.float32(8), jnp.float32(6)) == (0, 0)


@pytest.mark.parametrize(
    "text",
    ["neutral", "cvar:0.05", "cvar:0.5", "cvar:1", "wang:-0.75", "wang:0.5", "cpw:0.71", "power:-2", "power:3",
     "norm:3", "mean-variance:0.2"],
)  # fmt: skip
def test_risk_adjusted_value_is_that_of_many_atoms(text):
    risk = risks.parse(text)
    atoms = gaussian.law(MEAN[:2], STD[:2], 20_001)
    expected = risks.value(risk, atoms)
    np.testing.assert_allclose(gaussian.value(risk, MEAN[:2], STD[:2]), expected, rtol=3e-3, atol=1e-3)


def test_risk_adjusted_value_by_hand():
    # The mean of the worst tenth of N(0, 1) is -phi(-1.28155) / 0.1.
    assert gaussian.value(risks.parse("cvar:0.1"), jnp.float32(0), jnp.float32(1)) == pytest.approx(-1.75498, rel=1e-5)
    assert gaussian.value(risks.parse("cvar:1"), jnp.float32(3), jnp.float32(1)) == pytest.approx(3, abs=1e-5)
    assert gaussian.value(risks.parse("wang:-1"), jnp.float32(3), jnp.float32(2)) == 1
    assert gaussian.value(risks.parse("mean-variance:0.5"), jnp.float32(3), jnp.float32(2)) == 1

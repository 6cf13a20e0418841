"""Sampling errors of data of known frequencies."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import clipped

FOLDER = Path(__file__).parents[2] / "experiments" / "sampling_error"
specification = importlib.util.spec_from_file_location("sampling_error", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def even_policy(continuous: bool = False):
    """Weights of a policy that is the same everywhere: even, or a Gaussian of mean 0 and deviation 1."""
    network = clipped.Network((7, 6), 1 if continuous else 2, continuous)
    parameters = network.init(jax.random.key(0), jnp.zeros((1, 3)))
    layers = parameters["params"]["actor"]["layers"]
    layers["kernel_2"] = jnp.zeros_like(layers["kernel_2"])
    return parameters


def error_of(parameters, action, known=None):
    observation = jnp.tile(jnp.array([0.3, -0.2, 0.9]), (len(action), 1))
    known = jnp.ones(len(action), bool) if known is None else known
    return float(jax.jit(experiment.sampling_error)(parameters, observation, action, known))


def test_it_is_the_divergence_of_the_frequencies_from_the_policy():
    assert error_of(even_policy(), jnp.array([0, 0, 0, 1])) == pytest.approx(0.130812, abs=1e-5)
    assert error_of(even_policy(), jnp.array([0, 1, 1, 0])) == pytest.approx(0, abs=1e-7)


def test_it_is_of_known_rows_alone():
    known = jnp.array([True, True, True, True, False, False])
    assert error_of(even_policy(), jnp.array([0, 0, 0, 1, 1, 1]), known) == pytest.approx(0.130812, abs=1e-5)


def test_of_gaussians_it_is_about_mean_and_deviation():
    """KL of the Gaussian with the sample's mean and deviation from the policy."""
    action = jnp.array([[0.9], [-0.7], [0.6], [0.4]])
    mean, variance = float(action.mean()), float(action.var())
    expected = -np.log(variance) / 2 + (variance + mean**2 - 1) / 2
    assert error_of(even_policy(True), action) == pytest.approx(expected, rel=1e-3)


def test_it_is_never_negative():
    parameters = clipped.Network((7, 6), 2, False).init(jax.random.key(0), jnp.zeros((1, 3)))
    observation = jax.random.normal(jax.random.key(1), (64, 3))
    action = jax.random.randint(jax.random.key(2), (64,), 0, 2)
    assert jax.jit(experiment.sampling_error)(parameters, observation, action, jnp.ones(64, bool)) > 0

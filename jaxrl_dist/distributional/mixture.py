"""Mixtures of Gaussians as laws of returns, scalar or vector, as networks give them.

A component is N(m, S), and its covariance is kept as a factor of its inverse, so that no output is indefinite:

    W = (I + C) diag(1 / d),    W' W = S^-1,    C strictly lower triangular

With W (y - m) the density needs no solving and no determinant but the product of d; for scalars d is the deviation.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

LOG_STD_BOUNDS = (-5.0, 2.0)  # a component that sits on one sample would otherwise shrink without end


class Mixture(NamedTuple):
    """Gaussian mixtures, leading axes `[..., components]`."""

    log_weights: jax.Array
    means: jax.Array
    """`[..., components, dimension]`"""
    log_std: jax.Array
    """`[..., components, dimension]`: of each coordinate, given those before it"""
    mixing: jax.Array
    """I + C, `[..., components, dimension, dimension]`: lower triangular with a diagonal of ones"""


def mixture_size(components: int, dimension: int) -> int:
    """How many numbers describe a mixture."""
    return components * (1 + 2 * dimension + dimension * (dimension - 1) // 2)


def mixture_of(head: jax.Array, components: int, dimension: int, spread: float | jax.Array) -> Mixture:
    """The mixtures that outputs `[..., mixture_size]` of a network stand for.

    Means are offsets from scattered ones, of standard deviation `spread` in units of return, so that components start
    apart. Deviations stay within the exponentials of `LOG_STD_BOUNDS`, smoothly.
    """
    chex.assert_axis_dimension(head, -1, mixture_size(components, dimension))
    pieces = np.cumsum([1, dimension, dimension]) * components
    logits, offsets, log_std, below = jnp.split(head, pieces, axis=-1)
    offsets, log_std = (x.reshape(*x.shape[:-1], components, dimension) for x in (offsets, log_std))
    rows, columns = np.tril_indices(dimension, -1)
    below = below.reshape(*below.shape[:-1], components, len(rows))
    places = np.zeros((len(rows), dimension, dimension), np.float32)
    places[np.arange(len(rows)), rows, columns] = 1
    low, high = LOG_STD_BOUNDS
    log_std = low + jax.nn.softplus(high - jax.nn.softplus(high - log_std) - low)
    scattered = np.random.default_rng(0).normal(size=(components, dimension)).astype(np.float32)
    mixing = jnp.eye(dimension) + (below[..., None, None] * places).sum(-3)
    return Mixture(jax.nn.log_softmax(logits), spread * scattered + offsets, log_std, mixing)


def mixture_log_likelihood(mixture: Mixture, values: jax.Array) -> jax.Array:
    """Log density of values `[..., dimension]` under their mixtures: `[...]`, in nats; leading axes broadcast."""
    chex.assert_equal_shape([mixture.means, mixture.log_std])
    chex.assert_axis_dimension(values, -1, mixture.means.shape[-1])
    scaled = (values[..., None, :] - mixture.means) * jnp.exp(-mixture.log_std)
    white = (mixture.mixing * scaled[..., None, :]).sum(-1)
    of_component = (-0.5 * white**2 - mixture.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return jax.nn.logsumexp(mixture.log_weights + of_component, axis=-1)


def sample_mixture(key: jax.Array, mixture: Mixture) -> jax.Array:
    """One sample of every mixture `[batch, components, ...]`: `[batch, dimension]`."""
    chex.assert_rank(mixture.log_weights, 2)
    component_key, noise_key = jax.random.split(key)
    chosen = jax.random.categorical(component_key, mixture.log_weights)
    rows = jnp.arange(len(chosen))
    means, log_std, mixing = (x[rows, chosen] for x in mixture[1:])
    noise = jax.random.normal(noise_key, means.shape)
    scaled = jax.scipy.linalg.solve_triangular(mixing, noise[..., None], lower=True, unit_diagonal=True)[..., 0]
    return means + jnp.exp(log_std) * scaled

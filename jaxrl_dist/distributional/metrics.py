"""Distances between return distributions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def wasserstein_1(samples_a: ArrayLike, samples_b: ArrayLike) -> np.ndarray | jax.Array:
    """Exact Wasserstein-1 distance between two empirical laws, the area between their quantile functions.

    samples_a: `[..., n]`, samples_b: `[..., m]`, equally weighted and in any order, n and m may differ; leading axes
    broadcast. Returns `[...]` in the units of the samples. NumPy in, NumPy (float64) out; a JAX array on either side
    gives a JAX array, under jit, vmap and grad as well. Source: W1 = integral over tau in (0, 1) of
    |F_a^-1(tau) - F_b^-1(tau)|, a finite sum because both quantile functions are constant between jumps.
    """
    if isinstance(samples_a, jax.Array) or isinstance(samples_b, jax.Array):
        xp = jnp
        samples_a, samples_b = jnp.asarray(samples_a), jnp.asarray(samples_b)
    else:
        xp = np
        samples_a, samples_b = np.asarray(samples_a, np.float64), np.asarray(samples_b, np.float64)
    for name, samples in (("samples_a", samples_a), ("samples_b", samples_b)):
        if samples.ndim == 0 or samples.shape[-1] == 0:
            raise ValueError(f"{name} has shape {samples.shape}, but its last axis must hold at least one sample")
    n, m = samples_a.shape[-1], samples_b.shape[-1]
    # The jumps i/n and j/m, counted in units of 1/(n m) so that equal ones are found equal. Shapes are static, so this
    # is plain NumPy even under jit.
    jumps = np.union1d(np.arange(n + 1) * m, np.arange(n * m + 1, step=n))
    left, width = jumps[:-1], np.diff(jumps) / (n * m)
    quantiles_a = xp.sort(samples_a, axis=-1)[..., left // m]
    quantiles_b = xp.sort(samples_b, axis=-1)[..., left // n]
    return xp.sum(xp.abs(quantiles_a - quantiles_b) * width, axis=-1)

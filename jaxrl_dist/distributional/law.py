"""Return distributions as weighted atoms: what agents predict, and what risk measures and metrics read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Law(NamedTuple):
    """A return distribution as weighted atoms in any order; the leading axes of the two fields broadcast."""

    atoms: jax.Array
    """Returns, `[..., n]`."""
    masses: jax.Array
    """Probabilities, `[..., n]`, nonnegative, summing to one over the last axis."""


def equally_weighted(atoms: jax.Array) -> Law:
    """The law of `[..., n]` atoms of mass 1/n each: quantiles, particles, samples."""
    return Law(atoms, jnp.full(atoms.shape, 1 / atoms.shape[-1]))


def mean(law: Law) -> jax.Array:
    """Expectation, `[...]`, in units of return."""
    return (law.atoms * law.masses).sum(-1)


def variance(law: Law) -> jax.Array:
    """Variance, `[...]`, in squared units of return."""
    centred = law.atoms - mean(law)[..., None]  # not E[Z^2] - E[Z]^2, which cancels in float32
    return (centred**2 * law.masses).sum(-1)


def cumulative_probability(law: Law, values: jax.Array) -> jax.Array:
    """P(Z <= value): values `[m]` -> `[..., m]`."""
    below = law.atoms[..., None, :] <= jnp.asarray(values)[:, None]
    return jnp.where(below, law.masses[..., None, :], 0).sum(-1)


def quantile(law: Law, fractions: jax.Array) -> jax.Array:
    """Lower quantile inf{z: P(Z <= z) >= fraction}: fractions `[m]` in (0, 1] -> `[..., m]`, always one of the atoms.

    Cumulated float32 masses carry rounding errors, so an atom counts as reaching a fraction that it misses by less than
    those errors can be, one unit in the last place per atom; atoms without mass below the law are never returned.
    """
    atoms, masses = sort(law)
    count = atoms.shape[-1]
    rounding = count * jnp.finfo(masses.dtype).eps
    needed = jnp.maximum(jnp.asarray(fractions) - rounding, jnp.finfo(masses.dtype).tiny)
    missed = jnp.cumsum(masses, axis=-1)[..., None, :] < needed[:, None]
    index = jnp.minimum(missed.sum(-1), count - 1)
    return jnp.take_along_axis(atoms, index, axis=-1)


def sort(law: Law) -> Law:
    """The same law with its atoms in ascending order and both fields of the same shape."""
    atoms, masses = jnp.broadcast_arrays(law.atoms, law.masses)
    order = jnp.argsort(atoms, axis=-1)
    return Law(jnp.take_along_axis(atoms, order, axis=-1), jnp.take_along_axis(masses, order, axis=-1))

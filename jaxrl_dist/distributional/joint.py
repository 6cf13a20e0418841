"""Joint laws of several returns, one for each component of a vector reward, as weighted atoms in R^K.

Marginals do not say what goes together: the four corners of a square, and two of them on a diagonal, are the same to
each component. Everything here looks at whole vectors; `Law` is that of one return, here of the sum of all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.distributional.law import Law

Kernel = Callable[[jax.Array], jax.Array]
"""A function of the difference of two vectors of returns, `[..., K]` -> `[...]`."""


class JointLaw(NamedTuple):
    """A joint law of K returns as weighted atoms in any order."""

    atoms: jax.Array
    """Vectors of returns, `[..., n, K]`."""
    masses: jax.Array
    """Probabilities, `[..., n]`, nonnegative, summing to one over the last axis."""


def equally_weighted(atoms: jax.Array) -> JointLaw:
    """The law of `[..., n, K]` atoms of mass 1/n each: particles, samples."""
    return JointLaw(atoms, jnp.full(atoms.shape[:-1], 1 / atoms.shape[-2]))


def total(law: JointLaw) -> Law:
    """The law of the sum of the components, `[..., n]`, atom by atom: what goes together stays together."""
    return Law(law.atoms.sum(-1), law.masses)


def mean(law: JointLaw) -> jax.Array:
    """Expectations of the components, `[..., K]`."""
    return (law.masses[..., None] * law.atoms).sum(-2)


def covariance(law: JointLaw) -> jax.Array:
    """`[..., K, K]`, in squared units of return."""
    centred = law.atoms - mean(law)[..., None, :]
    return jnp.einsum("...n,...ni,...nj->...ij", law.masses, centred, centred)


def correlation(law: JointLaw) -> jax.Array:
    """`[..., K, K]`, each in [-1, 1]; NaN where a component does not vary."""
    found = covariance(law)
    deviation = jnp.sqrt(jnp.diagonal(found, axis1=-2, axis2=-1))
    return found / (deviation[..., :, None] * deviation[..., None, :])


def independent(law: JointLaw) -> JointLaw:
    """The law of independent components with the same marginals, in numpy: atoms `[n, K]` -> at most n^K of them.

    All that can be said of what goes together by who learns each component alone.
    """
    atoms, masses = np.asarray(law.atoms, np.float64), np.asarray(law.masses, np.float64)
    columns = [np.unique(column.round(9), return_inverse=True) for column in atoms.T]
    weights = [np.bincount(where.ravel(), masses, len(values)) for values, where in columns]
    grid = np.stack([x.ravel() for x in np.meshgrid(*(values for values, _ in columns), indexing="ij")], axis=-1)
    return JointLaw(grid, np.prod([x.ravel() for x in np.meshgrid(*weights, indexing="ij")], axis=0))


def probability_above(law: JointLaw, bounds: Sequence[float] | jax.Array) -> jax.Array:
    """P(every component is at least its bound), `[...]`: what constraints ask of a joint law (MD3QN, appendix).

    bounds: `[K]`. The product of the components' own probabilities is another number, unless they are independent.
    """
    return (law.masses * (law.atoms >= jnp.asarray(bounds)).all(-1)).sum(-1)


def energy_distance(first: JointLaw, second: JointLaw) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean distances, in units of return; 0 for equal laws only.

    Szekely & Rizzo (2013). Laws without leading axes, `[n, K]` and `[m, K]`, in numpy and float64.
    """

    def mean_distance(a: JointLaw, b: JointLaw) -> float:
        found, other, weights = 0.0, np.asarray(b.atoms, np.float64), np.asarray(b.masses, np.float64)
        rows = max(1, 2**21 // len(other))  # so many at once, for the sake of memory
        for start in range(0, len(a.atoms), rows):
            some, mass = (np.asarray(part[start : start + rows], np.float64) for part in a)
            found += mass @ np.sqrt(((some[:, None] - other) ** 2).sum(-1)) @ weights
        return found

    return float(2 * mean_distance(first, second) - mean_distance(first, first) - mean_distance(second, second))


# -- discrepancies that can be descended ------------------------------------------------------------------------------


def squared_mmd(samples_a: jax.Array, samples_b: jax.Array, kernel: Kernel) -> jax.Array:
    """Squared maximum mean discrepancy of equally weighted vectors, as `mmd.squared_mmd` has it of numbers.

    `[..., N, K]`, `[..., M, K]` -> `[...]`, in units of the kernel. Each sample counts against itself too.
    """

    def pairwise(left, right):
        return kernel(left[..., :, None, :] - right[..., None, :, :]).mean((-2, -1))

    return pairwise(samples_a, samples_a) + pairwise(samples_b, samples_b) - 2 * pairwise(samples_a, samples_b)


def gaussian_mixture(bandwidths: Sequence[float], weights: jax.Array) -> Kernel:
    """Kernel k(d) = sum_h weight_h exp(-mean over the components of d_k^2 / h) (MD3QN, as its code has it).

    The mean, not the sum: K equal components are as far apart as one of them. bandwidths: above 0, in *squared* units
    of return; weights: `[bandwidths]`.
    """

    def kernel(difference):
        squared = (difference**2).mean(-1)
        return sum(weight * jnp.exp(-squared / h) for h, weight in zip(bandwidths, weights, strict=True))

    return kernel


def energy() -> Kernel:
    """Kernel k(d) = -|d|, the Euclidean length, with which the squared MMD is the energy distance; gradient 0 at 0."""

    def kernel(difference):
        squared = (difference**2).sum(-1)
        same = squared == 0
        # The slope of the root at 0 is infinite, so it must not be taken there.
        return jnp.where(same, 0, -jnp.sqrt(jnp.where(same, 1, squared)))

    return kernel

"""Distances between return distributions.

Each law is a `Law`, or an array `[..., n]` of equally weighted samples; atoms in any order, their numbers may differ,
leading axes broadcast. NumPy in, NumPy (float64) out; a JAX array on either side gives a JAX array, under jit, vmap and
grad as well. ValueError for a law without atoms. `total_variation` alone is of samples, which may be vectors.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxrl_dist.distributional.law import Law


def wasserstein_1(a: Law | ArrayLike, b: Law | ArrayLike) -> np.ndarray | jax.Array:
    """Exact Wasserstein-1 distance, `[...]`, in units of return.

    The area between the two distribution functions, integral of |F_a - F_b|, which is also that between the two
    quantile functions.
    """
    xp, difference, width = _difference(a, b)
    return (xp.abs(difference) * width).sum(-1)


def cramer(a: Law | ArrayLike, b: Law | ArrayLike) -> np.ndarray | jax.Array:
    """Squared Cramer distance, `[...]`, in units of return: the integral of (F_a - F_b)^2.

    Its square root is the metric in which the categorical Bellman operator contracts (Rowland et al. 2018).
    """
    _, difference, width = _difference(a, b)
    return (difference**2 * width).sum(-1)


def energy_distance(a: Law | ArrayLike, b: Law | ArrayLike) -> np.ndarray | jax.Array:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, `[...]`, in units of return; twice `cramer` (Szekely & Rizzo 2013).

    SciPy's function of this name is the square root.
    """
    return 2 * cramer(a, b)


def total_variation(a: np.ndarray, b: np.ndarray, edges: np.ndarray) -> float:
    """Total variation distance of two samples `[n, dimension]`, `[m, dimension]` after binning, in [0, 1].

    edges: `[bins + 1]`, ascending, the same for every axis. What lies beyond them counts in bins of its own. NumPy in.
    """
    size = len(edges) + 1

    def shares(samples):
        cells = np.digitize(np.asarray(samples), edges) @ size ** np.arange(samples.shape[-1])
        return np.bincount(cells, minlength=size ** samples.shape[-1]) / len(samples)

    return float(0.5 * np.abs(shares(a) - shares(b)).sum())


def _difference(a, b):
    """(module, F_a - F_b, width) on the intervals between neighbouring atoms of the two laws, `[..., n + m - 1]`.

    Both distribution functions are constant there, and equal outside.
    """
    xp = jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((a, b))) else np
    pairs = []
    for name, law in (("a", a), ("b", b)):
        fields = [xp.asarray(field, None if xp is jnp else np.float64) for field in _fields(law)]
        if fields[0].ndim == 0 or fields[0].shape[-1] == 0:
            raise ValueError(f"{name} has shape {fields[0].shape}, but its last axis must hold at least one atom")
        pairs.append(fields if len(fields) == 2 else [fields[0], xp.full(fields[0].shape, 1 / fields[0].shape[-1])])
    (atoms_a, masses_a), (atoms_b, masses_b) = pairs
    leading = np.broadcast_shapes(*(array.shape[:-1] for pair in pairs for array in pair))

    def join(left, right):
        arrays = [xp.broadcast_to(array, (*leading, array.shape[-1])) for array in (left, right)]
        return xp.concatenate(arrays, axis=-1)

    atoms, masses = join(atoms_a, atoms_b), join(masses_a, -masses_b)
    order = xp.argsort(atoms, axis=-1)
    atoms, masses = xp.take_along_axis(atoms, order, axis=-1), xp.take_along_axis(masses, order, axis=-1)
    return xp, xp.cumsum(masses, axis=-1)[..., :-1], xp.diff(atoms, axis=-1)


def _fields(law):
    return law if isinstance(law, Law) else (law,)

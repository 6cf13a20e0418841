"""Return distributions as equally weighted atoms: the quantile representation.

A distribution is an array `[..., quantiles]` whose entry m is the value at the fraction `midpoints(quantiles)[m]`.
Networks may cross their quantiles; nothing here assumes that predictions are sorted.
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp

MOST_ATOMS = 2**20
"""More could not be told apart: beyond it the fractions differ by less than a few steps of float32."""


def midpoints(num_quantiles: int) -> jax.Array:
    """Fractions (2m - 1) / 2M at which M quantiles minimise the Wasserstein-1 distance (QR-DQN, Lemma 2): `[M]`."""
    if not 1 <= num_quantiles <= MOST_ATOMS:
        raise ValueError(f"num_quantiles is {num_quantiles}; it must be at least 1 and at most {MOST_ATOMS}")
    return (jnp.arange(num_quantiles, dtype=jnp.float32) + 0.5) / num_quantiles


# -- the quantile Huber loss ------------------------------------------------------------------------------------------


def quantile_huber_loss(
    predicted: jax.Array,
    target: jax.Array,
    fractions: jax.Array,
    *,
    kappa: float | jax.Array = 1.0,
    over_predicted: Literal["mean", "sum"],
    target_masses: jax.Array | None = None,
) -> jax.Array:
    """Quantile regression of predicted atoms on target atoms, smoothed by the Huber function (QR-DQN, eq. 9-10).

    With u = target - predicted, each pair costs |fraction - 1{u < 0}| * huber_kappa(u) / kappa. Costs are averaged over
    the target atoms, and summed (QR-DQN, IQN) or averaged (TQC) over the predicted ones. The gradient reaches
    `predicted` alone: targets, their masses and fractions are constants of this loss.

    Args:
        predicted: `[batch, *members, quantiles]`; any number of axes (critics) between batch and quantiles.
        target: `[batch, targets]`, shared by all members.
        fractions: `[quantiles]`, or any shape that broadcasts to `predicted`; it belongs to the *predicted* axis.
        kappa: threshold of the Huber function in units of return; 0 is plain quantile regression.
        over_predicted: how the predicted axis is reduced.
        target_masses: probabilities of the target atoms, `[batch, targets]`; without them all atoms count alike.

    Returns:
        Loss per batch element and member, `[batch, *members]`.
    """
    if over_predicted not in ("mean", "sum"):
        raise ValueError(f"over_predicted is {over_predicted!r}; it must be 'mean' or 'sum'")
    chex.assert_rank(target, 2)
    chex.assert_equal_shape_prefix([predicted, target], 1)
    if target_masses is not None:
        chex.assert_equal_shape([target, target_masses])
    fractions = jnp.broadcast_to(fractions, predicted.shape)
    cost = _mean_pairwise_cost(predicted, target, target_masses, fractions, jnp.asarray(kappa, predicted.dtype))
    return cost.mean(-1) if over_predicted == "mean" else cost.sum(-1)


@jax.custom_vjp
def _mean_pairwise_cost(predicted, target, masses, fractions, kappa):
    return _cost_and_slope(predicted, target, masses, fractions, kappa)[0]


def _forward(predicted, target, masses, fractions, kappa):
    return _cost_and_slope(predicted, target, masses, fractions, kappa)


def _backward(slope, cotangent):
    return cotangent * slope, None, None, None, None


_mean_pairwise_cost.defvjp(_forward, _backward)


def _cost_and_slope(predicted, target, masses, fractions, kappa):
    """Mean pair cost of each predicted atom and its derivative, in one pass over the pairs.

    Cost and derivative share every intermediate, so computing both here avoids materialising the
    `[batch, members, quantiles, targets]` array that automatic differentiation would keep.
    """
    kappa = jnp.maximum(kappa, 1e-12)

    def pair(theta, y, tau):
        """Cost and slope of pairs, both times kappa: a division here would be a kernel of its own for every pair."""
        u = y - theta
        clipped = jnp.clip(u, -kappa, kappa)
        slope = jnp.where(u < 0, 1 - tau, tau) * clipped
        return slope * (u - 0.5 * clipped), slope

    def dense(predicted, target, masses, fractions):
        beside = (target.shape[0], *(1,) * (predicted.ndim - 1), target.shape[1])
        cost, slope = pair(predicted[..., None], target.reshape(beside), fractions[..., None])
        if masses is None:
            return cost.mean(-1) / kappa, -slope.mean(-1) / kappa
        masses = masses.reshape(beside)
        return (masses * cost).sum(-1) / kappa, -(masses * slope).sum(-1) / kappa

    def blocked(predicted, target, masses, fractions):
        # On CPU: one target atom at a time, vectorised over all predictions, measured 30 times faster than `dense`.
        def accumulate(sums, atom):
            y, mass = jax.tree.map(lambda x: x.reshape(-1, *(1,) * (predicted.ndim - 1)), atom)
            terms = pair(predicted, y, fractions)
            if mass is not None:
                terms = jax.tree.map(lambda x: mass * x, terms)
            return jax.tree.map(jnp.add, sums, terms), None

        # What does not fill a turn of the loop comes first: XLA would move pairs after the loop into the reduction that
        # follows, where four of them take as long as 35 in the loop.
        turn = min(5, target.shape[1])
        sums, rest = (jnp.zeros_like(predicted), jnp.zeros_like(predicted)), target.shape[1] % turn
        atoms = jax.tree.map(jnp.transpose, (target, masses))
        for index in range(rest):
            sums, _ = accumulate(sums, jax.tree.map(lambda x, index=index: x[index], atoms))
        (cost, slope), _ = jax.lax.scan(accumulate, sums, jax.tree.map(lambda x: x[rest:], atoms), unroll=turn)
        scale = 1 / (kappa * (target.shape[1] if masses is None else 1))
        return cost * scale, -slope * scale

    return jax.lax.platform_dependent(predicted, target, masses, fractions, cpu=blocked, default=dense)


# -- mixtures of critics ----------------------------------------------------------------------------------------------


def truncate_pooled(atoms: jax.Array, dropped_per_critic: int) -> jax.Array:
    """Pool all critics' atoms, sort, and drop the largest: the truncated mixture of TQC (section 3, eq. 10-11).

    Args:
        atoms: `[batch, critics, quantiles]`.
        dropped_per_critic: d; d * critics atoms leave the *pool* (not d from each critic).

    Returns:
        The smallest critics * (quantiles - d) atoms in ascending order, `[batch, critics * (quantiles - d)]`.
    """
    chex.assert_rank(atoms, 3)
    batch, critics, quantiles = atoms.shape
    if not 0 <= dropped_per_critic < quantiles:
        raise ValueError(
            f"dropped_per_critic is {dropped_per_critic}; it must be in [0, {quantiles - 1}] for {quantiles} quantiles"
        )
    pooled = sort_atoms(atoms.reshape(batch, critics * quantiles))
    return pooled[:, : critics * (quantiles - dropped_per_critic)]


def sort_atoms(atoms: jax.Array) -> jax.Array:
    """Sort each row ascending, `[batch, atoms]` -> `[batch, atoms]`; a NaN spoils its row, so that none is dropped."""
    chex.assert_rank(atoms, 2)

    def plain(rows):
        spoiled = jnp.isnan(rows).any(-1, keepdims=True)
        return jnp.where(spoiled, jnp.nan, jnp.sort(rows, axis=-1))

    return jax.lax.platform_dependent(atoms, cpu=_sorting_network, default=plain)


def _sorting_network(rows: jax.Array) -> jax.Array:
    """Bitonic sorting network, vectorised over the batch: XLA's CPU sort is scalar, this measured 25 times faster."""
    batch, count = rows.shape
    size = 1 << (count - 1).bit_length()
    x = jnp.concatenate([rows.T, jnp.full((size - count, batch), jnp.inf, rows.dtype)])
    width = 2
    while width <= size:
        # Merge two sorted halves of each block: compare the first half with the reversed second half ...
        low, high = x.reshape(size // width, 2, width // 2, batch).swapaxes(0, 1)
        high = high[:, ::-1]
        x = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]], axis=1).reshape(size, batch)
        # ... then clean both halves, which are now bitonic, at halving distances.
        distance = width // 4
        while distance:
            low, high = x.reshape(size // (2 * distance), 2, distance, batch).swapaxes(0, 1)
            x = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)], axis=1).reshape(size, batch)
            distance //= 2
        width *= 2
    return x[:count].T


# -- what a set of atoms says -----------------------------------------------------------------------------------------


def crossing_count(quantiles: jax.Array) -> jax.Array:
    """Number of neighbouring quantiles in the wrong order, `[..., quantiles]` -> `[...]` int32; 0 for a true law."""
    return (quantiles[..., 1:] < quantiles[..., :-1]).sum(-1, dtype=jnp.int32)

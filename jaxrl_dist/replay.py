"""Uniform experience replay: a ring buffer as a pytree of arrays and three pure functions."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Replay(NamedTuple):
    """Stored rows and where the next ones go.

    rows: pytree of arrays `[capacity, ...]` in their native dtypes.
    position: int32, index of the next row to be written.
    size: int32, number of rows written so far, at most the capacity.
    """

    rows: chex.ArrayTree
    position: jax.Array
    size: jax.Array


def create(row: chex.ArrayTree, capacity: int, rows_per_write: int = 1) -> Replay:
    """Empty buffer for rows shaped like `row` (arrays or ShapeDtypeStructs without a leading axis).

    `capacity` is rounded up to a multiple of `rows_per_write`, so that a write never wraps inside itself and stays one
    contiguous in-place copy, whatever the capacity.
    """
    if capacity < rows_per_write:
        raise ValueError(f"capacity is {capacity}; it must be at least rows_per_write = {rows_per_write}")
    capacity = -(-capacity // rows_per_write) * rows_per_write
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    return Replay(rows, jnp.int32(0), jnp.int32(0))


def add(replay: Replay, batch: chex.ArrayTree) -> Replay:
    """Write `rows_per_write` rows (leaves `[rows_per_write, ...]`, as many at every write) over the oldest ones."""
    count = jax.tree.leaves(batch)[0].shape[0]
    capacity = jax.tree.leaves(replay.rows)[0].shape[0]
    if capacity % count:
        raise ValueError(f"a batch of {count} rows does not divide the capacity {capacity} that create() rounded up")

    def write(buffer, new):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), replay.position, axis=0)

    rows = jax.tree.map(write, replay.rows, batch)
    return Replay(rows, (replay.position + count) % capacity, jnp.minimum(replay.size + count, capacity))


def sample(replay: Replay, key: jax.Array, batch_size: int) -> chex.ArrayTree:
    """Draw rows uniformly with replacement among those written: leaves `[batch_size, ...]`.

    With replacement, because drawing without would sort or permute the whole buffer at every update.
    """
    half = -(-batch_size // 2)
    indices = jax.random.randint(key, (2, half), 0, replay.size)
    # In two halves, one after the other: XLA fuses the write before it into a single gather, then needs the buffer as
    # it was before the write as well and copies it at every step. It does not fuse across a loop.
    halves = jax.lax.map(lambda some: jax.tree.map(lambda buffer: buffer[some], replay.rows), indices)
    return jax.tree.map(lambda x: x.reshape(2 * half, *x.shape[2:])[:batch_size], halves)

"""Experience replay: a ring buffer as a pytree of arrays, drawn from uniformly or by priority, and pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.learning import draws


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
    capacity = _capacity(replay)
    if capacity % count:
        raise ValueError(f"a batch of {count} rows does not divide the capacity {capacity} that create() rounded up")

    def write(buffer, new):
        return jax.lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), replay.position, axis=0)

    rows = jax.tree.map(write, replay.rows, batch)
    return Replay(rows, (replay.position + count) % capacity, jnp.minimum(replay.size + count, capacity))


def sample(replay: Replay, key: jax.Array, batch_size: int) -> chex.ArrayTree:
    """Draw rows uniformly with replacement among those written: leaves `[batch_size, ...]`."""
    return gather(replay.rows, sample_indices(replay, key, batch_size))


def sample_indices(replay: Replay, key: jax.Array, batch_size: int) -> jax.Array:
    """Draw slots uniformly with replacement among those written: int32 `[batch_size]`.

    With replacement, because drawing without would sort or permute the whole buffer at every update.
    """
    return draws.integers(key, (batch_size,), replay.size)


def gather(rows: chex.ArrayTree, indices: jax.Array) -> chex.ArrayTree:
    """Rows at the slots `[batch]`: leaves `[batch, ...]`, read without a copy of the buffer (see `in_halves`)."""
    return in_halves(lambda some: jax.tree.map(lambda buffer: buffer[some], rows), indices)


def in_halves(read: Callable[[jax.Array], chex.ArrayTree], indices: jax.Array) -> chex.ArrayTree:
    """`read(indices)` for slots `[batch]` and leaves `[batch, ...]`, one half of the batch after the other.

    XLA fuses the write before it into a single gather, then needs the buffer as it was before the write as well and
    copies it at every step. It does not fuse across a loop. `read` must treat every slot by itself.
    """
    batch_size = indices.shape[0]
    half = -(-batch_size // 2)
    halves = jax.lax.map(read, jnp.pad(indices, (0, 2 * half - batch_size)).reshape(2, half))
    return jax.tree.map(lambda x: x.reshape(2 * half, *x.shape[2:])[:batch_size], halves)


def window_indices(replay: Replay, indices: jax.Array, num_steps: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """Slots of the `num_steps` steps of one environment that begin at `indices` `[batch]`, and which are recorded.

    `stride` is the number of rows per write, one for each environment. Both results are `[num_steps, batch]`: int32
    slots, around the ring, and False where a step would lie beyond the newest row, in a slot of older rows or none.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    capacity = _capacity(replay)
    ahead = stride * jnp.arange(num_steps, dtype=jnp.int32)[:, None]
    newer = (replay.position - 1 - indices) % capacity  # rows written after each start
    return (indices + ahead) % capacity, ahead <= newer


class Priorities(NamedTuple):
    """An index over a replay's slots, to draw them in proportion to their priority.

    tree: float32 `[2 * leaves]`, leaves being a power of two and at least the capacity. Node 1 is the sum of all,
        node i the sum of its children 2 i and 2 i + 1, and slot s the node leaves + s. Node 0 is not used.
    largest: float32, the largest priority set so far, as it stands in the leaves; what a new slot is given.
    """

    tree: jax.Array
    largest: jax.Array


def equal_priorities(replay: Replay) -> Priorities:
    """Priority 1 for every written slot and 0, never drawn, for the others."""
    leaves = 1 << (_capacity(replay) - 1).bit_length()
    return Priorities(_tree_over((jnp.arange(leaves) < replay.size).astype(jnp.float32)), jnp.float32(1))


def _tree_over(leaves: jax.Array) -> jax.Array:
    levels = [leaves]
    while levels[-1].shape[0] > 1:
        levels.append(levels[-1].reshape(-1, 2).sum(1))
    return jnp.concatenate([jnp.zeros(1), *reversed(levels)])


def sample_by_priority(priorities: Priorities, key: jax.Array, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """Draw slots with probability priority / sum: int32 slots and float32 probabilities, both `[batch_size]`.

    Stratified (Schaul et al. 2016, arXiv 1511.05952, appendix B.2.1): the i-th slot comes from the i-th of batch_size
    equal parts of the sum. A slot of priority zero is never drawn, and every probability is positive.
    """
    tree = priorities.tree
    leaves = tree.shape[0] // 2
    place = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size

    def down(level, carry):
        node, rest, _, total = carry
        # The first step goes to the root and reads the sum. Like `in_halves`, nothing may read the tree outside of a
        # loop: XLA would fuse such a read into what uses it, after the next write, and copy the tree at every step.
        first = level == 0
        left, right = tree[2 * node], tree[2 * node + 1]
        total = jnp.where(first, right, total)
        rest = jnp.where(first, rest * right, rest)
        # `rest` may round up to the whole sum of its node or beyond: no test of it may lead into a child of sum zero.
        go_right = first | ((right > 0) & ((rest >= left) | (left <= 0)))
        return 2 * node + go_right, jnp.where(go_right, rest - left, rest), jnp.where(go_right, right, left), total

    nothing = jnp.zeros(batch_size)
    start = (jnp.zeros(batch_size, jnp.int32), place, nothing, nothing)
    node, _, priority, total = jax.lax.fori_loop(0, leaves.bit_length(), down, start)
    # A drawn slot's share can be too small for a float; as a zero it would make the importance weights nan.
    return node - leaves, jnp.maximum(priority / total, jnp.finfo(jnp.float32).tiny)


def set_priorities(priorities: Priorities, indices: jax.Array, values: jax.Array) -> Priorities:
    """Give the slots `[k]` the priorities `[k]`, already raised to their exponent; equal slots need equal values.

    Every sum above a changed leaf is made anew from its two children, so no rounding error builds up over a training.
    """
    leaves = priorities.tree.shape[0] // 2

    def up(_, carry):
        node, tree = carry
        node = node // 2
        return node, tree.at[node].set(tree[2 * node] + tree[2 * node + 1])

    node = leaves + indices
    tree = priorities.tree.at[node].set(values)
    _, tree = jax.lax.fori_loop(0, leaves.bit_length() - 1, up, (node, tree))
    return Priorities(tree, jnp.maximum(priorities.largest, values.max()))


def grow(replay: Replay, capacity: int) -> Replay:
    """The same rows in a larger buffer, as if it had been that large from the start; `replay` has never wrapped."""
    more = capacity - _capacity(replay)
    if more < 0:
        raise ValueError(f"capacity is {capacity}; it must be at least the {_capacity(replay)} there are")
    rows = jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), replay.rows)
    return Replay(rows, replay.size % capacity, replay.size)


def grow_priorities(priorities: Priorities, nodes: int) -> Priorities:
    """The same priorities over more slots: a tree of `nodes` nodes, `[2 * leaves]`; new slots have priority 0."""
    leaves = priorities.tree.shape[0] // 2
    return Priorities(_tree_over(jnp.pad(priorities.tree[leaves:], (0, nodes // 2 - leaves))), priorities.largest)


def importance_weights(probabilities: jax.Array, size: int | jax.Array, exponent: float | jax.Array) -> jax.Array:
    """(size P)^-exponent over its largest in the batch: `[batch]` -> `[batch]`, at most 1 (arXiv 1511.05952, 3.4)."""
    weights = (size * probabilities) ** -exponent
    largest = weights.max()
    # A compiled division may miss 1 by its last bit; equal priorities are plain uniform replay, with weights of 1.
    return jnp.where(weights == largest, 1, weights / largest)


def _capacity(replay: Replay) -> int:
    return jax.tree.leaves(replay.rows)[0].shape[0]

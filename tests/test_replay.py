import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist import replay

ROW = {
    "frame": jax.ShapeDtypeStruct((2, 2), jnp.uint8),
    "flag": jax.ShapeDtypeStruct((), bool),
    "identity": jax.ShapeDtypeStruct((), jnp.int32),
    "vector": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def rows(identities):
    """Rows that are known by their identity, in every leaf; all zeros, identity 0, is what was never written."""
    identities = np.asarray(identities)
    return {
        "frame": (identities[:, None, None] * np.arange(1, 5).reshape(2, 2)).astype(np.uint8),
        "flag": identities % 3 == 1,
        "identity": identities.astype(np.int32),
        "vector": np.float32(identities[:, None]) * np.float32([1, 10, 100]),
    }


def assert_rows(actual, identities):
    for name, expected in rows(identities).items():
        assert actual[name].dtype == ROW[name].dtype == expected.dtype
        np.testing.assert_array_equal(actual[name], expected)


add = jax.jit(replay.add, donate_argnums=0)
sample = jax.jit(replay.sample, static_argnums=2)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(1, 1), (5, 1), (4, 4), (6, 3), (7, 3)]), st.integers(1, 12), st.integers(0, 9))
def test_agrees_with_a_list_that_forgets_its_oldest_rows(sizes, writes, seed):
    capacity, rows_per_write = sizes
    buffer = replay.create(ROW, capacity, rows_per_write)
    slots = -(-capacity // rows_per_write) * rows_per_write
    assert buffer.rows["vector"].shape == (slots, 3)
    kept = []
    for write in range(writes):
        new = 1 + write * rows_per_write + np.arange(rows_per_write)
        buffer = add(buffer, rows(new))
        kept = (kept + list(new))[-slots:]
        # A row's slot never changes while it is kept, so the ring is the list rotated.
        assert (int(buffer.size), int(buffer.position)) == (len(kept), (write + 1) * rows_per_write % slots)
        ring = np.zeros(slots, int)
        ring[slots - len(kept) :] = kept
        assert_rows(buffer.rows, np.roll(ring, int(buffer.position)))
    drawn = sample(buffer, jax.random.key(seed), 300)
    assert_rows(drawn, drawn["identity"])  # all leaves of a drawn row belong together
    assert set(np.asarray(drawn["identity"])) <= set(kept)
    if len(kept) < 12:
        assert set(np.asarray(drawn["identity"])) == set(kept)  # missing one: less than 12 (11/12)^300 = 6e-11


@pytest.mark.parametrize("written", [10, 64])
def test_sampling_is_uniform_over_the_written_rows(written):
    buffer = replay.create(ROW, 64)
    buffer = buffer._replace(rows=rows(np.arange(64)), size=jnp.int32(written), position=jnp.int32(written % 64))
    drawn = sample(buffer, jax.random.key(7), 20_000)["identity"]
    counts = np.bincount(drawn, minlength=64)
    assert counts[written:].sum() == 0
    assert scipy.stats.chisquare(counts[:written]).pvalue > 0.01
    # Draws are independent of their place in the batch: neighbours are equal as often as chance has it.
    equal = int((drawn[1:] == drawn[:-1]).sum())
    assert scipy.stats.binomtest(equal, drawn.size - 1, 1 / written).pvalue > 0.01


def test_runs_under_vmap_write_and_draw_their_own_rows():
    capacity, runs = 6, 3
    one = replay.create(ROW, capacity, 2)
    buffers = jax.tree.map(lambda x: jnp.stack([x] * runs), one)
    buffers = buffers._replace(position=jnp.array([0, 2, 4]), size=jnp.array([0, 2, 6]))  # runs need not be in step
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *(rows([i, i + 1]) for i in (11, 21, 31)))
    written = jax.jit(jax.vmap(replay.add))(buffers, batches)
    np.testing.assert_array_equal(written.position, [2, 4, 0])
    np.testing.assert_array_equal(written.size, [2, 4, 6])
    np.testing.assert_array_equal(
        written.rows["identity"], [[11, 12, 0, 0, 0, 0], [0, 0, 21, 22, 0, 0], [0, 0, 0, 0, 31, 32]]
    )
    keys = jax.random.split(jax.random.key(0), runs)
    drawn = jax.vmap(replay.sample, in_axes=(0, 0, None))(written, keys, 50)
    assert set(np.unique(drawn["identity"][0])) == {11, 12}
    assert set(np.unique(drawn["identity"][1])) == {0, 21, 22}


@pytest.mark.parametrize("runs", [0, 2])
def test_work_and_memory_do_not_grow_with_the_capacity(runs):
    # What training does: a loop that adds and samples, its buffer donated. A copy would need temporary memory.
    def loop(buffer, key):
        def once(index, carry):
            buffer, total = carry
            buffer = replay.add(buffer, jax.tree.map(lambda x: jnp.ones((4, *x.shape), x.dtype), ROW))
            drawn = replay.sample(buffer, jax.random.fold_in(key, index), 8)
            return buffer, total + drawn["vector"].sum()

        return jax.lax.fori_loop(0, 100, once, (buffer, 0.0))

    def compiled(capacity):
        buffer = jax.eval_shape(lambda: replay.create(ROW, capacity, 4))
        key, function = jax.eval_shape(lambda: jax.random.key(0)), loop
        if runs:
            add_axis = lambda x: jax.ShapeDtypeStruct((runs, *x.shape), x.dtype)  # noqa: E731
            buffer, key, function = jax.tree.map(add_axis, buffer), add_axis(key), jax.vmap(loop)
        return jax.jit(function, donate_argnums=0).lower(buffer, key).compile()

    small, large = compiled(1_000), compiled(100_000)
    for program in (small, large):
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= 0.99 * memory.argument_size_in_bytes  # written in place
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (small, large)]
    assert temporary[1] < temporary[0] + 10_000 < large.memory_analysis().argument_size_in_bytes / 10
    for line in large.as_text().splitlines():
        assert not (" copy(" in line and "100000" in line.split("copy(")[0]), line


def test_capacity_is_rounded_up_to_whole_writes():
    for capacity, rows_per_write, expected in [(10, 1, 10), (10, 4, 12), (12, 4, 12), (5, 5, 5)]:
        buffer = replay.create(ROW, capacity, rows_per_write)
        assert {leaf.shape[0] for leaf in jax.tree.leaves(buffer.rows)} == {expected}
        assert (int(buffer.position), int(buffer.size)) == (0, 0)


def test_rejects_what_cannot_be_stored():
    with pytest.raises(ValueError, match="capacity is 3; it must be at least rows_per_write = 4"):
        replay.create(ROW, 3, 4)
    with pytest.raises(ValueError, match="a batch of 3 rows does not divide the capacity 4"):
        replay.add(replay.create(ROW, 4, 2), rows([1, 2, 3]))

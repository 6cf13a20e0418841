import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.learning import experience, interaction, replay

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


def test_a_ring_of_five_after_seven_rows():
    buffer = replay.create(ROW, 5)
    for identity in range(7):
        buffer = add(buffer, rows([identity]))
    np.testing.assert_array_equal(buffer.rows["identity"], [5, 6, 2, 3, 4])


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_gather_reads_the_slots_it_is_given(batch_size):
    stored = jax.tree.map(jnp.asarray, rows(np.arange(20)))
    indices = np.random.default_rng(0).integers(0, 20, batch_size)
    assert_rows(jax.jit(replay.gather)(stored, indices), indices)


def test_window_indices_hand_worked():
    # Two environments, six slots: the newest rows lie in 0, 1 once the ring is full and has gone around.
    full = replay.create(ROW, 6, 2)._replace(position=jnp.int32(2), size=jnp.int32(6))
    slots, available = replay.window_indices(full, jnp.array([2, 5, 0, 1]), 4, 2)
    assert slots.dtype == jnp.int32
    np.testing.assert_array_equal(slots, [[2, 5, 0, 1], [4, 1, 2, 3], [0, 3, 4, 5], [2, 5, 0, 1]])
    np.testing.assert_array_equal(available.sum(0), [3, 2, 1, 1])
    np.testing.assert_array_equal(available, np.arange(4)[:, None] < [3, 2, 1, 1])
    partly = full._replace(position=jnp.int32(4), size=jnp.int32(4))
    np.testing.assert_array_equal(replay.window_indices(partly, jnp.arange(4), 3, 2)[1].sum(0), [2, 2, 1, 1])


def indexed(values):
    """Priorities of a full ring with these values in its slots."""
    buffer = replay.create(ROW, len(values))._replace(size=jnp.int32(len(values)))
    return set_priorities(replay.equal_priorities(buffer), jnp.arange(len(values)), jnp.float32(values))


set_priorities = jax.jit(replay.set_priorities)
sample_by_priority = jax.jit(replay.sample_by_priority, static_argnums=2)


def assert_tree(priorities, values):
    """The leaves are `values` and zeros, and every sum is that of its children to the last bit."""
    tree = np.asarray(priorities.tree)
    leaves = tree.size // 2
    expected = np.zeros(leaves, np.float32)
    expected[: len(values)] = values
    np.testing.assert_array_equal(tree[leaves:], expected)
    np.testing.assert_array_equal(tree[1:leaves], tree[2::2] + tree[3::2])
    assert tree[0] == 0
    np.testing.assert_allclose(tree[1], expected.sum(dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize(("capacity", "size", "leaves"), [(1, 1, 1), (5, 3, 8), (8, 8, 8), (9, 0, 16)])
def test_equal_priorities_cover_the_written_slots(capacity, size, leaves):
    priorities = replay.equal_priorities(replay.create(ROW, capacity)._replace(size=jnp.int32(size)))
    assert priorities.tree.shape == (2 * leaves,)
    assert_tree(priorities, [1] * size)
    assert float(priorities.largest) == 1
    if size:
        drawn, probabilities = sample_by_priority(priorities, jax.random.key(0), 4 * size)
        np.testing.assert_array_equal(np.bincount(drawn), [4] * size)  # stratified: every slot as often as its share
        np.testing.assert_allclose(probabilities, 1 / size, rtol=1e-6)


RAW = np.array([1.0, 2.0, 4.0, 8.0])
SHARES = np.array([0.138071, 0.195262, 0.276142, 0.390524])


def test_priorities_and_weights_hand_worked(monkeypatch):
    priorities = indexed(RAW**0.5)
    np.testing.assert_allclose(float(priorities.tree[1]), 7.242641, rtol=1e-6)
    np.testing.assert_allclose(float(priorities.largest), 8**0.5, rtol=1e-6)
    drawn, probabilities = sample_by_priority(priorities, jax.random.key(0), 200)
    assert set(np.asarray(drawn)) == {0, 1, 2, 3}
    np.testing.assert_allclose(probabilities, SHARES[drawn], rtol=1e-5)
    weights = replay.importance_weights(jnp.float32(SHARES), 4, 0.4)
    np.testing.assert_allclose(weights, [1, 0.870551, 0.757858, 0.659754], rtol=1e-5)
    np.testing.assert_array_equal(replay.importance_weights(jnp.float32(SHARES), 4, 0.0), np.ones(4))
    # A place on the boundary of two slots belongs to the second one.
    for values, place, slot in [(RAW**0.5, 3 / 7.242641, 2), ([1, 2, 4, 1], 1 / 8, 1), ([1, 2, 4, 1], 3 / 8, 2)]:
        monkeypatch.setattr(jax.random, "uniform", lambda key, shape, place=place: jnp.full(shape, place))
        assert int(replay.sample_by_priority(indexed(values), jax.random.key(0), 1)[0][0]) == slot


@pytest.mark.parametrize("batch_size", [1, 32])
def test_slots_are_drawn_as_often_as_their_priority_says(batch_size):
    keys = jax.random.split(jax.random.key(2), 100_000 // batch_size)
    drawn, _ = jax.vmap(replay.sample_by_priority, in_axes=(None, 0, None))(indexed(RAW**0.5), keys, batch_size)
    counts = np.bincount(np.ravel(drawn), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), SHARES, atol=0.005)


def test_equal_priorities_are_uniform_sampling_with_weights_of_one():
    keys = jax.random.split(jax.random.key(3), 5_000)
    drawn, probabilities = jax.vmap(replay.sample_by_priority, in_axes=(None, 0, None))(indexed(RAW**0), keys, 3)
    for place in range(3):  # one draw of each batch: the strata are thirds, the slots quarters, so not independent
        lowest, highest = int(4 * place / 3), int(np.ceil(4 * (place + 1) / 3)) - 1
        assert set(np.asarray(drawn[:, place])) == set(range(lowest, highest + 1))
    np.testing.assert_allclose(np.bincount(np.ravel(drawn)) / drawn.size, np.full(4, 0.25), atol=0.01)
    np.testing.assert_array_equal(replay.importance_weights(probabilities[0], 4, 0.7), np.ones(3))


# Zero, and sixty orders of magnitude: most sums are then those of their larger part alone.
SIZES = st.one_of(
    st.just(0.0), st.integers(-30, 30).map(lambda exponent: 10.0**exponent), st.floats(0.125, 8, width=32)
)


@settings(deadline=None, max_examples=25)
@given(st.lists(SIZES, min_size=13, max_size=13), st.lists(SIZES, min_size=4, max_size=4), st.integers(0, 9))
def test_only_slots_with_a_priority_are_drawn(values, changed, seed):
    values = np.float32(values)
    slots = np.array([0, 5, 6, 12])
    before = indexed(values)
    assert_tree(before, values)
    priorities = set_priorities(before, slots, np.float32(changed))
    values[slots] = changed
    assert_tree(priorities, values)
    assert float(priorities.largest) == max(1, float(before.largest), *np.float32(changed))
    if not values.any():
        return
    drawn, probabilities = sample_by_priority(priorities, jax.random.key(seed), 500)
    assert np.all(values[drawn] > 0)
    np.testing.assert_allclose(probabilities, values[drawn] / values.sum(dtype=np.float64), rtol=1e-5, atol=1e-30)
    weights = np.asarray(replay.importance_weights(probabilities, 13, 1.0))
    assert np.all(np.isfinite(weights) & (weights >= 0) & (weights <= 1))
    assert weights.max() == 1


@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_rounding_at_the_ends_never_leads_to_a_priority_of_zero(uniform, monkeypatch):
    # A uniform number of exactly 1 stands for a place that rounded up to the whole sum.
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, uniform))
    for values in ([0, 0, 1, 0, 0, 3, 0, 0], [0, 7, 0], [1e30, 0, 1, 0], [0, 1e-30, 0, 1e30, 0, 0], [0, 0.1, 0.3, 0]):
        drawn, _ = replay.sample_by_priority(indexed(values), jax.random.key(0), 6)
        assert np.all(np.float32(values)[drawn] > 0)


def test_the_descent_agrees_with_prefix_sums():
    rng = np.random.default_rng(4)
    values = rng.integers(0, 5, 100)  # whole numbers, so that every sum is exact
    key = jax.random.key(5)
    place = (np.arange(64) + np.asarray(jax.random.uniform(key, (64,)), np.float64)) / 64 * values.sum()
    drawn, probabilities = sample_by_priority(indexed(values), jax.random.clone(key), 64)
    np.testing.assert_array_equal(drawn, np.searchsorted(np.cumsum(values), place, side="right"))
    np.testing.assert_allclose(probabilities, values[drawn] / values.sum(), rtol=1e-6)


def test_equal_slots_in_one_update_are_written_once():
    priorities = set_priorities(indexed([1, 2, 3, 4, 5]), jnp.array([3, 1, 3, 3]), jnp.float32([9, 7, 9, 9]))
    assert_tree(priorities, [1, 7, 3, 9, 5])
    assert float(priorities.largest) == 9


def test_sums_do_not_drift_over_many_updates():
    rng = np.random.default_rng(6)
    slots = rng.integers(0, 50, (3_000, 1))
    values = np.float32(10.0 ** rng.uniform(-6, 6, (3_000, 1)))
    start = indexed(np.ones(50))
    priorities, _ = jax.jit(
        lambda start: jax.lax.scan(lambda p, x: (set_priorities(p, *x), None), start, (slots, values))
    )(start)
    expected = np.ones(50, np.float32)
    for slot, value in zip(slots[:, 0], values[:, 0], strict=True):
        expected[slot] = value
    assert_tree(priorities, expected)
    assert float(priorities.largest) == max(1, values.max())


def test_overwritten_slots_take_the_largest_priority():
    buffer = replay.create(ROW, 6, 2)
    priorities, expected, largest = replay.equal_priorities(buffer), [0.0] * 6, 1.0
    assert_tree(priorities, expected)
    for write in range(8):
        slots = buffer.position + jnp.arange(2)
        buffer = add(buffer, rows([2 * write, 2 * write + 1]))
        priorities = set_priorities(priorities, slots, jnp.full(2, priorities.largest))
        expected[2 * write % 6 : 2 * write % 6 + 2] = [largest] * 2
        assert_tree(priorities, expected)
        # An update then lowers one slot, and every third time raises another above all.
        lowered, raised = 2 * write % 6, (2 * write + 1) % 6
        value = largest + 1 if write % 3 == 0 else largest / 4
        priorities = set_priorities(priorities, jnp.array([lowered, raised]), jnp.float32([0.125, value]))
        expected[lowered], expected[raised], largest = 0.125, value, max(largest, value)
        assert_tree(priorities, expected)
        assert float(priorities.largest) == largest


def test_runs_under_vmap_have_priorities_of_their_own():
    def life(seed_key, scale):
        keys = jax.random.split(seed_key, 4)
        priorities = set_priorities(indexed(np.ones(11)), jnp.arange(11), scale * jnp.arange(11.0))
        drawn = []
        for key in keys:
            indices, probabilities = replay.sample_by_priority(priorities, key, 6)
            priorities = set_priorities(priorities, indices, jnp.sqrt(1.0 + indices) * scale)
            drawn.append((indices, probabilities))
        return priorities, drawn

    keys, scales = jax.random.split(jax.random.key(7), 3), jnp.array([0.5, 1.0, 30.0])
    alone = jax.jit(life)
    together = jax.jit(jax.vmap(life))(jax.random.clone(keys), scales)
    for run in range(3):
        for many, one in zip(jax.tree.leaves(together), jax.tree.leaves(alone(keys[run], scales[run])), strict=True):
            np.testing.assert_allclose(many[run], one, rtol=1e-6)
    assert not np.array_equal(together[1][0][0][0], together[1][0][0][1])


CAPACITY, LEAVES = 100_000, 131_072


@pytest.mark.parametrize("runs", [0, 2])
def test_prioritised_training_copies_neither_rows_nor_tree(runs):
    observation, flag = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((), bool)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    row = interaction.Transition(observation, scalar, scalar, observation, flag, flag)
    live = interaction.Interaction(None, None, jnp.zeros(4), jnp.zeros(4, jnp.int32), jnp.zeros(4))

    def loop(buffer, priorities, key):
        def once(index, carry):
            buffer, priorities, total = carry
            new = buffer.position + jnp.arange(4)
            buffer = replay.add(buffer, jax.tree.map(lambda x: jnp.ones((4, *x.shape), x.dtype), row))
            priorities = replay.set_priorities(priorities, new, jnp.full(4, priorities.largest))
            drawn, probabilities = replay.sample_by_priority(priorities, jax.random.fold_in(key, index), 8)
            batch = experience.batch_at(experience.Experience(buffer, live, None), drawn, num_steps=3, gamma=0.9)
            weights = replay.importance_weights(probabilities, buffer.size, 0.5)
            error = (batch.observation + batch.next_observation).sum(1) + batch.reward + batch.discount
            return buffer, replay.set_priorities(priorities, drawn, error), total + (weights * error).sum()

        return jax.lax.fori_loop(0, 100, once, (buffer, priorities, 0.0))

    def compiled(capacity):
        buffer = jax.eval_shape(lambda: replay.create(row, capacity, 4))
        arguments = buffer, jax.eval_shape(replay.equal_priorities, buffer), jax.eval_shape(lambda: jax.random.key(0))
        if runs:
            arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct((runs, *x.shape), x.dtype), arguments)
        function = jax.vmap(loop) if runs else loop
        return jax.jit(function, donate_argnums=(0, 1)).lower(*arguments).compile()

    small, large = compiled(1_000), compiled(CAPACITY)
    memory = large.memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes < small.memory_analysis().temp_size_in_bytes + 10_000
    program = large.as_text()
    for size in (CAPACITY, 2 * LEAVES):
        assert str(size) in program
        lines = [line for line in program.splitlines() if " copy(" in line and str(size) in line.split("copy(")[0]]
        assert not lines, lines

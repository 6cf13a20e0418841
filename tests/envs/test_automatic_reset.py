"""`reset_where` against the plain select it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.envs.automatic_reset import LANES_PER_TURN, reset_where


def reset(key, params):
    """A random start of two parts, one of them an integer, that depends on the parameters."""
    draw = jax.random.uniform(key, (3,))
    return draw + params, {"position": draw * 2, "time": jnp.zeros((), jnp.int32)}


def lanes(shape, seed=0):
    count = int(np.prod(shape))
    observation = -jnp.arange(3 * count, dtype=jnp.float32).reshape(*shape, 3) - 1
    state = {"position": observation * 3, "time": jnp.arange(count, dtype=jnp.int32).reshape(shape) + 1}
    return jax.random.split(jax.random.key(seed), shape), observation, state


def reference(ended, keys, params, observation, state):
    """One lane after another, in Python."""
    observation, state = jax.tree.map(np.array, (observation, state))
    for index in np.ndindex(ended.shape):
        if ended[index]:
            fresh_observation, fresh_state = reset(jax.random.clone(keys[index]), params)
            observation[index] = fresh_observation
            for name in state:
                state[name][index] = fresh_state[name]
    return observation, state


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


batched = jax.jit(jax.vmap(lambda *a: reset_where(reset, *a), in_axes=(0, 0, None, 0, 0)))
nested = jax.jit(
    jax.vmap(jax.vmap(lambda *a: reset_where(reset, *a), in_axes=(0, 0, None, 0, 0)), in_axes=(0, 0, None, 0, 0))
)
MANY = 2 * LANES_PER_TURN + 5  # three turns when all end


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=MANY, max_size=MANY))
def test_equals_a_select_lane_by_lane(ended):
    ended = np.array(ended)
    arguments = lanes((MANY,))
    expected = reference(ended, arguments[0], 10.0, *arguments[1:])
    assert_same(batched(ended, arguments[0], 10.0, *arguments[1:]), expected)


@pytest.mark.parametrize("ended", [False, True])
def test_one_environment_alone(ended):
    key, observation, state = jax.tree.map(lambda leaf: leaf[0], lanes((1,)))
    expected_observation, expected_state = reset(jax.random.clone(key), 1.0) if ended else (observation, state)
    got_observation, got_state = jax.jit(lambda *a: reset_where(reset, *a))(
        jnp.array(ended), key, 1.0, observation, state
    )
    assert_same((got_observation, got_state), (expected_observation, expected_state))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_runs_by_environments(share):
    ended = np.random.default_rng(0).random((3, MANY)) < share
    ended[0] = False  # a run in which nobody ends waits for the others
    arguments = lanes((3, MANY))
    expected = reference(ended, arguments[0], 2.0, *arguments[1:])
    assert_same(nested(ended, arguments[0], 2.0, *arguments[1:]), expected)


def test_parameters_may_differ_by_lane():
    params = jnp.arange(4.0)
    ended = np.array([True, False, True, True])
    keys, observation, state = lanes((4,))
    got = jax.vmap(lambda *a: reset_where(reset, *a))(ended, keys, params, observation, state)
    for i in range(4):
        expected = reset(jax.random.clone(keys[i]), params[i])[0] if ended[i] else observation[i]
        np.testing.assert_array_equal(got[0][i], expected)


def test_runs_sharded_over_devices():
    """`shard_map` types every array by the mesh axes it varies over, and refuses loops whose carry changes type."""
    mesh = jax.make_mesh((1,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    over_runs = jax.sharding.PartitionSpec("runs")
    sharded = jax.jit(
        jax.shard_map(
            lambda ended, keys, observation, state: nested(
                ended,
                keys,
                2.0,
                observation,
                state | {"time": jnp.ones((3, 5), jnp.int32)},  # the same on every device, as a step count begins
            ),
            mesh=mesh,
            in_specs=over_runs,
            out_specs=over_runs,
        )
    )
    ended = np.random.default_rng(0).random((3, 5)) < 0.5
    keys, observation, state = lanes((3, 5))
    state["time"] = jnp.ones((3, 5), jnp.int32)
    expected = reference(ended, keys, 2.0, observation, state)
    assert_same(sharded(ended, keys, observation, state), expected)


def test_nothing_is_computed_where_nobody_ended():
    computed = []

    def counting_reset(key, params):
        jax.debug.callback(lambda: computed.append(1))
        return reset(key, params)

    run = jax.jit(jax.vmap(lambda *a: reset_where(counting_reset, *a), in_axes=(0, 0, None, 0, 0)))
    for share, expected in ((0, False), (1, True)):
        keys, observation, state = lanes((8,))
        ended = np.arange(8) < share
        jax.block_until_ready(run(ended, keys, 1.0, observation, state))
        jax.effects_barrier()
        assert bool(computed) is expected

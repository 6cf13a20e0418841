import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams

from jaxrl_dist import experience, interaction, normalization

ENV, PARAMS = Toy(), ToyParams()


@functools.partial(jax.jit, static_argnames=("num_envs", "steps", "capacity", "normalize_observations"))
def warm_up(key, **sizes):
    return experience.warm_up(ENV, PARAMS, key, **sizes)


@pytest.fixture(scope="module")
def filled():
    return warm_up(jax.random.key(0), num_envs=4, steps=40, capacity=50, normalize_observations=True)


def test_warm_up_fills_exactly_its_steps(filled):
    rows, size = filled.replay.rows, int(filled.replay.size)
    assert size == int(filled.replay.position) == 40
    assert rows.reward.shape == (52,)  # the capacity, rounded up to whole writes of 4
    for leaf in jax.tree.leaves(rows):
        assert np.all(np.asarray(leaf[40:]) == 0)
    assert np.all(rows.observation[:40, 2] > 0)  # a length: no row was left out
    # Row after row the environments go on: what follows in the same environment is the successor, or a fresh start.
    successor, following = (np.asarray(rows.next_observation[:36]), np.asarray(rows.observation[4:40]))
    done = np.asarray(rows.terminated[:36] | rows.truncated[:36])
    np.testing.assert_array_equal(following[~done], successor[~done])
    assert np.all(following[done][:, 1] == 0)
    done = np.asarray(rows.terminated[36:40])[:, None]
    np.testing.assert_array_equal(
        np.where(done, 0, filled.interaction.observation), np.where(done, 0, rows.next_observation[36:40])
    )


def test_warm_up_actions_are_uniform_and_all_different(filled):
    actions = np.asarray(filled.replay.rows.action[:40])
    assert len(np.unique(actions)) == 80
    assert actions.min() < -0.8
    assert actions.max() > 0.8
    assert abs(actions.mean()) < 0.2


def test_a_warm_up_longer_than_the_capacity_keeps_the_newest():
    sizes = {"num_envs": 4, "normalize_observations": False}
    long = warm_up(jax.random.key(0), steps=40, capacity=16, **sizes)
    assert (int(long.replay.size), int(long.replay.position)) == (16, 40 % 16)
    assert long.normalizer is None


def test_statistics_are_those_of_the_stored_observations(filled):
    seen = np.asarray(filled.replay.rows.observation[:40], np.float64)
    assert float(filled.normalizer.count) == 40
    np.testing.assert_allclose(filled.normalizer.mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(filled.normalizer.variance, seen.var(0), rtol=1e-4)


def test_sample_normalises_both_observations_and_nothing_else(filled):
    key = jax.random.key(3)
    sample = jax.jit(experience.sample, static_argnums=2)
    batch = sample(filled, key, 30)
    raw = sample(filled._replace(normalizer=None), jax.random.clone(key), 30)
    for name in ("observation", "next_observation"):
        expected = normalization.normalize(filled.normalizer, getattr(raw, name))
        np.testing.assert_allclose(getattr(batch, name), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(getattr(batch, name) - getattr(raw, name)).min() > 0
    for name in ("action", "reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(raw, name))
    # Rows are stored raw: lengths are whole numbers, as the environment gave them.
    np.testing.assert_array_equal(raw.observation[:, 2], np.round(raw.observation[:, 2]))


def test_collect_stores_one_row_per_environment(filled):
    action = jnp.full((4, 2), 0.25)
    after, transition, metrics = jax.jit(functools.partial(experience.collect, ENV, PARAMS))(
        filled, action, jax.random.key(5)
    )
    np.testing.assert_array_equal(transition.observation, filled.interaction.observation)
    np.testing.assert_array_equal(transition.action, action)
    assert int(after.replay.size) == 44
    for stored, new in zip(jax.tree.leaves(after.replay.rows), jax.tree.leaves(transition), strict=True):
        np.testing.assert_array_equal(stored[40:44], new)
    done = transition.terminated | transition.truncated
    assert float(metrics["episode_length"].count) == done.sum()
    assert float(after.normalizer.count) == 44


def test_two_keys_live_two_lives(filled):
    other = warm_up(jax.random.key(1), num_envs=4, steps=40, capacity=50, normalize_observations=True)
    assert not np.any(np.asarray(other.replay.rows.action[:40]) == np.asarray(filled.replay.rows.action[:40]))
    assert not np.any(np.asarray(other.interaction.observation[:, 0] == filled.interaction.observation[:, 0]))
    assert interaction.transition_like(ENV, PARAMS).reward.dtype == filled.replay.rows.reward.dtype

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams

from jaxrl_dist.learning import experience, interaction, normalization, replay
from jaxrl_dist.learning.settings import Settings

ENV, PARAMS = Toy(), ToyParams()


@functools.partial(jax.jit, static_argnames=("num_envs", "steps", "capacity", "normalize_observations"))
def warm_up(key, *, num_envs, steps, capacity, normalize_observations):
    sizes = Settings(num_envs=num_envs, warmup_steps=steps, replay_capacity=capacity)
    return experience.warm_up(ENV, PARAMS, key, sizes, normalize=normalize_observations)


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
    batch = sample(filled, key, 30, 0.97)
    raw = sample(filled._replace(normalizer=None), jax.random.clone(key), 30, 0.97)
    for name in ("observation", "next_observation"):
        expected = normalization.normalize(filled.normalizer, getattr(raw, name))
        np.testing.assert_allclose(getattr(batch, name), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(getattr(batch, name) - getattr(raw, name)).min() > 0
    for name in ("action", "reward", "discount"):
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


NUM_ENVS = 3


def recorded(writes, capacity, seed=0):
    """An experience of made-up transitions, and the same as plain lists: one of steps for each environment."""
    rng = np.random.default_rng(seed)
    row = interaction.Transition(*(jnp.zeros(shape, dtype) for shape, dtype in [
        ((2,), jnp.float32), ((), jnp.int32), ((), jnp.float32), ((2,), jnp.float32), ((), bool), ((), bool)
    ]))  # fmt: skip
    ring, lists = replay.create(row, capacity, NUM_ENVS), [[] for _ in range(NUM_ENVS)]
    for time in range(writes):
        for env in range(NUM_ENVS):
            # The successor is not the next row's observation, so that taking one for the other shows.
            step = interaction.Transition(
                np.float32([env, time]),
                np.int32(100 * env + time),
                np.float32(rng.normal()),
                np.float32([env, time + 0.5]),
                rng.uniform() < 0.2,
                rng.uniform() < 0.2,
            )
            lists[env].append(step)
        ring = ADD(ring, jax.tree.map(lambda *leaves: np.stack(leaves), *(steps[-1] for steps in lists)))
    live = interaction.Interaction(None, None, jnp.zeros(NUM_ENVS), jnp.zeros(NUM_ENVS, jnp.int32), jnp.zeros(NUM_ENVS))
    return experience.Experience(ring, live, None), lists


ADD = jax.jit(replay.add)
BATCH_AT = jax.jit(experience.batch_at, static_argnames="num_steps")
SAMPLE_N_STEP = jax.jit(experience.sample_n_step, static_argnums=2, static_argnames="num_steps")


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_every_window_agrees_with_lists_of_steps(num_steps):
    capacity, gamma, seen = 15, 0.9, set()
    for writes in range(1, 14):
        filled, lists = recorded(writes, capacity, seed=writes)
        size = int(filled.replay.size)
        # Always as many starts, so that jit compiles once: slots that were not written yet are left out below.
        batch = BATCH_AT(filled, jnp.arange(capacity), num_steps=num_steps, gamma=gamma)
        assert size == min(NUM_ENVS * writes, capacity)
        for slot in range(size):
            env, time = slot % NUM_ENVS, slot // NUM_ENVS
            while time + capacity // NUM_ENVS < writes:
                time += capacity // NUM_ENVS  # the newest step that was written into this slot
            window = []
            for step in lists[env][time:][:num_steps]:
                window.append(step)
                if step.terminated or step.truncated:
                    break
            last = window[-1]
            reward = sum(gamma**k * step.reward for k, step in enumerate(window))
            discount = gamma ** len(window) * (not last.terminated)
            np.testing.assert_array_equal(batch.observation[slot], lists[env][time].observation)
            np.testing.assert_array_equal(batch.action[slot], lists[env][time].action)
            np.testing.assert_array_equal(batch.next_observation[slot], last.next_observation)
            np.testing.assert_allclose(batch.reward[slot], reward, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(batch.discount[slot], discount, rtol=1e-6)
            end = (bool(last.terminated), bool(last.truncated))
            wrapped = (time + len(window) - 1) % (capacity // NUM_ENVS) < time % (capacity // NUM_ENVS)
            seen.add((end, len(window), wrapped))
    # The cases that matter did come up: every kind of end, every length, and windows around the end of the ring.
    assert {end for end, _, _ in seen} == {(False, False), (True, False), (False, True), (True, True)}
    assert {length for _, length, _ in seen} >= set(range(1, min(num_steps, 4) + 1))
    assert any(wrapped for _, _, wrapped in seen) == (num_steps > 1)


def test_windows_do_not_cross_the_boundary_of_an_episode():
    # One environment: an episode of two steps with rewards 1, 2, then another with 10, 20, 30; gamma 1, 3 steps.
    zeros = np.zeros((5, 1), np.float32)
    times = np.arange(5, dtype=np.float32)[:, None]
    for truncated in (False, True):
        done = np.arange(5) == 1
        rows = interaction.Transition(
            times, zeros, np.float32([1, 2, 10, 20, 30]), times + 0.5, done & (not truncated), done & truncated
        )
        ring = replay.Replay(jax.tree.map(jnp.asarray, rows), jnp.int32(0), jnp.int32(5))
        live = interaction.Interaction(None, None, jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1))
        batch = BATCH_AT(experience.Experience(ring, live, None), jnp.arange(5), num_steps=3, gamma=1.0)
        np.testing.assert_array_equal(batch.reward, [3, 2, 60, 50, 30])
        np.testing.assert_array_equal(batch.discount, [truncated, truncated, 1, 1, 1])
        np.testing.assert_array_equal(batch.next_observation[:, 0], [1.5, 1.5, 4.5, 4.5, 4.5])
        # Rewards are cut one by one, on either side.
        for sign in (1, -1):
            signed = ring._replace(rows=ring.rows._replace(reward=sign * ring.rows.reward))
            cut = BATCH_AT(
                experience.Experience(signed, live, None), jnp.arange(5), num_steps=3, gamma=1.0, reward_clip=1.5
            )
            np.testing.assert_array_equal(cut.reward, sign * np.array([2.5, 1.5, 4.5, 3, 1.5]))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_time_limit_does_not_change_the_value_of_an_endless_reward(num_steps):
    # One state, reward 1, gamma 0.9, cut every 10 steps: worth 10. With the cut as an end it could reach 6.51 at most.
    filled, _ = recorded(20, 60)
    rows = filled.replay.rows._replace(
        reward=jnp.ones(60), terminated=jnp.zeros(60, bool), truncated=jnp.arange(60) // NUM_ENVS % 10 == 9
    )
    batch = BATCH_AT(
        filled._replace(replay=filled.replay._replace(rows=rows)), jnp.arange(60), num_steps=num_steps, gamma=0.9
    )
    value = 0.0
    for _ in range(200):
        value = np.mean(np.asarray(batch.reward) + np.asarray(batch.discount) * value)
    np.testing.assert_allclose(value, 10, rtol=1e-4)
    np.testing.assert_allclose(batch.reward + batch.discount * 10, np.full(60, 10), rtol=1e-5)


def test_one_step_is_what_sample_draws(filled):
    for batch_size in (90, 7):
        key = jax.random.key(8)
        expected = jax.jit(experience.sample, static_argnums=2)(filled, key, batch_size, 0.97)
        actual = SAMPLE_N_STEP(filled, jax.random.clone(key), batch_size, num_steps=1, gamma=0.97)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
        assert batch_size == 7 or set(np.unique(actual.discount).tolist()) == {0, np.float32(0.97)}


def test_n_step_batches_of_a_real_run_are_normalised_and_span_their_steps(filled):
    key = jax.random.key(9)
    raw = SAMPLE_N_STEP(filled._replace(normalizer=None), key, 64, num_steps=3, gamma=0.9)
    batch = SAMPLE_N_STEP(filled, jax.random.clone(key), 64, num_steps=3, gamma=0.9)
    for name in ("observation", "next_observation"):
        expected = normalization.normalize(filled.normalizer, getattr(raw, name))
        np.testing.assert_allclose(getattr(batch, name), expected, rtol=1e-5, atol=1e-6)
    (label, time, length), (later_label, later_time, _) = raw.observation.T, raw.next_observation.T
    np.testing.assert_array_equal(label, later_label)  # the same episode
    steps = np.asarray(later_time - time)
    assert set(steps) == {1, 2, 3}
    np.testing.assert_allclose(batch.discount, np.where(later_time == length, 0, 0.9**steps), rtol=1e-6)


def test_extras_are_summed_like_rewards(filled):
    reward = filled.replay.rows.reward
    rows = filled.replay.rows._replace(extras={"cost": reward, "rewards": jnp.stack([reward, -2 * reward], axis=-1)})
    with_extras = filled._replace(replay=filled.replay._replace(rows=rows))
    found = BATCH_AT(with_extras, jnp.arange(20), num_steps=3, gamma=0.9)
    np.testing.assert_allclose(found.extras["cost"], found.reward, rtol=1e-6)
    np.testing.assert_allclose(found.extras["rewards"], jnp.stack([found.reward, -2 * found.reward], -1), rtol=1e-6)
    assert BATCH_AT(filled, jnp.arange(20), num_steps=3, gamma=0.9).extras == ()


def test_rejects_windows_without_a_step(filled):
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        experience.batch_at(filled, jnp.arange(3), num_steps=0, gamma=0.9)

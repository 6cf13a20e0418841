"""The buffer of levels: the sheet's numbers, and a list in Python that does the same one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import levels, returns

BETA, RHO = 0.3, 0.3
NONE = -np.inf


def buffer_of(score, last_seen, time, capacity, largest=None):
    pad = capacity - len(score)
    score, last_seen = (np.pad(np.asarray(x), (0, pad)) for x in (score, last_seen))
    largest = np.zeros(capacity) if largest is None else np.pad(np.asarray(largest, float), (0, pad))
    return levels.Levels(
        jnp.arange(capacity), jnp.asarray(score, jnp.float32), jnp.asarray(largest, jnp.float32),
        jnp.asarray(last_seen, jnp.int32), jnp.int32(capacity - pad), jnp.int32(time),
    )  # fmt: skip


# -- weights ----------------------------------------------------------------------------------------------------------


def test_weights_by_rank_and_by_age():
    known = buffer_of([0.5, 0.1, 0.9, 0.3], [10, 4, 18, 12], 20, 5)
    for staleness, expected in (
        (0.0, [0.08743, 0.00867, 0.88126, 0.02263, 0]), (1.0, [0.27778, 0.44444, 0.05556, 0.22222, 0]),
        (0.3, [0.14454, 0.13941, 0.63355, 0.08251, 0]),
    ):  # fmt: skip
        np.testing.assert_allclose(levels.weights(known, BETA, staleness), expected, atol=6e-6)


def test_negative_scores_rank_above_empty_places_and_equal_ones_by_age_of_place():
    known = buffer_of([-0.5, -0.5, -0.1], [1, 1, 1], 2, 5)
    np.testing.assert_allclose(levels.weights(known, 1.0, 0.0), [3 / 11, 2 / 11, 6 / 11, 0, 0], rtol=1e-5)


def test_where_all_were_seen_just_now_scores_stand_alone():
    known = buffer_of([1.0, 0.0], [7, 7], 7, 2)
    np.testing.assert_allclose(levels.weights(known, 1.0, 1.0), [2 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_array_equal(levels.weights(buffer_of([], [], 0, 3), BETA, RHO), np.zeros(3))


def test_levels_are_drawn_by_weight_and_never_twice():
    """Two of three: the first by its weight, the second by the weights of what is left."""
    weight = jnp.array([0.5, 0.3, 0.2, 0.0])
    drawn = np.asarray(
        jax.jit(jax.vmap(lambda key: levels.draw(key, weight, 2)))(jax.random.split(jax.random.key(0), 20_000))
    )
    for first in range(3):
        for second in range(3):
            share = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
            p = 0 if first == second else float(weight[first] * weight[second] / (1 - weight[first]))
            assert share == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / 20_000) + 1e-9)
    assert set(np.asarray(levels.draw(jax.random.key(0), weight, 4))) == {0, 1, 2, 3}
    assert levels.draw(jax.random.key(0), weight, 4)[-1] == 3


# -- what is kept -----------------------------------------------------------------------------------------------------


class Slow:
    """The same with a list of dicts, one level after the other."""

    def __init__(self, capacity):
        self.capacity, self.rows, self.time = capacity, [], 0

    def weights(self):
        order = sorted(range(len(self.rows)), key=lambda i: (-self.rows[i]["score"], i))
        by_score = np.zeros(len(self.rows))
        for rank, i in enumerate(order, 1):
            by_score[i] = (1 / rank) ** (1 / BETA)
        age = np.array([self.time - row["last_seen"] for row in self.rows], float)
        by_score /= by_score.sum()
        return (1 - RHO) * by_score + RHO * (age / age.sum() if age.sum() else by_score)

    def insert(self, found):
        self.time += 1
        for level, score, largest in found:
            if not np.isfinite(score):
                continue
            row = {"level": level, "score": score, "largest": largest, "last_seen": self.time}
            twins = [i for i, old in enumerate(self.rows) if old["level"] == level]
            if twins:
                row["largest"] = max(largest, self.rows[twins[0]]["largest"])
                self.rows[twins[0]] = row
            elif len(self.rows) < self.capacity:
                self.rows.append(row)
            elif score > self.rows[place := int(np.argmin(self.weights()))]["score"]:
                self.rows[place] = row

    def update(self, places, found):
        self.time += 1
        for place, (score, largest) in zip(places, found, strict=True):
            row = self.rows[place]
            row["score"] = score if np.isfinite(score) else row["score"]
            row["largest"], row["last_seen"] = max(row["largest"], largest), self.time


def test_it_keeps_what_a_list_keeps():
    random = np.random.default_rng(0)
    insert, update = jax.jit(levels.insert), jax.jit(levels.update)
    known, slow = levels.create({"a": jnp.int32(0), "b": jnp.zeros(2)}, 6), Slow(6)
    replaced = 0
    for turn in range(60):
        score = np.where(random.random(3) < 0.2, NONE, random.normal(size=3)).astype(np.float32)
        largest = np.where(np.isfinite(score), random.normal(size=3), NONE).astype(np.float32)
        if turn % 3 == 2 and len(slow.rows) >= 3:
            places = random.permutation(len(slow.rows))[:3]
            known = update(known, jnp.asarray(places), jnp.asarray(score), jnp.asarray(largest))
            slow.update(places, zip(score, largest, strict=True))
        else:
            a = random.integers(0, 5 + turn, 3)
            level = {"a": jnp.asarray(a, jnp.int32), "b": jnp.stack([jnp.asarray(a, jnp.float32)] * 2, 1)}
            before = {row["level"] for row in slow.rows}
            known = insert(known, level, jnp.asarray(score), jnp.asarray(largest), BETA, RHO)
            slow.insert(zip(a.tolist(), score, largest, strict=True))
            replaced += len(before - {row["level"] for row in slow.rows})
        size = len(slow.rows)
        assert (known.size, known.time) == (size, slow.time)
        np.testing.assert_array_equal(known.level["a"][:size], [row["level"] for row in slow.rows])
        np.testing.assert_array_equal(known.level["b"][:size, 1], [row["level"] for row in slow.rows])
        for name, of_slow in (("score", "score"), ("largest_return", "largest"), ("last_seen", "last_seen")):
            np.testing.assert_array_equal(getattr(known, name)[:size], [row[of_slow] for row in slow.rows])
        if size:
            np.testing.assert_allclose(levels.weights(known, BETA, RHO)[:size], slow.weights(), rtol=1e-4)
        # A state with infinities counts as diverged.
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(known))
    assert known.size == 6
    assert replaced > 3
    np.testing.assert_array_equal(levels.take(known, jnp.array([4, 1]))["a"], known.level["a"][jnp.array([4, 1])])


# -- scores -----------------------------------------------------------------------------------------------------------

DONE = jnp.array([0, 0, 1, 0, 0, 1], bool)[:, None]
REWARD = jnp.array([0, 0, 0.8, 0, 0, 0.5])[:, None]
VALUE = jnp.array([0.4, 0.5, 0.7, 0.3, 0.6, 0.4])[:, None]


def test_scores_of_two_episodes():
    following = jnp.concatenate([VALUE[1:], jnp.zeros((1, 1))])
    advantage = returns.gae(REWARD, VALUE, following, DONE, jnp.zeros_like(DONE), 0.995, 0.98)
    np.testing.assert_allclose(advantage[:, 0], [0.3842, 0.2940, 0.1, 0.1951, -0.1045, 0.1], atol=6e-5)
    best = levels.largest_return(REWARD, DONE)
    assert best[0] == pytest.approx(0.8)
    assert levels.maximum_monte_carlo(VALUE, best, DONE)[0] == pytest.approx(0.316667, abs=1e-6)
    assert levels.positive_value_loss(advantage, DONE)[0] == pytest.approx(0.178885, abs=1e-6)


def test_only_completed_episodes_count():
    """Three rollouts: a second episode that does not end, one that never ends, and ends at every step."""
    done = jnp.array([[0, 0, 1], [1, 0, 1], [0, 0, 1]], bool)
    reward = jnp.array([[1.0, 9, -3], [2, 9, -1], [100, 9, -2]])
    value = jnp.array([[1.0, 0, 1], [2, 0, 2], [-50, 0, 6]])
    best = levels.largest_return(reward, done)
    np.testing.assert_array_equal(best, [3, NONE, -1])
    np.testing.assert_array_equal(levels.maximum_monte_carlo(value, best, done), [1.5, NONE, -4])
    np.testing.assert_array_equal(levels.positive_value_loss(value, done), [1.5, NONE, 3])
    mean, count = levels.episodes_completed(value, done)
    np.testing.assert_array_equal(mean, [1.5, 0, 3])
    np.testing.assert_array_equal(count, [1, 0, 3])


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        levels.episodes_completed(VALUE, DONE[:, 0])
    with pytest.raises(AssertionError):
        levels.update(buffer_of([1.0], [0], 1, 2), jnp.array([0]), jnp.float32(1), jnp.zeros(1))

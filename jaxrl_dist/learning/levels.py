"""A buffer of levels, ranked by how much there is to learn from them: prioritised level replay.

"Prioritized Level Replay", Jiang, Grefenstette, Rocktäschel, arXiv 2010.03934; the scores of regret are those of
"Replay-Guided Adversarial Environment Design", Jiang et al., arXiv 2110.02439. A level is any pytree, such as an
environment's parameters.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class Levels(NamedTuple):
    """Levels with what is known of them, leaves `[capacity, ...]`; the first `size` places are taken.

    time counts what was done with the buffer; last_seen: when each was last played. largest_return: of all episodes in
    it that were completed.
    """

    level: Any
    score: jax.Array
    largest_return: jax.Array
    last_seen: jax.Array
    size: jax.Array
    time: jax.Array


def create(like: Any, capacity: int) -> Levels:
    """A buffer of nothing; `like`: a level."""
    empty = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), like)
    # Finite where there is no level: a state that has infinities counts as diverged.
    zeros = jnp.zeros(capacity)
    return Levels(empty, zeros, zeros, jnp.zeros(capacity, jnp.int32), jnp.int32(0), jnp.int32(0))


def weights(levels: Levels, temperature: float | jax.Array, staleness: float | jax.Array) -> jax.Array:
    """Probabilities `[capacity]` of the levels (PLR, section 3), 0 where there is none.

    (1 - staleness) P_S + staleness P_C, P_S ~ (1 / rank of the score)^(1 / temperature), P_C ~ the time since a level
    was last seen. Of equal scores the earlier level ranks higher; where all were seen just now P_S stands alone.
    """
    there = jnp.arange(levels.score.shape[0]) < levels.size
    order = jnp.argsort(jnp.where(there, -levels.score, jnp.inf))
    rank = jnp.zeros_like(levels.last_seen).at[order].set(jnp.arange(len(order), dtype=jnp.int32)) + 1
    by_score = _share(jnp.where(there, (1.0 / rank) ** (1 / temperature), 0))
    age = jnp.where(there, levels.time - levels.last_seen, 0)
    by_age = jnp.where(age.sum() > 0, _share(age), by_score)
    return (1 - staleness) * by_score + staleness * by_age


def _share(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(x.sum(), jnp.finfo(jnp.float32).tiny)


def draw(key: jax.Array, probability: jax.Array, count: int) -> jax.Array:
    """Numbers of `count` different levels, `[count]`, one after the other by their `weights` of what is left.

    By the largest perturbed logarithms (Gumbel top-k). Levels of weight 0 come last.
    """
    noise = jax.random.gumbel(key, probability.shape)
    return jax.lax.top_k(jnp.log(probability) + noise, count)[1].astype(jnp.int32)


def take(levels: Levels, places: jax.Array) -> Any:
    """The levels at these places, leaves `[places, ...]`."""
    return jax.tree.map(lambda x: x[places], levels.level)


def update(levels: Levels, places: jax.Array, score: jax.Array, largest_return: jax.Array) -> Levels:
    """Levels that were played again, `[places]` each: they are seen now, and have the new scores.

    Where no episode was completed (a score of -inf) the old score stays.
    """
    chex.assert_equal_shape([places, score, largest_return])
    known = jnp.where(jnp.isfinite(score), score, levels.score[places])
    best = jnp.maximum(levels.largest_return[places], largest_return)
    return levels._replace(
        score=levels.score.at[places].set(known), largest_return=levels.largest_return.at[places].set(best),
        last_seen=levels.last_seen.at[places].set(levels.time + 1), time=levels.time + 1,
    )  # fmt: skip


def insert(
    levels: Levels,
    level: Any,
    score: jax.Array,
    largest_return: jax.Array,
    temperature: float | jax.Array,
    staleness: float | jax.Array,
) -> Levels:
    """New levels, leaves `[new, ...]`, one after the other; those without a completed episode (-inf) are left out.

    One takes the next free place; of a full buffer that of the level with the least weight, if its own score is above
    that one's. One that is there already is updated where it is.
    """
    capacity = levels.score.shape[0]
    levels = levels._replace(time=levels.time + 1)

    def one(levels: Levels, new: tuple[Any, jax.Array, jax.Array]) -> tuple[Levels, None]:
        level, score, largest_return = new
        pairs = zip(jax.tree.leaves(levels.level), jax.tree.leaves(level), strict=True)
        same = jnp.stack([(kept == x).reshape(capacity, -1).all(1) for kept, x in pairs]).all(0)
        same &= jnp.arange(capacity) < levels.size
        full, twin = levels.size == capacity, same.any()
        place = jnp.where(full, weights(levels, temperature, staleness).argmin(), levels.size)
        place = jnp.where(twin, same.argmax(), place)
        wanted = jnp.isfinite(score) & (twin | ~full | (score > levels.score[place]))
        before = jnp.where(twin, levels.largest_return[place], -jnp.inf)
        values = level, score, jnp.maximum(before, largest_return), levels.time
        kept = (levels.level, levels.score, levels.largest_return, levels.last_seen)
        kept = jax.tree.map(lambda x, value: x.at[place].set(jnp.where(wanted, value, x[place])), kept, values)
        return Levels(*kept, levels.size + (wanted & ~twin & ~full), levels.time), None

    return jax.lax.scan(one, levels, (level, score, largest_return))[0]


# -- scores -----------------------------------------------------------------------------------------------------------


def episodes_completed(values: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of rollouts `[steps, levels]` of which each begins with an episode: the mean over completed episodes of the mean
    of `values` over their steps, and how many these are, `[levels]` each; 0 where there is none."""
    chex.assert_equal_shape([values, done])
    nothing = jnp.zeros(values.shape[1:])

    def one(carry, step):
        (total, length, means, count), (value, done) = carry, step
        total, length = total + value, length + 1
        means, count = means + jnp.where(done, total / length, 0), count + done
        return (jnp.where(done, 0, total), jnp.where(done, 0, length), means, count), None

    _, _, means, count = jax.lax.scan(one, (nothing,) * 4, (values, done))[0]
    return means / jnp.maximum(count, 1), count


def largest_return(reward: jax.Array, done: jax.Array) -> jax.Array:
    """The largest return of the completed episodes in rollouts `[steps, levels]`, -inf where there is none."""

    def one(carry, step):
        (sum, best), (reward, done) = carry, step
        sum = sum + reward
        return (jnp.where(done, 0, sum), jnp.where(done, jnp.maximum(best, sum), best)), None

    start = jnp.zeros(reward.shape[1:]), jnp.full(reward.shape[1:], -jnp.inf)
    return jax.lax.scan(one, start, (reward, done))[0][1]


def positive_value_loss(advantage: jax.Array, done: jax.Array) -> jax.Array:
    """Mean positive advantage, `[steps, levels]` -> `[levels]`: regret, if values are those of the best policy."""
    mean, count = episodes_completed(jnp.maximum(advantage, 0), done)
    return jnp.where(count > 0, mean, -jnp.inf)


def maximum_monte_carlo(value: jax.Array, largest_return: jax.Array, done: jax.Array) -> jax.Array:
    """Mean of how far values `[steps, levels]` are below the largest return `[levels]` that was ever seen."""
    best = jnp.where(jnp.isfinite(largest_return), largest_return, 0)
    mean, count = episodes_completed(best - value, done)
    return jnp.where(count > 0, mean, -jnp.inf)

"""Running statistics of observations and rewards: part of the training state, saved with it, frozen in evaluation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Beyond this many observations the statistics become an exponential average of this length: adding one to a float32
# count stops having an effect at 2^24, long after which the mean would be frozen silently.
MAX_COUNT = 1e7


class RunningStatistics(NamedTuple):
    """Count (float32 scalar), mean and mean squared deviation (`[observations]`) of the observations seen."""

    count: jax.Array
    mean: jax.Array
    variance: jax.Array


def create(observation_shape: tuple[int, ...]) -> RunningStatistics:
    """Statistics of nothing: mean 0, variance 1, so that `normalize` is the identity."""
    return RunningStatistics(jnp.float32(0), jnp.zeros(observation_shape), jnp.ones(observation_shape))


def of(observations: jax.Array) -> RunningStatistics:
    """Statistics of `[rows, *observation]`, such as those of a dataset."""
    return update(create(observations.shape[1:]), observations)


def update(statistics: RunningStatistics, batch: jax.Array) -> RunningStatistics:
    """Merge a batch `[batch, *observation]` by the parallel algorithm of Chan, Golub & LeVeque (1979)."""
    count = jnp.float32(batch.shape[0])
    total = statistics.count + count
    delta = batch.mean(0) - statistics.mean
    mean = statistics.mean + delta * count / total
    spread = statistics.variance * statistics.count + batch.var(0) * count
    variance = (spread + delta**2 * statistics.count * count / total) / total
    return RunningStatistics(jnp.minimum(total, MAX_COUNT), mean, variance)


def normalize(statistics: RunningStatistics | None, observation: jax.Array, bound: float = 10) -> jax.Array:
    """(observation - mean) / standard deviation, clipped to ±bound; without statistics (`None`) the observation itself.

    Any leading axes.
    """
    if statistics is None:
        return observation
    # Codes that add nothing to the variance divide 0 by 0 where an observation never changed.
    deviation = jnp.sqrt(statistics.variance + 1e-8)
    return jnp.clip((observation - statistics.mean) / deviation, -bound, bound)


class RewardScale(NamedTuple):
    """What rewards are divided by: the deviation of their discounted sums, which go on in each environment.

    sums: `[num_envs]`, of the episodes that go on; statistics: of all sums, at every step of every environment.
    """

    sums: jax.Array
    statistics: RunningStatistics


def create_scale(num_envs: int) -> RewardScale:
    """That of no rewards, which changes none."""
    return RewardScale(jnp.zeros(num_envs), create(()))


def scale_rewards(
    scale: RewardScale | None, reward: jax.Array, done: jax.Array, discount: float | jax.Array
) -> tuple[RewardScale | None, jax.Array]:
    """Count the rewards of a rollout, then divide them by the deviation and cut them to ±10: `[steps, num_envs]`.

    done: where an episode ended with the step. All rewards of a call are divided by one number (`unit`). The sums run
    forwards, as in openai/baselines' VecNormalize: what is scaled is not the return, but of its size.
    """
    if scale is None:
        return None, reward

    def add(sums: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums = discount * sums + step[0]
        return jnp.where(step[1], 0, sums), sums

    sums, seen = jax.lax.scan(add, scale.sums, (reward, done))
    scale = RewardScale(sums, update(scale.statistics, seen.reshape(-1)))
    return scale, scaled(scale, reward)


def scaled(scale: RewardScale | None, reward: jax.Array) -> jax.Array:
    """Rewards in units of the scale, cut to ±10; without one (`None`) the rewards themselves."""
    return reward if scale is None else jnp.clip(reward / unit(scale), -10, 10)


def unit(scale: RewardScale | None) -> jax.Array:
    """How much one of the scaled rewards is worth."""
    return jnp.float32(1) if scale is None else jnp.sqrt(scale.statistics.variance + 1e-8)

"""What an off-policy agent lives on: environments in mid-episode, the replay they fill, and observation statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.learning import interaction, normalization, replay, returns
from jaxrl_dist.learning.devices import split_rows
from jaxrl_dist.learning.interaction import Average, Interaction, Transition
from jaxrl_dist.learning.normalization import RunningStatistics
from jaxrl_dist.learning.replay import Replay
from jaxrl_dist.learning.settings import Settings


class Experience(NamedTuple):
    """Part of an agent's state; `normalizer` is None where observations are taken as they are."""

    replay: Replay
    interaction: Interaction
    normalizer: RunningStatistics | None


class Batch(NamedTuple):
    """Transitions over one or more steps, `[batch, ...]`: target = reward + discount * value(next_observation).

    reward: the discounted sum over the steps taken; discount: gamma^steps, or 0 where the last one terminated; extras:
    those of the environment by name, summed as the reward is, () where it has none.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    discount: jax.Array
    next_observation: jax.Array
    extras: Any = ()


def warm_up(env, env_params, key: jax.Array, settings: Settings, *, normalize: bool = False) -> Experience:
    """Reset the environments and store the warm-up's steps, in whole rounds, of uniform random actions."""
    num_envs, steps, capacity = settings.num_envs, settings.clock().warmup_steps, settings.replay_capacity
    start_key, warmup_key = jax.random.split(key)
    row = interaction.transition_like(env, env_params)
    experience = Experience(
        replay.create(row, capacity, num_envs),
        interaction.start(env, env_params, start_key, num_envs),
        normalization.create(row.observation.shape) if normalize else None,
    )

    def one(experience: Experience, index: jax.Array) -> tuple[Experience, None]:
        action_key, step_key = jax.random.split(jax.random.fold_in(warmup_key, index))
        action = interaction.random_action(env, env_params, action_key, num_envs).astype(row.action.dtype)
        return collect(env, env_params, experience, action, step_key)[0], None

    return jax.lax.scan(one, experience, jnp.arange(steps // num_envs))[0]


def collect(
    env, env_params, experience: Experience, action: jax.Array, key: jax.Array
) -> tuple[Experience, Transition, dict[str, Average]]:
    """Take `action` `[num_envs, *action]` in every environment and store what happens, raw."""
    following, transition, metrics = interaction.step(env, env_params, experience.interaction, action, key)
    normalizer = experience.normalizer
    if normalizer is not None:
        normalizer = normalization.update(normalizer, transition.observation)
    return Experience(replay.add(experience.replay, transition), following, normalizer), transition, metrics


def sample(experience: Experience, key: jax.Array, batch_size: int, gamma: float | jax.Array) -> Batch:
    """A batch of stored transitions of one step, both observations normalised by the present statistics."""
    rows = split_rows(replay.sample(experience.replay, key, batch_size))
    return Batch(
        normalization.normalize(experience.normalizer, rows.observation), rows.action, rows.reward,
        returns.bootstrap_discount(gamma, rows.terminated),
        normalization.normalize(experience.normalizer, rows.next_observation), rows.extras,
    )  # fmt: skip


def sample_batches(
    experience: Experience, key: jax.Array, batches: int, batch_size: int, gamma: float | jax.Array
) -> Batch:
    """As many transitions as `batches` batches have, drawn at once: leaves `[batches, batch_size, ...]`."""
    rows = sample(experience, key, batches * batch_size, gamma)
    return split_rows(jax.tree.map(lambda x: x.reshape(batches, batch_size, *x.shape[1:]), rows), axis=1)


def sample_n_step(
    experience: Experience,
    key: jax.Array,
    batch_size: int,
    *,
    num_steps: int,
    gamma: float | jax.Array,
    reward_clip: float | jax.Array = 0.0,
) -> Batch:
    """`batch_at` for `batch_size` starts drawn uniformly with replacement among all stored steps."""
    indices = replay.sample_indices(experience.replay, key, batch_size)
    return batch_at(experience, indices, num_steps=num_steps, gamma=gamma, reward_clip=reward_clip)


def batch_at(
    experience: Experience,
    indices: jax.Array,
    *,
    num_steps: int,
    gamma: float | jax.Array,
    reward_clip: float | jax.Array = 0.0,
) -> Batch:
    """The transitions over `num_steps` steps that start in the slots `[batch]`; observations normalised as in `sample`.

    A window is shorter where its episode ends, by termination or truncation, or where the newest stored step is
    reached; the bootstrap always goes from the true successor of its last step, with gamma to the steps it has. Each
    reward, and of a vector of rewards each component, is cut to plus or minus `reward_clip` before they are summed,
    unless that is 0.
    """
    bound = jnp.where(reward_clip > 0, reward_clip, jnp.inf)
    rows, num_envs = experience.replay.rows, experience.interaction.episode_return.shape[0]

    def read(start: jax.Array) -> Batch:
        slots, available = replay.window_indices(experience.replay, start, num_steps, num_envs)
        ends = rows.terminated[slots], rows.truncated[slots], available, gamma
        window = returns.n_step(jnp.clip(rows.reward[slots], -bound, bound), *ends)
        last = jnp.take_along_axis(slots, window.steps[None] - 1, axis=0)[0]

        def summed(extra: jax.Array) -> jax.Array:  # [rows, ...] -> [batch, ...], each component like a reward
            parts = extra[slots].reshape(*slots.shape, -1)
            sums = jax.vmap(lambda part: returns.n_step(part, *ends).reward, in_axes=-1, out_axes=-1)(parts)
            return sums.reshape(*start.shape, *extra.shape[1:])

        cut = rows.extras
        if "rewards" in (cut or {}):
            cut = cut | {"rewards": jnp.clip(cut["rewards"], -bound, bound)}
        return Batch(
            rows.observation[start], rows.action[start], window.reward, window.discount, rows.next_observation[last],
            jax.tree.map(summed, cut),
        )  # fmt: skip

    batch = split_rows(replay.in_halves(read, indices))
    return batch._replace(
        observation=normalization.normalize(experience.normalizer, batch.observation),
        next_observation=normalization.normalize(experience.normalizer, batch.next_observation),
    )

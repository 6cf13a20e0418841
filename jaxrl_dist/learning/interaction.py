"""An agent meets its environments: vectorised reset and step, true successors, and episode statistics.

Environments follow gymnax 1.x's contract: `reset(key, params) -> (observation, state)` and
`step(key, state, action, params) -> (observation, state, reward, terminated, truncated, info)`, which resets by itself
and leaves the true successor in `info["final_observation"]`. What it leaves there under the names of `EXTRAS` goes with
the transition; environments without pay nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import nothing_to_remember
from jaxrl_dist.learning.devices import split_rows
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.learning.spaces import spaces_of

EXTRAS = ("rewards", "cost", "unchanged_reward")
"""What an environment may leave in `info` beside its reward: a vector of rewards, the cost of a constraint, and the
reward as it was where learners see another (`envs/gym_wrappers.py`), which is then what episodes are measured by."""


class Transition(NamedTuple):
    """What one environment step leaves behind; `next_observation` is the true successor, never one after a reset.

    extras: those of `EXTRAS` that the environment has, by name, float32; () where it has none.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    next_observation: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    extras: Any = ()


class Interaction(NamedTuple):
    """A batch of environments in mid-episode: their states, what the agent sees, the episodes' sums so far, and the
    largest |reward| that each has given: learned values can be held against what rewards and discount allow.

    memory: what the policy remembers of each (`Policy.start`), () for most.
    """

    environment: Any
    observation: jax.Array
    episode_return: jax.Array
    episode_length: jax.Array
    largest_reward: jax.Array
    memory: Any = ()


class Average(NamedTuple):
    """A metric as sum and count, so that averages over steps, chunks and runs of any length stay exact."""

    total: jax.Array
    count: jax.Array


def average(values: jax.Array, where: jax.Array | None = None) -> Average:
    """Sum and count of an array's entries, or of those entries where a mask is true; float32 scalars."""
    values = jnp.asarray(values, jnp.float32)
    where = jnp.ones(values.shape, bool) if where is None else where
    return Average(jnp.where(where, values, 0).sum(), where.sum(dtype=jnp.float32))


def start(
    env,
    env_params,
    key: jax.Array,
    num_envs: int,
    remember: Callable[[int], Any] = nothing_to_remember,
    *,
    per_environment: bool = False,
) -> Interaction:
    """Reset `num_envs` environments with independent keys; every leaf `[num_envs, ...]`. remember: `Policy.start`;
    per_environment: each has parameters of its own, leaves `[num_envs, ...]`."""
    axes = (0, 0 if per_environment else None)
    observation, environment = jax.vmap(env.reset, in_axes=axes)(jax.random.split(key, num_envs), env_params)
    environment, observation = split_rows(strengthen((environment, observation)))
    sums = jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32), jnp.zeros(num_envs)
    return Interaction(environment, observation, *sums, remember(num_envs))


def step(
    env,
    env_params,
    interaction: Interaction,
    action: jax.Array,
    key: jax.Array,
    memory: Any = (),
    remember: Callable[[int], Any] = nothing_to_remember,
    *,
    per_environment: bool = False,
) -> tuple[Interaction, Transition, dict[str, Average]]:
    """One step of every environment: action `[num_envs, *action]` -> transition with leaves `[num_envs, ...]`.

    memory: what the policy remembers after it chose the action; where the episode ends with this step, `remember` (the
    policy's `start`) begins another; per_environment: as in `start`. The metrics hold return and length of the episodes
    that ended with this step.
    """
    num_envs = interaction.episode_return.shape[0]
    axes = (0, 0, 0, 0 if per_environment else None)
    observation, environment, reward, terminated, truncated, info = jax.vmap(env.step, in_axes=axes)(
        jax.random.split(key, num_envs), interaction.environment, action, env_params
    )
    # The loop's carry must keep its types; some environments change them between reset and step.
    environment, observation = split_rows(
        jax.tree.map(_cast_like, (environment, observation), (interaction.environment, interaction.observation))
    )
    reward = jnp.asarray(reward, jnp.float32)
    terminated, truncated = jnp.asarray(terminated, bool), jnp.asarray(truncated, bool)
    successor = info["final_observation"].astype(interaction.observation.dtype)
    extras = {name: jnp.asarray(info[name], jnp.float32) for name in EXTRAS if name in info} or ()
    transition = Transition(interaction.observation, action, reward, successor, terminated, truncated, extras)
    chex.assert_shape([reward, terminated, truncated], (num_envs,))
    chex.assert_equal_shape([successor, observation])

    done = terminated | truncated
    episode_return = interaction.episode_return + raw_reward(transition)
    episode_length = interaction.episode_length + 1
    metrics = {"episode_return": average(episode_return, done), "episode_length": average(episode_length, done)}
    following = Interaction(
        environment, observation, jnp.where(done, 0, episode_return), jnp.where(done, 0, episode_length),
        jnp.maximum(interaction.largest_reward, jnp.abs(reward)),
        jax.tree.map(lambda old, new: where(done, new, old), memory, remember(num_envs)),
    )  # fmt: skip
    return following, transition, metrics


def raw_reward(transition: Transition) -> jax.Array:
    """The reward as the environment itself gives it, which is what an episode's return is made of."""
    return (transition.extras or {}).get("unchanged_reward", transition.reward)


def where(condition: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Rows of `new` where the condition `[num_envs]` holds, else of `old`: `[num_envs, ...]`."""
    return jnp.where(condition.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def random_action(env, env_params, key: jax.Array, num_envs: int) -> jax.Array:
    """One uniform random action per environment, `[num_envs, *action]`."""
    return jax.vmap(spaces_of(env, env_params)[0].sample)(jax.random.split(key, num_envs))


def transition_like(env, env_params) -> Transition:
    """Shapes and dtypes of one transition, without running the environment."""

    def one(key):
        reset_key, action_key, step_key = jax.random.split(key, 3)
        interaction = start(env, env_params, reset_key, 1)
        action = random_action(env, env_params, action_key, 1)
        return step(env, env_params, interaction, action, step_key)[1]

    batched = jax.eval_shape(one, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batched)


def strengthen(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Give every leaf a strong dtype: a weakly typed reset state makes a jitted step compile twice."""
    return jax.tree.map(lambda x: _cast_like(x, x), tree)


def _cast_like(x, like):
    x, like = jnp.asarray(x), jnp.asarray(like)
    return x if is_key(like) else jax.lax.convert_element_type(x, like.dtype)

"""What on-policy agents share: rollouts of the present policy, and epochs of minibatches over what they brought."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.agent import nothing_to_remember
from jaxrl_dist.configuration import require
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.devices import split_rows
from jaxrl_dist.learning.interaction import Average, Interaction, Transition


class Rollout(NamedTuple):
    """`steps` steps of every environment, leaves `[steps, num_envs, ...]`."""

    transition: Transition
    beside: Any
    """what the policy said with its actions, such as their log-densities"""


def collect(
    env,
    env_params,
    now: Interaction,
    key: jax.Array,
    steps: int,
    policy: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any, Any]],
    remember: Callable[[int], Any] = nothing_to_remember,
    *,
    per_environment: bool = False,
) -> tuple[Interaction, Rollout, dict[str, Average]]:
    """Let a policy act for `steps` steps in every environment.

    policy: `(observation, memory, key) -> (action, memory, beside)`, leaves `[num_envs, ...]`; remember:
    `Policy.start`; per_environment: each environment has parameters of its own, leaves `[num_envs, ...]`. Returns where
    the environments stand then, what happened, and return and length of the episodes that ended.
    """

    # Not over an array of keys: under `vmap` JAX's reuse checker takes reading one at every turn for reuse.
    def one(now: Interaction, index: jax.Array):
        act_key, step_key = jax.random.split(jax.random.fold_in(key, index))
        action, memory, beside = policy(now.observation, now.memory, act_key)
        now, transition, episodes = interaction.step(
            env, env_params, now, action, step_key, memory, remember, per_environment=per_environment
        )
        return now, (Rollout(transition, beside), episodes)

    now, (rollout, episodes) = jax.lax.scan(one, now, jnp.arange(steps))
    return now, rollout, jax.tree.map(lambda x: x.sum(0), episodes)


def epochs(
    update: Callable[[Any, Any], tuple[Any, Any]],
    learner: Any,
    data: Any,
    key: jax.Array,
    *,
    num_epochs: int,
    num_minibatches: int,
    axis: int = 0,
) -> tuple[Any, Any]:
    """Go `num_epochs` times through `data`, leaves `[rows, ...]`, in minibatches of rows in an order drawn each time.

    update: `(learner, minibatch) -> (learner, metrics)`. With axis 1 leaves are `[steps, num_envs, ...]`, or
    `[1, num_envs, ...]`, and a row is all of an environment: sequences stay whole, for policies that remember. Only
    numbers of rows are shuffled, the data stays where it is. Returns the learner and all metrics, leaves
    `[num_epochs, num_minibatches, ...]`. Raises ConfigurationError where the rows do not divide into the minibatches.
    """
    rows = jax.tree.leaves(data)[0].shape[axis]
    divided = f"--num-envs = {rows}" if axis else f"the {rows} steps of a rollout"
    require(rows % num_minibatches == 0, f"--num-minibatches is {num_minibatches}; it must divide {divided}")
    before = (slice(None),) * axis

    def one(learner: Any, numbers: jax.Array):
        return update(learner, split_rows(jax.tree.map(lambda x: x[*before, numbers], data), axis))

    def epoch(learner: Any, index: jax.Array):
        order = jax.random.permutation(jax.random.fold_in(key, index), rows).reshape(num_minibatches, -1)
        return jax.lax.scan(one, learner, order)

    return jax.lax.scan(epoch, learner, jnp.arange(num_epochs))

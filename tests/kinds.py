"""Toy agents of the kinds that have no replay: one that learns from what it just did, and one that learns from a file.

The first remembers its last action, pretrains, and makes no claim; the second takes no environment steps at all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, Claim, Clock, Policy, memoryless
from jaxrl_dist.configuration import Count, Fraction, Natural, NonNegative, configuration
from jaxrl_dist.distributional.law import equally_weighted
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.interaction import Interaction, Transition, average
from jaxrl_dist.learning.spaces import continuous_action_size


@configuration
class OnPolicyConfig:
    num_envs: Count = 2
    num_steps: Count = 3
    pretraining: Natural = 4
    learning_rate: NonNegative = 0.1


class OnPolicyState(NamedTuple):
    weights: jax.Array
    interaction: Interaction
    key: jax.Array


def make_on_policy(config, env, env_params) -> Agent:
    """Acts by its weights and half of its last action, and moves the weights by the rewards of one rollout."""
    size = continuous_action_size(env, env_params)

    def start(num_envs):
        return {"last": jnp.zeros((num_envs, size))}

    def act(state, observation, memory, key):
        action = jnp.tanh(observation.mean(-1, keepdims=True) * state.weights + 0.5 * memory["last"])
        return action, {"last": action}

    def init(key):
        key, start_key, weights_key = jax.random.split(key, 3)
        weights = jax.random.normal(weights_key, (size,))
        return OnPolicyState(weights, interaction.start(env, env_params, start_key, config.num_envs, start), key)

    def step(state):
        def one(carry, time):
            now, key = carry
            action, memory = act(state, now.observation, now.memory, key)
            noise = 0.1 * jax.random.normal(jax.random.fold_in(key, 2 * time), action.shape)
            step_key = jax.random.fold_in(key, 2 * time + 1)
            now, lived, metrics = interaction.step(env, env_params, now, action + noise, step_key, memory, start)
            return (now, key), (lived.reward[:, None] * noise, metrics)

        key, rollout_key = jax.random.split(state.key)
        steps = jnp.arange(config.num_steps)
        (now, _), (direction, metrics) = jax.lax.scan(one, (state.interaction, rollout_key), steps)
        weights = state.weights + config.learning_rate * direction.mean((0, 1))
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return OnPolicyState(weights, now, key), metrics | {"weight": average(weights)}

    def pretrain(state):
        weights = 0.9 * state.weights
        return state._replace(weights=weights), {"shrunk": average(weights)}

    clock = Clock(updates=1, env_steps=config.num_envs * config.num_steps, pretraining=config.pretraining)
    return Agent(init, step, Policy(act, start), clock, pretrain=pretrain)


@configuration
class OfflineConfig:
    updates: Count = 2
    batch_size: Count = 4
    learning_rate: NonNegative = 0.1
    discount: Fraction = 0.9


class OfflineState(NamedTuple):
    weights: jax.Array
    value: jax.Array
    key: jax.Array


def make_offline(config, env, env_params, data: Transition) -> Agent:
    """Clones the actions of the data by one linear layer, and learns the mean of its rewards as every state's value."""
    size = continuous_action_size(env, env_params)

    def init(key):
        return OfflineState(jnp.zeros((data.observation.shape[-1], size)), jnp.float32(0), key)

    def update(state, _):
        key, sample_key = jax.random.split(state.key)
        rows = jax.random.randint(sample_key, (config.batch_size,), 0, len(data.reward))
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)

        def loss(weights):
            return ((jnp.tanh(batch.observation @ weights) - batch.action) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(state.weights)
        reward = state.value + config.learning_rate * (batch.reward.mean() - state.value)
        state = OfflineState(state.weights - config.learning_rate * gradient, reward, key)
        return state, {"loss": average(value), "value": average(reward / (1 - config.discount))}

    def step(state):
        state, metrics = jax.lax.scan(update, state, length=config.updates)
        return state, jax.tree.map(lambda x: x.sum(0), metrics)

    def act(state, observation, key):
        return jnp.tanh(observation @ state.weights)

    def claimed(state, observation, key) -> tuple[jax.Array, Any]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    def law(state, observation, action):
        return equally_weighted(jnp.full((observation.shape[0], 1), state.value / (1 - config.discount)))

    claim = Claim(claimed, law, config.discount, learns_mean=True, of_states=True)
    return Agent(init, step, memoryless(act), Clock(updates=config.updates), claim)

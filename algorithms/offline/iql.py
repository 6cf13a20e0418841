"""IQL: Implicit Q-Learning.

Paper: "Offline Reinforcement Learning with Implicit Q-Learning", Kostrikov, Nair, Levine, arXiv 2110.06169; order of
updates from the authors' code, ikostrikov/implicit_q_learning.

No action but those in the data is ever asked for its value. V(s) is the tau-expectile of Q(s, a) over the data's
actions, which for tau near 1 is nearly the best of them; Q learns from V of the successor; and the policy is fitted to
the data's actions, each weighed by how much better than V it is. The policy plays no part in what the values learn.

    value    mean of |tau - 1(u < 0)| u^2,  u = min_j Q'_j(s, a) - V(s)                  (eq. 5)
    policy   -mean of min(exp(beta u), w) log pi(a|s), u with the new V                  (eq. 7)
    critics  sum over j of mean (Q_j(s, a) - (r + gamma (1 - terminated) V(s')))^2       (eq. 6)
    targets  Q' <- (1 - polyak) Q' + polyak Q

A time limit does not stop the bootstrap: V is taken at the successor that the data has stored. beta multiplies, as in
the authors' code, where it is called temperature. The policy is a Gaussian with mean tanh f(s) and a deviation that
does not depend on the state, not squashed: actions at the bounds have a density. Evaluation takes the mean.

Differences from the authors' code: rewards are multiplied by `--reward-scale` (theirs: 1000 / (largest - smallest
return) of the data, or rewards - 1); the policy's step size falls by a cosine only if `--actor-decay-updates` says so;
no dropout. Metrics are in the environment's units.

Run:      jaxrl-dist collect jaxrl_dist.envs.controllers:pendulum --env-id Pendulum-v1 --random 0.6 --out medium.npz
          python algorithms/offline/iql.py --env-id Pendulum-v1 --dataset medium.npz
Expected: Pendulum-v1, better than the data and near its controller without random actions; no study yet.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, Clock, memoryless
from jaxrl_dist.configuration import Count, Fraction, Layers, Natural, NonNegative, Positive, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import datasets, networks, normalization, portable
from jaxrl_dist.learning.interaction import Average, Transition, average
from jaxrl_dist.learning.normalization import RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Gaussian
from jaxrl_dist.learning.returns import bootstrap_discount
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of IQL; the defaults are the paper's for locomotion. Floats can be swept within one program."""

    updates_per_iteration: Count = 1
    """gradient updates per iteration"""
    batch_size: Count = 256
    """rows of the data per update"""
    normalize_observations: bool = False
    """normalise observations by the mean and variance of the data"""
    reward_scale: Positive = 1.0
    """what rewards are multiplied by: advantages are weighed in these units"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    expectile: Fraction = 0.7
    """tau, how much more a value below an action's counts than one above it"""
    inverse_temperature: NonNegative = 3.0
    """beta, how sharply better actions are preferred"""
    weight_bound: Positive = 100.0
    """w, the largest weight of an action"""
    polyak: Fraction = 0.005
    """how far target critics move towards the critics with each update"""
    actor_learning_rate: NonNegative = 3e-4
    """step size of the policy's Adam at the start"""
    actor_decay_updates: Natural = 0
    """updates in which that falls to 0 by a cosine; 0: it does not fall"""
    critic_learning_rate: NonNegative = 3e-4
    """step size of the critics' Adam"""
    value_learning_rate: NonNegative = 3e-4
    """step size of the value's Adam"""

    num_critics: Count = 2
    """critics, of which the lowest counts"""
    actor_hidden: Layers = (256, 256)
    """widths of the policy's hidden layers"""
    critic_hidden: Layers = (256, 256)
    """widths of the hidden layers of critics and value"""


# Sizes for a CPU; total_steps are updates.
PRESETS = {
    "Pendulum-v1": {
        "total_steps": 8_000, "batch_size": 128, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
        "normalize_observations": True, "reward_scale": 0.1,
    },
}  # fmt: skip
ORTHOGONAL = (2**0.5, 2**0.5)

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """Law of actions, `[batch, observation]` -> `Gaussian`."""

    hidden: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> Gaussian:
        mean = jnp.tanh(networks.MLP((*self.hidden, self.outputs), orthogonal=ORTHOGONAL, name="actor")(observation))
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(mean, jnp.broadcast_to(jnp.clip(log_std, -5, 2), mean.shape))


class Critic(nn.Module):
    """Action values, `[batch, observation]`, `[batch, actions]` -> `[batch, critics]`."""

    hidden: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([observation, action], axis=-1)
        features = (*self.hidden, 1)
        return networks.EnsembleMLP(self.num_critics, features, orthogonal=ORTHOGONAL, name="mlp")(inputs)[..., 0]


class Value(nn.Module):
    """State values, `[batch, observation]` -> `[batch]`."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        return networks.MLP((*self.hidden, 1), orthogonal=ORTHOGONAL, name="mlp")(observation)[:, 0]


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    value: Trained
    target_critic: chex.ArrayTree


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    normalizer: RunningStatistics | None
    key: jax.Array


# -- Losses and weights -----------------------------------------------------------------------------------------------


def value_loss(advantage: jax.Array, expectile: float | jax.Array) -> jax.Array:
    """Asymmetric squared error (eq. 5) of `[batch]` values, by how much actions are above them."""
    chex.assert_rank(advantage, 1)
    return (jnp.where(advantage > 0, expectile, 1 - expectile) * advantage**2).mean()


def weight(advantage: jax.Array, inverse_temperature: float | jax.Array, bound: float | jax.Array) -> jax.Array:
    """How much an action counts for the policy (eq. 7), `[batch]`; the bound is on the weight, not on the advantage."""
    return jnp.minimum(jnp.exp(inverse_temperature * advantage), bound)


def actor_loss(log_density: jax.Array, weight: jax.Array) -> jax.Array:
    """Minus the weighted log density of the data's actions, `[batch]` each."""
    chex.assert_equal_shape([log_density, weight])
    return -(jax.lax.stop_gradient(weight) * log_density).mean()


def critic_loss(values: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error (eq. 6) of `[batch, critics]` values on `[batch]` targets, mean over batch, sum over critics."""
    chex.assert_rank(values, 2)
    chex.assert_shape(target, values.shape[:1])
    return ((values - target[:, None]) ** 2).mean(0).sum()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params, data: Transition) -> Agent:
    """IQL on a dataset; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    actor, value = Actor(config.actor_hidden, action_size), Value(config.critic_hidden)
    critic = Critic(config.critic_hidden, config.num_critics)
    actor_rate = config.actor_learning_rate
    if config.actor_decay_updates:
        actor_rate = optax.cosine_decay_schedule(actor_rate, config.actor_decay_updates)
    actor_optimizer = optax.adam(actor_rate)
    critic_optimizer, value_optimizer = optax.adam(config.critic_learning_rate), optax.adam(config.value_learning_rate)

    def update(learner: Learner, batch: Transition) -> tuple[Learner, dict[str, jax.Array]]:
        """Value, policy, critics, targets, in this order."""
        observation, action = batch.observation, batch.action
        action_value = critic.apply(learner.target_critic, observation, action).min(-1)

        # Value: an expectile of the target critics' values of the data's actions.
        def value_objective(parameters):
            return value_loss(action_value - value.apply(parameters, observation), config.expectile), None

        new_value, of_value = descend(value_optimizer, learner.value, value_objective)

        # Policy: the data's actions, the better ones more.
        advantage = action_value - value.apply(new_value.parameters, observation)
        weights = weight(advantage, config.inverse_temperature, config.weight_bound)

        def actor_objective(parameters):
            return actor_loss(actor.apply(parameters, observation).log_density(action), weights), None

        new_actor, of_actor = descend(actor_optimizer, learner.actor, actor_objective)

        # Critics: one step ahead, from there on V.
        next_value = value.apply(new_value.parameters, batch.next_observation)
        discount = bootstrap_discount(config.discount, batch.terminated)
        target = config.reward_scale * batch.reward + discount * next_value

        def critic_objective(parameters):
            values = critic.apply(parameters, observation, action)
            return critic_loss(values, target), values.mean()

        new_critic, of_critic = descend(critic_optimizer, learner.critic, critic_objective)
        target_critic = optax.incremental_update(new_critic.parameters, learner.target_critic, config.polyak)
        return Learner(new_actor, new_critic, new_value, target_critic), {
            "value_loss": of_value.loss, "actor_loss": of_actor.loss, "critic_loss": of_critic.loss,
            "value": of_critic.aux / config.reward_scale, "target": target.mean() / config.reward_scale,
            "advantage": advantage.mean() / config.reward_scale, "weight": weights.mean(),
            "bounded_weights": (weights >= config.weight_bound).mean(), "critic_gradient_norm": of_critic.gradient_norm,
        }  # fmt: skip

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, value_key = jax.random.split(key, 4)
        observation, action = jnp.asarray(data.observation), jnp.asarray(data.action)[:1]
        normalizer = normalization.of(observation) if config.normalize_observations else None
        parameters = critic.init(critic_key, observation[:1], action)
        learner = Learner(
            begin(actor_optimizer, actor.init(actor_key, observation[:1])), begin(critic_optimizer, parameters),
            begin(value_optimizer, value.init(value_key, observation[:1])), parameters,
        )  # fmt: skip
        return State(learner, normalizer, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def learn(state: State, _):
            key, batch_key = jax.random.split(state.key)
            batch = datasets.draw(data, batch_key, config.batch_size)
            batch = batch._replace(
                observation=normalize(state.normalizer, batch.observation),
                next_observation=normalize(state.normalizer, batch.next_observation),
            )
            learner, metrics = update(state.learner, batch)
            return state._replace(learner=learner, key=key), metrics

        state, metrics = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(average, metrics)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return actor.apply(state.learner.actor.parameters, normalize(state.normalizer, observation)).mode()

    def follow(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        values = critic.apply(state.learner.critic.parameters, normalize(state.normalizer, observation), action)
        return law.equally_weighted(values / config.reward_scale)

    def export(state: State) -> dict[str, Any]:
        layers = state.learner.actor.parameters["params"]["actor"]["layers"]
        return portable.mlp_policy(layers, action_size, state.normalizer)

    claim = Claim(follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(act), Clock(config.updates_per_iteration), claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

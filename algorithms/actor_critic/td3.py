"""TD3: Twin Delayed Deep Deterministic Policy Gradient.

Paper: "Addressing Function Approximation Error in Actor-Critic Methods", Fujimoto, van Hoof, Meger, ICML 2018,
arXiv 1802.09477.

DDPG's actor climbs every positive error of its critic, and the targets copy what it finds. TD3 answers with three
changes: two critics regress on the smaller of their two targets; the actor and all targets move once every few critic
updates, so that they follow a critic whose error has settled; and the target action is blurred by clipped noise, since
similar actions should have similar values.

    target        y = r + gamma (1 - terminated) min over i of Q_target_i(s', a'),
                  a' = clip(mu_target(s') + clip(noise, -c, c), -1, 1),  noise ~ N(0, sigma^2) per action component
    critics       sum over i of the mean of (Q_i(s, a) - y)^2
    actor         -mean of Q_1(s, mu(s)), once every `policy_delay` critic updates
    targets       phi_target <- phi_target + polyak (phi - phi_target) for actor and critics, with the actor

Differences from the paper: defaults are those of the authors' present code (learning rate 3e-4, batch 256, 256-256,
25,000 steps of warm-up); `--preset paper` takes the paper's, with its warm-up of 10,000 steps for HalfCheetah and Ant
(elsewhere the paper has 1,000: `--warmup-steps 1000`). An iteration takes `policy_delay` environment steps before as
many critic updates: the acting policy is the same as with alternating steps and updates, because it only changes every
`policy_delay` updates.

Run:      python algorithms/actor_critic/td3.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.settings import Settings, check_policy_delay
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(Settings):
    """Settings of TD3; the defaults are those of the authors' code. Floats can be swept within one compiled program."""

    steps_per_iteration: Count = 2
    updates_per_iteration: Count = 2
    warmup_steps: Count = 25_000
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    polyak: Fraction = 0.005
    """how far the target parameters move towards the online ones, once per actor update"""
    actor_learning_rate: NonNegative = 3e-4
    """step size of the actor's Adam"""
    critic_learning_rate: NonNegative = 3e-4
    """step size of the critics' Adam"""
    exploration_noise: NonNegative = 0.1
    """standard deviation of the Gaussian noise on the actions taken"""

    actor_hidden: tuple[int, ...] = (256, 256)
    """widths of the actor's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """widths of each critic's hidden layers"""
    num_critics: Count = 2
    """number of critics whose minimum is taken"""
    policy_delay: Count = 2
    """critic updates per update of the actor and of the targets; divides updates_per_iteration"""
    target_noise: NonNegative = 0.2
    """standard deviation of the noise on the target action"""
    target_noise_clip: NonNegative = 0.5
    """largest size of that noise"""


# Pendulum's sizes are ours, for a CPU.
PRESETS = {
    "Pendulum-v1": {
        "warmup_steps": 1_000, "batch_size": 128, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
        "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    },
    "paper": {
        "warmup_steps": 10_000, "batch_size": 100, "actor_hidden": (400, 300), "critic_hidden": (400, 300),
        "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """The deterministic policy mu, `[batch, observation]` -> `[batch, actions]` in [-1, 1]."""

    hidden: tuple[int, ...]
    action_size: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        return jnp.tanh(networks.MLP((*self.hidden, self.action_size), name="mlp")(observation))


class Critic(nn.Module):
    """Action values, `[batch, observation]`, `[batch, actions]` -> `[batch, critics]`."""

    hidden: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([observation, action], axis=-1)
        return networks.EnsembleMLP(self.num_critics, (*self.hidden, 1), name="mlp")(inputs)[..., 0]


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    target_actor: chex.ArrayTree
    target_critic: chex.ArrayTree


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def smoothed_action(config: Config, action: jax.Array, noise: jax.Array) -> jax.Array:
    """The target action blurred by scaled and clipped N(0, 1) noise, both `[batch, actions]`; within [-1, 1]."""
    chex.assert_rank(action, 2)
    chex.assert_equal_shape([action, noise])
    return jnp.clip(
        action + jnp.clip(config.target_noise * noise, -config.target_noise_clip, config.target_noise_clip), -1, 1
    )


def target_value(batch: Batch, next_values: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value, the smallest of the critics' `[batch, critics]`: `[batch]`."""
    chex.assert_rank(next_values, 2)
    chex.assert_shape([batch.reward, batch.discount], next_values.shape[:1])
    return batch.reward + batch.discount * next_values.min(-1)


def critic_loss(values: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of `[batch, critics]` values on `[batch]` targets, mean over the batch, sum over critics."""
    chex.assert_rank(values, 2)
    chex.assert_shape(target, values.shape[:1])
    return ((values - target[:, None]) ** 2).mean(0).sum()


def actor_loss(values: jax.Array) -> jax.Array:
    """Value to be maximised, the *first* critic's of `[batch, critics]`."""
    chex.assert_rank(values, 2)
    return -values[:, 0].mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """TD3 on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    check_policy_delay(config)
    actor = Actor(config.actor_hidden, action_size)
    critic = Critic(config.critic_hidden, config.num_critics)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)

    def update_critic(learner: Learner, batch: Batch, noise: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of the critics."""
        # Target: clipped double Q, the smallest of the target critics' values, of the smoothed target action.
        next_action = smoothed_action(config, actor.apply(learner.target_actor, batch.next_observation), noise)
        next_values = critic.apply(learner.target_critic, batch.next_observation, next_action)
        target = target_value(batch, next_values)

        # Critics: regress on the target.
        def critic_objective(parameters):
            values = critic.apply(parameters, batch.observation, batch.action)
            return critic_loss(values, target), values

        new_critic, (critic_value, values, norm) = descend(critic_adam, learner.critic, critic_objective)
        metrics = {
            "critic_loss": critic_value, "value": values.mean(), "target": target.mean(),
            "critic_gradient_norm": norm,
        }  # fmt: skip
        return learner._replace(critic=new_critic), metrics

    def update_actor(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of the actor, and one step of all targets towards their online networks."""

        # Actor: climb the first of the critics just updated.
        def actor_objective(parameters):
            action = actor.apply(parameters, batch.observation)
            return actor_loss(critic.apply(learner.critic.parameters, batch.observation, action)), action

        new_actor, (actor_value, action, _) = descend(actor_adam, learner.actor, actor_objective)

        # Targets: follow actor and critics slowly.
        learner = learner._replace(
            actor=new_actor,
            target_actor=networks.polyak(learner.target_actor, new_actor.parameters, config.polyak),
            target_critic=networks.polyak(learner.target_critic, learner.critic.parameters, config.polyak),
        )
        return learner, {"actor_loss": actor_value, "saturation": (jnp.abs(action) > 0.99).mean()}

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, warmup_key = jax.random.split(key, 4)
        observation, action = jnp.zeros((1, *env.observation_space(env_params).shape)), jnp.zeros((1, action_size))
        actor_parameters = actor.init(actor_key, observation)
        critic_parameters = critic.init(critic_key, observation, action)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters),
            actor_parameters, critic_parameters,
        )  # fmt: skip
        filled = experience.warm_up(env, env_params, warmup_key, config, normalize=config.normalize_observations)
        return State(learner, filled, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return state._replace(key=key, experience=lived), episodes

        def learn(state, _):
            # One update of the actor, on the last of the batches that the critics were updated with before it.
            key, sample_key, noise_key = jax.random.split(state.key, 3)
            batches = experience.sample_batches(
                state.experience, sample_key, config.policy_delay, config.batch_size, config.discount
            )
            noise = jax.random.normal(noise_key, batches.action.shape)
            learner, critic_metrics = jax.lax.scan(
                lambda learner, batch_and_noise: update_critic(learner, *batch_and_noise),
                state.learner, (batches, noise),
            )  # fmt: skip
            learner, actor_metrics = update_actor(learner, jax.tree.map(lambda x: x[-1], batches))
            return state._replace(key=key, learner=learner), jax.tree.map(average, critic_metrics | actor_metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration // config.policy_delay)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return actor.apply(state.learner.actor.parameters, normalize(state.experience.normalizer, observation))

    def explore(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        action = act(state, observation, key)
        return jnp.clip(action + config.exploration_noise * jax.random.normal(key, action.shape), -1, 1)

    def target_policy(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        action = act(state, observation, key)
        return smoothed_action(config, action, jax.random.normal(key, action.shape)), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        return law.equally_weighted(critic.apply(state.learner.critic.parameters, observation, action))

    def export(state: State) -> dict[str, jax.Array]:
        return portable.mlp_policy(
            state.learner.actor.parameters["params"]["mlp"]["layers"], action_size, state.experience.normalizer
        )

    claim = Claim(target_policy, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

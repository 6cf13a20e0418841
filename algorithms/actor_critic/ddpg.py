"""DDPG: Deep Deterministic Policy Gradient.

Paper: "Continuous control with deep reinforcement learning", Lillicrap et al., ICLR 2016, arXiv 1509.02971.

Q-learning cannot maximise over continuous actions, so a deterministic actor mu learns to: its gradient is the critic's
slope in the action, carried back through mu. Both learn off-policy from a replay, and slowly tracking copies of both
give the targets. Exploration is noise added to the action. Nothing restrains over-estimation, which is what TD3 mends.

    target        y = r + gamma (1 - terminated) Q_target(s', mu_target(s'))
    critic        mean of (Q(s, a) - y)^2, with L2 weight decay on the critic's parameters in the paper
    actor         -mean of Q(s, mu(s))
    targets       phi_target <- phi_target + polyak (phi - phi_target) for actor and critic
    noise         n <- n - theta n + sigma N(0, 1), reset with the episode; theta 1 is independent Gaussian noise

Differences from the paper: the defaults are the settings retuned by the authors of TD3; `--preset paper` takes the
paper's, but for the batch normalisation of its low-dimensional networks, which no later code keeps, and a warm-up of
one batch, of which the paper says nothing.

Run:      python algorithms/actor_critic/ddpg.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, configuration, require
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(Settings):
    """Settings of DDPG; defaults as retuned by the authors of TD3. Floats can be swept within one compiled program."""

    warmup_steps: Count = 25_000
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    polyak: Fraction = 0.005
    """how far the target parameters move towards the online ones at every update"""
    actor_learning_rate: NonNegative = 3e-4
    """step size of the actor's Adam"""
    critic_learning_rate: NonNegative = 3e-4
    """step size of the critic's Adam"""
    critic_weight_decay: NonNegative = 0.0
    """weight of the L2 penalty on the critic's parameters; the paper's is 1e-2"""
    exploration_noise: NonNegative = 0.1
    """sigma, standard deviation of what is added to the noise at every step"""
    noise_reversion: Fraction = 1.0
    """theta, the share of the noise forgotten at every step: 1 is Gaussian, the paper's 0.15 Ornstein-Uhlenbeck"""

    actor_hidden: tuple[int, ...] = (256, 256)
    """widths of the actor's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """widths of the critic's hidden layers"""
    paper_networks: bool = False
    """as in the paper, the action enters the critic at its second layer, and last layers start within 3e-3 of zero"""


# Pendulum's sizes are ours, for a CPU.
PRESETS = {
    "Pendulum-v1": {
        "warmup_steps": 1_000, "batch_size": 128, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
        "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    },
    "paper": {
        "warmup_steps": 64, "batch_size": 64, "actor_hidden": (400, 300), "critic_hidden": (400, 300),
        "actor_learning_rate": 1e-4, "critic_learning_rate": 1e-3, "critic_weight_decay": 1e-2, "polyak": 0.001,
        "exploration_noise": 0.2, "noise_reversion": 0.15, "paper_networks": True,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """The deterministic policy mu, `[batch, observation]` -> `[batch, actions]` in [-1, 1]."""

    hidden: tuple[int, ...]
    action_size: int
    paper_networks: bool

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        output_bound = 3e-3 if self.paper_networks else None
        mlp = networks.MLP((*self.hidden, self.action_size), output_bound=output_bound, name="mlp")
        return jnp.tanh(mlp(observation))


class Critic(nn.Module):
    """Action values, `[batch, observation]`, `[batch, actions]` -> `[batch]`."""

    hidden: tuple[int, ...]
    paper_networks: bool

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        if not self.paper_networks:
            return networks.MLP((*self.hidden, 1), name="mlp")(jnp.concatenate([observation, action], axis=-1))[:, 0]
        features = nn.relu(networks.MLP(self.hidden[:1], name="observation")(observation))
        inputs = jnp.concatenate([features, action], axis=-1)
        return networks.MLP((*self.hidden[1:], 1), output_bound=3e-3, name="mlp")(inputs)[:, 0]


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
    noise: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_value(batch: Batch, next_value: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value `[batch]`: `[batch]`."""
    chex.assert_shape([batch.reward, batch.discount, next_value], (len(next_value),))
    return batch.reward + batch.discount * next_value


def critic_loss(value: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of `[batch]` values on `[batch]` targets."""
    chex.assert_shape([value, target], (len(target),))
    return ((value - target) ** 2).mean()


def actor_loss(value: jax.Array) -> jax.Array:
    """Value `[batch]` to be maximised."""
    chex.assert_rank(value, 1)
    return -value.mean()


def next_noise(config: Config, noise: jax.Array, key: jax.Array) -> jax.Array:
    """One step, of length 1, of the Ornstein-Uhlenbeck recursion for every environment, `[num_envs, actions]`."""
    chex.assert_rank(noise, 2)
    return (1 - config.noise_reversion) * noise + config.exploration_noise * jax.random.normal(key, noise.shape)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DDPG on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    require(
        len(config.critic_hidden) >= 1 or not config.paper_networks,
        "--critic-hidden is empty; --paper-networks needs at least one hidden layer before the action enters",
    )
    actor = Actor(config.actor_hidden, action_size, config.paper_networks)
    critic = Critic(config.critic_hidden, config.paper_networks)
    actor_adam = optax.adam(config.actor_learning_rate)
    # The gradient of the penalty decay / 2 * |parameters|^2 goes through Adam, as in the paper's time.
    critic_adam = optax.chain(
        optax.add_decayed_weights(config.critic_weight_decay), optax.adam(config.critic_learning_rate)
    )

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, Average]]:
        """One gradient step of critic and actor, and one of the targets towards their online networks."""
        # Target: value of the target actor's next action, by the target critic.
        next_action = actor.apply(learner.target_actor, batch.next_observation)
        next_value = critic.apply(learner.target_critic, batch.next_observation, next_action)
        target = target_value(batch, next_value)

        # Critic: regress on the target.
        def critic_objective(parameters):
            value = critic.apply(parameters, batch.observation, batch.action)
            return critic_loss(value, target), value

        new_critic, (critic_value, value, norm) = descend(critic_adam, learner.critic, critic_objective)

        # Actor: climb the critic just updated.
        def actor_objective(parameters):
            action = actor.apply(parameters, batch.observation)
            return actor_loss(critic.apply(new_critic.parameters, batch.observation, action)), action

        new_actor, (actor_value, action, _) = descend(actor_adam, learner.actor, actor_objective)

        # Targets: follow actor and critic slowly.
        learner = Learner(
            actor=new_actor,
            critic=new_critic,
            target_actor=networks.polyak(learner.target_actor, new_actor.parameters, config.polyak),
            target_critic=networks.polyak(learner.target_critic, new_critic.parameters, config.polyak),
        )
        metrics = {
            "critic_loss": critic_value, "value": value.mean(), "target": target.mean(),
            "critic_gradient_norm": norm,
            "actor_loss": actor_value, "saturation": (jnp.abs(action) > 0.99).mean(),
        }  # fmt: skip
        return learner, jax.tree.map(average, metrics)

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
        return State(learner, filled, jnp.zeros((config.num_envs, action_size)), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action, noise = explore(state, state.experience.interaction.observation, act_key)
            lived, transition, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            done = transition.terminated | transition.truncated
            return state._replace(key=key, experience=lived, noise=jnp.where(done[:, None], 0, noise)), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key, 3)[:2]  # as many as TD3: runs can be compared bit for bit
            batch = experience.sample(state.experience, sample_key, config.batch_size, config.discount)
            learner, losses = update(state.learner, batch)
            return state._replace(key=key, learner=learner), losses

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return actor.apply(state.learner.actor.parameters, normalize(state.experience.normalizer, observation))

    def explore(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise = next_noise(config, state.noise, key)
        return jnp.clip(act(state, observation, key) + noise, -1, 1), noise

    def target_policy(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        return law.equally_weighted(critic.apply(state.learner.critic.parameters, observation, action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        return portable.mlp_policy(
            state.learner.actor.parameters["params"]["mlp"]["layers"], action_size, state.experience.normalizer
        )

    claim = Claim(target_policy, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

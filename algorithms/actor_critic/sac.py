"""SAC: Soft Actor-Critic.

Paper: "Soft Actor-Critic Algorithms and Applications", Haarnoja et al., arXiv 1812.05905, which follows
"Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a Stochastic Actor", ICML 2018,
arXiv 1801.01290.

The agent maximises the return plus alpha times the entropy of its policy. A squashed Gaussian actor climbs the critic
through its own, reparameterised samples; twin critics regress on the smaller of their two targets, which curbs the
over-estimation that the climbing actor would exploit; alpha is the dual variable of the constraint that the policy
keep a given entropy on average. TQC, DSAC, REDQ, DroQ and CrossQ change the critic and keep the rest.

    target        y = r + gamma (1 - terminated) (min over i of Q_target_i(s', a') - alpha log pi(a'|s')),
                  with a' ~ pi(.|s')
    critics       sum over i of the mean of (Q_i(s, a) - y)^2
    actor         mean of alpha log pi(a|s) - min over i of Q_i(s, a),  a ~ pi(.|s)
    temperature   -log alpha (mean of log pi(a|s) + target entropy)
    targets       psi_target <- psi_target + polyak (psi - psi_target)

Differences from the paper: the temperature's loss is the log form of the authors' code (the paper's eq. 18 has alpha
in place of log alpha, which scales its gradient by alpha); the actor climbs the critics just updated, as in the paper's
algorithm (their code takes all gradients at once); networks start as PyTorch's do (their code: Glorot); the number of
critics is free.

Run:      python algorithms/actor_critic/sac.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves; brax/inverted_pendulum 1,000 of 1,000
within 20,000.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, soft
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(soft.Settings):
    """Settings of SAC; all defaults are the paper's. Floats can be swept within one compiled program."""

    num_critics: Count = 2
    """number of critics whose minimum is taken"""


# The inverted pendulum's velocities ring on the default backend: experiments/inverted_pendulum.
PRESETS = {
    "Pendulum-v1": soft.PENDULUM,
    "brax/inverted_pendulum": {"env_options": ("backend=generalized",), **soft.PENDULUM},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Soft action values, `[batch, observation]`, `[batch, actions]` -> `[batch, critics]`."""

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
    target_critic: chex.ArrayTree
    log_temperature: Trained


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_value(
    batch: Batch, next_values: jax.Array, next_log_density: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Reward plus the successor's discounted soft value, the smallest of the critics' `[batch, critics]`: `[batch]`.

    next_log_density: `[batch]`, of the action there.
    """
    chex.assert_rank(next_values, 2)
    chex.assert_shape([batch.reward, batch.discount, next_log_density], next_values.shape[:1])
    return batch.reward + batch.discount * (next_values.min(-1) - temperature * next_log_density)


def critic_loss(values: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error of `[batch, critics]` values on `[batch]` targets, mean over the batch, sum over critics.

    The authors' code takes half of it.
    """
    chex.assert_rank(values, 2)
    chex.assert_shape(target, values.shape[:1])
    return ((values - target[:, None]) ** 2).mean(0).sum()


def actor_loss(values: jax.Array, log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft value to be maximised, by the smallest of the critics' `[batch, critics]`; log_density: `[batch]`."""
    chex.assert_rank(values, 2)
    chex.assert_shape(log_density, values.shape[:1])
    return (temperature * log_density - values.min(-1)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """SAC on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    actor = soft.Actor(config.actor_hidden, action_size)
    policy = soft.policy_of(actor)
    critic = Critic(config.critic_hidden, config.num_critics)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)
    temperature_adam = optax.adam(config.temperature_learning_rate)
    target_entropy = config.target_entropy_per_action * action_size

    def update(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, Average]]:
        """One gradient step of critics, actor and temperature, and one of the target critics towards the critics."""
        next_action_key, action_key = jax.random.split(key)
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Target: soft values of the policy's next action, by the target critics.
        next_action, next_log_density = actor.sample(learner.actor.parameters, batch.next_observation, next_action_key)
        next_values = critic.apply(learner.target_critic, batch.next_observation, next_action)
        target = target_value(batch, next_values, next_log_density, temperature)

        # Critics: regress on the target.
        def critic_objective(parameters):
            values = critic.apply(parameters, batch.observation, batch.action)
            return critic_loss(values, target), values

        new_critic, (critic_value, values, norm) = descend(critic_adam, learner.critic, critic_objective)

        # Actor: climb the critics just updated, through actions of its own.
        def actor_objective(parameters):
            action, log_density = actor.sample(parameters, batch.observation, action_key)
            values = critic.apply(new_critic.parameters, batch.observation, action)
            return actor_loss(values, log_density, temperature), log_density

        new_actor, (actor_value, log_density, _) = descend(actor_adam, learner.actor, actor_objective)

        # Temperature: steer the policy's entropy to its target (eq. 18 in log form).
        new_log_temperature = soft.steer(temperature_adam, learner.log_temperature, log_density, target_entropy)

        # Target critics: follow the critics slowly.
        target_critic = networks.polyak(learner.target_critic, new_critic.parameters, config.polyak)
        metrics = {
            "critic_loss": critic_value, "actor_loss": actor_value, "temperature": temperature,
            "largest_bonus": jnp.abs(temperature * next_log_density).max(),
            "entropy": -log_density.mean(), "value": values.mean(), "target": target.mean(),
            "critic_gradient_norm": norm,
        }  # fmt: skip
        return Learner(new_actor, new_critic, target_critic, new_log_temperature), jax.tree.map(average, metrics)

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, warmup_key = jax.random.split(key, 4)
        observation, action = jnp.zeros((1, *env.observation_space(env_params).shape)), jnp.zeros((1, action_size))
        actor_parameters = actor.init(actor_key, observation)
        critic_parameters = critic.init(critic_key, observation, action)
        log_temperature = soft.log_temperature(config)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters), critic_parameters,
            begin(temperature_adam, log_temperature),
        )  # fmt: skip
        filled = experience.warm_up(env, env_params, warmup_key, config, normalize=config.normalize_observations)
        return State(learner, filled, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action, _ = policy.follow(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return state._replace(key=key, experience=lived), episodes

        def learn(state, _):
            key, sample_key, update_key = jax.random.split(state.key, 3)
            batch = experience.sample(state.experience, sample_key, config.batch_size, config.discount)
            learner, losses = update(state.learner, batch, update_key)
            return state._replace(key=key, learner=learner), losses

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        return law.equally_weighted(critic.apply(state.learner.critic.parameters, observation, action))

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

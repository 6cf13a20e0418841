"""DSAC: Distributional Soft Actor-Critic (the first version).

Paper: "Distributional Soft Actor-Critic: Off-Policy Reinforcement Learning for Addressing Value Estimation Errors",
Duan et al., IEEE TNNLS 2021, arXiv 2001.02811. Not the quantile algorithm of that name (Ma et al., arXiv 2004.14547).

SAC with one critic that learns the law of the soft return as a Gaussian. The likelihood divides the error of the mean
by the variance: where returns are uncertain the mean moves slowly, which lowers the over-estimation that a climbing
actor causes, without a second critic. Two bounds keep these gradients in hand: the standard deviation stays within
[min_std, max_std], and its own target within `target_bound` of the mean. They suit returns of one size, so rewards are
scaled by `reward_scale` c; what is reported is in the environment's units again.

    target        y = c r + gamma (1 - terminated) (Z' - alpha log pi_target(a'|s')),  a' ~ pi_target(.|s'),
                  Z' ~ N(Q_target(s', a'), sigma_target(s', a')^2), noise cut at two standard deviations
    critic        -log N(y; Q(s, a), sigma(s, a)^2), by its gradients: with C(y) = Q + clip(y - Q, -b, b)
                  d/dQ = -(y - Q) / (sigma^2 + bias),  d/dsigma = -((C(y) - Q)^2 - sigma^2) / (sigma^3 + bias)
    actor         mean of alpha log pi(a|s) - Q(s, a),  a ~ pi(.|s), once every `policy_delay` critic updates
    temperature   -log alpha (mean of log pi(a|s) + target entropy), with the actor
    targets       psi_target <- psi_target + polyak (psi - psi_target) for actor and critic, with the actor

The defaults are those of the authors' code of the paper (DSAC-v1), first weights included: Glorot's, so that both
deviations start near 1. Differences from that code:
- learner, replay and environment take turns, `policy_delay` environment steps before as many critic updates (theirs:
  four, three and six of them run apart); the actor follows the last of these updates (theirs: the first);
- step sizes do not fall (theirs: by a cosine to 1e-6); the warm-up's actions are uniform (theirs: the policy's);
- both outputs of a network share all five layers (theirs: the first three), whose GELU has its tanh form;
- the actor's noise is not cut (theirs: at three deviations); log pi is exact (theirs: 1e-4 within the logarithm) and
  that of actions in [-1, 1] (theirs: in the environment's units).
Their later code (DSAC-v2; `dsac_t.py` has its settings) takes softplus for sigma and 0.1 for the bias. With `--risk`
the actor climbs another risk measure of N(Q, sigma^2) than its mean.

Run:      python algorithms/actor_critic/dsac.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves.
"""

from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, Positive, configuration, require
from jaxrl_dist.distributional import gaussian
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, networks, soft
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.settings import check_policy_delay
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(soft.Settings):
    """Settings of DSAC; the defaults are the authors' code's. Floats can be swept within one compiled program."""

    steps_per_iteration: Count = 2
    updates_per_iteration: Count = 2
    warmup_steps: Count = 2_000
    replay_capacity: Count = 500_000

    polyak: Fraction = 0.001
    actor_learning_rate: NonNegative = 5e-5
    critic_learning_rate: NonNegative = 8e-5
    temperature_learning_rate: NonNegative = 5e-5

    actor_hidden: tuple[int, ...] = (256, 256, 256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256, 256)
    activation: Literal["gelu", "relu"] = "gelu"
    """non-linearity of all hidden layers"""
    policy_delay: Count = 2
    """critic updates per update of the actor, the temperature and the targets; divides updates_per_iteration"""
    reward_scale: Positive = 0.2
    """c, factor on the rewards that are learned from"""
    target_bound: Positive = 10.0
    """b, how far from the mean the standard deviation's target may lie, in units of scaled return"""
    min_std: Positive = 0.905
    """smallest standard deviation, below 1, in units of scaled return"""
    max_std: Positive = 54.6
    """largest standard deviation, above 1, in units of scaled return"""
    gradient_bias: NonNegative = 0.0
    """added to the denominators of the critic's gradients"""
    risk: str = "neutral"
    """the actor's aim: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Pendulum's sizes are ours, for a CPU; its rewards are learned from as they are.
PRESETS = {
    "Pendulum-v1": soft.PENDULUM | {"activation": "relu", "polyak": 0.005, "reward_scale": 1.0, "target_bound": 20.0},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Actor(soft.Actor):
    """SAC's, with Glorot's first weights and `bounded` log deviations."""

    activation: str = "gelu"
    log_std_bounds: tuple[float, float] = (-5, 1)
    glorot: bool = True

    def log_std(self, position: jax.Array) -> jax.Array:
        return bounded(position, *self.log_std_bounds)


class Critic(nn.Module):
    """Mean and standard deviation of the soft return, `[batch, observation]`, `[batch, actions]` -> two `[batch]`."""

    hidden: tuple[int, ...]
    activation: str = "gelu"

    @nn.compact
    def __call__(
        self, observation: jax.Array, action: jax.Array, min_std: float | jax.Array, max_std: float | jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inputs = jnp.concatenate([observation, action], axis=-1)
        mlp = networks.MLP((*self.hidden, 2), getattr(nn, self.activation), glorot=True, name="mlp")
        mean, position = mlp(inputs).T
        return mean, jnp.exp(bounded(position, jnp.log(min_std), jnp.log(max_std)))


def bounded(position: jax.Array, low: float | jax.Array, high: float | jax.Array) -> jax.Array:
    """Log deviations in (low, high), low < 0 < high, by a tanh on each side of 0: a cut would have no way back."""
    tanh = jnp.tanh(position / jnp.maximum(-low, high))
    return tanh * jnp.where(position > 0, high, -low)


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    target_actor: chex.ArrayTree
    target_critic: chex.ArrayTree
    log_temperature: Trained


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_return(
    config: Config, batch: Batch, next_return: jax.Array, next_log_density: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Scaled reward plus the successor's discounted soft return, all `[batch]`."""
    chex.assert_shape([batch.reward, batch.discount, next_return, next_log_density], (len(next_return),))
    return config.reward_scale * batch.reward + batch.discount * (next_return - temperature * next_log_density)


def critic_loss(config: Config, mean: jax.Array, std: jax.Array, target: jax.Array) -> jax.Array:
    """Function of `[batch]` means and deviations with the bounded gradients of the likelihood of `[batch]` targets."""
    chex.assert_shape([mean, std, target], (len(target),))
    std_target = gaussian.clip_target(mean, target, config.target_bound)
    return gaussian.likelihood_surrogate(mean, std, target, std_target, config.gradient_bias).mean()


def actor_loss(value: jax.Array, log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft value to be maximised, by the critic's `[batch]`; log_density: `[batch]`."""
    chex.assert_shape([value, log_density], (len(value),))
    return (temperature * log_density - value).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DSAC on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    check_policy_delay(config)
    for name, std, side in (("--min-std", config.min_std, "below"), ("--max-std", config.max_std, "above")):
        fits = isinstance(std, jax.core.Tracer) or (std < 1 if side == "below" else std > 1)
        require(fits, f"{name} is {std}; it must be {side} 1, where the standard deviation starts")
    actor = Actor(config.actor_hidden, action_size, config.activation)
    policy = soft.policy_of(actor, config.reward_scale)
    critic = Critic(config.critic_hidden, config.activation)
    risk = risks.parse(config.risk)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)
    temperature_adam = optax.adam(config.temperature_learning_rate)
    target_entropy = config.target_entropy_per_action * action_size

    def moments(critic_parameters, observation, action):
        return critic.apply(critic_parameters, observation, action, config.min_std, config.max_std)

    def update_critic(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of the critic."""
        next_action_key, noise_key = jax.random.split(key)
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Target: soft return of the target policy's next action, drawn from the target critic and cut as in DSAC-v1.
        next_action, next_log_density = actor.sample(learner.target_actor, batch.next_observation, next_action_key)
        next_mean, next_std = moments(learner.target_critic, batch.next_observation, next_action)
        next_return = next_mean + next_std * jnp.clip(jax.random.normal(noise_key, next_mean.shape), -2, 2)
        target = target_return(config, batch, next_return, next_log_density, temperature)

        # Critic: raise the likelihood of the target, by bounded gradients in the form of the authors' later code.
        def critic_objective(parameters):
            mean, std = moments(parameters, batch.observation, batch.action)
            return critic_loss(config, mean, std, target), (mean, std)

        new_critic, (_, (mean, std), norm) = descend(critic_adam, learner.critic, critic_objective)
        metrics = {
            "critic_loss": gaussian.negative_log_likelihood(mean, std, target).mean(),
            "value": mean.mean() / config.reward_scale, "std": std.mean() / config.reward_scale,
            "target": target.mean() / config.reward_scale,
            "largest_bonus": jnp.abs(temperature * next_log_density).max() / config.reward_scale,
            "clipped_targets": (jnp.abs(target - mean) > config.target_bound).mean(),
            "critic_gradient_norm": norm,
        }  # fmt: skip
        return learner._replace(critic=new_critic), metrics

    def update_actor(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of actor and temperature, and one step of all targets towards their online networks."""
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Actor: climb the critic just updated, through actions of its own.
        def actor_objective(parameters):
            action, log_density = actor.sample(parameters, batch.observation, key)
            mean, std = moments(learner.critic.parameters, batch.observation, action)
            # In the environment's units, for mean-variance is not proportional to them.
            value = config.reward_scale * gaussian.value(risk, mean / config.reward_scale, std / config.reward_scale)
            return actor_loss(value, log_density, temperature), log_density

        new_actor, (actor_value, log_density, _) = descend(actor_adam, learner.actor, actor_objective)

        # Temperature: steer the policy's entropy to its target.
        new_log_temperature = soft.steer(temperature_adam, learner.log_temperature, log_density, target_entropy)

        # Targets: follow actor and critic slowly.
        learner = learner._replace(
            actor=new_actor, log_temperature=new_log_temperature,
            target_actor=networks.polyak(learner.target_actor, new_actor.parameters, config.polyak),
            target_critic=networks.polyak(learner.target_critic, learner.critic.parameters, config.polyak),
        )  # fmt: skip
        return learner, {"actor_loss": actor_value, "temperature": temperature, "entropy": -log_density.mean()}

    def init(key: jax.Array) -> State:
        key, actor_key, critic_key, warmup_key = jax.random.split(key, 4)
        observation, action = jnp.zeros((1, *env.observation_space(env_params).shape)), jnp.zeros((1, action_size))
        actor_parameters = actor.init(actor_key, observation)
        critic_parameters = critic.init(critic_key, observation, action, 0.5, 2.0)
        log_temperature = soft.log_temperature(config)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters),
            actor_parameters, critic_parameters, begin(temperature_adam, log_temperature),
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
            # One update of the actor, on the last of the batches that the critic was updated with before it.
            key, sample_key, critic_key, actor_key = jax.random.split(state.key, 4)
            batches = experience.sample_batches(
                state.experience, sample_key, config.policy_delay, config.batch_size, config.discount
            )
            learner, critic_metrics = jax.lax.scan(
                lambda learner, turn: update_critic(learner, turn[0], jax.random.fold_in(critic_key, turn[1])),
                state.learner, (batches, jnp.arange(config.policy_delay)),
            )  # fmt: skip
            learner, actor_metrics = update_actor(learner, jax.tree.map(lambda x: x[-1], batches), actor_key)
            return state._replace(key=key, learner=learner), jax.tree.map(average, critic_metrics | actor_metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration // config.policy_delay)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        observation = normalize(state.experience.normalizer, observation)
        mean, std = moments(state.learner.critic.parameters, observation, action)
        return gaussian.law(mean / config.reward_scale, std / config.reward_scale)

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

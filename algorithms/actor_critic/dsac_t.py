"""DSAC-T: Distributional Soft Actor-Critic with Three Refinements.

Paper: "Distributional Soft Actor-Critic with Three Refinements", Duan et al., IEEE TPAMI 2025, arXiv 2310.05858.

DSAC learns the soft return as one Gaussian and is unstable: a sampled target makes the mean's gradient noisy, a single
critic is exploited, and its bounds must fit the rewards' size. Each refinement mends one of these and can be switched
off: y_q is then y_z, or there is one critic, or b is `target_bound` and w is 1; without all three the loss is DSAC's.

    successor     a' ~ pi_target(.|s'),  j = argmin over i of Q_target_i(s', a')                           [num_critics]
    targets       y_q = r + gamma (1 - terminated) (Q_target_j - alpha log pi_target(a'|s')),
                  y_z = the same by Z_j ~ N(Q_target_j, sigma_target_j^2), cut at 3 sigma  [expected_value_substitution]
    bound, scale  b_i = 3 m_i,  w_i = m_i^2 + bias,  with m_i the running mean of sigma_i             [variance_scaling]
    critics       d/dQ_i = -w_i (y_q - Q_i) / (sigma_i^2 + bias),  and with C = Q_i + clip(y_z - Q_i, -b_i, b_i)
                  d/dsigma_i = -w_i ((C - Q_i)^2 - sigma_i^2) / (sigma_i^3 + bias)
    actor         mean of alpha log pi(a|s) - min over i of Q_i(s, a),  a ~ pi(.|s), once every `policy_delay` updates
    temperature   -log alpha (mean of log pi(a|s) + target entropy), with the actor
    targets       psi_target <- psi_target + polyak (psi - psi_target) for actor and critics, with the actor

Differences from the paper: w has the squared running mean of sigma, as in both official codes (the paper averages its
square). `--repository-loss` is that of their DSAC-v2 code: Huber for squares, per-sample ratios m^2 / (sigma^2 + bias)
in [0.1, 10] for w; sigma settles sqrt(2) lower. Differences from that code, whose settings are the defaults:
- `policy_delay` rounds of 20 environment steps come before as many critic updates (theirs: a round before each); the
  actor follows the last of these (theirs: the first) and climbs the critics as they then are (theirs: as they were);
- the warm-up's actions are uniform (theirs: the policy's); GELU has its tanh form; log pi is exact, and that of actions
  in [-1, 1] (theirs: in the environment's units).
With `--risk` the actor climbs the smallest of another risk measure of N(Q_i, sigma_i^2) than the mean.

Run:      python algorithms/actor_critic/dsac_t.py --env-id Pendulum-v1
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
    """Settings of DSAC-T; the defaults are the authors' code's. Floats can be swept within one compiled program."""

    num_envs: Count = 20
    steps_per_iteration: Count = 2
    updates_per_iteration: Count = 2

    actor_learning_rate: NonNegative = 1e-4
    critic_learning_rate: NonNegative = 1e-4
    initial_temperature: Positive = 2.718

    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    activation: Literal["gelu", "relu"] = "gelu"
    """non-linearity of all hidden layers"""
    policy_delay: Count = 2
    """critic updates per update of the actor, the temperature and the targets; divides updates_per_iteration"""
    expected_value_substitution: bool = True
    """first refinement: the mean's target takes the successor's mean, not a sample"""
    num_critics: Count = 2
    """second refinement: Gaussians of which the one with the smallest mean counts; 1 switches it off"""
    variance_scaling: bool = True
    """third refinement: bound and gradient scale follow the running mean of the standard deviation"""
    bound_width: Positive = 3.0
    """xi, the bound on the deviation's target in units of that running mean"""
    running_rate: Fraction = 0.005
    """how far the running mean moves towards the batch's at every update"""
    gradient_bias: NonNegative = 0.1
    """added to the denominators of the critics' gradients, and to their scale"""
    target_bound: Positive = 20.0
    """the bound without the third refinement, in units of return"""
    repository_loss: bool = False
    """the loss of the authors' DSAC-v2 code instead of the paper's"""
    risk: str = "neutral"
    """the actor's aim: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


PRESETS = {"Pendulum-v1": soft.PENDULUM | {"num_envs": 1, "activation": "relu"}}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Means and deviations of the soft return, `[batch, observation]`, `[batch, actions]` -> two `[batch, critics]`."""

    hidden: tuple[int, ...]
    num_critics: int
    activation: str = "gelu"

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        mlp = networks.EnsembleMLP(self.num_critics, (*self.hidden, 2), getattr(nn, self.activation), name="mlp")
        outputs = mlp(jnp.concatenate([observation, action], axis=-1))
        return outputs[..., 0], nn.softplus(outputs[..., 1])


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    actor: Trained
    critic: Trained
    target_actor: chex.ArrayTree
    target_critic: chex.ArrayTree
    log_temperature: Trained
    running_std: jax.Array  # m, `[critics]`; 0 before the first update


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def of_lowest(mean: jax.Array, values: jax.Array) -> jax.Array:
    """What the critic with the smallest mean says of each row, both `[batch, critics]` -> `[batch]`."""
    return jnp.take_along_axis(values, mean.argmin(-1, keepdims=True), axis=-1)[:, 0]


def target_returns(
    config: Config, batch: Batch, next_mean: jax.Array, next_sample: jax.Array, next_log_density: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """y_q and y_z, `[batch]` each, from the target critics' means and samples, `[batch, critics]`."""
    chex.assert_equal_shape([next_mean, next_sample])
    chex.assert_shape([batch.reward, batch.discount, next_log_density], next_mean.shape[:1])
    mean_target, std_target = (  # by the mean, also for the sample: both are of the same critic
        batch.reward + batch.discount * (of_lowest(next_mean, x) - temperature * next_log_density)
        for x in (next_mean, next_sample)
    )
    return (mean_target if config.expected_value_substitution else std_target), std_target


def running_average(config: Config, running_std: jax.Array, std: jax.Array) -> jax.Array:
    """m after a batch of standard deviations `[batch, critics]`, a constant: `[critics]`."""
    chex.assert_shape(std, (None, *running_std.shape))
    now = jax.lax.stop_gradient(std).mean(0)
    return jnp.where(running_std == 0, now, running_std + config.running_rate * (now - running_std))


def critic_loss(
    config: Config, mean: jax.Array, std: jax.Array, targets: tuple[jax.Array, jax.Array], running_std: jax.Array
) -> jax.Array:
    """Function of mean and std `[batch, critics]` with the gradients above, summed over critics and averaged over rows;
    targets: y_q and y_z, `[batch]`; running_std: m with the present batch in it, `[critics]`."""
    chex.assert_rank([*targets, running_std], 1)
    chex.assert_shape([mean, std], (len(targets[0]), len(running_std)))
    mean_target, std_target = (target[:, None] for target in targets)
    bound, scale = config.target_bound, 1.0
    if config.variance_scaling:
        bound, scale = config.bound_width * running_std, running_std**2 + config.gradient_bias
    std_target = gaussian.clip_target(mean, std_target, bound)
    if config.repository_loss:
        still_mean, still_std = jax.lax.stop_gradient((mean, std))
        ratio = jnp.clip(running_std**2 / (still_std**2 + config.gradient_bias), 0.1, 10)
        excess = still_std**2 - optax.huber_loss(still_mean, std_target, delta=50.0)
        losses = optax.huber_loss(mean, mean_target, delta=50.0) + std * excess / (still_std + config.gradient_bias)
        return (ratio * losses).mean(0).sum()
    losses = gaussian.likelihood_surrogate(mean, std, mean_target, std_target, config.gradient_bias)
    return (scale * losses).mean(0).sum()


def actor_loss(values: jax.Array, log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft value to be maximised, by the smallest of the critics' `[batch, critics]`; log_density: `[batch]`."""
    chex.assert_rank(values, 2)
    chex.assert_shape(log_density, values.shape[:1])
    return (temperature * log_density - values.min(-1)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DSAC-T on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    check_policy_delay(config)
    fits = config.variance_scaling or not config.repository_loss
    require(fits, "--repository-loss is True; it needs --variance-scaling, which is part of it")
    actor = soft.Actor(config.actor_hidden, action_size, config.activation, log_std_bounds=(-20, 0.5))
    policy = soft.policy_of(actor)
    critic = Critic(config.critic_hidden, config.num_critics, config.activation)
    risk = risks.parse(config.risk)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)
    temperature_adam = optax.adam(config.temperature_learning_rate)
    target_entropy = config.target_entropy_per_action * action_size

    def update_critic(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of the critics, and of the running mean of their deviations."""
        next_action_key, noise_key = jax.random.split(key)
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Targets (refinements 1, 2): soft mean and a drawn soft return of the target policy's next action.
        next_action, next_log_density = actor.sample(learner.target_actor, batch.next_observation, next_action_key)
        next_mean, next_std = critic.apply(learner.target_critic, batch.next_observation, next_action)
        next_sample = next_mean + next_std * jnp.clip(jax.random.normal(noise_key, next_mean.shape), -3, 3)
        targets = target_returns(config, batch, next_mean, next_sample, next_log_density, temperature)

        # Critics (refinement 3): raise the likelihood of the targets, bounded and scaled by the running deviation.
        def critic_objective(parameters):
            mean, std = critic.apply(parameters, batch.observation, batch.action)
            running_std = running_average(config, learner.running_std, std)
            return critic_loss(config, mean, std, targets, running_std), (mean, std, running_std)

        new_critic, (_, (mean, std, running_std), norm) = descend(critic_adam, learner.critic, critic_objective)
        metrics = {
            "critic_loss": gaussian.negative_log_likelihood(mean, std, targets[1][:, None]).mean(),
            "value": mean.mean(), "std": std.mean(), "running_std": running_std.mean(), "target": targets[0].mean(),
            "largest_bonus": jnp.abs(temperature * next_log_density).max(), "critic_gradient_norm": norm,
        }  # fmt: skip
        return learner._replace(critic=new_critic, running_std=running_std), metrics

    def update_actor(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of actor and temperature, and one step of all targets towards their online networks."""
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Actor: climb the critics just updated, through actions of its own.
        def actor_objective(parameters):
            action, log_density = actor.sample(parameters, batch.observation, key)
            values = gaussian.value(risk, *critic.apply(learner.critic.parameters, batch.observation, action))
            return actor_loss(values, log_density, temperature), log_density

        new_actor, (actor_value, log_density, _) = descend(actor_adam, learner.actor, actor_objective)

        # Temperature: steer the policy's entropy to its target.
        new_log_temperature = soft.steer(temperature_adam, learner.log_temperature, log_density, target_entropy)

        # Targets: follow actor and critics slowly.
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
        critic_parameters = critic.init(critic_key, observation, action)
        log_temperature = soft.log_temperature(config)
        learner = Learner(
            begin(actor_adam, actor_parameters), begin(critic_adam, critic_parameters), actor_parameters,
            critic_parameters, begin(temperature_adam, log_temperature), jnp.zeros(config.num_critics),
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
            # One update of the actor, on the last of the batches that the critics were updated with before it.
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
        mean, std = critic.apply(state.learner.critic.parameters, observation, action)
        return gaussian.law(of_lowest(mean, mean), of_lowest(mean, std))

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

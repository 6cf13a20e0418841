"""TQC: Truncated Quantile Critics.

Paper: "Controlling Overestimation Bias with Truncated Mixture of Continuous Distributional Quantile Critics",
Kuznetsov, Shvechikov, Grishin, Vetrov, ICML 2020, arXiv 2005.04269.

An actor exploits every positive error of its critic, and bootstrapping spreads the damage. Instead of taking the
minimum of two critics, TQC learns the whole distribution of the soft return with N critics of M quantiles each, pools
the N * M atoms of the targets, and drops the largest d * N of them. How much to distrust the critics becomes as fine a
choice as one atom in N * M, and the number of critics no longer decides it.

    target atoms  y_k = r + gamma (1 - terminated) (z_(k) - alpha log pi(a'|s')),  k = 1 .. (M - d) N,
                  with a' ~ pi(.|s') and z_(k) the k-th smallest atom of all target critics at (s', a')
    critics       mean over critics n, quantiles m, targets k of |tau_m - 1{u < 0}| huber(u),  u = y_k - z_nm(s, a),
                  tau_m = (2m - 1) / 2M
    actor         mean of alpha log pi(a|s) - mean over n, m of z_nm(s, a),  a ~ pi(.|s): all atoms, no truncation
    temperature   -log alpha (mean of log pi(a|s) + target entropy)
    targets       psi_target <- psi_target + polyak (psi - psi_target)

Differences from the paper: none in the equations. The actor and the temperature are updated after the critic and see
its new parameters (the PyTorch code computes all three gradients first). The warm-up is that of the TensorFlow code
(the PyTorch code has none and acts by its policy from the start). With `--risk` the actor climbs another risk measure
of all atoms than their mean.

Run:      python algorithms/actor_critic/tqc.py --env-id Pendulum-v1
Expected: Pendulum-v1 above -200 within 15,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Natural, NonNegative, configuration, require
from jaxrl_dist.distributional import law, quantile
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import Risk
from jaxrl_dist.learning import experience, networks, soft
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import continuous_action_size

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(soft.Settings):
    """Settings of TQC; the defaults are the paper's. Floats can be swept within one compiled program."""

    critic_hidden: tuple[int, ...] = (512, 512, 512)
    num_critics: Count = 5
    """N, the number of critics"""
    num_quantiles: Count = 25
    """M, the number of quantiles each critic predicts"""
    quantiles_dropped: Natural = 2
    """d, the number of the largest target atoms dropped per critic"""
    kappa: NonNegative = 1.0
    """threshold of the quantile Huber loss; 0 is plain quantile regression"""
    risk: str = "neutral"
    """the actor's aim: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# d is the paper's (its table 1) per environment.
PRESETS = {
    "Pendulum-v1": {**soft.PENDULUM, "num_critics": 3},
    "brax/hopper": {"quantiles_dropped": 5},
    "brax/halfcheetah": {"quantiles_dropped": 0},
    "brax/walker2d": {"quantiles_dropped": 2},
    "brax/ant": {"quantiles_dropped": 2},
    "brax/humanoid": {"quantiles_dropped": 2},
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """Atoms of the soft return, `[batch, observation]`, `[batch, actions]` -> `[batch, critics, quantiles]`."""

    hidden: tuple[int, ...]
    num_critics: int
    num_quantiles: int

    @nn.compact
    def __call__(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        inputs = jnp.concatenate([observation, action], axis=-1)
        return networks.EnsembleMLP(self.num_critics, (*self.hidden, self.num_quantiles), name="mlp")(inputs)


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


def target_atoms(
    config: Config, batch: Batch, next_atoms: jax.Array, next_log_density: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Truncated mixture of the successor's soft returns, `[batch, critics * (quantiles - dropped)]`.

    next_atoms: `[batch, critics, quantiles]`; next_log_density: `[batch]`, of the action there.
    """
    chex.assert_rank(next_atoms, 3)
    chex.assert_shape([batch.reward, batch.discount, next_log_density], next_atoms.shape[:1])
    kept = quantile.truncate_pooled(next_atoms, config.quantiles_dropped)
    return batch.reward[:, None] + batch.discount[:, None] * (kept - temperature * next_log_density[:, None])


def critic_loss(config: Config, atoms: jax.Array, target: jax.Array) -> jax.Array:
    """Quantile Huber loss of `[batch, critics, quantiles]` atoms on `[batch, targets]`, mean over every axis.

    As in the PyTorch code; in the TensorFlow code every critic has a mean of its own.
    """
    chex.assert_rank(target, 2)
    chex.assert_shape(atoms, (len(target), None, config.num_quantiles))
    fractions = quantile.midpoints(config.num_quantiles)
    return quantile.quantile_huber_loss(atoms, target, fractions, kappa=config.kappa, over_predicted="mean").mean()


def actor_loss(risk: Risk, atoms: jax.Array, log_density: jax.Array, temperature: jax.Array) -> jax.Array:
    """Soft value to be maximised: the mean, or `risk`, of *all* atoms `[batch, critics, quantiles]` pooled.

    log_density: `[batch]`. The TensorFlow code can truncate here, too (`p_opt_crop`, off).
    """
    chex.assert_rank(atoms, 3)
    chex.assert_shape(log_density, atoms.shape[:1])
    values = risks.value_of_atoms(risk, atoms.reshape(atoms.shape[0], -1))
    return (temperature * log_density - values).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """TQC on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    action_size = continuous_action_size(env, env_params)
    config.check()
    clock = config.clock()
    require(
        config.quantiles_dropped < config.num_quantiles,
        f"--quantiles-dropped is {config.quantiles_dropped}; it must be below --num-quantiles = {config.num_quantiles}",
    )
    actor = soft.Actor(config.actor_hidden, action_size)
    policy = soft.policy_of(actor)
    critic = Critic(config.critic_hidden, config.num_critics, config.num_quantiles)
    risk = risks.parse(config.risk)
    actor_adam = optax.adam(config.actor_learning_rate)
    critic_adam = optax.adam(config.critic_learning_rate)
    temperature_adam = optax.adam(config.temperature_learning_rate)
    target_entropy = config.target_entropy_per_action * action_size

    def update(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, Average]]:
        """One gradient step of critics, actor and temperature, and one of the target critics towards the critics."""
        next_action_key, action_key = jax.random.split(key)
        temperature = jnp.exp(learner.log_temperature.parameters)

        # Target: soft returns of the policy's next action, by the target critics, without the largest atoms.
        next_action, next_log_density = actor.sample(learner.actor.parameters, batch.next_observation, next_action_key)
        next_atoms = critic.apply(learner.target_critic, batch.next_observation, next_action)
        target = target_atoms(config, batch, next_atoms, next_log_density, temperature)

        # Critics: regress on the target.
        def critic_objective(parameters):
            atoms = critic.apply(parameters, batch.observation, batch.action)
            return critic_loss(config, atoms, target), atoms

        new_critic, (critic_value, atoms, norm) = descend(critic_adam, learner.critic, critic_objective)

        # Actor: climb the critics just updated, through actions of its own.
        def actor_objective(parameters):
            action, log_density = actor.sample(parameters, batch.observation, action_key)
            atoms = critic.apply(new_critic.parameters, batch.observation, action)
            return actor_loss(risk, atoms, log_density, temperature), log_density

        new_actor, (actor_value, log_density, _) = descend(actor_adam, learner.actor, actor_objective)

        # Temperature: steer the policy's entropy to its target.
        new_log_temperature = soft.steer(temperature_adam, learner.log_temperature, log_density, target_entropy)

        # Target critics: follow the critics slowly.
        target_critic = networks.polyak(learner.target_critic, new_critic.parameters, config.polyak)
        metrics = {
            "critic_loss": critic_value, "actor_loss": actor_value, "temperature": temperature,
            "largest_bonus": jnp.abs(temperature * next_log_density).max(),
            "entropy": -log_density.mean(), "value": atoms.mean(), "target": target.mean(),
            "truncation": next_atoms.mean() - quantile.truncate_pooled(next_atoms, config.quantiles_dropped).mean(),
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
        atoms = critic.apply(state.learner.critic.parameters, observation, action)
        return law.equally_weighted(atoms.reshape(observation.shape[0], -1))

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

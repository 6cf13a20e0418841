"""RND: exploration by Random Network Distillation, on PPO.

Paper: "Exploration by Random Network Distillation", Burda, Edwards, Storkey, Klimov, arXiv 1810.12894.

A random network that never changes answers to every observation, and a predictor learns its answers where the agent has
been. How far the predictor is off says how new an observation is, and is a second reward for having got there. Rewards
and bonuses have a value each: the return of rewards ends with the episode, that of bonuses goes on through its end, or
the agent would shun new places in which episodes end.

    bonus          b_t = 1/D |f(x) - c(x)|^2,  x = (s_{t+1} - mean) / deviation, cut to ±5
    its reward     i_t = b_t / deviation of F,  F_t = gamma_I F_{t-1} + b_t in each environment, from its first step on
    advantages     A^E of rewards as in PPO; A^I of i_t, where nothing ends: after a last step comes the next start
    advantage      A = c_E A^E + c_I A^I
    loss           PPO's with A + c_v (loss of V^E + loss of V^I) + mean over kept steps of 1/D |f(x) - c(x)|^2

s_{t+1} is the true successor; c is the random network, f the predictor, D the number of their outputs. Mean and
deviation are of observations, first those of random actions (`--warmup-steps`); the policy sees observations as they
are. A part of all steps is kept for the predictor, drawn anew for each minibatch, lest it learn faster where there are
more environments. As in the authors' code advantages are not normalised and values not clipped; PPO's other settings
stand in `policy_gradient/ppo.py`, whose text explains them.

Differences from the paper's code (openai/random-network-distillation), where advantages of rewards take a time limit
for an end: perceptrons, not deep convolutions, and no memory; the policy and both values have networks of their own,
but for images, of which policy and V^E share the convolution; leaky units have the slope 0.01, not 0.2; gradients are
cut by their norm; bonuses are also cut to ±10 deviations; the warm-up is 10,000 steps, not 819,200; statistics of
observations are those of successors; minibatches are of steps, not of environments. Rewards are neither cut nor scaled.
Evaluation takes the mode.

Run:      python algorithms/policy_gradient/rnd.py --env-id DeepSea-bsuite
Expected: DeepSea-bsuite (8 x 8) above 0.9 of 0.99 within 50,000 steps; larger ones in experiments/deep_sea.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import configuration
from jaxrl_dist.learning import clipped, distillation, draws, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import approximate_kl, mean_of, normalized, policy_loss, value_loss
from jaxrl_dist.learning.distillation import BOUND, Batch
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics
from jaxrl_dist.learning.optimization import Trained, begin, descend

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(distillation.Settings):
    """Settings of RND; the defaults are those of its code for Atari. Floats can be swept within one program."""


# Sizes for a CPU.
PRESETS = {
    "DeepSea-bsuite": {
        "total_steps": 100_000, "num_envs": 16, "num_steps": 64, "warmup_steps": 4_096, "predictor_share": 1.0,
        "discount": 0.99, "clip_range": 0.2, "entropy_weight": 0.01, "learning_rate": 1e-3,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    """policy and value of rewards ("params"), value of bonuses ("critic"), predictor ("predictor")"""
    target: Any
    """parameters of the random network"""
    interaction: Interaction
    statistics: RunningStatistics
    """of the bonus's observations"""
    scale: RewardScale
    """of the bonuses"""
    key: jax.Array


# -- Bonus ------------------------------------------------------------------------------------------------------------


def bonus(prediction: jax.Array, answer: jax.Array) -> jax.Array:
    """How new observations are: `[rows, D]` of the predictor and the random network -> `[rows]`."""
    chex.assert_equal_shape([prediction, answer])
    return ((prediction - answer) ** 2).mean(-1)


# -- Losses -----------------------------------------------------------------------------------------------------------


def predictor_loss(prediction: jax.Array, answer: jax.Array, kept: jax.Array) -> jax.Array:
    """Mean squared error of the rows `[rows]` that are kept, of `[rows, D]` predictions."""
    chex.assert_equal_shape([prediction, answer])
    return mean_of(((prediction - answer) ** 2).mean(-1), kept)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """RND on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock = distillation.clock_of(config)
    network = clipped.network_of(config, env, env_params)
    critic, predictor, random_network = distillation.networks_of(config)
    optimizer = clipped.optimizer_of(config)
    policy = clipped.policy_of(network, config.discount)
    clip_values = config.clip_range if config.clip_values else None

    def update(carry: tuple[Trained, jax.Array], batch: Batch) -> tuple[tuple[Trained, jax.Array], dict]:
        """One gradient step on a minibatch."""
        learner, key = carry
        key, kept_key = jax.random.split(key)
        kept = draws.uniform(kept_key, batch.value.shape) < config.predictor_share

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            advantage = normalized(batch.advantage) if config.normalize_advantages else batch.advantage
            of_policy = policy_loss(ratio, advantage, config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, clip_values)
            value = critic.apply(parameters["critic"], batch.observation)[:, 0]
            of_bonuses = value_loss(value, batch.intrinsic_value, batch.intrinsic_target, clip_values)
            prediction = predictor.apply(parameters["predictor"], batch.seen)
            of_predictor = predictor_loss(prediction, batch.answer, kept)
            loss = of_policy + config.value_weight * (of_value + of_bonuses) - config.entropy_weight * entropy
            return loss + of_predictor, {
                "policy_loss": of_policy, "value_loss": of_value, "intrinsic_value_loss": of_bonuses,
                "predictor_loss": of_predictor, "entropy": entropy, "approximate_kl": approximate_kl(log_ratio),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return (learner, key), metrics | {"loss": loss, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, network_key, critic_key, predictor_key, target_key, start_key, warmup_key = jax.random.split(key, 7)
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        parameters = network.init(network_key, observation) | {
            "critic": critic.init(critic_key, observation), "predictor": predictor.init(predictor_key, observation),
        }  # fmt: skip
        target = random_network.init(target_key, observation)

        # Statistics of what random actions lead to; the environments go on from there.
        now = interaction.start(env, env_params, start_key, config.num_envs)
        now, statistics = distillation.begin_statistics(
            env, env_params, now, warmup_key, clock.warmup_steps // config.num_envs
        )
        scale = normalization.create_scale(config.num_envs)
        return State(begin(optimizer, parameters), target, now, statistics, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key, update_key = jax.random.split(state.key, 4)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy, with how likely they were.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, drawn = policy.explore(state, observation, key)
            return action, memory, drawn

        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )
        flat = lambda x: x.reshape(clock.env_steps, *x.shape[2:])  # noqa: E731

        # Bonus of every true successor, in parts of the deviation of sums that no end of an episode resets.
        successor = flat(lived.next_observation).astype(jnp.float32)
        seen = normalization.normalize(state.statistics, successor, BOUND)
        novelty = bonus(predictor.apply(parameters["predictor"], seen), random_network.apply(state.target, seen))
        goes_on = jnp.zeros_like(lived.terminated)
        scale, intrinsic_reward = normalization.scale_rewards(
            state.scale, novelty.reshape(goes_on.shape), goes_on, config.intrinsic_discount
        )

        # Advantages of rewards: with the value of the true successor, also at a time limit.
        value, next_value = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (lived.observation, lived.next_observation)
        )
        of_rewards = returns.gae(
            lived.reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )
        # Of bonuses: with the value of what comes next, which after a last step is the next episode's start.
        observations = jnp.concatenate([lived.observation, now.observation[None]])
        intrinsic_value = jax.vmap(lambda x: critic.apply(parameters["critic"], x)[:, 0])(observations)
        of_bonuses = returns.gae(
            intrinsic_reward, intrinsic_value[:-1], intrinsic_value[1:], goes_on, goes_on,
            config.intrinsic_discount, config.gae_decay,
        )  # fmt: skip
        advantage = config.extrinsic_weight * of_rewards + config.intrinsic_weight * of_bonuses

        # Epochs of minibatches; the predictor learns with statistics of all that was seen.
        statistics = normalization.update(state.statistics, successor)
        seen = normalization.normalize(statistics, successor, BOUND)
        batch = jax.tree.map(
            flat, (lived.observation, action, log_density, advantage, value, of_rewards + value,
                   intrinsic_value[:-1], of_bonuses + intrinsic_value[:-1])
        )  # fmt: skip
        batch = Batch(*batch, seen, random_network.apply(state.target, seen))
        (learner, _), losses = rollouts.epochs(
            update, (state.learner, update_key), batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        metrics = losses | {
            "value": value, "target": batch.target, "bonus": novelty, "intrinsic_reward": intrinsic_reward,
            "intrinsic_value": batch.intrinsic_value,
        }  # fmt: skip
        return State(learner, state.target, now, statistics, scale, key), episodes | jax.tree.map(average, metrics)

    return Agent(init, step, memoryless(policy.act), clock, policy.claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

"""DRND: exploration by Distributional Random Network Distillation, on PPO.

Paper: "Exploration and Anti-Exploration with Distributional Random Network Distillation", Yang, Tao, Lyu, Li, ICML
2024, arXiv 2401.09750; on "Exploration by Random Network Distillation", Burda et al., arXiv 1810.12894.

RND (`policy_gradient/rnd.py`) with N random networks in place of one. The predictor learns the answer of one of them,
drawn anew for every step of every minibatch, and so comes to their mean, the more surely the more often it was there:
after n draws its square lies above that of the mean by 1/n of their variance, on average. So the bonus knows two
things: how far the predictor is off, which depends less on the luck of one network, and how often a place was seen.

    answers        mu = mean_k c_k(x),  B = mean_k c_k(x)^2, of each of D features
    distance       b_1 = |f(x) - mu|^2
    count          y = (f(x)^2 - mu^2) / (B - mu^2), about 1/n:
                   sum   b_2 = sum_D sqrt(clip(|y|, 1e-6, 1))
                   mean  b_2 = mean_D sqrt(clip(|y|, 1e-3, 1))
                   rate  b_2 = sqrt(max(mean_D y, 1e-6)), about 1 / sqrt(n)
    bonus          b_t = alpha b_1 + (1 - alpha) b_2
    loss           PPO's with A + c_v (loss of V^E + loss of V^I) + mean over kept steps of 1/D |f(x) - c_k(x)|^2

The rest is RND's. Of the authors' code (yk7333/DRND) several versions are about, with a sum (`--bonus-count sum`) and
with a mean, and alphas of 0.9, 0.95 and 0.99. Neither is 1 / sqrt(n): y is 1/n on average only, a single feature's
differs from that by about 1 / sqrt(n), so that the mean of roots falls like n^(-1/4). `--bonus-count rate` averages
first. All of them count if the predictor is at the mean of all that was drawn. One that takes steps of the same size
stays near the mean of the last draws, and then b_1 does most of the work (tests/algorithms/test_drnd.py).

Differences from the code: those of RND's file, and here 1e-8 is added to B - mu^2, for features in which all networks
agree; what bonuses are divided by counts every step of every environment, not one for each row of the rollout; the 0.5
of its gradient norm, computed and not used there, is used.

Run:      python algorithms/policy_gradient/drnd.py --env-id DeepSea-bsuite
Expected: DeepSea-bsuite (8 x 8) above 0.9 of 0.99 within 50,000 steps; larger ones in experiments/deep_sea.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, Fraction, configuration
from jaxrl_dist.learning import clipped, distillation, draws, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import approximate_kl, mean_of, normalized, policy_loss, value_loss
from jaxrl_dist.learning.distillation import BOUND, Batch
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics
from jaxrl_dist.learning.optimization import Trained, begin, descend

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(distillation.Settings):
    """Settings of DRND; the defaults are those of its code for Atari. Floats can be swept within one program."""

    num_steps: Count = 256
    num_targets: Count = 5
    """N, random networks"""
    bonus_count: Literal["sum", "mean", "rate"] = "sum"
    """how the second part of the bonus is made of the features' estimates of 1/n"""
    distance_weight: Fraction = 0.95
    """alpha, weight of the distance to the mean; 1 - alpha is the count's"""


# Sizes for a CPU.
PRESETS = {
    "DeepSea-bsuite": {
        "total_steps": 100_000, "num_envs": 16, "num_steps": 64, "warmup_steps": 4_096, "predictor_share": 1.0,
        "discount": 0.99, "clip_range": 0.2, "entropy_weight": 0.01, "learning_rate": 1e-3, "distance_weight": 0.9,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    """policy and value of rewards ("params"), value of bonuses ("critic"), predictor ("predictor")"""
    target: Any
    """parameters of the random networks, leaves `[N, ...]`"""
    interaction: Interaction
    statistics: RunningStatistics
    """of the bonus's observations"""
    scale: RewardScale
    """of the bonuses"""
    key: jax.Array


# -- Bonus ------------------------------------------------------------------------------------------------------------


def bonus(prediction: jax.Array, answers: jax.Array, distance_weight: float | jax.Array, count: str) -> jax.Array:
    """How new observations are: `[rows, D]` of the predictor and `[rows, N, D]` of the random networks -> `[rows]`."""
    chex.assert_equal_shape([prediction, answers[:, 0]])
    mean, square = answers.mean(1), (answers**2).mean(1)
    distance = ((prediction - mean) ** 2).sum(-1)
    estimate = (prediction**2 - mean**2) / (square - mean**2 + 1e-8)  # its mean over draws is 1/n
    if count == "rate":
        root = jnp.sqrt(jnp.maximum(estimate.mean(-1), 1e-6))
    elif count == "mean":
        root = jnp.sqrt(jnp.clip(jnp.abs(estimate), 1e-3, 1)).mean(-1)
    else:
        root = jnp.sqrt(jnp.clip(jnp.abs(estimate), 1e-6, 1)).sum(-1)
    return distance_weight * distance + (1 - distance_weight) * root


# -- Losses -----------------------------------------------------------------------------------------------------------


def predictor_loss(prediction: jax.Array, answers: jax.Array, drawn: jax.Array, kept: jax.Array) -> jax.Array:
    """Mean squared error of the rows `[rows]` that are kept, of `[rows, D]` predictions of one of the `[rows, N, D]`
    answers each, that of the network which is `[rows]` drawn."""
    chex.assert_equal_shape([prediction, answers[:, 0]])
    answer = jnp.take_along_axis(answers, drawn[:, None, None], axis=1)[:, 0]
    return mean_of(((prediction - answer) ** 2).mean(-1), kept)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DRND on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock = distillation.clock_of(config)
    network = clipped.network_of(config, env, env_params)
    critic, predictor, random_network = distillation.networks_of(config)
    optimizer = clipped.optimizer_of(config)
    policy = clipped.policy_of(network, config.discount)
    clip_values = config.clip_range if config.clip_values else None
    answers_of = jax.vmap(random_network.apply, in_axes=(0, None), out_axes=1)

    def update(carry: tuple[Trained, jax.Array], batch: Batch) -> tuple[tuple[Trained, jax.Array], dict]:
        """One gradient step on a minibatch."""
        learner, key = carry
        key, kept_key, drawn_key = jax.random.split(key, 3)
        kept = draws.uniform(kept_key, batch.value.shape) < config.predictor_share
        drawn = draws.integers(drawn_key, batch.value.shape, config.num_targets)

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
            of_predictor = predictor_loss(prediction, batch.answer, drawn, kept)
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
        targets = jax.random.split(target_key, config.num_targets)
        target = jax.vmap(random_network.init, in_axes=(0, None))(targets, observation)

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
        prediction, answers = predictor.apply(parameters["predictor"], seen), answers_of(state.target, seen)
        novelty = bonus(prediction, answers, config.distance_weight, config.bonus_count)
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
        batch = Batch(*batch, seen, answers_of(state.target, seen))
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

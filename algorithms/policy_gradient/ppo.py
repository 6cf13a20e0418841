"""PPO: Proximal Policy Optimization, for a choice of actions and for continuous ones.

Paper: "Proximal Policy Optimization Algorithms", Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347;
advantages: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", Schulman et al., arXiv
1506.02438.

The policy acts for a while, and what it did is used for several epochs of minibatches. A step that makes an action more
likely pays only until its probability has changed by the factor 1 + epsilon: there the objective is flat, so that
nothing is gained by leaving the policy whose actions are at hand.

    advantage     A_t = delta_t + gamma lambda A_{t+1} within an episode,
                  delta_t = r_t + gamma (1 - terminated) V(s_{t+1}) - V(s_t)
    ratio         rho = pi(a|s) / pi_old(a|s)
    policy        -mean of min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), A normalised within the minibatch
    value         mean of 1/2 max((V - R)^2, (V_old + clip(V - V_old, -epsilon, epsilon) - R)^2),  R = A + V_old
    loss          policy + c_v value - c_e entropy of pi

s_{t+1} is the true successor: at a time limit the advantage takes its value, and nothing of the next episode. CleanRL's
and purejaxrl's codes take a time limit for an end.

Differences from the paper, all from its authors' code (openai/baselines) or CleanRL's: the value's loss is clipped
(`--clip-values`), advantages are normalised, gradients cut by their norm, step sizes fall in a line
(`--annealing-steps`), weights start orthogonal, observations and rewards may be normalised. Continuous actions are
Gaussian, with a deviation that does not depend on the state, and cut to [-1, 1] where the environment takes them.
Evaluation takes the mode. Statistics are those from before the rollout, so that the first minibatch has ratios of 1;
rewards are divided by one number per rollout.

Run:      python algorithms/policy_gradient/ppo.py --env-id CartPole-v1
Expected: CartPole-v1 above 400 of 500 within 100,000 steps, Pendulum-v1 above -220 within 300,000.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import configuration
from jaxrl_dist.learning import clipped, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, normalized, policy_loss, value_loss
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PPO; the defaults are CleanRL's for classic control. Floats can be swept within one program."""

    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""


# Sizes for a CPU.
PRESETS = {
    "CartPole-v1": {"total_steps": 100_000, "num_envs": 8, "learning_rate": 1e-3},
    "Acrobot-v1": {"total_steps": 200_000, "num_envs": 8, "learning_rate": 1e-3},
    "Catch-bsuite": {"total_steps": 50_000, "num_envs": 8, "learning_rate": 1e-3},
    "Pendulum-v1": {
        "total_steps": 300_000, "num_envs": 16, "num_epochs": 10, "num_minibatches": 8, "discount": 0.9,
        "entropy_weight": 0.0, "learning_rate": 1e-3, "annealing_steps": 300_000, "clip_values": False,
        "normalize_rewards": True,
    },
}  # fmt: skip

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PPO on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock = clipped.clock_of(config)
    network = clipped.network_of(config, env, env_params)
    optimizer = clipped.optimizer_of(config)
    policy = clipped.policy_of(
        network, config.discount, lambda state: state.normalizer, lambda state: normalization.unit(state.scale)
    )

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on a minibatch."""

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio, normalized(batch.advantage), config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, config.clip_range if config.clip_values else None)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy  # eq. 9
            return loss, {
                "policy_loss": of_policy, "value_loss": of_value, "entropy": entropy,
                "approximate_kl": (ratio - 1 - log_ratio).mean(),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return learner, metrics | {"loss": loss, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        shape = env.observation_space(env_params).shape
        learner = begin(optimizer, network.init(network_key, jnp.zeros((1, *shape))))
        now = interaction.start(env, env_params, start_key, config.num_envs)
        normalizer = normalization.create(shape) if config.normalize_observations else None
        scale = normalization.create_scale(config.num_envs) if config.normalize_rewards else None
        return State(learner, now, normalizer, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key = jax.random.split(state.key, 3)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy, with how likely they were.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, drawn = policy.explore(state, observation, key)
            return action, memory, drawn

        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )

        # Advantages: with the value of the true successor, also at a time limit.
        done = lived.terminated | lived.truncated
        scale, reward = normalization.scale_rewards(state.scale, lived.reward, done, config.discount)
        observation, next_observation = (
            normalize(state.normalizer, x) for x in (lived.observation, lived.next_observation)
        )
        value, next_value = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (observation, next_observation)
        )
        advantage = returns.gae(
            reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )
        batch = Batch(observation, action, log_density, value, advantage, advantage + value)
        batch = jax.tree.map(lambda x: x.reshape(clock.env_steps, *x.shape[2:]), batch)

        # Epochs of minibatches.
        learner, losses = rollouts.epochs(
            update, state.learner, batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        normalizer = state.normalizer
        if normalizer is not None:
            seen = lived.observation.reshape(clock.env_steps, *lived.observation.shape[2:])
            normalizer = normalization.update(normalizer, seen)
        unit = normalization.unit(scale)
        metrics = losses | {"value": value * unit, "target": batch.target * unit}
        return State(learner, now, normalizer, scale, key), episodes | jax.tree.map(average, metrics)

    return Agent(init, step, memoryless(policy.act), clock, policy.claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

"""A2C: Advantage Actor-Critic, the synchronous form of A3C, for a choice of actions and for continuous ones.

Paper: "Asynchronous Methods for Deep Reinforcement Learning", Mnih, Badia, Mirza, Graves, Lillicrap, Harley, Silver,
Kavukcuoglu, ICML 2016, arXiv 1602.01783.

Many environments are played side by side for a few steps by one policy. By how much their rewards and the value at the
end exceed the value that a step began with says how good its action was. One gradient step, and the rollout is dropped.

    return        R_t = r_t + gamma R_{t+1} within an episode; R_t = r_t + gamma (1 - terminated) V(s_{t+1}) at its end,
                  at a time limit, and at the rollout's end
    advantage     A_t = R_t - V(s_t); with `--gae-decay` below 1 that of generalised advantage estimation
    loss          -mean of log pi(a|s) A + c_v mean of (V - R)^2 / 2 - c_e entropy of pi,  A and R held fixed
    RMSProp       g <- alpha g + (1 - alpha) d^2,  theta <- theta - eta d / sqrt(g + epsilon)

s_{t+1} is the true successor. A2C is PPO (`policy_gradient/ppo.py`) with one epoch of one minibatch, where all ratios
are 1 and nothing is clipped, and without normalised advantages.

Differences from the paper: the workers are environments of one program, whose gradients are averaged, where A3C's
threads apply each its own to weights that others have changed meanwhile; asynchrony was a way to use the cores of a
CPU. The mean over steps stands in place of their sum, and with it OpenAI's step size and epsilon (openai/baselines a2c:
7e-4, 1e-5, a gradient's norm at most 0.5; the paper draws step sizes, and has an epsilon of 0.1). Actor and critic
share no layers but a convolution; weights start orthogonal, with small outputs of the actor; the network is a
perceptron, not an LSTM. A Gaussian's deviation does not depend on the state; actions are cut to [-1, 1] where the
environment takes them. Observations and rewards may be normalised as in PPO. Step sizes fall in a line with
`--annealing-steps`. `--optimizer adam` is not the paper's: it is there for comparison with PPO. Evaluation takes the
mode.

Run:      python algorithms/policy_gradient/a2c.py --env-id CartPole-v1
Expected: CartPole-v1 above 475 of 500 within 200,000 steps, Acrobot-v1 above -100 within 500,000.
"""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Clock, memoryless
from jaxrl_dist.configuration import Count, Fraction, Layers, Natural, NonNegative, Positive, configuration
from jaxrl_dist.learning import clipped, interaction, normalization, returns, rollouts
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of A2C; the defaults are openai/baselines'. Floats can be swept within one program."""

    num_envs: Count = 16
    """environments stepped in parallel"""
    num_steps: Count = 5
    """steps of each environment in a rollout"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    gae_decay: Fraction = 1.0
    """lambda, the weight of later advantages in an advantage; 1: returns of all the steps that there are"""
    value_weight: NonNegative = 0.5
    """c_v, weight of the value's loss"""
    entropy_weight: NonNegative = 0.01
    """c_e, weight of the policy's entropy"""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """what makes steps of gradients; RMSProp is the paper's"""
    learning_rate: NonNegative = 7e-4
    """step size of the optimiser at the start"""
    annealing_steps: Natural = 0
    """environment steps in which that falls to 0 in a line; 0: it does not fall"""
    rmsprop_decay: Fraction = 0.99
    """alpha, the weight of what is remembered of squared gradients"""
    rmsprop_epsilon: Positive = 1e-5
    """what RMSProp adds within its root"""
    adam_epsilon: Positive = 1e-5
    """what Adam adds to its denominator"""
    gradient_bound: Positive = 0.5
    """largest norm of a gradient"""

    hidden: Layers = (64, 64)
    """widths of the hidden layers"""
    activation: Literal["tanh", "relu"] = "tanh"
    """what follows a hidden layer; behind a convolution always relu"""
    convolution: bool = True
    """let images pass MinAtar's convolution and then the hidden layers, which actor and critic share; if not, they are
    numbers like others"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""


# Sizes for a CPU.
PRESETS = {
    "CartPole-v1": {"total_steps": 500_000, "learning_rate": 2e-3, "annealing_steps": 500_000},
    "Acrobot-v1": {"total_steps": 500_000, "annealing_steps": 500_000},
    "Catch-bsuite": {"total_steps": 100_000},
}

# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


# -- Losses -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the update sees of a step, `[rows, ...]`."""

    observation: jax.Array
    action: jax.Array
    advantage: jax.Array
    target: jax.Array


def policy_loss(log_density: jax.Array, advantage: jax.Array) -> jax.Array:
    """Whose gradient is the policy gradient, negative, of `[batch]` log densities and advantages."""
    chex.assert_rank(log_density, 1)
    chex.assert_equal_shape([log_density, advantage])
    return -(log_density * jax.lax.stop_gradient(advantage)).mean()


def value_loss(value: jax.Array, target: jax.Array) -> jax.Array:
    """Half the mean squared error of `[batch]` values."""
    chex.assert_rank(value, 1)
    chex.assert_equal_shape([value, target])
    return 0.5 * ((value - jax.lax.stop_gradient(target)) ** 2).mean()


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """The optimiser on gradients of bounded norm."""
    rate = clipped.falling(config, config.num_envs * config.num_steps)
    if config.optimizer == "adam":
        rule = optax.adam(rate, eps=config.adam_epsilon)
    else:
        rule = optax.rmsprop(rate, decay=config.rmsprop_decay, eps=config.rmsprop_epsilon, eps_in_sqrt=True)
    return optax.chain(optax.clip_by_global_norm(config.gradient_bound), rule)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """A2C on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    clock = Clock(updates=1, env_steps=config.num_envs * config.num_steps)
    network = clipped.network_of(config, env, env_params)
    optimizer = optimizer_of(config)
    policy = clipped.policy_of(
        network, config.discount, lambda state: state.normalizer, lambda state: normalization.unit(state.scale)
    )

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on all of a rollout."""

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation)
            entropy = actions.entropy().mean()
            of_policy = policy_loss(actions.log_density(batch.action), batch.advantage)
            of_value = value_loss(value, batch.target)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy
            return loss, {"policy_loss": of_policy, "value_loss": of_value, "entropy": entropy}

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
        key, collect_key = jax.random.split(state.key)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, (drawn, _) = policy.explore(state, observation, key)
            return action, memory, drawn

        now, (lived, action), episodes = rollouts.collect(
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
        batch = Batch(observation, action, advantage, advantage + value)
        batch = jax.tree.map(lambda x: x.reshape(clock.env_steps, *x.shape[2:]), batch)

        # One step, all rows at once.
        learner, losses = update(state.learner, batch)

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

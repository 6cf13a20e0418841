"""MD3QN: multi-dimensional distributional DQN, the joint law of several returns as particles.

Paper: "Distributional Reinforcement Learning for Multi-Dimensional Reward Functions", Zhang, Chen, Zhao, Xiong, Qin,
Liu, NeurIPS 2021, arXiv 2110.13578.

Where the reward is a sum of parts, a score here and a cost there, the returns of the parts go together or stand in for
each other, and that is in no law of one of them. MD3QN's particles are vectors, one number for each part; the set of
them is moved as a whole towards the set of Bellman-shifted target vectors, as in MMD-DQN, and coordinates that belong
to one particle stay together. Actions maximise the mean of the sum of all parts.

    law           Z(s, a) = x_i(s, a) in R^K with probability 1/N
    target        y_j = r + gamma (1 - terminated) x_target_j(s', a*),  a* = argmax over a of mean_j sum_k x_target_jk
    loss          mean of  mean_ij k(x_i, x_j) - 2 mean_ij k(x_i, y_j) + mean_ij k(y_i, y_j)
    kernel        k(x, y) = sum over h of w_h exp(-mean_k (x_k - y_k)^2 / h), or -|x - y|
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy

With one component the loss is MMD-DQN's, bit for bit. `--target-policy uniform` is the paper's first experiment: the
joint law of the uniform random policy's returns is learned, a* and the agent's own actions are drawn.

Differences from the paper: where actions tie, the first one is taken; the official code averages their particles. That
code sets a negative loss to 0, which here only rounding could make, and learns from prioritised replay if told to; we
do neither, nor is there its variant that acts to keep constraints. Epsilon falls from the first step on, where that
code waits for the end of the warm-up; images pass MinAtar's convolution instead of DQN's; evaluation without
exploration. `--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n, `--risk` the mean of the sum by
another measure of its law, and `--reward-clip` cuts each component.

Run:      python algorithms/value_based/md3qn.py --env-id multi_reward/branches
Expected: multi_reward/branches the better sum (1 of 1) within 20,000 steps; joint laws against exact ones:
experiments/joint_laws.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Real, configuration, require
from jaxrl_dist.distributional import joint, law
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, greedy, interaction, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count, require_environment

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of MD3QN. Floats can be swept within one compiled program."""

    num_particles: Count = 200
    """particles per action, each a vector of returns"""
    kernel: Literal["gaussian", "energy"] = "gaussian"
    """a mixture of Gaussians, or minus the distance"""
    bandwidths: tuple[float, ...] = tuple(2.0**i for i in range(-8, 9))
    """squared widths h of the Gaussians, in squared units of return"""
    bandwidth_exponent: Real = 0.5
    """the Gaussian of squared width h weighs h to this power; 0: all alike"""
    risk: str = "neutral"
    """what greedy actions maximise of the law of the sum, in targets, acting and evaluation: neutral, cvar:LEVEL,
    wang:LEVEL, cpw:LEVEL, power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""
    target_policy: Literal["greedy", "uniform"] = "greedy"
    """whose returns are learned: those of the greedy policy, or of the uniform random one, which then also acts while
    it is learned; evaluation is greedy in what was learned, a policy better than the random one"""


# Small processes whose joint laws are known: sizes for a CPU. Paper: Atari's, with its own step size and target period.
EPISODES = {
    "num_particles": 32, "bandwidths": tuple(4.0**i for i in range(-4, 3)), "target_policy": "uniform",
    "batch_size": 32, "warmup_steps": 1_000, "replay_capacity": 20_000, "target_period": 100, "learning_rate": 1e-3,
    "hidden": (64, 64), "discount": 1.0, "total_steps": 20_000,
}  # fmt: skip
PRESETS = {
    # With a larger discount, doing nothing for a step costs less than such particles can be off.
    "multi_reward/branches": EPISODES | {"discount": 0.9, "target_policy": "greedy", "exploration_steps": 10_000},
    "multi_reward/coin": EPISODES | {"discount": 0.5},
    "multi_reward/parity": EPISODES,
    # Who acts is whose returns are learned, so that rewards of many steps are as good as those of one.
    "multi_reward/exclusive": EPISODES | {"num_steps": 8},
    "multi_reward/inclusive": EPISODES | {"num_steps": 8},
    "paper": greedy.ATARI | {"learning_rate": 5e-5},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Particles of every action, `[batch, *observation]` -> `[batch, actions, particles, rewards]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_particles: int
    num_rewards: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        outputs = self.num_particles * self.num_rewards
        particles = networks.ActionHead(self.hidden[-1], self.num_actions, outputs, name="head")(features)
        return particles.reshape(-1, self.num_actions, self.num_particles, self.num_rewards)


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_particles(batch: Batch, next_particles: jax.Array) -> jax.Array:
    """The vector of rewards plus the successor's discounted particles, both `[batch, particles, rewards]`."""
    chex.assert_rank(next_particles, 3)
    rewards = batch.extras["rewards"]
    chex.assert_shape(rewards, (len(next_particles), next_particles.shape[-1]))
    chex.assert_shape(batch.discount, (len(next_particles),))
    return rewards[:, None] + batch.discount[:, None, None] * next_particles


def loss_of(particles: jax.Array, target: jax.Array, kernel: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean squared discrepancy of the particles of the actions taken, both `[batch, particles, rewards]`."""
    chex.assert_rank(particles, 3)
    chex.assert_equal_shape([particles, target])
    # Each particle counts against itself too: without these pairs the loss could be negative. Those of two y have no
    # gradient, but with them equal sets are 0 apart.
    return joint.squared_mmd(particles, jax.lax.stop_gradient(target), kernel).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """MD3QN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions, num_rewards = discrete_action_count(env, env_params), reward_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_particles, num_rewards)
    risk = risks.parse(config.risk)
    require(
        len(config.bandwidths) > 0 and all(0 < width < math.inf for width in config.bandwidths),
        f"--bandwidths is {config.bandwidths}; it must be one or more finite numbers above 0",
    )
    weights = jnp.asarray(config.bandwidths) ** config.bandwidth_exponent
    kernel = joint.energy() if config.kernel == "energy" else joint.gaussian_mixture(config.bandwidths, weights)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)
    draws_actions = config.target_policy == "uniform"

    def values_of(particles: jax.Array) -> jax.Array:
        """What actions are chosen by, of the sum of all rewards: `[..., particles, rewards]` -> `[...]`."""
        return risks.value_of_atoms(risk, particles.sum(-1))

    def update(learner: Learner, batch: Batch, key: jax.Array | None) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due; the key is for actions drawn."""
        # Target: the joint law of the successor's action, greedy by the target network or drawn, moved by rewards and
        # discount. One action and one discount for all components: they are those of one policy.
        next_particles = network.apply(learner.target_network, batch.next_observation)
        next_action = values_of(next_particles).argmax(-1)
        if draws_actions:
            next_action = draws.integers(key, next_action.shape, num_actions)
        target = target_particles(batch, networks.at_action(next_particles, next_action))

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            particles = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(particles, target, kernel), particles

        new_network, (loss, particles, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step; value and target are of the sum.
        metrics = {
            "loss": loss, "value": particles.sum(-1).mean(), "target": target.sum(-1).mean(),
            "gradient_norm": gradient_norm, "spread": particles.std(-2).mean(),
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *env.observation_space(env_params).shape)))
        learner = Learner(begin(adam, parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            sample_key, action_key = jax.random.split(sample_key) if draws_actions else (sample_key, None)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch, action_key)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        return values_of(network.apply(state.learner.network.parameters, observation))

    policy = greedy.policy_of(config, action_values)

    def uniform(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return draws.integers(key, observation.shape[:1], num_actions)

    def follow(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return uniform(state, observation, key), jnp.zeros(observation.shape[0])

    def predict_joint(state: State, observation: jax.Array, action: jax.Array) -> jax.Array:
        return networks.at_action(network.apply(state.learner.network.parameters, observation), action)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(predict_joint(state, observation, action).sum(-1))

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(
            state.learner.network.parameters["params"], num_actions, num_rewards=np.int32(num_rewards),
            **risks.tables(risk),
        )  # fmt: skip

    explore, followed = (uniform, follow) if draws_actions else (policy.explore, policy.follow)
    claim = Claim(followed, predict, config.discount, joint=predict_joint)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


def reward_count(env, env_params) -> int:
    """Components of the environment's vector of rewards; UnsupportedEnvironment where it pays none."""
    extras = interaction.transition_like(env, env_params).extras or {}
    require_environment(
        "rewards" in extras,
        env,
        "rewards are no vector (info has no 'rewards')",
        "a vector of rewards beside their sum",
    )
    return extras["rewards"].shape[0]


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

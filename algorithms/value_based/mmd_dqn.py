"""MMD-DQN: moment matching DQN, the distribution of the return as free particles.

Paper: "Distributional Reinforcement Learning via Moment Matching", Nguyen, Gupta, Venkatesh, AAAI 2021, arXiv
2007.12354.

QR-DQN's atoms are tied to fixed fractions; MMD-DQN's particles are tied to nothing, and the set of them is moved as a
whole towards the set of Bellman-shifted target particles, by the squared maximum mean discrepancy of the two sets. The
kernel decides which moments are matched. Actions maximise the mean of the particles, or any other risk measure.

    law           Z(s, a) = x_i(s, a) with probability 1/N
    target        y_j = r + gamma (1 - terminated) x_target_j(s', a*),  a* = argmax over a of mean_j x_target_j
    loss          mean of  mean_ij k(x_i, x_j) - 2 mean_ij k(x_i, y_j) + mean_ij k(y_i, y_j)
    kernel        k(x, y) = sum over h of w_h exp(-(x - y)^2 / h), or -|x - y|
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy

Differences from the paper: the bandwidths h are 4^-1 to 4^7 with weights sqrt(h), for returns of any size up to some
hundreds; `--preset paper` has the official 1 to 10 with equal weights, made for clipped rewards, and clips them. The
official code sets a negative loss to 0, which here only rounding could make; we do not, since that would cut its
gradient. Where actions tie, the first one is taken; the official code averages their particles. Epsilon falls from the
first step on, where that code waits for the end of the warm-up; images pass MinAtar's convolution instead of DQN's;
evaluation without exploration. `--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n.

Run:      python algorithms/value_based/mmd_dqn.py --env-id CartPole-v1
Expected: CartPole-v1 about 490 of 500 within 500,000 steps, with relapses: experiments/learning_curves.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Real, configuration, require
from jaxrl_dist.distributional import law, mmd
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of MMD-DQN. Floats can be swept within one compiled program."""

    num_particles: Count = 200
    """particles per action"""
    kernel: Literal["gaussian", "energy"] = "gaussian"
    """a mixture of Gaussians, or minus the distance"""
    bandwidths: tuple[float, ...] = tuple(4.0**i for i in range(-1, 8))
    """squared widths h of the Gaussians, in squared units of return"""
    bandwidth_exponent: Real = 0.5
    """the Gaussian of squared width h weighs h to this power; 0: all alike"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's. Returns
# of 100 need wide kernels: particles that are further apart than the widest one pull at each other no more.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"num_particles": 16},
    "Acrobot-v1": greedy.ACROBOT | {"num_particles": 16},
    "Catch-bsuite": greedy.CATCH | {"num_particles": 8, "bandwidths": tuple(2.0**i for i in range(-2, 9))},
    "Breakout-MinAtar": greedy.BREAKOUT | {"num_particles": 16, "bandwidths": tuple(2.0**i for i in range(-2, 9))},
    "paper": greedy.ATARI
    | {"learning_rate": 5e-5, "bandwidths": tuple(float(h) for h in range(1, 11)), "bandwidth_exponent": 0.0},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Particles of every action, `[batch, *observation]` -> `[batch, actions, particles]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_particles: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, self.num_particles, name="head")(features)


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
    """Reward plus the successor's discounted particles, `[batch, particles]` -> `[batch, particles]`."""
    chex.assert_rank(next_particles, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_particles),))
    return batch.reward[:, None] + batch.discount[:, None] * next_particles


def loss_of(particles: jax.Array, target: jax.Array, kernel: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mean squared discrepancy of the particles of the actions taken, both `[batch, particles]`."""
    chex.assert_rank(particles, 2)
    chex.assert_equal_shape([particles, target])
    # Each particle counts against itself too: without these pairs the loss could be negative. Those of two y have no
    # gradient, but with them equal sets are 0 apart.
    return mmd.squared_mmd(particles, jax.lax.stop_gradient(target), kernel).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """MMD-DQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_particles)
    risk = risks.parse(config.risk)
    require(
        len(config.bandwidths) > 0 and all(0 < width < math.inf for width in config.bandwidths),
        f"--bandwidths is {config.bandwidths}; it must be one or more finite numbers above 0",
    )
    weights = jnp.asarray(config.bandwidths) ** config.bandwidth_exponent
    kernel = mmd.energy() if config.kernel == "energy" else mmd.gaussian_mixture(config.bandwidths, weights)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the law of the successor's greedy action, both by the target network, moved by reward and discount.
        next_particles = network.apply(learner.target_network, batch.next_observation)
        next_action = risks.value_of_atoms(risk, next_particles).argmax(-1)
        target = target_particles(batch, networks.at_action(next_particles, next_action))

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            particles = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(particles, target, kernel), particles

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
            "spread": values.std(-1).mean(),
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
            action = policy.explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        return risks.value_of_atoms(risk, network.apply(state.learner.network.parameters, observation))

    policy = greedy.policy_of(config, action_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(
            networks.at_action(network.apply(state.learner.network.parameters, observation), action)
        )

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(state.learner.network.parameters["params"], num_actions, **risks.tables(risk))

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

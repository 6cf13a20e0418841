"""QR-DQN: quantile regression DQN, the distribution of the return as quantiles at fixed fractions.

Paper: "Distributional Reinforcement Learning with Quantile Regression", Dabney, Rowland, Bellemare, Munos, AAAI 2018,
arXiv 1710.10044.

C51 fixes the atoms and learns their probabilities; QR-DQN fixes the probabilities, 1/N each, and learns the atoms. Atom
i is the quantile at the fraction (2i - 1) / 2N, which makes the law the nearest one in the Wasserstein-1 distance, and
quantile regression finds it from samples. There is no support to choose and nothing to project. Actions maximise the
mean of the quantiles, or any other risk measure of them.

    law           Z(s, a) = theta_i(s, a) with probability 1/N,  tau_i = (2i - 1) / 2N
    target        y_j = r + gamma (1 - terminated) theta_target_j(s', a*),  a* = argmax over a of mean_j theta_target_j
    loss          mean of sum over i of mean over j of |tau_i - 1{y_j < theta_i}| huber_kappa(y_j - theta_i) / kappa
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy

Differences from the paper: rewards are clipped with `--preset paper` only; epsilon falls from the first step on, where
the official codes wait for the end of the warm-up; images pass MinAtar's convolution instead of DQN's; evaluation
without exploration. `--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n.

Run:      python algorithms/value_based/qr_dqn.py --env-id CartPole-v1
Expected: CartPole-v1 500 of 500 within 500,000 steps: experiments/learning_curves.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, NonNegative, configuration
from jaxrl_dist.distributional import law, quantile
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
    """Settings of QR-DQN. Floats can be swept within one compiled program."""

    num_quantiles: Count = 200
    """quantiles per action"""
    kappa: NonNegative = 1.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression; where laws are narrower than
    this, atoms are expectiles rather than quantiles"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"num_quantiles": 32},
    "Acrobot-v1": greedy.ACROBOT | {"num_quantiles": 32},
    "Catch-bsuite": greedy.CATCH | {"num_quantiles": 8},
    "Breakout-MinAtar": greedy.BREAKOUT | {"num_quantiles": 32},
    "paper": greedy.ATARI | {"learning_rate": 5e-5},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Quantiles of every action, `[batch, *observation]` -> `[batch, actions, quantiles]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_quantiles: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, self.num_quantiles, name="head")(features)


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


def target_quantiles(batch: Batch, next_quantiles: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted quantiles, `[batch, quantiles]` -> `[batch, quantiles]`."""
    chex.assert_rank(next_quantiles, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_quantiles),))
    return batch.reward[:, None] + batch.discount[:, None] * next_quantiles


def loss_of(quantiles: jax.Array, target: jax.Array, kappa: float | jax.Array) -> jax.Array:
    """Mean quantile Huber loss: quantiles of the actions taken, `[batch, quantiles]`, on `[batch, targets]`."""
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    fractions = quantile.midpoints(quantiles.shape[-1])
    # Summed over i and averaged over j as in the paper; divided by kappa as in later ones, the same at the paper's 1.
    return quantile.quantile_huber_loss(quantiles, target, fractions, kappa=kappa, over_predicted="sum").mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """QR-DQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_quantiles)
    risk = risks.parse(config.risk)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the law of the successor's greedy action, both by the target network, moved by reward and discount.
        next_quantiles = network.apply(learner.target_network, batch.next_observation)
        next_action = risks.value_of_atoms(risk, next_quantiles).argmax(-1)
        target = target_quantiles(batch, networks.at_action(next_quantiles, next_action))

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            quantiles = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(quantiles, target, config.kappa), quantiles

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
            "crossings": quantile.crossing_count(values).mean(),
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

"""IQN: implicit quantile networks, the quantile function of the return at any fraction.

Paper: "Implicit Quantile Networks for Distributional Reinforcement Learning", Dabney, Ostrovski, Silver, Munos, ICML
2018, arXiv 1806.06923.

QR-DQN learns quantiles at N fixed fractions; IQN takes the fraction as an input and learns them all. The fraction is
embedded by cosines and multiplied into the features of the state. How many fractions are drawn is a matter of compute,
not of the network, and drawing them through a distortion makes the agent averse to risk or seek it.

    law           Z(s, a) = F(s, a, tau),  tau uniform on (0, 1)
    target        y_j = r + gamma (1 - terminated) F_target(s', a*, tau'_j),  j = 1 .. N'
                  a* = argmax over a of mean over k of F_target(s', a, beta(tau~_k)),  k = 1 .. K
    loss          mean of sum over i = 1 .. N of mean over j of |tau_i - 1{u < 0}| huber_kappa(u) / kappa,
                  u = y_j - F(s, a, tau_i)
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy on the mean over K fresh fractions

Differences from the paper: evaluation takes the fractions (2k - 1) / 2K instead of random ones, and no exploration; the
embedding's cosines start at i = 1, as in the official codes; the embedding is merged before the last hidden layer, not
into the features of the convolution, which is MinAtar's; rewards are clipped with `--preset paper` only; epsilon falls
from the first step on, where the official codes wait for the end of the warm-up. `--num-steps` n > 1 replaces r and
gamma by the n-step return and gamma^n.

Run:      python algorithms/value_based/iqn.py --env-id CartPole-v1
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
from jaxrl_dist.learning import draws, experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of IQN. Floats can be swept within one compiled program."""

    cosines: Count = 64
    """cosines that embed a fraction"""
    num_fractions: Count = 64
    """N, fractions per update at which the online network is evaluated"""
    num_target_fractions: Count = 64
    """N', fractions per update at which the target network is evaluated"""
    num_policy_fractions: Count = 32
    """K, fractions whose mean chooses an action"""
    kappa: NonNegative = 1.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression; where laws are narrower than
    this, quantiles are expectiles"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8},
    "Acrobot-v1": greedy.ACROBOT | {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8},
    "Catch-bsuite": greedy.CATCH | {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8},
    "Breakout-MinAtar": greedy.BREAKOUT
    | {"hidden": (128, 128), "num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8},
    "paper": greedy.ATARI | {"learning_rate": 5e-5, "hidden": (512, 512)},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Quantiles of every action, `[batch, *observation]`, `[batch, m]` -> `[batch, actions, m]`."""

    hidden: tuple[int, ...]
    num_actions: int
    cosines: int

    @nn.compact
    def __call__(self, observation: jax.Array, fractions: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        head = networks.ImplicitQuantileHead(self.hidden[-1], self.num_actions, self.cosines, name="head")
        return head(features, fractions)


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
    """Reward plus the successor's discounted quantiles, `[batch, target fractions]`, same shape."""
    chex.assert_rank(next_quantiles, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_quantiles),))
    return batch.reward[:, None] + batch.discount[:, None] * next_quantiles


def loss_of(quantiles: jax.Array, fractions: jax.Array, target: jax.Array, kappa: float | jax.Array) -> jax.Array:
    """Mean quantile Huber loss: quantiles at the fractions, both `[batch, fractions]`, on `[batch, targets]`."""
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape([quantiles, fractions])
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    # QR-DQN's (arXiv 1710.10044), but each row of the batch at fractions of its own.
    return quantile.quantile_huber_loss(quantiles, target, fractions, kappa=kappa, over_predicted="sum").mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """IQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.cosines)
    risk = risks.parse(config.risk)
    policy_midpoints = quantile.midpoints(config.num_policy_fractions)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Fractions: three independent draws. The same ones on both sides of the loss would bias its gradient.
        online_key, target_key, policy_key = jax.random.split(key, 3)
        fractions = draws.uniform(online_key, (config.batch_size, config.num_fractions))
        target_fractions = draws.uniform(target_key, (config.batch_size, config.num_target_fractions))
        policy_fractions = draws.uniform(policy_key, (config.batch_size, config.num_policy_fractions))

        # Target: the law of the successor's greedy action, both by the target network, moved by reward and discount.
        # One pass for the quantiles that choose, at distorted fractions, and those that follow, at fractions as drawn.
        next_fractions = jnp.concatenate([risks.distort(risk, policy_fractions), target_fractions], axis=1)
        next_quantiles = network.apply(learner.target_network, batch.next_observation, next_fractions)
        choosing, following = jnp.split(next_quantiles, [config.num_policy_fractions], axis=2)
        next_action = risks.value_of_quantiles(risk, choosing).argmax(-1)
        target = target_quantiles(batch, networks.at_action(following, next_action))

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            quantiles = networks.at_action(network.apply(parameters, batch.observation, fractions), batch.action)
            return loss_of(quantiles, fractions, target, config.kappa), quantiles

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        parameters = network.init(network_key, observation, policy_midpoints[None])
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
            key, sample_key, fraction_key = jax.random.split(state.key, 3)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch, fraction_key)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def action_values(state: State, observation: jax.Array, fractions: jax.Array) -> jax.Array:
        quantiles = network.apply(state.learner.network.parameters, observation, risks.distort(risk, fractions))
        return risks.value_of_quantiles(risk, quantiles)

    def midpoints(observation: jax.Array) -> jax.Array:
        return jnp.broadcast_to(policy_midpoints, (observation.shape[0], config.num_policy_fractions))

    def drawn_values(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return action_values(
            state, observation, draws.uniform(key, (observation.shape[0], config.num_policy_fractions))
        )

    policy = greedy.policy_of(config, lambda state, x: action_values(state, x, midpoints(x)), drawn_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        quantiles = network.apply(state.learner.network.parameters, observation, midpoints(observation))
        return law.equally_weighted(networks.at_action(quantiles, action))

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(
            state.learner.network.parameters["params"], num_actions, fractions=risks.distort(risk, policy_midpoints),
            variance_penalty=risks.variance_penalty(risk),
        )  # fmt: skip

    claim = Claim(policy.follow, predict, config.discount)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

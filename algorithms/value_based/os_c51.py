"""OS-C51: C51 with the law of one step, two-hot classification of DQN's target.

Paper: "One-Step Distributional Reinforcement Learning", Achab, Alami, Djilali, Fedyanin, Moulines, TMLR 2023,
arXiv 2304.14421.

C51's target is the successor's whole law, so that what it converges to depends on which of several equally good actions
the successor prefers. Here the successor is worth a number, its value, and what is learned is the law of one random
step: reward plus discounted value of the state that is reached. Its mean is the return's, and its limit is unique, ties
or not. The target is one point, split between its two neighbours on the support: classification by two-hot targets
(Farebrother et al. 2024, arXiv 2403.03950).

    support       z_i = v_min + i (v_max - v_min) / (num_atoms - 1),  Q(s, a) = sum over i of z_i softmax_i(s, a)
    target        m = projection of all mass at r + gamma (1 - terminated) max over a' of Q_target(s', a')
                  onto the support
    loss          mean of -sum over i of m_i log softmax_i(s, a)
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy

The law of one step is not that of the return: what is random later counts by its mean alone, so its variance is too
small. Hence there is no `--risk`, and the agent predicts a mean, as DQN does. The same on tables, exactly:
algorithms/dynamic_programming/one_step.py.

Differences from the paper: rewards are clipped, and the support reaches from -10 to 10, with `--preset paper` only;
otherwise v_min and v_max belong to the environment: see the presets, `--probe-support`, and the metric `clipped_mass`,
the share of targets that lie outside. The official code clips probabilities to [1e-5, 1 - 1e-5] before their logarithm;
log-softmax needs no clipping. Images pass MinAtar's convolution instead of DQN's; evaluation without exploration.
`--num-steps` n > 1 replaces r and gamma by the n-step return and gamma^n.

Run:      python algorithms/value_based/os_c51.py --env-id CartPole-v1
Expected: Catch-bsuite 0.7 of 1 and above within 40,000 steps: tests/algorithms/test_learning.py.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Real, configuration
from jaxrl_dist.distributional import categorical, law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of OS-C51. Floats can be swept within one compiled program."""

    num_atoms: Count = 51
    """atoms of the support"""
    v_min: Real = -100.0
    """lowest atom, in units of the discounted return; the default is for rewards up to 1 and gamma 0.99"""
    v_max: Real = 100.0
    """highest atom"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"v_min": 0.0, "v_max": 100.0},
    "Acrobot-v1": greedy.ACROBOT | {"v_min": -100.0, "v_max": 0.0},
    "Catch-bsuite": greedy.CATCH | {"v_min": -1.0, "v_max": 1.0, "num_atoms": 21},
    "Breakout-MinAtar": greedy.BREAKOUT | {"v_min": 0.0, "v_max": 30.0},
    "paper": greedy.ATARI | {"warmup_steps": 80_000, "v_min": -10.0, "v_max": 10.0},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Logits of the atoms of every action, `[batch, *observation]` -> `[batch, actions, atoms]`."""

    hidden: tuple[int, ...]
    num_actions: int
    num_atoms: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, self.num_atoms, name="head")(features)


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


def target_value(batch: Batch, next_values: jax.Array) -> jax.Array:
    """Reward plus the successor's largest discounted value, DQN's target: values `[batch, actions]` -> `[batch]`."""
    chex.assert_rank(next_values, 2)
    chex.assert_shape([batch.reward, batch.discount], (len(next_values),))
    # The official code takes the mean of the greedy action's law after moving it: the same number.
    return batch.reward + batch.discount * next_values.max(-1)


def target_masses(scalar_target: jax.Array, support: jax.Array) -> jax.Array:
    """All mass at one value `[batch]`, projected onto the support `[atoms]`: two-hot, `[batch, atoms]`."""
    chex.assert_rank([scalar_target, support], 1)
    # The Cramer projection (arXiv 1802.08163); of a law with all mass at one point it is two-hot (arXiv 2403.03950).
    return categorical.project(scalar_target[:, None], jnp.ones_like(scalar_target)[:, None], support)


def loss_of(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy of the laws of the actions taken to their targets, both `[batch, atoms]`."""
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape([logits, target])
    # The KL divergence is less by the entropy of the target: a constant, so that the gradient is the same.
    return categorical.cross_entropy(target, logits).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """OS-C51 on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_atoms)
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: the mean of the successor's greedy action, both by the target network, moved and projected.
        next_laws = jax.nn.softmax(network.apply(learner.target_network, batch.next_observation))
        scalar_target = target_value(batch, (next_laws * support).sum(-1))
        target = target_masses(scalar_target, support)

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            logits = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(logits, target), (jax.nn.softmax(logits) * support).sum(-1)

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": (target * support).sum(-1).mean(),
            # With discount 0 any law lies at one point.
            "clipped_mass": categorical.clipped_mass(
                scalar_target, jnp.zeros_like(scalar_target), target, support
            ).mean(),
            "gradient_norm": gradient_norm,
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
        return (jax.nn.softmax(network.apply(state.learner.network.parameters, observation)) * support).sum(-1)

    policy = greedy.policy_of(config, action_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(networks.at_action(action_values(state, observation), action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        return portable.greedy_policy(state.learner.network.parameters["params"], num_actions, support=support)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

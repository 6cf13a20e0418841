"""Bootstrapped DQN with randomised prior functions: deep exploration by an ensemble, one member of which acts.

Papers: "Deep Exploration via Bootstrapped DQN", Osband, Blundell, Pritzel, Van Roy, NeurIPS 2016, arXiv 1602.04621;
"Randomized Prior Functions for Deep Reinforcement Learning", Osband, Aslanides, Cassirer, NeurIPS 2018, arXiv
1806.03335.

An agent that is random at every step does not get far: of 2^N ways into a deep sea one is right. Here K networks learn
from the same replay, and each episode is lived by one of them, drawn when it begins: what this one believes is pursued
for a whole episode. Members differ in where they started, in a random network each that is added to theirs and never
learns (their prior: where there are no data its values remain, and draw the member that has high ones there), and,
where `--mask-probability` is below 1, in the transitions that they learn from.

    value         Q_l(s, a) = f_l(s, a) + beta p_l(s, a), p_l a random network that stays as it is
    target        y_l = r + gamma (1 - terminated) Q_target,l(s', a*),
                  a* = argmax over a' of Q_l(s', a'), or without `--double` of Q_target,l(s', a')
    loss          of member l: mean of m_l (Q_l(s, a) - y_l)^2 / 2, m_l 1 with `mask_probability`, drawn when a
                  transition is stored
    target copy   theta_target,l <- theta_l, once every `target_period` updates; the prior is that of the member
    acting        by the member that was drawn for this episode, for each environment of its own; epsilon is 0
    evaluation    greedy in the mean of the members' values

One member with a prior scale of 0 is DQN (`value_based/dqn.py`), bit for bit.

Differences from the papers and bsuite's code (baselines/jax/boot_dqn): evaluation is by the mean value, where members
vote in 2016; networks share nothing, where Atari's share a convolution, whose gradient is divided by K; weights start
uniform in ±1/sqrt(fan-in), those of priors too, so that a scale of 5 there is a larger one here; losses are halved
squares, or Huber's; targets are Double DQN's, as in 2016, where bsuite's code takes the maximum; rewards carry no
noise; of equal values the first one is taken. Members run batched. With `--num-steps` n > 1 the mask is that of the
first transition.

Run:      python algorithms/value_based/bootstrapped_dqn.py --env-id DeepSea-bsuite
Expected: DeepSea-bsuite above 0.9 of 0.99 within 3,000 steps, 10 x 10 (`--env-options size=10`) too.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, greedy, networks, replay
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.replay import Replay
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of Bootstrapped DQN. Floats can be swept within one compiled program."""

    epsilon_start: Fraction = 0.0
    epsilon_end: Fraction = 0.0

    num_members: Count = 10
    """networks, one of which acts in each episode"""
    prior_scale: NonNegative = 10.0
    """beta, what the random networks' values are multiplied by, in units of return; 0: none"""
    mask_probability: Fraction = 1.0
    """of a member to learn from a transition; 1: all of them from all"""
    huber_threshold: NonNegative = 0.0
    """error beyond which the loss is linear, in units of return; 0: the squared error throughout"""

    double: bool = True
    """choose the target's action by the online network"""


# Environments: sizes for a CPU. Paper: Atari's, of 2016, without priors.
PRESETS = {
    "DeepSea-bsuite": {
        "total_steps": 10_000, "num_envs": 1, "updates_per_iteration": 1, "warmup_steps": 128,
        "replay_capacity": 10_000, "batch_size": 128, "target_period": 4, "learning_rate": 1e-3,
        "adam_epsilon": 1e-8, "num_members": 20, "prior_scale": 10.0,
        "hidden": (50, 50),
    },
    "CartPole-v1": greedy.CARTPOLE | {"huber_threshold": 100.0, "prior_scale": 1.0},
    "Acrobot-v1": greedy.ACROBOT | {"huber_threshold": 100.0, "prior_scale": 1.0},
    "Catch-bsuite": greedy.CATCH | {"huber_threshold": 1.0, "prior_scale": 1.0},
    "paper": greedy.ATARI | {"epsilon_end": 0.0, "huber_threshold": 1.0, "prior_scale": 0.0},
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Action values of one member, or what its prior adds to them, `[batch, *observation]` -> `[batch, actions]`."""

    hidden: tuple[int, ...]
    num_actions: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        return networks.ActionHead(self.hidden[-1], self.num_actions, 1, name="head")(features)[..., 0]


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change; all but `updates` has a leading axis of members."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    prior: chex.ArrayTree
    """parameters of the random networks, with a leading axis of members"""
    experience: Experience
    masks: Replay
    """who learns from the transitions of the same slots, `[capacity, members]`"""
    acting: jax.Array
    """the member that lives the present episode of each environment, `[num_envs]`"""
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_value(batch: Batch, next_values: jax.Array, choosing_values: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value at the action that `choosing_values` prefer: `[batch]`.

    Both `[batch, actions]`: the target network's values, and those that choose (its own, or for double Q-learning the
    online network's).
    """
    chex.assert_rank(next_values, 2)
    chex.assert_equal_shape([next_values, choosing_values])
    chex.assert_shape([batch.reward, batch.discount], (len(next_values),))
    return batch.reward + batch.discount * networks.at_action(next_values, choosing_values.argmax(-1))


def loss_of(values: jax.Array, target: jax.Array, mask: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Mean of the Huber losses, 0 where the mask is, all `[batch]`; with threshold 0 of half the squared errors."""
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([values, target, mask])
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = values - jax.lax.stop_gradient(target)
    clipped = jnp.clip(error, -bound, bound)
    # Over all rows and not over those that count: a member learns as fast as it has data.
    return (mask * clipped * (error - clipped / 2)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """Bootstrapped DQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    members, num_envs = config.num_members, config.num_envs
    network = Network(config.hidden, num_actions)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def each(function: Callable, *of_members: chex.ArrayTree) -> chex.ArrayTree:
        """`function` of every member's part, side by side; a single one is computed as in DQN, to the last bit."""
        if members > 1:
            return jax.vmap(function)(*of_members)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], of_members)))

    def prior_of(prior: chex.ArrayTree, observation: jax.Array) -> jax.Array:
        return config.prior_scale * network.apply(prior, observation)

    def update(
        learner: Learner, prior: chex.ArrayTree, batch: Batch, mask: jax.Array
    ) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of every member, and the copy into the target networks when it is due.

        mask: who learns from which row, `[members, batch]`.
        """

        def learn_one(member: Trained, target_parameters, prior, mask):
            # Target: of this member's own networks, with its own prior, so that what it believes is of one piece.
            following = prior_of(prior, batch.next_observation)
            next_values = network.apply(target_parameters, batch.next_observation) + following
            choosing_values = next_values
            if config.double:
                choosing_values = network.apply(member.parameters, batch.next_observation) + following
            target = target_value(batch, next_values, choosing_values)

            # Loss: one step of Adam. The prior is a constant: what is learned is the difference to it.
            prior_values = prior_of(prior, batch.observation)

            def objective(parameters):
                values = networks.at_action(network.apply(parameters, batch.observation) + prior_values, batch.action)
                return loss_of(values, target, mask, config.huber_threshold), values

            return *descend(adam, member, objective), target

        new_network, descent, target = each(learn_one, learner.network, learner.target_network, prior, mask)

        # Target networks: a copy of all members when it is due.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step, the means over members; and how much these differ.
        metrics = {
            "loss": descent.loss.mean(), "value": descent.aux.mean(), "target": target.mean(),
            "gradient_norm": descent.gradient_norm.mean(), "disagreement": descent.aux.std(0).mean(),
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        # The first three keys, and what one member makes of them, are DQN's.
        key, network_key, warmup_key, prior_key, mask_key, member_key = jax.random.split(key, 6)
        network_keys = jax.random.split(network_key, members) if members > 1 else network_key[None]
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        parameters = each(lambda key: network.init(key, observation), network_keys)
        prior = each(lambda key: network.init(key, observation), jax.random.split(prior_key, members))
        learner = Learner(each(lambda one: begin(adam, one), parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        empty = replay.create(jax.ShapeDtypeStruct((members,), bool), config.replay_capacity, num_envs)
        of_warmup = draws.mask(mask_key, config.mask_probability, (clock.warmup_steps, members))
        masks = filled.replay._replace(rows=empty.rows.at[: clock.warmup_steps].set(of_warmup))
        acting = draws.integers(member_key, (num_envs,), members)
        return State(learner, prior, filled, masks, acting, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key, mask_key, member_key = jax.random.split(state.key, 5)
            action = of_acting.explore(state, state.experience.interaction.observation, act_key)
            lived, happened, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            mask = draws.mask(mask_key, config.mask_probability, (num_envs, members))
            # Where an episode has ended, another member lives the next one.
            ended = happened.terminated | happened.truncated
            acting = jnp.where(ended, draws.integers(member_key, (num_envs,), members), state.acting)
            return State(
                state.learner, state.prior, lived, replay.add(state.masks, mask), acting, state.env_steps + num_envs,
                key,
            ), episodes  # fmt: skip

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            slots = replay.sample_indices(state.experience.replay, sample_key, config.batch_size)
            batch = experience.batch_at(
                state.experience, slots, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            mask = replay.gather(state.masks.rows, slots).T
            learner, metrics = update(state.learner, state.prior, batch, mask)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def member_values(state: State, observation: jax.Array) -> jax.Array:
        """Of all members, `[members, batch, actions]`."""

        def one(parameters, prior):
            return network.apply(parameters, observation) + prior_of(prior, observation)

        return each(one, state.learner.network.parameters, state.prior)

    def mean_values(state: State, observation: jax.Array) -> jax.Array:
        return member_values(state, observation).mean(0)

    def acting_values(state: State, observation: jax.Array) -> jax.Array:
        """Of the member that lives the episode of each environment."""
        return networks.at_action(member_values(state, observation).swapaxes(0, 1), state.acting)

    policy, of_acting = greedy.policy_of(config, mean_values), greedy.policy_of(config, acting_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(networks.at_action(mean_values(state, observation), action)[:, None])

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

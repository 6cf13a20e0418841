"""Ensemble C51: categorical agents that learn from the average of their laws.

Paper: "Distributional Reinforcement Learning with Ensembles", Lindenberg, Nordqvist, Lindahl, Algorithms 13(5):118,
2020, arXiv 2003.10903.

k agents of C51, each with its own network, environments, exploration and replay. What they share are targets: instead
of its own target network's law each learns from the average of all of theirs. An average of laws on one support is a
law on it, so nothing else changes; errors that the members do not share are averaged away. Evaluation follows the joint
policy, greedy in the same average.

    member        Z_l(s, a) = z_i with probability softmax_i(l, s, a), z_i = v_min + i (v_max - v_min) / (num_atoms - 1)
    group         Z(s, a) = z_i with probability 1/k sum over l of softmax_i(l, s, a): probabilities, not logits
    target        m = projection of the law of r + gamma (1 - terminated) Z_target(s', a*) onto the support,
                  a* = argmax over a of E[Z_target(s', a)], for each transition of each member
    loss          of member l: mean of -sum over i of m_i log softmax_i(l, s, a) over its own transitions
    target copy   theta_target,l <- theta_l for all l at once, every `target_period` updates
    acting        member l: epsilon-greedy in E[Z_l]; evaluation: greedy in E[Z] of the online networks

One member is C51 (`value_based/c51.py`), bit for bit. Environments, the rows of the replay and all counts of steps are
those of all members together: k members take `--num-envs` / k environments each, and `--shared-replay` lets each draw
from what all have lived. Every target asks all k target networks about the transitions of all members, k^2 forward
passes where k agents take k, so that an update costs about k (k + 3) / 4 of C51's: 4.5 for three, 10 for five. Members
run batched, which on one core was as fast as one after the other, and compiled sooner.

Differences from the paper and its code (bjliaa/ecc, asynchronous workers on Atari): the members' steps and updates are
taken together; gradients are not clipped (there by a norm of 10); a step size of 2.5e-4 unless `--preset paper`, which
has the 1e-4 that the code's agents take and not the 2.5e-4 that it lists; on LunarLander the code trains agents alone
and only evaluates them together. Of C51 those of `value_based/c51.py`: supports, epsilon, images, n-step returns.

Run:      python algorithms/value_based/ensemble_c51.py --env-id CartPole-v1
Expected: Catch-bsuite 0.9 of 1 and above within 20,000 steps of each of three members, jointly.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Real, configuration, require
from jaxrl_dist.distributional import categorical
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, greedy, networks
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(greedy.Settings):
    """Settings of Ensemble C51. Counts of environments and of their steps are those of all members together. Floats can
    be swept within one compiled program."""

    num_envs: Count = 40
    warmup_steps: Count = 25_000
    replay_capacity: Count = 500_000
    exploration_steps: Count = 250_000

    num_members: Count = 5
    """agents that learn from each other's laws; `num_envs` must be a multiple of it"""
    shared_replay: bool = False
    """let members learn from each other's transitions too, where the paper's have their own alone"""
    num_atoms: Count = 51
    """atoms of the support"""
    v_min: Real = -100.0
    """lowest atom, in units of the discounted return; the default is for rewards up to 1 and gamma 0.99"""
    v_max: Real = 100.0
    """highest atom"""
    risk: str = "neutral"
    """what greedy actions maximise, in targets, acting and evaluation: neutral, cvar:LEVEL, wang:LEVEL, cpw:LEVEL,
    power:LEVEL, norm:NUMBER or mean-variance:WEIGHT"""


# What is counted for all members together.
COUNTS = ("num_envs", "warmup_steps", "replay_capacity", "exploration_steps", "total_steps")


def of_members(num_members: int, settings: dict) -> dict:
    """C51's settings for so many members, each with as many environments, steps and rows as it has."""
    of_one = {name: getattr(greedy.Settings(), name) for name in COUNTS[:-1]} | settings
    of_all = {name: num_members * of_one[name] for name in COUNTS if name in of_one}
    return of_one | of_all | {"num_members": num_members}


# Environments: sizes for a CPU. Paper: Atari's.
PRESETS = {
    "CartPole-v1": of_members(3, greedy.CARTPOLE) | {"v_min": 0.0, "v_max": 100.0},
    "Acrobot-v1": of_members(3, greedy.ACROBOT) | {"v_min": -100.0, "v_max": 0.0},
    "Catch-bsuite": of_members(3, greedy.CATCH) | {"v_min": -1.0, "v_max": 1.0, "num_atoms": 21},
    "DeepSea-bsuite": of_members(3, {
        "total_steps": 10_000, "num_envs": 1, "updates_per_iteration": 1, "warmup_steps": 128,
        "replay_capacity": 10_000, "exploration_steps": 5_000,
    }) | {
        "batch_size": 128, "target_period": 4, "learning_rate": 1e-3, "adam_epsilon": 1e-8, "hidden": (50, 50),
        "v_min": -1.0, "v_max": 1.0,
    },
    "paper": of_members(5, greedy.ATARI | {"exploration_steps": 250_000, "replay_capacity": 900_000}) | {
        "learning_rate": 1e-4, "adam_epsilon": 1.5e-4, "v_min": -10.0, "v_max": 10.0,
    },
}  # fmt: skip

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
    """What updates change; all but `updates` has a leading axis of members."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- Replay -----------------------------------------------------------------------------------------------------------


def slots_of_members(key: jax.Array, size: jax.Array, num_members: int, num_envs: int, batch_size: int) -> jax.Array:
    """For every member a batch of slots, uniform among those that it has filled: `[members * batch_size]`.

    A round of steps fills `num_envs` slots, of which as many as a member has environments are its own, one after the
    other. size: slots filled so far, in whole rounds.
    """
    each = num_envs // num_members
    number = draws.integers(key, (num_members * batch_size,), size // num_members)  # among its own, in their order
    member = jnp.arange(num_members).repeat(batch_size)
    return number // each * num_envs + member * each + number % each


# -- Losses and targets -----------------------------------------------------------------------------------------------


def group_laws(masses: jax.Array) -> jax.Array:
    """The average of the members' laws, `[members, batch, actions, atoms]` -> `[batch, actions, atoms]`."""
    chex.assert_rank(masses, 4)
    return masses.mean(0)


def target_masses(batch: Batch, next_masses: jax.Array, support: jax.Array) -> jax.Array:
    """Law of reward + discount * Z for Z with the masses `[batch, atoms]`, projected onto the support `[atoms]`."""
    rows, atoms = next_masses.shape
    chex.assert_shape([batch.reward, batch.discount], (rows,))
    chex.assert_shape(support, (atoms,))
    # The Cramer projection (arXiv 1802.08163). With discount 0, after a termination, all mass is at the reward.
    return categorical.project_return(batch.reward, batch.discount, next_masses, support)


def loss_of(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Mean cross-entropy of the laws of the actions taken to their targets, both `[batch, atoms]`."""
    chex.assert_rank(logits, 2)
    chex.assert_equal_shape([logits, target])
    # The KL divergence is less by the entropy of the target: a constant, so that the gradient is the same.
    return categorical.cross_entropy(target, logits).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """Ensemble C51 on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    members = config.num_members
    require(
        config.num_envs % members == 0,
        f"--num-envs is {config.num_envs}; it must be a multiple of --num-members = {members}, so that each has as "
        "many environments",
    )
    clock = config.clock()
    network = Network(config.hidden, num_actions, config.num_atoms)
    risk = risks.parse(config.risk)
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)

    def by_member(rows: jax.Array) -> jax.Array:
        """Rows of all members, those of the first one first: `[members * n, ...]` -> `[members, n, ...]`."""
        return rows.reshape(members, -1, *rows.shape[1:])

    def each(function: Callable, *of_members: chex.ArrayTree) -> chex.ArrayTree:
        """`function` of every member's part, side by side; a single one is computed as in C51, to the last bit."""
        if members > 1:
            return jax.vmap(function)(*of_members)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], of_members)))

    def masses_of(parameters: chex.ArrayTree, observation: jax.Array) -> jax.Array:
        return jax.nn.softmax(network.apply(parameters, observation))

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of every member on its own rows, and the copy into the target networks when it is due."""
        # Target: all target networks are asked about the successors of all members. Of their average the greedy action
        # is taken, and its law, moved and projected: members that choose for themselves would average laws of
        # different actions, which no policy has.
        next_laws = group_laws(each(lambda one: masses_of(one, batch.next_observation), learner.target_network))
        next_action = risks.value(risk, Law(support, next_laws), ascending=True).argmax(-1)
        next_masses = networks.at_action(next_laws, next_action)
        target = target_masses(batch, next_masses, support)

        # Loss: one step of Adam for each, that knows of no other. The target is a constant.
        def learn_one(member: Trained, observation: jax.Array, action: jax.Array, target: jax.Array):
            def objective(parameters):
                logits = networks.at_action(network.apply(parameters, observation), action)
                return loss_of(logits, target), (jax.nn.softmax(logits) * support).sum(-1)

            return descend(adam, member, objective)

        rows = map(by_member, (batch.observation, batch.action, target))
        new_network, (loss, values, gradient_norm) = each(learn_one, learner.network, *rows)

        # Target networks: a copy when it is due, of all at once, lest an average mix old laws with new ones.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of these batches, by the networks before the step, the means over members.
        metrics = {
            "loss": loss.mean(), "value": values.mean(), "target": (target * support).sum(-1).mean(),
            "clipped_mass": categorical.clipped_mass(batch.reward, batch.discount, next_masses, support).mean(),
            "gradient_norm": gradient_norm.mean(),
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        # One member starts as C51 does.
        network_keys = jax.random.split(network_key, members) if members > 1 else network_key[None]
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        parameters = each(lambda key: network.init(key, observation), network_keys)
        learner = Learner(each(lambda one: begin(adam, one), parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            before = state.experience.interaction
            action = own.explore(state, before.observation, act_key)
            lived, happened, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            # Whose returns: environments stand in the order of their members.
            ended = by_member(happened.terminated | happened.truncated)
            returns = by_member(before.episode_return + happened.reward)
            episodes |= {f"return_of_member_{i}": average(returns[i], ended[i]) for i in range(members)}
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            size = state.experience.replay.size
            if config.shared_replay:
                slots = draws.integers(sample_key, (members * config.batch_size,), size)
            else:
                slots = slots_of_members(sample_key, size, members, config.num_envs, config.batch_size)
            batch = experience.batch_at(
                state.experience, slots, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def laws(state: State, observation: jax.Array) -> Law:
        parameters = state.learner.network.parameters
        return Law(support, group_laws(each(lambda one: masses_of(one, observation), parameters)))

    def own_laws(state: State, observation: jax.Array) -> Law:
        """Of each environment by its own member."""
        masses = each(masses_of, state.learner.network.parameters, by_member(observation))
        return Law(support, masses.reshape(-1, *masses.shape[2:]))

    def policy_by(laws) -> greedy.GreedyPolicy:
        return greedy.policy_of(config, lambda *seen: risks.value(risk, laws(*seen), ascending=True))

    joint, own = policy_by(laws), policy_by(own_laws)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        masses = networks.at_action(laws(state, observation).masses, action)
        return Law(jnp.broadcast_to(support, masses.shape), masses)

    claim = Claim(joint.follow, predict, config.discount)
    return Agent(init, step, memoryless(joint.act), clock, claim)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

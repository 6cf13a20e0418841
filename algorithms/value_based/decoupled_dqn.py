"""DecQN: decoupled Q-networks, Q-learning for several choices at once with one utility for every choice.

Paper: "Solving Continuous Control via Q-learning", Seyde, Werner, Schwarting, Gilitschenski, Riedmiller, Rus,
Wulfmeier, ICLR 2023, arXiv 2210.12566. Double Q-learning: arXiv 1509.06461.

With N factors of n choices each there are n^N actions, and no network has so many outputs. Here it has a utility for
every choice of every factor, N n in all, and an action is worth the mean of the utilities of its choices. So the best
action is the best choice of each factor by itself, in targets as in acting, and a reward that only some of the factors
have earned is shared out among them all. Continuous actions become choices by bins: two or three of them, the bounds
and the middle, are enough for many tasks (`discretised/NAME`).

    value         Q(s, a) = 1/N sum over i of U_i(s, a_i)
    target        y = R + gamma^n (1 - terminated) 1/N sum over i of U_target,i(s', a*_i)
                  a*_i = argmax over a of U_i(s', a); with `--double False` of U_target,i(s', a)
    loss          mean of huber(Q(s, a) - y)
    target copy   theta_target <- theta, once every `target_period` updates
    acting        epsilon-greedy: one coin makes all choices random, or none

R is the n-step return, and s' the true successor of its last step; time limits do not stop the bootstrap.

Differences from the paper's code (tseyde/decqn): replay is uniform, there by priority (exponents 0.6, and 0.2 for
importance); one critic, where the code may take two, whose targets are averaged (`value_based/revalued.py` has any
number of them); the residual network and its first weights are those of REValueD's authors, with a relu behind the
block's second layer and none behind the norm, there an elu behind the norm alone; pixels are left out. One update falls
to eight environment steps as there (32 samples per step, batches of 256). `--polyak` below 1 lets the target network
follow instead of copying it.

Run:      python algorithms/value_based/decoupled_dqn.py --env-id discretised/Pendulum-v1
Expected: discretised/Pendulum-v1 above -250 within 30,000 steps; factored: every choice right within 10,000.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, factored, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.factored import UtilityNetwork
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import factored_action_counts

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(factored.Settings):
    """Settings of DecQN; the defaults are the paper's. Floats can be swept within one compiled program."""

    updates_per_iteration: Count = 1
    warmup_steps: Count = 1_000
    replay_capacity: Count = 1_000_000

    target_period: Count = 100
    epsilon_start: Fraction = 0.1
    epsilon_end: Fraction = 0.1

    double: bool = True
    """choose the target's action by the online network"""


PRESETS = {
    "factored": factored.TOY | {"target_period": 100},
    "discretised/Pendulum-v1": factored.PENDULUM | {"target_period": 100},
}

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


def action_value(utilities: jax.Array, action: jax.Array) -> jax.Array:
    """The mean utility of an action's choices, `[..., factors, choices]`, `[..., factors]` -> `[...]`."""
    chex.assert_equal_shape_prefix([utilities, action], action.ndim)
    return factored.of_choices(utilities, action).mean(-1)


def target_value(batch: Batch, next_utilities: jax.Array, choosing_utilities: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value at the choices that `choosing_utilities` prefer: `[batch]`.

    Both `[batch, factors, choices]`: the target network's utilities, and those that choose (its own, or for double
    Q-learning the online network's).
    """
    chex.assert_rank(next_utilities, 3)
    chex.assert_equal_shape([next_utilities, choosing_utilities])
    chex.assert_shape([batch.reward, batch.discount], (len(next_utilities),))
    return batch.reward + batch.discount * action_value(next_utilities, factored.best(choosing_utilities))


def loss_of(values: jax.Array, target: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Mean Huber loss of the values of the actions taken, both `[batch]`; with threshold 0 half the squared error."""
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([values, target])
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = values - jax.lax.stop_gradient(target)
    # The gradient is the clipped error, and 1/N of it goes to the utility of each choice.
    clipped = jnp.clip(error, -bound, bound)
    return (clipped * (error - clipped / 2)).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """DecQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    counts = factored_action_counts(env, env_params)
    config.check()
    clock = config.clock()
    network, optimizer = UtilityNetwork(config.hidden, counts), factored.optimizer_of(config)

    def utilities_of(parameters: chex.ArrayTree, observation: jax.Array) -> jax.Array:
        return network.apply(parameters, observation)[:, 0]

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Target: each factor's best choice at the successor. With `double` the online network has chosen, so that the
        # error that makes a choice look best is not in its utility (arXiv 1509.06461).
        next_utilities = utilities_of(learner.target_network, batch.next_observation)
        choosing_utilities = (
            utilities_of(learner.network.parameters, batch.next_observation) if config.double else next_utilities
        )
        target = target_value(batch, next_utilities, choosing_utilities)

        # Loss: one step of Adam. The target is a constant, lest it move towards the prediction.
        def objective(parameters):
            values = action_value(utilities_of(parameters, batch.observation), batch.action)
            return loss_of(values, target, config.huber_threshold), values

        new_network, (loss, values, gradient_norm) = descend(optimizer, learner.network, objective)

        # Target network: a step, or a copy, when it is due. In between it stands still.
        updates = learner.updates + 1
        followed = networks.polyak(learner.target_network, new_network.parameters, config.polyak)
        target_network = networks.periodic_copy(learner.target_network, followed, updates, config.target_period)

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *env.observation_space(env_params).shape)))
        learner = Learner(begin(optimizer, parameters), parameters, jnp.int32(0))
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

    def utilities(state: State, observation: jax.Array) -> jax.Array:
        return utilities_of(state.learner.network.parameters, observation)

    policy = factored.policy_of(config, counts, utilities)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(action_value(utilities(state, observation), action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        return portable.factored_policy(state.learner.network.parameters["params"], counts)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

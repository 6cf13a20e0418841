"""REValueD: regularised ensemble value decomposition, DecQN with many critics and one target for them all.

Paper: "REValueD: Regularised Ensemble Value-Decomposition for Factorisable Markov Decision Processes", Ireland,
Montana, ICLR 2024, arXiv 2401.08850. DecQN: Seyde et al., arXiv 2210.12566 (`value_based/decoupled_dqn.py`).

A utility for every choice of every factor makes the target's maximum easy, and its variance large: it is a mean of N
maxima of noisy numbers. Here K critics learn the same target, made from the mean of their utilities, so that noise is
averaged before the maximum is taken and not after it. And where one factor explores, the return tells little about the
choices of the others: a regulariser keeps a utility near what its target network says, the more the further the target
is from it.

    value         Q_k(s, a) = 1/N sum over i of U_k,i(s, a_i)
    target        y = R + gamma^n (1 - terminated) 1/N sum over i of max over a of 1/K sum over k of U_target,k,i(s', a)
    loss          mean of sum over k of huber(Q_k(s, a) - y) + beta L_k
    regulariser   L_k = 1/N sum over i of w_k,i (U_target,k,i(s, a_i) - U_k,i(s, a_i))^2
                  w_k,i = 1 - exp(-|y - U_k,i(s, a_i)|), held fixed
    target copy   theta_target <- (1 - rho) theta_target + rho theta
    acting        epsilon-greedy by a critic drawn for every step; one coin makes all choices random, or none
    evaluation    greedy for the mean of the critics' utilities

R is the n-step return, and s' the true successor of its last step; time limits do not stop the bootstrap.

Differences from the paper's code (davidireland3/REValueD): it has no regulariser, which stands here as we understand
the paper, with a mean over factors and the squared distance to the same critic's target network; epsilon falls in a
line over 20,000 steps, there by a factor of 0.999 with every random action, so that it is 0.05 after about as many;
every critic has a layer norm of its own, there one is shared; it takes one environment and five steps between updates,
here five environments step once, each by a critic of its own.

Run:      python algorithms/value_based/revalued.py --env-id discretised/Pendulum-v1
Expected: discretised/Pendulum-v1 above -250 within 30,000 steps; factored: every choice right within 10,000; against
          DecQN: experiments/factored_actions.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, NonNegative, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, factored, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.factored import UtilityNetwork
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import factored_action_counts

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(factored.Settings):
    """Settings of REValueD; the defaults are the paper's. Floats can be swept within one compiled program."""

    num_envs: Count = 5
    updates_per_iteration: Count = 1
    warmup_steps: Count = 10_000
    replay_capacity: Count = 500_000

    target_period: Count = 1
    polyak: Fraction = 0.005
    exploration_steps: Count = 20_000

    num_critics: Count = 10
    """K, critics that learn the same target"""
    regularisation: NonNegative = 0.5
    """beta, weight of the distance between a critic's utilities and those of its target network"""


# Pendulum's rewards reach -16, the paper's 1. Where errors are cut at 1 and utilities held near the target network's,
# they are ahead of it by 1 at most, and the target moves by no more than `polyak` per update.
PRESETS = {
    "factored": factored.TOY | {"num_critics": 5},
    "discretised/Pendulum-v1": factored.PENDULUM | {"num_critics": 5, "polyak": 0.02, "huber_threshold": 100.0},
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


def target_value(batch: Batch, next_utilities: jax.Array) -> jax.Array:
    """Reward plus the successor's discounted value by all critics together: `[batch, critics, factors, choices]` of
    the target network -> `[batch]`. The mean over critics comes first, then each factor's largest."""
    chex.assert_rank(next_utilities, 4)
    chex.assert_shape([batch.reward, batch.discount], (len(next_utilities),))
    mean_utilities = next_utilities.mean(1)
    return batch.reward + batch.discount * action_value(mean_utilities, factored.best(mean_utilities))


def loss_of(values: jax.Array, target: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Huber loss of the values of the actions taken, `[batch, critics]`, against the targets `[batch]` of all critics:
    the mean over the batch, the sum over critics. With threshold 0 half the squared error."""
    chex.assert_rank(values, 2)
    chex.assert_shape(target, (len(values),))
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = values - jax.lax.stop_gradient(target)[:, None]
    # The gradient is the clipped error, and 1/N of it goes to the utility of each choice.
    clipped = jnp.clip(error, -bound, bound)
    return (clipped * (error - clipped / 2)).mean(0).sum()


def regulariser_of(utilities: jax.Array, target_utilities: jax.Array, target: jax.Array) -> jax.Array:
    """How far the utilities of the choices made have moved from the target network's, both `[batch, critics, factors]`,
    where the targets `[batch]` are not about them: mean over batch and factors, sum over critics."""
    chex.assert_rank(utilities, 3)
    chex.assert_equal_shape([utilities, target_utilities])
    chex.assert_shape(target, (len(utilities),))
    # A target far from one factor's utility is more likely what the other choices have brought about.
    weight = jax.lax.stop_gradient(1 - jnp.exp(-jnp.abs(target[:, None, None] - utilities)))
    moved = jnp.square(jax.lax.stop_gradient(target_utilities) - utilities)
    return (weight * moved).mean(-1).mean(0).sum()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """REValueD on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    counts = factored_action_counts(env, env_params)
    config.check()
    clock = config.clock()
    network = UtilityNetwork(config.hidden, counts, config.num_critics)
    optimizer = factored.optimizer_of(config)

    def choices_of(parameters: chex.ArrayTree, batch: Batch) -> jax.Array:
        """Utilities of the choices made, `[batch, critics, factors]`."""
        utilities = network.apply(parameters, batch.observation)
        action = jnp.broadcast_to(batch.action[:, None], utilities.shape[:-1])
        return factored.of_choices(utilities, action)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of all critics, and the target network's step when it is due."""
        # Target: each factor's best choice at the successor, by all critics of the target network together.
        target = target_value(batch, network.apply(learner.target_network, batch.next_observation))

        # Loss: one step of Adam. The target is a constant, and so is what the target network says of this action.
        target_utilities = choices_of(learner.target_network, batch)

        def objective(parameters):
            utilities = choices_of(parameters, batch)
            values = utilities.mean(-1)
            regulariser = regulariser_of(utilities, target_utilities, target)
            loss = loss_of(values, target, config.huber_threshold) + config.regularisation * regulariser
            return loss, (values, regulariser)

        new_network, (loss, (values, regulariser), gradient_norm) = descend(optimizer, learner.network, objective)

        # Target network: a step, or a copy, when it is due. In between it stands still.
        updates = learner.updates + 1
        followed = networks.polyak(learner.target_network, new_network.parameters, config.polyak)
        target_network = networks.periodic_copy(learner.target_network, followed, updates, config.target_period)

        # Metrics: of this batch, by the networks before the step.
        metrics = {
            "loss": loss, "value": values.mean(), "target": target.mean(), "gradient_norm": gradient_norm,
            "regulariser": regulariser, "disagreement": values.std(1).mean(),
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

    def mean_utilities(state: State, observation: jax.Array) -> jax.Array:
        return network.apply(state.learner.network.parameters, observation).mean(1)

    def drawn_utilities(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        """Of one critic for each environment."""
        utilities = network.apply(state.learner.network.parameters, observation)
        critic = draws.integers(jax.random.fold_in(key, 0), (len(observation),), config.num_critics)
        return networks.at_action(utilities, critic)

    policy = factored.policy_of(config, counts, mean_utilities, drawn_utilities)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(action_value(mean_utilities(state, observation), action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        return portable.factored_policy(state.learner.network.parameters["params"], counts)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

"""i-DQN and i-IQN: iterated Q-networks, several Bellman iterations learned at once.

Paper: "Iterated Q-Network: Beyond One-Step Bellman Updates in Deep Reinforcement Learning", Vincent, Palenicek,
Belousov, Peters, D'Eramo, TMLR 2025, arXiv 2403.02107.

DQN learns one Bellman iteration, copies its network into the target, and learns the next one. Here K networks learn K
iterations side by side: each has the network before it for a target, the first one a network that stands still. The
targets of the others are copied often, since what they copy is still being learned; now and then the whole window moves
on by one iteration. A chain of one network is DQN (`--base dqn`), or IQN (`--base iqn`).

    target        y_k = r + gamma (1 - terminated) max over a' of Qbar_{k-1}(s', a'),  k = 1 .. K
    loss          mean of (Q_k(s, a) - y_k)^2 / 2, or of huber; each network by its own gradient and its own Adam
    every D       thetabar_k <- theta_k,  k = 1 .. K-1; thetabar_0 stands still (`sync_period` updates)
    every T       thetabar_{k-1} <- theta_k,  k = 1 .. K, then theta_k <- theta_{k+1},  k = 1 .. K-1; theta_K goes on as
                  it is (`target_period` updates, instead of the above); what Adam remembers stays in its place
    acting        epsilon-greedy on Q_k, k uniform for each environment and step
    i-IQN         y_k and loss are IQN's, at the same fractions for all networks

Differences from the authors' code (theovincent/i-DQN, and its branch "experiments"): evaluation and export take the
first network, not a random one; half the squared error, so that a chain of one is our DQN; T and D count updates, not
environment steps; the networks share nothing, while the results on Atari were made with one torso for all; epsilon
falls from the first step on; images pass MinAtar's convolution. Gradients are not clipped there; where
`--network-gradient-bound` says so, each network's is, by its own norm. i-SAC is left out.

Run:      python algorithms/value_based/iterated_dqn.py --env-id CartPole-v1
Expected: Catch-bsuite above 0.9 of 1 within 20,000 steps; what a longer chain costs and gains in experiments/iterated.
"""

from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, NonNegative, configuration, require
from jaxrl_dist.distributional import law, quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------

BASES = ("dqn", "iqn")


@configuration
class Config(greedy.Settings):
    """Settings of i-DQN and i-IQN. Floats can be swept within one compiled program.

    `target_period` is T, the updates between two moves of the window.
    """

    base: str = "dqn"
    """what is iterated: dqn, which learns means, or iqn, which learns quantiles"""
    chain_length: Count = 3
    """K, networks, each of which learns the Bellman iteration after that of the one before"""
    sync_period: Count = 10
    """D, updates between two copies of the networks into the targets of those after them"""
    network_gradient_bound: NonNegative = 0.0
    """largest norm of one network's gradient; 0: no bound"""
    huber_threshold: NonNegative = 0.0
    """of dqn: error beyond which the loss is linear, in units of return; 0: the squared error throughout"""

    cosines: Count = 64
    """of iqn: cosines that embed a fraction"""
    num_fractions: Count = 64
    """of iqn: N, fractions per update at which the online networks are evaluated"""
    num_target_fractions: Count = 64
    """of iqn: N', fractions per update at which the target networks are evaluated"""
    num_policy_fractions: Count = 32
    """of iqn: fractions whose mean chooses an action"""
    kappa: NonNegative = 1.0
    """of iqn: threshold of the Huber function in units of return; 0 is plain quantile regression"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms, thresholds as in DQN and
# numbers of fractions as in IQN. Paper: Atari's, where T is 6,000 and D 30 steps, four for each update.
FRACTIONS = {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8}
ATARI = greedy.ATARI | {
    "warmup_steps": 20_000, "exploration_steps": 250_000, "target_period": 1_500, "sync_period": 8,
}  # fmt: skip
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | FRACTIONS | {"huber_threshold": 100.0},
    "Acrobot-v1": greedy.ACROBOT | FRACTIONS | {"huber_threshold": 100.0},
    "Catch-bsuite": greedy.CATCH | FRACTIONS | {"huber_threshold": 1.0},
    "Breakout-MinAtar": greedy.BREAKOUT | FRACTIONS | {"huber_threshold": 1.0},
    "paper": ATARI | {"chain_length": 5, "learning_rate": 6.25e-5, "adam_epsilon": 1.5e-4},
    "paper-iqn": ATARI | {"base": "iqn", "learning_rate": 5e-5, "hidden": (512, 512)},
}

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Numbers for every action, `[batch, *observation]` -> `[batch, actions, m]`: one value, or with cosines quantiles
    at the fractions `[batch, m]`."""

    hidden: tuple[int, ...]
    num_actions: int
    cosines: int

    @nn.compact
    def __call__(self, observation: jax.Array, fractions: jax.Array | None = None) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        if self.cosines:
            head = networks.ImplicitQuantileHead(self.hidden[-1], self.num_actions, self.cosines, name="head")
            return head(features, fractions)
        return networks.ActionHead(self.hidden[-1], self.num_actions, 1, name="head")(features)


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change; the first axis of all but `updates` counts networks."""

    network: Trained
    """theta_1 .. theta_K"""
    target_network: chex.ArrayTree
    """thetabar_0 .. thetabar_{K-1}"""
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- The window -------------------------------------------------------------------------------------------------------


def moved(
    online: chex.ArrayTree, target: chex.ArrayTree, updates: jax.Array, target_period: int, sync_period: int
) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """Parameters of the networks and their targets after `updates` updates, all `[K, ...]`."""
    # Masks, since under vmap both branches of a cond run anyway. Where both are due, the window moves.
    shift = updates % target_period == 0
    sync = ~shift & (updates % sync_period == 0)

    def new_target(o: jax.Array, t: jax.Array) -> jax.Array:  # from the networks as they are before the shift
        return jnp.where(shift, o, jnp.where(sync, jnp.concatenate([t[:1], o[:-1]]), t))

    def new_online(o: jax.Array) -> jax.Array:
        return jnp.where(shift, jnp.concatenate([o[1:], o[-1:]]), o)

    return jax.tree.map(new_online, online), jax.tree.map(new_target, online, target)


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_of(batch: Batch, choosing: jax.Array, following: jax.Array) -> jax.Array:
    """Reward plus what follows, discounted, at the action of largest mean: `[batch, actions, n]` that choose and
    `[batch, actions, m]` that follow, both of one target network -> `[batch, m]`."""
    chex.assert_rank([choosing, following], 3)
    chex.assert_equal_shape_prefix([choosing, following], 2)
    chex.assert_shape([batch.reward, batch.discount], (len(following),))
    next_action = choosing.mean(-1).argmax(-1)
    return batch.reward[:, None] + batch.discount[:, None] * networks.at_action(following, next_action)


def loss_of_means(values: jax.Array, target: jax.Array, threshold: float | jax.Array) -> jax.Array:
    """Mean Huber loss of the values of the actions taken, both `[batch, 1]`; threshold 0: half the squared error."""
    chex.assert_shape([values, target], (None, 1))
    chex.assert_equal_shape([values, target])
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = (values - jax.lax.stop_gradient(target))[:, 0]
    clipped = jnp.clip(error, -bound, bound)  # which is the gradient, as in DQN
    return (clipped * (error - clipped / 2)).mean()


def loss_of_quantiles(
    quantiles: jax.Array, fractions: jax.Array, target: jax.Array, kappa: float | jax.Array
) -> jax.Array:
    """Mean quantile Huber loss: quantiles at the fractions, both `[batch, fractions]`, on `[batch, targets]`."""
    chex.assert_rank([quantiles, target], 2)
    chex.assert_equal_shape([quantiles, fractions])
    chex.assert_equal_shape_prefix([quantiles, target], 1)
    return quantile.quantile_huber_loss(quantiles, target, fractions, kappa=kappa, over_predicted="sum").mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """i-DQN or i-IQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    require(config.base in BASES, f"--base is {config.base!r}; it must be one of {', '.join(BASES)}")
    laws, chain = config.base == "iqn", config.chain_length
    network = Network(config.hidden, num_actions, config.cosines if laws else 0)
    midpoints = quantile.midpoints(config.num_policy_fractions)
    bound = jnp.where(config.network_gradient_bound > 0, config.network_gradient_bound, jnp.inf)
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)
    optimizer = optax.chain(optax.clip_by_global_norm(bound), adam)

    def every(function, *of_networks: chex.ArrayTree) -> chex.ArrayTree:
        """`function` of each network, leaves `[K, ...]`; of one alone as DQN and IQN have it, equal to the last bit."""
        if chain > 1:
            return jax.vmap(function)(*of_networks)
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], of_networks)))

    def update(learner: Learner, batch: Batch, key: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step of every network, and the copies that are due."""
        # Fractions of IQN: three independent draws, the same for all networks.
        fractions = next_fractions = None
        if laws:
            online_key, target_key, policy_key = jax.random.split(key, 3)
            fractions = draws.uniform(online_key, (config.batch_size, config.num_fractions))
            target_fractions = draws.uniform(target_key, (config.batch_size, config.num_target_fractions))
            policy_fractions = draws.uniform(policy_key, (config.batch_size, config.num_policy_fractions))
            next_fractions = jnp.concatenate([policy_fractions, target_fractions], axis=1)

        # Targets: network k learns from the successor's value by the target network that represents k - 1.
        def target_by(parameters: chex.ArrayTree) -> jax.Array:
            following = choosing = network.apply(parameters, batch.next_observation, next_fractions)
            if laws:
                choosing, following = jnp.split(following, [config.num_policy_fractions], axis=2)
            return target_of(batch, choosing, following)

        targets = every(target_by, learner.target_network)

        # Losses: each network takes a step of its own. Nothing couples them, nor do the norms of their gradients.
        def descended(trained: Trained, target: jax.Array):
            def objective(parameters):
                outputs = networks.at_action(network.apply(parameters, batch.observation, fractions), batch.action)
                if laws:
                    return loss_of_quantiles(outputs, fractions, target, config.kappa), outputs
                return loss_of_means(outputs, target, config.huber_threshold), outputs

            return descend(optimizer, trained, objective)

        new_network, (loss, values, gradient_norm) = every(descended, learner.network, targets)

        # The window: targets follow the networks that they represent; when it is due, all move on by one iteration.
        updates = learner.updates + 1
        parameters, target_network = moved(
            new_network.parameters, learner.target_network, updates, config.target_period, config.sync_period
        )

        # Metrics: of this batch, by the networks before the step; means over the networks.
        metrics = {
            "loss": loss.mean(), "value": values.mean(), "target": targets.mean(),
            "gradient_norm": gradient_norm.mean(),
        }  # fmt: skip
        return Learner(new_network._replace(parameters=parameters), target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        # Other weights for each network; the first one's are those that DQN or IQN has with this key.
        keys = jnp.stack([network_key, *(jax.random.fold_in(network_key, k) for k in range(1, chain))])
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        parameters = every(lambda key: network.init(key, observation, midpoints[None] if laws else None), keys)
        trained = every(lambda parameters: begin(optimizer, parameters), parameters)
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(Learner(trained, parameters, jnp.int32(0)), filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            # One key more than DQN has; the others are DQN's, as are those of the updates IQN's.
            key, act_key, step_key, head_key = jax.random.split(state.key, 4)
            head = draws.integers(head_key, (config.num_envs,), chain)
            action = exploring(head).explore(state, state.experience.interaction.observation, act_key)
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

    def exploring(head: jax.Array) -> greedy.GreedyPolicy:
        """Each environment by the network of its number in `head` `[num_envs]`."""

        def values(state: State, observation: jax.Array, fractions: jax.Array | None = None) -> jax.Array:
            by_network = every(lambda x: network.apply(x, observation, fractions), state.learner.network.parameters)
            return by_network[head, jnp.arange(len(head))].mean(-1)

        def drawn_values(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
            return values(state, observation, draws.uniform(key, (len(head), config.num_policy_fractions)))

        return greedy.policy_of(config, values, drawn_values if laws else None)

    def first(state: State) -> chex.ArrayTree:
        """The network whose target stands still longest, which evaluation takes."""
        return jax.tree.map(lambda x: x[0], state.learner.network.parameters)

    def outputs_of(state: State, observation: jax.Array) -> jax.Array:
        fractions = jnp.broadcast_to(midpoints, (observation.shape[0], len(midpoints))) if laws else None
        return network.apply(first(state), observation, fractions)

    policy = greedy.policy_of(config, lambda state, x: outputs_of(state, x).mean(-1))

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(networks.at_action(outputs_of(state, observation), action))

    def export(state: State) -> dict[str, jax.Array]:
        extra = {"fractions": midpoints} if laws else {}
        return portable.greedy_policy(first(state)["params"], num_actions, **extra)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=not laws)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

"""PG-Rainbow: PPO whose value reads the return's quantiles, which an IQN learns beside it from a replay.

Paper: "PG-Rainbow: Using Distributional Reinforcement Learning in Policy Gradient Methods", Jeon, Lee, Lee, arXiv
2407.13146; the losses are those of PPO (arXiv 1707.06347) and IQN (arXiv 1806.06923).

Beside PPO an implicit quantile network learns the law of the return off-policy, from a replay of PPO's own steps. What
it says of a state goes through a small distillation network and is multiplied into the features of PPO's critic, so
that advantages are formed with a view of the law. The policy's loss is PPO's.

    law           Z(s, a) = F_phi(s, a, tau),  tau uniform on (0, 1)
    its target    y = r + gamma (1 - terminated) F_phi_target(s', a', tau'_j) with mass pi(a'|s') / N',  j = 1 .. N'
    its loss      mean of sum over i = 1 .. N of mean over y of |tau_i - 1{u < 0}| huber_kappa(u) / kappa,
                  u = y - F_phi(s, a, tau_i)
    quantiles     q_m(s) = sum over a of pi(a|s) F_phi(s, a, (2 m - 1) / 2 M),  m = 1 .. M, normalised
    value         V_psi(s) = f_psi(e_v(s) * relu(1 + W q(s) + b)),  e_v the features of PPO's critic
    loss          policy + c_v value - c_e entropy of pi, as in PPO

There is no official code. The abstract has the replay, PPO's loss and V = f(V_theta * q_phi); the rest is decided here.
The IQN is updated first, then q is computed once and kept for the iteration: old values, next values and all epochs see
the same phi, and no fraction is drawn for V. No gradient of PPO's reaches phi, none of IQN's the rest.

`--iqn-target policy`, the default, learns the law of the policy that acts (expected SARSA): V is told of what it is to
predict, and the mixture of Z(s, a) over pi, the law of the return from s, is claimed and held against Monte-Carlo ones.
`greedy` is IQN as published, a* by the M fixed fractions: the law of a policy that nobody follows, whose errors nothing
corrects. Its copies must be rare (on CartPole every 256; every 16 it came to predict 4e5). There the mean V is claimed.

The product stands before the critic's last hidden layer (of images, before its output); with W = b = 0 it is PPO's. It
starts near there, since a relu of 0 passes no gradient. IQN's step size does not fall; its Adam has PPO's epsilon.

Run:      python algorithms/policy_gradient/pg_rainbow.py --env-id CartPole-v1
Expected: CartPole-v1 above 400 of 500 within 100,000 steps, Catch-bsuite 1 of 1 within 50,000.
"""

from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, Layers, NonNegative, configuration, require
from jaxrl_dist.distributional import law, quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import clipped, draws, interaction, networks, normalization, replay, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, approximate_kl, normalized, policy_loss, value_loss
from jaxrl_dist.learning.devices import split_rows
from jaxrl_dist.learning.interaction import Average, Interaction, Transition, average
from jaxrl_dist.learning.normalization import RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Choice
from jaxrl_dist.learning.replay import Replay
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PG-Rainbow: PPO's, and those of the IQN. Floats can be swept within one program."""

    iqn_target: Literal["policy", "greedy"] = "policy"
    """whose law the IQN learns: that of the policy that acts, or the greedy one's as published"""
    num_quantiles: Count = 16
    """M, quantiles that the value is given"""
    num_fractions: Count = 8
    """N, fractions per update at which the quantile network is evaluated"""
    num_target_fractions: Count = 8
    """N', fractions per update at which its target network is evaluated"""
    quantile_updates: Count = 64
    """updates of the quantile network after each rollout"""
    batch_size: Count = 128
    """transitions per update of the quantile network"""
    replay_capacity: Count = 20_000
    """transitions kept for it"""
    target_period: Count = 8
    """updates between two copies of the quantile network into its target network"""
    quantile_learning_rate: NonNegative = 5e-4
    """step size of the quantile network's Adam"""
    kappa: NonNegative = 1.0
    """threshold of the Huber function in units of return; 0 is plain quantile regression"""
    quantile_hidden: Layers = (64, 64)
    """widths of the quantile network's hidden layers, after the convolution if observations are images"""


# PPO's sizes. Classic control: kappa is a tenth of the largest returns.
MINATAR = {
    "total_steps": 10_000_000, "num_envs": 64, "num_minibatches": 8, "learning_rate": 5e-3, "activation": "relu",
    "convolution": False, "annealing_steps": 10_000_000, "num_quantiles": 32, "num_fractions": 32,
    "num_target_fractions": 32, "quantile_hidden": (128, 128), "quantile_learning_rate": 1e-4, "replay_capacity": 10**5,
}  # fmt: skip
CONTROL = {"num_envs": 8, "learning_rate": 1e-3, "quantile_learning_rate": 1e-3, "kappa": 10.0}
PRESETS = {
    "CartPole-v1": CONTROL | {"total_steps": 100_000},
    "Acrobot-v1": CONTROL | {"total_steps": 200_000},
    "Catch-bsuite": CONTROL | {"total_steps": 50_000, "kappa": 0.1},
    "Breakout-MinAtar": MINATAR,
    "Asterix-MinAtar": MINATAR,
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(clipped.Network):
    """PPO's, with the distilled quantiles inside its critic, `[batch, *observation]`, `[batch, m]` -> law of actions,
    `[batch]`; without quantiles there is no value."""

    @nn.compact
    def __call__(self, observation: jax.Array, quantiles: jax.Array | None = None) -> tuple[Choice, jax.Array | None]:
        features, hidden, gain = clipped.numbers(observation, self.convolution), self.hidden, 2**0.5
        activation = getattr(nn, self.activation)
        if features.ndim == 4:
            features, hidden = networks.Torso(self.hidden, name="torso")(features), ()
        # Small first outputs of the actor: a policy that is next to even.
        actor = networks.MLP((*hidden, self.outputs), activation, orthogonal=(gain, 0.01), name="actor")(features)
        if quantiles is None:
            return Choice(actor), None
        if hidden[:-1]:
            of_value = networks.MLP(hidden[:-1], activation, orthogonal=(gain, gain), name="features")
            features = activation(of_value(features))  # e_v
        told = networks.MLP(features.shape[-1:], orthogonal=(gain, gain), name="distillation")(quantiles)
        fused = features * nn.relu(1 + told)  # e_v * e_q
        value = networks.MLP((*hidden[-1:], 1), activation, orthogonal=(gain, 1.0), name="critic")(fused)
        return Choice(actor), value[:, 0]


class QuantileNetwork(nn.Module):
    """Quantiles of every action as in IQN, `[batch, *observation]`, `[batch, m]` -> `[batch, actions, m]`."""

    hidden: tuple[int, ...]
    num_actions: int
    convolution: bool = True

    @nn.compact
    def __call__(self, observation: jax.Array, fractions: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(clipped.numbers(observation, self.convolution))
        return networks.ImplicitQuantileHead(self.hidden[-1], self.num_actions, name="head")(features, fractions)


# -- State ------------------------------------------------------------------------------------------------------------


class Quantiles(NamedTuple):
    """The IQN, which has updates of its own."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on; `statistics` are those of the quantiles that the value is given."""

    learner: Trained
    quantiles: Quantiles
    statistics: RunningStatistics
    replay: Replay
    interaction: Interaction
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def target_law(reward: jax.Array, discount: jax.Array, probabilities: jax.Array, quantiles: jax.Array) -> Law:
    """The law of reward + discount Z(s', a') for a drawn a': `[batch]` twice, `[batch, actions]`, `[batch, actions, m]`
    -> laws of actions x m atoms."""
    chex.assert_rank([reward, discount, probabilities, quantiles], [1, 1, 2, 3])
    chex.assert_equal_shape_prefix([probabilities, quantiles], 2)
    atoms = reward[:, None, None] + discount[:, None, None] * quantiles
    masses = jnp.broadcast_to(probabilities[..., None] / quantiles.shape[-1], atoms.shape)
    return Law(atoms.reshape(len(atoms), -1), masses.reshape(len(atoms), -1))


def quantile_loss(quantiles: jax.Array, fractions: jax.Array, target: Law, kappa: float | jax.Array) -> jax.Array:
    """Mean quantile Huber loss: quantiles at the fractions, both `[batch, fractions]`, on `[batch, targets]`."""
    chex.assert_equal_shape([quantiles, fractions])
    return quantile.quantile_huber_loss(
        quantiles, target.atoms, fractions, kappa=kappa, over_predicted="sum", target_masses=target.masses
    ).mean()


def averaged(probabilities: jax.Array, quantiles: jax.Array) -> jax.Array:
    """Quantiles averaged over actions at each fraction, `[batch, actions]`, `[batch, actions, m]` -> `[batch, m]`."""
    chex.assert_rank([probabilities, quantiles], [2, 3])
    chex.assert_equal_shape_prefix([probabilities, quantiles], 2)
    return (probabilities[..., None] * quantiles).sum(1)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PG-Rainbow on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions, clock = discrete_action_count(env, env_params), clipped.clock_of(config)
    require(
        config.replay_capacity >= clock.env_steps,
        f"--replay-capacity is {config.replay_capacity}; it must be at least a rollout's {clock.env_steps} steps",
    )
    network = Network(config.hidden, num_actions, False, 0, config.activation, config.convolution)
    quantile_network = QuantileNetwork(config.quantile_hidden, num_actions, config.convolution)
    midpoints = quantile.midpoints(config.num_quantiles)
    optimizer = clipped.optimizer_of(config)
    adam = optax.adam(config.quantile_learning_rate, eps=config.adam_epsilon)
    policy = clipped.policy_of(network, config.discount)

    def laws_of(parameters, quantile_parameters, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """pi(a|s) `[batch, actions]`, and Z(s, a) by its quantiles at fixed fractions `[batch, actions, m]`."""
        fractions = jnp.broadcast_to(midpoints, (observation.shape[0], config.num_quantiles))
        quantiles = quantile_network.apply(quantile_parameters, observation, fractions)
        return jax.nn.softmax(network.apply(parameters, observation)[0].logits), quantiles

    def update_quantiles(quantiles: Quantiles, parameters, rows: Transition, key: jax.Array):
        """One gradient step of the IQN on stored transitions, whoever took them, and the copy when it is due."""
        # Fractions: independent draws. The same ones on both sides of the loss would bias its gradient.
        online_key, target_key = jax.random.split(key)
        fractions = draws.uniform(online_key, (config.batch_size, config.num_fractions))
        target_fractions = draws.uniform(target_key, (config.batch_size, config.num_target_fractions))
        # Target: the successor's law under the policy that acts now, or under the greedy one.
        following = quantile_network.apply(quantiles.target_network, rows.next_observation, target_fractions)
        probabilities, at_midpoints = laws_of(parameters, quantiles.target_network, rows.next_observation)
        if config.iqn_target == "greedy":
            probabilities = jax.nn.one_hot(at_midpoints.mean(-1).argmax(-1), num_actions)
        discount = returns.bootstrap_discount(config.discount, rows.terminated)
        target = target_law(rows.reward, discount, probabilities, following)

        def objective(parameters):
            predicted = quantile_network.apply(parameters, rows.observation, fractions)
            return quantile_loss(networks.at_action(predicted, rows.action), fractions, target, config.kappa), ()

        trained, (loss, _, norm) = descend(adam, quantiles.network, objective)
        updates = quantiles.updates + 1
        copied = networks.periodic_copy(quantiles.target_network, trained.parameters, updates, config.target_period)
        return Quantiles(trained, copied, updates), {"quantile_loss": loss, "quantile_gradient_norm": norm}

    def update(learner: Trained, rows: tuple[Batch, jax.Array]) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step of PPO on a minibatch; its quantiles are data."""
        batch, quantiles = rows

        def objective(parameters):
            actions, value = network.apply(parameters, batch.observation, quantiles)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio, normalized(batch.advantage), config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, config.clip_range if config.clip_values else None)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy  # PPO, eq. 9
            return loss, {
                "policy_loss": of_policy, "value_loss": of_value, "entropy": entropy,
                "approximate_kl": approximate_kl(log_ratio),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return learner, metrics | {"loss": loss, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, network_key, start_key, quantile_key = jax.random.split(key, 4)
        observation = jnp.zeros((1, *env.observation_space(env_params).shape))
        learner = begin(optimizer, network.init(network_key, observation, midpoints[None]))
        parameters = quantile_network.init(quantile_key, observation, midpoints[None])
        buffer = replay.create(interaction.transition_like(env, env_params), config.replay_capacity, clock.env_steps)
        now = interaction.start(env, env_params, start_key, config.num_envs)
        quantiles = Quantiles(begin(adam, parameters), parameters, jnp.int32(0))
        return State(learner, quantiles, normalization.create((config.num_quantiles,)), buffer, now, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key, quantile_key = jax.random.split(state.key, 4)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy, with how likely they were. What was lived is kept.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            action, drawn = policy.explore(state, observation, key)
            return action, memory, drawn

        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )
        rows = jax.tree.map(flat, lived)
        buffer = replay.add(state.replay, rows)

        # Quantile network: on stored transitions, before anything is made of it.
        def learn(quantiles: Quantiles, index: jax.Array):
            sample_key, update_key = jax.random.split(jax.random.fold_in(quantile_key, index))
            sampled = split_rows(replay.sample(buffer, sample_key, config.batch_size))
            return update_quantiles(quantiles, parameters, sampled, update_key)

        quantiles, of_quantiles = jax.lax.scan(learn, state.quantiles, jnp.arange(config.quantile_updates))

        # Its quantiles: once for the whole iteration, so that all values of it are of one function.
        both = jnp.concatenate([rows.observation, rows.next_observation])
        told = averaged(*laws_of(parameters, quantiles.network.parameters, both))
        statistics = normalization.update(state.statistics, told[: clock.env_steps])
        seen = normalize(statistics, told)

        # Advantages: with the value of the true successor, also at a time limit.
        value, next_value = network.apply(parameters, both, seen)[1].reshape(2, *lived.reward.shape)
        advantage = returns.gae(
            lived.reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )
        batch = Batch(rows.observation, *map(flat, (action, log_density, value, advantage, advantage + value)))

        # Epochs of minibatches.
        learner, losses = rollouts.epochs(
            update, state.learner, (batch, seen[: clock.env_steps]), epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        metrics = losses | of_quantiles | {"value": value, "target": batch.target, "quantile_value": told}
        return State(learner, quantiles, statistics, buffer, now, key), episodes | jax.tree.map(average, metrics)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(clock.env_steps, *x.shape[2:])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        probabilities, quantiles = laws_of(state.learner.parameters, state.quantiles.network.parameters, observation)
        if config.iqn_target == "policy":
            nothing = jnp.zeros(observation.shape[0])
            return target_law(nothing, nothing + 1, probabilities, quantiles)
        told = normalize(state.statistics, averaged(probabilities, quantiles))
        return law.equally_weighted(network.apply(state.learner.parameters, observation, told)[1][:, None])

    claim = policy.claim._replace(law=predict, learns_mean=config.iqn_target == "greedy")
    return Agent(init, step, memoryless(policy.act), clock, claim, policy.export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

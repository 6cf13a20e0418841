"""PQN: Parallelised Q-Network, Q-learning without replay and without a target network.

Paper: "Simplifying Deep Temporal Difference Learning", Gallici, Fellows, Ellis, Pou, Masmitja, Foerster, Martin, ICLR
2025, arXiv 2407.04811. Targets: "Incremental Multi-Step Q-Learning", Peng, Williams, Machine Learning 22, 1996.

A replay breaks the correlation of transitions, a target network keeps targets still. Here many environments step side
by side, so that the data of a moment are varied, and every hidden layer is normalised before its activation, which
bounds how far an update moves the values elsewhere. Each rollout is used for a few epochs of minibatches, then dropped.

    V(s)          max over a of Q(s, a), by the network that acted; computed once per rollout
    target        R_t = r_t + gamma ((1 - lambda) V(s_{t+1}) + lambda R_{t+1}) within an episode
                  R_t = r_t + gamma (1 - terminated) V(s_{t+1}) at its end, at a time limit, and at the rollout's end
    loss          mean of (Q(s, a) - R)^2 / 2, R held fixed
    layers        relu(layer norm(linear))
    acting        epsilon-greedy, with one epsilon in a rollout

s_{t+1} is the true successor. Lambda above 0 credits explorative actions as if they were greedy (Peng's Q(lambda)).

Differences from the paper's code (mttga/purejaxql): there the last target but one of a rollout takes V of the state
after the rollout in place of its own successor's, an error that CleanRL's code has not either; a time limit counts as
an end, without a successor's value; images are divided by 255 even where they are of zeros and ones; a convolution's
first weights are he-normal, here uniform in 1 / sqrt(fan-in). The epsilon in a layer norm's root is PyTorch's 1e-5.
Its batch norm, its recurrent networks, and the weight decay that the theory also allows are left out. Values are
learned in scaled rewards (`--reward-scale`), and reported in the environment's.

Run:      python algorithms/value_based/pqn.py --env-id CartPole-v1
Expected: Catch-bsuite above 0.9 of 1 within 50,000 steps, CartPole-v1 above 475 of 500 within 500,000.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Count, Fraction, Layers, Natural, NonNegative, Positive, configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import clipped, greedy, interaction, networks, portable, returns, rollouts
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of PQN; the defaults are the paper's for MinAtar. Floats can be swept within one compiled program."""

    num_envs: Count = 128
    """environments stepped in parallel"""
    num_steps: Count = 32
    """steps of each environment in a rollout"""
    num_epochs: Count = 2
    """times that a rollout is gone through"""
    num_minibatches: Count = 32
    """gradient updates in an epoch"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    trace_decay: Fraction = 0.65
    """lambda, the weight of the next step's target in a target, against the next state's value"""
    reward_scale: Positive = 1.0
    """rewards are multiplied by this before values are learned; what is reported is in the environment's"""
    epsilon_start: Fraction = 1.0
    """probability of a random action in the first rollout"""
    epsilon_end: Fraction = 0.05
    """probability of a random action from `exploration_steps` on"""
    exploration_steps: Count = 1_000_000
    """environment steps in which that probability falls"""
    learning_rate: NonNegative = 5e-4
    """step size of RAdam at the start"""
    annealing_steps: Natural = 0
    """environment steps in which that falls to 0 in a line; 0: it does not fall"""
    gradient_bound: Positive = 10.0
    """largest norm of a gradient"""

    hidden: Layers = (128,)
    """widths of the hidden layers, after the convolution if observations are images"""


# MinAtar's games: the paper's. The others: sizes for a CPU, half as wide as the paper's and with larger steps.
MINATAR = {"total_steps": 10_000_000, "annealing_steps": 10_000_000}
CLASSIC = {
    "total_steps": 500_000, "num_envs": 32, "num_steps": 64, "num_epochs": 4, "num_minibatches": 16,
    "trace_decay": 0.95, "reward_scale": 0.1, "epsilon_end": 0.2, "exploration_steps": 100_000,
    "annealing_steps": 500_000, "hidden": (128, 128),
}  # fmt: skip
PRESETS = {
    "CartPole-v1": CLASSIC,
    "Acrobot-v1": CLASSIC,
    "Catch-bsuite": {
        "total_steps": 50_000, "num_envs": 16, "num_minibatches": 4, "exploration_steps": 5_000, "learning_rate": 1e-3,
        "annealing_steps": 50_000, "hidden": (128, 128),
    },
    "Asterix-MinAtar": MINATAR,
    "Breakout-MinAtar": MINATAR,
    "Freeway-MinAtar": MINATAR,
    "SpaceInvaders-MinAtar": MINATAR,
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Action values, `[batch, *observation]` -> `[batch, actions]`: a layer norm before every activation.

    Images `[height, width, channels]` pass MinAtar's convolution first, normalised over its filters.
    """

    hidden: tuple[int, ...]
    num_actions: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = observation.astype(jnp.float32)
        if features.ndim == 4:
            filtered = networks.Convolution(16, name="convolution")(features)
            features = nn.relu(nn.LayerNorm(epsilon=1e-5, name="convolution_norm")(filtered))
        features = features.reshape(features.shape[0], -1)
        for index, width in enumerate(self.hidden):
            sums = nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"layer_{index}")(features)
            features = nn.relu(nn.LayerNorm(epsilon=1e-5, name=f"norm_{index}")(sums))
        return nn.Dense(self.num_actions, name="head")(features)


# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the updates see of a step, `[rows, ...]`."""

    observation: jax.Array
    action: jax.Array
    target: jax.Array


def loss_of(values: jax.Array, target: jax.Array) -> jax.Array:
    """Half the mean squared error of the values of the actions taken, both `[batch]`."""
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([values, target])
    return 0.5 * ((values - jax.lax.stop_gradient(target)) ** 2).mean()


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """RAdam on gradients of bounded norm; its step size falls with every update."""
    clock = clipped.clock_of(config)
    rate = clipped.falling(config, clock.env_steps / clock.updates)
    return optax.chain(optax.clip_by_global_norm(config.gradient_bound), optax.radam(rate))


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    shape = env.observation_space(env_params).shape
    clock = clipped.clock_of(config)
    network = Network(config.hidden, num_actions)
    optimizer = optimizer_of(config)

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        """In scaled rewards."""
        return network.apply(state.learner.parameters, observation)

    policy = greedy.policy_of(config, action_values)

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on a minibatch, whose targets are those of the whole rollout."""

        def objective(parameters):
            values = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            return loss_of(values, batch.target), values

        learner, (loss, values, norm) = descend(optimizer, learner, objective)
        unit = 1 / config.reward_scale
        return learner, {
            "loss": loss, "value": unit * values.mean(), "target": unit * batch.target.mean(), "gradient_norm": norm,
        }  # fmt: skip

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        learner = begin(optimizer, network.init(network_key, jnp.zeros((1, *shape))))
        return State(learner, interaction.start(env, env_params, start_key, config.num_envs), jnp.int32(0), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key = jax.random.split(state.key, 3)

        # Rollout: epsilon is that of its beginning, since `env_steps` stands still meanwhile.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            return policy.explore(state, observation, key), memory, ()

        now, (lived, _), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )

        # Targets: by the network that acted, once; were they renewed with each epoch, they would chase the updates.
        next_value = jax.vmap(lambda x: action_values(state, x).max(-1))(lived.next_observation)
        target = returns.q_lambda(
            config.reward_scale * lived.reward, next_value, lived.terminated, lived.truncated, config.discount,
            config.trace_decay,
        )  # fmt: skip
        batch = Batch(lived.observation, lived.action, target)
        batch = jax.tree.map(lambda x: x.reshape(clock.env_steps, *x.shape[2:]), batch)

        # Epochs of minibatches.
        learner, losses = rollouts.epochs(
            update, state.learner, batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip
        return State(learner, now, state.env_steps + clock.env_steps, key), episodes | jax.tree.map(average, losses)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        value = networks.at_action(action_values(state, observation), action) / config.reward_scale
        return law.equally_weighted(value[:, None])

    def export(state: State) -> dict[str, Any]:
        parameters, layers = state.learner.parameters["params"], {}
        for index in range(len(config.hidden)):
            layers |= {f"{name}_{index}": x[None] for name, x in parameters[f"layer_{index}"].items()}
            layers |= {f"norm_{name}_{index}": x[None] for name, x in parameters[f"norm_{index}"].items()}
        head = {f"{name}_0": x[None] for name, x in parameters["head"].items()}
        torso = {name: x for name, x in parameters.items() if name.startswith("convolution")}
        parts = {"torso": torso | {"mlp": {"layers": layers}}, "head": {"advantage": {"layers": head}}}
        return portable.greedy_policy(parts, num_actions)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    return Agent(init, step, memoryless(policy.act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

"""PPO with a memory: a gated recurrent unit between observation and action, trained on whole sequences.

Papers: "Proximal Policy Optimization Algorithms", Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347; the
memory: "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation", Cho et al.,
arXiv 1406.1078. The reference is purejaxrl's ppo_rnn.

Where one observation does not say all, the policy acts by what it remembers of the episode. PPO stays as it is, but
that an action's probability depends on all that came before it: a minibatch is some of the environments with all their
steps in order, through which the memory runs again, and gradients flow back through it to the start of the rollout.

    memory        h_t = GRU(h_{t-1}, e(o_t)),  h_{t-1} = 0 where step t begins an episode
    policy, value pi(a | h_t), V(h_t)
    advantage     A_t = delta_t + gamma lambda A_{t+1} within an episode,
                  delta_t = r_t + gamma (1 - terminated) V(GRU(h_t, e(o_{t+1}))) - V(h_t)
    losses        those of PPO (`policy_gradient/ppo.py`), over environments and steps alike

o_{t+1} is the true successor, seen with what is remembered after step t: at a time limit too, where the episode that
follows starts with nothing. The memory at a rollout's start is the one with which the policy went on into it, which
older parameters made: gradients end there (truncated backpropagation through time), and the ratios of the first
minibatch are 1.

Differences from purejaxrl's code: time limits bootstrap (there they are ends), perceptrons are tanh with the gain
sqrt 2 (there relu, as with `--activation relu`, and the gain 2 behind the memory), step sizes need not fall, images
pass a convolution, and continuous actions and normalisation are as in `ppo.py`. One memory serves policy and value, as
there. Past actions and rewards are not remembered, but for what observations say of them.

It claims nothing about returns, since what it expects depends on what it remembers, and is exported as a StableHLO
program alone, which takes and gives the memory: the portable arrays know no memory.

Run:      python algorithms/policy_gradient/ppo_memory.py --env-id MemoryChain-bsuite
Expected: MemoryChain-bsuite above 0.9 of 1 within 40,000 steps (`ppo.py`: 0, which is chance), CartPole-v1 without
          velocities above 450 of 500 within 300,000 (`ppo.py`: 44).
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Agent, Policy
from jaxrl_dist.configuration import Count, Layers, configuration, require
from jaxrl_dist.learning import clipped, interaction, networks, normalization, returns, rollouts
from jaxrl_dist.learning.clipped import Batch, approximate_kl, normalized, policy_loss, value_loss
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Choice, Gaussian

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config(clipped.Settings):
    """Settings of PPO with a memory; the defaults are purejaxrl's. Floats can be swept within one program."""

    num_minibatches: Count = 4
    """gradient updates in an epoch, each from all steps of some of the environments"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""

    hidden: Layers = (128,)
    """widths of the hidden layers before the memory; actor and critic have the same once more behind it"""
    memory_size: Count = 128
    """numbers that are remembered"""


# Sizes for a CPU.
SMALL = {"num_envs": 8, "num_steps": 64, "learning_rate": 1e-3, "hidden": (64,), "memory_size": 64}
PRESETS = {
    "MemoryChain-bsuite": {"total_steps": 100_000, **SMALL},
    "velocity_free/CartPole-v1": {"total_steps": 300_000, "annealing_steps": 300_000, **SMALL},
    "velocity_free/Pendulum-v1": {
        "total_steps": 300_000, **SMALL, "num_envs": 16, "num_steps": 128, "num_epochs": 10, "num_minibatches": 8,
        "discount": 0.9, "entropy_weight": 0.0, "annealing_steps": 300_000, "clip_values": False,
        "normalize_rewards": True,
    },
}  # fmt: skip

# -- Network ----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Memories `[envs, memory_size]`, observations `[steps, envs, *observation]` and where a step begins an episode
    `[steps, envs]` -> the memory after each step, the law of its action, its value, leaves `[steps, envs, ...]`."""

    hidden: tuple[int, ...]
    memory_size: int
    outputs: int
    continuous: bool
    activation: str = "tanh"
    convolution: bool = True

    @nn.compact
    def __call__(
        self, memory: jax.Array, observation: jax.Array, begins: jax.Array
    ) -> tuple[jax.Array, Choice | Gaussian, jax.Array]:
        chex.assert_equal_shape_prefix([observation, begins], 2)
        steps, activation = begins.shape, getattr(nn, self.activation)
        features = clipped.numbers(observation.reshape(-1, *observation.shape[2:]), self.convolution)
        if features.ndim == 4:
            features = networks.Torso(self.hidden, name="torso")(features)
        else:
            encoder = networks.MLP(self.hidden, activation, orthogonal=(2**0.5, 2**0.5), name="encoder")
            features = activation(encoder(features))
        memories = networks.GRU(self.memory_size, name="memory")(memory, features.reshape(*steps, -1), begins)
        remembered = memories.reshape(-1, self.memory_size)
        # Small first outputs of the actor: a policy that is next to even.
        widths = *self.hidden, self.outputs
        actor = networks.MLP(widths, activation, orthogonal=(2**0.5, 0.01), name="actor")(remembered)
        value = networks.MLP((*self.hidden, 1), activation, orthogonal=(2**0.5, 1.0), name="critic")(remembered)
        actor, value = actor.reshape(*steps, self.outputs), value.reshape(steps)
        if not self.continuous:
            return memories, Choice(actor), value
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return memories, Gaussian(actor, jnp.broadcast_to(log_std, actor.shape)), value


# -- State ------------------------------------------------------------------------------------------------------------


class Sequences(NamedTuple):
    """What the updates see: rows are environments, and each comes with all of its steps."""

    memory: jax.Array
    """`[1, rows, memory_size]`, before the first step"""
    begins: jax.Array
    """`[steps, rows]`, where a step is the first of an episode"""
    batch: Batch
    """leaves `[steps, rows, ...]`"""


class State(NamedTuple):
    """Everything that training needs to go on; the memory is in `interaction`."""

    learner: Trained
    interaction: Interaction
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PPO with a memory on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    require(
        config.num_envs % config.num_minibatches == 0,
        f"--num-minibatches is {config.num_minibatches}; it must divide --num-envs = {config.num_envs}",
    )
    clock = clipped.clock_of(config)
    memoryless = clipped.network_of(config, env, env_params)
    network = Network(
        config.hidden, config.memory_size, memoryless.outputs, memoryless.continuous, config.activation,
        config.convolution,
    )  # fmt: skip
    optimizer = clipped.optimizer_of(config)

    def start(num_envs: int) -> jax.Array:
        return jnp.zeros((num_envs, config.memory_size))

    def look(state: State, memory: jax.Array, observation: jax.Array) -> tuple[jax.Array, Choice | Gaussian, jax.Array]:
        """One step: memories and observations `[rows, ...]` -> the memories after it, laws of actions, values."""
        seen, begins = normalize(state.normalizer, observation)[None], jnp.zeros((1, observation.shape[0]), bool)
        return jax.tree.map(lambda x: x[0], network.apply(state.learner.parameters, memory, seen, begins))

    def taken(action: jax.Array) -> jax.Array:
        return jnp.clip(action, -1, 1) if network.continuous else action

    def act(state: State, observation: jax.Array, memory: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        memory, actions, _ = look(state, memory, observation)
        return taken(actions.mode()), memory

    def update(learner: Trained, sequences: Sequences) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on some of the environments."""
        (memory,), begins, batch = sequences

        def objective(parameters):
            _, actions, value = network.apply(parameters, memory, batch.observation, begins)
            log_ratio = actions.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), actions.entropy().mean()
            of_policy = policy_loss(ratio.ravel(), normalized(batch.advantage.ravel()), config.clip_range)
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
        key, network_key, start_key = jax.random.split(key, 3)
        shape = env.observation_space(env_params).shape
        parameters = network.init(network_key, start(1), jnp.zeros((1, 1, *shape)), jnp.zeros((1, 1), bool))
        now = interaction.start(env, env_params, start_key, config.num_envs, start)
        normalizer = normalization.create(shape) if config.normalize_observations else None
        scale = normalization.create_scale(config.num_envs) if config.normalize_rewards else None
        return State(begin(optimizer, parameters), now, normalizer, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key = jax.random.split(state.key, 3)

        # Rollout: actions of the present policy, with how likely they were, and what it remembered and expected.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            memory, actions, value = look(state, memory, observation)
            action = actions.sample(key)
            return taken(action), memory, (action, actions.log_density(action), value, memory)

        now, (lived, (action, log_density, value, memories)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow, start
        )

        # Advantages: the value of the true successor takes one step of memory more, whatever came after it.
        done = lived.terminated | lived.truncated
        scale, reward = normalization.scale_rewards(state.scale, lived.reward, done, config.discount)
        after = (x.reshape(clock.env_steps, *x.shape[2:]) for x in (memories, lived.next_observation))
        next_value = look(state, *after)[2].reshape(value.shape)
        advantage = returns.gae(
            reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )

        # Epochs of minibatches: sequences from the memory that the rollout began with, where no flag says more.
        observation = normalize(state.normalizer, lived.observation)
        batch = Batch(observation, action, log_density, value, advantage, advantage + value)
        begins = jnp.concatenate([jnp.zeros_like(done[:1]), done[:-1]])
        learner, losses = rollouts.epochs(
            update, state.learner, Sequences(state.interaction.memory[None], begins, batch), epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches, axis=1,
        )  # fmt: skip

        normalizer = state.normalizer
        if normalizer is not None:
            seen = lived.observation.reshape(clock.env_steps, *lived.observation.shape[2:])
            normalizer = normalization.update(normalizer, seen)
        unit = normalization.unit(scale)
        metrics = losses | {"value": value * unit, "target": batch.target * unit}
        return State(learner, now, normalizer, scale, key), episodes | jax.tree.map(average, metrics)

    return Agent(init, step, Policy(act, start), clock)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

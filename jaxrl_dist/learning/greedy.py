"""What agents with a choice of actions share: the settings of their family, and greedy and epsilon-greedy policies."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.configuration import Count, Fraction, Layers, NonNegative, Positive, configuration
from jaxrl_dist.learning import policies
from jaxrl_dist.learning import settings as of_replay

# Sizes for a CPU, the same for every algorithm of the family, so that they differ in what they learn alone.
CARTPOLE = {
    "total_steps": 500_000, "updates_per_iteration": 1, "warmup_steps": 1_000, "batch_size": 128,
    "target_period": 200, "learning_rate": 5e-4,
}  # fmt: skip
ACROBOT = CARTPOLE | {"total_steps": 250_000}
CATCH = {
    "warmup_steps": 500, "replay_capacity": 20_000, "target_period": 100, "learning_rate": 1e-3,
    "exploration_steps": 5_000, "hidden": (64, 64),
}  # fmt: skip
BREAKOUT = {
    "total_steps": 200_000, "batch_size": 32, "exploration_steps": 100_000, "epsilon_end": 0.01, "hidden": (128,),
}  # fmt: skip
# Atari's, as Dopamine and the papers after DQN have them.
ATARI = {
    "num_envs": 1, "steps_per_iteration": 4, "updates_per_iteration": 1, "warmup_steps": 50_000,
    "replay_capacity": 1_000_000, "batch_size": 32, "target_period": 2_500, "epsilon_end": 0.01,
    "exploration_steps": 1_000_000, "hidden": (512,), "reward_clip": 1.0,
}  # fmt: skip


@configuration
class Settings(of_replay.Settings):
    """What an epsilon-greedy agent with target network and n-step returns can be told."""

    num_envs: Count = 8
    updates_per_iteration: Count = 2
    warmup_steps: Count = 5_000
    replay_capacity: Count = 100_000
    batch_size: Count = 64
    num_steps: Count = 1
    """steps of reward in a target before it bootstraps"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    reward_clip: NonNegative = 0.0
    """learn from rewards cut to plus or minus this (Atari: 1), so that what is predicted are returns of cut rewards;
    evaluation counts the raw ones; 0: no cut"""
    target_period: Count = 1_000
    """updates between two copies of the network into the target network"""
    learning_rate: NonNegative = 2.5e-4
    """step size of Adam"""
    adam_epsilon: Positive = 3.125e-4
    """what Adam adds to its denominator"""
    epsilon_start: Fraction = 1.0
    """probability of a random action at the first step"""
    epsilon_end: Fraction = 0.05
    """probability of a random action from `exploration_steps` on"""
    exploration_steps: Count = 50_000
    """environment steps in which that probability falls, warm-up included"""

    hidden: Layers = (128, 128)
    """widths of the hidden layers, after the convolution if observations are images"""


class GreedyPolicy(NamedTuple):
    """The policies of a state with `env_steps`; actions are `[batch]` int32."""

    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """the action of largest value"""
    explore: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """the same, or any action with the probability that `Settings` say"""
    follow: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """what the critic's return is of: the greedy action, without a bonus"""


def policy_of(
    settings: Any,
    values: Callable[[Any, jax.Array], jax.Array],
    drawn_values: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None,
) -> GreedyPolicy:
    """Acting by `values(state, observation)` `[batch, actions]`, of equal values by the first.

    drawn_values: `(state, observation, key)`, by which an agent explores that draws its values.
    """

    def act(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        return values(state, observation).argmax(-1).astype(jnp.int32)

    def explore(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        epsilon = policies.linear_schedule(
            settings.epsilon_start, settings.epsilon_end, settings.exploration_steps, state.env_steps
        )
        if drawn_values is None:
            return policies.epsilon_greedy(key, values(state, observation), epsilon)
        key, value_key = jax.random.split(key)
        return policies.epsilon_greedy(key, drawn_values(state, observation, value_key), epsilon)

    def follow(state: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    return GreedyPolicy(act, explore, follow)

"""What soft actor-critics share: settings, a squashed Gaussian actor, its temperature, and how they act and export."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.configuration import Fraction, NonNegative, Positive, Real, configuration
from jaxrl_dist.learning import networks, policies, portable
from jaxrl_dist.learning import settings as of_replay
from jaxrl_dist.learning.normalization import normalize
from jaxrl_dist.learning.optimization import Trained, descend

# Sizes and step sizes for a CPU, ours.
PENDULUM = {
    "warmup_steps": 1_000, "batch_size": 128, "actor_hidden": (64, 64), "critic_hidden": (64, 64),
    "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "temperature_learning_rate": 1e-3,
}  # fmt: skip


@configuration
class Settings(of_replay.Settings):
    """What a soft actor-critic can be told; the defaults are SAC's, arXiv 1812.05905."""

    normalize_observations: bool = False
    """normalise observations by running mean and variance"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    polyak: Fraction = 0.005
    """how far the target parameters move towards the online ones, whenever they do"""
    actor_learning_rate: NonNegative = 3e-4
    """step size of the actor's Adam"""
    critic_learning_rate: NonNegative = 3e-4
    """step size of the critics' Adam"""
    temperature_learning_rate: NonNegative = 3e-4
    """step size of the temperature's Adam; 0 keeps the temperature where it starts"""
    initial_temperature: Positive = 1.0
    """alpha at the start, the weight of the policy's entropy"""
    target_entropy_per_action: Real = -1.0
    """entropy to which the temperature steers the policy, per action component"""

    actor_hidden: tuple[int, ...] = (256, 256)
    """widths of the actor's hidden layers"""
    critic_hidden: tuple[int, ...] = (256, 256)
    """widths of each critic's hidden layers"""


class Actor(nn.Module):
    """Mean and log standard deviation of the pre-tanh action, `[batch, observation]` -> two `[batch, actions]`.

    activation: a function of `flax.linen`; glorot: first weights, as in `networks.EnsembleMLP`.
    """

    hidden: tuple[int, ...]
    action_size: int
    activation: str = "relu"
    log_std_bounds: tuple[float, float] = (-20, 2)
    glorot: bool = False

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        features, activation = (*self.hidden, 2 * self.action_size), getattr(nn, self.activation)
        outputs = networks.MLP(features, activation, glorot=self.glorot, name="mlp")(observation)
        mean, position = jnp.split(outputs, 2, axis=-1)
        return mean, self.log_std(position)

    def log_std(self, position: jax.Array) -> jax.Array:
        """What the network says, cut at `log_std_bounds`; an actor that bounds it in another way overrides this."""
        return jnp.clip(position, *self.log_std_bounds)

    def sample(self, parameters: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Action `[batch, actions]` and its log-density `[batch]`, reparameterised."""
        return policies.squashed_gaussian(key, *self.apply(parameters, observation))


def log_temperature(config: Any) -> jax.Array:
    """log alpha at the start."""
    return jnp.log(jnp.asarray(config.initial_temperature, jnp.float32))


def temperature_loss(log_temperature: jax.Array, log_density: jax.Array, target_entropy: jax.Array) -> jax.Array:
    """Log form of the dual objective: its slope is the excess of the policy's entropy over the target.

    log_density: `[batch]`, of actions of the policy.

    Source: the authors' code of SAC, arXiv 1812.05905, whose eq. 18 has alpha in place of log alpha.
    """
    chex.assert_rank(log_density, 1)
    return -log_temperature * jax.lax.stop_gradient(log_density + target_entropy).mean()


def steer(
    optimizer: optax.GradientTransformation, log_temperature: Trained, log_density: jax.Array, target_entropy: jax.Array
) -> Trained:
    """log alpha after one step down `temperature_loss`; log_density: `[batch]`, of actions of the policy."""
    return descend(optimizer, log_temperature, lambda x: (temperature_loss(x, log_density, target_entropy), ()))[0]


class SoftPolicy(NamedTuple):
    """The policies of a state with `learner.actor`, `learner.log_temperature` (both `Trained`) and `experience`."""

    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """without exploration: the mode"""
    follow: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """an action as it is drawn, and its entropy bonus `[batch]`: what explores, and what the critic's return is of"""
    export: Callable[[Any], dict[str, jax.Array]]


def policy_of(actor: Actor, reward_scale: float | jax.Array | None = None) -> SoftPolicy:
    """Acting, exploring and exporting by an `Actor`.

    reward_scale: factor on the rewards that are learned from, if there is one; bonuses are in the environment's units.
    """

    def act(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        mean, _ = actor.apply(state.learner.actor.parameters, normalize(state.experience.normalizer, observation))
        return policies.squashed_mode(mean)

    def follow(state: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        observation = normalize(state.experience.normalizer, observation)
        action, log_density = actor.sample(state.learner.actor.parameters, observation, key)
        bonus = -jnp.exp(state.learner.log_temperature.parameters) * log_density
        return action, bonus if reward_scale is None else bonus / reward_scale

    def export(state: Any) -> dict[str, jax.Array]:
        layers = state.learner.actor.parameters["params"]["mlp"]["layers"]
        return portable.mlp_policy(layers, actor.action_size, state.experience.normalizer, actor.activation)

    return SoftPolicy(act, follow, export)

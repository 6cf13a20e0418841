"""What agents with several choices at once share: settings, network, how utilities are read, and how they are acted on.

An action is `[factors]`, int32, one of a number of choices for each factor. A network gives a utility to every choice
of every factor; the value of an action is the mean of the utilities of its choices, and so the best action is the best
choice of each factor by itself. `value_based/decoupled_dqn.py` and `value_based/revalued.py` say where that is from.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_dist.configuration import Count, Fraction, Layers, NonNegative, Positive, configuration
from jaxrl_dist.learning import draws, greedy, networks, policies
from jaxrl_dist.learning.greedy import GreedyPolicy

# Sizes for a CPU, the same for every algorithm of the family, so that they differ in what they learn alone.
TOY = {
    "total_steps": 10_000, "num_envs": 8, "updates_per_iteration": 2, "warmup_steps": 2_000, "batch_size": 128,
    "learning_rate": 5e-4, "epsilon_start": 1.0, "epsilon_end": 0.05, "exploration_steps": 5_000, "hidden": (128, 128),
}  # fmt: skip
PENDULUM = TOY | {"total_steps": 50_000, "exploration_steps": 10_000}


@configuration
class Settings(greedy.Settings):
    """What an agent with utilities can be told, beside what every epsilon-greedy one can."""

    batch_size: Count = 256
    num_steps: Count = 3
    """steps of reward in a target before it bootstraps"""

    learning_rate: NonNegative = 1e-4
    """step size of Adam"""
    adam_epsilon: Positive = 1e-8
    """what Adam adds to its denominator"""
    gradient_bound: Positive = 40.0
    """largest norm of a gradient"""
    huber_threshold: NonNegative = 1.0
    """error beyond which the loss is linear, in units of return; 0: the squared error throughout"""
    polyak: Fraction = 1.0
    """how far the target network goes towards the network every `target_period` updates; 1: all the way, a copy"""

    hidden: Layers = (512, 512)
    """the width of the features, and for each residual block the width inside it"""


def optimizer_of(settings: Any) -> optax.GradientTransformation:
    """Adam on gradients of bounded norm."""
    adam = optax.adam(settings.learning_rate, eps=settings.adam_epsilon)
    return optax.chain(optax.clip_by_global_norm(settings.gradient_bound), adam)


# -- network ----------------------------------------------------------------------------------------------------------


class UtilityNetwork(nn.Module):
    """Utilities of several independent networks, `[batch, inputs]` -> `[batch, members, factors, choices]`.

    A linear layer, residual blocks x + relu(linear(relu(linear(x)))), a layer norm (epsilon 1e-5), and a linear layer
    for each factor. Factors of fewer choices than the most have a utility of minus infinity for those that they lack.
    Weights and biases start uniform in ±1/sqrt(fan-in). Parameters have a leading axis of members.
    """

    hidden: tuple[int, ...]
    counts: tuple[int, ...]
    members: int = 1

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        width, *blocks = self.hidden
        factors, choices = len(self.counts), max(self.counts)
        inputs = observation.astype(jnp.float32)
        features = EnsembleDense(self.members, width, name="input")(
            jnp.broadcast_to(inputs, (self.members, *inputs.shape))
        )
        for index, narrow in enumerate(blocks):
            inner = nn.relu(EnsembleDense(self.members, narrow, name=f"inner_{index}")(features))
            features += nn.relu(EnsembleDense(self.members, width, name=f"outer_{index}")(inner))
        features = EnsembleNorm(name="norm")(features)
        utilities = EnsembleDense(self.members, factors * choices, name="utilities")(features)
        utilities = utilities.reshape(self.members, -1, factors, choices).swapaxes(0, 1)
        return jnp.where(exists(self.counts), utilities, -jnp.inf)


class EnsembleDense(nn.Module):
    """A linear layer of each member, `[members, batch, inputs]` -> `[members, batch, features]`.

    On a CPU a few products are taken one by one: the gradient of five members of width 128 takes 4.7 ms, batched 13.
    """

    members: int
    features: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        fan_in = inputs.shape[-1]
        uniform = networks.uniform(fan_in**-0.5)
        kernel = self.param("kernel", uniform, (self.members, fan_in, self.features))
        bias = self.param("bias", uniform, (self.members, self.features))
        if jax.default_backend() == "cpu" and self.members <= networks.UNROLLED_MEMBERS_ON_CPU:
            pairs = zip(jnp.unstack(inputs), jnp.unstack(kernel), strict=True)
            return jnp.stack([one @ matrix for one, matrix in pairs]) + bias[:, None]
        return jnp.einsum("mbi,mio->mbo", inputs, kernel) + bias[:, None]


class EnsembleNorm(nn.Module):
    """A layer norm of each member, over the last axis of `[members, batch, features]`."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        shape = inputs.shape[0], inputs.shape[-1]
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        centred = inputs - inputs.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return normal * scale[:, None] + bias[:, None]


def exists(counts: tuple[int, ...]) -> np.ndarray:
    """Which choices each factor has: bool `[factors, choices]`."""
    return np.arange(max(counts)) < np.array(counts)[:, None]


# -- utilities --------------------------------------------------------------------------------------------------------


def of_choices(utilities: jax.Array, action: jax.Array) -> jax.Array:
    """The utilities of the choices made, `[..., factors, choices]`, `[..., factors]` -> `[..., factors]`."""
    return jnp.take_along_axis(utilities, action[..., None], axis=-1)[..., 0]


def best(utilities: jax.Array) -> jax.Array:
    """The best choice of every factor, of equal ones the first: `[..., factors, choices]` -> int32 `[..., factors]`.

    No other action has a larger mean of utilities.
    """
    return utilities.argmax(-1).astype(jnp.int32)


# -- acting -----------------------------------------------------------------------------------------------------------


def epsilon_greedy(
    key: jax.Array, utilities: jax.Array, counts: tuple[int, ...], epsilon: float | jax.Array
) -> jax.Array:
    """The best action, or any one with probability epsilon: `[batch, factors, choices]` -> `[batch, factors]`.

    One coin decides for the whole action: either all choices are random or none is.
    """
    coin_key, action_key = jax.random.split(key)
    shape = utilities.shape[:-1]
    anything = draws.integers(action_key, shape, np.array(counts))
    random = jax.random.uniform(coin_key, shape[:1]) < epsilon
    return jnp.where(random[:, None], anything, best(utilities))


def policy_of(
    settings: Any,
    counts: tuple[int, ...],
    utilities: Callable[[Any, jax.Array], jax.Array],
    drawn_utilities: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None,
) -> GreedyPolicy:
    """Acting by `utilities(state, observation)` `[batch, factors, choices]`; actions are `[batch, factors]` int32.

    drawn_utilities: `(state, observation, key)`, by which an agent explores that draws them. It may not use up the key,
    which the coin is drawn from: an agent that has nothing to draw explores as one that draws nothing.
    """

    def act(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        return best(utilities(state, observation))

    def explore(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        epsilon = policies.linear_schedule(
            settings.epsilon_start, settings.epsilon_end, settings.exploration_steps, state.env_steps
        )
        found = drawn_utilities(state, observation, key) if drawn_utilities else utilities(state, observation)
        return epsilon_greedy(key, found, counts, epsilon)

    def follow(state: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act(state, observation, key), jnp.zeros(observation.shape[0])

    return GreedyPolicy(act, explore, follow)

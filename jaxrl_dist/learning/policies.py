"""Action distributions: sampling, log-density and mode as pure functions of a network's outputs."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.distributional import categorical
from jaxrl_dist.learning import draws


def squashed_gaussian(
    key: jax.Array, mean: jax.Array, log_std: jax.Array, scale: float | jax.Array = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Sample a = scale * tanh(x), x ~ N(mean, exp(log_std)^2), with its log-density (SAC, appendix C).

    Args:
        key: PRNG key.
        mean, log_std: `[..., actions]`.
        scale: half-range of the actions, a scalar or `[actions]`.

    Returns:
        action `[..., actions]` and log-density `[...]`, differentiable in mean and log_std (reparameterised).
    """
    noise = jax.random.normal(key, mean.shape, mean.dtype)
    pre_tanh = mean + jnp.exp(log_std) * noise
    return scale * jnp.tanh(pre_tanh), _log_density(noise, pre_tanh, log_std, scale)


def squashed_gaussian_log_density(
    pre_tanh: jax.Array, mean: jax.Array, log_std: jax.Array, scale: float | jax.Array = 1.0
) -> jax.Array:
    """Log-density of the action scale * tanh(pre_tanh), `[..., actions]` -> `[...]`.

    log(1 - tanh(x)^2) is written as 2 (log 2 - x - softplus(-2x)), which keeps full precision in the tails, where
    1 - tanh(x)^2 underflows. Take `pre_tanh` from the sample: inverting the action would lose it again.
    """
    chex.assert_equal_shape([pre_tanh, mean, log_std])
    return _log_density((pre_tanh - mean) * jnp.exp(-log_std), pre_tanh, log_std, scale)


def _log_density(noise, pre_tanh, log_std, scale):
    # A sample knows its noise exactly; recovered from the difference to the mean, a tiny deviation would lose it.
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - pre_tanh - jax.nn.softplus(-2 * pre_tanh)) + jnp.log(scale)
    return (gaussian - log_slope).sum(-1)


def squashed_mode(mean: jax.Array, scale: float | jax.Array = 1.0) -> jax.Array:
    """The action scale * tanh(mean) that evaluation runs, `[..., actions]`."""
    return scale * jnp.tanh(mean)


def epsilon_greedy(key: jax.Array, values: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """The action of largest value, or any one with probability epsilon: `[..., actions]` -> `[...]`.

    Of equal values the first is taken. The uniform draw includes the best action, whose probability is so 1 - epsilon +
    epsilon / actions.
    """
    explore_key, action_key = jax.random.split(key)
    shape = values.shape[:-1]
    anything = draws.integers(action_key, shape, values.shape[-1])
    return jnp.where(jax.random.uniform(explore_key, shape) < epsilon, anything, values.argmax(-1).astype(jnp.int32))


def linear_schedule(start: float | jax.Array, end: float | jax.Array, steps: int, now: jax.Array) -> jax.Array:
    """From `start` at step 0 in a straight line to `end` at step `steps`, and `end` from there on."""
    return start + (end - start) * jnp.clip(now / steps, 0, 1)


# -- laws of actions ---------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Laws of one of n actions, by `[..., n]` logits."""

    logits: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, self.logits).astype(jnp.int32)

    def mode(self) -> jax.Array:
        return self.logits.argmax(-1).astype(jnp.int32)

    def log_density(self, action: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(self.logits), action[..., None], axis=-1)[..., 0]

    def entropy(self) -> jax.Array:
        return categorical.entropy(jax.nn.softmax(self.logits))


class Gaussian(NamedTuple):
    """Laws of independent components, `[..., actions]`; log densities and entropies are sums over them."""

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        return self.mean + jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape)

    def mode(self) -> jax.Array:
        return self.mean

    def log_density(self, action: jax.Array) -> jax.Array:
        noise = (action - self.mean) / jnp.exp(self.log_std)
        return (-0.5 * noise**2 - self.log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)

    def entropy(self) -> jax.Array:
        return (self.log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum(-1)


class SquashedGaussian(NamedTuple):
    """Laws of tanh(x) with independent Gaussian x, `[..., actions]`, for actions that are given and not drawn.

    Actions closer to ±1 than 1e-5 count as if they were so far away: their density is not bounded.
    """

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        return squashed_gaussian(key, self.mean, self.log_std)[0]

    def mode(self) -> jax.Array:
        return squashed_mode(self.mean)

    def log_density(self, action: jax.Array) -> jax.Array:
        return squashed_gaussian_log_density(jnp.arctanh(jnp.clip(action, -1 + 1e-5, 1 - 1e-5)), *self)

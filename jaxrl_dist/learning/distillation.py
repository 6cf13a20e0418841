"""What agents share that look for the new by distilling random networks (RND, DRND): settings, networks, statistics.

Papers: "Exploration by Random Network Distillation", Burda, Edwards, Storkey, Klimov, arXiv 1810.12894; "Exploration
and Anti-Exploration with Distributional Random Network Distillation", Yang, Tao, Lyu, Li, arXiv 2401.09750.
`policy_gradient/rnd.py` says what each piece is for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_dist.agent import Clock
from jaxrl_dist.configuration import Count, Fraction, Layers, NonNegative, Positive, configuration
from jaxrl_dist.learning import clipped, interaction, networks, normalization
from jaxrl_dist.learning.interaction import Interaction
from jaxrl_dist.learning.normalization import RunningStatistics

# -- settings ---------------------------------------------------------------------------------------------------------


@configuration
class Settings(clipped.Settings):
    """PPO's settings with the numbers of RND's code, and those of the bonus."""

    num_envs: Count = 128
    num_steps: Count = 128
    warmup_steps: Count = 10_000
    """environment steps with uniform random actions, for the first statistics of the bonus's observations"""

    discount: Fraction = 0.999
    """gamma_E, the weight of the next step's return of rewards"""
    intrinsic_discount: Fraction = 0.99
    """gamma_I, the same of bonuses, whose return does not end with an episode"""
    extrinsic_weight: NonNegative = 2.0
    """c_E, weight of the advantages of rewards"""
    intrinsic_weight: NonNegative = 1.0
    """c_I, weight of the advantages of bonuses"""
    normalize_advantages: bool = False
    """normalise the sum of both advantages within the minibatch, as PPO does"""
    clip_range: Positive = 0.1
    clip_values: bool = False
    value_weight: NonNegative = 1.0
    """c_v, weight of the two values' losses"""
    entropy_weight: NonNegative = 1e-3
    learning_rate: NonNegative = 1e-4

    predictor_share: Fraction = 0.25
    """part of the steps from which the predictor learns: 32 environments' worth"""
    predictor_hidden: Layers = (64, 64, 64)
    """widths of the predictor's hidden layers, after the convolution of images"""
    target_hidden: Layers = (64, 64)
    """the same of the random networks that it predicts"""
    num_features: Count = 32
    """D, outputs of all of them"""


def clock_of(settings: Any) -> Clock:
    """That of PPO, with the steps of the warm-up in whole rounds."""
    warmup_steps = -(-settings.warmup_steps // settings.num_envs) * settings.num_envs
    return clipped.clock_of(settings)._replace(warmup_steps=warmup_steps)


# -- networks ---------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Numbers made of an observation, `[batch, *observation]` -> `[batch, outputs]`; images may pass a convolution.

    Weights start as orthogonal matrices times sqrt(2), those of the last layer times `last_gain`, biases at 0.
    """

    hidden: tuple[int, ...]
    outputs: int
    activation: Callable[[jax.Array], jax.Array] = nn.leaky_relu
    last_gain: float = 2**0.5
    convolution: bool = True

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = clipped.numbers(observation, self.convolution)
        if features.ndim == 4:
            features = self.activation(networks.Convolution(16, name="convolution")(features))
            features = features.reshape(features.shape[0], -1)
        gains = 2**0.5, self.last_gain
        return networks.MLP((*self.hidden, self.outputs), self.activation, orthogonal=gains, name="mlp")(features)


class Distilled(NamedTuple):
    """The networks beside PPO's; each has parameters of its own."""

    critic: Features
    """the value of bonuses, `[batch, 1]`"""
    predictor: Features
    target: Features


def networks_of(settings: Any) -> Distilled:
    """The networks for any environment that PPO takes."""
    return Distilled(
        Features(settings.hidden, 1, getattr(nn, settings.activation), 1.0, settings.convolution),
        Features(settings.predictor_hidden, settings.num_features),
        Features(settings.target_hidden, settings.num_features),
    )


# -- what the bonus sees ----------------------------------------------------------------------------------------------

BOUND = 5
"""Deviations from the mean beyond which observations look alike to the bonus."""


def begin_statistics(
    env, env_params, now: Interaction, key: jax.Array, rounds: int
) -> tuple[Interaction, RunningStatistics]:
    """Let uniform random actions be taken for `rounds` steps of every environment; statistics of what they led to."""
    num_envs, dtype = now.episode_return.shape[0], interaction.transition_like(env, env_params).action.dtype

    def one(carry, index):
        now, statistics = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(key, index))
        action = interaction.random_action(env, env_params, action_key, num_envs).astype(dtype)
        now, lived, _ = interaction.step(env, env_params, now, action, step_key)
        return (now, normalization.update(statistics, lived.next_observation.astype(jnp.float32))), None

    statistics = normalization.create(now.observation.shape[1:])
    return jax.lax.scan(one, (now, statistics), jnp.arange(rounds))[0]


# -- learning ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the updates see of a step, `[rows, ...]`: as `clipped.Batch`, with both values and what is distilled."""

    observation: jax.Array
    action: jax.Array
    log_density: jax.Array
    advantage: jax.Array
    """of both streams"""
    value: jax.Array
    target: jax.Array
    intrinsic_value: jax.Array
    intrinsic_target: jax.Array
    seen: jax.Array
    """the true successor as the bonus's networks see it"""
    answer: Any
    """what the random networks make of that: they never change, so one look serves all epochs"""

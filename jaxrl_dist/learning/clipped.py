"""What agents that learn by PPO's clipped objective share: settings, network, minibatch, losses, and how they act.

Paper: "Proximal Policy Optimization Algorithms", Schulman et al., arXiv 1707.06347. `policy_gradient/ppo.py` says what
each piece is for.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Claim, Clock
from jaxrl_dist.configuration import Count, Fraction, Layers, Natural, NonNegative, Positive, configuration, require
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import networks, portable
from jaxrl_dist.learning.normalization import RunningStatistics, normalize
from jaxrl_dist.learning.policies import Choice, Gaussian
from jaxrl_dist.learning.spaces import continuous_action_size, discrete_action_count, kind_of, spaces_of

# -- settings ---------------------------------------------------------------------------------------------------------


@configuration
class Settings:
    """What an agent of the family can be told; the defaults are CleanRL's for classic control."""

    num_envs: Count = 4
    """environments stepped in parallel"""
    num_steps: Count = 128
    """steps of each environment in a rollout"""
    num_epochs: Count = 4
    """times that a rollout is gone through"""
    num_minibatches: Count = 4
    """gradient updates in an epoch"""

    discount: Fraction = 0.99
    """gamma, the weight of the next step's return"""
    gae_decay: Fraction = 0.95
    """lambda, the weight of later advantages in an advantage"""
    clip_range: Positive = 0.2
    """epsilon, how far the ratio of probabilities may be moved"""
    clip_values: bool = True
    """hold values within the same range around what they were"""
    value_weight: NonNegative = 0.5
    """c_v, weight of the value's loss"""
    entropy_weight: NonNegative = 0.01
    """c_e, weight of the policy's entropy"""
    learning_rate: NonNegative = 2.5e-4
    """step size of Adam at the start"""
    annealing_steps: Natural = 0
    """environment steps in which that falls to 0 in a line; 0: it does not fall"""
    adam_epsilon: Positive = 1e-5
    """what Adam adds to its denominator"""
    gradient_bound: Positive = 0.5
    """largest norm of a gradient"""

    hidden: Layers = (64, 64)
    """widths of the hidden layers"""
    activation: Literal["tanh", "relu"] = "tanh"
    """what follows a hidden layer; behind a convolution always relu"""
    convolution: bool = True
    """let images pass MinAtar's convolution and then the hidden layers, which actor and critic share; if not, they are
    numbers like others"""


def clock_of(settings: Any) -> Clock:
    """The updates and environment steps of an iteration: one rollout. Raises ConfigurationError where the minibatches
    do not divide it."""
    rows = settings.num_envs * settings.num_steps
    require(
        rows % settings.num_minibatches == 0,
        f"--num-minibatches is {settings.num_minibatches}; it must divide --num-envs x --num-steps = {rows}",
    )
    return Clock(settings.num_epochs * settings.num_minibatches, rows)


def falling(settings: Any, env_steps: float, every: int = 1) -> Callable[[jax.Array], jax.Array]:
    """The step size by the count of updates, which falls to 0 in a line within `annealing_steps`, once in `every`
    updates; those take `env_steps` environment steps."""

    def rate(count: jax.Array) -> jax.Array:
        steps = settings.annealing_steps
        passed = (count // every) * (env_steps / steps) if steps else 0.0
        return settings.learning_rate * jnp.maximum(1 - passed, 0)

    return rate


def optimizer_of(settings: Any) -> optax.GradientTransformation:
    """Adam on gradients of bounded norm, with one step size for all updates of an iteration."""
    clock = clock_of(settings)
    rate = falling(settings, clock.env_steps, every=clock.updates)
    return optax.chain(optax.clip_by_global_norm(settings.gradient_bound), optax.adam(rate, eps=settings.adam_epsilon))


# -- network ----------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Policy and value, `[batch, *observation]` -> law of actions, `[batch]`; apart but for what images pass.

    With `num_quantiles`, the quantiles of the return instead of its mean: `[batch, num_quantiles]`.
    """

    hidden: tuple[int, ...]
    outputs: int
    continuous: bool
    num_quantiles: int = 0
    activation: str = "tanh"
    convolution: bool = True

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[Choice | Gaussian, jax.Array]:
        features, hidden, activation = numbers(observation, self.convolution), self.hidden, getattr(nn, self.activation)
        if features.ndim == 4:
            features, hidden = networks.Torso(self.hidden, name="torso")(features), ()
        # Small first outputs of the actor: a policy that is next to even.
        actor = networks.MLP((*hidden, self.outputs), activation, orthogonal=(2**0.5, 0.01), name="actor")(features)
        widths = *hidden, self.num_quantiles or 1
        value = networks.MLP(widths, activation, orthogonal=(2**0.5, 1.0), name="critic")(features)
        value = value if self.num_quantiles else value[:, 0]
        if not self.continuous:
            return Choice(actor), value
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(actor, jnp.broadcast_to(log_std, actor.shape)), value


def numbers(observation: jax.Array, convolution: bool) -> jax.Array:
    """Observations as float32 `[batch, n]`; images as they are if they pass a convolution."""
    features = observation.astype(jnp.float32)
    return features if features.ndim == 4 and convolution else features.reshape(features.shape[0], -1)


def network_of(settings: Any, env, env_params, num_quantiles: int = 0) -> Network:
    """The network for an environment, whose critic predicts so many quantiles, or with 0 the mean.

    Raises UnsupportedEnvironment where its spaces are others than a choice of actions with array observations, or
    vectors both.
    """
    continuous = kind_of(spaces_of(env, env_params)[0]) == "continuous"
    outputs = (continuous_action_size if continuous else discrete_action_count)(env, env_params)
    return Network(
        settings.hidden, outputs, continuous, num_quantiles, settings.activation, settings.convolution
    )  # fmt: skip


# -- losses -----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the updates see of a step, `[rows, ...]`; the last four are of the policy that took it."""

    observation: jax.Array
    action: jax.Array
    log_density: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array


def policy_loss(ratio: jax.Array, advantage: jax.Array, clip_range: float | jax.Array) -> jax.Array:
    """The clipped surrogate objective (PPO, eq. 7), negative, of `[batch]` ratios and advantages."""
    chex.assert_equal_shape([ratio, advantage])
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip_range, 1 + clip_range) * advantage).mean()


def value_loss(
    value: jax.Array, old_value: jax.Array, target: jax.Array, clip_range: float | jax.Array | None
) -> jax.Array:
    """Half the squared error of `[batch]` values, or that of values held within `clip_range` of old ones if larger."""
    chex.assert_equal_shape([value, old_value, target])
    errors = (value - target) ** 2
    if clip_range is not None:
        held = old_value + jnp.clip(value - old_value, -clip_range, clip_range)
        errors = jnp.maximum(errors, (held - target) ** 2)
    return 0.5 * errors.mean()


def approximate_kl(log_ratio: jax.Array) -> jax.Array:
    """Divergence of the old policy from the new one, estimated from `[batch]` log(new / old) of the old one's actions.

    Mean of rho - 1 - log rho, which has the same expectation as that of -log rho, and is never negative (Schulman,
    "Approximating KL Divergence", 2020).
    """
    return (jnp.exp(log_ratio) - 1 - log_ratio).mean()


def mean_of(values: jax.Array, known: jax.Array) -> jax.Array:
    """The mean of those of `[rows]` values that are known, 0 where none is."""
    chex.assert_equal_shape([values, known])
    return jnp.where(known, values, 0).sum() / jnp.maximum(known.sum(), 1)


def normalized(advantage: jax.Array) -> jax.Array:
    """Advantages `[batch]` with mean 0 and standard deviation 1."""
    chex.assert_rank(advantage, 1)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


# -- how it acts ------------------------------------------------------------------------------------------------------


class ClippedPolicy(NamedTuple):
    """The policies of a state whose `learner` has the network's parameters."""

    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """the mode"""
    explore: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, tuple[jax.Array, jax.Array]]]
    """what the environment is given, and the drawn action with its log density"""
    claim: Claim
    export: Callable[[Any], dict[str, Any]]


def policy_of(
    network: Network,
    discount: float | jax.Array,
    normalizer: Callable[[Any], RunningStatistics | None] = lambda state: None,
    unit: Callable[[Any], jax.Array | float] = lambda state: 1.0,
) -> ClippedPolicy:
    """Acting by a network. `normalizer`: a state's statistics of observations; `unit`: of the values, in rewards."""

    def outputs(state: Any, observation: jax.Array) -> tuple[Choice | Gaussian, jax.Array]:
        return network.apply(state.learner.parameters, normalize(normalizer(state), observation))

    def taken(action: jax.Array) -> jax.Array:
        return jnp.clip(action, -1, 1) if network.continuous else action

    def act(state: Any, observation: jax.Array, key: jax.Array) -> jax.Array:
        return taken(outputs(state, observation)[0].mode())

    def explore(state: Any, observation: jax.Array, key: jax.Array):
        policy, _ = outputs(state, observation)
        action = policy.sample(key)
        return taken(action), (action, policy.log_density(action))

    def follow(state: Any, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return taken(outputs(state, observation)[0].sample(key)), jnp.zeros(observation.shape[0])

    def predict(state: Any, observation: jax.Array, action: jax.Array) -> Law:
        atoms = outputs(state, observation)[1].reshape(observation.shape[0], -1)
        return law.equally_weighted(unit(state) * atoms)

    def export(state: Any) -> dict[str, Any]:
        return portable.actor_policy(
            state.learner.parameters["params"], network.outputs, normalizer(state), network.activation,
            continuous=network.continuous, squash=False,
        )  # fmt: skip

    claim = Claim(follow, predict, discount, learns_mean=not network.num_quantiles, of_states=True)
    return ClippedPolicy(act, explore, claim, export)

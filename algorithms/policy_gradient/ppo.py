"""PPO: Proximal Policy Optimization, for a choice of actions and for continuous ones.

Paper: "Proximal Policy Optimization Algorithms", Schulman, Wolski, Dhariwal, Radford, Klimov, arXiv 1707.06347;
advantages: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", Schulman et al., arXiv
1506.02438.

The policy acts for a while, and what it did is used for several epochs of minibatches. A step that makes an action more
likely pays only until its probability has changed by the factor 1 + epsilon: there the objective is flat, so that
nothing is gained by leaving the policy whose actions are at hand.

    advantage     A_t = delta_t + gamma lambda A_{t+1} within an episode,
                  delta_t = r_t + gamma (1 - terminated) V(s_{t+1}) - V(s_t)
    ratio         rho = pi(a|s) / pi_old(a|s)
    policy        -mean of min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A), A normalised within the minibatch
    value         mean of 1/2 max((V - R)^2, (V_old + clip(V - V_old, -epsilon, epsilon) - R)^2),  R = A + V_old
    loss          policy + c_v value - c_e entropy of pi

s_{t+1} is the true successor: at a time limit the advantage takes its value, and nothing of the next episode. CleanRL's
and purejaxrl's codes take a time limit for an end.

Differences from the paper, all from its authors' code (openai/baselines) or CleanRL's: the value's loss is clipped
(`--clip-values`), advantages are normalised, gradients cut by their norm, step sizes fall in a line
(`--annealing-steps`), weights start orthogonal, observations and rewards may be normalised. Continuous actions are
Gaussian, with a deviation that does not depend on the state, and cut to [-1, 1] where the environment takes them.
Evaluation takes the mode. Statistics are those from before the rollout, so that the first minibatch has ratios of 1;
rewards are divided by one number per rollout.

Run:      python algorithms/policy_gradient/ppo.py --env-id CartPole-v1
Expected: CartPole-v1 above 400 of 500 within 100,000 steps, Pendulum-v1 above -220 within 300,000.
"""

from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_dist.agent import Agent, Claim, Clock, memoryless
from jaxrl_dist.configuration import Count, Fraction, Layers, Natural, NonNegative, Positive, configuration, require
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import interaction, networks, normalization, portable, returns, rollouts
from jaxrl_dist.learning.interaction import Average, Interaction, average
from jaxrl_dist.learning.normalization import RewardScale, RunningStatistics, normalize
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.policies import Choice, Gaussian
from jaxrl_dist.learning.spaces import continuous_action_size, discrete_action_count, kind_of, spaces_of

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of PPO; the defaults are CleanRL's for classic control. Floats can be swept within one program."""

    num_envs: Count = 4
    """environments stepped in parallel"""
    num_steps: Count = 128
    """steps of each environment in a rollout"""
    num_epochs: Count = 4
    """times that a rollout is gone through"""
    num_minibatches: Count = 4
    """gradient updates in an epoch"""
    normalize_observations: bool = False
    """normalise observations by running mean and variance"""
    normalize_rewards: bool = False
    """divide rewards by the running standard deviation of their discounted sum"""

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
    """widths of the hidden layers; of images those after the convolution, which actor and critic share"""


# Sizes for a CPU.
PRESETS = {
    "CartPole-v1": {"total_steps": 100_000, "num_envs": 8, "learning_rate": 1e-3},
    "Acrobot-v1": {"total_steps": 200_000, "num_envs": 8, "learning_rate": 1e-3},
    "Catch-bsuite": {"total_steps": 50_000, "num_envs": 8, "learning_rate": 1e-3},
    "Pendulum-v1": {
        "total_steps": 300_000, "num_envs": 16, "num_epochs": 10, "num_minibatches": 8, "discount": 0.9,
        "entropy_weight": 0.0, "learning_rate": 1e-3, "annealing_steps": 300_000, "clip_values": False,
        "normalize_rewards": True,
    },
}  # fmt: skip

# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Policy and value, `[batch, *observation]` -> law of actions, `[batch]`; apart from each other but for images."""

    hidden: tuple[int, ...]
    outputs: int
    continuous: bool

    @nn.compact
    def __call__(self, observation: jax.Array) -> tuple[Choice | Gaussian, jax.Array]:
        features, hidden = observation.astype(jnp.float32), self.hidden
        if features.ndim == 4:
            features, hidden = networks.Torso(self.hidden, name="torso")(features), ()
        features = features.reshape(features.shape[0], -1)
        # Small first outputs of the actor: a policy that is next to even.
        actor = networks.MLP((*hidden, self.outputs), nn.tanh, orthogonal=(2**0.5, 0.01), name="actor")(features)
        value = networks.MLP((*hidden, 1), nn.tanh, orthogonal=(2**0.5, 1.0), name="critic")(features)[:, 0]
        if not self.continuous:
            return Choice(actor), value
        log_std = self.param("log_std", nn.initializers.zeros, (self.outputs,))
        return Gaussian(actor, jnp.broadcast_to(log_std, actor.shape)), value


# -- State ------------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Trained
    interaction: Interaction
    normalizer: RunningStatistics | None
    scale: RewardScale | None
    key: jax.Array


class Batch(NamedTuple):
    """What the updates see of a step, `[rows, ...]`; the last four are of the policy that took it."""

    observation: jax.Array
    action: jax.Array
    log_density: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array


# -- Losses -----------------------------------------------------------------------------------------------------------


def policy_loss(ratio: jax.Array, advantage: jax.Array, clip_range: float | jax.Array) -> jax.Array:
    """The clipped surrogate objective (eq. 7), negative, of `[batch]` ratios and advantages."""
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


def normalized(advantage: jax.Array) -> jax.Array:
    """Advantages `[batch]` with mean 0 and standard deviation 1."""
    chex.assert_rank(advantage, 1)
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


# -- Agent ------------------------------------------------------------------------------------------------------------


def make_agent(config: Config, env, env_params) -> Agent:
    """PPO on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    continuous = kind_of(spaces_of(env, env_params)[0]) == "continuous"
    outputs = (continuous_action_size if continuous else discrete_action_count)(env, env_params)
    rows = config.num_envs * config.num_steps
    require(
        rows % config.num_minibatches == 0,
        f"--num-minibatches is {config.num_minibatches}; it must divide --num-envs x --num-steps = {rows}",
    )
    clock = Clock(config.num_epochs * config.num_minibatches, rows)
    network = Network(config.hidden, outputs, continuous)

    def rate(count: jax.Array) -> jax.Array:
        """The step size after so many updates, one for all those of an iteration."""
        passed = (count // clock.updates) * (rows / config.annealing_steps) if config.annealing_steps else 0.0
        return config.learning_rate * jnp.maximum(1 - passed, 0)

    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_bound), optax.adam(rate, eps=config.adam_epsilon))

    def update(learner: Trained, batch: Batch) -> tuple[Trained, dict[str, jax.Array]]:
        """One gradient step on a minibatch."""

        def objective(parameters):
            policy, value = network.apply(parameters, batch.observation)
            log_ratio = policy.log_density(batch.action) - batch.log_density
            ratio, entropy = jnp.exp(log_ratio), policy.entropy().mean()
            of_policy = policy_loss(ratio, normalized(batch.advantage), config.clip_range)
            of_value = value_loss(value, batch.value, batch.target, config.clip_range if config.clip_values else None)
            loss = of_policy + config.value_weight * of_value - config.entropy_weight * entropy  # eq. 9
            return loss, {
                "policy_loss": of_policy, "value_loss": of_value, "entropy": entropy,
                "approximate_kl": (ratio - 1 - log_ratio).mean(),
                "clipped_ratios": (jnp.abs(ratio - 1) > config.clip_range).mean(),
            }  # fmt: skip

        learner, (loss, metrics, norm) = descend(optimizer, learner, objective)
        return learner, metrics | {"loss": loss, "gradient_norm": norm}

    def init(key: jax.Array) -> State:
        key, network_key, start_key = jax.random.split(key, 3)
        shape = env.observation_space(env_params).shape
        learner = begin(optimizer, network.init(network_key, jnp.zeros((1, *shape))))
        now = interaction.start(env, env_params, start_key, config.num_envs)
        normalizer = normalization.create(shape) if config.normalize_observations else None
        scale = normalization.create_scale(config.num_envs) if config.normalize_rewards else None
        return State(learner, now, normalizer, scale, key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        key, collect_key, epochs_key = jax.random.split(state.key, 3)
        parameters = state.learner.parameters

        # Rollout: actions of the present policy, with how likely they were.
        def follow(observation: jax.Array, memory: Any, key: jax.Array):
            policy, _ = network.apply(parameters, normalize(state.normalizer, observation))
            action = policy.sample(key)
            return taken(action), memory, (action, policy.log_density(action))

        now, (lived, (action, log_density)), episodes = rollouts.collect(
            env, env_params, state.interaction, collect_key, config.num_steps, follow
        )

        # Advantages: with the value of the true successor, also at a time limit.
        done = lived.terminated | lived.truncated
        scale, reward = normalization.scale_rewards(state.scale, lived.reward, done, config.discount)
        observation, next_observation = (
            normalize(state.normalizer, x) for x in (lived.observation, lived.next_observation)
        )
        value, next_value = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (observation, next_observation)
        )
        advantage = returns.gae(
            reward, value, next_value, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )
        batch = Batch(observation, action, log_density, value, advantage, advantage + value)
        batch = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), batch)

        # Epochs of minibatches.
        learner, losses = rollouts.epochs(
            update, state.learner, batch, epochs_key,
            num_epochs=config.num_epochs, num_minibatches=config.num_minibatches,
        )  # fmt: skip

        normalizer = state.normalizer
        if normalizer is not None:
            normalizer = normalization.update(normalizer, lived.observation.reshape(rows, *lived.observation.shape[2:]))
        unit = normalization.unit(scale)
        metrics = losses | {"value": value * unit, "target": batch.target * unit}
        return State(learner, now, normalizer, scale, key), episodes | jax.tree.map(average, metrics)

    def taken(action: jax.Array) -> jax.Array:
        """What the environment is given."""
        return jnp.clip(action, -1, 1) if continuous else action

    def act(state: State, observation: jax.Array, key: jax.Array) -> jax.Array:
        return taken(network.apply(state.learner.parameters, normalize(state.normalizer, observation))[0].mode())

    def follow(state: State, observation: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy, _ = network.apply(state.learner.parameters, normalize(state.normalizer, observation))
        return taken(policy.sample(key)), jnp.zeros(observation.shape[0])

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        value = network.apply(state.learner.parameters, normalize(state.normalizer, observation))[1]
        return law.equally_weighted(normalization.unit(state.scale) * value[:, None])

    def export(state: State) -> dict[str, Any]:
        parameters = state.learner.parameters["params"]
        if continuous:
            layers = parameters["actor"]["layers"]
            return portable.mlp_policy(layers, outputs, state.normalizer, "tanh", squash=False)
        parts = {"head": {"advantage": parameters["actor"]}, "torso": parameters.get("torso", {})}
        return portable.greedy_policy(parts, outputs, state.normalizer, activation=np.array("tanh"))

    claim = Claim(follow, predict, config.discount, learns_mean=True, of_states=True)
    return Agent(init, step, memoryless(act), clock, claim, export)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

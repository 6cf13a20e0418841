"""LogDQN: Q-learning of mapped values, one channel of rewards at a time: small values as finely as large ones.

Papers: "Orchestrated Value Mapping for Reinforcement Learning", Fatemi, Tavakoli, ICLR 2022, arXiv 2203.07171; before
it "Using a Logarithmic Mapping to Enable Lower Discount Factors in Reinforcement Learning", van Seijen, Fatemi,
Tavakoli, NeurIPS 2019, arXiv 1906.00572.

A network with errors of one size cannot tell values of 0.001 and 0.002 apart beside others of 10: with a low discount
all far rewards look alike. Here it learns f(Q), the logarithm of Q say, whose errors are relative. The mean of f(Q) is
not f of the mean: samples are averaged before they are mapped, by a step of size beta, and the network's own steps only
follow. A logarithm wants positive values: rewards are split into channels, each with outputs of its own.

    values        Q_j = f_j^-1(T_j),  T_j the network's outputs,  Q = sum over j of lambda_j Q_j
    action        a* = argmax over a of Q_target(s', a): one for all channels
    sample        U_j = r_j + gamma (1 - terminated) cut(Q_target,j(s', a*)),  cut to [0, bound]
    averaged      V_j = max(q + beta (U_j - q), d),  q = cut(Q_j(s, a));  the floor d is for logarithms only
    loss          mean of sum over j of huber(T_j(s, a) - f_j(V_j))
    log           f(q) = c ln q + D
    loglin        the same up to q = exp(-D / c), from there on its tangent, c exp(D / c) q - c
    polar         r_1 = max(r, 0), r_2 = max(-r, 0),  lambda = (1, -1)
    bands         for each sign: a magnitude goes whole to the band (10^(k-1), 10^k] that holds it, lambda_k = 10^k
    slices        for each sign: a magnitude fills the bands from the lowest on, lambda_k is the band's width

Target copies and acting are DQN's. `--channels none --mapping identity --averaging-rate 1 --huber-threshold 0` is DQN,
but for the cut, then to both sides. Bands and slices are the authors' configurations 1 and 2.

Differences from the authors' code (microsoft/orchestrated-value-mapping): Adam instead of centred RMSProp, with its
step size; 32-bit numbers; rewards of a channel are cut to 1 only where `--reward-clip` says so, and the highest band
has no upper end; the last layer's biases start at random; evaluation without exploration; epsilon falls from the first
step on; images pass MinAtar's convolution. Its ensemble of two polar learners and its scaled gradients are left out. As
there, it is the n-step return that is split, not each reward.

Run:      python algorithms/value_based/log_dqn.py --env-id CartPole-v1
Expected: Catch-bsuite above 0.9 of 1 within 20,000 steps; low discounts and small rewards in experiments/value_mapping.
"""

from typing import Annotated, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.configuration import Bounds, NonNegative, Positive, Real, configuration, require
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience, greedy, networks, portable
from jaxrl_dist.learning.experience import Batch, Experience
from jaxrl_dist.learning.interaction import Average, average
from jaxrl_dist.learning.optimization import Trained, begin, descend
from jaxrl_dist.learning.spaces import discrete_action_count

# -- Configuration ----------------------------------------------------------------------------------------------------

MAPPINGS = ("log", "loglin", "identity")
CHANNELS = ("none", "polar", "bands", "slices")
Number = float | jax.Array


@configuration
class Config(greedy.Settings):
    """Settings of LogDQN. Floats can be swept within one compiled program."""

    channels: str = "polar"
    """how rewards are split: none, polar (by their sign), bands or slices (by sign and magnitude)"""
    num_bands: Annotated[int, Bounds(1, 8)] = 4
    """channels of each sign, where they are bands or slices; the k-th ends at 10^k, the first (k = 0) at 1"""
    mapping: str = "loglin"
    """how values are mapped: log, loglin, identity, or one of these for each channel, joined by commas"""
    map_scale: Positive = 0.5
    """c, the slope of the logarithm at a value of 1"""
    map_offset: Real = 0.0
    """D, the logarithm's output for a value of 1"""
    smallest_value: Positive = 0.01
    """d, below which a logarithm's values are not told apart; a channel without rewards comes to rest here"""
    averaging_rate: Annotated[float, Bounds(0, 1, open_below=True)] = 0.1
    """beta, the step towards a sample before it is mapped; the larger, the more a logarithm's values fall short of the
    mean, and the faster it learns: the steps of the network are on top"""
    value_bound: NonNegative = 0.0
    """largest value of a channel, to which they are cut; 0: 1 / (1 - discount), right for channels' rewards up to 1"""
    huber_threshold: NonNegative = 1.0
    """error of a mapped value beyond which the loss is linear; 0: the squared error throughout"""


# Environments: sizes for a CPU, the same for every algorithm of this family but for its atoms. Paper: Atari's.
PRESETS = {
    "CartPole-v1": greedy.CARTPOLE | {"averaging_rate": 0.5},
    "Acrobot-v1": greedy.ACROBOT | {"averaging_rate": 0.5},
    "Catch-bsuite": greedy.CATCH | {"averaging_rate": 0.5},
    "Breakout-MinAtar": greedy.BREAKOUT | {"averaging_rate": 0.5},
    "paper": greedy.ATARI | {
        "warmup_steps": 20_000, "exploration_steps": 250_000, "target_period": 2_000, "discount": 0.96,
        "smallest_value": 0.01687, "learning_rate": 2.5e-3, "adam_epsilon": 1e-5,
    },
}  # fmt: skip

# -- Channels and mappings --------------------------------------------------------------------------------------------


def weights_of(channels: str, num_bands: int) -> tuple[float, ...]:
    """lambda, what a channel counts in the reward and in the value, those of positive rewards first."""
    if channels == "none":
        return (1.0,)
    count = 1 if channels == "polar" else num_bands
    scales = [1.0, *((10.0 if channels == "bands" else 9.0) * 10.0 ** (k - 1) for k in range(1, count))]
    return (*scales, *(-scale for scale in scales))


def split_rewards(reward: jax.Array, channels: str, num_bands: int) -> jax.Array:
    """Rewards `[batch]` by channel, `[batch, channels]`; times `weights_of`, they add up to the reward."""
    chex.assert_rank(reward, 1)
    if channels == "none":
        return reward[:, None]
    scales = weights_of(channels, num_bands)
    scales, parts = scales[: len(scales) // 2], []
    for magnitude in (jnp.maximum(reward, 0), jnp.maximum(-reward, 0)):
        for k, scale in enumerate(scales):  # the last one has no upper end
            low, high = 0.0 if k == 0 else 10.0 ** (k - 1), jnp.inf if k == len(scales) - 1 else 10.0**k
            inside = jnp.where((magnitude > low) & (magnitude <= high), magnitude, 0)
            parts.append((inside if channels == "bands" else jnp.clip(magnitude - low, 0, high - low)) / scale)
    return jnp.stack(parts, axis=-1)


def mapped(mapping: str, value: jax.Array, scale: Number, offset: Number, floor: Number) -> jax.Array:
    """f of values of any shape: a logarithm's, no smaller than the floor, or they themselves."""
    if mapping == "identity":
        return value
    value = jnp.maximum(value, floor)
    logarithm = scale * jnp.log(value) + offset
    if mapping == "log":
        return logarithm
    return jnp.where(value > jnp.exp(-offset / scale), scale * jnp.exp(offset / scale) * value - scale, logarithm)


def unmapped(mapping: str, output: jax.Array, scale: Number, offset: Number) -> jax.Array:
    """f^-1 of outputs of any shape; the two pieces of loglin meet at the output 0."""
    if mapping == "identity":
        return output
    # Bounded, where the other piece is taken and where an output is wild: no difference of two channels is inf - inf.
    exponent = ((output if mapping == "log" else jnp.minimum(output, 0)) - offset) / scale
    exponential = jnp.exp(jnp.minimum(exponent, 60.0))
    if mapping == "log":
        return exponential
    return jnp.where(output > 0, (output + scale) * jnp.exp(-offset / scale) / scale, exponential)


# -- Networks ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Mapped values, `[batch, *observation]` -> `[batch, actions, channels]`: each channel has a hidden layer."""

    hidden: tuple[int, ...]
    num_actions: int
    num_channels: int

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        features = networks.Torso(self.hidden[:-1], name="torso")(observation)
        head = networks.EnsembleMLP(self.num_channels, (self.hidden[-1], self.num_actions), name="head")
        return head(features).swapaxes(1, 2)


# -- State ------------------------------------------------------------------------------------------------------------


class Learner(NamedTuple):
    """What updates change."""

    network: Trained
    target_network: chex.ArrayTree
    updates: jax.Array


class State(NamedTuple):
    """Everything that training needs to go on."""

    learner: Learner
    experience: Experience
    env_steps: jax.Array
    key: jax.Array


# -- Losses and targets -----------------------------------------------------------------------------------------------


def sample_values(rewards: jax.Array, discount: jax.Array, next_values: jax.Array, next_action: jax.Array) -> jax.Array:
    """U, rewards `[batch, channels]` plus discounted values `[batch, actions, channels]` at one action for all."""
    chex.assert_rank(next_values, 3)
    chex.assert_shape([discount, next_action], (len(rewards),))
    following = networks.at_action(next_values, next_action)
    chex.assert_equal_shape([rewards, following])
    return rewards + discount[:, None] * following


def averaged_values(values: jax.Array, samples: jax.Array, rate: Number) -> jax.Array:
    """A step from values to samples, both `[batch, channels]`, in the regular space."""
    chex.assert_equal_shape([values, samples])
    return (1 - rate) * values + rate * samples  # at rate 1 the samples to the last bit


def loss_of(outputs: jax.Array, target: jax.Array, threshold: Number) -> jax.Array:
    """Mean Huber loss of the mapped values of the actions taken, both `[batch, channels]`, summed over channels."""
    chex.assert_rank(outputs, 2)
    chex.assert_equal_shape([outputs, target])
    bound = jnp.where(threshold > 0, threshold, jnp.inf)
    error = outputs - jax.lax.stop_gradient(target)
    clipped = jnp.clip(error, -bound, bound)  # which is the gradient, as in DQN
    return (clipped * (error - clipped / 2)).sum(-1).mean()


# -- Agent ------------------------------------------------------------------------------------------------------------


def mappings_of(config: Config) -> list[str]:
    """The mapping of each channel. Raises ConfigurationError for settings that do not go together."""
    require(config.channels in CHANNELS, f"--channels is {config.channels!r}; it must be one of {', '.join(CHANNELS)}")
    names, count = config.mapping.split(","), len(weights_of(config.channels, config.num_bands))
    require(
        all(name in MAPPINGS for name in names) and len(names) in (1, count),
        f"--mapping is {config.mapping!r}; it must be one of {', '.join(MAPPINGS)}, or {count} of them with commas in "
        f"between, one for each channel of --channels {config.channels}",
    )
    fits = isinstance(config.discount, jax.core.Tracer) or config.discount < 1 or config.value_bound > 0
    require(fits, f"--discount is {config.discount}; it must be below 1, or --value-bound say where values end")
    return names * (count // len(names))


def make_agent(config: Config, env, env_params) -> Agent:
    """LogDQN on one environment; called inside the trace, so that the floats of `config` may be tracers."""
    num_actions = discrete_action_count(env, env_params)
    config.check()
    clock = config.clock()
    mappings, weights = mappings_of(config), jnp.array(weights_of(config.channels, config.num_bands))
    network = Network(config.hidden, num_actions, len(mappings))
    adam = optax.adam(config.learning_rate, eps=config.adam_epsilon)
    highest = jnp.where(config.value_bound > 0, config.value_bound, 1 / (1 - jnp.float32(config.discount)))
    lowest = -highest if config.channels == "none" else 0.0

    def by_channel(function, x: jax.Array, *more: Number) -> jax.Array:
        """`mapped` or `unmapped` of `[..., channels]`, each by its own mapping."""
        parts, shape = zip(mappings, jnp.unstack(x, axis=-1), strict=True), (config.map_scale, config.map_offset)
        return jnp.stack([function(name, part, *shape, *more) for name, part in parts], axis=-1)

    def total(values: jax.Array) -> jax.Array:
        return (weights * values).sum(-1)

    def update(learner: Learner, batch: Batch) -> tuple[Learner, dict[str, jax.Array]]:
        """One gradient step, and the copy into the target network when it is due."""
        # Samples: the values of the successor's best action on the whole, by the target network. Channels may prefer
        # others, but it is this one that is taken.
        next_values = by_channel(unmapped, network.apply(learner.target_network, batch.next_observation))
        next_action = total(next_values).argmax(-1)
        rewards = split_rewards(batch.reward, config.channels, config.num_bands)
        samples = sample_values(rewards, batch.discount, jnp.clip(next_values, lowest, highest), next_action)

        # Loss: one step of Adam. The target is a constant: a step towards the sample, and only then mapped.
        def objective(parameters):
            outputs = networks.at_action(network.apply(parameters, batch.observation), batch.action)
            values = jax.lax.stop_gradient(by_channel(unmapped, outputs))
            averaged = averaged_values(jnp.clip(values, lowest, highest), samples, config.averaging_rate)
            return loss_of(outputs, by_channel(mapped, averaged, config.smallest_value), config.huber_threshold), values

        new_network, (loss, values, gradient_norm) = descend(adam, learner.network, objective)

        # Target network: a copy when it is due. In between it stands still, lest targets move with predictions.
        updates = learner.updates + 1
        target_network = networks.periodic_copy(
            learner.target_network, new_network.parameters, updates, config.target_period
        )

        # Metrics: of this batch, by the networks before the step; values and samples of the channels together.
        following = networks.at_action(next_values, next_action)
        metrics = {
            "loss": loss, "value": total(values).mean(), "target": total(samples).mean(),
            "cut_values": ((following < lowest) | (following > highest)).mean(), "gradient_norm": gradient_norm,
        }  # fmt: skip
        return Learner(new_network, target_network, updates), metrics

    def init(key: jax.Array) -> State:
        key, network_key, warmup_key = jax.random.split(key, 3)
        parameters = network.init(network_key, jnp.zeros((1, *env.observation_space(env_params).shape)))
        learner = Learner(begin(adam, parameters), parameters, jnp.int32(0))
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return State(learner, filled, jnp.int32(clock.warmup_steps), key)

    def step(state: State) -> tuple[State, dict[str, Average]]:
        def interact(state, _):
            key, act_key, step_key = jax.random.split(state.key, 3)
            action = policy.explore(state, state.experience.interaction.observation, act_key)
            lived, _, episodes = experience.collect(env, env_params, state.experience, action, step_key)
            return State(state.learner, lived, state.env_steps + config.num_envs, key), episodes

        def learn(state, _):
            key, sample_key = jax.random.split(state.key)
            batch = experience.sample_n_step(
                state.experience, sample_key, config.batch_size, num_steps=config.num_steps, gamma=config.discount,
                reward_clip=config.reward_clip,
            )  # fmt: skip
            learner, metrics = update(state.learner, batch)
            return state._replace(key=key, learner=learner), jax.tree.map(average, metrics)

        state, episodes = jax.lax.scan(interact, state, length=config.steps_per_iteration)
        state, losses = jax.lax.scan(learn, state, length=config.updates_per_iteration)
        return state, jax.tree.map(lambda x: x.sum(0), episodes | losses)

    def action_values(state: State, observation: jax.Array) -> jax.Array:
        return total(by_channel(unmapped, network.apply(state.learner.network.parameters, observation)))

    policy = greedy.policy_of(config, action_values)

    def predict(state: State, observation: jax.Array, action: jax.Array) -> Law:
        return law.equally_weighted(networks.at_action(action_values(state, observation), action)[:, None])

    def export(state: State) -> dict[str, jax.Array]:
        parameters = state.learner.network.parameters["params"]
        head = {"advantage": {"layers": parameters["head"]}}
        return portable.greedy_policy({"torso": parameters.get("torso", {}), "head": head}, num_actions)

    claim = Claim(policy.follow, predict, config.discount, learns_mean=True)
    # Of one channel the mapped values have the same best action. A file for numpy knows no sum of exponentials.
    one = len(mappings) == 1
    return Agent(init, step, memoryless(policy.act), clock, claim, export if one else None)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.main(Config, make_agent, PRESETS)

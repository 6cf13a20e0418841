"""STAC's equations by the spec's hand-worked numbers, its dropout, and whole updates against loops in numpy."""

import dataclasses

import by_hand
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist.algorithms.actor_critic import stac
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import quantile


def example_target(config=None, mean=5.0, std=2.0, **flags):
    config = config or stac.Config()
    batch = by_hand.transition(reward=[1.0], **{name: [value] for name, value in flags.items()})
    next_value = stac.pessimistic(config, jnp.array([mean]), jnp.array([std]))
    return stac.target_value(batch, next_value, jnp.array([-1.5]), jnp.float32(0.2))[0]


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    assert example_target() == pytest.approx(5.752)


def test_only_termination_stops_the_bootstrap():
    assert example_target(terminated=True) == 1
    assert example_target(terminated=True, truncated=True) == 1
    assert example_target(truncated=True) == pytest.approx(5.752)


def test_without_pessimism_the_deviation_is_ignored():
    config = dataclasses.replace(stac.Config(), pessimism=0.0)
    assert example_target(config, std=2.0) == example_target(config, std=70.0) == pytest.approx(6.247)
    assert jax.grad(lambda std: example_target(config, std=std))(2.0) == 0
    assert jax.grad(lambda std: example_target(std=std))(2.0) == pytest.approx(-0.99 * 0.25)


def test_critic_loss_is_the_plain_likelihood():
    mean, std, target = jnp.array([4.0]), jnp.array([1.5]), jnp.array([5.752])
    loss, gradients = jax.value_and_grad(stac.critic_loss, argnums=(0, 1))(mean, std, target)
    assert loss == pytest.approx(2.0065156, rel=1e-6)
    assert gradients[0][0] == pytest.approx(-0.7786667, rel=1e-5)
    assert gradients[1][0] == pytest.approx(-0.242816, rel=1e-4)
    # The mean over the batch, not the sum; and no clipping of targets far away.
    repeated = stac.critic_loss(jnp.repeat(mean, 3), jnp.repeat(std, 3), jnp.repeat(target, 3))
    assert repeated == pytest.approx(2.0065156, rel=1e-6)
    assert jax.grad(stac.critic_loss)(mean, std, jnp.array([1004.0]))[0] == pytest.approx(-1000 / 2.25, rel=1e-5)


@pytest.mark.parametrize(("pessimism", "expected"), [(0.25, 8.875), (0.0, 10.0)])
def test_deviation_of_a_self_loop_is_that_of_one_step(pessimism, expected):
    """r ~ N(1, 0.5^2) for ever, gamma = 0.9: sigma = 0.5, mu = (1 - gamma beta sigma) / (1 - gamma).

    The whole return would have the deviation 0.5 / sqrt(1 - gamma^2) = 1.147.
    """
    config = dataclasses.replace(stac.Config(), discount=0.9, pessimism=pessimism)
    rewards = 1 + 0.5 * jax.scipy.special.ndtri(quantile.midpoints(200))
    batch, adam = by_hand.transition(reward=rewards, discount=0.9), optax.adam(0.02)

    def loss(parameters, target):
        mean, position = parameters
        return stac.critic_loss(mean, stac.floored_softplus(position), target)

    def one(carry, _):
        parameters, state = carry
        next_value = stac.pessimistic(config, parameters[0], stac.floored_softplus(parameters[1]))
        target = stac.target_value(batch, next_value, jnp.zeros(200), jnp.float32(0))
        changes, state = adam.update(jax.grad(loss)(parameters, target), state)
        return (optax.apply_updates(parameters, changes), state), None

    start = jnp.zeros(2)
    train = by_hand.quick(lambda: jax.lax.scan(one, (start, adam.init(start)), length=3000)[0][0])
    mean, position = train()
    assert mean == pytest.approx(expected, rel=0.02)
    assert stac.floored_softplus(position) == pytest.approx(0.5, rel=0.02)


def test_actor_avoids_deviation_where_the_mean_is_flat():
    # mu constant in a and sigma = |a|: the slope of the loss is beta sign(a).
    config = stac.Config()

    def loss(action):
        value = stac.pessimistic(config, jnp.full_like(action, 3.0), jnp.abs(action))
        return stac.actor_loss(value, jnp.zeros_like(action), jnp.float32(0.2))

    action = jnp.array([0.8, -0.4])
    np.testing.assert_allclose(jax.grad(loss)(action), [0.125, -0.125])
    for _ in range(100):
        action -= 0.1 * jax.grad(loss)(action)
    np.testing.assert_allclose(action, 0, atol=0.02)


def test_actor_loss_by_hand():
    value, log_density = jnp.array([2.5, 1.0]), jnp.array([-1.5, 0.5])
    loss, gradients = jax.value_and_grad(stac.actor_loss, argnums=(0, 1))(value, log_density, jnp.float32(0.2))
    assert loss == pytest.approx((-0.3 - 2.5 + 0.1 - 1) / 2)
    np.testing.assert_allclose(gradients[0], [-0.5, -0.5])
    np.testing.assert_allclose(gradients[1], [0.1, 0.1])


def test_temperature_step_by_hand():
    # The entropy -1 is above its target -2: the temperature falls, by a factor.
    log_temperature = stac.next_log_temperature(stac.Config(), jnp.log(0.2), jnp.array([0.4, 1.6]), -2.0)
    assert jnp.exp(log_temperature) == pytest.approx(0.1999880, rel=1e-6)
    rises = stac.next_log_temperature(stac.Config(), jnp.log(0.2), jnp.array([3.0]), -2.0)
    assert jnp.exp(rises) == pytest.approx(0.2000120, rel=1e-6)
    # It is a step of gradient descent on alpha (H - target) in log alpha.
    config = dataclasses.replace(stac.Config(), temperature_learning_rate=0.1)
    slope = jax.grad(lambda log_alpha: jnp.exp(log_alpha) * (-1 - -2))(jnp.log(0.2))
    moved = stac.next_log_temperature(config, jnp.log(0.2), jnp.array([1.0]), -2.0)
    assert moved == pytest.approx(float(jnp.log(0.2) - 0.1 * slope), rel=1e-6)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_deviation_by_hand():
    deviation = stac.floored_softplus(jnp.array([-10.0, -5.0, 0.0, 30.0]))
    np.testing.assert_allclose(deviation, [0.0067153, 0.0067153, np.log(2), 30], rtol=1e-5)
    assert jax.grad(stac.floored_softplus)(-10.0) == 0
    assert jax.grad(stac.floored_softplus)(0.0) == 0.5


def test_only_the_deviations_bias_starts_at_zero():
    agent, _ = by_hand.agent_on(stac, by_hand.Drift(), **by_hand.TINY)
    learner = by_hand.quick(agent.init)(jax.random.key(0)).learner
    jax.tree.map(np.testing.assert_array_equal, learner.critic.parameters, learner.target_critic)
    assert learner.log_temperature == pytest.approx(np.log(0.2))
    critic, actor = network(learner.critic.parameters), network(learner.actor.parameters)
    assert critic["bias_2"].shape == (2,)
    np.testing.assert_array_equal(critic["bias_2"] == 0, [False, True])
    critic.pop("bias_2")
    for name, value in (critic | {f"actor {name}": value for name, value in actor.items()}).items():
        if "norm" in name:
            np.testing.assert_array_equal(value, 1 if "scale" in name else 0)
        else:
            assert (value != 0).all(), name


# -- the same network, forwards and backwards, in numpy ---------------------------------------------------------------


def network(parameters) -> dict[str, np.ndarray]:
    """Linear layers `kernel_i`, `bias_i` and layer norms `norm_scale_i`, `norm_bias_i` in float64."""
    arrays = {}
    for name, layer in by_hand.weights(parameters)["params"]["mlp"].items():
        kind, index = name.split("_")
        if kind == "layer":
            arrays |= {f"{part[:-2]}_{index}": value[0] for part, value in layer["layers"].items()}
        else:
            arrays |= {f"norm_{part}_{index}": value for part, value in layer.items()}
    return {name: np.asarray(value, np.float64) for name, value in arrays.items()}


def forward(net: dict, inputs: np.ndarray, masks: list, rate: float) -> tuple[np.ndarray, list]:
    """Outputs, and what `backward` needs: linear, dropout by `masks`, layer norm, relu; linear at the end."""
    tape = []
    for layer, mask in enumerate(masks):
        hidden = (inputs @ net[f"kernel_{layer}"] + net[f"bias_{layer}"]) * mask / (1 - rate)
        centred = hidden - hidden.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        normed = centred / deviation
        outputs = normed * net[f"norm_scale_{layer}"] + net[f"norm_bias_{layer}"]
        tape.append((inputs, mask / (1 - rate), deviation, normed, outputs > 0))
        inputs = np.maximum(outputs, 0)
    last = len(masks)
    return inputs @ net[f"kernel_{last}"] + net[f"bias_{last}"], [*tape, (inputs,)]


def backward(net: dict, tape: list, slope: np.ndarray, gradient: dict | None = None) -> np.ndarray:
    """Carry the slope of a loss in the outputs back to the inputs, adding to `gradient` if there is one.

    With n = (x - m) / s over a row of width w: dL/dx = (dL/dn - mean(dL/dn) - n mean(n dL/dn)) / s.
    """
    gradient = by_hand.zeros_like(net) if gradient is None else gradient
    for layer in reversed(range(len(tape))):
        if layer < len(tape) - 1:
            _, kept, deviation, normed, active = tape[layer]
            slope = slope * active
            gradient[f"norm_scale_{layer}"] += (slope * normed).sum(0)
            gradient[f"norm_bias_{layer}"] += slope.sum(0)
            slope = slope * net[f"norm_scale_{layer}"]
            common = slope.mean(1, keepdims=True) + normed * (slope * normed).mean(1, keepdims=True)
            slope = (slope - common) / deviation * kept
        gradient[f"kernel_{layer}"] += tape[layer][0].T @ slope
        gradient[f"bias_{layer}"] += slope.sum(0)
        slope = slope @ net[f"kernel_{layer}"].T
    return slope


class Adam(by_hand.Adam):
    def __init__(self, state):
        self.epsilon, self.time = 1e-8, int(optax.tree_utils.tree_get(state, "count"))
        self.first, self.second = (network(optax.tree_utils.tree_get(state, name)) for name in ("mu", "nu"))


def masks_of(module, parameters, inputs: tuple, key, rate: float) -> list[np.ndarray]:
    """Which units a pass with this key keeps, read off what enters the layer norms: a dropped unit enters as 0."""
    seen = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            seen.append(np.asarray(args[0]) != 0)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        module.apply(parameters, *inputs, rate, rngs={"dropout": key})
    return seen


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptron():
    module = stac.DropoutMLP((40, 40, 3))

    def make(key):
        keys = jax.random.split(key, 3)
        inputs = jax.random.normal(keys[0], (50, 4))
        parameters = module.init(keys[1], inputs, None)
        leaves, structure = jax.tree.flatten(parameters)
        # Layer norms start as the identity, which would hide a mistake in them.
        noises = jax.random.split(keys[2], len(leaves))
        leaves = [x + 0.3 * jax.random.normal(noise, x.shape) for x, noise in zip(leaves, noises, strict=True)]
        return structure.unflatten(leaves), inputs

    return module, *by_hand.quick(make)(jax.random.key(0))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_comes_before_layer_norm_and_relu(perceptron, rate):
    module, parameters, inputs = perceptron
    masks = masks_of(module, parameters, (inputs,), jax.random.key(1), rate)
    assert [mask.shape for mask in masks] == [(50, 40), (50, 40)]
    for mask in masks:
        assert mask.mean() == pytest.approx(1 - rate, abs=0.04)
    actual = module.apply(parameters, inputs, rate, rngs={"dropout": jax.random.key(1)})
    expected, _ = forward(network({"params": {"mlp": parameters["params"]}}), np.asarray(inputs), masks, rate)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=2e-5)


def test_slopes_of_the_numpy_network_are_those_of_the_flax_one(perceptron):
    module, parameters, inputs = perceptron
    masks = masks_of(module, parameters, (inputs,), jax.random.key(1), 0.3)

    def loss(parameters, inputs):
        return (module.apply(parameters, inputs, 0.3, rngs={"dropout": jax.random.key(1)}) ** 2).sum()

    gradients = by_hand.quick(jax.grad(loss, argnums=(0, 1)))(parameters, inputs)
    net = network({"params": {"mlp": parameters["params"]}})
    outputs, tape = forward(net, np.asarray(inputs), masks, 0.3)
    expected = by_hand.zeros_like(net)
    of_inputs = backward(net, tape, 2 * outputs, expected)
    np.testing.assert_allclose(gradients[1], of_inputs, rtol=1e-3, atol=1e-3)
    for name, value in network({"params": {"mlp": gradients[0]["params"]}}).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_dropout_draws_new_masks_with_every_key_and_none_drops_nothing(perceptron):
    module, parameters, inputs = perceptron

    def apply(rate, seed):
        return module.apply(parameters, inputs, rate, rngs={"dropout": jax.random.key(seed)})

    assert np.abs(apply(0.3, 1) - apply(0.3, 2)).max() > 0.1
    np.testing.assert_array_equal(apply(0.3, 1), apply(0.3, 1))
    np.testing.assert_array_equal(apply(None, 1), apply(None, 2))
    np.testing.assert_array_equal(apply(0.0, 1), apply(None, 2))
    np.testing.assert_array_equal(apply(0.0, 1), module.apply(parameters, inputs, None))
    first, second = masks_of(module, parameters, (inputs,), jax.random.key(1), 0.3)
    assert 0.5 < (first == second).mean() < 0.66  # independent masks agree in .7^2 + .3^2 = .58 of the units


def test_share_of_dropped_units():
    module, inputs = stac.DropoutMLP((256, 256, 1)), jax.random.normal(jax.random.key(0), (256, 3))
    parameters = module.init(jax.random.key(1), inputs, None)
    masks = np.array(masks_of(module, parameters, (inputs,), jax.random.key(2), stac.Config().critic_dropout))
    assert (~masks).mean() == pytest.approx(0.01, abs=3 * np.sqrt(0.01 * 0.99 / masks.size))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = stac.Config()
    assert (config.critic_hidden, config.actor_hidden) == ((256, 256), (256, 256))
    assert (config.discount, config.polyak, config.batch_size) == (0.99, 0.005, 256)
    assert (config.replay_capacity, config.warmup_steps) == (1_000_000, 10_000)
    assert config.actor_learning_rate == config.critic_learning_rate == config.temperature_learning_rate == 3e-4
    assert (config.initial_temperature, config.target_entropy_per_action) == (0.2, -1.0)
    assert (config.pessimism, config.actor_dropout, config.critic_dropout) == (0.25, 0.01, 0.01)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration
    for preset in stac.PRESETS.values():
        check_configuration(dataclasses.replace(config, **preset))


@pytest.mark.parametrize(
    ("env_id", "pessimism", "actor_dropout", "critic_dropout"),
    [
        ("hopper", 0.5, 0.01, 0.01), ("halfcheetah", 0, 0, 0), ("walker2d", 0.125, 0.01, 0), ("ant", 0.25, 0.01, 0.01),
        ("humanoid", 0.25, 0.01, 0),
    ],
)  # fmt: skip
def test_presets_hold_the_papers_table(env_id, pessimism, actor_dropout, critic_dropout):
    config = dataclasses.replace(stac.Config(), **stac.PRESETS[f"brax/{env_id}"])
    assert (config.pessimism, config.actor_dropout, config.critic_dropout) == (
        pessimism, actor_dropout, critic_dropout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [("actor_dropout", 1.0), ("critic_dropout", 0.95), ("critic_dropout", -0.1), ("pessimism", -0.5)]
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is {value}; it must be finite and in \[0, "):
        check_configuration(dataclasses.replace(stac.Config(), **{name: value}))


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"--env-id is Choices, whose actions are discrete"):
        by_hand.agent_on(stac, by_hand.Choices())


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_sample(net, observation, noise, masks, rate) -> tuple[dict, list, np.ndarray]:
    """An action with its density, the tape, and the slope of log std in the output that it comes from."""
    outputs, tape = forward(net, observation, masks, rate)
    mean, position = np.split(outputs, 2, axis=1)
    std = np.logaddexp(0, np.maximum(position, -5))
    sample = by_hand.soft_sample(np.concatenate([mean, np.log(std)], axis=1), noise)
    return sample, tape, (position > -5) / (1 + np.exp(-position)) / std


def slow_moments(net, observation, action, masks, rate) -> tuple[np.ndarray, np.ndarray, list, np.ndarray]:
    """Mean, deviation, the tape, and the slope of the deviation in the output that it comes from."""
    outputs, tape = forward(net, np.concatenate([observation, action], axis=1), masks, rate)
    mean, position = outputs.T
    return mean, np.logaddexp(0, np.maximum(position, -5)), tape, (position > -5) / (1 + np.exp(-position))


def slow_update(learner: stac.Learner, batch: dict, noises: dict, masks: dict, config: stac.Config) -> dict:
    """One update as the paper writes it, all gradients by hand: critic, then actor, then temperature, then target."""
    actor, critic, target_critic = map(
        network, (learner.actor.parameters, learner.critic.parameters, learner.target_critic)
    )
    actor_adam, critic_adam = Adam(learner.actor.optimizer), Adam(learner.critic.optimizer)
    temperature = np.exp(np.float64(learner.log_temperature))
    size, observations = batch["observation"].shape
    beta, of_actor, of_critic = config.pessimism, config.actor_dropout, config.critic_dropout

    following, _, _ = slow_sample(actor, batch["next_observation"], noises["next"], masks["next actor"], of_actor)
    next_mean, next_std, _, _ = slow_moments(
        target_critic, batch["next_observation"], following["action"], masks["target critic"], of_critic
    )
    mean, std, tape, std_slope = slow_moments(
        critic, batch["observation"], batch["action"], masks["critic"], of_critic
    )  # fmt: skip
    target, loss, slope = np.zeros(size), 0.0, np.zeros((size, 2))
    for b in range(size):
        soft = next_mean[b] - beta * next_std[b] - temperature * following["log_density"][b]
        target[b] = batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * soft
        error = target[b] - mean[b]
        loss += (0.5 * np.log(2 * np.pi) + np.log(std[b]) + error**2 / (2 * std[b] ** 2)) / size
        slope[b] = -error / std[b] ** 2, (1 / std[b] - error**2 / std[b] ** 3) * std_slope[b]
    gradient = by_hand.zeros_like(critic)
    backward(critic, tape, slope / size, gradient)
    gradient_norm = np.sqrt(sum((x**2).sum() for x in gradient.values()))
    critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    sample, actor_tape, log_std_slope = slow_sample(
        actor, batch["observation"], noises["now"], masks["actor"], of_actor
    )  # fmt: skip
    actor_mean, actor_std, tape, std_slope = slow_moments(
        critic, batch["observation"], sample["action"], masks["actor's critic"], of_critic
    )
    slope = np.stack([np.full(size, -1 / size), beta / size * std_slope], axis=1)
    action_slope = backward(critic, tape, slope)[:, observations:]
    slope = by_hand.soft_actor_slope(sample, action_slope, temperature)
    slope[:, slope.shape[1] // 2 :] *= log_std_slope
    gradient = by_hand.zeros_like(actor)
    backward(actor, actor_tape, slope, gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)

    entropy = -sample["log_density"].mean()
    target_entropy = config.target_entropy_per_action * sample["action"].shape[1]
    factor = np.exp(config.temperature_learning_rate * temperature * (target_entropy - entropy))
    metrics = {
        "critic_loss": loss, "actor_loss": temperature * -entropy - (actor_mean - beta * actor_std).mean(),
        "temperature": temperature, "entropy": entropy, "value": mean.mean(), "std": std.mean(),
        "target": target.mean(), "critic_gradient_norm": gradient_norm,
        "largest_bonus": np.abs(temperature * following["log_density"]).max(),
    }  # fmt: skip
    return {
        "actor": actor, "critic": critic, "target_critic": by_hand.moved(target_critic, critic, config.polyak),
        "temperature": temperature * factor, "adams": (actor_adam, critic_adam), "metrics": metrics,
    }  # fmt: skip


def draws_of(update_key, learner, batch, config) -> tuple[dict, dict]:
    """Noise and masks of an update's five passes, by the keys as `update` splits them."""
    next_action_key, next_critic_key, critic_key, action_key, actors_critic_key = jax.random.split(update_key, 5)
    size = config.batch_size
    observation, action = jnp.asarray(batch["observation"], jnp.float32), jnp.asarray(batch["action"], jnp.float32)
    actor, critic = stac.Actor(config.actor_hidden, 2), stac.Critic(config.critic_hidden)
    noises, masks = {}, {}
    for noise, name, key in (("next", "next actor", next_action_key), ("now", "actor", action_key)):
        noise_key, dropout_key = jax.random.split(key)
        noises[noise] = np.asarray(jax.random.normal(noise_key, (size, 2)), np.float64)
        masks[name] = masks_of(actor, learner.actor.parameters, (observation,), dropout_key, config.actor_dropout)
    for name, key in (
        ("target critic", next_critic_key), ("critic", critic_key), ("actor's critic", actors_critic_key)
    ):  # fmt: skip
        masks[name] = masks_of(critic, learner.critic.parameters, (observation, action), key, config.critic_dropout)
    return noises, masks


def assert_arrays_are(parameters, expected: dict, rtol: float, atol: float) -> None:
    actual = network(parameters)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def tiny():
    """A configuration, and `init` and `step` compiled once for all values of its floats."""
    env = by_hand.Drift()
    config = dataclasses.replace(
        stac.Config(), **by_hand.TINY, num_envs=2, pessimism=0.8, initial_temperature=0.7,
        temperature_learning_rate=0.05, target_entropy_per_action=-0.6,
    )  # fmt: skip

    def make(config):
        return stac.make_agent(config, env, env.default_params)

    init = by_hand.quick(lambda config, key: make(config).init(key))
    return config, make, init, by_hand.quick(lambda config, state: make(config).step(state))


# With so much dropout a pass without it, or with another pass's masks, must show.
@pytest.mark.parametrize(("actor_dropout", "critic_dropout"), [(0.0, 0.0), (0.2, 0.3)])
def test_updates_equal_loops_in_numpy(tiny, actor_dropout, critic_dropout):
    config, make, init, step = tiny
    config = dataclasses.replace(config, actor_dropout=actor_dropout, critic_dropout=critic_dropout)
    agent, state, dropped = make(config), init(config, jax.random.key(3)), 0
    for iteration in range(5):
        # The keys as `step` splits them: one environment step, one update.
        key, act_key, _ = jax.random.split(jax.random.clone(state.key), 3)
        _, sample_key, update_key = jax.random.split(key, 3)
        observation, position = state.experience.interaction.observation, int(state.experience.replay.position)
        before, (state, metrics) = state.learner, step(config, state)
        after = state.learner

        # What was done is a sample of the policy with dropout, as it is in the authors' code.
        noise_key, dropout_key = jax.random.split(act_key)
        noise = np.asarray(jax.random.normal(noise_key, (2, 2)), np.float64)
        actor = stac.Actor(config.actor_hidden, 2)
        kept = masks_of(actor, before.actor.parameters, (observation,), dropout_key, actor_dropout)
        done, _, _ = slow_sample(network(before.actor.parameters), np.asarray(observation), noise, kept, actor_dropout)
        dropped += sum(int((~mask).sum()) for mask in kept)
        stored = state.experience.replay.rows.action[position : position + 2]
        np.testing.assert_allclose(stored, done["action"], rtol=1e-3, atol=1e-5)

        batch = by_hand.stored_rows(state, sample_key, config.batch_size)
        noises, masks = draws_of(update_key, before, batch, config)
        critics = [masks[name] for name in ("critic", "target critic", "actor's critic")]
        for one, other in zip(critics, critics[1:] + critics[:1], strict=True):
            assert np.array_equal(one[0], other[0]) == (config.critic_dropout == 0)
        assert np.array_equal(masks["actor"][0], masks["next actor"][0]) == (config.actor_dropout == 0)

        expected = slow_update(before, batch, noises, masks, config)
        for name in ("actor", "critic", "target_critic"):
            assert_arrays_are(getattr(after, name), expected[name], rtol=1e-3, atol=1e-5)
        assert jnp.exp(after.log_temperature) == pytest.approx(expected["temperature"], rel=1e-5)
        for optimizer, adam in zip(
            (after.actor.optimizer, after.critic.optimizer), expected["adams"], strict=True
        ):  # fmt: skip
            assert adam.time == int(optax.tree_utils.tree_get(optimizer, "count")) == iteration + 1
            assert_arrays_are(optax.tree_utils.tree_get(optimizer, "mu"), adam.first, rtol=2e-3, atol=3e-6)
            assert_arrays_are(optax.tree_utils.tree_get(optimizer, "nu"), adam.second, rtol=2e-3, atol=1e-8)
        assert metrics.keys() - {"episode_return", "episode_length"} == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            assert metrics[name].total == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert (dropped > 0) == (actor_dropout > 0)
    rows = state.experience.replay.rows
    assert rows.terminated.any()
    assert (rows.truncated & ~rows.terminated).any()

    # Evaluation and predictions drop nothing.
    outputs, _ = forward(network(after.actor), np.asarray(rows.observation), [1, 1], 0)
    acted = agent.policy.act(state, rows.observation, (), jax.random.key(0))[0]
    np.testing.assert_allclose(acted, np.tanh(outputs[:, :2]), rtol=1e-3, atol=1e-5)
    observation, action = (np.asarray(x, np.float64) for x in (rows.observation, rows.action))
    mean, std, _, _ = slow_moments(network(after.critic), observation, action, [1, 1], 0)
    law = agent.claim.law(state, rows.observation, rows.action)
    np.testing.assert_allclose(laws.mean(law), mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(jnp.sqrt(laws.variance(law)), std, rtol=0.02)


# -- learning ---------------------------------------------------------------------------------------------------------


class RiskyBandit(by_hand.Bandit):
    """One action per episode, worth a on average, with a deviation of 0.2 and 2 a more of it where a is positive."""

    def step_env(self, key, state, action, params):
        observation, state, _, done, info = super().step_env(key, state, action, params)
        deviation = 0.2 + 2 * jnp.maximum(action[0], 0)
        return observation, state, action[0] + deviation * jax.random.normal(key), done, info


def test_actor_takes_a_risk_that_pays_only_without_pessimism():
    """a is largest at 1, a - deviation at 0."""
    env = RiskyBandit()
    config = dataclasses.replace(
        stac.Config(), warmup_steps=2000, replay_capacity=3000, batch_size=128, actor_hidden=(16,),
        critic_hidden=(32, 32), actor_learning_rate=3e-3, critic_learning_rate=3e-3, updates_per_iteration=500,
        initial_temperature=0.01, temperature_learning_rate=0.0,
    )  # fmt: skip

    def train(pessimism):
        agent = stac.make_agent(dataclasses.replace(config, pessimism=pessimism), env, env.default_params)
        state, _ = agent.step(agent.init(jax.random.key(0)))
        action = agent.policy.act(state, jnp.ones((1, 1)), (), jax.random.key(0))[0]
        return action[0, 0], agent.claim.law(state, jnp.ones((2, 1)), jnp.array([[-0.4], [0.5]]))

    (indifferent, pessimistic), law = by_hand.quick(lambda betas: jax.lax.map(train, betas))(jnp.array([0.0, 1.0]))
    assert 0.8 < indifferent <= 1
    assert -0.25 < pessimistic < 0.25
    np.testing.assert_allclose(laws.mean(law), [[-0.4, 0.5]] * 2, atol=0.3)
    np.testing.assert_allclose(jnp.sqrt(laws.variance(law)), [[0.2, 1.2]] * 2, atol=0.3)

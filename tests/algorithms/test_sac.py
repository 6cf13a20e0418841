"""SAC's equations by the spec's hand-worked numbers, and a whole update against loops in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.actor_critic import sac, td3
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import policies, soft
from jaxrl_dist.learning.optimization import Trained
from jaxrl_dist.running import problem


def example_target(values=(3.0, 2.5), log_density=-1.5, temperature=0.2, **flags):
    batch = by_hand.transition(reward=[1.0], **{name: [value] for name, value in flags.items()})
    return sac.target_value(batch, jnp.array([values]), jnp.array([log_density]), jnp.float32(temperature))[0]


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    assert example_target() == pytest.approx(3.772)
    assert example_target(values=(2.5, 3.0)) == pytest.approx(3.772)


def test_termination_masks_value_and_entropy_but_truncation_masks_nothing():
    assert example_target(terminated=True) == 1
    assert example_target(terminated=True, truncated=True) == 1
    assert example_target(truncated=True) == pytest.approx(3.772)


def test_minimum_is_taken_for_each_transition():
    values = jnp.array([[1.0, 4.0], [5.0, 2.0]])
    target = sac.target_value(by_hand.transition(reward=[0.0, 0.0]), values, jnp.zeros(2), 0.2)
    np.testing.assert_allclose(target, [0.99, 1.98], rtol=1e-6)
    assert sac.actor_loss(values, jnp.zeros(2), 0.2) == pytest.approx(-1.5)


def test_critic_loss_sums_over_critics_and_averages_over_the_batch():
    values, target = jnp.array([[2.0, 3.5], [0.0, 1.0]]), jnp.array([1.0, 3.0])
    assert sac.critic_loss(values, target) == pytest.approx((1 + 9) / 2 + (6.25 + 4) / 2)


def test_actor_loss_by_hand():
    values, log_density = jnp.array([[3.0, 2.5], [1.0, 2.0]]), jnp.array([-1.5, 0.5])
    loss, gradients = jax.value_and_grad(sac.actor_loss, argnums=(0, 1))(values, log_density, jnp.float32(0.2))
    assert loss == pytest.approx((-0.3 - 2.5 + 0.1 - 1) / 2)
    np.testing.assert_allclose(gradients[0], [[0, -0.5], [-0.5, 0]])
    np.testing.assert_allclose(gradients[1], [0.1, 0.1])


def test_temperature_gradient_is_that_of_the_log_form():
    # The exponential form's gradient is 0.48. The entropy 0.4 is above the target -2, so the temperature must fall.
    log_density = jnp.array([-1.5, 0.5, -0.2])
    gradients = jax.grad(soft.temperature_loss, argnums=(0, 1))(jnp.log(0.2), log_density, -2.0)
    assert gradients[0] == pytest.approx(2.4)
    np.testing.assert_array_equal(gradients[1], np.zeros(3))


def test_without_entropy_losses_are_those_of_td3():
    values, target = jnp.array([[3.0, 2.5], [1.0, 2.0]]), jnp.array([1.0, 3.0])
    batch = by_hand.transition(reward=[1.0, -1.0], terminated=[False, True])
    log_density = jnp.array([-1.5, 30.0])
    np.testing.assert_array_equal(
        sac.target_value(batch, values, log_density, jnp.float32(0)),
        td3.target_value(batch, values),
    )
    assert sac.critic_loss(values, target) == td3.critic_loss(values, target)
    assert sac.actor_loss(values[:, :1], log_density, jnp.float32(0)) == td3.actor_loss(values)


# -- the squashed Gaussian in the actor's gradient --------------------------------------------------------------------


def test_density_by_hand():
    mean, log_std, noise = jnp.array([0.5, -1.0]), jnp.array([-0.5, 0.0]), jnp.array([0.3, -2.0])
    pre_tanh = mean + jnp.exp(log_std) * noise
    np.testing.assert_allclose(jnp.tanh(pre_tanh), [0.59279160, -0.99505475], rtol=1e-6)
    density = policies.squashed_gaussian_log_density(pre_tanh, mean, log_std)
    assert density == pytest.approx(1.66872193, rel=1e-5)
    # Far in the tail, where log(1 - tanh^2 + 1e-6) would give 12.90.
    tail = policies.squashed_gaussian_log_density(jnp.array([12.0]), jnp.array([12.0]), jnp.zeros(1))
    assert tail == pytest.approx(21.6947671, rel=1e-6)


def test_actor_gradient_equals_finite_differences_with_common_noise():
    # Q(s, a) = -(a - c)^2: the gradient in mean and log std goes through the sampled actions and their density.
    centre, temperature = jnp.array([0.4, -0.2]), 0.3
    mean, log_std = jnp.array([0.3, -0.8]), jnp.array([-0.4, 0.2])
    samples, key = 500, jax.random.key(0)

    def loss(mean, log_std):
        shape = (samples, 2)
        action, log_density = policies.squashed_gaussian(
            jax.random.clone(key), jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_std, shape)
        )
        return sac.actor_loss(-((action - centre) ** 2).sum(-1, keepdims=True), log_density, temperature)

    gradient = np.concatenate(jax.grad(loss, argnums=(0, 1))(mean, log_std))
    noise = np.asarray(jax.random.normal(jax.random.clone(key), (samples, 2)), np.float64)

    def slow_loss(outputs):
        sample = by_hand.soft_sample(np.tile(outputs, (samples, 1)), noise)
        value = -((sample["action"] - np.asarray(centre, np.float64)) ** 2).sum(1)
        return (temperature * sample["log_density"] - value).mean()

    outputs = np.concatenate([mean, log_std]).astype(np.float64)
    step = 1e-5 * np.eye(4)
    differences = [(slow_loss(outputs + h) - slow_loss(outputs - h)) / 2e-5 for h in step]
    np.testing.assert_allclose(gradient, differences, rtol=1e-4, atol=1e-5)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = sac.Config()
    assert (config.critic_hidden, config.actor_hidden, config.num_critics) == ((256, 256), (256, 256), 2)
    assert (config.discount, config.polyak, config.batch_size) == (0.99, 0.005, 256)
    assert (config.replay_capacity, config.warmup_steps) == (1_000_000, 10_000)
    assert config.actor_learning_rate == config.critic_learning_rate == config.temperature_learning_rate == 3e-4
    assert (config.initial_temperature, config.target_entropy_per_action) == (1.0, -1.0)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration
    for preset in sac.PRESETS.values():
        check_configuration(dataclasses.replace(config, **problem.split_preset(preset)[1]))


# -- a whole update against loops in numpy ----------------------------------------------------------------------------


def slow_update(learner: sac.Learner, batch: dict, next_noise, noise, config: sac.Config) -> dict:
    """One update as the paper writes it, all gradients by hand: critics, then actor, then temperature, then targets."""
    actor, critic, target_critic = map(
        by_hand.network, (learner.actor.parameters, learner.critic.parameters, learner.target_critic)
    )
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    temperature_adam = by_hand.Adam(learner.log_temperature.optimizer, None)
    temperature = np.exp(np.float64(learner.log_temperature.parameters))
    size, observations = batch["observation"].shape

    def values_of(net, observation, action):
        inputs = np.concatenate([observation, action], axis=1)
        return [by_hand.forward(net, member, inputs) for member in range(config.num_critics)]

    following = by_hand.soft_sample(by_hand.forward(actor, 0, batch["next_observation"])[-1], next_noise)
    next_values = values_of(target_critic, batch["next_observation"], following["action"])
    target = np.zeros(size)
    for b in range(size):
        soft = min(member[-1][b, 0] for member in next_values) - temperature * following["log_density"][b]
        target[b] = batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * soft

    gradient, loss = by_hand.zeros_like(critic), 0.0
    for n, member in enumerate(values_of(critic, batch["observation"], batch["action"])):
        error = member[-1][:, 0] - target
        loss += (error**2).mean()
        by_hand.backward(critic, n, member, 2 * error[:, None] / size, gradient)
    critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    activations = by_hand.forward(actor, 0, batch["observation"])
    sample = by_hand.soft_sample(activations[-1], noise)
    values = values_of(critic, batch["observation"], sample["action"])
    smallest = np.argmin([member[-1][:, 0] for member in values], axis=0)
    action_slope = np.zeros_like(sample["action"])
    for n, member in enumerate(values):
        slope = np.where(smallest == n, -1 / size, 0)[:, None]
        action_slope += by_hand.backward(critic, n, member, slope)[:, observations:]
    gradient = by_hand.zeros_like(actor)
    by_hand.backward(actor, 0, activations, by_hand.soft_actor_slope(sample, action_slope, temperature), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)

    target_entropy = config.target_entropy_per_action * sample["action"].shape[1]
    slope = {"value": -(sample["log_density"] + target_entropy).mean()}
    log_temperature = temperature_adam.step(
        {"value": np.float64(learner.log_temperature.parameters)}, slope, config.temperature_learning_rate
    )["value"]
    return {
        "actor": actor, "critic": critic, "target_critic": by_hand.moved(target_critic, critic, config.polyak),
        "log_temperature": log_temperature, "critic_loss": loss, "target": target,
        "adams": (actor_adam, critic_adam, temperature_adam),
    }  # fmt: skip


def test_update_equals_loops_in_numpy():
    agent, config = by_hand.agent_on(
        sac, by_hand.Drift(), **by_hand.TINY, num_critics=3, initial_temperature=0.7, temperature_learning_rate=7e-3,
        target_entropy_per_action=-0.6, num_envs=2, normalize_observations=True,
    )  # fmt: skip
    step = by_hand.quick(agent.step)
    state = by_hand.quick(agent.init)(jax.random.key(3))
    for iteration in range(4):
        # The keys as `step` splits them: one environment step, one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        _, sample_key, update_key = jax.random.split(key, 3)
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_rows(state, sample_key, config.batch_size)
        noises = [jax.random.normal(k, (config.batch_size, 2)) for k in jax.random.split(update_key)]
        expected = slow_update(before, batch, *(np.asarray(noise, np.float64) for noise in noises), config)
        after = state.learner
        for name in ("actor", "critic", "target_critic"):
            by_hand.assert_network_is(getattr(after, name), expected[name])
        assert after.log_temperature.parameters == pytest.approx(expected["log_temperature"], abs=1e-5)
        assert metrics["critic_loss"].total == pytest.approx(expected["critic_loss"], rel=1e-4)
        assert metrics["target"].total == pytest.approx(expected["target"].mean(), rel=1e-4, abs=1e-5)
        optimizers = after.actor.optimizer, after.critic.optimizer, after.log_temperature.optimizer
        for optimizer, adam, name in zip(optimizers, expected["adams"], ("mlp", "mlp", None), strict=True):
            assert adam.time == iteration + 1
            by_hand.assert_adam_is(optimizer, adam, name)
    rows = state.experience.replay.rows
    assert rows.terminated.any()
    assert (rows.truncated & ~rows.terminated).any()


def test_update_without_entropy_and_spread_is_that_of_td3():
    """Same parameters, same replay, alpha and the policy's spread next to zero: the learned networks are TD3's."""
    shared = by_hand.TINY | {"num_critics": 1, "steps_per_iteration": 1, "updates_per_iteration": 1}
    soft, _ = by_hand.agent_on(sac, by_hand.Drift(), **shared, initial_temperature=1e-9, temperature_learning_rate=0.0)
    hard, _ = by_hand.agent_on(
        td3, by_hand.Drift(), **shared, policy_delay=1, target_noise=0.0, exploration_noise=0.0
    )  # fmt: skip
    state = by_hand.quick(soft.init)(jax.random.key(0))
    layers = dict(state.learner.actor.parameters["params"]["mlp"]["layers"])
    # The outputs for log std: bias far below the clip at -20, where their gradient is zero as well.
    layers["kernel_2"] = layers["kernel_2"].at[..., 2:].set(0.0)
    layers["bias_2"] = layers["bias_2"].at[..., 2:].set(-30.0)
    soft_actor = {"params": {"mlp": {"layers": layers}}}
    hard_layers = layers | {name: layers[name][..., :2] for name in ("kernel_2", "bias_2")}
    hard_actor = {"params": {"mlp": {"layers": hard_layers}}}

    learner = by_hand.changed(state.learner, actor=soft_actor)
    hard_state = jax.eval_shape(hard.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), hard_state.learner.actor.optimizer)
    hard_learner = td3.Learner(Trained(hard_actor, zeros), learner.critic, hard_actor, learner.target_critic)
    soft_state = state._replace(learner=learner)
    hard_state = td3.State(hard_learner, state.experience, jax.random.clone(state.key))
    soft_step, hard_step = by_hand.quick(soft.step), by_hand.quick(hard.step)
    soft_state, hard_state = soft_step(soft_state)[0], hard_step(hard_state)[0]
    # One step only: SAC has no target actor, so from the second update on the two methods part.
    expected, actual = hard_state.learner, soft_state.learner
    assert jax.tree.map(jnp.shape, expected.critic.parameters) == jax.tree.map(jnp.shape, actual.critic.parameters)
    for name in ("critic", "target_critic"):
        by_hand.assert_network_is(getattr(actual, name), by_hand.network(getattr(expected, name)))
    actor, moved = by_hand.network(actual.actor), by_hand.network(expected.actor)
    for name in ("kernel_2", "bias_2"):
        np.testing.assert_array_equal(actor[name][..., 2:], np.asarray(layers[name])[..., 2:])
        actor[name] = actor[name][..., :2]
    for name, value in moved.items():
        assert not np.array_equal(value, np.asarray(hard_layers[name]))
        np.testing.assert_allclose(actor[name], value, rtol=1e-4, atol=1e-6)

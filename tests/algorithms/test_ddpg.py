"""DDPG's equations by the spec's hand-worked numbers, its noise and networks, and an update against loops in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.actor_critic import ddpg
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import networks


def paper_config(**values) -> ddpg.Config:
    return dataclasses.replace(ddpg.Config(), **(ddpg.PRESETS["paper"] | values))


# -- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [(False, False, 2.98), (True, False, 1), (False, True, 2.98), (True, True, 1)],
)
def test_target_by_hand(terminated, truncated, expected):
    batch = by_hand.transition(reward=[1.0], terminated=[terminated], truncated=[truncated])
    assert ddpg.target_value(batch, jnp.array([2.0]))[0] == pytest.approx(expected)


def test_critic_loss_is_the_mean_squared_error():
    loss, gradient = jax.value_and_grad(ddpg.critic_loss)(jnp.array([2.0, 5.0]), jnp.array([1.0, 3.0]))
    assert loss == 2.5
    np.testing.assert_allclose(gradient, [1, 2])


def test_actor_gradient_by_hand():
    # Q(s, a) = -(a - 0.3 s)^2 with a = w s, at w = 1.
    states = jnp.array([1.0, 2.0])
    gradient = jax.grad(lambda w: ddpg.actor_loss(-((w * states - 0.3 * states) ** 2)))(1.0)
    assert gradient == pytest.approx(3.5)


@pytest.mark.parametrize("paper_networks", [False, True])
def test_actor_gradient_is_the_critics_slope_carried_through_the_actor(paper_networks):
    actor, critic = ddpg.Actor((7, 6), 2, paper_networks), ddpg.Critic((8, 5), paper_networks)
    keys = jax.random.split(jax.random.key(1), 3)
    observation = jax.random.normal(keys[0], (10, 3))
    actor_parameters = actor.init(keys[1], observation)
    critic_parameters = critic.init(keys[2], observation, jnp.zeros((10, 2)))
    if paper_networks:  # their last layers start next to zero
        critic_parameters = jax.tree.map(lambda x: 10 * x, critic_parameters)

    def loss(parameters):
        return ddpg.actor_loss(critic.apply(critic_parameters, observation, actor.apply(parameters, observation)))

    action, through_actor = jax.vjp(lambda p: actor.apply(p, observation), actor_parameters)
    _, through_critic = jax.vjp(lambda a: critic.apply(critic_parameters, observation, a), action)
    (slope,) = through_critic(jnp.full(10, -1 / 10))
    (expected,) = through_actor(slope)
    gradient = jax.grad(loss)(actor_parameters)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-7), gradient, expected)
    assert max(jnp.abs(g).max() for g in jax.tree.leaves(gradient)) > 1e-3


def test_polyak_by_hand():
    target, online = {"a": jnp.ones(2), "b": jnp.zeros(())}, {"a": jnp.full(2, 2.0), "b": jnp.float32(-3)}
    moved = networks.polyak(target, online, 0.005)
    np.testing.assert_allclose(moved["a"], [1.005, 1.005], rtol=1e-6)
    assert moved["b"] == pytest.approx(-0.015)
    jax.tree.map(np.testing.assert_array_equal, networks.polyak(target, online, 1.0), online)
    jax.tree.map(np.testing.assert_array_equal, networks.polyak(target, online, 0.0), target)


# -- exploration noise ------------------------------------------------------------------------------------------------


def simulate_noise(config, steps, shape):
    def one(noise, time):
        noise = ddpg.next_noise(config, noise, jax.random.fold_in(jax.random.key(2), time))
        return noise, noise

    return np.asarray(jax.lax.scan(one, jnp.zeros(shape), jnp.arange(steps))[1])


def test_ornstein_uhlenbeck_noise_is_stationary_with_the_known_variance():
    history = simulate_noise(paper_config(), 100, (5000, 2))
    # sigma^2 / (1 - (1 - theta)^2) = .04 / .2775; neighbouring steps correlate by 1 - theta.
    assert history[-1].var() == pytest.approx(0.1441, rel=0.05)
    assert np.corrcoef(history[-1].ravel(), history[-2].ravel())[0, 1] == pytest.approx(0.85, abs=0.02)
    assert abs(np.corrcoef(history[-1].T)[0, 1]) < 0.05  # components are independent
    assert history[0].std() == pytest.approx(0.2, rel=0.05)  # starting from zero


def test_full_reversion_is_independent_gaussian_noise():
    history = simulate_noise(ddpg.Config(), 10, (5000, 2))
    assert history[-1].std() == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(history[-1].ravel(), history[-2].ravel())[0, 1]) < 0.03


def test_noise_starts_anew_with_each_episode_and_the_replay_holds_what_was_done():
    agent, _ = by_hand.agent_on(
        ddpg, by_hand.Drift(), **(by_hand.TINY | {"actor_learning_rate": 0.0, "replay_capacity": 104}),
        num_envs=8, exploration_noise=0.2, noise_reversion=0.15,
    )  # fmt: skip
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(0))
    assert (state.noise == np.zeros((8, 2))).all()
    resets = 0
    for _ in range(10):
        _, act_key, _ = jax.random.split(jax.random.clone(state.key), 3)
        observation, noise = state.experience.interaction.observation, state.noise
        noise = 0.85 * noise + 0.2 * jax.random.normal(act_key, (8, 2))
        mean = agent.policy.act(state, observation, (), jax.random.key(0))[0]
        position = int(state.experience.replay.position)
        state, _ = step(state)
        rows = jax.tree.map(lambda x: x[position : position + 8], state.experience.replay.rows)
        np.testing.assert_allclose(rows.action, jnp.clip(mean + noise, -1, 1), rtol=1e-4, atol=1e-6)
        done = np.asarray(rows.terminated | rows.truncated)
        np.testing.assert_array_equal(state.noise[done], 0)
        np.testing.assert_allclose(state.noise[~done], noise[~done], rtol=1e-4, atol=1e-6)
        resets += done.sum()
    assert resets > 5


# -- the paper's networks ---------------------------------------------------------------------------------------------


def test_paper_networks():
    config = paper_config()
    actor, critic = ddpg.Actor(config.actor_hidden, 2, True), ddpg.Critic(config.critic_hidden, True)
    observation, action = jnp.ones((4, 3)), jnp.ones((4, 2))
    actor_key, critic_key = jax.random.split(jax.random.key(0))
    first = by_hand.network(critic.init(critic_key, observation, action), "observation")
    parameters = critic.init(jax.random.clone(critic_key), observation, action)
    rest = by_hand.network(parameters)
    actor_layers = by_hand.network(actor.init(actor_key, observation))
    assert {name: value.shape[1:] for name, value in first.items()} == {"kernel_0": (3, 400), "bias_0": (400,)}
    shapes = {"kernel_0": (402, 300), "bias_0": (300,), "kernel_1": (300, 1), "bias_1": (1,)}
    assert {name: value.shape[1:] for name, value in rest.items()} == shapes
    bounds = [(first["kernel_0"], 3**-0.5), (rest["kernel_0"], 402**-0.5), (rest["kernel_1"], 3e-3)]
    bounds += [(actor_layers["kernel_0"], 3**-0.5), (actor_layers["kernel_1"], 400**-0.5)]
    bounds += [(actor_layers["kernel_2"], 3e-3), (actor_layers["bias_2"], 3e-3)]
    for values, bound in bounds:
        assert np.abs(values).max() <= bound
        assert values.size < 10 or np.abs(values).max() > 0.95 * bound

    rng = np.random.default_rng(0)
    observation, action = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    hidden = np.maximum(by_hand.forward(first, 0, observation)[-1], 0)
    expected = by_hand.forward(rest, 0, np.concatenate([hidden, action], axis=1))[-1][:, 0]
    actual = critic.apply(parameters, jnp.asarray(observation, jnp.float32), jnp.asarray(action, jnp.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_defaults_are_the_retuned_ones_and_the_preset_is_the_papers():
    config, paper = ddpg.Config(), paper_config()
    assert (config.actor_hidden, config.critic_hidden) == ((256, 256), (256, 256))
    assert (config.batch_size, config.warmup_steps, config.replay_capacity) == (256, 25_000, 1_000_000)
    assert config.actor_learning_rate == config.critic_learning_rate == 3e-4
    assert (config.discount, config.polyak, config.critic_weight_decay) == (0.99, 0.005, 0)
    assert (config.exploration_noise, config.noise_reversion) == (0.1, 1)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration
    assert (paper.actor_hidden, paper.critic_hidden, paper.paper_networks) == ((400, 300), (400, 300), True)
    assert (paper.actor_learning_rate, paper.critic_learning_rate) == (1e-4, 1e-3)
    assert (paper.batch_size, paper.polyak, paper.critic_weight_decay) == (64, 0.001, 1e-2)
    assert (paper.exploration_noise, paper.noise_reversion) == (0.2, 0.15)
    for preset in ddpg.PRESETS.values():
        check_configuration(dataclasses.replace(config, **preset))


def test_paper_networks_need_a_layer_before_the_action():
    with pytest.raises(ValueError, match=r"--critic-hidden is empty; --paper-networks needs at least one"):
        by_hand.agent_on(ddpg, by_hand.Drift(), critic_hidden=(), paper_networks=True)


# -- a whole update against loops in numpy ----------------------------------------------------------------------------


def slow_update(learner: ddpg.Learner, batch: dict, config: ddpg.Config) -> dict:
    """One update as the paper writes it, all gradients by hand: critic, then actor, then both targets."""
    actor, target_actor = by_hand.network(learner.actor.parameters), by_hand.network(learner.target_actor)
    critic, target_critic = by_hand.network(learner.critic.parameters), by_hand.network(learner.target_critic)
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    size, observations = batch["observation"].shape

    def value_of(net, observation, action):
        return by_hand.forward(net, 0, np.concatenate([observation, action], axis=1))

    next_action = np.tanh(by_hand.forward(target_actor, 0, batch["next_observation"])[-1])
    next_value = value_of(target_critic, batch["next_observation"], next_action)[-1]
    activations, slope = value_of(critic, batch["observation"], batch["action"]), np.zeros((size, 1))
    for b in range(size):
        target = batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * next_value[b, 0]
        slope[b] = 2 * (activations[-1][b, 0] - target) / size
    gradient = {name: config.critic_weight_decay * value for name, value in critic.items()}
    by_hand.backward(critic, 0, activations, slope, gradient)
    critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    activations = by_hand.forward(actor, 0, batch["observation"])
    action = np.tanh(activations[-1])
    value = value_of(critic, batch["observation"], action)
    action_slope = by_hand.backward(critic, 0, value, np.full((size, 1), -1 / size))[:, observations:]
    gradient = by_hand.zeros_like(actor)
    by_hand.backward(actor, 0, activations, action_slope * (1 - action**2), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)
    return {
        "actor": actor, "critic": critic, "target_actor": by_hand.moved(target_actor, actor, config.polyak),
        "target_critic": by_hand.moved(target_critic, critic, config.polyak), "adams": (actor_adam, critic_adam),
    }  # fmt: skip


def test_update_equals_loops_in_numpy():
    agent, config = by_hand.agent_on(ddpg, by_hand.Drift(), **by_hand.TINY, num_envs=2, critic_weight_decay=0.2)
    step = by_hand.quick(agent.step)
    state = by_hand.quick(agent.init)(jax.random.key(3))
    for iteration in range(4):
        # The keys as `step` splits them: one environment step, one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key, 3)[1]
        before, (state, _) = state.learner, step(state)
        expected = slow_update(before, by_hand.stored_rows(state, sample_key, config.batch_size), config)
        for name in ("actor", "critic", "target_actor", "target_critic"):
            by_hand.assert_network_is(getattr(state.learner, name), expected[name])
        optimizers = state.learner.actor.optimizer, state.learner.critic.optimizer
        for optimizer, adam in zip(optimizers, expected["adams"], strict=True):
            assert adam.time == iteration + 1
            by_hand.assert_adam_is(optimizer, adam)
    assert state.experience.replay.rows.terminated.any()


def test_actor_finds_the_best_arm_of_a_quadratic_bandit():
    agent, _ = by_hand.agent_on(
        ddpg, by_hand.Bandit(), warmup_steps=500, replay_capacity=1000, batch_size=64, actor_hidden=(32, 32),
        critic_hidden=(32, 32), actor_learning_rate=1e-3, critic_learning_rate=1e-3, updates_per_iteration=500,
    )  # fmt: skip
    state, _ = by_hand.quick(lambda key: agent.step(agent.init(key)))(jax.random.key(0))
    action = agent.policy.act(state, jnp.ones((1, 1)), (), jax.random.key(0))[0]
    assert action[0, 0] == pytest.approx(0.5, abs=0.05)
    for guess in (0.0, 0.5, 0.8):
        predicted = agent.claim.law(state, jnp.ones((1, 1)), jnp.full((1, 1), guess))
        np.testing.assert_array_equal(predicted.masses, [[1]])
        assert predicted.atoms[0, 0] == pytest.approx(-((guess - 0.5) ** 2), abs=0.03)

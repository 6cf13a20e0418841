"""TD3's equations by the spec's hand-worked numbers, whole updates against loops in numpy, and TD3 reduced to DDPG."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.actor_critic import ddpg, td3
from jaxrl_dist.configuration import check_configuration


def example_target(values=(3.0, 2.4), **flags):
    batch = by_hand.transition(reward=[0.5], **{name: [value] for name, value in flags.items()})
    return td3.target_value(batch, jnp.array([values]))[0]


# -- the smoothed action ----------------------------------------------------------------------------------------------


def test_smoothed_action_by_hand():
    noise = jnp.array([[-3.1, 0.4, 2.9]])
    unmoved = td3.smoothed_action(td3.Config(), jnp.zeros((1, 3)), noise)
    np.testing.assert_allclose(unmoved, [[-0.5, 0.08, 0.5]], rtol=1e-6)
    action = td3.smoothed_action(td3.Config(), jnp.array([[-0.8, 0.1, 0.9]]), noise)
    np.testing.assert_allclose(action, [[-1, 0.18, 1]], rtol=1e-6)


def test_smoothing_noise_is_clipped_and_independent_for_each_component():
    noise = np.asarray(
        td3.smoothed_action(td3.Config(), jnp.zeros((4000, 2)), jax.random.normal(jax.random.key(0), (4000, 2)))
    )
    assert np.abs(noise).max() == 0.5
    assert noise.std() == pytest.approx(0.2, rel=0.03)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.05


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    assert example_target() == pytest.approx(2.876)
    assert example_target(values=(2.4, 3.0)) == pytest.approx(2.876)


def test_only_termination_stops_the_bootstrap():
    assert example_target(terminated=True) == 0.5
    assert example_target(terminated=True, truncated=True) == 0.5
    assert example_target(truncated=True) == pytest.approx(2.876)


def test_minimum_is_taken_for_each_transition():
    values = jnp.array([[1.0, 4.0], [5.0, 2.0]])
    target = td3.target_value(by_hand.transition(reward=[0.0, 0.0]), values)
    np.testing.assert_allclose(target, [0.99, 1.98], rtol=1e-6)


def test_critic_loss_sums_over_critics_and_averages_over_the_batch():
    # A mean over critics would give .578376.
    loss = td3.critic_loss(jnp.array([[2.0, 3.5]]), jnp.array([2.876]))
    assert loss == pytest.approx(1.156752, rel=1e-5)
    assert td3.critic_loss(jnp.array([[2.0, 3.5]] * 3), jnp.full(3, 2.876)) == pytest.approx(1.156752, rel=1e-5)


def test_actor_loss_takes_the_first_critic():
    values = jnp.array([[3.0, 2.0], [1.0, -5.0]])
    loss, gradient = jax.value_and_grad(td3.actor_loss)(values)
    assert loss == -2
    np.testing.assert_array_equal(gradient, [[-0.5, 0], [-0.5, 0]])


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_authors_code_and_the_preset_is_the_papers():
    config = td3.Config()
    assert (config.actor_hidden, config.critic_hidden, config.num_critics) == ((256, 256), (256, 256), 2)
    assert (config.batch_size, config.warmup_steps, config.replay_capacity) == (256, 25_000, 1_000_000)
    assert config.actor_learning_rate == config.critic_learning_rate == 3e-4
    assert (config.target_noise, config.target_noise_clip, config.exploration_noise) == (0.2, 0.5, 0.1)
    assert (config.discount, config.polyak, config.policy_delay) == (0.99, 0.005, 2)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration
    for preset in td3.PRESETS.values():
        check_configuration(dataclasses.replace(config, **preset))
    paper = dataclasses.replace(config, **td3.PRESETS["paper"])
    assert (paper.actor_hidden, paper.critic_hidden, paper.batch_size) == ((400, 300), (400, 300), 100)
    assert paper.actor_learning_rate == paper.critic_learning_rate == 1e-3
    assert paper.warmup_steps == 10_000


@pytest.mark.parametrize(("updates", "delay"), [(3, 2), (1, 2), (2, 4)])
def test_policy_delay_must_divide_the_updates(updates, delay):
    message = rf"--updates-per-iteration is {updates}; it must be a multiple of --policy-delay = {delay}"
    with pytest.raises(ValueError, match=message):
        by_hand.agent_on(td3, by_hand.Drift(), updates_per_iteration=updates, policy_delay=delay)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_updates(learner: td3.Learner, batches: list, noises: list, config: td3.Config) -> dict:
    """Critic updates on every batch, the actor and all targets once at the end, all gradients by hand."""
    actor, target_actor = by_hand.network(learner.actor.parameters), by_hand.network(learner.target_actor)
    critic, target_critic = by_hand.network(learner.critic.parameters), by_hand.network(learner.target_critic)
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)

    def values_of(net, observation, action):
        inputs = np.concatenate([observation, action], axis=1)
        return [by_hand.forward(net, member, inputs) for member in range(config.num_critics)]

    for batch, noise in zip(batches, noises, strict=True):
        size, observations = batch["observation"].shape
        next_action = np.tanh(by_hand.forward(target_actor, 0, batch["next_observation"])[-1])
        for index, value in np.ndenumerate(noise):
            step = max(-config.target_noise_clip, min(config.target_noise_clip, config.target_noise * value))
            next_action[index] = max(-1, min(1, next_action[index] + step))
        next_values = values_of(target_critic, batch["next_observation"], next_action)
        gradient = by_hand.zeros_like(critic)
        for n, member in enumerate(values_of(critic, batch["observation"], batch["action"])):
            slope = np.zeros((size, 1))
            for b in range(size):
                smallest = min(following[-1][b, 0] for following in next_values)
                target = batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * smallest
                slope[b] = 2 * (member[-1][b, 0] - target) / size
            by_hand.backward(critic, n, member, slope, gradient)
        critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    activations = by_hand.forward(actor, 0, batch["observation"])
    action = np.tanh(activations[-1])
    first_critic = values_of(critic, batch["observation"], action)[0]
    action_slope = by_hand.backward(critic, 0, first_critic, np.full((size, 1), -1 / size))[:, observations:]
    gradient = by_hand.zeros_like(actor)
    by_hand.backward(actor, 0, activations, action_slope * (1 - action**2), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)
    return {
        "actor": actor, "critic": critic, "target_actor": by_hand.moved(target_actor, actor, config.polyak),
        "target_critic": by_hand.moved(target_critic, critic, config.polyak), "adams": (actor_adam, critic_adam),
    }  # fmt: skip


@pytest.fixture(scope="module")
def delayed():
    """An agent with two critic updates per actor update, its compiled step, and a state some iterations old."""
    agent, config = by_hand.agent_on(
        td3, by_hand.Drift(), **by_hand.TINY, num_envs=2, steps_per_iteration=1, updates_per_iteration=2,
        policy_delay=2, num_critics=2, target_noise=0.6, target_noise_clip=0.4,
    )  # fmt: skip
    step = by_hand.quick(agent.step)
    state = by_hand.quick(agent.init)(jax.random.key(3))
    for _ in range(3):
        state, _ = step(state)
    return config, step, state


def test_updates_equal_loops_in_numpy(delayed):
    config, step, state = delayed
    state = by_hand.with_fresh_keys(state)
    for _ in range(3):
        # The keys as `step` splits them: one environment step, one round of two critic updates and one of the actor.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        _, sample_key, noise_key = jax.random.split(key, 3)
        before, (state, _) = state.learner, step(state)
        rows = by_hand.stored_rows(state, sample_key, 2 * config.batch_size)
        batches = [{name: np.split(value, 2)[i] for name, value in rows.items()} for i in range(2)]
        noises = np.asarray(jax.random.normal(noise_key, (2, config.batch_size, 2)), np.float64)
        expected = slow_updates(before, batches, list(noises), config)
        for name in ("actor", "critic", "target_actor", "target_critic"):
            by_hand.assert_network_is(getattr(state.learner, name), expected[name])
        by_hand.assert_adam_is(state.learner.actor.optimizer, expected["adams"][0])
        by_hand.assert_adam_is(state.learner.critic.optimizer, expected["adams"][1])
    assert expected["adams"][0].time == 6  # updates of the actor: three before and three here
    assert expected["adams"][1].time == 12  # updates of the critics
    assert state.experience.replay.rows.terminated.any()


def test_second_critic_reaches_the_actor_only_through_the_targets(delayed):
    _, step, state = delayed
    critic = jax.tree.map(lambda x: x.at[1].add(0.3), state.learner.critic.parameters)
    disturbed = state._replace(learner=by_hand.changed(state.learner, critic=critic))
    after, other = (step(by_hand.with_fresh_keys(s))[0].learner for s in (state, disturbed))
    for name, value in by_hand.network(after.actor).items():
        np.testing.assert_array_equal(by_hand.network(other.actor)[name], value)
    for name, value in by_hand.network(after.critic).items():
        np.testing.assert_array_equal(by_hand.network(other.critic)[name][0], value[0])
        assert not np.array_equal(by_hand.network(other.critic)[name][1], value[1])


def test_actor_and_targets_hold_still_between_their_updates(delayed):
    """The first of two critic updates must see the old targets and leave them: seen with targets that copy at once."""
    config, _, state = delayed
    copying = dataclasses.replace(config, polyak=1.0, actor_learning_rate=0.0)
    step = by_hand.quick(td3.make_agent(copying, by_hand.Drift(), by_hand.Drift().default_params).step)
    key = jax.random.split(jax.random.clone(state.key), 3)[0]
    _, sample_key, noise_key = jax.random.split(key, 3)
    before, (after, _) = state.learner, step(by_hand.with_fresh_keys(state))
    rows = by_hand.stored_rows(after, sample_key, 2 * config.batch_size)
    batches = [{name: np.split(value, 2)[i] for name, value in rows.items()} for i in range(2)]
    noises = list(np.asarray(jax.random.normal(noise_key, (2, config.batch_size, 2)), np.float64))
    by_hand.assert_network_is(after.learner.critic.parameters, slow_updates(before, batches, noises, copying)["critic"])
    # Had the targets moved after each critic update, the second would have seen the critic after the first.
    first = slow_updates(before, batches[:1], noises[:1], copying)["critic"]
    layers = {name: jnp.asarray(value, jnp.float32) for name, value in first.items()}
    eager = before._replace(target_critic={"params": {"mlp": layers}})
    wrong = slow_updates(eager, batches[1:], noises[1:], copying)["target_critic"]
    assert any(
        np.abs(by_hand.network(after.learner.critic.parameters)[name] - wrong[name]).max() > 1e-3 for name in wrong
    )
    for online, target in (
        (after.learner.critic.parameters, after.learner.target_critic),
        (before.actor.parameters, after.learner.actor.parameters),
    ):
        jax.tree.map(np.testing.assert_array_equal, online, target)


# -- TD3 without its three changes is DDPG ----------------------------------------------------------------------------


def test_reduces_to_ddpg_bit_for_bit():
    env, params = envs.make("Pendulum-v1")
    shared = {
        "warmup_steps": 64, "replay_capacity": 100, "batch_size": 32, "actor_hidden": (16, 16),
        "critic_hidden": (16, 16), "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
        "steps_per_iteration": 1, "updates_per_iteration": 1,
    }  # fmt: skip
    reduced = dataclasses.replace(td3.Config(), **shared, num_critics=1, policy_delay=1, target_noise=0.0)
    twin = td3.make_agent(reduced, env, params)
    single = ddpg.make_agent(dataclasses.replace(ddpg.Config(), **shared), env, params)
    state, other = (by_hand.quick(agent.init)(jax.random.key(0)) for agent in (single, twin))
    jax.tree.map(np.testing.assert_array_equal, state.learner.actor.parameters, other.learner.actor.parameters)
    np.testing.assert_array_equal(state.experience.replay.rows.reward, other.experience.replay.rows.reward)
    # The critics' parameters carry different names in the two files, and with the names different first values.
    layers = state.learner.critic.parameters["params"]["mlp"]["layers"]
    critic = {"params": {"mlp": layers}}
    optimizer = other.learner.critic.optimizer
    other = other._replace(learner=by_hand.changed(other.learner, critic=critic, target_critic=critic))
    assert jax.tree.structure(optimizer[0].mu) == jax.tree.structure(critic)

    # `quick` fuses no product with a sum, whose rounding would depend on what else stands in the program.
    step, other_step = by_hand.quick(single.step), by_hand.quick(twin.step)
    for _ in range(30):
        (state, metrics), (other, other_metrics) = step(state), other_step(other)
    for name in ("actor", "target_actor"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state.learner, name), getattr(other.learner, name))
    for name in ("critic", "target_critic"):
        expected, actual = (by_hand.weights(getattr(one.learner, name)) for one in (state, other))
        jax.tree.map(np.testing.assert_array_equal, expected["params"]["mlp"]["layers"], actual["params"]["mlp"])
    jax.tree.map(np.testing.assert_array_equal, state.experience, other.experience)
    assert metrics["critic_loss"].total == pytest.approx(float(other_metrics["critic_loss"].total), rel=1e-6)
    assert not np.array_equal(
        state.learner.critic.parameters["params"]["mlp"]["layers"]["kernel_0"], layers["kernel_0"]
    )

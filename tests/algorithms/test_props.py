"""PROPS and ROS: losses by hand, who acts and what is learned against loops in numpy, and PPO where theta acts."""

import dataclasses
import functools

import by_hand
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.policy_gradient import ppo, props
from jaxrl_dist.learning import clipped, returns
from jaxrl_dist.learning.clipped import policy_loss
from jaxrl_dist.learning.policies import Choice, Gaussian

PPO = {"num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "learning_rate": 0.05}
TINY = PPO | {
    "num_batches": 3, "behaviour_period": 2, "behaviour_epochs": 2, "behaviour_minibatches": 4, "kl_weight": 0.7,
    "behaviour_learning_rate": 0.03, "behaviour_clip_range": 0.15, "behaviour_kl_bound": 0.005,
    "ros_learning_rate": 0.8, "clip_range": 0.05, "annealing_steps": 4 * 24,
}  # fmt: skip
RUNNING = {"normalize_observations": True, "normalize_rewards": True}
KINDS = {"choice": (by_hand.Choices(), {}), "continuous": (by_hand.Drift(), RUNNING)}
every_kind = pytest.mark.parametrize("kind", KINDS)
ALL = jnp.ones(5, bool)


def agent_of(kind, algorithm=props, base=TINY, **settings):
    env, more = KINDS[kind]
    return by_hand.agent_on(algorithm, env, **(base | more | settings))


@functools.cache
def programs(kind, behaviour="props", **static):
    """`begin(key, **floats)` and `advance(state, **floats)`, compiled once for all values of the floats."""
    _, config = agent_of(kind, behaviour=behaviour, **static)
    env = KINDS[kind][0]

    def agent(config):
        return props.make_agent(config, env, env.default_params)

    begin = by_hand.quick(lambda config, key: agent(config).init(key))
    advance = by_hand.quick(lambda config, state: agent(config).step(state))
    return (
        lambda key, **floats: begin(dataclasses.replace(config, **floats), jax.random.key(key)),
        lambda state, **floats: advance(dataclasses.replace(config, **floats), state),
    )


# -- losses -----------------------------------------------------------------------------------------------------------


def test_an_action_is_made_rarer_until_it_is_rare_enough():
    ratio = jnp.array([0.5, 0.8, 1.0, 1.2, 1.6])
    terms = [props.behaviour_loss(ratio, 0.3, jnp.arange(5) == i) for i in range(5)]
    np.testing.assert_allclose(terms, [0.7, 0.8, 1, 1.2, 1.6], rtol=1e-6)
    slope = jax.grad(props.behaviour_loss)(ratio, 0.3, ALL)
    np.testing.assert_allclose(slope, np.array([0, 1, 1, 1, 1]) / 5, rtol=1e-6)
    assert props.behaviour_loss(ratio, 0.3, ALL) == pytest.approx(float(policy_loss(ratio, -jnp.ones(5), 0.3)))


def test_what_is_not_known_counts_for_nothing():
    ratio, known = jnp.array([1.0, 9.0, 1.2, jnp.nan]), jnp.array([True, False, True, False])
    assert clipped.mean_of(ratio, known) == pytest.approx(1.1)
    np.testing.assert_array_equal(jax.grad(clipped.mean_of)(ratio, known), [0.5, 0, 0.5, 0])
    assert clipped.mean_of(ratio, jnp.zeros(4, bool)) == 0


def slope_of_ratios(logits, actions):
    """Of the mean ratio, at the policy itself."""
    log_density = Choice(jnp.tile(logits, (len(actions), 1))).log_density(actions)

    def loss(moved):
        law = Choice(jnp.tile(moved, (len(actions), 1)))
        return clipped.mean_of(jnp.exp(law.log_density(actions) - log_density), jnp.ones(len(actions), bool))

    return jax.grad(loss)(logits)


def test_a_step_of_ros_raises_the_action_that_was_taken_too_rarely():
    moved = -0.5 * slope_of_ratios(jnp.zeros(2), jnp.array([0, 0, 0, 1]))
    np.testing.assert_allclose(jax.nn.softmax(moved), [0.4378, 0.5622], atol=5e-5)


def test_nothing_moves_where_frequencies_are_the_policys():
    slope = slope_of_ratios(jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.repeat(jnp.arange(3), jnp.array([5, 3, 2])))
    np.testing.assert_allclose(slope, np.zeros(3), atol=1e-7)


def test_divergences_by_hand():
    one, other = Gaussian(jnp.zeros(1), jnp.zeros(1)), Gaussian(jnp.array([0.5]), jnp.log(jnp.array([1.2])))
    assert props.divergence(one, other) == pytest.approx(0.1163493, abs=1e-6)
    backwards = -np.log(1.2) + (1.2**2 + 0.5**2) / 2 - 0.5
    assert props.divergence(other, one) == pytest.approx(backwards, abs=1e-6)
    two = [jax.tree.map(lambda x: jnp.concatenate([x, 2 * x + 0.1]), law) for law in (one, other)]
    expected = 0.0
    for (m, s), (k, t) in zip(*[zip(np.asarray(x.mean), np.exp(x.log_std), strict=True) for x in two], strict=True):
        expected += np.log(t / s) + (s**2 + (m - k) ** 2) / (2 * t**2) - 0.5
    assert props.divergence(*two) == pytest.approx(expected, abs=1e-6)
    frequencies, even = Choice(jnp.log(jnp.array([0.75, 0.25]))), Choice(jnp.zeros(2))
    assert props.divergence(frequencies, even) == pytest.approx(0.130812, abs=1e-6)
    for law in (other, frequencies):
        assert props.divergence(law, law) == pytest.approx(0, abs=1e-7)
        for slope in jax.tree.leaves(jax.grad(lambda moved, law=law: props.divergence(law, moved))(law)):
            np.testing.assert_allclose(slope, np.zeros_like(slope), atol=1e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        props.behaviour_loss(jnp.ones(5), 0.2, jnp.ones((5, 1), bool))


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


def densities(parameters, observation, action):
    """Log densities of a policy, their slopes in its outputs (and log deviations), the outputs, and all activations."""
    activations = clipped_by_hand.tanh_forward(clipped_by_hand.part(parameters, "actor"), observation)
    outputs = activations[-1]
    if "log_std" in parameters:
        noise = (action - outputs) / np.exp(parameters["log_std"])
        log_density = (-0.5 * noise**2 - parameters["log_std"] - 0.5 * np.log(2 * np.pi)).sum(-1)
        return log_density, noise / np.exp(parameters["log_std"]), noise**2 - 1, outputs, activations
    masses, taken = by_hand.softmax(outputs), np.eye(outputs.shape[-1])[action.astype(int)]
    return np.log((masses * taken).sum(-1)), taken - masses, None, outputs, activations


def apart(parameters, other, observation):
    """KL of two policies at `[rows]` observations, and its slopes in the outputs and log deviations of the other."""
    nothing = np.zeros(len(observation))
    if "log_std" in parameters:
        nothing = np.zeros((len(observation), len(parameters["log_std"])))
    one, two = (densities(x, observation, nothing)[3] for x in (parameters, other))
    if "log_std" not in parameters:
        masses, moved = by_hand.softmax(one), by_hand.softmax(two)
        return (masses * np.log(masses / moved)).sum(1), moved - masses, None
    variance, moved = np.exp(2 * parameters["log_std"]), np.exp(2 * other["log_std"])
    squares = (variance + (one - two) ** 2) / moved
    divergence = (other["log_std"] - parameters["log_std"] + squares / 2 - 0.5).sum(1)
    return divergence, (two - one) / moved, 1 - squares


def slow_behaviour(parameters, adam, observation, action, count, config, key):
    """The behaviour policy for the first `count` rows, all gradients by hand, and which of its steps were taken."""
    phi = {name: x for name, x in parameters.items() if not name.startswith("critic")}
    theta, rows, ros = dict(phi), len(observation), config.behaviour == "ros"
    epochs, minibatches = (1, 1) if ros else (config.behaviour_epochs, config.behaviour_minibatches)
    drawn, ended, taken = np.asarray(jax.random.uniform(key, (epochs, rows))), False, []
    for epoch in range(epochs):
        order = sorted(range(count), key=lambda row, epoch=epoch: drawn[epoch, row])
        for start in range(minibatches):
            numbers = order[start::minibatches]
            if not numbers:
                taken.append(False)
                continue
            log_density, slope, std_slope, _, activations = densities(phi, observation[numbers], action[numbers])
            log_ratio = log_density - densities(theta, observation[numbers], action[numbers])[0]
            ratio = np.exp(log_ratio)
            ended = ended or (not ros and (ratio - 1 - log_ratio).mean() > config.behaviour_kl_bound)
            taken.append(not ended)
            if ended:
                continue
            alive = ratio if ros else ratio * (ratio >= 1 - config.behaviour_clip_range)
            weight = 0 if ros else config.kl_weight
            _, apart_slope, apart_std_slope = apart(theta, phi, observation[numbers])
            slope = (alive[:, None] * slope + weight * apart_slope) / len(numbers)
            net = clipped_by_hand.part(phi, "actor")
            gradient = {f"actor/{k}": x for k, x in clipped_by_hand.tanh_backward(net, activations, slope).items()}
            if "log_std" in phi:
                gradient["log_std"] = (alive[:, None] * std_slope + weight * apart_std_slope).mean(0)
            if ros:
                phi = {name: phi[name] - config.ros_learning_rate * x for name, x in gradient.items()}
            else:
                rate, bound = config.behaviour_learning_rate, config.gradient_bound
                phi, _ = adam.step(phi, gradient, rate, config.adam_epsilon, bound)
    return phi, taken


@every_kind
@pytest.mark.parametrize("behaviour", ["props", "ros", "on_policy"])
def test_iterations_equal_loops_in_numpy(kind, behaviour):
    """Three iterations: every action that a behaviour policy drew, and all that was learned from three rollouts."""
    agent, config = agent_of(kind, behaviour=behaviour)
    begin, step = programs(kind, behaviour)
    state = begin(3)
    assert agent.clock.warmup_steps == 2 * 24
    parameters = clipped_by_hand.flat(state.learner.parameters)
    adam = clipped_by_hand.Adam(parameters)
    of_behaviour = clipped_by_hand.Adam({k: x for k, x in parameters.items() if not k.startswith("critic")})
    shares, ends = [], []
    for iteration in range(3):
        _, collect_key, epochs_key = jax.random.split(jax.random.clone(state.key), 3)
        before, (state, metrics) = state, step(state)
        lived = jax.tree.map(np.asarray, state.buffer)
        for old, new in zip(*map(jax.tree.leaves, (before.buffer, lived)), strict=True):
            np.testing.assert_array_equal(old[8:], new[:16])  # the oldest rollout is gone
        observation, following = (seen_as(x, before.normalizer) for x in (lived.observation, lived.next_observation))

        # Who acted, and what it drew.
        rows, taken, divergences = [x.reshape(72, *x.shape[2:]) for x in (observation, lived.action)], [], []
        for chunk in range(1 if behaviour == "on_policy" else 4):
            phi, act_key, period = parameters, collect_key, 8
            if behaviour != "on_policy":
                behave_key, act_key = jax.random.split(jax.random.fold_in(jax.random.clone(collect_key), chunk))
                count, period = (16 + 2 * chunk) * 3, 2
                phi, which = slow_behaviour(parameters, of_behaviour, *rows, count, config, behave_key)
                taken += which
            for now in range(period):
                at = 16 + chunk * period + now
                draw_key = jax.random.split(jax.random.fold_in(jax.random.clone(act_key), now))[0]
                outputs = densities(phi, observation[at], lived.action[at])[3]
                if kind == "choice":
                    drawn = jax.random.categorical(draw_key, jnp.asarray(outputs, jnp.float32))
                    np.testing.assert_array_equal(lived.action[at], drawn)
                else:
                    drawn = outputs + np.exp(phi["log_std"]) * np.asarray(jax.random.normal(draw_key, outputs.shape))
                    np.testing.assert_allclose(lived.action[at], drawn, rtol=2e-3, atol=2e-4)
                divergences.append(apart(parameters, phi, observation[at])[0])
        if behaviour == "on_policy":
            assert not {"behaviour_kl", "behaviour_updates"} & set(metrics)
        else:
            assert mean(metrics["behaviour_updates"]) == pytest.approx(np.mean(taken))
            np.testing.assert_allclose(mean(metrics["behaviour_kl"]), np.mean(divergences), rtol=2e-2, atol=1e-6)
            shares.append(np.mean(taken))

        # What is learned does not know who acted.
        reward, ended = lived.reward.astype(np.float64), (lived.terminated, lived.truncated)
        ends.append([x.sum() for x in ended])
        if config.normalize_rewards:
            reward = np.clip(reward / np.sqrt(float(state.scale.statistics.variance) + 1e-8), -10, 10)
        critic = clipped_by_hand.part(parameters, "critic")
        value, next_value = (clipped_by_hand.tanh_forward(critic, x)[-1][..., 0] for x in (observation, following))
        advantage = np.concatenate([
            returns.gae(
                *(jnp.asarray(x[8 * k : 8 * k + 8]) for x in (reward, value, next_value, *ended)), config.discount,
                config.gae_decay,
            ) for k in range(3)
        ]).astype(np.float64)  # fmt: skip
        batch = {
            "observation": observation, "action": lived.action,
            "log_density": densities(parameters, observation, lived.action)[0], "value": value,
            "advantage": advantage, "target": advantage + value,
        }  # fmt: skip
        parameters, found = clipped_by_hand.epochs(
            parameters, adam, batch, dataclasses.replace(config, num_steps=24),
            config.learning_rate * (1 - iteration / 4), epochs_key,
        )  # fmt: skip
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                clipped_by_hand.flat(state.learner.parameters)[name], expected, rtol=2e-3, atol=3e-5, err_msg=name
            )
        for name in ("loss", "gradient_norm", "clipped_ratios"):
            np.testing.assert_allclose(
                mean(metrics[name]), np.mean([x[name] for x in found]), rtol=5e-3, atol=1e-4, err_msg=name
            )
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    if behaviour == "props":
        assert 0.1 < np.mean(shares) < 0.95  # some updates reached the bound


def mean(metric):
    return float(metric.total / metric.count)


def seen_as(x, statistics):
    if statistics is None:
        return x.astype(np.float64)
    deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
    return np.clip((x - np.asarray(statistics.mean, np.float64)) / deviation, -10, 10)


# -- who acts, and who does not care ----------------------------------------------------------------------------------


def test_without_a_buffer_and_on_policy_it_is_ppo():
    """The same keys, the same numbers."""
    agents = [agent_of("continuous", ppo, base=PPO)[0]]
    agents.append(agent_of("continuous", base=PPO, behaviour="on_policy", num_batches=1)[0])
    states = [by_hand.quick(agent.init)(jax.random.key(1)) for agent in agents]
    steps = [by_hand.quick(agent.step) for agent in agents]
    for _ in range(3):
        states, metrics = zip(*(step(state) for step, state in zip(steps, states, strict=True)), strict=True)
        for part in ("learner", "interaction", "normalizer", "scale"):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
                *(getattr(state, part) for state in states),
            )  # fmt: skip
        for name, metric in metrics[1].items():
            np.testing.assert_allclose(metrics[0][name], metric, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_update_does_not_know_who_acted(monkeypatch):
    """The same data, whatever the behaviour policy."""
    plain, space = props.rollouts.collect, by_hand.Choices().action_space(None)

    def collect(env, env_params, now, key, steps, policy):
        def any_action(observation, memory, key):
            action = jax.vmap(space.sample)(jax.random.split(key, len(observation)))
            return action, memory, action

        return plain(env, env_params, now, key, steps, any_action)

    monkeypatch.setattr(props.rollouts, "collect", collect)
    begin, step = programs.__wrapped__("choice")
    state = step(begin(1))[0]
    other = step(begin(1), behaviour_learning_rate=0.3, behaviour_kl_bound=9.0)[0]
    jax.tree.map(np.testing.assert_array_equal, state.buffer, other.buffer)
    jax.tree.map(np.testing.assert_array_equal, state.learner, other.learner)
    moments = [jax.tree.leaves(x.behaviour) for x in (state, other)]
    assert any((x != y).any() for x, y in zip(*moments, strict=True))


def test_the_rollout_that_is_replaced_says_nothing_any_more():
    begin, step = programs("choice")
    state, other = begin(1), begin(1)
    other = other._replace(buffer=jax.tree.map(lambda x: x.at[:8].set(jnp.ones((), x.dtype)), other.buffer))
    jax.tree.map(np.testing.assert_array_equal, step(state)[1], step(other)[1])


def test_the_behaviour_policy_begins_at_the_policy_and_stops_at_the_bound():
    """With next to no bound the first minibatch moves it, where the divergence is 0, and no other does."""
    begin, step = programs("choice")
    state = begin(1)
    for _ in range(2):
        state, metrics = step(state, behaviour_kl_bound=1e-6)
        assert mean(metrics["behaviour_updates"]) == pytest.approx(1 / 8)
        assert 0 < mean(metrics["behaviour_kl"]) < 0.05


def test_without_data_the_policy_itself_acts():
    """The first steps of a rollout that is all there is."""
    begin, step = programs("choice", num_batches=1, behaviour_period=8)
    state = begin(1)
    assert not any(x.any() for x in jax.tree.leaves(state.buffer))
    assert agent_of("choice", num_batches=1)[0].clock.warmup_steps == 0
    _, metrics = step(state)
    assert mean(metrics["behaviour_updates"]) == 0
    assert mean(metrics["behaviour_kl"]) == pytest.approx(0, abs=1e-7)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"behaviour_period": 3}, "--behaviour-period is 3; it must divide --num-steps = 8"),
        (
            {"behaviour_minibatches": 5},
            "--behaviour-minibatches is 5; it must divide --num-batches x --num-envs x --num-steps = 72",
        ),
        ({"num_minibatches": 5}, "--num-minibatches is 5; it must divide --num-envs x --num-steps = 24"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent_of("choice", **settings)


def test_defaults_are_the_authors():
    config = props.Config()
    assert (config.behaviour, config.num_batches, config.behaviour_epochs, config.behaviour_minibatches) == (
        "props", 2, 4, 4,
    )  # fmt: skip
    assert (config.behaviour_learning_rate, config.behaviour_clip_range) == (1e-3, 0.3)
    assert (config.behaviour_kl_bound, config.kl_weight) == (0.03, 0.1)

"""DSAC's equations by the spec's hand-worked numbers, the law it converges to, and whole updates against numpy."""

import dataclasses
import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.actor_critic import dsac
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import gaussian
from jaxrl_dist.learning import soft

forward = functools.partial(by_hand.forward, activation="gelu")
backward = functools.partial(by_hand.backward, activation="gelu")


def bounded(position: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The authors' bounds of log standard deviations, a tanh on either side of 0, and the slope."""
    largest = max(-low, high)
    tanh = np.tanh(position / largest)
    side = np.where(position > 0, high, -low)
    return np.maximum(high * tanh, 0) + np.minimum(-low * tanh, 0), side * (1 - tanh**2) / largest


def soft_sample(outputs: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    mean, position = np.split(outputs, 2, axis=1)
    log_std, slope = bounded(position, -5, 1)
    sample = by_hand.soft_sample(np.concatenate([mean, log_std], axis=1), noise, (-np.inf, np.inf))
    return sample | {"free": slope}


# The actor's value is mean + this * std; for the worst quarter -phi(Phi^-1(1/4)) / (1/4).
STD_WEIGHTS = {"neutral": 0.0, "cvar:0.25": -1.2711063}


def config_with(**values) -> dsac.Config:
    return dataclasses.replace(dsac.Config(), **values)


critic_gradient = by_hand.quick(jax.grad(dsac.critic_loss, argnums=(1, 2)))


def slopes_of(config, mean, std, target):
    """Gradients of the critic's loss in mean and standard deviation, `[batch]` each."""
    mean, std, target = (jnp.atleast_1d(jnp.float32(x)) for x in (mean, std, target))
    return critic_gradient(config, mean, std, target)


# Rewards are scaled by 0.2: 2.5 counts as 0.5.
def example_target(config=None, **flags):
    config = config or dsac.Config()
    flags = {name: [value] for name, value in flags.items()}
    batch = by_hand.transition(reward=[2.5], discount=config.discount, **flags)
    return dsac.target_return(config, batch, jnp.array([3.0]), jnp.array([-1.0]), jnp.float32(0.2))[0]


# -- targets ----------------------------------------------------------------------------------------------------------


def test_termination_masks_return_and_entropy_but_truncation_masks_nothing():
    assert example_target() == pytest.approx(0.5 + 0.99 * 3.2)
    assert example_target(config_with(discount=0.5)) == pytest.approx(2.1)
    assert example_target(terminated=True) == 0.5
    assert example_target(terminated=True, truncated=True) == 0.5
    assert example_target(truncated=True) == pytest.approx(0.5 + 0.99 * 3.2)


# -- the critic's gradients -------------------------------------------------------------------------------------------


def test_critic_gradients_by_hand():
    assert gaussian.clip_target(jnp.float32(1), jnp.float32(8), 5.0) == 6
    for bias, slope_of_mean, slope_of_std in ((0.0, -1.75, -2.625), (0.1, -1.7073171, -2.5925926)):
        slopes = slopes_of(config_with(target_bound=5.0, gradient_bias=bias), 1, 2, 8)
        np.testing.assert_allclose(np.concatenate(slopes), [slope_of_mean, slope_of_std], rtol=1e-6)


def test_loss_is_a_mean_over_the_batch():
    one, three = (slopes_of(config_with(target_bound=5.0), *([x] * n for x in (1, 2, 8))) for n in (1, 3))
    np.testing.assert_allclose(three, np.repeat(one, 3, axis=1) / 3, rtol=1e-6)


def test_bound_leaves_the_mean_alone_and_is_inactive_where_it_is_wider_than_the_error():
    # Clipping the mean's target as well would give -1.25.
    slopes = {bound: slopes_of(config_with(target_bound=bound), 1, 2, 8) for bound in (5.0, 6.9, 7.1, 50.0)}
    assert {float(mean[0]) for mean, _ in slopes.values()} == {-1.75}
    assert slopes[7.1][1] == slopes[50.0][1] == pytest.approx(-(49 - 4) / 8)
    assert slopes[6.9][1] > slopes[7.1][1]
    below = slopes_of(config_with(target_bound=5.0), 1, 2, -6)
    np.testing.assert_allclose(np.concatenate(below), [1.75, -2.625], rtol=1e-6)


@pytest.mark.parametrize("bound", [3.0, 20.0])
def test_std_stands_still_where_the_bounded_error_equals_it(bound):
    config = config_with(target_bound=bound)
    assert slopes_of(config, 1, 2, 3)[1] == 0
    assert slopes_of(config, 1, 2, 2.99)[1] > 0  # smaller errors shrink it
    assert slopes_of(config, 1, 2, -1.01)[1] < 0
    assert (slopes_of(config, 1, 3, 100)[1] == 0) == (bound == 3)


def random_moments():
    generator = np.random.default_rng(0)
    mean, target = generator.normal(0, 3, (2, 60))
    return tuple(jnp.asarray(x, jnp.float32) for x in (mean, generator.uniform(0.5, 4, 60), target))


def test_gradients_are_those_of_the_earlier_code_and_of_the_likelihood():
    def earlier(mean, std, target, bound):
        """The loss of the authors' first code, whose gradients are to be taken as they stand."""
        still_mean, still_std = jax.lax.stop_gradient((mean, std))
        clipped = still_mean + jnp.clip(target - still_mean, -bound, bound)
        return (
            (mean - target) ** 2 / (2 * still_std**2) + (still_mean - clipped) ** 2 / (2 * std**2) + jnp.log(std)
        ).mean()

    def likelihood(*moments):
        return gaussian.negative_log_likelihood(*moments).mean()

    mean, std, target = random_moments()
    assert likelihood(*(jnp.float32(x) for x in (1, 2, 8))) == pytest.approx(7.7370857, rel=1e-6)
    clipped = np.abs(target - mean) > 2
    assert 0 < clipped.mean() < 1
    for bound in (2.0, 100.0):
        slopes = slopes_of(config_with(target_bound=bound), mean, std, target)
        expected = jax.grad(earlier, argnums=(0, 1))(mean, std, target, bound)
        np.testing.assert_allclose(slopes, expected, rtol=1e-4, atol=1e-7)
        exact = np.array(jax.grad(likelihood, argnums=(0, 1))(mean, std, target))
        same = np.stack([np.full(60, True), ~clipped if bound == 2 else np.full(60, True)])
        np.testing.assert_allclose(np.array(slopes)[same], exact[same], rtol=1e-4, atol=1e-7)
        assert not np.isclose(np.array(slopes)[~same], exact[~same], rtol=1e-3).any()


def test_critic_loss_sends_no_gradient_into_its_target():
    def loss(mean, std, next_return, log_density, temperature, reward):
        target = dsac.target_return(
            dsac.Config(), by_hand.transition(reward=reward), next_return, log_density, temperature
        )
        return dsac.critic_loss(dsac.Config(), mean, std, target)

    inputs = *(jnp.array([x]) for x in (1.0, 2.0, 3.0, -1.5)), jnp.float32(0.2), jnp.array([1.0])
    gradients = jax.grad(loss, argnums=range(6))(*inputs)
    assert all((gradient != 0).all() for gradient in gradients[:2])
    assert all((gradient == 0).all() for gradient in gradients[2:])


def test_self_loop_converges_to_the_law_of_the_full_return():
    # One state, r ~ N(1, 0.5^2): the return is N(1 / (1 - gamma), 0.25 / (1 - gamma^2)).
    config, key, rows = config_with(discount=0.9, reward_scale=1.0), jax.random.key(0), 64

    def update(moments, index):
        reward_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        batch = by_hand.transition(reward=1 + 0.5 * jax.random.normal(reward_key, (rows,)), discount=0.9)
        next_return = moments[0] + moments[1] * jax.random.normal(noise_key, (rows,))
        target = dsac.target_return(config, batch, next_return, jnp.zeros(rows), jnp.float32(0.3))

        def objective(moments):
            return dsac.critic_loss(config, *jnp.broadcast_to(moments[:, None], (2, rows)), target)

        moments = moments - 0.1 * jax.grad(objective)(moments)
        return moments, moments

    _, path = jax.jit(lambda: jax.lax.scan(update, jnp.array([0.0, 3.0]), jnp.arange(8000)))()
    mean, std = path[2000:].mean(0)
    assert mean == pytest.approx(10, rel=0.01)
    assert std == pytest.approx(1.147, rel=0.02)


def test_actor_and_temperature_losses_by_hand():
    loss, gradient = jax.value_and_grad(dsac.actor_loss)(jnp.array([3.0, 1.0]), jnp.array([-1.5, 0.5]), 0.2)
    assert loss == pytest.approx((-0.3 - 3 + 0.1 - 1) / 2)
    np.testing.assert_array_equal(gradient, [-0.5, -0.5])
    log_density = jnp.array([-1.5, 0.5, -0.2])
    gradients = jax.grad(soft.temperature_loss, argnums=(0, 1))(jnp.log(0.2), log_density, -2.0)
    assert gradients[0] == pytest.approx(2.4)
    np.testing.assert_array_equal(gradients[1], np.zeros(3))


# -- networks ---------------------------------------------------------------------------------------------------------


def single_layer(*weights):
    """Parameters of a network without hidden layers, one row of weights for each input."""
    return {
        "params": {"mlp": {"layers": {"kernel_0": jnp.array([weights]), "bias_0": jnp.zeros((1, len(weights[0])))}}}
    }


def test_std_stays_within_its_bounds_and_moves_smoothly_between_them():
    parameters = single_layer([0.0, 1.0], [5.0, 0.0])  # mean from the action, standard deviation from the observation

    def moments_of(position):
        return dsac.Critic(()).apply(parameters, position[:, None], jnp.full((len(position), 1), 0.4), 0.5, 8.0)

    position = np.linspace(-8, 8, 241)
    (mean, std), (_, slope) = jax.jvp(moments_of, (jnp.asarray(position, jnp.float32),), (jnp.ones(241),))
    np.testing.assert_allclose(mean, np.full(241, 2.0), rtol=1e-6)
    log_std, log_slope = bounded(position, np.log(0.5), np.log(8))
    np.testing.assert_allclose(std, np.exp(log_std), rtol=1e-5)
    np.testing.assert_allclose(slope, np.exp(log_std) * log_slope, rtol=2e-3)
    assert (np.diff(std) > 0).all()
    assert std.min() > 0.5
    assert std.max() < 8
    assert std[120] == 1  # at output 0
    # Beyond, tanh is 1 in float32.
    np.testing.assert_allclose(moments_of(jnp.array([-1e30, 1e30]))[1], [0.5, 8], rtol=1e-6)


def test_mean_and_deviations_start_near_0_and_1():
    """Where the standard deviation started at 7, the mean's gradient was 49 times smaller."""
    agent, _ = by_hand.agent_on(dsac, by_hand.Drift(), batch_size=16, warmup_steps=30, replay_capacity=40)
    learner = by_hand.quick(agent.init)(jax.random.key(0)).learner
    for network in map(by_hand.network, (learner.critic.parameters, learner.actor.parameters)):
        assert sum(name.startswith("kernel") for name in network) == 6
        for name, value in network.items():
            bound = np.sqrt(6 / sum(value.shape[1:])) if name.startswith("kernel") else 0
            assert 0.9 * bound <= np.abs(value).max() <= bound, name
    inputs = jax.random.uniform(jax.random.key(1), (100, 5), minval=-1)
    observation, action = inputs[:, :3], inputs[:, 3:]
    config = dsac.Config()
    critic, actor = dsac.Critic(config.critic_hidden), dsac.Actor(config.actor_hidden, 2)
    mean, std = critic.apply(learner.critic.parameters, observation, action, config.min_std, config.max_std)
    assert np.abs(mean).max() < 1
    np.testing.assert_allclose(std, 1, atol=0.5)
    np.testing.assert_allclose(np.exp(actor.apply(learner.actor.parameters, observation)[1]), 1, atol=0.5)


def test_log_std_of_the_actor_is_bounded_smoothly():
    position = np.array([-90.0, -4.0, 0.0, 0.5, 90.0])
    mean, log_std = dsac.Actor((), 1).apply(single_layer([1.0, 1.0]), jnp.asarray(position[:, None], jnp.float32))
    np.testing.assert_array_equal(mean[:, 0], position)
    np.testing.assert_allclose(log_std[:, 0], [-5, -5 * np.tanh(0.8), 0, np.tanh(0.1), 1], rtol=1e-6)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_authors_codes():
    config = dsac.Config()
    assert config.actor_hidden == config.critic_hidden == (256,) * 5
    assert (config.critic_learning_rate, config.actor_learning_rate) == (8e-5, 5e-5)
    assert (config.temperature_learning_rate, config.initial_temperature) == (5e-5, 1.0)
    assert (config.discount, config.polyak, config.policy_delay, config.batch_size) == (0.99, 0.001, 2, 256)
    assert (config.warmup_steps, config.replay_capacity, config.target_entropy_per_action) == (2_000, 500_000, -1.0)
    assert (config.reward_scale, config.target_bound, config.gradient_bias) == (0.2, 10.0, 0.0)
    assert config.risk == "neutral"
    np.testing.assert_allclose(np.log([config.min_std, config.max_std]), [-0.1, 4], atol=1e-3)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration
    for preset in dsac.PRESETS.values():
        check_configuration(config_with(**preset))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_std": 1.0}, r"--min-std is 1.0; it must be below 1, where the standard deviation starts"),
        ({"max_std": 0.95}, r"--max-std is 0.95; it must be above 1, where the standard deviation starts"),
        ({"updates_per_iteration": 3}, r"--updates-per-iteration is 3; it must be a multiple of --policy-delay = 2"),
        ({"risk": "sharpe:1"}, r"--risk is 'sharpe:1'; it must be neutral, cvar:LEVEL"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        by_hand.agent_on(dsac, by_hand.Drift(), **settings)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_moments(net: dict, observation: np.ndarray, action: np.ndarray, config: dsac.Config) -> tuple:
    """Activations, means, standard deviations, and the slope of these in the second output."""
    activations = forward(net, 0, np.concatenate([observation, action], axis=1))
    log_std, slope = bounded(activations[-1][:, 1], np.log(config.min_std), np.log(config.max_std))
    return activations, activations[-1][:, 0], np.exp(log_std), np.exp(log_std) * slope


def slow_updates(learner: dsac.Learner, batches: list, noises: dict, config: dsac.Config) -> dict:
    """Critic updates on every batch; then actor, temperature and all targets, once; all gradients by hand."""
    actor, critic, target_actor, target_critic = map(by_hand.network, learner[:4])
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    temperature_adam = by_hand.Adam(learner.log_temperature.optimizer, None)
    temperature = np.exp(np.float64(learner.log_temperature.parameters))
    targets, clipped, losses = [], [], []

    for batch, action_noise, noise in zip(batches, noises["next_action"], noises["next_return"], strict=True):
        size, observations = batch["observation"].shape
        following = soft_sample(forward(target_actor, 0, batch["next_observation"])[-1], action_noise)
        _, next_mean, next_std, _ = slow_moments(target_critic, batch["next_observation"], following["action"], config)
        activations, mean, std, std_slope = slow_moments(critic, batch["observation"], batch["action"], config)
        slope, gradient = np.zeros((size, 2)), by_hand.zeros_like(critic)
        for b in range(size):
            soft = next_mean[b] + next_std[b] * max(-2, min(2, noise[b])) - temperature * following["log_density"][b]
            target = config.reward_scale * batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * soft
            error = target - mean[b]
            bounded = max(-config.target_bound, min(config.target_bound, error))
            slope[b, 0] = -error / (std[b] ** 2 + config.gradient_bias) / size
            of_std = -(bounded**2 - std[b] ** 2) / (std[b] ** 3 + config.gradient_bias)
            slope[b, 1] = of_std * std_slope[b] / size
            targets.append(target)
            clipped.append(bounded != error)
            losses.append(0.5 * np.log(2 * np.pi) + np.log(std[b]) + 0.5 * (error / std[b]) ** 2)
        backward(critic, 0, activations, slope, gradient)
        critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    # The actor, on the last batch and the critic just updated.
    activations = forward(actor, 0, batch["observation"])
    sample = soft_sample(activations[-1], noises["action"])
    of_value, mean, std, std_slope = slow_moments(critic, batch["observation"], sample["action"], config)
    slope = np.stack([np.ones(size), STD_WEIGHTS[config.risk] * std_slope], axis=1) / -size
    action_slope = backward(critic, 0, of_value, slope)[:, observations:]
    gradient = by_hand.zeros_like(actor)
    backward(actor, 0, activations, by_hand.soft_actor_slope(sample, action_slope, temperature), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)

    target_entropy = config.target_entropy_per_action * sample["action"].shape[1]
    slope = {"value": -(sample["log_density"] + target_entropy).mean()}
    log_temperature = temperature_adam.step(
        {"value": np.float64(learner.log_temperature.parameters)}, slope, config.temperature_learning_rate
    )["value"]
    value = mean + STD_WEIGHTS[config.risk] * std
    return {
        "actor": actor, "critic": critic, "target_actor": by_hand.moved(target_actor, actor, config.polyak),
        "target_critic": by_hand.moved(target_critic, critic, config.polyak), "log_temperature": log_temperature,
        "adams": (actor_adam, critic_adam, temperature_adam), "free": sample["free"],
        "metrics": {
            "target": np.mean(targets) / config.reward_scale, "clipped_targets": np.mean(clipped),
            "critic_loss": np.mean(losses),
            "actor_loss": (temperature * sample["log_density"] - value).mean(), "temperature": temperature,
            "entropy": -sample["log_density"].mean(),
        },
    }  # fmt: skip


def noises_of(key: jax.Array, config: dsac.Config) -> tuple[jax.Array, dict]:
    """Key of the batches and normal draws, the keys as `step` splits them: one environment step, one round."""
    _, sample_key, critic_key, action_key = jax.random.split(jax.random.split(key, 3)[0], 4)
    keys = [jax.random.split(jax.random.fold_in(critic_key, turn)) for turn in range(config.policy_delay)]
    size = config.batch_size
    return sample_key, {
        "next_action": jnp.stack([jax.random.normal(k[0], (size, 2)) for k in keys]),
        "next_return": jnp.stack([jax.random.normal(k[1], (size,)) for k in keys]),
        "action": jax.random.normal(action_key, (size, 2)),
    }


@pytest.fixture(scope="module", params=STD_WEIGHTS)
def started(request):
    """Configuration, compiled `step(config, state)`, and a state some iterations old."""
    env = by_hand.Drift()
    config = config_with(
        **by_hand.TINY, num_envs=2, steps_per_iteration=1, updates_per_iteration=2, policy_delay=2,
        initial_temperature=0.7, temperature_learning_rate=7e-3, target_entropy_per_action=-0.6, target_bound=1.5,
        min_std=0.2, max_std=6.0, reward_scale=0.4, gradient_bias=0.05, risk=request.param, normalize_observations=True,
    )  # fmt: skip
    step = by_hand.quick(lambda config, state: dsac.make_agent(config, env, env.default_params).step(state))
    state = by_hand.quick(dsac.make_agent(config, env, env.default_params).init)(jax.random.key(3))
    for _ in range(2):
        state, _ = step(config, state)
    return config, step, state


def test_updates_equal_loops_in_numpy(started):
    config, step, state = started
    # Start from a key whose draws are cut at 2 standard deviations.
    largest = jax.vmap(lambda seed: jnp.abs(noises_of(jax.random.key(seed), config)[1]["next_return"]).max())
    seed = int(jax.jit(largest)(jnp.arange(500)).argmax())
    state = by_hand.with_fresh_keys(state)._replace(key=jax.random.key(seed))
    found = []
    for iteration in range(4):
        sample_key, noises = noises_of(jax.random.clone(state.key), config)
        noises = {name: np.asarray(value, np.float64) for name, value in noises.items()}
        before, (state, metrics) = state.learner, step(config, state)
        rows = by_hand.stored_rows(state, sample_key, 2 * config.batch_size)
        batches = [{name: np.split(value, 2)[i] for name, value in rows.items()} for i in range(2)]
        expected = slow_updates(before, batches, noises, config)
        for name in ("actor", "critic", "target_actor", "target_critic"):
            by_hand.assert_network_is(getattr(state.learner, name), expected[name])
        assert state.learner.log_temperature.parameters == pytest.approx(expected["log_temperature"], abs=1e-5)
        for name, value in expected["metrics"].items():
            assert metrics[name].total / metrics[name].count == pytest.approx(value, rel=1e-4, abs=1e-5), name
        optimizers = (getattr(state.learner, name).optimizer for name in ("actor", "critic", "log_temperature"))
        for optimizer, adam, name in zip(optimizers, expected["adams"], ("mlp", "mlp", None), strict=True):
            by_hand.assert_adam_is(optimizer, adam, name)
        if iteration == 0:
            cut = np.unravel_index(np.abs(noises["next_return"]).argmax(), noises["next_return"].shape)
            assert abs(noises["next_return"][cut]) > 2.2
            assert not batches[cut[0]]["terminated"][cut[1]]
        found.append(expected)
    assert [adam.time for adam in expected["adams"]] == [6, 12, 6]
    assert 0 < np.mean([one["metrics"]["clipped_targets"] for one in found]) < 1
    slopes = np.concatenate([one["free"] for one in found])
    assert (slopes > 0.3).any()  # log deviations on both sides of 0
    assert (slopes < 0.3).any()
    assert state.experience.replay.rows.terminated.any()


def test_std_reaches_the_actor_only_by_a_risk_measure(started):
    config, step, state = started
    layers = dict(state.learner.critic.parameters["params"]["mlp"]["layers"])
    layers["kernel_2"] = layers["kernel_2"].at[..., 1].add(0.5)
    wider = state._replace(learner=by_hand.changed(state.learner, critic={"params": {"mlp": {"layers": layers}}}))
    held = dataclasses.replace(config, critic_learning_rate=0.0)  # else the likelihood would move the mean by std
    one, two = (step(held, by_hand.with_fresh_keys(s))[0].learner.actor.parameters for s in (state, wider))
    equal = [bool((a == b).all()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)]
    assert all(equal) if config.risk == "neutral" else not any(equal)


@pytest.mark.parametrize("field", ["min_std", "max_std"])
def test_either_bound_can_be_swept(field):
    def trace(bound):
        by_hand.agent_on(dsac, by_hand.Drift(), **{field: bound})
        return bound

    jax.eval_shape(jax.vmap(trace), {"min_std": jnp.array([0.2, 0.9]), "max_std": jnp.array([2.0, 3.0])}[field])

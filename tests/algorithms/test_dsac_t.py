"""DSAC-T's equations by the spec's hand-worked numbers, DSAC as the case without its refinements, and whole updates."""

import dataclasses
import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_dist.algorithms.actor_critic import dsac, dsac_t
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import soft

forward = functools.partial(by_hand.forward, activation="gelu")
backward = functools.partial(by_hand.backward, activation="gelu")
soft_sample = functools.partial(by_hand.soft_sample, bounds=(-20, 0.5))
# The actor's value is mean + this * std; for the worst quarter -phi(Phi^-1(1/4)) / (1/4).
STD_WEIGHTS = {"neutral": 0.0, "cvar:0.25": -1.2711063}
WITHOUT = {"expected_value_substitution": False, "num_critics": 1, "variance_scaling": False}

# Two critics at one transition, the targets of the mean and of the deviation, and the running means.
MEAN, STD, RUNNING = jnp.array([[8.0, 9.5]]), jnp.array([[2.0, 0.4]]), jnp.array([2.5, 0.5])
TARGETS = jnp.array([9.608]), jnp.array([8.5685])


def config_with(**values) -> dsac_t.Config:
    return dataclasses.replace(dsac_t.Config(), **values)


critic_gradient = by_hand.quick(jax.grad(dsac_t.critic_loss, argnums=(1, 2)))


def slopes_of(config, mean=MEAN, std=STD, targets=TARGETS, running=RUNNING):
    """Gradients of the critics' loss in mean and standard deviation, `[2, batch, critics]`."""
    return np.array(critic_gradient(config, mean, std, targets, running))


def example_targets(config=None, mean=(10.0, 9.0), std=(2.0, 1.5), noise=(1.2, -0.7), **flags):
    batch = by_hand.transition(reward=[0.5], **{name: [value] for name, value in flags.items()})
    mean, sample = jnp.array([mean]), jnp.array([mean]) + jnp.array([std]) * jnp.array([noise])
    targets = dsac_t.target_returns(config or dsac_t.Config(), batch, mean, sample, jnp.array([-1.0]), jnp.float32(0.2))
    return [float(target[0]) for target in targets]


# -- targets ----------------------------------------------------------------------------------------------------------


def test_targets_by_hand():
    assert example_targets() == pytest.approx([9.608, 8.5685])
    # The same in the other order, and with the deviations swapped: the choice goes by the means, not by the samples.
    assert example_targets(mean=(9.0, 10.0), std=(1.5, 2.0), noise=(-0.7, 1.2)) == pytest.approx([9.608, 8.5685])
    assert example_targets(std=(1.5, 2.0)) == pytest.approx([9.608, 0.5 + 0.99 * (9 - 0.7 * 2 + 0.2)])
    assert example_targets(noise=(-5.0, 3.0)) == pytest.approx([9.608, 0.5 + 0.99 * (9 + 3 * 1.5 + 0.2)])
    assert example_targets(noise=(0.0, 0.0)) == pytest.approx([9.608, 9.608])


def test_termination_masks_return_and_entropy_but_truncation_masks_nothing():
    assert example_targets(terminated=True) == [0.5, 0.5]
    assert example_targets(terminated=True, truncated=True) == [0.5, 0.5]
    assert example_targets(truncated=True) == pytest.approx([9.608, 8.5685])


def test_each_transition_has_its_own_critic():
    mean, sample = jnp.array([[1.0, 4.0, 2.0], [5.0, 6.0, 3.0]]), jnp.array([[10.0, 40.0, 20.0], [50.0, 60.0, 30.0]])
    batch, nothing = by_hand.transition(reward=[0.0, 0.0], discount=0.5), jnp.zeros(2)
    targets = dsac_t.target_returns(config_with(discount=0.5), batch, mean, sample, nothing, jnp.float32(0.2))
    np.testing.assert_allclose(targets, [[0.5, 1.5], [5, 15]], rtol=1e-6)


# -- the running mean -------------------------------------------------------------------------------------------------


def test_running_mean_by_hand():
    std = jnp.array([[2.0, 1.0], [4.0, 0.5]])
    first = dsac_t.running_average(dsac_t.Config(), jnp.zeros(2), std)
    np.testing.assert_array_equal(first, [3, 0.75])
    following = dsac_t.running_average(dsac_t.Config(), jnp.array([2.5, 0.75]), std)
    np.testing.assert_allclose(following, [2.5025, 0.75], rtol=1e-6)


# -- the critics' gradients -------------------------------------------------------------------------------------------


def test_gradients_of_the_paper_and_of_the_repository_by_hand():
    paper = slopes_of(dsac_t.Config())
    np.testing.assert_allclose(paper, [[[-2.490439, -0.1453846]], [[2.882436, -1.5103188]]], rtol=1e-5)
    repository = slopes_of(config_with(repository_loss=True))
    np.testing.assert_allclose(repository, [[[-2.451220, -0.1038462]], [[2.786298, -0.5266272]]], rtol=1e-4)


@pytest.mark.parametrize("repository", [False, True])
def test_loss_is_a_mean_over_the_batch_and_a_sum_over_critics(repository):
    config = config_with(repository_loss=repository)
    slopes = slopes_of(config)
    thrice = slopes_of(config, *(jnp.repeat(x, 3, 0) for x in (MEAN, STD)), [jnp.repeat(x, 3) for x in TARGETS])
    np.testing.assert_allclose(thrice, np.repeat(slopes, 3, axis=1) / 3, rtol=1e-4)
    alone = [slopes_of(config, MEAN[:, i : i + 1], STD[:, i : i + 1], TARGETS, RUNNING[i : i + 1]) for i in range(2)]
    np.testing.assert_allclose(np.concatenate(alone, axis=2), slopes, rtol=1e-4)


@pytest.mark.parametrize("repository", [False, True])
def test_bound_is_that_many_running_means_wide_and_leaves_the_mean_alone(repository):
    def slopes(width, error):
        targets = jnp.array([9.608]), jnp.array([8.0 + error])
        return slopes_of(config_with(repository_loss=repository, bound_width=width), targets=targets)[:, 0, 0]

    np.testing.assert_allclose(slopes(3.0, 100.0), slopes(3.0, 7.5), rtol=1e-6)
    np.testing.assert_allclose(slopes(3.0, -100.0), slopes(3.0, 7.5), rtol=1e-6)
    np.testing.assert_allclose(slopes(1.0, 100.0), slopes(9.0, 2.5), rtol=1e-6)
    assert slopes(3.0, 7.6)[1] == slopes(3.0, 7.5)[1] < slopes(3.0, 7.4)[1]
    assert slopes(3.0, 100.0)[0] == slopes(3.0, 0.1)[0]


@pytest.mark.parametrize("repository", [False, True])
def test_gradients_without_bias_grow_with_the_unit_of_reward(repository):
    config = config_with(repository_loss=repository, gradient_bias=0.0)
    scaled = slopes_of(config, 10 * MEAN, 10 * STD, [10 * target for target in TARGETS], 10 * RUNNING)
    np.testing.assert_allclose(scaled, 10 * slopes_of(config), rtol=1e-4)


def test_gradients_without_variance_scaling_shrink_with_the_unit_of_reward():
    config = config_with(variance_scaling=False, gradient_bias=0.0)
    scaled = slopes_of(config, 10 * MEAN, 10 * STD, [10 * target for target in TARGETS])
    np.testing.assert_allclose(scaled, slopes_of(config) / 10, rtol=1e-5)


def test_repository_loss_is_linear_in_large_errors_and_bounds_its_ratio():
    config = config_with(repository_loss=True)

    def slopes(error, std=2.0, running=2.5):
        mean, target = jnp.array([[0.0]]), jnp.array([error])
        return slopes_of(config, mean, jnp.array([[std]]), (target, target), jnp.array([running]))[:, 0, 0]

    ratio = 2.5**2 / 4.1
    np.testing.assert_allclose([slopes(e)[0] / ratio for e in (49.0, 51.0, 1e4, -1e4)], [-49, -50, -50, 50], rtol=1e-5)
    # std 40: an error of 60 is within the bound 120, and has the loss 50 (60 - 25).
    assert slopes(60.0, std=40.0, running=40.0)[1] == pytest.approx(1600 / 1600.1 * (1600 - 1750) / 40.1, rel=1e-4)
    assert slopes(1.0, std=0.2, running=9.0)[0] == pytest.approx(-10)  # 81 / .14
    assert slopes(1.0, std=9.0, running=0.5)[0] == pytest.approx(-0.1)  # .25 / 81.1


def test_repository_loss_settles_at_a_smaller_std():
    # Targets at q - 2 and q + 2: the likelihood is stationary at their deviation 2, the repository's loss at sqrt(2).
    targets, mean = jnp.array([3.0, 7.0]), jnp.full((2, 1), 5.0)
    for repository, settled in ((False, 2.0), (True, np.sqrt(2))):
        config = config_with(repository_loss=repository, bound_width=100.0)
        slope = [
            slopes_of(config, mean, jnp.full((2, 1), std), (targets, targets), jnp.array([2.0]))[1].sum()
            for std in (settled - 0.05, settled, settled + 0.05)
        ]
        assert slope[0] < 0 < slope[2]
        assert slope[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("repository", [False, True])
def test_gradients_reach_neither_the_other_critic_nor_the_running_mean(repository):
    config = config_with(repository_loss=repository, running_rate=0.5)

    def loss(mean, std):
        return dsac_t.critic_loss(config, mean, std, TARGETS, dsac_t.running_average(config, 2 * RUNNING - STD[0], std))

    # This running mean has the value RUNNING, so it must not matter where it comes from.
    np.testing.assert_allclose(jax.grad(loss, argnums=(0, 1))(MEAN, STD), slopes_of(config), rtol=1e-5)
    changed = slopes_of(config, MEAN.at[:, 1].add(3), STD.at[:, 1].add(3), TARGETS, RUNNING.at[1].add(3))
    np.testing.assert_array_equal(changed[..., 0], slopes_of(config)[..., 0])
    assert (changed[..., 1] != slopes_of(config)[..., 1]).all()


def test_paper_loss_sends_no_gradient_into_its_targets():
    def loss(mean, std, next_mean, next_sample, log_density, temperature, reward):
        batch, config = by_hand.transition(reward=reward), dsac_t.Config()
        targets = dsac_t.target_returns(config, batch, next_mean, next_sample, log_density, temperature)
        return dsac_t.critic_loss(config, mean, std, targets, RUNNING)

    following = jnp.array([[10.0, 9.0]])
    inputs = MEAN, STD, following, following, jnp.array([-1.0]), jnp.float32(0.2), jnp.array([0.5])
    gradients = jax.grad(loss, argnums=range(7))(*inputs)
    assert all((gradient != 0).all() for gradient in gradients[:2])
    assert all((gradient == 0).all() for gradient in gradients[2:])


def test_actor_loss_takes_the_smallest_value_of_each_row():
    values, log_density = jnp.array([[3.0, 2.5], [1.0, 2.0]]), jnp.array([-1.5, 0.5])
    loss, gradient = jax.value_and_grad(dsac_t.actor_loss)(values, log_density, jnp.float32(0.2))
    assert loss == pytest.approx((-0.3 - 2.5 + 0.1 - 1) / 2)
    np.testing.assert_array_equal(gradient, [[0, -0.5], [-0.5, 0]])
    assert jax.grad(soft.temperature_loss)(jnp.log(0.2), jnp.array([-1.5, 0.5, -0.2]), -2.0) == pytest.approx(2.4)


# -- the refinements one by one ---------------------------------------------------------------------------------------


def test_without_expected_value_substitution_the_mean_follows_the_sample():
    assert example_targets(config_with(expected_value_substitution=False)) == pytest.approx([8.5685, 8.5685])
    substituted, sampled = (slopes_of(dsac_t.Config(), targets=(target, TARGETS[1])) for target in TARGETS)
    np.testing.assert_array_equal(substituted[1], sampled[1])
    assert sampled[0, 0, 0] == pytest.approx(-2.490439 * 0.5685 / 1.608, rel=1e-5)


def test_one_critic_counts_alone():
    config = config_with(num_critics=1)
    assert example_targets(config, (10.0,), (2.0,), (1.2,)) == pytest.approx([0.5 + 0.99 * 10.2, 0.5 + 0.99 * 12.6])


def test_without_variance_scaling_bound_and_scale_are_fixed():
    config = config_with(variance_scaling=False)
    scale = np.asarray(RUNNING) ** 2 + 0.1
    np.testing.assert_allclose(slopes_of(config) * scale, slopes_of(dsac_t.Config()), rtol=1e-5)
    np.testing.assert_array_equal(slopes_of(config, running=9 * RUNNING), slopes_of(config))
    narrow = slopes_of(config_with(variance_scaling=False, target_bound=0.5))
    np.testing.assert_array_equal(narrow[0], slopes_of(config)[0])
    assert narrow[1, 0, 0] == pytest.approx(-(0.25 - 4) / 8.1)


@pytest.mark.parametrize("bias", [0.0, 0.1])
def test_without_the_refinements_the_loss_is_that_of_dsac(bias):
    generator = np.random.default_rng(0)
    mean, target, std = generator.normal(0, 3, (3, 50)).astype(np.float32)
    std = 0.3 + np.abs(std)
    settings = {"target_bound": 2.0, "gradient_bias": bias}
    one = jax.value_and_grad(dsac.critic_loss, argnums=(1, 2))
    expected = one(dataclasses.replace(dsac.Config(), **settings), *map(jnp.asarray, (mean, std, target)))
    config = config_with(**WITHOUT, **settings)
    targets = dsac_t.target_returns(
        config, by_hand.transition(reward=np.zeros(50)), jnp.zeros((50, 1)), jnp.asarray(target)[:, None] / 0.99,
        jnp.zeros(50), jnp.float32(1),
    )  # fmt: skip
    other = jax.value_and_grad(dsac_t.critic_loss, argnums=(1, 2))
    loss, slopes = other(config, jnp.asarray(mean)[:, None], jnp.asarray(std)[:, None], targets, jnp.array([5.0]))
    assert loss == pytest.approx(float(expected[0]), rel=1e-5)
    np.testing.assert_allclose(np.array(slopes)[..., 0], expected[1], rtol=1e-4, atol=1e-6)
    assert 0 < (np.abs(target - mean) > 2).mean() < 1


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_authors_code():
    config = dsac_t.Config()
    assert config.actor_hidden == config.critic_hidden == (256, 256, 256)
    assert config.critic_learning_rate == config.actor_learning_rate == 1e-4
    assert (config.temperature_learning_rate, config.target_entropy_per_action) == (3e-4, -1.0)
    assert config.initial_temperature == pytest.approx(np.e, rel=1e-3)
    assert (config.discount, config.polyak, config.running_rate, config.policy_delay) == (0.99, 0.005, 0.005, 2)
    assert (config.bound_width, config.gradient_bias) == (3.0, 0.1)
    assert (config.batch_size, config.replay_capacity, config.warmup_steps) == (256, 1_000_000, 10_000)
    assert (config.expected_value_substitution, config.num_critics, config.variance_scaling) == (True, 2, True)
    assert not config.repository_loss
    assert config.num_envs * config.steps_per_iteration / config.updates_per_iteration == 20
    for preset in dsac_t.PRESETS.values():
        check_configuration(config_with(**preset))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repository_loss": True, "variance_scaling": False}, r"--repository-loss is True; it needs --variance-scal"),
        ({"updates_per_iteration": 3}, r"--updates-per-iteration is 3; it must be a multiple of --policy-delay = 2"),
        ({"risk": "sharpe:1"}, r"--risk is 'sharpe:1'; it must be neutral, cvar:LEVEL"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        by_hand.agent_on(dsac_t, by_hand.Drift(), **settings)


def test_log_std_of_the_actor_is_cut():
    layers = {"kernel_0": jnp.ones((1, 1, 2)), "bias_0": jnp.zeros((1, 2))}
    observation = jnp.array([[-30.0], [-4.0], [0.2], [9.0]])
    actor = soft.Actor((), 1, log_std_bounds=(-20, 0.5))
    mean, log_std = actor.apply({"params": {"mlp": {"layers": layers}}}, observation)
    np.testing.assert_array_equal(mean, observation)
    np.testing.assert_allclose(log_std[:, 0], [-20, -4, 0.2, 0.5])


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_moments(net: dict, observation: np.ndarray, action: np.ndarray) -> tuple:
    """Each critic's activations; then means, standard deviations and their slopes in the raw ones, by critic."""
    inputs = np.concatenate([observation, action], axis=1)
    tapes = [forward(net, member, inputs) for member in range(len(net["bias_0"]))]
    mean, raw = np.array([tape[-1] for tape in tapes]).transpose(2, 0, 1)
    return tapes, mean, np.log1p(np.exp(raw)), 1 / (1 + np.exp(-raw))


def slow_slopes(config, error, bounded, std, running) -> tuple[float, float]:
    """Slopes of one critic's loss in mean and deviation, at one transition."""
    bias = config.gradient_bias
    if config.repository_loss:
        ratio = max(0.1, min(10, running**2 / (std**2 + bias)))
        huber = 0.5 * bounded**2 if abs(bounded) < 50 else 50 * (abs(bounded) - 25)
        return -ratio * max(-50, min(50, error)), ratio * (std**2 - huber) / (std + bias)
    scale = running**2 + bias if config.variance_scaling else 1.0
    return -scale * error / (std**2 + bias), -scale * (bounded**2 - std**2) / (std**3 + bias)


def slow_updates(learner: dsac_t.Learner, batches: list, noises: dict, config: dsac_t.Config) -> dict:
    """Critic updates on every batch; then actor, temperature and all targets, once; all gradients by hand."""
    actor, critic, target_actor, target_critic = map(by_hand.network, learner[:4])
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    temperature_adam = by_hand.Adam(learner.log_temperature.optimizer, None)
    temperature = np.exp(np.float64(learner.log_temperature.parameters))
    running = [float(m) for m in learner.running_std]
    members, clipped, cut, target_means, losses = range(config.num_critics), [], [], [], []

    for batch, action_noise, noise in zip(batches, noises["next_action"], noises["next_return"], strict=True):
        size, observations = batch["observation"].shape
        following = soft_sample(forward(target_actor, 0, batch["next_observation"])[-1], action_noise)
        _, next_mean, next_std, _ = slow_moments(target_critic, batch["next_observation"], following["action"])
        tapes, mean, std, std_slope = slow_moments(critic, batch["observation"], batch["action"])
        for n in members:
            now = std[n].mean()
            running[n] = now if running[n] == 0 else (1 - config.running_rate) * running[n] + config.running_rate * now
        slope, gradient = np.zeros((config.num_critics, size, 2)), by_hand.zeros_like(critic)
        for b in range(size):
            chosen = min(members, key=lambda n: next_mean[n, b])
            sample = next_mean[chosen, b] + next_std[chosen, b] * max(-3, min(3, noise[b, chosen]))
            discount = config.discount * (1 - batch["terminated"][b])
            mean_target, std_target = (
                batch["reward"][b] + discount * (value - temperature * following["log_density"][b])
                for value in (next_mean[chosen, b], sample)
            )
            if not config.expected_value_substitution:
                mean_target = std_target
            target_means.append(mean_target)
            cut.append(abs(noise[b, chosen]) > 3.1 and discount > 0)
            for n in members:
                bound = config.bound_width * running[n] if config.variance_scaling else config.target_bound
                error = std_target - mean[n, b]
                bounded = max(-bound, min(bound, error))
                slope[n, b] = slow_slopes(config, mean_target - mean[n, b], bounded, std[n, b], running[n])
                slope[n, b] *= [1 / size, std_slope[n, b] / size]
                clipped.append(bounded != error)
                losses.append(0.5 * np.log(2 * np.pi) + np.log(std[n, b]) + 0.5 * (error / std[n, b]) ** 2)
        for n in members:
            backward(critic, n, tapes[n], slope[n], gradient)
        critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    # The actor, on the last batch and the critics just updated.
    activations = forward(actor, 0, batch["observation"])
    sample = soft_sample(activations[-1], noises["action"])
    tapes, mean, std, std_slope = slow_moments(critic, batch["observation"], sample["action"])
    weight = STD_WEIGHTS[config.risk]
    values, action_slope = mean + weight * std, np.zeros_like(sample["action"])
    for n in members:
        slope = np.stack([np.ones(size), weight * std_slope[n]], axis=1) * (values.argmin(0) == n)[:, None] / -size
        action_slope += backward(critic, n, tapes[n], slope)[:, observations:]
    gradient = by_hand.zeros_like(actor)
    backward(actor, 0, activations, by_hand.soft_actor_slope(sample, action_slope, temperature), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)

    target_entropy = config.target_entropy_per_action * sample["action"].shape[1]
    slope = {"value": -(sample["log_density"] + target_entropy).mean()}
    log_temperature = temperature_adam.step(
        {"value": np.float64(learner.log_temperature.parameters)}, slope, config.temperature_learning_rate
    )["value"]
    return {
        "actor": actor, "critic": critic, "target_actor": by_hand.moved(target_actor, actor, config.polyak),
        "target_critic": by_hand.moved(target_critic, critic, config.polyak), "log_temperature": log_temperature,
        "running_std": running, "adams": (actor_adam, critic_adam, temperature_adam), "free": sample["free"],
        "clipped": np.mean(clipped), "cut": any(cut), "smallest": values.argmin(0),
        "metrics": {
            "target": np.mean(target_means), "critic_loss": np.mean(losses), "temperature": temperature,
            "actor_loss": (temperature * sample["log_density"] - values.min(0)).mean(),
            "entropy": -sample["log_density"].mean(),
        },
    }  # fmt: skip


def noises_of(key: jax.Array, config: dsac_t.Config) -> tuple[jax.Array, dict]:
    """Key of the batches and normal draws, the keys as `step` splits them: one environment step, one round."""
    _, sample_key, critic_key, action_key = jax.random.split(jax.random.split(key, 3)[0], 4)
    keys = [jax.random.split(jax.random.fold_in(critic_key, turn)) for turn in range(config.policy_delay)]
    size = config.batch_size
    return sample_key, {
        "next_action": jnp.stack([jax.random.normal(k[0], (size, 2)) for k in keys]),
        "next_return": jnp.stack([jax.random.normal(k[1], (size, config.num_critics)) for k in keys]),
        "action": jax.random.normal(action_key, (size, 2)),
    }


VARIANTS = {
    "paper": {"num_critics": 3, "bound_width": 0.7, "normalize_observations": True},
    "repository": {"repository_loss": True, "bound_width": 0.7, "risk": "cvar:0.25"},
    "none": WITHOUT | {"target_bound": 1.5},
}


@pytest.fixture(scope="module", params=VARIANTS)
def started(request):
    """An agent, its configuration, and its first state."""
    settings = by_hand.TINY | {
        "num_envs": 2, "steps_per_iteration": 1, "updates_per_iteration": 2, "policy_delay": 2, "running_rate": 0.2,
        "initial_temperature": 0.7, "temperature_learning_rate": 7e-3, "target_entropy_per_action": -0.6,
        "gradient_bias": 0.05,
    }  # fmt: skip
    agent, config = by_hand.agent_on(dsac_t, by_hand.Drift(), **settings, **VARIANTS[request.param])
    state = by_hand.quick(agent.init)(jax.random.key(3))
    # The first log deviation lies around its upper bound, so that the cut takes part.
    layers = dict(state.learner.actor.parameters["params"]["mlp"]["layers"])
    layers["bias_2"] = layers["bias_2"].at[..., 2].set(0.5)
    actor = {"params": {"mlp": {"layers": layers}}}
    # Critics of the same average output, so that none of them is the smallest everywhere.
    rows, layers = state.experience.replay.rows, dict(state.learner.critic.parameters["params"]["mlp"])
    tapes, *_ = slow_moments(
        by_hand.network(state.learner.critic.parameters), *map(np.asarray, (rows.observation, rows.action))
    )
    layers["bias_2"] = layers["bias_2"] - jnp.array([tape[-1][:24].mean(0) for tape in tapes], jnp.float32)
    critic = {"params": {"mlp": layers}}
    learner = by_hand.changed(state.learner, actor=actor, target_actor=actor, critic=critic, target_critic=critic)
    return agent, config, state._replace(learner=learner)


def test_updates_equal_loops_in_numpy(started):
    agent, config, state = started
    np.testing.assert_array_equal(state.learner.running_std, np.zeros(config.num_critics))
    # Keys with many draws that are cut at 3 standard deviations: not every critic's draw is used.
    cut = jax.vmap(lambda seed: (jnp.abs(noises_of(jax.random.key(seed), config)[1]["next_return"]) > 3.1).sum())
    step, found = by_hand.quick(agent.step), []
    for seed in np.argsort(-jax.jit(cut)(jnp.arange(4000)))[:6]:
        state = by_hand.with_fresh_keys(state)._replace(key=jax.random.key(int(seed)))
        sample_key, noises = noises_of(jax.random.key(int(seed)), config)
        noises = {name: np.asarray(value, np.float64) for name, value in noises.items()}
        before, (state, metrics) = state.learner, step(state)
        rows = by_hand.stored_rows(state, sample_key, 2 * config.batch_size)
        batches = [{name: np.split(value, 2)[i] for name, value in rows.items()} for i in range(2)]
        expected = slow_updates(before, batches, noises, config)
        for name in ("actor", "critic", "target_actor", "target_critic"):
            by_hand.assert_network_is(getattr(state.learner, name), expected[name])
        assert state.learner.log_temperature.parameters == pytest.approx(expected["log_temperature"], abs=1e-5)
        np.testing.assert_allclose(state.learner.running_std, expected["running_std"], rtol=1e-4)
        for name, value in expected["metrics"].items():
            assert metrics[name].total / metrics[name].count == pytest.approx(value, rel=1e-4, abs=1e-5), name
        optimizers = (getattr(state.learner, name).optimizer for name in ("actor", "critic", "log_temperature"))
        for optimizer, adam, name in zip(optimizers, expected["adams"], ("mlp", "mlp", None), strict=True):
            by_hand.assert_adam_is(optimizer, adam, name)
        found.append(expected)
    assert [adam.time for adam in expected["adams"]] == [6, 12, 6]
    assert any(one["cut"] for one in found)
    assert 0 < np.mean([one["clipped"] for one in found]) < 1
    assert 0 < np.mean([one["free"] for one in found]) < 1
    assert len(np.unique([one["smallest"] for one in found])) > 1 or config.num_critics == 1
    assert state.experience.replay.rows.terminated.any()


def test_prediction_is_the_critic_with_the_smallest_mean(started):
    agent, config, state = started
    state = state._replace(experience=state.experience._replace(normalizer=None))
    observation = 3 * np.random.default_rng(0).normal(size=(40, 3))
    action = np.random.default_rng(1).uniform(-1, 1, (40, 2))
    atoms, masses = by_hand.quick(agent.claim.law)(state, *(jnp.asarray(x, jnp.float32) for x in (observation, action)))
    _, mean, std, _ = slow_moments(by_hand.network(state.learner.critic.parameters), observation, action)
    smallest = mean.argmin(0)
    assert len(np.unique(smallest)) > 1 or config.num_critics == 1
    standard = scipy.stats.norm.ppf((np.arange(51) + 0.5) / 51)
    for b, n in enumerate(smallest):
        np.testing.assert_allclose(atoms[b], mean[n, b] + std[n, b] * standard, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(masses, np.full((40, 51), 1 / 51), rtol=1e-6)

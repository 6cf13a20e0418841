"""TQC's equations by the spec's hand-worked numbers, and a whole update against loops in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.algorithms.actor_critic import tqc
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.learning import soft

NEXT_ATOMS = jnp.array([[[1.0, 5, 3], [4, 8, 6]]])
ATOMS = jnp.array([[[0.0, 2, 4], [1, 3, 5]]])
TARGET = jnp.array([[2.17, 3.97, 4.87, 5.77]])


def config_with(**values) -> tqc.Config:
    return dataclasses.replace(tqc.Config(), **values)


SMALL = config_with(discount=0.9, num_critics=2, num_quantiles=3, quantiles_dropped=1)


def example_target(config=SMALL, next_atoms=NEXT_ATOMS, log_density=-1.5, temperature=0.2, reward=1.0, **flags):
    flags = {name: [value] for name, value in flags.items()}
    batch = by_hand.transition(reward=[reward], discount=config.discount, **flags)
    return tqc.target_atoms(config, batch, next_atoms, jnp.array([log_density]), jnp.float32(temperature))


# -- targets ----------------------------------------------------------------------------------------------------------


def test_target_by_hand():
    # Pooled and sorted: 1 3 4 5 | 6 8. Truncating each critic alone would keep 1 3 4 6.
    no_entropy = example_target(config_with(discount=1.0, quantiles_dropped=1), temperature=0.0, reward=0.0)
    np.testing.assert_array_equal(no_entropy, [[1, 3, 4, 5]])
    np.testing.assert_allclose(example_target(), TARGET, rtol=1e-6)


def test_termination_masks_values_and_entropy_but_truncation_masks_nothing():
    np.testing.assert_array_equal(example_target(terminated=True), np.ones((1, 4)))
    np.testing.assert_array_equal(example_target(terminated=True, truncated=True), np.ones((1, 4)))
    np.testing.assert_allclose(example_target(truncated=True), TARGET, rtol=1e-6)


@pytest.mark.parametrize(("dropped", "mean"), [(0, 0.50), (1, 0.48), (2, 0.46), (3, 0.44), (5, 0.40), (10, 0.30)])
def test_dropping_atoms_of_a_uniform_distribution(dropped, mean):
    config = config_with(discount=1.0, quantiles_dropped=dropped)
    atoms = jnp.broadcast_to((jnp.arange(25) + 0.5) / 25, (1, 5, 25))
    target = example_target(config, atoms, temperature=0.0, reward=0.0)
    assert target.shape == (1, 5 * (25 - dropped))
    assert target.mean() == pytest.approx(mean, abs=1e-6)


atom_lists = st.lists(st.floats(-100, 100, width=32), min_size=12, max_size=12)


@settings(max_examples=50, deadline=None)
@given(values=atom_lists, order=st.permutations(range(12)), shift=st.floats(-50, 50, width=32))
def test_target_ignores_the_order_of_critics_and_atoms_and_moves_with_them(values, order, shift):
    config = config_with(discount=0.9, num_critics=3, num_quantiles=4, quantiles_dropped=1)
    values = np.array(values, np.float32)
    target = example_target(config, jnp.array(values).reshape(1, 3, 4))
    np.testing.assert_array_equal(example_target(config, jnp.array(values[list(order)]).reshape(1, 3, 4)), target)
    shifted = example_target(config, jnp.array(values + np.float32(shift)).reshape(1, 3, 4))
    np.testing.assert_allclose(shifted, target + 0.9 * shift, rtol=1e-5, atol=1e-4)


def test_one_critic_without_truncation_is_a_soft_quantile_regression_target():
    config = config_with(discount=0.9, num_critics=1, num_quantiles=3, quantiles_dropped=0)
    target = example_target(config, jnp.array([[[5.0, -1, 2]]]))
    np.testing.assert_allclose(target, [[1 + 0.9 * (z + 0.3) for z in (-1, 2, 5)]], rtol=1e-6)


# -- losses -----------------------------------------------------------------------------------------------------------


def test_critic_loss_and_gradient_by_hand():
    loss, gradient = jax.value_and_grad(tqc.critic_loss, argnums=1)(SMALL, ATOMS, TARGET)
    assert loss == pytest.approx(0.5154267361, abs=1e-6)
    expected = [[-0.0277777777, -0.0660416667, -0.0577777778], [-0.0277777777, -0.0445833333, -0.0119444444]]
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)


def test_critic_loss_of_two_quantiles_by_hand():
    config, target = config_with(num_quantiles=2), jnp.array([[0.5, 2.5]])
    loss, gradient = jax.value_and_grad(tqc.critic_loss, argnums=1)(config, jnp.array([[[0.0, 1.0]]]), target)
    assert loss == pytest.approx(0.328125)
    np.testing.assert_allclose(gradient, [[[-0.09375, -0.15625]]], rtol=1e-6)


def test_critic_loss_is_a_mean_over_every_axis():
    # Repeating the batch, the critics or the target atoms changes a sum but no mean.
    loss = tqc.critic_loss(SMALL, ATOMS, TARGET)
    for atoms, target in (
        (jnp.repeat(ATOMS, 3, 0), jnp.repeat(TARGET, 3, 0)),
        (jnp.repeat(ATOMS, 3, 1), TARGET),
        (ATOMS, jnp.repeat(TARGET, 3, 1)),
    ):
        assert tqc.critic_loss(SMALL, atoms, target) == pytest.approx(float(loss), rel=1e-6)


def test_gradient_of_one_critic_does_not_depend_on_the_others():
    slope = jax.grad(tqc.critic_loss, argnums=1)
    changed = slope(SMALL, ATOMS.at[:, 1].add(7.0), TARGET)
    np.testing.assert_array_equal(changed[:, 0], slope(SMALL, ATOMS, TARGET)[:, 0])
    assert (changed[:, 1] != slope(SMALL, ATOMS, TARGET)[:, 1]).any()


def test_one_quantile_is_half_a_huber_loss():
    values, target = np.array([[0.3, -2.0], [4.0, 1.0]]), np.array([1.0, 2.5])
    config = config_with(num_critics=2, num_quantiles=1, quantiles_dropped=0)
    error = np.abs(target[:, None] - values)
    huber = np.where(error <= 1, 0.5 * error**2, error - 0.5)
    loss = tqc.critic_loss(config, jnp.array(values)[..., None], jnp.array(target)[:, None])
    assert loss == pytest.approx(0.5 * huber.mean(), rel=1e-6)


def test_critic_loss_sends_no_gradient_into_its_target():
    def loss(atoms, next_atoms, log_density, temperature, reward):
        batch = by_hand.transition(reward=reward)
        return tqc.critic_loss(SMALL, atoms, tqc.target_atoms(SMALL, batch, next_atoms, log_density, temperature))

    inputs = ATOMS, NEXT_ATOMS, jnp.array([-1.5]), jnp.float32(0.2), jnp.array([1.0])
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*inputs)
    assert (gradients[0] != 0).all()
    assert all((gradient == 0).all() for gradient in gradients[1:])


def test_actor_loss_takes_all_atoms():
    # The truncated mean would be 3.25.
    assert tqc.actor_loss(risks.NEUTRAL, NEXT_ATOMS, jnp.array([-1.5]), jnp.float32(0)) == pytest.approx(-4.5)
    assert tqc.actor_loss(risks.NEUTRAL, NEXT_ATOMS, jnp.array([-1.5]), jnp.float32(0.2)) == pytest.approx(-4.8)
    gradient = jax.grad(tqc.actor_loss, argnums=1)(risks.NEUTRAL, NEXT_ATOMS, jnp.array([-1.5]), jnp.float32(0.2))
    np.testing.assert_allclose(gradient, np.full((1, 2, 3), -1 / 6), rtol=1e-6)


def test_averse_actor_climbs_the_smallest_of_all_atoms():
    # Half of the six atoms 1, 3, 4, 5, 6, 8 are the worst half: 1, 3 and 4, of both critics.
    risk = risks.parse("cvar:0.5")
    value, gradient = jax.value_and_grad(tqc.actor_loss, argnums=1)(risk, NEXT_ATOMS, jnp.zeros(1), jnp.float32(0.2))
    assert value == pytest.approx(-8 / 3)
    np.testing.assert_allclose(gradient, [[[-1 / 3, 0, -1 / 3], [-1 / 3, 0, 0]]], atol=1e-6)


def test_temperature_loss_by_hand():
    log_density = jnp.array([-1.5, 0.5, -0.2])
    loss, gradients = jax.value_and_grad(soft.temperature_loss, argnums=(0, 1))(jnp.log(0.2), log_density, -2.0)
    assert loss == pytest.approx(-3.86265099, rel=1e-6)
    assert gradients[0] == pytest.approx(2.4, rel=1e-6)
    np.testing.assert_array_equal(gradients[1], np.zeros(3))


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers():
    config = tqc.Config()
    assert (config.num_critics, config.num_quantiles, config.kappa, config.batch_size) == (5, 25, 1.0, 256)
    assert (config.critic_hidden, config.actor_hidden) == ((512, 512, 512), (256, 256))
    assert (config.discount, config.polyak, config.replay_capacity) == (0.99, 0.005, 1_000_000)
    assert config.actor_learning_rate == config.critic_learning_rate == config.temperature_learning_rate == 3e-4
    assert (config.initial_temperature, config.target_entropy_per_action) == (1.0, -1.0)
    assert config.updates_per_iteration == config.num_envs * config.steps_per_iteration


def test_presets_hold_the_papers_dropped_quantiles():
    dropped = {"hopper": 5, "halfcheetah": 0, "walker2d": 2, "ant": 2, "humanoid": 2}
    assert {name: tqc.PRESETS[f"brax/{name}"]["quantiles_dropped"] for name in dropped} == dropped
    for preset in tqc.PRESETS.values():
        check_configuration(config_with(**preset))


def test_dropping_every_quantile_is_refused():
    with pytest.raises(ValueError, match=r"--quantiles-dropped is 3; it must be below --num-quantiles = 3"):
        by_hand.agent_on(tqc, by_hand.Drift(), num_quantiles=3, quantiles_dropped=3)


# -- a whole update against loops in numpy ----------------------------------------------------------------------------


def slow_update(learner: tqc.Learner, batch: dict, next_noise, noise, config: tqc.Config) -> dict:
    """One update as the paper writes it, all gradients by hand: critic, then actor, then temperature, then target."""
    actor, critic, target_critic = map(
        by_hand.network, (learner.actor.parameters, learner.critic.parameters, learner.target_critic)
    )
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    temperature_adam = by_hand.Adam(learner.log_temperature.optimizer, None)
    temperature = np.exp(np.float64(learner.log_temperature.parameters))
    members, quantiles = config.num_critics, config.num_quantiles
    size, kept = len(batch["reward"]), (quantiles - config.quantiles_dropped) * members

    def atoms_of(net, observation, action):
        inputs = np.concatenate([observation, action], axis=1)
        return [by_hand.forward(net, member, inputs) for member in range(members)]

    # The target: a' from the online actor, values from the target critics.
    following = by_hand.soft_sample(by_hand.forward(actor, 0, batch["next_observation"])[-1], next_noise)
    next_atoms = atoms_of(target_critic, batch["next_observation"], following["action"])
    target = np.zeros((size, kept))
    for b in range(size):
        pool = sorted(float(atom) for member in range(members) for atom in next_atoms[member][-1][b])
        for k in range(kept):
            soft = pool[k] - temperature * following["log_density"][b]
            target[b, k] = batch["reward"][b] + config.discount * (1 - batch["terminated"][b]) * soft

    # The critics.
    atoms, gradient, loss = atoms_of(critic, batch["observation"], batch["action"]), by_hand.zeros_like(critic), 0.0
    for n in range(members):
        slope = np.zeros((size, quantiles))
        for b in range(size):
            for m in range(quantiles):
                for k in range(kept):
                    error = target[b, k] - atoms[n][-1][b, m]
                    weight = abs((2 * m + 1) / (2 * quantiles) - (error < 0))
                    small = abs(error) <= config.kappa
                    huber = 0.5 * error**2 if small else config.kappa * (abs(error) - 0.5 * config.kappa)
                    loss += weight * huber / config.kappa / (size * members * quantiles * kept)
                    huber_slope = error if small else config.kappa * np.sign(error)
                    slope[b, m] -= weight * huber_slope / config.kappa / (size * members * quantiles * kept)
        by_hand.backward(critic, n, atoms[n], slope, gradient)
    critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    # The actor, on the critics just updated and all of their atoms.
    activations = by_hand.forward(actor, 0, batch["observation"])
    sample = by_hand.soft_sample(activations[-1], noise)
    action_slope = np.zeros_like(sample["action"])
    for n, member in enumerate(atoms_of(critic, batch["observation"], sample["action"])):
        slope = np.full((size, quantiles), -1 / (size * members * quantiles))
        action_slope += by_hand.backward(critic, n, member, slope)[:, batch["observation"].shape[1] :]
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


@pytest.mark.parametrize("normalize", [False, True])
def test_update_equals_loops_in_numpy(normalize):
    agent, config = by_hand.agent_on(
        tqc, by_hand.Drift(), **by_hand.TINY, num_critics=3, num_quantiles=4, quantiles_dropped=1, kappa=0.3,
        initial_temperature=0.7, temperature_learning_rate=7e-3, target_entropy_per_action=-0.6, num_envs=2,
        normalize_observations=normalize,
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
        assert metrics["target"].total == pytest.approx(expected["target"].mean(), rel=1e-4)
        optimizers = after.actor.optimizer, after.critic.optimizer, after.log_temperature.optimizer
        for optimizer, adam, name in zip(optimizers, expected["adams"], ("mlp", "mlp", None), strict=True):
            assert adam.time == iteration + 1
            by_hand.assert_adam_is(optimizer, adam, name)
    rows = state.experience.replay.rows
    assert rows.terminated.any()
    assert (rows.truncated & ~rows.terminated).any()

"""Actor, temperature and policies of soft actor-critics."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist.learning import normalization, policies, portable, soft
from jaxrl_dist.learning.optimization import begin


def test_the_temperature_falls_where_the_policy_is_random_enough():
    """The entropy is 0.4: above the target -2, log alpha falls by the rate times 2.4; below 1 it rises."""
    log_density = jnp.array([0.2, -1.0])
    assert soft.temperature_loss(jnp.float32(0.5), log_density, -2.0) == pytest.approx(0.5 * 2.4)
    rate = optax.sgd(0.1)
    steered = soft.steer(rate, begin(rate, jnp.float32(0.5)), log_density, -2.0)
    assert steered.parameters == pytest.approx(0.5 - 0.1 * 2.4)
    steered = soft.steer(rate, begin(rate, jnp.float32(0.5)), log_density, 1.0)
    assert steered.parameters == pytest.approx(0.5 + 0.1 * 0.6)


def test_the_policy_does_not_feel_the_temperature_s_loss():
    slope = jax.grad(lambda log_density: soft.temperature_loss(jnp.float32(0.5), log_density, -2.0))(jnp.zeros(2))
    np.testing.assert_array_equal(slope, np.zeros(2))


def test_the_temperature_starts_where_the_settings_say():
    log_alpha = soft.log_temperature(types.SimpleNamespace(initial_temperature=0.2))
    assert log_alpha.dtype == jnp.float32
    assert log_alpha == pytest.approx(np.log(0.2))


def state_of(actor, log_temperature=-1.0):
    """A state that has seen observations around (1, 2, 3)."""
    parameters = actor.init(jax.random.key(0), jnp.zeros((1, 3)))
    seen = jnp.array([1.0, 2, 3]) + jax.random.normal(jax.random.key(1), (50, 3))
    learner = types.SimpleNamespace(
        actor=types.SimpleNamespace(parameters=parameters),
        log_temperature=types.SimpleNamespace(parameters=jnp.float32(log_temperature)),
    )
    normalizer = normalization.update(normalization.create((3,)), seen)
    return types.SimpleNamespace(learner=learner, experience=types.SimpleNamespace(normalizer=normalizer))


OBSERVATION = jnp.array([1.0, 2, 3]) + jax.random.normal(jax.random.key(2), (9, 3))


def test_the_deviation_is_bounded():
    actor = soft.Actor((8,), 2)
    parameters = jax.tree.map(lambda x: 1e4 * x, actor.init(jax.random.key(0), jnp.zeros((1, 3))))
    _, log_std = actor.apply(parameters, OBSERVATION)
    assert (log_std.min(), log_std.max()) == (-20, 2)


def test_acts_by_the_mode_and_follows_what_it_draws():
    actor = soft.Actor((8, 8), 2)
    policy, state = soft.policy_of(actor), state_of(actor)
    mean, log_std = actor.apply(
        state.learner.actor.parameters, normalization.normalize(state.experience.normalizer, OBSERVATION)
    )
    np.testing.assert_array_equal(policy.act(state, OBSERVATION, jax.random.key(0)), jnp.tanh(mean))
    action, bonus = policy.follow(state, OBSERVATION, jax.random.key(0))
    assert np.abs(action - jnp.tanh(mean)).max() > 0.05
    log_density = policies.squashed_gaussian_log_density(jnp.arctanh(action), mean, log_std)
    np.testing.assert_allclose(bonus, -np.exp(-1.0) * log_density, rtol=2e-3, atol=2e-3)


def test_the_bonus_is_in_the_units_of_the_environment():
    actor = soft.Actor((8, 8), 2)
    state = state_of(actor)
    action, bonus = soft.policy_of(actor).follow(state, OBSERVATION, jax.random.key(0))
    same, scaled = soft.policy_of(actor, 0.25).follow(state, OBSERVATION, jax.random.key(0))
    np.testing.assert_array_equal(action, same)
    np.testing.assert_allclose(scaled, 4 * bonus, rtol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_exported_policy_acts_alike(activation, tmp_path):
    actor = soft.Actor((8, 8), 2, activation)
    policy, state = soft.policy_of(actor), state_of(actor)
    portable.save_policy(tmp_path / "policy.npz", policy.export(state), np.full(2, -3.0), np.full(2, 5.0))
    action = portable.load_policy(tmp_path / "policy.npz")(np.asarray(OBSERVATION))
    expected = 1 + 4 * np.asarray(policy.act(state, OBSERVATION, jax.random.key(0)))
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)

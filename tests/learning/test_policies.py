import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_dist.learning import policies


def test_hand_worked_log_density():
    # Reference numbers of SAC's and TQC's specifications: mean (.5, -1), log std (-.5, 0), noise (.3, -2).
    mean, log_std = jnp.array([0.5, -1.0]), jnp.array([-0.5, 0.0])
    pre_tanh = mean + jnp.exp(log_std) * jnp.array([0.3, -2.0])
    np.testing.assert_allclose(policies.squashed_mode(pre_tanh), [0.59279160, -0.99505475], rtol=1e-6)
    log_density = policies.squashed_gaussian_log_density(pre_tanh, mean, log_std)
    assert float(log_density) == pytest.approx(1.66872193, rel=1e-6)


def test_tails_keep_full_precision_in_float32():
    # log(1 - tanh(x)^2 + 1e-6) would give 12.90 here.
    log_density = policies.squashed_gaussian_log_density(jnp.array([12.0]), jnp.array([12.0]), jnp.array([0.0]))
    assert log_density.dtype == jnp.float32
    assert float(log_density) == pytest.approx(21.69477, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0, [0.5, 3.0]])
def test_density_integrates_to_one_over_the_actions(scale):
    # On a grid of cells that is uniform in the action: the integral over the open box (-scale, scale)^2.
    cells = 400
    scale = np.broadcast_to(np.asarray(scale, np.float32), 2)
    centres = (np.arange(cells) + 0.5) / cells * 2 - 1
    action = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2) * scale
    pre_tanh = np.arctanh(action / scale).astype(np.float32)
    mean, log_std = np.broadcast_to([0.3, -0.4], pre_tanh.shape), np.broadcast_to([-0.7, -0.5], pre_tanh.shape)
    log_density = policies.squashed_gaussian_log_density(
        jnp.asarray(pre_tanh), jnp.asarray(mean, jnp.float32), jnp.asarray(log_std, jnp.float32), scale
    )
    volume = np.prod(2 * scale / cells)
    assert float(np.exp(np.float64(log_density)).sum() * volume) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_agrees_with_the_change_of_variables_in_float64(scale):
    rng = np.random.default_rng(0)
    mean, log_std, pre_tanh = rng.normal(0, 1, (3, 50, 4))
    with_tanh = scipy.stats.norm.logpdf(pre_tanh, mean, np.exp(log_std)) - np.log(scale * (1 - np.tanh(pre_tanh) ** 2))
    log_density = policies.squashed_gaussian_log_density(
        *(jnp.asarray(x, jnp.float32) for x in (pre_tanh, mean, log_std)), scale
    )
    np.testing.assert_allclose(log_density, with_tanh.sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre_tanh", [-60.0, -30.0, -1e-3, 0.0, 30.0, 60.0])
def test_gradients_are_finite_and_right_in_the_tails(pre_tanh):
    # d log density / dx = -(x - mean) / std^2 + 2 tanh(x): the slope's own derivative does not vanish where it does.
    mean, log_std = jnp.array([1.0]), jnp.array([0.5])
    gradients = jax.grad(policies.squashed_gaussian_log_density, argnums=(0, 1, 2))(
        jnp.array([pre_tanh]), mean, log_std
    )
    variance, distance = np.exp(1.0), pre_tanh - 1.0
    expected = [-distance / variance + 2 * np.tanh(pre_tanh), distance / variance, distance**2 / variance - 1]
    np.testing.assert_allclose(np.ravel(gradients), expected, rtol=1e-5, atol=1e-6)


def test_samples_have_the_density_they_come_with():
    mean, log_std, scale = jnp.array([0.3, -1.0]), jnp.array([-0.5, 0.2]), jnp.array([1.0, 2.0])
    shape = (20_000, 2)
    action, log_density = policies.squashed_gaussian(
        jax.random.key(0), jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_std, shape), scale
    )
    assert action.shape == shape
    assert log_density.shape == shape[:1]
    pre_tanh = np.arctanh(np.float64(action / scale))
    for component in range(2):
        law = scipy.stats.norm(mean[component], np.exp(log_std[component]))
        assert scipy.stats.kstest(pre_tanh[:, component], law.cdf).pvalue > 0.01
    again = policies.squashed_gaussian_log_density(
        jnp.asarray(pre_tanh, jnp.float32), mean + 0 * action, log_std + 0 * action, scale
    )
    inside = np.abs(pre_tanh).max(-1) < 3  # further out, inverting the action loses the sample
    np.testing.assert_allclose(log_density[inside], again[inside], atol=1e-3)


def test_samples_are_reparameterised():
    def action(mean, log_std):
        return policies.squashed_gaussian(jax.random.key(1), mean, log_std, 2.0)[0].sum()

    mean, log_std = jnp.array([0.3]), jnp.array([-0.5])
    sample, (by_mean, by_log_std) = jax.value_and_grad(action, argnums=(0, 1))(mean, log_std)
    pre_tanh = np.arctanh(sample / 2)
    slope = 2 * (1 - np.tanh(pre_tanh) ** 2)
    np.testing.assert_allclose(by_mean, [slope], rtol=1e-4)
    np.testing.assert_allclose(by_log_std, slope * (pre_tanh - mean), rtol=1e-4)


def test_mode_is_within_the_scale():
    np.testing.assert_allclose(policies.squashed_mode(jnp.array([0.0, 100.0, -100.0]), 3.0), [0, 3, -3])


def test_rejects_shapes_that_would_broadcast():
    with pytest.raises(AssertionError):
        policies.squashed_gaussian_log_density(jnp.zeros((3, 2)), jnp.zeros((3, 2)), jnp.zeros(2))


# -- choices of actions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_frequencies(epsilon):
    values = jnp.broadcast_to(jnp.array([[1.0, 3.0, -2.0, 0.0], [0.0, 0.0, 0.0, 5.0]]), (40_000, 2, 4))
    actions = np.asarray(jax.jit(policies.epsilon_greedy)(jax.random.key(0), values, epsilon))
    assert actions.shape == (40_000, 2)
    assert actions.dtype == np.int32
    for column, best in enumerate((1, 3)):
        expected = np.full(4, epsilon / 4) + (1 - epsilon) * (np.arange(4) == best)
        frequencies = np.bincount(actions[:, column], minlength=4) / len(actions)
        np.testing.assert_allclose(frequencies, expected, atol=4 * np.sqrt(0.25 / len(actions)) if epsilon else 0)
    # Every row and environment decides for itself.
    if epsilon == 1:
        assert abs(np.corrcoef(actions.T)[0, 1]) < 0.02
        assert abs(np.corrcoef(actions[1:, 0], actions[:-1, 0])[0, 1]) < 0.02


def test_of_equal_values_the_first_is_taken():
    values = jnp.array([[2.0, 5.0, 5.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(policies.epsilon_greedy(jax.random.key(0), values, 0.0), [1, 0])


def test_whether_to_explore_and_what_to_do_are_independent():
    """One key for both draws would make some actions rare at small epsilon."""
    values = jnp.broadcast_to(jnp.array([1.0, 0, 0, 0, 0]), (200_000, 5))
    actions = np.asarray(policies.epsilon_greedy(jax.random.key(1), values, 0.1))
    np.testing.assert_allclose(np.bincount(actions, minlength=5)[1:] / len(actions), 0.02, atol=0.002)


def test_linear_schedule():
    times = jnp.array([0, 25, 50, 100, 101, 10_000])
    np.testing.assert_allclose(policies.linear_schedule(1.0, 0.2, 100, times), [1, 0.8, 0.6, 0.2, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(policies.linear_schedule(0.4, 1.0, 100, times), [0.4, 0.55, 0.7, 1, 1, 1], rtol=1e-6)
    assert jax.jit(policies.linear_schedule, static_argnums=2)(0.0, 0.0, 7, jnp.int32(3)) == 0


def test_entropy_of_a_choice_and_its_gradient():
    choice = policies.Choice(jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.9, 0.1, 1e-20]])))
    np.testing.assert_allclose(choice.entropy(), [1.5 * np.log(2), -0.9 * np.log(0.9) - 0.1 * np.log(0.1)], rtol=1e-6)
    gradient = jax.grad(lambda x: policies.Choice(x).entropy())(choice.logits[0])
    # dH / dx_i = -p_i (log p_i + H)
    np.testing.assert_allclose(gradient, [-0.5 * 0.5 * np.log(2), *[0.25 * 0.5 * np.log(2)] * 2], rtol=1e-5)
    for gap in (50.0, 90.0, 100.0, 104.0, 1e4):  # the exponent of the last three is 0, or nearly
        found = jax.grad(lambda x: policies.Choice(x).entropy())(jnp.array([0.0, -gap]))
        np.testing.assert_allclose(found, [0, 0], atol=1e-12)

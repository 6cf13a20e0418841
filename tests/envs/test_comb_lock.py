"""The combination lock by hand, its data set against what it must hold, and its exact laws against integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jaxrl_dist.envs import check_env, comb_lock
from jaxrl_dist.envs.comb_lock import CORRECT, CombLock

ENV = CombLock()
SAMPLES = 4_000


def key(seed=0):
    return jax.random.key(seed)


@pytest.fixture(scope="module")
def data():
    drawn = comb_lock.offline_data(ENV, key(), samples=SAMPLES, correct=CORRECT)
    return jax.tree.map(np.asarray, drawn)


def share_near(hits, expected):
    """Whether a share of successes is within five standard errors of its expectation."""
    return abs(np.mean(hits) - expected) <= 5 * np.sqrt(expected * (1 - expected) / np.size(hits))


# -- the environment --------------------------------------------------------------------------------------------------


def test_it_keeps_the_contract():
    assert check_env(ENV) == []


@pytest.mark.parametrize(
    ("actions", "latents"), [([0, 0, 0], [0, 0, 0, 0]), ([0, 1, 0], [0, 0, 1, 1]), ([1, 1, 0], [0, 1, 1, 1])]
)
def test_episodes_by_hand(actions, latents):
    env = CombLock(horizon=3, observation_size=9)
    params = env.default_params
    observation, state = env.reset(key(1), params)
    for time, action in enumerate(actions):
        np.testing.assert_array_equal(observation[:2], np.eye(2)[latents[time]])
        np.testing.assert_array_equal(observation[2:5], np.eye(3)[time])
        assert 0 < np.abs(observation[5:]).max() < 0.6
        observation, state, reward, terminated, truncated, info = env.step(key(time + 2), state, action, params)
        assert bool(terminated) == (time == 2)
        assert not truncated
        if time < 2:
            assert reward == 0
    final = info["final_observation"]
    np.testing.assert_array_equal(final[:5], [*np.eye(2)[latents[3]], 0, 0, 0])
    assert reward == pytest.approx(1 - 2 * latents[3], abs=0.6)


def test_rollouts_of_the_policy_have_the_exact_law():
    params = ENV.default_params

    def episode(key, _):
        def step(carry, _):
            key, observation, state, total = carry
            key, action_key, step_key = jax.random.split(key, 3)
            chance = jnp.where(observation[0] == 1, CORRECT, 0.5)
            action = (jax.random.uniform(action_key) >= chance).astype(jnp.int32)
            observation, state, reward, *_ = ENV.step(step_key, state, action, params)
            return (key, observation, state, total + reward), None

        reset_key, key = jax.random.split(key)
        return jax.lax.scan(step, (key, *ENV.reset(reset_key, params), 0.0), length=ENV.horizon)[0][-1]

    returns = np.asarray(jax.jit(jax.vmap(episode, (0, None)))(jax.random.split(key(3), 4_000), None))
    assert share_near(returns > 0, CORRECT**10)
    assert scipy.stats.kstest(returns[returns > 0], "norm", (1, 0.1)).pvalue > 1e-3
    assert scipy.stats.kstest(returns[returns < 0], "norm", (-1, 0.1)).pvalue > 1e-3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 30), "horizon is 0, allowed: 1 and above"), ((10, 11), "observation_size is 11, allowed: 2 .* 12 and above")],
)
def test_impossible_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        CombLock(*sizes)


# -- rewards ----------------------------------------------------------------------------------------------------------


def test_one_dimensional_rewards():
    for latent, mean in ((0, 1), (1, -1)):
        rewards = comb_lock.sample_reward(key(latent), jnp.full(20_000, latent), 1)
        assert rewards.shape == (20_000, 1)
        assert scipy.stats.kstest(np.asarray(rewards[:, 0]), "norm", (mean, 0.1)).pvalue > 1e-3


def test_the_ring_and_the_blob():
    ring, blob = (np.asarray(comb_lock.sample_reward(key(l), jnp.full(20_000, l), 2)) for l in (0, 1))
    radius = np.linalg.norm(ring, axis=-1)
    assert radius.min() > 2
    assert radius.mean() == pytest.approx(2.2802, abs=0.005)  # 2 + 0.2236 * sqrt(pi / 2)
    assert scipy.stats.kstest(radius - 2, "rayleigh", (0, np.sqrt(0.05))).pvalue > 1e-3
    angle = np.arctan2(ring[:, 1], ring[:, 0])
    assert scipy.stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-3
    np.testing.assert_allclose(np.cov(blob.T), 0.05 * np.eye(2), atol=0.003)


# -- the data set -----------------------------------------------------------------------------------------------------


def test_data_follow_the_lock(data):
    rows = 2 * SAMPLES
    assert data.observation.shape == data.next_observation.shape == (10, rows, 30)
    assert data.reward.shape == (10, rows, 1)
    latent, following = (x[..., :2].argmax(-1) for x in (data.observation, data.next_observation))
    assert (latent.sum(-1) == SAMPLES).all()  # as many of each hidden state in every step
    np.testing.assert_array_equal(following, latent | (data.action == 1))
    for step in range(10):
        np.testing.assert_array_equal(data.observation[step, :, 2:12], np.tile(np.eye(10)[step], (rows, 1)))
        after = np.eye(11)[step + 1][:10]
        np.testing.assert_array_equal(data.next_observation[step, :, 2:12], np.tile(after, (rows, 1)))
        assert (data.terminated[step] == (step == 9)).all()
    assert (data.reward[:9] == 0).all()
    for state in (0, 1):
        rewards = data.reward[9, following[9] == state, 0]
        assert scipy.stats.kstest(rewards, "norm", (1 - 2 * state, 0.1)).pvalue > 1e-3


def test_logged_actions_are_uniform_and_next_actions_are_the_policys(data):
    following = data.next_observation[..., :2].argmax(-1)
    assert share_near(data.action == 0, 0.5)
    for action in (0, 1):
        rows = (following == 0) & (data.action == action)
        assert rows.any() == (action == 0)
        for_wrong = data.next_action[(following == 1) & (data.action == action)]
        assert share_near(for_wrong == 0, 0.5)
    assert share_near(data.next_action[following == 0] == 0, 13 / 14)
    # Drawn independently of each other in neighbouring steps.
    first, second = data.next_action[0, :SAMPLES], data.action[1, :SAMPLES]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_noise_is_fresh_in_every_observation(data):
    noise = np.stack([data.observation[..., 12:], data.next_observation[..., 12:]]).reshape(-1)
    assert len(np.unique(noise)) > 0.5 * len(noise)  # float32 has few values near 0
    assert noise.std() == pytest.approx(0.1, rel=0.01)
    here, there = data.observation[..., 12:].ravel(), data.next_observation[..., 12:].ravel()
    assert abs(np.corrcoef(here, there)[0, 1]) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"), [({"samples": 0}, "samples is 0"), ({"dimension": 3}, "dimension is 3, allowed: 1 or 2")]
)
def test_impossible_data_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        comb_lock.offline_data(ENV, key(), correct=CORRECT, **({"samples": 5} | settings))


# -- exact laws -------------------------------------------------------------------------------------------------------


def test_success_probabilities_by_hand():
    chances = [comb_lock.success_probability(CORRECT, horizon=10, step=step) for step in range(10)]
    expected = [0.5133, 0.5527, 0.5953, 0.6410, 0.6904, 0.7435, 0.8007, 0.8622, 0.9286, 1]
    np.testing.assert_allclose(chances, expected, atol=5e-5)
    assert chances[0] == pytest.approx(0.513261, abs=1e-6)
    assert comb_lock.success_probability(CORRECT, horizon=10, action=None) == pytest.approx(0.476599, abs=1e-6)
    assert comb_lock.success_probability(CORRECT, horizon=10, action=1) == 0
    assert comb_lock.success_probability(CORRECT, horizon=10, latent=1) == 0
    with pytest.raises(ValueError, match=r"correct is 1\.5"):
        comb_lock.success_probability(1.5, horizon=10)


def test_density_by_integration():
    success = CORRECT**9

    def integral(function):
        """Gauss-Legendre over both modes, ten standard deviations to either side."""
        pieces = (scipy.integrate.fixed_quad(function, m - 1, m + 1, n=120)[0] for m in (-1, 1))
        return sum(pieces)

    def density(x):
        return comb_lock.return_density(success, x)

    mean = integral(lambda x: density(x) * x)
    assert integral(density) == pytest.approx(1, abs=1e-9)
    assert mean == pytest.approx(0.026521, abs=1e-6)
    assert integral(lambda x: density(x) * (x - mean) ** 2) == pytest.approx(1.009297, abs=1e-6)
    best = integral(lambda x: density(x) * np.log(density(x)))
    assert comb_lock.best_log_likelihood(success) == pytest.approx(best, abs=1e-6)
    assert comb_lock.best_log_likelihood(success) == pytest.approx(0.190851, abs=2e-6)


def test_sampled_returns_follow_the_density():
    success = CORRECT**9
    returns = np.asarray(comb_lock.sample_returns(key(5), success, 20_000))
    assert returns.shape == (20_000, 1)

    def cdf(x):
        return success * scipy.stats.norm.cdf(x, 1, 0.1) + (1 - success) * scipy.stats.norm.cdf(x, -1, 0.1)

    assert scipy.stats.kstest(returns[:, 0], cdf).pvalue > 1e-3
    vectors = np.asarray(comb_lock.sample_returns(key(6), success, 20_000, dimension=2))
    assert share_near(np.linalg.norm(vectors, axis=-1) > 1.5, success)

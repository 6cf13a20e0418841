import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import returns
from jaxrl_dist.learning.returns import bootstrap_discount, n_step


def test_only_termination_stops_the_bootstrap():
    # A transition cut by a time limit has terminated = False, whatever its truncated says: it keeps its gamma.
    terminated = jnp.array([[False, True], [True, False]])
    discount = bootstrap_discount(0.9, terminated)
    assert discount.dtype == jnp.float32
    np.testing.assert_allclose(discount, [[0.9, 0], [0, 0.9]], rtol=1e-7)
    swept = jax.vmap(bootstrap_discount, in_axes=(0, None))(jnp.array([0.5, 1.0]), terminated[0])
    np.testing.assert_allclose(swept, [[0.5, 0], [1, 0]])


NO, YES = [False] * 3, [True] * 3


@pytest.mark.parametrize(
    ("terminated", "truncated", "available", "expected"),
    [
        (NO, NO, YES, (5.23, 0.729, 3)),
        ([False, True, False], NO, YES, (2.8, 0, 2)),
        (NO, [False, True, False], YES, (2.8, 0.81, 2)),
        ([False, True, False], [False, True, False], YES, (2.8, 0, 2)),  # termination wins
        (NO, NO, [True, True, False], (2.8, 0.81, 2)),
        (NO, NO, [True, False, False], (1, 0.9, 1)),
        ([False, False, True], NO, [True, True, False], (2.8, 0.81, 2)),  # what is not recorded does not count
        ([True, False, False], NO, YES, (1, 0, 1)),
        ([False, False, True], NO, YES, (5.23, 0, 3)),
        (NO, [True, False, False], YES, (1, 0.9, 1)),
        ([False, True, False], [True, False, False], YES, (1, 0.9, 1)),  # a later episode's end
    ],
)
def test_n_step_hand_worked(terminated, truncated, available, expected):
    reward = jnp.array([1.0, 2.0, 3.0])
    actual = n_step(reward, jnp.array(terminated), jnp.array(truncated), jnp.array(available), 0.9)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert [x.dtype for x in actual] == [jnp.float32, jnp.float32, jnp.int32]


def windows(num_steps, shape=(40,), seed=0):
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(num_steps, *shape)).astype(np.float32)
    terminated, truncated = rng.uniform(size=(2, num_steps, *shape)) < 0.2
    recorded = rng.integers(1, num_steps + 1, shape)
    return reward, terminated, truncated, np.arange(num_steps).reshape(-1, *[1] * len(shape)) < recorded


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_n_step_agrees_with_a_loop_for_every_gamma(num_steps):
    reward, terminated, truncated, available = inputs = windows(num_steps, (20, 3))
    gammas = np.float32([0, 0.5, 0.97, 1])
    actual = jax.jit(jax.vmap(n_step, in_axes=(None, None, None, None, 0)))(*inputs, gammas)
    for which, gamma in enumerate(gammas):
        for place in np.ndindex(20, 3):
            total, steps, discount = 0.0, 0, 1.0
            while steps < num_steps and available[(steps, *place)]:
                here = (steps, *place)
                total, discount, steps = total + discount * reward[here], discount * gamma, steps + 1
                if terminated[here]:
                    discount = 0.0
                if terminated[here] or truncated[here]:
                    break
            got = [float(x[(which, *place)]) for x in actual]
            np.testing.assert_allclose(got, [total, discount, steps], rtol=1e-5, atol=1e-6)


def test_one_step_is_the_one_step_target_to_the_last_bit():
    reward, terminated, truncated, available = windows(1)
    actual = n_step(reward, terminated, truncated, available, 0.97)
    np.testing.assert_array_equal(actual.reward, reward[0])
    np.testing.assert_array_equal(actual.discount, bootstrap_discount(0.97, jnp.asarray(terminated[0])))
    np.testing.assert_array_equal(actual.steps, np.ones(40))


def test_what_lies_outside_a_window_cannot_reach_it():
    reward = jnp.array([[1.0], [2.0], [jnp.nan]])
    flags = jnp.zeros((3, 1), bool)
    assert float(n_step(reward, flags, flags.at[1].set(True), ~flags, 0.5).reward[0]) == 2.0
    assert float(n_step(reward, flags, flags, ~flags.at[2].set(True), 0.5).reward[0]) == 2.0


# -- advantages -------------------------------------------------------------------------------------------------------


def gae(reward, values, last, terminated=(), truncated=(), final=None, gamma=0.9, decay=0.8):
    """Of one environment; `final` is the value of the true successor where an episode was cut."""
    steps = np.arange(len(reward))
    following = np.append(values[1:], last)
    if final is not None:
        following[list(truncated)] = final
    numbers = np.float32(reward), np.float32(values), np.float32(following)
    flags = np.isin(steps, terminated), np.isin(steps, truncated)
    return returns.gae(*map(jnp.asarray, (*numbers, *flags)), gamma, decay)


def test_advantages_by_hand():
    reward, values = [1, 0, 2, 1], [0.5, 0.4, 0.3, 0.2]
    np.testing.assert_allclose(gae(reward, values, 0.6, terminated=[1]), [0.572, -0.4, 2.8448, 1.34], rtol=1e-5)
    cut = gae(reward, values, 0.6, truncated=[1], final=0.7)
    np.testing.assert_allclose(cut[:2], [1.0256, 0.23], rtol=1e-5)
    ones, values = [1, 1, 1], [0.5, 0.4, 0.3]
    np.testing.assert_allclose(gae(ones, values, 0.2), [1.942592, 1.5036, 0.88], rtol=1e-6)
    np.testing.assert_allclose(gae(ones, values, 0.2, terminated=[1]), [1.292, 0.6, 0.88], rtol=1e-6)
    np.testing.assert_allclose(gae(ones, values, 0.2, truncated=[1], final=0.6), [1.6808, 1.14, 0.88], rtol=1e-6)


def test_advantages_are_sums_of_errors_within_the_episode():
    """Every lambda, against sums written out: A_t = sum over k of (gamma lambda)^k delta_{t+k}, up to the end."""
    rng = np.random.default_rng(0)
    reward, value, following = rng.normal(size=(3, 20, 4)).astype(np.float32)
    terminated, truncated = rng.random((2, 20, 4)) < 0.15
    for decay in (0.0, 0.7, 1.0):
        found = returns.gae(*map(jnp.asarray, (reward, value, following, terminated, truncated)), 0.9, decay)
        delta = reward + 0.9 * ~terminated * following - value
        for t in range(20):
            for env in range(4):
                total, weight = 0.0, 1.0
                for k in range(t, 20):
                    total += weight * delta[k, env]
                    weight *= 0.9 * decay
                    if terminated[k, env] or truncated[k, env]:
                        break
                assert found[t, env] == pytest.approx(total, abs=1e-5)


def test_the_sum_of_rewards_and_the_one_step_target_are_the_ends_of_lambda():
    reward, values = [1, 0, 2, 1], np.float32([0.5, 0.4, 0.3, 0.2])
    full = gae(reward, values, 0.6, decay=1.0) + values
    assert full[0] == pytest.approx(1 + 0.81 * 2 + 0.729 + 0.9**4 * 0.6)
    one_step = gae(reward, values, 0.6, decay=0.0) + values
    np.testing.assert_allclose(one_step, reward + 0.9 * np.append(values[1:], 0.6), rtol=1e-6)


# -- lambda-returns ---------------------------------------------------------------------------------------------------


def lived(seed=0, steps=24, num_envs=6, stream=0):
    """Rewards and values of a rollout of short episodes, float64 `[steps, num_envs]`, and how they ended; `stream` has
    rewards and values of its own for the same episodes."""
    rng = np.random.default_rng(seed)
    terminated, truncated = rng.random((2, steps, num_envs)) < 0.12
    done = terminated | truncated
    # Inside the window there are all kinds of ends, and episodes that go on after it.
    assert all(x[1:-1].any() for x in (terminated & ~truncated, truncated & ~terminated))
    assert not done[-1].all()
    rng = np.random.default_rng((seed, stream))
    reward, value = rng.normal(size=(2, steps, num_envs))
    after, final = rng.normal(size=(2, steps, num_envs))
    # The successor is the next state seen, but for an episode's last one, after which another episode is seen.
    next_seen = np.append(value[1:], after[-1:], axis=0)
    return reward, value, np.where(done, final, next_seen), next_seen, terminated, truncated


def mixture(reward, next_value, terminated, truncated, gamma, decay):
    """By the definition: sum over n < N of (1 - lambda) lambda^(n-1) G^(n), plus lambda^(N-1) G^(N), where G^(n) is the
    n-step return, and N the steps that are left of the episode or of the rollout."""
    found = np.zeros(reward.shape)
    for t, env in np.ndindex(reward.shape):
        n_step_returns, total = [], 0.0
        for k in range(t, len(reward)):
            total += gamma ** (k - t) * reward[k, env]
            n_step_returns.append(total + (not terminated[k, env]) * gamma ** (k - t + 1) * next_value[k, env])
            if terminated[k, env] or truncated[k, env]:
                break
        for n, one in enumerate(n_step_returns, 1):
            found[t, env] += (1 - decay if n < len(n_step_returns) else 1) * decay ** (n - 1) * one
    return found


def in_float32(function, *arrays, gamma=0.9, decay):
    arrays = [jnp.asarray(x, jnp.float32 if x.dtype == float else bool) for x in arrays]
    return np.asarray(function(*arrays, gamma, decay))


@pytest.mark.parametrize("decay", [0.0, 0.65, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_q_lambda_and_advantages_are_mixtures_of_n_step_returns(seed, decay):
    """On random episodes that terminate and are cut inside the rollout; and so advantage + value = lambda-return."""
    reward, value, next_value, _, *ends = lived(seed)
    expected = mixture(reward, next_value, *ends, 0.9, decay)
    found = in_float32(returns.q_lambda, reward, next_value, *ends, decay=decay)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    advantage = in_float32(returns.gae, reward, value, next_value, *ends, decay=decay)
    np.testing.assert_allclose(advantage + value, expected, atol=2e-5)


@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_a_second_stream_can_go_on_through_the_ends_of_episodes(decay):
    """Rewards of curiosity need no end (RND): the same function without flags, and with values of what is seen next."""
    reward, value, next_value, _, *ends = lived()
    never = [np.zeros_like(end) for end in ends]
    other_reward, other_value, _, next_seen, *same = lived(stream=1)
    np.testing.assert_array_equal(same, ends)
    episodic = in_float32(returns.gae, reward, value, next_value, *ends, decay=decay)
    continuing = in_float32(returns.gae, other_reward, other_value, next_seen, *never, decay=decay)
    np.testing.assert_allclose(episodic + value, mixture(reward, next_value, *ends, 0.9, decay), atol=2e-5)
    expected = mixture(other_reward, next_seen, *never, 0.9, decay)
    np.testing.assert_allclose(continuing + other_value, expected, atol=2e-5)
    # Without its flags alone a termination counts like a time limit: cut, but worth what would have followed.
    cut = in_float32(returns.gae, reward, value, next_value, never[0], ends[0] | ends[1], decay=decay)
    expected = mixture(reward, next_value, never[0], ends[0] | ends[1], 0.9, decay)
    np.testing.assert_allclose(cut + value, expected, atol=2e-5)


def q_lambda(decay, terminated=(), truncated=(), final=None, last=0.6):
    """Of the sheet's rollout, whose largest action values are 0.5, 0.4, 0.9, 0.2, and `last` after it."""
    steps, following = np.arange(4), np.array([0.4, 0.9, 0.2, last])
    following[list(truncated)] = final
    flags = np.isin(steps, terminated), np.isin(steps, truncated)
    return in_float32(returns.q_lambda, np.array([1.0, 0, 2, 1]), following, *flags, decay=decay)


def test_q_lambda_by_hand():
    np.testing.assert_allclose(q_lambda(0.65, terminated=[1]), [1.126, 0, 2.9639, 1.54], rtol=1e-6)
    np.testing.assert_allclose(q_lambda(0.0, terminated=[1]), [1.36, 0, 2.18, 1.54], rtol=1e-6)
    np.testing.assert_allclose(q_lambda(1.0, terminated=[1]), [1, 0, 3.386, 1.54], rtol=1e-6)
    # A time limit is worth the largest value of the true successor, and nothing of the next episode.
    np.testing.assert_allclose(q_lambda(0.65, truncated=[1], final=0.7)[:2], [1.49455, 0.63], rtol=1e-6)
    both = q_lambda(0.65, terminated=[1], truncated=[1], final=0.7)
    np.testing.assert_array_equal(both, q_lambda(0.65, terminated=[1]))


def test_the_last_target_but_one_takes_its_own_successors_value():
    """purejaxql's scan begins with the value of the state after the rollout in its place: 3.0899 here. At lambda 0 that
    state is worth nothing to any step but the last."""
    target = q_lambda(0.65, terminated=[1])[2]
    assert target == pytest.approx(2 + 0.9 * (0.65 * 1.54 + 0.35 * 0.2))
    assert target != pytest.approx(3.0899, abs=1e-2)
    np.testing.assert_array_equal(q_lambda(0.0, last=9.0)[:3], q_lambda(0.0)[:3])


# -- laws of lambda-returns -------------------------------------------------------------------------------------------


def mixture_law(reward, next_atoms, terminated, truncated, gamma, decay, t, env):
    """Atoms and masses of the mixture of the laws of n-step returns from step t on."""
    atoms, masses, total, weight = [], [], 0.0, 1.0
    for k in range(t, len(reward)):
        total += gamma ** (k - t) * reward[k, env]
        bootstrap = (not terminated[k, env]) * gamma ** (k - t + 1) * next_atoms[k, env]
        last = k == len(reward) - 1 or terminated[k, env] or truncated[k, env]
        atoms.append(total + bootstrap)
        masses.append(np.full(len(bootstrap), weight * (1 if last else 1 - decay) / len(bootstrap)))
        weight *= decay
        if last:
            break
    return np.concatenate(atoms), np.concatenate(masses)


def rollout_of_laws(steps=6, envs=3, atoms=8):
    rng = np.random.default_rng(2)
    reward, next_atoms = rng.normal(size=(steps, envs)), rng.normal(size=(steps, envs, atoms)) ** 3
    ends = np.zeros((2, steps, envs), bool)
    ends[0, 2, 0] = ends[1, 3, 1] = ends[:, 4, 2] = True
    return reward, next_atoms, *ends


def lambda_laws(arrays, decay, draws):
    arrays = [jnp.asarray(x, jnp.float32 if x.dtype == float else bool) for x in arrays]
    keys = jax.random.split(jax.random.key(1), draws)
    return np.asarray(jax.vmap(lambda key: returns.lambda_law(*arrays, 0.9, decay, key))(keys))


@pytest.mark.parametrize("decay", [0.0, 0.55, 1.0])
def test_the_expected_law_is_the_mixture_of_n_step_laws(decay):
    """At every step of every environment, with ends of all kinds: of drawn laws the distribution functions are right
    within the error of 2,000 draws, and at the ends of lambda nothing is drawn."""
    arrays = rollout_of_laws()
    found = lambda_laws(arrays, decay, 2_000)
    for t, env in np.ndindex(arrays[0].shape):
        atoms, masses = mixture_law(*arrays, 0.9, decay, t, env)
        np.testing.assert_allclose(found[:, t, env].mean(), (atoms * masses).sum(), atol=0.02)
        for value in np.quantile(atoms, [0.1, 0.3, 0.5, 0.7, 0.9]) + 1e-3:
            assert (found[:, t, env] <= value).mean() == pytest.approx(masses[atoms <= value].sum(), abs=0.015)
        if decay != 0.55:
            expected = np.sort(np.repeat(atoms, np.round(masses * 8).astype(int)))
            np.testing.assert_allclose(np.sort(found, -1)[:, t, env], np.tile(expected, (2_000, 1)), atol=2e-5)


def test_the_mean_of_a_drawn_law_is_nearer_than_with_independent_draws():
    """Of 60 steps of the same law with another mean now and then: less than two thirds of the deviation."""
    rng = np.random.default_rng(0)
    atoms = np.sort(rng.normal(size=32)) * 2 + rng.normal(size=(60, 1, 1))
    arrays = np.zeros((60, 1)), atoms, *np.zeros((2, 60, 1), bool)
    deviation, independent = lambda_laws(arrays, 0.95, 400)[:, 0, 0].mean(-1).std(), []
    for _ in range(400):
        law = atoms[-1, 0]
        for t in reversed(range(60)):
            law = 0.9 * np.where(rng.random(32) < 0.95, np.sort(law), atoms[t, 0])
        independent.append(law.mean())
    assert deviation < np.std(independent) * 2 / 3

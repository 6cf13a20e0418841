"""FLE: targets and the backward pass against loops, and what it learns on known laws."""

import dataclasses
from functools import partial

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from jaxrl_dist import envs
from jaxrl_dist.algorithms.dynamic_programming import fitted_likelihood as fle
from jaxrl_dist.distributional import metrics
from jaxrl_dist.envs import comb_lock
from jaxrl_dist.envs.comb_lock import CORRECT, CombLock, Transitions

SMALL = fle.Config(samples=20, iterations=3, batch_size=8, hidden=(5,), components=3, num_atoms=7, draws=11, seeds=2)
SUCCESS = CORRECT**9


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_samples_of_the_baselines_follow_their_laws():
    config = dataclasses.replace(SMALL, num_atoms=4, v_min=0.0, v_max=3.0)
    masses = jnp.array([0.1, 0.2, 0.3, 0.4])
    sample = jax.jit(fle.categorical_law(config).sample)
    drawn = np.asarray(sample(jax.random.key(0), jnp.tile(jnp.log(masses), (50_000, 1))))
    assert drawn.shape == (50_000, 1)
    np.testing.assert_allclose(np.histogram(drawn, np.arange(5) - 0.5)[0] / 50_000, masses, atol=0.01)
    assert scipy.stats.kstest(drawn[drawn > 2.5], "uniform", (2.5, 1)).pvalue > 1e-3  # the last cell

    quantiles = jnp.array([2.0, 0, 1, 4])  # crossing ones are sorted: 0, 1, 2, 4 at fractions 1/8, 3/8, 5/8, 7/8
    sample = jax.jit(fle.quantile_law(config).sample)
    drawn = np.asarray(sample(jax.random.key(1), jnp.tile(quantiles, (50_000, 1))))
    assert drawn.shape == (50_000, 1)
    shares = [(drawn == 0).mean(), *(((drawn > low) & (drawn <= low + 1)).mean() for low in range(2))]
    np.testing.assert_allclose(shares, [1 / 8, 1 / 4, 1 / 4], atol=0.01)
    assert (drawn == 4).mean() == pytest.approx(1 / 8, abs=0.01)
    assert ((drawn > 2) & (drawn < 3)).mean() == pytest.approx(1 / 8, abs=0.01)


def test_categorical_target_keeps_the_mean_of_the_rewards():
    config = fle.Config()
    rewards = comb_lock.sample_returns(jax.random.key(0), SUCCESS, 2_000)
    masses = fle.categorical_law(config).target(None, rewards, jnp.zeros(2_000), jnp.zeros((2_000, 100)))
    means = masses @ jnp.linspace(-1.5, 1.5, 100)
    np.testing.assert_allclose(means, rewards[:, 0], atol=1e-3)  # all within five deviations of a mode
    np.testing.assert_allclose(masses.sum(-1), 1, atol=1e-5)
    assert ((np.asarray(masses) > 1e-6).sum(-1) <= 2).all()


def batch_of(seed, rows, terminated):
    env = CombLock(3, 6)
    data = comb_lock.offline_data(env, jax.random.key(seed), samples=rows, correct=0.6)
    batch = jax.tree.map(lambda x: x[0], data)
    return batch._replace(reward=normal(seed, 2 * rows, 1) / 3, terminated=jnp.asarray(terminated))


def test_targets_against_a_loop():
    """The next law of each row at the next action, shifted; the reward alone where the episode ended."""
    rows, discount = 10, 0.9
    ended = np.arange(2 * rows) % 3 == 0
    batch = batch_of(0, rows, ended)
    assert (batch.action != batch.next_action).any()
    support = np.linspace(-1.5, 1.5, 7)
    for name in ("categorical", "quantile", "mixture"):
        model = fle.MODELS[name](SMALL)
        network = fle.network_of(SMALL, model)
        parameters = by_hand.quick(network.init)(jax.random.key(1), jnp.zeros((1, 8)))
        run = by_hand.quick(lambda key, parameters: fle.targets(key, SMALL, model, parameters, batch, discount, 2))
        found = np.asarray(run(jax.random.key(2), parameters))
        next_inputs = np.zeros((2 * rows, 8), np.float32)
        next_inputs[:, :6] = batch.next_observation
        next_inputs[np.arange(2 * rows), 6 + np.asarray(batch.next_action)] = 1
        heads = np.asarray(by_hand.quick(network.apply)(parameters, next_inputs))
        samples = np.asarray(by_hand.quick(model.sample)(jax.random.key(2), heads))
        for row in range(2 * rows):
            reward, weight = float(batch.reward[row, 0]), 0.0 if ended[row] else discount
            if name == "categorical":
                masses = np.exp(heads[row]) / np.exp(heads[row]).sum()
                expected = np.zeros(7)
                for atom, mass in zip(support, masses, strict=True):
                    place = (np.clip(reward + weight * atom, -1.5, 1.5) + 1.5) / 0.5
                    below = min(int(place), 5)
                    expected[below] += mass * (below + 1 - place)
                    expected[below + 1] += mass * (place - below)
            elif name == "quantile":
                expected = reward + weight * heads[row]
            else:
                expected = reward + weight * samples[row]
            np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_one_sample_per_transition_depends_on_the_key_alone():
    batch = batch_of(1, 10, np.zeros(20, bool))
    model = fle.gaussian_mixture(SMALL)
    parameters = by_hand.quick(fle.network_of(SMALL, model).init)(jax.random.key(1), jnp.zeros((1, 8)))
    run = by_hand.quick(lambda key: fle.targets(key, SMALL, model, parameters, batch, 1.0, 2))
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    assert len(np.unique(first - batch.reward)) == 20  # no row shares its sample with another


# -- the backward pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixture", "quantile"])
def test_backward_pass_against_a_loop(name):
    env = CombLock(3, 6)
    data = comb_lock.offline_data(env, jax.random.key(0), samples=20, correct=0.6)
    # No step is terminal here, so that the first fit too would bootstrap if the pass let it.
    batches = data._replace(reward=normal(0, 3, 40, 1) / 3, terminated=jnp.zeros((3, 40), bool))
    model, key = fle.MODELS[name](SMALL), jax.random.key(4)
    run = by_hand.quick(lambda key: fle.fit_backwards(key, SMALL, model, batches, 0.8, 2))
    found = run(key)
    fit = by_hand.quick(lambda key, inputs, target: fle.fit(key, SMALL, model, inputs, target))
    target_of = by_hand.quick(lambda key, parameters, batch: fle.targets(key, SMALL, model, parameters, batch, 0.8, 2))
    reward_alone = by_hand.quick(model.target)
    parameters = None
    for step in range(3):
        batch = jax.tree.map(lambda x: x[step], batches)
        target_key, fit_key = jax.random.split(jax.random.fold_in(jax.random.key(4), step))
        if parameters is None:
            nothing = jnp.zeros((40, model.outputs))
            target = reward_alone(target_key, batch.reward, jnp.zeros(40), nothing)
        else:
            target = target_of(target_key, parameters, batch)
        parameters = fit(fit_key, fle.inputs_of(batch.observation, batch.action, 2), target)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(parameters), strict=True):
            np.testing.assert_allclose(a[step], b, atol=2e-5)


def test_a_single_gaussian_finds_mean_and_deviation():
    """The last step is density estimation: one component on N(1, 0.1^2)."""
    config = fle.Config(components=1, iterations=1_500, batch_size=250, hidden=(8,), learning_rate=1e-2)
    model = fle.gaussian_mixture(config)
    target = 1 + 0.1 * normal(0, 4_000, 1)
    inputs = jnp.ones((4_000, 1))
    parameters = jax.jit(lambda key: fle.fit(key, config, model, inputs, target))(jax.random.key(0))
    mixture = fle.mixture_of(fle.network_of(config, model).apply(parameters, inputs[:1]), 1, 1, 1.0)
    assert mixture.means[0, 0, 0] == pytest.approx(1, abs=0.01)
    assert np.exp(mixture.log_std[0, 0, 0]) == pytest.approx(0.1, abs=0.01)


def coin_batches(steps, rows):
    env, params = envs.make("tabular/coin")
    tossed = jax.random.bernoulli(jax.random.key(0), 0.5, (steps, rows)).astype(jnp.int32)
    reward = params.mdp.reward[0, 0][tossed][..., None]
    np.testing.assert_allclose(params.mdp.probability[0, 0], [0.5, 0.5])
    ones, zeros = jnp.ones((steps, rows, 1)), jnp.zeros((steps, rows), jnp.int32)
    assert env.observation_space(params).shape == (1,)
    return Transitions(ones, zeros, reward, ones, zeros, jnp.zeros((steps, rows), bool))


def test_discounted_returns_of_the_coin():
    """After t iterations the law is uniform on k / 2^(t-1), at W1 2^-t from the limit, uniform on [0, 2]."""
    config = fle.Config(iterations=1_500, batch_size=250, hidden=(16,), learning_rate=5e-3)
    model, batches = fle.gaussian_mixture(config), coin_batches(4, 4_000)
    run = jax.jit(lambda key: fle.fit_backwards(key, config, model, batches, 0.5, 1))
    parameters = run(jax.random.key(1))
    heads = jax.vmap(lambda p: fle.network_of(config, model).apply(p, jnp.ones((20_000, 2))))(parameters)
    limit = np.linspace(0, 2, 20_001)[:-1] + 0.5e-4
    for t in range(1, 5):
        samples = np.asarray(model.sample(jax.random.key(t), heads[t - 1]))[:, 0]
        grid = np.arange(2**t) / 2 ** (t - 1)
        assert metrics.wasserstein_1(grid, limit) == pytest.approx(2.0**-t, abs=1e-3)
        distance = float(metrics.wasserstein_1(samples, limit))
        print(f"iteration {t}: {distance:.4f} from the limit, {metrics.wasserstein_1(samples, grid):.4f} from the grid")
        assert distance == pytest.approx(2.0**-t, abs=0.04)
        assert metrics.wasserstein_1(samples, grid) < 0.06


# -- measures ---------------------------------------------------------------------------------------------------------


def test_errors_of_known_samples():
    assert len(fle.BINS[1]) - 1 == 70
    truth = np.asarray(comb_lock.sample_returns(jax.random.key(8), SUCCESS, 50_000))
    again = np.random.default_rng(0).permutation(truth)
    assert metrics.wasserstein_1(truth[:, 0], again[:, 0]) == pytest.approx(0, abs=1e-6)
    perfect = fle.errors(truth, SUCCESS)
    assert perfect["total_variation"] < 0.03
    assert perfect["wasserstein_1"] < 0.02
    assert perfect["success"] == pytest.approx(SUCCESS, abs=0.012)
    optimist = fle.errors(truth[truth[:, 0] > 0], SUCCESS)
    assert optimist["wasserstein_1"] == pytest.approx(2 * 0.486739, abs=0.02)
    assert optimist["total_variation"] == pytest.approx(0.486739, abs=0.02)
    assert optimist["success"] == 1
    vectors = np.asarray(comb_lock.sample_returns(jax.random.key(9), SUCCESS, 50_000, 2))
    perfect = fle.errors(vectors, SUCCESS)
    assert perfect["wasserstein_1"] < 0.03
    assert perfect["total_variation"] < 0.06
    assert perfect["success"] == pytest.approx(SUCCESS, abs=0.012)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_seeds_side_by_side_equal_single_runs():
    config = dataclasses.replace(SMALL, dimension=2)
    keys = jax.random.split(jax.random.key(0), 2)
    samples, heads = by_hand.quick(jax.vmap(partial(fle.estimate, config=config)))(keys)
    assert samples.shape == (2, 10, 11, 2)
    assert heads.shape == (2, 11, fle.mixture_size(3, 2))
    single = by_hand.quick(partial(fle.estimate, config=config))
    for run in range(2):
        alone, head = single(jax.random.split(jax.random.key(0), 2)[run])
        np.testing.assert_allclose(head, heads[run], atol=1e-4)
        np.testing.assert_allclose(alone, samples[run], atol=1e-3)
    assert (np.asarray(heads[0]) != np.asarray(heads[1])).all()


def test_solve_prints_every_seed_and_the_truth():
    console = Console(record=True, width=160)
    fle.solve(dataclasses.replace(SMALL, seed=7), console)
    text = console.export_text()
    for word in ("total_variation", "wasserstein_1", "log_likelihood", "7 ", "8 ", "mean, 95 %", "truth", "0.513"):
        assert word in text
    assert "0.191" in text  # the best log-likelihood


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "diffusion"}, "--model is 'diffusion'; it must be one of mixture, categorical, quantile"),
        ({"model": "quantile", "dimension": 2}, "--dimension is 2; it must be at most 1 for --model quantile"),
        ({"dimension": 3}, "--dimension is 3; it must be at most 2 for --model mixture"),
        ({"model": "categorical", "v_min": 2.0}, "v_min is 2.0; it must be less than v_max = 1.5"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        fle.solve(fle.Config(**settings), Console())


@pytest.mark.slow
@pytest.mark.proves(
    "algorithms/dynamic_programming/fitted_likelihood.py", "jaxrl_dist/learning", "jaxrl_dist/distributional"
)
def test_the_law_of_the_combination_lock_is_learned():
    config = fle.Config(samples=2_000)  # 4000 transitions for each step, half of them in either hidden state
    keys = jax.random.split(jax.random.key(0), 2)
    samples, heads = jax.device_get(jax.jit(jax.vmap(partial(fle.estimate, config=config)))(keys))
    held_out = comb_lock.sample_returns(jax.random.key(3), SUCCESS, config.draws)
    for run, head in zip(samples, heads, strict=True):
        found = fle.errors(run[0], SUCCESS)
        mixture = fle.mixture_of(head, config.components, 1, config.initial_spread)
        likelihood = float(fle.mixture_log_likelihood(mixture, held_out).mean())
        print(found | {"held-out log-likelihood": likelihood})
        assert found["total_variation"] < 0.2
        assert found["success"] == pytest.approx(SUCCESS, abs=0.12)
        assert 0.0 < likelihood < 0.2  # no model can pass 0.190851 but by chance
    for step in range(10):  # every law on the way, not only the first
        success = comb_lock.success_probability(CORRECT, horizon=10, step=step)
        assert (samples[:, step] > 0).mean() == pytest.approx(success, abs=0.12)

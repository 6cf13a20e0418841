"""QTD: hand-worked updates, an m x m reference in numpy, closed-form fixed points, and two cells of the comparison."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from jaxrl_dist.algorithms.dynamic_programming import quantile_td
from jaxrl_dist.algorithms.dynamic_programming.quantile_td import Config, Transitions
from jaxrl_dist.distributional import quantile, tabular

COIN = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2))
BIASED = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2), np.array([0.3, 0.7]))


def stays(reward: float, terminated: bool = False) -> Transitions:
    """A transition of the only state to itself."""
    return Transitions(jnp.array([reward]), jnp.zeros(1, jnp.int32), jnp.array([terminated]))


def slow_update(theta, reward, next_state, terminated, discount, step_size):
    """QTD with the m x m indicator, every target and quantile in loops."""
    states, m = theta.shape
    found = theta.copy()
    for x in range(states):
        targets = [reward[x] + discount * (1 - terminated[x]) * theta[next_state[x], j] for j in range(m)]
        for i in range(m):
            below = sum(bool(y < theta[x, i]) for y in targets) / m
            found[x, i] = theta[x, i] + step_size * ((2 * i + 1) / (2 * m) - below)
    return found


learn = jax.jit(quantile_td.learn, static_argnames="method")


# -- one update -------------------------------------------------------------------------------------------------------


def test_one_update_by_hand():
    theta, targets = jnp.array([[0.0, 1, 2, 4]]), jnp.array([[3.5, 0.5, 3, 1.5]])
    share = quantile_td.share_below(targets, theta)
    np.testing.assert_array_equal(share, [[0, 0.25, 0.5, 1]])
    np.testing.assert_array_equal(quantile.midpoints(4) - share[0], [0.125, 0.125, 0.125, -0.125])
    # The same through the update: state 0 goes on to state 1, whose quantiles and a reward of 1 make the targets.
    both = jnp.array([[0.0, 1, 2, 4], [5.0, -1, 4, 1]])
    moved = quantile_td.qtd_update(both, Transitions(jnp.array([1.0, 0]), jnp.array([1, 1]), jnp.array([False, True])),
                                   0.5, 0.8)  # fmt: skip
    np.testing.assert_allclose(moved[0] - both[0], [0.1, 0.1, 0.1, -0.1], atol=1e-6)


def test_td_update_by_hand():
    transitions = Transitions(jnp.array([1.0, -2]), jnp.array([1, 0]), jnp.array([False, True]))
    np.testing.assert_allclose(quantile_td.td_update(jnp.array([4.0, 10]), transitions, 0.5, 0.1), [4.2, 8.8])


@pytest.mark.parametrize("reward", [1e9, -1e9])
def test_no_quantile_moves_by_more_than_the_step_size(reward):
    theta = jnp.array([[-3.0, 0, 0, 7, 2]])
    step = quantile_td.qtd_update(theta, stays(reward), 0.9, 0.25) - theta
    tau = (np.arange(5) + 0.5) / 5
    np.testing.assert_allclose(step[0], 0.25 * (tau if reward > 0 else tau - 1), atol=1e-6)


@pytest.mark.parametrize("m", [1, 7, 16])
def test_sorted_search_equals_the_indicator_with_ties(m):
    rng = np.random.default_rng(m)
    for _ in range(20):
        theta, targets = rng.integers(-3, 4, (2, 6, m)).astype(np.float32)
        expected = (targets[:, None, :] < theta[:, :, None]).mean(-1)
        np.testing.assert_allclose(
            quantile_td.share_below(jnp.asarray(targets), jnp.asarray(theta)), expected, atol=1e-6
        )


def test_all_targets_tie_at_a_quantile():
    """A certain reward at its own fixed point: none of the targets is below, so every quantile goes up."""
    theta = jnp.full((1, 4), 2.0)
    step = quantile_td.qtd_update(theta, stays(1.0), 0.5, 1.0) - theta
    np.testing.assert_allclose(step[0], quantile.midpoints(4))


def test_terminal_targets_are_the_reward():
    theta = jnp.array([[-1.0, 0.5, 3, 1]])
    step = quantile_td.qtd_update(theta, stays(0.75, terminated=True), 0.9, 1.0) - theta
    np.testing.assert_allclose(step[0], quantile.midpoints(4) - np.array([0, 0, 1, 1]), atol=1e-6)
    np.testing.assert_allclose(quantile_td.td_update(jnp.array([4.0]), stays(1.0, terminated=True), 0.9, 0.5), [2.5])


def test_the_update_descends_the_quantile_loss():
    """increment_i = -alpha dL / d theta_i, L the plain quantile regression loss, summed over i and averaged over j."""
    rng = np.random.default_rng(0)
    theta, targets = jnp.asarray(rng.normal(size=(2, 3, 9)), jnp.float32)

    def loss(theta):
        return quantile.quantile_huber_loss(
            theta, targets, quantile.midpoints(9), kappa=0.0, over_predicted="sum"
        ).sum()

    increment = quantile.midpoints(9) - quantile_td.share_below(targets, theta)
    np.testing.assert_allclose(increment, -jax.grad(loss)(theta), atol=1e-5)


# -- fixed points -----------------------------------------------------------------------------------------------------


def fixed_point(mdp, m, discount=0.5, iterations=60):
    program = jax.jit(quantile_td.quantile_dynamic_programming, static_argnames=("quantiles", "iterations"))
    return program(mdp, discount, quantiles=m, iterations=iterations)


def shares_of_the_coin(theta):
    """Of the expected target law: mass strictly below, and at or below, every quantile."""
    targets = np.concatenate([0.5 * theta, 1 + 0.5 * theta])
    return (targets[None] < theta[:, None]).mean(-1), (targets[None] <= theta[:, None]).mean(-1)


def test_the_coins_fixed_points_are_a_set():
    middle, lowest = np.array([0.25, 0.75, 1.25, 1.75]), np.array([0, 0.5, 1, 1.5])
    tau = (np.arange(4) + 0.5) / 4
    below, _ = shares_of_the_coin(middle)
    np.testing.assert_array_equal(below, tau)
    expected = np.mean([quantile_td.share_below(jnp.asarray(r + 0.5 * middle)[None], jnp.asarray(middle)[None])[0]
                        for r in (0, 1)], axis=0)  # fmt: skip
    np.testing.assert_allclose(expected, tau, atol=1e-6)
    # At the lower one targets tie with quantiles: stationary for the differential inclusion, between both readings.
    below, at_or_below = shares_of_the_coin(lowest)
    assert (below < tau).any()
    assert (at_or_below >= tau).all()
    np.testing.assert_allclose(fixed_point(COIN, 4)[0], lowest, atol=1e-5)


def test_the_mean_of_the_coin_is_learned_within_the_set():
    config = Config(states=1, quantiles=4, iterations=4_000, discount=0.5, noise="none")
    learned = learn(config, "qtd", COIN, jax.random.key(0), 0.02)
    assert 0.75 - 0.05 <= learned.mean() <= 1.25 + 0.05
    assert (jnp.abs(learned[0] - jnp.array([0.25, 0.75, 1.25, 1.75])) < 0.25 + 0.06).all()


def slow_quantiles(m: int, convention: str) -> np.ndarray:
    """Quantile dynamic programming on the biased coin, with masses counted in whole numbers, so that ties are ties."""
    theta, needed = np.zeros(m), 5 * (2 * np.arange(m) + 1)  # in units of 1 / (10 m)
    for _ in range(60):
        target = sorted([(0.5 * z, 3) for z in theta] + [(1 + 0.5 * z, 7) for z in theta])
        atoms, reached = np.array([z for z, _ in target]), np.cumsum([mass for _, mass in target])
        lowest, highest = (atoms[np.searchsorted(reached, needed, side)] for side in ("left", "right"))
        theta = lowest if convention == "lower" else (lowest + highest) / 2
    return theta


@pytest.mark.parametrize(
    ("m", "lower", "middle"), [(4, 1.416667, 1.416667), (11, 1.393939, 1.416667), (51, 1.394293, 1.399075)]
)
def test_quantiles_do_not_keep_the_mean(m, lower, middle):
    """The true value is 1.4. Ours is the lower quantile; the middle of the interval of quantiles is another choice."""
    found = fixed_point(BIASED, m)[0]
    np.testing.assert_allclose(found, slow_quantiles(m, "lower"), atol=1e-5)
    assert found.mean() == pytest.approx(lower, abs=1e-5)
    assert slow_quantiles(m, "middle").mean() == pytest.approx(middle, abs=1e-5)


def test_one_quantile_learns_the_median():
    """1 + theta / 2 with probability 0.7: the median is 2, the value 1.4."""
    assert fixed_point(BIASED, 1)[0, 0] == pytest.approx(2, abs=1e-5)
    config = Config(states=1, quantiles=1, iterations=3_000, discount=0.5, noise="none")
    learned = learn(config, "qtd", BIASED, jax.random.key(0), 0.02)
    assert learned[0, 0] == pytest.approx(2, abs=0.1)
    for reward, sign in ((5.0, 1), (-5.0, -1)):
        step = quantile_td.qtd_update(jnp.array([[0.3]]), stays(reward), 0.9, 0.2) - 0.3
        assert step[0, 0] == pytest.approx(sign * 0.1)


def test_quantile_dynamic_programming_contracts():
    mdp, only = quantile_td.chain("dense", 5, 3), jnp.ones((5, 1))
    project = tabular.to_quantiles(6)

    @jax.jit
    def once(theta):
        state_laws = tabular.Law(theta, jnp.full((5, 6), 1 / 6))
        mixture = tabular.bellman(mdp, 0.7, state_laws)
        return tabular.under_policy(only, project(mixture, None)).atoms

    rng, ratios = np.random.default_rng(0), []
    for _ in range(30):
        a, b = jnp.asarray(np.sort(rng.uniform(-5, 5, (2, 5, 6)), -1), jnp.float32)
        ratios.append(float(jnp.abs(once(a) - once(b)).max() / jnp.abs(a - b).max()))
    assert max(ratios) <= 0.7 + 1e-4
    assert max(ratios) > 0.2


def test_a_constant_reward_shifts_the_fixed_point():
    mdp = quantile_td.with_noise(quantile_td.chain("sparse", 5, 1), "gaussian", 4)
    shifted = mdp._replace(reward=mdp.reward + 0.75)
    difference = fixed_point(shifted, 8, 0.8, 80) - fixed_point(mdp, 8, 0.8, 80)
    np.testing.assert_allclose(difference, np.full((5, 8), 0.75 / 0.2), atol=1e-4)


def test_learning_ends_near_the_fixed_point():
    """With Gaussian noise there are no flat pieces, so the fixed point is one point."""
    mdp = quantile_td.chain("dense", 3, 0)
    config = Config(states=3, quantiles=16, iterations=6_000, discount=0.6, noise="gaussian")
    learned = learn(config, "qtd", mdp, jax.random.key(1), 0.02)
    reached = fixed_point(quantile_td.with_noise(mdp, "gaussian", 40), 16, 0.6, 40)
    assert jnp.abs(learned - reached)[:, 2:-2].max() < 0.35
    assert jnp.abs(learned.mean(-1) - reached.mean(-1)).max() < 0.2


# -- processes and noise ----------------------------------------------------------------------------------------------


def test_chains():
    cycle, sparse, dense = (quantile_td.chain(name, 5, 2) for name in ("cycle", "sparse", "dense"))
    np.testing.assert_array_equal(cycle.next_state[:, 0, 0], [1, 2, 3, 4, 0])
    assert cycle.probability.shape == (5, 1, 1)
    assert sparse.probability.shape == (5, 1, 2)
    assert dense.probability.shape == (5, 1, 5)
    assert all(len(set(row)) == 2 for row in np.asarray(sparse.next_state[:, 0]))
    for mdp in (cycle, sparse, dense):
        np.testing.assert_allclose(mdp.probability.sum(-1), 1, atol=1e-6)
        assert not mdp.terminated.any()
    rewards = np.concatenate([np.asarray(quantile_td.chain("cycle", 5, seed).reward).ravel() for seed in range(200)])
    assert abs(rewards.mean()) < 0.12
    assert 0.9 < rewards.std() < 1.1


ORACLES = {"gaussian": scipy.stats.norm(), "exponential": scipy.stats.expon(-1), "t2": scipy.stats.t(2)}


@pytest.mark.parametrize("noise", ORACLES)
def test_noise_has_its_law_and_mean_zero(noise):
    uniform = np.linspace(0.001, 0.999, 101)
    found = quantile_td.NOISES[noise](jnp.asarray(uniform, jnp.float32))
    np.testing.assert_allclose(found, ORACLES[noise].ppf(uniform), rtol=2e-3, atol=1e-5)
    assert ORACLES[noise].mean() == pytest.approx(0, abs=1e-12)
    mdp = quantile_td.chain("cycle", 5, 0)
    keys = jax.random.split(jax.random.key(3), 800)
    drawn = jax.jit(jax.vmap(lambda key: quantile_td.sample(mdp, noise, key)))(keys)
    added = np.asarray(drawn.reward - mdp.reward[:, 0, 0])
    assert scipy.stats.kstest(added.ravel(), ORACLES[noise].cdf).pvalue > 1e-3
    np.testing.assert_array_equal(drawn.next_state, np.broadcast_to([1, 2, 3, 4, 0], (800, 5)))


def test_the_smallest_and_largest_uniform_give_finite_noise():
    ends = jnp.array([2.0**-24, 1 - 2.0**-24])
    for noise in quantile_td.NOISES.values():
        assert jnp.isfinite(noise(ends)).all()
    np.testing.assert_allclose(quantile_td.NOISES["t2"](ends), [-2896.3, 2896.3], rtol=1e-4)


def test_sampled_successors_have_their_chances():
    mdp = quantile_td.chain("sparse", 5, 4)
    keys = jax.random.split(jax.random.key(5), 4_000)
    drawn = jax.jit(jax.vmap(lambda key: quantile_td.sample(mdp, "none", key)))(keys)
    for state in range(5):
        share = (np.asarray(drawn.next_state[:, state]) == int(mdp.next_state[state, 0, 0])).mean()
        assert share == pytest.approx(float(mdp.probability[state, 0, 0]), abs=4 * np.sqrt(0.25 / 4_000))
    np.testing.assert_array_equal(drawn.reward[0], mdp.reward[:, 0, 0])


def test_noise_as_outcomes():
    mdp = quantile_td.chain("sparse", 4, 0)
    noisy = quantile_td.with_noise(mdp, "t2", 6)
    assert noisy.reward.shape == (4, 1, 12)
    np.testing.assert_allclose(noisy.probability.sum(-1), 1, atol=1e-6)
    added = np.asarray(noisy.reward).reshape(4, 2, 6) - np.asarray(mdp.reward).reshape(4, 2, 1)
    np.testing.assert_allclose(added, np.broadcast_to(scipy.stats.t(2).ppf((np.arange(6) + 0.5) / 6), (4, 2, 6)),
                               atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(noisy.next_state[:, 0, :6], np.repeat(mdp.next_state[:, 0, :1], 6, -1))
    only = jnp.ones((4, 1))
    np.testing.assert_allclose(
        tabular.policy_values(noisy, only, 0.9), tabular.policy_values(mdp, only, 0.9), atol=1e-4
    )


# -- learning ---------------------------------------------------------------------------------------------------------


def test_learning_is_the_slow_loop_on_the_same_transitions():
    config = Config(transition="dense", noise="t2", states=3, quantiles=5, iterations=12, discount=0.9)
    mdp, key = quantile_td.chain("dense", 3, 0), jax.random.key(2)
    theta, values = np.zeros((3, 5)), np.zeros(3)
    for index in range(12):
        reward, next_state, terminated = jax.device_get(quantile_td.sample(mdp, "t2", jax.random.fold_in(key, index)))
        theta = slow_update(theta, reward, next_state, terminated, 0.9, 0.3)
        values = values + 0.3 * (reward + 0.9 * values[next_state] - values)
    np.testing.assert_allclose(learn(config, "qtd", mdp, key, 0.3), theta, atol=1e-5)
    np.testing.assert_allclose(learn(config, "td", mdp, key, 0.3), values, rtol=1e-4, atol=1e-4)


# Two tests run it, so that it compiles once.
SMALL = Config(
    transition="sparse", noise="gaussian", states=3, seeds=3, first_seed=7, iterations=20, quantiles=4, step_sizes=3
)


def test_every_entry_of_a_sweep_is_its_own_run():
    sweeps = quantile_td.compare(SMALL)
    np.testing.assert_allclose(sweeps["td"].step_sizes, [0.25, 0.5, 1])
    np.testing.assert_allclose(sweeps["qtd"].step_sizes, [2, 4, 8])
    for method, sweep in sweeps.items():
        assert sweep.errors.shape == (3, 3)
        for seed, column in ((0, 0), (2, 1)):
            mdp, key = quantile_td.chain("sparse", 3, 7 + seed), jax.random.key(7 + seed)
            learned = learn(SMALL, method, mdp, key, sweep.step_sizes[column])
            values = np.asarray(learned if method == "td" else learned.mean(-1))
            matrix = np.zeros((3, 3))
            for state in range(3):
                matrix[state, np.asarray(mdp.next_state[state, 0])] = mdp.probability[state, 0]
            exact = np.linalg.solve(np.eye(3) - 0.9 * matrix, np.asarray(mdp.reward[:, 0, 0]))
            assert sweep.errors[seed, column] == pytest.approx(np.square(values - exact).mean(), rel=1e-3)
        assert sweep.best == sweep.errors.mean(0).argmin()
        np.testing.assert_array_equal(sweep.best_errors, sweep.errors[:, sweep.best])
    assert sweeps["td"]._replace(best=0).at_edge
    assert sweeps["td"]._replace(best=2).at_edge
    assert not sweeps["td"]._replace(best=1).at_edge


def test_interval_of_a_ratio_draws_seeds_in_pairs():
    numbers = np.random.default_rng(0).uniform(1, 100, 30)
    low, high = quantile_td.ratio_interval(0.5 * numbers, numbers)
    assert low == pytest.approx(0.5)
    assert high == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.proves("algorithms/dynamic_programming/quantile_td.py", "jaxrl_dist/distributional")
def test_quantiles_win_under_heavy_tails_and_lose_where_nothing_is_random():
    ratios = {}
    for transition, noise in (("dense", "t2"), ("cycle", "none")):
        sweeps = quantile_td.compare(Config(transition=transition, noise=noise, quantiles=32))
        ratios[transition] = sweeps["qtd"].best_errors.mean() / sweeps["td"].best_errors.mean()
        if noise == "t2":
            assert not sweeps["td"].at_edge
            assert not sweeps["qtd"].at_edge
    assert ratios["dense"] < 0.6
    assert ratios["cycle"] > 1


# -- the shell --------------------------------------------------------------------------------------------------------


def test_solve_prints_both_methods():
    console = Console(width=140, record=True)
    quantile_td.solve(SMALL, console)
    text = console.export_text()
    assert "QTD / TD" in text
    assert "bias of the fixed point" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"discount": 1.0}, "--discount is 1.0; it must be below 1"),
     ({"seeds": 1}, "--seeds is 1; it must be at least 2"),
     ({"noise": "cauchy"}, "--noise is 'cauchy'; it must be one of none, gaussian"),
     ({"transition": "ring"}, "--transition is 'ring'; it must be one of cycle"),
     ({"transition": "sparse", "states": 1}, "--states is 1; it must be at least 2 for --transition sparse")],
)  # fmt: skip
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        quantile_td.compare(Config(**settings))

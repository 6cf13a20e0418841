"""DRND: the bonus by hand, its count against true counts, whole iterations in numpy, and what is easily got wrong."""

import dataclasses

import by_hand
import distilled_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rnd

from jaxrl_dist.algorithms.policy_gradient import drnd, rnd
from jaxrl_dist.learning import distillation, draws

TINY = distilled_by_hand.TINY | {"num_targets": 3, "distance_weight": 0.6}
ANSWERS = jnp.array([[[1.0, 0.0], [3.0, 2.0], [5.0, -2.0]]])  # one row, three networks, two features
PREDICTION = jnp.array([[2.0, 1.0]])


def count_part(prediction, answers, form):
    return drnd.bonus(jnp.asarray(prediction), jnp.asarray(answers), 0.0, form)


# -- equations --------------------------------------------------------------------------------------------------------


def test_the_bonus_by_hand():
    """Means (3, 0), mean squares (35/3, 8/3); y = (-1.875, 0.375)."""
    assert drnd.bonus(PREDICTION, ANSWERS, 1.0, "sum")[0] == pytest.approx(2)
    assert count_part(PREDICTION, ANSWERS, "sum")[0] == pytest.approx(1.612372, abs=1e-6)
    assert count_part(PREDICTION, ANSWERS, "mean")[0] == pytest.approx(0.806186, abs=1e-6)
    assert count_part(PREDICTION, ANSWERS, "rate")[0] == pytest.approx(1e-3, rel=1e-4)  # the mean of y is below 0
    assert drnd.bonus(PREDICTION, ANSWERS, 0.95, "sum")[0] == pytest.approx(1.980619, abs=1e-6)
    assert drnd.bonus(PREDICTION, ANSWERS, 0.9, "mean")[0] == pytest.approx(0.9 * 2 + 0.1 * 0.806186, abs=1e-6)
    with pytest.raises(AssertionError):
        drnd.bonus(jnp.ones((1, 3)), ANSWERS, 0.5, "sum")


def test_the_estimate_is_one_over_n_for_every_n():
    """All draws of one network from {1, 3, 5}: the predictor at their mean. The mean of y, and how much it varies."""
    answers = jnp.array([1.0, 3.0, 5.0])[None, :, None]
    for n, variance in ((1, 14), (2, 7.0625), (3, 4.6667), (4, 3.4766)):
        means = np.mean(np.stack(np.meshgrid(*[[1.0, 3.0, 5.0]] * n), -1).reshape(-1, n), axis=1)
        y = (means**2 - 9) / (35 / 3 - 9)
        assert y.mean() == pytest.approx(1 / n)
        assert y.var() == pytest.approx(variance, rel=1e-4)
        for mean, one in zip(means, y, strict=True):  # the file's: the root of y's size, within its range
            found = count_part([[mean]], answers, "sum")[0]
            assert found == pytest.approx(np.sqrt(np.clip(abs(one), 1e-6, 1)), rel=1e-3, abs=1e-5)


def test_the_predictor_learns_one_network_per_row():
    """Not one for all rows, and not the mean, from which no count can be read."""
    prediction, answers = jnp.repeat(PREDICTION, 2, 0), jnp.repeat(ANSWERS, 2, 0)
    loss, slope = jax.value_and_grad(drnd.predictor_loss)(
        prediction, answers, jnp.array([0, 2]), jnp.array([True, True])
    )
    assert loss == pytest.approx(((1 + 1) / 2 + (9 + 9) / 2) / 2)
    np.testing.assert_allclose(slope, [[0.5, 0.5], [-1.5, 1.5]])
    assert drnd.predictor_loss(prediction, answers, jnp.array([0, 2]), jnp.array([False, True])) == 9


def test_networks_that_agree_give_a_finite_bonus():
    for form in ("sum", "mean", "rate"):
        for prediction in (jnp.array([[1.0, -2.0]]), jnp.array([[1.5, 0.0]])):
            answers = jnp.tile(jnp.array([1.0, -2.0]), (1, 4, 1))
            assert np.isfinite(drnd.bonus(prediction, answers, 0.9, form)).all()


# -- counting ---------------------------------------------------------------------------------------------------------


def after_draws(n, networks=10, features=512, places=300):
    """Places that were each seen n times by a predictor that keeps the mean of what it was told there."""
    random = np.random.default_rng(n)
    answers = random.normal(size=(places, networks, features))
    times = random.multinomial(n, np.full(networks, 1 / networks), size=places)
    return np.einsum("pn,pnd->pd", times / n, answers), answers


@pytest.mark.parametrize("n", [1, 10, 100])
def test_distance_and_estimate_fall_with_the_count(n):
    prediction, answers = after_draws(n)
    distance = drnd.bonus(jnp.asarray(prediction), jnp.asarray(answers), 1.0, "sum") / 512
    assert distance.mean() == pytest.approx(0.9 / n, rel=0.1)
    rate = count_part(prediction, answers, "rate")
    assert (rate**2).mean() == pytest.approx(1 / n, rel=0.1)


def test_the_bonus_counts_where_rnds_is_blind():
    """The same predictor with one network in place of many is exact after one look, and cannot count to two."""
    for n in (1, 4, 16, 64):
        prediction, answers = after_draws(n)
        counted = 1 / (count_part(prediction, answers, "rate") ** 2).mean()
        assert float(counted) == pytest.approx(n, rel=0.1)
        prediction, answers = after_draws(n, networks=1)
        assert (rnd.bonus(jnp.asarray(prediction), jnp.asarray(answers[:, 0])) < 1e-10).all()


def test_the_codes_form_falls_more_slowly_than_the_root_of_the_count():
    """About n^(-1/4), since a single feature's y differs from 1/n by its root."""
    found = [float(count_part(*after_draws(n), "mean").mean()) for n in (1, 10, 100, 1000)]
    np.testing.assert_allclose(found, [0.663, 0.348, 0.182, 0.103], rtol=0.05)
    rate = [float(count_part(*after_draws(n), "rate").mean()) for n in (1, 10, 100)]
    np.testing.assert_allclose(rate, [1, 10**-0.5, 0.1], rtol=0.1)


def test_more_networks_make_the_first_bonus_less_a_matter_of_luck():
    """One observation that was never seen, networks drawn 100 times: how much its distance varies."""
    config = drnd.Config(target_hidden=(32, 32))
    _, predictor, random_network = distillation.networks_of(config)
    observation = jax.random.normal(jax.random.key(9), (1, 8))
    prediction = predictor.apply(predictor.init(jax.random.key(1), observation), observation)

    def first(key, networks):
        keys = jax.random.split(key, networks)
        target = jax.vmap(random_network.init, (0, None))(keys, observation)
        answers = jax.vmap(random_network.apply, (0, None), 1)(target, observation)
        return drnd.bonus(prediction, answers, 1.0, "sum")[0]

    found = {}
    for networks in (1, 5):
        bonuses = jax.jit(jax.vmap(first, (0, None)), static_argnums=1)(
            jax.random.split(jax.random.key(2), 100), networks
        )
        found[networks] = float(bonuses.std() / bonuses.mean())
    assert found[5] < 0.75 * found[1], found


def test_the_bonus_ranks_places_by_how_seldom_they_were_seen(monkeypatch):
    """Not better than RND's: -0.86 to -0.93 over seeds against -0.93 to -0.94. A predictor that takes steps of one size
    is never at the mean of all draws, only near that of the last ones, so that y says how new a place is no more."""
    correlation = test_rnd.rank_correlation(drnd, monkeypatch)
    assert correlation < -0.8, correlation


# -- whole iterations in numpy ----------------------------------------------------------------------------------------


def bonus_by_hand(prediction, answers, config):
    found = []
    for row in range(len(prediction)):
        distance, roots, estimates = 0.0, [], []
        for feature in range(config.num_features):
            of_all = answers[:, row, feature]
            mean, square = of_all.mean(), (of_all**2).mean()
            distance += (prediction[row, feature] - mean) ** 2
            estimates.append((prediction[row, feature] ** 2 - mean**2) / (square - mean**2 + 1e-8))
            lowest = 1e-6 if config.bonus_count == "sum" else 1e-3
            roots.append(np.sqrt(np.clip(abs(estimates[-1]), lowest, 1)))
        count = {"sum": np.sum(roots), "mean": np.mean(roots), "rate": np.sqrt(max(np.mean(estimates), 1e-6))}
        found.append(config.distance_weight * distance + (1 - config.distance_weight) * count[config.bonus_count])
    return np.array(found)


def choose(key, answers, config):
    key, kept_key, drawn_key = jax.random.split(key, 3)
    rows = answers.shape[1]
    kept = np.asarray(draws.uniform(kept_key, (rows,))) < config.predictor_share
    drawn = np.asarray(draws.integers(drawn_key, (rows,), config.num_targets))  # one for each row, anew each time
    return key, kept, answers[drawn, np.arange(rows)]


@pytest.mark.parametrize("form", ["sum", "rate"])
def test_iterations_equal_loops_in_numpy(form, monkeypatch):
    distilled_by_hand.assert_iterations_are(
        drnd, monkeypatch, bonus_by_hand, choose, **(TINY | {"bonus_count": form}), iterations=2 + (form == "sum")
    )


def test_the_random_networks_differ():
    agent, _ = by_hand.agent_on(drnd, by_hand.Choices(), **TINY)
    kernel = by_hand.quick(agent.init)(jax.random.key(0)).target["params"]["mlp"]["layers"]["kernel_0"]
    assert kernel.shape == (3, 1, 3, 5)
    assert (kernel[0] != kernel[1]).all()
    assert (kernel[1] != kernel[2]).all()


def test_defaults_are_those_of_the_code():
    """Of RND's, with twice as long rollouts."""
    config, of_rnd = dataclasses.asdict(drnd.Config()), dataclasses.asdict(rnd.Config())
    assert {name: x for name, x in config.items() if of_rnd.get(name) != x} == {
        "num_steps": 256, "num_targets": 5, "bonus_count": "sum", "distance_weight": 0.95,
    }  # fmt: skip

"""REValueD: the spec's hand-worked numbers, one critic is DecQN bit for bit, and whole updates in numpy."""

import itertools
import re

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utilities_by_hand

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import decoupled_dqn, revalued
from jaxrl_dist.learning import portable

UTILITIES = jnp.array([[[[1.0, 2], [0, 1]], [[2, 1], [1, 0]], [[0, 3], [0, 2]]]])

# -- targets and losses -----------------------------------------------------------------------------------------------


def test_the_mean_over_critics_comes_before_the_maximum():
    np.testing.assert_allclose(UTILITIES.mean(1), [[[1, 2], [1 / 3, 1]]])
    target = revalued.target_value(by_hand.steps_of([0.0], [1.0]), UTILITIES)
    np.testing.assert_allclose(target, [1.5])
    assert UTILITIES.max(-1).mean() == pytest.approx(11 / 6)  # what the wrong order would make of it
    target = revalued.target_value(by_hand.steps_of([1.0, 1.0], [0.5, 0.0]), jnp.repeat(UTILITIES, 2, axis=0))
    np.testing.assert_allclose(target, [1.75, 1])


def test_all_critics_learn_the_same_target_and_their_losses_add_up():
    values, target = jnp.array([[1.0, 2, 5], [0, 0, 1]]), jnp.array([2.0, 0])
    assert revalued.loss_of(values, target, 1.0) == pytest.approx((0.5 + 0 + 2.5 + 0 + 0 + 0.5) / 2)
    slope = jax.grad(lambda values: revalued.loss_of(values, target, 1.0))(values)
    np.testing.assert_allclose(slope, [[-0.5, 0, 0.5], [0, 0, 0.5]])
    for critic in range(3):  # each as if it were alone
        alone = decoupled_dqn.loss_of(values[:, critic], target, 1.0)
        np.testing.assert_allclose(revalued.loss_of(values[:, critic : critic + 1], target, 1.0), alone)


def test_noise_is_averaged_before_the_maximum():
    """K = 5, N = 4, U(-1, 1) in all utilities: less bias and less variance than a mean of five separate targets has."""
    rows = 100_000
    noise = jax.random.uniform(jax.random.key(0), (rows, 5, 4, 3), minval=-1.0, maxval=1.0)
    together = np.asarray(revalued.target_value(by_hand.steps_of(jnp.zeros(rows), jnp.ones(rows)), noise), np.float64)
    assert together.mean() == pytest.approx(0.2197, abs=2e-3)
    assert together.var() == pytest.approx(0.00903, rel=0.03)
    apart = np.asarray(noise.max(-1).mean((1, 2)), np.float64)
    assert apart.mean() == pytest.approx(0.5, abs=1e-3)
    assert apart.var() == pytest.approx(0.0075, rel=0.03)


def test_regulariser_by_hand():
    """Targets 0.2 and 3 away from the utilities weigh 0.181269 and 0.950213."""
    utilities, remembered = jnp.array([[[1.0, 2]]]), jnp.array([[[2.0, 5]]])

    def one(utilities, remembered, target):
        return revalued.regulariser_of(utilities, remembered, target)

    for target, weights in ((1.2, (0.181269, 1 - np.exp(-0.8))), (-1.0, (1 - np.exp(-2), 0.950213))):
        expected = (weights[0] * 1 + weights[1] * 9) / 2
        value, slopes = jax.value_and_grad(one, (0, 1, 2))(utilities, remembered, jnp.array([target]))
        assert value == pytest.approx(expected, rel=1e-5)
        # Nothing flows through the weights, the target network, or the target.
        np.testing.assert_allclose(slopes[0], [[[-2 * weights[0] * 1 / 2, -2 * weights[1] * 3 / 2]]], rtol=1e-5)
        assert not slopes[1].any()
        assert not slopes[2].any()
    # Mean over the batch, sum over critics; where the target is the utility nothing is held.
    more = jnp.tile(utilities, (3, 2, 1)), jnp.tile(remembered, (3, 2, 1)), jnp.full(3, -1.0)
    assert revalued.regulariser_of(*more) == pytest.approx(2 * float(one(utilities, remembered, jnp.array([-1.0]))))
    assert revalued.regulariser_of(jnp.full((1, 1, 2), 3.0), remembered, jnp.array([3.0])) == 0


# -- one critic without regulariser is DecQN --------------------------------------------------------------------------


@pytest.mark.parametrize("env", [utilities_by_hand.Dials(), utilities_by_hand.Values()], ids=["two_factors", "one"])
def test_one_critic_is_decoupled_dqn_bit_for_bit(env):
    """Single Q-learning, that is: all of the state after twelve iterations, and what is reported of them."""
    settings = utilities_by_hand.SETTINGS | {"num_steps": 3, "polyak": 0.3, "target_period": 2}
    single, _ = by_hand.agent_on(decoupled_dqn, env, **settings, double=False)
    ensemble, _ = by_hand.agent_on(revalued, env, **settings, num_critics=1, regularisation=0.0)

    def run(agent):
        step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
        reported = []
        for _ in range(12):
            state, metrics = step(state)
            reported.append(metrics)
        return state._replace(key=jax.random.key_data(state.key)), reported

    (one, told), (other, more) = run(single), run(ensemble)
    for leaf, same in zip(*map(jax.tree.leaves_with_path, (one, other)), strict=True):
        assert leaf[0] == same[0]
        np.testing.assert_array_equal(leaf[1], same[1], err_msg=str(leaf[0]))
    for first, second in zip(told, more, strict=True):
        for name, metric in first.items():
            np.testing.assert_array_equal(metric.total, second[name].total, err_msg=name)
        assert second["disagreement"].total == 0
        assert second["regulariser"].total >= 0
    assert one.learner.updates == 12


def test_one_critic_and_one_factor_have_dqn_s_target():
    following = jnp.array([[[[0.5, 3, 1]]], [[[2.0, -1, 0]]]])
    target = revalued.target_value(by_hand.steps_of([1.0, 2], [0.9, 0.5]), following)
    np.testing.assert_allclose(target, [1 + 0.9 * 3, 2 + 0.5 * 2])


# -- acting -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three():
    settings = utilities_by_hand.SETTINGS | {"epsilon_start": 0.0, "epsilon_end": 0.0}
    agent, _ = by_hand.agent_on(revalued, utilities_by_hand.Dials(), **settings, num_critics=3)
    return agent, by_hand.quick(agent.init)(jax.random.key(1))


def test_evaluation_is_greedy_for_the_mean_and_exported(three, tmp_path):
    agent, state = three
    observation = 3 * jax.random.normal(jax.random.key(5), (60, 3))
    nets = utilities_by_hand.network(state.learner.network.parameters)
    each = [utilities_by_hand.forward(nets, k, np.asarray(observation, np.float64))[0] for k in range(3)]
    expected = np.mean(each, axis=0)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    np.testing.assert_array_equal(action, expected.argmax(-1))
    assert any((action != one.argmax(-1)).any() for one in each)
    for one in itertools.product(range(3), range(2)):
        law = agent.claim.law(state, observation, jnp.broadcast_to(jnp.array(one), (60, 2)))
        np.testing.assert_allclose(law.atoms[:, 0], (expected[:, 0, one[0]] + expected[:, 1, one[1]]) / 2, atol=1e-5)
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)


def test_exploration_follows_one_critic_drawn_for_each_environment():
    """Critics that want (0, 0), (1, 1) and (2, 0) whatever they see: all are heard alike, and never a mixture."""
    settings = utilities_by_hand.SETTINGS | {
        "epsilon_start": 0.0, "epsilon_end": 0.0, "learning_rate": 0.0, "num_envs": 600, "warmup_steps": 600,
        "replay_capacity": 1200,
    }  # fmt: skip
    agent, _ = by_hand.agent_on(revalued, utilities_by_hand.Dials(), **settings, num_critics=3)
    state = by_hand.quick(agent.init)(jax.random.key(1))
    parameters = jax.tree.map(jnp.zeros_like, state.learner.network.parameters)
    wanted = jnp.array([[[1.0, 0, 0], [1, 0, 0]], [[0, 1, 0], [0, 1, 0]], [[0, 0, 1], [1, 0, 0]]])
    parameters["params"]["utilities"]["bias"] = wanted.reshape(3, 6)
    state = state._replace(learner=by_hand.changed(state.learner, network=parameters))
    state, _ = by_hand.quick(agent.step)(state)
    action = np.asarray(state.experience.replay.rows.action[600:])
    shares = [(action == pair).all(1).mean() for pair in ((0, 0), (1, 1), (2, 0))]
    assert sum(shares) == pytest.approx(1)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"num_critics": 3, "regularisation": 0.7, "polyak": 0.1, "target_period": 1},
        {"num_critics": 2, "regularisation": 0.0, "num_steps": 3, "gradient_bound": 0.1, "huber_threshold": 0.2},
    ],
    ids=["regularised", "three_steps"],
)
def test_updates_equal_loops_in_numpy(settings):
    found = utilities_by_hand.assert_updates_are(revalued, **settings)
    assert (min(one["shrink"] for one in found) < 1) == ("gradient_bound" in settings)
    assert np.mean([one["disagreement"] for one in found]) > 0.01


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_unsuitable_environments_are_refused_in_one_line():
    env, params = envs.make("Pendulum-v1")
    message = "--env-id is Pendulum-v1, whose actions are continuous; this algorithm needs several choices at once"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        revalued.make_agent(revalued.Config(), env, params)
    assert "\n" not in str(error.value)

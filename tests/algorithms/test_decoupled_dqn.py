"""DecQN: the spec's hand-worked numbers, what one factor reduces to, exploration, and whole updates in numpy."""

import itertools
import re

import by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import utilities_by_hand

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import decoupled_dqn, dqn
from jaxrl_dist.learning import factored, portable

UTILITIES = jnp.array([[[1.0, 3, 2], [0, -1, 4]]])

# -- values, targets and losses ---------------------------------------------------------------------------------------


def test_the_best_action_is_the_best_choice_of_every_factor():
    best = factored.best(UTILITIES)
    np.testing.assert_array_equal(best, [[1, 2]])
    assert decoupled_dqn.action_value(UTILITIES, best) == 3.5
    every = [
        float(decoupled_dqn.action_value(UTILITIES, jnp.array([action]))[0])
        for action in itertools.product(range(3), repeat=2)
    ]
    assert len(every) == 9
    assert max(every) == 3.5
    assert np.argmax(every) == 1 * 3 + 2


def test_target_and_gradient_by_hand():
    batch = by_hand.steps_of([1.0, 1.0], [0.99, 0.0])
    following = jnp.array([[[0.5, 1.5, 0], [2, 0, -1]]] * 2)
    target = decoupled_dqn.target_value(batch, following, following)
    np.testing.assert_allclose(target, [2.7325, 1], rtol=1e-6)

    def loss(utilities, following):
        target = decoupled_dqn.target_value(by_hand.steps_of([1.0], [0.99]), following, following)
        return decoupled_dqn.loss_of(decoupled_dqn.action_value(utilities, jnp.array([[1, 2]])), target, 1.0)

    value, (slope, of_next) = jax.value_and_grad(loss, argnums=(0, 1))(UTILITIES, following[:1])
    assert value == pytest.approx(0.7675**2 / 2, rel=1e-5)
    np.testing.assert_allclose(slope, [[[0, 0.38375, 0], [0, 0, 0.38375]]], rtol=1e-5)
    assert not of_next.any()


def test_double_takes_the_online_network_s_choice_in_each_factor():
    following = jnp.array([[[0.0, 10, 20], [1, 2, 3]]])
    choosing = jnp.array([[[5.0, 4, 3], [0, 9, 0]]])
    target = decoupled_dqn.target_value(by_hand.steps_of([1.0], [0.5]), following, choosing)
    np.testing.assert_allclose(target, [1 + 0.5 * (0 + 2) / 2])


def test_far_errors_pull_no_harder_than_the_threshold():
    for error, expected in ((0.5, 0.5), (3.0, 1.0), (-7.0, -1.0)):
        slope = jax.grad(lambda value: decoupled_dqn.loss_of(value, jnp.zeros(1), 1.0))(jnp.array([error]))
        np.testing.assert_allclose(slope, [expected])
    assert decoupled_dqn.loss_of(jnp.array([3.0]), jnp.zeros(1), 1.0) == 2.5
    assert decoupled_dqn.loss_of(jnp.array([3.0]), jnp.zeros(1), 0.0) == 4.5


@pytest.mark.parametrize(
    ("factors", "choices", "mean", "variance"),
    [(1, 3, 0.5, 0.15), (4, 3, 0.5, 0.0375), (8, 3, 0.5, 0.01875), (1, 81, 0.975610, 5.8e-4)],
)
def test_noise_in_utilities_biases_a_target_by_a_half_and_spreads_it_less_the_more_factors(
    factors, choices, mean, variance
):
    """U(-1, 1) in every utility, whose true values are 0. One factor of all 3^4 joint actions is DQN: it is biased
    further and varies less."""
    noise = jax.random.uniform(jax.random.key(factors), (200_000, factors, choices), minval=-1.0, maxval=1.0)
    batch = by_hand.steps_of(jnp.zeros(200_000), jnp.ones(200_000))
    target = np.asarray(decoupled_dqn.target_value(batch, noise, noise), np.float64)
    assert target.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / 200_000))
    assert target.var() == pytest.approx(variance, rel=0.03)


def test_one_factor_is_dqn():
    rng = np.random.default_rng(0)
    following, choosing = (jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(2))
    batch = by_hand.steps_of(jnp.arange(6.0), jnp.linspace(0, 1, 6))
    expected = dqn.target_value(batch, following, choosing)
    np.testing.assert_array_equal(decoupled_dqn.target_value(batch, following[:, None], choosing[:, None]), expected)
    values = decoupled_dqn.action_value(following[:, None], jnp.arange(6)[:, None] % 5)
    np.testing.assert_array_equal(values, following[jnp.arange(6), jnp.arange(6) % 5])
    assert decoupled_dqn.loss_of(values, expected, 1.0) == dqn.loss_of(values, expected, 1.0)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_choices_that_a_factor_lacks_are_never_taken_and_break_nothing():
    network = factored.UtilityNetwork((8, 6), (3, 1, 2), 2)
    observation = 5 * jax.random.normal(jax.random.key(0), (400, 4))
    parameters = network.init(jax.random.key(1), observation[:1])
    utilities = network.apply(parameters, observation)
    assert utilities.shape == (400, 2, 3, 3)
    np.testing.assert_array_equal(jnp.isfinite(utilities).all((0, 1)), [[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    for chosen in (factored.best(utilities), factored.best(utilities.mean(1))):
        assert [len(np.unique(chosen[..., factor])) for factor in range(3)] == [3, 1, 2]
    random = factored.epsilon_greedy(jax.random.key(2), utilities.mean(1), (3, 1, 2), 1.0)
    assert [len(np.unique(random[:, factor])) for factor in range(3)] == [3, 1, 2]

    def loss(parameters):
        utilities = network.apply(parameters, observation).mean(1)
        return decoupled_dqn.action_value(utilities, factored.best(utilities)).mean()

    value, slope = jax.value_and_grad(loss)(parameters)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    head = slope["params"]["utilities"]["bias"].reshape(2, 3, 3)
    np.testing.assert_array_equal((head != 0).any(0), [[1, 1, 1], [1, 0, 0], [1, 1, 0]])


def test_the_network_is_the_one_in_numpy():
    network = factored.UtilityNetwork((12, 9), utilities_by_hand.COUNTS, 3)
    observation = jax.random.normal(jax.random.key(0), (20, 4))
    parameters = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        network.init(jax.random.key(1), observation),
    )
    found, nets = network.apply(parameters, observation), utilities_by_hand.network(parameters)
    for member in range(3):
        expected, _ = utilities_by_hand.forward(nets, member, np.asarray(observation, np.float64))
        np.testing.assert_allclose(found[:, member], expected, rtol=1e-4, atol=1e-5)


# -- acting -----------------------------------------------------------------------------------------------------------


def test_one_coin_decides_for_the_whole_action():
    """Half of the actions are the best one in all ten factors; the others are random in all: a third agrees by luck."""
    utilities = jnp.zeros((20_000, 10, 3)).at[..., 1].set(1.0)
    action = np.asarray(factored.epsilon_greedy(jax.random.key(0), utilities, (3,) * 10, 0.5))
    assert action.dtype == np.int32
    agree = (action == 1).sum(1)
    assert (agree == 10).mean() == pytest.approx(0.5, abs=0.02)
    assert agree[agree < 10].mean() == pytest.approx(10 / 3, abs=0.1)
    np.testing.assert_array_equal(
        factored.epsilon_greedy(jax.random.key(0), utilities, (3,) * 10, 0.0), np.ones((20_000, 10))
    )
    random = np.asarray(factored.epsilon_greedy(jax.random.key(1), utilities, (3,) * 10, 1.0))
    np.testing.assert_allclose([np.bincount(column) / 20_000 for column in random.T], 1 / 3, atol=0.02)


def test_evaluation_is_greedy_and_exported(tmp_path):
    agent, _ = by_hand.agent_on(decoupled_dqn, utilities_by_hand.Dials(), **utilities_by_hand.SETTINGS)
    state = by_hand.quick(agent.init)(jax.random.key(1))
    observation = 3 * jax.random.normal(jax.random.key(5), (60, 3))
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    assert (action.shape, action.dtype) == ((60, 2), jnp.int32)
    values = np.array([
        agent.claim.law(state, observation, jnp.broadcast_to(jnp.array(one), (60, 2))).atoms[:, 0]
        for one in itertools.product(range(3), range(2))
    ])  # fmt: skip
    np.testing.assert_array_equal(action, np.stack(np.unravel_index(values.argmax(0), (3, 2)), 1))
    followed, bonus = agent.claim.policy(state, observation, jax.random.key(1))
    np.testing.assert_array_equal(followed, action)
    assert not bonus.any()
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"double": False, "huber_threshold": 0.0, "polyak": 0.3, "target_period": 1},
        {"num_steps": 3, "gradient_bound": 0.05, "huber_threshold": 0.2},
    ],
    ids=["default", "single", "three_steps"],
)
def test_updates_equal_loops_in_numpy(settings):
    found = utilities_by_hand.assert_updates_are(decoupled_dqn, **settings)
    assert (min(one["shrink"] for one in found) < 1) == ("gradient_bound" in settings)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (gymnax.make("CartPole-v1")[0], "--env-id is CartPole-v1, whose actions are discrete; this algorithm needs se"),
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions are continuous; this algorithm needs"),
        (utilities_by_hand.Unfactored(), "--env-id is Unfactored, whose actions are discrete"),
    ],
)
def test_unsuitable_environments_are_refused_in_one_line(env, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        decoupled_dqn.make_agent(decoupled_dqn.Config(), env, env.default_params)
    assert "\n" not in str(error.value)


def test_every_choice_becomes_right():
    """The spec's toy process after 2,000 updates: in all 81 states."""
    env, params = envs.make("factored")
    settings = {name: x for name, x in decoupled_dqn.PRESETS["factored"].items() if name != "total_steps"}
    agent = decoupled_dqn.make_agent(decoupled_dqn.Config(**settings | {"hidden": (32, 32)}), env, params)

    @jax.jit
    def train(key):
        return jax.lax.fori_loop(0, 1000, lambda _, state: agent.step(state)[0], agent.init(key))

    state = train(jax.random.key(0))
    assert state.learner.updates == 2000
    places = jnp.array([*itertools.product(range(3), repeat=4)])
    observation = jax.nn.one_hot(places, 3).reshape(81, 12)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    np.testing.assert_array_equal(action, places)
    np.testing.assert_allclose(agent.claim.law(state, observation, action).atoms, 1, atol=0.05)

"""DQN's equations by the spec's hand-worked numbers, tabular fixed points, whole updates against loops in numpy."""

import dataclasses
import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import dqn
from jaxrl_dist.learning import experience, networks
from jaxrl_dist.learning.experience import Experience
from jaxrl_dist.learning.interaction import Interaction, Transition
from jaxrl_dist.learning.replay import Replay
from jaxrl_dist.running import training

# -- targets and losses -----------------------------------------------------------------------------------------------

ONLINE, TARGET = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([[4.0, 1.5, 2.5]])


@pytest.mark.parametrize(("choosing", "expected"), [(TARGET, 4.6), (ONLINE, 2.35)], ids=["plain", "double"])
def test_target_by_hand(choosing, expected):
    assert dqn.target_value(by_hand.steps_of([1.0], [0.9]), TARGET, choosing)[0] == pytest.approx(expected)
    assert dqn.target_value(by_hand.steps_of([1.0], [0.0]), TARGET, choosing)[0] == 1


def test_each_transition_has_its_own_maximum():
    values = jnp.array([[1.0, 4.0], [5.0, 2.0]])
    target = dqn.target_value(by_hand.steps_of([0.0, 1.0], [0.5, 0.25]), values, values)
    np.testing.assert_allclose(target, [2, 2.25])


def test_loss_by_hand():
    for error, loss, slope in ((0.5, 0.125, 0.5), (1.0, 0.5, 1.0), (3.0, 2.5, 1.0), (-3.0, 2.5, -1.0)):
        value, gradient = jax.value_and_grad(dqn.loss_of)(jnp.array([2 + error]), jnp.array([2.0]), 1.0)
        assert (value, gradient[0]) == (loss, slope)
    # The mean over the batch, not the sum.
    value, gradient = jax.value_and_grad(dqn.loss_of)(jnp.array([0.5, 1.0, 3.0]), jnp.zeros(3), 1.0)
    assert value == pytest.approx(3.125 / 3)
    np.testing.assert_allclose(gradient, [0.5 / 3, 1 / 3, 1 / 3])
    # A wide threshold makes it half the square, and so does none.
    for threshold in (100.0, 1e9, 0.0):
        value, gradient = jax.value_and_grad(dqn.loss_of)(jnp.array([7.0]), jnp.zeros(1), threshold)
        assert (value, gradient[0]) == (24.5, 7)


def test_no_gradient_flows_through_the_target():
    def loss(values, next_values):
        target = dqn.target_value(by_hand.steps_of([1.0], [0.9]), next_values, next_values)
        return dqn.loss_of(values, target, 1.0)

    of_values, of_next = jax.grad(loss, argnums=(0, 1))(jnp.array([5.0]), TARGET)
    assert of_values[0] != 0
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 3)))


def test_maximisation_bias():
    """Four actions of value 0, estimated with standard normal errors: the largest is worth 1.0294, a second one 0."""
    first, second = jax.random.normal(jax.random.key(0), (2, 400_000, 4))
    batch = by_hand.steps_of(jnp.zeros(len(first)), jnp.ones(len(first)))
    assert dqn.target_value(batch, first, first).mean() == pytest.approx(1.0294, abs=0.01)
    assert dqn.target_value(batch, first, second).mean() == pytest.approx(0, abs=0.01)


# -- fixed points -----------------------------------------------------------------------------------------------------


def tabular_fixed_point(terminated, truncated, gamma=0.9, num_steps=1, reward=1.0, threshold=0.0) -> float:
    """Value of one state with one action, by targets from a replay and steps of size 1 on the loss."""
    size = len(terminated)
    seen = jnp.zeros((size, 1))
    flags = jnp.asarray(terminated), jnp.asarray(truncated)
    rows = Transition(seen, jnp.zeros(size, jnp.int32), jnp.full(size, reward), seen, *flags)
    one_environment = Interaction(None, None, jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1))
    stored = Experience(Replay(rows, jnp.int32(0), jnp.int32(size)), one_environment, None)
    batch = experience.batch_at(stored, jnp.arange(size), num_steps=num_steps, gamma=gamma)

    def sweep(value, _):
        target = dqn.target_value(batch, jnp.full((size, 1), value), jnp.full((size, 1), value))

        def loss(value):
            return dqn.loss_of(networks.at_action(jnp.full((size, 1), value), batch.action), target, threshold)

        return value - jax.grad(loss)(value), None

    return float(jax.lax.scan(sweep, jnp.float32(0.5), length=2000)[0])


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_time_limit_is_no_end(num_steps):
    """A loop with reward 1 and a limit of ten steps is worth 10; 6.5132 if the limit were taken for an end."""
    limit = np.arange(10) == 9
    assert tabular_fixed_point(np.zeros(10, bool), limit, num_steps=num_steps) == pytest.approx(10, rel=1e-4)


def test_geometric_end():
    """Reward 1, and an end with probability 1/4 after it: 1 / (1 - 0.9 0.75) = 3.076923."""
    last = np.arange(4) == 3
    assert tabular_fixed_point(last, np.zeros(4, bool)) == pytest.approx(3.076923, rel=1e-5)


def test_returns_of_a_hundred_by_default():
    """The same process in large rewards, worth 100. Atari's threshold makes it worth what never ending would be: the
    three of four targets that go on pull it to 325 against the one that ends."""
    last, rewards = np.arange(4) == 3, 100 * (1 - 0.9 * 0.75)
    worth = functools.partial(tabular_fixed_point, last, np.zeros(4, bool), reward=rewards)
    assert worth(threshold=dqn.Config().huber_threshold) == pytest.approx(100, rel=1e-4)
    assert worth(threshold=1.0) > 300


def test_tabular_update_is_an_assignment():
    """One-hot states, a linear network and step size 1 make Q-learning: the entry becomes the target."""
    table = jnp.array([[0.5, -0.25], [1.0, 0.75], [0.0, 0.25]])
    state, action, following = jnp.array([1]), jnp.array([0]), jnp.array([2])
    target = dqn.target_value(by_hand.steps_of([1.0], [0.8]), table[following], table[following])

    def loss(table):
        return dqn.loss_of(networks.at_action(jax.nn.one_hot(state, 3) @ table, action), target, 1.0)

    np.testing.assert_allclose(table - jax.grad(loss)(table), table.at[1, 0].set(1.2), rtol=1e-6)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_row(double=False, threshold=1.0):
    def row(predicted, following, choosing, reward, discount):
        best = np.argmax(choosing[:, 0] if double else following[:, 0])
        target = reward + discount * following[best, 0]
        error = predicted[0] - target
        return {
            "slope": np.clip(error, -threshold, threshold), "value": predicted[0], "target": target,
            "loss": error**2 / 2 if abs(error) <= threshold else threshold * (abs(error) - threshold / 2),
            "disagree": np.argmax(choosing[:, 0]) != np.argmax(following[:, 0]), "large": abs(error) > threshold,
        }  # fmt: skip

    return row


@pytest.mark.parametrize(
    "settings",
    [{}, {"double": True, "num_steps": 3}, {"dueling": True, "double": True, "huber_threshold": 0.3}],
    ids=["plain", "double_three_steps", "dueling"],
)
def test_updates_equal_loops_in_numpy(settings):
    settings = {"huber_threshold": 0.5} | settings
    found = by_hand.assert_updates_are(
        dqn, slow_row(settings.get("double", False), settings["huber_threshold"]), **settings
    )
    # Both networks chose differently, and both branches of the Huber loss were taken.
    assert np.mean([one["disagree"] for one in found]) > 0
    assert 0 < np.mean([one["large"] for one in found]) < 1


def test_dueling_heads_start_from_values_of_the_state_and_advantages():
    agent, _ = by_hand.agent_on(dqn, by_hand.Choices(), **by_hand.TINY_VALUE, dueling=True)
    shapes = jax.eval_shape(agent.init, jax.random.key(0)).learner.network.parameters["params"]["head"]
    assert shapes["value"]["layers"]["kernel_1"].shape == (1, 9, 1)
    assert shapes["advantage"]["layers"]["kernel_1"].shape == (1, 9, 3)


# -- runs side by side ------------------------------------------------------------------------------------------------


def test_runs_side_by_side_are_the_runs_alone():
    env = by_hand.Choices()
    config = dataclasses.replace(dqn.Config(), **by_hand.TINY_VALUE)
    train = training.make_train(
        dqn.make_agent, config, env, env.default_params, total_steps=64, evaluations=2, eval_episodes=3
    )

    def plain(key):
        state, history = train(key)
        return state._replace(key=jax.random.key_data(state.key)), history

    together = by_hand.quick(jax.vmap(plain))(jax.random.split(jax.random.key(0), 2))
    alone = by_hand.quick(plain)
    for run, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        for one, both in zip(jax.tree.leaves(alone(key)), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(both[run], one, rtol=1e-4, atol=1e-5)
    first, second = together[1]["evaluation_return"]
    assert not np.allclose(first, second)

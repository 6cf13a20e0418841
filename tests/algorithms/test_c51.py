"""C51's loss by the spec's hand-worked numbers, its targets, and whole updates against loops in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import c51
from jaxrl_dist.distributional import categorical

SUPPORT = jnp.arange(-2.0, 3.0)
MASSES = jnp.array([[0.1, 0.2, 0.4, 0.2, 0.1]])


# -- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.5, 0.9, [0.03, 0.15, 0.32, 0.32, 0.18]),
        (0.25, 0.5, [0, 0.125, 0.525, 0.325, 0.025]),
        (0.0, 1.0, [0.1, 0.2, 0.4, 0.2, 0.1]),
        (0.5, 0.0, [0, 0, 0.5, 0.5, 0]),  # the end of an episode leaves a law: all of its mass is at the reward
        (-7.0, 0.0, [1, 0, 0, 0, 0]),
    ],
)
def test_target_by_hand(reward, discount, expected):
    target = c51.target_masses(by_hand.steps_of([reward], [discount]), MASSES, SUPPORT)
    np.testing.assert_allclose(target, [expected], atol=1e-6)


def test_loss_by_hand():
    logits = jnp.array([[0, 0.5, -0.5, 1, 0]])
    target = jnp.array([[0.03, 0.15, 0.32, 0.32, 0.18]])
    loss, gradient = jax.value_and_grad(c51.loss_of)(logits, target)
    assert loss == pytest.approx(1.707122, rel=1e-6)
    np.testing.assert_allclose(gradient, [[0.113399, 0.086426, -0.233024, 0.069800, -0.036601]], atol=1e-6)
    # The mean over the batch, not the sum.
    assert c51.loss_of(jnp.repeat(logits, 3, 0), jnp.repeat(target, 3, 0)) == pytest.approx(1.707122, rel=1e-6)


def test_no_gradient_flows_through_the_target():
    def loss(logits, next_logits):
        batch = by_hand.steps_of([0.5], [0.9])
        return c51.loss_of(logits, c51.target_masses(batch, jax.nn.softmax(next_logits), SUPPORT))

    of_logits, of_next = jax.grad(loss, argnums=(0, 1))(jnp.arange(5.0)[None], jnp.zeros((1, 5)))
    assert jnp.abs(of_logits).max() > 0.1
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 5)))


def test_loss_of_certain_predictions_is_finite():
    loss, gradient = jax.value_and_grad(c51.loss_of)(jnp.array([[0.0, -300, -300, -300, 0]]), MASSES)
    assert loss == pytest.approx(0.8 * 300 + np.log(2), rel=1e-5)
    np.testing.assert_allclose(gradient, [[0.4, -0.2, -0.4, -0.2, 0.4]], atol=1e-6)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_row(v_min, v_max, num_atoms):
    support, gap = np.linspace(v_min, v_max, num_atoms), (v_max - v_min) / (num_atoms - 1)

    def row(predicted, following, choosing, reward, discount):
        next_masses = by_hand.softmax(following)
        best = np.argmax(next_masses @ support)
        target, clipped = np.zeros(num_atoms), 0.0
        for atom, mass in zip(support, next_masses[best], strict=True):
            moved = reward + discount * atom
            clipped += mass * (moved < v_min or moved > v_max)
            place = (min(max(moved, v_min), v_max) - v_min) / gap
            below = int(np.floor(place))
            target[below] += mass * (below + 1 - place)
            if place > below:
                target[below + 1] += mass * (place - below)
        masses = by_hand.softmax(predicted)
        return {
            "slope": masses - target, "loss": -(target * np.log(masses)).sum(), "value": masses @ support,
            "target": target @ support, "clipped_mass": clipped,
            "most_likely": np.argmax(next_masses.max(-1)) != best,
        }  # fmt: skip

    return row


def test_updates_equal_loops_in_numpy():
    settings = {"v_min": -1.5, "v_max": 2.0, "num_atoms": 8}
    found = by_hand.assert_updates_are(c51, slow_row(**settings), **settings)
    assert np.mean([one["clipped_mass"] for one in found]) > 0.01
    # The action of the highest mean is not the one whose likeliest return is the most likely.
    assert np.mean([one["most_likely"] for one in found]) > 0


def test_updates_over_three_steps_equal_loops_in_numpy():
    settings = {"v_min": -8.0, "v_max": 9.0, "num_atoms": 5}
    by_hand.assert_updates_are(c51, slow_row(**settings), **settings, num_steps=3)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_clipped_mass_tells_a_support_that_is_too_narrow():
    env = by_hand.Choices()

    def share(bound):
        config = dataclasses.replace(c51.Config(), **by_hand.TINY_VALUE, v_min=-bound, v_max=bound)
        agent = c51.make_agent(config, env, env.default_params)
        metric = agent.step(agent.init(jax.random.key(0)))[1]["clipped_mass"]
        return metric.total / metric.count

    narrow, wide = by_hand.quick(lambda bounds: jax.lax.map(share, bounds))(jnp.array([0.3, 100.0]))
    assert narrow > 0.3
    assert wide < 0.05


def test_support_reaches_from_v_min_to_v_max():
    agent, config = by_hand.agent_on(c51, by_hand.Choices(), **by_hand.TINY_VALUE, v_min=-3.0, v_max=5.0, num_atoms=5)

    def predict(key):
        state = agent.init(key)
        observation = state.experience.interaction.observation
        return agent.claim.law(state, observation, jnp.zeros(2, jnp.int32))

    law = by_hand.quick(predict)(jax.random.key(0))
    np.testing.assert_allclose(law.atoms, [[-3, -1, 1, 3, 5]] * 2)
    np.testing.assert_array_equal(law.atoms[0], categorical.support(config.v_min, config.v_max, config.num_atoms))

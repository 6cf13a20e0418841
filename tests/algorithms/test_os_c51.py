"""OS-C51's target by the sheet's numbers, whole updates against loops in numpy, and the exact laws that it learns."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.dynamic_programming import one_step
from jaxrl_dist.algorithms.value_based import c51, dqn, os_c51
from jaxrl_dist.distributional import categorical, metrics, tabular
from jaxrl_dist.distributional.law import Law

SUPPORT = jnp.arange(-2.0, 3.0)

# -- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.5, [0, 0, 0.5, 0.5, 0]),
        (2.7, [0, 0, 0, 0, 1]),
        (-7.0, [1, 0, 0, 0, 0]),
        (1.0, [0, 0, 0, 1, 0]),  # between no two atoms
        (2.0, [0, 0, 0, 0, 1]),
        (-1.75, [0.75, 0.25, 0, 0, 0]),
    ],
)
def test_two_hot_by_hand(target, expected):
    found = os_c51.target_masses(jnp.array([target]), SUPPORT)
    np.testing.assert_allclose(found, [expected], atol=1e-6)
    assert found[0] @ SUPPORT == pytest.approx(np.clip(target, -2, 2), abs=1e-6)


def test_the_mean_target_is_that_of_dqn():
    values = jnp.array([[0.25, 1.0, -1.0], [-0.5, -1.5, -0.75], [0.3, 0.1, 0.2]])
    batch = by_hand.steps_of([0.5, 0.25, 1.0], [0.9, 0.5, 0.0])
    found = os_c51.target_value(batch, values)
    np.testing.assert_allclose(found, [1.4, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(found, dqn.target_value(batch, values, values))
    np.testing.assert_allclose(os_c51.target_masses(found, SUPPORT) @ SUPPORT, found, atol=1e-6)


def test_the_target_is_that_of_c51_where_the_next_law_is_a_point():
    batch, atoms = by_hand.steps_of([0.5, 0.25, -3.0, 0.7], [0.9, 0.5, 1.0, 0.0]), jnp.array([3, 0, 4, 2])
    points = jax.nn.one_hot(atoms, 5)
    wanted = c51.target_masses(batch, points, SUPPORT)
    found = os_c51.target_masses(os_c51.target_value(batch, SUPPORT[atoms][:, None]), SUPPORT)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # And is not where it spreads.
    spread = jnp.full((4, 5), 0.2)
    found = os_c51.target_masses(os_c51.target_value(batch, jnp.zeros((4, 1))), SUPPORT)
    assert jnp.abs(found - c51.target_masses(batch, spread, SUPPORT))[0].max() > 0.2


def test_gradient_is_the_prediction_less_the_two_hot_target():
    logits = jnp.array([[0, 0.5, -0.5, 1, 0]])
    target = os_c51.target_masses(jnp.array([0.5]), SUPPORT)
    loss, gradient = jax.value_and_grad(os_c51.loss_of)(logits, target)
    masses = by_hand.softmax(np.asarray(logits, np.float64))
    np.testing.assert_allclose(gradient, masses - [[0, 0, 0.5, 0.5, 0]], atol=1e-6)
    assert loss == pytest.approx(-0.5 * np.log(masses[0, 2] * masses[0, 3]), rel=1e-6)
    # The mean over the batch, not the sum.
    assert os_c51.loss_of(jnp.repeat(logits, 3, 0), jnp.repeat(target, 3, 0)) == pytest.approx(float(loss), rel=1e-6)


def test_no_gradient_flows_through_the_target():
    def loss(logits, next_values):
        target = os_c51.target_value(by_hand.steps_of([0.5], [0.9]), next_values)
        return os_c51.loss_of(logits, os_c51.target_masses(target, SUPPORT))

    of_logits, of_next = jax.grad(loss, argnums=(0, 1))(jnp.arange(5.0)[None], jnp.array([[0.3, 0.1]]))
    assert jnp.abs(of_logits).max() > 0.1
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 2)))


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_row(v_min, v_max, num_atoms):
    support, gap = np.linspace(v_min, v_max, num_atoms), (v_max - v_min) / (num_atoms - 1)

    def row(predicted, following, choosing, reward, discount):
        values = by_hand.softmax(following) @ support
        moved = reward + discount * max(values)
        place = (min(max(moved, v_min), v_max) - v_min) / gap
        below = min(int(np.floor(place)), num_atoms - 2)
        target = np.zeros(num_atoms)
        target[below], target[below + 1] = below + 1 - place, place - below
        masses = by_hand.softmax(predicted)
        return {
            "slope": masses - target, "loss": -(target * np.log(masses)).sum(), "value": masses @ support,
            "target": target @ support, "clipped_mass": float(moved < v_min or moved > v_max),
            "disagree": np.argmax(by_hand.softmax(choosing) @ support) != np.argmax(values),
        }  # fmt: skip

    return row


def test_updates_equal_loops_in_numpy():
    settings = {"v_min": -1.0, "v_max": 1.0, "num_atoms": 8}
    found = by_hand.assert_updates_are(os_c51, slow_row(**settings), **settings, learning_rate=0.1, target_period=7)
    assert 0 < np.mean([one["clipped_mass"] for one in found]) < 1
    # The two networks prefer different actions somewhere: it is the target network that chooses.
    assert np.mean([one["disagree"] for one in found]) > 0


def test_updates_over_three_steps_equal_loops_in_numpy():
    settings = {"v_min": -8.0, "v_max": 9.0, "num_atoms": 5}
    by_hand.assert_updates_are(os_c51, slow_row(**settings), **settings, num_steps=3)


# -- the law of one step, and what is said of it ----------------------------------------------------------------------


def test_risk_is_not_offered():
    """A law of one step is not that of the return, so nothing is read from it but its mean."""
    assert {field.name for field in dataclasses.fields(c51.Config)} - {
        field.name for field in dataclasses.fields(os_c51.Config)
    } == {"risk"}
    agent, config = by_hand.agent_on(
        os_c51, by_hand.Choices(), **by_hand.TINY_VALUE, v_min=-3.0, v_max=5.0, num_atoms=5
    )

    def predict(key):
        state = agent.init(key)
        observation, action = state.experience.interaction.observation, jnp.array([2, 0])
        logits = os_c51.Network(config.hidden, 3, 5).apply(state.learner.network.parameters, observation)
        return agent.claim.law(state, observation, action), logits[jnp.arange(2), action]

    law, logits = by_hand.quick(predict)(jax.random.key(0))
    np.testing.assert_allclose(law.atoms[:, 0], by_hand.softmax(np.asarray(logits)) @ [-3, -1, 1, 3, 5], rtol=1e-5)
    np.testing.assert_array_equal(law.masses, np.ones((2, 1)))


def test_converges_to_the_exact_one_step_laws(proof):
    """As C51 in test_exact_laws, on the same process: one-hot observations, so that only the update decides."""
    env, params = envs.make("tabular/garnet", states=5, actions=2, branching=2, end_probability=0.2, seed=3)
    config = os_c51.Config(
        num_envs=8, updates_per_iteration=1, warmup_steps=2_000, replay_capacity=24_000, batch_size=128, discount=0.8,
        target_period=25, epsilon_start=1.0, epsilon_end=1.0, hidden=(48,), v_min=-10.0, v_max=14.0, num_atoms=97,
    )  # fmt: skip
    support = categorical.support(config.v_min, config.v_max, config.num_atoms)
    problem = one_step.Problem(params.mdp, config.discount, support)

    def train(config, key):
        def phase(state, step_size):
            agent = os_c51.make_agent(dataclasses.replace(config, learning_rate=step_size), env, params)
            return jax.lax.fori_loop(0, 700, lambda _, state: agent.step(state)[0], state), None

        agent = os_c51.make_agent(config, env, params)
        state, _ = jax.lax.scan(phase, agent.init(key), jnp.array([1e-2, 3e-3, 1e-3, 3e-4]))
        logits = os_c51.Network(config.hidden, 2, config.num_atoms).apply(state.learner.network.parameters, jnp.eye(5))
        return jax.nn.softmax(logits)

    proof(proofs.program(train, config, jax.random.key(0)))

    def exact(operator):
        return one_step.iterate(operator, one_step.initial_masses(problem), support, 60)[0]

    found = by_hand.quick(train)(config, jax.random.key(0))
    wanted = by_hand.quick(lambda: exact(lambda masses, _: one_step.one_step_operator(masses, problem)))()
    full = by_hand.quick(lambda: exact(lambda masses, _: one_step.full_operator(masses, problem)))()
    np.testing.assert_allclose(wanted @ support, tabular.optimal_values(params.mdp, 0.8, 100), atol=1e-3)
    # The replay holds about 2,000 transitions per pair, whose frequencies alone are off by 0.05 or so.
    assert metrics.wasserstein_1(Law(support, found), Law(support, wanted)).max() < 0.25
    # The laws of full returns, with the same means, are further away, every one of them.
    assert metrics.wasserstein_1(Law(support, found), Law(support, full)).min() > 0.6

"""Processes with vector rewards: contract, exact joint laws against samples and by hand, what `check_env` sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_environments import Line, Results

from jaxrl_dist import envs
from jaxrl_dist.distributional import joint, tabular
from jaxrl_dist.envs import EnvironmentCheckError, check_env, multi_reward
from jaxrl_dist.learning import interaction

every_generator = pytest.mark.parametrize("env_id", multi_reward.GENERATORS)


def uniform(env) -> np.ndarray:
    return np.full((env.num_states, env.num_actions), 1 / env.num_actions)


def correlation(covariance: np.ndarray) -> float:
    return covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])


# -- contract ---------------------------------------------------------------------------------------------------------


@every_generator
def test_contract(env_id):
    env, params = envs.make(env_id)
    assert env.name == env_id
    assert [warning for warning in check_env(env, params) if "not checked" not in warning] == []
    row = interaction.transition_like(env, params)
    assert row.extras["rewards"].shape == (env.num_rewards,)
    np.testing.assert_allclose(params.mdp.probability.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(params.rewards.sum(-1), params.mdp.reward, atol=1e-6)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="draws is 0, allowed: 1 and above"):
        envs.make("multi_reward/exclusive", draws=0)


def test_a_maze_closes_what_was_left_and_takes_what_was_paid():
    """Right, down: two cells of the exclusive maze, whose images are known."""
    env, params = envs.make("multi_reward/exclusive")
    observation, state = env.reset(jax.random.key(0), params)
    assert observation.shape == (5, 5, 4)
    agent, closed, first, second = jnp.moveaxis(observation, -1, 0)
    assert agent[0, 0] == agent.sum() == 1
    assert closed.sum() == 25 - 13  # four stages of three cells, and the last one
    assert {tuple(map(int, at)) for at in np.argwhere(first)} == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert {tuple(map(int, at)) for at in np.argwhere(second)} == {(1, 0), (2, 1), (3, 2), (4, 3)}
    # Up and left are no ways: nothing happens.
    for action in (0, 3):
        stayed, _, reward, terminated, _, info = env.step(jax.random.key(1), state, action, params)
        np.testing.assert_array_equal(stayed, observation)
        assert (reward, terminated) == (0, False)
        np.testing.assert_array_equal(info["rewards"], [0, 0])
    observation, state, reward, *_, info = env.step(jax.random.key(2), state, 1, params)
    assert reward == info["rewards"][0] > 0
    assert float(reward) in (np.float32(0.3), np.float32(0.5))
    assert info["rewards"][1] == 0
    agent, closed, first, second = jnp.moveaxis(observation, -1, 0)
    assert agent[0, 1] == closed[0, 0] == 1
    assert first[0, 1] == 0
    assert second[1, 0] == 1  # the other patch of this stage is still there, out of reach
    # Back is closed, down leads on.
    _, back, *_ = env.step(jax.random.key(3), state, 3, params)
    assert back.state == state.state
    observation, *_ = env.step(jax.random.key(4), state, 2, params)
    assert observation[1, 1, 0] == 1


@pytest.mark.parametrize(("env_id", "length"), [("exclusive", 9), ("inclusive", 14)])
def test_mazes_end_at_their_exits(env_id, length):
    env, params = envs.make(f"multi_reward/{env_id}")
    state = multi_reward.TabularState(time=jnp.int32(0), state=jnp.int32(0), ended=jnp.zeros((), bool))
    for _ in range(length):  # the first way that is open
        mdp = jax.tree.map(lambda x: np.asarray(x)[int(state.state), :, 0], params.mdp)
        moves = np.flatnonzero((mdp.next_state != int(state.state)) | mdp.terminated)
        _, state, _, ended, _ = env.step_env(jax.random.key(0), state, int(moves[0]), params)
    assert ended


# -- exact laws -------------------------------------------------------------------------------------------------------


def test_the_coin_has_its_closed_form():
    """Z1 is uniform on [0, 2] and Z2 = 2 - Z1: means 1, variances 1/3, correlation -1."""
    env = multi_reward.coin()
    mean, covariance = multi_reward.joint_moments(env.default_params, uniform(env), 0.5)
    np.testing.assert_allclose(mean, [[1, 1]])
    np.testing.assert_allclose(covariance, [[[1 / 3, -1 / 3], [-1 / 3, 1 / 3]]])
    law = multi_reward.joint_law(env.default_params, uniform(env), 0.5, 0, steps=9)
    grid = np.arange(512) / 256  # sums of 9 binary digits
    np.testing.assert_allclose(law.atoms[:, 0], grid, atol=1e-9)
    np.testing.assert_allclose(law.atoms.sum(-1), np.full(512, 2 - 1 / 256), atol=1e-8)
    np.testing.assert_allclose(law.masses, np.full(512, 1 / 512))


def test_parity_is_pairwise_independent_and_not_jointly():
    env = multi_reward.parity()
    law = multi_reward.joint_law(env.default_params, uniform(env), 1.0, 0, steps=3)
    np.testing.assert_array_equal(law.atoms, [[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]])
    np.testing.assert_allclose(law.masses, np.full(4, 0.25))
    np.testing.assert_allclose(joint.covariance(law), 0.25 * np.eye(3), atol=1e-7)
    alone = joint.independent(law)
    assert len(alone.masses) == 8
    # 2 E|X-Y| - E|X-X'| - E|Y-Y'| with distances 0, 1, sqrt 2, sqrt 3 by the number of coordinates that differ.
    cross = (3 + 3 * np.sqrt(2) + np.sqrt(3)) / 8
    assert joint.energy_distance(law, alone) == pytest.approx(2 * cross - 3 * np.sqrt(2) / 4 - cross, abs=1e-9)
    later = multi_reward.joint_law(env.default_params, uniform(env), 0.5, 2, steps=3)  # after a 1
    np.testing.assert_allclose(later.atoms, [[0, 0, 0.5], [0, 1, 0]])


@pytest.mark.parametrize(("env_id", "sign"), [("exclusive", -1), ("inclusive", 1)])
def test_mazes_by_hand(env_id, sign):
    """Stages of one or the other, of both or of none: n ~ B(4, 1/2) or B(3, 1/2) patches of means 0.4 and 0.65, each of
    two values 0.1 or 0.125 to either side of it."""
    env = getattr(multi_reward, env_id)()
    params, stages = env.default_params, 4 if env_id == "exclusive" else 3
    expected_mean = np.array([0.4, 0.65]) * stages / 2
    variance = np.array([0.4, 0.65]) ** 2 * stages / 4 + np.array([0.1, 0.125]) ** 2 * stages / 2
    across = sign * 0.4 * 0.65 * stages / 4
    mean, covariance = multi_reward.joint_moments(params, uniform(env), 1.0)
    np.testing.assert_allclose(mean[0], expected_mean, rtol=1e-6)
    np.testing.assert_allclose(covariance[0], [[variance[0], across], [across, variance[1]]], rtol=1e-6, atol=1e-7)
    law = multi_reward.joint_law(params, uniform(env), 1.0, 0, steps=400)
    assert law.masses.sum() == pytest.approx(1)
    np.testing.assert_allclose(joint.mean(law), expected_mean, rtol=1e-5)
    np.testing.assert_allclose(joint.covariance(law), covariance[0], rtol=1e-4, atol=1e-6)
    assert sign * correlation(covariance[0]) > 0.9
    # The sign of the paper stays with its discount.
    assert sign * correlation(multi_reward.joint_moments(params, uniform(env), 0.99)[1][0]) > 0.85


@every_generator
def test_moments_and_laws_are_those_of_samples(env_id):
    """Against frequencies of the environment itself, discount 0.9, from its start."""
    env, params = envs.make(env_id)
    mean, covariance = multi_reward.joint_moments(params, uniform(env), 0.9)
    lanes, steps = 4_000, 100

    def one(carry, time):
        now, alive, total = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(1), time))
        action = interaction.random_action(env, params, action_key, lanes)
        now, lived, _ = interaction.step(env, params, now, action, step_key)
        total += jnp.where(alive, 0.9**time, 0)[:, None] * lived.extras["rewards"]
        return (now, alive & ~(lived.terminated | lived.truncated), total), None

    def sample(key):
        now = interaction.start(env, params, key, lanes)
        carry = now, jnp.ones(lanes, bool), jnp.zeros((lanes, env.num_rewards))
        return jax.lax.scan(one, carry, jnp.arange(steps))[0][2]

    drawn = np.asarray(jax.jit(sample)(jax.random.key(0)), np.float64)
    error = drawn.std(0) / np.sqrt(lanes)
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean[0]), 4.5 * error + 1e-4)
    scale = np.abs(covariance[0]).max()
    np.testing.assert_allclose(np.cov(drawn.T), covariance[0], atol=0.1 * scale)
    # The law of the sum has the value that dynamic programming finds for the summed rewards.
    values = tabular.policy_values(params.mdp, jnp.asarray(uniform(env)), 0.9)
    np.testing.assert_allclose(mean.sum(-1), values.mean(-1), rtol=1e-4, atol=1e-5)


def test_the_better_component_is_not_the_better_sum():
    env = multi_reward.branches()
    first = [
        multi_reward.joint_law(env.default_params, uniform(env), 1.0, 0, action=action, steps=200) for action in (3, 1)
    ]
    left, right = (np.asarray(joint.mean(law)) for law in first)
    assert left[0] > right[0]
    assert left.sum() < right.sum()
    values = np.asarray(tabular.optimal_values(env.default_params.mdp, 0.99))[0]
    assert values.argmax() == 1
    assert values[1] - values[3] > 0.5


# -- what is checked of any environment -------------------------------------------------------------------------------


class Vector(Results):
    """The line's reward in two parts."""

    def parts(self, reward, state):
        return {"rewards": jnp.stack([2 * reward, -reward])}

    def change(self, observation, state, reward, terminated, truncated, info):
        return observation, state, reward, terminated, truncated, info | self.parts(reward, state)


class ScalarRewards(Vector):
    """info['rewards'] is float32[], allowed: a vector of floating-point numbers"""

    def parts(self, reward, state):
        return {"rewards": reward}


class NoRewards(Vector):
    """info['rewards'] is float32[0], allowed: a vector of floating-point numbers"""

    def parts(self, reward, state):
        return {"rewards": jnp.zeros(0)}


class IntegerRewards(Vector):
    """info['rewards'] is int32[2], allowed: a vector of floating-point numbers"""

    def parts(self, reward, state):
        return {"rewards": jnp.zeros(2, jnp.int32)}


class ListOfRewards(Vector):
    """info['rewards'] is list, allowed: a vector of floating-point numbers"""

    def parts(self, reward, state):
        return {"rewards": [reward, reward]}


class VectorOfCosts(Vector):
    """info['cost'] is float32[2], allowed: one floating-point number"""

    def parts(self, reward, state):
        return {"cost": jnp.zeros(2)}


class InfiniteRewards(Vector):
    """info['rewards'] is not finite"""

    def parts(self, reward, state):
        return {"rewards": jnp.stack([reward, jnp.where(state.time == 2, jnp.nan, 0)])}


@pytest.mark.parametrize(
    "broken", [ScalarRewards, NoRewards, IntegerRewards, ListOfRewards, VectorOfCosts, InfiniteRewards],
    ids=lambda broken: broken.__name__,
)  # fmt: skip
def test_every_broken_rule_is_named(broken):
    with pytest.raises(EnvironmentCheckError) as error:
        check_env(broken())
    assert broken.__doc__ in str(error.value)


def test_parts_that_do_not_add_up_are_a_warning():
    class AddsUpToMore(Vector):
        def parts(self, reward, state):
            return {"rewards": jnp.stack([reward, 0.5 + 0 * reward])}

    (warning,) = check_env(AddsUpToMore())
    assert "info['rewards'] does not add up to the reward" in warning
    assert check_env(Vector()) == check_env(Line()) == []

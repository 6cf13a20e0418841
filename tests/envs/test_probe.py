import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.envs import make
from jaxrl_dist.envs.probe import CASES, Probe, probe_params

GAMMA = 0.9


def episode(env, params, action, seed=0, steps=6):
    """[(observation, reward, terminated, truncated, final observation)] for a constant action."""
    key_reset, key = jax.random.split(jax.random.key(seed))
    observation, state = env.reset(key_reset, params)
    rows = []
    for key_step in jax.random.split(key, steps):
        following, state, reward, terminated, truncated, info = env.step(key_step, state, action, params)
        rows.append((float(observation[0]), float(reward), bool(terminated), bool(truncated)))
        rows[-1] += (float(info["final_observation"][0]),)
        observation = following
    return rows


# By hand: (observation, reward, terminated, truncated, final observation) of one episode for the action 0.25,
# with s the random sign.
EXPECTED = {
    "constant": lambda s: [(0, 1, True, False, 0)],
    "observation": lambda s: [(s, s, True, False, s)],
    "discounting": lambda s: [(0, 0, False, False, 1), (1, 1, True, False, 1)],
    "action": lambda s: [(0, -0.0625, True, False, 0)],  # -(0.25 - 0.5)^2
    "action_observation": lambda s: [(s, -0.0625 if s == 1 else -0.5625, True, False, s)],  # -(0.25 + 0.5)^2
    "time_limit": lambda s: [(0, 1, False, False, 0), (0, 1, False, False, 0), (0, 1, False, True, 0)],
    "final_observation": lambda s: [(s, s, False, False, s), (s, s, False, False, s), (s, s, False, True, s)],
}


@pytest.mark.parametrize("case", CASES)
def test_episodes_by_hand(case):
    env = Probe()
    rows = episode(env, probe_params(case, max_steps_in_episode=3), jnp.array([0.25]))
    length = len(EXPECTED[case](1))
    for begin in range(0, len(rows), length):
        sign = 1 if rows[begin][0] == 1 else -1
        np.testing.assert_allclose(rows[begin : begin + length], EXPECTED[case](sign))


def test_observations_take_both_signs_in_one_lane():
    rows = episode(Probe(), probe_params("observation"), jnp.zeros(1), steps=20)
    assert {row[0] for row in rows} == {-1.0, 1.0}


@pytest.mark.parametrize("discrete_actions", [0, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_optimal_value_is_the_return_of_optimal_actions(case, discrete_actions):
    """Rolled out with a time limit so far away that what lies beyond it is below the tolerance."""
    env, params = Probe(discrete_actions), probe_params(case, max_steps_in_episode=1000)

    reset, step = jax.vmap(env.reset, in_axes=(0, None)), jax.vmap(env.step, in_axes=(0, 0, 0, None))

    @jax.jit
    def rollout(key):
        key_reset, key = jax.random.split(key)
        observation, state = reset(jax.random.split(key_reset, 8), params)

        def body(carry, key_step):
            observation, state, weight = carry
            action = env.optimal_action(params, observation)
            observation, state, reward, terminated, *_ = step(jax.random.split(key_step, 8), state, action, params)
            return (observation, state, GAMMA * weight * (1 - terminated)), weight * reward

        _, rewards = jax.lax.scan(body, (observation, state, jnp.ones(8)), jax.random.split(key, 200))
        return rewards.sum(0), env.optimal_value(params, observation, GAMMA)

    returns, values = rollout(jax.random.key(1))
    np.testing.assert_allclose(returns, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_values_by_hand(case):
    expected = {
        "constant": {0: 1},
        "observation": {-1: -1, 1: 1},
        "discounting": {0: 0.9, 1: 1},
        "action": {0: 0},
        "action_observation": {-1: 0, 1: 0},
        "time_limit": {0: 10},
        "final_observation": {-1: -10, 1: 10},
    }[case]
    for observation, value in expected.items():
        got = Probe().optimal_value(probe_params(case), jnp.array([float(observation)]), GAMMA)
        np.testing.assert_allclose(got, value, rtol=1e-6)


def test_no_action_beats_the_optimal_one():
    for discrete_actions in (0, 3):
        env = Probe(discrete_actions)
        actions = jnp.arange(3) if discrete_actions else jnp.linspace(-1, 1, 41)[:, None]
        for case in CASES:
            for observation in (-1.0, 0.0, 1.0):
                batch = jnp.full((len(actions), 1), observation)
                values = env.action_value(probe_params(case), batch, actions, GAMMA)
                best = env.optimal_value(probe_params(case), jnp.array([observation]), GAMMA)
                assert values.max() <= best + 1e-6
                if case.startswith("action"):
                    assert values.min() < best - 0.1


def test_discrete_rewards():
    env = Probe(discrete_actions=3)

    def reward(case, observation, action):
        return float(env.action_value(probe_params(case), jnp.array([float(observation)]), jnp.int32(action), GAMMA))

    assert [reward("action", 0, a) for a in range(3)] == [-1, 1, -1]
    assert [reward("action_observation", 1, a) for a in range(3)] == [-1, 1, -1]
    assert [reward("action_observation", -1, a) for a in range(3)] == [1, -1, -1]


def test_one_compiled_step_for_all_cases_and_vmap_over_them():
    env, _ = make("probe")
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[probe_params(case) for case in CASES])
    key_reset, key_step = (jax.random.split(jax.random.key(seed), len(CASES)) for seed in (0, 1))
    traces = 0

    def start_and_step(key_reset, key_step, params):
        nonlocal traces
        traces += 1
        _, state = env.reset(key_reset, params)
        return env.step(key_step, state, jnp.array([0.25]), params)

    together = jax.jit(jax.vmap(start_and_step))(jax.random.clone(key_reset), jax.random.clone(key_step), batch)
    traces = 0
    alone = jax.jit(start_and_step)
    for i in range(len(CASES)):
        one = alone(jax.random.clone(key_reset)[i], jax.random.clone(key_step)[i], probe_params(i))
        for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(left, right[i])
    assert traces == 1


def test_no_weak_types():
    env, params = make("probe")
    traces = 0

    @jax.jit
    def step(*arguments):
        nonlocal traces
        traces += 1
        return env.step(*arguments)

    observation, state = env.reset(jax.random.key(0), params)
    for seed in range(3):
        observation, state, reward, *_ = step(jax.random.key(seed), state, jnp.zeros(1), params)
    assert traces == 1
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((observation, state, reward)))


@pytest.mark.parametrize("case", ["values", 7, -1, 1.0, True, None])
def test_unknown_case(case):
    with pytest.raises(ValueError, match=r"case is .*allowed: constant, .*0 to 6"):
        probe_params(case)


@pytest.mark.parametrize("actions", [-1, 1])
def test_bad_number_of_actions(actions):
    with pytest.raises(ValueError, match=rf"discrete_actions is {actions}, allowed: 0"):
        Probe(discrete_actions=actions)

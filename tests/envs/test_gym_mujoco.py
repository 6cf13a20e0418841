"""Gymnasium's MuJoCo tasks under MJX, against Gymnasium's own."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mujoco import mjx

from jaxrl_dist import envs
from jaxrl_dist.envs import gym_mujoco, registry
from jaxrl_dist.envs.rescaling import rescale_actions


def both(name: str):
    """Gymnasium's task and ours, not rescaled."""
    return gymnasium.make(name, disable_env_checker=True), gym_mujoco.TASKS[name]()


def actions_of(theirs, count: int, seed: int = 0) -> np.ndarray:
    space = theirs.action_space
    return np.random.default_rng(seed).uniform(space.low, space.high, (count, *space.shape)).astype(np.float32)


def as_ours(theirs, ours) -> mjx.Data:
    """MuJoCo's data as MJX's."""
    data = theirs.unwrapped.data
    return mjx.put_data(ours.mujoco_model, data, impl="jax")


def test_the_names_listed_are_those_of_the_tasks():
    assert set(registry.MUJOCO) == set(gym_mujoco.TASKS)


@pytest.mark.parametrize("name", registry.MUJOCO)
def test_spaces_limits_and_starts(name):
    """Those of Gymnasium, and the first observation of the same state."""
    theirs, ours = both(name)
    params = ours.default_params
    assert ours.observation_space(params).shape == theirs.observation_space.shape
    np.testing.assert_allclose(ours.action_space(params).low, theirs.action_space.low)
    np.testing.assert_allclose(ours.action_space(params).high, theirs.action_space.high)
    assert params.max_steps_in_episode == theirs.spec.max_episode_steps
    assert ours.step_seconds == pytest.approx(theirs.unwrapped.dt)

    observation, state = jax.jit(ours.reset_env)(jax.random.key(3), params)
    theirs.reset(seed=0)
    theirs.unwrapped.set_state(np.asarray(state.qpos, np.float64), np.asarray(state.qvel, np.float64))
    np.testing.assert_allclose(observation, theirs.unwrapped._get_obs(), atol=2e-5)


@pytest.mark.parametrize("name", registry.MUJOCO)
def test_starts_are_drawn_from_the_same_law(name):
    """Mean, deviation and tails of every position and velocity, of 4,000 starts of each."""
    theirs, ours = both(name)
    start = jax.jit(jax.vmap(ours.start, (0, None)))
    qpos, qvel = start(jax.random.split(jax.random.key(0), 4000), ours.default_params)
    found = np.concatenate([qpos, qvel], 1)
    task, wanted = theirs.unwrapped, []
    theirs.reset(seed=0)
    task.set_state = lambda qpos, qvel: wanted.append(np.concatenate([qpos, qvel]))
    task._get_obs = lambda: None
    for _ in range(4000):
        task.reset_model()
    wanted = np.array(wanted)
    scale = wanted.std(0) + 1e-9
    np.testing.assert_allclose((found.mean(0) - wanted.mean(0)) / scale, 0.0, atol=0.11)
    np.testing.assert_allclose(found.std(0) / scale, wanted.std(0) / scale, atol=0.06)
    for share in (0.02, 0.98):  # a uniform law ends where a normal one goes on
        apart = np.quantile(found, share, 0) - np.quantile(wanted, share, 0)
        np.testing.assert_allclose(apart / scale, 0.0, atol=0.25)


@pytest.mark.parametrize("name", registry.MUJOCO)
def test_what_is_observed_paid_and_ended_of_the_same_simulation(name):
    """Both read MuJoCo's own data, along an episode of random actions until it has ended for a while."""
    theirs, ours = both(name)
    task, params = theirs.unwrapped, ours.default_params
    theirs.reset(seed=1)

    @jax.jit
    def read(before, after, action):
        reward, terminated = ours.outcome((ours.place(after) - before) / ours.step_seconds, after, action, params)
        return ours.observe(after, params), reward, terminated, ours.place(after)

    place = ours.place(as_ours(theirs, ours))
    endings = []
    steps = 200 if name == "Walker2d-v5" else 60
    for action in actions_of(theirs, steps):
        observation, reward, terminated, _, _ = task.step(action)
        found = read(place, as_ours(theirs, ours), action)
        np.testing.assert_allclose(found[0], observation, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], reward, rtol=1e-4, atol=1e-3)
        assert bool(found[2]) == terminated
        endings.append(terminated)
        place = found[3]
    if name in ("Hopper-v5", "InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Humanoid-v5", "Walker2d-v5"):
        assert 0 < sum(endings) < steps  # so both were seen


@pytest.mark.parametrize(("name", "atol"), [("InvertedPendulum-v5", 1e-5), ("Hopper-v5", 1e-3)])
def test_twenty_steps_from_the_same_state(name, atol):
    """Observations, rewards and endings; the others are in `experiments/mujoco_physics`: each compiles for a minute."""
    theirs, ours = both(name)
    params = ours.default_params
    actions = 0.3 * actions_of(theirs, 20, seed=2)
    _, state = jax.jit(ours.reset_env)(jax.random.key(1), params)
    theirs.reset(seed=0)
    theirs.unwrapped.set_state(np.asarray(state.qpos, np.float64), np.asarray(state.qvel, np.float64))

    def step(state, action):
        observation, state, reward, terminated, _ = ours.step_env(jax.random.key(0), state, action, params)
        return state, (observation, reward, terminated)

    _, found = jax.jit(lambda state, actions: jax.lax.scan(step, state, actions))(state, jnp.asarray(actions))
    for i, action in enumerate(actions):
        observation, reward, terminated, _, _ = theirs.unwrapped.step(action)
        np.testing.assert_allclose(found[0][i], observation, atol=atol)
        np.testing.assert_allclose(found[1][i], reward, atol=atol)
        assert bool(found[2][i]) == terminated


def test_options_and_actions_as_the_registry_makes_them():
    env, params = envs.make(
        "mujoco/Hopper-v5", healthy_reward="2.5", terminate_when_unhealthy="False", healthy_z_range="(0.5, 2.0)",
        exclude_current_positions_from_observation="False", max_steps_in_episode="100",
    )  # fmt: skip
    assert (params.healthy_reward, params.terminate_when_unhealthy, params.healthy_z_range) == (2.5, False, (0.5, 2.0))
    assert params.max_steps_in_episode == 100
    assert env.observation_space(params).shape == (12,)
    pendulum = gym_mujoco.TASKS["InvertedPendulum-v5"]()
    space = rescale_actions(pendulum, pendulum.default_params).action_space(pendulum.default_params)
    assert (np.min(space.low), np.max(space.high)) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="contact_cost_weight"):
        envs.make("mujoco/Hopper-v5", contact_cost_weight="1.0")
    with pytest.raises(ValueError, match="mujoco/Hopper-v5"):
        envs.make("mujoco/Hopper-v4")

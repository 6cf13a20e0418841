"""What stands around an environment by `--env-options`: stacked frames, sticky actions, other rewards, limits, time."""

import dataclasses

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist import envs
from jaxrl_dist.envs import gym_wrappers
from jaxrl_dist.envs.check import check_env
from jaxrl_dist.learning import interaction


@struct.dataclass
class CountState(environment.EnvState):
    time: jax.Array
    start: jax.Array
    last: jax.Array


@struct.dataclass
class NoLimit:
    length: int = 3


class Counting:
    """Without a time limit of its own: shows its start, the step, and the last action; ends after `length` steps with
    a reward of 10 times the step. Observations are (dict of) arrays if `structured`."""

    name = "counting"

    def __init__(self, structured: bool = False):
        self.structured = structured

    default_params = NoLimit(length=3)
    num_actions = 3

    def action_space(self, params=None):
        return spaces.Discrete(3)

    def observation_space(self, params=None):
        box = spaces.Box(-np.inf, np.inf, (3,))
        return spaces.Dict({"seen": box, "action": spaces.Discrete(3)}) if self.structured else box

    def seen(self, state):
        vector = jnp.stack([state.start, state.time.astype(jnp.float32), state.last.astype(jnp.float32)])
        return {"seen": vector, "action": state.last} if self.structured else vector

    def reset(self, key, params):
        state = CountState(jnp.int32(0), jax.random.uniform(key), jnp.int32(0))
        return self.seen(state), state

    def step(self, key, state, action, params):
        following = CountState(state.time + 1, state.start, jnp.asarray(action, jnp.int32))
        terminated = following.time >= params.length
        final = self.seen(following)
        reset = self.reset(key, params)
        observation, state = jax.tree.map(lambda new, old: jnp.where(terminated, new, old), reset, (final, following))
        reward = 10.0 * following.time.astype(jnp.float32)
        return observation, state, reward, terminated, jnp.zeros((), bool), {"final_observation": final}


def play(env, params, actions, seed=0):
    """`(observation, reward, terminated, truncated, final)` of every step, after the first observation."""
    observation, state = env.reset(jax.random.key(seed), params)
    rows = []
    for number, action in enumerate(actions):
        key = jax.random.fold_in(jax.random.key(seed + 1), number)
        seen, state, reward, terminated, truncated, info = env.step(key, state, jnp.asarray(action), params)
        rows.append((np.asarray(seen), float(reward), bool(terminated), bool(truncated), info))
    return np.asarray(observation), rows


def test_frames_are_joined_along_the_last_axis_and_begin_again_with_an_episode():
    env = gym_wrappers.FrameStack(Counting(), 2)
    first, rows = play(env, Counting.default_params, [1, 2, 1, 2])
    start = first[0]
    np.testing.assert_allclose(first, [start, 0, 0, start, 0, 0])
    np.testing.assert_allclose(rows[0][0], [start, 0, 0, start, 1, 1])
    np.testing.assert_allclose(rows[1][0], [start, 1, 1, start, 2, 2])
    assert rows[2][2]
    np.testing.assert_allclose(rows[2][4]["final_observation"], [start, 2, 2, start, 3, 1])
    again = rows[2][0][0]
    assert again != start
    np.testing.assert_allclose(rows[2][0], [again, 0, 0, again, 0, 0])
    np.testing.assert_allclose(rows[3][0], [again, 0, 0, again, 1, 2])


def test_images_are_stacked_by_channel():
    env, params = envs.make("Breakout-MinAtar", frame_stack="3")
    single = envs.make("Breakout-MinAtar")[0].observation_space(params).shape
    assert env.observation_space(params).shape == (*single[:2], 3 * single[2])
    observation, _ = env.reset(jax.random.key(0), params)
    assert observation.shape == env.observation_space(params).shape
    np.testing.assert_array_equal(observation[..., : single[2]], observation[..., single[2] : 2 * single[2]])


def test_sticky_actions_repeat_with_their_chance_and_never_at_the_start():
    env, params = gym_wrappers.StickyActions(Counting(), 0.25), NoLimit(length=2)

    def pair(key):
        keys = jax.random.split(key, 4)
        _, state = env.reset(keys[0], params)
        first, state, *_ = env.step(keys[1], state, jnp.int32(1), params)
        *_, info = env.step(keys[2], state, jnp.int32(2), params)
        return first[2], info["final_observation"][2]

    first, second = jax.jit(jax.vmap(pair))(jax.random.split(jax.random.key(0), 4000))
    assert set(np.asarray(first)) == {1.0}
    assert set(np.asarray(second)) == {1.0, 2.0}
    assert np.mean(np.asarray(second) == 1) == pytest.approx(0.25, abs=0.025)  # 3.6 standard errors


def test_learners_see_changed_rewards_and_episodes_are_measured_by_the_old_ones():
    env, params = gym_wrappers.ChangedRewards(Counting(), 0.1, 1.5), Counting.default_params
    _, rows = play(env, params, [0, 0, 0])
    np.testing.assert_allclose([row[1] for row in rows], [1.0, 1.5, 1.5])
    np.testing.assert_allclose([row[4]["unchanged_reward"] for row in rows], [10, 20, 30])
    now = interaction.start(env, params, jax.random.key(0), 2)
    for number in range(3):
        now, lived, metrics = interaction.step(env, params, now, jnp.zeros(2, jnp.int32), jax.random.key(number))
    np.testing.assert_allclose(lived.reward, [1.5, 1.5])
    assert float(metrics["episode_return"].total) == 2 * 60


def test_vectors_of_rewards_are_scaled_but_not_cut():
    env, params = envs.make("joint_coin" if "joint_coin" in envs.available()["multi_reward"] else
                            envs.available()["multi_reward"][0], scale_rewards="0.5")  # fmt: skip
    _, state = env.reset(jax.random.key(0), params)
    *_, reward, _, _, info = env.step(jax.random.key(1), state, jnp.int32(0), params)
    assert float(info["rewards"].sum()) == pytest.approx(float(reward), abs=1e-6)
    assert float(info["unchanged_reward"]) == pytest.approx(2 * float(reward), abs=1e-6)
    cut = gym_wrappers.ChangedRewards(env.env, 1.0, 1.0)
    with pytest.raises(ValueError, match="vector of rewards"):
        cut.step(jax.random.key(1), state, jnp.int32(0), params)


def test_a_limit_truncates_starts_afresh_and_yields_to_the_environments_own_end():
    env = gym_wrappers.TimeLimit(Counting(), 2)
    first, rows = play(env, NoLimit(length=5), [1, 2, 1])
    assert [row[2:4] for row in rows] == [(False, False), (False, True), (False, False)]
    np.testing.assert_allclose(rows[1][4]["final_observation"], [first[0], 2, 2])
    np.testing.assert_allclose(rows[1][0][1:], [0, 0])
    assert rows[1][0][0] != first[0]
    _, rows = play(env, NoLimit(length=1), [1, 1, 1])
    assert [row[2:4] for row in rows] == [(True, False)] * 3
    _, rows = play(env, NoLimit(length=2), [1, 1])
    assert rows[1][2:4] == (True, True)


def test_time_is_seen_as_a_share_of_the_limit():
    env, params = envs.make("CartPole-v1", time_aware="True", max_steps_in_episode="4")
    assert env.observation_space(params).shape == (5,)
    first, rows = play(env, params, [0, 1, 0, 1, 0])
    assert first[-1] == 0
    np.testing.assert_allclose([row[0][-1] for row in rows], [0.25, 0.5, 0.75, 0.0, 0.25])
    assert rows[3][4]["final_observation"][-1] == 1.0


def test_structured_observations_become_vectors():
    env = gym_wrappers.flat_observations(Counting(structured=True), Counting.default_params)
    first, rows = play(env, Counting.default_params, [2])
    assert env.observation_space(None).shape == (6,)
    np.testing.assert_allclose(first, [1, 0, 0, first[3], 0, 0])  # by the order of the keys: action, seen
    np.testing.assert_allclose(rows[0][0], [0, 0, 1, first[3], 1, 2])
    np.testing.assert_allclose(rows[0][4]["final_observation"], rows[0][0])


@pytest.mark.parametrize(
    "options",
    [{"frame_stack": 3}, {"sticky_actions": 0.5}, {"scale_rewards": 0.1, "clip_rewards": 1.0}, {"time_aware": True},
     {"sticky_actions": 0.1, "frame_stack": 2, "time_aware": True}],
)  # fmt: skip
def test_the_contract_holds_around_cartpole(options):
    env, params = envs.make("CartPole-v1", **options)
    assert check_env(env, params) == [] or options.get("time_aware")
    assert dataclasses.is_dataclass(env)


def test_the_contract_holds_with_a_limit_around_an_environment_without_one():
    assert check_env(gym_wrappers.TimeLimit(Counting(), 2), Counting.default_params, seed=1) is not None


def test_they_may_stand_around_each_other_and_inside_a_stock():
    env, params = envs.make("stock/CartPole-v1", frame_stack="2")
    assert env.observation_space(params).shape == (9,)
    observation, state = env.reset(jax.random.key(0), params)
    assert observation.shape == (9,)
    assert env.step(jax.random.key(1), state, jnp.int32(0), params)[0].shape == (9,)


@pytest.mark.parametrize(
    ("env_id", "option", "complaint"),
    [
        ("CartPole-v1", {"frame_stack": "0"}, "frame_stack is 0"),
        ("CartPole-v1", {"sticky_actions": "1.0"}, "sticky_actions is 1.0"),
        ("CartPole-v1", {"scale_rewards": "-1.0"}, "scale_rewards is -1.0"),
        ("CartPole-v1", {"time_limit": "5"}, "max_steps_in_episode"),
        ("Breakout-MinAtar", {"time_aware": "True"}, "no vectors"),
        ("CartPole-v1", {"frames": "2"}, "frame_stack"),
    ],
)
def test_bad_options(env_id, option, complaint):
    with pytest.raises(ValueError, match=complaint):
        envs.make(env_id, **option)


def test_nothing_is_added_where_nothing_is_asked_for():
    assert type(envs.make("CartPole-v1", frame_stack="1")[0]) is type(gymnax.make("CartPole-v1")[0])

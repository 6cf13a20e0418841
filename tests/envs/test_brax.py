"""brax/hopper, compiled once for all tests of this file (a compilation takes several seconds)."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.envs import make

LANES, LIMIT, STEPS = 4, 3, 7


@pytest.fixture(scope="module")
def hopper():
    return make("brax/hopper", max_steps_in_episode=LIMIT)


@pytest.fixture(scope="module")
def rollout(hopper):
    """Every step of LANES environments with random actions, the true successor by `step_env`, and counted traces."""
    env, params = hopper
    traces = collections.Counter()

    def counted(function):
        def traced(*arguments):
            traces[function.__name__] += 1
            return function(*arguments)

        return traced

    reset = jax.jit(jax.vmap(counted(env.reset), in_axes=(0, None)))
    step = jax.jit(jax.vmap(counted(env.step), in_axes=(0, 0, 0, None)))
    step_env = jax.jit(jax.vmap(env.step_env, in_axes=(0, 0, 0, None)))
    rng = np.random.default_rng(0)

    observation, state = reset(jax.random.split(jax.random.key(0), LANES), params)
    rows = [{"observation": observation}]
    for t in range(STEPS):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), t), LANES)
        action = jnp.asarray(rng.uniform(-1, 1, (LANES, 3)), jnp.float32)
        successor, _, _, dead, _ = step_env(jax.random.clone(keys), state, action, params)
        key_reset = jax.vmap(lambda key: jax.random.split(key)[1])(jax.random.clone(keys))
        start, _ = reset(key_reset, params)
        observation, state, reward, terminated, truncated, info = step(keys, state, action, params)
        rows.append(
            {
                "observation": observation,
                "state": state,
                "reward": reward,
                "terminated": terminated,
                "truncated": truncated,
                "info": info,
                "successor": successor,
                "dead": dead,
                "start": start,
            }
        )
    return rows, step, reset, traces


def test_the_jitted_step_compiles_once(rollout):
    assert rollout[3] == {"reset": 1, "step": 1}


def test_truncated_at_the_time_limit_and_nowhere_else(rollout):
    for t, row in enumerate(rollout[0][1:], 1):
        np.testing.assert_array_equal(row["truncated"], np.full(LANES, t % LIMIT == 0))
        np.testing.assert_array_equal(row["terminated"], np.zeros(LANES, bool))  # nobody falls within three steps


def test_final_observation_is_the_true_successor(rollout):
    for row in rollout[0][1:]:
        np.testing.assert_allclose(row["info"]["final_observation"], row["successor"], rtol=1e-4, atol=1e-5)
        if not np.any(row["truncated"]):
            np.testing.assert_array_equal(row["info"]["final_observation"], row["observation"])


def test_the_next_episode_is_a_fresh_start_by_key(rollout):
    for t, row in enumerate(rollout[0][1:], 1):
        if t % LIMIT == 0:
            np.testing.assert_allclose(row["observation"], row["start"], rtol=1e-4, atol=1e-6)
            assert np.abs(row["observation"] - row["info"]["final_observation"]).max() > 0.01
            np.testing.assert_array_equal(row["state"].time, np.zeros(LANES))


def test_starts_differ_between_episodes_and_lanes(rollout):
    starts = np.stack([np.asarray(rollout[0][t]["observation"]) for t in (0, LIMIT, 2 * LIMIT)])  # [episode, lane, :]
    starts = starts.reshape(-1, starts.shape[-1])
    distances = np.abs(starts[:, None] - starts[None]).max(-1) + np.eye(len(starts))
    assert distances.min() > 1e-4
    assert np.abs(starts - starts.mean(0)).max() < 0.02  # and they are starts: the noise is ±0.005


def test_termination_is_brax_done_and_may_meet_the_limit(hopper, rollout):
    _, params = hopper
    _, step, reset, _ = rollout
    _, state = reset(jax.random.split(jax.random.key(3), LANES), params)
    # Thrown down: the first two lanes with a torso far below the healthy height, the second also at its last step.
    fallen = jnp.arange(LANES) < 2
    q = state.brax.pipeline_state.q
    x = state.brax.pipeline_state.x
    lowered = jnp.where(fallen, -1.0, 0.0)
    physics = state.brax.pipeline_state
    physics = physics.replace(
        x=x.replace(pos=x.pos.at[:, :, 2].add(lowered[:, None])),
        x_i=physics.x_i.replace(pos=physics.x_i.pos.at[:, :, 2].add(lowered[:, None])),
        q=q.at[:, 1].add(lowered),
    )
    time = jnp.array([0, LIMIT - 1, 0, LIMIT - 1], jnp.int32)
    state = state.replace(brax=state.brax.replace(pipeline_state=physics), time=time)
    keys = jax.random.split(jax.random.key(4), LANES)
    _, after, _, terminated, truncated, _ = step(keys, state, jnp.zeros((LANES, 3)), params)
    np.testing.assert_array_equal(terminated, [True, True, False, False])
    np.testing.assert_array_equal(truncated, [False, True, False, True])
    np.testing.assert_array_equal(after.time, [0, 0, 1, 0])


def test_step_does_not_change_the_state_it_is_given(hopper):
    """brax writes into the dict of metrics that it is handed."""
    env, params = hopper
    _, state = jax.eval_shape(env.reset, jax.random.key(0), params)
    kept = {}

    def step(state):
        before = dict(state.brax.metrics)
        env.step_env(jax.random.key(0), state, jnp.zeros(3), params)
        kept.update({name: state.brax.metrics[name] is before[name] for name in before})

    jax.eval_shape(step, state)
    assert kept
    assert all(kept.values())


def test_spaces(hopper):
    env, params = hopper
    assert env.name == "brax/hopper"
    assert (env.action_space(params).low, env.action_space(params).high) == (-1, 1)
    assert env.action_space(params).shape == (3,)
    assert env.observation_space(params).shape == (11,)
    assert env.default_params.max_steps_in_episode == 1000
    assert params.max_steps_in_episode == LIMIT


def test_backend_is_an_option():
    env, _ = make("brax/inverted_pendulum", backend="generalized")
    assert env.env.backend == "generalized"
    assert make("brax/inverted_pendulum")[0].env.backend == "spring"


def test_bad_backends():
    with pytest.raises(
        ValueError, match=r"backend of brax/hopper is 'bullet', allowed: spring, positional, gener.*mjx"
    ):
        make("brax/hopper", backend="bullet")
    with pytest.raises(ValueError, match=r"backend of brax/fast is 'spring', allowed: no backend"):
        make("brax/fast", backend="spring")


def test_brax_constructor_arguments_are_options():
    env, _ = make("brax/hopper", terminate_when_unhealthy="false", healthy_reward="2")
    assert env.env._terminate_when_unhealthy is False
    assert env.env._healthy_reward == 2.0
    with pytest.raises(ValueError, match=r"option 'gravity' .* is unknown, allowed: .*healthy_reward.*max_steps_in_ep"):
        make("brax/hopper", gravity=1.0)

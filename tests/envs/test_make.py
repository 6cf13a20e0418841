import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from gymnax.registration import registered_envs
from toy_environments import Line, WideLine

from jaxrl_dist.envs import available, make, rescale_actions


def test_available_lists_every_family():
    families = available()
    assert set(families) == {
        "gymnax", "brax", "mujoco", "probe", "bridge", "comb_lock", "factored", "maze", "multi_reward", "tabular",
        "token", "velocity_free", "stock", "discretised",
    }  # fmt: skip
    assert set(registered_envs) - set(families["gymnax"]) == {"MNISTBandit-bsuite"}
    assert len(families["brax"]) == 12
    assert "brax/hopper" in families["brax"]
    assert families["probe"] == ["probe"]
    assert families["bridge"] == ["bridge"]


@pytest.mark.slow
@pytest.mark.proves("envs", "constraints.txt")
@pytest.mark.parametrize("env_id", available()["gymnax"])
def test_every_gymnax_environment_steps(env_id):
    env, params = make(env_id)
    key_reset, key_action, key_step = jax.random.split(jax.random.key(0), 3)
    observation, state = env.reset(key_reset, params)
    space = env.action_space(params)
    assert isinstance(space, spaces.Discrete) or (np.all(space.low == -1) and np.all(space.high == 1))
    result = env.step(key_step, state, space.sample(key_action), params)
    assert len(result) == 6
    following, _, reward, terminated, truncated, info = result
    assert following.shape == observation.shape == env.observation_space(params).shape
    assert np.isfinite(reward)
    if not (terminated or truncated):
        np.testing.assert_array_equal(info["final_observation"], following)
    assert params.max_steps_in_episode >= 1


@pytest.mark.slow
@pytest.mark.proves("envs", "constraints.txt")
@pytest.mark.parametrize("env_id", available()["brax"])
def test_every_brax_environment_traces_with_stable_types(env_id):
    env, params = make(env_id)
    key = jax.random.key(0)
    observation, state = jax.eval_shape(env.reset, key, params)
    action = jnp.zeros(env.action_space(params).shape)
    following, after, reward, terminated, truncated, _ = jax.eval_shape(env.step, key, state, action, params)

    def describe(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)

    assert describe((following, after)) == describe((observation, state))
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert terminated.dtype == truncated.dtype == jnp.bool_


def test_pendulum_at_its_time_limit():
    """200 steps of two lanes in one scan, beside the same steps without automatic reset."""
    env, params = make("Pendulum-v1")
    assert params.max_steps_in_episode == 200

    reset, step = jax.vmap(env.reset, in_axes=(0, None)), jax.vmap(env.step, in_axes=(0, 0, 0, None))
    step_env, sample = jax.vmap(env.step_env, in_axes=(0, 0, 0, None)), jax.vmap(env.action_space(params).sample)

    def strong(state):  # gymnax's Pendulum is weakly typed after reset, which a scan refuses
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), state)

    @jax.jit
    def rollout(key):
        key_reset, key = jax.random.split(key)
        first, state = reset(jax.random.split(key_reset, 2), params)

        def body(state, key):
            key_action, key_step = jax.random.split(key)
            action, keys = sample(jax.random.split(key_action, 2)), jax.random.split(key_step, 2)
            successor, *_ = step_env(jax.random.clone(keys), state, action, params)
            observation, state, _, terminated, truncated, info = step(keys, state, action, params)
            return strong(state), (observation, successor, info["final_observation"], terminated, truncated)

        return first, jax.lax.scan(body, strong(state), jax.random.split(key, 401))[1]

    first, steps = rollout(jax.random.key(0))
    observation, successor, final, terminated, truncated = (np.swapaxes(x, 0, 1) for x in steps)  # [lane, step, ...]
    assert not terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(truncated[0]), [199, 399])
    np.testing.assert_allclose(final, successor, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(observation[~truncated], final[~truncated])
    starts = np.concatenate([first[:, None], observation[:, [199, 399]]], axis=1).reshape(6, 3)
    assert np.all(np.abs(starts[:, 2]) <= 1)  # Pendulum starts with |angular velocity| <= 1
    assert np.unique(starts, axis=0).shape[0] == 6
    assert np.all(np.abs(observation - final)[truncated].max(-1) > 1e-3)


def test_pendulum_torque_is_rescaled_exactly():
    env, params = make("Pendulum-v1")
    space = env.action_space(params)
    assert (space.low, space.high, space.shape) == (-1, 1, (1,))
    for action, torque in ((-1, -2), (1, 2), (0, 0), (0.25, 0.5), (3, 2), (-np.inf, -2)):
        _, state = env.reset(jax.random.key(0), params)
        _, state, *_ = env.step(jax.random.key(1), state, jnp.array([action], jnp.float32), params)
        assert state.last_u == torque
        _, state, *_ = env.step_env(jax.random.key(1), state, jnp.array([action], jnp.float32), params)
        assert state.last_u == torque


def test_rescaling_follows_the_parameters_of_each_step():
    env, params = make("Pendulum-v1")
    batch = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), params)
    batch = batch.replace(max_torque=jnp.array([1.0, 4.0]))

    def torque(params, key):
        _, state = env.reset(key, params)
        return env.step(jax.random.key(1), state, jnp.array([0.5]), params)[1].last_u

    np.testing.assert_array_equal(jax.vmap(torque)(batch, jax.random.split(jax.random.key(0), 2)), [0.5, 2.0])


def test_rescaling_of_asymmetric_bounds_stays_inside_them():
    env = rescale_actions(WideLine(), Line.default_params)
    actions = jnp.array([-2.0, -1.0, -0.6, 0.0, 0.6, 1.0, 5.0])
    got = jax.vmap(lambda a: env.inner_action(a[None], env.default_params))(actions)[:, 0]
    np.testing.assert_allclose(got, [-0.5, -0.5, 0.0, 0.75, 1.5, 2.0, 2.0], atol=1e-7)
    assert got.min() == -0.5
    assert got.max() == 2.0


def test_a_third_party_environment_needs_no_adapter():
    plain = Line()
    assert rescale_actions(plain, plain.default_params) is plain
    wide = rescale_actions(WideLine(), plain.default_params)
    assert wide.name == "Line"  # everything but actions is the inner environment's own
    assert wide.observation_space().shape == (1,)
    _, state = wide.reset(jax.random.key(0), wide.default_params)
    *_, info = wide.step(jax.random.key(1), state, jnp.array([1.0]), wide.default_params)
    np.testing.assert_array_equal(info["action"], [2.0])
    with pytest.raises(AttributeError):
        wide.does_not_exist  # noqa: B018


def test_a_rescaled_step_does_not_trace_again():
    inner, traces = WideLine(), 0
    move = inner.move

    def counted(*arguments):
        nonlocal traces
        traces += 1
        return move(*arguments)

    inner.move = counted
    for _ in range(2):  # a second wrapper of the same environment shares the compiled step
        env = rescale_actions(inner, Line.default_params)
        _, state = env.reset(jax.random.key(0), env.default_params)
        for seed in range(3):
            _, state, *_ = env.step(jax.random.key(seed), state, jnp.zeros(1), env.default_params)
    assert traces == 1


@pytest.mark.parametrize(("low", "high"), [(-np.inf, np.inf), (0.0, np.inf), (-3.4028235e38, 3.4028235e38), (1.0, 1.0)])
def test_unbounded_actions_are_refused(low, high):
    class Unbounded(Line):
        def action_space(self, params=None):
            return spaces.Box(low, high, (1,))

    with pytest.raises(ValueError, match=r"action_space of Line is Box\(.*allowed: finite bounds"):
        rescale_actions(Unbounded(), None)


def test_identity_where_bounds_are_plus_minus_one_or_actions_are_discrete():
    for env_id in ("MountainCarContinuous-v0", "CartPole-v1", "probe"):
        assert make(env_id)[0].__class__.__name__ != "RescaledActions"


@pytest.mark.parametrize(
    ("wrong", "suggestion"),
    [
        ("Pendulum", "Pendulum-v1"),
        ("pendulum-v0", "Pendulum-v1"),
        ("CartPole-v0", "CartPole-v1"),
        ("hopper", "brax/hopper"),
        ("brax/hoper", "brax/hopper"),
        ("breakout", "Breakout-MinAtar"),
        ("prob", "probe"),
    ],
)
def test_unknown_names_suggest_the_nearest(wrong, suggestion):
    with pytest.raises(ValueError, match=rf"environment '{wrong}' is unknown, nearest: .*{suggestion}"):
        make(wrong)


def test_stock_stands_before_any_environment_with_vectors():
    env, params = make("stock/bridge", lowest_stock="-10", highest_stock=15, discount=0.9, fall_cost=3.0)
    assert (env.name, params.inner.fall_cost, params.max_steps_in_episode) == ("stock/bridge", 3.0, 7)
    assert (params.lowest_stock, params.highest_stock, params.discount) == (-10.0, 15.0, 0.9)
    for env_id in available()["stock"]:
        env, params = make(env_id)
        assert env.reset(jax.random.key(0), params)[0].shape == env.observation_space(params).shape
    with pytest.raises(ValueError, match="environment 'CartPol' is unknown, nearest: CartPole-v1"):
        make("stock/CartPol")
    with pytest.raises(ValueError, match="a stock can be added to vectors only"):
        make("stock/Breakout-MinAtar")
    with pytest.raises(ValueError, match="option 'size' of environment 'gamble' is unknown"):
        make("stock/gamble", size=3)


def test_a_name_like_no_other():
    with pytest.raises(ValueError, match=r"environment 'zzzzzzzz' is unknown, .*available\(\)"):
        make("zzzzzzzz")


@pytest.mark.parametrize(("env_id", "reason"), [("MNISTBandit-bsuite", "downloads")])
def test_environments_that_cannot_run_say_why(env_id, reason):
    with pytest.raises(ValueError, match=rf"{env_id}' is not available: .*{reason}"):
        make(env_id)


def test_options_reach_constructor_and_parameters():
    env, params = make("DeepSea-bsuite", size="4")
    assert env.observation_space(params).shape == (4, 4)
    assert params.max_steps_in_episode == 4  # the default follows the constructor
    assert make("DeepSea-bsuite", size=4, max_steps_in_episode=3)[1].max_steps_in_episode == 3
    assert make("Pendulum-v1", max_steps_in_episode="17", max_torque="1")[1].max_torque == 1.0
    assert make("Breakout-MinAtar", use_minimal_action_set="false")[0].num_actions == 6
    assert make("FrozenLake-misc", map_name="8x8")[0].observation_space(None).shape == (64,)
    assert make("BernoulliBandit-misc", max_steps_in_episode=5)[1].max_steps_in_episode == 5
    assert make("probe", case="discounting", discrete_actions="2")[1].case == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"episode_length": 5},
            r"option 'episode_length' of environment 'Pendulum-v1' is unknown, allowed: .*max_torque",
        ),
        ({"max_steps_in_episode": "many"}, r"max_steps_in_episode is 'many', allowed: int"),
        ({"max_steps_in_episode": 1.5}, r"max_steps_in_episode is 1.5, allowed: int"),
        ({"max_steps_in_episode": True}, r"max_steps_in_episode is True, allowed: int"),
        ({"max_steps_in_episode": 0}, r"max_steps_in_episode is 0, allowed: 1 and above"),
        ({"max_torque": "[1]"}, r"max_torque is \[1\], allowed: float"),
        ({"backend": "spring"}, r"option 'backend' .* is unknown, allowed"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make("Pendulum-v1", **options)


@pytest.mark.slow
@pytest.mark.proves("envs", "constraints.txt")
def test_brax_is_imported_late_and_quietly():
    code = (
        "import sys, jaxrl_dist.envs as envs\n"
        "envs.make('CartPole-v1'); envs.available()\n"
        "assert not {'brax', 'mujoco'} & set(sys.modules), 'imported too early'\n"
        "envs.make('brax/fast')\n"
        "assert 'brax' in sys.modules\n"
        "print('end')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "end\n"

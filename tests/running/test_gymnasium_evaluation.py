"""gymnax's rewrites step by step beside Gymnasium's environments, and the same policies in both worlds."""

import dataclasses
import sys

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from jaxrl_dist import cli, envs
from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.algorithms.actor_critic import sac
from jaxrl_dist.learning import interaction, portable
from jaxrl_dist.running import evaluation, problem, session
from jaxrl_dist.running import gymnasium_evaluation as worlds

IDS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "MountainCarContinuous-v0")
# The names of gymnax's state, in the order of Gymnasium's, and states to start from, far beyond those of a reset.
STARTS = {
    "CartPole-v1": {"x": (-2, 2), "x_dot": (-1, 1), "theta": (-0.2, 0.2), "theta_dot": (-1, 1)},
    "Acrobot-v1": {
        "joint_angle1": (-3, 3), "joint_angle2": (-3, 3), "velocity_1": (-5, 5), "velocity_2": (-5, 5),
    },
    "Pendulum-v1": {"theta": (-9, 9), "theta_dot": (-8, 8)},
    "MountainCar-v0": {"position": (-1.2, 0.45), "velocity": (-0.07, 0.07)},
    "MountainCarContinuous-v0": {"position": (-1.2, 0.4), "velocity": (-0.07, 0.07)},
}  # fmt: skip
LEFT_WALL = -1.2


def in_gymnax(env_id, starts, actions):
    """Observation, reward, terminated and truncated of every step, `[starts, steps, ...]`, without automatic reset."""
    env, params = envs.make(env_id)

    def one(start, actions):
        _, state = env.reset(jax.random.key(0), params)
        state = interaction.strengthen(state.replace(**dict(zip(STARTS[env_id], start, strict=True))))

        def step(state, action):
            following = env.step_env(jax.random.key(1), state, action, params)
            observation, new_state, reward, terminated, _ = following
            return jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new_state, state), (
                observation, reward, terminated, env.is_truncated(new_state, params),
            )  # fmt: skip

        return jax.lax.scan(step, state, actions)[1]

    found = jax.jit(jax.vmap(one))(jnp.asarray(starts, jnp.float32), jnp.asarray(actions))
    return [np.asarray(x) for x in found]


def in_gymnasium(env_id, start, actions):
    """The same of one start, up to its termination."""
    environment = gymnasium.make(env_id).unwrapped
    environment.reset(seed=0)
    environment.state = np.array(start, np.float32 if env_id == "MountainCarContinuous-v0" else np.float64)
    found = []
    for action in actions:
        observation, reward, terminated, _, _ = environment.step(action)
        found.append((np.array(observation), reward, terminated))
        if terminated:
            break
    return [np.stack(x) for x in zip(*found, strict=True)]


@pytest.mark.parametrize("env_id", IDS)
def test_both_take_the_same_steps_from_the_same_states(env_id):
    """But for what the module's docstring lists, of which the left wall is all that is met here."""
    starts, steps = 60, 40
    generator = np.random.default_rng(0)
    low, high = np.array(list(STARTS[env_id].values())).T
    # float32 numbers, so that both worlds start from the same ones.
    states = generator.uniform(low, high, (starts, len(low))).astype(np.float32)
    space = gymnasium.make(env_id).action_space
    if hasattr(space, "n"):
        actions = generator.integers(space.n, size=(starts, steps))
        in_units = actions
    else:
        actions = generator.uniform(-1, 1, (starts, steps, 1)).astype(np.float32)
        in_units = actions * space.high
    observations, rewards, ends, _ = in_gymnax(env_id, states, actions)
    compared = ended = 0
    for run in range(starts):
        theirs, their_rewards, their_ends = in_gymnasium(env_id, states[run], in_units[run])
        count = len(theirs)
        if env_id == "MountainCarContinuous-v0" and (theirs[:, 0] <= LEFT_WALL).any():
            count = int(np.argmax(theirs[:, 0] <= LEFT_WALL))
        # Rounding: Acrobot multiplies it by about 50 in these 8 seconds.
        tolerance = 2e-3 if env_id == "Acrobot-v1" else 1e-4
        np.testing.assert_allclose(observations[run, :count], theirs[:count], rtol=0, atol=tolerance)
        np.testing.assert_allclose(rewards[run, :count], their_rewards[:count], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(ends[run, :count], their_ends[:count])
        compared, ended = compared + count, ended + their_ends[:count].any()
    assert compared > 500
    assert (ended > 0) == (env_id != "Pendulum-v1")


@pytest.mark.parametrize("env_id", IDS)
def test_both_reset_alike_and_have_the_same_spaces_and_time_limit(env_id):
    resets = 400
    env, params = envs.make(env_id)
    environment = gymnasium.make(env_id)
    assert environment.spec.max_episode_steps == params.max_steps_in_episode
    bounds = problem.action_bounds(env, params)
    if bounds:
        space = environment.action_space
        assert (env.action_space(params).shape, *bounds) == (space.shape, space.low, space.high)
    else:
        assert env.action_space(params).n == environment.action_space.n
        assert environment.action_space.start == 0
    keys = jax.random.split(jax.random.key(0), resets)
    ours = np.asarray(jax.jit(jax.vmap(env.reset, in_axes=(0, None)))(keys, params)[0])
    theirs = np.stack([environment.reset(seed=seed)[0] for seed in range(resets)])
    assert (ours.dtype, ours.shape[1:]) == (theirs.dtype, environment.observation_space.shape)
    for component in range(ours.shape[1]):
        # Also where all are equal: MountainCar starts at rest.
        assert scipy.stats.ks_2samp(ours[:, component], theirs[:, component]).pvalue > 1e-3
    assert ours.std(0).max() > 0.01


def test_the_left_wall_stops_a_car_in_gymnasium_only():
    """A known difference, by hand: from x = -1.19 and v = -0.05, without force, v' = -0.05 - 0.0025 cos(-3.57)."""
    velocity = -0.05 - 0.0025 * np.cos(-3.57)
    env_id, start, idle = "MountainCarContinuous-v0", np.float32([-1.19, -0.05]), np.zeros((3, 1), np.float32)
    theirs, _, _ = in_gymnasium(env_id, start, idle)
    ours, *_ = in_gymnax(env_id, start[None], idle[None])
    np.testing.assert_allclose(theirs[0], [LEFT_WALL, 0], atol=1e-6)
    np.testing.assert_allclose(ours[0, 0], [LEFT_WALL, velocity], atol=1e-6)
    gravity = -0.0025 * np.cos(-3.6)  # 0.0022 a step
    np.testing.assert_allclose(theirs[1], [LEFT_WALL + gravity, gravity], atol=1e-6)  # on its way back already
    np.testing.assert_allclose(ours[0, 1], [LEFT_WALL, velocity + gravity], atol=1e-6)
    # The car with a discrete choice of forces is stopped in both.
    theirs, _, _ = in_gymnasium("MountainCar-v0", start, np.ones(1, int))
    ours, *_ = in_gymnax("MountainCar-v0", start[None], np.ones((1, 1), int))
    np.testing.assert_allclose(theirs[0], [LEFT_WALL, 0], atol=1e-6)
    np.testing.assert_allclose(ours[0, 0], [LEFT_WALL, 0], atol=1e-6)


def test_beyond_the_goal_only_gymnax_stops_a_car_that_rolls_back():
    """The other known difference of MountainCarContinuous, which no episode meets."""
    env_id, start, idle = "MountainCarContinuous-v0", np.float32([0.55, -0.01]), np.zeros((1, 1), np.float32)
    _, reward, terminated = in_gymnasium(env_id, start, idle)
    assert (reward[0], terminated[0]) == (0, False)
    _, reward, terminated, _ = in_gymnax(env_id, start[None], idle[None])
    assert (reward[0, 0], terminated[0, 0]) == (100, True)


# -- the same policy in both worlds -----------------------------------------------------------------------------------


def linear_policy(path, weights, bias, bounds=()):
    """A policy file of one layer: the largest of linear values, or with bounds tanh of a linear function."""
    layers = {"kernel_0": np.float32(weights)[None], "bias_0": np.float32(bias)[None]}
    if bounds:
        arrays = portable.mlp_policy(layers, len(bias))
    else:
        arrays = portable.greedy_policy({"head": {"advantage": {"layers": layers}}}, len(bias))
    portable.save_policy(path, arrays, *(np.float32(bound) for bound in bounds))
    return path


def returns_in_gymnax(env_id, weights, bias, episodes, **options):
    """The same policy written in JAX, evaluated as agents are."""
    env, params = envs.make(env_id, **options)

    def act(state, observation, key):
        outputs = observation @ jnp.asarray(weights, jnp.float32) + jnp.asarray(bias, jnp.float32)
        return outputs.argmax(-1) if hasattr(env.action_space(params), "n") else jnp.tanh(outputs)

    found = evaluation.evaluate(
        Agent(None, None, memoryless(act), None), env, params, None, jax.random.key(0),
        episodes=episodes, max_steps=params.max_steps_in_episode,
    )  # fmt: skip
    return np.asarray(found.episode_return)


NOTHING = {
    "MountainCar-v0": (np.zeros((2, 3)), [0, 1, 0], (), -200), "Acrobot-v1": (np.zeros((6, 3)), [0, 1, 0], (), -500),
    "MountainCarContinuous-v0": (np.zeros((2, 1)), [0], (-1, 1), 0),
}  # fmt: skip


@pytest.mark.parametrize("env_id", NOTHING)
def test_without_force_both_go_on_to_the_time_limit(env_id, tmp_path):
    """Returns by hand: -1 a step for 200 or 500 steps, or nothing at all."""
    weights, bias, bounds, expected = NOTHING[env_id]
    path = linear_policy(tmp_path / "p.npz", weights, bias, bounds)
    np.testing.assert_array_equal(worlds.evaluate_policy(path, env_id, episodes=3, seed=0), [expected] * 3)
    np.testing.assert_array_equal(returns_in_gymnax(env_id, weights, bias, 3), [expected] * 3)


def test_a_cart_pole_policy_scores_the_same_in_both(tmp_path):
    """It pushes towards the side the pole leans to, however fast it moves: some 40 steps."""
    env_id, weights = "CartPole-v1", np.array([[0, 0], [0, 0], [-1, 1], [0, 0]])
    path = linear_policy(tmp_path / "p.npz", weights, [0, 0])
    theirs = worlds.evaluate_policy(path, env_id, episodes=300, seed=0)
    assert 20 < theirs.mean() < 100, "policies that fail at once, or never, would hide differences"
    ours = returns_in_gymnax(env_id, weights, [0, 0], 300)
    found = worlds.difference_of_means([theirs], [ours])
    assert found.low < 0 < found.high
    assert found.high - found.low < 0.2 * ours.mean()
    # The comparison sees another world: a cart that is pushed half as hard.
    found = worlds.difference_of_means([theirs], [returns_in_gymnax(env_id, weights, [0, 0], 300, force_mag=5.0)])
    assert not found.low < 0 < found.high
    # Other seeds, other episodes; the same seed, the same ones.
    assert (worlds.evaluate_policy(path, env_id, episodes=4, seed=0) == theirs[:4]).all()
    assert (worlds.evaluate_policy(path, env_id, episodes=4, seed=1) != theirs[:4]).any()


def test_a_pendulum_policy_acts_in_gymnasiums_units(tmp_path):
    """It pumps energy in, torque = 2 tanh(5 speed), and would do so less with torques in [-1, 1]."""
    env_id, weights = "Pendulum-v1", np.array([[0.0], [0.0], [5.0]])
    ours = returns_in_gymnax(env_id, weights, [0], 100)
    path = linear_policy(tmp_path / "p.npz", weights, [0], (-2, 2))
    found = worlds.difference_of_means([worlds.evaluate_policy(path, env_id, episodes=100, seed=0)], [ours])
    assert found.low < 0 < found.high
    path = linear_policy(tmp_path / "p.npz", weights, [0], (-1, 1))
    found = worlds.difference_of_means([worlds.evaluate_policy(path, env_id, episodes=100, seed=0)], [ours])
    assert not found.low < 0 < found.high


def test_the_left_wall_costs_returns_in_gymnax(tmp_path):
    """What the known difference of MountainCarContinuous comes to: full force in the direction of the velocity."""
    env_id, weights = "MountainCarContinuous-v0", np.array([[0.0], [1000.0]])
    path = linear_policy(tmp_path / "p.npz", weights, [0], (-1, 1))
    theirs = worlds.evaluate_policy(path, env_id, episodes=100, seed=0)
    ours = returns_in_gymnax(env_id, weights, [0], 100)
    assert theirs.min() > 89
    assert worlds.difference_of_means([theirs], [ours]).low > 1
    straight = ours > 85  # at the goal without having met the wall
    assert 0.4 < straight.mean() < 0.95
    np.testing.assert_allclose(ours[straight].max(), theirs.max(), atol=0.5)


def test_the_interval_of_the_difference_is_scipys():
    generator = np.random.default_rng(0)
    first = [generator.normal(3, 2, 30), generator.normal(5, 2, 30)]
    second = [generator.normal(1, 2, 12), generator.normal(2, 2, 15)]  # other numbers of episodes

    def statistic(a, b, c, d, axis):
        return (a.mean(axis) - c.mean(axis) + b.mean(axis) - d.mean(axis)) / 2

    expected = scipy.stats.bootstrap(
        (*first, *second), statistic, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = worlds.difference_of_means(first, second, resamples=20_000)
    assert found.mean == pytest.approx(statistic(*first, *second, axis=0))
    np.testing.assert_allclose(found[1:], expected, atol=0.05)
    assert np.isnan(worlds.difference_of_means([first[0]], [second[0][:1]])[1:]).all()


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_plays_a_policy_file(tmp_path, capsys):
    weights, bias, _, _ = NOTHING["MountainCar-v0"]
    path = linear_policy(tmp_path / "idle.npz", weights, bias)
    cli.command(["evaluate", str(path), "--env-id", "MountainCar-v0", "--episodes", "2"])
    shown = capsys.readouterr().out
    assert "idle" in shown
    assert "-200.0" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p.npz"], "--env-id must say where Gymnasium is to play it"),
        (["p.npz", "--env-id", "MountainCarr-v0"], "--env-id is 'MountainCarr-v0', which Gymnasium cannot make"),
        (["p.npz", "--env-id", "brax/hopper"], "--env-id is 'brax/hopper', which Gymnasium cannot make"),
        (["three.npz", "--env-id", "CartPole-v1"], "one of 3 actions, but the actions of CartPole-v1 are Discrete(2)"),
        (["p.npz", "--env-id", "Acrobot-v1"], "cannot take the observations of Acrobot-v1"),
        # learned from one-hot vectors (envs/one_hot.py), where Gymnasium gives the number of the state
        (["lake.npz", "--env-id", "FrozenLake-v1"], "cannot take the observations of FrozenLake-v1, Discrete(16)"),
        (
            ["p.npz", "--env-id", "MountainCar-v0", "--episodes", "0"],
            "--episodes is 0; it must be a whole number",
        ),
        (["p.npz", "--env-id", "MountainCar-v0", "--seed", "-1"], "--seed is -1; it must be a whole number in [0"),
        (["pendulum.npz", "--env-id", "MountainCarContinuous-v0"], "actions of shape (1,) from -2.0 to 2.0"),
        (
            ["two.npz", "--env-id", "Pendulum-v1"],
            "gives actions of shape (2,) from -2.0 to 2.0, but the actions of Pend",
        ),
        (["other.npz", "--env-id", "MountainCar-v0"], "other.npz holds no policy"),
        (["empty.npz", "--env-id", "MountainCar-v0"], "empty.npz is no .npz file, or damaged"),
        (["missing.npz", "--env-id", "MountainCar-v0"], "missing.npz, which does not exist"),
        (["folder", "--gymnasium", "--env-id", "CartPole-v1"], "--env-id is 'CartPole-v1'; it is for a policy file"),
        (["folder", "--gymnasium"], "run folder folder does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    linear_policy(tmp_path / "p.npz", np.zeros((2, 3)), np.zeros(3))
    linear_policy(tmp_path / "pendulum.npz", np.zeros((2, 1)), [0], (-2, 2))
    linear_policy(tmp_path / "lake.npz", np.zeros((16, 4)), np.zeros(4))
    linear_policy(tmp_path / "three.npz", np.zeros((4, 3)), np.zeros(3))
    linear_policy(tmp_path / "two.npz", np.zeros((3, 2)), [0, 0], (-2, 2))
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "empty.npz").touch()
    with pytest.raises(SystemExit) as exit:
        cli.command(["evaluate", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_without_gymnasium_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ValueError, match=r"needs the package gymnasium: pip install gymnasium$"):
        worlds.make("CartPole-v1")


# -- an agent ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running", "jaxrl_dist/learning", "constraints.txt")
def test_an_agent_trained_in_the_jitted_environment_scores_the_same_in_gymnasium(tmp_path, capsys):
    preset = dict(sac.PRESETS["Pendulum-v1"])
    options = problem.RunOptions(
        env_id="Pendulum-v1", total_steps=6_000, num_seeds=2, eval_every=6_000, eval_episodes=60, eval_states=0,
        plots=False, runs_folder=str(tmp_path), name="run",
    )  # fmt: skip
    of_the_run, of_the_algorithm = problem.split_preset(preset)
    options = dataclasses.replace(options, **{k: v for k, v in of_the_run.items() if k != "total_steps"})
    prepared = problem.prepare("sac", sac.make_agent, sac.Config(**of_the_algorithm), options)
    folder = session.train(prepared, Console(quiet=True))

    found = worlds.evaluate_run(folder, episodes=100, seed=0)
    difference = worlds.difference_of_means(found.gymnasium, found.recorded)
    assert difference.low < 0 < difference.high, difference
    generator = np.random.default_rng(0)
    random = worlds.episode_returns("Pendulum-v1", lambda o: generator.uniform(-2, 2, (len(o), 1)), range(30))
    assert random.mean() < -900
    for returns in (*found.gymnasium, *found.recorded):
        assert returns.mean() > random.mean() / 2, "far above a random policy"

    # The StableHLO program that the run saved is the same policy.
    program = jax.export.deserialize(bytearray((folder / "policies" / "seed_0.stablehlo").read_bytes()))
    played = worlds.episode_returns("Pendulum-v1", lambda o: np.asarray(program.call(o)), range(5))
    arrays = portable.load_policy(folder / "policies" / "seed_0.npz")
    np.testing.assert_allclose(played, worlds.episode_returns("Pendulum-v1", arrays, range(5)), atol=1)
    assert not (folder / "policies" / "seed_1.stablehlo").exists()

    capsys.readouterr()
    cli.command(["evaluate", str(folder), "--gymnasium", "--episodes", "20"])
    shown = capsys.readouterr().out
    for words in ("Gymnasium's Pendulum-v1", "IQM over 2 seeds", "our last evaluation", "95 % interval", "all"):
        assert words in shown

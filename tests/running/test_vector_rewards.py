"""Vectors of rewards on their way through the toolkit: evaluated, recorded, printed, exported, played in Gymnasium."""

import dataclasses
import io

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrl_dist import cli, envs
from jaxrl_dist.agent import Claim
from jaxrl_dist.algorithms.value_based import md3qn
from jaxrl_dist.distributional.law import equally_weighted
from jaxrl_dist.envs import multi_reward
from jaxrl_dist.learning import experience, interaction, portable
from jaxrl_dist.learning.experience import Experience
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import evaluation, problem, results, session, training
from jaxrl_dist.running import gymnasium_evaluation as worlds

SMALL = {
    "num_particles": 8, "bandwidths": (1.0, 4.0), "warmup_steps": 64, "replay_capacity": 1_000, "batch_size": 16,
    "hidden": (8, 8), "discount": 0.5,
}  # fmt: skip


def train(folder, env_id="multi_reward/branches", **changes):
    options = problem.RunOptions(
        env_id=env_id, total_steps=400, num_seeds=2, eval_every=200, eval_episodes=3, eval_states=2, eval_rollouts=3,
        checkpoint_every=400, device="cpu", runs_folder=str(folder), name="run",
    )  # fmt: skip
    options = dataclasses.replace(options, **changes)
    text = io.StringIO()
    prepared = problem.prepare("md3qn", md3qn.make_agent, md3qn.Config(**SMALL), options)
    return session.train(prepared, Console(file=text, width=200)), text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return *train(base), base


@pytest.fixture
def one_process(monkeypatch):
    """Commands as a process of their own would run them, in this one, whose devices are there already."""
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_records_every_component(finished):
    folder, _, _ = finished
    episodes, metrics = recording.read_evaluations(folder), recording.read_metrics(folder)
    parts = ["rewards_0", "rewards_1"]
    sums = episodes[[f"episode_{part}" for part in parts]].sum(axis=1)
    np.testing.assert_allclose(sums, episodes.episode_return, atol=1e-4)
    means = episodes.groupby(["iteration", "seed"]).mean(numeric_only=True)
    recorded = metrics.set_index(["iteration", "seed"])
    for part in parts:
        np.testing.assert_allclose(recorded[f"evaluation_{part}"], means[f"episode_{part}"], atol=1e-4)
    picture = folder / "first_reward.png"
    cli.command(["plot", str(folder), "--metric", "evaluation_rewards_0", "--out", str(picture)])
    assert picture.is_file()


def test_what_is_printed_names_every_component(finished, capsys, one_process):
    folder, text, _ = finished
    episodes = recording.read_evaluations(folder)
    last = episodes[episodes.iteration == episodes.iteration.max()].groupby("seed").mean(numeric_only=True)
    rows = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in text.splitlines()]
    assert ["seed", "rewards_0", "rewards_1"] in rows
    for seed in (0, 1):
        means = last.episode_rewards_0[seed], last.episode_rewards_1[seed]
        assert [str(seed), *(f"{mean:.2f}" for mean in means)] in rows
    cli.command(["evaluate", str(folder), "--episodes", "2"])
    assert "rewards_1" in capsys.readouterr().out


def test_evaluating_a_saved_run_gives_the_components(finished):
    folder, _, _ = finished
    seeds, returns, parts = results.evaluate_run(folder, cli.find_algorithm, episodes=4, seed=1)
    assert list(seeds) == [0, 1]
    assert list(parts) == ["rewards_0", "rewards_1"]
    np.testing.assert_allclose(parts["rewards_0"] + parts["rewards_1"], returns, atol=1e-4)


def test_a_run_that_is_over_prints_what_it_recorded(finished):
    """Resumed at its end, nothing is evaluated again."""
    _, text, base = finished

    def tables(text):
        return [line for line in text.splitlines() if line.startswith(("│", "┃")) and "rewards" in text]

    assert len(tables(text)) >= 6
    assert tables(train(base, resume="auto")[1])[-6:] == tables(text)[-6:]


def test_scalar_environments_have_no_more_tables_than_before():
    text = io.StringIO()
    results.print_results(Console(file=text, width=120), [0], np.ones((1, 3)))
    (header,) = [line for line in text.getvalue().splitlines() if line.startswith("┃")]
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "seed", "episodes", "mean return", "CVaR 10 %", "lowest", "highest",
    ]  # fmt: skip


def test_the_pure_function_keeps_the_components():
    env, params = envs.make("multi_reward/branches")
    run = training.make_train(
        md3qn.make_agent, md3qn.Config(**SMALL), env, params, total_steps=200, evaluations=2, eval_episodes=5
    )
    _, history = jax.eval_shape(run, jax.random.key(0))
    assert history["evaluation_rewards"].shape == (2, 5, 2)
    assert history["evaluation_return"].shape == (2, 5)


# -- joint laws beside Monte-Carlo returns ----------------------------------------------------------------------------


def test_joint_returns_are_those_of_the_process():
    """A claim about coins: Monte-Carlo vectors have the exact moments, and the scalar ones are their sums."""
    env, params = envs.make("multi_reward/coin")
    learned = jnp.arange(12.0).reshape(1, 6, 2)

    def policy(state, observation, key):
        return jnp.zeros(len(observation), jnp.int32), jnp.zeros(len(observation))

    def law(state, observation, action):
        return equally_weighted(jnp.broadcast_to(learned.sum(-1), (len(observation), 6)))

    def joint(state, observation, action):
        return jnp.broadcast_to(learned, (len(observation), 6, 2))

    claim = Claim(policy, law, 0.5, joint=joint)
    endless = evaluation.without_time_limit(env, params)
    compare = {"states": 2, "rollouts": 4_000, "horizon": 20, "spread": 2}
    found = jax.jit(
        lambda key: evaluation.return_distributions(claim, env, endless, None, key, **compare)
    )(jax.random.key(0))  # fmt: skip
    assert found.joint.predicted.shape == (2, 6, 2)
    vectors = np.asarray(found.joint.monte_carlo)
    assert vectors.shape == (2, 4_000, 2)
    np.testing.assert_allclose(vectors.sum(-1), found.monte_carlo, atol=1e-4)
    np.testing.assert_allclose(vectors.mean(1), np.ones((2, 2)), atol=0.04)
    for state in vectors:
        covariance = np.cov(state.T)
        np.testing.assert_allclose(covariance, [[1 / 3, -1 / 3], [-1 / 3, 1 / 3]], atol=0.02)
    # Without a joint claim nothing is carried along, and the numbers are the same.
    plain = jax.jit(
        lambda key: evaluation.return_distributions(claim._replace(joint=None), env, endless, None, key, **compare)
    )(jax.random.key(0))  # fmt: skip
    assert plain.joint == ()
    np.testing.assert_array_equal(plain.monte_carlo, found.monte_carlo)
    assert evaluation.calibration(found) == evaluation.calibration(plain)


def test_a_run_draws_its_joint_laws(finished, tmp_path, one_process):
    folder, _, _ = finished
    assert (folder / "return_distribution.png").is_file()
    assert (folder / "return_distribution_joint.png").read_bytes().startswith(b"\x89PNG")
    cli.command(["plot", str(folder), "--distribution", "--states", "2", "--out", str(tmp_path / "some.png")])
    assert (tmp_path / "some_joint.png").is_file()


def test_the_picture_says_both_correlations():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 50))
    learned, observed = np.stack([x, -x], axis=-1), np.stack([x, x], axis=-1)
    figure = plotting.joint_distribution(predicted=learned, monte_carlo=observed, title="by hand")
    panels = figure.axes
    assert [axes.get_title(loc="right") for axes in panels] == ["correlation -1.00, Monte Carlo 1.00"] * 3
    points = panels[1].collections[-1].get_offsets()
    np.testing.assert_allclose(points, learned[1])
    constant = np.zeros((1, 4, 2))
    (only,) = plotting.joint_distribution(predicted=constant, monte_carlo=constant, title="constant").axes
    assert only.get_title(loc="right") == "correlation none, Monte Carlo none"
    for bad in (np.zeros((3, 50)), np.zeros((3, 50, 1)), np.full((3, 50, 2), np.nan)):
        with pytest.raises(ValueError, match="predicted"):
            plotting.joint_distribution(predicted=bad, monte_carlo=observed, title="wrong")


class VectorDependsOnTheLimit(multi_reward.MultiReward):
    def step_env(self, key, state, action, params):
        *rest, info = super().step_env(key, state, action, params)
        left = (params.max_steps_in_episode - state.time).astype(jnp.float32)
        return *rest, {"rewards": info["rewards"] + jnp.stack([left, -left])}


def test_a_vector_that_depends_on_the_time_limit_is_seen():
    table = [[[multi_reward.Outcome(1.0, 0, (1.0, 0.0))]]]
    for kind, reason in ((multi_reward.MultiReward, ""), (VectorDependsOnTheLimit, "depend on max_steps_in_episode")):
        env = kind(table, 0, [[0, 0]], "one", 10)
        assert reason in evaluation.limited_because(env, env.default_params)
        assert bool(reason) == bool(evaluation.limited_because(env, env.default_params))


# -- what is learned from ---------------------------------------------------------------------------------------------


def test_a_cut_of_rewards_cuts_every_component():
    """`reward_clip` is for what is learned from: a vector is cut component by component, a cost is not."""
    row = interaction.Transition(
        jnp.zeros(1), jnp.int32(0), jnp.float32(-2), jnp.zeros(1), jnp.bool_(False), jnp.bool_(False),
        {"rewards": jnp.array([3.0, -5.0]), "cost": jnp.float32(7)},
    )  # fmt: skip
    replay = experience.replay.create(row, 8, 1)
    for _ in range(8):
        replay = experience.replay.add(replay, jax.tree.map(lambda x: x[None], row))
    now = interaction.Interaction((), jnp.zeros((1, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1))
    how = {"num_steps": 2, "gamma": 0.5}
    found = experience.batch_at(Experience(replay, now, None), jnp.arange(2), reward_clip=1.0, **how)
    np.testing.assert_allclose(found.extras["rewards"], [[1.5, -1.5]] * 2)
    np.testing.assert_allclose(found.extras["cost"], [10.5] * 2)
    raw = experience.batch_at(Experience(replay, now, None), jnp.arange(2), **how)
    np.testing.assert_allclose(raw.extras["rewards"], [[4.5, -7.5]] * 2)


# -- policies as files ------------------------------------------------------------------------------------------------


def test_a_policy_file_weighs_the_law_of_the_sum(tmp_path):
    """Two actions, three particles of two rewards each: the sums of the first are 0, 0, 9, of the second 2, 2, 2. The
    mean takes the first, the worst third the second; numbers that do not belong together would say otherwise."""
    particles = np.float32([[[4, -4], [-4, 4], [5, 4]], [[1, 1], [1, 1], [1, 1]]])
    layers = {"kernel_0": np.zeros((1, 1, 12), np.float32), "bias_0": particles.reshape(1, 12)}
    head = {"head": {"advantage": {"layers": layers}}}
    worst = {"risk_table": np.minimum(np.linspace(0, 1, 4097) * 3, 1)}
    for extra, expected in (({}, 0), (worst, 1)):
        path = tmp_path / f"{expected}.npz"
        portable.save_policy(path, portable.greedy_policy(head, 2, num_rewards=np.int32(2), **extra))
        assert portable.load_policy(path)(np.zeros((3, 1))).tolist() == [expected] * 3
    # Sums of at least 1 against 0.4; of numbers apart, the first action has the worst ones, -3.
    guarded = np.float32([[[4, -3], [-3, 4], [5, 4]], [[0.2, 0.2]] * 3])
    layers["bias_0"] = guarded.reshape(1, 12)
    path = tmp_path / "sum.npz"
    portable.save_policy(path, portable.greedy_policy(head, 2, num_rewards=np.int32(2), **worst))
    assert portable.load_policy(path)(np.zeros((1, 1))).tolist() == [0]


@pytest.mark.parametrize(("count", "message"), [(0, "'num_rewards' 0"), (5, "which do not divide into 5 rewards")])
def test_a_file_whose_rewards_do_not_fit_is_refused(count, message, tmp_path):
    layers = {"kernel_0": np.zeros((1, 1, 12), np.float32), "bias_0": np.zeros((1, 12), np.float32)}
    arrays = portable.greedy_policy({"head": {"advantage": {"layers": layers}}}, 2, num_rewards=np.int32(count))
    portable.save_policy(tmp_path / "p.npz", arrays)
    with pytest.raises(ValueError, match=message):
        portable.load_policy(tmp_path / "p.npz")


# -- in Gymnasium -----------------------------------------------------------------------------------------------------


class Vectors(gymnasium.Env):
    """Five steps, which pay [time, -action], as MO-Gymnasium has it; or their sum, and the vector in `info`."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, in_info=False):
        self.in_info = in_info

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        rewards = np.array([self.time, -float(action)])
        reward, info = (float(rewards.sum()), {"rewards": rewards}) if self.in_info else (rewards, {})
        return np.zeros(1, np.float32), reward, self.time == 5, False, info


@pytest.fixture(scope="module", params=["Vectors-v0", "InInfo-v0"])
def world(request):
    name = request.param
    if name not in gymnasium.registry:
        gymnasium.register(
            name, lambda **how: Vectors(name.startswith("InInfo"), **how), max_episode_steps=9,
            disable_env_checker=True,
        )  # fmt: skip
    return name


def test_gymnasium_counts_vectors(world, tmp_path, capsys):
    layers = {"kernel_0": np.zeros((1, 1, 2), np.float32), "bias_0": np.float32([[0, 1]])}  # always action 1
    path = tmp_path / "p.npz"
    portable.save_policy(path, portable.greedy_policy({"head": {"advantage": {"layers": layers}}}, 2))
    np.testing.assert_array_equal(worlds.evaluate_policy(path, world, episodes=3, seed=0), [10.0] * 3)
    found = worlds.play_policy(path, world, episodes=3, seed=0)
    np.testing.assert_array_equal(found.parts["rewards_0"], [15.0] * 3)
    np.testing.assert_array_equal(found.parts["rewards_1"], [-5.0] * 3)
    cli.command(["evaluate", str(path), "--env-id", world, "--episodes", "2"])
    shown = capsys.readouterr().out
    assert "rewards_0" in shown
    assert "15.0" in shown


def test_gymnasium_scalars_have_no_parts(tmp_path):
    layers = {"kernel_0": np.zeros((1, 2, 3), np.float32), "bias_0": np.float32([[0, 1, 0]])}
    path = tmp_path / "p.npz"
    portable.save_policy(path, portable.greedy_policy({"head": {"advantage": {"layers": layers}}}, 3))
    found = worlds.play_policy(path, "MountainCar-v0", episodes=2, seed=0)
    assert found.parts == {}
    np.testing.assert_array_equal(found.episode_return, [-200, -200])


# -- an environment without them --------------------------------------------------------------------------------------


def test_an_environment_without_a_vector_is_refused_in_one_line(capsys, one_process):
    with pytest.raises(SystemExit) as exit:
        cli.command(["train", "md3qn", "--env-id", "CartPole-v1"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "error: --env-id is CartPole-v1, whose rewards are no vector (info has no 'rewards'); this algorithm needs a "
        "vector of rewards beside their sum"
    )

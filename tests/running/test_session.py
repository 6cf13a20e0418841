"""A run from plan to pictures: what it writes, exact resume, kill -9, damaged checkpoints, NaN, Ctrl-C, bad input."""

import dataclasses
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.algorithms.actor_critic import tqc
from jaxrl_dist.algorithms.value_based import c51
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, results, session, support
from jaxrl_dist.running.checkpointing import Checkpoints, DamagedCheckpoint

CONFIG = tqc.Config(
    num_envs=2, warmup_steps=32, batch_size=8, actor_hidden=(8,), critic_hidden=(8,), num_critics=2, num_quantiles=3,
    quantiles_dropped=1, normalize_observations=True,
)  # fmt: skip
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=232, num_seeds=2, eval_every=40, eval_episodes=3,
    eval_states=2, eval_rollouts=3, checkpoint_every=50, plots=False, device="cpu",
)  # fmt: skip
# The same run from the command line.
ARGUMENTS = [
    "--env-options", "max_steps_in_episode=20", "--total-steps", "232", "--num-seeds", "2", "--eval-every", "40",
    "--eval-episodes", "3", "--eval-states", "2", "--eval-rollouts", "3",
    "--checkpoint-every", "50", "--plots", "False", "--num-envs", "2", "--warmup-steps", "32",
    "--batch-size", "8", "--actor-hidden", "8", "--critic-hidden", "8", "--num-critics", "2", "--num-quantiles", "3",
    "--quantiles-dropped", "1", "--normalize-observations", "True", "--preset", "none",
]  # fmt: skip


def train(folder: Path, config=CONFIG, make_agent=tqc.make_agent, **changes) -> Path:
    options = dataclasses.replace(OPTIONS, runs_folder=str(folder), name="run", **changes)
    return session.train(problem.prepare("tqc", make_agent, config, options))


def records(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    return recording.read_metrics(folder).drop(columns="seconds"), recording.read_evaluations(folder)


def policies(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((folder / "policies").glob("*.npz")):
        with np.load(path) as file:
            found |= {f"{path.stem}/{name}": file[name] for name in file.files}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert policies(one).keys() == policies(other).keys()
    for name, array in policies(one).items():
        np.testing.assert_array_equal(array, policies(other)[name], err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted run, which the others are compared with."""
    return train(tmp_path_factory.mktemp("finished"))


def test_a_run_leaves_what_it_promises(finished):
    metrics, evaluations = records(finished)
    assert list(metrics.columns[:4]) == ["iteration", "env_steps", "updates", "seed"]
    assert set(metrics.seed) == {0, 1}
    assert sorted(set(metrics.env_steps)) == [32, 72, 112, 152, 192, 232]
    assert len(evaluations) == 6 * 2 * 3
    assert metrics[metrics.env_steps > 32].critic_loss.notna().all()
    # An episode of Pendulum lasts 20 steps here, so by 232 steps every seed has finished some.
    assert (metrics.episode_length.dropna() == 20).all()
    assert len(metrics.episode_length.dropna()) > 0
    assert metrics.calibration_w1.gt(0).all()
    assert (metrics.overestimation.abs() <= 1.0001 * metrics.calibration_w1).all()
    by_hand = evaluations.groupby(["env_steps", "seed"]).episode_return.mean().to_numpy()
    np.testing.assert_allclose(metrics.evaluation_return, by_hand, rtol=1e-5)
    config = recording.read_config(finished)
    assert config["config"]["quantiles_dropped"] == 1
    assert config["config"]["replay_capacity"] == CONFIG.replay_capacity, "what was asked for"
    manifest = (finished / "checkpoints" / "100" / "manifest.json").read_text()
    assert '"shape": [\n    2,\n    232' in manifest, "a ring that never wraps is stored no larger than the run"
    assert {"jax", "python"} <= set(config["versions"])
    assert len(policies(finished)) == 2 * (2 * 2 + 2 + 2)  # kernels, biases, statistics, bounds of two seeds
    assert not np.array_equal(policies(finished)["seed_0/kernel_0"], policies(finished)["seed_1/kernel_0"])


def test_stopped_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """N iterations, save, load, M more: bit for bit N + M, replay, statistics and keys included."""
    save = Checkpoints.save

    def save_then_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        os.kill(os.getpid(), signal.SIGINT)  # a Ctrl-C at a moment that is no evaluation point

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.setattr(Checkpoints, "save", save)
    folder = tmp_path / "tqc" / "Pendulum-v1" / "run"
    stopped_at = recording.read_metrics(folder).env_steps.max()
    assert stopped_at < 232
    assert train(tmp_path, resume="latest") == folder
    assert_same_run(finished, folder)


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running", "jaxrl_dist/records")
def test_kill_nine_at_any_moment(finished, tmp_path):
    """Killed again and again at random moments, the run still ends as if nothing had happened."""
    script = Path(tqc.__file__)
    command = [sys.executable, script, *ARGUMENTS, "--runs-folder", tmp_path, "--name", "run", "--resume", "auto"]
    folder = tmp_path / "tqc" / "Pendulum-v1" / "run"
    chooser = random.Random(0)
    # XLA on CPU gives the same bits on one device and on several only run by run: keep to this test's one device.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        seen = len(Checkpoints(folder / "checkpoints").iterations())
        deadline = time.monotonic() + 120
        # Wait for a new checkpoint to appear or to be in the making, then strike shortly after.
        while process.poll() is None and time.monotonic() < deadline and kills < 4:
            begun = [path for path in (folder / "checkpoints").glob("*")] if folder.exists() else []
            if len(begun) > seen:
                time.sleep(chooser.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert process.returncode == 0, output
    assert kills >= 2
    assert_same_run(finished, folder)


def test_damaged_checkpoint_is_named_and_older_one_used_only_on_request(finished, tmp_path):
    import shutil

    folder = tmp_path / "tqc" / "Pendulum-v1" / "run"
    shutil.copytree(finished, folder)
    older, newest = Checkpoints(folder / "checkpoints").iterations()
    victim = max(
        (p for p in (folder / "checkpoints" / str(newest)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(DamagedCheckpoint, match=str(newest)):
        train(tmp_path, resume="latest")
    assert train(tmp_path, resume="auto") == folder
    assert_same_run(finished, folder)
    assert older < newest


def test_resume_refuses_other_settings(finished):
    folder = finished.parents[2]
    with pytest.raises(ConfigurationError, match=r"--discount is 0\.9.*started with 0\.99"):
        train(folder, dataclasses.replace(CONFIG, discount=0.9), resume="latest")
    with pytest.raises(ConfigurationError, match="--seed is 5"):
        train(folder, resume="latest", seed=5)
    with pytest.raises(ConfigurationError, match=r"--eval-rollouts is 9.*started with 3"):
        train(folder, resume="latest", eval_rollouts=9)


def test_folder_in_use(finished):
    with pytest.raises(ConfigurationError, match=r"--name is 'run'.*already holds a run"):
        train(finished.parents[2])


def test_non_finite_metric_stops_the_run(tmp_path):
    """The metric, the iteration and the run are named; records and earlier checkpoints stay."""

    def make_breaking_agent(config, env, env_params):
        agent = tqc.make_agent(config, env, env_params)

        def step(state):
            state, metrics = agent.step(state)
            # The replay of run 1 (the other key) is poisoned once it holds 150 rows.
            bad = (state.experience.replay.size >= 150) & (state.learner.critic.optimizer[0].count > 0)
            loss = metrics["critic_loss"]
            return state, metrics | {"critic_loss": loss._replace(total=jnp.where(bad, jnp.nan, loss.total))}

        return agent._replace(step=step)

    with pytest.raises(
        session.NonFiniteMetric, match=r"critic_loss became non-finite at iteration 59 in run 0 \(seed 0\)"
    ):
        train(tmp_path, make_agent=make_breaking_agent, on_divergence="stop")
    folder = tmp_path / "tqc" / "Pendulum-v1" / "run"
    assert recording.read_metrics(folder).env_steps.max() == 112
    assert Checkpoints(folder / "checkpoints").newest_intact()[0] == 50


def test_evaluate_a_saved_run(finished):
    seeds, returns, parts = results.evaluate_run(finished, cli.find_algorithm, episodes=4, seed=1)
    assert parts == {}
    assert list(seeds) == [0, 1]
    assert returns.shape == (2, 4)
    again = results.evaluate_run(finished, cli.find_algorithm, episodes=4, seed=1)[1]
    np.testing.assert_array_equal(returns, again)
    assert (returns < 0).all()  # a cost at every step of Pendulum


def test_draw_return_distributions_of_a_saved_run(finished, tmp_path):
    def draw(name, **arguments):
        console = Console(width=200)
        options = {"run_seed": None, "states": 2, "seed": 0} | arguments
        results.plot_distribution(finished, cli.find_algorithm, tmp_path / name, console, **options)
        return (tmp_path / name).read_bytes()

    first = draw("first.png")
    assert first.startswith(b"\x89PNG")
    assert draw("second_run.png", run_seed=1) != first
    with pytest.raises(ConfigurationError, match=r"--run-seed is 7; .* holds the seeds \[0, 1\]"):
        draw("none.png", run_seed=7)
    with pytest.raises(ConfigurationError, match="--states is 0; it must be at least 1"):
        draw("none.png", states=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"quantiles_dropped": 3}}, "--quantiles-dropped is 3; it must be below --num-quantiles = 3"),
        ({"config": {"batch_size": 64}}, "--batch-size is 64; it must be at most --warmup-steps = 32"),
        ({"config": {"critic_learning_rate": -1.0}}, "--critic-learning-rate is -1.0; it must be finite and in"),
        ({"config": {"discount": float("nan")}}, "--discount is nan"),
        ({"config": {"discount": 1.5}}, r"--discount is 1.5; it must be finite and in \[0, 1\]"),
        ({"config": {"num_envs": 0}}, "--num-envs is 0"),
        ({"config": {"actor_hidden": (8, 0)}}, "--actor-hidden"),
        ({"config": {"num_envs": 64}}, "--num-envs is 64"),
        ({"total_steps": 32}, "--total-steps is 32; it must be above the 32 steps"),
        ({"num_seeds": 0}, "--num-seeds is 0"),
        ({"env_id": "CartPole-v1", "env_options": ()}, "CartPole.*discrete"),
        ({"env_id": "Pendulum", "env_options": ()}, "Pendulum-v1"),
        ({"env_options": ("gravity",)}, "--env-options"),
        ({"env_options": ("gravitas=3",)}, "gravitas"),
        ({"eval_states": -1}, "--eval-states is -1"),
        ({"eval_rollouts": 0}, "--eval-rollouts is 0"),
        ({"probe_support": "rewards"}, "--probe-support is rewards; it is for algorithms with a fixed support"),
        ({"resume": "maybe"}, "--resume is 'maybe'"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_bad_input_is_named_before_compiling(changes, message, tmp_path):
    changes = dict(changes)
    config = dataclasses.replace(CONFIG, **changes.pop("config", {}))
    with pytest.raises(ValueError, match=message):
        train(tmp_path, config, **changes)
    assert not any(tmp_path.rglob("*")), "nothing is written for a run that cannot start"


def test_the_plan_says_that_calibration_is_off_and_why(tmp_path):
    options = problem.RunOptions(env_id="DiscountingChain-bsuite", total_steps=20_000, name="a")
    prepared = problem.prepare("c51", c51.make_agent, c51.Config(), options)
    text = io.StringIO()
    console = Console(file=text, width=300)
    session._Session(prepared, tmp_path, console, session.make_programs(prepared), None, None)._print_plan()
    (line,) = [line for line in text.getvalue().splitlines() if line.startswith("calibration")]
    assert line.split(maxsplit=1)[1].startswith("off: the environment's time limit cannot be lifted (")


def test_env_steps_are_reported_as_taken(tmp_path):
    """Totals that do not divide evenly are rounded up to whole iterations, and said so in the records."""
    prepared = problem.prepare("tqc", tqc.make_agent, CONFIG, dataclasses.replace(OPTIONS, total_steps=101))
    agent = tqc.make_agent(prepared.config, prepared.env, prepared.env_params)

    assert agent.clock.warmup_steps + agent.clock.iterations(101) * agent.clock.env_steps == 102


def test_replay_is_as_large_as_asked_when_it_wraps():
    for capacity, rows in ((64, 64), (1000, 232)):
        prepared = problem.prepare(
            "tqc", tqc.make_agent, dataclasses.replace(CONFIG, replay_capacity=capacity), OPTIONS
        )
        agent = prepared.make_agent(prepared.config, prepared.env, prepared.env_params)
        state = jax.eval_shape(agent.init, jax.random.key(0))
        assert state.experience.replay.rows.reward.shape == (rows,)
        assert prepared.config.replay_capacity == capacity


# -- value-based agents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["rewards", "returns"])
def test_probed_support_covers_what_random_actions_find(probe):
    """CartPole: a reward of 1 at every step, and a discount at which about 10 steps count."""
    options = dataclasses.replace(
        OPTIONS, env_id="CartPole-v1", env_options=(), total_steps=100, probe_support=probe, seed=3
    )
    config = c51.Config(warmup_steps=32, batch_size=8, discount=0.9)
    found = problem.prepare("c51", c51.make_agent, config, options).config
    assert dataclasses.replace(found, v_min=config.v_min, v_max=config.v_max) == config
    if probe == "rewards":
        assert (found.v_min, found.v_max) == pytest.approx((0, 10))
    else:
        # Last steps are worth 1, and no episode of random actions lasts long: between 5 and 10 at most, plus a margin.
        highest = (found.v_max + 0.5) / 1.5
        assert 5 < highest < 10
        assert found.v_min == pytest.approx(1 - 0.5 * (highest - 1), rel=1e-4)


def test_configurations_of_a_sweep_are_probed_once(monkeypatch):
    probed, rollout = [], support._random_rollout

    def counted(*arguments):
        probed.append(arguments[0])
        return rollout(*arguments)

    monkeypatch.setattr(support, "_random_rollout", counted)
    problem._random_rewards.cache_clear()
    options = dataclasses.replace(OPTIONS, env_id="CartPole-v1", env_options=(), total_steps=100)
    options = dataclasses.replace(options, probe_support="rewards")
    config = c51.Config(warmup_steps=32, batch_size=8, discount=0.9)
    other = dataclasses.replace(config, discount=0.5)
    highest = [problem.prepare("c51", c51.make_agent, one, options).config.v_max for one in (config, other)]
    assert highest == pytest.approx([10, 2])
    assert len(probed) == 1
    problem.prepare("c51", c51.make_agent, config, dataclasses.replace(options, seed=options.seed + 1))
    assert len(probed) == 2, "another seed, another rollout"


def test_support_without_rewards_is_refused():
    options = dataclasses.replace(
        OPTIONS, env_id="MountainCar-v0", env_options=(), total_steps=100, probe_support="returns"
    )
    config = c51.Config(warmup_steps=32, batch_size=8, discount=0.0)
    with pytest.raises(ConfigurationError, match="random actions found no reward but -1"):
        problem.prepare("c51", c51.make_agent, config, options)

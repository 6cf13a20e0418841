"""The command line as a newcomer meets it: help, exit codes, one clear line for bad input."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_dist import cli
from jaxrl_dist.problem import RunOptions, split_preset
from jaxrl_dist.sweeps import SweepOptions

ROOT = Path(__file__).parents[1]
ALGORITHMS = sorted(cli.algorithms())


def run(*arguments, timeout=300) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment,
    )


def test_algorithms_are_found():
    assert {"tqc", "sac", "td3", "ddpg"} <= set(ALGORITHMS)


@pytest.mark.parametrize("name", ["tqc", "rainbow"])
def test_help_lists_every_option_with_meaning_and_default(name):
    module = cli.find_algorithm(name)
    done = run(module.__file__, "--help")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.replace("│", " ").split())
    fields = [field for options in (module.Config, RunOptions, SweepOptions) for field in dataclasses.fields(options)]
    for field in fields:
        assert f"--{field.name.replace('_', '-')} " in words, field.name
    for group in ("run options", "sweep options", "algorithm options", "--sweep.FIELD"):
        assert group in words
    assert words.count("(default:") == len(fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "Pendulun-v1"], "Pendulum-v1"),
        (["--env-id", "CartPole-v1"], "discrete"),
        (["--quantiles-dropped", "25"], "--quantiles-dropped is 25"),
        (["--preset", "mine"], "--preset is 'mine'"),
        (["--learning-rat", "1"], "--learning-rat"),
        (["--batch-size", "many"], "--batch-size"),
        (["--sweep.learning-rate", "1"], "--sweep.learning-rate is no field"),
        (["--sweep.discount", "1:0:3"], "--sweep.discount is 1:0:3, an empty range"),
        (["--sweep-samples", "3"], "need --sweep.FIELD"),
        (["--devices", "99"], "--devices is 99; it must be all or a number from 1 to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, tmp_path):
    done = run("algorithms/actor_critic/tqc.py", "--runs-folder", tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "compiling" not in done.stdout
    assert not any(tmp_path.iterdir())


def test_a_file_without_training_is_run_the_same_way():
    done = run("-m", "jaxrl_dist", "train", "robust_risk", "--rounds", "2", "--iterations", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "safe" in done.stdout
    done = run("algorithms/dynamic_programming/robust_risk.py", "--alpha", "2")
    assert done.returncode == 2
    assert "--alpha is 2.0; it must be" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_list_doctor_and_unknown_algorithm():
    listed = run("-m", "jaxrl_dist", "list")
    assert listed.returncode == 0, listed.stderr
    for word in (*ALGORITHMS, "actor_critic", "Pendulum-v1", "brax/hopper", "probe", "yes", "no: actions"):
        assert word in listed.stdout
    doctor = run("-m", "jaxrl_dist", "doctor")
    assert "jax" in doctor.stdout
    unknown = run("-m", "jaxrl_dist", "train", "tcq")
    assert unknown.returncode == 2
    assert "tqc" in unknown.stdout


def test_a_preset_sets_options_of_the_run_and_those_given_override_it(monkeypatch):
    """Without --env-id the first preset's environment; total_steps of its preset, and everything else by default."""
    from jaxrl_dist import runner
    from jaxrl_dist.algorithms.value_based import dqn

    asked = []
    monkeypatch.setattr(cli, "spread_over_cores", lambda: None)  # too late in a process that has used JAX
    monkeypatch.setattr(runner, "train", lambda problem, console: asked.append(problem))
    presets = {"CartPole-v1": {"total_steps": 777, "warmup_steps": 64, "hidden": (8,)}, "small": {"total_steps": 900}}
    common = ["--batch-size", "16"]
    for arguments in (
        [],
        ["--total-steps", "555"],
        ["--preset", "small", "--warmup-steps", "32"],
        ["--preset", "none"],
    ):
        cli.main(dqn.Config, dqn.make_agent, presets, common + arguments)
    assert {problem.options.env_id for problem in asked} == {"CartPole-v1"}
    assert [problem.options.total_steps for problem in asked] == [777, 555, 900, 20_000]
    assert [problem.config.hidden for problem in asked] == [(8,), (8,), (128, 128), (128, 128)]
    assert [problem.config.warmup_steps for problem in asked] == [64, 64, 32, dqn.Config().warmup_steps]
    assert {problem.config.batch_size for problem in asked} == {16}
    assert [problem.config.replay_capacity for problem in asked] == [777, 555, 900, 20_000]


def test_split_preset():
    of_the_run, of_the_algorithm = split_preset({"total_steps": 5, "discount": 0.9, "eval_every": 2, "hidden": (1,)})
    assert of_the_run == {"total_steps": 5, "eval_every": 2}
    assert of_the_algorithm == {"discount": 0.9, "hidden": (1,)}


def test_two_runs_have_no_one_picture_of_distributions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "spread_over_cores", lambda: None)
    with pytest.raises(SystemExit) as exit:
        cli.command(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--distribution"])
    assert exit.value.code == 2
    assert "RUN is 2 folders; --distribution draws one" in capsys.readouterr().out


@pytest.mark.slow
def test_train_evaluate_and_plot(tmp_path):
    """A small run with everything on, then the commands that read it."""
    arguments = [
        "--total-steps", "300", "--warmup-steps", "128", "--batch-size", "16", "--num-seeds", "2", "--actor-hidden",
        "8", "--critic-hidden", "8", "--eval-episodes", "2", "--runs-folder", tmp_path, "--name", "one",
    ]  # fmt: skip
    trained = run("-m", "jaxrl_dist", "train", "sac", *arguments)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    for word in ("memory", "compiling", "compiled in", "IQM over 2 seeds", "95 % interval", "CVaR", "updates/s"):
        assert word in trained.stdout
    folder = tmp_path / "sac" / "Pendulum-v1" / "one"
    for name in ("config.json", "metrics.csv", "evaluations.csv", "learning_curve.png", "return_distribution.png"):
        assert (folder / name).stat().st_size > 0
    evaluated = run("-m", "jaxrl_dist", "evaluate", folder, "--episodes", "3")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert "IQM over 2 seeds" in evaluated.stdout
    plotted = run("-m", "jaxrl_dist", "plot", folder, "--out", tmp_path / "all.png")
    assert plotted.returncode == 0, plotted.stdout + plotted.stderr
    assert (tmp_path / "all.png").stat().st_size > 0
    picture = tmp_path / "laws.png"
    drawn = run("-m", "jaxrl_dist", "plot", folder, "--distribution", "--out", picture, "--states", "2")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    unknown = run("-m", "jaxrl_dist", "plot", folder, "--distribution", "--run-seed", "9", "--out", picture)
    assert unknown.returncode == 2
    assert "--run-seed is 9" in unknown.stdout
    assert "holds the seeds [0, 1]" in " ".join(unknown.stdout.split())
    missing = run("-m", "jaxrl_dist", "evaluate", tmp_path / "nothing")
    assert missing.returncode == 2
    assert "nothing" in missing.stdout

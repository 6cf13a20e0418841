"""The command line as a newcomer meets it: help, exit codes, one clear line for bad input."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest

from jaxrl_dist import cli
from jaxrl_dist.configuration import option
from jaxrl_dist.records import recording
from jaxrl_dist.running import compile_cache, session
from jaxrl_dist.running.problem import RunOptions, split_preset
from jaxrl_dist.studies.sweeps import SweepOptions

ROOT = Path(__file__).parents[1]
ALGORITHMS = sorted(cli.algorithms())
PENDULUM = "collect jaxrl_dist.envs.controllers:pendulum --env-id Pendulum-v1 --out d.npz"


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


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `jaxrl-dist ...` in this process, in an empty folder: its exit code, and what it wrote to stdout, stderr."""
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)  # too late in a process that has used JAX
    monkeypatch.chdir(tmp_path)

    def command(*arguments) -> tuple[int, str, str]:
        status = 0
        try:
            cli.command([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return command


def refusal(outcome: tuple[int, str, str], status: int = 2) -> str:
    """The one line on stderr with which a command ended."""
    assert outcome[0] == status, outcome
    assert "error" not in outcome[1]
    assert "compiling" not in outcome[1]
    assert outcome[2].startswith("error: ")
    assert outcome[2].count("\n") == 1
    return outcome[2].strip()


def test_algorithms_are_found():
    assert {"tqc", "sac", "td3", "ddpg"} <= set(ALGORITHMS)


@pytest.mark.parametrize("name", ["tqc", "rainbow"])
def test_help_lists_every_option_with_meaning_and_default(name, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module = cli.find_algorithm(name)
    status, said, _ = command("train", name, "--help")
    assert status == 0
    words = " ".join(said.replace("│", " ").split())
    fields = [field for options in (module.Config, RunOptions, SweepOptions) for field in dataclasses.fields(options)]
    for field in fields:
        assert f"--{field.name.replace('_', '-')} " in words, field.name
    for group in ("run options", "sweep options", "algorithm options", "--sweep.FIELD"):
        assert group in words
    assert words.count("(default:") == len(fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # unknown options, with the nearest names
        ("--learning-rat 1", "--learning-rat is no option of jaxrl-dist train tqc; did you mean --actor-learning-rate"),
        ("--lr 1", "did you mean --actor-learning-rate, --critic-learning-rate or --temperature-learning-rate?"),
        ("--critic_lr 1", "--critic-lr is no option of jaxrl-dist train tqc; did you mean --critic-learning-rate"),
        ("--gamma 0.9", "did you mean --discount?"),
        ("--foo 1", "--foo is no option of jaxrl-dist train tqc; --help lists them"),
        ("-x", "-x is no option; options begin with --"),
        ("--", "-- is no option; options begin with --"),
        ("7", "'7' stands before any option"),
        # values that are missing, too many, or of another type
        ("--batch-size", "--batch-size has no value; it must be a whole number"),
        ("--batch-size 1 2", "--batch-size has 2 values, 1 2; it must be a whole number"),
        ("--batch-size many", "--batch-size is 'many'; it must be a whole number"),
        ("--batch-size 1.5", "--batch-size is '1.5'; it must be a whole number"),
        ("--batch-size 1e400", "--batch-size is '1e400'; it must be a whole number"),
        ("--discount high", "--discount is 'high'; it must be a number"),
        ("--actor-hidden 8,,8", "--actor-hidden is ''; it must be whole numbers, such as 64,64"),
        ("--plots maybe", "--plots is 'maybe'; it must be True or False"),
        ("--tensorboard", "--tensorboard has no value; it must be True or False"),
        ("--device gpus", "--device is 'gpus'; it must be auto, cpu, gpu or tpu"),
        # numbers out of range, among them those beyond what the device can count or what makes a seed
        ("--discount nan", "--discount is nan; it must be finite and in [0, 1]"),
        ("--kappa 1e300", "--kappa is 1e+300; it must be finite and in [0, inf), also as float32"),
        ("--initial-temperature 1e-60", "--initial-temperature is 1e-60; it must be finite and in (0, inf), also as"),
        ("--quantiles-dropped 25", "--quantiles-dropped is 25"),
        ("--num-seeds 3000000000", "--num-seeds is 3000000000; it must be a whole number in [1, 1000000]"),
        ("--total-steps 1e10", "--total-steps is 10000000000; it must be a whole number in [0, 2147483647]"),
        ("--eval-episodes 1e10", "--eval-episodes is 10000000000; it must be a whole number in [1, 2147483647]"),
        ("--replay-capacity 1e10", "--replay-capacity is 10000000000; it must be a whole number in [1, 2147483647]"),
        ("--warmup-steps 1e10", "--warmup-steps is 10000000000; it must be a whole number in [1, 2147483647]"),
        ("--critic-hidden 3e9", "--critic-hidden is (3000000000,); it must be whole numbers in [1, 2147483647]"),
        ("--updates-per-iteration 1e6", "updates in all; at most 2147483647 can be counted"),
        (
            "--total-steps 2147483647 --num-envs 1000",
            "2147484000 in whole iterations; at most 2147483647",
        ),
        ("--eval-states 1e5", "--eval-states is 100000; with episodes of up to 200 steps it must be at most 46340"),
        ("--seed 4294967297", "--seed is 4294967297; it must be a whole number in [0, 4294967295]"),
        ("--seed 4294967295 --num-seeds 2", "the last seed is 4294967296; it must be below 2^32"),
        # names that are not there
        ("--env-id Pendulun-v1", "--env-id Pendulun-v1: environment 'Pendulun-v1' is unknown, nearest: Pendulum-v1"),
        ("--env-id ../../x", "--env-id ../../x: environment '../../x' is unknown"),
        ("--env-id CartPole-v1", "discrete"),
        ("--preset mine", "--preset is 'mine'; it must be auto, none, Pendulum-v1"),
        ("--env-options foo=1", "--env-options foo=1: option 'foo' of environment 'Pendulum-v1' is unknown, allowed: "),
        ("--env-options max_torque", "--env-options has 'max_torque'; each one must be name=value"),
        ("--env-options max_torque=nan", "--env-options has 'max_torque=nan'; a number must be finite"),
        ("--env-options max_torque=high", "--env-options max_torque=high: max_torque is 'high', allowed: float"),
        ("--devices 99", "--devices is 99; it must be all or a number from 1 to"),
        ("--resume newest --name a", "--resume is 'newest'; it must be 'latest', 'auto' or an iteration number"),
        # sweeps
        ("--sweep.lr 1", "--sweep.lr is no field of the algorithm; did you mean --sweep.actor-learning-rate"),
        ("--sweep.discount 1:0:3", "--sweep.discount is 1:0:3, an empty range"),
        ("--sweep.discount 0:1:1e9", "--sweep.discount is 0:1:1e9; COUNT must be at most 100,000"),
        ("--sweep.discount 0:1:1e4 --sweep.kappa 0:1:1e4", "make 100,000,000 configurations; at most 100,000"),
        ("--sweep.batch-size 16 1.5", "--sweep.batch-size is '1.5'; it must be a whole number"),
        ("--sweep-samples 3", "--sweep-samples need --sweep.FIELD"),
        ("--sweep.discount 0.9 --sweep-samples 3e9", "--sweep-samples is 3000000000; it must be a whole number in"),
        ("--sweep-file nowhere.csv", "--sweep-file is nowhere.csv, which is no file"),
        # names and places of runs
        ("--name ../../x", "--name is '../../x'; it must be"),
        ("--name /x", "--name is '/x'; it must be a name inside of --runs-folder, not an absolute path"),
        ("--name a//b", "--name is 'a//b'; it must be"),
        ("--name .", "--name is '.'; it must be"),
        ("--name " + 300 * "a", "it must be at most 200 bytes long"),
        ("--runs-folder /dev/null", "/dev/null is no folder"),
        ("--runs-folder /proc/runs", "/proc cannot be written to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(arguments, message, command, tmp_path):
    assert message in refusal(command("train", "tqc", *arguments.split()))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "escape\x1b[2J", " ", "a/ b", "broken\udcff"])
def test_names_that_a_terminal_would_obey_are_refused_and_shown_harmless(name, command, tmp_path):
    line = refusal(command("train", "tqc", "--name", name))
    assert line.isprintable()
    assert line.startswith("error: --name is ")
    assert not any(tmp_path.iterdir())


def test_a_run_has_a_place_of_its_own(command, tmp_path):
    """Neither a file stands in its way, nor does it lie inside of another run."""
    there = tmp_path / "runs" / "tqc" / "Pendulum-v1"
    (there / "one").mkdir(parents=True)
    (there / "one" / "config.json").write_text("{}")
    line = refusal(command("train", "tqc", "--name", "one/checkpoints"))
    assert "inside of runs/tqc/Pendulum-v1/one, which is a run" in line
    (there / "file").write_text("")
    assert "runs/tqc/Pendulum-v1/file is no folder" in refusal(command("train", "tqc", "--name", "file/two"))
    (tmp_path / "other").write_text("")
    assert "other is no folder" in refusal(command("train", "tqc", "--runs-folder", "other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("trian tqc", "COMMAND is 'trian'; did you mean train?"),
        ("train", "the following arguments are required: NAME"),
        ("train tcq", "NAME is 'tcq', which is no algorithm; did you mean tqc"),
        ("train --seed 1 tqc", "--seed is no option of jaxrl-dist train"),
        ("train robust_risk --alpha 2", "--alpha is 2.0; it must be finite and in [0, 1]"),
        ("train robust_risk --seed 2", "--seed is no option of jaxrl-dist train robust_risk"),
        ("list all", "'all' is one word too many for jaxrl-dist list"),
        ("evaluate", "the following arguments are required: RUN"),
        ("collect", "the following arguments are required: SOURCE, --out"),
        ("collect nowhere --out d.npz", "run folder nowhere does not exist"),
        ("collect nowhere --out d.npz --env-id Pendulum-v1", "SOURCE is 'nowhere', a run, which has its environment"),
        ("collect a.py:f --out d.npz", "SOURCE is 'a.py:f', a controller; --env-id must say for what"),
        ("collect a.py:f --env-id Pendulum-v1 --out d.npz", "there is no file"),
        (f"{PENDULUM} --explore", "--explore and --run-seed are for the folder of a run"),
        (f"{PENDULUM} --random 1.5", "--random is 1.5; it must be in [0, 1]"),
        (f"{PENDULUM} --random 0 1 0", "--random has 3 values; one or two are allowed"),
        (f"{PENDULUM} --noise -0.5", "--noise is -0.5; it must be finite and in [0, inf)"),
        (f"{PENDULUM} --episodes 0", "--episodes is 0; it must be a whole number in [1, 2147483647]"),
        (f"{PENDULUM} --episode 3 --sed 1", "--sed is no option of jaxrl-dist collect; did you mean --seed?"),
        (f"{PENDULUM} --env-options mas=1", "mas"),
        (
            "collect jaxrl_dist.envs.controllers:pendulum --env-id CartPole-v1 --out d.npz",
            "SOURCE is 'jaxrl_dist.envs.controllers:pendulum', which",
        ),
        ("evaluate nowhere", "run folder nowhere does not exist"),
        ("evaluate .", "config.json does not exist: no run folder"),
        ("evaluate . --episode 2 --sed 1", "--sed is no option of jaxrl-dist evaluate; did you mean --seed?"),
        ("evaluate . --episodes", "--episodes expected one argument"),
        ("evaluate . --episodes few", "--episodes is 'few'; it must be a whole number"),
        ("evaluate . --episodes 0", "--episodes is 0; it must be a whole number in [1, 2147483647]"),
        ("evaluate . --seed 4294967296", "--seed is 4294967296; it must be a whole number in [0, 4294967295]"),
        ("plot a b --distribution", "RUN is 2 folders; --distribution draws one"),
        ("plot . --out nowhere/x.png", "--out is nowhere/x.png; it must be a file in a folder that exists"),
        ("plot . --out x.gif2", "--out is x.gif2; it must end with one of ."),
        ("plot . --out x", "--out is x; it must end with one of ."),
        ("plot . --distribution --out x.jpgg", "--out is x.jpgg; it must end with one of ."),
        ("report . --out nowhere/x.html", "--out is nowhere/x.html; it must be a file in a folder that exists"),
        ("report . --out /proc/x.html", "--out is /proc/x.html; it must be a file in a folder that exists and can be"),
        ("report . --out .", "--out is .; it must be a file in a folder"),
        ("report .", "config.json does not exist"),
    ],
)
def test_bad_input_to_commands_is_one_line_and_exit_code_two(arguments, message, command, tmp_path):
    assert message in refusal(command(*arguments.split()))
    assert not any(tmp_path.iterdir())


def test_the_ways_to_ask_for_help(command):
    for arguments in ("--help", "train --help", "train -h", "evaluate --help", "train robust_risk --help"):
        status, said, _ = command(*arguments.split())
        assert status == 0
        assert "usage: jaxrl-dist" in said
    assert "tqc" in command("train", "--help")[1]
    assert "--total-steps" in command("train", "tqc", "--seed", "x", "--help")[1]


def test_whole_numbers_may_be_written_as_people_write_large_ones(command, monkeypatch):
    from jaxrl_dist.studies import study

    asked = []
    monkeypatch.setattr(cli, "_require_sound", lambda folder: None)
    monkeypatch.setattr(session, "train", lambda problem, console: asked.append(problem))
    arguments = "--total-steps 1e6 --warmup-steps 2_000 --seed 2e5 --actor-hidden 1e1,20 --critic_hidden 8 8 --kappa=-0"
    assert command("train", "tqc", *arguments.split())[0] == 0
    (problem,) = asked
    assert (problem.options.total_steps, problem.config.warmup_steps) == (1_000_000, 2_000)
    assert (problem.options.seed, type(problem.options.seed)) == (200_000, int)
    assert (problem.config.actor_hidden, problem.config.critic_hidden) == ((10, 20), (8, 8))
    monkeypatch.setattr(study, "train", lambda *arguments: asked.append(arguments[4]))
    arguments = "--sweep.batch-size 1e2 2_56 --sweep.discount 0.9:1:2e0"
    assert command("train", "tqc", *arguments.split())[0] == 0
    assert asked[1] == [{"batch_size": size, "discount": d} for size in (100, 256) for d in (0.9, 1.0)]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a.csv"), 1, "No space left on device: runs/a.csv"),
        (OSError("the checkpoint is not written"), 1, "the checkpoint is not written"),
        (session.NonFiniteMetric("loss became non-finite"), 1, "loss became non-finite"),
        (MemoryError("9 GiB"), 1, "out of memory: 9 GiB"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\n9 bytes"),
            1,
            "out of memory: Out of ",
        ),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_what_breaks_a_run_is_one_line_too(error, status, line, command, monkeypatch):
    def train(problem, console):
        raise error

    monkeypatch.setattr(session, "train", train)
    outcome = command("train", "tqc")
    if line is None:
        assert outcome[0] == status
    else:
        assert refusal(outcome, status).startswith(f"error: {line}")


def test_an_error_that_is_not_ours_keeps_its_traceback(command, monkeypatch):
    monkeypatch.setattr(session, "train", lambda problem, console: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        command("train", "tqc")


def test_bad_input_to_a_file_is_one_line_on_stderr():
    done = run("algorithms/value_based/qr_dqn.py", "--lr", "1")
    assert done.returncode == 2
    assert done.stderr == "error: --lr is no option of qr_dqn.py; did you mean --learning-rate?\n"
    assert done.stdout == ""


def test_runs_on_two_environments_say_so_in_their_picture(command, tmp_path, monkeypatch):
    from jaxrl_dist.records import plotting

    drawn = {}
    monkeypatch.setattr(
        plotting, "learning_curve", lambda frames, path, title, metric: drawn.update(labels=list(frames), title=title)
    )
    for name, env_id in (("a", "CartPole-v1"), ("b", "Acrobot-v1")):
        recorder = recording.Recorder(tmp_path / name)
        recorder.write_config({"algorithm": "qr_dqn", "config": {}, "options": {"env_id": env_id}})
        recorder.append([{"env_steps": 1, "seed": 0, "evaluation_return": 1.0}])
    status, said, _ = command("plot", "a", "b")
    assert status == 0
    assert drawn["title"] == "Acrobot-v1 and CartPole-v1"
    assert drawn["labels"] == ["QR-DQN a on CartPole-v1", "QR-DQN b on Acrobot-v1"]
    assert "warning: these runs are on 2 environments (Acrobot-v1, CartPole-v1), whose returns do not compare" in said
    status, said, _ = command("plot", "a")
    assert (drawn["title"], drawn["labels"], "warning" in said) == ("CartPole-v1", ["QR-DQN"], False)


def test_a_file_without_training_is_run_the_same_way():
    done = run("-m", "jaxrl_dist", "train", "robust_risk", "--rounds", "2", "--iterations", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "safe" in done.stdout
    done = run("algorithms/dynamic_programming/robust_risk.py", "--alpha", "2")
    assert done.returncode == 2
    assert done.stderr == "error: --alpha is 2.0; it must be finite and in [0, 1]\n"


SOLVERS = [name for name in ALGORITHMS if hasattr(cli.find_algorithm(name), "solve")]
WRONG = {float: ("nan", "inf", "-1e39", "many"), int: ("-1", "1.5", "3e9", "many"), str: ("nowhere", "", "cvar:7")}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_refuse_bad_values_in_one_line_before_they_compute(name, command, monkeypatch):
    monkeypatch.setattr(compile_cache, "use", lambda *_: None)
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiles"))
    hints = typing.get_type_hints(cli.find_algorithm(name).Config)
    for field, hint in hints.items():
        for value in WRONG.get(hint, ("nowhere",)):
            said = refusal(command("train", name, option(field), value))
            assert option(field) in said or value in said, said


def test_list_and_doctor():
    listed = run("-m", "jaxrl_dist", "list")
    assert listed.returncode == 0, listed.stderr
    for word in (*ALGORITHMS, "actor_critic", "Pendulum-v1", "brax/hopper", "probe", "yes", "no: actions"):
        assert word in listed.stdout
    assert "velocity_free/MountainCarContinuous-v0" in listed.stdout  # no name is broken on 80 characters
    doctor = run("-m", "jaxrl_dist", "doctor")
    assert "jax" in doctor.stdout


def test_a_preset_sets_options_of_the_run_and_those_given_override_it(monkeypatch):
    """Without --env-id the first preset's environment; total_steps of its preset, and everything else by default."""
    from jaxrl_dist.algorithms.value_based import dqn

    asked = []
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)  # too late in a process that has used JAX
    monkeypatch.setattr(cli, "_require_sound", lambda folder: None)
    monkeypatch.setattr(session, "train", lambda problem, console: asked.append(problem))
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
    assert {problem.config.replay_capacity for problem in asked} == {dqn.Config().replay_capacity}


def test_split_preset():
    of_the_run, of_the_algorithm = split_preset({"total_steps": 5, "discount": 0.9, "eval_every": 2, "hidden": (1,)})
    assert of_the_run == {"total_steps": 5, "eval_every": 2}
    assert of_the_algorithm == {"discount": 0.9, "hidden": (1,)}


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
    assert "--run-seed is 9" in unknown.stderr
    assert "holds the seeds [0, 1]" in unknown.stderr
    missing = run("-m", "jaxrl_dist", "evaluate", tmp_path / "nothing")
    assert missing.returncode == 2
    assert "nothing" in missing.stderr

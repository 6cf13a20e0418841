"""Two processes on one machine: the same results as one, bit for bit, and a clear end when one of them is lost."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.algorithms.value_based import c51
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording
from jaxrl_dist.running import hosts, problem, session, training
from jaxrl_dist.running.checkpointing import Checkpoints, DamagedCheckpoint
from jaxrl_dist.studies import study

CONFIG = c51.Config(num_envs=2, warmup_steps=32, batch_size=8, hidden=(8,), num_atoms=5, updates_per_iteration=1)
OPTIONS = problem.RunOptions(
    env_id="CartPole-v1", env_options=("max_steps_in_episode=20",), total_steps=2032, num_seeds=4, eval_every=200,
    eval_episodes=3, eval_states=0, checkpoint_every=50, plots=False, device="cpu", name="run", runs_mode="map",
)  # fmt: skip
# The same run from the command line.
ARGUMENTS = [
    "--env-id", "CartPole-v1", "--env-options", "max_steps_in_episode=20", "--total-steps", "2032", "--num-seeds", "4",
    "--eval-every", "200", "--eval-episodes", "3", "--eval-states", "0", "--checkpoint-every", "50",
    "--plots", "False", "--device", "cpu", "--name", "run", "--runs-mode", "map", "--num-envs", "2",
    "--warmup-steps", "32", "--batch-size", "8", "--hidden", "8", "--num-atoms", "5", "--updates-per-iteration", "1",
    "--preset", "none",
]  # fmt: skip
SHORT = {"total_steps": 432}
GRID = [{"learning_rate": 1e-3}, {"learning_rate": 1e-2}]
COMMAND = """
import sys
from jaxrl_dist import cli
from jaxrl_dist.running import hosts
hosts.HEARTBEAT_SECONDS = 20
cli.command(sys.argv[1:])
"""


def prepare(runs: Path, **changes) -> problem.Problem:
    return problem.prepare(
        "c51", c51.make_agent, CONFIG, dataclasses.replace(OPTIONS, runs_folder=str(runs), **changes)
    )


@functools.cache
def programs_of(total_steps: int) -> training.Programs:
    """Compiled once for all runs of this process."""
    return session.make_programs(prepare(Path(), total_steps=total_steps))


def train_alone(runs: Path, **changes) -> Path:
    prepared = prepare(runs, **changes)
    return session.train(prepared, None, programs_of(prepared.options.total_steps))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(cache: Path, devices: int, commands: list[list[str]]) -> list[subprocess.Popen]:
    """Python processes with so many CPU devices each, and one compilation cache for all."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu", "COLUMNS": "200",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *command], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip


def start_two(cache: Path, runs: Path, *arguments: str) -> list[subprocess.Popen]:
    """The command `train` as a user gives it by hand to two processes."""
    together = ["--distributed", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    whole = ["-c", COMMAND, "train", "c51", *ARGUMENTS, "--runs-folder", str(runs), *arguments, *together]
    return start(cache, 1, [[*whole, "0"], [*whole, "1"]])


def outputs(processes: list[subprocess.Popen]) -> list[str]:
    try:
        return [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def assert_same_run(one: Path, other: Path) -> None:
    frames = [recording.read_metrics(folder).drop(columns="seconds") for folder in (one, other)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    pd.testing.assert_frame_equal(*map(recording.read_evaluations, (one, other)), check_exact=True)
    policies = [sorted((folder / "policies").iterdir()) for folder in (one, other)]
    assert [path.name for path in policies[0]] == [path.name for path in policies[1]]
    assert len(policies[0]) == 5, "one for each seed, and the program of the first"
    for a, b in zip(*policies, strict=True):
        if a.suffix == ".npz":
            with np.load(a) as left, np.load(b) as right:
                assert left.files == right.files
                for name in left.files:
                    np.testing.assert_array_equal(left[name], right[name], err_msg=f"{a.name}/{name}")


# -- what two processes do together -----------------------------------------------------------------------------------


def work(runs: str, port: int, number: int) -> None:
    """Runs in both of two processes: a run, one that is stopped in one of them, a study, and things that go wrong."""
    hosts.join(f"127.0.0.1:{port}", 2, number, "cpu")
    runs = Path(runs)
    seen = {"devices": jax.device_count()}
    whole = prepare(runs / "whole", **SHORT)
    programs = session.make_programs(whole)
    folder = session.train(whole, None, programs)
    seen["runs_here"] = training.runs_here(programs.configs)

    save = Checkpoints.save

    def save_then_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        if number == 1 and iteration == 50:
            os.kill(os.getpid(), signal.SIGTERM)  # in one of them, and not in the one that prints

    Checkpoints.save = save_then_stop
    try:
        session.train(prepare(runs / "stopped", **SHORT), None, programs)
    except KeyboardInterrupt:
        seen["stopped"] = True
    Checkpoints.save = save
    stopped = runs / "stopped" / "c51" / "CartPole-v1" / "run"
    hosts.wait()
    seen["stopped_at"] = Checkpoints(stopped / "checkpoints").newest()
    hosts.wait()
    if number == 0:
        shutil.copytree(stopped, runs / "moved" / "c51" / "CartPole-v1" / "run")
        newest = stopped / "checkpoints" / str(seen["stopped_at"])
        shutil.copytree(newest, newest.with_name("999"))  # damage: not what it says it is
    hosts.wait()
    for name, act in {
        "taken": lambda: session.train(prepare(runs / "whole", **SHORT), None, programs),
        "damaged": lambda: session.train(prepare(runs / "stopped", resume="999", **SHORT), None, programs),
        "differ": lambda: session.train(prepare(runs / "new", seed=number, **SHORT), None, programs),
        "uneven": lambda: prepare(runs / "new", num_seeds=3),
        "few": lambda: prepare(runs / "new", devices="1"),
    }.items():
        with pytest.raises((ConfigurationError, DamagedCheckpoint)) as raised:
            act()
        seen[name] = str(raised.value)
    assert session.train(prepare(runs / "stopped", resume="auto", **SHORT), None, programs) == stopped

    options = dataclasses.replace(OPTIONS, runs_folder=str(runs / "study"), eval_every=400, checkpoint_every=0, **SHORT)
    study.train("c51", c51.make_agent, CONFIG, options, GRID, Console(quiet=True))
    (runs / f"seen_{number}.json").write_text(json.dumps(seen))
    assert folder == runs / "whole" / "c51" / "CartPole-v1" / "run"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def worked(tmp_path_factory, cache) -> tuple[Path, list[dict]]:
    """The folder in which two processes of two devices each did `work`, and what each of them saw."""
    runs, port = tmp_path_factory.mktemp("worked"), free_port()
    code = "import test_hosts; test_hosts.work({!r}, {}, {})"
    processes = start(cache, 2, [["-c", code.format(str(runs), port, number)] for number in (0, 1)])
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "compiled in" in said[0]
    assert "compil" not in said[1], "the second process prints nothing"
    return runs, [json.loads((runs / f"seen_{number}.json").read_text()) for number in (0, 1)]


of_processes = pytest.mark.proves(
    "jaxrl_dist/running",
    "jaxrl_dist/studies",
    "jaxrl_dist/cli.py",
    "jaxrl_dist/learning/devices.py",
    "algorithms/value_based/c51.py",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The short run in this one process, on its one device."""
    return train_alone(tmp_path_factory.mktemp("alone"), **SHORT)


@pytest.mark.slow
@of_processes
def test_two_processes_give_the_run_of_one(worked, alone):
    runs, seen = worked
    assert [one["devices"] for one in seen] == [4, 4]
    assert sorted(seen[0]["runs_here"] + seen[1]["runs_here"]) == [0, 1, 2, 3]
    assert len(seen[0]["runs_here"]) == 2
    folder = runs / "whole" / "c51" / "CartPole-v1" / "run"
    assert recording.read_config(folder)["num_devices"] == 4
    assert_same_run(alone, folder)


@pytest.mark.slow
@of_processes
def test_a_signal_to_one_process_stops_both_and_they_go_on(worked, alone):
    runs, seen = worked
    assert seen[0]["stopped"]
    assert seen[1]["stopped"]
    assert seen[0]["stopped_at"] == seen[1]["stopped_at"] < 200
    assert_same_run(alone, runs / "stopped" / "c51" / "CartPole-v1" / "run")


@pytest.mark.slow
@of_processes
def test_a_checkpoint_of_two_processes_goes_on_in_one(worked, alone):
    runs, _ = worked
    folder = runs / "moved" / "c51" / "CartPole-v1" / "run"
    parts = {path.name for path in next((folder / "checkpoints").iterdir()).glob("arrays/*")}
    assert parts == {"0", "1"}, "each process wrote its own part"
    assert train_alone(runs / "moved", resume="latest", **SHORT) == folder
    assert_same_run(alone, folder)


@pytest.mark.slow
@of_processes
def test_a_study_of_two_processes_is_that_of_one(worked, tmp_path):
    options = dataclasses.replace(OPTIONS, runs_folder=str(tmp_path), eval_every=400, checkpoint_every=0, **SHORT)
    folder = study.train("c51", c51.make_agent, CONFIG, options, GRID, Console(quiet=True))
    results = [
        pd.read_csv(place / "results.csv").drop(columns="seconds")
        for place in (folder, worked[0] / "study" / "c51" / "CartPole-v1" / "run")
    ]
    assert len(results[0].groupby(["configuration", "seed"])) == 8
    pd.testing.assert_frame_equal(*results, check_exact=True)


@pytest.mark.slow
@of_processes
def test_what_goes_wrong_in_one_process_is_an_error_in_both(worked):
    first, second = worked[1]
    assert "already holds a run" in first["taken"]
    assert "process 0 failed: --name is 'run'" in second["taken"]
    assert "was saved as iteration" in first["damaged"]
    assert "was saved as iteration" in second["damaged"]
    for seen in (first, second):
        assert "processes [1] were started with other options" in seen["differ"]
        assert seen["uneven"].startswith("--num-seeds is 3; with 2 processes it must be a multiple of 2")
        assert seen["few"].startswith("--devices is 1; it must be all or a number from 2 to 4")
    assert not (worked[0] / "new").exists()


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.mark.slow
@of_processes
def test_two_processes_split_one_run_as_two_devices_do(cache, tmp_path):
    split = ["--data-parallel", "True", "--num-seeds", "1", "--total-steps", "232"]
    two = start_two(cache, tmp_path / "two", *split)
    whole = ["-c", COMMAND, "train", "c51", *ARGUMENTS, "--runs-folder", str(tmp_path / "one"), *split]
    said = outputs([*two, *start(cache, 2, [whole])])
    assert [process.returncode for process in two] == [0, 0], said
    found, expected = (
        recording.read_metrics(tmp_path / name / "c51" / "CartPole-v1" / "run") for name in ("two", "one")
    )
    assert "on 2 cpu devices of 2 processes" in said[0]
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"), rtol=1e-3)
    for name in ("two", "one"):
        assert len(list((tmp_path / name).rglob("*.npz"))) == 1


@pytest.mark.slow
@of_processes
def test_an_error_ends_both_tasks_of_slurm_with_its_exit_code(cache, tmp_path, monkeypatch):
    """The tasks meet through the variables that `srun` sets."""
    for name, value in {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    whole = ["-c", COMMAND, "train", "c51", *ARGUMENTS, "--runs-folder", str(tmp_path), "--distributed", "auto"]
    processes = []
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        monkeypatch.setenv("SLURM_LOCALID", task)
        processes += start(cache, 1, [[*whole, "--learning-rate", task]])
    for process, said in zip(processes, outputs(processes), strict=True):
        assert process.returncode == cli.USAGE_ERROR, said
        assert "were started with other options" in said
        assert "Traceback" not in said


@pytest.mark.slow
@of_processes
def test_processes_that_do_not_meet_end_with_one_clear_line(cache, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    hurried = COMMAND.replace("HEARTBEAT_SECONDS", "START_SECONDS")
    whole = ["-c", hurried, "train", "c51", *ARGUMENTS, "--runs-folder", str(tmp_path), "--distributed"]
    where = f"127.0.0.1:{free_port()}"
    processes = start(cache, 1, [[*whole, "auto"], [*whole, where, "--num-processes", "2", "--process-id", "1"]])
    nowhere, lonely = outputs(processes)
    assert processes[0].returncode == cli.USAGE_ERROR, nowhere
    assert "auto works under SLURM" in nowhere
    assert "Traceback" not in nowhere
    assert processes[1].returncode not in (0, None), lonely
    assert f"error: --distributed is {where}, but not all processes met within 20 seconds" in lonely
    assert not list(tmp_path.iterdir())


def kill_after_a_checkpoint(processes, folder: Path, victim: int, number: signal.Signals) -> None:
    seen, deadline = max(Checkpoints(folder / "checkpoints").iterations(), default=0), time.monotonic() + 300
    while max(Checkpoints(folder / "checkpoints").iterations(), default=0) <= seen:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), "ended before a new checkpoint"
        time.sleep(0.005)
    processes[victim].send_signal(number)


@pytest.mark.slow
@of_processes
def test_a_lost_process_ends_the_run_which_goes_on_from_its_checkpoint(cache, tmp_path):
    """First process 1 is killed, then process 0 hangs (which only its missing heartbeats tell), then one goes on."""
    folder = tmp_path / "c51" / "CartPole-v1" / "run"
    processes = start_two(cache, tmp_path)
    kill_after_a_checkpoint(processes, folder, 1, signal.SIGKILL)
    said = processes[0].communicate(timeout=120)[0]
    assert processes[0].returncode == 1, said
    assert "error: process 1 of 2 is lost (" in said
    assert "the same command and --name run --resume auto" in said
    assert "Traceback" not in said

    processes = start_two(cache, tmp_path, "--resume", "auto")
    kill_after_a_checkpoint(processes, folder, 0, signal.SIGSTOP)
    said = processes[1].communicate(timeout=120)[0]
    processes[0].kill()
    assert processes[1].returncode not in (0, None), said
    assert "error: process 1 of 2 has ended too early" in said
    assert "the same command and --name run --resume auto" in said
    assert "resumed at iteration" in processes[0].communicate(timeout=120)[0]

    assert train_alone(tmp_path, resume="auto") == folder
    assert_same_run(train_alone(tmp_path / "alone"), folder)


# -- in one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("of", 0, -1), "--distributed is 'of'; it must be off, auto or HOST:PORT"),
        (("host:", 2, 0), "--distributed is 'host:'; it must be off, auto or HOST:PORT"),
        (("host:65536", 2, 0), "--distributed is 'host:65536'; it must be off, auto or HOST:PORT"),
        (("host:1234", 0, 0), "--num-processes is 0; with HOST:PORT it must be at least 1"),
        (("host:1234", 2, 2), "--process-id is 2; it must be from 0 to 1"),
        (("host:1234", 2, -1), "--process-id is -1; it must be from 0 to 1"),
        (("off", 2, -1), "--num-processes is 2 and --process-id -1; they need --distributed HOST:PORT"),
        (("auto", 0, 1), "--num-processes is 0 and --process-id 1; they need --distributed HOST:PORT"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        hosts.join(*arguments)


def test_one_process_alone_needs_no_others():
    hosts.join("off", 0, -1)
    assert hosts.is_first()
    assert hosts.machines() == 1
    assert hosts.by_first(lambda: (1, None)) == (1, None)
    with pytest.raises(KeyError, match="no"):
        hosts.by_first(lambda: {}["no"])
    hosts.require_same({"a": np.ones(2)})
    np.testing.assert_array_equal(hosts.collect(np.int32([3, 4])), [[3, 4]])
    with hosts.leaving():
        hosts.wait()
    with pytest.raises(SystemExit, match="2"), hosts.leaving():
        sys.exit(2)


def test_placed_arrays_are_the_same_and_lie_where_asked():
    sharding = NamedSharding(jax.make_mesh((1,), ("runs",), (jax.sharding.AxisType.Auto,)), PartitionSpec("runs"))
    tree = {"numbers": np.arange(6, dtype=np.int8).reshape(3, 2), "keys": jax.random.split(jax.random.key(1), 3)}
    placed = hosts.place(tree, sharding)
    assert placed["numbers"].sharding == placed["keys"].sharding == sharding
    gathered = hosts.gather(placed["numbers"])
    assert gathered.dtype == np.int8
    np.testing.assert_array_equal(gathered, tree["numbers"])
    drawn = jax.vmap(jax.random.uniform)(placed["keys"])
    np.testing.assert_array_equal(drawn, jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(1), 3)))
    assert training.runs_here(placed) == [0, 1, 2]

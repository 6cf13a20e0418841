"""Going on with a run: finished ones, longer ones, and every refusal before anything is compiled or touched."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toys import LearnerConfig, make_learner

from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import replay
from jaxrl_dist.records import recording
from jaxrl_dist.running import folders, problem, session, training
from jaxrl_dist.running.checkpointing import Checkpoints, DamagedCheckpoint

CONFIG = LearnerConfig(num_envs=4, replay_capacity=10_000)
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=200, num_seeds=2, eval_episodes=2, eval_states=0,
    plots=False, device="cpu", name="run",
)  # fmt: skip
PLACE = Path("toy") / "Pendulum-v1" / "run"


def train(runs: Path, config=CONFIG, console: Console | None = None, **changes) -> Path:
    options = dataclasses.replace(OPTIONS, runs_folder=str(runs), **changes)
    prepared = problem.prepare("toy", make_learner, config, options)
    return session.train(prepared, console or Console(quiet=True))


def said(runs: Path, **changes) -> str:
    console = Console(record=True, width=300)
    train(runs, console=console, **changes)
    return console.export_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("finished")
    train(runs)
    return runs


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """Runs folder with a finished run that a test may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def contents(runs: Path) -> dict[str, bytes]:
    return {str(path.relative_to(runs)): path.read_bytes() for path in runs.rglob("*") if path.is_file()}


def tables(folder: Path) -> list[pd.DataFrame]:
    return [recording.read_metrics(folder).drop(columns="seconds"), recording.read_evaluations(folder)]


@pytest.fixture
def nothing_compiles(monkeypatch):
    def refuse(self):
        raise AssertionError("compiled")

    monkeypatch.setattr(training.Programs, "compile", refuse)


@pytest.mark.parametrize("resume", ["latest", "auto"])
def test_a_finished_run_says_so_and_makes_what_is_missing(copy, nothing_compiles, resume):
    folder = copy / PLACE
    before = contents(copy)
    text = said(copy, resume=resume)
    assert "nothing is left to train: 200 env steps are done" in text
    assert "IQM over 2 seeds" in text, "the returns of its last evaluation, out of the table"
    assert contents(copy) == before
    (folder / "policies" / "seed_1.npz").unlink()
    (folder / "return_distribution.png").touch()  # the toy learns no law that could be drawn
    text = said(copy, resume=resume, plots=True)
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "policies" / "seed_1.npz") as made:
        weights = made["weights"]
    (folder / "policies" / "seed_1.npz").write_bytes(before[str(PLACE / "policies" / "seed_1.npz")])
    with np.load(folder / "policies" / "seed_1.npz") as original:
        np.testing.assert_array_equal(weights, original["weights"])


def test_a_run_that_is_trained_longer_is_the_longer_run(copy, tmp_path_factory):
    """Bit for bit, with the grid of evaluations that it began with and room in its replay for all steps."""
    longer = tmp_path_factory.mktemp("longer")
    grid = recording.read_config(copy / PLACE)["intervals"]
    # The longer run from the start, with the grid of the shorter one.
    train(longer, total_steps=331, eval_every=4 * grid["evaluation"], checkpoint_every=4 * grid["checkpoint"])
    folder = train(copy, total_steps=331, resume="latest")
    for one, other in zip(tables(folder), tables(longer / PLACE), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    newest = [Checkpoints(runs / PLACE / "checkpoints") for runs in (copy, longer)]
    assert newest[0].newest() == newest[1].newest() == 81
    prepared = problem.prepare("toy", make_learner, CONFIG, dataclasses.replace(OPTIONS, total_steps=331))
    programs = session.make_programs(prepared)
    like = {"training": programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
    states = [checkpoints.load(81, like)["training"] for checkpoints in newest]
    assert states[0].state.experience.replay.rows.reward.shape == (2, 332)
    plain = [jax.tree.map(np.asarray, training._plain(state)) for state in states]
    jax.tree.map(np.testing.assert_array_equal, *plain)

    description = recording.read_config(folder)
    assert description["options"]["total_steps"] == 331
    assert [(each["from_iteration"], each["total_steps"]) for each in description["commands"]] == [(0, 200), (48, 331)]
    assert description["config"]["replay_capacity"] == 10_000, "what was asked for, not what a total made of it"


def test_a_ring_that_has_wrapped_goes_on_where_it_was(tmp_path):
    """As large as was asked for, whatever the total: nothing grows, and the next row is written where it would be."""
    config = dataclasses.replace(CONFIG, replay_capacity=60)
    every = {"eval_every": 48, "checkpoint_every": 48}
    longer = train(tmp_path / "longer", config, total_steps=280, **every)
    folder = train(tmp_path / "shorter", config, **every)
    train(tmp_path / "shorter", config, total_steps=280, resume="latest", **every)
    for one, other in zip(tables(folder), tables(longer), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_priorities_grow_with_the_replay_as_if_they_had_been_that_large_from_the_start():
    def filled(capacity):
        buffer = replay.add(replay.create(np.float32(0), capacity), np.arange(5, dtype=np.float32)[:1])
        for value in range(1, 5):
            buffer = replay.add(buffer, np.float32([value]))
        priorities = replay.equal_priorities(buffer)
        return buffer, replay.set_priorities(priorities, np.array([1, 3]), np.float32([0.3, 7]))

    small, large = filled(5), filled(19)
    grown = replay.grow(small[0], 19), replay.grow_priorities(small[1], large[1].tree.shape[0])
    jax.tree.map(np.testing.assert_array_equal, grown, large)
    with pytest.raises(ValueError, match="capacity is 3; it must be at least the 5 there are"):
        replay.grow(small[0], 3)


def damage_newest(folder: Path) -> None:
    newest = folder / "checkpoints" / str(Checkpoints(folder / "checkpoints").newest())
    victim = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("prepare", "changes", "message"),
    [
        (None, {"total_steps": 100}, r"--total-steps is 100, but the checkpoint .* was made at 200 env steps"),
        (None, {"seed": 3}, "--seed is 3, but the run to resume was started with 0"),
        (None, {"config": {"num_envs": 2}}, "--num-envs is 2, but the run to resume was started with 4"),
        (None, {"config": {"replay_capacity": 99}}, "--replay-capacity is 99, .* started with 10000"),
        (None, {"on_divergence": "stop"}, "--on-divergence is stop"),
        (None, {"resume": "7"}, r"--resume is 7; the checkpoints are at iterations \["),
        (None, {"name": "other"}, "there is no run to resume in .*other"),
        (damage_newest, {}, "bytes were written|bytes, .* were written|checksum differs"),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), {}, "holds no checkpoint"),
        (lambda folder: (folder / "metrics.csv").unlink(), {}, "metrics.csv.*--damaged-records keep"),
        (lambda folder: (folder / "evaluations.csv").write_text(""), {}, "evaluations.csv.*--damaged-records keep"),
        (lambda folder: (folder / "config.json").write_text("{"), {}, "config.json is damaged"),
        (None, {"wandb": "project"}, "wandb"),
    ],
)
def test_refusals_come_before_compiling_and_touch_nothing(copy, nothing_compiles, prepare, changes, message):
    changes = {"resume": "latest", "total_steps": 300} | changes
    config = dataclasses.replace(CONFIG, **changes.pop("config", {}))
    if prepare:
        prepare(copy / PLACE)
    before = contents(copy)
    with pytest.raises((ConfigurationError, DamagedCheckpoint, ValueError), match=message):
        train(copy, config, **changes)
    assert contents(copy) == before


def test_damaged_tables_are_kept_on_request(copy):
    folder = copy / PLACE
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[5:]]))
    with pytest.raises(ValueError, match=r"metrics.csv"):
        train(copy, total_steps=240, resume="latest")
    text = said(copy, total_steps=240, resume="latest", damaged_records="keep")
    assert "going on with what is left" in text
    metrics = recording.read_metrics(folder)
    assert metrics.env_steps.max() == 240
    assert len(metrics) == len(lines) - 1 - 2 + 2 * 5, "two rows are gone, and five evaluations of two runs are new"


def test_a_refused_run_leaves_nothing_and_does_not_block_its_name(tmp_path, monkeypatch):
    def refuse(problem):
        raise ConfigurationError("too large")

    for resume in ("", "auto"):
        with monkeypatch.context() as patch:
            patch.setattr(session, "make_programs", refuse)
            with pytest.raises(ConfigurationError, match="too large"):
                train(tmp_path, resume=resume)
        assert not (tmp_path / PLACE).exists()
    # Killed before it wrote anything: the lock alone is no run.
    (tmp_path / PLACE).mkdir(parents=True)
    (tmp_path / PLACE / ".lock").touch()
    folders.require_unused(tmp_path / PLACE)


def test_hanging_up_saves_like_a_stop(tmp_path, monkeypatch):
    import os
    import signal

    save = Checkpoints.save

    def save_then_hang_up(self, iteration, tree, about):
        save(self, iteration, tree, about)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Checkpoints, "save", save_then_hang_up)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert Checkpoints(tmp_path / PLACE / "checkpoints").newest() > 0

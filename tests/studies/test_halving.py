"""Successive halving: who goes on, that those who do are trained as if nobody had stopped, and that the others stop."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toys import LearnerConfig, make_learner, share_programs

from jaxrl_dist import cli
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, session, training
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.studies import study, sweeps
from jaxrl_dist.studies.sweeps import Rung, SweepOptions

CONFIG = LearnerConfig()
# 100 iterations, an evaluation every 5: rungs of 128, 64 and 32 of 208 steps / ... end at evaluations.
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=10",), total_steps=208, num_seeds=2, eval_episodes=2, eval_states=0,
    checkpoint_every=30, checkpoint_keep=1, plots=False, device="cpu", name="some", runs_mode="map",
)  # fmt: skip
PUSHES, WIDTHS = (-0.5, 0.0, 0.5), (1, 2)
FOUND = [{"push": push, "width": width} for push in PUSHES for width in WIDTHS]
HALVING = SweepOptions(sweep_halving=2)
# Of six configurations three go on and then one; of 208 steps, 52 and 104 lie nearest to the evaluations at 48 and 108.
STOPS = (48, 108, 208)


def train(folder: Path, sweep=HALVING, found=FOUND, **changes) -> Path:
    options = dataclasses.replace(OPTIONS, runs_folder=str(folder), **changes)
    return study.train("toy", make_learner, CONFIG, options, found, Console(quiet=True), sweep)


def results(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "results.csv").drop(columns="seconds")
    return table.sort_values(["configuration", "env_steps", "seed"]).reset_index(drop=True)


def cut_into(monkeypatch, most: int) -> None:
    """Let so many configurations fit into memory at once."""

    def largest(self, numbers):
        return {sweeps.static_fields(self.problems[number].config): most for number in numbers}

    monkeypatch.setattr(study.Waves, "_largest", largest)


@pytest.fixture(scope="module", autouse=True)
def waves_of_two():
    """Studies of this file train at most two configurations at once, and share what is compiled as their waves do."""
    with pytest.MonkeyPatch.context() as patch:
        cut_into(patch, 2)
        share_programs(patch)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("plain"), SweepOptions())


@pytest.fixture(scope="module")
def halved(tmp_path_factory) -> tuple[Path, int]:
    """The study's folder, and how much was computed: iterations, each counted once for every run."""
    done, advance = [], training.Programs.advance

    def counted(self, state, iterations):
        done.append(self.num_runs * iterations)
        return advance(self, state, iterations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Programs, "advance", counted)
        return train(tmp_path_factory.mktemp("halved")), sum(done)


def survivors(plain: Path) -> list[set[int]]:
    """Who goes on, from the plain study alone: the best by the mean of the two seeds at each rung's end."""
    table, left = results(plain), set(range(len(FOUND)))
    found = []
    for size, steps in zip((6, 3, 1), (None, *STOPS), strict=False):
        if steps:
            rows = table[(table.env_steps == steps) & table.configuration.isin(left)]
            left = set(rows.groupby("configuration").evaluation_return.mean().nlargest(size).index)
        found.append(left)
    return found


def test_who_goes_on_equals_the_plain_study_bit_for_bit(plain, halved):
    folder, _ = halved
    expected, found = results(plain), results(folder)
    last_of_group = [survivors(plain)[index] for index in range(3)]
    assert len(last_of_group[1]) == 3
    assert len({FOUND[number]["width"] for number in last_of_group[1]}) == 2, "the cut is over both groups together"
    stopped_at = {number: STOPS[sum(number in left for left in last_of_group) - 1] for number in range(len(FOUND))}
    assert sorted(stopped_at.values()) == [48, 48, 48, 108, 108, 208]
    kept = expected[expected.env_steps <= expected.configuration.map(stopped_at)].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.drop(columns="rung"), kept, check_exact=True)
    assert list(found.rung) == list(np.searchsorted(STOPS, found.env_steps))
    with np.load(folder / "rung_2" / "wave_00" / "policies" / f"configuration_{min(last_of_group[2])}_seed_1.npz") as a:
        (other,) = plain.glob(f"wave_*/policies/configuration_{min(last_of_group[2])}_seed_1.npz")
        with np.load(other) as b:
            np.testing.assert_array_equal(a["weights"], b["weights"])


def test_less_is_computed(halved):
    _, run_iterations = halved
    ends = [(steps - CONFIG.warmup_steps) // CONFIG.num_envs for steps in STOPS]
    parts = np.diff([0, *ends])
    assert run_iterations == 2 * (parts @ [6, 3, 1])
    assert run_iterations < 0.5 * 2 * 6 * ends[-1]


def test_rows_and_ranking_say_how_far_each_came(halved):
    folder, _ = halved
    ranking = pd.read_csv(folder / "ranking.csv")
    assert list(ranking.rung) == [2, 1, 1, 0, 0, 0]
    assert list(ranking.env_steps) == [208, 108, 108, 48, 48, 48]
    assert ranking.groupby("rung").evaluation_return.apply(lambda x: x.is_monotonic_decreasing).all()
    assert ranking.best.isna().all(), "one came to the end: there is none to compare it with"
    for picture in ("ranking.png", "response.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert [len(json.loads((folder / f"rung_{rung}" / "waves.json").read_text())) for rung in range(3)] == [4, 2, 1]


def test_a_killed_study_goes_on_to_the_same_table(halved, tmp_path, monkeypatch):
    """Stopped in the second wave of the first rung, then in the second rung, and killed at its end."""
    folder = tmp_path / "toy" / "Pendulum-v1" / "some"
    save, write, seen = Checkpoints.save, recording.write_json, []

    def save_and_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        seen.append(where := (self.folder.parents[1].name, self.folder.parents[0].name, iteration))
        if where in (("rung_0", "wave_01", 15), ("rung_1", "wave_00", 30)):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    assert not (folder / "rung_0" / "wave_01" / "finished").exists()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, resume="auto")
    assert (folder / "rung_0" / "wave_01" / "finished").exists()
    assert not (folder / "rung_1" / "wave_00" / "finished").exists()
    assert not (folder / "results.csv").exists()

    def die(path, value):
        write(path, value)
        if path.parts[-3:] == ("rung_1", "wave_01", "finished"):
            raise OSError("killed between two rungs")

    monkeypatch.setattr(recording, "write_json", die)
    with pytest.raises(OSError, match="between two rungs"):
        train(tmp_path, resume="auto")
    monkeypatch.setattr(recording, "write_json", write)
    before = len(seen)
    cut_into(monkeypatch, 1)  # as if memory were short now: what was cut stays as it was cut
    train(tmp_path, resume="auto")
    assert {rung for rung, *_ in seen[before:]} == {"rung_2"}, "finished rungs are not run again"
    assert [len(json.loads((folder / f"rung_{rung}" / "waves.json").read_text())) for rung in range(2)] == [4, 2]
    pd.testing.assert_frame_equal(results(folder), results(halved[0]), check_exact=True)

    for changes, message in (
        ({"total_steps": 308}, "--total-steps is 308, but the run to resume was started with 208"),
        ({"num_seeds": 3}, "--num-seeds is 3"),
        ({"sweep": SweepOptions(sweep_halving=3)}, "was started with 3 other rungs"),
        ({"sweep": SweepOptions()}, "was started with 3 other rungs"),
        ({"found": FOUND[:5]}, "was started with 6 other configurations"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train(tmp_path, resume="auto", **changes)


def test_vmapped_runs_agree_to_rounding(plain, tmp_path):
    """Fewer runs side by side are another program: equal up to the order of floating-point operations."""
    one_group = [fields for fields in FOUND if fields["width"] == 2]
    folder = train(tmp_path, found=one_group, runs_mode="vmap")
    found, expected = results(folder), results(plain)
    expected = expected[expected.width == 2].replace({"configuration": {1: 0, 3: 1, 5: 2}})
    assert sorted(found.groupby("configuration").env_steps.max()) == [108, 108, 208]
    both = found.merge(expected, on=["configuration", "seed", "env_steps"], suffixes=("", "_plain"))
    assert len(both) == len(found)
    for column in ("evaluation_return", "weight"):
        np.testing.assert_allclose(both[column], both[f"{column}_plain"], rtol=1e-4, equal_nan=True)


# -- sizes, ranking and bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "eta", "wanted", "expected"),
    [
        (9, 3, 0, [Rung(9, 100), Rung(3, 300), Rung(1, 900)]),
        (16, 4, 2, [Rung(16, 225), Rung(4, 900)]),
        (5, 2, 0, [Rung(5, 225), Rung(2, 450), Rung(1, 900)]),
        (2, 3, 0, [Rung(2, 300), Rung(1, 900)]),
        (7, 0, 0, [Rung(7, 900)]),
    ],
)
def test_rungs_by_hand(count, eta, wanted, expected):
    assert sweeps.rungs(count, 900, SweepOptions(sweep_halving=eta, sweep_rungs=wanted)) == expected


def table(rows: list[tuple]) -> pd.DataFrame:
    columns = ["rung", "configuration", "env_steps", "seed", "evaluation_return"]
    return pd.DataFrame(rows, columns=columns).assign(x=lambda rows: rows.configuration)


def test_the_best_are_those_of_the_last_evaluation_and_of_equals_the_first():
    rows = [(0, n, steps, 0, value) for n, values in enumerate([(9, 1), (0, 5), (9, 5), (0, 7), (9, 5)])
            for steps, value in zip((10, 20), values, strict=True)]  # fmt: skip
    assert sweeps.best(table(rows), 1) == [3]
    assert sweeps.best(table(rows), 3) == [1, 2, 3]


def test_returns_after_unequal_training_do_not_compare():
    """Configuration 0 has the best return of all, but was stopped: others went on and became worse."""
    scores = {0: [50], 1: [60, 10], 2: [70, 20], 3: [40]}
    rows = [
        (rung, n, (rung + 1) * 100, seed, value + seed)
        for n, values in scores.items()
        for rung, value in enumerate(values)
        for seed in range(3)
    ]
    ranked = sweeps.ranking(table(rows), ["x"])
    assert list(ranked.configuration) == [2, 1, 0, 3]
    assert list(ranked.rung) == [1, 1, 0, 0]
    assert list(ranked.env_steps) == [200, 200, 100, 100]
    assert list(ranked.evaluation_return) == [21, 11, 51, 41]
    assert list(ranked.best[:2]) == [1, 0]
    assert ranked.best[2:].isna().all()


@pytest.mark.parametrize(
    ("sweep", "changes", "message"),
    [
        ({"sweep_halving": 2}, {"found": FOUND[:1]}, "--sweep-halving is 2, but there is 1 configuration"),
        ({"sweep_halving": 2, "sweep_rungs": 4}, {}, "--sweep-rungs is 4; with 6 configurations .* after 3 rungs"),
        ({"sweep_halving": 9}, {"total_steps": 60}, "rung 0 ends at 7 env steps: too early .* 8 steps of the warm-up"),
        ({"sweep_halving": 2}, {"eval_every": 120}, "rung 0 ends at 52 env steps: too early .* lower --sweep-rungs"),
        ({"sweep_halving": 2}, {"eval_every": 80}, "rung 1 ends at 104 env steps: too early"),
    ],
)
def test_rungs_that_cannot_be_are_refused_before_anything_compiles(sweep, changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "make_programs", lambda *_: pytest.fail("compiles"))
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, SweepOptions(**sweep), **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sweep.discount 0.9 0.99 --sweep-halving 1", "--sweep-halving is 1; it must be 0 (off) or at least 2"),
        ("--sweep.discount 0.9 0.99 --sweep-halving -2", "--sweep-halving is -2"),
        ("--sweep.discount 0.9 0.99 --sweep-rungs 2", "--sweep-rungs is 2; it needs --sweep-halving ETA"),
        ("--sweep.discount 0.9 0.99 --sweep-halving 2 --sweep-rungs 1", "--sweep-rungs is 1"),
        ("--sweep-halving 2 --sweep-rungs 2", "--sweep-halving, --sweep-rungs need --sweep.FIELD"),
        ("--sweep.discount 0.9 0.99 --sweep-parallel 2", "--sweep-parallel is 2; it needs --sweep-optuna TRIALS"),
        ("--sweep.discount 0.9 1 --sweep-halving 2 --sweep-optuna 3", "--sweep-optuna is 3 and --sweep-halving is 2"),
        ("--sweep.discount 0.9 1 --sweep-samples 2 --sweep-optuna 3", "--sweep-optuna is 3 and --sweep-samples is 2"),
        ("--sweep-file a.csv --sweep-optuna 3", "--sweep-optuna is 3 and --sweep-file is a.csv"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_one_clear_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    module = cli.find_algorithm("tqc")
    with pytest.raises(SystemExit, match="2"):
        cli.main(module.Config, module.make_agent, module.PRESETS, [*arguments.split(), "--runs-folder", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

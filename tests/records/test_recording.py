import dataclasses
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.records.recording import (
    Recorder,
    check_records,
    command_line,
    divergences,
    read_config,
    read_evaluations,
    read_json,
    read_metrics,
    versions,
)


def log_point(env_steps, seeds=2, **metrics):
    position = {"iteration": env_steps // 10, "env_steps": env_steps, "updates": env_steps, "seconds": 0.5}
    return [{**position, "seed": seed, **metrics} for seed in range(seeds)]


def episodes(env_steps):
    return [
        {"env_steps": env_steps, "seed": 0, "episode": episode, "episode_return": -1.5, "episode_length": 7}
        for episode in range(3)
    ]


def test_metrics_file_to_the_letter(tmp_path):
    recorder = Recorder(tmp_path / "a" / "run")
    recorder.append([{"loss": 0.1, "seed": 0, "env_steps": 10, "evaluation_return": None, "iteration": 1}])
    recorder.append([{"env_steps": 20, "seed": 0, "iteration": 2, "loss": np.float32(0.1)}])
    recorder.append([{"env_steps": 30, "seed": 0, "evaluation_return": jnp.float32(1e-20), "loss": float("nan")}])
    assert (tmp_path / "a" / "run" / "metrics.csv").read_text() == (
        "iteration,env_steps,seed,loss,evaluation_return\n1,10,0,0.1,\n2,20,0,0.1,\n,30,0,nan,1e-20\n"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_read_back_exactly(tmp_path, dtype):
    numbers = np.random.default_rng(0).normal(size=200) * 10.0 ** np.arange(-20, 20).repeat(5)
    numbers = numbers.astype(dtype)
    Recorder(tmp_path).append([{"env_steps": i, "seed": 0, "loss": number} for i, number in enumerate(numbers)])
    frame = read_metrics(tmp_path)
    np.testing.assert_array_equal(frame.loss.to_numpy().astype(dtype), numbers)
    assert len(frame) == 200
    assert frame.env_steps.dtype == np.int64


def test_evaluations(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.append_evaluations(episodes(10))
    recorder.append_evaluations(episodes(20))
    frame = read_evaluations(tmp_path)
    assert list(frame.columns) == ["env_steps", "seed", "episode", "episode_return", "episode_length"]
    assert frame.episode.tolist() == [0, 1, 2, 0, 1, 2]
    assert (frame.episode_return == -1.5).all()


def test_every_append_is_on_disk_at_once(tmp_path):
    recorder = Recorder(tmp_path)
    for number in range(1, 4):
        recorder.append(log_point(10 * number, loss=1.0))
        assert len(read_metrics(tmp_path)) == 2 * number


def test_unseen_column_is_an_error_that_names_it_and_writes_nothing(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.append(log_point(10, loss=1.0))
    before = (tmp_path / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="column 'entropy' was not in the first rows"):
        recorder.append(log_point(20, loss=1.0, entropy=2.0))
    assert (tmp_path / "metrics.csv").read_text() == before


@pytest.mark.parametrize("column", ["env_steps", "seed"])
def test_rows_need_step_and_seed(tmp_path, column):
    row = {"env_steps": 1, "seed": 0, "loss": 1.0}
    del row[column]
    with pytest.raises(ValueError, match=f"without '{column}'"):
        Recorder(tmp_path).append([row])
    assert not (tmp_path / "metrics.csv").exists()


def test_a_cell_is_one_number(tmp_path):
    with pytest.raises(ValueError, match=r"'loss' has a value of shape \(3,\)"):
        Recorder(tmp_path).append([{"env_steps": 1, "seed": 0, "loss": np.zeros(3)}])
    assert not (tmp_path / "metrics.csv").exists()


def test_no_rows_no_file(tmp_path):
    Recorder(tmp_path).append([])
    assert not (tmp_path / "metrics.csv").exists()


def record(folder, steps):
    recorder = Recorder(folder)
    for step in steps:
        recorder.append(log_point(step, loss=np.float32(1 / step), evaluation_return=None if step % 20 else step))
        if step % 20 == 0:
            recorder.append_evaluations(episodes(step))
    return recorder


@pytest.mark.parametrize("torn", ["", "5,5", "5,50,5,0.", "\udcff"])
def test_resumed_run_leaves_the_same_files_as_one_that_never_stopped(tmp_path, torn):
    record(tmp_path / "whole", range(10, 90, 10))
    record(tmp_path / "resumed", range(10, 70, 10))  # the checkpoint was at 40, so 50 and 60 come again
    with open(tmp_path / "resumed" / "metrics.csv", "a", errors="surrogateescape") as file:
        file.write(torn)
    if torn:
        with pytest.warns(UserWarning, match="metrics.csv: dropped an incomplete last line"):
            recorder = Recorder(tmp_path / "resumed")
    else:
        recorder = Recorder(tmp_path / "resumed")
    recorder.truncate_after(4, 40)
    assert read_metrics(tmp_path / "resumed").env_steps.max() == 40
    record(tmp_path / "resumed", range(50, 90, 10))
    for name in ("metrics.csv", "evaluations.csv"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_truncate_to_nothing_keeps_the_columns(tmp_path):
    recorder = record(tmp_path, [10, 20])
    recorder.truncate_after(0, 0)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 1
    with pytest.raises(ValueError, match=r"metrics\.csv has no rows after its header"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="'entropy'"):
        recorder.append(log_point(10, entropy=1.0))


def test_truncate_before_any_record(tmp_path):
    Recorder(tmp_path).truncate_after(10, 100)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_during_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    recorder = record(tmp_path, [10, 20])
    before = (tmp_path / "metrics.csv").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder.truncate_after(1, 10)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_reading_tolerates_and_reports_a_torn_line(tmp_path):
    record(tmp_path, [10])
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("2,20,2")
    with pytest.warns(UserWarning, match="dropped an incomplete last line, '2,20,2'"):
        frame = read_metrics(tmp_path)
    assert frame.env_steps.tolist() == [10, 10]


def test_a_torn_header_starts_afresh(tmp_path):
    (tmp_path / "metrics.csv").write_text("iteration,env_st")
    with pytest.warns(UserWarning, match="incomplete"), pytest.raises(ValueError, match="before its first record"):
        read_metrics(tmp_path)
    with pytest.warns(UserWarning, match="incomplete"):
        recorder = Recorder(tmp_path)
    recorder.append(log_point(10, loss=1.0))
    assert read_metrics(tmp_path).loss.tolist() == [1.0, 1.0]


# -- the seal: what a checkpoint knows of the tables ------------------------------------------------------------------


def sealed(folder):
    """A run with rows up to env step 80, sealed at 60, and its seal as it comes back out of a manifest."""
    recorder = record(folder, range(10, 70, 10))
    seal = json.loads(json.dumps(recorder.seal()))
    record(folder, [70, 80])
    return seal


def edit(path, change):
    """Rewrite a file by a function of its lines; row n of a spreadsheet is lines[n - 1]."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def changed(row, change):
    return lambda lines: [*lines[: row - 1], change(lines[row - 1]), *lines[row:]]


DAMAGES = [
    ("metrics", Path.unlink, r"metrics\.csv does not exist, but 13 rows \(with the header\) were written"),
    ("evaluations", Path.unlink, r"evaluations\.csv does not exist, but 10 rows"),
    ("metrics", lambda path: path.write_bytes(b""), "metrics.csv is empty"),
    ("metrics", lambda path: edit(path, lambda lines: lines[:9]), "metrics.csv ends at row 9, but 13 rows"),
    ("metrics", lambda path: edit(path, lambda lines: [*lines[:9], lines[9][:4]]), "metrics.csv row 10 is cut off"),
    ("metrics", lambda path: edit(path, changed(5, lambda line: line.replace(b"0.05", b"0.06"))), "row 5 is not as it"),
    ("evaluations", lambda path: edit(path, changed(10, lambda line: line.replace(b"-1.5", b"-1.4"))), "row 10 is not"),
    ("metrics", lambda path: edit(path, lambda lines: [*lines[:3], *lines[6:]]), "row 4 is not as it was written"),
    ("metrics", lambda path: edit(path, lambda lines: [*lines[:3], *lines[4:13]]), "row 4 is not .*; 1 row missing"),
    ("metrics", lambda path: edit(path, lambda lines: [*lines[:3], lines[2], *lines[3:]]), "row 4 is not as it was"),
    ("metrics", lambda path: edit(path, changed(7, lambda line: b"\xff" + line)), "metrics.csv row 7 is not UTF-8"),
    ("metrics", lambda path: edit(path, changed(7, lambda line: b"1," + line)), "row 7 has 8 cells, but 7 columns"),
    ("metrics", lambda path: edit(path, lambda lines: [b"1," + line for line in lines]), "row 1 is not as it was"),
    ("metrics", lambda path: edit(path, lambda lines: lines[1:]), "metrics.csv: row 1 is not as it was written"),
    ("metrics", lambda path: edit(path, lambda lines: [line[:-1] + b"\r\n" for line in lines]), "row 1 is not as it"),
]


@pytest.mark.parametrize(("table", "damage", "message"), DAMAGES)
def test_a_seal_names_every_damage_by_its_row_and_a_run_can_go_on_without_it(tmp_path, table, damage, message):
    seal = sealed(tmp_path)
    check_records(tmp_path, seal, 60)
    damage(tmp_path / f"{table}.csv")
    with pytest.raises(ValueError, match=message) as raised:
        check_records(tmp_path, seal, 60)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / table) in str(raised.value)
    # Who goes on all the same gets tables that can be read, with what was written after the checkpoint written again.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Recorder(tmp_path).truncate_after(6, 60)
    record(tmp_path, [70, 80])
    assert read_metrics(tmp_path).env_steps.tolist()[-4:] == [70, 70, 80, 80]
    assert read_evaluations(tmp_path).env_steps.tolist()[-3:] == [80, 80, 80]


def test_a_seal_survives_resuming_and_cuts_to_the_byte(tmp_path):
    seal = sealed(tmp_path / "resumed")
    with open(tmp_path / "resumed" / "metrics.csv", "a") as file:
        file.write("9,90,ninety\n")  # after the checkpoint, so nobody's loss
    check_records(tmp_path / "resumed", seal, 60)
    recorder = Recorder(tmp_path / "resumed")
    recorder.truncate_after(6, 60, seal)
    assert recorder.seal() == seal
    record(tmp_path / "resumed", [70, 80])
    whole = record(tmp_path / "whole", range(10, 90, 10))
    assert Recorder(tmp_path / "resumed").seal() == whole.seal()
    for name in recording.TABLES:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_seal_stays_small_and_still_finds_one_digit(tmp_path):
    recorder = Recorder(tmp_path)
    for step in range(1, 51):
        recorder.append_evaluations(
            [{"env_steps": step, "seed": seed, "episode": 0, "episode_return": 1.5} for seed in range(100)]
        )
    seal = recorder.seal()
    assert seal["metrics.csv"] is None
    assert len(json.dumps(seal)) < 20_000
    assert seal["evaluations.csv"]["rows_per_block"] == 8
    check_records(tmp_path, seal, 50)
    edit(tmp_path / "evaluations.csv", changed(4_013, lambda line: line.replace(b"1.5", b"1.4")))
    with pytest.raises(ValueError, match="one of the rows 4009 to 4016 is not as it was written"):
        check_records(tmp_path, seal, 50)
    edit(tmp_path / "evaluations.csv", lambda lines: lines[:3_000])
    with pytest.raises(ValueError, match="ends at row 3000, but 5001 rows"):
        check_records(tmp_path, seal, 50)


def test_without_a_seal_both_tables_must_reach_the_checkpoint(tmp_path):
    record(tmp_path, range(10, 70, 10))
    check_records(tmp_path, {}, 60)
    with pytest.raises(ValueError, match=r"metrics\.csv has no row at env step 80"):
        check_records(tmp_path, {}, 80)
    edit(tmp_path / "evaluations.csv", lambda lines: lines[:7])
    with pytest.raises(ValueError, match=r"evaluations\.csv has no row at env step 60"):
        check_records(tmp_path, {}, 60)
    (tmp_path / "evaluations.csv").unlink()
    with pytest.raises(ValueError, match=r"evaluations\.csv does not exist"):
        check_records(tmp_path, {}, 60)


def test_rows_that_cannot_be_read_are_dropped_and_said(tmp_path):
    record(tmp_path, range(10, 70, 10))
    edit(tmp_path / "metrics.csv", lambda lines: [*lines[:3], b"\xff\n", b"3,30,x,0.5,0,1,\n", lines[3], *lines[3:]])
    before = (tmp_path / "metrics.csv").read_bytes()
    recorder = Recorder(tmp_path)
    with pytest.warns(UserWarning, match=r"metrics\.csv: dropped 3 rows that cannot be read; metrics\.csv\.damaged"):
        recorder.truncate_after(5, 50)
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == before
    assert read_metrics(tmp_path).env_steps.tolist() == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]


def test_a_table_of_another_version_gets_the_columns_it_lacks(tmp_path):
    """`iteration` in evaluations, `diverged_at` in metrics: older tables lack them, and go on with them."""
    record(tmp_path, [10, 20])
    recorder = Recorder(tmp_path)
    recorder.truncate_after(1, 10)
    recorder.append(log_point(20, loss=0.5, evaluation_return=1, diverged_at=None, diverged_metric=None))
    recorder.append_evaluations([{"iteration": 2, **row} for row in episodes(20)])
    frame = read_metrics(tmp_path)
    assert frame.env_steps.tolist() == [10, 10, 20, 20]
    assert list(frame.columns)[-2:] == ["diverged_at", "diverged_metric"]
    assert read_evaluations(tmp_path).iteration.tolist() == [2, 2, 2]
    check_records(tmp_path, recorder.seal(), 20)
    with pytest.raises(ValueError, match="'entropy' was not in the first rows"):
        recorder.append(log_point(30, entropy=1.0))


# -- damaged records that are read ------------------------------------------------------------------------------------


def test_words_leave_numbers_numbers(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.append(log_point(10, loss=np.float32(0.5), diverged_at=None, diverged_metric=None))
    assert read_metrics(tmp_path).diverged_at.isna().all()
    assert len(divergences(read_metrics(tmp_path))) == 0
    recorder.append([
        {"iteration": 2, "env_steps": 20, "seed": 0, "loss": 0.25},
        {"iteration": 2, "env_steps": 20, "seed": 1, "loss": float("nan"), "diverged_at": 1, "diverged_metric": "loss"},
    ])  # fmt: skip
    frame = read_metrics(tmp_path)
    assert frame.env_steps.dtype == frame.seed.dtype == np.int64
    assert frame.loss.dtype == frame.diverged_at.dtype == np.float64
    assert divergences(frame).to_dict("records") == [{"seed": 1, "iteration": 1, "env_steps": 10, "metric": "loss"}]
    assert divergences(frame.drop(columns=["diverged_at", "diverged_metric"])).empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "metrics.csv is empty"),
        (lambda lines: lines[:1], "metrics.csv has no rows after its header"),
        (changed(4, lambda line: b"\xff" + line), "metrics.csv row 4: not UTF-8"),
        (changed(4, lambda line: line[:-1] + b",1\n"), "row 4: 8 cells, but 7 columns"),
        (changed(2, lambda line: line[:-1] + b",1\n"), "row 2: 8 cells, but 7 columns"),  # pandas: an index column
        (changed(4, lambda line: b"1,2\n"), "row 4: 2 cells, but 7 columns"),  # pandas: empty cells
        (changed(4, lambda line: b"\n"), "row 4: 0 cells, but 7 columns"),
        (changed(4, lambda line: line.replace(b"0.05", b"much")), "row 4: loss is 'much'; it must be a number"),
        (changed(4, lambda line: line.replace(b"0.05", b"NA")), "row 4: loss is 'NA'; it must be a number"),
        (changed(4, lambda line: line.replace(b",0,", b",,")), "row 4: seed is empty; it must be a whole number"),
        (changed(4, lambda line: line.replace(b",20,", b",20.5,", 1)), "row 4: env_steps is '20.5'; .* whole number"),
        (changed(1, lambda line: line.replace(b"seed", b"sed")), "row 1: no column seed"),
        (changed(1, lambda line: line.replace(b"updates", b"loss")), "row 1: the column 'loss' is there twice"),
        (lambda lines: lines[1:], "row 1: no column env_steps, seed"),
        (lambda lines: [*lines, lines[2]], "row 6: there is another row about iteration 1, env_steps 10, seed 1"),
        (changed(3, lambda line: b'"' + line), "row 5: "),  # swallows what follows
    ],
)
def test_a_damaged_table_is_named_with_its_row(tmp_path, change, message):
    record(tmp_path, [10, 20])
    edit(tmp_path / "metrics.csv", change)
    with pytest.raises(ValueError, match=message) as raised:
        read_metrics(tmp_path)
    assert str(tmp_path / "metrics.csv") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)


def test_evaluations_need_their_columns(tmp_path):
    record(tmp_path, [20])
    edit(tmp_path / "evaluations.csv", changed(1, lambda line: line.replace(b"episode_return", b"score")))
    with pytest.raises(ValueError, match=r"evaluations\.csv row 1: no column episode_return"):
        read_evaluations(tmp_path)


GOOD = {"algorithm": "dqn", "config": {}, "options": {"env_id": "CartPole-v1", "seed": 1}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "config.json is empty"),
        (b" \n", "config.json is empty"),
        (json.dumps(GOOD).encode()[:-9], "is damaged: no complete JSON .*line 1 column"),
        (b'{"algorithm": "\xff"}', r"is not UTF-8 \(byte 15\)"),
        (b"[" * 100_000, "is damaged: no complete JSON"),
        (b"[]", r"the whole is \[\]; it must be an object"),
        ({"config": {}, "options": {}}, "has no field 'algorithm'"),
        (GOOD | {"algorithm": 3}, "algorithm is 3; it must be a text"),
        (GOOD | {"options": None}, "options is null; it must be an object"),
        (GOOD | {"options": {}}, "has no field 'options.env_id'"),
        (GOOD | {"options": {"env_id": "a", "seed": True}}, "options.seed is true; it must be a whole number"),
        (GOOD | {"config": ["a" * 99]}, r"config is \[\"a{35}\.\.\.; it must be an object"),
    ],
)
def test_a_damaged_json_record_is_named(tmp_path, data, message):
    (tmp_path / "config.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    with pytest.raises(ValueError, match=message) as raised:
        read_config(tmp_path, {"options.seed": int})
    assert str(tmp_path / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)


def test_a_whole_json_record(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_config(tmp_path, {"options.seed": int}) == GOOD


@pytest.mark.parametrize("text", ["", "two\nlines", "\udcff", "0123"])
def test_a_damaged_wandb_identity_is_refused_before_anything_is_written(tmp_path, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    (tmp_path / "wandb_id.txt").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"wandb_id\.txt is b.*must be 32 hexadecimal digits"):
        Recorder(tmp_path, wandb_project="zoo")
    Recorder(tmp_path)  # who does not use it is not bothered


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"run folder .*nowhere does not exist"):
        read_metrics(tmp_path / "nowhere")
    for read, name in ((read_metrics, "metrics.csv"), (read_evaluations, "evaluations.csv"), (read_config, "config")):
        with pytest.raises(ValueError, match=name):
            read(tmp_path)


def test_config(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = 64
        discount: float = 0.99
        layers: tuple = (1, 2)

    recorder = Recorder(tmp_path)
    recorder.write_config({"zeta": 1, "alpha": Config(), "rate": np.float32(0.5), "out": Path("runs") / "x", "n": None})
    assert read_json(tmp_path / "config.json") == {
        "zeta": 1,
        "alpha": {"width": 64, "discount": 0.99, "layers": [1, 2]},
        "rate": 0.5,
        "out": "runs/x",
        "n": None,
    }
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["zeta", "alpha", "rate", "out", "n"]
    with pytest.raises(ValueError, match="of type type, which JSON cannot express"):
        recorder.write_config({"wrong": Config})
    assert read_json(tmp_path / "config.json")["zeta"] == 1  # the earlier file stands


def test_tensorboard_has_one_tag_per_seed(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.append(log_point(10, evaluation_return=None, loss=0.5))
    recorder.append(log_point(20, evaluation_return=-3.0, loss=0.25))
    recorder.close()
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.truncate_after(1, 10)
    recorder.append(log_point(20, evaluation_return=-4.0, loss=0.125))
    recorder.close()

    scalars, restarts = [], []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0  # records of: length (8 bytes), its checksum (4), event, checksum (4)
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            restarts += [event.step] if event.WhichOneof("what") == "session_log" else []
            at += 16 + length
    assert ("seed_0/loss", 10, 0.5) in scalars
    assert ("seed_1/evaluation_return", 20, -3.0) in scalars
    assert ("seed_1/evaluation_return", 20, -4.0) in scalars
    assert not [scalar for scalar in scalars if scalar[:2] == ("seed_0/evaluation_return", 10)]
    assert {tag.split("/")[1] for tag, _, _ in scalars} == {
        "iteration", "updates", "seconds", "evaluation_return", "loss",
    }  # fmt: skip
    assert restarts == [11]  # TensorBoard hides the first life from here on


def test_wandb_gets_one_call_per_step_and_keeps_its_identity(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**options):
        started.append(options)
        log = lambda scalars, step: logged.append((step, scalars))  # noqa: E731
        return types.SimpleNamespace(log=log, finish=lambda: logged.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (10, 20):
        recorder = Recorder(tmp_path, wandb_project="zoo")
        recorder.write_config({"width": 64})
        recorder.append(log_point(step + 1, seeds=1, loss=None) + log_point(step, loss=0.5))
        recorder.close()
    assert [options["project"] for options in started] == ["zoo", "zoo"]
    assert started[0]["config"] == {"width": 64}
    assert started[0]["id"] == started[1]["id"] != ""
    assert [entry if entry == "finished" else entry[0] for entry in logged] == [10, 11, "finished", 20, 21, "finished"]
    assert logged[0][1]["seed_1/loss"] == 0.5
    assert "seed_0/loss" not in logged[1][1]


@pytest.mark.parametrize(
    ("options", "module"), [({"tensorboard": True}, "tensorboardX"), ({"wandb_project": "zoo"}, "wandb")]
)
def test_missing_package_says_what_to_install(tmp_path, monkeypatch, options, module):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(ValueError, match=rf"pip install {module}$"):
        Recorder(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_versions():
    found = versions()
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__
    assert found["platform"] == jax.default_backend()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert set(found) >= {"jaxlib", "flax", "optax", "gymnax", "brax", "jaxrl_dist", "device_kind", "matmul_precision"}
    with jax.default_matmul_precision("highest"):
        assert versions()["matmul_precision"] == "highest"
    json.dumps(found)


def test_git_commit(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    assert recording._git_commit(tmp_path) is None
    git("init")
    assert recording._git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert recording._git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert recording._git_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert recording._git_commit(tmp_path / "inside") is None  # not the root: somebody else's repository


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["python", "algorithms/tqc.py", "--name", "a b"], "python algorithms/tqc.py --name 'a b'"),
        (["/opt/venv/bin/python3", "-m", "jaxrl_dist.cli", "--seeds", "3"], "python3 -m jaxrl_dist.cli --seeds 3"),
        (["/opt/venv/bin/python", "/opt/venv/bin/jaxrl-dist", "train", "tqc"], "jaxrl-dist train tqc"),
        (["python", "{cwd}/algorithms/tqc.py", "--out={cwd}/runs/x"], "python algorithms/tqc.py --out=runs/x"),
        (["python", "x.py", "--out", "/home/me/secret/runs"], "python x.py --out .../runs"),
        (["python", "x.py", "--out=/home/me/runs", "--rate=1e-3"], "python x.py --out=.../runs --rate=1e-3"),
    ],
)
def test_command_line(tmp_path, monkeypatch, typed, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    monkeypatch.setattr(sys, "orig_argv", [word.replace("{cwd}", str(Path.cwd())) for word in typed])
    assert command_line() == expected

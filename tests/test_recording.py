import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import recording
from jaxrl_dist.recording import Recorder, command_line, read_config, read_evaluations, read_metrics, versions


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
    recorder.truncate_after(40)
    assert read_metrics(tmp_path / "resumed").env_steps.max() == 40
    record(tmp_path / "resumed", range(50, 90, 10))
    for name in ("metrics.csv", "evaluations.csv"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_truncate_to_nothing_keeps_the_columns(tmp_path):
    recorder = record(tmp_path, [10, 20])
    recorder.truncate_after(0)
    assert len(read_metrics(tmp_path)) == 0
    with pytest.raises(ValueError, match="'entropy'"):
        recorder.append(log_point(10, entropy=1.0))


def test_truncate_before_any_record(tmp_path):
    Recorder(tmp_path).truncate_after(100)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_during_truncation_leaves_the_old_file(tmp_path, monkeypatch):
    recorder = record(tmp_path, [10, 20])
    before = (tmp_path / "metrics.csv").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        recorder.truncate_after(10)
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
    assert read_config(tmp_path) == {
        "zeta": 1,
        "alpha": {"width": 64, "discount": 0.99, "layers": [1, 2]},
        "rate": 0.5,
        "out": "runs/x",
        "n": None,
    }
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["zeta", "alpha", "rate", "out", "n"]
    with pytest.raises(ValueError, match="of type type, which JSON cannot express"):
        recorder.write_config({"wrong": Config})
    assert read_config(tmp_path)["zeta"] == 1  # the earlier file stands


def test_tensorboard_has_one_tag_per_seed(tmp_path):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.append(log_point(10, evaluation_return=None, loss=0.5))
    recorder.append(log_point(20, evaluation_return=-3.0, loss=0.25))
    recorder.close()
    recorder = Recorder(tmp_path, tensorboard=True)
    recorder.truncate_after(10)
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
    ("options", "module", "extra"),
    [({"tensorboard": True}, "tensorboardX", "tensorboard"), ({"wandb_project": "zoo"}, "wandb", "wandb")],
)
def test_missing_extra_says_what_to_install(tmp_path, monkeypatch, options, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # makes the import fail
    with pytest.raises(ValueError, match=rf'pip install "jaxrl-dist\[{extra}\]"'):
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

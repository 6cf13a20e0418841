"""Where compiled programs are kept, when that folder is no use, and that reading them changes no result."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pandas as pd
import pytest
from rich.console import Console

from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording
from jaxrl_dist.running import compile_cache


@pytest.fixture
def settings(monkeypatch, tmp_path) -> dict:
    """JAX's settings in a process of a user who has set nothing; what is changed of them goes no further."""
    found = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": None}
    config = SimpleNamespace(**found, update=lambda name, value: setattr(config, name, value))
    monkeypatch.setattr(jax, "config", config)
    for name in ("XDG_CACHE_HOME", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "_mend", lambda place, console: None)
    return vars(config)


def test_the_folder_is_the_users(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    assert compile_cache.folder() == f"{tmp_path}/.cache/jaxrl_dist/compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/to/nothing")
    assert compile_cache.folder() == f"{tmp_path}/.cache/jaxrl_dist/compiled"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compile_cache.folder() == f"{tmp_path}/Library/Caches/jaxrl_dist/compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert compile_cache.folder() == "/caches/jaxrl_dist/compiled"
    assert compile_cache.folder("~/here") == f"{tmp_path}/here"
    assert compile_cache.folder("off") is None
    settings["jax_compilation_cache_dir"] = "gs://bucket/mine"  # JAX_COMPILATION_CACHE_DIR
    assert compile_cache.folder() == "gs://bucket/mine"
    settings["jax_enable_compilation_cache"] = False  # JAX_ENABLE_COMPILATION_CACHE=0
    assert compile_cache.folder() is None


def test_what_is_set(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compile_cache.use("auto", Console())
    place = tmp_path / "jaxrl_dist" / "compiled"
    assert settings["jax_compilation_cache_dir"] == str(place)
    assert place.stat().st_mode & 0o777 == 0o700
    compile_cache.use(str(tmp_path / "another"), Console())
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "another")
    settings["jax_compilation_cache_dir"] = "gs://bucket/mine"
    compile_cache.use("auto", Console())
    assert settings["jax_compilation_cache_dir"] == "gs://bucket/mine"
    compile_cache.use("off", Console())
    assert settings["jax_enable_compilation_cache"] is False
    assert capsys.readouterr().out == ""


def test_a_folder_that_is_no_use(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jaxrl_dist").write_text("in the way")
    compile_cache.use("auto", Console())
    said = capsys.readouterr().out
    assert said == f"no compile cache: {tmp_path}/jaxrl_dist/compiled cannot be written to (Not a directory)\n"
    assert settings["jax_compilation_cache_dir"] is None
    asked = f"{tmp_path}/jaxrl_dist/asked"
    with pytest.raises(ConfigurationError, match=rf"^--compile-cache is '{asked}'; .* cannot be written to"):
        compile_cache.use(asked, Console())
    with pytest.raises(ConfigurationError, match=r"^--compile-cache is ''; it must be auto, off or a folder$"):
        compile_cache.use("", Console())
    settings["jax_enable_compilation_cache"] = False
    with pytest.raises(ConfigurationError, match=r"^--compile-cache is .* JAX_ENABLE_COMPILATION_CACHE turns"):
        compile_cache.use(str(tmp_path / "another"), Console())
    compile_cache.use("auto", Console())


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age, name in enumerate(("new", "read_lately", "old", "oldest")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "read_lately-cache", (2e9, 5e8))
    compile_cache._drop_oldest(tmp_path, 250)
    assert {path.name for path in compile_cache.entries(str(tmp_path))} == {"new-cache", "read_lately-cache"}
    compile_cache._drop_oldest(tmp_path / "nowhere", 250)


STARTS = """
import jax, os, toys
from pathlib import Path
from jaxrl_dist import cli

cli.spread_over_cores = lambda most=None: None  # which can be done only once in a process

def start(name):
    jax.clear_caches()  # as a new process has none
    print("START")
    cli.main(toys.LearnerConfig, toys.make_learner, {"Pendulum-v1": {}}, [
        "--total-steps", "40", "--num-seeds", "2", "--eval-every", "20", "--eval-episodes", "1", "--plots", "False",
        "--eval-states", "0", "--env-options", "max_steps_in_episode=5", "--runs-folder", "FOLDER", "--name", name,
        "--compile-cache", "FOLDER/programs",
    ])

start("compiled")
start("read")
largest = max(Path("FOLDER/programs").iterdir(), key=lambda path: path.stat().st_size)  # a program of the run
whole = largest.stat().st_size
os.truncate(largest, whole // 2)
start("damaged")
assert largest.stat().st_size > 0.9 * whole
"""


def test_a_run_from_the_cache_is_the_same_run(tmp_path):
    """Two starts, and a third one after a file was cut short, which leaves it whole."""
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "COLUMNS": "200"}
    finished = subprocess.run(
        [sys.executable, "-c", STARTS.replace("FOLDER", str(tmp_path))], cwd=Path(__file__).parents[1],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    said = finished.stdout.split("START")[1:]
    read = [re.search(r"compiled in [\d.]+ s(?: \((\d+) programs? from the cache\))?\n", text)[1] for text in said]
    assert read[0] is None
    assert int(read[1]) >= 2
    assert int(read[2] or 0) < int(read[1])
    assert [text.count("compile cache: error reading") for text in said] == [0, 0, 1]
    assert "Error reading" not in finished.stderr

    folder = tmp_path / "toys" / "Pendulum-v1"
    first = recording.read_metrics(folder / "compiled").drop(columns="seconds")
    for name in ("read", "damaged"):
        again = recording.read_metrics(folder / name).drop(columns="seconds")
        pd.testing.assert_frame_equal(first, again, check_exact=True)

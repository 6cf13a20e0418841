"""Keeps the experiment's script alive on a few steps, and its committed numbers in order."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pandas as pd

FOLDER = Path(__file__).parents[2] / "experiments" / "iterated"
specification = importlib.util.spec_from_file_location("iterated", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_a_tiny_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SPEED_LENGTHS", (1, 2))
    monkeypatch.setattr(experiment, "RETURN_LENGTHS", (1, 2))
    monkeypatch.setattr(experiment.cli, "spread_over_cores", lambda: None)  # this process has started JAX
    with jax.debug_key_reuse(False):  # what is timed begins from one state each time
        experiment.main(rounds=2, seconds=0.001, num_seeds=2, total_steps=1_032, evaluations=2, out=tmp_path)
    speed, returns = pd.read_csv(tmp_path / "speed.csv"), pd.read_csv(tmp_path / "returns.csv")
    assert list(speed.chain) == ["DQN", "K = 1", "K = 2"]
    assert speed.seconds_by_one[1] == 1
    assert len(returns) == 2 * 2 * 2
    assert np.isfinite(returns.evaluation_return).all()
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert len(networks) == 2 * (1 + 2)
    assert set(networks.network) == {1, 2}
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == 2


def test_committed_summary_follows_from_the_results():
    returns, summary = pd.read_csv(FOLDER / "returns.csv"), pd.read_csv(FOLDER / "summary.csv")
    pd.testing.assert_frame_equal(experiment.summarise(returns), summary, rtol=1e-4)
    assert (summary.seeds >= 5).all()
    speed = pd.read_csv(FOLDER / "speed.csv")
    assert list(speed.chain) == ["DQN", *(f"K = {length}" for length in experiment.SPEED_LENGTHS)]

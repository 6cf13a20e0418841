"""Keeps the experiment's script alive on a few steps, its references right by hand, and its committed numbers true."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrl_dist.distributional import joint
from jaxrl_dist.distributional.joint import JointLaw

FOLDER = Path(__file__).parents[2] / "experiments" / "joint_laws"
specification = importlib.util.spec_from_file_location("joint_laws", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_draws_are_as_far_away_as_drawing_shows():
    law = JointLaw(np.array([[0.0, 0], [3, 4], [0, 1]]), np.array([0.5, 0.25, 0.25]))
    apart = 2 * (0.125 * 5 + 0.125 * 1 + 0.0625 * np.sqrt(18))  # E|X - X'|
    assert experiment.draws_apart(law, 8) == pytest.approx(apart / 8)
    generator = np.random.default_rng(0)
    drawn = [
        joint.energy_distance(joint.equally_weighted(law.atoms[generator.choice(3, 8, p=law.masses)]), law)
        for _ in range(2_000)
    ]
    assert np.mean(drawn) == pytest.approx(apart / 8, rel=0.06)


def test_a_coarse_coin_has_nearly_the_same_law():
    exact = experiment.exact_law("coin")
    assert len(exact.masses) == 1024
    found = experiment.coarse(exact)
    assert len(found.masses) == 128
    assert joint.energy_distance(found, exact) < 1e-4
    numbers = experiment.numbers(exact, exact)
    assert numbers["energy_distance"] == pytest.approx(0, abs=1e-9)
    assert numbers["correlation"] == pytest.approx(-1, abs=1e-5)
    assert numbers["deviation_of_sum"] == pytest.approx(0, abs=1e-4)
    assert numbers["all_above_mean"] == 0
    alone = experiment.numbers(joint.independent(found), exact)
    assert alone["correlation"] == pytest.approx(0, abs=1e-6)
    assert alone["all_above_mean"] == pytest.approx(1 / 4, abs=0.02)


def test_tiny_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "PROCESSES", {"coin": 7, "parity": 3})
    monkeypatch.setattr(experiment, "check", lambda *tables: None)
    experiment.main(experiment.Arguments(seeds=2, steps=1_100, evaluations=2, out=tmp_path))
    results, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert list(results.columns) == ["process", "seed", *experiment.MEASURES]
    assert len(results) == 4
    assert len(summary) == 2 * len(experiment.MEASURES)
    control = pd.read_csv(tmp_path / "control.csv")
    np.testing.assert_allclose(control.rewards_0 + control.rewards_1, control.episode_return, atol=1e-3)
    assert len(control) == 4
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == 2


def committed() -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_csv(FOLDER / "summary.csv"), pd.read_csv(FOLDER / "control.csv")


def test_committed_numbers_pass_the_checks():
    summary, control = committed()
    results = pd.read_csv(FOLDER / "results.csv")
    assert set(summary.process) == set(experiment.PROCESSES)
    assert results.groupby("process").seed.nunique().min() >= 5
    assert control.seed.nunique() >= 5
    for row in summary.itertuples():
        values = results[results.process == row.process][row.measure]
        assert values.mean() == pytest.approx(row.learned, rel=1e-3, abs=1e-4)
    experiment.check(summary, control)


@pytest.mark.parametrize(
    ("process", "measure", "column", "value", "message"),
    [
        ("coin", "energy_distance", "high", 1.0, "no nearer"),
        ("inclusive", "correlation", "learned", 0.0, "correlation"),
        ("parity", "deviation_of_sum", "learned", 2.0, "deviates"),
    ],
)
def test_the_checks_can_fail(process, measure, column, value, message):
    summary, control = committed()
    summary.loc[(summary.process == process) & (summary.measure == measure), column] = value
    with pytest.raises(AssertionError, match=message):
        experiment.check(summary, control)


def test_the_check_of_control_can_fail():
    summary, control = committed()
    control.loc[control.seed == 0, "episode_return"] = experiment.ONE_SIDED
    with pytest.raises(AssertionError, match="returns are"):
        experiment.check(summary, control)

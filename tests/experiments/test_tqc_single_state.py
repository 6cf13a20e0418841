"""Keeps the experiment's script alive on a few iterations, its search honest, and its committed numbers true."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "tqc_single_state"
specification = importlib.util.spec_from_file_location("tqc_single_state", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_reward_has_the_papers_best_actions():
    for wave, action, value in (("sin", 0.3313, 0.6968), ("cos", 0.0197, 0.6030)):
        rewards = experiment.mean_reward(experiment.GRID, wave)
        assert experiment.GRID[np.argmax(rewards)] == pytest.approx(action, abs=6e-4)
        assert rewards.max() == pytest.approx(value, abs=1e-4)


def test_atoms_of_the_target_by_hand():
    outputs = jnp.array([[[1.0, 5, 3], [4, 8, 6]]])
    np.testing.assert_array_equal(experiment.bootstrap_atoms("TQC", 1, outputs), [[1, 3, 4, 5]])
    np.testing.assert_array_equal(experiment.bootstrap_atoms("AVG", 2, outputs[..., :1]), [[2.5]])
    np.testing.assert_array_equal(experiment.bootstrap_atoms("MIN", 2, outputs[..., :1]), [[1]])


def test_networks_equal_a_loop():
    parameters = jax.device_get(experiment.init_networks(jax.random.key(0), 3, 2))
    actions = np.linspace(-1, 1, 5, dtype=np.float32)
    outputs = experiment.apply_networks(parameters, jnp.asarray(actions))
    assert outputs.shape == (5, 3, 2)
    for number in range(3):
        p = {name: leaf[number] for name, leaf in parameters.items()}
        for row, action in enumerate(actions):
            hidden = np.maximum(p["weight_1"][0] * action + p["bias_1"], 0)
            hidden = np.maximum(hidden @ p["weight_2"] + p["bias_2"], 0)
            np.testing.assert_allclose(outputs[row, number], hidden @ p["weight_3"] + p["bias_3"], rtol=1e-4, atol=1e-6)


def test_tiny_run_writes_everything(tmp_path):
    only = ("MIN-2", "TQC-5")
    arguments = experiment.Arguments(seeds=2, iterations=20, out=tmp_path, only=only)
    experiment.main(arguments)
    results, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert list(results.columns) == ["method", "setting", "g", "seed", "bias", "variance", "action_error"]
    assert len(results) == len(only) * 2 * 2
    assert len(summary) == len(only) * 2
    assert np.isfinite(results[["bias", "variance", "action_error"]]).all(axis=None)
    assert results.bias.nunique() == len(results)  # seeds, rewards and methods all differ
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == 2
    # Twenty updates from the same draws: both searches must have chosen actions of the same value.
    full = experiment.run_setting("MIN", 2, replace(arguments, full_search=True))
    coarse = results[results.method == "MIN"].reset_index(drop=True)
    np.testing.assert_allclose(full.bias, coarse.bias, rtol=1e-3)


def test_unknown_setting_is_named(tmp_path):
    with pytest.raises(ValueError, match="'AVG-2'"):
        experiment.main(experiment.Arguments(out=tmp_path, only=("AVG-2",)))


def test_committed_summary_follows_from_the_results_and_passes_the_checks():
    results, summary = pd.read_csv(FOLDER / "results.csv"), pd.read_csv(FOLDER / "summary.csv")
    pd.testing.assert_frame_equal(experiment.summarise(results), summary, rtol=1e-4)
    assert set(zip(summary.method, summary.setting, strict=True)) == {
        (method, setting) for method, settings in experiment.SETTINGS.items() for setting in settings
    }
    experiment.check(summary)


@pytest.mark.parametrize(
    ("method", "setting", "column", "value", "message"),
    [
        ("AVG", 50, "bias", -1.0, "AVG under-estimates"),
        ("AVG", 50, "bias", 1e9, "does not fall with N"),
        ("TQC", 7, "bias", -1e4, "stays large"),
        ("TQC", 16, "bias", 1.0, "keeps its sign"),
        ("TQC", 7, "variance", 1e9, "has variance"),
    ],
)
def test_the_checks_can_fail(method, setting, column, value, message):
    summary = pd.read_csv(FOLDER / "summary.csv")
    summary.loc[(summary.method == method) & (summary.setting == setting), column] = value
    with pytest.raises(AssertionError, match=message):
        experiment.check(summary)

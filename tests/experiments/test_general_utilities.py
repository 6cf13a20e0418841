"""Keeps the experiment's script alive on a few iterations, its optimum right, and its committed numbers true."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "general_utilities"
specification = importlib.util.spec_from_file_location("general_utilities", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_visits_equal_a_sum_over_steps():
    mdp = experiment.grid(3).default_params.mdp
    policy = np.random.default_rng(0).dirichlet(np.ones(4), 9)
    now, total, following = np.eye(9)[0], np.zeros(9), np.asarray(mdp.next_state)[..., 0]
    for step in range(300):
        total += 0.1 * 0.9**step * now
        after = np.zeros(9)
        for s in range(9):
            for a in range(4):
                after[following[s, a]] += now[s] * policy[s, a]
        now = after
    np.testing.assert_allclose(experiment.visits(mdp, jnp.asarray(policy, jnp.float32)), total, rtol=1e-4)
    assert following[0].tolist() == [0, 1, 3, 0]  # up, right, down, left


def test_the_optimum_of_two_cells_a_side():
    """Its four cells can be visited almost evenly from the corner: by hand, staying as often as needed. The start has
    at least a tenth."""
    low, high = experiment.bounds_of_the_optimum(experiment.grid(2).default_params.mdp)
    assert low <= np.log(4) + 1e-6
    assert low == pytest.approx(high, abs=0.01)
    assert low == pytest.approx(np.log(4), abs=0.01)


def test_tiny_run_writes_everything(tmp_path):
    experiment.main(seeds=2, iterations=20, every=10, out=tmp_path)
    results, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert len(results) == 2 * 2 * 2 * 2 * 3  # methods, batches, lengths, seeds, looks
    assert len(summary) == 8
    first = results[results.iteration == 0]
    assert first.entropy.nunique() == 1  # all begin with the even policy
    assert first.share.iloc[0] == pytest.approx(0.82, abs=0.01)
    last = results[results.iteration == 20]
    assert last.entropy.nunique() == len(last)
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == 2


def test_committed_summary_follows_from_the_results_and_passes_the_checks():
    results, summary = pd.read_csv(FOLDER / "results.csv"), pd.read_csv(FOLDER / "summary.csv")
    pd.testing.assert_frame_equal(experiment.summarise(results), summary, rtol=1e-3)
    experiment.check(summary)


@pytest.mark.parametrize(
    ("batch", "column", "value", "message"),
    [
        (1, "share_low", 0.5, "against"),
        (10, "visits_error", 9.0, "no better known"),
        (10, "share_low", 0.9, "ch 10"),
    ],
)
def test_the_checks_can_fail(batch, column, value, message):
    summary = pd.read_csv(FOLDER / "summary.csv")
    summary.loc[(summary.method == "recursion") & (summary.batch == batch), column] = value
    with pytest.raises(AssertionError, match=message):
        experiment.check(summary)

"""The best values of the process by hand and by its own environment, and a run of the smallest size."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrl_dist import envs

FOLDER = Path(__file__).parents[2] / "experiments" / "factored_actions"
specification = importlib.util.spec_from_file_location("factored_actions", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_best_values_by_hand():
    np.testing.assert_allclose(experiment.best_values(3, False, 1.0, 0.9), [1, 1, 1])
    np.testing.assert_allclose(experiment.best_values(3, False, 0.5, 0.8), 1 / (1 - 0.4))
    # Two states, of which the second pays: v1 = 1 + g v0, v0 = g v1 with g = 0.4.
    np.testing.assert_allclose(experiment.best_values(2, True, 0.5, 0.8), [0.4 / 0.84, 1 / 0.84])


def test_best_values_are_returns_of_choices_that_are_right():
    env, params = envs.make("factored", factors=1, states=3, sparse=True, end_probability=0.0)
    _, state = env.reset(jax.random.key(0), params)
    state, found = state.replace(places=jnp.array([1])), 0.0
    for time in range(60):
        _, state, reward, _, _ = env.step_env(jax.random.key(time), state, env.right(state.places), params)
        found += 0.7**time * float(reward)
    assert found == pytest.approx(experiment.best_values(3, True, 0.0, 0.7)[1], abs=1e-6)


def test_a_small_run_writes_its_tables(tmp_path, monkeypatch):
    small = {"warmup_steps": 64, "replay_capacity": 200, "batch_size": 8, "hidden": (8, 8)}
    monkeypatch.setattr(experiment, "SHARED", experiment.SHARED | small)
    monkeypatch.setattr(experiment.cli, "spread_over_cores", lambda: None)
    experiment.main(factors=(2,), methods=("REValueD",), num_seeds=2, total_steps=128, evaluations=2, out=tmp_path)
    results, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert results.env_steps.tolist() == [96, 96, 128, 128]
    assert results.right.between(0, 1).all()
    assert summary.seeds.tolist() == [2]
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_the_committed_summary_is_that_of_the_committed_results():
    results, summary = (pd.read_csv(FOLDER / f"{name}.csv") for name in ("results", "summary"))
    pd.testing.assert_frame_equal(experiment.summarise(results), summary, atol=1e-4)
    assert results.seed.nunique() >= 5
    assert sorted(results.factors.unique()) == [2, 5, 10, 20]

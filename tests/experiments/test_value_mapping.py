"""Keeps the experiment's script alive on a few updates, its chain true, and its committed numbers in order."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrl_dist.envs import check_env

FOLDER = Path(__file__).parents[2] / "experiments" / "value_mapping"
specification = importlib.util.spec_from_file_location("value_mapping", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_the_chain():
    env, params = experiment.Chain(), experiment.ChainParams(reward=0.3)
    check_env(env, params)
    step = jax.jit(env.step_env)
    for position, action, after, reward in ((0, 0, 0, 0), (3, 0, 2, 0), (3, 1, 4, 0), (19, 0, 18, 0), (19, 1, 19, 0.3)):
        state = experiment.ChainState(time=0, position=jnp.int32(position))
        observation, state, earned, ends, _ = step(jax.random.key(0), state, jnp.int32(action), params)
        assert (int(state.position), bool(ends)) == (after, reward > 0)
        assert earned == pytest.approx(reward)
        np.testing.assert_array_equal(observation, np.eye(20)[after])
    np.testing.assert_allclose(experiment.true_values(0.5, 0.3)[-3:], [0.075, 0.15, 0.3])


@pytest.mark.parametrize(("rate", "step", "value"), [(1.0, 0.04, 0.445), (0.1, 0.5, 0.9775), (0.02, 0.5, 0.9955)])
def test_the_bias(rate, step, value):
    """Measured by the spec; a few chains here, all in the committed table."""
    found, error = experiment.settled_value("log", rate, step, 200, 3_000)
    assert found == pytest.approx(value, abs=0.01)
    assert 0 < error < 0.005
    rows = pd.read_csv(FOLDER / "bias.csv").query("mapping == 'log' and averaging_rate == @rate and step == @step")
    assert rows.value.item() == pytest.approx(value, abs=0.005)


def test_a_tiny_run_writes_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "PROBLEMS", [(0.3, 1.0), (0.9, 0.1), (0.9, 1.0)])
    monkeypatch.setattr(experiment, "RATES", (0.5, 0.1))
    experiment.main(updates=8, num_seeds=2, chains=10, steps=20, out=tmp_path)
    chain = pd.read_csv(tmp_path / "chain.csv")
    assert len(chain) == 2 * 3 * 2
    assert np.isfinite(chain[["share_right", "relative_error"]]).all(axis=None)
    assert (tmp_path / "figure.png").stat().st_size > 0
    assert json.loads((tmp_path / "run.json").read_text())["seeds"] == 2


def test_committed_summary_follows_from_the_results():
    chain, summary = pd.read_csv(FOLDER / "chain.csv"), pd.read_csv(FOLDER / "summary.csv")
    pd.testing.assert_frame_equal(experiment.summarise(chain), summary, rtol=1e-4)
    assert set(zip(chain.gamma, chain.reward, strict=True)) == set(experiment.PROBLEMS)
    assert chain.seed.nunique() >= 5

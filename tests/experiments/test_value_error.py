"""The value-error laboratory measures what it says, on agents whose error is known."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrl_dist import envs
from jaxrl_dist.learning import interaction

FOLDER = Path(__file__).parents[2] / "experiments" / "value_error"


@pytest.fixture(scope="module")
def laboratory():
    specification = importlib.util.spec_from_file_location("value_error", FOLDER / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_rewards_are_scaled_and_nothing_else(laboratory):
    env, params = envs.make("Pendulum-v1")
    scaled = laboratory.ScaledRewards(env, 10.0)
    observation, state = env.reset(jax.random.key(0), params)
    one, ten = (e.step(jax.random.key(1), state, jnp.array([0.3]), params) for e in (env, scaled))
    assert ten[2] == pytest.approx(10 * float(one[2]), rel=1e-6)
    np.testing.assert_array_equal(one[0], ten[0])
    assert scaled.observation_space(params).shape == observation.shape


def test_states_are_drawn_from_all_snapshots_of_their_own_seed(laboratory):
    measure = object.__new__(laboratory.Measure)
    measure.states = 400

    def snapshot(time):
        number = 100 * time + 10 * np.arange(2)[:, None] + np.arange(3)  # time, seed, environment
        return interaction.Interaction(number, number[..., None], number.astype(float), number, number)

    drawn = measure.drawn([snapshot(time) for time in range(4)], np.random.default_rng(0))
    assert drawn.environment.shape == (2, 400)
    assert drawn.observation.shape == (2, 400, 1)
    for seed in range(2):
        numbers, counts = np.unique(drawn.environment[seed], return_counts=True)
        assert set(numbers) == {100 * time + 10 * seed + env for time in range(4) for env in range(3)}
        assert counts.min() > 10


@pytest.mark.slow
@pytest.mark.proves("experiments/value_error", "jaxrl_dist", "algorithms/actor_critic")
def test_measures_and_writes(laboratory, tmp_path, monkeypatch):
    small = {"warmup_steps": 200, "batch_size": 16, "actor_hidden": (8,), "critic_hidden": (8,)}
    monkeypatch.setitem(laboratory.SETTINGS, "Pendulum-v1", {"total_steps": 600, "config": small})
    monkeypatch.setattr(laboratory.cli, "spread_over_cores", lambda most=None: None)
    for agents, scale in ((("ddpg", "stac"), 1.0), (("ddpg",), 100.0)):
        laboratory.main(
            "Pendulum-v1", agents=agents, reward_scale=scale, num_seeds=2, evaluations=2, snapshots=2, states=6,
            rollouts=4, out=tmp_path,
        )  # fmt: skip
    found = pd.read_csv(tmp_path / "Pendulum-v1" / "ddpg.csv")
    assert set(found.seed) == {0, 1}
    assert set(found.env_steps) == {400, 600}
    # An untrained critic says about 0; from random states the pendulum's true returns are far below.
    assert (found.true_value < -100).all()
    np.testing.assert_allclose(found.overestimation, -found.true_value, rtol=0.2)
    assert found.coverage.isna().all()  # it learns a mean
    assert (found.calibration_missing < 0.01).all()
    assert (found.calibration_w1 >= found.overestimation - 1e-3).all()
    summary = pd.read_csv(tmp_path / "Pendulum-v1" / "summary.csv")
    assert list(summary.agent) == ["DDPG", "STAC"]
    scaled = pd.read_csv(tmp_path / "Pendulum-v1_rewards_x100" / "ddpg.csv")
    np.testing.assert_allclose(scaled.true_value.mean(), found.true_value.mean(), rtol=0.5)  # in the same units
    for metric in laboratory.METRICS:
        assert (tmp_path / "Pendulum-v1" / f"{metric}.png").stat().st_size > 5_000

"""Keeps the exact fixed points true, and FQF's loss at rest in them: which weights of the target's atoms do what."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrl_dist.algorithms.value_based import fqf

FOLDER = Path(__file__).parents[2] / "experiments" / "fqf_target_weights"
specification = importlib.util.spec_from_file_location("fqf_target_weights", FOLDER / "run.py")
experiment = importlib.util.module_from_spec(specification)
specification.loader.exec_module(experiment)


def test_law_of_the_target_by_hand():
    atoms, weights = np.array([0.0, -1.0]), np.array([0.25, 0.75])
    below = experiment.probability_below(np.array([-1.0, -0.5, 0.0]), atoms, weights)
    np.testing.assert_allclose(below, [0.25 / np.e + 0.75, 0.25 * np.exp(-0.5) + 0.75, 1])
    np.testing.assert_allclose(experiment.quantiles(below[:2], atoms, weights), [-1, -0.5], atol=1e-8)


@pytest.mark.parametrize(
    ("steps", "weights", "value"), [("even", "mass", -9.596), ("learned", "equal", -5.027), ("learned", "mass", -9.971)]
)
def test_the_loss_is_at_rest_in_its_fixed_point(steps, weights, value):
    """The return is worth -10. Equal weights halve that, masses come closer than even steps do."""
    atoms, masses = experiment.fixed_point(steps, weights, 8, 0.9)
    assert masses @ atoms == pytest.approx(value, abs=1e-3)
    committed = pd.read_csv(FOLDER / "results.csv").query("discount == 0.9 and steps == @steps")
    committed = committed[committed.target_weights.isin([weights, "both"])]
    assert committed.value.item() == pytest.approx(value, abs=1e-3)

    # FQF's own functions on all rewards at once: quantiles of -Exp(1) at 4000 even fractions.
    rewards = np.log((np.arange(4000) + 0.5) / 4000)
    target = jnp.asarray(rewards[:, None] + 0.9 * atoms, jnp.float32)
    proposed = fqf.staircase(jnp.broadcast_to(jnp.log(masses), target.shape))
    predicted = jnp.broadcast_to(jnp.asarray(atoms, jnp.float32), target.shape)

    def pull(of_targets):
        slope = jax.grad(lambda x: fqf.loss_of(x, proposed.middles, target, of_targets, 0.0))(predicted)
        return np.abs(slope.sum(0)).max()

    pulls = {"mass": pull(proposed.masses), "equal": pull(None)}
    assert pulls[weights] < 1e-3
    if steps == "learned":
        assert max(pulls.values()) > 0.02
        of_targets = masses if weights == "mass" else np.full(8, 1 / 8)
        at_edges = experiment.quantiles(np.cumsum(masses)[:-1], 0.9 * atoms, of_targets)
        slope = 2 * at_edges - atoms[1:] - atoms[:-1]  # of the staircase's error in each edge
        np.testing.assert_allclose(slope, 0, atol=1e-5)

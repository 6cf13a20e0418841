"""The rebuilt agents compute what they computed before: metrics and state after three iterations.

With the draws of then: `learning.draws` came later. STAC's masks cannot be put back, its numbers are newer.
"""

import frozen_numbers
import jax
import numpy as np
import proofs
import pytest
from scipy.optimize import linear_sum_assignment

from jaxrl_dist.learning import draws
from jaxrl_dist.running.catalog import find_algorithm


def differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest differences between arrays `[arrays, ...]`, each compared with the one that it is like."""
    pairs = np.abs(found.astype(float)[:, None] - expected.astype(float)[None])
    pairs = pairs.reshape(*pairs.shape[:2], -1).max(-1) if pairs[0, 0].size else np.zeros(pairs.shape[:2])
    return pairs[linear_sum_assignment(pairs)]


@pytest.mark.parametrize("name", sorted(file.stem for file in frozen_numbers.FOLDER.glob("*.npz")))
def test_nothing_has_changed(name, proof, monkeypatch):
    monkeypatch.setattr(draws, "integers", lambda key, shape, below: jax.random.randint(key, shape, 0, below))
    monkeypatch.setattr(draws, "uniform", jax.random.uniform)
    module = find_algorithm(name)
    world = frozen_numbers.world(name, module)
    agent = module.make_agent(frozen_numbers.small_config(module), *world)
    key = jax.random.key(7)
    state = jax.eval_shape(agent.init, key)
    proof(proofs.program(agent.init, key) + proofs.program(agent.step, state))
    found = frozen_numbers.numbers(module.make_agent, frozen_numbers.small_config(module), *world)
    with np.load(frozen_numbers.FOLDER / f"{name}.npz") as file:
        expected = dict(file)
    assert {key for key in expected if "metric" in key} == {key for key in found if "metric" in key}
    for key, values in expected.items():
        scale = max(1.0, np.abs(values.astype(float)).max())
        if "metric" in key:
            np.testing.assert_allclose(found[key], values, rtol=2e-5, atol=2e-6, err_msg=key)
        else:
            assert found[key].shape == values.shape, key
            assert differences(found[key], values).max() < 2e-5 * scale, key

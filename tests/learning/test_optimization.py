"""One step of gradient descent, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_dist.learning.optimization import begin, descend


def objective(parameters):
    """x^2 + 3 y, slope (2 x, 3)."""
    return parameters["x"] ** 2 + 3 * parameters["y"], {"seen": parameters["x"]}


def test_a_step_of_plain_descent():
    start = begin(optax.sgd(0.5), {"x": jnp.float32(2), "y": jnp.float32(1)})
    moved, (loss, aux, gradient_norm) = descend(optax.sgd(0.5), start, objective)
    assert (loss, aux["seen"]) == (7, 2)  # as they were before the step
    assert gradient_norm == 5  # of (4, 3)
    assert (moved.parameters["x"], moved.parameters["y"]) == (0, -0.5)


def test_the_optimiser_remembers():
    """Three steps of Adam are those of optax called by hand; its state goes along."""
    adam = optax.adam(0.1)
    trained = begin(adam, {"x": jnp.float32(2), "y": jnp.float32(1)})
    parameters, state = trained
    for _ in range(3):
        trained, _ = descend(adam, trained, objective)
        changes, state = adam.update({"x": 2 * parameters["x"], "y": jnp.float32(3)}, state)
        parameters = optax.apply_updates(parameters, changes)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), tuple(trained), (parameters, state))
    assert optax.tree_utils.tree_get(trained.optimizer, "count") == 3


def test_the_optimiser_sees_the_parameters():
    """Weight decay needs them: with rate 1 and decay 0.5 a parameter loses half of itself, and its slope."""
    decaying = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    start = begin(decaying, {"x": jnp.float32(2), "y": jnp.float32(1)})
    moved, _ = descend(decaying, start, objective)
    assert (moved.parameters["x"], moved.parameters["y"]) == (2 - 4 - 1, 1 - 3 - 0.5)

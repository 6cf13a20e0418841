"""Parameters with their optimiser's state, and one step of gradient descent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax


class Trained(NamedTuple):
    """Parameters and what their optimiser remembers of them."""

    parameters: chex.ArrayTree
    optimizer: optax.OptState


class Descent(NamedTuple):
    """What one step saw: the loss, what the objective returned beside it, and the norm of the gradient, scalars."""

    loss: jax.Array
    aux: Any
    gradient_norm: jax.Array


def begin(optimizer: optax.GradientTransformation, parameters: chex.ArrayTree) -> Trained:
    """Parameters of which no step has been taken."""
    return Trained(parameters, optimizer.init(parameters))


def descend(
    optimizer: optax.GradientTransformation,
    trained: Trained,
    objective: Callable[[chex.ArrayTree], tuple[jax.Array, Any]],
) -> tuple[Trained, Descent]:
    """One step down `objective(parameters) -> (loss, aux)`, evaluated at the parameters before the step."""
    (loss, aux), gradient = jax.value_and_grad(objective, has_aux=True)(trained.parameters)
    changes, state = optimizer.update(gradient, trained.optimizer, trained.parameters)
    parameters = optax.apply_updates(trained.parameters, changes)
    return Trained(parameters, state), Descent(loss, aux, optax.tree.norm(gradient))

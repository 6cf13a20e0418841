"""What the tests of IQN and FQF share: implicit quantiles and their loss in plain numpy, as in `by_hand`."""

import by_hand
import numpy as np

TORSO, EMBEDDING, HEAD = "torso/mlp", "head/embedding/dense", "head/advantage"


def forward(nets: dict, observation: np.ndarray, fractions: np.ndarray) -> tuple[np.ndarray, dict]:
    """Quantiles of every action at the fractions `[batch, m]`, `[batch, actions, m]`, and the values on the way."""
    torso = by_hand.forward(nets[TORSO], 0, observation)
    torso[-1] = np.maximum(torso[-1], 0)
    batch, count = fractions.shape
    cosines = nets[EMBEDDING]["kernel_0"].shape[1]
    waves = np.zeros((batch * count, cosines))
    for row, fraction in enumerate(fractions.ravel()):
        waves[row] = [np.cos(np.pi * i * fraction) for i in range(1, cosines + 1)]
    embedding = by_hand.forward(nets[EMBEDDING], 0, waves)
    embedding[-1] = np.maximum(embedding[-1], 0)
    repeated = np.repeat(torso[-1], count, axis=0)
    head = by_hand.forward(nets[HEAD], 0, repeated * embedding[-1])
    quantiles = head[-1].reshape(batch, count, -1).swapaxes(1, 2)
    return quantiles, {TORSO: torso, EMBEDDING: embedding, HEAD: head, "repeated": repeated, "count": count}


def backward(nets: dict, tape: dict, slope: np.ndarray) -> dict[str, dict]:
    """Gradients of all parts for the slope of a loss in the quantiles, `[batch, actions, m]`."""
    gradient = {path: by_hand.zeros_like(nets[path]) for path in (TORSO, EMBEDDING, HEAD)}
    batch, actions, count = slope.shape
    at_output = slope.swapaxes(1, 2).reshape(batch * count, actions)
    at_merged = by_hand.backward(nets[HEAD], 0, tape[HEAD], at_output, gradient[HEAD])
    embedded = tape[EMBEDDING][-1]
    at_embedding = at_merged * tape["repeated"] * (embedded > 0)
    by_hand.backward(nets[EMBEDDING], 0, tape[EMBEDDING], at_embedding, gradient[EMBEDDING])
    at_features = (at_merged * embedded).reshape(batch, count, -1).sum(1) * (tape[TORSO][-1] > 0)
    by_hand.backward(nets[TORSO], 0, tape[TORSO], at_features, gradient[TORSO])
    return gradient


def quantile_huber(predicted: np.ndarray, fractions: np.ndarray, target: np.ndarray, kappa: float, masses=None):
    """Loss of one row, summed over its quantiles and averaged over its targets, and the slope in the quantiles."""
    loss, slope = 0.0, np.zeros(len(predicted))
    masses = np.full(len(target), 1 / len(target)) if masses is None else masses
    for i, fraction in enumerate(fractions):
        for y, mass in zip(target, masses, strict=True):
            error = y - predicted[i]
            weight, small = abs(fraction - (error < 0)) * mass, abs(error) <= kappa
            loss += weight * (error**2 / 2 if small else kappa * (abs(error) - kappa / 2)) / kappa
            slope[i] -= weight * (error if small else kappa * np.sign(error)) / kappa
    return loss, slope

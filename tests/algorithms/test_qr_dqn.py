"""QR-DQN's loss by the spec's hand-worked numbers, its targets, and whole updates against loops in numpy."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import qr_dqn

QUANTILES, TARGETS = jnp.array([[0.0, 1, 2, 4]]), jnp.array([[0.5, 1.5, 3]])

# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    following = jnp.array([[-1.0, 0, 2, 5]] * 2)
    target = qr_dqn.target_quantiles(by_hand.steps_of([1.0, 1.0], [0.5, 0.0]), following)
    np.testing.assert_array_equal(target, [[0.5, 1, 2, 3.5], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("kappa", "loss", "slope"),
    [
        (0.0, 1.375, [-0.125, -0.0416667, 0.0416667, 0.125]),
        (1.0, 0.8541667, [-0.1041667, -0.0833333, -0.0208333, 0.125]),
        (2.0, 0.5625, [-0.0833333, -0.1041667, 0.0208333, 0.1041667]),
    ],
)
def test_loss_by_hand(kappa, loss, slope):
    value, gradient = jax.value_and_grad(qr_dqn.loss_of)(QUANTILES, TARGETS, kappa)
    assert value == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(gradient, [slope], atol=1e-6)
    # The sum over quantiles, but the mean over the batch.
    assert qr_dqn.loss_of(jnp.repeat(QUANTILES, 3, 0), jnp.repeat(TARGETS, 3, 0), kappa) == pytest.approx(
        loss, rel=1e-5
    )


def test_lowest_quantile_pays_most_for_being_too_high():
    """The fraction belongs to the prediction; swapped, or read along the targets, quantiles come out reversed."""
    for target, expected in ((9.0, [-0.125, -0.375, -0.625, -0.875]), (-9.0, [0.875, 0.625, 0.375, 0.125])):
        gradient = jax.grad(qr_dqn.loss_of)(QUANTILES, jnp.full((1, 5), target), 0.0)
        np.testing.assert_allclose(gradient, [expected], rtol=1e-6)


def test_no_gradient_flows_through_the_target():
    def loss(quantiles, following):
        return qr_dqn.loss_of(quantiles, qr_dqn.target_quantiles(by_hand.steps_of([1.0], [0.9]), following), 1.0)

    of_quantiles, of_next = jax.grad(loss, argnums=(0, 1))(QUANTILES, jnp.array([[-1.0, 0, 2, 5]]))
    assert jnp.abs(of_quantiles).min() > 0
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 4)))


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_row(kappa):
    def row(predicted, following, choosing, reward, discount):
        count = len(predicted)
        target = reward + discount * following[np.argmax(following.mean(-1))]
        loss, slope = 0.0, np.zeros(count)
        for i in range(count):
            fraction = (2 * i + 1) / (2 * count)
            for y in target:
                error = y - predicted[i]
                weight = abs(fraction - (error < 0)) / count
                if kappa == 0:
                    loss += weight * abs(error)
                    slope[i] -= weight * np.sign(error)
                else:
                    small = abs(error) <= kappa
                    loss += weight * (error**2 / 2 if small else kappa * (abs(error) - kappa / 2)) / kappa
                    slope[i] -= weight * (error if small else kappa * np.sign(error)) / kappa
        return {
            "slope": slope, "loss": loss, "value": predicted.mean(), "target": target.mean(),
            "crossings": (np.diff(predicted) < 0).sum(), "differs": len(set(following.argmax(0))) > 1,
        }  # fmt: skip

    return row


@pytest.mark.parametrize(
    "settings", [{"kappa": 0.5}, {"kappa": 0.0, "num_steps": 3}], ids=["huber", "plain_three_steps"]
)
def test_updates_equal_loops_in_numpy(settings):
    found = by_hand.assert_updates_are(qr_dqn, slow_row(settings["kappa"]), num_quantiles=4, **settings)
    # Which action is best depends on what is compared, here the mean.
    assert np.mean([one["differs"] for one in found]) > 0

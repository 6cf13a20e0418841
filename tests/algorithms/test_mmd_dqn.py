"""MMD-DQN's loss by the spec's hand-worked numbers, its kernels, and whole updates against loops in numpy."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import mmd_dqn
from jaxrl_dist.distributional import mmd

PARTICLES, TARGETS = jnp.array([[0.0, 1, 2]]), jnp.array([[0.5, 1.5, 4]])
OFFICIAL = mmd.gaussian_mixture(tuple(range(1, 11)))

# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    following = jnp.array([[-1.0, 0, 2, 5]] * 2)
    target = mmd_dqn.target_particles(by_hand.steps_of([1.0, 1.0], [0.5, 0.0]), following)
    np.testing.assert_array_equal(target, [[0.5, 1, 2, 3.5], [1, 1, 1, 1]])


@pytest.mark.parametrize(("kernel", "expected"), [(OFFICIAL, 1.235913), (mmd.energy(), 0.666667)])
def test_loss_by_hand(kernel, expected):
    assert mmd_dqn.loss_of(PARTICLES, TARGETS, kernel) == pytest.approx(expected, rel=1e-5)
    # The mean over the batch, not the sum.
    repeated = mmd_dqn.loss_of(jnp.repeat(PARTICLES, 3, 0), jnp.repeat(TARGETS, 3, 0), kernel)
    assert repeated == pytest.approx(expected, rel=1e-5)


def test_gradient_by_hand_reaches_the_particles_alone():
    def loss(particles, following):
        target = mmd_dqn.target_particles(by_hand.steps_of([0.0], [1.0]), following)
        return mmd_dqn.loss_of(particles, target, OFFICIAL)

    of_particles, of_next = jax.grad(loss, argnums=(0, 1))(PARTICLES, TARGETS)
    np.testing.assert_allclose(of_particles, [[-0.057595, -0.373972, -0.768206]], atol=2e-6)
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 3)))


def test_collapsed_particles_move_as_one():
    """Why the network must not start with equal outputs: equal particles have equal gradients, and stay equal."""
    gradient = jax.grad(mmd_dqn.loss_of)(jnp.zeros((1, 3)), TARGETS, OFFICIAL)
    assert gradient[0, 0] < -0.1
    np.testing.assert_allclose(gradient, jnp.full((1, 3), gradient[0, 0]), rtol=1e-6)


def test_particles_start_apart():
    agent, _ = by_hand.agent_on(mmd_dqn, by_hand.Choices(), **by_hand.TINY_VALUE, num_particles=20)

    def predict(key):
        state = agent.init(key)
        observation = state.experience.interaction.observation
        return agent.claim.law(state, observation, jnp.arange(2)).atoms

    particles = np.asarray(by_hand.quick(predict)(jax.random.key(0)))
    assert len(np.unique(particles)) == 40
    assert particles.std(-1).min() > 0.05


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def gaussians(bandwidths, weights):
    def kernel(d):
        return sum(w * np.exp(-(d**2) / h) for h, w in zip(bandwidths, weights, strict=True))

    def derivative(d):
        return sum(w * np.exp(-(d**2) / h) * -2 * d / h for h, w in zip(bandwidths, weights, strict=True))

    return kernel, derivative


def slow_row(kernel, derivative):
    def row(predicted, following, choosing, reward, discount):
        count = len(predicted)
        target = reward + discount * following[np.argmax(following.mean(-1))]
        loss, slope = 0.0, np.zeros(count)
        for i in range(count):
            for j in range(count):
                within, across = predicted[i] - predicted[j], predicted[i] - target[j]
                loss += (kernel(within) - 2 * kernel(across) + kernel(target[i] - target[j])) / count**2
                # A particle occurs on either side of the pairs of predictions.
                slope[i] += 2 * (derivative(within) - derivative(across)) / count**2
        return {
            "slope": slope, "loss": loss, "value": predicted.mean(), "target": target.mean(),
            "spread": predicted.std(), "differs": len(set(following.argmax(0))) > 1,
        }  # fmt: skip

    return row


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, slow_row(*gaussians([4.0**i for i in range(-1, 8)], [2.0**i for i in range(-1, 8)]))),
        (
            {"bandwidths": tuple(float(h) for h in range(1, 11)), "bandwidth_exponent": 0.0, "num_steps": 3},
            slow_row(*gaussians(range(1, 11), [1] * 10)),
        ),
        ({"kernel": "energy"}, slow_row(lambda d: -abs(d), lambda d: -np.sign(d))),
    ],
    ids=["default", "official_three_steps", "energy"],
)
def test_updates_equal_loops_in_numpy(settings, row):
    found = by_hand.assert_updates_are(mmd_dqn, row, num_particles=4, **settings)
    # Which action is best depends on what is compared, here the mean.
    assert np.mean([one["differs"] for one in found]) > 0

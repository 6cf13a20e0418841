"""Return distributions as particles, compared by their maximum mean discrepancy (MMD-DQN)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

Kernel = Callable[[jax.Array], jax.Array]
"""A function of the difference of two returns, of any shape."""


def squared_mmd(samples_a: jax.Array, samples_b: jax.Array, kernel: Kernel, *, biased: bool = True) -> jax.Array:
    """Squared maximum mean discrepancy of equally weighted samples (MMD-DQN, eq. 6; Gretton et al. 2012).

    Differentiable in both; in a temporal-difference loss the caller makes the target `samples_b` a constant.

    Args:
        samples_a: `[..., N]`, in units of return.
        samples_b: `[..., M]`.
        kernel: `gaussian_mixture` or `energy`.
        biased: count each sample against itself too, as the paper does; never negative, up to rounding. False leaves
            those pairs out: unbiased for independent samples, but the loss can be negative. It needs N, M >= 2.

    Returns:
        `[...]`, in units of the kernel.
    """
    if not biased:
        for name, samples in (("samples_a", samples_a), ("samples_b", samples_b)):
            if samples.shape[-1] < 2:
                raise ValueError(f"{name} has shape {samples.shape}; biased=False needs at least 2 samples")

    def within(samples):
        values = pairwise(samples, samples)
        if biased:
            return values.mean((-2, -1))
        count = samples.shape[-1]
        return jnp.where(jnp.eye(count, dtype=bool), 0, values).sum((-2, -1)) / (count * (count - 1))

    def pairwise(left, right):
        return kernel(left[..., :, None] - right[..., None, :])

    return within(samples_a) + within(samples_b) - 2 * pairwise(samples_a, samples_b).mean((-2, -1))


def gaussian_mixture(
    bandwidths: Sequence[float] | jax.Array, weights: Sequence[float] | jax.Array | None = None
) -> Kernel:
    """Kernel k(d) = sum_h weight_h exp(-d^2 / h), no factor 2 in it (MMD-DQN, section 4 and its code).

    bandwidths: `[H]`, > 0, in *squared* units of return; they must match the scale of the returns, for the gradient of
    samples much farther apart than sqrt(h) vanishes. weights: `[H]`, >= 0, by default all 1.
    """
    weights = [1.0] * len(bandwidths) if weights is None else weights
    if len(bandwidths) == 0 or len(weights) != len(bandwidths):
        raise ValueError(f"weights are {weights}; it must be one per bandwidth, and those are {bandwidths}")
    for name, numbers, low in (("bandwidths", bandwidths, np.finfo(np.float32).tiny), ("weights", weights, 0)):
        concrete = [number for number in numbers if not isinstance(number, jax.core.Tracer)]
        if not all(low <= number < np.inf for number in concrete):
            raise ValueError(f"{name} are {numbers}; each must be finite and {'at least' if low == 0 else 'above'} 0")

    def kernel(difference):
        squared = difference**2
        return sum(weight * jnp.exp(-squared / h) for h, weight in zip(bandwidths, weights, strict=True))

    return kernel


def energy(exponent: float | jax.Array = 1.0) -> Kernel:
    """Kernel k(d) = -|d|^exponent, exponent in (0, 2), with which the squared MMD is the energy distance.

    Free of a scale: multiplying returns by c multiplies the squared MMD by c^exponent. The gradient at 0 is 0.
    """
    if not isinstance(exponent, jax.core.Tracer) and not 0 < exponent < 2:
        raise ValueError(f"exponent is {exponent}; it must be in (0, 2)")

    def kernel(difference):
        same = difference == 0
        # The derivative of the power at 0 is infinite or not a number, so it must not be taken there.
        return jnp.where(same, 0, -(jnp.where(same, 1, jnp.abs(difference)) ** exponent))

    return kernel

"""Returns and bootstrap targets, with termination and truncation kept apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def bootstrap_discount(gamma: float | jax.Array, terminated: jax.Array) -> jax.Array:
    """gamma * (1 - terminated): what multiplies the successor's value in a one-step target, same shape as `terminated`.

    Only a true end of the decision process stops the bootstrap. A time limit does not: the successor stored with the
    transition is the true one, so its value is what the return would have continued with.
    """
    return gamma * (1 - terminated.astype(jnp.float32))


class NStep(NamedTuple):
    """An n-step target's parts, each `[...]`: target = reward + discount * value(the state after `steps` steps)."""

    reward: jax.Array
    discount: jax.Array
    steps: jax.Array


def n_step(
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    available: jax.Array,
    gamma: float | jax.Array,
) -> NStep:
    """Rewards of up to n steps, and what the value after them is multiplied by: `[n, ...]` each -> `[...]` each.

    The window has m <= n steps. It ends with the first terminated or truncated one, or before the first one that is
    not `available` (not recorded yet; the first step always is): reward = sum_{k<m} gamma^k r_k, and
    discount = gamma^m, or 0 where its last step terminated (Sutton 1988; Rainbow, arXiv 1710.02298, section 3).
    """
    ended = terminated | truncated
    taken = jnp.concatenate([jnp.ones_like(ended[:1]), available[1:] & ~ended[:-1]]).astype(jnp.int32)
    taken = jnp.cumprod(taken, axis=0) > 0
    power = jnp.cumprod(jnp.where(taken, gamma, 1.0), axis=0)  # gamma^(k+1), and gamma^m from the last step on
    later = jnp.where(taken[1:], power[:-1] * reward[1:], 0).sum(0)
    discount = jnp.where((taken & terminated).any(0), 0, power[-1])
    return NStep(reward[0] + later, discount, taken.sum(0, dtype=jnp.int32))


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    decay: float | jax.Array,
) -> jax.Array:
    """Advantages of the steps of a rollout, `[steps, ...]` each -> `[steps, ...]`.

    A_t = delta_t + gamma decay A_{t+1} within an episode, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), where a
    termination has no successor's value (generalised advantage estimation, Schulman et al., arXiv 1506.02438).
    `next_value` is the value of the true successor: a time limit bootstraps from it, and cuts the sum like any end.
    """
    delta = reward + bootstrap_discount(gamma, terminated) * next_value - value
    weight = gamma * decay * (1 - (terminated | truncated).astype(jnp.float32))

    def back(later: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        advantage = step[0] + step[1] * later
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, weight), reverse=True)[1]

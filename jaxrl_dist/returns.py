"""Returns and bootstrap targets, with termination and truncation kept apart."""

import jax
import jax.numpy as jnp


def bootstrap_discount(gamma: float | jax.Array, terminated: jax.Array) -> jax.Array:
    """gamma * (1 - terminated): what multiplies the successor's value in a one-step target, same shape as `terminated`.

    Only a true end of the decision process stops the bootstrap. A time limit does not: the successor stored with the
    transition is the true one, so its value is what the return would have continued with.
    """
    return gamma * (1 - terminated.astype(jnp.float32))


def discounted_sum(rewards: jax.Array, discounts: jax.Array, bootstrap: jax.Array) -> jax.Array:
    """r_0 + d_0 (r_1 + d_1 (... + d_{T-1} bootstrap)): `[time, ...]`, `[time, ...]`, `[...]` -> `[...]`."""

    def backwards(following, step):
        reward, discount = step
        return reward + discount * following, None

    return jax.lax.scan(backwards, bootstrap, (rewards, discounts), reverse=True)[0]

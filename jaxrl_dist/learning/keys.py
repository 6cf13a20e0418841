"""Typed PRNG keys among the arrays of a pytree."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Whether an array, or the description of one, holds typed keys rather than numbers."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

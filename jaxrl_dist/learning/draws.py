"""Random numbers as agents draw them: many at once, each computed once, however often it is used.

XLA's CPU backend fuses the making of random bits into everything that uses them, and so makes them anew for each use: a
mask of dropout in the forward and in the backward pass, a fraction for each of its 64 cosines. It does not fuse across
a loop, so where much is drawn the two halves are drawn one after the other.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def integers(key: jax.Array, shape: tuple[int, ...], below: int | jax.Array) -> jax.Array:
    """Uniform integers from 0 to below - 1, below up to 2^31: int32 of any shape.

    The upper 32 bits of `below` times 32 random ones, by products of their halves. No probability is further from
    1 / below than 2^-32; `jax.random.randint` hashes three times as much, and divides.
    """
    bits, below = jax.random.bits(key, shape, jnp.uint32), jnp.asarray(below).astype(jnp.uint32)
    high, low, below_high, below_low = bits >> 16, bits & 0xFFFF, below >> 16, below & 0xFFFF
    middle = high * below_low + (low * below_low >> 16)
    carried = low * below_high + (middle & 0xFFFF)
    return (high * below_high + (middle >> 16) + (carried >> 16)).astype(jnp.int32)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform numbers from [0, 1): float32 of any shape."""
    return _in_halves(key, shape, jax.random.uniform)


def mask(key: jax.Array, probability: float | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """True with a probability, rounded to a multiple of 2^-16: bool of any shape. A random word serves two entries."""
    words = _in_halves(key, (-(-math.prod(shape) // 2),), lambda key, shape: jax.random.bits(key, shape, jnp.uint32))
    bits = jnp.concatenate([words & 0xFFFF, words >> 16])[: math.prod(shape)].reshape(shape)
    return bits < jnp.round(probability * 2**16).astype(jnp.uint32)


def _in_halves(key: jax.Array, shape: tuple[int, ...], draw: Callable) -> jax.Array:
    """`draw(key, shape)` for two keys made of one, half of the numbers each."""
    count = math.prod(shape)
    halves = jax.lax.map(lambda index: draw(jax.random.fold_in(key, index), (-(-count // 2),)), jnp.arange(2))
    return halves.reshape(-1)[:count].reshape(shape)

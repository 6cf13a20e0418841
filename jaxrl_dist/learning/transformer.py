"""A causal transformer over tokens, whole sequences at once or a token at a time with what it has seen kept in a cache.

The common decoder: learned places, blocks that normalise before attention and before a perceptron of one hidden layer
(Vaswani et al., arXiv 1706.03762; Radford et al. 2019; root mean squares without a mean as Zhang and Sennrich, arXiv
1910.07467), and outputs that do not share weights with the embedding. The weights of all blocks are stacked and scanned
over, so that one block is compiled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

HIDDEN = 4
"""Units of a block's perceptron for each of its inputs."""


class Cache(NamedTuple):
    """Keys and values of the first `count` tokens of each row, for what comes behind them: fit for a policy's memory.

    keys, values: `[batch, blocks, length, width]`; count: `[batch]`, int32.
    """

    keys: jax.Array
    values: jax.Array
    count: jax.Array


class Transformer(nn.Module):
    """Outputs behind every token, which depend on it and on those before it: `[batch, n]` -> `[batch, n, outputs]`.

    length: the most tokens there are; n is at most that. `fill` and `extend` do the same with a cache.
    """

    vocabulary: int
    outputs: int
    length: int
    width: int = 64
    num_blocks: int = 2
    num_heads: int = 4

    def setup(self):
        blocks, width, hidden = self.num_blocks, self.width, HIDDEN * self.width
        normal, small = nn.initializers.normal, 0.02 / (2 * blocks) ** 0.5  # what adds to the residual stream
        shapes = {
            "attention_scale": (nn.initializers.ones, (blocks, width)),
            "attention_kernel": (normal(0.02), (blocks, width, 3 * width)),  # queries, keys, values
            "output_kernel": (normal(small), (blocks, width, width)),
            "mlp_scale": (nn.initializers.ones, (blocks, width)),
            "inner_kernel": (normal(0.02), (blocks, width, hidden)),
            "inner_bias": (nn.initializers.zeros, (blocks, hidden)),
            "outer_kernel": (normal(small), (blocks, hidden, width)),
            "outer_bias": (nn.initializers.zeros, (blocks, width)),
        }
        self.blocks = {name: self.param(name, *one) for name, one in shapes.items()}
        self.token_kernel = self.param("token_kernel", normal(0.1), (self.vocabulary, width))
        self.place_kernel = self.param("place_kernel", normal(0.02), (self.length, width))
        self.head_scale = self.param("head_scale", nn.initializers.ones, (width,))
        self.head_kernel = self.param("head_kernel", normal(0.02), (width, self.outputs))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self._all_at_once(tokens)[0]

    def fill(self, tokens: jax.Array, count: jax.Array) -> tuple[jax.Array, Cache]:
        """Outputs behind token number `count` `[batch]` of `[batch, length]`, and a cache of the `count` first ones.

        What stands behind them has no influence.
        """
        chex.assert_shape(tokens, (None, self.length))
        outputs, (keys, values) = self._all_at_once(tokens)
        cache = Cache(keys.swapaxes(0, 1), values.swapaxes(0, 1), count)
        return jnp.take_along_axis(outputs, (count - 1)[:, None, None], axis=1)[:, 0], cache

    def extend(self, cache: Cache, token: jax.Array) -> tuple[jax.Array, Cache]:
        """One token `[batch]` more behind those in the cache: outputs behind it, `[batch, outputs]`, and the cache."""
        chex.assert_equal_shape([token, cache.count])
        hidden = (self.token_kernel[token] + self.place_kernel[cache.count])[:, None]
        here = jnp.arange(self.length) == cache.count[:, None]
        seen = (jnp.arange(self.length) <= cache.count[:, None])[:, None]

        def one(hidden, block):
            weights, keys, values = block
            query, key, value = project(weights, hidden)
            keys, values = (jnp.where(here[..., None], new, old) for new, old in ((key, keys), (value, values)))
            return apply_block(weights, hidden, query, keys, values, seen, self.num_heads), (keys, values)

        # A policy's memory has its rows first, a scan what it goes over.
        stacked = self.blocks, cache.keys.swapaxes(0, 1), cache.values.swapaxes(0, 1)
        hidden, (keys, values) = jax.lax.scan(one, hidden, stacked)
        return self._head(hidden)[:, 0], Cache(keys.swapaxes(0, 1), values.swapaxes(0, 1), cache.count + 1)

    def empty(self, batch: int) -> Cache:
        """A cache of no token."""
        shape = batch, self.num_blocks, self.length, self.width
        return Cache(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(batch, jnp.int32))

    def _all_at_once(self, tokens):
        chex.assert_rank(tokens, 2)
        places = tokens.shape[1]
        hidden = self.token_kernel[tokens] + self.place_kernel[:places]
        seen = jnp.tril(jnp.ones((places, places), bool))

        def one(hidden, weights):
            query, key, value = project(weights, hidden)
            return apply_block(weights, hidden, query, key, value, seen, self.num_heads), (key, value)

        hidden, cache = jax.lax.scan(one, hidden, self.blocks)
        return self._head(hidden), cache

    def _head(self, hidden):
        return normalise(hidden, self.head_scale) @ self.head_kernel


def normalise(inputs: jax.Array, scale: jax.Array) -> jax.Array:
    """Inputs `[..., width]` by their root mean square, times `scale` `[width]`."""
    return inputs * jax.lax.rsqrt((inputs**2).mean(-1, keepdims=True) + 1e-6) * scale


def project(weights: dict[str, jax.Array], hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a block, `[batch, n, width]` each."""
    return tuple(jnp.split(normalise(hidden, weights["attention_scale"]) @ weights["attention_kernel"], 3, axis=-1))


def apply_block(
    weights: dict[str, jax.Array],
    hidden: jax.Array,
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    seen: jax.Array,
    num_heads: int,
) -> jax.Array:
    """One block: attention to keys and values `[batch, m, width]`, then the perceptron, both added to `hidden`
    `[batch, n, width]`; seen: which of the m each of the n may attend to, `[n, m]` or `[batch, n, m]`."""
    batch, places, width = hidden.shape
    size = width // num_heads
    query, keys, values = (x.reshape(batch, -1, num_heads, size) for x in (query, keys, values))
    scores = jnp.einsum("bnhd,bmhd->bhnm", query, keys) * size**-0.5
    seen = jnp.expand_dims(seen, -3)  # for all heads
    attention = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    mixed = jnp.einsum("bhnm,bmhd->bnhd", attention, values).reshape(batch, places, width)
    hidden = hidden + mixed @ weights["output_kernel"]
    inner = jax.nn.gelu(normalise(hidden, weights["mlp_scale"]) @ weights["inner_kernel"] + weights["inner_bias"])
    return hidden + inner @ weights["outer_kernel"] + weights["outer_bias"]


def follow(
    network: Transformer, parameters: Any, cache: Cache, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, Cache]:
    """Outputs behind token number `count` `[batch]` of `[batch, length]`, with as little work as the cache allows.

    Where it holds all but the newest token of every row it is extended; else, as at the start of an episode, all tokens
    of all rows pass the network. Both give the same. Under `vmap` over runs both are done.
    """
    apply: Callable = network.apply

    def extended():
        newest = jnp.take_along_axis(tokens, (count - 1)[:, None], axis=1)[:, 0]
        return apply(parameters, cache, newest, method="extend")

    def filled():
        return apply(parameters, tokens, count, method="fill")

    return jax.lax.cond((cache.count == count - 1).all(), extended, filled)

"""Draws against their definition on the same bits, and against the probabilities that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import draws


@pytest.mark.parametrize("below", [1, 2, 3, 1000, 65_535, 65_536, 65_537, 1_000_000, 2**31 - 1])
def test_integers_are_the_upper_half_of_a_product(below):
    key = jax.random.key(below)
    bits = np.asarray(jax.random.bits(jax.random.clone(key), (5000,))).astype(object)  # Python's integers: exact
    found = np.asarray(jax.jit(lambda key, below: draws.integers(key, (5000,), below))(key, below))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, (bits * below >> 32).astype(np.int64))


def test_integers_cover_their_range_evenly():
    found = np.asarray(draws.integers(jax.random.key(0), (70_000,), jnp.int32(7)))
    counts = np.bincount(found, minlength=7)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5  # chi-squared, 6 degrees of freedom: 1 in 1000 beyond


@pytest.mark.parametrize("shape", [(), (3,), (128, 64), (5, 7, 3)])
def test_uniform_numbers(shape):
    found = np.asarray(draws.uniform(jax.random.key(1), shape))
    assert found.shape == shape
    assert found.dtype == np.float32
    assert ((found >= 0) & (found < 1)).all()
    if found.size < 1000:  # of more numbers with 23 bits, some are equal
        assert len(np.unique(found)) == found.size  # the halves have keys of their own
    if found.size > 1000:
        assert abs(found.mean() - 0.5) < 5 * (1 / 12 / found.size) ** 0.5
        assert abs(np.corrcoef(found.ravel()[: found.size // 2], found.ravel()[found.size // 2 :])[0, 1]) < 0.06


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.99, 1.0])
def test_masks_hold_their_probability(probability):
    found = np.asarray(jax.jit(lambda key, p: draws.mask(key, p, (333, 301)))(jax.random.key(2), probability))
    assert found.shape == (333, 301)
    assert found.dtype == bool
    deviation = (probability * (1 - probability) / found.size) ** 0.5
    assert abs(found.mean() - probability) <= 4 * deviation
    flat = found.ravel()
    if 0 < probability < 1:  # both entries of a word, and neighbours, are independent
        half = -(-flat.size // 2)
        for one, other in ((flat[: flat.size - half], flat[half:]), (flat[:-1], flat[1:])):
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / len(one) ** 0.5


def test_what_is_used_often_is_drawn_once():
    """The loop that keeps XLA from hashing anew for every use is still there once compiled, and the only one."""

    def used_twice(key):
        fractions = draws.uniform(key, (64, 32))
        return jnp.cos(jnp.arange(8) * fractions[..., None]).sum() + fractions.prod()

    text = jax.jit(used_twice).lower(jax.random.key(0)).compile().as_text()
    assert text.count(" while(") == 1


def test_lanes_draw_as_if_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    together = jax.vmap(lambda key: draws.mask(key, 0.5, (9,)))(jax.random.clone(keys))
    alone = [draws.mask(key, 0.5, (9,)) for key in keys]
    np.testing.assert_array_equal(together, alone)

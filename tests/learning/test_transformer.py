"""The transformer against loops in numpy, its cache against whole sequences, and what must not look ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxrl_dist.learning import transformer
from jaxrl_dist.learning.transformer import Transformer

NETWORK = Transformer(vocabulary=7, outputs=5, length=6, width=8, num_blocks=3, num_heads=2)
BATCH = 4


@pytest.fixture(scope="module")
def parameters():
    """Larger than at the start, so that every part of them matters."""
    drawn = NETWORK.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    keys = iter(jax.random.split(jax.random.key(1), 20))
    return jax.tree.map(lambda x: x + 0.4 * jax.random.normal(next(keys), x.shape), drawn)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (BATCH, 6), 0, 7)


# -- in numpy ---------------------------------------------------------------------------------------------------------


def slow_norm(x, scale):
    return x / np.sqrt((x**2).mean() + 1e-6) * scale


def slow_block(weights, hidden, num_heads):
    """One block on one sequence `[n, width]`, position by position and head by head, in float64."""
    places, width = hidden.shape
    size, after = width // num_heads, np.zeros_like(hidden)
    projected = [slow_norm(x, weights["attention_scale"]) @ weights["attention_kernel"] for x in hidden]
    for n in range(places):
        mixed = np.zeros(width)
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            query = projected[n][:width][part]
            keys = [projected[m][width : 2 * width][part] for m in range(n + 1)]
            values = [projected[m][2 * width :][part] for m in range(n + 1)]
            share = np.exp(log_softmax([query @ key / np.sqrt(size) for key in keys]))
            mixed[part] = sum(s * value for s, value in zip(share, values, strict=True))
        one = hidden[n] + mixed @ weights["output_kernel"]
        inner = slow_norm(one, weights["mlp_scale"]) @ weights["inner_kernel"] + weights["inner_bias"]
        inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        after[n] = one + inner @ weights["outer_kernel"] + weights["outer_bias"]
    return after


def slow_outputs(parameters, tokens, num_blocks, num_heads):
    weights = {name: np.asarray(x, np.float64) for name, x in parameters["params"].items()}
    hidden = weights["token_kernel"][tokens] + weights["place_kernel"][: len(tokens)]
    for block in range(num_blocks):
        own = {name: x[block] for name, x in weights.items() if len(x) == num_blocks and name.split("_")[0] in BLOCK}
        hidden = slow_block(own, hidden, num_heads)
    return np.array([slow_norm(x, weights["head_scale"]) for x in hidden]) @ weights["head_kernel"]


BLOCK = ("attention", "output", "mlp", "inner", "outer")


def test_a_network_equals_loops_in_numpy(parameters, tokens):
    outputs = NETWORK.apply(parameters, tokens)
    expected = [slow_outputs(parameters, np.asarray(row), 3, 2) for row in tokens]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 0.1


def test_one_block_equals_loops_in_numpy():
    keys = iter(jax.random.split(jax.random.key(3), 9))
    shapes = {
        "attention_scale": (6,), "attention_kernel": (6, 18), "output_kernel": (6, 6), "mlp_scale": (6,),
        "inner_kernel": (6, 24), "inner_bias": (24,), "outer_kernel": (24, 6), "outer_bias": (6,),
    }  # fmt: skip
    weights = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    hidden = jax.random.normal(next(keys), (1, 5, 6))
    query, key, value = transformer.project(weights, hidden)
    seen = jnp.tril(jnp.ones((5, 5), bool))
    found = transformer.apply_block(weights, hidden, query, key, value, seen, 3)
    exact = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    np.testing.assert_allclose(found[0], slow_block(exact, np.asarray(hidden[0], np.float64), 3), rtol=1e-4, atol=1e-4)


def test_the_norm_by_hand():
    np.testing.assert_allclose(
        transformer.normalise(jnp.array([3.0, 4.0]), jnp.array([1.0, 10.0])), [0.848528, 11.31371], rtol=1e-5
    )


# -- what it looks at -------------------------------------------------------------------------------------------------


def test_outputs_do_not_see_what_comes_later(parameters, tokens):
    outputs = NETWORK.apply(parameters, tokens)
    for place in range(6):
        changed = tokens.at[:, place].set((tokens[:, place] + 1) % 7)
        differs = (np.asarray(NETWORK.apply(parameters, changed)) != np.asarray(outputs)).any((0, 2))
        np.testing.assert_array_equal(differs, np.arange(6) >= place)


def test_fewer_tokens_have_the_same_outputs(parameters, tokens):
    outputs = NETWORK.apply(parameters, tokens)
    np.testing.assert_allclose(NETWORK.apply(parameters, tokens[:, :4]), outputs[:, :4], atol=1e-5)


def test_places_are_told_apart(parameters):
    """Else behind equal tokens there would be equal outputs."""
    outputs = NETWORK.apply(parameters, jnp.zeros((1, 6), jnp.int32))
    assert np.ptp(outputs[0], axis=0).min() > 1e-3


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_token_at_a_time_equals_all_at_once(parameters, tokens):
    outputs, cache = NETWORK.apply(parameters, tokens), NETWORK.empty(BATCH)
    for place in range(6):
        found, cache = NETWORK.apply(parameters, cache, tokens[:, place], method="extend")
        np.testing.assert_allclose(found, outputs[:, place], atol=1e-5)
        np.testing.assert_array_equal(cache.count, np.full(BATCH, place + 1))


def test_rows_may_be_at_different_places(parameters, tokens):
    """Filled to one length each, and extended from there."""
    outputs, count = NETWORK.apply(parameters, tokens), jnp.array([1, 3, 2, 5])
    found, cache = NETWORK.apply(parameters, tokens, count, method="fill")
    rows = np.arange(BATCH)
    np.testing.assert_allclose(found, outputs[rows, count - 1], atol=1e-6)
    found, cache = NETWORK.apply(parameters, cache, tokens[rows, count], method="extend")
    np.testing.assert_allclose(found, outputs[rows, count], atol=1e-5)
    np.testing.assert_array_equal(cache.count, count + 1)


def test_what_stands_behind_the_count_has_no_influence(parameters, tokens):
    count = jnp.array([2, 2, 3, 4])
    behind = jnp.arange(6) >= count[:, None]
    found, cache = NETWORK.apply(parameters, tokens, count, method="fill")
    other, others = NETWORK.apply(parameters, jnp.where(behind, 6 - tokens, tokens), count, method="fill")
    np.testing.assert_array_equal(found, other)
    token = tokens[:, 0]
    one, two = (NETWORK.apply(parameters, x, token, method="extend")[0] for x in (cache, others))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [2, 4, 3, 2], [1, 1, 1, 1]])
def test_following_extends_where_it_can(parameters, tokens, counts):
    """From an empty cache, from one that fits, and from one of which some rows do not."""
    outputs, rows = NETWORK.apply(parameters, tokens), np.arange(BATCH)
    follow = jax.jit(lambda cache, count: transformer.follow(NETWORK, parameters, cache, tokens, count))
    count = jnp.array(counts)
    found, cache = follow(NETWORK.empty(BATCH), count)
    np.testing.assert_allclose(found, outputs[rows, count - 1], atol=1e-5)
    found, after = follow(cache, count + 1)
    np.testing.assert_allclose(found, outputs[rows, count], atol=1e-5)
    stale = jax.tree.map(lambda x: x.at[1].set(jnp.zeros_like(x[1])), cache)
    found, again = follow(stale, count + 1)
    np.testing.assert_allclose(found, outputs[rows, count], atol=1e-5)
    np.testing.assert_array_equal(after.count, again.count)


def test_following_a_cache_is_less_work(parameters, tokens):
    """Of the two branches the shorter one does no product with more rows than there are."""
    program = jax.make_jaxpr(lambda cache, count: transformer.follow(NETWORK, parameters, cache, tokens, count))(
        NETWORK.empty(BATCH), jnp.full(BATCH, 3)
    )
    (choice,) = (equation for equation in program.jaxpr.eqns if equation.primitive.name == "cond")
    texts = [str(branch) for branch in choice.params["branches"]]
    assert [f"f32[{BATCH},6,32]" in text for text in texts] == [True, False]  # a perceptron's hidden units


def test_gradients_reach_every_weight(parameters, tokens):
    gradient = jax.grad(lambda x: (NETWORK.apply(x, tokens) ** 2).sum())(parameters)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert (np.abs(leaf).max(tuple(range(1, leaf.ndim))) > 0).mean() > 0.7, path  # not all tokens occur


def test_a_start_in_small_steps():
    """What adds to the residual stream is small, so that outputs are nearly those of the embedding."""
    network = Transformer(11, 11, 8, width=64, num_blocks=4)
    drawn = network.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    deviations = {name: float(x.std()) for name, x in drawn.items() if name.endswith("kernel")}
    expected = {
        "attention_kernel": 0.02, "inner_kernel": 0.02, "output_kernel": 0.02 / 8**0.5, "outer_kernel": 0.02 / 8**0.5,
        "token_kernel": 0.1, "place_kernel": 0.02, "head_kernel": 0.02,
    }  # fmt: skip
    assert deviations == pytest.approx(expected, rel=0.15)
    assert sum(x.size for x in jax.tree.leaves(drawn)) == 4 * (64 * (3 + 1 + 8) * 64 + 64 * (2 + 4 + 1)) + 64 * (
        11 + 8 + 1 + 11
    )

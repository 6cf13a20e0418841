import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import quantile, risk
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import Risk

TAU = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95], np.float32)
DISTORTIONS = [
    "cvar:0.1", "cvar:0.25", "cvar:1", "wang:-0.75", "wang:0.75", "wang:0", "cpw:0.3", "cpw:0.71", "cpw:1",
    "power:-2", "power:2", "power:0", "norm:1", "norm:2", "norm:3", "norm:10", "neutral", "mean-variance:0.5",
]  # fmt: skip


def compiled(function):
    """A jitted risk function of (text, operand), compiled once for each name; the level is traced, as in a sweep."""
    by_name = {}

    def call(text, operand):
        name, level = risk.parse(text)
        if name not in by_name:
            by_name[name] = jax.jit(lambda level, operand: function(Risk(name, level), operand))
        return by_name[name](level, operand)

    return call


distort, cumulative, value = compiled(risk.distort), compiled(risk.cumulative), compiled(risk.value)


# -- parsing ----------------------------------------------------------------------------------------------------------


def test_parse():
    assert risk.parse("neutral") == risk.NEUTRAL == Risk("neutral", 0.0)
    assert risk.parse("cvar:0.25") == Risk("cvar", 0.25)
    assert risk.parse("wang:-0.75") == Risk("wang", -0.75)
    assert risk.parse("mean-variance:0") == Risk("mean-variance", 0.0)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "foo:1",
            "neutral:1",
            "cvar",
            "cvar:",
            "cvar:x",
            "cvar:0",
            "cvar:1e-60",
            "wang:1e39",
            "cvar:1.1",
            "cvar:nan",
            "CVaR:0.1",
            "cvar:.1:2",
        ],
        *["wang:inf", "wang:nan", "cpw:0.29", "cpw:1.1", "power:-inf", "norm:0", "norm:2.5", "norm:11", "norm:inf"],
        *["mean-variance:-1", "mean-variance:inf"],
    ],
)
def test_parse_rejects(text):
    with pytest.raises(ConfigurationError) as caught:
        risk.parse(text)
    message = str(caught.value)
    assert message.startswith(f"--risk is {text!r}; it must be neutral, cvar:LEVEL with LEVEL in (0, 1], wang:LEVEL")
    assert "\n" not in message


def test_unknown_names_are_rejected():
    for function in (risk.distort, risk.cumulative):
        with pytest.raises(ValueError, match=r"risk.name is 'foo'; it must be one of neutral, cvar, wang"):
            function(Risk("foo", 1.0), TAU)
    with pytest.raises(ValueError, match=r"risk.name is 'foo'"):
        risk.value(Risk("foo", 1.0), laws.equally_weighted(jnp.arange(3.0)))


# -- distortions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpw:0.71", [0.106476, 0.165612, 0.292863, 0.460588, 0.638882, 0.788143, 0.861322]),
        ("wang:-0.75", [0.008314, 0.021100, 0.077152, 0.226627, 0.469904, 0.702482, 0.814567]),
        ("wang:0.75", [0.185433, 0.297518, 0.530096, 0.773373, 0.922848, 0.978900, 0.991686]),
        ("power:-2", [0.016952, 0.034511, 0.091440, 0.206299, 0.370039, 0.535841, 0.631597]),
        ("power:2", [0.368403, 0.464159, 0.629961, 0.793701, 0.908560, 0.965489, 0.983048]),
        ("cvar:0.25", TAU / 4),
        ("neutral", TAU),
        ("mean-variance:0.5", TAU),
        ("wang:0", TAU),
        ("power:0", TAU),
        ("cpw:1", TAU),
        ("cvar:1", TAU),
        ("norm:1", TAU),
    ],
)
def test_distortions_of_the_specification(text, expected):
    np.testing.assert_allclose(distort(text, TAU), expected, atol=1.5e-6)


@pytest.mark.parametrize("text", DISTORTIONS)
def test_distortions_rise_from_zero_to_one_and_cumulative_is_their_inverse(text):
    fractions = np.linspace(0, 1, 201, dtype=np.float32)
    beta, inverse = distort(text, fractions), cumulative(text, fractions)
    assert (float(beta[0]), float(inverse[0]), float(inverse[-1])) == (0, 0, 1)
    assert float(beta[-1]) == (np.float32(risk.parse(text).level) if text.startswith("cvar") else 1)
    for rising in (beta, inverse):
        assert np.diff(rising).min() > -2e-7
    np.testing.assert_allclose(cumulative(text, beta), fractions, atol=2e-5)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_norm_is_the_law_of_the_mean_of_uniforms(count):
    # Irwin-Hall, here in exact integers: 1/n! sum_k (-1)^k C(n, k) (x - k)_+^n at x = n y.
    from fractions import Fraction
    from math import comb, factorial

    y = [Fraction(i, 40) for i in range(41)]
    exact = [
        float(sum((-1) ** k * comb(count, k) * max(count * each - k, 0) ** count for k in range(count + 1)))
        / factorial(count)
        for each in y
    ]
    np.testing.assert_allclose(cumulative(f"norm:{count}", np.float32(y)), exact, atol=2e-6)
    # Its mean is 1/2 and its variance 1 / (12 n), for n = 3 the 1/36 of the specification.
    beta = np.asarray(distort(f"norm:{count}", quantile.midpoints(4000)), np.float64)
    assert beta.mean() == pytest.approx(0.5, abs=1e-5)
    assert beta.var() == pytest.approx(1 / (12 * count), rel=1e-3)


def test_cpw_would_fall_below_the_allowed_levels():
    fractions = jnp.linspace(0.001, 0.999, 999)
    assert np.diff(risk.distort(Risk("cpw", 0.3), fractions)).min() > 0
    assert np.diff(risk.distort(Risk("cpw", 0.27), fractions)).min() < 0


@pytest.mark.parametrize("text", ["wang:0.75", "power:2"])
def test_averse_and_seeking_distortions_are_reflections(text):
    averse = text.replace(":", ":-")
    np.testing.assert_allclose(distort(averse, TAU), 1 - distort(text, 1 - TAU), atol=1e-6)
    np.testing.assert_allclose(cumulative(averse, TAU), 1 - cumulative(text, 1 - TAU), atol=1e-6)


# -- values -----------------------------------------------------------------------------------------------------------

MEANS = {  # of U[0, 2] and N(0, 1)
    "cpw:0.71": (0.938625, -0.091695),
    "wang:-0.75": (0.595883, -0.75),
    "wang:0.75": (1.404117, 0.75),
    "power:-2": (0.5, -0.846284),
    "power:2": (1.5, 0.846284),
    "cvar:0.1": (0.1, -1.754983),
    "cvar:0.25": (0.25, -1.271106),
    "norm:3": (1, 0),
    "neutral": (1, 0),
}


@pytest.mark.parametrize("text", MEANS)
def test_values_of_known_laws(text):
    # Both ways: fixed atoms with exact weights, and quantiles read at distorted fractions.
    fractions = (np.arange(4000) + 0.5) / 4000
    for quantile_function, expected in zip((lambda tau: 2 * tau, scipy.stats.norm.ppf), MEANS[text], strict=True):
        law = laws.equally_weighted(jnp.asarray(quantile_function(fractions), jnp.float32))
        assert float(value(text, law)) == pytest.approx(expected, abs=1e-3)
        read = quantile_function(np.float64(distort(text, jnp.asarray(fractions, jnp.float32))))
        quantiles = jnp.asarray(read, jnp.float32)
        assert float(risk.value_of_quantiles(risk.parse(text), quantiles)) == pytest.approx(expected, abs=2e-3)


def test_uniform_fractions_give_the_same_values():
    fractions = jax.random.uniform(jax.random.key(0), (1_000_000,))
    for text, (expected, _) in MEANS.items():
        quantiles = 2 * distort(text, fractions)
        assert float(risk.value_of_quantiles(risk.parse(text), quantiles)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("text", "risky"),
    [
        ("neutral", 1.1), ("cvar:0.25", 0), ("wang:-0.75", 0.498580), ("power:-2", 0.275), ("cpw:0.71", 0.96875),
        ("wang:0.75", 1.701420), ("mean-variance:0.5", 1.1 - 0.5 * 1.21),
    ],
)  # fmt: skip
def test_safe_or_risky(text, risky):
    # Action 0 pays 1; action 1 pays 0 or 2.2.
    law = laws.equally_weighted(jnp.array([[1.0, 1.0], [2.2, 0.0]]))
    values = value(text, law)
    np.testing.assert_allclose(values, [1, risky], atol=2e-6)
    assert values.argmax() == (1 if risky > 1 else 0)


@pytest.mark.parametrize("text", DISTORTIONS)
def test_point_masses_keep_their_value(text):
    law = Law(jnp.full((2, 5), 3.7), jnp.array([[0.2] * 5, [0.5, 0, 0, 0.1, 0.4]]))
    np.testing.assert_allclose(value(text, law), 3.7, rtol=1e-5)


@pytest.mark.parametrize("text", ["cvar:1", "wang:0", "power:0", "cpw:1", "norm:1"])
def test_neutral_limits(text):
    rng = np.random.default_rng(0)
    law = Law(jnp.asarray(rng.normal(size=(3, 9)), jnp.float32), jnp.asarray(rng.dirichlet(np.ones(9), 3), jnp.float32))
    np.testing.assert_allclose(value(text, law), laws.mean(law), atol=1e-5)


@pytest.mark.parametrize("text", DISTORTIONS[:-2])
def test_value_agrees_with_integrating_the_distorted_quantile_function(text):
    rng = np.random.default_rng(1)
    law = Law(rng.normal(size=(3, 6)).astype(np.float32), rng.dirichlet(np.ones(6), 3).astype(np.float32))
    beta = np.asarray(distort(text, jnp.asarray((np.arange(4000) + 0.5) / 4000, jnp.float32)))
    values = value(text, law)
    for row in range(3):
        order = np.argsort(law.atoms[row])
        edges = np.cumsum(law.masses[row][order].astype(np.float64))
        read = law.atoms[row][order][np.minimum(np.searchsorted(edges, beta), 5)]
        assert float(values[row]) == pytest.approx(read.mean(), abs=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(DISTORTIONS[:-1]), st.floats(-10, 10), st.floats(0, 10))
def test_translation_and_scale_and_splitting_of_atoms(seed, text, shift, scale):
    rng = np.random.default_rng(seed)
    atoms, masses = rng.normal(size=6).astype(np.float32), rng.dirichlet(np.ones(6)).astype(np.float32)
    base = float(value(text, Law(atoms, masses)))
    moved = value(text, Law(np.float32(scale) * atoms + np.float32(shift), masses))
    assert float(moved) == pytest.approx(scale * base + shift, abs=1e-3)
    # Two halves of an atom, anywhere in the list, are that atom.
    split = Law(np.concatenate([atoms, atoms]), np.concatenate([masses, masses]) / 2)
    assert float(value(text, split)) == pytest.approx(base, abs=1e-4)


def test_a_nan_stays_visible():
    for law in (
        Law(jnp.array([0.0, jnp.nan, 1.0]), jnp.full(3, 1 / 3)),
        Law(jnp.array([0.0, 2.0, 1.0]), jnp.array([0.5, jnp.nan, 0.5])),
    ):
        for text in DISTORTIONS:
            assert np.isnan(value(text, law)), text


def test_mean_variance_hand_worked():
    law = Law(jnp.array([1.0, -10.0, 0.0]), jnp.array([0.7, 0.1, 0.2]))  # mean -.3, variance 10.61
    assert float(value("mean-variance:0.1", law)) == pytest.approx(-0.3 - 1.061)
    quantiles = jnp.array([[0.0, 2.0], [1.0, 1.0]])
    values = risk.value_of_quantiles(risk.parse("mean-variance:0.1"), quantiles)
    np.testing.assert_allclose(values, [0.9, 1], rtol=1e-6)


def test_weights_of_equal_atoms_hand_worked():
    # N = 4, level 3/8: [2/3, 1/3, 0, 0], here as the gradient of the value at unsorted atoms.
    gradient = jax.grad(lambda atoms: risk.value(Risk("cvar", 0.375), laws.equally_weighted(atoms)))
    np.testing.assert_allclose(gradient(jnp.array([5.0, -1, 7, 0])), [0, 2 / 3, 0, 1 / 3], atol=1e-6)


# -- conditional value at risk ----------------------------------------------------------------------------------------


@jax.jit
def conditional_value_at_risk(atoms, level):
    return risk.conditional_value_at_risk(laws.equally_weighted(atoms), level)


ATOMS = jnp.array([[6.0, -3.0, 2.0, 0.0, 10.0, 1.0, -1.0, 3.0, 8.0, 4.0]])  # sorted: -3 -1 0 1 2 3 4 6 8 10


@pytest.mark.parametrize(
    ("level", "expected"),
    [(0.05, -3), (0.1, -3), (0.15, (-3 - 0.5) / 1.5), (0.2, -2), (0.25, (-3 - 1 + 0) / 2.5), (0.5, -0.2), (1.0, 3)],
)
def test_conditional_value_at_risk_hand_worked(level, expected):
    np.testing.assert_allclose(conditional_value_at_risk(ATOMS, level), [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("law", "level", "expected"),
    [
        *[(([-4, -1, 0, 2, 5], [0.2] * 5), *row) for row in [(0.05, -4), (0.2, -4), (0.25, -3.4), (0.5, -2), (1, 0.4)]],
        *[(([-10, 0, 1], [0.1, 0.2, 0.7]), *row) for row in [(0.1, -10), (0.25, -4), (0.5, -1.6)]],
    ],
)
def test_conditional_value_at_risk_of_the_specification_is_the_rockafellar_uryasev_maximum(law, level, expected):
    atoms, masses = np.float32(law[0]), np.float32(law[1])
    shuffled = np.random.default_rng(0).permutation(len(atoms))
    result = value(f"cvar:{level}", Law(atoms[shuffled], masses[shuffled]))
    assert float(result) == pytest.approx(expected, abs=2e-6)
    maximum = max(b + (masses * np.minimum(atoms - b, 0)).sum() / level for b in atoms)
    assert maximum == pytest.approx(expected, abs=1e-5)


def test_conditional_value_at_risk_integrates_the_quantile_function():
    # (1 / level) * integral of F^-1 over [0, level], as a sum over a grid so fine that no cell crosses an atom's edge.
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(4, 6)).astype(np.float32)
    cells = 6 * 50
    levels = np.arange(1, cells + 1) / cells
    quantile_function = np.repeat(np.sort(atoms), 50, axis=1)
    expected = np.cumsum(quantile_function, axis=1) / np.arange(1, cells + 1)
    values = jax.jit(jax.vmap(conditional_value_at_risk, in_axes=(None, 0), out_axes=1))(atoms, levels)
    np.testing.assert_allclose(values, expected, atol=2e-5)
    # Continuous and monotone in the level, up to the mean of all.
    assert np.all(np.diff(values) > -1e-5)
    assert np.abs(np.diff(values[:, 25:])).max() < 0.1
    np.testing.assert_allclose(values[:, -1], atoms.mean(-1), atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.floats(-100, 100),
    st.floats(0, 100),
)
def test_conditional_value_at_risk_is_coherent(atoms, level, other_level, shift, scale):
    atoms = np.float32(atoms)
    worst = conditional_value_at_risk(atoms, level)
    assert float(worst) <= atoms.mean() + 1e-3
    low, high = sorted([level, other_level])
    worse, better = (conditional_value_at_risk(atoms, each) for each in (low, high))
    assert float(worse) <= float(better) + 1e-3
    moved = conditional_value_at_risk(scale * atoms + shift, level)
    np.testing.assert_allclose(moved, scale * worst + shift, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("text", ["cvar:0.3", "wang:-0.5", "cpw:0.71", "power:-1", "power:2", "norm:3"])
def test_values_are_differentiable_in_the_masses(text):
    """What a deterministic policy gradient through categorical laws needs; cpw is inverted by bisection."""
    measure, atoms = risk.parse(text), jnp.array([-1.0, 0.5, 2.0, 3.0])

    def value(logits):
        return risk.value(measure, Law(atoms, jax.nn.softmax(logits)), ascending=True)

    logits, step = jnp.array([0.3, -0.2, 0.5, 0.1]), 0.02
    slopes = [(value(logits + step * one) - value(logits - step * one)) / (2 * step) for one in jnp.eye(4)]
    np.testing.assert_allclose(jax.grad(value)(logits), slopes, rtol=0.02, atol=2e-3)

"""Risk measures of return distributions, as distortions of the quantile function (IQN, section 3.1).

A distortion beta maps the fraction at which the quantile function F^-1 is read: the risk-adjusted value is the integral
of F^-1(beta(tau)) over tau in (0, 1), the mean of the distorted law. An agent that can evaluate its quantiles anywhere
reads them at `distort`; one with fixed atoms weights them by the measure of the tau that land on each (`value`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_dist.configuration import ConfigurationError, as_float32
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.quantile import sort_atoms

MOST_UNIFORMS = 10  # beyond it the alternating sum of the Irwin-Hall law loses its digits in float32
BISECTIONS = 30


class Risk(NamedTuple):
    """What an agent maximises, by name, and the one number it takes; make it with `parse`. `level` may be traced.

    | name | beta(tau), or the value | level |
    |---|---|---|
    | neutral | tau | unused |
    | cvar | level tau: the mean of the worst `level` of returns | (0, 1] |
    | wang | Phi(Phi^-1(tau) + level): below 0 averse, above 0 seeking | finite |
    | cpw | tau^c / (tau^c + (1 - tau)^c)^(1/c): overweights both tails | [0.3, 1]; below 0.279 beta would fall |
    | power | tau^(1/(1+l)) for l >= 0, seeking; 1 - (1 - tau)^(1/(1+abs(l))) for l < 0, averse | finite |
    | norm | quantile function of the mean of `level` uniforms: underweights both tails | integer in 1 ... 10 |
    | mean-variance | mean - level * variance; no distortion, and not monotone | >= 0 |
    """

    name: str
    level: float


NEUTRAL = Risk("neutral", 0.0)

_LEVELS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "cvar": ("in (0, 1]", lambda level: 0 < level <= 1),
    "wang": ("finite", math.isfinite),
    "cpw": ("in [0.3, 1]", lambda level: 0.3 <= level <= 1),
    "power": ("finite", math.isfinite),
    "norm": (f"an integer in [1, {MOST_UNIFORMS}]", lambda level: 1 <= level <= MOST_UNIFORMS and level.is_integer()),
    "mean-variance": ("finite and at least 0", lambda level: 0 <= level < math.inf),
}


def parse(text: str) -> Risk:
    """The risk measure of a command line: "neutral", "cvar:0.25", "wang:-0.75", "cpw:0.71", "power:-2", "norm:3" or
    "mean-variance:0.1". Raises ConfigurationError for anything else."""
    if text == NEUTRAL.name:
        return NEUTRAL
    name, _, number = text.partition(":")
    try:
        level = float(number)
    except ValueError:
        level = None
    if level is None or name not in _LEVELS or not _LEVELS[name][1](as_float32(level)):
        allowed = [f"{name}:LEVEL with LEVEL {levels}" for name, (levels, _) in _LEVELS.items()]
        allowed = f"neutral, {', '.join(allowed[:-1])}, or {allowed[-1]}"
        raise ConfigurationError(f"--risk is {text!r}; it must be {allowed}")
    return Risk(name, level)


# -- distortions ------------------------------------------------------------------------------------------------------


def distort(risk: Risk, fractions: jax.Array) -> jax.Array:
    """beta(tau), any shape: where to evaluate the quantile function for `fractions` that are uniform on (0, 1).

    Nondecreasing, 0 at 0 and 1 at 1 (cvar: `level` at 1). For norm, IQN takes the mean of `level` fresh uniforms, a
    random fraction; its quantile function here turns one uniform into the same law, so midpoints can be passed too.
    """
    name, level = risk
    tau = jnp.asarray(fractions)
    match name:
        case "neutral" | "mean-variance":
            return tau
        case "cvar":
            return level * tau
        case "wang":
            beta = jax.scipy.stats.norm.cdf(_normal_quantile(tau) + level)
        case "cpw":
            beta = _prospect_weighting(tau, level)
        case "power":
            exponent = 1 / (1 + jnp.abs(level))
            beta = jnp.where(jnp.asarray(level) >= 0, tau**exponent, 1 - (1 - tau) ** exponent)
        case "norm":
            beta = _invert(lambda y: _mean_of_uniforms(y, level), tau)
        case _:
            raise _unknown(name)
    return _exact_ends(tau, beta)


def cumulative(risk: Risk, fractions: jax.Array) -> jax.Array:
    """P(beta(U) <= fraction) for U uniform on (0, 1), the inverse of beta, any shape; exactly 0 at 0 and 1 at 1."""
    name, level = risk
    y = jnp.asarray(fractions)
    match name:
        case "neutral" | "mean-variance":
            return y
        case "cvar":
            tau = jnp.minimum(y / level, 1)
        case "wang":
            tau = jax.scipy.stats.norm.cdf(_normal_quantile(y) - level)
        case "cpw":
            tau = _invert(lambda tau: _prospect_weighting(tau, level), y)
        case "power":
            exponent = 1 + jnp.abs(level)
            tau = jnp.where(jnp.asarray(level) >= 0, y**exponent, 1 - (1 - y) ** exponent)
        case "norm":
            tau = _mean_of_uniforms(y, level)
        case _:
            raise _unknown(name)
    return _exact_ends(y, tau)


def _unknown(name: str) -> ValueError:
    return ValueError(f"risk.name is {name!r}; it must be one of {', '.join(['neutral', *_LEVELS])}")


def _exact_ends(fractions, values):
    return jnp.where(fractions <= 0, 0, jnp.where(fractions >= 1, 1, values))


def _normal_quantile(fractions):
    return jax.scipy.special.ndtri(jnp.clip(fractions, 1e-6, 1 - 1e-6))  # infinite at 0 and 1


def _prospect_weighting(tau, level):
    """Probability weighting of cumulative prospect theory (Tversky & Kahneman 1992)."""
    return tau**level / (tau**level + (1 - tau) ** level) ** (1 / level)


def _mean_of_uniforms(y, count):
    """P(mean of `count` independent uniforms <= y): the Irwin-Hall law, 1/n! sum_k (-1)^k C(n, k) (n y - k)_+^n."""
    lower = jnp.minimum(y, 1 - y)  # the law is symmetric, and terms of its lower half stay below 3 for n <= 10
    integers = jnp.arange(1, MOST_UNIFORMS + 1)
    coefficient = 1 / jnp.where(integers <= count, integers, 1).prod(dtype=lower.dtype)
    probability = jnp.zeros_like(lower)
    for k in range(MOST_UNIFORMS // 2 + 1):
        probability += coefficient * jnp.maximum(count * lower - k, 0) ** count
        coefficient *= -(count - k) / (k + 1)
    return jnp.where(y <= 0.5, probability, 1 - probability)


def _invert(increasing, values):
    """The fraction in [0, 1] at which an increasing function takes each value, by bisection; differentiable in it."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = increasing(middle) < values
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.zeros_like(values), jnp.ones_like(values)))
    found = jax.lax.stop_gradient(jnp.where(jnp.isnan(values), values, (low + high) / 2))
    _, slope = jax.jvp(increasing, (jnp.clip(found, 1e-6, 1 - 1e-6),), (jnp.ones_like(found),))
    slope = jnp.maximum(jax.lax.stop_gradient(slope), 1e-6)  # 0 at the ends, where a gradient would be infinite
    return found + (values - jax.lax.stop_gradient(values)) / slope


# -- values -----------------------------------------------------------------------------------------------------------


def value(risk: Risk, law: Law, *, ascending: bool = False) -> jax.Array:
    """Risk-adjusted value of each law, `[...]` in units of return.

    The mean of the distorted law: atom i of the ascending atoms, with cumulated mass c_i, weighs
    `cumulative(c_i) - cumulative(c_{i-1})`, exact at any level. For mean-variance, mean - level * variance.
    `ascending` promises that the atoms are sorted (a support), which saves sorting them.
    """
    if risk.name == "neutral":
        return laws.mean(law)
    if risk.name == "mean-variance":
        return laws.mean(law) - risk.level * laws.variance(law)
    atoms, masses = law if ascending else laws.sort(law)
    cumulated = jnp.cumsum(masses, axis=-1)
    total = cumulated[..., -1:]
    cumulated = jnp.where(cumulated >= total, 1, cumulated / total)  # rounding must not leave the last one short of 1
    weights = jnp.diff(cumulative(risk, cumulated), axis=-1, prepend=0)
    return (atoms * weights).sum(-1)


def value_of_atoms(risk: Risk, atoms: jax.Array) -> jax.Array:
    """`value` of `[..., n]` equally weighted atoms in any order, `[...]`: the weights are the same for all of them."""
    if risk.name in ("neutral", "mean-variance"):
        return value_of_quantiles(risk, atoms)
    weights = jnp.diff(cumulative(risk, jnp.arange(atoms.shape[-1] + 1) / atoms.shape[-1]))
    ascending = sort_atoms(atoms.reshape(-1, atoms.shape[-1])).reshape(atoms.shape)
    return (ascending * weights).sum(-1)


def value_of_quantiles(risk: Risk, quantiles: jax.Array) -> jax.Array:
    """Risk-adjusted value from quantiles that were evaluated at `distort(risk, tau)`: `[..., fractions]` -> `[...]`.

    tau: uniform samples or `quantile.midpoints`. The distortion is in the fractions, so this is the mean; for
    mean-variance, which distorts nothing, mean - level * variance.
    """
    if risk.name == "mean-variance":
        return quantiles.mean(-1) - risk.level * quantiles.var(-1)
    return quantiles.mean(-1)


def conditional_value_at_risk(law: Law, level: float | jax.Array) -> jax.Array:
    """Mean of the worst `level` in (0, 1] of the mass (Rockafellar & Uryasev 2000), `[...]`; level 1 is the mean.

    The atom on the boundary counts with the part of its mass that lies inside: exact, and continuous in `level`.
    """
    return value(Risk("cvar", level), law)


def tables(risk: Risk, size: int = 4097) -> dict[str, jax.Array]:
    """The measure for those who cannot compute it (numpy alone): `cumulative` on an even grid over [0, 1], and the
    weight of the variance; empty for the mean."""
    if risk.name == "neutral":
        return {}
    if risk.name == "mean-variance":
        return {"variance_penalty": variance_penalty(risk)}
    return {"risk_table": cumulative(risk, jnp.linspace(0, 1, size))}


def variance_penalty(risk: Risk) -> float | jax.Array:
    """The part of a risk measure that no distortion expresses: what multiplies the variance, 0 but for one of them."""
    return risk.level if risk.name == "mean-variance" else 0.0

"""QTD: tabular quantile temporal-difference learning, as an estimator of the mean.

Paper: "The Statistical Benefits of Quantile Temporal-Difference Learning for Value Estimation", Rowland, Tang, Lyle,
Munos, Bellemare, Dabney, ICML 2023, arXiv 2305.18388; convergence in arXiv 2301.04462.

TD(0) moves the value of a state by its error, and one extreme reward moves it as far as it likes. QTD keeps m quantiles
of the return, moves each by at most a step size whatever the reward was, and reports their mean. Bounded steps make it
robust to heavy tails; the price is a bias that falls with m, and slower progress where nothing is random.

    TD            V(x) += alpha (r + gamma V(x') - V(x))
    QTD           theta_i(x) += alpha (tau_i - 1/m sum over j of 1{r + gamma theta_j(x') < theta_i(x)}),
                  tau_i = (2i - 1) / (2m), for all i at once
    value         V(x) = 1/m sum over i of theta_i(x)
    expectation   theta(x) = quantiles at tau of the law of r + gamma theta_J(x'), J uniform: where QTD converges to

The indicator is strict, which matters where rewards are certain and targets tie. With the m targets sorted once, a
binary search counts those below each theta_i: O(m log m) in place of m^2. Step sizes of the two methods have different
units (alpha of QTD is in units of return), so each is swept over a grid of its own, and compared at its best.

Differences from the paper: all states are updated once per iteration, each by a transition of its own; the sizes (five
states, 1,000 iterations, 128 quantiles) are ours; every seed draws its own process, so that the comparison is about the
kind of process and not about one of them. Student's t with two degrees of freedom has no variance: the expected squared
error of TD is infinite there (our generator ends at 2,896, the quantile at 1 - 2^-24), its average over seeds is ruled
by the worst of them, and so the median over seeds is shown as well.

Run:      python algorithms/dynamic_programming/quantile_td.py --transition dense --noise t2
Expected: QTD ahead under noise, most under t2, and behind where nothing is random: experiments/quantile_td.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist.configuration import Count, Fraction, Natural, Positive, configuration, require
from jaxrl_dist.distributional import quantile, tabular
from jaxrl_dist.distributional.tabular import MDP
from jaxrl_dist.records.statistics import bootstrap_interval

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of the comparison of TD and QTD. Floats can be swept within one compiled program."""

    transition: Literal["cycle", "sparse", "dense"] = "dense"
    """a deterministic cycle, two random successors per state, or all states with Dirichlet chances"""
    noise: Literal["none", "gaussian", "exponential", "t2"] = "t2"
    """what is added to each reward, of mean zero: nothing, N(0, 1), Exp(1) - 1, or Student's t of 2 degrees"""
    states: Count = 5
    """states of the chain"""
    seeds: Count = 20
    """independent processes and runs, at least 2; both methods see the same ones"""
    first_seed: Natural = 0
    """the first of them"""
    iterations: Count = 1_000
    """updates of every state"""
    quantiles: Count = 128
    """m, quantiles per state"""
    step_sizes: Count = 11
    """step sizes per method, each half of the one before"""

    discount: Fraction = 0.9
    """gamma, below 1: the chains never end"""
    td_largest: Positive = 1.0
    """largest step size of TD"""
    qtd_largest: Positive = 8.0
    """largest step size of QTD, in units of return"""


# -- Processes --------------------------------------------------------------------------------------------------------

TRANSITIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "cycle": lambda rng, states: np.roll(np.eye(states), 1, axis=1),
    "sparse": lambda rng, states: np.stack([_two_successors(rng, states) for _ in range(states)]),
    "dense": lambda rng, states: rng.dirichlet(np.ones(states), states),
}
"""P(x' | x), `[states, states]`."""

NOISES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": jnp.zeros_like,
    "gaussian": jax.scipy.special.ndtri,
    "exponential": lambda u: -jnp.log1p(-u) - 1,
    "t2": lambda u: (2 * u - 1) / jnp.sqrt(2 * u * (1 - u)),
}
"""Quantile functions of mean zero: a uniform number becomes noise. The values of the process are those without it."""


def _two_successors(rng: np.random.Generator, states: int) -> np.ndarray:
    row = np.zeros(states)
    row[rng.choice(states, 2, replace=False)] = rng.dirichlet(np.ones(2))
    return row


def chain(transition: str, states: int, seed: int) -> MDP:
    """A chain, an MDP of one action, whose mean rewards are N(0, 1) per state. ValueError for an unknown transition."""
    require(transition in TRANSITIONS, f"--transition is {transition!r}; it must be one of {', '.join(TRANSITIONS)}")
    require(
        states >= 2 or transition != "sparse", f"--states is {states}; it must be at least 2 for --transition sparse"
    )
    rng = np.random.default_rng(seed)
    return tabular.mdp_from_arrays(TRANSITIONS[transition](rng, states)[:, None], rng.normal(size=(states, 1)))


def with_noise(mdp: MDP, noise: str, atoms: int) -> MDP:
    """The chain whose rewards carry the noise, cut down to its `atoms` midpoint quantiles: finite, for dynamic
    programming. Its values differ from those of `mdp` by what the cut takes from the noise's mean."""
    added = NOISES[noise](quantile.midpoints(atoms))
    return MDP(
        jnp.repeat(mdp.probability, atoms, axis=-1) / atoms,
        jnp.repeat(mdp.next_state, atoms, axis=-1),
        (mdp.reward[..., None] + added).reshape(*mdp.reward.shape[:-1], -1),
        jnp.repeat(mdp.terminated, atoms, axis=-1),
    )


class Transitions(NamedTuple):
    """One sampled transition from every state, each field `[states]`."""

    reward: jax.Array
    next_state: jax.Array
    terminated: jax.Array


def sample(mdp: MDP, noise: str, key: jax.Array) -> Transitions:
    """An independent transition from every state of a chain, with noise added to its reward."""
    outcome_key, noise_key = jax.random.split(key)
    states = jnp.arange(mdp.probability.shape[0])
    step = tabular.sample_step(mdp, states, jnp.zeros_like(states), outcome_key)
    # JAX draws multiples of 2^-23 from 0 on; the middle of each cell keeps the quantile functions finite and fair.
    uniform = jax.random.uniform(noise_key, states.shape) + 2.0**-24
    return Transitions(step.reward + NOISES[noise](uniform), step.next_state, step.terminated)


# -- The two updates --------------------------------------------------------------------------------------------------


def td_update(
    values: jax.Array, transitions: Transitions, discount: float | jax.Array, step_size: float | jax.Array
) -> jax.Array:
    """TD(0) on every state at once: `[states]` -> `[states]`."""
    chex.assert_equal_shape([values, *transitions])
    going_on = discount * ~transitions.terminated
    target = transitions.reward + going_on * values[transitions.next_state]
    return values + step_size * (target - values)


def qtd_update(
    theta: jax.Array, transitions: Transitions, discount: float | jax.Array, step_size: float | jax.Array
) -> jax.Array:
    """QTD on every state at once: quantiles `[states, m]` -> `[states, m]`; no entry moves by more than step_size."""
    chex.assert_rank(theta, 2)
    chex.assert_shape([*transitions], (len(theta),))
    going_on = discount * ~transitions.terminated
    targets = transitions.reward[:, None] + going_on[:, None] * theta[transitions.next_state]
    return theta + step_size * (quantile.midpoints(theta.shape[-1]) - share_below(targets, theta))


def share_below(targets: jax.Array, theta: jax.Array) -> jax.Array:
    """Share of a state's targets `[states, n]` strictly below each of its quantiles `[states, m]`: `[states, m]`."""
    chex.assert_rank([targets, theta], 2)
    chex.assert_equal_shape_prefix([targets, theta], 1)
    count = jax.vmap(partial(jnp.searchsorted, side="left"))(quantile.sort_atoms(targets), theta)
    return count / targets.shape[-1]


def quantile_dynamic_programming(mdp: MDP, discount: float | jax.Array, quantiles: int, iterations: int) -> jax.Array:
    """The expected version: a fixed point of the projected operator on a chain, `[states, quantiles]`.

    The lower quantile where a whole interval would do; QTD may settle anywhere in it.
    """
    only = jnp.ones(mdp.probability.shape[:2])
    projection = tabular.to_quantiles(quantiles)
    return tabular.evaluate(mdp, only, discount, projection, iterations).atoms[:, 0]


# -- Learning and its error -------------------------------------------------------------------------------------------


def learn(
    config: Config, method: Literal["td", "qtd"], mdp: MDP, key: jax.Array, step_size: float | jax.Array
) -> jax.Array:
    """`iterations` updates from zero with a constant step size; what was learned, `[states]` or `[states, m]`."""
    update = {"td": td_update, "qtd": qtd_update}[method]
    shape = (config.states,) if method == "td" else (config.states, config.quantiles)

    def step(estimates, index):
        transitions = sample(mdp, config.noise, jax.random.fold_in(key, index))
        return update(estimates, transitions, config.discount, step_size), None

    return jax.lax.scan(step, jnp.zeros(shape), jnp.arange(config.iterations))[0]


def squared_error(config: Config, method: Literal["td", "qtd"], mdp: MDP, key: jax.Array, step_size) -> jax.Array:
    """Squared error of the values after learning, mean over states: a scalar, in squared units of return."""
    learned = learn(config, method, mdp, key, step_size)
    values = learned if method == "td" else learned.mean(-1)
    exact = tabular.policy_values(mdp, jnp.ones((config.states, 1)), config.discount)[:, 0]
    return jnp.square(values - exact).mean()


@partial(jax.jit, static_argnames="method")
def squared_errors(config: Config, method: Literal["td", "qtd"], mdps: MDP, keys: jax.Array, step_sizes: jax.Array):
    """`squared_error` of every seed (chains and keys `[seeds, ...]`) with every step size: `[seeds, step sizes]`."""
    one_seed = jax.vmap(partial(squared_error, config, method), in_axes=(None, None, 0))
    return jax.vmap(one_seed, in_axes=(0, 0, None))(mdps, keys, step_sizes)


# -- Comparison -------------------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """All runs of one method, and which step size did best."""

    step_sizes: np.ndarray
    """Ascending, `[step sizes]`."""
    errors: np.ndarray
    """Squared errors, `[seeds, step sizes]`."""
    best: int
    """Index of the step size with the smallest mean over seeds."""

    @property
    def at_edge(self) -> bool:
        """Whether the best step size is the smallest or the largest of the grid, which then is too narrow."""
        return self.best in (0, len(self.step_sizes) - 1)

    @property
    def best_errors(self) -> np.ndarray:
        """Squared errors with the best step size, `[seeds]`."""
        return self.errors[:, self.best]


def compare(config: Config) -> dict[str, Sweep]:
    """Both methods on the same processes and transitions, over their grids of step sizes."""
    require(config.discount < 1, f"--discount is {config.discount}; it must be below 1: the chains never end")
    require(config.seeds >= 2, f"--seeds is {config.seeds}; it must be at least 2, for an interval")
    require(config.noise in NOISES, f"--noise is {config.noise!r}; it must be one of {', '.join(NOISES)}")
    numbers = config.first_seed + np.arange(config.seeds)
    chains = [chain(config.transition, config.states, int(number)) for number in numbers]
    mdps = jax.tree.map(lambda *fields: jnp.stack(fields), *chains)
    keys = jax.vmap(jax.random.key)(numbers)
    sweeps = {}
    for method, largest in (("td", config.td_largest), ("qtd", config.qtd_largest)):
        step_sizes = largest * 0.5 ** np.arange(config.step_sizes)[::-1]
        errors = np.asarray(squared_errors(config, method, mdps, keys, jnp.asarray(step_sizes)), np.float64)
        sweeps[method] = Sweep(step_sizes, errors, int(errors.mean(0).argmin()))
    return sweeps


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of two means over the same seeds `[seeds]`, which are drawn in pairs."""

    def ratio(drawn, axis):
        drawn = drawn.astype(int)
        return numerator[drawn].mean(axis) / denominator[drawn].mean(axis)

    return bootstrap_interval(np.arange(len(numerator)), ratio)


# -- Command line -----------------------------------------------------------------------------------------------------


def solve(config: Config, console: Console) -> None:
    """Sweep both methods and print each at its best step size, their ratio, and the bias QTD would converge to."""
    sweeps = compare(config)
    table = Table(title=f"{config.transition} chain, noise {config.noise}, {config.seeds} seeds")
    for column in ("method", "best step size", "squared error", "95 % interval", "median over seeds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, sweep in sweeps.items():
        errors = sweep.best_errors
        low, high = bootstrap_interval(errors, np.mean)
        step_size = f"{sweep.step_sizes[sweep.best]:.4g}{' (edge of the grid)' if sweep.at_edge else ''}"
        cells = (f"{errors.mean():.4g}", f"[{low:.4g}, {high:.4g}]", f"{np.median(errors):.4g}")
        table.add_row(method.upper(), step_size, *cells)
    console.print(table)

    td, qtd = sweeps["td"].best_errors, sweeps["qtd"].best_errors
    low, high = ratio_interval(qtd, td)
    console.print(f"QTD / TD: {qtd.mean() / td.mean():.4g}, 95 % interval {low:.4g} to {high:.4g}", highlight=False)

    first = chain(config.transition, config.states, config.first_seed)
    finite = with_noise(first, config.noise, 1 if config.noise == "none" else 20)
    program = jax.jit(quantile_dynamic_programming, static_argnames=("quantiles", "iterations"))
    reached = program(finite, config.discount, quantiles=config.quantiles, iterations=100).mean(-1)
    exact = tabular.policy_values(finite, jnp.ones((config.states, 1)), config.discount)[:, 0]
    console.print(
        f"bias of the fixed point (first process, noise of 20 atoms): squared error "
        f"{float(jnp.square(reached - exact).mean()):.3g}", highlight=False,
    )  # fmt: skip


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.solve(Config, solve)

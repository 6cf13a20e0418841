"""Stock-augmented distributional dynamic programming: the best policy for CVaR, a target return, and other utilities.

Paper: "Optimizing Return Distributions with Distributional Dynamic Programming", Avila Pires, Rowland, Borsa, Guo,
Khetarpal, Barreto, Abel, Munos, Dabney, JMLR 2025, arXiv 2501.13028.

Acting greedily by a risk measure of the return from each state on does not optimise the risk of the return from the
start: a policy must know what it has gained so far. The state is augmented with that, a stock c, and the policy is
greedy for the expected utility of c + G. Laws of the rest G are kept, for every state, stock and action; utilities are
read from them. The conditional value at risk is one utility and a search over the initial stock.

    stock              c' = (c + r) / gamma                                                         (section 3)
    greedy action      pi(s, c) = argmax_a E f(c + G(s, c, a))
    sweep              G(s, c, a) <- r + gamma G(s', c', pi(s', c'))                                (section 4)
                       pi greedy for G itself (value iteration), or for the G of the round before until that policy
                       is evaluated (policy iteration)
    utilities f        x, min(x, 0), max(x, 0), -abs(x), -x^2, 1{x >= 0}: `envs/stock.py`
    risk               CVaR_tau(G) = max over c of -c + (1 / tau) max over pi of E min(c + G, 0)    (section 5)

Laws are N quantiles at midpoints on an even grid of M stocks. Between two grid points the quantiles are interpolated
linearly in the stock and the action is chosen there anew, so laws of different actions are never mixed; beyond the ends
the law of the end counts, which is right where the best policy no longer changes.

Differences from the paper: its iteration is on exact laws; here they are projected to quantiles after each sweep, and
the stock is on a grid. Equal utilities (within `envs.stock.TIE`) go to the larger mean, then to the first action.

Run:      python algorithms/dynamic_programming/stock_augmented.py --problem gamble --level 0.5
          python algorithms/dynamic_programming/stock_augmented.py --problem shortcut --level 0.2 --lowest-stock -20
              --highest-stock 60 --num-stocks 81
Expected: CVaR 2.0 at initial stock -5, where the greedy risk measure and the mean get 1: experiments/cvar_frontier.
"""

import functools
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist import envs
from jaxrl_dist.configuration import Count, Fraction, Natural, Real, configuration, require
from jaxrl_dist.distributional import law as law_of
from jaxrl_dist.distributional import quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.tabular import MDP, sample_step
from jaxrl_dist.envs import stock as stock_of
from jaxrl_dist.envs.tabular import Tabular
from jaxrl_dist.learning import networks
from jaxrl_dist.records import statistics

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of the iteration and of the report."""

    problem: str = "gamble"
    """gamble, shortcut, or a finite process such as tabular/cliff"""
    utility: str = "shortfall"
    """f: mean, shortfall (CVaR), surplus, target, homeostasis or threshold"""
    method: Literal["value", "policy"] = "value"
    """value or policy iteration"""
    discount: Fraction = 1.0
    """gamma, above 0; with 1 every episode must end"""
    level: Fraction = 0.5
    """tau of the conditional value at risk, above 0"""
    lowest_stock: Real = -12.0
    """first point of the grid of stocks, which must cover minus the returns of interest"""
    highest_stock: Real = 12.0
    """last point of the grid"""
    num_stocks: Count = 97
    """points of the grid"""
    num_quantiles: Count = 64
    """quantiles of a law"""
    sweeps: Count = 30
    """sweeps of value iteration, or of the evaluation of one policy; with gamma 1 at least the longest episode"""
    improvements: Count = 5
    """rounds of policy iteration"""
    samples: Count = 20_000
    """Monte-Carlo episodes from each initial stock that is reported"""
    steps: Count = 200
    """their longest length"""
    rows: Count = 9
    """initial stocks that are reported, the best one apart"""
    seed: Natural = 0
    """seed of the Monte-Carlo episodes"""


# -- The policy: greedy at any stock ----------------------------------------------------------------------------------


def laws_at(laws: jax.Array, stocks: jax.Array, state: jax.Array, stock: jax.Array) -> jax.Array:
    """Quantiles at any stock, linear between the points of the grid and constant beyond its ends.

    laws: `[states, stocks, ...]`; stocks: ascending `[stocks]`; state and stock: `[...]`. Returns `[..., ...]`.
    """
    chex.assert_rank(stocks, 1)
    chex.assert_axis_dimension(laws, 1, len(stocks))
    above = jnp.clip(jnp.searchsorted(stocks, stock, side="right"), 1, len(stocks) - 1)
    below = above - 1
    weight = jnp.clip((stock - stocks[below]) / (stocks[above] - stocks[below]), 0, 1)
    weight = weight.reshape(*weight.shape, *(1,) * (laws.ndim - 2))
    return (1 - weight) * laws[state, below] + weight * laws[state, above]


def greedy_action(utility: str, stock: jax.Array, quantiles: jax.Array) -> jax.Array:
    """argmax_a mean_j f(c + theta_j), of equal ones that of the larger mean: `[...]`, `[..., actions, quantiles]` ->
    `[...]`."""
    return stock_of.preferences(utility, stock, quantiles).argmax(-1)


def act(laws: jax.Array, stocks: jax.Array, utility: str, state: jax.Array, stock: jax.Array) -> jax.Array:
    """The greedy policy for the laws `[states, stocks, actions, quantiles]`, at states and stocks `[...]`."""
    return greedy_action(utility, stock, laws_at(laws, stocks, state, stock))


# -- Distributional value and policy iteration ------------------------------------------------------------------------


def backup(
    mdp: MDP, discount: float | jax.Array, stocks: jax.Array, utility: str, laws: jax.Array, policy_laws: jax.Array
) -> jax.Array:
    """One sweep: r + gamma G(s', c', pi(s', c')) with pi greedy for `policy_laws`, projected to quantiles again.

    laws and policy_laws: `[states, stocks, actions, quantiles]`, as what is returned.
    """
    chex.assert_equal_shape([laws, policy_laws])
    chex.assert_shape(laws, (mdp.probability.shape[0], len(stocks), mdp.probability.shape[1], None))
    num_states, num_stocks, num_actions, num_quantiles = laws.shape
    following = mdp.next_state[..., None]  # [states, actions, outcomes, stocks], as what follows
    stock = stock_of.stock_after(stocks, mdp.reward[..., None], discount)
    action = greedy_action(utility, stock, laws_at(policy_laws, stocks, following, stock))
    quantiles = laws_at(laws, stocks, following, stock)
    rest = networks.at_action(quantiles.reshape(-1, num_actions, num_quantiles), action.ravel())
    rest = rest.reshape(*action.shape, num_quantiles)
    atoms = mdp.reward[..., None, None] + (discount * ~mdp.terminated)[..., None, None] * rest
    atoms = jnp.moveaxis(atoms, 3, 1)  # [states, stocks, actions, outcomes, quantiles]
    masses = jnp.broadcast_to(mdp.probability[:, None, :, :, None] / num_quantiles, atoms.shape)
    flat = (num_states, num_stocks, num_actions, -1)
    mixture = Law(atoms.reshape(flat), masses.reshape(flat))
    return law_of.quantile(mixture, quantile.midpoints(num_quantiles))


def _zeros(mdp: MDP, stocks: jax.Array, num_quantiles: int) -> jax.Array:
    num_states, num_actions, _ = mdp.probability.shape
    return jnp.zeros((num_states, len(stocks), num_actions, num_quantiles))


@functools.partial(jax.jit, static_argnames=("utility", "num_quantiles", "sweeps"))
def value_iteration(
    mdp: MDP, discount: float | jax.Array, stocks: jax.Array, utility: str, *, num_quantiles: int, sweeps: int
) -> jax.Array:
    """Laws of the rest under the best policy, `[states, stocks, actions, quantiles]`.

    From laws of 0, so that k sweeps are right for episodes that end after k steps. stocks: ascending `[stocks]`.
    """
    return jax.lax.fori_loop(
        0, sweeps, lambda _, laws: backup(mdp, discount, stocks, utility, laws, laws),
        _zeros(mdp, stocks, num_quantiles),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("utility", "num_quantiles", "sweeps", "improvements"))
def policy_iteration(
    mdp: MDP, discount: float | jax.Array, stocks: jax.Array, utility: str,
    *, num_quantiles: int, sweeps: int, improvements: int,
) -> jax.Array:  # fmt: skip
    """The same by policy iteration: `improvements` times, evaluate the greedy policy of the last laws in `sweeps`."""
    nothing = _zeros(mdp, stocks, num_quantiles)

    def improve(_, policy_laws: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(
            0, sweeps, lambda _, laws: backup(mdp, discount, stocks, utility, laws, policy_laws), nothing
        )

    return jax.lax.fori_loop(0, improvements, improve, nothing)


# -- What the policy is worth -----------------------------------------------------------------------------------------


def start_values(laws: jax.Array, stocks: jax.Array, utility: str, start: jax.Array) -> jax.Array:
    """max_pi E f(c + G) for every initial stock c of the grid, `[stocks]`; start: probabilities `[states]`."""
    chex.assert_shape(laws, (len(start), len(stocks), None, None))
    return start @ stock_of.action_utilities(utility, stocks, laws).max(-1)


def cvar_objective(stocks: jax.Array, values: jax.Array, level: float | jax.Array) -> jax.Array:
    """-c + (1 / tau) E min(c + G, 0), whose largest value over c is CVaR_tau(G), `[stocks]` -> `[stocks]`.

    values: E min(c + G, 0) of the best policy for each c, utility `shortfall` (Rockafellar & Uryasev 2000).
    """
    chex.assert_equal_shape([stocks, values])
    return -stocks + values / level


@functools.partial(jax.jit, static_argnames=("utility", "samples", "steps"))
def simulate(
    mdp: MDP, discount: float | jax.Array, stocks: jax.Array, utility: str, laws: jax.Array, start: jax.Array,
    initial_stock: float | jax.Array, key: jax.Array, *, samples: int, steps: int,
) -> jax.Array:  # fmt: skip
    """Monte-Carlo returns of the greedy policy from an initial stock, `[samples]`: the process carries the stock."""
    start_key, loop_key = jax.random.split(key)
    state = jax.random.categorical(start_key, jnp.log(start), shape=(samples,))

    def step(carry, index):
        state, stock, weight, total = carry
        action = act(laws, stocks, utility, state, stock)
        taken = sample_step(mdp, state, action, jax.random.fold_in(loop_key, index))
        total += weight * taken.reward
        weight *= discount * ~taken.terminated
        stock = stock_of.stock_after(stock, taken.reward, discount)
        return (taken.next_state, stock, weight, total), None

    stock = jnp.broadcast_to(jnp.asarray(initial_stock, jnp.float32), (samples,))
    carry = state, stock, jnp.ones(samples), jnp.zeros(samples)
    return jax.lax.scan(step, carry, jnp.arange(steps))[0][-1]


# -- Command line -----------------------------------------------------------------------------------------------------


def process_of(problem: str) -> Tabular:
    """The finite process of a name; ValueError for an environment that is none."""
    if problem in stock_of.GENERATORS:
        return stock_of.GENERATORS[problem]()
    env, _ = envs.make(problem)
    require(
        isinstance(env, Tabular),
        f"--problem is {problem!r}; it must be {', '.join(stock_of.GENERATORS)}, or a finite process such as "
        "tabular/cliff",
    )
    return env


def solve(config: Config, console: Console) -> None:
    """Iterate, then print what each initial stock promises and what its policy achieves."""
    stock_of.check_utility(config.utility)
    for name in ("discount", "level"):
        require(getattr(config, name) > 0, f"--{name} is {getattr(config, name)}; it must be in (0, 1]")
    require(config.num_stocks >= 2, f"--num-stocks is {config.num_stocks}; it must be at least 2")
    require(
        config.lowest_stock < config.highest_stock,
        f"--lowest-stock is {config.lowest_stock}; it must be below --highest-stock = {config.highest_stock}",
    )
    env = process_of(config.problem)
    mdp, start = env.default_params.mdp, env.default_params.start
    stocks = jnp.linspace(config.lowest_stock, config.highest_stock, config.num_stocks)
    sizes = {"num_quantiles": config.num_quantiles, "sweeps": config.sweeps}
    if config.method == "value":
        laws = value_iteration(mdp, config.discount, stocks, config.utility, **sizes)
    else:
        laws = policy_iteration(mdp, config.discount, stocks, config.utility, **sizes, improvements=config.improvements)
    values = start_values(laws, stocks, config.utility, start)
    reported = list(np.unique(np.linspace(0, config.num_stocks - 1, config.rows).round().astype(int)))
    objective, best = None, None
    if config.utility == "shortfall":
        objective = cvar_objective(stocks, values, config.level)
        best = int(objective.argmax())
        reported = sorted({*reported, best})

    cvar = f"CVaR {config.level:g}"
    columns = ["initial stock", "E f(c + G)", *([f"{cvar} promised"] if best is not None else [])]
    table = Table(*columns, "E f achieved", "mean return", cvar, title=f"{config.problem}, {config.utility}")
    utility = stock_of.UTILITIES[config.utility]
    for index in reported:
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        returns = simulate(
            mdp, config.discount, stocks, config.utility, laws, start, stocks[index], key,
            samples=config.samples, steps=config.steps,
        )  # fmt: skip
        achieved = utility(stocks[index] + returns).mean(), returns.mean()
        risk = statistics.conditional_value_at_risk(np.asarray(returns), config.level)
        promised = [objective[index]] if best is not None else []
        numbers = stocks[index], values[index], *promised, *achieved, risk
        table.add_row(*(f"{float(number):.3f}" for number in numbers), style="bold" if index == best else None)
    console.print(table)
    if best is not None:
        console.print(
            f"best initial stock {float(stocks[best]):.3f}: {cvar} promised {float(objective[best]):.3f}; the highest "
            f"promise is the value, which the policy from that stock gets"
        )


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.solve(Config, solve)

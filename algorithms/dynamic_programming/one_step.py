"""One-step laws: the randomness of one transition, with the mean of everything after it.

Paper: "One-Step Distributional Reinforcement Learning", Achab, Alami, Djilali, Fedyanin, Moulines, TMLR 2023,
arXiv 2304.14421.

The law of the return adds up the randomness of all future steps. Under control it need not converge: where two actions
have the same mean but different laws, it jumps with the tie-break. If the successor is worth a number, its value, and
only the next transition is random, the operators of evaluation and of control both contract in Wasserstein-1 with rate
gamma, ties or not, and have one fixed point. Its mean is the optimal value; its variance is that of one step.

    mu(s, a)      law on the support z_1 < ... < z_K (masses), Pi its projection (Cramer: keeps the mean inside)
    V(s)          sum over a of pi(a|s) E mu(s, a)   (evaluation)      max over a of E mu(s, a)   (control)
    one step      (T mu)(s, a) = Pi law of  r + gamma V(s')                 s', r random, V(s') a number
    full return   (T mu)(s, a) = Pi law of  r + gamma Z(s')                 Z(s') ~ sum over a of pi(a|s') mu(s', a)
    sampled       mu(s, a) <- (1 - alpha) mu(s, a) + alpha Pi delta_t,      t = r + gamma V(s'), alpha = visits^-power
    variances     full(s, a) = one-step(s, a) + gamma^2 E[full(s')]         (law of total variance, fixed policy)

Differences from the paper: a policy's V(s') is the mean over its actions in the sampled version too (a sampled action
would add the policy's randomness to the law; which of the two the paper samples we could not confirm). The operators of
full returns, with the tie-break as an argument, are for comparison. Deep agents: value_based/os_c51.py and c51.py.

Run:      python algorithms/dynamic_programming/one_step.py
          (a grid: --problem tabular/cliff --discount 0.9 --v-min -40 --v-max 0 --num-atoms 41 --sampling stream)
Expected: at x1 of the tie example the full law is all mass at 0 or half at -0.5 and half at 0.5, by the tie-break; the
one-step law is all mass at 0 in both cases. More: experiments/one_step.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from jaxrl_dist import envs
from jaxrl_dist.configuration import Count, Fraction, Natural, Positive, Real, configuration, require
from jaxrl_dist.distributional import categorical, metrics, tabular
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.tabular import MDP, Step

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of the comparison at the command line."""

    problem: str = "tie"
    """tie (the example of two equally good actions), or the id of a finite problem such as tabular/coin"""
    discount: Fraction = 0.5
    """gamma, the weight of the next step's return"""
    num_atoms: Count = 5
    """atoms of the support"""
    v_min: Real = -1.0
    """lowest atom, in units of the discounted return"""
    v_max: Real = 1.0
    """highest atom"""
    iterations: Count = 200
    """applications of each operator"""
    samples: Count = 20_000
    """updates of categorical Q-learning; synchronous ones draw one transition for every state and action"""
    sampling: str = "synchronous"
    """where those transitions come from: synchronous, or stream (one trajectory of uniformly random actions)"""
    power: Positive = 1.0
    """step sizes are 1 / visits^power; above 0.5 and at most 1 for convergence"""
    seed: Natural = 0
    """of the samples"""
    rows: Count = 20
    """states and actions to print at most"""


TIES = ("first", "last")  # which action of equal ones is taken
# From x1 (state 0) both actions lead to x2 for nothing; there action 0 ends for 0, action 1 for -1 or 1.
TIE = tabular.mdp_from_outcomes([
    [[(1.0, 1, 0.0, False)], [(1.0, 1, 0.0, False)]],
    [[(1.0, 1, 0.0, True)], [(0.5, 1, -1.0, True), (0.5, 1, 1.0, True)]],
])  # fmt: skip

# -- Operators --------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A finite process, its discount, and the support `[atoms]` of the laws, ascending and evenly spaced.

    Tables of laws are masses on that support, `[states, actions, atoms]`; policies are probabilities `[states,
    actions]`, and where none is given the operators are those of control.
    """

    mdp: MDP
    discount: float | jax.Array
    support: jax.Array


def state_values(masses: jax.Array, problem: Problem, policy: jax.Array | None = None) -> jax.Array:
    """V of the states, `[states]`: the mean under the policy, or that of the best action."""
    chex.assert_shape(masses, (*problem.mdp.probability.shape[:2], len(problem.support)))
    means = masses @ problem.support
    return means.max(-1) if policy is None else (policy * means).sum(-1)


def one_step_operator(masses: jax.Array, problem: Problem, policy: jax.Array | None = None) -> jax.Array:
    """The projected operator of one-step laws, from a table to a table (Achab et al. 2023).

    A contraction in the largest Wasserstein-1 distance, of rate `discount`: projecting spreads no laws apart in this
    metric, not even where it clips. In the Cramer metric it is none.
    """
    law = tabular.one_step(problem.mdp, problem.discount, state_values(masses, problem, policy))
    return categorical.project(*law, problem.support)


def full_operator(
    masses: jax.Array, problem: Problem, policy: jax.Array | None = None, tie_break: jax.Array | None = None
) -> jax.Array:
    """The projected operator of full returns (that of C51), from a table to a table.

    Control is greedy for the means, and among ties for the largest `tie_break` `[states, actions]` (`tabular.greedy`).
    Evaluation contracts in the Cramer metric with rate sqrt(discount); control need not contract.
    """
    chex.assert_shape(masses, (*problem.mdp.probability.shape[:2], len(problem.support)))
    policy = tabular.greedy(masses @ problem.support, tie_break) if policy is None else policy
    state_masses = (policy[..., None] * masses).sum(1)
    state_laws = Law(jnp.broadcast_to(problem.support, state_masses.shape), state_masses)
    return categorical.project(*tabular.bellman(problem.mdp, problem.discount, state_laws), problem.support)


def distance(a: jax.Array, b: jax.Array, support: jax.Array) -> jax.Array:
    """Largest Wasserstein-1 distance between the laws of two tables, in units of return."""
    return metrics.wasserstein_1(Law(support, a), Law(support, b)).max()


# -- Dynamic programming ----------------------------------------------------------------------------------------------


def initial_masses(problem: Problem) -> jax.Array:
    """The table of laws with all mass at return 0 (projected)."""
    at_zero = categorical.project(jnp.zeros(1), jnp.ones(1), problem.support)
    return jnp.broadcast_to(at_zero, (*problem.mdp.probability.shape[:2], len(problem.support)))


def iterate(operator: Callable, masses: jax.Array, support: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Apply `operator(masses, iteration)` again and again: the last table, and how far each application moved it.

    The moves `[iterations]` are `distance`s; those of a contraction shrink by its rate.
    """

    def once(masses, iteration):
        following = operator(masses, iteration)
        return following, distance(masses, following, support)

    return jax.lax.scan(once, masses, jnp.arange(iterations))


# -- Stochastic approximation -----------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Learned masses `[states, actions, atoms]`, and how often each law was updated, `[states, actions]`."""

    masses: jax.Array
    visits: jax.Array


def initial_estimate(problem: Problem) -> Estimate:
    """No visits yet; the first one replaces a law altogether."""
    masses = initial_masses(problem)
    return Estimate(masses, jnp.zeros(masses.shape[:2], jnp.int32))


def sampled_target(
    masses: jax.Array, step: Step, problem: Problem, policy: jax.Array | None = None, full: bool = False
) -> jax.Array:
    """What transitions `[...]` set as targets, `[..., atoms]`: one point, split in two; or the law of the full return.

    Full: reward + discount * Z(next state), with Z of the policy, or of the greedy action (the first one of ties).
    """
    chex.assert_equal_shape([step.reward, step.next_state, step.terminated])
    going_on = problem.discount * ~step.terminated
    if full:
        policy = tabular.greedy(masses @ problem.support, tolerance=0.0) if policy is None else policy
        next_masses = (policy[..., None] * masses).sum(1)[step.next_state]
        return categorical.project_return(step.reward, going_on, next_masses, problem.support)
    point = (step.reward + going_on * state_values(masses, problem, policy)[step.next_state])[..., None]
    return categorical.project(point, jnp.ones_like(point), problem.support)


def learn_synchronously(
    estimate: Estimate, problem: Problem, key: jax.Array, updates: int,
    *, power: float | jax.Array = 1.0, policy: jax.Array | None = None, full: bool = False,
) -> Estimate:  # fmt: skip
    """Categorical TD (Q-learning without a policy) that draws a transition of every state and action per update."""
    where = jnp.indices(estimate.visits.shape, sparse=True)

    def update(estimate, index):
        step = tabular.sample_step(problem.mdp, *where, jax.random.fold_in(key, index))
        target = sampled_target(estimate.masses, step, problem, policy, full)
        visits = estimate.visits + 1
        step_size = visits[..., None] ** -jnp.float32(power)
        return Estimate((1 - step_size) * estimate.masses + step_size * target, visits), None

    return jax.lax.scan(update, estimate, jnp.arange(updates))[0]


def learn_from_stream(
    estimate: Estimate, problem: Problem, stream: Step,
    *, power: float | jax.Array = 1.0, policy: jax.Array | None = None, full: bool = False,
) -> Estimate:  # fmt: skip
    """The same along transitions `[steps]`, of which each updates the law of its own state and action."""

    def update(estimate, step):
        where = step.state, step.action
        target = sampled_target(estimate.masses, step, problem, policy, full)
        visits = estimate.visits.at[where].add(1)
        step_size = visits[where] ** -jnp.float32(power)
        return Estimate(estimate.masses.at[where].add(step_size * (target - estimate.masses[where])), visits), None

    return jax.lax.scan(update, estimate, stream)[0]


def draw_stream(mdp: MDP, policy: jax.Array, key: jax.Array, steps: int) -> Step:
    """One trajectory of a policy, `[steps]`; it starts, and goes on after an end, in a state drawn evenly."""
    start_key, key = jax.random.split(key)

    def once(state, index):
        action_key, outcome_key, restart_key = jax.random.split(jax.random.fold_in(key, index), 3)
        action = jax.random.categorical(action_key, jnp.log(policy[state]))
        step = tabular.sample_step(mdp, state, action, outcome_key)
        return jnp.where(step.terminated, jax.random.randint(restart_key, (), 0, len(policy)), step.next_state), step

    return jax.lax.scan(once, jax.random.randint(start_key, (), 0, len(policy)), jnp.arange(steps))[1]


# -- Command line -----------------------------------------------------------------------------------------------------


def solve(config: Config, console: Console) -> None:
    """Print one-step and full laws for both tie-breaks, their variances, and what categorical Q-learning finds."""
    known = ("tie", *envs.available()["tabular"])
    require(config.problem in known, f"--problem is {config.problem!r}; it must be one of {', '.join(known)}")
    require(
        config.sampling in ("synchronous", "stream"),
        f"--sampling is {config.sampling!r}; it must be synchronous or stream",
    )
    require(
        0.5 < config.power <= 1,
        f"--power is {config.power}; it must be above 0.5 and at most 1, or noise is not averaged away",
    )
    mdp = TIE if config.problem == "tie" else envs.make(config.problem)[1].mdp
    problem = Problem(mdp, config.discount, categorical.support(config.v_min, config.v_max, config.num_atoms))
    found = jax.device_get(jax.jit(lambda: compared(problem, config))())

    pairs = list(np.ndindex(mdp.probability.shape[:2]))
    columns = ("s, a", "ties to", "value", "one-step law", "full law", "variance: one step", "+ later", "= full")
    table = Grid(*columns, title=f"{config.problem}, discount {config.discount:g}")
    for pair in pairs[: config.rows]:
        for tie in TIES:
            texts = [_law(found[f"{tie} {name}"][pair], problem.support) for name in ("one-step", "full")]
            numbers = [f"{found[f'{tie} {name}'][pair]:.4g}" for name in ("this step", "later", "variance")]
            table.add_row(f"{pair[0]}, {pair[1]}", tie, f"{found['value'][pair]:.4g}", *texts, *numbers)
    console.print(table)
    if len(pairs) > config.rows:
        console.print(f"{config.rows} of {len(pairs)} states and actions; --rows shows more")
    if found["clipped_mass"] > 0:
        console.print(f"[yellow]{found['clipped_mass']:.0%} of a one-step law lie outside the support; widen it")
    console.print("largest Wasserstein-1 distances over all states and actions:")
    for kind in ("one-step", "full"):
        apart, moved, *errors = (f"{float(number):.3g}" for number in found[kind])
        console.print(
            f"  {kind} laws: {apart} from tie-break to tie-break, {moved} moved by the last iteration; after "
            f"{config.samples:,} {config.sampling} updates of Q-learning {' and '.join(errors)} from the two",
        )


def compared(problem: Problem, config: Config) -> dict:
    """What `solve` prints: by tie-break, tables of exact laws and variances; by kind of law, distances.

    Variances are of the laws before projection, which would add to them: `to_moments` keeps them exactly.
    """
    mdp, discount, support = problem
    values = tabular.optimal_values(mdp, discount, config.iterations)
    ranks = jnp.broadcast_to(jnp.arange(values.shape[1], dtype=jnp.float32), values.shape)
    exact = tabular.one_step(mdp, discount, values.max(-1))
    slack = 1e-4 * (support[1] - support[0])  # rounding clips nothing
    outside = (exact.atoms < support[0] - slack) | (exact.atoms > support[-1] + slack)
    found = {"value": values, "clipped_mass": jnp.where(outside, exact.masses, 0).sum(-1).max()}
    moved = {}
    for tie, tie_break in zip(TIES, (-ranks, ranks), strict=True):
        # Control of one-step laws needs no tie-break; evaluating both greedy policies shows that none would matter.
        policy = tabular.greedy(values, tie_break)
        operators = {
            "one-step": lambda masses, _: one_step_operator(masses, problem, policy),
            "full": lambda masses, _: full_operator(masses, problem, tie_break=tie_break),
        }
        for kind, operator in operators.items():
            found[f"{tie} {kind}"], moves = iterate(operator, initial_masses(problem), support, config.iterations)
            moved[kind] = moves[-1]
        moments = tabular.evaluate(mdp, policy, discount, tabular.to_moments, config.iterations)
        found[f"{tie} variance"] = laws.variance(moments)
        found[f"{tie} this step"] = laws.variance(exact)
        no_rewards = mdp._replace(reward=jnp.zeros_like(mdp.reward))
        found[f"{tie} later"] = tabular.expected(no_rewards, discount**2, (policy * found[f"{tie} variance"]).sum(-1))

    estimate, key = initial_estimate(problem), jax.random.key(config.seed)
    if config.sampling == "stream":
        stream = draw_stream(mdp, jnp.full(values.shape, 1 / values.shape[1]), key, config.samples)
    for kind in ("one-step", "full"):  # both from the same samples
        settings = {"power": config.power, "full": kind == "full"}
        if config.sampling == "stream":
            learned = learn_from_stream(estimate, problem, stream, **settings)
        else:
            learned = learn_synchronously(estimate, problem, jax.random.clone(key), config.samples, **settings)
        errors = [distance(learned.masses, found[f"{tie} {kind}"], support) for tie in TIES]
        found[kind] = [distance(found[f"first {kind}"], found[f"last {kind}"], support), moved[kind], *errors]
    return found


def _law(masses: np.ndarray, support: jax.Array) -> str:
    """The four heaviest atoms of a law in words, `mass at atom`."""
    heaviest = sorted(np.argsort(-masses, kind="stable")[:4])
    words = [f"{masses[i]:.3g} at {support[i]:.3g}" for i in heaviest if masses[i] > 5e-4]
    return ", ".join(words) + (", ..." if (masses > 5e-4).sum() > len(words) else "")


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.solve(Config, solve)

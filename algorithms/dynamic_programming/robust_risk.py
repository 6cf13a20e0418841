"""Robustness and risk by distributional dynamic programming: two averages of the return, and ties broken by them.

Paper: "Robustness and risk management via distributional dynamic programming", Achab, Neu, arXiv 2112.15430.

The law of the return is kept as two atoms of masses alpha and 1 - alpha: the averages of its worst alpha and of its
best 1 - alpha (average values at risk). Among laws with these masses they are the nearest in Wasserstein-2, and they
keep the mean. Hence risk-neutral control stays what it was, and the atoms can choose among actions that tie in the
mean: the safe policy by the lower one, the risky policy by the upper one.

    mixture       atoms r + gamma v_i(s', a'), masses p = P(s' | s, a) pi(a' | s') w_i,  w = (alpha, 1 - alpha)
    operator      v_1 = 1/alpha integral of F^-1 over (0, alpha),  v_2 = 1/(1-alpha) integral over (alpha, 1)
    dual          v_1 = min over q of sum_j q_j x_j,  0 <= q_j <= p_j / alpha, sum q = 1;   v_2 = max, p_j / (1-alpha)
    robust MDP    each (s, a) is split into a lower and an upper sub-state; from the lower one, nature moves by the
                  worst-case q to successors *and their sub-states*, from the upper one by the best-case q
    control       A*(s) = {a : Q*(s, a) >= max_b Q*(s, b) - tolerance};  a' = argmax over A*(s') of v_1 (safe) or v_2

The average is of the mixture of both atoms of all successors, not the average of the successors' averages (that is
nested risk, another criterion). Two atoms cannot hold the law, so v is not the average value at risk of the return
after more than one step, except by luck (alpha = 1/2 on the coin); `solve` prints the exact one beside it.

Differences from the paper: control starts from Q*, so that every iterate has the optimal mean; any number of slices
works (`fractions`), the paper's operator is (0, alpha, 1); float32 where the paper's ties are exact, so `tolerance` is
needed: it must exceed the rounding of Q* (about 1e-6 of its size) and stay below the differences that matter.

Run:      python algorithms/dynamic_programming/robust_risk.py --problem choices --alpha 0.25
Expected: one mean for the three policies, the safe one with the largest CVaR: experiments/safest_optimal.
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist import envs
from jaxrl_dist.configuration import Count, Fraction, Positive, configuration, require
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import tabular
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import conditional_value_at_risk
from jaxrl_dist.distributional.tabular import MDP

# -- Configuration ----------------------------------------------------------------------------------------------------


@configuration
class Config:
    """Settings of safe and risky control. Floats can be swept within one compiled program."""

    problem: Literal["choices", "tabular/cliff", "tabular/windy_grid", "tabular/maze"] = "choices"
    """`choices` (rounds of 0 or 2, of 1, and of 0.9, whose means tie but for the last) or an environment"""
    rounds: Count = 3
    """rounds of `choices`"""
    iterations: Count = 500
    """applications of each operator; errors shrink by the discount each time"""
    steps: Count = 100
    """steps of the exact return law that is printed"""

    alpha: Fraction = 0.25
    """mass of the lower atom, strictly between 0 and 1"""
    discount: Fraction = 0.95
    """gamma, the weight of the next step's return; 1 needs policies that end"""
    tolerance: Positive = 1e-4
    """actions whose value is within it of the best count as optimal, in units of return"""


# -- The operator -----------------------------------------------------------------------------------------------------


def two_slices(alpha: float | jax.Array) -> jax.Array:
    """The fractions (0, alpha, 1) between which the quantile function is averaged: `[3]`."""
    return jnp.array([0.0, alpha, 1.0])


def evaluate(mdp: MDP, policy: jax.Array, discount: float | jax.Array, fractions: jax.Array, iterations: int) -> Law:
    """Averages of the returns of a policy `[states, actions]` between `fractions` `[n + 1]`: `[states, actions, n]`,
    the fixed point of the projected operator. Their mean is the policy's value."""
    chex.assert_shape(policy, mdp.probability.shape[:2])
    return tabular.evaluate(mdp, policy, discount, tabular.to_averages(fractions), iterations)


# -- The robust reading -----------------------------------------------------------------------------------------------


def slice_weights(law: Law, fractions: jax.Array) -> jax.Array:
    """The q that average each slice of a law: `[..., atoms]` and `[n + 1]` -> `[..., n, atoms]`, rows that sum to 1.

    Row i spreads its mass over the atoms between quantiles f_i and f_{i+1}, an atom on the border in part. For two
    slices the first row attains the minimum of the dual and the second the maximum; of tied atoms, the first listed
    count as the lower ones.
    """
    chex.assert_rank(fractions, 1)
    atoms, masses = jnp.broadcast_arrays(*law)
    order = jnp.argsort(atoms, axis=-1)
    shared = tabular.slice_masses(jnp.take_along_axis(masses, order, axis=-1), fractions)
    back = jnp.argsort(order, axis=-1)
    shared = jnp.take_along_axis(shared, back[..., None, :], axis=-1)
    return shared / shared.sum(-1, keepdims=True)


def substate_kernels(
    mdp: MDP, policy: jax.Array, discount: float | jax.Array, action_laws: Law, fractions: jax.Array
) -> jax.Array:
    """Nature's moves: the chance, from sub-state i of (s, a), of outcome k, then action a' and sub-state j:
    `[states, actions, n, outcomes, actions, n]`, which average the mixture of `action_laws` `[states, actions, n]`."""
    chex.assert_shape(policy, mdp.probability.shape[:2])
    chex.assert_shape(action_laws.atoms, (*policy.shape, len(fractions) - 1))
    mixture = tabular.bellman(mdp, discount, tabular.under_policy(policy, action_laws))
    states, actions, outcomes = mdp.probability.shape
    slices = fractions.shape[0] - 1
    return slice_weights(mixture, fractions).reshape(states, actions, slices, outcomes, actions, slices)


def evaluate_kernels(mdp: MDP, discount: float | jax.Array, kernels: jax.Array) -> jax.Array:
    """Ordinary values, by solving the linear system, of the process split into sub-states that moves by `kernels`:
    `[states, actions, n, outcomes, actions, n]` -> `[states, actions, n]`."""
    split = kernels.shape[:3]
    chex.assert_shape(kernels, (*split, mdp.probability.shape[-1], *split[1:]))
    s, a, i = jnp.meshgrid(*(jnp.arange(size) for size in split), indexing="ij")
    weight = kernels * ~mdp.terminated[:, :, None, :, None, None]
    chain = jnp.zeros((*split, *split))
    chain = chain.at[s[..., None], a[..., None], i[..., None], mdp.next_state[:, :, None]].add(weight)
    rewards = (kernels.sum((-2, -1)) * mdp.reward[:, :, None]).sum(-1)
    size = rewards.size
    matrix = jnp.eye(size) - discount * chain.reshape(size, size)
    return jnp.linalg.solve(matrix, rewards.reshape(size)).reshape(split)


# -- Control ----------------------------------------------------------------------------------------------------------


def optimal_actions(action_values: jax.Array, tolerance: float | jax.Array) -> jax.Array:
    """A*: which actions are within `tolerance` of the best of their state, `[states, actions]` bool."""
    chex.assert_rank(action_values, 2)
    return action_values >= action_values.max(-1, keepdims=True) - tolerance


class Control(NamedTuple):
    """What an operator of control has found."""

    policy: jax.Array
    """Probabilities 0 and 1, `[states, actions]`."""
    laws: Law
    """Averages of the return of every action when the policy is followed afterwards, `[states, actions, n]`."""


def control(
    mdp: MDP,
    discount: float | jax.Array,
    action_values: jax.Array,
    attitude: Literal["safe", "risky"],
    fractions: jax.Array,
    tolerance: float | jax.Array,
    iterations: int,
) -> Control:
    """Iterate the safe operator (largest lowest average) or the risky one (largest highest average) over optimal
    actions.

    action_values: Q*, `[states, actions]`. Actions whose averages are within `tolerance` as well are taken in order.
    Only actions of A* are ever taken, so every iterate keeps the mean Q*, up to `tolerance` / (1 - discount).
    """
    chex.assert_shape(action_values, mdp.probability.shape[:2])
    project = tabular.to_averages(fractions)
    optimal = optimal_actions(action_values, tolerance)
    deciding = {"safe": 0, "risky": -1}[attitude]

    def choose(action_laws: Law) -> jax.Array:
        return tabular.greedy(jnp.where(optimal, action_laws.atoms[..., deciding], -jnp.inf), tolerance=tolerance)

    def once(_, action_laws: Law) -> Law:
        return project(tabular.bellman(mdp, discount, tabular.under_policy(choose(action_laws), action_laws)), None)

    certain = project(Law(action_values[..., None], jnp.ones((*action_values.shape, 1))), None)
    found = jax.lax.fori_loop(0, iterations, once, certain)
    return Control(choose(found), found)


def choose_all(
    mdp: MDP,
    discount: float | jax.Array,
    fractions: jax.Array,
    tolerance: float | jax.Array,
    iterations: int,
) -> tuple[jax.Array, dict[str, Control]]:
    """Q* `[states, actions]`, and the greedy (first optimal action), safe and risky policies with their averages."""
    action_values = tabular.optimal_values(mdp, discount, iterations)
    greedy = tabular.greedy(action_values, tolerance=tolerance)
    found = {"greedy": Control(greedy, evaluate(mdp, greedy, discount, fractions, iterations))}
    for attitude in ("safe", "risky"):
        found[attitude] = control(mdp, discount, action_values, attitude, fractions, tolerance, iterations)
    return action_values, found


# -- Problems ---------------------------------------------------------------------------------------------------------


def choices(rounds: int) -> MDP:
    """Rounds of one choice each: 0 or 2 with equal chances, 1 for certain, or 0.9 for certain, then the end.

    The first two have the same mean in every round; the third is as safe as the second and never optimal.
    """
    ends = [number + 1 == rounds for number in range(rounds)]
    following = [min(number + 1, rounds - 1) for number in range(rounds)]
    return tabular.mdp_from_outcomes([
        [[(0.5, to, 0.0, end), (0.5, to, 2.0, end)], [(1.0, to, 1.0, end)], [(1.0, to, 0.9, end)]]
        for to, end in zip(following, ends, strict=True)
    ])  # fmt: skip


def problem(name: str, rounds: int) -> tuple[MDP, int]:
    """The process of that name and the state in which it starts."""
    if name == "choices":
        return choices(rounds), 0
    _, parameters = envs.make(name)
    return parameters.mdp, int(np.argmax(parameters.start))


# -- Command line -----------------------------------------------------------------------------------------------------


def solve(config: Config, console: Console) -> None:
    """Print Q*, the averages of each state's optimal actions, and the exact return laws of the three policies."""
    alpha = config.alpha
    require(0 < alpha < 1, f"--alpha is {alpha}; it must be strictly between 0 and 1")
    mdp, start = problem(config.problem, config.rounds)
    program = jax.jit(choose_all, static_argnames="iterations")
    values, found = program(mdp, config.discount, two_slices(alpha), config.tolerance, iterations=config.iterations)
    found = {name: found[name] for name in ("greedy", "safe", "risky")}  # jit sorts by name
    chosen = {name: np.asarray(each.policy).argmax(-1) for name, each in found.items()}
    optimal, lowest_highest = np.asarray(optimal_actions(values, config.tolerance)), found["safe"].laws.atoms

    table = Table(title=f"{config.problem}: mean-optimal actions, averages under the safe policy, alpha = {alpha:g}")
    for column in ("state", "action", "Q*", f"worst {alpha:g}", f"best {1 - alpha:g}", "taken by"):
        table.add_column(column, justify="left" if column == "taken by" else "right")
    for state, action in np.argwhere(optimal):
        takers = ", ".join(name for name, actions in chosen.items() if actions[state] == action)
        lower, upper = lowest_highest[state, action]
        table.add_row(str(state), str(action), f"{values[state, action]:.4f}", f"{lower:.4f}", f"{upper:.4f}", takers)
    console.print(table)

    table = Table(title=f"exact law of the return from state {start}, {config.steps} steps")
    for column in ("policy", "mean", f"CVaR {alpha:g}", "worst case", "best case"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, each in found.items():
        exact = tabular.exact_return_law(
            mdp, np.asarray(each.policy), config.discount, start, int(chosen[name][start]), config.steps
        )
        cvar = float(conditional_value_at_risk(Law(*map(jnp.asarray, exact)), alpha))
        numbers = (float(laws.mean(exact)), cvar, exact.atoms.min(), exact.atoms.max())
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    console.print(table)
    tied = int((optimal.sum(-1) > 1).sum())
    console.print(f"states with more than one optimal action: {tied} of {len(optimal)}", highlight=False)


if __name__ == "__main__":
    from jaxrl_dist import cli

    cli.solve(Config, solve)

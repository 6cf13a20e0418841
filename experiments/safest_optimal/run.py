"""Among the policies that are optimal in mean, does the safe operator take the safest?

"Robustness and risk management via distributional dynamic programming" (arXiv 2112.15430) keeps two averages of the
return, that of its worst alpha and that of its best 1 - alpha, and breaks ties of the mean by the lower one (safe) or
the upper one (risky). Here is a walk over two mountain passes in a row. Each can be crossed on three paths, which are
walled off from each other; a step costs 1:

    scree   4 steps, and with probability 1/2 a slide that costs 8 more:      mean cost 8, worst 12
    ledge   6 steps, and with probability 1/16 a fall that costs 32 more:     mean cost 8, worst 38
    road    6 steps and a toll of 2.5, nothing is random:                     mean cost 8.5

Scree and ledge tie exactly: discount 1, and all numbers are sums of powers of two, so float32 does not round. Neither
is safer at every alpha. The road is the safest and not optimal in mean: **no operator here may ever take it**, because
ties are broken among mean-optimal actions only.

The exact return laws of all nine combinations of paths (by growing atoms) are the reference: `best_cvar` and
`worst_cvar` are those of the four mean-optimal ones.

    results.csv   per alpha and policy (greedy: the first optimal action): its path over both passes; mean, CVaR at
                  alpha and worst case of its exact return law; lower and upper atom of the operator at the start;
                  best_cvar and worst_cvar of the mean-optimal policies; road_cvar, of the road twice
    routes.csv    the nine combinations: mean, worst case, CVaR at every alpha, and whether they are optimal in mean

    python experiments/safest_optimal/run.py

Exact, so there are no seeds; half a minute, most of it compiling.
"""

import datetime
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.algorithms.dynamic_programming.robust_risk import choose_all, two_slices
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import tabular
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import conditional_value_at_risk
from jaxrl_dist.envs.tabular import MOVES, Tabular
from jaxrl_dist.envs.tabular import draw as draw_tabular
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID
from jaxrl_dist.records.recording import command_line, versions

LANES = ("road", "scree", "ledge")
"""Rows of the grid, from the top; the first and the last bend away from the middle and so take two steps more."""
HAZARDS = {"road": (1.0, 2.5), "scree": (0.5, 8.0), "ledge": (1 / 16, 32.0)}
"""In the middle of each path: with this probability, this cost."""
LENGTH = 4  # columns from one camp to the next
DISCOUNT, TOLERANCE = 1.0, 1e-4
STEPS = 60  # more than the longest walk


@dataclass(frozen=True)
class Arguments:
    out: Path = Path(__file__).parent
    """Folder that receives results.csv, routes.csv, run.json and figure.png."""
    passes: int = 2
    """Mountain passes in a row."""
    alphas: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    """Masses of the lower atom."""
    iterations: int = 100
    """Applications of each operator; the walk is over after far fewer."""


# -- the walk ---------------------------------------------------------------------------------------------------------


def mountain_walk(passes: int) -> Tabular:
    """Three rows, a camp in the middle row of every fourth column; the last camp ends the walk.

    Beside a camp the rows are joined, in between they are walled off: a path is chosen on leaving a camp.
    """
    goal = (1, LENGTH * passes)
    cells = [(row, column) for row in range(3) for column in range(goal[1]) if row == 1 or column % LENGTH]
    number = {cell: index for index, cell in enumerate(cells)}

    def outcomes(cell: tuple[int, int], move: tuple[int, int]) -> list[tuple[float, int, float, bool]]:
        to = cell[0] + move[0], cell[1] + move[1]
        if to == goal:
            return [(1.0, number[cell], -1.0, True)]
        if to not in number or (move[0] and cell[1] % LENGTH == LENGTH // 2):
            return [(1.0, number[cell], -1.0, False)]
        if to[1] % LENGTH == LENGTH // 2:
            chance, cost = HAZARDS[LANES[to[0]]]
            return [(chance, number[to], -1.0 - cost, False), (1 - chance, number[to], -1.0, False)]
        return [(1.0, number[to], -1.0, False)]

    table = [[outcomes(cell, move) for move in MOVES.values()] for cell in cells]
    start = [float(cell == (1, 0)) for cell in cells]
    return Tabular(tabular.mdp_from_outcomes(table), start, cells, "mountain passes", STEPS)


def walk(env: Tabular, policy: np.ndarray) -> list[int]:
    """The states that a policy of probabilities 0 and 1 visits; chance decides costs, never the way."""
    mdp, state, visited = env.default_params.mdp, int(np.argmax(env.default_params.start)), []
    while state not in visited:
        visited.append(state)
        action = int(policy[state].argmax())
        if mdp.terminated[state, action, 0]:
            return visited
        state = int(mdp.next_state[state, action, 0])
    raise ValueError(f"policy walks in circles: states {visited} and then {state} again")


def path_of(env: Tabular, visited: Sequence[int], passes: int) -> str:
    """The lanes in which the passes are crossed, such as scree-ledge."""
    rows = {int(column): LANES[int(row)] for row, column in env.places[list(visited)] if column % LENGTH == LENGTH // 2}
    return "-".join(rows[LENGTH * number + LENGTH // 2] for number in range(passes))


def route_policy(env: Tabular, lanes: Sequence[str]) -> np.ndarray:
    """The policy that crosses pass after pass in the given lanes, `[states, actions]`."""
    names, choice = list(MOVES), []
    for row, column in env.places.astype(int):
        move = "right"
        if row == 1 and column % LENGTH == 1:
            move = {"road": "up", "scree": "right", "ledge": "down"}[lanes[column // LENGTH]]
        elif row != 1 and column % LENGTH == LENGTH - 1:
            move = "down" if row == 0 else "up"
        choice.append(names.index(move))
    return np.eye(len(names))[choice]


def exact_law(env: Tabular, policy: np.ndarray) -> Law:
    """The exact law of the return from the start, float64."""
    start = int(np.argmax(env.default_params.start))
    return tabular.exact_return_law(env.default_params.mdp, policy, DISCOUNT, start, int(policy[start].argmax()), STEPS)


def cvar(law: Law, alpha: float) -> float:
    """Mean of the worst alpha of an exact law."""
    return float(conditional_value_at_risk(Law(*map(jnp.asarray, law)), alpha))


# -- results ----------------------------------------------------------------------------------------------------------


def all_routes(env: Tabular, arguments: Arguments) -> tuple[pd.DataFrame, dict[str, Law]]:
    """Every combination of paths and its exact law."""
    rows, exact = [], {}
    for lanes in itertools.product(LANES, repeat=arguments.passes):
        policy, name = route_policy(env, lanes), "-".join(lanes)
        assert path_of(env, walk(env, policy), arguments.passes) == name
        exact[name] = exact_law(env, policy)
        levels = {f"cvar_{alpha:g}": cvar(exact[name], alpha) for alpha in arguments.alphas}
        rows.append({"route": name, "mean": laws.mean(exact[name]), "worst_case": exact[name].atoms.min(), **levels})
    routes = pd.DataFrame(rows)
    routes.insert(2, "mean_optimal", routes["mean"] >= routes["mean"].max() - 1e-9)
    return routes, exact


def operators(env: Tabular, arguments: Arguments) -> tuple[pd.DataFrame, dict[tuple[float, str], np.ndarray]]:
    """What each operator chooses for every alpha, and the exact law of it."""
    program = jax.jit(choose_all, static_argnames="iterations")
    start, rows, policies = int(np.argmax(env.default_params.start)), [], {}
    for alpha in arguments.alphas:
        _, found = program(
            env.default_params.mdp, DISCOUNT, two_slices(alpha), TOLERANCE, iterations=arguments.iterations
        )
        for name in LOOKS:
            control = found[name]
            policy = np.asarray(control.policy)
            policies[alpha, name] = policy
            exact = exact_law(env, policy)
            lower, upper = np.asarray(control.laws.atoms[start, int(policy[start].argmax())], np.float64)
            rows.append({
                "alpha": alpha, "policy": name, "route": path_of(env, walk(env, policy), arguments.passes),
                "mean": laws.mean(exact), "cvar": cvar(exact, alpha), "worst_case": exact.atoms.min(),
                "lower_atom": lower, "upper_atom": upper,
            })  # fmt: skip
    return pd.DataFrame(rows), policies


def with_references(results: pd.DataFrame, routes: pd.DataFrame) -> pd.DataFrame:
    """Adds the best and the worst CVaR among the mean-optimal routes, and that of the road."""
    optimal = routes[routes.mean_optimal]
    road = routes[routes.route.str.fullmatch("(road-?)+")].iloc[0]
    columns = [f"cvar_{alpha:g}" for alpha in results.alpha]
    return results.assign(
        best_cvar=[optimal[column].max() for column in columns],
        worst_cvar=[optimal[column].min() for column in columns],
        road_cvar=[road[column] for column in columns],
    )


def check(results: pd.DataFrame) -> None:
    """What must hold by construction; AssertionError says what does not."""
    assert np.ptp(results["mean"]) < 1e-9, f"means differ: {results['mean'].unique()}"
    assert not results.route.str.contains("road").any(), f"a non-optimal action was taken: {results.route.unique()}"
    assert (results.road_cvar > results.best_cvar).all(), "the road is not safer than every optimal route"


# -- figure -----------------------------------------------------------------------------------------------------------

LOOKS = {"greedy": (COLOURS[6], 5.0, "-"), "safe": (COLOURS[0], 2.6, "-"), "risky": (COLOURS[1], 1.4, "--")}


def draw(env: Tabular, results: pd.DataFrame, policies: dict, exact: dict[str, Law], path: Path) -> None:
    """The map, and for every alpha the ways of the safe and the risky policy and the laws of their returns."""
    alphas = list(results.alpha.unique())
    figure = Figure(figsize=(15, 2.9 * (len(alphas) + 1)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(alphas) + 1, 3, width_ratios=(1, 1, 0.8))
    rows = results.set_index(["alpha", "policy"])

    draw_tabular(panels[0, 0], env)
    panels[0, 0].set_title("all moves: road above, scree in the middle, ledge below", fontsize=10)
    draw_way(panels[0, 1], env, policies[alphas[0], "greedy"])
    panels[0, 1].set_title(f"greedy, any alpha: {rows.route[alphas[0], 'greedy']}", fontsize=10)
    road = next(name for name in exact if set(name.split("-")) == {"road"})
    draw_law(panels[0, 2], exact[road], COLOURS[2], 2.0, "-", f"{road}, never taken")
    draw_law(panels[0, 2], exact[rows.route[alphas[0], "greedy"]], *LOOKS["greedy"], "greedy")
    finish(panels[0, 2])
    for row, alpha in zip(panels[1:], alphas, strict=True):
        for axes, name in zip(row, ("safe", "risky"), strict=False):
            draw_way(axes, env, policies[alpha, name])
            found = rows.loc[alpha, name]
            text = f"alpha {alpha:g}, {name}: {found.route}; mean {found['mean']:g}, CVaR {found.cvar:.4g}"
            axes.set_title(text, fontsize=10)
        for name, look in LOOKS.items():
            draw_law(row[2], exact[rows.route[alpha, name]], *look, name)
        row[2].axhline(alpha, color=FAINT, linewidth=0.8, linestyle=":")
        finish(row[2])
    panels[-1, 2].set_xlabel("return")
    figure.suptitle("Ties of the mean, broken by the lower (safe) and the upper (risky) average", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def draw_way(axes, env: Tabular, policy: np.ndarray) -> None:
    """Only the moves on the way of a policy from the start."""
    visited = np.isin(np.arange(len(policy)), walk(env, policy))
    draw_tabular(axes, env, policy=policy * visited[:, None])


def draw_law(axes, law: Law, colour: str, width: float, style: str, label: str) -> None:
    """The distribution function of a law as steps."""
    atoms = np.concatenate([[-90.0], law.atoms, [0.0]])
    heights = np.concatenate([[0.0], np.cumsum(law.masses), [1.0]])
    axes.step(atoms, heights, where="post", color=colour, linewidth=width, linestyle=style, label=label)


def finish(axes) -> None:
    axes.set_ylabel("P(return <= x)")
    axes.set_xlim(-80, -5)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


# -- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Solve the walk for every alpha, compare with all routes, write results and figure."""
    if arguments.passes < 1 or not all(0 < alpha < 1 for alpha in arguments.alphas):
        raise ValueError(
            f"passes is {arguments.passes} and alphas {arguments.alphas}; allowed: 1 and above, and 0 to 1"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, env = time.perf_counter(), mountain_walk(arguments.passes)
    routes, exact = all_routes(env, arguments)
    results, policies = operators(env, arguments)
    results = with_references(results, routes)
    print(results.to_string(index=False, float_format="%.5g"))
    results.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    routes.to_csv(arguments.out / "routes.csv", index=False, float_format="%.6g")
    record = {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started),
        "passes": arguments.passes,
        "alphas": arguments.alphas,
        "seeds": "none: nothing is sampled",
        "versions": versions(),
    }
    (arguments.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(env, results, policies, exact, arguments.out / "figure.png")
    check(results)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

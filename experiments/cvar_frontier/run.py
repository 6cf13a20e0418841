"""What does the stock buy? The CVaR frontier of four ways to plan, against brute force, and an agent that learns it.

Two processes of `envs/stock.py`: the two-stage gamble, and a grid with three dangerous shortcuts. For levels tau from
0.1 to 1 `frontier.csv` has, per problem, level and method, the level's CVaR of the return (discount 1) from the start
and the mean, both of the exact law of the policy that the method finds:

    stock      distributional value iteration with a stock, from the initial stock that promises most; `promised`
    nested     greedy for the CVaR of the return from each state on (`tabular.optimise`), which forgets the past
    neutral    best for the mean
    markov     the best deterministic policy that sees the state, by trying all of them
    history    the best deterministic policy that sees all that has happened, by trying all of them

On the grid policies are tried that walk on and choose at each of the three gaps between the shortcut and the way round;
to turn back only costs. `agent.csv` has D-eta-N trained on the gamble, a row per seed and level: the initial stock that
its own laws promise most from, that promise, and the exact CVaR of its policy from there. `requested.csv` asks for a
return g, with the utility -abs(x) and initial stock -g: mean return and mean miss of the exact laws of dynamic
programming (seed -1) and of the agent.

    python experiments/cvar_frontier/run.py          # about two minutes on 2 quiet cores
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist.algorithms.dynamic_programming import stock_augmented
from jaxrl_dist.algorithms.value_based import eta_dqn
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional import tabular
from jaxrl_dist.envs import stock as stock_of
from jaxrl_dist.records import recording, statistics

HERE = Path(__file__).parent
LEVELS = tuple(round(0.05 * k, 2) for k in range(2, 21))
# Per problem: the grid of stocks (whole, as all rewards), quantiles, sweeps.
GRIDS = {"gamble": (-12, 12, 64, 4), "shortcut": (-20, 60, 100, 40)}
REQUESTED = tuple(range(-1, 10))  # the smallest return of the gamble to its largest
COLOURS = {
    "stock": "#0072B2", "nested": "#D55E00", "neutral": "#999999", "markov": "#E69F00", "history": "#000000",
    "agent": "#009E73",
}  # fmt: skip

# -- exact laws -------------------------------------------------------------------------------------------------------


def exact_law(mdp: tabular.MDP, act: Callable, state: int, initial_stock: float, steps: int) -> dict[float, float]:
    """Return -> probability of the policy `act(states, stocks) -> actions`, by growing atoms; discount 1.

    Raises ValueError for episodes that may go on after `steps` steps.
    """
    mdp = jax.tree.map(np.asarray, mdp)
    running, ended = {(state, 0.0): 1.0}, {}
    for _ in range(steps):
        if not running:
            return ended
        states, totals = (np.array(column) for column in zip(*running, strict=True))
        actions, following = np.asarray(act(states.astype(int), initial_stock + totals)), {}
        for (s, total), a, mass in zip(list(running), actions, running.values(), strict=True):
            for k in np.flatnonzero(mdp.probability[s, a]):
                now = round(total + float(mdp.reward[s, a, k]), 6)
                into, key = (
                    (ended, now) if mdp.terminated[s, a, k] else (following, (int(mdp.next_state[s, a, k]), now))
                )
                into[key] = into.get(key, 0.0) + mass * float(mdp.probability[s, a, k])
        running = following
    raise ValueError(f"{sum(running.values()):.3g} of the episodes go on after {steps} steps, allowed: none")


def cvar_of(law: dict[float, float], level: float) -> float:
    """Mean of the worst `level` of the mass."""
    left, value = level, 0.0
    for atom in sorted(law):
        taken = min(left, law[atom])
        value, left = value + taken * atom, left - taken
    return (value + left * max(law)) / level  # rounding may leave a rest


def mean_of(law: dict[float, float]) -> float:
    return sum(atom * mass for atom, mass in law.items())


# -- brute force ------------------------------------------------------------------------------------------------------


def laws_of_gamble() -> dict[str, list[dict[float, float]]]:
    """The laws of all deterministic policies, whose second stage sees the first: as Markov ones do."""
    laws = []
    for choice in itertools.product((False, True), repeat=2):
        law = {}
        for first, risky in zip((0.0, 4.0), choice, strict=True):
            for second in (-1.0, 5.0) if risky else (1.0, 1.0):
                law[first + second] = law.get(first + second, 0.0) + 0.25
        laws.append(law)
    return {"markov": laws, "history": laws}


def laws_of_shortcut(gaps: int = 3, chance: float = 0.1, penalty: float = 10.0) -> dict[str, list[dict[float, float]]]:
    """The laws of all policies that choose, at gap g after k losses, between the shortcut and 2 steps more."""
    nodes = [(gap, lost) for gap in range(gaps) for lost in range(gap + 1)]
    straight, found = -(4.0 * gaps - 2), {"markov": [], "history": []}
    for choice in itertools.product((False, True), repeat=len(nodes)):
        through = dict(zip(nodes, choice, strict=True))
        running = {(0, straight): 1.0}
        for gap in range(gaps):
            following = {}
            for (lost, total), mass in running.items():
                results = [(1.0, lost, total - 2)]
                if through[gap, lost]:
                    results = [(1 - chance, lost, total), (chance, lost + 1, total - penalty)]
                for probability, now_lost, now in results:
                    following[now_lost, now] = following.get((now_lost, now), 0.0) + mass * probability
            running = following
        law = {}
        for (_, total), mass in running.items():
            law[total] = law.get(total, 0.0) + mass
        found["history"].append(law)
        if all(len({through[node] for node in nodes if node[0] == gap}) == 1 for gap in range(gaps)):
            found["markov"].append(law)
    return found


# -- planning ---------------------------------------------------------------------------------------------------------


def planned(problem: str, utility: str) -> tuple[jax.Array, jax.Array, Callable]:
    """Stocks, what each promises, and the policy of stock-augmented value iteration."""
    low, high, num_quantiles, sweeps = GRIDS[problem]
    params = stock_of.GENERATORS[problem]().default_params
    stocks = jnp.linspace(low, high, high - low + 1)
    laws = stock_augmented.value_iteration(params.mdp, 1.0, stocks, utility, num_quantiles=num_quantiles, sweeps=sweeps)

    @jax.jit
    def act(states, at):
        return stock_augmented.act(laws, stocks, utility, states, jnp.asarray(at, jnp.float32))

    return stocks, stock_augmented.start_values(laws, stocks, utility, params.start), act


def frontier(problem: str) -> pd.DataFrame:
    """One row per level and method."""
    params, (_, _, num_quantiles, sweeps) = stock_of.GENERATORS[problem]().default_params, GRIDS[problem]
    start = int(np.argmax(params.start))
    stocks, values, act = planned(problem, "shortfall")
    tried = {"gamble": laws_of_gamble, "shortcut": laws_of_shortcut}[problem]()
    rows = []

    def law_of(choice, initial_stock=0.0):
        return exact_law(params.mdp, choice, start, initial_stock, 4 * sweeps)

    def table(action_values):
        actions = np.asarray(action_values.argmax(-1))
        return lambda states, _: actions[states]

    @jax.jit
    def nested_values(level):
        risk = risks.Risk("cvar", level)
        projection = tabular.to_quantiles(num_quantiles)
        return risks.value(risk, tabular.optimise(params.mdp, 1.0, projection, sweeps, risk))

    neutral = law_of(table(tabular.optimal_values(params.mdp, 1.0, sweeps)))
    for level in LEVELS:
        objective = np.asarray(stock_augmented.cvar_objective(stocks, values, level))
        best = float(stocks[objective.argmax()])
        laws = {"stock": law_of(act, best), "nested": law_of(table(nested_values(level))), "neutral": neutral}
        laws |= {name: max(some, key=functools.partial(cvar_of, level=level)) for name, some in tried.items()}
        for method, law in laws.items():
            row = {"problem": problem, "level": level, "method": method, "cvar": cvar_of(law, level)}
            own = {"initial_stock": best, "promised": objective.max()} if method == "stock" else {}
            rows.append(row | {"mean": mean_of(law)} | own)
    return pd.DataFrame(rows)


# -- learning ---------------------------------------------------------------------------------------------------------


def trained(utility: str, num_seeds: int, total_steps: int) -> tuple[list, Callable, Callable]:
    """D-eta-N on the gamble: the seeds' states, `act(state, states, stocks)` and `predict` of the greedy action."""
    settings = {
        name: value for name, value in eta_dqn.PRESETS["stock/gamble"].items()
        if name not in ("total_steps", "env_options")
    }  # fmt: skip
    config = dataclasses.replace(eta_dqn.Config(), **settings, utility=utility)
    inner = stock_of.gamble()
    env = stock_of.StockAugmented(inner, inner.default_params, 1.0, -9.0, 1.0)
    agent = eta_dqn.make_agent(config, env, env.default_params)
    iterations = (total_steps - agent.clock.warmup_steps) // agent.clock.env_steps

    @jax.jit
    @jax.vmap
    def train(key):
        return jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], agent.init(key))

    def seen(states, at):
        return jnp.concatenate([jnp.eye(3)[states], jnp.asarray(at, jnp.float32)[:, None]], axis=1)

    @jax.jit
    def act(state, states, at):
        return agent.policy.act(state, seen(states, at), (), jax.random.key(0))[0]

    @jax.jit
    def predict(state, states, at):
        return agent.claim.law(state, seen(states, at), act(state, states, at)).atoms

    final = train(jax.random.split(jax.random.key(0), num_seeds))
    return [jax.tree.map(lambda x, i=i: x[i], final) for i in range(num_seeds)], act, predict


def learned_frontier(num_seeds: int, total_steps: int) -> pd.DataFrame:
    """One row per seed and level."""
    states, act, predict = trained("shortfall", num_seeds, total_steps)
    mdp, stocks, rows = stock_of.gamble().default_params.mdp, np.linspace(-9, 1, 101), []
    for seed, state in enumerate(states):
        rest = np.asarray(predict(state, np.zeros(len(stocks), int), stocks))
        values = np.minimum(stocks[:, None] + rest, 0).mean(-1)
        for level in LEVELS:
            objective = np.asarray(stock_augmented.cvar_objective(stocks, values, level))
            best = float(stocks[objective.argmax()])
            law = exact_law(mdp, functools.partial(act, state), 0, best, 4)
            rows.append({
                "seed": seed, "level": level, "initial_stock": best, "promised": objective.max(),
                "cvar": cvar_of(law, level), "mean": mean_of(law),
            })  # fmt: skip
    return pd.DataFrame(rows)


def requested(num_seeds: int, total_steps: int) -> pd.DataFrame:
    """One row per policy (dynamic programming is seed -1) and requested return."""
    mdp, rows = stock_of.gamble().default_params.mdp, []
    states, act, _ = trained("target", num_seeds, total_steps)
    policies = [planned("gamble", "target")[2], *(functools.partial(act, state) for state in states)]
    for seed, policy in enumerate(policies, start=-1):
        for wanted in REQUESTED:
            law = exact_law(mdp, policy, 0, -float(wanted), 4)
            miss = sum(mass * abs(atom - wanted) for atom, mass in law.items())
            rows.append({"seed": seed, "requested": wanted, "mean": mean_of(law), "miss": miss})
    return pd.DataFrame(rows)


# -- figure -----------------------------------------------------------------------------------------------------------


def interval(values: np.ndarray) -> tuple[float, float]:
    return statistics.bootstrap_interval(values, statistic=np.mean)


def draw(planning: pd.DataFrame, learning: pd.DataFrame, asked: pd.DataFrame, path: Path) -> None:
    """Two frontiers, and what comes of a request."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots(1, 3)
    looks = {
        "history": ("best of all policies", "o"), "markov": ("best Markov policy", "s"), "stock": ("stock DP", "x"),
        "nested": ("nested risk", "v"), "neutral": ("neutral", "d"),
    }  # fmt: skip
    for axes, problem in zip(figure.axes, GRIDS, strict=False):
        for method, (label, marker) in looks.items():
            rows = planning[(planning.problem == problem) & (planning.method == method)]
            hollow = {"markerfacecolor": "none"} if marker != "x" else {}
            axes.plot(
                rows.level, rows.cvar, marker=marker, color=COLOURS[method], label=label, markersize=8, linewidth=1.2,
                **hollow,
            )  # fmt: skip
        axes.set_xlabel("level tau")
        axes.set_ylabel("CVaR of the return")
        axes.set_title(problem, loc="left")
    with_interval(figure.axes[0], learning.groupby("level").cvar, "D-eta-N (mean of seeds)")
    axes, exact = figure.axes[2], asked[asked.seed < 0]
    axes.plot(exact.requested, exact["mean"], "x-", color=COLOURS["stock"], markersize=8, label="stock DP")
    axes.plot(exact.requested, exact.requested, ":", color=COLOURS["neutral"], label="as requested")
    with_interval(axes, asked[asked.seed >= 0].groupby("requested")["mean"], "D-eta-N (mean of seeds)")
    axes.set_xlabel("requested return")
    axes.set_ylabel("mean return")
    axes.set_title("gamble, utility -abs(x)", loc="left")
    for axes in figure.axes:
        axes.grid(color="#E5E7EB", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def with_interval(axes, groups, label: str) -> None:
    """Mean over seeds with its 95 % bootstrap interval."""
    mean, ends = groups.mean(), np.array([interval(values.to_numpy()) for _, values in groups])
    bars = np.abs(ends.T - mean.to_numpy())
    axes.errorbar(mean.index, mean, yerr=bars, fmt="^", color=COLOURS["agent"], capsize=3, markersize=6, label=label)


# -- command line -----------------------------------------------------------------------------------------------------


def main(out: Path = HERE, num_seeds: int = 6, total_steps: int = 110_000) -> None:
    """Plan, try everything, learn, and write tables and picture.

    Args:
        out: folder to write to.
        num_seeds: seeds of each agent, trained together, two at least.
        total_steps: environment steps per seed.
    """
    started = time.perf_counter()
    planning = pd.concat([frontier(problem) for problem in GRIDS], ignore_index=True)
    print(planning.pivot_table("cvar", ["problem", "level"], "method").round(3).to_string(), flush=True)
    learning = learned_frontier(num_seeds, total_steps)
    print(learning.groupby("level")[["cvar", "promised"]].agg(["mean", "min", "max"]).round(3).to_string(), flush=True)
    asked = requested(num_seeds, total_steps)
    print(asked.assign(seed=asked.seed < 0).groupby(["requested", "seed"]).mean().round(3).to_string(), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("frontier", planning), ("agent", learning), ("requested", asked)):
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    record = {
        "command": recording.command_line(), "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - started), "num_seeds": num_seeds, "total_steps": total_steps,
        "settings": eta_dqn.PRESETS["stock/gamble"], "grids": GRIDS, "versions": recording.versions(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(planning, learning, asked, out / "figure.png")


if __name__ == "__main__":
    tyro.cli(main)

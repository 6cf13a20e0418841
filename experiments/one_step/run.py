"""Are one-step laws stable where laws of full returns are not, and what does that cost?

Random processes of 10 states (Garnet), without ties, and the same with exact ties: every action has a twin whose reward
is 1 higher or lower with equal chances, so that both have the same value but other laws. On both kinds, for one-step
laws and for laws of full returns (that of C51), on one support:

    contraction.csv   does one application of the control operator bring two tables of laws closer together? Histogram
                      of distance after / distance before (largest Wasserstein-1 over states and actions), `count` pairs
                      from `ratio_low` to `ratio_high`. `pair`: independent random tables, or two random tables of which
                      each is 1 part in 100 mixed into the fixed point.
    stability.csv     does value iteration settle if ties are broken at random in every iteration? How far iteration
                      `iteration` moved the laws: median, 5 % and 95 % quantile over the processes.
    learning.csv      does categorical Q-learning settle? One process, several seeds of the samples; after `updates`
                      (each of every state and action; step size visits^-0.7) the largest errors over states and
                      actions: `mean_error` of the means, `law_error` to the fixed point (full: of the policy without
                      twins), and `spread`, to the average law of all seeds, which needs no reference.
    summary.csv       the largest ratios, the last moves and the last errors.

    python experiments/one_step/run.py            # about two minutes on 2 cores
"""

import datetime
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.algorithms.dynamic_programming import one_step
from jaxrl_dist.algorithms.dynamic_programming.one_step import Problem
from jaxrl_dist.distributional import categorical, metrics, tabular
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.envs.tabular import garnet
from jaxrl_dist.records import recording

HERE = Path(__file__).parent
DISCOUNT, POWER, MIXED_IN = 0.8, 0.7, 0.01
SUPPORT = categorical.support(-15.0, 15.0, 61)
PROCESSES = {"garnet": "no ties", "ties": "exact ties"}
LAWS = {"one-step": ("#0072B2", False), "full": ("#D55E00", True)}
EDGES = np.concatenate([[0], np.geomspace(0.01, 1000, 101)])


def process(kind: str, seed: int) -> tabular.MDP:
    """A Garnet of two actions, or with their twins four: actions 2 and 3 pay 1 more or less than 0 and 1."""
    mdp = jax.tree.map(np.asarray, garnet(states=10, actions=2, branching=3, end_probability=0.1, seed=seed)
                       .default_params.mdp)  # fmt: skip
    if kind == "garnet":
        return jax.tree.map(jnp.asarray, mdp)
    twice = tabular.MDP(*(np.concatenate([part, part], axis=-1) for part in mdp))
    certain = twice._replace(probability=np.concatenate([mdp.probability, 0 * mdp.probability], axis=-1))
    up_or_down = np.repeat([1, -1], mdp.reward.shape[-1]).astype(np.float32)
    twins = twice._replace(probability=twice.probability / 2, reward=twice.reward + up_or_down)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), certain, twins)


def operator(masses: jax.Array, problem: Problem, full: bool, tie_break: jax.Array | None = None) -> jax.Array:
    if full:
        return one_step.full_operator(masses, problem, tie_break=tie_break)
    return one_step.one_step_operator(masses, problem)


def fixed_point(problem: Problem, full: bool, iterations: int = 150) -> jax.Array:
    """Ties go to the first action, never to a twin."""
    start = one_step.initial_masses(problem)
    return one_step.iterate(lambda masses, _: operator(masses, problem, full), start, SUPPORT, iterations)[0]


# -- the three questions ----------------------------------------------------------------------------------------------


def contraction(mdp: tabular.MDP, key: jax.Array, pairs: int, full: bool) -> dict[str, jax.Array]:
    """Ratios of distances of one process, `[pairs]` for each kind of pair."""
    problem = Problem(mdp, DISCOUNT, SUPPORT)
    settled = fixed_point(problem, full)

    def ratio(tables):
        a, b = tables
        after = one_step.distance(operator(a, problem, full), operator(b, problem, full), SUPPORT)
        return after / one_step.distance(a, b, SUPPORT)

    def ratios(index):
        drawn = jax.random.dirichlet(
            jax.random.fold_in(key, index), jnp.full(len(SUPPORT), 0.3), (2, *mdp.probability.shape[:2])
        )
        return {"independent": ratio(drawn), "near": ratio((1 - MIXED_IN) * settled + MIXED_IN * drawn)}

    return jax.lax.map(ratios, jnp.arange(pairs))


def stability(mdp: tabular.MDP, key: jax.Array, iterations: int, full: bool) -> jax.Array:
    """How far each iteration moved the laws of one process, `[iterations]`."""
    problem = Problem(mdp, DISCOUNT, SUPPORT)

    def once(masses, iteration):
        tie_break = jax.random.uniform(jax.random.fold_in(key, iteration), masses.shape[:2])
        return operator(masses, problem, full, tie_break)

    return one_step.iterate(once, one_step.initial_masses(problem), SUPPORT, iterations)[1]


def learning(mdp: tabular.MDP, key: jax.Array, seeds: int, updates: int, records: int, full: bool) -> dict:
    """Errors of sampled Q-learning, `[records, seeds]` each."""
    problem = Problem(mdp, DISCOUNT, SUPPORT)
    settled, values = fixed_point(problem, full), tabular.optimal_values(mdp, DISCOUNT, 300)

    def advance(estimates, record):
        keys = jax.random.split(jax.random.fold_in(key, record), seeds)

        def one(estimate, key):
            return one_step.learn_synchronously(estimate, problem, key, updates // records, power=POWER, full=full)

        estimates = jax.vmap(one)(estimates, keys)
        masses = estimates.masses

        def apart(reference):
            return metrics.wasserstein_1(Law(SUPPORT, masses), Law(SUPPORT, reference)).max((1, 2))

        mean_error = jnp.abs(masses @ SUPPORT - values).max((1, 2))
        return estimates, {
            "mean_error": mean_error, "law_error": apart(settled), "spread": apart(masses.mean(0))
        }  # fmt: skip

    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (seeds, *x.shape)), one_step.initial_estimate(problem))
    return jax.lax.scan(advance, start, jnp.arange(records))[1]


# -- results ----------------------------------------------------------------------------------------------------------


def main(
    processes: int = 24, pairs: int = 50, iterations: int = 80, seeds: int = 24, updates: int = 20_000,
    records: int = 40, out: Path = HERE,
) -> None:  # fmt: skip
    """Measure, write tables and picture, and check what the paper claims.

    Args:
        processes: random processes of each kind, for contraction and stability.
        pairs: pairs of tables per process and kind of pair.
        iterations: of value iteration.
        seeds: of the samples of Q-learning, on the first process of each kind.
        updates: of Q-learning; a multiple of records.
        records: how often its errors are written down.
        out: folder to write to.
    """
    if updates % records or updates < records:
        raise ValueError(f"updates is {updates}, but must be a multiple of records = {records}")
    started = time.perf_counter()
    ratios, moves, errors = [], [], []
    for kind in PROCESSES:
        mdps = jax.tree.map(lambda *parts: jnp.stack(parts), *(process(kind, seed) for seed in range(processes)))
        first = jax.tree.map(lambda part: part[0], mdps)
        for name, (_, full) in LAWS.items():
            # The same keys for both kinds of laws: the same pairs, and the same transitions.
            contraction_key, stability_key, learning_key = jax.random.split(jax.random.key(0), 3)
            label = {"process": kind, "law": name}

            def over_processes(function, key, size):
                keys = jax.random.split(key, processes)
                return jax.jit(lambda: jax.lax.map(lambda one: function(*one, size, full), (mdps, keys)))()

            for pair, found in over_processes(contraction, contraction_key, pairs).items():
                ratios.append((label | {"pair": pair}, np.asarray(found).ravel()))
            low, median, high = np.quantile(over_processes(stability, stability_key, iterations), [0.05, 0.5, 0.95], 0)
            rows = {"iteration": np.arange(1, iterations + 1), "median": median, "low": low, "high": high}
            moves.append(pd.DataFrame(label | rows))
            found = jax.jit(lambda: learning(first, learning_key, seeds, updates, records, full))()
            when, seed = np.indices((records, seeds))
            rows = {"seed": seed.ravel(), "updates": (when.ravel() + 1) * (updates // records)}
            errors.append(pd.DataFrame(label | rows | {key: np.ravel(value) for key, value in found.items()}))
            print(f"{time.perf_counter() - started:6.0f} s  {kind}, {name}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    histogram = pd.concat([
        pd.DataFrame(label | {"ratio_low": EDGES[:-1], "ratio_high": EDGES[1:], "count": np.histogram(x, EDGES)[0]})
        for label, x in ratios
    ])  # fmt: skip
    histogram, moved, learned = histogram[histogram["count"] > 0], pd.concat(moves), pd.concat(errors)
    summary = summarise(ratios, moved, learned)
    tables = {"contraction": histogram, "stability": moved, "learning": learned, "summary": summary}
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.5g")
    record = {
        "command": recording.command_line(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started), "processes": processes, "pairs": pairs,
        "iterations": iterations, "seeds": seeds, "updates": updates, "discount": DISCOUNT, "power": POWER,
        "mixed_in": MIXED_IN, "versions": recording.versions(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(histogram, moved, learned, out / "figure.png")
    print(summary.to_string(index=False))
    check(summary)


def summarise(ratios: list, moved: pd.DataFrame, learned: pd.DataFrame) -> pd.DataFrame:
    """One row per process and law: largest ratio by pair, median of the last move, means of the last errors."""
    rows = []
    for (kind, name), table in learned.groupby(["process", "law"], sort=False):
        row = {"process": kind, "law": name}
        row |= {
            f"largest_ratio_{label['pair']}": found.max()
            for label, found in ratios
            if (label["process"], label["law"]) == (kind, name)
        }
        last = moved[(moved.process == kind) & (moved.law == name)].iloc[-1]
        row |= {"last_move_median": last["median"], "last_move_low": last.low, "last_move_high": last.high}
        final = table[table.updates == table.updates.max()]
        rows.append(row | {f"final_{key}": final[key].mean() for key in ("mean_error", "law_error", "spread")})
    return pd.DataFrame(rows)


def check(summary: pd.DataFrame) -> None:
    """What must hold if the paper's theorems do; AssertionError says what does not."""
    rows = summary.set_index(["process", "law"])
    for kind in PROCESSES:
        row = rows.loc[kind, "one-step"]
        largest = max(row.largest_ratio_independent, row.largest_ratio_near)
        assert largest <= DISCOUNT + 1e-3, f"{kind}: one-step laws spread by {largest}"
        assert row.last_move_high < 1e-4, f"{kind}: one-step laws still move by {row.last_move_high}"
    row = rows.loc["ties", "full"]
    assert row.largest_ratio_near > 1, f"ties: full laws spread by no more than {row.largest_ratio_near}"
    assert row.last_move_low > 0.01, f"ties: full laws move by no more than {row.last_move_low}"


def draw(histogram: pd.DataFrame, moved: pd.DataFrame, learned: pd.DataFrame, path: Path) -> None:
    """A row for each kind of process, a column for each question."""
    figure = Figure(figsize=(13, 7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PROCESSES), 3, sharex="col")
    for (left, middle, right), (kind, words) in zip(axes, PROCESSES.items(), strict=True):
        for name, (colour, _) in LAWS.items():
            rows = histogram[(histogram.process == kind) & (histogram.law == name)]
            for pair, style in (("independent", "-"), ("near", "--")):
                table = rows[rows.pair == pair].set_index("ratio_low")["count"].reindex(EDGES[1:-1], fill_value=0)
                left.stairs(table.to_numpy() / max(table.sum(), 1), EDGES[1:], color=colour, linestyle=style,
                            label=f"{name}, {pair}")  # fmt: skip
            rows = moved[(moved.process == kind) & (moved.law == name)]
            middle.plot(rows.iteration, rows["median"].clip(lower=1e-7), color=colour, label=name)
            middle.fill_between(rows.iteration, rows.low.clip(lower=1e-7), rows.high.clip(lower=1e-7), color=colour,
                                alpha=0.2, linewidth=0)  # fmt: skip
            rows = learned[(learned.process == kind) & (learned.law == name)].groupby("updates")
            for measure, style in (("mean_error", ":"), ("law_error", "-"), ("spread", "--")):
                mean = rows[measure].mean()
                right.plot(mean.index, mean, color=colour, linestyle=style, label=f"{name}, {measure}")
        left.axvline(DISCOUNT, color="#4D4D4D", linewidth=1)
        left.text(DISCOUNT, 0.97, " discount", transform=left.get_xaxis_transform(), va="top", fontsize=8)
        left.set(xscale="log", ylabel=f"{words}\n\nshare of pairs")
        left.set_xlim(max(histogram.ratio_low.min(), EDGES[1]) / 1.5, histogram.ratio_high.max() * 1.5)
        middle.set(yscale="log", ylabel="moved by (Wasserstein-1)")
        right.set(xscale="log", yscale="log", ylabel="largest error")
    titles = ("one application: distance after / before", "value iteration, ties broken at random", "Q-learning")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.legend(frameon=False, fontsize=8)
    for axis, label in zip(axes[-1], ("ratio", "iteration", "updates of every state and action"), strict=True):
        axis.set_xlabel(label)
    for axis in axes.flat:
        axis.grid(color="#E5E7EB", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

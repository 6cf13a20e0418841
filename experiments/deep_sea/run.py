"""How deep can they dive? Agents that explore, and some that do not, on DeepSea of growing size.

In DeepSea of size N an episode has N steps. One way out of 2^N, an action "right" at each step, leads to a reward of 1,
and every step on it costs 0.01 / N; which of the two actions is "right" differs from place to place.

`results.csv` has a row per size, method, seed and time: environment steps, the return of the policy's mode (the
environment is deterministic, so one episode says it), whether it is `solved` (above 0.9 of 0.99), whether the reward
was ever `found` in training, how many of the N (N + 1) / 2 places were ever `visited`, the mean return of the episodes
since the last row, in which the agent explores, and where there is one the mean bonus, before it is scaled.
`summary.csv`: the shares of seeds that have solved the sea and found the reward at the end, and the medians of the
times when they first had. Methods of a family have the same environments, networks and step sizes; the budget is
`steps_per_cell` times N x N.

A method on a size is a cell. Cells that `out` has in full are not run again, so that a run can be cut and gone on with:
every cell has random numbers of its own.

    python experiments/deep_sea/run.py
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.learning import greedy
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import problem, training

HERE = Path(__file__).parent
EPSILON = {"epsilon_start": 1.0, "epsilon_end": 0.05}
METHODS = {
    "PPO": ("ppo", {}),
    "RND": ("rnd", {}),
    "DRND": ("drnd", {}),
    "DRND, rate": ("drnd", {"bonus_count": "rate"}),
    "PE-DQN": ("pe_dqn", {}),
    "PE-DQN, no propagation": ("pe_dqn", {"propagate": False}),
    "bootstrapped DQN": ("bootstrapped_dqn", {}),
    "ensemble C51": (
        "ensemble_c51",
        EPSILON | {"num_members": 5, "num_envs": 5, "warmup_steps": 640, "replay_capacity": 50_000},
    ),
    "DQN": ("dqn", EPSILON),
}
SOLVED = 0.9


def main(
    sizes: tuple[int, ...] = (10, 20, 30), methods: tuple[str, ...] = ("PPO", "RND", "DRND"), num_seeds: int = 8,
    steps_per_cell: int = 1_000, evaluations: int = 30, out: Path = HERE,
) -> None:  # fmt: skip
    """Train everything that is not there yet and write the tables and the figures.

    Args:
        sizes: N of each sea.
        methods: which methods.
        num_seeds: seeds per method, trained together.
        steps_per_cell: environment steps in parts of N x N.
        evaluations: how often each is looked at.
        out: folder to write to, and with cells that are known.
    """
    cli.spread_over_cores()
    out.mkdir(parents=True, exist_ok=True)
    table, notes = out / "results.csv", out / "run.json"
    results = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=["size", "method", "env_steps"])
    cells = json.loads(notes.read_text())["cells"] if table.is_file() else {}
    for size in sizes:
        for method in methods:
            total_steps = steps_per_cell * size**2
            of_the_cell = (results["size"] == size) & (results.method == method)
            known = results[of_the_cell]
            if len(known) == num_seeds * evaluations and known.env_steps.max() >= total_steps:
                print(f"{method} on {size} x {size}: known", flush=True)
                continue
            started = time.perf_counter()
            rows = pd.DataFrame(trained(size, method, num_seeds, total_steps, evaluations))
            results = pd.concat([results[~of_the_cell], rows]) if (~of_the_cell).any() else rows
            results.to_csv(table, index=False)
            cells[f"{method}, {size}"] = {
                "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
                "date": time.strftime("%Y-%m-%d"), "settings": settings(method, total_steps)[1],
                "versions": recording.versions(),
            }  # fmt: skip
            notes.write_text(json.dumps({"cells": cells}, indent=2) + "\n")
            print(f"{method} on {size} x {size}: {rows.solved[-num_seeds:].mean():.2f} solved", flush=True)
    summary = summarise(results)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    draw(summary, out / "figure.png")
    if "PE-DQN" in set(results.method):
        draw_exploration(results[results.method == "PE-DQN"], out / "exploration.png")


# -- training ---------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """State of the sea, and where anybody has been in it, `[size, size]`."""

    sea: Any
    visited: jax.Array


@dataclasses.dataclass(frozen=True)
class Watched:
    """The sea with a map of what was visited, which no reset wipes."""

    env: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, key: jax.Array, params: Any) -> tuple:
        observation, sea = self.env.reset(key, params)
        return observation, Seen(sea, observation > 0)

    def step(self, key: jax.Array, state: Seen, action: jax.Array, params: Any) -> tuple:
        observation, sea, *rest = self.env.step(key, state.sea, action, params)
        return observation, Seen(sea, state.visited | (observation > 0)), *rest


def places_visited(state: Any) -> np.ndarray:
    """How many places each run has seen, in whichever of its environments: `[runs]`."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Seen))
    (visited,) = (np.asarray(node.visited) for node in leaves if isinstance(node, Seen))
    return visited.any(tuple(range(1, visited.ndim - 2))).sum((1, 2))


def settings(method: str, total_steps: int):
    """The algorithm's module, and its settings: those of RND's preset where it has them, or with a replay PE-DQN's."""
    name, own = METHODS[method]
    module = cli.find_algorithm(name)
    if isinstance(module.Config(), greedy.Settings):
        # Whatever falls over time is where it ends after a third of it.
        shared = problem.split_preset(cli.find_algorithm("pe_dqn").PRESETS["DeepSea-bsuite"])[1]
        third = total_steps // 3
        own = own | {name: third for name in ("exploration_steps", "bonus_steps")}
    else:
        of_rnd = cli.find_algorithm("rnd")
        shared = problem.split_preset(of_rnd.PRESETS["DeepSea-bsuite"])[1]
        shared |= {field: getattr(of_rnd.Config(), field) for field in ("clip_values", "num_epochs", "num_minibatches")}
    shared |= problem.split_preset(module.PRESETS.get("DeepSea-bsuite", {}))[1] | own
    return module, {field: value for field, value in shared.items() if hasattr(module.Config(), field)}


def trained(size: int, method: str, num_seeds: int, total_steps: int, evaluations: int) -> list[dict]:
    """Rows of `results.csv` of all seeds."""
    from jaxrl_dist import envs

    module, values = settings(method, total_steps)
    env, params = envs.make("DeepSea-bsuite", size=size)
    programs = training.Programs(
        module.make_agent, module.Config(**values), Watched(env), params, num_runs=num_seeds, eval_episodes=1
    )
    keys = jax.random.split(jax.random.key(0), num_seeds)
    runs, done, rows = programs.begin(keys), 0, []
    for boundary in np.round(np.linspace(0, programs.agent.clock.iterations(total_steps), evaluations + 1))[1:]:
        runs = programs.advance(runs, int(boundary) - done)
        done = int(boundary)
        runs, averages = programs.take_metrics(runs)
        found, visited = np.asarray(programs.largest_reward(runs)) > SOLVED, places_visited(runs.state)
        metrics = dict(zip(programs.metric_names, np.asarray(averages).T, strict=True))
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, done)
        of_the_mode = np.asarray(programs.evaluate(runs, keys).episode_return)[:, 0]
        for seed in range(num_seeds):
            rows.append({
                "size": size, "method": method, "seed": seed, "env_steps": programs.agent.clock.env_steps_at(done),
                "return_of_mode": round(float(of_the_mode[seed]), 4), "solved": int(of_the_mode[seed] > SOLVED),
                "found": int(found[seed]), "visited": int(visited[seed]),
                "return_of_drawn": round(float(metrics["episode_return"][seed]), 5),
                "bonus": round(float(metrics["bonus"][seed]), 6) if "bonus" in metrics else np.nan,
            })  # fmt: skip
    return rows


# -- tables and figures -----------------------------------------------------------------------------------------------


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (size, method), group in results.groupby(["size", "method"], sort=False):
        last = group[group.env_steps == group.env_steps.max()]

        def first(where: pd.Series, group=group):
            """The median over seeds of the first time; none where half of them never got there."""
            steps = group[where].groupby("seed").env_steps.min().reindex(group.seed.unique()).fillna(np.inf)
            return steps.median()

        rows.append({
            "size": size, "method": method, "seeds": len(last), "env_steps": last.env_steps.iloc[0],
            "solved": round(last.solved.mean(), 3), "found": round(last.found.mean(), 3),
            "return_of_drawn": round(last.return_of_drawn.mean(), 3),
            "solved_at": first(group.solved == 1), "found_at": first(group.found == 1),
        })  # fmt: skip
    order = {method: number for number, method in enumerate(METHODS)}
    return pd.DataFrame(rows).sort_values(["size", "method"], key=lambda x: x.map(order) if x.name == "method" else x)


def draw(summary: pd.DataFrame, path: Path) -> None:
    """Share of seeds solved against size, one line per method."""
    figure = plotting._figure(width=6.2, height=4.0)
    axes = figure.subplots()
    plotting._style(axes)
    for number, (method, group) in enumerate(summary.groupby("method", sort=False)):
        colour, beside = plotting.COLOURS[number], 0.15 * (number - 1)  # lines that coincide stay visible
        axes.plot(group["size"] + beside, group.solved, "o-", color=colour, linewidth=2.2, label=method)
    axes.set_xlabel("size of the sea, steps of an episode")
    axes.set_ylabel("share of seeds solved")
    axes.set_ylim(-0.04, 1.04)
    sizes = sorted(summary["size"].unique())
    axes.set_xticks(sizes)
    axes.set_xlim(sizes[0] - 2, sizes[-1] + 2)
    axes.legend(frameon=False)
    plotting._title(axes, "DeepSea", f"{summary.seeds.max()} seeds; the mode of the last policy")
    plotting._saved(figure, path)


def draw_exploration(results: pd.DataFrame, path: Path) -> None:
    """Share of places visited, and the bonus, over episodes: a line for each size, means over seeds."""
    figure = plotting._figure(width=9.0, height=3.8)
    labels = "share of places visited", "bonus of what was sampled"
    for axes, label in zip(figure.subplots(1, 2), labels, strict=True):
        plotting._style(axes)
        for colour, (size, group) in zip(plotting.COLOURS, results.groupby("size"), strict=False):
            means = group.groupby("env_steps")[["visited", "bonus"]].mean()
            values = means.bonus if label == labels[1] else means.visited / (size * (size + 1) / 2)
            axes.plot(means.index / size, values, color=colour, linewidth=2.2, label=f"{size} x {size}")
        axes.set_xlabel("episodes")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    plotting._title(figure.axes[0], "PE-DQN in DeepSea", f"mean of {results.seed.nunique()} seeds")
    plotting._saved(figure, path)


if __name__ == "__main__":
    tyro.cli(main)

"""How deep can they dive? PPO, RND and DRND on DeepSea of growing size, whose only reward random actions miss.

In DeepSea of size N an episode has N steps. One way out of 2^N, an action "right" at each step, leads to a reward of 1,
and every step on it costs 0.01 / N; which of the two actions is "right" differs from place to place.

`results.csv` has a row per size, method, seed and time: environment steps, the return of the policy's mode (the
environment is deterministic, so one episode says it), whether it is `solved` (above 0.9 of 0.99), whether the reward
was ever `found` in training, the mean return of the episodes since the last row, in which actions are drawn, and for
RND and DRND the mean bonus, before it is scaled. `summary.csv`: the shares of seeds that have solved the sea and found
the reward at the end, and the medians of the times when they first had. All methods have the same rollouts, networks
and step sizes; the budget is `steps_per_cell` times N x N.

    python experiments/deep_sea/run.py
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import problem, training

HERE = Path(__file__).parent
METHODS = {
    "PPO": ("ppo", {}),
    "RND": ("rnd", {}),
    "DRND": ("drnd", {}),
    "DRND, rate": ("drnd", {"bonus_count": "rate"}),
}
SOLVED = 0.9


def main(
    sizes: tuple[int, ...] = (10, 20, 30), methods: tuple[str, ...] = ("PPO", "RND", "DRND"), num_seeds: int = 8,
    steps_per_cell: int = 1_000, evaluations: int = 30, out: Path = HERE,
) -> None:  # fmt: skip
    """Train everything and write the tables and the figure.

    Args:
        sizes: N of each sea.
        methods: which methods.
        num_seeds: seeds per method, trained together.
        steps_per_cell: environment steps in parts of N x N.
        evaluations: how often each is looked at.
        out: folder to write to.
    """
    cli.spread_over_cores()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    rows, seconds = [], {}
    for size in sizes:
        for method in methods:
            before = time.perf_counter()
            rows += trained(size, method, num_seeds, steps_per_cell * size**2, evaluations)
            seconds[f"{method}, {size}"] = round(time.perf_counter() - before)
            last = pd.DataFrame(rows[-num_seeds:])
            print(f"{method} on {size} x {size}: {last.solved.mean():.2f} solved", seconds, flush=True)
    results = pd.DataFrame(rows)
    results.to_csv(out / "results.csv", index=False)
    summary = summarise(results)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    draw(summary, out / "figure.png")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "seconds_each": seconds, "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
        "settings": {method: settings(method)[1] for method in methods},
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def settings(method: str):
    """The algorithm's module, and its settings: those of RND's preset where it has them."""
    name, own = METHODS[method]
    module, of_rnd = cli.find_algorithm(name), cli.find_algorithm("rnd")
    shared = problem.split_preset(of_rnd.PRESETS["DeepSea-bsuite"])[1]
    shared |= {field: getattr(of_rnd.Config(), field) for field in ("clip_values", "num_epochs", "num_minibatches")}
    shared |= problem.split_preset(module.PRESETS.get("DeepSea-bsuite", {}))[1] | own
    return module, {field: value for field, value in shared.items() if hasattr(module.Config(), field)}


def trained(size: int, method: str, num_seeds: int, total_steps: int, evaluations: int) -> list[dict]:
    """Rows of `results.csv` of all seeds."""
    from jaxrl_dist import envs

    module, values = settings(method)
    env, params = envs.make("DeepSea-bsuite", size=size)
    programs = training.Programs(
        module.make_agent, module.Config(**values), env, params, num_runs=num_seeds, eval_episodes=1
    )
    keys = jax.random.split(jax.random.key(0), num_seeds)
    runs, done, rows = programs.begin(keys), 0, []
    for boundary in np.round(np.linspace(0, programs.agent.clock.iterations(total_steps), evaluations + 1))[1:]:
        runs = programs.advance(runs, int(boundary) - done)
        done = int(boundary)
        runs, averages = programs.take_metrics(runs)
        found = np.asarray(programs.largest_reward(runs)) > SOLVED
        metrics = dict(zip(programs.metric_names, np.asarray(averages).T, strict=True))
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, done)
        of_the_mode = np.asarray(programs.evaluate(runs, keys).episode_return)[:, 0]
        for seed in range(num_seeds):
            rows.append({
                "size": size, "method": method, "seed": seed, "env_steps": programs.agent.clock.env_steps_at(done),
                "return_of_mode": round(float(of_the_mode[seed]), 4), "solved": int(of_the_mode[seed] > SOLVED),
                "found": int(found[seed]),
                "return_of_drawn": round(float(metrics["episode_return"][seed]), 5),
                "bonus": round(float(metrics["bonus"][seed]), 6) if "bonus" in metrics else "",
            })  # fmt: skip
    return rows


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
    return pd.DataFrame(rows)


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


if __name__ == "__main__":
    tyro.cli(main)

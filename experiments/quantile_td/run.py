"""When does learning quantiles estimate the *mean* better than learning the mean? TD against QTD, each at its best.

The comparison of "The Statistical Benefits of Quantile Temporal-Difference Learning for Value Estimation" (arXiv
2305.18388): three kinds of chains (a deterministic cycle, two random successors per state, all states with Dirichlet
chances) and four kinds of noise on the rewards (none, Gaussian, exponential, Student's t with 2 degrees of freedom).
Each seed draws a process of its own; both methods see the same processes and transitions, and each sweeps its own grid
of step sizes. The error is (V - exact V)^2, mean over states, after the last iteration.

    results.csv   transition, noise, method, step_size, seed, squared_error: every run
    curves.csv    the same without seeds: mean, its 95 % bootstrap interval [low, high], median
    summary.csv   per transition and noise: of each method the best step size, whether it lies at the edge of the grid
                  (then the grid is too narrow, or nothing is random), mean, interval and median of the error with it;
                  ratio, the mean of QTD over that of TD, with an interval over pairs of seeds, and median_ratio

    python experiments/quantile_td/run.py

About five minutes on two cores with 40 seeds, a quarter of an hour with 120; the time of a run is in run.json.
"""

import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.algorithms.dynamic_programming.quantile_td import (
    NOISES,
    TRANSITIONS,
    Config,
    Sweep,
    compare,
    ratio_interval,
)
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID
from jaxrl_dist.records.recording import command_line, versions
from jaxrl_dist.records.statistics import bootstrap_interval

CELL = ["transition", "noise"]


@dataclass(frozen=True)
class Arguments:
    out: Path = Path(__file__).parent
    """Folder that receives results.csv, curves.csv, summary.csv, run.json and figure.png."""
    seeds: int = 40
    """Processes, each with one run per method and step size."""
    iterations: int = 1_000
    """Updates of every state."""
    quantiles: int = 128
    """m of QTD."""
    states: int = 5
    """States of the chain."""
    step_sizes: int = 11
    """Step sizes per method, each half of the one before: from 1 for TD, from 8 for QTD."""


# -- results ----------------------------------------------------------------------------------------------------------


def tidy(config: Config, sweeps: dict[str, Sweep]) -> pd.DataFrame:
    """One row per run of a cell."""
    frames = []
    for method, sweep in sweeps.items():
        seeds, count = sweep.errors.shape
        frames.append(pd.DataFrame({
            "transition": config.transition, "noise": config.noise, "method": method,
            "step_size": np.tile(sweep.step_sizes, seeds),
            "seed": np.repeat(config.first_seed + np.arange(seeds), count),
            "squared_error": sweep.errors.ravel(),
        }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def curves_of(results: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with its interval, and median, for every step size."""
    groups = results.groupby([*CELL, "method", "step_size"], sort=False).squared_error
    interval = groups.agg(lambda errors: bootstrap_interval(errors, np.mean))
    return pd.DataFrame({
        "mean": groups.mean(), "low": interval.str[0], "high": interval.str[1], "median": groups.median(),
    }).reset_index()  # fmt: skip


def summary_of(config: Config, sweeps: dict[str, Sweep]) -> dict:
    """Both methods at the step size with the smallest mean, and their ratio."""
    row = {"transition": config.transition, "noise": config.noise}
    for method, sweep in sweeps.items():
        low, high = bootstrap_interval(sweep.best_errors, np.mean)
        row |= {
            f"{method}_step_size": sweep.step_sizes[sweep.best], f"{method}_at_edge": sweep.at_edge,
            f"{method}_mean": sweep.best_errors.mean(), f"{method}_low": low, f"{method}_high": high,
            f"{method}_median": np.median(sweep.best_errors),
        }  # fmt: skip
    td, qtd = sweeps["td"].best_errors, sweeps["qtd"].best_errors
    low, high = ratio_interval(qtd, td)
    return row | {
        "ratio": qtd.mean() / td.mean(), "ratio_low": low, "ratio_high": high,
        "median_ratio": np.median(qtd) / np.median(td), "seeds": len(td),
    }  # fmt: skip


# -- figure -----------------------------------------------------------------------------------------------------------

LOOKS = {"td": (COLOURS[0], "o", "TD"), "qtd": (COLOURS[1], "D", "QTD")}
FLOOR = 1e-8
"""Errors below it, of TD where nothing is random, are rounding; they are drawn here."""


def draw(curves: pd.DataFrame, summary: pd.DataFrame, path: Path) -> None:
    """Error against step size, one panel per cell; a ring marks the best step size of each method."""
    figure = Figure(figsize=(13, 9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(TRANSITIONS), len(NOISES), sharex=True, squeeze=False)
    for row, transition in zip(panels, TRANSITIONS, strict=True):
        for axes, noise in zip(row, NOISES, strict=True):
            cell = curves[(curves.transition == transition) & (curves.noise == noise)]
            best = summary[(summary.transition == transition) & (summary.noise == noise)].iloc[0]
            for method, (colour, marker, name) in LOOKS.items():
                line = cell[cell.method == method]
                mean, low, high = (np.maximum(line[column], FLOOR) for column in ("mean", "low", "high"))
                axes.plot(line.step_size, mean, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
                axes.fill_between(line.step_size, low, high, color=colour, alpha=0.2, linewidth=0)
                at = best[f"{method}_step_size"], max(best[f"{method}_mean"], FLOOR)
                axes.plot(*at, "o", markersize=11, fillstyle="none", color=colour)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{transition}, noise {noise}", loc="left", fontsize=10)
            ratio = f"QTD / TD {best.ratio:.2g} [{best.ratio_low:.2g}, {best.ratio_high:.2g}]"
            axes.text(0.5, 0.97, ratio, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=FAINT)
            axes.margins(y=0.15)
            axes.grid(color=GRID, linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("step size (of QTD in units of return)")
    for axes in panels[:, 0]:
        axes.set_ylabel("squared error of the value")
    panels[0, 0].legend(frameon=False, loc="lower left", fontsize=9)
    title = "Value estimation by means (TD) and by quantiles (QTD)"
    note = f"mean over {summary.seeds.iloc[0]} processes and its 95 % bootstrap interval; rings: best step size"
    figure.suptitle(f"{title}\n{note}", x=0.01, ha="left", fontsize=12)
    figure.savefig(path, dpi=150)


# -- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Sweep every cell, write the results and the figure."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, runs, rows = time.perf_counter(), [], []
    for transition in TRANSITIONS:
        for noise in NOISES:
            config = Config(
                transition=transition, noise=noise, seeds=arguments.seeds, iterations=arguments.iterations,
                quantiles=arguments.quantiles, states=arguments.states, step_sizes=arguments.step_sizes,
            )  # fmt: skip
            sweeps = compare(config)
            runs.append(tidy(config, sweeps))
            rows.append(summary_of(config, sweeps))
            edges = [method for method, sweep in sweeps.items() if sweep.at_edge]
            warning = f"; best step size at the edge of the grid: {', '.join(edges)}" if edges else ""
            line = f"ratio {rows[-1]['ratio']:.3g} [{rows[-1]['ratio_low']:.3g}, {rows[-1]['ratio_high']:.3g}]{warning}"
            print(f"{time.perf_counter() - started:6.0f} s  {transition:6} {noise:11} {line}", flush=True)
    results, summary = pd.concat(runs, ignore_index=True), pd.DataFrame(rows)
    curves = curves_of(results)
    for name, frame in (("results", results), ("curves", curves), ("summary", summary)):
        frame.to_csv(arguments.out / f"{name}.csv", index=False, float_format="%.6g")
    record = {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started),
        "seeds": arguments.seeds,
        "iterations": arguments.iterations,
        "quantiles": arguments.quantiles,
        "states": arguments.states,
        "step_sizes": arguments.step_sizes,
        "discount": Config.discount,
        "versions": versions(),
    }
    (arguments.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(curves, summary, arguments.out / "figure.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

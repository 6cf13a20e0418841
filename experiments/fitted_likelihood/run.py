"""How far from the truth are return laws fitted to logged data, by model and by the amount of data?

The question of the experiments in "Distributional Offline Policy Evaluation with Predictive Error Guarantees" (FLE,
arXiv 2302.09456), on its combination lock of ten steps. A Gaussian mixture fitted by maximum likelihood (FLE) stands
against a categorical and a quantile law, fitted backwards in the same way, for scalar returns; for returns in the plane
(a ring for success, a blob for failure) the mixture stands alone. Each run draws its own data set.

results.csv has one row per run and step h, for the law of the return of (latent 0, h, action 0):

    model, dimension, samples    what was fitted, of what returns, to how many transitions per step and hidden state;
                                 the model `truth` draws from the law itself: what is left of the errors at best
    seed, step                   the run, and h (10 steps; the error compounds from step 9 back to step 0)
    total_variation              after binning: 70 bins on [-1.5, 1.5], in the plane 30 x 30 on [-4, 4]^2
    wasserstein_1                of the return; in the plane of its distance from the origin
    success, exact_success       share of samples that look like a success, and what it should be

summary.csv: step 0 alone, mean over the seeds with 95 % bootstrap intervals.

    python experiments/fitted_likelihood/run.py

takes about ten minutes on two cores.
"""

import datetime
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.algorithms.dynamic_programming import fitted_likelihood as fle
from jaxrl_dist.envs import comb_lock
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK
from jaxrl_dist.records.recording import command_line, versions
from jaxrl_dist.records.statistics import bootstrap_interval

HERE = Path(__file__).parent
# Step sizes, gradient steps and atoms: the baselines' are the official code's, but for 50 quantiles where it has 100.
MODELS = {
    "mixture": fle.Config(model="mixture", learning_rate=1e-3, iterations=2_000),
    "categorical": fle.Config(model="categorical", learning_rate=1e-2, iterations=200),
    "quantile": fle.Config(model="quantile", learning_rate=1e-3, iterations=1_000, num_atoms=50),
}
RING = fle.Config(dimension=2, learning_rate=1e-3, iterations=2_000, initial_spread=1.5)
LABELS = {"mixture": "Gaussian mixture (FLE)", "categorical": "categorical", "quantile": "quantiles"}
COLOUR = dict(zip(MODELS, COLOURS, strict=False))
MEASURES = ("total_variation", "wasserstein_1", "success")
HORIZON = comb_lock.CombLock().horizon
EXACT = [comb_lock.success_probability(comb_lock.CORRECT, horizon=HORIZON, step=step) for step in range(HORIZON)]


@dataclass(frozen=True)
class Arguments:
    out: Path = HERE
    """Folder that receives results.csv, summary.csv, figure.png and run.json."""
    seeds: int = 5
    """Independent data sets and fits of every setting, at least 2."""
    sizes: tuple[int, ...] = (250, 1_000, 4_000)
    """Transitions per step and hidden state."""
    ring_size: int = 4_000
    """The same for returns in the plane."""
    shorten: int = 1
    """Divides the gradient steps of every fit: above 1 only to try the script."""


# -- runs -------------------------------------------------------------------------------------------------------------


def fitted_samples(config: fle.Config, arguments: Arguments) -> np.ndarray:
    """Samples of the fitted laws, `[seeds, horizon, draws, dimension]`, all seeds in one program."""
    config = replace(config, iterations=max(1, config.iterations // arguments.shorten))
    keys = jax.vmap(jax.random.key)(np.arange(arguments.seeds))
    run = jax.jit(jax.vmap(fle.estimate, in_axes=(0, None)))
    return jax.device_get(run(keys, config)[0])


def true_samples(dimension: int, arguments: Arguments) -> np.ndarray:
    """As many samples of the laws themselves, of the same shape."""
    key = jax.random.key(1_000_000)  # far from the seeds of the data
    draws = [
        comb_lock.sample_returns(jax.random.fold_in(key, number), success, fle.Config().draws, dimension)
        for number, success in enumerate(EXACT * arguments.seeds)
    ]
    return np.stack(draws).reshape(arguments.seeds, HORIZON, -1, dimension)


def measure(samples: np.ndarray, model: str, size: int) -> pd.DataFrame:
    """The errors of samples `[seeds, horizon, draws, dimension]`: a tidy frame, one row per seed and step."""
    rows = []
    for seed, laws in enumerate(samples):
        for step, (law, exact) in enumerate(zip(laws, EXACT, strict=True)):
            about = {"model": model, "dimension": law.shape[-1], "samples": size, "seed": seed, "step": step}
            rows.append(about | fle.errors(law, exact) | {"exact_success": exact})
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Step 0: mean over the seeds of every measure, with its 95 % interval."""
    groups = results[results.step == 0].groupby(["dimension", "model", "samples"], sort=False)
    columns = {"seeds": groups.size()}
    for name in MEASURES:
        interval = groups[name].agg(_interval)
        columns |= {name: groups[name].mean(), f"{name}_low": interval.str[0], f"{name}_high": interval.str[1]}
    return pd.DataFrame(columns).reset_index()


def _interval(values: pd.Series) -> tuple[float, float]:
    return bootstrap_interval(values, statistic=np.mean)


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, summary: pd.DataFrame, laws: dict, ring: np.ndarray, truth: np.ndarray, path: Path):
    """Errors against the amount of data; below, what was learned: `laws` `{model: samples}`, `ring` and its truth."""
    figure = Figure(figsize=(13.5, 8.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    _errors(axes[0, 0], summary, "total_variation", "total variation (70 bins)")
    _errors(axes[0, 1], summary, "wasserstein_1", "Wasserstein-1")
    axes[0, 0].legend(frameon=False, fontsize=9)
    _steps(axes[0, 2], results)
    _densities(axes[1, 0], laws)
    for panel, samples, title in ((axes[1, 1], truth, "ring: truth"), (axes[1, 2], ring, "ring: mixture of 10")):
        panel.scatter(*samples[:3_000].T, s=2, color=INK, alpha=0.35, linewidth=0)
        panel.set(xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xlabel="first reward", ylabel="second reward")
        panel.set_title(title, loc="left", fontsize=11)
    for panel in axes.flat:
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    seeds = results.seed.nunique()
    figure.suptitle(
        f"Return laws of the combination lock, fitted backwards to logged data ({seeds} seeds; bars and bands: 95 %)",
        x=0.01, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=160)


def _errors(axes: Axes, summary: pd.DataFrame, name: str, label: str) -> None:
    """One measure at step 0 against the number of transitions; dashed: samples of the truth."""
    flat = summary[summary.dimension == 1]
    for model, colour in COLOUR.items():
        rows = flat[flat.model == model]
        bars = np.stack([rows[name] - rows[f"{name}_low"], rows[f"{name}_high"] - rows[name]])
        axes.errorbar(rows.samples, rows[name], bars, color=colour, marker="o", capsize=3, label=LABELS[model])
    floor = flat[flat.model == "truth"][name].iloc[0]
    axes.axhline(floor, color=FAINT, linestyle="--", linewidth=1, label="samples of the truth")
    axes.set_xscale("log")
    sizes = sorted(flat[flat.model != "truth"].samples.unique())
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("transitions per step and hidden state")
    axes.set_title(label + ", step 0", loc="left", fontsize=11)


def _steps(axes: Axes, results: pd.DataFrame) -> None:
    """Success probability by step, with the most data: how the error compounds on the way back."""
    flat = results[(results.dimension == 1) & (results.model != "truth")]
    flat = flat[flat.samples == flat.samples.max()]
    for model, colour in COLOUR.items():
        table = flat[flat.model == model].pivot(index="step", columns="seed", values="success")
        bounds = np.array([_interval(row) for _, row in table.iterrows()])
        axes.fill_between(table.index, *bounds.T, color=colour, alpha=0.2, linewidth=0)
        axes.plot(table.index, table.mean(axis=1), color=colour, marker="o", markersize=4)
    axes.plot(range(HORIZON), EXACT, color=INK, linestyle="--", label="exact")
    axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("step h")
    axes.set_title(f"success probability, {flat.samples.max():,} transitions", loc="left", fontsize=11)


def _densities(axes: Axes, laws: dict[str, np.ndarray]) -> None:
    """Histograms of one run's laws at step 0 and the exact density, on the bins of the total variation."""
    edges = fle.BINS[1]
    for model, samples in laws.items():
        density = np.histogram(samples, edges)[0] / len(samples) / np.diff(edges)
        axes.stairs(density, edges, color=COLOUR[model], linewidth=1.4)
    values = np.linspace(-1.5, 1.5, 601)
    axes.plot(values, comb_lock.return_density(EXACT[0], values), color=INK, linestyle="--", linewidth=1.2)
    axes.set_xlabel("return")
    axes.set_title("density at step 0, seed 0, most data", loc="left", fontsize=11)


# -- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Run every setting and write the results."""
    if arguments.seeds < 2:
        raise ValueError(f"seeds is {arguments.seeds}, allowed: 2 and above, for the intervals")
    if arguments.shorten < 1 or min(*arguments.sizes, arguments.ring_size) < 1:
        raise ValueError("shorten, sizes and ring_size must be 1 and above")
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, frames, laws = time.perf_counter(), [], {}

    def add(samples: np.ndarray, model: str, size: int) -> None:
        frames.append(measure(samples, model, size))
        means = frames[-1].query("step == 0")[list(MEASURES)].mean()
        text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        dimension = samples.shape[-1]
        print(f"{time.perf_counter() - started:5.0f} s  {dimension}-D {model:11} {size:6}  {text}", flush=True)

    for dimension in (1, 2):
        truth = true_samples(dimension, arguments)
        add(truth, "truth", 0)
    for size in arguments.sizes:
        for model, config in MODELS.items():
            samples = fitted_samples(replace(config, samples=size), arguments)
            add(samples, model, size)
            if size == max(arguments.sizes):
                laws[model] = samples[0, 0]
    ring = fitted_samples(replace(RING, samples=arguments.ring_size), arguments)
    add(ring, "mixture", arguments.ring_size)

    results = pd.concat(frames, ignore_index=True)
    summary = summarise(results)
    results.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    summary.to_csv(arguments.out / "summary.csv", index=False, float_format="%.6g")
    record = {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started),
        "seeds": arguments.seeds,
        "sizes": arguments.sizes,
        "ring_size": arguments.ring_size,
        "shorten": arguments.shorten,
        "versions": versions(),
    }
    (arguments.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(results, summary, laws, ring[0, 0], truth[0, 0], arguments.out / "figure.png")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

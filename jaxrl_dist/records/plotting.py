"""Figures of a run: learning curves with their uncertainty, learned against observed return distributions.

Drawn with matplotlib's objects alone, no pyplot: no window opens, and the backend and settings of a notebook stay as
they are. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator

from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.metrics import wasserstein_1
from jaxrl_dist.records import recording
from jaxrl_dist.records.statistics import bootstrap_interval, interquartile_mean

# What a column that says where a run stands is called (`recording.axis_of`).
STEPS = {"env_steps": "environment steps", "updates": "updates"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
INK, FAINT, GRID = "#1F2328", "#6B7280", "#E5E7EB"


def learning_curve(
    frames: Mapping[str, pd.DataFrame],
    path: Path | None = None,
    *,
    title: str,
    metric: str = "evaluation_return",
    linear_up_to: float | None = None,
    diverged: Mapping[str, pd.DataFrame] | None = None,
) -> Figure:
    """Interquartile mean over seeds against env steps, with the 95 % bootstrap interval, one curve per run.

    frames: label of a run to its `read_metrics`; values that are missing or not finite are left out. A single run shows
    its seeds as thin lines too; a log point with one seed has no interval. path: where to save (the suffix names the
    format), None only returns the figure. linear_up_to: beyond this magnitude the metric's axis is logarithmic.
    diverged: `recording.divergences` of the runs, if not those of the frames; a cross marks where each happened. Raises
    ValueError when a frame has no such metric, or no value of it and no seed that diverged.
    """
    if not frames:
        raise ValueError("frames is empty: there is nothing to draw")
    diverged = diverged or {label: recording.divergences(frame) for label, frame in frames.items()}
    axis = {label: recording.axis_of(frame) for label, frame in frames.items()}
    curves = {label: _by_seed(label, frame, metric, axis[label], diverged[label]) for label, frame in frames.items()}
    figure = _figure(width=7.2, height=4.3)
    axes = figure.subplots()
    _style(axes)
    ends = []
    for number, (label, returns) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        dashes = ("-", "--", ":")[number // len(COLOURS) % 3]
        steps = returns.index.to_numpy()
        scores = [row[~np.isnan(row)] for row in returns.to_numpy()]
        centre = np.array([interquartile_mean(row) for row in scores])
        if len(curves) == 1 and returns.shape[1] > 1:
            for seed in returns:
                line = returns[seed].dropna()
                axes.plot(line.index, line, color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        intervals = np.array([bootstrap_interval(row) if len(row) > 1 else (np.nan, np.nan) for row in scores])
        intervals = intervals.reshape(-1, 2)  # of no log point at all too
        axes.fill_between(steps, *intervals.T, color=colour, alpha=0.2, linewidth=0, zorder=1)
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, centre, dashes, color=colour, linewidth=2.2, marker=marker, zorder=3, solid_capstyle="round")
        for broken in diverged[label].rename(columns={axis[label]: "step"}).itertuples():
            line = returns[broken.seed].dropna() if broken.seed in returns else ()
            on_line = len(line) > 0  # a seed without any value has its cross on the axis
            axes.plot(
                broken.step, np.interp(broken.step, line.index, line) if on_line else 0, "x", color=colour,
                markersize=8, markeredgewidth=2, zorder=4, clip_on=False,
                transform=axes.transData if on_line else axes.get_xaxis_transform(),
            )  # fmt: skip
        if len(steps):
            ends.append((steps[-1], centre[-1], label, colour))
    last = [x for curve in curves.values() for x in curve.index[-1:]]
    axes.set_xlim(0, max(1, *last, *(x for label, broken in diverged.items() for x in broken[axis[label]])))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(" or ".join(name for column, name in STEPS.items() if column in axis.values()))
    axes.set_ylabel(metric.replace("_", " "))
    if linear_up_to is not None:
        axes.set_yscale("symlog", linthresh=linear_up_to)
    if len(curves) > 1:
        _label_ends(axes, ends)
    counts = sorted({int(count) for curve in curves.values() for count in curve.notna().sum(axis=1)} or {0})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    if counts[-1] == 0:
        note = "no seed has a finite value"
    elif counts[-1] == 1:
        note = "one seed, so no interval"
    else:
        note = f"interquartile mean of {seeds} seeds; band: 95 % bootstrap interval"
        note += "; thin lines: seeds" if len(curves) == 1 and not any(map(len, diverged.values())) else ""
    crosses = sum(map(len, diverged.values()))
    note += f"; crosses: {crosses} diverged" if crosses else ""  # the line has no room for more
    _title(axes, title, note)
    return _saved(figure, path)


def return_distribution(path: Path | None = None, *, predicted: Law, monte_carlo: np.ndarray, title: str) -> Figure:
    """Learned distribution function of the return against that of Monte-Carlo returns, one panel per state.

    predicted: a law, `[states, atoms]` in any order; monte_carlo: `[states, episodes]` returns of episodes that started
    there, under the policy and the discount of the prediction. Each panel says the Wasserstein-1 distance, which is the
    area shaded, and the difference of the means (learned less observed). path: as for `learning_curve`. Raises
    ValueError on unequal states, on other than two axes and on values that are not finite.
    """
    predicted = Law(*(np.asarray(part, np.float64) for part in predicted))
    monte_carlo = np.asarray(monte_carlo, np.float64)
    for name, values in (("predicted", predicted.atoms), ("masses", predicted.masses), ("monte_carlo", monte_carlo)):
        if values.ndim != 2 or values.size == 0:
            raise ValueError(f"{name} has shape {values.shape}, but must be [states, samples] and not empty")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds {np.sum(~np.isfinite(values))} values that are not finite")
    states = len(predicted.atoms)
    if states != len(monte_carlo):
        raise ValueError(f"predicted has {states} states, but monte_carlo has {len(monte_carlo)}")

    columns = min(states, 4 if states != 6 else 3)
    rows = math.ceil(states / columns)
    learned_colour, observed_colour = COLOURS[1], COLOURS[0]
    figure = _figure(width=max(2.8 * columns, 6.7), height=2.5 * rows + 1.1)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, atoms, masses, observed, number in zip(panels, *predicted, monte_carlo, range(states), strict=False):
        _style(axes)
        # Atoms without mass would only widen the axis.
        learned = Law(atoms[masses > 1e-3 / len(masses)], masses[masses > 1e-3 / len(masses)])
        low, high = min(learned.atoms.min(), observed.min()), max(learned.atoms.max(), observed.max())
        margin = 0.06 * (high - low) or 1.0
        grid = np.unique(np.concatenate([learned.atoms, observed, [low - margin, high + margin]]))
        order = np.argsort(learned.atoms)
        cumulated = np.concatenate([[0], np.cumsum(learned.masses[order])])
        learned_cdf = cumulated[np.searchsorted(learned.atoms[order], grid, side="right")]
        observed_cdf = np.searchsorted(np.sort(observed), grid, side="right") / len(observed)
        between = axes.fill_between(grid, learned_cdf, observed_cdf, step="post", color=INK, alpha=0.12, linewidth=0)
        (blue,) = axes.step(grid, observed_cdf, where="post", color=observed_colour, linewidth=1.8)
        (red,) = axes.step(grid, learned_cdf, where="post", color=learned_colour, linewidth=1.8)
        axes.set_xlim(grid[0], grid[-1])
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.5, 1])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"state {number + 1}", loc="left", fontsize=10, color=INK)
        distance = wasserstein_1(Law(atoms, masses), observed)
        numbers = f"W₁ {_short(distance)}   Δmean {_short((atoms * masses).sum() - observed.mean())}"
        axes.set_title(numbers, loc="right", fontsize=8.5, color=FAINT)
    for axes in panels[states:]:
        axes.set_axis_off()
    for axes in panels[max(0, states - columns) : states]:
        axes.set_xlabel("return")
    for axes in panels[:states:columns]:
        axes.set_ylabel("cumulative probability")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    entries = {red: "learned", blue: "Monte Carlo", between: "area W₁ (Δmean: learned less Monte Carlo)"}
    figure.legend(
        entries.keys(), entries.values(), loc="outside lower left", ncols=3, frameon=False, fontsize=9.5, labelcolor=INK
    )
    return _saved(figure, path)


def joint_distribution(
    path: Path | None = None, *, predicted: np.ndarray, monte_carlo: np.ndarray, title: str
) -> Figure:
    """Learned particles of a vector of returns among Monte-Carlo vectors, the first two components, a panel per state.

    predicted: `[states, particles, rewards]`; monte_carlo: `[states, episodes, rewards]`, as for `return_distribution`.
    Each panel says both correlations. path: as for `learning_curve`. Raises ValueError on other axes, on fewer than two
    rewards and on values that are not finite.
    """
    predicted, monte_carlo = np.asarray(predicted, np.float64), np.asarray(monte_carlo, np.float64)
    for name, values in (("predicted", predicted), ("monte_carlo", monte_carlo)):
        if values.ndim != 3 or values.size == 0 or values.shape[-1] < 2:
            raise ValueError(f"{name} has shape {values.shape}, but must be [states, samples, 2 or more rewards]")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} holds {np.sum(~np.isfinite(values))} values that are not finite")
    states = len(predicted)
    if states != len(monte_carlo):
        raise ValueError(f"predicted has {states} states, but monte_carlo has {len(monte_carlo)}")

    columns = min(states, 4 if states != 6 else 3)
    rows = math.ceil(states / columns)
    figure = _figure(width=max(2.8 * columns, 6.7), height=2.6 * rows + 1.1)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, learned, observed, number in zip(panels, predicted, monte_carlo, range(states), strict=False):
        _style(axes)
        blue = axes.scatter(*observed.T[:2], s=9, color=COLOURS[0], alpha=0.35, linewidths=0)
        red = axes.scatter(*learned.T[:2], s=16, color=COLOURS[1], linewidths=0.6, edgecolors="white")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(f"state {number + 1}", loc="left", fontsize=10, color=INK)
        said = f"correlation {_correlation(learned)}, Monte Carlo {_correlation(observed)}"
        axes.set_title(said, loc="right", fontsize=8.5, color=FAINT)
    for axes in panels[states:]:
        axes.remove()
    for axes in panels[max(0, states - columns) : states]:
        axes.set_xlabel("return of the first reward")
    for axes in panels[:states:columns]:
        axes.set_ylabel("of the second")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    entries = {red: "learned", blue: "Monte Carlo"}
    figure.legend(
        entries.keys(), entries.values(), loc="outside lower left", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK
    )
    return _saved(figure, path)


def _correlation(vectors: np.ndarray) -> str:
    deviations = vectors[:, :2].std(0)
    # What does not vary, rounding apart, goes with nothing.
    if (deviations <= 1e-5 * (1 + np.abs(vectors[:, :2]).max(0))).any():
        return "none"
    return f"{np.corrcoef(vectors[:, 0], vectors[:, 1])[0, 1]:.2f}"


def ranking(
    table: pd.DataFrame, fields: Sequence[str], path: Path | None = None, *, title: str, metric: str, most: int = 20
) -> Figure:
    """Configurations of a study from best to worst, each with its interval: `table` is that of `sweeps.ranking`.

    Only the best `most` are drawn; the note says of how many. Where halving stopped some earlier, each row says after
    how many steps, and a colour stands for one rung. Where seeds diverged, a row has a cross for its dot and says how
    many. path: as for `learning_curve`.
    """
    shown = table.head(most)
    figure = _figure(width=7.2, height=1.4 + 0.32 * len(shown))
    axes = figure.subplots()
    _style(axes)
    heights = -np.arange(len(shown))
    labels = ["  ".join(f"{field} {_value(row[field])}" for field in fields) for _, row in shown.iterrows()]
    colours = [COLOURS[0]] * len(shown)
    if "rung" in shown:
        colours = [COLOURS[(table.rung.max() - rung) % len(COLOURS)] for rung in shown.rung]
        stopped = map(EngFormatter(sep="").format_data, shown["env_steps" if "env_steps" in shown else "updates"])
        labels = [f"{label}  ({steps} steps)" for label, steps in zip(labels, stopped, strict=True)]
    broken = _diverged(shown)
    labels = [
        f"{label}  ({count:.0f} diverged)" if count else label for label, count in zip(labels, broken, strict=True)
    ]
    if "low" in shown:
        axes.hlines(heights, shown.low, shown.high, color=colours, linewidth=5, alpha=0.3)
    for marker, rows in (("o", broken == 0), ("x", broken > 0)):
        axes.scatter(shown[metric][rows], heights[rows], color=np.array(colours)[rows], marker=marker)
    axes.set_yticks(heights, labels)
    axes.set_ylim(heights[-1] - 0.5, 0.5)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel(metric.replace("_", " "))
    note = "interquartile mean over seeds, 95 % bootstrap interval" if "low" in shown else "one seed, so no interval"
    _title(axes, title, note + (f"; the best {most} of {len(table)}" if len(table) > most else ""))
    return _saved(figure, path)


def response(
    table: pd.DataFrame, fields: Sequence[str], path: Path | None = None, *, title: str, metric: str
) -> Figure:
    """The score of every configuration against each swept field, and its median at each value.

    `table` is that of `sweeps.ranking`; one panel per field. A field whose values spread over a factor of 20 or more
    has a logarithmic axis, one that is no number has its values side by side. Configurations with diverged seeds are
    crosses. path: as for `learning_curve`.
    """
    columns = min(len(fields), 3)
    rows = math.ceil(len(fields) / columns)
    figure = _figure(width=max(3.4 * columns, 6.2), height=2.7 * rows + 0.9)  # at least as wide as the note
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    broken = _diverged(table)
    for axes, field in zip(panels, fields, strict=False):
        _style(axes)
        numeric = pd.api.types.is_numeric_dtype(table[field])
        names = sorted(table[field].unique())
        places = table[field].to_numpy() if numeric else np.array([names.index(value) for value in table[field]])
        if not numeric:
            axes.set_xticks(range(len(names)), names)
            axes.set_xlim(-0.5, len(names) - 0.5)
        elif places.min() > 0 and places.max() >= 20 * places.min():
            axes.set_xscale("log")
        if "low" in table:
            axes.vlines(places, table.low, table.high, color=COLOURS[0], linewidth=1.2, alpha=0.35)
        for marker, rows in (("o", broken == 0), ("x", broken > 0)):
            axes.plot(places[rows], table[metric][rows], marker, color=COLOURS[0], markersize=4)
        medians = pd.Series(table[metric].to_numpy()).groupby(places).median()
        axes.plot(medians.index, medians, color=COLOURS[1], linewidth=1.8)
        axes.set_xlabel(field.replace("_", " "))
    for axes in panels[len(fields) :]:
        axes.set_axis_off()
    for axes in panels[: len(fields) : columns]:
        axes.set_ylabel(metric.replace("_", " "))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    note = "dots: configurations, IQM over seeds with 95 % interval; line: median of the dots at a value"
    note += "; cross: a seed diverged" if broken.any() else ""
    figure.supxlabel(note, fontsize=9, color=FAINT, x=0.01, ha="left")
    return _saved(figure, path)


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _diverged(table: pd.DataFrame) -> np.ndarray:
    """How many seeds of each configuration of `sweeps.ranking` diverged."""
    return table.get("diverged", pd.Series(0, table.index)).to_numpy()


def _by_seed(label: str, frame: pd.DataFrame, metric: str, axis: str, diverged: pd.DataFrame) -> pd.DataFrame:
    """The metric as `[steps, seeds]`, NaN where it is not finite, log points without any value left out; axis:
    `recording.axis_of`."""
    if metric not in frame or not pd.api.types.is_numeric_dtype(frame[metric]):
        numeric = list(frame.select_dtypes("number").columns)
        raise ValueError(f"run {label!r} has no metric {metric!r}, but {numeric}")
    rows = frame[[axis, "seed", metric]]
    rows = rows[np.isfinite(rows[metric])]
    if rows.empty and diverged.empty:
        raise ValueError(f"run {label!r} has no value of {metric!r} yet")
    if "configuration" in frame:
        raise ValueError(f"run {label!r} is a wave of a study, with several configurations; plot the study's folder")
    if rows.duplicated([axis, "seed"]).any():
        twice = rows[rows.duplicated([axis, "seed"])].iloc[0]
        raise ValueError(f"run {label!r} has seed {twice.seed:.0f} twice at {axis} {twice[axis]:.0f}")
    return rows.pivot(index=axis, columns="seed", values=metric).sort_index()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # the figure keeps it: a figure made without pyplot saves and shows itself
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, labelcolor=INK)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.yaxis.label.set(color=INK, fontsize=10)


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title + "\n", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color=FAINT)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label right of the axes in its curve's colour, moved as little as it takes not to overlap."""
    axes.set_ylim(axes.get_ylim())  # heights below are parts of the axes as they are now
    to_part = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    gap = 0.06
    # With the gaps taken out, the nearest heights in the right order are an isotonic regression: pool what is reversed.
    pools: list[list[float]] = []
    for rank, (step, height, _, _) in enumerate(ends):
        pools.append([to_part.transform((step, height))[1] - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    heights = np.concatenate([[np.mean(pool)] * len(pool) for pool in pools]) + gap * np.arange(len(ends))
    for (step, height, label, colour), part in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            xy=(step, height),
            xytext=(1.025, part),
            textcoords="axes fraction",
            color=colour,
            fontsize=10,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.6, "relpos": (0, 0.5)},
        )


def _short(value: float) -> str:
    """Three significant digits and no exponent, with the minus sign the axes have."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return Formatter.fix_minus(f"{value:.{min(max(digits, 0), 6)}f}")


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure

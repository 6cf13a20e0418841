"""One HTML page about runs that are over: curves, numbers with intervals, comparisons, settings, and what is amiss.

The page needs nothing but itself: pictures are inline SVG, styles are in it, there is no script. How algorithms are
compared over environments is that of Agarwal et al., arXiv 2108.13264.
"""

import datetime
import functools
import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from jaxrl_dist.records import plotting, recording, statistics
from jaxrl_dist.reports.compare import compared, said_of_many
from jaxrl_dist.reports.numbers import Estimate, digits_for, estimate, improvement, number
from jaxrl_dist.reports.page import PAGE
from jaxrl_dist.reports.runs import (
    NONE,
    Group,
    Run,
    differing,
    environments_of,
    found_amiss,
    grouped,
    listed,
    lowest_and_highest,
    read_all,
    read_bounds,
    show,
)
from jaxrl_dist.running.folders import require_output
from jaxrl_dist.wording import counted

# Settings that say where and under which name a run was kept; they make no run another experiment.
BOOKKEEPING = ("name", "runs_folder", "resume", "env_id", "env_options")
MANY_INTERVALS = (
    "{pairs} are looked at here at once, each with an interval of its own: where nothing differs, one bold pair in "
    "twenty is to be expected."
)
FIGURE_SIZE = (5.2, 3.9)  # inches: small enough that its letters can be read on a phone


def write(paths: Sequence[Path], out: Path, normalize: Path | None, console: Console) -> None:
    """Write the page about the runs in `paths` to `out`, and say on the console what is amiss with them.

    paths: folders of runs or studies, or the `.json` of runs as `experiments/learning_curves` keeps them. normalize: a
    JSON file `{environment: [low, high]}`, the returns whose normalized scores are 0 and 1. Raises ValueError on what
    is no run with evaluations and on an unusable `normalize`.
    """
    require_output(out)
    groups = grouped(read_all(paths))
    bounds = read_bounds(normalize, groups) if normalize else lowest_and_highest(groups)
    page = render(groups, bounds, normalize)
    out.write_text(page, encoding="utf-8")
    for warning in found_amiss(groups):
        console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _matrix(scores: Mapping[str, np.ndarray]) -> dict[str, list[Estimate | None]]:
    """Each label against each other one, None on the diagonal."""
    found: dict[tuple[str, str], Estimate] = {}
    labels = list(scores)
    for index, x in enumerate(labels):
        for y in labels[index + 1 :]:
            found[x, y] = improvement(scores[x], scores[y])
            value, low, high = found[x, y]
            found[y, x] = Estimate(1 - value, 1 - high, 1 - low)  # so that the two cells of a pair agree
    return {x: [found.get((x, y)) for y in labels] for x in labels}


def _by_environment(groups: Sequence[Group], environments: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Scores `[seeds, environments]` of the labels that ran on all of them, and what had to be left out.

    Where the numbers of seeds differ between environments, the first ones of each are taken.
    """
    found, left_out = {}, []
    for label in dict.fromkeys(group.label for group in groups):
        own = {group.environment: group.scores for group in groups if group.label == label}
        lacking = [environment for environment in environments if environment not in own]
        if lacking:
            left_out.append(f"{label} is left out: it did not run on {listed(lacking)}.")
            continue
        broken = [environment for environment in environments if len(own[environment]) == 0]
        if broken:
            left_out.append(f"{label} is left out: no seed has finite returns on {listed(broken)}.")
            continue
        counts = [len(own[environment]) for environment in environments]
        if len(set(counts)) > 1:
            left_out.append(f"{label} has {min(counts)} to {max(counts)} seeds; here the first {min(counts)} count.")
        found[label] = np.stack([own[environment][: min(counts)] for environment in environments], axis=1)
    return found, left_out


# -- the page ---------------------------------------------------------------------------------------------------------


def render(groups: Sequence[Group], bounds: Mapping[str, tuple[float, float]], normalize: Path | None) -> str:
    """The page as HTML. bounds: the returns that count as 0 and 1; environments without are not normalized."""
    page = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(PAGE)
    runs = [(group, run) for group in groups for run in group.runs]
    settings = [run.settings for _, run in runs]
    versions = [run.about.get("versions", {}) for _, run in runs]
    return page.render(
        algorithms=len({run.algorithm for _, run in runs}),
        environments=[_environment(groups, environment, bounds, normalize) for environment in environments_of(groups)],
        over_all=_over_all(groups, bounds, normalize),
        runs=[_run(group, run) for group, run in runs],
        details={group.label: group.detail for group in groups if group.detail},
        warnings=found_amiss(groups),
        normalization=_normalization(normalize),
        headers=[(f"{group.label} · {group.environment}", run.name) for group, run in runs],
        differing=_fields(settings, [name for name in differing(settings) if name not in BOOKKEEPING]),
        settings=_fields(settings, list(dict.fromkeys(name for each in settings for name in each))),
        versions=_fields(versions, list(dict.fromkeys(name for each in versions for name in each))),
        date=datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes"),
        command=recording.command_line(),
        number=number,
    )


def _normalization(normalize: Path | None) -> str:
    source = (
        f"the bounds in {normalize.name}" if normalize
        else "each environment's lowest and highest final score of any seed in this report. These bounds change with "
        "the runs given (--normalize FILE fixes them), so do not compare such scores between reports"
    )  # fmt: skip
    return f"A normalized score is (return - low) / (high - low), with low and high from {source}."


def _environment(groups, environment: str, bounds, normalize: Path | None) -> dict[str, Any]:
    own = [group for group in groups if group.environment == environment]
    low, high = bounds.get(environment, (math.nan, math.nan))
    rows = []
    for group in own:
        gap = None
        if environment in bounds:
            gap = estimate((group.scores - low) / (high - low), statistics.optimality_gap)
        returns, seeds = group.last_episodes.episode_return, sum(len(run.seeds) for run in group.runs)
        median, mean = (f(group.scores) if len(group.scores) else math.nan for f in (np.median, np.mean))
        rows.append({
            "label": group.label, "detail": group.detail, "iqm": estimate(group.scores),
            "median": median, "mean": mean, "gap": gap,
            "cvar": statistics.conditional_value_at_risk(returns, 0.1) if len(returns) else math.nan,
            "area": estimate(group.areas) if len(group.areas) else None,
            "seeds": len(group.scores), "env_steps": listed(sorted({f"{run.last_step:,}" for run in group.runs}))
            + (" updates" if group.unit == "updates" else ""),
            "diverged": f"{len(group.diverged)} of {seeds}" if len(group.diverged) else "0",
        })  # fmt: skip
    rows.sort(key=lambda row: (math.isnan(row["iqm"].value), -row["iqm"].value))
    digits = digits_for(max((abs(score) for group in own for score in group.scores), default=0))

    drawn = [group for group in own if len(group.curve) or len(group.diverged)]
    colours = _colours(groups, [group.label for group in drawn])
    ends = listed(f"{row['label']} {number(row['iqm'].value, digits)}" for row in rows)
    caption, svg = "No seed has finite returns.", None
    if drawn:
        figure = plotting.learning_curve(
            {_plain(group.label): group.curve for group in drawn}, title="",
            diverged={_plain(group.label): group.diverged for group in drawn},
        )  # fmt: skip
        note = figure.axes[0].texts[-1]  # its place is the caption, where long lines wrap
        steps = " or ".join(plotting.STEPS[unit] for unit in sorted({group.unit for group in drawn}))
        figure.axes[0].set_xlabel(steps)
        caption = f"Mean return of the evaluation episodes against {steps}, {note.get_text()}."
        note.remove()
        figure.axes[0].set_title("", loc="left")
        figure.set_size_inches(FIGURE_SIZE)
        svg = _svg(figure, f"Learning curves on {environment}; interquartile means at the end: {ends}", colours)
    if environment in bounds:
        scale = f"Normalized from low {low:g} and high {high:g}" + (f" ({normalize.name})." if normalize else ".")
    else:
        scale = "All seeds have the same final score, so there is nothing to normalize by and no optimality gap."
    return {
        "name": environment, "rows": rows, "digits": digits, "caption": caption, "scale": scale,
        "figure": svg, "any_diverged": any(len(group.diverged) for group in own),
        "matrix": _matrix(finite) if len(finite := {g.label: g.scores for g in own if len(g.scores)}) > 1 else None,
        "many": said_of_many(compared(own)),
    }  # fmt: skip


def _over_all(groups, bounds, normalize: Path | None) -> dict[str, Any] | None:
    """What is said over environments; None where there is one environment that was given no bounds."""
    environments = environments_of(groups)
    if len(environments) == 1 and not normalize:
        return None
    normalized = [environment for environment in environments if environment in bounds]
    raw, left_out = _by_environment(groups, environments)
    scores = {}
    if normalized:
        scores, left_out_here = _by_environment(groups, normalized)
        left_out = list(dict.fromkeys(left_out + left_out_here))
        lows, highs = np.array([bounds[environment] for environment in normalized]).T
        scores = {label: (each - lows) / (highs - lows) for label, each in scores.items()}
    rows = [
        {
            "label": label, "detail": next(group.detail for group in groups if group.label == label),
            "iqm": estimate(each), "mean": estimate(each, np.mean),
            "gap": estimate(each, statistics.optimality_gap), "seeds": len(each),
        }
        for label, each in scores.items()
    ]  # fmt: skip
    figure = None
    if scores:
        halves = {label: float(statistics.performance_profile(each, [0.5])[0]) for label, each in scores.items()}
        description = listed(f"{label} {half:.0%}" for label, half in halves.items())
        description = f"Performance profiles; runs with a normalized score above 0.5: {description}"
        figure = _svg(_profile(scores), description, _colours(groups, list(scores)))
    return {
        "environments": normalized, "left_out": left_out, "figure": figure,
        "not_normalized": [environment for environment in environments if environment not in bounds],
        "rows": sorted(rows, key=lambda row: -row["iqm"].value),
        # Of one environment the matrix stands in its own section.
        "matrix": _matrix(raw) if len(raw) > 1 and len(environments) > 1 else None,
        "many": MANY_INTERVALS.format(pairs=counted(math.comb(len(raw), 2), "pair")) if len(raw) > 2 else "",
    }  # fmt: skip


def _profile(scores: Mapping[str, np.ndarray]) -> Figure:
    """Fraction of runs above tau, one curve per label, with pointwise bands."""
    pooled = np.concatenate([each.ravel() for each in scores.values()])
    taus = np.linspace(min(0.0, pooled.min()), max(1.0, pooled.max()), 201)
    figure = Figure(figsize=FIGURE_SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    profile = functools.partial(statistics.performance_profile, taus=taus)
    for index, (label, each) in enumerate(scores.items()):
        colour = plotting.COLOURS[index % len(plotting.COLOURS)]
        dashes = ("-", "--", ":")[index // len(plotting.COLOURS) % 3]
        if len(each) > 1:
            band = statistics.bootstrap_interval(each, profile)
            axes.fill_between(taus, *band, color=colour, alpha=0.2, linewidth=0)
        axes.plot(taus, profile(each), dashes, color=colour, linewidth=2.2, label=_plain(label))
    axes.set_xlim(taus[0], taus[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("normalized score τ", color=plotting.INK)
    axes.set_ylabel("fraction of runs with a score above τ", color=plotting.INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(plotting.FAINT)
    axes.grid(color=plotting.GRID, linewidth=0.8)
    axes.tick_params(colors=plotting.FAINT, labelsize=9, labelcolor=plotting.INK)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9, labelcolor=plotting.INK)
    return figure


def _run(group: Group, run: Run) -> dict[str, Any]:
    about, found = run.about, {"seconds": math.nan, "steps": math.nan, "updates": math.nan}
    if run.metrics is not None and "seconds" in run.metrics and run.metrics.seconds.max() > 0:
        seconds, seeds = run.metrics.seconds.max(), run.metrics.seed.nunique()
        steps = run.metrics.env_steps.max() - run.metrics.env_steps.min()  # the clock starts after the warm-up
        found = {"seconds": seconds, "steps": seeds * steps / seconds, "updates": math.nan}
        if "updates" in run.metrics:
            found["updates"] = seeds * run.metrics.updates.max() / seconds
    versions = about.get("versions", {})
    device = f"{versions.get('devices', '')} x {versions.get('device_kind', '')}" if "device_kind" in versions else NONE
    return found | {
        "label": group.label, "environment": run.environment, "name": run.name, "seeds": len(run.seeds),
        "env_steps": run.last_step, "wall": about.get("wall_seconds") or math.nan, "device": device,
        "date": show(about.get("date", ...)), "command": show(about.get("command", ...)),
    }  # fmt: skip


def _fields(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    return [(name, [show(each.get(name, ...)) for each in settings]) for name in names]


def _colours(groups: Sequence[Group], labels: Sequence[str]) -> list[int]:
    """Which of the page's colours the curves of a figure have: a label's own, as long as there are enough for all."""
    known = list(dict.fromkeys(group.label for group in groups))
    if len(known) > len(plotting.COLOURS):
        return list(range(len(plotting.COLOURS)))
    return [known.index(label) for label in labels]


def _svg(figure: Figure, description: str, colours: Sequence[int]) -> Markup:
    """A figure as SVG inside of a page: letters as text, colours as variables of the page, names of its own."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    own = f"f{zlib.crc32(description.encode()):x}"
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}-", svg[svg.index("<svg") :])
    names = {"#ffffff": "surface", plotting.INK: "ink", plotting.FAINT: "faint", plotting.GRID: "grid"}
    names |= {colour: f"curve-{index}" for colour, index in zip(plotting.COLOURS, colours, strict=False)}
    for colour, name in names.items():
        svg = svg.replace(f": {colour.lower()}", f": var(--{name})")
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ')
    opening += Markup(view_box) + Markup(' role="img" aria-label="{}">').format(description)
    return opening + Markup(svg[svg.index(">") + 1 :])


def _plain(label: str) -> str:
    """A label that matplotlib takes as it is: dollars would start a formula, an underscore in front hides a curve."""
    return label.replace("$", r"\$").removeprefix("_")

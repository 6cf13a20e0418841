"""`jaxrl-dist compare`: is one run better than another, how sure is that, and how many seeds would it take to know.

What equal seeds share here. A seed is the key of a run, whatever the algorithm (`running.training.run_keys`), and the
episodes of an evaluation are drawn from the run's key and the iteration alone: after equally many iterations every
algorithm begins them in the same states and meets the same noise. Configurations of one algorithm share the initial
parameters and the warm-up as well, and so do algorithms that split their key in the same way, as those of one file's
family do. So scores of equal seeds may go together, and they do where starts matter: in the committed experiments the
last evaluations of two algorithms correlate over seeds with r = 0.97 on UmbrellaChain-bsuite (mean over pairs), 0.5 on
Pendulum-v1, and not at all on CartPole-v1 and Acrobot-v1. Pairs are therefore formed where both sides have the same
seeds and were evaluated after the same iterations, and where there are enough of them for the paired test to say
anything: six, of which p = .031 is the smallest. That is decided before any score is looked at. Everywhere else, and
for metrics that are not of the evaluation, the two sides count as independent.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxrl_dist.configuration import require
from jaxrl_dist.records import recording, statistics
from jaxrl_dist.reports.numbers import Estimate, digits_for, estimate, improvement, number, p_value
from jaxrl_dist.reports.runs import Group, Run, environments_of, found_amiss, grouped, listed, read_all
from jaxrl_dist.running.folders import require_output
from jaxrl_dist.wording import counted

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 1000
FORMATS = (".csv", ".json")
At = Literal["last", "area"]
Pairing = Literal["auto", "paired", "unpaired"]
POINTS = {"last": "last evaluation", "area": "area under the curve, as a mean"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two groups on one environment: their scores by seed, and the permutation test of equal means.

    adjusted: p after Holm's correction for all pairs that are compared at once.
    """

    first: Group
    second: Group
    x: pd.Series
    y: pd.Series
    paired: bool
    test: statistics.PermutationTest
    adjusted: float = math.nan

    @property
    def environment(self) -> str:
        return self.first.environment

    @functools.cached_property
    def difference(self) -> Estimate:
        """Of the IQMs, the first less the second, with its interval."""
        value = statistics.interquartile_mean(self.x) - statistics.interquartile_mean(self.y)
        return Estimate(float(value), *statistics.difference_interval(self.x, self.y, paired=self.paired))

    @functools.cached_property
    def improvement(self) -> Estimate:
        return improvement(self.x.to_numpy(), self.y.to_numpy())

    @property
    def correlation(self) -> float:
        """Of the pairs' scores; NaN without pairs, or where a side has equal scores."""
        x, y = self.x.to_numpy(), self.y.to_numpy()
        return float(np.corrcoef(x, y)[0, 1]) if self.paired and np.ptp(x) > 0 and np.ptp(y) > 0 else math.nan

    @functools.cached_property
    def seeds_needed(self) -> tuple[float, float, float]:
        """Seeds per side for 80 % power at .05 if means and spread are as here, and, of normal scores, if the
        difference of means were the largest and the smallest of its interval; inf where no number does it, or more than
        `MOST_SEEDS`."""
        x, y = self.x.to_numpy(), self.y.to_numpy()
        needed = statistics.seeds_needed(x, y, paired=self.paired, target=POWER, level=LEVEL, most=MOST_SEEDS)
        low, high = statistics.difference_interval(x, y, np.mean, paired=self.paired)
        variance = (x - y).var(ddof=1) if self.paired else x.var(ddof=1) + y.var(ddof=1)
        largest, smallest = max(abs(low), abs(high)), 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        fewest = statistics.FEWEST_PAIRS if self.paired else statistics.FEWEST_SEEDS
        ends = [
            max(fewest, math.ceil(n)) if n <= MOST_SEEDS else math.inf
            for n in (statistics.seeds_needed_of(difference, variance) for difference in (largest, smallest))
        ]
        return math.inf if needed is None else needed, *ends


def compare(
    paths: Sequence[Path],
    console: Console,
    *,
    metric: str = "evaluation_return",
    at: At = "last",
    pairing: Pairing = "auto",
    out: Path | None = None,
) -> list[Pair]:
    """Compare every two of the runs in `paths`, print tables, and write them to `out` (.csv or .json).

    paths: as `reports.write.write` takes them; runs that differ in their seeds alone are pooled. metric: a column of
    metrics.csv. at: the `last` evaluation, or the `area` under the curve. pairing: `auto` as this file's first words
    say. Raises ValueError where there is nothing to compare, or a side has fewer than two seeds.
    """
    if out:
        require(out.suffix.lower() in FORMATS, f"--out is {out}; it must end with {' or '.join(FORMATS)}")
        require_output(out)
    runs = read_all(paths)
    groups = _as_given(grouped(runs), runs)
    alone = _require_two(groups, metric, at)
    pairs = compared(groups, metric, at, pairing)
    said = found_amiss(groups)
    said += [f"{g.label} is alone on {g.environment}: not compared" for g in groups if g.environment in alone]
    said += _few_seeds(pairs)
    for environment in dict.fromkeys(pair.environment for pair in pairs):
        own = [pair for pair in pairs if pair.environment == environment]
        _print(own, metric, at, console, many=len(pairs) > 1)
    _print_notes(pairs, console)
    for warning in said:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if out:
        _write(out, pairs, {"metric": metric, "at": at, "pairing": pairing, "warnings": said})
        console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return pairs


def compared(
    groups: Sequence[Group], metric: str = "evaluation_return", at: At = "last", pairing: Pairing = "auto"
) -> list[Pair]:
    """Every two of the groups on each environment that have at least two seeds each, tested, with Holm's correction for
    all of them together."""
    found = []
    for environment in environments_of(groups):
        scores = [(group, group.by_seed(metric, at)) for group in groups if group.environment == environment]
        scores = [(group, each) for group, each in scores if len(each) > 1]
        for (first, x), (second, y) in itertools.combinations(scores, 2):
            paired = _are_pairs(first, second, x, y, metric, at, pairing)
            test = (statistics.paired_test if paired else statistics.unpaired_test)(x, y)
            found.append(Pair(first, second, x, y, paired, test))
    adjusted = statistics.holm([pair.test.p for pair in found])
    return [dataclasses.replace(pair, adjusted=p) for pair, p in zip(found, adjusted, strict=True)]


def said_of_many(pairs: Sequence[Pair]) -> str:
    """Which of the pairs that are looked at together differ, in a sentence for the report; empty without any."""
    if not pairs:
        return ""
    differ = [
        f"{pair.first.label} and {pair.second.label} (p = {p_value(pair.adjusted)})".replace("= <", "< ")
        for pair in pairs if pair.adjusted <= LEVEL
    ]  # fmt: skip
    kinds = {pair.paired for pair in pairs}
    tests = "sign flips of pairs" if kinds == {True} else "permutations" + " or sign flips of pairs" * (True in kinds)
    how = f"tests of equal means ({tests})"
    if len(pairs) == 1:
        (pair,) = pairs
        return f"The permutation test of equal means has p = {p_value(pair.test.p)}.".replace("= <", "< ")
    outcome = f"these differ at .05: {listed(differ)}" if differ else "none differs at .05"
    return (
        f"{counted(len(pairs), 'pair')} are looked at here at once, each interval for itself. After Holm's correction "
        f"of {how}, {outcome}."
    )


# -- which seeds belong together --------------------------------------------------------------------------------------


def _are_pairs(first: Group, second: Group, x: pd.Series, y: pd.Series, metric: str, at: At, pairing: Pairing) -> bool:
    same_seeds = x.index.equals(y.index)
    if pairing == "paired":
        require(
            same_seeds,
            f"--pairing is paired, but {first.label} has the seeds {listed(x.index)} and {second.label} "
            f"{listed(y.index)} on {first.environment}; they must be the same",
        )
        return True
    evaluated = metric.startswith("evaluation_") and _evaluated_at(first, at) == _evaluated_at(second, at)
    return pairing == "auto" and same_seeds and evaluated and len(x) >= statistics.FEWEST_PAIRS


def _evaluated_at(group: Group, at: At) -> set[tuple[str, int]]:
    """The iterations whose number, with the seed, says which episodes were played; older tables have env steps only."""
    found = set()
    for run in group.runs:
        rows = run.episodes if at == "area" else run.episodes[run.episodes.env_steps == run.last_step]
        column = "iteration" if "iteration" in rows else "env_steps"
        found |= {(column, int(n)) for n in rows[column].unique()}
    return found


# -- what is refused, and what is warned of ---------------------------------------------------------------------------


def _as_given(groups: Sequence[Group], runs: Sequence[Run]) -> list[Group]:
    """The groups in the order in which the user named their runs."""
    place = {id(run): index for index, run in enumerate(runs)}
    return sorted(groups, key=lambda group: min(place[id(run)] for run in group.runs))


def _require_two(groups: Sequence[Group], metric: str, at: At) -> set[str]:
    """The environments with one group; ConfigurationError where these are all, or where a side has fewer than two
    seeds."""
    environments = [group.environment for group in groups]
    alone = {name for name in environments if environments.count(name) == 1}
    where = listed(f"{group.label} on {group.environment}" for group in groups)
    require(
        len(alone) < len({*environments}),
        f"RUN is {where}; a comparison needs two runs, of other algorithms or settings, on the same environment",
    )
    for group in groups:
        seeds = len(group.by_seed(metric, at))
        require(
            group.environment in alone or seeds > 1,
            f"RUN has {counted(seeds, 'seed')} of {group.label} on {group.environment} with a finite {metric} "
            f"({POINTS[at]}); a comparison needs at least two on each side (--num-seeds)",
        )
    return alone


def _few_seeds(pairs: Sequence[Pair]) -> list[str]:
    """Pairs whose test could not have come out at .05, one way or the other."""
    said = {}
    for pair in pairs:
        least = min(1.0, pair.test.smallest * len(pairs))
        if least > LEVEL:
            seeds = counted(len(pair.x), "pair") if pair.paired else f"{len(pair.x)} and {len(pair.y)} seeds"
            many = f" times {len(pairs)} for the comparisons" if len(pairs) > 1 else ""
            said[f"with {seeds} p cannot be below {p_value(pair.test.smallest)}{many}: .05 is out of reach"] = None
    return list(said)


# -- tables -----------------------------------------------------------------------------------------------------------


def _print(pairs: Sequence[Pair], metric: str, at: At, console: Console, *, many: bool) -> None:
    """The groups of one environment, and then every two of them; many: there are more pairs, so p is corrected."""
    groups = {pair.first.label: (pair.first, pair.x) for pair in pairs}
    groups |= {pair.second.label: (pair.second, pair.y) for pair in pairs}
    digits = digits_for(max(float(np.abs(scores).max()) for _, scores in groups.values()))
    console.print(
        f"{metric.replace('_', ' ')} on {pairs[0].environment}, {POINTS[at]}", style="bold", markup=False,
        highlight=False,
    )  # fmt: skip
    details = any(group.detail for group, _ in groups.values())
    table = Table("", "seeds", "IQM", "95 % interval", *["settings"] * details, box=box.SIMPLE_HEAD)
    for label, (group, scores) in groups.items():
        it = estimate(scores.to_numpy())
        settings = [escape(group.detail)] * details
        table.add_row(escape(label), str(len(scores)), number(it.value, digits), _range(it, digits), *settings)
    console.print(table)

    rows = []
    for pair in pairs:
        difference, better = pair.difference, pair.improvement
        needed, *ends = map(_count, pair.seeds_needed)
        rows.append([
            escape(f"{pair.first.label} \N{MINUS SIGN} {pair.second.label}"),
            f"{number(difference.value, digits)}\n{_range(difference, digits)}",
            f"{better.value:.0%}\n[{better.low:.0%}, {better.high:.0%}]",
            "paired" if pair.paired else "apart", p_value(pair.test.p), *[p_value(pair.adjusted)] * many,
            f"{needed}\n[{', '.join(ends)}]",
        ])  # fmt: skip
    names = ("first \N{MINUS SIGN} second", "difference", "first above", "test", "p", *["Holm"] * many, "seeds needed")
    table = Table(box=box.SIMPLE_HEAD)
    for name, cells in zip(names, zip(*rows, strict=True), strict=True):
        # On 80 characters names are broken, not numbers.
        widest = max(len(line) for cell in cells for line in cell.split("\n")) if name != names[0] else 0
        table.add_column(name, overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _range(it: Estimate, digits: int) -> str:
    return f"[{number(it.low, digits)}, {number(it.high, digits)}]"


def _count(seeds: float) -> str:
    return f">{MOST_SEEDS // 1000}k" if math.isinf(seeds) else str(int(seeds))


def _print_notes(pairs: Sequence[Pair], console: Console) -> None:
    """What the columns mean, as far as they are there."""
    kinds = {pair.paired for pair in pairs}
    notes = [
        "difference: of the interquartile means (IQM) over seeds. first above: probability that a seed of the first "
        "scores above one of the second, ties half. Brackets: 95 % bootstrap intervals; with few seeds they are too "
        "narrow."
    ]
    if True in kinds:
        r = [pair.correlation for pair in pairs if not math.isnan(pair.correlation)]
        shown = f" (their scores correlate with r = {np.mean(r):.2f})" if r else ""
        notes.append(
            f"paired: equal seeds were evaluated in the same episodes{shown}; p is that of flipping the signs of their "
            "differences, and intervals of differences resample pairs."
        )
    if False in kinds:
        notes.append("apart: the sides are independent; p is that of permuting their seeds (Welch's t of the means).")
    if len(pairs) > 1:
        notes.append(f"Holm: p corrected for all {len(pairs)} comparisons.")
    notes.append(
        "seeds needed: of each side, for 80 % power at .05, if means and spread are as they were here; in brackets for "
        "a difference at the ends of its interval. Few seeds tell that badly: take it for an order of magnitude."
    )
    for note in notes:
        console.print(note, markup=False, highlight=False)


# -- files ------------------------------------------------------------------------------------------------------------


def _row(pair: Pair) -> dict[str, Any]:
    """A pair as a row of a table; columns in the order in which they are read."""
    estimates = {
        "first_iqm": estimate(pair.x.to_numpy()), "second_iqm": estimate(pair.y.to_numpy()),
        "difference": pair.difference, "improvement": pair.improvement,
    }  # fmt: skip
    needed = dict(
        zip(("seeds_needed", "seeds_needed_at_largest", "seeds_needed_at_smallest"), pair.seeds_needed, strict=True)
    )
    row = {
        "environment": pair.environment, "first": pair.first.label, "second": pair.second.label,
        "first_settings": pair.first.detail, "second_settings": pair.second.detail,
        "first_seeds": len(pair.x), "second_seeds": len(pair.y), "paired": pair.paired, "correlation": pair.correlation,
    }  # fmt: skip
    for name, it in estimates.items():
        row |= {name: it.value, f"{name}_low": it.low, f"{name}_high": it.high}
    row |= {"p": pair.test.p, "p_holm": pair.adjusted, "smallest_p": pair.test.smallest, **needed}
    # A number that there is not is an empty cell, and null in JSON, which has no infinity.
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}


def _write(out: Path, pairs: Sequence[Pair], about: dict[str, Any]) -> None:
    rows = [_row(pair) for pair in pairs]
    if out.suffix.lower() == ".csv":
        pd.DataFrame(rows).assign(metric=about["metric"], at=about["at"]).to_csv(out, index=False)
        return
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for pair in pairs:
        for group, side in ((pair.first, pair.x), (pair.second, pair.y)):
            by_seed = {str(seed): float(score) for seed, score in side.items()}
            scores.setdefault(pair.environment, {})[group.label] = by_seed
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"command": recording.command_line(), "date": date, **about, "pairs": rows, "scores": scores}
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Sweeps: which configurations are asked for, which of them run together, and how they compare.

Configurations that differ in floats alone share one compiled program and lie, with their seeds, along the `runs` axis;
each choice of the static fields (sizes, switches, names) is a group of its own. What does not fit into memory at once
is trained in waves. `study` trains them; this module says what they are.
"""

import csv
import dataclasses
import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from jaxrl_dist.configuration import Bounds, ConfigurationError, Natural, Seed, check_configuration, option, require
from jaxrl_dist.records import recording, statistics
from jaxrl_dist.running.arguments import HELP, read, whole_number
from jaxrl_dist.wording import alternatives, nearest

PREFIX = "--sweep."
MOST = 100_000
"""configurations of a sweep"""
Configurations = Annotated[int, Bounds(0, MOST)]
SOME_BROKEN, ALL_BROKEN = 1, 2  # how many seeds of a configuration; 0: none


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """Many configurations at once: --sweep.FIELD VALUE VALUE ..., or --sweep.FIELD LOW:HIGH:COUNT (:log), for options
    of the algorithm; below is how they are combined."""

    sweep_file: str = ""
    """CSV file with a row per configuration and a column per field, instead of or beside --sweep.FIELD"""
    sweep_samples: Configurations = 0
    """0: every combination of the values (a grid); above: so many random ones, ranges drawn between their ends"""
    sweep_seed: Seed = 0
    """seed of the random combinations, or of Optuna's proposals"""

    sweep_halving: Natural = 0
    """successive halving: train in rungs, after each of which the best 1/ETA of the configurations go on and the others
    stop; a rung's budget is ETA times that of the one before, the last has --total-steps; 0: all are trained to the end
    """
    sweep_rungs: Natural = 0
    """rungs of successive halving; 0: as many as leave a single configuration"""

    sweep_optuna: Configurations = 0
    """configurations that Optuna proposes (its TPE sampler) out of the values and ranges of --sweep.FIELD, each after
    seeing how the earlier ones scored; 0: off"""
    sweep_parallel: Annotated[int, Bounds(1, MOST)] = 1
    """proposals that Optuna makes at once; those that differ in floats alone train as one wave"""


class Span(NamedTuple):
    """`LOW:HIGH:COUNT`, with `:log` at the end evenly spaced by ratio; without COUNT only for random sweeps."""

    low: float
    high: float
    count: int
    log: bool

    def grid(self) -> list[float]:
        space = np.geomspace if self.log else np.linspace
        return [float(f"{value:.12g}") for value in space(self.low, self.high, self.count)]

    def draw(self, generator: np.random.Generator) -> float:
        if self.log:
            return float(np.exp(generator.uniform(np.log(self.low), np.log(self.high))))
        return float(generator.uniform(self.low, self.high))


Axis = Span | list
"""What is said of one field: a range, or its values one by one."""


# -- what is asked for ------------------------------------------------------------------------------------------------


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The command line without the `--sweep.FIELD WORDS...`, and those: field (underscores) to its words."""
    rest, swept, words = [], {}, None
    for argument in arguments:
        if argument.startswith(PREFIX):
            name, equals, value = argument[len(PREFIX) :].partition("=")
            field = name.replace("-", "_")
            require(field not in swept, f"{PREFIX}{name} is given twice; give all its values after one")
            words = swept[field] = [value] if equals else []
        elif argument.startswith("--") or argument in HELP:
            words = None
            rest.append(argument)
        else:
            (rest if words is None else words).append(argument)
    return rest, swept


def parse(config_type: type, swept: Mapping[str, Sequence[str]], *, random: bool) -> dict[str, Axis]:
    """The words after each `--sweep.FIELD` as values of that field's type; ConfigurationError names what is wrong.

    A range is for floats only: any other field selects a program, so its values are given one by one.
    """
    return {field: _axis(config_type, field, words, random) for field, words in swept.items()}


def _axis(config_type: type, field: str, words: Sequence[str], random: bool) -> Axis:
    hints, name = typing.get_type_hints(config_type), PREFIX + field.replace("_", "-")
    near = [PREFIX + each.replace("_", "-") for each in nearest(field, hints)]
    known = f"did you mean {alternatives(near)}?" if near else f"fields: {', '.join(sorted(hints))}"
    require(field in hints, f"{name} is no field of the algorithm; {known}")
    require(len(words) > 0, f"{name} has no values; give some, such as {name} 0.1 0.2, or a range LOW:HIGH:COUNT")
    hint = hints[field]
    if len(words) == 1 and ":" in words[0] and hint is not str:
        require(
            hint is float,
            f"{name} is {words[0]}, a range, but {field} is static (it selects a compiled program); give its values "
            "one by one",
        )
        return _range(name, words[0], random)
    values = [read(name, hint, [word]) for word in words]
    require(len(set(values)) == len(values), f"{name} is {' '.join(words)}; every value once")
    return values


def _range(name: str, word: str, random: bool) -> Span:
    parts = word.split(":")
    log = parts[-1] == "log"
    numbers = parts[:-1] if log else parts
    wanted = f"{name} is {word}; it must be LOW:HIGH:COUNT or LOW:HIGH:COUNT:log" + (", or without COUNT" * random)
    try:
        low, high = float(numbers[0]), float(numbers[1])
        count = whole_number(numbers[2]) if len(numbers) == 3 else 0
    except (ValueError, IndexError):
        require(False, wanted)
    require(len(numbers) == 3 or (random and len(numbers) == 2), wanted)
    require(low < high, f"{name} is {word}, an empty range; LOW must be below HIGH")
    require(math.isfinite(low) and math.isfinite(high), f"{name} is {word}; LOW and HIGH must be finite")
    require(len(numbers) == 2 or count >= 2, f"{name} is {word}; COUNT must be at least 2")
    require(count <= MOST, f"{name} is {word}; COUNT must be at most {MOST:,}")
    require(not log or low > 0, f"{name} is {word}; LOW must be above 0 for log")
    return Span(low, high, count, log)


def combine(axes: Mapping[str, Axis], options: SweepOptions) -> list[dict[str, Any]]:
    """All configurations, each as the fields that differ from the base: a grid, or `sweep_samples` random ones."""
    if options.sweep_samples == 0:
        _require_few(math.prod(axis.count if isinstance(axis, Span) else len(axis) for axis in axes.values()))
        grids = [axis.grid() if isinstance(axis, Span) else axis for axis in axes.values()]
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*grids)]
    generator = np.random.default_rng(options.sweep_seed)

    def draw(axis: Axis) -> Any:
        return axis.draw(generator) if isinstance(axis, Span) else axis[generator.integers(len(axis))]

    drawn = [{field: draw(axis) for field, axis in axes.items()} for _ in range(options.sweep_samples)]
    return list({tuple(d.items()): d for d in drawn}.values())  # a finite choice may come up twice


def from_file(config_type: type, path: Path) -> list[dict[str, Any]]:
    """One configuration per row of a CSV file whose columns are fields; ConfigurationError names what is wrong."""
    require(path.is_file(), f"--sweep-file is {path}, which is no file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file)
    except (ValueError, csv.Error) as error:  # not UTF-8, a quote without end, or nothing at all
        raise ConfigurationError(f"--sweep-file is {path}, which is no CSV file with a header: {error}") from error
    hints, found = typing.get_type_hints(config_type), []
    for field in header:
        require(field in hints, f"--sweep-file is {path}, whose column {field!r} is no field of the algorithm")
        require(header.count(field) == 1, f"--sweep-file is {path}, which has the column {field!r} twice")
    for number, row in enumerate(rows, start=2):
        if not row:
            continue  # an empty line
        where = f"--sweep-file {path}, row {number}"
        require(len(row) == len(header), f"{where}, has {len(row)} cells, but the header {len(header)}")
        cells = zip(header, row, strict=True)
        found.append({field: read(f"{where}, {field}", hints[field], [cell]) for field, cell in cells})
    require(len(found) > 0, f"--sweep-file is {path}, which has no rows")
    return found


def check(options: SweepOptions) -> None:
    """Refuse numbers out of range and options that exclude each other; ConfigurationError names them."""
    check_configuration(options)
    eta = options.sweep_halving
    for name, value in (("--sweep-halving", eta), ("--sweep-optuna", options.sweep_optuna)):
        require(
            value == 0 or jax.process_count() == 1,
            f"{name} is {value}, but there are {jax.process_count()} processes; it needs a single one",
        )
    require(eta != 1, "--sweep-halving is 1; it must be 0 (off) or at least 2: the best 1/ETA go on")
    require(
        options.sweep_rungs == 0 or eta > 0,
        f"--sweep-rungs is {options.sweep_rungs}; it needs --sweep-halving ETA",
    )
    require(options.sweep_rungs != 1, "--sweep-rungs is 1; it must be 0 (automatic) or at least 2, or nothing is cut")
    trials = options.sweep_optuna
    require(
        options.sweep_parallel == 1 or trials > 0,
        f"--sweep-parallel is {options.sweep_parallel}; it needs --sweep-optuna TRIALS",
    )
    for name, value in (
        ("--sweep-halving", eta), ("--sweep-samples", options.sweep_samples), ("--sweep-file", options.sweep_file),
    ):  # fmt: skip
        require(
            not (trials and value),
            f"--sweep-optuna is {trials} and {name} is {value}; Optuna proposes its own configurations and trains them "
            "to the end, so give one of the two",
        )


def configurations(
    config_type: type, swept: Mapping[str, Sequence[str]], options: SweepOptions
) -> list[dict[str, Any]]:
    """Everything that the command line asks for; rows of a file are combined with the values of other fields."""
    check(options)
    axes = parse(config_type, swept, random=options.sweep_samples > 0)
    found = combine(axes, options) if axes else [{}]
    if options.sweep_file:
        rows = from_file(config_type, Path(options.sweep_file))
        both = set(axes) & set(rows[0])
        require(not both, f"--sweep-file and {PREFIX}{min(both, default='')} give the same field; give it once")
        _require_few(len(rows) * len(found))
        found = [row | values for row in rows for values in found]
    return found


def _require_few(count: int) -> None:
    require(
        count <= MOST, f"{PREFIX}FIELD and --sweep-file make {count:,} configurations; at most {MOST:,} are allowed"
    )


# -- what runs together -----------------------------------------------------------------------------------------------


class Wave(NamedTuple):
    """Configurations that run together: their numbers, and one configuration with float arrays `[runs]`.

    Runs are ordered by configuration, then seed.
    """

    numbers: tuple[int, ...]
    config: Any


def waves(configs: Sequence[Any], num_seeds: int, largest: Mapping[Any, int]) -> list[Wave]:
    """Group configurations by their static fields and cut groups into waves of even size.

    configs: one configuration each, floats as numbers. largest: for the static fields of each group (`static_fields`),
    how many configurations fit into memory at once.
    """
    groups: dict[Any, list[int]] = {}
    for number, config in enumerate(configs):
        groups.setdefault(static_fields(config), []).append(number)
    found = []
    for key, numbers in groups.items():
        for part in np.array_split(numbers, -(-len(numbers) // largest[key])):
            found.append(Wave(tuple(map(int, part)), stacked([configs[i] for i in part], num_seeds)))
    return found


def static_fields(config: Any) -> tuple:
    """The fields that select a compiled program, as a key."""
    hints = typing.get_type_hints(type(config))
    return tuple((name, getattr(config, name)) for name, hint in hints.items() if hint is not float)


def stacked(configs: Sequence[Any], num_seeds: int) -> Any:
    """One configuration whose floats are arrays `[configurations * num_seeds]`."""
    hints = typing.get_type_hints(type(configs[0]))
    floats = {
        name: np.repeat([float(getattr(config, name)) for config in configs], num_seeds)
        for name, hint in hints.items()
        if hint is float
    }
    return dataclasses.replace(configs[0], **floats)


# -- successive halving -----------------------------------------------------------------------------------------------


class Rung(NamedTuple):
    """A stage of training: how many configurations take part, and at how many env steps it ends."""

    size: int
    env_steps: int


def rungs(count: int, total_steps: int, options: SweepOptions) -> list[Rung]:
    """The stages of training for `count` configurations: one without halving, else ever fewer and longer ones.

    Each keeps the best 1/eta of the one before (rounded down, at least one), and the last ends at `total_steps`.
    Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", arXiv
    1502.07943, in the form with a factor eta of Li et al., "Hyperband", arXiv 1603.06560 (algorithm 1, one bracket).
    """
    eta, wanted = options.sweep_halving, options.sweep_rungs
    if not eta:
        return [Rung(count, total_steps)]
    require(count >= 2, f"--sweep-halving is {eta}, but there is {count} configuration; it needs at least 2")
    sizes = [count]
    while sizes[-1] > 1 and len(sizes) != wanted:
        sizes.append(max(1, sizes[-1] // eta))
    require(
        wanted <= len(sizes),
        f"--sweep-rungs is {wanted}; with {count} configurations and --sweep-halving {eta} one is left after "
        f"{len(sizes)} rungs",
    )
    return [Rung(size, round(total_steps / eta ** (len(sizes) - 1 - index))) for index, size in enumerate(sizes)]


def best(results: pd.DataFrame, count: int) -> list[int]:
    """Numbers of the `count` configurations with the best last evaluation, ascending; of equals the first numbers.

    Those with diverged seeds come after all others (`standings`).
    """
    scores = _last_scores(results, "evaluation_return")
    order = np.lexsort((-_means(scores), standings(results)))
    return sorted(int(number) for number in scores.index[order[:count]])


# -- results ----------------------------------------------------------------------------------------------------------


def ranking(results: pd.DataFrame, fields: Sequence[str], metric: str = "evaluation_return") -> pd.DataFrame:
    """A row per configuration, best first, by the interquartile mean over seeds of the last evaluation.

    `low` and `high` are the 95 % bootstrap interval over seeds; `best` is the part of bootstrap resamples (of the seeds
    of every configuration) in which the configuration comes first: how sure the choice is.

    Seeds whose value is not finite are left out of all three; where there are any, `left_out` counts them. Where seeds
    diverged, `diverged` counts those. Configurations that have either stand below all others, and those of which it is
    every seed at the end (`standings`).

    Under successive halving (`results` with a column `rung`) those that came further stand first, whatever their
    scores, since scores after unequal training do not compare; `rung` and `env_steps` (or updates) say how far that
    was. `best` is then among those of the last rung, and empty for the others and where only one is left.
    """
    scores, standing = _last_scores(results, metric), standings(results, metric)
    axis = recording.axis_of(results)
    further = ["rung", axis] if "rung" in results else []
    last = results.sort_values(axis).drop_duplicates("configuration", keep="last").set_index("configuration")
    rows = last[[*further, *fields]].sort_index()
    rows[metric] = _means(scores)
    if scores.shape[1] > 1:
        finite = [row[np.isfinite(row)] for row in scores.values]
        intervals = [statistics.bootstrap_interval(row) if len(row) > 1 else (np.nan, np.nan) for row in finite]
        rows["low"], rows["high"] = np.transpose(intervals)
        compared = (standing == standing.min()) & (standing < ALL_BROKEN)
        if further:
            compared &= rows.rung == rows.rung[compared].max()
        rows["best"] = np.nan
        if compared.sum() > 1 or compared.all():
            generator = np.random.default_rng(0)
            rivals = [row for row, is_in in zip(finite, compared, strict=True) if is_in]
            chosen = [row[generator.integers(len(row), size=(1_000, len(row)))] for row in rivals]
            winners = np.argmax([statistics.interquartile_mean(x, axis=1) for x in chosen], axis=0)
            rows.loc[compared, "best"] = np.bincount(winners, minlength=compared.sum()) / 1_000
    for name, seeds in (("diverged", _diverged(results)), ("left_out", scores.isna())):
        if seeds.any(axis=None):
            rows[name] = seeds.sum(axis=1)
    order = ["standing", *further[:1], metric]
    ranked = rows.assign(standing=standing).sort_values(order, ascending=[name == "standing" for name in order])
    return ranked.drop(columns="standing").reset_index()


def standings(results: pd.DataFrame, metric: str = "evaluation_return") -> pd.Series:
    """Per configuration: 0 where all is well, `SOME_BROKEN` or `ALL_BROKEN` where so many seeds diverged or have no
    finite last value of the metric."""
    scores = _last_scores(results, metric)
    broken = scores.isna() | _diverged(results)
    return (SOME_BROKEN * broken.any(axis=1) + (ALL_BROKEN - SOME_BROKEN) * broken.all(axis=1)).rename("standing")


def score(results: pd.DataFrame, configuration: int) -> float | None:
    """The interquartile mean over seeds of one configuration's last evaluation; None where a seed broke."""
    if standings(results)[configuration]:
        return None
    return float(_means(_last_scores(results, "evaluation_return").loc[[configuration]])[0])


def _last_scores(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The metric at each configuration's own last evaluation, `[configurations, seeds]`, NaN where it is not finite."""
    axis = recording.axis_of(results)
    last = results[results[axis] == results.groupby("configuration")[axis].transform("max")]
    scores = last.pivot(index="configuration", columns="seed", values=metric).astype(float)
    return scores.where(np.isfinite(scores)).reindex(columns=sorted(results.seed.unique()))


def _diverged(results: pd.DataFrame) -> pd.DataFrame:
    """Which runs diverged, `[configurations, seeds]`; tables without the column are older, and nobody did."""
    marked = results.diverged_at.notna() if "diverged_at" in results else pd.Series(False, results.index)
    return marked.groupby([results.configuration, results.seed]).any().unstack(fill_value=False)


def _means(scores: pd.DataFrame) -> np.ndarray:
    """Interquartile means over the seeds that have a score, `[configurations]`; NaN where none has."""
    rows = [row[np.isfinite(row)] for row in scores.values]
    return np.array([statistics.interquartile_mean(row) if len(row) else np.nan for row in rows])


def shown(value: Any) -> str:
    """A value of a field as it is written on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def command_options(values: Mapping[str, Any]) -> str:
    """The options that train one configuration by itself."""
    return " ".join(f"{option(field)} {shown(value)}" for field, value in values.items())

"""A study as a user sees it: every configuration of a sweep trained, one table, a ranking, and pictures in a folder.

    study.json            algorithm, command, options, the swept fields and all configurations, versions
    waves.json            which configurations train together, so that a resumed study cuts them in the same way
    wave_00/ ...          an ordinary run folder per wave of configurations; its tables have a column `configuration`
    results.csv           the metrics of all waves in one table, with the swept fields as columns
    ranking.csv           a row per configuration, best first, with intervals
    ranking.png           the same as a picture
    response.png          the score against each swept field

A killed study continues with `--name NAME --resume auto`: finished waves are not trained again, and the one that was
interrupted goes on from its newest checkpoint.

Under successive halving (`--sweep-halving ETA`) the waves lie in `rung_0`, `rung_1`, ..., each with a `waves.json`.
When all waves of a rung are finished, its best configurations are gathered out of their last checkpoints into fewer or
smaller waves, and go on there as if nothing had happened: a run's random numbers do not depend on its neighbours, and
evaluations, schedules and sizes are those of the whole budget. Each rung compiles programs for its number of runs.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrl_dist import outside
from jaxrl_dist.configuration import require
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import folders, hosts, memory, problem, resuming, session, training
from jaxrl_dist.running.catalog import display_name
from jaxrl_dist.studies import sweeps
from jaxrl_dist.wording import counted

# Of the available memory.
MEMORY_TO_FILL = memory.COMFORTABLE
# Compiled programs stay in memory for waves of the same group and size to come.
PROGRAMS_KEPT = 8
SHOWN_ROWS = 20
NO_SWEEP = sweeps.SweepOptions()


def train(
    algorithm: str,
    make_agent: Callable,
    config: Any,
    options: problem.RunOptions,
    found: Sequence[Mapping[str, Any]],
    console: Console,
    sweep: sweeps.SweepOptions = NO_SWEEP,
) -> Path:
    """Train configurations (`found`: the fields in which each differs from `config`) with all seeds.

    `sweep` says whether all are trained to the end. Returns the study's folder. Every configuration is checked before
    anything compiles. Raises as `session.train` does; what was trained until then stays.
    """
    configs = [dataclasses.replace(config, **fields) for fields in found]
    options = problem.with_total_steps(dataclasses.replace(options, plots=False), *configs)
    problems = {number: problem.prepare(algorithm, make_agent, one, options) for number, one in enumerate(configs)}
    rungs = sweeps.rungs(len(found), options.total_steps, sweep)
    ends = _iterations(problems, rungs, sweep)
    folder = folders.folder_of(algorithm, options)
    with folders.claim(folder, options, record="study.json"):
        about = {
            "fields": list(dict.fromkeys(field for values in found for field in values)),
            "configurations": [{"configuration": number, **values} for number, values in enumerate(found)],
            "rungs": [rung._asdict() for rung in rungs] if len(rungs) > 1 else [],
        }
        hosts.by_first(lambda: write_or_compare(folder, algorithm, options, config, about, "configurations", "rungs"))
        _print_plan(console, folder, problems, rungs, options)
        study, numbers, sources = Waves(folder, problems, options, console), list(problems), ()
        for index, rung in enumerate(rungs):
            if index > 0:
                numbers = sweeps.best(metrics_of(sources), rung.size)
                console.print(f"[bold]rung {index}[/bold]: {rung.size} of {rungs[index - 1].size} configurations go on")
            waves = study.cut(f"rung_{index}" if len(rungs) > 1 else "", numbers)
            for path, wave in waves.items():
                study.train(path, wave, session.Leg(ends[wave.numbers[0]][index], sources) if ends else None)
            sources = tuple(waves)
        hosts.by_first(lambda: collect(folder, console))
    return folder


class Waves:
    """Trains configurations of a study wave by wave; keeps what is compiled for waves to come."""

    def __init__(
        self, folder: Path, problems: Mapping[int, problem.Problem], options: problem.RunOptions, console: Console
    ):
        self.folder, self.problems, self.options, self.console = folder, problems, options, console
        self.programs = {}

    def recorded(self, part: str) -> list[int]:
        """The configurations that were cut into waves in the subfolder `part` before a resume; none if it is new."""
        return [number for wave in self._record(part) for number in wave]

    def cut(self, part: str, numbers: Sequence[int]) -> dict[Path, sweeps.Wave]:
        """The waves of the configurations `numbers` (ascending) and their run folders in the subfolder `part`.

        They are cut by the memory that is free, or as they were before a resume.
        """
        seeds, cut = self.options.num_seeds, hosts.by_first(lambda: self._record(part))
        if cut:
            there = sorted(number for wave in cut for number in wave)
            require(
                there == sorted(numbers),
                f"{self.folder / part / 'waves.json'} has the configurations {there}; they must be {sorted(numbers)}",
            )
            found = [(wave, [self.problems[number].config for number in wave]) for wave in cut]
            waves = [sweeps.Wave(tuple(wave), sweeps.stacked(configs, seeds)) for wave, configs in found]
        else:
            configs = [self.problems[number].config for number in numbers]
            waves = sweeps.waves(configs, seeds, self._largest(numbers))
            waves = [wave._replace(numbers=tuple(numbers[place] for place in wave.numbers)) for wave in waves]
            hosts.by_first(lambda: self._write_record(part, waves))
        return {self.folder / part / f"wave_{index:02d}": wave for index, wave in enumerate(waves)}

    def train(self, path: Path, wave: sweeps.Wave, leg: session.Leg | None = None) -> None:
        """Train one wave in its run folder, unless that is finished."""
        name = path.relative_to(self.folder).as_posix()
        if hosts.by_first((path / "finished").exists):
            self.console.print(f"[bold]{name}[/bold] is finished already")
            return
        self.console.print(f"[bold]{name}[/bold]: configurations {', '.join(map(str, wave.numbers))}")
        options = dataclasses.replace(
            self.options, name=f"{self.folder.name}/{name}", resume=self.options.resume and "auto"
        )
        one = self.problems[wave.numbers[0]]._replace(config=wave.config, options=options, configurations=wave.numbers)
        session.train(one, self.console, self._programs_for(one), leg)
        # The mark holds the seal of the tables, so that a study is never ranked by what somebody changed later.
        hosts.by_first(lambda: recording.write_json(path / "finished", {"records": recording.seal_of(path)}))

    def _write_record(self, part: str, waves: Sequence[sweeps.Wave]) -> None:
        (self.folder / part).mkdir(exist_ok=True)
        recording.write_json(self.folder / part / "waves.json", [wave.numbers for wave in waves])

    def _record(self, part: str) -> list[list[int]]:
        record = self.folder / part / "waves.json"
        if not record.exists():
            return []
        waves = recording.read_json(record)
        lists = isinstance(waves, list) and all(isinstance(wave, list) and wave for wave in waves)
        numbers = [number for wave in waves for number in wave] if lists else []
        require(
            bool(numbers) and all(type(x) is int and x >= 0 for x in numbers) and len({*numbers}) == len(numbers),
            f"{record} is damaged: it must be lists of the numbers of configurations, each number once",
        )  # fmt: skip
        return waves

    def _programs_for(self, one: problem.Problem) -> training.Programs:
        """Waves of the same group and size share programs, whichever rung they belong to."""
        key = (len(one.configurations), sweeps.static_fields(one.config))
        if key not in self.programs:
            if len(self.programs) == PROGRAMS_KEPT:
                del self.programs[next(iter(self.programs))]
            self.programs[key] = session.make_programs(one)
        return self.programs[key]

    def _largest(self, numbers: Sequence[int]) -> dict[Any, int]:
        """For each group of static fields, how many configurations fit into memory at once."""
        available, largest = memory.available_bytes(), {}
        for number in numbers:
            one = self.problems[number]
            key = sweeps.static_fields(one.config)
            if available is None:
                largest[key] = len(numbers)
            elif key not in largest:
                prediction = memory.predict(session.make_programs(one))
                room = available * MEMORY_TO_FILL - prediction.compiling
                largest[key] = max(1, int(room / prediction.of_the_runs))
        return largest


def collect(folder: Path, console: Console, metric: str = "evaluation_return", out: Path | None = None) -> None:
    """The table of all finished waves, the ranking and the pictures; `out` is the picture of the ranking."""
    study = read(folder)
    fields = study["fields"]
    finished = finished_waves(folder)
    require(bool(finished), f"STUDY is {folder}, of which no wave is finished yet")
    table = pd.DataFrame(study["configurations"])
    for field in fields:
        table[field] = [sweeps.shown(x) if isinstance(x, list | bool) else x for x in table[field]]
    metrics = metrics_of(finished)
    unknown = sorted({*metrics.configuration} - {*table.configuration})
    require(not unknown, f"{folder / 'study.json'} lacks the configurations {unknown}, which were trained")
    results = metrics.merge(table, on="configuration")
    numeric = [name for name in results if pd.api.types.is_numeric_dtype(results[name])]
    require(metric in numeric, f"--metric is {metric!r}; the study has {', '.join(numeric)}")
    results.to_csv(folder / "results.csv", index=False)
    ranking = sweeps.ranking(results, fields, metric)
    ranking.to_csv(folder / "ranking.csv", index=False)
    no_winner = bool((sweeps.standings(results, metric) == sweeps.ALL_BROKEN).all())
    _print_ranking(console, study, ranking, metric, no_winner)
    title = f"{display_name(study['algorithm'])} on {outside.shown(study['options']['env_id'])}"
    plotting.ranking(ranking, fields, out or folder / "ranking.png", title=title, metric=metric)
    equal = ranking
    if "rung" in results:  # all configurations after the same training: at the end of the first rung
        equal = sweeps.ranking(results[results.rung == 0], fields, metric)
        axis = recording.axis_of(results)
        title = f"{title}, after {equal[axis].max():,} {axis.replace('_', ' ')}"
    plotting.response(equal, fields, folder / "response.png", title=title, metric=metric)
    console.print(f"results in {folder}")


def finished_waves(folder: Path) -> list[Path]:
    """The run folders of a study's finished waves, in the order of their rungs or batches."""
    return sorted(mark.parent for pattern in ("", "*/") for mark in folder.glob(f"{pattern}wave_*/finished"))


def metrics_of(waves: Sequence[Path]) -> pd.DataFrame:
    """The metrics of several waves in one table, under successive halving with the number of the `rung`."""
    frames = []
    for wave in waves:
        mark = wave / "finished"
        if mark.is_file() and mark.stat().st_size:  # older marks are empty
            recording.check_records(wave, recording.read_json(mark, {"records": dict})["records"], 0)
        frame = recording.read_metrics(wave, "configuration", "evaluation_return")
        kind, _, number = wave.parent.name.partition("_")
        if kind == "rung":
            frame.insert(0, "rung", int(number))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def is_study(folder: Path) -> bool:
    return (folder / "study.json").is_file()


def read(folder: Path, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """`study.json` of a study's folder; ValueError, naming the file, where it is damaged or lacks `fields`."""
    path = folder / "study.json"
    found = recording.read_json(
        path, {**recording.CONFIG_FIELDS, "fields": list, "configurations": list, **(fields or {})}
    )
    needed = {"configuration", *map(str, found["fields"])}
    for index, values in enumerate(found["configurations"]):
        fits = isinstance(values, dict) and needed <= values.keys() and type(values["configuration"]) is int
        require(fits, f"{path}: configurations[{index}] is {values!r}; it must have {', '.join(sorted(needed))}")
    return found


def write_or_compare(
    folder: Path, algorithm: str, options: problem.RunOptions, config: Any, about: Mapping[str, Any], *equal: str
) -> None:
    """Write `study.json`, or refuse to resume what was started otherwise; `equal`: entries of `about` to compare."""
    description = {
        "algorithm": algorithm, "command": recording.command_line(), **about,
        "config": dataclasses.asdict(config), "options": dataclasses.asdict(options), "versions": recording.versions(),
    }  # fmt: skip
    if not is_study(folder):
        recording.write_json(folder / "study.json", description)
        return
    as_written = json.loads(json.dumps(description))
    before = read(folder, {name: type(as_written[name]) for name in equal})
    resuming.require_same_settings(before, as_written, "total_steps", "probe_support")
    for name in equal:
        require(
            before.get(name) == as_written[name],
            f"--resume is {options.resume!r}, but {folder} was started with {len(before.get(name) or ())} other "
            f"{name}; they must be equal",
        )


# -- small things -----------------------------------------------------------------------------------------------------


def _iterations(
    problems: Mapping[int, problem.Problem], rungs: Sequence[sweeps.Rung], sweep: sweeps.SweepOptions
) -> dict[int, list[int]]:
    """The iteration at which each rung ends for every configuration, an evaluation; none without halving."""
    by_group = {}
    for one in problems.values() if len(rungs) > 1 else ():
        key = sweeps.static_fields(one.config)
        if key in by_group:
            continue
        clock = one.agent().clock
        ends = by_group[key] = [session.leg_end(one, rung.env_steps) for rung in rungs]
        for index, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
            require(
                before < end,
                f"--sweep-halving is {sweep.sweep_halving} with {len(rungs)} rungs, of which rung {index} ends at "
                f"{rungs[index].env_steps:,} {clock.unit}: too early for an evaluation of its own after the "
                f"{clock.warmup_steps:,} steps of the warm-up; lower --sweep-rungs, --eval-every or "
                "--warmup-steps, or raise --total-steps",
            )
    return {number: by_group[sweeps.static_fields(one.config)] for number, one in problems.items() if by_group}


def _print_plan(console: Console, folder: Path, problems, rungs: Sequence[sweeps.Rung], options) -> None:
    groups = len({sweeps.static_fields(one.config) for one in problems.values()})
    console.print(
        f"[bold]study[/bold] of {counted(len(problems), 'configuration')} with {counted(options.num_seeds, 'seed')} "
        f"each: {counted(len(problems) * options.num_seeds, 'run')} in {counted(groups, 'group')} that share a "
        f"compiled program, in {folder}"
    )
    if len(rungs) > 1:
        stages = ", ".join(f"{rung.size} until {rung.env_steps:,}" for rung in rungs)
        steps = [0, *(rung.env_steps for rung in rungs)]
        part = sum(rung.size * (rung.env_steps - before) for rung, before in zip(rungs, steps, strict=False))
        part /= rungs[0].size * options.total_steps
        unit = problems[0].agent().clock.unit
        console.print(f"successive halving: {stages} {unit}, {part:.0%} of training all to the end")


def _print_ranking(
    console: Console, study: dict[str, Any], ranking: pd.DataFrame, metric: str, no_winner: bool
) -> None:
    fields = study["fields"]
    # Narrow enough for 80 columns: an interval is one column, a rung stands for its env steps, and names are broken.
    table = Table(title=f"{metric.replace('_', ' ')} of the last evaluation, IQM over seeds", box=box.SIMPLE_HEAD)
    names = {"configuration": "no.", metric: "IQM", "low": "95 % interval", "best": "part first"}
    rows = ranking.head(SHOWN_ROWS).map(lambda x: "" if x != x else f"{x:.4g}" if isinstance(x, float) else str(x))
    if "low" in rows:
        rows["low"] = [low and f"[{low}, {high}]" for low, high in zip(rows.low, rows.high, strict=True)]
    rows = rows.drop(columns=["high", "env_steps", "updates"], errors="ignore")
    for column, cells in rows.items():
        name, widest = names.get(column, column.replace("_", " ")), max(map(len, cells)) if column != "low" else 0
        table.add_column(name, justify="right", overflow="fold", min_width=widest)
    for row in rows.itertuples(index=False):
        table.add_row(*row)
    console.print(table)
    if len(ranking) > SHOWN_ROWS:
        console.print(f"{len(ranking) - SHOWN_ROWS} more in ranking.csv")
    if no_winner:
        console.print("best: none; every seed of every configuration diverged, or has no finite value")
        return
    best = ranking.iloc[0]
    sure = f", first in {best['best']:.0%} of bootstrap resamples" if best.get("best", float("nan")) >= 0 else ""
    if "rung" in ranking:
        furthest = (ranking.rung == ranking.rung.max()).sum()
        sure += f"; {furthest} of {len(ranking)} configurations came as far"
    console.print(f"best: {sweeps.command_options({field: best[field] for field in fields})}{sure}", soft_wrap=True)

"""A study as a user sees it: every configuration of a sweep trained, one table, a ranking, and pictures in a folder.

    study.json            algorithm, command, options, the swept fields and all configurations, versions
    wave_00/ ...          an ordinary run folder per wave of configurations; its tables have a column `configuration`
    results.csv           the metrics of all waves in one table, with the swept fields as columns
    ranking.csv           a row per configuration, best first, with intervals
    ranking.png           the same as a picture
    response.png          the score against each swept field

A killed study continues with `--name NAME --resume auto`: finished waves are not trained again, and the one that was
interrupted goes on from its newest checkpoint.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from jaxrl_dist import hosts, plotting, problem, recording, runner, sweeps
from jaxrl_dist.agent import require

# Of the free memory; a compiled program also needs room for its temporaries.
MEMORY_TO_FILL = 0.5
SHOWN_ROWS = 20


def train(
    algorithm: str,
    make_agent: Callable,
    config: Any,
    options: problem.RunOptions,
    found: Sequence[Mapping[str, Any]],
    console: Console,
) -> Path:
    """Train every configuration (`found`: the fields in which each differs from `config`) with all seeds.

    Returns the study's folder. Every configuration is checked before anything compiles. Raises as `runner.train` does;
    what was trained until then stays.
    """
    options = dataclasses.replace(options, plots=False)
    problems = [
        problem.prepare(algorithm, make_agent, dataclasses.replace(config, **fields), options) for fields in found
    ]
    folder = runner.folder_of(algorithm, options)
    with runner.claim(folder, options, record="study.json"):
        hosts.by_first(lambda: _write_or_compare(folder, algorithm, options, config, found))
        waves = _waves(problems, options.num_seeds)
        _print_plan(console, folder, found, options, waves)
        programs, shapes = None, None
        for index, wave in enumerate(waves):
            name = f"wave_{index:02d}"
            if hosts.by_first((folder / name / "finished").exists):
                console.print(f"[bold]{name}[/bold] is finished already")
                continue
            numbers = ", ".join(map(str, wave.numbers))
            console.print(f"[bold]{name}[/bold] of {len(waves)}: configurations {numbers}")
            wave_options = dataclasses.replace(options, name=f"{folder.name}/{name}", resume=options.resume and "auto")
            one = problems[wave.numbers[0]]._replace(
                config=wave.config, options=wave_options, configurations=wave.numbers
            )
            # The next wave of the same group and size takes the programs that are compiled already.
            if shapes != (shapes := (len(wave.numbers), sweeps.static_fields(wave.config))):
                programs = runner.make_programs(one)
            runner.train(one, console, programs)
            hosts.by_first((folder / name / "finished").touch)
        hosts.by_first(lambda: collect(folder, console))
    return folder


def collect(folder: Path, console: Console, metric: str = "evaluation_return", out: Path | None = None) -> None:
    """The table of all finished waves, the ranking and the pictures; `out` is the picture of the ranking."""
    study = read(folder)
    fields = study["fields"]
    frames = [recording.read_metrics(wave) for wave in sorted(folder.glob("wave_*")) if (wave / "finished").exists()]
    require(bool(frames), f"STUDY is {folder}, of which no wave is finished yet")
    table = pd.DataFrame(study["configurations"])
    for field in fields:
        table[field] = [sweeps.shown(x) if isinstance(x, list | bool) else x for x in table[field]]
    results = pd.concat(frames).merge(table, on="configuration")
    require(metric in results, f"--metric is {metric!r}; the study has {', '.join(results.columns)}")
    results.to_csv(folder / "results.csv", index=False)
    ranking = sweeps.ranking(results, fields, metric)
    ranking.to_csv(folder / "ranking.csv", index=False)
    _print_ranking(console, study, ranking, metric)
    title = f"{study['algorithm'].upper()} on {study['options']['env_id']}"
    plotting.ranking(ranking, fields, out or folder / "ranking.png", title=title, metric=metric)
    plotting.response(ranking, fields, folder / "response.png", title=title, metric=metric)
    console.print(f"results in {folder}")


def is_study(folder: Path) -> bool:
    return (folder / "study.json").is_file()


def read(folder: Path) -> dict[str, Any]:
    """`study.json` of a study's folder."""
    return json.loads((folder / "study.json").read_text(encoding="utf-8"))


# -- small things -----------------------------------------------------------------------------------------------------


def _write_or_compare(folder: Path, algorithm, options, config, found) -> None:
    fields = list(dict.fromkeys(field for values in found for field in values))
    description = {
        "algorithm": algorithm, "command": recording.command_line(), "fields": fields,
        "configurations": [{"configuration": number, **values} for number, values in enumerate(found)],
        "config": dataclasses.asdict(config), "options": dataclasses.asdict(options), "versions": recording.versions(),
    }  # fmt: skip
    as_written = json.loads(json.dumps(description))
    if is_study(folder):
        before = read(folder)
        require(
            before["configurations"] == as_written["configurations"],
            f"--resume is {options.resume!r}, but {folder} was started with {len(before['configurations'])} other "
            "configurations; they must be equal",
        )
    else:
        (folder / "study.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _waves(problems: Sequence[problem.Problem], num_seeds: int) -> list[sweeps.Wave]:
    configs = [one.config for one in problems]
    available, largest = runner.available_bytes(), {}
    for number, config in enumerate(configs):
        key = sweeps.static_fields(config)
        if key not in largest:
            needed = runner.bytes_of(runner.make_programs(problems[number]).abstract_training)
            largest[key] = len(configs) if available is None else max(1, int(available * MEMORY_TO_FILL / needed))
    return sweeps.waves(configs, num_seeds, largest)


def _print_plan(console: Console, folder: Path, found, options, waves: Sequence[sweeps.Wave]) -> None:
    groups = len({sweeps.static_fields(wave.config) for wave in waves})
    console.print(
        f"[bold]study[/bold] of {len(found)} configurations with {options.num_seeds} seeds each: "
        f"{len(found) * options.num_seeds} runs in {groups} compiled program(s) and {len(waves)} wave(s), in {folder}"
    )


def _print_ranking(console: Console, study: dict[str, Any], ranking: pd.DataFrame, metric: str) -> None:
    fields = study["fields"]
    table = Table(title=f"{metric.replace('_', ' ')} of the last evaluation, IQM over seeds")
    for column in ranking.columns:
        table.add_column(column, justify="right")
    for _, row in ranking.head(SHOWN_ROWS).iterrows():
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    console.print(table)
    if len(ranking) > SHOWN_ROWS:
        console.print(f"{len(ranking) - SHOWN_ROWS} more in ranking.csv")
    best = ranking.iloc[0]
    sure = f", first in {best['best']:.0%} of bootstrap resamples" if "best" in ranking else ""
    console.print(f"best: {sweeps.command_options({field: best[field] for field in fields})}{sure}")

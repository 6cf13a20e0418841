"""Finished runs as `report` compares them: read, checked, and grouped by algorithm, environment and settings."""

import dataclasses
import functools
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrl_dist import outside
from jaxrl_dist.configuration import require
from jaxrl_dist.records import recording, statistics, tables
from jaxrl_dist.running.catalog import display_name
from jaxrl_dist.studies import sweeps

MOST_OF_A_STUDY = 8
DIVERGENCES_LISTED = 5
POSITION_COLUMNS = (*recording.POSITION_COLUMNS, "diverged_at", "rung")
NONE = "\N{EN DASH}"  # what stands where there is nothing to show


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder says."""

    name: str
    algorithm: str
    environment: str
    about: Mapping[str, Any]
    """`config.json`"""
    episodes: pd.DataFrame
    """`evaluations.csv`, without the seeds whose returns are not finite"""
    metrics: pd.DataFrame | None
    seeds: list[int]
    """all of them, with or without finite returns"""
    last_step: int
    unit: str
    """what `last_step` and `episodes.env_steps` count: env_steps, or updates where a run takes none"""
    warnings: tuple[str, ...]

    @property
    def diverged(self) -> pd.DataFrame:
        """`recording.divergences`; env_steps are where a run stood, as in `episodes`."""
        metrics = pd.DataFrame() if self.metrics is None else self.metrics
        return recording.divergences(metrics).rename(columns={recording.axis_of(metrics): "env_steps"})

    @property
    def settings(self) -> dict[str, Any]:
        """All options of the command line that started it, and how it ran."""
        ran = {name: self.about[name] for name in ("runs_mode", "num_devices") if name in self.about}
        return {**self.about["config"], **self.about["options"], **ran}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make it another experiment: runs that agree in them differ in their seeds alone."""
        options = self.about["options"]
        return {**self.about["config"], "total_steps": options.get("total_steps"), "dataset": options.get("dataset")}

    @property
    def place(self) -> tuple[str, str]:
        return self.algorithm, self.environment


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one algorithm on one environment with the same settings."""

    label: str
    detail: str
    """the settings by which it differs from other groups of its algorithm"""
    environment: str
    runs: tuple[Run, ...]

    @functools.cached_property
    def curve(self) -> pd.DataFrame:
        """Mean episode return, a row per evaluation and seed."""
        episodes = pd.concat([run.episodes for run in self.runs])
        curve = episodes.groupby(["env_steps", "seed"], as_index=False).episode_return.mean()
        return curve.rename(columns={"episode_return": "evaluation_return"})

    @functools.cached_property
    def diverged(self) -> pd.DataFrame:
        return pd.concat([run.diverged for run in self.runs])

    @property
    def unit(self) -> str:
        return self.runs[0].unit

    @functools.cached_property
    def last_episodes(self) -> pd.DataFrame:
        return pd.concat([run.episodes[run.episodes.env_steps == run.last_step] for run in self.runs])

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """Mean return of the last evaluation, `[seeds]`, in the order of the seeds; of those with finite returns."""
        return self.last_episodes.groupby("seed").episode_return.mean().to_numpy()

    @functools.cached_property
    def areas(self) -> np.ndarray:
        """Area under each seed's learning curve as a mean return, of the seeds with two evaluations or more."""
        return self.by_seed("evaluation_return", "area").to_numpy()

    def by_seed(self, metric: str, at: str) -> pd.Series:
        """One number per seed, in the order of the seeds that have one: of the `last` point, or the `area` under the
        seed's curve as a mean.

        metric: `evaluation_return`, or another column of metrics.csv; ConfigurationError where a run lacks it. Left out
        are seeds whose evaluation returns are not finite, points at which the metric is not, and of an area the seeds
        with fewer than two points.
        """
        points = self.curve if metric == "evaluation_return" else pd.concat([_points(run, metric) for run in self.runs])
        if at == "last":
            ends = {seed: run.last_step for run in self.runs for seed in run.seeds}
            return points[points.env_steps == points.seed.map(ends)].set_index("seed")[metric].sort_index()
        curves = {seed: one.sort_values("env_steps") for seed, one in points.groupby("seed") if len(one) > 1}
        areas = {seed: statistics.area_under_curve(one.env_steps, one[metric]) for seed, one in curves.items()}
        return pd.Series(areas, name=metric, dtype=float)


def _points(run: Run, metric: str) -> pd.DataFrame:
    """The finite values of a column of metrics.csv, of the seeds with finite returns."""
    metrics = pd.DataFrame() if run.metrics is None else run.metrics
    known = [name for name in metrics if pd.api.types.is_numeric_dtype(metrics[name]) and name not in POSITION_COLUMNS]
    require(metric in known, f"--metric is {metric!r}; {run.name} has {listed(known) or 'no metrics'}")
    points = metrics.assign(env_steps=metrics[run.unit])[["env_steps", "seed", metric]]
    return points[np.isfinite(points[metric]) & points.seed.isin(run.episodes.seed)]


# -- reading ----------------------------------------------------------------------------------------------------------


def read_all(paths: Sequence[Path]) -> list[Run]:
    """`read_runs` of all paths in turn. Raises ValueError where there is none, or one twice."""
    require(len(paths) > 0, "RUN is empty; give at least one folder of a run")
    twice = [path for index, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:index]]]
    require(not twice, f"RUN has {twice[0] if twice else ''} twice; give each run once")
    return [run for path in paths for run in read_runs(path)]


def read_run(path: Path) -> Run:
    """One run, checked. Raises ValueError, naming it, when it is none, when it has no evaluations or is unreadable."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        about, episodes, metrics = _committed(path) if path.suffix == ".json" else _folder(path)
    return _checked(path, about, episodes, metrics, caught)


def read_runs(path: Path) -> list[Run]:
    """The run in `path`; of a study each configuration as a run, the `MOST_OF_A_STUDY` best where there are more.

    `STUDY/configuration_3` is one configuration of a study.
    """
    from jaxrl_dist.studies import study

    single = re.fullmatch(r"configuration_(\d+)", path.name)
    if single and not path.exists() and study.is_study(path.parent):
        return [_configuration(path.parent, _finished_waves(path.parent), int(single[1]))]
    if not study.is_study(path):
        return [read_run(path)]
    waves = _finished_waves(path)
    best = list(sweeps.ranking(study.metrics_of(waves), []).configuration)
    found = [_configuration(path, waves, number) for number in sorted(best[:MOST_OF_A_STUDY])]
    if len(best) > len(found):
        said = f"{path.name}: the {len(found)} best of {len(best)} configurations are shown, so they flatter"
        found[0] = dataclasses.replace(found[0], warnings=(said, *found[0].warnings))
    return found


def _finished_waves(path: Path) -> list[Path]:
    from jaxrl_dist.studies import study

    waves = study.finished_waves(path)
    require(bool(waves), f"RUN is {path}, a study of which no wave is finished yet")
    return waves


def _configuration(path: Path, waves: Sequence[Path], number: int) -> Run:
    """One configuration of a study as a run of its own, put together from the waves in which it took part."""
    abouts = [recording.read_config(wave) for wave in waves]
    own = [(wave, about) for wave, about in zip(waves, abouts, strict=True) if number in about["configurations"]]
    there = sorted({each for about in abouts for each in about["configurations"]})
    require(bool(own), f"RUN is {path / f'configuration_{number}'}; of the study these are finished: {listed(there)}")
    joined = [
        pd.concat([table[table.configuration == number] for wave, _ in own for table in [read(wave)]])
        for read in (recording.read_evaluations, recording.read_metrics)
    ]
    about = own[-1][1]
    first_run = about["configurations"].index(number) * about["options"]["num_seeds"]
    single = recording.read_json(path / "study.json", {"config": dict})["config"]
    # Along the runs of a wave lie the floats, which are single numbers in the study's own configuration.
    config = {
        name: value[first_run] if isinstance(value, list) and not isinstance(single.get(name), list) else value
        for name, value in about["config"].items()
    }
    return _checked(path / f"configuration_{number}", {**about, "config": config, "configurations": []}, *joined, [])


def _checked(path: Path, about: Any, episodes: pd.DataFrame, metrics: pd.DataFrame | None, caught: Sequence) -> Run:
    require(not about.get("configurations"), f"RUN is {path}, a wave of a study; its table is the study's")
    name = str(Path(*path.parts[-3:]))
    said = [str(each.message).replace(str(path), name) for each in caught if each.category is UserWarning]
    options = about["options"]
    environment = " ".join([outside.shown(options["env_id"]), *map(str, options.get("env_options") or ())])
    unit = recording.axis_of(episodes)
    episodes = episodes.assign(env_steps=episodes[unit])  # where a run stands, for all that follows
    seeds, last_step = sorted(episodes.seed.unique().tolist()), int(episodes.env_steps.max())

    finite = np.isfinite(episodes.episode_return)
    if not finite.all():
        broken = sorted(episodes.seed[~finite].unique().tolist())
        said.append(
            f"{name}: {(~finite).sum()} of {len(episodes)} episode returns are not finite; the seeds with one "
            f"({listed(broken)}) are left out of every number, which are those of the other seeds"
        )
        episodes = episodes[~episodes.seed.isin(broken)]
    counts = episodes.groupby(["env_steps", "seed"]).size()
    expected = episodes.env_steps.nunique() * episodes.seed.nunique()
    if len(counts) < expected:
        said.append(
            f"{name}: {expected - len(counts)} of {expected} evaluations ({unit.replace('_', ' ')} x seeds) are missing"
        )
    if counts.min() < counts.max():
        said.append(f"{name}: evaluations have from {counts.min()} to {counts.max()} episodes")
    if metrics is not None:
        infinite = [column for column in metrics.select_dtypes("number") if np.isinf(metrics[column]).any()]
        if infinite:
            said.append(f"{name}: metrics are not finite: {', '.join(infinite)}")
    total = about["options"].get("total_steps")
    reached = about.get("reached")
    if isinstance(reached, dict) and reached.get("stopped"):
        said.append(
            f"{name}: ended at {last_step:,} of {total:,} {unit.replace('_', ' ')}, when every seed had reached "
            f"--stop-at {reached['return']:g}: its last scores were waited for, so they flatter"
        )
    elif isinstance(total, int) and last_step < total:
        said.append(f"{name}: the last evaluation is at {last_step:,} of {total:,} {unit.replace('_', ' ')}")
    run = Run(name, about["algorithm"], environment, about, episodes, metrics, seeds, last_step, unit, ())
    if len(run.diverged):
        first = [f"{row.seed} ({row.metric} at iteration {row.iteration:,})" for row in run.diverged.itertuples()]
        more = f" and {len(first) - DIVERGENCES_LISTED} more" if len(first) > DIVERGENCES_LISTED else ""
        said.append(f"{name}: {len(first)} of {len(seeds)} seeds diverged: {listed(first[:DIVERGENCES_LISTED])}{more}")
    return dataclasses.replace(run, warnings=tuple(said))


def _folder(path: Path):
    about = recording.read_config(path)
    require((path / "evaluations.csv").is_file(), f"RUN is {path}, which holds no evaluations (no evaluations.csv)")
    metrics = recording.read_metrics(path) if (path / "metrics.csv").is_file() else None
    return about, recording.read_evaluations(path), metrics


def _committed(path: Path):
    """The form of `experiments/learning_curves`: NAME.json, NAME.csv and sometimes metrics/NAME.csv."""
    evaluations, metrics = path.with_suffix(".csv"), path.parent / "metrics" / f"{path.stem}.csv"
    require(path.is_file(), f"RUN is {path}, which does not exist")
    require(evaluations.is_file(), f"RUN is {path}, which holds no evaluations ({evaluations} does not exist)")
    about = recording.read_json(path, recording.CONFIG_FIELDS)
    episodes = tables.read(evaluations, recording.EPISODE_COLUMNS)
    return about, episodes, tables.read(metrics) if metrics.is_file() else None


def read_bounds(path: Path, groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """The returns that count as 0 and 1, of every environment of the groups. Raises ValueError, naming the file."""
    require(path.is_file(), f"--normalize is {path}, which is no file")
    try:
        found = recording.read_json(path)
    except ValueError as error:
        raise ValueError(f"--normalize is {path}, which cannot be read ({error})") from error
    require(isinstance(found, dict), f"--normalize is {path}; it must be an object {{environment: [low, high]}}")
    bounds = {}
    for environment in environments_of(groups):
        require(environment in found, f"--normalize is {path}, which has no {environment!r}")
        pair = found[environment]
        numbers = isinstance(pair, list) and len(pair) == 2 and all(type(end) in (int, float) for end in pair)
        require(
            numbers and all(map(math.isfinite, pair)) and pair[0] < pair[1],
            f"--normalize is {path}, which has {pair!r} for {environment!r}; it must be [low, high] with low < high",
        )
        bounds[environment] = (float(pair[0]), float(pair[1]))
    return bounds


def lowest_and_highest(groups: Sequence[Group]) -> dict[str, tuple[float, float]]:
    """Bounds from the runs themselves: each environment's worst and best seed; none where all seeds are equal."""
    bounds = {}
    for environment in environments_of(groups):
        scores = np.concatenate([group.scores for group in groups if group.environment == environment])
        if len(scores) and scores.min() < scores.max():
            bounds[environment] = (float(scores.min()), float(scores.max()))
    return bounds


# -- grouping ---------------------------------------------------------------------------------------------------------


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by algorithm, environment and settings, in the order of the labels.

    Runs that differ in their seeds alone are pooled. Where an algorithm has several groups on an environment they are
    numbered, with the same number for the same settings on every environment. Runs that share a seed and agree in all
    settings are not independent, so they stay apart, told by their names.
    """
    buckets: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        alike = [
            found for identity, found in buckets
            if identity == run.identity and found[0].place == run.place
        ]  # fmt: skip
        if alike:
            alike[0].append(run)
        else:
            buckets.append((run.identity, [run]))
    apart = []
    for identity, found in buckets:
        seeds = [seed for run in found for seed in run.seeds]
        if len(set(seeds)) == len(seeds):
            apart.append((identity, found))
            continue
        names = [Path(run.name).name.removesuffix(".json") for run in found]
        names = names if len(set(names)) == len(names) else [run.name for run in found]
        apart += [({**identity, "run": name}, [run]) for name, run in zip(names, found, strict=True)]

    groups = []
    for algorithm in sorted({run.algorithm for run in runs}):
        own = [(identity, found) for identity, found in apart if found[0].algorithm == algorithm]
        fields: dict[str, None] = {}  # a set that keeps the order
        for environment in dict.fromkeys(found[0].environment for _, found in own):
            fields |= dict.fromkeys(
                differing([identity for identity, found in own if found[0].environment == environment])
            )
        details = [", ".join(f"{field}={show(identity.get(field, ...))}" for field in fields) for identity, _ in own]
        numbers = {detail: number for number, detail in enumerate(dict.fromkeys(details), start=1)}
        for detail, (_, found) in zip(details, own, strict=True):
            label = display_name(algorithm) + f" {numbers[detail]}" * bool(fields)
            groups.append((numbers[detail], Group(label, detail, found[0].environment, tuple(found))))
    return [group for _, group in sorted(groups, key=lambda x: (x[1].environment, x[1].runs[0].algorithm, x[0]))]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the fields in which not all agree; one that some do not have differs."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({show(each.get(name, ...)) for each in settings}) > 1]


def environments_of(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.environment for group in groups))


def found_amiss(groups: Sequence[Group]) -> list[str]:
    """What a reader must know before believing a comparison, a sentence each."""
    said = [warning for group in groups for run in group.runs for warning in run.warnings]
    for environment in environments_of(groups):
        own = [group for group in groups if group.environment == environment]
        ends = {group.label: sorted({run.last_step for run in group.runs}) for group in own}
        if len({step for steps in ends.values() for step in steps}) > 1:
            parts = [f"{label} at {listed(f'{step:,}' for step in steps)}" for label, steps in ends.items()]
            said.append(f"{environment}: runs end at different env steps: {listed(parts)}")
        counts = {group.label: len(group.scores) for group in own}
        if len(set(counts.values())) > 1:
            parts = [f"{label} has {count}" for label, count in counts.items()]
            said.append(f"{environment}: different numbers of seeds: {listed(parts)}")
    apart = [group for group in groups if "run=" in group.detail]
    if apart:
        names = listed(dict.fromkeys(group.label for group in apart))
        said.append(f"runs with equal settings share seeds, so they are shown apart and not pooled: {names}")
    devices = {show(run.about.get("versions", {}).get("device_kind", ...)) for group in groups for run in group.runs}
    if len(devices) > 1:
        said.append(f"runs come from different devices, so their times do not compare: {listed(sorted(devices))}")
    return said


def show(value: Any) -> str:
    """A setting for people; `...` stands for one that is not there."""
    if value is ...:
        return NONE
    return value if isinstance(value, str) else json.dumps(value)


def listed(words: Iterable[Any]) -> str:
    return ", ".join(map(str, words))

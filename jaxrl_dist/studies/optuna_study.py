"""A study whose configurations Optuna proposes, each after seeing how the earlier ones scored.

    study.json            as for other studies (`study`), with the configurations trained so far
    optuna.log            Optuna's journal; its own tools open it (JournalStorage, the study is called STUDY_NAME)
    batch_000/wave_00     an ordinary run folder per wave; a batch is what was proposed at once
    results.csv, ...      as for other studies; the number of a configuration is that of its trial

For spaces of sizes, switches and names, where every choice is a program of its own and a grid would compile them all;
floats may be among them, and proposals of one batch that differ in floats alone share a program. A proposal is trained
with all seeds, and scores the interquartile mean over seeds of its last evaluation. One that was trained before gets
the same score without being trained again; one that cannot work, or of which a seed diverges, is a failed trial.

The sampler is Optuna's TPE (Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011), seeded anew
for every trial by the trial's number: a killed study that goes on with `--name NAME --resume auto` proposes what it
would have proposed. With a larger --sweep-optuna it goes on to more trials.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from jaxrl_dist.configuration import ConfigurationError, check_configuration, require
from jaxrl_dist.records import recording, tables
from jaxrl_dist.running import folders, problem, session
from jaxrl_dist.studies import study, sweeps
from jaxrl_dist.wording import counted

STUDY_NAME = "jaxrl_dist"
JOURNAL = "optuna.log"


def train(
    algorithm: str,
    make_agent: Callable,
    config: Any,
    options: problem.RunOptions,
    axes: Mapping[str, sweeps.Axis],
    console: Console,
    sweep: sweeps.SweepOptions,
) -> Path:
    """Train what Optuna proposes out of `axes`, `sweep.sweep_optuna` trials in all; returns the study's folder.

    Raises ConfigurationError, before anything compiles, without Optuna, for values out of range, and where `config`
    itself cannot work; KeyboardInterrupt after a clean stop.
    """
    _optuna()
    sweeps.check(sweep)
    swept = [dataclasses.replace(config, warmup_steps=steps) for steps in axes.get("warmup_steps", ())]
    options = problem.with_total_steps(dataclasses.replace(options, plots=False), config, *swept)
    problem.prepare(algorithm, make_agent, config, options)
    for field, axis in axes.items():
        for value in (axis.low, axis.high) if isinstance(axis, sweeps.Span) else axis:
            check_configuration(dataclasses.replace(config, **{field: value}))
    folder = folders.folder_of(algorithm, options)
    with folders.claim(folder, options, record="study.json"):
        about = {"fields": list(axes), "configurations": [], "axes": axes, "sweep": dataclasses.asdict(sweep)}
        study.write_or_compare(folder, algorithm, options, config, about, "axes")
        record = study.read(folder, {"sweep.sweep_seed": int})
        seed = record["sweep"]["sweep_seed"]
        require(
            seed == sweep.sweep_seed,
            f"--sweep-seed is {sweep.sweep_seed}, but the study to resume was started with {seed}; they must be equal",
        )
        proposals = _Proposals(folder, axes, sweep, record["configurations"])
        console.print(
            f"[bold]study[/bold] of {counted(sweep.sweep_optuna, 'trial')} with "
            f"{counted(options.num_seeds, 'seed')} each, {sweep.sweep_parallel} proposed at once, in {folder}"
        )
        problems: dict[int, problem.Problem] = {}
        waves = study.Waves(folder, problems, options, console)

        def can_work(number: int) -> bool:
            values = dataclasses.replace(config, **proposals.values(number))
            try:
                problems[number] = problem.prepare(algorithm, make_agent, values, options)
            except ConfigurationError as error:
                proposals.fail(number, str(error), console)
            return number in problems

        for batch in itertools.count():
            part = f"batch_{batch:03d}"
            recorded = waves.recorded(part)
            require(
                all(number < len(proposals.trials) for number in recorded),
                f"{folder / part / 'waves.json'} has trial {max(recorded, default=0)}, of which {folder / JOURNAL} "
                "knows nothing",
            )
            numbers = [number for number in recorded if can_work(number)]
            while not numbers and (asked := proposals.ask()):
                numbers = [number for number in asked if proposals.is_new(number, console) and can_work(number)]
            if not numbers:
                break
            configurations = [{"configuration": number, **proposals.values(number)} for number in problems]
            recording.write_json(folder / "study.json", study.read(folder) | {"configurations": configurations})
            for path, wave in waves.cut(part, numbers).items():
                _train(waves, path, wave, proposals, console)
        study.collect(folder, console)
    return folder


def _train(waves: study.Waves, path: Path, wave: sweeps.Wave, proposals: "_Proposals", console: Console) -> None:
    """Train one wave unless all its trials were told already, and tell its scores."""
    if not any(map(proposals.waits, wave.numbers)):
        return
    try:
        waves.train(path, wave)
    except session.NonFiniteMetric as error:
        for number in filter(proposals.waits, wave.numbers):
            proposals.fail(number, str(error), console)
        return
    results = study.metrics_of([path])
    for number in filter(proposals.waits, wave.numbers):
        score = sweeps.score(results, number)
        if score is None:
            proposals.fail(number, "not all of its seeds came to the end with finite returns", console)
        else:
            proposals.tell(number, score, console)


class _Proposals:
    """Optuna's study: what was proposed, and what became of it."""

    def __init__(
        self,
        folder: Path,
        axes: Mapping[str, sweeps.Axis],
        sweep: sweeps.SweepOptions,
        trained: Sequence[Mapping[str, Any]] = (),
    ):
        """`trained`: configurations that the study has a record of, and Optuna's journal with it."""
        optuna = _optuna()
        self.sweep, self.choices, self.space = sweep, {}, {}
        for field, axis in axes.items():
            if isinstance(axis, sweeps.Span):
                self.space[field] = optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log)
            else:  # Optuna's choices are numbers and names; several widths are written as one name
                self.choices[field] = {sweeps.shown(x) if isinstance(x, tuple) else x: x for x in axis}
                self.space[field] = optuna.distributions.CategoricalDistribution(list(self.choices[field]))
        journal = folder / JOURNAL
        require(not trained or journal.is_file(), f"{journal} does not exist, but the study has {len(trained)} trials")
        if journal.exists():
            tables.drop_incomplete_line(journal)  # Optuna would write the next line behind it
        try:
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
            self.study = optuna.create_study(
                storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
            )
            whole = [trial.number for trial in self.trials if trial.params.keys() == axes.keys()]
            there = {number: {"configuration": number, **self.values(number)} for number in whole}
        except Exception as error:  # of its own log Optuna says what Python says of it: KeyError, TypeError ...
            raise ValueError(f"{journal} is damaged ({type(error).__name__}: {error})") from error
        for configuration in trained:
            number = configuration["configuration"]
            values = json.loads(json.dumps(there.get(number)))
            require(values == configuration, f"{journal} has {values} as trial {number}, not {configuration}")

    @property
    def trials(self) -> list:
        return self.study.get_trials(deepcopy=False)

    def ask(self) -> list[int]:
        """Numbers of the trials that wait, and of new ones until there are `sweep_parallel`; none when all are done."""
        optuna = _optuna()
        # What waits already was asked for just before the study was killed.
        asked = [trial.number for trial in self.trials if self.waits(trial.number)]
        while len(asked) < self.sweep.sweep_parallel and len(self.trials) < self.sweep.sweep_optuna:
            seed = np.random.SeedSequence((self.sweep.sweep_seed, len(self.trials))).generate_state(1)[0]
            self.study.sampler = optuna.samplers.TPESampler(seed=int(seed), constant_liar=True)
            asked.append(self.study.ask(self.space).number)
        return asked

    def is_new(self, number: int, console: Console) -> bool:
        """Whether the trial is to be trained; if not, what is known of it is told, now or with the trial it repeats."""
        trial = self.trials[number]
        if trial.params.keys() != self.space.keys():
            self.fail(number, "the study was killed while this was proposed", console)
            return False
        first = next(other for other in self.trials if other.params == trial.params)
        if first.number == number:
            return True
        console.print(f"trial {number} repeats trial {first.number}")
        if not self.waits(first.number):
            self.study.tell(number, first.value, first.state)
        return False

    def values(self, number: int) -> dict[str, Any]:
        """The fields of one configuration."""
        params = self.trials[number].params.items()
        return {field: self.choices[field][value] if field in self.choices else value for field, value in params}

    def waits(self, number: int) -> bool:
        """Whether the trial was proposed and its score not told yet."""
        return not self.trials[number].state.is_finished()

    def tell(self, number: int, score: float, console: Console) -> None:
        self._tell(number, score, _optuna().trial.TrialState.COMPLETE)
        best = self.study.best_trial
        values = sweeps.command_options(self.values(number))
        console.print(f"trial {number} scores {score:.4g} with {values}; best: {best.value:.4g}, trial {best.number}")

    def fail(self, number: int, why: str, console: Console) -> None:
        console.print(f"[yellow]trial {number} failed: {why}")
        self._tell(number, None, _optuna().trial.TrialState.FAIL)

    def _tell(self, number: int, score: float | None, state: Any) -> None:
        """Tell this of the trial and of those that repeat it."""
        for trial in self.trials:
            if trial.params == self.trials[number].params and self.waits(trial.number):
                self.study.tell(trial.number, score, state)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigurationError("--sweep-optuna needs the package optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna

"""A training run as a user sees it: plan, compile, progress, evaluations, checkpoints, tables and pictures in a folder.

The host loop of `training.Programs`. Between chunks of iterations it draws the progress bar, looks for non-finite
metrics and for Ctrl-C; at fixed iterations it evaluates, records and checkpoints, so what is recorded depends neither
on how fast the machine is nor on where a run was interrupted. Several processes go through this same loop (`hosts`):
they agree on the length of every chunk and on stopping, and the first one alone prints and keeps the tables.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxrl_dist import evaluation, hosts, interaction, plotting, portable, recording, reporting, statistics, training
from jaxrl_dist.agent import Agent, ConfigurationError, option, require
from jaxrl_dist.checkpointing import Checkpoints
from jaxrl_dist.keys import is_key
from jaxrl_dist.problem import Problem, RunOptions, action_bounds, device_count

CHUNK_SECONDS = 0.5
EVALUATIONS = 20  # of a run, unless --eval-every says otherwise
CLIPPED_MASS_TO_WARN_OF = 0.05


class NonFiniteMetric(RuntimeError):
    """Training broke: a metric became NaN or infinite."""


class Leg(NamedTuple):
    """A part of training, as a rung of successive halving is: it ends early, and may begin where others ended."""

    last_iteration: int
    sources: tuple[Path, ...] = ()
    """finished run folders, in the order of their configurations, that hold the runs to go on with; none: begin anew"""


def train(
    problem: Problem,
    console: Console | None = None,
    programs: training.Programs | None = None,
    leg: Leg | None = None,
) -> Path:
    """Run training from its plan to its pictures; returns the run's folder.

    `programs`: those of an earlier run with the same shapes, so that nothing is compiled again; they get this run's
    floats. `leg`: the part of training to do, all of it by default. Raises NonFiniteMetric when training breaks and
    KeyboardInterrupt after a clean stop by Ctrl-C; in both cases all that was recorded stays, and the last good
    checkpoint with it.
    """
    console = console or Console(quiet=not hosts.is_first())
    hosts.require_same([dataclasses.asdict(x) for x in (problem.config, _without_place(problem.options))])
    folder = folder_of(problem.algorithm, problem.options)
    with claim(folder, problem.options):
        return _Session(problem, folder, console, programs, leg).run()


def folder_of(algorithm: str, options: RunOptions) -> Path:
    """Where a run is kept: RUNS_FOLDER/ALGORITHM/ENVIRONMENT/NAME, by default named after the date and time."""
    name = options.name or hosts.by_first(date_and_time)
    return Path(options.runs_folder) / algorithm / options.env_id.replace("/", "-") / name


def date_and_time() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def make_programs(problem: Problem) -> training.Programs:
    """The programs of a run, not compiled yet."""
    options = problem.options
    return training.Programs(
        problem.make_agent, problem.config, problem.env, problem.env_params,
        num_runs=options.num_seeds * max(1, len(problem.configurations)), max_devices=device_count(options),
        runs_mode=options.runs_mode, data_parallel=options.data_parallel,
        eval_episodes=options.eval_episodes, eval_max_steps=options.eval_max_steps,
        eval_states=options.eval_states, eval_rollouts=options.eval_rollouts,
    )  # fmt: skip


def leg_end(problem: Problem, env_steps: int) -> int:
    """The iteration of the evaluation nearest to `env_steps`, 0 if that is before the first; of the total: the last."""
    agent, options = problem.make_agent(problem.config, problem.env, problem.env_params), problem.options
    if env_steps >= options.total_steps:
        return training.iterations_for(agent, options.total_steps)
    every = _interval(agent, options, options.eval_every, EVALUATIONS)
    return max(0, round((env_steps - agent.warmup_steps) / agent.steps_per_iteration / every)) * every


def _interval(agent: Agent, options: RunOptions, env_steps: int, default_parts: int) -> int:
    """Iterations between two events, at least one; `env_steps` 0 divides the whole run into `default_parts`."""
    return max(1, round((env_steps or options.total_steps / default_parts) / agent.steps_per_iteration))


class _Session:
    """The run in one place: what the host keeps between chunks."""

    def __init__(self, problem: Problem, folder: Path, console: Console, programs, leg: Leg | None):
        self.problem, self.folder, self.console, self.leg = problem, folder, console, leg
        options = self.options = problem.options
        seeds = np.arange(options.seed, options.seed + options.num_seeds)
        self.seeds = np.tile(seeds, max(1, len(problem.configurations)))
        # What tells the runs apart in every record: the seed, in a sweep the configuration before it.
        self.runs = [{"seed": int(seed)} for seed in self.seeds]
        if problem.configurations:
            numbers = np.repeat(problem.configurations, options.num_seeds)
            self.runs = [{"configuration": int(n)} | run for n, run in zip(numbers, self.runs, strict=True)]
        self.programs = programs or make_programs(problem)
        self.programs.set_floats(problem.config)
        agent = self.agent = self.programs.agent
        self.total_iterations = leg.last_iteration if leg else training.iterations_for(agent, options.total_steps)
        self.eval_interval = _interval(agent, options, options.eval_every, EVALUATIONS)
        self.checkpoint_interval = _interval(agent, options, options.checkpoint_every, 4)
        run_keys = jax.vmap(training.run_keys)(jax.vmap(jax.random.key)(jnp.asarray(self.seeds)))
        self.training_keys, self.evaluation_keys = run_keys
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=options.checkpoint_keep)
        self.training_seconds = 0.0
        self.interrupted = False  # a signal has come to this process
        self.stopped = False  # all processes have agreed to stop
        self.warned_of_clipping = self.warned_of_missing = False

    def env_steps(self, iteration: int) -> int:
        """Environment steps of one run after `iteration` iterations."""
        return self.agent.warmup_steps + iteration * self.agent.steps_per_iteration

    def run(self) -> Path:
        self._print_plan()
        started = time.perf_counter()
        self.console.print("compiling ...")
        self.programs.compile()
        self.compile_seconds = time.perf_counter() - started
        self.console.print(f"compiled in {self.compile_seconds:.1f} s")

        recorder = recording.NoRecorder()
        if hosts.is_first():
            recorder = recording.Recorder(
                self.folder, tensorboard=self.options.tensorboard, wandb_project=self.options.wandb
            )
        try:
            state, iteration = self._start(recorder)
            self.before = (iteration, self.training_seconds)
            state, iteration = self._loop(state, iteration, recorder)
        finally:
            recorder.close()
        if self.stopped:
            again = "" if self.problem.configurations else f"; continue with --name {self.folder.name} --resume latest"
            self.console.print(f"stopped at iteration {iteration}{again}")
            raise KeyboardInterrupt
        self._save_policies(state)
        self._print_results(iteration)
        if self.options.plots:
            self._draw(state)
        hosts.wait()  # the other processes write policies too
        self.console.print(f"results in {self.folder}")
        return self.folder

    # -- before ---------------------------------------------------------------------------------------------------

    def _print_plan(self) -> None:
        options, agent, programs = self.options, self.agent, self.programs
        abstract = programs.abstract_training
        copies = programs.num_devices if options.data_parallel else 1
        total, replay = copies * bytes_of(abstract), copies * bytes_of(abstract.state.experience.replay)
        ratio = agent.updates_per_iteration / agent.steps_per_iteration
        table = Table.grid(padding=(0, 2))
        rows = {
            "algorithm": f"{self.problem.algorithm} on {options.env_id}",
            "runs": f"{len(self.runs)} (seeds {self.seeds[0]} to {self.seeds[-1]}{self._of_configurations()}), "
            f"{programs.runs_mode} on {programs.num_devices} {jax.default_backend()} device(s)"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            "each run": f"{self.env_steps(self.total_iterations):,} env steps, {agent.warmup_steps:,} of them warm-up; "
            f"{self.total_iterations * agent.updates_per_iteration:,} updates ({ratio:g} per env step)",
            "memory": f"{_megabytes(total)} predicted for all runs, {_megabytes(replay)} of it replay",
            "folder": str(self.folder),
        }
        if hasattr(self.problem.config, "v_min") and not self.problem.configurations:
            config, probed = self.problem.config, options.probe_support
            source = "" if probed == "off" else f", from the {probed} of random actions"
            rows["support"] = f"{config.num_atoms} atoms from {config.v_min:g} to {config.v_max:g}{source}"
        for key, value in rows.items():
            table.add_row(f"[bold]{key}", value)
        self.console.print(table)
        available = available_bytes()
        require(
            available is None or total < available,
            f"--num-seeds is {options.num_seeds} and --replay-capacity {self.problem.config.replay_capacity}: the runs "
            f"need {_megabytes(total)}, but {_megabytes(available or 0)} are free; lower either of them",
        )

    def _of_configurations(self) -> str:
        count = len(self.problem.configurations)
        return f" of {count} configurations" if count else ""

    def _start(self, recorder: recording.Recorder) -> tuple[training.Training, int]:
        """A fresh start, or the state of a checkpoint with the records cut back to it."""
        iteration = self._iteration_to_resume() if self.options.resume else None
        if iteration is None:
            if self.options.resume:  # a run killed before its first checkpoint may have left records
                recorder.truncate_after(-1)
                self.checkpoints.remove_after(-1)
            recorder.write_config(self._description())
            if self.leg and self.leg.sources:
                return self._continue_from(self.leg.sources)
            return self.programs.begin(self.training_keys), 0
        saved = recording.read_config(self.folder)
        require_same_settings(saved, self._description())
        like = {"training": self.programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
        loaded = self.checkpoints.load(iteration, like)
        self.training_seconds = float(loaded["seconds"])
        # What lies beyond the checkpoint will be done again.
        recorder.truncate_after(self.env_steps(iteration))
        self.checkpoints.remove_after(iteration)
        self.console.print(f"resumed at iteration {iteration} ({self.env_steps(iteration):,} env steps)")
        return loaded["training"], iteration

    def _continue_from(self, sources: Sequence[Path]) -> tuple[training.Training, int]:
        """The states of this wave's runs at the end of `sources`, whose other runs stay behind."""
        like = self.programs.abstract_training
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])  # all runs may not fit a device
        parts, found = [], []
        for folder in sources:
            there = recording.read_config(folder)["configurations"]
            wanted = [number for number in there if number in self.problem.configurations]
            if not wanted:
                continue
            seeds = range(self.options.num_seeds)
            runs = np.array([there.index(number) * len(seeds) + seed for number in wanted for seed in seeds])
            all_runs = len(there) * len(seeds)
            abstract = jax.tree.map(
                lambda x, runs=all_runs: jax.ShapeDtypeStruct((runs, *x.shape[1:]), x.dtype, sharding=host), like
            )
            checkpoints = Checkpoints(folder / "checkpoints")
            iteration = checkpoints.newest()
            seconds = jax.ShapeDtypeStruct((), np.float64)
            loaded = checkpoints.load(iteration, {"training": abstract, "seconds": seconds})
            parts.append(training.take_runs(loaded["training"], runs))
            self.training_seconds = max(self.training_seconds, float(loaded["seconds"]))
            found += wanted
        require(tuple(found) == tuple(self.problem.configurations), f"{sources} hold the configurations {found}")
        return training.join_runs(parts, loaded["training"], jax.tree.map(lambda x: x.sharding, like)), iteration

    def _iteration_to_resume(self) -> int | None:
        if self.options.resume == "auto":
            iteration, skipped = self.checkpoints.newest_intact()
            for sentence in skipped:
                self.console.print(f"[yellow]{sentence}")
            if iteration is None:
                self.console.print("no intact checkpoint; starting from the beginning")
            return iteration
        found = hosts.by_first(self.checkpoints.iterations)
        require(bool(found), f"--resume is {self.options.resume!r}, but {self.folder} holds no checkpoint")
        if self.options.resume == "latest":
            return found[-1]
        iteration = int(self.options.resume)
        require(iteration in found, f"--resume is {iteration}; the checkpoints are at iterations {found}")
        return iteration

    def _description(self) -> dict[str, Any]:
        return {
            "algorithm": self.problem.algorithm,
            "command": recording.command_line(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": dataclasses.asdict(self.problem.config),
            "configurations": self.problem.configurations,
            "options": dataclasses.asdict(self.options),
            "runs_mode": self.programs.runs_mode,
            "num_devices": self.programs.num_devices,
            "versions": recording.versions(),
        }

    # -- during ---------------------------------------------------------------------------------------------------

    def _loop(self, state: training.Training, iteration: int, recorder: recording.Recorder):
        """Alternate chunks of iterations with what is due at their ends; returns the last state and its iteration."""
        self.iteration_seconds = 0.0
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"), TimeRemainingColumn(),
        )  # fmt: skip
        with _stop_on_signal(self), Progress(*columns, console=self.console) as progress:
            total = self.env_steps(self.total_iterations)
            bar = progress.add_task("", total=total, completed=self.env_steps(iteration), rates="")
            if iteration == 0:
                self._evaluate_and_record(state, np.full((len(self.seeds), len(self._names)), np.nan), 0, recorder)
            progress.update(bar, description=self._headline())
            chunk, saved_at = 1, iteration
            while True:
                asked_to_stop, chunks = hosts.collect(np.int32([self.interrupted, chunk])).T
                self.stopped, chunk = bool(asked_to_stop.any()), int(chunks.min())
                if self.stopped or iteration == self.total_iterations:
                    break
                due = min(
                    iteration - iteration % interval + interval
                    for interval in (self.eval_interval, self.checkpoint_interval)
                )
                chunk = min(chunk, due - iteration, self.total_iterations - iteration)
                started = time.perf_counter()
                state = jax.block_until_ready(self.programs.advance(state, chunk))
                seconds = time.perf_counter() - started
                self.training_seconds += seconds
                iteration += chunk
                # Grow slowly towards chunks of half a second, so that the bar moves and Ctrl-C is answered.
                self.iteration_seconds = seconds / chunk
                chunk = max(1, min(2 * chunk, round(CHUNK_SECONDS / self.iteration_seconds)))
                self._require_finite(state)
                last = iteration == self.total_iterations
                if last or iteration % self.eval_interval == 0:
                    state, averages = self.programs.take_metrics(state)
                    self._evaluate_and_record(state, hosts.gather(averages), iteration, recorder)
                if last or iteration % self.checkpoint_interval == 0:
                    self._save(state, iteration)
                    saved_at = iteration
                progress.update(
                    bar, completed=self.env_steps(iteration), description=self._headline(), rates=self._rates()
                )
            if saved_at != iteration:
                self._save(state, iteration)
        return state, iteration

    def _name(self, run: int) -> str:
        return ", ".join(f"{what} {number}" for what, number in self.runs[run].items())

    def _config_of(self, run: int) -> Any:
        """The configuration of one run, its floats as numbers."""
        return jax.tree.map(lambda x: np.ravel(x)[run % np.size(x)].item(), self.problem.config)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.programs.metric_names

    def _evaluate_and_record(self, state, averages: np.ndarray, iteration: int, recorder: recording.Recorder) -> None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.evaluation_keys, iteration)
        episodes = hosts.gather(self.programs.evaluate(state, keys))
        judged = {"evaluation_return": episodes.episode_return.mean(1)}
        if self.programs.calibrates:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 0)  # other numbers than the episodes'
            calibration = hosts.gather(self.programs.calibrate(state, keys))._asdict()
            judged |= {name: values for name, values in calibration.items() if values is not None}
        env_steps = self.env_steps(iteration)
        rows, episode_rows = [], []
        for run, name in enumerate(self.runs):
            position = {
                "iteration": iteration, "env_steps": env_steps, "updates": iteration * self.agent.updates_per_iteration,
                "seconds": round(self.training_seconds, 3), **name,
            }  # fmt: skip
            metrics = {name: float(value) for name, value in zip(self._names, averages[run], strict=True)}
            rows.append(position | {name: float(values[run]) for name, values in judged.items()} | metrics)
            outcomes = zip(episodes.episode_return[run], episodes.episode_length[run], strict=True)
            episode_rows += [
                {"env_steps": env_steps, **name, "episode": index}
                | {"episode_return": float(episode_return), "episode_length": int(episode_length)}
                for index, (episode_return, episode_length) in enumerate(outcomes)
            ]
        recorder.append_evaluations(episode_rows)
        recorder.append(rows)
        self._warn_of_clipping(rows)
        self._warn_of_missing(rows)
        self.last_returns = episodes.episode_return

    def _warn_of_clipping(self, rows: list[dict[str, Any]]) -> None:
        """Say once when much of the targets' mass lies outside the support of a categorical agent."""
        clipped = max((row.get("clipped_mass", 0.0) for row in rows), default=0.0)
        if clipped > CLIPPED_MASS_TO_WARN_OF and not self.warned_of_clipping:
            self.warned_of_clipping = True
            worst = max(range(len(rows)), key=lambda run: rows[run].get("clipped_mass", 0.0))
            config = self._config_of(worst)
            self.console.print(
                f"[yellow]clipped_mass is {clipped:.0%} at {rows[0]['env_steps']:,} env steps in {self._name(worst)}: "
                f"so much of the targets lies outside --v-min {config.v_min:g} and --v-max {config.v_max:g}; widen "
                "them, or use --probe-support"
            )

    def _warn_of_missing(self, rows: list[dict[str, Any]]) -> None:
        """Say once when Monte-Carlo returns leave much of their weight out."""
        missing = [row.get("calibration_missing", 0.0) for row in rows]
        worst = int(np.argmax(np.nan_to_num(missing)))
        sentence = evaluation.what_is_missing(missing[worst], self._config_of(worst).discount)
        if sentence and not self.warned_of_missing:
            self.warned_of_missing = True
            self.console.print(f"[yellow]{self._name(worst)}: {sentence}")

    def _require_finite(self, state: training.Training) -> None:
        broken_at = hosts.gather(state.broken_at)
        if (broken_at < 0).all():
            return
        run, metric = min(np.argwhere(broken_at >= 0), key=lambda where: broken_at[tuple(where)])
        raise NonFiniteMetric(
            f"{self._names[metric]} became non-finite at iteration {broken_at[run, metric]} in run {run} "
            f"({self._name(run)}); stopped. Results so far are in {self.folder}; intact checkpoints: "
            f"{self.checkpoints.iterations() or 'none'}"
        )

    def _save(self, state: training.Training, iteration: int) -> None:
        self.checkpoints.save(iteration, {"training": state, "seconds": np.float64(self.training_seconds)})

    def _headline(self) -> str:
        if not hasattr(self, "last_returns"):
            return "return IQM ..."
        return f"return IQM {statistics.interquartile_mean(self.last_returns.mean(1)):.1f}"

    def _rates(self) -> str:
        per_second = len(self.seeds) / self.iteration_seconds
        return (
            f"{per_second * self.agent.steps_per_iteration:,.0f} env steps/s "
            f"{per_second * self.agent.updates_per_iteration:,.0f} updates/s"
        )

    # -- after ----------------------------------------------------------------------------------------------------

    def _save_policies(self, state: training.Training) -> None:
        """Of the runs that this process holds, since parameters are not sent around."""
        (self.folder / "policies").mkdir(exist_ok=True)
        bounds = action_bounds(self.problem.env, self.problem.env_params)
        for run in training.runs_here(state):
            name = self.runs[run]
            agent = self.problem.make_agent(self._config_of(run), self.problem.env, self.problem.env_params)
            trained, path = training.one_run(state.state, run), self.folder / "policies" / recording.run_name(name)
            portable.save_policy(path.with_suffix(".npz"), agent.export(trained), *bounds)
            if run == 0:  # of the first run only: it takes up to a second
                observation = interaction.transition_like(self.problem.env, self.problem.env_params).observation
                program = portable.export_program(agent, trained, observation, *bounds)
                path.with_suffix(".stablehlo").write_bytes(program)

    def _print_results(self, iteration: int) -> None:
        if not self.problem.configurations:  # a study prints its own
            reporting.print_results(self.console, self.seeds, self.last_returns)
        runs = len(self.runs)
        # Of this process alone: before a resume there may have been another machine, before a rung more runs.
        seconds = max(self.training_seconds - self.before[1], 1e-9)
        iterations = iteration - self.before[0]
        steps = iterations * self.agent.steps_per_iteration * runs
        updates = iterations * self.agent.updates_per_iteration * runs
        self.console.print(
            f"compiled in {self.compile_seconds:.1f} s, trained in {seconds:.1f} s, peak memory "
            f"{_megabytes(_peak_bytes())}; all {runs} run(s) together did {steps / seconds:,.0f} env steps/s and "
            f"{updates / seconds:,.0f} updates/s"
        )

    def _draw(self, state: training.Training) -> None:
        title = f"{self.problem.algorithm.upper()} on {self.options.env_id}"
        if hosts.is_first():
            metrics = recording.read_metrics(self.folder)
            plotting.learning_curve({title: metrics}, self.folder / "learning_curve.png", title=title)
        if 0 not in training.runs_here(state):
            return
        first_run = training.one_run(state.state, 0)
        reporting.draw_return_distribution(
            self.agent, self.problem, first_run, jax.random.fold_in(self.evaluation_keys[0], 2**31 - 1),
            self.folder / "return_distribution.png", self.console, title=f"{title}, seed {self.seeds[0]}",
        )  # fmt: skip


# -- small things the host needs --------------------------------------------------------------------------------------


def require_same_settings(saved: dict[str, Any], now: dict[str, Any], *more: str) -> None:
    """Refuse to resume with other settings; `more`: options that must be equal besides those that always must."""
    fixed = (
        "env_id", "env_options", "seed", "num_seeds", "eval_every", "eval_episodes", "eval_max_steps",
        "eval_states", "eval_rollouts", *more,
    )  # fmt: skip
    for group, names in (("config", now["config"]), ("options", fixed)):
        for field in names:
            before, given = saved[group].get(field), now[group][field]
            before, given = (tuple(x) if isinstance(x, list | np.ndarray) else x for x in (before, given))
            require(
                before == given,
                f"{option(field)} is {given}, but the run to resume was started with {before}; they must be equal",
            )


@contextlib.contextmanager
def claim(folder: Path, options: RunOptions, record: str = "config.json") -> Iterator[None]:
    """Own the folder of a run or a study: fresh unless resuming, and no other live process in it.

    `record`: the file whose presence says that there is something to resume. Of several processes the first one is the
    owner.
    """
    with contextlib.ExitStack() as owned:
        hosts.by_first(lambda: owned.enter_context(_claim(folder, options, record)))
        yield


@contextlib.contextmanager
def _claim(folder: Path, options: RunOptions, record: str) -> Iterator[None]:
    import fcntl

    if not options.resume and folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            f"--name is {folder.name!r}, but {folder} already holds a run; choose another name, or continue it with "
            "--resume latest"
        )
    if options.resume and not (folder / record).exists() and options.resume != "auto":
        raise ConfigurationError(f"--name is {options.name!r}, but there is no run to resume in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigurationError(f"--name is {folder.name!r}, but another process is writing to {folder}") from None
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def _stop_on_signal(session: _Session) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) asks for a stop at the end of the chunk; a second one interrupts at once."""

    def ask(number, frame):
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True
        session.console.print("stopping at the end of this chunk and saving (Ctrl-C again to stop at once) ...")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere none are needed
                before[number] = signal.signal(number, ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_place(options: RunOptions) -> RunOptions:
    return dataclasses.replace(options, process_id=-1)


def bytes_of(tree) -> int:
    def size(x):
        if is_key(x):
            x = jax.eval_shape(jax.random.key_data, x)
        return math.prod(x.shape) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def available_bytes() -> int | None:
    """Memory the runs may fill: the devices' limit, or what the hosts have free; None where neither is known."""
    machines = hosts.machines()

    def of_all_like_this_one() -> int | None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit:
            return limit * jax.device_count()
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * machines
        return None

    return hosts.by_first(of_all_like_this_one)


def _peak_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

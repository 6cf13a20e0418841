"""A training run as a user sees it: plan, compile, progress, evaluations, checkpoints, tables and pictures in a folder.

The host loop of `training.Programs`. Between chunks of iterations it moves the progress bar, looks for runs that broke
and for Ctrl-C; at fixed iterations it evaluates, records and checkpoints, so what is recorded depends neither on how
fast the machine is nor on where a run was interrupted. Several processes go through this same loop (`hosts`): they
agree on the length of every chunk and on stopping, and the first one alone prints and keeps the tables.
"""

import contextlib
import dataclasses
import datetime
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist import outside
from jaxrl_dist.agent import Clock
from jaxrl_dist.configuration import require
from jaxrl_dist.learning import datasets, interaction, portable
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import (
    best,
    compile_cache,
    evaluation,
    folders,
    hosts,
    memory,
    progress,
    results,
    resuming,
    stopping,
    support,
    training,
    watching,
)
from jaxrl_dist.running.catalog import display_name, own_file
from jaxrl_dist.running.checkpointing import Checkpoints, megabytes
from jaxrl_dist.running.problem import Problem, RunOptions, action_bounds, device_count, stop_target
from jaxrl_dist.wording import counted

CHUNK_SECONDS = 0.5
EVALUATIONS = 20  # of a run, unless --eval-every says otherwise


class NonFiniteMetric(RuntimeError):
    """Training broke and was to stop then (`--on-divergence stop`): a metric became NaN or infinite."""


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
    floats. `leg`: the part of training to do, all of it by default. Everything that can be refused is refused before
    the folder of a new run is made, and before that of an old one is touched or anything compiles. Raises
    NonFiniteMetric when training breaks and is to stop then, and KeyboardInterrupt after a clean stop by Ctrl-C; in
    both cases all that was recorded stays, and the last good checkpoint with it. Runs that were frozen are in the
    tables (`recording.divergences`).
    """
    console = console or Console(quiet=not hosts.is_first())
    hosts.require_same([dataclasses.asdict(x) for x in (problem.config, _without_place(problem.options))])
    options, folder, past = problem.options, folders.folder_of(problem.algorithm, problem.options), None
    recording.require_packages(tensorboard=options.tensorboard, wandb_project=options.wandb)
    if problem.configurations:
        stopping.refuse_in_sweeps(options)
    with contextlib.ExitStack() as owned:
        if options.resume:
            owned.enter_context(folders.claim(folder, options))
            agent = problem.agent(_of_first_run(problem.config))
            past = resuming.look_back(folder, problem, agent, console)
            if past and past.ring_steps > options.total_steps:  # stopped earlier than first asked for
                problem, programs = problem.fitted(past.ring_steps), None
        else:
            hosts.by_first(lambda: folders.require_unused(folder))
        programs = programs or make_programs(problem)
        memory.require_room(problem, programs, console)
        memory.require_disk(problem, programs, folder)
        if not options.resume:
            owned.enter_context(folders.claim(folder, options))
        return _Session(problem, folder, console, programs, leg, past).run()


def make_programs(problem: Problem) -> training.Programs:
    """The programs of a run, not compiled yet."""
    options = problem.options
    return training.Programs(
        problem.make_agent, problem.config, problem.env, problem.env_params, *problem.data,
        num_runs=options.num_seeds * max(1, len(problem.configurations)), max_devices=device_count(options),
        runs_mode=options.runs_mode, data_parallel=options.data_parallel, freeze=options.on_divergence == "freeze",
        eval_episodes=options.eval_episodes, eval_max_steps=options.eval_max_steps,
        eval_states=options.eval_states, eval_rollouts=options.eval_rollouts, keep_best=options.keep_best,
    )  # fmt: skip


def leg_end(problem: Problem, steps: int) -> int:
    """The iteration of the evaluation nearest to `steps` of a run's unit, 0 if that is before the first; of the total:
    the last."""
    clock, options = problem.agent().clock, problem.options
    if steps >= options.total_steps:
        return clock.iterations(options.total_steps)
    every = _interval(clock, options, options.eval_every, EVALUATIONS)
    start = clock.pretraining if clock.env_steps else 0  # until there env steps stand still
    return max(0, round((start + (steps - clock.now(0)) / clock.per_iteration) / every)) * every


def _interval(clock: Clock, options: RunOptions, steps: int, default_parts: int) -> int:
    """Iterations between two events, at least one; `steps` 0 divides the whole run into `default_parts`."""
    return clock.interval(steps or options.total_steps / default_parts)


class _Session:
    """The run in one place: what the host keeps between chunks."""

    def __init__(
        self, problem: Problem, folder: Path, console: Console, programs: training.Programs, leg: Leg | None,
        past: resuming.Past | None,
    ):  # fmt: skip
        self.problem, self.folder, self.console, self.leg, self.past = problem, folder, console, leg, past
        options = self.options = problem.options
        seeds = np.arange(options.seed, options.seed + options.num_seeds)
        self.seeds = np.tile(seeds, max(1, len(problem.configurations)))
        # What tells the runs apart in every record: the seed, in a sweep the configuration before it.
        self.runs = [{"seed": int(seed)} for seed in self.seeds]
        if problem.configurations:
            numbers = np.repeat(problem.configurations, options.num_seeds)
            self.runs = [{"configuration": int(n)} | run for n, run in zip(numbers, self.runs, strict=True)]
        self.programs = programs
        self.programs.set_floats(problem.config)
        agent = self.agent = self.programs.agent
        self.clock = agent.clock
        self.total_iterations = leg.last_iteration if leg else self.clock.iterations(options.total_steps)
        # A run that is trained longer goes on with the grid that it began with.
        grid = past.description["intervals"] if past else {}
        self.eval_interval = grid.get("evaluation") or _interval(self.clock, options, options.eval_every, EVALUATIONS)
        self.checkpoint_interval = _interval(self.clock, options, options.checkpoint_every, 4)
        if not options.checkpoint_every:
            self.checkpoint_interval = grid.get("checkpoint", self.checkpoint_interval)
        run_keys = jax.vmap(training.run_keys)(training.seed_keys(self.seeds))
        self.training_keys, self.evaluation_keys = run_keys
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=options.checkpoint_keep)
        self.training_seconds = 0.0
        self.interrupted = False  # a signal has come to this process
        self.stopped = False  # all processes have agreed to stop
        self.target = stop_target(options)
        self.reached = False  # the evaluation that was to end the run was there
        self.best = best.Best(self.programs) if options.keep_best else None
        self.last_returns: np.ndarray | None = None  # [runs, episodes]
        self.last_parts: dict[str, np.ndarray] = {}  # the same of each component of a vector of rewards, and of costs
        names = [", ".join(f"{what} {number}" for what, number in run.items()) for run in self.runs]
        agent_of = lambda run: problem.agent(self._config_of(run))  # noqa: E731
        self.watch = watching.Watch(programs, names, problem.config, agent_of, self._config_of, self._warn)

    def now(self, iteration: int) -> str:
        """Where a run stands after `iteration` iterations, in words."""
        return f"{self.clock.now(iteration):,} {self.clock.unit}"

    def run(self) -> Path:
        self._print_plan()
        if self.past and self.past.iteration == self.total_iterations:
            return self._complete(
                f"nothing is left to train: {self.now(self.past.iteration)} are done; a larger --total-steps trains "
                "longer"
            )
        if self.past and self.target is not None and self.target <= self.past.about.get("reached", -np.inf):
            return self._complete(
                f"nothing is left to train: at {self.now(self.past.iteration)} every seed's evaluation had reached "
                f"--stop-at {self.target:g}; a higher --stop-at, or none, trains on"
            )
        started = time.perf_counter()
        self.console.print("compiling ...")
        read_before = compile_cache.hits()
        self.programs.compile()
        self.compile_seconds = time.perf_counter() - started
        read = compile_cache.hits() - read_before
        of_them = f" ({read} program{'s' * (read > 1)} from the cache)" if read else ""
        self.console.print(f"compiled in {self.compile_seconds:.1f} s{of_them}")

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
            again = (
                ""
                if self.problem.configurations
                else f"; continue with --name {self.options.name or self.folder.name} --resume latest"
            )
            self.console.print(f"stopped at iteration {iteration}{again}")
            raise KeyboardInterrupt
        self._print_results(iteration)
        self._print_speed(iteration)
        self._save_policies(state, self.folder / "policies")
        self._note_target(iteration)
        if self.best:
            self._finish_best(state)
        if self.options.plots:
            self._draw_curve()
            self._draw_distribution(state)
        hosts.wait()  # the other processes write policies too
        self.console.print(f"results in {self.folder}")
        return self.folder

    def _complete(self, why: str) -> Path:
        """Of a run that is trained to its end: say so, and make what is missing of its files."""
        iteration = self.past.iteration
        self.console.print(why, soft_wrap=True)
        self._print_results(iteration)
        self.reached = "reached" in self.past.about
        self._note_target(iteration)
        policies, of_best = self.folder / "policies", self.folder / "policies" / best.FOLDER
        no_policies, no_best, no_curve, no_distribution = hosts.by_first(
            lambda: [
                not all(path.exists() for path in self._policy_files(policies)),
                bool(self.best)
                and not all(path.exists() for path in [*self._policy_files(of_best), self.folder / best.TABLE]),
                self.options.plots and not (self.folder / "learning_curve.png").exists(),
                self.options.plots and not (self.folder / "return_distribution.png").exists(),
            ]
        )
        if no_curve:
            self._draw_curve()
        if no_policies or no_best or no_distribution:
            state = self._load(iteration)
            if no_policies:
                self._save_policies(state, policies)
            if no_best:
                self._finish_best(state)
            if no_distribution:
                self._draw_distribution(state)
        if self.best and not no_best:
            self._print_best()
        hosts.wait()
        self.console.print(f"results in {self.folder}")
        return self.folder

    def _recorded_returns(self, iteration: int) -> tuple[list[list[float]], dict[str, list[list[float]]]] | None:
        """Returns `[runs, episodes]` of an evaluation and those of components by name, out of the table; None where it
        has not all of them."""
        try:
            table = recording.read_evaluations(self.folder)
        except ValueError:  # the user chose to go on with damaged records
            return None
        table = table[table.iteration == iteration]
        lane = list(self.runs[0])
        rows = [table[(table[lane] == list(run.values())).all(axis=1)] for run in self.runs]
        if {len(row) for row in rows} != {self.options.eval_episodes}:
            return None
        parts = [name for name in table if name.removeprefix("episode_").startswith(interaction.EXTRAS)]
        by_name = {name.removeprefix("episode_"): [row[name].to_list() for row in rows] for name in parts}
        return [row.episode_return.to_list() for row in rows], by_name

    # -- before ---------------------------------------------------------------------------------------------------

    def _print_plan(self) -> None:
        options, clock, programs = self.options, self.clock, self.programs
        updates = clock.updates_at(self.total_iterations)
        table = Table.grid(padding=(0, 2))
        rows = {
            "algorithm": f"{self.problem.algorithm} on {outside.shown(options.env_id)}",
            "runs": f"{len(self.runs)} (seeds {self.seeds[0]} to {self.seeds[-1]}{self._of_configurations()}), "
            f"{programs.runs_mode} on {counted(programs.num_devices, f'{jax.default_backend()} device')}"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            "each run": f"{updates:,} updates, no env steps",
            "memory": memory.summary(programs),
            "folder": str(self.folder),
        }
        if clock.env_steps:
            rows["each run"] = (
                f"{self.now(self.total_iterations)}, {clock.warmup_steps:,} of them warm-up; {updates:,} updates "
                f"({clock.updates / clock.env_steps:g} per env step)"
            )
        if self.problem.data:
            rows["data"] = f"{options.dataset}: {datasets.describe(*self.problem.data)}"
        if support.has_support(self.problem.config) and not self.problem.configurations:
            rows["support"] = support.summary(self.problem.config, options.probe_support)
        if options.eval_states and not programs.calibrates:
            why = evaluation.no_calibration(self.agent, self.problem.env, self.problem.env_params)
            rows["calibration"] = f"off: {why}"
        for key, value in rows.items():
            table.add_row(f"[bold]{key}", value)
        self.console.print(table)

    def _of_configurations(self) -> str:
        count = len(self.problem.configurations)
        return f" of {counted(count, 'configuration')}" if count else ""

    def _start(self, recorder: recording.Recorder) -> tuple[training.Training, int]:
        """A fresh start, or the state of a checkpoint with the records cut back to it."""
        if self.past is None:
            if self.options.resume:  # a run killed before its first checkpoint may have left records
                recorder.truncate_after(-1, -1)
                self.checkpoints.remove_after(-1)
            recorder.write_config(self._description())
            if self.leg and self.leg.sources:
                return self._continue_from(self.leg.sources)
            return self.programs.begin(self.training_keys), 0
        iteration = self.past.iteration
        state = self._load(iteration)
        self.watch.largest_bonus = np.asarray(self.past.about["largest_bonus"])
        # What lies beyond the checkpoint will be done again.
        recorder.truncate_after(iteration, self.clock.now(iteration), self.past.seal)
        self.checkpoints.remove_after(iteration)
        recorder.write_config(self._description())
        self.console.print(f"resumed at iteration {iteration} ({self.now(iteration)})")
        self.watch.note_divergence(state, say=False)
        return state, iteration

    def _load(self, iteration: int) -> training.Training:
        """The training of a checkpoint, with room in its replay for all that is still to come."""
        problem, programs = self.problem, self.programs
        longer = self.past.ring_steps < self.options.total_steps
        if longer:
            programs = make_programs(problem.fitted(self.past.ring_steps))
        loaded = self.checkpoints.load(iteration, programs.abstract_checkpoint)
        self.training_seconds = float(loaded["seconds"])
        state = loaded["training"]
        if self.best:
            self.best = best.Best(self.programs, self.past.about["best"], loaded["best"])
        return training.grow_replay(state, self.programs.abstract_training) if longer else state

    def _continue_from(self, sources: Sequence[Path]) -> tuple[training.Training, int]:
        """The states of this wave's runs at the end of `sources`, whose other runs stay behind."""
        like = self.programs.abstract_training
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])  # all runs may not fit a device
        parts, bonus, found = [], [], []
        for folder in sources:
            there = recording.read_config(folder, {"configurations": list})["configurations"]
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
            bonus.append(np.asarray(checkpoints.about(iteration)["largest_bonus"])[runs])
            self.training_seconds = max(self.training_seconds, float(loaded["seconds"]))
            found += wanted
        require(tuple(found) == tuple(self.problem.configurations), f"{sources} hold the configurations {found}")
        self.watch.largest_bonus = np.concatenate(bonus)
        return training.join_runs(parts, loaded["training"], jax.tree.map(lambda x: x.sharding, like)), iteration

    def _description(self) -> dict[str, Any]:
        options, before = self.options, self.past.description if self.past else {}
        command = {
            "command": recording.command_line(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "from_iteration": self.past.iteration if self.past else 0,
            "total_steps": options.total_steps,
            "versions": recording.versions(),
        }
        first = before or command
        return {
            "algorithm": self.problem.algorithm,
            "algorithm_file": own_file(self.problem.make_agent),
            "command": first["command"],
            "date": first["date"],
            "config": dataclasses.asdict(self.problem.config),
            "configurations": self.problem.configurations,
            "options": dataclasses.asdict(options),
            "intervals": {"evaluation": self.eval_interval, "checkpoint": self.checkpoint_interval},
            "dataset_sha256": datasets.digest(Path(options.dataset)) if options.dataset else "",
            "ring_steps": max(options.total_steps, self.past.ring_steps if self.past else 0),
            "runs_mode": self.programs.runs_mode,
            "num_devices": self.programs.num_devices,
            "versions": first["versions"],
            "commands": [*before.get("commands", []), command],
        }

    # -- during ---------------------------------------------------------------------------------------------------

    def _loop(self, state: training.Training, iteration: int, recorder: recording.Recorder):
        """Alternate chunks of iterations with what is due at their ends; returns the last state and its iteration."""
        self.iteration_seconds, clock, say = 0.0, self.clock, self.options.on_divergence == "freeze"
        with (
            _stop_on_signal(self),
            progress.shown(self.console, clock.now(self.total_iterations), clock.now(iteration), clock.unit) as bar,
        ):
            if iteration == 0:
                nothing = np.full((len(self.seeds), len(self._names)), np.nan)
                state = self._evaluate_and_record(state, nothing, 0, recorder)
                bar.evaluated(clock.now(0), self._headline(), "")
            chunk, saved_at = 1, iteration
            while True:
                asked_to_stop, chunks = hosts.collect(np.int32([self.interrupted, chunk])).T
                self.stopped, chunk = bool(asked_to_stop.any()), int(chunks.min())
                if self.stopped or self.reached or iteration == self.total_iterations:
                    break
                if len(self.watch.diverged) == len(self.runs) and iteration % self.eval_interval == 0:
                    self.console.print("all runs have diverged, so nothing is left to learn: stopped here")
                    break
                due = min(
                    iteration - iteration % interval + interval
                    for interval in (self.eval_interval, self.checkpoint_interval)
                )
                chunk, phase = min(chunk, due - iteration, self.total_iterations - iteration), self.programs.advance
                if iteration < clock.pretraining:
                    chunk, phase = min(chunk, clock.pretraining - iteration), self.programs.pretrain
                started = time.perf_counter()
                state = jax.block_until_ready(phase(state, chunk))
                seconds = time.perf_counter() - started
                self.training_seconds += seconds
                iteration += chunk
                # Grow slowly towards chunks of half a second, so that the bar moves and Ctrl-C is answered.
                self.iteration_seconds = seconds / chunk
                chunk = max(1, min(2 * chunk, round(CHUNK_SECONDS / self.iteration_seconds)))
                self.watch.note_divergence(state, say)
                self._stop_if_diverged()
                last = iteration == self.total_iterations
                if last or iteration % self.eval_interval == 0:
                    state, averages = self.programs.take_metrics(state)
                    state = self._evaluate_and_record(state, hosts.gather(averages), iteration, recorder)
                    bar.evaluated(clock.now(iteration), self._headline(), self._rates())
                    self.reached = stopping.all_reached(self.target, self.last_returns, self.watch.diverged)
                if last or self.reached or iteration % self.checkpoint_interval == 0:
                    self._save(state, iteration, recorder)
                    saved_at = iteration
                bar.move(clock.now(iteration), self._headline(), self._rates())
            if saved_at != iteration:
                self._save(state, iteration, recorder)
        return state, iteration

    def _warn(self, sentence: str) -> None:
        self.console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _config_of(self, run: int) -> Any:
        """The configuration of one run, its floats as numbers."""
        return jax.tree.map(lambda x: np.ravel(x)[run % np.size(x)].item(), self.problem.config)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.programs.metric_names

    def _evaluate_and_record(
        self, state: training.Training, averages: np.ndarray, iteration: int, recorder: recording.Recorder
    ) -> training.Training:
        """Evaluate all runs and write it down; those whose evaluation is not finite are marked in what is returned."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.evaluation_keys, iteration)
        episodes = hosts.gather(self.programs.evaluate(state, keys))
        judged = {"evaluation_return": episodes.episode_return.mean(1)}
        parts = evaluation.columns(episodes.extras)
        judged |= {f"evaluation_{name}": values.mean(1) for name, values in parts.items()}
        if self.programs.calibrates:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 0)  # other numbers than the episodes'
            calibration = hosts.gather(self.programs.calibrate(state, keys))._asdict()
            judged |= {name: values for name, values in calibration.items() if values is not None}
        if self.best:
            self.best.look_at(state, episodes.episode_return, iteration)
        state = self.watch.note_broken_evaluations(state, judged, iteration, self.options.on_divergence == "freeze")
        largest_reward = hosts.gather(self.programs.largest_reward(state))
        bounds = self.watch.value_bounds(largest_reward, averages)
        sums = {f"episode_{name}": values for name, values in parts.items()}
        rows, episode_rows = [], []
        for run, name in enumerate(self.runs):
            position = {
                "iteration": iteration, "env_steps": int(self.clock.env_steps_at(iteration)),
                "updates": self.clock.updates_at(iteration), **name,
            }  # fmt: skip
            metrics = {name: float(value) for name, value in zip(self._names, averages[run], strict=True)}
            clock = {"seconds": round(self.training_seconds, 3)}
            diverged_at, diverged_metric = self.watch.diverged.get(run, (None, None))
            marks = {
                "value_bound": bounds[run],
                "diverged_at": diverged_at,
                "diverged_metric": diverged_metric,
            }
            judgement = {name: float(values[run]) for name, values in judged.items()}
            rows.append(position | clock | judgement | metrics | marks)
            outcomes = zip(episodes.episode_return[run], episodes.episode_length[run], strict=True)
            episode_rows += [
                {**position, "episode": index}
                | {"episode_return": float(episode_return), "episode_length": int(episode_length)}
                | {column: float(values[run, index]) for column, values in sums.items()}
                for index, (episode_return, episode_length) in enumerate(outcomes)
            ]
        recorder.append_evaluations(episode_rows)
        recorder.append(rows)
        self.watch.look_at(rows, self.now(iteration))
        self.last_returns, self.last_parts = episodes.episode_return, parts
        self._stop_if_diverged()
        return state

    def _stop_if_diverged(self) -> None:
        if not self.watch.diverged or self.options.on_divergence == "freeze":
            return
        run, (iteration, metric) = min(self.watch.diverged.items(), key=lambda item: item[1])
        raise NonFiniteMetric(
            f"{metric} became non-finite at iteration {iteration} in run {run} ({self.watch.names[run]}); stopped. "
            f"Results so far are in {self.folder}; intact checkpoints: {self.checkpoints.iterations() or 'none'}"
        )

    def _save(self, state: training.Training, iteration: int, recorder: recording.Recorder) -> None:
        tree = {"training": state, "seconds": np.float64(self.training_seconds)}
        about = {"tables": recorder.seal(), "largest_bonus": self.watch.largest_bonus.tolist()}
        if self.best:
            tree["best"], about["best"] = self.best.kept, self.best.about()
        if self.reached:
            about["reached"] = self.target
        self.checkpoints.save(iteration, tree, about)

    def _headline(self) -> str:
        return "return IQM ..." if self.last_returns is None else progress.headline(self.last_returns)

    def _rates(self) -> str:
        if not self.iteration_seconds:
            return ""
        return self._per_second(len(self.seeds) / self.iteration_seconds)

    def _per_second(self, iterations: float, between: str = " ") -> str:
        """So many iterations a second, of all runs, in words."""
        updates = f"{iterations * self.clock.updates:,.0f} updates/s"
        steps = iterations * self.clock.env_steps
        return f"{steps:,.0f} env steps/s{between}{updates}" if steps else updates

    # -- after ----------------------------------------------------------------------------------------------------

    def _policy_files(self, folder: Path) -> list[Path]:
        """What `_save_policies` writes into a folder."""
        suffix = ".npz" if self.agent.export else ".stablehlo"
        files = [folder / f"{recording.run_name(run)}{suffix}" for run in self.runs]
        return [*files, files[0].with_suffix(".stablehlo")]

    def _save_policies(self, state: training.Training, folder: Path) -> None:
        """Of the runs that this process holds, since parameters are not sent around."""
        folder.mkdir(exist_ok=True)
        bounds = action_bounds(self.problem.env, self.problem.env_params)
        for run in training.runs_here(state):
            name = self.runs[run]
            agent = self.problem.agent(self._config_of(run))
            trained = training.one_run(training.without_replay(state.state), run)
            path = folder / recording.run_name(name)
            if agent.export:
                portable.save_policy(path.with_suffix(".npz"), agent.export(trained), *bounds)
            if run == 0 or not agent.export:  # of the first run only, where it can: it takes up to a second
                observation = interaction.transition_like(self.problem.env, self.problem.env_params).observation
                program = portable.export_program(agent, trained, observation, *bounds)
                path.with_suffix(".stablehlo").write_bytes(program)

    def _finish_best(self, state: training.Training) -> None:
        """Export the best policies, let them play new episodes, and say what became of the numbers that chose them."""
        self._save_policies(self.best.put_into(state), self.folder / "policies" / best.FOLDER)
        episodes = self.best.play(state, self.evaluation_keys)
        hosts.by_first(lambda: best.write(self.folder, self.runs, self.best, episodes, self.clock))
        self._print_best()

    def _print_best(self) -> None:
        if hosts.is_first():
            best.print_found(best.read(self.folder), self.console, self.clock.unit)

    def _note_target(self, iteration: int) -> None:
        """Write into `config.json` when each seed first reached --stop-at, and say it."""
        if self.target is None or not hosts.is_first():
            return
        reached = {
            "return": self.target, "stopped": self.reached, "iteration": iteration,
            "first": stopping.first_reached(self.folder, self.runs, self.target),
        }  # fmt: skip
        about = {**recording.read_config(self.folder), "reached": reached}
        recording.write_json(self.folder / "config.json", about)
        self.console.print(stopping.said(reached, self.clock.unit), soft_wrap=True, highlight=False)
        if self.reached:
            self.console.print(
                "the last evaluation ended the run, so it flatters; jaxrl-dist evaluate plays new episodes"
            )

    def _print_results(self, iteration: int) -> None:
        if self.problem.configurations:  # a study prints its own
            return
        # Of an evaluation by this process, if there was one.
        returns, parts = self.last_returns, self.last_parts
        if returns is None:
            found = hosts.by_first(lambda: self._recorded_returns(iteration))
            returns, parts = found or (None, {})
        if returns is not None:
            diverged = {
                self.seeds[run]: f"at iteration {iteration:,}: {metric}"
                for run, (iteration, metric) in self.watch.diverged.items()
            }
            parts = {name: np.asarray(values) for name, values in parts.items()}
            results.print_results(self.console, self.seeds, np.asarray(returns), diverged, parts)

    def _print_speed(self, iteration: int) -> None:
        runs = len(self.runs)
        # Of this process alone: before a resume there may have been another machine, before a rung more runs.
        seconds = max(self.training_seconds - self.before[1], 1e-9)
        per_second = (iteration - self.before[0]) * runs / seconds
        self.console.print(
            f"compiled in {self.compile_seconds:.1f} s, trained in {seconds:.1f} s, peak memory "
            f"{megabytes(_peak_bytes())}; {counted(runs, 'run')} together did {self._per_second(per_second, ' and ')}"
        )

    @property
    def _title(self) -> str:
        return f"{display_name(self.problem.algorithm)} on {outside.shown(self.options.env_id)}"

    def _draw_curve(self) -> None:
        if hosts.is_first():
            metrics = recording.read_metrics(self.folder)
            plotting.learning_curve({self._title: metrics}, self.folder / "learning_curve.png", title=self._title)

    def _draw_distribution(self, state: training.Training) -> None:
        if 0 not in training.runs_here(state):
            return
        first_run = training.one_run(training.without_replay(state.state), 0)
        results.draw_return_distribution(
            self.agent, self.problem, first_run, jax.random.fold_in(self.evaluation_keys[0], 2**31 - 1),
            self.folder / "return_distribution.png", self.console, title=f"{self._title}, seed {self.seeds[0]}",
        )  # fmt: skip


# -- small things the host needs --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_on_signal(session: _Session) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM, or SIGHUP of a closed terminal) asks for a stop at the end of the chunk; a second
    one interrupts at once."""

    def ask(number, frame):
        if session.interrupted:
            raise KeyboardInterrupt
        session.interrupted = True
        session.console.print("stopping at the end of this chunk and saving (Ctrl-C again to stop at once) ...")

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere none are needed
                before[number] = signal.signal(number, ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_first_run(config: Any) -> Any:
    """A configuration whose floats may be arrays `[runs]`, with those of the first run."""
    return jax.tree.map(lambda x: np.ravel(x)[0], config)


def _without_place(options: RunOptions) -> RunOptions:
    return dataclasses.replace(options, process_id=-1)


def _peak_bytes() -> int:
    import resource

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""A training run as a user sees it: plan, compile, progress, evaluations, checkpoints, tables and pictures in a folder.

The host loop of `training.Programs`. Between chunks of iterations it moves the progress bar, looks for runs that broke
and for Ctrl-C; at fixed iterations it evaluates, records and checkpoints, so what is recorded depends neither on how
fast the machine is nor on where a run was interrupted. Several processes go through this same loop (`hosts`): they
agree on the length of every chunk and on stopping, and the first one alone prints and keeps the tables.
"""

import contextlib
import dataclasses
import datetime
import os
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

from jaxrl_dist.agent import Agent
from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.learning import interaction, portable
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.running import compile_cache, evaluation, hosts, memory, progress, results, resuming, training
from jaxrl_dist.running.catalog import display_name
from jaxrl_dist.running.checkpointing import Checkpoints, megabytes
from jaxrl_dist.running.folders import require_name
from jaxrl_dist.running.problem import Problem, RunOptions, action_bounds, device_count
from jaxrl_dist.wording import counted

CHUNK_SECONDS = 0.5
LOCK = ".lock"
EVALUATIONS = 20  # of a run, unless --eval-every says otherwise
CLIPPED_MASS_TO_WARN_OF = 0.05
# A learned value beyond what rewards and discount allow by so much of it is said, and again when it has grown tenfold.
IMPLAUSIBLE, WORSE = 1.1, 10.0


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
    options, folder, past = problem.options, folder_of(problem.algorithm, problem.options), None
    recording.require_packages(tensorboard=options.tensorboard, wandb_project=options.wandb)
    with contextlib.ExitStack() as owned:
        if options.resume:
            owned.enter_context(claim(folder, options))
            agent = problem.make_agent(_of_first_run(problem.config), problem.env, problem.env_params)
            past = resuming.look_back(folder, problem, agent, console)
            if past and past.ring_steps > options.total_steps:  # stopped earlier than first asked for
                problem, programs = problem.fitted(past.ring_steps), None
        else:
            hosts.by_first(lambda: _require_unused(folder))
        programs = programs or make_programs(problem)
        memory.require_room(problem, programs, console)
        memory.require_disk(problem, programs, folder)
        if not options.resume:
            owned.enter_context(claim(folder, options))
        return _Session(problem, folder, console, programs, leg, past).run()


def folder_of(algorithm: str, options: RunOptions) -> Path:
    """Where a run is kept: RUNS_FOLDER/ALGORITHM/ENVIRONMENT/NAME, by default named after the date and time."""
    name = options.name or hosts.by_first(date_and_time)
    require_name(name)
    return Path(options.runs_folder) / algorithm / options.env_id.replace("/", "-") / name


def date_and_time() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def make_programs(problem: Problem) -> training.Programs:
    """The programs of a run, not compiled yet."""
    options = problem.options
    return training.Programs(
        problem.make_agent, problem.config, problem.env, problem.env_params,
        num_runs=options.num_seeds * max(1, len(problem.configurations)), max_devices=device_count(options),
        runs_mode=options.runs_mode, data_parallel=options.data_parallel, freeze=options.on_divergence == "freeze",
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
        self.total_iterations = leg.last_iteration if leg else training.iterations_for(agent, options.total_steps)
        # A run that is trained longer goes on with the grid that it began with.
        grid = past.description["intervals"] if past else {}
        self.eval_interval = grid.get("evaluation") or _interval(agent, options, options.eval_every, EVALUATIONS)
        self.checkpoint_interval = _interval(agent, options, options.checkpoint_every, 4)
        if not options.checkpoint_every:
            self.checkpoint_interval = grid.get("checkpoint", self.checkpoint_interval)
        run_keys = jax.vmap(training.run_keys)(training.seed_keys(self.seeds))
        self.training_keys, self.evaluation_keys = run_keys
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=options.checkpoint_keep)
        self.training_seconds = 0.0
        self.interrupted = False  # a signal has come to this process
        self.stopped = False  # all processes have agreed to stop
        self.warned_of_clipping = self.warned_of_missing = False
        self.diverged: dict[int, tuple[int, str]] = {}  # run -> iteration and metric
        self.last_returns: np.ndarray | None = None  # [runs, episodes]
        self.largest_bonus = np.zeros(len(self.runs))
        self.implausible_said = IMPLAUSIBLE

    def env_steps(self, iteration: int) -> int:
        """Environment steps of one run after `iteration` iterations."""
        return self.agent.warmup_steps + iteration * self.agent.steps_per_iteration

    def run(self) -> Path:
        self._print_plan()
        if self.past and self.past.iteration == self.total_iterations:
            return self._complete()
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
        self._save_policies(state)
        if self.options.plots:
            self._draw_curve()
            self._draw_distribution(state)
        hosts.wait()  # the other processes write policies too
        self.console.print(f"results in {self.folder}")
        return self.folder

    def _complete(self) -> Path:
        """Of a run that is trained to its end: say so, and make what is missing of its files."""
        iteration = self.past.iteration
        self.console.print(
            f"nothing is left to train: {self.env_steps(iteration):,} env steps are done; a larger --total-steps "
            "trains longer"
        )
        self._print_results(iteration)
        policies = [self.folder / "policies" / f"{recording.run_name(run)}.npz" for run in self.runs]
        no_policies, no_curve, no_distribution = hosts.by_first(
            lambda: [
                not all(path.exists() for path in [*policies, policies[0].with_suffix(".stablehlo")]),
                self.options.plots and not (self.folder / "learning_curve.png").exists(),
                self.options.plots and not (self.folder / "return_distribution.png").exists(),
            ]
        )
        if no_curve:
            self._draw_curve()
        if no_policies or no_distribution:
            state = self._load(iteration)
            if no_policies:
                self._save_policies(state)
            if no_distribution:
                self._draw_distribution(state)
        hosts.wait()
        self.console.print(f"results in {self.folder}")
        return self.folder

    def _recorded_returns(self, iteration: int) -> list[list[float]] | None:
        """Returns `[runs, episodes]` of an evaluation, out of the table; None where it has not all of them."""
        try:
            table = recording.read_evaluations(self.folder)
        except ValueError:  # the user chose to go on with damaged records
            return None
        table = table[table.env_steps == self.env_steps(iteration)]
        lane = list(self.runs[0])
        rows = [table[(table[lane] == list(run.values())).all(axis=1)].episode_return.to_list() for run in self.runs]
        return rows if {len(row) for row in rows} == {self.options.eval_episodes} else None

    # -- before ---------------------------------------------------------------------------------------------------

    def _print_plan(self) -> None:
        options, agent, programs = self.options, self.agent, self.programs
        ratio = agent.updates_per_iteration / agent.steps_per_iteration
        table = Table.grid(padding=(0, 2))
        rows = {
            "algorithm": f"{self.problem.algorithm} on {options.env_id}",
            "runs": f"{len(self.runs)} (seeds {self.seeds[0]} to {self.seeds[-1]}{self._of_configurations()}), "
            f"{programs.runs_mode} on {counted(programs.num_devices, f'{jax.default_backend()} device')}"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            "each run": f"{self.env_steps(self.total_iterations):,} env steps, {agent.warmup_steps:,} of them warm-up; "
            f"{self.total_iterations * agent.updates_per_iteration:,} updates ({ratio:g} per env step)",
            "memory": memory.summary(programs),
            "folder": str(self.folder),
        }
        if hasattr(self.problem.config, "v_min") and not self.problem.configurations:
            config, probed = self.problem.config, options.probe_support
            source = "" if probed == "off" else f", from the {probed} of random actions"
            rows["support"] = f"{config.num_atoms} atoms from {config.v_min:g} to {config.v_max:g}{source}"
        if options.eval_states and not programs.calibrates:
            why = evaluation.no_calibration(self.problem.env, self.problem.env_params)
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
        self.largest_bonus = np.asarray(self.past.about["largest_bonus"])
        # What lies beyond the checkpoint will be done again.
        recorder.truncate_after(iteration, self.env_steps(iteration), self.past.seal)
        self.checkpoints.remove_after(iteration)
        recorder.write_config(self._description())
        self.console.print(f"resumed at iteration {iteration} ({self.env_steps(iteration):,} env steps)")
        self._note_divergence(state, say=False)
        return state, iteration

    def _load(self, iteration: int) -> training.Training:
        """The training of a checkpoint, with room in its replay for all that is still to come."""
        problem, programs = self.problem, self.programs
        longer = self.past.ring_steps < self.options.total_steps
        if longer:
            programs = make_programs(problem.fitted(self.past.ring_steps))
        like = {"training": programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
        loaded = self.checkpoints.load(iteration, like)
        self.training_seconds = float(loaded["seconds"])
        state = loaded["training"]
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
        self.largest_bonus = np.concatenate(bonus)
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
            "command": first["command"],
            "date": first["date"],
            "config": dataclasses.asdict(self.problem.config),
            "configurations": self.problem.configurations,
            "options": dataclasses.asdict(options),
            "intervals": {"evaluation": self.eval_interval, "checkpoint": self.checkpoint_interval},
            "ring_steps": max(options.total_steps, self.past.ring_steps if self.past else 0),
            "runs_mode": self.programs.runs_mode,
            "num_devices": self.programs.num_devices,
            "versions": first["versions"],
            "commands": [*before.get("commands", []), command],
        }

    # -- during ---------------------------------------------------------------------------------------------------

    def _loop(self, state: training.Training, iteration: int, recorder: recording.Recorder):
        """Alternate chunks of iterations with what is due at their ends; returns the last state and its iteration."""
        self.iteration_seconds = 0.0
        with (
            _stop_on_signal(self),
            progress.shown(self.console, self.env_steps(self.total_iterations), self.env_steps(iteration)) as bar,
        ):
            if iteration == 0:
                nothing = np.full((len(self.seeds), len(self._names)), np.nan)
                state = self._evaluate_and_record(state, nothing, 0, recorder)
                bar.evaluated(self.env_steps(0), self._headline(), "")
            chunk, saved_at = 1, iteration
            while True:
                asked_to_stop, chunks = hosts.collect(np.int32([self.interrupted, chunk])).T
                self.stopped, chunk = bool(asked_to_stop.any()), int(chunks.min())
                if self.stopped or iteration == self.total_iterations:
                    break
                if len(self.diverged) == len(self.runs) and iteration % self.eval_interval == 0:
                    self.console.print("all runs have diverged, so nothing is left to learn: stopped here")
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
                self._note_divergence(state)
                self._stop_if_diverged()
                last = iteration == self.total_iterations
                if last or iteration % self.eval_interval == 0:
                    state, averages = self.programs.take_metrics(state)
                    state = self._evaluate_and_record(state, hosts.gather(averages), iteration, recorder)
                    bar.evaluated(self.env_steps(iteration), self._headline(), self._rates())
                if last or iteration % self.checkpoint_interval == 0:
                    self._save(state, iteration, recorder)
                    saved_at = iteration
                bar.move(self.env_steps(iteration), self._headline(), self._rates())
            if saved_at != iteration:
                self._save(state, iteration, recorder)
        return state, iteration

    def _warn(self, sentence: str) -> None:
        self.console.print(sentence, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _name(self, run: int) -> str:
        return ", ".join(f"{what} {number}" for what, number in self.runs[run].items())

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
        if self.programs.calibrates:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 0)  # other numbers than the episodes'
            calibration = hosts.gather(self.programs.calibrate(state, keys))._asdict()
            judged |= {name: values for name, values in calibration.items() if values is not None}
        state = self._note_broken_evaluations(state, judged, iteration)
        largest_reward = hosts.gather(self.programs.largest_reward(state))
        bounds = self._value_bounds(largest_reward, averages)
        env_steps = self.env_steps(iteration)
        rows, episode_rows = [], []
        for run, name in enumerate(self.runs):
            position = {
                "iteration": iteration, "env_steps": env_steps, "updates": iteration * self.agent.updates_per_iteration,
                **name,
            }  # fmt: skip
            metrics = {name: float(value) for name, value in zip(self._names, averages[run], strict=True)}
            clock = {"seconds": round(self.training_seconds, 3)}
            diverged_at, diverged_metric = self.diverged.get(run, (None, None))
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
                for index, (episode_return, episode_length) in enumerate(outcomes)
            ]
        recorder.append_evaluations(episode_rows)
        recorder.append(rows)
        self._warn_of_clipping(rows)
        self._warn_of_missing(rows)
        self._warn_of_implausible(rows)
        self.last_returns = episodes.episode_return
        self._stop_if_diverged()
        return state

    def _warn_of_clipping(self, rows: list[dict[str, Any]]) -> None:
        """Say once when much of the targets' mass lies outside the support of a categorical agent."""
        clipped = max((row.get("clipped_mass", 0.0) for row in rows), default=0.0)
        if clipped > CLIPPED_MASS_TO_WARN_OF and not self.warned_of_clipping:
            self.warned_of_clipping = True
            worst = max(range(len(rows)), key=lambda run: rows[run].get("clipped_mass", 0.0))
            config = self._config_of(worst)
            self._warn(
                f"clipped_mass is {clipped:.0%} at {rows[0]['env_steps']:,} env steps in {self._name(worst)}: "
                f"so much of the targets lies outside --v-min {config.v_min:g} and --v-max {config.v_max:g}; widen "
                "them, or use --probe-support"
            )

    def _warn_of_missing(self, rows: list[dict[str, Any]]) -> None:
        """Say once when Monte-Carlo returns leave much of their weight out."""
        missing = [row.get("calibration_missing", 0.0) for row in rows]
        worst = int(np.argmax(np.nan_to_num(missing)))
        sentence = evaluation.what_is_missing(missing[worst], getattr(self._config_of(worst), "discount", 1.0))
        if sentence and not self.warned_of_missing:
            self.warned_of_missing = True
            self._warn(f"{self._name(worst)}: {sentence}")

    def _value_bounds(self, largest_reward: np.ndarray, averages: np.ndarray) -> list[float | None]:
        """The largest |value| of each run that rewards and discount allow: the largest reward so far, for ever; None
        where there is no such bound. The bonus of soft agents counts like a reward."""
        if "largest_bonus" in self._names:
            bonus = np.nan_to_num(averages[:, self._names.index("largest_bonus")])
            self.largest_bonus = np.maximum(self.largest_bonus, bonus)
        discount = getattr(self.problem.config, "discount", 1.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds = (largest_reward + self.largest_bonus) / (1 - np.broadcast_to(discount, len(self.runs)))
        return [float(bound) if np.isfinite(bound) else None for bound in bounds]

    def _warn_of_implausible(self, rows: list[dict[str, Any]]) -> None:
        """Say once, and again when it is ten times worse, that learned values are beyond what is possible."""

        def excess(row: dict[str, Any]) -> float:
            claimed = max(abs(row.get(name, 0.0)) for name in ("value", "target"))  # NaN in a first row
            return claimed / row["value_bound"] if row["value_bound"] and claimed > 0 else 0.0

        worst = max(range(len(rows)), key=lambda run: excess(rows[run]))
        if excess(rows[worst]) <= self.implausible_said:
            return
        self.implausible_said = WORSE * excess(rows[worst])
        row = rows[worst]
        name = max(("value", "target"), key=lambda name: abs(row.get(name, 0.0)))
        self._warn(
            f"{name} is {row[name]:.4g} at {row['env_steps']:,} env steps in {self._name(worst)}, but no "
            f"policy can be worth more than {row['value_bound']:.4g}: the largest |reward| seen so far"
            f"{', and bonus,' if self.largest_bonus[worst] else ''} over 1 - discount; the critic over-estimates or "
            "diverges"
        )

    def _note_divergence(self, state: training.Training, say: bool = True) -> None:
        """Look for runs that broke since the last look, and say which; stop all if that was asked for."""
        broken_at = hosts.gather(state.broken_at)
        watched = training.watched_names(self._names)
        for run in np.flatnonzero((broken_at >= 0).any(1)):
            if run in self.diverged:
                continue
            column = min(np.flatnonzero(broken_at[run] >= 0), key=lambda column: broken_at[run, column])
            self.diverged[int(run)] = int(broken_at[run, column]), watched[column]
            if say and self.options.on_divergence == "freeze":
                self._warn(
                    f"{watched[column]} became NaN or infinite at iteration {broken_at[run, column]} in "
                    f"{self._name(run)}: frozen at its last finite learner, the others go on"
                )

    def _note_broken_evaluations(
        self, state: training.Training, judged: dict[str, np.ndarray], iteration: int
    ) -> training.Training:
        """The training with the runs marked as broken whose evaluation gave numbers that are not finite."""
        broken_at = np.array(hosts.gather(state.broken_at))
        watched = training.watched_names(self._names)
        for name in judged.keys() & set(watched):
            newly = ~np.isfinite(judged[name]) & (broken_at < 0).all(1)
            broken_at[newly, watched.index(name)] = iteration
        if (broken_at >= 0).any(1).sum() == len(self.diverged):
            return state
        state = self.programs.mark(state, broken_at)
        self._note_divergence(state)
        return state

    def _stop_if_diverged(self) -> None:
        if not self.diverged or self.options.on_divergence == "freeze":
            return
        run, (iteration, metric) = min(self.diverged.items(), key=lambda item: item[1])
        raise NonFiniteMetric(
            f"{metric} became non-finite at iteration {iteration} in run {run} ({self._name(run)}); stopped. Results "
            f"so far are in {self.folder}; intact checkpoints: {self.checkpoints.iterations() or 'none'}"
        )

    def _save(self, state: training.Training, iteration: int, recorder: recording.Recorder) -> None:
        tree = {"training": state, "seconds": np.float64(self.training_seconds)}
        about = {"tables": recorder.seal(), "largest_bonus": self.largest_bonus.tolist()}
        self.checkpoints.save(iteration, tree, about)

    def _headline(self) -> str:
        return "return IQM ..." if self.last_returns is None else progress.headline(self.last_returns)

    def _rates(self) -> str:
        if not self.iteration_seconds:
            return ""
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
            trained = training.one_run(training.without_replay(state.state), run)
            path = self.folder / "policies" / recording.run_name(name)
            portable.save_policy(path.with_suffix(".npz"), agent.export(trained), *bounds)
            if run == 0:  # of the first run only: it takes up to a second
                observation = interaction.transition_like(self.problem.env, self.problem.env_params).observation
                program = portable.export_program(agent, trained, observation, *bounds)
                path.with_suffix(".stablehlo").write_bytes(program)

    def _print_results(self, iteration: int) -> None:
        if self.problem.configurations:  # a study prints its own
            return
        returns = self.last_returns  # of an evaluation by this process, if there was one
        if returns is None:
            returns = hosts.by_first(lambda: self._recorded_returns(iteration))
        if returns is not None:
            diverged = {
                self.seeds[run]: f"at iteration {iteration:,}: {metric}"
                for run, (iteration, metric) in self.diverged.items()
            }
            results.print_results(self.console, self.seeds, np.asarray(returns), diverged)

    def _print_speed(self, iteration: int) -> None:
        runs = len(self.runs)
        # Of this process alone: before a resume there may have been another machine, before a rung more runs.
        seconds = max(self.training_seconds - self.before[1], 1e-9)
        iterations = iteration - self.before[0]
        steps = iterations * self.agent.steps_per_iteration * runs
        updates = iterations * self.agent.updates_per_iteration * runs
        self.console.print(
            f"compiled in {self.compile_seconds:.1f} s, trained in {seconds:.1f} s, peak memory "
            f"{megabytes(_peak_bytes())}; {counted(runs, 'run')} together did {steps / seconds:,.0f} env steps/s and "
            f"{updates / seconds:,.0f} updates/s"
        )

    @property
    def _title(self) -> str:
        return f"{display_name(self.problem.algorithm)} on {self.options.env_id}"

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

    if options.resume:
        if not (folder / record).exists() and options.resume != "auto":
            raise ConfigurationError(f"--name is {options.name!r}, but there is no run to resume in {folder}")
    else:
        _require_unused(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ConfigurationError(f"--name is {folder.name!r}, but another process is writing to {folder}") from None
    try:
        yield
    finally:
        if folder.is_dir() and _is_unused(folder):  # refused, or broken before anything was written
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
        os.close(lock)


def _is_unused(folder: Path) -> bool:
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def _require_unused(folder: Path) -> None:
    require(
        _is_unused(folder),
        f"--name is {folder.name!r}, but {folder} already holds a run; choose another name, or continue it with "
        "--resume latest",
    )


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

"""What a run says when it is over: tables of evaluation returns and pictures of learned return distributions."""

import dataclasses
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from jaxrl_dist import outside
from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.records import plotting, recording, statistics
from jaxrl_dist.running import evaluation, training
from jaxrl_dist.running.catalog import display_name
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.running.problem import Problem, RunOptions, prepare
from jaxrl_dist.wording import counted


def print_results(
    console: Console,
    seeds,
    returns: np.ndarray,
    diverged: Mapping[int, str] | None = None,
    parts: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Table of evaluation returns `[runs, episodes]`: per seed, then over seeds with its interval and CVaR.

    Seeds with a return that is not finite are left out of what is said over seeds. diverged: of the seeds that broke in
    training, where and by what. parts: of each component of a vector of rewards, and of costs, the same by name
    (`evaluation.columns`), of which a second table has the means.
    """
    diverged = diverged or {}
    columns = ("seed", "episodes", "mean return", "CVaR 10 %", "lowest", "highest", *["diverged"] * bool(diverged))
    table = Table(*columns, title="evaluation returns")
    cvar = statistics.conditional_value_at_risk
    finite = np.isfinite(returns).all(1)
    for seed, row, is_finite in zip(seeds, returns, finite, strict=True):
        numbers = (row.mean(), cvar(row, 0.1), row.min(), row.max()) if is_finite else ()
        cells = [f"{x:.1f}" for x in numbers] or ["not finite", *"\N{EN DASH}" * 3]
        table.add_row(str(seed), str(len(row)), *cells, *[diverged.get(seed, "")] * bool(diverged))
    console.print(table)
    if parts:
        table = Table("seed", *parts, title="means of what the return is made of, and of costs")
        for run, seed in enumerate(seeds):
            table.add_row(str(seed), *(f"{values[run].mean():.2f}" for values in parts.values()))
        console.print(table)
    means = returns[finite].mean(1)
    if len(means) == 0:
        console.print("no seed has finite returns, so there is no IQM")
        return
    line = f"IQM over {counted(len(means), 'seed')}: {statistics.interquartile_mean(means):.1f}"
    if len(means) > 1:
        low, high = statistics.bootstrap_interval(means)
        line += f", 95 % interval [{low:.1f}, {high:.1f}]"
    if len(means) < len(returns):
        line += f" ({len(returns) - len(means)} of {len(returns)} left out: not finite)"
    kept = returns[finite]
    console.print(f"{line}; CVaR 10 % of all {kept.size} episode returns: {cvar(kept.ravel(), 0.1):.1f}")


def diverged_seeds(metrics: pd.DataFrame) -> dict[int, str]:
    """Of the seeds of `recording.read_metrics` that diverged: where and by what metric."""
    rows = recording.divergences(metrics).itertuples()
    return {row.seed: f"at iteration {row.iteration:,}: {row.metric}" for row in rows}


def draw_return_distribution(
    agent, problem: Problem, state, key, path: Path, console: Console, *, title: str, states: int = 6
) -> None:
    """Picture of learned laws against Monte-Carlo returns from the same states, beyond the time limit.

    Of a claim about a vector of rewards the law is that of their sum; `STEM_joint` beside it shows the joint one.

    `state` is that of one run. The states are reached by the claim's policy after evenly spaced times, up to a quarter
    of the time limit.
    """
    claim, endless = agent.claim, evaluation.without_time_limit(problem.env, problem.env_params)
    if claim is None or endless is None:
        console.print(f"no {path}: {evaluation.no_calibration(agent, problem.env, problem.env_params)}")
        return
    limit = evaluation.episode_limit(problem.env_params, problem.options.eval_max_steps)
    compare = jax.jit(
        lambda state, key: evaluation.return_distributions(
            claim, problem.env, endless, state, key, states=states, rollouts=200,
            horizon=evaluation.horizon(claim.discount), spread=evaluation.spread(limit, states),
        )
    )  # fmt: skip
    found = compare(jax.device_put(state, jax.local_devices()[0]), key)
    found = jax.tree.map(np.asarray, found)
    if not all(np.isfinite(part).all() for part in jax.tree.leaves(found)):
        console.print(f"no {path}: learned or observed returns are not finite")
        return
    missing = float(found.missing.mean())
    if missing > evaluation.NEGLIGIBLE_WEIGHT:
        title += f"; beyond the rollouts: {missing:.0%} of the weight"
    plotting.return_distribution(path, predicted=found.predicted, monte_carlo=found.monte_carlo, title=title)
    if found.joint and found.joint.predicted.shape[-1] > 1:
        path = path.with_stem(f"{path.stem}_joint")
        plotting.joint_distribution(path, **found.joint._asdict(), title=title)


class SavedRun(NamedTuple):
    """A run read back from its folder; `state` is that of all runs (seeds), `[runs]` first, with the policies that were
    asked for."""

    problem: Problem
    programs: training.Programs
    seeds: np.ndarray
    state: training.Training
    iteration: int

    def index_of(self, run_seed: int) -> int:
        """The place of one of its seeds; ConfigurationError for one that it does not hold."""
        require(
            run_seed in self.seeds, f"--run-seed is {run_seed}; the run holds the seeds {list(map(int, self.seeds))}"
        )
        return int(np.flatnonzero(self.seeds == run_seed)[0])


def load_run(
    folder: Path, find_algorithm: Callable, *, episodes: int, policy: Literal["last", "best"] = "last"
) -> SavedRun:
    """The newest checkpoint of a run with its problem rebuilt from `config.json`, on whatever devices there are.

    policy: the last ones, or the best ones of a run that kept them.
    """
    require(episodes >= 1, f"--episodes is {episodes}; it must be at least 1")
    saved, path = recording.read_config(folder, {"runs_mode": str}), folder / "config.json"
    require(
        not saved.get("configurations"),
        f"RUN is {folder}, a wave of a study; its policies are in {folder / 'policies'}, its table is the study's",
    )
    try:
        own = [saved["algorithm_file"]] if saved.get("algorithm_file") else []
        module = find_algorithm(saved["algorithm"], *own)
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    config = from_json(module.Config, saved["config"], f"{path}: config")
    options = from_json(RunOptions, saved["options"] | {"runs_mode": saved["runs_mode"]}, f"{path}: options")
    options = dataclasses.replace(options, device="auto", devices="all", resume="")
    require_policy(policy, folder, options.keep_best)
    checkpoints = Checkpoints(folder / "checkpoints")
    iteration = checkpoints.newest()
    require(iteration is not None, f"RUN is {folder}, which holds no checkpoint")
    try:
        problem = prepare(saved["algorithm"], module.make_agent, config, options)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    programs = training.Programs(
        problem.make_agent, problem.config, problem.env, problem.env_params, *problem.data,
        num_runs=options.num_seeds, runs_mode=options.runs_mode,
        eval_episodes=episodes, eval_max_steps=options.eval_max_steps, keep_best=options.keep_best,
    )  # fmt: skip
    loaded = checkpoints.load(iteration, programs.abstract_checkpoint)
    state = loaded["training"] if policy == "last" else training.with_policy(loaded["training"], loaded["best"])
    return SavedRun(problem, programs, np.arange(options.seed, options.seed + options.num_seeds), state, iteration)


def require_policy(policy: str, folder: Path, keep_best: bool) -> None:
    """ConfigurationError where the best policies of a run are asked for that kept the last ones alone."""
    require(
        policy == "last" or keep_best,
        f"--policy is {policy}, but {folder} kept its last policies only; --keep-best True keeps both",
    )


def evaluate_run(
    folder: Path, find_algorithm: Callable, *, episodes: int, seed: int, policy: Literal["last", "best"] = "last"
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Evaluate the newest checkpoint of a run: its seeds `[runs]`, episode returns `[runs, episodes]`, and those of
    each component of a vector of rewards, and of costs, by name."""
    run = load_run(folder, find_algorithm, episodes=episodes, policy=policy)
    found = run.programs.evaluate(run.state, jax.random.split(jax.random.key(seed), len(run.seeds)))
    parts = {name: np.asarray(values) for name, values in evaluation.columns(found.extras).items()}
    return run.seeds, np.asarray(found.episode_return), parts


def plot_distribution(
    folder: Path, find_algorithm: Callable, out: Path, console: Console, *, run_seed: int | None, states: int, seed: int
) -> None:
    """`draw_return_distribution` of the newest checkpoint of a run; `run_seed` chooses one of its seeds."""
    require(states >= 1, f"--states is {states}; it must be at least 1")
    run = load_run(folder, find_algorithm, episodes=1)
    run_seed = int(run.seeds[0]) if run_seed is None else run_seed
    index = run.index_of(run_seed)
    problem = run.problem
    draw_return_distribution(
        problem.agent(), problem,
        training.one_run(training.without_replay(run.state.state), index), jax.random.key(seed), out, console,
        title=f"{display_name(problem.algorithm)} on {outside.shown(problem.options.env_id)}, seed {run_seed}",
        states=states,
    )  # fmt: skip


def from_json(cls, values: Mapping[str, Any], where: str):
    """A flat dataclass from its JSON form, in which tuples are lists; `where` it stands, for messages.

    ConfigurationError names a field that the class does not have, or whose value is of another type. One that the JSON
    lacks, because another version wrote it, gets its default, with a warning that names it.
    """
    hints, known = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    for name, value in values.items():
        require(name in known, f"{where} has the field {name!r}, which this version of jaxrl_dist does not know")
        require(_is_of_type(value, hints[name]), f"{where}.{name} is {value!r}; it must be {_type_name(hints[name])}")
    missing = [name for name in known if name not in values]
    if missing:
        defaults = ", ".join(f"{name} = {known[name].default!r}" for name in missing)
        warnings.warn(f"{where} lacks fields of this version of jaxrl_dist; taken as {defaults}", stacklevel=2)
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _is_of_type(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of_type(each, typing.get_args(hint)[0]) for each in value)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    return type(value) in ((int, float) if hint is float else (hint,))  # not isinstance: True is no number


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list, each part of it {_type_name(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}[hint]

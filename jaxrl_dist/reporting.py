"""What a run says when it is over: tables of evaluation returns and pictures of learned return distributions."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist import evaluation, plotting, recording, statistics, training
from jaxrl_dist.agent import require
from jaxrl_dist.checkpointing import Checkpoints
from jaxrl_dist.problem import Problem, RunOptions, prepare


def print_results(console: Console, seeds, returns: np.ndarray) -> None:
    """Table of evaluation returns `[runs, episodes]`: per seed, then over seeds with its interval and CVaR."""
    table = Table("seed", "episodes", "mean return", "CVaR 10 %", "lowest", "highest", title="evaluation returns")
    cvar = statistics.conditional_value_at_risk
    for seed, row in zip(seeds, returns, strict=True):
        numbers = (row.mean(), cvar(row, 0.1), row.min(), row.max())
        table.add_row(str(seed), str(len(row)), *(f"{x:.1f}" for x in numbers))
    console.print(table)
    means = returns.mean(1)
    line = f"IQM over {len(means)} seeds: {statistics.interquartile_mean(means):.1f}"
    if len(means) > 1:
        low, high = statistics.bootstrap_interval(means)
        line += f", 95 % interval [{low:.1f}, {high:.1f}]"
    console.print(f"{line}; CVaR 10 % of all {returns.size} episode returns: {cvar(returns.ravel(), 0.1):.1f}")


def draw_return_distribution(
    agent, problem: Problem, state, key, path: Path, console: Console, *, title: str, states: int = 6
) -> None:
    """Picture of learned laws against Monte-Carlo returns from the same states, beyond the time limit.

    `state` is that of one run. The states are reached by the target policy after evenly spaced times, up to a quarter
    of the time limit.
    """
    config, endless = problem.config, evaluation.without_time_limit(problem.env_params)
    if endless is None:
        console.print(
            f"no {path}: the time limit of {problem.options.env_id} cannot be "
            "lifted, and Monte-Carlo returns cut by it are not what the critic predicts"
        )
        return
    limit = evaluation.episode_limit(problem.env_params, problem.options.eval_max_steps)
    compare = jax.jit(
        lambda state, key: evaluation.return_distributions(
            agent, problem.env, endless, state, key,
            discount=config.discount, states=states, rollouts=200, horizon=evaluation.horizon(config.discount),
            spread=evaluation.spread(limit, states),
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


class SavedRun(NamedTuple):
    """A run read back from its folder; `state` is that of all runs (seeds), `[runs]` first."""

    problem: Problem
    programs: training.Programs
    seeds: np.ndarray
    state: training.Training
    iteration: int


def load_run(folder: Path, find_algorithm: Callable, *, episodes: int) -> SavedRun:
    """The newest checkpoint of a run with its problem rebuilt from `config.json`, on whatever devices there are."""
    require(episodes >= 1, f"--episodes is {episodes}; it must be at least 1")
    saved = recording.read_config(folder)
    require(
        not saved.get("configurations"),
        f"RUN is {folder}, a wave of a study; its policies are in {folder / 'policies'}, its table is the study's",
    )
    module = find_algorithm(saved["algorithm"])
    config, options = from_json(module.Config, saved["config"]), from_json(RunOptions, saved["options"])
    options = dataclasses.replace(options, device="auto", devices="all", resume="", runs_mode=saved["runs_mode"])
    problem = prepare(saved["algorithm"], module.make_agent, config, options)
    programs = training.Programs(
        problem.make_agent, problem.config, problem.env, problem.env_params,
        num_runs=options.num_seeds, runs_mode=options.runs_mode,
        eval_episodes=episodes, eval_max_steps=options.eval_max_steps,
    )  # fmt: skip
    checkpoints = Checkpoints(folder / "checkpoints")
    iteration = checkpoints.newest()
    require(iteration is not None, f"RUN is {folder}, which holds no checkpoint")
    like = {"training": programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
    state = checkpoints.load(iteration, like)["training"]
    return SavedRun(problem, programs, np.arange(options.seed, options.seed + options.num_seeds), state, iteration)


def evaluate_run(folder: Path, find_algorithm: Callable, *, episodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate the newest checkpoint of a run: its seeds `[runs]` and episode returns `[runs, episodes]`."""
    run = load_run(folder, find_algorithm, episodes=episodes)
    found = run.programs.evaluate(run.state, jax.random.split(jax.random.key(seed), len(run.seeds)))
    return run.seeds, np.asarray(found.episode_return)


def plot_distribution(
    folder: Path, find_algorithm: Callable, out: Path, console: Console, *, run_seed: int | None, states: int, seed: int
) -> None:
    """`draw_return_distribution` of the newest checkpoint of a run; `run_seed` chooses one of its seeds."""
    require(states >= 1, f"--states is {states}; it must be at least 1")
    run = load_run(folder, find_algorithm, episodes=1)
    run_seed = int(run.seeds[0]) if run_seed is None else run_seed
    require(run_seed in run.seeds, f"--run-seed is {run_seed}; {folder} holds the seeds {list(map(int, run.seeds))}")
    index = int(np.flatnonzero(run.seeds == run_seed)[0])
    problem = run.problem
    draw_return_distribution(
        problem.make_agent(problem.config, problem.env, problem.env_params), problem,
        training.one_run(run.state.state, index), jax.random.key(seed), out, console,
        title=f"{problem.algorithm.upper()} on {problem.options.env_id}, seed {run_seed}", states=states,
    )  # fmt: skip


def from_json(cls, values: dict):
    """A flat dataclass from its JSON form, in which tuples are lists."""
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

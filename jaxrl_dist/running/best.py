"""The best policy of every run beside the last one (`--keep-best True`), and what it is worth when nobody chose it.

After every evaluation the policies of the runs that have done better than ever before are copied, on the devices, and
every checkpoint holds the copies. The evaluation that made a policy the best one flatters it: of many noisy numbers the
highest was taken. So at the end of a run the chosen policies play new episodes, `FRESH_EVALUATIONS` times as many as an
evaluation has; `best_evaluations.csv` holds these alone, and the end of a run shows both numbers.

    policies/best/seed_0.npz     as policies/seed_0.npz, of the best policy
    best_evaluations.csv         its new episodes, a row each; `iteration` and `env_steps` are where it was chosen
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from jaxrl_dist.agent import Clock
from jaxrl_dist.configuration import require
from jaxrl_dist.records import recording, statistics, tables
from jaxrl_dist.running import evaluation, hosts, training
from jaxrl_dist.wording import counted

TABLE = "best_evaluations.csv"
FOLDER = "best"  # inside of `policies`
FRESH_EVALUATIONS = 5
# Evaluations have their run's key with the iteration folded in; this is beyond all iterations.
FRESH = 2**31


class Best:
    """What the host knows of the best policies of all runs; `kept` holds their arrays on the devices."""

    def __init__(self, programs: training.Programs, about: Mapping[str, Any] | None = None, kept: tuple | None = None):
        """about, kept: what `about` and `kept` were at the checkpoint from which the runs go on."""
        self.programs, self.kept = programs, kept
        self.returns = np.full(programs.num_runs, -np.inf)
        self.iterations = np.zeros(programs.num_runs, np.int64)
        if about is not None:
            self.returns = np.array([-np.inf if x is None else x for x in about["evaluation_return"]])
            self.iterations = np.array(about["iteration"], np.int64)

    def look_at(self, state: training.Training, returns: np.ndarray, iteration: int) -> None:
        """Keep the policies whose evaluation, `[runs, episodes]`, is better than all before; of equal ones the first.

        A run whose first evaluation is not finite keeps that policy until one is.
        """
        with np.errstate(invalid="ignore"):
            means = returns.mean(1, dtype=np.float64)
        means = np.where(np.isfinite(means), means, -np.inf)
        better = (means > self.returns) | (self.kept is None)
        if better.any():
            kept = self.programs.nothing_kept() if self.kept is None else self.kept
            self.kept = self.programs.keep_better(kept, state, better)
            self.returns, self.iterations = (
                np.where(better, new, old) for new, old in ((means, self.returns), (iteration, self.iterations))
            )

    def about(self) -> dict[str, list]:
        """For the checkpoint: where each run's best policy was found, and the evaluation by which it was."""
        returns = [float(x) if np.isfinite(x) else None for x in self.returns]
        return {"iteration": self.iterations.tolist(), "evaluation_return": returns}

    def put_into(self, state: training.Training) -> training.Training:
        """The runs with their best policies in place of the last ones."""
        return training.with_policy(state, self.kept)

    def play(self, state: training.Training, keys: jax.Array) -> evaluation.Episodes:
        """New episodes of the best policies, leaves `[runs, episodes]` on the host; keys: of the runs' evaluations."""
        best = self.put_into(state)
        fresh = [
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, np.uint32(FRESH + number))
            for number in range(FRESH_EVALUATIONS)
        ]
        found = [hosts.gather(self.programs.evaluate(best, each)) for each in fresh]
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *found)


# -- the table of new episodes ----------------------------------------------------------------------------------------


def write(
    folder: Path, runs: Sequence[Mapping[str, int]], best: Best, episodes: evaluation.Episodes, clock: Clock
) -> None:
    """`best_evaluations.csv`, with the columns of `evaluations.csv`."""
    parts = evaluation.columns(episodes.extras)
    rows = [
        {
            "iteration": int(best.iterations[run]), "env_steps": int(clock.env_steps_at(int(best.iterations[run]))),
            "updates": clock.updates_at(int(best.iterations[run])), **name, "episode": index,
            "episode_return": float(episodes.episode_return[run, index]),
            "episode_length": int(episodes.episode_length[run, index]),
            **{f"episode_{column}": float(values[run, index]) for column, values in parts.items()},
        }
        for run, name in enumerate(runs)
        for index in range(episodes.episode_return.shape[1])
    ]  # fmt: skip
    tables.replace(folder / TABLE, pd.DataFrame(rows).to_csv(index=False).encode())


class Found(NamedTuple):
    """What the tables of a run say of its best policies: a row per run.

    lanes: what tells a run apart (seed). iteration, steps: where it was chosen, steps in the run's unit. chosen: the
    mean return that made it the best. fresh: returns of its new episodes `[episodes]`. last: mean return of the last
    policy at the last evaluation.
    """

    lanes: list[dict[str, int]]
    iteration: list[int]
    steps: list[int]
    chosen: list[float]
    fresh: list[np.ndarray]
    last: list[float]


def read_episodes(folder: Path) -> pd.DataFrame:
    """`best_evaluations.csv`; ValueError, naming the file, where it is missing or damaged."""
    path = folder / TABLE
    require(
        path.is_file(), f"RUN is {folder}, which holds no {TABLE} yet: a run that keeps its best writes it at its end"
    )
    return tables.read(path, recording.EPISODE_COLUMNS)


def read(folder: Path) -> Found:
    """Out of `best_evaluations.csv` and `evaluations.csv`; ValueError, naming the file, where one is damaged."""
    fresh, evaluations = read_episodes(folder), recording.read_evaluations(folder)
    axis = recording.axis_of(evaluations)
    lane = [column for column in ("configuration", "seed") if column in fresh]
    found = Found([], [], [], [], [], [])
    for key, rows in fresh.groupby(lane):
        own = evaluations[(evaluations[lane] == list(key)).all(axis=1)]
        iteration = int(rows.iteration.iloc[0])
        found.lanes.append(dict(zip(lane, map(int, key), strict=True)))
        found.iteration.append(iteration)
        found.steps.append(int(rows[axis].iloc[0]))
        found.chosen.append(float(own.episode_return[own.iteration == iteration].mean()))
        found.fresh.append(rows.episode_return.to_numpy())
        found.last.append(float(own.episode_return[own.iteration == own.iteration.max()].mean()))
    return found


def print_found(found: Found, console: Console, unit: str) -> None:
    """Of every run: the number by which its best policy was chosen, what new episodes say, and the last policy's."""
    table = Table(
        "seed", f"after {unit}", "when chosen", "new episodes", "95 % interval", "last policy",
        title=f"the best policies, and what {counted(len(found.fresh[0]), 'new episode')} each say of them",
    )  # fmt: skip
    for lane, steps, chosen, fresh, last in zip(
        found.lanes, found.steps, found.chosen, found.fresh, found.last, strict=True
    ):
        finite = len(fresh) > 1 and np.isfinite(fresh).all()
        low, high = statistics.bootstrap_interval(fresh, np.mean) if finite else (np.nan, np.nan)
        name = recording.run_name(lane, " ").removeprefix("seed_").replace("_", " ")
        interval = f"[{low:.1f}, {high:.1f}]" if finite else "\N{EN DASH}"
        table.add_row(name, f"{steps:,}", f"{chosen:.1f}", f"{fresh.mean():.1f}", interval, f"{last:.1f}")
    console.print(table)
    means = np.array([[chosen, fresh.mean(), last] for chosen, fresh, last in zip(*found[3:], strict=True)])
    means = means[np.isfinite(means).all(1)]
    if not len(means):
        return
    iqm = statistics.interquartile_mean(means, axis=0)
    line = f"IQM over {counted(len(means), 'seed')}: {iqm[1]:.1f} in new episodes"
    if len(means) > 1:
        low, high = statistics.bootstrap_interval(means[:, 1])
        line += f", 95 % interval [{low:.1f}, {high:.1f}]"
    console.print(
        f"{line}; {iqm[0]:.1f} when chosen, which flatters, as the highest of many evaluations; last policies "
        f"{iqm[2]:.1f}"
    )

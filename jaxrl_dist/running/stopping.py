"""A run that ends when it is good enough (`--stop-at RETURN`), and when each of its seeds first was.

All seeds are one program, so a run stops as a whole: at the first evaluation after training began in which the mean
return of every seed is RETURN or more, those left out that have diverged, since a frozen seed changes no more. The
decision depends on that evaluation alone, so a run that was killed and resumed stops where it would have stopped.
`config.json` says under `reached` at which evaluation each seed first had that return.

An evaluation that ends a run is chosen, so it flatters: of many noisy ones it is the first that was high enough.
`jaxrl-dist evaluate` plays new episodes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_dist.configuration import require
from jaxrl_dist.records import recording
from jaxrl_dist.running.problem import RunOptions


def refuse_in_sweeps(options: RunOptions) -> None:
    """ConfigurationError: configurations are compared after equally much training, by their last policies."""
    require(
        not (options.stop_at or options.keep_best),
        f"{'--stop-at' if options.stop_at else '--keep-best'} is for a single run; the configurations of a sweep are "
        "compared by their last policies after equally much training",
    )


def all_reached(target: float | None, returns: np.ndarray, diverged: Sequence[int]) -> bool:
    """Whether every run that is not in `diverged`, and one at least, has a mean return `[runs, episodes]` of target."""
    if target is None:
        return False
    sound = np.setdiff1d(np.arange(len(returns)), list(diverged))
    return bool(len(sound) and (returns[sound].mean(1, dtype=np.float64) >= target).all())


def first_reached(folder: Path, runs: Sequence[dict[str, int]], target: float) -> list[dict[str, Any]]:
    """Of each run the first evaluation in `evaluations.csv` whose mean return is the target or more: its iteration,
    env_steps and updates, None where there is none."""
    table, lane = recording.read_evaluations(folder), list(runs[0])
    position = ["iteration", "env_steps", "updates"]
    means = table.groupby([*lane, *position], as_index=False).episode_return.mean()
    found = []
    for run in runs:
        own = means[(means[lane] == list(run.values())).all(axis=1) & (means.episode_return >= target)]
        first = own.sort_values("iteration").iloc[0] if len(own) else None
        found.append({**run, **{name: None if first is None else int(first[name]) for name in position}})
    return found


def said(reached: dict[str, Any], unit: str) -> str:
    """What `config.json` has under `reached`, in a sentence."""
    column = unit.replace(" ", "_")
    parts = [
        f"{recording.run_name(each, ' ').replace('_', ' ')} "
        + ("never" if each[column] is None else f"at {each[column]:,}") for each in reached["first"]
    ]  # fmt: skip
    return f"a mean return of {reached['return']:g} was first reached after so many {unit}: {', '.join(parts)}"

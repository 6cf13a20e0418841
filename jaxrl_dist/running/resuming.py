"""What a run folder holds to go on from, and every reason to refuse before anything is touched or compiled."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxrl_dist import switches
from jaxrl_dist.agent import Agent
from jaxrl_dist.configuration import ConfigurationError, option, require
from jaxrl_dist.learning import datasets
from jaxrl_dist.records import recording
from jaxrl_dist.running import hosts
from jaxrl_dist.running.catalog import own_file
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.running.problem import Problem, RunOptions

# Options of a run that must be those it was started with; all settings of the algorithm must.
FIXED = (
    "env_id", "env_options", "dataset", "seed", "num_seeds", "eval_every", "eval_episodes", "eval_max_steps",
    "eval_states", "eval_rollouts", "on_divergence", "keep_best",
)  # fmt: skip

DEFAULTS = {field.name: field.default for field in dataclasses.fields(RunOptions)}


class Past(NamedTuple):
    """Where a run goes on.

    description: its `config.json`. about: what was stored about its checkpoint. seal: what its tables were at the
    checkpoint (`recording.check_records`); empty where they are not what they were and the user said to go on.
    """

    iteration: int
    description: dict[str, Any]
    about: dict[str, Any]
    seal: dict[str, Any]

    @property
    def ring_steps(self) -> int:
        """The environment steps for which the replay of the checkpoint has room."""
        return self.description["ring_steps"]


def look_back(folder: Path, problem: Problem, agent: Agent, console: Console) -> Past | None:
    """What the run in `folder` goes on from; None where `--resume auto` finds nothing and begins anew.

    Raises ConfigurationError (ValueError for damaged files) with one line: other settings, no or a damaged checkpoint,
    a total below what is done, tables that are not what they were. Nothing is written. Collective (`hosts`).
    """
    description = hosts.by_first(lambda: _description(folder, problem))
    if description is None:
        return None
    checkpoints = Checkpoints(folder / "checkpoints")
    iteration = _iteration(checkpoints, folder, problem.options.resume, console)
    if iteration is None:
        return None
    require(
        agent.clock.iterations(problem.options.total_steps) >= iteration,
        f"--total-steps is {problem.options.total_steps}, but the checkpoint in {folder} was made at "
        f"{agent.clock.now(iteration)} {agent.clock.unit}; it must be at least that (--resume ITERATION goes back to "
        "an older checkpoint, another --name begins anew)",
    )
    last_evaluation = iteration - iteration % description["intervals"]["evaluation"]
    evaluated_at = agent.clock.env_steps_at(last_evaluation)
    about = hosts.by_first(lambda: checkpoints.about(iteration))
    seal = hosts.by_first(lambda: _seal(folder, about, evaluated_at, problem, console))
    return Past(iteration, description, about, seal)


def _description(folder: Path, problem: Problem) -> dict[str, Any] | None:
    if not (folder / "config.json").exists():
        return None  # whether there must be one, `folders.claim` knows
    fields = {
        "intervals": dict,
        "intervals.evaluation": int,
        "intervals.checkpoint": int,
        "ring_steps": int,
        "versions": dict,
    }
    description = recording.read_config(folder, {**fields, "commands": list})
    require_same_algorithm(description, own_file(problem.make_agent), problem.options.resume)
    require_same_settings(
        description, {"config": dataclasses.asdict(problem.config), "options": dataclasses.asdict(problem.options)}
    )
    if problem.options.dataset:
        require(
            description.get("dataset_sha256") == datasets.digest(Path(problem.options.dataset)),
            f"--dataset is {problem.options.dataset!r}, whose contents are not those that the run was started with",
        )
    for sentence in switches.changed(description["versions"], recording.versions()):
        raise ConfigurationError(sentence)
    return description


def _seal(folder: Path, about: dict[str, Any], evaluated_at: int, problem: Problem, console: Console) -> dict[str, Any]:
    """The checkpoint's seal of the tables, which they fulfil; empty where they do not and the run is to go on."""
    seal = about.get("tables", {})
    try:
        recording.check_records(folder, seal, evaluated_at)
    except ValueError as damage:
        require(
            problem.options.damaged_records == "keep",
            f"{damage}; the run can go on with what is left of its tables: --damaged-records keep",
        )
        console.print(f"[yellow]{damage}; going on with what is left")
        return {}
    return seal


def _iteration(checkpoints: Checkpoints, folder: Path, resume: str, console: Console) -> int | None:
    if resume == "auto":
        iteration, skipped = checkpoints.newest_intact()
        for sentence in skipped:
            console.print(f"[yellow]{sentence}")
        if iteration is None:
            console.print("no intact checkpoint; starting from the beginning")
        return iteration
    found = hosts.by_first(checkpoints.iterations)
    require(
        bool(found),
        f"--resume is {resume!r}, but {folder} holds no checkpoint; --resume auto begins anew in the same folder",
    )
    iteration = found[-1] if resume == "latest" else int(resume)
    require(iteration in found, f"--resume is {resume}; the checkpoints are at iterations {found}")
    hosts.by_first(lambda: checkpoints.verify(iteration))
    return iteration


def require_same_algorithm(saved: dict[str, Any], file: str, resume: str) -> None:
    """Refuse to go on with a user's algorithm where one of ours of the same name began, or the other way round."""
    before, ours = saved.get("algorithm_file", ""), "the one of jaxrl_dist"
    require(
        bool(before) == bool(file),
        f"--resume is {resume!r}, but the run was started with another algorithm named {saved['algorithm']}: "
        f"{before or ours}, and not {file or ours}",
    )


def require_same_settings(saved: dict[str, Any], now: dict[str, Any], *more: str) -> None:
    """Refuse to resume with other settings; `more`: options that must be equal besides those that always must."""
    for group, names in (("config", now["config"]), ("options", (*FIXED, *more))):
        for field in names:
            given = now[group][field]
            before = saved[group].get(field, DEFAULTS.get(field))  # an option that another version did not have yet
            before, given = (tuple(x) if isinstance(x, list | np.ndarray) else x for x in (before, given))
            require(
                before == given,
                f"{option(field)} is {given}, but the run to resume was started with {before}; they must be equal",
            )

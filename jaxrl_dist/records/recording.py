"""What a run folder holds and how it is written: configuration, metrics and evaluations, on the host side only.

`metrics.csv` has a row per log point and seed, `evaluations.csv` a row per evaluation episode; in a wave of a sweep
both also have the number of the configuration. Both only ever grow, a whole line at a time, so a killed run loses no
more than the line it was writing. A checkpoint holds their seal (`Recorder.seal`), and a run that goes on from it
checks them first (`check_records`), so that no row is lost or changed unsaid.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from jaxrl_dist import switches
from jaxrl_dist.records import tables

POSITION_COLUMNS = ("iteration", "env_steps", "updates", "seconds", "configuration", "seed")
EVALUATION_COLUMNS = (
    "iteration", "env_steps", "updates", "configuration", "seed", "episode", "episode_return", "episode_length",
)  # fmt: skip
EPISODE_COLUMNS = ("env_steps", "seed", "episode", "episode_return")  # what every reader of evaluations needs
TABLES = ("metrics.csv", "evaluations.csv")
WANDB_IDENTITY = "wandb_id.txt"  # a resumed run goes on as the same run
# What every reader of `config.json` needs.
CONFIG_FIELDS = {"algorithm": str, "config": dict, "options": dict, "options.env_id": str}


class Recorder:
    """Writes one run folder: `config.json`, `metrics.csv`, `evaluations.csv`, and on request TensorBoard and wandb.

    folder: made when absent; one that holds records already is continued (call `truncate_after` with the iteration of
    the checkpoint first). tensorboard: event files under `folder/tensorboard`. wandb_project: non-empty sends to that
    project. Both get one tag per seed, `seed_0/evaluation_return` (in sweeps `configuration_3/seed_0/...`), against env
    steps. Raises ValueError when a package
    that was asked for is missing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, wandb_project: str = ""):
        self.folder = Path(folder)
        self._tensorboard = _import_extra("tensorboardX", extra="tensorboard") if tensorboard else None
        self._wandb = _import_extra("wandb", extra="wandb") if wandb_project else None
        self._wandb_project = wandb_project
        self._wandb_id = _wandb_identity(self.folder) if wandb_project else None
        # Both start with the first record, when the configuration and the step resumed from are known.
        self._tensorboard_writer = None
        self._wandb_run = None
        self._resumed_from: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._evaluations = self._tables = [tables.Table(self.folder / name) for name in TABLES]

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`, in the order given: fields stay where their dataclass declares them."""
        write_json(self.folder / "config.json", config)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (one per log point and seed) to `metrics.csv`.

        Every row needs `env_steps` and `seed`; a value is a number or a zero-dimensional array, or None (or left out)
        where there is none; in `tables.TEXT_COLUMNS` it is a word. The first call fixes the columns; ValueError names
        one that turns up later.
        """
        self._metrics.append(rows, first=POSITION_COLUMNS)
        if self._tensorboard or self._wandb:
            self._send(rows)

    def append_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (one per evaluation episode) to `evaluations.csv`."""
        self._evaluations.append(rows, first=EVALUATION_COLUMNS)

    def seal(self) -> dict[str, Any]:
        """What `check_records` needs to see any later change of the tables; made for JSON, at most some 40 kB."""
        return {table.path.name: table.seal() for table in self._tables}

    def truncate_after(self, iteration: int, env_steps: int, seal: Mapping[str, Any] | None = None) -> None:
        """Drop all records beyond an iteration, so that a run resumed there writes them again and just once; -1: all.

        env_steps: those of the iteration. seal: that of the checkpoint, where `check_records` found the tables intact;
        without one, rows that cannot be read are dropped too, with a warning that says how many.
        """
        for table in self._tables:
            table.cut(iteration, env_steps, (seal or {}).get(table.path.name))
        self._resumed_from = env_steps

    def close(self) -> None:
        """Finish TensorBoard and wandb. The CSV files are complete after every append."""
        if self._tensorboard_writer:
            self._tensorboard_writer.close()
            self._tensorboard_writer = None
        if self._wandb_run:
            self._wandb_run.finish()
            self._wandb_run = None

    def _send(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._tensorboard and not self._tensorboard_writer:
            # TensorBoard hides what an earlier, longer life of this run wrote from `purge_step` on.
            # The suffix keeps the lives apart: the name holds the time in whole seconds, and an equal name overwrites.
            purge_step = None if self._resumed_from is None else self._resumed_from + 1
            self._tensorboard_writer = self._tensorboard.SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=purge_step, filename_suffix=f".{uuid.uuid4().hex}"
            )
        if self._wandb and not self._wandb_run:
            if not self._wandb_id:
                self._wandb_id = uuid.uuid4().hex
                tables.replace(self.folder / WANDB_IDENTITY, self._wandb_id.encode())
            self._wandb_run = self._wandb.init(
                project=self._wandb_project,
                name=self.folder.name,
                id=self._wandb_id,
                resume="allow",
                dir=str(self.folder),
                config=read_json(self.folder / "config.json") if (self.folder / "config.json").exists() else None,
            )
        step_of = lambda row: int(row["env_steps"] or row.get("updates", 0))  # noqa: E731 without env steps: updates
        for step, group in itertools.groupby(sorted(rows, key=step_of), key=step_of):  # wandb never goes back
            scalars = {
                f"{run_name(row, '/')}/{column}": float(value)
                for row in group
                for column, value in row.items()
                if column not in ("env_steps", "configuration", "seed", *tables.TEXT_COLUMNS) and value is not None
            }
            if self._tensorboard_writer:
                for tag, value in scalars.items():
                    self._tensorboard_writer.add_scalar(tag, value, step)
                self._tensorboard_writer.flush()
            if self._wandb_run:
                self._wandb_run.log(scalars, step=step)


def require_packages(*, tensorboard: bool, wandb_project: str) -> None:
    """Raise ValueError where a package that recording needs is missing; before anything is written."""
    if tensorboard:
        _import_extra("tensorboardX", extra="tensorboard")
    if wandb_project:
        _import_extra("wandb", extra="wandb")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all; arrays, paths and dataclasses become lists, strings and objects."""
    text = json.dumps(value, indent=2, default=_as_json, ensure_ascii=False) + "\n"
    tables.replace(path, text.encode())


def read_json(path: Path, fields: Mapping[str, type] | None = None) -> Any:
    """A JSON record; `fields`: those that it must have, and their types. `options.seed` is a field of a field.

    Raises ValueError, naming the file and what is wrong, where it is missing, empty, cut, not UTF-8, or lacks a field.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty")
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: no complete JSON ({error})") from error
    for name, kind in (fields or {}).items():
        value, parts = found, name.split(".")
        for index, part in enumerate(parts):
            if not isinstance(value, dict):
                where = ".".join(parts[:index]) or "the whole"
                raise ValueError(f"{path}: {where} is {_shown(value)}; it must be an object")
            if part not in value:
                raise ValueError(f"{path} has no field {name!r}")
            value = value[part]
        if type(value) is not kind:
            raise ValueError(f"{path}: {name} is {_shown(value)}; it must be {_KINDS[kind]}")
    return found


_KINDS = {str: "a text", int: "a whole number", dict: "an object", list: "a list"}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


class NoRecorder:
    """Takes everything a `Recorder` takes and writes nothing: what all processes but the first one have."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def append_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def seal(self) -> dict[str, Any]:
        return {}

    def truncate_after(self, iteration: int, env_steps: int, seal: Mapping[str, Any] | None = None) -> None:
        pass

    def close(self) -> None:
        pass


def seal_of(folder: Path) -> dict[str, Any]:
    """The seal of a run's tables as they are on the disk; nobody may be writing to them."""
    return {name: tables.Table(Path(folder) / name).seal() for name in TABLES}


def check_records(folder: Path, seal: Mapping[str, Any], evaluated_at: int) -> None:
    """Compare the tables of a run with the seal of a checkpoint; ValueError names path and row, and what is wrong.

    Rows after the sealed ones may be there: `Recorder.truncate_after` drops them. seal: empty for checkpoints written
    before there were seals; then both tables must be readable and have rows at `evaluated_at`, the env steps of the
    last evaluation before the checkpoint.
    """
    for name in TABLES:
        path = Path(folder) / name
        if seal:
            if seal.get(name):
                tables.check(path, seal[name])
        elif not path.is_file():
            raise ValueError(f"{path} does not exist, but it was written to before the checkpoint")
        elif not (tables.read(path).env_steps == evaluated_at).any():
            raise ValueError(f"{path} has no row at env step {evaluated_at}, the last evaluation before the checkpoint")


def read_metrics(folder: Path, *needs: str) -> pd.DataFrame:
    """`metrics.csv` of a run folder, one row per (log point, seed), empty values as NaN; `needs`: more columns.

    An incomplete last line (a killed run) is left out with a warning. Raises ValueError when folder or file is missing,
    and as `tables.read` where it is damaged.
    """
    return tables.read(_existing(Path(folder), "metrics.csv"), ("env_steps", "seed", *needs))


def read_evaluations(folder: Path) -> pd.DataFrame:
    """`evaluations.csv` of a run folder, one row per evaluation episode; errors and warnings as `read_metrics`."""
    return tables.read(_existing(Path(folder), "evaluations.csv"), EPISODE_COLUMNS)


def axis_of(table: pd.DataFrame) -> str:
    """The column that says where a run stands: env_steps, or updates where some iterations take no steps."""
    if not {"iteration", "updates"} <= {*table} or table.empty:
        return "env_steps"
    lane = [column for column in ("configuration", "seed") if column in table]
    first = table[(table[lane] == table[lane].iloc[0]).all(axis=1)]
    points = first[["iteration", "env_steps"]].drop_duplicates()
    return "updates" if points.env_steps.duplicated().any() else "env_steps"


def divergences(metrics: pd.DataFrame) -> pd.DataFrame:
    """The runs of `read_metrics` that diverged, a row each: (configuration,) seed, iteration, the column of `axis_of`,
    metric.

    Env steps (or updates) are those of the iteration, between log points by interpolation. No rows where nobody
    diverged, and for tables without the columns, which are older than they.
    """
    axis = axis_of(metrics)
    lane = [column for column in ("configuration", "seed") if column in metrics]
    if "diverged_at" not in metrics or metrics.diverged_at.isna().all():
        return pd.DataFrame(columns=[*lane, "iteration", axis, "metric"])
    rows = metrics[metrics.diverged_at.notna()].drop_duplicates(lane)
    known = metrics[["iteration", axis]].dropna().drop_duplicates("iteration").sort_values("iteration")
    steps = np.interp(rows.diverged_at, known.iteration, known[axis])
    found = rows[lane].assign(iteration=rows.diverged_at.astype(int), **{axis: steps.round().astype(int)})
    return found.assign(metric=rows.get("diverged_metric", "")).reset_index(drop=True)


def read_config(folder: Path, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """`config.json` of a run folder, with `CONFIG_FIELDS` and `fields`; errors as `read_json`."""
    return read_json(_existing(Path(folder), "config.json"), {**CONFIG_FIELDS, **(fields or {})})


def versions() -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration: packages, device, JAX's switches, git commit."""
    packages = ("jax", "jaxlib", "flax", "optax", "gymnax", "brax", "numpy")
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "jaxrl_dist": importlib.metadata.version("jaxrl-dist"),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision or "default",
        **switches.recorded(),
        "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
    }


def command_line() -> str:
    """The command that started this process, ready for a shell, as it was typed but without absolute machine paths.

    A path below the working directory is written relative to it; of any other only the last part is kept, `.../name`.
    """
    interpreter, *arguments = sys.orig_argv
    if arguments and Path(arguments[0]).is_absolute() and Path(arguments[0]).parent == Path(sys.executable).parent:
        words = [Path(arguments[0]).name, *arguments[1:]]  # an installed command: nobody types the interpreter
    else:
        words = [Path(interpreter).name, *arguments]
    return shlex.join(_without_machine_path(word) for word in words)


def run_name(row: Mapping[str, Any], between: str = "_") -> str:
    """The name of the run that a row is about: `seed_0`, in a sweep `configuration_3_seed_0`."""
    seed = f"seed_{int(row['seed'])}"
    return f"configuration_{int(row['configuration'])}{between}{seed}" if "configuration" in row else seed


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"run folder {folder} does not exist")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} does not exist: no run folder, or a run that has not written it yet")
    return folder / name


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise ValueError(f"config holds {value!r} of type {type(value).__name__}, which JSON cannot express")


def _wandb_identity(folder: Path) -> str | None:
    """Which run of weights & biases this one is, or None if it has not begun there."""
    path = folder / WANDB_IDENTITY
    if not path.exists():
        return None
    data = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{32}", data.strip()):
        raise ValueError(f"{path} is {data[:40]!r}; it must be 32 hexadecimal digits (without it a new run begins)")
    return data.decode().strip()


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"recording to {extra} needs the package {module}: pip install {module}") from error


def _git_commit(root: Path) -> str | None:
    """Commit of a checkout, with `-dirty` after it when tracked files differ; None for an installed wheel."""
    if not (root / ".git").exists():  # asking git anyway could name an outer repository that is not ours
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or a checkout of another user
        return None


def _without_machine_path(word: str) -> str:
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    short = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else f".../{path.name}"
    return f"{option}{equals}{short}"

"""What a run folder holds and how it is written: configuration, metrics and evaluations, on the host side only.

`metrics.csv` has a row per log point and seed, `evaluations.csv` a row per evaluation episode; in a wave of a sweep
both also have the number of the configuration. Both only ever grow, a whole line at a time, so a killed run loses no
more than the line it was writing.
"""

import csv
import dataclasses
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from jaxrl_dist import switches

POSITION_COLUMNS = ("iteration", "env_steps", "updates", "seconds", "configuration", "seed")
EVALUATION_COLUMNS = ("env_steps", "configuration", "seed", "episode", "episode_return", "episode_length")


class Recorder:
    """Writes one run folder: `config.json`, `metrics.csv`, `evaluations.csv`, and on request TensorBoard and wandb.

    folder: made when absent; one that holds records already is continued (call `truncate_after` with the step of the
    checkpoint first). tensorboard: event files under `folder/tensorboard`. wandb_project: non-empty sends to that
    project. Both get one tag per seed, `seed_0/evaluation_return` (in sweeps `configuration_3/seed_0/...`), against env
    steps. Raises ValueError when a package
    that was asked for is missing.
    """

    def __init__(self, folder: Path, *, tensorboard: bool = False, wandb_project: str = ""):
        self.folder = Path(folder)
        self._tensorboard = _import_extra("tensorboardX", extra="tensorboard") if tensorboard else None
        self._wandb = _import_extra("wandb", extra="wandb") if wandb_project else None
        self._wandb_project = wandb_project
        # Both start with the first record, when the configuration and the step resumed from are known.
        self._tensorboard_writer = None
        self._wandb_run = None
        self._resumed_from: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _Table(self.folder / "metrics.csv")
        self._evaluations = _Table(self.folder / "evaluations.csv")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`, in the order given: fields stay where their dataclass declares them."""
        write_json(self.folder / "config.json", config)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (one per log point and seed) to `metrics.csv`.

        Every row needs `env_steps` and `seed`; a value is a number or a zero-dimensional array, or None (or left out)
        where there is none. The first call fixes the columns; ValueError names one that turns up later.
        """
        self._metrics.append(rows, first=POSITION_COLUMNS)
        if self._tensorboard or self._wandb:
            self._send(rows)

    def append_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows (one per evaluation episode) to `evaluations.csv`."""
        self._evaluations.append(rows, first=EVALUATION_COLUMNS)

    def truncate_after(self, env_steps: int) -> None:
        """Drop all records beyond `env_steps`, so that a run resumed there writes them again and just once."""
        self._metrics.truncate_after(env_steps)
        self._evaluations.truncate_after(env_steps)
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
            identity = self.folder / "wandb_id.txt"  # a resumed run goes on as the same run
            if not identity.exists():
                _replace(identity, uuid.uuid4().hex)
            self._wandb_run = self._wandb.init(
                project=self._wandb_project,
                name=self.folder.name,
                id=identity.read_text(),
                resume="allow",
                dir=str(self.folder),
                config=read_config(self.folder) if (self.folder / "config.json").exists() else None,
            )
        step_of = lambda row: int(row["env_steps"])  # noqa: E731
        for env_steps, group in itertools.groupby(sorted(rows, key=step_of), key=step_of):  # wandb never goes back
            scalars = {
                f"{run_name(row, '/')}/{column}": float(value)
                for row in group
                for column, value in row.items()
                if column not in ("env_steps", "configuration", "seed") and value is not None
            }
            if self._tensorboard_writer:
                for tag, value in scalars.items():
                    self._tensorboard_writer.add_scalar(tag, value, env_steps)
                self._tensorboard_writer.flush()
            if self._wandb_run:
                self._wandb_run.log(scalars, step=env_steps)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as a whole or not at all; arrays, paths and dataclasses become lists, strings and objects."""
    _replace(path, json.dumps(value, indent=2, default=_as_json, ensure_ascii=False) + "\n")


class NoRecorder:
    """Takes everything a `Recorder` takes and writes nothing: what all processes but the first one have."""

    def write_config(self, config: Mapping[str, Any]) -> None:
        pass

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def append_evaluations(self, rows: Sequence[Mapping[str, Any]]) -> None:
        pass

    def truncate_after(self, env_steps: int) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(folder: Path) -> pd.DataFrame:
    """`metrics.csv` of a run folder, one row per (log point, seed), empty values as NaN.

    An incomplete last line (a killed run) is left out with a warning. Raises ValueError when folder or file is missing.
    """
    return _read_table(Path(folder), "metrics.csv")


def read_evaluations(folder: Path) -> pd.DataFrame:
    """`evaluations.csv` of a run folder, one row per evaluation episode; errors and warnings as `read_metrics`."""
    return _read_table(Path(folder), "evaluations.csv")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a run folder. Raises ValueError when the folder or the file is missing."""
    return json.loads(_existing(Path(folder), "config.json").read_text(encoding="utf-8"))


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
        "git_commit": _git_commit(Path(__file__).resolve().parents[1]),
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


class _Table:
    """A CSV file that grows by whole lines; its columns are those of the first rows."""

    def __init__(self, path: Path):
        self.path = path
        self.columns: list[str] | None = None
        if path.exists():
            text = _complete_lines(path)
            _replace(path, text)
            self.columns = next(csv.reader(io.StringIO(text)), None)

    def append(self, rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> None:
        if not rows:
            return
        for row in rows:
            for column in ("env_steps", "seed"):
                if row.get(column) is None:
                    raise ValueError(f"{self.path.name}: a row without {column!r}, which every row needs: {dict(row)}")
        given = dict.fromkeys(column for row in rows for column in row)  # a set that keeps the order
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = self.columns
        if columns is None:
            columns = [column for column in first if column in given]
            columns += [column for column in given if column not in first]
            writer.writerow(columns)
        elif unseen := [column for column in given if column not in columns]:
            raise ValueError(f"{self.path.name}: column {unseen[0]!r} was not in the first rows, which had {columns}")
        for row in rows:
            writer.writerow([_as_text(column, row.get(column)) for column in columns])
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
        self.columns = columns

    def truncate_after(self, env_steps: int) -> None:
        if self.columns is None:
            return
        header, *lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        position = self.columns.index("env_steps")
        kept = [line for line, row in zip(lines, csv.reader(lines), strict=True) if int(row[position]) <= env_steps]
        _replace(self.path, "".join([header, *kept]))


def _complete_lines(path: Path) -> str:
    """The text up to the last line end: every line is written with its end, so what follows was cut off by a kill."""
    text = path.read_bytes().decode("utf-8", errors="replace")  # a kill may also cut a character in two
    end = text.rfind("\n") + 1
    if end < len(text):
        warnings.warn(f"{path}: dropped an incomplete last line, {text[end:]!r}", stacklevel=3)
    return text[:end]


def _read_table(folder: Path, name: str) -> pd.DataFrame:
    text = _complete_lines(_existing(folder, name))
    if not text:
        raise ValueError(f"{folder / name} is empty: the run was stopped before its first record")
    return pd.read_csv(io.StringIO(text))


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"run folder {folder} does not exist")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name} does not exist: no run folder, or a run that has not written it yet")
    return folder / name


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def _as_text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    value = np.asarray(value)
    if value.ndim:
        raise ValueError(f"column {column!r} has a value of shape {value.shape}, but a cell holds one number")
    return str(value[()])  # the shortest text that reads back as the same float32 or float64


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    raise ValueError(f"config holds {value!r} of type {type(value).__name__}, which JSON cannot express")


def _import_extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f'recording to {extra} needs the package {module}: pip install "jaxrl-dist[{extra}]"'
        raise ValueError(message) from error


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

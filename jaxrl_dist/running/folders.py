"""Names and paths that a user gives: what cannot work is refused before any work is done for it."""

import contextlib
import datetime
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxrl_dist import outside
from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.running import hosts
from jaxrl_dist.running.problem import RunOptions

LONGEST_NAME = 200  # bytes of each part; file systems take 255, and some files are named after the folder
RECORDS = ("config.json", "study.json")
LOCK = ".lock"


def require_name(name: str) -> None:
    """ConfigurationError unless a run's `name` is a relative path that stays inside of the folder it is put in."""
    wanted = f"--name is {name[:60]!r}{'...' if len(name) > 60 else ''}; it must be"
    require(name.isprintable(), f"{wanted} printable, without line breaks and control characters")
    require(not name.startswith("/"), f"{wanted} a name inside of --runs-folder, not an absolute path")
    for part in name.split("/"):
        require(part not in ("", ".", "..") and part == part.strip(), f"{wanted} a name, or several with / in between")
        require(len(part.encode()) <= LONGEST_NAME, f"{wanted} at most {LONGEST_NAME} bytes long")


def require_run_folder(folder: Path, runs_folder: str) -> None:
    """ConfigurationError unless `folder` can be made in `runs_folder` and written to, and lies in no other run."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
    where = f"--runs-folder is {runs_folder!r}, in which {folder} cannot be"
    require(existing.is_dir(), f"{where}: {existing} is no folder")
    require(_takes_files(existing), f"{where}: {existing} cannot be written to")
    for parent in folder.parents:
        if parent == Path(runs_folder):
            break
        found = [record for record in RECORDS if (parent / record).exists()]
        require(not found, f"--name is {folder.name!r} inside of {parent}, which is a run; give it a place of its own")


def require_output(path: Path) -> None:
    """ConfigurationError unless a file can be written at `path`, the value of --out."""
    fits = os.access(path, os.W_OK) and not path.is_dir() if path.exists() else _takes_files(path.parent)
    require(fits, f"--out is {path}; it must be a file in a folder that exists and can be written to")


def require_picture(path: Path) -> None:
    """ConfigurationError unless --out can be written and its suffix names a format that matplotlib writes."""
    formats = sorted(set(FigureCanvasAgg.get_supported_filetypes()) - {"pgf"})  # pgf needs LaTeX
    suffix = path.suffix.lower().removeprefix(".")
    require(suffix in formats, f"--out is {path}; it must end with one of .{', .'.join(formats)}")
    require_output(path)


def _takes_files(folder: Path) -> bool:
    """By trying: permissions say little to root, and nothing of read-only or full file systems."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return True
    except OSError:
        return False


# -- the folder of a run ----------------------------------------------------------------------------------------------


def folder_of(algorithm: str, options: RunOptions) -> Path:
    """Where a run is kept: RUNS_FOLDER/ALGORITHM/ENVIRONMENT/NAME, by default named after the date and time."""
    name = options.name or hosts.by_first(date_and_time)
    require_name(name)
    return Path(options.runs_folder) / algorithm / re.sub("[/:]", "-", outside.shown(options.env_id)) / name


def date_and_time() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


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
        require_unused(folder)
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


def require_unused(folder: Path) -> None:
    require(
        _is_unused(folder),
        f"--name is {folder.name!r}, but {folder} already holds a run; choose another name, or continue it with "
        "--resume latest",
    )

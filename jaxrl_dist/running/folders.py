"""Names and paths that a user gives: what cannot work is refused before any work is done for it."""

import os
import tempfile
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from jaxrl_dist.configuration import require

LONGEST_NAME = 200  # bytes of each part; file systems take 255, and some files are named after the folder
RECORDS = ("config.json", "study.json")


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

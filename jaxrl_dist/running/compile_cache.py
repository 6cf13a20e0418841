"""JAX's compile cache, on by default for commands: what one run has compiled, the next one reads from a folder.

The folder is the user's own. JAX names every program by a hash of its text, its options, JAX's version and the CPU's
features (or the accelerator's kind), so machines that share a home folder do not read each other's programs. Loading a
compiled program executes it: a folder that others may write to is not to be used.
"""

import contextlib
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from jaxrl_dist.configuration import require

MOST_BYTES = 2 * 2**30
LEAST_SECONDS = 0.3  # of compiling; quicker programs are not worth a file

_HIT = "/jax/compilation_cache/cache_hits"
_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)
_counts = {_HIT: 0}


def folder(choice: str = "auto") -> str | None:
    """The folder of compiled programs, None where they are not kept.

    choice: `auto` is what JAX was set to (JAX_COMPILATION_CACHE_DIR), else the user's folder for caches; `off`; or a
    folder. JAX_ENABLE_COMPILATION_CACHE=0 turns all of it off.
    """
    if choice == "off" or not jax.config.jax_enable_compilation_cache:
        return None
    if choice != "auto":
        return str(Path(choice).expanduser())
    if jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir
    try:
        caches = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:  # there is no home folder
        return None
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return str((xdg if xdg.is_absolute() else caches) / "jaxrl_dist" / "compiled")


def use(choice: str, console: Console) -> None:
    """Keep compiled programs in `folder(choice)`; call it before anything compiles.

    A folder that was named must be writable, else ConfigurationError; without one of its own a run does without, and
    says so.
    """
    require(choice != "", "--compile-cache is ''; it must be auto, off or a folder")
    place = folder(choice)
    if choice == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    require(
        place is not None or choice in ("auto", "off"),
        f"--compile-cache is {choice!r}, but JAX_ENABLE_COMPILATION_CACHE turns the cache off; unset one of them",
    )
    if place is None or place == jax.config.jax_compilation_cache_dir:
        return
    try:
        Path(place).mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = f"{place} cannot be written to ({error.strerror})"
        require(choice == "auto", f"--compile-cache is {choice!r}; {reason}; it must be auto, off or a folder")
        console.print(f"no compile cache: {reason}", markup=False, soft_wrap=True)
        return
    _drop_oldest(Path(place), MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", place)
    compilation_cache.reset_cache()  # the first program of a process, even of an import, fixes the folder otherwise
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    _mend(Path(place), console)


def hits() -> int:
    """Programs that this process has read from the cache instead of compiling them."""
    return _counts[_HIT]


def entries(place: str) -> list[Path]:
    """The compiled programs in a folder."""
    return list(Path(place).glob("*-cache"))


def _count(event: str, **_) -> None:
    if event in _counts:
        _counts[event] += 1


jax.monitoring.register_event_listener(_count)


def _drop_oldest(place: Path, most_bytes: int) -> None:
    """Delete what was not used for longest until `most_bytes` are left.

    JAX can do this itself (jax_compilation_cache_max_size), but needs one more package and a lock around every read.
    """

    def last_used(file: os.stat_result) -> float:
        return max(file.st_atime, file.st_mtime)

    with contextlib.suppress(OSError):  # other processes delete and write here too
        files = sorted(((path, path.stat()) for path in entries(place)), key=lambda pair: last_used(pair[1]))
        total = sum(file.st_size for _, file in files)
        for path, file in files:
            if total <= most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= file.st_size


def _mend(place: Path, console: Console) -> None:
    """Take away entries that JAX cannot read or write to their end, and say so once.

    JAX warns of each one, compiles it anew and keeps the damaged file for ever. It names the function alone, so sound
    entries of functions with that name go too, and are compiled once more.
    """
    show, said = warnings.showwarning, set()

    def mend(message, *where, **more):
        trouble = _TROUBLE.match(str(message))
        if trouble is None:
            show(message, *where, **more)
            return
        doing, program, reason = trouble.groups()
        with contextlib.suppress(OSError):
            for path in place.glob(f"{program}-*-cache"):
                path.unlink(missing_ok=True)
        if doing not in said:
            said.add(doing)
            console.print(
                f"compile cache: error {doing} {program} in {place} ({reason}); compiled anew",
                markup=False, soft_wrap=True,
            )  # fmt: skip

    warnings.showwarning = mend

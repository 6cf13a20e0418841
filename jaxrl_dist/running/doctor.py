"""Is the installation sound, and does JAX use the hardware that is there? `jaxrl-dist doctor` prints the answer.

JAX falls back to the CPU when its accelerator plug-in is missing or does not fit its version; here that is a problem
with a name, never a surprise after an hour of training.
"""

import importlib.metadata
import os
import platform
import shlex
import sys
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from packaging.requirements import Requirement

from jaxrl_dist import switches, threefry
from jaxrl_dist.running import compile_cache
from jaxrl_dist.wording import counted

Platform = Literal["auto", "cpu", "gpu", "tpu"]

# Runs need POSIX: locks of files (fcntl), SIGTERM, getrusage.
NO_WINDOWS = "jaxrl_dist runs on Linux and macOS; Windows is not supported"

_PLATFORMS = ("auto", "cpu", "gpu", "tpu")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
_TPU_VARIABLES = ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "COLAB_TPU_ADDR")
_VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE")
_DEVICE_FILES = Path("/dev")


class Dependency(NamedTuple):
    """An installed distribution (version None: missing) and the bounds that pyproject.toml sets for it."""

    name: str
    version: str | None
    bounds: str
    fits: bool


def require_platform(asked: Platform) -> str:
    """The platform that JAX uses, `cpu`, `gpu` or `tpu`; call it before anything else uses JAX.

    asked: `auto` takes what JAX chooses, with a warning where an accelerator of this machine stays unused; `cpu` is
    also set, which works until JAX has started. ValueError where JAX uses another platform than the one asked for, and
    on Windows.
    """
    if sys.platform == "win32":
        raise ValueError(NO_WINDOWS)
    if asked not in _PLATFORMS:
        raise ValueError(f"device={asked!r}: must be one of {', '.join(_PLATFORMS)}")
    if asked == "cpu":
        jax.config.update("jax_platforms", "cpu")
    used, failure = _platform_in_use()
    if used is None:
        raise ValueError(f"device={asked!r}: {failure}")
    if asked == "auto":
        for problem in _unused_accelerators(used):
            warnings.warn(problem, stacklevel=2)
    elif used != asked:
        raise ValueError(f"device={asked!r}: JAX uses {used}; {_advice(asked)}")
    return used


def problems() -> list[str]:
    """One sentence for each thing that is wrong; empty where all is well."""
    try:
        found = [
            f"{name} {version or 'is missing'}, but {bounds} is required; install jaxrl-dist again"
            for name, version, bounds, fits in _dependencies()
            if not fits
        ]
    except importlib.metadata.PackageNotFoundError:
        found = ["jaxrl-dist is not installed, so its bounds are unknown; `pip install -e .` in its folder"]
    if sys.platform == "win32":
        found.append(NO_WINDOWS)
    found += switches.refused()
    used, failure = _platform_in_use()
    return found + ([failure] if used is None else _unused_accelerators(used))


def report() -> str:
    """Versions, devices and settings as a text for people, the problems at its end."""
    used, failure = _platform_in_use()
    devices = [] if used is None else jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    sections = {
        "dependencies": _dependency_lines(),
        "hardware": {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "accelerators found": ", ".join(_accelerators().values()) or "none",
            "asked for": jax.config.jax_platforms or "nothing: JAX chooses",
            "JAX uses": f"{used}, {counted(len(devices), 'device')}: {kinds}" if used else failure,
            **{name: os.environ.get(name, "(not set)") for name in _VARIABLES},
        },
        "settings": {
            "matmul precision": jax.config.jax_default_matmul_precision
            or "default (full float32 on CPUs, less on TPUs and recent GPUs)",
            "64-bit floats": "on, but off while training" if jax.config.jax_enable_x64 else "off",
            "compile cache": _compile_cache(),
            "random bits on a CPU": threefry.in_use(),
        },
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<30} {value}" for name, value in rows.items()), ""]
    lines += [f"PROBLEM: {problem}" for problem in problems()] or ["no problems found"]
    return "\n".join(lines)


def main() -> int:
    """Print the report; the exit status is 1 where something is wrong."""
    print(report())
    return 1 if problems() else 0


def _compile_cache() -> str:
    place = compile_cache.folder()
    if place is None:
        return "off"
    programs = compile_cache.entries(place)
    if not programs:
        return f"{place}, empty"
    size = sum(path.stat().st_size for path in programs) / 2**20
    return f"{place}, {len(programs)} program(s), {size:,.1f} MiB; `rm -r {shlex.quote(place)}` empties it"


def _dependencies() -> list[Dependency]:
    found = []
    for line in importlib.metadata.requires("jaxrl-dist") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found.append(Dependency(requirement.name, version, str(requirement.specifier), fits))
    return found


def _dependency_lines() -> dict[str, str]:
    try:
        rows = {name: f"{version or 'missing':<12} {bounds}" for name, version, bounds, _ in _dependencies()}
    except importlib.metadata.PackageNotFoundError:
        rows = {"jaxrl-dist": "not installed"}
    return {"python": platform.python_version(), **rows, **{name: _version(name) or "-" for name in _PLUGINS}}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _platform_in_use() -> tuple[str | None, str]:
    """JAX's platform, or None and the reason why it cannot start on the one that was asked for."""
    try:
        return jax.default_backend(), ""
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where JAX_PLATFORMS names an absent GPU
        asked = jax.config.jax_platforms or ""
        reason = str(error).splitlines()[0] if str(error) else "there is no such device"
        return None, f"JAX cannot start on {asked!r} ({reason}); {_advice('tpu' if 'tpu' in asked else 'gpu')}"


def _accelerators() -> dict[str, str]:
    """`{platform: where it was seen}` for the accelerators of this machine that are not hidden from JAX."""
    found = {}
    gpus = sorted(path.name for path in _DEVICE_FILES.glob("nvidia[0-9]*"))
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1"):
        found["gpu"] = f"NVIDIA GPU ({', '.join(gpus)})"
    tpus = [path.name for path in sorted(_DEVICE_FILES.glob("accel[0-9]*"))]
    tpus += [name for name in _TPU_VARIABLES if name in os.environ]
    if tpus:
        found["tpu"] = f"TPU ({', '.join(tpus)})"
    return found


def _unused_accelerators(used: str) -> list[str]:
    if jax.config.jax_platforms == "cpu":
        return []  # somebody asked for that
    return [
        f"{where} is on this machine, but JAX uses {used}; {_advice(name)}, or ask for the CPU with JAX_PLATFORMS=cpu"
        for name, where in _accelerators().items()
        if used == "cpu"
    ]


def _advice(asked: str) -> str:
    if asked == "cpu":
        return "set JAX_PLATFORMS=cpu before starting"
    extra = {"gpu": "cuda13", "tpu": "tpu"}[asked]
    return f"install JAX for it with `pip install 'jax[{extra}]=={jax.__version__}'` and see `jaxrl-dist doctor`"


if __name__ == "__main__":
    sys.exit(main())

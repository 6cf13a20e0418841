"""Do the oldest and the newest versions that pyproject.toml allows work together? Needs an index and some minutes.

    python scripts/try_versions.py lowest [--python python3.12]
    python scripts/try_versions.py newest [--python python3.13]      # or: make lowest, make newest

A fresh virtual environment gets the lowest (or newest) versions within the bounds of every direct dependency and extra,
by uv's resolver; then `jaxrl-dist doctor` and the tests below run. With `lowest`, a lower bound that cannot be
installed is an error: it says what nobody can have.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
EXTRAS = ("dev", "tensorboard", "wandb")  # dev has those of the extras gymnasium and optuna
# What leans on other packages, one or two algorithms, and how all of it is packaged.
TESTS = (
    "test_packaging", "test_cli", "running/test_doctor", "running/test_compile_cache", "running/test_checkpointing",
    "running/test_gymnasium_evaluation", "learning/test_portable", "records/test_recording", "records/test_plotting",
    "records/test_statistics", "reports/test_report", "studies/test_optuna", "envs/test_make", "envs/test_brax",
    "envs/test_check_env", "algorithms/test_tqc", "algorithms/test_qr_dqn", "distributional/test_categorical",
)  # fmt: skip
# Prints the installed versions of the packages named on its command line; runs in the new environment.
ASK_VERSIONS = "import importlib.metadata as m, sys; print(*(f'{n}={m.version(n)}' for n in sys.argv[1:]))"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="interpreter to try (default: this one)")
    parser.add_argument("tests", nargs="*", help="other tests to run than the quick choice, as for pytest")
    given = parser.parse_args()
    if shutil.which(given.python) is None:
        parser.error(f"--python is {given.python!r}, which is not on this machine")
    tests = given.tests or [f"tests/{name}.py" for name in TESTS]

    with tempfile.TemporaryDirectory(prefix="jaxrl_dist-versions-") as folder:
        run([given.python, "-m", "venv", folder])
        bin_folder = Path(folder) / "bin"
        python = bin_folder / "python"
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"])
        resolution = {"lowest": "lowest-direct", "newest": "highest"}[given.which]
        uv = [bin_folder / "uv", "pip", "install", "--python", python, "--resolution", resolution]
        run([*uv, "--editable", f".[{','.join(EXTRAS)}]"])
        versions = installed(python)
        print(f"{given.which} on Python {output([python, '--version']).split()[1]}:", versions, flush=True)
        if given.which == "lowest" and (too_low := unreachable(versions)):
            print("lower bounds that cannot be installed:", *too_low, sep="\n  ")
            return 1
        run([bin_folder / "jaxrl-dist", "doctor"])
        run([python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests])
    return 0


def run(command: list) -> None:
    print("$", *command, flush=True)
    if status := subprocess.run(list(map(str, command)), cwd=REPOSITORY).returncode:
        sys.exit(status)


def output(command: list) -> str:
    return subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout


def direct() -> dict[str, str]:
    """`{package: lower bound}` of the dependencies in pyproject.toml and of `EXTRAS`."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    pairs = (line.split(",")[0].partition(">=") for lines in groups for line in lines)
    return {name: bound for name, _, bound in pairs}


def installed(python: Path) -> dict[str, str]:
    answer = output([python, "-c", ASK_VERSIONS, *direct()])
    return dict(pair.split("=") for pair in answer.split())


def unreachable(versions: dict[str, str]) -> list[str]:
    """Lower bounds that are not the version that was installed as the lowest one."""
    from packaging.version import Version

    return [
        f"{name}>={bound}: the lowest is {versions[name]}"
        for name, bound in direct().items()
        if Version(versions[name]) != Version(bound)
    ]


if __name__ == "__main__":
    sys.exit(main())

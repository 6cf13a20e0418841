"""Tests run where what they prove has changed since they last passed.

What they prove is one of three things. A learning check proves something of one program: as long as its text is the
same, it learns what it learned (`proof(proofs.program(...))`). A test that starts processes proves something of the
modules that it goes through (`@pytest.mark.proves("jaxrl_dist/running", ...)`). All other tests of one algorithm, of
mathematics, of environments and of what algorithms share prove something of the code that their file imports, and that
imports (`group`); they pass or run together.

`proofs.json` holds a digest of what each of them passed with; `--prove` notes it. `make test`, and so CI, runs what has
another subject by now, the agents of `ALWAYS`, and one in `RENEWED` of the rest, others every day: where a digest
forgets something, this is found out. `make test-all` runs everything.
"""

import ast
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import pytest

from jaxrl_dist.running import catalog

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "proofs.json"
# One agent of each family.
ALWAYS = ("dqn", "sac")
RENEWED = 16
# Folders whose tests start no processes and read no files but those that they import.
PURE = ("algorithms", "distributional", "envs", "learning")
# Where the modules are that tests import, and what is at the front of their names.
_PLACES = {"jaxrl_dist.algorithms": "algorithms", "jaxrl_dist.envs": "envs", "jaxrl_dist": "jaxrl_dist"}
_ROWS = Path(__file__).parent / "algorithms" / "cases.py"


def digest(subject: str) -> str:
    """Of the subject, and of what it is compiled by."""
    return hashlib.sha256(f"{jax.__version__} {subject}".encode()).hexdigest()[:16]


def sources(*paths: str) -> str:
    """The code of files and folders, without comments, docstrings and layout; files that are no Python as they are."""
    subjects = []
    for path in paths:
        files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        assert files, path
        subjects += [f"{x.relative_to(ROOT)} {code(x)}" for x in files]
    return "\n".join(subjects)


def program(function: Callable, *arguments) -> str:
    """The text of what JAX traces, which depends on nothing else."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


@functools.cache
def code(path: Path) -> str:
    """What Python makes of a module, without its docstrings: strings that stand alone."""
    if path.suffix != ".py":
        return path.read_text()

    def says_nothing(part) -> bool:
        value = getattr(part, "value", None)
        return isinstance(part, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)

    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not says_nothing(part)]
    return ast.dump(tree)


# -- groups of tests --------------------------------------------------------------------------------------------------


def algorithms_of(nodeid: str) -> list[str]:
    """The algorithms that a test of them is about: that of its file, and those among its parameters."""
    path, _, rest = nodeid.partition("::")
    words = {Path(path).stem.removeprefix("test_"), *re.findall(r"\w+", rest.partition("[")[2])}
    return sorted(catalog.algorithms().keys() & words) if "algorithms" in Path(path).parts else []


def agent_of(nodeid: str) -> str:
    """The agent that a test is about, or ""."""
    return next((name for name in algorithms_of(nodeid) if name in catalog.agents()), "")


def group(item: pytest.Item) -> tuple[str, str] | None:
    """Name and subject of the tests that pass or run with this one; None where it runs always, or has its own proof."""
    path = item.nodeid.partition("::")[0]
    stem, agent = Path(path).stem.removeprefix("test_"), agent_of(item.nodeid)
    if not {*PURE} & {*Path(path).parts[1:2]} or "proof" in getattr(item, "fixturenames", ()) or agent in ALWAYS:
        return None
    if not agent and "algorithms" in Path(path).parts and stem not in catalog.algorithms():
        return None  # it looks at all of them
    agent = "" if agent == stem else agent
    return path + f"[{agent}]" * bool(agent), _subject(path, agent)


@functools.cache
def _subject(path: str, agent: str) -> str:
    """What the tests of a file stand on, or of those of its tests that are about an agent."""
    if not agent:
        return sources("constraints.txt", *sorted(imported([ROOT / path])))
    files = imported([ROOT / path, Path(catalog.agents()[agent].__file__)]) - {str(_ROWS.relative_to(ROOT))}
    return sources("constraints.txt", *sorted(files)) + _row(agent)


def imported(paths: Iterable[Path]) -> set[str]:
    """Files of this project that some of its files import, and those that they import, and they themselves."""
    found, new = set(), {path.resolve() for path in paths}
    while new:
        found |= new
        new = {file for path in new for file in _imports(path)} - found
    return {str(path.relative_to(ROOT)) for path in found}


@functools.cache
def _imports(path: Path) -> set[Path]:
    tree = ast.parse(path.read_text())
    # What a file does as a script is nothing that its importers see.
    tree.body = [x for x in tree.body if not (isinstance(x, ast.If) and "__main__" in ast.dump(x.test))]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    files = (_file_of(name, path.parent) for name in names if name != Path(__file__).stem)
    return {file for file in files if file}


def _file_of(name: str, folder: Path) -> Path | None:
    """The file of a module of this project, or of one beside the test that imports it; `name` may be a part of it."""
    for package, place in _PLACES.items():
        if name == package or name.startswith(f"{package}."):
            base = ROOT / place / Path(*name.removeprefix(package).split("."))
            break
    else:
        base = folder / name
        base = base if base.with_suffix(".py").is_file() else Path(__file__).parent / name
    files = (base.with_suffix(".py"), base.parent.with_suffix(".py"), base / "__init__.py", base.parent / "__init__.py")
    return next((file.resolve() for file in files if file.is_file()), None)


@functools.cache
def _row(agent: str) -> str:
    """`cases.py` with the row of this agent alone."""
    tree = ast.parse(_ROWS.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES":
            rows = zip(node.value.keys, node.value.values, strict=True)
            node.value = next((value for key, value in rows if key.value == agent), node.value)
    return ast.dump(tree)


# -- what is known ----------------------------------------------------------------------------------------------------


@functools.cache
def known() -> dict[str, str]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def is_due(name: str) -> bool:
    """Whether today is the day on which this one runs anyway."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
    return (number - datetime.date.today().toordinal()) % RENEWED == 0


def check(item: pytest.Item, subject: str, name: str = "") -> None:
    """Skip a test that has passed with this subject before; else note what it passes with, if it does.

    `name` of the group that it belongs to, if it has no proof of its own.
    """
    now, options = digest(subject), item.config.option
    if known().get(name or item.nodeid) == now and not options.all and not is_due(name or item.nodeid):
        pytest.skip("has passed, and what it proves is the same since (--all runs it)")
    # Of a group that is not run as a whole nothing is known.
    part = options.keyword or options.markexpr or any("::" in argument for argument in item.config.args)
    if not (name and part):
        item.user_properties.append(("proof", [name or item.nodeid, now]))


def write(passed: Iterable, failed: Iterable) -> None:
    """Put what the reports of tests prove into the file, of which none failed."""

    def proofs_of(reports) -> dict[str, str]:
        pairs = (pair for report in reports for pair in report.user_properties)
        return dict(proof for kind, proof in pairs if kind == "proof")

    proven, refuted = proofs_of(passed), proofs_of(failed)
    found = known() | {name: now for name, now in proven.items() if name not in refuted}
    FILE.write_text(json.dumps(dict(sorted(found.items())), indent=0) + "\n")

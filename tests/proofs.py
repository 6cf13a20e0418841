"""Slow tests run where what they prove has changed since they last passed.

A learning check proves something of one program: as long as its text is the same, it learns what it learned
(`proof(proofs.program(...))`). A test that starts processes proves something of the modules that it goes through
(`@pytest.mark.proves("jaxrl_dist/running", ...)`). `proofs.json` holds a digest of what each of them passed with. `make
test-all` runs all of them and writes it anew; `make test`, and so CI, runs those whose subject is another by now.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "proofs.json"


def digest(subject: str) -> str:
    """Of the subject, and of what it is compiled by."""
    return hashlib.sha256(f"{jax.__version__} {subject}".encode()).hexdigest()[:16]


def sources(*paths: str) -> str:
    """The code of files and folders, without comments, docstrings and layout; files that are no Python as they are."""
    subjects = []
    for path in paths:
        files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
        assert files, path
        subjects += [
            f"{x.relative_to(ROOT)} {code(x.read_text()) if x.suffix == '.py' else x.read_text()}" for x in files
        ]
    return "\n".join(subjects)


def program(function: Callable, *arguments) -> str:
    """The text of what JAX traces, which depends on nothing else."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*arguments)))


def code(text: str) -> str:
    """What Python makes of a module, without its docstrings: strings that stand alone."""

    def says_nothing(part) -> bool:
        value = getattr(part, "value", None)
        return isinstance(part, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)

    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not says_nothing(part)]
    return ast.dump(tree)


def check(item: pytest.Item, subject: str) -> None:
    """Skip a test that has passed with this subject; else note what it passes with, if it does."""
    now = digest(subject)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if known.get(item.nodeid) == now and not item.config.option.all:
        pytest.skip("has passed, and what it proves is the same since (--all runs it)")
    item.user_properties.append(("proof", [item.nodeid, now]))


def write(passed) -> None:
    """Put what the reports of passed tests prove into the file."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for report in passed:
        known |= {name: now for kind, (name, now) in report.user_properties if kind == "proof"}
    FILE.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")

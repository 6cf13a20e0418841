"""Slow tests run where what they prove has changed since they last passed.

A learning check proves something of one program: as long as the text of that program is the same it learns what it
learned. A test that starts processes proves something of the modules that it goes through. `proofs.json` holds a digest
of what each of them passed with; `make test-all` runs all of them and writes it anew, and `make test` (so CI) runs
those whose subject is another by now.
"""

import ast
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "proofs.json"


def digest(subject: str) -> str:
    return hashlib.sha256(subject.encode()).hexdigest()[:16]


def sources(*paths: str) -> str:
    """The code of files and folders of the repository, without comments, docstrings and layout."""
    files = [
        file for path in paths for file in ([ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*.py"))
    ]
    assert files, paths
    return "\n".join(f"{file.relative_to(ROOT)} {code(file.read_text())}" for file in sorted(files))


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


def checker(request) -> Callable[[str], None]:
    """`check(subject)`: skip if this test has passed with this subject; else say what it passes with, if it does."""

    def check(subject: str) -> None:
        name, now = request.node.nodeid, digest(subject)
        known = json.loads(FILE.read_text()) if FILE.exists() else {}
        if known.get(name) == now and not request.config.option.all:
            pytest.skip("has passed, and what it proves is the same since (--all runs it)")
        request.node.user_properties.append(("proof", [name, now]))

    return check


def write(passed) -> None:
    """Put what the reports of passed tests prove into the file."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for report in passed:
        known |= {name: now for kind, (name, now) in report.user_properties if kind == "proof"}
    FILE.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")

"""The algorithms by name: found by looking, not by registration, and imported only when asked for."""

import functools
import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

from jaxrl_dist.wording import alternatives, nearest


@functools.cache
def algorithms() -> dict[str, str]:
    """Name of every algorithm -> its module."""
    root = importlib.import_module("jaxrl_dist.algorithms")
    found = {}
    for family in pkgutil.iter_modules(root.__path__, f"{root.__name__}."):
        if family.ispkg:
            package = importlib.import_module(family.name)
            found |= {
                m.name.rsplit(".", 1)[1]: m.name for m in pkgutil.iter_modules(package.__path__, f"{family.name}.")
            }
    return found


def find_algorithm(name: str):
    """Import the module of an algorithm; an unknown name is a ValueError with the nearest ones."""
    known = algorithms()
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {alternatives(near)}?" if near else f"known ones: {', '.join(sorted(known))}"
        raise ValueError(f"NAME is {name!r}, which is no algorithm; {hint}")
    return importlib.import_module(known[name])


@functools.cache
def agents() -> dict[str, ModuleType]:
    """The algorithms that are agents, imported; the others are methods without one, such as dynamic programming."""
    modules = {name: find_algorithm(name) for name in sorted(algorithms())}
    return {name: module for name, module in modules.items() if hasattr(module, "make_agent")}


def title(name: str) -> str:
    """The first line of an algorithm's docstring, read without importing it (and JAX with it)."""
    source = Path(importlib.util.find_spec(algorithms()[name]).origin).read_text(encoding="utf-8")
    return source.split('"""')[1].splitlines()[0]


@functools.cache
def display_name(name: str) -> str:
    """What people call an algorithm, `QR-DQN` for qr_dqn: what its docstring begins with, before the colon."""
    said, colon, _ = title(name).partition(": ") if name in algorithms() else ("", "", "")
    return said if colon else name.replace("_", "-").upper()

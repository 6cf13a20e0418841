"""The algorithms by name: found by looking, not by registration, and imported only when asked for.

A user's own algorithm is known by its file.
"""

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from jaxrl_dist import outside
from jaxrl_dist.configuration import require
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


def find_algorithm(name: str, file: str = ""):
    """Import the module of an algorithm; an unknown name is a ValueError with the nearest ones.

    `file`, or a `name` that ends with `.py`: that of a user's own algorithm.
    """
    if file or name.endswith(".py"):
        where = f"the file of the algorithm {name} is {file!r}" if file else f"NAME is {name!r}"
        module = outside.load_module(file or name, where)
        missing = [part for part in ("Config", "make_agent", "PRESETS") if not hasattr(module, part)]
        require(not missing, f"{where}, which is no algorithm: it has no {', '.join(missing)}")
        return module
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


def own_file(make_agent: Callable) -> str:
    """The absolute path of the file of an algorithm that is none of ours; empty for one of ours, or of no file."""
    make_agent = getattr(make_agent, "as_written", make_agent)
    file = getattr(sys.modules.get(make_agent.__module__), "__file__", None)
    if not file or make_agent.__module__ in algorithms().values():
        return ""
    ours = algorithms().get(Path(file).stem)
    is_ours = ours and Path(importlib.util.find_spec(ours).origin).resolve() == Path(file).resolve()
    return "" if is_ours else str(Path(file).resolve())


@functools.cache
def display_name(name: str) -> str:
    """What people call an algorithm, `QR-DQN` for qr_dqn: what its docstring begins with, before the colon."""
    said, colon, _ = title(name).partition(": ") if name in algorithms() else ("", "", "")
    return said if colon else name.replace("_", "-").upper()

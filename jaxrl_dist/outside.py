"""What a user brings along: environments, algorithms and policies that stand in a file or a module of their own.

`path/file.py:name` or `module:name` names an object, `path/file.py` alone a file. Files are known by their absolute
path, so that a run finds them again from wherever it is looked at. They are imported as Python would run them, with the
folder that they stand in among the places where they find their own modules.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.wording import alternatives, nearest


def is_outside(name: str) -> bool:
    """Whether it names something that is not ours: a file, or an object in a module."""
    return ":" in name or name.endswith(".py")


def absolute(name: str) -> str:
    """The same with the absolute path of its file, if it names one; names of ours stay as they are."""
    place, colon, part = name.partition(":")
    return f"{Path(place).resolve()}{colon}{part}" if place.endswith(".py") else name


def shown(name: str) -> str:
    """The same for titles and folders: without the folders in which its file stands."""
    place, colon, part = name.partition(":")
    return f"{Path(place).name}{colon}{part}" if place.endswith(".py") else name


def load(name: str, option: str) -> Any:
    """The object that `name` names; `option` says in messages where it was given.

    Raises ConfigurationError with one line: there is no such file, module or part of it, or importing it failed, and
    how.
    """
    where = f"{option} is {name!r}"
    place, _, part = name.partition(":")
    require(bool(place and part), f"{where}; it must be module:name or path/file.py:name")
    module = load_module(place, where)
    found = module
    for step in part.split("."):
        if not hasattr(found, step):
            near = nearest(step, [x for x in dir(found) if not x.startswith("_")])
            hint = f"; did you mean {alternatives(near)}?" if near else ""
            raise ConfigurationError(f"{where}, but {place} has no {part!r}{hint}")
        found = getattr(found, step)
    return found


def load_module(place: str, where: str) -> ModuleType:
    """The module `place`, by its name or the path of its file; `where` begins messages."""
    try:
        return _from_file(Path(place), where) if place.endswith(".py") else _by_name(place)
    except ConfigurationError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does when it is run
        raise ConfigurationError(f"{where}, which cannot be imported: {type(error).__name__}: {error}") from error


def _by_name(name: str) -> ModuleType:
    folder = str(Path.cwd())  # where `python -m` would look, and `jaxrl-dist` does not
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _from_file(path: Path, where: str) -> ModuleType:
    path = path.resolve()
    require(path.is_file(), f"{where}, but there is no file {path}")
    script = sys.modules.get("__main__")
    if getattr(script, "__file__", None) and Path(script.__file__).resolve() == path:
        return script  # it is being run: its classes are those
    # Files of one name in different folders are different modules.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that it hides nothing
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

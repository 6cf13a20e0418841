"""From the words of a command line to values: which words belong to which option, and what they say.

`--name WORD ...` or `--name=WORD`, with dashes or underscores. Whatever is wrong is a ConfigurationError of one line
that names the option, what it got and what it takes; the help is tyro's.
"""

import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxrl_dist.configuration import ConfigurationError, option, require
from jaxrl_dist.wording import alternatives, nearest

HELP = ("-h", "--help")
_KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a word",
    tuple[int, ...]: "whole numbers, such as 64,64", tuple[float, ...]: "numbers, such as 0.5,2",
    tuple[str, ...]: "words",
}  # fmt: skip
_NEGATIVE = re.compile(r"-(\d|\.\d|inf|nan)", re.IGNORECASE)


def split(arguments: Sequence[str]) -> dict[str, list[str]]:
    """The words after each option (underscores, without its dashes), in their order; of one given twice, the last."""
    found: dict[str, list[str]] = {}
    words = None
    for argument in arguments:
        if argument in HELP:
            words = found["help"] = []
        elif argument.startswith("-") and not _NEGATIVE.match(argument):
            name, equals, value = argument.partition("=")
            require(name.startswith("--") and len(name) > 2, f"{argument} is no option; options begin with --")
            words = found[name[2:].replace("-", "_")] = [value] if equals else []
        else:
            require(words is not None, f"{argument!r} stands before any option; a value follows its option")
            words.append(argument)
    return found


def values(types_of: Sequence[type], given: Mapping[str, Sequence[str]], program: str) -> list[dict[str, Any]]:
    """What was given of the fields of each dataclass in `types_of`, read as the fields' types."""
    hints = [typing.get_type_hints(each, include_extras=True) for each in types_of]
    for field in given:
        require_known(field, [field for each in hints for field in each], program)
    return [{name: read(option(name), each[name], given[name]) for name in each if name in given} for each in hints]


def require_known(field: str, known: Iterable[str], program: str) -> None:
    """ConfigurationError with the nearest names unless `field` is a known option."""
    known = list(known)
    if field not in known:
        near = nearest(field, known)
        hint = f"did you mean {alternatives(map(option, near))}?" if near else "--help lists them"
        raise ConfigurationError(f"{option(field)} is no option of {program}; {hint}")


def read(name: str, hint: Any, words: Sequence[str]) -> Any:
    """The value of the option `name`, whose type is `hint`, from the words after it.

    Widths and other series are written with spaces or commas. A whole number may be written as `1e6` or `1_000_000`.
    """
    hint = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    allowed = kind(hint)
    if typing.get_origin(hint) is tuple:
        (of, _) = typing.get_args(hint)
        if of is not str:  # "" is how an empty series is written where something must follow
            words = [part for word in words if word for part in word.split(",")]
        return tuple(_one(name, of, word, allowed) for word in words)
    require(len(words) > 0, f"{name} has no value; it must be {allowed}")
    require(len(words) == 1, f"{name} has {len(words)} values, {' '.join(words)}; it must be {allowed}")
    return _one(name, hint, words[0], allowed)


def kind(hint: Any) -> str:
    """What a value of a type is, for people."""
    return alternatives(typing.get_args(hint)) if typing.get_origin(hint) is Literal else _KINDS[hint]


def _one(name: str, hint: Any, word: str, allowed: str) -> Any:
    try:
        if hint is str:
            return word
        if hint is bool:
            return {"true": True, "false": False}[word.lower()]
        if hint is int:
            return whole_number(word)
        if hint is float:
            return float(word)
        return {choice: choice for choice in typing.get_args(hint)}[word]
    except (ValueError, KeyError):
        require(False, f"{name} is {word!r}; it must be {allowed}")


def whole_number(word: str) -> int:
    """`1000`, `1_000`, `1e3` and `1000.0` as 1000; ValueError where there is a fraction, or more than floats hold."""
    try:
        return int(word)
    except ValueError:
        number = float(word)
        if not number.is_integer() or abs(number) > 2**53:
            raise
        return int(number)

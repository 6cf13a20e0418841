"""How things are said to people: numbers of things, choices, nearest names."""

import difflib
import re
from collections.abc import Iterable, Sequence

# What the field calls some of our options; other names are found by their likeness.
SYNONYMS = {
    "gamma": "discount", "tau": "polyak", "alpha": "initial_temperature", "ent_coef": "initial_temperature",
    "buffer_size": "replay_capacity", "learning_starts": "warmup_steps", "gradient_steps": "updates_per_iteration",
    "utd": "updates_per_iteration", "target_update_interval": "target_period", "output": "runs_folder",
    "env_name": "env_id",
}  # fmt: skip


def counted(count: int, noun: str) -> str:
    """`1 seed`, `2 seeds`, `1,000 seeds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def alternatives(words: Iterable[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def nearest(name: str, known: Iterable[str], most: int = 4) -> list[str]:
    """The known names that somebody may have meant: by a synonym, as an abbreviation (`lr`, `critic_lr`), by likeness.

    Names are compared as words, whatever stands between them.
    """
    words = {each: re.split(r"[-_/ ]", each.lower()) for each in known}
    plain, short = name.lower().replace("-", "_"), re.sub(r"[-_/ ]", "", name.lower())
    synonym = [each for each in words if each.replace("-", "_") == SYNONYMS.get(plain)]
    if synonym:
        return synonym
    uses = {each: _abbreviates(short, parts) for each, parts in words.items()}
    abbreviated = sorted((use, place, each) for place, (each, use) in enumerate(uses.items()) if use)
    abbreviated = [each for _, _, each in abbreviated]
    by_plain = {"_".join(parts): each for each, parts in words.items()}
    alike = [by_plain[each] for each in difflib.get_close_matches(plain, by_plain, n=most, cutoff=0.6)]
    # A short word is the beginning of many; a long one is rather misspelt.
    found = abbreviated + alike if len(short) <= 3 or 1 in uses.values() else alike + abbreviated
    return list(dict.fromkeys(found))[:most]


def _abbreviates(short: str, words: Sequence[str]) -> int:
    """Whether `short` is made of the beginnings of words in turn: 1 of all of them, 2 of the first, 3 of some, else 0.

    `lr` and `learnr` are the whole of (learning, rate), and some of (critic, learning, rate).
    """

    def left(short: str, words: Sequence[str]) -> int | None:
        """The fewest words that `short` leaves over, None where it is not made of them."""
        if not short or not words:
            return None if short else len(words)
        lengths = range(1, 1 + min(len(short), len(words[0])))
        found = [left(short[n:], words[1:]) for n in lengths if words[0].startswith(short[:n])]
        return min((each for each in found if each is not None), default=None)

    from_start = left(short, words)
    if from_start is not None:
        return 1 if from_start == 0 else 2
    return 3 * any(left(short, words[i:]) is not None for i in range(1, len(words)))

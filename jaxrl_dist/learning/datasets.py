"""Recorded transitions as files: what algorithms learn from that meet no environment.

A dataset is a `Transition` with leaves `[rows, ...]`, rows in the order in which they happened, one episode after the
other. Its file is an `.npz` with D4RL's names, and one array more for each of the transitions' extras.
"""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from jaxrl_dist.configuration import require
from jaxrl_dist.learning.interaction import EXTRAS, Transition

NAMES = {
    "observation": "observations", "action": "actions", "reward": "rewards", "next_observation": "next_observations",
    "terminated": "terminals", "truncated": "timeouts",
}  # fmt: skip
_TYPES = {"reward": np.float32, "terminated": bool, "truncated": bool}
# What happens inside an episode is called otherwise than the extra: D4RL's `rewards` are scalars.
_OF_EXTRAS = {name: f"extra_{name}" for name in EXTRAS}


def save(path: Path, transitions: Transition) -> None:
    """Write a dataset, whose leaves are `[rows, ...]`."""
    arrays = {NAMES[field]: np.asarray(getattr(transitions, field)) for field in NAMES}
    extras = transitions.extras or {}
    np.savez_compressed(path, **arrays, **{_OF_EXTRAS[name]: np.asarray(x) for name, x in extras.items()})


def load(path: Path) -> Transition:
    """Read a dataset; ConfigurationError names the file and what is wrong with it."""
    where = f"--dataset is {str(path)!r}"
    require(path.is_file(), f"{where}, which does not exist")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        require(False, f"{where}, which is no .npz file, or damaged: {error}")
    missing = [name for name in NAMES.values() if name not in arrays]
    require(not missing, f"{where}, which lacks {', '.join(missing)}")
    rows = len(arrays["rewards"]) if arrays["rewards"].ndim == 1 else 0
    require(rows > 0, f"{where}, whose rewards have shape {arrays['rewards'].shape}; they must be [rows]")
    fields = {field: arrays[name].astype(_TYPES.get(field, arrays[name].dtype)) for field, name in NAMES.items()}
    extras = {name: arrays[theirs].astype(np.float32) for name, theirs in _OF_EXTRAS.items() if theirs in arrays}
    for name, array in (fields | extras).items():
        require(
            array.ndim > 0 and len(array) == rows,
            f"{where}, whose {NAMES.get(name, name)} have shape {array.shape}; they must have {rows} rows",
        )
        require(
            array.dtype == bool or bool(np.isfinite(array).all()),
            f"{where}, whose {NAMES.get(name, name)} are not all finite",
        )
    require(
        fields["observation"].shape == fields["next_observation"].shape,
        f"{where}, whose observations and next_observations differ in shape",
    )
    return Transition(**fields, extras=extras or ())


def digest(path: Path) -> str:
    """What tells a file from any other: its SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(transitions: Transition) -> str:
    """A dataset in a few words."""
    episodes = int((transitions.terminated | transitions.truncated).sum())
    return f"{len(transitions.reward):,} transitions, {episodes:,} ends of episodes"

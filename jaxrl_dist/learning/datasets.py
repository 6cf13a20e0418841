"""Recorded transitions as files: what algorithms learn from that meet no environment.

A dataset is a `Transition` with leaves `[rows, ...]`, rows in the order in which they happened, one episode after the
other. Its file is an `.npz` with D4RL's names, and one array more for each of the transitions' extras.
Actions are as our environments take them: continuous ones in [-1, 1].
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist import outside
from jaxrl_dist.configuration import require
from jaxrl_dist.learning import draws
from jaxrl_dist.learning.devices import split_rows
from jaxrl_dist.learning.interaction import EXTRAS, Transition, transition_like
from jaxrl_dist.learning.spaces import SEVERAL, bounds_of, counts_of, kind_of, spaces_of

NAMES = {
    "observation": "observations", "action": "actions", "reward": "rewards", "next_observation": "next_observations",
    "terminated": "terminals", "truncated": "timeouts",
}  # fmt: skip
_TYPES = {"reward": np.float32, "terminated": bool, "truncated": bool}
# What happens inside an episode is called otherwise than the extra: D4RL's `rewards` are scalars.
_OF_EXTRAS = {name: f"extra_{name}" for name in EXTRAS}


def save(path: Path, transitions: Transition, about: Mapping[str, Any] | None = None) -> None:
    """Write a dataset, whose leaves are `[rows, ...]`; `about`: where it comes from, as far as JSON can say it."""
    arrays = {NAMES[field]: np.asarray(getattr(transitions, field)) for field in NAMES}
    arrays |= {_OF_EXTRAS[name]: np.asarray(x) for name, x in (transitions.extras or {}).items()}
    with open(path, "wb") as file:  # numpy would add a suffix to a path
        np.savez_compressed(file, **arrays, about=np.array(json.dumps(about or {})))


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


def about(path: Path) -> dict[str, Any]:
    """Where the dataset in a file comes from, as `save` was told; {} of files that others wrote."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file["about"])) if "about" in file.files else {}


def require_of(transitions: Transition, env, env_params, path: Path, env_id: str) -> None:
    """ConfigurationError unless the dataset in `path` is one of this environment, as far as can be seen."""
    where = f"--dataset is {str(path)!r}"
    source = outside.shown(about(path).get("env_id", env_id))
    require(source == outside.shown(env_id), f"{where}, which is of {source}; --env-id is {env_id}")
    like = transition_like(env, env_params)
    for name, array, wanted in (
        ("observations", transitions.observation, like.observation), ("actions", transitions.action, like.action),
    ):  # fmt: skip
        require(
            array.shape[1:] == wanted.shape,
            f"{where}, whose {name} have shape {array.shape[1:]}; those of --env-id {env_id} have {wanted.shape}",
        )
    space, actions = spaces_of(env, env_params)[0], transitions.action
    kind = kind_of(space)
    low, high = bounds_of(space) if kind == "continuous" else (0, counts_of(space) - 1)
    require(
        bool((actions >= low).all() and (actions <= high).all()),
        f"{where}, whose actions reach from {actions.min():g} to {actions.max():g}; those of --env-id {env_id} must "
        f"lie in [{np.min(low)}, {np.max(high)}]" + " or less, each by its factor" * (kind == SEVERAL),
    )
    require(
        kind not in ("discrete", SEVERAL) or np.issubdtype(actions.dtype, np.integer),
        f"{where}, whose actions are {actions.dtype}; those of --env-id {env_id} are whole numbers",
    )


class Best(NamedTuple):
    """Numbers of all rows `[rows]`, those of the best episodes first, and how many these are."""

    rows: jax.Array
    count: jax.Array


def best_episodes(data: Transition, percent: int) -> Best:
    """The `percent` of the episodes with the largest sums of rewards, rounded down, at least one.

    An unfinished last episode counts with what it has. Of equal returns the earlier one is better.
    """
    done = jnp.asarray(data.terminated) | jnp.asarray(data.truncated)
    episode = jnp.cumsum(done) - done
    rows = len(data.reward)  # at most as many episodes
    returns = jax.ops.segment_sum(jnp.asarray(data.reward), episode, rows)
    episodes = episode[-1] + 1
    order = jnp.argsort(jnp.where(jnp.arange(rows) < episodes, -returns, jnp.inf))
    rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows))
    kept = rank[episode] < jnp.maximum(episodes * percent // 100, 1)
    return Best(jnp.argsort(~kept).astype(jnp.int32), kept.sum(dtype=jnp.int32))


def draw(data: Transition, key: jax.Array, size: int, best: Best | None = None) -> Transition:
    """Rows drawn uniformly, of all or of the best episodes, with replacement: leaves `[size, ...]`.

    In a data-parallel run they are split over the devices.
    """
    rows = draws.integers(key, (size,), best.count if best else len(data.reward))
    rows = best.rows[rows] if best else rows
    return split_rows(jax.tree.map(lambda x: jnp.asarray(x)[rows], data))


def digest(path: Path) -> str:
    """What tells a file from any other: its SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(transitions: Transition) -> str:
    """A dataset in a few words."""
    episodes = int((transitions.terminated | transitions.truncated).sum())
    return f"{len(transitions.reward):,} transitions, {episodes:,} ends of episodes"

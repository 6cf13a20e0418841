"""Checkpoints of a whole training state that survive a kill at any moment and load on any set of devices.

One checkpoint is one folder, named by its iteration:

    checkpoints/300/arrays/...       written by orbax
    checkpoints/300/manifest.json    name, shape and dtype of every array; size and checksum of every file
    checkpoints/unfinished-...       a save or a deletion that was interrupted; removed by the next save

A checkpoint is written under its `unfinished-` name, flushed to the disk, given its manifest and only then renamed, and
renaming a folder is atomic: a number as a name means complete. Older checkpoints are removed after that, never before.

Choices, and what they rest on (orbax-checkpoint 0.12.8):

- orbax's classic `Checkpointer` and not `orbax.checkpoint.experimental.v1`: the latter still says "experimental" in its
  name. Not `CheckpointManager` either: its deletion, retries and asynchronous saving are what must be in our own hands
  for the promise above, and little is left of it without them.
- The state goes to orbax as a flat `{number: array}`, and the manifest says which field each number is. Structure, keys
  and empty arrays (which orbax refuses) are then ours to check, in our own words, whatever version of orbax reads them.
- Arrays come back through the host and are placed by `jax.device_put`, so the devices that wrote them do not matter.
  Only an array that several processes share is placed by orbax, which reads no more than each process needs of it.
- Several processes write one checkpoint together, each its own part of the arrays through orbax, into one folder that
  all of them see (a shared file system). Everything else is done by the first process, the checksums too, between two
  points at which all wait for all: no process goes on before the checkpoint is complete.
- No compression: the floats of a full replay buffer hardly shrink, and saving them takes several times as long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_dist import hosts
from jaxrl_dist.keys import is_key

_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_UNFINISHED = "unfinished-"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written: names the path and what is wrong with it."""


class Checkpoints:
    """The checkpoints of one run: `keep` newest ones in `folder`, each either complete or recognisably not.

    One run writes to a folder; where several processes share it (`hosts`), all of them call `save`, `load`,
    `remove_after` and `newest_intact` alike. `keep` is at least 1; two by default, so that one damaged checkpoint is
    not the end.
    """

    def __init__(self, folder: Path | str, keep: int = 2):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep={keep!r}: must be an integer of at least 1")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, iteration: int, tree: Any, about: Mapping[str, Any] | None = None) -> None:
        """Writes `tree`, a pytree of arrays, as checkpoint `iteration`; when it returns, the checkpoint is on the disk.

        Then, and not before, all but the `keep` newest are removed, and with them what stood at this iteration or a
        later one: the run went back to before those, because they were damaged or because the user asked for it.
        """
        if isinstance(iteration, bool) or not isinstance(iteration, int | np.integer) or iteration < 0:
            raise ValueError(f"iteration={iteration!r}: must be an integer of at least 0")
        fields, arrays = _describe(tree)
        staging = self.folder / f"{_UNFINISHED}{iteration}"
        hosts.by_first(lambda: self._make_room(staging))
        if arrays:
            with _quiet(), _checkpointer() as checkpointer:
                checkpointer.save((staging / _ARRAYS).absolute(), args=ocp.args.PyTreeSave(arrays))
        _flush_all(staging)  # by every process: another machine's unwritten data are not ours to flush
        hosts.wait()
        hosts.by_first(lambda: self._complete(staging, int(iteration), fields, dict(about or {})))

    def _make_room(self, staging: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        staging.mkdir()

    def _complete(self, staging: Path, iteration: int, fields: dict[str, Any], about: dict[str, Any]) -> None:
        manifest = {"iteration": iteration, "fields": fields, "files": _digests(staging), "about": about}
        _write_manifest(staging, manifest)
        before = self.iterations()
        if iteration in before:
            self._remove(iteration)
        staging.rename(self._path(iteration))
        _flush(self.folder)

        self._remove_later(iteration)
        older = [other for other in before if other < iteration]
        for other in older[: max(0, len(older) - (self.keep - 1))]:
            self._remove(other)

    def remove_after(self, iteration: int) -> None:
        """Removes the checkpoints later than `iteration`, the one a run goes back to; -1 removes all."""
        hosts.by_first(lambda: self._remove_later(iteration))

    def _remove_later(self, iteration: int) -> None:
        for other in self.iterations():
            if other > iteration:
                self._remove(other)

    def iterations(self) -> list[int]:
        """Iterations of all checkpoints in the folder, ascending, damaged ones too."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.is_dir() and path.name.isdecimal())

    def newest(self) -> int | None:
        """The newest iteration there is, damaged or not; None without any."""
        return max(self.iterations(), default=None)

    def newest_intact(self) -> tuple[int | None, list[str]]:
        """The newest iteration that verifies (None without any) and one sentence for each damaged one skipped."""
        return tuple(hosts.by_first(self._newest_intact))

    def _newest_intact(self) -> tuple[int | None, list[str]]:
        skipped = []
        for iteration in reversed(self.iterations()):
            try:
                self.verify(iteration)
            except DamagedCheckpoint as damage:
                skipped.append(str(damage))
            else:
                return iteration, skipped
        return None, skipped

    def verify(self, iteration: int) -> None:
        """Reads every file of a checkpoint and compares it with the manifest; DamagedCheckpoint where they differ."""
        path = self._path(iteration)
        for name, expected in self._manifest(iteration)["files"].items():
            file = path / name
            try:
                size = file.stat().st_size
                if size != expected["bytes"]:
                    raise DamagedCheckpoint(f"{file}: has {size} bytes, {expected['bytes']} were written")
                if _digest_of_file(file) != expected["blake2b"]:
                    raise DamagedCheckpoint(f"{file}: the checksum differs from the one written")
            except FileNotFoundError:
                raise DamagedCheckpoint(f"{file}: the file is missing") from None
            except OSError as error:
                raise DamagedCheckpoint(f"{file}: cannot be read ({error})") from None

    def about(self, iteration: int) -> dict[str, Any]:
        """What was stored about a checkpoint beside its arrays."""
        return self._manifest(iteration).get("about", {})

    def load(self, iteration: int, like: Any) -> Any:
        """The tree of a checkpoint, verified first, with the structure, dtypes and shardings of `like`.

        `like`: a pytree of arrays or `jax.ShapeDtypeStruct`s (typed keys included); where a leaf names no sharding the
        array goes to the default device, and a numpy leaf stays numpy. ValueError naming the field and both shapes
        where the checkpoint holds something else; nothing is cast, cut or filled in.
        """
        hosts.by_first(lambda: self.verify(iteration))
        saved = self._manifest(iteration)["fields"]
        path = self._path(iteration)
        named, structure = jax.tree_util.tree_flatten_with_path(like)
        wanted = {_name(key_path): leaf for key_path, leaf in named}
        _compare(path, saved, {name: _kind(name, leaf) for name, leaf in wanted.items()})

        stored = [field["array"] for field in saved.values() if field["array"]]
        arrays = {}
        if stored:
            how = {saved[name]["array"]: _how_to_restore(leaf) for name, leaf in wanted.items()}
            how = {number: how[number] for number in stored}
            request = ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=how)
            with _quiet(), _checkpointer() as checkpointer:
                arrays = checkpointer.restore((path / _ARRAYS).absolute(), args=request)
        # `pop`: the host's copy of a large replay buffer is let go as soon as it is placed.
        leaves = [
            _place(arrays.pop(saved[name]["array"]) if saved[name]["array"] else None, saved[name], leaf)
            for name, leaf in wanted.items()
        ]
        return jax.tree.unflatten(structure, leaves)

    def _path(self, iteration: int) -> Path:
        return self.folder / str(iteration)

    def _remove(self, iteration: int) -> None:
        # Renamed first: a kill half-way through the deletion must not leave half a checkpoint under its own name.
        doomed = self.folder / f"{_UNFINISHED}deletion-{iteration}"
        self._path(iteration).rename(doomed)
        shutil.rmtree(doomed)

    def _manifest(self, iteration: int) -> dict[str, Any]:
        path = self._path(iteration)
        if not path.is_dir():
            raise ValueError(f"iteration={iteration!r}: no checkpoint in {self.folder}, which has {self.iterations()}")
        manifest_path = path / _MANIFEST
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{path}: no {_MANIFEST}, the checkpoint is incomplete") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DamagedCheckpoint(f"{manifest_path}: cannot be read ({error})") from None
        checksum, _, content = text.partition("\n")
        if checksum != _digest(content.encode()):
            raise DamagedCheckpoint(f"{manifest_path}: the checksum differs from the one written with it")
        manifest = json.loads(content)
        if manifest["iteration"] != iteration:
            raise DamagedCheckpoint(f"{path}: was saved as iteration {manifest['iteration']}")
        return manifest


def _name(key_path: tuple[Any, ...]) -> str:
    """`state.actor['kernel']` as a reader of the error message would write it, without the leading `state`."""
    return jax.tree_util.keystr(key_path) or "(the whole tree)"


def _kind(name: str, leaf: Any) -> str:
    """Dtype and shape as one word, `float32[3,64]`; refuses leaves that are no arrays."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        raise ValueError(f"{name} is {type(leaf).__name__} {leaf!r}: a checkpoint holds arrays only")
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _describe(tree: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """For the manifest, `{name: {kind, shape, dtype, key, array}}`, and for orbax, `{number: array}`."""
    fields, arrays = {}, {}
    for number, (key_path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        name = _name(key_path)
        kind = _kind(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{name} is {leaf}: a shape without values cannot be saved")
        key = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        array = leaf if key is None else jax.random.key_data(leaf)
        stored = str(number) if array.size else None  # orbax refuses arrays without elements
        fields[name] = {"kind": kind, "shape": array.shape, "dtype": str(array.dtype), "key": key, "array": stored}
        if stored:
            arrays[stored] = np.asarray(array) if isinstance(array, np.generic) else array
    return fields, arrays


def _compare(path: Path, saved: dict[str, dict[str, Any]], wanted: dict[str, str]) -> None:
    differences = []
    for name in dict.fromkeys([*wanted, *saved]):
        if name not in saved:
            differences.append(f"{name} {wanted[name]} is missing from the checkpoint")
        elif name not in wanted:
            differences.append(f"{name} {saved[name]['kind']} is in the checkpoint but not asked for")
        elif saved[name]["kind"] != wanted[name]:
            differences.append(f"{name} is {saved[name]['kind']} in the checkpoint, {wanted[name]} was asked for")
    if differences:
        more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
        raise ValueError(f"{path}: {differences[0]}{more}")


def _place(array: np.ndarray | None, field: dict[str, Any], like: Any) -> Any:
    """One restored array as `like` wants it: numpy, or on the devices of its sharding, or a typed key there."""
    if array is None:
        array = np.zeros(field["shape"], field["dtype"])
        if _is_shared(like):
            array = hosts.place(array, like.sharding)
    if isinstance(like, np.ndarray | np.generic):
        return array
    value = array if field["key"] is None else jax.random.wrap_key_data(array, impl=field["key"])
    return value if _is_shared(like) else jax.device_put(value, like.sharding)


def _is_shared(like: Any) -> bool:
    """Whether an array is spread over the devices of several processes."""
    sharding = getattr(like, "sharding", None)
    return sharding is not None and not sharding.is_fully_addressable


def _how_to_restore(like: Any) -> ocp.RestoreArgs:
    if _is_shared(like):
        return ocp.ArrayRestoreArgs(sharding=like.sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's log lines and warnings below an error out of the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_all(folder: Path) -> None:
    """Waits until everything below `folder` is on the disk."""
    for path in folder.rglob("*"):
        _flush(path)


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    """`{relative path: {bytes, blake2b}}` of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": _digest_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """First line: the checksum of the rest, which is JSON. The name appears when the content is on the disk."""
    content = json.dumps(manifest, indent=1)
    temporary = folder / f"{_MANIFEST}.unfinished"
    temporary.write_text(f"{_digest(content.encode())}\n{content}", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, folder / _MANIFEST)
    _flush(folder)

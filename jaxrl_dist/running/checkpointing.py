"""Checkpoints of a whole training state that survive a kill at any moment and load on any set of devices.

One checkpoint is one folder, named by its iteration:

    checkpoints/300/arrays/0/7       numbers of array 7 as they lie in memory, the part that process 0 wrote
    checkpoints/300/manifest.json    name, shape and dtype of every array and where its pieces lie; what the caller said
                                     `about` it; size and checksum of every file
    checkpoints/unfinished-...       a save or a deletion that was interrupted; removed by the next save

A checkpoint is written under its `unfinished-` name, flushed to the disk, given its manifest and only then renamed, and
renaming a folder is atomic: a number as a name means complete. Older checkpoints are removed after that, never before.

Choices, and what they rest on:

- **No second copy of the state, neither when saving nor when loading**: an array is written and read back in blocks of
  at most `BLOCK_BYTES`, which is all that is held beside the state. Hence plain files and not orbax: of arrays that are
  split over devices orbax-checkpoint 0.12.8 held up to the whole state once more while it saved (`experiments/memory`),
  smaller chunks or not, and its limit on bytes in flight refuses an array that is larger.
- One file per array and process: `numpy.fromfile(file, dtype).reshape(shape)` reads an array that one process wrote.
  Structure, keys and shapes are in the manifest and ours to check, in our own words.
- Every block goes to its place on its device at once, so the devices that wrote it do not matter; a process reads no
  more than its devices need.
- Several processes write one checkpoint together, each its own part of the arrays, into one folder that all of them see
  (a shared file system). Everything else is done by the first process, the checksums too, between two points at which
  all wait for all: no process goes on before the checkpoint is complete.
- No compression: the floats of a full replay buffer hardly shrink, and saving them takes several times as long.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.running import hosts

BLOCK_BYTES = 2**24
_FORMAT = 2  # of the manifest and the files; 1 was orbax's
_MANIFEST = "manifest.json"
_ARRAYS = "arrays"
_UNFINISHED = "unfinished-"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what was written: names the path and what is wrong with it."""


class CheckpointNotWritten(OSError):
    """There is no room for a checkpoint or no folder: names it and says what is needed, in one line."""


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
        self._in_a_run = self.folder.parent.is_dir()

    def save(self, iteration: int, tree: Any, about: Mapping[str, Any] | None = None) -> None:
        """Writes `tree`, a pytree of arrays, as checkpoint `iteration`; when it returns, the checkpoint is on the disk.

        Then, and not before, all but the `keep` newest are removed, and with them what stood at this iteration or a
        later one: the run went back to before those, because they were damaged or because the user asked for it.
        `about`: a small mapping that JSON can express, which `about()` gives back. Where the disk is full or the folder
        gone: CheckpointNotWritten; nothing is left of this checkpoint, and the earlier ones are as they were.
        """
        if isinstance(iteration, bool) or not isinstance(iteration, int | np.integer) or iteration < 0:
            raise ValueError(f"iteration={iteration!r}: must be an integer of at least 0")
        fields, arrays = _describe(tree)
        about = json.loads(json.dumps(dict(about or {})))  # refused here, before anything is written
        staging = self.folder / f"{_UNFINISHED}{iteration}"
        needed = bytes_to_write(tree)
        try:
            hosts.by_first(lambda: self._make_room(staging, needed))
            failure = _write(staging / _ARRAYS, fields, arrays)
            if hosts.collect(np.int32(failure is not None)).any():
                raise failure or OSError("another process could not write its part")
            hosts.by_first(lambda: self._complete(staging, int(iteration), fields, about))
        except OSError as error:
            raise self._not_written(iteration, staging, needed, error) from error

    def _make_room(self, staging: Path, needed: int) -> None:
        if self._in_a_run and not self.folder.parent.is_dir():
            raise FileNotFoundError(f"the folder {self.folder.parent} is gone")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover)
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(os.strerror(errno.ENOSPC))
        staging.mkdir()

    def _not_written(self, iteration: int, staging: Path, needed: int, error: OSError) -> CheckpointNotWritten:
        """What to say of a checkpoint that failed, which is removed."""
        kept, free = self.iterations(), "?"
        if hosts.is_first() and self.folder.is_dir():
            shutil.rmtree(staging, ignore_errors=True)
            free = megabytes(shutil.disk_usage(self.folder).free)
        return CheckpointNotWritten(
            f"checkpoint {iteration} could not be written to {self.folder} ({error.strerror or error}): it needs more "
            f"than {megabytes(needed)}, {free} are free; "
            + (f"intact are the checkpoints {kept}" if kept else "there is no earlier checkpoint")
        )

    def _complete(self, staging: Path, iteration: int, fields: dict[str, Any], about: dict[str, Any]) -> None:
        _flush_folders(staging)
        content = {"format": _FORMAT, "iteration": iteration, "about": about}
        _write_manifest(staging, content | {"fields": fields, "files": _digests(staging)})
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

        # One array after the other, so that no more than a block of one is held twice.
        leaves = [_restored(path / _ARRAYS, saved[name], leaf) for name, leaf in wanted.items()]
        return jax.tree.unflatten(structure, leaves)

    def about(self, iteration: int) -> dict[str, Any]:
        """What was said `about` a checkpoint when it was saved; DamagedCheckpoint where the manifest is damaged."""
        return self._manifest(iteration)["about"]

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
        if manifest.get("format", 1) != _FORMAT:
            raise ValueError(
                f"{path}: was written by another version of jaxrl-dist, in format {manifest.get('format', 1)} where "
                f"this one reads {_FORMAT}; go on with the version that config.json of the run names"
            )
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
    """For the manifest, `{name: {kind, shape, dtype, key, array, pieces}}`, and `{number: array}` to write.

    Pieces are blocks of an array: the `process` that writes each, the `offset` in its file, and where it begins and
    ends along every axis. All processes find the same ones.
    """
    fields, arrays = {}, {}
    for number, (key_path, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        name = _name(key_path)
        kind = _kind(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{name} is {leaf}: a shape without values cannot be saved")
        key = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        array = leaf if key is None else jax.random.key_data(leaf)
        array = np.asarray(array) if isinstance(array, np.generic) else array
        arrays[str(number)] = array
        fields[name] = {
            "kind": kind, "shape": array.shape, "dtype": str(array.dtype), "key": key, "array": str(number),
            "pieces": _pieces(array),
        }  # fmt: skip
    return fields, arrays


def _pieces(array: jax.Array | np.ndarray) -> list[dict[str, Any]]:
    """The pieces of an array, each in the hands of one device; where several have the same, it is the first one's."""
    whole = tuple((0, size) for size in array.shape)
    owners = {whole: 0}
    if isinstance(array, jax.Array):
        owners = {}
        for device, index in array.sharding.devices_indices_map(array.shape).items():
            process = 0 if array.is_fully_addressable else device.process_index
            owners.setdefault(_bounds(index, array.shape), process)
    written, pieces = {}, []
    for bounds, process in sorted(owners.items()):
        offset = written.setdefault(process, 0)
        written[process] += math.prod(stop - start for start, stop in bounds) * array.dtype.itemsize
        pieces.append({"process": process, "offset": offset, "bounds": bounds})
    return pieces if array.size else []


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def bytes_to_write(tree: Any) -> int:
    """Size of a checkpoint of `tree`, arrays or `jax.ShapeDtypeStruct`s, but for its manifest."""

    def size(leaf: Any) -> int:
        leaf = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        return math.prod(leaf.shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


# -- blocks -----------------------------------------------------------------------------------------------------------


def _blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where the blocks of at most `BLOCK_BYTES` that make up an array begin and end, in the order of its memory."""
    row_bytes = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    axis = next((axis for axis, size in enumerate(row_bytes) if size <= BLOCK_BYTES), None)
    if axis is None or 0 in shape:
        yield (0,) * len(shape), shape
        return
    rows = BLOCK_BYTES // row_bytes[axis]
    rest = shape[axis + 1 :]
    for outer in np.ndindex(*shape[:axis]):
        for first in range(0, shape[axis], rows):
            start = (*outer, first, *(0 for _ in rest))
            yield start, (*(place + 1 for place in outer), min(first + rows, shape[axis]), *rest)


def _write(folder: Path, fields: Mapping[str, Any], arrays: Mapping[str, Any]) -> OSError | None:
    """Writes this process's pieces of all arrays to the disk; returns the error there was, for others wait for it."""
    mine = jax.process_index()
    try:
        for field in fields.values():
            pieces = [piece for piece in field["pieces"] if piece["process"] == mine]
            if pieces:
                (folder / str(mine)).mkdir(parents=True, exist_ok=True)
                _write_array(folder / str(mine) / field["array"], arrays[field["array"]], pieces)
    except OSError as error:
        return error
    return None


def _write_array(path: Path, array: jax.Array | np.ndarray, pieces: list[dict[str, Any]]) -> None:
    held = {pieces[0]["bounds"]: array}
    if isinstance(array, jax.Array):
        held = {_bounds(shard.index, array.shape): shard.data for shard in array.addressable_shards}
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            data = held[piece["bounds"]]
            if isinstance(data, jax.Array) and data.device.platform == "cpu":
                data = np.asarray(data)  # no copy, and no compiled slice
            for start, stop in _blocks(data.shape, data.dtype.itemsize):
                block = np.ascontiguousarray(_taken(data, start, stop)).reshape(-1).view(np.uint8)
                done = 0
                while done < block.size:  # a disk that fills up takes a part first and says so at the next try
                    done += file.write(block[done:])
        os.fsync(file.fileno())


def _taken(data: jax.Array | np.ndarray, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    """A block of what one device holds, on the host."""
    sizes = tuple(last - first for first, last in zip(start, stop, strict=True))
    if sizes == data.shape:
        return np.asarray(data)
    if isinstance(data, np.ndarray):
        return data[_slices(start, stop)]
    return np.asarray(jax.lax.dynamic_slice(data, start, sizes))


def _slices(start: tuple[int, ...], stop: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(map(slice, start, stop))


def _read(folder: Path, field: dict[str, Any], start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray:
    """A block of a stored array, out of all the pieces that have a part of it."""
    dtype = jnp.dtype(field["dtype"])
    block = np.empty(tuple(last - first for first, last in zip(start, stop, strict=True)), dtype)
    for piece in field["pieces"]:
        low, high = (tuple(bound[side] for bound in piece["bounds"]) for side in (0, 1))
        first, last = tuple(map(max, start, low)), tuple(map(min, stop, high))
        if any(begin >= end for begin, end in zip(first, last, strict=True)):
            continue
        # Mapped anew for every block: pages that were read count as this process's until the map is gone.
        stored = np.memmap(
            folder / str(piece["process"]) / field["array"], dtype, "r", piece["offset"],
            tuple(end - begin for begin, end in zip(low, high, strict=True)),
        )  # fmt: skip
        block[_slices(_less(first, start), _less(last, start))] = stored[_slices(_less(first, low), _less(last, low))]
    return block


def _less(place: tuple[int, ...], origin: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip(place, origin, strict=True))


def _restored(folder: Path, field: dict[str, Any], like: Any) -> Any:
    """One array as `like` wants it: numpy, or on the devices of its sharding, or a typed key there."""
    shape = tuple(field["shape"])
    if isinstance(like, np.ndarray | np.generic):
        array = np.empty(shape, jnp.dtype(field["dtype"]))
        for start, stop in _blocks(shape, array.dtype.itemsize):
            array[_slices(start, stop)] = _read(folder, field, start, stop)
        return array
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        array = _on_device(folder, field, tuple((0, size) for size in shape), None)
    else:
        parts = [
            _on_device(folder, field, _bounds(index, shape), device)
            for device, index in sharding.addressable_devices_indices_map(shape).items()
        ]
        array = jax.make_array_from_single_device_arrays(shape, sharding, parts)
    return array if field["key"] is None else jax.random.wrap_key_data(array, impl=field["key"])


def _on_device(folder: Path, field: dict[str, Any], bounds: tuple[tuple[int, int], ...], device: Any) -> jax.Array:
    """The part of a stored array within `bounds` on one device, None being the default one."""
    origin = tuple(start for start, _ in bounds)
    shape = tuple(stop - start for start, stop in bounds)
    dtype = jnp.dtype(field["dtype"])

    def read(start, stop):
        return _read(folder, field, *(tuple(map(sum, zip(origin, place, strict=True))) for place in (start, stop)))

    blocks = list(_blocks(shape, dtype.itemsize))
    if len(blocks) == 1:
        return jax.device_put(read(*blocks[0]), device)
    with jax.default_device(device):  # `zeros(device=...)` would make them on the first device and copy them
        array = jnp.zeros(shape, jax.dtypes.canonicalize_dtype(dtype))
        for start, stop in blocks:
            array = jax.block_until_ready(_with_block(array, read(start, stop), start))
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _with_block(array: jax.Array, block: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, block, start)


# -- checks, checksums and the disk -----------------------------------------------------------------------------------


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


def _flush_folders(folder: Path) -> None:
    """Waits until the lists of names below `folder` are on the disk; the files were flushed by those who wrote them."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
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

"""Checkpoints: bit-exact round trips, every kind of damage named, a kill at any moment, other devices."""

import asyncio
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist.running import checkpointing
from jaxrl_dist.running.checkpointing import CheckpointNotWritten, Checkpoints, DamagedCheckpoint


class Replay(NamedTuple):
    pixels: jax.Array
    rewards: jax.Array
    empty: jax.Array
    priorities: jax.Array | None


class State(NamedTuple):
    parameters: dict
    optimiser: optax.OptState
    replay: Replay
    keys: jax.Array
    steps: jax.Array
    mean: np.ndarray


def make_state(seed: int = 0, width: int = 3) -> State:
    weights, rewards, keys = jax.random.split(jax.random.key(seed), 3)
    parameters = {"torso/0": {"kernel": jax.random.normal(weights, (2, width)), "bias": jnp.zeros(width, jnp.bfloat16)}}
    return State(
        parameters=parameters,
        optimiser=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(parameters),
        replay=Replay(
            pixels=jnp.arange(24, dtype=jnp.uint8).reshape(2, 3, 4),
            rewards=jax.random.normal(rewards, (7,)).at[3].set(jnp.nan),
            empty=jnp.zeros((0, 5), jnp.int32),
            priorities=None,
        ),
        keys=jax.random.split(keys, 4),
        steps=jnp.int32(seed),
        mean=np.array([1e-300, 0.1]),
    )


def bits(tree) -> list[tuple]:
    """Everything that must survive: field names, types, dtypes, shapes and the bytes themselves."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        is_jax = isinstance(leaf, jax.Array)
        rows.append((jax.tree_util.keystr(path), is_jax, str(leaf.dtype), leaf.shape, data.dtype, data.tobytes()))
    return rows


def shapes_of(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --------------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_exact_bit_for_bit(tmp_path):
    state = make_state(5)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.iterations() == []
    assert checkpoints.newest() is None
    assert checkpoints.newest_intact() == (None, [])
    checkpoints.save(0, state)
    loaded = checkpoints.load(0, make_state(6))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert bits(loaded) == bits(state)
    assert bits(loaded) != bits(make_state(6))
    assert checkpoints.newest() == 0


def test_shapes_alone_are_enough_to_load(tmp_path):
    state = make_state(1)._replace(mean=jnp.zeros(2))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    assert bits(checkpoints.load(1, shapes_of(state))) == bits(state)
    assert bits(checkpoints.load(1, jax.eval_shape(lambda: make_state(0)._replace(mean=jnp.zeros(2))))) == bits(state)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_keep_their_kind_and_their_stream(tmp_path, implementation):
    checkpoints = Checkpoints(tmp_path)
    make = lambda seed: {"key": jax.random.split(jax.random.key(seed, impl=implementation), (2, 3))}  # noqa: E731
    checkpoints.save(3, make(0))
    loaded = checkpoints.load(3, make(1))["key"]
    assert jax.random.key_impl(loaded) == implementation
    np.testing.assert_array_equal(jax.random.normal(loaded[1, 2]), jax.random.normal(make(0)["key"][1, 2]))
    other = jax.ShapeDtypeStruct((2, 3), jax.random.key(0, impl="rbg" if implementation != "rbg" else None).dtype)
    with pytest.raises(ValueError, match=r"\['key'\] is key<u?\w+>\[2,3\]"):
        checkpoints.load(3, {"key": other})


def test_saving_uses_up_no_key_and_blocks_no_donation(tmp_path):
    state = {"buffer": jnp.zeros((1000, 100)), "key": jax.random.key(0)}
    pointer = state["buffer"].unsafe_buffer_pointer()
    Checkpoints(tmp_path).save(1, state)
    Checkpoints(tmp_path).save(2, state)
    jax.random.normal(state["key"])  # would raise under jax_debug_key_reuse
    written = jax.jit(lambda buffer: buffer.at[3].set(1.0), donate_argnums=0)(state["buffer"])
    assert written.unsafe_buffer_pointer() == pointer  # in place: no hidden reference was left to the old array
    # and a loaded buffer may be donated without harm to the numbers
    like = {"buffer": written, "key": jax.random.key(0)}
    loaded = Checkpoints(tmp_path).load(2, like)["buffer"]
    np.testing.assert_array_equal(jax.jit(lambda buffer: buffer.at[3].add(1.0), donate_argnums=0)(loaded), written)


def test_works_inside_a_running_event_loop_as_in_a_notebook(tmp_path):
    async def cell():
        Checkpoints(tmp_path).save(1, make_state(1))
        return Checkpoints(tmp_path).load(1, make_state(0))

    assert bits(asyncio.run(cell())) == bits(make_state(1))


def test_a_tree_without_any_elements_is_saved_too(tmp_path):
    tree = {"empty": jnp.zeros((3, 0), jnp.uint8), "nothing": None}
    Checkpoints(tmp_path).save(1, tree)
    assert bits(Checkpoints(tmp_path).load(1, tree)) == bits(tree)


def test_exact_resume_of_a_donating_jitted_loop(tmp_path):
    """N + M steps equal N, save, load, M."""

    @jax.jit
    def step(state):
        key, draw = jax.random.split(state["key"])
        grads = jax.random.normal(draw, (8,)) + jnp.sin(state["w"])
        updates, optimiser = optax.adam(0.1).update(grads, state["optimiser"])
        return {"key": key, "w": state["w"] + updates, "optimiser": optimiser}

    def start(seed):
        w = jnp.ones(8)
        return {"key": jax.random.key(seed), "w": w, "optimiser": optax.adam(0.1).init(w)}

    straight = start(0)
    for _ in range(7):
        straight = step(straight)
    halted = start(0)
    for _ in range(4):
        halted = step(halted)
    Checkpoints(tmp_path).save(4, halted)
    resumed = Checkpoints(tmp_path).load(4, start(99))
    for _ in range(3):
        resumed = step(resumed)
    assert bits(resumed) == bits(straight)


# ------------------------------------------------------------------------------------------- keeping and refusing


def test_keep(tmp_path):
    for keep in (1, 2, 4):
        checkpoints = Checkpoints(tmp_path / str(keep), keep=keep)
        for iteration in (0, 5, 10, 15, 100):
            checkpoints.save(iteration, {"x": jnp.int32(iteration)})
            assert checkpoints.iterations() == [i for i in (0, 5, 10, 15, 100) if i <= iteration][-keep:]
            assert [path.name for path in (tmp_path / str(keep)).iterdir() if not path.name.isdecimal()] == []
        for iteration in checkpoints.iterations():
            assert int(checkpoints.load(iteration, {"x": jnp.int32(0)})["x"]) == iteration


@pytest.mark.parametrize("keep", [0, -1, 1.5, True, None])
def test_keep_is_checked(tmp_path, keep):
    with pytest.raises(ValueError, match=rf"keep={keep}.*at least 1"):
        Checkpoints(tmp_path, keep=keep)


def test_bad_arguments(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for iteration in (-1, 1.0, "3", True):
        with pytest.raises(ValueError, match="iteration="):
            checkpoints.save(iteration, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"\['a'\]\['b'\] is float 1.5: a checkpoint holds arrays only"):
        checkpoints.save(1, {"a": {"b": 1.5}})
    with pytest.raises(ValueError, match="shape without values"):
        checkpoints.save(1, {"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    checkpoints.save(1, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"iteration=7: no checkpoint .* which has \[1\]"):
        checkpoints.load(7, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"iteration=7: no checkpoint"):
        checkpoints.verify(7)
    with pytest.raises(ValueError, match=r"\['x'\] is int 3: a checkpoint holds arrays only"):
        checkpoints.load(1, {"x": 3})


def test_a_run_that_goes_back_replaces_what_came_after(tmp_path):
    """Resumed from 10, since 20 was damaged or since the user asked for it, and saved at 20 again."""
    checkpoints = Checkpoints(tmp_path, keep=4)
    for iteration in (5, 10, 20, 30):
        checkpoints.save(iteration, {"x": jnp.int32(iteration)})
    (tmp_path / "20" / "manifest.json").unlink()
    checkpoints.save(20, {"x": jnp.int32(21)})
    assert checkpoints.iterations() == [5, 10, 20]
    assert int(checkpoints.load(20, {"x": jnp.int32(0)})["x"]) == 21
    assert checkpoints.newest_intact() == (20, [])
    checkpoints.remove_after(5)
    assert checkpoints.iterations() == [5]
    checkpoints.remove_after(-1)
    assert checkpoints.iterations() == []
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    Checkpoints(folder).save(4, make_state(4))
    return folder / "4"


@pytest.fixture
def checkpoint(saved_once, tmp_path):
    """A checkpoint folder of one's own to damage."""
    subprocess.run(["cp", "-r", saved_once, tmp_path / "4"], check=True)
    Checkpoints(tmp_path).verify(4)
    return tmp_path / "4"


def largest(folder: Path) -> Path:
    return max(files_of(folder), key=lambda path: path.stat().st_size)


def assert_damaged(folder: Path, path: Path, what: str) -> None:
    checkpoints = Checkpoints(folder.parent)
    pattern = rf"^{re.escape(str(path))}: .*{what}"
    with pytest.raises(DamagedCheckpoint, match=pattern) as raised:
        checkpoints.verify(4)
    assert "\n" not in str(raised.value)
    with pytest.raises(DamagedCheckpoint, match=pattern):
        checkpoints.load(4, make_state(0))
    assert checkpoints.newest_intact() == (None, [str(raised.value)])
    assert checkpoints.newest() == 4


def test_truncated_file(checkpoint):
    file = largest(checkpoint / "arrays")
    size = file.stat().st_size
    os.truncate(file, size // 2)
    assert_damaged(checkpoint, file, f"has {size // 2} bytes, {size} were written")


def test_deleted_file(checkpoint):
    file = largest(checkpoint / "arrays")
    file.unlink()
    assert_damaged(checkpoint, file, "missing")


def test_missing_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()
    assert_damaged(checkpoint, checkpoint, "no manifest.json, the checkpoint is incomplete")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"not json\n{}"])
def test_broken_manifest(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    assert_damaged(checkpoint, checkpoint / "manifest.json", "(checksum|cannot be read)")


def test_one_flipped_bit_in_any_file_is_found(checkpoint):
    generator = random.Random(0)
    files = [path for path in files_of(checkpoint) if path.stat().st_size]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        position = generator.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint, match=rf"^{re.escape(str(file))}: "):
            Checkpoints(checkpoint.parent).verify(4)
        file.write_bytes(content)
    Checkpoints(checkpoint.parent).verify(4)


def test_an_unreadable_file_is_damage_too(checkpoint):
    file = largest(checkpoint / "arrays")
    file.unlink()
    file.symlink_to(file.name)  # opening it fails with an OSError, for every user
    assert_damaged(checkpoint, file, "cannot be read")


def test_a_renamed_checkpoint_is_not_taken_for_another_iteration(checkpoint):
    checkpoint.rename(checkpoint.parent / "9")
    with pytest.raises(DamagedCheckpoint, match="9: was saved as iteration 4"):
        Checkpoints(checkpoint.parent).verify(9)


def test_newest_intact_skips_the_damaged_and_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for iteration in (1, 2, 3, 4):
        checkpoints.save(iteration, {"x": jnp.full(3, iteration)})
    (tmp_path / "4" / "manifest.json").unlink()
    os.truncate(largest(tmp_path / "3" / "arrays"), 1)
    newest, skipped = checkpoints.newest_intact()
    assert newest == 2
    assert checkpoints.newest() == 4
    assert checkpoints.iterations() == [1, 2, 3, 4]
    assert len(skipped) == 2
    assert str(tmp_path / "4") in skipped[0]
    assert "has 1 bytes" in skipped[1]


def test_unfinished_folders_are_no_checkpoints_and_the_next_save_removes_them(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.int32(1)})
    for name in ("unfinished-2", "unfinished-deletion-0"):
        (tmp_path / name / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
        (tmp_path / name / "arrays.orbax-checkpoint-tmp" / "half").write_text("half")
    (tmp_path / "notes.txt").write_text("the user's own file")
    assert checkpoints.iterations() == [1]
    checkpoints.save(2, {"x": jnp.int32(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "notes.txt"]


def test_a_save_that_fails_leaves_the_earlier_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jnp.int32(1)})

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            checkpoints.save(2, {"x": jnp.int32(2)})
    assert checkpoints.newest_intact() == (1, [])
    checkpoints.save(2, {"x": jnp.int32(2)})
    assert checkpoints.newest_intact() == (2, [])
    assert checkpoints.iterations() == [2]


def test_a_disk_that_fills_up_in_a_save_is_one_line_and_leaves_the_earlier_ones(tmp_path):
    """A limit on the size of files stands for the disk: writing stops in the middle of an array."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(1, {"x": jnp.zeros(4)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            CheckpointNotWritten, match=r"checkpoint 2 could not be written to .*run/checkpoints \(File "
        ) as raised:
            checkpoints.save(2, {"a": jnp.ones(4), "x": jnp.zeros((100, 100))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value)
    assert "it needs more than 0.0 MiB" in str(raised.value)
    assert str(raised.value).endswith("MiB are free; intact are the checkpoints [1]")
    assert [path.name for path in checkpoints.folder.iterdir()] == ["1"]
    assert checkpoints.newest_intact() == (1, [])
    checkpoints.save(2, {"x": jnp.zeros((100, 100))})
    assert checkpoints.newest_intact() == (2, [])


def test_nothing_is_begun_where_the_disk_has_no_room(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    tree = {"x": jnp.zeros((1024, 1024)), "key": jax.random.key(0)}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**22}))
    with pytest.raises(
        CheckpointNotWritten, match=r"No space left on device\): it needs more than 4.0 MiB, 4.0 MiB are free; there"
    ):
        checkpoints.save(1, tree)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**22 + 8}))
    checkpoints.save(1, tree)


def test_a_run_whose_folder_is_gone_is_not_begun_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(1, {"x": jnp.zeros(4)})
    shutil.rmtree(folder)
    with pytest.raises(CheckpointNotWritten, match=r"checkpoint 2 could not be written .*the folder .*run is gone"):
        checkpoints.save(2, {"x": jnp.zeros(4)})
    assert not folder.exists()


def test_blocks_make_up_an_array_of_any_shape(tmp_path, monkeypatch):
    """Blocks so small that rows, planes and single numbers are cut, and pieces of other devices read across."""
    monkeypatch.setattr(checkpointing, "BLOCK_BYTES", 16)
    tree = {
        str(shape): jnp.arange(np.prod(shape, dtype=int)).reshape(shape) for shape in ((), (7,), (2, 3, 5), (3, 1, 4))
    }
    tree |= {"half": jnp.linspace(0, 1, 30, dtype=jnp.bfloat16).reshape(5, 6), "host": np.arange(9.0).reshape(3, 3)}
    Checkpoints(tmp_path).save(1, tree)
    assert bits(Checkpoints(tmp_path).load(1, tree)) == bits(tree)
    file = tmp_path / "1" / "arrays" / "0" / str(sorted(tree).index("(2, 3, 5)"))
    np.testing.assert_array_equal(np.fromfile(file, np.int32).reshape(2, 3, 5), tree["(2, 3, 5)"])


def test_what_is_said_about_a_checkpoint_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"x": jnp.zeros(4)}, {"tables": {"metrics.csv": [3, "abc"]}})
    checkpoints.save(2, {"x": jnp.zeros(4)})
    assert checkpoints.about(1) == {"tables": {"metrics.csv": [3, "abc"]}}
    assert checkpoints.about(2) == {}
    with pytest.raises(TypeError):
        checkpoints.save(3, {"x": jnp.zeros(4)}, {"x": jnp.zeros(4)})
    assert checkpoints.iterations() == [1, 2]
    manifest = tmp_path / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("abc", "abd"))
    with pytest.raises(DamagedCheckpoint, match="checksum"):
        checkpoints.about(1)


def test_a_checkpoint_of_another_format_is_not_taken_for_a_damaged_one(checkpoint):
    """Or `auto` would begin anew and remove it."""
    manifest = checkpoint / "manifest.json"
    content = manifest.read_text().partition("\n")[2].replace('"format": 2,', "")
    manifest.write_text(f"{checkpointing._digest(content.encode())}\n{content}")
    with pytest.raises(ValueError, match="another version of jaxrl-dist, in format 1") as raised:
        Checkpoints(checkpoint.parent).newest_intact()
    assert not isinstance(raised.value, DamagedCheckpoint)


# -------------------------------------------------------------------------------------------------- mismatch


def test_another_structure_is_named_in_one_line(saved_once):
    checkpoints = Checkpoints(saved_once.parent)

    def message(like) -> str:
        with pytest.raises(ValueError, match=re.escape(str(saved_once))) as raised:
            checkpoints.load(4, like)
        assert not isinstance(raised.value, DamagedCheckpoint)  # nothing is broken: the question was another one
        assert "\n" not in str(raised.value)
        return str(raised.value)

    wider = message(make_state(0, width=64))
    assert ".parameters['torso/0']['bias'] is bfloat16[3] in the checkpoint, bfloat16[64] was asked for" in wider
    assert "(and 5 more differences)" in wider
    state = make_state(0)
    prioritised = state._replace(replay=state.replay._replace(priorities=jnp.ones(7)))
    assert ".replay.priorities float32[7] is missing from the checkpoint" in message(prioritised)
    assert ".keys key<fry>[4] is in the checkpoint but not asked for" in message(state._replace(keys=None))
    assert ".steps is int32[] in the checkpoint, float32[] was asked for" in message(state._replace(steps=jnp.ones(())))
    raw = message(state._replace(keys=jax.random.key_data(state.keys)))
    assert ".keys is key<fry>[4] in the checkpoint, uint32[4,2] was asked for" in raw
    assert "differences" not in raw


# ---------------------------------------------------------------------------------------------------- devices

ON_EIGHT_DEVICES = """
    import sys, jax, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxrl_dist.running.checkpointing import Checkpoints
    sys.path.insert(0, {tests!r})
    from test_checkpointing import sharded_state, bits
    assert jax.device_count() == 8
    here = Checkpoints({here!r})
    for count in (2, 8):
        here.save(count, sharded_state(count, seed=count))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded_state(8, seed=0))
    loaded = Checkpoints({there!r}).load(1, like)
    assert bits(loaded) == bits(sharded_state(8, seed=1))
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == wanted.sharding, (leaf.sharding, wanted.sharding)
    assert len(loaded["runs"].addressable_shards) == 8 and loaded["runs"].addressable_shards[0].data.shape == (1, 5)
    print("everything asserted")
"""


def sharded_state(devices: int, seed: int) -> dict[str, jax.Array]:
    """Runs split over `devices`, one array on all of them, typed keys split too."""
    axis = jax.make_mesh(
        (devices,), ("runs",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    split, everywhere = (
        jax.sharding.NamedSharding(axis, jax.sharding.PartitionSpec(*names)) for names in (("runs",), ())
    )
    runs, common, keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "runs": jax.device_put(jax.random.normal(runs, (8, 5)), split),
        "common": jax.device_put(jax.random.normal(common, (3, 4)), everywhere),
        "keys": jax.device_put(jax.random.split(keys, 8), split),
        "count": jnp.int32(seed),
    }


def test_saved_on_eight_or_two_devices_and_loaded_on_one_and_back(tmp_path):
    Checkpoints(tmp_path / "one").save(1, sharded_state(1, seed=1))
    program = ON_EIGHT_DEVICES.format(
        tests=str(Path(__file__).parent), here=str(tmp_path / "eight"), there=str(tmp_path / "one")
    )
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.stdout == "everything asserted\n", finished.stderr
    assert finished.stderr == ""  # no word from a library on the user's terminal
    assert jax.device_count() == 1
    for devices in (8, 2):
        for like in (sharded_state(1, seed=0), shapes_of(sharded_state(1, seed=0))):
            loaded = Checkpoints(tmp_path / "eight").load(devices, like)
            assert bits(loaded) == bits(sharded_state(1, seed=devices))
            assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(loaded))


# ------------------------------------------------------------------------------------------------------- kill -9


def content_of(iteration: int) -> dict[str, jax.Array]:
    return {
        "big": jnp.arange(20_000, dtype=jnp.int32) * (iteration + 1),
        "key": jax.random.key(iteration),
        "iteration": jnp.int32(iteration),
    }


# (kind of event, its count): the renamings of three saves, moments of the first deletion, and touches of any kind.
MOMENTS = [("os.rename", count) for count in range(1, 9)]
MOMENTS += [("shutil.rmtree", 1), ("os.rmdir", 1), ("os.rmdir", 4)]
MOMENTS += [("", count) for count in range(2, 100, 24)]


def save_for_ever(folder: Path, moment: tuple[str, int] | None) -> None:
    """A training process that only saves; where asked to, kills itself at one touch of the file system."""
    checkpoints = Checkpoints(folder, keep=2)
    newest = checkpoints.newest()
    if newest is None:
        newest = 0
        checkpoints.save(0, content_of(0))
    seen = 0

    def audit(event: str, _: tuple) -> None:
        nonlocal seen
        if event.startswith(("open", "os.", "shutil.")) and event.startswith(moment[0]):
            seen += 1
            if seen == moment[1]:
                os.kill(os.getpid(), signal.SIGKILL)

    if moment is not None:
        sys.addaudithook(audit)
    for iteration in range(newest + 1, newest + 1000):
        checkpoints.save(iteration, content_of(iteration))
        (folder.parent / "returned").write_text(str(iteration))


def assert_survived(folder: Path) -> None:
    """What must hold after a kill at any moment."""
    checkpoints = Checkpoints(folder, keep=2)
    returned = folder.parent / "returned"
    returned = int(returned.read_text() or -1) if returned.exists() else -1
    newest, damaged = checkpoints.newest_intact()
    assert damaged == []
    assert newest is not None
    assert newest >= returned
    assert len(checkpoints.iterations()) >= min(2, newest + 1)  # the earlier one is still there
    for iteration in checkpoints.iterations():
        assert bits(checkpoints.load(iteration, content_of(0))) == bits(content_of(iteration))
    checkpoints.save(newest + 1, content_of(newest + 1))
    assert sorted(path.name for path in folder.iterdir()) == sorted([str(newest), str(newest + 1)])  # no leftovers


@pytest.fixture(scope="module")
def processes():
    """Forks from a process that has imported everything: half a second for each process to kill instead of five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxrl_dist.running.checkpointing", "optax", "pytest"])
    return context


def start_saving(processes, folder: Path, moment: tuple[str, int] | None = None):
    process = processes.Process(target=save_for_ever, args=(folder, moment), daemon=True)
    process.start()
    return process


def test_killed_at_random_moments_and_resumed(tmp_path, processes):
    """One run, killed and resumed over and over: threads that write arrays are hit as well as Python."""
    generator = random.Random(time.time_ns())
    folder = tmp_path / "checkpoints"
    for _ in range(6):
        returned = tmp_path / "returned"
        returned.unlink(missing_ok=True)
        process = start_saving(processes, folder)
        while not returned.exists():
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(generator.uniform(0.0, 0.5))  # somewhere in the saves that follow the first
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert_survived(folder)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0] or 'touch'}-{moment[1]}")
def test_killed_at_a_step_of_a_save(tmp_path, processes, moment):
    folder = tmp_path / "checkpoints"
    process = start_saving(processes, folder, moment)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert_survived(folder)

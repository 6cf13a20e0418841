"""One run on several processes, each with its own devices: how they meet, agree, share results, and end.

Every process runs the same command and the same host loop; each holds its part of the runs. The first process alone
prints and writes tables, the others write no more than their part of the checkpoints and their runs' policies. All
functions here but `join`, `watch` and `leaving` are collective: every process must call them, in the same order, and
with a single process they are what the function says without any communication.

How the loss of a process is noticed (JAX 0.10): where it was killed, the operating system closes its connections and
the next collective operation of the others raises; where its machine is gone or hangs, JAX's coordination service
misses its heartbeat for `HEARTBEAT_SECONDS` and then aborts every other process from C++, where Python has no say.
Hence the watcher, a shell that outlives its process and says how to go on. The same holds for processes that never
meet: after `START_SECONDS` JAX aborts those that are there.
"""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.running import doctor

START_SECONDS = 300
HEARTBEAT_SECONDS = 100
# The first process holds the service that all others need to end in order, so after an error it leaves last.
PATIENCE_SECONDS = 3
_MESSAGE_BYTES = 65_536

_watcher: subprocess.Popen | None = None
_again = "the same command"


# -- start ------------------------------------------------------------------------------------------------------------


def join(distributed: str, num_processes: int, process_id: int, device: doctor.Platform = "auto") -> None:
    """Meet the other processes of this run; must come before JAX starts, and starts it.

    distributed: `off` does nothing; `auto` finds the others as JAX does, through SLURM, Cloud TPU, Kubernetes or Open
    MPI; `HOST:PORT` is where process 0 waits for `num_processes` processes, of which this is number `process_id`.
    ConfigurationError where the numbers do not fit, the others cannot be found, or devices are dealt out unevenly.
    """
    if distributed in ("off", "auto"):
        require(
            num_processes == 0 and process_id == -1,
            f"--num-processes is {num_processes} and --process-id {process_id}; they need --distributed HOST:PORT",
        )
        if distributed == "off":
            return
        where = {}
    else:
        host, _, port = distributed.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            f"--distributed is {distributed!r}; it must be off, auto or HOST:PORT, where process 0 waits for the rest",
        )
        require(num_processes >= 1, f"--num-processes is {num_processes}; with HOST:PORT it must be at least 1")
        require(
            0 <= process_id < num_processes,
            f"--process-id is {process_id}; it must be from 0 to {num_processes - 1}, another one in every process",
        )
        where = {"coordinator_address": distributed, "num_processes": num_processes, "process_id": process_id}
    # JAX's own handler of SIGTERM would take the place of the runner's, which stops and saves.
    jax.config.update("jax_enable_preemption_service", False)
    _start_watcher(
        f"error: --distributed is {distributed}, but not all processes met within {START_SECONDS} seconds; start all "
        "of them, where they can reach process 0 and the port is free"
    )
    try:
        jax.distributed.initialize(
            **where, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"--distributed is {distributed}, but the processes did not find each other ({_first_line(error)}); auto "
            "works under SLURM, on Cloud TPU, in Kubernetes and under Open MPI, HOST:PORT everywhere"
        ) from error
    finally:
        _dismiss_watcher()
    doctor.require_platform(device)
    counts = Counter(device.process_index for device in jax.devices())
    require(
        len(set(counts.values())) == 1,
        f"--distributed is {distributed}, and the processes have {[counts[i] for i in sorted(counts)]} devices; each "
        "must have as many as the others (on CPU: XLA_FLAGS=--xla_force_host_platform_device_count=N)",
    )


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def machines() -> int:
    """Number of different machines that the processes run on."""
    name = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return len(np.unique(multihost_utils.process_allgather(name)))


# -- agree ------------------------------------------------------------------------------------------------------------


def by_first(action: Callable[[], Any]) -> Any:
    """What `action` returns, on every process; only the first one runs it. Returns what JSON can express.

    Where it raises, every process does: the first one what was raised, the others a ConfigurationError that says so.
    """
    if jax.process_count() == 1:
        return action()
    told, failure = {}, None
    if is_first():
        try:
            told = {"value": action()}
        except Exception as error:
            told, failure = {"error": _first_line(error)[:1000]}, error
    message = json.dumps(told).encode()
    if len(message) > _MESSAGE_BYTES:
        raise ValueError(f"the value has {len(message)} bytes as JSON; at most {_MESSAGE_BYTES} are sent around")
    padded = np.frombuffer(message.ljust(_MESSAGE_BYTES), np.uint8)
    told = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
    if failure is not None:
        raise failure
    require("error" not in told, f"process 0 failed: {told.get('error')}")
    return told["value"]


def require_same(settings: Any) -> None:
    """ConfigurationError unless all processes were started with the same settings (what JSON can express)."""
    text = json.dumps(settings, sort_keys=True, default=lambda x: np.asarray(x).tolist())
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    other = [number for number, found in enumerate(sums) if found != sums[0]]
    require(
        not other,
        f"processes {other} were started with other options than process 0; all must run the same command",
    )


def collect(values: np.ndarray) -> np.ndarray:
    """The small array of every process, `[processes, ...]`, on every process."""
    return multihost_utils.process_allgather(values)


def wait() -> None:
    """Go on when every process has come here."""
    multihost_utils.sync_global_devices("jaxrl_dist")


# -- share ------------------------------------------------------------------------------------------------------------


def place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Arrays that every process has in full, spread as `sharding` says over the devices of all processes."""

    def one(x: Any) -> jax.Array:
        if is_key(x):
            return jax.random.wrap_key_data(one(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def gather(tree: Any) -> Any:
    """Arrays that are spread over the devices of all processes, in full as numpy on every process; for small ones."""
    return multihost_utils.process_allgather(tree, tiled=True)


# -- end --------------------------------------------------------------------------------------------------------------


def watch(again: str) -> None:
    """From now on, say how to go on if this process ends without `leaving`; `again` are the options to add."""
    global _again
    if jax.process_count() == 1:
        return
    _again = f"the same command and {again}"
    _start_watcher(
        f"error: process {jax.process_index()} of {jax.process_count()} has ended too early, killed or because another "
        f"one is lost; start all of them again with {_again} to go on from the last checkpoint"
    )


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Around all of a process's work: whatever ends it, no other process waits for this one for ever."""
    try:
        yield
        if jax.distributed.is_initialized():
            wait()
            _dismiss_watcher()
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        _leave_at_once(error)


def _leave_at_once(error: BaseException) -> NoReturn:
    """End without JAX's own goodbye, at which all processes wait for all."""
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    elif _is_loss(error):
        me, count = jax.process_index(), jax.process_count()
        lost = f"process {1 - me} of 2" if count == 2 else f"one of the other {count - 1} processes"
        print(
            f"error: {lost} is lost ({_first_line(error)}); process {me} has stopped. Start all of them again with "
            f"{_again} to go on from the last checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exc()
    _dismiss_watcher()
    sys.stdout.flush()
    sys.stderr.flush()
    first = True
    with contextlib.suppress(RuntimeError):  # JAX itself may be what did not start
        first = is_first()
    if first:
        time.sleep(PATIENCE_SECONDS)
    os._exit(status)


def _start_watcher(sentence: str) -> None:
    """Have `sentence` printed should this process end before `_dismiss_watcher`, in whatever way."""
    global _watcher
    # In a session of its own: Ctrl-C goes to all of a terminal's processes, and this one must outlive ours.
    _watcher = subprocess.Popen(
        ["sh", "-c", f"read line || echo {shlex.quote(sentence)} >&2"], stdin=subprocess.PIPE, start_new_session=True
    )


def _dismiss_watcher() -> None:
    global _watcher
    if _watcher is not None:
        _watcher.communicate(b"done\n")
        _watcher = None


def _is_loss(error: BaseException) -> bool:
    return any(word in str(error) for word in ("Gloo", "NCCL", "coordination service"))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

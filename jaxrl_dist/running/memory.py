"""How much memory a run will hold in each of its phases, before anything is compiled, and how much there is.

What is known before compiling is the state of all runs, shape by shape, and the traced programs. `live_bytes` walks
through a program and adds up what must be held at once, much as XLA arranges it. What it cannot know is what compiling
leaves behind (`COMPILING_BYTES`). `experiments/memory` compares predictions with measured peaks.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core
from rich.console import Console

from jaxrl_dist.configuration import ConfigurationError, option, require
from jaxrl_dist.learning.replay import Replay
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.running import hosts, training
from jaxrl_dist.running.checkpointing import BLOCK_BYTES, bytes_to_write, megabytes
from jaxrl_dist.running.problem import Problem
from jaxrl_dist.wording import counted

# What compiling all programs of a run leaves in the process on a CPU (experiments/memory).
COMPILING_BYTES = 420 * 2**20
# Of what is available, how much may be filled without a word.
COMFORTABLE = 0.8
PHASES = {
    "begin": "starting the runs", "pretrain": "pretraining", "advance": "training", "evaluate": "evaluating",
    "calibrate": "calibrating", "save": "saving a checkpoint", "load": "loading a checkpoint",
}  # fmt: skip
_CALLS = {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}
_ELEMENTWISE = {
    "abs", "add", "add_any", "and", "bitcast_convert_type", "broadcast_in_dim", "ceil", "clamp",
    "convert_element_type", "copy", "cos", "div", "eq", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "integer_pow", "iota", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne",
    "neg", "not", "or", "pow", "rem", "reshape", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "slice", "sqrt", "square", "squeeze",
    "stop_gradient", "sub", "tanh", "transpose", "xor",
}  # fmt: skip
_FUSED = _ELEMENTWISE | {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"}
_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


class Prediction(NamedTuple):
    """Bytes on the devices of this process; on a CPU those are the process's own memory.

    held: what is held already. compiling: what that leaves behind. phases: what each phase of `PHASES` holds at its
    peak beside both. temporary: of each program what it holds beside the state. fields: what every field of the state
    takes, a replay being one field.
    """

    held: int
    compiling: int
    phases: dict[str, int]
    temporary: dict[str, int]
    fields: dict[str, int]

    @property
    def of_the_runs(self) -> int:
        """The most that the runs hold, in their largest phase."""
        return max(self.phases.values())

    @property
    def needed(self) -> int:
        """The most that the process will hold beside what it holds already."""
        return self.compiling + self.of_the_runs

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


def predict(programs: training.Programs) -> Prediction:
    """What a run of `programs` will hold, from shapes alone."""
    on_cpu = jax.default_backend() == "cpu"
    devices = sum(device.process_index == jax.process_index() for device in programs.sharding.device_set)
    compiling = COMPILING_BYTES if on_cpu and not programs.compiled else 0
    temporary = {name: devices * _of_one_device(traced) for name, traced in programs.traces.items() if name in PHASES}
    fields = {name: devices * _bytes_on_one_device(node) for name, node in _fields(programs).items()}
    state = sum(fields.values())
    # `begin` makes the state, the others are given it.
    phases = {name: extra + (state if name != "begin" else 0) for name, extra in temporary.items()}
    phases |= dict.fromkeys(("save", "load"), state + 2 * min(BLOCK_BYTES, max(fields.values())))
    # The data is there already, on every device: `_held_bytes` has it.
    return Prediction(_held_bytes(), compiling, phases, temporary, fields)


def require_room(problem: Problem, programs: training.Programs, console: Console) -> None:
    """Refuse a run that cannot fit into memory, and warn of one that nearly fills it; `--memory ignore` lets it be."""
    prediction, available = predict(programs), available_bytes()
    if problem.options.memory == "ignore" or available is None:
        return
    needed = prediction.needed
    if needed <= COMFORTABLE * available:
        return
    sentence = (
        f"the runs need {megabytes(needed)} at their peak ({PHASES[prediction.largest_phase]}), and "
        f"{megabytes(available)} are available; {_cause(problem, programs, prediction, available)}"
    )
    if needed > available:
        raise ConfigurationError(f"{sentence}. --memory ignore tries it all the same")
    console.print(f"[yellow]{sentence}", soft_wrap=True)


def require_disk(problem: Problem, programs: training.Programs, folder: Path) -> None:
    """Refuse a run in `folder` whose checkpoints the disk cannot take; `--memory ignore` lets it be."""
    options, one = problem.options, bytes_to_write([programs.abstract_training, programs.abstract_best])
    saves = -(-options.total_steps // (options.checkpoint_every or -(-options.total_steps // 4)))
    needed = one * min(saves, options.checkpoint_keep + 1)  # the oldest one goes when the newest is written

    def free() -> int:
        place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        old = sum(file.stat().st_size for file in (folder / "checkpoints").glob("**/*") if file.is_file())
        return shutil.disk_usage(place).free + old

    free = hosts.by_first(free)
    require(
        needed <= free or options.memory == "ignore",
        f"--runs-folder is {options.runs_folder!r}: checkpoints of {megabytes(one)} need {megabytes(needed)} "
        f"(--checkpoint-keep {options.checkpoint_keep}, and the next), but the disk has {megabytes(free)} free. "
        "--memory ignore tries it all the same",
    )


def summary(programs: training.Programs) -> str:
    """The prediction as one line of a run's plan."""
    prediction, available = predict(programs), available_bytes()
    name, size = max(prediction.fields.items(), key=lambda item: item[1])
    peak, state = prediction.held + prediction.needed, sum(prediction.fields.values())
    there = "" if available is None else f", {megabytes(prediction.held + available)} are there"
    return (
        f"{megabytes(peak)} predicted at the peak ({PHASES[prediction.largest_phase]}){there}; the runs hold "
        f"{megabytes(state)}, {megabytes(size)} of it {name}"
    )


# -- what takes most --------------------------------------------------------------------------------------------------


def _cause(problem: Problem, programs: training.Programs, prediction: Prediction, available: int) -> str:
    """What takes most of the memory, and the setting to which it belongs."""
    options, temporary, fields = problem.options, prediction.temporary, prediction.fields
    by_setting: dict[str, list[str]] = {}
    for name in sorted(fields, key=lambda name: -fields[name]):
        by_setting.setdefault(_setting(problem, programs, name) or name, []).append(name)
    causes = {}
    for setting, names in by_setting.items():
        more = f" and {counted(len(names) - 1, 'field')} like it" if len(names) > 1 else ""
        causes[f"{names[0]}{more}" + (f" ({setting})" if setting != names[0] else "")] = sum(map(fields.get, names))
    if programs.data:
        causes[f"the data (--dataset {options.dataset})"] = sum(x.nbytes for x in jax.tree.leaves(programs.data))
    if "evaluate" in temporary:
        causes[f"the evaluation (--eval-episodes {options.eval_episodes})"] = temporary["evaluate"]
    if "calibrate" in temporary:
        how = f"--eval-states {options.eval_states} x --eval-rollouts {options.eval_rollouts}"
        causes[f"the calibration ({how})"] = temporary["calibrate"]
    if temporary["advance"] > 2 * sum(
        fields.values()
    ):  # otherwise they are gradients and copies of what the state holds
        config = problem.config
        size = f" (--batch-size {config.batch_size})" if isinstance(config, Settings) else ""
        causes["the batches of an update" + size] = temporary["advance"]
    worst = max(causes, key=causes.__getitem__)
    said = f"most of it, {megabytes(causes[worst])}, is {worst}"
    share = prediction.of_the_runs / programs.num_runs
    if programs.num_runs > 1 and share < available:
        said += f", and each of the {programs.num_runs} runs takes {megabytes(share)} (--num-seeds {options.num_seeds})"
    return said


def _setting(problem: Problem, programs: training.Programs, field: str) -> str:
    """`--OPTION VALUE`, the setting that says how large a field of the state is, as far as its sizes tell; else ''."""
    node = _fields(programs)[field]
    settings = {each.name: getattr(problem.config, each.name) for each in dataclasses.fields(problem.config)}
    if isinstance(node, Replay):
        rows = f"{jax.tree.leaves(node.rows)[0].shape[1]:,} rows"
        return f"{rows}, --replay-capacity" if "replay_capacity" in settings else rows
    for size in sorted(node.shape[1:], reverse=True):
        for name, value in settings.items():
            given = value if isinstance(value, tuple) else (value,)
            if size > 1 and size in [x for x in given if isinstance(x, int) and not isinstance(x, bool)]:
                return f"{option(name)} {' '.join(map(str, given))}"
    return ""


# -- programs and shapes ----------------------------------------------------------------------------------------------


def _fields(programs: training.Programs) -> dict[str, Any]:
    """What is held, by name, in shapes: the fields of the state of all runs, a replay as one, and best policies."""
    named, _ = jax.tree_util.tree_flatten_with_path(
        programs.abstract_training, is_leaf=lambda node: isinstance(node, Replay)
    )
    fields = {jax.tree_util.keystr(path).removeprefix("."): node for path, node in named}
    return fields | {f"best[{index}]": node for index, node in enumerate(programs.abstract_best)}


def _bytes_on_one_device(node: Any) -> int:
    """Bytes that every device holds of the arrays in a tree, described with their shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(node))


def _of_one_device(traced: Any) -> int:
    jaxpr = traced.jaxpr.jaxpr
    split = [eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
    return live_bytes(split[0] if split else jaxpr)  # without: one run on all devices, which hold most of it each


def live_bytes(jaxpr: core.Jaxpr) -> int:
    """The most bytes that a program holds at once, its results included and its arguments not.

    A result takes no memory of its own where it is elementwise and only goes into results like it, into which XLA fuses
    it; or where an operand of its size is needed no more, a loop's carry for one.
    """
    return _live_bytes(jaxpr, {})


class _Step(NamedTuple):
    """One operation; operands and results are numbers of values, None for what takes no memory worth counting."""

    name: str
    operands: list[int | None]
    results: list[int | None]
    inner: list[core.Jaxpr]


def _live_bytes(jaxpr: core.Jaxpr, known: dict[int, int]) -> int:
    if id(jaxpr) in known:
        return known[id(jaxpr)]
    sizes, steps = [_bytes(v) for v in jaxpr.invars], []
    theirs = set(range(len(sizes)))  # values in memory of the caller
    results = _flatten(jaxpr, list(theirs), sizes, steps)
    last_use = {value: place for place, step in enumerate(steps) for value in step.operands}
    last_use |= dict.fromkeys(results, len(steps))
    stored = {value for step in steps if step.name not in _FUSED for value in step.operands} | {*results}
    for step in steps:
        for value in {*step.results} - stored if step.name in _ELEMENTWISE else ():
            sizes[value] = 0
    live = peak = 0
    for place, step in enumerate(steps):
        ending = [value for value in dict.fromkeys(step.operands) if last_use[value] == place]
        new = 0
        for result in step.results:
            taken = next((value for value in ending if value is not None and sizes[value] == sizes[result]), None)
            if taken is None:
                new += sizes[result]
                continue
            ending.remove(taken)
            if taken in theirs:
                theirs.add(result)
        inside = max((_live_bytes(inner, known) for inner in step.inner), default=0)
        # The results of a loop stand beside what each turn needs; those of other inner programs are among it.
        peak = max(peak, live + (new + inside if step.name in ("while", "scan") else max(new, inside)))
        unused = [value for value in step.results if value not in last_use]
        live += new - sum(sizes[value] for value in (*ending, *unused) if value is not None and value not in theirs)
    known[id(jaxpr)] = peak
    return peak


def _flatten(jaxpr: core.Jaxpr, arguments: list[int | None], sizes: list[int], steps: list[_Step]) -> list[int | None]:
    """Appends the operations of a program to `steps`, those of the functions that it calls in their places."""
    scope = dict(zip(jaxpr.invars, arguments, strict=True))

    def read(v: Any) -> int | None:
        return None if isinstance(v, core.Literal) else scope.get(v)

    for eqn in jaxpr.eqns:
        operands, inner = [read(v) for v in eqn.invars], list(_inner(eqn))
        if eqn.primitive.name in _CALLS and len(inner) == 1 and len(inner[0].invars) == len(operands):
            results = _flatten(inner[0], operands, sizes, steps)
        else:
            results = [len(sizes) + number for number in range(len(eqn.outvars))]
            sizes += [_bytes(v) for v in eqn.outvars]
            steps.append(_Step(eqn.primitive.name, operands, results, inner))
        scope |= zip(eqn.outvars, results, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _bytes(variable: Any) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * dtype.itemsize if dtype is not None else 0


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


# -- what there is ----------------------------------------------------------------------------------------------------


def available_bytes() -> int | None:
    """Memory that the devices of this process may fill beside what they hold; None where that is not known.

    On a CPU what the system can make available, within the limit of the container, shared evenly by the processes on
    this machine.
    """
    here = -(-jax.process_count() // hosts.machines())
    return hosts.by_first(lambda: _available_on_devices() if _limit_of_device() else _available_on_host(here))


def _limit_of_device() -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def _available_on_devices() -> int:
    stats = [device.memory_stats() for device in jax.local_devices()]
    return sum(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def _available_on_host(processes: int) -> int | None:
    known = [x for x in (_available_in_system(), _available_in_container()) if x is not None]
    return min(known) // processes if known else None


def _available_in_system() -> int | None:
    meminfo = _PROC / "meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in lines:
            return int(lines["MemAvailable"].split()[0]) * 1024
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _available_in_container() -> int | None:
    """What the control groups of this process leave, of both versions; None without a limit."""
    own = _PROC / "self" / "cgroup"
    left = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, roots = ("memory.max", "memory.current", "inactive_file"), (_CGROUPS, _CGROUPS / "unified")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            roots = (_CGROUPS / "memory", _CGROUPS / controllers)
        else:
            continue
        for root in roots:
            below = Path(path.lstrip("/"))
            for group in (below, *below.parents):  # every group above has a limit of its own
                left.append(_left_in_group(root / group, *names))
    return min((x for x in left if x is not None), default=None)


def _left_in_group(group: Path, limit_name: str, used_name: str, reclaimable: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / used_name).read_text())
    except OSError:  # no such group here: in a container it is called otherwise than outside
        return None
    return max(0, int(limit) - used + int(stat.get(reclaimable, 0)))


def _held_bytes() -> int:
    if _limit_of_device():
        return sum(device.memory_stats()["bytes_in_use"] for device in jax.local_devices())
    statm = _PROC / "self" / "statm"
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0

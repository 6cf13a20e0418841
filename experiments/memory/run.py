"""Is the memory that a run is predicted to need the memory that it takes?

Each of five agents trains in a process of its own, with a replay that makes its state a few hundred MiB. `results.csv`
holds, per agent, in MiB:

- what was predicted before anything was compiled, and the most that the process held until its last checkpoint
  was written and loaded again (VmHWM), and their ratio;
- what the process held before (JAX started, everything imported), and what compiling left behind beside it;
- for every phase, what was predicted and what it held, without both of those.

`saving.csv` compares writing a state of 386 MiB that is split over two devices with orbax and in blocks.

    python experiments/memory/run.py            # about ten minutes on 2 cores
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import tyro

HERE = Path(__file__).parent
MIB = 2**20
# algorithm: environment, runs, rows of each replay, how the runs of one device take turns
CASES = {
    "tqc": ("Pendulum-v1", 2, 4_000_000, "auto"),
    "rainbow": ("CartPole-v1", 2, 6_000_000, "auto"),
    "sac": ("Pendulum-v1", 4, 4_000_000, "vmap"),
    "c51": ("CartPole-v1", 4, 2_000_000, "map"),
    "iqn": ("CartPole-v1", 2, 4_000_000, "auto"),
}
NUM_ENVS = 4096
SAVERS = ("orbax", "orbax in chunks of 16 MiB", "blocks")


def main(algorithms: tuple[str, ...] = tuple(CASES), one: str = "", out: Path = HERE) -> None:
    """Measure and write the tables.

    Args:
        algorithms: which agents to train.
        one: measure this case in this process and print it as JSON; what the others are started with.
        out: folder to write to.
    """
    if one:
        measured = saving(one) if one in SAVERS else measure(one)
        print(json.dumps(measured))
        return
    from jaxrl_dist import recording

    started = time.perf_counter()
    pd.DataFrame(map(child, SAVERS)).to_csv(out / "saving.csv", index=False)
    if algorithms:
        pd.DataFrame(map(child, algorithms)).to_csv(out / "results.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), "versions": recording.versions(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def child(case: str) -> dict:
    """What one case measures in a new process, which compiles everything itself."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    print(case, flush=True)
    command = [sys.executable, str(HERE / "run.py"), "--one", case]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(algorithm: str) -> dict:
    """Train, save and load, and watch the process's memory."""
    from jaxrl_dist import cli

    cli.spread_over_cores()
    import jax
    import numpy as np
    from rich.console import Console

    from jaxrl_dist import checkpointing, memory, problem, runner, training

    env_id, runs, rows, mode = CASES[algorithm]
    module = cli.find_algorithm(algorithm)
    preset = problem.split_preset(module.PRESETS[env_id])[1]
    sizes = {"num_envs": NUM_ENVS, "warmup_steps": 2 * NUM_ENVS, "replay_capacity": rows, "updates_per_iteration": 2}
    config = module.Config(**preset | sizes)
    peaks, seconds = {}, {}

    def watched(owner: type, name: str) -> None:
        action = getattr(owner, name)

        def watching(self, *arguments, **more):
            reset_peak()
            before = time.perf_counter()
            result = jax.block_until_ready(action(self, *arguments, **more))
            seconds.setdefault(name, time.perf_counter() - before)
            peaks[name] = max(peaks.get(name, 0), status("VmHWM"))
            left.setdefault(name, status("VmRSS"))
            return result

        setattr(owner, name, watching)

    left = {}
    for name in ("compile", "begin", "advance", "evaluate", "calibrate"):
        watched(training.Programs, name)
    for name in ("save", "load"):
        watched(checkpointing.Checkpoints, name)
    with tempfile.TemporaryDirectory() as folder:
        options = problem.RunOptions(
            env_id=env_id, num_seeds=runs, total_steps=rows, eval_every=rows // 2, checkpoint_every=rows // 2,
            checkpoint_keep=1, name="a", runs_folder=folder, runs_mode=mode, plots=False,
        )  # fmt: skip
        one = problem.prepare(algorithm, module.make_agent, config, options)
        programs = runner.make_programs(one)
        predicted = memory.predict(programs)
        where = runner.train(one, Console(quiet=True), programs)
        del peaks["compile"]
        checkpoints = checkpointing.Checkpoints(where / "checkpoints")
        like = {"training": programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
        checkpoints.load(checkpoints.newest(), like)
    held, state = predicted.held / MIB, sum(predicted.fields.values()) / MIB
    compiled = left["compile"] - held
    found = {
        "algorithm": algorithm, "environment": env_id, "runs": runs, "mode": programs.runs_mode, "state": state,
        "predicted": held + predicted.needed / MIB, "peak": max(peaks.values()), "held": held,
        "left_by_compiling": compiled,
    }  # fmt: skip
    found["ratio"] = found["predicted"] / found["peak"]
    for name, size in predicted.phases.items():
        found |= {f"{name}_predicted": size / MIB, f"{name}_peak": peaks[name] - held - compiled}
    found |= {"save_seconds": seconds["save"], "load_seconds": seconds["load"]}
    return {name: round(x, 2) if isinstance(x, float) else x for name, x in found.items()}


def saving(how: str) -> dict:
    """Peak and seconds of writing arrays that are split over two devices."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    import jax.numpy as jnp

    mesh = jax.make_mesh((2,), ("runs",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    shapes = [(2, 400_000, 60), (2, 400_000, 60), (2, 400_000, 6), (512, 512)]
    arrays = jax.jit(lambda: {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}, out_shardings=split)()

    def write(folder: Path, tree: dict) -> None:
        if how == "blocks":
            from jaxrl_dist.checkpointing import Checkpoints

            Checkpoints(folder).save(1, tree)
            return
        import orbax.checkpoint as ocp

        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        chunk = None if how == "orbax" else ocp.SaveArgs(chunk_byte_size=16 * MIB)
        arguments = ocp.args.PyTreeSave(tree, save_args=chunk and jax.tree.map(lambda _: chunk, tree))
        ocp.Checkpointer(handler).save(folder.absolute() / "1", args=arguments)

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "first", {"x": jnp.ones(3)})  # imports and threads
        reset_peak()
        before, started = status("VmRSS"), time.perf_counter()
        write(Path(folder) / "second", jax.block_until_ready(arrays))
        seconds, peak = time.perf_counter() - started, status("VmHWM")
    size = sum(x.nbytes for x in arrays.values()) / MIB
    return {
        "how": how,
        "state": round(size, 1),
        "beside_the_state": round(peak - before, 1),
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    tyro.cli(main)

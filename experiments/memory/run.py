"""Is the memory that a run is predicted to need the memory that it takes?

Each of five agents trains with a replay that makes its state a few hundred MiB, in a process that is killed after the
first checkpoint and another that resumes and comes to the end. `results.csv` holds, per agent, in MiB:

- what was predicted before anything was compiled, the most that either process held (VmHWM), and their ratio;
- what the process held before (JAX started, everything imported), what compiling held at its peak and left behind;
- for every phase, what was predicted and what it held, without what was held before and left by compiling.

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


def main(algorithms: tuple[str, ...] = tuple(CASES), one: str = "", folder: str = "", out: Path = HERE) -> None:
    """Measure and write the tables.

    Args:
        algorithms: which agents to train.
        one: measure this case in this process and print it as JSON; what the others are started with.
        folder: where the case trains; one that was begun there is resumed.
        out: folder to write to.
    """
    if one:
        saving(one) if one in SAVERS else measure(one, Path(folder))
        return
    from jaxrl_dist.records import recording

    started = time.perf_counter()
    pd.DataFrame(map(child, SAVERS)).to_csv(out / "saving.csv", index=False)
    if algorithms:
        pd.DataFrame(map(life_of_a_run, algorithms)).to_csv(out / "results.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(os.sched_getaffinity(0)), "versions": recording.versions(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def child(case: str, folder: str = "") -> dict:
    """What one case measures in a new process, which compiles everything itself."""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    print(case, flush=True)
    command = [sys.executable, str(HERE / "run.py"), "--one", case, "--folder", folder]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def life_of_a_run(algorithm: str) -> dict:
    """A run that is killed after its first checkpoint, and the process that resumes it and comes to the end."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = child(algorithm, folder), child(algorithm, folder)
    phases = {
        name: max(each["phases"].get(name, 0) for each in (first, second))
        for name in second["predictions"] | {"finish": 0}
    }
    found = {name: second[name] for name in ("algorithm", "environment", "runs", "mode", "state", "predicted")}
    found["peak"] = max(first["peak"], second["peak"])
    found["ratio"] = found["predicted"] / found["peak"]
    for name in ("held", "compiling_peak", "left_by_compiling"):
        found[name] = max(first[name], second[name])
    for name, predicted in second["predictions"].items():
        found |= {f"{name}_predicted": predicted, f"{name}_peak": phases[name]}
    found |= {
        "finish_peak": phases["finish"], "save_seconds": first["seconds"]["save"],
        "load_seconds": second["seconds"]["load"],
    }  # fmt: skip
    return {name: round(x, 2) if isinstance(x, float) else x for name, x in found.items()}


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(algorithm: str, folder: Path) -> None:
    """Train until the first checkpoint, or resume from there to the end, and print the process's memory as JSON."""
    from jaxrl_dist import cli

    cli.spread_over_cores()
    import jax
    from rich.console import Console

    from jaxrl_dist.running import checkpointing, memory, problem, session, training

    env_id, runs, rows, mode = CASES[algorithm]
    module = cli.find_algorithm(algorithm)
    preset = problem.split_preset(module.PRESETS[env_id])[1]
    sizes = {"num_envs": NUM_ENVS, "warmup_steps": 2 * NUM_ENVS, "replay_capacity": rows, "updates_per_iteration": 2}
    config = module.Config(**preset | sizes)
    begun = any(folder.iterdir())
    options = problem.RunOptions(
        env_id=env_id, num_seeds=runs, total_steps=rows, eval_every=rows // 2, checkpoint_every=rows // 2,
        checkpoint_keep=1, name="a", runs_folder=str(folder), runs_mode=mode, resume="latest" if begun else "",
    )  # fmt: skip
    one = problem.prepare(algorithm, module.make_agent, config, options)
    programs = session.make_programs(one)
    peaks, seconds, left, predictions = {}, {}, {}, []

    def note_prediction(*_) -> None:
        predictions.append(memory.predict(programs))  # when a run makes it: what resuming looks at first is in memory

    memory.require_room = note_prediction

    def report() -> None:
        (predicted,) = predictions
        held = predicted.held / MIB
        before = left["compile"]
        print(json.dumps({
            "algorithm": algorithm, "environment": env_id, "runs": runs, "mode": programs.runs_mode,
            "state": sum(predicted.fields.values()) / MIB, "predicted": held + predicted.needed / MIB,
            "peak": max(peaks.values()), "held": held, "compiling_peak": peaks["compile"] - held,
            "left_by_compiling": left["compile"] - held,
            "phases": {name: peak - before for name, peak in peaks.items()},
            "predictions": {name: size / MIB for name, size in predicted.phases.items()}, "seconds": seconds,
        }), flush=True)  # fmt: skip

    def watched(owner: type, name: str, phase: str = "") -> None:
        action, phase = getattr(owner, name), phase or name

        def watching(self, *arguments, **more):
            reset_peak()
            before = time.perf_counter()
            result = jax.block_until_ready(action(self, *arguments, **more))
            seconds.setdefault(phase, time.perf_counter() - before)
            peaks[phase] = max(peaks.get(phase, 0), status("VmHWM"))
            left.setdefault(phase, status("VmRSS"))
            if phase == "save" and not begun:
                report()
                os._exit(0)
            return result

        setattr(owner, name, watching)

    for name in ("compile", "begin", "advance", "evaluate", "calibrate"):
        watched(training.Programs, name)
    for name in ("save", "load"):
        watched(checkpointing.Checkpoints, name)
    for name in ("_save_policies", "_draw_curve", "_draw_distribution"):
        watched(session._Session, name, "finish")
    session.train(one, Console(quiet=True), programs)
    report()


def saving(how: str) -> None:
    """Print as JSON the peak and the seconds of writing arrays that are split over two devices."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    import jax.numpy as jnp

    mesh = jax.make_mesh((2,), ("runs",), (jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))
    shapes = [(2, 400_000, 60), (2, 400_000, 60), (2, 400_000, 6), (512, 512)]
    arrays = jax.jit(lambda: {str(i): jnp.ones(shape) for i, shape in enumerate(shapes)}, out_shardings=split)()

    def write(folder: Path, tree: dict) -> None:
        if how == "blocks":
            from jaxrl_dist.running.checkpointing import Checkpoints

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
    beside = round(peak - before, 1)
    print(json.dumps({"how": how, "state": round(size, 1), "beside_the_state": beside, "seconds": round(seconds, 2)}))


if __name__ == "__main__":
    tyro.cli(main)

"""What does a run cost when 1, 4, 16 or 64 of them train together?

For some agents with their presets (TQC on Pendulum-v1, the others on CartPole-v1; replays of 20,000 rows) `runs.csv`
holds, per number of runs:

- milliseconds per iteration and run, and the same relative to one run alone: below 1, runs are cheaper together;
- compile seconds of all programs and memory of the training program, which all runs share.

The four sizes are measured in turn, and the median over repetitions is taken; the ratios are what to read.

    python experiments/throughput/runs.py            # about five minutes on 2 cores
"""

import json
import statistics
import time
from pathlib import Path

import jax
import pandas as pd
import tyro
from run import advance_program, timed_loop  # beside this file

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, training

HERE = Path(__file__).parent
CASES = {"tqc": "Pendulum-v1", "dqn": "CartPole-v1", "c51": "CartPole-v1", "qr_dqn": "CartPole-v1"}


def main(runs: tuple[int, ...] = (1, 4, 16, 64), repetitions: int = 7, seconds: float = 1.0, out: Path = HERE) -> None:
    """Measure and write the table.

    Args:
        runs: how many runs train together; the first number is what the others are compared with.
        repetitions: measurements of each quantity, of which the median is taken.
        seconds: length of one measurement.
        out: folder to write to.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started, rows = time.perf_counter(), []
    for algorithm, env_id in CASES.items():
        module = cli.find_algorithm(algorithm)
        preset = problem.split_preset(module.PRESETS[env_id])[1]
        config = module.Config(**{**preset, "replay_capacity": 20_000})
        programs, compile_seconds = {}, {}
        for count in runs:
            programs[count] = training.Programs(module.make_agent, config, *envs.make(env_id), num_runs=count)
            before = time.perf_counter()
            programs[count].compile()
            compile_seconds[count] = time.perf_counter() - before
        loops = {count: timed_loop(advance_program(one), seconds) for count, one in programs.items()}
        samples = [{count: loop() / count for count, loop in loops.items()} for _ in range(repetitions)]
        for count, one in programs.items():
            ratio = statistics.median(sample[count] / sample[runs[0]] for sample in samples)
            rows.append(
                {
                    "algorithm": algorithm, "environment": env_id, "runs": count, "mode": one.runs_mode,
                    "devices": one.num_devices, "compile_s": round(compile_seconds[count], 1),
                    "ms_per_iteration_and_run": round(statistics.median(sample[count] for sample in samples), 3),
                    "relative_to_one": round(ratio, 2),
                    "program_memory_mib": round(one.memory_of_advance() / 2**20, 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out / "runs.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(jax.devices()), "versions": recording.versions(),
    }  # fmt: skip
    (out / "runs.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

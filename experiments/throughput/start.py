"""From the shell to a trained policy: whole processes, and what the compile cache saves them.

Each run of `RUNS` is started three times in a process of its own: with the cache off, with an empty one, and with the
one that the second start left. `start.csv` has a row for each; `seconds` are of the whole process, from the start of
Python to its end, the last picture included. Seconds of CPU are of all threads, and hardly depend on what else the
machine does; those of the clock do.

    python experiments/throughput/start.py            # about five minutes on 2 cores
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import tyro

from jaxrl_dist.algorithms.actor_critic import tqc
from jaxrl_dist.algorithms.value_based import dqn
from jaxrl_dist.records import recording

HERE = Path(__file__).parent
MINE = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
TQC = (tqc.__file__, "--env-id", "Pendulum-v1", "--total-steps", "15000", "--num-seeds")
DQN = (dqn.__file__, "--env-id", "CartPole-v1", "--total-steps", "50000", "--num-seeds")
RUNS = {
    "TQC, Pendulum-v1, 15,000 steps, 1 seed": (*TQC, "1"),
    "TQC, Pendulum-v1, 15,000 steps, 4 seeds": (*TQC, "4"),
    "DQN, CartPole-v1, 50,000 steps, 1 seed": (*DQN, "1"),
    "DQN, CartPole-v1, 50,000 steps, 4 seeds": (*DQN, "4"),
}


def main(out: Path = HERE) -> None:
    """Start everything and write the table.

    Args:
        out: folder to write to.
    """
    began, rows = time.perf_counter(), []
    for run, arguments in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("off", "empty", "filled"):
                more = ("--compile-cache", "off") if cache == "off" else ()
                rows.append({"run": run} | started(cache, folder, *arguments, *more))
                print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out / "start.csv", index=False)
    about = {
        "command": recording.command_line(), "cores": os.cpu_count(), "seconds": round(time.perf_counter() - began),
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
    }  # fmt: skip
    (out / "start.json").write_text(json.dumps(about, indent=2) + "\n")


def started(cache: str, folder: str, *arguments: str) -> dict:
    """One row but for its name: the run in a process of its own.

    Its user has an empty home but for what earlier starts left there.
    """
    environment = {name: value for name, value in os.environ.items() if name not in MINE}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *arguments, "--name", cache, "--runs-folder", folder]
    run = subprocess.run(
        command, env=environment | {"XDG_CACHE_HOME": folder}, capture_output=True, text=True, check=True
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    compiled = re.search(r"compiled in ([\d.]+) s(?: \((\d+) program)?", run.stdout)
    peak = re.search(r"peak\s+memory\s+([\d,.]+) MiB", run.stdout)
    programs = list((Path(folder) / "jaxrl_dist" / "compiled").glob("*-cache"))
    return {
        "cache": cache, "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "seconds": round(seconds, 1), "compile_seconds": float(compiled[1]), "programs_read": int(compiled[2] or 0),
        "peak_mib": float(peak[1].replace(",", "")), "cache_files": len(programs),
        "cache_mib": round(sum(path.stat().st_size for path in programs) / 2**20, 2),
    }  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)

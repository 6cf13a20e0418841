"""What does the compile cache save at the start of a run? Writes `start.csv` and `start.json` beside this file.

A short run is started three times in processes of their own: with the cache off, with an empty one, and with the one
that the second start left. Seconds of CPU are of all threads, and hardly depend on what else the machine does; those of
the clock do.

    python experiments/throughput/start.py            # about three minutes on 2 cores
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
from jaxrl_dist.records import recording

HERE = Path(__file__).parent
MINE = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
ARGUMENTS = ("--env-id", "Pendulum-v1", "--total-steps", "1200", "--num-seeds", "4")


def main() -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            started("off", folder, "--compile-cache", "off"), started("empty", folder), started("filled", folder),
        ]  # fmt: skip
    table = pd.DataFrame(rows)
    table.to_csv(HERE / "start.csv", index=False)
    print(table.to_string(index=False))
    about = {
        "command": recording.command_line(), "run": f"tqc.py {' '.join(ARGUMENTS)}", "cores": os.cpu_count(),
        "seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
        "versions": recording.versions(),
    }  # fmt: skip
    (HERE / "start.json").write_text(json.dumps(about, indent=2) + "\n")


def started(cache: str, folder: str, *more: str) -> dict:
    """One row: the run in a process of its own, whose user has an empty home but for what earlier starts left there."""
    environment = {name: value for name, value in os.environ.items() if name not in MINE}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, tqc.__file__, *ARGUMENTS, *more, "--name", cache, "--runs-folder", folder]
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

"""Ours, ours before, the matrix products alone, and the peers that install: the same work in one run, in turn.

Every side is a process of its own with its own Python, kept alive (`serve.py`); for each case of `workloads.py` all
compile, with the compile cache off, and then train in turn, so that what else the machine does meets all of them. Sides
called `1 core` have one thread (PJRT_NPROC=1). Writes `side_by_side.csv`, a row per case and side, and
`side_by_side.json`.

    git worktree add BEFORE 32ce9fe && make -C BEFORE setup
    python -m venv PEERS && PEERS/bin/pip install rejax==0.1.3 gymnax==0.0.9 jax==0.10.2 jaxlib==0.10.2 flashbax distrax
    python experiments/throughput/side_by_side.py --before BEFORE --peers PEERS --purejaxrl PUREJAXRL/purejaxrl

About 20 minutes on 2 cores. Ratios are medians over the turns of seconds of the side by those of ours in the same turn.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import tyro
from workloads import CASES  # beside this file

from jaxrl_dist.records import recording

HERE = Path(__file__).parent
TURN_SECONDS = 0.3


class Side:
    """A process that serves: which Python, what it serves, and with how many threads."""

    def __init__(self, python: Path, *serves: str, cores: int = 0, script: Path = HERE / "serve.py") -> None:
        environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
        environment |= {"PJRT_NPROC": str(cores)} if cores else {}
        self.process = subprocess.Popen(
            [python, script, *serves], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, **question) -> dict:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a process ended at {question}; start it by hand to see why: {self.process.args}")
        return json.loads(answer)


def commit_of(checkout: Path) -> str:
    """The commit that a checkout stands at."""
    command = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def versions_of(peers: Path) -> dict[str, str]:
    """The versions of what counts in the peers' environment."""
    script = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    names = ("rejax", "gymnax", "flashbax", "distrax", "jax", "jaxlib", "flax", "optax")
    command = [peers / "bin/python", "-c", script % (names,)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(name: str, sides: dict[str, Side], turns: int) -> list[dict]:
    """One row for each side that has this case."""
    compiled = {side: server.ask(compile=name) for side, server in sides.items()}
    there = [side for side in sides if "missing" not in compiled[side]]
    iterations = {}
    for side in there:  # warm, and as long as a turn
        count, seconds = compiled[side]["iterations"] or 1, 0.0
        while not compiled[side]["iterations"] and seconds < TURN_SECONDS / 2:
            count *= 2
            seconds = sides[side].ask(run=count)["seconds"]
        sides[side].ask(run=count)
        iterations[side] = count
    measured = {side: [] for side in there}
    for turn in range(turns):  # who begins changes, too
        for side in sorted(there, reverse=bool(turn % 2)):
            answer, updates = sides[side].ask(run=iterations[side]), iterations[side] * compiled[side]["updates"]
            measured[side].append((answer["seconds"] / updates, answer["cpu_seconds"] / updates))
    rows = []
    for side in there:
        wall, cpu = zip(*measured[side], strict=True)
        against = [
            [own[place] / ours[place] for own, ours in zip(measured[side], measured["ours"], strict=True)]
            for place in (0, 1)
        ]
        rows.append(
            {
                "case": name, "side": side, "updates_per_second": round(1 / statistics.median(wall), 1),
                "updates_per_cpu_second": round(1 / statistics.median(cpu), 1),
                "seconds_by_ours": round(statistics.median(against[0]), 3), "lowest": round(min(against[0]), 3),
                "highest": round(max(against[0]), 3), "cpu_seconds_by_ours": round(statistics.median(against[1]), 3),
                "compile_seconds": round(compiled[side]["seconds"], 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main(
    before: Path | None = None, peers: Path | None = None, purejaxrl: Path | None = None, turns: int = 9,
    only: tuple[str, ...] = (), out: Path = HERE,
) -> None:  # fmt: skip
    """Measure and write the table.

    Args:
        before: another checkout of this repository with its `.venv`; left out if not given.
        peers: an environment in which rejax and what purejaxrl needs are installed.
        purejaxrl: folder of `dqn.py` and `ppo.py` in a clone of purejaxrl.
        turns: measurements of every side.
        only: cases, all if empty.
        out: folder to write to.
    """
    began, here = time.perf_counter(), Path(sys.executable)
    sides = {"ours": Side(here, "ours"), "ours, 1 core": Side(here, "ours", cores=1)}
    sides |= {"products": Side(here, "floor"), "products, 1 core": Side(here, "floor", cores=1)}
    if before:
        sides["before"] = Side(before / ".venv/bin/python", "ours")
    if peers:
        sides["rejax"] = Side(peers / "bin/python", "rejax")
    if peers and purejaxrl:
        sides["purejaxrl"] = Side(peers / "bin/python", "purejaxrl", str(purejaxrl.resolve()))
        sides["purejaxrl, 1 core"] = Side(peers / "bin/python", "purejaxrl", str(purejaxrl.resolve()), cores=1)
    rows = []
    for name in only or CASES:
        rows += compare(name, sides, turns)
        out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out / "side_by_side.csv", index=False)
    about = {
        "command": recording.command_line(), "turns": turns, "cores": os.cpu_count(),
        "seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
        "before": commit_of(before) if before else None, "peers": versions_of(peers) if peers else None,
        "versions": recording.versions(),
    }  # fmt: skip
    (out / "side_by_side.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

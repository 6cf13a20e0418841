"""Does the cost of an update stay flat where a run grows? Replay capacity, environments, seeds, and log points.

DQN with its sizes of `workloads.py`, on one device. `growth.csv` holds, for each quantity and size,
microseconds per unit of work (an update; for environments an environment step; for log points an update, where the same
updates are cut into so many calls) and the ratio to the smallest size. All sizes of one quantity are measured in turn.

    python experiments/throughput/growth.py            # about three minutes on 2 cores
"""

import json
import statistics
import time
from pathlib import Path

import pandas as pd
import tyro
from serve import agent_of, compiled, training_of
from workloads import VALUES, Case  # beside this file

from jaxrl_dist.records import recording

HERE = Path(__file__).parent


def main(
    capacities: tuple[int, ...] = (10**4, 10**5, 10**6), environments: tuple[int, ...] = (1, 16, 128, 1024),
    seeds: tuple[int, ...] = (1, 4, 16, 64), log_points: tuple[int, ...] = (1, 10, 100), turns: int = 9,
    seconds: float = 0.3, out: Path = HERE,
) -> None:  # fmt: skip
    """Measure and write the table.

    Args:
        capacities: rows of the replay.
        environments: stepped together, with one update for each round.
        seeds: runs under one `vmap`.
        log_points: calls into which the same updates are cut.
        turns: measurements of every size.
        seconds: length of one measurement.
        out: folder to write to.
    """
    began, rows = time.perf_counter(), []
    sizes = {size: (program({"replay_capacity": size}), 1, 1) for size in capacities}
    rows += measured("replay capacity", sizes, turns, seconds)
    small = {"warmup_steps": 2_048, "replay_capacity": 4_096}
    sizes = {size: (program(small | {"num_envs": size}), size, 1) for size in environments}
    rows += measured("environments", sizes, turns, seconds)
    rows += measured("seeds", {size: (program({}, size), size, 1) for size in seeds}, turns, seconds)
    cut = program({})
    rows += measured("log points", {size: (cut, 1, size) for size in log_points}, turns, seconds)
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out / "growth.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - began),
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
    }  # fmt: skip
    (out / "growth.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def program(settings: dict, runs: int = 1):
    """`run(iterations)` of DQN with other settings."""
    agent = agent_of(Case("dqn", "CartPole-v1", VALUES | settings))
    return compiled(*training_of(agent), runs, fixed=False)


def measured(what: str, sizes: dict, turns: int, seconds: float) -> list[dict]:
    """A row per size; each is `run`, units of work in an iteration, and the calls into which iterations are cut."""
    iterations = {}
    for size, (run, _, cuts) in sizes.items():
        count, took = cuts, 0.0
        while took < seconds / 2:
            count *= 2
            started = time.perf_counter()
            run(count)
            took = time.perf_counter() - started
        iterations[size] = count
    if what == "log points":  # the same work for all
        iterations = dict.fromkeys(iterations, max(iterations.values()))
    samples = {size: [] for size in sizes}
    for _ in range(turns):
        for size, (run, units, cuts) in sizes.items():
            started = time.perf_counter()
            for _ in range(cuts):
                run(iterations[size] // cuts)
            samples[size].append((time.perf_counter() - started) * 1e6 / units / (iterations[size] // cuts * cuts))
    first = next(iter(sizes))
    rows = [
        {
            "quantity": what, "size": size, "microseconds": round(statistics.median(found), 2),
            "by_smallest": round(statistics.median(a / b for a, b in zip(found, samples[first], strict=True)), 2),
        }
        for size, found in samples.items()
    ]  # fmt: skip
    print(pd.DataFrame(rows).to_string(index=False), flush=True)
    return rows


if __name__ == "__main__":
    tyro.cli(main)

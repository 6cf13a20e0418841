"""What does one accelerator do? Environment steps and updates per second of the main agents at 1, 16 and 256 seeds.

Each agent trains with its preset (value-based ones and PPO on CartPole-v1, SAC and TQC on Pendulum-v1, replays of
10,000 rows), all seeds under one `vmap`; then PPO on brax's hopper with MJX physics and many environments, and
purejaxrl's DQN where it is given. `accelerator.csv` holds a row per agent and number of seeds as soon as it is
measured: compile seconds, environment steps and updates per second over all seeds, and the peak of the device's memory.

    python experiments/throughput/accelerator.py            # under ten minutes on one GPU

After `--minutes` nothing new is begun; what was left out is printed, and stands in `accelerator.json`.
"""

import json
import time
from pathlib import Path

import jax
import pandas as pd
import tyro
from serve import compiled, steps_of, training_of
from serve import purejaxrl as purejaxrl_of
from workloads import CASES  # beside this file

from jaxrl_dist.records import recording
from jaxrl_dist.running import problem
from jaxrl_dist.running.catalog import find_algorithm

HERE = Path(__file__).parent
AGENTS = {
    "ppo": "CartPole-v1", "dqn": "CartPole-v1", "c51": "CartPole-v1", "iqn": "CartPole-v1", "sac": "Pendulum-v1",
    "tqc": "Pendulum-v1",
}  # fmt: skip


def main(
    runs: tuple[int, ...] = (1, 16, 256), agents: tuple[str, ...] = tuple(AGENTS), mjx_envs: int = 2_048,
    seconds: float = 3.0, minutes: float = 9.0, purejaxrl: Path | None = None, out: Path = HERE,
) -> None:  # fmt: skip
    """Measure and write the table.

    Args:
        runs: numbers of seeds.
        agents: which agents, of those in AGENTS.
        mjx_envs: environments of PPO on MJX's hopper; 0 leaves it out.
        seconds: length of one measurement.
        minutes: after so long, nothing new is begun.
        purejaxrl: folder of `dqn.py` in a clone of purejaxrl, where what it needs is installed.
        out: folder to write to.
    """
    began, rows, left_out = time.perf_counter(), [], []
    work = [(name, AGENTS[name], count, {}, {}) for count in runs for name in agents]
    if mjx_envs:
        many = {"num_envs": mjx_envs, "num_steps": 16}
        work.append(("ppo", "brax/hopper", 1, {"backend": "mjx"}, many))
    work += [("purejaxrl", "CartPole-v1", count, {}, {}) for count in runs if purejaxrl]
    out.mkdir(parents=True, exist_ok=True)
    for name, env_id, count, options, settings in work:
        if time.perf_counter() - began > 60 * minutes:
            left_out.append(f"{name} on {env_id}, {count} seeds")
            continue
        made = _peer(purejaxrl, count) if name == "purejaxrl" else _agent(name, env_id, options, settings)
        rows.append({"agent": name, "environment": env_id, "seeds": count, **measured(*made, count, seconds)})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(out / "accelerator.csv", index=False)
    if left_out:
        print(f"left out after {minutes} minutes: {'; '.join(left_out)}")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - began), "left_out": left_out,
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
    }  # fmt: skip
    (out / "accelerator.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def _agent(name: str, env_id: str, options: dict, settings: dict):
    """`begin`, `many`, environment steps and updates per iteration, and whether every call does the same."""
    from jaxrl_dist import envs

    module = find_algorithm(name)
    settings = problem.split_preset(module.PRESETS.get(env_id, {}))[1] | settings
    fields = vars(module.Config())
    settings |= {"replay_capacity": 10_000} if "replay_capacity" in fields else {}
    agent = module.make_agent(module.Config(**settings), *envs.make(env_id, **options))

    return *training_of(agent), agent.clock.env_steps, agent.clock.updates, False


def _peer(path: Path, count: int):
    case = CASES["DQN 120-84"]._replace(runs=count)
    return *purejaxrl_of(case, str(path)), steps_of(case), steps_of(case) - case.settings["batch_size"], True


def measured(begin, many, env_steps: int, updates: int, fixed: bool, count: int, seconds: float) -> dict:
    """Compile seconds, speed over all seeds, and memory."""
    started = time.perf_counter()
    run = compiled(begin, many, count, fixed)
    compile_seconds = time.perf_counter() - started
    run(1)
    iterations, took = 1, 0.0
    while not fixed and took < seconds / 4:
        iterations *= 2
        started = time.perf_counter()
        run(iterations)
        took = time.perf_counter() - started
    turns = []
    for _ in range(3):
        started = time.perf_counter()
        run(iterations)
        turns.append((time.perf_counter() - started) / iterations)
    per_iteration = sorted(turns)[1]
    statistics = jax.devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return {
        "compile_seconds": round(compile_seconds, 1),
        "env_steps_per_second": round(env_steps * count / per_iteration),
        "updates_per_second": round(updates * count / per_iteration),
        # Of the process so far, so only the largest of the rows above is this row's own; CPUs do not count it.
        "peak_memory_mib": round(peak / 2**20) if peak else None,
    }


if __name__ == "__main__":
    tyro.cli(main)

"""Is this house slower than an earlier one? Updates per second and compile seconds of all agents in two checkouts.

Each checkout has a Python of its own (`make setup` in it), and both stay alive: for every agent both compile, with the
compile cache off, and then run in turn, so that what else the machine does meets both. Writes `against.csv`, with the
medians of the turns, and `against.json` beside this file.

    git worktree add /tmp/before e92b7f6 && make -C /tmp/before setup
    python experiments/throughput/against.py --before /tmp/before          # about 15 minutes on 2 cores
"""

import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = {
    "actor_critic": ("sac", "tqc", "td3", "ddpg", "d4pg", "dsac", "dsac_t", "stac"),
    "value_based": ("dqn", "c51", "qr_dqn", "iqn", "fqf", "mmd_dqn", "rainbow", "os_c51", "eta_dqn"),
}
TURN_SECONDS = 1.0


# -- in the process of a checkout, which may be of another year --------------------------------------------------------


def serve() -> None:
    """Answer lines of JSON: {"compile": name} with seconds, {"run": iterations} with seconds."""
    import jax
    import jax.numpy as jnp

    envs = importlib.import_module("jaxrl_dist.envs")
    run = state = None
    for line in sys.stdin:
        asked = json.loads(line)
        if name := asked.get("compile"):
            agent, updates = agent_of(name, envs)
            state = jax.block_until_ready(jax.jit(agent.init)(jax.random.key(0)))

            def many(state, iterations, agent=agent):
                return jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], state)

            began, cpu = time.perf_counter(), time.process_time()
            run = jax.jit(many, donate_argnums=0).lower(state, jnp.int32(1)).compile()
            answer = {
                "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "updates": updates,
            }  # fmt: skip
        else:
            began, cpu = time.perf_counter(), time.process_time()
            state = jax.block_until_ready(run(state, jnp.int32(asked["run"])))
            answer = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(answer), flush=True)


def agent_of(name: str, envs) -> tuple:
    """The agent on the environment of its first preset, with the preset's settings, and its updates per step."""
    import dataclasses

    family = next(family for family, names in FAMILIES.items() if name in names)
    module = importlib.import_module(f"jaxrl_dist.algorithms.{family}.{name}")
    env_id, preset = next(iter(module.PRESETS.items()))
    fields = {field.name for field in dataclasses.fields(module.Config)}
    config = dataclasses.replace(
        module.Config(), **{field: value for field, value in preset.items() if field in fields}, replay_capacity=20_000
    )
    options = dict(pair.split("=") for pair in preset.get("env_options", ()))
    env, params = envs.make(env_id, **options)
    return module.make_agent(config, env, params), config.updates_per_iteration


# -- in the process that compares --------------------------------------------------------------------------------------


def compare(name: str, sides: dict, turns: int) -> dict:
    """One row: seconds of compiling, updates per second and the median over the turns of their ratio."""
    compiled = {side: checkout.ask(compile=name) for side, checkout in sides.items()}
    iterations, ran = 1, 0.0
    while ran < TURN_SECONDS / 2:  # warm, and long enough to measure
        ran = max(checkout.ask(run=iterations)["seconds"] for checkout in sides.values())
        iterations *= 2
    seconds = {side: [] for side in sides}
    for turn in range(turns):  # who begins changes, too
        for side in sorted(sides, reverse=bool(turn % 2)):
            seconds[side].append(sides[side].ask(run=iterations)["cpu_seconds"])
    rate = {
        side: iterations * compiled[side]["updates"] / statistics.median(values) for side, values in seconds.items()
    }
    ratios = [before / after for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    return {
        "algorithm": name,
        **{f"updates_per_cpu_second_{side}": round(value, 1) for side, value in rate.items()},
        "speed_after_over_before": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3), "highest": round(max(ratios), 3),
        **{f"compile_cpu_seconds_{side}": round(answer["cpu_seconds"], 2) for side, answer in compiled.items()},
    }  # fmt: skip


def main(before: Path, after: Path = HERE.parents[1], turns: int = 7, only: tuple[str, ...] = ()) -> None:
    """Compare two checkouts.

    Args:
        before: a folder with another checkout and its `.venv`
        after: the same, by default this one
        turns: runs of every agent in each checkout
        only: agents, all if empty
    """
    # Here, since the process of an earlier checkout cannot import them.
    import pandas as pd
    from side_by_side import Side, commit_of  # beside this file

    from jaxrl_dist.records import recording

    began = time.perf_counter()
    folders = {"after": after, "before": before}
    sides = {
        side: Side(folder / ".venv/bin/python", "--serve", script=Path(__file__)) for side, folder in folders.items()
    }
    rows = []
    for name in only or [name for names in FAMILIES.values() for name in names]:
        rows.append(compare(name, sides, turns))
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(HERE / "against.csv", index=False)
    about = {
        "command": "python experiments/throughput/against.py --before BEFORE", "turns": turns,
        **{side: commit_of(folder) for side, folder in folders.items()},
        "cores": os.cpu_count(), "seconds": round(time.perf_counter() - began), "date": time.strftime("%Y-%m-%d"),
        "versions": recording.versions(),
    }  # fmt: skip
    (HERE / "against.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        import tyro

        tyro.cli(main)

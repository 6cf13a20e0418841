"""Does what PPO learns in MJX hold in MuJoCo? Trained in the compiled tasks, played in Gymnasium's own.

PPO with its presets for `mujoco/...`, several seeds; the curves are evaluations in MJX. The last policies then play as
many episodes in each: the last evaluation in MJX, and Gymnasium's environment with the exported policies (numpy).
Writes `evaluations_TASK.csv`, `curve_TASK.png`, `policies.csv` (a row per task and seed, one more for all) and
`policies_TASK.json`.

    python experiments/mujoco_physics/policies.py            # Hopper: an hour and a half on one core
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.running import gymnasium_evaluation, problem, session

HERE = Path(__file__).parent


def main(
    tasks: tuple[str, ...] = ("InvertedPendulum-v5", "Hopper-v5"), num_seeds: int = 5, episodes: int = 50,
    total_steps: int = 0, out: Path = HERE,
) -> None:  # fmt: skip
    """Train, play and write; a task's rows take the place of those that are there.

    Args:
        tasks: names of Gymnasium's tasks.
        num_seeds: policies of each.
        episodes: of each policy, in each of the two.
        total_steps: 0: as the preset says.
        out: folder to write to.
    """
    cli.spread_over_cores()
    out.mkdir(parents=True, exist_ok=True)
    ppo = cli.find_algorithm("ppo")
    for task in tasks:
        began = time.perf_counter()
        of_the_run, preset = problem.split_preset(ppo.PRESETS[f"mujoco/{task}"])
        if total_steps:
            of_the_run, preset = {"total_steps": total_steps}, preset | {"annealing_steps": total_steps}
        options = problem.RunOptions(
            env_id=f"mujoco/{task}", num_seeds=num_seeds, eval_episodes=episodes,
            name=f"policies-{time.strftime('%Y-%m-%d_%H-%M-%S')}", **of_the_run,
        )  # fmt: skip
        folder = session.train(problem.prepare("ppo", ppo.make_agent, ppo.Config(**preset), options))
        recording.read_evaluations(folder).to_csv(out / f"evaluations_{task}.csv", index=False)
        shutil.copy(folder / "learning_curve.png", out / f"curve_{task}.png")
        write(out, task, rows_of(task, gymnasium_evaluation.evaluate_run(folder, episodes=episodes, seed=0)))
        about = recording.read_config(folder) | {
            "command": recording.command_line(), "seconds": round(time.perf_counter() - began),
            "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        (out / f"policies_{task}.json").write_text(json.dumps(about, indent=2) + "\n")


def rows_of(task: str, found: gymnasium_evaluation.Comparison) -> list[dict]:
    """Mean returns of each policy in the two, and the difference of all with its interval."""
    means = [(np.mean(theirs), np.mean(ours)) for theirs, ours in zip(found.gymnasium, found.recorded, strict=True)]
    rows = [
        {"task": task, "seed": str(seed), "mujoco": theirs, "mjx": ours, "difference": theirs - ours}
        for seed, (theirs, ours) in zip(found.seeds, means, strict=True)
    ]
    gap = gymnasium_evaluation.difference_of_means(found.gymnasium, found.recorded)
    together = dict(zip(("mujoco", "mjx"), np.mean(means, 0), strict=True))
    rows.append(
        {"task": task, "seed": "all"} | together
        | {"difference": gap.mean, "interval_low": gap.low, "interval_high": gap.high}
    )  # fmt: skip
    return rows


def write(out: Path, task: str, rows: list[dict]) -> None:
    """Put a task's rows into the table."""
    table, path = pd.DataFrame(rows).round(1), out / "policies.csv"
    print(table.to_string(index=False), flush=True)
    if path.exists():
        old = pd.read_csv(path, dtype={"seed": str})
        table = pd.concat([old[old.task != task], table])
    table.to_csv(path, index=False)


if __name__ == "__main__":
    tyro.cli(main)

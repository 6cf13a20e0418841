"""What can be learned from logged data alone? BC, %BC and IQL on Pendulum-v1 data of three kinds.

The data is written by `jaxrl-dist collect`: of SAC after 15,000 steps (`expert`), of a scripted controller that is
replaced by a random action in six of ten steps (`medium`), and of the same one that begins with nothing but random
actions (`medium-replay`); 100 episodes each. `results.csv` has a row per data, algorithm and seed, `summary.csv` the
interquartile means with 95 % intervals beside the mean return of the data, `run.json` the commands.

    python experiments/offline/run.py
"""

import json
import shutil
import time
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.records import recording, statistics
from jaxrl_dist.running import collecting, problem, session

HERE = Path(__file__).parent
ENVIRONMENT = "Pendulum-v1"
CONTROLLER = "jaxrl_dist.envs.controllers:pendulum"
# Of the scripted controller: how often a random action is taken instead, in the first and in the last episode.
BEHAVIOURS = {"medium": (0.6, 0.6), "medium-replay": (1.0, 0.6)}
LEARNERS = {"BC": ("bc", {}), "10 %BC": ("bc", {"best_percent": 10}), "IQL": ("iql", {})}


def main(num_seeds: int = 6, episodes: int = 100, eval_episodes: int = 20, out: Path = HERE) -> None:
    """Collect the data, train everything on it, and write the tables.

    Args:
        num_seeds: seeds per algorithm, trained together.
        episodes: episodes of data.
        eval_episodes: episodes per evaluation and seed.
        out: folder to write to.
    """
    cli.spread_over_cores()
    started, stamp = time.perf_counter(), time.strftime("%Y-%m-%d_%H-%M-%S")
    work = Path("runs") / f"offline-{stamp}"
    work.mkdir(parents=True)
    expert = trained("sac", {}, {"total_steps": 15_000, "num_seeds": 1}, work)
    sources = {"expert": (collecting.of_run(expert, cli.find_algorithm, run_seed=None, explore=False), (0.0, 0.0))}
    sources |= {
        name: (collecting.of_controller(CONTROLLER, ENVIRONMENT), shares) for name, shares in BEHAVIOURS.items()
    }
    rows, data = [], {}
    for name, (source, shares) in sources.items():
        path = work / f"{name}.npz"
        behaviour = collecting.Behaviour(random=shares, noise=0.05 if any(shares) else 0.0)
        collecting.write(source, path, behaviour, Console(), episodes=episodes, seed=0)
        data[name] = collecting.datasets.about(path)
        for label, (algorithm, settings) in LEARNERS.items():
            options = {"dataset": str(path), "num_seeds": num_seeds, "eval_episodes": eval_episodes}
            folder = trained(algorithm, settings, options, work)
            last = recording.read_evaluations(folder)
            last = last[last.updates == last.updates.max()]
            for seed, returns in last.groupby("seed").episode_return:
                rows.append({
                    "data": name, "algorithm": label, "seed": seed, "updates": int(last.updates.iloc[0]),
                    "mean_return": round(float(returns.mean()), 1),
                })  # fmt: skip
    results = pd.DataFrame(rows)
    results.to_csv(out / "results.csv", index=False)
    summary = []
    for (name, label), group in results.groupby(["data", "algorithm"], sort=False):
        low, high = statistics.bootstrap_interval(group.mean_return.to_numpy())
        summary.append({
            "data": name, "mean_return_of_data": round(data[name]["mean_return"], 1), "algorithm": label,
            "updates": group.updates.iloc[0], "seeds": len(group),
            "iqm": round(statistics.interquartile_mean(group.mean_return.to_numpy()), 1),
            "interval_low": round(low, 1), "interval_high": round(high, 1),
        })  # fmt: skip
    pd.DataFrame(summary).to_csv(out / "summary.csv", index=False)
    print(pd.DataFrame(summary).to_string(index=False))
    data["expert"].pop("source")  # where that run lay says nothing to others
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(), "data": data,
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    shutil.rmtree(work)


def trained(algorithm: str, settings: dict, options: dict, work: Path) -> Path:
    """Train as a user would, with the preset; the run's folder."""
    module = cli.find_algorithm(algorithm)
    of_the_run, of_the_algorithm = problem.split_preset(module.PRESETS[ENVIRONMENT])
    options = problem.RunOptions(**{"env_id": ENVIRONMENT, "runs_folder": str(work), "eval_states": 0}
                                 | of_the_run | options)  # fmt: skip
    config = module.Config(**of_the_algorithm | settings)
    return session.train(problem.prepare(algorithm, module.make_agent, config, options))


if __name__ == "__main__":
    tyro.cli(main)

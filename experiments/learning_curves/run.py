"""Do the algorithms learn? Evaluation returns against environment steps, several seeds, with intervals.

Each (algorithm, environment) pair is trained as a user would train it, by the same runner as the command line, with
the settings below. What is committed per pair is `ENVIRONMENT/ALGORITHM.csv`, the tidy evaluation record (a row per
evaluation episode and seed), `ENVIRONMENT/metrics/ALGORITHM.csv`, its metrics, and `ENVIRONMENT/ALGORITHM.json` with
the command, the configuration, versions and date; per environment `summary.csv` and `figure.png`.

    python experiments/learning_curves/run.py --environment Pendulum-v1
    python experiments/learning_curves/run.py --environment CartPole-v1
"""

import json
import shutil
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.records import plotting, recording, statistics
from jaxrl_dist.running import problem, session

HERE = Path(__file__).parent

# Pendulum takes each algorithm's own preset. Hopper's widths, learning rates and update-to-data ratio (1/4) are what
# 2 cores reach, the same for both algorithms; TQC's number of critics, quantiles and dropped atoms are the paper's.
# The double pendulum takes the same networks with half the environments, so a ratio of 1/2.
HOPPER = {
    "num_envs": 8, "updates_per_iteration": 2, "warmup_steps": 4_000, "critic_hidden": (128, 128),
    "actor_hidden": (128, 128), "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
}  # fmt: skip
DOUBLE_PENDULUM = HOPPER | {"num_envs": 4, "warmup_steps": 2_000, "batch_size": 128}
DETERMINISTIC = {name: value for name, value in DOUBLE_PENDULUM.items() if name != "temperature_learning_rate"}
# The two with a delayed actor move it once per round of two updates, DSAC-T with the settings that small networks need.
DELAYED = DOUBLE_PENDULUM | {"steps_per_iteration": 1, "activation": "relu", "polyak": 0.005}
BALANCING = {
    "sac": DOUBLE_PENDULUM, "tqc": DOUBLE_PENDULUM, "stac": DOUBLE_PENDULUM, "dsac": DELAYED, "dsac_t": DELAYED,
    "td3": DETERMINISTIC | {"steps_per_iteration": 1}, "ddpg": DETERMINISTIC,
    # Rewards are at most 10 a step. With the others' step size its actor saturates.
    "d4pg": DETERMINISTIC | {"actor_learning_rate": 3e-4, "v_min": 0.0, "v_max": 1_000.0},
}  # fmt: skip
# The value-based family takes its presets, which differ in nothing but the representation of the return.
VALUE_BASED = {name: {} for name in ("dqn", "c51", "qr_dqn", "iqn", "fqf", "mmd_dqn", "rainbow", "os_c51")}
ACTOR_CRITIC = {name: {} for name in ("tqc", "sac", "td3", "ddpg", "d4pg", "dsac", "dsac_t", "stac")}
# After a hyphen stands what differs from an algorithm's own preset. In units of large returns the slope of the quantile
# loss does not fall near its minimum: values jitter, and where they differ little, advantages are that jitter.
QUANTILE = {"critic": "quantile", "normalize_rewards": True}
ON_POLICY = {"ppo": {}, "ppo-quantile": QUANTILE, "a2c": {}, "pqn": {}, "pg_rainbow": {}}
# A third of the steps that PPO's presets are for.
MINATAR = {
    "total_steps": 3_000_000,
    "algorithms": {
        "ppo": {"annealing_steps": 3_000_000}, "ppo-quantile": {"annealing_steps": 3_000_000, **QUANTILE},
        "pqn": {"exploration_steps": 300_000, "annealing_steps": 3_000_000},
    },
}  # fmt: skip
# Sizes for a CPU: rollouts of 4,096 steps in 64 minibatches of 256 (4 epochs); brax's own discounts and bonuses.
RUNNERS = {
    "num_envs": 64, "num_steps": 64, "num_epochs": 4, "num_minibatches": 16, "hidden": (64, 64),
    "learning_rate": 3e-4, "annealing_steps": 5_000_000,
}  # fmt: skip
SETTINGS = {
    "Pendulum-v1": {"total_steps": 15_000, "algorithms": ACTOR_CRITIC},
    "CartPole-v1": {"total_steps": 500_000, "algorithms": VALUE_BASED},
    "Acrobot-v1": {"total_steps": 250_000, "algorithms": VALUE_BASED},
    "Catch-bsuite": {"total_steps": 20_000, "algorithms": VALUE_BASED},
    "Breakout-MinAtar": {"total_steps": 200_000, "algorithms": {name: {} for name in ("dqn", "c51", "qr_dqn", "iqn")}},
    "brax/hopper": {"total_steps": 100_000, "algorithms": {"sac": HOPPER, "tqc": HOPPER}},
    "brax/inverted_double_pendulum": {
        "total_steps": 30_000,
        "algorithms": BALANCING,
    },
    # On-policy agents take other numbers of steps: no curves beside the others'.
    "on-policy/CartPole-v1": {"total_steps": 500_000, "algorithms": ON_POLICY},
    "on-policy/Acrobot-v1": {"total_steps": 500_000, "algorithms": ON_POLICY},
    "on-policy/Catch-bsuite": {"total_steps": 50_000, "algorithms": {"ppo": {}, "ppo-quantile": QUANTILE, "pqn": {}}},
    "on-policy/Pendulum-v1": {"total_steps": 300_000, "algorithms": {"ppo": {}, "ppo-quantile": QUANTILE}},
    "on-policy/MemoryChain-bsuite": {
        "total_steps": 100_000,
        "algorithms": {"ppo": {"num_envs": 8, "learning_rate": 1e-3}, "ppo_memory": {}},
    },
    "on-policy/velocity_free/CartPole-v1": {
        "total_steps": 300_000,
        "algorithms": {"ppo": {"num_envs": 8, "learning_rate": 1e-3}, "ppo_memory": {}},
    },
    "on-policy/brax/hopper": {"total_steps": 5_000_000, "algorithms": {"ppo": RUNNERS}},
    "on-policy/brax/halfcheetah": {"total_steps": 5_000_000, "algorithms": {"ppo": RUNNERS}},
    "on-policy/brax/ant": {"total_steps": 5_000_000, "algorithms": {"ppo": RUNNERS}},
    "on-policy/Breakout-MinAtar": MINATAR,
    "on-policy/Asterix-MinAtar": MINATAR,
    "on-policy/SpaceInvaders-MinAtar": MINATAR,
    "on-policy/Freeway-MinAtar": MINATAR,
}


def main(
    environment: Literal[tuple(SETTINGS)],
    algorithms: tuple[str, ...] = (), num_seeds: int = 6,
    eval_episodes: int = 20, out: Path = HERE,
) -> None:  # fmt: skip
    """Train all pairs of one environment and write the tables and the figure.

    Args:
        environment: which environment.
        algorithms: which algorithms; all of them if empty.
        num_seeds: seeds per algorithm, trained together.
        eval_episodes: episodes per evaluation and seed.
        out: folder to write to.
    """
    cli.spread_over_cores()
    settings, env_id = SETTINGS[environment], environment.removeprefix("on-policy/")
    folder = out / environment.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    for algorithm in algorithms or settings["algorithms"]:
        name = algorithm.partition("-")[0]
        module = cli.find_algorithm(name)
        preset = problem.split_preset(module.PRESETS.get(env_id, {}))[1]
        overrides = {**preset, **settings["algorithms"][algorithm]}
        options = problem.RunOptions(
            env_id=env_id, total_steps=settings["total_steps"], num_seeds=num_seeds, eval_episodes=eval_episodes,
            name=f"learning_curves-{time.strftime('%Y-%m-%d_%H-%M-%S')}",
        )  # fmt: skip
        started = time.perf_counter()
        prepared = problem.prepare(name, module.make_agent, module.Config(**overrides), options)
        run_folder = session.train(prepared)
        about = recording.read_config(run_folder)
        about["command"] = recording.command_line()
        about["wall_seconds"] = round(time.perf_counter() - started)
        recording.read_evaluations(run_folder).to_csv(folder / f"{algorithm}.csv", index=False)
        (folder / "metrics").mkdir(exist_ok=True)
        recording.read_metrics(run_folder).to_csv(folder / "metrics" / f"{algorithm}.csv", index=False)
        (folder / f"{algorithm}.json").write_text(json.dumps(about, indent=2) + "\n")
        if (drawn := run_folder / "return_distribution.png").exists():  # not where an agent claims nothing
            shutil.copy(drawn, folder / f"{algorithm}_return_distribution.png")
    summarise(environment, folder)


def summarise(environment: str, folder: Path) -> None:
    """The figure and the table of final returns, from whatever pairs are there."""
    frames, rows = {}, []
    for path in sorted(folder.glob("*.csv")):
        if path.stem == "summary":
            continue
        episodes = pd.read_csv(path)
        means = episodes.groupby(["env_steps", "seed"], as_index=False)["episode_return"].mean()
        name, _, variant = path.stem.partition("-")
        label = cli.display_name(name) + (f", {variant}" if variant else "")
        frames[label] = means.rename(columns={"episode_return": "evaluation_return"})
        last = episodes[episodes.env_steps == episodes.env_steps.max()]
        final = last.groupby("seed").episode_return.mean().to_numpy()
        low, high = statistics.bootstrap_interval(final)
        row = {
            "algorithm": path.stem, "environment": environment, "env_steps": int(last.env_steps.iloc[0]),
            "seeds": len(final), "iqm": statistics.interquartile_mean(final), "interval_low": low,
            "interval_high": high, "lowest_seed": final.min(), "highest_seed": final.max(),
            "cvar_10_of_episodes": statistics.conditional_value_at_risk(last.episode_return.to_numpy(), 0.1),
        }  # fmt: skip
        rows.append({k: round(float(v), 1) if isinstance(v, float | np.floating) else v for k, v in row.items()})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "summary.csv", index=False)
    print(table.to_string(index=False))
    seeds = "/".join(str(n) for n in sorted({row["seeds"] for row in rows}))
    title = f"{environment}, {seeds} seeds"
    plotting.learning_curve(frames, folder / "figure.png", title=title)


if __name__ == "__main__":
    tyro.cli(main)

"""Does the mean of a learned return distribution learn better than DQN's value, and how well is it calibrated?

Reads what `experiments/learning_curves` recorded: on each environment all agents of the value-based family had the same
environment steps, updates, batches, networks up to the last layer, step sizes and exploration. For every agent and
environment `results.csv` holds, over seeds with 95 % bootstrap intervals,

- the final evaluation return, and the mean over all evaluations (the area under the curve: how fast it learns), each
  with its difference to DQN's;
- over the last five evaluations, the Wasserstein-1 distance between the learned return distribution and Monte-Carlo
  returns of the same policy from the same states (`calibration_w1`), the error of its mean (`overestimation`), and the
  same distance for DQN's value taken as a certain return.

    python experiments/distributional_mean/run.py            # seconds; no training
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from jaxrl_dist.records import plotting, statistics
from jaxrl_dist.running import catalog

HERE = Path(__file__).parent
CURVES = HERE.parent / "learning_curves"
ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1", "Catch-bsuite", "Breakout-MinAtar")
LAST = 5


def main(out: Path = HERE) -> None:
    """Write the table and one figure of calibration per environment.

    Args:
        out: folder to write to.
    """
    rows = []
    for environment in ENVIRONMENTS:
        frames = {path.stem: pd.read_csv(path) for path in sorted((CURVES / environment / "metrics").glob("*.csv"))}
        if "dqn" not in frames:
            print(f"{environment}: no curve of DQN yet, left out")
            continue
        by_seed = {name: per_seed(frame) for name, frame in frames.items()}
        for name, seeds in by_seed.items():
            row = {"environment": environment, "algorithm": name, "seeds": len(seeds)}
            for metric in ("final_return", "mean_return"):
                row |= described(metric, seeds[metric].to_numpy())
                low, high = difference(seeds[metric].to_numpy(), by_seed["dqn"][metric].to_numpy())
                row |= {f"{metric}_less_dqn_low": low, f"{metric}_less_dqn_high": high}
            for metric in ("calibration_w1", "overestimation"):
                row |= described(metric, seeds[metric].to_numpy())
            rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
        plotting.learning_curve(
            {catalog.display_name(name): frame for name, frame in frames.items()}, out / f"{environment}.png",
            title=f"{environment}: distance to the Monte-Carlo law", metric="calibration_w1",
        )  # fmt: skip
    table = pd.DataFrame(rows)
    table.insert(0, "date", time.strftime("%Y-%m-%d"))
    table.to_csv(out / "results.csv", index=False)
    print(table.to_string(index=False))


def per_seed(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per seed with the four numbers that are compared; the evaluation before training is left out."""
    trained = metrics[metrics.iteration > 0]
    last = trained.groupby("seed").tail(LAST).groupby("seed")
    final = trained.sort_values("env_steps").groupby("seed").evaluation_return.last()
    return pd.DataFrame(
        {
            "final_return": final, "mean_return": trained.groupby("seed").evaluation_return.mean(),
            "calibration_w1": last.calibration_w1.mean(), "overestimation": last.overestimation.mean(),
        }
    )  # fmt: skip


def described(name: str, values: np.ndarray) -> dict[str, float]:
    """Interquartile mean over seeds with its interval."""
    low, high = statistics.bootstrap_interval(values)
    return {name: statistics.interquartile_mean(values), f"{name}_low": low, f"{name}_high": high}


def difference(values: np.ndarray, of_dqn: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the difference of two interquartile means over independent seeds."""
    generator = np.random.default_rng(0)

    def draws(x: np.ndarray) -> np.ndarray:
        return statistics.interquartile_mean(generator.choice(x, (resamples, len(x))), axis=1)

    low, high = np.quantile(draws(values) - draws(of_dqn), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    tyro.cli(main)

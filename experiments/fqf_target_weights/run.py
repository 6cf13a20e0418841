"""What do FQF's learned fractions do to the value, if the loss counts the target's atoms equally?

One state, no choice, reward -Exp(1) for ever: the return is worth -1 / (1 - gamma). The law is a staircase of N atoms,
theta_i at the middles of steps with masses q_i. FQF's loss is least where theta_i is the quantile of the target's law
at the i-th middle; the target's law is that of r + gamma theta_j with probability q_j, or 1/N if the loss counts its
atoms equally, as the paper's does. Either the steps are even and stay so, or they are where the proposal's gradient
vanishes (FQF, proposition 1): each edge at the probability of what lies half-way between the two atoms beside it.
Both conditions are iterated to the fixed point, with exact probabilities (no samples, no network).

    python experiments/fqf_target_weights/run.py
"""

import datetime
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tyro

from jaxrl_dist.records.recording import command_line, versions

CASES = [("even", "mass"), ("learned", "equal"), ("learned", "mass")]  # of even steps both weights are the same


def probability_below(values: np.ndarray, atoms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """P(r + Y <= value) for r = -Exp(1) and Y an atom with its weight: values `[m]`, atoms and weights `[N]`."""
    return np.exp(-np.maximum(atoms - values[:, None], 0)) @ weights


def quantiles(fractions: np.ndarray, atoms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Quantiles of that law at fractions `[m]` in (0, 1), by bisection."""
    low, high = np.full(len(fractions), atoms.min() - 40), np.full(len(fractions), atoms.max())
    for _ in range(45):
        middle = (low + high) / 2
        below = probability_below(middle, atoms, weights) < fractions
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def fixed_point(
    steps: Literal["even", "learned"], weights: Literal["mass", "equal"], num_fractions: int, discount: float
) -> tuple[np.ndarray, np.ndarray]:
    """Atoms and masses `[num_fractions]` at which neither loss pulls any more, to about 1e-4 of a reward."""
    masses = np.full(num_fractions, 1 / num_fractions)
    atoms = np.linspace(-1.1, -0.9, num_fractions) / (1 - discount)
    for _ in range(20_000):
        of_targets = masses if weights == "mass" else np.full(num_fractions, 1 / num_fractions)
        moved = quantiles(np.cumsum(masses) - masses / 2, discount * atoms, of_targets)
        best = masses
        if steps == "learned":
            edges = probability_below((moved[1:] + moved[:-1]) / 2, discount * atoms, of_targets)
            best = np.diff(np.concatenate([[0], edges, [1]]))
        change = max(np.abs(moved - atoms).max(), np.abs(best - masses).max())
        atoms, masses = moved, (masses + best) / 2
        if change < 1e-6:
            return atoms, masses
    raise ValueError(f"{steps} steps, {weights} weights: not settled, still moving by {change:g}")


def main(out: Path = Path(__file__).parent) -> None:
    """Write results.csv and run.json.

    Args:
        out: folder to write to.
    """
    rows = []
    for discount, num_fractions in ((0.9, 8), (0.99, 8), (0.99, 32)):
        for steps, weights in CASES:
            atoms, masses = fixed_point(steps, weights, num_fractions, discount)
            rows.append(
                {
                    "discount": discount, "num_fractions": num_fractions, "steps": steps,
                    "target_weights": weights if steps == "learned" else "both", "exact_value": -1 / (1 - discount),
                    "value": masses @ atoms, "plain_mean": atoms.mean(), "lowest_atom": atoms.min(),
                    "highest_atom": atoms.max(), "smallest_mass": masses.min(), "largest_mass": masses.max(),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows).round(3)
    print(table.to_string(index=False))
    table.to_csv(out / "results.csv", index=False)
    about = {"command": command_line(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    (out / "run.json").write_text(json.dumps(about | {"versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

"""Trained policies as small `.npz` files that load with numpy alone (this module imports nothing else at run time)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def mlp_policy(layers: Mapping[str, Any], action_size: int, normalizer=None) -> dict[str, Any]:
    """Arrays of the policy tanh(mlp(normalised observation)[:action_size]) from an `EnsembleMLP` of one member.

    `normalizer` is a `normalization.RunningStatistics` or None.
    """
    depth = len(layers) // 2
    arrays = {f"kernel_{i}": layers[f"kernel_{i}"][0] for i in range(depth)}
    arrays |= {f"bias_{i}": layers[f"bias_{i}"][0] for i in range(depth)}
    arrays[f"kernel_{depth - 1}"] = arrays[f"kernel_{depth - 1}"][:, :action_size]
    arrays[f"bias_{depth - 1}"] = arrays[f"bias_{depth - 1}"][:action_size]
    if normalizer is not None:
        arrays |= {"observation_mean": normalizer.mean, "observation_variance": normalizer.variance}
    return arrays


def save_policy(path: Path, arrays: Mapping[str, Any], action_low: np.ndarray, action_high: np.ndarray) -> None:
    """Write the arrays of `Agent.export` and the environment's own action bounds."""
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    np.savez(path, action_low=np.asarray(action_low), action_high=np.asarray(action_high), **arrays)


def load_policy(path: Path | str) -> Callable[[np.ndarray], np.ndarray]:
    """Policy of a saved file: observation `[..., observation]` -> deterministic action in the environment's units."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    depth = sum(name.startswith("kernel_") for name in arrays)
    half_range = (arrays["action_high"] - arrays["action_low"]) / 2

    def policy(observation: np.ndarray) -> np.ndarray:
        hidden = np.asarray(observation, np.float32)
        if "observation_mean" in arrays:
            deviation = np.sqrt(arrays["observation_variance"] + 1e-8)
            hidden = np.clip((hidden - arrays["observation_mean"]) / deviation, -10, 10)
        for i in range(depth):
            hidden = hidden @ arrays[f"kernel_{i}"] + arrays[f"bias_{i}"]
            if i < depth - 1:
                hidden = np.maximum(hidden, 0)
        return arrays["action_low"] + half_range * (np.tanh(hidden) + 1)

    return policy

"""What every agent computed before the house was rebuilt: state and metrics after three iterations, as numbers.

The files in `frozen/` were written by this file from the code of commit e92b7f6:

    python tests/algorithms/frozen_numbers.py

Arrays of a state have no names here, since they may be arranged in another way: those of one shape and type are sorted
by their contents.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

FOLDER = Path(__file__).parent / "frozen"
ITERATIONS = 3
SMALL = {
    "num_envs": 2, "warmup_steps": 24, "replay_capacity": 40, "batch_size": 6, "actor_hidden": (8, 6),
    "critic_hidden": (7, 8), "hidden": (9, 8), "num_quantiles": 5, "num_atoms": 7, "v_min": -4.0, "v_max": 4.0,
    "num_particles": 5, "num_fractions": 5, "num_target_fractions": 6, "num_policy_fractions": 7, "cosines": 4,
    "num_critics": 2, "quantiles_dropped": 1, "target_period": 2, "normalize_observations": True,
}  # fmt: skip


def small_config(module):
    """Settings that differ from the defaults wherever the algorithm has them."""
    fields = {field.name for field in dataclasses.fields(module.Config)}
    return dataclasses.replace(module.Config(), **{name: value for name, value in SMALL.items() if name in fields})


def numbers(make_agent, config, env, env_params) -> dict[str, np.ndarray]:
    """Metrics by name, and the arrays of the state."""
    agent = make_agent(config, env, env_params)
    state = jax.jit(agent.init)(jax.random.key(7))
    step = jax.jit(agent.step)
    for _ in range(ITERATIONS):
        state, metrics = step(state)
    found = {f"metric_{name}": np.stack([average.total, average.count]) for name, average in metrics.items()}
    arrays: dict[str, list[np.ndarray]] = {}
    for x in jax.tree.leaves(state):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        x = np.asarray(x)
        arrays.setdefault(f"{x.dtype}_{'x'.join(map(str, x.shape))}", []).append(x)
    for name, group in arrays.items():
        found[name] = np.stack(sorted(group, key=lambda x: x.astype(float).round(4).ravel().tolist()))
    return found


def world(name: str, module) -> tuple:
    """The algorithm's environment and its params: small, with terminations and time limits."""
    if name == "eta_dqn":
        from jaxrl_dist import envs

        return envs.make("stock/gamble")
    import by_hand

    env = (
        by_hand.Drift() if "actor_hidden" in {x.name for x in dataclasses.fields(module.Config)} else by_hand.Choices()
    )
    return env, env.default_params


if __name__ == "__main__":
    from jaxrl_dist.running import catalog

    FOLDER.mkdir(exist_ok=True)
    for name, module in catalog.agents().items():
        found = numbers(module.make_agent, small_config(module), *world(name, module))
        np.savez_compressed(FOLDER / f"{name}.npz", **found)
        print(name, len(found), flush=True)

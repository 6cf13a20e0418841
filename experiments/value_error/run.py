"""How wrong are the values that actor-critics learn, and how well calibrated are their laws?

During training, states are drawn from those that the replay has collected so far, the agent chooses actions there, and
the learned law of the (soft) return is held against Monte-Carlo returns of the same policy from the same states and
actions, time limits lifted. A row of `ENVIRONMENT/results.csv` is one seed of one agent at one time:

- `overestimation`, `overestimation_spread`: mean and standard deviation over states of the learned less the true mean;
- `calibration_w1`: Wasserstein-1 distance of the learned to the observed law, mean over states;
- `coverage`: part of the observed returns within the learned central 80 % interval, blank for agents that learn a mean
  (in the committed tables: 0 to 0.03, how often the points of a critic each were hit);
- `calibration_missing`: part of the discounted weight beyond the observed returns (since the committed tables);
- `true_value`: mean of the observed returns; `evaluation_return`: of the policy without exploration.

All of them are divided by the reward scale. Agents that learn a mean have a law of one atom (of one per critic).

    python experiments/value_error/run.py --environment Pendulum-v1
    python experiments/value_error/run.py --environment Pendulum-v1 --agents dsac dsac_t sac --reward-scale 10
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from jax.sharding import PartitionSpec

from jaxrl_dist import cli
from jaxrl_dist.records import plotting, recording, statistics
from jaxrl_dist.running import evaluation, problem, training

HERE = Path(__file__).parent
METRICS = ("overestimation", "overestimation_spread", "calibration_w1", "coverage")

AGENTS = {
    "ddpg": ("ddpg", {}), "td3": ("td3", {}), "sac": ("sac", {}),
    "tqc, 0 dropped": ("tqc", {"quantiles_dropped": 0}), "tqc, 2 dropped": ("tqc", {"quantiles_dropped": 2}),
    "tqc, 5 dropped": ("tqc", {"quantiles_dropped": 5}),
    "d4pg": ("d4pg", {}), "dsac": ("dsac", {}), "dsac_t": ("dsac_t", {}), "stac": ("stac", {}),
}  # fmt: skip
# Pendulum takes each algorithm's own preset. The double pendulum's sizes are those of experiments/learning_curves, as
# far as an algorithm has them: four environments, an update-to-data ratio of one half.
DOUBLE_PENDULUM = {
    "num_envs": 4, "warmup_steps": 2_000, "batch_size": 128, "critic_hidden": (128, 128), "actor_hidden": (128, 128),
    "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3, "temperature_learning_rate": 1e-3,
    "steps_per_iteration": 1, "updates_per_iteration": 2, "activation": "relu", "polyak": 0.005,
    "v_min": 0.0, "v_max": 1_000.0,
}  # fmt: skip
# With the others' step size D4PG's actor saturates.
OWN = {("d4pg", "brax/inverted_double_pendulum"): {"actor_learning_rate": 3e-4}}
SETTINGS = {
    "Pendulum-v1": {"total_steps": 15_000, "config": {}},
    "brax/inverted_double_pendulum": {"total_steps": 30_000, "config": DOUBLE_PENDULUM},
}


class ScaledRewards:
    """The environment with every reward multiplied by a factor."""

    def __init__(self, env, scale: float):
        self.env, self.scale = env, scale

    def __getattr__(self, name: str):
        return getattr(self.env, name)

    def step(self, key, state, action, params):
        observation, state, reward, *rest = self.env.step(key, state, action, params)
        return observation, state, self.scale * reward, *rest


def main(
    environment: Literal[tuple(SETTINGS)], agents: tuple[str, ...] = (), reward_scale: float = 1.0, num_seeds: int = 6,
    evaluations: int = 10, snapshots: int = 20, states: int = 64, rollouts: int = 32, out: Path = HERE,
) -> None:  # fmt: skip
    """Train the agents, measure on the way, and write the table and the figures.

    Args:
        environment: which environment.
        agents: names of `AGENTS`; all of them if empty. Measurements of other agents stay in the table.
        reward_scale: factor on every reward; the tables divide by it again.
        num_seeds: seeds per agent, trained together.
        evaluations: measurements during training, evenly spaced.
        snapshots: times between two measurements at which the states of the environments are noted.
        states: states per measurement and seed, drawn from all that have been noted.
        rollouts: Monte-Carlo returns per state.
        out: folder to write to.
    """
    cli.spread_over_cores()
    name = environment.replace("/", "-") + ("" if reward_scale == 1 else f"_rewards_x{reward_scale:g}")
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    for label in agents or AGENTS:
        started = time.perf_counter()
        algorithm, own = AGENTS[label]
        config = configured(algorithm, environment, own)
        measure = Measure(algorithm, config, environment, reward_scale, num_seeds, states, rollouts)
        rows = measure.run(SETTINGS[environment]["total_steps"], evaluations, snapshots)
        file = label.replace(", ", "_").replace(" ", "_")
        pd.DataFrame(rows).assign(agent=label, reward_scale=reward_scale).to_csv(folder / f"{file}.csv", index=False)
        about = {
            "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
            "date": time.strftime("%Y-%m-%d"), "config": dataclasses.asdict(config), "versions": recording.versions(),
        }  # fmt: skip
        (folder / f"{file}.json").write_text(json.dumps(about, indent=2) + "\n")
        print(pd.DataFrame(rows[-num_seeds:]).to_string(index=False), flush=True)
    summarise(folder, environment, reward_scale)


def configured(algorithm: str, environment: str, own: dict):
    """The algorithm's preset for the environment, the settings of the experiment that it has, and the agent's own."""
    module = cli.find_algorithm(algorithm)
    settings = SETTINGS[environment]["config"] or problem.split_preset(module.PRESETS.get(environment, {}))[1]
    fields = {field.name for field in dataclasses.fields(module.Config)}
    settings = {name: value for name, value in settings.items() if name in fields} | own
    settings |= OWN.get((algorithm, environment), {})
    config = dataclasses.replace(module.Config(), **settings)
    total = SETTINGS[environment]["total_steps"]
    return dataclasses.replace(config, replay_capacity=min(config.replay_capacity, total))


class Measure:
    """The compiled programs of one agent, and its training with measurements."""

    def __init__(self, algorithm, config, environment, reward_scale, num_seeds, states, rollouts):
        from jaxrl_dist import envs

        env, env_params = envs.make(environment)
        env = ScaledRewards(env, reward_scale)
        module = cli.find_algorithm(algorithm)
        self.scale, self.seeds, self.states = reward_scale, num_seeds, states
        self.programs = training.Programs(module.make_agent, config, env, env_params, num_runs=num_seeds)
        endless = evaluation.without_time_limit(env, env_params)

        def judge(config, state, batch, key):
            claim = module.make_agent(config, env, env_params).claim
            found = evaluation.return_distributions_from(
                claim, env, endless, state, key, batch, rollouts=rollouts, horizon=evaluation.horizon(claim.discount)
            )
            numbers = evaluation.calibration(found, learns_mean=claim.learns_mean)._asdict()
            return numbers | {"true_value": found.monte_carlo.mean()}

        runs = PartitionSpec("runs")
        self.judge = jax.jit(
            jax.shard_map(
                jax.vmap(judge), mesh=self.programs.sharding.mesh, in_specs=runs, out_specs=runs, check_vma=False
            )
        )

    def run(self, total_steps: int, evaluations: int, snapshots: int) -> list[dict]:
        programs, rows = self.programs, []
        iterations = programs.agent.clock.iterations(total_steps) // (evaluations * snapshots)
        training_state = programs.begin(jax.random.split(jax.random.key(0), self.seeds))
        seen, generator = [], np.random.default_rng(0)
        for point in range(1, evaluations + 1):
            for _ in range(snapshots):
                training_state = programs.advance(training_state, iterations)
                seen.append(jax.device_get(training_state.state.experience.interaction))
            keys = jax.vmap(jax.random.fold_in, (0, None))(jax.random.split(jax.random.key(1), self.seeds), point)
            judge_keys, episode_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            batch = self.drawn(seen, generator)
            found = jax.device_get(self.judge(programs.configs, training_state.state, batch, judge_keys))
            episodes = programs.evaluate(training_state, episode_keys)
            found["evaluation_return"] = np.asarray(episodes.episode_return).mean(1)
            env_steps = programs.agent.clock.env_steps_at(point * snapshots * iterations)
            for seed in range(self.seeds):
                row = {"seed": seed, "env_steps": env_steps}
                for metric, values in found.items():
                    scale = 1 if metric in ("coverage", "calibration_missing") else self.scale
                    row[metric] = np.nan if values is None else round(float(values[seed]) / scale, 4)
                rows.append(row)
        return rows

    def drawn(self, seen: list, generator: np.random.Generator):
        """`states` environments per seed, drawn from all snapshots and environments: leaves `[seeds, states, ...]`."""
        num_envs = seen[0].episode_return.shape[1]
        pairs = generator.integers([len(seen), num_envs], size=(self.states, 2))
        return jax.tree.map(
            lambda *leaves: jnp.asarray(np.stack([leaves[time][:, env] for time, env in pairs], axis=1)), *seen
        )


def summarise(folder: Path, environment: str, reward_scale: float) -> None:
    """A figure per metric over all agents that have been measured, and the table of their last three measurements."""
    frames = {}
    for path in sorted(folder.glob("*.csv")):
        if path.stem != "summary":
            frame = pd.read_csv(path)
            label = frame.agent.iloc[0]
            algorithm, _ = AGENTS[label]
            frames[cli.display_name(algorithm) + label.removeprefix(algorithm)] = frame
    title = environment if reward_scale == 1 else f"{environment}, rewards times {reward_scale:g}"
    for metric in METRICS:
        # Errors fall by orders of magnitude; what remains at the end is what agents differ in.
        linear_up_to = None if metric == "coverage" else 10.0
        shown = {label: frame for label, frame in frames.items() if frame[metric].notna().any()}
        if shown:
            path = folder / f"{metric}.png"
            plotting.learning_curve(shown, path, title=title, metric=metric, linear_up_to=linear_up_to)
    rows = []
    for label, frame in frames.items():
        last = frame[frame.env_steps.isin(np.unique(frame.env_steps)[-3:])].groupby("seed").mean(numeric_only=True)
        row = {"agent": label, "seeds": len(last)}
        for metric in ("evaluation_return", "true_value", *METRICS):
            values = last[metric].to_numpy()
            if np.isnan(values).all():  # the coverage of a mean
                continue
            low, high = statistics.bootstrap_interval(values)
            row |= {metric: statistics.interquartile_mean(values), f"{metric}_low": low, f"{metric}_high": high}
        rows.append({key: round(float(x), 3) if isinstance(x, float | np.floating) else x for key, x in row.items()})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "summary.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)

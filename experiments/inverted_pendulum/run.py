"""Why is SAC slow on brax/inverted_pendulum, which a linear controller solves?

`controllers`: the best clip(gains . observation, -1, 1) that the cross-entropy method finds, through our environment
and its scaling of actions, for three physics backends and several levels of Gaussian noise on the actions:
`controllers.csv` has a row per backend and level, with the returns of the controller and of uniform random actions.

`push`: what is observed after one push of 0.3 and no more: `push.csv` has a row per backend and step.

`agents`: SAC from the same keys in the settings of `VARIANTS`, one change each: `agents.csv` has a row per variant,
seed and time.

    python experiments/inverted_pendulum/run.py controllers
    python experiments/inverted_pendulum/run.py push
    python experiments/inverted_pendulum/run.py agents
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

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.running import training

HERE = Path(__file__).parent
ENVIRONMENT = "brax/inverted_pendulum"
BACKENDS = ("spring", "generalized", "mjx")
NOISES = (0.0, 0.1, 0.3)
STEPS = 1000


def main(
    part: tyro.conf.Positional[Literal["controllers", "push", "agents"]],
    variants: tuple[str, ...] = (), out: Path = HERE,
) -> None:  # fmt: skip
    """Measure one part and write its table.

    Args:
        part: which part.
        variants: names of `VARIANTS` to train; all if empty. Rows of the others stay in the table.
        out: folder to write to.
    """
    cli.spread_over_cores()
    started = time.perf_counter()
    rows = pd.DataFrame(agents(variants) if part == "agents" else {"controllers": controllers, "push": push}[part]())
    path = out / f"{part}.csv"
    if variants and path.exists():
        kept = pd.read_csv(path)
        rows = pd.concat([kept[~kept.variant.isin(variants)], rows])
    rows.to_csv(path, index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
    }  # fmt: skip
    (out / f"{part}.json").write_text(json.dumps(about, indent=2) + "\n")


# -- linear controllers -----------------------------------------------------------------------------------------------


def controllers(population: int = 64, elites: int = 8, generations: int = 6) -> list[dict]:
    from jaxrl_dist import envs

    rows = []
    for backend in BACKENDS:
        env, params = envs.make(ENVIRONMENT, backend=backend)

        def episode(gains, noise, uniform, key, env=env, params=params):
            """Return of one episode of the controller, or of uniform random actions."""
            reset_key, loop_key = jax.random.split(key)
            observation, state = env.reset_env(reset_key, params)

            def one(carry):
                time, _, total, observation, state = carry
                keys = jax.random.split(jax.random.fold_in(loop_key, time), 3)
                action = jnp.clip(observation @ gains, -1, 1)[None] + noise * jax.random.normal(keys[0], (1,))
                action = jnp.where(uniform, jax.random.uniform(keys[1], (1,), minval=-1), jnp.clip(action, -1, 1))
                observation, state, reward, terminated, _ = env.step_env(keys[2], state, action, params)
                return time + 1, ~terminated, total + reward, observation, state

            start = (0, jnp.bool_(True), jnp.float32(0), observation, state)
            return jax.lax.while_loop(lambda carry: carry[1] & (carry[0] < STEPS), one, start)[2]

        run = jax.jit(jax.vmap(episode, in_axes=(0, None, None, 0)))
        for noise in NOISES:
            # Signs and sizes are found together: log sizes would need the signs to be known.
            generator, mean, std = np.random.default_rng(0), np.zeros(4), np.array([3.0, 10.0, 0.5, 1.0])
            for generation in range(generations):
                gains = generator.normal(mean, std, (population, 4))
                keys = jax.random.split(jax.random.key(generation), population)
                best = gains[np.argsort(np.asarray(run(jnp.asarray(gains, jnp.float32), noise, False, keys)))[-elites:]]
                mean, std = best.mean(0), best.std(0) + 0.01
            keys = jax.random.split(jax.random.key(1000), population)
            same = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (population, 4))
            found, random = (np.asarray(run(same, noise, uniform, keys)) for uniform in (False, True))
            rows.append({
                "backend": backend, "noise": noise, **{f"gain_{i}": round(float(x), 3) for i, x in enumerate(mean)},
                "episodes": population, "mean_return": round(float(found.mean()), 1),
                "median_return": float(np.median(found)), "full_episodes": float((found >= STEPS).mean()),
                "uniform_actions_mean_return": round(float(random.mean()), 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def push(steps: int = 15) -> list[dict]:
    from jaxrl_dist import envs

    rows = []
    for backend in BACKENDS:
        env, params = envs.make(ENVIRONMENT, backend=backend)
        _, state = env.reset_env(jax.random.key(0), params)
        step = jax.jit(lambda s, a, env=env, params=params: env.step_env(jax.random.key(0), s, a, params)[:2])
        for time_step in range(steps):
            observation, state = step(state, jnp.array([0.3 if time_step == 0 else 0.0]))
            names = ("position", "angle", "velocity", "angular_velocity")
            seen = dict(zip(names, np.asarray(observation).round(4).tolist(), strict=True))
            rows.append({"backend": backend, "step": time_step + 1, **seen})
    return rows


# -- SAC --------------------------------------------------------------------------------------------------------------

# Widths, batches and step sizes as on Pendulum, for a CPU.
BASE = {
    "backend": "spring", "total_steps": 20_000, "warmup_steps": 1_000, "batch_size": 128, "actor_hidden": (64, 64),
    "critic_hidden": (64, 64), "actor_learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
}  # fmt: skip
VARIANTS = {
    "base": {},
    "target entropy -3": {"target_entropy_per_action": -3.0},
    "discount 0.95": {"discount": 0.95},
    "generalized": {"backend": "generalized"},
    "mjx": {"backend": "mjx"},
}


def agents(names: tuple[str, ...], num_seeds: int = 4, evaluations: int = 5) -> list[dict]:
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.actor_critic import sac

    rows = []
    for (backend, total_steps, _), group in grouped(names or tuple(VARIANTS)).items():
        env, params = envs.make(ENVIRONMENT, backend=backend)
        runs = [config for config in group.values() for _ in range(num_seeds)]
        floats = jax.tree.map(lambda *leaves: np.array(leaves, np.float32), *runs)
        programs = training.Programs(
            sac.make_agent, floats, env, params, num_runs=len(runs), eval_states=32, eval_rollouts=4
        )
        saturation = jax.jit(jax.vmap(lambda state: saturated(sac, runs[0], env, params, state)))
        keys = jnp.tile(jax.random.split(jax.random.key(0), num_seeds), len(group))
        state = programs.begin(keys)
        iterations = programs.agent.clock.iterations(total_steps)
        done = 0
        for boundary in np.round(np.linspace(0, iterations, evaluations + 1)).astype(int)[1:]:
            state, done = programs.advance(state, int(boundary) - done), int(boundary)
            state, averages = programs.take_metrics(state)
            eval_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, boundary)
            returns = np.asarray(programs.evaluate(state, eval_keys).episode_return).mean(1)
            calibration = jax.device_get(programs.calibrate(state, eval_keys))
            bang_bang = np.asarray(saturation(state.state))
            env_steps = programs.agent.clock.env_steps_at(done)
            for run in range(len(runs)):
                metrics = dict(zip(programs.metric_names, np.asarray(averages)[run].tolist(), strict=True))
                rows.append({
                    "variant": list(group)[run // num_seeds], "seed": run % num_seeds, "env_steps": env_steps,
                    "evaluation_return": round(float(returns[run]), 1), "saturation": round(float(bang_bang[run]), 3),
                    "overestimation": round(float(calibration.overestimation[run]), 2),
                    **{name: float(f"{value:.4g}") for name, value in metrics.items()},
                })  # fmt: skip
            print(pd.DataFrame(rows[-len(runs) :]).groupby("variant").mean().round(2).to_string(), flush=True)
    return rows


def saturated(sac, config, env, params, state) -> jax.Array:
    """Part of the latest 500 stored observations in which the evaluation policy pushes with more than 0.9."""
    agent, replay = sac.make_agent(config, env, params), state.experience.replay
    rows = (replay.position - 1 - jnp.arange(500)) % replay.rows.reward.shape[0]
    return (jnp.abs(agent.policy.act(state, replay.rows.observation[rows], (), jax.random.key(0))[0]) > 0.9).mean()


def grouped(names: tuple[str, ...]) -> dict:
    """Variants that differ in floats only, together: (backend, total steps, static fields) -> name -> configuration."""
    from jaxrl_dist.algorithms.actor_critic import sac
    from jaxrl_dist.studies import sweeps

    groups = {}
    for name in names:
        settings = BASE | VARIANTS[name]
        backend, total_steps = settings.pop("backend"), settings.pop("total_steps")
        config = dataclasses.replace(sac.Config(), replay_capacity=total_steps, **settings)
        groups.setdefault((backend, total_steps, sweeps.static_fields(config)), {})[name] = config
    return groups


if __name__ == "__main__":
    tyro.cli(main)

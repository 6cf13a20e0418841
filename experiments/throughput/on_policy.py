"""Where the time of PPO's iteration goes: rollout, values and advantages, update; on three environments, several seeds.

For each environment and number of seeds this writes to `on_policy.csv` the compile seconds of a run's programs,
environment steps per second over all seeds, and the shares of an iteration that its parts take, each in a loop of its
own with the shapes of one run, in turn with the whole of it:

- rollout: the environments, the policy that acts in them, and what it draws;
- advantages: the critic on what was seen and on what followed, and GAE over it;
- gae: the reverse scan of that alone;
- update: what is left, epochs of minibatches.

Absolute times depend on the machine; ratios within one row are what to read. Every number is the median over
repetitions that alternate between what is compared.

    python experiments/throughput/on_policy.py          # about six minutes on 2 cores
"""

import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
import tyro
from run import advance_program, timed_loop  # beside this file
from value_based import looped  # beside this file

from jaxrl_dist import cli
from jaxrl_dist.learning import clipped, returns, rollouts
from jaxrl_dist.records import recording
from jaxrl_dist.running import training

HERE = Path(__file__).parent
SIZES = {"num_steps": 128, "num_epochs": 4, "num_minibatches": 4}
CASES = {
    "CartPole-v1": SIZES | {"num_envs": 4, "hidden": (64, 64)},
    "Breakout-MinAtar": SIZES | {"num_envs": 16, "hidden": (128,)},
    "brax/hopper": SIZES | {"num_envs": 64, "hidden": (64, 64)},
}
SEEDS = (1, 4, 16)


def main(
    environments: tuple[str, ...] = tuple(CASES), seeds: tuple[int, ...] = SEEDS,
    repetitions: int = 5, seconds: float = 0.7, out: Path = HERE,
) -> None:  # fmt: skip
    """Measure and write the table.

    Args:
        environments: which of them.
        seeds: numbers of runs trained together.
        repetitions: measurements of each quantity, of which the median is taken.
        seconds: length of one measurement.
        out: folder to write to.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started = time.perf_counter()
    rows = []
    for env_id in environments:
        env, env_params = envs.make(env_id)
        for num_runs in seeds:
            rows.append(
                {"environment": env_id} | measure(env, env_params, CASES[env_id], num_runs, repetitions, seconds)
            )
            print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(out / "on_policy.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(jax.devices()), "versions": recording.versions(),
    }  # fmt: skip
    (out / "on_policy.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def measure(env, env_params, settings: dict, num_runs: int, repetitions: int, seconds: float) -> dict:
    """One row; shares are those of one run alone, and only asked where there is one."""
    module = cli.find_algorithm("ppo")
    config = module.Config(**settings)
    programs = training.Programs(module.make_agent, config, env, env_params, num_runs=num_runs)
    started = time.perf_counter()
    programs.compile()
    compile_seconds = time.perf_counter() - started
    timed = {"iteration": timed_loop(advance_program(programs), seconds)}
    if num_runs == 1:
        state = programs.begin(jax.random.split(jax.random.key(0), 1))
        one = jax.tree.map(lambda x: x[0], state.state)
        timed |= {name: timed_loop(loop, seconds / 4) for name, loop in parts(config, env, env_params, one).items()}
    samples = [{name: loop() for name, loop in timed.items()} for _ in range(repetitions)]
    iteration = statistics.median(sample["iteration"] for sample in samples)
    row = {
        "seeds": num_runs, "mode": programs.runs_mode, "devices": programs.num_devices,
        "compile_s": round(compile_seconds, 1), "ms_per_iteration_and_run": round(iteration / num_runs, 3),
        "env_steps_per_s": round(1e3 / iteration * programs.agent.clock.env_steps * num_runs),
        "updates_per_s": round(1e3 / iteration * programs.agent.clock.updates * num_runs),
    }  # fmt: skip
    for part in ("rollout", "advantages", "gae"):
        shares = [sample[part] / sample["iteration"] for sample in samples if part in sample]
        row[f"share_{part}"] = round(statistics.median(shares), 3) if shares else None
    return row


def parts(config, env, env_params, state) -> dict:
    """Loops of the parts of one run's iteration, named as in the table."""
    network, key = clipped.network_of(config, env, env_params), jax.random.key(0)
    parameters, shape = state.learner.parameters, (config.num_steps, config.num_envs)

    def act(observation, memory, key):
        actions, _ = network.apply(parameters, observation)
        drawn = actions.sample(key)
        return jnp.clip(drawn, -1, 1) if network.continuous else drawn, memory, actions.log_density(drawn)

    def rollout(index, carry):
        now, total = carry
        keys = jax.random.fold_in(key, index)
        now, lived, _ = rollouts.collect(env, env_params, now, keys, config.num_steps, act)
        # Every number of it is used, so that none is left out.
        return now, total + sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(lived))

    reward = jax.random.uniform(key, shape)
    ended = jnp.zeros(shape, bool)
    observation = jnp.zeros((*shape, *state.interaction.observation.shape[1:]), state.interaction.observation.dtype)

    def gae(index, value):
        return returns.gae(reward, value, value + 1e-3 * index, ended, ended, config.discount, config.gae_decay)

    def advantages(index, value):
        seen = observation + value.reshape(*shape, *[1] * (observation.ndim - 2)).astype(observation.dtype)
        value, following = (
            jax.vmap(lambda x: network.apply(parameters, x)[1])(x) for x in (seen, seen + observation.dtype.type(1))
        )
        return returns.gae(reward, value, following, ended, ended, config.discount, config.gae_decay)

    value = jnp.zeros(shape)
    return {
        "rollout": looped(rollout, (state.interaction, jnp.float32(0))), "advantages": looped(advantages, value),
        "gae": looped(gae, value),
    }  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)

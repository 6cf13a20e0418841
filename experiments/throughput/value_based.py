"""How fast are the value-based agents, what do vmapped seeds cost, and where does the time of an update go?

For every algorithm on CartPole-v1, with its preset's sizes there (batch 128, hidden layers 128-128), this writes to
`value_based.csv`:

- compile seconds of all programs of a run;
- milliseconds per iteration (8 environment steps and one update) of 1, 4 and 16 runs, per run, with environment
  steps/s and updates/s over all runs;
- the share of that time which sampling from the replay takes (for Rainbow with its priorities, read and written), and
  the share of the distributional part: projection and cross-entropy, quantile Huber loss, or discrepancy, forward and
  backward. Each part is timed in a loop of its own, with the shapes of one run, in turn with the whole of it.

Absolute times depend on the machine; ratios within one row are what to read. Every number is the median over
repetitions that alternate between what is compared.

    python experiments/throughput/value_based.py            # about fifteen minutes on 2 cores
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

from jaxrl_dist import cli
from jaxrl_dist.distributional import categorical, mmd, quantile
from jaxrl_dist.learning import experience, replay
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, training

HERE = Path(__file__).parent
ALGORITHMS = ("dqn", "c51", "qr_dqn", "iqn", "fqf", "mmd_dqn", "rainbow")


def main(repetitions: int = 7, seconds: float = 0.7, out: Path = HERE, only: str = "") -> None:
    """Measure and write the table.

    Args:
        repetitions: measurements of each quantity, of which the median is taken.
        seconds: length of one measurement.
        out: folder to write to.
        only: measure only this algorithm, and print instead of writing.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started = time.perf_counter()
    env, env_params = envs.make("CartPole-v1")
    rows = []
    for algorithm in ALGORITHMS if not only else (only,):
        module = cli.find_algorithm(algorithm)
        config = module.Config(**problem.split_preset(module.PRESETS["CartPole-v1"])[1])
        rows += measure(algorithm, module, config, env, env_params, repetitions, seconds)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if only:
        return
    table.to_csv(out / "value_based.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(jax.devices()), "versions": recording.versions(),
    }  # fmt: skip
    (out / "value_based.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def measure(algorithm: str, module, config, env, env_params, repetitions: int, seconds: float) -> list[dict]:
    """One row per number of runs; the shares are those of one run alone."""
    rows = []
    for num_runs in (1, 4, 16):
        programs = training.Programs(module.make_agent, config, env, env_params, num_runs=num_runs)
        started = time.perf_counter()
        programs.compile()
        compile_seconds = time.perf_counter() - started
        timed = {"iteration": timed_loop(advance_program(programs), seconds)}
        if num_runs == 1:
            state = programs.begin(jax.random.split(jax.random.key(0), 1))
            one = jax.tree.map(lambda x: x[0], state.state)
            timed["sampling"] = timed_loop(sampling_loop(algorithm, config, one), seconds / 4)
            if algorithm != "dqn":
                timed["distribution"] = timed_loop(distribution_loop(algorithm, config), seconds / 4)
        samples = [{name: loop() for name, loop in timed.items()} for _ in range(repetitions)]
        iteration = statistics.median(sample["iteration"] for sample in samples)
        agent = programs.agent
        row = {
            "algorithm": algorithm, "runs": num_runs, "mode": programs.runs_mode, "devices": programs.num_devices,
            "compile_s": round(compile_seconds, 1), "ms_per_iteration_and_run": round(iteration / num_runs, 3),
            "env_steps_per_s": round(1e3 / iteration * agent.clock.env_steps * num_runs),
            "updates_per_s": round(1e3 / iteration * agent.clock.updates * num_runs),
            "program_memory_mib": round(programs.memory_of_advance() / 2**20, 1),
        }  # fmt: skip
        for part in ("sampling", "distribution"):
            shares = [sample[part] / sample["iteration"] for sample in samples if part in sample]
            row[f"share_{part}"] = round(statistics.median(shares), 3) if shares else None
        rows.append(row)
        print(row, flush=True)
    return rows


def looped(once, carry):
    """`run(n)` does `carry = once(index, carry)` n times in one program."""
    loop = jax.jit(lambda carry, iterations: jax.lax.fori_loop(0, iterations, once, carry))

    def run(iterations: int) -> None:
        jax.block_until_ready(loop(carry, iterations))

    return run


def sampling_loop(algorithm: str, config, state):
    """A batch drawn from the filled replay of one run; every entry is used, so that none is left out."""
    key = jax.random.key(0)

    def used(batch) -> jax.Array:
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(batch))

    def uniform(index, total):
        batch = experience.sample_n_step(
            state.experience, jax.random.fold_in(key, index), config.batch_size,
            num_steps=config.num_steps, gamma=config.discount,
        )  # fmt: skip
        return total + used(batch)

    def by_priority(index, carry):
        total, priorities = carry
        indices, probabilities = replay.sample_by_priority(
            priorities, jax.random.fold_in(key, index), config.batch_size
        )
        batch = experience.batch_at(state.experience, indices, num_steps=config.num_steps, gamma=config.discount)
        weights = replay.importance_weights(probabilities, state.experience.replay.size, 0.5)
        new = jnp.full(config.num_envs, priorities.largest)
        priorities = replay.set_priorities(priorities, jnp.arange(config.num_envs), new)
        return total + used(batch), replay.set_priorities(priorities, indices, weights)

    if algorithm == "rainbow":
        return looped(by_priority, (jnp.float32(0), state.priorities))
    return looped(uniform, jnp.float32(0))


def distribution_loop(algorithm: str, config):
    """Target and loss of one update with its gradient, from network outputs of the actions taken on."""
    batch = config.batch_size
    keys = jax.random.split(jax.random.key(0), 4)
    reward, discount = jax.random.uniform(keys[0], (batch,)), jnp.full(batch, 0.99)
    if algorithm in ("c51", "rainbow"):
        support = categorical.support(config.v_min, config.v_max, config.num_atoms)
        predicted = jax.random.normal(keys[1], (batch, config.num_atoms))
        following = jax.nn.softmax(jax.random.normal(keys[2], (batch, config.num_atoms)))

        def loss(logits, scale):
            target = categorical.project_return(reward * scale, discount, following, support)
            return categorical.cross_entropy(target, logits).mean()
    else:
        count = {"qr_dqn": "num_quantiles", "mmd_dqn": "num_particles"}.get(algorithm, "num_fractions")
        shape = batch, getattr(config, count)
        predicted, following = jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)

        def loss(atoms, scale):
            target = reward[:, None] * scale + discount[:, None] * following
            if algorithm == "mmd_dqn":
                weights = jnp.asarray(config.bandwidths) ** config.bandwidth_exponent
                return mmd.squared_mmd(atoms, target, mmd.gaussian_mixture(config.bandwidths, weights)).mean()
            fractions = quantile.midpoints(shape[1])
            return quantile.quantile_huber_loss(atoms, target, fractions, over_predicted="sum").mean()

    def once(index, atoms):
        return atoms - 1e-3 * jax.grad(loss)(atoms, 1 + 1e-3 * index)

    return looped(once, predicted)


if __name__ == "__main__":
    tyro.cli(main)

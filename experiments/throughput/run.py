"""How fast is an update, how near is that to its matrix products alone, and what do vmapped seeds cost?

For every algorithm at the paper's batch of 256 and stated widths, on Pendulum-v1 (an environment that costs next to
nothing, so that the update is what is measured), this writes to `results.csv`:

- compile seconds of all programs of a run;
- milliseconds per iteration (one environment step and one update) of one run alone, and per run of 4 and 16 runs, in
  each mode of `training.Programs`, with environment steps/s and updates/s over all runs;
- the floor: milliseconds of only the matrix products of one update, as separate products of the same shapes, measured
  in turn with the update, and the ratio of the two;
- memory that the compiled training program needs (arguments and temporaries).

`replay_capacity.csv` holds the milliseconds per iteration of TQC with replays of 10^4, 10^5 and 10^6 rows.

Absolute times depend on the machine and on what else it does; ratios within one row are what to read. Every number is
the median over repetitions that alternate between what is compared.

    python experiments/throughput/run.py            # about half an hour on 2 cores
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.algorithms.actor_critic import d4pg, ddpg, dsac, dsac_t, sac, stac, td3, tqc
from jaxrl_dist.records import recording
from jaxrl_dist.running import training

HERE = Path(__file__).parent
WIDE = (512, 512, 512)
BASE = (256, 256)


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm at one size; `critics` members with `outputs` outputs each."""

    name: str
    module: object
    critic_hidden: tuple[int, ...]
    critics: int
    outputs: int
    actor_outputs: int
    squashed: bool
    policy_delay: int = 1

    def config(self, capacity: int = 20_000):
        """The paper's settings at this case's widths, with one update per environment step."""
        return self.module.Config(
            num_envs=1, steps_per_iteration=self.policy_delay, updates_per_iteration=self.policy_delay,
            warmup_steps=1_000, replay_capacity=capacity, batch_size=256,
            actor_hidden=BASE, critic_hidden=self.critic_hidden,
        )  # fmt: skip


CASES = (
    Case("ddpg 256x256", ddpg, BASE, 1, 1, 1, False),
    Case("td3 256x256", td3, BASE, 2, 1, 1, False, policy_delay=2),
    Case("sac 256x256", sac, BASE, 2, 1, 2, True),
    Case("tqc 5x25 256x256", tqc, BASE, 5, 25, 2, True),
    Case("tqc 5x25 512x512x512", tqc, WIDE, 5, 25, 2, True),
    Case("d4pg 51 256x256", d4pg, BASE, 1, 51, 1, False),
    Case("dsac 256x256", dsac, BASE, 1, 2, 2, True, policy_delay=2),
    Case("dsac_t 256x256", dsac_t, BASE, 2, 2, 2, True, policy_delay=2),
    Case("stac 256x256", stac, BASE, 1, 2, 2, True),
)


def main(
    repetitions: int = 7, seconds: float = 1.0, out: Path = HERE, only: str = "", replay_only: bool = False
) -> None:
    """Measure and write the tables.

    Args:
        repetitions: measurements of each quantity, of which the median is taken.
        seconds: length of one measurement.
        out: folder to write to.
        replay_only: measure only the replay's capacities.
        only: measure only the cases whose name contains this; the rows of others stay as they were.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started = time.perf_counter()
    env, env_params = envs.make("Pendulum-v1")
    if replay_only:
        write_capacities(env, env_params, repetitions, seconds, out)
        return
    cases = [case for case in CASES if only in case.name]
    rows = [row for case in cases for row in measure_case(case, env, env_params, repetitions, seconds)]
    table = pd.DataFrame(rows).assign(date=time.strftime("%Y-%m-%d"))
    print(table.to_string(index=False))
    out.mkdir(parents=True, exist_ok=True)
    if only and (out / "results.csv").exists():
        earlier = pd.read_csv(out / "results.csv")
        table = pd.concat([earlier[~earlier.case.isin(table.case)], table])
    table.to_csv(out / "results.csv", index=False)
    if only:
        return
    write_capacities(env, env_params, repetitions, seconds, out)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(jax.devices()), "versions": recording.versions(),
    }  # fmt: skip
    (out / "about.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


def measure_case(case: Case, env, env_params, repetitions: int, seconds: float) -> list[dict]:
    """One row per number of runs and mode; the floor is that of one run alone."""
    floor = timed_loop(floor_program(case), seconds)
    rows = []
    for num_runs, mode in ((1, "map"), (4, "map"), (4, "vmap"), (16, "map"), (16, "vmap")):
        programs = training.Programs(
            case.module.make_agent, case.config(), env, env_params, num_runs=num_runs, runs_mode=mode
        )
        started = time.perf_counter()
        programs.compile()
        compile_seconds = time.perf_counter() - started
        memory = programs.memory_of_advance()
        agent = programs.agent
        update = timed_loop(advance_program(programs), seconds)
        pairs = [(update(), floor()) for _ in range(repetitions)]
        per_iteration = statistics.median(a for a, _ in pairs)
        # Per update and run: an iteration of TD3 holds two updates.
        per_update = per_iteration / agent.clock.updates / num_runs
        floor_ms = statistics.median(b for _, b in pairs)
        rows.append(
            {
                "case": case.name, "runs": num_runs, "mode": mode, "devices": programs.num_devices,
                "compile_s": round(compile_seconds, 1), "ms_per_update_and_run": round(per_update, 3),
                "floor_ms": round(floor_ms, 3),
                "ratio": round(statistics.median(a / agent.clock.updates / num_runs / b for a, b in pairs), 2),
                "updates_per_s": round(1e3 / per_update),
                "env_steps_per_s": round(1e3 / per_iteration * agent.clock.env_steps * num_runs),
                "program_memory_mib": round(memory / 2**20, 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def write_capacities(env, env_params, repetitions: int, seconds: float, out: Path) -> None:
    """Measure and write `replay_capacity.csv`."""
    capacities = pd.DataFrame(measure_capacities(env, env_params, repetitions, seconds))
    print(capacities.to_string(index=False))
    capacities.to_csv(out / "replay_capacity.csv", index=False)


def measure_capacities(env, env_params, repetitions: int, seconds: float) -> list[dict]:
    """Milliseconds per iteration of one TQC run (Pendulum's small preset, where the replay would show) by capacity."""
    programs = {}
    for capacity in (10**4, 10**5, 10**6):
        config = dataclasses.replace(tqc.Config(**tqc.PRESETS["Pendulum-v1"]), replay_capacity=capacity)
        one = training.Programs(tqc.make_agent, config, env, env_params, num_runs=1)
        one.compile()
        programs[capacity] = timed_loop(advance_program(one), seconds)
    samples = [{capacity: program() for capacity, program in programs.items()} for _ in range(repetitions)]
    return [
        {"capacity": capacity, "ms_per_iteration": round(statistics.median(s[capacity] for s in samples), 3)}
        for capacity in programs
    ]


def advance_program(programs: training.Programs):
    """`run(n)` does n iterations of training and waits for them."""
    keys = jax.vmap(jax.random.key)(jnp.arange(programs.num_runs))
    state = [programs.begin(keys)]

    def run(iterations: int) -> None:
        state[0] = jax.block_until_ready(programs.advance(state[0], iterations))

    return run


def timed_loop(run, seconds: float):
    """A function that measures milliseconds per iteration of `run(iterations)` over about `seconds`."""
    run(3)
    run(3)
    started = time.perf_counter()
    run(10)
    iterations = max(10, round(seconds / (time.perf_counter() - started) * 10))

    def measure() -> float:
        started = time.perf_counter()
        run(iterations)
        return (time.perf_counter() - started) * 1e3 / iterations

    return measure


# -- the floor --------------------------------------------------------------------------------------------------------


def floor_program(case: Case):
    """`run(n)` does the matrix products of n updates of one run, and nothing else that takes time."""
    observation, action, batch = 3, 1, 256
    actor = [observation, *BASE, case.actor_outputs * action]
    critic = [observation + action, *case.critic_hidden, case.outputs]

    def weights(sizes, members, key):
        shapes = list(itertools.pairwise(sizes))
        keys = jax.random.split(key, members * len(shapes)).reshape(members, len(shapes))
        return [[jax.random.normal(keys[m, i], s) / s[0] ** 0.5 for i, s in enumerate(shapes)] for m in range(members)]

    keys = jax.random.split(jax.random.key(0), 3)
    parameters = weights(actor, 1, keys[0]), weights(critic, case.critics, keys[1])
    inputs = jax.random.normal(keys[2], (batch, max(actor[0], critic[0])))

    def forward(layers, x):
        activations = [x]
        for w in layers:
            activations.append(activations[-1] @ w)
        return activations

    def backward(layers, activations, gradient, *, to_weights: bool, to_inputs: bool):
        """Products of the backward pass: gradients of the weights, and of the inputs of all layers (or all but one)."""
        outputs = []
        for i in reversed(range(len(layers))):
            if to_weights:
                outputs.append(activations[i].T @ gradient)
            if i > 0 or to_inputs:
                gradient = gradient @ layers[i].T
        return [*outputs, gradient] if to_inputs else outputs

    def once(scale):
        actors, critics = parameters

        # Every pass has inputs of its own, as in the update; `scale` keeps the products inside the loop.
        def x(index, width):
            return inputs[:, :width] * (scale + index)

        outputs = [forward(actors[0], x(1, actor[0]))[-1]]
        for members in critics:
            outputs.append(forward(members, x(2, critic[0]))[-1])
            activations = forward(members, x(3, critic[0]))
            outputs += backward(members, activations, activations[-1], to_weights=True, to_inputs=False)
        return outputs

    def actor_once(scale):
        actors, critics = parameters

        def x(index, width):
            return inputs[:, :width] * (scale + index)

        activations = forward(actors[0], x(4, actor[0]))
        outputs = backward(actors[0], activations, activations[-1], to_weights=True, to_inputs=False)
        # TD3 and DDPG climb one critic, SAC and TQC all of them.
        for members in critics if case.squashed else critics[:1]:
            activations = forward(members, x(5, critic[0]))
            outputs += backward(members, activations, activations[-1], to_weights=False, to_inputs=True)
        return outputs

    def iteration(_, carry):
        scale, _ = carry
        outputs = []
        for index in range(case.policy_delay):
            outputs += once(scale + 10 * index)
        outputs += actor_once(scale)
        return 1 + 1e-20 * outputs[0][0, 0], outputs

    shapes = jax.eval_shape(lambda: iteration(0, (jnp.float32(1), None))[1])

    @jax.jit
    def loop(iterations):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.fori_loop(0, iterations, iteration, (jnp.float32(1), zeros))

    def run(updates: int) -> None:
        jax.block_until_ready(loop(max(1, updates // case.policy_delay)))

    return run


if __name__ == "__main__":
    tyro.cli(main)

"""What does it cost that a run which breaks is frozen inside the program, and the others go on?

For three agents with their presets' sizes and SAC with its own, 256 wide, this writes `freezing.csv`: milliseconds per
iteration of two runs on two devices, with and without freezing, the median over repetitions that alternate between
both; their ratio; and the bytes that a run's last finite learner takes, beside those of its whole state.

    python experiments/throughput/freezing.py            # about five minutes on 2 cores
"""

import json
import statistics
import time
from pathlib import Path

import jax
import pandas as pd
import tyro
from run import advance_program, timed_loop  # beside this file

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, training
from jaxrl_dist.running.checkpointing import bytes_to_write

HERE = Path(__file__).parent
CASES = {
    "DQN, CartPole": ("dqn", "CartPole-v1", "CartPole-v1"),
    "C51, CartPole": ("c51", "CartPole-v1", "CartPole-v1"),
    "TQC, Pendulum": ("tqc", "Pendulum-v1", "Pendulum-v1"),
    "SAC, 256 wide": ("sac", "Pendulum-v1", None),
}


def main(repetitions: int = 9, seconds: float = 0.7, out: Path = HERE) -> None:
    """Measure and write the table.

    Args:
        repetitions: measurements of each quantity, of which the median is taken.
        seconds: length of one measurement.
        out: folder to write to.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started, rows = time.perf_counter(), []
    for name, (algorithm, env_id, preset) in CASES.items():
        module = cli.find_algorithm(algorithm)
        settings = problem.split_preset(module.PRESETS[preset])[1] if preset else {"warmup_steps": 1_000}
        config = module.Config(**settings | {"replay_capacity": 50_000})
        env, env_params = envs.make(env_id)
        timed, state = {}, None
        for freeze in (True, False):
            programs = training.Programs(module.make_agent, config, env, env_params, num_runs=2, freeze=freeze)
            programs.compile()
            state = state or programs.abstract_training
            timed[freeze] = timed_loop(advance_program(programs), seconds)
        times = {freeze: [] for freeze in timed}
        for _ in range(repetitions):
            for freeze, measure in timed.items():
                times[freeze].append(measure())
        frozen, plain = (statistics.median(times[freeze]) for freeze in (True, False))
        ratio = statistics.median(one / other for one, other in zip(times[True], times[False], strict=True))
        rows.append({
            "agent": name, "ms_frozen": round(frozen, 4), "ms_plain": round(plain, 4), "ratio": round(ratio, 3),
            "last_finite_bytes": bytes_to_write(state.last_finite) // 2, "state_bytes": bytes_to_write(state) // 2,
        })  # fmt: skip
        print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(out / "freezing.csv", index=False)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "cores": len(jax.devices()), "versions": recording.versions(),
    }  # fmt: skip
    (out / "freezing.json").write_text(json.dumps(about, indent=2, default=str) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

"""Do risk-sensitive agents choose the lane that theory says, and get the risk they ask for?

On the bridge every policy's return distribution is known in closed form. QR-DQN and IQN are trained on it for each
risk measure below, several seeds at once, with nothing changed but `--risk`. Per agent, risk and seed
`ALGORITHM.csv` holds

- the path that the learned greedy policy walks while it does not fall, and the one that theory says
  (`bridge.risk_policy`, the fixed point of the agents' own criterion);
- the risk-adjusted value of the return: exact for the path that theory says, exact for the learned policy, and as
  achieved in `episodes` episodes with a 95 % bootstrap interval;
- the risk-adjusted value that the agent itself predicts at the start.

    python experiments/risk_bridge/run.py            # about an hour on 2 cores
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.agent import Agent
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.records import recording
from jaxrl_dist.running import evaluation, training

HERE = Path(__file__).parent
RISKS = ("wang:0.75", "neutral", "cvar:0.5", "wang:-0.4", "cvar:0.25", "wang:-1")
# The step size falls: tail quantiles need large steps to arrive, and small ones to be told apart.
LEARNING_RATES = (3e-3, 2e-3, 1e-3, 1e-3, 5e-4, 3e-4)
# Rewards are a tenth of the environment's default ones (values and gaps in its docstring shrink alike): low quantiles
# feel hardly any pull (a step in the middle lane falls with probability 0.015), so that Adam needs too long to move
# them over tens of units of return; they stay between the two outcomes, and every lane looks more dangerous than it is.
# Exploration does not end, so that every lane stays in the replay, which keeps everything.
REWARDS = {"step_costs": (0.24, 0.18, 0.02), "climb_cost": 0.2, "fall_cost": 1.0, "goal_reward": 1.0}
COMMON = {
    "warmup_steps": 2_000, "replay_capacity": 150_000, "batch_size": 128, "target_period": 100,
    "exploration_steps": 20_000, "epsilon_end": 0.3, "hidden": (64, 64), "kappa": 0.1,
}  # fmt: skip
SETTINGS = {
    "qr_dqn": COMMON | {"num_quantiles": 100},
    "iqn": COMMON | {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 32, "cosines": 32},
}


def main(
    algorithms: tuple[str, ...] = tuple(SETTINGS), num_seeds: int = 6, total_steps: int = 150_000,
    episodes: int = 4_000, out: Path = HERE,
) -> None:  # fmt: skip
    """Train every agent on every risk measure and write the table and the picture.

    Args:
        algorithms: which agents; the summary and the picture are of all that have been measured.
        num_seeds: seeds per agent and risk, trained together.
        total_steps: environment steps per seed.
        episodes: evaluation episodes per seed.
        out: folder to write to.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs

    env, env_params = envs.make("bridge", **REWARDS)
    for algorithm in algorithms:
        started, rows, settings = time.perf_counter(), [], SETTINGS[algorithm]
        module = cli.find_algorithm(algorithm)
        for text in RISKS:
            config = module.Config(**settings, risk=text)
            programs = training.Programs(
                module.make_agent, config, env, env_params, num_runs=num_seeds, eval_episodes=1
            )
            state = programs.begin(jax.random.split(jax.random.key(0), num_seeds))
            iterations = programs.agent.clock.iterations(total_steps)
            for rate in LEARNING_RATES:  # floats are traced: the same program
                programs.set_floats(dataclasses.replace(config, learning_rate=rate))
                state = programs.advance(state, iterations // len(LEARNING_RATES))
            judge = jax.jit(functools.partial(judged, programs.agent, env, env_params, episodes))
            for seed in range(num_seeds):
                one = training.one_run(state.state, seed)
                row = {"algorithm": algorithm, "risk": text, "seed": seed, "env_steps": total_steps}
                rows.append(row | compared(env, env_params, text, config.discount, *judge(one, jax.random.key(seed))))
            print(pd.DataFrame(rows[-num_seeds:]).to_string(index=False), flush=True)
        out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out / f"{algorithm}.csv", index=False)
        about = {
            "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
            "date": time.strftime("%Y-%m-%d"), "settings": settings, "learning_rates": LEARNING_RATES,
            "rewards": REWARDS, "versions": recording.versions(),
        }  # fmt: skip
        (out / f"{algorithm}.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
    tables = [pd.read_csv(out / f"{algorithm}.csv") for algorithm in SETTINGS if (out / f"{algorithm}.csv").exists()]
    summarise(pd.concat(tables), out)


def judged(agent: Agent, env, env_params, episodes, state, key):
    """The learned policy `[length, lanes]`, its predicted law at the start, and achieved returns `[episodes]`."""
    lanes = len(env_params.slips)
    observations = jnp.eye(env.length * lanes)
    policy_key, episode_key = jax.random.split(key)
    policy = agent.policy.act(state, observations, (), policy_key)[0].reshape(env.length, lanes)
    # Every walk starts in the same state, so one "state" and its rollouts are the start and its episodes.
    found = evaluation.return_distributions(
        agent.claim, env, env_params, state, episode_key, states=1, rollouts=episodes, horizon=env.length, spread=1,
    )  # fmt: skip
    return policy, *jax.tree.map(lambda x: x[0], (found.predicted, found.monte_carlo))


def compared(env, env_params, text: str, discount: float, policy, predicted, returns) -> dict:
    """One row of the table."""
    from jaxrl_dist.envs import bridge

    risk = risks.parse(text)
    theory = bridge.risk_policy(env, env_params, risk, discount)

    def exact(policy):
        return float(risks.value(risk, bridge.return_law(env, env_params, policy, discount)))

    value = jax.jit(lambda samples: risks.value(risk, laws.equally_weighted(samples)))
    returns = np.asarray(returns)
    resampled = np.random.default_rng(0).choice(returns, (1_000, len(returns)))
    low, high = np.quantile([value(sample) for sample in resampled], [0.025, 0.975])
    policy = np.asarray(policy)
    return {
        "path": path_text(env, env_params, policy), "path_of_theory": path_text(env, env_params, theory),
        "value_of_theory": round(exact(theory), 3), "value_of_policy": round(exact(policy), 3),
        "achieved": round(float(value(returns)), 3), "achieved_low": round(float(low), 3),
        "achieved_high": round(float(high), 3),
        "predicted": round(float(risks.value(risk, predicted)), 3), "mean_return": round(float(returns.mean()), 3),
    }  # fmt: skip


def path_text(env, env_params, policy: np.ndarray) -> str:
    from jaxrl_dist.envs import bridge

    return "-".join(str(lane) for lane in bridge.path_of(env, env_params, policy))


def summarise(table: pd.DataFrame, out: Path) -> None:
    """`summary.csv`, one row per agent and risk, and the picture of the paths that were chosen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxrl_dist import envs
    from jaxrl_dist.envs import bridge

    table = table.assign(
        right=table.path == table.path_of_theory,
        covered=(table.achieved_low <= table.value_of_theory) & (table.value_of_theory <= table.achieved_high),
    )
    summary = table.groupby(["algorithm", "risk"], sort=False).agg(
        path_of_theory=("path_of_theory", "first"), seeds=("seed", "size"), right_path=("right", "sum"),
        value_of_theory=("value_of_theory", "first"), achieved=("achieved", "mean"), interval_covers=("covered", "sum"),
        predicted=("predicted", "mean"), mean_return=("mean_return", "mean"),
    ).round(3).reset_index()  # fmt: skip
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    _, env_params = envs.make("bridge", **REWARDS)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    most = table[table.right].drop_duplicates("path")
    labels = {
        path: ", ".join(dict.fromkeys(table[(table.path == path) & table.right].risk)) for path in most.path
    }  # fmt: skip
    paths = {label: [int(lane) for lane in path.split("-")] for path, label in labels.items()}
    bridge.draw(figure.subplots(), env_params, paths)
    figure.savefig(out / "figure.png", dpi=160)


if __name__ == "__main__":
    tyro.cli(main)

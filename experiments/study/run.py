"""A study as users do it: four agents, four environments, ten seeds each, one report.

Do agents that learn a law of returns do better than DQN with the same budget, network and settings? One setting for
all, tuned for none; only the support of C51 differs between environments, because it has to. Each pair is trained by
the runner of the command line. What is committed per pair is what `jaxrl-dist report` reads: `ENVIRONMENT/AGENT.csv` (a
row per evaluation episode and seed), `ENVIRONMENT/metrics/AGENT.csv` and `ENVIRONMENT/AGENT.json` (command,
configuration, versions, date); then the page itself, `report.html`.

    python experiments/study/run.py                                       # about half an hour on 2 cores
    jaxrl-dist report experiments/study/*/*.json --normalize experiments/study/returns.json --out report.html
"""

import json
import time
from pathlib import Path

import tyro
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.reports import write
from jaxrl_dist.running import problem, session

HERE = Path(__file__).parent
AGENTS = ("dqn", "c51", "qr_dqn", "iqn")
COMMON = {
    "num_envs": 8, "updates_per_iteration": 1, "warmup_steps": 1_000, "batch_size": 64, "target_period": 200,
    "learning_rate": 5e-4, "hidden": (64, 64), "exploration_steps": 20_000,
}  # fmt: skip
OWN = {
    "dqn": {},
    "c51": {},
    "qr_dqn": {"num_quantiles": 32},
    "iqn": {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 32},
}
# The support of C51, from the rewards and the discount of 0.99.
SUPPORTS = {
    "CartPole-v1": (0.0, 100.0),
    "Acrobot-v1": (-100.0, 0.0),
    "Catch-bsuite": (-1.0, 1.0),
    "UmbrellaChain-bsuite": (-11.0, 11.0),
}


def main(
    environments: tuple[str, ...] = tuple(SUPPORTS), agents: tuple[str, ...] = AGENTS, num_seeds: int = 10,
    total_steps: int = 100_000, out: Path = HERE,
) -> None:  # fmt: skip
    """Train all pairs and write the report.

    Args:
        environments: which environments.
        agents: which agents.
        num_seeds: seeds per pair, trained together.
        total_steps: environment steps per seed.
        out: folder to write to.
    """
    cli.spread_over_cores()
    console = Console()
    modules = {agent: cli.find_algorithm(agent) for agent in agents}
    for environment in environments:
        folder = out / environment
        (folder / "metrics").mkdir(parents=True, exist_ok=True)
        for agent, module in modules.items():
            settings = COMMON | OWN[agent]
            if agent == "c51":
                settings |= dict(zip(("v_min", "v_max"), SUPPORTS[environment], strict=True))
            options = problem.RunOptions(
                env_id=environment, preset="none", total_steps=total_steps, num_seeds=num_seeds,
                eval_every=total_steps // 10, eval_episodes=20, plots=False,
                name=f"study-{time.strftime('%Y-%m-%d_%H-%M-%S')}",
            )  # fmt: skip
            run = session.train(problem.prepare(agent, module.make_agent, module.Config(**settings), options), console)
            about = recording.read_config(run) | {"command": recording.command_line()}
            (folder / f"{agent}.json").write_text(json.dumps(about, indent=2) + "\n")
            recording.read_evaluations(run).to_csv(folder / f"{agent}.csv", index=False)
            recording.read_metrics(run).to_csv(folder / "metrics" / f"{agent}.csv", index=False)
    write.write(sorted(out.glob("*/*.json")), out / "report.html", HERE / "returns.json", console)


if __name__ == "__main__":
    tyro.cli(main)

"""The work that `side_by_side.py` measures: one environment and one update per step of it, but for PPO's rollouts."""

from typing import Any, NamedTuple

ONE_TO_ONE = {"num_envs": 1, "replay_capacity": 10_000, "warmup_steps": 1_000}
VALUES = ONE_TO_ONE | {"updates_per_iteration": 1, "batch_size": 128, "hidden": (120, 84)}
ACTORS = ONE_TO_ONE | {
    "updates_per_iteration": 1, "batch_size": 256, "actor_hidden": (256, 256), "critic_hidden": (256, 256),
}  # fmt: skip
SMALL = ACTORS | {"batch_size": 128, "actor_hidden": (64, 64), "critic_hidden": (64, 64)}
ON_POLICY = {"num_envs": 4, "num_steps": 128, "num_epochs": 4, "num_minibatches": 4, "hidden": (64, 64)}
PENDULUMS = {"v_min": -1650.0, "v_max": 0.0}  # the returns of Pendulum-v1


class Case(NamedTuple):
    """What is trained: an algorithm's file, an environment, settings, and how many runs under one `vmap`."""

    algorithm: str
    environment: str
    settings: dict[str, Any]
    runs: int = 1

    @property
    def updates(self) -> int:
        """Those of one iteration of one run."""
        settings = self.settings
        return settings.get("updates_per_iteration") or settings["num_epochs"] * settings["num_minibatches"]


CASES = {
    "DQN 120-84": Case("dqn", "CartPole-v1", VALUES),
    "C51 101 atoms": Case("c51", "CartPole-v1", VALUES | {"num_atoms": 101}),
    "QR-DQN 50": Case("qr_dqn", "CartPole-v1", VALUES | {"num_quantiles": 50}),
    "IQN 64-64": Case("iqn", "CartPole-v1", VALUES | {"num_fractions": 64, "num_target_fractions": 64}),
    "SAC 256x256": Case("sac", "Pendulum-v1", ACTORS),
    "TQC 2x25 256x256": Case("tqc", "Pendulum-v1", ACTORS | {"num_critics": 2}),
    "TQC 5x25 256x256": Case("tqc", "Pendulum-v1", ACTORS | {"num_critics": 5}),
    "TQC 3x25 64x64": Case("tqc", "Pendulum-v1", SMALL | {"num_critics": 3}),
    "D4PG 51 256x256": Case("d4pg", "Pendulum-v1", ACTORS | PENDULUMS),
    "STAC 256x256": Case("stac", "Pendulum-v1", ACTORS),
    "DQN 120-84, 4 seeds": Case("dqn", "CartPole-v1", VALUES, 4),
    "DQN 120-84, 16 seeds": Case("dqn", "CartPole-v1", VALUES, 16),
    "DQN 120-84, 64 seeds": Case("dqn", "CartPole-v1", VALUES, 64),
    "PPO 64-64": Case("ppo", "CartPole-v1", ON_POLICY),
    "PPO 64-64, 4 seeds": Case("ppo", "CartPole-v1", ON_POLICY, 4),
    "PPO 64-64, 16 seeds": Case("ppo", "CartPole-v1", ON_POLICY, 16),
}

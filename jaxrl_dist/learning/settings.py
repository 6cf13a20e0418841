"""Settings that all replay-based algorithms have, with the relations between them."""

import dataclasses

from jaxrl_dist.agent import Clock
from jaxrl_dist.configuration import LARGEST, Count, configuration, option, require


@configuration
class Settings:
    """How an algorithm meets its environments and its replay; the first fields of its `Config`."""

    num_envs: Count = 1
    """environments stepped in parallel"""
    steps_per_iteration: Count = 1
    """steps of each environment between two rounds of updates"""
    updates_per_iteration: Count = 1
    """gradient updates per round; updates / (num_envs * steps) is the update-to-data ratio"""
    warmup_steps: Count = 10_000
    """environment steps with uniform random actions before the first update"""
    replay_capacity: Count = 1_000_000
    """transitions kept for sampling"""
    batch_size: Count = 256
    """transitions per update, or windows of them"""

    def clock(self) -> Clock:
        """Updates and environment steps of an iteration, and those of the warm-up in whole rounds."""
        warmup_steps = -(-self.warmup_steps // self.num_envs) * self.num_envs
        return Clock(self.updates_per_iteration, self.num_envs * self.steps_per_iteration, warmup_steps)

    def fitted(self, total_steps: int) -> "Settings":
        """The same with no more room in the replay than `total_steps` environment steps fill: a ring that never wraps
        holds the same rows at any larger size."""
        clock = self.clock()
        iterations = max(0, -(-(total_steps - clock.warmup_steps) // clock.env_steps))
        needed = clock.env_steps_at(iterations)
        return self if self.replay_capacity <= needed else dataclasses.replace(self, replay_capacity=needed)

    def check(self) -> None:
        """Raise ConfigurationError where sizes do not go together, before anything compiles."""
        rows = {"replay_capacity": self.replay_capacity, "num_envs": self.num_envs * getattr(self, "num_steps", 1)}
        for name, count in rows.items():
            require(
                count <= LARGEST // 2,
                f"{option(name)} is {getattr(self, name)}, {count} rows; at most {LARGEST // 2}, since rows are "
                "numbered in int32 and their numbers added",
            )
        require(
            self.batch_size <= self.warmup_steps,
            f"--batch-size is {self.batch_size}; it must be at most --warmup-steps = {self.warmup_steps}, "
            "so that the first batch holds rows that were written",
        )
        require(
            self.warmup_steps <= self.replay_capacity,
            f"--replay-capacity is {self.replay_capacity}; it must be at least --warmup-steps = {self.warmup_steps}",
        )
        require(
            self.num_envs <= self.warmup_steps,
            f"--num-envs is {self.num_envs}; it must be at most --warmup-steps = {self.warmup_steps}",
        )


def check_policy_delay(config) -> None:
    """Rounds of `policy_delay` critic updates and one of the actor must fill an iteration."""
    require(
        config.updates_per_iteration % config.policy_delay == 0,
        f"--updates-per-iteration is {config.updates_per_iteration}; it must be a multiple of --policy-delay = "
        f"{config.policy_delay}",
    )

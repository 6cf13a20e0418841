"""What must hold between the sizes of replay-based algorithms, before anything compiles."""

from jaxrl_dist.configuration import LARGEST, option, require


def check_replay(config) -> None:
    """The relations between sizes that every replay-based algorithm needs, before anything compiles."""
    rows = {"replay_capacity": config.replay_capacity, "num_envs": config.num_envs * getattr(config, "num_steps", 1)}
    for name, count in rows.items():
        require(
            count <= LARGEST // 2,
            f"{option(name)} is {getattr(config, name)}, {count} rows; at most {LARGEST // 2}, since rows are "
            "numbered in int32 and their numbers added",
        )
    require(
        config.batch_size <= config.warmup_steps,
        f"--batch-size is {config.batch_size}; it must be at most --warmup-steps = {config.warmup_steps}, "
        "so that the first batch holds rows that were written",
    )
    require(
        config.warmup_steps <= config.replay_capacity,
        f"--replay-capacity is {config.replay_capacity}; it must be at least --warmup-steps = {config.warmup_steps}",
    )
    require(
        config.num_envs <= config.warmup_steps,
        f"--num-envs is {config.num_envs}; it must be at most --warmup-steps = {config.warmup_steps}",
    )


def check_policy_delay(config) -> None:
    """Rounds of `policy_delay` critic updates and one of the actor must fill an iteration."""
    require(
        config.updates_per_iteration % config.policy_delay == 0,
        f"--updates-per-iteration is {config.updates_per_iteration}; it must be a multiple of --policy-delay = "
        f"{config.policy_delay}",
    )

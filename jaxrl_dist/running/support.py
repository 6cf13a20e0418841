"""The fixed support of a categorical law (`v_min`, `v_max` of a configuration): found by probing, and watched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.configuration import require
from jaxrl_dist.learning import interaction

CLIPPED_MASS_TO_WARN_OF = 0.05


def has_support(config: Any) -> bool:
    """Whether the algorithm's laws have one, by the names of its settings."""
    return hasattr(config, "v_min") and hasattr(config, "v_max")


def summary(config: Any, probed: str) -> str:
    """The support as one line of a run's plan; probed: `RunOptions.probe_support`."""
    source = "" if probed == "off" else f", from the {probed} of random actions"
    return f"{config.num_atoms} atoms from {config.v_min:g} to {config.v_max:g}{source}"


def clipping(clipped: float, config: Any, where: str) -> str:
    """A sentence on targets of which the part `clipped` of the mass lies outside of the support; '' for a small one."""
    if not clipped > CLIPPED_MASS_TO_WARN_OF:
        return ""
    return (
        f"clipped_mass is {clipped:.0%} {where}: so much of the targets lies outside --v-min {config.v_min:g} and "
        f"--v-max {config.v_max:g}; widen them, or use --probe-support"
    )


def require_support(config: Any, how: str) -> None:
    """ConfigurationError where there is nothing to probe for."""
    require(
        has_support(config),
        f"--probe-support is {how}; it is for algorithms with a fixed support (--v-min, --v-max)",
    )


def covering(config: Any, how: str, rewards: np.ndarray, ended: np.ndarray) -> Any:
    """The configuration with v_min and v_max that cover what a random policy saw (`random_rewards`).

    how: "rewards", the smallest and largest of them for ever, or "returns", those of whole episodes, with a margin.
    """
    if how == "rewards":
        # For as long as the discount lets rewards count, which is beyond any time limit: targets bootstrap there.
        require(config.discount < 1, "--probe-support is rewards; it needs --discount below 1")
        low, high = (float(bound) / (1 - config.discount) for bound in (rewards.min(), rewards.max()))
        low, high = (min(low, 0.0), max(high, 0.0)) if ended.any() else (low, high)
    else:
        returns, following = np.zeros_like(rewards), np.full(rewards.shape[1], np.nan)  # unfinished episodes: NaN
        for time in reversed(range(len(rewards))):
            returns[time] = following = rewards[time] + config.discount * np.where(ended[time], 0, following)
        require(
            bool(np.isfinite(returns).any()),
            f"--probe-support is returns, but no episode ended in {len(rewards)} random steps; use rewards",
        )
        low, high = float(np.nanmin(returns)), float(np.nanmax(returns))
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    require(low < high, f"--probe-support is {how}, but random actions found no reward but {low:g}")
    return dataclasses.replace(config, v_min=low, v_max=high)


def random_rewards(env: Any, env_params: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of uniform random actions, and where episodes ended: both `[steps, environments]`."""
    return tuple(map(np.asarray, jax.jit(_random_rollout, static_argnums=0)(env, env_params, np.uint32(seed))))


def _random_rollout(env, env_params, seed, steps: int = 1_000, num_envs: int = 32):
    start_key, loop_key = jax.random.split(jax.random.key(seed))

    def one(batch, time):
        action_key, step_key = jax.random.split(jax.random.fold_in(loop_key, time))
        action = interaction.random_action(env, env_params, action_key, num_envs)
        batch, transition, _ = interaction.step(env, env_params, batch, action, step_key)
        return batch, (transition.reward, transition.terminated | transition.truncated)

    return jax.lax.scan(one, interaction.start(env, env_params, start_key, num_envs), jnp.arange(steps))[1]

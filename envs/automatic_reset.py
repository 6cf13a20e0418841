"""Start the next episode only in the environments that ended one, for environments whose reset is expensive.

gymnax computes a reset at every step of every environment and selects. That is exact and cheap for CartPole, but for
brax's hopper it adds half of the step's own cost on CPU (numbers in `brax.py`). A `cond` per environment does not help:
under `vmap` it computes both branches. So the batch decides: a loop runs while any environment of the batch still has
to be reset, usually not at all, and resets a few per turn.

Under `shard_map` each device loops by itself. Under `jit` with a sharded batch axis, asking "any?" is one all-reduce
of a bool per step; no state moves between devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gymnax.environments import environment
from jax.custom_batching import custom_vmap

LANES_PER_TURN = 16  # below about this many environments a reset costs the same on CPU, however few there are


class ResetWhereEnded(environment.Environment):
    """An environment of gymnax's (`reset_env`, `step_env`), whose `step` resets only where an episode ended."""

    @partial(jax.jit, static_argnames=("self",))
    def step(
        self, key: jax.Array, state: Any, action: jax.Array, params: Any = None
    ) -> tuple[jax.Array, Any, jax.Array, jax.Array, jax.Array, dict[str, Any]]:
        """gymnax's step: same keys, same flags."""
        params = self.default_params if params is None else params
        key_step, key_reset = jax.random.split(key)
        final_observation, state, reward, terminated, info = self.step_env(key_step, state, action, params)
        truncated = self.is_truncated(state, params)
        ended = terminated | truncated
        observation, state = reset_where(self.reset_env, ended, key_reset, params, final_observation, state)
        info |= {"terminated": terminated, "truncated": truncated, "final_observation": final_observation}
        return observation, state, reward, terminated, truncated, info


def reset_where(
    reset: Callable[[jax.Array, Any], tuple[Any, Any]],
    ended: jax.Array,
    key: jax.Array,
    params: Any,
    observation: Any,
    state: Any,
) -> tuple[Any, Any]:
    """`reset(key, params)` where `ended`, else `(observation, state)`: for one environment, or under any nest of vmaps.

    Equal to a select between the two, key by key; it does not matter to an environment's draw who else ended.
    Not differentiable in reverse mode (a loop of unknown length).
    """
    # As plain numbers through the loop: the key-reuse checker refuses typed keys that a loop's body reads, and cannot
    # know that an environment leaves `ended` with the one turn that uses its key.
    implementation = jax.random.key_impl(key)

    def reset_by_data(key_data: jax.Array, params: Any) -> tuple[Any, Any]:
        return reset(jax.random.wrap_key_data(key_data, impl=implementation), params)

    return _reset_where(reset_by_data, depth=0)(ended, jax.random.key_data(key), params, observation, state)


def _reset_where(reset: Callable, depth: int) -> Callable:
    """`reset_where` for arguments with `depth` batch axes in front; `vmap` turns it into the one for `depth + 1`."""

    def some(ended: jax.Array, key: jax.Array, params: Any, observation: Any, state: Any) -> tuple[Any, Any, Any]:
        """Reset the first few of the `[lanes]` that ended; returns who is left."""
        lanes = ended.shape[0]
        turn = min(lanes, max(LANES_PER_TURN, lanes // 16))
        # Places that are not needed point past the end, where writes are dropped.
        chosen = jnp.flatnonzero(ended, size=turn, fill_value=lanes)
        chosen_key, chosen_params = jax.tree.map(lambda leaf: leaf.at[chosen].get(mode="clip"), (key, params))
        fresh = jax.vmap(reset)(chosen_key, chosen_params)
        observation, state = jax.tree.map(
            lambda leaf, new: leaf.at[chosen].set(new, mode="drop"), (observation, state), fresh
        )
        return ended.at[chosen].set(False, mode="drop"), observation, state

    turn_of_all = some
    for _ in range(depth - 1):  # outer batch axes (runs) take their turns side by side: nothing moves between them
        turn_of_all = jax.vmap(turn_of_all)

    @custom_vmap
    def run(ended: jax.Array, key: jax.Array, params: Any, observation: Any, state: Any) -> tuple[Any, Any]:
        if depth == 0:  # one environment alone: gymnax's way
            fresh = reset(key, params)
            return jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, (observation, state))
        carry = _varying_alike(ended, key, (ended, observation, state))
        carry = jax.lax.while_loop(lambda c: jnp.any(c[0]), lambda c: turn_of_all(c[0], key, params, *c[1:]), carry)
        return carry[1:]

    @run.def_vmap
    def batched(size: int, is_batched: list, *arguments: Any) -> tuple[Any, Any]:
        arguments = jax.tree.map(
            lambda leaf, has_axis: leaf if has_axis else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf))),
            arguments,
            tuple(is_batched),
        )
        results = _reset_where(reset, depth + 1)(*arguments)
        return results, jax.tree.map(lambda _: True, results)

    return run


def _varying_alike(ended: jax.Array, key: jax.Array, tree: Any) -> Any:
    """`tree` unchanged, but under `shard_map` typed to vary over every mesh axis that `ended` or `key` varies over.

    A step count that starts at the constant 0 does not vary over devices, but does once it is reset here and not
    there; a loop refuses a carry whose type changes. The select below has the type and costs nothing once compiled.
    """
    never = ended & (key[..., 0] != key[..., 0])
    return jax.tree.map(
        lambda leaf: jnp.where(never.reshape(never.shape + (1,) * (leaf.ndim - never.ndim)), leaf, leaf), tree
    )

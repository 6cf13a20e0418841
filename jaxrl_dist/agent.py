"""The contract every algorithm file fulfils."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrl_dist.distributional.law import Law


class Agent(NamedTuple):
    """One algorithm on one environment, as pure functions that can be jitted, vmapped over runs, and sharded.

    Observations and actions carry a leading batch axis in `act`, `target_policy` and `predict`.
    """

    init: Callable[[jax.Array], Any]
    """`init(key) -> state`: parameters, replay filled by uniform random actions, environments in mid-episode."""
    step: Callable[[Any], tuple[Any, dict]]
    """`step(state) -> (state, metrics)`: one iteration, interact and then learn; metrics are `interaction.Average`s."""
    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    """`act(state, observation, key) -> action`: what evaluation runs, without exploration."""
    target_policy: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """`target_policy(state, observation, key) -> (action, bonus)`: the policy whose return the critic learns, and what
    that return adds to each reward after the first (the entropy bonus of soft agents, else 0), `[batch]`."""
    predict: Callable[[Any, jax.Array, jax.Array], Law]
    """`predict(state, observation, action) -> law`: the learned return distribution as weighted atoms `[batch, atoms]`;
    agents that learn a mean return one atom per critic, see `learns_mean`."""
    export: Callable[[Any], dict[str, jax.Array]]
    """`export(state) -> arrays`: the evaluation policy for `portable.save_policy`."""
    warmup_steps: int
    """Environment steps taken by `init`."""
    steps_per_iteration: int
    """Environment steps taken by one `step`, over all environments."""
    updates_per_iteration: int
    """Gradient updates of the critic in one `step`."""
    learns_mean: bool = False
    """Whether the critic learns the mean of the return and not its distribution, whatever the number of atoms: two
    critics' means are no law of two atoms, and an agent with one quantile still learns a law."""

"""The contract every algorithm file fulfils. The toolkit reads nothing of a state or a configuration but what is here.

`make_agent(config, env, env_params) -> Agent`, or `make_agent(config, env, env_params, data)` for algorithms that learn
from given arrays: `data` is one pytree, shared by all runs, that travels beside the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxrl_dist import threefry
from jaxrl_dist.configuration import require
from jaxrl_dist.distributional.law import Law


def nothing_to_remember(num_envs: int) -> tuple:
    """The memory of a policy that has none."""
    return ()


class Policy(NamedTuple):
    """How an agent acts when it is evaluated, without exploration.

    A memory is what the policy remembers of each environment: the carry of a recurrent network, correlated noise, the
    rest of a chunk of actions. It lives in `Interaction`, and begins anew where an episode ends.
    """

    act: Callable[[Any, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
    """`act(state, observation, memory, key) -> (action, memory)`, all but state and key `[batch, ...]`."""
    start: Callable[[int], Any] = nothing_to_remember
    """`start(num_envs) -> memory`, leaves `[num_envs, ...]`."""


def memoryless(act: Callable[[Any, jax.Array, jax.Array], jax.Array]) -> Policy:
    """The policy `act(state, observation, key) -> action` that remembers nothing."""
    return Policy(lambda state, observation, memory, key: (act(state, observation, key), memory))


class Claim(NamedTuple):
    """What an agent claims about returns, which is held against Monte-Carlo ones; `observation` is `[batch, ...]`."""

    policy: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    """`policy(state, observation, key) -> (action, bonus)`: the policy whose return is claimed, and what that return
    adds to each reward after the first (the entropy bonus of soft agents, else 0), `[batch]`."""
    law: Callable[[Any, jax.Array, jax.Array], Law]
    """`law(state, observation, action) -> law`: the learned return distribution as weighted atoms `[batch, atoms]`;
    agents that learn a mean return one atom per critic, see `learns_mean`."""
    discount: float | jax.Array
    """gamma of the return that is claimed."""
    learns_mean: bool = False
    """Whether the critic learns the mean of the return and not its distribution, whatever the number of atoms: two
    critics' means are no law of two atoms, and an agent with one quantile still learns a law."""
    of_states: bool = False
    """Whether the claim is about states and not about actions: every rollout draws its own first action, and `law`
    takes no notice of the one that it is given."""
    joint: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None
    """`joint(state, observation, action) -> particles`: of agents that learn from a vector of rewards, the learned
    joint law of its components' returns as equally weighted vectors `[batch, particles, rewards]`; `law` is that of
    their sum."""


class Clock(NamedTuple):
    """What an iteration is: `step` once. Sizes, not counters: they are the same for all runs."""

    updates: int
    """Gradient updates in one iteration; of the critic, where there is one."""
    env_steps: int = 0
    """Environment steps in one iteration, over all environments; 0: none at all, and a run's length is its updates."""
    warmup_steps: int = 0
    """Environment steps taken by `init`."""
    pretraining: int = 0
    """First iterations that are `Agent.pretrain` instead, and take no environment steps."""

    @property
    def unit(self) -> str:
        """In what a run's length is counted."""
        return "env steps" if self.env_steps else "updates"

    @property
    def per_iteration(self) -> int:
        """Of its unit, what one iteration of training takes."""
        return self.env_steps or self.updates

    def env_steps_at(self, iteration: Any) -> Any:
        """Environment steps that were taken after `iteration` iterations (numbers, or arrays of them)."""
        return self.warmup_steps + self._of_training(iteration) * self.env_steps

    def updates_at(self, iteration: Any) -> Any:
        """Updates that were done after `iteration` iterations."""
        return iteration * self.updates

    def now(self, iteration: Any) -> Any:
        """Where a run stands after `iteration` iterations, in its unit."""
        return self.env_steps_at(iteration) if self.env_steps else self.updates_at(iteration)

    def iterations(self, total_steps: int) -> int:
        """Iterations that take a run to at least `total_steps` of its unit."""
        if not self.env_steps:
            return max(self.pretraining + 1, -(-total_steps // self.updates))
        require(
            total_steps > self.warmup_steps,
            f"--total-steps is {total_steps}; it must be above the {self.warmup_steps} steps of the warm-up",
        )
        return self.pretraining + -(-(total_steps - self.warmup_steps) // self.env_steps)

    def interval(self, total_steps: float) -> int:
        """Iterations, at least one, in which training comes nearest to taking `total_steps` of its unit."""
        return max(1, round(total_steps / self.per_iteration))

    def _of_training(self, iteration: Any) -> Any:
        if not self.pretraining:
            return iteration
        return (iteration > self.pretraining) * (iteration - self.pretraining)


class Agent(NamedTuple):
    """One algorithm on one environment, as pure functions that can be jitted, vmapped over runs, and sharded."""

    init: Callable[[jax.Array], Any]
    """`init(key) -> state`: parameters, environments in mid-episode, a replay filled by uniform random actions."""
    step: Callable[[Any], tuple[Any, dict]]
    """`step(state) -> (state, metrics)`: one iteration, interact and then learn; metrics are `interaction.Average`s."""
    policy: Policy
    clock: Clock
    claim: Claim | None = None
    """None where a paper makes none (behaviour cloning), or where the policy that it would be about remembers."""
    export: Callable[[Any], dict[str, jax.Array]] | None = None
    """`export(state) -> arrays`: the evaluation policy for `portable.save_policy`; without it there is only its
    StableHLO program."""
    pretrain: Callable[[Any], tuple[Any, dict]] | None = None
    """As `step`, in its place for the first `clock.pretraining` iterations."""
    adapt: Callable[[Any, Any, jax.Array], Any] | None = None
    """`adapt(state, env_params, key) -> state`: what a meta-learner does before it is evaluated in an environment."""
    runs_mode: str | None = None
    """"map" where batching runs would execute every branch of them all; otherwise the toolkit chooses."""


threefry.register()  # here, since every agent's file imports this one before anything is compiled

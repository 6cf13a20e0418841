"""What users of Gymnasium put around an environment, as `--env-options`, in this order from the inside:

    sticky_actions=0.25    the action before is taken again with this chance (Machado et al., 2018, arXiv 1709.06009)
    scale_rewards=0.1      learners see rewards times this
    clip_rewards=1         learners see rewards cut to [-1, 1], after the scaling
    time_limit=200         an episode is cut after so many steps, where it has no `max_steps_in_episode` of its own
    frame_stack=4          the last 4 observations, the newest last, joined along their last axis (features, channels)
    time_aware=True        vectors end with the share of the time limit that has passed (Pardo et al., 2018, 1712.00378)

Evaluation, and what is recorded of episodes, is in the rewards as they were: where learners see others, these go along
as `info["unchanged_reward"]`. After a reset there are no other observations yet: the first stands in for them.
Observations that are tuples or dicts of arrays become vectors by themselves (`flat_observations`).
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from jaxrl_dist.configuration import require
from jaxrl_dist.envs.automatic_reset import reset_where
from jaxrl_dist.envs.wrapper import Wrapper
from jaxrl_dist.learning.spaces import kind_of, spaces_of

OPTIONS = {
    "sticky_actions": 0.0, "scale_rewards": 1.0, "clip_rewards": 0.0, "time_limit": 0, "frame_stack": 1,
    "time_aware": False,
}  # fmt: skip
"""Names and what leaves an environment as it is."""


def wrapped(
    env: Any, params: Any, sticky_actions: float = 0.0, scale_rewards: float = 1.0, clip_rewards: float = 0.0,
    time_limit: int = 0, frame_stack: int = 1, time_aware: bool = False,
) -> Any:  # fmt: skip
    """The environment with what is asked for around it; see the module's text. Raises ValueError for what cannot be."""
    require(0 <= sticky_actions < 1, f"sticky_actions is {sticky_actions}; it must be in [0, 1)")
    require(scale_rewards > 0, f"scale_rewards is {scale_rewards}; it must be above 0")
    require(clip_rewards >= 0, f"clip_rewards is {clip_rewards}; it must be at least 0, and 0 cuts nothing")
    require(time_limit >= 0, f"time_limit is {time_limit}; it must be at least 1, or 0 for none")
    require(frame_stack >= 1, f"frame_stack is {frame_stack}; it must be at least 1")
    has_limit = hasattr(params, "max_steps_in_episode")
    if sticky_actions:
        env = StickyActions(env, sticky_actions)
    if scale_rewards != 1 or clip_rewards:
        env = ChangedRewards(env, scale_rewards, clip_rewards)
    if time_limit:
        require(not has_limit, f"time_limit is {time_limit}, but {env.name} has max_steps_in_episode; set that")
        env = TimeLimit(env, time_limit)
    _, space = spaces_of(env, params)
    if frame_stack > 1:
        is_box = kind_of(space) in ("continuous", "integers") and len(space.shape) >= 1
        require(is_box, f"frame_stack is {frame_stack}, but observations of {env.name} are {kind_of(space)}")
        env = FrameStack(env, frame_stack)
    if time_aware:
        is_vector = kind_of(space) in ("continuous", "integers") and len(space.shape) == 1
        require(is_vector, f"time_aware is True, but observations of {env.name} are no vectors")
        require(has_limit, f"time_aware is True, but {env.name} has no max_steps_in_episode")
        env = TimeAware(env)
    return env


# -- with a memory ----------------------------------------------------------------------------------------------------


@struct.dataclass
class WrappedState:
    inner: Any
    memory: Any

    @property
    def time(self) -> jax.Array:
        return self.inner.time


@dataclasses.dataclass(frozen=True)
class Remembering(Wrapper):
    """A wrapper that remembers something of the episode.

    `fresh(observation, params)` is the memory at a reset, `following(memory, observation, params)` after a step to that
    observation; `shown(memory, observation, params)` is what is seen; `chosen(key, memory, action)` is the action that
    is taken and the memory then.
    """

    def fresh(self, observation: jax.Array, params: Any) -> Any:
        raise NotImplementedError

    def following(self, memory: Any, observation: jax.Array, params: Any) -> Any:
        return memory

    def shown(self, memory: Any, observation: jax.Array, params: Any) -> jax.Array:
        return observation

    def chosen(self, key: jax.Array, memory: Any, action: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        """Action, memory, and the key that is left for the environment."""
        return action, memory, key

    def _begin(self, observation: jax.Array, inner: Any, params: Any) -> tuple[jax.Array, WrappedState]:
        memory = self.fresh(observation, params)
        return self.shown(memory, observation, params), WrappedState(inner=inner, memory=memory)

    @partial(jax.jit, static_argnames=("self",))
    def reset(self, key: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        return self._begin(*self.env.reset(key, params), params)

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: WrappedState, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        action, memory, key = self.chosen(key, state.memory, action)
        observation, inner, reward, terminated, truncated, info = self.env.step(key, state.inner, action, params)
        final = info["final_observation"]
        memory = self.following(memory, final, params)
        going_on = self.shown(memory, final, params), WrappedState(inner=inner, memory=memory)
        begun = self._begin(observation, inner, params)
        observation, state = jax.tree.map(partial(jnp.where, terminated | truncated), begun, going_on)
        return observation, state, reward, terminated, truncated, info | {"final_observation": going_on[0]}

    @property
    def reset_env(self):
        inner = self.env.reset_env
        return lambda key, params: self._begin(*inner(key, params), params)

    @property
    def step_env(self):
        inner_step = self.env.step_env

        def step_env(key: jax.Array, state: WrappedState, action: jax.Array, params: Any) -> tuple:
            action, memory, key = self.chosen(key, state.memory, action)
            observation, inner, *rest = inner_step(key, state.inner, action, params)
            memory = self.following(memory, observation, params)
            return self.shown(memory, observation, params), WrappedState(inner=inner, memory=memory), *rest

        return step_env


@dataclasses.dataclass(frozen=True)
class StickyActions(Remembering):
    """The action before instead of the chosen one, with chance `repeat`; never in the first step of an episode."""

    repeat: float

    def fresh(self, observation: jax.Array, params: Any) -> Any:
        space = spaces_of(self.env, params)[0]
        return jnp.zeros(space.shape, space.dtype), jnp.zeros((), bool)

    def chosen(self, key: jax.Array, memory: Any, action: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        key, key_repeat = jax.random.split(key)
        before, is_there = memory
        action = jnp.where(is_there & jax.random.bernoulli(key_repeat, self.repeat), before, action)
        return action, (action.astype(before.dtype), jnp.ones((), bool)), key


@dataclasses.dataclass(frozen=True)
class FrameStack(Remembering):
    """The last `count` observations, `[..., n]` each, as `[..., count * n]`, the newest last."""

    count: int

    def observation_space(self, params: Any = None) -> spaces.Box:
        inner = self.env.observation_space(self.env.default_params if params is None else params)
        low, high = (
            jnp.concatenate([jnp.broadcast_to(bound, inner.shape)] * self.count, -1)
            for bound in (inner.low, inner.high)
        )
        return spaces.Box(low, high, low.shape, inner.dtype)

    def fresh(self, observation: jax.Array, params: Any) -> jax.Array:
        return jnp.stack([observation] * self.count)

    def following(self, memory: jax.Array, observation: jax.Array, params: Any) -> jax.Array:
        return jnp.concatenate([memory[1:], observation[None].astype(memory.dtype)])

    def shown(self, memory: jax.Array, observation: jax.Array, params: Any) -> jax.Array:
        return jnp.concatenate(list(memory), -1)


@dataclasses.dataclass(frozen=True)
class Counting(Remembering):
    """One that remembers how many steps an episode has had."""

    def fresh(self, observation: jax.Array, params: Any) -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def following(self, memory: jax.Array, observation: jax.Array, params: Any) -> jax.Array:
        return memory + 1


@dataclasses.dataclass(frozen=True)
class TimeAware(Counting):
    """Vectors `[n]` with the share of `max_steps_in_episode` that has passed at their end, `[n + 1]`."""

    def observation_space(self, params: Any = None) -> spaces.Box:
        inner = self.env.observation_space(self.env.default_params if params is None else params)
        low, high = (
            jnp.append(jnp.broadcast_to(bound, inner.shape).astype(jnp.float32), last)
            for bound, last in ((inner.low, 0.0), (inner.high, 1.0))
        )
        return spaces.Box(low, high, low.shape)

    def shown(self, memory: jax.Array, observation: jax.Array, params: Any) -> jax.Array:
        share = memory / jnp.asarray(params.max_steps_in_episode, jnp.float32)
        return jnp.append(observation.astype(jnp.float32), share)


@dataclasses.dataclass(frozen=True)
class TimeLimit(Counting):
    """An episode is truncated after `limit` steps."""

    limit: int

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: WrappedState, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        key, key_reset = jax.random.split(key)
        late = state.memory + 1 >= self.limit
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        going_on = ~(terminated | truncated)  # else the environment has begun another episode by itself
        observation, state = reset_where(self.reset, late & going_on, key_reset, params, observation, state)
        info = info | ({"truncated": truncated | late} if "truncated" in info else {})
        return observation, state, reward, terminated, truncated | late, info


# -- without ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ChangedRewards(Wrapper):
    """Rewards times `scale`, then cut to [-`bound`, `bound`] where that is above 0.

    What they were is `info["unchanged_reward"]`, for evaluations and records. A vector of rewards is scaled, too; it
    cannot be cut, since its parts would no longer add up.
    """

    scale: float
    bound: float

    def changed(self, reward: jax.Array, info: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        found = {"unchanged_reward": jnp.asarray(reward, jnp.float32)}
        if "rewards" in info:
            require(not self.bound, f"clip_rewards is {self.bound}, but {self.env.name} has a vector of rewards")
            found["rewards"] = self.scale * info["rewards"]
        reward = self.scale * jnp.asarray(reward, jnp.float32)
        return jnp.clip(reward, -self.bound, self.bound) if self.bound else reward, info | found

    @partial(jax.jit, static_argnames=("self",))
    def step(self, key: jax.Array, state: Any, action: jax.Array, params: Any = None) -> tuple:
        params = self.env.default_params if params is None else params
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        reward, info = self.changed(reward, info)
        return observation, state, reward, terminated, truncated, info

    @property
    def step_env(self):
        inner = self.env.step_env

        def step_env(key: jax.Array, state: Any, action: jax.Array, params: Any) -> tuple:
            observation, state, reward, terminated, info = inner(key, state, action, params)
            reward, info = self.changed(reward, info)
            return observation, state, reward, terminated, info

        return step_env


def flat_observations(env: Any, params: Any) -> Any:
    """The environment with vectors for observations that are tuples or dicts; `env` itself where they are others.

    Boxes are unrolled, a choice of n is a one-hot vector; dicts go by the order of their keys, as everywhere in JAX.
    Raises ValueError for other spaces among them.
    """
    _, space = spaces_of(env, params)
    return FlatObservations(env, _leaves(env, space)) if hasattr(space, "spaces") else env


def _leaves(env: Any, space: Any) -> tuple[tuple[int, bool], ...]:
    """Of each array, in order: how many numbers it becomes, and whether as a one-hot vector."""
    if hasattr(space, "spaces"):
        inner = space.spaces
        inner = [inner[name] for name in sorted(inner)] if hasattr(inner, "keys") else inner
        return tuple(leaf for each in inner for leaf in _leaves(env, each))
    kind = kind_of(space)
    allowed = kind in ("discrete", "continuous", "integers")
    require(allowed, f"observations of {env.name} hold {kind}; allowed: arrays, and choices of one number")
    return ((int(space.n), True) if kind == "discrete" else (int(np.prod(space.shape)), False),)


@dataclasses.dataclass(frozen=True)
class FlatObservations(Wrapper):
    """Observations of several arrays as one vector."""

    leaves: tuple[tuple[int, bool], ...]

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, (sum(size for size, _ in self.leaves),))

    def seen(self, observation: Any) -> jax.Array:
        parts = [
            jax.nn.one_hot(array, size) if one_hot else jnp.ravel(array)
            for array, (size, one_hot) in zip(jax.tree.leaves(observation), self.leaves, strict=True)
        ]
        return jnp.concatenate(parts).astype(jnp.float32)

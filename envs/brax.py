"""brax's environments under gymnax's contract.

Built on the bare environment: brax's own wrappers return every environment to its first state for ever, drop the last
observation of an episode and do not take typed keys. Here each episode starts from a fresh draw and
`info["final_observation"]` is the true successor.

Time limits are gymnax's way: `truncated` is `time >= max_steps_in_episode`, `terminated` is brax's own `done`; where
both happen on one step both are set, and a target that multiplies by `1 - terminated` lets the termination win.

brax takes actions in [-1, 1] for every environment and scales them to the actuators itself.

Resets are computed only where an episode ended (`automatic_reset.py`). Cost of the automatic reset beside the bare
physics step, hopper/spring, random actions, CPU time on one busy core (medians of 15 and 8 interleaved rounds):

| environments | bare        | gymnax's reset at every step | ours         | ended per step |
|--------------|-------------|------------------------------|--------------|----------------|
| 16           | 227 us/step | 366 us (+61 %)               | 286 us (+26 %) | 0.16         |
| 256          | 2155 us     | 2987 us (+39 %)              | 2304 us (+7 %) | 2.3          |

Random actions fall over after about a hundred steps; longer episodes cost less.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.envs.automatic_reset import ResetWhereEnded
from jaxrl_dist.envs.quiet import without_warp_lines

with without_warp_lines():
    from brax import envs as brax_envs
    from brax import fluid

# The swimmer's fluid model spells a bound of `clip` as `a_min`, which jax 0.10 removed (brax is no longer maintained).
fluid.jp = types.SimpleNamespace(**(vars(jnp) | {"clip": lambda x, a_min: jnp.maximum(x, a_min)}))


@struct.dataclass
class BraxState(environment.EnvState):
    time: jax.Array  # steps since the reset
    brax: brax_envs.State  # whole, since an environment may read any part of it in its next step


@struct.dataclass
class BraxParams(environment.EnvParams):
    max_steps_in_episode: int = 1000  # brax's own default for every environment


class Brax(ResetWhereEnded):
    """A bare brax environment (anything that fulfils `brax.envs.Env`) as a gymnax one."""

    def __init__(self, env: brax_envs.Env, name: str) -> None:
        super().__init__()
        self.env = env
        self._name = name
        observation = jax.eval_shape(env.reset, jax.random.key(0)).obs
        if not isinstance(observation, jax.ShapeDtypeStruct):
            raise ValueError(f"observation of {name} is a {type(observation).__name__}, allowed: one array")
        self._observation = observation

    @property
    def name(self) -> str:
        return self._name

    @property
    def default_params(self) -> BraxParams:
        return BraxParams()

    @property
    def num_actions(self) -> int:
        return self.env.action_size

    def action_space(self, params: BraxParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (self.env.action_size,))

    def observation_space(self, params: BraxParams | None = None) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, self._observation.shape, self._observation.dtype)

    def reset_env(self, key: jax.Array, params: BraxParams) -> tuple[jax.Array, BraxState]:
        state = self.env.reset(key)
        state = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)
        return state.obs, BraxState(time=jnp.zeros((), jnp.int32), brax=state)

    def step_env(
        self, key: jax.Array, state: BraxState, action: jax.Array, params: BraxParams
    ) -> tuple[jax.Array, BraxState, jax.Array, jax.Array, dict[str, Any]]:
        # brax writes into the metrics it is given: hand it a copy of the containers, or the caller's state changes.
        successor = self.env.step(jax.tree.map(lambda leaf: leaf, state.brax), action)
        # Some rewards and dones are Python numbers; in a loop every leaf must keep the type that the reset gave it.
        successor = jax.tree.map(lambda leaf, old: jnp.asarray(leaf, old.dtype), successor, state.brax)
        terminated = successor.done > 0
        info = {"metrics": successor.metrics}
        return successor.obs, BraxState(time=state.time + 1, brax=successor), successor.reward, terminated, info

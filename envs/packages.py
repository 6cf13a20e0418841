"""Environments of other packages, under gymnax's contract: Craftax, Navix, Jumanji and MuJoCo Playground.

    craftax/Craftax-Classic-Symbolic-v1    navix/Navix-DoorKey-8x8-v0    jumanji/Snake-v1    playground/CartpoleBalance

Any name that the package knows stands behind the slash; its constructor's arguments are `--env-options`. Each package
is an optional extra of the same name, imported only when one of its environments is made.

None is used as it comes: their own automatic resets lose the last observation of an episode, and Playground's and
Craftax's optimistic ones return to states that others began in. Here the bare environments are stepped, an episode
starts from a fresh draw, `info["final_observation"]` is the true successor, and a time limit truncates:

- craftax: the game's own limit (10,000 steps, 100,000 for the full game) becomes ours, and so no death.
- navix: its limit becomes ours (100 steps). Observations are those of the symbolic view, as floats.
- jumanji: structured observations become one vector, action masks and step counts among them; agents do not obey
  masks, and what an illegal action does is the environment's affair. Its episodes end by themselves, with a discount
  of 0 also at most of its own time limits: those are terminations, as its authors have it.
- playground: as brax's (`brax.py`), in MJX's own implementation also where warp is installed; of several observations
  the one called `state`. Playground fetches the models of robots from the internet, those of the control suite not.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.envs.automatic_reset import ResetWhereEnded
from jaxrl_dist.envs.factored import MultiDiscrete
from jaxrl_dist.learning.interaction import strengthen

NEVER = 2**30


class Bare(NamedTuple):
    """An environment of a package without its resets and limits.

    reset: raw key -> (observation, state); step: (raw key, state, action) -> (observation, state, reward, terminated,
    truncated).
    """

    reset: Callable
    step: Callable
    actions: Any
    limit: int = NEVER


@struct.dataclass
class PackageState(environment.EnvState):
    time: jax.Array
    inner: Any
    cut: jax.Array  # whether the environment itself truncated


@struct.dataclass
class PackageParams(environment.EnvParams):
    max_steps_in_episode: int = NEVER


class Packaged(ResetWhereEnded):
    """`Bare` with a time limit and with resets only where an episode ended (`automatic_reset.py`)."""

    def __init__(self, name: str, bare: Bare) -> None:
        super().__init__()
        self._name, self.bare = name, bare
        self.observed = jax.eval_shape(bare.reset, jax.random.PRNGKey(0))[0]

    @property
    def name(self) -> str:
        return self._name

    @property
    def default_params(self) -> PackageParams:
        return PackageParams(max_steps_in_episode=self.bare.limit)

    @property
    def num_actions(self) -> int:
        return getattr(self.bare.actions, "n", None) or self.bare.actions.shape[0]

    def action_space(self, params: PackageParams | None = None) -> Any:
        return self.bare.actions

    def observation_space(self, params: PackageParams | None = None) -> spaces.Box:
        return spaces.Box(-np.inf, np.inf, self.observed.shape, jnp.float32)

    def reset_env(self, key: jax.Array, params: PackageParams) -> tuple[jax.Array, PackageState]:
        observation, inner = self.bare.reset(jax.random.key_data(key))
        state = PackageState(time=jnp.zeros((), jnp.int32), inner=strengthen(inner), cut=jnp.zeros((), bool))
        return observation.astype(jnp.float32), state

    def step_env(
        self, key: jax.Array, state: PackageState, action: jax.Array, params: PackageParams
    ) -> tuple[jax.Array, PackageState, jax.Array, jax.Array, dict[str, Any]]:
        found = self.bare.step(jax.random.key_data(key), state.inner, action)
        observation, inner, reward, terminated, truncated = found
        inner = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), inner, state.inner)
        following = PackageState(time=state.time + 1, inner=inner, cut=jnp.asarray(truncated, bool))
        reward = jnp.asarray(reward, jnp.float32)
        return observation.astype(jnp.float32), following, reward, jnp.asarray(terminated, bool), {}

    def is_truncated(self, state: PackageState, params: PackageParams) -> jax.Array:
        return state.cut | (state.time >= params.max_steps_in_episode)


def make(env_id: str, **options: Any) -> environment.Environment:
    """`package/NAME` with arguments of its constructor; ConfigurationError where the package or the name is missing."""
    package, _, name = env_id.partition("/")
    module = {"playground": "mujoco_playground"}.get(package, package)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"--env-id is {env_id!r}, which needs the package {package}: pip install 'jaxrl_dist[{package}]' ({error})"
        ) from None
    try:
        return MAKERS[package](found, env_id, name, options)
    except (ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise ConfigurationError(f"--env-id is {env_id!r}, which {package} cannot make: {error}") from None


# -- the packages -----------------------------------------------------------------------------------------------------


def _craftax(package: Any, env_id: str, name: str, options: dict[str, Any]) -> Packaged:
    env = importlib.import_module("craftax.craftax_env").make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(**options)
    limit, endless = int(params.max_timesteps), params.replace(max_timesteps=NEVER)

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
        observation, state, reward, died, _ = env.step_env(key, state, action, endless)
        return observation, state, reward, died, False

    actions = spaces.Discrete(env.num_actions)
    return Packaged(env_id, Bare(lambda key: env.reset_env(key, endless), step, actions, limit))


def _navix(package: Any, env_id: str, name: str, options: dict[str, Any]) -> Packaged:
    limit = int(options.pop("max_steps", 100))
    env = package.make(name, max_steps=NEVER, **options)

    def reset(key: jax.Array) -> tuple:
        timestep = env.reset(key)
        return timestep.observation, timestep

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
        # What moves by chance draws from the key that the state holds.
        timestep = env._step(state.replace(state=state.state.replace(key=key)), action)
        return timestep.observation, timestep, timestep.reward, timestep.is_termination(), False

    return Packaged(env_id, Bare(reset, step, spaces.Discrete(len(env.action_set)), limit))


def _jumanji(package: Any, env_id: str, name: str, options: dict[str, Any]) -> Packaged:
    env = package.make(name, **options)

    def flat(observation: Any) -> jax.Array:
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(observation)])

    def reset(key: jax.Array) -> tuple:
        state, timestep = env.reset(key)
        return flat(timestep.observation), state

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
        state, timestep = env.step(state, action)
        over = timestep.discount == 0
        return flat(timestep.observation), state, timestep.reward, over, timestep.last() & ~over

    spec = env.action_spec
    if np.ndim(getattr(spec, "num_values", None)) == 1:
        actions = MultiDiscrete(tuple(int(count) for count in spec.num_values))
    elif hasattr(spec, "num_values"):
        if np.ndim(spec.num_values):
            raise ValueError(f"its actions have shape {spec.shape}; one choice, or a vector of them, is allowed")
        actions = spaces.Discrete(int(spec.num_values))
    else:
        actions = spaces.Box(spec.minimum, spec.maximum, spec.shape)
    if env.reward_spec.shape != ():
        raise ValueError(f"its rewards have shape {env.reward_spec.shape}: it has several agents")
    return Packaged(env_id, Bare(reset, step, actions))


def _playground(package: Any, env_id: str, name: str, options: dict[str, Any]) -> Packaged:
    config = package.registry.get_default_config(name)
    env = package.registry.load(name, config_overrides={"impl": "jax"} | options)

    def seen(observation: Any) -> jax.Array:
        return observation["state"] if isinstance(observation, dict) else observation

    def reset(key: jax.Array) -> tuple:
        state = env.reset(key)
        return seen(state.obs), state

    def step(key: jax.Array, state: Any, action: jax.Array) -> tuple:
        state = env.step(jax.tree.map(lambda leaf: leaf, state), action)
        return seen(state.obs), state, state.reward, state.done > 0, False

    actions = spaces.Box(-1.0, 1.0, (env.action_size,))
    return Packaged(env_id, Bare(reset, step, actions, int(config.episode_length)))


MAKERS = {"craftax": _craftax, "navix": _navix, "jumanji": _jumanji, "playground": _playground}

"""Actions of several choices at once: a space for them, a toy process, and boxes of continuous actions cut into bins.

`FactoredMDP` is made of equal processes that go on side by side, one per factor of the action. Each is at one of a few
states; of a factor's choices one is right there, and takes it on to the next state, while every other takes it back to
the first. All that is paid is the mean over factors of what is right, so that an agent must find out by itself whose
choice it was. With the default, `end_probability` 1, every episode is one step long and a factor's state is drawn
evenly: utilities of each factor represent the values exactly.

    right         a_i = s_i mod bins
    reward        mean over i of 1{right}, with `sparse` of 1{right and s_i is the last state}, plus normal noise
    successor     s_i + 1 where right, around to 0 from the last state, else 0

`discretise_actions` makes any box of continuous actions such a space: each component has `bins` values evenly from its
lowest to its highest; 3 of them are "bang-off-bang" (Seyde et al., "Is Bang-Bang Control All You Need?", arXiv
2111.02552). In the registry it is `discretised/` before any name whose actions are a box.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require
from jaxrl_dist.envs.wrapper import Wrapper
from jaxrl_dist.learning.spaces import kind_of, spaces_of


class MultiDiscrete(spaces.Space):
    """One choice for each of several factors: int32 `[factors]`, component i from 0 to nvec[i] - 1, as Gymnasium's."""

    def __init__(self, nvec: tuple[int, ...]) -> None:
        self.nvec = tuple(int(count) for count in nvec)
        self.shape, self.dtype = (len(self.nvec),), jnp.int32
        require(
            bool(self.nvec) and min(self.nvec) >= 1, f"nvec is {self.nvec}, allowed: one or more counts, 1 and above"
        )

    def sample(self, key: jax.Array) -> jax.Array:
        return jax.random.randint(key, self.shape, 0, jnp.array(self.nvec), jnp.int32)

    def contains(self, x: jax.Array) -> jax.Array:
        return jnp.all((x >= 0) & (x < jnp.array(self.nvec)))

    def __repr__(self) -> str:
        return f"MultiDiscrete({list(self.nvec)})"


# -- the toy process --------------------------------------------------------------------------------------------------


@struct.dataclass
class FactoredState(environment.EnvState):
    time: jax.Array
    places: jax.Array
    """of every factor, `[factors]`"""
    ended: jax.Array


@struct.dataclass
class FactoredParams(environment.EnvParams):
    max_steps_in_episode: int = 100
    end_probability: float = 1.0
    """with which a step is the last one, whatever was done"""
    reward_noise: float = 0.0
    """standard deviation of what is added to rewards"""


class FactoredMDP(environment.Environment[FactoredState, FactoredParams]):
    """See the module's text. Observations are `[factors * states]`, one-hot for each factor."""

    def __init__(self, factors: int = 4, bins: int = 3, states: int = 3, sparse: bool = False) -> None:
        super().__init__()
        for name, value in (("factors", factors), ("bins", bins), ("states", states)):
            least = 1 if name == "factors" else 2
            require(value >= least, f"{name} is {value}, allowed: {least} and above")
        self.factors, self.bins, self.states, self.sparse = factors, bins, states, sparse

    @property
    def name(self) -> str:
        return "factored"

    @property
    def default_params(self) -> FactoredParams:
        return FactoredParams()

    @property
    def num_actions(self) -> int:
        return self.factors

    def reset_env(self, key: jax.Array, params: FactoredParams) -> tuple[jax.Array, FactoredState]:
        places = jax.random.randint(key, (self.factors,), 0, self.states, jnp.int32)
        state = FactoredState(time=jnp.zeros((), jnp.int32), places=places, ended=jnp.zeros((), bool))
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: FactoredState, action: jax.Array, params: FactoredParams
    ) -> tuple[jax.Array, FactoredState, jax.Array, jax.Array, dict[str, Any]]:
        noise_key, end_key = jax.random.split(key)
        right = action == self.right(state.places)
        paid = right & (state.places == self.states - 1) if self.sparse else right
        reward = paid.mean(dtype=jnp.float32) + params.reward_noise * jax.random.normal(noise_key)
        places = jnp.where(right, (state.places + 1) % self.states, 0)
        ended = jax.random.uniform(end_key) < params.end_probability
        state = FactoredState(time=state.time + 1, places=places, ended=ended)
        return self.observe(key, state, action, params), state, reward, ended, {}

    def observe(self, key: jax.Array, state: FactoredState, action: Any, params: FactoredParams) -> jax.Array:
        return jax.nn.one_hot(state.places, self.states, dtype=jnp.float32).reshape(-1)

    def right(self, places: jax.Array) -> jax.Array:
        """The right choice of every factor, in places `[...]`; no other action is ever better."""
        return places % self.bins

    def places_of(self, observation: jax.Array) -> jax.Array:
        """The places that an observation `[..., factors * states]` shows, `[..., factors]`."""
        return observation.reshape(*observation.shape[:-1], self.factors, self.states).argmax(-1)

    def is_terminated(self, state: FactoredState, params: FactoredParams) -> jax.Array:
        return state.ended

    def picture(self, state: FactoredState, params: FactoredParams) -> np.ndarray:
        """A column of states for each factor, with the present one filled, for `rendering`."""
        from jaxrl_dist.records.canvas import Board
        from jaxrl_dist.records.plotting import COLOURS, INK

        board = Board(self.states, self.factors, tallest=130)
        for factor, place in enumerate(np.asarray(state.places)):
            for row in range(self.states):
                board.cell(row, factor, COLOURS[0] if row == place else "#F3F4F6", gap=0.06)
                words = f"{int(self.right(row))} is right"
                board.text((factor, row), words, "white" if row == place else INK, size=min(8, 44 / self.factors))
        return board.array()

    def action_space(self, params: FactoredParams | None = None) -> MultiDiscrete:
        return MultiDiscrete((self.bins,) * self.factors)

    def observation_space(self, params: FactoredParams | None = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.factors * self.states,))


# -- continuous actions in bins ---------------------------------------------------------------------------------------


def discretise_actions(env: Any, params: Any, bins: int = 3) -> "DiscretisedActions":
    """An environment of continuous actions in Box(-1, 1), `[factors]`, with `bins` choices for each component.

    Raises ConfigurationError for other actions and for less than 2 bins.
    """
    require(bins >= 2, f"bins is {bins}, allowed: 2 and above")
    space, _ = spaces_of(env, params)
    kind = kind_of(space)
    they = f"have shape {space.shape}" if kind == "continuous" else f"are {kind}"
    require(
        kind == "continuous" and len(space.shape) == 1 and space.shape[0] > 0,
        f"--env-id is discretised/{env.name}, but the actions of {env.name} {they}; bins are for vectors of continuous "
        "ones",
    )
    return DiscretisedActions(env, (bins,) * space.shape[0])


@dataclasses.dataclass(frozen=True)
class DiscretisedActions(Wrapper):
    """An environment that takes the number of a bin for each component of its actions."""

    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"discretised/{self.env.name}"

    @property
    def num_actions(self) -> int:
        return len(self.counts)

    def action_space(self, params: Any = None) -> MultiDiscrete:
        return MultiDiscrete(self.counts)

    def inner_action(self, action: jax.Array, params: Any) -> jax.Array:
        """Numbers of bins `[..., factors]` as values in [-1, 1], those of the lowest and the highest bin."""
        return 2 * action / (np.array(self.counts, np.float32) - 1) - 1

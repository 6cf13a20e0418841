"""One environment, seven tiny cases with known values: each case that fails points at one kind of bug.

The case is a field of the parameters, so it may be traced: one compiled training program tests them all, or a `vmap`
over parameters runs them side by side. Observations are `[1]` in Box(-1, 1); actions are `[1]` in Box(-1, 1), or one
of `discrete_actions` integers. `gamma` is the learner's discount, `a` the action, `o` the observation.

| case                 | observation   | reward         | ends after | value           | what a miss means           |
|----------------------|---------------|----------------|------------|-----------------|-----------------------------|
| `constant`           | 0             | 1              | 1 step     | 1               | loss or optimiser           |
| `observation`        | random ±1     | o              | 1 step     | o               | network blind to its input  |
| `discounting`        | 0, then 1     | 0, then 1      | 2 steps    | gamma, then 1   | bootstrap or discount       |
| `action`             | 0             | -(a - 0.5)^2   | 1 step     | 0 at a = 0.5    | policy improvement          |
| `action_observation` | random ±1     | -(a - 0.5 o)^2 | 1 step     | 0 at a = 0.5 o  | states, actions mixed up    |
| `time_limit`         | 0             | 1              | time limit | 1 / (1 - gamma) | time-out taken as the end   |
| `final_observation`  | ±1, all along | o              | time limit | o / (1 - gamma) | bootstrap from next episode |

With discrete actions the fourth and fifth case pay 1 for the right action (1; 1 where o > 0, else 0) and -1 otherwise:
their value is 1. The observation at a termination repeats the last one, so that bootstrapping from it shows.
The first five are Andy Jones' probe environments (*Debugging RL, without the agonizing pain*, 2021).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces

CASES = (
    "constant",
    "observation",
    "discounting",
    "action",
    "action_observation",
    "time_limit",
    "final_observation",
)
CONSTANT, OBSERVATION, DISCOUNTING, ACTION, ACTION_OBSERVATION, TIME_LIMIT, FINAL_OBSERVATION = range(len(CASES))


@struct.dataclass
class ProbeState(environment.EnvState):
    time: jax.Array  # steps since the reset
    sign: jax.Array  # ±1, drawn at each reset


@struct.dataclass
class ProbeParams(environment.EnvParams):
    max_steps_in_episode: int = 10
    case: int = CONSTANT


def probe_params(case: str | int, max_steps_in_episode: int = 10) -> ProbeParams:
    """Parameters of a case, by its name or its place in `CASES`. Raises ValueError for any other."""
    if case in CASES:
        case = CASES.index(case)
    if type(case) is not int or not 0 <= case < len(CASES):
        raise ValueError(f"case is {case!r}, allowed: {', '.join(CASES)}, or 0 to {len(CASES) - 1}")
    return ProbeParams(max_steps_in_episode=max_steps_in_episode, case=case)


class Probe(environment.Environment[ProbeState, ProbeParams]):
    """See the module's table. `discrete_actions`: 0 for continuous actions, else the number of actions, 2 at least."""

    def __init__(self, discrete_actions: int = 0) -> None:
        super().__init__()
        if discrete_actions < 0 or discrete_actions == 1:
            raise ValueError(f"discrete_actions is {discrete_actions}, allowed: 0 (continuous) or 2 and above")
        self.discrete_actions = discrete_actions

    @property
    def name(self) -> str:
        return "probe"

    @property
    def default_params(self) -> ProbeParams:
        return ProbeParams()

    @property
    def num_actions(self) -> int:
        return self.discrete_actions or 1

    def reset_env(self, key: jax.Array, params: ProbeParams) -> tuple[jax.Array, ProbeState]:
        sign = jax.random.rademacher(key, (), jnp.float32)
        state = ProbeState(time=jnp.zeros((), jnp.int32), sign=sign)
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: ProbeState, action: jax.Array, params: ProbeParams
    ) -> tuple[jax.Array, ProbeState, jax.Array, jax.Array, dict[str, Any]]:
        reward = self._reward(params, self.observe(key, state, None, params), action)
        state = state.replace(time=state.time + 1)
        terminated = self.is_terminated(state, params)
        return self.observe(key, state, action, params), state, reward, terminated, {}

    def observe(self, key: jax.Array, state: ProbeState, action: Any, params: ProbeParams) -> jax.Array:
        shows_sign = _is_one_of(params.case, OBSERVATION, ACTION_OBSERVATION, FINAL_OBSERVATION)
        shows_time = _is_one_of(params.case, DISCOUNTING)
        time = jnp.minimum(state.time, 1).astype(jnp.float32)
        return jnp.where(shows_sign, state.sign, jnp.where(shows_time, time, jnp.float32(0)))[None]

    def is_terminated(self, state: ProbeState, params: ProbeParams) -> jax.Array:
        length = jnp.where(_is_one_of(params.case, DISCOUNTING), 2, 1)
        return ~_is_one_of(params.case, TIME_LIMIT, FINAL_OBSERVATION) & (state.time >= length)

    def picture(self, state: ProbeState, params: ProbeParams) -> Any:
        """The case, its steps in a row and the sign that it drew, for `rendering`."""
        from jaxrl_dist.envs.drawings import beads

        canvas = beads(int(params.max_steps_in_episode) + 1, int(state.time))
        sign = "+1" if float(state.sign) > 0 else "\N{MINUS SIGN}1"
        canvas.text((0, 0.85), f"{CASES[int(params.case)]}, sign {sign}", anchor="lm", size=9)
        return canvas.array()

    def action_space(self, params: ProbeParams | None = None) -> spaces.Box | spaces.Discrete:
        return spaces.Discrete(self.discrete_actions) if self.discrete_actions else spaces.Box(-1.0, 1.0, (1,))

    def observation_space(self, params: ProbeParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (1,))

    def _reward(self, params: ProbeParams, observation: jax.Array, action: jax.Array) -> jax.Array:
        """Reward `[...]` of `action`, `[..., 1]` or for discrete actions `[...]`, at `observation` `[..., 1]`."""
        seen = observation[..., 0]
        best = self.optimal_action(params, observation)
        if self.discrete_actions:
            closeness = jnp.where(action == best, jnp.float32(1), jnp.float32(-1))
        else:
            closeness = -((action[..., 0] - best[..., 0]) ** 2)
        pays_action = _is_one_of(params.case, ACTION, ACTION_OBSERVATION)
        pays_seen = _is_one_of(params.case, OBSERVATION, DISCOUNTING, FINAL_OBSERVATION)
        reward = jnp.where(pays_action, closeness, jnp.where(pays_seen, seen, jnp.float32(1)))
        return reward.astype(jnp.float32)

    def optimal_action(self, params: ProbeParams, observation: jax.Array) -> jax.Array:
        """Best action at `observation` `[..., 1]`, like an action; cases in which no action matters name one too."""
        by_observation = _is_one_of(params.case, ACTION_OBSERVATION)
        if self.discrete_actions:
            return jnp.where(by_observation, observation[..., 0] > 0, True).astype(jnp.int32)
        return 0.5 * jnp.where(by_observation, observation, jnp.ones_like(observation))

    def action_value(
        self, params: ProbeParams, observation: jax.Array, action: jax.Array, gamma: float | jax.Array
    ) -> jax.Array:
        """Q*, `[...]`: the discounted return of `action` at `observation` `[..., 1]` and of best actions after it."""
        reward = self._reward(params, observation, action)
        before_the_end = _is_one_of(params.case, DISCOUNTING) & (observation[..., 0] == 0)
        endless = _is_one_of(params.case, TIME_LIMIT, FINAL_OBSERVATION)
        return jnp.where(before_the_end, gamma, jnp.where(endless, reward / (1 - gamma), reward))

    def optimal_value(self, params: ProbeParams, observation: jax.Array, gamma: float | jax.Array) -> jax.Array:
        """V*, `[...]`, at `observation` `[..., 1]`: the discounted return of best actions, beyond any time limit."""
        return self.action_value(params, observation, self.optimal_action(params, observation), gamma)


def _is_one_of(case: int | jax.Array, *cases: int) -> jax.Array:
    return jnp.isin(case, jnp.array(cases))

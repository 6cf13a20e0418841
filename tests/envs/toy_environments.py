"""A third party's environment, neither ours nor a subclass of gymnax's, that keeps the contract; and broken ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class LineParams:
    max_steps_in_episode: int = 20


@struct.dataclass
class LineState:
    position: jax.Array
    time: jax.Array


class Line:
    """Walk on a line from a random start; the reward is the height. Ends where |position| reaches 9."""

    name = "Line"
    default_params = LineParams()
    bound = 1.0

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-self.bound, self.bound, (1,))

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-10.0, 10.0, (1,))

    def start(self, key: jax.Array) -> LineState:
        return LineState(jax.random.uniform(key, (), minval=-1, maxval=1), jnp.zeros((), jnp.int32))

    def observe(self, state: LineState) -> jax.Array:
        return state.position[None]

    def move(self, key: jax.Array, state: LineState, action: jax.Array) -> LineState:
        position = jnp.clip(state.position + 0.1 * action[0], -10, 10)
        return state.replace(position=position, time=state.time + 1)

    def ends(self, state: LineState, params: LineParams) -> tuple[jax.Array, jax.Array]:
        return jnp.abs(state.position) >= 9, state.time >= params.max_steps_in_episode

    def restart(self, key: jax.Array, old: LineState, successor: LineState) -> LineState:
        return self.start(key)

    def reset(self, key: jax.Array, params: LineParams) -> tuple:
        state = self.start(key)
        return self.observe(state), state

    def step(self, key: jax.Array, state: LineState, action: jax.Array, params: LineParams) -> tuple:
        key_move, key_start = jax.random.split(key)
        successor = self.move(key_move, state, action)
        terminated, truncated = self.ends(successor, params)
        fresh = self.restart(key_start, state, successor)
        after = jax.tree.map(lambda a, b: jnp.where(terminated | truncated, a, b), fresh, successor)
        info = {"final_observation": self.observe(successor)}
        return self.observe(after), after, successor.position, terminated, truncated, info


class WideLine(Line):
    """The same with actions in [-0.5, 2]."""

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(jnp.array([-0.5]), jnp.array([2.0]), (1,))

    def step(self, key: jax.Array, state: LineState, action: jax.Array, params: LineParams) -> tuple:
        observation, state, reward, *flags, info = super().step(key, state, action, params)
        return observation, state, reward, *flags, info | {"action": action}


class DeterministicLine(Line):
    def start(self, key: jax.Array) -> LineState:
        return LineState(jnp.float32(0), jnp.zeros((), jnp.int32))


# Every class below breaks one rule; its docstring is a part of the finding that `check_env` must report.


class Results(Line):
    """Changes the results of a correct step."""

    def step(self, *arguments: Any) -> tuple:
        return self.change(*super().step(*arguments))


class FiveResults(Results):
    """step must return"""

    def change(self, observation, state, reward, terminated, truncated, info):
        return observation, state, reward, terminated | truncated, info


class NoFinalObservation(Results):
    """no 'final_observation'"""

    def change(self, *results):
        return *results[:5], {}


class IntegerReward(Results):
    """reward is int32[]"""

    def change(self, observation, state, reward, *rest):
        return observation, state, jnp.int32(1), *rest


class RewardVector(Results):
    """reward is float32[1]"""

    def change(self, observation, state, reward, *rest):
        return observation, state, reward[None], *rest


class FloatFlag(Results):
    """terminated is float32[]"""

    def change(self, observation, state, reward, terminated, *rest):
        return observation, state, reward, terminated.astype(jnp.float32), *rest


class InfiniteReward(Results):
    """a reward is not finite"""

    def change(self, observation, state, reward, *rest):
        return observation, state, jnp.where(state.time == 2, jnp.inf, reward), *rest


class FinalIsNext(Results):
    """at the time limit is not the successor"""

    def change(self, observation, state, reward, terminated, truncated, info):
        return observation, state, reward, terminated, truncated, {"final_observation": observation}


class FinalIsWrong(Results):
    """is not the successor on a step that ends no episode"""

    def change(self, *results):
        return *results[:5], {"final_observation": results[5]["final_observation"] * 0}


class WideActions(Line):
    """allowed: Discrete, or Box(-1, 1)"""

    bound = 2.0


class UnboundedActions(Line):
    """Box(low=-inf, high=inf, shape=(1,), dtype=float32) (continuous), allowed: Discrete, or Box(-1, 1)"""

    bound = np.inf


class SeveralActions(Line):
    """(a tuple), allowed: Discrete, or Box(-1, 1)"""

    def action_space(self, params: Any = None) -> spaces.Tuple:
        return spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3)))


class DictObservations(Line):
    """(a dict), allowed: Box"""

    def observation_space(self, params: Any = None) -> spaces.Dict:
        return spaces.Dict({"position": super().observation_space(params)})


class NumberedStates(Line):
    """(discrete), allowed: Box (see envs.one_hot_observations"""

    def observation_space(self, params: Any = None) -> spaces.Discrete:
        return spaces.Discrete(20)


class SpaceBranches(Line):
    """cannot be used while an agent is traced: TracerBoolConversionError"""

    def observation_space(self, params: Any = None) -> spaces.Box:
        high = 10.0 * jnp.ones(1)
        return spaces.Box(-high, high if high[0] > 0 else -high, (1,))


class WrongSpaceShape(Line):
    """observation is float32[1], but observation_space"""

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-10.0, 10.0, (2,))


class OutsideSpace(Line):
    """an observation lies outside"""

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-0.1, 0.1, (1,))


class ChangingDtype(Line):
    """state.time is float32[] in step, but int32[] after reset"""

    def move(self, key, state, action):
        moved = super().move(key, state, action)
        return moved.replace(time=moved.time.astype(jnp.float32))


class ChangingStructure(Results):
    """state has another structure in step"""

    def change(self, observation, state, *rest):
        return observation, (state, state.time), *rest


class PythonBranch(Line):
    """step cannot be traced: TracerBoolConversionError"""

    def move(self, key, state, action):
        return super().move(key, state, action if state.position > 0 else -action)


class NumpyRandom(Line):
    """the same key gives different results"""

    random = np.random.default_rng(0)

    def start(self, key):
        return super().start(key).replace(position=jnp.float32(self.random.uniform()))


class Remembers(Line):
    """the same key gives different results"""

    calls = 0

    def move(self, key, state, action):
        self.calls += 1
        return super().move(key, state, action + 0.1 * self.calls)


class BatchSensitive(Line):
    """under jit(vmap(...)) than called plainly"""

    def move(self, key, state, action):
        if isinstance(action, jax.core.Tracer):  # as a function whose jitted and plain paths have drifted apart
            action = action + 0.5
        return super().move(key, state, action)


class TracersOnly(Line):
    """fails when called plainly"""

    def start(self, key):
        return super().start(key).replace(time=0)  # a Python number has no `astype`, a tracer of it has

    def move(self, key, state, action):
        moved = super().move(key, state, action)
        return moved.replace(time=moved.time.astype(jnp.int32))


class LimitTerminates(Line):
    """terminated is set by the time limit"""

    def ends(self, state, params):
        terminated, truncated = super().ends(state, params)
        return terminated | truncated, truncated


class NeverTruncates(Line):
    """truncated is not set at max_steps_in_episode"""

    def ends(self, state, params):
        return super().ends(state, params)[0], jnp.array(False)


class TruncatesEarly(Line):
    """truncated is set at step 3 of an episode"""

    def ends(self, state, params):
        return super().ends(state, params)[0], state.time >= params.max_steps_in_episode - 1


class KeepsTime(Line):
    """a reset must set the step count to 0"""

    def restart(self, key, old, successor):
        return self.start(key).replace(time=successor.time)


class NeverResets(Line):
    """observation is still the final one"""

    def restart(self, key, old, successor):
        return successor.replace(time=jnp.zeros_like(successor.time))


class SameStartForAll(Line):
    """is the same whatever the key"""

    def restart(self, key, old, successor):
        return self.start(jax.random.key(0))


class WrongStart(DeterministicLine):
    """observation is not that of a reset"""

    def restart(self, key, old, successor):
        return self.start(key).replace(position=jnp.float32(1))


@struct.dataclass
class CachedState(LineState):
    first: jax.Array


class CachedStart(Line):
    """is the first one of its lane again"""  # as brax's AutoResetWrapper does

    def start(self, key):
        state = super().start(key)
        return CachedState(state.position, state.time, first=state.position)

    def restart(self, key, old, successor):
        return CachedState(old.first, jnp.zeros_like(old.time), old.first)


BROKEN = [
    FiveResults,
    NoFinalObservation,
    IntegerReward,
    RewardVector,
    FloatFlag,
    InfiniteReward,
    FinalIsNext,
    FinalIsWrong,
    WideActions,
    UnboundedActions,
    SeveralActions,
    DictObservations,
    NumberedStates,
    SpaceBranches,
    WrongSpaceShape,
    OutsideSpace,
    ChangingDtype,
    ChangingStructure,
    PythonBranch,
    NumpyRandom,
    Remembers,
    BatchSensitive,
    TracersOnly,
    LimitTerminates,
    NeverTruncates,
    TruncatesEarly,
    KeepsTime,
    NeverResets,
    SameStartForAll,
    WrongStart,
    CachedStart,
]


class WeakTime(Line):
    """Correct, but its step count is a Python number after reset: a warning, not an error."""

    def start(self, key):
        return super().start(key).replace(time=0)

    def move(self, key, state, action):
        moved = super().move(key, state, action)
        return moved.replace(time=jnp.asarray(moved.time, jnp.int32))

    def restart(self, key, old, successor):
        return self.start(key).replace(time=jnp.zeros((), jnp.int32))


class BoundsByJax(Line):
    """Correct: agents ask for the bounds outside of their trace."""

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-jnp.ones(1), jnp.ones(1), (1,))


class ShowsLimit(Line):
    """Correct, but the limit means two things: the part of the results named `part` shows the share that has passed."""

    part = "observation"

    def step(self, key: jax.Array, state: LineState, action: jax.Array, params: LineParams) -> tuple:
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        passed = state.time / params.max_steps_in_episode
        if self.part == "observation":
            observation, info = observation + passed, {"final_observation": info["final_observation"] + passed}
        elif self.part == "reward":
            reward += passed
        elif self.part == "terminated":
            terminated |= passed > 0.5
        return observation, state, reward, terminated, truncated, info


class StartsByLimit(Line):
    """The same in the state that a reset draws."""

    def reset(self, key: jax.Array, params: LineParams) -> tuple:
        state = self.start(key)
        state = state.replace(position=state.position / params.max_steps_in_episode)
        return self.observe(state), state


class HidesLimit(environment.Environment):
    """The same in a part of the state that shows one step later; with a `step_env`, as gymnax's own have it."""

    default_params = LineParams()

    def reset_env(self, key: jax.Array, params: LineParams) -> tuple:
        state = LineState(jax.random.uniform(key, (), minval=-1, maxval=1), jnp.zeros((), jnp.int32))
        return state.position[None], state

    def step_env(self, key: jax.Array, state: LineState, action: jax.Array, params: LineParams) -> tuple:
        successor = LineState(state.position + 1 / params.max_steps_in_episode, state.time + 1)
        return state.position[None], successor, state.position, jnp.array(False), {}

    def action_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (1,))

    def observation_space(self, params: Any = None) -> spaces.Box:
        return spaces.Box(-10.0, 10.0, (1,))


class CountsByLimit(Line):
    """A limit that must be a number while the environment is traced."""

    def step(self, key: jax.Array, state: LineState, action: jax.Array, params: LineParams) -> tuple:
        return super().step(key, state, action / len(range(params.max_steps_in_episode)), params)

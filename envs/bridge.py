"""A walk over a canyon whose best lane depends on the attitude to risk, with every return distribution in closed form.

Lane 0 lies along the rock wall: slow and safe. The last lane is the edge: fast, and slippery. Each step first chooses
a lane (action 0 keeps it, 1 goes one lane towards the wall, 2 one towards the edge; beyond the outer lanes nothing
moves) and then walks one column on in that lane: it pays the lane's cost, and with the lane's slip probability the
walker falls, which costs `fall_cost` and ends the episode. Past the last column wait `goal_reward` and the end.
Ledges part the lanes: from the open ground of column 0 every choice is free, later a change costs `climb_cost`, so that
the first action weighs as much as the whole walk. The walk starts in the middle; a state is a column and a lane.

What each risk measure chooses with the default parameters, for discounts 0.99 and 1 alike; values and gaps are for
0.99, in units of return. The gap is the value of the best first action over the second best; a walk in the middle
lane falls with probability 9 %, one along the edge with 52 %:

| risk       | lane   | value | gap  |
|------------|--------|-------|------|
| wang:0.75  | edge   |  3.82 | 2.82 |
| neutral    | edge   | -1.40 | 0.91 |
| cvar:0.75  | middle | -2.74 | 1.13 |
| cvar:0.5   | middle | -3.60 | 0.94 |
| wang:-0.4  | middle | -3.59 | 0.94 |
| wang:-0.5  | middle | -4.02 | 0.52 |
| wang:-0.75 | wall   | -4.53 | 0.73 |
| cvar:0.25  | wall   | -4.53 | 1.64 |
| wang:-1    | wall   | -4.53 | 2.09 |
| cvar:0.1   | wall   | -4.53 | 2.26 |

In these rows two criteria agree, which in general differ: `risk_policy`, what an agent learns that acts greedily by
the risk of the return from each state on, and `best_static_path`, best for the risk of the return from the start.

All exact results are NumPy arrays in float64. Paths are the lanes walked, `[length]`; policies are actions,
`[length, lanes]`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.risk import Risk

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDEWAYS = (0, -1, 1)  # what each action adds to the lane
LONGEST_SEARCH = 10  # 3^10 paths


@struct.dataclass
class BridgeState(environment.EnvState):
    time: jax.Array  # steps since the reset, which is the column
    lane: jax.Array
    fallen: jax.Array


@struct.dataclass
class BridgeParams(environment.EnvParams):
    max_steps_in_episode: int = 7
    step_costs: tuple[float, ...] = (2.4, 1.8, 0.2)  # per lane, from the wall to the edge
    slips: tuple[float, ...] = (0.0, 0.015, 0.115)  # per lane: the probability to fall in one step
    climb_cost: float = 2.0
    fall_cost: float = 10.0
    goal_reward: float = 10.0


def check_params(params: BridgeParams) -> int:
    """The number of lanes. Raises ValueError for lanes that do not match, or a slip that is no probability.

    Fields may be batched, `[levels, lanes]`; values that are traced are not checked.
    """
    costs, slips = (
        len(field) if isinstance(field, tuple | list) else (np.shape(field) or (0,))[-1]
        for field in (params.step_costs, params.slips)
    )
    if not costs == slips >= 1:
        raise ValueError(f"step_costs has {costs} lanes and slips {slips}, allowed: the same number, 1 and above")
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params.slips)):
        slip = np.asarray(params.slips)
        if not np.all((slip >= 0) & (slip <= 1)):
            raise ValueError(f"slips is {params.slips}, allowed: probabilities, 0 to 1")
    return costs


class Bridge(environment.Environment[BridgeState, BridgeParams]):
    """See the module's text. `length`: steps from the start to the goal, so columns 0 to `length - 1` have a choice.

    Observations are `[length * lanes]`: 1 at `column * lanes + lane`, all 0 beyond the last column. After a fall the
    column is the next one, as for a walker who did not fall, so that bootstrapping from a termination shows.
    """

    def __init__(self, length: int = 6) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"length is {length}, allowed: 1 and above")
        self.length = length

    @property
    def name(self) -> str:
        return "bridge"

    @property
    def default_params(self) -> BridgeParams:
        return BridgeParams(max_steps_in_episode=self.length + 1)  # never reached

    @property
    def num_actions(self) -> int:
        return len(SIDEWAYS)

    def reset_env(self, key: jax.Array, params: BridgeParams) -> tuple[jax.Array, BridgeState]:
        lane = jnp.asarray(_middle(check_params(params)), jnp.int32)
        state = BridgeState(time=jnp.zeros((), jnp.int32), lane=lane, fallen=jnp.zeros((), bool))
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: BridgeState, action: jax.Array, params: BridgeParams
    ) -> tuple[jax.Array, BridgeState, jax.Array, jax.Array, dict[str, Any]]:
        lanes = check_params(params)
        lane = jnp.clip(state.lane + jnp.array(SIDEWAYS)[action], 0, lanes - 1)
        fallen = jax.random.bernoulli(key, jnp.asarray(params.slips, jnp.float32)[lane])
        climbs = (lane != state.lane) & (state.time > 0)
        state = BridgeState(time=state.time + 1, lane=lane, fallen=fallen)
        arrived = ~fallen & (state.time >= self.length)
        reward = -jnp.asarray(params.step_costs, jnp.float32)[lane] - climbs * params.climb_cost
        reward += arrived * params.goal_reward - fallen * params.fall_cost
        observation = self.observe(key, state, action, params)
        return observation, state, reward.astype(jnp.float32), self.is_terminated(state, params), {}

    def observe(self, key: jax.Array, state: BridgeState, action: Any, params: BridgeParams) -> jax.Array:
        lanes = check_params(params)
        return jax.nn.one_hot(state.time * lanes + state.lane, self.length * lanes, dtype=jnp.float32)

    def is_terminated(self, state: BridgeState, params: BridgeParams) -> jax.Array:
        return state.fallen | (state.time >= self.length)

    def picture(self, state: BridgeState, params: BridgeParams) -> np.ndarray:
        """From above: rock wall, lanes (redder where more walkers slip), canyon, and the walker, for `rendering`."""
        from jaxrl_dist.records.canvas import Canvas, mix
        from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK

        lanes, end = check_params(params), self.length + 0.5
        canvas = Canvas((-0.5, end + 1), (lanes, -1.0), height=46 * (lanes + 1.5))
        canvas.rectangle((-0.5, end + 1), (-1.0, -0.5), "#A8A29E")
        canvas.rectangle((-0.5, end + 1), (lanes - 0.5, lanes), "#1E293B")
        canvas.text((end / 2, -0.75), "rock wall", INK)
        canvas.text((end / 2, lanes - 0.25), "canyon", "white")
        slips = np.asarray(params.slips, float)
        for lane, slip in enumerate(slips):
            shade = mix("#EF4444", "#FFFFFF", 0.5 * slip / max(slips.max(), 1e-9))
            canvas.rectangle((0.5, end), (lane - 0.5, lane + 0.5), shade)
            note = f"cost {float(params.step_costs[lane]):g}, slips {100 * slip:g} %"
            canvas.text((end - 0.1, lane - 0.45), note, FAINT, size=8, anchor="rt")
            if lane:
                canvas.dashes((0.5, lane - 0.5), (end, lane - 0.5), FAINT)
        for left, label in ((-0.5, "start"), (end, "goal")):
            canvas.rectangle((left, left + 1), (-0.5, lanes - 0.5), GRID)
            canvas.text((left + 0.5, -0.45), label, INK, size=9, anchor="mt")
        at = float(state.time), float(state.lane)
        if bool(state.fallen):
            canvas.dashes(at, (at[0], lanes - 0.25), COLOURS[1], 2)
            at = at[0], lanes - 0.25
        canvas.disc(at, 0.2, COLOURS[1] if bool(state.fallen) else COLOURS[0], outline="white")
        return canvas.array()

    def action_space(self, params: BridgeParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(len(SIDEWAYS))

    def observation_space(self, params: BridgeParams | None = None) -> spaces.Box:
        lanes = check_params(self.default_params if params is None else params)
        return spaces.Box(0.0, 1.0, (self.length * lanes,))


def _middle(lanes: int) -> int:
    return (lanes - 1) // 2


# -- exact values -----------------------------------------------------------------------------------------------------


def path_of(
    env: Bridge,
    params: BridgeParams,
    policy: np.ndarray,
    column: int = 0,
    lane: int | None = None,
    first_action: int | None = None,
) -> np.ndarray:
    """Lanes that a policy (actions, `[length, lanes]`) walks from a state on if nobody falls, `[length - column]`.

    lane: where the walk starts, None for the middle. first_action: taken instead of the policy's at the first step.
    """
    lanes = check_params(params)
    lane = _middle(lanes) if lane is None else lane
    policy = np.asarray(policy)
    if policy.shape != (env.length, lanes):
        raise ValueError(f"policy has shape {policy.shape}, allowed: {(env.length, lanes)}, an action for each state")
    if not (0 <= column < env.length and 0 <= lane < lanes):
        raise ValueError(f"column {column} and lane {lane} are no state, allowed: below {env.length} and {lanes}")
    path = []
    for now in range(column, env.length):
        action = policy[now, lane] if first_action is None or now > column else first_action
        lane = min(max(lane + SIDEWAYS[action], 0), lanes - 1)
        path.append(lane)
    return np.array(path)


def return_law(
    env: Bridge,
    params: BridgeParams,
    policy: np.ndarray,
    discount: float,
    column: int = 0,
    lane: int | None = None,
    first_action: int | None = None,
) -> Law:
    """Distribution of the discounted return from a state on: float64 atoms and masses, `[length - column + 1]`.

    Atom t < length - column is a fall at step t, the last one the goal. Arguments as in `path_of`.
    """
    path = path_of(env, params, policy, column, lane, first_action)
    return _law_of_paths(params, path, discount, column, _middle(check_params(params)) if lane is None else lane)


def action_values(
    env: Bridge,
    params: BridgeParams,
    policy: np.ndarray,
    risk: Risk,
    discount: float,
    column: int = 0,
    lane: int | None = None,
) -> np.ndarray:
    """Risk of the return from a state on, for each first action and the policy after it: `[3]` in units of return."""
    paths = [path_of(env, params, policy, column, lane, action) for action in range(len(SIDEWAYS))]
    lane = _middle(check_params(params)) if lane is None else lane
    return _value(env, risk, _law_of_paths(params, np.stack(paths), discount, column, lane))


def risk_policy(env: Bridge, params: BridgeParams, risk: Risk, discount: float) -> np.ndarray:
    """The policy, `[length, lanes]`, that is greedy for itself: in each state the action with the best risk of the
    return from there on, found from the last column backwards. Ties go to the lower action.

    This is where an agent converges that chooses actions and targets by the same distorted value (IQN, section 3.1).
    It need not be the best for the risk of the return from the start: see `best_static_path`.
    """
    lanes = check_params(params)
    policy = np.zeros((env.length, lanes), int)
    for column in reversed(range(env.length)):
        for lane in range(lanes):  # a column's values read the later ones' actions only
            policy[column, lane] = action_values(env, params, policy, risk, discount, column, lane).argmax()
    return policy


def best_static_path(env: Bridge, params: BridgeParams, risk: Risk, discount: float) -> np.ndarray:
    """The path `[length]` with the best risk of the return from the start, of all paths, by trying every one.

    No deterministic policy does better, since every state tells of its past only that nobody fell. Of equal paths the
    one nearer to the wall first. Raises ValueError for a bridge longer than 10, which has too many paths.
    """
    if env.length > LONGEST_SEARCH:
        raise ValueError(f"length is {env.length}, allowed: up to {LONGEST_SEARCH}, there are 3^length paths")
    lanes = check_params(params)
    moves = np.array(list(product((-1, 0, 1), repeat=env.length)))
    paths = np.full((len(moves), env.length + 1), _middle(lanes))
    for column in range(env.length):
        paths[:, column + 1] = np.clip(paths[:, column] + moves[:, column], 0, lanes - 1)
    paths = np.unique(paths[:, 1:], axis=0)
    return paths[_value(env, risk, _law_of_paths(params, paths, discount, 0, _middle(lanes))).argmax()]


def _value(env: Bridge, risk: Risk, law: Law) -> np.ndarray:
    # Atoms without mass make one shape of the laws of all columns, since each new shape is compiled anew.
    pad = [(0, 0)] * (law.atoms.ndim - 1) + [(0, env.length + 1 - law.atoms.shape[-1])]
    with jax.enable_x64(True):
        return np.asarray(_compiled_value(risk.name, risk.level, Law(*(np.pad(field, pad) for field in law))))


@partial(jax.jit, static_argnames="name")
def _compiled_value(name: str, level: jax.Array, law: Law) -> jax.Array:
    return risks.value(Risk(name, level), law)


def _law_of_paths(params: BridgeParams, paths: np.ndarray, discount: float, column: int, lane: int) -> Law:
    """Laws `[..., steps + 1]` of walking `paths` `[..., steps]` to the goal, from `lane` in `column` on."""
    costs, slips = np.asarray(params.step_costs, float), np.asarray(params.slips, float)
    if costs.ndim != 1 or slips.ndim != 1:
        raise ValueError(f"slips has shape {slips.shape}, allowed: [lanes], the parameters of one level")
    before = np.concatenate([np.full_like(paths[..., :1], lane), paths[..., :-1]], axis=-1)
    climbs = paths != before
    if column == 0:
        climbs[..., 0] = False
    weight = discount ** np.arange(paths.shape[-1])
    spent = np.cumsum(weight * (costs[paths] + climbs * float(params.climb_cost)), axis=-1)
    falls = -spent - weight * float(params.fall_cost)
    goal = -spent[..., -1:] + weight[-1] * float(params.goal_reward)
    slip = slips[paths]
    alive = np.concatenate([np.ones_like(slip[..., :1]), np.cumprod(1 - slip, axis=-1)], axis=-1)
    masses = np.concatenate([alive[..., :-1] * slip, alive[..., -1:]], axis=-1)
    return Law(np.concatenate([falls, goal], axis=-1), masses)


# -- picture ----------------------------------------------------------------------------------------------------------


def draw(axes: "Axes", params: BridgeParams, paths: Mapping[str, Sequence[int]]) -> None:
    """Draw the bridge from above, with paths `[length]` under their labels; paths in one lane run side by side."""
    from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK  # here, so that only a picture imports matplotlib

    lanes, length = check_params(params), len(next(iter(paths.values())))
    if {len(path) for path in paths.values()} != {length}:
        raise ValueError(f"paths have lengths {[len(path) for path in paths.values()]}, allowed: one length")
    middle = _middle(lanes)
    axes.axhspan(-1.0, -0.5, color="#A8A29E", linewidth=0)
    axes.axhspan(lanes - 0.5, lanes, color="#1E293B", linewidth=0)
    axes.text(length / 2, -0.75, "rock wall", ha="center", va="center", color=INK)
    axes.text(length / 2, lanes - 0.25, "canyon", ha="center", va="center", color="white")
    for lane, (cost, slip) in enumerate(zip(params.step_costs, params.slips, strict=True)):
        shade = 0.5 * slip / max(*params.slips, 1e-9)  # redder where more walkers fall
        axes.fill_between([0.5, length + 0.5], lane - 0.5, lane + 0.5, color="#EF4444", alpha=shade, linewidth=0)
        note = f"cost {cost:g}, slips {100 * slip:g} %"
        axes.text(length + 0.4, lane - 0.36, note, ha="right", va="center", fontsize=9, color=INK)
        if lane:
            axes.plot([0.5, length + 0.5], [lane - 0.5] * 2, "--", color=FAINT, linewidth=1)
    for left in (-0.5, length + 0.5):
        axes.fill_between([left, left + 1], -0.5, lanes - 0.5, color=GRID, linewidth=0)
    for number, (label, path) in enumerate(paths.items()):
        colour = COLOURS[number % len(COLOURS)]
        offset = 0.1 + 0.56 * (number / max(len(paths) - 1, 1) - 0.5)
        heights = offset + np.array([middle, *path])
        axes.plot(np.arange(length + 1), heights, "-o", color=colour, linewidth=2.2, markersize=4)
        axes.text(length + 1.6, heights[-1], label, va="center", color=colour, fontweight="bold")
    axes.text(0, -0.4, "start", ha="center", va="top", color=INK, fontsize=9)
    axes.text(length + 1, -0.4, "goal", ha="center", va="top", color=INK, fontsize=9)
    axes.set_xlim(-0.5, length + 1.5)
    axes.set_ylim(lanes, -1.0)
    axes.set_xticks(range(length + 1))
    axes.set_yticks([])
    axes.set_xlabel("steps")
    axes.spines[:].set_visible(False)

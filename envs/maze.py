"""Mazes seen from within, whose levels are parameters: for agents that choose where they learn.

After the maze of minigrid and JaxUED: an agent stands on a cell and looks in one of four directions. It turns left or
right or goes forward; walls and the border stop it. Going forward into the goal ends the episode with 1 - 0.9 t / T, t
the steps taken and T `--env-options time_scale`; nothing else pays. Positions are (x, y), arrays are indexed [y, x];
directions are 0 right, 1 down, 2 left, 3 up.

A level says where walls, goal and start are. It lives in the parameters, so a reset comes back to the same level, and a
batch of levels is a `vmap` over parameters; with `fresh_levels` (the default) every reset draws one instead, from
`sample_level`. The level of an episode stays in its state.

Observations are flat: of the `view` x `view` cells that lie before and beside the agent, which stands in the middle of
the nearest row, whether each is a wall or the border, then whether each is the goal, then the direction, one-hot, then
t / T, cut to 1. (In JaxUED object ids divided by 10 in three channels, and no time.) With `view` at least 2 `size` - 1
nothing is hidden. The reward depends on the time, which agents without a memory cannot count: where they do not see it,
their values are those of any time, and say little of a level (`shows_time=False`, experiments/levels).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require

LEFT, RIGHT, FORWARD = range(3)
# (x, y) of a step right, down, left and up.
STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)], np.int32)


@struct.dataclass
class Level:
    """One maze: walls `[size, size]`, goal and start `[2]`, and the direction in which the agent looks at first."""

    walls: jax.Array
    goal: jax.Array
    start: jax.Array
    direction: jax.Array


@struct.dataclass
class MazeState(environment.EnvState):
    time: jax.Array
    level: Level
    position: jax.Array
    direction: jax.Array
    arrived: jax.Array


@struct.dataclass
class MazeParams(environment.EnvParams):
    level: Level = None
    fresh_levels: bool = True
    time_scale: float = 64.0
    max_steps_in_episode: int = 64


class Maze(environment.Environment[MazeState, MazeParams]):
    """See the module's text. `walls`: how often a wall is put somewhere when a level is drawn, also onto walls."""

    def __init__(self, size: int = 7, view: int = 5, walls: int = 8, shows_time: bool = True) -> None:
        super().__init__()
        require(size >= 2, f"size is {size}; it must be at least 2")
        require(view >= 1 and view % 2 == 1, f"view is {view}; it must be odd and at least 1")
        most = size**2 - 2  # which leaves two cells
        require(0 <= walls <= most, f"walls is {walls}; it must be in [0, {most}]")
        self.size, self.view, self.walls, self.shows_time = size, view, walls, shows_time

    @property
    def name(self) -> str:
        return "maze"

    @property
    def default_params(self) -> MazeParams:
        last = self.size - 1
        corner = jnp.array([last, last], jnp.int32)
        empty = jnp.zeros((self.size, self.size), bool)
        return MazeParams(level=Level(empty, corner, jnp.zeros(2, jnp.int32), jnp.zeros((), jnp.int32)))

    @property
    def num_actions(self) -> int:
        return 3

    def sample_level(self, key: jax.Array, params: MazeParams) -> MazeParams:
        """The parameters with a random level, in which their resets stay."""
        return params.replace(level=self.draw(key), fresh_levels=jnp.zeros((), bool))

    def draw(self, key: jax.Array) -> Level:
        """A random level: walls anywhere, then goal and start on two of the free cells; some cannot be solved."""
        walls_key, goal_key, start_key, direction_key = jax.random.split(key, 4)
        cells = self.size**2
        places = jax.random.randint(walls_key, (self.walls,), 0, cells)
        walls = jnp.zeros(cells, bool).at[places].set(True)
        goal = jax.random.categorical(goal_key, jnp.where(walls, -jnp.inf, 0.0))
        taken = walls.at[goal].set(True)
        start = jax.random.categorical(start_key, jnp.where(taken, -jnp.inf, 0.0))
        goal, start = (jnp.stack([cell % self.size, cell // self.size]).astype(jnp.int32) for cell in (goal, start))
        direction = jax.random.randint(direction_key, (), 0, 4)
        return Level(walls.reshape(self.size, self.size), goal, start, direction)

    def reset_env(self, key: jax.Array, params: MazeParams) -> tuple[jax.Array, MazeState]:
        drawn = self.draw(key)
        level = jax.tree.map(lambda new, own: jnp.where(params.fresh_levels, new, own), drawn, params.level)
        state = MazeState(
            time=jnp.zeros((), jnp.int32), level=level, position=level.start, direction=level.direction,
            arrived=jnp.zeros((), bool),
        )  # fmt: skip
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: MazeState, action: jax.Array, params: MazeParams
    ) -> tuple[jax.Array, MazeState, jax.Array, jax.Array, dict[str, Any]]:
        turn = jnp.where(action == LEFT, -1, jnp.where(action == RIGHT, 1, 0))
        direction = (state.direction + turn) % 4
        ahead = state.position + jnp.asarray(STEPS)[direction]
        forward = action == FORWARD
        arrived = forward & (ahead == state.level.goal).all()
        moves = forward & ~arrived & ~self._is_wall(state.level, ahead)
        state = state.replace(
            time=state.time + 1, position=jnp.where(moves, ahead, state.position), direction=direction,
            arrived=state.arrived | arrived,
        )  # fmt: skip
        reward = jnp.where(arrived, 1 - 0.9 * state.time / params.time_scale, 0.0).astype(jnp.float32)
        return self.observe(key, state, action, params), state, reward, self.is_terminated(state, params), {}

    def observe(self, key: jax.Array, state: MazeState, action: Any, params: MazeParams) -> jax.Array:
        steps = jnp.asarray(STEPS)
        ahead, right = steps[state.direction], steps[(state.direction + 1) % 4]
        forward, side = jnp.meshgrid(jnp.arange(self.view), jnp.arange(self.view) - self.view // 2, indexing="ij")
        cells = state.position + forward[..., None] * ahead + side[..., None] * right
        walls, goal = self._is_wall(state.level, cells), (cells == state.level.goal).all(-1)
        parts = [walls.ravel(), goal.ravel(), jax.nn.one_hot(state.direction, 4)]
        if self.shows_time:
            parts.append(jnp.minimum(state.time / params.time_scale, 1)[None])
        return jnp.concatenate([part.astype(jnp.float32) for part in parts])

    def is_terminated(self, state: MazeState, params: MazeParams) -> jax.Array:
        return state.arrived

    def action_space(self, params: MazeParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(3)

    def observation_space(self, params: MazeParams | None = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (2 * self.view**2 + 4 + self.shows_time,))

    def picture(self, state: MazeState, params: MazeParams) -> np.ndarray:
        """The maze from above with the goal, and the agent as an arrow whose view is tinted, for `rendering`."""
        from jaxrl_dist.records.canvas import Board
        from jaxrl_dist.records.plotting import COLOURS

        walls, goal = np.asarray(state.level.walls), np.asarray(state.level.goal)
        at, direction = np.asarray(state.position, float), int(state.direction)
        ahead, right = (STEPS[turn % 4].astype(float) for turn in (direction, direction + 1))
        board = Board(self.size, self.size, tallest=190)
        for y, x in np.ndindex(*walls.shape):
            away = np.array([x, y]) - at
            seen = 0 <= away @ ahead < self.view and abs(away @ right) <= self.view // 2
            free, wall = ("#DBEAFE", "#374151") if seen else ("#F3F4F6", "#6B7280")
            board.cell(y, x, wall if walls[y, x] else free, gap=0.02)
        board.cell(goal[1], goal[0], COLOURS[2], gap=0.1)
        if bool(state.arrived):  # the step onto the goal is not taken, and ends
            at = goal.astype(float)
        corners = at + 0.36 * ahead, at - 0.3 * ahead + 0.28 * right, at - 0.12 * ahead, at - 0.3 * ahead - 0.28 * right
        board.polygon(corners, COLOURS[0])
        return board.array()

    def _is_wall(self, level: Level, cell: jax.Array) -> jax.Array:
        """Whether cells (x, y) `[..., 2]` are walls or outside, `[...]`."""
        outside = ((cell < 0) | (cell >= self.size)).any(-1)
        x, y = jnp.moveaxis(jnp.clip(cell, 0, self.size - 1), -1, 0)
        return outside | level.walls[y, x]


def actions_needed(level: Level) -> jax.Array:
    """The fewest actions from the start into the goal, turns counted, `[]` int32; -1 where there is no way.

    The best return of an episode is 1 - 0.9 of these / `time_scale`.
    """
    size = level.walls.shape[0]
    y, x = jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")
    ahead = jnp.stack([x, y], -1) + jnp.asarray(STEPS)[:, None, None]  # [direction, y, x, 2]
    inside = ((ahead >= 0) & (ahead < size)).all(-1)
    at = jnp.arange(4)[:, None, None], *(jnp.clip(ahead[..., i], 0, size - 1) for i in (1, 0))
    free = inside & ~level.walls[at[1:]]
    far = 4 * size**2  # more than there are places to be
    first = jnp.where(inside & (ahead == level.goal).all(-1), 1, far)

    def shorten(carry):
        steps, _ = carry
        forward = jnp.where(free, steps[at], far)
        shorter = jnp.minimum(
            first, 1 + jnp.minimum(forward, jnp.minimum(jnp.roll(steps, 1, 0), jnp.roll(steps, -1, 0)))
        )
        shorter = jnp.minimum(shorter, far)
        return shorter, (shorter != steps).any()

    steps, _ = jax.lax.while_loop(lambda carry: carry[1], shorten, (first, jnp.ones((), bool)))
    needed = steps[level.direction, level.start[1], level.start[0]]
    return jnp.where(needed < far, needed, -1).astype(jnp.int32)


def parse(text: str) -> Level:
    """A level drawn in rows: `#` wall, `.` free, `G` goal, and the agent `>`, `v`, `<` or `^`; it must be square.

    Raises ValueError where it is not, or has not one goal and one agent.
    """
    rows = text.split()
    cells = np.array([list(row) for row in rows]) if len({*map(len, rows)}) == 1 else np.empty((0, 1), str)
    require(cells.shape[0] == cells.shape[1], f"the level {rows} is not square")
    goal, start = np.argwhere(cells == "G"), np.argwhere(np.isin(cells, list(">v<^")))
    require(len(goal) == len(start) == 1, f"the level {rows} must have one goal and one agent")
    known = np.isin(cells, list("#.G>v<^"))
    require(known.all(), f"the level {rows} has {sorted({*cells[~known].tolist()})}; allowed are # . G > v < ^")
    direction = ">v<^".index(cells[tuple(start[0])])
    places = (jnp.asarray(place[0, ::-1].copy(), jnp.int32) for place in (goal, start))
    return Level(jnp.asarray(cells == "#"), *places, jnp.int32(direction))

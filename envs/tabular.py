"""Finite Markov decision processes as environments, so that agents can be held against exact laws.

`Tabular` turns any `distributional.tabular.MDP` into an environment of the usual contract: observations are one-hot,
and the process itself lives in the parameters, so that a batch of processes is a `vmap` over them. The generators below
make named ones; each has a place for every state, so that `draw` can show it.

| generator | actions | what it is for |
|---|---|---|
| `coin` | 1 | reward 0 or 1 for ever: with discount 1/2 the return is uniform on [0, 2] |
| `random_walk` | 1 | left end 0, right end 1: the classic of temporal differences (Sutton & Barto, example 6.2) |
| `cliff` | 4 | a short way along a cliff, longer ones away from it, and wind (Sutton & Barto, example 6.6) |
| `windy_grid` | 4 | a grid with a wind upwards that is random in strength (Sutton & Barto, example 6.5) |
| `deep_sea` | 2 | exploration: only the way straight down to the right pays (Osband et al. 2020) |
| `garnet` | any | random processes of a given branching (Archibald et al. 1995) |
| `maze` | 4 | walls given as text |
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require
from jaxrl_dist.distributional.tabular import MDP, mdp_from_outcomes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOVES = {"up": (-1, 0), "right": (0, 1), "down": (1, 0), "left": (0, -1)}
SMALL_MAZE = ("S.#..", ".#...", "...#.", ".#..G")


@struct.dataclass
class TabularState(environment.EnvState):
    state: jax.Array
    ended: jax.Array


@struct.dataclass
class TabularParams(environment.EnvParams):
    mdp: MDP = None
    start: jax.Array = None
    """Probabilities of the states at a reset, `[states]`."""
    max_steps_in_episode: int = 100


class Tabular(environment.Environment[TabularState, TabularParams]):
    """A finite Markov decision process; see the module's text. Observations are `[states]`, 1 at the present state."""

    def __init__(
        self,
        mdp: MDP,
        start: np.ndarray,
        places: np.ndarray,
        name: str,
        max_steps_in_episode: int = 100,
        marks: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        """start: probabilities `[states]`; places: where `draw` puts the states, `[states, 2]`, rows going down.

        marks: of a grid, the places that `picture` marks as "goal", "danger" or "wall", with a state or without one.
        """
        super().__init__()
        self._params = TabularParams(
            mdp=jax.tree.map(jnp.asarray, mdp), start=jnp.asarray(start, jnp.float32),
            max_steps_in_episode=max_steps_in_episode,
        )  # fmt: skip
        self._name, self.places, self.marks = name, np.asarray(places, float), dict(marks or {})
        self.num_states, self._num_actions = np.shape(mdp.probability)[:2]

    @property
    def name(self) -> str:
        return self._name

    @property
    def default_params(self) -> TabularParams:
        return self._params

    @property
    def num_actions(self) -> int:
        return self._num_actions

    def reset_env(self, key: jax.Array, params: TabularParams) -> tuple[jax.Array, TabularState]:
        first = jax.random.categorical(key, jnp.log(params.start)).astype(jnp.int32)
        state = TabularState(time=jnp.zeros((), jnp.int32), state=first, ended=jnp.zeros((), bool))
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: TabularState, action: jax.Array, params: TabularParams
    ) -> tuple[jax.Array, TabularState, jax.Array, jax.Array, dict[str, Any]]:
        outcomes = jax.tree.map(lambda x: x[state.state, action], params.mdp)
        outcome = jax.random.categorical(key, jnp.log(outcomes.probability))
        _, following, reward, ended = (x[outcome] for x in outcomes)
        state = TabularState(time=state.time + 1, state=following, ended=ended)
        return self.observe(key, state, action, params), state, reward, ended, {}

    def observe(self, key: jax.Array, state: TabularState, action: Any, params: TabularParams) -> jax.Array:
        return jax.nn.one_hot(state.state, self.num_states, dtype=jnp.float32)

    def is_terminated(self, state: TabularState, params: TabularParams) -> jax.Array:
        return state.ended

    def picture(self, state: TabularState, params: TabularParams) -> np.ndarray:
        """The states where `places` puts them, as cells where some are marked, for `rendering`; a ring: it ended."""
        from jaxrl_dist.records.canvas import Canvas
        from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK

        if self.num_states == 1:
            canvas = Canvas((-1, 1), (0, 1), height=70)
            canvas.disc((0, 0.6), 0.12, COLOURS[0])
            canvas.text((0, 0.12), f"the only state, step {int(state.time)}", FAINT)
            return canvas.array()
        places, marks = self.places, self.marks
        corners = np.array([*places, *marks])
        low, high = corners.min(0) - 0.6, corners.max(0) + 0.6
        if high[0] - low[0] < 1.5:  # a row has room above and below
            low[0], high[0] = low[0] - 0.3, high[0] + 0.3
        width = min(320.0, 220 * (high[1] - low[1]) / (high[0] - low[0]))
        canvas = Canvas((low[1], high[1]), (high[0], low[0]), width=width)
        if marks:
            colours = {"goal": COLOURS[2], "danger": "#FCA5A5", "wall": FAINT}
            for at, colour in [(place, "#F3F4F6") for place in places] + [(at, colours[k]) for at, k in marks.items()]:
                canvas.rectangle((at[1] - 0.47, at[1] + 0.47), (at[0] - 0.47, at[0] + 0.47), colour, round_by=2)
        else:
            mdp = jax.tree.map(np.asarray, params.mdp)
            for one, action, outcome in np.argwhere((mdp.probability > 0) & ~mdp.terminated):
                away = places[mdp.next_state[one, action, outcome]] - places[one]
                if away.any():
                    gap = 0.3 * away / np.linalg.norm(away)
                    ends = places[one] + gap, places[one] + away - gap
                    canvas.arrow(ends[0][::-1], ends[1][::-1], "#D1D5DB", 1, head=5)
            for place in places:
                canvas.disc(place[::-1], 0.24, GRID, outline=FAINT)
        for start in np.flatnonzero(np.asarray(params.start)) if marks else []:
            canvas.text(places[start][::-1], "start", FAINT, size=7)
        at = places[int(state.state)][::-1]
        if bool(state.ended):
            canvas.disc(at, 0.42, None, outline=INK, line=2)
        canvas.disc(at, 0.26, COLOURS[0], outline="white")
        return canvas.array()

    def action_space(self, params: TabularParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self._num_actions)

    def observation_space(self, params: TabularParams | None = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, (self.num_states,))


# -- generators -------------------------------------------------------------------------------------------------------


def coin() -> Tabular:
    """One state; every step pays 0 or 1 with equal chances, for ever."""
    return Tabular(mdp_from_outcomes([[[(0.5, 0, 0.0, False), (0.5, 0, 1.0, False)]]]), [1.0], [[0, 0]], "tabular/coin")


def random_walk(length: int = 5) -> Tabular:
    """States in a row, steps to either side with equal chances; the right exit pays 1. Starts in the middle."""
    require(length >= 1, f"length is {length}, allowed: 1 and above")

    def step(to: int):
        return (0.5, min(max(to, 0), length - 1), float(to == length), not 0 <= to < length)

    outcomes = [[[step(state - 1), step(state + 1)]] for state in range(length)]
    places = [[0, state] for state in range(length)]
    return Tabular(mdp_from_outcomes(outcomes), np.eye(length)[length // 2], places, "tabular/random_walk")


def cliff(width: int = 6, height: int = 4, wind: float = 0.1, fall_cost: float = 20.0) -> Tabular:
    """From the lower left to the lower right corner, -1 per step; between them is a cliff, and falling off ends.

    wind: the probability that a step goes down instead, towards the cliff.
    """
    require(width >= 3 and height >= 2, f"width is {width} and height {height}, allowed: 3 and 2 and above")
    require(0 <= wind <= 1, f"wind is {wind}, allowed: a probability, 0 to 1")
    bottom, goal = height - 1, (height - 1, width - 1)
    cells = [(r, c) for r in range(height) for c in range(width) if r < bottom or c == 0]

    def arrive(row: int, column: int) -> tuple[tuple[int, int], float, bool]:
        row, column = min(max(row, 0), bottom), min(max(column, 0), width - 1)
        if (row, column) == goal:
            return (row - 1, column), -1.0, True
        if row == bottom and column > 0:
            return (row - 1, column), -1.0 - fall_cost, True
        return (row, column), -1.0, False

    def outcomes(cell, move):
        return [(1 - wind, *arrive(cell[0] + move[0], cell[1] + move[1])), (wind, *arrive(cell[0] + 1, cell[1]))]

    marks = {(bottom, column): "danger" for column in range(1, width - 1)} | {goal: "goal"}
    return _grid(cells, outcomes, {(bottom, 0): 1.0}, "tabular/cliff", marks)


def windy_grid(random_wind: float = 1 / 3) -> Tabular:
    """7 x 10 cells, -1 per step from the left to the goal; columns 3 to 8 blow upwards by one or two cells.

    random_wind: probability that a column which blows does so by one cell more, and that it does so by one less.
    """
    require(0 <= random_wind <= 0.5, f"random_wind is {random_wind}, allowed: 0 to 0.5")
    strength, goal = (0, 0, 0, 1, 1, 1, 2, 2, 1, 0), (3, 7)
    cells = [(r, c) for r in range(7) for c in range(10) if (r, c) != goal]

    def arrive(cell, move, wind: int):
        row, column = min(max(cell[0] + move[0] - wind, 0), 6), min(max(cell[1] + move[1], 0), 9)
        return (cell, -1.0, True) if (row, column) == goal else ((row, column), -1.0, False)

    def outcomes(cell, move):
        wind = strength[cell[1]]
        if not wind:
            return [(1.0, *arrive(cell, move, 0))]
        chances = ((1 - 2 * random_wind, wind), (random_wind, wind - 1), (random_wind, wind + 1))
        return [(chance, *arrive(cell, move, blow)) for chance, blow in chances]

    return _grid(cells, outcomes, {(3, 0): 1.0}, "tabular/windy_grid", {goal: "goal"})


def deep_sea(size: int = 8, step_cost: float = 0.01) -> Tabular:
    """A diver sinks one row per step, to the left (action 0) or to the right (1); only the lower right corner pays 1.

    Each step to the right costs step_cost / size.
    """
    require(size >= 2, f"size is {size}, allowed: 2 and above")
    cells = [(row, column) for row in range(size) for column in range(row + 1)]
    number = {cell: index for index, cell in enumerate(cells)}

    def outcome(cell, right: bool):
        row, column = cell
        last = row == size - 1
        reward = right * (float(last and column == size - 1) - step_cost / size)
        following = cell if last else (row + 1, column + 1 if right else max(column - 1, 0))
        return (1.0, number[following], reward, last)

    outcomes = [[[outcome(cell, right)] for right in (False, True)] for cell in cells]
    marks = {(size - 1, size - 1): "goal"}
    return Tabular(mdp_from_outcomes(outcomes), np.eye(len(cells))[0], cells, "tabular/deep_sea", size, marks)


def garnet(
    states: int = 10, actions: int = 3, branching: int = 3, end_probability: float = 0.0, seed: int = 0
) -> Tabular:
    """A random process: each action leads to `branching` states with Dirichlet chances and normal rewards.

    end_probability: that a step ends the episode.
    """
    require(1 <= branching <= states, f"branching is {branching}, allowed: 1 to states = {states}")
    require(actions >= 1, f"actions is {actions}, allowed: 1 and above")
    require(0 <= end_probability <= 1, f"end_probability is {end_probability}, allowed: 0 to 1")
    rng = np.random.default_rng(seed)

    def outcomes():
        chances, reached = rng.dirichlet(np.ones(branching)), rng.choice(states, branching, replace=False)
        rewards = rng.normal(size=branching)
        rows = list(zip(chances, reached, rewards, strict=True))
        going_on = [(p * (1 - end_probability), s, r, False) for p, s, r in rows]
        return going_on + ([(p * end_probability, s, r, True) for p, s, r in rows] if end_probability else [])

    table = [[outcomes() for _ in range(actions)] for _ in range(states)]
    angles = 2 * np.pi * np.arange(states) / states
    places = np.stack([np.sin(angles), np.cos(angles)], axis=1) * states / 4
    return Tabular(mdp_from_outcomes(table), np.full(states, 1 / states), places, "tabular/garnet")


def maze(rows: Sequence[str] = SMALL_MAZE, slip: float = 0.0) -> Tabular:
    """A grid of text: '#' wall, 'S' starts, 'G' goals that end with reward 1, anything else floor; no other rewards.

    slip: the probability that a step goes to one of the two sides instead, evenly.
    """
    require(len({len(row) for row in rows}) == 1, "rows have different lengths, allowed: one length")
    require(0 <= slip <= 1, f"slip is {slip}, allowed: a probability, 0 to 1")
    text = {(r, c): mark for r, row in enumerate(rows) for c, mark in enumerate(row)}
    cells = [cell for cell, mark in text.items() if mark not in "#G"]
    starts = [cell for cell, mark in text.items() if mark == "S"]
    require(bool(starts) and "G" in text.values(), "rows have no 'S' or no 'G', allowed: at least one of each")

    def arrive(cell, move):
        following = (cell[0] + move[0], cell[1] + move[1])
        mark = text.get(following, "#")
        return (cell, 1.0, True) if mark == "G" else (cell if mark == "#" else following, 0.0, False)

    def outcomes(cell, move):
        sides = [(move[1], move[0]), (-move[1], -move[0])] if slip else []
        return [(1 - slip, *arrive(cell, move))] + [(slip / 2, *arrive(cell, side)) for side in sides]

    marks = {cell: "goal" if mark == "G" else "wall" for cell, mark in text.items() if mark in "#G"}
    return _grid(cells, outcomes, {cell: 1 / len(starts) for cell in starts}, "tabular/maze", marks)


GENERATORS: Mapping[str, Callable[..., Tabular]] = {
    f"tabular/{generator.__name__}": generator
    for generator in (coin, random_walk, cliff, windy_grid, deep_sea, garnet, maze)
}


def _grid(cells: list, outcomes: Callable, start: Mapping, name: str, marks: Mapping) -> Tabular:
    """Cells and four moves; `outcomes(cell, move)` lists (probability, cell, reward, terminated)."""
    number = {cell: index for index, cell in enumerate(cells)}
    table = [
        [[(p, number[to], r, ended) for p, to, r, ended in outcomes(cell, move)] for move in MOVES.values()]
        for cell in cells
    ]
    return Tabular(mdp_from_outcomes(table), [start.get(cell, 0.0) for cell in cells], cells, name, marks=marks)


# -- picture ----------------------------------------------------------------------------------------------------------


def draw(axes: "Axes", env: Tabular, values: np.ndarray | None = None, policy: np.ndarray | None = None) -> None:
    """Draw states as discs, in colours of `values` `[states]`, and moves as arrows, those of `policy` `[states,
    actions]` or all of them: the likelier the darker, red where they cost and green where they pay."""
    from jaxrl_dist.records.plotting import FAINT, GRID, INK  # here, so that only a picture imports matplotlib

    mdp, places = jax.tree.map(np.asarray, env.default_params.mdp), env.places
    policy = np.full(mdp.probability.shape[:2], 1 / env.num_actions) if policy is None else np.asarray(policy)
    size = max(1e-6, np.abs(mdp.reward[mdp.probability > 0]).max())
    for state, action in np.argwhere(policy > 0):
        for outcome in np.flatnonzero(mdp.probability[state, action]):
            following, reward = mdp.next_state[state, action, outcome], mdp.reward[state, action, outcome]
            colour = "#B91C1C" if reward < 0 else "#15803D" if reward > 0 else FAINT
            weight = float(mdp.probability[state, action, outcome] * policy[state, action])
            shade = 0.15 + 0.85 * min(1.0, weight * (0.4 + 0.6 * abs(reward) / size))
            if mdp.terminated[state, action, outcome]:
                axes.plot(*places[state][::-1], "s", markersize=22, fillstyle="none", color=colour, alpha=shade)
            elif following != state:
                away = places[following] - places[state]
                from_, to = places[state] + 0.22 * away, places[following] - 0.22 * away
                arrow = {"arrowstyle": "->", "color": colour, "alpha": shade, "connectionstyle": "arc3,rad=0.12"}
                axes.annotate("", to[::-1], from_[::-1], arrowprops=arrow)
    colours = GRID if values is None else np.asarray(values)
    discs = axes.scatter(*places.T[::-1], s=160, c=colours, edgecolors=INK, linewidths=0.8, zorder=3)
    if values is not None:
        axes.figure.colorbar(discs, ax=axes, shrink=0.7, label="value")
    for state in np.flatnonzero(np.asarray(env.default_params.start)):
        axes.plot(*places[state][::-1], "o", markersize=4, color=INK, zorder=4)
    axes.set_title(env.name, fontsize=10)
    axes.margins(0.12)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_axis_off()

"""What environments look like: a picture of a state, drawn by hand so that it is clear at a glance.

An environment of ours, or of a user's, draws itself: its class has a method `picture(state, params)`. Those of gymnax
are drawn here. `picture` finds the drawing, also inside of wrappers; without one it says what to write. Nothing here
is used in training.

The agent is blue where the ground is not, what it wants green, what it should fear red.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from gymnax.environments.bsuite import bandit, catch, deep_sea, discounting_chain, memory_chain, umbrella_chain
from gymnax.environments.classic_control import acrobot, cartpole, continuous_mountain_car, mountain_car, pendulum
from gymnax.environments.minatar import asterix, breakout, freeway, seaquest, space_invaders
from gymnax.environments.misc import (
    bernoulli_bandit,
    frozen_lake,
    gaussian_bandit,
    meta_maze,
    point_robot,
    pong,
    reacher,
    rooms,
    swimmer,
)

from jaxrl_dist.configuration import require
from jaxrl_dist.envs.stock import StockAugmented
from jaxrl_dist.envs.tokens import Tokens
from jaxrl_dist.records.canvas import Board, Canvas, mix
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK

AGENT, DANGER, GOAL, PINK, GOLD, SKY, GREY = COLOURS
NIGHT, FLOOR, STONE = "#1E293B", "#F3F4F6", "#A8A29E"


def picture(env: Any, state: Any, params: Any) -> np.ndarray:
    """One state of an environment as an image, uint8 `[height, width, 3]`; leaves of the state are arrays of numpy.

    Raises ConfigurationError for an environment without a drawing, and for one whose drawing is no image.
    """
    draw = _drawing(env)
    if draw is None and (inner := vars(env).get("env")) is not None:
        return picture(inner, getattr(state, "inner", state), getattr(params, "inner", params))
    require_picture(env)
    image = np.asarray(draw(state, params))
    require(
        image.ndim == 3 and image.shape[-1] == 3 and image.dtype == np.uint8 and image.size > 0,
        f"picture of {name_of(env)} is {image.dtype} {list(image.shape)}; it must be an image, uint8 "
        "[height, width, 3]",
    )
    return image


def require_picture(env: Any) -> None:
    """ConfigurationError that says what to write, for an environment that nobody can draw."""
    while _drawing(env) is None and vars(env).get("env") is not None:
        env = env.env
    require(
        _drawing(env) is not None,
        f"{name_of(env)} has no drawing: give its class a method picture(self, state, params) that returns an image, "
        "uint8 [height, width, 3], or draw what the agent sees with --observations",
    )


def _drawing(env: Any) -> Callable[[Any, Any], np.ndarray] | None:
    """How this very environment is drawn, not one inside of it; None where nobody knows."""
    if callable(getattr(type(env), "picture", None)):
        return env.picture
    if (bodies := _bodies(env)) is not None:
        model, qpos_of = bodies
        return lambda state, params: of_mujoco(model, qpos_of(state))
    known = _known.dispatch(type(env))
    return None if known is _known.dispatch(object) else functools.partial(known, env)


def name_of(env: Any) -> str:
    return str(getattr(env, "name", type(env).__name__))


@functools.singledispatch
def _known(env: Any, state: Any, params: Any) -> np.ndarray:
    """The drawing of an environment of gymnax, by its class."""
    raise NotImplementedError(name_of(env))


@_known.register
def _(env: StockAugmented, state, params) -> np.ndarray:
    """The environment inside, and under it the stock on its way."""
    inner = picture(env.env, state.inner, params.inner)
    stock = float(state.stock)
    far = max(1.0, abs(float(params.lowest_stock)), abs(float(params.highest_stock)), abs(stock)) * 1.1
    strip = Canvas((-far, far), (0, 1), height=26)
    strip.line([(-far, 0.3), (far, 0.3)], GRID, 2)
    strip.line([(0, 0.1), (0, 0.5)], FAINT)
    strip.line([(0, 0.3), (stock, 0.3)], PINK, 3)
    strip.disc((stock, 0.3), 0.012 * far, PINK)
    strip.text((-far, 0.75), f"stock {stock:.2f}", anchor="lm", size=9)
    return stacked(inner, strip.array())


def stacked(*images: np.ndarray) -> np.ndarray:
    """Images one under the other, centred on white."""
    width = max(image.shape[1] for image in images)
    rows = []
    for image in images:
        left = (width - image.shape[1]) // 2
        right = width - image.shape[1] - left
        rows.append(np.pad(image, ((0, 0), (left, right), (0, 0)), constant_values=255))
    return np.concatenate(rows)


def observed(observation: np.ndarray) -> np.ndarray:
    """What an agent sees, as it is: vectors as bars, images by the strongest of their channels."""
    values = np.asarray(observation, float)
    if values.ndim <= 1:
        return bars(np.atleast_1d(values))
    if values.ndim == 2:
        values = values[..., None]
    values = values.reshape(*values.shape[:2], -1)
    largest = np.abs(values).max()
    strength = np.abs(values) / (largest if largest > 0 else 1)
    board = Board(*values.shape[:2], background=NIGHT)
    for row, column in np.argwhere(strength.max(-1) > 0):
        channel = int(strength[row, column].argmax())
        colour = (COLOURS[4], *COLOURS[:4], *COLOURS[5:])[channel % len(COLOURS)]
        board.cell(row, column, mix(colour, NIGHT, 0.25 + 0.75 * strength[row, column, channel]))
    return board.array()


def bars(values: np.ndarray) -> np.ndarray:
    """Numbers as bars from zero, cut at plus and minus 3."""
    shown = np.clip(values, -3, 3)
    far = max(1.0, float(np.abs(shown).max())) * 1.05
    canvas = Canvas((-0.5, len(values) - 0.5), (-far, far), height=130)
    canvas.line([(-0.5, 0), (len(values) - 0.5, 0)], FAINT)
    for place, value in enumerate(shown):
        canvas.rectangle((place - 0.38, place + 0.38), (0, value), COLOURS[0])
    if len(values) <= 8:
        for place, value in enumerate(values):
            canvas.text((place, 0), f"{value:.2f}", size=8, anchor="mt" if value >= 0 else "ms")
    return canvas.array()


# -- classic control --------------------------------------------------------------------------------------------------


@_known.register
def _(env: cartpole.CartPole, state, params) -> np.ndarray:
    """The cart between the ends of its track, the pole, and how far it may lean."""
    limit, pole = float(params.x_threshold), 2 * float(params.length)
    x, theta = float(state.x), float(state.theta)
    canvas = Canvas((-limit - 0.45, limit + 0.45), (-0.45, pole + 0.35))
    lean = float(params.theta_threshold_radians)
    foot = (x, 0.08)
    for side in (-lean, lean):
        end = (x + (pole + 0.12) * math.sin(side), 0.08 + (pole + 0.12) * math.cos(side))
        canvas.dashes(foot, end, "#D1D5DB", 1)
    canvas.line([(-limit - 0.45, -0.22), (limit + 0.45, -0.22)], FAINT, 1.5)
    for side in (-limit, limit):
        canvas.line([(side, -0.34), (side, -0.1)], DANGER, 2)
    canvas.rectangle((x - 0.3, x + 0.3), (-0.12, 0.12), AGENT, round_by=2)
    for wheel in (-0.17, 0.17):
        canvas.disc((x + wheel, -0.14), 0.08, INK)
    canvas.line([foot, (x + pole * math.sin(theta), 0.08 + pole * math.cos(theta))], GOLD, 6)
    canvas.disc(foot, 0.05, INK)
    return canvas.array()


@_known.register
def _(env: acrobot.Acrobot, state, params) -> np.ndarray:
    """Two links that hang from a pivot, and the height that the tip has to reach."""
    lengths = float(params.link_length_1), float(params.link_length_2)
    reach = sum(lengths) + 0.25
    first = float(state.joint_angle1)
    second = first + float(state.joint_angle2)
    elbow = np.array([math.sin(first), -math.cos(first)]) * lengths[0]
    tip = elbow + np.array([math.sin(second), -math.cos(second)]) * lengths[1]
    # The task counts both links as one unit long.
    height = -math.cos(first) - math.cos(second)
    canvas = Canvas((-1.35 * reach, 1.35 * reach), (-reach, reach))
    canvas.dashes((-1.35 * reach, 1.0), (1.35 * reach, 1.0), GOAL, 1.5)
    canvas.line([(0, 0), elbow], AGENT, 9)
    canvas.line([elbow, tip], SKY, 7)
    canvas.disc((0, 0), 0.09, INK)
    canvas.disc(elbow, 0.07, INK)
    canvas.disc(tip, 0.1, GOAL if height > 1 else GOLD, outline="white")
    return canvas.array()


@_known.register
def _(env: pendulum.Pendulum, state, params) -> np.ndarray:
    """The rod, and the torque that was applied last as an arrow around the pivot."""
    theta, torque = float(state.theta), float(np.squeeze(state.last_u)) / float(params.max_torque)
    tip = np.array([-math.sin(theta), math.cos(theta)])
    canvas = Canvas((-1.85, 1.85), (-1.25, 1.25))
    canvas.disc((0, 0), 1.12, None, outline=GRID, line=1)
    canvas.dashes((0, 0), (0, 1.12), GOAL, 1.5)
    canvas.line([(0, 0), tip], AGENT, 14)
    canvas.disc(tip, 0.07, "white")
    canvas.disc((0, 0), 0.05, INK)
    if abs(torque) > 0.02:  # positive torque turns counter-clockwise, as theta does
        turn = 150 * max(-1.0, min(1.0, torque))
        canvas.arc((0, 0), 0.38, (90 - turn / 2, 90 + turn / 2), DANGER, 2.5)
    return canvas.array()


def _height(x: np.ndarray | float) -> np.ndarray:
    return np.sin(3 * np.asarray(x, float)) * 0.45 + 0.55


@_known.register(mountain_car.MountainCar)
@_known.register(continuous_mountain_car.ContinuousMountainCar)
def _(env, state, params) -> np.ndarray:
    """The valley, the car on its slope, and the flag."""
    low, high, goal = (float(x) for x in (params.min_position, params.max_position, params.goal_position))
    x = float(state.position)
    canvas = Canvas((low - 0.05, high + 0.05), (-0.08, 1.27))
    ground = np.linspace(low - 0.05, high + 0.05, 90)
    hill = np.stack([ground, _height(ground)], -1)
    canvas.polygon([(low - 0.05, -0.08), *hill, (high + 0.05, -0.08)], FLOOR)
    canvas.line(hill, FAINT, 2)
    foot = (goal, float(_height(goal)))
    canvas.line([foot, (goal, foot[1] + 0.2)], INK, 1.5)
    canvas.polygon([(goal, foot[1] + 0.2), (goal + 0.09, foot[1] + 0.165), (goal, foot[1] + 0.13)], GOAL)
    slope = 3 * 0.45 * math.cos(3 * x)
    along = np.array([1, slope]) / math.hypot(1, slope)
    up = np.array([-along[1], along[0]])
    at = np.array([x, float(_height(x))])
    body = [at + a * along + b * up for a, b in ((-0.08, 0.03), (0.08, 0.03), (0.05, 0.085), (-0.06, 0.085))]
    canvas.polygon(body, AGENT)
    for wheel in (-0.05, 0.05):
        canvas.disc(at + wheel * along + 0.026 * up, 0.024, INK)
    return canvas.array()


# -- MinAtar ----------------------------------------------------------------------------------------------------------

# Colours of the channels, drawn in this order, later ones over earlier ones; None: not drawn by itself.
_TRAIL = mix("#FFFFFF", NIGHT, 0.28)
_MINATAR: dict[type, tuple[tuple[int, str], ...]] = {
    asterix.MinAsterix: ((2, _TRAIL), (3, GOLD), (1, DANGER), (0, SKY)),
    breakout.MinBreakout: ((3, GOAL), (2, _TRAIL), (1, GOLD), (0, SKY)),
    freeway.MinFreeway: (
        *((channel, mix(DANGER, NIGHT, 0.5 - 0.07 * (channel - 2))) for channel in (6, 5, 4, 3, 2)),
        (1, DANGER), (0, SKY),
    ),
    seaquest.MinSeaquest: (
        (7, AGENT), (8, GOAL), (9, GOAL), (3, _TRAIL), (5, DANGER), (6, PINK), (4, "#FCA5A5"), (2, "#FFFFFF"),
        (1, AGENT), (0, SKY),
    ),
    space_invaders.MinSpaceInvaders: ((1, GOAL), (4, "#FFFFFF"), (5, DANGER), (0, SKY)),
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def _seen(env: Any) -> Any:
    """The observation of a state, compiled: a state has more parts than are seen."""
    return jax.jit(lambda state, params: env.get_obs(state, params))


def _minatar(env, state, params) -> np.ndarray:
    """The ten by ten cells that are seen, as MinAtar shows them."""
    channels = np.asarray(_seen(env)(state, params))
    board = Board(*channels.shape[:2], background=NIGHT)
    colours = next(_MINATAR[kind] for kind in type(env).__mro__ if kind in _MINATAR)
    for channel, colour in colours:
        for row, column in np.argwhere(channels[..., channel] > 0):
            board.cell(row, column, colour)
    return board.array()


for _kind in _MINATAR:
    _known.register(_kind)(_minatar)


# -- grids ------------------------------------------------------------------------------------------------------------


def grid(walls: np.ndarray, goal: Sequence[float] | None = None, agent: Sequence[float] | None = None) -> Board:
    """A board of free cells and walls `[rows, columns]`, with goal and agent in (row, column)."""
    board = Board(*walls.shape)
    for row, column in np.ndindex(*walls.shape):
        board.cell(row, column, GREY if walls[row, column] else FLOOR, gap=0.02)
    if goal is not None:
        board.cell(*goal, GOAL, gap=0.08)
    if agent is not None:
        board.disc((agent[1], agent[0]), 0.32, AGENT, outline="white")
    return board


@_known.register(rooms.FourRooms)
@_known.register(meta_maze.MetaMaze)
def _(env, state, params) -> np.ndarray:
    walls = np.asarray(env.occupied_map) > 0
    return grid(walls, np.asarray(state.goal).ravel(), np.asarray(state.pos).ravel()).array()


@_known.register
def _(env: frozen_lake.FrozenLake, state, params) -> np.ndarray:
    """Ice, holes in it, the start and the goal."""
    tiles = np.asarray(env.desc)
    board = Board(*tiles.shape, tallest=180)
    for row, column in np.ndindex(*tiles.shape):
        board.cell(row, column, mix(SKY, "#FFFFFF", 0.3), gap=0.03)
        if tiles[row, column] == frozen_lake.HOLE:
            board.disc((column, row), 0.36, NIGHT)
        elif tiles[row, column] == frozen_lake.GOAL:
            board.cell(row, column, GOAL, gap=0.12)
    board.disc((int(state.position) % env.ncol, int(state.position) // env.ncol), 0.26, AGENT, outline="white")
    return board.array()


@_known.register
def _(env: catch.Catch, state, params) -> np.ndarray:
    board = Board(env.rows, env.columns, background=NIGHT)
    board.cell(int(state.paddle_y), int(state.paddle_x), SKY)
    board.disc((int(state.ball_x), int(state.ball_y)), 0.38, GOLD)
    return board.array()


@_known.register
def _(env: deep_sea.DeepSea, state, params) -> np.ndarray:
    """The sea, darker with depth, and the treasure below its last cell."""
    size = env.size
    board = Board(size + 1, size)
    for row, column in np.ndindex(size, size):
        shade = 0.12 + 0.5 * row / size
        board.cell(row, column, mix(COLOURS[0], "#FFFFFF", shade if column <= row else 0.05), gap=0.02)
    board.cell(size, size - 1, GOLD, gap=0.15)
    board.disc((int(state.column), int(state.row)), 0.32, DANGER, outline="white")
    return board.array()


@_known.register
def _(env: pong.Pong, state, params) -> np.ndarray:
    canvas = Canvas((0, env.width), (env.height, 0), background=NIGHT)
    for side, middle, colour in zip((0, env.width - 1), np.asarray(state.paddle_centers), (SKY, DANGER), strict=True):
        row, half = math.floor(float(middle)), env.paddle_half_height
        canvas.rectangle((side, side + 1), (max(row - half, 0), min(row + half + 1, env.height)), colour)
    (row, column), (last_row, last_column) = (np.floor(x) for x in (state.ball_position, state.last_ball_position))
    canvas.disc((last_column + 0.5, last_row + 0.5), 0.5, _TRAIL)
    canvas.disc((column + 0.5, row + 0.5), 0.6, GOLD)
    return canvas.array()


# -- chains and bandits -----------------------------------------------------------------------------------------------


def beads(count: int, now: int, *, height: float = 70) -> Canvas:
    """Steps in a row, those gone grey and the present one blue; the picture has room for words above and below."""
    canvas = Canvas((-1, count), (0, 1), height=height)
    canvas.line([(0, 0.5), (count - 1, 0.5)], GRID, 2)
    radius = min(0.32, 0.022 * (count + 1))
    for place in range(count):
        canvas.disc((place, 0.5), radius, FAINT if place < now else GRID)
    canvas.disc((min(now, count - 1), 0.5), 1.25 * radius, AGENT, outline="white")
    return canvas


@_known.register
def _(env: memory_chain.MemoryChain, state, params) -> np.ndarray:
    """The chain; above its beginning what is shown there, above its end what is asked."""
    length = int(params.memory_length)
    canvas = beads(length + 2, int(state.time))
    bits = "".join("+" if bit else "\N{MINUS SIGN}" for bit in np.atleast_1d(state.context))
    canvas.text((0, 0.85), f"shown: {bits}", anchor="lm", size=9)
    canvas.text((length + 1, 0.85), f"asked: number {int(state.query) + 1}", anchor="rm", size=9)
    right = int(state.total_perfect)
    wrong = round(float(state.total_regret) / 2)
    if right or wrong:
        canvas.text(
            (length + 1, 0.15), "right" if right else "wrong", GOAL if right else DANGER, anchor="rm", bold=True
        )
    return canvas.array()


@_known.register
def _(env: umbrella_chain.UmbrellaChain, state, params) -> np.ndarray:
    length = int(params.chain_length)
    canvas = beads(length + 1, int(state.time))
    weather = "rain is coming" if int(state.need_umbrella) else "it stays dry"
    canvas.text((length, 0.85), weather, anchor="rm", size=9)
    has = "with an umbrella" if int(state.has_umbrella) else "without an umbrella"
    canvas.text((0, 0.85), has, anchor="lm", size=9)
    if int(state.time) >= length:
        wrong = int(state.total_regret) > 0
        canvas.text((length, 0.15), "wrong" if wrong else "right", DANGER if wrong else GOAL, anchor="rm", bold=True)
    return canvas.array()


@_known.register
def _(env: discounting_chain.DiscountingChain, state, params) -> np.ndarray:
    """A line of time; each of the choices made at the start pays at its own place."""
    last, times = int(params.max_steps_in_episode), np.asarray(params.reward_timestep)
    context, rewards = int(state.context), np.asarray(state.rewards)
    canvas = Canvas((-4, last + 4), (0, 1), height=70)
    canvas.line([(0, 0.4), (last, 0.4)], GRID, 3)
    canvas.line([(0, 0.4), (min(int(state.time), last), 0.4)], FAINT, 3)
    for number, (time, reward) in enumerate(zip(times, rewards, strict=True)):
        chosen = number == context
        canvas.disc((int(time), 0.4), 1.4 if chosen else 0.9, GOAL if chosen else STONE)
        if chosen:
            canvas.text((max(int(time), 0), 0.8), f"pays {float(reward):.1f}", GOAL, size=9, anchor="lm")
    canvas.disc((min(int(state.time), last), 0.4), 1.3, AGENT, outline="white")
    return canvas.array()


def _arms(heights: Sequence[float], chosen: int | None, note: str) -> np.ndarray:
    """Bars from zero, one for each arm, with a mark under the one that was pulled last."""
    low, high = min(0.0, *heights), max(1e-6, 0.0, *heights)
    room = 0.3 * (high - low)
    canvas = Canvas((-0.7, len(heights) - 0.3), (low - room, high + room), height=130)
    for place, height in enumerate(heights):
        canvas.rectangle(
            (place - 0.36, place + 0.36), (0, height), AGENT if place == chosen else mix(AGENT, "#FFFFFF", 0.3)
        )
    canvas.line([(-0.7, 0), (len(heights) - 0.3, 0)], FAINT)
    if chosen is not None:
        canvas.disc((chosen, low - 0.5 * room), 0.02 * len(heights), DANGER)
    canvas.text((-0.65, high + 0.65 * room), note, anchor="lm", size=9)
    return canvas.array()


@_known.register
def _(env: bandit.SimpleBandit, state, params) -> np.ndarray:
    """What each arm pays; the state does not remember which one was pulled."""
    return _arms(list(map(float, state.rewards)), None, f"regret so far {float(state.total_regret):.2f}")


@_known.register
def _(env: bernoulli_bandit.BernoulliBandit, state, params) -> np.ndarray:
    chosen = int(np.squeeze(state.last_action)) if float(state.time) > 0 else None
    note = f"probabilities; the last one paid {float(np.squeeze(state.last_reward)):.0f}"
    return _arms(list(map(float, np.ravel(state.reward_probs))), chosen, note)


@_known.register
def _(env: gaussian_bandit.GaussianBandit, state, params) -> np.ndarray:
    chosen = int(np.squeeze(state.last_action)) if float(state.time) > 0 else None
    note = f"mean rewards; the last one paid {float(np.squeeze(state.last_reward)):.2f}"
    return _arms([0.0, float(state.mu)], chosen, note)


@_known.register
def _(env: Tokens, state, params) -> np.ndarray:
    """The prompt in grey, and behind it what has been written so far."""
    tokens, written, across = np.asarray(state.tokens), env.prompt_length + int(state.time), 10
    rows = -(-len(tokens) // across)
    canvas = Canvas((-0.5, min(across, len(tokens)) - 0.5), (rows - 0.5, -0.5), width=32 * min(across, len(tokens)))
    for place, token in enumerate(tokens):
        row, column = divmod(place, across)
        is_prompt, is_written = place < env.prompt_length, place < written
        colour = GRID if is_prompt else mix(AGENT, "#FFFFFF", 0.85) if is_written else FLOOR
        canvas.rectangle((column - 0.45, column + 0.45), (row - 0.42, row + 0.42), colour, round_by=3)
        if is_written:
            words = str(env.names[token])
            size = min(11, 42 / max(1, len(words)))
            canvas.text((column, row), words, INK if is_prompt else "white", size=size, bold=not is_prompt)
    return canvas.array()


# -- the plane --------------------------------------------------------------------------------------------------------


@_known.register
def _(env: point_robot.PointRobot, state, params) -> np.ndarray:
    """A half circle, somewhere on it the goal."""
    radius = float(params.circle_radius)
    canvas = Canvas((-1.6 * radius, 1.6 * radius), (-0.45 * radius, 1.45 * radius))
    angles = np.linspace(0, math.pi, 60)
    canvas.line(radius * np.stack([np.cos(angles), np.sin(angles)], -1), GRID, 2)
    canvas.disc(np.asarray(state.goal), float(params.goal_radius), mix(GOAL, "#FFFFFF", 0.5))
    canvas.disc(np.asarray(state.pos), 0.06 * radius, AGENT, outline="white")
    return canvas.array()


@_known.register
def _(env: reacher.Reacher, state, params) -> np.ndarray:
    """Links whose angles are each their own, and the place to be reached."""
    angles = np.asarray(state.angles, float)
    far = len(angles) + 0.3
    joints = np.concatenate([np.zeros((1, 2)), np.cumsum(np.stack([np.cos(angles), np.sin(angles)], -1), 0)])
    canvas = Canvas((-1.4 * far, 1.4 * far), (-far, far))
    canvas.disc(np.asarray(state.goal_xy), 0.16, mix(GOAL, "#FFFFFF", 0.6))
    for first, second in itertools.pairwise(joints):
        canvas.line([first, second], AGENT, 8)
    for joint in joints[:-1]:
        canvas.disc(joint, 0.07, INK)
    canvas.disc(joints[-1], 0.09, GOLD, outline="white")
    return canvas.array()


@_known.register
def _(env: swimmer.Swimmer, state, params) -> np.ndarray:
    """Urchins on the way to the goal."""
    canvas = Canvas((-2.1, 2.1), (-1.5, 1.5), background=mix(SKY, "#FFFFFF", 0.15))
    canvas.disc(np.asarray(state.goal_xy), 0.14, mix(GOAL, "#FFFFFF", 0.6))
    for urchin in np.asarray(state.urchin_xys):
        canvas.disc(urchin, 0.16, mix(DANGER, "#FFFFFF", 0.35))
        canvas.disc(urchin, 0.06, DANGER)
    at, speed = np.asarray(state.xy, float), np.asarray(state.xy_vel, float)
    canvas.line([at, at - 0.6 * speed], mix(AGENT, "#FFFFFF", 0.4), 5)
    canvas.disc(at, 0.08, AGENT, outline="white")
    return canvas.array()


# -- bodies of MuJoCo -------------------------------------------------------------------------------------------------

# MuJoCo's mjtGeom and mjtJoint, as its models hold them.
PLANE, SPHERE, CAPSULE, CYLINDER, BOX = 0, 2, 3, 5, 6
FREE, BALL, SLIDE, HINGE = range(4)


def of_mujoco(model: Any, qpos: np.ndarray) -> np.ndarray:
    """Bodies of a MuJoCo model in a position `[nq]`, in parallel projection: no renderer, no driver, no screen.

    Bodies that move in one plane only are seen from its side, all others obliquely from above. The picture goes along
    with the first body.
    """
    import mujoco

    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_kinematics(model, data)
    view, planar = _view(model)
    extent, middle = _extent(model)
    follow = np.array(data.xpos[1]) if model.nbody > 1 else np.zeros(3)
    free = model.nbody > 1 and _moves_away(model)
    centre = np.where([free, free, False], follow, middle)
    seen = view @ centre
    half = 0.62 * extent + 0.1 * extent
    canvas = Canvas((seen[0] - 1.45 * half, seen[0] + 1.45 * half), (seen[1] - half, seen[1] + half))
    _floor(canvas, model, view, planar)
    shapes = [geom for geom in range(model.ngeom) if model.geom_type[geom] != PLANE]
    shapes = [geom for geom in shapes if model.geom_rgba[geom, 3] > 0]
    depth = {geom: float((view @ data.geom_xpos[geom])[2]) for geom in shapes}
    for geom in sorted(shapes, key=depth.get):
        _geom(canvas, model, geom, data.geom_xpos[geom], data.geom_xmat[geom].reshape(3, 3), view)
    return canvas.array()


def by_mujoco(env: Any) -> Callable[[Any], np.ndarray]:
    """`draw(state) -> image` by MuJoCo's own renderer. ConfigurationError where there is no model, or no EGL or OSMesa.

    MuJoCo reads MUJOCO_GL when it is imported, so whoever calls this sets it before, to egl or osmesa.
    """
    import mujoco

    while _bodies(env) is None and vars(env).get("env") is not None:
        env = env.env
    found = _bodies(env)
    require(found is not None, f"--mujoco is for bodies of MuJoCo, which {name_of(env)} has not")
    model, qpos_of = found
    try:
        renderer = mujoco.Renderer(model, height=480, width=640)
    except Exception as error:  # whatever a driver does
        words = " ".join(str(error).split())
        require(False, f"--mujoco needs EGL or OSMesa (MUJOCO_GL=egl or osmesa), and MuJoCo says: {words}")
    camera = mujoco.MjvCamera()
    mujoco.mjv_defaultFreeCamera(model, camera)
    if model.nbody > 1 and _moves_away(model):
        camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
    camera.distance, camera.elevation = 1.9 * _extent(model)[0], -15.0

    def draw(state: Any) -> np.ndarray:
        while hasattr(state, "inner"):
            state = state.inner
        data = mujoco.MjData(model)
        data.qpos[:] = qpos_of(state)
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, camera)
        return renderer.render()

    return draw


def by_brax(env: Any) -> Callable[[Any], str]:
    """`page(states) -> html` of brax's viewer, states `[T, ...]`. ConfigurationError for other environments."""
    while not isinstance(vars(env).get("env"), _brax_kinds()) and vars(env).get("env") is not None:
        env = env.env
    inner = vars(env).get("env")
    require(
        isinstance(inner, _brax_kinds()) and hasattr(inner, "sys"),
        f"--viewer is brax's page, for its environments with bodies; this one is {name_of(env)}",
    )

    def page(states: Any) -> str:
        from brax.io import html

        while hasattr(states, "inner"):
            states = states.inner
        moving = states.brax.pipeline_state
        count = len(np.asarray(states.time))
        return html.render(
            inner.sys, [jax.tree.map(lambda x: x[step], moving) for step in range(count)], height="100vh"
        )

    return page


def _brax_kinds() -> tuple[type, ...]:
    """brax's environments, if anybody has imported them: then one of them may be there."""
    module = sys.modules.get("brax.envs")
    return (module.Env,) if module else ()


def _bodies(env: Any) -> tuple[Any, Callable[[Any], np.ndarray]] | None:
    """The MuJoCo model of an environment and the position in its state, or None: of ours, and of brax's."""
    if (model := vars(env).get("mujoco_model")) is not None:
        return model, lambda state: np.asarray(state.qpos)
    inner = vars(env).get("env")
    model = getattr(getattr(inner, "sys", None), "mj_model", None)
    return None if model is None else (model, lambda state: np.asarray(state.brax.pipeline_state.q))


def _view(model: Any) -> tuple[np.ndarray, bool]:
    """Rows: to the right, up and towards the viewer; and whether all is seen from the side or from above."""
    axes = np.abs(np.array([model.jnt_axis[j] for j in range(model.njnt) if model.jnt_type[j] == HINGE]).reshape(-1, 3))
    if not np.isin(model.jnt_type, (FREE, BALL)).any() and len(axes):
        if (axes[:, 1] > 0.99).all():
            return np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]), True
        if (axes[:, 2] > 0.99).all():
            return np.eye(3), True
    turn, up = math.radians(-60), math.radians(22)
    forward = np.array([math.cos(turn) * math.cos(up), math.sin(turn) * math.cos(up), math.sin(up)])
    right = np.array([-math.sin(turn), math.cos(turn), 0])
    return np.stack([right, np.cross(forward, right), forward]), False


def _moves_away(model: Any) -> bool:
    """Whether the first body can leave the place: it is free, or slides on without an end."""
    first = [j for j in range(model.njnt) if model.jnt_bodyid[j] == 1]
    return any(model.jnt_type[j] == FREE or (model.jnt_type[j] == SLIDE and not model.jnt_limited[j]) for j in first)


def _extent(model: Any) -> tuple[float, np.ndarray]:
    """Largest side of what the bodies fill in their first position, and its middle; planes left out."""
    import mujoco

    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    chosen = [g for g in range(model.ngeom) if model.geom_type[g] != PLANE]
    if not chosen:
        return 1.0, np.zeros(3)
    at, size = data.geom_xpos[chosen], np.array([min(float(model.geom_rbound[g]), 10.0) for g in chosen])[:, None]
    low, high = (at - size).min(0), (at + size).max(0)
    return float(max(0.2, (high - low).max())), (low + high) / 2


def _floor(canvas: Canvas, model: Any, view: np.ndarray, planar: bool) -> None:
    """The ground with marks that pass by, by which one sees how fast it goes."""
    planes = [g for g in range(model.ngeom) if model.geom_type[g] == PLANE]
    if not planes:
        return
    height = float(model.geom_pos[planes[0], 2])
    left, right = canvas.x
    step = 0.5 if right - left < 6 else 1.0
    if planar and view[1, 2] == 1:
        canvas.rectangle((left, right), (canvas.y[0], height), FLOOR)
        canvas.line([(left, height), (right, height)], FAINT, 1.5)
        for place in np.arange(math.floor(left / step) * step, right + step, step):
            canvas.line([(place, height), (place - 0.06 * (right - left) / 3, canvas.y[0])], GRID)
        return
    centre = view[:2].T @ np.array([np.mean(canvas.x), np.mean(canvas.y)])
    reach = 2.2 * (right - left)
    for axis in (0, 1):
        for place in np.arange(-reach, reach, step) + math.floor(centre[axis] / step) * step:
            ends = np.full((2, 3), height)
            ends[:, axis] = place
            ends[:, 1 - axis] = centre[1 - axis] - reach, centre[1 - axis] + reach
            canvas.line((ends @ view.T)[:, :2], GRID)


def _geom(canvas: Canvas, model: Any, geom: int, at: np.ndarray, axes: np.ndarray, view: np.ndarray) -> None:
    """One shape: its outline in a darker colour, then itself."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    rgba = model.geom_rgba[geom]
    red, green, blue = (int(255 * min(1.0, max(0.0, x))) for x in rgba[:3])
    colour = f"#{red:02X}{green:02X}{blue:02X}"
    colour = mix(AGENT, "#FFFFFF", 0.65) if max(red, green, blue) - min(red, green, blue) < 12 else colour
    dark, place = mix(colour, INK, 0.6), (view @ at)[:2]
    unit = abs(canvas.scale[0]) / 3  # pixels of the picture in a unit
    if kind in (CAPSULE, CYLINDER):
        half = (view @ (axes[:, 2] * size[1]))[:2]
        ends, round_ends = [place - half, place + half], kind == CAPSULE
        canvas.line(ends, dark, 2 * size[0] * unit + 1.4, ends=round_ends)
        canvas.line(ends, colour, max(0.8, 2 * size[0] * unit - 1), ends=round_ends)
    elif kind == BOX:
        corners = np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T * size
        canvas.polygon(_hull((at + corners @ axes.T) @ view[:2].T), colour, dark)
    else:
        radius = size[0] if kind == SPHERE else max(size.max(), 1e-3)
        canvas.disc(place, radius, colour, outline=dark, line=0.8)


def _hull(points: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull, QhullError

    try:
        return points[ConvexHull(points).vertices]
    except QhullError:  # seen exactly along an edge
        return points

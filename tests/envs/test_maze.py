"""The maze by hand, its shortest ways against a search in Python, and the levels that it draws."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.envs import check_env, maze
from jaxrl_dist.envs.maze import FORWARD, LEFT, RIGHT, Maze

CORNER = "... .#. >#G"
AROUND = [LEFT, FORWARD, FORWARD, RIGHT, FORWARD, FORWARD, RIGHT, FORWARD, FORWARD]


def fixed(env, text, **changes):
    return env.default_params.replace(level=maze.parse(text), fresh_levels=False, **changes)


def play(env, params, actions):
    """[(observation, state, reward, terminated, truncated)] of an episode from its start on."""
    observation, state = env.reset(jax.random.key(0), params)
    lived = [(observation, state, 0.0, False, False)]
    for time, action in enumerate(actions, 1):
        _, state, reward, *ends, info = env.step(jax.random.key(time), state, jnp.int32(action), params)
        lived.append((info["final_observation"], state, float(reward), *map(bool, ends)))
    return lived


def search(level) -> int:
    """Fewest actions by breadth-first search over places and directions; -1 where there is no way."""
    walls, goal = np.asarray(level.walls), tuple(int(x) for x in level.goal)
    start = (*(int(x) for x in level.start), int(level.direction))
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        (x, y, direction), steps = queue.popleft()
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[direction]
        ahead = x + dx, y + dy
        if ahead == goal:
            return steps + 1
        following = [(x, y, (direction + turn) % 4) for turn in (-1, 1)]
        if all(0 <= i < len(walls) for i in ahead) and not walls[ahead[1], ahead[0]]:
            following.append((*ahead, direction))
        for one in following:
            if one not in seen:
                seen.add(one)
                queue.append((one, steps + 1))
    return -1


def one_of(levels, i):
    return jax.tree.map(lambda x: x[i], levels)


def drawn(env, count):
    return jax.jit(jax.vmap(env.draw))(jax.random.split(jax.random.key(3), count))


def test_it_keeps_the_contract():
    assert check_env(Maze()) == []
    env, params = envs.make("maze", size=5, view=3, walls=4, time_scale=20.0)
    assert (env.size, env.walls, params.time_scale) == (5, 4, 20.0)
    assert env.observation_space(params).shape == (23,)


def test_around_the_wall_into_the_goal():
    """The sheet's level: nine actions, 0.9676 of 1."""
    env = Maze(size=3, view=3, walls=2)
    lived = play(env, fixed(env, CORNER, time_scale=250.0), AROUND)
    places = [tuple(int(x) for x in state.position) for _, state, *_ in lived[:-1]]
    assert places == [(0, 2), (0, 2), (0, 1), (0, 0), (0, 0), (1, 0), (2, 0), (2, 0), (2, 1)]
    assert [step[2] for step in lived[:-1]] == [0] * 9
    assert lived[-1][2:] == (pytest.approx(0.9676), True, False)
    assert tuple(lived[-1][1].position) == (0, 2)  # another episode in the same level


def test_walls_and_the_border_stop_it():
    env = Maze(size=3, view=3, walls=2)
    lived = play(env, fixed(env, CORNER), [FORWARD, RIGHT, FORWARD, RIGHT, FORWARD])
    assert {tuple(int(x) for x in state.position) for _, state, *_ in lived} == {(0, 2)}
    assert [int(state.direction) for _, state, *_ in lived] == [0, 0, 1, 1, 2, 2]


def test_what_it_sees():
    """Rows are those ahead, nearest first; columns from left to right of the agent, in the middle of each row."""
    env = Maze(size=3, view=3, walls=2)
    lived = play(env, fixed(env, CORNER), [LEFT, FORWARD])
    looks_right = np.asarray(lived[0][0])
    np.testing.assert_array_equal(looks_right[:9].reshape(3, 3), [[0, 0, 1], [1, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(looks_right[9:18].reshape(3, 3), [[0, 0, 0], [0, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(looks_right[18:], [1, 0, 0, 0, 0])
    looks_up = np.asarray(lived[2][0])  # from the middle of the left edge
    np.testing.assert_array_equal(looks_up[:9].reshape(3, 3), [[1, 0, 1], [1, 0, 0], [1, 1, 1]])
    assert not looks_up[9:18].any()
    np.testing.assert_array_equal(looks_up[18:], [0, 0, 0, 1, 2 / 64])
    late = play(env, fixed(env, CORNER, time_scale=4.0), [LEFT] * 5)
    assert [float(step[0][-1]) for step in late] == [0, 0.25, 0.5, 0.75, 1, 1]
    blind = Maze(size=3, view=3, walls=2, shows_time=False)
    np.testing.assert_array_equal(play(blind, fixed(blind, CORNER), [LEFT, FORWARD])[2][0], looks_up[:-1])


def test_episodes_end_at_the_time_limit_without_terminating():
    env = Maze(size=3, view=3, walls=2)
    lived = play(env, fixed(env, CORNER, max_steps_in_episode=3), [LEFT] * 3)
    assert [step[3:] for step in lived] == [(False, False)] * 3 + [(False, True)]


def test_a_level_is_kept_and_a_fresh_one_is_not():
    env = Maze(size=5)
    params = env.default_params

    def keys(seed):
        return jax.random.split(jax.random.key(seed), 20)

    levels = jax.vmap(env.sample_level, in_axes=(0, None))(keys(0), params)
    states = jax.vmap(env.reset)(keys(1), levels)[1]
    jax.tree.map(np.testing.assert_array_equal, states.level, levels.level)
    fresh = jax.vmap(env.reset, in_axes=(0, None))(keys(2), params)[1].level
    assert len(np.unique(np.asarray(fresh.walls).reshape(20, -1), axis=0)) > 15
    # What comes after an episode's end is the same level, or another one.
    states = states.replace(time=jnp.full(20, params.max_steps_in_episode - 1))
    step = jax.vmap(env.step, in_axes=(0, 0, None, 0))
    after = step(keys(3), states, jnp.int32(LEFT), levels)
    assert after[4].all()
    jax.tree.map(np.testing.assert_array_equal, after[1].level, levels.level)
    after = jax.vmap(env.step, in_axes=(0, 0, None, None))(keys(4), states, jnp.int32(LEFT), params)
    assert (np.asarray(after[1].level.walls) != np.asarray(levels.level.walls)).any((1, 2)).mean() > 0.8


def test_levels_are_well_formed_and_as_hard_as_they_should_be():
    """13 x 13 with 25 draws of a wall: 169 (1 - (168 / 169)^25) = 23.30 walls, and nearly all can be solved."""
    levels = drawn(Maze(size=13, walls=25), 1500)
    walls = np.asarray(levels.walls)
    assert walls.sum((1, 2)).mean() == pytest.approx(23.30, abs=4 * 1.3 / np.sqrt(1500))
    for cell in (levels.goal, levels.start):
        x, y = np.asarray(cell).T
        assert not walls[np.arange(1500), y, x].any()
    assert (np.asarray(levels.goal) != np.asarray(levels.start)).any(-1).all()
    needed = np.asarray(jax.jit(jax.vmap(maze.actions_needed))(levels))
    assert (needed > 0).mean() == pytest.approx(0.997, abs=0.006)
    assert needed[needed > 0].mean() == pytest.approx(11.6, abs=0.6)
    assert set(np.unique(levels.direction)) == {0, 1, 2, 3}


def test_shortest_ways_are_those_of_a_search():
    levels = drawn(Maze(size=5, walls=12), 200)
    needed = np.asarray(jax.jit(jax.vmap(maze.actions_needed))(levels))
    assert (needed < 0).sum() > 10
    np.testing.assert_array_equal(needed, [search(one_of(levels, i)) for i in range(200)])
    assert maze.actions_needed(maze.parse(CORNER)) == len(AROUND)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Maze(size=1), "size is 1; it must be at least 2"),
        (lambda: Maze(view=4), "view is 4; it must be odd and at least 1"),
        (lambda: Maze(size=3, walls=8), r"walls is 8; it must be in \[0, 7\]"),
        (lambda: maze.parse(">. G"), "is not square"),
        (lambda: maze.parse(".. G."), "must have one goal and one agent"),
        (lambda: maze.parse(">x G."), r"has \['x'\]; allowed are"),
    ],
)
def test_what_makes_no_maze_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

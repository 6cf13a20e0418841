"""Every environment has a drawing, which changes with what it shows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.envs import drawings, maze
from jaxrl_dist.envs.bridge import BridgeState
from jaxrl_dist.envs.tabular import TabularState
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.spaces import spaces_of

# Bodies of MuJoCo are all drawn alike, and slow to make: this one stands for the others.
OF_BODIES = {"brax/hopper"}
IDS = [
    env_id
    for family, ids in envs.available().items()
    for env_id in ids
    if family not in ("brax", "mujoco", "jumanji", "playground", "craftax", "navix") or env_id in OF_BODIES
]


@functools.cache
def walk(env_id, steps=12, **options):
    """The environment, its parameters, and states of an episode under random actions, leaves of numpy."""
    env, params = envs.make(env_id, **options)
    space = spaces_of(env, params)[0]

    def one(carry, key):
        action_key, step_key = jax.random.split(key)
        observation, state, *_ = env.step(step_key, carry[1], space.sample(action_key), params)
        following = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), (observation, state), carry)
        return following, following

    first = interaction.strengthen(env.reset(jax.random.key(1), params))
    _, later = jax.jit(lambda first: jax.lax.scan(one, first, jax.random.split(jax.random.key(2), steps)))(first)
    both = jax.tree.map(lambda one, more: np.concatenate([np.asarray(one)[None], more]), first, later)
    return env, params, [jax.tree.map(lambda x: x[index], both) for index in range(steps + 1)]


@pytest.mark.parametrize("env_id", IDS)
def test_every_environment_is_drawn_and_its_pictures_change_with_its_states(env_id):
    env, params, moments = walk(env_id)
    drawings.require_picture(env)
    pictures = [drawings.picture(env, state, params) for _, state in moments]
    (shape,) = {picture.shape for picture in pictures}
    assert 60 <= shape[0] <= 1000
    assert 100 <= shape[1] <= 1000
    assert len({picture.tobytes() for picture in pictures}) > 1
    assert all(picture.std() > 2 for picture in pictures)
    # It depends on the state alone, and leaves it as it was.
    np.testing.assert_array_equal(drawings.picture(env, moments[0][1], params), pictures[0])


def test_the_walker_is_where_it_is_and_falls_into_the_canyon():
    env, params = envs.make("bridge")
    at = lambda **state: drawings.picture(env, BridgeState(**state), params)  # noqa: E731
    start = at(time=0, lane=1, fallen=False)
    assert len({at(time=time, lane=lane, fallen=False).tobytes() for time in range(7) for lane in range(3)}) == 21
    fallen = at(time=2, lane=2, fallen=True)
    rows = np.flatnonzero((fallen != start).any((1, 2)))
    assert rows.max() > 0.85 * len(start)


def test_grids_show_where_walks_can_end():
    env, params = envs.make("tabular/cliff")
    assert env.marks == {(3, 5): "goal"} | {(3, column): "danger" for column in range(1, 5)}
    assert {kind for _, kind in envs.make("tabular/maze")[0].marks.items()} == {"goal", "wall"}
    assert envs.make("shortcut")[0].marks[(1, 1)] == "danger"
    first = drawings.picture(env, TabularState(time=0, state=0, ended=False), params)
    assert (first != drawings.picture(env, TabularState(time=0, state=0, ended=True), params)).any()


def test_an_agent_in_a_maze_points_in_its_direction():
    env, params = envs.make("maze")
    level = maze.parse(".......\n.......\n.......\n...>...\n.......\n.......\n......G")
    _, state = env.reset(jax.random.key(0), params.replace(level=level, fresh_levels=False))
    pictures = [drawings.picture(env, state.replace(direction=turn), params) for turn in range(4)]
    np.testing.assert_array_equal(pictures[0].shape[:2], pictures[0].shape[1::-1])
    for turn in (1, 2, 3):
        turned = np.rot90(pictures[0], -turn)
        # But for the goal, which stays where it is, and the last pixel of edges.
        differ = (np.abs(turned.astype(int) - pictures[turn]) > 8).any(-1).mean()
        assert differ < 0.08, turn
        assert (pictures[turn] != pictures[0]).any()


def test_wrappers_are_drawn_as_what_is_inside():
    plain, params = envs.make("Pendulum-v1")
    env, _ = envs.make("discretised/Pendulum-v1")
    _, state = env.reset(jax.random.key(0), params)
    np.testing.assert_array_equal(drawings.picture(env, state, params), drawings.picture(plain, state, params))
    stock, stock_params = envs.make("stock/CartPole-v1")
    _, state = stock.reset(jax.random.key(0), stock_params)
    inner, _ = envs.make("CartPole-v1")
    alone = drawings.picture(inner, state.inner, stock_params.inner)
    together = drawings.picture(stock, state, stock_params)
    np.testing.assert_array_equal(together[: len(alone)], alone)
    richer = drawings.picture(stock, state.replace(stock=state.stock + 0.3), stock_params)
    assert (richer[: len(alone)] == alone).all()
    assert (richer != together).any()
    stacked, params = envs.make("CartPole-v1", frame_stack=2, sticky_actions=0.25)
    _, state = stacked.reset(jax.random.key(0), params)
    while hasattr(state, "inner"):
        inside = state = state.inner
    _, outside = stacked.reset(jax.random.key(0), params)
    np.testing.assert_array_equal(drawings.picture(stacked, outside, params), drawings.picture(inner, inside, params))


def test_bodies_that_leave_the_plane_are_seen_obliquely_and_followed():
    from brax.envs import get_environment

    model = get_environment("ant").sys.mj_model
    rest = np.array(model.qpos0)
    moved, lifted, bent = (rest + step * np.eye(len(rest))[place] for place, step in ((0, 2.3), (2, 0.5), (8, 0.6)))
    pictures = [drawings.of_mujoco(model, qpos) for qpos in (rest, moved, lifted, bent)]
    assert len({picture.tobytes() for picture in pictures}) == 4
    brown = [np.argwhere(np.diff(picture[..., ::2].astype(int))[..., 0] < -20).mean(0) for picture in pictures]
    # Who walks stays in the middle, and marks on the ground go by; who jumps goes up.
    np.testing.assert_allclose(brown[1], brown[0], atol=1)
    assert brown[2][0] < brown[0][0] - 20


def test_bodies_can_be_drawn_by_others_too():
    """By MuJoCo's renderer where a driver is there, else that is said; and on brax's own page."""
    env, _, moments = walk("brax/hopper")
    states = jax.tree.map(lambda *x: np.stack(x), *(state for _, state in moments[:3]))
    page = drawings.by_brax(env)(states)
    assert "brax-viewer" in page
    try:
        image = drawings.by_mujoco(env)(moments[0][1])
    except ConfigurationError as error:
        assert "--mujoco needs EGL or OSMesa" in str(error)  # noqa: PT017
    else:
        assert (image.shape, image.dtype) == ((480, 640, 3), np.uint8)
        assert image.std() > 2
    plain, _ = envs.make("CartPole-v1")
    for ask, name in ((drawings.by_brax, "--viewer"), (drawings.by_mujoco, "--mujoco")):
        with pytest.raises(ConfigurationError, match=name):
            ask(plain)


class Plain:
    """An environment that nobody has drawn."""

    name = "plain"


class Wrong(Plain):
    def picture(self, state, params):
        return np.zeros((4, 4))


def test_an_environment_without_a_drawing_says_what_to_write():
    for ask in (lambda: drawings.require_picture(Plain()), lambda: drawings.picture(Plain(), None, None)):
        with pytest.raises(ValueError, match=r"plain has no drawing: give its class a method picture\(self, state"):
            ask()
    with pytest.raises(ValueError, match=r"picture of plain is float64 \[4, 4\]; it must be an image, uint8"):
        drawings.picture(Wrong(), None, None)


@pytest.mark.parametrize("shape", [(), (3,), (30,), (10, 10), (10, 10, 4), (5, 5, 2, 3)])
def test_what_an_agent_sees_can_always_be_drawn(shape):
    values = np.random.default_rng(0).normal(size=shape)
    picture = drawings.observed(values)
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert (picture != drawings.observed(np.zeros(shape))).any()

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.envs import bridge, check_env, make
from jaxrl_dist.envs.bridge import Bridge, BridgeParams

KEEP, TO_WALL, TO_EDGE = range(3)
WALL, MIDDLE, EDGE = range(3)
DISCOUNT = 0.9
TWO = BridgeParams(step_costs=(3.0, 2.0, 1.0), slips=(0.0, 0.25, 0.5), climb_cost=4.0, fall_cost=10.0, goal_reward=20.0)


def table():
    """Rows (risk, lane, value, gap) of the table in the module's docstring."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bridge.__doc__.splitlines() if "|" in line]
    assert rows[0] == ["risk", "lane", "value", "gap"]
    return [
        (risk, ("wall", "middle", "edge").index(lane), float(value), float(gap)) for risk, lane, value, gap in rows[2:]
    ]


def walk(env, params, actions, fallen_at=None, seed=0):
    """[(observation, reward, terminated, truncated, final observation)]: `env.step` with slips that are 0 or 1."""
    key_reset, key = jax.random.split(jax.random.key(seed))
    observation, state = env.reset(key_reset, params)
    rows = []
    for step, action in enumerate(actions):
        lanes = len(params.slips)
        now = params.replace(slips=(float(step == fallen_at),) * lanes)
        key, key_step = jax.random.split(key)
        following, state, reward, terminated, truncated, info = env.step(key_step, state, jnp.int32(action), now)
        rows.append((np.asarray(observation), float(reward), bool(terminated), bool(truncated)))
        rows[-1] += (np.asarray(info["final_observation"]),)
        observation = following
    return rows, np.asarray(observation)


def one_hot(index, size):
    return np.eye(size + 1)[index if index < size else size, :size]


# -- the environment --------------------------------------------------------------------------------------------------


def test_an_episode_by_hand():
    env = Bridge(length=3)
    rows, after = walk(env, TWO, [TO_EDGE, TO_EDGE, TO_WALL, KEEP])
    # The first change is free, the move beyond the edge is none, the change back climbs.
    assert [row[1] for row in rows] == [-1, -1, -2 - 4 + 20, -2]
    assert [row[2] for row in rows] == [False, False, True, False]
    assert not any(row[3] for row in rows)
    states = [MIDDLE, 3 + EDGE, 6 + EDGE, MIDDLE]  # column * 3 + lane; the fourth step begins a new episode
    np.testing.assert_array_equal([row[0] for row in rows], [one_hot(state, 9) for state in states])
    successors = [3 + EDGE, 6 + EDGE, 9, 3 + MIDDLE]  # the goal has no entry of its own
    np.testing.assert_array_equal([row[4] for row in rows], [one_hot(state, 9) for state in successors])
    np.testing.assert_array_equal(after, one_hot(3 + MIDDLE, 9))


@pytest.mark.parametrize(("fallen_at", "reward"), [(0, -3 - 10), (1, -3 - 10), (2, -3 - 10)])
def test_a_fall_ends_the_episode(fallen_at, reward):
    """In the last column too, where it pays no goal."""
    rows, after = walk(Bridge(length=3), TWO, [TO_WALL, KEEP, KEEP][: fallen_at + 1], fallen_at)
    assert [row[2] for row in rows] == [False] * fallen_at + [True]
    assert rows[-1][1] == reward
    np.testing.assert_array_equal(rows[-1][4], one_hot(3 * (fallen_at + 1) + WALL, 9))
    np.testing.assert_array_equal(after, one_hot(MIDDLE, 9))


def test_it_keeps_the_contract():
    env, params = make("bridge")
    assert check_env(env, params) == []
    assert check_env(env, params.replace(max_steps_in_episode=2**30)) == []
    assert check_env(Bridge(length=5), TWO) == []


def test_the_default_time_limit_is_never_reached():
    env, params = make("bridge", length=1, slips=(0.0, 0.0), step_costs=(1.0, 2.0))
    assert params.max_steps_in_episode == 2
    rows, _ = walk(env, params, [KEEP] * 4)
    assert [row[2:4] for row in rows] == [(True, False)] * 4


def test_options_are_read_from_text():
    env, params = make("bridge", length="4", slips="(0, 0.1)", step_costs="(2, 1)", fall_cost="3")
    assert (env.length, params.slips, params.step_costs, params.fall_cost) == (4, (0, 0.1), (2, 1), 3.0)
    assert env.observation_space(params).shape == (8,)


# -- exact laws -------------------------------------------------------------------------------------------------------


def test_laws_of_a_short_bridge_by_hand():
    env = Bridge(length=2)
    keep = np.full((2, 3), KEEP)
    # Middle: the first step costs 2 and falls with 1/4, and so does the second, in which the rest weighs 0.9.
    law = bridge.return_law(env, TWO, keep, DISCOUNT)
    np.testing.assert_allclose(law.atoms, [-12, -2 - 0.9 * 12, -2 + 0.9 * 18])
    np.testing.assert_allclose(law.masses, [1 / 4, 3 / 16, 9 / 16])
    # Edge and back: the free change, a fall with 1/2; then 2 + 4 for the lane and the climb.
    back = keep.copy()
    back[1, EDGE] = TO_WALL
    law = bridge.return_law(env, TWO, back, DISCOUNT, first_action=TO_EDGE)
    np.testing.assert_allclose(law.atoms, [-11, -1 - 0.9 * 16, -1 + 0.9 * 14])
    np.testing.assert_allclose(law.masses, [1 / 2, 1 / 8, 3 / 8])
    # From column 1 a change climbs, and time begins anew.
    law = bridge.return_law(env, TWO, keep, DISCOUNT, column=1, lane=WALL, first_action=TO_EDGE)
    np.testing.assert_allclose(law.atoms, [-6 - 10, -6 + 20])
    np.testing.assert_allclose(law.masses, [1 / 4, 3 / 4])


def test_masses_sum_to_one():
    env, params = make("bridge")
    rng = np.random.default_rng(0)
    for _ in range(20):
        policy, column, lane = rng.integers(0, 3, (6, 3)), rng.integers(6), rng.integers(3)
        law = bridge.return_law(env, params, policy, DISCOUNT, column, lane, rng.integers(3))
        assert law.atoms.shape == law.masses.shape == (6 - column + 1,)
        assert law.atoms.dtype == law.masses.dtype == np.float64
        np.testing.assert_allclose(law.masses.sum(), 1, rtol=1e-14)
        assert (law.masses >= 0).all()


def test_laws_against_episodes_of_many_levels():
    """Three levels of danger side by side, by a vmap over parameters; returns are told apart by their atoms."""
    env, params = make("bridge")
    factors, episodes = (1.0, 2.0, 4.0), 4000
    levels = [params.replace(slips=tuple(f * s for s in (0.02, 0.04, 0.1)), fall_cost=10.0 + f) for f in factors]
    batch = jax.tree.map(lambda *leaves: jnp.stack([jnp.float32(leaf) for leaf in leaves]), *levels)
    policy = np.random.default_rng(1).integers(0, 3, (6, 3))
    policy[0, MIDDLE], policy[1, EDGE], policy[3, MIDDLE] = TO_EDGE, TO_WALL, TO_WALL

    reset, step = jax.vmap(env.reset, in_axes=(0, None)), jax.vmap(env.step, in_axes=(0, 0, 0, None))

    @jax.jit
    def returns(key, params):
        key_reset, key = jax.random.split(key)
        _, state = reset(jax.random.split(key_reset, episodes), params)

        def body(carry, _):
            key, state, weight = carry
            key, key_step = jax.random.split(key)
            action = jnp.asarray(policy)[state.time, state.lane]
            _, state, reward, terminated, *_ = step(jax.random.split(key_step, episodes), state, action, params)
            return (key, state, DISCOUNT * weight * ~terminated), weight * reward

        carry, rewards = jax.lax.scan(body, (key, state, jnp.ones(episodes)), None, length=env.length)
        return rewards.sum(0), carry[2]

    for number, level in enumerate(levels):
        one = jax.tree.map(lambda leaf: leaf[number], batch)
        got, unfinished = (np.asarray(x, float) for x in returns(jax.random.key(number), one))
        assert not unfinished.any()
        law = bridge.return_law(env, level, policy, DISCOUNT)
        distance = np.abs(got[:, None] - law.atoms)
        np.testing.assert_allclose(distance.min(1), 0, atol=1e-4)
        frequencies = (distance < 1e-3).mean(0)
        deviation = np.sqrt(law.masses * (1 - law.masses) / episodes)
        np.testing.assert_array_less(np.abs(frequencies - law.masses), 4 * deviation)


def test_a_vmap_over_levels_is_each_level_alone():
    env, params = make("bridge")
    levels = [params, params.replace(slips=(0.1, 0.9, 0.5), step_costs=(1.0, 2.0, 3.0), goal_reward=1.0)]
    batch = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *levels)

    def two_steps(key, params):
        keys = jax.random.split(key, 3)
        state = env.reset(keys[0], params)[1]
        first = env.step(keys[1], state, jnp.int32(TO_EDGE), params)
        return first, env.step(keys[2], first[1], jnp.int32(TO_WALL), params)

    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(two_steps))(jax.random.clone(keys), batch)
    for number, level in enumerate(levels):
        alone = two_steps(jax.random.clone(keys)[number], level)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[number], rtol=1e-6), alone, together)


# -- risk -------------------------------------------------------------------------------------------------------------


def slow_value(name, law):
    """Distorted mean by a loop over the ascending atoms, apart from `risk.value`."""
    kind, _, level = name.partition(":")
    level = float(level or 0)

    def cumulative(mass):
        if mass >= 1 - 1e-12:
            return 1.0
        return {"neutral": mass, "cvar": min(mass / (level or 1), 1.0), "wang": ndtr(ndtri(mass) - level)}[kind]

    total, mass = 0.0, 0.0
    for i in np.argsort(law.atoms):
        total += law.atoms[i] * (cumulative(mass + law.masses[i]) - cumulative(mass))
        mass += law.masses[i]
    return total


def slow_law(length, params, path, discount):
    """The law of a path from the start, one step at a time."""
    atoms, masses, gained, weight, alive, lane = [], [], 0.0, 1.0, 1.0, (len(params.slips) - 1) // 2
    for step, to in enumerate(path):
        gained -= weight * (params.step_costs[to] + params.climb_cost * (step > 0 and to != lane))
        atoms.append(gained - weight * params.fall_cost)
        masses.append(alive * params.slips[to])
        alive, lane = alive * (1 - params.slips[to]), to
        if step == length - 1:
            gained += weight * params.goal_reward
        weight *= discount
    return bridge.Law(np.array(atoms + [gained]), np.array(masses + [alive]))


@pytest.mark.parametrize("discount", [0.99, 1.0])
def test_the_table_in_the_docstring(discount):
    """Both criteria choose the lane of the table, at both discounts; value and gap are those of 0.99."""
    env, params = make("bridge")
    rows = table()
    assert len(rows) == 10
    assert {row[1] for row in rows} == {WALL, MIDDLE, EDGE}
    for name, lane, value, gap in rows:
        risk = risks.parse(name)
        policy = bridge.risk_policy(env, params, risk, discount)
        np.testing.assert_array_equal(bridge.path_of(env, params, policy), [lane] * 6)
        np.testing.assert_array_equal(bridge.best_static_path(env, params, risk, discount), [lane] * 6)
        values = np.sort(bridge.action_values(env, params, policy, risk, discount))
        assert values[-1] - values[-2] > 0.4
        assert slow_value(name, slow_law(6, params, [lane] * 6, discount)) == pytest.approx(values[-1], abs=1e-6)
        if discount == 0.99:
            np.testing.assert_allclose([values[-1], values[-1] - values[-2]], [value, gap], atol=0.005)


def test_the_chances_to_fall_in_the_docstring():
    env, params = make("bridge")
    falls = [bridge.return_law(env, params, np.zeros((6, 3), int), 1, first_action=a).masses[:-1].sum() for a in (0, 2)]
    np.testing.assert_allclose(falls, [0.09, 0.52], atol=0.005)


@pytest.mark.parametrize("name", ["neutral", "cvar:0.3", "wang:-0.6"])
def test_policies_against_brute_force(name):
    """Small random bridges, in which the lane changes on the way and the two criteria need not agree."""
    rng, risk, env = np.random.default_rng(0), risks.parse(name), Bridge(length=3)
    for _ in range(6):
        params = BridgeParams(
            step_costs=tuple(rng.uniform(0, 4, 4)),
            slips=tuple(rng.uniform(0, 0.5, 4)),
            climb_cost=rng.uniform(0, 2),
            fall_cost=rng.uniform(0, 10),
        )
        best = max(
            (p for p in product(range(4), repeat=3) if all(abs(a - b) <= 1 for a, b in zip((1, *p), p, strict=False))),
            key=lambda path: slow_value(name, slow_law(3, params, path, DISCOUNT)),
        )
        np.testing.assert_array_equal(bridge.best_static_path(env, params, risk, DISCOUNT), best)

        policy = bridge.risk_policy(env, params, risk, DISCOUNT)
        for column, lane in product(range(3), range(4)):
            laws = [bridge.return_law(env, params, policy, DISCOUNT, column, lane, action) for action in range(3)]
            values = [slow_value(name, law) for law in laws]
            assert values[policy[column, lane]] == pytest.approx(max(values), abs=1e-9)
            got = bridge.action_values(env, params, policy, risk, DISCOUNT, column, lane)
            np.testing.assert_allclose(got, values, atol=1e-6)
        if name == "neutral":  # the mean is the criterion for which both are the same
            np.testing.assert_array_equal(bridge.path_of(env, params, policy), best)


def test_the_two_criteria_can_differ():
    """CVaR of a walk that falls anyway in the worst 20 %: static gives those up, greedy rescues itself from each state.

    Two steps, a fall costs 10. Lane 0 costs 1 and slips with 0.1, lane 1 costs nothing and slips with 0.15.
    """
    env, risk = Bridge(length=2), risks.parse("cvar:0.2")
    params = BridgeParams(step_costs=(1.0, 0.0), slips=(0.1, 0.15), climb_cost=0.0, fall_cost=10.0, goal_reward=0.0)
    policy = bridge.risk_policy(env, params, risk, 1.0)
    # Last step: lane 0 is worth -(0.1 * 11 + 0.1 * 1) / 0.2 = -6, lane 1 -(0.15 * 10) / 0.2 = -7.5.
    np.testing.assert_allclose(bridge.action_values(env, params, policy, risk, 1.0, 1, 0), [-6, -6, -7.5])
    # From the start, by the lanes: 00 -(0.1 * 11 + 0.09 * 12 + 0.01 * 2) / 0.2, 10 -(0.085 * 11 + 0.115 * 10) / 0.2;
    # 11 falls in more than a fifth of the walks, so its worst fifth is -10 and nothing worse.
    np.testing.assert_allclose(bridge.action_values(env, params, policy, risk, 1.0), [-11, -11, -10.425])
    np.testing.assert_array_equal(bridge.path_of(env, params, policy), [1, 0])
    np.testing.assert_array_equal(bridge.best_static_path(env, params, risk, 1.0), [1, 1])


# -- bad input and the picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slips": (0.0, 0.1, 1.5)}, r"slips is \(0.0, 0.1, 1.5\), allowed: probabilities"),
        ({"slips": (0.0, -0.1, 0.5)}, r"slips is .*allowed: probabilities"),
        ({"slips": (0.0, float("nan"), 0.5)}, r"slips is .*allowed: probabilities"),
        ({"slips": (0.0, 0.1)}, r"step_costs has 3 lanes and slips 2, allowed: the same number"),
        ({"slips": 0.5}, r"step_costs has 3 lanes and slips 0, allowed"),
        ({"slips": (), "step_costs": ()}, r"step_costs has 0 lanes and slips 0, allowed: .*1 and above"),
        ({"length": 0}, r"length is 0, allowed: 1 and above"),
        ({"length": 2.5}, r"length is 2.5, allowed: int"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make("bridge", **options)


def test_unequal_lanes_are_found_by_every_step():
    env, params = make("bridge")
    with pytest.raises(ValueError, match="step_costs has 3 lanes and slips 2"):
        env.reset(jax.random.key(0), params.replace(slips=(0.0, 0.1)))


def test_bad_arguments_of_the_exact_functions():
    env, params = make("bridge")
    policy, neutral = np.zeros((6, 3), int), risks.NEUTRAL
    with pytest.raises(ValueError, match=r"policy has shape \(6, 2\), allowed: \(6, 3\)"):
        bridge.return_law(env, params, policy[:, :2], DISCOUNT)
    with pytest.raises(ValueError, match="column 6 and lane 1 are no state"):
        bridge.return_law(env, params, policy, DISCOUNT, column=6)
    with pytest.raises(ValueError, match="length is 11, allowed: up to 10"):
        bridge.best_static_path(Bridge(length=11), params, neutral, DISCOUNT)
    batched = params.replace(slips=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"slips has shape \(2, 3\), allowed: \[lanes\]"):
        bridge.return_law(env, batched, policy, DISCOUNT)
    with pytest.raises(ValueError, match=r"slips is .*allowed: probabilities"):
        bridge.risk_policy(env, params.replace(slips=(0.0, 0.1, 2.0)), neutral, DISCOUNT)


def test_the_picture_shows_every_path():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    paths = {"neutral": [EDGE] * 6, "cvar": [WALL] * 6, "mild": [MIDDLE] * 6}
    bridge.draw(axes, make("bridge")[1], paths)
    assert set(paths) <= {text.get_text() for text in axes.texts}
    drawn = [np.round(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(drawn, [[MIDDLE, *path] for path in paths.values()])
    with pytest.raises(ValueError, match=r"paths have lengths \[6, 5\]"):
        bridge.draw(axes, make("bridge")[1], {"a": [1] * 6, "b": [1] * 5})

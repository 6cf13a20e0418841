"""One-step laws on finite processes: the sheet's hand-worked numbers, contraction, ties, and loops in numpy."""

import functools
import io
import re

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrl_dist.algorithms.dynamic_programming import one_step
from jaxrl_dist.algorithms.dynamic_programming.one_step import Problem, Step
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import metrics, tabular
from jaxrl_dist.distributional.law import Law

# One state, one action, a reward of 0 or 1 with equal chances.
COIN = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2))
FIVE = jnp.linspace(-1, 1, 5)


def random_problem(seed: int, low=-6.0, high=6.0, atoms=25, discount=0.8, ends=True) -> Problem:
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(5, 0.5), (5, 3))
    reward = rng.uniform(-1, 1, (5, 3, 5, 2))
    masses = rng.dirichlet(np.ones(2), (5, 3, 5))
    mdp = tabular.mdp_from_arrays(transition, reward, masses, np.arange(5) == 4 if ends else None)
    return Problem(mdp, discount, jnp.linspace(low, high, atoms))


def random_policy(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(3), 5), jnp.float32)


def random_masses(seed: int, shape=(5, 3), atoms: int = 25) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.full(atoms, 0.3), shape), jnp.float32)


@functools.partial(
    jax.jit, static_argnames=("operator", "iterations"), compiler_options={"xla_backend_optimization_level": 0}
)
def fixed_point(problem, operator=one_step.one_step_operator, iterations=80, **settings):
    return one_step.iterate(
        lambda masses, _: operator(masses, problem, **settings),
        one_step.initial_masses(problem), problem.support, iterations,
    )  # fmt: skip


# -- the same in numpy, by loops and in float64 -----------------------------------------------------------------------


def two_hot(point, support):
    masses, point = np.zeros(len(support)), min(max(point, support[0]), support[-1])
    above = min(int(np.searchsorted(support, point, side="right")), len(support) - 1)
    share = (point - support[above - 1]) / (support[above] - support[above - 1])
    masses[above - 1], masses[above] = 1 - share, share
    return masses


def slow_laws(masses, support, policy=None, full=False):
    """For a successor: the points that it is worth, and their probabilities."""
    means = masses @ support
    greedy = np.eye(masses.shape[1])[means.argmax(-1)] if policy is None else policy
    if full:
        return lambda state: (support, greedy[state] @ masses[state])
    return lambda state: ([means[state].max() if policy is None else policy[state] @ means[state]], [1.0])


def slow_operator(masses, problem, policy=None, full=False):
    mdp = [np.asarray(part) for part in problem.mdp]
    support, result = np.asarray(problem.support, np.float64), np.zeros(masses.shape)
    worth = slow_laws(masses, support, policy, full)
    for state, action, outcome in np.ndindex(mdp[0].shape):
        probability, following, reward, ended = (part[state, action, outcome] for part in mdp)
        for value, mass in zip(*worth(following), strict=True):
            point = reward + (0 if ended else problem.discount * value)
            result[state, action] += probability * mass * two_hot(point, support)
    return result


def slow_learning(masses, problem, sweeps, power, policy=None, full=False):
    """`sweeps`: lists of transitions whose targets all come from the table before them."""
    support = np.asarray(problem.support, np.float64)
    masses, visits = np.array(masses, np.float64), np.zeros(masses.shape[:2], int)
    for sweep in sweeps:
        worth, before = slow_laws(masses.copy(), support, policy, full), masses.copy()
        for state, action, reward, following, ended in sweep:
            target = np.zeros(len(support))
            for value, mass in zip(*worth(following), strict=True):
                target += mass * two_hot(reward + (0 if ended else problem.discount * value), support)
            visits[state, action] += 1
            size = visits[state, action] ** -power
            masses[state, action] = (1 - size) * before[state, action] + size * target
    return masses


KINDS = pytest.mark.parametrize(("evaluation", "full"), [(True, False), (False, False), (True, True), (False, True)])


@KINDS
@pytest.mark.parametrize("bound", [6.0, 0.7])  # without and with clipping
def test_operators_equal_loops_in_numpy(evaluation, full, bound):
    problem, masses = random_problem(0, -bound, bound, 13), random_masses(1, atoms=13)
    policy = random_policy(2) if evaluation else None
    operator = one_step.full_operator if full else one_step.one_step_operator
    slow_policy = None if policy is None else np.asarray(policy)
    expected = slow_operator(np.asarray(masses, np.float64), problem, slow_policy, full)
    found = by_hand.quick(lambda: operator(masses, problem, policy))()
    np.testing.assert_allclose(found, expected, atol=2e-6)


# -- fixed points -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, jnp.ones((1, 1))], ids=["control", "evaluation"])
@pytest.mark.parametrize(
    ("support", "expected"),
    [([0, 0.5, 1, 1.5, 2], [0, 0.5, 0, 0.5, 0]), ([0, 0.8, 1.6, 2.4], [0.1875, 0.375, 0.4375, 0])],
    ids=["on_the_grid", "between"],
)
def test_coin_by_hand(policy, support, expected):
    support = jnp.array(support, jnp.float32)
    masses, moves = fixed_point(Problem(COIN, 0.5, support), policy=policy)
    np.testing.assert_allclose(masses[0, 0], expected, atol=1e-6)
    assert laws.mean(Law(support, masses))[0, 0] == pytest.approx(1, abs=1e-6)
    if len(support) == 5:  # nothing lies between atoms, so that the projection adds no variance
        assert laws.variance(Law(support, masses))[0, 0] == pytest.approx(0.25, abs=1e-6)
    assert moves.shape == (80,)
    assert moves[-1] < 1e-6 < moves[0]


def test_the_coins_variances():
    found = by_hand.quick(
        lambda: one_step.compared(Problem(COIN, 0.5, jnp.linspace(0, 2, 5)), one_step.Config(samples=1))
    )()
    one, later, full = (float(found[f"first {name}"][0, 0]) for name in ("this step", "later", "variance"))
    assert (one, later, full) == pytest.approx((1 / 4, 1 / 12, 1 / 3), abs=1e-5)


def test_law_of_total_variance():
    """Against variances by loops over outcomes in float64; full ones satisfy v = one-step + discount^2 E[v']."""
    problem = random_problem(3)
    found = by_hand.quick(lambda: one_step.compared(problem, one_step.Config(samples=1, discount=0.8)))()
    mdp = [np.asarray(part, np.float64) for part in problem.mdp]
    q, variance, one = np.zeros((5, 3)), np.zeros((5, 3)), np.zeros((5, 3))
    for _ in range(300):
        before, spread, best = q.copy(), variance.copy(), q.argmax(-1)
        q[:], variance[:], one[:] = 0, 0, 0
        for state, action, outcome in np.ndindex(mdp[0].shape):
            probability, following, reward, ended = (part[state, action, outcome] for part in mdp)
            after = 0.8 * (1 - ended) * before[int(following)].max()
            q[state, action] += probability * (reward + after)
            one[state, action] += probability * (reward + after - before[state, action]) ** 2
            later = 0.64 * (1 - ended) * spread[int(following), best[int(following)]]
            variance[state, action] += probability * ((reward + after - before[state, action]) ** 2 + later)
    for name, expected in (("this step", one), ("variance", variance), ("later", variance - one)):
        np.testing.assert_allclose(found[f"first {name}"], expected, rtol=1e-3, atol=1e-4, err_msg=name)
    assert (one <= variance).all()
    assert (one < 0.8 * variance).any()
    np.testing.assert_allclose(found["value"], q, atol=1e-4)


@pytest.mark.parametrize("operator", [one_step.one_step_operator, one_step.full_operator])
def test_means_of_the_fixed_points_are_the_values(operator):
    problem, policy = random_problem(4), random_policy(5)
    best, _ = fixed_point(problem, operator)
    np.testing.assert_allclose(best @ problem.support, tabular.optimal_values(problem.mdp, 0.8, 300), atol=2e-5)
    followed, _ = fixed_point(problem, operator, policy=policy)
    np.testing.assert_allclose(followed @ problem.support, tabular.policy_values(problem.mdp, policy, 0.8), atol=2e-5)
    assert np.abs(best - followed).max() > 0.1


# -- contraction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize("bound", [6.0, 0.7])
def test_one_step_operators_contract_in_wasserstein_1(evaluation, bound):
    problem = random_problem(7, -bound, bound, ends=False)
    policy = random_policy(8) if evaluation else None

    @jax.jit
    @jax.vmap
    def ratio(a, b):
        moved = (one_step.one_step_operator(x, problem, policy) for x in (a, b))
        return one_step.distance(*moved, problem.support) / one_step.distance(a, b, problem.support)

    ratios = ratio(random_masses(9, (300, 5, 3)), random_masses(10, (300, 5, 3)))
    assert ratios.max() <= 0.8 + 1e-4
    assert ratios.max() > (0.3 if bound == 6 else 0.05)


def test_one_step_operators_do_not_contract_in_the_cramer_metric():
    """Two laws whose distribution functions differ by 1/4 along 4 units have means that are 1 apart."""
    problem = Problem(tabular.mdp_from_arrays(np.ones((1, 1, 1)), 0.0), 0.8, jnp.arange(-2.0, 3.0))
    a, b = jnp.array([[[0.5, 0, 0, 0, 0.5]]]), jnp.array([[[0.25, 0, 0, 0, 0.75]]])
    moved = [one_step.one_step_operator(x, problem) for x in (a, b)]
    np.testing.assert_allclose(moved, [[[[0, 0, 1, 0, 0]]], [[[0, 0, 0.2, 0.8, 0]]]], atol=1e-6)
    before, after = (metrics.cramer(Law(problem.support, x), Law(problem.support, y))[0, 0] for x, y in ((a, b), moved))
    assert (before, after) == pytest.approx((0.25, 0.64))
    before, after = one_step.distance(a, b, problem.support), one_step.distance(*moved, problem.support)
    assert (before, after) == pytest.approx((1, 0.8))


# -- ties -------------------------------------------------------------------------------------------------------------

TIE = Problem(one_step.TIE, 0.5, FIVE)
TO_SECOND = jnp.array([[0.0, 1.0], [0, 1]])


def test_a_tie_decides_the_full_law_but_not_that_of_one_step():
    for tie_break, expected in ((-TO_SECOND, [0, 0, 1, 0, 0]), (TO_SECOND, [0, 0.5, 0, 0.5, 0])):
        masses, _ = fixed_point(TIE, one_step.full_operator, tie_break=tie_break)
        np.testing.assert_allclose(masses[0], [expected] * 2, atol=1e-6)
    for policy in (None, 1 - TO_SECOND, TO_SECOND):
        masses, _ = fixed_point(TIE, policy=policy)
        np.testing.assert_allclose(masses[0], [[0, 0, 1, 0, 0]] * 2, atol=1e-6)
        np.testing.assert_allclose(masses[1], [[0, 0, 1, 0, 0], [0.5, 0, 0, 0, 0.5]], atol=1e-6)


def test_full_control_spreads_near_ties_apart():
    """Action 0 of x2 is worth e more or less than action 1: laws 2e apart, 1/2 - e/2 after the full operator."""
    e = 0.01
    start = np.zeros((2, 2, 2, 5))
    start[:, 0, :, 2], start[:, 1, 1] = 1, [0.5, 0, 0, 0, 0.5]
    start[0, 1, 0], start[1, 1, 0] = [0, 0, 1 - e, 0, e], [e, 0, 1 - e, 0, 0]
    a, b = jnp.asarray(start, jnp.float32)
    assert one_step.distance(a, b, FIVE) == pytest.approx(2 * e, rel=1e-4)
    for operator, expected in ((one_step.full_operator, (1 - e) / 2), (one_step.one_step_operator, e / 2)):
        apart = by_hand.quick(lambda: one_step.distance(operator(a, TIE), operator(b, TIE), FIVE))()
        assert apart == pytest.approx(expected, rel=1e-3)


def test_random_tie_breaks_keep_full_laws_moving():
    def moves(operator):
        return one_step.iterate(operator, one_step.initial_masses(TIE), FIVE, 60)[1]

    def full(masses, iteration):
        tie_break = jax.random.uniform(jax.random.fold_in(jax.random.key(0), iteration), (2, 2))
        return one_step.full_operator(masses, TIE, tie_break=tie_break)

    jumping = by_hand.quick(lambda: moves(full))()
    settled = by_hand.quick(lambda: moves(lambda masses, _: one_step.one_step_operator(masses, TIE)))()
    assert settled[2:].max() == 0
    assert jumping[10:].max() == pytest.approx(0.5)
    assert 0.2 < (jumping[10:] > 0.4).mean() < 0.8  # a coin decides whether the preferred action changes


# -- stochastic approximation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(0.5, [0, 0, 0.5, 0.5, 0]), (2.7, [0, 0, 0, 0, 1]), (-9.0, [1, 0, 0, 0, 0]), (1.0, [0, 0, 0, 1, 0])],
)
def test_two_hot_by_hand(reward, expected):
    problem = Problem(one_step.TIE, 0.5, jnp.arange(-2.0, 3.0))
    step = Step(1, 0, jnp.float32(reward), jnp.int32(1), jnp.bool_(True))
    for full in (False, True):  # at the end of an episode both are the reward
        masses = random_masses(0, (2, 2), 5)
        found = by_hand.quick(lambda: one_step.sampled_target(masses, step, problem, full=full))()
        np.testing.assert_allclose(found, expected, atol=1e-6)


@KINDS
def test_learning_from_a_stream_equals_a_loop_in_numpy(evaluation, full):
    problem, policy = random_problem(11, -3, 3, 9), random_policy(12) if evaluation else None
    stream = one_step.draw_stream(problem.mdp, random_policy(13), jax.random.key(0), 400)
    learned = by_hand.quick(
        lambda stream: one_step.learn_from_stream(
            one_step.initial_estimate(problem), problem, stream, power=0.7, policy=policy, full=full
        )
    )(stream)
    rows = list(zip(*(np.asarray(part) for part in stream), strict=True))
    slow_policy = None if policy is None else np.asarray(policy)
    expected = slow_learning(
        one_step.initial_masses(problem), problem, [[row] for row in rows], 0.7, slow_policy, full
    )  # fmt: skip
    np.testing.assert_allclose(learned.masses, expected, atol=1e-4)
    counts = np.zeros((5, 3))
    for state, action, *_ in rows:
        counts[state, action] += 1
    np.testing.assert_array_equal(learned.visits, counts)


@KINDS
def test_synchronous_learning_equals_a_loop_in_numpy(evaluation, full):
    problem, policy, key = random_problem(14, -3, 3, 9), random_policy(15) if evaluation else None, jax.random.key(1)
    learned = by_hand.quick(
        lambda key: one_step.learn_synchronously(
            one_step.initial_estimate(problem), problem, key, 60, power=0.7, policy=policy, full=full
        )
    )(key)
    mdp, sweeps = [np.asarray(part) for part in problem.mdp], []
    log_chances, again = jnp.log(problem.mdp.probability), jax.random.clone(key)
    draws = by_hand.quick(
        jax.vmap(lambda index: jax.random.categorical(jax.random.fold_in(again, index), log_chances))
    )(jnp.arange(60))  # fmt: skip
    for drawn in np.asarray(draws):
        sweep = []
        for state, action in np.ndindex(5, 3):
            _, following, reward, ended = (part[state, action, drawn[state, action]] for part in mdp)
            sweep.append((state, action, reward, following, ended))
        sweeps.append(sweep)
    slow_policy = None if policy is None else np.asarray(policy)
    expected = slow_learning(one_step.initial_masses(problem), problem, sweeps, 0.7, slow_policy, full)
    np.testing.assert_allclose(learned.masses, expected, atol=1e-4)
    assert (learned.visits == 60).all()


def test_streams_are_trajectories():
    problem, policy = random_problem(16), random_policy(17)
    stream = by_hand.quick(lambda: one_step.draw_stream(problem.mdp, policy, jax.random.key(0), 20_000))()
    state, action, _, following, ended = (np.asarray(part) for part in stream)
    np.testing.assert_array_equal(state[1:][~ended[:-1]], following[:-1][~ended[:-1]])
    restarts = np.bincount(state[1:][ended[:-1]], minlength=5) / ended[:-1].sum()
    np.testing.assert_allclose(restarts, 0.2, atol=0.03)
    for where in range(5):
        chosen = action[state == where]
        np.testing.assert_allclose(np.bincount(chosen, minlength=3) / len(chosen), policy[where], atol=0.04)
    # Rewards are of as many kinds as there are outcomes: together with the successor they tell which one was drawn.
    mdp = [np.asarray(part) for part in problem.mdp]
    taken = (state == 0) & (action == int(np.argmax(policy[0])))
    rewards, counts = np.unique(np.asarray(stream.reward)[taken], return_counts=True)
    for reward, share in zip(rewards, counts / taken.sum(), strict=True):
        outcome = mdp[2][0, int(np.argmax(policy[0]))] == reward
        assert mdp[0][0, int(np.argmax(policy[0]))][outcome].sum() == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("support", [[0, 0.5, 1, 1.5, 2], [0, 0.8, 1.6, 2.4]])
def test_synchronous_samples_of_the_coin(support):
    """The sheet's 2e5 samples, within 0.01 of the fixed point in every atom."""
    problem = Problem(COIN, 0.5, jnp.array(support, jnp.float32))
    learned = by_hand.quick(
        lambda key: one_step.learn_synchronously(one_step.initial_estimate(problem), problem, key, 200_000)
    )(jax.random.key(0))
    np.testing.assert_allclose(learned.masses, fixed_point(problem)[0], atol=0.01)


# -- command line -----------------------------------------------------------------------------------------------------


def printed(**settings) -> str:
    config, output = one_step.Config(**settings), io.StringIO()
    check_configuration(config)
    one_step.solve(config, Console(file=output, width=200))
    return output.getvalue()


def test_the_tie_is_printed():
    text = printed(samples=500, sampling="stream")
    assert re.search(r"0, 0 +│ first +│ 0 +│ 1 at 0 +│ 1 at 0 +│ 0 +│ 0 +│ 0 ", text)
    assert re.search(r"0, 0 +│ last +│ 0 +│ 1 at 0 +│ 0\.5 at -0\.5, 0\.5 at 0\.5 +│ 0 +│ 0\.25 +│ 0\.25 ", text)
    assert "one-step laws: 0 from tie-break to tie-break" in text
    assert "full laws: 0.5 from tie-break to tie-break" in text
    assert "lie outside" not in text


def test_a_narrow_support_is_pointed_out():
    text = printed(problem="tabular/random_walk", discount=0.9, v_min=0.0, v_max=0.5, samples=10, rows=2)
    assert "50% of a one-step law lie outside the support" in text
    assert "2 of 5 states and actions" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": "tabular/clif"}, "--problem is 'tabular/clif'; it must be one of tie, tabular/coin"),
        ({"sampling": "both"}, "--sampling is 'both'; it must be synchronous or stream"),
        ({"power": 0.5}, "--power is 0.5; it must be above 0.5 and at most 1"),
        ({"power": 1.1}, "--power is 1.1; it must be above 0.5 and at most 1"),
        ({"v_min": 1.0}, "v_min is 1.0; it must be less than v_max = 1.0"),
        ({"discount": 1.5}, "--discount is 1.5; it must be"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        printed(**settings)

"""Stock-augmented dynamic programming: the gamble by hand and brute force, random processes by recursion.

The references are plain Python on float64: a recursion over all histories for the best utility, and laws of policies by
growing atoms. They share no code with the package.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrl_dist.algorithms.dynamic_programming import stock_augmented as dp
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional import tabular
from jaxrl_dist.envs import check_env, stock

UTILITIES = {
    "mean": lambda x: x, "shortfall": lambda x: min(x, 0.0), "surplus": lambda x: max(x, 0.0),
    "target": lambda x: -abs(x), "homeostasis": lambda x: -(x**2), "threshold": lambda x: float(x >= -1e-9),
}  # fmt: skip
SAFE, RISKY = 0, 1
BEST_VALUES = jax.jit(
    lambda laws, stocks, utility: stock.action_utilities(utility, stocks, laws).max(-1), static_argnums=2
)
ACT, START_VALUES = (jax.jit(function, static_argnums=2) for function in (dp.act, dp.start_values))
every_utility = pytest.mark.parametrize("utility", UTILITIES)

# -- references -------------------------------------------------------------------------------------------------------


def outcomes_of(mdp, state, action):
    """(probability, next state, reward, ended) of everything that can happen."""
    parts = [np.asarray(part)[state, action].tolist() for part in mdp]
    return [one for one in zip(*parts, strict=True) if one[0] > 0]


def best_utility(mdp, utility, discount, state, total, steps, time=0) -> float:
    """max over all history-dependent policies of E f(total + sum of gamma^t r_t), by trying every action everywhere."""
    f, values = UTILITIES[utility], []
    for action in range(mdp.probability.shape[1]):
        value = 0.0
        for probability, following, reward, ended in outcomes_of(mdp, state, action):
            now = total + discount**time * reward
            last = ended or time == steps - 1
            rest = f(now) if last else best_utility(mdp, utility, discount, following, now, steps, time + 1)
            value += probability * rest
        values.append(value)
    return max(values)


def law_of_policy(mdp, policy, discount, state, initial_stock, steps) -> dict[float, float]:
    """Return -> probability of a policy(state, stock), by growing atoms."""
    running, ended = {(state, initial_stock, 0.0): 1.0}, {}
    for time in range(steps):
        following = {}
        for (s, c, total), mass in running.items():
            for probability, successor, reward, end in outcomes_of(mdp, s, policy(s, c)):
                now = round(total + discount**time * reward, 9)
                if end:
                    ended[now] = ended.get(now, 0) + mass * probability
                else:
                    key = successor, round((c + reward) / discount, 9), now
                    following[key] = following.get(key, 0) + mass * probability
        running = following
    for (_, _, total), mass in running.items():
        ended[total] = ended.get(total, 0) + mass
    return ended


def cvar(law: dict[float, float], level: float) -> float:
    left, value = level, 0.0
    for atom in sorted(law):
        taken = min(left, law[atom])
        value, left = value + taken * atom, left - taken
    return value / level


def layered(seed: int, layers: int = 4) -> tabular.MDP:
    """Two states in each layer, two actions, two equally likely outcomes, whole rewards; ends after the last layer."""
    rng = np.random.default_rng(seed)

    def outcomes(layer):
        last = layer == layers - 1
        next_state = [0, 0] if last else [2 * (layer + 1), 2 * (layer + 1) + 1]
        return [(0.5, next_state[i], float(rng.integers(-2, 4)), last) for i in range(2)]

    return tabular.mdp_from_outcomes([[outcomes(s // 2) for _ in range(2)] for s in range(2 * layers)])


# -- the gamble: numbers of the sheet, brute force --------------------------------------------------------------------

GAMBLE = stock.gamble().default_params.mdp
START = jnp.array([1.0, 0, 0])


def gamble_law(policy, discount):
    """Law of (action after 0, action after 4), written out."""
    law = {}
    for first, action in zip((0.0, 4.0), policy, strict=True):
        for second, chance in ((1.0, 1.0),) if action == SAFE else ((-1.0, 0.5), (5.0, 0.5)):
            atom = first + discount * second
            law[atom] = law.get(atom, 0) + 0.5 * chance
    return law


def solved(utility, discount=1.0, low=-12.0, high=12.0, spacing=0.1, mdp=GAMBLE, quantiles=16, sweeps=4):
    stocks = jnp.linspace(low, high, round((high - low) / spacing) + 1)
    return stocks, dp.value_iteration(mdp, discount, stocks, utility, num_quantiles=quantiles, sweeps=sweeps)


def second_actions(laws, stocks, utility, initial_stock, discount):
    """What the policy does after 0 and after 4."""
    after = (initial_stock + jnp.array([0.0, 4.0])) / discount
    return tuple(int(a) for a in ACT(laws, stocks, utility, jnp.array([1, 2]), after))


@pytest.mark.parametrize(
    ("discount", "static", "best", "at"),
    [
        (1.0, {"SS": 1, "SR": 1, "RS": 2, "RR": 1}, 2.0, -5.0),
        (0.9, {"SS": 0.9, "SR": 0.9, "RS": 1.8, "RR": 1.1}, 1.8, -4.9),
        (0.5, {"RS": 1.0, "RR": 1.0}, 1.0, -4.5),
    ],
)
def test_cvar_of_the_gamble(discount, static, best, at):
    by_name = {"".join("SR"[a] for a in policy): policy for policy in itertools.product((SAFE, RISKY), repeat=2)}
    values = {name: cvar(gamble_law(policy, discount), 0.5) for name, policy in by_name.items()}
    for name, value in static.items():
        assert values[name] == pytest.approx(value), name
    assert max(values.values()) == pytest.approx(best)
    stocks, laws = solved("shortfall", discount)  # the best initial stocks of all three discounts are on the grid
    objective = dp.cvar_objective(stocks, START_VALUES(laws, stocks, "shortfall", START), 0.5)
    assert float(objective.max()) == pytest.approx(best, abs=1e-4)
    index = int(jnp.abs(stocks - at).argmin())
    assert float(objective[index]) == pytest.approx(best, abs=1e-4)
    actions = second_actions(laws, stocks, "shortfall", at, discount)
    if discount == 0.5:  # RS and RR are equally good
        assert actions[0] == RISKY
    else:
        assert actions == (RISKY, SAFE)
        np.testing.assert_allclose(stocks[objective.argmax()], at, atol=1e-4)
    achieved = law_of_policy(
        GAMBLE, lambda s, c: int(ACT(laws, stocks, "shortfall", jnp.int32(s), jnp.float32(c))), discount, 0, at, 3
    )
    assert cvar(achieved, 0.5) == pytest.approx(best)


@pytest.mark.parametrize("level", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_every_level_of_the_gamble_is_that_of_brute_force(level, discount):
    """All possible returns lie on the grid, at discount 0.8 too, and minus one of them is the best stock."""
    stocks, laws = solved("shortfall", discount)
    objective = dp.cvar_objective(stocks, START_VALUES(laws, stocks, "shortfall", START), level)
    policies = itertools.product((SAFE, RISKY), repeat=2)
    best = max(cvar(gamble_law(policy, discount), level) for policy in policies)
    assert float(objective.max()) == pytest.approx(best, abs=2e-4)


def test_shortfalls_from_every_stock_by_hand():
    stocks, laws = solved("shortfall")
    values = START_VALUES(laws, stocks, "shortfall", START)
    for c, value, objective, actions in (
        (-8.0, -4.25, -0.5, (RISKY, RISKY)),
        (-5.0, -1.5, 2.0, (RISKY, SAFE)),
        (-3.0, -1.0, 1.0, None),  # (S, S), and as good (R, .): -3 + 1 = -2, (0 - 4) / 2 = -2
        (-1.0, 0.0, 1.0, (SAFE, None)),
        (0.0, 0.0, 0.0, (SAFE, None)),
    ):
        index = int(jnp.abs(stocks - c).argmin())
        assert float(values[index]) == pytest.approx(value, abs=1e-5)
        assert float(dp.cvar_objective(stocks, values, 0.5)[index]) == pytest.approx(objective, abs=1e-5)
        for wanted, got in zip(actions or (), second_actions(laws, stocks, "shortfall", c, 1.0), strict=False):
            assert wanted in (None, got), c


def test_second_stage_by_hand():
    stocks, laws = solved("shortfall")
    for c, expected in ((-5.0, (-4.0, -3.0)), (-1.0, (0.0, -1.0))):
        index = int(jnp.abs(stocks - c).argmin())
        values = stock.action_utilities("shortfall", stocks[index], laws[1, index])
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_a_risk_measure_in_the_greedy_step_gets_half_as_much():
    nested = tabular.optimise(GAMBLE, 1.0, tabular.to_quantiles(16), 4, risks.parse("cvar:0.5"))
    np.testing.assert_allclose(risks.value(risks.parse("cvar:0.5"), nested)[1:], [[1, -1], [1, -1]], atol=1e-5)
    assert cvar(gamble_law((SAFE, SAFE), 1.0), 0.5) == 1.0  # of 2 that can be had


def test_target_returns_by_hand():
    stocks, laws = solved("target")
    values = START_VALUES(laws, stocks, "target", START)
    for target, value, actions in ((1, -2, (SAFE, SAFE)), (3, -2, (SAFE, SAFE)), (5, -1.5, (RISKY, SAFE)),
                                   (9, -5, (RISKY, RISKY))):  # fmt: skip
        assert float(values[jnp.abs(stocks + target).argmin()]) == pytest.approx(value, abs=1e-5)
        assert second_actions(laws, stocks, "target", -float(target), 1.0) == actions
        brute = max(
            sum(mass * -abs(atom - target) for atom, mass in gamble_law(policy, 1.0).items())
            for policy in itertools.product((SAFE, RISKY), repeat=2)
        )
        assert brute == value


# -- random processes against a recursion over all histories ----------------------------------------------------------


@every_utility
def test_value_and_policy_iteration_find_the_best_policy(utility):
    """Four layers of halves make sixteenths, whole rewards whole stocks: 16 quantiles on a grid of 1 lose nothing."""
    mdp, low = layered(3), -160
    stocks, sizes = jnp.linspace(low, -low, 321), {"num_quantiles": 16, "sweeps": 4}
    methods = [functools.partial(dp.value_iteration, **sizes)]
    if utility in ("shortfall", "target"):
        methods.append(functools.partial(dp.policy_iteration, **sizes, improvements=4))
    for discount, method in itertools.product((1.0, 0.5), methods):
        laws = method(mdp, discount, stocks, utility)
        values = BEST_VALUES(laws, stocks, utility)
        policy = functools.cache(lambda s, x, laws=laws: int(ACT(laws, stocks, utility, jnp.int32(s), jnp.float32(x))))
        for c in (-6, -3, 0, 2):
            expected = [best_utility(mdp, utility, discount, state, c, 4) for state in (0, 1)]
            np.testing.assert_allclose(values[:2, c - low], expected, rtol=1e-4, atol=1e-4)
            achieved = law_of_policy(mdp, policy, discount, 0, float(c), 4)
            worth = sum(mass * UTILITIES[utility](c + atom) for atom, mass in achieved.items())
            assert worth == pytest.approx(expected[0], abs=1e-6)


def test_policy_iteration_evaluates_before_it_improves():
    """One round evaluates the greedy policy of laws of 0, which is not the best one yet."""
    mdp, stocks = layered(3), jnp.linspace(-160, 160, 321)
    first, last = (
        dp.policy_iteration(mdp, 1.0, stocks, "target", num_quantiles=16, sweeps=4, improvements=k) for k in (1, 4)
    )

    first, last = (BEST_VALUES(laws, stocks, "target")[0] for laws in (first, last))
    assert (first <= last + 1e-4).all()
    assert (first < last - 0.1).any()


def test_the_mean_does_not_need_the_stock():
    mdp = tabular.mdp_from_outcomes(
        [[[(0.5, 0, 0.3, False), (0.5, 1, -0.2, False)], [(0.75, 1, 0.1, False), (0.25, 0, 0.6, True)]],
         [[(1.0, 0, -0.4, False)], [(0.5, 1, 0.25, False), (0.5, 0, -0.1, True)]]]
    )  # fmt: skip
    stocks = jnp.linspace(-3, 3, 13)
    laws = dp.value_iteration(mdp, 0.9, stocks, "mean", num_quantiles=100, sweeps=60)
    values = np.asarray(stock.action_utilities("mean", stocks, laws) - stocks[:, None])  # [states, stocks, actions]
    np.testing.assert_allclose(values, np.broadcast_to(values[:, :1], values.shape), atol=1e-4)
    expected = np.asarray(tabular.optimal_values(mdp, 0.9))
    np.testing.assert_allclose(values[:, 0], expected, atol=0.04)  # quantiles at midpoints do not keep the mean
    action = ACT(laws, stocks, "mean", jnp.arange(2)[:, None], jnp.linspace(-5, 5, 50))
    np.testing.assert_array_equal(action, np.broadcast_to(expected.argmax(-1)[:, None], (2, 50)))


def test_iteration_is_one_program_over_processes_and_discounts():
    """`vmap` over rewards and gamma, as a batch of levels would be."""
    stocks = jnp.linspace(-10, 10, 21)
    scales, discounts = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5])

    def solve(scale, discount):
        mdp = GAMBLE._replace(reward=scale * GAMBLE.reward)
        laws = dp.value_iteration(mdp, discount, stocks, "shortfall", num_quantiles=8, sweeps=3)
        return START_VALUES(laws, stocks, "shortfall", START)

    together = jax.vmap(solve)(scales, discounts)
    for row, scale, discount in zip(together, scales, discounts, strict=True):
        np.testing.assert_allclose(row, solve(scale, discount), rtol=1e-5, atol=1e-5)


# -- stock, utilities, interpolation ----------------------------------------------------------------------------------


def test_the_stock_identity():
    rng = np.random.default_rng(0)
    rewards, c0, gamma = rng.normal(size=60), 0.7, 0.9
    c, seen = c0, []
    for t in range(60):
        rest = sum(gamma ** (k - t) * rewards[k] for k in range(t, 60))
        seen.append(gamma**t * (c + rest))
        c = stock.stock_after(c, rewards[t], gamma)
    np.testing.assert_allclose(seen, seen[0], atol=1e-10)
    assert seen[0] == pytest.approx(c0 + sum(gamma**k * r for k, r in enumerate(rewards)))


def test_n_steps_at_once_are_n_single_ones():
    rewards, gamma, c = [1.5, -2.0, 0.25, 4.0], 0.9, -3.0
    one_by_one = c
    for reward in rewards:
        one_by_one = stock.stock_after(one_by_one, reward, gamma)
    n_step = sum(gamma**k * reward for k, reward in enumerate(rewards))
    assert stock.stock_after(c, n_step, gamma**4) == pytest.approx(one_by_one, rel=1e-12)


def test_cvar_of_a_uniform_law_by_the_formula():
    quantiles = 2 * (np.arange(1000) + 0.5) / 1000
    stocks = jnp.linspace(-2, 0, 201)
    values = stock.action_utilities("shortfall", stocks, jnp.asarray(quantiles, jnp.float32)[None])[:, 0]
    objective = dp.cvar_objective(stocks, values, 0.25)
    assert float(objective.max()) == pytest.approx(0.25, abs=1e-3)
    assert float(stocks[objective.argmax()]) == pytest.approx(-0.5, abs=0.01)


@every_utility
def test_utilities_do_not_mind_a_discount(utility):
    rng = np.random.default_rng(1)
    c, theta = rng.normal(size=200).astype(np.float32), rng.normal(size=(200, 3, 8)).astype(np.float32)
    plain = stock.action_utilities(utility, jnp.asarray(c), jnp.asarray(theta))
    expected = [[np.mean([UTILITIES[utility](c[b] + x) for x in theta[b, a]]) for a in range(3)] for b in range(200)]
    np.testing.assert_allclose(plain, expected, rtol=1e-5, atol=1e-5)
    scaled = stock.action_utilities(utility, jnp.asarray(0.7 * c), jnp.asarray(0.7 * theta))
    np.testing.assert_array_equal(scaled.argmax(-1), plain.argmax(-1))


def test_an_exponential_utility_minds():
    """-exp(-x) ranks the certain 0 and a coin on -1 and 2.5 one way, and both multiplied by 1/2 the other way."""

    def worth(law):
        return np.mean(-np.exp(-np.array(law)))

    def half(law):
        return 0.5 * np.array(law)

    certain, coin = [0.0], [-1.0, 2.5]
    assert worth(certain) > worth(coin)
    assert worth(half(certain)) < worth(half(coin))


def test_interpolation_of_affine_laws_is_exact_and_constant_beyond_the_grid():
    stocks, slope = jnp.array([-2.0, -1.5, 0.0, 4.0]), np.array([[0.5, -1, 2]] * 2)
    offset = np.array([[1.0, 2, 3], [-1, 0, 5]])
    laws = jnp.asarray(offset[:, None] + slope[:, None] * np.asarray(stocks)[:, None], jnp.float32)
    state, at = jnp.array([0, 1, 1, 0, 0]), jnp.array([-1.7, 3.3, -1.5, -9.0, 70.0])
    inside = np.clip(np.asarray(at), -2, 4)
    expected = offset[np.asarray(state)] + slope[np.asarray(state)] * inside[:, None]
    np.testing.assert_allclose(dp.laws_at(laws, stocks, state, at), expected, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_larger_mean_then_to_the_first_action():
    quantiles = jnp.array([[1.0, 3.0], [2.0, 4.0], [4.0, 2.0]])
    assert dp.greedy_action("shortfall", jnp.float32(0), quantiles) == 1
    assert dp.greedy_action("shortfall", jnp.float32(-10), quantiles) == 1
    assert dp.greedy_action("target", jnp.float32(-1), quantiles) == 0


# -- simulation, processes, environment -------------------------------------------------------------------------------


def test_simulated_returns_are_those_of_the_exact_law():
    env = stock.shortcut()
    mdp, start = env.default_params.mdp, env.default_params.start
    stocks, laws = solved("shortfall", 1.0, -10, 50, 1.0, mdp, quantiles=20, sweeps=30)
    c0 = 14.0
    policy = functools.cache(lambda s, c: int(ACT(laws, stocks, "shortfall", jnp.int32(s), jnp.float32(c))))
    law = law_of_policy(mdp, policy, 1.0, int(start.argmax()), c0, 30)
    returns = np.asarray(
        dp.simulate(mdp, 1.0, stocks, "shortfall", laws, start, c0, jax.random.key(0), samples=20_000, steps=30)
    )
    assert sum(law.values()) == pytest.approx(1, abs=1e-6)
    assert len(law) > 1
    for atom, mass in law.items():
        assert (np.abs(returns - atom) < 1e-3).mean() == pytest.approx(mass, abs=0.015)


def test_the_mean_takes_the_shortcut_and_a_tail_does_not():
    """A 5 x 5 grid: straight on through a cell that costs 10 with probability 0.1, or four steps round it."""
    env = stock.shortcut((".....", ".....", ".....", ".###.", "S.!.G"))
    mdp, start = env.default_params.mdp, env.default_params.start
    danger = int(np.flatnonzero((env.places == [4, 2]).all(1))[0])
    straight, round_it = -4.0, -8.0

    def walk(utility, c0):
        stocks, laws = solved(utility, 1.0, -8, 24, 1.0, mdp, quantiles=20, sweeps=25)
        values = START_VALUES(laws, stocks, utility, start)
        visited = []
        policy = functools.cache(lambda s, c: int(ACT(laws, stocks, utility, jnp.int32(s), jnp.float32(c))))

        def watched(s, c):
            visited.append(s)
            return policy(s, c)

        if c0 is None:
            c0 = float(stocks[dp.cvar_objective(stocks, values, 0.1).argmax()])
        return law_of_policy(mdp, watched, 1.0, int(start.argmax()), c0, 25), danger in visited

    law, through = walk("mean", 0.0)
    assert through
    assert law == pytest.approx({straight: 0.9, straight - 10: 0.1})
    law, through = walk("shortfall", None)
    assert not through
    assert law == pytest.approx({round_it: 1.0})


def test_augmented_environments_keep_the_contract_and_the_identity():
    env = stock.StockAugmented(stock.gamble(), stock.gamble().default_params, 0.9, -9.0, 1.0)
    assert [w for w in check_env(env) if "not checked" not in w] == []
    params = env.default_params
    assert env.observation_space(params).shape == (4,)
    assert (env.name, env.num_actions, env.action_space(params).n) == ("stock/gamble", 2, 2)

    def episode(key):
        reset_key, first_key, second_key = jax.random.split(key, 3)
        first, state = env.reset(reset_key, params)
        second, state, r1, *_ = env.step(first_key, state, 0, params)
        _, after, r2, terminated, _, info = env.step(second_key, state, 1, params)
        return first[-1], second[-1], info["final_observation"][-1], r1, r2, terminated, after.stock, after.time

    found = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(0), 500))
    c0, c1, c2, r1, r2, terminated, fresh, time = map(np.asarray, found)
    assert terminated.all()
    np.testing.assert_allclose(c1, (c0 + r1) / 0.9, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(c2, (c1 + r2) / 0.9, rtol=1e-5, atol=1e-5)
    for starts in (c0, fresh):  # a new episode has a new stock, evenly drawn
        assert -9 <= starts.min() < -8.8
        assert 0.8 < starts.max() <= 1
        assert starts.mean() == pytest.approx(-4, abs=0.5)
    assert (np.abs(fresh - c0) > 1e-4).mean() > 0.99
    assert not time.any()
    one = params.replace(lowest_stock=-5.0, highest_stock=-5.0)
    assert env.reset(jax.random.key(1), one)[0][-1] == -5


# -- bad input and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": "cvar"}, "--utility is 'cvar'; it must be one of mean, shortfall"),
        ({"discount": 0.0}, "--discount is 0.0; it must be in"),
        ({"level": 0.0}, "--level is 0.0; it must be in"),
        ({"num_stocks": 1}, "--num-stocks is 1; it must be at least 2"),
        ({"lowest_stock": 12.0}, "--lowest-stock is 12.0; it must be below --highest-stock = 12.0"),
        ({"problem": "CartPole-v1"}, "--problem is 'CartPole-v1'; it must be gamble, shortcut, or a finite process"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dp.solve(dp.Config(**settings), Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 0.0}, "discount is 0.0, allowed"),
        ({"discount": 1.1}, "discount is 1.1, allowed"),
        ({"lowest_stock": 2.0}, "lowest_stock is 2.0 and highest_stock 0.0, allowed"),
        ({"highest_stock": float("inf")}, "highest_stock inf, allowed"),
    ],
)
def test_stocks_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        stock.StockAugmented(stock.gamble(), stock.gamble().default_params, **options)


def test_processes_that_cannot_work_are_refused():
    for rows in (("..", ".G"), ("S.", ".."), ("SS", ".G")):
        with pytest.raises(ValueError, match="rows have no 'S', several or no 'G'"):
            stock.shortcut(rows)
    with pytest.raises(ValueError, match=r"chance is 1\.5, allowed"):
        stock.shortcut(chance=1.5)


@pytest.mark.parametrize("method", ["value", "policy"])
def test_the_command_reports_the_best_stock_and_what_it_achieves(method):
    console = Console(record=True, width=160)
    dp.solve(dp.Config(method=method, sweeps=4, samples=20_000, steps=3, num_stocks=25, num_quantiles=16), console)
    text = console.export_text()
    assert "best initial stock -5.000: CVaR 0.5 promised 2.000" in text
    (row,) = (line for line in text.splitlines() if line.startswith("│ -5.000"))
    stock_, value, promised, achieved, mean, risk = (float(x) for x in row.replace("│", " ").split())
    assert (stock_, value, promised) == (-5, -1.5, 2)
    assert (achieved, mean, risk) == (
        pytest.approx(-1.5, abs=0.1),
        pytest.approx(3.5, abs=0.15),
        pytest.approx(2, abs=0.2),
    )

"""Two averages of the return and ties broken by them: hand-worked numbers, a numpy reference, linear programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from rich.console import Console

from jaxrl_dist.algorithms.dynamic_programming import robust_risk
from jaxrl_dist.algorithms.dynamic_programming.robust_risk import Config, two_slices
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import tabular
from jaxrl_dist.distributional.law import Law

COIN = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2))
ONLY = jnp.ones((1, 1))
ALPHAS = (0.1, 0.25, 0.5, 0.75)

evaluate = jax.jit(robust_risk.evaluate, static_argnames="iterations")
choose_all = jax.jit(robust_risk.choose_all, static_argnames="iterations")


def random_mdp(seed: int, states: int = 4, actions: int = 2) -> tabular.MDP:
    """With rewards of two atoms and a last state that ends the episode."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    reward = rng.uniform(-1, 1, (states, actions, states, 2))
    masses = rng.dirichlet(np.ones(2), (states, actions, states))
    return tabular.mdp_from_arrays(transition, reward, masses, np.arange(states) == states - 1)


def random_policy(seed: int, states: int = 4, actions: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(actions), states), jnp.float32)


def slow_averages(atoms, masses, alpha):
    """Left and right average value at risk, mass by mass in float64."""
    left, needed = 0.0, alpha
    for x, p in sorted(zip(atoms, masses, strict=True)):
        taken = min(p, needed)
        left, needed = left + taken * x, needed - taken
    mean = float(np.dot(atoms, masses))
    return left / alpha, (mean - left) / (1 - alpha)


def slow_operator(mdp, policy, discount, alpha, v):
    """One application of the two-atom operator, in loops."""
    probability, following, reward, terminated = (np.asarray(part) for part in mdp)
    found = np.zeros_like(v)
    for s, a in np.ndindex(reward.shape[:2]):
        atoms, masses = [], []
        for k in range(reward.shape[2]):
            for b in range(v.shape[1]):
                for i, weight in enumerate((alpha, 1 - alpha)):
                    onwards = 0.0 if terminated[s, a, k] else v[following[s, a, k], b, i]
                    atoms.append(reward[s, a, k] + discount * onwards)
                    masses.append(probability[s, a, k] * policy[following[s, a, k], b] * weight)
        found[s, a] = slow_averages(atoms, masses, alpha)
    return found


# -- the projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "left"), [(0.1, -10), (0.25, -4), (0.5, -1.6)])
def test_averages_by_hand(alpha, left):
    law = Law(jnp.array([1.0, -10, 0]), jnp.array([0.7, 0.1, 0.2]))
    averages = (robust_risk.slice_weights(law, two_slices(alpha)) * law.atoms).sum(-1)
    np.testing.assert_allclose(averages, [left, (-0.3 - alpha * left) / (1 - alpha)], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(averages, tabular.to_averages(two_slices(alpha))(law, None).atoms, rtol=1e-5, atol=1e-6)
    if alpha == 0.25:
        assert averages[1] == pytest.approx(0.933333, abs=1e-5)


@pytest.mark.parametrize(
    ("masses", "averages"), [((0.1, 0.5, 0.3, 0.1), (-0.4, 0, 0.6, 1.8)), ((0.1, 0.5, 0.2, 0.2), (-0.4, 0, 0.6, 2.6))]
)
def test_four_averages_keep_the_mean_where_quantiles_do_not(masses, averages):
    law = Law(jnp.array([-1.0, 0, 1, 3]), jnp.array(masses))
    found = tabular.to_averages(jnp.linspace(0, 1, 5))(law, None)
    np.testing.assert_allclose(found.atoms, averages, atol=1e-5)
    weights = robust_risk.slice_weights(law, jnp.linspace(0, 1, 5))
    np.testing.assert_allclose((weights * law.atoms).sum(-1), averages, atol=1e-5)
    assert laws.mean(found) == pytest.approx(float(laws.mean(law)), abs=1e-6)
    quantiles = tabular.to_quantiles(4)(law, None)
    np.testing.assert_array_equal(quantiles.atoms, [0, 0, 1, 1 if masses[2] == 0.3 else 3])


def test_averages_are_nearest_in_wasserstein_2():
    """Squared distances of two atoms to the uniform law on [0, 2], whose quantile function is 2 tau."""
    alpha, tau = 0.25, (np.arange(100_000) + 0.5) / 100_000
    uniform = Law(jnp.asarray(2 * tau, jnp.float32), jnp.full(100_000, 1e-5))
    found = tabular.to_averages(two_slices(alpha))(uniform, None).atoms
    np.testing.assert_allclose(found, [0.25, 1.25], atol=1e-3)

    def distance(lower, upper):
        return np.square(2 * tau - np.where(tau < alpha, lower, upper)).mean()

    best = distance(0.25, 1.25)
    assert best == pytest.approx((alpha**3 + (1 - alpha) ** 3) / 3, abs=1e-6)
    assert best == pytest.approx(0.145833, abs=1e-6)
    assert distance(0.3, 1.25) == pytest.approx(0.146458, abs=1e-6)
    assert distance(0.25, 1.2) == pytest.approx(0.147708, abs=1e-6)


def test_averages_grow_with_alpha():
    rng = np.random.default_rng(0)
    law = Law(
        jnp.asarray(rng.normal(size=(20, 6)), jnp.float32), jnp.asarray(rng.dirichlet(np.ones(6), 20), jnp.float32)
    )
    averages = np.stack(
        [tabular.to_averages(two_slices(alpha))(law, None).atoms for alpha in np.linspace(0.05, 0.95, 9)]
    )
    assert (np.diff(averages, axis=0) >= -1e-5).all()
    assert (averages[..., 0] <= laws.mean(law) + 1e-5).all()
    assert (averages[..., 1] >= laws.mean(law) - 1e-5).all()


def test_weights_solve_the_dual_linear_program():
    rng = np.random.default_rng(1)
    for alpha in (0.1, 0.37, 0.5, 0.9):
        for count in (2, 5, 9):
            atoms, masses = rng.normal(size=count), rng.dirichlet(np.ones(count))
            law = Law(jnp.asarray(atoms, jnp.float32), jnp.asarray(masses, jnp.float32))
            q = np.asarray(robust_risk.slice_weights(law, two_slices(alpha)), np.float64)
            for row, share, sign in ((0, alpha, 1), (1, 1 - alpha, -1)):
                program = scipy.optimize.linprog(
                    sign * atoms, A_eq=np.ones((1, count)), b_eq=[1], bounds=[(0, p / share) for p in masses]
                )
                assert q[row] @ atoms == pytest.approx(sign * program.fun, abs=1e-5)
                assert q[row].sum() == pytest.approx(1, abs=1e-6)
                assert (q[row] >= 0).all()
                assert (q[row] <= masses / share + 1e-6).all()
                assert sign * program.fun == pytest.approx(slow_averages(atoms, masses, alpha)[row], abs=1e-9)


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.1, (5 / 14, 15 / 14)), (0.25, (0.4, 1.2)), (0.5, (0.5, 1.5)), (0.75, (0.8, 1.6))]
)
def test_two_averages_of_the_coin(alpha, expected):
    found = evaluate(COIN, ONLY, 0.5, two_slices(alpha), iterations=60)
    np.testing.assert_allclose(found.atoms[0, 0], expected, rtol=1e-4)
    assert laws.mean(found)[0, 0] == pytest.approx(1, abs=1e-5)
    # The return is uniform on [0, 2]; two atoms hold its averages alpha and 1 + alpha for alpha = 1/2 only.
    exact = (alpha, 1 + alpha)
    assert np.allclose(found.atoms[0, 0], exact, atol=1e-4) == (alpha == 0.5)


def test_four_averages_of_the_coin():
    found = evaluate(COIN, ONLY, 0.5, jnp.linspace(0, 1, 5), iterations=60)
    np.testing.assert_allclose(found.atoms[0, 0], [0.25, 0.75, 1.25, 1.75], rtol=1e-5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_evaluation_is_the_slow_loop_and_keeps_the_mean(alpha):
    mdp, policy = random_mdp(0), random_policy(1)
    v, slow_policy = np.zeros((4, 2, 2)), np.asarray(policy, np.float64)
    for _ in range(30):
        v = slow_operator(mdp, slow_policy, 0.8, alpha, v)
    np.testing.assert_allclose(evaluate(mdp, policy, 0.8, two_slices(alpha), iterations=30).atoms, v, atol=2e-5)
    found = evaluate(mdp, policy, 0.8, two_slices(alpha), iterations=120)
    exact = tabular.policy_values(mdp, policy, 0.8)
    np.testing.assert_allclose(laws.mean(found), exact, atol=2e-5)
    assert (found.atoms[..., 0] <= exact + 1e-5).all()
    assert (found.atoms[..., 1] >= exact - 1e-5).all()
    assert (found.atoms[..., 1] - found.atoms[..., 0]).min() > 1e-3


def test_a_deterministic_process_has_no_spread():
    table = [
        [[(1.0, 1, 1.0, False)], [(1.0, 2, 0.5, False)]],
        [[(1.0, 2, -2.0, False)]] * 2,
        [[(1.0, 0, 3.0, True)]] * 2,
    ]
    mdp, policy = tabular.mdp_from_outcomes(table), jnp.array([[1.0, 0]] * 3)
    found = evaluate(mdp, policy, 0.9, two_slices(0.25), iterations=20)
    exact = tabular.policy_values(mdp, policy, 0.9)
    np.testing.assert_allclose(found.atoms[..., 0], exact, atol=1e-6)
    np.testing.assert_allclose(found.atoms[..., 1], exact, atol=1e-6)


def test_contraction_in_the_largest_atom_and_in_wasserstein():
    mdp, policy, fractions = random_mdp(2), random_policy(3), two_slices(0.3)
    weights = np.array([0.3, 0.7])

    @jax.jit
    def once(v):
        action_laws = Law(v, jnp.broadcast_to(jnp.array([0.3, 0.7]), v.shape))
        image = tabular.bellman(mdp, 0.7, tabular.under_policy(policy, action_laws))
        return tabular.to_averages(fractions)(image, None).atoms

    rng = np.random.default_rng(0)
    worst = {"infinity": 0.0, "1": 0.0, "2": 0.0}
    for _ in range(60):
        a, b = jnp.asarray(np.sort(rng.uniform(-5, 5, (2, 4, 2, 2)), -1), jnp.float32)
        before, after = np.abs(np.asarray(a - b)), np.abs(np.asarray(once(a) - once(b)))
        distances = {
            "infinity": lambda gap: gap.max(),
            "1": lambda gap: (gap @ weights).max(),
            "2": lambda gap: np.sqrt((gap**2 @ weights).max()),
        }
        for name, distance in distances.items():
            worst[name] = max(worst[name], distance(after) / distance(before))
    assert all(ratio <= 0.7 + 1e-4 for ratio in worst.values())
    assert worst["infinity"] > 0.2


# -- the robust reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [(0, 0.25, 1), (0, 0.6, 1), (0, 0.2, 0.5, 1)])
def test_the_averages_are_the_values_of_the_split_process(slices):
    mdp, policy, fractions = random_mdp(4), random_policy(5), jnp.array(slices, jnp.float32)
    found = evaluate(mdp, policy, 0.8, fractions, iterations=120)
    kernels = robust_risk.substate_kernels(mdp, policy, 0.8, found, fractions)
    np.testing.assert_allclose(kernels.sum((-3, -2, -1)), 1, atol=1e-5)
    np.testing.assert_allclose(robust_risk.evaluate_kernels(mdp, 0.8, kernels), found.atoms, atol=1e-4)


def test_no_allowed_kernel_is_worse_than_the_worst():
    mdp, policy, alpha = random_mdp(6), random_policy(7), 0.4
    found = evaluate(mdp, policy, 0.8, two_slices(alpha), iterations=120)
    worst = robust_risk.substate_kernels(mdp, policy, 0.8, found, two_slices(alpha))
    # How the process moves by itself, from either sub-state: an allowed kernel, and so are mixtures with it.
    plain = mdp.probability[..., None, None] * policy[mdp.next_state][..., None] * jnp.array([alpha, 1 - alpha])
    assert (worst[:, :, 0] <= plain / alpha + 1e-5).all()
    assert (worst[:, :, 1] <= plain / (1 - alpha) + 1e-5).all()
    image = tabular.bellman(mdp, 0.8, tabular.under_policy(policy, found)).atoms.reshape(plain.shape)
    for mixed in (0.2, 1.0):
        other = (1 - mixed) * worst[:, :, 0] + mixed * plain
        assert ((other * image).sum((-3, -2, -1)) >= found.atoms[..., 0] - 1e-4).all()
    assert ((plain * image).sum((-3, -2, -1)) > found.atoms[..., 0] + 1e-3).any()


def test_the_worst_kernel_of_the_coin_by_hand():
    """alpha = 1/4, v = (.4, 1.2): targets .2, .6 after 0 and 1.2, 1.6 after 1, with masses 1/8, 3/8, 1/8, 3/8."""
    laws_of_the_coin = Law(jnp.array([[[0.4, 1.2]]]), jnp.array([[[0.25, 0.75]]]))
    kernels = robust_risk.substate_kernels(COIN, ONLY, 0.5, laws_of_the_coin, two_slices(0.25))
    after_0, after_1 = (int(jnp.argmax(COIN.reward[0, 0] == reward)) for reward in (0, 1))
    np.testing.assert_allclose(kernels[0, 0, 0, after_0, 0], [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(kernels[0, 0, 0, after_1, 0], [0, 0], atol=1e-6)
    np.testing.assert_allclose(kernels[0, 0, 1, after_0, 0], [0, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(kernels[0, 0, 1, after_1, 0], [1 / 6, 1 / 2], atol=1e-6)


# -- control ----------------------------------------------------------------------------------------------------------

RISKY, SAFE, WORSE = 0, 1, 2  # the actions of `choices`


@pytest.mark.parametrize(("alpha", "risky"), [(0.25, (0, 4 / 3)), (0.5, (0, 2))])
def test_ties_are_broken_by_the_averages(alpha, risky):
    values, found = choose_all(robust_risk.choices(1), 0.9, two_slices(alpha), 1e-4, iterations=20)
    np.testing.assert_allclose(values, [[1, 1, 0.9]], atol=1e-6)
    for name in ("safe", "risky"):
        np.testing.assert_allclose(found[name].laws.atoms[0, :2], [risky, (1, 1)], atol=1e-5)
    chosen = {name: int(each.policy[0].argmax()) for name, each in found.items()}
    assert chosen == {"greedy": RISKY, "safe": SAFE, "risky": RISKY}


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_safer_action_that_is_not_optimal_is_never_chosen(alpha):
    """Alone with the gamble and the certain 0.9, the gamble is taken; over several rounds the means stay optimal."""
    mdp = robust_risk.choices(3)
    without = jax.tree.map(lambda part: part[:, jnp.array([RISKY, WORSE])], mdp)
    _, found = choose_all(without, 0.9, two_slices(alpha), 1e-4, iterations=50)
    assert (found["safe"].policy.argmax(-1) == 0).all()
    values, found = choose_all(mdp, 0.9, two_slices(alpha), 1e-4, iterations=50)
    assert (found["safe"].policy.argmax(-1) == SAFE).all()
    assert (found["risky"].policy.argmax(-1) == RISKY).all()
    for each in found.values():
        np.testing.assert_allclose(tabular.policy_values(mdp, each.policy, 0.9), values, atol=1e-4)
        np.testing.assert_allclose(laws.mean(each.laws), values, atol=1e-4)


def test_the_tolerance_decides_what_ties():
    """Rewards 1 and 1 + 1e-6 tie, though float32 tells them apart; a tolerance of 0.2 lets 0.9 in as well."""
    values = jnp.array([[1 + 1e-6, 1.0, 0.9]])
    assert values[0, 0] > values[0, 1]
    np.testing.assert_array_equal(robust_risk.optimal_actions(values, 1e-4), [[True, True, False]])
    np.testing.assert_array_equal(robust_risk.optimal_actions(values, 0.2), [[True, True, True]])
    mdp = robust_risk.choices(1)
    favoured = mdp._replace(reward=mdp.reward.at[0, RISKY].add(1e-6))
    _, found = choose_all(favoured, 0.9, two_slices(0.5), 1e-4, iterations=20)
    assert found["safe"].policy[0].argmax() == SAFE


def test_control_is_the_best_of_all_optimal_policies():
    """Every policy over tied actions of a random process, evaluated by the two-atom operator; none beats the safe
    one in the lower average of any state, nor the risky one in the upper."""
    rng, states, alpha = np.random.default_rng(8), 3, 0.3
    # Action 1 takes the outcomes of action 0 with rewards of the same mean in each, so both are always optimal.
    transition = np.repeat(rng.dirichlet(np.ones(states), (states, 1)), 2, axis=1)
    means, spread = rng.uniform(-1, 1, (states, 1, states, 1)), rng.uniform(0, 2, (states, 2, states, 1))
    mdp = tabular.mdp_from_arrays(transition, means + spread * np.array([-1.0, 1]))
    values, found = choose_all(mdp, 0.7, two_slices(alpha), 1e-4, iterations=100)
    assert robust_risk.optimal_actions(values, 1e-4).all()
    everything = []
    for number in range(2**states):
        policy = jax.nn.one_hot(jnp.array([number >> state & 1 for state in range(states)]), 2)
        everything.append(evaluate(mdp, policy, 0.7, two_slices(alpha), iterations=100).atoms)
    everything = np.stack(everything)
    np.testing.assert_allclose(found["safe"].laws.atoms[..., 0], everything[..., 0].max(0), atol=1e-4)
    np.testing.assert_allclose(found["risky"].laws.atoms[..., 1], everything[..., 1].max(0), atol=1e-4)
    assert np.ptp(everything[..., 0], axis=0).max() > 0.1


# -- the shell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["choices", "tabular/maze"])
def test_solve_prints_the_three_policies(problem):
    console = Console(width=140, record=True)
    robust_risk.solve(Config(problem=problem, rounds=2, iterations=60, steps=20, alpha=0.5), console)
    text = console.export_text()
    assert "greedy" in text
    if problem == "choices":
        lines = {
            name: next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
            for name in ("safe", "risky")
        }
        assert lines["safe"].count("1.9500") == 4  # 1 + .95, whatever happens
        assert "0.9500" in lines["risky"]  # CVaR 1/2: nothing, or the second round only, 2 * .95
        assert "3.9000" in lines["risky"]


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_must_leave_two_slices(alpha):
    with pytest.raises(ValueError, match=r"--alpha is .*; it must be strictly between 0 and 1"):
        robust_risk.solve(Config(alpha=alpha), Console())

"""Exact distributional dynamic programming: closed forms, hand-worked numbers of the sheets, and sampled returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import metrics, quantile, tabular
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law

# One state, one action, a reward of 0 or 1 with equal chances, discount 1/2: the return is uniform on [0, 2].
COIN = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2))
ONLY = jnp.ones((1, 1))


def random_mdp(seed: int, states: int = 5, actions: int = 3, atoms: int = 2, terminal: bool = True) -> tabular.MDP:
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    reward = rng.uniform(-1, 1, (states, actions, states, atoms))
    masses = rng.dirichlet(np.ones(atoms), (states, actions, states))
    return tabular.mdp_from_arrays(transition, reward, masses, np.arange(states) == states - 1 if terminal else None)


def random_policy(seed: int, states: int = 5, actions: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(actions), states), jnp.float32)


def random_laws(seed: int, atoms: int, low: float = -5, high: float = 5) -> Law:
    rng = np.random.default_rng(seed)
    values = np.sort(rng.uniform(low, high, (5, 3, atoms)), axis=-1)
    return Law(jnp.asarray(values, jnp.float32), jnp.full((5, 3, atoms), 1 / atoms))


# -- the process ------------------------------------------------------------------------------------------------------


def test_arrays_become_outcomes():
    transition = np.array([[[0.25, 0.75]], [[0.0, 1.0]]])
    mdp = tabular.mdp_from_arrays(transition, np.array([[1.0], [2.0]]), terminal=np.array([False, True]))
    np.testing.assert_array_equal(mdp.probability, [[[0.75, 0.25]], [[1, 0]]])
    np.testing.assert_array_equal(mdp.next_state[0, 0], [1, 0])
    np.testing.assert_array_equal(mdp.terminated[0, 0], [True, False])
    np.testing.assert_array_equal(mdp.reward[:, 0, 0], [1, 2])
    with pytest.raises(ValueError, match=r"transition has shape \(1, 1, 2\); it must be"):
        tabular.mdp_from_arrays(np.ones((1, 1, 2)), 0.0)
    with pytest.raises(ValueError, match=r"transition has rows from 0\.5 to 0\.5"):
        tabular.mdp_from_arrays(np.full((1, 1, 1), 0.5), 0.0)
    with pytest.raises(ValueError, match="reward_masses must be probabilities"):
        tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.zeros((1, 1, 1, 2)), np.array([0.5, 0.6]))


def test_policy_values_agree_with_iteration_and_optimal_values_with_the_best_policy():
    mdp, policy = random_mdp(0), random_policy(1)
    values = jnp.zeros((5, 3))
    for _ in range(200):
        values = tabular.expected(mdp, 0.9, (policy * values).sum(-1))
    np.testing.assert_allclose(tabular.policy_values(mdp, policy, 0.9), values, atol=1e-4)
    best = tabular.optimal_values(mdp, 0.9, 300)
    np.testing.assert_allclose(tabular.policy_values(mdp, tabular.greedy(best), 0.9), best, atol=1e-4)
    for seed in range(20):
        assert (tabular.policy_values(mdp, random_policy(seed), 0.9) <= best + 1e-4).all()


# -- fixed points in closed form --------------------------------------------------------------------------------------


def fixed_point(mdp, policy, discount, projection, iterations=60):
    return jax.jit(lambda: tabular.evaluate(mdp, policy, discount, projection, iterations))()


def test_the_coins_return_is_uniform():
    support = jnp.linspace(0, 2, 201)
    found = fixed_point(COIN, ONLY, 0.5, tabular.to_categorical(support))
    assert laws.mean(found)[0, 0] == pytest.approx(1, abs=1e-5)
    uniform = Law(jnp.linspace(0.001, 1.999, 1000), jnp.full(1000, 1e-3))
    assert metrics.wasserstein_1(jax.tree.map(lambda x: x[0, 0], found), uniform) < tabular.binning_error(support, 0.5)
    assert risks.conditional_value_at_risk(found, 0.25)[0, 0] == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.1, (5 / 14, 15 / 14)), (0.25, (0.4, 1.2)), (0.5, (0.5, 1.5)), (0.75, (0.8, 1.6))]
)
def test_two_averages_of_the_coin(alpha, expected):
    found = fixed_point(COIN, ONLY, 0.5, tabular.to_averages(jnp.array([0, alpha, 1])))
    np.testing.assert_allclose(found.atoms[0, 0], expected, rtol=1e-4)
    assert laws.mean(found)[0, 0] == pytest.approx(1, abs=1e-5)


def test_four_averages_of_the_coin_are_the_slices_of_the_uniform_law():
    found = fixed_point(COIN, ONLY, 0.5, tabular.to_averages(jnp.linspace(0, 1, 5)))
    np.testing.assert_allclose(found.atoms[0, 0], [0.25, 0.75, 1.25, 1.75], rtol=1e-5)


@pytest.mark.parametrize("count", [4, 11, 51])
def test_quantiles_of_a_biased_coin(count):
    """A reward of 1 with probability 0.7, against dynamic programming with masses counted in whole numbers."""
    biased = tabular.mdp_from_arrays(np.ones((1, 1, 1)), np.array([0.0, 1.0]).reshape(1, 1, 1, 2), np.array([0.3, 0.7]))
    found = fixed_point(biased, ONLY, 0.5, tabular.to_quantiles(count))
    atoms = np.zeros(count)
    for _ in range(60):
        shifted = sorted([(0.5 * z, 3) for z in atoms] + [(1 + 0.5 * z, 7) for z in atoms])
        reached = np.cumsum([mass for _, mass in shifted])  # in units of 1 / (10 count)
        atoms = np.array([shifted[np.argmax(reached >= 5 * (2 * i + 1))][0] for i in range(count)])
    np.testing.assert_allclose(found.atoms[0, 0], atoms, atol=1e-5)
    if count == 4:
        assert laws.mean(found)[0, 0] == pytest.approx(1.416667, rel=1e-5)


def test_moments_of_a_geometric_return():
    """A reward of 1 and an end with probability 1/4 at each step, discount .9."""
    ends = tabular.mdp_from_arrays(np.array([[[0.75, 0.25]], [[0.0, 1.0]]]), 1.0, terminal=np.array([False, True]))
    policy = jnp.ones((2, 1))
    found = fixed_point(ends, policy, 0.9, tabular.to_moments, 150)
    assert laws.mean(found)[0, 0] == pytest.approx(3.076923, rel=1e-5)
    assert laws.variance(found)[0, 0] == pytest.approx(3.663363, rel=1e-4)
    exact = tabular.exact_return_law(ends, np.ones((2, 1)), 0.9, 0, 0, 60)
    np.testing.assert_allclose(laws.quantile(exact, jnp.array([0.1, 0.5, 0.9])), [1, 2.71, 6.125795], rtol=1e-5)
    np.testing.assert_allclose(exact.masses.sum(), 1, rtol=1e-6)


# -- projections ------------------------------------------------------------------------------------------------------


def test_averages_and_quantiles_of_a_law_by_hand():
    law = Law(jnp.array([3.0, -1, 1, 0]), jnp.array([0.1, 0.1, 0.3, 0.5]))
    averages = tabular.to_averages(jnp.linspace(0, 1, 5))(law, None)
    np.testing.assert_allclose(averages.atoms, [-0.4, 0, 0.6, 1.8], atol=1e-5)
    np.testing.assert_allclose(tabular.to_quantiles(4)(law, None).atoms, [0, 0, 1, 1])
    left = tabular.to_averages(jnp.array([0, 0.25, 1]))(Law(jnp.array([-10.0, 0, 1]), jnp.array([0.1, 0.2, 0.7])), None)
    np.testing.assert_allclose(left.atoms, [-4, 0.933333], rtol=1e-4)


def test_moments_are_kept():
    law = Law(jnp.array([[-1.0, 2, 5], [7, 7, 7]]), jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    projected = tabular.to_moments(law, None)
    np.testing.assert_allclose(laws.mean(projected), laws.mean(law), rtol=1e-6)
    np.testing.assert_allclose(laws.variance(projected), laws.variance(law), rtol=1e-5, atol=1e-9)


def test_particles_are_samples_of_their_law():
    law = Law(jnp.array([[0.0, 1.0, 5.0]]), jnp.array([[0.5, 0.3, 0.2]]))
    drawn = tabular.to_particles(20_000)(law, jax.random.key(0)).atoms[0]
    for atom, mass in zip(law.atoms[0], law.masses[0], strict=True):
        assert (drawn == atom).mean() == pytest.approx(mass, abs=4 * np.sqrt(0.25 / 20_000))


# -- the operators against sampled returns ----------------------------------------------------------------------------


@functools.cache
def observed():
    mdp, policy = random_mdp(3), random_policy(4)
    return mdp, policy, tabular.sample_returns(mdp, policy, 0.8, jax.random.key(0), samples=4_000, steps=60)


def distance(law: Law, samples: jax.Array) -> float:
    return float(metrics.wasserstein_1(law, samples).max())


def test_operators_agree_with_sampled_returns():
    mdp, policy, samples = observed()
    support = jnp.linspace(-5, 5, 401)
    # The distance of 4,000 samples to their own law is about 0.01.
    for projection, error in (
        (tabular.to_categorical(support), tabular.binning_error(support, 0.8)),
        (tabular.to_quantiles(200), 0.03),
        (tabular.to_averages(jnp.linspace(0, 1, 201)), 0.03),
        (tabular.to_particles(1_000), 0.1),
    ):
        found = fixed_point(mdp, policy, 0.8, projection, 50)
        assert distance(found, samples) < 0.03 + error
    # And would see a wrong discount.
    assert distance(fixed_point(mdp, policy, 0.7, tabular.to_quantiles(200), 50), samples) > 0.1


def test_exact_laws_agree_with_sampled_returns():
    mdp, policy, samples = observed()
    shorter = tabular.sample_returns(mdp, policy, 0.8, jax.random.key(1), samples=4_000, steps=2)
    exact = tabular.exact_return_law(mdp, policy, 0.8, 1, 2, 2)
    assert exact.masses.sum() == pytest.approx(1, abs=1e-5)
    assert metrics.wasserstein_1(exact, np.asarray(shorter[1, 2])) < 0.04
    assert metrics.wasserstein_1(exact, np.asarray(samples[1, 2])) > 0.04


@pytest.mark.parametrize(
    ("projection", "keeps_variance"),
    [(tabular.to_categorical(jnp.linspace(-8, 8, 33)), False), (tabular.to_averages(jnp.linspace(0, 1, 4)), False),
     (tabular.to_moments, True)],
    ids=["categorical", "averages", "moments"],
)  # fmt: skip
def test_means_are_the_policys_values(projection, keeps_variance):
    mdp, policy, samples = observed()
    found = fixed_point(mdp, policy, 0.8, projection, 80)
    np.testing.assert_allclose(laws.mean(found), tabular.policy_values(mdp, policy, 0.8), atol=1e-4)
    if keeps_variance:
        np.testing.assert_allclose(laws.variance(found), samples.var(-1), rtol=0.15)


# -- contraction ------------------------------------------------------------------------------------------------------


def applied(mdp, policy, discount, projection, action_laws):
    return projection(tabular.bellman(mdp, discount, tabular.under_policy(policy, action_laws)), jax.random.key(0))


def wasserstein_infinity(a: Law, b: Law) -> jax.Array:
    """Of laws with the same masses and sorted atoms."""
    return jnp.abs(jnp.sort(a.atoms, axis=-1) - jnp.sort(b.atoms, axis=-1)).max()


@pytest.mark.parametrize(
    ("projection", "count"),
    [(tabular.to_quantiles(7), 7), (tabular.to_averages(jnp.linspace(0, 1, 8)), 7)],
    ids=["quantiles", "averages"],
)
def test_contraction_in_wasserstein_infinity(projection, count):
    mdp, policy = random_mdp(5, terminal=False), random_policy(6)
    once = jax.jit(lambda action_laws: applied(mdp, policy, 0.7, projection, action_laws))
    ratios = []
    for seed in range(40):
        a, b = random_laws(2 * seed, count), random_laws(2 * seed + 1, count)
        ratios.append(float(wasserstein_infinity(once(a), once(b)) / wasserstein_infinity(a, b)))
    assert max(ratios) <= 0.7 + 1e-4
    assert max(ratios) > 0.2


def test_contraction_in_the_cramer_metric():
    mdp, policy, support = random_mdp(5, terminal=False), random_policy(6), jnp.linspace(-6, 6, 25)
    once = jax.jit(lambda action_laws: applied(mdp, policy, 0.7, tabular.to_categorical(support), action_laws))

    def cramer(a, b):
        return np.sqrt(np.asarray(metrics.cramer(a, b)).max())

    ratios = []
    for seed in range(40):
        masses = np.random.default_rng(seed).dirichlet(np.full(25, 0.3), (2, 5, 3))
        a, b = (Law(jnp.broadcast_to(support, x.shape), jnp.asarray(x, jnp.float32)) for x in masses)
        ratios.append(float(cramer(once(a), once(b)) / cramer(a, b)))
    assert max(ratios) <= np.sqrt(0.7) + 1e-4


def test_one_step_control_contracts_in_wasserstein_1():
    """The control operator of one-step laws (OS-C51), where that of full laws need not."""
    mdp, support = random_mdp(7, terminal=False), jnp.linspace(-6, 6, 25)
    project = tabular.to_categorical(support)

    @jax.jit
    def once(masses):
        values = (masses * support).sum(-1).max(-1)
        return project(tabular.one_step(mdp, 0.8, values), None).masses

    ratios = []
    for seed in range(60):
        a, b = jnp.asarray(np.random.default_rng(seed).dirichlet(np.full(25, 0.3), (2, 5, 3)), jnp.float32)
        far = metrics.wasserstein_1(Law(support, a), Law(support, b)).max()
        ratios.append(float(metrics.wasserstein_1(Law(support, once(a)), Law(support, once(b))).max() / far))
    assert max(ratios) <= 0.8 + 1e-4


def test_one_step_laws_of_the_coin():
    law = tabular.one_step(COIN, 0.5, jnp.array([1.0]))
    np.testing.assert_allclose(law.atoms[0, 0], [0.5, 1.5])
    projected = tabular.to_categorical(jnp.array([0, 0.8, 1.6, 2.4]))(law, None)
    np.testing.assert_allclose(projected.masses[0, 0], [0.1875, 0.375, 0.4375, 0], atol=1e-6)
    # Total variance: that of one step and the discounted one of what follows.
    assert laws.variance(law)[0, 0] + 0.25 / 3 == pytest.approx(1 / 3)


# -- control ----------------------------------------------------------------------------------------------------------


def test_control_finds_the_optimal_values():
    mdp = random_mdp(8)
    found = jax.jit(lambda: tabular.optimise(mdp, 0.8, tabular.to_categorical(jnp.linspace(-5, 5, 51)), 60))()
    np.testing.assert_allclose(laws.mean(found), tabular.optimal_values(mdp, 0.8, 200), atol=1e-4)


# From state 0 on to state 1 for nothing; there action 0 ends for 0, action 1 for -1 or 1.
TIE = tabular.MDP(
    jnp.array([[[1.0, 0], [1, 0]], [[1, 0], [0.5, 0.5]]]), jnp.ones((2, 2, 2), jnp.int32),
    jnp.array([[[0.0, 0], [0, 0]], [[0, 0], [-1, 1]]]), jnp.array([[[False] * 2] * 2, [[True] * 2] * 2]),
)  # fmt: skip


def test_a_tie_decides_the_full_law_but_not_that_of_one_step():
    support, swapped = jnp.linspace(-1, 1, 5), jax.tree.map(lambda x: x[:, ::-1], TIE)
    project = tabular.to_categorical(support)
    full = [tabular.optimise(mdp, 0.5, project, 5).masses[0, 0] for mdp in (TIE, swapped)]
    np.testing.assert_allclose(full, [[0, 0, 1, 0, 0], [0, 0.5, 0, 0.5, 0]], atol=1e-6)
    for mdp in (TIE, swapped):
        values = tabular.optimal_values(mdp, 0.5, 5).max(-1)
        law = project(tabular.one_step(mdp, 0.5, values), None)
        np.testing.assert_allclose(law.masses[0, 0], [0, 0, 1, 0, 0], atol=1e-6)


def test_ties_are_broken_by_a_second_value():
    values = jnp.array([[1.0, 1.0, 0.9], [2.0, 0.0, 0.0]])
    np.testing.assert_array_equal(tabular.greedy(values), [[1, 0, 0], [1, 0, 0]])
    lower = jnp.array([[0.0, 0.5, 0.9], [0, 9, 9]])
    np.testing.assert_array_equal(tabular.greedy(values, lower), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(tabular.greedy(values, lower, tolerance=0.2), [[0, 0, 1], [1, 0, 0]])


def test_risk_sensitive_control_takes_the_certain_reward():
    # One decision: 1 for certain, or 0 and 2.2 with equal chances.
    choice = tabular.MDP(
        jnp.array([[[1.0, 0], [0.5, 0.5]]]), jnp.zeros((1, 2, 2), jnp.int32),
        jnp.array([[[1.0, 0], [0, 2.2]]]), jnp.ones((1, 2, 2), bool),
    )  # fmt: skip
    project = tabular.to_quantiles(20)
    for text, action in (("neutral", 1), ("cvar:0.25", 0), ("wang:-0.75", 0)):
        found = tabular.optimise(choice, 0.9, project, 3, risks.parse(text))
        assert risks.value(risks.parse(text), found)[0].argmax() == action


def test_quantile_projection_keeps_the_midpoint_quantiles():
    law = Law(jnp.arange(10.0), jnp.full(10, 0.1))
    np.testing.assert_array_equal(tabular.to_quantiles(5)(law, None).atoms, laws.quantile(law, quantile.midpoints(5)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.distributional import categorical
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.metrics import cramer, wasserstein_1

GRID = jnp.array([-2.0, -1.0, 0.0, 1.0, 2.0])
MASSES = jnp.array([0.1, 0.2, 0.4, 0.2, 0.1])


@pytest.fixture(params=["cpu", "default"])
def project_return(request, monkeypatch):
    """Once with the code of the CPU and once with that of accelerators; both are legal programs here."""

    taken = []

    def choose(*operands, **branches):
        taken.append(request.param)
        return branches[request.param](*operands)

    def traced(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "platform_dependent", choose)
            return categorical.project_return(*arguments)

    yield jax.jit(traced)
    assert taken, "the test traced no code of this branch"


project = jax.jit(categorical.project)


def slow_projection(atoms, masses, support):
    """One atom at a time, by its two neighbours (Rowland et al. 2018, eq. 6), in float64."""
    support, projected = np.asarray(support, np.float64), np.zeros(len(support))
    for x, p in zip(np.asarray(atoms, np.float64), np.asarray(masses, np.float64), strict=True):
        if x <= support[0]:
            projected[0] += p
        elif x >= support[-1]:
            projected[-1] += p
        else:
            above = np.searchsorted(support, x, side="right")
            share = (x - support[above - 1]) / (support[above] - support[above - 1])
            projected[above - 1] += p * (1 - share)
            projected[above] += p * share
    return projected


# -- the support ------------------------------------------------------------------------------------------------------


def test_support_is_even_and_its_ends_are_exact():
    np.testing.assert_array_equal(categorical.support(-2.0, 2.0, 5), GRID)
    for low, high, count in [(-10, 10, 51), (-0.1, 0.7, 201), (0.3, 1e4, 7)]:
        atoms = jax.jit(categorical.support, static_argnums=2)(float(low), float(high), count)
        assert (atoms[0], atoms[-1]) == (np.float32(low), np.float32(high))
        np.testing.assert_allclose(atoms, np.linspace(low, high, count), atol=1e-6 * (high - low))
        assert atoms.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0, 5), "v_min is 1.0; it must be less than v_max = 1.0"),
        ((2.0, -1.0, 5), "v_min is 2.0; it must be less than v_max = -1.0"),
        ((float("-inf"), 1.0, 5), "v_min is -inf; it must be finite"),
        ((9.99999999, 10.0, 51), "v_min is 9.99999999 and v_max 10.0; float32 cannot tell 51 atoms there apart"),
        ((-3e38, 3e38, 2), "float32 cannot tell 2 atoms there apart"),
        ((0.0, 1.0, 2**31 - 1), "num_atoms is 2147483647; it must be at least 2 and at most 1048576"),
        ((0.0, float("nan"), 5), "v_max is nan; it must be finite"),
        ((0.0, 1.0, 1), "num_atoms is 1; it must be at least 2"),
    ],
)
def test_support_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        categorical.support(*arguments)


# -- the projection ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.5, 0.9, [0.03, 0.15, 0.32, 0.32, 0.18]),
        (0.25, 0.5, [0, 0.125, 0.525, 0.325, 0.025]),
        (0, 1, MASSES),
        (1, 1, [0, 0.1, 0.2, 0.4, 0.3]),
        (0.5, 0, [0, 0, 0.5, 0.5, 0]),
        (1, 0, [0, 0, 0, 1, 0]),
        (3, 0, [0, 0, 0, 0, 1]),
        (-7, 0, [1, 0, 0, 0, 0]),
    ],
)
def test_projection_hand_worked(project_return, reward, discount, expected):
    reward, discount = jnp.float32(reward), jnp.float32(discount)
    np.testing.assert_allclose(project_return(reward, discount, MASSES, GRID), expected, atol=1e-6)
    np.testing.assert_allclose(project(reward + discount * GRID, MASSES, GRID), expected, atol=1e-6)


def test_clipping_changes_the_mean_by_what_was_clipped():
    # The top atom moves to 2.3 and is clipped to 2: its mass .1 lies outside, and .3 * .1 of the mean is lost.
    reward, discount = jnp.float32([0.5, 0.25, 3, -7]), jnp.float32([0.9, 0.5, 0, 0])
    clipped = categorical.clipped_mass(reward, discount, MASSES, GRID)
    np.testing.assert_allclose(clipped, [0.1, 0, 1, 1], atol=1e-6)
    projected = categorical.project_return(reward, discount, MASSES, GRID)
    np.testing.assert_allclose((projected * GRID).sum(-1), [0.47, 0.25, 2, -2], atol=1e-6)


def test_a_return_that_rounding_lifts_over_the_end_is_not_clipped():
    # The best return r / (1 - gamma) is a common choice of v_max: the top atom moves exactly onto itself.
    for discount in (0.9, 0.99, 0.997):
        atoms = categorical.support(0.0, 1 / (1 - discount), 51)
        masses = jnp.full(51, 1 / 51)
        assert categorical.clipped_mass(jnp.float32(1), jnp.float32(discount), masses, atoms) == 0
        assert categorical.clipped_mass(jnp.float32(1.5), jnp.float32(discount), masses, atoms) > 0.01


def test_projection_onto_an_uneven_support_hand_worked():
    projected = project(jnp.array([2.0, 0.25, -1, 9]), jnp.array([0.4, 0.4, 0.1, 0.1]), jnp.array([0.0, 1, 3]))
    np.testing.assert_allclose(projected, [0.3 + 0.1, 0.1 + 0.2, 0.2 + 0.1], atol=1e-6)


@pytest.mark.parametrize("support", ["even", "uneven"])
def test_projection_of_any_law_agrees_with_a_loop(support):
    rng = np.random.default_rng(0)
    support = np.linspace(-3, 3, 11) if support == "even" else np.sort(rng.normal(0, 2, 11))
    support = support.astype(np.float32)
    atoms = rng.normal(0, 3, (100, 8)).astype(np.float32)
    atoms[:, :3] = rng.choice(support, (100, 3))  # exactly on atoms, ends included
    masses = rng.dirichlet(np.ones(8), 100).astype(np.float32)
    projected = project(atoms, masses, support)
    expected = [slow_projection(x, p, support) for x, p in zip(atoms, masses, strict=True)]
    np.testing.assert_allclose(projected, expected, atol=1e-6)
    np.testing.assert_allclose(projected.sum(-1), 1, atol=1e-6)
    assert projected.min() >= 0


@pytest.mark.parametrize("count", [2, 5, 51, 201])
def test_projection_of_returns_agrees_with_a_loop_and_with_rlax(project_return, count):
    rng = np.random.default_rng(count)
    atoms = categorical.support(-10.0, 10.0, count)
    spacing = 20 / (count - 1)
    rewards, discounts = rng.normal(0, 4, 40), rng.choice([0, 0.5, 0.9, 0.99, 1, 1.3, -0.5], 40)
    rewards[:10] = spacing * rng.integers(-count, count, 10)  # lands on atoms, where neighbours must not lose mass
    discounts[:5], rewards[39] = 1, 1e9
    rewards, discounts = rewards.astype(np.float32), discounts.astype(np.float32)
    masses = rng.dirichlet(np.ones(count), 40).astype(np.float32)
    projected = project_return(rewards, discounts, masses, atoms)
    np.testing.assert_allclose(projected.sum(-1), 1, atol=1e-6)
    assert projected.min() >= 0
    returns = np.float64(rewards)[:, None] + np.float64(discounts)[:, None] * np.linspace(-10, 10, count)
    expected = [slow_projection(x, p, np.linspace(-10, 10, count)) for x, p in zip(returns, masses, strict=True)]
    # An atom's place is known to about count * 2^-24 spacings in float32.
    np.testing.assert_allclose(projected, expected, atol=2e-7 * count + 1e-6)
    moved = rewards[:, None] + discounts[:, None] * atoms
    theirs = jax.vmap(rlax.categorical_l2_project, in_axes=(0, 0, None))(moved, masses, atoms)
    np.testing.assert_allclose(projected, theirs, atol=2e-7 * count + 1e-6)
    np.testing.assert_allclose(project(moved, masses, atoms), theirs, atol=2e-7 * count + 1e-6)


def test_projection_of_returns_under_vmap_over_runs_with_their_own_supports(project_return):
    rng = np.random.default_rng(1)
    rewards, masses = rng.normal(size=(3, 4)).astype(np.float32), rng.dirichlet(np.ones(5), (3, 4)).astype(np.float32)
    scales = jnp.array([1.0, 2.0, 3.0])
    supports = jax.vmap(lambda scale: categorical.support(-scale, scale, 5))(scales)
    mapped = jax.vmap(project_return)(rewards, np.full((3, 4), 0.9, np.float32), masses, supports)
    for run, row in np.ndindex(3, 4):
        expected = slow_projection(rewards[run, row] + 0.9 * supports[run], masses[run, row], supports[run])
        np.testing.assert_allclose(mapped[run, row], expected, atol=1e-6)


def test_leading_axes_broadcast_and_a_nan_stays_visible(project_return):
    rewards = jnp.array([[0.5, jnp.nan], [jnp.nan, 1]])
    projected = project_return(rewards, jnp.float32(0), MASSES, GRID)
    np.testing.assert_array_equal(np.isnan(projected).any(-1), [[False, True], [True, False]])
    np.testing.assert_allclose(projected[0, 0], [0, 0, 0.5, 0.5, 0], atol=1e-6)


def test_the_compiled_default_is_one_of_the_two_branches(project_return):
    # project_return is patched; this is what agents call.
    discount = jnp.float32(0.9)
    ours = jax.jit(categorical.project_return)(jnp.float32(0.5), discount, MASSES, GRID)
    np.testing.assert_allclose(ours, project_return(jnp.float32(0.5), discount, MASSES, GRID), atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(-3, 3))
def test_projection_is_linear_in_the_masses(seed, weight, reward):
    first, second = np.random.default_rng(seed).dirichlet(np.ones(5), 2).astype(np.float32)
    projections = [
        project(np.float32(reward) + 0.9 * GRID, masses, GRID)
        for masses in (first, second, weight * first + (1 - weight) * second)
    ]
    np.testing.assert_allclose(projections[2], weight * projections[0] + (1 - weight) * projections[1], atol=1e-6)


def test_the_projected_operator_contracts_in_the_cramer_distance(project_return):
    rng, discount = np.random.default_rng(2), 0.81
    masses = rng.dirichlet(np.ones(5), (2, 1000)).astype(np.float32)
    rewards = rng.normal(size=1000).astype(np.float32)
    before = cramer(*(Law(np.asarray(GRID), each) for each in masses))
    after = cramer(
        *(Law(np.asarray(GRID), np.asarray(project_return(rewards, np.float32(discount), p, GRID))) for p in masses)
    )
    assert np.sqrt(after / before).max() <= np.sqrt(discount) + 1e-4
    assert np.sqrt(after / before).max() > 0.6  # and not because everything was clipped


def iterate(outcomes, count, bounds, iterations=300):
    """Fixed point of the projected Bellman operator on one state: outcomes are (probability, reward, discount)."""
    atoms = categorical.support(*bounds, count)

    def backup(masses, _):
        laws = [p * categorical.project_return(jnp.float32(r), jnp.float32(d), masses, atoms) for p, r, d in outcomes]
        return sum(laws), None

    masses, _ = jax.jit(lambda masses: jax.lax.scan(backup, masses, None, length=iterations))(
        jnp.full(count, 1 / count)
    )
    return np.asarray(atoms, np.float64), np.asarray(masses, np.float64)


@pytest.mark.parametrize("count", [5, 51])
def test_fixed_point_of_the_coin(count):
    # r is 0 or 1 with probability 1/2, gamma 1/2: the true law is uniform on [0, 2].
    atoms, masses = iterate([(0.5, 0, 0.5), (0.5, 1, 0.5)], count, (0.0, 2.0))
    spacing = 2 / (count - 1)
    expected = np.full(count, spacing / 2)
    expected[[0, -1]] /= 2
    np.testing.assert_allclose(masses, expected, atol=1e-6)
    assert masses @ atoms == pytest.approx(1, abs=1e-5)
    assert masses @ (atoms - 1) ** 2 == pytest.approx(1 / 3 + spacing**2 / 6, abs=1e-5)
    cells = 400 * (count - 1)  # the truth as samples, many in each cell
    truth = (np.arange(cells) + 0.5) * 2 / cells
    assert wasserstein_1(Law(atoms, masses), truth) == pytest.approx(spacing / 4, rel=1e-3)
    assert np.sqrt(cramer(Law(atoms, masses), truth)) == pytest.approx(spacing / np.sqrt(24), rel=1e-3)


def test_fixed_point_of_a_geometric_episode():
    # r = 1, and the episode ends with probability 1/4 after each reward; gamma .9. Projecting inflates the variance.
    atoms, masses = iterate([(0.25, 1, 0.0), (0.75, 1, 0.9)], 101, (0.0, 10.0))
    mean = masses @ atoms
    assert mean == pytest.approx(3.076923, abs=1e-4)
    assert masses @ (atoms - mean) ** 2 == pytest.approx(3.665663, abs=5e-4)  # the true one is 3.663363


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_hand_worked():
    target, logits = jnp.array([0.03, 0.15, 0.32, 0.32, 0.18]), jnp.array([0.0, 0.5, -0.5, 1.0, 0.0])
    assert float(categorical.cross_entropy(target, logits)) == pytest.approx(1.707122, abs=1e-6)
    assert float(categorical.kl_divergence(target, logits)) == pytest.approx(0.279456, abs=1e-6)
    expected = [0.113399, 0.086426, -0.233024, 0.069800, -0.036601]
    for loss in (categorical.cross_entropy, categorical.kl_divergence):
        target_gradient, gradient = jax.grad(loss, argnums=(0, 1))(target, logits)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        np.testing.assert_array_equal(target_gradient, 0)


def test_losses_with_empty_atoms_and_extreme_logits():
    target, logits = jnp.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]), jnp.array([[0.0, 200.0, 0.0], [0.0, 0.0, -200.0]])
    np.testing.assert_allclose(categorical.kl_divergence(target, logits), [0, 0], atol=1e-6)
    np.testing.assert_allclose(categorical.cross_entropy(target, logits), [0, np.log(2)], atol=1e-6)
    # A prediction without any mass where the target is: the loss is the gap of the logits, not log(0).
    np.testing.assert_allclose(categorical.cross_entropy(target[0], -logits[0]), 200 + np.log(2), rtol=1e-5)


def test_kl_divergence_agrees_with_its_definition():
    rng = np.random.default_rng(5)
    target, logits = rng.dirichlet(np.ones(6), (2, 3)), rng.normal(size=(2, 3, 6))
    predicted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (target * np.log(target / predicted)).sum(-1)
    np.testing.assert_allclose(categorical.kl_divergence(target, logits), expected, rtol=1e-4)


def test_entropy_where_masses_are_nothing():
    np.testing.assert_allclose(categorical.entropy(jnp.array([[1.0, 0, 0], [0.5, 0.5, 0]])), [0, np.log(2)], rtol=1e-6)
    gradient = jax.grad(lambda masses: categorical.entropy(masses))(jnp.array([1.0, 0.0, 1e-42]))
    np.testing.assert_array_equal(gradient, [-1, 0, 0])

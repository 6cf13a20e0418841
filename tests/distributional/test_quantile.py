import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_dist.distributional import quantile

BATCH, MEMBERS, QUANTILES, TARGETS = 3, 2, 4, 5  # all different, so that no axis can be taken for another
INFINITY, NAN = float("inf"), float("nan")


@pytest.fixture(params=["cpu", "default"])
def branch(request, monkeypatch):
    """Runs the test once with the code of the CPU and once with that of accelerators; both are legal programs here."""
    taken = []

    def choose(*operands, **branches):
        taken.append(request.param)
        return branches[request.param](*operands)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    yield request.param
    assert taken, "the test traced no code of this branch"


def jit(function):
    """`jax.jit` without the traces of earlier calls, which may hold the other branch."""
    return jax.jit(lambda *arguments: function(*arguments))


def truncate(atoms, dropped):
    return jit(lambda atoms: quantile.truncate_pooled(atoms, dropped))(atoms)


def example(seed=0):
    rng = np.random.default_rng(seed)
    predicted = rng.normal(0, 2, (BATCH, MEMBERS, QUANTILES)).astype(np.float32)
    target = rng.normal(1, 3, (BATCH, TARGETS)).astype(np.float32)
    target[0, 0] = predicted[0, 0, 0]  # a pair at u = 0, where the Huber function has its kink for kappa = 0
    return predicted, target


# -- the quantile Huber loss ------------------------------------------------------------------------------------------


def slow_loss_and_gradient(predicted, target, fractions, kappa, over_predicted, masses=None):
    """QR-DQN, eq. 9-10, one pair at a time; the gradient is that of the loss summed over batch and members."""
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    loss, gradient = np.zeros(predicted.shape[:-1]), np.zeros(predicted.shape)
    for b, n, m in np.ndindex(*predicted.shape):
        for k in range(target.shape[1]):
            u = target[b, k] - predicted[b, n, m]
            weight = abs(fractions[b, n, m] - (u < 0))
            if abs(u) <= kappa and kappa > 0:
                cost, slope = 0.5 * u**2 / kappa, u / kappa
            else:
                cost, slope = abs(u) - 0.5 * kappa, np.sign(u)
            mass = 1 / target.shape[1] if masses is None else masses[b, k]
            share = mass / (predicted.shape[-1] if over_predicted == "mean" else 1)
            loss[b, n] += weight * cost * share
            gradient[b, n, m] -= weight * slope * share
    return loss, gradient


@pytest.mark.parametrize("over_predicted", ["mean", "sum"])
@pytest.mark.parametrize("fractions_axes", ["shared", "per_sample"])
def test_loss_and_gradient_agree_with_the_slow_reference(branch, over_predicted, fractions_axes):
    predicted, target = example()
    masses = None
    if fractions_axes == "per_sample":  # as FQF weighs them
        masses = np.random.default_rng(2).dirichlet(np.ones(target.shape[1]), BATCH).astype(np.float32)
    fractions = np.asarray(quantile.midpoints(QUANTILES))
    if fractions_axes == "per_sample":  # as IQN draws them: another fraction for every batch element
        fractions = np.random.default_rng(1).uniform(size=(BATCH, 1, QUANTILES)).astype(np.float32)
    full = np.broadcast_to(fractions, predicted.shape)
    kappas = np.array([0, 0.5, 1, 3], np.float32)

    def total(predicted, kappa):
        loss = quantile.quantile_huber_loss(
            predicted, target, fractions, kappa=kappa, over_predicted=over_predicted, target_masses=masses
        )
        return loss.sum(), loss

    evaluate = jax.jit(jax.vmap(jax.value_and_grad(total, has_aux=True), in_axes=(None, 0)))
    (_, loss), gradient = evaluate(predicted, kappas)
    for i, kappa in enumerate(kappas):
        expected_loss, expected_gradient = slow_loss_and_gradient(
            predicted, target, full, kappa, over_predicted, masses
        )
        np.testing.assert_allclose(loss[i], expected_loss, rtol=1e-5)
        np.testing.assert_allclose(gradient[i], expected_gradient, rtol=1e-5, atol=1e-7)


def test_the_slow_reference_has_the_gradient_of_its_loss():
    # Finite differences, away from the kink of kappa = 0; so the test above checks a gradient, not two equal mistakes.
    rng = np.random.default_rng(2)
    predicted, target = rng.normal(size=(1, 1, 3)), rng.normal(size=(1, 5))
    fractions, step = np.array([[[0.1, 0.5, 0.7]]]), 1e-6
    for kappa, over_predicted in itertools.product([0, 0.5, 1, 3], ["mean", "sum"]):
        _, gradient = slow_loss_and_gradient(predicted, target, fractions, kappa, over_predicted)
        for m in range(3):
            shift = step * np.eye(3)[m]
            above, _ = slow_loss_and_gradient(predicted + shift, target, fractions, kappa, over_predicted)
            below, _ = slow_loss_and_gradient(predicted - shift, target, fractions, kappa, over_predicted)
            assert gradient[0, 0, m] == pytest.approx((above - below).item() / (2 * step), abs=1e-6)


def test_gradient_agrees_with_automatic_differentiation_for_any_cotangent(branch):
    predicted, target = example(3)
    fractions, kappa = quantile.midpoints(QUANTILES), 0.7
    weights = np.random.default_rng(4).normal(size=(BATCH, MEMBERS)).astype(np.float32)

    def fused(predicted):
        loss = quantile.quantile_huber_loss(predicted, target, fractions, kappa=kappa, over_predicted="sum")
        return (weights * loss).sum()

    def naive(predicted):
        u = target[:, None, None, :] - predicted[..., None]
        huber = jnp.where(jnp.abs(u) <= kappa, 0.5 * u**2, kappa * (jnp.abs(u) - 0.5 * kappa))
        weighted = jnp.abs(fractions[:, None] - (u < 0)) * huber / kappa
        return (weights * weighted.mean(-1).sum(-1)).sum()

    (value, gradient), (expected_value, expected_gradient) = (
        jit(jax.value_and_grad(function))(predicted) for function in (fused, naive)
    )
    np.testing.assert_allclose(value, expected_value, rtol=2e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)


def test_targets_and_fractions_are_constants_of_the_loss(branch):
    predicted, target = example()

    def loss(predicted, target, fractions, kappa):
        return quantile.quantile_huber_loss(predicted, target, fractions, kappa=kappa, over_predicted="mean").sum()

    gradients = jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(predicted, target, quantile.midpoints(QUANTILES), 1.0)
    assert np.abs(gradients[0]).max() > 0.01
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0, 3.0])
def test_agrees_with_rlax(kappa):
    # rlax sums over the predicted atoms and does not divide by kappa.
    predicted, target = example(5)
    fractions = quantile.midpoints(QUANTILES)
    ours = quantile.quantile_huber_loss(predicted, target, fractions, kappa=kappa, over_predicted="sum")
    per_member = jax.vmap(lambda p, t: rlax.quantile_regression_loss(p, fractions, t, kappa), in_axes=(0, None))
    theirs = jax.jit(jax.vmap(per_member))(predicted, target)
    np.testing.assert_allclose(ours * (kappa or 1), theirs, rtol=1e-5)


def test_hand_worked_loss_of_one_network(branch):
    # u = .5, 2.5 and -.5, 1.5; Huber .125, 2 and .125, 1; weights .25, .25 and .25, .75; mean of four products.
    predicted, target = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 2.5]])

    def loss(predicted):
        return quantile.quantile_huber_loss(predicted, target, jnp.array([0.25, 0.75]), over_predicted="mean").sum()

    value, gradient = jit(jax.value_and_grad(loss))(predicted)
    assert float(value) == 0.328125
    np.testing.assert_array_equal(gradient, [[-0.09375, -0.15625]])


def test_hand_worked_tqc_target_and_loss(branch):
    # The specification's numbers: two critics, three quantiles, d = 1, gamma = .9, alpha = .2, log pi = -1.5.
    next_atoms = jnp.array([[[1.0, 5.0, 3.0], [4.0, 8.0, 6.0]]])
    target = 1 + 0.9 * (truncate(next_atoms, 1) + 0.2 * 1.5)
    np.testing.assert_allclose(target, [[2.17, 3.97, 4.87, 5.77]], rtol=1e-6)

    def loss(predicted):
        fractions = quantile.midpoints(3)
        return quantile.quantile_huber_loss(predicted, target, fractions, over_predicted="mean").mean()

    value, gradient = jit(jax.value_and_grad(loss))(jnp.array([[[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]]))
    assert float(value) == pytest.approx(0.5154267361, rel=1e-6)
    expected = [[-0.0277777778, -0.0660416667, -0.0577777778], [-0.0277777778, -0.0445833333, -0.0119444444]]
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)


def test_one_quantile_is_half_the_huber_loss():
    predicted, target = np.float32([[0.0], [2.0]]), np.float32([[0.5, -3.0], [2.0, 1.0]])
    loss = quantile.quantile_huber_loss(predicted, target, quantile.midpoints(1), over_predicted="sum")
    np.testing.assert_allclose(loss, [0.5 * (0.125 + 2.5) / 2, 0.5 * (0 + 0.5) / 2])


@settings(deadline=None)
@given(shift=st.floats(-10, 10), scale=st.floats(0.1, 10), seed=st.integers(0, 99))
def test_units_of_return_cancel(shift, scale, seed):
    # loss(c z + s, c y + s; c kappa) = c loss(z, y; kappa): what dividing by kappa buys.
    predicted, target = example(seed)
    moved = mean_loss(scale * predicted + shift, scale * target + shift, 0.5 * scale)
    np.testing.assert_allclose(moved, scale * mean_loss(predicted, target, 0.5), rtol=1e-4)


@jax.jit
def mean_loss(predicted, target, kappa):
    fractions = quantile.midpoints(QUANTILES)
    return quantile.quantile_huber_loss(predicted, target, fractions, kappa=kappa, over_predicted="mean")


def test_a_nan_stays_visible_in_its_own_row(branch):
    predicted, target = example()
    target[1, 2] = NAN
    loss = jit(mean_loss.__wrapped__)(predicted, target, 1.0)
    np.testing.assert_array_equal(np.isnan(loss), [[False] * MEMBERS, [True] * MEMBERS, [False] * MEMBERS])


def test_midpoints_are_the_odd_parts_of_twice_their_number():
    np.testing.assert_allclose(quantile.midpoints(4), [1 / 8, 3 / 8, 5 / 8, 7 / 8], rtol=1e-7)


def test_loss_rejects_bad_arguments():
    predicted, target = example()
    fractions = quantile.midpoints(QUANTILES)
    with pytest.raises(ValueError, match="over_predicted is 'max'; it must be 'mean' or 'sum'"):
        quantile.quantile_huber_loss(predicted, target, fractions, over_predicted="max")
    with pytest.raises(AssertionError):  # another batch size
        quantile.quantile_huber_loss(predicted, target[:2], fractions, over_predicted="mean")
    with pytest.raises(AssertionError):  # targets for every member
        quantile.quantile_huber_loss(predicted, predicted, fractions, over_predicted="mean")
    with pytest.raises(ValueError, match="num_quantiles is 0; it must be at least 1"):
        quantile.midpoints(0)
    with pytest.raises(ValueError, match="num_quantiles is 2147483647; it must be at least 1 and at most 1048576"):
        quantile.midpoints(2**31 - 1)  # before gigabytes are filled


# -- sorting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 13))
def test_sorting_network_sorts_all_zeros_and_ones(count):
    # Knuth's 0-1 principle: a network that sorts every such row sorts every row of that length.
    rows = np.array(list(itertools.product([0.0, 1.0], repeat=count)), np.float32)
    np.testing.assert_array_equal(jax.jit(quantile._sorting_network)(rows), np.sort(rows))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 31, 32, 33, 63, 64, 65, 100, 125, 127, 128, 129, 130])
def test_sort_atoms_agrees_with_sort(count):
    rng = np.random.default_rng(count)
    rows = rng.normal(size=(7, count)).astype(np.float32)
    rows[1] = np.round(rows[1])  # many duplicates
    rows[2] = rows[2, 0]
    rows[3, rng.integers(count, size=1 + count // 4)] = INFINITY  # must not be mistaken for the padding
    rows[4, rng.integers(count, size=1 + count // 4)] = -INFINITY
    rows[5] = np.sort(rows[5])[::-1]
    rows[6] = np.arange(count) < count // 2
    np.testing.assert_array_equal(jax.jit(quantile.sort_atoms)(rows), np.sort(rows))


def test_sort_atoms_under_vmap(branch):
    rows = np.random.default_rng(0).normal(size=(3, 4, 11)).astype(np.float32)
    np.testing.assert_array_equal(jit(jax.vmap(quantile.sort_atoms))(rows), np.sort(rows))


@pytest.mark.parametrize("position", [0, 3, 5])
def test_sort_atoms_keeps_a_nan_visible_in_its_row(branch, position):
    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    rows[0, position] = NAN
    ordered = jit(quantile.sort_atoms)(rows)
    assert np.isnan(ordered[0, -1])
    assert np.isnan(ordered[0]).all() or branch == "default"
    np.testing.assert_array_equal(ordered[1], rows[1])


# -- truncation -------------------------------------------------------------------------------------------------------


def test_truncation_is_over_the_pool_and_not_per_critic(branch):
    atoms = jnp.array([[[1.0, 5.0, 3.0], [4.0, 8.0, 6.0]]])
    kept = truncate(atoms, 1)
    np.testing.assert_array_equal(kept, [[1, 3, 4, 5]])  # one from each critic would leave [1, 3, 4, 6]
    np.testing.assert_array_equal(truncate(atoms, 0), [[1, 3, 4, 5, 6, 8]])
    np.testing.assert_array_equal(truncate(atoms, 2), [[1, 3]])


def test_truncated_mean_of_uniform_atoms():
    # Atoms uniform on [0, 1]: without the d largest of 25 midpoints the mean is (25 - d) / 50.
    atoms = quantile.midpoints(25).reshape(1, 1, 25)
    dropped = (0, 1, 2, 3, 5, 10)
    means = jax.jit(lambda atoms: [quantile.truncate_pooled(atoms, d).mean() for d in dropped])(atoms)
    np.testing.assert_allclose(means, [0.50, 0.48, 0.46, 0.44, 0.40, 0.30], rtol=1e-6)


def test_truncation_ignores_the_order_of_critics_and_atoms_and_moves_with_a_shift(branch):
    rng = np.random.default_rng(0)
    atoms = rng.integers(-20, 20, (4, 3, 5)).astype(np.float32)  # integers: exact under the shift, with duplicates
    kept = truncate(atoms, 2)
    np.testing.assert_array_equal(kept, np.sort(atoms.reshape(4, 15))[:, :9])
    shuffled = rng.permuted(atoms.reshape(4, 15), axis=1).reshape(4, 3, 5)
    np.testing.assert_array_equal(truncate(shuffled, 2), kept)
    np.testing.assert_array_equal(truncate(atoms + 7, 2), kept + 7)


def test_gradient_of_the_kept_atoms_reaches_them_alone(branch):
    atoms = jnp.array([[[1.0, 5.0, 3.0], [4.0, 8.0, 6.0]]])
    gradient = jit(jax.grad(lambda atoms: quantile.truncate_pooled(atoms, 1).sum()))(atoms)
    np.testing.assert_array_equal(gradient, [[[1, 1, 1], [1, 0, 0]]])


@pytest.mark.parametrize("dropped", [-1, 3, 4])
def test_truncation_rejects_dropping_everything_or_less_than_nothing(dropped):
    with pytest.raises(ValueError, match=rf"dropped_per_critic is {dropped}; it must be in \[0, 2\] for 3 quantiles"):
        quantile.truncate_pooled(jnp.zeros((1, 2, 3)), dropped)


# -- what a set of atoms says -----------------------------------------------------------------------------------------


def test_crossing_count_hand_worked():
    quantiles = jnp.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    counts = quantile.crossing_count(quantiles)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, [0, 0, 2, 1])

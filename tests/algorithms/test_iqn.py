"""IQN's loss by the spec's numbers, which fractions go where, and whole updates against loops in numpy."""

import by_hand
import implicit_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implicit_by_hand import EMBEDDING, HEAD, TORSO

from jaxrl_dist.algorithms.value_based import iqn
from jaxrl_dist.distributional import quantile
from jaxrl_dist.learning import draws

SIZES = {"num_fractions": 4, "num_target_fractions": 5, "num_policy_fractions": 3, "cosines": 6, "kappa": 0.5}

# -- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kappa", "loss"), [(0.0, 1.375), (1.0, 0.8541667), (2.0, 0.5625)])
def test_loss_at_the_midpoints_is_that_of_qr_dqn(kappa, loss):
    quantiles, target = jnp.array([[0.0, 1, 2, 4]] * 3), jnp.array([[0.5, 1.5, 3]] * 3)
    fractions = jnp.broadcast_to(quantile.midpoints(4), (3, 4))
    assert iqn.loss_of(quantiles, fractions, target, kappa) == pytest.approx(loss, rel=1e-6)


def test_each_quantile_is_weighed_by_its_own_fraction():
    fractions = jnp.array([[0.1, 0.9], [0.9, 0.1]])
    gradient = jax.grad(iqn.loss_of)
    above = gradient(jnp.zeros((2, 2)), fractions, jnp.full((2, 3), 5.0), 0.0)
    below = gradient(jnp.zeros((2, 2)), fractions, jnp.full((2, 3), -5.0), 0.0)
    np.testing.assert_allclose(above, [[-0.05, -0.45], [-0.45, -0.05]], rtol=1e-6)
    np.testing.assert_allclose(below, [[0.45, 0.05], [0.05, 0.45]], rtol=1e-6)


def test_target_by_hand():
    following = jnp.array([[-1.0, 0, 2, 5, 9]] * 2)
    target = iqn.target_quantiles(by_hand.steps_of([1.0, 1.0], [0.5, 0.0]), following)
    np.testing.assert_array_equal(target, [[0.5, 1, 2, 3.5, 5.5], [1, 1, 1, 1, 1]])


@jax.jit
def slope_of_a_line(key, start, rise, kappa):
    """Gradient of the loss per fraction in F(tau) = start + rise tau on samples that are uniform on [0, 2]."""
    fraction_key, target_key = jax.random.split(key)
    fractions = jax.random.uniform(fraction_key, (40_000, 4))
    samples = jax.random.uniform(target_key, (40_000, 4), maxval=2.0)

    def loss(start, rise):
        return iqn.loss_of(start + rise * fractions, fractions, samples, kappa) / 4

    return jnp.stack(jax.grad(loss, argnums=(0, 1))(start, rise))


def test_the_true_quantile_function_is_where_the_gradient_vanishes():
    key = jax.random.key(0)
    np.testing.assert_allclose(slope_of_a_line(key, 0.0, 2.0, 0.0), [0, 0], atol=5e-3)
    # Off by a shift s or a factor: s / 2 and s / 4 (the mean fraction), and for a rise of 1.8 -.1 / 2 and -.1 / 3.
    key = jax.random.key(1)
    np.testing.assert_allclose(slope_of_a_line(key, 0.2, 2.0, 0.0), [0.1 - 0.005, 0.05 - 0.005], atol=6e-3)
    key = jax.random.key(2)
    np.testing.assert_allclose(slope_of_a_line(key, 0.0, 1.8, 0.0), [-0.05, -0.1 / 3], atol=5e-3)


def test_a_coin_tossed_for_ever_keeps_its_law():
    """Rewards of 0 or 1 with discount 1/2 sum up to a uniform return on [0, 2]: F(tau) = 2 tau is a fixed point."""

    def loss(shift, key):
        online_key, target_key, coin_key = jax.random.split(key, 3)
        fractions, following = (jax.random.uniform(k, (40_000, 4)) for k in (online_key, target_key))
        reward = jax.random.bernoulli(coin_key, 0.5, (40_000,)).astype(jnp.float32)
        target = iqn.target_quantiles(by_hand.steps_of(reward, jnp.full(40_000, 0.5)), 2 * following)
        return iqn.loss_of(2 * fractions + shift, fractions, target, 0.0) / 4

    slopes = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(jnp.array([0.0, 0.2]), jax.random.key(0))
    assert slopes[0] == pytest.approx(0, abs=6e-3)
    assert slopes[1] == pytest.approx(0.1, abs=0.012)


def test_no_gradient_flows_through_target_and_fractions():
    def loss(quantiles, fractions, following):
        target = iqn.target_quantiles(by_hand.steps_of([1.0], [0.9]), following)
        return iqn.loss_of(quantiles, fractions, target, 1.0)

    arguments = jnp.array([[0.0, 3.0]]), jnp.array([[0.3, 0.4]]), jnp.array([[-1.0, 0, 2]])
    of_quantiles, of_fractions, of_next = jax.grad(loss, argnums=(0, 1, 2))(*arguments)
    assert jnp.abs(of_quantiles).min() > 0
    np.testing.assert_array_equal(of_fractions, jnp.zeros((1, 2)))
    np.testing.assert_array_equal(of_next, jnp.zeros((1, 3)))


# -- fractions --------------------------------------------------------------------------------------------------------


def drawn_fractions(monkeypatch, iterations=2, **settings) -> dict[str, list[np.ndarray]]:
    """What an agent draws in some iterations of two steps and two updates: fractions of acting, choosing and losses."""
    seen = {"acting": [], "choosing": [], "loss": []}
    distort, loss_of = iqn.risks.distort, iqn.loss_of

    def record(name, values):
        jax.debug.callback(lambda x: seen[name].append(np.array(x)), values, ordered=True)

    def seen_distort(risk, fractions):
        record("acting" if fractions.shape[0] == 3 else "choosing", fractions)
        return distort(risk, fractions)

    def seen_loss(quantiles, fractions, target, kappa):
        record("loss", fractions)
        return loss_of(quantiles, fractions, target, kappa)

    settings = (
        by_hand.TINY_VALUE | SIZES | {"num_envs": 3, "steps_per_iteration": 2, "updates_per_iteration": 2} | settings
    )
    agent, _ = by_hand.agent_on(iqn, by_hand.Choices(), **settings)
    state = by_hand.quick(agent.init)(jax.random.key(5))
    monkeypatch.setattr(iqn.risks, "distort", seen_distort)
    monkeypatch.setattr(iqn, "loss_of", seen_loss)
    step = by_hand.quick(agent.step)
    for _ in range(iterations):
        state, _ = step(state)
    jax.block_until_ready(state.env_steps)
    jax.effects_barrier()
    monkeypatch.undo()
    return seen


def test_every_fraction_is_drawn_for_itself(monkeypatch):
    """For every environment and time, every transition and update, and each of the three uses in an update."""
    seen = drawn_fractions(monkeypatch)
    assert [x.shape for x in seen["acting"]] == [(3, 3)] * 4
    assert [x.shape for x in seen["choosing"]] == [(5, 3)] * 4
    assert [x.shape for x in seen["loss"]] == [(5, 4)] * 4
    everything = np.concatenate([x.ravel() for arrays in seen.values() for x in arrays])
    assert len(np.unique(everything)) == len(everything)
    assert everything.min() >= 0
    assert everything.max() < 1
    # How many fractions choose does not change which ones are learned at.
    more = drawn_fractions(monkeypatch, num_policy_fractions=7)
    assert more["choosing"][0].shape == (5, 7)
    np.testing.assert_array_equal(more["loss"], seen["loss"])


def network_of(parameters) -> dict[str, dict]:
    return {path: by_hand.network(parameters, path) for path in (TORSO, EMBEDDING, HEAD)}


def test_risk_distorts_what_acts_but_not_what_is_predicted():
    agent, config = by_hand.agent_on(iqn, by_hand.Choices(), **by_hand.TINY_VALUE, **SIZES, risk="cvar:0.3")
    state = by_hand.quick(agent.init)(jax.random.key(1))
    # Larger weights, so that quantiles differ much and actions with them.
    network = jax.tree.map(lambda x: 4 * x, state.learner.network.parameters)
    state = state._replace(learner=by_hand.changed(state.learner, network=network))
    observation = np.random.default_rng(0).normal(size=(200, 3))
    middles = np.tile((np.arange(3) + 0.5) / 3, (200, 1))
    averse, _ = implicit_by_hand.forward(network_of(network), observation, 0.3 * middles)
    plain, _ = implicit_by_hand.forward(network_of(network), observation, middles)
    inputs = jnp.asarray(observation, jnp.float32)
    action = agent.policy.act(state, inputs, (), jax.random.key(0))[0]
    np.testing.assert_array_equal(action, averse.mean(-1).argmax(-1))
    assert (np.asarray(action) != plain.mean(-1).argmax(-1)).any()
    law = agent.claim.law(state, inputs, action)
    np.testing.assert_allclose(law.atoms, plain[np.arange(200), action], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(law.masses, np.full((200, 3), 1 / 3), rtol=1e-6)
    assert config.risk == "cvar:0.3"


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_update(learner, batch: dict, draws: tuple, config, distort, value) -> dict:
    """One update as the paper writes it, all gradients by hand; `draws` are the fractions tau, tau' and tau~."""
    fractions, target_fractions, policy_fractions = draws
    nets, target_nets = network_of(learner.network.parameters), network_of(learner.target_network)
    quantiles, tape = implicit_by_hand.forward(nets, batch["observation"], fractions)
    choosing, _ = implicit_by_hand.forward(target_nets, batch["next_observation"], distort(policy_fractions))
    following, _ = implicit_by_hand.forward(target_nets, batch["next_observation"], target_fractions)
    slope, losses, targets, values, differs = np.zeros_like(quantiles), [], [], [], []
    for b, action in enumerate(batch["action"].astype(int)):
        best = np.argmax([value(row) for row in choosing[b]])
        differs.append(best != np.argmax(following[b].mean(-1)))
        target = batch["reward"][b] + batch["discount"][b] * following[b, best]
        loss, row = implicit_by_hand.quantile_huber(quantiles[b, action], fractions[b], target, config.kappa)
        slope[b, action] = row / len(slope)
        losses.append(loss)
        targets.append(target.mean())
        values.append(quantiles[b, action].mean())
    gradient = implicit_by_hand.backward(nets, tape, slope)
    adams = {path: by_hand.Adam(learner.network.optimizer, path, config.adam_epsilon) for path in nets}
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in nets}
    due = (int(learner.updates) + 1) % config.target_period == 0
    metrics = {"loss": np.mean(losses), "value": np.mean(values), "target": np.mean(targets)}
    metrics["gradient_norm"] = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    return {
        "network": nets, "target_network": nets if due else target_nets, "adams": adams, "metrics": metrics,
        "differs": np.any(differs),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "distort", "value"),
    [
        ({"risk": "neutral"}, lambda tau: tau, np.mean),
        ({"risk": "cvar:0.3", "num_steps": 3}, lambda tau: 0.3 * tau, np.mean),
        ({"risk": "mean-variance:0.5"}, lambda tau: tau, lambda z: z.mean() - 0.5 * z.var()),
    ],
    ids=["neutral", "averse_three_steps", "mean_variance"],
)
def test_updates_equal_loops_in_numpy(settings, distort, value):
    agent, config = by_hand.agent_on(iqn, by_hand.Choices(), **by_hand.TINY_VALUE, **SIZES, **settings)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    # Larger weights, so that which fractions are drawn decides which action is best.
    network = jax.tree.map(lambda x: 3 * x, state.learner.network.parameters)
    state = state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))
    differs, ends = [], []
    for _ in range(7):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        _, sample_key, fraction_key = jax.random.split(key, 3)
        drawn = tuple(
            np.float64(draws.uniform(key, (config.batch_size, count)))
            for key, count in zip(jax.random.split(fraction_key, 3), (4, 5, 3), strict=True)
        )
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        expected = slow_update(before, batch, drawn, config, distort, value)
        for path, adam in expected["adams"].items():
            by_hand.assert_network_is(state.learner.network.parameters, expected["network"][path], path)
            by_hand.assert_network_is(state.learner.target_network, expected["target_network"][path], path)
            by_hand.assert_adam_is(state.learner.network.optimizer, adam, path)
        for name, number in expected["metrics"].items():
            np.testing.assert_allclose(metrics[name].total, number, rtol=2e-3, atol=1e-5, err_msg=name)
        differs.append(expected["differs"])
        ends.append((batch["discount"] == 0).mean())
    assert state.learner.updates == 7
    assert any(differs)  # the fractions that choose are not those of the target
    assert 0 < np.mean(ends) < 1

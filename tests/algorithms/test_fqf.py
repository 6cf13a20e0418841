"""FQF's fractions by the spec's hand-worked numbers, which loss reaches what, and whole updates against numpy loops."""

import dataclasses

import by_hand
import implicit_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist.algorithms.value_based import fqf, qr_dqn
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law

SIZES = {"num_fractions": 4, "cosines": 6, "kappa": 0.5, "fraction_learning_rate": 1e-3}


def linear(fractions):
    return 2 * fractions


def exponential(fractions):
    """Quantile function of the exponential law of mean 1."""
    return -jnp.log1p(-fractions)


def staircase_error(masses: np.ndarray, integral) -> float:
    """Wasserstein-1 distance to an increasing F with integral G: sum of G(low) + G(high) - 2 G(mid)."""
    edges = np.concatenate([[0], np.cumsum(masses)])
    low, high = edges[:-1], edges[1:]
    return float(np.sum(integral(low) + integral(high) - 2 * integral((low + high) / 2)))


def integral_of_linear(w):
    return w**2


def integral_of_exponential(w):
    rest = np.maximum(1 - w, 1e-300)
    return rest * np.log(rest) + w


CASES = [
    (linear, integral_of_linear, [-0.1, -0.1, 0.3], 0.15, 1.0),
    (exponential, integral_of_exponential, [-0.089856, -0.248461, 0.405465], 0.260929, 0.931469),
]
MASSES = np.array([0.2, 0.3, 0.4, 0.1])

# -- the staircase ----------------------------------------------------------------------------------------------------


def test_even_logits_give_even_steps():
    steps = fqf.staircase(jnp.full((2, 4), 3.0))
    np.testing.assert_allclose(steps.masses, [[0.25] * 4] * 2, rtol=1e-6)
    np.testing.assert_allclose(steps.edges, [[0.25, 0.5, 0.75]] * 2, rtol=1e-6)
    np.testing.assert_allclose(steps.middles, [[0.125, 0.375, 0.625, 0.875]] * 2, rtol=1e-6)
    for count, entropy in ((4, 1.386294), (32, 3.465736)):
        steps, nothing = fqf.staircase(jnp.zeros((3, count))), jnp.zeros((3, count))
        assert fqf.fraction_loss(steps, nothing, nothing[:, 1:], 0.5) == pytest.approx(-0.5 * entropy, rel=1e-6)


def test_uneven_steps_by_hand():
    steps = fqf.staircase(jnp.log(jnp.array([MASSES])))
    np.testing.assert_allclose(steps.edges, [[0.2, 0.5, 0.9]], rtol=1e-5)
    np.testing.assert_allclose(steps.middles, [[0.1, 0.35, 0.7, 0.95]], rtol=1e-5)


def test_fractions_increase_from_0_to_1():
    steps = jax.tree.map(np.float64, fqf.staircase(jax.random.normal(jax.random.key(0), (200, 32))))
    np.testing.assert_allclose(steps.masses.sum(-1), 1, atol=1e-6)
    edges = np.concatenate([np.zeros((200, 1)), steps.edges, np.ones((200, 1))], axis=1)
    assert (np.diff(edges) > 0).all()
    np.testing.assert_allclose(steps.middles, (edges[:, 1:] + edges[:, :-1]) / 2, atol=1e-6)


@pytest.mark.parametrize(("function", "integral", "slopes", "error", "mean"), CASES, ids=["linear", "exponential"])
def test_gradient_of_the_staircase_error(function, integral, slopes, error, mean):
    logits = jnp.log(jnp.array([MASSES], jnp.float32))
    steps = fqf.staircase(logits)
    assert staircase_error(MASSES, integral) == pytest.approx(error, rel=1e-5)
    values = function(steps.middles)
    assert law.mean(Law(values, steps.masses)) == pytest.approx(mean, rel=1e-5)
    if function is linear:
        assert values.mean() == pytest.approx(1.05)  # what forgetting the masses would give

    def loss(steps):
        return fqf.fraction_loss(steps, function(steps.middles), function(steps.edges), 0.0)

    of_steps = jax.grad(loss)(steps)
    np.testing.assert_allclose(of_steps.edges, [slopes], atol=1e-5)
    np.testing.assert_array_equal(of_steps.middles, np.zeros((1, 4)))  # values are constants, in units of return
    of_logits = jax.grad(lambda logits: loss(fqf.staircase(logits)))(logits)[0]
    for moved in range(4):
        errors = []
        for change in (1e-5, -1e-5):
            shifted = np.log(MASSES)
            shifted[moved] += change
            errors.append(staircase_error(np.exp(shifted) / np.exp(shifted).sum(), integral))
        assert of_logits[moved] == pytest.approx((errors[0] - errors[1]) / 2e-5, abs=1e-4)


@pytest.mark.parametrize(
    ("function", "integral", "edges", "error"),
    [
        (exponential, integral_of_exponential, [0.4, 0.7, 0.9], np.log(1.25)),  # steps of 4 : 3 : 2 : 1
        (linear, integral_of_linear, [0.25, 0.5, 0.75], 0.125),
    ],
    ids=["exponential", "linear"],
)
def test_descending_finds_the_best_staircase(function, integral, edges, error):
    def loss(logits):
        steps = fqf.staircase(logits)
        return fqf.fraction_loss(steps, function(steps.middles), function(steps.edges), 0.0)

    def descend(logits, _):
        return logits - 0.1 * jax.grad(loss)(logits), None

    start = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    logits = jax.jit(lambda start: jax.lax.scan(descend, start, length=2000)[0])(start)
    steps = fqf.staircase(logits)
    np.testing.assert_allclose(steps.edges, [edges], atol=5e-3)
    assert staircase_error(np.float64(steps.masses[0]), integral) == pytest.approx(error, abs=1e-4)
    uniform = staircase_error(np.full(4, 0.25), integral)
    assert uniform == pytest.approx(0.258848 if function is exponential else error, abs=2e-6)


def test_entropy_pulls_the_fractions_apart_evenly():
    logits, nothing = jnp.array([[2.0, 0, 0, -1], [0, 0, 0, 0]]), jnp.zeros((2, 4))

    def loss(logits):
        return fqf.fraction_loss(fqf.staircase(logits), nothing, nothing[:, 1:], 0.3)

    gradient = jax.grad(loss)(logits)
    assert gradient[0, 0] > 0 > gradient[0, 3]  # descending lowers the largest and raises the smallest
    np.testing.assert_allclose(gradient[1], np.zeros(4), atol=1e-7)
    # Also where one fraction has all of the mass that float32 can tell.
    assert np.isfinite(jax.grad(loss)(jnp.array([[200.0, 0, 0, -1], [120, 0, 0, 0]]))).all()


# -- the quantile loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 1.0, 2.0])
def test_even_fractions_are_qr_dqn(kappa):
    quantiles, target = jnp.array([[0.0, 1, 2, 4]]), jnp.array([[0.5, 1.5, 3]])
    middles = fqf.staircase(jnp.zeros((1, 4))).middles
    expected = jax.value_and_grad(qr_dqn.loss_of)(quantiles, target, kappa)
    actual = jax.value_and_grad(fqf.loss_of)(quantiles, middles, target, None, kappa)
    assert actual[0] == pytest.approx({0.0: 1.375, 1.0: 0.8541667, 2.0: 0.5625}[kappa], rel=1e-6)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), actual, expected)


def test_target_by_hand():
    target = fqf.target_quantiles(by_hand.steps_of([1.0, 1.0], [0.5, 0.0]), jnp.array([[-1.0, 0, 2]] * 2))
    np.testing.assert_array_equal(target, [[0.5, 1, 2], [1, 1, 1]])


# -- which loss reaches what ------------------------------------------------------------------------------------------


def test_each_loss_reaches_its_own_parameters():
    """The entropy's weight moves the proposal and nothing else; the Huber threshold everything but the proposal."""
    env = by_hand.Choices()
    settings = by_hand.TINY_VALUE | SIZES | {"fraction_learning_rate": 0.1}
    plain = dataclasses.replace(fqf.Config(), **settings)
    state = by_hand.quick(fqf.make_agent(plain, env, env.default_params).init)(jax.random.key(0))

    def learned(state, values):
        entropy_weight, kappa, learning_rate, fraction_learning_rate = values
        config = dataclasses.replace(
            plain, entropy_weight=entropy_weight, kappa=kappa, learning_rate=learning_rate,
            fraction_learning_rate=fraction_learning_rate,
        )  # fmt: skip
        return fqf.make_agent(config, env, env.default_params).step(state)[0].learner.network.parameters

    after = by_hand.quick(learned)
    values = [(0.0, 0.5, 0.02, 0.1), (5.0, 0.5, 0.02, 0.1), (0.0, 0.1, 0.02, 0.1), (0, 0.5, 0, 0.1), (0, 0.5, 0.02, 0)]
    reference, entropy, kappa, frozen, fixed = (after(by_hand.with_fresh_keys(state), jnp.array(row)) for row in values)

    def same(one, two, part):
        leaves = zip(jax.tree.leaves(one[part]), jax.tree.leaves(two[part]), strict=True)
        return [np.array_equal(a, b) for a, b in leaves]

    for part in ("torso", "head"):
        assert all(same(reference, entropy, part))
        assert not any(same(reference, kappa, part))
        assert all(same(state.learner.network.parameters, frozen, part))
    assert not any(same(reference, entropy, "proposal"))
    assert all(same(reference, kappa, "proposal"))
    assert all(same(state.learner.network.parameters, fixed, "proposal"))
    assert not any(same(state.learner.network.parameters, reference, "proposal"))


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def network_of(parameters) -> dict[str, dict]:
    parameters = by_hand.weights(parameters)
    return {
        implicit_by_hand.TORSO: by_hand.network(parameters["torso"]),
        implicit_by_hand.EMBEDDING: by_hand.network(parameters["head"], "embedding/dense"),
        implicit_by_hand.HEAD: by_hand.network(parameters["head"], "advantage"),
        "proposal": by_hand.network(parameters["proposal"], "layers"),
    }


def slow_staircase(nets: dict, observation: np.ndarray):
    """Masses, middles and inner edges of every row, and the features they come from."""
    features = np.maximum(by_hand.forward(nets[implicit_by_hand.TORSO], 0, observation)[-1], 0)
    masses = by_hand.softmax(by_hand.forward(nets["proposal"], 0, features)[-1])
    edges = np.zeros((len(masses), masses.shape[1] + 1))
    for i in range(masses.shape[1]):
        edges[:, i + 1] = edges[:, i] + masses[:, i]
    return masses, (edges[:, 1:] + edges[:, :-1]) / 2, edges[:, 1:-1], features


class RMSProp:
    """Centred RMSProp (Graves 2013), continued from the state of optax's."""

    def __init__(self, state):
        state = state.inner_states["rmsprop"].inner_state
        self.mean, self.square = (
            by_hand.network(optax.tree_utils.tree_get(state, name)["proposal"], "layers") for name in ("mu", "nu")
        )

    def step(self, parameters: dict, gradient: dict, learning_rate: float) -> dict:
        updated = {}
        for name, slope in gradient.items():
            self.mean[name] = 0.95 * self.mean[name] + 0.05 * slope
            self.square[name] = 0.95 * self.square[name] + 0.05 * slope**2
            spread = np.sqrt(self.square[name] - self.mean[name] ** 2 + 1e-5)
            updated[name] = parameters[name] - learning_rate * slope / spread
        return updated


def adam_of(state, part: str, path: str, epsilon: float) -> by_hand.Adam:
    adam = state.inner_states["adam"].inner_state
    count, mu, nu = (optax.tree_utils.tree_get(adam, name) for name in ("count", "mu", "nu"))
    return by_hand.Adam(optax.ScaleByAdamState(count, mu[part], nu[part]), path, epsilon)


ADAMS = {
    implicit_by_hand.TORSO: ("torso", "mlp"),
    implicit_by_hand.EMBEDDING: ("head", "embedding/dense"),
    implicit_by_hand.HEAD: ("head", "advantage"),
}


def slow_update(learner, batch: dict, config) -> dict:
    """One update as the paper writes it, all gradients by hand: both losses, Adam and RMSProp."""
    nets, target_nets = network_of(learner.network.parameters), network_of(learner.target_network)
    size = len(batch["reward"])
    next_masses, next_middles, _, _ = slow_staircase(target_nets, batch["next_observation"])
    following, _ = implicit_by_hand.forward(target_nets, batch["next_observation"], next_middles)
    masses, middles, edges, features = slow_staircase(nets, batch["observation"])
    quantiles, tape = implicit_by_hand.forward(nets, batch["observation"], middles)
    at_edges, _ = implicit_by_hand.forward(nets, batch["observation"], edges)

    slope, at_logits = np.zeros_like(quantiles), np.zeros_like(masses)
    losses, targets, values, differs = [], [], [], []
    for b, action in enumerate(batch["action"].astype(int)):
        q_values = [sum(next_masses[b, j] * following[b, a, j] for j in range(4)) for a in range(3)]
        best = int(np.argmax(q_values))
        differs.append(best != np.argmax(following[b].mean(-1)))
        target = batch["reward"][b] + batch["discount"][b] * following[b, best]
        weights = next_masses[b] if config.target_weights == "mass" else None
        loss, row = implicit_by_hand.quantile_huber(quantiles[b, action], middles[b], target, config.kappa, weights)
        slope[b, action] = row / size
        losses.append(loss)
        targets.append(next_masses[b] @ target)
        values.append(masses[b] @ quantiles[b, action])
        # The slope of the Wasserstein-1 error in each edge, of all edges in the masses below them, of the entropy.
        at_masses = config.entropy_weight * (np.log(masses[b]) + 1)
        for i in range(3):
            error = 2 * at_edges[b, action, i] - quantiles[b, action, i] - quantiles[b, action, i + 1]
            at_masses[: i + 1] += error
        at_logits[b] = masses[b] * (at_masses - masses[b] @ at_masses) / size
    gradient = implicit_by_hand.backward(nets, tape, slope)
    gradient["proposal"] = {
        "kernel_0": (features.T @ at_logits)[None], "bias_0": at_logits.sum(0)[None]
    }  # fmt: skip
    adams = {path: adam_of(learner.network.optimizer, *place, config.adam_epsilon) for path, place in ADAMS.items()}
    updated = {path: adam.step(nets[path], gradient[path], config.learning_rate) for path, adam in adams.items()}
    rmsprop = RMSProp(learner.network.optimizer)
    updated["proposal"] = rmsprop.step(nets["proposal"], gradient["proposal"], config.fraction_learning_rate)
    due = (int(learner.updates) + 1) % config.target_period == 0
    metrics = {
        "loss": np.mean(losses), "value": np.mean(values), "target": np.mean(targets),
        "gradient_norm": np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values())),
        "fraction_entropy": -(masses * np.log(masses)).sum(-1).mean(),
    }  # fmt: skip
    return {
        "network": updated, "target_network": updated if due else target_nets, "adams": adams, "rmsprop": rmsprop,
        "metrics": metrics, "differs": np.any(differs),
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"entropy_weight": 0.2}, {"num_steps": 3, "target_weights": "equal"}],
    ids=["entropy", "three_steps_equal_weights"],
)
def test_updates_equal_loops_in_numpy(settings):
    agent, config = by_hand.agent_on(fqf, by_hand.Choices(), **by_hand.TINY_VALUE, **SIZES, **settings)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(4))
    # Larger weights, and a proposal far from even, so that masses, middles and plain means are told apart.
    network = jax.tree.map(lambda x: 3 * x, state.learner.network.parameters)
    network["proposal"] = jax.tree.map(lambda x: 100 * x, network["proposal"])
    state = state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))
    differs, ends = [], []
    for _ in range(7):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key)[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        expected = slow_update(before, batch, config)
        for name in ("network", "target_network"):
            actual = network_of(getattr(state.learner, name))
            assert actual.keys() == expected[name].keys()
            for path, layers in expected[name].items():
                for layer, values in layers.items():
                    np.testing.assert_allclose(
                        actual[path][layer], values, rtol=3e-4, atol=3e-6, err_msg=f"{name} {path} {layer}"
                    )
        rmsprop = RMSProp(state.learner.network.optimizer)
        for layer in ("kernel_0", "bias_0"):
            np.testing.assert_allclose(rmsprop.mean[layer], expected["rmsprop"].mean[layer], rtol=1e-3, atol=1e-6)
        for name, number in expected["metrics"].items():
            np.testing.assert_allclose(metrics[name].total, number, rtol=2e-3, atol=1e-5, err_msg=name)
        differs.append(expected["differs"])
        ends.append((batch["discount"] == 0).mean())
    assert state.learner.updates == 7
    assert any(differs)  # the plain mean would have chosen otherwise
    assert 0 < np.mean(ends) < 1
    # What acts and predicts is the same staircase.
    observation = np.random.default_rng(0).normal(size=(50, 3))
    nets, inputs = network_of(state.learner.network.parameters), jnp.asarray(observation, jnp.float32)
    masses, middles, _, _ = slow_staircase(nets, observation)
    atoms, _ = implicit_by_hand.forward(nets, observation, middles)
    action = agent.policy.act(state, inputs, (), jax.random.key(0))[0]
    np.testing.assert_array_equal(action, (atoms * masses[:, None]).sum(-1).argmax(-1))
    found = agent.claim.law(state, inputs, action)
    np.testing.assert_allclose(found.atoms, atoms[np.arange(50), action], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.masses, masses, rtol=1e-3, atol=1e-5)

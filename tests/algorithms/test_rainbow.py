"""Rainbow's loss, its parts one by one, C51 as what is left without them, and whole iterations against numpy loops."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist.algorithms.value_based import c51, rainbow
from jaxrl_dist.learning import experience, networks
from jaxrl_dist.learning.experience import Batch

SIZES = {"v_min": -2.0, "v_max": 3.0, "num_atoms": 6, "annealing_steps": 60}
ALL_OFF = {"double": False, "dueling": False, "noisy": False, "priority_exponent": 0.0, "num_steps": 1}

# -- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_and_priorities_by_hand():
    """Two rows: KL(.5, .5 || .5, .5) = 0 and KL(1, 0 || .25, .75) = ln 4, of which the loss takes the weighted mean."""
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
    target, weights = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([1.0, 0.25])
    loss, divergence = rainbow.loss_of(logits, target, weights)
    assert loss == pytest.approx(0.25 * np.log(4) / 2, rel=1e-6)
    np.testing.assert_allclose(divergence, [0, np.log(4)], atol=1e-6)  # without weights
    gradient = jax.grad(lambda logits: rainbow.loss_of(logits, target, weights)[0])(logits)
    np.testing.assert_allclose(gradient, [[0, 0], [0.25 * -0.75 / 2, 0.25 * 0.75 / 2]], atol=1e-6)


def test_target_by_hand():
    support, masses = jnp.arange(-2.0, 3.0), jnp.array([[0.1, 0.2, 0.4, 0.2, 0.1]] * 2)
    target = rainbow.target_masses(by_hand.steps_of([0.5, 0.5], [0.9, 0.0]), masses, support)
    np.testing.assert_allclose(target, [[0.03, 0.15, 0.32, 0.32, 0.18], [0, 0, 0.5, 0.5, 0]], atol=1e-6)


# -- without its parts it is C51 --------------------------------------------------------------------------------------


def as_rainbow(parameters):
    """C51's parameters in Rainbow's tree; what the noise multiplies is left as it is made."""
    head = parameters["params"]["head"]["advantage"]["layers"]
    layers = {
        f"advantage_{i}": {
            "kernel": head[f"kernel_{i}"][0], "bias": head[f"bias_{i}"][0],
            "kernel_noise": jnp.full(head[f"kernel_{i}"][0].shape, 0.1),
            "bias_noise": jnp.full(head[f"bias_{i}"][0].shape, 0.1),
        }
        for i in (0, 1)
    }  # fmt: skip
    return {"params": {"torso": parameters["params"]["torso"]} | layers}


def test_everything_off_is_c51_on_the_same_batch(monkeypatch):
    env = by_hand.Choices()
    settings = by_hand.TINY_VALUE | SIZES
    del settings["annealing_steps"]
    plain, _ = by_hand.agent_on(c51, env, **settings)
    reduced, _ = by_hand.agent_on(rainbow, env, **settings, **ALL_OFF, importance_exponent=0.7)
    rng = np.random.default_rng(0)
    batch = Batch(
        *(jnp.asarray(x, jnp.float32) for x in (rng.normal(size=(5, 3)),)), jnp.array([0, 2, 1, 1, 0]),
        *(jnp.asarray(x, jnp.float32) for x in (rng.normal(size=5), [0.9, 0, 0.9, 0.9, 0], rng.normal(size=(5, 3)))),
    )  # fmt: skip
    monkeypatch.setattr(experience, "sample_n_step", lambda *arguments, **settings: batch)
    monkeypatch.setattr(experience, "batch_at", lambda *arguments, **settings: batch)
    state, other = (by_hand.quick(agent.init)(jax.random.key(1)) for agent in (plain, reduced))
    # Networks that differ from their targets, and that are the same for both agents.
    online = state.learner.network.parameters
    target = jax.tree.map(lambda x: x[::-1] - 0.1, online)
    state = state._replace(learner=state.learner._replace(target_network=target))
    other = other._replace(
        learner=by_hand.changed(other.learner, network=as_rainbow(online), target_network=as_rainbow(target))
    )
    step, other_step = by_hand.quick(plain.step), by_hand.quick(reduced.step)
    for _ in range(4):
        (state, metrics), (other, other_metrics) = step(state), other_step(other)
        expected, actual = as_rainbow(state.learner.network.parameters), other.learner.network.parameters
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6), without_noise(actual),
                     without_noise(expected))  # fmt: skip
        for name in ("value", "target", "clipped_mass", "gradient_norm"):
            np.testing.assert_allclose(other_metrics[name].total, metrics[name].total, rtol=1e-4, err_msg=name)
        # Its loss is the divergence, less than the cross-entropy by the target's entropy.
        assert other_metrics["loss"].total < metrics["loss"].total
    assert not np.array_equal(
        state.learner.network.parameters["params"]["head"]["advantage"]["layers"]["kernel_1"],
        online["params"]["head"]["advantage"]["layers"]["kernel_1"],
    )
    leaves = np.asarray(other.priorities.tree)[len(other.priorities.tree) // 2 :]
    size = int(other.experience.replay.size)
    np.testing.assert_array_equal(leaves, [1] * size + [0] * (len(leaves) - size))  # uniform replay


def without_noise(parameters):
    return {
        layer: {name: value for name, value in values.items() if not name.endswith("noise")}
        for layer, values in parameters["params"].items()
    }


def test_loss_is_c51s_less_the_entropy_of_the_target():
    logits = jax.random.normal(jax.random.key(0), (5, 6))
    target = jax.nn.softmax(jax.random.normal(jax.random.key(1), (5, 6)))
    (loss, _), gradient = jax.value_and_grad(rainbow.loss_of, has_aux=True)(logits, target, jnp.ones(5))
    expected, expected_gradient = jax.value_and_grad(c51.loss_of)(logits, target)
    entropy = -(np.float64(target) * np.log(np.float64(target))).sum(-1).mean()
    assert loss == pytest.approx(float(expected) - entropy, rel=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


# -- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_drawn_anew_for_every_layer_step_and_use(monkeypatch):
    """Acting, and an update's online, target and choosing network: 4 layers each, and none of it frozen into jit."""
    drawn = []
    signed_root = networks._signed_root

    def seen(x):
        jax.debug.callback(lambda values: drawn.append(np.array(values).tobytes()), x)
        return signed_root(x)

    agent, _ = by_hand.agent_on(rainbow, by_hand.Choices(), **by_hand.TINY_VALUE, **SIZES)
    before = state = by_hand.quick(agent.init)(jax.random.key(0))
    monkeypatch.setattr(networks, "_signed_root", seen)
    step = by_hand.quick(agent.step)
    for _ in range(3):
        state, _ = step(state)
    jax.block_until_ready(state.env_steps)
    jax.effects_barrier()
    assert len(set(drawn)) == 3 * 4 * 4 * 2  # iterations, passes, layers, inputs and outputs
    # Evaluation and prediction take the mean weights.
    drawn.clear()
    observation = jnp.ones((1, 3))
    action = agent.policy.act(state, observation, (), jax.random.key(0))[0]
    agent.claim.law(state, observation, action)
    jax.effects_barrier()
    assert not drawn
    # What multiplies the noise is learned.
    for layer in ("advantage_0", "advantage_1", "value_0", "value_1"):
        for name in ("kernel_noise", "bias_noise"):
            now, then = (s.learner.network.parameters["params"][layer][name] for s in (state, before))
            assert not np.array_equal(now, then)


# -- whole iterations against loops in numpy --------------------------------------------------------------------------


def nets_of(parameters) -> dict[str, dict]:
    """The mean weights in the form of `by_hand.action_forward`."""
    parameters = by_hand.weights(parameters)["params"]
    nets = {"torso/mlp": by_hand.network({"params": parameters["torso"]})}
    for stream in ("advantage", "value"):
        if f"{stream}_0" in parameters:
            nets[f"head/{stream}"] = {
                f"{part}_{i}": np.float64(parameters[f"{stream}_{i}"][part])[None]
                for i in (0, 1)
                for part in ("kernel", "bias")
            }
    return nets


def adams_of(optimizer, epsilon: float) -> dict[str, by_hand.Adam]:
    first, second = (nets_of(optax.tree_utils.tree_get(optimizer, name)) for name in ("mu", "nu"))
    adams = {}
    for path in first:
        adam = adams[path] = by_hand.Adam.__new__(by_hand.Adam)
        adam.first, adam.second, adam.epsilon = first[path], second[path], epsilon
        adam.time = int(optax.tree_utils.tree_get(optimizer, "count"))
    return adams


def projected(reward, discount, masses, support) -> np.ndarray:
    gap, target = support[1] - support[0], np.zeros(len(support))
    for atom, mass in zip(support, masses, strict=True):
        place = (min(max(reward + discount * atom, support[0]), support[-1]) - support[0]) / gap
        below = min(int(np.floor(place)), len(support) - 2)
        target[below] += mass * (below + 1 - place)
        target[below + 1] += mass * (place - below)
    return target


def slow_draw(leaves: np.ndarray, key, batch_size: int):
    """Stratified draws in proportion to the priorities, and their probabilities."""
    places = (np.arange(batch_size) + np.asarray(jax.random.uniform(key, (batch_size,)), np.float64)) / batch_size
    cumulated = np.cumsum(leaves)
    indices = np.array([np.searchsorted(cumulated, place * cumulated[-1], side="right") for place in places])
    return indices, leaves[indices] / cumulated[-1]


def slow_update(learner, batch: dict, weights: np.ndarray, config) -> dict:
    nets, target_nets = nets_of(learner.network.parameters), nets_of(learner.target_network)
    support = np.linspace(config.v_min, config.v_max, config.num_atoms)
    logits, tape = by_hand.action_forward(nets, batch["observation"], 3)
    following = by_hand.softmax(by_hand.action_forward(target_nets, batch["next_observation"], 3)[0])
    online = by_hand.softmax(by_hand.action_forward(nets, batch["next_observation"], 3)[0])
    slope, divergences, differs = np.zeros_like(logits), [], []
    for b, action in enumerate(batch["action"].astype(int)):
        choices = [np.argmax(masses @ support) for masses in (online[b], following[b])]
        differs.append(choices[0] != choices[1])
        best = choices[0] if config.double else choices[1]
        target = projected(batch["reward"][b], batch["discount"][b], following[b, best], support)
        masses = by_hand.softmax(logits[b, action])
        held = target > 0
        divergences.append((target[held] * np.log(target[held] / masses[held])).sum())
        slope[b, action] = weights[b] * (masses - target) / len(slope)
    gradient = by_hand.action_backward(nets, tape, slope)
    adams = adams_of(learner.network.optimizer, config.adam_epsilon)
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in nets}
    due = (int(learner.updates) + 1) % config.target_period == 0
    divergences = np.array(divergences)
    return {
        "network": nets, "target_network": nets if due else target_nets, "divergences": divergences,
        "loss": (weights * divergences).mean(), "differs": np.any(differs),
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"num_steps": 3, "priority_exponent": 0.7}, {"num_steps": 1, "double": False, "dueling": False}],
    ids=["all_but_noise", "no_streams"],
)
def test_iterations_equal_loops_in_numpy(settings):
    agent, config = by_hand.agent_on(
        rainbow, by_hand.Choices(), **by_hand.TINY_VALUE, **SIZES, **settings, noisy=False, importance_exponent=0.3
    )
    assert dataclasses.replace(config, noisy=True).double == settings.get("double", True)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    # A target network that would choose other actions than the online one.
    target = jax.tree.map(lambda x: x[::-1], state.learner.network.parameters)
    state = state._replace(learner=state.learner._replace(target_network=target))
    num_leaves = len(state.priorities.tree) // 2
    leaves, largest = np.float64(np.arange(num_leaves) < 24), 1.0
    differs, ends, spread = [], [], []
    for iteration in range(9):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        _, sample_key, _ = jax.random.split(key, 3)
        written = (int(state.experience.replay.position) + np.arange(config.num_envs)) % 40
        leaves[written] = largest
        indices, probabilities = slow_draw(leaves, sample_key, config.batch_size)
        env_steps = 24 + config.num_envs * (iteration + 1)
        beta = min(1, 0.3 + 0.7 * env_steps / 60)
        weights = (int(min(40, env_steps)) * probabilities) ** -beta
        weights /= weights.max()

        before, (state, metrics) = state.learner, step(state)
        batch = experience.batch_at(
            state.experience, jnp.asarray(indices), num_steps=config.num_steps, gamma=config.discount
        )
        batch = {name: np.asarray(value, np.float64) for name, value in batch._asdict().items()}
        expected = slow_update(before, batch, weights, config)
        for name in ("network", "target_network"):
            actual = nets_of(getattr(state.learner, name))
            assert actual.keys() == expected[name].keys()
            for path, layers in expected[name].items():
                for layer, values in layers.items():
                    np.testing.assert_allclose(actual[path][layer], values, rtol=3e-4, atol=3e-6, err_msg=path)
        np.testing.assert_allclose(metrics["loss"].total, expected["loss"], rtol=2e-3, atol=1e-5)
        raised = (expected["divergences"] + 1e-6) ** config.priority_exponent
        leaves[indices] = raised
        largest = max(largest, raised.max())
        found = np.float64(state.priorities.tree[num_leaves:])
        np.testing.assert_allclose(found, leaves, rtol=2e-3, atol=1e-5)
        assert state.priorities.largest == pytest.approx(largest, rel=1e-3)
        leaves, largest = found, float(state.priorities.largest)  # the rounding of one iteration is not carried on
        differs.append(expected["differs"])
        ends.append((batch["discount"] == 0).mean())
        spread.append(weights.min())
    assert state.learner.updates == 9
    assert int(state.experience.replay.position) < 24  # the ring has wrapped: new rows took the place of old ones
    assert any(differs)  # the two networks would choose differently
    assert 0 < np.mean(ends) < 1
    assert min(spread) < 0.8  # the weights matter

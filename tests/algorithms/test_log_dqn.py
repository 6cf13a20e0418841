"""LogDQN: mappings and channels by the spec's hand-worked numbers, tabular fixed points, whole updates in numpy."""

import functools
import re

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import dqn, log_dqn
from jaxrl_dist.configuration import check_configuration

SHAPE = 0.5, 0.0  # c and D

# -- mappings ---------------------------------------------------------------------------------------------------------

VALUES = jnp.array([0.01687, 0.1, 0.5, 1, 2, 10])


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ("log", [-2.041109, -1.151293, -0.346574, 0, 0.346574, 1.151293]),
        ("loglin", [-2.041109, -1.151293, -0.346574, 0, 0.5, 4.5]),
        ("identity", VALUES),
    ],
)
def test_mappings_by_hand(mapping, expected):
    outputs = log_dqn.mapped(mapping, VALUES, *SHAPE, 1e-3)
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    np.testing.assert_allclose(log_dqn.unmapped(mapping, outputs, *SHAPE), VALUES, rtol=2e-6)
    # With another scale and offset, too.
    outputs = log_dqn.mapped(mapping, VALUES, 0.3, -0.7, 1e-3)
    np.testing.assert_allclose(log_dqn.unmapped(mapping, outputs, 0.3, -0.7), VALUES, rtol=2e-6)


@pytest.mark.parametrize(("scale", "offset"), [SHAPE, (0.3, -0.7)])
def test_the_pieces_of_loglin_meet(scale, offset):
    point = float(np.exp(-offset / scale))
    slope = jax.vmap(jax.grad(lambda q: log_dqn.mapped("loglin", q, scale, offset, 1e-3)))
    values = point * jnp.array([1 - 1e-5, 1 + 1e-5])
    np.testing.assert_allclose(slope(values), scale / point, rtol=1e-4)  # 0.5 at 1 for the defaults
    np.testing.assert_allclose(log_dqn.mapped("loglin", values, scale, offset, 1e-3), 0, atol=2e-5)
    inverse = jax.vmap(jax.grad(lambda t: log_dqn.unmapped("loglin", t, scale, offset)))
    np.testing.assert_allclose(inverse(jnp.array([-1e-5, 1e-5])), point / scale, rtol=1e-3)


def test_nothing_becomes_infinite():
    """Logarithms of 0 and less are those of the floor; wild outputs have finite values and slopes."""
    outputs = log_dqn.mapped("log", jnp.array([0.0, -3.0, 1e-9]), *SHAPE, 0.01)
    np.testing.assert_allclose(outputs, 0.5 * np.log(0.01), rtol=1e-6)
    assert log_dqn.mapped("identity", jnp.array(-3.0), *SHAPE, 0.01) == -3
    for mapping in ("log", "loglin"):
        values = log_dqn.unmapped(mapping, jnp.array([-1e6, 1e6]), *SHAPE)
        assert jnp.isfinite(values).all()
    assert jax.grad(lambda t: log_dqn.unmapped("loglin", t, 0.01, 0.0))(200.0) == pytest.approx(100)


def test_an_average_by_hand():
    averaged = log_dqn.averaged_values(jnp.array([[2.0]]), jnp.array([[5.0]]), 0.1)
    assert averaged[0, 0] == pytest.approx(2.3)
    for mapping, now, target in (("loglin", 0.5, 0.65), ("log", 0.346574, 0.416455)):
        assert log_dqn.mapped(mapping, jnp.float32(2), *SHAPE, 0.01) == pytest.approx(now, abs=1e-6)
        assert log_dqn.mapped(mapping, averaged[0, 0], *SHAPE, 0.01) == pytest.approx(target, abs=1e-6)


# -- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "reward", "expected"),
    [
        ("none", -2.0, [-2]),
        ("polar", 3.0, [3, 0]),
        ("polar", -2.0, [0, 2]),
        ("polar", 0.0, [0, 0]),
        ("bands", 3.0, [0, 0.3, 0, 0]),
        ("bands", 37.0, [0, 0, 0.37, 0]),
        ("bands", 250.0, [0, 0, 0, 0.25]),
        ("bands", 1.0, [1, 0, 0, 0]),
        ("slices", 0.5, [0.5, 0, 0, 0]),
        ("slices", 3.0, [1, 0.222222, 0, 0]),
        ("slices", 37.0, [1, 1, 0.3, 0]),
        ("slices", 250.0, [1, 1, 1, 0.166667]),
    ],
)
def test_channels_by_hand(channels, reward, expected):
    split = functools.partial(log_dqn.split_rewards, channels=channels, num_bands=4)
    weights = np.array(log_dqn.weights_of(channels, 4))
    if channels in ("bands", "slices"):
        positive = [1, 10, 100, 1000] if channels == "bands" else [1, 9, 90, 900]
        np.testing.assert_array_equal(weights, [*positive, *(-x for x in positive)])
        # Negative rewards go the same way in the other half.
        np.testing.assert_allclose(split(jnp.array([-reward])), [[0] * 4 + expected], rtol=1e-5)
        expected = [*expected, 0, 0, 0, 0]
    parts = split(jnp.array([reward]))
    np.testing.assert_allclose(parts, [expected], rtol=1e-5)
    assert (parts @ weights)[0] == pytest.approx(reward, rel=1e-5)


@pytest.mark.parametrize("channels", log_dqn.CHANNELS)
@pytest.mark.parametrize("num_bands", [1, 2, 4])
def test_channels_add_up_to_the_reward(channels, num_bands):
    reward = jnp.concatenate([10.0 ** jnp.linspace(-2, 4, 40), -(10.0 ** jnp.linspace(-2, 4, 40)), jnp.zeros(1)])
    parts = log_dqn.split_rewards(reward, channels, num_bands)
    np.testing.assert_allclose(parts @ np.array(log_dqn.weights_of(channels, num_bands)), reward, rtol=1e-5)
    assert channels == "none" or (parts >= 0).all()
    if num_bands == 1 and channels != "none":  # bands and slices of one are polar
        np.testing.assert_array_equal(parts, log_dqn.split_rewards(reward, "polar", 4))


# -- tabular: what is learned in the mapped space ---------------------------------------------------------------------


def tabular(rewards, successor, gamma, mapping, rate, floor=0.01, bound=None, step=0.5, sweeps=4000):
    """Values of states of one action each, in one channel: `sweeps` steps of size `step` on the mapped values."""
    bound = bound or 1 / (1 - gamma)
    batch = by_hand.steps_of(rewards, [gamma * (s is not None) for s in successor])
    following = jnp.array([0 if s is None else s for s in successor])

    def sweep(outputs, _):
        values = jnp.clip(log_dqn.unmapped(mapping, outputs, *SHAPE), 0, bound)
        samples = log_dqn.sample_values(
            batch.reward[:, None], batch.discount, values[following][:, None, None], jnp.zeros(len(rewards), jnp.int32)
        )
        averaged = log_dqn.averaged_values(values[:, None], samples, rate)
        target = log_dqn.mapped(mapping, averaged, *SHAPE, floor)

        def loss(outputs):
            return len(rewards) * log_dqn.loss_of(outputs[:, None], target, 1.0)

        return outputs - step * jax.grad(loss)(outputs), None

    outputs = jax.lax.scan(sweep, jnp.zeros(len(rewards)), length=sweeps)[0]
    return np.asarray(log_dqn.unmapped(mapping, outputs, *SHAPE))


@pytest.mark.parametrize("mapping", ["log", "loglin", "identity"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_without_chance_the_values_are_those_of_dqn(mapping, rate):
    found = tabular([0.0, 0.3, 2.0], [1, 2, None], 0.9, mapping, rate)
    np.testing.assert_allclose(found, [0.9 * 2.1, 0.3 + 0.9 * 2, 2], rtol=1e-4)


@pytest.mark.parametrize("mapping", ["log", "loglin"])
def test_a_loop_and_a_channel_without_rewards(mapping):
    assert tabular([1.0], [0], 0.9, mapping, 0.5)[0] == pytest.approx(10, rel=1e-3)
    assert tabular([0.0], [0], 0.9, mapping, 0.5)[0] == pytest.approx(0.01, rel=1e-3)  # the floor


@pytest.mark.parametrize(("rate", "step", "value"), [(1.0, 0.04, 0.445), (0.1, 0.5, 0.9775), (0.02, 0.5, 0.9955)])
def test_samples_must_be_averaged_before_they_are_mapped(rate, step, value):
    """Samples of 0.1 or 1.9: their mean is 1, their geometric mean 0.4359."""

    def one(outputs, key):
        values = log_dqn.unmapped("log", outputs, *SHAPE)
        samples = jnp.where(jax.random.bernoulli(key, 0.5, outputs.shape), 0.1, 1.9)
        target = log_dqn.mapped("log", log_dqn.averaged_values(values, samples, rate), *SHAPE, 0.01)
        outputs = outputs + step * (target - outputs)
        return outputs, log_dqn.unmapped("log", outputs, *SHAPE).mean()

    means = jax.jit(lambda keys: jax.lax.scan(one, jnp.zeros(2000), keys)[1])(jax.random.split(jax.random.key(0), 4000))
    assert means[2000:].mean() == pytest.approx(value, abs=0.006)


def test_one_action_is_taken_in_all_channels():
    """Each channel likes another action than the whole does."""
    values = jnp.array([[[5.0, 4.0], [3.0, 0.5], [0.0, 0.0]]])  # 1, 2.5 and 0
    action = (values @ jnp.array(log_dqn.weights_of("polar", 1))).argmax(-1)
    assert action == 1
    samples = log_dqn.sample_values(jnp.array([[1.0, 0.0]]), jnp.array([0.5]), values, action)
    np.testing.assert_array_equal(samples, [[2.5, 0.25]])
    samples = log_dqn.sample_values(jnp.array([[1.0, 0.0]]), jnp.array([0.0]), values, action)
    np.testing.assert_array_equal(samples, [[1, 0]])


def test_loss_by_hand():
    outputs, target = jnp.array([[0.5, 3.0], [0.0, -1.0]]), jnp.zeros((2, 2))
    loss, slope = jax.value_and_grad(log_dqn.loss_of)(outputs, target, 1.0)
    assert loss == (0.125 + 2.5 + 0 + 0.5) / 2  # summed over channels, averaged over rows
    np.testing.assert_array_equal(slope, [[0.25, 0.5], [0, -0.5]])
    assert log_dqn.loss_of(outputs, target, 0.0) == (0.125 + 4.5 + 0.5) / 2
    np.testing.assert_array_equal(jax.grad(log_dqn.loss_of, argnums=1)(outputs, target, 1.0), jnp.zeros((2, 2)))


# -- DQN is one of them -----------------------------------------------------------------------------------------------

AS_DQN = {"channels": "none", "mapping": "identity", "averaging_rate": 1.0, "huber_threshold": 0.0}


def test_the_identity_of_one_channel_is_dqn():
    learned, start = [], None
    for algorithm, settings in ((dqn, {}), (log_dqn, AS_DQN)):
        agent, _ = by_hand.agent_on(algorithm, by_hand.Choices(), **(by_hand.TINY_VALUE | settings))
        state = by_hand.quick(agent.init)(jax.random.key(3))
        if algorithm is log_dqn:  # whose layers have other names, and so other weights
            parameters = {"params": start["params"] | {"head": start["params"]["head"]["advantage"]["layers"]}}
            state = state._replace(
                learner=by_hand.changed(state.learner, network=parameters, target_network=parameters)
            )
        start, step = state.learner.network.parameters, by_hand.quick(agent.step)
        for _ in range(9):
            state, metrics = step(state)
        learned.append((jax.tree.leaves(state.learner.network.parameters), metrics))
    for one, other in zip(learned[0][0], learned[1][0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    for name in ("loss", "value", "target", "gradient_norm"):
        np.testing.assert_allclose(learned[0][1][name].total, learned[1][1][name].total, rtol=1e-4, err_msg=name)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------

PARTS = ("torso/mlp", "head")


def slow_forward(nets: dict, observation: np.ndarray) -> tuple[np.ndarray, dict]:
    """Outputs `[batch, actions, channels]` and the activations on the way."""
    torso = by_hand.forward(nets["torso/mlp"], 0, observation)
    torso[-1] = np.maximum(torso[-1], 0)
    heads = [by_hand.forward(nets["head"], j, torso[-1]) for j in range(len(nets["head"]["kernel_0"]))]
    return np.stack([head[-1] for head in heads], axis=-1), {"torso/mlp": torso, "head": heads}


def slow_backward(nets: dict, tape: dict, slope: np.ndarray) -> dict[str, dict]:
    gradient = {path: by_hand.zeros_like(net) for path, net in nets.items()}
    at_features = sum(
        by_hand.backward(nets["head"], j, head, slope[..., j], gradient["head"]) for j, head in enumerate(tape["head"])
    )
    torso = tape["torso/mlp"]
    by_hand.backward(nets["torso/mlp"], 0, torso, at_features * (torso[-1] > 0), gradient["torso/mlp"])
    return gradient


def slow_map(mapping: str, q: float, c: float, offset: float) -> float:
    if mapping == "identity":
        return q
    if mapping == "log" or q <= np.exp(-offset / c):
        return c * np.log(q) + offset
    return c * np.exp(offset / c) * q - c


def slow_unmap(mapping: str, t: float, c: float, offset: float) -> float:
    if mapping == "identity":
        return t
    return np.exp((t - offset) / c) if mapping == "log" or t <= 0 else (t + c) / (c * np.exp(offset / c))


def slow_split(reward: float, channels: str) -> list[float]:
    """Of two bands, if they are bands."""
    if channels == "none":
        return [reward]
    parts = []
    for r in (max(reward, 0), max(-reward, 0)):
        parts += {
            "polar": [r], "bands": [r, 0] if r <= 1 else [0, r / 10], "slices": [min(r, 1), max(r - 1, 0) / 9],
        }[channels]  # fmt: skip
    return parts


WEIGHTS = {"none": [1], "polar": [1, -1], "bands": [1, 10, -1, -10], "slices": [1, 9, -1, -9]}


def slow_update(learner, batch: dict, config) -> dict:
    """One update as the paper writes it, all gradients by hand."""
    nets, target_nets = ({path: by_hand.network(x, path) for path in PARTS} for x in learner[:2])
    weights, shape = np.array(WEIGHTS[config.channels], float), (config.map_scale, config.map_offset)
    names = config.mapping.split(",") * (len(weights) // len(config.mapping.split(",")))
    high = config.value_bound or 1 / (1 - config.discount)
    low = -high if config.channels == "none" else 0
    outputs, tape = slow_forward(nets, batch["observation"])
    following, _ = slow_forward(target_nets, batch["next_observation"])
    slope, found = (
        np.zeros_like(outputs),
        {name: [] for name in ("loss", "value", "target", "cut_values", "floor", "apart")},
    )
    for b, action in enumerate(batch["action"].astype(int)):
        next_values = np.array([
            [slow_unmap(name, t, *shape) for name, t in zip(names, row, strict=True)] for row in following[b]
        ])  # fmt: skip
        best = np.argmax(next_values @ weights)
        losses, values, samples = 0.0, [], []
        for j, reward in enumerate(slow_split(batch["reward"][b], config.channels)):
            output, next_value = outputs[b, action, j], next_values[best, j]
            values.append(slow_unmap(names[j], output, *shape))
            samples.append(reward + batch["discount"][b] * min(max(next_value, low), high))
            averaged = min(max(values[-1], low), high)
            averaged += config.averaging_rate * (samples[-1] - averaged)
            found["floor"].append(names[j] != "identity" and averaged < config.smallest_value)
            if found["floor"][-1]:
                averaged = config.smallest_value
            error, threshold = output - slow_map(names[j], averaged, *shape), config.huber_threshold or np.inf
            losses += error**2 / 2 if abs(error) <= threshold else threshold * (abs(error) - threshold / 2)
            slope[b, action, j] = np.clip(error, -threshold, threshold) / len(slope)
            found["cut_values"].append(not low <= next_value <= high)
            found["apart"].append(np.argmax(weights[j] * next_values[:, j]) != best)
        found["loss"].append(losses)
        found["value"].append(weights @ values)
        found["target"].append(weights @ samples)
    gradient = slow_backward(nets, tape, slope)
    adams = {path: by_hand.Adam(learner.network.optimizer, path, config.adam_epsilon) for path in PARTS}
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in PARTS}
    metrics = {name: np.mean(x) for name, x in found.items()}
    metrics["gradient_norm"] = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    due = (int(learner.updates) + 1) % config.target_period == 0
    return {"network": nets, "target_network": nets if due else target_nets, "adams": adams, "metrics": metrics}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "channels": "bands", "num_bands": 2, "mapping": "log,loglin,identity,log", "num_steps": 3,
            "map_offset": -0.3, "map_scale": 0.7, "huber_threshold": 0.1,
        },
        {"channels": "slices", "num_bands": 2, "mapping": "log", "smallest_value": 0.7, "value_bound": 1.1},
        {"channels": "none", "mapping": "identity", "value_bound": 0.2, "huber_threshold": 0.0},
    ],
    ids=["default", "bands_mixed", "slices_cut", "one_identity"],
)  # fmt: skip
def test_updates_equal_loops_in_numpy(settings):
    settings = by_hand.TINY_VALUE | {"averaging_rate": 0.4} | settings
    agent, config = by_hand.agent_on(log_dqn, by_hand.Choices(), **settings)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    totals = []
    for _ in range(9):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key)[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        expected = slow_update(before, batch, config)
        for path, adam in expected["adams"].items():
            by_hand.assert_network_is(state.learner.network.parameters, expected["network"][path], path)
            by_hand.assert_network_is(state.learner.target_network, expected["target_network"][path], path)
            by_hand.assert_adam_is(state.learner.network.optimizer, adam, path)
        for name in ("loss", "value", "target", "cut_values", "gradient_norm"):
            np.testing.assert_allclose(
                metrics[name].total, expected["metrics"][name], rtol=2e-3, atol=1e-5, err_msg=name
            )
        totals.append(expected["metrics"] | {"ends": (batch["discount"] == 0).mean()})
    seen = {name: np.mean([one[name] for one in totals]) for name in ("cut_values", "floor", "apart", "ends")}
    assert 0 < seen["ends"] < 1  # both kinds of targets were seen
    assert config.channels == "none" or 0 < seen["apart"] < 1  # channels that like another action
    assert config.value_bound == 0 or 0 < seen["cut_values"] < 1
    assert config.smallest_value < 0.5 or 0 < seen["floor"] < 1


# -- policies that are files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", log_dqn.MAPPINGS)
def test_of_one_channel_the_file_for_numpy_acts_alike(mapping, tmp_path):
    from jaxrl_dist.learning import portable

    agent, _ = by_hand.agent_on(log_dqn, by_hand.Choices(), **by_hand.TINY_VALUE, channels="none", mapping=mapping)
    state = by_hand.quick(agent.init)(jax.random.key(1))
    observation = 5 * jax.random.normal(jax.random.key(5), (60, 3))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    assert len(np.unique(exported)) > 1
    np.testing.assert_array_equal(exported, agent.policy.act(state, observation, (), jax.random.key(0))[0])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"averaging_rate": 0.0}, "--averaging-rate is 0.0; it must be finite and in (0, 1]"),
        ({"averaging_rate": 1.5}, "--averaging-rate is 1.5; it must be finite and in (0, 1]"),
        ({"num_bands": 9}, "--num-bands is 9; it must be a whole number in [1, 8]"),
        ({"map_scale": 0.0}, "--map-scale is 0.0; it must be finite and in (0, inf)"),
        ({"smallest_value": 0.0}, "--smallest-value is 0.0; it must be finite and in (0, inf)"),
    ],
)
def test_numbers_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_configuration(log_dqn.Config(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": "signs"}, "--channels is 'signs'; it must be one of none, polar, bands, slices"),
        ({"mapping": "sqrt"}, "--mapping is 'sqrt'; it must be one of log, loglin, identity, or 2 of them with commas"),
        ({"mapping": "log,log,log"}, "--mapping is 'log,log,log'; it must be one of log, loglin, identity, or 2 of"),
        ({"mapping": ""}, "--mapping is ''; it must be one of"),
        ({"discount": 1.0}, "--discount is 1.0; it must be below 1, or --value-bound say where values end"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        by_hand.agent_on(log_dqn, by_hand.Choices(), **(by_hand.TINY_VALUE | settings))


def test_without_a_discount_a_bound_is_enough():
    agent, _ = by_hand.agent_on(
        log_dqn, by_hand.Choices(), **(by_hand.TINY_VALUE | {"discount": 1.0, "value_bound": 5.0})
    )
    assert jax.eval_shape(agent.step, jax.eval_shape(agent.init, jax.random.key(0)))

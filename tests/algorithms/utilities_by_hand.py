"""Networks of utilities, their gradients and whole updates of DecQN and REValueD in plain numpy, by loops."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import spaces

from jaxrl_dist.envs.factored import MultiDiscrete

LAYERS = ("input", "inner_0", "outer_0", "norm", "utilities")
COUNTS = (3, 2)
SETTINGS = by_hand.TINY_VALUE | {
    "adam_epsilon": 1e-3, "num_steps": 1, "gradient_bound": 40.0, "huber_threshold": 1.0, "polyak": 1.0,
}  # fmt: skip


class Dials(by_hand.Drift):
    """The drifting point, pushed by a choice of three in one direction and a choice of two in the other."""

    def step_env(self, key, state, action, params):
        push = jnp.array([jnp.array([-1.0, 0.1, 0.9])[action[0]], jnp.array([-0.8, 0.6])[action[1]]])
        return super().step_env(key, state, push, params)

    def action_space(self, params):
        return MultiDiscrete(COUNTS)


class Values(Dials):
    """The same with one factor."""

    def step_env(self, key, state, action, params):
        return super().step_env(key, state, jnp.stack([action[0], 0]), params)

    def action_space(self, params):
        return MultiDiscrete((3,))


class Unfactored(by_hand.Drift):
    def action_space(self, params):
        return spaces.Discrete(3)


def network(parameters) -> dict[str, dict]:
    """Layers by name, each kernels `[members, inputs, outputs]` and so on, in float64."""
    return {layer: by_hand.network(parameters, layer) for layer in LAYERS}


def forward(nets: dict, member: int, inputs: np.ndarray, counts=COUNTS) -> tuple[np.ndarray, dict]:
    """Utilities `[batch, factors, choices]` of one member, minus infinity where there is no choice, and the way."""
    of = {layer: {name: x[member] for name, x in net.items()} for layer, net in nets.items()}

    def linear(layer, x):
        return x @ of[layer]["kernel"] + of[layer]["bias"]

    tape = {"inputs": inputs, "features": linear("input", inputs)}
    tape["inner"] = np.maximum(linear("inner_0", tape["features"]), 0)
    tape["outer"] = np.maximum(linear("outer_0", tape["inner"]), 0)
    total = tape["features"] + tape["outer"]
    tape["deviation"] = np.sqrt(((total - total.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True) + 1e-5)
    tape["normal"] = (total - total.mean(1, keepdims=True)) / tape["deviation"]
    tape["head"] = tape["normal"] * of["norm"]["scale"] + of["norm"]["bias"]
    utilities = linear("utilities", tape["head"]).reshape(len(inputs), len(counts), max(counts)).copy()
    for factor, count in enumerate(counts):
        utilities[:, factor, count:] = -np.inf
    return utilities, tape


def backward(nets: dict, member: int, tape: dict, slope: np.ndarray, gradient: dict) -> None:
    """Add to `gradient` what a slope of the loss in the utilities, `[batch, factors, choices]`, comes to."""

    def linear(layer, inputs, slope):
        gradient[layer]["kernel"][member] += inputs.T @ slope
        gradient[layer]["bias"][member] += slope.sum(0)
        return slope @ nets[layer]["kernel"][member].T

    slope = linear("utilities", tape["head"], slope.reshape(len(slope), -1))
    gradient["norm"]["scale"][member] += (slope * tape["normal"]).sum(0)
    gradient["norm"]["bias"][member] += slope.sum(0)
    slope = slope * nets["norm"]["scale"][member]
    # The mean and the deviation move with what is normalised.
    along = (slope * tape["normal"]).mean(1, keepdims=True)
    slope = (slope - slope.mean(1, keepdims=True) - tape["normal"] * along) / tape["deviation"]
    inner = linear("outer_0", tape["inner"], slope * (tape["outer"] > 0))
    slope = slope + linear("inner_0", tape["features"], inner * (tape["inner"] > 0))
    linear("input", tape["inputs"], slope)


def update(learner, batch: dict, config, *, double: bool, regularisation: float, counts=COUNTS) -> dict:
    """One update of all members towards one target, all gradients by hand; DecQN is one member without regulariser."""
    nets, targets = network(learner.network.parameters), network(learner.target_network)
    members, size, factors = len(nets["input"]["bias"]), len(batch["reward"]), len(counts)
    action = batch["action"].astype(int).reshape(size, factors)
    seen = [forward(nets, k, batch["observation"], counts) for k in range(members)]
    remembered = [forward(targets, k, batch["observation"], counts)[0] for k in range(members)]
    following = [forward(targets, k, batch["next_observation"], counts)[0] for k in range(members)]
    choosing = [forward(nets, k, batch["next_observation"], counts)[0] for k in range(members)]

    target = np.zeros(size)
    for b in range(size):
        value = 0.0
        for i in range(factors):
            means = [np.mean([u[b, i, c] for u in following]) for c in range(counts[i])]
            choosers = [np.mean([u[b, i, c] for u in choosing]) for c in range(counts[i])] if double else means
            value += means[int(np.argmax(choosers))] / factors
        target[b] = batch["reward"][b] + batch["discount"][b] * value

    gradient = {layer: by_hand.zeros_like(net) for layer, net in nets.items()}
    loss, regulariser, values = 0.0, 0.0, np.zeros((size, members))
    bound = config.huber_threshold or np.inf
    for k, (utilities, tape) in enumerate(seen):
        slope = np.zeros_like(utilities)
        for b in range(size):
            made = [utilities[b, i, action[b, i]] for i in range(factors)]
            values[b, k] = np.mean(made)
            error = values[b, k] - target[b]
            inside = abs(error) <= bound
            loss += (error**2 / 2 if inside else bound * (abs(error) - bound / 2)) / size
            for i in range(factors):
                slope[b, i, action[b, i]] += (error if inside else bound * np.sign(error)) / factors / size
                weight = 1 - np.exp(-abs(target[b] - made[i]))
                distance = remembered[k][b, i, action[b, i]] - made[i]
                regulariser += weight * distance**2 / factors / size
                slope[b, i, action[b, i]] -= regularisation * 2 * weight * distance / factors / size
        backward(nets, k, tape, slope, gradient)

    norm = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    shrink = min(1, config.gradient_bound / norm)
    adams = {layer: by_hand.Adam(learner.network.optimizer, layer, config.adam_epsilon) for layer in LAYERS}
    moved = {
        layer: adams[layer].step(
            nets[layer], {name: shrink * x for name, x in gradient[layer].items()}, config.learning_rate
        )
        for layer in LAYERS
    }
    if (int(learner.updates) + 1) % config.target_period == 0:
        targets = {layer: by_hand.moved(targets[layer], moved[layer], config.polyak) for layer in LAYERS}
    metrics = {
        "loss": loss + regularisation * regulariser, "value": values.mean(), "target": target.mean(),
        "gradient_norm": norm, "regulariser": regulariser, "disagreement": values.std(1).mean(),
    }  # fmt: skip
    return {"network": moved, "target_network": targets, "adams": adams, "metrics": metrics, "shrink": shrink}


def assert_updates_are(algorithm, updates: int = 7, **settings) -> list[dict]:
    """Train a tiny agent and go through each of its updates again in numpy; settings that it has not are off."""
    agent, config = by_hand.agent_on(algorithm, Dials(), **(SETTINGS | settings))
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    found = []
    for _ in range(updates):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key)[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        switches = {
            "double": getattr(config, "double", False),
            "regularisation": getattr(config, "regularisation", 0.0),
        }
        expected = update(before, batch, config, **switches)
        for layer, adam in expected["adams"].items():
            by_hand.assert_network_is(state.learner.network.parameters, expected["network"][layer], layer)
            by_hand.assert_network_is(state.learner.target_network, expected["target_network"][layer], layer)
            by_hand.assert_adam_is(state.learner.network.optimizer, adam, layer)
        of_updates = metrics.keys() - {"episode_return", "episode_length"}
        assert of_updates >= {"loss", "value", "target", "gradient_norm"}
        for name in of_updates:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, expected["metrics"][name], rtol=2e-3, atol=1e-5, err_msg=name)
        found.append(expected["metrics"] | {"ends": (batch["discount"] == 0).mean(), "shrink": expected["shrink"]})
    assert state.learner.updates == updates
    assert 0 < np.mean([one["ends"] for one in found]) < 1  # both kinds of targets were seen
    return found

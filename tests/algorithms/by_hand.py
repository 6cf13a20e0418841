"""What the tests of the algorithms share: a small environment, and networks, their gradients and Adam in plain numpy.

The numpy side works in float64 and by loops over batch, critics and atoms, and shares no code with the package: the
gradients are derived by hand. It is slow and meant to be read.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.learning import draws
from jaxrl_dist.learning.experience import Batch
from jaxrl_dist.learning.optimization import Trained
from jaxrl_dist.learning.returns import bootstrap_discount

# -- environments -----------------------------------------------------------------------------------------------------


@struct.dataclass
class DriftState(environment.EnvState):
    position: jax.Array
    time: int


@struct.dataclass
class DriftParams(environment.EnvParams):
    max_steps_in_episode: int = 6


class Drift(environment.Environment):
    """A noisy point in three dimensions, pushed by two actions: some episodes terminate, others reach the limit."""

    @property
    def default_params(self) -> DriftParams:
        return DriftParams()

    def step_env(self, key, state, action, params):
        push = jnp.array([action[0], action[1], action[0] * action[1]])
        position = 0.7 * state.position + 0.5 * push + 0.2 * jax.random.normal(key, (3,))
        reward = 1 - (position**2).sum() + 0.3 * action[0]
        return position, DriftState(time=state.time + 1, position=position), reward, position[0] > 0.6, {}

    def reset_env(self, key, params):
        position = jax.random.uniform(key, (3,), minval=-1, maxval=0.5)
        return position, DriftState(time=0, position=position)

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (2,))

    def observation_space(self, params):
        return spaces.Box(-10.0, 10.0, (3,))


class Bandit(environment.Environment):
    """One action per episode, worth -(action - 0.5)^2; every step terminates."""

    @property
    def default_params(self) -> environment.EnvParams:
        return environment.EnvParams(max_steps_in_episode=100)

    def step_env(self, key, state, action, params):
        return jnp.ones(1), environment.EnvState(state.time + 1), -((action[0] - 0.5) ** 2), jnp.array(True), {}

    def reset_env(self, key, params):
        return jnp.ones(1), environment.EnvState(0)

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))

    def observation_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))


class Choices(Drift):
    """The drifting point with a choice of three pushes."""

    def step_env(self, key, state, action, params):
        pushes = jnp.array([[1.0, -0.5], [-0.8, 0.3], [0.1, 0.9]])
        return super().step_env(key, state, pushes[action], params)

    def action_space(self, params):
        return spaces.Discrete(3)


class Pictures(Choices):
    """The same point, seen as an image of 10 x 10 pixels and 4 channels."""

    def step_env(self, key, state, action, params):
        position, *rest = super().step_env(key, state, action, params)
        return self.picture(position), *rest

    def reset_env(self, key, params):
        position, state = super().reset_env(key, params)
        return self.picture(position), state

    def picture(self, position):
        return jnp.sin(jnp.arange(400.0).reshape(10, 10, 4) * position.sum())

    def observation_space(self, params):
        return spaces.Box(-1.0, 1.0, (10, 10, 4))


def agent_on(algorithm, env, **settings):
    """The algorithm's agent on the environment's default params, and its configuration."""
    config = dataclasses.replace(algorithm.Config(), **settings)
    return algorithm.make_agent(config, env, env.default_params), config


# Sizes for which a loop in Python is fast, and values that differ from every default, so that none can hide.
TINY = {
    "warmup_steps": 24, "replay_capacity": 40, "batch_size": 5, "discount": 0.9, "polyak": 0.1,
    "actor_learning_rate": 3e-3, "critic_learning_rate": 5e-3, "actor_hidden": (6, 5), "critic_hidden": (5, 4),
}  # fmt: skip


TINY_VALUE = {
    "num_envs": 2, "steps_per_iteration": 1, "updates_per_iteration": 1, "warmup_steps": 24, "replay_capacity": 40,
    "batch_size": 5, "discount": 0.9, "target_period": 3, "learning_rate": 0.02, "adam_epsilon": 1e-3,
    "epsilon_start": 0.9, "epsilon_end": 0.3, "exploration_steps": 60, "hidden": (12, 9),
}  # fmt: skip


def quick(function):
    """Compile with little optimisation: compiling is most of the time these tests take."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def with_fresh_keys(tree):
    """A copy whose random keys count as unused, for going through the same randomness twice."""

    def clone(x):
        return jax.random.clone(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(clone, tree)


def transition(*, discount: float = 0.99, **values) -> Batch:
    """A batch of one-step transitions of which a test sets what it needs; flags are false where not given.

    A time limit does not stop the bootstrap, so `truncated` changes nothing.
    """
    size = len(values["reward"])
    fields = dict.fromkeys(("observation", "action", "next_observation"), jnp.zeros((size, 1)))
    values = {name: jnp.asarray(value) for name, value in values.items()}
    ended = values.pop("terminated", jnp.zeros(size, bool))
    values.pop("truncated", None)
    return Batch(**(fields | {"discount": bootstrap_discount(discount, ended)} | values))


def changed(learner, **parameters):
    """A learner with other parameters; what their optimisers remember stays."""
    fields = {name: getattr(learner, name) for name in parameters}
    return learner._replace(**{
        name: fields[name]._replace(parameters=value) if isinstance(fields[name], Trained) else value
        for name, value in parameters.items()
    })  # fmt: skip


def parts(learner) -> dict:
    """What updates change, by name: parameters, and apart from them what their optimisers remember."""
    found = {}
    for name, node in learner._asdict().items():
        if isinstance(node, Trained):
            optimizer = {"network": "optimizer", "log_temperature": "temperature_optimizer"}
            found |= {name: node.parameters, optimizer.get(name, f"{name}_optimizer"): node.optimizer}
        else:
            found[name] = node
    return found


def steps_of(reward, discount) -> Batch:
    """A batch of which a test of targets sets what they read."""
    nothing = jnp.zeros((len(reward), 1))
    return Batch(nothing, jnp.zeros(len(reward), jnp.int32), jnp.asarray(reward), jnp.asarray(discount), nothing)


# -- networks ---------------------------------------------------------------------------------------------------------


def weights(node):
    """The parameters, also of those that have an optimiser."""
    return node.parameters if isinstance(node, Trained) else node


def network(parameters, name: str = "mlp") -> dict[str, np.ndarray]:
    """The layers of a flax network in float64: kernels `[members, inputs, outputs]`, biases `[members, outputs]`.

    `name` may be a path, "head/value".
    """
    layers = weights(parameters)["params"]
    for part in name.split("/"):
        layers = layers[part]
    return {key: np.asarray(value, np.float64) for key, value in layers.get("layers", layers).items()}


def activated(values: np.ndarray, activation: str) -> np.ndarray:
    """What a hidden layer makes of its sums: "relu", or "gelu" in its tanh form."""
    if activation == "relu":
        return np.maximum(values, 0)
    return 0.5 * values * (1 + np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3)))


def activation_slope(values: np.ndarray, activation: str) -> np.ndarray:
    """Derivative of `activated`."""
    if activation == "relu":
        return (values > 0).astype(np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (values + 0.044715 * values**3))
    inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * values**2)
    return 0.5 * (1 + tanh) + 0.5 * values * (1 - tanh**2) * inner


def forward(net: dict, member: int, inputs: np.ndarray, activation: str = "relu") -> list[np.ndarray]:
    """One member's activations, from the input to the output; `activation` in between."""
    activations, depth = [inputs], len(net) // 2
    for layer in range(depth):
        outputs = activations[-1] @ net[f"kernel_{layer}"][member] + net[f"bias_{layer}"][member]
        activations.append(outputs if layer == depth - 1 else activated(outputs, activation))
    return activations


def backward(
    net: dict, member: int, activations: list, slope: np.ndarray, gradient: dict | None = None, activation: str = "relu"
) -> np.ndarray:
    """Carry the slope of a loss in one member's output back to its input, adding to `gradient` if there is one."""
    depth = len(net) // 2
    for layer in reversed(range(depth)):
        if layer < depth - 1:
            sums = activations[layer] @ net[f"kernel_{layer}"][member] + net[f"bias_{layer}"][member]
            slope = slope * activation_slope(sums, activation)
        if gradient is not None:
            gradient[f"kernel_{layer}"][member] += activations[layer].T @ slope
            gradient[f"bias_{layer}"][member] += slope.sum(0)
        slope = slope @ net[f"kernel_{layer}"][member].T
    return slope


def zeros_like(net: dict) -> dict:
    return {name: np.zeros_like(value) for name, value in net.items()}


def moved(target: dict, online: dict, rate: float) -> dict:
    """Target parameters after one step towards the online ones."""
    return {name: target[name] + rate * (online[name] - target[name]) for name in target}


def action_network(parameters) -> dict[str, dict]:
    """Torso and streams of a value network by their paths, `head/value` where it is duelling."""
    parts = {"torso/mlp": parameters["params"]["torso"], "head/advantage": parameters["params"]["head"]}
    if "value" in parts["head/advantage"]:
        parts["head/value"] = parts["head/advantage"]
    return {path: network(parameters, path) for path in parts}


def action_forward(nets: dict, observation: np.ndarray, num_actions: int) -> tuple[np.ndarray, dict]:
    """Outputs for every action, `[batch, actions, outputs]`, and the activations on the way."""
    torso = forward(nets["torso/mlp"], 0, observation)
    torso[-1] = np.maximum(torso[-1], 0)
    tape = {"torso/mlp": torso} | {
        path: forward(net, 0, torso[-1]) for path, net in nets.items() if path != "torso/mlp"
    }  # fmt: skip
    outputs = tape["head/advantage"][-1].reshape(len(observation), num_actions, -1)
    if "head/value" in nets:
        outputs = tape["head/value"][-1][:, None] + outputs - outputs.mean(1, keepdims=True)
    return outputs, tape


def action_backward(nets: dict, tape: dict, slope: np.ndarray) -> dict[str, dict]:
    """Gradients of all parts for the slope of a loss in the outputs, `[batch, actions, outputs]`."""
    gradient = {path: zeros_like(net) for path, net in nets.items()}
    slopes = {"head/advantage": slope}
    if "head/value" in nets:
        slopes = {"head/advantage": slope - slope.mean(1, keepdims=True), "head/value": slope.sum(1)}
    at_features = sum(
        backward(nets[path], 0, tape[path], stream.reshape(len(slope), -1), gradient[path])
        for path, stream in slopes.items()
    )
    backward(nets["torso/mlp"], 0, tape["torso/mlp"], at_features * (tape["torso/mlp"][-1] > 0), gradient["torso/mlp"])
    return gradient


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) continued from the state of an optax optimiser."""

    def __init__(self, state, name: str | None = "mlp", epsilon: float = 1e-8):
        """`name` is the flax name of the network, None for a single number."""
        self.epsilon = epsilon
        first, second = optax.tree_utils.tree_get(state, "mu"), optax.tree_utils.tree_get(state, "nu")
        self.time = int(optax.tree_utils.tree_get(state, "count"))
        if name is None:
            self.first, self.second = {"value": np.float64(first)}, {"value": np.float64(second)}
        else:
            self.first, self.second = network(first, name), network(second, name)

    def step(self, parameters: dict, gradient: dict, learning_rate: float) -> dict:
        self.time += 1
        updated = {}
        for name, slope in gradient.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * slope
            self.second[name] = 0.999 * self.second[name] + 0.001 * slope**2
            mean, square = self.first[name] / (1 - 0.9**self.time), self.second[name] / (1 - 0.999**self.time)
            updated[name] = parameters[name] - learning_rate * mean / (np.sqrt(square) + self.epsilon)
        return updated


# -- the squashed Gaussian --------------------------------------------------------------------------------------------


def soft_sample(outputs: np.ndarray, noise: np.ndarray, bounds: tuple = (-20, 2)) -> dict[str, np.ndarray]:
    """The action tanh(mean + std noise) of an actor's outputs `[batch, 2 actions]`, and its log-density.

    `bounds` are those of the log standard deviation.
    """
    mean, raw_log_std = np.split(outputs, 2, axis=1)
    log_std = np.clip(raw_log_std, *bounds)
    pre_tanh = mean + np.exp(log_std) * noise
    action = np.tanh(pre_tanh)
    log_density = np.zeros(len(outputs))
    for row in range(len(outputs)):
        for column in range(mean.shape[1]):
            gaussian = -0.5 * noise[row, column] ** 2 - log_std[row, column] - 0.5 * np.log(2 * np.pi)
            log_density[row] += gaussian - np.log(1 - action[row, column] ** 2)
    return {
        "action": action, "log_density": log_density, "std_noise": np.exp(log_std) * noise,
        "free": (raw_log_std > bounds[0]) & (raw_log_std < bounds[1]),
    }  # fmt: skip


def soft_actor_slope(sample: dict, action_slope: np.ndarray, temperature: float) -> np.ndarray:
    """Slope of mean(temperature log pi) + f(action) in the actor's outputs, where f has slope `action_slope`.

    With x = mean + std noise: d log pi / dx = 2 tanh(x), d log pi / d log std = -1 + 2 tanh(x) std noise.
    """
    batch = len(action_slope)
    pre_tanh_slope = action_slope * (1 - sample["action"] ** 2) + temperature / batch * 2 * sample["action"]
    log_std_slope = (pre_tanh_slope * sample["std_noise"] - temperature / batch) * sample["free"]
    return np.concatenate([pre_tanh_slope, log_std_slope], axis=1)


# -- going through one update again -----------------------------------------------------------------------------------


def stored_rows(state, key, batch_size: int) -> dict[str, np.ndarray]:
    """The batch that a key draws from the replay of a state, normalised by hand, in float64."""
    rows, size = state.experience.replay.rows, int(state.experience.replay.size)
    indices = np.asarray(draws.integers(key, (batch_size,), size))
    fields = {name: value for name, value in rows._asdict().items() if name != "extras"}
    batch = {name: np.asarray(value)[indices].astype(np.float64) for name, value in fields.items()}
    statistics = state.experience.normalizer
    if statistics is not None:
        deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
        for name in ("observation", "next_observation"):
            batch[name] = np.clip((batch[name] - np.asarray(statistics.mean, np.float64)) / deviation, -10, 10)
    return batch


def assert_network_is(parameters, expected: dict, name: str = "mlp") -> None:
    actual = network(parameters, name)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=2e-4, atol=2e-6, err_msg=key)


def assert_adam_is(state, expected: Adam, name: str | None = "mlp") -> None:
    actual = Adam(state, name)
    assert actual.time == expected.time
    for key, value in expected.first.items():
        np.testing.assert_allclose(actual.first[key], value, rtol=1e-3, atol=1e-6, err_msg=f"first moment of {key}")
        np.testing.assert_allclose(
            actual.second[key], expected.second[key], rtol=1e-3, atol=1e-9, err_msg=f"second moment of {key}"
        )


# -- value-based agents -----------------------------------------------------------------------------------------------


def stored_windows(state, key, config) -> dict[str, np.ndarray]:
    """The n-step transitions that a key draws from the replay of a state, one step after the other, in float64."""
    rows, replay = jax.device_get(state.experience.replay.rows), state.experience.replay
    capacity, batch = len(rows.reward), {name: [] for name in Batch._fields if name != "extras"}
    for start in np.asarray(draws.integers(key, (config.batch_size,), int(replay.size))):
        reward, discount, slot = 0.0, 1.0, int(start)
        for step in range(config.num_steps):
            reward += discount * float(rows.reward[slot])
            discount *= config.discount
            newest = (int(replay.position) - 1 - slot) % capacity < config.num_envs
            if rows.terminated[slot] or rows.truncated[slot] or newest or step == config.num_steps - 1:
                break
            slot = (slot + config.num_envs) % capacity
        discount = 0.0 if rows.terminated[slot] else discount
        values = rows.observation[start], rows.action[start], reward, discount, rows.next_observation[slot]
        for name, value in zip(batch, values, strict=True):
            batch[name].append(value)
    return {name: np.array(values, np.float64) for name, values in batch.items()}


def value_update(learner, batch: dict, config, num_actions: int, row) -> dict:
    """One update of a value-based agent, all gradients by hand.

    `row(predicted, following, choosing, reward, discount)` is one transition's part of the loss: the outputs of the
    action taken, those of target and online network for every action of the successor -> the slope of the loss in
    `predicted`, and what the metrics of the agent average.
    """
    nets, target_nets = action_network(learner.network.parameters), action_network(learner.target_network)
    outputs, tape = action_forward(nets, batch["observation"], num_actions)
    following, _ = action_forward(target_nets, batch["next_observation"], num_actions)
    choosing, _ = action_forward(nets, batch["next_observation"], num_actions)
    slope, found = np.zeros_like(outputs), []
    for b, action in enumerate(batch["action"].astype(int)):
        found.append(row(outputs[b, action], following[b], choosing[b], batch["reward"][b], batch["discount"][b]))
        slope[b, action] = found[-1].pop("slope") / len(slope)
    gradient = action_backward(nets, tape, slope)
    adams = {path: Adam(learner.network.optimizer, path, config.adam_epsilon) for path in nets}
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in nets}
    metrics = {name: np.mean([one[name] for one in found]) for name in found[0]}
    metrics["gradient_norm"] = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    if (int(learner.updates) + 1) % config.target_period == 0:
        target_nets = nets
    return {"network": nets, "target_network": target_nets, "adams": adams, "metrics": metrics}


def assert_updates_are(algorithm, row, updates: int = 11, **settings) -> list[dict]:
    """Train a tiny agent and go through each of its updates again in numpy; returns what `row` found, averaged."""
    env = Choices()
    agent, config = agent_on(algorithm, env, **(TINY_VALUE | settings))
    step, state = quick(agent.step), quick(agent.init)(jax.random.key(3))
    found = []
    for _ in range(updates):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key)[1]
        before, (state, metrics) = state.learner, step(state)
        batch = stored_windows(state, sample_key, config)
        expected = value_update(before, batch, config, env.action_space(None).n, row)
        for path, adam in expected["adams"].items():
            assert_network_is(state.learner.network.parameters, expected["network"][path], path)
            assert_network_is(state.learner.target_network, expected["target_network"][path], path)
            assert_adam_is(state.learner.network.optimizer, adam, path)
        assert metrics.keys() - {"episode_return", "episode_length"} <= expected["metrics"].keys()
        for name, metric in metrics.items():
            if name in expected["metrics"]:
                actual = float(metric.total / metric.count)
                np.testing.assert_allclose(actual, expected["metrics"][name], rtol=2e-3, atol=1e-5, err_msg=name)
        found.append(expected["metrics"] | {"ends": (batch["discount"] == 0).mean()})
    assert state.learner.updates == updates
    assert 0 < np.mean([one["ends"] for one in found]) < 1  # both kinds of targets were seen
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    masses = np.exp(logits - logits.max(-1, keepdims=True))
    return masses / masses.sum(-1, keepdims=True)

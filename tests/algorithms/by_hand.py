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

from jaxrl_dist.interaction import Transition

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


def agent_on(algorithm, env, **settings):
    """The algorithm's agent on the environment's default params, and its configuration."""
    config = dataclasses.replace(algorithm.Config(), **settings)
    return algorithm.make_agent(config, env, env.default_params), config


# Sizes for which a loop in Python is fast, and values that differ from every default, so that none can hide.
TINY = {
    "warmup_steps": 24, "replay_capacity": 40, "batch_size": 5, "discount": 0.9, "polyak": 0.1,
    "actor_learning_rate": 3e-3, "critic_learning_rate": 5e-3, "actor_hidden": (6, 5), "critic_hidden": (5, 4),
}  # fmt: skip


def quick(function):
    """Compile with little optimisation: compiling is most of the time these tests take."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def with_fresh_keys(tree):
    """A copy whose random keys count as unused, for going through the same randomness twice."""

    def clone(x):
        return jax.random.clone(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(clone, tree)


def transition(**values) -> Transition:
    """A batch of transitions of which a test sets what it needs; flags are false where not given."""
    size = len(values["reward"])
    fields = dict.fromkeys(("observation", "action", "next_observation"), jnp.zeros((size, 1)))
    fields |= dict.fromkeys(("terminated", "truncated"), jnp.zeros(size, bool))
    return Transition(**(fields | {name: jnp.asarray(value) for name, value in values.items()}))


# -- networks ---------------------------------------------------------------------------------------------------------


def network(parameters, name: str = "mlp") -> dict[str, np.ndarray]:
    """The layers of a flax network in float64: kernels `[members, inputs, outputs]`, biases `[members, outputs]`."""
    layers = parameters["params"][name]
    return {key: np.asarray(value, np.float64) for key, value in layers.get("layers", layers).items()}


def forward(net: dict, member: int, inputs: np.ndarray) -> list[np.ndarray]:
    """One member's activations, from the input to the output; relu in between."""
    activations, depth = [inputs], len(net) // 2
    for layer in range(depth):
        outputs = activations[-1] @ net[f"kernel_{layer}"][member] + net[f"bias_{layer}"][member]
        activations.append(outputs if layer == depth - 1 else np.maximum(outputs, 0))
    return activations


def backward(net: dict, member: int, activations: list, slope: np.ndarray, gradient: dict | None = None) -> np.ndarray:
    """Carry the slope of a loss in one member's output back to its input, adding to `gradient` if there is one."""
    depth = len(net) // 2
    for layer in reversed(range(depth)):
        if layer < depth - 1:
            slope = slope * (activations[layer + 1] > 0)
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


class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) continued from the state of an optax optimiser."""

    def __init__(self, state, name: str | None = "mlp"):
        """`name` is the flax name of the network, None for a single number."""
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
            updated[name] = parameters[name] - learning_rate * mean / (np.sqrt(square) + 1e-8)
        return updated


# -- the squashed Gaussian --------------------------------------------------------------------------------------------


def soft_sample(outputs: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """The action tanh(mean + std noise) of an actor's outputs `[batch, 2 actions]`, and its log-density."""
    mean, raw_log_std = np.split(outputs, 2, axis=1)
    log_std = np.clip(raw_log_std, -20, 2)
    pre_tanh = mean + np.exp(log_std) * noise
    action = np.tanh(pre_tanh)
    log_density = np.zeros(len(outputs))
    for row in range(len(outputs)):
        for column in range(mean.shape[1]):
            gaussian = -0.5 * noise[row, column] ** 2 - log_std[row, column] - 0.5 * np.log(2 * np.pi)
            log_density[row] += gaussian - np.log(1 - action[row, column] ** 2)
    return {
        "action": action, "log_density": log_density, "std_noise": np.exp(log_std) * noise,
        "free": (raw_log_std > -20) & (raw_log_std < 2),
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
    indices = np.asarray(jax.random.randint(key, (batch_size,), 0, size))
    batch = {name: np.asarray(value)[indices].astype(np.float64) for name, value in rows._asdict().items()}
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

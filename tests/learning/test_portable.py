import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams, agents

from jaxrl_dist import cli, envs
from jaxrl_dist.algorithms.actor_critic import td3, tqc
from jaxrl_dist.learning import normalization, portable
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.running.problem import action_bounds, split_preset

ROOT = Path(portable.__file__).parents[2]
OBSERVATIONS = np.random.default_rng(0).normal(0, 3, (20, 3)).astype(np.float32)
SIZES = {"warmup_steps": 8, "batch_size": 4, "replay_capacity": 8, "actor_hidden": (8, 6), "critic_hidden": (4,)}


@pytest.fixture(scope="module", params=[(tqc, True), (td3, False)], ids=["tqc", "td3"])
def trained(request, tmp_path_factory):
    """A saved policy, what the agent itself does at the same observations, in the environment's units, and its state.

    Beside the `.npz` file is the program.
    """
    algorithm, normalize = request.param
    config = algorithm.Config(**SIZES, normalize_observations=normalize)
    agent = algorithm.make_agent(config, Toy(), ToyParams())

    @jax.jit
    def init_and_act(key):
        init_key, act_key = jax.random.split(key)
        state = agent.init(init_key)
        return state, agent.policy.act(state, jnp.asarray(OBSERVATIONS), (), act_key)[0]

    state, action = init_and_act(jax.random.key(0))
    low, high = np.float32([-2, 1]), np.float32([2, 4])
    path = tmp_path_factory.mktemp("policy") / "policy.npz"
    portable.save_policy(path, agent.export(state), low, high)
    observation = jax.ShapeDtypeStruct((3,), jnp.float32)
    path.with_suffix(".stablehlo").write_bytes(portable.export_program(agent, state, observation, low, high))
    return path, low + (high - low) * (np.asarray(action, np.float64) + 1) / 2, state


def test_saved_policy_acts_like_the_agent(trained):
    path, expected, state = trained
    policy = portable.load_policy(path)
    np.testing.assert_allclose(policy(OBSERVATIONS), expected, rtol=0, atol=2e-6)  # 1e-6 in [-1, 1]
    assert expected.std(0).min() > 0.01  # the policy does depend on what it sees
    normalized = state.experience.normalizer is not None
    assert ("observation_mean" in np.load(path).files) == normalized
    # Any number of leading axes.
    np.testing.assert_allclose(policy(OBSERVATIONS[3]), expected[3], atol=1e-5)
    np.testing.assert_allclose(policy(OBSERVATIONS.reshape(4, 5, 3)), expected.reshape(4, 5, 2), atol=1e-5)


def test_loads_where_numpy_is_all_there_is(trained, tmp_path):
    path, expected, _ = trained
    np.save(tmp_path / "observations.npy", OBSERVATIONS)
    script = f"""
import sys, importlib.util
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "gymnax", "chex"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Forbidden())
import numpy as np
from jaxrl_dist.learning.portable import load_policy
np.save("actions.npy", load_policy({str(path)!r})(np.load("observations.npy")))
assert "jax" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), expected, atol=1e-5)


def test_program_runs_where_jax_is_all_there_is(trained, tmp_path):
    """Any batch size, no key, the environment's units; not this package, nor what it is built on."""
    path, expected, _ = trained
    np.save(tmp_path / "observations.npy", OBSERVATIONS)
    script = f"""
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxrl_dist", "flax", "optax", "gymnax", "chex"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Forbidden())
from pathlib import Path
import jax, numpy as np
from jax import export
program = export.deserialize(bytearray(Path({str(path.with_suffix(".stablehlo"))!r}).read_bytes()))
assert set(program.platforms) == {{"cpu", "cuda", "tpu"}}, program.platforms
observations = np.load("observations.npy")
np.save("actions.npy", program.call(observations))
np.save("first.npy", program.call(observations[:1]))
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    np.testing.assert_allclose(np.load(tmp_path / "actions.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "first.npy"), expected[:1], atol=1e-5)


AGENTS = agents()


@pytest.mark.parametrize("name", [*AGENTS, "rainbow of images", "pqn of images"])
def test_every_algorithm_has_a_program_and_a_file(name, tmp_path):
    """Both do what `act` does, for random weights, which need no training; of a policy that remembers the program."""
    module = cli.find_algorithm(name.split()[0])
    env_id, preset = ("Breakout-MinAtar", {}) if "images" in name else next(iter(module.PRESETS.items()))
    of_the_run, of_the_algorithm = split_preset(preset)
    env, params = envs.make(env_id, **dict(pair.split("=", 1) for pair in of_the_run.get("env_options", ())))
    config = module.Config(**of_the_algorithm)
    if isinstance(config, Settings):
        config = dataclasses.replace(config, warmup_steps=1_000, replay_capacity=1_000)
    if name == "q_sharp":  # else it draws, with a key that the program has for itself
        config = dataclasses.replace(config, decoding="greedy")
    agent = module.make_agent(config, env, params)
    generator = np.random.default_rng(0)

    def random_weights(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        values = generator.normal(0, 0.3, x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else np.zeros(x.shape)
        if x.ndim > 1 and x.shape[-2] > 1:
            values -= values.mean(-2, keepdims=True)  # else what all features share decides, and one action always wins
        return jnp.asarray(values, x.dtype)

    state = jax.tree.map(random_weights, jax.eval_shape(agent.init, jax.random.key(0)))
    observations = generator.normal(0, 3, (300, *env.observation_space(params).shape)).astype(np.float32)
    memory = agent.policy.start(300)
    expected = np.asarray(jax.jit(agent.policy.act)(state, observations, memory, jax.random.key(1))[0])
    assert len(np.unique(expected)) > 1
    bounds = action_bounds(env, params)
    written = portable.export_program(agent, state, observations[0], *bounds)
    program = jax.export.deserialize(bytearray(written))
    if remembers := jax.tree.leaves(memory):  # there is no file for numpy
        assert agent.export is None
        actions = np.asarray(program.call(observations, remembers)[0])
    else:
        actions = np.asarray(program.call(observations))
        # Of several networks there is no file for numpy either.
        assert (agent.export is None) == (name in ("ensemble_c51", "bootstrapped_dqn", "log_dqn"))
        if agent.export:
            portable.save_policy(tmp_path / "p.npz", agent.export(state), *bounds)
            saved = portable.load_policy(tmp_path / "p.npz")(observations)
            np.testing.assert_allclose(actions, saved, rtol=0, atol=1e-4)
    assert actions.dtype == (np.float32 if bounds else np.int32)
    np.testing.assert_allclose(actions, 2 * expected if bounds else expected, rtol=0, atol=1e-5)  # Pendulum's [-2, 2]


def test_hand_worked(tmp_path):
    # One input, one hidden unit, one action and one further output that is cut: tanh(2 relu(3 x + 1) - 4).
    layers = {
        "kernel_0": jnp.array([[[3.0]]]), "bias_0": jnp.array([[1.0]]),
        "kernel_1": jnp.array([[[2.0, 99.0]]]), "bias_1": jnp.array([[-4.0, 99.0]]),
    }  # fmt: skip
    statistics = normalization.RunningStatistics(jnp.float32(9), jnp.array([5.0]), jnp.array([4.0]))
    arrays = portable.mlp_policy(layers, 1, statistics)
    portable.save_policy(tmp_path / "p.npz", arrays, np.array([0.0]), np.array([10.0]))
    policy = portable.load_policy(tmp_path / "p.npz")
    normalised = np.array([[0.5], [-1.0], [10.0]])  # the last is 30 before clipping
    expected = 5 * (np.tanh(2 * np.maximum(3 * normalised + 1, 0) - 4) + 1)
    np.testing.assert_allclose(policy(np.array([[6.0], [3.0], [65.0]])), expected, atol=1e-5)


def test_gelu_and_layer_normalisation_by_hand(tmp_path):
    # Two hidden units 1 and 3 of the input 1: normalised to -1 and 1, scaled and shifted to -2 + 1 and 2 + 1.
    layers = {
        "kernel_0": jnp.array([[[1.0, 3.0]]]), "bias_0": jnp.zeros((1, 2)), "norm_scale_0": jnp.full((1, 2), 2.0),
        "norm_bias_0": jnp.ones((1, 2)), "kernel_1": jnp.array([[[0.1], [0.2]]]), "bias_1": jnp.zeros((1, 1)),
    }  # fmt: skip
    for activation, expected in (("relu", 0.2 * 3), ("gelu", 0.1 * -0.158808 + 0.2 * 2.996363)):
        arrays = portable.mlp_policy(layers, 1, activation=activation)
        portable.save_policy(tmp_path / "p.npz", arrays, np.array([-1.0]), np.array([1.0]))
        action = portable.load_policy(tmp_path / "p.npz")(np.array([[1.0]]))
        np.testing.assert_allclose(action, [[np.tanh(expected)]], atol=1e-5)
    with pytest.raises(ValueError, match="activation is 'swish'; it must be one of relu, tanh, gelu"):
        portable.mlp_policy(layers, 1, activation="swish")


def test_several_choices_by_hand(tmp_path):
    """Two members of one block each, two factors of two and three choices, of which the first lacks its third.

    Input 1 -> features (1, 2) and (2, 1); blocks add relu(...) = (0, 3) and (1, 0), so (1, 5) and (3, 1); normalised
    (-1, 1) and (1, -1). Utilities of a member are its features times rows of a kernel.
    """
    parameters = {
        "input": {"kernel": np.array([[[1.0, 2]], [[2, 1]]]), "bias": np.zeros((2, 2))},
        "inner_0": {"kernel": np.array([[[1.0], [1]], [[-1], [1]]]), "bias": np.array([[0.0], [2]])},
        "outer_0": {"kernel": np.array([[[-1.0, 1]], [[1, -1]]]), "bias": np.zeros((2, 2))},
        "norm": {"scale": np.ones((2, 2)), "bias": np.zeros((2, 2))},
        "utilities": {
            "kernel": np.array([[[0.0, 0, 0, 0, 0, 0], [1, 0, 9, 0, 1, 0]], [[0, 3, 9, 0, 0, 2], [0.0] * 6]]),
            "bias": np.zeros((2, 6)),
        },
    }  # fmt: skip
    # Means of (1, 0), (0, 3) for the first factor and of (0, 1, 0), (0, 0, 2) for the second: choices 1 and 2.
    arrays = portable.factored_policy(parameters, (2, 3))
    portable.save_policy(tmp_path / "p.npz", arrays)
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "p.npz")(np.ones((2, 1))), [[1, 2], [1, 2]])
    low, high = np.float32([-1, 0]), np.float32([1, 10])
    portable.save_policy(tmp_path / "p.npz", arrays, low, high, np.array([2, 3]))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "p.npz")(np.ones((1, 1))), [[1, 10]])
    with pytest.raises(ValueError, match=r"action_bins is \[3 3\]; the policy's choices are \[2 3\]"):
        portable.save_policy(tmp_path / "p.npz", arrays, low, high, np.array([3, 3]))


# -- files that are no policy ------------------------------------------------------------------------------------------


def layers(*sizes):
    """A perceptron of ones with these numbers of units, as an `EnsembleMLP` of one member has it."""
    shapes = enumerate(itertools.pairwise(sizes))
    return {name: np.ones(shape) for i, (inputs, outputs) in shapes
            for name, shape in ((f"kernel_{i}", (1, inputs, outputs)), (f"bias_{i}", (1, outputs)))}  # fmt: skip


def head(**parts):
    return {name: {"layers": part} for name, part in parts.items()}


CONTINUOUS = portable.mlp_policy(layers(3, 4, 2), 2) | {"action_low": np.zeros(2), "action_high": np.ones(2)}
DUELLING = portable.greedy_policy(
    {"torso": {"mlp": {"layers": layers(3, 4)}}, "head": head(advantage=layers(4, 6), value=layers(4, 3))}, 2,
    support=np.arange(3.0),
)  # fmt: skip
IMPLICIT = portable.greedy_policy(
    {"head": head(advantage=layers(4, 2)) | {"embedding": {"dense": {"layers": layers(5, 4)}}}}, 2, fractions=np.ones(8)
)
FACTORED = portable.factored_policy(
    {
        "input": {"kernel": np.ones((2, 3, 4)), "bias": np.ones((2, 4))},
        "inner_0": {"kernel": np.ones((2, 4, 5)), "bias": np.ones((2, 5))},
        "outer_0": {"kernel": np.ones((2, 5, 4)), "bias": np.ones((2, 4))},
        "norm": {"scale": np.ones((2, 4)), "bias": np.ones((2, 4))},
        "utilities": {"kernel": np.ones((2, 4, 6)), "bias": np.ones((2, 6))},
    },
    (3, 2),
)


def without(arrays, name):
    return {other: array for other, array in arrays.items() if other != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without(CONTINUOUS, "bias_1"), "has no array 'bias_1'"),
        (without(CONTINUOUS, "kernel_0"), "has no array 'kernel_0'"),
        (without(CONTINUOUS, "action_high"), "has no array 'action_high'"),
        (without(CONTINUOUS, "action_low"), "holds no policy"),
        ({}, "holds no policy"),
        (CONTINUOUS | {"kernel_1": np.ones((5, 2))}, r"holds 'kernel_1' of shape \(5, 2\); it must be \[4, any\]"),
        (CONTINUOUS | {"bias_0": np.ones(3)}, r"holds 'bias_0' of shape \(3,\); it must be \[4\]"),
        (CONTINUOUS | {"action_low": np.zeros(3)}, r"holds 'action_low' of shape \(3,\); it must be \[2\]"),
        (CONTINUOUS | {"norm_scale_0": np.ones(4)}, "has no array 'norm_bias_0'"),
        (CONTINUOUS | {"observation_mean": np.ones(3)}, "has no array 'observation_variance'"),
        (CONTINUOUS | {"kernel_0": np.full((3, 4), np.nan)}, "holds 'kernel_0', of which 12 of 12 numbers are not fin"),
        (CONTINUOUS | {"bias_0": np.array(["a"] * 4)}, "holds 'bias_0' of type <U1; it must be numbers"),
        (CONTINUOUS | {"activation": np.array("swish")}, "activation 'swish'; it must be one of relu, tanh, gelu"),
        (DUELLING | {"num_actions": np.int32(0)}, "holds 'num_actions' 0; it must be at least 1"),
        (DUELLING | {"num_actions": np.int32(4)}, "has 6 outputs, which do not divide into 4 actions"),
        (DUELLING | {"torso_kernel_0": np.ones((3, 5))}, "holds 'torso_bias_0' of shape"),
        (DUELLING | {"value_kernel_0": np.ones((4, 2)), "value_bias_0": np.ones(2)}, "has not 3 outputs of the value"),
        (DUELLING | {"support": np.ones(5)}, "holds 'support' of shape"),
        (without(DUELLING, "advantage_kernel_0"), "has no array 'advantage_kernel_0'"),
        (DUELLING | {"utility": np.array("mean")}, "has no array 'stock_scale'"),
        (DUELLING | {"convolution_kernel": np.ones((3, 3, 1, 2))}, "has no array 'convolution_bias'"),
        (without(IMPLICIT, "fractions"), "has no array 'fractions'"),
        (without(IMPLICIT, "embedding_kernel_0"), "has no array 'embedding_kernel_0'"),
        (IMPLICIT | {"num_actions": np.int32(3)}, "has not 3 outputs, one for each action"),
        (IMPLICIT | {"proposal_kernel_0": np.ones((5, 8))}, "holds 'proposal_kernel_0' of shape"),
        (FACTORED | {"action_counts": np.array([3, 0])}, r"holds 'action_counts' \[3 0\]; each must be at least 1"),
        (
            FACTORED | {"action_counts": np.array([4, 2])},
            r"'utilities_kernel' of shape \(2, 4, 6\); it must be \[2, 4, 8\]",
        ),
        (
            FACTORED | {"inner_0_kernel": np.ones((1, 4, 5))},
            r"'inner_0_kernel' of shape \(1, 4, 5\); it must be \[2, 4",
        ),
        (without(FACTORED, "outer_0_bias"), "has no array 'outer_0_bias'"),
        (without(FACTORED, "norm_scale"), "has no array 'norm_scale'"),
        (FACTORED | {"action_low": np.zeros(2)}, "has no array 'action_high'"),
        (
            FACTORED | {"action_counts": np.array([3, 1]), "action_low": np.zeros(2), "action_high": np.ones(2)},
            r"holds bounds, and 'action_counts' \[3 1\]; each must be at least 2",
        ),
    ],
)
def test_arrays_that_are_no_policy_are_named(tmp_path, arrays, message):
    for good, observation in ((CONTINUOUS, 3), (DUELLING, 3), (IMPLICIT, 4), (FACTORED, 3)):
        np.savez(tmp_path / "p.npz", **good)
        portable.load_policy(tmp_path / "p.npz")(np.ones((1, observation)))
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        portable.load_policy(tmp_path / "p.npz")
    assert str(tmp_path / "p.npz") in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no zip file",
        lambda data: data[:100],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data.replace(b"kernel_0", b"\xff" * 8, 1),
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / "p.npz"
    np.savez(path, **CONTINUOUS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"p\.npz is no \.npz file, or damaged: ") as raised:
        portable.load_policy(path)
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)


def test_pickles_are_not_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", **CONTINUOUS, other=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        portable.load_policy(tmp_path / "p.npz")
    np.save(tmp_path / "p.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"p\.npy is no \.npz file"):
        portable.load_policy(tmp_path / "p.npy")
    with pytest.raises(ValueError, match=r"none\.npz does not exist"):
        portable.load_policy(tmp_path / "none.npz")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.learning import networks
from jaxrl_dist.learning.networks import (
    GRU,
    MLP,
    ActionHead,
    Convolution,
    CosineEmbedding,
    EnsembleMLP,
    ImplicitQuantileHead,
    NoisyDense,
    Torso,
)

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
MEMBERS, FEATURES = 3, (4, 6, 2)


def initialised(module, inputs=INPUTS):
    return jax.jit(module.init)(jax.random.key(0), inputs)


def test_parameters_start_uniform_within_the_inverse_root_of_fan_in():
    modules = [EnsembleMLP(4, (150, 100)), EnsembleMLP(4, (150, 100), output_bound=3e-3)]
    keys = jax.random.split(jax.random.key(0))
    both = jax.jit(lambda keys: [m.init(key, INPUTS)["params"] for m, key in zip(modules, keys, strict=True)])(keys)
    for parameters, bounds in zip(both, [(5**-0.5, 150**-0.5), (5**-0.5, 3e-3)], strict=True):
        assert sorted(parameters) == ["bias_0", "bias_1", "kernel_0", "kernel_1"]
        for index, (fan_in, width, bound) in enumerate([(5, 150, bounds[0]), (150, 100, bounds[1])]):
            assert parameters[f"kernel_{index}"].shape == (4, fan_in, width)
            assert parameters[f"bias_{index}"].shape == (4, width)
            for name in (f"kernel_{index}", f"bias_{index}"):
                values = np.asarray(parameters[name])
                assert -bound <= values.min() < -0.97 * bound
                assert 0.97 * bound < values.max() <= bound
                assert values.var() == pytest.approx(bound**2 / 3, rel=0.15)
                assert values.mean() == pytest.approx(0, abs=4 * bound / np.sqrt(3 * values.size))


def test_glorots_start_has_both_fans_and_no_biases():
    parameters = initialised(MLP((150, 100), glorot=True))["params"]["layers"]
    for index, (fan_in, width) in enumerate([(5, 150), (150, 100)]):
        bound, values = np.sqrt(6 / (fan_in + width)), np.asarray(parameters[f"kernel_{index}"])
        assert values.shape == (1, fan_in, width)
        assert 0.97 * bound < np.abs(values).max() <= bound
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.15)
        np.testing.assert_array_equal(parameters[f"bias_{index}"], np.zeros((1, width)))


def test_members_are_independent():
    module = EnsembleMLP(MEMBERS, FEATURES)
    parameters = initialised(module)
    for values in jax.tree.leaves(parameters):
        for i in range(MEMBERS):
            for j in range(i):
                assert np.abs(values[i] - values[j]).min() > 0  # no two members share a single number
    # d (outputs of member i) / d (parameters of member j), as a matrix of largest slopes: diagonal.
    jacobian = jax.jit(jax.jacrev(lambda p: module.apply(p, INPUTS).sum((0, 2))))(parameters)
    for slopes in jax.tree.leaves(jacobian):  # [members, members, ...]
        largest = np.abs(slopes).reshape(MEMBERS, MEMBERS, -1).max(-1)
        assert np.all(np.diag(largest) > 0)
        np.testing.assert_array_equal(largest[~np.eye(MEMBERS, dtype=bool)], 0)


def test_both_ways_of_computing_agree_with_a_slow_reference(monkeypatch):
    module = EnsembleMLP(MEMBERS, FEATURES)
    parameters = initialised(module)
    expected = np.zeros((7, MEMBERS, 2))
    for member in range(MEMBERS):
        hidden = np.float64(INPUTS)
        for index in range(3):
            kernel, bias = (np.float64(parameters["params"][f"{name}_{index}"][member]) for name in ("kernel", "bias"))
            hidden = hidden @ kernel + bias
            if index < 2:
                hidden = np.maximum(hidden, 0)
        expected[:, member] = hidden

    def loss(parameters):
        outputs = module.apply(parameters, INPUTS)
        return (outputs**2).sum(), outputs

    def value_and_gradient(bound):
        monkeypatch.setattr(networks, "UNROLLED_MEMBERS_ON_CPU", bound)
        function = jax.jit(lambda parameters: jax.value_and_grad(loss, has_aux=True)(parameters))
        (_, outputs), gradient = function(parameters)
        return outputs, gradient, str(jax.make_jaxpr(lambda parameters: loss(parameters))(parameters))

    unrolled, unrolled_gradient, unrolled_program = value_and_gradient(MEMBERS)
    batched, batched_gradient, batched_program = value_and_gradient(MEMBERS - 1)
    assert unrolled_program.count("dot_general") == 3 * MEMBERS
    assert batched_program.count("dot_general") == 3
    np.testing.assert_allclose(unrolled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batched, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(jax.tree.leaves(unrolled_gradient), jax.tree.leaves(batched_gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_mlp_is_an_ensemble_of_one():
    mlp = MLP((8, 2), activation=jnp.tanh, output_bound=0.1)
    parameters = initialised(mlp)
    layers = {"params": parameters["params"]["layers"]}
    outputs = EnsembleMLP(1, (8, 2), activation=jnp.tanh).apply(layers, INPUTS)
    assert mlp.apply(parameters, INPUTS).shape == (7, 2)
    np.testing.assert_array_equal(mlp.apply(parameters, INPUTS), outputs[:, 0])
    assert np.abs(layers["params"]["kernel_1"]).max() <= 0.1 < np.abs(layers["params"]["kernel_0"]).max()


def test_no_activation_after_the_last_layer():
    outputs = MLP((50,)).apply(initialised(MLP((50,))), INPUTS)
    assert np.asarray(outputs).min() < 0 < np.asarray(outputs).max()


def test_polyak():
    target, online = (
        {"a": jnp.array([1.0, -4.0]), "b": jnp.float32(1)},
        {"a": jnp.array([2.0, 8.0]), "b": jnp.float32(2)},
    )
    np.testing.assert_allclose(networks.polyak(target, online, 0.005)["a"], [1.005, -3.94], rtol=1e-6)
    assert float(networks.polyak(target, online, 0.005)["b"]) == pytest.approx(1.005, rel=1e-6)
    for rate, expected in ((0.0, target), (1.0, online)):
        moved = networks.polyak(target, online, rate)
        for one, other in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


def test_periodic_copy():
    target, online = {"a": jnp.array([1.0, -4.0])}, {"a": jnp.array([2.0, 8.0])}
    copied = [float(networks.periodic_copy(target, online, jnp.int32(count), 3)["a"][1]) for count in range(1, 8)]
    assert copied == [-4, -4, 8, -4, -4, 8, -4]
    always = networks.periodic_copy(target, online, jnp.int32(5), 1)
    np.testing.assert_array_equal(always["a"], online["a"])


# -- torsos -----------------------------------------------------------------------------------------------------------

IMAGE = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 5, 4)), jnp.float32)


def plain(layers):
    """The layers of an MLP in float64, as pairs of kernel and bias."""
    return [(np.float64(layers[f"kernel_{i}"][0]), np.float64(layers[f"bias_{i}"][0])) for i in range(len(layers) // 2)]


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_torso_of_vectors_and_matrices(shape):
    observation = np.random.default_rng(0).normal(size=(7, *shape))
    torso = Torso((8, 4))
    parameters = initialised(torso, jnp.asarray(observation, jnp.float32))
    hidden = observation.reshape(7, -1)
    for kernel, bias in plain(parameters["params"]["mlp"]["layers"]):
        hidden = np.maximum(hidden @ kernel + bias, 0)  # after the last layer too
    np.testing.assert_allclose(torso.apply(parameters, observation), hidden, rtol=1e-4, atol=1e-6)
    assert (hidden > 0).any()
    assert (hidden == 0).any()


def test_torso_without_hidden_layers_is_the_flat_observation():
    observation = jnp.arange(12, dtype=jnp.uint8).reshape(2, 2, 3)
    features, parameters = Torso(()).init_with_output(jax.random.key(0), observation)
    np.testing.assert_array_equal(features, np.arange(12.0).reshape(2, 6))
    assert features.dtype == jnp.float32
    assert not parameters


def test_convolution_is_one():
    module = Convolution(16)
    parameters = initialised(module, IMAGE)
    kernel, bias = parameters["params"]["kernel"], parameters["params"]["bias"]
    assert kernel.shape == (3, 3, 4, 16)
    assert np.abs(kernel).max() <= 36**-0.5
    assert np.abs(kernel).max() > 0.97 * 36**-0.5
    assert np.abs(bias).max() <= 36**-0.5
    expected = jax.lax.conv_general_dilated(IMAGE, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    outputs = module.apply(parameters, IMAGE)
    assert outputs.shape == (3, 4, 3, 16)
    np.testing.assert_allclose(outputs, expected + bias, rtol=1e-4, atol=1e-5)
    assert np.asarray(outputs).min() < 0


def test_torso_of_images_is_a_convolution_a_relu_and_the_layers():
    torso = Torso((8,))
    parameters = initialised(torso, IMAGE)
    filtered = np.float64(Convolution(16).apply({"params": parameters["params"]["convolution"]}, IMAGE))
    ((kernel, bias),) = plain(parameters["params"]["mlp"]["layers"])
    expected = np.maximum(np.maximum(filtered, 0).reshape(3, -1) @ kernel + bias, 0)
    np.testing.assert_allclose(torso.apply(parameters, IMAGE), expected, rtol=1e-4, atol=1e-5)
    without_layers = Torso(()).apply({"params": {"convolution": parameters["params"]["convolution"]}}, IMAGE)
    np.testing.assert_allclose(without_layers, np.maximum(filtered, 0).reshape(3, -1), rtol=1e-6)


# -- heads ------------------------------------------------------------------------------------------------------------


def test_duel_by_hand():
    value, advantage = jnp.array([[1.0, 2, 3]]), jnp.array([[[0.0, 1, 2], [1, 0, -1]]])
    outputs = networks.duel(value, advantage)
    np.testing.assert_array_equal(outputs, [[[0.5, 2.5, 4.5], [1.5, 1.5, 1.5]]])
    np.testing.assert_array_equal(outputs.mean(1), value)
    np.testing.assert_array_equal(networks.duel(value, advantage + jnp.array([5.0, -7, 0.5])), outputs)


@pytest.mark.parametrize("dueling", [False, True])
def test_action_head(dueling):
    head = ActionHead(6, 3, 4, dueling)
    parameters = initialised(head)

    def stream(name):
        (kernel, bias), (last_kernel, last_bias) = plain(parameters["params"][name]["layers"])
        assert kernel.shape == (5, 6)
        return np.maximum(np.float64(INPUTS) @ kernel + bias, 0) @ last_kernel + last_bias

    expected = np.zeros((7, 3, 4))
    for row in range(7):
        for action in range(3):
            expected[row, action] = stream("advantage")[row, 4 * action : 4 * action + 4]
    if dueling:
        mean = expected.mean(1)
        for action in range(3):
            expected[:, action] += stream("value") - mean
    assert ("value" in parameters["params"]) == dueling
    np.testing.assert_allclose(head.apply(parameters, INPUTS), expected, rtol=1e-4, atol=1e-5)


def test_at_action():
    outputs = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(networks.at_action(outputs, jnp.array([2, 0])), [[8, 9, 10, 11], [12, 13, 14, 15]])
    np.testing.assert_array_equal(networks.at_action(outputs[..., 0], jnp.array([1, 2])), [4, 20])
    gradient = jax.grad(lambda x: networks.at_action(x, jnp.array([1, 2])).sum())(outputs[..., 0])
    np.testing.assert_array_equal(gradient, [[0, 1, 0], [0, 0, 1]])


# -- implicit quantiles -----------------------------------------------------------------------------------------------


def test_cosines_by_hand():
    """With the identity as its layer, the embedding of .3 is the positive part of cos(pi i .3), i = 1 .. 4."""
    cosines = np.array([0.587785, -0.309017, -0.951057, -0.809017])
    module = CosineEmbedding(4, cosines=4)
    fractions = jnp.array([[0.3, 0.0, 0.3]])
    parameters = initialised(module, fractions)
    for sign in (1, -1):
        layers = {"kernel_0": sign * jnp.eye(4)[None], "bias_0": jnp.zeros((1, 4))}
        embedded = module.apply({"params": {"dense": {"layers": layers}}}, fractions)
        np.testing.assert_allclose(embedded[0, 0], np.maximum(sign * cosines, 0), atol=1e-6)
        np.testing.assert_array_equal(embedded[0, 0], embedded[0, 2])
    assert jax.tree.structure(parameters) == jax.tree.structure({"params": {"dense": {"layers": layers}}})


@pytest.fixture(scope="module")
def implicit():
    head = ImplicitQuantileHead(6, 3, cosines=8)
    fractions = jnp.asarray(np.random.default_rng(2).uniform(size=(7, 4)), jnp.float32)
    return head, jax.jit(head.init)(jax.random.key(0), INPUTS, fractions), fractions


def test_implicit_quantiles_equal_a_slow_reference(implicit):
    head, parameters, fractions = implicit
    ((embedding, embedding_bias),) = plain(parameters["params"]["embedding"]["dense"]["layers"])
    (kernel, bias), (last_kernel, last_bias) = plain(parameters["params"]["advantage"]["layers"])
    expected = np.zeros((7, 3, 4))
    for row in range(7):
        for index in range(4):
            waves = np.array([np.cos(np.pi * i * float(fractions[row, index])) for i in range(1, 9)])
            merged = np.float64(INPUTS[row]) * np.maximum(waves @ embedding + embedding_bias, 0)
            expected[row, :, index] = np.maximum(merged @ kernel + bias, 0) @ last_kernel + last_bias
    np.testing.assert_allclose(head.apply(parameters, INPUTS, fractions), expected, rtol=1e-4, atol=1e-5)


def test_fractions_do_not_mix(implicit):
    head, parameters, fractions = implicit
    order = np.array([2, 0, 3, 1])
    whole = np.asarray(head.apply(parameters, INPUTS, fractions))
    np.testing.assert_allclose(head.apply(parameters, INPUTS, fractions[:, order]), whole[:, :, order], rtol=1e-5)
    np.testing.assert_allclose(head.apply(parameters, INPUTS, fractions[:, :1]), whole[:, :, :1], rtol=1e-5)
    np.testing.assert_allclose(head.apply(parameters, INPUTS[2:3], fractions[2:3]), whole[2:3], rtol=1e-5, atol=1e-6)
    assert np.abs(np.diff(whole, axis=2)).max() > 1e-3


# -- noisy layers -----------------------------------------------------------------------------------------------------


def test_signed_root_by_hand_and_its_expectation():
    np.testing.assert_array_equal(networks._signed_root(jnp.array([0.25, -1, 4])), [0.5, -1, 2])
    np.testing.assert_allclose(networks._signed_root(jnp.array([-0.64, 1])), [-0.8, 1], rtol=1e-6)
    noise = networks._signed_root(jax.random.normal(jax.random.key(0), (200_000,)))
    assert (noise**2).mean() == pytest.approx(np.sqrt(2 / np.pi), abs=0.006)
    assert noise.mean() == pytest.approx(0, abs=0.01)


class Recorded(nn.Module):
    """Two noisy layers on the same inputs."""

    @nn.compact
    def __call__(self, inputs, noisy):
        return NoisyDense(2, name="one")(inputs, noisy), NoisyDense(2, name="two")(inputs, noisy)


def noisy_pair():
    """One layer's parameters given by hand to both."""
    layer = {
        "kernel": jnp.array([[1.0, 2], [3, 4], [5, 6]]), "bias": jnp.array([0.5, -0.5]),
        "kernel_noise": jnp.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), "bias_noise": jnp.array([0.7, 0.8]),
    }  # fmt: skip
    return {"params": {"one": layer, "two": layer}}, layer


def test_noisy_layer_equals_its_noisy_kernel(monkeypatch):
    """With e_in = (.25, -1, 4) and e_out = (-.64, 1): f(e_out) f(e_in) = [[-.4, .8, -1.6], [.5, -1, 2]]."""
    drawn = {(3,): jnp.array([0.25, -1, 4]), (2,): jnp.array([-0.64, 1])}
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: drawn[shape])
    _, layer = noisy_pair()
    inputs = INPUTS[:, :3]
    outer = np.array([[-0.4, 0.8, -1.6], [0.5, -1, 2]]).T
    kernel = layer["kernel"] + layer["kernel_noise"] * outer
    bias = layer["bias"] + layer["bias_noise"] * np.array([-0.8, 1])
    outputs = NoisyDense(2).apply({"params": layer}, inputs, True, rngs={"noise": jax.random.key(0)})
    np.testing.assert_allclose(outputs, inputs @ kernel + bias, rtol=1e-4, atol=1e-5)


def test_noise_is_the_layers_own_and_the_same_for_the_batch():
    parameters, layer = noisy_pair()
    inputs = jnp.stack([INPUTS[0, :3]] * 4)
    apply = jax.jit(lambda key: Recorded().apply(parameters, inputs, True, rngs={"noise": key}))
    one, two = apply(jax.random.key(0))
    np.testing.assert_array_equal(one, np.broadcast_to(one[0], one.shape))
    assert (one[0] != two[0]).all()  # equal parameters, other noise
    other, _ = apply(jax.random.key(1))
    assert (one[0] != other[0]).all()
    again, _ = apply(jax.random.key(0))
    np.testing.assert_array_equal(one, again)
    # Without noise: the mean weights, and no key is needed.
    for outputs in Recorded().apply(parameters, inputs, False):
        np.testing.assert_allclose(outputs, inputs @ layer["kernel"] + layer["bias"], rtol=1e-6)
    silent = jax.tree.map(jnp.array, parameters)
    for name in ("one", "two"):
        silent["params"][name] |= {"kernel_noise": jnp.zeros((3, 2)), "bias_noise": jnp.zeros(2)}
    for noisy, mean in zip(
        Recorded().apply(silent, inputs, True, rngs={"noise": jax.random.key(2)}),
        Recorded().apply(silent, inputs, False),
        strict=True,
    ):
        np.testing.assert_array_equal(noisy, mean)


def test_noise_has_the_deviation_it_should():
    """Of outputs: sum over inputs of (sigma x)^2 E[f^2]^2, plus sigma_b^2 E[f^2], where E[f^2] = sqrt(2 / pi)."""
    _, layer = noisy_pair()
    inputs, square = INPUTS[:1, :3], np.sqrt(2 / np.pi)
    keys = jax.random.split(jax.random.key(4), 20_000)
    draw = jax.vmap(lambda key: NoisyDense(2).apply({"params": layer}, inputs, True, rngs={"noise": key})[0])
    outputs = np.asarray(jax.jit(draw)(keys))
    kernel, bias = np.float64(layer["kernel_noise"]), np.float64(layer["bias_noise"])
    variance = square**2 * (np.float64(inputs[0])[:, None] ** 2 * kernel**2).sum(0) + square * bias**2
    np.testing.assert_allclose(outputs.var(0), variance, rtol=0.06)
    mean = inputs[0] @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(outputs.mean(0), mean, atol=4 * np.sqrt(variance.max() / 20_000))


def test_gradient_reaches_means_and_deviations():
    parameters, _ = noisy_pair()

    def loss(parameters):
        one, two = Recorded().apply(parameters, INPUTS[:, :3], True, rngs={"noise": jax.random.key(0)})
        return (one**2).sum() + (two**2).sum()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(parameters)):
        assert np.abs(gradient).min() > 0


def test_noisy_layer_starts_as_the_paper_has_it():
    parameters = NoisyDense(50, 0.4).init(jax.random.key(0), jnp.zeros((1, 100)), False)["params"]
    for name in ("kernel", "bias"):
        assert np.abs(parameters[name]).max() <= 0.1
        assert np.abs(parameters[name]).max() > 0.09
        np.testing.assert_allclose(parameters[f"{name}_noise"], np.full(parameters[name].shape, 0.4 / 10), rtol=1e-6)


def test_cosine_of_half_turns():
    x = np.linspace(-64, 64, 200_001).astype(np.float32)
    found = np.asarray(jax.jit(networks.cosine_of_half_turns)(x))
    np.testing.assert_allclose(found, np.cos(np.pi * x.astype(float)), atol=2e-7)
    np.testing.assert_array_equal(networks.cosine_of_half_turns(jnp.array([0.0, 1.0, 2.0, -3.0])), [1, -1, 1, -1])
    slope = jax.vmap(jax.grad(networks.cosine_of_half_turns))(jnp.array([0.3, 1.7, 10.25]))
    np.testing.assert_allclose(slope, -np.pi * np.sin(np.pi * np.array([0.3, 1.7, 10.25])), rtol=1e-5)


# -- memory -----------------------------------------------------------------------------------------------------------


def gru_and_inputs(steps=7, batch=4, inputs=3, width=5):
    keys = jax.random.split(jax.random.key(0), 4)
    memory, x = jax.random.normal(keys[0], (batch, width)), jax.random.normal(keys[1], (steps, batch, inputs))
    begins = jax.random.bernoulli(keys[2], 0.3, (steps, batch))
    parameters = GRU(width).init(keys[3], memory, x, begins)
    # No bias is 0, or none could be missed.
    return jax.tree.map(lambda x: x + 0.1 * (1 + jnp.arange(x.shape[-1])), parameters), memory, x, begins


def test_gru_is_flaxs_cell_step_by_step():
    """The cell of flax in a loop of Python, whose memory is put to 0 before the first step of an episode."""
    parameters, memory, inputs, begins = gru_and_inputs()
    assert 0 < np.mean(begins) < 1
    assert np.any(begins[0])
    found = jax.jit(GRU(5).apply)(parameters, memory, inputs, begins)
    ours = {name: np.split(np.asarray(x), 3, -1) for name, x in parameters["params"].items() if x.shape[-1] == 15}
    cell = {}
    for gate, name in enumerate("rzn"):
        cell[f"i{name}"] = {"kernel": ours["kernel"][gate], "bias": ours["bias"][gate]}
        cell[f"h{name}"] = {"kernel": ours["recurrent_kernel"][gate]}
    cell["hn"]["bias"] = parameters["params"]["recurrent_bias"]
    for step in range(7):
        memory = jnp.where(begins[step][:, None], 0, memory)
        memory, _ = nn.GRUCell(5).apply({"params": cell}, memory, inputs[step])
        np.testing.assert_allclose(found[step], memory, rtol=1e-5, atol=1e-6)


def test_gru_by_hand():
    """One number of memory, weights of 1 but a bias of ln 3 that makes z = 3/4 and a c of 2, and no input."""
    kernel, bias = np.zeros((1, 3), np.float32), np.log(np.array([1, 3, 1], np.float32))
    parameters = {"kernel": kernel, "bias": bias, "recurrent_kernel": kernel, "recurrent_bias": np.full(1, 2.0)}
    found = GRU(1).apply({"params": parameters}, np.full((1, 1), 0.8), np.zeros((2, 1, 1)), np.zeros((2, 1), bool))
    candidate = np.tanh(0.5 * 2)  # r = 1/2 of U h + c = 2
    first = candidate / 4 + 0.8 * 3 / 4
    np.testing.assert_allclose(found[:, 0, 0], [first, candidate / 4 + first * 3 / 4], rtol=1e-6)


def test_gradients_go_through_the_memory_and_stop_where_an_episode_begins():
    parameters, memory, inputs, _ = gru_and_inputs(batch=2)
    begins = jnp.zeros((7, 2), bool).at[4, 1].set(True)

    def last(memory, inputs):
        return GRU(5).apply(parameters, memory, inputs, begins)[-1].sum()

    of_memory, of_inputs = jax.jit(jax.grad(last, argnums=(0, 1)))(memory, inputs)
    assert np.abs(of_memory[0]).min() > 0
    assert not of_memory[1].any()
    assert np.abs(of_inputs[:, 0]).min() > 0
    assert not of_inputs[:4, 1].any()
    assert np.abs(of_inputs[4:, 1]).min() > 0


def test_every_gate_of_a_gru_starts_orthogonal():
    parameters = GRU(6).init(jax.random.key(0), jnp.zeros((1, 6)), jnp.zeros((1, 1, 400)), jnp.zeros((1, 1), bool))
    kernels = np.split(np.asarray(parameters["params"]["recurrent_kernel"]), 3, -1)
    for kernel in kernels:
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(6), atol=1e-5)
    assert not np.allclose(kernels[0], kernels[1])
    assert np.std(parameters["params"]["kernel"]) == pytest.approx(400**-0.5, rel=0.05)
    assert not parameters["params"]["bias"].any()
    assert not parameters["params"]["recurrent_bias"].any()
    with pytest.raises(AssertionError):
        GRU(6).apply(parameters, jnp.zeros((2, 6)), jnp.zeros((3, 2, 400)), jnp.zeros((3, 1), bool))

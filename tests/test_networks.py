import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import networks
from jaxrl_dist.networks import MLP, EnsembleMLP

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

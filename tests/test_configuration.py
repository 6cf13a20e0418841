import dataclasses
import types

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from toys import Toy, ToyParams

from jaxrl_dist.configuration import (
    ConfigurationError,
    Count,
    Fraction,
    Layers,
    Natural,
    NonNegative,
    Positive,
    Real,
    check_configuration,
    configuration,
    require,
)
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import continuous_action_size, discrete_action_count, factored_action_counts


@configuration
class Config:
    width: Count = 4
    delay: Natural = 0
    rate: Fraction = 0.25
    temperature: Positive = 1.0
    noise: NonNegative = 0.0
    offset: Real = -1.0
    hidden: tuple[int, ...] = (8, 8)
    streams: Layers = (8,)
    kind: str = "relu"
    options: tuple[str, ...] = ()
    fast: bool = False


# -- the pytree -------------------------------------------------------------------------------------------------------


def test_floats_are_leaves_and_all_else_is_static():
    config = Config(rate=0.1, offset=2.0)
    assert jax.tree.leaves(config) == [0.1, 1.0, 0.0, 2.0]
    doubled = jax.tree.map(lambda x: 2 * x, config)
    assert (doubled.rate, doubled.offset, doubled.hidden, doubled.kind) == (0.2, 4.0, (8, 8), "relu")
    assert jax.tree.structure(config) == jax.tree.structure(Config())
    for change in ({"width": 5}, {"hidden": (8,)}, {"kind": "tanh"}, {"fast": True}):
        assert jax.tree.structure(dataclasses.replace(config, **change)) != jax.tree.structure(config)


def test_is_a_frozen_dataclass():
    config = dataclasses.replace(Config(), width=7, rate=0.5)
    assert (config.width, config.rate, config.hidden) == (7, 0.5, (8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 0.1


def test_one_trace_serves_all_values_of_the_floats_and_an_integer_selects_another():
    traces = []

    @jax.jit
    def function(config):
        traces.append(config)
        return config.rate * config.width + config.offset

    assert float(function(Config(rate=0.5))) == 1.0
    assert float(function(Config(rate=0.75, noise=3.0))) == 2.0
    assert len(traces) == 1
    assert float(function(Config(rate=0.5, width=6))) == 2.0
    assert len(traces) == 2


def test_vmap_sweeps_a_float():
    rates = jnp.array([0.1, 0.2, 0.3])
    config = dataclasses.replace(Config(), rate=rates)
    axes = dataclasses.replace(jax.tree.map(lambda _: None, config, is_leaf=lambda x: x is rates), rate=0)
    values = jax.vmap(lambda config: config.rate * config.width + config.offset, in_axes=(axes,))(config)
    np.testing.assert_allclose(values, 4 * rates - 1)


# -- checks -----------------------------------------------------------------------------------------------------------


def test_accepts_the_edges_of_the_ranges_and_arrays_of_a_sweep():
    check_configuration(Config())
    check_configuration(Config(rate=0.0, noise=0.0, temperature=1e-30, delay=0, width=1, offset=-1e30))
    check_configuration(Config(rate=np.array([0.0, 1.0])))
    check_configuration(Config(hidden=(), streams=(1, 1, 1)))  # only some networks can do without a hidden layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "--width is 0; it must be a whole number in [1, 2147483647]"),
        ({"delay": -1}, "--delay is -1; it must be a whole number in [0, 2147483647]"),
        ({"rate": 1.5}, "--rate is 1.5; it must be finite and in [0, 1]"),
        ({"rate": -0.1}, "--rate is -0.1; it must be finite and in [0, 1]"),
        ({"rate": float("nan")}, "--rate is nan; it must be finite and in [0, 1]"),
        ({"temperature": 0.0}, "--temperature is 0.0; it must be finite and in (0, inf)"),
        ({"noise": float("inf")}, "--noise is inf; it must be finite and in [0, inf)"),
        ({"offset": float("-inf")}, "--offset is -inf; it must be finite"),
        ({"hidden": (8, 0)}, "--hidden is (8, 0); it must be whole numbers in [1, 2147483647]"),
        ({"streams": (8, 0)}, "--streams is (8, 0); it must be whole numbers in [1, 2147483647]"),
        ({"streams": ()}, "--streams is (); it must be whole numbers in [1, 2147483647]"),
    ],
)
def test_message_names_the_option_its_value_and_what_is_allowed(change, message):
    with pytest.raises(ConfigurationError) as error:
        check_configuration(Config(**change))
    assert str(error.value) == message


def test_one_bad_value_of_a_sweep_is_found():
    with pytest.raises(ConfigurationError, match=r"--rate is \[0\.5 2\. \]"):
        check_configuration(Config(rate=np.array([0.5, 2.0])))


def test_the_defaults_of_every_algorithm_are_allowed():
    from jaxrl_dist import cli
    from jaxrl_dist.running.problem import RunOptions, split_preset

    for name in cli.algorithms():
        module = cli.find_algorithm(name)
        for preset in ({}, *getattr(module, "PRESETS", {}).values()):
            of_the_run, of_the_algorithm = split_preset(preset)
            check_configuration(RunOptions(**of_the_run))
            check_configuration(module.Config(**of_the_algorithm))


def test_require():
    require(True, "never seen")
    with pytest.raises(ConfigurationError, match="two is three"):
        require(2 == 3, "two is three")
    assert issubclass(ConfigurationError, ValueError)


# -- what algorithms need ---------------------------------------------------------------------------------------------


def test_continuous_action_size():
    assert continuous_action_size(Toy(), ToyParams()) == 2


def toy(action_space=None, observation_space=None):
    env = Toy()
    return types.SimpleNamespace(
        name="Odd",
        action_space=lambda params: action_space or env.action_space(params),
        observation_space=lambda params: observation_space or env.observation_space(params),
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            gymnax.make("CartPole-v1"),
            "--env-id is CartPole-v1, whose actions are discrete; .* continuous",
        ),
        (
            gymnax.make("Pendulum-v1"),
            r"is Pendulum-v1, whose actions have shape \(1,\) and bounds -2 to 2;",
        ),
        ((toy(spaces.Box(-1, 1, ())), None), r"--env-id is Odd, whose actions have shape \(\)"),
        ((toy(spaces.Box(-1, np.array([1, 2]), (2,))), None), r"--env-id is Odd, .* bounds -1 to \[1.0, 2.0\]"),
        ((toy(None, spaces.Box(0, 1, (4, 4))), None), r"whose observations have shape \(4, 4\); .* needs vectors"),
    ],
)
def test_continuous_action_size_says_what_does_not_fit(env, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        continuous_action_size(*env)
    assert "\n" not in str(error.value)


def test_discrete_action_count():
    count = discrete_action_count(*gymnax.make("CartPole-v1"))
    assert (count, type(count)) == (2, int)
    for shape in ((3,), (4, 5), (6, 5, 4)):
        assert discrete_action_count(toy(spaces.Discrete(7), spaces.Box(0, 1, shape)), None) == 7


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (gymnax.make("Pendulum-v1"), "--env-id is Pendulum-v1, whose actions are continuous; .* a finite choice"),
        (
            (toy(spaces.Discrete(2), spaces.Box(0, 1, ())), None),
            r"whose observations have shape \(\); .* needs vectors",
        ),
        ((toy(spaces.Discrete(2), spaces.Box(0, 1, (1, 2, 3, 4))), None), r"have shape \(1, 2, 3, 4\); .* images"),
    ],
)
def test_discrete_action_count_says_what_does_not_fit(env, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        discrete_action_count(*env)
    assert "\n" not in str(error.value)


def of_choices(nvec, start=0):
    return types.SimpleNamespace(nvec=np.array(nvec), shape=np.shape(nvec), start=np.array(start))


def test_factored_action_counts():
    assert factored_action_counts(toy(of_choices([3, 2, 1])), None) == (3, 2, 1)
    several_bits = types.SimpleNamespace(n=4, shape=(4,))  # Gymnasium's MultiBinary
    assert factored_action_counts(toy(several_bits), None) == (2, 2, 2, 2)
    assert {type(count) for count in factored_action_counts(toy(of_choices([3])), None)} == {int}


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (gymnax.make("Pendulum-v1"), "is Pendulum-v1, whose actions are continuous; .* several choices at once"),
        (gymnax.make("CartPole-v1"), "is CartPole-v1, whose actions are discrete; .* several choices at once"),
        ((toy(of_choices([[3, 2]])), None), r"whose actions have shape \(1, 2\); .* a vector of choices"),
        ((toy(of_choices([])), None), r"whose actions have shape \(0,\); .* a vector of choices"),
        ((toy(of_choices([3, 0])), None), r"whose actions are of \[3, 0\] choices; .* at least one for each factor"),
        ((toy(of_choices([3, 2], [1, 1])), None), "whose actions begin at 1; .* numbered from 0"),
        ((toy(of_choices([3]), spaces.Box(0, 1, (4, 4))), None), r"observations have shape \(4, 4\); .* needs vectors"),
    ],
)
def test_factored_action_counts_says_what_does_not_fit(env, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        factored_action_counts(*env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((101, 100, 1000, 1), "--batch-size is 101; it must be at most --warmup-steps = 100"),
        ((50, 100, 99, 1), "--replay-capacity is 99; it must be at least --warmup-steps = 100"),
        ((50, 100, 1000, 101), "--num-envs is 101; it must be at most --warmup-steps = 100"),
        (
            (50, 100, 2**30, 1),
            "--replay-capacity is 1073741824, 1073741824 rows; at most 1073741823",
        ),
        ((100, 100, 100, 100), None),
    ],
)
def test_sizes_must_go_together(sizes, message):
    names = ("batch_size", "warmup_steps", "replay_capacity", "num_envs")
    config = Settings(**dict(zip(names, sizes, strict=True)))
    if message is None:
        config.check()
    else:
        with pytest.raises(ConfigurationError, match=message):
            config.check()

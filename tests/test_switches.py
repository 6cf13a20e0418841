"""JAX's global switches: a run under each of them, or a refusal by name."""

import contextlib
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import LearnerConfig, Toy, ToyParams, agents, at_home, make_learner

from jaxrl_dist import envs, switches
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.records import recording
from jaxrl_dist.running import doctor, problem, training
from jaxrl_dist.running.checkpointing import Checkpoints

SMALL = {
    "num_envs": 2, "warmup_steps": 16, "replay_capacity": 64, "batch_size": 4, "hidden": (4,), "actor_hidden": (4,),
    "critic_hidden": (4,), "discount": 0.5, "num_atoms": 5, "num_steps": 8, "num_minibatches": 2,
    "num_members": 2,
}  # fmt: skip


def small_train(name, env_id=""):
    """`train(key)` of a small agent on its own default environment, or another."""
    module, settings, *env = at_home(name)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    small = {field: value for field, value in SMALL.items() if field in fields}
    if name == "eta_dqn":  # its discount is that of its environment
        del small["discount"]
    return training.make_train(
        module.make_agent, module.Config(**settings | small), *(envs.make(env_id) if env_id else env),
        total_steps=64, evaluations=2, eval_episodes=2, eval_max_steps=5,
    )  # fmt: skip


def dtypes(tree) -> list:
    return [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]


# -- 64-bit numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "env_id"), [*((name, "") for name in agents()), ("c51", "bridge")])
def test_every_agent_traces_under_64_bits_and_stays_32_bit(name, env_id):
    with jax.enable_x64(True):
        found = dtypes(jax.eval_shape(small_train(name, env_id), jax.random.key(0)))
    assert set(found) <= {"float32", "int32", "uint32", "uint8", "bool", "key<fry>"}


def same(a, b) -> bool:
    plain = [jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree) for tree in (a, b)]
    return dtypes(a) == dtypes(b) and all(
        np.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.floating))
        for x, y in zip(*map(jax.tree.leaves, plain), strict=True)
    )


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/switches.py", "jaxrl_dist/learning", "algorithms")
@pytest.mark.parametrize(("name", "env_id"), [("dqn", "Catch-bsuite"), ("td3", "Pendulum-v1")])
def test_the_results_are_those_without_64_bits(name, env_id):
    train = small_train(name, env_id)
    expected = jax.jit(train)(jax.random.key(0))
    with jax.enable_x64(True):
        assert same(jax.jit(train)(jax.random.key(0)), expected)


def test_a_sweep_in_64_bits_is_narrowed():
    train = training.make_train(make_learner, LearnerConfig(), Toy(), ToyParams(), total_steps=20, evaluations=1)
    sweep = lambda rate: train(jax.random.key(0), LearnerConfig(learning_rate=rate))  # noqa: E731
    expected = jax.jit(jax.vmap(sweep))(jnp.array([0.1, 0.3], jnp.float32))
    with jax.enable_x64(True):
        rates = jnp.array([0.1, 0.3])
        assert rates.dtype == jnp.float64
        assert same(jax.jit(jax.vmap(sweep))(rates), expected)


def test_a_run_turns_64_bits_off_and_says_so():
    jax.config.update("jax_enable_x64", True)
    try:
        with pytest.warns(UserWarning, match="JAX_ENABLE_X64 is on; training computes in 32 bits, so it is turned off"):
            problem.prepare(
                "toy", make_learner, LearnerConfig(), problem.RunOptions(env_id="Pendulum-v1", total_steps=100)
            )
        assert not jax.config.jax_enable_x64
    finally:
        jax.config.update("jax_enable_x64", False)
    with jax.enable_x64(True), pytest.raises(ConfigurationError, match="leave that context"):
        switches.settle()


# -- a run under every other switch -----------------------------------------------------------------------------------


def run(mode="vmap"):
    """A small run: averages of its metrics `[runs, metrics]`, and its training."""
    programs = training.Programs(
        make_learner, LearnerConfig(), Toy(), ToyParams(shortest=9, longest=9), num_runs=2, runs_mode=mode,
        max_devices=1,
    )  # fmt: skip
    state = programs.begin(jax.vmap(jax.random.key)(jnp.arange(2)))
    state, averages = programs.take_metrics(programs.advance(state, 2))
    return np.asarray(averages), state


@contextlib.contextmanager
def switched(**values):
    before = {switch: getattr(jax.config, switch) for switch in values}
    try:
        for switch, value in values.items():
            jax.config.update(switch, value)
        yield
    finally:
        for switch, value in before.items():
            jax.config.update(switch, value)


@pytest.fixture(scope="module")
def expected():
    averages, state = run()
    assert np.isnan(averages).any()  # episodes of 9 steps: none has ended after 4 + 2
    assert np.isfinite(averages).any()
    return averages, state


@pytest.mark.parametrize(
    "names",
    [
        ("debug_nans", "debug_infs", "enable_checks", "enable_custom_prng"),
        ("check_tracer_leaks", "softmax_custom_jvp", "high_dynamic_range_gumbel"),
    ],
)  # fmt: skip
def test_switches_that_change_no_number(names, expected):
    # With JAX's own checks on, its reuse checker takes folding numbers into one key of several for using it twice.
    reuse = jax.config.jax_debug_key_reuse and "enable_checks" not in names
    with switched(**{f"jax_{name}": True for name in names}), jax.debug_key_reuse(reuse):
        assert same(run(), expected)


@pytest.mark.parametrize(
    ("switch", "value", "mode"),
    [
        ("jax_default_prng_impl", "rbg", "map"), ("jax_default_prng_impl", "unsafe_rbg", "vmap"),
        ("jax_threefry_partitionable", False, "vmap"),
    ],
)  # fmt: skip
def test_switches_that_change_random_numbers(switch, value, mode, expected, tmp_path):
    versions = recording.versions()
    with switched(**{switch: value}):
        averages, state = run(mode)
        assert (len(switches.changed(versions, recording.versions())), switches.changed(versions, versions)) == (1, [])
        Checkpoints(tmp_path).save(1, state)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        assert same(Checkpoints(tmp_path).load(1, like), state)
    assert averages.shape == expected[0].shape
    np.testing.assert_array_equal(np.isfinite(averages), np.isfinite(expected[0]))
    assert not same(state, expected[1])


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (lambda: jax.numpy_dtype_promotion("strict"), "JAX_NUMPY_DTYPE_PROMOTION is strict; it must be standard: "),
        (lambda: jax.numpy_rank_promotion("raise"), "JAX_NUMPY_RANK_PROMOTION is raise; it must be allow or warn: "),
        (lambda: jax.disable_jit(), "JAX_DISABLE_JIT is True; it must be False: "),
    ],
)
def test_what_no_run_can_bear_is_refused_by_name(context, message):
    options = problem.RunOptions(env_id="Pendulum-v1", total_steps=100)
    train = training.make_train(make_learner, LearnerConfig(), Toy(), ToyParams(), total_steps=20)
    assert not switches.refused()
    with context():
        assert any(said.startswith(message) for said in doctor.problems())
        for start in (
            lambda: problem.prepare("toy", make_learner, LearnerConfig(), options),
            lambda: training.Programs(make_learner, LearnerConfig(), Toy(), ToyParams(), num_runs=1),
            lambda: train(jax.random.key(0)),
        ):
            with pytest.raises(ConfigurationError) as error:
                start()
            assert str(error.value).startswith(message)
            assert "\n" not in str(error.value)


def test_the_pure_function_has_blanks_that_debug_nans_would_stop_on():
    train = training.make_train(make_learner, LearnerConfig(), Toy(), ToyParams(), total_steps=20)
    with jax.debug_nans(True), pytest.raises(ConfigurationError, match="JAX_DEBUG_NANS is on"):
        jax.eval_shape(train, jax.random.key(0))


# -- the record -------------------------------------------------------------------------------------------------------


def test_what_is_recorded_and_compared(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_z=1 --xla_force_host_platform_device_count=8 --xla_dump_to=x --xla_a=2")
    before = json.loads(json.dumps(recording.versions()))
    assert before["xla_flags"] == "--xla_a=2 --xla_z=1"
    assert set(switches.RECORDED) | set(switches.ALSO_FIXED) <= set(before)
    now = before | {"jax_default_prng_impl": "rbg", "matmul_precision": "highest", "jax": "later", "devices": 3}
    assert switches.changed(before, before) == []
    sentences = switches.changed(before, now)
    assert len(sentences) == 2
    assert sentences[0].startswith("jax_default_prng_impl is 'rbg', but the run was started with 'threefry2x32'; ")
    old = {name: value for name, value in before.items() if name not in switches.RECORDED}  # another version's record
    assert len(switches.changed(old, now)) == 1


def test_a_switch_that_this_jax_does_not_have_is_blank(monkeypatch):
    monkeypatch.setattr(jax, "config", types.SimpleNamespace())
    found = switches.recorded()
    assert set(found.values()) == {None, found["xla_flags"], found["threefry"]}
    assert switches.refused() == []

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams, live

from jaxrl_dist import envs
from jaxrl_dist.agent import Agent, Claim, Clock, memoryless
from jaxrl_dist.algorithms.actor_critic import tqc
from jaxrl_dist.configuration import ConfigurationError, Fraction, Positive, Real, configuration
from jaxrl_dist.distributional.law import equally_weighted
from jaxrl_dist.learning import experience
from jaxrl_dist.learning.interaction import average
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.running import evaluation, training

# -- a learner that compiles in no time -------------------------------------------------------------------------------


@configuration
class Config:
    learning_rate: Positive = 0.01
    break_at: Real = -1.0  # iteration whose loss is not finite


class State(NamedTuple):
    weights: jax.Array
    iteration: jax.Array
    experience: Any
    key: jax.Array


def make_learner(config, env, env_params) -> Agent:
    """Predicts rewards linearly, and acts by the same weights: short, yet it does all that an algorithm does."""

    def action(weights, observation):
        return jnp.tanh(observation[:, :2] * weights[:2])

    def init(key):
        key, weights_key, warmup_key = jax.random.split(key, 3)
        sizes = Settings(num_envs=2, warmup_steps=8, replay_capacity=32)
        filled = experience.warm_up(env, env_params, warmup_key, sizes, normalize=True)
        return State(jax.random.normal(weights_key, (3,)), jnp.int32(0), filled, key)

    def step(state):
        key, lived, metrics, batch = live(env, env_params, state, action)

        def loss(weights):
            return ((batch.observation @ weights - batch.reward) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(state.weights)
        iteration = state.iteration + 1
        value = jnp.where(iteration == config.break_at, jnp.inf, value)
        metrics |= {"loss": average(value), "iteration": average(iteration)}
        return State(state.weights - config.learning_rate * gradient, iteration, lived, key), metrics

    policy = memoryless(lambda state, observation, key: action(state.weights, observation))
    return Agent(init, step, policy, Clock(updates=1, env_steps=2, warmup_steps=8))


ENV, PARAMS = Toy(), ToyParams(shortest=3, longest=9, max_steps_in_episode=6)
RUNS, EPISODES, TOTAL_STEPS = 4, 3, 8 + 2 * 7
MODES = ["map", "vmap"]
SWEEP = Config(learning_rate=np.float32([0, 0.01, 0.01, 0.03]), break_at=np.float32([-1, 5, 2, -1]))


def keys():
    """Keys of training and of evaluation, new ones at every call since a test may use each only once."""
    return jax.vmap(training.run_keys)(jax.random.split(jax.random.key(0), RUNS))


def programs(mode, make_agent=make_learner):
    return training.Programs(make_agent, SWEEP, ENV, PARAMS, num_runs=RUNS, runs_mode=mode, eval_episodes=EPISODES)


def train_and_evaluate(chunks):
    training_keys, evaluation_keys = keys()
    state = chunks.advance(chunks.begin(training_keys), 5)
    return state, chunks.evaluate(state, evaluation_keys)


@pytest.fixture(scope="module")
def train():
    """The pure function, jitted; one compilation for all tests, so configurations come as arrays."""
    return jax.jit(
        training.make_train(
            make_learner, Config(), ENV, PARAMS, total_steps=TOTAL_STEPS, evaluations=2, eval_episodes=EPISODES
        )
    )


@pytest.fixture(scope="module", params=MODES)
def compiled(request):
    """Programs compiled ahead of time, and the number of times that each function of the agent was traced."""
    traces = Counter()

    def counted(config, env, env_params):
        agent = make_learner(config, env, env_params)

        def count(name, counted):
            def function(*arguments):
                traces[name] += 1
                return counted(*arguments)

            return function

        policy = agent.policy._replace(act=count("act", agent.policy.act))
        return agent._replace(init=count("init", agent.init), step=count("step", agent.step), policy=policy)

    chunks = programs(request.param, make_agent=counted)
    chunks.compile()
    return chunks, traces


def numbers(tree):
    """The leaves as numpy arrays, keys as their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in jax.tree.leaves(tree)]


def assert_same(one, other, exactly=True):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(numbers(one), numbers(other), strict=True):
        if exactly:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def run_of(tree, run):
    return jax.tree.map(lambda x: x[run], tree)


def assert_same_runs(one, other):
    """Equal bit for bit; of broken runs the learner alone, since what their replay gets is not said."""
    sound = np.flatnonzero((np.asarray(one.broken_at) < 0).all(1))
    assert len(sound) < RUNS, "a broken run is among them"
    assert_same(run_of(one, sound), run_of(other, sound))
    np.testing.assert_array_equal(one.state.weights, other.state.weights)
    np.testing.assert_array_equal(one.broken_at, other.broken_at)


# -- one run in pieces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
def test_every_seed_below_2_to_the_32_has_its_own_key(x64):
    with jax.enable_x64(x64):
        seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
        keys = jax.random.key_data(training.seed_keys(np.array(seeds)))
        np.testing.assert_array_equal(keys, [jax.random.key_data(jax.random.key(seed)) for seed in seeds])
    assert len(np.unique(keys, axis=0)) == len(seeds)


def test_advance_counts_averages_and_reports_the_first_iteration_that_broke():
    class Script(NamedTuple):
        iteration: jax.Array

    def step(state):
        time = state.iteration + 1
        return Script(time), {
            "whole": average(time),
            "every_third": average(10 * time, time % 3 == 0),
            "broken": average(jnp.where((time == 4) | (time == 6), jnp.nan, 1.0)),
            "never": average(time, time < 0),
        }

    agent = Agent(lambda key: Script(jnp.int32(0)), step, None, Clock(1, 7, 5))
    run = training.begin(agent, jax.random.key(0))
    names = training.metric_names(agent, run.state)
    assert names == ("broken", "every_third", "never", "whole")
    assert run.broken_at.tolist() == [-1] * 7
    advance = jax.jit(lambda run, iterations: training.advance(agent, run, run.iteration, iterations))

    run, averages = training.take_metrics(advance(run, 3))
    np.testing.assert_array_equal(averages, [1, 30, np.nan, 2])
    assert run.broken_at.tolist() == [-1] * 7
    run, averages = training.take_metrics(advance(run, 3))
    np.testing.assert_array_equal(averages, [np.nan] * 4, err_msg="nothing counts of a run that broke at once")
    assert run.broken_at.tolist() == [4, *[-1] * 6]  # the first time, not the latest
    assert int(run.iteration) == 6
    assert int(run.state.iteration) == 0, "put back to where it began"
    unchanged = advance(run, 0)
    assert_same(unchanged, run)


def test_a_clock_reaches_the_total_and_rejects_a_warm_up_without_training():
    clock = Clock(updates=3, env_steps=7, warmup_steps=5)
    assert [clock.iterations(total) for total in (6, 12, 13, 19, 20)] == [1, 1, 2, 2, 3]
    assert [clock.now(iteration) for iteration in (0, 1, 2)] == [5, 12, 19]
    assert (clock.unit, clock.updates_at(2), clock.interval(10), clock.interval(1)) == ("env steps", 6, 1, 1)
    with pytest.raises(ConfigurationError, match="--total-steps is 5; it must be above the 5 steps of the warm-up"):
        clock.iterations(5)


def test_a_clock_without_environment_steps_counts_updates():
    clock = Clock(updates=3)
    assert [clock.iterations(total) for total in (1, 3, 4, 30)] == [1, 1, 2, 10]
    assert [clock.now(iteration) for iteration in (0, 1, 10)] == [0, 3, 30]
    assert (clock.unit, clock.env_steps_at(10), clock.interval(10)) == ("updates", 0, 3)


def test_a_clock_takes_no_steps_while_it_pretrains():
    clock = Clock(updates=2, env_steps=4, warmup_steps=8, pretraining=10)
    assert [clock.env_steps_at(iteration) for iteration in (0, 9, 10, 11, 13)] == [8, 8, 8, 12, 20]
    assert [clock.updates_at(iteration) for iteration in (0, 10, 11)] == [0, 20, 22]
    assert [clock.iterations(total) for total in (9, 12, 13)] == [11, 11, 12]
    np.testing.assert_array_equal(clock.env_steps_at(jnp.array([3, 12])), [8, 16])


# -- many runs --------------------------------------------------------------------------------------------------------


def test_nothing_is_traced_after_compile_and_each_piece_once_by_it(compiled):
    chunks, traces = compiled
    # `step` is traced in `advance`, and for the names of the metrics once by itself and once in `begin`; `init` for
    # those names and in `begin`.
    expected = {"init": 2, "step": 3, "act": 1}
    assert traces == expected
    training_keys, evaluation_keys = keys()
    state = chunks.begin(training_keys)
    for iterations in (1, 3, 2):
        state = chunks.advance(state, iterations)
        state, _ = chunks.take_metrics(state)
        chunks.evaluate(state, jax.vmap(jax.random.fold_in, (0, None))(evaluation_keys, iterations))
    assert traces == expected


def test_chunks_do_not_matter(compiled):
    chunks, _ = compiled
    whole = chunks.advance(chunks.begin(keys()[0]), 7)
    parts = chunks.advance(chunks.advance(chunks.begin(keys()[0]), 3), 4)
    assert_same_runs(parts, whole)
    np.testing.assert_array_equal(whole.iteration, [7] * RUNS)


def test_evaluation_changes_nothing_and_is_reproducible(compiled):
    chunks, _ = compiled
    state = chunks.advance(chunks.begin(keys()[0]), 3)
    first = chunks.evaluate(state, keys()[1])
    second = chunks.evaluate(state, keys()[1])
    assert_same(first, second)
    assert first.episode_return.shape == (RUNS, EPISODES)
    assert len(np.unique(first.episode_return)) > RUNS * EPISODES / 2  # episodes and runs differ
    undisturbed = chunks.advance(chunks.begin(keys()[0]), 5)
    assert_same_runs(chunks.advance(state, 2), undisturbed)


def test_two_seeds_differ_in_their_first_parameters_and_their_first_action(compiled):
    chunks, _ = compiled
    begun = chunks.begin(keys()[0])
    for values in (begun.state.weights, begun.state.experience.replay.rows.action[:, 0]):
        values = np.asarray(values)
        assert all(np.abs(values[i] - values[j]).min() > 0 for i in range(RUNS) for j in range(i))


def test_agrees_with_the_pure_function(compiled, train):
    chunks, _ = compiled
    training_keys, evaluation_keys = keys()
    state, history = chunks.begin(training_keys), []
    for iterations, total in ((4, 4), (3, 7)):
        state, averages = chunks.take_metrics(chunks.advance(state, iterations))
        each = jax.vmap(jax.random.fold_in, (0, None))(evaluation_keys, total)
        history.append((averages, chunks.evaluate(state, each).episode_return))
    for run, key in enumerate(jax.random.split(jax.random.key(0), RUNS)):
        alone, alone_history = train(key, run_of(SWEEP, run))
        assert_same(run_of(state.state, run), alone, exactly=chunks.runs_mode == "map")
        assert alone_history["env_steps"].tolist() == [8 + 2 * 4, 8 + 2 * 7]
        for point, (averages, returns) in enumerate(history):
            expected = dict(zip(chunks.metric_names, np.asarray(averages[run]), strict=True))
            assert set(alone_history) == {*expected, "env_steps", "updates", "evaluation_return", "diverged_at"}
            for name, value in expected.items():
                np.testing.assert_allclose(alone_history[name][point], value, rtol=1e-4)
            np.testing.assert_allclose(alone_history["evaluation_return"][point], returns[run], rtol=1e-4)


def test_the_pure_function_vmaps_over_keys_and_over_floats(train):
    states, history = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(1), RUNS), SWEEP)
    assert history["evaluation_return"].shape == (RUNS, 2, EPISODES)
    assert history["loss"].shape == (RUNS, 2)
    for run, key in enumerate(jax.random.split(jax.random.key(1), RUNS)):
        assert_same(run_of(states, run), train(key, run_of(SWEEP, run))[0], exactly=False)
    # Over keys alone, with the configuration that it was made with.
    shapes, _ = jax.eval_shape(jax.vmap(train), jax.random.split(jax.random.key(1), 2))
    assert shapes.weights.shape == (2, 3)


def test_every_run_has_its_own_floats_and_a_broken_one_is_found(compiled):
    chunks, _ = compiled
    begun = chunks.begin(keys()[0])
    weights = np.asarray(begun.state.weights)
    state = chunks.advance(chunks.advance(begun, 3), 4)
    loss = chunks.metric_names.index("loss")
    assert state.broken_at[:, loss].tolist() == [-1, 5, 2, -1]
    assert np.delete(state.broken_at, loss, axis=1).max() == -1
    np.testing.assert_array_equal(state.state.weights[1:3], weights[1:3], err_msg="broken runs are put back")
    weights = weights[[0, 3]]
    state = jax.tree.map(lambda x: x[np.array([0, 3])], state)
    moved = np.abs(np.asarray(state.state.weights) - weights).max(1)
    assert moved[0] == 0 < moved[1:].min()  # run 0 has the learning rate 0


def test_the_given_training_is_consumed(compiled):
    chunks, _ = compiled
    begun = chunks.begin(keys()[0])
    chunks.advance(begun, 1)
    assert begun.state.experience.replay.rows.reward.is_deleted()


def test_one_run_is_its_part_of_every_array(compiled):
    chunks, _ = compiled
    state = chunks.begin(keys()[0]).state
    assert_same(training.one_run(state, 2), jax.tree.map(lambda x: x[2], state))
    with pytest.raises(IndexError, match=f"run is {RUNS}; this process holds no such run of {RUNS}"):
        training.one_run(state, RUNS)


def test_abstract_training_describes_what_begin_returns(compiled):
    chunks, _ = compiled
    begun = chunks.begin(keys()[0])
    abstract = chunks.abstract_training
    assert jax.tree.structure(abstract) == jax.tree.structure(begun)
    for shape, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(begun), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
        assert not leaf.aval.weak_type


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running/training.py", "jaxrl_dist/learning", "algorithms")
def test_two_devices_compute_what_one_does(compiled, tmp_path):
    script = """
import sys
import numpy as np, jax
import test_training as here
assert len(jax.devices()) == 2
path, mode = sys.argv[1:]
chunks = here.programs(mode)
state, episodes = here.train_and_evaluate(chunks)
assert chunks.num_devices == len(state.state.weights.sharding.device_set) == 2
np.savez(path, *here.numbers((state, episodes)))
for run in range(here.RUNS):
    weights = here.training.one_run(state.state.weights, run)
    assert len(weights.sharding.device_set) == 1
    np.testing.assert_array_equal(weights, np.asarray(state.state.weights)[run])
assert here.training.Programs(here.make_learner, here.Config(), here.ENV, here.PARAMS, num_runs=3).num_devices == 1
"""
    chunks, _ = compiled
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    path, exact = tmp_path / "two_devices.npz", chunks.runs_mode == "map"
    command = [sys.executable, "-c", script, str(path), chunks.runs_mode]
    subprocess.run(command, env=environment, check=True, timeout=300)
    assert chunks.num_devices == 1
    with np.load(path) as file:
        for one, name in zip(numbers(train_and_evaluate(chunks)), file.files, strict=True):
            np.testing.assert_allclose(file[name], one, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)


# -- calibration ------------------------------------------------------------------------------------------------------


@configuration
class Shifted:
    shift: Real = 0.0
    discount: Fraction = 0.5


def make_shifted(config, env, env_params) -> Agent:
    """Does nothing; predicts the true return of episodes that never end, plus a shift."""

    def target_policy(state, observation, key):
        return jnp.zeros((observation.shape[0], 2)), jnp.zeros(observation.shape[0])

    def predict(state, observation, action):
        # The reward at time t is t: sum of gamma^k (t + k) = t / (1 - gamma) + gamma / (1 - gamma)^2.
        gamma, time = config.discount, observation[:, 1:2]
        return equally_weighted(time / (1 - gamma) + gamma / (1 - gamma) ** 2 + config.shift)

    return Agent(
        lambda key: jax.random.uniform(key), lambda state: (state, {"loss": average(state)}),
        memoryless(lambda state, observation, key: target_policy(state, observation, key)[0]),
        Clock(updates=1, env_steps=2, warmup_steps=8), Claim(target_policy, predict, config.discount),
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_calibrate_compares_each_run_beyond_the_time_limit(mode):
    # Episodes of 1000 steps, cut after 20; the law of the first 20 steps alone would be off by more than .05.
    params, sweep = ToyParams(shortest=1000, longest=1000, max_steps_in_episode=20), np.float32([0, 0.5, -2, 3])
    chunks = training.Programs(
        make_shifted, Shifted(shift=sweep, discount=0.9), ENV, params, num_runs=RUNS, runs_mode=mode, eval_episodes=2,
        eval_states=3, eval_rollouts=5,
    )  # fmt: skip
    assert chunks.calibrates
    training_keys, evaluation_keys = keys()
    found = chunks.calibrate(chunks.begin(training_keys), evaluation_keys)
    assert found.overestimation.shape == (RUNS,)
    # Left out: less than a hundredth of the weight, of rewards that are a little above 44.
    left_out = 0.9 ** int(evaluation.horizon(0.9)) * (44 / 0.1 + 100)
    assert (found.overestimation >= sweep - 0.05).all()  # the environment's rewards are float16
    assert (found.overestimation <= sweep + left_out + 0.05).all()
    np.testing.assert_allclose(found.calibration_w1, np.abs(found.overestimation), rtol=1e-3, atol=1e-3)


def test_no_calibration_where_it_cannot_be_or_is_not_wanted():
    limits = {"eval_episodes": 2, "num_runs": 1, "eval_max_steps": 7}
    assert not training.Programs(make_shifted, Shifted(), ENV, PARAMS, eval_states=0, **limits).calibrates
    assert training.Programs(make_shifted, Shifted(), ENV, PARAMS, eval_states=1, **limits).calibrates


# -- a real algorithm -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running/training.py", "jaxrl_dist/learning", "algorithms/actor_critic/tqc.py")
def test_tqc_runs_in_map_mode_are_those_of_the_run_alone():
    config = tqc.Config(
        warmup_steps=8, batch_size=4, replay_capacity=64, actor_hidden=(16, 16), critic_hidden=(16, 16), num_critics=2,
        num_quantiles=5, quantiles_dropped=1,
    )  # fmt: skip
    env, env_params = envs.make("Pendulum-v1")
    sweep = dataclasses.replace(config, critic_learning_rate=np.array([1e-3, 1e-2, np.inf]), discount=np.full(3, 0.9))

    def of(config, mode, num_runs):
        return training.Programs(tqc.make_agent, config, env, env_params, num_runs=num_runs, runs_mode=mode)

    together = {}
    for mode in MODES:
        chunks = of(sweep, mode, 3)
        together[mode] = chunks.advance(chunks.begin(keys()[0][:3]), 20)
        watched = training.watched_names(chunks.metric_names)
        broken = dict(zip(watched, np.asarray(together[mode].broken_at).T.tolist(), strict=True))
        # The infinite step spoils the critics after the first loss was measured and before the actor sees them.
        assert broken["actor_loss"] == [-1, -1, 1]
        assert broken["critic_loss"] == [-1, -1, 2]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(together[mode].state.learner)), "put back"
    one = of(dataclasses.replace(config, discount=0.9), "map", 1)
    for run, rate in enumerate([1e-3, 1e-2]):
        one.configs = dataclasses.replace(one.configs, critic_learning_rate=jnp.array([rate], jnp.float32))
        alone = run_of(one.advance(one.begin(keys()[0][run : run + 1]), 20), 0)
        assert_same(run_of(together["map"], run), alone)
        assert_same(run_of(together["vmap"], run), alone, exactly=False)

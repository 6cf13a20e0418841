"""Several choices at once go through all that a run is: replay, evaluation, records, policies, data sets, Gymnasium."""

import contextlib
import dataclasses
import json

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxrl_dist import cli, envs
from jaxrl_dist.algorithms.value_based import decoupled_dqn
from jaxrl_dist.learning import datasets, portable
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.records import recording
from jaxrl_dist.running import collecting, evaluation, problem, session, training
from jaxrl_dist.running import gymnasium_evaluation as worlds

SMALL = decoupled_dqn.Config(
    num_envs=2, warmup_steps=32, batch_size=16, replay_capacity=64, hidden=(8, 8), learning_rate=1e-3,
    exploration_steps=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small run on the pendulum with five torques, and what was said."""
    options = problem.RunOptions(
        env_id="discretised/Pendulum-v1", env_options=("bins=5", "max_steps_in_episode=20"), num_seeds=2,
        total_steps=48, eval_episodes=3, eval_states=2, eval_rollouts=4, device="cpu", plots=False, name="run",
        runs_folder=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip
    prepared = problem.prepare("decoupled_dqn", decoupled_dqn.make_agent, SMALL, options)
    console = Console(record=True, width=300)
    return session.train(prepared, console), console.export_text()


def test_a_run_is_recorded_evaluated_and_calibrated(finished):
    folder, said = finished
    assert "48/48 env steps" in said
    evaluations = recording.read_evaluations(folder)
    assert np.isfinite(evaluations.episode_return).all()
    assert evaluations.episode_return.max() < 0
    metrics = recording.read_metrics(folder)
    assert np.isfinite(metrics[metrics.env_steps == 48].calibration_w1).all()
    assert json.loads((folder / "config.json").read_text())["options"]["env_id"] == "discretised/Pendulum-v1"


def test_the_replay_holds_whole_numbers_of_each_factor():
    env, params = envs.make("factored", factors=3)
    state = jax.eval_shape(decoupled_dqn.make_agent(SMALL, env, params).init, jax.random.key(0))
    action = state.experience.replay.rows.action
    assert (action.shape, action.dtype) == ((64, 3), jnp.int32)


def test_evaluation_follows_the_best_choice_of_each_factor():
    """A policy that is right everywhere is paid 1 a step; one that is right in every other factor a half."""
    env, params = envs.make("factored", factors=4, max_steps_in_episode=6, end_probability=0.0)

    def returns(shift):
        def act(state, observation, key):
            return ((env.places_of(observation) + jnp.array(shift)) % 3).astype(jnp.int32)

        agent = evaluation.Agent(None, None, evaluation_policy(act), None)
        found = evaluation.evaluate(agent, env, params, None, jax.random.key(0), episodes=5, max_steps=6)
        return np.asarray(found.episode_return)

    np.testing.assert_allclose(returns([0, 0, 0, 0]), 6)
    np.testing.assert_allclose(returns([0, 1, 0, 2]), 3)


def evaluation_policy(act):
    from jaxrl_dist.agent import memoryless

    return memoryless(act)


# -- policies ---------------------------------------------------------------------------------------------------------


def test_saved_policies_act_in_the_environment_s_units(finished):
    """Five torques from -2 to 2, in the file for numpy as in the program."""
    folder, _ = finished
    observations = np.random.default_rng(0).normal(0, 3, (200, 3)).astype(np.float32)
    path = folder / "policies" / "seed_0.npz"
    arrays = dict(np.load(path))
    assert (arrays["action_counts"].tolist(), arrays["action_low"], arrays["action_high"]) == ([5], -2, 2)
    rng = np.random.default_rng(1)  # of five torques an agent that has hardly learned takes one or two
    arrays["utilities_kernel"] = 9 * rng.normal(size=arrays["utilities_kernel"].shape).astype(np.float32)
    np.savez(folder / "other.npz", **arrays)
    torques = portable.load_policy(folder / "other.npz")(observations)
    assert torques.shape == (200, 1)
    assert {-2, -1, 0, 1, 2} >= set(np.unique(torques))
    assert len(np.unique(torques)) >= 3
    program = jax.export.deserialize(bytearray(path.with_suffix(".stablehlo").read_bytes()))
    np.testing.assert_allclose(np.asarray(program.call(observations)), portable.load_policy(path)(observations))


def test_a_program_gives_torques_for_bins():
    env, params = envs.make("discretised/Pendulum-v1", bins=5)
    bounds = problem.action_bounds(env, params)
    assert [x.tolist() for x in bounds] == [[-2], [2], [5]]
    act = lambda state, observation, key: observation[:, :1].astype(jnp.int32)  # noqa: E731
    agent = evaluation.Agent(None, None, evaluation_policy(act), None)
    program = jax.export.deserialize(bytearray(portable.export_program(agent, (), jnp.zeros(3), *bounds)))
    found = program.call(np.arange(5, dtype=np.float32)[:, None] * np.ones(3, np.float32))
    np.testing.assert_array_equal(found, [[-2], [-1], [0], [1], [2]])
    assert problem.action_bounds(*envs.make("factored")) == ()


# -- data sets --------------------------------------------------------------------------------------------------------


def test_a_run_s_policy_makes_data_that_fit(finished, tmp_path):
    folder, _ = finished
    source = collecting.of_run(folder, cli.find_algorithm, run_seed=0, explore=False)
    behaviour = collecting.Behaviour(random=(1.0, 1.0))
    collecting.write(source, tmp_path / "data.npz", behaviour, Console(quiet=True), episodes=3, seed=0)
    data = datasets.load(tmp_path / "data.npz")
    assert (data.action.shape, data.action.dtype) == ((60, 1), np.int32)
    assert set(np.unique(data.action)) == {0, 1, 2, 3, 4}
    datasets.require_of(data, source.env, source.env_params, tmp_path / "data.npz", "discretised/Pendulum-v1")
    with pytest.raises(ValueError, match=r"--noise is 0\.1; it is for continuous actions, and these are several"):
        collecting.check(source, collecting.Behaviour(noise=0.1))


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([[0, 2], [1, 0]], np.int32), None),
        (np.array([[0, 2], [2, 0]], np.int32), r"whose actions reach from 0 to 2; .* must lie in \[0, 2\] or less, "),
        (np.array([[0, -1], [1, 0]], np.int32), r"whose actions reach from -1 to 1; "),
        (np.array([[0, 2], [1, 0]], np.float32), "whose actions are float32; .* are whole numbers"),
        (np.array([0, 1], np.int32), r"whose actions have shape \(\); those of --env-id two have \(2,\)"),
    ],
)
def test_data_of_other_choices_are_refused(actions, message, tmp_path):
    """Two choices of the first factor, three of the second."""

    class Uneven(envs.factored.FactoredMDP):
        def action_space(self, params=None):
            return envs.factored.MultiDiscrete((2, 3))

    env = Uneven(2)
    seen, flags = np.zeros((2, 6), np.float32), np.array([False, True])
    data = Transition(seen, actions, np.zeros(2, np.float32), seen, flags, flags)
    datasets.save(tmp_path / "data.npz", data)
    expected = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with expected as error:
        datasets.require_of(data, env, env.default_params, tmp_path / "data.npz", "two")
    assert message is None or "\n" not in str(error.value)


# -- Gymnasium --------------------------------------------------------------------------------------------------------


class TwoDials(gymnasium.Env):
    """Two dials of two and three positions, read one-hot: a step pays a half for each that is named rightly."""

    action_space = gymnasium.spaces.MultiDiscrete([2, 3])
    observation_space = gymnasium.spaces.Box(0, 1, (5,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dials = self.np_random.integers([2, 3])
        return self._read(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action))
        reward = float((action == self.dials).mean())
        self.dials = self.np_random.integers([2, 3])
        return self._read(), reward, False, False, {}

    def _read(self):
        return np.concatenate([np.eye(2)[self.dials[0]], np.eye(3)[self.dials[1]]]).astype(np.float32)


gymnasium.register("TwoDials-v0", entry_point=TwoDials, max_episode_steps=8)


def saved(path, counts, kernel):
    """A policy file of one linear layer: `kernel` `[inputs, factors * choices]`."""
    inputs = kernel.shape[0]
    of = {"kernel": np.eye(inputs)[None], "bias": np.zeros((1, inputs))}
    parameters = {
        "input": of, "norm": {"scale": np.ones((1, inputs)), "bias": np.zeros((1, inputs))},
        "utilities": {"kernel": kernel[None], "bias": np.zeros((1, kernel.shape[1]))},
    }  # fmt: skip
    portable.save_policy(path, portable.factored_policy(parameters, counts))
    return path


def test_gymnasium_takes_several_choices_at_once(tmp_path):
    rightly = np.zeros((5, 6))
    rightly[[0, 1, 2, 3, 4], [0, 1, 3, 4, 5]] = 1
    rightly[:, 2] = 9  # the choice that the first dial has not
    path = saved(tmp_path / "two.npz", (2, 3), rightly)
    np.testing.assert_array_equal(worlds.evaluate_policy(path, "TwoDials-v0", episodes=3, seed=0), [8] * 3)
    rightly[[0, 1]] = rightly[[1, 0]]  # the first dial wrong
    path = saved(tmp_path / "half.npz", (2, 3), rightly)
    np.testing.assert_array_equal(worlds.evaluate_policy(path, "TwoDials-v0", episodes=3, seed=0), [4] * 3)


def test_other_choices_than_gymnasium_s_are_one_line(tmp_path):
    path = saved(tmp_path / "three.npz", (3, 3), np.zeros((5, 6)))
    with pytest.raises(ValueError, match=r"one of \[3, 3\] choices each, but the actions of TwoDials-v0 are Multi"):
        worlds.evaluate_policy(path, "TwoDials-v0", episodes=1, seed=0)
    path = saved(tmp_path / "cart.npz", (2,), np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"one of \[2\] choices each, but the actions of CartPole-v1 are Discrete"):
        worlds.evaluate_policy(path, "CartPole-v1", episodes=1, seed=0)


def test_a_run_with_bins_is_played_in_gymnasium_s_environment(finished):
    """By its torques, though Gymnasium knows no `discretised/Pendulum-v1`."""
    found = worlds.evaluate_run(finished[0], episodes=2, seed=0)
    assert (found.env_id, found.seeds) == ("Pendulum-v1", [0, 1])
    assert all((returns > -2000).all() and (returns < 0).all() for returns in found.gymnasium)


def test_a_sweep_of_runs_takes_them_side_by_side():
    """Programs of several runs, with another number of choices per factor."""
    env, params = envs.make("factored", factors=2, bins=4, states=4)
    config = dataclasses.replace(SMALL, learning_rate=1e-2)
    programs = training.Programs(
        decoupled_dqn.make_agent, config, env, params, num_runs=2, eval_episodes=4, max_devices=1
    )
    runs = programs.advance(programs.begin(jax.random.split(jax.random.key(0), 2)), 3)
    assert np.isfinite(np.asarray(programs.take_metrics(runs)[1])).any()

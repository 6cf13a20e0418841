"""One run split over eight devices is the run on one device, and each device does its part of the work only."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import run_with_devices

from jaxrl_dist.algorithms.actor_critic import sac, td3, tqc
from jaxrl_dist.algorithms.value_based import rainbow
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, session, training
from jaxrl_dist.running.checkpointing import Checkpoints

DEVICES = 8
COMMON = {"num_envs": 8, "warmup_steps": 64, "batch_size": 64, "updates_per_iteration": 2}
NETWORKS = {"actor_hidden": (32,), "critic_hidden": (32,)}
CASES = {
    "tqc": (tqc, COMMON | NETWORKS),
    "td3": (td3, COMMON | NETWORKS | {"steps_per_iteration": 2, "normalize_observations": True}),
    "rainbow": (rainbow, COMMON | {"hidden": (32,), "num_steps": 3, "v_min": 0.0, "v_max": 100.0}),
}
ITERATIONS = 3
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=264, num_seeds=2, eval_every=100, eval_episodes=3,
    eval_states=2, eval_rollouts=4, checkpoint_every=96, device="cpu", name="some",
)  # fmt: skip


def prepared(name: str, **changes) -> problem.Problem:
    module, fields = CASES[name]
    env_id = "CartPole-v1" if "value_based" in module.__name__ else "Pendulum-v1"
    options = dataclasses.replace(OPTIONS, env_id=env_id, **changes)
    return problem.prepare(name, module.make_agent, module.Config(**fields), options)


def trained(name: str, data_parallel: bool) -> tuple[training.Programs, training.Training, dict[str, np.ndarray]]:
    """Programs, and training with metrics and evaluation returns as numbers after a few iterations."""
    devices = "all" if data_parallel else "1"
    programs = session.make_programs(prepared(name, data_parallel=data_parallel, devices=devices))
    programs.compile()
    keys = jax.random.split(jax.random.key(0), OPTIONS.num_seeds)
    state = programs.advance(programs.begin(keys), ITERATIONS)
    state, averages = programs.take_metrics(state)
    found = {"metrics": averages, "returns": programs.evaluate(state, keys).episode_return}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found |= {jax.tree_util.keystr(p): jax.random.key_data(x) if is_key(x) else x for p, x in leaves}
    return programs, state, {name: np.asarray(x) for name, x in found.items()}


def compare(name: str) -> None:
    """Runs in a process that has eight devices."""
    assert jax.device_count() == DEVICES
    one, _, expected = trained(name, False)
    eight, state, found = trained(name, True)
    assert (one.num_devices, eight.num_devices) == (1, DEVICES)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-4, err_msg=key)

    observation = state.state.experience.interaction.observation
    assert {shard.data.shape[1] for shard in observation.addressable_shards} == {1}, "one environment per device"
    assert state.state.learner is not None
    for leaf in jax.tree.leaves(state.state.learner):
        assert leaf.is_fully_replicated
    # The compiler counts what one device does. The rest is what cannot be split: keys, optimizer, parameters.
    flops = [programs._advance.cost_analysis()["flops"] for programs in (one, eight)]
    assert flops[1] < 0.5 * flops[0], flops
    alone = training.one_run(state, 1)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(alone))
    for leaf, together in zip(jax.tree.leaves(alone.state.learner), jax.tree.leaves(state.state.learner), strict=True):
        np.testing.assert_array_equal(leaf, np.asarray(together)[1])


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running/training.py", "jaxrl_dist/learning", "algorithms")
@pytest.mark.parametrize("name", ["td3", "rainbow"])
def test_eight_devices_do_together_what_one_does(name):
    run_with_devices(DEVICES, f"import test_data_parallel; test_data_parallel.compare({name!r})")


def train_stop_and_resume(folder: str) -> None:
    """A data-parallel run with everything that belongs to it, stopped on eight devices and resumed on four."""
    save = Checkpoints.save

    def save_then_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        raise KeyboardInterrupt

    one = session.train(prepared("tqc", runs_folder=f"{folder}/one", devices="1"))
    Checkpoints.save = save_then_stop
    with pytest.raises(KeyboardInterrupt):
        session.train(prepared("tqc", runs_folder=f"{folder}/split", data_parallel=True))
    Checkpoints.save = save
    resumed = prepared("tqc", runs_folder=f"{folder}/split", data_parallel=True, devices="4", resume="latest")
    split = session.train(resumed)
    for file in ("learning_curve.png", "return_distribution.png", "policies/seed_1.npz", "policies/seed_0.stablehlo"):
        assert (split / file).is_file()
    expected, found = (recording.read_metrics(run) for run in (one, split))
    np.testing.assert_allclose(found.evaluation_return, expected.evaluation_return, rtol=0.02)
    np.testing.assert_array_equal(found.env_steps, expected.env_steps)
    np.testing.assert_allclose(found.critic_loss, expected.critic_loss, rtol=0.02)


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running", "jaxrl_dist/learning/devices.py")
def test_a_split_run_is_recorded_stopped_and_resumed_on_other_devices(tmp_path):
    run_with_devices(DEVICES, f"import test_data_parallel; test_data_parallel.train_stop_and_resume({str(tmp_path)!r})")


@pytest.mark.parametrize("field", ["num_envs", "batch_size"])
def test_rows_that_the_devices_do_not_divide(field, monkeypatch):
    monkeypatch.setattr(problem.jax, "device_count", lambda: 5)
    config = sac.Config(**{"num_envs": 5, "batch_size": 10, "warmup_steps": 20, field: 8})
    options = dataclasses.replace(OPTIONS, data_parallel=True)
    with pytest.raises(ConfigurationError, match=f"--{field.replace('_', '-')} is 8.* multiple of the 5 devices"):
        problem.prepare("sac", sac.make_agent, config, options)
    problem.prepare("sac", sac.make_agent, dataclasses.replace(config, **{field: 10}), options)

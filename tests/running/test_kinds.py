"""Agents without a replay, and agents that only ever see data, go through all that a run is: the contract suffices."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toys import run_with_devices

from jaxrl_dist import envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import datasets
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.reports import write
from jaxrl_dist.running import compatibility, evaluation, memory, problem, results, session, training
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.studies import study

OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), num_seeds=2, eval_episodes=3, eval_states=2, eval_rollouts=4,
    device="cpu", name="run",
)  # fmt: skip
KINDS = {
    "on_policy": types.SimpleNamespace(Config=kinds.OnPolicyConfig, make_agent=kinds.make_on_policy),
    "offline": types.SimpleNamespace(Config=kinds.OfflineConfig, make_agent=kinds.make_offline),
}
TOTALS = {"on_policy": 120, "offline": 60}  # env steps, updates

every_kind = pytest.mark.parametrize("kind", KINDS)


def written(path: Path, rows: int = 64) -> Path:
    """A dataset of a controller that pushes against the pendulum's velocity."""
    generator = np.random.default_rng(0)
    observation = generator.normal(size=(rows, 3)).astype(np.float32)
    ends = np.arange(rows) % 8 == 7
    datasets.save(
        path,
        Transition(observation, -observation[:, 2:].clip(-1, 1), -(observation[:, 2] ** 2), observation, ends, ~ends),
    )
    return path


def prepared(kind: str, folder: Path, **changes) -> problem.Problem:
    folder.mkdir(exist_ok=True)
    options = dataclasses.replace(OPTIONS, total_steps=TOTALS[kind], runs_folder=str(folder / "runs"))
    if kind == "offline":
        options = dataclasses.replace(options, dataset=str(written(folder / "data.npz")))
    module = KINDS[kind]
    return problem.prepare(kind, module.make_agent, module.Config(), dataclasses.replace(options, **changes))


def train(kind: str, folder: Path, **changes) -> tuple[Path, str]:
    console = Console(record=True, width=300)
    return session.train(prepared(kind, folder, **changes), console), console.export_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    places = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: train(kind, place) for kind, place in places.items()}


def test_an_agent_without_a_replay_is_planned_trained_and_recorded(finished):
    folder, said = finished["on_policy"]
    assert "120 env steps, 0 of them warm-up; 24 updates (0.166667 per env step)" in said
    assert "calibration  off: the algorithm claims nothing about returns" in said
    assert "120/120 env steps" in said
    assert "env steps/s and" in said
    metrics = recording.read_metrics(folder)
    assert metrics.groupby("seed").iteration.max().tolist() == [24, 24]
    assert metrics.env_steps.max() == 120
    assert (metrics[metrics.iteration <= 4].env_steps == 0).all(), "pretraining takes no steps"
    assert metrics[metrics.iteration == 1].shrunk.notna().all()
    assert metrics[metrics.iteration > 5].shrunk.isna().all()
    assert metrics[metrics.iteration > 5].weight.notna().all()
    assert recording.axis_of(metrics) == "updates", "env steps stand still while it pretrains"
    assert not (folder / "return_distribution.png").exists()


def test_an_offline_agent_is_counted_in_updates(finished):
    folder, said = finished["offline"]
    assert "60 updates, no env steps" in said
    assert "data.npz: 64 transitions, 64 ends of episodes" in said
    assert "60/60 updates" in said
    assert "env steps/s" not in said
    metrics = recording.read_metrics(folder)
    assert (metrics.env_steps == 0).all()
    assert metrics.updates.unique().tolist() == list(range(0, 61, 4))
    assert metrics.calibration_w1.notna().all()
    assert metrics.value_bound.isna().all()
    last = metrics[metrics.updates == 60]
    assert (last.loss < 0.5 * metrics[metrics.updates == 4].loss.to_numpy()).all()
    assert (folder / "return_distribution.png").is_file()


@every_kind
def test_killed_and_resumed_is_the_same_run(kind, finished, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_then_die(self, iteration, tree, about):
        save(self, iteration, tree, about)
        raise RuntimeError("killed")

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(RuntimeError):
        train(kind, tmp_path)
    monkeypatch.setattr(Checkpoints, "save", save)
    folder, said = train(kind, tmp_path, resume="latest")
    assert "resumed at iteration" in said
    for read in (recording.read_metrics, recording.read_evaluations):
        one, other = (read(each).drop(columns="seconds", errors="ignore") for each in (folder, finished[kind][0]))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


def test_other_data_under_the_same_name_is_refused_at_a_resume(tmp_path):
    train("offline", tmp_path)
    again = prepared("offline", tmp_path, resume="latest", total_steps=80)
    data = written(tmp_path / "data.npz", rows=72)
    with pytest.raises(ConfigurationError, match="whose contents are not those"):
        session.train(again, Console(quiet=True))
    written(data)
    assert "80/80 updates" in train("offline", tmp_path, resume="latest", total_steps=80)[1]


@every_kind
def test_policies_are_evaluated_exported_plotted_and_reported(kind, finished, tmp_path):
    folder, _ = finished[kind]
    find = lambda name, *_: KINDS[name]  # noqa: E731
    seeds, returns, _ = results.evaluate_run(folder, find, episodes=5, seed=0)
    assert (seeds.tolist(), returns.shape) == ([0, 1], (2, 5))
    assert np.isfinite(returns).all()
    run = results.load_run(folder, find, episodes=1)
    agent, state = run.problem.agent(), training.one_run(run.state.state, 0)
    program = jax.export.deserialize(bytearray((folder / "policies" / "seed_0.stablehlo").read_bytes()))
    observations = jnp.linspace(-1, 1, 15).reshape(5, 3)
    start = agent.policy.start(5)
    action, memory = agent.policy.act(state, observations, start, jax.random.key(0))
    exported = program.call(observations, *[jax.tree.leaves(start)] * bool(start))
    if start:
        exported, remembered = exported
        np.testing.assert_array_equal(remembered[0], memory["last"])
    np.testing.assert_allclose(exported, 2 * action, rtol=1e-5)  # Pendulum's own units
    assert (folder / "policies" / "seed_1.stablehlo").exists(), "without arrays to export, every seed has its program"

    figure = plotting.learning_curve({kind: recording.read_metrics(folder)}, tmp_path / "curve.png", title=kind)
    assert figure.axes[0].get_xlabel() == "updates"
    write.write([folder], tmp_path / "page.html", None, Console(quiet=True))
    page = (tmp_path / "page.html").read_text()
    assert "against updates" in page
    assert f"{24 if kind == 'on_policy' else 60} updates" in page


@every_kind
def test_a_study_ranks_configurations(kind, tmp_path):
    options = prepared(kind, tmp_path).options
    module, found = KINDS[kind], [{"learning_rate": rate} for rate in (0.0, 0.1, 0.2)]
    folder = study.train(kind, module.make_agent, module.Config(), options, found, Console(quiet=True))
    ranking = pd.read_csv(folder / "ranking.csv")
    assert sorted(ranking.configuration) == [0, 1, 2]
    assert np.isfinite(ranking.evaluation_return).all()
    assert (folder / "ranking.png").is_file()


def compare_on_two_devices(folder: str) -> None:
    """Data-parallel, environments are split and the rest is on both devices."""
    for kind in KINDS:
        found = []
        for changes in ({"devices": "1"}, {"data_parallel": True}):
            programs = session.make_programs(prepared(kind, Path(folder), **changes))
            state = programs.begin(jax.random.split(jax.random.key(0), 2))
            state = programs.advance(programs.pretrain(state, 4) if kind == "on_policy" else state, 5)
            found.append(state)
        for one, two in zip(*(jax.tree.leaves(state.state.weights) for state in found), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
        assert state.state.weights.is_fully_replicated
        if kind == "on_policy":
            observation = state.state.interaction.observation
            assert {shard.data.shape[1] for shard in observation.addressable_shards} == {1}


def test_two_devices_share_the_environments_of_a_run(tmp_path):
    run_with_devices(2, f"import test_kinds; test_kinds.compare_on_two_devices({str(tmp_path)!r})")


@every_kind
def test_the_pure_function_is_the_run(kind, finished, tmp_path):
    one = prepared(kind, tmp_path)
    train = training.make_train(
        one.make_agent, one.config, one.env, one.env_params, total_steps=TOTALS[kind], evaluations=3, eval_episodes=2
    )
    keys = training.seed_keys(np.arange(2))
    mapped = jax.jit(jax.vmap(train, in_axes=(0, None, *[None] * len(one.data))))
    states, history = mapped(keys, one.config, *one.data)
    weights = results.load_run(finished[kind][0], lambda name, *_: KINDS[name], episodes=1).state.state.weights
    np.testing.assert_allclose(states.weights, weights, rtol=1e-4, atol=1e-6)
    assert history["updates"][0].tolist() == {"on_policy": [8, 16, 24], "offline": [20, 40, 60]}[kind]


# -- what the toolkit does not read -----------------------------------------------------------------------------------


def test_data_is_an_argument_of_programs_and_no_part_of_states(tmp_path):
    programs = session.make_programs(prepared("offline", tmp_path))
    rows = 64 * 3
    sizes = [x.size for x in jax.tree.leaves(programs.abstract_training)]
    assert max(sizes) < rows
    assert all(np.size(x) < rows for x in programs.traces["advance"].jaxpr.consts)
    assert sum(x.size for x in jax.tree.leaves(programs.data)) >= 2 * rows
    shapes = [x.aval.shape for x in programs.traces["advance"].jaxpr.jaxpr.invars]
    assert (64, 3) in shapes


def test_the_data_is_named_where_it_takes_most(monkeypatch, tmp_path):
    one = prepared("offline", tmp_path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(ConfigurationError, match=r"data\.npz"):
        memory.require_room(one, session.make_programs(one), Console(quiet=True))


def test_a_dataset_is_asked_for_and_refused_by_name(tmp_path):
    module = KINDS["offline"]
    options = dataclasses.replace(OPTIONS, total_steps=10, runs_folder=str(tmp_path))
    for dataset, message in (("", "--dataset is missing"), (str(tmp_path / "no.npz"), "which does not exist")):
        with pytest.raises(ConfigurationError, match=message):
            problem.prepare(
                "offline", module.make_agent, module.Config(), dataclasses.replace(options, dataset=dataset)
            )
    given = dataclasses.replace(options, dataset=str(written(tmp_path / "data.npz")))
    with pytest.raises(ConfigurationError, match="this algorithm learns from none"):
        problem.prepare("on_policy", kinds.make_on_policy, kinds.OnPolicyConfig(), given)


def test_wide_matrices_are_run_one_after_another_unless_the_agent_says():
    env, params = envs.make("Pendulum-v1")

    def of(width: int, says: str | None = None) -> str:
        def make_agent(config, env, env_params):
            agent = kinds.make_on_policy(config, env, env_params)
            init = lambda key: agent.init(key)._replace(weights=jnp.zeros((width, width)))  # noqa: E731
            step = lambda state: (state, {})  # noqa: E731
            return agent._replace(init=init, step=step, pretrain=None, runs_mode=says)

        return training.Programs(make_agent, kinds.OnPolicyConfig(), env, params, num_runs=2).runs_mode

    assert [of(255), of(256), of(8, "map")] == ["vmap", "map", "map"]


def test_every_kind_is_in_the_matrix_of_support():
    env, params = envs.make("CartPole-v1")
    for kind, module in KINDS.items():
        assert compatibility.refusal(module, env, params) == "actions are discrete", kind
        assert compatibility.refusal(module, *envs.make("Pendulum-v1")) == ""


# -- memory and extras in evaluation ----------------------------------------------------------------------------------


def test_a_memory_begins_anew_with_every_episode():
    from kinds import OnPolicyConfig, make_on_policy

    env, params = envs.make("Pendulum-v1", max_steps_in_episode="5")
    agent = make_on_policy(OnPolicyConfig(), env, params)
    state = agent.init(jax.random.key(0))
    now, seen = state.interaction, []
    for time in range(11):
        action, memory = agent.policy.act(state, now.observation, now.memory, jax.random.key(0))
        now, lived, _ = jax.jit(lambda n, a, m, k: interact(env, params, agent, n, a, m, k))(
            now, action, memory, jax.random.key(time)
        )
        seen.append(np.asarray(now.memory["last"]))
        expected = np.where(np.asarray(lived.truncated)[:, None], 0, np.asarray(action))
        np.testing.assert_array_equal(seen[-1], expected)
    assert sum((each == 0).all() for each in seen) == 2


def interact(env, params, agent, now, action, memory, key):
    from jaxrl_dist.learning import interaction

    return interaction.step(env, params, now, action, key, memory, agent.policy.start)


class Costly:
    """Pendulum with a cost of 1 at every step and its reward in two parts."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, key, state, action, params):
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return observation, state, reward, terminated, truncated, info | {
            "cost": jnp.ones(()), "rewards": jnp.stack([reward, 2 * reward])
        }  # fmt: skip


def test_extras_go_with_transitions_and_are_summed_over_episodes():
    env, params = envs.make("Pendulum-v1", max_steps_in_episode="7")
    agent = kinds.make_on_policy(kinds.OnPolicyConfig(), Costly(env), params)
    state = agent.init(jax.random.key(0))
    found = evaluation.evaluate(agent, Costly(env), params, state, jax.random.key(1), episodes=4, max_steps=7)
    np.testing.assert_array_equal(found.extras["cost"], np.full(4, 7))
    np.testing.assert_allclose(found.extras["rewards"][:, 1], 2 * found.episode_return, rtol=1e-5)
    columns = evaluation.columns(jax.tree.map(lambda x: x[None], found.extras))
    assert sorted(columns) == ["cost", "rewards_0", "rewards_1"]
    np.testing.assert_allclose(columns["rewards_0"][0], found.episode_return, rtol=1e-5)


def test_a_claim_about_states_draws_first_actions_of_its_own():
    """V(s) of a policy that tosses a coin: -1 or 1 for one step, of an environment whose reward is the action."""
    from jaxrl_dist.agent import Claim
    from jaxrl_dist.distributional.law import equally_weighted
    from jaxrl_dist.envs.probe import CASES, Probe, ProbeParams

    env, params = Probe(), ProbeParams(case=CASES.index("action"))

    def policy(state, observation, key):
        return jnp.sign(jax.random.normal(key, (observation.shape[0], 1))), jnp.full(observation.shape[0], 0.25)

    def law(state, observation, action):
        return equally_weighted(jnp.zeros((observation.shape[0], 1)))

    spread = {}
    for of_states in (False, True):
        found = evaluation.return_distributions(
            Claim(policy, law, 0.5, of_states=of_states), env, params, None, jax.random.key(0), states=3, rollouts=64,
            horizon=3, spread=1,
        )  # fmt: skip
        spread[of_states] = np.asarray(found.monte_carlo).std(-1)
        assert found.predicted.atoms.shape == (3, 1)
    assert (spread[False] == 0).all()
    assert (spread[True] > 0).all()

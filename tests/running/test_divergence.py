"""A run that breaks costs itself: it is frozen, marked everywhere, and the others are what they are without it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toys import LearnerConfig, make_learner

from jaxrl_dist.agent import Claim
from jaxrl_dist.configuration import Fraction, configuration
from jaxrl_dist.learning.interaction import average
from jaxrl_dist.records import recording
from jaxrl_dist.running import problem, session, training
from jaxrl_dist.running.checkpointing import Checkpoints

CONFIG = LearnerConfig(replay_capacity=10_000)
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=408, num_seeds=3, eval_every=100, eval_episodes=2,
    eval_states=0, plots=False, device="cpu", name="run", runs_mode="map",
)  # fmt: skip
BREAKS_AT = 71  # past the first multiple of FREEZE_EVERY


def breaking(where: str, breaks_at: int = BREAKS_AT):
    """The toy learner, of which the runs that drew a negative action first break in one iteration."""

    def make_agent(config, env, env_params):
        agent = make_learner(config, env, env_params)

        def step(state):
            state, metrics = agent.step(state)
            time = (state.experience.replay.size - config.warmup_steps) // config.num_envs
            bad = (time == breaks_at) & (state.experience.replay.rows.action[0, 0] < 0)
            if where == "state":  # a metric would only show it one iteration later
                weights = jnp.where(bad, jnp.nan, state.weights)
                return state._replace(weights=weights), metrics | {"weight": average(jnp.float32(0))}
            weight = metrics["weight"]
            return state, metrics | {"weight": weight._replace(total=jnp.where(bad, jnp.inf, weight.total))}

        return agent._replace(step=step)

    return make_agent


def train(folder: Path, make_agent, **changes) -> tuple[Path, str]:
    console = Console(record=True, width=300)
    options = dataclasses.replace(OPTIONS, runs_folder=str(folder), **changes)
    return session.train(problem.prepare("toy", make_agent, CONFIG, options), console), console.export_text()


def learners(folder: Path, make_agent, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights `[runs, 1]` in a checkpoint, and those to which broken runs are put back."""
    programs = session.make_programs(problem.prepare("toy", make_agent, CONFIG, OPTIONS))
    like = {"training": programs.abstract_training, "seconds": jax.ShapeDtypeStruct((), np.float64)}
    found = Checkpoints(folder / "checkpoints").load(iteration, like)["training"]
    return np.asarray(found.state.weights), np.asarray(found.last_finite[0])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("sound"), make_learner)[0]


# A state that no metric shows is found at the next multiple of `FREEZE_EVERY`.
@pytest.mark.parametrize(("where", "breaks_at", "at"), [("weight", BREAKS_AT, BREAKS_AT), ("state", 126, 128)])
def test_the_others_go_on_as_if_nothing_had_happened(sound, tmp_path, where, breaks_at, at):
    folder, text = train(tmp_path, breaking(where, breaks_at))
    metrics, without = recording.read_metrics(folder), recording.read_metrics(sound)
    found = recording.divergences(metrics)
    broken = set(found.seed)
    assert 0 < len(broken) < 3, "some break and some do not"
    assert set(found.iteration) == {at}
    assert set(found.metric) == {where}
    assert f"{where} became NaN or infinite at iteration {at} in seed {min(broken)}: frozen" in text

    columns = ["iteration", "evaluation_return", "episode_return", "env_steps"]
    healthy = [table[~table.seed.isin(broken)].reset_index(drop=True) for table in (metrics, without)]
    pd.testing.assert_frame_equal(*(table[columns] for table in healthy), check_exact=True)
    assert healthy[0].diverged_at.isna().all()
    rows = metrics[metrics.seed.isin(broken)]
    assert rows[rows.iteration > at].diverged_at.notna().all()
    assert rows[rows.iteration <= at - 50].diverged_at.isna().all()
    assert rows[rows.iteration > at + 50].weight.isna().all(), "nothing is learned any more"
    assert np.isfinite(metrics.evaluation_return).all(), "the frozen learner is evaluated"
    assert len(metrics) == len(without)

    weights, kept = learners(folder, breaking(where), 200)
    before = np.asarray(sorted(broken))
    np.testing.assert_array_equal(weights[before], kept[before])
    assert np.isfinite(weights).all()
    for seed in range(3):
        with np.load(folder / "policies" / f"seed_{seed}.npz") as policy:
            np.testing.assert_array_equal(policy["weights"], weights[seed])


def test_a_frozen_run_is_put_back_to_the_last_multiple_of_iterations_wherever_it_is_interrupted(tmp_path):
    """The learner of iteration 64, whether the call in which it broke ended at once or much later."""
    env, env_params = (lambda p: (p.env, p.env_params))(problem.prepare("toy", make_learner, CONFIG, OPTIONS))
    agent = breaking("weight")(CONFIG, env, env_params)
    first_actions = {k: agent.init(jax.random.key(k)).experience.replay.rows.action[0, 0] for k in range(8)}
    number = next(k for k, action in first_actions.items() if action < 0)

    def of(cuts):
        run = training.begin(agent, jax.random.key(number))
        for first, last in zip([0, *cuts], cuts, strict=False):
            run = advance(run, last - first)
        return run

    advance = jax.jit(lambda run, iterations: training.advance(agent, run, run.iteration, iterations))
    at_64 = of([64])
    assert (at_64.broken_at < 0).all()
    for cuts in ([200], [BREAKS_AT, 200], [BREAKS_AT - 1, BREAKS_AT + 1, 130, 200]):
        run = of(cuts)
        assert run.broken_at.max() == BREAKS_AT
        np.testing.assert_array_equal(run.state.weights, at_64.state.weights, err_msg=str(cuts))


def test_all_runs_broken_ends_the_training_early(tmp_path):
    def make_agent(config, env, env_params):
        agent = make_learner(config, env, env_params)

        def step(state):
            state, metrics = agent.step(state)
            return state, metrics | {"weight": average(state.weights * jnp.nan)}

        return agent._replace(step=step)

    folder, text = train(tmp_path, make_agent)
    assert "all runs have diverged" in text
    metrics = recording.read_metrics(folder)
    assert metrics.env_steps.max() == 108, "the first evaluation after it"
    assert (metrics[metrics.env_steps == 108].diverged_at == 1).all()
    again = train(tmp_path, make_agent, resume="auto")[1]
    assert "all runs have diverged" in again


class BrokenRewards:
    """Pendulum whose rewards are NaN from the fifth step of an episode on."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, key, state, action, params):
        observation, state, reward, terminated, truncated, info = self.env.step(key, state, action, params)
        return observation, state, jnp.where(state.time > 4, jnp.nan, reward), terminated, truncated, info


@pytest.mark.parametrize("on_divergence", ["freeze", "stop"])
def test_evaluations_that_are_not_finite_are_watched_too(tmp_path, on_divergence):
    options = dataclasses.replace(OPTIONS, runs_folder=str(tmp_path), on_divergence=on_divergence)
    prepared = problem.prepare("toy", make_learner, CONFIG, options)
    prepared = prepared._replace(env=BrokenRewards(prepared.env))
    console = Console(record=True, width=300)
    if on_divergence == "stop":
        with pytest.raises(
            session.NonFiniteMetric, match="evaluation_return became non-finite at iteration 0 in run 0"
        ):
            session.train(prepared, console)
        folder = tmp_path / "toy" / "Pendulum-v1" / "run"
    else:
        folder = session.train(prepared, console)
        assert "evaluation_return became NaN or infinite at iteration 0 in seed 2" in console.export_text()
    metrics = recording.read_metrics(folder)
    assert (metrics.diverged_metric == "evaluation_return").all()
    assert metrics.evaluation_return.isna().all()


# -- values that cannot be ---------------------------------------------------------------------------------------------


def boasting(value: float):
    """The toy learner, which claims that states are worth `value`."""

    def make_agent(config, env, env_params):
        agent = make_learner(config, env, env_params)

        def step(state):
            state, metrics = agent.step(state)
            return state, metrics | {"value": average(jnp.float32(value)), "target": average(jnp.float32(0))}

        return agent._replace(step=step, claim=Claim(None, None, config.discount))

    return make_agent


@configuration
class Discounted(LearnerConfig):
    discount: Fraction = 0.9


@pytest.mark.parametrize(("value", "warned"), [(-200.0, True), (50.0, False)])
def test_values_beyond_what_rewards_and_discount_allow_are_said_once(tmp_path, value, warned):
    """Pendulum's costs are at most 16.3 and here at least 4: at a discount of 0.9 no value is beyond 163."""
    config = Discounted(replay_capacity=10_000)
    console = Console(record=True, width=300)
    options = dataclasses.replace(OPTIONS, runs_folder=str(tmp_path), total_steps=208, eval_every=50)
    folder = session.train(problem.prepare("toy", boasting(value), config, options), console)
    text = console.export_text()
    assert text.count("no policy can be worth more than") == warned
    if warned:
        assert "value is -200 at 58 env steps in seed" in text
    metrics = recording.read_metrics(folder)
    assert metrics.value_bound.between(40, 163).all()
    assert metrics.groupby("seed").value_bound.is_monotonic_increasing.all()

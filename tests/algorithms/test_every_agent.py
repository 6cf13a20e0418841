"""What holds for every agent, by two compiled programs each (`programs.py`) and a row of what is known (`cases.py`)."""

import dataclasses
import re
from pathlib import Path

import by_hand
import cases
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import proofs
import pytest

from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.envs.probe import CASES, Probe, ProbeParams
from jaxrl_dist.learning import networks, returns
from jaxrl_dist.learning.optimization import Trained
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.running import catalog
from jaxrl_dist.running.checkpointing import Checkpoints

AGENTS = [*catalog.agents()]
every_agent = pytest.mark.parametrize("name", AGENTS)
WITH_REPLAY = [name for name in AGENTS if cases.row(name).replay]
with_replay = pytest.mark.parametrize("name", WITH_REPLAY)
CRITICS = [name for name in WITH_REPLAY if not cases.row(name).world.num_actions]


def test_every_algorithm_is_tested():
    """An agent has a row; a method that is none has tests of its own; no row is of an algorithm that is gone."""
    assert set(cases.CASES) == set(AGENTS)
    here = Path(__file__).parent
    for name in set(catalog.algorithms()) - set(AGENTS):
        assert (here / f"test_{name}.py").is_file(), f"{name} has no tests"


# -- probe environments -----------------------------------------------------------------------------------------------

# Observations that occur in each case, where not 0 alone.
SEEN = {
    "observation": (-1, 1), "discounting": (0, 1), "action_observation": (-1, 1), "final_observation": (-1, 1)
}  # fmt: skip
# Bugs are worth 0.3 and more. A discrete action is right or wrong.
VALUE_TOLERANCE, ACTION_TOLERANCE = 0.1, 0.2


def probe_errors(name: str, built: programs.Programs, only_cases=CASES) -> dict[str, tuple[float, float]]:
    """Train: case -> largest error of the learned values and of the greedy actions, where that matters."""
    world = cases.row(name).world
    looks = jax.device_get(built.advance(built.begin(), cases.row(name).iterations)[2])
    seen, errors = world.observation[:, :1], {}
    probe = Probe(world.num_actions)
    for lane, case in enumerate(only_cases):
        rows = np.isin(seen[:, 0], SEEN.get(case, (0,)))
        params = ProbeParams(case=CASES.index(case))
        taken = [jnp.full(len(seen), one) for one in range(world.num_actions)]
        values = looks["value"][lane] if "value" in looks else np.zeros((0, len(seen)))
        if len(values) == 1:  # of the policy's own action, or of the state where that is the best one
            taken = [looks["action"][lane]]
        values_of = [probe.action_value(params, seen, action, cases.DISCOUNT) for action in taken[: len(values)]]
        expected = np.array(values_of).reshape(values.shape)
        # Of several choices at once each is the same one.
        action, best = (
            np.reshape(x, (len(seen), -1)) for x in (looks["action"][lane], probe.optimal_action(params, seen))
        )
        wrong = np.abs(action - best).max(-1)
        errors[case] = (
            np.abs(values - expected)[:, rows].max(initial=0), wrong[rows].max() if "action" in case else 0.0,
        )  # fmt: skip
    return errors


def failed(errors) -> set[str]:
    return {
        case for case, (value_error, action_error) in errors.items()
        if not (value_error < VALUE_TOLERANCE and action_error < ACTION_TOLERANCE)
    }  # fmt: skip


@every_agent
def test_probes(name):
    errors = probe_errors(name, programs.of(name))
    assert not failed(errors), errors


def failed_with(name: str, only_cases: tuple[str, ...], world=None, **settings) -> set[str]:
    return failed(probe_errors(name, programs.build(name, world, only_cases, **settings), only_cases))


def test_probes_over_three_steps(proof):
    agent = programs.build("rainbow", num_steps=3).agent(0)
    proof(proofs.program(agent.step, jax.eval_shape(agent.init, jax.random.key(0))))
    assert not failed_with("rainbow", CASES, num_steps=3)


@pytest.mark.parametrize("name", ["ddpg", "dqn"])
def test_probes_fail_without_a_discount(name, monkeypatch):
    plain = returns.n_step
    monkeypatch.setattr(returns, "n_step", lambda *window: plain(*window[:-1], 1.0))
    monkeypatch.setattr(returns, "bootstrap_discount", lambda gamma, terminated: 1.0 - terminated)
    assert failed_with(name, ("constant", "observation", "discounting", "time_limit")) == {"discounting", "time_limit"}


class MixesUpEpisodeEnds(Probe):
    """Two faults, seen by one case each: time limits reported as terminations, and successors taken after the reset."""

    def is_terminated(self, state, params):
        limit = (params.case == CASES.index("time_limit")) & (state.time >= params.max_steps_in_episode)
        return super().is_terminated(state, params) | limit

    def step(self, key, state, action, params):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, reward, terminated, truncated, info | {"final_observation": observation}


@pytest.mark.parametrize("name", ["ddpg", "dqn"])
def test_probes_fail_where_episode_ends_are_mixed_up(name):
    world = cases.row(name).world
    world = world._replace(env=MixesUpEpisodeEnds(world.num_actions))
    only_cases = ("constant", "action", "time_limit", "final_observation")
    assert failed_with(name, only_cases, world) == {"time_limit", "final_observation"}


def test_probes_fail_where_the_action_is_ignored(monkeypatch):
    monkeypatch.setattr(networks, "at_action", lambda outputs, action: outputs[:, 0])
    only_cases = ("constant", "discounting", "action", "action_observation")
    assert failed_with("dqn", only_cases) == {"action", "action_observation"}


# -- lanes ------------------------------------------------------------------------------------------------------------

LATE = 40
"""Iterations after which targets were copied and exploration has fallen."""


@pytest.fixture(scope="module")
def lived():
    """Of an agent: its programs, and the states of all lanes at the start, after an iteration and after 40, with the
    metrics of these. The last agent's are kept."""
    kept = {}

    def of(name: str) -> tuple:
        if name not in kept:
            kept.clear()
            built = programs.of(name)
            start = built.begin()
            once, late = built.advance(start, 1), built.advance(start, LATE)
            states = start, once[0], late[0]
            # Keys as numbers, so that all leaves are arrays of numpy.
            kept[name] = built, *jax.device_get([numbered(state) for state in states]), jax.device_get(late[1])
        return kept[name]

    return of


def numbered(tree):
    def numbers(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(numbers, by_hand.with_fresh_keys(tree))


@every_agent
def test_every_float_does_what_it_says(name, lived):
    """That the critic does not feel the actor's step size, and nobody the temperature's, is isolation of gradients."""
    built, _, once, late, _ = lived(name)
    row = cases.row(name)
    assert row.feels.keys() >= set(built.floats) - set(row.dead), "the row does not say who feels what"
    everything = set(programs.parts(name, once))
    for one in built.floats:
        felt = programs.differing(name, once, built.base, built.lane(one))
        felt_late = programs.differing(name, late, built.base, built.lane(one))
        if one in row.dead:
            assert not felt_late, one
            continue
        expected = row.feels[one]
        never = everything - expected.must if "others" in expected.never else expected.never
        assert expected.must <= felt, (one, felt)
        assert not never & felt, (one, felt)
        assert felt_late, one


@every_agent
def test_runs_depend_on_their_key_alone(name, lived):
    built, start, _, late, _ = lived(name)
    twice, other = built.base + 1, built.base + 2
    for state in (start, late):
        for leaf in jax.tree.leaves(state):
            np.testing.assert_array_equal(leaf[built.base], leaf[twice])
    # Another key: other weights everywhere, and other actions from the first one on. Some biases start at 0, and
    # Rainbow's noise starts alike.
    weights = [
        (path, leaf) for path, leaf in jax.tree.leaves_with_path(learned(start.learner))
        if re.search("kernel|bias", jax.tree_util.keystr(path)) and "noise" not in jax.tree_util.keystr(path)
    ]  # fmt: skip
    assert len(weights) >= 6
    for path, leaf in weights:
        assert ((leaf[built.base] != leaf[other]) | (leaf[built.base] == 0)).all(), path
        assert leaf.any() or "bias" in jax.tree_util.keystr(path), path
    if name not in WITH_REPLAY:
        return
    actions = start.experience.replay.rows.action
    size = start.experience.replay.size[0]
    assert (actions[built.base, :size] != actions[other, :size]).mean() > 0.2


@every_agent
def test_going_on_from_a_file_is_one_longer_run(name, lived, tmp_path):
    """All lanes, with all that a state has in it, bit for bit."""
    built, _, _, late, _ = lived(name)
    once, checkpoints = built.advance(built.begin(), 1)[0], Checkpoints(tmp_path / "states")
    checkpoints.save(1, once)
    state = built.advance(checkpoints.load(1, once), LATE - 1)[0]
    for one, other in zip(*map(jax.tree.leaves, (numbered(state), late)), strict=True):
        np.testing.assert_array_equal(one, other)


def learned(learner) -> dict:
    if isinstance(learner, Trained):
        return {"network": learner.parameters}
    return {name: node.parameters for name, node in learner._asdict().items() if isinstance(node, Trained)}


@every_agent
def test_state_keeps_its_structure_and_counts_are_right(name, lived):
    built, start, _, late, metrics = lived(name)
    row, config, agent = cases.row(name), built.config, built.agent(built.base)
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    after, _ = jax.eval_shape(agent.step, shapes)
    assert jax.tree.structure(after) == jax.tree.structure(shapes)
    for one, other in zip(jax.tree.leaves(shapes), jax.tree.leaves(after), strict=True):
        # A weak type would make a jitted step compile twice.
        assert (one.shape, one.dtype, one.weak_type, other.weak_type) == (other.shape, other.dtype, False, False)

    for leaf in jax.tree.leaves((late, metrics)):
        assert not np.issubdtype(leaf.dtype, np.floating) or np.isfinite(leaf).all()

    updates = agent.clock.updates
    if name in WITH_REPLAY:
        check_counts_with_a_replay(row, config, agent, start, late)
    assert set(metrics) == set(row.metrics.split())
    steps = agent.clock.env_steps * LATE
    for metric in metrics.values():
        assert metric.total.shape == metric.count.shape == built.case.shape
        assert metric.total.dtype == metric.count.dtype == np.float32
    assert (metrics["critic_loss" if "critic_loss" in metrics else "loss"].count == updates * LATE).all()
    assert steps == 0 or (metrics["episode_length"].count <= steps).all()
    # What soft agents add to rewards is said too, or their values could not be held against what is possible.
    assert ("largest_bonus" in metrics) == ("temperature" in metrics)
    if "temperature" in metrics:
        assert (metrics["largest_bonus"].total > 0).all()


def check_counts_with_a_replay(row, config, agent, start, late) -> None:
    updates = config.updates_per_iteration
    assert (agent.clock.env_steps, agent.clock.updates) == (6, updates)
    assert agent.clock.warmup_steps == 384  # 383 rounded up to whole steps of two environments
    assert (start.experience.replay.size == 384).all()
    assert (late.experience.replay.size == 384 + 6 * LATE).all()
    assert start.experience.replay.rows.reward.shape[1:] == (6000,)
    assert start.experience.interaction.observation.shape[1:3] == (2, row.world.observation.shape[1])
    if row.world.num_actions:
        assert start.experience.replay.rows.action.dtype == np.int32
    if hasattr(late, "env_steps"):
        assert (late.env_steps == 384 + 6 * LATE).all()
    if hasattr(late.learner, "updates"):
        assert (late.learner.updates == updates * LATE).all()
    for part, node in late.learner._asdict().items():
        if isinstance(node, Trained) and (count := optax.tree_utils.tree_get(node.optimizer, "count")) is not None:
            of_the_critic = part in ("critic", "network")
            delay = 1 if of_the_critic else getattr(config, "policy_delay", 1)
            assert (count == updates * LATE // delay).all(), part


@pytest.mark.parametrize("name", CRITICS)
def test_statistics_are_those_of_all_that_was_seen(name, lived):
    built, _, _, late, _ = lived(name)
    statistics, replay = late.experience.normalizer, late.experience.replay
    for lane in (built.base, CASES.index("discounting")):
        seen = replay.rows.observation[lane, : replay.size[lane]]
        assert statistics.count[lane] == replay.size[lane]
        np.testing.assert_allclose(statistics.mean[lane], seen.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(statistics.variance[lane], seen.var(0), rtol=1e-3, atol=1e-6)


@with_replay
def test_targets_start_as_copies_and_are_copied_when_due(name, lived):
    built, start, once, _, _ = lived(name)
    online = learned(start.learner)
    targets = {part: tree for part, tree in start.learner._asdict().items() if part.startswith("target_")}
    assert targets
    for part, tree in targets.items():
        jax.tree.map(np.testing.assert_array_equal, tree, online[part.removeprefix("target_")])
    if not hasattr(built.config, "target_period"):  # they follow, by how much is seen in the tests of whole updates
        for part in targets:
            assert differ(getattr(once.learner, part), targets[part])
        return
    if hasattr(built.config, "sync_period"):  # a chain moves on at both: see its own tests
        return
    period = built.config.target_period
    before, due, after = (
        jax.device_get(built.advance(built.begin(), iterations)[0].learner)
        for iterations in (period - 1, period, period + 1)
    )
    if "polyak" in built.floats:  # a copy but in the lane where it only goes a part of the way
        before, due, after, targets = jax.tree.map(
            lambda x: np.delete(x, built.lane("polyak"), axis=0), (before, due, after, targets)
        )
    for part in targets:
        of = part.removeprefix("target_")
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), targets[part])
        assert differ(getattr(before, part), getattr(before, of).parameters)
        jax.tree.map(np.testing.assert_array_equal, getattr(due, part), getattr(due, of).parameters)
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(due, part))


def differ(one, other) -> bool:
    return any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))


# -- the end of an episode --------------------------------------------------------------------------------------------


@with_replay
def test_targets_bootstrap_at_a_truncation_and_not_at_a_termination(name):
    """A replay full of one transition, in four lanes with other flags: what the mean target is."""
    built = programs.of(name)
    state = built.begin()
    # Three lanes of one configuration and one key, and one more that is made the same.
    lanes = [built.base, built.base + 1, built.base + 2, built.base + 3]
    flags = [(True, False), (True, True), (False, True), (False, False)]  # terminated, truncated
    state = jax.tree.map(lambda x: x.at[jnp.array(lanes[2:])].set(x[built.base]), state)
    state = by_hand.with_fresh_keys(state)
    rows = state.experience.replay.rows
    row = jax.tree.map(lambda x: x[built.base, 100], rows)
    reward = float(row.reward)
    assert abs(reward) == 1
    for lane, (terminated, truncated) in zip(lanes, flags, strict=True):
        full = row._replace(terminated=jnp.bool_(terminated), truncated=jnp.bool_(truncated))
        rows = jax.tree.map(lambda x, one, lane=lane: x.at[lane].set(one), rows, full)
    replay = state.experience.replay._replace(rows=rows, size=jnp.full_like(state.experience.replay.size, 6000))
    state = cases.row(name).old_rows(state._replace(experience=state.experience._replace(replay=replay)))
    # The configuration of the fourth lane is that of the others.
    configs = jax.tree.map(lambda x: x.at[lanes[3]].set(x[built.base]), built.configs)
    target = jax.device_get(built.advance(state, 1, configs)[1]["target"])
    targets = (target.total / target.count)[lanes]
    # In units of the environment's rewards, whatever an agent learns from.
    np.testing.assert_allclose(targets[:2], reward, rtol=1e-4)
    assert targets[2] == targets[3]
    assert abs(targets[2] - reward) > 1e-3
    if not cases.row(name).draws:  # the target's networks are still those that act and predict
        agent, successor = built.agent(built.base), row.next_observation[None]
        lane = jax.tree.map(lambda x: x[built.base], state)
        action = agent.policy.act(lane, successor, (), jax.random.key(0))[0]
        value = float(law.mean(agent.claim.law(lane, successor, action))[0])
        assert abs(value) > 1e-3
        assert targets[2] == pytest.approx(reward + cases.DISCOUNT * value, abs=2e-3)


# -- the settings of the loop, and fields that are no floats -----------------------------------------------------------


@with_replay
def test_an_iteration_has_its_steps_and_updates(name):
    built = programs.build(name, steps_per_iteration=5, updates_per_iteration=8)
    agent = built.agent(built.base)
    step = jax.make_jaxpr(agent.step)(jax.eval_shape(agent.init, jax.random.key(0))).jaxpr
    lengths = [equation.params["length"] for equation in step.eqns if equation.primitive.name == "scan"]
    assert lengths == [5, 8 // getattr(built.config, "policy_delay", 1)]
    assert (agent.clock.env_steps, agent.clock.updates) == (10, 8)


OTHERS = {
    "hidden": (9, 7), "actor_hidden": (9, 7), "critic_hidden": (9, 7), "bandwidths": (1.0, 4.0), "risk": "cvar:0.3",
    "kernel": "energy", "target_weights": "equal", "utility": "target", "head": "squashed", "best_percent": 50,
    "score": "positive_value_loss", "critic": "quantile", "annealing_steps": 50, "actor_decay_updates": 50,
    "iqn_target": "greedy", "behaviour": "ros", "bonus_count": "rate", "base": "iqn", "channels": "none",
    "mapping": "log",
    "optimizer": "adam",
    "num_members": 1,
    "target_policy": "uniform", "guide": "cd", "roll_in": "reference",
}  # fmt: skip


@every_agent
def test_every_other_field_changes_the_program(name):
    """Of those that the file adds; the settings of the loop are seen in the states."""
    built = programs.of(name)
    row, algorithm, config = cases.row(name), cases.module(name), built.config

    def program(config):
        data = (row.data(row.world, jnp.int32(0)),) if row.data else ()
        agent = algorithm.make_agent(config, row.world.env, row.world.params(config, jnp.int32(0)), *data)
        return str(jax.make_jaxpr(lambda key: agent.step(agent.init(key)))(jax.random.key(0)))

    def other(field):
        value = getattr(config, field)
        if field == "activation":
            return "relu" if value == "gelu" else "gelu"
        if field in OTHERS:
            return OTHERS[field]
        if field == "policy_delay":  # which divides the updates of an iteration
            return 1
        return not value if isinstance(value, bool) else 2 * value

    original = program(config)
    assert program(config) == original  # the text depends on nothing but the program
    of_the_loop = {field.name for field in dataclasses.fields(Settings)} - {"batch_size"}
    fields = {field.name for field in dataclasses.fields(config)} - {*built.floats, *row.dead} - of_the_loop
    assert "batch_size" in fields or not cases.row(name).replay
    for field in fields:
        assert program(dataclasses.replace(config, **{field: other(field)})) != original, field


# -- bad input --------------------------------------------------------------------------------------------------------


@with_replay
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 400}, "--batch-size is 400; it must be at most --warmup-steps = 383"),
        ({"replay_capacity": 382}, "--replay-capacity is 382; it must be at least --warmup-steps = 383"),
        ({"num_envs": 384}, "--num-envs is 384; it must be at most --warmup-steps = 383"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        programs.build(name, **settings).agent(0)


class Pixels(by_hand.Drift):
    def observation_space(self, params):
        return gymnax.environments.spaces.Box(0.0, 1.0, (4, 4))


class Films(by_hand.Choices):
    def observation_space(self, params):
        return gymnax.environments.spaces.Box(0.0, 1.0, (2, 4, 4, 3))


UNSUITABLE = {
    "both": [
        (Films(), "--env-id is Films, whose observations have shape (2, 4, 4, 3)"),
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions have shape (1,) and bounds -2 to 2"),
        (Pixels(), "--env-id is Pixels, whose observations have shape (4, 4)"),
    ],
    True: [
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions are continuous"),
        (Films(), "--env-id is Films, whose observations have shape (2, 4, 4, 3)"),
    ],
    False: [
        (gymnax.make("CartPole-v1")[0], "--env-id is CartPole-v1, whose actions are discrete"),
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions have shape (1,) and bounds -2 to 2"),
        (Pixels(), "--env-id is Pixels, whose observations have shape (4, 4)"),
    ],
}


@every_agent
def test_unsuitable_environments_are_refused(name):
    row = cases.row(name)
    if row.world not in (cases.CONTINUOUS, cases.DISCRETE):
        pytest.skip("it asks for more: see its own tests")
    data = (None,) if row.data else ()
    for env, message in UNSUITABLE["both" if row.both else bool(row.world.num_actions)]:
        with pytest.raises(ValueError, match=re.escape(message)):
            cases.module(name).make_agent(programs.of(name).config, env, env.default_params, *data)


# What a field may be, where that does not follow from its type: numbers are finite and 0 or more, counts 1 or more.
ANY_SIGN = {"target_entropy_per_action", "v_min", "v_max", "bandwidth_exponent", "map_offset"}
AT_MOST_1 = {
    "discount", "polyak", "noise_reversion", "running_rate", "actor_dropout", "critic_dropout", "epsilon_start",
    "epsilon_end", "importance_exponent", "gae_decay", "trace_decay", "expectile", "replay_probability",
    "minimum_fill", "staleness", "rmsprop_decay", "intrinsic_discount", "predictor_share", "distance_weight",
    "averaging_rate", "mask_probability",
}  # fmt: skip
ABOVE_0 = {
    "initial_temperature", "reward_scale", "min_std", "max_std", "target_bound", "bound_width", "adam_epsilon",
    "action_gradient_bound", "stock_scale", "clip_range", "gradient_bound", "weight_bound", "temperature",
    "rmsprop_epsilon", "bonus_range", "map_scale", "smallest_value", "averaging_rate",
    "eta",
}  # fmt: skip
COUNTS_FROM_0 = {"quantiles_dropped", "annealing_steps", "actor_decay_updates", "pretraining", "top_k"}


@every_agent
def test_every_number_has_a_range(name):
    config = cases.module(name).Config()
    check_configuration(config)
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool | str) or field.name == "bandwidths":
            continue
        layers = isinstance(value, tuple)
        bad_values = [(64, 0)] if layers else [float("nan"), float("inf")]
        if not layers and field.name not in ANY_SIGN:
            bad_values.append(-1)
        if field.name in AT_MOST_1:
            bad_values.append(1.001)
        if field.name in ABOVE_0 or (isinstance(value, int) and field.name not in COUNTS_FROM_0):
            bad_values.append(0)
        for bad in bad_values:
            with pytest.raises(ValueError, match=re.escape(f"{option} is {bad}; it must be ")):
                check_configuration(dataclasses.replace(config, **{field.name: bad}))

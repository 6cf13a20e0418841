"""What holds for every algorithm: probe environments, live settings, structure of the state, bad input, learning."""

import dataclasses
import re

import by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.actor_critic import d4pg, ddpg, dsac, dsac_t, sac, stac, td3, tqc
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law
from jaxrl_dist.envs.probe import CASES, Probe, ProbeParams
from jaxrl_dist.learning import normalization, portable, returns, soft
from jaxrl_dist.running import training

ALGORITHMS = {
    "tqc": tqc, "sac": sac, "td3": td3, "ddpg": ddpg, "d4pg": d4pg, "dsac": dsac, "dsac_t": dsac_t, "stac": stac,
}  # fmt: skip
SOFT = ("tqc", "sac", "dsac", "dsac_t", "stac")
GAUSSIAN = ("dsac", "dsac_t", "stac")
SMALL = {
    "warmup_steps": 24, "replay_capacity": 120, "batch_size": 6, "actor_hidden": (8, 8), "critic_hidden": (8, 8),
}  # fmt: skip
# What keeps each algorithm small, and every one of its settings alive within a few updates.
OWN = {
    "tqc": {"num_critics": 2, "num_quantiles": 5, "quantiles_dropped": 1},
    "d4pg": {"num_envs": 1, "updates_per_iteration": 1, "num_steps": 2, "target_period": 1, "num_atoms": 11,
             "v_min": -4.0, "v_max": 4.0, "action_gradient_bound": 0.01},
    "dsac": {"target_bound": 0.5},
    "dsac_t": {"num_envs": 1, "bound_width": 0.5},
}  # fmt: skip

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def small_agent(name, env=None, **settings):
    settings = SMALL | OWN.get(name, {}) | settings
    return by_hand.agent_on(ALGORITHMS[name], env or by_hand.Drift(), **settings)


# -- probe environments -----------------------------------------------------------------------------------------------

# Observations that occur in each case, where not 0 alone.
SEEN = {
    "observation": (-1, 1), "discounting": (0, 1), "action_observation": (-1, 1), "final_observation": (-1, 1)
}  # fmt: skip
OBSERVATIONS = jnp.array([[-1.0], [0.0], [1.0]])


PROBE_SETTINGS = {
    "tqc": OWN["tqc"],
    "d4pg": {"num_steps": 1, "updates_per_iteration": 1, "target_period": 20, "v_min": -4.0, "v_max": 4.0},
    "dsac": {"reward_scale": 1.0, "min_std": 0.1, "max_std": 3.0},
    "stac": {"pessimism": 0.0, "actor_dropout": 0.0, "critic_dropout": 0.0},
}


def probe_errors(name: str, env=None, cases=CASES, iterations=900, **settings) -> dict[str, tuple[float, float]]:
    """Train on all cases in one program: case -> largest error of the learned values and of the learned actions.

    Values are those of the learned actions; soft agents keep a temperature so small that entropy is worth nothing.
    """
    env, discount = env or Probe(), 0.7
    settings = {
        "num_envs": 2, "warmup_steps": 512, "replay_capacity": 2048, "batch_size": 32, "actor_hidden": (16, 16),
        "critic_hidden": (16, 16), "discount": discount, "polyak": 0.05, "actor_learning_rate": 3e-3,
        "critic_learning_rate": 1e-2,
    } | settings  # fmt: skip
    settings |= PROBE_SETTINGS.get(name, {})
    if name in SOFT:
        settings |= {"initial_temperature": 1e-6, "temperature_learning_rate": 0.0}
    fields = {field.name for field in dataclasses.fields(ALGORITHMS[name].Config)}
    settings = {field: value for field, value in settings.items() if field in fields}
    config = dataclasses.replace(ALGORITHMS[name].Config(), **settings)

    def train(case):
        # Episodes of three steps, where nothing else ends them: time limits are frequent.
        params = ProbeParams(max_steps_in_episode=3, case=case)
        agent = ALGORITHMS[name].make_agent(config, env, params)
        state = agent.init(jax.random.key(1))
        state = jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], state)
        action = agent.policy.act(state, OBSERVATIONS, (), jax.random.key(0))[0]
        value = law.mean(agent.claim.law(state, OBSERVATIONS, action))
        value_error = jnp.abs(value - env.action_value(params, OBSERVATIONS, action, discount))
        return value_error, jnp.abs(action - env.optimal_action(params, OBSERVATIONS))[:, 0]

    numbers = jnp.array([CASES.index(case) for case in cases])
    value_errors, action_errors = map(np.asarray, by_hand.quick(jax.vmap(train))(numbers))
    errors = {}
    for i, case in enumerate(cases):
        seen = np.isin(OBSERVATIONS[:, 0], SEEN.get(case, (0,)))
        errors[case] = value_errors[i, seen].max(), action_errors[i, seen].max() if "action" in case else 0.0
    return errors


# Over 8 seeds and the four algorithms at 700 iterations, 2 of 224 value errors were above 0.02 (the largest 0.10) and
# 1 of 64 action errors above 0.15 (0.26). The bugs below are worth 0.3 and more.
VALUE_TOLERANCE, ACTION_TOLERANCE = 0.1, 0.2


@every_algorithm
def test_probes(name):
    for case, (value_error, action_error) in probe_errors(name).items():
        assert value_error < VALUE_TOLERANCE, case
        assert action_error < ACTION_TOLERANCE, case


def failed(errors) -> set[str]:
    return {
        case for case, (value_error, action_error) in errors.items()
        if not (value_error < VALUE_TOLERANCE and action_error < ACTION_TOLERANCE)
    }  # fmt: skip


def test_probes_fail_without_a_discount(monkeypatch):
    monkeypatch.setattr(returns, "bootstrap_discount", lambda gamma, terminated: 1.0 - terminated)
    cases = ("constant", "observation", "discounting", "time_limit")
    assert failed(probe_errors("ddpg", cases=cases)) == {"discounting", "time_limit"}


class MixesUpEpisodeEnds(Probe):
    """Two faults, seen by one case each: time limits reported as terminations, and successors taken after the reset."""

    def is_terminated(self, state, params):
        limit = (params.case == CASES.index("time_limit")) & (state.time >= params.max_steps_in_episode)
        return super().is_terminated(state, params) | limit

    def step(self, key, state, action, params):
        observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return observation, state, reward, terminated, truncated, info | {"final_observation": observation}


def test_probes_fail_where_episode_ends_are_mixed_up():
    cases = ("constant", "action", "time_limit", "final_observation")
    assert failed(probe_errors("ddpg", MixesUpEpisodeEnds(), cases)) == {"time_limit", "final_observation"}


# -- every setting is alive -------------------------------------------------------------------------------------------


def float_fields(config) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), float)]


@every_algorithm
def test_every_float_does_what_it_says_in_one_program(name):
    """One update with each float changed in turn, all runs in one compiled program; who may feel what is written out.

    That the critic does not feel the actor's step size, and nobody the temperature's, is the isolation of gradients.
    """
    _, config = small_agent(name, steps_per_iteration=2, num_envs=3)
    fields = float_fields(config)
    changed = [dataclasses.replace(config, **{field: getattr(config, field) * 0.5 + 0.01}) for field in fields]
    for one in changed:
        check_configuration(one)
    configs = jax.tree.map(lambda *values: jnp.array(values), config, *changed)
    env = by_hand.Drift()

    def train(config):
        agent = ALGORITHMS[name].make_agent(config, env, env.default_params)
        return agent.step(agent.init(jax.random.key(0)))[0]

    run_all = by_hand.quick(lambda configs: jax.lax.map(train, configs))
    states = jax.device_get(run_all(configs)._replace(key=None))
    parts = by_hand.parts(states.learner) | {"replay": states.experience.replay.rows}
    feels = {
        field: {
            part for part, tree in parts.items()
            if any(not np.array_equal(leaf[0], leaf[run]) for leaf in jax.tree.leaves(tree))
        }
        for run, field in enumerate(fields, start=1)
    }  # fmt: skip

    targets = {part for part in parts if part.startswith("target")}
    assert feels.get("polyak", targets) == targets
    assert feels["actor_learning_rate"] == {"actor"} | targets - {"target_critic"}
    # The actor climbs the critics as they are after their update.
    assert feels["critic_learning_rate"] >= {"critic", "target_critic", "actor_optimizer"}
    assert feels["critic_learning_rate"].isdisjoint({"replay", "log_temperature", "temperature_optimizer"})
    assert feels["discount"] >= {"critic_optimizer"}  # Adam's first step hardly depends on the gradient's size
    assert feels["discount"].isdisjoint({"replay", "temperature_optimizer"})
    if name in SOFT:
        assert feels["temperature_learning_rate"] == {"log_temperature"}
        optimizer = {"temperature_optimizer"} & parts.keys()
        assert feels["target_entropy_per_action"] | {"log_temperature"} == optimizer | {"log_temperature"}
        assert feels["initial_temperature"] >= {"critic_optimizer", "actor_optimizer", "log_temperature"}
    else:
        assert "replay" in feels["exploration_noise"]
    if name == "tqc":
        assert "critic_optimizer" in feels["kappa"]
    if name == "d4pg":
        assert "actor_optimizer" in feels["action_gradient_bound"]
        assert "critic_optimizer" not in feels["action_gradient_bound"]
    if name == "dsac":
        assert "critic_optimizer" in feels["min_std"] & feels["max_std"] & feels["target_bound"]
    if name == "dsac_t":
        assert "running_std" in feels["running_rate"]
        assert not feels.pop("target_bound")  # it is for those who switch off the bound that adapts
    if name == "stac":
        assert {"critic_optimizer", "actor_optimizer"} <= feels["pessimism"] & feels["actor_dropout"]
    if name == "td3":
        assert "critic_optimizer" in feels["target_noise"] & feels["target_noise_clip"]
        assert "replay" not in feels["target_noise"] | feels["target_noise_clip"]
    if name == "ddpg":
        assert "replay" in feels["noise_reversion"]
        assert feels["critic_weight_decay"] >= {"critic_optimizer"}
    assert all(feels.values()), feels


@every_algorithm
def test_every_other_field_changes_the_program(name):
    _, config = small_agent(name, updates_per_iteration=4)
    env = by_hand.Drift()

    def program(config):
        agent = ALGORITHMS[name].make_agent(config, env, env.default_params)
        return str(jax.make_jaxpr(lambda key: agent.step(agent.init(key)))(jax.random.key(0)))

    def other(value):
        if isinstance(value, str):
            return "relu" if value == "gelu" else "cvar:0.5"
        return not value if isinstance(value, bool) else 2 * value if isinstance(value, int) else (9, 7)

    original = program(config)
    assert program(config) == original  # the text depends on nothing but the program
    fields = {field.name for field in dataclasses.fields(config)} - set(float_fields(config))
    assert fields >= {"num_envs", "batch_size", "normalize_observations", "critic_hidden"}
    for field in fields:
        changed = dataclasses.replace(config, **{field: other(getattr(config, field))})
        assert program(changed) != original, field


# -- structure of state and metrics -----------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize(
    "settings",
    [
        {"num_envs": 4, "steps_per_iteration": 3, "updates_per_iteration": 2, "normalize_observations": True},
        {"num_envs": 1, "steps_per_iteration": 1, "updates_per_iteration": 4, "normalize_observations": False},
    ],
    ids=["fewer_updates_than_steps", "more_updates_than_steps"],
)
def test_state_keeps_its_structure_and_counts_are_right(name, settings):
    agent, config = small_agent(name, **settings)
    start = jax.eval_shape(agent.init, jax.random.key(0))
    after_a_step, _ = jax.eval_shape(agent.step, start)
    assert jax.tree.structure(after_a_step) == jax.tree.structure(start)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(after_a_step), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        # A weak type would make a jitted step compile twice.
        assert not before.weak_type
        assert not after.weak_type

    iterations = 3

    def run(key):
        state, metrics = jax.lax.scan(lambda state, _: agent.step(state), agent.init(key), length=iterations)
        return state, jax.tree.map(lambda x: x[-1], metrics)

    state, metrics = by_hand.quick(run)(jax.random.key(0))
    for leaf in jax.tree.leaves((state.learner, state.experience)):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or np.isfinite(leaf).all()

    steps = config.num_envs * config.steps_per_iteration
    assert (agent.clock.env_steps, agent.clock.updates) == (steps, config.updates_per_iteration)
    assert agent.clock.warmup_steps == 24
    assert state.experience.replay.size == 24 + iterations * steps
    updates = iterations * config.updates_per_iteration
    actor_updates = updates // getattr(config, "policy_delay", 1)
    assert optax.tree_utils.tree_get(state.learner.critic.optimizer, "count") == updates
    assert optax.tree_utils.tree_get(state.learner.actor.optimizer, "count") == actor_updates
    expected = {"episode_return", "episode_length", "critic_loss", "actor_loss", "value", "target"}
    assert metrics.keys() >= expected | {"critic_gradient_norm"}
    # What soft agents add to rewards is said too, or their values could not be held against what is possible.
    assert ("largest_bonus" in metrics) == ("temperature" in metrics)
    if "temperature" in metrics:
        assert metrics["largest_bonus"].total > 0
    for metric in metrics.values():
        assert metric.total.shape == metric.count.shape == ()
        assert metric.total.dtype == metric.count.dtype == jnp.float32
    assert metrics["episode_length"].count <= steps
    if config.normalize_observations:
        statistics, rows = state.experience.normalizer, state.experience.replay.rows
        seen = rows.observation[: state.experience.replay.size]
        assert statistics.count == state.experience.replay.size
        np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(statistics.variance, seen.var(0), rtol=1e-3)


@every_algorithm
def test_warmup_is_rounded_up_to_whole_steps_of_all_environments(name):
    agent, _ = small_agent(name, warmup_steps=25, num_envs=4)
    assert agent.clock.warmup_steps == 28
    state = jax.eval_shape(agent.init, jax.random.key(0))
    assert state.experience.replay.rows.reward.shape == (120,)
    assert state.experience.interaction.observation.shape == (4, 3)


# -- what the agent starts from, and how it acts ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=ALGORITHMS)
def started(request):
    """Name, agent, configuration and two states from different keys, with observation statistics."""
    agent, config = small_agent(request.param, normalize_observations=True)
    states = by_hand.quick(jax.vmap(agent.init))(jax.random.split(jax.random.key(0), 2))
    return request.param, agent, config, *(jax.tree.map(lambda x, i=i: x[i], states) for i in range(2))


def test_start(started):
    name, _, config, state, other = started
    learner = state.learner
    jax.tree.map(np.testing.assert_array_equal, learner.target_critic, learner.critic.parameters)
    if name in SOFT:
        np.testing.assert_allclose(learner.log_temperature.parameters, np.log(config.initial_temperature), rtol=1e-6)
    if hasattr(learner, "target_actor"):
        jax.tree.map(np.testing.assert_array_equal, learner.target_actor, learner.actor.parameters)
    members = getattr(config, "num_critics", 1)
    for parameters, inputs, count in ((learner.actor.parameters, 3, 1), (learner.critic.parameters, 5, members)):
        if name == "stac":
            continue  # has its own layers, and tests of them
        net, fan_in = by_hand.network(parameters), inputs
        assert net["kernel_0"].shape == (count, inputs, 8)
        for layer in range(3):
            near_zero = name == "d4pg" and parameters is learner.actor.parameters and layer == 2
            bound = 3e-3 if near_zero else fan_in**-0.5  # uniform within 1 / sqrt(fan-in), PyTorch's default
            if name == "dsac":  # Glorot's, as its authors have it
                bound = (6 / sum(net[f"kernel_{layer}"].shape[1:])) ** 0.5
                assert not net[f"bias_{layer}"].any()
            for part in ("kernel", "bias")[: 1 if name == "dsac" else 2]:
                values = net[f"{part}_{layer}"]
                assert np.abs(values).max() <= bound
                assert len(np.unique(values)) == values.size  # so critics differ from each other
            assert np.abs(net[f"kernel_{layer}"]).max() > 0.8 * bound
            fan_in = 8
    # Another key: other parameters and other actions from the first one on.
    for one, two in zip(
        jax.tree.leaves(learner.critic.parameters), jax.tree.leaves(other.learner.critic.parameters), strict=True
    ):
        assert (one != two).all() or one.ndim < 3
    actions = state.experience.replay.rows.action, other.experience.replay.rows.action
    assert (actions[0][0] != actions[1][0]).all()
    warm = np.asarray(actions[0][:24])
    assert np.abs(warm).max() <= 1
    assert warm.min() < -0.8
    assert warm.max() > 0.8


def test_observations_are_normalised_wherever_the_networks_see_them(started):
    _, agent, _, state, _ = started
    observation = 3 * jax.random.normal(jax.random.key(5), (7, 3))
    action = jnp.linspace(-1, 1, 14).reshape(7, 2)
    statistics = state.experience.normalizer
    assert statistics.count == 24
    plain = state._replace(experience=state.experience._replace(normalizer=None))
    normalized = normalization.normalize(statistics, observation)
    for one, two in (
        (agent.policy.act(state, observation, (), jax.random.key(0)),
         agent.policy.act(plain, normalized, (), jax.random.key(0))),
        (agent.claim.law(state, observation, action), agent.claim.law(plain, normalized, action)),
        (agent.claim.policy(state, observation, jax.random.key(0)),
         agent.claim.policy(plain, normalized, jax.random.key(0))),
    ):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, one, two)
    raw, predicted = (law.mean(agent.claim.law(s, observation, action)) for s in (plain, state))
    assert not np.array_equal(raw, predicted)


def test_actions_and_predictions(started):
    name, agent, config, state, _ = started
    observation = jax.random.normal(jax.random.key(5), (7, 3))
    inputs = np.asarray(normalization.normalize(state.experience.normalizer, observation), np.float64)
    if name in GAUSSIAN:  # these networks are gone through by hand in the tests of whole updates
        actor = getattr(ALGORITHMS[name], "Actor", soft.Actor)(config.actor_hidden, 2)
        outputs = np.concatenate(actor.apply(state.learner.actor.parameters, inputs.astype(np.float32)), axis=1)
    else:
        outputs = by_hand.forward(by_hand.network(state.learner.actor.parameters), 0, inputs)[-1]
    action = agent.policy.act(state, observation, (), jax.random.key(0))[0]
    np.testing.assert_allclose(action, np.tanh(outputs[:, :2]), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(action, agent.policy.act(state, observation, (), jax.random.key(1))[0])

    followed, bonus = agent.claim.policy(state, observation, jax.random.key(0))
    scale = getattr(config, "reward_scale", 1.0)
    if name == "stac":  # units are dropped while training, not in evaluation
        dropout = {"dropout": jax.random.split(jax.random.key(0))[1]}
        outputs = actor.apply(
            state.learner.actor.parameters, inputs.astype(np.float32), config.actor_dropout, rngs=dropout
        )
        outputs = np.concatenate(outputs, axis=1)
    if name in SOFT:
        noise = (np.arctanh(np.asarray(followed, np.float64)) - outputs[:, :2]) / np.exp(outputs[:, 2:])
        log_density = by_hand.soft_sample(outputs, noise)["log_density"]
        np.testing.assert_allclose(bonus, -config.initial_temperature * log_density / scale, rtol=1e-3, atol=1e-4)
        assert not np.allclose(followed, action, atol=0.05)
    else:
        np.testing.assert_array_equal(bonus, np.zeros(7))
        if name == "td3":  # the return its critics learn is that of the smoothed target policy
            noise = jax.random.normal(jax.random.key(0), action.shape)
            np.testing.assert_array_equal(followed, td3.smoothed_action(config, action, noise))
            assert not np.allclose(followed, action, atol=0.05)
        else:
            np.testing.assert_array_equal(followed, action)

    atoms, masses = agent.claim.law(state, observation, action)
    if name in GAUSSIAN:
        bounds = (config.min_std, config.max_std) if name == "dsac" else ()
        critic = ALGORITHMS[name].Critic(config.critic_hidden, *([2] if name == "dsac_t" else []))
        mean, std = critic.apply(state.learner.critic.parameters, inputs.astype(np.float32), action, *bounds)
        if name == "dsac_t":
            mean, std = (jnp.where(mean[:, 0] < mean[:, 1], x[:, 0], x[:, 1]) for x in (mean, std))
        np.testing.assert_allclose(atoms[:, 25], mean / scale, rtol=1e-4, atol=1e-5)  # the median
        np.testing.assert_allclose(atoms.std(1), std / scale, rtol=0.02)
        return
    critic, pairs = (
        by_hand.network(state.learner.critic.parameters),
        np.concatenate([inputs, np.asarray(action)], axis=1),
    )
    members = [by_hand.forward(critic, member, pairs)[-1] for member in range(getattr(config, "num_critics", 1))]
    if name == "d4pg":
        np.testing.assert_allclose(atoms, np.tile(np.linspace(-4, 4, 11), (7, 1)), atol=1e-6)
        np.testing.assert_allclose(masses, by_hand.softmax(members[0]), rtol=1e-3)
        return
    np.testing.assert_allclose(atoms, np.concatenate(members, axis=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(masses, np.full(atoms.shape, 1 / atoms.shape[1]), rtol=1e-6)


def test_exported_policy_is_the_evaluation_policy(started, tmp_path):
    _, agent, _, state, _ = started
    observation = jax.random.normal(jax.random.key(5), (7, 3))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state), np.full(2, -3.0), np.full(2, 5.0))
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    action = agent.policy.act(state, observation, (), jax.random.key(0))[0]
    np.testing.assert_allclose(exported, 1 + 4 * np.asarray(action), rtol=1e-4, atol=1e-5)


# -- the end of an episode --------------------------------------------------------------------------------------------


@every_algorithm
def test_targets_bootstrap_at_pendulums_time_limit_and_not_at_a_termination(name):
    env, params = envs.make("Pendulum-v1")
    settings = SMALL | OWN.get(name, {}) | {"warmup_steps": 200, "replay_capacity": 200}
    if name == "d4pg":
        settings |= {"num_steps": 1, "v_min": -20.0, "v_max": 20.0}
    config = dataclasses.replace(ALGORITHMS[name].Config(), **settings)
    agent = ALGORITHMS[name].make_agent(config, env, params)
    flags = jnp.array([[True, False], [True, True], [False, True], [False, False]])  # terminated, truncated

    def mean_targets(key):
        state = agent.init(key)
        rows = state.experience.replay.rows

        def mean_target(flags):
            # A replay full of the episode's last transition, with other flags.
            last = jax.tree.map(lambda x: jnp.repeat(x[199:], 200, axis=0), rows)
            last = last._replace(terminated=jnp.full(200, flags[0]), truncated=jnp.full(200, flags[1]))
            experience = state.experience._replace(replay=state.experience.replay._replace(rows=last))
            target = agent.step(by_hand.with_fresh_keys(state)._replace(experience=experience))[1]["target"]
            return target.total / target.count

        return rows, state.experience.interaction.observation[0], jax.lax.map(mean_target, flags)

    rows, first_observation, targets = jax.device_get(by_hand.quick(mean_targets)(jax.random.key(0)))
    assert not rows.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(rows.truncated), [199])
    # The stored successor is where the pendulum went, not where the next episode began.
    np.testing.assert_array_equal(rows.next_observation[198], rows.observation[199])
    assert np.abs(rows.next_observation[199] - rows.observation[199]).max() < 1.5
    assert not np.array_equal(rows.next_observation[199], first_observation)

    np.testing.assert_allclose(targets[:2], rows.reward[199], rtol=1e-4 if name == "d4pg" else 1e-5)
    assert targets[2] == targets[3]
    assert abs(targets[2] - rows.reward[199]) > 1e-3


# -- bad input --------------------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 25}, "--batch-size is 25; it must be at most --warmup-steps = 24"),
        ({"replay_capacity": 23}, "--replay-capacity is 23; it must be at least --warmup-steps = 24"),
        ({"num_envs": 25}, "--num-envs is 25; it must be at most --warmup-steps = 24"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_agent(name, **settings)


class Pixels(by_hand.Drift):
    def observation_space(self, params):
        return gymnax.environments.spaces.Box(0.0, 1.0, (4, 4))


@every_algorithm
@pytest.mark.parametrize(
    ("env", "message"),
    [
        (gymnax.make("CartPole-v1")[0], "--env-id is CartPole-v1, whose actions are discrete"),
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions have shape (1,) and bounds -2 to 2"),
        (Pixels(), "--env-id is Pixels, whose observations have shape (4, 4)"),
    ],
    ids=["discrete", "unscaled", "pixels"],
)  # fmt: skip
def test_unsuitable_environments_are_refused(name, env, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_agent(name, env)


@every_algorithm
def test_every_number_has_a_range(name):
    config = ALGORITHMS[name].Config()
    check_configuration(config)
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool | str):
            continue
        bad_values = [(64, 0)] if isinstance(value, tuple) else [float("nan"), float("inf")]
        if not isinstance(value, tuple) and field.name not in ("target_entropy_per_action", "v_min", "v_max"):
            bad_values.append(-1)
        if field.name in ("discount", "polyak", "noise_reversion", "running_rate", "actor_dropout", "critic_dropout"):
            bad_values.append(1.001)
        positive = (
            "initial_temperature", "reward_scale", "min_std", "max_std", "target_bound", "bound_width",
            "action_gradient_bound",
        )  # fmt: skip
        if field.name in positive or (isinstance(value, int) and field.name != "quantiles_dropped"):
            bad_values.append(0)
        for bad in bad_values:
            with pytest.raises(ValueError, match=re.escape(f"{option} is {bad}; it must be ")):
                check_configuration(dataclasses.replace(config, **{field.name: bad}))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [
    ("tqc", 10_000), ("sac", 10_000), ("td3", 15_000), ("ddpg", 10_000),
    ("d4pg", 15_000), ("dsac_t", 10_000), ("stac", 10_000),
])  # fmt: skip
def test_learns_pendulum(name, steps):
    """The median of three seeds: a policy of this age still falls back now and then (optimum about -130)."""
    env, params = envs.make("Pendulum-v1")
    algorithm = ALGORITHMS[name]
    config = dataclasses.replace(algorithm.Config(), **algorithm.PRESETS["Pendulum-v1"], replay_capacity=steps)
    train = training.make_train(
        algorithm.make_agent, config, env, params, total_steps=steps, evaluations=1, eval_episodes=40
    )
    _, history = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    returns_by_seed = np.asarray(history["evaluation_return"]).mean((1, 2))
    assert np.median(returns_by_seed) > -200, returns_by_seed

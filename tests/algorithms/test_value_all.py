"""What holds for every value-based algorithm: probe environments, live settings, state, policies, bad input."""

import dataclasses
import re

import by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import c51, dqn, fqf, iqn, mmd_dqn, os_c51, qr_dqn, rainbow
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.envs.probe import CASES, Probe, ProbeParams
from jaxrl_dist.learning import portable, returns
from jaxrl_dist.running import training

ALGORITHMS = {
    "dqn": dqn, "c51": c51, "qr_dqn": qr_dqn, "mmd_dqn": mmd_dqn, "iqn": iqn, "fqf": fqf, "rainbow": rainbow,
    "os_c51": os_c51,
}  # fmt: skip
DISTRIBUTIONAL = [name for name in ALGORITHMS if name not in ("dqn", "os_c51")]
FEW_ATOMS = {
    "dqn": {},
    "c51": {"num_atoms": 7, "v_min": -10.0, "v_max": 10.0},
    "os_c51": {"num_atoms": 7, "v_min": -10.0, "v_max": 10.0},
    "rainbow": {"num_atoms": 7, "v_min": -10.0, "v_max": 10.0},
    "qr_dqn": {"num_quantiles": 6},
    "mmd_dqn": {"num_particles": 6},
    "iqn": {"num_fractions": 5, "num_target_fractions": 6, "num_policy_fractions": 7, "cosines": 8},
    "fqf": {"num_fractions": 6, "cosines": 8},
}

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def small_agent(name, env=None, **settings):
    settings = by_hand.TINY_VALUE | {"replay_capacity": 120} | FEW_ATOMS[name] | settings
    return by_hand.agent_on(ALGORITHMS[name], env or by_hand.Choices(), **settings)


def larger_weights(name, state):
    """The state with weights so large that actions and laws differ from observation to observation."""
    # Larger logits would make certain laws, and so ties between the values of actions.
    factor = 2.0 if name in ("c51", "os_c51", "rainbow") else 3.0
    network = jax.tree.map(lambda x: factor * x, state.learner.network.parameters)
    return state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))


def blind_to_fractions(state):
    """The state of IQN with quantiles that are all equal, so that it does not matter which fractions are drawn."""

    def blind(path, x):
        name = jax.tree_util.keystr(path)
        return jnp.full_like(x, "bias" in name) if "embedding" in name else x

    network = jax.tree.map_with_path(blind, state.learner.network.parameters)
    return state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))


# -- probe environments -----------------------------------------------------------------------------------------------

# Observations that occur in each case, where not 0 alone.
SEEN = {
    "observation": (-1, 1), "discounting": (0, 1), "action_observation": (-1, 1), "final_observation": (-1, 1)
}  # fmt: skip
OBSERVATIONS = jnp.array([[-1.0], [0.0], [1.0]])


def probe_errors(name: str, env=None, cases=CASES, iterations=700, **settings) -> dict[str, tuple[float, bool]]:
    """Train on all cases in one program: case -> largest error of the learned values, and any greedy action wrong.

    Values are those of all actions, at all observations that occur.
    """
    env, discount = env or Probe(discrete_actions=2), 0.7
    settings = {
        "num_envs": 2, "updates_per_iteration": 1, "warmup_steps": 512, "replay_capacity": 2048, "batch_size": 32,
        "num_steps": 1, "discount": discount, "target_period": 20, "learning_rate": 1e-2, "adam_epsilon": 1e-6,
        "epsilon_start": 1.0, "epsilon_end": 0.5, "exploration_steps": 1000, "hidden": (16, 16),
    } | FEW_ATOMS[name] | settings  # fmt: skip
    if name in ("c51", "os_c51", "rainbow"):  # targets stay inside the support, where the projection keeps the mean
        settings |= {"v_min": -4.0, "v_max": 4.0, "num_atoms": 17}
    if name == "rainbow":  # little noise: evaluation takes the mean weights, updates take drawn ones
        settings = {"initial_noise": 0.05} | settings
    config = dataclasses.replace(ALGORITHMS[name].Config(), **settings)

    def train(case):
        # Episodes of three steps, where nothing else ends them: time limits are frequent.
        params = ProbeParams(max_steps_in_episode=3, case=case)
        agent = ALGORITHMS[name].make_agent(config, env, params)
        state = agent.init(jax.random.key(1))
        state = jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], state)

        def error(action):
            actions = jnp.full(3, action)
            atoms, masses = agent.claim.law(state, OBSERVATIONS, actions)
            expected = env.action_value(params, OBSERVATIONS, actions, discount)
            return jnp.abs((atoms * masses).sum(-1) - expected)

        wrong = agent.policy.act(state, OBSERVATIONS, (), jax.random.key(0))[0] != env.optimal_action(
            params, OBSERVATIONS
        )
        return jnp.maximum(error(0), error(1)), wrong

    numbers = jnp.array([CASES.index(case) for case in cases])
    value_errors, wrong = map(np.asarray, by_hand.quick(jax.vmap(train))(numbers))
    errors = {}
    for i, case in enumerate(cases):
        seen = np.isin(OBSERVATIONS[:, 0], SEEN.get(case, (0,)))
        errors[case] = value_errors[i, seen].max(), "action" in case and bool(wrong[i, seen].any())
    return errors


VALUE_TOLERANCE = 0.1


def failed(errors) -> set[str]:
    return {case for case, (value_error, wrong) in errors.items() if wrong or not value_error < VALUE_TOLERANCE}


@every_algorithm
def test_probes(name):
    errors = probe_errors(name)
    assert not failed(errors), errors


def test_probes_over_three_steps():
    errors = probe_errors("rainbow", num_steps=3)
    assert not failed(errors), errors


def test_probes_fail_without_a_discount(monkeypatch):
    plain = returns.n_step
    monkeypatch.setattr(returns, "n_step", lambda *window: plain(*window[:-1], 1.0))
    cases = ("constant", "observation", "discounting", "time_limit")
    assert failed(probe_errors("dqn", cases=cases)) == {"discounting", "time_limit"}


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
    errors = probe_errors("dqn", MixesUpEpisodeEnds(discrete_actions=2), cases)
    assert failed(errors) == {"time_limit", "final_observation"}


def test_probes_fail_where_the_action_is_ignored(monkeypatch):
    monkeypatch.setattr(dqn.networks, "at_action", lambda outputs, action: outputs[:, 0])
    cases = ("constant", "discounting", "action", "action_observation")
    assert failed(probe_errors("dqn", cases=cases)) == {"action", "action_observation"}


# -- every setting is alive -------------------------------------------------------------------------------------------


def float_fields(config) -> list[str]:
    return [field.name for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), float)]


@every_algorithm
def test_every_float_does_what_it_says_in_one_program(name):
    """Two updates with each float changed in turn, all runs in one compiled program; who feels what is written out."""
    settings = {
        "num_envs": 12, "steps_per_iteration": 6, "updates_per_iteration": 2, "target_period": 2,
        "exploration_steps": 120, "batch_size": 20, "kappa": 0.5, "annealing_steps": 100,
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(ALGORITHMS[name].Config)}
    _, config = small_agent(name, **{key: value for key, value in settings.items() if key in known})
    fields = float_fields(config)
    changed = [dataclasses.replace(config, **{field: getattr(config, field) * 0.4 + 0.01}) for field in fields]
    for one in changed:
        check_configuration(one)
    configs = jax.tree.map(lambda *values: jnp.array(values), config, *changed)
    env = by_hand.Choices()

    def train(config):
        agent = ALGORITHMS[name].make_agent(config, env, env.default_params)
        return agent.step(agent.init(jax.random.key(0)))[0]

    run_all = by_hand.quick(lambda configs: jax.lax.map(train, configs))
    states = jax.device_get(run_all(configs)._replace(key=None))
    parts = by_hand.parts(states.learner) | {"replay": states.experience.replay.rows}
    if name == "rainbow":
        parts["priorities"] = states.priorities
    if name == "fqf":
        parts["proposal"] = parts["network"].pop("proposal")
    feels = {
        field: {
            part for part, tree in parts.items()
            if any(not np.array_equal(leaf[0], leaf[run]) for leaf in jax.tree.leaves(tree))
        }
        for run, field in enumerate(fields, start=1)
    }  # fmt: skip

    learned = {"network", "target_network", "optimizer"} | ({"priorities"} & parts.keys())
    of_the_loss = {"discount", "learning_rate", "adam_epsilon", "kappa", "v_min", "v_max", "bandwidth_exponent"}
    of_the_loss |= {"priority_exponent", "huber_threshold", "reward_clip"}
    for field in of_the_loss & feels.keys():  # the proposal sees other features, the second time
        assert feels[field] - {"proposal"} == learned, field
    for field in ("epsilon_start", "epsilon_end"):
        assert "replay" in feels[field], field
    if name == "fqf":
        # The second time the quantiles are trained at other fractions.
        assert feels["fraction_learning_rate"] == {"proposal"} | learned
        assert "optimizer" in feels["entropy_weight"]
        assert "replay" not in feels["entropy_weight"]
    if name == "rainbow":
        assert feels["initial_noise"] >= learned
        # Weights are all 1 at first; priorities are set from the errors before each update.
        assert feels["importance_exponent"] == learned - {"priorities"}
    assert all(feels.values()), feels


@every_algorithm
def test_every_other_field_changes_the_program(name):
    _, config = small_agent(name)
    env = by_hand.Choices()

    def program(config):
        agent = ALGORITHMS[name].make_agent(config, env, env.default_params)
        return str(jax.make_jaxpr(lambda key: agent.step(agent.init(key)))(jax.random.key(0)))

    others = {
        "hidden": (9, 7), "bandwidths": (1.0, 4.0), "risk": "cvar:0.3", "kernel": "energy", "target_weights": "equal"
    }  # fmt: skip
    original = program(config)
    assert program(config) == original  # the text depends on nothing but the program
    fields = {field.name for field in dataclasses.fields(config)} - set(float_fields(config))
    assert fields >= {"num_envs", "batch_size", "target_period", "exploration_steps", "hidden"}
    for field in fields:
        value = getattr(config, field)
        other = others[field] if field in others else not value if isinstance(value, bool) else 2 * value
        assert program(dataclasses.replace(config, **{field: other})) != original, field


# -- structure of state and metrics -----------------------------------------------------------------------------------

METRICS = {"episode_return", "episode_length", "loss", "value", "target", "gradient_norm"}
MORE_METRICS = {
    "c51": {"clipped_mass"}, "os_c51": {"clipped_mass"}, "rainbow": {"clipped_mass"}, "qr_dqn": {"crossings"},
    "mmd_dqn": {"spread"}, "fqf": {"fraction_entropy"},
}  # fmt: skip


@every_algorithm
def test_state_keeps_its_structure_counts_are_right_and_targets_are_copied_when_due(name):
    agent, config = small_agent(name, num_envs=4, steps_per_iteration=3, target_period=3)
    start = jax.eval_shape(agent.init, jax.random.key(0))
    after_a_step, _ = jax.eval_shape(agent.step, start)
    assert jax.tree.structure(after_a_step) == jax.tree.structure(start)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(after_a_step), strict=True):
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        # A weak type would make a jitted step compile twice.
        assert not before.weak_type
        assert not after.weak_type

    iterations = 7

    def run(key):
        first = agent.init(key)

        def once(state, _):
            state, metrics = agent.step(state)
            return state, (state.learner.network.parameters, state.learner.target_network, metrics)

        state, history = jax.lax.scan(once, first, length=iterations)
        return first.learner, state._replace(key=None), history

    learner, state, (networks, targets, metrics) = jax.device_get(by_hand.quick(run)(jax.random.key(0)))
    for leaf in jax.tree.leaves((state, metrics)):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or np.isfinite(leaf).all()
    assert (agent.clock.env_steps, agent.clock.updates, agent.clock.warmup_steps) == (12, 1, 24)
    assert state.env_steps == state.experience.replay.size == 24 + 12 * iterations
    assert state.learner.updates == iterations
    assert METRICS | MORE_METRICS.get(name, set()) == metrics.keys()
    for metric in metrics.values():
        assert metric.total.shape == metric.count.shape == (iterations,)
        assert metric.total.dtype == metric.count.dtype == np.float32
    assert (metrics["loss"].count == 1).all()
    assert (metrics["episode_length"].count <= 12).all()

    jax.tree.map(np.testing.assert_array_equal, learner.target_network, learner.network.parameters)
    copied = learner.network.parameters
    for update in range(1, iterations + 1):
        network, target = jax.tree.map(lambda x, i=update - 1: x[i], (networks, targets))
        if update % config.target_period == 0:
            copied = network
        else:
            assert any(not np.array_equal(*two) for two in zip(*map(jax.tree.leaves, (network, target)), strict=True))
        jax.tree.map(np.testing.assert_array_equal, target, copied)


@every_algorithm
def test_warmup_is_rounded_up_to_whole_steps_of_all_environments(name):
    agent, _ = small_agent(name, warmup_steps=25, num_envs=4)
    assert agent.clock.warmup_steps == 28
    state = jax.eval_shape(agent.init, jax.random.key(0))
    assert state.experience.replay.rows.reward.shape == (120,)
    assert state.experience.replay.rows.action.dtype == jnp.int32
    assert state.experience.interaction.observation.shape == (4, 3)


# -- exploration ------------------------------------------------------------------------------------------------------


@every_algorithm
def test_share_of_random_actions_falls_in_a_line(name):
    """Seen in the replay: with probability 1 - epsilon + epsilon / 3 the stored action is the greedy one."""
    settings = {"num_envs": 1500, "warmup_steps": 1500, "replay_capacity": 9000, "steps_per_iteration": 5}
    settings |= {"epsilon_start": 0.9, "epsilon_end": 0.1, "exploration_steps": 6000, "learning_rate": 0.0}
    if name == "rainbow":
        settings |= {"initial_noise": 0.0}
    agent, _ = small_agent(name, **settings)

    def run(key):
        state = larger_weights(name, agent.init(key))
        if name == "iqn":  # it explores by the mean over random fractions, and is evaluated at even ones
            state = blind_to_fractions(state)
        state, _ = agent.step(state)
        rows = state.experience.replay.rows
        return rows.action, agent.policy.act(state, rows.observation, (), jax.random.key(0))[0]

    action, greedy = (np.asarray(x).reshape(6, 1500) for x in by_hand.quick(run)(jax.random.key(0)))
    epsilon = np.array([1, 0.7, 0.5, 0.3, 0.1, 0.1])  # warm-up, then by the steps of all environments so far
    np.testing.assert_allclose((action == greedy).mean(1), 1 - epsilon + epsilon / 3, atol=0.05)
    for step in range(6):  # random actions are uniform
        shares = np.bincount(action[step][action[step] != greedy[step]], minlength=3) / 1500
        available = np.bincount(greedy[step], minlength=3) / 1500
        np.testing.assert_allclose(shares, (1 - available) * epsilon[step] / 3, atol=0.04)


# -- policies and predictions -----------------------------------------------------------------------------------------

RISKS = ("neutral", "cvar:0.3", "mean-variance:1")
NETWORKS = {
    "vectors": (by_hand.Choices(), (8, 9)),
    "images": (by_hand.Pictures(), (8, 9)),
    "one_layer": (by_hand.Choices(), (9,)),
}


@pytest.fixture(scope="module", params=[(name, kind) for name in ALGORITHMS for kind in NETWORKS], ids="-".join)
def started(request):
    """Algorithm, settings, environment, the states of two seeds, and observations."""
    name, kind = request.param
    env, hidden = NETWORKS[kind]
    agent, _ = small_agent(name, env, hidden=hidden)
    states = by_hand.quick(jax.vmap(agent.init))(jax.random.split(jax.random.key(1), 2))
    state, other = (jax.tree.map(lambda x, i=i: x[i], states) for i in range(2))
    positions = jax.random.normal(jax.random.key(5), (60, 3))
    observation = jax.vmap(env.picture)(positions) if kind == "images" else 2 * positions
    return name, {"hidden": hidden}, env, state, other, observation


def variants(name) -> list[dict]:
    if name == "dqn":
        return [{"dueling": False}]
    if name == "os_c51":
        return [{}]
    return [{"risk": risk} for risk in RISKS]


def risk_value(text: str, atoms: np.ndarray, masses: np.ndarray) -> float:
    """Value of one law of weighted atoms."""
    mean = (atoms * masses).sum()
    if text.startswith("mean-variance"):
        return mean - (masses * (atoms - mean) ** 2).sum()
    left, total = 0.3 if text.startswith("cvar") else 1.0, 0.0
    level = left
    for i in np.argsort(atoms):
        taken = min(left, masses[i])
        total, left = total + taken * atoms[i], left - taken
    return total / level


def test_predictions_are_laws_whose_value_the_policy_maximises(started):
    name, settings, env, state, _, observation = started
    state = larger_weights(name, state)
    for variant in variants(name):
        agent, _ = small_agent(name, env, **settings, **variant)
        laws = [agent.claim.law(state, observation, jnp.full(60, action)) for action in range(3)]
        values = np.zeros((60, 3))
        for action, law in enumerate(laws):
            atoms, masses = (np.asarray(x, np.float64) for x in law)
            assert atoms.shape == masses.shape == (60, 1 if name in ("dqn", "os_c51") else atoms.shape[1])
            np.testing.assert_allclose(masses.sum(1), 1, rtol=1e-5)
            assert (masses >= 0).all()
            for row in range(60):
                values[row, action] = risk_value(variant.get("risk", "neutral"), atoms[row], masses[row])
        action = np.asarray(agent.policy.act(state, observation, (), jax.random.key(0))[0])
        assert action.dtype == np.int32
        if name != "iqn" or not variant["risk"].startswith("cvar"):  # it reads its quantiles elsewhere, see its test
            np.testing.assert_allclose(values[np.arange(60), action], values.max(1), rtol=1e-5, atol=1e-5)
        # Another key changes nothing, and the policy that is learned is the one that is evaluated.
        np.testing.assert_array_equal(action, agent.policy.act(state, observation, (), jax.random.key(1))[0])
        followed, bonus = agent.claim.policy(state, observation, jax.random.key(0))
        np.testing.assert_array_equal(followed, action)
        np.testing.assert_array_equal(bonus, np.zeros(60))


def test_exported_policy_is_the_evaluation_policy(started, tmp_path):
    name, settings, env, state, _, observation = started
    state = larger_weights(name, state)
    chosen = []
    for variant in variants(name):
        agent, _ = small_agent(name, env, **settings, **variant)
        portable.save_policy(tmp_path / "policy.npz", agent.export(state))
        exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
        np.testing.assert_array_equal(
            exported, agent.policy.act(state, observation, (), jax.random.key(0))[0], err_msg=str(variant)
        )
        chosen.append(exported)
    assert len(np.unique(chosen[0])) > 1
    for risk_averse in chosen[1:]:
        assert (risk_averse != chosen[0]).any()


@pytest.mark.parametrize(("name", "dueling"), [("dqn", True), ("rainbow", False)])
def test_exported_policy_with_the_other_kind_of_head(name, dueling, tmp_path):
    agent, _ = small_agent(name, dueling=dueling)
    state = by_hand.quick(agent.init)(jax.random.key(1))
    observation = 5 * jax.random.normal(jax.random.key(5), (60, 3))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    assert len(np.unique(exported)) > 1
    np.testing.assert_array_equal(exported, agent.policy.act(state, observation, (), jax.random.key(0))[0])


def test_parameters_differ_from_seed_to_seed(started):
    _, _, _, state, other, _ = started
    pairs = zip(
        *map(jax.tree.leaves_with_path, (state.learner.target_network, other.learner.network.parameters)), strict=True
    )
    for (path, one), (_, two) in pairs:
        if "noise" not in jax.tree_util.keystr(path):  # Rainbow's deviations start all alike
            assert (one != two).all(), path


# -- the end of an episode --------------------------------------------------------------------------------------------


@every_algorithm
def test_targets_bootstrap_at_a_truncation_and_not_at_a_termination(name):
    settings = {"num_envs": 1, "steps_per_iteration": 1, "updates_per_iteration": 1, "num_steps": 1}
    if name in ("c51", "os_c51", "rainbow"):
        settings |= {"v_min": -20.0, "v_max": 20.0}
    if name == "rainbow":
        settings |= {"initial_noise": 0.0}
    agent, config = small_agent(name, **settings)
    flags = jnp.array([[True, False], [True, True], [False, True], [False, False]])  # terminated, truncated

    def mean_targets(key):
        state = larger_weights(name, agent.init(key))
        if name == "iqn":  # the mean of its target is over random fractions
            state = blind_to_fractions(state)
        row = jax.tree.map(lambda x: x[3], state.experience.replay.rows)

        def mean_target(flags):
            # A replay full of one transition, with other flags.
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (120, *x.shape)), row)
            rows = rows._replace(terminated=jnp.full(120, flags[0]), truncated=jnp.full(120, flags[1]))
            full = state.experience.replay._replace(rows=rows, size=jnp.int32(120))
            experience = state.experience._replace(replay=full)
            target = agent.step(by_hand.with_fresh_keys(state)._replace(experience=experience))[1]["target"]
            return target.total / target.count

        successor = row.next_observation[None]
        best = agent.policy.act(state, successor, (), jax.random.key(0))[0]
        atoms, masses = agent.claim.law(state, successor, best)
        return row.reward, (atoms * masses).sum(), jax.lax.map(mean_target, flags)

    reward, next_value, targets = jax.device_get(by_hand.quick(mean_targets)(jax.random.key(0)))
    np.testing.assert_allclose(targets[:2], reward, rtol=1e-4)
    assert abs(next_value) > 0.02
    np.testing.assert_allclose(targets[2:], reward + config.discount * next_value, atol=2e-3)


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


@pytest.mark.parametrize("name", DISTRIBUTIONAL)
@pytest.mark.parametrize("risk", ["foo", "cvar", "cvar:0", "cvar:1.5", "mean-variance:-1", "neutral:1"])
def test_unknown_risks_are_refused(name, risk):
    with pytest.raises(ValueError, match=re.escape(f"--risk is '{risk}'; it must be neutral, cvar:LEVEL with")):
        small_agent(name, risk=risk)


@pytest.mark.parametrize("name", ["c51", "os_c51", "rainbow"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v_min": 1.0, "v_max": 1.0}, "v_min is 1.0; it must be less than v_max = 1.0"),
        ({"v_min": 2.0, "v_max": -2.0}, "v_min is 2.0; it must be less than v_max = -2.0"),
        ({"num_atoms": 1}, "num_atoms is 1; it must be at least 2"),
    ],
)
def test_supports_that_cannot_work_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_agent(name, **settings)


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (-1.0,), (float("inf"),), (float("nan"),)])
def test_bandwidths_that_cannot_work_are_refused(bandwidths):
    with pytest.raises(ValueError, match=re.escape(f"--bandwidths is {bandwidths}; it must be one or more finite")):
        small_agent("mmd_dqn", bandwidths=bandwidths)


class Films(by_hand.Choices):
    def observation_space(self, params):
        return gymnax.environments.spaces.Box(0.0, 1.0, (2, 4, 4, 3))


@every_algorithm
@pytest.mark.parametrize(
    ("env", "message"),
    [
        (gymnax.make("Pendulum-v1")[0], "--env-id is Pendulum-v1, whose actions are continuous"),
        (Films(), "--env-id is Films, whose observations have shape (2, 4, 4, 3)"),
    ],
    ids=["continuous", "films"],
)
def test_unsuitable_environments_are_refused(name, env, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_agent(name, env)


@every_algorithm
def test_every_number_has_a_range(name):
    config = ALGORITHMS[name].Config()
    check_configuration(config)
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool | str) or field.name == "bandwidths":
            continue
        bad_values = [(64, 0), ()] if isinstance(value, tuple) else [float("nan"), float("inf")]
        if not isinstance(value, tuple) and field.name not in ("v_min", "v_max", "bandwidth_exponent"):
            bad_values.append(-1)
        if field.name in ("discount", "epsilon_start", "epsilon_end", "importance_exponent"):
            bad_values.append(1.001)
        if field.name == "adam_epsilon" or isinstance(value, int):
            bad_values.append(0)
        for bad in bad_values:
            with pytest.raises(ValueError, match=re.escape(f"{option} is {bad}; it must be ")):
                check_configuration(dataclasses.replace(config, **{field.name: bad}))


@every_algorithm
def test_conventions_of_atari_stand_with_clipped_rewards_only(name):
    """What belongs to rewards of at most 1, cut, is in the paper's preset, where they are; never in a default."""
    config, paper = ALGORITHMS[name].Config(), ALGORITHMS[name].PRESETS["paper"]
    assert (config.reward_clip, paper["reward_clip"]) == (0, 1)
    if name == "dqn":
        assert (config.huber_threshold, paper["huber_threshold"]) == (0, 1)
    if name in ("c51", "os_c51", "rainbow"):
        assert (paper["v_min"], paper["v_max"]) == (-10, 10)
        # Rewards of at most 1 for ever stay inside the default.
        assert config.v_max == -config.v_min == pytest.approx(1 / (1 - config.discount))
    if name == "mmd_dqn":
        assert max(paper["bandwidths"]) == 10
        assert max(config.bandwidths) >= 1 / (1 - config.discount) ** 2


FRAMES = 4  # of the game, per agent step, of which four are taken per update


@pytest.mark.parametrize(
    ("name", "warmup_frames", "target_frames", "epsilon_frames"),
    [
        ("dqn", 200_000, 160_000, 4_000_000),  # Nature's table counts the target's period in updates
        ("c51", 200_000, 40_000, 4_000_000),
        ("qr_dqn", 200_000, 40_000, 4_000_000),
        ("iqn", 200_000, 40_000, 4_000_000),
        ("fqf", 200_000, 40_000, 4_000_000),
        ("mmd_dqn", 200_000, 40_000, 4_000_000),
        ("os_c51", 320_000, 40_000, 4_000_000),
        ("rainbow", 80_000, 32_000, None),
    ],
)
def test_paper_presets_count_in_the_right_units(name, warmup_frames, target_frames, epsilon_frames):
    """Frames as DQN Zoo and the authors' configurations state them; ours count agent steps and updates."""
    paper = ALGORITHMS[name].PRESETS["paper"]
    assert (paper["num_envs"], paper["steps_per_iteration"], paper["updates_per_iteration"]) == (1, 4, 1)
    assert paper["warmup_steps"] * FRAMES == warmup_frames
    assert paper["target_period"] * 4 * FRAMES == target_frames
    if epsilon_frames:
        assert paper["exploration_steps"] * FRAMES == epsilon_frames


@every_algorithm
def test_presets_are_configurations(name):
    algorithm = ALGORITHMS[name]
    assert algorithm.PRESETS.keys() >= {"CartPole-v1", "paper"}
    for preset in algorithm.PRESETS.values():
        settings = {field: value for field, value in preset.items() if field != "total_steps"}
        config = dataclasses.replace(algorithm.Config(), **settings)
        check_configuration(config)
        algorithm.make_agent(config, by_hand.Choices(), by_hand.Choices().default_params)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "os_c51"])  # slower: a check of its own
def test_learns_catch(name):
    """The best return is 1: every ball caught. The median of three seeds."""
    env, params = envs.make("Catch-bsuite")
    settings = {
        "warmup_steps": 512, "replay_capacity": 20_000, "target_period": 100, "learning_rate": 1e-3,
        "exploration_steps": 5000, "hidden": (64, 64),
    } | {
        "dqn": {},
        "c51": {"num_atoms": 21, "v_min": -1.0, "v_max": 1.0},
        "rainbow": {"num_atoms": 21, "v_min": -1.0, "v_max": 1.0},
        "qr_dqn": {"num_quantiles": 8},
        "mmd_dqn": {"num_particles": 8},
        "iqn": {"num_fractions": 8, "num_target_fractions": 8, "num_policy_fractions": 8},
        "fqf": {"num_fractions": 8},
    }[name]  # fmt: skip
    algorithm = ALGORITHMS[name]
    config = dataclasses.replace(algorithm.Config(), **settings)
    train = training.make_train(
        algorithm.make_agent, config, env, params, total_steps=20_000, evaluations=1, eval_episodes=40
    )
    _, history = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    returns_by_seed = np.asarray(history["evaluation_return"]).mean((1, 2))
    assert np.median(returns_by_seed) >= 0.9, returns_by_seed

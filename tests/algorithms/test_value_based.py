"""What holds for every value-based agent beside `test_every_agent.py`: policies, exports, conventions of Atari."""

import dataclasses
import re

import by_hand
import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import portable

# eta_dqn asks for a stock beside the observation: it has tests of its own.
NAMES = [name for name, row in cases.CASES.items() if row.replay and row.world is cases.DISCRETE]
DISTRIBUTIONAL = [name for name in NAMES if hasattr(cases.module(name).Config(), "risk")]
CATEGORICAL = [name for name in NAMES if "v_min" in cases.row(name).small]

every_algorithm = pytest.mark.parametrize("name", NAMES)


def small_agent(name, env=None, **settings):
    own = {field: value for field, value in cases.row(name).small.items() if field not in cases.VALUE}
    settings = by_hand.TINY_VALUE | {"replay_capacity": 120} | own | settings
    return by_hand.agent_on(cases.module(name), env or by_hand.Choices(), **settings)


def larger_weights(name, state):
    """The state with weights so large that actions and laws differ from observation to observation."""
    # Larger logits would make certain laws, and so ties between the values of actions.
    factor = 2.0 if name in CATEGORICAL else 3.0
    network = jax.tree.map(lambda x: factor * x, state.learner.network.parameters)
    return state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))


# -- policies and predictions -----------------------------------------------------------------------------------------

RISKS = ("neutral", "cvar:0.3", "mean-variance:1")
NETWORKS = {
    "vectors": (by_hand.Choices(), (8, 9)),
    "images": (by_hand.Pictures(), (8, 9)),
    "one_layer": (by_hand.Choices(), (9,)),
}


@pytest.fixture(scope="module", params=[(name, kind) for name in NAMES for kind in NETWORKS], ids="-".join)
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
    return [{"risk": risk} for risk in RISKS] if name in DISTRIBUTIONAL else [{}]


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
        if agent.export is None:
            pytest.skip("there is no such file of it")
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


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONAL)
@pytest.mark.parametrize("risk", ["foo", "cvar", "cvar:0", "cvar:1.5", "mean-variance:-1", "neutral:1"])
def test_unknown_risks_are_refused(name, risk):
    with pytest.raises(ValueError, match=re.escape(f"--risk is '{risk}'; it must be neutral, cvar:LEVEL with")):
        small_agent(name, risk=risk)


@pytest.mark.parametrize("name", CATEGORICAL)
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


@every_algorithm
def test_conventions_of_atari_stand_with_clipped_rewards_only(name):
    """What belongs to rewards of at most 1, cut, is in the paper's preset, where they are; never in a default."""
    config, paper = cases.module(name).Config(), cases.module(name).PRESETS["paper"]
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
        ("log_dqn", 80_000, 32_000, 1_000_000),
        ("iterated_dqn", 80_000, 24_000, 1_000_000),
    ],
)
def test_paper_presets_count_in_the_right_units(name, warmup_frames, target_frames, epsilon_frames):
    """Frames as DQN Zoo and the authors' configurations state them; ours count agent steps and updates."""
    paper = cases.module(name).PRESETS["paper"]
    assert (paper["num_envs"], paper["steps_per_iteration"], paper["updates_per_iteration"]) == (1, 4, 1)
    assert paper["warmup_steps"] * FRAMES == warmup_frames
    assert paper["target_period"] * 4 * FRAMES == target_frames
    if epsilon_frames:
        assert paper["exploration_steps"] * FRAMES == epsilon_frames


@every_algorithm
def test_presets_are_configurations(name):
    algorithm = cases.module(name)
    assert algorithm.PRESETS.keys() >= {"CartPole-v1", "paper"}
    for preset in algorithm.PRESETS.values():
        settings = {field: value for field, value in preset.items() if field != "total_steps"}
        config = dataclasses.replace(algorithm.Config(), **settings)
        check_configuration(config)
        algorithm.make_agent(config, by_hand.Choices(), by_hand.Choices().default_params)

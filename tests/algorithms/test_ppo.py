"""PPO: the losses by hand, a whole iteration against loops in numpy, and what the first minibatch sees."""

import dataclasses

import by_hand
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.policy_gradient import ppo
from jaxrl_dist.learning import clipped, portable, returns
from jaxrl_dist.learning.policies import Choice

TINY = {"num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "learning_rate": 0.02}
CONTINUOUS = TINY | {"normalize_observations": True, "normalize_rewards": True}
KINDS = {"choice": (by_hand.Choices(), TINY), "continuous": (by_hand.Drift(), CONTINUOUS)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def agent_of(kind, **settings):
    env, base = KINDS[kind]
    return by_hand.agent_on(ppo, env, **(base | settings))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_the_objective_is_flat_where_the_ratio_has_been_moved_enough():
    ratio = jnp.array([0.5, 0.9, 1.0, 1.1, 1.5])
    for advantage, objective, slopes in (
        (1, [0.5, 0.9, 1.0, 1.1, 1.2], [1, 1, 1, 1, 0]), (-1, [-0.8, -0.9, -1.0, -1.1, -1.5], [0, -1, -1, -1, -1])
    ):  # fmt: skip
        for i in range(5):
            loss, slope = jax.value_and_grad(lambda x, a=advantage: ppo.policy_loss(x[None], jnp.full(1, a), 0.2))(
                ratio[i]
            )
            assert -loss == pytest.approx(objective[i])
            assert -slope == pytest.approx(slopes[i])


def test_values_are_held_near_what_they_were():
    numbers = (jnp.array([2.0]), jnp.array([1.0]), jnp.array([0.0]))
    assert ppo.value_loss(*numbers, 0.2) == pytest.approx(2)  # 4 against 1.44
    assert ppo.value_loss(jnp.array([0.5]), *numbers[1:], 0.2) == pytest.approx(0.32)  # 0.25 against 0.64
    assert ppo.value_loss(jnp.array([0.5]), *numbers[1:], None) == pytest.approx(0.125)


def test_advantages_are_normalised_with_the_standard_deviation_of_all():
    found = ppo.normalized(jnp.array([0.572, -0.4, 2.8448, 1.34]))
    np.testing.assert_allclose(found, [-0.435938, -1.255219, 1.479762, 0.211395], atol=2e-6)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        ppo.policy_loss(jnp.ones(3), jnp.ones((3, 1)), 0.2)
    with pytest.raises(AssertionError):
        ppo.value_loss(jnp.ones(3), jnp.ones(1), jnp.ones(3), 0.2)


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("clip_values", [True, False])
def test_iterations_equal_loops_in_numpy(kind, clip_values, monkeypatch):
    """Three rollouts, all minibatches of both epochs; what was lived is taken from the program, the rest is by hand."""
    agent, config = agent_of(kind, clip_values=clip_values, annealing_steps=3 * 24, clip_range=0.05, learning_rate=0.05)
    seen = []
    plain = ppo.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(ppo.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    parameters, adam = clipped_by_hand.flat(state.learner.parameters), None
    adam = clipped_by_hand.Adam(parameters)
    sums, ends, clipped = np.zeros(config.num_envs), [], []
    for iteration in range(3):
        key = jax.random.split(jax.random.clone(state.key), 3)[2]
        before, (state, metrics) = state, step(state)
        jax.effects_barrier()
        lived, (action, log_density) = seen[-1]
        done = lived.terminated | lived.truncated
        ends.append((lived.terminated.sum(), lived.truncated.sum()))

        def seen_as(x, statistics=before.normalizer):
            if statistics is None:
                return x.astype(np.float64)
            deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
            return np.clip((x - np.asarray(statistics.mean, np.float64)) / deviation, -10, 10)

        reward = lived.reward.astype(np.float64)
        if config.normalize_rewards:
            discounted = []
            for t in range(config.num_steps):
                sums = config.discount * sums + reward[t]
                discounted.append(sums)
                sums = np.where(done[t], 0, sums)
            np.testing.assert_allclose(state.scale.sums, sums, rtol=1e-4, atol=1e-5)
            if iteration == 0:
                assert state.scale.statistics.variance == pytest.approx(np.var(discounted), rel=1e-4)
            reward = np.clip(reward / np.sqrt(float(state.scale.statistics.variance) + 1e-8), -10, 10)
        critic = clipped_by_hand.part(parameters, "critic")
        value, following = (
            clipped_by_hand.tanh_forward(critic, seen_as(x))[-1][..., 0]
            for x in (lived.observation, lived.next_observation)
        )
        advantage = np.asarray(returns.gae(
            *map(jnp.asarray, (reward, value, following, lived.terminated, lived.truncated)), config.discount,
            config.gae_decay,
        ), np.float64)  # fmt: skip
        batch = {
            "observation": seen_as(lived.observation), "action": action, "log_density": log_density, "value": value,
            "advantage": advantage, "target": advantage + value,
        }  # fmt: skip
        parameters, found = clipped_by_hand.epochs(
            parameters, adam, batch, config, config.learning_rate * (1 - iteration / 3), key
        )
        clipped += [x["clipped_ratios"] for x in found]
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                clipped_by_hand.flat(state.learner.parameters)[name], expected, rtol=2e-3, atol=2e-5, err_msg=name
            )
        for name in found[0]:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=5e-3, atol=1e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert 0 < np.mean(clipped) < 1


@every_kind
def test_the_first_minibatch_sees_the_policy_that_acted(kind):
    """Ratios of 1: nothing is clipped, and no divergence."""
    agent, _ = agent_of(kind, num_epochs=1, num_minibatches=1, normalize_rewards=False)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    step = by_hand.quick(agent.step)
    for _ in range(3):
        state, metrics = step(state)
        assert metrics["clipped_ratios"].total == 0
        assert abs(float(metrics["approximate_kl"].total)) < 1e-6


# -- how it acts ------------------------------------------------------------------------------------------------------


@every_kind
def test_it_explores_by_its_law_and_is_evaluated_by_the_mode(kind, tmp_path):
    agent, _ = agent_of(kind)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    actor = state.learner.parameters["params"]["actor"]["layers"]
    actor["kernel_2"] = 200 * actor["kernel_2"]  # actions that differ from observation to observation
    observation = jax.random.normal(jax.random.key(5), (400, 3))
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    same, _ = agent.policy.act(state, observation, (), jax.random.key(1))
    np.testing.assert_array_equal(action, same)
    drawn, bonus = agent.claim.policy(state, observation, jax.random.key(0))
    assert not np.array_equal(action, drawn)
    np.testing.assert_array_equal(bonus, np.zeros(400))
    assert agent.claim.of_states
    assert agent.claim.law(state, observation, action).atoms.shape == (400, 1)
    bounds = () if kind == "choice" else (np.full(2, -1.0), np.full(2, 1.0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state), *bounds)
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    np.testing.assert_allclose(exported, action, rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.asarray(action))) > 1
    if kind == "continuous":
        assert np.abs(action).max() == 1  # some are cut


def test_images_pass_a_torso_that_both_share(tmp_path):
    agent, _ = by_hand.agent_on(ppo, by_hand.Pictures(), **(TINY | {"hidden": (7,)}))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    assert set(state.learner.parameters["params"]) == {"torso", "actor", "critic"}
    positions = 2 * jax.random.normal(jax.random.key(5), (60, 3))
    observation = jax.vmap(by_hand.Pictures().picture)(positions)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)
    assert len(np.unique(action)) > 1


# -- bad input --------------------------------------------------------------------------------------------------------


def test_minibatches_must_divide_the_rollout():
    with pytest.raises(ValueError, match="--num-minibatches is 5; it must divide --num-envs x --num-steps = 24"):
        agent_of("choice", num_minibatches=5)


def test_defaults_are_cleanrls():
    config = dataclasses.asdict(ppo.Config())
    assert (config["num_envs"], config["num_steps"], config["num_epochs"], config["num_minibatches"]) == (4, 128, 4, 4)
    assert (config["learning_rate"], config["discount"], config["gae_decay"]) == (2.5e-4, 0.99, 0.95)
    assert (config["clip_range"], config["entropy_weight"], config["value_weight"]) == (0.2, 0.01, 0.5)
    assert (config["gradient_bound"], config["adam_epsilon"]) == (0.5, 1e-5)


def test_an_even_policy_at_the_start():
    agent, _ = agent_of("choice")
    state = by_hand.quick(agent.init)(jax.random.key(0))
    policy, _ = clipped.Network((6, 5), 3, False).apply(state.learner.parameters, jnp.zeros((1, 3)))
    assert isinstance(policy, Choice)
    assert policy.entropy()[0] == pytest.approx(np.log(3), abs=1e-4)

"""RND: the bonus and both streams by hand, whole iterations in numpy, and what naive implementations get wrong."""

import dataclasses

import by_hand
import distilled_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.policy_gradient import rnd
from jaxrl_dist.learning import distillation, draws, normalization, portable, returns

TINY = distilled_by_hand.TINY


def agent_of(env=None, **settings):
    return by_hand.agent_on(rnd, env or by_hand.Choices(), **(TINY | settings))


# -- equations --------------------------------------------------------------------------------------------------------


def test_the_bonus_is_the_mean_error():
    found = rnd.bonus(jnp.array([[2.0, 1.0], [0.0, 0.0]]), jnp.array([[1.0, -1.0], [0.0, 3.0]]))
    np.testing.assert_allclose(found, [2.5, 4.5])
    with pytest.raises(AssertionError):
        rnd.bonus(jnp.ones((3, 2)), jnp.ones((1, 2)))


def test_the_predictor_learns_from_what_is_kept_alone():
    prediction, answer = jnp.array([[2.0, 1.0], [0.0, 0.0], [9.0, 9.0]]), jnp.array([[1.0, -1.0], [0.0, 3.0], [0, 0]])
    kept = jnp.array([True, True, False])
    loss, slope = jax.value_and_grad(rnd.predictor_loss)(prediction, answer, kept)
    assert loss == pytest.approx((2.5 + 4.5) / 2)
    np.testing.assert_allclose(slope, [[0.5, 1.0], [0.0, -1.5], [0.0, 0.0]])
    assert rnd.predictor_loss(prediction, answer, jnp.zeros(3, bool)) == 0


def test_bonuses_are_divided_by_the_deviation_of_sums_that_go_on():
    """The code begins with a count of 1e-4 of a variance of 1, which is felt in the fifth digit."""
    reward, goes_on = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), jnp.zeros((3, 2), bool)
    scale, scaled = normalization.scale_rewards(normalization.create_scale(2), reward, goes_on, 0.99)
    np.testing.assert_allclose(scale.sums, [2.9801, 1.99], rtol=1e-6)
    assert scale.statistics.count == 6
    np.testing.assert_allclose(scaled[:, 0], [1.067942, 0, 2.135884], rtol=5e-5)
    begun = normalization.RunningStatistics(jnp.float32(1e-4), jnp.float32(0), jnp.float32(1))
    scale, scaled = normalization.scale_rewards(normalization.RewardScale(jnp.zeros(2), begun), reward, goes_on, 0.99)
    assert float(scale.statistics.mean) == pytest.approx(1.326661, abs=1e-6)
    assert float(scale.statistics.variance) == pytest.approx(0.876809, abs=1e-6)
    np.testing.assert_allclose(scaled[:, 0], [1.067942, 0, 2.135884], atol=2e-6)
    # A second rollout goes on from the sums of the first, and nothing is centred: no bonus becomes a punishment.
    scale, scaled = normalization.scale_rewards(scale, jnp.full((3, 2), 0.1), goes_on, 0.99)
    np.testing.assert_allclose(scale.sums[0], 0.99**3 * 2.9801 + 0.1 * (1 + 0.99 + 0.99**2), rtol=1e-5)
    assert (scaled > 0).all()


def test_two_streams_by_hand():
    value = jnp.array([[0.5], [0.4], [0.3], [0.2]])
    end, never = jnp.array([[False], [True], [False]]), jnp.zeros((3, 1), bool)
    of_bonuses = returns.gae(jnp.ones((3, 1)), value[:-1], value[1:], never, never, 0.99, 0.95)
    of_rewards = returns.gae(jnp.array([[0.0], [1.0], [0.0]]), value[:-1], value[1:], end, never, 0.999, 0.95)
    np.testing.assert_allclose(of_bonuses[:, 0], [2.533946, 1.741569, 0.898], rtol=1e-6)
    np.testing.assert_allclose(of_rewards[:, 0], [0.469030, 0.6, -0.1002], rtol=1e-5)
    np.testing.assert_allclose((2 * of_rewards + of_bonuses)[:, 0], [3.472006, 2.941569, 0.6976], rtol=1e-6)


# -- whole iterations in numpy ----------------------------------------------------------------------------------------


def bonus_by_hand(prediction, answers, config):
    return ((prediction - answers[0]) ** 2).mean(1)


def choose(key, answers, config):
    key, kept_key = jax.random.split(key)
    kept = np.asarray(draws.uniform(kept_key, answers.shape[1:2])) < config.predictor_share
    return key, kept, answers[0]


@pytest.mark.parametrize("normalize_advantages", [False, True])
def test_iterations_equal_loops_in_numpy(normalize_advantages, monkeypatch):
    distilled_by_hand.assert_iterations_are(
        rnd, monkeypatch, bonus_by_hand, choose, normalize_advantages=normalize_advantages
    )


# -- what naive implementations get wrong -----------------------------------------------------------------------------


def test_the_policy_does_not_see_the_statistics_of_the_bonus():
    agent, _ = agent_of()
    state = by_hand.quick(agent.init)(jax.random.key(0))
    observation, key = jax.random.normal(jax.random.key(5), (50, 3)), jax.random.key(1)
    other = state._replace(statistics=jax.tree.map(lambda x: 3 * x + 1, state.statistics))
    for look in (lambda state: agent.claim.policy(state, observation, jax.random.clone(key))[0],
                 lambda state: agent.claim.law(state, observation, None).atoms):  # fmt: skip
        np.testing.assert_array_equal(look(state), look(other))


class Instant(by_hand.Choices):
    """Every step ends an episode; the third component of its successor is 1, of a start 0."""

    def step_env(self, key, state, action, params):
        position, state, reward, _, info = super().step_env(key, state, action, params)
        return position.at[2].set(1), state, reward, jnp.array(True), info

    def is_terminated(self, state, params):
        return jnp.array(True)

    def reset_env(self, key, params):
        position, state = super().reset_env(key, params)
        return position.at[2].set(0), state


def test_the_bonus_is_of_true_successors_and_its_return_goes_on_through_ends_of_episodes():
    agent, config = agent_of(Instant(), learning_rate=0.0)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    assert state.statistics.count == agent.clock.warmup_steps == 12
    state, metrics = by_hand.quick(agent.step)(state)
    np.testing.assert_allclose([state.statistics.mean[2], state.statistics.variance[2]], [1, 0], atol=1e-6)
    assert metrics["episode_length"].count == config.num_envs * config.num_steps
    # What bonuses are divided by is the deviation of sums of many, all above the last bonus alone.
    mean = float(metrics["bonus"].total / metrics["bonus"].count)
    assert float(state.scale.sums.mean()) > 2 * mean


def test_the_bonus_ranks_places_by_how_seldom_they_were_seen(monkeypatch):
    correlation = rank_correlation(rnd, monkeypatch)
    assert correlation < -0.9, correlation


def rank_correlation(module, monkeypatch, size=10, iterations=20):
    """Spearman's, of bonus and count: 20,000 steps of a policy that stays even, in DeepSea, where places are seen the
    less the further they are from the middle."""
    env, params = envs.make("DeepSea-bsuite", size=size)
    preset = {name: x for name, x in module.PRESETS["DeepSea-bsuite"].items() if name != "total_steps"}
    config = module.Config(**preset | {"extrinsic_weight": 0.0, "intrinsic_weight": 0.0})
    seen, plain = [], module.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), rollout.transition.next_observation, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(module.rollouts, "collect", recorded)
    agent = module.make_agent(config, env, params)
    step, state = jax.jit(agent.step), jax.jit(agent.init)(jax.random.key(0))
    for _ in range(iterations):
        state, _ = step(state)
    jax.effects_barrier()
    counts = np.sum([x.reshape(-1, size**2).sum(0) for x in seen], axis=0)
    there = np.flatnonzero(counts)
    assert len(there) > 45
    places = normalization.normalize(state.statistics, jnp.eye(size**2)[there].reshape(-1, size, size), 5)
    _, predictor, random_network = distillation.networks_of(config)
    prediction = predictor.apply(state.learner.parameters["predictor"], places)
    if module is rnd:
        bonus = rnd.bonus(prediction, random_network.apply(state.target, places))
    else:
        answers = jax.vmap(random_network.apply, (0, None), 1)(state.target, places)
        bonus = module.bonus(prediction, answers, config.distance_weight, config.bonus_count)
    table = pd.DataFrame({"bonus": np.asarray(bonus), "count": counts[there]})
    return table.corr(method="spearman").loc["bonus", "count"]


# -- how it acts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [by_hand.Choices(), by_hand.Drift(), by_hand.Pictures()])
def test_it_is_exported_as_ppo_is(env, tmp_path):
    """A choice of actions, continuous ones, and images, which all networks take."""
    agent, _ = agent_of(env, hidden=(7,))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    state, metrics = by_hand.quick(agent.step)(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.learner.parameters, metrics)))
    observation = 2 * jax.random.normal(jax.random.key(5), (60, 3))
    if isinstance(env, by_hand.Pictures):
        observation = jax.vmap(env.picture)(observation)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    bounds = () if action.ndim == 1 else (np.full(2, -1.0), np.full(2, 1.0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state), *bounds)
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    np.testing.assert_allclose(exported, action, rtol=1e-4, atol=1e-5)


def test_defaults_are_those_of_the_code():
    config = dataclasses.asdict(rnd.Config())
    assert (config["num_envs"], config["num_steps"], config["num_epochs"], config["num_minibatches"]) == (
        128,
        128,
        4,
        4,
    )
    assert (config["discount"], config["intrinsic_discount"], config["gae_decay"]) == (0.999, 0.99, 0.95)
    assert (config["extrinsic_weight"], config["intrinsic_weight"], config["value_weight"]) == (2, 1, 1)
    assert (config["learning_rate"], config["clip_range"], config["entropy_weight"]) == (1e-4, 0.1, 1e-3)
    assert (config["predictor_share"], config["clip_values"], config["normalize_advantages"]) == (0.25, False, False)


def test_minibatches_must_divide_the_rollout():
    with pytest.raises(ValueError, match="--num-minibatches is 5; it must divide --num-envs x --num-steps = 24"):
        agent_of(num_minibatches=5)

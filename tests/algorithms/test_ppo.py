"""PPO: the losses by hand, a whole iteration against loops in numpy, and what the first minibatch sees."""

import dataclasses
import functools
import itertools
import re

import by_hand
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import proofs
import pytest
from gymnax.environments import environment, spaces

from jaxrl_dist import envs
from jaxrl_dist.algorithms.policy_gradient import ppo
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.quantile import midpoints
from jaxrl_dist.envs import bridge
from jaxrl_dist.learning import clipped, portable, returns
from jaxrl_dist.learning.policies import Choice

TINY = {"num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "learning_rate": 0.02}
CONTINUOUS = TINY | {"normalize_observations": True, "normalize_rewards": True}
KINDS = {"choice": (by_hand.Choices(), TINY), "continuous": (by_hand.Drift(), CONTINUOUS)}
every_kind = pytest.mark.parametrize("kind", KINDS)
LAWS = {"critic": "quantile", "num_quantiles": 5, "kappa": 0.3}


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


def test_the_estimated_divergence_is_never_negative():
    """Of the sheet's ratios one by one, and 0 for equal policies."""
    ratio = jnp.array([0.5, 0.9, 1.1, 1.5])
    found = [clipped.approximate_kl(jnp.log(x[None])) for x in ratio]
    np.testing.assert_allclose(found, [0.193147, 0.005361, 0.004690, 0.094535], atol=1e-6)
    assert clipped.approximate_kl(jnp.log(ratio)) == pytest.approx(np.mean(found), abs=1e-6)
    assert clipped.approximate_kl(jnp.zeros(3)) == 0


def test_a_law_is_fitted_by_the_quantile_huber_loss():
    quantiles, target = jnp.array([[0.0, 1.0]]), jnp.array([[0.1, 3.0]])
    # tau 1/4, 3/4; errors 0.1, 3 and -0.9, 2: below kappa squares, beyond it lines.
    pairs = 0.25 * 0.005 + 0.25 * 0.5 * 2.75 + 0.25 * 0.5 * 0.65 + 0.75 * 0.5 * 1.75
    assert ppo.law_loss(quantiles, target, 0.5) == pytest.approx(pairs / 4 / 0.5)
    with pytest.raises(AssertionError):
        ppo.law_loss(quantiles, target[0], 0.5)


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


VARIANTS = {
    "clipped values": {}, "free values": {"clip_values": False},
    "early stop": {"normalize_advantages": False}, "laws": LAWS, "risk": LAWS | {"risk": "cvar:0.35"},
}  # fmt: skip
# So near that one update is all, and so far that some iterations make more.
TARGET_KL = {"choice": 1e-6, "continuous": 0.02}


@every_kind
@pytest.mark.parametrize("variant", VARIANTS)
def test_iterations_equal_loops_in_numpy(kind, variant, monkeypatch):
    """Three rollouts, all minibatches of both epochs; what was lived is taken from the program, the rest is by hand."""
    settings = {"annealing_steps": 3 * 24, "clip_range": 0.05, "learning_rate": 0.05} | VARIANTS[variant]
    if variant == "early stop":
        settings["target_kl"] = TARGET_KL[kind]
    agent, config = agent_of(kind, **settings)
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
    sums, ends, found_of_all = np.zeros(config.num_envs), [], []
    for iteration in range(3):
        keys = jax.random.split(jax.random.clone(state.key), 4)
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
            clipped_by_hand.tanh_forward(critic, seen_as(x))[-1] for x in (lived.observation, lived.next_observation)
        )
        if config.critic == "quantile":
            quantiles = value
            target = np.asarray(returns.lambda_law(
                *map(jnp.asarray, (reward, following, lived.terminated, lived.truncated)), config.discount,
                config.gae_decay, keys[3],
            ), np.float64)  # fmt: skip
        value, following = value.mean(-1), following.mean(-1)
        advantage = np.asarray(returns.gae(
            *map(jnp.asarray, (reward, value, following, lived.terminated, lived.truncated)), config.discount,
            config.gae_decay,
        ), np.float64)  # fmt: skip
        if config.critic == "mean":
            target = advantage + value
        elif variant == "risk":
            advantage = np.vectorize(slow_influence, signature="(n),(m)->(m)")(quantiles, target).mean(-1)
        batch = {
            "observation": seen_as(lived.observation), "action": action, "log_density": log_density, "value": value,
            "advantage": advantage, "target": target,
        }  # fmt: skip
        parameters, found = clipped_by_hand.epochs(
            parameters, adam, batch, config, config.learning_rate * (1 - iteration / 3), keys[2]
        )
        found_of_all += found
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                clipped_by_hand.flat(state.learner.parameters)[name], expected, rtol=2e-3, atol=2e-5, err_msg=name
            )
        for name in found[0]:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=5e-3, atol=1e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert 0 < np.mean([x["clipped_ratios"] for x in found_of_all]) < 1
    made = np.mean([x["updates_made"] for x in found_of_all])
    if variant != "early stop":
        assert made == 1
    elif kind == "choice":
        assert made == 1 / 8  # the first minibatch of an iteration sees the policy that acted
    else:
        assert 1 / 8 < made < 1


def slow_influence(quantiles, outcomes, level=0.35):
    """phi of CVaR, the integral of C'(F) from the lowest quantile, by small steps, less its mean over the law; between
    the quantiles i and i + 1 C' is the mean of 1 / level up to `level` over the fractions between theirs."""
    ascending, count = np.sort(quantiles), len(quantiles)
    edges = np.array([0, *(np.arange(count) + 0.5) / count, 1])
    slopes = [
        (min(high, level) - min(low, level)) / level / (high - low) for low, high in itertools.pairwise(edges)
    ]  # fmt: skip

    def climbed(x):
        ends, total = [-np.inf, *ascending, np.inf], 0.0
        for low, high, slope in zip(ends, ends[1:], slopes, strict=False):
            start = ascending[0]
            total += slope * (np.clip(x, low, high) - np.clip(start, low, high))
        return total

    return np.array([climbed(x) for x in outcomes]) - np.mean([climbed(x) for x in ascending])


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


def test_without_a_clip_the_gradient_is_that_of_reinforce_with_a_baseline():
    """One epoch, one minibatch: Adam's first moment against finite differences of mean A log pi, A of the critic."""
    settings = {"num_epochs": 1, "num_minibatches": 1, "clip_range": 1e6, "normalize_advantages": False}
    agent, _ = agent_of("choice", **settings, entropy_weight=0.0, gradient_bound=1e6)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    parameters, seen = clipped_by_hand.flat(state.learner.parameters), []
    plain = ppo.rollouts.epochs

    def recorded(update, progress, batch, key, **options):
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), batch)
        return plain(update, progress, batch, key, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.rollouts, "epochs", recorded)
        state, _ = by_hand.quick(agent.step)(state)
        jax.effects_barrier()
    (batch,) = seen
    moment = by_hand.network(optax.tree.get(state.learner.optimizer, "mu"), "actor")

    def objective(net):
        logits = clipped_by_hand.tanh_forward(net, batch.observation.astype(np.float64))[-1]
        taken = np.log(by_hand.softmax(logits))[np.arange(len(logits)), batch.action]
        return -(batch.advantage * taken).mean()

    actor = clipped_by_hand.part(parameters, "actor")
    for name, place in (("kernel_0", (0, 1, 2)), ("bias_1", (0, 3)), ("kernel_2", (0, 4, 1)), ("bias_2", (0, 2))):
        values = []
        for change in (1e-5, -1e-5):
            moved = {key: x.copy() for key, x in actor.items()}
            moved[name][place] += change
            values.append(objective(moved))
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope) > 1e-5
        assert 10 * moment[name][place] == pytest.approx(slope, rel=1e-3)


# -- what critics find ------------------------------------------------------------------------------------------------


class Coin(environment.Environment):
    """Every step is worth 0 or 1 and changes nothing: with gamma 1/2 returns are even on [0, 2], of mean 1."""

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=20)

    def step_env(self, key, state, action, params):
        reward = jax.random.bernoulli(key).astype(jnp.float32)
        return jnp.ones(1), environment.EnvState(state.time + 1), reward, jnp.array(False), {}

    def reset_env(self, key, params):
        return jnp.ones(1), environment.EnvState(0)

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (1,))


@pytest.mark.parametrize("critic", ["mean", "quantile"])
def test_the_critic_finds_what_a_coin_is_worth(critic):
    """The law, too, also where steps of a rollout are cut by time limits."""
    agent, _ = by_hand.agent_on(
        ppo, Coin(), num_envs=16, num_steps=32, num_epochs=4, hidden=(16,), learning_rate=3e-3, discount=0.5,
        annealing_steps=80 * 512, critic=critic, num_quantiles=10, kappa=0.01, clip_values=False,
    )  # fmt: skip
    state = by_hand.quick(agent.init)(jax.random.key(0))
    state = by_hand.quick(lambda x: jax.lax.fori_loop(0, 80, lambda _, y: agent.step(y)[0], x))(state)
    found = agent.claim.law(state, jnp.ones((1, 1)), jnp.zeros(1))
    assert laws.mean(found)[0] == pytest.approx(1, abs=0.05)
    if critic == "quantile":
        np.testing.assert_allclose(found.atoms[0], 2 * midpoints(10), atol=0.12)


@pytest.mark.parametrize("risk", ["neutral", "cvar:0.3"])
def test_probes_with_a_critic_of_laws(risk, proof):
    """What the probes ask of the mean, with laws; they have no chance, where every measure is the mean."""
    from test_every_agent import failed_with  # which needs the rows of all agents

    settings = {"critic": "quantile", "num_quantiles": 6, "risk": risk}
    agent = programs.build("ppo", **settings).agent(0)
    proof(proofs.program(agent.step, jax.eval_shape(agent.init, jax.random.key(0))))
    assert not failed_with("ppo", programs.CASES, **settings)


# -- risk -------------------------------------------------------------------------------------------------------------

MEASURES = ("neutral", "cvar:0.3", "wang:-0.75", "wang:0.5", "cpw:0.71", "power:-2", "norm:3", "mean-variance:0.2")


@pytest.mark.parametrize("text", MEASURES)
def test_what_returns_weigh_is_the_gradient_of_the_risk(text):
    """A choice between two chances: the sum over a of d pi(a|s) times the mean weight of what follows a, for the exact
    laws, against finite differences of the risk of the return from s."""
    risk = risks.parse(text)
    rng = np.random.default_rng(1)
    atoms = rng.normal(size=(2, 6)).round(2) * [[1.0], [3.0]] + [[0.0], [0.4]]  # after each action, in float64
    masses = rng.dirichlet(np.ones(6), size=2)

    def law_at(logit):
        chance = 1 / (1 + np.exp(-np.array([-logit, logit])))
        return Law(atoms.ravel(), (chance[:, None] * masses).ravel())

    logit = 0.4
    with jax.enable_x64(True):
        value = jax.jit(lambda law: risks.value(risk, law))
        slope = float(value(law_at(logit + 1e-4)) - value(law_at(logit - 1e-4))) / 2e-4
    quantiles = laws.quantile(jax.tree.map(jnp.float32, law_at(logit)), midpoints(3_000))
    phi = np.asarray(ppo.influence(risk, quantiles[None], jnp.float32(atoms.ravel())[None]))[0].reshape(2, 6)
    chance = 1 / (1 + np.exp(-logit))
    of_actions = (phi * masses).sum(-1)
    assert chance * of_actions[1] + (1 - chance) * of_actions[0] == pytest.approx(0, abs=5e-3)
    assert abs(slope) > 0.05
    assert chance * (1 - chance) * (of_actions[1] - of_actions[0]) == pytest.approx(slope, rel=0.02)


def test_the_weight_of_a_return_for_the_mean_is_its_excess():
    """So that the advantage is the ordinary one where nothing of the lambda-return is drawn."""
    rng = np.random.default_rng(0)
    reward, atoms = rng.normal(size=(7, 2)), rng.normal(size=(8, 2, 5))
    ends = rng.random((2, 7, 2)) < 0.2
    arrays = [jnp.asarray(x) for x in (np.float32(reward), np.float32(atoms[1:]), *ends)]
    for decay in (0.0, 1.0):
        target = returns.lambda_law(*arrays, 0.9, decay, jax.random.key(0))
        for text in ("neutral", "cvar:1", "wang:0", "mean-variance:0"):
            weigh = jax.vmap(functools.partial(ppo.influence, risks.parse(text)))
            found = weigh(jnp.float32(atoms[:-1]), target).mean(-1)
            value = jnp.float32(atoms.mean(-1))
            advantage = returns.gae(arrays[0], value[:-1], value[1:], *arrays[2:], 0.9, decay)
            np.testing.assert_allclose(found, advantage, atol=2e-5)


@pytest.mark.parametrize("text", ["neutral", "cvar:0.25"])
def test_over_the_canyon_each_risk_has_its_lane(text):
    """The edge is the best on average, the wall for the worst quarter of returns: the middle of three seeds."""
    env, params = envs.make("bridge", step_costs=(0.24, 0.18, 0.02), climb_cost=0.2, fall_cost=1.0, goal_reward=1.0)
    config = ppo.Config(
        num_envs=32, num_steps=24, learning_rate=2e-3, annealing_steps=60_000, hidden=(32,), critic="quantile",
        num_quantiles=16, kappa=0.02, entropy_weight=0.003, risk=text,
    )  # fmt: skip
    agent, iterations = ppo.make_agent(config, env, params), 60_000 // (32 * 24)
    state = by_hand.quick(jax.vmap(agent.init))(jax.random.split(jax.random.key(0), 3))
    step = jax.vmap(lambda state: agent.step(state)[0])
    state = by_hand.quick(lambda x: jax.lax.fori_loop(0, iterations, lambda _, y: step(y), x))(state)
    looks = jnp.eye(env.length * 3)  # of all columns and lanes
    act = jax.jit(jax.vmap(lambda one: agent.policy.act(one, looks, (), jax.random.key(0))[0]))
    policies = act(state).reshape(3, env.length, 3)
    paths = [tuple(bridge.path_of(env, params, np.asarray(policy))) for policy in policies]
    best = bridge.path_of(env, params, bridge.risk_policy(env, params, risks.parse(text), config.discount))
    assert paths.count(tuple(best)) >= 2, paths


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


@pytest.mark.parametrize("convolution", [True, False])
@pytest.mark.parametrize("hidden", [(7,), (9, 7)])
def test_images_pass_a_torso_that_both_share_or_are_flattened(convolution, hidden, tmp_path):
    """And a policy beside a critic of laws is written like any other."""
    settings = TINY | LAWS | {"hidden": hidden, "convolution": convolution}
    agent, _ = by_hand.agent_on(ppo, by_hand.Pictures(), **settings)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    parts = state.learner.parameters["params"]
    assert set(parts) == {"torso", "actor", "critic"} if convolution else {"actor", "critic"}
    size = by_hand.Pictures().picture(jnp.zeros(3)).size
    assert len(parts["actor"]["layers"]["kernel_0"][0]) == (hidden[-1] if convolution else size)
    positions = 2 * jax.random.normal(jax.random.key(5), (60, 3))
    observation = jax.vmap(by_hand.Pictures().picture)(positions)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)
    assert len(np.unique(action)) > 1
    claimed = agent.claim.law(state, observation, action)
    assert claimed.atoms.shape == (60, 5)
    assert not agent.claim.learns_mean


# -- bad input --------------------------------------------------------------------------------------------------------


def test_minibatches_must_divide_the_rollout():
    with pytest.raises(ValueError, match="--num-minibatches is 5; it must divide --num-envs x --num-steps = 24"):
        agent_of("choice", num_minibatches=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"risk": "cvar:0.5"}, "--risk is 'cvar:0.5'; without --critic quantile it must be 'neutral'"),
        ({"critic": "quantile", "risk": "cvar:2"}, "--risk is 'cvar:2'; it must be neutral, cvar:LEVEL"),
    ],
)
def test_risks_that_cannot_be_climbed_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        agent_of("choice", **settings)


def test_the_convolution_is_minatars():
    """16 filters of 3 x 3, then one layer of 128, which both heads see (Young & Tian 2019)."""
    env, params = envs.make("Breakout-MinAtar")
    agent = ppo.make_agent(ppo.Config(hidden=(128,)), env, params)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(agent.init, jax.random.key(0)).learner.parameters["params"])
    assert shapes["torso"]["convolution"]["kernel"] == (3, 3, 4, 16)
    assert shapes["torso"]["mlp"]["layers"]["kernel_0"] == (1, 8 * 8 * 16, 128)
    assert shapes["actor"]["layers"]["kernel_0"] == (1, 128, env.num_actions)
    assert shapes["critic"]["layers"]["kernel_0"] == (1, 128, 1)


def test_presets_of_minatar_are_purejaxrls():
    (env, params), settings = envs.make("Breakout-MinAtar"), dict(ppo.PRESETS["Breakout-MinAtar"])
    settings.pop("total_steps")
    config = dataclasses.replace(ppo.Config(), **settings)
    assert (config.num_envs, config.num_minibatches, config.learning_rate) == (64, 8, 5e-3)
    agent = ppo.make_agent(config, env, params)
    parameters = jax.eval_shape(agent.init, jax.random.key(0)).learner.parameters
    layers = {"kernel_0": (1, 400, 64), "kernel_1": (1, 64, 64), "kernel_2": (1, 64, env.num_actions)}
    assert {name: parameters["params"]["actor"]["layers"][name].shape for name in layers} == layers
    # Rectified: with weights turned around, a layer of tanh would turn its features around, too.
    network = clipped.network_of(config, env, params)
    parameters = network.init(jax.random.key(0), jnp.zeros((1, 10, 10, 4)))
    observation = jax.random.uniform(jax.random.key(1), (5, 10, 10, 4))
    first = parameters["params"]["critic"]["layers"]["kernel_0"]
    parameters["params"]["critic"]["layers"]["kernel_0"] = -first
    turned = network.apply(parameters, observation)[1]
    parameters["params"]["critic"]["layers"]["kernel_0"] = first
    assert jnp.abs(network.apply(parameters, observation)[1] + turned).min() > 1e-4


def test_defaults_are_cleanrls():
    config = dataclasses.asdict(ppo.Config())
    assert (config["num_envs"], config["num_steps"], config["num_epochs"], config["num_minibatches"]) == (4, 128, 4, 4)
    assert (config["learning_rate"], config["discount"], config["gae_decay"]) == (2.5e-4, 0.99, 0.95)
    assert (config["clip_range"], config["entropy_weight"], config["value_weight"]) == (0.2, 0.01, 0.5)
    assert (config["gradient_bound"], config["adam_epsilon"]) == (0.5, 1e-5)
    assert (config["normalize_advantages"], config["target_kl"], config["critic"]) == (True, 0, "mean")


def test_an_even_policy_at_the_start():
    agent, _ = agent_of("choice")
    state = by_hand.quick(agent.init)(jax.random.key(0))
    policy, _ = clipped.Network((6, 5), 3, False).apply(state.learner.parameters, jnp.zeros((1, 3)))
    assert isinstance(policy, Choice)
    assert policy.entropy()[0] == pytest.approx(np.log(3), abs=1e-4)

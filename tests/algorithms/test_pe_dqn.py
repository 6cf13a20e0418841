"""PE-DQN: hand-worked numbers, whole updates against loops in numpy, the prior, and the treasure of the deep sea."""

import dataclasses
import itertools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import pe_dqn
from jaxrl_dist.algorithms.value_based.pe_dqn import Members
from jaxrl_dist.distributional import categorical, law, metrics, quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import experience
from jaxrl_dist.running import problem, training

SUPPORT = jnp.arange(-2.0, 3)
MASSES = jnp.array([0.1, 0.2, 0.4, 0.2, 0.1])
MEMBERS = Members(jnp.array([-1.3, -0.4, 0.1, 0.6, 1.7]), jnp.log(MASSES))
PROJECTED = [0.015, 0.142, 0.32, 0.329, 0.194]


def small_agent(env=None, **settings):
    small = {"num_atoms": 5, "v_min": -2.0, "v_max": 2.0, "prior_scale": 2.0}
    return by_hand.agent_on(pe_dqn, env or by_hand.Choices(), **(by_hand.TINY_VALUE | small | settings))


def target_by_hand() -> Law:
    one = jax.tree.map(lambda x: x[None], pe_dqn.mixture(MEMBERS, SUPPORT))
    return pe_dqn.target_law(jnp.array([0.5]), jnp.array([0.9]), one)


# -- laws and distances -----------------------------------------------------------------------------------------------


def test_disagreement_by_hand():
    assert pe_dqn.disagreement(MEMBERS, SUPPORT) == pytest.approx(0.42, abs=1e-6)
    # The authors' code compares the quantiles' projection: off by less than the distance of two atoms.
    projected = categorical.project(MEMBERS.quantiles, jnp.full(5, 0.2), SUPPORT)
    np.testing.assert_allclose(projected, [0.06, 0.22, 0.38, 0.2, 0.14], atol=1e-6)
    assert jnp.abs(jnp.cumsum(projected - MASSES)).sum() == pytest.approx(0.14, abs=1e-6)
    # Where both say the same they are 0 apart, in whatever order quantiles are.
    members = Members(jnp.array([1.0, 0, -2, 0, 1]), jnp.log(jnp.array([0.2, 1e-20, 0.4, 0.4, 1e-20])))
    assert pe_dqn.disagreement(members, SUPPORT) == pytest.approx(0, abs=1e-6)


def test_disagreement_is_the_distance_of_any_two_laws():
    keys = jax.random.split(jax.random.key(0), 2)
    support = jnp.linspace(-1, 3, 11)
    members = Members(*(3 * jax.random.normal(key, (40, 3, 11)) for key in keys))
    found = jax.jit(pe_dqn.disagreement)(members, support)
    masses = np.asarray(jax.nn.softmax(members.logits), np.float64)
    expected = metrics.wasserstein_1(np.asarray(members.quantiles), Law(np.broadcast_to(support, masses.shape), masses))
    assert found.shape == (40, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert (found >= jnp.abs(members.quantiles.mean(-1) - masses @ support) - 1e-4).all()


def test_mixture_by_hand():
    mixture = pe_dqn.mixture(MEMBERS, SUPPORT)
    assert float(MEMBERS.quantiles.mean()) == pytest.approx(0.14)
    assert float(law.mean(Law(SUPPORT, MASSES))) == pytest.approx(0, abs=1e-7)
    assert float(law.mean(mixture)) == pytest.approx(0.07, abs=1e-6)
    np.testing.assert_allclose(mixture.masses, [0.1] * 5 + [0.05, 0.1, 0.2, 0.1, 0.05], atol=1e-6)


def test_target_by_hand():
    target = target_by_hand()
    np.testing.assert_allclose(target.atoms, [[-0.67, 0.14, 0.59, 1.04, 2.03, -1.3, -0.4, 0.5, 1.4, 2.3]], atol=1e-6)
    np.testing.assert_allclose(target.masses, [[0.1] * 5 + [0.05, 0.1, 0.2, 0.1, 0.05]], atol=1e-6)
    np.testing.assert_allclose(categorical.project(*target, SUPPORT), [PROJECTED], atol=1e-6)
    quantiles = law.quantile(target, quantile.midpoints(5))
    np.testing.assert_allclose(quantiles, [[-0.67, 0.14, 0.5, 1.04, 2.03]], atol=1e-6)
    # Where an episode terminated all mass is at the reward.
    ended = pe_dqn.target_law(jnp.array([0.5]), jnp.array([0.0]), target)
    np.testing.assert_array_equal(ended.atoms, jnp.full((1, 10), 0.5))


def test_loss_by_hand():
    target, members = target_by_hand(), jax.tree.map(lambda x: x[None], MEMBERS)
    entropy = -float((jnp.array(PROJECTED) * MEMBERS.logits).sum())
    assert pe_dqn.loss_of(members, target, SUPPORT, 0.0) == pytest.approx(1.5155 + entropy, abs=1e-4)
    equal = target._replace(masses=jnp.full((1, 10), 0.1))
    entropy = -float((categorical.project(*equal, SUPPORT) * MEMBERS.logits).sum())
    assert pe_dqn.loss_of(members, equal, SUPPORT, 0.0) == pytest.approx(1.7455 + entropy, abs=1e-4)
    # The mean over the batch, not the sum.
    twice = [jax.tree.map(lambda x: jnp.repeat(x, 2, 0), tree) for tree in (members, target)]
    assert pe_dqn.loss_of(*twice, SUPPORT, 0.0) == pytest.approx(
        float(pe_dqn.loss_of(members, target, SUPPORT, 0.0)), rel=1e-6
    )


def test_bonuses_propagate():
    """Two states, of which the second goes on to itself or ends, half and half: what is learned are later distances."""
    distance, to_come = np.array([0.5, 0.2]), np.zeros(2)
    discount = np.array([0.9, 0.9, 0.0])
    for _ in range(60):
        following = Law(jnp.array(to_come[[1, 1, 1]])[:, None], jnp.ones((3, 1)))
        means = law.mean(pe_dqn.target_law(jnp.array(discount * distance[1]), jnp.array(discount), following))
        to_come = np.array([means[0], (means[1] + means[2]) / 2])
    np.testing.assert_allclose(to_come, [0.327273, 0.163636], atol=1e-5)
    np.testing.assert_allclose(distance + to_come, [0.827273, 0.363636], atol=1e-5)


# -- what the projections do ------------------------------------------------------------------------------------------


def test_moduli_of_the_projections():
    """That onto atoms brings no two laws apart, that onto quantiles does."""
    key = jax.random.split(jax.random.key(0), 4)
    atoms = jax.random.uniform(key[0], (2, 200, 7), minval=-2, maxval=2)
    masses = jax.nn.softmax(2 * jax.random.normal(key[1], (2, 200, 7)))
    before = metrics.wasserstein_1(*(Law(a, m) for a, m in zip(atoms, masses, strict=True)))
    after = metrics.wasserstein_1(*(Law(SUPPORT, x) for x in categorical.project(atoms, masses, SUPPORT)))
    assert (after <= before + 1e-5).all()
    one, other = (Law(jnp.array([0.0, 1]), jnp.array([p, 1 - p])) for p in (0.49, 0.51))
    assert metrics.wasserstein_1(one, other) == pytest.approx(0.02, abs=1e-6)
    medians = [law.quantile(x, quantile.midpoints(1)) for x in (one, other)]
    assert metrics.wasserstein_1(*medians) == 1


@pytest.mark.parametrize("atoms", [5, 21])
def test_iteration_converges_to_members_that_nearly_agree(atoms):
    """One state, rewards 0 or 1, each half the time: how far apart both models end is bounded (paper, section 4)."""
    discount = 0.5
    support = jnp.linspace(0, 2, atoms)

    @jax.jit
    def once(members):
        mixture = pe_dqn.mixture(members, support)
        moved = Law(jnp.concatenate([r + discount * mixture.atoms for r in (0, 1)]), jnp.tile(mixture.masses / 2, 2))
        return Members(law.quantile(moved, quantile.midpoints(atoms)), jnp.log(categorical.project(*moved, support)))

    members = Members(jnp.zeros(atoms), jnp.zeros(atoms))
    for _ in range(60):
        before, members = members, once(members)
    mixtures = [pe_dqn.mixture(x, support) for x in (before, members)]
    assert metrics.wasserstein_1(*mixtures) < 1e-4
    assert 0 < pe_dqn.disagreement(members, support) <= 4 / ((1 - discount) * atoms)
    assert law.mean(mixtures[1]) == pytest.approx(1, abs=2 / atoms)


# -- the deep sea -----------------------------------------------------------------------------------------------------


def returns_in_the_sea(size: int, actions: jax.Array, gamma: float = 1.0) -> np.ndarray:
    """Returns of sequences of actions `[sequences, size]`, 1 for the right one."""
    env, params = envs.make("DeepSea-bsuite", size=size)
    params = params.replace(randomize_actions=False)  # 1 is right everywhere

    def run(actions):
        def one(carry, action):
            state, weight = carry
            _, state, reward, *_ = env.step(jax.random.key(1), state, action, params)
            return (state, gamma * weight), weight * reward

        with jax.debug_key_reuse(False):
            return jax.lax.scan(one, (env.reset(jax.random.key(0), params)[1], 1.0), actions)[1].sum()

    return np.asarray(jax.jit(jax.vmap(run))(actions))


def test_facts_of_the_sea():
    every = (np.arange(16)[:, None] >> np.arange(4)) & 1
    found = returns_in_the_sea(4, jnp.array(every))
    assert (found > 0.5).sum() == 1
    np.testing.assert_allclose(found[every.all(1)], 0.99, atol=1e-6)
    np.testing.assert_allclose(found[~every.all(1)], -0.01 * every[~every.all(1)].sum(1) / 4, atol=1e-6)
    assert returns_in_the_sea(10, jnp.ones((1, 10), jnp.int32), 0.99)[0] == pytest.approx(0.90395, abs=1e-5)


def test_the_last_step_of_the_sea_does_not_bootstrap():
    """Though the environment says that it is cut as well."""
    env, params = envs.make("DeepSea-bsuite")
    config = dataclasses.replace(pe_dqn.Config(), num_envs=2, warmup_steps=64, replay_capacity=64)
    filled = jax.jit(lambda key: experience.warm_up(env, params, key, config))(jax.random.key(0))
    rows = filled.replay.rows
    ends = ~np.asarray(rows.next_observation).any((1, 2))
    assert ends.sum() == 8
    np.testing.assert_array_equal(rows.terminated, ends)
    np.testing.assert_array_equal(rows.truncated, ends)
    batch = experience.batch_at(filled, jnp.arange(64), num_steps=1, gamma=0.99)
    np.testing.assert_allclose(batch.discount, np.where(ends, 0, 0.99), rtol=1e-6)


# -- acting and gradients ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started():
    agent, _ = small_agent()
    return by_hand.quick(agent.init)(jax.random.key(1)), 2 * jax.random.normal(jax.random.key(5), (60, 3))


def explored(agent, state, observation):
    """What is done without a random action, in environments that see these observations."""
    now = state.experience.interaction
    wide = jax.tree.map(lambda x: jnp.repeat(x[:1], len(observation), 0), now)._replace(observation=observation)
    state = by_hand.with_fresh_keys(state)._replace(experience=state.experience._replace(interaction=wide))
    after, _ = by_hand.quick(agent.step)(state)
    rows, position = after.experience.replay.rows, int(state.experience.replay.position)
    return np.asarray(rows.action)[position : position + len(observation)]


def test_explores_by_value_and_bonus(started):
    """Evaluation never feels a bonus, and where it weighs nothing neither does exploration."""
    _, observation = started
    sizes = {"num_envs": 60, "warmup_steps": 60, "replay_capacity": 120, "epsilon_start": 0.0, "epsilon_end": 0.0}
    agent, config = small_agent(bonus_weight_start=5.0, bonus_weight_end=5.0, **sizes)
    state = by_hand.quick(agent.init)(jax.random.key(1))
    learner, inputs = state.learner, np.asarray(observation, np.float64)
    value, _, bonus = said(models(learner.network, learner.prior, inputs, config), config)
    np.testing.assert_array_equal(explored(agent, state, observation), (value + 5 * bonus).argmax(1))
    np.testing.assert_array_equal(agent.policy.act(state, observation, (), jax.random.key(0))[0], value.argmax(1))
    assert ((value + 5 * bonus).argmax(1) != value.argmax(1)).any()
    without, _ = small_agent(bonus_weight_start=0.0, bonus_weight_end=0.0, **sizes)
    np.testing.assert_array_equal(explored(without, state, observation), value.argmax(1))


def test_returns_leave_the_models_of_bonuses_alone():
    network = pe_dqn.Network((8, 7), 3, 5)
    observation, action = jax.random.normal(jax.random.key(0), (6, 3)), jnp.array([0, 1, 2, 0, 1, 2])
    target = jax.tree.map(lambda x: jnp.repeat(x, 6, 0), target_by_hand())

    def loss(parameters):
        outputs = network.apply(parameters, observation)[1]
        members = pe_dqn.at_action(Members(outputs[:, 0], outputs[:, 1]), action)
        return pe_dqn.loss_of(members, target, SUPPORT, 1.0)

    gradient = by_hand.quick(jax.grad(loss))(network.init(jax.random.key(1), observation))["params"]
    for layer in gradient["heads"].values():
        assert layer[:2].any()
        assert not layer[2:].any()


def test_the_prior_stays_as_it_is(started):
    state, _ = started
    agent, _ = small_agent()
    step = by_hand.quick(agent.step)
    after = by_hand.with_fresh_keys(state)
    for _ in range(5):
        after, _ = step(after)
    jax.tree.map(np.testing.assert_array_equal, after.learner.prior, state.learner.prior)
    mean = after.learner.network.optimizer[0].mu
    assert jax.tree.structure(mean) == jax.tree.structure(state.learner.network.parameters)
    assert set(mean["params"]) == {"torso", "heads"}


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def models(parameters, prior, observation, config, tapes=None):
    """The outputs of the four models, `[4, batch, actions, atoms]`, the prior in the first."""
    torso, heads = by_hand.network(parameters, "torso/mlp"), by_hand.network(parameters, "heads")
    tape = by_hand.forward(torso, 0, observation)
    tape[-1] = np.maximum(tape[-1], 0)
    of_heads = [by_hand.forward(heads, member, tape[-1]) for member in range(4)]
    outputs = np.stack([one[-1] for one in of_heads])
    outputs[0] += config.prior_scale * by_hand.forward(by_hand.network(prior, "advantage"), 0, tape[-1])[-1]
    if tapes is not None:
        tapes |= {"torso": tape, "heads": of_heads}
    return outputs.reshape(4, len(observation), -1, config.num_atoms)


def supports(config):
    atoms = np.linspace(config.v_min, config.v_max, config.num_atoms)
    return atoms, config.bonus_range * (atoms - config.v_min)


def area(quantiles, masses, support) -> float:
    """Between the two distribution functions, from step to step."""
    points, total = np.sort(np.concatenate([quantiles, support])), 0.0
    for low, high in itertools.pairwise(points):
        total += abs((quantiles <= low).mean() - masses[support <= low].sum()) * (high - low)
    return total


def said(outputs, config):
    """Value, distance and bonus of every action, each `[batch, actions]`."""
    quantiles, logits, later, later_logits = outputs
    support, later_support = supports(config)
    value = (quantiles.mean(-1) + by_hand.softmax(logits) @ support) / 2
    to_come = (later.mean(-1) + by_hand.softmax(later_logits) @ later_support) / 2
    distance = np.array([
        [area(q, by_hand.softmax(x), support) for q, x in zip(*row, strict=True)]
        for row in zip(quantiles, logits, strict=True)
    ])  # fmt: skip
    return value, distance, distance + to_come * config.propagate


def projected(atoms, masses, support):
    found, spacing = np.zeros(len(support)), support[1] - support[0]
    for atom, mass in zip(atoms, masses, strict=True):
        place = (np.clip(atom, support[0], support[-1]) - support[0]) / spacing
        below = min(int(place), len(support) - 2)
        found[below] += mass * (below + 1 - place)
        found[below + 1] += mass * (place - below)
    return found


def slopes(quantiles, logits, atoms, masses, support, kappa):
    """Loss of both models on one target, and its slopes in their outputs."""
    count, loss, slope = len(support), 0.0, np.zeros(len(support))
    for i in range(count):
        for atom, mass in zip(atoms, masses, strict=True):
            error, fraction = atom - quantiles[i], (i + 0.5) / count
            weight = mass * abs(fraction - (error < 0))
            if abs(error) <= kappa:
                loss, slope[i] = loss + weight * error**2 / 2 / kappa, slope[i] - weight * error / kappa
            else:
                loss, slope[i] = loss + weight * (abs(error) - kappa / 2), slope[i] - weight * np.sign(error)
    target = projected(atoms, masses, support)
    return loss - target @ np.log(by_hand.softmax(logits)), slope, by_hand.softmax(logits) - target


def numpy_update(learner, batch, config, weight):
    """One update, all gradients by hand."""
    support, later_support = supports(config)
    tapes = {}
    outputs = models(learner.network, learner.prior, batch["observation"], config, tapes)
    following = models(learner.target_network, learner.prior, batch["next_observation"], config)
    value, distance, bonus = said(following, config)
    masses = by_hand.softmax(following[[1, 3]])
    slope, found, half = np.zeros_like(outputs), [], np.full(config.num_atoms, 1 / config.num_atoms)
    for b, action in enumerate(batch["action"].astype(int)):
        best, explored = value[b].argmax(), (value[b] + weight * bonus[b]).argmax()
        reward, discount = batch["reward"][b], batch["discount"][b]
        atoms = reward + discount * np.concatenate([following[0, b, best], support])
        target = atoms, np.concatenate([half, masses[0, b, best]]) / 2
        later = discount * (distance[b, explored] + np.concatenate([following[2, b, explored], later_support]))
        later = later, np.concatenate([half, masses[1, b, explored]]) / 2
        taken = outputs[:, b, action]
        loss, *slope[:2, b, action] = slopes(*taken[:2], *target, support, config.kappa)
        later_loss, *slope[2:, b, action] = slopes(*taken[2:], *later, later_support, config.kappa)
        outside = (atoms < support[0] - 1e-3) | (atoms > support[-1] + 1e-3)
        found.append({
            "loss": loss + later_loss, "value": (taken[0].mean() + by_hand.softmax(taken[1]) @ support) / 2,
            "target": target[0] @ target[1], "clipped_mass": target[1][outside].sum(),
            "disagreement": distance[b, explored], "bonus": bonus[b, explored], "differs": best != explored,
        })  # fmt: skip
    parameters = learner.network.parameters
    nets = {"torso/mlp": by_hand.network(parameters, "torso/mlp"), "heads": by_hand.network(parameters, "heads")}
    gradient = {path: by_hand.zeros_like(net) for path, net in nets.items()}
    slope = slope.reshape(4, len(value), -1) / len(value)
    at_features = sum(
        by_hand.backward(nets["heads"], member, tapes["heads"][member], slope[member], gradient["heads"])
        for member in range(4)
    )
    at_features *= tapes["torso"][-1] > 0
    by_hand.backward(nets["torso/mlp"], 0, tapes["torso"], at_features, gradient["torso/mlp"])
    adams = {path: by_hand.Adam(learner.network.optimizer, path, config.adam_epsilon) for path in nets}
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in nets}
    metrics = {name: np.mean([one[name] for one in found]) for name in found[0]}
    metrics["gradient_norm"] = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    return nets, adams, metrics


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 0.7, "num_steps": 3, "bonus_weight_start": 1.0},
        {"bonus_range": 0.5},
        {"propagate": False, "kappa": 0.2},
    ],
    ids=["three_steps", "plain_quantiles", "no_propagation"],
)
def test_updates_equal_loops_in_numpy(settings):
    settings = {"bonus_weight_start": 3.0, "bonus_weight_end": 0.5, "bonus_steps": 50} | settings
    agent, config = small_agent(**settings)
    step, state, found = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3)), []
    # One action whose quantiles are far too low: of small value, and of large distance.
    layers = state.learner.prior["params"]["advantage"]["layers"]
    layers["bias_1"] = layers["bias_1"].at[0, : config.num_atoms].add(-1)
    for update in range(1, 8):
        # The keys as `step` splits them: one environment step, then one update.
        sample_key = jax.random.split(jax.random.split(jax.random.clone(state.key), 3)[0])[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        weight = config.bonus_weight_start
        weight += (config.bonus_weight_end - weight) * min(int(state.env_steps) / config.bonus_steps, 1)
        nets, adams, expected = numpy_update(before, batch, config, weight)
        for path, net in nets.items():
            by_hand.assert_network_is(state.learner.network.parameters, net, path)
            by_hand.assert_adam_is(state.learner.network.optimizer, adams[path], path)
        copied = state.learner.network.parameters if update % config.target_period == 0 else before.target_network
        jax.tree.map(np.testing.assert_array_equal, state.learner.target_network, copied)
        for name, metric in metrics.items():
            if name in expected:
                actual = float(metric.total / metric.count)
                np.testing.assert_allclose(actual, expected[name], rtol=2e-3, atol=1e-5, err_msg=name)
        found.append(expected | {"ends": (batch["discount"] == 0).mean()})
    assert np.mean([one["differs"] for one in found]) > 0  # the bonus leads elsewhere than the value
    assert 0 < np.mean([one["ends"] for one in found]) < 1
    assert max(one["clipped_mass"] for one in found) > 0


# -- it finds the treasure --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_finds_the_treasure_without_luck(proof):
    """8 x 8: one of 256 ways. Every seed finds it in the first 250 episodes, and then goes there without a bonus."""
    env, params = envs.make("DeepSea-bsuite")
    settings = problem.split_preset(pe_dqn.PRESETS["DeepSea-bsuite"])[1]
    config = dataclasses.replace(pe_dqn.Config(), **settings | {"replay_capacity": 3_200})
    train = jax.vmap(
        training.make_train(pe_dqn.make_agent, config, env, params, total_steps=3_200, evaluations=8, eval_episodes=1)
    )
    keys = jax.random.split(jax.random.key(1), 3)
    proof(proofs.program(train, keys))
    state, history = jax.jit(train)(keys)
    rows = state.experience.replay.rows
    assert (np.asarray(rows.reward)[:, : 250 * 8] > 0.9).any(1).all()
    assert (np.asarray(history["evaluation_return"])[:, -3:] > 0.9).all()

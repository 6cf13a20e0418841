"""Bootstrapped DQN: one member against DQN bit for bit, priors, masks, who acts, updates against numpy, DeepSea."""

import dataclasses
import itertools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import bootstrapped_dqn, dqn
from jaxrl_dist.learning import draws, experience, interaction
from jaxrl_dist.running import problem, training

SMALL = by_hand.TINY_VALUE | {"num_members": 3, "prior_scale": 2.0, "mask_probability": 0.5, "huber_threshold": 0.5}
NETWORK = bootstrapped_dqn.Network(SMALL["hidden"], 3)


def small_agent(**settings):
    return by_hand.agent_on(bootstrapped_dqn, by_hand.Choices(), **(SMALL | settings))


def members_of(tree, member: int):
    return jax.tree.map(lambda x: x[member], tree)


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    online, target = jnp.array([[1.0, 3.0, 2.0]]), jnp.array([[4.0, 1.5, 2.5]])
    batch, end = by_hand.steps_of([1.0], [0.9]), by_hand.steps_of([1.0], [0.0])
    assert bootstrapped_dqn.target_value(batch, target, target)[0] == pytest.approx(4.6)
    assert bootstrapped_dqn.target_value(batch, target, online)[0] == pytest.approx(2.35)
    assert bootstrapped_dqn.target_value(end, target, online)[0] == 1


def test_loss_by_hand():
    values, target = jnp.array([0.5, 1.0, 3.0]), jnp.zeros(3)
    # Halved squares, of those that count, over all three.
    for mask, loss, slope in (
        ([True, True, True], 5.125 / 3, [0.5, 1, 3]),
        ([True, False, True], 4.625 / 3, [0.5, 0, 3]),
        ([False] * 3, 0, [0, 0, 0]),
    ):
        found, gradient = jax.value_and_grad(bootstrapped_dqn.loss_of)(values, target, jnp.array(mask), 0.0)
        assert found == pytest.approx(loss)
        np.testing.assert_allclose(gradient, np.array(slope) / 3, rtol=1e-6)
    assert bootstrapped_dqn.loss_of(values, target, jnp.array([True, False, True]), 1.0) == pytest.approx(2.625 / 3)


# -- one member -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"double": True, "num_steps": 3, "updates_per_iteration": 2}])
def test_one_member_without_a_prior_is_dqn_bit_for_bit(settings):
    settings = by_hand.TINY_VALUE | {"double": False, "huber_threshold": 0.5} | settings

    def run(algorithm, **more):
        agent, _ = by_hand.agent_on(algorithm, by_hand.Choices(), **settings, **more)
        step, state, found = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3)), []
        for _ in range(12):
            state, metrics = step(state)
            found.append(metrics)
        return state, found

    (alone, expected), (state, found) = run(dqn), run(bootstrapped_dqn, num_members=1, prior_scale=0.0)
    for metrics, other in zip(expected, found, strict=True):
        for name, metric in metrics.items():
            np.testing.assert_array_equal(metric, other[name], err_msg=name)
    for name in ("network", "target_network"):
        one, other = members_of(getattr(state.learner, name), 0), getattr(alone.learner, name)
        for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_array_equal(x, y)
    lived, expected = ((x.experience, x.env_steps, jax.random.key_data(x.key)) for x in (state, alone))
    jax.tree.map(np.testing.assert_array_equal, lived, expected)


# -- priors, masks, who acts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lived():
    """The states of a run with small weights of the learned networks, so that priors decide."""
    agent, config = small_agent(epsilon_start=0.0, epsilon_end=0.0)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(0))
    states = [jax.device_get(state._replace(key=jax.random.key_data(state.key)))]
    for _ in range(60):
        state, _ = step(state)
        states.append(jax.device_get(state._replace(key=jax.random.key_data(state.key))))
    return config, states


def test_priors_never_change_and_are_not_trained(lived):
    _, states = lived
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state.prior, states[0].prior)
    # Adam remembers two numbers for each weight of the networks, and none of the priors'.
    first = states[0].learner.network
    weights, remembered = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (first.parameters, first.optimizer))
    assert remembered == 2 * weights + 3  # and for each member a count
    assert sum(x.size for x in jax.tree.leaves(states[0].prior)) == weights
    for one, other in zip(*map(jax.tree.leaves, (first.parameters, states[0].prior)), strict=True):
        assert (one != other).all()
        assert all((tree[i] != tree[j]).all() for tree in (one, other) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_member_lives_an_episode_and_another_is_drawn_where_it_ends(lived):
    _, states = lived
    changes, stays = 0, 0
    for before, after in itertools.pairwise(states):
        slot = int(before.experience.replay.position)
        rows = after.experience.replay.rows
        ended = (rows.terminated | rows.truncated)[slot : slot + 2]
        np.testing.assert_array_equal(after.acting[~ended], before.acting[~ended])
        changes += (after.acting != before.acting).sum()
        stays += (after.acting == before.acting)[ended].sum()
        # The member's own values decide, its prior among them.
        seen = before.experience.interaction.observation
        for i, member in enumerate(before.acting):
            parts = (members_of(tree, member) for tree in (before.learner.network.parameters, before.prior))
            value, prior = (np.asarray(NETWORK.apply(part, seen[i : i + 1]))[0] for part in parts)
            assert rows.action[slot + i] == np.argmax(value + 2 * prior)
    assert changes > 5
    assert stays > 0  # a third of all draws
    assert len(np.unique([state.acting for state in states])) == 3


def test_masks_stay_with_their_transitions(lived):
    _, states = lived
    masks = states[0].masks.rows
    assert masks.shape == (40, 3)
    assert masks.dtype == bool
    assert masks[:24].any(0).all()
    assert not masks[24:].any()
    for before, after in itertools.pairwise(states):
        slot = int(before.experience.replay.position)
        for field in ("position", "size"):
            assert getattr(after.masks, field) == getattr(after.experience.replay, field)
        others = ~np.isin(np.arange(40), (slot, slot + 1))
        np.testing.assert_array_equal(after.masks.rows[others], before.masks.rows[others])
    written = np.concatenate(
        [masks[:24], *(s.masks.rows[[s.masks.position - 2, s.masks.position - 1]] for s in states[1:])]
    )
    assert written.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(written.size))


def test_without_masks_all_learn_from_all_and_with_none_nobody_learns():
    env = by_hand.Choices()

    def once(probability):
        config = dataclasses.replace(bootstrapped_dqn.Config(), **(SMALL | {"mask_probability": probability}))
        agent = bootstrapped_dqn.make_agent(config, env, env.default_params)
        start = agent.init(jax.random.key(0))
        state, metrics = agent.step(start)
        networks = [x.learner.network.parameters for x in (start, state)]
        return state.masks.rows[:26], networks, metrics["loss"].total

    masks, (before, after), loss = by_hand.quick(lambda each: jax.lax.map(once, each))(jnp.array([1.0, 0.0]))
    for i, expected in enumerate((True, False)):
        assert (masks[i] == expected).all()
        assert (loss[i] > 0) == expected
        pairs = zip(*map(jax.tree.leaves, (before, after)), strict=True)
        assert any((one[i] != other[i]).any() for one, other in pairs) == expected


def test_what_is_shown_and_evaluated_is_the_mean():
    agent, _ = small_agent()
    state = by_hand.quick(agent.init)(jax.random.key(0))
    seen = 2 * jax.random.normal(jax.random.key(1), (40, 3))
    parts = [[members_of(tree, i) for tree in (state.learner.network.parameters, state.prior)] for i in range(3)]
    values = np.mean([NETWORK.apply(one, seen) + 2 * NETWORK.apply(prior, seen) for one, prior in parts], axis=0)
    np.testing.assert_array_equal(agent.policy.act(state, seen, (), jax.random.key(2))[0], values.argmax(-1))
    for action in range(3):
        shown = agent.claim.law(state, seen, jnp.full(40, action))
        np.testing.assert_allclose(shown.atoms, values[:, action : action + 1], rtol=1e-4, atol=1e-5)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


@pytest.mark.parametrize("double", [True, False], ids=["double", "plain"])
def test_updates_equal_loops_in_numpy(double):
    agent, config = small_agent(double=double)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    ends, counted, large, disagreed = [], [], [], 0
    for update in range(8):
        # The keys as `step` splits them: one environment step, then one update.
        sample_key = jax.random.split(jax.random.split(jax.random.clone(state.key), 5)[0])[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_rows(state, jax.random.clone(sample_key), config.batch_size)
        slots = np.asarray(draws.integers(sample_key, (config.batch_size,), int(state.experience.replay.size)))
        masks = np.asarray(state.masks.rows)[slots]
        actions = batch["action"].astype(int)
        found = {name: [] for name in ("loss", "value", "target", "gradient_norm")}
        for member in range(3):
            trained = members_of(before.network, member)
            target_network, prior = (members_of(tree, member) for tree in (before.target_network, state.prior))
            nets, target_nets, prior_nets = map(by_hand.action_network, (trained.parameters, target_network, prior))

            def value(nets, observation, prior_nets=prior_nets):
                outputs, tape = by_hand.action_forward(nets, observation, 3)
                return outputs[..., 0] + 2 * by_hand.action_forward(prior_nets, observation, 3)[0][..., 0], tape

            values, tape = value(nets, batch["observation"])
            following, _ = value(target_nets, batch["next_observation"])
            online, _ = value(nets, batch["next_observation"])
            disagreed += (online.argmax(-1) != following.argmax(-1)).sum()
            slope = np.zeros((config.batch_size, 3, 1))
            for b, action in enumerate(actions):
                best = np.argmax((online if double else following)[b])
                discount = 0.0 if batch["terminated"][b] else config.discount
                target = batch["reward"][b] + discount * following[b, best]
                error = values[b, action] - target
                loss = error**2 / 2 if abs(error) <= 0.5 else 0.5 * (abs(error) - 0.25)
                slope[b, action, 0] = masks[b, member] * np.clip(error, -0.5, 0.5) / config.batch_size
                found["loss"].append(masks[b, member] * loss)
                found["value"].append(values[b, action])
                found["target"].append(target)
                ends.append(discount == 0)
                counted.append(masks[b, member])
                large.append(abs(error) > 0.5)
            gradient = by_hand.action_backward(nets, tape, slope)
            found["gradient_norm"].append(
                np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
            )
            after = members_of(state.learner.network, member)
            for path, net in nets.items():
                adam = by_hand.Adam(trained.optimizer, path, config.adam_epsilon)
                expected = adam.step(net, gradient[path], config.learning_rate)
                by_hand.assert_network_is(after.parameters, expected, path)
                by_hand.assert_adam_is(after.optimizer, adam, path)
                copied = (update + 1) % config.target_period == 0
                stands = expected if copied else target_nets[path]
                by_hand.assert_network_is(members_of(state.learner.target_network, member), stands, path)
        found["disagreement"] = np.std(np.reshape(found["value"], (3, -1)), axis=0)
        for name, each in found.items():
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean(each), rtol=2e-3, atol=1e-5, err_msg=name)
    assert disagreed > 0
    for both in (ends, counted, large):
        assert 0 < np.mean(both) < 1


# -- DeepSea ----------------------------------------------------------------------------------------------------------


def test_the_last_row_of_the_sea_is_an_end():
    """It is reported as a termination and a time limit at once: nothing follows it."""
    env, params = envs.make("DeepSea-bsuite", size=4)
    config = dataclasses.replace(bootstrapped_dqn.Config(), num_envs=2, warmup_steps=64, replay_capacity=64)
    filled = by_hand.quick(lambda key: experience.warm_up(env, params, key, config))(jax.random.key(0))
    rows = filled.replay.rows
    assert (rows.terminated == rows.truncated).all()
    assert rows.terminated.sum() == 16
    batch = experience.batch_at(filled, jnp.arange(64), num_steps=1, gamma=0.9)
    np.testing.assert_allclose(batch.discount, jnp.where(rows.terminated, 0, 0.9))
    assert interaction.transition_like(env, params).observation.shape == (4, 4)


@pytest.mark.slow
def test_it_dives(proof):
    """On the 10 x 10 sea, in the last three of ten evaluations of every seed."""
    preset = problem.split_preset(bootstrapped_dqn.PRESETS["DeepSea-bsuite"])[1]
    env, params = envs.make("DeepSea-bsuite", size=10)
    train = jax.vmap(
        training.make_train(
            bootstrapped_dqn.make_agent, bootstrapped_dqn.Config(**preset), env, params, total_steps=3_000,
            evaluations=10, eval_episodes=1,
        )
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), 3)
    proof(proofs.program(train, keys))
    returns = np.asarray(jax.jit(train)(keys)[1]["evaluation_return"]).mean(-1)[:, -3:]
    assert (returns > 0.9).all(), returns

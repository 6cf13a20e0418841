"""Ensemble C51's targets by the sheet's numbers, one member against C51 bit for bit, whole updates against numpy."""

import re

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import c51, ensemble_c51
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import draws, networks

SUPPORT = jnp.arange(3.0)
# Of two members: the laws of two actions at one successor.
ONE = jnp.array([[[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]]])
OTHER = jnp.array([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])
BATCH = by_hand.steps_of([0.5], [0.5])

SMALL = by_hand.TINY_VALUE | {"v_min": -1.5, "v_max": 2.0, "num_atoms": 8, "num_envs": 4, "replay_capacity": 80}


def members_of(tree, member: int):
    return jax.tree.map(lambda x: x[member], tree)


# -- targets ----------------------------------------------------------------------------------------------------------


def means(masses):
    return law.mean(Law(SUPPORT, masses))


def targets(masses, action: int):
    return ensemble_c51.target_masses(BATCH, masses[:, action], SUPPORT)


def test_the_group_chooses_by_the_mean_of_its_average():
    np.testing.assert_allclose(means(ONE), [[1.3, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(means(OTHER), [[0.5, 1.4]], rtol=1e-6)
    group = ensemble_c51.group_laws(jnp.stack([ONE, OTHER]))
    np.testing.assert_allclose(group, [[[0.4, 0.3, 0.3], [0.15, 0.5, 0.35]]], rtol=1e-6)
    np.testing.assert_allclose(means(group), [[0.9, 1.2]], rtol=1e-6)
    # The mean of the average is the average of the means.
    np.testing.assert_allclose(means(group), (means(ONE) + means(OTHER)) / 2, rtol=1e-6)
    assert (means(ONE).argmax(), means(OTHER).argmax(), means(group).argmax()) == (0, 1, 1)


def test_target_by_hand():
    group = ensemble_c51.group_laws(jnp.stack([ONE, OTHER]))
    target = targets(group, 1)
    np.testing.assert_allclose(target, [[0.075, 0.75, 0.175]], atol=1e-6)
    # The projection is linear: it is the average of the members' own, for the action of the group.
    np.testing.assert_allclose(target, (targets(ONE, 1) + targets(OTHER, 1)) / 2, atol=1e-6)
    # By themselves the members would learn from these.
    np.testing.assert_allclose(targets(ONE, 0), [[0.1, 0.65, 0.25]], atol=1e-6)
    np.testing.assert_allclose(targets(OTHER, 1), [[0.1, 0.6, 0.3]], atol=1e-6)


def test_members_that_agree_are_their_group():
    group = ensemble_c51.group_laws(jnp.stack([ONE] * 4))
    np.testing.assert_array_equal(group, ONE)


def test_probabilities_are_averaged_and_not_logits():
    masses = jnp.array([[0.9, 0.1], [0.5, 0.5]])[:, None, None]
    np.testing.assert_allclose(ensemble_c51.group_laws(masses)[0, 0], [0.7, 0.3], rtol=1e-6)
    np.testing.assert_allclose(jax.nn.softmax(jnp.log(masses).mean(0))[0, 0], [0.75, 0.25], rtol=1e-6)


def test_the_law_that_is_shown_is_the_average():
    agent, _ = by_hand.agent_on(ensemble_c51, by_hand.Choices(), **SMALL, num_members=2)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    parameters = jax.tree.map(lambda x: 3 * x, state.learner.network.parameters)
    state = state._replace(learner=by_hand.changed(state.learner, network=parameters))
    seen, action = 2 * jax.random.normal(jax.random.key(1), (40, 3)), jnp.arange(40) % 3
    network = ensemble_c51.Network(SMALL["hidden"], 3, SMALL["num_atoms"])
    of_members = [by_hand.softmax(np.asarray(network.apply(members_of(parameters, i), seen))) for i in range(2)]
    average = np.mean(of_members, axis=0)
    shown = agent.claim.law(state, seen, action)
    np.testing.assert_allclose(shown.masses, average[np.arange(40), action], rtol=1e-4, atol=1e-6)
    greedy = [(masses @ np.asarray(shown.atoms[0])).argmax(-1) for masses in (average, *of_members)]
    np.testing.assert_array_equal(agent.policy.act(state, seen, (), jax.random.key(2))[0], greedy[0])
    assert (greedy[1] != greedy[2]).any()
    # Who is first does not matter.
    swapped = by_hand.changed(state.learner, network=jax.tree.map(lambda x: x[::-1], parameters))
    other = agent.claim.law(state._replace(learner=swapped), seen, action)
    np.testing.assert_allclose(other.masses, shown.masses, rtol=1e-6)


# -- one member -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_steps": 3, "risk": "cvar:0.5", "updates_per_iteration": 2}])
def test_one_member_is_c51_bit_for_bit(settings):
    def run(algorithm, **more):
        agent, _ = by_hand.agent_on(algorithm, by_hand.Choices(), **(SMALL | settings | more))
        step, state, found = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3)), []
        for _ in range(12):
            state, metrics = step(state)
            found.append(metrics)
        return state._replace(key=jax.random.key_data(state.key)), found

    (alone, expected), (state, found) = run(c51), run(ensemble_c51, num_members=1)
    for metrics, other in zip(expected, found, strict=True):
        for name, metric in metrics.items():
            np.testing.assert_array_equal(metric, other[name], err_msg=name)
    # Networks and their optimisers have an axis of members, all else is the same.
    only = state.learner._replace(**{
        name: members_of(getattr(state.learner, name), 0) for name in ("network", "target_network")
    })  # fmt: skip
    for one, other in zip(*map(jax.tree.leaves, (state._replace(learner=only), alone)), strict=True):
        np.testing.assert_array_equal(one, other)


# -- members ----------------------------------------------------------------------------------------------------------


def test_slots_are_ones_own():
    """Three members of two environments each: of slots 0 to 35 the second has 2, 3, 8, 9, 14, 15 and so on."""
    slots = ensemble_c51.slots_of_members(jax.random.key(0), jnp.int32(36), 3, 6, 500)
    for member, own in enumerate(np.asarray(slots).reshape(3, 500)):
        np.testing.assert_array_equal(np.unique(own), [s for s in range(36) if s % 6 // 2 == member])
    of_one = ensemble_c51.slots_of_members(jax.random.key(0), jnp.int32(36), 1, 6, 500)
    np.testing.assert_array_equal(of_one, draws.integers(jax.random.key(0), (500,), 36))


def test_members_differ_and_live_by_their_own_values():
    settings = SMALL | {"epsilon_start": 0.0, "epsilon_end": 0.0}
    agent, _ = by_hand.agent_on(ensemble_c51, by_hand.Choices(), **settings, num_members=2)
    state, step = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step)
    network = ensemble_c51.Network(SMALL["hidden"], 3, SMALL["num_atoms"])
    support, disagreed = np.linspace(-1.5, 2.0, 8), 0
    for _ in range(100):
        seen, slot = state.experience.interaction.observation, int(state.experience.replay.position)
        parameters = state.learner.network.parameters
        values = [by_hand.softmax(np.asarray(network.apply(members_of(parameters, i), seen))) @ support for i in (0, 1)]
        greedy = [value.argmax(-1) for value in values]
        state, _ = step(state)
        taken = np.asarray(state.experience.replay.rows.action[slot : slot + 4])
        np.testing.assert_array_equal(taken, [*greedy[0][:2], *greedy[1][2:]])
        disagreed += (greedy[0] != greedy[1]).sum()
    assert disagreed > 0
    differences = jax.tree.map(lambda x: jnp.abs(x[0] - x[1]).max(), state.learner.network.parameters)
    assert min(jax.tree.leaves(differences)) > 0
    positions = np.asarray(state.experience.interaction.observation)
    assert len(np.unique(positions[:, 0])) == 4


def test_returns_of_members_are_those_of_their_environments():
    agent, _ = by_hand.agent_on(ensemble_c51, by_hand.Choices(), **SMALL, num_members=2)
    state, step = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step)
    ended = 0
    for _ in range(15):
        before, slot = state.experience.interaction.episode_return, int(state.experience.replay.position)
        state, metrics = step(state)
        rows = jax.tree.map(lambda x, slot=slot: np.asarray(x[slot : slot + 4]), state.experience.replay.rows)
        done = rows.terminated | rows.truncated
        for member, of in enumerate((slice(0, 2), slice(2, 4))):
            metric = metrics[f"return_of_member_{member}"]
            assert metric.count == done[of].sum()
            expected = ((np.asarray(before) + rows.reward) * done)[of].sum()
            np.testing.assert_allclose(metric.total, expected, rtol=1e-5, atol=1e-6)
            ended += int(metric.count)
        np.testing.assert_allclose(
            metrics["return_of_member_0"].total + metrics["return_of_member_1"].total,
            metrics["episode_return"].total, rtol=1e-5, atol=1e-6,
        )  # fmt: skip
    assert ended > 4


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def windows(state, slots, config) -> list[dict]:
    """The n-step transitions that begin in the slots, one step after the other, in float64."""
    rows, replay = jax.device_get(state.experience.replay.rows), state.experience.replay
    capacity, found = len(rows.reward), []
    for start in slots:
        reward, discount, slot = 0.0, 1.0, int(start)
        for step in range(config.num_steps):
            reward += discount * float(rows.reward[slot])
            discount *= config.discount
            newest = (int(replay.position) - 1 - slot) % capacity < config.num_envs
            if rows.terminated[slot] or rows.truncated[slot] or newest or step == config.num_steps - 1:
                break
            slot = (slot + config.num_envs) % capacity
        found.append({
            "observation": rows.observation[start].astype(np.float64), "action": int(rows.action[start]),
            "reward": reward, "discount": 0.0 if rows.terminated[slot] else discount,
            "next_observation": rows.next_observation[slot].astype(np.float64),
        })  # fmt: skip
    return found


def projected(reward, discount, masses, support) -> np.ndarray:
    target, gap = np.zeros(len(support)), support[1] - support[0]
    for atom, mass in zip(support, masses, strict=True):
        place = (min(max(reward + discount * atom, support[0]), support[-1]) - support[0]) / gap
        below = int(np.floor(place))
        target[below] += mass * (below + 1 - place)
        if place > below:
            target[below + 1] += mass * (place - below)
    return target


@pytest.mark.parametrize("settings", [{}, {"num_steps": 3, "shared_replay": True}], ids=["own", "shared_three_steps"])
def test_updates_equal_loops_in_numpy(settings):
    env, members = by_hand.Choices(), 2
    agent, config = by_hand.agent_on(ensemble_c51, env, **SMALL, **settings, num_members=members)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    support, disagreed, ends = np.linspace(config.v_min, config.v_max, config.num_atoms), 0, []
    size = config.batch_size
    for update in range(9):
        # The keys as `step` splits them: one environment step, then one update.
        sample_key = jax.random.split(jax.random.split(jax.random.clone(state.key), 3)[0])[1]
        before, (state, metrics) = state.learner, step(state)
        stored = int(state.experience.replay.size)
        if config.shared_replay:
            slots = np.asarray(draws.integers(sample_key, (members * size,), stored)).reshape(members, size)
        else:
            numbers = np.asarray(draws.integers(sample_key, (members * size,), stored // members))
            own = [[s for s in range(stored) if s % 4 // 2 == member] for member in range(members)]
            slots = [np.array(own[i])[numbers[i * size : (i + 1) * size]] for i in range(members)]
        target_nets = [by_hand.action_network(members_of(before.target_network, i)) for i in range(members)]
        found = {name: [] for name in ("loss", "value", "target", "gradient_norm")}
        for member in range(members):
            batch = windows(state, slots[member], config)
            observation, following = (np.stack([one[x] for one in batch]) for x in ("observation", "next_observation"))
            # The group's laws at this member's successors: sums over the members' probabilities.
            average = np.zeros((size, 3, config.num_atoms))
            for net in target_nets:
                masses = by_hand.softmax(by_hand.action_forward(net, following, 3)[0])
                average += masses / members
                disagreed += ((masses @ support).argmax(-1) != (average @ support).argmax(-1)).sum()
            trained = members_of(before.network, member)
            nets = by_hand.action_network(trained.parameters)
            outputs, tape = by_hand.action_forward(nets, observation, 3)
            slope = np.zeros_like(outputs)
            for b, one in enumerate(batch):
                best = np.argmax(average[b] @ support)
                target = projected(one["reward"], one["discount"], average[b, best], support)
                predicted = by_hand.softmax(outputs[b, one["action"]])
                slope[b, one["action"]] = (predicted - target) / size
                found["loss"].append(-(target * np.log(predicted)).sum())
                found["value"].append(predicted @ support)
                found["target"].append(target @ support)
                ends.append(one["discount"] == 0)
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
                stands = expected if copied else target_nets[member][path]
                by_hand.assert_network_is(members_of(state.learner.target_network, member), stands, path)
        for name, values in found.items():
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean(values), rtol=2e-3, atol=1e-5, err_msg=name)
    assert disagreed > 0
    assert 0 < np.mean(ends) < 1


# -- settings ---------------------------------------------------------------------------------------------------------


def test_members_need_environments_of_their_own():
    with pytest.raises(ValueError, match=re.escape("--num-envs is 4; it must be a multiple of --num-members = 3")):
        by_hand.agent_on(ensemble_c51, by_hand.Choices(), **SMALL, num_members=3)


def test_counts_of_presets_are_those_of_c51_for_each_member():
    for name in ("CartPole-v1", "Acrobot-v1", "Catch-bsuite"):
        of_one, of_all = (dict(module.PRESETS[name]) for module in (c51, ensemble_c51))
        members = of_all.pop("num_members")
        for field in ("num_envs", "warmup_steps", "replay_capacity", "exploration_steps", "total_steps"):
            default = getattr(c51.Config(), field, None)
            if field in of_one or field in of_all:
                assert of_all.pop(field) == members * of_one.pop(field, default), field
        assert of_all == of_one
    default = ensemble_c51.Config()
    assert default.num_envs == default.num_members * c51.Config().num_envs


# -- what each has learned --------------------------------------------------------------------------------------------


def test_a_single_member_acts_as_a_c51_agent_of_its_network():
    """Members can be looked at by themselves, by C51's policy on their part of the state."""
    env = by_hand.Choices()
    agent, _ = by_hand.agent_on(ensemble_c51, env, **SMALL, num_members=2)
    single, _ = by_hand.agent_on(c51, env, **SMALL)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    seen = jax.random.normal(jax.random.key(1), (30, 3))
    for member in range(2):
        view = state._replace(learner=state.learner._replace(network=members_of(state.learner.network, member)))
        masses = single.claim.law(view, seen, jnp.zeros(30, jnp.int32)).masses
        logits = ensemble_c51.Network(SMALL["hidden"], 3, 8).apply(
            members_of(state.learner.network.parameters, member), seen
        )
        expected = networks.at_action(jax.nn.softmax(logits), jnp.zeros(30, jnp.int32))
        np.testing.assert_allclose(masses, expected, rtol=1e-5)

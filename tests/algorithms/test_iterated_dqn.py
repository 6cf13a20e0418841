"""i-DQN and i-IQN: the window by hand, a chain of one against DQN and IQN, whole updates against loops in numpy."""

import re

import by_hand
import implicit_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_dist.algorithms.value_based import dqn, iqn, iterated_dqn
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import draws

FRACTIONS = {"num_fractions": 4, "num_target_fractions": 5, "num_policy_fractions": 3, "cosines": 6, "kappa": 0.5}
IQN = {"base": "iqn"} | FRACTIONS

# -- the window -------------------------------------------------------------------------------------------------------


def test_the_window_on_integers():
    online, target = jnp.array([1, 2, 3]), jnp.array([9, 8, 7])
    for updates, expected in ((3, ([1, 2, 3], [9, 8, 7])), (4, ([1, 2, 3], [9, 1, 2])), (6, ([2, 3, 3], [1, 2, 3]))):
        found = iterated_dqn.moved(online, target, jnp.int32(updates), target_period=6, sync_period=4)
        np.testing.assert_array_equal(found, expected)
    # Where both are due the window moves, and of a chain of one the copy is all.
    found = iterated_dqn.moved(online, target, jnp.int32(12), target_period=6, sync_period=4)
    np.testing.assert_array_equal(found, ([2, 3, 3], [1, 2, 3]))
    for updates, copy in ((4, 9), (6, 1)):
        found = iterated_dqn.moved(online[:1], target[:1], jnp.int32(updates), target_period=6, sync_period=4)
        np.testing.assert_array_equal(found, ([1], [copy]))


def chain_of(length: int, sync_period: int, steps: int, rate: float = 0.5) -> list[tuple]:
    """Online and target values of one state with reward 1 and gamma 0.9, T = 10, after each step."""

    def step(carry, index):
        online, target = carry
        online = online + rate * (1 + 0.9 * target - online)
        carry = iterated_dqn.moved(online, target, index + 1, target_period=10, sync_period=sync_period)
        return carry, carry

    start = jnp.zeros(length), jnp.zeros(length)
    online, target = jax.lax.scan(step, start, jnp.arange(steps))[1]
    return list(zip(np.asarray(online), np.asarray(target), strict=True))


def test_a_chain_of_one_learns_one_iteration_at_a_time():
    values = chain_of(1, 3, 60)
    for step, value in ((10, 0.999023), (11, 1.449072), (20, 1.898242), (30, 2.707627), (60, 4.682129)):
        assert values[step - 1][0][0] == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(
    ("sync_period", "step", "online", "target"),
    [
        (1, 1, [0.5, 0.5, 0.5], [0, 0.5, 0.5]),
        (1, 2, [0.75, 0.975, 0.975], [0, 0.75, 0.975]),
        (1, 3, [0.875, 1.325, 1.42625], [0, 0.875, 1.325]),
        (1, 10, [1.889355, 2.655059, 2.655059], [0.999023, 1.889355, 2.655059]),
        (1, 30, [3.438278, 4.093791, 4.093791], None),
        (1, 60, [5.216506, 5.694383, 5.694383], None),
        (5, 60, [5.216477, 5.694327, 5.694327], None),
    ],
)
def test_a_chain_of_three_by_hand(sync_period, step, online, target):
    found = chain_of(3, sync_period, step)[-1]
    np.testing.assert_allclose(found[0], online, atol=2e-6)
    if target:
        np.testing.assert_allclose(found[1], target, atol=2e-6)


def test_a_chain_of_three_with_few_copies():
    """After ten steps with copies every five: what the first two had learned, and the window has moved."""
    online, target = chain_of(3, 5, 10)[-1]
    np.testing.assert_allclose(target, [0.999023, 1.843652, 1.843652], atol=2e-6)
    np.testing.assert_allclose(online, [1.843652] * 3, atol=2e-6)


def test_networks_that_learn_all_at_once_hold_one_iteration_each():
    np.testing.assert_allclose(chain_of(3, 1, 9, rate=1.0)[-1][0], [1, 1.9, 2.71], rtol=1e-6)


def test_the_linear_quadratic_regulator():
    """s' = .8 s - .9 a, reward -.5 s^2 + .4 s a - .5 a^2, gamma 1: by exact regressions the window ends at Q*."""
    online = target = {name: jnp.zeros(3) for name in ("states", "mixed")} | {"actions": jnp.full(3, -1.0)}
    for updates in range(1, 41):
        value = target["states"] - target["mixed"] ** 2 / target["actions"]  # of the best action, times s^2
        online = {"states": -0.5 + 0.64 * value, "mixed": 0.2 - 0.72 * value, "actions": -0.5 + 0.81 * value}
        online, target = iterated_dqn.moved(online, target, jnp.int32(updates), target_period=4, sync_period=1)
    for name, coefficient in (("states", -0.801932), ("mixed", 0.539674), ("actions", -0.882133)):
        np.testing.assert_allclose(online[name], coefficient, atol=2e-6)


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    following = jnp.array([[[4.0], [1.5], [2.5]]])
    assert iterated_dqn.target_of(by_hand.steps_of([1.0], [0.9]), following, following)[0, 0] == pytest.approx(4.6)
    assert iterated_dqn.target_of(by_hand.steps_of([1.0], [0.0]), following, following)[0, 0] == 1
    # Of laws those fractions choose that are for choosing; the others follow.
    choosing, following = jnp.array([[[0.0, 4], [1, 2]]]), jnp.array([[[-1.0, 0, 2], [7, 8, 9]]])
    target = iterated_dqn.target_of(by_hand.steps_of([1.0], [0.5]), choosing, following)
    np.testing.assert_array_equal(target, [[0.5, 1, 2]])


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_losses_are_those_of_dqn_and_iqn(threshold):
    key = jax.random.key(0)
    values, target, quantiles, targets, fractions = (
        2 * jax.random.normal(jax.random.fold_in(key, i), (7, count)) for i, count in enumerate((1, 1, 4, 5, 4))
    )
    found = jax.value_and_grad(iterated_dqn.loss_of_means)(values, target, threshold)
    loss, slope = jax.value_and_grad(dqn.loss_of)(values[:, 0], target[:, 0], threshold)
    np.testing.assert_array_equal(found[1][:, 0], slope)
    assert found[0] == loss
    fractions = jax.nn.sigmoid(fractions)
    found = jax.value_and_grad(iterated_dqn.loss_of_quantiles)(quantiles, fractions, targets, threshold)
    loss, slope = jax.value_and_grad(iqn.loss_of)(quantiles, fractions, targets, threshold)
    np.testing.assert_array_equal(found[1], slope)
    assert found[0] == loss


# -- a chain of one ---------------------------------------------------------------------------------------------------


def trained(algorithm, updates: int, **settings):
    agent, _ = by_hand.agent_on(algorithm, by_hand.Choices(), **(by_hand.TINY_VALUE | settings))
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    for _ in range(updates):
        state, metrics = step(state)
    return agent, state, metrics


@pytest.mark.parametrize(
    ("algorithm", "settings", "base"), [(dqn, {"huber_threshold": 0.5}, "dqn"), (iqn, FRACTIONS, "iqn")]
)
def test_a_chain_of_one_is_the_base_bit_for_bit(algorithm, settings, base):
    """Weights, Adam, replay, keys and metrics: the network that acts is drawn by a key that the base does not have."""
    agent, state, metrics = trained(algorithm, 9, **settings)
    chain, of_chain, of_chain_metrics = trained(iterated_dqn, 9, **settings, base=base, chain_length=1, sync_period=2)
    learner = of_chain.learner
    for one, other in (
        (state.learner.network.parameters, learner.network.parameters),
        (state.learner.target_network, learner.target_network),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[0]), one, other)
    for path in ("head/advantage", *(["head/embedding/dense"] if base == "iqn" else [])):
        of_one = jax.tree.map(lambda x: x[0], learner.network.optimizer)
        moments = by_hand.Adam(of_one, path), by_hand.Adam(state.learner.network.optimizer, path)
        for name in moments[0].first:
            np.testing.assert_array_equal(*(moment.first[name] for moment in moments))
            np.testing.assert_array_equal(*(moment.second[name] for moment in moments))
    jax.tree.map(np.testing.assert_array_equal, state.experience, of_chain.experience)
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(of_chain.key))
    for name in metrics:  # sums over networks, in another order
        np.testing.assert_allclose(metrics[name].total, of_chain_metrics[name].total, rtol=1e-6, err_msg=name)
    observation = jax.random.normal(jax.random.key(5), (20, 3))
    actions = (
        one.policy.act(now, observation, (), jax.random.key(0))[0] for one, now in ((agent, state), (chain, of_chain))
    )
    np.testing.assert_array_equal(*actions)


# -- networks that do not touch each other ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"network_gradient_bound": 0.05}, IQN], ids=["bounded", "iqn"])
def test_a_loss_reaches_its_own_network_alone(settings):
    """Another target for the second network, far away: the others and their moments stay as they are, to the bit."""
    agent, _ = by_hand.agent_on(iterated_dqn, by_hand.Choices(), **(by_hand.TINY_VALUE | settings))
    state = by_hand.quick(agent.init)(jax.random.key(3))
    other = jax.tree.map(lambda x: x.at[1].multiply(10.0), state.learner.target_network)
    other = state._replace(learner=state.learner._replace(target_network=other))
    step = by_hand.quick(agent.step)
    after = [step(by_hand.with_fresh_keys(one))[0].learner.network for one in (state, other)]
    for one, another in zip(*map(jax.tree.leaves, after), strict=True):
        if one.ndim > 1:  # not Adam's count
            np.testing.assert_array_equal(one[jnp.array([0, 2])], another[jnp.array([0, 2])])
            assert (one[1] != another[1]).any()


def test_each_environment_draws_its_network_at_each_step():
    """Network k likes action k, whatever it sees: the actions that are taken are as often one as another."""
    settings = by_hand.TINY_VALUE | {
        "num_envs": 8, "steps_per_iteration": 60, "warmup_steps": 24, "replay_capacity": 504, "epsilon_start": 0.0,
        "epsilon_end": 0.0, "learning_rate": 0.0,
    }  # fmt: skip
    agent, _ = by_hand.agent_on(iterated_dqn, by_hand.Choices(), **settings)
    state = by_hand.quick(agent.init)(jax.random.key(3))
    parameters = jax.tree.map(jnp.zeros_like, state.learner.network.parameters)
    parameters["params"]["head"]["advantage"]["layers"]["bias_1"] = jnp.eye(3)[:, None]
    state = state._replace(learner=by_hand.changed(state.learner, network=parameters))
    rows = by_hand.quick(agent.step)(state)[0].experience.replay.rows
    actions = np.asarray(rows.action[24:504]).reshape(60, 8)
    assert scipy.stats.chisquare(np.bincount(actions.ravel(), minlength=3)).pvalue > 0.01
    assert np.mean([len(set(row)) > 1 for row in actions]) > 0.9  # not one for all environments
    assert np.mean(actions[1:] == actions[:-1]) == pytest.approx(1 / 3, abs=0.1)  # nor one for an episode
    # Evaluation takes the first one.
    action = agent.policy.act(state, jnp.zeros((4, 3)), (), jax.random.key(0))[0]
    np.testing.assert_array_equal(action, jnp.zeros(4))


def test_networks_start_apart():
    agent, _ = by_hand.agent_on(iterated_dqn, by_hand.Choices(), **by_hand.TINY_VALUE)
    for leaf in jax.tree.leaves(by_hand.quick(agent.init)(jax.random.key(3)).learner.target_network):
        assert (leaf[0] != leaf[1]).all()
        assert (leaf[1] != leaf[2]).all()


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_network(nets, adams, target_nets, batch, drawn, config) -> dict:
    """One network's step, all gradients by hand; moves `adams` on."""
    laws = config.base == "iqn"
    if laws:
        fractions, target_fractions, policy_fractions = drawn
        outputs, tape = implicit_by_hand.forward(nets, batch["observation"], fractions)
        choosing, _ = implicit_by_hand.forward(target_nets, batch["next_observation"], policy_fractions)
        following, _ = implicit_by_hand.forward(target_nets, batch["next_observation"], target_fractions)
    else:
        outputs, tape = by_hand.action_forward(nets, batch["observation"], 3)
        following, _ = by_hand.action_forward(target_nets, batch["next_observation"], 3)
        choosing = following
    slope, losses, targets, values = np.zeros_like(outputs), [], [], []
    for b, action in enumerate(batch["action"].astype(int)):
        best = np.argmax([row.mean() for row in choosing[b]])
        target = batch["reward"][b] + batch["discount"][b] * following[b, best]
        if laws:
            loss, row = implicit_by_hand.quantile_huber(outputs[b, action], fractions[b], target, config.kappa)
        else:
            error, threshold = outputs[b, action] - target, config.huber_threshold or np.inf
            small = abs(error[0]) <= threshold
            loss = error[0] ** 2 / 2 if small else threshold * (abs(error[0]) - threshold / 2)
            row = np.clip(error, -threshold, threshold)
        slope[b, action] = row / len(slope)
        losses.append(loss)
        targets.append(target.mean())
        values.append(outputs[b, action].mean())
    gradient = (implicit_by_hand.backward if laws else by_hand.action_backward)(nets, tape, slope)
    norm = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    bounded = 0 < config.network_gradient_bound < norm
    if bounded:
        scale = config.network_gradient_bound / norm
        gradient = {path: {name: scale * x for name, x in part.items()} for path, part in gradient.items()}
    nets = {path: adams[path].step(nets[path], gradient[path], config.learning_rate) for path in nets}
    metrics = {"loss": losses, "value": values, "target": targets, "gradient_norm": norm}
    return {"nets": nets, "bounded": bounded, **{name: np.mean(x) for name, x in metrics.items()}}


def networks_of(parameters, base: str) -> list[dict]:
    """Each network's parts by their paths, in float64."""
    paths = (implicit_by_hand.TORSO, implicit_by_hand.HEAD) + (implicit_by_hand.EMBEDDING,) * (base == "iqn")
    each = [jax.tree.map(lambda x, k=k: x[k], parameters) for k in range(3)]
    return [{path: by_hand.network(one, path) for path in paths} for one in each]


def assert_networks_are(parameters, expected: list[dict]) -> None:
    for k, nets in enumerate(expected):
        one = jax.tree.map(lambda x, k=k: x[k], parameters)
        for path, net in nets.items():
            by_hand.assert_network_is(one, net, path)


@pytest.mark.parametrize(
    "settings",
    [{"huber_threshold": 0.5, "network_gradient_bound": 0.12}, {"num_steps": 3}, IQN | {"num_steps": 2}],
    ids=["bounded", "three_steps", "iqn"],
)
def test_updates_equal_loops_in_numpy(settings):
    settings = by_hand.TINY_VALUE | {"target_period": 5, "sync_period": 2} | settings
    agent, config = by_hand.agent_on(iterated_dqn, by_hand.Choices(), **settings)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    bounded, ends = [], []
    for update in range(1, 12):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 4)[0]
        _, sample_key, fraction_key = jax.random.split(key, 3)
        drawn = ()
        if config.base == "iqn":
            drawn = tuple(
                np.float64(draws.uniform(key, (config.batch_size, count)))
                for key, count in zip(jax.random.split(fraction_key, 3), (4, 5, 3), strict=True)
            )
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        online = networks_of(before.network.parameters, config.base)
        target = networks_of(before.target_network, config.base)
        adams = [
            {
                path: by_hand.Adam(
                    jax.tree.map(lambda x, k=k: x[k], before.network.optimizer), path, config.adam_epsilon
                )
                for path in online[k]
            }
            for k in range(3)
        ]
        found = [slow_network(online[k], adams[k], target[k], batch, drawn, config) for k in range(3)]
        online = [one["nets"] for one in found]
        if update % 5 == 0:
            online, target = [*online[1:], online[2]], online
        elif update % 2 == 0:
            target = [target[0], *online[:2]]
        assert_networks_are(state.learner.network.parameters, online)
        assert_networks_are(state.learner.target_network, target)
        for k in range(3):  # what Adam remembers stays in its place
            optimizer = jax.tree.map(lambda x, k=k: x[k], state.learner.network.optimizer)
            for path, adam in adams[k].items():
                by_hand.assert_adam_is(optimizer, adam, path)
        for name in ("loss", "value", "target", "gradient_norm"):
            expected = np.mean([one[name] for one in found])
            np.testing.assert_allclose(metrics[name].total, expected, rtol=2e-3, atol=1e-5, err_msg=name)
        bounded += [one["bounded"] for one in found]
        ends.append((batch["discount"] == 0).mean())
    assert state.learner.updates == 11
    assert 0 < np.mean(ends) < 1  # both kinds of targets were seen
    assert not config.network_gradient_bound or 0 < np.mean(bounded) < 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chain_length": 0}, "--chain-length is 0; it must be a whole number in [1, "),
        ({"sync_period": 0}, "--sync-period is 0; it must be a whole number in [1, "),
        ({"network_gradient_bound": -1.0}, "--network-gradient-bound is -1.0; it must be finite and in [0, "),
    ],
)
def test_numbers_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_configuration(iterated_dqn.Config(**settings))


def test_unknown_bases_are_refused():
    with pytest.raises(ValueError, match=re.escape("--base is 'c51'; it must be one of dqn, iqn")):
        by_hand.agent_on(iterated_dqn, by_hand.Choices(), **by_hand.TINY_VALUE, base="c51")

"""D-eta-N: targets by hand, whole updates against loops in numpy, the stock in and around them, and the gamble."""

import dataclasses
import functools
import re
import subprocess
import sys

import by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.value_based import eta_dqn
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.envs import stock
from jaxrl_dist.learning import interaction, portable
from jaxrl_dist.running import evaluation, training

UTILITIES = {
    "mean": lambda x: x, "shortfall": lambda x: np.minimum(x, 0), "surplus": lambda x: np.maximum(x, 0),
    "target": lambda x: -np.abs(x), "homeostasis": lambda x: -(x**2), "threshold": lambda x: 1.0 * (x >= -1e-5),
}  # fmt: skip
STOCKS = {"discount": 0.9, "lowest_stock": -2.0, "highest_stock": 2.0}


def augmented(env=None, **settings):
    env = env or by_hand.Choices()
    return stock.StockAugmented(env, env.default_params, **(STOCKS | settings))


def small_agent(env=None, **settings):
    settings = by_hand.TINY_VALUE | {"replay_capacity": 120, "num_quantiles": 6, "stock_scale": 3.0} | settings
    return by_hand.agent_on(eta_dqn, env or augmented(), **settings)


def larger_weights(state):
    """The state with weights so large that actions differ from observation to observation."""
    network = jax.tree.map(lambda x: 3 * x, state.learner.network.parameters)
    return state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))


@pytest.fixture(scope="module")
def started():
    """A state with large weights, and observations with stocks of many sizes."""
    agent, _ = small_agent()
    state = larger_weights(by_hand.quick(agent.init)(jax.random.key(1)))
    observation = 2 * jax.random.normal(jax.random.key(5), (60, 4)) * jnp.array([1, 1, 1, 3.0])
    return state, observation


# -- targets and relabelling ------------------------------------------------------------------------------------------


def test_another_stock_goes_through_the_transition():
    batch = by_hand.steps_of([1.0, -2.0, 3.0], [0.5, 0.25, 0.0])
    observation = jnp.array([[1.0, 7], [2, 7], [3, 7]])
    batch = batch._replace(observation=observation, next_observation=observation + 10)
    changed = eta_dqn.with_stock(batch, jnp.array([-3.0, 4, 1]))
    np.testing.assert_array_equal(changed.observation, [[1, -3], [2, 4], [3, 1]])
    # (c + R) / gamma^n; a termination has no stock after it, but a number must stand there.
    np.testing.assert_array_equal(changed.next_observation[:2], [[11, -4], [12, 8]])
    assert np.isfinite(changed.next_observation).all()
    for field in ("action", "reward", "discount"):
        np.testing.assert_array_equal(getattr(changed, field), getattr(batch, field))


def test_the_stored_stock_is_the_one_before_the_action():
    agent, _ = small_agent()
    rows = by_hand.quick(agent.init)(jax.random.key(0)).experience.replay.rows
    before, after = rows.observation[:24, -1], rows.next_observation[:24, -1]
    np.testing.assert_allclose(after, (before + rows.reward[:24]) / 0.9, rtol=1e-5, atol=1e-5)
    # The next row of the same environment goes on from there, or starts anew where the episode has ended.
    ended = np.asarray(rows.terminated | rows.truncated)[:22]
    assert 0 < ended.mean() < 1
    np.testing.assert_array_equal(before[2:][~ended], after[:22][~ended])
    assert (np.abs(before[2:][ended]) <= 2).all()


# -- ties -------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_larger_mean():
    """With a stock that no action can lose, all fall short by nothing: what is left should not be wasted."""
    quantiles = jnp.array([[1.0, 1.0], [0.0, 4.0], [2.0, 3.0]])  # means 1, 2, 2.5
    for name, owned, expected in (
        ("shortfall", 0.0, 2),  # nothing falls short
        ("shortfall", -1.5, 2),  # 0.5, 0.75 and nothing
        ("shortfall", -10.0, 2),  # all of it counts
        ("surplus", -20.0, 2),  # nothing is beyond
        ("threshold", -1.0, 2),  # 1, 1/2 and 1
        ("threshold", -4.0, 1),  # 0, 1/2 and 0: no tie
        ("target", -1.0, 0),
    ):
        preferred = stock.preferences(name, jnp.float32(owned), quantiles)
        assert preferred.argmax() == expected, (name, owned)
    # Within the tolerance utilities are equal, beyond it they are not.
    for below, expected in ((5e-6, 1), (5e-5, 0)):
        quantiles = jnp.array([[1.0, 1.0], [-below, 4.0]])
        assert stock.preferences("shortfall", jnp.float32(0), quantiles).argmax() == expected


def laws_of(state, quantiles):
    """The state with networks that predict the quantiles `[actions, quantiles]` everywhere."""
    network = jax.tree.map(jnp.zeros_like, state.learner.network.parameters)
    layers = network["params"]["head"]["advantage"]["layers"]
    last = max(name for name in layers if name.startswith("bias"))
    layers[last] = jnp.reshape(jnp.asarray(quantiles), layers[last].shape)
    return state._replace(learner=by_hand.changed(state.learner, network=network, target_network=network))


def test_ties_in_acting_targets_and_exported_policies(tmp_path):
    """A tie for the utility everywhere: the agent must take the action of larger mean, and learn from its law."""
    agent, config = small_agent(num_quantiles=2, epsilon_start=0.0, epsilon_end=0.0, hindsight=False)
    state = laws_of(by_hand.quick(agent.init)(jax.random.key(2)), [[20.0, 20], [20, 40], [30, 40]])
    observation = jax.random.normal(jax.random.key(5), (8, 4))
    np.testing.assert_array_equal(agent.policy.act(state, observation, (), jax.random.key(0))[0], 2)
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), 2)
    sample_key = jax.random.split(jax.random.split(jax.random.clone(state.key), 3)[0])[1]
    position = int(state.experience.replay.position)
    after, metrics = by_hand.quick(agent.step)(state)
    written = (position + np.arange(config.num_envs)) % config.replay_capacity
    np.testing.assert_array_equal(after.experience.replay.rows.action[written], 2)
    batch = by_hand.stored_windows(after, sample_key, config)
    assert batch["discount"].max() > 0
    expected = (batch["reward"] + batch["discount"] * 35).mean()
    assert metrics["target"].total / metrics["target"].count == pytest.approx(expected, rel=1e-4)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_row(utility, kappa, next_stocks):
    """One row of `by_hand.value_update`, for rows that come in the order of `next_stocks`."""

    def row(predicted, following, choosing, reward, discount):
        count, stock_after = len(predicted), next(next_stocks)
        values = [UTILITIES[utility](stock_after + atoms).mean() for atoms in following]
        means = [atoms.mean() for atoms in following]
        tied = [action for action, value in enumerate(values) if value >= max(values) - 1e-5]
        best = max(tied, key=lambda action: means[action])
        target = reward + discount * following[best]
        loss, slope = 0.0, np.zeros(count)
        for i in range(count):
            fraction = (2 * i + 1) / (2 * count)
            for y in target:
                error = y - predicted[i]
                weight, small = abs(fraction - (error < 0)) / count, abs(error) <= kappa
                loss += weight * (error**2 / 2 if small else kappa * (abs(error) - kappa / 2)) / kappa
                slope[i] -= weight * (error if small else kappa * np.sign(error)) / kappa
        return {
            "slope": slope, "loss": loss, "value": predicted.mean(), "target": target.mean(),
            "crossings": (np.diff(predicted) < 0).sum(),
            "differs": discount > 0 and best != np.argmax(means),
            "tied": discount > 0 and len(tied) > 1,
        }  # fmt: skip

    return row


@pytest.mark.parametrize(
    ("utility", "hindsight", "num_steps"),
    [("shortfall", True, 1), ("target", True, 3), ("homeostasis", False, 2)],
)
def test_updates_equal_loops_in_numpy(utility, hindsight, num_steps):
    scale, env = 3.0, augmented()
    settings = {"kappa": 0.5, "num_quantiles": 4, "stock_scale": scale, "utility": utility, "hindsight": hindsight}
    agent, config = by_hand.agent_on(eta_dqn, env, **(by_hand.TINY_VALUE | settings | {"num_steps": num_steps}))
    step, state = by_hand.quick(agent.step), larger_weights(by_hand.quick(agent.init)(jax.random.key(3)))
    differs, ties = [], []
    for _ in range(9):
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key = jax.random.split(key)[1]
        before, (state, metrics) = state.learner, step(state)
        batch = by_hand.stored_windows(state, sample_key, config)
        if hindsight:
            stocks = batch["observation"][:, -1].copy()
            for b in range(config.batch_size):
                batch["observation"][b, -1] = stocks[b - 1]
                if batch["discount"][b]:
                    batch["next_observation"][b, -1] = (stocks[b - 1] + batch["reward"][b]) / batch["discount"][b]
        next_stocks = iter(batch["next_observation"][:, -1].copy())
        for name in ("observation", "next_observation"):
            batch[name][:, -1] /= scale
        expected = by_hand.value_update(before, batch, config, 3, slow_row(utility, 0.5, next_stocks))
        for path, adam in expected["adams"].items():
            by_hand.assert_network_is(state.learner.network.parameters, expected["network"][path], path)
            by_hand.assert_network_is(state.learner.target_network, expected["target_network"][path], path)
            by_hand.assert_adam_is(state.learner.network.optimizer, adam, path)
        assert metrics.keys() - {"episode_return", "episode_length"} <= expected["metrics"].keys()
        for name, metric in metrics.items():
            if name in expected["metrics"]:
                actual = float(metric.total / metric.count)
                np.testing.assert_allclose(actual, expected["metrics"][name], rtol=2e-3, atol=1e-5, err_msg=name)
        differs.append(expected["metrics"]["differs"])
        ties.append(expected["metrics"]["tied"])
    assert np.mean(differs) > 0  # which action is best depends on the utility
    assert utility != "shortfall" or np.mean(ties) > 0


# -- how it acts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("utility", UTILITIES)
def test_the_policy_maximises_the_utility_of_the_predicted_laws(utility, started):
    state, observation = started
    agent, _ = small_agent(utility=utility)
    values = np.zeros((60, 3))
    for action in range(3):
        atoms, masses = (np.asarray(x, np.float64) for x in agent.claim.law(state, observation, jnp.full(60, action)))
        np.testing.assert_allclose(masses, 1 / 6)
        values[:, action] = UTILITIES[utility](np.asarray(observation)[:, -1:] + atoms).mean(1)
    action = np.asarray(agent.policy.act(state, observation, (), jax.random.key(0))[0])
    assert action.dtype == np.int32
    np.testing.assert_allclose(values[np.arange(60), action], values.max(1), rtol=1e-5, atol=1e-5)
    followed, bonus = agent.claim.policy(state, observation, jax.random.key(1))
    np.testing.assert_array_equal(followed, action)
    np.testing.assert_array_equal(bonus, np.zeros(60))
    exported = agent.export(state)
    assert (str(exported["utility"]), float(exported["stock_scale"])) == (utility, 3.0)


@pytest.mark.parametrize("hidden", [(12, 9), (9,)], ids=["two_layers", "one_layer"])
def test_exported_policy_is_the_evaluation_policy(hidden, tmp_path):
    agent, _ = small_agent(hidden=hidden)
    state = larger_weights(by_hand.quick(agent.init)(jax.random.key(1)))
    observation = 2 * jax.random.normal(jax.random.key(5), (60, 4)) * jnp.array([1, 1, 1, 3.0])
    for utility in UTILITIES:
        agent, _ = small_agent(hidden=hidden, utility=utility)
        portable.save_policy(tmp_path / "policy.npz", agent.export(state))
        exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
        np.testing.assert_array_equal(
            exported, agent.policy.act(state, observation, (), jax.random.key(0))[0], err_msg=utility
        )


def test_importing_the_agent_does_not_start_jax():
    """The command line sets up JAX's devices after the import."""
    code = (
        "from jaxrl_dist.algorithms.value_based import eta_dqn; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_stock_matters_to_utilities_alone(started):
    """With laws that do not depend on the stock, it changes what a target asks for, and not what the mean does."""
    state, observation = started
    blind = jax.tree.map(lambda x: x, state.learner.network.parameters)
    kernel = blind["params"]["torso"]["mlp"]["layers"]["kernel_0"]
    blind["params"]["torso"]["mlp"]["layers"]["kernel_0"] = kernel.at[:, -1].set(0)
    state = state._replace(learner=by_hand.changed(state.learner, network=blind))
    moved = observation.at[:, -1].add(4)
    for utility, same in (("mean", True), ("target", False)):
        agent, _ = small_agent(utility=utility)
        actions = [np.asarray(agent.policy.act(state, x, (), jax.random.key(0))[0]) for x in (observation, moved)]
        assert np.array_equal(*actions) == same


def test_targets_bootstrap_at_a_truncation_and_not_at_a_termination():
    agent, config = small_agent(num_envs=1, num_steps=1, hindsight=False)
    flags = jnp.array([[True, False], [True, True], [False, True], [False, False]])  # terminated, truncated

    def mean_targets(key):
        state = larger_weights(agent.init(key))
        row = jax.tree.map(lambda x: x[3], state.experience.replay.rows)

        def mean_target(flags):
            rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (120, *x.shape)), row)
            rows = rows._replace(terminated=jnp.full(120, flags[0]), truncated=jnp.full(120, flags[1]))
            full = state.experience.replay._replace(rows=rows, size=jnp.int32(120))
            experience = state.experience._replace(replay=full)
            target = agent.step(by_hand.with_fresh_keys(state)._replace(experience=experience))[1]["target"]
            return target.total / target.count

        successor = row.next_observation[None]
        atoms, masses = agent.claim.law(state, successor, agent.policy.act(state, successor, (), jax.random.key(0))[0])
        return row.reward, (atoms * masses).sum(), jax.lax.map(mean_target, flags)

    reward, following, targets = jax.device_get(by_hand.quick(mean_targets)(jax.random.key(0)))
    assert abs(following) > 0.02
    np.testing.assert_allclose(targets[:2], reward, rtol=1e-4)
    np.testing.assert_allclose(targets[2:], reward + config.discount * following, atol=2e-3)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": "cvar:0.5"}, "--utility is 'cvar:0.5'; it must be one of mean, shortfall"),
        ({"discount": 0.8}, "--discount is 0.8; it must be that of the stock, 0.9"),
        ({"batch_size": 25}, "--batch-size is 25; it must be at most --warmup-steps = 24"),
        ({"replay_capacity": 23}, "--replay-capacity is 23; it must be at least --warmup-steps = 24"),
        ({"num_envs": 25}, "--num-envs is 25; it must be at most --warmup-steps = 24"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_agent(**settings)


def test_environments_that_cannot_work_are_refused():
    with pytest.raises(
        ValueError, match="Choices, whose observations hold no stock; this algorithm needs stock/Choices"
    ):
        small_agent(by_hand.Choices())
    with pytest.raises(ValueError, match=r"observations of Pictures have shape \(10, 10, 4\); a stock can be added to"):
        augmented(by_hand.Pictures())
    pendulum, params = gymnax.make("Pendulum-v1")
    with pytest.raises(ValueError, match="--env-id is stock/Pendulum-v1, whose actions are continuous"):
        small_agent(stock.StockAugmented(pendulum, params, **STOCKS))


def test_a_traced_discount_that_differs_from_the_stocks_breaks_the_run():
    """It cannot be refused before the run, so the loss is not a number, which stops it."""

    def loss(discount):
        agent, _ = small_agent(discount=discount)
        metrics = agent.step(agent.init(jax.random.key(0)))[1]
        return metrics["loss"].total

    losses = by_hand.quick(lambda values: jax.lax.map(loss, values))(jnp.array([0.9, 0.8]))
    np.testing.assert_array_equal(np.isfinite(losses), [True, False])


def test_presets_are_configurations_of_their_environments():
    for preset in eta_dqn.PRESETS.values():
        settings = {name: x for name, x in preset.items() if name not in ("total_steps", "env_options")}
        options = {name: float(x) for name, x in (pair.split("=") for pair in preset["env_options"])}
        config = dataclasses.replace(eta_dqn.Config(), **settings)
        check_configuration(config)
        env = by_hand.Choices()
        env = stock.StockAugmented(env, env.default_params, **options)
        eta_dqn.make_agent(config, env, env.default_params)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.proves(
    "algorithms/value_based/eta_dqn.py", "envs/stock.py", "jaxrl_dist/learning", "jaxrl_dist/distributional"
)
def test_learns_the_gamble():
    """The policies of dynamic programming from three initial stocks, and CVaR 0.5, 2.0 in truth, from the best one."""
    preset = dict(eta_dqn.PRESETS["stock/gamble"])
    total_steps = preset.pop("total_steps")
    del preset["env_options"]
    inner = stock.gamble()
    env = stock.StockAugmented(inner, inner.default_params, 1.0, -9.0, 1.0)
    config = dataclasses.replace(eta_dqn.Config(), **preset)
    train = training.make_train(
        eta_dqn.make_agent, config, env, env.default_params, total_steps=total_steps, evaluations=1, eval_episodes=2
    )
    states, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 3))
    agent = eta_dqn.make_agent(config, env, env.default_params)
    one_hot, c0 = np.eye(3), np.linspace(-9, 1, 101)

    def seen(state, stocks):
        return jnp.asarray(np.column_stack([np.tile(one_hot[state], (len(stocks), 1)), stocks]), jnp.float32)

    for seed in range(3):
        state = jax.tree.map(lambda x, i=seed: x[i], states)
        # With -2 + 4 no action of the last stage can fall short: the tie goes to the larger mean, as in the planner.
        for c, expected in ((-8.0, (1, 1)), (-5.0, (1, 0)), (-2.0, (0, 1))):
            actions = [
                int(agent.policy.act(state, seen(s, [c + x]), (), jax.random.key(0))[0][0]) for s, x in ((1, 0), (2, 4))
            ]
            assert tuple(actions) == expected, (seed, c)
        start = seen(0, c0)
        best = agent.policy.act(state, start, (), jax.random.key(0))[0]
        atoms = np.asarray(agent.claim.law(state, start, best).atoms)
        promised = -c0 + np.minimum(c0[:, None] + atoms, 0).mean(1) / 0.5
        assert 1.7 <= promised.max() <= 2.1, seed
        # And the evaluation of any agent, from the best stock: half of the episodes average 2.
        params = env.default_params.replace(lowest_stock=-5.0, highest_stock=-5.0)
        evaluate = functools.partial(evaluation.evaluate, episodes=4000, max_steps=3)
        returns = np.sort(evaluate(agent, env, params, state, jax.random.key(seed)).episode_return)
        assert returns[:2000].mean() == pytest.approx(2, abs=0.25)
        assert interaction.start(env, params, jax.random.key(0), 2).observation[0, -1] == -5

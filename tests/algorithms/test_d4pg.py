"""D4PG's equations by the spec's hand-worked numbers, risk in its actor, and whole updates against loops in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.actor_critic import d4pg
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import risk as risks
from jaxrl_dist.distributional.law import Law

SUPPORT = jnp.arange(-2.0, 3.0)
MASSES = jnp.array([[0.1, 0.2, 0.4, 0.2, 0.1]])

# -- targets and losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.5, 0.9, [0.03, 0.15, 0.32, 0.32, 0.18]),
        (1.25, 0.0, [0, 0, 0, 0.75, 0.25]),  # the end of an episode: all of the mass is at the reward
        (0.0, 1.0, [0.1, 0.2, 0.4, 0.2, 0.1]),
        (1.5, 1.0, [0, 0.05, 0.15, 0.3, 0.5]),  # what falls outside goes to the end, and no mass is lost
        (-7.0, 0.729, [1, 0, 0, 0, 0]),
    ],
)
def test_target_by_hand(reward, discount, expected):
    target = d4pg.target_masses(by_hand.steps_of([reward], [discount]), MASSES, SUPPORT)
    np.testing.assert_allclose(target, [expected], atol=1e-6)


def test_target_keeps_the_mean_where_nothing_is_clipped():
    rng = np.random.default_rng(0)
    reward, discount = rng.uniform(-0.5, 0.5, 20), rng.uniform(0, 0.7, 20)
    masses = rng.dirichlet(np.ones(5), 20)
    target = d4pg.target_masses(by_hand.steps_of(reward, discount), jnp.asarray(masses), SUPPORT)
    np.testing.assert_allclose(target @ SUPPORT, reward + discount * (masses @ np.arange(-2, 3)), atol=1e-5)
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-6)


def test_critic_gradient_is_the_difference_of_the_masses():
    logits, target = jnp.array([[0, 1, 2, 0, -1.0], [1, 1, 1, 1, 1]]), jnp.repeat(MASSES, 2, 0)
    loss, gradient = jax.value_and_grad(d4pg.critic_loss)(logits, target)
    masses = by_hand.softmax(np.asarray(logits, np.float64))
    assert loss == pytest.approx(-(np.asarray(target) * np.log(masses)).sum() / 2, rel=1e-6)
    np.testing.assert_allclose(gradient, (masses - np.asarray(target)) / 2, atol=1e-6)
    of_target = jax.grad(d4pg.critic_loss, argnums=1)(logits, target)
    np.testing.assert_array_equal(of_target, np.zeros((2, 5)))


def test_critic_outputs_are_logits_of_the_atoms():
    agent, _ = by_hand.agent_on(d4pg, by_hand.Drift(), critic_hidden=(), num_atoms=5, v_min=-2.0, v_max=2.0)
    state = jax.eval_shape(agent.init, jax.random.key(0))
    critic = jax.tree.map(lambda x: jnp.zeros(x.shape), state.learner.critic.parameters)
    critic["params"]["mlp"]["layers"]["bias_0"] = jnp.array([[0, 1, 2, 0, -1.0]])
    state = state._replace(learner=by_hand.changed(state.learner, critic=critic))
    law = agent.claim.law(state, jnp.ones((3, 3)), jnp.ones((3, 2)))
    np.testing.assert_allclose(law.atoms, jnp.tile(SUPPORT, (3, 1)))
    np.testing.assert_allclose(laws.mean(law), np.full(3, -0.2390758), rtol=1e-5)


def test_actor_loss_cuts_the_gradient_row_by_row():
    action = jnp.array([[0.1, 0.2], [-0.5, 0.9], [0.0, 0.3], [0.4, 0.4]])
    action_gradient = jnp.array([[3.0, -4.0], [0.3, 0.4], [0, 0], [0, -1.0]])
    cut = np.array([[0.6, -0.8], [0.3, 0.4], [0, 0], [0, -1.0]])  # lengths 5, .5, 0 and 1
    loss, gradient = jax.value_and_grad(d4pg.actor_loss)(action, action_gradient, 1.0)
    assert loss == pytest.approx((1 + 0.25 + 0 + 1) / 8, rel=1e-5)
    np.testing.assert_allclose(gradient, -cut / 4, atol=1e-6)
    wide = jax.grad(d4pg.actor_loss)(action, action_gradient, 5.5)
    np.testing.assert_allclose(wide, -action_gradient / 4, atol=1e-6)


def test_a_flat_value_neither_moves_the_actor_nor_makes_it_nan():
    def loss(action, action_gradient):
        return d4pg.actor_loss(action, action_gradient, 1.0)

    of_action, of_gradient = jax.grad(loss, argnums=(0, 1))(jnp.full((2, 2), 0.3), jnp.zeros((2, 2)))
    np.testing.assert_array_equal(of_action, np.zeros((2, 2)))
    np.testing.assert_array_equal(of_gradient, np.zeros((2, 2)))


# -- risk in the actor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neutral", "cvar:0.25", "wang:-0.5", "cpw:0.7", "power:-1", "mean-variance:0.1"])
def test_action_gradient_of_the_risk_adjusted_value_equals_finite_differences(name):
    risk, support = risks.parse(name), jnp.linspace(-3, 3, 13)
    critic = d4pg.Critic((16, 16), 13)

    def slopes(key):
        keys = jax.random.split(key, 3)
        observation, action = jax.random.normal(keys[0], (6, 3)), jax.random.uniform(keys[1], (6, 2), minval=-0.9)
        parameters = critic.init(keys[2], observation, action)
        parameters = jax.tree.map(lambda x: 3 * x, parameters)  # steep enough for differences in float32

        def value(action):
            logits = critic.apply(parameters, observation, action)
            return risks.value(risk, Law(support, jax.nn.softmax(logits)), ascending=True)

        differences = [(value(action + h) - value(action - h)) / 4e-3 for h in 2e-3 * jnp.eye(2)]
        return jax.grad(lambda a: value(a).sum())(action), jnp.stack(differences, axis=-1)

    gradient, differences = by_hand.quick(slopes)(jax.random.key(0))
    assert jnp.abs(gradient).max() > 0.3
    np.testing.assert_allclose(gradient, differences, rtol=0.01, atol=3e-3)


class RiskyBandit(by_hand.Bandit):
    """One action per episode, worth a on average with deviation 0.4, and 1.5 a more of it where a is positive.

    Never certain: the mean of the worst quarter does not move with masses that are all inside one atom.
    """

    def step_env(self, key, state, action, params):
        observation, state, _, done, info = super().step_env(key, state, action, params)
        deviation = 0.4 + 1.5 * jnp.maximum(action[0], 0)
        return observation, state, action[0] + deviation * jax.random.normal(key), done, info


@pytest.mark.parametrize(("risk", "low", "high"), [("neutral", 0.8, 1.0), ("cvar:0.25", -0.3, 0.3)])
def test_actor_takes_a_risk_that_pays_only_when_neutral(risk, low, high):
    """The mean a is largest at 1; the mean of the worst quarter, a - 1.27 deviation, at 0."""
    agent, _ = by_hand.agent_on(
        d4pg, RiskyBandit(), num_envs=1, warmup_steps=3000, replay_capacity=4000, batch_size=128, num_steps=1,
        actor_hidden=(16,), critic_hidden=(32, 32), actor_learning_rate=3e-3, critic_learning_rate=3e-3,
        updates_per_iteration=500, v_min=-6.0, v_max=8.0, num_atoms=57, risk=risk,
    )  # fmt: skip
    state, metrics = by_hand.quick(lambda key: agent.step(agent.init(key)))(jax.random.key(0))
    action = agent.policy.act(state, jnp.ones((1, 1)), (), jax.random.key(0))[0]
    assert low <= action[0, 0] <= high
    assert metrics["clipped_mass"].total / metrics["clipped_mass"].count < 0.01
    # The critic learns the same law whatever the actor makes of it.
    law = agent.claim.law(state, jnp.ones((2, 1)), jnp.array([[-0.4], [0.5]]))
    np.testing.assert_allclose(laws.mean(law), [-0.4, 0.5], atol=0.25)
    np.testing.assert_allclose(jnp.sqrt(laws.variance(law)), [0.4, 1.15], atol=0.3)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_authors_code():
    config = d4pg.Config()
    assert (config.num_atoms, config.v_min, config.v_max) == (51, -150, 150)
    assert (config.num_steps, config.discount, config.batch_size) == (5, 0.99, 256)
    assert config.actor_learning_rate == config.critic_learning_rate == 1e-4
    assert (config.exploration_noise, config.action_gradient_bound, config.target_period) == (0.3, 1.0, 100)
    assert (config.actor_hidden, config.critic_hidden) == ((300, 200), (400, 300))
    # Their 32 samples per stored step.
    samples = config.updates_per_iteration * config.batch_size
    assert samples == 32 * config.num_envs * config.steps_per_iteration
    assert (config.replay_capacity, config.risk) == (1_000_000, "neutral")
    for preset in d4pg.PRESETS.values():
        check_configuration(dataclasses.replace(config, **preset))


def test_presets_support_holds_every_return_of_pendulum():
    preset = d4pg.PRESETS["Pendulum-v1"]
    lowest_reward = -(np.pi**2 + 0.1 * 8**2 + 0.001 * 2**2)
    assert preset["v_min"] <= lowest_reward / (1 - d4pg.Config().discount)
    assert preset["v_max"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v_min": 2.0, "v_max": 2.0}, r"v_min is 2.0; it must be less than v_max = 2.0"),
        ({"v_min": 3.0, "v_max": -1.0}, r"v_min is 3.0; it must be less than v_max = -1.0"),
        ({"num_atoms": 1}, r"num_atoms is 1; it must be at least 2"),
        ({"risk": "mode"}, r"--risk is 'mode'; it must be neutral, cvar:LEVEL"),
        ({"risk": "cvar:0"}, r"--risk is 'cvar:0'; it must be"),
        ({"batch_size": 2000}, r"--batch-size is 2000; it must be at most --warmup-steps = 1024"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        by_hand.agent_on(d4pg, by_hand.Drift(), **settings)


def test_discrete_actions_are_refused():
    with pytest.raises(ValueError, match=r"--env-id is Choices, whose actions are discrete"):
        by_hand.agent_on(d4pg, by_hand.Choices())


@pytest.mark.parametrize("change", [{"action_gradient_bound": 0.0}, {"exploration_noise": -0.1}, {"num_steps": 0}])
def test_numbers_out_of_range_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} is {change[name]}; it must be"):
        check_configuration(dataclasses.replace(d4pg.Config(), **change))


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def slow_projection(reward, discount, next_masses, support) -> tuple[np.ndarray, float]:
    """C51's algorithm 1, one atom after the other, and the mass that falls outside."""
    target, clipped, gap = np.zeros(len(support)), 0.0, support[1] - support[0]
    for atom, mass in zip(support, next_masses, strict=True):
        moved = reward + discount * atom
        clipped += mass * (moved < support[0] or moved > support[-1])
        place = (min(max(moved, support[0]), support[-1]) - support[0]) / gap
        below, above = int(np.floor(place)), int(np.ceil(place))
        if below == above:
            target[below] += mass
        else:
            target[below] += mass * (above - place)
            target[above] += mass * (place - below)
    return target, clipped


def slow_value_slope(masses, support, risk) -> np.ndarray:
    """Slope of one law's value in its logits: through softmax, sum_i v_i dp_i = p_j (v_j - sum_i p_i v_i)."""
    worth = support  # of a unit of mass, up to a constant
    if risk.name == "cvar":  # moving mass from the atom at the level to one below it changes the mean of the worst
        boundary = next(i for i in range(len(support)) if masses[: i + 1].sum() >= risk.level)
        worth = np.minimum(support - support[boundary], 0) / risk.level
    return masses * (worth - masses @ worth)


def slow_update(learner: d4pg.Learner, batch: dict, config: d4pg.Config) -> dict:
    """One update as the paper writes it, all gradients by hand: critic, then actor, then the copies that are due."""
    actor, target_actor = by_hand.network(learner.actor.parameters), by_hand.network(learner.target_actor)
    critic, target_critic = by_hand.network(learner.critic.parameters), by_hand.network(learner.target_critic)
    actor_adam, critic_adam = by_hand.Adam(learner.actor.optimizer), by_hand.Adam(learner.critic.optimizer)
    support, risk = np.linspace(config.v_min, config.v_max, config.num_atoms), risks.parse(config.risk)
    size, observations = batch["observation"].shape

    def logits_of(net, observation, action):
        return by_hand.forward(net, 0, np.concatenate([observation, action], axis=1))

    next_action = np.tanh(by_hand.forward(target_actor, 0, batch["next_observation"])[-1])
    next_masses = by_hand.softmax(logits_of(target_critic, batch["next_observation"], next_action)[-1])
    activations = logits_of(critic, batch["observation"], batch["action"])
    masses, slope = by_hand.softmax(activations[-1]), np.zeros((size, config.num_atoms))
    metrics = {name: 0.0 for name in ("critic_loss", "value", "target", "clipped_mass")}
    for b in range(size):
        target, clipped = slow_projection(batch["reward"][b], batch["discount"][b], next_masses[b], support)
        slope[b] = (masses[b] - target) / size
        metrics["critic_loss"] -= target @ np.log(masses[b]) / size
        metrics["value"] += masses[b] @ support / size
        metrics["target"] += target @ support / size
        metrics["clipped_mass"] += clipped / size
    gradient = by_hand.zeros_like(critic)
    by_hand.backward(critic, 0, activations, slope, gradient)
    metrics["critic_gradient_norm"] = np.sqrt(sum((x**2).sum() for x in gradient.values()))
    critic = critic_adam.step(critic, gradient, config.critic_learning_rate)

    activations = by_hand.forward(actor, 0, batch["observation"])
    action = np.tanh(activations[-1])
    value = logits_of(critic, batch["observation"], action)
    slope = np.array([slow_value_slope(p, support, risk) for p in by_hand.softmax(value[-1])])
    action_gradient = by_hand.backward(critic, 0, value, slope)[:, observations:]
    lengths = np.array([np.sqrt((row**2).sum()) for row in action_gradient])
    shares = np.minimum(1, config.action_gradient_bound / lengths)
    cut = shares[:, None] * action_gradient
    gradient = by_hand.zeros_like(actor)
    by_hand.backward(actor, 0, activations, -cut / size * (1 - action**2), gradient)
    actor = actor_adam.step(actor, gradient, config.actor_learning_rate)
    metrics |= {
        "actor_loss": 0.5 * (cut**2).sum() / size, "action_gradient_norm": lengths.mean(),
        "saturation": (np.abs(action) > 0.99).mean(),
    }  # fmt: skip
    due = (int(learner.updates) + 1) % config.target_period == 0
    return {
        "actor": actor, "critic": critic, "target_actor": actor if due else target_actor,
        "target_critic": critic if due else target_critic, "adams": (actor_adam, critic_adam), "metrics": metrics,
        "cut": (lengths > config.action_gradient_bound).mean(),
    }  # fmt: skip


@pytest.mark.parametrize(("risk", "bound"), [("neutral", 0.085), ("cvar:0.3", 0.04)])
def test_updates_equal_loops_in_numpy(risk, bound):
    sizes = {name: value for name, value in by_hand.TINY.items() if name != "polyak"}
    agent, config = by_hand.agent_on(
        d4pg, by_hand.Drift(), **sizes, num_envs=2, updates_per_iteration=1, num_steps=3, target_period=3, num_atoms=7,
        v_min=-5.0, v_max=4.0, exploration_noise=0.6, action_gradient_bound=bound, risk=risk,
    )  # fmt: skip
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    # The actor starts next to zero and the critic nearly flat, where mistakes would hardly show.
    steep = {name: jax.tree.map(lambda x, by=by: by * x, getattr(state.learner, name)) for name, by in (
        ("actor", 16.0), ("target_actor", 15.0), ("critic", 2.0), ("target_critic", 2.5),
    )}  # fmt: skip
    state = state._replace(learner=state.learner._replace(**steep))
    found = []
    for iteration in range(7):
        # The keys as `step` splits them: one environment step, then one update.
        key, act_key, _ = jax.random.split(jax.random.clone(state.key), 3)
        sample_key = jax.random.split(key)[1]
        observation, position = state.experience.interaction.observation, int(state.experience.replay.position)
        before, (state, metrics) = state.learner, step(state)

        mean = np.tanh(by_hand.forward(by_hand.network(before.actor.parameters), 0, np.asarray(observation))[-1])
        action = np.clip(mean + 0.6 * np.asarray(jax.random.normal(act_key, (2, 2))), -1, 1)
        stored = state.experience.replay.rows.action[position : position + 2]
        np.testing.assert_allclose(stored, action, rtol=1e-4, atol=1e-6)

        batch = by_hand.stored_windows(state, sample_key, config)
        expected = slow_update(before, batch, config)
        for name in ("actor", "critic", "target_actor", "target_critic"):
            by_hand.assert_network_is(getattr(state.learner, name), expected[name])
        optimizers = state.learner.actor.optimizer, state.learner.critic.optimizer
        for optimizer, adam in zip(optimizers, expected["adams"], strict=True):
            assert adam.time == iteration + 1
            by_hand.assert_adam_is(optimizer, adam)
        assert metrics.keys() - {"episode_return", "episode_length"} == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            assert metrics[name].total == pytest.approx(value, rel=2e-3, abs=1e-5), name
        found.append(expected["metrics"] | {"cut": expected["cut"], "ends": (batch["discount"] == 0).mean()})
    assert state.learner.updates == 7
    # Rows that are cut and rows that are not, targets that end and that bootstrap, and mass off the support were seen.
    for name in ("cut", "ends", "clipped_mass", "saturation"):
        assert 0.01 < np.mean([one[name] for one in found]) < 0.9, name

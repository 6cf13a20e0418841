"""What holds for every actor-critic beside `test_every_agent.py`: first weights, policies, predictions, exports."""

import dataclasses

import by_hand
import cases
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.actor_critic import sac, td3
from jaxrl_dist.distributional import law
from jaxrl_dist.learning import normalization, portable, soft

NAMES = [name for name, row in cases.CASES.items() if row.replay and not row.world.num_actions]
SOFT = ("tqc", "sac", "dsac", "dsac_t", "stac")
GAUSSIAN = ("dsac", "dsac_t", "stac")


@pytest.fixture(scope="module", params=NAMES)
def started(request):
    """Name, agent, configuration and the states of two keys after the warm-up, with observation statistics."""
    built = programs.of(request.param)
    states = built.begin()
    one, other = (jax.tree.map(lambda x, i=i: x[i], states) for i in (built.base, built.base + 2))
    return request.param, built.agent(built.base), built.config, one, other


def test_start(started):
    name, _, config, state, other = started
    learner = state.learner
    jax.tree.map(np.testing.assert_array_equal, learner.target_critic, learner.critic.parameters)
    if name in SOFT:
        np.testing.assert_allclose(
            by_hand.weights(learner.log_temperature), np.log(config.initial_temperature), rtol=1e-6
        )
    if hasattr(learner, "target_actor"):
        jax.tree.map(np.testing.assert_array_equal, learner.target_actor, learner.actor.parameters)
    members = getattr(config, "num_critics", 1)
    for parameters, inputs, count in ((learner.actor.parameters, 1, 1), (learner.critic.parameters, 2, members)):
        if name == "stac":
            continue  # has its own layers, and tests of them
        net, fan_in = by_hand.network(parameters), inputs
        assert net["kernel_0"].shape == (count, inputs, 16)
        for layer in range(3):
            near_zero = name == "d4pg" and parameters is learner.actor.parameters and layer == 2
            bound = 3e-3 if near_zero else fan_in**-0.5  # uniform within 1 / sqrt(fan-in), PyTorch's default
            if name == "dsac":  # Glorot's, as its authors have it
                bound = (6 / sum(net[f"kernel_{layer}"].shape[1:])) ** 0.5
                assert not net[f"bias_{layer}"].any()
            for part in ("kernel", "bias")[: 1 if name == "dsac" else 2]:
                values = net[f"{part}_{layer}"]
                assert np.abs(values).max() <= bound
                assert len(np.unique(values)) == values.size  # so critics differ from each other
            assert np.abs(net[f"kernel_{layer}"]).max() > 0.6 * bound
            fan_in = 16
    # Another key: other parameters and other actions from the first one on.
    for one, two in zip(
        jax.tree.leaves(learner.critic.parameters), jax.tree.leaves(other.learner.critic.parameters), strict=True
    ):
        assert (one != two).all() or one.ndim < 3
    actions = state.experience.replay.rows.action, other.experience.replay.rows.action
    assert (actions[0][0] != actions[1][0]).all()
    warm = np.asarray(actions[0][:384])
    assert np.abs(warm).max() <= 1
    assert warm.min() < -0.8
    assert warm.max() > 0.8


def test_observations_are_normalised_wherever_the_networks_see_them(started):
    _, agent, _, state, _ = started
    observation = 3 * jax.random.normal(jax.random.key(5), (7, 1))
    action = jnp.linspace(-1, 1, 7)[:, None]
    statistics = state.experience.normalizer
    assert statistics.count == 384
    plain = state._replace(experience=state.experience._replace(normalizer=None))
    normalized = normalization.normalize(statistics, observation)
    for one, two in (
        (agent.policy.act(state, observation, (), jax.random.key(0)),
         agent.policy.act(plain, normalized, (), jax.random.key(0))),
        (agent.claim.law(state, observation, action), agent.claim.law(plain, normalized, action)),
        (agent.claim.policy(state, observation, jax.random.key(0)),
         agent.claim.policy(plain, normalized, jax.random.key(0))),
    ):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, one, two)
    raw, predicted = (law.mean(agent.claim.law(s, observation, action)) for s in (plain, state))
    assert not np.array_equal(raw, predicted)


def test_actions_and_predictions(started):
    name, agent, config, state, _ = started
    observation = jax.random.normal(jax.random.key(5), (7, 1))
    inputs = np.asarray(normalization.normalize(state.experience.normalizer, observation), np.float64)
    if name in GAUSSIAN:  # these networks are gone through by hand in the tests of whole updates
        actor = getattr(cases.module(name), "Actor", soft.Actor)(config.actor_hidden, 1)
        if name in ("dsac", "dsac_t"):
            actor = actor.clone(activation=config.activation)
        outputs = np.concatenate(actor.apply(state.learner.actor.parameters, inputs.astype(np.float32)), axis=1)
    else:
        outputs = by_hand.forward(by_hand.network(state.learner.actor.parameters), 0, inputs)[-1]
    action = agent.policy.act(state, observation, (), jax.random.key(0))[0]
    np.testing.assert_allclose(action, np.tanh(outputs[:, :1]), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(action, agent.policy.act(state, observation, (), jax.random.key(1))[0])

    followed, bonus = agent.claim.policy(state, observation, jax.random.key(0))
    scale = getattr(config, "reward_scale", 1.0)
    if name == "stac":  # units are dropped while training, not in evaluation
        dropout = {"dropout": jax.random.split(jax.random.key(0))[1]}
        outputs = actor.apply(
            state.learner.actor.parameters, inputs.astype(np.float32), config.actor_dropout, rngs=dropout
        )
        outputs = np.concatenate(outputs, axis=1)
    if name in SOFT:
        noise = (np.arctanh(np.asarray(followed, np.float64)) - outputs[:, :1]) / np.exp(outputs[:, 1:])
        log_density = by_hand.soft_sample(outputs, noise)["log_density"]
        np.testing.assert_allclose(bonus, -config.initial_temperature * log_density / scale, rtol=1e-3, atol=1e-4)
        assert not np.allclose(followed, action, atol=0.05)
    else:
        np.testing.assert_array_equal(bonus, np.zeros(7))
        if name == "td3":  # the return its critics learn is that of the smoothed target policy
            noise = jax.random.normal(jax.random.key(0), action.shape)
            np.testing.assert_array_equal(followed, td3.smoothed_action(config, action, noise))
            assert not np.allclose(followed, action, atol=0.05)
        else:
            np.testing.assert_array_equal(followed, action)

    atoms, masses = agent.claim.law(state, observation, action)
    if name in GAUSSIAN:
        bounds = (config.min_std, config.max_std) if name == "dsac" else ()
        critic = cases.module(name).Critic(config.critic_hidden, *([2] if name == "dsac_t" else []))
        if name != "stac":
            critic = critic.clone(activation=config.activation)
        mean, std = critic.apply(state.learner.critic.parameters, inputs.astype(np.float32), action, *bounds)
        if name == "dsac_t":
            mean, std = (jnp.where(mean[:, 0] < mean[:, 1], x[:, 0], x[:, 1]) for x in (mean, std))
        np.testing.assert_allclose(atoms[:, 25], mean / scale, rtol=1e-4, atol=1e-5)  # the median
        np.testing.assert_allclose(atoms.std(1), std / scale, rtol=0.02)
        return
    critic, pairs = (
        by_hand.network(state.learner.critic.parameters),
        np.concatenate([inputs, np.asarray(action)], axis=1),
    )
    members = [by_hand.forward(critic, member, pairs)[-1] for member in range(getattr(config, "num_critics", 1))]
    if name == "d4pg":
        np.testing.assert_allclose(atoms, np.tile(np.linspace(-4, 4, 17), (7, 1)), atol=1e-6)
        np.testing.assert_allclose(masses, by_hand.softmax(members[0]), rtol=1e-3)
        return
    np.testing.assert_allclose(atoms, np.concatenate(members, axis=1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(masses, np.full(atoms.shape, 1 / atoms.shape[1]), rtol=1e-6)


def test_exported_policy_is_the_evaluation_policy(started, tmp_path):
    _, agent, _, state, _ = started
    observation = jax.random.normal(jax.random.key(5), (7, 1))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state), np.full(1, -3.0), np.full(1, 5.0))
    exported = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    action = agent.policy.act(state, observation, (), jax.random.key(0))[0]
    np.testing.assert_allclose(exported, 1 + 4 * np.asarray(action), rtol=1e-4, atol=1e-5)


# -- the end of an episode --------------------------------------------------------------------------------------------


def test_targets_bootstrap_at_pendulums_time_limit_and_not_at_a_termination():
    """In an environment of gymnax; those of all agents are in `test_every_agent.py`."""
    env, params = envs.make("Pendulum-v1")
    settings = {"warmup_steps": 200, "replay_capacity": 200, "batch_size": 6, "actor_hidden": (8, 8)}
    config = dataclasses.replace(sac.Config(), **settings, critic_hidden=(8, 8))
    agent = sac.make_agent(config, env, params)
    flags = jnp.array([[True, False], [True, True], [False, True], [False, False]])  # terminated, truncated

    def mean_targets(key):
        state = agent.init(key)
        rows = state.experience.replay.rows

        def mean_target(flags):
            # A replay full of the episode's last transition, with other flags.
            last = jax.tree.map(lambda x: jnp.repeat(x[199:], 200, axis=0), rows)
            last = last._replace(terminated=jnp.full(200, flags[0]), truncated=jnp.full(200, flags[1]))
            experience = state.experience._replace(replay=state.experience.replay._replace(rows=last))
            target = agent.step(by_hand.with_fresh_keys(state)._replace(experience=experience))[1]["target"]
            return target.total / target.count

        return rows, state.experience.interaction.observation[0], jax.lax.map(mean_target, flags)

    rows, first_observation, targets = jax.device_get(by_hand.quick(mean_targets)(jax.random.key(0)))
    assert not rows.terminated.any()
    np.testing.assert_array_equal(np.flatnonzero(rows.truncated), [199])
    # The stored successor is where the pendulum went, not where the next episode began.
    np.testing.assert_array_equal(rows.next_observation[198], rows.observation[199])
    assert np.abs(rows.next_observation[199] - rows.observation[199]).max() < 1.5
    assert not np.array_equal(rows.next_observation[199], first_observation)

    np.testing.assert_allclose(targets[:2], rows.reward[199], rtol=1e-5)
    assert targets[2] == targets[3]
    assert abs(targets[2] - rows.reward[199]) > 1e-3

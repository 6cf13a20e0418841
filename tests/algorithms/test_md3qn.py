"""MD3QN's loss by the spec's hand-worked numbers, MMD-DQN as its case of one reward, and whole updates in numpy."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import md3qn, mmd_dqn
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional import joint, law
from jaxrl_dist.envs import multi_reward
from jaxrl_dist.learning import draws, portable
from jaxrl_dist.learning.spaces import UnsupportedEnvironment
from jaxrl_dist.running import problem, training

ENERGY = joint.energy()


class OneReward(by_hand.Choices):
    """The reward as a vector of one."""

    def vector(self, position, reward):
        return reward[None]

    def step_env(self, key, state, action, params):
        position, state, reward, terminated, info = super().step_env(key, state, action, params)
        return position, state, reward, terminated, info | {"rewards": self.vector(state.position, reward)}


class TwoRewards(OneReward):
    """The reward in two parts, of which one is large where the other is small."""

    def vector(self, position, reward):
        return jnp.stack([2 * position[1], reward - 2 * position[1]])


def vectors_of(rewards, discount):
    """A batch of which targets read rewards and discount."""
    return by_hand.steps_of(jnp.sum(jnp.asarray(rewards), -1), discount)._replace(
        extras={"rewards": jnp.asarray(rewards)}
    )


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_target_by_hand():
    """One discount for all components; after a termination every particle is the reward."""
    following = jnp.array([[[0.0, 0.0], [1.0, 1.0]]] * 2)
    target = md3qn.target_particles(vectors_of([[1.0, -0.5]] * 2, [0.9, 0.0]), following)
    np.testing.assert_allclose(target, [[[1, -0.5], [1.9, 0.4]], [[1, -0.5], [1, -0.5]]], rtol=1e-6)


def test_loss_by_hand_sees_what_goes_together():
    rising, falling = jnp.array([[[0.0, 0], [1, 1]]]), jnp.array([[[0.0, 1], [1, 0]]])
    config = md3qn.Config()
    weights = jnp.array(config.bandwidths) ** config.bandwidth_exponent
    kernel = joint.gaussian_mixture(config.bandwidths, weights)
    assert md3qn.loss_of(rising, falling, kernel) == pytest.approx(1.967458, rel=1e-5)
    # The mean over the batch, not the sum; nothing flows into the target.
    both = [jnp.concatenate([x, rising]) for x in (rising, falling)]
    assert md3qn.loss_of(*both, kernel) == pytest.approx(1.967458 / 2, rel=1e-5)
    gradients = jax.grad(md3qn.loss_of, argnums=(0, 1))(rising + 0.1, falling, kernel)
    assert jnp.abs(gradients[0]).max() > 0.01
    np.testing.assert_array_equal(gradients[1], jnp.zeros((1, 2, 2)))


def test_the_coin_as_free_particles():
    """One state, 32 particles, no network: means 1 and correlation -1, three seeds; only sampled rewards are seen, in
    batches of 16, and so with steps that fall."""
    kernel = joint.gaussian_mixture(tuple(4.0**i for i in range(-4, 3)), 2.0 ** jnp.arange(-4, 3))
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, 2_000))

    def learn(key):
        start_key, key = jax.random.split(key)
        particles = jax.random.normal(start_key, (32, 2))

        def one(carry, time):
            particles, target, state = carry
            coin = jax.random.bernoulli(jax.random.fold_in(key, time), shape=(16,)).astype(jnp.float32)
            batch = vectors_of(jnp.stack([coin, 1 - coin], axis=-1), jnp.full(16, 0.5))

            def objective(particles):
                shifted = md3qn.target_particles(batch, jnp.broadcast_to(target, (16, 32, 2)))
                return md3qn.loss_of(jnp.broadcast_to(particles, (16, 32, 2)), shifted, kernel)

            changes, state = adam.update(jax.grad(objective)(particles), state)
            particles = particles + changes
            return (particles, jnp.where(time % 50 == 49, particles, target), state), None

        carry = particles, particles, adam.init(particles)
        return jax.lax.scan(one, carry, jnp.arange(2_000))[0][0]

    found = joint.equally_weighted(jax.jit(jax.vmap(learn))(jax.random.split(jax.random.key(0), 3)))
    np.testing.assert_allclose(joint.mean(found), np.ones((3, 2)), atol=0.05)
    assert (joint.correlation(found)[:, 0, 1] < -0.95).all()
    covariance = np.asarray(joint.covariance(found))
    assert ((covariance[:, 0, 1] > -0.37) & (covariance[:, 0, 1] < -0.28)).all()


# -- one reward is MMD-DQN --------------------------------------------------------------------------------------------


def test_one_reward_is_mmd_dqn_bit_for_bit():
    """Whole states after 25 iterations, targets copied in between; networks of the same shapes from the same key."""
    env = OneReward()
    states = []
    for algorithm in (md3qn, mmd_dqn):
        own = by_hand.TINY_VALUE | {"num_particles": 5, "bandwidths": (0.25, 1.0, 4.0), "num_steps": 3}
        agent, _ = by_hand.agent_on(algorithm, env, **own)

        def train(key, agent=agent):
            return jax.lax.scan(lambda state, _: agent.step(state), agent.init(key), length=25)

        states.append(by_hand.quick(train)(jax.random.key(3)))
    (ours, our_metrics), (theirs, their_metrics) = states
    assert our_metrics.keys() == their_metrics.keys()
    for one, other in ((ours, theirs), (our_metrics, their_metrics)):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)


# -- actions ----------------------------------------------------------------------------------------------------------


def agent_with(particles, **settings):
    """An agent and a state whose particles are the given ones at every observation, `[actions, particles, rewards]`."""
    particles = jnp.asarray(particles, jnp.float32)
    env = TwoRewards()
    agent, _ = by_hand.agent_on(md3qn, env, **by_hand.TINY_VALUE, num_particles=particles.shape[1], **settings)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    parameters = jax.tree.map(jnp.zeros_like, state.learner.network.parameters)
    layers = parameters["params"]["head"]["advantage"]["layers"]
    last = max(name for name in layers if name.startswith("bias"))
    layers[last] = particles.reshape(layers[last].shape)
    return agent, state._replace(learner=by_hand.changed(state.learner, network=parameters))


LOOKS = jnp.ones((4, 3))


def test_actions_maximise_the_sum():
    """(3, -5) against (0, 0): the first component alone would take it."""
    agent, state = agent_with([[[3, -5]] * 2, [[0, 0]] * 2, [[-1, 0.5]] * 2])
    assert agent.policy.act(state, LOOKS, (), jax.random.key(0))[0].tolist() == [1] * 4


def test_risk_is_of_the_law_of_the_sum():
    """Sums 0 and 6 against 2 and 2; of the second action's components alone, one is always as bad as -4."""
    particles = [[[1, -1], [3, 3]], [[6, -4], [-4, 6]], [[0, 0], [0, 0]]]
    for risk, expected in (("neutral", 0), ("cvar:0.5", 1)):
        agent, state = agent_with(particles, risk=risk)
        assert agent.policy.act(state, LOOKS, (), jax.random.key(0))[0].tolist() == [expected] * 4
        action = jnp.full(4, 1, jnp.int32)
        np.testing.assert_array_equal(agent.claim.law(state, LOOKS, action).atoms, [[2, 2]] * 4)
        np.testing.assert_array_equal(agent.claim.joint(state, LOOKS, action), [particles[1]] * 4)


def test_files_act_as_the_agent(tmp_path):
    for risk in ("neutral", "cvar:0.3", "mean-variance:1"):
        agent, _ = by_hand.agent_on(md3qn, TwoRewards(), **by_hand.TINY_VALUE, num_particles=6, risk=risk)
        state = by_hand.quick(agent.init)(jax.random.key(1))
        # Weights so large that actions differ from observation to observation.
        generator = np.random.default_rng(0)
        drawn = jax.tree.map(lambda x: generator.normal(size=x.shape), state.learner.network.parameters)
        drawn = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
        state = state._replace(learner=by_hand.changed(state.learner, network=drawn))
        observation = generator.normal(size=(50, 3)).astype(np.float32)
        action = np.asarray(agent.policy.act(state, jnp.asarray(observation), (), jax.random.key(0))[0])
        assert len(set(action.tolist())) > 1
        path = tmp_path / f"{risk.partition(':')[0]}.npz"
        portable.save_policy(path, agent.export(state))
        np.testing.assert_array_equal(portable.load_policy(path)(observation), action)


def test_whose_returns_are_learned_may_be_the_random_policy():
    """It acts at random whatever is learned, and claims so; what is evaluated is greedy."""
    particles = [[[3, 3]] * 2, [[0, 0]] * 2, [[0, 0]] * 2]
    many = jnp.ones((300, 3))
    for target_policy, shares in (("uniform", 1 / 3), ("greedy", 1.0)):
        agent, state = agent_with(particles, target_policy=target_policy)
        action, bonus = agent.claim.policy(state, many, jax.random.key(1))
        assert (action == 0).mean() == pytest.approx(shares, abs=0.1)
        assert not bonus.any()
        assert (agent.policy.act(state, many, (), jax.random.key(1))[0] == 0).all()
    config = by_hand.TINY_VALUE | {"num_envs": 64, "warmup_steps": 64, "replay_capacity": 400, "epsilon_start": 0.0}
    agent, _ = by_hand.agent_on(
        md3qn, TwoRewards(), **(config | {"epsilon_end": 0.0, "num_particles": 2, "target_policy": "uniform"})
    )
    state, _ = by_hand.quick(lambda key: jax.lax.scan(lambda s, _: agent.step(s), agent.init(key), length=5))(
        jax.random.key(0)
    )
    taken = np.asarray(state.experience.replay.rows.action)[64:384]
    np.testing.assert_allclose(np.bincount(taken, minlength=3) / 320, np.full(3, 1 / 3), atol=0.1)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidths", [(), (1.0, 0.0), (float("inf"),)])
def test_bandwidths_that_cannot_work_are_refused(bandwidths):
    with pytest.raises(ValueError, match=r"--bandwidths is \(.*; it must be one or more finite numbers above 0"):
        by_hand.agent_on(md3qn, TwoRewards(), **by_hand.TINY_VALUE, bandwidths=bandwidths)


def test_environments_without_a_vector_are_refused():
    with pytest.raises(UnsupportedEnvironment, match=r"whose rewards are no vector .*; this algorithm needs a vector"):
        by_hand.agent_on(md3qn, by_hand.Choices(), **by_hand.TINY_VALUE)
    with pytest.raises(UnsupportedEnvironment, match="whose actions are continuous"):
        by_hand.agent_on(md3qn, by_hand.Drift(), **by_hand.TINY_VALUE)


def test_presets_are_configurations():
    assert md3qn.PRESETS.keys() == {*multi_reward.GENERATORS, "paper"}
    for name, preset in md3qn.PRESETS.items():
        config = dataclasses.replace(md3qn.Config(), **problem.split_preset(preset)[1])
        check_configuration(config)
        env, params = envs.make(name if name in multi_reward.GENERATORS else "multi_reward/coin")
        md3qn.make_agent(config, env, params)
    paper = md3qn.PRESETS["paper"]
    assert (paper["reward_clip"], paper["target_period"] * 4, paper["learning_rate"]) == (1, 10_000, 5e-5)
    config = md3qn.Config()
    assert (config.num_particles, config.bandwidths[0], config.bandwidths[-1]) == (200, 2**-8, 2**8)


# -- whole updates against loops in numpy -----------------------------------------------------------------------------


def gaussians(bandwidths, exponent):
    def kernel(difference):
        d = np.mean(difference**2)
        return sum(h**exponent * np.exp(-d / h) for h in bandwidths)

    def slope(difference):
        d = np.mean(difference**2)
        return sum(-(h**exponent) / h * np.exp(-d / h) for h in bandwidths) * 2 * difference / len(difference)

    return kernel, slope


def lengths():
    def slope(difference):
        length = np.sqrt((difference**2).sum())
        return np.zeros_like(difference) if length == 0 else -difference / length

    return lambda difference: -np.sqrt((difference**2).sum()), slope


def stored_vectors(state, key, config) -> dict[str, np.ndarray]:
    """As `by_hand.stored_windows`, with vectors of rewards: each component cut, discounted and summed by itself."""
    rows, replay = jax.device_get(state.experience.replay.rows), state.experience.replay
    capacity = len(rows.reward)
    bound = config.reward_clip or np.inf
    batch = {name: [] for name in ("observation", "action", "reward", "discount", "next_observation")}
    for start in np.asarray(draws.integers(key, (config.batch_size,), int(replay.size))):
        rewards, discount, slot = np.zeros(2), 1.0, int(start)
        for step in range(config.num_steps):
            rewards = rewards + discount * np.clip(rows.extras["rewards"][slot].astype(np.float64), -bound, bound)
            discount *= config.discount
            newest = (int(replay.position) - 1 - slot) % capacity < config.num_envs
            if rows.terminated[slot] or rows.truncated[slot] or newest or step == config.num_steps - 1:
                break
            slot = (slot + config.num_envs) % capacity
        discount = 0.0 if rows.terminated[slot] else discount
        values = rows.observation[start], rows.action[start], rewards, discount, rows.next_observation[slot]
        for name, value in zip(batch, values, strict=True):
            batch[name].append(value)
    return {name: np.array(values, np.float64) for name, values in batch.items()}


def slow_row(kernel, derivative, count, drawn):
    """One transition's part of the loss; drawn: the successor's actions, where they are not the greedy ones."""

    def row(predicted, following, choosing, rewards, discount):
        particles, successors = predicted.reshape(count, 2), following.reshape(len(following), count, 2)
        means = successors.sum(-1).mean(-1)
        action = drawn.pop(0) if drawn is not None else np.argmax(means)
        target = rewards + discount * successors[action]
        loss, slope = 0.0, np.zeros((count, 2))
        for i in range(count):
            for j in range(count):
                within, across = particles[i] - particles[j], particles[i] - target[j]
                loss += (kernel(within) - 2 * kernel(across) + kernel(target[i] - target[j])) / count**2
                # A particle occurs on either side of the pairs of predictions.
                slope[i] += 2 * (derivative(within) - derivative(across)) / count**2
        return {
            "slope": slope.ravel(), "loss": loss, "value": particles.sum(-1).mean(), "target": target.sum(-1).mean(),
            "spread": particles.std(0).mean(), "differs": len({*successors.mean(1).argmax(0), means.argmax()}) > 1,
        }  # fmt: skip

    return row


@pytest.mark.parametrize(
    ("settings", "kernel"),
    [
        ({}, gaussians([2.0**i for i in range(-8, 9)], 0.5)),
        (
            {"bandwidths": (0.5, 3.0), "bandwidth_exponent": 0.2, "num_steps": 3, "reward_clip": 0.7},
            gaussians((0.5, 3.0), 0.2),
        ),
        ({"kernel": "energy"}, lengths()),
        ({"target_policy": "uniform"}, gaussians([2.0**i for i in range(-8, 9)], 0.5)),
    ],
    ids=["default", "three_steps_cut", "energy", "uniform"],
)
def test_updates_equal_loops_in_numpy(settings, kernel):
    agent, config = by_hand.agent_on(md3qn, TwoRewards(), **(by_hand.TINY_VALUE | {"num_particles": 4} | settings))
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    ends, differs = [], []
    for _ in range(9):
        # The keys as `step` splits them: one environment step, then one update.
        key = jax.random.split(jax.random.clone(state.key), 3)[0]
        sample_key, drawn = jax.random.split(key)[1], None
        if config.target_policy == "uniform":
            sample_key, action_key = jax.random.split(sample_key)
            drawn = np.asarray(draws.integers(action_key, (config.batch_size,), 3)).tolist()
        before, (state, metrics) = state.learner, step(state)
        batch = stored_vectors(state, sample_key, config)
        expected = by_hand.value_update(before, batch, config, 3, slow_row(*kernel, 4, drawn))
        for path, adam in expected["adams"].items():
            by_hand.assert_network_is(state.learner.network.parameters, expected["network"][path], path)
            by_hand.assert_network_is(state.learner.target_network, expected["target_network"][path], path)
            by_hand.assert_adam_is(state.learner.network.optimizer, adam, path)
        for name in ("loss", "value", "target", "spread", "gradient_norm"):
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, expected["metrics"][name], rtol=2e-3, atol=1e-5, err_msg=name)
        ends.append((batch["discount"] == 0).mean())
        differs.append(expected["metrics"]["differs"])
    assert state.learner.updates == 9
    assert 0 < np.mean(ends) < 1
    assert np.mean(differs) > 0, "the best action is the same by every component and by their sum"


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("env_id", "sign"), [("multi_reward/exclusive", -1), ("multi_reward/inclusive", 1)])
def test_learns_what_goes_together(env_id, sign, proof):
    """The paper's first experiment: joint laws of the uniform policy's returns in two mazes, from their start."""
    env, params = envs.make(env_id)
    config = dataclasses.replace(md3qn.Config(), **problem.split_preset(md3qn.PRESETS[env_id])[1])
    train = jax.vmap(
        training.make_train(md3qn.make_agent, config, env, params, total_steps=12_000, evaluations=1, eval_episodes=2)
    )
    keys = jax.random.split(jax.random.key(0), 3)
    proof(proofs.program(train, keys))
    states, _ = jax.jit(train)(keys)
    agent = md3qn.make_agent(config, env, params)
    exact = multi_reward.joint_law(params, np.full((env.num_states, 4), 0.25), 1.0, 0, steps=400)
    # The best of all laws that know each component alone is so far away.
    alone = joint.energy_distance(joint.independent(exact), exact)
    observation, actions = jnp.repeat(jnp.asarray(env.images[:1]), 4, axis=0), jnp.arange(4, dtype=jnp.int32)
    for seed in range(3):
        state = jax.tree.map(lambda x, seed=seed: x[seed], states)
        particles = np.asarray(agent.claim.joint(state, observation, actions)).reshape(-1, 2)
        learned = joint.equally_weighted(particles)
        assert sign * joint.correlation(learned)[0, 1] > 0.8
        assert joint.energy_distance(learned, exact) < 0.8 * alone
        total = law.mean(agent.claim.law(state, observation, actions)).mean()
        assert float(total) == pytest.approx(float(particles.sum(-1).mean()), rel=1e-4)

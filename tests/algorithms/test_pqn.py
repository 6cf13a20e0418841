"""PQN: its targets and normalisation by hand, whole iterations against loops in numpy, and how it explores."""

import dataclasses

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import pqn
from jaxrl_dist.learning import portable
from jaxrl_dist.running import problem

TINY = {
    "num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "discount": 0.9,
    "trace_decay": 0.65, "reward_scale": 0.5, "epsilon_start": 1.0, "epsilon_end": 0.5, "exploration_steps": 60,
    "learning_rate": 0.02, "annealing_steps": 96, "gradient_bound": 1.2,
}  # fmt: skip


def agent_of(env=None, **settings):
    return by_hand.agent_on(pqn, env or by_hand.Choices(), **(TINY | settings))


@pytest.fixture
def seen(monkeypatch):
    """Transitions of all rollouts, as they were collected."""
    kept, plain = [], pqn.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(
            lambda x: kept.append(jax.tree.map(np.asarray, x)), rollout.transition._replace(extras=()), ordered=True
        )
        return now, rollout, episodes

    monkeypatch.setattr(pqn.rollouts, "collect", recorded)
    return kept


# -- losses and networks ----------------------------------------------------------------------------------------------


def test_loss_by_hand():
    value, gradient = jax.value_and_grad(pqn.loss_of)(jnp.array([0.5, 1.0, 3.0]), jnp.array([0.0, 2.0, 1.0]))
    assert value == pytest.approx((0.125 + 0.5 + 2) / 3)
    np.testing.assert_allclose(gradient, [0.5 / 3, -1 / 3, 2 / 3])
    np.testing.assert_array_equal(jax.grad(pqn.loss_of, argnums=1)(jnp.ones(3), jnp.zeros(3)), jnp.zeros(3))
    with pytest.raises(AssertionError):
        pqn.loss_of(jnp.ones(3), jnp.ones((3, 1)))


@pytest.mark.parametrize("shape", [(5,), (6, 6, 4)], ids=["vectors", "images"])
def test_every_hidden_layer_is_normalised_before_its_activation(shape):
    network = pqn.Network((32, 16), 3)
    observation = jax.random.normal(jax.random.key(0), (7, *shape))
    parameters = network.init(jax.random.key(1), observation)
    values, between = network.apply(parameters, observation, capture_intermediates=True)
    normed = {name: x["__call__"][0] for name, x in between["intermediates"].items() if "norm" in name}
    assert set(normed) == {"norm_0", "norm_1"} | ({"convolution_norm"} if len(shape) == 3 else set())
    for name, x in normed.items():  # signs of both kinds: the relu comes after it
        np.testing.assert_allclose(x.mean(-1), 0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(x.var(-1), 1, atol=1e-2, err_msg=name)
    # Biases start at 0, but for the convolution's: the scale of what is seen makes no difference.
    if len(shape) == 1:
        np.testing.assert_allclose(network.apply(parameters, 30 * observation), values, atol=1e-3)
    assert np.abs(np.asarray(values)).max() > 0.1


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


def flat(tree):
    """All parameters by one name each, in float64."""
    return {
        f"{layer}/{name}": np.asarray(x, np.float64)
        for layer, names in tree["params"].items() for name, x in names.items()
    }  # fmt: skip


def forward(net, inputs):
    """Action values, and of each hidden layer its inputs, what it normalised, and the deviation."""
    tape, index = [], 0
    while f"layer_{index}/kernel" in net:
        sums = inputs @ net[f"layer_{index}/kernel"] + net[f"layer_{index}/bias"]
        deviation = np.sqrt(sums.var(-1, keepdims=True) + 1e-5)
        normed = (sums - sums.mean(-1, keepdims=True)) / deviation
        tape.append((inputs, normed, deviation))
        inputs = np.maximum(normed * net[f"norm_{index}/scale"] + net[f"norm_{index}/bias"], 0)
        index += 1
    return inputs @ net["head/kernel"] + net["head/bias"], [*tape, (inputs,)]


def backward(net, tape, slope):
    (features,) = tape[-1]
    gradient = {"head/kernel": features.T @ slope, "head/bias": slope.sum(0)}
    slope, outputs = slope @ net["head/kernel"].T, features
    for index in reversed(range(len(tape) - 1)):
        inputs, normed, deviation = tape[index]
        slope = slope * (outputs > 0)
        gradient |= {f"norm_{index}/scale": (slope * normed).sum(0), f"norm_{index}/bias": slope.sum(0)}
        slope = slope * net[f"norm_{index}/scale"]
        along = (slope * normed).mean(-1, keepdims=True)
        slope = (slope - slope.mean(-1, keepdims=True) - normed * along) / deviation
        gradient |= {f"layer_{index}/kernel": inputs.T @ slope, f"layer_{index}/bias": slope.sum(0)}
        slope, outputs = slope @ net[f"layer_{index}/kernel"].T, inputs
    return gradient


class RAdam:
    """Rectified Adam (Liu et al. 2020, algorithm 2): the plain momentum for as long as the variance is not tractable.

    In float32 `length`, a small difference of large numbers, is known to 1 in 100 at first: hence the tolerances below.
    """

    def __init__(self, parameters):
        self.first, self.second = ({name: np.zeros_like(x) for name, x in parameters.items()} for _ in range(2))
        self.time = 0

    def step(self, parameters, gradient, rate, bound):
        norm = np.sqrt(sum((x**2).sum() for x in gradient.values()))
        self.time += 1
        longest = 2 / (1 - 0.999) - 1
        length = longest - 2 * self.time * 0.999**self.time / (1 - 0.999**self.time)
        moved = {}
        for name, slope in gradient.items():
            slope = slope * min(1, bound / norm)
            self.first[name] = 0.9 * self.first[name] + 0.1 * slope
            self.second[name] = 0.999 * self.second[name] + 0.001 * slope**2
            change = self.first[name] / (1 - 0.9**self.time)
            if length >= 5:
                rectified = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                deviation = np.sqrt(self.second[name] / (1 - 0.999**self.time))
                change = np.sqrt(rectified) * change / (deviation + 1e-8)
            moved[name] = parameters[name] - rate * change
        return moved, norm


def slow_targets(net, lived, config):
    """Peng's Q(lambda) backwards through each environment; `lived` is `[steps, num_envs, ...]`."""
    largest = forward(net, lived.next_observation.astype(np.float64))[0].max(-1)
    target = np.zeros(largest.shape)
    for env in range(config.num_envs):
        for t in reversed(range(config.num_steps)):
            after = largest[t, env]
            if t < config.num_steps - 1 and not lived.truncated[t, env]:
                after = (1 - config.trace_decay) * after + config.trace_decay * target[t + 1, env]
            target[t, env] = config.reward_scale * lived.reward[t, env]
            if not lived.terminated[t, env]:
                target[t, env] += config.discount * after
    return target, largest


ONLINE = {"num_envs": 6, "num_steps": 1, "num_epochs": 1, "num_minibatches": 1, "trace_decay": 0.0}


@pytest.mark.parametrize("settings", [{}, ONLINE], ids=["rollouts", "online"])
def test_iterations_equal_loops_in_numpy(settings, seen):
    """All minibatches of all epochs; what was lived is taken from the program, the rest is by hand."""
    agent, config = agent_of(**settings)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    net, rows = flat(state.learner.parameters), config.num_envs * config.num_steps
    optimizer, bounded, ends = RAdam(net), [], []
    for _ in range(4 if not settings else 12):
        key = jax.random.split(jax.random.clone(state.key), 3)[2]
        state, metrics = step(state)
        jax.effects_barrier()
        lived = seen[-1]
        ends.append((lived.terminated.sum(), lived.truncated.sum()))
        target, largest = slow_targets(net, lived, config)
        if settings:  # one step of every environment is online Q-learning
            np.testing.assert_allclose(target, 0.5 * lived.reward + 0.9 * ~lived.terminated * largest)
        observation = lived.observation.reshape(rows, -1).astype(np.float64)
        action, target, found = lived.action.reshape(rows), target.reshape(rows), []
        for epoch in range(config.num_epochs):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.clone(key), epoch), rows))
            for numbers in order.reshape(config.num_minibatches, -1):
                outputs, tape = forward(net, observation[numbers])
                taken = np.eye(3)[action[numbers]]
                error = (outputs * taken).sum(-1) - target[numbers]
                gradient = backward(net, tape, error[:, None] * taken / len(numbers))
                rate = config.learning_rate * (1 - optimizer.time / (96 / rows * agent.clock.updates))
                net, norm = optimizer.step(net, gradient, rate, config.gradient_bound)
                bounded.append(norm > config.gradient_bound)
                values = error + target[numbers]
                found.append({  # values as the environment's rewards count
                    "loss": 0.5 * (error**2).mean(), "gradient_norm": norm, "value": 2 * values.mean(),
                    "target": 2 * target[numbers].mean(),
                })  # fmt: skip
        for name, x in flat(state.learner.parameters).items():
            np.testing.assert_allclose(x, net[name], rtol=2e-3, atol=5e-5, err_msg=name)
        for name in found[0]:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=5e-3, atol=5e-4, err_msg=name)
    assert optimizer.time > 6  # its variance has become tractable
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert 0 < np.mean(bounded) < 1


# -- how it acts ------------------------------------------------------------------------------------------------------


def test_epsilon_falls_from_rollout_to_rollout(seen):
    """The share of actions that are not greedy is 2/3 epsilon, at both steps of a rollout."""
    agent, _ = agent_of(
        num_envs=1000, num_steps=2, num_epochs=1, num_minibatches=1, learning_rate=0.0, epsilon_start=0.9,
        epsilon_end=0.3, exploration_steps=6000,
    )  # fmt: skip
    state, step = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step)
    net = flat(state.learner.parameters)
    for epsilon in (0.9, 0.7, 0.5, 0.3, 0.3):
        state, _ = step(state)
        jax.effects_barrier()
        greedy = forward(net, seen[-1].observation.astype(np.float64))[0].argmax(-1)
        np.testing.assert_allclose((seen[-1].action != greedy).mean(-1), epsilon * 2 / 3, atol=0.06)
    assert state.env_steps == 10_000


def test_it_is_evaluated_greedily_and_claims_values_in_the_environments_rewards(tmp_path):
    agent, config = agent_of(hidden=(16, 16))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    head = state.learner.parameters["params"]["head"]
    head["kernel"] = jax.random.normal(jax.random.key(1), (16, 3))  # actions that differ
    observation = jax.random.normal(jax.random.key(5), (200, 3))
    values = pqn.Network(config.hidden, 3).apply(state.learner.parameters, observation)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    np.testing.assert_array_equal(action, values.argmax(-1))
    assert len(np.unique(action)) > 1
    followed, bonus = agent.claim.policy(state, observation, jax.random.key(0))
    np.testing.assert_array_equal(followed, action)
    np.testing.assert_array_equal(bonus, np.zeros(200))
    assert agent.claim.learns_mean
    assert not agent.claim.of_states
    law = agent.claim.law(state, observation, jnp.zeros(200, jnp.int32))
    np.testing.assert_allclose(law.atoms, 2 * values[:, :1], rtol=1e-6)
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)


def test_images_pass_a_normalised_convolution(tmp_path):
    agent, _ = agent_of(by_hand.Pictures(), hidden=(7,))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    names = {"convolution", "convolution_norm", "layer_0", "norm_0", "head"}
    assert set(state.learner.parameters["params"]) == names
    observation = jax.vmap(by_hand.Pictures().picture)(2 * jax.random.normal(jax.random.key(5), (60, 3)))
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    assert len(np.unique(action)) > 1
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)


# -- settings ---------------------------------------------------------------------------------------------------------


def test_minibatches_must_divide_the_rollout():
    with pytest.raises(ValueError, match="--num-minibatches is 5; it must divide --num-envs x --num-steps = 24"):
        agent_of(num_minibatches=5)


def test_defaults_are_the_papers_for_minatar():
    config = dataclasses.asdict(pqn.Config())
    assert (config["num_envs"], config["num_steps"]) == (128, 32)
    assert (config["num_epochs"], config["num_minibatches"]) == (2, 32)
    assert (config["learning_rate"], config["discount"], config["trace_decay"]) == (5e-4, 0.99, 0.65)
    assert (config["gradient_bound"], config["reward_scale"], config["hidden"]) == (10, 1, (128,))
    assert (config["epsilon_start"], config["epsilon_end"], config["exploration_steps"]) == (1, 0.05, 1_000_000)


@pytest.mark.parametrize("env_id", ["Breakout-MinAtar", "SpaceInvaders-MinAtar", "Acrobot-v1"])
def test_presets_fit_their_environments(env_id):
    config = dataclasses.replace(pqn.Config(), **problem.split_preset(pqn.PRESETS[env_id])[1])
    agent = pqn.make_agent(config, *envs.make(env_id))
    start = jax.eval_shape(agent.init, jax.random.key(0))
    after, _ = jax.eval_shape(agent.step, start)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), start)
    assert config.annealing_steps == pqn.PRESETS[env_id]["total_steps"]

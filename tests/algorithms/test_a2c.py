"""A2C: losses and RMSProp by hand, whole iterations against loops in numpy, and what makes it PPO."""

import dataclasses

import by_hand
import cases
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from jaxrl_dist.algorithms.policy_gradient import a2c, ppo
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.learning import clipped, returns
from jaxrl_dist.learning.policies import Choice

TINY = {"num_envs": 3, "num_steps": 8, "hidden": (6, 5), "learning_rate": 0.02, "discount": 0.9, "entropy_weight": 0.03}
CONTINUOUS = TINY | {"normalize_observations": True, "normalize_rewards": True}
KINDS = {"choice": (by_hand.Choices(), TINY), "continuous": (by_hand.Drift(), CONTINUOUS)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def agent_of(kind, module=a2c, **settings):
    env, base = KINDS[kind]
    return by_hand.agent_on(module, env, **(base | settings))


# -- returns, losses and steps ----------------------------------------------------------------------------------------


def advantages(reward, value, last, terminated, decay=1.0):
    """Of one environment whose episode ends at one step."""
    numbers = [jnp.asarray(x, jnp.float32) for x in (reward, value, [*value[1:], last])]
    ends = jnp.arange(len(reward)) == terminated
    return np.asarray(returns.gae(*numbers, ends, jnp.zeros_like(ends), 0.9, decay))


def test_returns_by_hand():
    value = [0.5, 0.4, 0.6, 0.2, 0.3]
    found = advantages([1, 0, 2, 0, 1], value, 0.7, terminated=2)
    np.testing.assert_allclose(found, [2.12, 1.4, 1.4, 1.267, 1.33], rtol=1e-6)
    np.testing.assert_allclose(found + np.array(value), [2.62, 1.8, 2, 1.467, 1.63], rtol=1e-6)
    assert a2c.Config().gae_decay == 1


def test_a_whole_episode_without_values_is_reinforce():
    """Advantages are the rewards to go."""
    reward = [1, 0, 2, 0, 1]
    to_go = [sum(0.9**k * x for k, x in enumerate(reward[t:])) for t in range(5)]
    np.testing.assert_allclose(advantages(reward, [0.0] * 5, 7.0, terminated=4), to_go, rtol=1e-6)


LOGITS = jnp.array([[1.0, 0.0, -1.0]])


def test_policy_gradient_and_entropy_by_hand():
    np.testing.assert_allclose(jax.nn.softmax(LOGITS)[0], [0.665241, 0.244728, 0.090031], atol=1e-6)
    assert Choice(LOGITS).entropy()[0] == pytest.approx(0.832396, abs=1e-6)

    def of_policy(logits, advantage):
        return a2c.policy_loss(Choice(logits).log_density(jnp.array([0])), advantage)

    def of_both(logits):
        return of_policy(logits, jnp.array([0.8])) - 0.01 * Choice(logits).entropy().mean()

    slope, through_advantage = jax.grad(of_policy, argnums=(0, 1))(LOGITS, jnp.array([0.8]))
    np.testing.assert_allclose(slope[0], [-0.267807, 0.195783, 0.072024], atol=1e-6)
    assert through_advantage[0] == 0
    entropy = jax.grad(lambda logits: Choice(logits).entropy()[0])(LOGITS)
    np.testing.assert_allclose(entropy[0], [-0.282587, 0.140770, 0.141817], atol=1e-6)
    np.testing.assert_allclose(jax.grad(of_both)(LOGITS)[0], [-0.264981, 0.194375, 0.070606], atol=2e-6)


def test_value_loss_by_hand():
    value, gradient = jax.value_and_grad(a2c.value_loss)(jnp.array([2.0, 0.5]), jnp.array([1.0, 1.0]))
    assert value == pytest.approx(0.5 * (1 + 0.25) / 2)
    np.testing.assert_allclose(gradient, [0.5, -0.25])
    np.testing.assert_array_equal(jax.grad(a2c.value_loss, argnums=1)(jnp.ones(2), jnp.zeros(2)), jnp.zeros(2))


def test_shapes_that_would_broadcast_are_refused():
    for loss in (a2c.policy_loss, a2c.value_loss):
        with pytest.raises(AssertionError):
            loss(jnp.ones(3), jnp.ones((3, 1)))
        with pytest.raises(AssertionError):
            loss(jnp.ones((3, 1)), jnp.ones((3, 1)))


def test_rmsprop_has_its_epsilon_within_the_root():
    config = dataclasses.replace(a2c.Config(), gradient_bound=10.0)
    optimizer, parameter = a2c.optimizer_of(config), jnp.zeros(())
    state = optimizer.init(parameter)
    for gradient, expected in ((1.0, -0.006997), (-2.0, -0.000730), (0.5, -0.002266)):
        change, state = optimizer.update(jnp.float32(gradient), state)
        parameter = parameter + change
        assert parameter == pytest.approx(expected, abs=1e-6)
    first = optimizer.update(jnp.float32(1), optimizer.init(parameter))[0]
    assert first / -config.learning_rate == pytest.approx(9.995, abs=1e-3)  # 9.999 with epsilon outside


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


def slow_gradient(parameters, batch, config):
    """Gradients of the loss by hand, and the loss; `batch` has leaves `[rows, ...]`."""
    actor, critic = (clipped_by_hand.part(parameters, name) for name in ("actor", "critic"))
    on_actor = clipped_by_hand.tanh_forward(actor, batch["observation"])
    on_critic = clipped_by_hand.tanh_forward(critic, batch["observation"])
    head, value, advantage = on_actor[-1], on_critic[-1][:, 0], batch["advantage"]
    rows, gradient = len(value), {}
    if "log_std" in parameters:
        std = np.exp(parameters["log_std"])
        noise = (batch["action"] - head) / std
        log_density = (-0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
        entropy = np.full(rows, (np.log(std) + 0.5 * np.log(2 * np.pi * np.e)).sum())
        head_slope, entropy_slope = noise / std, np.zeros_like(head)
        gradient["log_std"] = -(advantage[:, None] * (noise**2 - 1)).mean(0) - config.entropy_weight
    else:
        masses, taken = by_hand.softmax(head), np.eye(head.shape[1])[batch["action"].astype(int)]
        log_density, entropy = np.log((masses * taken).sum(1)), -(masses * np.log(masses)).sum(1)
        head_slope, entropy_slope = taken - masses, -masses * (np.log(masses) + entropy[:, None])
    slope = -(advantage[:, None] * head_slope + config.entropy_weight * entropy_slope) / rows
    gradient |= {f"actor/{k}": x for k, x in clipped_by_hand.tanh_backward(actor, on_actor, slope).items()}
    error = value - batch["target"]
    slope = config.value_weight * error[:, None] / rows
    gradient |= {f"critic/{k}": x for k, x in clipped_by_hand.tanh_backward(critic, on_critic, slope).items()}
    found = {
        "policy_loss": -(log_density * advantage).mean(), "value_loss": 0.5 * (error**2).mean(),
        "entropy": entropy.mean(), "gradient_norm": np.sqrt(sum((x**2).sum() for x in gradient.values())),
    }  # fmt: skip
    loss = found["policy_loss"] + config.value_weight * found["value_loss"] - config.entropy_weight * found["entropy"]
    return gradient, found | {"loss": loss}


@every_kind
def test_iterations_equal_loops_in_numpy(kind, monkeypatch):
    """What was lived is taken from the program, the rest is by hand."""
    agent, config = agent_of(kind, annealing_steps=12 * 24, gae_decay=0.8, rmsprop_decay=0.9, rmsprop_epsilon=1e-3)
    seen, plain = [], a2c.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(a2c.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    parameters = clipped_by_hand.flat(state.learner.parameters)
    squares = {name: np.zeros_like(x) for name, x in parameters.items()}
    ends, bounded = [], []
    for iteration in range(6):
        before, (state, metrics) = state, step(state)
        jax.effects_barrier()
        lived, action = seen[-1]
        ends.append((lived.terminated.sum(), lived.truncated.sum()))

        def seen_as(x, statistics=before.normalizer):
            if statistics is None:
                return x.astype(np.float64)
            deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
            return np.clip((x - np.asarray(statistics.mean, np.float64)) / deviation, -10, 10)

        unit = 1.0 if state.scale is None else np.sqrt(float(state.scale.statistics.variance) + 1e-8)
        reward = lived.reward / unit
        assert np.abs(reward).max() < 10  # so that none is cut
        critic = clipped_by_hand.part(parameters, "critic")
        value, following = (
            clipped_by_hand.tanh_forward(critic, seen_as(x))[-1][..., 0]
            for x in (lived.observation, lived.next_observation)
        )
        advantage = np.zeros(value.shape)
        for t in reversed(range(config.num_steps)):
            later = advantage[t + 1] if t < config.num_steps - 1 else 0
            error = reward[t] + config.discount * ~lived.terminated[t] * following[t] - value[t]
            advantage[t] = error + config.discount * 0.8 * later * ~(lived.terminated[t] | lived.truncated[t])
        batch = {
            "observation": seen_as(lived.observation), "action": action, "advantage": advantage,
            "target": advantage + value,
        }  # fmt: skip
        batch = {name: x.reshape(24, *x.shape[2:]).astype(np.float64) for name, x in batch.items()}
        gradient, found = slow_gradient(parameters, batch, config)
        bounded.append(found["gradient_norm"] > 0.5)
        for name, slope in gradient.items():
            slope = slope * min(1, 0.5 / found["gradient_norm"])
            squares[name] = 0.9 * squares[name] + 0.1 * slope**2
            rate = config.learning_rate * (1 - iteration / 12)
            parameters[name] = parameters[name] - rate * slope / np.sqrt(squares[name] + 1e-3)
        for name, x in clipped_by_hand.flat(state.learner.parameters).items():
            np.testing.assert_allclose(x, parameters[name], rtol=1e-3, atol=1e-5, err_msg=name)
        found |= {"value": unit * value.mean(), "target": unit * batch["target"].mean()}
        for name, expected in found.items():
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert np.any(bounded)


# -- PPO --------------------------------------------------------------------------------------------------------------


@every_kind
def test_it_is_ppo_with_one_minibatch_and_nothing_clipped(kind, monkeypatch):
    """The same rollouts, parameters and moments of the gradient, over four iterations: at ratios of 1 the surrogate has
    the gradient of A2C."""
    plain, shared = a2c.rollouts.collect, {"adam_epsilon": 1e-3, "annealing_steps": 200, "entropy_weight": 0.03}

    def collect(env, env_params, now, key, *arguments):  # whatever else the agents drew before
        return plain(env, env_params, now, jax.random.key(11), *arguments)

    monkeypatch.setattr(a2c.rollouts, "collect", collect)
    assert ppo.rollouts is a2c.rollouts
    mine, _ = agent_of(kind, optimizer="adam", **shared)
    other, _ = agent_of(
        kind, ppo, num_epochs=1, num_minibatches=1, clip_values=False, normalize_advantages=False, gae_decay=1.0,
        **shared,
    )  # fmt: skip
    states = [by_hand.quick(agent.init)(jax.random.key(3)) for agent in (mine, other)]
    steps = [by_hand.quick(agent.step) for agent in (mine, other)]
    start = states[0].learner.parameters
    for _ in range(4):
        (one, one_metrics), (two, two_metrics) = (step(state) for step, state in zip(steps, states, strict=True))
        assert two_metrics["clipped_ratios"].total == 0
        for name in ("value_loss", "entropy", "gradient_norm", "value", "target", "episode_return"):
            np.testing.assert_allclose(*(float(x[name].total) for x in (one_metrics, two_metrics)), rtol=1e-4)
        for get in (lambda x: x.parameters, lambda x: optax.tree.get(x.optimizer, "mu")):
            for a, b in zip(*map(jax.tree.leaves, (get(one.learner), get(two.learner))), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
        states = [one, two]
    for a, b in zip(*map(jax.tree.leaves, (start, states[0].learner.parameters)), strict=True):
        assert np.abs(np.asarray(a - b)).max() > 1e-3


# -- how it acts, and settings ----------------------------------------------------------------------------------------


@every_kind
def test_it_explores_by_its_law_and_is_evaluated_by_the_mode(kind):
    agent, _ = agent_of(kind)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    observation = jax.random.normal(jax.random.key(5), (400, 3))
    action, same = (agent.policy.act(state, observation, (), jax.random.key(seed))[0] for seed in (0, 1))
    np.testing.assert_array_equal(action, same)
    drawn, _ = agent.claim.policy(state, observation, jax.random.key(0))
    assert not np.array_equal(action, drawn)
    assert agent.claim.of_states
    assert np.abs(drawn).max() == (2 if kind == "choice" else 1)  # actions are cut


def test_an_even_policy_at_the_start():
    agent, _ = agent_of("choice")
    state = by_hand.quick(agent.init)(jax.random.key(0))
    policy, _ = clipped.Network((6, 5), 3, False).apply(state.learner.parameters, jnp.zeros((1, 3)))
    assert policy.entropy()[0] == pytest.approx(np.log(3), abs=1e-4)


def test_defaults_are_openais():
    config = dataclasses.asdict(a2c.Config())
    assert (config["num_envs"], config["num_steps"], config["optimizer"]) == (16, 5, "rmsprop")
    assert (config["learning_rate"], config["discount"], config["entropy_weight"]) == (7e-4, 0.99, 0.01)
    assert (config["rmsprop_decay"], config["rmsprop_epsilon"], config["gradient_bound"]) == (0.99, 1e-5, 0.5)


def test_other_optimisers_are_refused():
    with pytest.raises(ValueError, match="--optimizer is 'sgd'; it must be rmsprop or adam"):
        check_configuration(dataclasses.replace(a2c.Config(), optimizer="sgd"))


def test_continuous_actions_are_learned():
    """The best action is 0.5, or 0.5 times what is seen; a value is the true successor's at a time limit."""
    only_cases = ("action", "action_observation", "final_observation")
    built = programs.build("a2c", cases.CONTINUOUS, only_cases)
    looks = jax.device_get(built.advance(built.begin(), 2000)[2])
    one, other, _ = looks["action"][..., 0][:3]
    assert one[1] == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(other[[0, 2]], [-0.5, 0.5], atol=0.1)
    ends = looks["value"][2].reshape(-1)[[0, 2]]
    np.testing.assert_allclose(ends, np.array([-1, 1]) / (1 - cases.DISCOUNT), atol=0.1)

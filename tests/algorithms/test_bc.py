"""BC: the losses by hand, whole updates against numpy, and which episodes count."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.algorithms.offline import bc
from jaxrl_dist.learning import datasets, draws, portable
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.learning.policies import Choice, Gaussian, SquashedGaussian

SIZES = {"batch_size": 5, "hidden": (6,), "learning_rate": 0.01}


def rows(count=24, choice=False) -> Transition:
    generator = np.random.default_rng(0)
    observation, following = generator.normal(1, 3, (2, count, 3)).astype(np.float32)
    action = generator.uniform(-1, 1, (count, 2)).astype(np.float32)
    if choice:
        action = generator.integers(0, 3, count).astype(np.int32)
    ends = np.arange(count) % 6 == 5
    return Transition(
        observation, action, generator.normal(size=count).astype(np.float32), following, ends, ~ends & False
    )


def agent_of(data, env=None, **settings):
    config = bc.Config(**(SIZES | settings))
    env = env or by_hand.Drift()
    return bc.make_agent(config, env, env.default_params, data)


def test_densities_are_the_sheets():
    assert Gaussian(jnp.array([0.2]), jnp.zeros(1)).log_density(jnp.array([0.5])) == pytest.approx(-0.963939, abs=1e-5)
    squashed = SquashedGaussian(jnp.zeros(1), jnp.zeros(1))
    assert squashed.log_density(jnp.array([0.5])) == pytest.approx(-0.782125, abs=1e-5)
    assert squashed.log_density(jnp.array([0.999])) == pytest.approx(-1.924595, abs=1e-4)
    assert np.isfinite(squashed.log_density(jnp.array([1.0])))


def test_squared_errors_are_means_over_batch_and_actions():
    off = jnp.array([[0.1, -0.2], [0.3, 0.0], [0.0, 0.4]])
    policy = Gaussian(off, jnp.zeros((3, 2)))
    assert bc.loss_of(policy, jnp.zeros((3, 2)), "deterministic") == pytest.approx(0.05)
    with pytest.raises(AssertionError):
        bc.loss_of(policy, jnp.zeros((3, 1)), "deterministic")
    assert bc.loss_of(Choice(jnp.zeros((2, 4))), jnp.array([1, 3]), "choice") == pytest.approx(np.log(4))


def test_updates_equal_numpy():
    """Three of them: the rows that were drawn, normalised, one hidden layer, Adam."""
    data = rows()
    agent = agent_of(data)
    state, step = agent.init(jax.random.key(2)), by_hand.quick(agent.step)
    deviation = np.sqrt(data.observation.var(0) + 1e-8)
    seen = np.clip((data.observation - data.observation.mean(0)) / deviation, -10, 10).astype(np.float64)
    net = by_hand.network(state.learner.parameters, "actor")
    first = {name: np.zeros_like(x) for name, x in net.items()}
    second = {name: np.zeros_like(x) for name, x in net.items()}
    for time in range(1, 4):
        batch_key = jax.random.split(jax.random.clone(state.key))[1]
        numbers = np.asarray(draws.integers(batch_key, (5,), 24))
        x, action = seen[numbers], data.action[numbers].astype(np.float64)
        state, metrics = step(state)
        hidden = np.maximum(x @ net["kernel_0"][0] + net["bias_0"][0], 0)
        mode = np.tanh(hidden @ net["kernel_1"][0] + net["bias_1"][0])
        assert float(metrics["loss"].total) == pytest.approx(((mode - action) ** 2).mean(), rel=1e-4)
        slope = 2 * (mode - action) / action.size * (1 - mode**2)
        back = slope @ net["kernel_1"][0].T * (hidden > 0)
        gradient = {
            "kernel_0": (x.T @ back)[None], "bias_0": back.sum(0)[None],
            "kernel_1": (hidden.T @ slope)[None], "bias_1": slope.sum(0)[None],
        }  # fmt: skip
        for name, g in gradient.items():
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean, square = first[name] / (1 - 0.9**time), second[name] / (1 - 0.999**time)
            net[name] = net[name] - 0.01 * mean / (np.sqrt(square) + 1e-8)
        for name, found in by_hand.network(state.learner.parameters, "actor").items():
            np.testing.assert_allclose(found, net[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_rewards_successors_and_ends_play_no_part():
    data = rows()
    other = data._replace(reward=data.reward * 7, next_observation=-data.next_observation, terminated=~data.terminated)
    ends = []
    for one in (data, other):
        agent = agent_of(one)
        ends.append(by_hand.quick(agent.step)(agent.init(jax.random.key(0)))[0].learner.parameters)
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_the_best_episodes_are_cloned():
    """Four episodes of six rows: half of them, a tenth of them (one), and all."""
    data = rows()
    returns = data.reward.reshape(4, 6).sum(1)
    order = np.argsort(-returns)
    for percent, count in ((50, 2), (10, 1), (99, 3)):
        best = datasets.best_episodes(data, percent)
        assert best.count == 6 * count
        kept = np.asarray(best.rows[: int(best.count)]) // 6
        assert set(kept) == set(order[:count])
        drawn = datasets.draw(data, jax.random.key(1), 500, best)
        assert set(np.asarray(drawn.reward)) == set(data.reward[np.isin(np.arange(24) // 6, order[:count])])
    assert agent_of(data).init(jax.random.key(0)).best is None
    assert agent_of(data, best_percent=50).init(jax.random.key(0)).best.count == 12


@pytest.mark.parametrize("head", ["deterministic", "gaussian", "squashed", "choice"])
def test_what_is_exported_acts_the_same(head, tmp_path):
    choice = head == "choice"
    env = by_hand.Choices() if choice else by_hand.Drift()
    agent = agent_of(rows(choice=choice), env, **({} if choice else {"head": head}))
    state, metrics = by_hand.quick(agent.step)(agent.init(jax.random.key(0)))
    assert np.isfinite(metrics["loss"].total)
    observation = jax.random.normal(jax.random.key(3), (50, 3))
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    bounds = () if choice else (np.full(2, -1.0), np.full(2, 1.0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state), *bounds)
    found = portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation))
    np.testing.assert_allclose(found, action, rtol=1e-4, atol=1e-5)
    assert agent.claim is None

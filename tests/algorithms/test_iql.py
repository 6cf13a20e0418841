"""IQL: the sheet's numbers, whose gradient goes where, and one update by hand."""

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_bc import rows

from jaxrl_dist.algorithms.offline import iql
from jaxrl_dist.learning import datasets, draws

SIZES = {"batch_size": 6, "actor_hidden": (6,), "critic_hidden": (5,), "discount": 0.9}


def agent_of(data, **settings):
    env = by_hand.Drift()
    return iql.make_agent(iql.Config(**(SIZES | settings)), env, env.default_params, data)


@pytest.mark.parametrize(("tau", "expected"), [(0.5, 3.2), (0.7, 4.631579), (0.9, 7.384615), (0.99, 9.669903)])
def test_the_value_is_an_expectile(tau, expected):
    values = jnp.array([0.0, 1.0, 2.0, 3.0, 10.0])
    slope = jax.grad(lambda v: iql.value_loss(values - v, tau))
    assert slope(expected) == pytest.approx(0, abs=1e-5)
    assert slope(expected - 0.1) < 0 < slope(expected + 0.1)


def test_weights_are_bounded_after_the_exponential():
    found = iql.weight(jnp.array([-1.0, 0.0, 0.5, 2.0]), 3.0, 100.0)
    np.testing.assert_allclose(found, [0.049787, 1, 4.481689, 100], rtol=1e-5)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        iql.critic_loss(jnp.ones((3, 2)), jnp.ones((3, 1)))
    with pytest.raises(AssertionError):
        iql.actor_loss(jnp.ones(3), jnp.ones(1))
    with pytest.raises(AssertionError):
        iql.value_loss(jnp.ones((3, 1)), 0.7)


def relu_net(net, inputs):
    members = net["kernel_0"].shape[0]
    out = []
    for m in range(members):
        hidden = np.maximum(inputs @ net["kernel_0"][m] + net["bias_0"][m], 0)
        out.append(hidden @ net["kernel_1"][m] + net["bias_1"][m])
    return np.stack(out, axis=1)


def test_the_numbers_of_an_update_are_those_of_loops_in_numpy():
    """Losses, target and advantage of the first update; Adam's first step moves every parameter by its step size."""
    data, scale = rows(), 0.5
    agent = agent_of(data, reward_scale=scale, value_learning_rate=0.02)
    before = agent.init(jax.random.key(3))
    numbers = np.asarray(draws.integers(jax.random.split(jax.random.clone(before.key))[1], (6,), 24))
    after, metrics = by_hand.quick(agent.step)(before)
    critic = by_hand.network(before.learner.critic.parameters, "mlp")
    seen, action = (np.asarray(x, np.float64)[numbers] for x in (data.observation, data.action))
    following = np.asarray(data.next_observation, np.float64)[numbers]
    q = relu_net(critic, np.concatenate([seen, action], 1))[..., 0]
    old, new = (by_hand.network(state.learner.value.parameters, "mlp") for state in (before, after))
    u = q.min(1) - relu_net(old, seen)[:, 0, 0]
    value_loss = (np.where(u > 0, 0.7, 0.3) * u**2).mean()
    moved = [np.abs(new[name] - old[name]) for name in old]
    assert max(x.max() for x in moved) == pytest.approx(0.02, rel=1e-3)
    advantage = q.min(1) - relu_net(new, seen)[:, 0, 0]  # the value after its step
    weights = np.minimum(np.exp(3 * advantage), 100)
    actor = by_hand.network(before.learner.actor.parameters, "actor")
    mean = np.tanh(relu_net(actor, seen)[:, 0])
    log_density = (-0.5 * (action - mean) ** 2 - 0.5 * np.log(2 * np.pi)).sum(1)
    target = scale * data.reward[numbers] + 0.9 * ~data.terminated[numbers] * relu_net(new, following)[:, 0, 0]
    expected = {
        "value_loss": value_loss, "actor_loss": -(weights * log_density).mean(),
        "critic_loss": ((q - target[:, None]) ** 2).mean(0).sum(), "value": q.mean() / scale,
        "target": target.mean() / scale, "advantage": advantage.mean() / scale, "weight": weights.mean(),
    }  # fmt: skip
    for name, number in expected.items():
        assert float(metrics[name].total) == pytest.approx(number, rel=2e-3, abs=1e-5), name
    # Targets follow the critics.
    trees = (tree.learner.target_critic for tree in (before, after))
    pulled = jax.tree.map(lambda o, t, c: o + 0.005 * (c - o) - t, *trees, after.learner.critic.parameters)
    assert max(np.abs(x).max() for x in jax.tree.leaves(pulled)) < 1e-6


def test_what_the_values_learn_does_not_depend_on_the_policy():
    data = rows()
    ends = []
    for beta in (1.0, 9.0):
        agent = agent_of(data, inverse_temperature=beta, actor_learning_rate=beta * 1e-3)
        state, step = agent.init(jax.random.key(0)), by_hand.quick(agent.step)
        for _ in range(3):
            state, _ = step(state)
        ends.append((state.learner.critic, state.learner.value, state.learner.target_critic))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_dataset_is_one_argument_of_the_program():
    """None of it is copied into the state, nor drawn from beyond its rows."""
    data = rows()
    state = jax.eval_shape(agent_of(data).init, jax.random.key(0))
    assert max(x.size for x in jax.tree.leaves(state)) < data.observation.size
    drawn = datasets.draw(data, jax.random.key(0), 300)
    assert set(np.asarray(drawn.reward)) == set(data.reward)

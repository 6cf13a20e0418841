"""N-VR-PG: the recursion by hand, unbiasedness by enumeration, whole iterations against loops in numpy, and what it
finds: the most even visits of a grid, a given law of actions."""

import dataclasses
import itertools

import by_hand
import cases
import clipped_by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from jaxrl_dist.algorithms.policy_gradient import variance_reduced
from jaxrl_dist.algorithms.policy_gradient.variance_reduced import Occupancy, Trajectories
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.distributional.tabular import mdp_from_outcomes
from jaxrl_dist.envs.tabular import Tabular, garnet
from jaxrl_dist.learning import portable
from jaxrl_dist.learning.policies import Choice

TINY = {
    "num_envs": 3, "horizon": 8, "hidden": (6, 5), "discount": 0.9, "step_length": 0.3, "step_exponent": 0.4,
    "memory_exponent": 0.5, "smoothing": 0.01, "barrier_weight": 0.7,
}  # fmt: skip
TABLE = TINY | {"hidden": ()}
KINDS = {
    "choice": (by_hand.Choices(), TINY),
    "continuous": (by_hand.Drift(), TINY),
    "entropy": (garnet(states=4, actions=2, branching=2, end_probability=0.1), TABLE | {"utility": "entropy"}),
    "barrier": (garnet(states=4, actions=2, branching=2, end_probability=0.1), TABLE | {"utility": "barrier"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
SIDE, SIDE_DISCOUNT = 5, 0.9


def agent_of(kind, **settings):
    env, base = KINDS[kind]
    return by_hand.agent_on(variance_reduced, env, **(base | settings))


def many(step, state, iterations):
    """The state after so many iterations, and the metrics of all."""
    return by_hand.quick(lambda state: jax.lax.scan(lambda s, _: step(s), state, length=iterations))(state)


# -- the recursion by hand --------------------------------------------------------------------------------------------


def test_occupancy_and_direction_by_hand():
    """w = 0.8: u = (0.24, 0.12), v = (0, 0.12)."""
    weight, of_new = 0.8, jnp.array([1.2, 0.6])
    occupancy = variance_reduced.go_on(jnp.array([1.0, 0.5]), of_new, weight * of_new, 0.5)
    np.testing.assert_allclose(occupancy, [1.22, 0.61], rtol=1e-6)
    now, before = jnp.array([0.4, 0.2]), jnp.array([0.5, 0.1])
    direction = variance_reduced.go_on(jnp.array([0.3, -0.1]), now, weight * before, 0.5)
    np.testing.assert_allclose(direction, [0.35, 0.11], rtol=1e-6)
    np.testing.assert_allclose(direction / optax.tree.norm(direction), [0.95399, 0.29983], atol=1e-5)


def test_the_share_of_new_trajectories_by_hand():
    shares = variance_reduced.share_of_new(jnp.array([0.0, 1, 2, 8]), 2 / 3)
    np.testing.assert_allclose(shares, [1, 1, 0.763143, 0.366881], rtol=1e-5)
    np.testing.assert_array_equal(variance_reduced.share_of_new(jnp.arange(9.0), 0.0), jnp.ones(9))


def trajectories(observation, action, reward, alive) -> Trajectories:
    return Trajectories(jnp.asarray(observation), jnp.asarray(action), jnp.asarray(reward), jnp.asarray(alive))


def test_visits_and_rewards_to_go_by_hand():
    """Two trajectories of a process with two states, the second of which ends after two steps."""
    state, alive = np.array([[0, 1], [1, 1], [0, 0]]), np.array([[True, True], [True, True], [True, False]])
    action, reward = np.array([[1, 0], [0, 0], [1, 1]]), np.array([[1.0, 2.0], [-2.0, 4.0], [3.0, 9.0]])
    lived = trajectories(np.eye(2, dtype=np.float32)[state], action, reward, alive)
    found = variance_reduced.visits(lived, 0.5, 2)
    np.testing.assert_allclose(found.reward, [1 - 1 + 0.75, 2 + 2])
    np.testing.assert_allclose(found.table, [[[0, 1.25], [0.5, 0]], [[0, 0], [1.5, 0]]])
    assert variance_reduced.visits(lived, 0.5, 0).table is None

    # The discount of a step is that of its time, not of how far ahead it lies.
    of_reward = variance_reduced.to_go(Occupancy(jnp.float32(1), None), lived, 0.5)
    np.testing.assert_allclose(of_reward, [[0.75, 4], [-0.25, 2], [0.75, 0]])
    of_table = variance_reduced.to_go(Occupancy(jnp.float32(0), jnp.array([[1.0, 2], [4, 8]])), lived, 0.5)
    np.testing.assert_allclose(of_table, [[4.5, 6], [2.5, 2], [0.5, 0]])
    both = variance_reduced.to_go(Occupancy(jnp.float32(2), jnp.array([[1.0, 2], [4, 8]])), lived, 0.5)
    np.testing.assert_allclose(both, 2 * of_reward + of_table)


def test_the_mass_of_an_occupancy():
    lived = trajectories(jnp.ones((5, 1, 1)), jnp.zeros((5, 1), int), jnp.zeros((5, 1)), jnp.ones((5, 1), bool))
    assert variance_reduced.visits(lived, 0.9, 1).table.sum() == pytest.approx(4.0951, abs=1e-5)


def test_weights_are_of_whole_trajectories_and_of_the_policy_before():
    now, before = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.5]])), jnp.log(jnp.array([[0.4, 0.5], [0.5, 0.1]]))
    alive = jnp.array([[True, True], [True, False]])
    np.testing.assert_allclose(variance_reduced.importance_weight(now, before, alive), [1.6, 1], rtol=1e-6)


def test_utilities_by_hand():
    config = dataclasses.replace(variance_reduced.Config(), smoothing=0.05, barrier_weight=2.0)
    occupancy = Occupancy(jnp.float32(3), jnp.array([[1.0, 2], [0, 1]]))  # three quarters, one quarter
    np.testing.assert_allclose(variance_reduced.shares(occupancy.table), [0.75, 0.25])
    entropy = -0.75 * np.log(0.8) - 0.25 * np.log(0.3)
    assert variance_reduced.entropy(occupancy, config) == pytest.approx(entropy, rel=1e-6)
    assert variance_reduced.barrier(occupancy, config) == pytest.approx(3 + np.log(0.8) + np.log(0.3), rel=1e-6)
    # Slopes: (r(s) - mean of r by the shares) / mass, r = -log(d + e) - d / (d + e).
    plain = np.array([-np.log(0.8) - 0.75 / 0.8, -np.log(0.3) - 0.25 / 0.3])
    slope = jax.grad(variance_reduced.entropy)(occupancy, config)
    centred = (plain - [0.75, 0.25] @ plain) / 4
    np.testing.assert_allclose(slope.table, np.repeat(centred[:, None], 2, 1), rtol=1e-5)
    assert slope.reward == 0
    slope = jax.grad(variance_reduced.barrier)(occupancy, config)
    plain = np.array([1 / 0.8, 1 / 0.3])  # weight 2, two states
    centred = (plain - [0.75, 0.25] @ plain) / 4
    np.testing.assert_allclose(slope.table, np.repeat(centred[:, None], 2, 1), rtol=1e-5)
    assert slope.reward == 1
    # An occupancy of nothing has finite slopes.
    nothing = jax.grad(variance_reduced.entropy)(Occupancy(jnp.float32(0), jnp.zeros((2, 2))), config)
    assert np.isfinite(nothing.table).all()


def test_shapes_that_would_broadcast_are_refused():
    lived = trajectories(jnp.ones((4, 1, 2)), jnp.zeros((4, 1), int), jnp.zeros((4, 1)), jnp.ones(4, bool))
    with pytest.raises(AssertionError):
        variance_reduced.discounts(lived, 0.9)
    with pytest.raises(AssertionError):
        variance_reduced.importance_weight(jnp.ones((4, 2)), jnp.ones((4, 1)), jnp.ones((4, 2), bool))
    with pytest.raises(AssertionError):
        variance_reduced.shares(jnp.ones(4))


# -- by enumeration ---------------------------------------------------------------------------------------------------

GAMMA, STEPS, STATES, ACTIONS = 0.8, 2, 2, 2
CHANCES = np.array([[[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], [[0.5, 0.5, 0.0], [0.3, 0.3, 0.4]]])  # the last: the end
FIRST = np.array([0.6, 0.4])
PAYS = np.array([[1.0, -0.5], [0.3, 2.0]])


def every_trajectory():
    """All trajectories of two steps `[steps, n]`, and their chances but for those of the actions `[n]`."""
    found, chances = [], []
    for start, first, following, second in itertools.product(range(STATES), range(ACTIONS), range(3), range(ACTIONS)):
        if following == 2 and second:
            continue  # it has ended: there is no second action
        alive = following < 2
        found.append([(start, first, True), (following * alive, second, alive)])
        chances.append(FIRST[start] * CHANCES[start, first, following])
    state, action, alive = np.moveaxis(np.array(found, int), 0, -1).swapaxes(0, 1)
    observation, alive = np.eye(STATES)[state], alive.astype(bool)
    return trajectories(observation, action, PAYS[state, action], alive), jnp.asarray(chances)


def exact_occupancy(logits) -> jax.Array:
    """Of two steps, `[states, actions]`."""
    policy = jax.nn.softmax(logits)
    first = FIRST[:, None] * policy
    second = jnp.einsum("sa,sat->t", first, CHANCES[..., :STATES])[:, None] * policy
    return first + GAMMA * second


NOW, BEFORE = np.array([[0.3, -0.2], [0.1, 0.4]]), np.array([[-0.4, 0.6], [0.5, -0.1]])


class Enumeration:
    """All trajectories and their chances under logits, by the functions of the algorithm, in 64 bits."""

    def __init__(self):
        self.lived, self.outside = every_trajectory()

    def log_densities(self, logits):
        return Choice(self.lived.observation @ jnp.asarray(logits)).log_density(self.lived.action)

    def chances(self, logits):
        return self.outside * jnp.exp((self.lived.alive * self.log_densities(logits)).sum(0))

    def gradients(self, logits, slope):
        """g of every trajectory, `[n, states, actions]`."""
        gain = self.lived.alive * variance_reduced.to_go(slope, self.lived, GAMMA)
        return jax.jacrev(lambda x: (gain * self.log_densities(x)).sum(0))(jnp.asarray(logits))

    def weights(self, now, before):
        return variance_reduced.importance_weight(self.log_densities(now), self.log_densities(before), self.lived.alive)


@pytest.fixture
def enumeration():
    with jax.enable_x64(True):
        yield Enumeration()


def test_weighted_estimates_are_without_bias(enumeration):
    """Drawn by one policy and weighted, occupancies and gradients are those of another; weights have mean 1."""
    drawn, wanted = enumeration.chances(NOW), enumeration.chances(BEFORE)
    weight = enumeration.weights(NOW, BEFORE)
    assert drawn.sum() == pytest.approx(1, abs=1e-12)
    assert drawn @ weight == pytest.approx(1, abs=1e-12)
    assert np.abs(weight - 1).max() > 0.3
    slope = Occupancy(jnp.float64(0.5), jnp.array([[1.0, -2.0], [0.5, 3.0]]))
    gradients = enumeration.gradients(BEFORE, slope)
    found, expected = (jnp.tensordot(by, gradients, 1) for by in (drawn * weight, wanted))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert np.abs(jnp.tensordot(drawn, gradients, 1) - expected).max() > 0.01  # without weights: another's
    table = variance_reduced.visits(enumeration.lived, GAMMA, ACTIONS).table
    found = jnp.tensordot(drawn * weight, table, 1)
    np.testing.assert_allclose(found, exact_occupancy(BEFORE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["reward", "entropy", "barrier"])
def test_the_gradient_is_that_of_the_utility_of_the_exact_occupancy(enumeration, name):
    """E[g(tau, theta, grad F(lambda(theta)))] = grad of F(lambda(theta)), also where F is not linear."""
    config = dataclasses.replace(variance_reduced.Config(), smoothing=0.01, barrier_weight=0.7)

    def utility(logits):
        table = exact_occupancy(logits)
        return variance_reduced.UTILITIES[name](Occupancy((table * PAYS).sum(), table), config)

    table = exact_occupancy(NOW)
    slope = jax.grad(variance_reduced.UTILITIES[name])(Occupancy((table * PAYS).sum(), table), config)
    found = jnp.tensordot(enumeration.chances(NOW), enumeration.gradients(NOW, slope), 1)
    expected = jax.grad(utility)(jnp.asarray(NOW))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_estimates_go_on_without_bias(enumeration):
    """An estimate that is right for theta_{t-1} is right for theta_t afterwards, whatever the share of the new."""
    slope = Occupancy(jnp.float64(1), jnp.array([[1.0, -2.0], [0.5, 3.0]]))
    now, before = enumeration.gradients(NOW, slope), enumeration.gradients(BEFORE, slope)
    drawn, weight = enumeration.chances(NOW), enumeration.weights(NOW, BEFORE)
    right = jnp.tensordot(enumeration.chances(BEFORE), before, 1)
    gone_on = jax.vmap(lambda n, b, w: variance_reduced.go_on(right, n, w * b, 0.3))(now, before, weight)
    np.testing.assert_allclose(jnp.tensordot(drawn, gone_on, 1), jnp.tensordot(drawn, now, 1), rtol=0, atol=1e-12)


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


def flat(parameters):
    """All parameters by one name each, in float64."""
    layers = parameters["params"]
    found = {name: np.asarray(layers[name], np.float64) for name in ("table", "log_std") if name in layers}
    if "actor" in layers:
        found |= {f"actor/{name}": x for name, x in by_hand.network(parameters, "actor").items()}
    return found


def slow_gradient(parameters, observation, action, alive, gain):
    """Of the sum over living steps of gain x log density of one trajectory, by hand; and the log density of all."""
    net = clipped_by_hand.part(parameters, "actor")
    gradient = {name: np.zeros_like(x) for name, x in parameters.items()}
    total = 0.0
    for step in range(int(alive.sum())):
        seen = observation[step][None].astype(np.float64)
        activations = clipped_by_hand.tanh_forward(net, seen) if net else [seen, seen @ parameters["table"]]
        head = activations[-1][0]
        if "log_std" in parameters:
            std = np.exp(parameters["log_std"])
            noise = (action[step] - head) / std
            total += (-0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum()
            slope = noise / std
            gradient["log_std"] += gain[step] * (noise**2 - 1)
        else:
            masses = by_hand.softmax(head[None])[0]
            total += np.log(masses[action[step]])
            slope = np.eye(len(head))[action[step]] - masses
        slope = gain[step] * slope[None]
        if net:
            for name, x in clipped_by_hand.tanh_backward(net, activations, slope).items():
                gradient[f"actor/{name}"] += x
        else:
            gradient["table"] += seen.T @ slope
    return gradient, total


def slow_slope(utility, reward, table, config):
    """r = grad F as (slope in the reward, table), by hand, and F."""
    if utility == "reward":
        return (1.0, None), reward
    table = np.maximum(table, 0)
    mass, share = table.sum(), table.sum(1) / table.sum()
    near = share + config.smoothing
    if utility == "entropy":
        plain, value, of_reward = -np.log(near) - share / near, -(share * np.log(near)).sum(), 0.0
    else:
        weight = config.barrier_weight
        plain, value, of_reward = weight / len(share) / near, reward + weight * np.log(near).mean(), 1.0
    slope = (plain - share @ plain) / mass
    return (of_reward, np.repeat(slope[:, None], table.shape[1], 1)), value


def slow_gain(slope, state, action, reward, alive, config):
    """Rewards to go of one trajectory with absolute discounts."""
    gain, later = np.zeros(len(reward)), 0.0
    for step in reversed(range(int(alive.sum()))):
        pay = slope[0] * reward[step]
        if slope[1] is not None:
            pay += slope[1][state[step], action[step]]
        later += config.discount**step * pay
        gain[step] = later
    return gain


def mixed(estimate, now, before, eta):
    return {name: eta * now[name] + (1 - eta) * (estimate[name] + now[name] - before[name]) for name in now}


@every_kind
def test_iterations_equal_loops_in_numpy(kind, monkeypatch):
    """What was lived is taken from the program, the rest is by hand."""
    agent, config = agent_of(kind)
    env = KINDS[kind][0]
    seen, plain = [], variance_reduced.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(variance_reduced.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    parameters = flat(state.learner.parameters)
    previous, direction = parameters, {name: np.zeros_like(x) for name, x in parameters.items()}
    tabular = config.utility != "reward"
    occupancy = {"reward": 0.0} | ({"table": np.zeros((env.num_states, env.num_actions))} if tabular else {})
    slopes, ends, extremes = [], [], []
    for iteration in range(6):
        state, metrics = step(state)
        jax.effects_barrier()
        lived, (action, _) = seen[-1]
        done = lived.terminated | lived.truncated
        ends.append((lived.terminated.any(), done.sum() > done.any(0).sum()))
        eta = min(1.0, (2 / (iteration + 1)) ** 0.5)
        alive = np.array([[not done[:h, n].any() for n in range(3)] for h in range(8)])

        # Weights, then the occupancy of old and new policy.
        weights = []
        now = {name: np.zeros_like(x) for name, x in occupancy.items()}
        before = {name: np.zeros_like(x) for name, x in occupancy.items()}
        states = lived.observation.argmax(-1)
        for n in range(3):
            of_one = lived.observation[:, n], action[:, n], alive[:, n], np.zeros(8)
            weight = np.exp(slow_gradient(previous, *of_one)[1] - slow_gradient(parameters, *of_one)[1])
            weights.append(weight)
            for h in range(int(alive[:, n].sum())):
                for into, by in ((now, 1.0), (before, weight)):
                    into["reward"] += by * 0.9**h * lived.reward[h, n] / 3
                    if tabular:
                        into["table"][states[h, n], action[h, n]] += by * 0.9**h / 3
        occupancy = mixed(occupancy, now, before, eta)
        slope, value = slow_slope(config.utility, occupancy["reward"], occupancy.get("table"), config)
        last, earlier = slopes[-2:][::-1] if len(slopes) > 1 else (slopes[-1:] or [slope]) * 2
        slopes.append(slope)

        # Gradients, with the slopes from before.
        gradient = {name: np.zeros_like(x) for name, x in parameters.items()}
        gradient_before = {name: np.zeros_like(x) for name, x in parameters.items()}
        for n in range(3):
            path = states[:, n], action[:, n], lived.reward[:, n], alive[:, n], config
            of_one = lived.observation[:, n], action[:, n], alive[:, n]
            one, _ = slow_gradient(parameters, *of_one, slow_gain(last, *path))
            other, _ = slow_gradient(previous, *of_one, slow_gain(earlier, *path))
            for name in gradient:
                gradient[name] += one[name] / 3
                gradient_before[name] += weights[n] * other[name] / 3
        direction = mixed(direction, gradient, gradient_before, eta)
        norm = np.sqrt(sum((x**2).sum() for x in direction.values()))
        length = 0.3 / (iteration + 1) ** 0.4
        previous, parameters = parameters, {name: x + length * direction[name] / norm for name, x in parameters.items()}
        extremes.append(max(weights))

        for name, x in flat(state.learner.parameters).items():
            np.testing.assert_allclose(x, parameters[name], rtol=1e-3, atol=2e-5, err_msg=name)
        memory = state.learner.optimizer
        for name, x in flat(memory.previous).items():
            np.testing.assert_allclose(x, previous[name], rtol=1e-3, atol=2e-5, err_msg=name)
        for name, x in flat(memory.direction).items():
            np.testing.assert_allclose(x, direction[name], rtol=1e-3, atol=1e-4, err_msg=name)
        for name, x in occupancy.items():
            np.testing.assert_allclose(getattr(memory.occupancy, name), x, rtol=1e-3, atol=1e-5)
        found = {
            "utility": value, "direction_norm": norm, "share_of_new": eta, "smallest_weight": min(weights),
            "largest_weight": max(weights), "gradient_norm": np.sqrt(sum((x**2).sum() for x in gradient.values())),
        }  # fmt: skip
        ended = [n for n in range(3) if done[:, n].any()]
        if ended:
            found["episode_return"] = np.mean([(alive * lived.reward)[:, n].sum() for n in ended])
            found["episode_length"] = np.mean([alive[:, n].sum() for n in ended])
        for name, expected in found.items():
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4, err_msg=name)
        assert metrics["episode_length"].count == len(ended)
    assert np.any(ends, axis=0).all()  # episodes ended, and others were begun that must not count
    assert max(extremes) > 1.02


# -- what holds of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["choice", "entropy"])
def test_steps_have_their_length_whatever_the_size_of_the_utility(kind, monkeypatch):
    name = KINDS[kind][1].get("utility", "reward")
    plain, found = variance_reduced.UTILITIES[name], {}
    for size in (1.0, 100.0):
        monkeypatch.setitem(variance_reduced.UTILITIES, name, lambda *x, size=size: size * plain(*x))
        agent, _ = agent_of(kind)
        state, step, found[size] = by_hand.quick(agent.init)(jax.random.key(0)), by_hand.quick(agent.step), []
        for iteration in range(4):
            before, (state, metrics) = state.learner.parameters, step(state)
            moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.learner.parameters, before))
            assert moved == pytest.approx(0.3 / (iteration + 1) ** 0.4, rel=1e-4)
            found[size].append((state.learner.parameters, float(metrics["direction_norm"].total)))
    for (one, norm), (other, larger) in zip(found[1.0], found[100.0], strict=True):
        assert larger == pytest.approx(100 * norm, rel=1e-3)
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@every_kind
def test_without_a_memory_what_was_is_forgotten(kind):
    """A share of new trajectories of 1 is REINFORCE with steps of a given length."""
    agent, _ = agent_of(kind, memory_exponent=0.0)
    state = many(agent.step, agent.init(jax.random.key(0)), 3)[0]
    memory = state.learner.optimizer
    other = memory._replace(
        previous=jax.tree.map(lambda x: 1.5 * x, memory.previous),
        direction=jax.tree.map(lambda x: x - 3, memory.direction),
        occupancy=jax.tree.map(lambda x: x + 1, memory.occupancy),
        earlier_slope=jax.tree.map(lambda x: 2 * x, memory.slope),
    )
    step = by_hand.quick(agent.step)
    one, _ = step(by_hand.with_fresh_keys(state))
    two, metrics = step(by_hand.with_fresh_keys(state)._replace(learner=state.learner._replace(optimizer=other)))
    assert metrics["largest_weight"].total != 1
    for a, b in zip(*map(jax.tree.leaves, (one.learner.parameters, two.learner.parameters)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_where_nothing_moves_weights_are_1_and_occupancies_those_of_the_policy():
    """Trajectories begin at resets: the mean over 400 iterations is the exact occupancy, within 4 standard errors."""
    env, discount = garnet(states=4, actions=2, branching=2), 0.9
    env = Tabular(env.default_params.mdp, [0.0, 1.0, 0.0, 0.0], env.places, "from one state")
    agent, config = by_hand.agent_on(
        variance_reduced, env, **(TABLE | {"utility": "entropy", "step_length": 0.0, "memory_exponent": 0.0})
    )

    def one(state, _):
        state, metrics = agent.step(state)
        return state, (state.learner.optimizer.occupancy.table, metrics["smallest_weight"], metrics["largest_weight"])

    _, (tables, *extremes) = by_hand.quick(lambda s: jax.lax.scan(one, s, length=400))(agent.init(jax.random.key(0)))
    for extreme in extremes:
        np.testing.assert_array_equal(extreme.total, 1)
    mdp, exact = jax.tree.map(np.asarray, env.default_params.mdp), np.zeros((4, 2))
    now = np.array([0.0, 1.0, 0.0, 0.0])
    for h in range(config.horizon):
        exact += discount**h * now[:, None] / 2  # an even policy
        following = np.zeros(4)
        for s, a, k in itertools.product(range(4), range(2), range(mdp.probability.shape[2])):
            following[mdp.next_state[s, a, k]] += now[s] * mdp.probability[s, a, k] / 2
        now = following
    error = np.asarray(tables).std(0) / np.sqrt(400)
    assert (np.abs(np.asarray(tables).mean(0) - exact) < 4 * error + 1e-4).all()
    assert np.asarray(tables).sum((1, 2)) == pytest.approx((1 - 0.9**8) / 0.1, rel=1e-5)


def test_without_rewards_it_stands_still():
    env = Tabular(mdp_from_outcomes([[[(1.0, 0, 0.0, False)]] * 2]), [1.0], [[0, 0]], "nothing")
    agent, _ = by_hand.agent_on(variance_reduced, env, **TABLE)
    state = agent.init(jax.random.key(0))
    after, metrics = many(agent.step, state, 3)
    np.testing.assert_array_equal(after.learner.parameters["params"]["table"], jnp.zeros((1, 2)))
    assert all(np.isfinite(x.total).all() for x in metrics.values())


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_a_bandit_comes_to_a_given_law_of_actions(monkeypatch):
    """F = -sum over actions of (share - p)^2, a utility of one's own."""
    wanted = jnp.array([0.2, 0.5, 0.3])
    monkeypatch.setitem(
        variance_reduced.UTILITIES, "distance",
        lambda occupancy, config: -((occupancy.table[0] / occupancy.table.sum() - wanted) ** 2).sum(),
    )  # fmt: skip
    env = Tabular(mdp_from_outcomes([[[(1.0, 0, 0.0, False)]] * 3]), [1.0], [[0, 0]], "bandit")
    agent, _ = by_hand.agent_on(variance_reduced, env, utility="distance", hidden=(), horizon=10, step_length=0.3)
    state = many(agent.step, agent.init(jax.random.key(0)), 500)[0]
    found = jax.nn.softmax(state.learner.parameters["params"]["table"][0])
    np.testing.assert_allclose(found, wanted, atol=0.02)


def grid() -> Tabular:
    """5 x 5 cells without walls or an end, from a corner."""
    moves = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    cells = [*itertools.product(range(SIDE), repeat=2)]

    def to(cell, move):
        row, column = (min(max(x + y, 0), SIDE - 1) for x, y in zip(cell, move, strict=True))
        return SIDE * row + column

    table = [[[(1.0, to(cell, move), 0.0, False)] for move in moves] for cell in cells]
    return Tabular(mdp_from_outcomes(table), np.eye(SIDE**2)[0], cells, "grid")


def discounted_shares(env, policy) -> np.ndarray:
    """The share of each state in the discounted visits of a policy `[states, actions]`, by the linear system."""
    following = np.asarray(env.default_params.mdp.next_state)[..., 0]
    chain = np.zeros((SIDE**2, SIDE**2))
    for s, a in itertools.product(range(SIDE**2), range(4)):
        chain[s, following[s, a]] += policy[s, a]
    return (1 - SIDE_DISCOUNT) * np.linalg.solve(np.eye(SIDE**2) - SIDE_DISCOUNT * chain.T, np.eye(SIDE**2)[0])


def entropy_of(shares) -> float:
    return float(-(shares * np.log(np.maximum(shares, 1e-12))).sum())


def most_even(env, iterations=300) -> tuple[float, float]:
    """Bounds from below and above of the largest entropy of discounted visits, by Frank and Wolfe's algorithm: its
    linear problem is a process with rewards -log share, which value iteration solves; the gap bounds the optimum."""
    following = np.asarray(env.default_params.mdp.next_state)[..., 0]
    shares, upper = discounted_shares(env, np.full((SIDE**2, 4), 0.25)), np.inf
    for _ in range(iterations):
        reward, value = -np.log(np.maximum(shares, 1e-12)) - 1, np.zeros(SIDE**2)
        for _ in range(200):
            value = reward + SIDE_DISCOUNT * value[following].max(1)
        towards = discounted_shares(env, np.eye(4)[value[following].argmax(1)])
        upper = min(upper, entropy_of(shares) + (towards - shares) @ reward)
        mixes = [shares + x * (towards - shares) for x in np.linspace(0, 0.5, 201)]
        shares = max(mixes, key=entropy_of)
    return entropy_of(shares), upper


def test_visits_of_a_grid_become_even():
    """At least 95 % of the largest entropy, of the exact occupancy; the policy that it begins with has 82 %."""
    env = grid()
    lower, upper = most_even(env)
    assert 3.17 < lower < upper < 3.20
    settings = {"utility": "entropy", "hidden": (), "horizon": 50, "discount": SIDE_DISCOUNT, "step_length": 0.5}
    shares_reached = {}
    for exponent in (2 / 3, 0.0):
        agent, _ = by_hand.agent_on(variance_reduced, env, **settings, memory_exponent=exponent)
        train = jax.jit(jax.vmap(lambda key, agent=agent: many_plain(agent, key, 600)))
        tables = jax.device_get(train(jax.random.split(jax.random.key(0), 3)))
        shares_reached[exponent] = [
            entropy_of(discounted_shares(env, by_hand.softmax(table.astype(np.float64)))) / upper for table in tables
        ]
    assert entropy_of(discounted_shares(env, np.full((25, 4), 0.25))) / upper < 0.84
    assert min(shares_reached[2 / 3]) > 0.97, shares_reached
    assert max(shares_reached[0.0]) < min(shares_reached[2 / 3])  # plain normalised steps are behind


def many_plain(agent, key, iterations):
    state = jax.lax.scan(lambda s, _: (agent.step(s)[0], ()), agent.init(key), length=iterations)[0]
    return state.learner.parameters["params"]["table"]


def test_a_barrier_keeps_states_from_being_left_out():
    """Two states; staying in the second pays. The reward alone goes there for good, the barrier keeps the first."""
    outcomes = [[(1.0, 0, 0.0, False)], [(1.0, 1, 0.0, False)]], [[(1.0, 0, 0.0, False)], [(1.0, 1, 1.0, False)]]
    env = Tabular(mdp_from_outcomes(outcomes), [1.0, 0.0], [[0, 0], [0, 1]], "two")
    share = {}
    for utility in ("reward", "barrier"):
        agent, _ = by_hand.agent_on(
            variance_reduced, env, utility=utility, barrier_weight=20.0, hidden=(), horizon=30, discount=0.9,
            step_length=0.5,
        )  # fmt: skip
        state, _ = many(agent.step, agent.init(jax.random.key(0)), 400)
        policy = jax.nn.softmax(state.learner.parameters["params"]["table"])
        chain = np.linalg.solve(np.eye(2) - 0.9 * np.asarray(policy).T, [0.1, 0.0])
        share[utility] = chain[0]
    # The largest 10 (1 - x) + 10 (log x + log(1 - x)) is at x = (3 - sqrt 5) / 2 = 0.38.
    assert share["reward"] < 0.2
    assert share["barrier"] == pytest.approx(0.38, abs=0.05)


def test_continuous_actions_are_learned():
    """The best action is 0.5, or 0.5 times what is seen."""
    only_cases = ("action", "action_observation")
    built = programs.build("variance_reduced", cases.CONTINUOUS, only_cases)
    looks = jax.device_get(built.advance(built.begin(), 1500)[2])
    one, other = looks["action"][..., 0][:2]
    assert one[1] == pytest.approx(0.5, abs=0.1)
    np.testing.assert_allclose(other[[0, 2]], [-0.5, 0.5], atol=0.1)


# -- how it acts, and settings ----------------------------------------------------------------------------------------


@every_kind
def test_it_is_evaluated_by_the_mode_and_exported_as_such(kind, tmp_path):
    agent, _ = agent_of(kind)
    state = many(agent.step, agent.init(jax.random.key(0)), 3)[0]
    size = KINDS[kind][0].observation_space(KINDS[kind][0].default_params).shape[0]
    observation = jax.random.normal(jax.random.key(5), (200, size))
    action, same = (agent.policy.act(state, observation, (), jax.random.key(seed))[0] for seed in (0, 1))
    np.testing.assert_array_equal(action, same)
    bounds = (np.full(2, -1.0), np.full(2, 1.0)) if kind == "continuous" else ()
    portable.save_policy(tmp_path / "p.npz", agent.export(state), *bounds)
    np.testing.assert_allclose(portable.load_policy(tmp_path / "p.npz")(np.asarray(observation)), action, atol=1e-5)


def test_an_even_policy_at_the_start():
    for hidden in ((), (6, 5)):
        network = variance_reduced.Network(hidden, 3, continuous=False)
        parameters = network.init(jax.random.key(0), jnp.zeros((1, 4)))
        entropy = network.apply(parameters, jnp.eye(4)).entropy()
        np.testing.assert_allclose(entropy, np.log(3), atol=1e-3)


def test_images_pass_a_convolution():
    agent, _ = by_hand.agent_on(variance_reduced, by_hand.Pictures(), **TINY)
    state, metrics = many(agent.step, agent.init(jax.random.key(0)), 2)
    assert "convolution" in state.learner.parameters["params"]["torso"]
    assert np.isfinite(metrics["direction_norm"].total).all()


def test_defaults_are_the_papers():
    config = variance_reduced.Config()
    assert config.step_exponent == config.memory_exponent == pytest.approx(2 / 3)
    assert (config.utility, config.num_envs) == ("reward", 10)


@pytest.mark.parametrize("utility", ["entropy", "barrier"])
def test_utilities_of_visits_want_states_that_are_shown(utility):
    message, env = "--env-id is CartPole-v1, whose states are not shown one-hot; ", gymnax.make("CartPole-v1")[0]
    with pytest.raises(ValueError, match=f"{message}this algorithm needs .* --utility {utility}"):
        by_hand.agent_on(variance_reduced, env, utility=utility)
    with pytest.raises(ValueError, match="whose states are not shown one-hot"):
        by_hand.agent_on(variance_reduced, by_hand.Drift(), utility=utility)


def test_other_utilities_are_refused():
    with pytest.raises(ValueError, match="--utility is 'fame'; it must be reward, entropy or barrier"):
        check_configuration(dataclasses.replace(variance_reduced.Config(), utility="fame"))

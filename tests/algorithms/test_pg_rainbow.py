"""PG-Rainbow: the numbers of its sheet, PPO where nothing is told, whole iterations in numpy, whose law it claims."""

import dataclasses
import functools

import by_hand
import clipped_by_hand
import implicit_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import proofs
import pytest
from implicit_by_hand import EMBEDDING, HEAD, TORSO

from jaxrl_dist import envs
from jaxrl_dist.agent import memoryless
from jaxrl_dist.algorithms.policy_gradient import pg_rainbow, ppo
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional import quantile
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import clipped, draws, portable, returns
from jaxrl_dist.running import evaluation, problem

TINY = {
    "num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "learning_rate": 0.02,
    "num_quantiles": 4, "num_fractions": 3, "num_target_fractions": 5, "quantile_updates": 3, "batch_size": 7,
    "replay_capacity": 48, "target_period": 2, "quantile_learning_rate": 0.01, "kappa": 0.5, "quantile_hidden": (8, 7),
}  # fmt: skip
OF_PPO = {name: TINY[name] for name in ("num_envs", "num_steps", "hidden", "learning_rate")}
either_target = pytest.mark.parametrize("iqn_target", ["policy", "greedy"])
OBSERVATION = jax.random.normal(jax.random.key(5), (50, 3))


def agent_of(env=None, **settings):
    return by_hand.agent_on(pg_rainbow, env or by_hand.Choices(), **(TINY | settings))


def begun(agent, seed=3):
    return by_hand.quick(agent.init)(jax.random.key(seed))


def same(one, other) -> bool:
    return all((x == y).all() for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True))


# -- targets and losses -----------------------------------------------------------------------------------------------


def test_quantiles_are_averaged_over_the_policy():
    probabilities, quantiles = jnp.array([[0.25, 0.75]]), jnp.array([[[0.0, 2.0], [4.0, 8.0]]])
    told = pg_rainbow.averaged(probabilities, quantiles)
    np.testing.assert_allclose(told, [[3, 6.5]])
    assert told.mean() == pytest.approx(float((probabilities * quantiles.mean(-1)).sum()))  # sum of pi Q
    of_uniform = jnp.tile(2 * quantile.midpoints(5), (1, 3, 1))  # uniform returns on [0, 2], whatever the action
    np.testing.assert_allclose(pg_rainbow.averaged(jnp.full((1, 3), 1 / 3), of_uniform)[0], [0.2, 0.6, 1, 1.4, 1.8])


def test_targets_are_mixtures_over_the_next_action():
    following = jnp.array([[[0.0, 2.0], [4.0, 8.0]]] * 2)
    target = pg_rainbow.target_law(jnp.ones(2), jnp.array([0.5, 0.0]), jnp.array([[0.25, 0.75]] * 2), following)
    np.testing.assert_allclose(target.atoms, [[1, 2, 3, 5], [1, 1, 1, 1]])  # a termination has no successor
    np.testing.assert_allclose(target.masses, [[0.125, 0.125, 0.375, 0.375]] * 2)
    assert laws.mean(target)[0] == pytest.approx(1 + 0.5 * (0.25 * 1 + 0.75 * 6))


@pytest.mark.parametrize(("kappa", "loss"), [(0.0, 1.375), (1.0, 0.8541667), (2.0, 0.5625)])
def test_loss_at_the_midpoints_is_that_of_qr_dqn(kappa, loss):
    quantiles, fractions = jnp.array([[0.0, 1, 2, 4]] * 3), jnp.broadcast_to(quantile.midpoints(4), (3, 4))
    # All the mass on the second action's atoms, as a greedy policy's, and on the only one's.
    following = jnp.array([[[7.0, 7, 7], [0.5, 1.5, 3]]] * 3)
    target = pg_rainbow.target_law(jnp.zeros(3), jnp.ones(3), jnp.array([[0.0, 1.0]] * 3), following)
    assert pg_rainbow.quantile_loss(quantiles, fractions, target, kappa) == pytest.approx(loss, rel=1e-6)
    alone = laws.equally_weighted(following[:, 1])
    assert pg_rainbow.quantile_loss(quantiles, fractions, alone, kappa) == pytest.approx(loss, rel=1e-6)


def test_each_quantile_is_weighed_by_its_own_fraction():
    fractions = jnp.array([[0.1, 0.9]])
    for atom, slopes in ((5.0, [-0.1, -0.9]), (-5.0, [0.9, 0.1])):
        target = laws.equally_weighted(jnp.full((1, 3), atom))
        found = jax.grad(pg_rainbow.quantile_loss)(jnp.zeros((1, 2)), fractions, target, 0.0)
        np.testing.assert_allclose(found[0], slopes, rtol=1e-6)


def test_no_gradient_flows_through_the_target():
    def loss(quantiles, fractions, following, probabilities):
        target = pg_rainbow.target_law(jnp.ones(1), jnp.full(1, 0.9), probabilities, following)
        return pg_rainbow.quantile_loss(quantiles, fractions, target, 1.0)

    arguments = jnp.array([[0.0, 3]]), jnp.array([[0.3, 0.4]]), jnp.array([[[-1.0], [2.0]]]), jnp.array([[0.4, 0.6]])
    of_quantiles, *rest = jax.grad(loss, argnums=(0, 1, 2, 3))(*arguments)
    assert jnp.abs(of_quantiles).min() > 0
    assert not any(x.any() for x in rest)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(AssertionError):
        pg_rainbow.averaged(jnp.ones((2, 3)), jnp.ones((2, 1, 4)))
    with pytest.raises(AssertionError):
        pg_rainbow.target_law(jnp.ones(2), jnp.ones((2, 1)), jnp.ones((2, 3)), jnp.ones((2, 3, 4)))
    with pytest.raises(AssertionError):
        pg_rainbow.quantile_loss(jnp.ones((2, 3)), jnp.ones(3), Law(jnp.ones((2, 4)), jnp.ones((2, 4))), 1.0)


# -- the value --------------------------------------------------------------------------------------------------------


@functools.cache
def network_and_parameters(hidden=(6, 5)):
    network = pg_rainbow.Network(hidden, 3, continuous=False)
    return network, by_hand.quick(network.init)(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 4)))


def distilled(parameters, kernel=0.0, bias=0.0):
    """The parameters with another distillation network."""
    layers = parameters["params"]["distillation"]["layers"]
    layers = {
        "kernel_0": jnp.full_like(layers["kernel_0"], kernel),
        "bias_0": jnp.broadcast_to(jnp.asarray(bias, jnp.float32), layers["bias_0"].shape),
    }
    return {"params": parameters["params"] | {"distillation": {"layers": layers}}}


def of_ppo(parameters):
    """What PPO's network would have: the critic's layers in one piece."""
    parts = parameters["params"]
    first, last = parts["features"]["layers"], parts["critic"]["layers"]
    critic = first | {f"{name}_{i + 1}": last[f"{name}_{i}"] for name in ("kernel", "bias") for i in (0, 1)}
    return {"params": {"actor": parts["actor"], "critic": {"layers": critic}}}


def test_what_is_told_is_multiplied_into_the_features():
    """e_v = [1, 2, 3] and e_q = [0, 1, 2] make [0, 2, 6]. With one hidden layer e_v is the observation."""
    network, parameters = network_and_parameters((3,))
    parameters = distilled(parameters, bias=[-1.0, 0.0, 1.0])
    layers = parameters["params"]["critic"]["layers"]
    layers["kernel_0"] = 1e-3 * jnp.eye(3)[None]  # where the tanh is the identity
    for unit, product in enumerate([0, 2, 6]):
        layers["kernel_1"] = 1e3 * jnp.eye(3)[None, :, unit : unit + 1]
        _, value = network.apply(parameters, jnp.array([[1.0, 2, 3]]), jnp.ones((1, 4)))
        assert value[0] == pytest.approx(product, abs=1e-3)


def test_a_told_zero_teaches_nothing_and_weights_start_far_from_it():
    network, parameters = network_and_parameters()
    told = jax.random.normal(jax.random.key(1), (50, 4))

    def loss(parameters):
        return (network.apply(parameters, OBSERVATION, told)[1] ** 2).sum()

    dead = jax.grad(loss)(distilled(parameters, bias=-1.0))["params"]
    assert not any(x.any() for name in ("features", "distillation") for x in jax.tree.leaves(dead[name]))
    alive = jax.grad(loss)(parameters)["params"]
    assert all(x.any() for name in ("features", "distillation") for x in jax.tree.leaves(alive[name]))


def test_with_ones_for_what_is_told_it_is_ppo_bit_for_bit():
    """Value, loss and all gradients but the distillation's own."""
    network, parameters = network_and_parameters()
    parameters, plain = distilled(parameters), clipped.Network((6, 5), 3, False)
    told, key = jax.random.normal(jax.random.key(1), (50, 4)), jax.random.key(2)
    action = jax.random.randint(jax.random.clone(key), (50,), 0, 3)
    old_value, advantage = jax.random.normal(key, (2, 50))

    def loss(apply):
        def objective(parameters):
            actions, value = apply(parameters)
            ratio = jnp.exp(actions.log_density(action) + 1)
            of_policy = clipped.policy_loss(ratio, clipped.normalized(advantage), 0.2)
            return of_policy + 0.5 * clipped.value_loss(value, old_value, advantage + old_value, 0.2), value

        return jax.value_and_grad(objective, has_aux=True)

    (one, value), slopes = loss(lambda x: network.apply(x, OBSERVATION, told))(parameters)
    (other, plain_value), plain_slopes = loss(lambda x: plain.apply(x, OBSERVATION))(of_ppo(parameters))
    np.testing.assert_array_equal(value, plain_value)
    assert one == other
    assert same(of_ppo(slopes), plain_slopes)
    assert jax.tree.leaves(slopes["params"]["distillation"])[0].any()


def test_with_ones_for_what_is_told_an_iteration_is_ppos():
    """One minibatch, which moves the distillation too, and gradients that are not cut, since it has a part in their
    norm."""
    settings = OF_PPO | {"num_epochs": 1, "num_minibatches": 1, "gradient_bound": 1e6}
    agent, _ = agent_of(**settings)
    plain, _ = by_hand.agent_on(ppo, by_hand.Choices(), **settings)
    state, plain_state = begun(agent), begun(plain)
    parameters = distilled(state.learner.parameters)
    state = state._replace(learner=state.learner._replace(parameters=parameters))
    plain_state = plain_state._replace(
        learner=plain_state.learner._replace(parameters=of_ppo(parameters)), interaction=state.interaction,
        key=jax.random.clone(state.key),
    )  # fmt: skip
    state, metrics = by_hand.quick(agent.step)(state)
    plain_state, plain_metrics = by_hand.quick(plain.step)(plain_state)
    for name in ("episode_return", "loss", "policy_loss", "value_loss", "entropy", "value", "target"):
        np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)
    moved, plain_moved = of_ppo(state.learner.parameters), plain_state.learner.parameters
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), moved, plain_moved)


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


def layers_of(parameters) -> dict[str, np.ndarray]:
    names = ("actor", "features", "distillation", "critic")
    return {f"{part}/{name}": x for part in names for name, x in by_hand.network(parameters, part).items()}


def tanh_backward(net, activations, slope):
    """Gradients of the layers, and the slope in what goes into the first."""
    gradient = clipped_by_hand.tanh_backward(net, activations, slope)
    for layer in reversed(range(len(net) // 2)):
        if layer < len(net) // 2 - 1:
            slope = slope * (1 - activations[layer + 1] ** 2)
        slope = slope @ net[f"kernel_{layer}"][0].T
    return gradient, slope


def slow_value(parameters, observation, told) -> tuple[np.ndarray, dict]:
    """V, and all that is needed to go back."""
    net = {name: clipped_by_hand.part(parameters, name) for name in ("features", "distillation", "critic")}
    tape = {"features": clipped_by_hand.tanh_forward(net["features"], observation)}
    features = np.tanh(tape["features"][-1])
    tape["distillation"] = clipped_by_hand.tanh_forward(net["distillation"], told)
    distilled = np.maximum(1 + tape["distillation"][-1], 0)
    tape["critic"] = clipped_by_hand.tanh_forward(net["critic"], features * distilled)
    return tape["critic"][-1][..., 0], {"net": net, "tape": tape, "features": features, "distilled": distilled}


def slow_value_gradient(found, slope) -> dict[str, np.ndarray]:
    net, tape, gradient = found["net"], found["tape"], {}
    gradient["critic"], at_product = tanh_backward(net["critic"], tape["critic"], slope[:, None])
    at_told = at_product * found["features"] * (found["distilled"] > 0)
    gradient["distillation"], _ = tanh_backward(net["distillation"], tape["distillation"], at_told)
    at_features = at_product * found["distilled"] * (1 - found["features"] ** 2)
    gradient["features"], _ = tanh_backward(net["features"], tape["features"], at_features)
    return {f"{part}/{name}": x for part, layers in gradient.items() for name, x in layers.items()}


def slow_update(parameters, adam, batch, config):
    """One minibatch of PPO, all gradients by hand; returns parameters and the metrics."""
    actor, rows = clipped_by_hand.part(parameters, "actor"), len(batch["value"])
    on_actor = clipped_by_hand.tanh_forward(actor, batch["observation"])
    value, found = slow_value(parameters, batch["observation"], batch["told"])
    advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
    masses = by_hand.softmax(on_actor[-1])
    taken = np.eye(masses.shape[1])[batch["action"].astype(int)]
    ratio = (masses * taken).sum(1) / np.exp(batch["log_density"])
    entropy = -(masses * np.log(masses)).sum(1)
    held = np.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    alive = (ratio * advantage <= held * advantage) * ratio * advantage
    slope = -alive[:, None] * (taken - masses) / rows
    slope += config.entropy_weight * masses * (np.log(masses) + entropy[:, None]) / rows
    gradient = {f"actor/{name}": x for name, x in tanh_backward(actor, on_actor, slope)[0].items()}
    near = batch["value"] + np.clip(value - batch["value"], -config.clip_range, config.clip_range)
    plain, cut = (value - batch["target"]) ** 2, (near - batch["target"]) ** 2
    inside = np.abs(value - batch["value"]) < config.clip_range
    value_slope = np.where(plain >= cut, value - batch["target"], (near - batch["target"]) * inside)
    gradient |= slow_value_gradient(found, config.value_weight * value_slope / rows)
    policy_loss, value_loss = -np.minimum(ratio * advantage, held * advantage).mean(), np.maximum(plain, cut).mean() / 2
    loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy.mean()
    moved, norm = adam.step(parameters, gradient, config.learning_rate, config.adam_epsilon, config.gradient_bound)
    return moved, {
        "loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean(),
        "gradient_norm": norm, "clipped_ratios": (np.abs(ratio - 1) > config.clip_range).mean(),
    }  # fmt: skip


def implicit(parameters) -> dict[str, dict]:
    return {path: by_hand.network(parameters, path) for path in (TORSO, EMBEDDING, HEAD)}


def slow_quantile_update(nets, target_nets, adams, actor, rows, drawn, config):
    """One update of the IQN on a batch; returns its networks, loss, and whether greedy actions were unlike likely."""
    fractions, target_fractions = drawn
    quantiles, tape = implicit_by_hand.forward(nets, rows["observation"], fractions)
    following, _ = implicit_by_hand.forward(target_nets, rows["next_observation"], target_fractions)
    probabilities = by_hand.softmax(clipped_by_hand.tanh_forward(actor, rows["next_observation"])[-1])
    if config.iqn_target == "greedy":
        middles = np.tile((np.arange(config.num_quantiles) + 0.5) / config.num_quantiles, (len(fractions), 1))
        choosing, _ = implicit_by_hand.forward(target_nets, rows["next_observation"], middles)
        probabilities = np.eye(probabilities.shape[1])[choosing.mean(-1).argmax(-1)]
    slope, losses = np.zeros_like(quantiles), []
    for b, action in enumerate(rows["action"].astype(int)):
        discount = 0 if rows["terminated"][b] else config.discount
        target = [rows["reward"][b] + discount * y for of_action in following[b] for y in of_action]
        masses = [p / len(of_action) for p, of_action in zip(probabilities[b], following[b], strict=True)
                  for _ in of_action]  # fmt: skip
        loss, row = implicit_by_hand.quantile_huber(
            quantiles[b, action], fractions[b], np.array(target), config.kappa, np.array(masses)
        )
        slope[b, action] = row / len(slope)
        losses.append(loss)
    gradient = implicit_by_hand.backward(nets, tape, slope)
    nets = {path: adams[path].step(nets[path], gradient[path], config.quantile_learning_rate) for path in nets}
    norm = np.sqrt(sum((x**2).sum() for part in gradient.values() for x in part.values()))
    return nets, np.mean(losses), norm


@either_target
def test_iterations_equal_loops_in_numpy(iqn_target, monkeypatch):
    """Three rollouts, with all updates of both; what was lived is taken from the program, the rest is by hand."""
    agent, config = agent_of(iqn_target=iqn_target, clip_range=0.05)
    seen, plain = [], pg_rainbow.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(pg_rainbow.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), begun(agent)
    parameters = layers_of(state.learner.parameters)
    adam, ends, told_so_far, count = clipped_by_hand.Adam(parameters), [], [], config.num_envs * config.num_steps
    for iteration in range(3):
        _, _, epochs_key, quantile_key = jax.random.split(jax.random.clone(state.key), 4)
        before, (state, metrics) = state, step(state)
        jax.effects_barrier()
        lived, (action, log_density) = seen[-1]
        ends.append((lived.terminated.sum(), lived.truncated.sum()))
        assert int(state.replay.size) == min(count * (iteration + 1), config.replay_capacity)

        # The IQN, with the policy that acted.
        actor, stored = clipped_by_hand.part(parameters, "actor"), jax.device_get(state.replay.rows)
        nets, target_nets = implicit(before.quantiles.network.parameters), implicit(before.quantiles.target_network)
        adams = {
            path: by_hand.Adam(before.quantiles.network.optimizer, path, config.adam_epsilon) for path in nets
        }  # fmt: skip
        losses = []
        for index in range(config.quantile_updates):
            sample_key, update_key = jax.random.split(jax.random.fold_in(jax.random.clone(quantile_key), index))
            slots = np.asarray(draws.integers(sample_key, (config.batch_size,), int(state.replay.size)))
            rows = {
                name: np.asarray(x, np.float64)[slots] for name, x in stored._asdict().items() if name != "extras"
            }  # fmt: skip
            drawn = [
                np.float64(draws.uniform(key, (config.batch_size, size)))
                for key, size in zip(jax.random.split(update_key), (3, 5), strict=True)
            ]
            nets, *said = slow_quantile_update(nets, target_nets, adams, actor, rows, drawn, config)
            losses.append(said)
            if (int(before.quantiles.updates) + index + 1) % config.target_period == 0:
                target_nets = nets
        for path, adam_of_path in adams.items():
            by_hand.assert_network_is(state.quantiles.network.parameters, nets[path], path)
            by_hand.assert_network_is(state.quantiles.target_network, target_nets[path], path)
            by_hand.assert_adam_is(state.quantiles.network.optimizer, adam_of_path, path)
        for name, expected in zip(("quantile_loss", "quantile_gradient_norm"), np.mean(losses, axis=0), strict=True):
            np.testing.assert_allclose(metrics[name].total / metrics[name].count, expected, rtol=2e-3, err_msg=name)

        # What it says of every state, by the network after its updates and the policy that acted.
        middles = (np.arange(config.num_quantiles) + 0.5) / config.num_quantiles

        def told(observation, nets=nets, actor=actor, middles=middles):
            flat = observation.reshape(-1, 3).astype(np.float64)
            quantiles, _ = implicit_by_hand.forward(nets, flat, np.tile(middles, (len(flat), 1)))
            masses = by_hand.softmax(clipped_by_hand.tanh_forward(actor, flat)[-1])
            return np.einsum("ba,bam->bm", masses, quantiles)

        told_so_far.append(told(lived.observation))
        everything = np.concatenate(told_so_far)
        np.testing.assert_allclose(state.statistics.mean, everything.mean(0), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(state.statistics.variance, everything.var(0), rtol=2e-3, atol=1e-5)

        def seen_as(x, everything=everything):
            return np.clip((x - everything.mean(0)) / np.sqrt(everything.var(0) + 1e-8), -10, 10)

        observation, successor = (
            x.reshape(-1, 3).astype(np.float64) for x in (lived.observation, lived.next_observation)
        )
        as_told = seen_as(told_so_far[-1])
        shape = lived.reward.shape
        value, following = (
            slow_value(parameters, *x)[0].reshape(shape)
            for x in ((observation, as_told), (successor, seen_as(told(lived.next_observation))))
        )
        advantage = np.asarray(returns.gae(
            *map(jnp.asarray, (lived.reward, value, following, lived.terminated, lived.truncated)), config.discount,
            config.gae_decay,
        ), np.float64)  # fmt: skip
        batch = {
            "observation": observation, "told": as_told, "action": action.reshape(-1),
            "log_density": log_density.reshape(-1).astype(np.float64), "value": value.reshape(-1),
            "advantage": advantage.reshape(-1), "target": (advantage + value).reshape(-1),
        }  # fmt: skip
        np.testing.assert_allclose(metrics["value"].total, value.sum(), rtol=2e-3, atol=1e-3)

        # PPO's epochs.
        found = []
        for epoch in range(config.num_epochs):
            epoch_key = jax.random.fold_in(jax.random.clone(epochs_key), epoch)
            order = np.asarray(jax.random.permutation(epoch_key, count)).reshape(config.num_minibatches, -1)
            assert sorted(order.ravel()) == list(range(count))
            for numbers in order:
                one = {name: x[numbers] for name, x in batch.items()}
                parameters, said = slow_update(parameters, adam, one, config)
                found.append(said)
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                layers_of(state.learner.parameters)[name], expected, rtol=5e-3, atol=1e-4, err_msg=name
            )
        for name in found[0]:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=5e-3, atol=1e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert int(state.quantiles.updates) == 3 * config.quantile_updates


# -- the replay -------------------------------------------------------------------------------------------------------


def test_the_replay_keeps_rollouts_with_their_true_successors():
    """And the first minibatch sees the policy that acted: ratios of 1."""
    agent, config = agent_of(num_epochs=1, num_minibatches=1)
    state, step = begun(agent), by_hand.quick(agent.step)
    assert int(state.replay.size) == 0
    for iteration, size in enumerate((24, 48, 48)):
        started, (state, metrics) = state.interaction.observation, step(state)
        assert metrics["clipped_ratios"].total == 0
        assert abs(float(metrics["approximate_kl"].total)) < 1e-6
        assert int(state.replay.size) == size
        first = 24 * (iteration % 2)
        rows = jax.tree.map(lambda x, first=first: np.asarray(x[first : first + 24]), state.replay.rows)
        observation = rows.observation.reshape(8, 3, 3)
        np.testing.assert_array_equal(observation[0], started)
        follows = np.concatenate([observation[1:], state.interaction.observation[None]]).reshape(24, 3)
        done = rows.terminated | rows.truncated
        assert done.any()
        goes_on = (rows.next_observation == follows).all(1)
        np.testing.assert_array_equal(goes_on, ~done)  # where an episode ends, the next row is of another
        assert (rows.next_observation[rows.terminated, 0] > 0.6).all()  # Drift terminates there
    assert config.replay_capacity == 48


def test_a_replay_below_a_rollout_is_refused():
    with pytest.raises(ValueError, match="--replay-capacity is 23; it must be at least a rollout's 24 steps"):
        agent_of(replay_capacity=23)


# -- who learns from what ---------------------------------------------------------------------------------------------


def test_neither_learns_from_the_others_loss():
    """PPO's settings leave the IQN as it is, bit for bit; without a step of its own the IQN stands still."""
    agent, config = agent_of()
    start, env = begun(agent), by_hand.Choices()

    @by_hand.quick
    def step(config, state):
        return pg_rainbow.make_agent(config, env, env.default_params).step(state)[0]

    def after(**settings):
        return step(dataclasses.replace(config, **settings), by_hand.with_fresh_keys(start))

    plain = after()
    for settings in ({"value_weight": 7.0}, {"learning_rate": 0.0}, {"clip_range": 0.01}, {"entropy_weight": 1.0}):
        other = after(**settings)
        assert same(other.quantiles, plain.quantiles)
        assert not same(other.learner, plain.learner)
    still = after(quantile_learning_rate=0.0)
    assert same(still.quantiles.network.parameters, start.quantiles.network.parameters)
    assert not same(still.learner.parameters, start.learner.parameters)
    assert same(after(learning_rate=0.0).learner.parameters, start.learner.parameters)


# -- how it acts, and what it claims ----------------------------------------------------------------------------------


def test_it_explores_by_its_law_and_is_evaluated_by_the_mode(tmp_path):
    agent, _ = agent_of()
    state = begun(agent)
    actor = state.learner.parameters["params"]["actor"]["layers"]
    actor["kernel_2"] = 200 * actor["kernel_2"]  # actions that differ from observation to observation
    action, _ = agent.policy.act(state, OBSERVATION, (), jax.random.key(0))
    same_action, _ = agent.policy.act(state, OBSERVATION, (), jax.random.key(1))
    np.testing.assert_array_equal(action, same_action)
    drawn, bonus = agent.claim.policy(state, OBSERVATION, jax.random.key(0))
    assert not np.array_equal(action, drawn)
    assert not bonus.any()
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(OBSERVATION)), action)
    assert len(np.unique(action)) > 1


def test_the_law_of_a_state_is_the_mixture_over_its_actions():
    agent, config = agent_of()
    state = by_hand.quick(agent.step)(begun(agent))[0]
    claim = agent.claim
    assert claim.of_states
    assert not claim.learns_mean
    found = claim.law(state, OBSERVATION, jnp.zeros(50, jnp.int32))
    assert found.atoms.shape == (50, 3 * config.num_quantiles)
    middles = np.tile((np.arange(4) + 0.5) / 4, (50, 1))
    quantiles, _ = implicit_by_hand.forward(
        implicit(state.quantiles.network.parameters), np.asarray(OBSERVATION, np.float64), middles
    )
    actor = by_hand.network(state.learner.parameters, "actor")
    masses = by_hand.softmax(clipped_by_hand.tanh_forward(actor, np.asarray(OBSERVATION, np.float64))[-1])
    np.testing.assert_allclose(found.atoms, quantiles.reshape(50, -1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.masses, np.repeat(masses / 4, 4, axis=1), rtol=1e-3)
    # The same mean as that of what the value is told.
    np.testing.assert_allclose(laws.mean(found), np.einsum("ba,bam->b", masses, quantiles) / 4, rtol=1e-3, atol=1e-4)


def test_where_the_iqn_is_greedy_the_mean_value_is_claimed_and_nothing_is_drawn_for_it():
    agent, config = agent_of(iqn_target="greedy")
    state = by_hand.quick(agent.step)(begun(agent))[0]
    assert agent.claim.learns_mean
    value = agent.claim.law(state, OBSERVATION, jnp.zeros(50, jnp.int32)).atoms
    assert value.shape == (50, 1)
    again = agent.claim.law(state._replace(key=jax.random.key(99)), OBSERVATION, jnp.ones(50, jnp.int32)).atoms
    np.testing.assert_array_equal(again, value)
    middles = np.tile((np.arange(4) + 0.5) / 4, (50, 1))
    observation = np.asarray(OBSERVATION, np.float64)
    quantiles, _ = implicit_by_hand.forward(implicit(state.quantiles.network.parameters), observation, middles)
    actor = by_hand.network(state.learner.parameters, "actor")
    masses = by_hand.softmax(clipped_by_hand.tanh_forward(actor, observation)[-1])
    told = np.einsum("ba,bam->bm", masses, quantiles) - np.asarray(state.statistics.mean, np.float64)
    told = np.clip(told / np.sqrt(np.asarray(state.statistics.variance, np.float64) + 1e-8), -10, 10)
    expected, _ = slow_value(layers_of(state.learner.parameters), observation, told)
    np.testing.assert_allclose(value[:, 0], expected, rtol=1e-3, atol=1e-4)
    assert config.num_quantiles == 4


def test_images_pass_a_torso_that_both_share(tmp_path):
    agent, _ = agent_of(by_hand.Pictures(), hidden=(7,))
    state = begun(agent)
    assert jax.tree.structure(jax.eval_shape(agent.step, state)[0]) == jax.tree.structure(state)
    assert set(state.learner.parameters["params"]) == {"torso", "actor", "distillation", "critic"}
    positions = 2 * jax.random.normal(jax.random.key(5), (60, 3))
    observation = jax.vmap(by_hand.Pictures().picture)(positions)
    action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
    portable.save_policy(tmp_path / "policy.npz", agent.export(state))
    np.testing.assert_array_equal(portable.load_policy(tmp_path / "policy.npz")(np.asarray(observation)), action)


def test_the_value_knows_the_probes():
    """The shared probes look at the law that is claimed; with greedy quantiles that is V."""
    import test_every_agent  # here, since it collects the tests of all

    assert not test_every_agent.failed_with("pg_rainbow", test_every_agent.CASES, iqn_target="greedy")


# -- learning ---------------------------------------------------------------------------------------------------------


def trained(algorithm, key, steps: int, watched, **settings):
    """What `watched(agent, config, env, env_params, state, key)` says in the tenths of a training on CartPole."""
    env, env_params = envs.make("CartPole-v1")
    preset = problem.split_preset(algorithm.PRESETS["CartPole-v1"])[1]
    config = dataclasses.replace(algorithm.Config(), **(preset | settings))
    agent = algorithm.make_agent(config, env, env_params)
    key, look_key = jax.random.split(key)

    def tenth(state, index):
        state, _ = jax.lax.scan(
            lambda x, _: (agent.step(x)[0], None), state, length=steps // 10 // agent.clock.env_steps
        )
        return state, watched(agent, config, env, env_params, state, jax.random.fold_in(look_key, index))

    return jax.lax.scan(tenth, agent.init(key), jnp.arange(10))[1]


def returns_of(agent, config, env, env_params, state, key):
    found = evaluation.evaluate(agent, env, env_params, state, key, episodes=40, max_steps=500)
    return found.episode_return.mean()


def both_returns_of(agent, config, env, env_params, state, key):
    """The returns of PPO's policy and of the greedy one of the IQN."""
    network = pg_rainbow.QuantileNetwork(config.quantile_hidden, 2)

    def greedy(state, observation, key):
        fractions = jnp.broadcast_to(quantile.midpoints(config.num_quantiles), (len(observation), config.num_quantiles))
        values = network.apply(state.quantiles.network.parameters, observation, fractions).mean(-1)
        return values.argmax(-1).astype(jnp.int32)

    one, other = jax.random.split(key)
    of_iqn = returns_of(agent._replace(policy=memoryless(greedy)), config, env, env_params, state, other)
    return returns_of(agent, config, env, env_params, state, one), of_iqn


@pytest.mark.slow
def test_it_learns_as_ppo_does_and_so_does_its_iqn(proof):
    """CartPole in 100,000 steps, three seeds: the sheet's checks, with the mean of the last three of ten looks."""

    def train(keys):
        return (
            jax.vmap(lambda key: trained(ppo, key, 100_000, returns_of))(jax.random.clone(keys)),
            jax.vmap(lambda key: trained(pg_rainbow, key, 100_000, both_returns_of))(keys),
        )

    keys = jax.random.split(jax.random.key(0), 3)
    proof(proofs.program(train, keys))
    of_ppo, (of_policy, of_iqn) = jax.tree.map(lambda x: np.asarray(x)[:, -3:].mean(), jax.jit(train)(keys))
    assert of_policy >= 300
    assert of_policy >= 0.9 * of_ppo
    assert of_iqn >= 60

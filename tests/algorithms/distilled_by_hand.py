"""Whole iterations of RND and DRND in plain numpy: bonuses, both streams of advantages, all gradients by hand."""

import by_hand
import clipped_by_hand
import jax
import numpy as np

TINY = {
    "num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 4, "hidden": (6, 5), "warmup_steps": 10,
    "predictor_hidden": (7, 6), "target_hidden": (5,), "num_features": 4, "predictor_share": 0.6,
    "learning_rate": 0.02, "clip_range": 0.05, "gradient_bound": 0.3, "discount": 0.9, "intrinsic_discount": 0.8,
}  # fmt: skip


def leaky(x):
    return np.where(x >= 0, x, 0.01 * x)


def leaky_forward(net, inputs):
    activations = [inputs]
    for layer in range(len(net) // 2):
        inputs = inputs @ net[f"kernel_{layer}"][0] + net[f"bias_{layer}"][0]
        inputs = leaky(inputs) if layer < len(net) // 2 - 1 else inputs
        activations.append(inputs)
    return activations


def leaky_backward(net, activations, slope):
    gradient = {}
    for layer in reversed(range(len(net) // 2)):
        if layer < len(net) // 2 - 1:  # the sign of an activation is that of what was summed
            slope = slope * np.where(activations[layer + 1] >= 0, 1, 0.01)
        gradient[f"kernel_{layer}"] = (activations[layer].T @ slope)[None]
        gradient[f"bias_{layer}"] = slope.sum(0)[None]
        slope = slope @ net[f"kernel_{layer}"][0].T
    return gradient


def flat(parameters):
    """All parameters by one name each, in float64: actor, critic, and of the bonus's value and the predictor."""
    found = clipped_by_hand.flat(parameters)
    for part in ("critic", "predictor"):
        name = {"critic": "bonuses"}.get(part, part)
        found |= {f"{name}/{key}": x for key, x in by_hand.network(parameters[part]).items()}
    return found


def seen_as(x, statistics):
    deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
    return np.clip((x - np.asarray(statistics.mean, np.float64)) / deviation, -5, 5)


def advantages(reward, value, following, stops, cuts, gamma, decay):
    """Generalised advantages by a loop; `stops`: no value follows, `cuts`: nor a later advantage."""
    found, later = np.zeros_like(value), np.zeros(value.shape[1])
    for t in reversed(range(len(value))):
        delta = reward[t] + gamma * np.where(stops[t], 0, following[t]) - value[t]
        later = delta + gamma * decay * np.where(cuts[t], 0, later)
        found[t] = later
    return found


def update(parameters, adam, batch, answer, kept, config):
    """One minibatch; `answer`: what the predictor is to learn, `[rows, D]`. Returns parameters and metrics."""
    nets = {name: clipped_by_hand.part(parameters, name) for name in ("actor", "critic", "bonuses", "predictor")}
    rows, gradient = len(batch["value"]), {}
    on_actor = clipped_by_hand.tanh_forward(nets["actor"], batch["observation"])
    masses = by_hand.softmax(on_actor[-1])
    taken = np.eye(masses.shape[1])[batch["action"].astype(int)]
    entropy = -(masses * np.log(masses)).sum(1)
    ratio = np.exp(np.log((masses * taken).sum(1)) - batch["log_density"])
    advantage = batch["advantage"]
    if config.normalize_advantages:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    held = np.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    alive = (ratio * advantage <= held * advantage) * ratio * advantage
    slope = -alive[:, None] * (taken - masses) / rows
    slope += config.entropy_weight * masses * (np.log(masses) + entropy[:, None]) / rows
    gradient |= {f"actor/{k}": x for k, x in clipped_by_hand.tanh_backward(nets["actor"], on_actor, slope).items()}
    losses = {"policy_loss": -np.minimum(ratio * advantage, held * advantage).mean(), "entropy": entropy.mean()}
    for net, name, metric in (("critic", "", "value_loss"), ("bonuses", "intrinsic_", "intrinsic_value_loss")):
        tape = clipped_by_hand.tanh_forward(nets[net], batch["observation"])
        error = tape[-1][:, 0] - batch[f"{name}target"]
        losses[metric] = 0.5 * (error**2).mean()
        slope = config.value_weight * error[:, None] / rows
        gradient |= {f"{net}/{k}": x for k, x in clipped_by_hand.tanh_backward(nets[net], tape, slope).items()}
    tape = leaky_forward(nets["predictor"], batch["seen"])
    count = max(kept.sum(), 1)
    losses["predictor_loss"] = sum(((tape[-1][row] - answer[row]) ** 2).mean() for row in np.flatnonzero(kept)) / count
    slope = 2 * (tape[-1] - answer) / config.num_features * kept[:, None] / count
    gradient |= {f"predictor/{k}": x for k, x in leaky_backward(nets["predictor"], tape, slope).items()}
    losses["loss"] = (
        losses["policy_loss"] + config.value_weight * (losses["value_loss"] + losses["intrinsic_value_loss"])
        - config.entropy_weight * losses["entropy"] + losses["predictor_loss"]
    )  # fmt: skip
    moved, norm = adam.step(parameters, gradient, config.learning_rate, config.adam_epsilon, config.gradient_bound)
    return moved, losses | {"gradient_norm": norm}


def assert_iterations_are(module, monkeypatch, bonus, choose, iterations=3, **settings):
    """Rollouts and all their minibatches; what was lived is taken from the program, all else is by hand.

    bonus: `(prediction [rows, D], answers [networks, rows, D], config) -> [rows]`; choose: `(key, answers, config) ->
    (key, kept [rows], answer [rows, D])`, what a minibatch draws.
    """
    agent, config = by_hand.agent_on(module, by_hand.Choices(), **(TINY | settings))
    seen, plain = [], module.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(module.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    assert state.statistics.count == 12  # 10 rounded up to whole rounds of three environments
    target = jax.device_get(state.target)
    layers = target["params"]["mlp"]["layers"]
    count = layers["bias_0"].shape[0] if layers["bias_0"].ndim == 3 else 1
    randoms = [
        {name: np.asarray(x[k] if x.ndim > (3 if "kernel" in name else 2) else x, np.float64)
         for name, x in layers.items()} for k in range(count)
    ]  # fmt: skip

    def answers_of(x):
        return np.stack([leaky_forward(net, x)[-1] for net in randoms])

    parameters = flat(state.learner.parameters)
    adam, sums, all_sums, ends = clipped_by_hand.Adam(parameters), np.zeros(config.num_envs), [], []
    for _ in range(iterations):
        _, _, epochs_key, update_key = jax.random.split(jax.random.clone(state.key), 4)
        before, (state, metrics) = state, step(by_hand.with_fresh_keys(state))
        jax.effects_barrier()
        lived, (action, log_density) = seen[-1]
        ends.append((lived.terminated.sum(), lived.truncated.sum()))
        rows = config.num_envs * config.num_steps
        successor = lived.next_observation.reshape(rows, -1).astype(np.float64)

        # The bonus: statistics and predictor from before the rollout; sums that never end.
        looked_at = seen_as(successor, before.statistics)
        prediction = leaky_forward(clipped_by_hand.part(parameters, "predictor"), looked_at)[-1]
        novelty = bonus(prediction, answers_of(looked_at), config).reshape(config.num_steps, -1)
        for row in novelty:
            sums = config.intrinsic_discount * sums + row
            all_sums.append(sums)
        np.testing.assert_allclose(state.scale.sums, sums, rtol=2e-3)
        assert state.scale.statistics.count == np.size(all_sums)  # every step of every environment
        deviation = np.sqrt(np.var(all_sums) + 1e-8)
        np.testing.assert_allclose(np.sqrt(float(state.scale.statistics.variance)), deviation, rtol=2e-3)
        intrinsic = np.clip(novelty / deviation, -10, 10)

        # Both streams.
        values = lambda name, x: clipped_by_hand.tanh_forward(  # noqa: E731
            clipped_by_hand.part(parameters, name),
            x.astype(np.float64),
        )[-1][..., 0]
        value, done = values("critic", lived.observation), lived.terminated | lived.truncated
        of_rewards = advantages(
            lived.reward, value, values("critic", lived.next_observation), lived.terminated, done, config.discount,
            config.gae_decay,
        )  # fmt: skip
        stream = values("bonuses", np.concatenate([lived.observation, np.asarray(state.interaction.observation)[None]]))
        never = np.zeros_like(done)
        of_bonuses = advantages(
            intrinsic, stream[:-1], stream[1:], never, never, config.intrinsic_discount, config.gae_decay
        )

        # What is learned from.
        total = float(before.statistics.count) + rows
        mean = (np.asarray(before.statistics.mean) * float(before.statistics.count) + successor.sum(0)) / total
        np.testing.assert_allclose(state.statistics.mean, mean, rtol=1e-3, atol=1e-5)
        assert float(state.statistics.count) == total
        looked_at = seen_as(successor, state.statistics)
        batch = {
            "observation": lived.observation, "action": action, "log_density": log_density, "value": value,
            "advantage": config.extrinsic_weight * of_rewards + config.intrinsic_weight * of_bonuses,
            "target": of_rewards + value, "intrinsic_target": of_bonuses + stream[:-1],
        }  # fmt: skip
        batch = {name: x.reshape(rows, *x.shape[2:]) for name, x in batch.items()} | {"seen": looked_at}
        answers, found, key = answers_of(looked_at), [], update_key
        for epoch in range(config.num_epochs):
            order = jax.random.permutation(jax.random.fold_in(jax.random.clone(epochs_key), epoch), rows)
            for numbers in np.asarray(order).reshape(config.num_minibatches, -1):
                key, kept, answer = choose(key, answers[:, numbers], config)
                minibatch = {name: x[numbers] for name, x in batch.items()}
                parameters, metric = update(parameters, adam, minibatch, answer, kept, config)
                found.append(metric)
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                flat(state.learner.parameters)[name], expected, rtol=3e-3, atol=5e-5, err_msg=name
            )
        found = {name: np.mean([x[name] for x in found]) for name in found[0]}
        found |= {"bonus": novelty.mean(), "intrinsic_reward": intrinsic.mean(), "value": value.mean()}
        for name, expected in found.items():
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, expected, rtol=5e-3, atol=1e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    jax.tree.map(np.testing.assert_array_equal, state.target, target)  # and no gradient ever reached the targets

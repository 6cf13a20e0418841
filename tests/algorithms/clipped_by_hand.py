"""The updates of agents with a clipped objective (PPO, PLR) in plain numpy: all gradients by hand, in float64.

What only PPO has (`normalize_advantages`, `target_kl`, targets that are laws) is as in its defaults where a
configuration has no such field.
"""

import by_hand
import jax
import numpy as np


def tanh_forward(net, inputs):
    activations = [inputs]
    for layer in range(len(net) // 2):
        inputs = inputs @ net[f"kernel_{layer}"][0] + net[f"bias_{layer}"][0]
        inputs = np.tanh(inputs) if layer < len(net) // 2 - 1 else inputs
        activations.append(inputs)
    return activations


def tanh_backward(net, activations, slope):
    gradient = {}
    for layer in reversed(range(len(net) // 2)):
        if layer < len(net) // 2 - 1:
            slope = slope * (1 - activations[layer + 1] ** 2)
        gradient[f"kernel_{layer}"] = (activations[layer].T @ slope)[None]
        gradient[f"bias_{layer}"] = slope.sum(0)[None]
        slope = slope @ net[f"kernel_{layer}"][0].T
    return gradient


class Adam:
    """Adam after cutting the norm of the gradient to a bound."""

    def __init__(self, parameters):
        self.first = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.second = {name: np.zeros_like(x) for name, x in parameters.items()}
        self.time = 0

    def step(self, parameters, gradient, rate, epsilon, bound):
        norm = np.sqrt(sum((x**2).sum() for x in gradient.values()))
        self.time += 1
        moved = {}
        for name, slope in gradient.items():
            slope = slope * min(1, bound / norm)
            self.first[name] = 0.9 * self.first[name] + 0.1 * slope
            self.second[name] = 0.999 * self.second[name] + 0.001 * slope**2
            mean, square = self.first[name] / (1 - 0.9**self.time), self.second[name] / (1 - 0.999**self.time)
            moved[name] = parameters[name] - rate * mean / (np.sqrt(square) + epsilon)
        return moved, norm


def flat(parameters):
    """All parameters by one name each, in float64."""
    parts = {
        f"{part}/{name}": x for part in ("actor", "critic") for name, x in by_hand.network(parameters, part).items()
    }
    if "log_std" in parameters["params"]:
        parts["log_std"] = np.asarray(parameters["params"]["log_std"], np.float64)
    return parts


def part(parameters, name):
    return {key.partition("/")[2]: x for key, x in parameters.items() if key.startswith(f"{name}/")}


def slow_update(parameters, adam, batch, config, rate, stopped=False):
    """One minibatch, all gradients by hand; returns parameters, the same ones where `stopped`, and the metrics."""
    actor, critic = part(parameters, "actor"), part(parameters, "critic")
    on_actor, on_critic = tanh_forward(actor, batch["observation"]), tanh_forward(critic, batch["observation"])
    rows, head = len(batch["value"]), on_actor[-1]
    advantage = batch["advantage"]
    if getattr(config, "normalize_advantages", True):
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gradient = {}
    if "log_std" in parameters:
        std = np.exp(parameters["log_std"])
        noise = (batch["action"] - head) / std
        log_density = (-0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
        entropy = np.full(rows, (np.log(std) + 0.5 * np.log(2 * np.pi * np.e)).sum())
        head_slope, std_slope, entropy_slope = noise / std, noise**2 - 1, np.zeros_like(head)
    else:
        masses = by_hand.softmax(head)
        taken = np.eye(head.shape[1])[batch["action"].astype(int)]
        log_density = np.log((masses * taken).sum(1))
        entropy = -(masses * np.log(masses)).sum(1)
        head_slope = taken - masses
        entropy_slope = -masses * (np.log(masses) + entropy[:, None])
    ratio = np.exp(log_density - batch["log_density"])
    held = np.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    policy_loss = -np.minimum(ratio * advantage, held * advantage).mean()
    alive = (ratio * advantage <= held * advantage) * ratio * advantage  # d/d log density
    slope = -(alive[:, None] * head_slope) / rows - config.entropy_weight * entropy_slope / rows
    gradient |= {f"actor/{k}": x for k, x in tanh_backward(actor, on_actor, slope).items()}
    if "log_std" in parameters:
        gradient["log_std"] = -(alive[:, None] * std_slope).mean(0) - config.entropy_weight
    of_value = law_loss if batch["target"].ndim == 2 else value_loss
    value_cost, value_slope = of_value(on_critic[-1], batch, config)
    value_slope = config.value_weight * value_slope / rows
    gradient |= {f"critic/{k}": x for k, x in tanh_backward(critic, on_critic, value_slope).items()}
    loss = policy_loss + config.value_weight * value_cost - config.entropy_weight * entropy.mean()
    metrics = {
        "loss": loss, "gradient_norm": np.sqrt(sum((x**2).sum() for x in gradient.values())),
        "clipped_ratios": (np.abs(ratio - 1) > config.clip_range).mean(),
        "approximate_kl": (ratio - 1 - np.log(ratio)).mean(),
    }  # fmt: skip
    bound = getattr(config, "target_kl", 0)
    if stopped or 0 < bound < metrics["approximate_kl"]:
        return parameters, metrics | {"updates_made": 0}
    moved, _ = adam.step(parameters, gradient, rate, config.adam_epsilon, config.gradient_bound)
    return moved, metrics | {"updates_made": 1}


def value_loss(outputs, batch, config):
    """The value's loss and its slopes, `[rows, 1]`."""
    value = outputs[:, 0]
    near = batch["value"] + np.clip(value - batch["value"], -config.clip_range, config.clip_range)
    plain, cut = (value - batch["target"]) ** 2, (near - batch["target"]) ** 2
    if not config.clip_values:
        cut = plain
    inside = np.abs(value - batch["value"]) < config.clip_range
    slope = np.where(plain >= cut, value - batch["target"], (near - batch["target"]) * inside)
    return 0.5 * np.maximum(plain, cut).mean(), slope[:, None]


def law_loss(outputs, batch, config):
    """The quantile Huber loss of outputs `[rows, quantiles]` and its slopes, pair by pair."""
    rows, count = outputs.shape
    cost, slope = 0.0, np.zeros_like(outputs)
    for row in range(rows):
        for i in range(count):
            for target in batch["target"][row]:
                error, pairs = target - outputs[row, i], rows * count * len(batch["target"][row])
                weight = abs((2 * i + 1) / (2 * count) - (error < 0)) / config.kappa
                large = abs(error) > config.kappa
                huber = config.kappa * (abs(error) - config.kappa / 2) if large else error**2 / 2
                cost += weight * huber / pairs
                slope[row, i] -= weight * np.clip(error, -config.kappa, config.kappa) / pairs * rows
    return cost, slope


def epochs(parameters, adam, batch, config, rate, key):
    """All minibatches of all epochs over a rollout, leaves `[steps, num_envs, ...]`, in the order that `key` says;
    returns parameters and what each minibatch said."""
    rows = config.num_envs * config.num_steps
    batch = {name: x.reshape(rows, *x.shape[2:]) for name, x in batch.items()}
    found, stopped = [], False
    for epoch in range(config.num_epochs):
        epoch_key = jax.random.fold_in(jax.random.clone(key), epoch)
        order = np.asarray(jax.random.permutation(epoch_key, rows)).reshape(config.num_minibatches, -1)
        for numbers in order:
            one = {name: x[numbers] for name, x in batch.items()}
            parameters, metric = slow_update(parameters, adam, one, config, rate, stopped)
            stopped = not metric["updates_made"]
            found.append(metric)
    return parameters, found

"""PPO with a memory: whole iterations against loops in numpy, through time by hand, and what must not be forgotten."""

import dataclasses

import by_hand
import clipped_by_hand
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.policy_gradient import ppo_memory
from jaxrl_dist.learning import portable, returns

TINY = {
    "num_envs": 4, "num_steps": 9, "num_epochs": 2, "num_minibatches": 2, "hidden": (5,), "memory_size": 4,
    "learning_rate": 0.02,
}  # fmt: skip
CONTINUOUS = TINY | {"normalize_observations": True, "normalize_rewards": True}
KINDS = {"choice": (by_hand.Choices(), TINY), "continuous": (by_hand.Drift(), CONTINUOUS)}
every_kind = pytest.mark.parametrize("kind", KINDS)


def agent_of(kind, **settings):
    env, base = KINDS[kind]
    return by_hand.agent_on(ppo_memory, env, **(base | settings))


# -- the network and its gradient in numpy -----------------------------------------------------------------------------

PARTS = ("encoder", "memory", "actor", "critic")


def flat(parameters):
    """All parameters by one name each, in float64."""
    parts = {f"{part}/{name}": x for part in PARTS for name, x in by_hand.network(parameters, part).items()}
    if "log_std" in parameters["params"]:
        parts["log_std"] = np.asarray(parameters["params"]["log_std"], np.float64)
    return parts


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def cell(net, features, memory):
    """One step of the memory, `[rows, ...]`, with what its gradient needs."""
    size = memory.shape[-1]
    of_inputs, of_memory = features @ net["kernel"] + net["bias"], memory @ net["recurrent_kernel"]
    reset, keep = (
        sigmoid(of_inputs[:, i : i + size] + of_memory[:, i : i + size]) for i in (0, size)
    )  # fmt: skip
    pushed = of_memory[:, 2 * size :] + net["recurrent_bias"]
    candidate = np.tanh(of_inputs[:, 2 * size :] + reset * pushed)
    return (1 - keep) * candidate + keep * memory, (features, memory, reset, keep, pushed, candidate)


def cell_backward(net, tape, slope):
    """Gradients of the weights, and the slopes in features and in the memory before the step."""
    features, memory, reset, keep, pushed, candidate = tape
    at_candidate = slope * (1 - keep) * (1 - candidate**2)
    at_pushed = at_candidate * reset
    at_reset = at_candidate * pushed * reset * (1 - reset)
    at_keep = slope * (memory - candidate) * keep * (1 - keep)
    at_inputs = np.concatenate([at_reset, at_keep, at_candidate], axis=1)
    at_memory = np.concatenate([at_reset, at_keep, at_pushed], axis=1)
    gradient = {
        "kernel": features.T @ at_inputs, "bias": at_inputs.sum(0),
        "recurrent_kernel": memory.T @ at_memory, "recurrent_bias": at_pushed.sum(0),
    }  # fmt: skip
    return gradient, at_inputs @ net["kernel"].T, slope * keep + at_memory @ net["recurrent_kernel"].T


def encode(parameters, observation):
    activations = clipped_by_hand.tanh_forward(clipped_by_hand.part(parameters, "encoder"), observation)
    return [*activations[:-1], np.tanh(activations[-1])]


def remember(parameters, memory, observation, begins):
    """Step by step: the memory after each, and what its gradient needs."""
    net, memories, tapes = clipped_by_hand.part(parameters, "memory"), [], []
    for seen, begun in zip(observation, begins, strict=True):
        encoded = encode(parameters, seen)
        memory, tape = cell(net, encoded[-1], np.where(begun[:, None], 0, memory))
        memories.append(memory)
        tapes.append((encoded, tape))
    return np.array(memories), tapes


def value_of(parameters, memory):
    return clipped_by_hand.tanh_forward(clipped_by_hand.part(parameters, "critic"), memory)[-1][..., 0]


def input_slope(net, activations, slope):
    """The slope in the inputs of a perceptron, from that in its outputs."""
    for layer in reversed(range(len(net) // 2)):
        if layer < len(net) // 2 - 1:
            slope = slope * (1 - activations[layer + 1] ** 2)
        slope = slope @ net[f"kernel_{layer}"][0].T
    return slope


def slow_update(parameters, adam, sequences, config, rate):
    """One minibatch of environments, all gradients by hand and back through time; returns parameters and the loss."""
    memory, begins, batch = sequences["memory"], sequences["begins"], sequences
    steps, rows = begins.shape
    memories, tapes = remember(parameters, memory, batch["observation"], begins)
    inputs, count = memories.reshape(steps * rows, -1), steps * rows
    one = {name: batch[name].reshape(count, *batch[name].shape[2:]) for name in
           ("action", "log_density", "value", "advantage", "target")}  # fmt: skip
    # The losses at every step of every environment, as of rows that have nothing to do with each other.
    actor, critic = (clipped_by_hand.part(parameters, name) for name in ("actor", "critic"))
    on_actor, on_critic = (clipped_by_hand.tanh_forward(net, inputs) for net in (actor, critic))
    head, value = on_actor[-1], on_critic[-1][:, 0]
    advantage = (one["advantage"] - one["advantage"].mean()) / (one["advantage"].std() + 1e-8)
    gradient = {}
    if "log_std" in parameters:
        std = np.exp(parameters["log_std"])
        noise = (one["action"] - head) / std
        log_density = (-0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(1)
        entropy = np.full(count, (np.log(std) + 0.5 * np.log(2 * np.pi * np.e)).sum())
        head_slope, entropy_slope = noise / std, np.zeros_like(head)
    else:
        masses = by_hand.softmax(head)
        taken = np.eye(head.shape[1])[one["action"].astype(int)]
        log_density = np.log((masses * taken).sum(1))
        entropy = -(masses * np.log(masses)).sum(1)
        head_slope, entropy_slope = taken - masses, -masses * (np.log(masses) + entropy[:, None])
    ratio = np.exp(log_density - one["log_density"])
    held = np.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    alive = (ratio * advantage <= held * advantage) * ratio * advantage  # d/d log density
    at_actor = -(alive[:, None] * head_slope) / count - config.entropy_weight * entropy_slope / count
    if "log_std" in parameters:
        gradient["log_std"] = -(alive[:, None] * (noise**2 - 1)).mean(0) - config.entropy_weight
    near = one["value"] + np.clip(value - one["value"], -config.clip_range, config.clip_range)
    plain, cut = (value - one["target"]) ** 2, (near - one["target"]) ** 2
    cut = cut if config.clip_values else plain
    inside = np.abs(value - one["value"]) < config.clip_range
    at_value = np.where(plain >= cut, value - one["target"], (near - one["target"]) * inside)
    at_critic = (config.value_weight * at_value / count)[:, None]
    for name, net, activations, slope in (
        ("actor", actor, on_actor, at_actor), ("critic", critic, on_critic, at_critic)
    ):  # fmt: skip
        found = clipped_by_hand.tanh_backward(net, activations, slope)
        gradient |= {f"{name}/{key}": x for key, x in found.items()}
    at_memories = input_slope(actor, on_actor, at_actor) + input_slope(critic, on_critic, at_critic)
    at_memories = at_memories.reshape(memories.shape)
    # Back through time: what a memory is worth to its own step, and to the next one of the same episode.
    net, encoder = (clipped_by_hand.part(parameters, name) for name in ("memory", "encoder"))
    gradient |= {f"{name}/{key}": 0.0 for name, of in (("memory", net), ("encoder", encoder)) for key in of}
    later = np.zeros_like(at_memories[0])
    for step in reversed(range(steps)):
        encoded, tape = tapes[step]
        found, at_features, before = cell_backward(net, tape, at_memories[step] + later)
        later = np.where(begins[step][:, None], 0, before)
        for key, x in found.items():
            gradient[f"memory/{key}"] = gradient[f"memory/{key}"] + x
        found = clipped_by_hand.tanh_backward(encoder, encoded, at_features * (1 - encoded[-1] ** 2))
        for key, x in found.items():
            gradient[f"encoder/{key}"] = gradient[f"encoder/{key}"] + x
    policy_loss = -np.minimum(ratio * advantage, held * advantage).mean()
    value_loss = 0.5 * np.maximum(plain, cut).mean()
    loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy.mean()
    moved, norm = adam.step(parameters, gradient, rate, config.adam_epsilon, config.gradient_bound)
    return moved, {
        "loss": loss, "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy.mean(),
        "gradient_norm": norm, "clipped_ratios": (np.abs(ratio - 1) > config.clip_range).mean(),
        "approximate_kl": (ratio - 1 - np.log(ratio)).mean(),
    }  # fmt: skip


# -- whole iterations against loops in numpy ---------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("clip_values", [True, False])
def test_iterations_equal_loops_in_numpy(kind, clip_values, monkeypatch):
    """Three rollouts, all minibatches of both epochs. Observations, actions and flags are taken from the program; what
    was remembered, expected and how likely actions were is by hand."""
    agent, config = agent_of(kind, clip_values=clip_values, annealing_steps=3 * 36, clip_range=0.05, learning_rate=0.05)
    seen = []
    plain = ppo_memory.rollouts.collect

    def recorded(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(ppo_memory.rollouts, "collect", recorded)
    step, state = by_hand.quick(agent.step), by_hand.quick(agent.init)(jax.random.key(3))
    parameters, memory = flat(state.learner.parameters), np.zeros((4, 4))
    adam, sums, ends, clipped = clipped_by_hand.Adam(parameters), np.zeros(4), [], []
    for iteration in range(3):
        key = jax.random.split(jax.random.clone(state.key), 3)[2]
        before, (state, metrics) = state, step(state)
        jax.effects_barrier()
        lived, (action, log_density, value, memories) = seen[-1]
        done = lived.terminated | lived.truncated
        ends.append((lived.terminated.sum(), lived.truncated.sum()))

        def seen_as(x, statistics=before.normalizer):
            if statistics is None:
                return x.astype(np.float64)
            deviation = np.sqrt(np.asarray(statistics.variance, np.float64) + 1e-8)
            return np.clip((x - np.asarray(statistics.mean, np.float64)) / deviation, -10, 10)

        reward = lived.reward.astype(np.float64)
        if config.normalize_rewards:
            for t in range(config.num_steps):
                sums = np.where(done[t], 0, config.discount * sums + reward[t])
            np.testing.assert_allclose(state.scale.sums, sums, rtol=1e-4, atol=1e-5)
            reward = np.clip(reward / np.sqrt(float(state.scale.statistics.variance) + 1e-8), -10, 10)
        observation, following = seen_as(lived.observation), seen_as(lived.next_observation)
        # As the policy went through the rollout, step by step; the last one's ends cut the memory of the next rollout.
        begins = np.concatenate([np.zeros_like(done[:1]), done[:-1]])
        start, (by_steps, _) = memory, remember(parameters, memory, observation, begins)
        np.testing.assert_allclose(memories, by_steps, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(before.interaction.memory, start, rtol=1e-3, atol=1e-4)
        memory = np.where(done[-1][:, None], 0, by_steps[-1])
        np.testing.assert_allclose(value, value_of(parameters, by_steps), rtol=2e-3, atol=2e-4)
        value = value_of(parameters, by_steps)
        # Of the true successor, with the memory of all before it.
        next_value = np.array([
            value_of(parameters, remember(parameters, one, x[None], np.zeros((1, 4), bool))[0][0])
            for one, x in zip(by_steps, following, strict=True)
        ])  # fmt: skip
        advantage = np.asarray(returns.gae(
            *map(jnp.asarray, (reward, value, next_value, lived.terminated, lived.truncated)), config.discount,
            config.gae_decay,
        ), np.float64)  # fmt: skip
        target, rate = advantage + value, config.learning_rate * (1 - iteration / 3)
        unit = 1 if before.scale is None else np.sqrt(float(state.scale.statistics.variance) + 1e-8)
        np.testing.assert_allclose(metrics["target"].total / 36, unit * target.mean(), rtol=1e-3, atol=1e-4)
        batch = {
            "observation": observation, "action": action, "log_density": log_density, "value": value,
            "advantage": advantage, "target": target, "begins": begins,
        }  # fmt: skip
        found = []
        for epoch in range(config.num_epochs):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.clone(key), epoch), 4))
            for numbers in order.reshape(config.num_minibatches, -1):
                one = {name: x[:, numbers] for name, x in batch.items()} | {"memory": start[numbers]}
                parameters, metric = slow_update(parameters, adam, one, config, rate)
                found.append(metric)
        clipped += [x["clipped_ratios"] for x in found]
        for name, expected in parameters.items():
            np.testing.assert_allclose(
                flat(state.learner.parameters)[name], expected, rtol=3e-3, atol=1e-4, err_msg=name
            )
        for name in found[0]:
            actual = float(metrics[name].total / metrics[name].count)
            np.testing.assert_allclose(actual, np.mean([x[name] for x in found]), rtol=1e-2, atol=3e-4, err_msg=name)
    assert np.sum(ends, axis=0).min() > 0  # terminations and time limits were seen
    assert 0 < np.mean(clipped) < 1
    assert np.abs(start).max() > 0.05  # the last rollout began with something to remember


def test_gradients_by_hand_are_those_of_differences():
    """What the test above relies on, in float64: the loss at parameters that differ a little."""
    rng = np.random.default_rng(0)
    agent, config = agent_of("choice", clip_range=0.3, gradient_bound=1e9, learning_rate=1.0)
    parameters = flat(by_hand.quick(agent.init)(jax.random.key(1)).learner.parameters)
    parameters = {name: x + 0.1 * rng.normal(size=x.shape) for name, x in parameters.items()}
    sequences = {
        "memory": rng.normal(size=(2, 4)), "begins": rng.random((5, 2)) < 0.3, "action": rng.integers(0, 3, (5, 2)),
        "observation": rng.normal(size=(5, 2, 3)), "log_density": np.log(rng.uniform(0.3, 0.4, (5, 2))),
        **{name: rng.normal(size=(5, 2)) for name in ("value", "advantage", "target")},
    }  # fmt: skip
    assert 0 < sequences["begins"][1:].mean() < 1

    class Gives:
        def step(self, parameters, gradient, *_):
            return gradient, 0.0

    gradient, _ = slow_update(parameters, Gives(), sequences, config, 0.0)
    for name, slope in gradient.items():
        place = np.unravel_index(np.abs(slope).argmax(), slope.shape)
        losses = []
        for change in (1e-5, -1e-5):
            moved = parameters[name].copy()
            moved[place] += change
            losses.append(slow_update(parameters | {name: moved}, Gives(), sequences, config, 0.0)[1]["loss"])
        assert slope[place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4), name


# -- what the first minibatch sees -------------------------------------------------------------------------------------


def forgets(sequences):
    """Sequences that run from a memory of nothing."""
    return sequences._replace(memory=jnp.zeros_like(sequences.memory))


def cuts_late(sequences):
    """Flags of the ends and not of the beginnings: the memory is cut one step early, and kept into the next episode."""
    return sequences._replace(begins=jnp.roll(sequences.begins, -1, axis=0))


def never_cuts(sequences):
    return sequences._replace(begins=jnp.zeros_like(sequences.begins))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("continuous", None), ("choice", None), ("choice", forgets), ("choice", cuts_late), ("choice", never_cuts)],
)
def test_the_first_minibatch_sees_the_policy_that_acted(kind, fault, monkeypatch):
    """Ratios of 1: nothing is clipped, and no divergence; each fault is seen, by a policy that hangs on its memory."""
    agent, _ = agent_of(kind, num_epochs=1, num_minibatches=1, num_steps=8, normalize_rewards=False)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    actor = state.learner.parameters["params"]["actor"]["layers"]
    actor["kernel_1"] = 200 * actor["kernel_1"]
    plain = ppo_memory.rollouts.epochs
    if fault:
        monkeypatch.setattr(
            ppo_memory.rollouts, "epochs", lambda update, learner, data, *more, **options: plain(
                update, learner, fault(data), *more, **options
            ),
        )  # fmt: skip
    step, kl = by_hand.quick(agent.step), []
    for _ in range(3):
        state, metrics = step(state)
        kl.append(abs(float(metrics["approximate_kl"].total)))
        assert fault or metrics["clipped_ratios"].total == 0
    assert max(kl) < 1e-6 if fault is None else max(kl) > 1e-4, kl


# -- how it acts ------------------------------------------------------------------------------------------------------


@every_kind
def test_it_acts_by_the_mode_of_what_it_remembers(kind):
    """Step by step as over a whole sequence, and the program that it is exported as."""
    agent, config = agent_of(kind)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    actor = state.learner.parameters["params"]["actor"]["layers"]
    actor["kernel_1"] = 200 * actor["kernel_1"]
    observation = jax.random.normal(jax.random.key(5), (6, 50, 3))
    network = ppo_memory.Network(config.hidden, 4, 3 if kind == "choice" else 2, kind == "continuous")
    memory = agent.policy.start(50)
    np.testing.assert_array_equal(memory, np.zeros((50, 4)))
    memories, law, _ = network.apply(state.learner.parameters, memory, observation, jnp.zeros((6, 50), bool))
    mode = law.mode() if kind == "choice" else jnp.clip(law.mode(), -1, 1)
    program = jax.export.deserialize(bytearray(portable.export_program(agent, state, observation[0, 0])))
    for t in range(6):
        exported, (remembered,) = program.call(observation[t], [memory])
        action, memory = agent.policy.act(state, observation[t], memory, jax.random.key(t))
        np.testing.assert_allclose(memory, memories[t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(action, mode[t], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(exported, action, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(remembered, memory, rtol=1e-4, atol=1e-5)
    forgetful, _ = agent.policy.act(state, observation[5], agent.policy.start(50), jax.random.key(0))
    assert (np.asarray(forgetful) != np.asarray(action)).mean() > 0.05
    assert agent.claim is agent.export is None


def test_images_pass_a_torso():
    agent, _ = by_hand.agent_on(ppo_memory, by_hand.Pictures(), **(TINY | {"hidden": (7,)}))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    assert set(state.learner.parameters["params"]) == {"torso", "memory", "actor", "critic"}
    assert jax.tree.structure(jax.eval_shape(agent.step, state)[0]) == jax.tree.structure(state)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_minibatches_must_divide_the_environments():
    with pytest.raises(ValueError, match="--num-minibatches is 3; it must divide --num-envs = 8"):
        agent_of("choice", num_envs=8, num_minibatches=3)


def test_defaults_are_purejaxrls():
    config = dataclasses.asdict(ppo_memory.Config())
    assert (config["num_envs"], config["num_steps"], config["num_epochs"], config["num_minibatches"]) == (4, 128, 4, 4)
    assert (config["learning_rate"], config["discount"], config["gae_decay"]) == (2.5e-4, 0.99, 0.95)
    assert (config["hidden"], config["memory_size"]) == ((128,), 128)


def test_an_even_policy_at_the_start():
    agent, _ = agent_of("choice")
    state = by_hand.quick(agent.init)(jax.random.key(0))
    network = ppo_memory.Network((5,), 4, 3, False)
    observation, begins = jax.random.normal(jax.random.key(0), (6, 2, 3)), jnp.zeros((6, 2), bool)
    _, law, value = network.apply(state.learner.parameters, jnp.zeros((2, 4)), observation, begins)
    np.testing.assert_allclose(law.entropy(), np.full((6, 2), np.log(3)), atol=1e-3)
    assert value.shape == (6, 2)
    assert np.std(value) > 0


def test_presets_are_of_environments_that_hide_something():
    for env_id in ppo_memory.PRESETS:
        env, params = envs.make(env_id)
        assert env.observation_space(params).shape in ((3,), (2,))

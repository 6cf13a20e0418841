"""Q#: the sheet's exact numbers, whole updates in numpy, what rollouts it learns from, and how it decodes."""

import dataclasses
import itertools
import re

import by_hand
import clipped_by_hand
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_by_hand
from scipy.special import log_softmax

from jaxrl_dist import envs
from jaxrl_dist.algorithms.sequences import q_sharp
from jaxrl_dist.distributional import categorical
from jaxrl_dist.envs.tokens import StarGraph, TokenTree
from jaxrl_dist.learning import interaction
from jaxrl_dist.running import evaluation

# -- exact numbers ----------------------------------------------------------------------------------------------------

SUCCESS = categorical.support(0.0, 1.0, 2)


def guided_tree(tree, eta, guide="q_sharp", support=SUCCESS):
    """The guided policy of a tree whose laws are known, by place, and Q* / eta or what stands for it."""
    policies, bonuses = [], []
    for place, reference in enumerate(tree.law):
        masses = np.stack([tree.expectation(tree.rewards == z, place + 1) for z in np.asarray(support)], axis=-1)
        with np.errstate(divide="ignore"):
            bonus = q_sharp.guidance(jnp.log(masses), support, eta, guide)
        policies.append(np.exp(q_sharp.guided(jnp.log(reference), bonus, 1.0, 0)))
        bonuses.append(np.asarray(bonus))
    return policies, bonuses


def judged(tree, policies):
    """Of a policy by place: the law of whole sequences, its mean reward, and its divergence from the reference."""
    whole = np.ones(())
    for one in policies:
        whole = whole[..., None] * np.asarray(one, np.float64)
    reference, likely = tree.probabilities(), whole > 0
    divergence = (whole[likely] * np.log(whole[likely] / reference[likely])).sum()
    return whole, (whole * tree.rewards).sum(), divergence


@pytest.mark.parametrize(
    ("eta", "first_values", "value", "first", "reward", "divergence"),
    [
        (1.0, [0.620115, 0.158565], 0.502560, [0.787320, 0.212680], 0.624912, 0.122353),
        (0.5, [0.716890, 0.247014], 0.615965, [0.856565, 0.143435], 0.819128, 0.406326),
        (0.1, [0.930690, 0.769782], 0.903249, [0.921026, 0.078974], 0.999926, 0.966769),
    ],
)
def test_the_tree_of_the_sheet(eta, first_values, value, first, reward, divergence):
    tree = TokenTree()
    policies, bonuses = guided_tree(tree, eta)
    np.testing.assert_allclose(eta * bonuses[0], first_values, atol=1e-6)
    np.testing.assert_allclose(policies[0], first, atol=1e-6)
    if eta == 1:
        np.testing.assert_allclose(policies[1][:, 1], [0.731059, 0.231969], atol=1e-6)
    whole, earned, far = judged(tree, policies)
    assert earned == pytest.approx(reward, abs=2e-6)
    assert far == pytest.approx(divergence, abs=2e-6)
    assert earned - eta * far == pytest.approx(value, abs=2e-6)
    tilted = tree.probabilities() * np.exp(tree.rewards / eta)
    np.testing.assert_allclose(whole, tilted / tilted.sum(), atol=1e-6)
    assert eta * np.log((tree.law[0] * np.exp(np.array(first_values) / eta)).sum()) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("eta", "first", "objective"), [(1.0, 0.776832, 0.502235), (0.5, 0.838526, 0.615325), (0.1, 0.992212, 0.897666)]
)
def test_cd_commits_too_soon(eta, first, objective):
    tree = TokenTree()
    policies, _ = guided_tree(tree, eta, "cd")
    assert policies[0][0] == pytest.approx(first, abs=1e-6)
    _, earned, far = judged(tree, policies)
    assert earned - eta * far == pytest.approx(objective, abs=2e-6)
    best = judged(tree, guided_tree(tree, eta)[0])
    assert earned - eta * far < best[1] - eta * best[2]


def random_tree(seed=0, atoms=5):
    generator = np.random.default_rng(seed)
    tables = [generator.dirichlet(np.ones(3), (3,) * place) for place in range(3)]
    return TokenTree(tables, generator.integers(0, atoms, (3, 3, 3)) / (atoms - 1))


@pytest.mark.parametrize("eta", [2.0, 0.3, 0.05])
def test_any_tree_is_tilted_by_its_reward(eta):
    """Three places, rewards on five atoms: the product of the choices token by token is the best law of sequences."""
    tree, support = random_tree(), categorical.support(0.0, 1.0, 5)
    whole, earned, far = judged(tree, guided_tree(tree, eta, support=support)[0])
    tilted = tree.probabilities() * np.exp(tree.rewards / eta)
    np.testing.assert_allclose(whole, tilted / tilted.sum(), atol=2e-6)
    assert earned - eta * far == pytest.approx(eta * np.log(tilted.sum()), abs=1e-5)


def bonus_of(masses, support, eta):
    return float(eta * q_sharp.guidance(jnp.log(jnp.array(masses)), support, eta, "q_sharp"))


def test_log_moments_by_hand():
    assert bonus_of([0.5, 0.5], SUCCESS, 0.1) == pytest.approx(0.930690, abs=1e-6)
    assert bonus_of([0.9, 0.1], SUCCESS, 0.1) == pytest.approx(0.769782, abs=1e-6)
    assert bonus_of(np.full(11, 1 / 11), categorical.support(0.0, 1.0, 11), 0.1) == pytest.approx(0.806076, abs=1e-6)
    # A large eta has the mean, a small one what can be had at all.
    assert bonus_of([0.7, 0.3], SUCCESS, 1e3) == pytest.approx(0.3, abs=1e-3)
    assert bonus_of([1 - 1e-4, 1e-4], SUCCESS, 1e-3) == pytest.approx(1, abs=0.01)
    assert bonus_of([1.0, 0.0], SUCCESS, 1e-3) == 0
    # At least the mean, and more the smaller eta is (Jensen).
    values = [bonus_of([0.2, 0.5, 0.3], categorical.support(0.0, 1.0, 3), eta) for eta in (1.0, 0.3, 0.1, 0.03)]
    assert values[0] > 0.55
    assert (np.diff(values) > 0).all()


def test_rare_successes_and_steep_logits_stay_finite():
    assert bonus_of([1 - 1e-12, 1e-12], SUCCESS, 0.01) == pytest.approx(0.01 * np.log(1e-12 * np.exp(100)), rel=1e-4)
    for logit in (-50.0, 50.0):
        slope = jax.grad(lambda x: q_sharp.guidance(jax.nn.log_softmax(jnp.stack([0.0, x])), SUCCESS, 0.01, "q_sharp"))(
            logit
        )
        assert np.isfinite(slope)
    assert np.isfinite(q_sharp.guidance(jnp.array([0.0, -jnp.inf]), SUCCESS, 0.1, "cd"))


@pytest.mark.parametrize(("arms", "share"), [(2, 0.999955), (3, 0.999909), (5, 0.999818)])
def test_a_star_whose_first_hop_is_known(arms, share):
    log_masses = jnp.where(jnp.eye(2, dtype=bool)[jnp.array([1] + [0] * (arms - 1))], 0.0, -jnp.inf)
    bonus = q_sharp.guidance(log_masses, SUCCESS, 0.1, "q_sharp")
    found = jnp.exp(q_sharp.guided(jnp.full(arms, -jnp.log(arms)), bonus, 1.0, 0))
    assert found[0] == pytest.approx(share, abs=1e-6)


def test_fewer_tokens_to_choose_from():
    """The third is the best, and no choice among the two likeliest."""
    reference, bonus = jnp.log(jnp.array([0.6, 0.39, 0.01])), jnp.array([0.0, 0.0, 10.0])
    np.testing.assert_allclose(
        jnp.exp(q_sharp.guided(reference, bonus, 1.0, 0)), [0.002712, 0.001763, 0.995526], atol=1e-6
    )
    np.testing.assert_allclose(jnp.exp(q_sharp.guided(reference, bonus, 1.0, 2)), [0.6 / 0.99, 0.39 / 0.99, 0.0])
    np.testing.assert_array_equal(q_sharp.guided(reference, bonus, 1.0, 3), q_sharp.guided(reference, bonus, 1.0, 0))
    cooler = jnp.exp(q_sharp.guided(reference, jnp.zeros(3), 0.5, 0))
    np.testing.assert_allclose(cooler, np.array([0.36, 0.1521, 0.0001]) / 0.5122, rtol=1e-4)


def test_counted_laws_of_rollouts():
    """1e5 completions of the sheet's tree: shares instead of laws change the policy by less than 0.01."""
    tree = TokenTree()
    drawn = np.asarray(jax.vmap(tree.attempt, (0, None))(jax.random.split(jax.random.key(0), 100_000), None))
    counted = np.array([tree.rewards[tuple(x)] for x in drawn])
    for eta, first in ((1.0, 0.787320), (0.5, 0.856565), (0.1, 0.921026)):
        success = jnp.array([counted[drawn[:, 0] == token].mean() for token in range(2)])
        bonus = q_sharp.guidance(jnp.log(jnp.stack([1 - success, success], -1)), SUCCESS, eta, "q_sharp")
        found = jnp.exp(q_sharp.guided(jnp.log(jnp.array(tree.law[0])), bonus, 1.0, 0))[0]
        assert found == pytest.approx(first, abs=0.01)


def test_losses_by_hand():
    """Two sequences of two tokens; of the second only the first counts."""
    masses = np.array([[[0.5, 0.5], [0.2, 0.8]], [[0.9, 0.1], [0.01, 0.99]]])
    target, counts = jnp.array([[0.0, 1.0], [0.75, 0.25]]), jnp.array([[1, 1], [1, 0]])
    expected = -(np.log(0.5) + np.log(0.8) + 0.75 * np.log(0.9) + 0.25 * np.log(0.1)) / 3
    loss, slope = jax.value_and_grad(q_sharp.loss_of)(jnp.log(masses), target, counts)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(slope[1, 1], [0, 0])
    assert q_sharp.loss_of(jnp.log(masses), target, 0 * counts) == 0
    chosen = jnp.array([[1, 0], [0, 1]])
    expected = -(np.log(0.5) + np.log(0.2) + np.log(0.9)) / 3
    assert q_sharp.imitation_loss(jnp.log(masses), chosen, counts) == pytest.approx(expected, rel=1e-5)


# -- whole updates against numpy --------------------------------------------------------------------------------------

TINY = {
    "num_envs": 5, "pretraining": 40, "pretraining_batch": 6, "pretraining_learning_rate": 0.03, "weight_decay": 0.2,
    "learning_rate": 0.02, "gradient_bound": 0.3, "width": 8, "num_blocks": 2, "num_heads": 2, "num_atoms": 3,
    "eta": 0.5,
}  # fmt: skip


def tiny(env, **settings):
    """The agent of a small configuration, and that."""
    return by_hand.agent_on(q_sharp, env, **(TINY | settings))


def averages(metrics):
    return {name: float(x.total / x.count) for name, x in metrics.items()}


class AdamW(clipped_by_hand.Adam):
    """With weights that decay by themselves."""

    def step(self, parameters, gradient, rate, bound, decay=0.0):
        moved, norm = super().step(parameters, gradient, rate, 1e-8, bound)
        return {name: x - rate * decay * parameters[name] for name, x in moved.items()}, norm


def same(parameters, expected):
    for name, x in transformer_by_hand.weights_of(parameters).items():
        np.testing.assert_allclose(x, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)


def rises_and_falls(count, total):
    """The rate of update number `count` from 0, of a largest one of 1."""
    warmup = min(200, total // 10)
    if count < warmup:
        return count / warmup
    return 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (count - warmup) / (total - warmup)))


def test_pretraining_equals_numpy():
    """Six updates of AdamW on demonstrations of which some end early; the value network is a copy but for its head."""
    env = envs.make("token/countdown3")[0]
    agent, config = tiny(env)
    state, pretrain = by_hand.quick(agent.init)(jax.random.key(3)), by_hand.quick(agent.pretrain)
    expected, own = (transformer_by_hand.weights_of(x.parameters) for x in state.learner)
    optimizer, demonstrate = AdamW(expected), by_hand.quick(jax.vmap(env.demonstrate, (0, None)))
    for update in range(6):
        batch_key = jax.random.split(jax.random.clone(state.key))[1]
        keys = jax.random.split(batch_key, config.pretraining_batch)
        prompts, completions = demonstrate(keys, env.default_params)
        completions = np.asarray(completions)
        tokens = np.concatenate([prompts, completions], axis=1)
        state, metrics = pretrain(state)
        outputs, tape = transformer_by_hand.forward(expected, tokens[:, :-1], config.num_heads)
        log_likely = log_softmax(outputs[:, 5:], axis=-1)  # behind the prompt's last token, and on
        counts = np.cumsum(completions == 14, axis=1) - (completions == 14) == 0
        hit = np.eye(15)[completions]
        slope = np.zeros_like(outputs)
        slope[:, 5:] = (np.exp(log_likely) - hit) * counts[..., None] / counts.sum()
        gradient = transformer_by_hand.backward(expected, tape, slope)
        rate = config.pretraining_learning_rate * rises_and_falls(update, 40)
        expected, _ = optimizer.step(expected, gradient, rate, config.gradient_bound, config.weight_decay)
        same(state.learner.reference.parameters, expected)
        same(state.learner.value.parameters, expected | {"head_kernel": own["head_kernel"]})
        found = averages(metrics)
        likely = (log_likely * hit).sum(-1)
        assert found["imitation_loss"] == pytest.approx(-(likely * counts).sum() / counts.sum(), rel=1e-4)
        right = ((log_likely.argmax(-1) == completions) & counts).sum() / counts.sum()
        assert found["imitation_accuracy"] == pytest.approx(right, abs=1e-5)


def recorded(monkeypatch):
    """What rollouts brought, in the order in which they were made."""
    seen, plain = [], q_sharp.rollouts.collect

    def collect(*arguments, **options):
        now, rollout, episodes = plain(*arguments, **options)
        jax.debug.callback(lambda x: seen.append(jax.tree.map(np.asarray, x)), rollout.transition, ordered=True)
        return now, rollout, episodes

    monkeypatch.setattr(q_sharp.rollouts, "collect", collect)
    return seen


@pytest.mark.parametrize("roll_in", ["reference", "guided"])
def test_updates_equal_numpy(roll_in, monkeypatch):
    """Four of them on a tree of three places with graded rewards, some of them between atoms: tokens are taken from the
    program; targets, what counts, gradients and Adam are by hand."""
    env, seen = random_tree(3), recorded(monkeypatch)
    agent, config = tiny(env, roll_in=roll_in)
    state, step = by_hand.quick(agent.init)(jax.random.key(3)), by_hand.quick(agent.step)
    expected = transformer_by_hand.weights_of(state.learner.value.parameters)
    untouched = state.learner.reference
    optimizer, partly = AdamW(expected), []
    for _ in range(4):
        switch_key = jax.random.split(jax.random.clone(state.key), 4)[2]
        state, metrics = step(state)
        jax.effects_barrier()
        lived = seen[-1]
        completion, returns = lived.action.T, lived.reward.sum(0)
        np.testing.assert_allclose(returns, [env.rewards[tuple(x)] for x in completion])
        switch = np.asarray(jax.random.randint(switch_key, (5,), 0, 3)) if roll_in == "guided" else np.zeros(5, int)
        counts = np.arange(3) >= switch[:, None] - 1
        partly.append((~counts).any())
        target = np.maximum(1 - np.abs(returns[:, None] - [0.0, 0.5, 1.0]) / 0.5, 0)
        tokens = np.concatenate([np.zeros((5, 1), int), completion], axis=1)
        outputs, tape = transformer_by_hand.forward(expected, tokens[:, :-1], config.num_heads)
        logits = outputs.reshape(5, 3, 3, 3)[np.arange(5)[:, None], np.arange(3), completion]
        log_masses = log_softmax(logits, axis=-1)
        slope = np.zeros((5, 3, 3, 3))
        slope[np.arange(5)[:, None], np.arange(3), completion] = (
            (np.exp(log_masses) - target[:, None]) * counts[..., None] / counts.sum()
        )
        gradient = transformer_by_hand.backward(expected, tape, slope.reshape(outputs.shape))
        expected, norm = optimizer.step(expected, gradient, config.learning_rate, config.gradient_bound)
        same(state.learner.value.parameters, expected)
        found = averages(metrics)
        loss = -((target[:, None] * log_masses).sum(-1) * counts).sum() / counts.sum()
        mean = (np.exp(log_masses) * [0.0, 0.5, 1.0]).sum(-1)
        assert found == pytest.approx({
            "loss": loss, "value": mean[counts].mean(), "target": returns.mean(), "clipped_mass": 0.0,
            "gradient_norm": norm, "episode_return": returns.mean(), "episode_length": 3.0,
        }, rel=1e-3, abs=1e-5)  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, state.learner.reference, untouched)
    assert any(partly) == (roll_in == "guided")
    assert len({*returns}) > 1


def test_gradients_by_hand_are_those_of_differences():
    """What the two tests above rely on."""
    generator, shape = np.random.default_rng(0), {"token_kernel": (4, 6), "place_kernel": (5, 6)}
    shape |= {"attention_kernel": (2, 6, 18), "output_kernel": (2, 6, 6), "inner_kernel": (2, 6, 24)}
    shape |= {"outer_kernel": (2, 24, 6), "inner_bias": (2, 24), "outer_bias": (2, 6), "head_kernel": (6, 3)}
    shape |= {"attention_scale": (2, 6), "mlp_scale": (2, 6), "head_scale": (6,)}
    weights = {name: generator.normal(size=x) for name, x in shape.items()}
    tokens, slope = generator.integers(0, 4, (3, 5)), generator.normal(size=(3, 5, 3))
    gradient = transformer_by_hand.backward(weights, transformer_by_hand.forward(weights, tokens, 2)[1], slope)
    for name, x in weights.items():
        place = np.unravel_index(np.abs(gradient[name]).argmax(), x.shape)
        found = []
        for change in (1e-6, -1e-6):
            moved = x.copy()
            moved[place] += change
            found.append((transformer_by_hand.forward(weights | {name: moved}, tokens, 2)[0] * slope).sum())
        assert gradient[name][place] == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5), name


# -- what is learned from ---------------------------------------------------------------------------------------------


def test_completions_that_end_early_count_to_their_end(monkeypatch):
    """An untrained reference writes the end anywhere; of the episode that follows nothing is learned."""
    env, seen = envs.make("token/countdown3")[0], recorded(monkeypatch)
    agent, _ = tiny(env, num_envs=64)
    state = by_hand.quick(agent.init)(jax.random.key(0))
    _, metrics = by_hand.quick(agent.step)(state)
    jax.effects_barrier()
    done = seen[0].terminated.T
    lengths = np.where(done.any(1), done.argmax(1) + 1, 6)
    assert len({*lengths}) > 3
    assert averages(metrics)["episode_length"] == pytest.approx(lengths.mean())
    assert metrics["value"].count == lengths.sum()
    assert done.sum() > 64  # some have ended twice


def test_an_episode_that_a_time_limit_cuts_says_nothing():
    env = random_tree()
    config = dataclasses.replace(q_sharp.Config(), **TINY)
    agent = q_sharp.make_agent(config, env, env.default_params.replace(max_steps_in_episode=2))
    state = by_hand.quick(agent.init)(jax.random.key(0))
    after, metrics = by_hand.quick(agent.step)(state)
    assert metrics["loss"].total == metrics["value"].count == 0
    jax.tree.map(np.testing.assert_array_equal, after.learner.value.parameters, state.learner.value.parameters)


# -- what it learns ---------------------------------------------------------------------------------------------------

GRADED = {
    "num_envs": 256, "pretraining": 600, "width": 16, "num_blocks": 1, "num_heads": 2, "learning_rate": 3e-3,
    "pretraining_learning_rate": 1e-2, "num_atoms": 5, "eta": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["reference", "guided"])
def trained(request):
    """On a tree of three places and five rewards: the tree, the agent, its configuration, and its state."""
    tree = random_tree()
    agent, config = by_hand.agent_on(q_sharp, tree, **GRADED, roll_in=request.param)

    @jax.jit
    def train(key):
        state = jax.lax.fori_loop(0, config.pretraining, lambda _, x: agent.pretrain(x)[0], agent.init(key))
        return jax.lax.fori_loop(0, 1_000, lambda _, x: agent.step(x)[0], state)

    return tree, agent, config, train(jax.random.key(0))


def prefixes(tree, places):
    """Observations of all prefixes of so many tokens, and those."""
    found = np.array([*itertools.product(range(3), repeat=places)], int)
    rows = np.zeros((len(found), 5))
    rows[:, 1 : 1 + places], rows[:, 4] = found, 1 + places
    return jnp.array(rows, jnp.int32), found


def test_laws_are_those_of_the_reference(trained):
    """Whatever the tokens before were chosen by: not those of the guided policy, which are far from them."""
    tree, agent, _, state = trained
    support, errors, gaps = np.linspace(0, 1, 5), [], []
    for places in range(3):
        observation, _ = prefixes(tree, places)
        reached = tree.probabilities().reshape((3,) * (places + 1) + (-1,)).sum(-1)
        exact = np.stack([tree.expectation(tree.rewards == z, places + 1) for z in support], axis=-1)
        tilted = exact * np.exp(support / 0.2)
        far = 0.5 * np.abs(tilted / tilted.sum(-1, keepdims=True) - exact).sum(-1)
        for token in range(3):
            masses = agent.claim.law(state, observation, jnp.full(len(observation), token)).masses
            error = 0.5 * np.abs(masses - exact[..., token, :].reshape(-1, 5)).sum(-1)
            errors.append((reached[..., token].ravel() * error).sum())
        gaps.append((reached * far).sum())
    # Total variation, in the mean over what the reference writes: of each of the three places.
    errors = np.reshape(errors, (3, 3)).sum(1)
    assert (errors < 0.1).all(), errors
    assert min(gaps[:2]) > 0.2, gaps  # to those of the guided policy


def test_the_guided_policy_is_near_the_best(trained):
    tree, agent, config, state = trained
    policies = []
    for places in range(3):
        observation, _ = prefixes(tree, places)
        many = jnp.repeat(observation, 4_000, axis=0)
        action = agent.policy.act(state, many, agent.policy.start(len(many)), jax.random.key(places))[0]
        counts = np.eye(3)[np.asarray(action)].reshape(-1, 4_000, 3).mean(1)
        policies.append(counts.reshape((3,) * places + (3,)))
    _, earned, far = judged(tree, policies)
    best = config.eta * np.log((tree.probabilities() * np.exp(tree.rewards / config.eta)).sum())
    plain = tree.expectation(tree.rewards, 0)
    assert plain + 0.8 * (best - plain) < earned - config.eta * far < best + 0.01


def test_the_claim_holds_against_returns(trained):
    tree, agent, _, state = trained
    found = jax.jit(
        lambda key: evaluation.calibration(
            evaluation.return_distributions(
                agent.claim, tree, evaluation.without_time_limit(tree, tree.default_params), state, key, states=8,
                rollouts=400, horizon=10, spread=8,
            )
        )
    )(jax.random.key(5))  # fmt: skip
    assert found.calibration_w1 < 0.06
    assert abs(found.overestimation) < 0.04
    assert found.calibration_missing == 0


# -- how it acts ------------------------------------------------------------------------------------------------------


def large_weights(state):
    """A state whose networks have opinions."""
    keys = iter(jax.random.split(jax.random.key(7), 40))

    def one(x):
        return x + 0.3 * jax.random.normal(next(keys), x.shape)

    learner = q_sharp.Learner(*(
        trained._replace(parameters=jax.tree.map(one, trained.parameters)) for trained in state.learner
    ))  # fmt: skip
    return state._replace(learner=learner)


@pytest.mark.parametrize("env", [envs.make("token/countdown3")[0], StarGraph()], ids=["countdown", "star"])
def test_tokens_one_by_one_as_without_memory(env):
    agent, _ = tiny(env, decoding="greedy")
    state, params = large_weights(by_hand.quick(agent.init)(jax.random.key(0))), env.default_params
    now = interaction.start(env, params, jax.random.key(1), 30, agent.policy.start)
    act = by_hand.quick(agent.policy.act)
    step = by_hand.quick(
        lambda now, action, memory, key: interaction.step(env, params, now, action, key, memory, agent.policy.start)
    )
    taken = []
    for time in range(2 * env.completion_length + 1):
        keys = jax.random.split(jax.random.key(time), 3)
        forgetful = act(state, now.observation, agent.policy.start(30), keys[0])[0]
        action, memory = act(state, now.observation, now.memory, keys[1])
        np.testing.assert_array_equal(action, forgetful)
        now, lived, _ = step(now, action, memory, keys[2])
        ended = np.asarray(lived.terminated)
        count = np.asarray(now.memory.reference.count)
        np.testing.assert_array_equal(count[ended], 0)  # an episode begins with an empty memory
        np.testing.assert_array_equal(count[~ended], np.asarray(now.observation)[~ended, -1] - 1)
        taken.append(np.asarray(action))
    assert len(np.unique(taken)) > 3


def test_samples_have_the_guided_law_and_greedy_is_its_mode():
    env = TokenTree()
    agent, config = tiny(env, guide="cd", eta=0.2)
    state = large_weights(by_hand.quick(agent.init)(jax.random.key(0)))
    observation = jnp.tile(jnp.array([[0, 0, 0, 1]]), (20_000, 1))
    memory = agent.policy.start(20_000)
    action, _ = by_hand.quick(agent.policy.act)(state, observation, memory, jax.random.key(1))
    weights = [transformer_by_hand.weights_of(x.parameters) for x in state.learner]
    (logits, outputs) = (transformer_by_hand.forward(x, np.zeros((1, 1), int), 2)[0][0, 0] for x in weights)
    masses = np.exp(log_softmax(outputs.reshape(2, 3), axis=-1))
    expected = np.exp(log_softmax(log_softmax(logits) + masses @ [0, 0.5, 1] / config.eta))
    assert np.mean(action) == pytest.approx(expected[1], abs=0.015)
    assert 0.01 < expected[1] < 0.99
    plain, bonus = by_hand.quick(agent.claim.policy)(state, observation, jax.random.key(2))
    assert np.mean(plain) == pytest.approx(np.exp(log_softmax(logits))[1], abs=0.015)
    assert abs(np.mean(plain) - np.mean(action)) > 0.03
    assert not bonus.any()
    learned = by_hand.quick(agent.claim.law)(state, observation[:2], jnp.array([0, 1]))
    np.testing.assert_allclose(learned.masses, masses, rtol=1e-3, atol=1e-5)
    greedy, _ = tiny(env, guide="cd", eta=0.2, decoding="greedy")
    action, _ = by_hand.quick(greedy.policy.act)(state, observation[:3], greedy.policy.start(3), jax.random.key(1))
    assert set(np.asarray(action).tolist()) == {int(expected.argmax())}


def test_only_the_likeliest_tokens_are_chosen():
    env = envs.make("token/countdown3")[0]
    agent, _ = tiny(env, top_k=2, temperature=0.7)
    state = large_weights(by_hand.quick(agent.init)(jax.random.key(0)))
    observation = interaction.start(env, env.default_params, jax.random.key(1), 5).observation
    many, memory = jnp.repeat(observation, 300, axis=0), agent.policy.start(1_500)
    action, _ = by_hand.quick(agent.policy.act)(state, many, memory, jax.random.key(2))
    weights = transformer_by_hand.weights_of(state.learner.reference.parameters)
    logits = transformer_by_hand.forward(weights, np.asarray(observation)[:, :6], 2)[0][:, -1]
    for row, seen in zip(np.argsort(-logits), np.asarray(action).reshape(5, 300), strict=True):
        assert set(seen.tolist()) <= set(row[:2].tolist())


def test_a_run_counts_the_reference_before_it_takes_steps():
    agent, config = tiny(TokenTree())
    assert (agent.clock.pretraining, agent.clock.env_steps, agent.clock.updates) == (40, 10, 1)
    assert agent.clock.iterations(100) == 50
    assert agent.runs_mode == "map"
    assert tiny(TokenTree(), pretraining=0)[0].pretrain is None
    state = jax.eval_shape(agent.init, jax.random.key(0))
    assert jax.tree.structure(jax.eval_shape(agent.pretrain, state)[0]) == jax.tree.structure(state)
    assert config.discount == 1


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 3}, "--num-heads is 3; it must divide --width = 8"),
        ({"v_min": 1.0}, "v_min is 1.0; it must be less than v_max = 1.0"),
        ({"num_atoms": 1}, "num_atoms is 1; it must be at least 2"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(TokenTree(), **settings)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("CartPole-v1", "--env-id is CartPole-v1, whose observations are no tokens; this algorithm needs prompts to"),
        ("Pendulum-v1", "--env-id is Pendulum-v1, whose actions are continuous"),
    ],
)
def test_other_environments_are_refused(env_id, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        q_sharp.make_agent(q_sharp.Config(), *gymnax.make(env_id))


def test_the_presets_are_of_environments():
    assert q_sharp.PRESETS.keys() - {"paper"} <= {*envs.available()["token"]}

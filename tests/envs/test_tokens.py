"""Countdown against brute force in Python, star graphs and trees by hand, and the contract of all of them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist.envs import check_env, make, tokens
from jaxrl_dist.envs.tokens import END, EQUALS, Countdown, StarGraph, TokenTree

COUNTDOWN = Countdown()
ENVIRONMENTS = [Countdown(), StarGraph(), StarGraph(arms=3, length=4, nodes=12), TokenTree()]
every_environment = pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: env.name)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


# -- all of them ------------------------------------------------------------------------------------------------------


@every_environment
def test_they_keep_the_contract(env):
    warnings = check_env(env)
    assert all("time limit not checked" in warning for warning in warnings)  # episodes end before it


@every_environment
def test_solutions_are_right_and_demonstrations_well_formed(env):
    prompts, solutions = jax.vmap(env.draw)(keys(200))
    assert prompts.shape == (200, env.prompt_length)
    assert solutions.shape == (200, env.completion_length)
    reward, well_formed = jax.vmap(env.verify)(prompts, solutions)
    assert (reward == 1).all()
    assert well_formed.all()
    assert ((prompts >= 0) & (prompts < len(env.names))).all()
    prompts, completions = jax.vmap(env.demonstrate, (0, None))(keys(400), env.default_params)
    reward, well_formed = jax.vmap(env.verify)(prompts, completions)
    assert well_formed.all()
    for share in (0.0, 1.0):
        params = env.default_params.replace(solved_share=share)
        reward = jax.vmap(env.verify)(*jax.vmap(env.demonstrate, (0, None))(keys(400), params))[0]
        assert (reward.mean() == 1) == (share == 1)


@every_environment
def test_an_episode_is_the_prompt_its_tokens_and_what_they_earn(env):
    """Solutions and attempts, taken token by token, earn what `verify` says, and leave what was written."""
    params = env.default_params
    reset, step, draw, verify, attempt = map(jax.jit, (env.reset, env.step, env.draw, env.verify, env.attempt))
    earned = []
    for index, key in enumerate(keys(12, 1)):
        reset_key, attempt_key, step_key = jax.random.split(key, 3)
        observation, state = reset(reset_key, params)
        text, count = env.split(observation)
        prompt, completion = draw(jax.random.clone(reset_key))
        np.testing.assert_array_equal(text[: env.prompt_length], prompt)
        completion = attempt(attempt_key, prompt) if index % 2 else completion
        assert count == env.prompt_length
        assert not text[env.prompt_length :].any()
        for place, token in enumerate(np.asarray(completion)):
            observation, state, reward, terminated, truncated, info = step(
                jax.random.fold_in(step_key, place), state, token, params
            )
            text, count = env.split(info["final_observation"])
            assert count == env.prompt_length + place + 1
            np.testing.assert_array_equal(text[:count], np.append(prompt, completion[: place + 1]))
            assert not truncated
            assert terminated == (place == env.completion_length - 1)
            assert reward == (verify(prompt, completion)[0] if terminated else 0)
        earned.append(float(reward))
    assert set(earned) == {0.0, 1.0}


@every_environment
def test_text_goes_round(env):
    prompt, solution = env.draw(jax.random.key(3))
    for some in (prompt, solution):
        np.testing.assert_array_equal(env.encode(env.decode(some)), some)
    assert len(set(env.names)) == len(env.names) == env.num_actions
    with pytest.raises(ValueError, match="not in tuple"):
        env.encode("nothing")


def test_they_are_found_by_name():
    assert isinstance(make("token/countdown3")[0], Countdown)
    env, params = make("token/star", arms=5, length=5, nodes="50", solved_share=0.5)
    assert (env.name, env.num_actions, params.solved_share) == ("token/star5_5_50", 53, 0.5)
    assert make("token/countdown3")[1].solved_share == 0.3
    for options, message in (
        ({"arms": 0}, "arms is 0; it must be at least 1"),
        ({"length": 1}, "length is 1; it must be at least 2, the start and the goal"),
        ({"nodes": 4}, "nodes is 4; a star has 1 + arms * (length - 1) = 5 of them"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make("token/star", **options)


# -- countdown --------------------------------------------------------------------------------------------------------


def value_of(tokens):
    """Of a completion in postfix notation, by Python's own arithmetic: None where it is none."""
    words = [COUNTDOWN.names[token] for token in tokens]
    if "." not in words:
        return None
    stack = []
    for word in words[: words.index(".")]:
        if word.isdigit():
            stack.append(int(word))
        elif word in "+-*" and len(stack) >= 2:
            right, left = stack.pop(), stack.pop()
            stack.append(eval(f"{left} {word} ({right})"))
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def expected_of(prompt, completion):
    value = value_of(completion)
    end = list(completion).index(END) if END in completion else 0
    digits = sorted(x for x in completion[:end] if x < 10)
    well_formed = value is not None and digits == sorted(prompt[:3])
    return float(well_formed and value == 10 * prompt[3] + prompt[4]), well_formed


def all_expressions(digits):
    """Every postfix expression of three digits, 5 tokens and the end."""
    for (a, b, c), first, second in itertools.product(itertools.permutations(digits), range(10, 13), range(10, 13)):
        yield a, b, first, c, second, END
        yield a, b, c, first, second, END


def test_the_verifier_equals_brute_force():
    """All expressions of some digits, what is nearly one, and any tokens."""
    generator, rows = np.random.default_rng(0), []
    for digits in ((1, 2, 3), (4, 4, 9), (7, 1, 7)):
        targets = {value_of(x) for x in all_expressions(digits)}
        for target in [x for x in targets if 0 <= x <= 99][:6]:
            prompt = (*digits, target // 10, target % 10, EQUALS)
            rows += [(prompt, x) for x in all_expressions(digits)]
            rows += [(prompt, x) for x in all_expressions((digits[0], digits[0], digits[1]))]  # wrong digits
    for prompt, completion in rows[:: len(rows) // 300]:
        changed = list(completion)
        changed[generator.integers(6)] = generator.integers(15)
        rows.append((prompt, tuple(changed)))
    rows += [(rows[0][0], tuple(generator.integers(0, 15, 6))) for _ in range(300)]
    rows += [  # the end too early, too late, twice
        ((1, 2, 3, 0, 3, EQUALS), (1, 2, 10, END, END, END)), ((1, 2, 3, 0, 6, EQUALS), (1, 2, 10, 3, 10, 10)),
        ((1, 2, 3, 0, 1, EQUALS), (1, END, END, END, END, END)), ((1, 1, 1, 0, 1, EQUALS), (END,) * 6),
        ((1, 2, 3, 0, 3, EQUALS), (1, 2, 10, END, 3, END)),
    ]  # fmt: skip
    prompts, completions = (jnp.array([row[i] for row in rows], jnp.int32) for i in range(2))
    reward, well_formed = jax.jit(jax.vmap(COUNTDOWN.verify))(prompts, completions)
    expected = np.array([expected_of(*row) for row in rows])
    np.testing.assert_array_equal(reward, expected[:, 0])
    np.testing.assert_array_equal(well_formed, expected[:, 1].astype(bool))
    assert 0.02 < expected[:, 0].mean() < 0.5
    assert len(rows) > 1_500


def test_all_expressions_are_numbered():
    digits = jnp.array([2, 7, 5])
    written, worth = jax.vmap(tokens.expression, (0, None))(jnp.arange(tokens.EXPRESSIONS), digits)
    found = {tuple(x): value for x, value in zip(np.asarray(written).tolist(), np.asarray(worth).tolist(), strict=True)}
    assert found == {x: value_of(x) for x in all_expressions((2, 7, 5))}
    assert len(found) == tokens.EXPRESSIONS == 108


def test_prompts_can_be_solved_and_chance_solves_few():
    prompts, solutions = map(np.asarray, jax.vmap(COUNTDOWN.draw)(keys(2_000)))
    assert ((prompts[:, :3] >= 1) & (prompts[:, :3] <= 9)).all()
    assert (prompts[:, 5] == EQUALS).all()
    assert (solutions[:, 5] == END).all()
    target = 10 * prompts[:, 3] + prompts[:, 4]
    assert (target.min(), target.max()) <= (3, 99)
    assert len(np.unique(target)) > 80
    for prompt, solution in zip(prompts[:200], solutions[:200], strict=True):
        assert expected_of(tuple(prompt), tuple(solution)) == (1.0, True)
    attempts = jax.vmap(COUNTDOWN.attempt)(keys(2_000, 1), prompts)
    reward, well_formed = jax.vmap(COUNTDOWN.verify)(prompts, attempts)
    assert well_formed.all()
    assert reward.mean() == pytest.approx(0.083, abs=0.025)
    expressions = {tuple(np.sort(x[:5])) for x in solutions}
    assert {COUNTDOWN.decode(x).split()[2].isdigit() for x in solutions} == {True, False}  # both forms
    assert len(expressions) > 300


def test_demonstrations_are_solved_as_often_as_they_say():
    params = COUNTDOWN.default_params
    reward = jax.vmap(COUNTDOWN.verify)(*jax.vmap(COUNTDOWN.demonstrate, (0, None))(keys(4_000), params))[0]
    assert reward.mean() == pytest.approx(0.3 + 0.7 * 0.083, abs=0.03)


def test_the_end_ends_and_fills_up():
    env, params = COUNTDOWN, COUNTDOWN.default_params
    _, state = env.reset(jax.random.key(0), params)
    for place, token in enumerate((1, 2, END)):
        result = env.step(jax.random.key(place + 1), state, jnp.int32(token), params)
        state = result[1]
        assert bool(result[3]) == (token == END)
        assert result[2] == 0
    np.testing.assert_array_equal(
        env.written(jnp.array([[1, 2, END, END, 3, END], [1, 2, 3, 4, 5, 6]])),
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    )
    text, count = env.split(result[5]["final_observation"])
    np.testing.assert_array_equal(text[6:], [1, 2, END, 0, 0, 0])
    assert count == 9


def test_policies_may_ask_about_what_is_none():
    """Numbers that no environment shows are cut to tokens and places."""
    text, count = COUNTDOWN.split(jnp.array([-3.7, 20.2, 5.0, *[0.0] * 9, 99.0]))
    np.testing.assert_array_equal(text[:3], [0, 14, 5])
    assert count == 12
    assert COUNTDOWN.split(jnp.zeros(13))[1] == 1


# -- star graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "length", "nodes", "edges", "prompt"), [(2, 5, 50, 8, 27), (5, 5, 50, 20, 63), (3, 8, 50, 21, 66)]
)
def test_sizes_of_the_sheet(arms, length, nodes, edges, prompt):
    env = StarGraph(arms, length, nodes)
    assert (env.edges, env.prompt_length, env.completion_length, env.num_actions) == (edges, prompt, length, nodes + 3)


@pytest.mark.parametrize("shuffled", [True, False])
def test_graphs_are_stars(shuffled):
    env = StarGraph(3, 4, 15, shuffled)
    prompts, solutions = map(np.asarray, jax.vmap(env.draw)(keys(300)))
    in_order, firsts = 0, []
    for prompt, solution in zip(prompts, solutions, strict=True):
        words = env.decode(prompt).split()
        assert words[2:27:3] == ["|"] * 8 + ["/"]
        assert words[-1] == "="
        edges = prompt[:27].reshape(9, 3)[:, :2]
        start, goal = prompt[-3:-1]
        assert len(set(edges.ravel())) == 10  # 1 + arms * (length - 1) distinct names
        assert (edges[:, 0] == start).sum() == 3
        ends = set(edges[:, 1]) - set(edges[:, 0])
        assert len(ends) == 3
        assert goal in ends
        path = [goal]
        while path[0] != start:
            path.insert(0, edges[edges[:, 1] == path[0], 0].item())
        assert path == solution.tolist()
        in_order += (edges[1:, 0] == edges[:-1, 1]).sum() == 6
        firsts.append((edges[:, 1] == path[1]).argmax())
    assert in_order == 300 if not shuffled else in_order < 10
    assert len(set(firsts)) == (9 if shuffled else 3)


def test_ways_by_hand():
    """2 - 0 - 4 and 2 - 1 - 3, to 4."""
    env = StarGraph(2, 3, 5)
    prompt = jnp.array(env.encode("0 4 | 2 1 | 1 3 | 2 0 / 2 4 ="))
    for way, expected in (
        ("2 0 4", (1, True)), ("2 1 3", (0, True)), ("2 1 4", (0, False)), ("0 4 4", (0, False)),
        ("2 2 4", (0, False)), ("| 0 4", (0, False)),
    ):  # fmt: skip
        assert env.verify(prompt, jnp.array(env.encode(way))) == expected, way
    attempts = {env.decode(x) for x in jax.vmap(env.attempt, (0, None))(keys(40), prompt)}
    assert attempts == {"2 0 4", "2 1 3"}


def test_an_attempt_takes_any_arm():
    env = StarGraph(4, 3, 12)
    prompts, _ = jax.vmap(env.draw)(keys(2_000))
    reward, is_way = jax.vmap(env.verify)(prompts, jax.vmap(env.attempt)(keys(2_000, 1), prompts))
    assert is_way.all()
    assert reward.mean() == pytest.approx(1 / 4, abs=0.04)


# -- the tree ---------------------------------------------------------------------------------------------------------


def test_the_tree_of_the_sheet():
    env = TokenTree()
    np.testing.assert_allclose(env.probabilities(), [[0.35, 0.35], [0.27, 0.03]])
    np.testing.assert_allclose(env.expectation(env.rewards, 2), env.rewards)
    np.testing.assert_allclose(env.expectation(env.rewards, 1), [0.5, 0.1])
    assert env.expectation(env.rewards, 0) == pytest.approx(0.38)
    drawn = jax.vmap(lambda key: env.demonstrate(key, env.default_params)[1])(keys(20_000))
    counts = np.bincount(np.asarray(2 * drawn[:, 0] + drawn[:, 1])) / 20_000
    np.testing.assert_allclose(counts, [0.35, 0.35, 0.27, 0.03], atol=0.015)


def test_trees_of_other_sizes():
    generator = np.random.default_rng(0)
    law = [generator.dirichlet(np.ones(3), (3,) * place) for place in range(3)]
    rewards = generator.integers(0, 5, (3, 3, 3)) / 4
    env = TokenTree(law, rewards)
    assert env.probabilities().sum() == pytest.approx(1)
    sequences = np.array(list(itertools.product(range(3), repeat=3)))
    earned = jax.vmap(lambda x: env.verify(jnp.zeros(1, jnp.int32), x)[0])(jnp.array(sequences))
    np.testing.assert_allclose(earned, rewards.ravel())
    given = env.probabilities()[2, 1] / env.probabilities()[2, 1].sum()
    assert env.expectation(rewards, 2)[2, 1] == pytest.approx((given * rewards[2, 1]).sum())
    assert env.expectation(rewards, 0) == pytest.approx((env.probabilities() * rewards).sum())
    check_env(env)
    for bad, message in (((law[:2], rewards), "tables of shapes"), (([x * 1.1 for x in law], rewards), "no probabil")):
        with pytest.raises(ValueError, match=message):
            TokenTree(*bad)


def test_the_module_lists_what_there_is():
    assert all(f"`{name}`" in tokens.__doc__ for name in tokens.GENERATORS)

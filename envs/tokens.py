"""Tokens as actions: a prompt is completed one token at a time, and whatever is earned is earned by the last one.

The deterministic decision process of language models, at a size at which everything can be checked: a state is the
prompt and what has been written behind it, an action the next token. Nothing is downloaded; prompts are drawn by key.

| id | prompt | completion that earns 1 |
|---|---|---|
| `token/countdown3` | three digits, a target of two, `=` | each digit once, in postfix notation, worth the target |
| `token/star` | edges of a star-shaped graph, start and goal, `=` | the nodes of the arm from the start to the goal |
| `token/tree` | one token, always the same | sequences by a table; with the law of a reference policy, also a table |

Stars have `arms` that are paths of `length` nodes from the start on, with `nodes` names for them (`--env-options
arms=2 length=3 nodes=10`, which is star2_3_10). From arXiv 2403.06963: whoever learns to imitate solutions token by
token learns that all nodes but the second follow from the one before, and guesses the second, one of the arms.

Observations are int32 `[prompt + completion + 1]`: the tokens so far, the first token of the vocabulary wherever none
has been written, and the number of those that were (`split`). An episode ends with the token `end`, where there is one,
and with the last place at the latest. Besides the contract of every environment these have, for whoever imitates first
and learns by reinforcement afterwards:

    draw(key) -> prompt, solution           `[prompt]`, `[completion]`; completions are filled up with `end`
    attempt(key, prompt) -> completion      a well-formed one, whatever it is worth
    demonstrate(key, params)                a prompt, and with probability `solved_share` its solution, else an attempt
    verify(prompt, completion)              the reward, and whether it is well-formed
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require


@struct.dataclass
class TokensState(environment.EnvState):
    time: jax.Array
    """tokens of the completion so far"""
    tokens: jax.Array
    ended: jax.Array


@struct.dataclass
class TokensParams(environment.EnvParams):
    max_steps_in_episode: int = 1
    solved_share: float = 1.0


class Tokens(environment.Environment[TokensState, TokensParams]):
    """What the three have in common; see the module's text."""

    names: tuple[str, ...]
    """the vocabulary: how tokens 0, 1, ... are written"""
    prompt_length: int
    completion_length: int
    end: int | None = None
    """the token behind a completion, with which the rest of its places is filled"""
    solved_share: float = 1.0
    """of demonstrations, where the parameters do not say another one"""

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def attempt(self, key: jax.Array, prompt: jax.Array) -> jax.Array:
        raise NotImplementedError

    def verify(self, prompt: jax.Array, completion: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError

    def demonstrate(self, key: jax.Array, params: TokensParams) -> tuple[jax.Array, jax.Array]:
        """A prompt `[prompt]` and one completion `[completion]` of those that are imitated."""
        prompt_key, attempt_key, share_key = jax.random.split(key, 3)
        prompt, solution = self.draw(prompt_key)
        solved = jax.random.bernoulli(share_key, params.solved_share)
        return prompt, jnp.where(solved, solution, self.attempt(attempt_key, prompt))

    def written(self, completion: jax.Array) -> jax.Array:
        """Which tokens of completions `[..., completion]` are in their episode: up to the first `end`, included."""
        if self.end is None:
            return jnp.ones(completion.shape, bool)
        ends = completion == self.end
        return jnp.cumsum(ends, axis=-1) - ends == 0

    def split(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Observations `[..., size]` as tokens `[..., prompt + completion]` and the number of those written `[...]`."""
        observation = observation.astype(jnp.int32)  # policies are also asked about what no environment shows
        tokens, count = observation[..., :-1], observation[..., -1]
        return jnp.clip(tokens, 0, len(self.names) - 1), jnp.clip(count, 1, tokens.shape[-1])

    def encode(self, text: str) -> np.ndarray:
        """The tokens of names with spaces between them, int32. Raises ValueError for one that is not there."""
        return np.array([self.names.index(name) for name in text.split()], np.int32)

    def decode(self, tokens: Any) -> str:
        """Names of the tokens `[n]`, with spaces between them."""
        return " ".join(self.names[token] for token in np.asarray(tokens))

    # -- the contract of every environment ----------------------------------------------------------------------------

    @property
    def default_params(self) -> TokensParams:
        # The time limit is never reached.
        return TokensParams(max_steps_in_episode=self.completion_length + 1, solved_share=self.solved_share)

    @property
    def num_actions(self) -> int:
        return len(self.names)

    def reset_env(self, key: jax.Array, params: TokensParams) -> tuple[jax.Array, TokensState]:
        prompt = self.draw(key)[0].astype(jnp.int32)
        tokens = jnp.zeros(self.prompt_length + self.completion_length, jnp.int32).at[: self.prompt_length].set(prompt)
        state = TokensState(time=jnp.zeros((), jnp.int32), tokens=tokens, ended=jnp.zeros((), bool))
        return self.observe(state), state

    def step_env(
        self, key: jax.Array, state: TokensState, action: jax.Array, params: TokensParams
    ) -> tuple[jax.Array, TokensState, jax.Array, jax.Array, dict[str, Any]]:
        place = jnp.arange(self.prompt_length + self.completion_length)
        action = jnp.asarray(action, jnp.int32)
        tokens = jnp.where(place == self.prompt_length + state.time, action, state.tokens)
        time = state.time + 1
        ended = time == self.completion_length
        if self.end is not None:
            ended |= action == self.end
        completion = tokens[self.prompt_length :]
        if self.end is not None:
            completion = jnp.where(jnp.arange(self.completion_length) < time, completion, self.end)
        reward, _ = self.verify(tokens[: self.prompt_length], completion)
        state = TokensState(time=time, tokens=tokens, ended=ended)
        return self.observe(state), state, jnp.where(ended, reward, 0.0).astype(jnp.float32), ended, {}

    def observe(self, state: TokensState) -> jax.Array:
        return jnp.append(state.tokens, self.prompt_length + state.time)

    def is_terminated(self, state: TokensState, params: TokensParams) -> jax.Array:
        return state.ended

    def action_space(self, params: TokensParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(len(self.names))

    def observation_space(self, params: TokensParams | None = None) -> spaces.Box:
        length = self.prompt_length + self.completion_length
        return spaces.Box(0, max(length, len(self.names)), (length + 1,), jnp.int32)


# -- countdown --------------------------------------------------------------------------------------------------------

PLUS, MINUS, TIMES, EQUALS, END = range(10, 15)
CANDIDATES = 32
"""Expressions of which the first with a target from 0 to 99 is the solution."""


class Countdown(Tokens):
    """Make the target of the three digits 1 to 9, each used once, with + - * in postfix notation.

    Drawn expressions, solutions and attempts alike, have the digits in any order, any two operators, and one of the two
    forms `a b o c o` and `a b c o o`. About 8 % of the attempts are worth their target by chance.
    """

    names = (*"0123456789+-*=", ".")
    prompt_length, completion_length, end = 6, 6, END
    solved_share = 0.3

    @property
    def name(self) -> str:
        return "token/countdown3"

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        digits_key, expressions_key = jax.random.split(key)
        digits = jax.random.randint(digits_key, (3,), 1, 10)
        numbers = jax.random.randint(expressions_key, (CANDIDATES,), 0, EXPRESSIONS)
        expressions, values = jax.vmap(expression, (0, None))(numbers, digits)
        # The plain sum is always one that can be asked for.
        a, b, c = digits
        expressions = jnp.concatenate([expressions, jnp.stack([a, b, PLUS, c, PLUS, END])[None]])
        values = jnp.append(values, digits.sum())
        chosen = ((values >= 0) & (values <= 99)).argmax()
        target = values[chosen]
        return jnp.stack([a, b, c, target // 10, target % 10, EQUALS]), expressions[chosen]

    def attempt(self, key: jax.Array, prompt: jax.Array) -> jax.Array:
        return expression(jax.random.randint(key, (), 0, EXPRESSIONS), prompt[:3])[0]

    def verify(self, prompt: jax.Array, completion: jax.Array) -> tuple[jax.Array, jax.Array]:
        """1 for an expression of the prompt's digits, each once, that is worth its target; whether it is one."""

        def one(carry, token):
            stack, depth, sound, ended = carry
            is_number, is_operator = token < PLUS, (token >= PLUS) & (token <= TIMES)
            left, right = stack[jnp.maximum(depth - 2, 0)], stack[jnp.maximum(depth - 1, 0)]
            acts = (is_number | (is_operator & (depth >= 2))) & ~ended
            place = jnp.where(is_number, depth, depth - 2)
            result = jnp.where(is_number, token, _applied(token, left, right))
            stack = jnp.where(acts & (jnp.arange(stack.size) == place), result, stack)
            ended |= token == END
            return (stack, jnp.where(acts, place + 1, depth), sound & (acts | ended), ended), None

        start = jnp.zeros(self.completion_length, jnp.int32), jnp.int32(0), jnp.array(True), jnp.array(False)
        (stack, depth, sound, ended), _ = jax.lax.scan(one, start, completion, unroll=True)
        numbers = jnp.sort(jnp.where((completion < PLUS) & self.written(completion), completion, 99))
        right_numbers = (numbers[:3] == jnp.sort(prompt[:3])).all() & (numbers[3] == 99)
        well_formed = sound & ended & (depth == 1) & right_numbers
        right = well_formed & (stack[0] == 10 * prompt[3] + prompt[4])
        return right.astype(jnp.float32), well_formed


def _applied(operator: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.where(operator == PLUS, left + right, jnp.where(operator == MINUS, left - right, left * right))


ORDERS = np.array([*itertools.permutations(range(3))], np.int32)
EXPRESSIONS = len(ORDERS) * 3 * 3 * 2


def expression(number: jax.Array, digits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One of the `EXPRESSIONS` of three digits `[3]`, by its number, as a completion `[6]`, and what it is worth."""
    number, is_left = number // 2, number % 2 == 0
    number, second = number // 3, PLUS + number % 3
    order, first = number // 3, PLUS + number % 3
    a, b, c = digits[jnp.asarray(ORDERS)[order]]
    left, right = jnp.stack([a, b, first, c, second]), jnp.stack([a, b, c, first, second])
    of_left, of_right = _applied(second, _applied(first, a, b), c), _applied(second, a, _applied(first, b, c))
    return jnp.append(jnp.where(is_left, left, right), END), jnp.where(is_left, of_left, of_right)


# -- star graphs ------------------------------------------------------------------------------------------------------


class StarGraph(Tokens):
    """Find the way to the end of one of the `arms` that leave the start, each a path of `length` nodes with it.

    The edges, from the start outwards and in any order (unless `shuffled` is False), are the prompt: `u v |` each, with
    `/` instead behind the last, then start, goal and `=`. Names of nodes are distinct numbers below `nodes`. Attempts
    are the way to the end of any arm.
    """

    def __init__(self, arms: int = 2, length: int = 3, nodes: int = 10, shuffled: bool = True) -> None:
        super().__init__()
        require(arms >= 1, f"arms is {arms}; it must be at least 1")
        require(length >= 2, f"length is {length}; it must be at least 2, the start and the goal")
        self.edges = arms * (length - 1)
        require(nodes > self.edges, f"nodes is {nodes}; a star has 1 + arms * (length - 1) = {self.edges + 1} of them")
        self.arms, self.length, self.nodes, self.shuffled = arms, length, nodes, shuffled
        self.names = (*map(str, range(nodes)), "|", "/", "=")
        self.prompt_length, self.completion_length = 3 * self.edges + 3, length

    @property
    def name(self) -> str:
        return f"token/star{self.arms}_{self.length}_{self.nodes}"

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        names_key, order_key, goal_key = jax.random.split(key, 3)
        names = jax.random.permutation(names_key, self.nodes)[: self.edges + 1]
        start, arms = names[0], names[1:].reshape(self.arms, self.length - 1)
        before = jnp.concatenate([jnp.full((self.arms, 1), start), arms[:, :-1]], axis=1)
        edges = jnp.stack([before, arms], axis=-1).reshape(self.edges, 2)
        if self.shuffled:
            edges = jax.random.permutation(order_key, edges)
        bar, slash, equals = range(self.nodes, self.nodes + 3)
        marks = jnp.full(self.edges, bar).at[-1].set(slash)
        arm = arms[jax.random.randint(goal_key, (), 0, self.arms)]
        prompt = jnp.concatenate([edges, marks[:, None]], axis=1).ravel()
        return jnp.append(prompt, jnp.stack([start, arm[-1], equals])), jnp.append(start, arm)

    def attempt(self, key: jax.Array, prompt: jax.Array) -> jax.Array:
        edges, node = self._edges_of(prompt), prompt[-3]
        path = [node]
        for hop in range(self.length - 1):
            leads_on = edges[:, 0] == node
            node = edges[jax.random.categorical(jax.random.fold_in(key, hop), jnp.where(leads_on, 0.0, -jnp.inf)), 1]
            path.append(node)
        return jnp.stack(path)

    def verify(self, prompt: jax.Array, completion: jax.Array) -> tuple[jax.Array, jax.Array]:
        """1 for the way from the start to the goal; whether it is a way from the start at all."""
        steps = jnp.stack([completion[:-1], completion[1:]], axis=-1)
        known = (steps[:, None] == self._edges_of(prompt)).all(-1).any(-1)
        is_way = (completion[0] == prompt[-3]) & known.all()
        return (is_way & (completion[-1] == prompt[-2])).astype(jnp.float32), is_way

    def _edges_of(self, prompt: jax.Array) -> jax.Array:
        return prompt[: 3 * self.edges].reshape(self.edges, 3)[:, :2]


# -- a tree -----------------------------------------------------------------------------------------------------------

# First tokens, and second ones after each of them.
LAW = ((0.7, 0.3), ((0.5, 0.5), (0.9, 0.1)))
REWARDS = ((0.0, 1.0), (0.0, 1.0))


class TokenTree(Tokens):
    """All sequences of a few tokens, with tables of their rewards and of the law of a reference policy.

    law: for each place the probabilities of its token after all before it, `[tokens] * place`; rewards: of every whole
    sequence. Demonstrations are draws of that law, and what they earn and how likely they are is known exactly:
    `expectation`.
    """

    prompt_length = 1
    solved_share = 0.0

    def __init__(self, law: Any = LAW, rewards: Any = REWARDS) -> None:
        super().__init__()
        self.law, self.rewards = tuple(np.array(one, float) for one in law), np.array(rewards, float)
        tokens, places = len(self.rewards), self.rewards.ndim
        shapes = [one.shape for one in self.law]
        require(
            self.rewards.shape == (tokens,) * places and shapes == [(tokens,) * (i + 1) for i in range(places)],
            f"law has tables of shapes {shapes}; with rewards of shape {self.rewards.shape} they must be "
            f"{[(tokens,) * (i + 1) for i in range(places)]}",
        )
        require(
            all((one >= 0).all() and np.allclose(one.sum(-1), 1) for one in self.law),
            "law has rows that are no probabilities",
        )
        self.names, self.completion_length = tuple(map(str, range(tokens))), places

    @property
    def name(self) -> str:
        return "token/tree"

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(1, jnp.int32), self._unravelled(jnp.asarray(self.rewards.argmax()))

    def attempt(self, key: jax.Array, prompt: jax.Array) -> jax.Array:
        joint = self.probabilities().ravel()
        return self._unravelled(jax.random.categorical(key, jnp.log(jnp.asarray(joint, jnp.float32))))

    def verify(self, prompt: jax.Array, completion: jax.Array) -> tuple[jax.Array, jax.Array]:
        rewards = jnp.asarray(self.rewards, jnp.float32)
        return rewards[tuple(completion)], jnp.array(True)

    def probabilities(self) -> np.ndarray:
        """Of every whole sequence by the reference policy, `[tokens] * places`."""
        found = np.ones(())
        for one in self.law:
            found = found[..., None] * one
        return found

    def expectation(self, values: np.ndarray, places: int) -> np.ndarray:
        """Mean of `values` `[tokens] * all places` over the reference's completions of all first `places` tokens."""
        values = np.asarray(values, float)
        for one in reversed(self.law[places:]):
            values = (one * values).sum(-1)
        return values

    def _unravelled(self, number: jax.Array) -> jax.Array:
        return jnp.stack(jnp.unravel_index(number, self.rewards.shape)).astype(jnp.int32)


GENERATORS = {"token/countdown3": Countdown, "token/star": StarGraph, "token/tree": TokenTree}

"""Small processes with several rewards at once, whose joint laws of returns are known exactly.

Every step pays a vector; it stands in `info["rewards"]`, and the reward is its sum. What is random in one component can
go together with what is random in another, and that no component shows alone:

| generator | rewards | actions | what it is for |
|---|---|---|---|
| `coin` | 2 | 1 | a fair coin pays one or the other, for ever: with discount 1/2 both returns are uniform on [0, 2] |
| `parity` | 3 | 1 | two coins and whether they differ: each pair is independent, and all three are not |
| `exclusive` | 2 | 4 | a 5 x 5 maze with one patch or the other on every way: negatively correlated |
| `inclusive` | 2 | 4 | a 5 x 5 maze with both patches on a way, or none: positively correlated |
| `branches` | 2 | 4 | a toll and a treasure, or a small gift: the best sum is not the best component |

The first two mazes are those of "Distributional Reinforcement Learning for Multi-Dimensional Reward Functions" (Zhang
et al., NeurIPS 2021, arXiv 2110.13578), with the ways, patches and amounts of the authors' code (zpschang/MD3QN). One
takes one of four moves; a move that is not open does nothing. A cell that was left is closed, a patch pays once, and
leaving by an exit ends the episode without a reward. Differences: amounts are drawn from `draws` equally likely values
of the authors' range, the midpoints of its parts, so that laws are finite; observations are images of 5 x 5 cells, one
channel each for the agent, for closed cells and for each kind of patch that is left, in place of a picture of 84 x 84
pixels. `branches` is ours.

`joint_law` has the exact joint law of a policy's returns by growing atoms, `joint_moments` its mean and covariance for
any discount by linear equations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces

from jaxrl_dist.configuration import require
from jaxrl_dist.distributional.joint import JointLaw
from jaxrl_dist.distributional.tabular import MDP
from jaxrl_dist.envs.tabular import MOVES, Tabular, TabularParams, TabularState

# -- environment ------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What an action can lead to."""

    probability: float
    next_state: int
    rewards: tuple[float, ...]
    terminated: bool = False


@struct.dataclass
class MultiRewardParams(TabularParams):
    rewards: jax.Array = None
    """`[states, actions, outcomes, rewards]`; the process in `mdp` has their sums."""


class MultiReward(Tabular):
    """A finite process with vector rewards, `info["rewards"]` `[rewards]`; see the module's text."""

    def __init__(
        self,
        table: Sequence[Sequence[Sequence[Outcome]]],
        start: int,
        places: Sequence,
        name: str,
        max_steps_in_episode: int,
        images: np.ndarray | None = None,
    ) -> None:
        """table: of every state and action; images: what is seen in each state `[states, ...]`, by default its number,
        one-hot."""
        mdp, rewards = _arrays(table)
        super().__init__(mdp, np.eye(len(table))[start], places, name, max_steps_in_episode)
        self._params = MultiRewardParams(
            mdp=self._params.mdp, start=self._params.start, max_steps_in_episode=max_steps_in_episode,
            rewards=jnp.asarray(rewards),
        )  # fmt: skip
        self.num_rewards = rewards.shape[-1]
        self.images = np.eye(len(table), dtype=np.float32) if images is None else images

    def step_env(
        self, key: jax.Array, state: TabularState, action: jax.Array, params: MultiRewardParams
    ) -> tuple[jax.Array, TabularState, jax.Array, jax.Array, dict[str, Any]]:
        outcomes = jax.tree.map(lambda x: x[state.state, action], params.mdp)
        outcome = jax.random.categorical(key, jnp.log(outcomes.probability))
        _, following, reward, ended = (x[outcome] for x in outcomes)
        info = {"rewards": params.rewards[state.state, action, outcome]}
        state = TabularState(time=state.time + 1, state=following, ended=ended)
        return self.observe(key, state, action, params), state, reward, ended, info

    def observe(self, key: jax.Array, state: TabularState, action: Any, params: MultiRewardParams) -> jax.Array:
        return jnp.asarray(self.images)[state.state]

    def observation_space(self, params: MultiRewardParams | None = None) -> spaces.Box:
        return spaces.Box(0.0, 1.0, self.images.shape[1:])

    def picture(self, state: TabularState, params: MultiRewardParams) -> np.ndarray:
        """A maze as it is seen, closed cells dark and a colour for each component's patches, for `rendering`."""
        if self.images.ndim < 4:
            return super().picture(state, params)
        from jaxrl_dist.records.canvas import Board
        from jaxrl_dist.records.plotting import COLOURS, FAINT, INK

        image = self.images[int(state.state)]
        board = Board(*image.shape[:2], tallest=180)
        for row, column in np.ndindex(*image.shape[:2]):
            board.cell(row, column, FAINT if image[row, column, 1] else "#F3F4F6", gap=0.03)
        for row, column, kind in np.argwhere(image[..., 2:] > 0):
            board.disc((column, row), 0.2, (COLOURS[4], COLOURS[2], COLOURS[3], COLOURS[5])[kind % 4])
        row, column = np.argwhere(image[..., 0] > 0)[0]
        if bool(state.ended):
            board.disc((column, row), 0.42, None, outline=INK, line=2)
        board.disc((column, row), 0.28, COLOURS[0], outline="white")
        return board.array()


def _arrays(table: Sequence[Sequence[Sequence[Outcome]]]) -> tuple[MDP, np.ndarray]:
    """The process of the summed rewards, and the rewards `[states, actions, outcomes, rewards]`."""
    size = len(table[0][0][0].rewards)
    longest = max(len(outcomes) for actions in table for outcomes in actions)
    never = Outcome(0.0, 0, (0.0,) * size)
    padded = [[[*outcomes, *[never] * (longest - len(outcomes))] for outcomes in actions] for actions in table]
    columns = [np.array([[[one[i] for one in a] for a in actions] for actions in padded]) for i in range(4)]
    probability, next_state, rewards, terminated = columns
    require(bool(np.allclose(probability.sum(-1), 1)), "table has probabilities that do not sum to 1")
    rewards = rewards.astype(np.float32)
    mdp = MDP(
        jnp.asarray(probability, jnp.float32), jnp.asarray(next_state, jnp.int32), jnp.asarray(rewards.sum(-1)),
        jnp.asarray(terminated, bool),
    )  # fmt: skip
    return mdp, rewards


# -- processes --------------------------------------------------------------------------------------------------------


def coin() -> MultiReward:
    """One state; every step tosses a fair coin, which pays 1 to the first or to the second component, for ever."""
    table = [[[Outcome(0.5, 0, (1.0, 0.0)), Outcome(0.5, 0, (0.0, 1.0))]]]
    return MultiReward(table, 0, [[0, 0]], "multi_reward/coin", 100)


def parity() -> MultiReward:
    """Three steps: a fair coin pays the first component, another the second, and the third pays 1 where they differ.

    Any two returns are independent; the sum is 0 with probability 1/4, else that of two ones.
    """
    # States: the start, after the first coin (0, 1), and after both, of which it only counts whether they differ.
    second = [[[Outcome(0.5, 3 + (first != coin), (0.0, float(coin), 0.0)) for coin in range(2)]] for first in range(2)]
    third = [[[Outcome(1.0, 3 + differ, (0.0, 0.0, float(differ)), True)]] for differ in range(2)]
    table = [[[Outcome(0.5, 1 + coin, (float(coin), 0.0, 0.0)) for coin in range(2)]], *second, *third]
    return MultiReward(table, 0, [[1, 0], [0, 1], [2, 1], [0, 2], [2, 2]], "multi_reward/parity", 10)


# Of each cell the moves that are open (up, right, down, left), and a patch: its letter. "." is closed from the start.
EXCLUSIVE = (
    "RD Da .  .  .",
    "Rb RD Da .  .",
    ".  Rb RD Da .",
    ".  .  Rb RD Da",
    ".  .  .  Rb R",
)
INCLUSIVE = (
    "RD Ra  Rb D   .",
    "R  R   R  RD  Da",
    ".  .   .  D   Db",
    "LD L   L  LD  L",
    "UD Lb  La L   .",
)
BRANCHES = (
    ".  .  .  .  .",
    "La Lb LR Rc R",
    ".  .  .  .  .",
)
# Which component a patch pays, and the range of its amounts.
PATCHES = {"a": (0, 0.2, 0.6), "b": (1, 0.4, 0.9)}
TREASURE = {"a": (0, 2.5, 3.5), "b": (1, -5.5, -4.5), "c": (0, 0.5, 1.5)}


def exclusive(draws: int = 2) -> MultiReward:
    """Four times to the right or down: the right pays the first component, 0.2 to 0.6, down the second, 0.4 to 0.9."""
    return _maze(EXCLUSIVE, PATCHES, (0, 0), "multi_reward/exclusive", draws)


def inclusive(draws: int = 2) -> MultiReward:
    """Three times a way with a patch of each component, or one with none."""
    return _maze(INCLUSIVE, PATCHES, (0, 0), "multi_reward/inclusive", draws)


def branches(draws: int = 2) -> MultiReward:
    """A fork: the left costs the second component 5 and then pays the first 3, the right pays the first 1."""
    return _maze(BRANCHES, TREASURE, (1, 2), "multi_reward/branches", draws)


GENERATORS: Mapping[str, Callable[..., MultiReward]] = {
    f"multi_reward/{generator.__name__}": generator for generator in (coin, parity, exclusive, inclusive, branches)
}


def _maze(
    rows: Sequence[str], patches: Mapping[str, tuple[int, float, float]], start: tuple[int, int], name: str, draws: int
) -> MultiReward:
    """The maze as a finite process, whose states are the cell and the cells that were left, those that are reached."""
    require(draws >= 1, f"draws is {draws}, allowed: 1 and above")
    cells = {(r, c): text for r, row in enumerate(rows) for c, text in enumerate(row.split()) if text != "."}
    kinds = 1 + max(kind for kind, _, _ in patches.values())
    moves = dict(zip("URDL", (MOVES[name] for name in ("up", "right", "down", "left")), strict=True))
    names = {move: letter for letter, move in moves.items()}
    numbers: dict[tuple, int] = {(start, frozenset()): 0}
    states, table = [(start, frozenset())], []
    for state in states:  # which grows as states are found
        (cell, left), actions = state, []
        for move in MOVES.values():
            to = (cell[0] + move[0], cell[1] + move[1])
            is_open = names[move] in cells[cell] and to not in left
            if not is_open:
                actions.append([Outcome(1.0, numbers[state], (0.0,) * kinds)])
            elif to not in cells:
                actions.append([Outcome(1.0, numbers[state], (0.0,) * kinds, True)])
            else:
                following = (to, left | {cell})
                if following not in numbers:
                    numbers[following] = len(states)
                    states.append(following)
                actions.append(_arrivals(numbers[following], cells[to], patches, kinds, draws))
        table.append(actions)
    images = np.zeros((len(states), len(rows), len(rows[0].split()), 2 + kinds), np.float32)
    images[..., 1] = 1
    for image, (cell, left) in zip(images, states, strict=True):
        image[(*cell, 0)] = 1
        for place, text in cells.items():
            image[(*place, 1)] = place in left
            if place != cell and place not in left and text[-1] in patches:
                image[(*place, 2 + patches[text[-1]][0])] = 1
    return MultiReward(table, 0, [cell for cell, _ in states], name, 150, images)


def _arrivals(
    state: int, text: str, patches: Mapping[str, tuple[int, float, float]], kinds: int, draws: int
) -> list[Outcome]:
    """What entering a cell for the first time can pay."""
    if text[-1] not in patches:
        return [Outcome(1.0, state, (0.0,) * kinds)]
    kind, low, high = patches[text[-1]]
    amounts = low + (high - low) * (np.arange(draws) + 0.5) / draws
    return [Outcome(1 / draws, state, tuple(amount * (kind == k) for k in range(kinds))) for amount in amounts]


# -- exact joint laws -------------------------------------------------------------------------------------------------

# Who has not ended with more than this probability is followed no further.
NEGLIGIBLE_MASS = 1e-9


def joint_law(
    params: MultiRewardParams, policy: np.ndarray, discount: float, state: int, action: int | None = None, *, steps: int
) -> JointLaw:
    """The exact joint law of the returns over at most `steps` steps, by growing atoms in float64, equal ones merged.

    policy: probabilities `[states, actions]`; action: the first one, by default the policy's. What is left out is at
    most discount^steps times the largest possible return. With a discount below 1 and moves that do nothing, atoms grow
    without end: see `joint_moments`. Where less than `NEGLIGIBLE_MASS` is still running, it counts as it stands.
    """
    mdp, rewards = MDP(*(np.asarray(part) for part in params.mdp)), np.asarray(params.rewards, np.float64).round(6)
    policy = np.asarray(policy, np.float64)
    ways = [_ways(mdp, rewards, s, chances) for s, chances in enumerate(policy)]
    first = policy[state] if action is None else np.eye(policy.shape[1])[action]
    # Reached: state to the laws of the returns so far; None stands for the end.
    running: dict = {state: {(0.0,) * rewards.shape[-1]: 1.0}}
    ended: dict = {}
    for step in range(steps):
        following: dict = {}
        for s, law in running.items():
            for (where, gained), chance in (ways[s] if step else _ways(mdp, rewards, s, first)).items():
                into = ended if where is None else following.setdefault(where, {})
                for values, mass in law.items():
                    sums = tuple(
                        round(value + discount**step * more, 9) for value, more in zip(values, gained, strict=True)
                    )
                    into[sums] = into.get(sums, 0.0) + mass * chance
        running = following
        if sum(sum(law.values()) for law in running.values()) < NEGLIGIBLE_MASS:
            break
    for law in running.values():
        for values, mass in law.items():
            ended[values] = ended.get(values, 0.0) + mass
    atoms = sorted(ended)
    return JointLaw(np.array(atoms), np.array([ended[values] for values in atoms]))


def _ways(mdp: MDP, rewards: np.ndarray, state: int, chances: np.ndarray) -> dict[tuple, float]:
    """{(successor or None, rewards): probability} of one step from a state; what looks alike is one way."""
    found: dict[tuple, float] = {}
    for a, k in np.argwhere(chances[:, None] * mdp.probability[state] > 0):
        where = None if mdp.terminated[state, a, k] else int(mdp.next_state[state, a, k])
        way = where, tuple(map(float, rewards[state, a, k]))
        found[way] = found.get(way, 0.0) + float(chances[a] * mdp.probability[state, a, k])
    return found


def joint_moments(params: MultiRewardParams, policy: np.ndarray, discount: float) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean `[states, rewards]` and covariance `[states, rewards, rewards]` of a policy's returns, in float64.

    First and second moments solve linear equations: E Z Z' = E r r' + discount (E r Y' + E Y r') + discount^2 E Y Y', Y
    being the successor's. With discount 1 every state must reach a termination.
    """
    mdp, rewards = MDP(*(np.asarray(part, np.float64) for part in params.mdp)), np.asarray(params.rewards, np.float64)
    states, size = len(policy), rewards.shape[-1]
    weight = np.asarray(policy, np.float64)[..., None] * mdp.probability
    weight, going_on = weight / weight.sum((1, 2), keepdims=True), discount * (1 - mdp.terminated)
    successor = np.eye(states)[mdp.next_state.astype(int)]  # [states, actions, outcomes, states]

    def solved(power: int, source: np.ndarray) -> np.ndarray:
        chain = np.einsum("sao,saot->st", weight * going_on**power, successor)
        return np.linalg.solve(np.eye(states) - chain, source.reshape(states, -1)).reshape(source.shape)

    mean = solved(1, np.einsum("sao,saok->sk", weight, rewards))
    following = going_on[..., None] * mean[mdp.next_state.astype(int)]
    mixed = np.einsum("sao,saoi,saoj->sij", weight, rewards, following)
    source = np.einsum("sao,saoi,saoj->sij", weight, rewards, rewards) + mixed + mixed.swapaxes(1, 2)
    second = solved(2, source.reshape(states, size, size))
    return mean, second - mean[:, :, None] * mean[:, None, :]

"""Stock-augmented environments: the observation ends with a number that says how much is still owed or already gained.

Paper: "Optimizing Return Distributions with Distributional Dynamic Programming", Avila Pires, Rowland, Borsa, Guo,
Khetarpal, Barreto, Abel, Munos, Dabney, JMLR 2025, arXiv 2501.13028.

    stock        c_0 chosen before the episode, then c_{t+1} = (c_t + r_{t+1}) / gamma
    identity     c_t + G_t = gamma (c_{t+1} + G_{t+1}), so that gamma^t (c_t + G_t) = c_0 + G_0 all along an episode
    utility      E f(c_0 + G_0), for an f that ranks the laws of X and of gamma X alike

Who maximises E f(c_t + G_t) in every step therefore maximises E f(c_0 + G_0), which no policy can that does not know
the stock. `StockAugmented` adds the stock to an environment with vector observations: the initial stock is drawn evenly
from a range that stands in the parameters, together with gamma, so that one program trains on a range and
`params.replace(lowest_stock=c, highest_stock=c)` evaluates from one stock.

| utility       | f(x)      | what it asks for, with initial stock c                                          |
|---------------|-----------|---------------------------------------------------------------------------------|
| `mean`        | x         | the expected return; c does not matter                                          |
| `shortfall`   | min(x, 0) | as little as possible below -c; with the best c the conditional value at risk   |
| `surplus`     | max(x, 0) | as much as possible above -c                                                    |
| `target`      | -abs(x)   | a return of -c, neither less nor more                                           |
| `homeostasis` | -x^2      | the same, large misses weigh more; Lipschitz on bounded ranges only             |
| `threshold`   | 1{x >= 0} | a return of at least -c as likely as possible; not Lipschitz                    |

Two processes in which the stock matters, as `tabular.Tabular`: `gamble` and `shortcut`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require
from jaxrl_dist.distributional.tabular import mdp_from_outcomes
from jaxrl_dist.envs.tabular import MOVES, Tabular
from jaxrl_dist.learning.spaces import kind_of, spaces_of

# -- stock and utility ------------------------------------------------------------------------------------------------

# What a stock of float32 is off by: a return that reaches the threshold exactly must count as reaching it.
ROUNDING = 1e-5

# Utilities that differ by less are equal: rounding errors apart, in units of the utility.
TIE = 1e-5

UTILITIES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "mean": lambda x: x,
    "shortfall": lambda x: jnp.minimum(x, 0),
    "surplus": lambda x: jnp.maximum(x, 0),
    "target": lambda x: -jnp.abs(x),
    "homeostasis": lambda x: -jnp.square(x),
    "threshold": lambda x: (x >= -ROUNDING).astype(jnp.float32),
}


def check_utility(utility: str) -> None:
    """Raise ValueError for a name that is not in `UTILITIES`."""
    require(utility in UTILITIES, f"--utility is {utility!r}; it must be one of {', '.join(UTILITIES)}")


def stock_after(stock: jax.Array, reward: jax.Array, discount: jax.Array | float) -> jax.Array:
    """c' = (c + r) / gamma, any shapes; for n steps the n-step return and gamma^n (arXiv 2501.13028, section 3)."""
    return (stock + reward) / discount


def action_utilities(utility: str, stock: jax.Array, quantiles: jax.Array) -> jax.Array:
    """mean_j f(c + theta_j): stock `[...]` and quantiles `[..., actions, quantiles]` -> `[..., actions]`."""
    return UTILITIES[utility](stock[..., None, None] + quantiles).mean(-1)


def preferences(utility: str, stock: jax.Array, quantiles: jax.Array) -> jax.Array:
    """Numbers whose argmax is the greedy action, shapes as for `action_utilities`.

    An action of the best utility has its mean return, any other minus infinity. So ties of the utility (within `TIE`)
    go to the larger mean: who has nothing to lose by f should not waste what is left.
    """
    values = action_utilities(utility, stock, quantiles)
    tied = values >= values.max(-1, keepdims=True) - TIE
    return jnp.where(tied, quantiles.mean(-1), -jnp.inf)


# -- the environment --------------------------------------------------------------------------------------------------


@struct.dataclass
class StockState(environment.EnvState):
    time: jax.Array
    inner: Any
    stock: jax.Array


@struct.dataclass
class StockParams(environment.EnvParams):
    max_steps_in_episode: int = 100
    inner: Any = None
    """Parameters of the environment inside."""
    discount: float = 0.99
    """gamma of the stock; an agent's own discount must be the same."""
    lowest_stock: float = -1.0
    highest_stock: float = 0.0
    """An episode starts with a stock drawn evenly from [lowest_stock, highest_stock]."""


class StockAugmented(environment.Environment[StockState, StockParams]):
    """An environment whose observations `[features + 1]` end with the stock, in units of return.

    Everything else is the environment's own, rewards too. Raises ValueError for observations that are no vectors, a
    discount outside (0, 1] and an empty range of stocks.
    """

    def __init__(
        self, env: Any, env_params: Any, discount: float = 0.99, lowest_stock: float = -1.0, highest_stock: float = 0.0
    ) -> None:
        super().__init__()
        _, space = spaces_of(env, env_params)
        is_box = kind_of(space) in ("continuous", "integers")
        they = f"have shape {space.shape}" if is_box else f"are {kind_of(space)}"
        require(
            is_box and len(space.shape) == 1,
            f"--env-id is stock/{env.name}, but the observations of {env.name} {they}; a stock can be added to vectors "
            "only",
        )
        self.env = env
        self._params = StockParams(
            max_steps_in_episode=getattr(env_params, "max_steps_in_episode", 2**30), inner=env_params,
            discount=discount, lowest_stock=lowest_stock, highest_stock=highest_stock,
        )  # fmt: skip
        check_params(self._params)

    @property
    def name(self) -> str:
        return f"stock/{self.env.name}"

    @property
    def default_params(self) -> StockParams:
        return self._params

    @property
    def num_actions(self) -> int:
        return self.env.num_actions

    def reset_env(self, key: jax.Array, params: StockParams) -> tuple[jax.Array, StockState]:
        inner_key, stock_key = jax.random.split(key)
        observation, inner = self.env.reset_env(inner_key, params.inner)
        stock = jax.random.uniform(stock_key, (), jnp.float32, params.lowest_stock, params.highest_stock)
        return _append(observation, stock), StockState(time=jnp.zeros((), jnp.int32), inner=inner, stock=stock)

    def step_env(
        self, key: jax.Array, state: StockState, action: jax.Array, params: StockParams
    ) -> tuple[jax.Array, StockState, jax.Array, jax.Array, dict[str, Any]]:
        observation, inner, reward, terminated, info = self.env.step_env(key, state.inner, action, params.inner)
        stock = stock_after(state.stock, reward, params.discount).astype(jnp.float32)
        state = StockState(time=state.time + 1, inner=inner, stock=stock)
        return _append(observation, stock), state, reward, terminated, info

    def is_terminated(self, state: StockState, params: StockParams) -> jax.Array:
        return self.env.is_terminated(state.inner, params.inner)

    def action_space(self, params: StockParams | None = None) -> Any:
        return self.env.action_space(self._params.inner if params is None else params.inner)

    def observation_space(self, params: StockParams | None = None) -> spaces.Box:
        inner = self.env.observation_space(self._params.inner if params is None else params.inner)
        low = getattr(inner, "low", -np.inf), -np.inf
        high = getattr(inner, "high", np.inf), np.inf
        # The bounds of some environments are parameters, and so may be traced.
        low, high = (jnp.append(jnp.broadcast_to(bound, inner.shape), last) for bound, last in (low, high))
        return spaces.Box(low.astype(jnp.float32), high.astype(jnp.float32), (inner.shape[0] + 1,))


def _append(observation: jax.Array, stock: jax.Array) -> jax.Array:
    return jnp.append(observation.astype(jnp.float32), stock)


def check_params(params: StockParams) -> None:
    """Raise ValueError for a discount outside (0, 1] and an empty range of stocks; traced values are not checked."""
    numbers = params.discount, params.lowest_stock, params.highest_stock
    if any(isinstance(number, jax.core.Tracer) for number in numbers):
        return
    discount, low, high = map(np.asarray, numbers)
    require(bool(np.all((discount > 0) & (discount <= 1))), f"discount is {params.discount}, allowed: in (0, 1]")
    require(
        bool(np.all(np.isfinite(low) & np.isfinite(high) & (low <= high))),
        f"lowest_stock is {params.lowest_stock} and highest_stock {params.highest_stock}, allowed: finite numbers, the "
        "first not above the second",
    )


# -- processes in which the stock matters -----------------------------------------------------------------------------

# Three gaps in a wall, each with a way round it that takes two steps more.
SHORTCUT = ("...#...#...", "S!...!...!G")


def gamble() -> Tabular:
    """Two stages: 0 or 4 with equal chances; then action 0 pays 1, and action 1 pays -1 or 5 with equal chances.

    The action of the first stage, state 0, does nothing. States 1 and 2 are the second stage after 0 and after 4.
    """
    first = [(0.5, 1, 0.0, False), (0.5, 2, 4.0, False)]
    second = [[[(1.0, state, 1.0, True)], [(0.5, state, -1.0, True), (0.5, state, 5.0, True)]] for state in (1, 2)]
    return Tabular(mdp_from_outcomes([[first, first], *second]), np.eye(3)[0], [[0, 0], [-1, 1], [1, 1]], "gamble")


def shortcut(rows: Sequence[str] = SHORTCUT, chance: float = 0.1, penalty: float = 10.0) -> Tabular:
    """A grid of text, -1 per step from 'S' to 'G', which ends: '#' wall, '!' a cell that is dangerous to enter.

    There `penalty` is lost with probability `chance`, and the walk goes on. Moves do what they say, so that nothing but
    what was lost so far is random.
    """
    text = {(r, c): mark for r, row in enumerate(rows) for c, mark in enumerate(row)}
    cells = [cell for cell, mark in text.items() if mark not in "#G"]
    number = {cell: index for index, cell in enumerate(cells)}
    start = [float(text[cell] == "S") for cell in cells]
    require(sum(start) == 1 and "G" in text.values(), "rows have no 'S', several or no 'G', allowed: one 'S', a 'G'")
    require(0 <= chance <= 1, f"chance is {chance}, allowed: a probability, 0 to 1")

    def outcomes(cell: tuple[int, int], move: tuple[int, int]) -> list[tuple[float, int, float, bool]]:
        following = (cell[0] + move[0], cell[1] + move[1])
        mark = text.get(following, "#")
        if mark == "!":
            return [(1 - chance, number[following], -1.0, False), (chance, number[following], -1.0 - penalty, False)]
        ended = mark == "G"
        return [(1.0, number[cell if mark == "#" or ended else following], -1.0, ended)]

    table = [[outcomes(cell, move) for move in MOVES.values()] for cell in cells]
    marks = {cell: {"#": "wall", "G": "goal", "!": "danger"}[mark] for cell, mark in text.items() if mark in "#G!"}
    return Tabular(mdp_from_outcomes(table), start, cells, "shortcut", marks=marks)


GENERATORS: Mapping[str, Callable[..., Tabular]] = {"gamble": gamble, "shortcut": shortcut}

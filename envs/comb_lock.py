"""A combination lock with noisy observations, whose return has a law in closed form with two far apart modes.

From "Distributional Offline Policy Evaluation with Predictive Error Guarantees" (Wu, Uehara, Sun, arXiv 2302.09456).
A hidden bit says whether the lock is still good (latent 0) or spoilt (latent 1). In latent 0 action 0 is correct, and
the other one spoils the lock for the rest of the episode. Nothing is paid until the last step; then the reward depends
on whether the lock is good after it:

| rewards | good | spoilt |
|---|---|---|
| 1-D | N(1, 0.1^2) | N(-1, 0.1^2) |
| 2-D | on a ring: x + 2 x / norm(x) for x from N(0, 0.05 I) | N(0, 0.05 I) |

Observations: the latent bit one-hot, the time one-hot (all 0 at the end), and as many numbers N(0, 0.1^2) as are left.
The environment pays the 1-D reward; `offline_data` draws data sets with either.

A policy that takes the correct action with probability c opens the lock from step h on with probability c^(H - h), so
every law of returns is known: `success_probability`, `return_density`, `sample_returns`, `best_log_likelihood`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.configuration import require

LATENTS, ACTIONS = 2, 2
NOISE_STD = 0.1  # of the observations that say nothing
REWARD_STD = 0.1  # of the 1-D reward
RING_RADIUS, RING_VARIANCE = 2.0, 0.05  # of the 2-D reward
CORRECT = 13 / 14  # the paper's policy: the correct action with probability 6/7, else any


@struct.dataclass
class CombLockState(environment.EnvState):
    time: jax.Array
    latent: jax.Array


@struct.dataclass
class CombLockParams(environment.EnvParams):
    max_steps_in_episode: int = 11


class CombLock(environment.Environment[CombLockState, CombLockParams]):
    """See the module's text. Observations are `[observation_size]`, an episode has `horizon` steps."""

    def __init__(self, horizon: int = 10, observation_size: int = 30) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}, allowed: 1 and above")
        if observation_size < LATENTS + horizon:
            raise ValueError(
                f"observation_size is {observation_size}, allowed: {LATENTS} + horizon = {LATENTS + horizon} and above"
            )
        self.horizon, self.observation_size = horizon, observation_size

    @property
    def name(self) -> str:
        return "comb_lock"

    @property
    def default_params(self) -> CombLockParams:
        return CombLockParams(max_steps_in_episode=self.horizon + 1)  # never reached

    @property
    def num_actions(self) -> int:
        return ACTIONS

    def reset_env(self, key: jax.Array, params: CombLockParams) -> tuple[jax.Array, CombLockState]:
        state = CombLockState(time=jnp.zeros((), jnp.int32), latent=jnp.zeros((), jnp.int32))
        return self.observe(key, state, None, params), state

    def step_env(
        self, key: jax.Array, state: CombLockState, action: jax.Array, params: CombLockParams
    ) -> tuple[jax.Array, CombLockState, jax.Array, jax.Array, dict[str, Any]]:
        reward_key, observation_key = jax.random.split(key)
        state = CombLockState(time=state.time + 1, latent=_turn(state.latent, action))
        terminated = self.is_terminated(state, params)
        reward = jnp.where(terminated, sample_reward(reward_key, state.latent, 1)[0], 0.0)
        return self.observe(observation_key, state, action, params), state, reward, terminated, {}

    def observe(self, key: jax.Array, state: CombLockState, action: Any, params: CombLockParams) -> jax.Array:
        return self.features(key, state.latent, state.time)

    def features(self, key: jax.Array, latent: jax.Array, time: jax.Array) -> jax.Array:
        """Observations of hidden states `[...]` at times that broadcast to them, `[..., observation_size]`."""
        latent, time = jnp.broadcast_arrays(latent, time)
        noise = NOISE_STD * jax.random.normal(key, (*latent.shape, self.observation_size - LATENTS - self.horizon))
        known = [jax.nn.one_hot(latent, LATENTS), jax.nn.one_hot(time, self.horizon)]
        return jnp.concatenate([*known, noise], axis=-1)

    def is_terminated(self, state: CombLockState, params: CombLockParams) -> jax.Array:
        return state.time >= self.horizon

    def picture(self, state: CombLockState, params: CombLockParams) -> np.ndarray:
        """The steps in a row, and whether the lock is still good, which the agent does not see well; `rendering`."""
        from jaxrl_dist.envs.drawings import beads
        from jaxrl_dist.records.plotting import COLOURS

        good = int(state.latent) == 0
        canvas = beads(self.horizon + 1, int(state.time))
        canvas.text((0, 0.85), "good" if good else "spoilt", COLOURS[2] if good else COLOURS[1], anchor="lm", bold=True)
        return canvas.array()

    def action_space(self, params: CombLockParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(ACTIONS)

    def observation_space(self, params: CombLockParams | None = None) -> spaces.Box:
        return spaces.Box(-jnp.inf, jnp.inf, (self.observation_size,))


def _turn(latent: jax.Array, action: jax.Array) -> jax.Array:
    """The hidden bit after an action."""
    return jnp.where(action == 0, latent, 1).astype(jnp.int32)


def sample_reward(key: jax.Array, latent: jax.Array, dimension: int) -> jax.Array:
    """Rewards of last steps that end in hidden states `[...]`: `[..., dimension]`, dimension 1 or 2."""
    _check_dimension(dimension)
    normal = jax.random.normal(key, (*latent.shape, dimension))
    if dimension == 1:
        return 1.0 - 2.0 * latent[..., None] + REWARD_STD * normal
    normal = math.sqrt(RING_VARIANCE) * normal
    norm = jnp.linalg.norm(normal, axis=-1, keepdims=True)
    return jnp.where(latent[..., None] == 0, normal * (1 + RING_RADIUS / norm), normal)


# -- the data set -----------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """Logged steps, and what the policy to be evaluated would do next; leading axes `[steps, samples]`."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    """`[steps, samples, dimension]`, in units of return."""
    next_observation: jax.Array
    next_action: jax.Array
    """Drawn once from the policy to be evaluated at the next observation: the logged action there plays no part."""
    terminated: jax.Array


def offline_data(env: CombLock, key: jax.Array, *, samples: int, correct: float, dimension: int = 1) -> Transitions:
    """Uniformly random actions, `samples` for every step and hidden state: `[horizon, 2 * samples, ...]`.

    correct: probability with which the evaluated policy takes action 0 in latent 0; in latent 1 it acts at random.
    Raises ValueError for samples below 1 or another dimension than 1 and 2.
    """
    _check_dimension(dimension)
    require(samples >= 1, f"samples is {samples}; it must be at least 1")
    keys = jax.random.split(key, 5)
    shape = env.horizon, LATENTS * samples
    time = jnp.arange(env.horizon)[:, None]
    latent = jnp.broadcast_to(jnp.repeat(jnp.arange(LATENTS), samples), shape)
    action = jax.random.randint(keys[0], shape, 0, ACTIONS)
    next_latent = _turn(latent, action)
    terminated = jnp.broadcast_to(time == env.horizon - 1, shape)
    reward = jnp.where(terminated[..., None], sample_reward(keys[1], next_latent, dimension), 0.0)
    wrong = jax.random.uniform(keys[2], shape) >= jnp.where(next_latent == 0, correct, 1 / ACTIONS)
    return Transitions(
        env.features(keys[3], latent, time), action, reward,
        env.features(keys[4], next_latent, time + 1), wrong.astype(jnp.int32), terminated,
    )  # fmt: skip


# -- exact laws -------------------------------------------------------------------------------------------------------


def success_probability(
    correct: float, *, horizon: int, step: int = 0, latent: int = 0, action: int | None = 0
) -> float:
    """P(the lock is good at the end) from a hidden state at a step on, after an action or (None) one of the policy."""
    if not 0 <= correct <= 1:
        raise ValueError(f"correct is {correct}, allowed: a probability, 0 to 1")
    if latent != 0 or action not in (0, None):
        return 0.0
    return correct ** (horizon - step - (action is not None))


def return_density(success: float, values: np.ndarray) -> np.ndarray:
    """Density of the 1-D return at `values` `[...]`, per unit of return; `success` weighs the mode at 1."""
    good, spoilt = (scipy.stats.norm.pdf(values, mean, REWARD_STD) for mean in (1.0, -1.0))
    return success * good + (1 - success) * spoilt


def best_log_likelihood(success: float) -> float:
    """Expected log density of the 1-D return under its own law, in nats: no model of it can have more.

    The modes are 20 standard deviations apart, so it is minus the entropy of the outcome and of one Gaussian.
    """
    outcome = scipy.stats.bernoulli.entropy(success)
    return float(-outcome - scipy.stats.norm.entropy(scale=REWARD_STD))


def sample_returns(key: jax.Array, success: float | jax.Array, samples: int, dimension: int = 1) -> jax.Array:
    """Independent returns of a policy that succeeds with probability `success`: `[samples, dimension]`."""
    latent_key, reward_key = jax.random.split(key)
    latent = jax.random.uniform(latent_key, (samples,)) >= success
    return sample_reward(reward_key, latent.astype(jnp.int32), dimension)


def _check_dimension(dimension: int) -> None:
    if dimension not in (1, 2):
        raise ValueError(f"dimension is {dimension}, allowed: 1 or 2")

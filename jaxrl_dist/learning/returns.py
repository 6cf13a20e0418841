"""Returns and bootstrap targets, with termination and truncation kept apart."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrl_dist.distributional.quantile import sort_atoms


def bootstrap_discount(gamma: float | jax.Array, terminated: jax.Array) -> jax.Array:
    """gamma * (1 - terminated): what multiplies the successor's value in a one-step target, same shape as `terminated`.

    Only a true end of the decision process stops the bootstrap. A time limit does not: the successor stored with the
    transition is the true one, so its value is what the return would have continued with.
    """
    return gamma * (1 - terminated.astype(jnp.float32))


class NStep(NamedTuple):
    """An n-step target's parts, each `[...]`: target = reward + discount * value(the state after `steps` steps)."""

    reward: jax.Array
    discount: jax.Array
    steps: jax.Array


def n_step(
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    available: jax.Array,
    gamma: float | jax.Array,
) -> NStep:
    """Rewards of up to n steps, and what the value after them is multiplied by: `[n, ...]` each -> `[...]` each.

    The window has m <= n steps. It ends with the first terminated or truncated one, or before the first one that is
    not `available` (not recorded yet; the first step always is): reward = sum_{k<m} gamma^k r_k, and
    discount = gamma^m, or 0 where its last step terminated (Sutton 1988; Rainbow, arXiv 1710.02298, section 3).
    """
    ended = terminated | truncated
    taken = jnp.concatenate([jnp.ones_like(ended[:1]), available[1:] & ~ended[:-1]]).astype(jnp.int32)
    taken = jnp.cumprod(taken, axis=0) > 0
    power = jnp.cumprod(jnp.where(taken, gamma, 1.0), axis=0)  # gamma^(k+1), and gamma^m from the last step on
    later = jnp.where(taken[1:], power[:-1] * reward[1:], 0).sum(0)
    discount = jnp.where((taken & terminated).any(0), 0, power[-1])
    return NStep(reward[0] + later, discount, taken.sum(0, dtype=jnp.int32))


def gae(
    reward: jax.Array,
    value: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    decay: float | jax.Array,
) -> jax.Array:
    """Advantages of the steps of a rollout, `[steps, ...]` each -> `[steps, ...]`.

    A_t = delta_t + gamma decay A_{t+1} within an episode, delta_t = r_t + gamma V(s_{t+1}) - V(s_t), where a
    termination has no successor's value (generalised advantage estimation, Schulman et al., arXiv 1506.02438).
    `next_value` is the value of the true successor: a time limit bootstraps from it, and cuts the sum like any end.
    """
    delta = reward + bootstrap_discount(gamma, terminated) * next_value - value
    weight = gamma * decay * (1 - (terminated | truncated).astype(jnp.float32))

    def back(later: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        advantage = step[0] + step[1] * later
        return advantage, advantage

    return jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, weight), reverse=True)[1]


def q_lambda(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    decay: float | jax.Array,
) -> jax.Array:
    """Returns of the steps of a rollout that mix sums of rewards with values, `[steps, ...]` each -> `[steps, ...]`.

    R_t = r_t + gamma ((1 - decay) V(s_{t+1}) + decay R_{t+1}) within an episode; R_t = r_t + gamma V(s_{t+1}) at a time
    limit and at the rollout's end, and r_t at a termination. `next_value` is V of the true successor. With the largest
    action value for V these are Peng's Q(lambda) targets (Peng & Williams 1996), with the value of the policy its
    lambda-returns, which are `gae` plus V(s_t).
    """
    one_step = reward + bootstrap_discount(gamma, terminated) * next_value
    weight = gamma * decay * (1 - (terminated | truncated).astype(jnp.float32))

    def back(later: jax.Array, step: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The value is that of the step's own successor. Carried from the step after it, it is easily one step off.
        target = step[0] + step[1] * (later - step[2])
        return target, target

    return jax.lax.scan(back, next_value[-1], (one_step, weight, next_value), reverse=True)[1]


def lambda_law(
    reward: jax.Array,
    next_atoms: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    gamma: float | jax.Array,
    decay: float | jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Laws of the lambda-returns of a rollout as atoms: `[steps, num_envs, atoms]`, from numbers `[steps, num_envs]`.

    next_atoms: equally weighted atoms of the law Z(s_{t+1}) of the true successor, `[steps, num_envs, atoms]`, in any
    order. The law of step t is that of r_t + gamma X, where X is drawn from the law of step t + 1 with probability
    `decay`, and otherwise from Z(s_{t+1}); always from Z(s_{t+1}) at a time limit and at the rollout's end, and 0 at a
    termination. It is the mixture of the laws of n-step returns with weights (1 - decay) decay^(n-1) (SR(lambda) of
    GMAC, Nam, Kim & Park, ICML 2021); its mean is that of Z(s_t) plus `gae`.

    That mixture has too many atoms to be kept. Of the ranks of a step's atoms the part `decay` stays, evenly spread
    from a start that is drawn (systematic sampling), and the others are the successor's. The expected law is then the
    mixture itself, and what quantile regression on such targets finds are its quantiles. Atoms drawn independently are
    as right and noisier; a projection on as many quantiles at each step draws nothing, but its errors add up.
    """
    chex.assert_rank(next_atoms, 3)
    chex.assert_shape([reward, terminated, truncated], next_atoms.shape[:2])
    count = next_atoms.shape[-1]
    following = sort_atoms(next_atoms.reshape(-1, count)).reshape(next_atoms.shape)
    start, rank = jax.random.uniform(key, (*reward.shape, 1)), jnp.arange(count, dtype=jnp.float32)
    stays = jnp.floor((rank + 1) * decay + start) > jnp.floor(rank * decay + start)
    stays &= ~(terminated | truncated)[..., None]

    def back(later: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, discount, following, stays = step
        atoms = reward[:, None] + discount[:, None] * jnp.where(stays, sort_atoms(later), following)
        return atoms, atoms

    steps = reward, bootstrap_discount(gamma, terminated), following, stays
    return jax.lax.scan(back, following[-1], steps, reverse=True)[1]

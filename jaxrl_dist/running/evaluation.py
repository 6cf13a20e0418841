"""What a trained agent is worth: episode returns, and its learned return distributions against Monte-Carlo ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxrl_dist.agent import Agent, Claim
from jaxrl_dist.distributional import law
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.distributional.metrics import wasserstein_1
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.interaction import Interaction, Transition
from jaxrl_dist.learning.spaces import spaces_of

# Monte-Carlo returns are followed until less than this part of the discounted weight is left to be estimated ...
NEGLIGIBLE_WEIGHT = 0.01
# ... or for so many steps, where the discount is above 0.99908.
LONGEST_ROLLOUT = 5000
# The central interval of learned laws whose coverage is reported.
CENTRAL_INTERVAL = (0.1, 0.9)

LIMIT_HAS_ANOTHER_MEANING = "its observations, rewards or terminations depend on max_steps_in_episode"


class Episodes(NamedTuple):
    """Undiscounted raw return and length of the first episode of each environment, `[episodes]`.

    extras: undiscounted sums of what the environment's transitions carry beside the reward, `[episodes, ...]` by name.
    """

    episode_return: jax.Array
    episode_length: jax.Array
    extras: Any = ()


class JointReturns(NamedTuple):
    """Discounted vectors of returns: learned `[states, particles, rewards]`, observed `[states, rollouts, rewards]`."""

    predicted: jax.Array
    monte_carlo: jax.Array


class ReturnDistributions(NamedTuple):
    """Discounted returns from the same states and first actions: learned laws and Monte-Carlo samples.

    predicted: `[states, atoms]`; monte_carlo: `[states, rollouts]`; missing: `[states]`, the part of the discounted
    weight that lies beyond the ends of rollouts, and whose rewards are therefore estimates: 0 where every one ended.
    joint: of a claim about a vector of rewards (`Claim.joint`) the vectors, of the same rollouts; else ().
    """

    predicted: Law
    monte_carlo: jax.Array
    missing: jax.Array
    joint: JointReturns | tuple = ()


class Calibration(NamedTuple):
    """How far learned return distributions are from Monte-Carlo ones: scalars, in units of return but for the last two.

    calibration_w1: Wasserstein-1 distance, mean over states; some of it is the sampling error of the rollouts.
    overestimation, overestimation_spread: mean and standard deviation over states of the learned less the observed
    mean. coverage: part of the observed returns from the learned 10 % to the learned 90 % quantile, both included: 0.8
    for a law that is right and continuous; None for an agent that learns a mean, which has no such interval.
    calibration_missing: part of the discounted weight that no rollout has seen (`ReturnDistributions.missing`); the
    observed mean is off by at most twice this times max |reward| / (1 - discount).
    """

    calibration_w1: jax.Array
    overestimation: jax.Array
    overestimation_spread: jax.Array
    coverage: jax.Array | None
    calibration_missing: jax.Array


def calibration(found: ReturnDistributions, *, learns_mean: bool = False) -> Calibration:
    """The numbers of a comparison, all NaN where anything in it is not finite. learns_mean: `Claim.learns_mean`."""
    predicted, returns, missing = found[:3]
    error = law.mean(predicted) - returns.mean(-1)
    numbers = Calibration(
        wasserstein_1(predicted, returns).mean(), error.mean(), error.std(),
        None if learns_mean else _coverage(predicted, returns), missing.mean(),
    )  # fmt: skip
    finite = jnp.array([jnp.isfinite(x).all() for x in (*predicted, returns)]).all()
    return jax.tree.map(lambda x: jnp.where(finite, x, jnp.nan), numbers)


def _coverage(predicted: Law, returns: jax.Array) -> jax.Array:
    low, high = jnp.moveaxis(law.quantile(predicted, jnp.array(CENTRAL_INTERVAL)), -1, 0)[..., None]
    rounding = 1e-5 * jnp.maximum(jnp.abs(low), jnp.abs(high))
    inside = (low - rounding <= returns) & (returns <= high + rounding)
    return inside.mean()


def what_is_missing(missing: float, discount: float) -> str | None:
    """One sentence on the weight that Monte-Carlo returns have not seen, or None where it is negligible."""
    if not missing > NEGLIGIBLE_WEIGHT:
        return None
    rest = "is left out" if discount == 1 else "is estimated by the rewards of their second half"
    return (
        f"Monte-Carlo returns are followed for {LONGEST_ROLLOUT:,} steps, and with --discount {discount:g} "
        f"{missing:.0%} of their weight lies beyond (calibration_missing): it {rest}, and calibration is no better"
    )


def without_time_limit(env, env_params) -> Any | None:
    """The environment's parameters with its time limit lifted, or None where `limited_because` says why it cannot be.

    A critic that bootstraps at time limits predicts the return of the task without one.
    """
    if limited_because(env, env_params):
        return None
    limit, far = env_params.max_steps_in_episode, 2**30
    # Of the old type, so that the environment's programs are not traced again.
    lifted = jnp.full_like(limit, far) if hasattr(limit, "dtype") else type(limit)(far)
    return env_params.replace(max_steps_in_episode=lifted)


def limited_because(env, env_params) -> str:
    """Why the time limit cannot be lifted; empty where it can.

    Reads the traced program of a reset and a step: nothing is compiled or run.
    """
    if not (hasattr(env_params, "max_steps_in_episode") and hasattr(env_params, "replace")):
        return "its parameters have no max_steps_in_episode that could be replaced"

    def outcomes(limit, reset_key, action_key, step_key, inner_key):
        params = env_params.replace(max_steps_in_episode=limit)
        observation, state = interaction.strengthen(env.reset(reset_key, params))
        action = spaces_of(env, env_params)[0].sample(action_key)
        _, _, reward, terminated, _, info = env.step(step_key, state, action, params)
        reward = reward, [info[name] for name in interaction.EXTRAS if name in info]
        # The state after `step` may be one after a reset, which depends on the limit in every environment.
        successor = env.step_env(inner_key, state, action, params)[1] if hasattr(env, "step_env") else ()
        return observation, state, info["final_observation"], reward, terminated, successor

    keys = jax.random.split(jax.random.key(0), 4)
    try:
        program = jax.make_jaxpr(outcomes)(env_params.max_steps_in_episode, *keys)
    except jax.errors.JAXTypeError:
        return LIMIT_HAS_ANOTHER_MEANING
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    return LIMIT_HAS_ANOTHER_MEANING if used[0] else ""


def no_calibration(agent: Agent, env, env_params) -> str:
    """Why returns are not compared, for the user."""
    if agent.claim is None:
        return "the algorithm claims nothing about returns"
    return (
        f"the environment's time limit cannot be lifted ({limited_because(env, env_params)}), and Monte-Carlo returns "
        "cut by it are not what the critic predicts"
    )


def horizon(discount: float | jax.Array) -> jax.Array:
    """Steps after which less than `NEGLIGIBLE_WEIGHT` of the discounted weight is left, at most `LONGEST_ROLLOUT`."""
    discount = jnp.clip(jnp.asarray(discount, jnp.float32), 1e-6, 1 - 1e-6)
    steps = jnp.ceil(jnp.log(NEGLIGIBLE_WEIGHT) / jnp.log(discount))
    return jnp.minimum(steps, LONGEST_ROLLOUT).astype(jnp.int32)


def spread(episode_limit: int, states: int) -> int:
    """Steps over which the compared states are spread: a quarter of the longest episode, and a step per state."""
    return max(states, episode_limit // 4)


def episode_limit(env_params, fallback: int = 0) -> int:
    """Steps after which an episode ends at the latest; `fallback` where the environment itself sets no time limit."""
    limit = int(getattr(env_params, "max_steps_in_episode", 0)) or fallback
    if limit < 1:
        raise ValueError(
            "--eval-max-steps is 0, but the environment's params have no max_steps_in_episode; give the longest "
            "evaluation episode"
        )
    return limit


def columns(extras: Any) -> dict[str, Any]:
    """`Episodes.extras` with leading axes `[runs, episodes]`, a vector as one column for each component."""
    found = {}
    for name, values in (extras or {}).items():
        parts = values.reshape(*values.shape[:2], -1)
        single = values.ndim == 2
        found |= {name if single else f"{name}_{i}": parts[..., i] for i in range(parts.shape[-1])}
    return found


def evaluate(agent: Agent, env, env_params, state, key: jax.Array, *, episodes: int, max_steps: int) -> Episodes:
    """Run the evaluation policy for one episode in each of `episodes` freshly reset environments.

    No exploration, raw rewards, frozen observation statistics. Every environment counts with its first episode only,
    so short episodes are not over-represented. Episodes still running after `max_steps` count as they stand.
    """
    start_key, loop_key = jax.random.split(key)
    policy = agent.policy
    if agent.adapt:
        start_key, adapt_key = jax.random.split(start_key)
        state = agent.adapt(state, env_params, adapt_key)
    batch = interaction.start(env, env_params, start_key, episodes, policy.start)
    running = jnp.ones(episodes, bool)
    extras = _beside(interaction.transition_like(env, env_params).extras)
    nothing = jax.tree.map(lambda x: jnp.zeros((episodes, *x.shape), x.dtype), extras)
    totals = Episodes(jnp.zeros(episodes), jnp.zeros(episodes, jnp.int32), nothing)

    def keep_going(carry):
        time, _, running, _ = carry
        return (time < max_steps) & running.any()

    def advance(carry):
        time, batch, running, totals = carry
        act_key, step_key = jax.random.split(jax.random.fold_in(loop_key, time))
        action, memory = policy.act(state, batch.observation, batch.memory, act_key)
        batch, transition, _ = interaction.step(env, env_params, batch, action, step_key, memory, policy.start)
        totals = Episodes(
            totals.episode_return + jnp.where(running, interaction.raw_reward(transition), 0),
            totals.episode_length + running,
            jax.tree.map(
                lambda x, sum: interaction.where(running, sum + x, sum), _beside(transition.extras), totals.extras
            ),
        )
        return time + 1, batch, running & ~(transition.terminated | transition.truncated), totals

    return jax.lax.while_loop(keep_going, advance, (jnp.int32(0), batch, running, totals))[-1]


def _beside(extras: Any) -> Any:
    """What is summed beside the reward: not the reward itself."""
    return {name: x for name, x in (extras or {}).items() if name != "unchanged_reward"} or ()


def return_distributions(
    claim: Claim,
    env,
    env_params,
    state,
    key: jax.Array,
    *,
    states: int,
    rollouts: int,
    horizon: int | jax.Array,
    spread: int,
) -> ReturnDistributions:
    """`return_distributions_from` states that are reached by following the claim's policy for 0 to `spread` steps.

    Starts are fresh. Give `env_params` whose time limit lies beyond spread + horizon.
    """
    start_key, spread_key, compare_key = jax.random.split(key, 3)
    # State i is the one reached after i * spread / states steps.
    batch = interaction.start(env, env_params, start_key, states)
    stop_at = jnp.arange(states) * spread // states

    def wander(time, batch):
        moved, _ = _follow(claim, env, env_params, state, batch, jax.random.fold_in(spread_key, time))
        return jax.tree.map(lambda new, old: interaction.where(time < stop_at, new, old), moved, batch)

    batch = jax.lax.fori_loop(0, spread, wander, batch)
    return return_distributions_from(
        claim, env, env_params, state, compare_key, batch, rollouts=rollouts, horizon=horizon
    )


def return_distributions_from(
    claim: Claim,
    env,
    env_params,
    state,
    key: jax.Array,
    batch: Interaction,
    *,
    rollouts: int,
    horizon: int | jax.Array,
) -> ReturnDistributions:
    """Learned return laws against Monte-Carlo returns of the same policy from the same states and first actions.

    Each state of the environments in `batch` is cloned `rollouts` times; the clones take the same first action and then
    follow the claim's policy. A soft critic's return holds the entropy bonus of every
    step but the first, and so does the Monte-Carlo one. Give `env_params` whose time limit is out of reach, since a
    critic that bootstraps at time limits predicts the return of the task without one. Where the claim is about states
    (`Claim.of_states`) every clone draws a first action of its own, whose bonus counts.

    A rollout that has not ended `horizon` steps after the first goes on for ever with its mean reward since half of
    them: exact for steady rewards, and, with the choice of `horizon`, of the right mean and about the right variance
    for stationary ones. A random (geometric) end would be unbiased, but the slowest of a batch takes more steps than
    make the rest negligible, and each return would spread by as much as is missing. How much that is, is reported; with
    discount 1 there is no estimate, and nothing is added.
    """
    action_key, rollout_key = jax.random.split(key)
    clones = jax.tree.map(lambda x: jnp.repeat(x, rollouts, axis=0), batch)
    first_key, rest_key = jax.random.split(rollout_key)
    if claim.of_states:
        first_action, first_bonus = claim.policy(state, clones.observation, action_key)
        predicted = claim.law(state, batch.observation, first_action[::rollouts])
    else:
        action, _ = claim.policy(state, batch.observation, action_key)
        predicted = claim.law(state, batch.observation, action)
        first_action, first_bonus = jnp.repeat(action, rollouts, axis=0), 0
    clones, first, _ = interaction.step(env, env_params, clones, first_action, first_key)

    def rewards(transition: Transition, bonus: jax.Array | float) -> tuple[jax.Array, ...]:
        reward = transition.reward + bonus
        return (reward, transition.extras["rewards"]) if claim.joint else (reward,)

    first_rewards = rewards(first, first_bonus)

    discount = jnp.asarray(claim.discount, jnp.float32)

    def keep_going(carry):
        time, _, alive, *_ = carry
        return (time < horizon) & alive.any()

    def rollout(carry):
        time, clones, alive, weight, total, late = carry
        key = jax.random.fold_in(rest_key, time)
        clones, (transition, bonus) = _follow(claim, env, env_params, state, clones, key)
        found = [interaction.where(alive, x, jnp.zeros_like(x)) for x in rewards(transition, bonus)]
        late = tuple(sum + jnp.where(time < horizon // 2, 0, x) for sum, x in zip(late, found, strict=True))
        total = tuple(sum + weight * x for sum, x in zip(total, found, strict=True))
        return time + 1, clones, alive & ~transition.terminated, weight * discount, total, late

    nothing = tuple(jnp.zeros_like(x) for x in first_rewards)
    carry = jnp.int32(0), clones, ~first.terminated, discount, first_rewards, nothing
    time, _, alive, weight, total, late = jax.lax.while_loop(keep_going, rollout, carry)
    for_ever = jnp.where(discount < 1, 1 / jnp.where(discount < 1, 1 - discount, 1), 0)
    missing = jnp.where(alive, weight, 0)

    def with_the_rest(total: jax.Array, late: jax.Array) -> jax.Array:
        late_reward = late / jnp.maximum(time - horizon // 2, 1)
        rest = (missing * for_ever).reshape(-1, *(1,) * (late.ndim - 1)) * late_reward
        return (total + rest).reshape(-1, rollouts, *late.shape[1:])

    monte_carlo, *vectors = map(with_the_rest, total, late)
    together = ()
    if claim.joint:
        taken = first_action[::rollouts]
        together = JointReturns(claim.joint(state, batch.observation, taken), *vectors)
    return ReturnDistributions(predicted, monte_carlo, missing.reshape(-1, rollouts).mean(-1), together)


def _follow(claim: Claim, env, env_params, state, batch: Interaction, key: jax.Array):
    """One step of the claim's policy: the environments after it, and what happened with the bonus for it."""
    act_key, step_key = jax.random.split(key)
    action, bonus = claim.policy(state, batch.observation, act_key)
    batch, transition, _ = interaction.step(env, env_params, batch, action, step_key)
    return batch, (transition, bonus)

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from toys import Toy, ToyParams, agents, at_home

from jaxrl_dist.agent import Agent, Claim, memoryless
from jaxrl_dist.distributional.law import Law, equally_weighted
from jaxrl_dist.learning import interaction
from jaxrl_dist.running import evaluation

PUSH = 0.25  # the constant action of the evaluation policy, in both components


def acting(act) -> Agent:
    return Agent(None, None, memoryless(act), None)


# -- evaluate ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("episodes", "max_steps"))
def evaluate(key, params, episodes=40, max_steps=100):
    agent = acting(lambda state, observation, key: jnp.full((observation.shape[0], 2), state))
    return evaluation.evaluate(agent, Toy(), params, PUSH, key, episodes=episodes, max_steps=max_steps)


def lengths_of(key, params, episodes=40):
    """The lengths that the environments draw at their reset, which their observations show."""
    return np.asarray(interaction.start(Toy(), params, jax.random.split(key)[0], episodes).observation[:, 2])


def expected_return(length):
    return length * (length - 1) / 2 + 2 * PUSH * length  # 0 + 1 + ... + (length - 1) and the action at every step


def test_every_environment_counts_with_its_first_episode_only():
    params = ToyParams(shortest=2, longest=30)
    episodes = evaluate(jax.random.key(0), params)
    lengths = lengths_of(jax.random.key(0), params)
    assert lengths.min() < 6 < 24 < lengths.max()  # short ones end, and restart, many times before the last one ends
    np.testing.assert_array_equal(episodes.episode_length, lengths)
    np.testing.assert_allclose(episodes.episode_return, expected_return(lengths), rtol=1e-3)


def test_a_time_limit_ends_an_episode():
    params = ToyParams(shortest=2, longest=30, max_steps_in_episode=8)
    episodes = evaluate(jax.random.key(0), params)
    lengths = np.minimum(lengths_of(jax.random.key(0), params), 8)
    np.testing.assert_array_equal(episodes.episode_length, lengths)
    np.testing.assert_allclose(episodes.episode_return, expected_return(lengths), rtol=1e-3)


def test_episodes_still_running_after_max_steps_count_as_they_stand():
    params = ToyParams(shortest=2, longest=30)
    episodes = evaluate(jax.random.key(0), params, max_steps=5)
    lengths = np.minimum(lengths_of(jax.random.key(0), params), 5)
    np.testing.assert_array_equal(episodes.episode_length, lengths)
    np.testing.assert_allclose(episodes.episode_return, expected_return(lengths), rtol=1e-3)


def test_a_noisy_evaluation_draws_fresh_numbers_at_every_step_and_key():
    params = ToyParams(shortest=400, longest=400, max_steps_in_episode=500, noise=1.0)
    episodes = evaluate(jax.random.key(1), params, episodes=100, max_steps=500)
    noise = np.asarray(episodes.episode_return) - expected_return(400)
    # A sum of 400 independent draws: deviation 20; the same draw at every step would give 400. float16 rewards add 2.
    assert 16 < noise.std() < 24
    assert len(np.unique(episodes.episode_return)) == 100
    again = evaluate(jax.random.key(1), params, episodes=100, max_steps=500)
    np.testing.assert_array_equal(again.episode_return, episodes.episode_return)


def test_a_reward_that_is_nan_makes_the_return_nan():
    episodes = evaluate(jax.random.key(0), ToyParams(noise=np.nan))
    assert np.isnan(episodes.episode_return).all()
    np.testing.assert_array_equal(episodes.episode_length, lengths_of(jax.random.key(0), ToyParams()))


def test_episode_limit():
    assert evaluation.episode_limit(ToyParams(max_steps_in_episode=7)) == 7
    assert evaluation.episode_limit(ToyParams(max_steps_in_episode=7), fallback=9) == 7
    assert evaluation.episode_limit(object(), fallback=9) == 9
    with pytest.raises(ValueError, match="--eval-max-steps is 0, but the environment's params have no max_steps"):
        evaluation.episode_limit(object())


# -- return_distributions ---------------------------------------------------------------------------------------------


class WalkParams(NamedTuple):
    pays_from: float = 0.0
    length: float = jnp.inf
    end_probability: float = 0.0
    noise: float = 0.0
    max_steps_in_episode: int = 1_000_000


class Walk:
    """Reward = the action + noise, from the time `pays_from` on. Ends with equal probability at every step, at the
    latest at the time `length`. Observation: time and a random label.
    """

    name = "Walk"

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))

    def reset(self, key, params):
        state = jnp.stack([0.0, jax.random.uniform(key)])
        return state, state

    def step(self, key, state, action, params):
        reset_key, noise_key, end_key = jax.random.split(key, 3)
        reward = (action[0] + params.noise * jax.random.normal(noise_key)) * (state[0] >= params.pays_from)
        moved = state + jnp.array([1.0, 0.0])
        terminated = (jax.random.uniform(end_key) < params.end_probability) | (moved[0] >= params.length)
        following = jnp.where(terminated, self.reset(reset_key, params)[0], moved)
        return following, following, reward, terminated, jnp.zeros((), bool), {"final_observation": moved}


BONUS = 0.5
STATES, ROLLOUTS = 4, 2000


def steady(state, observation, key):
    """Always the action 1, with an entropy bonus."""
    return jnp.ones((observation.shape[0], 1)), jnp.full(observation.shape[0], BONUS)


def erratic(state, observation, key):
    return jax.random.uniform(key, (observation.shape[0], 1), minval=-1, maxval=1), jnp.zeros(observation.shape[0])


@functools.partial(jax.jit, static_argnames=("policy", "spread"))
def distributions(policy, params, discount, horizon, spread=8):
    law = lambda state, observation, action: equally_weighted(jnp.concatenate([observation, action], -1))  # noqa: E731
    return evaluation.return_distributions(
        Claim(policy, law, discount), Walk(), params, None, jax.random.key(0), states=STATES, rollouts=ROLLOUTS,
        horizon=horizon, spread=spread,
    )  # fmt: skip


def test_the_bonus_counts_from_the_second_step_on():
    returns = distributions(steady, WalkParams(length=4 + 8), 0.5, horizon=20).monte_carlo
    assert returns.shape == (STATES, ROLLOUTS)
    steps = 12 - np.array([0, 2, 4, 6])  # left to each state
    np.testing.assert_allclose(returns[:, 0], 1 + (1 + BONUS) * (1 - 0.5 ** (steps - 1)), rtol=1e-6)


def test_mean_and_variance_agree_with_the_closed_form():
    # Rewards 1 + N(0, 4): the mean adds gamma^t, the variance gamma^2t, and 60 steps leave 0.8^60 = 1.5e-6 out.
    gamma = 0.8
    returns = np.asarray(distributions(steady, WalkParams(noise=2.0), gamma, horizon=60).monte_carlo, np.float64)
    mean, variance = 1 + (1 + BONUS) * gamma / (1 - gamma), 4 / (1 - gamma**2)
    count = returns.size
    assert returns.mean() == pytest.approx(mean, abs=4 * np.sqrt(variance / count))
    assert returns.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / count))
    # Clones of a state are independent, and so are the states.
    assert returns.mean(1).std() < 4 * np.sqrt(variance / ROLLOUTS)
    assert np.abs(np.corrcoef(returns) - np.eye(STATES)).max() < 4 / np.sqrt(ROLLOUTS)


def test_termination_stops_the_sum():
    end, gamma, horizon = 0.3, 0.9, 80
    returns = np.asarray(distributions(steady, WalkParams(end_probability=end), gamma, horizon=horizon).monte_carlo)
    # After k further steps the return is 1 + (1 + bonus) (gamma + ... + gamma^k), with probability (1 - p)^k p.
    steps = np.arange(horizon + 1)
    possible = 1 + (1 + BONUS) * gamma * (1 - gamma**steps) / (1 - gamma)
    nearest = np.abs(returns.reshape(-1, 1) - possible).argmin(1)
    np.testing.assert_allclose(returns.reshape(-1), possible[nearest], rtol=1e-4)
    for k in range(5):
        probability = (1 - end) ** k * end
        tolerance = 4 * np.sqrt(probability * (1 - probability) / returns.size)
        assert (nearest == k).mean() == pytest.approx(probability, abs=tolerance)


def test_clones_share_state_and_first_action_with_the_prediction():
    (predicted, _), returns, _, together = distributions(erratic, WalkParams(), 0.0, horizon=1)
    assert together == ()  # no claim about a vector of rewards
    np.testing.assert_array_equal(predicted[:, 0], [0, 2, 4, 6])  # states after 0 to `spread` = 8 steps
    first_action = predicted[:, 2]
    assert len(np.unique(first_action)) == STATES
    assert len(np.unique(predicted[:, 1])) == STATES  # from starts of their own
    np.testing.assert_array_equal(returns, np.broadcast_to(first_action[:, None], (STATES, ROLLOUTS)))
    # Later actions are drawn afresh by every clone.
    rest = np.asarray(distributions(erratic, WalkParams(), 1.0, horizon=1).monte_carlo - first_action[:, None])
    assert len(np.unique(rest)) > 0.95 * rest.size


# -- the rollouts end early -------------------------------------------------------------------------------------------


def test_ending_early_changes_no_return():
    """Rollouts stop when the last episode has terminated; a horizon far beyond it gives the same returns."""
    params = WalkParams(end_probability=0.5)
    near, far = (distributions(steady, params, 0.9, horizon=h).monte_carlo for h in (60, 2**30))
    np.testing.assert_array_equal(near, far)  # 2^30 steps could not be waited for
    cut = distributions(steady, params, 0.9, horizon=2)
    unfinished = cut.monte_carlo != near  # those longer than one step and two more
    assert unfinished.mean() == pytest.approx(0.5**3, abs=0.02)
    np.testing.assert_allclose(cut.missing, unfinished.mean(1) * 0.9**3, rtol=1e-5)
    np.testing.assert_allclose(cut.monte_carlo[unfinished], 1 + (1 + BONUS) * 9, rtol=1e-5)


def test_the_horizon_counts_steps_after_the_first():
    returns = distributions(steady, WalkParams(), 0.5, horizon=0).monte_carlo
    np.testing.assert_array_equal(returns, np.ones((STATES, ROLLOUTS)))


@pytest.mark.parametrize(
    ("discount", "steps"), [(0.9, 44), (0.99, 459), (0.5, 7), (0.0, 1), (0.999, 4603), (0.9995, 5000), (1.0, 5000)]
)
def test_horizon_leaves_a_hundredth_of_the_weight(discount, steps):
    found = jax.jit(evaluation.horizon)(discount)
    assert found == steps
    assert found.dtype == jnp.int32
    if steps < evaluation.LONGEST_ROLLOUT and discount > 0:
        assert discount**steps < evaluation.NEGLIGIBLE_WEIGHT <= discount ** (steps - 1)


def test_without_time_limit():
    endless = evaluation.without_time_limit(Toy(), ToyParams(longest=9, max_steps_in_episode=7))
    assert endless.max_steps_in_episode > 10**9
    assert endless.longest == 9
    assert evaluation.without_time_limit(Toy(), object()) is None
    claim = Claim(None, None, 0.9)
    assert "no max_steps_in_episode" in evaluation.no_calibration(acting(None)._replace(claim=claim), Toy(), object())
    assert "claims nothing" in evaluation.no_calibration(acting(None), Toy(), object())


@pytest.mark.parametrize("limit", [7.0, jnp.int32(7), np.float32(7)])
def test_a_lifted_limit_is_of_the_old_type(limit):
    """Else the environment's programs would be traced and compiled again."""
    lifted = evaluation.without_time_limit(Toy(), ToyParams(max_steps_in_episode=limit)).max_steps_in_episode
    assert np.all(np.asarray(lifted) == 2**30)
    assert type(lifted) is float if type(limit) is float else (lifted.dtype, lifted.shape) == (limit.dtype, limit.shape)


# -- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    # First state: mass .75 at 0 and .25 at 4 against 0, 0, 4, 4: a quarter of the mass is moved by 4, mean 1 against 2.
    # Second state: all mass at 5 against 1, 1, 1, 5: three quarters moved by 4, mean 5 against 2.
    predicted = Law(jnp.array([[4.0, 0.0], [5.0, 100.0]]), jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    returns, missing = jnp.array([[4.0, 0.0, 4.0, 0.0], [1.0, 5.0, 1.0, 1.0]]), jnp.array([0.5, 0.25])
    found = evaluation.ReturnDistributions(predicted, returns, missing)
    calibration = evaluation.calibration(found)
    assert calibration.calibration_w1 == pytest.approx((1 + 3) / 2)
    assert calibration.overestimation == pytest.approx((-1 + 3) / 2)
    assert calibration.overestimation_spread == pytest.approx(2)
    # From 0 to 4 lie all four returns of the first state, from 5 to 5 one of the second's.
    assert calibration.coverage == pytest.approx(5 / 8)
    assert calibration.calibration_missing == pytest.approx(0.375)
    assert evaluation.calibration(found, learns_mean=True) == calibration._replace(coverage=None)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 1, 0), (1, 0, 1), (2, 1, 1)])  # an atom, a mass, a return
def test_calibration_of_what_is_not_finite_is_nan(broken, where):
    parts = [jnp.full((2, 3), 1.0), jnp.full((2, 3), 1 / 3), jnp.full((2, 4), 1.0)]
    calibrate = jax.jit(lambda *parts: evaluation.calibration(
        evaluation.ReturnDistributions(Law(*parts[:2]), parts[2], jnp.zeros(2))
    ))  # fmt: skip
    np.testing.assert_allclose(calibrate(*parts), (0, 0, 0, 1, 0), atol=1e-6)
    parts[where[0]] = parts[where[0]].at[where[1:]].set(broken)
    assert np.isnan(calibrate(*parts)).all()


@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_calibration_of_a_prediction_that_is_right_but_for_a_shift(shift):
    """Steps that end with probability 1/2: the law of the return is known, P(return = its k-th value) = 2^-(k+1)."""
    gamma, steps = 0.8, np.arange(25)
    atoms = 1 + (1 + BONUS) * gamma * (1 - gamma**steps) / (1 - gamma) + shift

    def predict(state, observation, action):
        shape = (observation.shape[0], len(steps))
        return Law(jnp.broadcast_to(atoms, shape), jnp.broadcast_to(0.5 ** (steps + 1), shape))

    @jax.jit
    def calibrate(key):
        found = evaluation.return_distributions(
            Claim(steady, predict, gamma), Walk(), WalkParams(end_probability=0.5), None, key,
            states=STATES, rollouts=ROLLOUTS, horizon=evaluation.horizon(gamma), spread=8,
        )  # fmt: skip
        return evaluation.calibration(found)

    distance, overestimation, spread, coverage, _ = calibrate(jax.random.key(3))
    assert spread < 0.1  # the same shift everywhere
    # The quantiles at 0.1 and 0.9 are the first and the fourth value, of probability 1/2 + 1/4 + 1/8 + 1/16.
    possible = atoms - shift
    inside = (atoms[0] - 1e-3 <= possible) & (possible <= atoms[3] + 1e-3)
    assert coverage == pytest.approx((0.5 ** (steps + 1))[inside].sum(), abs=0.02)
    # The deviation of a return is about 1.4, so that of a mean over all rollouts 0.016.
    assert overestimation == pytest.approx(shift, abs=0.05)
    if shift:
        assert distance == pytest.approx(abs(shift), abs=0.05)
    else:
        assert 0 < distance < 0.1  # the sampling error of a state's rollouts


# -- an exact law is found right at any discount ----------------------------------------------------------------------


@jax.jit
def calibration_of_the_exact_law(params, discount):
    def value(steps):  # the discounted weight of so many steps
        return jnp.where(jnp.isinf(steps), 1, 1 - discount ** jnp.where(jnp.isinf(steps), 1, steps)) / (1 - discount)

    def predict(state, observation, action):
        before = jnp.maximum(params.pays_from - observation[:, :1], 0)
        return equally_weighted(value(params.length - observation[:, :1]) - value(before))

    def policy(state, observation, key):
        return jnp.ones((observation.shape[0], 1)), jnp.zeros(observation.shape[0])

    found = evaluation.return_distributions(
        Claim(policy, predict, discount), Walk(), params, None, jax.random.key(0),
        states=2, rollouts=2, horizon=evaluation.horizon(discount), spread=2,
    )  # fmt: skip
    return evaluation.calibration(found)


DISCOUNTS = (0.9, 0.99, 0.999, 0.9995, 0.9999)


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_rewards_that_never_end(discount):
    found, value = calibration_of_the_exact_law(WalkParams(), discount), 1 / (1 - discount)
    assert abs(found.overestimation) < 0.002 * value
    assert found.calibration_w1 < 0.002 * value
    steps = int(evaluation.horizon(discount))
    assert found.calibration_missing == pytest.approx(discount ** (steps + 1), rel=0.01)
    said = evaluation.what_is_missing(float(found.calibration_missing), discount)
    assert (said is None) == (discount <= 0.999)
    if discount == 0.9999:
        assert "with --discount 0.9999 61% of their weight lies beyond" in said


@pytest.mark.parametrize("discount", DISCOUNTS[2:])
@pytest.mark.parametrize("pays_from", [1_000, 3_000, 10_000])
def test_rewards_that_come_late_are_wrong_by_no_more_than_is_reported(discount, pays_from):
    found = calibration_of_the_exact_law(WalkParams(pays_from=float(pays_from)), discount)
    exact, scale = discount**pays_from / (1 - discount), 1 / (1 - discount)
    assert abs(found.overestimation) < min(exact, found.calibration_missing * scale) + 2e-3 * scale
    if discount == 0.999:  # all but a hundredth of the weight is seen
        assert abs(found.overestimation) < 0.01 * scale


@pytest.mark.parametrize("discount", DISCOUNTS[1:])
def test_nothing_is_missing_where_every_episode_ends(discount):
    found = calibration_of_the_exact_law(WalkParams(length=300.0), discount)
    assert found.overestimation == pytest.approx(0, abs=0.1)
    assert found.calibration_missing == 0


def test_without_a_discount_what_has_not_ended_counts_as_it_stands():
    found = distributions(steady, WalkParams(), 1.0, horizon=10)
    np.testing.assert_array_equal(found.monte_carlo, np.full((STATES, ROLLOUTS), 1 + 10 * (1 + BONUS)))
    np.testing.assert_array_equal(found.missing, np.ones(STATES))
    assert "100% of their weight lies beyond (calibration_missing): it is left out" in evaluation.what_is_missing(
        1.0, 1.0
    )


# -- which agents learn a law -----------------------------------------------------------------------------------------


def test_the_agents_that_learn_a_mean():
    found = {}
    for name in agents():
        module, settings, env, env_params = at_home(name)
        agent = module.make_agent(module.Config(**settings), env, env_params)
        if agent.claim is None:  # it remembers, or has no critic
            assert name in ("ppo_memory", "variance_reduced")
            continue

        def predict(key, agent=agent, env=env, env_params=env_params):
            observation, state = interaction.start(env, env_params, key, 3).observation, agent.init(key)
            action, _ = agent.policy.act(state, observation, agent.policy.start(3), key)
            return agent.claim.law(state, observation, action)

        with jax.debug_key_reuse(False):
            atoms = jax.eval_shape(predict, jax.random.key(0)).atoms.shape[-1]
        found[name] = agent.claim.learns_mean
        # With these settings nothing else has so few, but the law of success or failure; the number alone says nothing,
        # since there may be one quantile.
        assert agent.claim.learns_mean == (atoms <= 2 and name != "q_sharp"), name
    assert {name for name, learns_mean in found.items() if learns_mean} == {
        "dqn",
        "os_c51",
        "ddpg",
        "td3",
        "sac",
        "ppo",
        "plr",
        "a2c",
        "pqn",
        "props",
        "rnd",
        "drnd",
        "log_dqn",
        "iterated_dqn",
        "decoupled_dqn",
        "revalued",
        "bootstrapped_dqn",
    }
    assert len(found) == 34

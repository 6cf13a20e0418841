"""Finite processes as environments: what happens in them is what their arrays say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxrl_dist import envs
from jaxrl_dist.distributional import tabular as dp
from jaxrl_dist.envs import tabular
from jaxrl_dist.envs.check import check_env
from jaxrl_dist.learning import interaction

every_generator = pytest.mark.parametrize("env_id", tabular.GENERATORS)


@every_generator
def test_contract(env_id):
    env, params = envs.make(env_id)
    assert env.name == env_id
    check_env(env, params)
    assert params.mdp.probability.shape[:2] == (env.num_states, env.num_actions)
    np.testing.assert_allclose(params.mdp.probability.sum(-1), 1, atol=1e-6)
    assert params.start.sum() == pytest.approx(1)


def test_transitions_and_rewards_follow_the_arrays():
    """Frequencies of a long random rollout against the probabilities of each outcome."""
    env, params = envs.make("tabular/garnet", states=4, actions=2, branching=3, end_probability=0.2, seed=5)
    start_key, loop_key = jax.random.split(jax.random.key(0))

    def one(batch, time):
        action_key, step_key = jax.random.split(jax.random.fold_in(loop_key, time))
        action = interaction.random_action(env, params, action_key, 64)
        batch, transition, _ = interaction.step(env, params, batch, action, step_key)
        return batch, transition

    batch = interaction.start(env, params, start_key, 64)
    _, found = jax.jit(lambda batch: jax.lax.scan(one, batch, jnp.arange(500)))(batch)
    found = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), found)
    state, following = found.observation.argmax(-1), found.next_observation.argmax(-1)
    mdp = jax.tree.map(np.asarray, params.mdp)
    for s, a in np.ndindex(4, 2):
        here = (state == s) & (found.action == a)
        for k in range(mdp.probability.shape[-1]):
            same = (following == mdp.next_state[s, a, k]) & (found.terminated == mdp.terminated[s, a, k])
            same &= np.abs(found.reward - mdp.reward[s, a, k]) < 1e-5
            probability = mdp.probability[s, a, k]
            assert same[here].mean() == pytest.approx(probability, abs=4 * np.sqrt(0.25 / here.sum()))
    assert found.terminated.mean() == pytest.approx(0.2, abs=0.01)


def test_known_values():
    _, walk = envs.make("tabular/random_walk")
    values = dp.policy_values(walk.mdp, jnp.ones((5, 1)), 1.0)[:, 0]
    np.testing.assert_allclose(values, np.arange(1, 6) / 6, rtol=1e-5)
    _, sea = envs.make("tabular/deep_sea", size=10)
    values = dp.optimal_values(sea.mdp, 1.0, 12).max(-1)
    assert values[0] == pytest.approx(0.99, rel=1e-5)
    assert dp.optimal_values(sea.mdp, 0.99, 12).max(-1)[0] == pytest.approx(0.90395, rel=1e-4)
    _, maze = envs.make("tabular/maze")
    assert dp.optimal_values(maze.mdp, 0.9, 30).max(-1)[0] == pytest.approx(0.9**6)  # six steps and the one that pays


def test_the_cliff_is_kept_at_a_distance_that_depends_on_the_wind():
    def highest_row(wind):
        env, params = envs.make("tabular/cliff", wind=wind)
        policy = np.asarray(dp.greedy(dp.optimal_values(params.mdp, 1.0, 300)))
        state, rows = int(np.argmax(params.start)), []
        while True:  # the way as long as the wind does not blow: the first outcome of the greedy action
            rows.append(env.places[state][0])
            if params.mdp.terminated[state, policy[state].argmax(), 0] or len(rows) > 40:
                return min(rows)
            state = int(params.mdp.next_state[state, policy[state].argmax(), 0])

    assert highest_row(0.0) == 2
    assert highest_row(0.2) < 2


def test_a_batch_of_processes_is_a_vmap_over_their_parameters():
    params = [envs.make("tabular/garnet", seed=seed)[1] for seed in range(3)]
    env = envs.make("tabular/garnet")[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *params)
    _, state = jax.vmap(env.reset, in_axes=(None, 0))(jax.random.key(0), stacked)
    _, _, reward, *_ = jax.vmap(env.step, in_axes=(None, 0, None, 0))(jax.random.key(1), state, 0, stacked)
    assert len(np.unique(reward)) == 3


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("tabular/garnet", {"branching": 11}, "branching is 11, allowed: 1 to states = 10"),
        ("tabular/cliff", {"wind": 1.5}, "wind is 1.5, allowed: a probability"),
        ("tabular/maze", {"rows": ("S.", ".")}, "rows have different lengths"),
        ("tabular/maze", {"rows": ("S.", "..")}, "rows have no 'S' or no 'G'"),
        ("tabular/deep_sea", {"size": 1}, "size is 1, allowed: 2 and above"),
        ("tabular/coin", {"size": 1}, "option 'size' of environment 'tabular/coin' is unknown"),
    ],
)
def test_bad_options(env_id, options, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        envs.make(env_id, **options)


@every_generator
def test_draws_itself(env_id):
    env, params = envs.make(env_id)
    values = dp.optimal_values(params.mdp, 0.9, 50)
    axes = Figure().subplots()
    tabular.draw(axes, env, values=values.max(-1), policy=dp.greedy(values))
    assert len(axes.collections[0].get_offsets()) == env.num_states
    going_on = sum(
        float(params.mdp.probability[s, a, k]) > 0 and not params.mdp.terminated[s, a, k]
        and int(params.mdp.next_state[s, a, k]) != s
        for s, a in enumerate(np.asarray(values).argmax(-1)) for k in range(params.mdp.probability.shape[-1])
    )  # fmt: skip
    assert len(axes.texts) == going_on

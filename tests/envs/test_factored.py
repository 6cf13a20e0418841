"""Several choices at once: the space, the toy process of independent factors, and boxes of actions cut into bins."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments import spaces
from jax.random import clone
from toy_environments import Line

from jaxrl_dist.envs import check_env, discretise_actions, make
from jaxrl_dist.envs.factored import FactoredMDP, MultiDiscrete
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.spaces import SEVERAL, kind_of

# -- the space --------------------------------------------------------------------------------------------------------


def test_samples_are_even_in_every_factor():
    space = MultiDiscrete((2, 3, 1))
    drawn = np.asarray(jax.vmap(space.sample)(jax.random.split(jax.random.key(0), 6000)))
    assert (drawn.dtype, drawn.shape, space.shape, kind_of(space)) == (np.int32, (6000, 3), (3,), SEVERAL)
    for factor, count in enumerate((2, 3, 1)):
        np.testing.assert_allclose(np.bincount(drawn[:, factor]) / 6000, np.full(count, 1 / count), atol=0.03)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.05
    assert jax.vmap(space.contains)(drawn).all()
    for outside in ([2, 0, 0], [0, -1, 0], [0, 0, 1]):
        assert not space.contains(jnp.array(outside))
    assert repr(space) == "MultiDiscrete([2, 3, 1])"


@pytest.mark.parametrize("nvec", [(), (3, 0), (-1,)])
def test_a_space_of_nothing_is_refused(nvec):
    with pytest.raises(ValueError, match=r"nvec is .*, allowed: one or more counts, 1 and above"):
        MultiDiscrete(nvec)


# -- the toy process --------------------------------------------------------------------------------------------------


def play(env, params, places, action, keys):
    """Rewards, and the places after it, of one action from given places, `[keys, ...]`."""
    _, state = env.reset(jax.random.key(9), params)
    state = state.replace(places=jnp.array(places, jnp.int32))
    results = jax.vmap(lambda key: env.step_env(key, state, jnp.array(action), params))(keys)
    return np.asarray(results[2]), np.asarray(results[1].places), np.asarray(results[3])


def test_one_step_by_hand():
    env, params = make("factored", factors=4, states=4)
    keys = jax.random.split(jax.random.key(0), 3)
    # Right are s mod 3 = 0, 1, 2, 0; the first two and the last are.
    reward, places, ended = play(env, params, [0, 1, 2, 3], [0, 1, 0, 0], clone(keys))
    np.testing.assert_array_equal(reward, [0.75] * 3)
    np.testing.assert_array_equal(places, [[1, 2, 0, 0]] * 3)  # onwards, onwards, back, around
    assert ended.all()
    sparse, _ = make("factored", factors=4, states=4, sparse=True)
    reward, places, _ = play(sparse, params, [0, 1, 2, 3], [0, 1, 0, 0], clone(keys))
    np.testing.assert_array_equal(reward, [0.25] * 3)  # the last alone, which is where it pays
    np.testing.assert_array_equal(places[0], [1, 2, 0, 0])
    reward, _, _ = play(sparse, params, [3, 3, 3, 3], [1, 2, 1, 2], keys)
    np.testing.assert_array_equal(reward, [0] * 3)


def test_noise_and_ends_are_as_likely_as_asked():
    env, params = make("factored", factors=2, reward_noise=0.5, end_probability=0.2)
    reward, _, ended = play(env, params, [0, 1], [0, 0], jax.random.split(jax.random.key(1), 20_000))
    assert reward.mean() == pytest.approx(0.5, abs=0.02)
    assert reward.std() == pytest.approx(0.5, abs=0.02)
    assert ended.mean() == pytest.approx(0.2, abs=0.02)
    assert abs(np.corrcoef(reward, ended)[0, 1]) < 0.05


def test_observations_say_where_each_factor_is():
    env, params = make("factored", factors=3, states=4)
    observation, state = env.reset(jax.random.key(3), params)
    assert observation.shape == env.observation_space(params).shape == (12,)
    np.testing.assert_array_equal(observation.reshape(3, 4).sum(1), [1, 1, 1])
    np.testing.assert_array_equal(env.places_of(observation), state.places)
    starts = jax.vmap(lambda key: env.reset(key, params)[1].places)(jax.random.split(jax.random.key(4), 4000))
    for factor in range(3):
        np.testing.assert_allclose(np.bincount(np.asarray(starts)[:, factor]) / 4000, 0.25, atol=0.03)


@pytest.mark.parametrize("options", [{}, {"end_probability": 0.05, "reward_noise": 0.3, "sparse": True}])
def test_it_keeps_the_contract(options):
    env, params = make("factored", **options)
    assert [warning for warning in check_env(env, params) if "time limit not checked" not in warning] == []


@pytest.mark.parametrize(("option", "least"), [("factors", 1), ("bins", 2), ("states", 2)])
def test_sizes_that_cannot_be_are_refused(option, least):
    with pytest.raises(ValueError, match=rf"^{option} is {least - 1}, allowed: {least} and above$"):
        make("factored", **{option: least - 1})


# -- continuous actions in bins ---------------------------------------------------------------------------------------


def test_pendulum_takes_bins_for_torques():
    """Three bins are the bounds and the middle, five also what lies between."""
    for bins, torques in ((3, [-2, 0, 2]), (5, [-2, -1, 0, 1, 2]), (2, [-2, 2])):
        env, params = make("discretised/Pendulum-v1", bins=bins)
        assert (env.name, env.action_space(params).nvec) == ("discretised/Pendulum-v1", (bins,))
        _, state = env.reset(jax.random.key(0), params)
        for bin_, torque in enumerate(torques):
            for step in (env.step, env.step_env):
                _, after, *_ = step(jax.random.key(1), state, jnp.array([bin_], jnp.int32), params)
                assert after.last_u == torque
    row = interaction.transition_like(env, params)
    assert (row.action.shape, row.action.dtype) == ((1,), jnp.int32)


def test_all_else_is_the_environment_s_own():
    (plain, params), (env, same) = make("Pendulum-v1"), make("discretised/Pendulum-v1", max_steps_in_episode="17")
    assert same.max_steps_in_episode == 17
    start, move = jax.random.split(jax.random.key(0))
    (seen, state), (expected, of_plain) = (one.reset(clone(start), params) for one in (env, plain))
    np.testing.assert_array_equal(seen, expected)
    found = env.step(clone(move), state, jnp.array([2]), params)
    expected = plain.step(clone(move), of_plain, jnp.array([1.0]), params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert env == type(env)(env.env, env.counts)
    assert hash(env) == hash(type(env)(env.env, env.counts))
    assert copy.deepcopy(env).counts == pickle.loads(pickle.dumps(env)).counts == (3,)


class Wide(Line):
    """Bounds of its own: four to a side, two components."""

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (2,))


def test_every_component_has_its_bins():
    env = discretise_actions(Wide(), Wide.default_params, 5)
    assert env.action_space().nvec == (5, 5)
    actions = env.inner_action(jnp.array([[0, 4], [1, 3], [2, 2]]), None)
    np.testing.assert_array_equal(actions, [[-1, 1], [-0.5, 0.5], [0, 0]])


@pytest.mark.parametrize("env_id", ["discretised/Pendulum-v1", "discretised/MountainCarContinuous-v0"])
def test_discretised_environments_keep_the_contract(env_id):
    assert [warning for warning in check_env(*make(env_id)) if "compiles twice" not in warning] == []


@pytest.mark.slow
@pytest.mark.proves("envs", "constraints.txt")
def test_brax_takes_bins():
    env, params = make("discretised/brax/reacher", bins=3)
    assert (env.name, env.action_space(params).nvec) == ("discretised/brax/reacher", (3, 3))
    row = interaction.transition_like(env, params)
    assert (row.action.shape, row.action.dtype) == ((2,), jnp.int32)


@pytest.mark.parametrize(
    ("env_id", "options", "message"),
    [
        ("discretised/Pendulum-v1", {"bins": 0}, "^bins is 0, allowed: 2 and above$"),
        ("discretised/Pendulum-v1", {"bins": "1"}, "^bins is 1, allowed: 2 and above$"),
        ("discretised/Pendulum-v1", {"bins": "many"}, "^bins is 'many', allowed: int$"),
        ("discretised/Pendulum-v1", {"size": 3}, "option 'size' of environment 'Pendulum-v1' is unknown"),
        ("discretised/Pendulm-v1", {}, "environment 'Pendulm-v1' is unknown, nearest: Pendulum-v1"),
        ("discretised/CartPole-v1", {}, "the actions of CartPole-v1 are discrete; bins are for vectors of continuous"),
        ("discretised/factored", {}, "the actions of factored are several choices at once; bins are for vectors"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(env_id, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make(env_id, **options)
    assert "\n" not in str(error.value)


# -- check_env --------------------------------------------------------------------------------------------------------


class Choosing(Line):
    """The line, pushed by two choices of three."""

    counts, first = (3, 3), 0

    def action_space(self, params=None):
        space = MultiDiscrete((3, 3))
        space.sample = MultiDiscrete((3, 3)).sample
        space.nvec, space.start = np.array(self.counts), np.array(self.first)
        return space

    def move(self, key, state, action):
        return super().move(key, state, action.sum(keepdims=True).astype(jnp.float32) / 2 - 1)


def test_check_env_takes_several_choices_at_once():
    assert check_env(Choosing()) == []


@pytest.mark.parametrize(("field", "value"), [("counts", [[3, 3]]), ("counts", [3, 0]), ("first", [0, 1])])
def test_check_env_names_choices_that_no_agent_takes(field, value):
    class Odd(Choosing):
        pass

    setattr(Odd, field, value)
    with pytest.raises(ValueError, match=r"several choices at once.*, allowed: .* MultiDiscrete of one dimension"):
        check_env(Odd())


def test_a_process_of_one_factor_is_one():
    assert FactoredMDP(1).action_space().nvec == (3,)

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams

from jaxrl_dist.learning import interaction

ENV, NUM_ENVS, STEPS = Toy(), 5, 60


@pytest.fixture(scope="module")
def lived():
    """Interaction after every step, transitions and metrics of 60 steps in 5 environments, and the actions taken."""
    params = ToyParams(shortest=2, longest=9, max_steps_in_episode=6)  # some episodes terminate, some are truncated
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, NUM_ENVS, 2)).astype(np.float32)

    @jax.jit
    def live(key):
        start_key, key = jax.random.split(key)
        first = interaction.start(ENV, params, start_key, NUM_ENVS)

        def once(batch, time):
            batch, transition, metrics = interaction.step(
                ENV, params, batch, jnp.asarray(actions)[time], jax.random.fold_in(key, time)
            )
            return batch, (batch, transition, metrics)

        return first, *jax.lax.scan(once, first, jnp.arange(STEPS))[1]

    return params, actions, *live(jax.random.key(0))


def test_transitions_are_those_of_a_slow_simulation(lived):
    params, actions, first, after, transition, metrics = jax.tree.map(np.asarray, lived)
    observation, finished = np.asarray(first.observation), []
    returns, lengths = np.zeros(NUM_ENVS), np.zeros(NUM_ENVS, int)
    for step in range(STEPS):
        ended = []
        for i in range(NUM_ENVS):
            label, time, length = observation[i]
            reward = np.float32(np.float16(time + actions[step, i].sum()))
            np.testing.assert_array_equal(transition.observation[step, i], (label, time, length))
            np.testing.assert_array_equal(transition.next_observation[step, i], (label, time + 1, length))
            assert float(transition.reward[step, i]) == pytest.approx(float(reward), rel=1e-3, abs=1e-3)
            terminated, truncated = time + 1 == length, time + 1 >= params.max_steps_in_episode
            assert bool(transition.terminated[step, i]) == terminated
            assert bool(transition.truncated[step, i]) == truncated
            returns[i] += float(transition.reward[step, i])
            lengths[i] += 1
            if terminated or truncated:
                ended.append((returns[i], lengths[i]))
                returns[i] = lengths[i] = 0
        finished += ended
        observation = np.asarray(after.observation[step])
        np.testing.assert_allclose(after.episode_return[step], returns, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(after.episode_length[step], lengths)
        for name, column in (("episode_return", 0), ("episode_length", 1)):
            assert float(metrics[name].count[step]) == len(ended)
            total = sum(episode[column] for episode in ended)
            assert float(metrics[name].total[step]) == pytest.approx(total, rel=1e-5, abs=1e-5)
    assert len(finished) > 20
    np.testing.assert_array_equal(transition.action, actions)
    kinds = set(zip(np.ravel(transition.terminated).tolist(), np.ravel(transition.truncated).tolist(), strict=True))
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}  # the test saw every kind of end


def test_an_ended_episode_is_followed_by_a_fresh_one(lived):
    _, _, _, after, transition, _ = lived
    done = np.asarray(transition.terminated | transition.truncated)
    label, time, _ = np.moveaxis(np.asarray(after.observation), -1, 0)
    assert np.all(time[done] == 0)
    np.testing.assert_array_equal(after.observation[~done], transition.next_observation[~done])
    assert np.all(label[done] != transition.observation[..., 0][done])
    assert len(np.unique(label[done])) == done.sum()  # every reset has a key of its own: no two starts are equal


def test_environments_have_keys_of_their_own():
    params = ToyParams(noise=1.0)

    @jax.jit
    def live():
        batch = interaction.start(ENV, params, jax.random.key(0), 8)
        return interaction.step(ENV, params, batch, jnp.zeros((8, 2)), jax.random.key(1))[1]

    transition = live()
    assert len(np.unique(transition.observation[:, 0])) == 8
    assert len(np.unique(transition.reward)) == 8


def test_types_are_strong_and_equal_before_and_after_a_step(lived):
    _, _, first, after, transition, _ = lived
    for before, later in zip(jax.tree.leaves(first), jax.tree.leaves(after), strict=True):
        assert before.dtype == later.dtype
        assert not before.aval.weak_type
    assert (transition.reward.dtype, transition.terminated.dtype, transition.truncated.dtype) == (
        jnp.float32,
        bool,
        bool,
    )


def test_strengthen_leaves_keys_alone():
    key = interaction.strengthen((jax.random.key(3), 1.5))[0]
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))


def test_strengthened_pendulum_steps_compile_once():
    env, params = gymnax.make("Pendulum-v1")
    weak = jax.vmap(env.reset, in_axes=(0, None))(jax.random.split(jax.random.key(0), 2), params)
    assert any(leaf.aval.weak_type for leaf in jax.tree.leaves(weak)), "gymnax is cured: this test is needed no longer"
    strong = interaction.strengthen(weak)
    for before, after in zip(jax.tree.leaves(weak), jax.tree.leaves(strong), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype
        assert not after.aval.weak_type

    traces = []

    @jax.jit
    def step(batch, key):
        traces.append(batch)
        return interaction.step(env, params, batch, jnp.zeros((2, 1)), key)[0]

    batch = interaction.start(env, params, jax.random.key(0), 2)
    for index in range(3):
        batch = step(batch, jax.random.key(index))
    assert len(traces) == 1


def test_transition_like_describes_a_transition_without_running_the_environment(lived):
    params, _, _, _, transition, _ = lived
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), transition)
    assert interaction.transition_like(ENV, params) == expected
    pixels = interaction.transition_like(*gymnax.make("Breakout-MinAtar"))
    assert (pixels.observation.shape, pixels.action.shape, pixels.action.dtype) == ((10, 10, 4), (), jnp.int32)


def test_average_counts_what_the_mask_lets_through():
    values, where = jnp.array([1, 2, 4]), jnp.array([True, False, True])
    assert interaction.average(values, where) == (5, 2)
    assert interaction.average(values) == (7, 3)
    assert interaction.average(jnp.array([1.0, jnp.nan]), jnp.array([True, False])) == (1, 1)  # masked NaN stays out
    assert interaction.average(values, jnp.zeros(3, bool)) == (0, 0)
    assert interaction.average(True) == (1, 1)


@pytest.mark.parametrize("fault", ["reward", "final_observation"])
def test_rejects_an_environment_with_misshapen_outputs(fault):
    class Faulty(Toy):
        def step(self, key, state, action, params):
            observation, state, reward, terminated, truncated, info = super().step(key, state, action, params)
            if fault == "reward":
                return observation, state, reward[None], terminated, truncated, info
            return observation, state, reward, terminated, truncated, {"final_observation": observation[:2]}

    env, params = Faulty(), ToyParams()

    def live():
        batch = interaction.start(env, params, jax.random.key(0), 2)
        return interaction.step(env, params, batch, jnp.zeros((2, 2)), jax.random.key(1))

    with pytest.raises(AssertionError):
        jax.eval_shape(live)

"""Rollouts of a toy environment whose every number is known, and what epochs go through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Toy, ToyParams

from jaxrl_dist.learning import interaction, rollouts

ENV, PARAMS = Toy(), ToyParams(shortest=2, longest=4)


def run(steps=9, num_envs=3):
    """Actions are the times seen plus 0.1, said beside them; the policy counts its own steps of an episode."""

    def remember(num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    def policy(observation, memory, key):
        action = jnp.stack([observation[:, 1], 0.1 + jnp.zeros(len(observation))], axis=1)
        return action, memory + 1, {"seen": observation[:, 1], "count": memory}

    start_key, key = jax.random.split(jax.random.key(0))
    now = interaction.start(ENV, PARAMS, start_key, num_envs, remember)
    return jax.jit(lambda: rollouts.collect(ENV, PARAMS, now, key, steps, policy, remember))()


def test_steps_follow_each_other_and_what_the_policy_said_goes_with_them():
    now, (lived, beside), episodes = run()
    assert lived.observation.shape == (9, 3, 3)
    done = np.asarray(lived.terminated | lived.truncated)
    assert done.any(0).all()
    np.testing.assert_array_equal(beside["seen"], lived.observation[..., 1])
    np.testing.assert_array_equal(beside["count"], lived.observation[..., 1])  # memory begins anew with the episode
    np.testing.assert_allclose(lived.reward, lived.observation[..., 1] + lived.action.sum(-1), rtol=1e-3)
    # The successor is the true one; what is seen next is that, or another episode's first observation.
    following = np.concatenate([lived.observation[1:], now.observation[None]])
    np.testing.assert_array_equal(following[~done], lived.next_observation[~done])
    assert (following[done][:, 1] == 0).all()
    assert (lived.next_observation[done][:, 1] > 0).all()
    assert episodes["episode_length"].count == done.sum()


def test_every_row_is_gone_through_once_per_epoch_in_another_order():
    data = {"row": jnp.arange(12), "twice": 2 * jnp.arange(12)}

    def update(learner, minibatch):
        assert minibatch["row"].shape == (4,)
        return learner + 1, minibatch

    learner, seen = rollouts.epochs(update, jnp.int32(0), data, jax.random.key(0), num_epochs=5, num_minibatches=3)
    assert learner == 15
    assert seen["row"].shape == (5, 3, 4)
    np.testing.assert_array_equal(seen["twice"], 2 * seen["row"])
    orders = np.asarray(seen["row"]).reshape(5, 12)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(12), (5, 1)))
    assert len(np.unique(orders, axis=0)) == 5


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="--num-minibatches is 5; it must divide the 12 steps of a rollout"):
        rollouts.epochs(None, None, jnp.arange(12), jax.random.key(0), num_epochs=1, num_minibatches=5)


def test_sequences_of_environments_stay_whole():
    """Numbers say which step of which environment: minibatches of environments, with all their steps in order."""
    data = {"number": 10 * jnp.arange(5)[:, None] + jnp.arange(6), "start": jnp.arange(6)[None]}

    def update(learner, minibatch):
        assert (minibatch["number"].shape, minibatch["start"].shape) == ((5, 2), (1, 2))
        return learner + 1, minibatch

    learner, seen = rollouts.epochs(
        update, jnp.int32(0), data, jax.random.key(0), num_epochs=4, num_minibatches=3, axis=1
    )
    assert learner == 12
    np.testing.assert_array_equal(seen["number"], 10 * np.arange(5)[:, None] + seen["start"])
    orders = np.asarray(seen["start"]).reshape(4, 6)
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(6), (4, 1)))
    assert len(np.unique(orders, axis=0)) > 1


def test_environments_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="--num-minibatches is 3; it must divide --num-envs = 8"):
        rollouts.epochs(None, None, jnp.ones((5, 8)), jax.random.key(0), num_epochs=1, num_minibatches=3, axis=1)

"""What RND and DRND share: networks, statistics of what random actions lead to, means of what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_dist import envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import clipped, distillation, interaction


def test_the_mean_is_of_what_is_kept():
    errors = jnp.array([1.0, 5.0, 9.0])
    assert clipped.mean_of(errors, jnp.array([True, False, True])) == 5
    assert clipped.mean_of(errors, jnp.zeros(3, bool)) == 0
    np.testing.assert_allclose(
        jax.grad(lambda x: clipped.mean_of(x, jnp.array([True, False, True])))(errors), [0.5, 0, 0.5]
    )
    with pytest.raises(AssertionError):
        clipped.mean_of(errors, jnp.ones((3, 1), bool))


def test_statistics_are_of_all_that_random_actions_lead_to():
    """In a sea of 4 x 4 every fourth successor is the empty picture, and half of the first ones lie on each side."""
    env, params = envs.make("DeepSea-bsuite", size=4)
    now = interaction.start(env, params, jax.random.key(0), 64)
    now, statistics = jax.jit(lambda now, key: distillation.begin_statistics(env, params, now, key, 10))(
        now, jax.random.key(1)
    )
    assert statistics.count == 640
    assert statistics.mean.shape == (4, 4)
    np.testing.assert_allclose(statistics.mean.sum(1), [0, 0.3, 0.3, 0.2], atol=1e-6)  # no successor is a start
    np.testing.assert_allclose(statistics.mean[1, :2], [0.15, 0.15], atol=0.05)
    np.testing.assert_allclose(statistics.variance, statistics.mean * (1 - statistics.mean), atol=1e-5)
    assert (now.episode_length == 2).all()


def test_networks_fit_vectors_matrices_and_images():
    settings = distillation.Settings(predictor_hidden=(6,), target_hidden=(5,), num_features=7)
    for shape in ((3,), (4, 4), (6, 6, 2)):
        observation = jnp.ones((2, *shape), bool)
        sizes = [
            jax.eval_shape(net.init_with_output, jax.random.key(0), observation)[0].shape
            for net in distillation.networks_of(settings)
        ]
        assert sizes == [(2, 1), (2, 7), (2, 7)]


def test_the_warm_up_is_of_whole_rounds():
    clock = distillation.clock_of(distillation.Settings(num_envs=8, num_steps=4, warmup_steps=30))
    assert (clock.warmup_steps, clock.env_steps, clock.updates) == (32, 32, 16)
    with pytest.raises(ConfigurationError, match="--num-minibatches is 5; it must divide"):
        distillation.clock_of(distillation.Settings(num_envs=8, num_steps=4, num_minibatches=5))

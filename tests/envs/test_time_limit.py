"""A time limit is lifted for calibration where it does nothing but cut episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_environments import CountsByLimit, HidesLimit, Line, ShowsLimit, StartsByLimit

from jaxrl_dist.envs import make
from jaxrl_dist.learning import interaction
from jaxrl_dist.running import evaluation

SHOWING = [type(part, (ShowsLimit,), {"part": part})() for part in ("observation", "terminated")]


def runs_alike_without_limit(env, params, steps):
    """Whether `steps` steps, fewer than the limit, are the same bit for bit with the limit and with one far away."""

    def run(limit):
        start_key, key = jax.random.split(jax.random.key(0))
        limited = params.replace(max_steps_in_episode=limit)
        batch = interaction.start(env, limited, start_key, 2)

        def one(batch, key):
            action_key, step_key = jax.random.split(key)
            action = interaction.random_action(env, limited, action_key, 2)
            batch, transition, _ = interaction.step(env, limited, batch, action, step_key)
            return batch, (batch, transition)

        return batch, jax.lax.scan(one, batch, jax.random.split(key, steps))[1]

    limit = params.max_steps_in_episode
    assert steps < limit
    near, far = map(jax.jit(run), (limit, type(limit)(2**30)))
    return all(map(np.array_equal, jax.tree.leaves(near), jax.tree.leaves(far)))


@pytest.mark.parametrize(
    ("env", "params", "lifted"),
    [
        (Line(), None, True), *((env, None, False) for env in SHOWING),
        (StartsByLimit(), None, False), (HidesLimit(), None, False),
        (*make("DiscountingChain-bsuite"), False), (*make("DeepSea-bsuite"), True),
    ],
    ids=lambda x: getattr(x, "name", None),
)  # fmt: skip
def test_the_traced_program_says_what_a_run_shows(env, params, lifted):
    params = env.default_params if params is None else params
    assert bool(evaluation.limited_because(env, params)) is not lifted
    assert (evaluation.without_time_limit(env, params) is not None) is lifted
    assert runs_alike_without_limit(env, params, steps=min(15, params.max_steps_in_episode - 1)) is lifted


def test_a_limit_that_must_be_a_number_is_not_lifted():
    env = CountsByLimit()
    assert evaluation.limited_because(env, env.default_params) == evaluation.LIMIT_HAS_ANOTHER_MEANING
    assert jnp.isfinite(interaction.start(env, env.default_params, jax.random.key(0), 1).observation).all()

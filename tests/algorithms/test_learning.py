"""Every agent learns: a little environment of its kind, to a given return within given steps."""

import dataclasses

import cases
import jax
import numpy as np
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.running import problem, training

NAMES = [name for name, row in cases.CASES.items() if row.learns]
ALWAYS = ("sac", "dqn")
"""One of each family learns whenever tests run; the others where their program has changed."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_learns(name, proof):
    env_id, steps, at_least = cases.row(name).learns
    algorithm, (env, params) = cases.module(name), envs.make(env_id)
    preset = problem.split_preset(algorithm.PRESETS[env_id])[1]
    if cases.row(name).replay:
        preset |= {"replay_capacity": steps}
    config = dataclasses.replace(algorithm.Config(), **preset)
    train = jax.vmap(
        training.make_train(
            algorithm.make_agent, config, env, params, total_steps=steps, evaluations=10, eval_episodes=40
        )
    )
    keys = jax.random.split(jax.random.key(0), 3)
    if name not in ALWAYS:
        proof(proofs.program(train, keys))
    _, history = jax.jit(train)(keys)
    # One look is luck: a policy that found its way can leave it for a thousand steps (DDPG at one look in twenty), and
    # when it does so differs between processors, whose roundings differ.
    returns = np.asarray(history["evaluation_return"]).mean(-1)[:, -3:]
    assert np.median(returns) >= at_least, returns

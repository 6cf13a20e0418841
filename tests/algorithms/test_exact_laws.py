"""Deep distributional agents on a small process whose laws are known exactly.

With one-hot observations nothing but the update decides where an agent converges: to the fixed point of the projected
control operator, which dynamic programming computes (`distributional.tabular`).
"""

import dataclasses
import functools

import by_hand
import jax
import jax.numpy as jnp
import numpy as np
import proofs
import pytest

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import c51, iqn, mmd_dqn, qr_dqn
from jaxrl_dist.distributional import categorical, metrics, tabular
from jaxrl_dist.distributional.law import Law

DISCOUNT = 0.8
SUPPORT = categorical.support(-10.0, 14.0, 97)
COMMON = {
    "num_envs": 8, "updates_per_iteration": 1, "warmup_steps": 2_000, "replay_capacity": 24_000, "batch_size": 128,
    "discount": DISCOUNT, "target_period": 25, "epsilon_start": 1.0, "epsilon_end": 1.0, "hidden": (48,),
}  # fmt: skip
STEP_SIZES = (1e-2, 3e-3, 1e-3, 3e-4)


@functools.cache
def process():
    """Five states, two actions, gaps of at least 0.2 between their values, one step in five ends."""
    env, params = envs.make("tabular/garnet", states=5, actions=2, branching=2, end_probability=0.2, seed=3)
    values = np.sort(np.asarray(tabular.optimal_values(params.mdp, DISCOUNT, 100)), axis=-1)
    assert (values[:, 1] - values[:, 0]).min() > 0.2
    return env, params


def learned(algorithm, proof, **settings) -> Law:
    """The laws of all states and actions after training, `[states, actions, n]`; `proof` as in `proofs.py`."""
    env, params = process()
    config = dataclasses.replace(algorithm.Config(), **(COMMON | settings))

    def train(config, key):
        def phase(state, step_size):
            agent = algorithm.make_agent(dataclasses.replace(config, learning_rate=step_size), env, params)
            return jax.lax.fori_loop(0, 700, lambda _, state: agent.step(state)[0], state), None

        agent = algorithm.make_agent(config, env, params)
        state, _ = jax.lax.scan(phase, agent.init(key), jnp.array(STEP_SIZES))
        observation, action = jnp.repeat(jnp.eye(5), 2, axis=0), jnp.tile(jnp.arange(2), 5)
        return jax.tree.map(lambda x: x.reshape(5, 2, -1), agent.claim.law(state, observation, action))

    proof(proofs.program(train, config, jax.random.key(0)))
    return by_hand.quick(train)(config, jax.random.key(0))


@functools.cache
def exact(projection) -> Law:
    _, params = process()
    return jax.jit(lambda: tabular.optimise(params.mdp, DISCOUNT, projection, 100))()


TO_SUPPORT, TO_QUANTILES = tabular.to_categorical(SUPPORT), tabular.to_quantiles(21)
# IQN and MMD-DQN have neither fixed atoms nor fixed fractions: their limit is near the exact law. For IQN and QR-DQN a
# Huber threshold of 1 alone would be worth 0.5.
IMPLICIT = {
    "hidden": (48, 48), "num_fractions": 16, "num_target_fractions": 16, "num_policy_fractions": 32, "cosines": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "settings", "projection", "tolerance"),
    [
        (c51, {"v_min": -10.0, "v_max": 14.0, "num_atoms": 97}, TO_SUPPORT, 0.1),
        (qr_dqn, {"num_quantiles": 21, "kappa": 0.0}, TO_QUANTILES, 0.25),
        (iqn, IMPLICIT | {"kappa": 0.0}, TO_SUPPORT, 0.25),
        (mmd_dqn, {"num_particles": 21}, TO_SUPPORT, 0.25),
    ],
    ids=["c51", "qr_dqn", "iqn", "mmd_dqn"],
)
def test_converges_to_the_projected_fixed_point(algorithm, settings, projection, tolerance, proof):
    found, wanted = learned(algorithm, proof, **settings), exact(projection)
    distance = np.asarray(metrics.wasserstein_1(found, wanted))
    assert distance.max() < tolerance
    # The states' laws themselves lie much further apart.
    apart = metrics.wasserstein_1(jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), wanted), wanted)
    assert np.median(apart) > 4 * tolerance

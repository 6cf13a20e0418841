"""Scripted policies that solve an environment, for data: `jaxrl-dist collect jaxrl_dist.envs.controllers:pendulum`.

A controller is `(observation, key) -> action`, leaves `[batch, ...]`, actions as our environments take them.
"""

import jax
import jax.numpy as jnp

# gymnax's Pendulum-v1: a rod of length and mass 1, gravity 10, torque up to 2.
_GRAVITY, _LARGEST_TORQUE = 10.0, 2.0
_NEAR = 0.9  # the cosine from which on it is held instead of swung
_STIFFNESS, _DAMPING = 12.0, 3.5


def pendulum(observation: jax.Array, key: jax.Array) -> jax.Array:
    """Swing up by energy, then hold upright: `[batch, 3]` (cosine, sine, velocity) -> `[batch, 1]` in [-1, 1].

    Far from the top it pushes along the velocity while the energy is below that of standing upright, and against it
    above; near the top it is a proportional-derivative controller, which also carries what gravity takes.
    """
    cosine, sine, velocity = jnp.moveaxis(observation, -1, 0)
    # Of a rod: inertia 1/3, centre of mass at 1/2; upright at rest it has the energy gravity / 2.
    energy = velocity**2 / 6 + _GRAVITY / 2 * cosine
    lacks = _GRAVITY / 2 - energy
    swing = _LARGEST_TORQUE * jnp.where(velocity >= 0, 1.0, -1.0) * jnp.sign(lacks)
    hold = -_STIFFNESS * jnp.arctan2(sine, cosine) - _DAMPING * velocity
    torque = jnp.where(cosine > _NEAR, hold, swing)
    return jnp.clip(torque / _LARGEST_TORQUE, -1, 1)[..., None]

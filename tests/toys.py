"""A toy environment whose every number is known, in gymnax's contract but without its code; and a toy learner."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gymnax.environments import spaces

from jaxrl_dist import cli, envs
from jaxrl_dist.agent import Agent, memoryless
from jaxrl_dist.configuration import Count, Positive, Real, configuration, require
from jaxrl_dist.learning import experience
from jaxrl_dist.learning.interaction import average
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import continuous_action_size
from jaxrl_dist.running import catalog, problem, session
from jaxrl_dist.studies import sweeps


class ToyParams(NamedTuple):
    shortest: int = 2
    longest: int = 6
    max_steps_in_episode: int = 100
    noise: float = 0.0

    def replace(self, **changes):
        return self._replace(**changes)


class ToyState(NamedTuple):
    label: jax.Array
    time: jax.Array
    length: jax.Array


class Toy:
    """Episodes of a length drawn at reset; they terminate after it, or are truncated at the limit if that comes first.

    Observation (label, time, length), where the label is drawn at reset. Reward of the step at time t: t + the action's
    sum + noise. Its faults are those of real environments: `time` is weakly typed after a reset, and reward and flags
    come in odd types.
    """

    name = "Toy"
    default_params = ToyParams()

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (2,))

    def observation_space(self, params):
        return spaces.Box(-jnp.inf, jnp.inf, (3,))

    def reset(self, key, params):
        label_key, length_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), params.shortest, params.longest + 1)
        state = ToyState(jax.random.uniform(label_key), 0, length)
        return self.observe(state), state

    def step(self, key, state, action, params):
        reset_key, noise_key = jax.random.split(key)
        reward = state.time + action.sum() + params.noise * jax.random.normal(noise_key)
        moved = state._replace(time=state.time + 1)
        terminated = moved.time == moved.length
        truncated = moved.time >= params.max_steps_in_episode
        fresh_observation, fresh = self.reset(reset_key, params)
        done = terminated | truncated
        following = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, moved)
        observation = jnp.where(done, fresh_observation, self.observe(moved))
        info = {"final_observation": self.observe(moved)}
        return observation, following, reward.astype(jnp.float16), terminated.astype(jnp.float32), truncated, info

    def observe(self, state):
        return jnp.stack([state.label, state.time, state.length]).astype(jnp.float32)


# -- a learner that compiles in no time, for tests of what stands around one -------------------------------------------


@configuration
class LearnerConfig(Settings):
    num_envs: Count = 2
    warmup_steps: Count = 8
    replay_capacity: Count = 64
    batch_size: Count = 4
    push: Real = 0.0
    """where its actions begin"""
    learning_rate: Positive = 0.1
    width: Count = 1


class LearnerState(NamedTuple):
    weights: jax.Array
    experience: Any
    key: jax.Array


def live(env, env_params, state, action: Callable) -> tuple:
    """What toy learners do before they learn: a noisy step of every environment, and a batch of 4 of what is stored.

    Returns the key to go on with, experience, metrics and the batch.
    """
    key, noise_key, step_key, sample_key = jax.random.split(state.key, 4)
    chosen = action(state.weights, state.experience.interaction.observation)
    chosen += 0.1 * jax.random.normal(noise_key, chosen.shape)
    lived, _, metrics = experience.collect(env, env_params, state.experience, chosen, step_key)
    return key, lived, metrics, experience.sample(lived, sample_key, 4, 0.99)


def make_learner(config, env, env_params) -> Agent:
    """Predicts rewards linearly and acts by one of the weights, `width` of them equal; continuous actions."""
    require(config.width < 9, f"--width is {config.width}; it must be below 9")
    size = continuous_action_size(env, env_params)

    def action(weights, observation):
        return jnp.tanh(jnp.full((observation.shape[0], size), weights.mean()))

    def init(key):
        key, warmup_key = jax.random.split(key)
        filled = experience.warm_up(env, env_params, warmup_key, config)
        return LearnerState(jnp.full(config.width, config.push, jnp.float32), filled, key)

    def step(state):
        key, lived, metrics, batch = live(env, env_params, state, action)
        moved = state.weights + config.learning_rate * (batch.reward * batch.action[:, 0]).mean()
        return LearnerState(moved, lived, key), metrics | {"weight": average(moved)}

    policy = memoryless(lambda state, observation, key: action(state.weights, observation))
    return Agent(init, step, policy, config.clock(), export=lambda state: {"weights": state.weights})


def share_programs(monkeypatch) -> None:
    """Let studies with the same options share what is compiled, as the waves of one study do."""
    make, made = session.make_programs, {}

    def shared(one):
        key = (len(one.configurations), sweeps.static_fields(one.config), one.options.runs_mode)
        return made[key] if key in made else made.setdefault(key, make(one))

    monkeypatch.setattr(session, "make_programs", shared)


def run_with_devices(count: int, code: str) -> None:
    """Run `code` in a Python process that has so many CPU devices and can import the tests."""
    flags = f"--xla_force_host_platform_device_count={count}"
    here = Path(__file__).parent
    importable = os.pathsep.join(map(str, [here, *(path for path in here.iterdir() if path.is_dir())]))
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": importable}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=600)


def agents() -> list[str]:
    """The agents that meet an environment; those that learn from a file alone are left out."""
    return [name for name, module in catalog.agents().items() if not problem.takes_data(module.make_agent)]


def at_home(name: str) -> tuple:
    """An algorithm on the environment of its first preset: its module, the preset's settings, and env, env_params."""
    module = cli.find_algorithm(name)
    env_id, preset = next(iter(module.PRESETS.items()))
    of_the_run, settings = problem.split_preset(preset)
    return module, settings, *envs.make(env_id, **dict(pair.split("=") for pair in of_the_run.get("env_options", ())))

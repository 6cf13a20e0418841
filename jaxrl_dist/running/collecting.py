"""Data that a policy makes: whole episodes of a trained agent or of a scripted controller, as a file to learn from."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrl_dist import outside
from jaxrl_dist.agent import Policy
from jaxrl_dist.configuration import require
from jaxrl_dist.learning import datasets, interaction
from jaxrl_dist.learning.interaction import Transition
from jaxrl_dist.learning.spaces import kind_of, spaces_of
from jaxrl_dist.records import recording
from jaxrl_dist.running import evaluation, folders, problem, results, training
from jaxrl_dist.wording import counted

# Episodes that are played side by side, in one program.
AT_ONCE = 128


class Source(NamedTuple):
    """A policy in its environment, and where both come from; `policy.act` as in `agent.Policy`."""

    policy: Policy
    state: Any
    env: Any
    env_params: Any
    about: dict[str, Any]


class Behaviour(NamedTuple):
    """What is done to the actions of a policy: random ones in their place, and Gaussian noise, cut to the bounds."""

    random: tuple[float, float] = (0.0, 0.0)
    """probability of a uniform random action instead, of the first and of the last episode, between them in a line"""
    noise: float = 0.0
    """standard deviation, of actions in [-1, 1]"""


def write(source: Source, path: Path, behaviour: Behaviour, console: Console, *, episodes: int, seed: int) -> None:
    """Play `episodes` and write them to `path`; says what is in it."""
    check(source, behaviour)
    folders.require_output(path)
    limit = evaluation.episode_limit(source.env_params)
    data = collect(source, behaviour, jax.random.key(seed), episodes=episodes, max_steps=limit)
    ends = data.terminated | data.truncated
    returns = np.add.reduceat(data.reward, np.flatnonzero(np.concatenate([[True], ends[:-1]])))
    about = source.about | behaviour._asdict() | {
        "episodes": episodes, "seed": seed, "rows": len(data.reward), "mean_return": float(returns.mean()),
        "versions": recording.versions(),
    }  # fmt: skip
    datasets.save(path, data, about)
    console.print(
        f"{datasets.describe(data)}, {counted(int(data.terminated.sum()), 'termination')}; returns "
        f"{returns.mean():.1f} on average, {returns.min():.1f} to {returns.max():.1f}",
        highlight=False,
    )
    console.print(f"wrote {path} (sha256 {datasets.digest(path)[:12]})", soft_wrap=True, highlight=False)


def check(source: Source, behaviour: Behaviour) -> None:
    """ConfigurationError where the environment cannot have such a behaviour."""
    for share in behaviour.random:
        require(0 <= share <= 1, f"--random is {share:g}; it must be in [0, 1]")
    require(0 <= behaviour.noise < np.inf, f"--noise is {behaviour.noise:g}; it must be finite and in [0, inf)")
    kind = kind_of(spaces_of(source.env, source.env_params)[0])
    require(
        behaviour.noise == 0 or kind == "continuous",
        f"--noise is {behaviour.noise:g}; it is for continuous actions, and these are {kind}",
    )


def collect(source: Source, behaviour: Behaviour, key: jax.Array, *, episodes: int, max_steps: int) -> Transition:
    """Whole episodes, one after the other: leaves `[rows, ...]`, arrays of numpy.

    Episodes still running after `max_steps` are cut there, as by a time limit.
    """
    play = jax.jit(functools.partial(_play, source.policy, source.env, source.env_params, behaviour, max_steps))
    share = np.linspace(*behaviour.random, episodes, dtype=np.float32)
    parts = []
    for first in range(0, episodes, AT_ONCE):
        some = share[first : first + AT_ONCE]
        padded = np.pad(some, (0, AT_ONCE - len(some))) if episodes > AT_ONCE else some
        lived, alive = jax.device_get(play(source.state, padded, jax.random.fold_in(key, first)))
        parts.append(_in_order(lived, alive.T[: len(some)]))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _in_order(lived: Transition, alive: np.ndarray) -> Transition:
    """Episode by episode, what is alive `[episodes, steps]` of transitions `[steps, episodes or more, ...]`."""
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1)[: len(alive)][alive], lived)
    truncated, last = rows.truncated.copy(), np.cumsum(alive.sum(1)) - 1
    truncated[last] |= ~rows.terminated[last]
    return rows._replace(truncated=truncated)


def _play(policy: Policy, env, env_params, behaviour: Behaviour, max_steps: int, state, share, key):
    """Transitions and whether they belong to the first episode of their environment, `[max_steps, episodes, ...]`."""
    episodes = len(share)
    start_key, key = jax.random.split(key)
    now = interaction.start(env, env_params, start_key, episodes, policy.start)

    def one(carry, time):
        now, alive = carry
        act_key, random_key, other_key, noise_key, step_key = jax.random.split(jax.random.fold_in(key, time), 5)
        action, memory = policy.act(state, now.observation, now.memory, act_key)
        if behaviour.noise:
            action = jnp.clip(action + behaviour.noise * jax.random.normal(noise_key, action.shape), -1, 1)
        anything = interaction.random_action(env, env_params, other_key, episodes).astype(action.dtype)
        action = interaction.where(jax.random.uniform(random_key, (episodes,)) < share, anything, action)
        now, lived, _ = interaction.step(env, env_params, now, action, step_key, memory, policy.start)
        return (now, alive & ~(lived.terminated | lived.truncated)), (lived, alive)

    return jax.lax.scan(one, (now, jnp.ones(episodes, bool)), jnp.arange(max_steps))[1]


# -- sources ----------------------------------------------------------------------------------------------------------


def of_run(folder: Path, find_algorithm: Callable, *, run_seed: int | None, explore: bool) -> Source:
    """The newest policy of one seed of a run, as it is evaluated, or as its returns are claimed for (`explore`)."""
    run = results.load_run(folder, find_algorithm, episodes=1)
    run_seed = int(run.seeds[0]) if run_seed is None else run_seed
    index = run.index_of(run_seed)
    agent = run.problem.agent()
    policy = agent.policy
    if explore:
        require(agent.claim is not None, "--explore is for agents that make a claim about returns; this one makes none")
        policy = Policy(
            lambda state, observation, memory, key: (agent.claim.policy(state, observation, key)[0], memory)
        )
    state = training.one_run(training.without_replay(run.state.state), index)
    options = run.problem.options
    about = {
        "env_id": options.env_id, "env_options": options.env_options, "source": str(folder), "run_seed": run_seed,
        "algorithm": run.problem.algorithm, "iteration": run.iteration, "explore": explore,
    }  # fmt: skip
    return Source(policy, state, run.problem.env, run.problem.env_params, about)


def of_controller(name: str, env_id: str, env_options: tuple[str, ...] = ()) -> Source:
    """A scripted policy `(observation, key) -> action`, named as module:name or path/file.py:name."""
    controller = outside.load(name, "SOURCE")
    require(callable(controller), f"SOURCE is {name!r}, which is no function of an observation and a key")
    env, env_params = problem.make_env(outside.absolute(env_id), env_options)
    policy = Policy(lambda state, observation, memory, key: (controller(observation, key), memory))
    like = interaction.transition_like(env, env_params)
    wanted = jax.ShapeDtypeStruct((2, *like.action.shape), like.action.dtype)
    observation = jax.ShapeDtypeStruct((2, *like.observation.shape), like.observation.dtype)
    try:
        found = jax.eval_shape(controller, observation, jax.random.key(0))
    except Exception as error:  # whatever the function does
        require(False, f"SOURCE is {name!r}, which fails: {type(error).__name__}: {' '.join(str(error).split())}")
    require(
        getattr(found, "shape", None) == wanted.shape,
        f"SOURCE is {name!r}, which gives {found} for two observations; it must give {wanted}",
    )
    about = {"env_id": outside.absolute(env_id), "env_options": env_options, "source": outside.absolute(name)}
    return Source(policy, None, env, env_params, about)

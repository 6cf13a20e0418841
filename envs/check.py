"""`check_env(env)` tells the author of an environment, in words, where it breaks the contract.

It takes 16 copies of the environment through a few random steps and compares: plain calls with `jit(vmap(...))`, a
short time limit with a long one (same keys, same actions, so the two may only differ by the reset), and the starts of
the next episodes with the first ones.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist.learning.interaction import EXTRAS
from jaxrl_dist.learning.spaces import SEVERAL, bounds_of, counts_of, kind_of, spaces_of
from jaxrl_dist.running import evaluation

LANES = 16  # enough that even a start drawn from two states is not the same everywhere by chance
LIMIT = 4  # the time limit of the short runs, in steps
STEPS_WITHOUT_LIMIT = 50  # how long to wait for the end of an episode where there is no time limit
NEEDED = ("name", "default_params", "reset", "step", "action_space", "observation_space")


class EnvironmentCheckError(ValueError):
    """Everything that `check_env` found, one finding per line."""


def check_env(env: Any, params: Any = None, seed: int = 0) -> list[str]:
    """Run `env` for a few steps; returns warnings, raises EnvironmentCheckError naming every broken rule at once.

    `params` defaults to `env.default_params`. Warnings are weak types (a jitted step compiles twice) and rules that
    could not be tried, such as the time limit of an environment in which every random episode ends before it.
    """
    warnings: list[str] = []
    errors = [f"env has no attribute {name!r}" for name in NEEDED if not hasattr(env, name)]
    if not errors:
        params = env.default_params if params is None else params
        errors += _types(env, params, warnings)
    if not errors:  # only an environment that can be traced can be run
        errors += _values(env, params, seed, warnings)
    if errors:
        lines = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
        raise EnvironmentCheckError(f"environment {getattr(env, 'name', env)} breaks the contract:\n{lines}")
    return warnings


def _types(env: Any, params: Any, warnings: list[str]) -> Iterator[str]:
    """Shapes, dtypes and structure, found by tracing: nothing is compiled or run."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:  # inside a trace, where agents ask for them
        action = jax.eval_shape(lambda key: spaces_of(env, params)[0].sample(key), key)
        jax.eval_shape(lambda: jnp.zeros(getattr(env.observation_space(params), "shape", None) or ()))
    except Exception as error:
        yield f"action_space or observation_space cannot be used while an agent is traced: {_one_line(error)}"
        return
    action_space, observation_space = spaces_of(env, params)
    if not (kind_of(action_space) == "discrete" or _is_unit_box(action_space) or _is_factored(action_space)):
        yield (
            f"action_space is {_one_line(repr(action_space))} ({kind_of(action_space)}), allowed: Discrete, or "
            "Box(-1, 1) (see envs.rescale_actions), or MultiDiscrete of one dimension that counts from 0"
        )
        return
    if kind_of(observation_space) not in ("continuous", "integers"):
        yield (
            f"observation_space is {_one_line(repr(observation_space))} ({kind_of(observation_space)}), allowed: Box "
            "(see envs.one_hot_observations for Discrete)"
        )
        return
    try:
        observation, state = jax.eval_shape(env.reset, key, params)
    except Exception as error:
        yield f"reset cannot be traced: {_one_line(error)}"
        return
    try:
        results = jax.eval_shape(env.step, key, state, action, params)
    except Exception as error:
        yield f"step cannot be traced: {_one_line(error)}"
        return
    if not (isinstance(results, tuple) and len(results) == 6):
        yield "step must return (observation, state, reward, terminated, truncated, info)"
        return
    next_observation, next_state, reward, terminated, truncated, info = results

    yield from _same_type("observation", observation, "step", next_observation, warnings)
    yield from _same_type("state", state, "step", next_state, warnings)
    if not isinstance(observation, jax.ShapeDtypeStruct):
        yield f"observation is a {type(observation).__name__}, allowed: one array"
    elif observation.shape != observation_space.shape or observation.dtype != observation_space.dtype:
        yield f"observation is {_describe(observation)}, but observation_space is {observation_space!r}"
    if not (_is_scalar(reward) and jnp.issubdtype(reward.dtype, jnp.floating)):
        yield f"reward is {_describe(reward)}, allowed: one floating-point number"
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not (_is_scalar(flag) and flag.dtype == jnp.bool_):
            yield f"{name} is {_describe(flag)}, allowed: one bool"
    if not isinstance(info, dict) or "final_observation" not in info:
        yield "info has no 'final_observation' (the true successor, before the automatic reset)"
    else:
        yield from _same_type("observation", observation, "info['final_observation']", info["final_observation"], [])
    number = 0, "one floating-point number"
    shapes = {"rewards": (1, "a vector of floating-point numbers"), "cost": number, "unchanged_reward": number}
    for name in EXTRAS:
        if isinstance(info, dict) and name in info:
            (dimensions, allowed), leaf = shapes[name], info[name]
            is_array = isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)
            if not is_array or len(leaf.shape) != dimensions or 0 in leaf.shape:
                yield f"info[{name!r}] is {_describe(leaf)}, allowed: {allowed}"


def _values(env: Any, params: Any, seed: int, warnings: list[str]) -> Iterator[str]:
    """What the environment computes."""
    action_space, observation_space = spaces_of(env, params)
    reset = jax.jit(jax.vmap(env.reset, in_axes=(0, None)))
    step = jax.jit(jax.vmap(env.step, in_axes=(0, 0, 0, None)))
    sample = jax.vmap(action_space.sample)

    def keys(stream: int) -> jax.Array:  # made anew for each use, so that no key is used twice
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), stream), LANES)

    def run(params: Any, steps: int) -> list[tuple]:
        """[(observation, state, reward, terminated, truncated, info)] with `[lanes, ...]` leaves."""
        results, state = [], reset(keys(0), params)[1]
        for t in range(steps):
            results.append(step(keys(2 * t + 1), state, sample(keys(2 * t + 2)), params))
            state = results[-1][1]
        return results

    try:
        first = reset(keys(0), params)
        if not hasattr(params, "max_steps_in_episode"):
            short, long = run(params, STEPS_WITHOUT_LIMIT), None
        else:
            near, far = (_with_limit(params, steps) for steps in (LIMIT, 100 * LIMIT))
            short, long = run(near, 2 * LIMIT), run(far, LIMIT)
    except Exception as error:
        yield f"reset or step fails under jit(vmap(...)): {_one_line(error)}"
        return
    short = jax.tree.map(_to_numpy, short)

    observations = [first[0], *(r[0] for r in short), *(r[5]["final_observation"] for r in short)]
    if not jnp.all(jax.vmap(jax.vmap(observation_space.contains))(jnp.stack(observations))):
        yield f"an observation lies outside observation_space {observation_space!r}"
    if not all(np.all(np.isfinite(r[2])) for r in short):
        yield "a reward is not finite"
    for name in EXTRAS:
        if not all(np.all(np.isfinite(r[5][name])) for r in short if name in r[5]):
            yield f"info[{name!r}] is not finite on every step"
    sums = [(r[5]["rewards"].sum(-1), r[2]) for r in short if "rewards" in r[5]]
    if not all(np.allclose(total, reward, rtol=1e-3, atol=1e-4, equal_nan=True) for total, reward in sums):
        warnings.append(
            "info['rewards'] does not add up to the reward: agents that learn the vector maximise its sum, and what is "
            "evaluated is the reward"
        )
    if any(np.any(~(r[3] | r[4]) & ~_same(r[5]["final_observation"], r[0])) for r in short):
        yield "info['final_observation'] is not the successor on a step that ends no episode"
    try:
        yield from _plain_calls(env, params, keys, sample, reset, step)
    except Exception as error:
        yield f"reset or step fails when called plainly, though not under jit: {_one_line(error)}"
    if long is not None:
        if why := evaluation.limited_because(env, params):
            warnings.append(f"calibration will be off: the time limit cannot be lifted, since {why}")
        yield from _time_limit(short, jax.tree.map(_to_numpy, long), warnings)
    yield from _next_episode(jax.tree.map(_to_numpy, first), short, warnings)


def _plain_calls(env: Any, params: Any, keys: Any, sample: Any, reset: Any, step: Any) -> Iterator[str]:
    """`env.reset` and `env.step` as a user calls them: the same twice, and the same as under jit and vmap."""
    start = [env.reset(keys(0)[0], params) for _ in range(2)]
    action = sample(keys(2))
    after = [env.step(keys(1)[0], start[0][1], action[0], params) for _ in range(2)]
    if not (_equal(start[0], start[1]) and _equal(after[0], after[1])):
        yield "the same key gives different results: randomness must come from the key, memory from the state"
        return
    starts = reset(keys(0), params)
    afters = step(keys(1), starts[1], action, params)
    for name, plain, batched in (("reset", start[0], starts), ("step", after[0], afters)):
        plain = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], plain)
        if not _same(jax.tree.map(_to_numpy, plain), _take(jax.tree.map(_to_numpy, batched), [0])).all():
            yield f"{name} gives another result under jit(vmap(...)) than called plainly: it must be a pure function"


def _time_limit(short: list[tuple], long: list[tuple], warnings: list[str]) -> Iterator[str]:
    """A limit of LIMIT steps against a far one: the episode may only be cut, and by `truncated`."""
    alive = np.ones(LANES, bool)
    comparable = np.ones(LANES, bool)  # an observation may show the share of the time limit that has passed
    for t in range(LIMIT - 1):
        if np.any(alive & short[t][4] & ~short[t][3]):
            yield f"truncated is set at step {t + 1} of an episode, before max_steps_in_episode={LIMIT}"
            return
        alive &= ~(short[t][3] | long[t][3])
        comparable &= _same(short[t][0], long[t][0])
    if not alive.any():
        warnings.append(f"time limit not checked: no episode of random actions lasted {LIMIT} steps")
        return
    at_limit, beyond = short[LIMIT - 1], long[LIMIT - 1]
    if np.any(alive & at_limit[3] & ~beyond[3]):
        yield "terminated is set by the time limit: reaching max_steps_in_episode must set truncated only"
    elif np.any(alive & ~at_limit[3] & ~at_limit[4]):
        yield f"truncated is not set at max_steps_in_episode={LIMIT}"
    successor = _same(at_limit[5]["final_observation"], beyond[5]["final_observation"])
    if not np.all(successor[alive & comparable]):
        yield "info['final_observation'] at the time limit is not the successor that a longer episode reaches"

    alive &= at_limit[4]  # a second episode of the same length
    for t in range(LIMIT, 2 * LIMIT):
        if np.any(alive & ~short[t][3] & (short[t][4] != (t == 2 * LIMIT - 1))):
            yield "the second episode is cut at another step than the first: a reset must set the step count to 0"
            return
        alive &= ~short[t][3]


def _next_episode(first: tuple, short: list[tuple], warnings: list[str]) -> Iterator[str]:
    """After the end of an episode, observation and state are a fresh start."""
    ended = np.array([r[3] | r[4] for r in short])  # [steps, lanes]
    if not ended.any():
        warnings.append(f"automatic reset not checked: no episode ended within {len(short)} steps")
        return
    t = int(ended.sum(axis=1).argmax())  # the step on which most lanes ended
    lanes = np.flatnonzero(ended[t])
    final = _take(short[t][5]["final_observation"], lanes)
    for name, every_start, after in (("observation", first[0], short[t][0]), ("state", first[1], short[t][1])):
        start, after = _take(every_start, lanes), _take(after, lanes)
        if _all_alike(every_start):
            if not np.all(_same(after, start)):
                yield f"after the end of an episode, {name} is not that of a reset"
            continue
        complaint = None
        if name == "observation" and np.all(_same(after, final)):
            complaint = "is still the final one: step must reset by itself"
        elif lanes.size > 1 and np.all(_same(after, start)):
            complaint = "is the first one of its lane again: draw it from the step's key"
        elif lanes.size > 1 and _all_alike(after):
            complaint = "is the same whatever the key: draw it from the step's key"
        if complaint:
            yield f"after the end of an episode, {name} {complaint}"


def _with_limit(params: Any, steps: int) -> Any:
    """`params` with another time limit, of the old one's type (so that nothing compiles again)."""
    old = params.max_steps_in_episode
    new = jnp.asarray(steps, old.dtype) if hasattr(old, "dtype") else type(old)(steps)
    return dataclasses.replace(params, max_steps_in_episode=new)


def _take(tree: Any, lanes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[lanes], tree)


def _all_alike(tree: Any) -> bool:
    return bool(np.all(_same(tree, jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), tree))))


def _same_type(name: str, expected: Any, place: str, got: Any, warnings: list[str]) -> Iterator[str]:
    if jax.tree.structure(expected) != jax.tree.structure(got):
        yield f"{name} has another structure in {place} than after reset: {_one_line(jax.tree.structure(got))}"
        return
    weak = False
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True)
    for (path, old), new in leaves:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            where = name + jax.tree_util.keystr(path)
            yield f"{where} is {_describe(new)} in {place}, but {_describe(old)} after reset"
        weak |= old.weak_type != new.weak_type
    if weak:
        warnings.append(
            f"{name} is weakly typed after reset or step only: a jitted step compiles twice (give it a dtype)"
        )


def _is_unit_box(space: Any) -> bool:
    if kind_of(space) != "continuous":
        return False
    low, high = bounds_of(space)
    return bool(np.all(low == -1) and np.all(high == 1))


def _is_factored(space: Any) -> bool:
    if kind_of(space) != SEVERAL:
        return False
    counts = counts_of(space)
    return counts.ndim == 1 and counts.size > 0 and counts.min() >= 1 and not np.any(getattr(space, "start", 0))


def _is_scalar(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) and leaf.shape == ()


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def _one_line(thing: Any) -> str:
    text = f"{type(thing).__name__}: {thing}" if isinstance(thing, Exception) else str(thing)
    return text.splitlines()[0][:200]


def _to_numpy(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def _equal(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(_to_numpy(a), _to_numpy(b), equal_nan=_to_numpy(a).dtype.kind == "f") for a, b in pairs)


def _same(left: Any, right: Any) -> np.ndarray:
    """[lanes] bool: all leaves agree, floats up to rounding (programs compiled apart differ in the last bits)."""
    same = np.ones(jax.tree.leaves(left)[0].shape[0], bool)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        close = np.isclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) if a.dtype.kind == "f" else a == b
        same &= close.reshape(close.shape[0], -1).all(axis=1)
    return same

"""`make(env_id, **options)` finds every environment by name; `available()` lists the names."""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnax
import numpy as np
from gymnax.registration import registered_envs

from jaxrl_dist import outside
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.envs.bridge import Bridge, check_params
from jaxrl_dist.envs.check import NEEDED, EnvironmentCheckError, check_env
from jaxrl_dist.envs.comb_lock import CombLock
from jaxrl_dist.envs.factored import FactoredMDP, discretise_actions
from jaxrl_dist.envs.gym_wrappers import OPTIONS as AROUND
from jaxrl_dist.envs.gym_wrappers import flat_observations, wrapped
from jaxrl_dist.envs.maze import Maze
from jaxrl_dist.envs.multi_reward import GENERATORS as WITH_REWARDS
from jaxrl_dist.envs.one_hot import one_hot_observations
from jaxrl_dist.envs.probe import Probe, probe_params
from jaxrl_dist.envs.rescaling import rescale_actions
from jaxrl_dist.envs.stock import GENERATORS as WITH_STOCK
from jaxrl_dist.envs.stock import StockAugmented
from jaxrl_dist.envs.tabular import GENERATORS
from jaxrl_dist.envs.tokens import GENERATORS as OF_TOKENS
from jaxrl_dist.envs.velocity_free import POSITIONS, velocity_free

# What may stand before other ids.
PREFIXES = ("stock/", "discretised/")

# Families of other packages, whose names only they know (`packages.py`).
PACKAGES = ("craftax/", "jumanji/", "navix/", "playground/")

_CHECKED: set[tuple[str, str]] = set()

FINITE = {**GENERATORS, **WITH_STOCK, **WITH_REWARDS, **OF_TOKENS}

# Environments that cannot run, and why: `available` leaves them out, `make` says so.
UNAVAILABLE = {
    "MNISTBandit-bsuite": "it downloads MNIST when it is made and so fails without a network",
}

# brax's environments and the backend we choose: 'spring', the fastest on CPU of those measured (steps/s at 16
# environments on a busy two-core machine, read as ratios: inverted_pendulum spring 167k, positional 53k, generalized
# 35k, mjx 28k; inverted_double_pendulum 78k, generalized 13k, mjx 40k; reacher 69k, generalized 8k, mjx 35k).
# 'generalized' inverted_pendulum became non-finite under random actions when left running past its end. pusher is
# slow (2k). Returns of different backends are not comparable. The names stand here so that listing them does not
# import brax and MuJoCo.
BRAX_BACKENDS = ("spring", "positional", "generalized", "mjx")
BRAX_DEFAULT_BACKEND = {
    "ant": "spring",
    "fast": None,  # brax's own test environment: no physics
    "halfcheetah": "spring",
    "hopper": "spring",
    "humanoid": "spring",
    "humanoidstandup": "spring",
    "inverted_double_pendulum": "spring",
    "inverted_pendulum": "spring",
    "pusher": "spring",
    "reacher": "spring",
    "swimmer": "generalized",  # its only one: the others have no fluid
    "walker2d": "spring",
}

# Gymnasium's MuJoCo tasks, whose module is imported only where one is asked for (`gym_mujoco.py`).
MUJOCO = (
    "Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5", "Pusher-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5",
)  # fmt: skip


def available() -> dict[str, list[str]]:
    """Every id that `make` accepts, by family. Left out: MNISTBandit-bsuite (downloads at start), see `UNAVAILABLE`."""
    families = {
        "gymnax": list(registered_envs),
        "brax": [f"brax/{name}" for name in BRAX_DEFAULT_BACKEND],
        "mujoco": [f"mujoco/{name}" for name in MUJOCO],
        "probe": ["probe"],
        "bridge": ["bridge"],
        "comb_lock": ["comb_lock"],
        "factored": ["factored"],
        "maze": ["maze"],
        "multi_reward": [*WITH_REWARDS],
        "tabular": [*GENERATORS, *WITH_STOCK],
        "token": [*OF_TOKENS],
        "velocity_free": [f"velocity_free/{name}" for name in POSITIONS],
        # Examples: `stock/` may stand before every id whose observations are vectors.
        "stock": [f"stock/{name}" for name in (*WITH_STOCK, "bridge", "CartPole-v1")],
        # Examples: `discretised/` may stand before every id whose actions are a box, brax's too.
        "discretised": [f"discretised/{name}" for name in ("Pendulum-v1", "MountainCarContinuous-v0")],
    }
    return {family: [i for i in ids if i not in UNAVAILABLE] for family, ids in families.items()}


def make(env_id: str, **options: Any) -> tuple[Any, Any]:
    """The environment and its parameters, `(env, env_params)`.

    Besides the names of `available`, `craftax/NAME`, `navix/NAME`, `jumanji/NAME` and `playground/NAME` name
    environments of those packages, where they are installed (`packages.py`); `module:name` and `path/file.py:name` name
    a class, an instance, or a function that makes one, alone or with its parameters, and what it is goes through
    `check_env` first. Continuous actions are rescaled to Box(-1, 1), and cut into bins where `discretised/` stands
    before the name; observations that are the number of a state become one-hot vectors, and tuples and dicts vectors.

    An option is an argument of the environment's constructor (`size=16`; for brax also `backend`), a field of its
    parameters (`max_steps_in_episode=100`, `max_torque=1.0`; for the probe also `case="discounting"`), or one of
    `gym_wrappers.OPTIONS` (`frame_stack=4`), which every environment has. A value may be
    a string, as a command line gives it, which is read as a Python literal where the option is not itself text.
    Raises ValueError for an unknown id, option or backend, or a value of the wrong type, naming what is allowed.
    """
    if env_id in UNAVAILABLE:
        raise ValueError(f"environment {env_id!r} is not available: {UNAVAILABLE[env_id]}")
    known = [i for ids in available().values() for i in ids]
    if not outside.is_outside(env_id) and env_id not in known and not env_id.startswith((*PREFIXES, *PACKAGES)):
        raise ValueError(f"environment {env_id!r} is unknown, {_nearest(env_id, known)}")

    if outside.is_outside(env_id):
        construct, arguments = _outside(env_id)
    elif env_id == "probe":
        construct, arguments = Probe, _arguments(Probe)
        if "case" in options:
            options = options | {"case": probe_params(options["case"]).case}
    elif env_id == "bridge":
        construct, arguments = Bridge, _arguments(Bridge)
    elif env_id == "comb_lock":
        construct, arguments = CombLock, _arguments(CombLock)
    elif env_id == "factored":
        construct, arguments = FactoredMDP, _arguments(FactoredMDP)
    elif env_id == "maze":
        construct, arguments = Maze, _arguments(Maze)
    elif env_id in FINITE:
        generator = FINITE[env_id]
        construct, arguments = generator, _arguments(generator)
    elif env_id.startswith("velocity_free/"):
        name = env_id.removeprefix("velocity_free/")
        construct, arguments = partial(velocity_free, name), _arguments(type(gymnax.make(name)[0]))
    elif env_id.startswith("stock/"):
        arguments = {k: v for k, v in _arguments(StockAugmented).items() if k not in ("env", "env_params")}
        inner = make(env_id.removeprefix("stock/"), **{k: v for k, v in options.items() if k not in arguments})
        construct, options = partial(StockAugmented, *inner), {k: v for k, v in options.items() if k in arguments}
    elif env_id.startswith("discretised/"):
        arguments = {k: v for k, v in _arguments(discretise_actions).items() if k not in ("env", "params")}
        inner = make(env_id.removeprefix("discretised/"), **{k: v for k, v in options.items() if k not in arguments})
        options = {k: v for k, v in options.items() if k in arguments}

        def construct(**chosen: Any) -> tuple[Any, Any]:
            return discretise_actions(*inner, **chosen), inner[1]

    elif env_id.startswith(PACKAGES):
        from jaxrl_dist.envs import packages  # here, and there the package, which may be missing

        # Which options it takes only the package knows; text goes as it is read.
        theirs = {k: v for k, v in options.items() if k not in (*AROUND, "max_steps_in_episode")}
        construct, arguments = partial(packages.make, env_id), dict.fromkeys(theirs)
    elif env_id.startswith("mujoco/"):
        from jaxrl_dist.envs import gym_mujoco  # here, so that others never import MuJoCo

        construct = gym_mujoco.TASKS[env_id.removeprefix("mujoco/")]
        arguments = _arguments(construct)
    elif env_id.startswith("brax/"):
        construct, arguments = _brax(env_id.removeprefix("brax/"), options.get("backend"))
    else:
        construct, arguments = partial(gymnax.make, env_id), _arguments(type(gymnax.make(env_id)[0]))
    chosen = {k: _read(k, v, arguments[k]) for k, v in options.items() if k in arguments}
    made = construct(**chosen)
    around = {} if env_id.startswith(PREFIXES) else {k: v for k, v in AROUND.items() if k not in arguments}
    # The parameters come second, since they may depend on the constructor (DeepSea's time limit is its size).
    env, params = made if isinstance(made, tuple) else (made, made.default_params)
    fields = (
        {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
        if dataclasses.is_dataclass(params)
        else {}
    )
    for name in options:
        if name not in arguments and name not in fields and name not in around:
            allowed = ", ".join(dict.fromkeys([*arguments, *fields, *around]))
            raise ValueError(f"option {name!r} of environment {env_id!r} is unknown, allowed: {allowed}")
    if changed := {k: _read(k, v, fields[k]) for k, v in options.items() if k in fields}:
        params = dataclasses.replace(params, **changed)
    if np.any(np.asarray(getattr(params, "max_steps_in_episode", 1)) < 1):
        raise ValueError(f"max_steps_in_episode is {params.max_steps_in_episode}, allowed: 1 and above")
    if env_id == "bridge":
        check_params(params)
    env = rescale_actions(one_hot_observations(flat_observations(env, params), params), params)
    around = {k: _read(k, options[k], v) for k, v in around.items() if k in options and k not in fields}
    env = wrapped(env, params, **around)
    if outside.is_outside(env_id):
        _check_once(env_id, repr(sorted(options.items())), env, params)
    return env, params


def _outside(env_id: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Constructor of an environment of the user's, and its arguments."""
    found = outside.load(env_id, "--env-id")
    is_instance = not isinstance(found, type) and hasattr(found, "reset")

    def construct(**chosen: Any) -> Any:
        if not (is_instance or callable(found)):
            raise ConfigurationError(f"--env-id is {env_id!r}, a {type(found).__name__}, which is no environment")
        made = found if is_instance else found(**chosen)
        env = made[0] if isinstance(made, tuple) and len(made) == 2 else made
        if missing := [name for name in NEEDED if not hasattr(env, name)]:
            raise ConfigurationError(
                f"--env-id is {env_id!r}, which makes a {type(env).__name__}, which is no environment: it has no "
                f"{', '.join(missing)}"
            )
        return made

    return construct, {} if is_instance or not callable(found) else _arguments(found)


def _check_once(env_id: str, options: str, env: Any, params: Any) -> None:
    """`check_env`, once for the same environment: it takes a few seconds. Its findings stand in one line."""
    if (env_id, options) in _CHECKED:
        return
    try:
        warnings = check_env(env, params)
    except EnvironmentCheckError as error:
        raise ConfigurationError(f"--env-id is {env_id!r}: " + " ".join(str(error).split())) from None
    for warning in warnings:
        print(f"{outside.shown(env_id)}: {warning}")
    _CHECKED.add((env_id, options))


def _nearest(env_id: str, known: list[str]) -> str:
    by_lower = {i.lower(): i for i in known}
    # "pendulum" shall find "Pendulum-v1", "hopper" shall find "brax/hopper": the bare names are compared as well.
    by_lower |= {i.lower().rpartition("/")[2].split("-")[0]: i for i in reversed(known)}
    near = difflib.get_close_matches(str(env_id).lower(), by_lower, n=4, cutoff=0.5)
    names = list(dict.fromkeys(by_lower[i] for i in near))
    return f"nearest: {', '.join(names)}" if names else "jaxrl_dist.envs.available() lists what is allowed"


def _arguments(constructor: type) -> dict[str, Any]:
    """Name and default of every argument a constructor names."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.kind in named}


def _brax(name: str, backend: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Constructor of our adapter around brax's environment `name`, and that environment's own arguments."""
    default = BRAX_DEFAULT_BACKEND[name]
    if backend is not None and (default is None or backend not in BRAX_BACKENDS):
        allowed = ", ".join(BRAX_BACKENDS) if default else f"no backend, brax/{name} has no physics"
        raise ValueError(f"backend of brax/{name} is {backend!r}, allowed: {allowed}")
    from jaxrl_dist.envs import brax  # here, so that gymnax-only users never import brax and MuJoCo

    get = partial(brax.brax_envs.get_environment, name, **({"backend": default} if default else {}))
    plain = get()  # loading a model takes a while: where no option changes it, this one is used

    def construct(**chosen: Any) -> brax.Brax:
        return brax.Brax(get(**chosen) if chosen else plain, f"brax/{name}")

    return construct, _arguments(type(plain))


def _read(name: str, value: Any, default: Any) -> Any:
    """The value of an option, of its default's type; arrays pass as they are (parameters may be batched)."""
    if isinstance(value, str) and not isinstance(default, str):
        try:
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            if default is not None:  # without a default there is no type to hold the text against
                raise ValueError(f"{name} is {value!r}, allowed: {type(default).__name__}") from None
    if not isinstance(default, (bool, int, float)) or not isinstance(value, (bool, int, float, str, tuple, list)):
        return value
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} is {value!r}, allowed: {type(default).__name__}")
    return value

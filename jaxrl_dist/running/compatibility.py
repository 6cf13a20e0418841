"""Which algorithm accepts which environment: found by asking `make_agent`, which refuses what it cannot take."""

import types
from collections.abc import Mapping, Sequence
from typing import Any

from gymnax.environments import spaces

from jaxrl_dist.learning.spaces import UnsupportedEnvironment
from jaxrl_dist.running.problem import takes_data


def refusals(algorithms: Mapping[str, Any], env_ids: Sequence[str]) -> dict[str, dict[str, str]]:
    """{environment: {algorithm: why it does not accept the environment, "" where it does}}.

    `algorithms`: modules by name. Nothing is traced but a step, for algorithms that ask what comes with rewards. The
    models of brax and MuJoCo, which take half a minute to load, are not looked at: all of them have vectors of numbers
    in and out.
    """
    from jaxrl_dist import envs  # the toolkit knows the environments by name only

    found = {}
    for env_id in env_ids:
        heavy = env_id.startswith(("brax/", "mujoco/"))
        env, params = (_vectors(env_id), None) if heavy else envs.make(env_id)
        found[env_id] = {name: refusal(module, env, params) for name, module in algorithms.items()}
    return found


def refusal(algorithm: Any, env: Any, env_params: Any) -> str:
    """Why an algorithm (its module) does not accept an environment; "" where it does."""
    data = (None,) if takes_data(algorithm.make_agent) else ()  # what it holds is looked at when it is traced
    try:
        algorithm.make_agent(algorithm.Config(), env, env_params, *data)
    except UnsupportedEnvironment as error:
        return error.why
    return ""


def _vectors(name: str) -> Any:
    box = spaces.Box(-1.0, 1.0, (1,))
    return types.SimpleNamespace(name=name, action_space=lambda params: box, observation_space=lambda params: box)

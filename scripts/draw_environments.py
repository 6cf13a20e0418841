"""Draw docs/environments/NAME.png, what the site shows of an environment: a state after a few random steps.

    python scripts/draw_environments.py [NAME ...]    without names those that have no picture yet

Environments with bodies are drawn as they start, without a step of their physics, which takes a minute to compile.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxrl_dist import envs
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.envs import drawings

FOLDER = Path(__file__).parents[1] / "docs" / "environments"
WIDTH = 640
STEPS = 12


def file_of(env_id: str) -> Path:
    return FOLDER / f"{env_id.replace('/', '-')}.png"


def drawn(env_id: str) -> np.ndarray:
    """The picture `[height, width, 3]`; ConfigurationError where nobody knows how to draw it."""
    env, params = envs.make(env_id)
    drawings.require_picture(env)
    if (bodies := _bodies(env)) is not None:
        return drawings.of_mujoco(*bodies)
    reset, step = jax.jit(env.reset), jax.jit(env.step)
    key = jax.random.key(0)
    key, reset_key = jax.random.split(key)
    _, state = reset(reset_key, params)
    for _ in range(STEPS):
        key, action_key, step_key = jax.random.split(key, 3)
        action = env.action_space(params).sample(action_key)
        _, later, _, terminated, truncated, _ = step(step_key, state, action, params)
        if terminated | truncated:
            break
        state = later
    return drawings.picture(env, jax.device_get(state), jax.device_get(params))


def _bodies(env) -> tuple | None:
    """MuJoCo's model and the positions that an episode starts around; None for environments without bodies."""
    while env is not None:
        if (model := vars(env).get("mujoco_model")) is not None:
            return model, np.asarray(model.qpos0)
        system = getattr(vars(env).get("env"), "sys", None)
        if getattr(system, "mj_model", None) is not None:
            return system.mj_model, np.asarray(system.init_q)
        env = vars(env).get("env")
    return None


def main() -> None:
    names = sys.argv[1:]
    known = [env_id for ids in envs.available().values() for env_id in ids]
    FOLDER.mkdir(exist_ok=True)
    for env_id in names or [env_id for env_id in known if not file_of(env_id).exists()]:
        try:
            image = Image.fromarray(drawn(env_id))
        except ConfigurationError as error:
            print(f"{env_id}: {error}")
            continue
        size = WIDTH, max(1, round(image.height * WIDTH / image.width))
        image.resize(size, Image.Resampling.LANCZOS).quantize(64).save(file_of(env_id), optimize=True)
        print(f"{env_id}: {file_of(env_id).stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()

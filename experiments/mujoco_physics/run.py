"""How far do MJX's tasks follow Gymnasium's, and how fast are they? (`envs/gym_mujoco.py`)

Per task of Gymnasium's version 5:

- `differences.csv`: from the same state, with the same uniform random actions (half of their range), the largest
  difference of observations and rewards after 1, 5 and 20 steps, the median and the largest over `starts` starts, and
  on how many starts the two ended at the same step. Starts are those of a reset, each after `apart` further steps of
  Gymnasium's, so that feet touch the ground.
- `episodes.csv`: returns and lengths of whole episodes of uniform random actions in each of the two, with the
  difference of their means and its 95 % interval, and the same against Gymnasium's task with Newton's solver where the
  file asks for PGS.
- `speed.csv`: seconds to compile a step, and steps per second for 1, 16 and 64 environments side by side, automatic
  resets included, beside Gymnasium's own (one process, one environment).

    python experiments/mujoco_physics/run.py            # about half an hour on 2 cores, most of it compiling
"""

import json
import os
import time
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist.envs import gym_mujoco, registry
from jaxrl_dist.envs.rescaling import rescale_actions
from jaxrl_dist.records import recording
from jaxrl_dist.running import gymnasium_evaluation

HERE = Path(__file__).parent
STEPS = (1, 5, 20)
ENVIRONMENTS = (1, 16, 64)


def main(
    tasks: tuple[str, ...] = registry.MUJOCO, starts: int = 20, apart: int = 10, episodes: int = 64, out: Path = HERE
) -> None:
    """Measure and write the tables, a task at a time; tasks that they hold already are measured again.

    Args:
        tasks: names, such as Hopper-v5.
        starts: states from which both go on.
        apart: steps of Gymnasium's between a reset and such a state.
        episodes: of random actions, in each.
        out: folder to write to.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for name in tasks:
        task = gym_mujoco.TASKS[name]()
        append(out / "differences.csv", name, differences(name, task, starts, apart))
        append(out / "speed.csv", name, speed(name, task))
        append(out / "episodes.csv", name, whole_episodes(name, task, episodes))
        about = {
            "command": recording.command_line(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - began), "mujoco": mujoco.__version__,
            "gymnasium": gymnasium.__version__, "versions": recording.versions(),
        }  # fmt: skip
        (out / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def append(path: Path, name: str, rows: list[dict]) -> None:
    """Write a task's rows in place of those that are there."""
    new = pd.DataFrame([{"task": name} | row for row in rows])
    print(new.to_string(index=False), flush=True)
    if path.exists():
        old = pd.read_csv(path)
        new = pd.concat([old[old.task != name], new])
    new.sort_values("task", kind="stable").to_csv(path, index=False)


def differences(name: str, task: gym_mujoco.Task, starts: int, apart: int) -> list[dict]:
    """Rows after each number of `STEPS`."""
    theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
    generator, params, most = np.random.default_rng(0), task.default_params, max(STEPS)
    low, high = theirs.action_space.low, theirs.action_space.high
    actions = generator.uniform(low / 2, high / 2, (starts, apart + most, len(low))).astype(np.float32)
    qpos, qvel, places, seen, paid, ended = [], [], [], [], [], []
    for i in range(starts):
        theirs.reset(seed=i)
        for action in actions[i, :apart]:
            theirs.step(action)
        state = theirs.data.qpos.astype(np.float32), theirs.data.qvel.astype(np.float32)
        theirs.set_state(state[0].astype(np.float64), state[1].astype(np.float64))  # both start from the rounded one
        theirs.data.qacc_warmstart[:] = 0.0
        qpos.append(state[0])
        qvel.append(state[1])
        places.append(place_of(task, theirs))
        followed = [theirs.step(action)[:3] for action in actions[i, apart:]]
        for into, values in zip((seen, paid, ended), zip(*followed, strict=True), strict=True):
            into.append(np.array(values))

    def follow(qpos, qvel, place, actions):
        first = gym_mujoco.MujocoState(jnp.zeros((), jnp.int32), qpos, qvel, jnp.zeros_like(qvel), place)

        def step(state, action):
            observation, state, reward, terminated, _ = task.step_env(jax.random.key(0), state, action, params)
            return state, (observation, reward, terminated)

        return jax.lax.scan(step, first, actions)[1]

    batch = [jnp.asarray(np.array(x), jnp.float32) for x in (qpos, qvel, places, actions[:, apart:])]
    found = jax.tree.map(np.asarray, jax.jit(jax.vmap(follow))(*batch))
    alike = np.array([first(mine) == first(wanted) for mine, wanted in zip(found[2], ended, strict=True)])
    rows = []
    for steps in STEPS:
        of_observation = np.abs(found[0][:, steps - 1] - np.array(seen)[:, steps - 1]).max(-1)
        of_reward = np.abs(found[1][:, steps - 1] - np.array(paid)[:, steps - 1])
        rows.append(
            {
                "steps": steps, "observation_median": f"{np.median(of_observation):.1e}",
                "observation_largest": f"{of_observation.max():.1e}", "reward_median": f"{np.median(of_reward):.1e}",
                "reward_largest": f"{of_reward.max():.1e}", "largest_observed": f"{np.abs(seen).max():.1e}",
                "starts": starts, "ended_alike": int(alike.sum()),
            }
        )  # fmt: skip
    return rows


def first(ended: np.ndarray) -> int:
    """The step at which an episode ended, or one that is none."""
    return int(ended.argmax()) if ended.any() else -1


def place_of(task: gym_mujoco.Task, theirs) -> np.ndarray:
    """Where the body is whose speed pays, of Gymnasium's simulation."""
    from mujoco import mjx

    return np.asarray(task.place(mjx.put_data(task.mujoco_model, theirs.data, impl="jax")))


def speed(name: str, task: gym_mujoco.Task) -> list[dict]:
    """One row: compiling, and steps per second."""
    env, params, row = rescale_actions(task, task.default_params), task.default_params, {}
    for count in ENVIRONMENTS:

        def some(carry, key, count=count):
            observation, state = carry
            key_action, key_step = jax.random.split(key)
            action = jax.random.uniform(key_action, (count, env.num_actions), minval=-1.0, maxval=1.0)
            observation, state, *_ = jax.vmap(env.step, (0, 0, 0, None))(
                jax.random.split(key_step, count), state, action, params
            )
            return (observation, state), ()

        reset = jax.jit(jax.vmap(env.reset, (0, None)))
        carry = reset(jax.random.split(jax.random.key(0), count), params)
        run = jax.jit(lambda carry, keys: jax.lax.scan(some, carry, keys)[0])
        keys = jax.random.split(jax.random.key(1), 25)
        began = time.perf_counter()
        compiled = run.lower(carry, keys).compile()
        row.setdefault("compile_seconds", round(time.perf_counter() - began, 1))
        carry = jax.block_until_ready(compiled(carry, keys))
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < 3.0:
            carry = jax.block_until_ready(compiled(carry, keys))
            steps += len(keys) * count
        row[f"steps_per_second_{count}"] = round(steps / (time.perf_counter() - began))
    theirs = gymnasium.make(name, disable_env_checker=True)
    theirs.reset(seed=0)
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < 2.0:
        *_, terminated, truncated, _ = theirs.step(theirs.action_space.sample())
        if terminated or truncated:
            theirs.reset()
        steps += 1
    return [row | {"gymnasium": round(steps / (time.perf_counter() - began))}]


def whole_episodes(name: str, task: gym_mujoco.Task, episodes: int) -> list[dict]:
    """Returns and lengths of random episodes: ours less Gymnasium's, by its solver and, where another, by Newton's."""
    env, params = rescale_actions(task, task.default_params), task.default_params
    limit = min(params.max_steps_in_episode, 200)

    def episode(key):
        key, first = jax.random.split(key)
        _, state = env.reset_env(first, params)

        def step(carry, key):
            state, running = carry
            key_action, key_step = jax.random.split(key)
            action = jax.random.uniform(key_action, (env.num_actions,), minval=-1.0, maxval=1.0)
            _, state, reward, terminated, _ = env.step_env(key_step, state, action, params)
            return (state, running & ~terminated), (reward * running, running)

        _, (rewards, alive) = jax.lax.scan(step, (state, True), jax.random.split(key, limit))
        return rewards.sum(), alive.sum()

    mine = [np.asarray(x) for x in jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(2), episodes))]
    rows, solvers = [], {"as in the file": None}
    if gymnasium.make(name).unwrapped.model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        solvers["Newton"] = mujoco.mjtSolver.mjSOL_NEWTON
    for solver, chosen in solvers.items():
        theirs = gymnasium.make(name, disable_env_checker=True).unwrapped
        if chosen is not None:
            theirs.model.opt.solver = chosen
        theirs.action_space.seed(0)
        wanted = []
        for i in range(episodes):
            theirs.reset(seed=i)
            total, length, ended = 0.0, 0, False
            while length < limit and not ended:
                _, reward, ended, _, _ = theirs.step(theirs.action_space.sample())
                total, length = total + reward, length + 1
            wanted.append((total, length))
        wanted = np.array(wanted).T
        gap = gymnasium_evaluation.difference_of_means([mine[0]], [wanted[0]])
        rows.append(
            {
                "gymnasium_solver": solver, "episodes": episodes, "steps_at_most": limit,
                "return": round(float(mine[0].mean()), 2), "return_gymnasium": round(float(wanted[0].mean()), 2),
                "difference": round(gap.mean, 2), "interval_low": round(gap.low, 2),
                "interval_high": round(gap.high, 2), "length": round(float(mine[1].mean()), 1),
                "length_gymnasium": round(float(wanted[1].mean()), 1),
            }
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    tyro.cli(main)

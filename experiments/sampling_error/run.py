"""Do data that are on-policy need on-policy sampling? PROPS and ROS (`policy_gradient/props.py`) against plain draws.

`error`: a fixed policy theta, and 2,048 steps of one environment that on-policy sampling, ROS and PROPS collect for it.
The sampling error of their first n steps is how much likelier they are to the policy that fits them best, among those
that differ from theta in the last layer (and in the deviation of continuous actions), than to theta: the mean of
log pi_MLE(a|s) - log pi_theta(a|s), 0 where every action was taken as often as theta says. Theta is what PPO learned in
some steps (`THETAS`). `error.csv` has a row per environment, theta, method, seed and n, `error_summary.csv`
interquartile means over seeds with 95 % intervals, `error.json` the settings.

`returns`: PPO, PPO with a buffer of two rollouts, and PROPS with one, trained with their presets; `returns.csv` has a
row per environment, method, seed and evaluation, `returns_summary.csv` those of the last one.

    python experiments/sampling_error/run.py --part error
    python experiments/sampling_error/run.py --part returns
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.records import plotting, recording, statistics

HERE = Path(__file__).parent
SIZES = (128, 256, 512, 1024, 2048)
# One environment, as in the paper. Theta stands still, so one rollout is all the data.
COLLECTING = {
    "num_envs": 1, "num_steps": SIZES[-1], "num_batches": 1, "num_epochs": 1, "num_minibatches": 1,
    "learning_rate": 0.0,
}  # fmt: skip
BEHAVIOURS = {
    "on-policy": {"behaviour": "on_policy"},
    "ROS": {"behaviour": "ros", "behaviour_period": 4},
    "PROPS": {"behaviour": "props", "behaviour_period": 4, "behaviour_learning_rate": 3e-3},
    "PROPS, default settings": {"behaviour": "props"},
}
# With 0.3 on Pendulum ROS leaves theta for ever within a hundred steps: nothing holds a Gaussian back.
ROS_LEARNING_RATE = {"CartPole-v1": 0.3, "Pendulum-v1": 3e-4}
# Steps after which PPO's policy is taken.
THETAS = {"CartPole-v1": {"trained": 20_000}, "Pendulum-v1": {"trained": 100_000}}
LEARNERS = {
    "PPO": {"behaviour": "on_policy", "num_batches": 1},
    "PPO, two rollouts": {"behaviour": "on_policy"},
    "PROPS": {},
}


def main(
    part: Literal["error", "returns"], environments: tuple[str, ...] = tuple(THETAS), methods: tuple[str, ...] = (),
    num_seeds: int = 5, eval_episodes: int = 40, out: Path = HERE,
) -> None:  # fmt: skip
    """Measure one part and write its tables and figures.

    Args:
        part: sampling errors of fixed policies, or returns of training.
        environments: where.
        methods: which methods; all of them if empty.
        num_seeds: seeds, side by side.
        eval_episodes: episodes per evaluation and seed, of `returns`.
        out: folder to write to.
    """
    cli.spread_over_cores()  # before environments are imported, which starts JAX
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    rows, seconds = [], {}
    for env_id in environments:
        found, seconds[env_id] = (
            errors(env_id, methods or tuple(BEHAVIOURS), num_seeds)
            if part == "error"
            else returns(env_id, methods or tuple(LEARNERS), num_seeds, eval_episodes)
        )
        rows += found
        print(pd.DataFrame(found).groupby([x for x in found[0] if x not in ("seed", "value")], sort=False).value.mean())
        results = pd.DataFrame(rows)
        results.round({"value": 6 if part == "error" else 1}).to_csv(out / f"{part}.csv", index=False)
    summarise(results, part, out)
    settings = {"methods": LEARNERS}
    if part == "error":
        settings = COLLECTING | {"methods": BEHAVIOURS, "ros_learning_rate": ROS_LEARNING_RATE}
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "seconds_of_each": seconds, "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
        "settings": settings,
    }  # fmt: skip
    (out / f"{part}.json").write_text(json.dumps(about, indent=2) + "\n")


# -- sampling errors --------------------------------------------------------------------------------------------------


def last_layer(parameters: dict) -> tuple[dict, int]:
    """What is fitted of a policy: its last weights, biases and the deviation; and the number of that layer."""
    layers = parameters["params"]["actor"]["layers"]
    number = len(layers) // 2 - 1
    fitted = {"kernel": layers[f"kernel_{number}"][0], "bias": layers[f"bias_{number}"][0]}
    if "log_std" in parameters["params"]:
        fitted["log_std"] = parameters["params"]["log_std"]
    return fitted, number


def sampling_error(parameters, observation, action, known, steps: int = 2000, learning_rate: float = 1e-3):
    """Mean of log pi_MLE(a|s) - log pi_theta(a|s) over known rows, `[]`.

    parameters: of `clipped.Network`, for vectors; observation, action: `[rows, ...]`; known: `[rows]` bool. pi_MLE
    starts as theta and is fitted by `steps` steps of Adam, whose step size falls to 0 in a line.
    """
    from jaxrl_dist.learning.policies import Choice, Gaussian

    theta, number = last_layer(parameters)
    layers, features = parameters["params"]["actor"]["layers"], observation
    for layer in range(number):
        features = jnp.tanh(features @ layers[f"kernel_{layer}"][0] + layers[f"bias_{layer}"][0])

    def log_likelihood(fitted):
        outputs = features @ fitted["kernel"] + fitted["bias"]
        law = Choice(outputs)
        if "log_std" in fitted:
            law = Gaussian(outputs, jnp.broadcast_to(fitted["log_std"], outputs.shape))
        return jnp.where(known, law.log_density(action), 0).sum() / known.sum()

    optimizer = optax.adam(optax.linear_schedule(learning_rate, 0.0, steps))

    def one(_, carry):
        fitted, memory = carry
        slope = jax.grad(lambda x: -log_likelihood(x))(fitted)
        changes, memory = optimizer.update(slope, memory)
        return optax.apply_updates(fitted, changes), memory

    fitted, _ = jax.lax.fori_loop(0, steps, one, (theta, optimizer.init(theta)))
    return log_likelihood(fitted) - log_likelihood(theta)


def errors(env_id: str, methods: tuple[str, ...], num_seeds: int) -> tuple[list[dict], dict]:
    """Rows of `error.csv` of one environment, and how long each method took."""
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.policy_gradient import props

    env, params = envs.make(env_id)
    keys = jax.random.split(jax.random.key(1), num_seeds)  # settings were chosen with key 0
    thetas = {name: policies(env_id, keys, steps) for name, steps in THETAS[env_id].items()}
    known = jnp.arange(SIZES[-1]) < jnp.array(SIZES)[:, None]
    rows, seconds = [], {}
    for method in methods:
        settings = COLLECTING | BEHAVIOURS[method] | {"ros_learning_rate": ROS_LEARNING_RATE[env_id]}
        agent = props.make_agent(props.Config(**settings), env, params)

        def measure(parameters, key, agent=agent):
            state = agent.init(key)
            state, metrics = agent.step(state._replace(learner=state.learner._replace(parameters=parameters)))
            data = jax.tree.map(lambda x: x[:, 0], state.buffer)
            found = jax.vmap(lambda known: sampling_error(parameters, data.observation, data.action, known))(known)
            return found, metrics

        measure, began = jax.jit(jax.vmap(measure)), time.perf_counter()
        for theta, parameters in thetas.items():
            found, metrics = jax.device_get(measure(parameters, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)))
            of_behaviour = {
                name: float((x.total / x.count).mean()) for name, x in metrics.items() if name.startswith("behaviour")
            }
            print(env_id, theta, method, of_behaviour, flush=True)
            rows += [
                {"environment": env_id, "theta": theta, "method": method, "seed": seed, "env_steps": size, "value": x}
                for seed in range(num_seeds) for size, x in zip(SIZES, found[seed].tolist(), strict=True)
            ]  # fmt: skip
        seconds[method] = round(time.perf_counter() - began, 1)
    return rows, seconds


def policies(env_id: str, keys: jax.Array, steps: int):
    """Parameters of PPO after so many steps, one per key."""
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.policy_gradient import props
    from jaxrl_dist.running import problem

    preset = problem.split_preset(props.PRESETS[env_id])[1]
    agent = props.make_agent(props.Config(**preset | LEARNERS["PPO"]), *envs.make(env_id))
    iterations = agent.clock.iterations(steps) if steps else 0

    def train(key):
        return jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], agent.init(key))

    return jax.jit(jax.vmap(train))(keys).learner.parameters


# -- returns ----------------------------------------------------------------------------------------------------------


def returns(env_id: str, methods: tuple[str, ...], num_seeds: int, eval_episodes: int) -> tuple[list[dict], dict]:
    """Rows of `returns.csv` of one environment, and how long each method took."""
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.policy_gradient import props
    from jaxrl_dist.running import problem, training

    of_the_run, preset = problem.split_preset(props.PRESETS[env_id])
    rows, seconds = [], {}
    for method in methods:
        began = time.perf_counter()
        config = dataclasses.replace(props.Config(), **preset | LEARNERS[method])
        train = training.make_train(
            props.make_agent, config, *envs.make(env_id), total_steps=of_the_run["total_steps"], evaluations=10,
            eval_episodes=eval_episodes,
        )  # fmt: skip
        _, history = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
        value = np.asarray(history["evaluation_return"]).mean(-1)
        rows += [
            {"environment": env_id, "method": method, "seed": seed, "env_steps": int(step), "value": float(x)}
            for seed in range(num_seeds) for step, x in zip(history["env_steps"][seed], value[seed], strict=True)
        ]  # fmt: skip
        seconds[method] = round(time.perf_counter() - began, 1)
    return rows, seconds


# -- tables and figures -----------------------------------------------------------------------------------------------


def summarise(results: pd.DataFrame, part: str, out: Path) -> None:
    cases = ["environment", "theta"] if part == "error" else ["environment"]
    rows = []
    for names, of_case in results.groupby(cases, sort=False):
        for (method, size), group in of_case.groupby(["method", "env_steps"], sort=False):
            if part == "returns" and size != of_case[of_case.method == method].env_steps.max():
                continue
            values, digits = group.value[np.isfinite(group.value)].to_numpy(), 5 if part == "error" else 1
            if len(values) < len(group):
                print(f"{names} {method} at {size}: {len(group) - len(values)} seeds are not finite and left out")
            low, high = statistics.bootstrap_interval(values)
            row = dict(zip(cases, names, strict=True)) | {"method": method, "env_steps": size, "seeds": len(values)}
            row["mean"] = round(values.mean(), digits)
            if part == "error":
                plain = of_case[(of_case.method == "on-policy") & (of_case.env_steps == size)].value.mean()
                row["of_on_policy"] = round(values.mean() / plain, 2)
            row["iqm"] = round(statistics.interquartile_mean(values), digits)
            rows.append(row | {"interval_low": round(low, digits), "interval_high": round(high, digits)})
        metric = "sampling error" if part == "error" else "evaluation return"
        frames = {
            method: group.rename(columns={"value": metric}) for method, group in of_case.groupby("method", sort=False)
        }
        title = f"{', theta: '.join(names)}, {of_case.seed.nunique()} seeds"
        plotting.learning_curve(frames, out / f"{part}_{'_'.join(names)}.png", title=title, metric=metric)
    table = pd.DataFrame(rows)
    table.to_csv(out / f"{part}_summary.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)

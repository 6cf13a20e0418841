"""REValueD against DecQN where ever more choices are made at once (`value_based/revalued.py`, `decoupled_dqn.py`).

The toy process of `envs/factored.py` with 2, 5, 10 and 20 factors of 3 choices and 5 states. A right choice takes its
factor on to the next state, a wrong one back to the first; what is paid is the share of right choices, plus noise that
is larger than what one choice in four earns. So the more factors, the less of the reward is any one's. Every method has
the same network, step size, exploration, target network and number of steps; DecQN has one critic and double
Q-learning, REValueD five critics, with and without its regulariser.

`results.csv` has a row per number of factors, method, seed and time: environment steps, the share of `right` choices of
the evaluation policy at states drawn evenly, the mean `value` that it predicts there, and the `best` value, that of
choices that are always right. `summary.csv`: interquartile means over seeds with 95 % intervals at the end.

    python experiments/factored_actions/run.py
"""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.records import plotting, recording, statistics

HERE = Path(__file__).parent
STATES_OF_A_FACTOR = 5
SHARED = {
    "num_envs": 8, "updates_per_iteration": 2, "warmup_steps": 1_000, "replay_capacity": 20_000, "batch_size": 64,
    "discount": 0.95, "num_steps": 3, "learning_rate": 1e-3, "target_period": 1, "hidden": (48, 48),
    "epsilon_start": 1.0, "epsilon_end": 0.1, "exploration_steps": 4_000,
}  # fmt: skip
METHODS = {
    "DecQN": ("decoupled_dqn", {}),
    "REValueD": ("revalued", {"num_critics": 5}),
    "REValueD, no regulariser": ("revalued", {"num_critics": 5, "regularisation": 0.0}),
}
STATES = 1_000  # at which choices are looked at


def main(
    factors: tuple[int, ...] = (2, 5, 10, 20), methods: tuple[str, ...] = tuple(METHODS), num_seeds: int = 5,
    total_steps: int = 7_000, evaluations: int = 6, sparse: bool = False, reward_noise: float = 0.3,
    end_probability: float = 0.05, polyak: float = 0.02, out: Path = HERE,
) -> None:  # fmt: skip
    """Train everything and write the tables and the figure.

    Args:
        factors: how many choices are made at once.
        methods: which methods.
        num_seeds: seeds per method, trained together.
        total_steps: environment steps of each, warm-up included.
        evaluations: how often each is looked at.
        sparse: pay for right choices in the last state alone.
        reward_noise: standard deviation of what is added to rewards.
        end_probability: with which a step is the last one of its episode.
        polyak: how far target networks follow at every update.
        out: folder to write to.
    """
    cli.spread_over_cores()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    process = {
        "states": STATES_OF_A_FACTOR, "sparse": sparse, "end_probability": end_probability,
        "reward_noise": reward_noise,
    }  # fmt: skip
    shared = SHARED | {"polyak": polyak}
    rows, seconds = [], {}
    for number in factors:
        for method in methods:
            before = time.perf_counter()
            rows += trained(process | {"factors": number}, method, shared, num_seeds, total_steps, evaluations)
            seconds[f"{method}, {number}"] = round(time.perf_counter() - before, 1)
            last = pd.DataFrame(rows[-num_seeds:])
            print(f"{number} factors, {method}: {last.right.mean():.3f} right", seconds, flush=True)
            pd.DataFrame(rows).to_csv(out / "results.csv", index=False)
    results = pd.DataFrame(rows)
    summary = summarise(results)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    draw(results, out / "figure.png")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "seconds_each": seconds, "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(),
        "process": process, "settings": shared, "methods": METHODS,
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


def best_values(states: int, sparse: bool, end_probability: float, discount: float) -> np.ndarray:
    """Discounted returns of one factor whose choices are always right, by its state, `[states]`, time limits aside."""
    onwards = np.roll(np.eye(states), 1, axis=1)
    paid = (np.arange(states) == states - 1) if sparse else np.ones(states)
    return np.linalg.solve(np.eye(states) - discount * (1 - end_probability) * onwards, paid)


def trained(process: dict, method: str, shared: dict, num_seeds: int, total_steps: int, evaluations: int) -> list[dict]:
    """Rows of `results.csv` of all seeds, the last time last."""
    from jaxrl_dist import envs

    (name, own), factors = METHODS[method], process["factors"]
    module = cli.find_algorithm(name)
    env, params = envs.make("factored", **process)
    agent = module.make_agent(module.Config(**shared | own), env, params)
    places = jax.random.randint(jax.random.key(7), (STATES, factors), 0, env.states)
    observation = jax.nn.one_hot(places, env.states).reshape(STATES, -1)
    best = best_values(env.states, env.sparse, process["end_probability"], shared["discount"])[places].mean()

    def look(state):
        action, _ = agent.policy.act(state, observation, (), jax.random.key(0))
        value = agent.claim.law(state, observation, action).atoms.mean()
        return (action == env.right(places)).mean(), value

    def advance(state, iterations):
        state = jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], state)
        return state, look(state)

    advance = jax.jit(jax.vmap(advance, in_axes=(0, None)), donate_argnums=0)
    state = jax.jit(jax.vmap(agent.init))(jax.random.split(jax.random.key(0), num_seeds))
    done, rows = 0, []
    for boundary in np.round(np.linspace(0, agent.clock.iterations(total_steps), evaluations + 1))[1:].astype(int):
        state, (right, value) = advance(state, jnp.int32(boundary - done))
        done = int(boundary)
        rows += [
            {
                "factors": factors, "method": method, "seed": seed, "env_steps": agent.clock.env_steps_at(done),
                "right": round(float(right[seed]), 5), "value": round(float(value[seed]), 5),
                "best": round(float(best), 5),
            }
            for seed in range(num_seeds)
        ]  # fmt: skip
    return rows


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Per number of factors and method: what is right at the end, over the whole of training, and how far values are
    above the best possible ones at the end."""
    rows = []
    for (factors, method), group in results.groupby(["factors", "method"], sort=False):
        last = group[group.env_steps == group.env_steps.max()]
        row = {"factors": factors, "method": method, "seeds": len(last), "env_steps": last.env_steps.iloc[0]}
        measures = {
            "right": last.right, "right_throughout": group.groupby("seed").right.mean(),
            "too_high": last.value - last.best,
        }  # fmt: skip
        for name, values in measures.items():
            low, high = statistics.bootstrap_interval(values.to_numpy())
            iqm = statistics.interquartile_mean(values.to_numpy())
            row |= {name: round(iqm, 4), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(results: pd.DataFrame, path: Path) -> None:
    """Share of right choices against steps, one panel per number of factors."""
    numbers = results.factors.unique()
    figure = plotting._figure(width=3.1 * len(numbers), height=3.4)
    panels = np.atleast_1d(figure.subplots(1, len(numbers), sharey=True))
    for axes, number in zip(panels, numbers, strict=True):
        plotting._style(axes)
        of_number = results[results.factors == number]
        for index, (method, group) in enumerate(of_number.groupby("method", sort=False)):
            table = group.pivot(index="env_steps", columns="seed", values="right")
            centre = [statistics.interquartile_mean(row) for row in table.to_numpy()]
            low, high = np.transpose([statistics.bootstrap_interval(row) for row in table.to_numpy()])
            axes.fill_between(table.index, low, high, color=plotting.COLOURS[index], alpha=0.15, linewidth=0)
            axes.plot(table.index, centre, color=plotting.COLOURS[index], linewidth=2, label=method)
        axes.set_xlabel("environment steps")
        axes.set_title(f"{number} factors", loc="left", fontsize=11, fontweight="bold", color=plotting.INK)
    panels[0].set_ylabel("share of right choices")
    panels[0].axhline(1 / 3, color=plotting.FAINT, linewidth=0.8, linestyle=":")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left")
    plotting._saved(figure, path)


if __name__ == "__main__":
    tyro.cli(main)

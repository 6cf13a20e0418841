"""What does a longer chain cost, and what does it gain? i-DQN of K networks.

Speed: an iteration on CartPole-v1 with the preset's sizes (8 environment steps, an update on 128 rows, hidden layers
128-128) for K = 1, 2, 3, 5 and 10 and for DQN, in turn within each round. `speed.csv` has a row per chain length:
updates per second, and seconds by those of K = 1 in the same round (median, lowest, highest).

Returns: CartPole-v1 within 50,000 steps for K = 1, 3 and 5. `returns.csv` has a row per chain length, seed and time:
the return of the first network, which evaluation takes. `networks.csv`: that of each network at the end. `summary.csv`:
interquartile means over seeds of the mean over the last three evaluations, with 95 % bootstrap intervals.

    python experiments/iterated/run.py
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from jaxrl_dist import cli
from jaxrl_dist.algorithms.value_based import dqn, iterated_dqn
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.records.statistics import bootstrap_interval, interquartile_mean
from jaxrl_dist.running import evaluation, problem, training

HERE = Path(__file__).parent
ENV_ID = "CartPole-v1"
SPEED_LENGTHS, RETURN_LENGTHS = (1, 2, 3, 5, 10), (1, 3, 5)
# Smaller than the preset, with an update every four steps, for a quick answer.
SMALLER = {
    "updates_per_iteration": 2, "batch_size": 64, "hidden": (64, 64), "target_period": 250, "sync_period": 10,
    "exploration_steps": 15_000, "replay_capacity": 50_000,
}  # fmt: skip


def preset(module, **settings):
    """The algorithm's configuration for the environment."""
    return module.Config(**(problem.split_preset(module.PRESETS[ENV_ID])[1] | settings))


# -- speed ------------------------------------------------------------------------------------------------------------


def loop_of(module, config, env, env_params):
    """`run(iterations)` -> seconds, compiled and warm."""
    agent = module.make_agent(config, env, env_params)
    advance = jax.jit(lambda state, n: jax.lax.fori_loop(0, n, lambda _, state: agent.step(state)[0], state))
    state = jax.block_until_ready(jax.jit(agent.init)(jax.random.key(0)))
    jax.block_until_ready(advance(state, 20))

    def run(iterations: int) -> float:
        started = time.perf_counter()
        jax.block_until_ready(advance(state, iterations))
        return time.perf_counter() - started

    return run


def speed_rows(env, env_params, rounds: int, seconds: float) -> list[dict]:
    """Rows of `speed.csv`."""
    sides = {"DQN": loop_of(dqn, preset(dqn, replay_capacity=20_000), env, env_params)}
    for length in SPEED_LENGTHS:
        config = preset(iterated_dqn, chain_length=length, replay_capacity=20_000)
        sides[f"K = {length}"] = loop_of(iterated_dqn, config, env, env_params)
    iterations = {side: max(1, round(seconds / run(50) * 50)) for side, run in sides.items()}
    each = {side: [] for side in sides}
    for number in range(rounds):  # who begins changes
        for side in sorted(sides, reverse=bool(number % 2)):
            each[side].append(sides[side](iterations[side]) / iterations[side])
    rows = []
    for side, of_rounds in each.items():
        ratios = [own / alone for own, alone in zip(of_rounds, each["K = 1"], strict=True)]
        rows.append({
            "chain": side, "rounds": rounds, "updates_per_second": round(1 / statistics.median(of_rounds)),
            "seconds_by_one": round(statistics.median(ratios), 2), "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
        })  # fmt: skip
    return rows


# -- returns ----------------------------------------------------------------------------------------------------------


def return_rows(env, env_params, length: int, num_seeds: int, total_steps: int, evaluations: int) -> tuple[list, list]:
    """Rows of `returns.csv` and `networks.csv`."""
    config = preset(iterated_dqn, **SMALLER, chain_length=length)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    train = training.make_train(
        iterated_dqn.make_agent, config, env, env_params, total_steps=total_steps, evaluations=evaluations,
        eval_episodes=20,
    )  # fmt: skip
    agent = iterated_dqn.make_agent(config, env, env_params)

    def returns_of(state, number, key):
        """Of network `number`, put into the place of the first."""
        network = state.learner.network
        chosen = jax.tree.map(lambda x: x[number][None], network.parameters)
        state = state._replace(learner=state.learner._replace(network=network._replace(parameters=chosen)))
        found = evaluation.evaluate(agent, env, env_params, state, key, episodes=20, max_steps=500)
        return found.episode_return.mean()

    def one(key):
        state, history = train(key)
        by_network = jax.lax.map(lambda number: returns_of(state, number, jax.random.key(1)), jnp.arange(length))
        return history["env_steps"], history["evaluation_return"].mean(-1), by_network

    env_steps, returns, by_network = (np.asarray(x) for x in jax.jit(jax.vmap(one))(keys))
    of_time = [
        {"chain_length": length, "seed": seed, "env_steps": int(steps), "evaluation_return": round(float(found), 2)}
        for seed in range(num_seeds) for steps, found in zip(env_steps[seed], returns[seed], strict=True)
    ]  # fmt: skip
    of_networks = [
        {"chain_length": length, "seed": seed, "network": k + 1, "evaluation_return": round(float(found), 2)}
        for seed in range(num_seeds) for k, found in enumerate(by_network[seed])
    ]  # fmt: skip
    return of_time, of_networks


def summarise(returns: pd.DataFrame) -> pd.DataFrame:
    """Of each seed the mean of its last three evaluations."""
    rows = []
    for length, group in returns.groupby("chain_length"):
        last = group.sort_values("env_steps").groupby("seed").evaluation_return.apply(lambda x: x.tail(3).mean())
        low, high = bootstrap_interval(last.to_numpy())
        rows.append({
            "chain_length": length, "seeds": len(last), "env_steps": group.env_steps.max(),
            "evaluation_return": round(interquartile_mean(last.to_numpy()), 1), "low": round(low, 1),
            "high": round(high, 1), "lowest_seed": round(last.min(), 1), "highest_seed": round(last.max(), 1),
        })  # fmt: skip
    return pd.DataFrame(rows)


def draw(speed: pd.DataFrame, returns: pd.DataFrame, path: Path) -> None:
    """Cost of a chain, and its learning curves."""
    figure = plotting._figure(width=9.6, height=3.9)
    cost, curves = figure.subplots(1, 2)
    plotting._style(cost)
    chains = speed[speed.chain != "DQN"]
    lengths = chains.chain.str.removeprefix("K = ").astype(int)
    cost.plot(lengths, chains.seconds_by_one, "o-", color=plotting.COLOURS[0], linewidth=2.2)
    cost.fill_between(lengths, chains.lowest, chains.highest, color=plotting.COLOURS[0], alpha=0.2, linewidth=0)
    cost.plot(lengths, lengths, color=plotting.FAINT, linewidth=1, linestyle="--")
    cost.set_xlabel("K, networks in the chain (dashed: K times as long)")
    cost.set_ylabel("seconds by those of K = 1")
    plotting._title(cost, "Time of an iteration", "8 steps and an update; median of rounds, band: all rounds")
    plotting._style(curves)
    for number, (length, group) in enumerate(returns.groupby("chain_length")):
        by_time = group.groupby("env_steps").evaluation_return.apply(lambda x: interquartile_mean(x.to_numpy()))
        bands = group.groupby("env_steps").evaluation_return.apply(lambda x: bootstrap_interval(x.to_numpy()))
        colour = plotting.COLOURS[number]
        curves.plot(by_time.index, by_time, color=colour, linewidth=2.2, label=f"K = {length}")
        curves.fill_between(by_time.index, bands.str[0], bands.str[1], color=colour, alpha=0.15, linewidth=0)
    curves.set_xlabel("environment steps")
    curves.set_ylabel("return")
    curves.legend(frameon=False)
    plotting._title(curves, ENV_ID, f"{returns.seed.nunique()} seeds, interquartile means with 95 % intervals")
    plotting._saved(figure, path)


def main(
    rounds: int = 9, seconds: float = 0.3, num_seeds: int = 5, total_steps: int = 50_000, evaluations: int = 10,
    out: Path = HERE,
) -> None:  # fmt: skip
    """Measure, train and write the tables and the figure.

    Args:
        rounds: measurements of each chain.
        seconds: length of one measurement.
        num_seeds: seeds of each chain that is trained, together.
        total_steps: environment steps of each.
        evaluations: how often each is looked at.
        out: folder to write to.
    """
    cli.spread_over_cores()
    from jaxrl_dist import envs  # after the line above: importing gymnax starts JAX

    started, took = time.perf_counter(), {}
    out.mkdir(parents=True, exist_ok=True)
    env, env_params = envs.make(ENV_ID)
    speed = pd.DataFrame(speed_rows(env, env_params, rounds, seconds))
    speed.to_csv(out / "speed.csv", index=False)
    print(speed.to_string(index=False), flush=True)
    took["speed"] = round(time.perf_counter() - started)
    returns, of_networks = [], []
    for length in RETURN_LENGTHS:
        before = time.perf_counter()
        of_time, at_the_end = return_rows(env, env_params, length, num_seeds, total_steps, evaluations)
        returns, of_networks = returns + of_time, of_networks + at_the_end
        took[f"K = {length}"] = round(time.perf_counter() - before)
    returns, of_networks = pd.DataFrame(returns), pd.DataFrame(of_networks)
    returns.to_csv(out / "returns.csv", index=False)
    of_networks.to_csv(out / "networks.csv", index=False)
    summary = summarise(returns)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    print(of_networks.groupby(["chain_length", "network"]).evaluation_return.agg(["mean", "min", "max"]).round(1))
    draw(speed, returns, out / "figure.png")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started), "seconds_each": took,
        "date": time.strftime("%Y-%m-%d"), "seeds": num_seeds, "versions": recording.versions(),
        "settings": dataclasses.asdict(preset(iterated_dqn, **SMALLER)),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

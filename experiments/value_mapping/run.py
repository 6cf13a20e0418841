"""What a logarithm is good for: LogDQN and DQN with low discounts and small rewards, and why it must average first.

Chain: 20 states in a row, two actions, left and right; the step out of the right end earns the one reward. Every start
is equally likely, and all actions are drawn at random, so that nothing has to be found: the question is whether the
network can tell the values of right and left apart, a factor gamma^2, where they are tiny. `chain.csv` has a row per
algorithm, gamma, reward and seed: the share of states whose greedy action is right, and the median over states of
|Q(s, right) - truth| / truth.

Bias: one state whose samples are 0.1 or 1.9. A step on the logarithm itself goes to the geometric mean, 0.436; one
that is averaged first, by a rate, and then mapped, to the mean, 1. `bias.csv`: the mean of Q once it has settled, by
mapping, rate and step; no networks, the algorithm's own functions.

    python experiments/value_mapping/run.py
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from flax import struct
from gymnax.environments import environment, spaces

from jaxrl_dist.algorithms.value_based import dqn, log_dqn
from jaxrl_dist.records import plotting, recording
from jaxrl_dist.records.statistics import bootstrap_interval, interquartile_mean

HERE = Path(__file__).parent
STATES = 20
GAMMAS, REWARDS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99), (1e-1, 1e-2, 1e-3, 1e-4)
PROBLEMS = [(gamma, 1.0) for gamma in GAMMAS] + [(0.9, reward) for reward in REWARDS]
ALGORITHMS = {"DQN": (dqn, {}), "LogDQN": (log_dqn, {"averaging_rate": 0.5, "mapping": "log"})}
# All actions random; Adam's epsilon so small that tiny gradients take steps as large as others.
SHARED = {
    "num_envs": 8, "updates_per_iteration": 4, "warmup_steps": 2_000, "replay_capacity": 8_000, "batch_size": 32,
    "target_period": 40, "learning_rate": 1e-3, "adam_epsilon": 1e-12, "epsilon_start": 1.0, "epsilon_end": 1.0,
    "hidden": (64,),
}  # fmt: skip
RATES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)

# -- the chain --------------------------------------------------------------------------------------------------------


@struct.dataclass
class ChainState(environment.EnvState):
    position: jax.Array
    time: int


@struct.dataclass
class ChainParams(environment.EnvParams):
    reward: float = 1.0
    max_steps_in_episode: int = 200


class Chain(environment.Environment):
    """20 places seen as one-hot vectors; action 1 leads to the right, 0 to the left; a step out of the right end is the
    end and earns the reward."""

    @property
    def default_params(self) -> ChainParams:
        return ChainParams()

    def step_env(self, key, state, action, params):
        position = state.position + 2 * action - 1
        ends = position == STATES
        state = ChainState(time=state.time + 1, position=jnp.clip(position, 0, STATES - 1))
        return self.observed(state), state, jnp.where(ends, params.reward, 0.0), ends, {}

    def reset_env(self, key, params):
        state = ChainState(time=0, position=jax.random.randint(key, (), 0, STATES))
        return self.observed(state), state

    def observed(self, state):
        return jax.nn.one_hot(state.position, STATES)

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (STATES,))


def true_values(gamma: float, reward: float) -> np.ndarray:
    """Of going right, by state."""
    return reward * gamma ** np.arange(STATES - 1, -1, -1.0)


def learned_values(algorithm: str, updates: int, num_seeds: int) -> np.ndarray:
    """Action values of all problems after so many updates: `[problems, seeds, states, actions]`."""
    module, own = ALGORITHMS[algorithm]
    env, gammas, rewards = Chain(), *np.array(PROBLEMS, np.float32).T
    floor = {"smallest_value": 0.1 * rewards * gammas ** (STATES - 1)} if algorithm == "LogDQN" else {}

    def learn(gamma, reward, floor, key):
        config = dataclasses.replace(module.Config(), **SHARED, **own, discount=gamma, **floor)
        agent = module.make_agent(config, env, ChainParams(reward=reward))
        iterations = updates // config.updates_per_iteration
        state = jax.lax.fori_loop(0, iterations, lambda _, state: agent.step(state)[0], agent.init(key))
        each = [agent.claim.law(state, jnp.eye(STATES), jnp.full(STATES, action)).atoms[:, 0] for action in range(2)]
        return jnp.stack(each, axis=-1)

    of_seeds = jax.vmap(learn, (None, None, None, 0))
    keys = jax.random.split(jax.random.key(0), num_seeds)
    return np.asarray(jax.jit(jax.vmap(of_seeds, (0, 0, 0, None)))(gammas, rewards, floor, keys))


def chain_rows(algorithm: str, updates: int, num_seeds: int) -> list[dict]:
    """Rows of `chain.csv`."""
    rows = []
    for (gamma, reward), of_seeds in zip(PROBLEMS, learned_values(algorithm, updates, num_seeds), strict=True):
        for seed, values in enumerate(of_seeds):
            error = np.abs(values[:, 1] / true_values(gamma, reward) - 1)
            rows.append({
                "algorithm": algorithm, "gamma": gamma, "reward": reward, "seed": seed, "updates": updates,
                "share_right": (values[:, 1] > values[:, 0]).mean(), "relative_error": float(f"{np.median(error):.3g}"),
            })  # fmt: skip
    return rows


# -- the bias ---------------------------------------------------------------------------------------------------------


def settled_value(mapping: str, rate: float, step: float, chains: int, steps: int) -> tuple[float, float]:
    """Mean of Q over chains and the second half of the steps, and the standard error of that over chains."""
    shape = log_dqn.Config().map_scale, log_dqn.Config().map_offset

    def one(outputs, key):
        values = log_dqn.unmapped(mapping, outputs, *shape)
        samples = jnp.where(jax.random.bernoulli(key, 0.5, outputs.shape), 0.1, 1.9)
        target = log_dqn.mapped(mapping, log_dqn.averaged_values(values, samples, rate), *shape, 0.01)
        outputs = outputs - step * jax.grad(lambda x: chains * log_dqn.loss_of(x, target, 1.0))(outputs)
        return outputs, log_dqn.unmapped(mapping, outputs, *shape)[:, 0]

    keys = jax.random.split(jax.random.key(0), steps)
    values = jax.jit(lambda: jax.lax.scan(one, jnp.zeros((chains, 1)), keys)[1])()
    of_chains = np.asarray(values[steps // 2 :].mean(0), np.float64)
    return of_chains.mean(), of_chains.std(ddof=1) / np.sqrt(chains)


def bias_rows(chains: int, steps: int) -> list[dict]:
    """Rows of `bias.csv`."""
    rows = []
    for mapping in ("log", "loglin"):
        for rate, step in ((1.0, 0.04), *((rate, 0.5) for rate in RATES)):
            value, error = settled_value(mapping, rate, step, chains, steps)
            rows.append({
                "mapping": mapping, "averaging_rate": rate, "step": step, "value": round(value, 4),
                "standard_error": float(f"{error:.1g}"), "mean": 1.0, "geometric_mean": 0.4359,
            })  # fmt: skip
    return rows


# -- results ----------------------------------------------------------------------------------------------------------


def summarise(chain: pd.DataFrame) -> pd.DataFrame:
    """Interquartile means over seeds, with the 95 % interval of the share of right actions."""
    rows = []
    for (algorithm, gamma, reward), group in chain.groupby(["algorithm", "gamma", "reward"], sort=False):
        low, high = bootstrap_interval(group.share_right)
        rows.append({
            "algorithm": algorithm, "gamma": gamma, "reward": reward, "seeds": len(group),
            "share_right": round(interquartile_mean(group.share_right), 3), "low": round(low, 3),
            "high": round(high, 3), "relative_error": float(f"{interquartile_mean(group.relative_error):.2g}"),
        })  # fmt: skip
    return pd.DataFrame(rows)


def draw(summary: pd.DataFrame, bias: pd.DataFrame, path: Path) -> None:
    """Right actions against gamma and against the reward, and the bias against the rate."""
    figure = plotting._figure(width=11.5, height=3.9)
    by_gamma, by_reward, of_bias = figure.subplots(1, 3)
    for axes, column, rows in (
        (by_gamma, "gamma", summary[summary.reward == 1]), (by_reward, "reward", summary[summary.gamma == 0.9]),
    ):  # fmt: skip
        plotting._style(axes)
        for number, (algorithm, group) in enumerate(rows.groupby("algorithm", sort=False)):
            group, colour = group.sort_values(column), plotting.COLOURS[number]
            axes.plot(group[column], group.share_right, "o-", color=colour, linewidth=2.2, label=algorithm)
            axes.fill_between(group[column], group.low, group.high, color=colour, alpha=0.2, linewidth=0)
        axes.set_ylim(0.0, 1.04)
        axes.set_ylabel("share of states with the right action")
    by_gamma.set_xlabel("gamma, reward 1")
    by_reward.set_xlabel("reward, gamma 0.9")
    by_reward.set_xscale("log")
    by_gamma.legend(frameon=False)
    plotting._title(by_gamma, "Chain of 20 states", f"{summary.seeds.max()} seeds, interquartile means")
    plotting._style(of_bias)
    for number, (mapping, group) in enumerate(bias[bias.step == 0.5].groupby("mapping", sort=False)):
        group = group.sort_values("averaging_rate")
        of_bias.plot(group.averaging_rate, group.value, "o-", color=plotting.COLOURS[2 + number], label=mapping)
    of_bias.axhline(1.0, color=plotting.FAINT, linewidth=1, linestyle="--")
    of_bias.axhline(0.4359, color=plotting.FAINT, linewidth=1, linestyle=":")
    of_bias.set_xscale("log")
    of_bias.set_xlabel("rate of averaging; step of the network 0.5")
    of_bias.set_ylabel("value learned")
    of_bias.legend(frameon=False)
    plotting._title(of_bias, "Samples 0.1 or 1.9", "dashed: their mean; dotted: their geometric mean")
    plotting._saved(figure, path)


def main(
    updates: int = 12_000, num_seeds: int = 5, chains: int = 1_000, steps: int = 4_000, out: Path = HERE
) -> None:  # fmt: skip
    """Learn everything and write the tables and the figure.

    Args:
        updates: gradient updates on each chain.
        num_seeds: seeds of each chain, trained together.
        chains: independent repetitions of the state with random samples.
        steps: updates of each of these.
        out: folder to write to.
    """
    started, seconds, rows = time.perf_counter(), {}, []
    out.mkdir(parents=True, exist_ok=True)
    bias = pd.DataFrame(bias_rows(chains, steps))
    bias.to_csv(out / "bias.csv", index=False)
    print(bias.to_string(index=False), flush=True)
    for algorithm in ALGORITHMS:
        before = time.perf_counter()
        rows += chain_rows(algorithm, updates, num_seeds)
        seconds[algorithm] = round(time.perf_counter() - before)
    chain = pd.DataFrame(rows)
    chain.to_csv(out / "chain.csv", index=False)
    summary = summarise(chain)
    summary.to_csv(out / "summary.csv", index=False)
    print(summary.to_string(index=False))
    draw(summary, bias, out / "figure.png")
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started), "seconds_each": seconds,
        "date": time.strftime("%Y-%m-%d"), "seeds": num_seeds, "versions": recording.versions(),
        "settings": {algorithm: SHARED | own for algorithm, (_, own) in ALGORITHMS.items()},
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)

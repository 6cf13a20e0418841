"""What goes together: does MD3QN learn the joint law of several returns, and what would marginals alone give?

"Distributional Reinforcement Learning for Multi-Dimensional Reward Functions" (arXiv 2110.13578) learns particles in
R^K, one number for each of K rewards. Here on processes whose joint laws are known exactly (`envs/multi_reward.py`),
from their start, under the uniform random policy:

    coin        a fair coin pays one or the other, for ever, discount 1/2: on a line, correlation -1
    parity      two coins and whether they differ: every two returns independent, all three not
    exclusive   the paper's maze with one patch or the other on a way: negatively correlated
    inclusive   the paper's maze with both patches on a way or none: positively correlated

The measure is the energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| to the exact law. Beside it stand `independent`,
the exact marginals put together as if they were independent (the best that can be said by who knows each component
alone) and `draws`, how far as many independent draws from the exact law as there are particles are from it on average.

Then control: in `branches` the left pays the first component 3 and costs the second 5, the right pays the first 1. Who
looks at one component goes left (-2), who looks at their sum goes right (1).

    results.csv   per process and seed: energy distance, correlation of the first two returns, deviation of the sum, and
                  the chance that every return is at least its exact mean
    summary.csv   per process: their means with 95 % bootstrap intervals over seeds, beside the exact numbers and those
                  of independent components
    control.csv   per seed and evaluation: return, and its two components

    python experiments/joint_laws/run.py
"""

import dataclasses
import datetime
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist import envs
from jaxrl_dist.algorithms.value_based import md3qn
from jaxrl_dist.distributional import joint
from jaxrl_dist.distributional import law as laws
from jaxrl_dist.distributional.joint import JointLaw
from jaxrl_dist.envs import multi_reward
from jaxrl_dist.records.plotting import COLOURS, FAINT, GRID, INK
from jaxrl_dist.records.recording import command_line, versions
from jaxrl_dist.records.statistics import bootstrap_interval
from jaxrl_dist.running import problem, training

# Steps after which the exact law is taken as complete: what a coin still pays then is below 2^-9; mazes have ended.
PROCESSES = {"coin": 10, "parity": 3, "exclusive": 400, "inclusive": 400}
CONTROL = "branches"
BEST, ONE_SIDED = 1.0, -2.0
"""Returns in it of who goes right, and of who goes left."""
MEASURES = ("energy_distance", "correlation", "deviation_of_sum", "all_above_mean")


@dataclass(frozen=True)
class Arguments:
    seeds: int = 6
    """Independent runs of everything."""
    steps: int = 12_000
    """Environment steps of each, an update for every four."""
    evaluations: int = 10
    """Of the control task."""
    out: Path = Path(__file__).parent
    """Folder that receives results.csv, summary.csv, control.csv, run.json and figure.png."""


# -- learned and exact ------------------------------------------------------------------------------------------------


def train(name: str, arguments: Arguments, evaluations: int = 1) -> tuple[md3qn.Agent, object, dict]:
    """An agent with the preset of a process, and its trained states and history, `[seeds, ...]`."""
    env, params = envs.make(f"multi_reward/{name}")
    settings = problem.split_preset(md3qn.PRESETS[f"multi_reward/{name}"])[1]
    config = dataclasses.replace(md3qn.Config(), **settings)
    run = training.make_train(
        md3qn.make_agent, config, env, params, total_steps=arguments.steps, evaluations=evaluations, eval_episodes=40
    )
    states, history = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), arguments.seeds))
    return md3qn.make_agent(config, env, params), states, jax.device_get(history)


def learned_law(agent: md3qn.Agent, state: object, env: multi_reward.MultiReward) -> JointLaw:
    """The law from the start: the particles of all actions, which the uniform policy takes alike."""
    observation = jnp.broadcast_to(env.images[:1], (env.num_actions, *env.images.shape[1:]))
    particles = agent.claim.joint(state, observation, jnp.arange(env.num_actions, dtype=jnp.int32))
    return joint.equally_weighted(np.asarray(particles).reshape(-1, env.num_rewards))


def exact_law(name: str) -> JointLaw:
    """The same exactly, with the discount of the preset."""
    env, params = envs.make(f"multi_reward/{name}")
    uniform = np.full((env.num_states, env.num_actions), 1 / env.num_actions)
    discount = md3qn.PRESETS[f"multi_reward/{name}"]["discount"]
    return multi_reward.joint_law(params, uniform, discount, 0, steps=PROCESSES[name])


def numbers(law: JointLaw, exact: JointLaw) -> dict[str, float]:
    """`MEASURES` of a law."""
    middle = np.asarray(joint.mean(exact)) - 1e-4  # atoms that are the mean count, whatever they are rounded to
    return {
        "energy_distance": joint.energy_distance(law, exact),
        "correlation": float(joint.correlation(law)[0, 1]),
        "deviation_of_sum": float(np.sqrt(laws.variance(joint.total(law)))),
        "all_above_mean": float(joint.probability_above(law, middle)),
    }


def draws_apart(exact: JointLaw, count: int) -> float:
    """The mean energy distance of `count` independent draws to the law they are from: E|X - X'| / count."""
    still = JointLaw(np.asarray(exact.atoms)[:1], np.ones(1))
    # 2 E|X - x| - E|X - X'| for a certain x, averaged over x by mass, is E|X - X'|.
    apart = [
        mass * joint.energy_distance(exact, still._replace(atoms=atom[None]))
        for atom, mass in zip(np.asarray(exact.atoms), np.asarray(exact.masses), strict=True)
    ]
    return float(np.sum(apart)) / count


def coarse(exact: JointLaw, most: int = 128) -> JointLaw:
    """The law of a coin with so many equally likely atoms at most, for putting its marginals together."""
    if len(exact.masses) <= most:
        return exact
    atoms = np.asarray(exact.atoms).reshape(most, -1, exact.atoms.shape[-1])
    assert np.ptp(exact.masses) < 1e-12, "only neighbours of the same mass can be averaged"
    return JointLaw(atoms.mean(1), np.full(most, 1 / most))


# -- results ----------------------------------------------------------------------------------------------------------


def summarise(results: pd.DataFrame, references: pd.DataFrame) -> pd.DataFrame:
    """Per process and measure: mean over seeds with its interval, beside the exact law and independent components."""
    rows = []
    for name, table in results.groupby("process", sort=False):
        for measure in MEASURES:
            values = table[measure].to_numpy()
            low, high = bootstrap_interval(values, statistic=np.mean) if len(values) > 1 else (np.nan, np.nan)
            reference = references[references.process == name].set_index("law")[measure]
            rows.append({
                "process": name, "measure": measure, "learned": values.mean(), "low": low, "high": high,
                "exact": reference["exact"], "independent": reference["independent"],
                "draws": reference.get("draws", np.nan),
            })  # fmt: skip
    return pd.DataFrame(rows)


def check(summary: pd.DataFrame, control: pd.DataFrame) -> None:
    """What must hold if the joint law is learned; AssertionError says what does not."""
    rows = summary.set_index(["process", "measure"])
    for name in PROCESSES:
        row = rows.loc[name, "energy_distance"]
        assert row.high < 0.7 * row.independent, f"{name}: {row.learned} is no nearer than independent components"
        row = rows.loc[name, "correlation"]
        assert abs(row.learned - row.exact) < 0.15, f"{name}: correlation {row.learned}, and not {row.exact}"
        row = rows.loc[name, "deviation_of_sum"]
        assert abs(row.learned - row.exact) < 0.15, f"{name}: the sum deviates by {row.learned}, and not {row.exact}"
    last = control.groupby("seed").episode_return.apply(lambda returns: returns.iloc[-3:].median())
    assert (last > 0.9 * BEST).all(), f"{CONTROL}: returns are {last.tolist()}"


def draw(learned: dict[str, JointLaw], exact: dict, results, summary, control: pd.DataFrame, path: Path) -> None:
    """Learned particles among the exact atoms, energy distances, and returns in the control task."""
    figure = Figure(figsize=(16, 6.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 * len(PROCESSES))
    rows = summary.set_index(["process", "measure"])
    for column, name in enumerate(PROCESSES):
        axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
        law, atoms, masses = learned[name], np.asarray(exact[name].atoms), np.asarray(exact[name].masses)
        axes.scatter(*atoms.T[:2], s=20 + 1500 * masses, color=COLOURS[0], alpha=0.3, linewidths=0, label="exact")
        axes.scatter(*np.asarray(law.atoms).T[:2], s=12, color=COLOURS[1], linewidths=0, label="learned, seed 0")
        row = rows.loc[name, "correlation"]
        axes.set_title(f"{name}: correlation {row.learned:.2f}, exactly {row.exact:.2f}", loc="left", fontsize=10)
        axes.set(xlabel="return of the first reward", ylabel="of the second" if column == 0 else None)
        _style(axes)
    figure.axes[0].legend(frameon=False, fontsize=8)

    axes = figure.add_subplot(grid[1, : len(PROCESSES)])
    for place, name in enumerate(PROCESSES):
        row, seeds = rows.loc[name, "energy_distance"], results[results.process == name].energy_distance
        axes.plot([place - 0.1] * len(seeds), seeds, "o", color=COLOURS[1], markersize=5)
        axes.plot(place + 0.05, row.draws, "_", color=INK, markersize=14, markeredgewidth=2)
        axes.plot(place + 0.2, row.independent, "D", color=COLOURS[2], markersize=6)
    for marker, colour, label in (
        ("o", COLOURS[1], "learned, a dot per seed"), ("_", INK, "as many independent draws"),
        ("D", COLOURS[2], "independent components, exact marginals"),
    ):  # fmt: skip
        axes.plot([], [], marker, color=colour, label=label, markeredgewidth=2 if marker == "_" else 1)
    axes.set(xticks=range(len(PROCESSES)), xticklabels=list(PROCESSES), yscale="log", ylabel="energy distance")
    axes.set_title("how far from the exact joint law", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    _style(axes)

    axes = figure.add_subplot(grid[1, len(PROCESSES) :])
    for _, table in control.groupby("seed"):
        axes.plot(table.env_steps, table.episode_return, color=COLOURS[1], linewidth=1.2, alpha=0.8)
    for value, words in ((BEST, "right: the best sum"), (ONE_SIDED, "left: the best first component")):
        axes.axhline(value, color=INK, linewidth=0.8, linestyle="--")
        axes.text(control.env_steps.max(), value + 0.06, words, ha="right", fontsize=8, color=FAINT)
    axes.set(xlabel="environment steps", ylabel="return", ylim=(-2.4, 1.6))
    axes.set_title(f"control in {CONTROL}, a line per seed", loc="left", fontsize=10)
    _style(axes)
    figure.savefig(path, dpi=130)


def _style(axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


# -- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Arguments) -> None:
    """Learn, compare, write tables and picture, and check what the paper claims."""
    started, rows, references = time.perf_counter(), [], []
    learned, exact = {}, {}
    for name in PROCESSES:
        env = envs.make(f"multi_reward/{name}")[0]
        exact[name] = exact_law(name)
        alone = joint.independent(coarse(exact[name]))
        references.append({"process": name, "law": "exact"} | numbers(exact[name], exact[name]))
        references.append({"process": name, "law": "independent"} | numbers(alone, exact[name]))
        agent, states, _ = train(name, arguments)
        for seed in range(arguments.seeds):
            law = learned_law(agent, jax.tree.map(lambda x, seed=seed: x[seed], states), env)
            learned.setdefault(name, law)
            rows.append({"process": name, "seed": seed} | numbers(law, exact[name]))
        apart = draws_apart(coarse(exact[name]), len(law.masses))
        references.append({"process": name, "law": "draws", "energy_distance": apart})
        print(f"{time.perf_counter() - started:6.0f} s  {name}", flush=True)
    _, _, history = train(CONTROL, arguments, arguments.evaluations)
    control = pd.DataFrame([
        {
            "seed": seed, "env_steps": int(history["env_steps"][seed, index]),
            "episode_return": history["evaluation_return"][seed, index].mean(),
        }
        | {f"rewards_{k}": x for k, x in enumerate(history["evaluation_rewards"][seed, index].mean(0))}
        for seed in range(arguments.seeds) for index in range(arguments.evaluations)
    ])  # fmt: skip
    print(f"{time.perf_counter() - started:6.0f} s  {CONTROL}", flush=True)

    results = pd.DataFrame(rows)
    summary = summarise(results, pd.DataFrame(references))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, table in {"results": results, "summary": summary, "control": control}.items():
        table.to_csv(arguments.out / f"{name}.csv", index=False, float_format="%.5g")
    record = {
        "command": command_line(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started), "seeds": arguments.seeds, "steps": arguments.steps,
        "evaluations": arguments.evaluations,
        "presets": {name: md3qn.PRESETS[f"multi_reward/{name}"] for name in (*PROCESSES, CONTROL)},
        "versions": versions(),
    }  # fmt: skip
    (arguments.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(learned, exact, results, summary, control, arguments.out / "figure.png")
    print(summary.to_string(index=False))
    print(control.groupby("seed").tail(3).to_string(index=False))
    check(summary, control)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

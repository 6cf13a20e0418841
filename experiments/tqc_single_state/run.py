"""Over-estimation on a single-state MDP: averaging, minimum and truncation side by side.

Reproduces the bias and variance experiment of "Controlling Overestimation Bias with Truncated Mixture of Continuous
Distributional Quantile Critics" (TQC, arXiv 2005.04269), section 5.1 and its appendix. One state, actions in [-1, 1],
reward f(a) + N(0, 0.25^2), discount 0.99. A critic sees one noisy reward for each of 50 actions, and bootstraps from
the action that it likes best: every positive error is found by that maximisation and fed back. Three ways against it:

    AVG   Q = mean of N networks                         setting: N (N = 1 is DDPG's critic)
    MIN   Q = minimum of N networks                      setting: N (N = 2 is that of TD3 and SAC)
    TQC   Q = mean of the pooled atoms of 2 networks with 25 atoms each, the 2 d largest left out    setting: d

    python experiments/tqc_single_state/run.py
"""

import datetime
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.stats
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.distributional.quantile import midpoints, quantile_huber_loss, truncate_pooled
from jaxrl_dist.recording import command_line, versions

SETTINGS = {"AVG": (1, 3, 5, 10, 20, 50), "MIN": (2, 3, 4, 6, 8, 10), "TQC": (0, 1, 2, 3, 4, 5, 6, 7, 10, 13, 16)}
WAVES = {"sin": np.sin, "cos": np.cos}  # two public transcriptions of the paper disagree on g, so both are run
MEASURES = ("bias", "variance", "action_error")
DISCOUNT, NOISE, WIDTH, ATOMS, TQC_NETWORKS = 0.99, 0.25, 50, 25, 2
GRID = np.linspace(-1, 1, 2001, dtype=np.float32)  # actions among which the policy chooses, 0.001 apart
COARSE = 10  # the search looks at every tenth of them first
BUFFER_ACTIONS = np.linspace(-1, 1, 50, dtype=np.float32)
MEASURED_ACTIONS = np.linspace(-1, 1, 2000, dtype=np.float32)


@dataclass(frozen=True)
class Arguments:
    seeds: int = 24
    """Independent runs of every setting (the paper has 100)."""
    out: Path = Path(__file__).parent
    """Folder that receives results.csv, summary.csv, figure.png and run.json."""
    iterations: int = 3000
    """Updates of the critic."""
    learning_rate: float = 1e-3
    """Of Adam; the paper does not say which."""
    full_search: bool = False
    """Look at all 2001 actions in each iteration instead of every tenth and then those around the best of them."""
    only: tuple[str, ...] = ()
    """Settings to run, such as AVG-1 TQC-5; none means all."""


def mean_reward(action: np.ndarray, wave: str) -> np.ndarray:
    """f(a) = [0.3 + 0.3 (a + 1)] g(5 a), the expected reward of an action."""
    return (0.3 + 0.3 * (action + 1)) * WAVES[wave](5 * action)


# -- critics ----------------------------------------------------------------------------------------------------------


def init_networks(key: jax.Array, networks: int, outputs: int) -> dict[str, jax.Array]:
    """Two hidden layers, uniform within 1 / sqrt(inputs) (PyTorch's default); the first axis counts networks."""
    shapes = {
        "weight_1": (1, WIDTH), "bias_1": (WIDTH,),
        "weight_2": (WIDTH, WIDTH), "bias_2": (WIDTH,),
        "weight_3": (WIDTH, outputs), "bias_3": (outputs,),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    bounds = {name: 1.0 if name.endswith("1") else 1 / math.sqrt(WIDTH) for name in shapes}
    return {
        name: jax.random.uniform(key, (networks, *shape), minval=-bounds[name], maxval=bounds[name])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply_networks(parameters: dict[str, jax.Array], actions: jax.Array) -> jax.Array:
    """Actions `[actions]` to `[actions, networks, outputs]`."""

    def network(p):
        hidden = jax.nn.relu(actions[:, None] * p["weight_1"] + p["bias_1"])
        hidden = jax.nn.relu(hidden @ p["weight_2"] + p["bias_2"])
        return hidden @ p["weight_3"] + p["bias_3"]

    return jax.vmap(network, out_axes=1)(parameters)


def bootstrap_atoms(method: str, setting: int, outputs: jax.Array) -> jax.Array:
    """Outputs `[actions, networks, outputs]` to the atoms of the target `[actions, atoms]`; their mean is Q."""
    if method == "TQC":
        return truncate_pooled(outputs, setting)
    return (outputs.mean(1) if method == "AVG" else outputs.min(1))[:, :1]


def train_and_measure(
    key: jax.Array, wave_rewards: dict[str, jax.Array], *, method: str, setting: int, arguments: Arguments
) -> dict[str, jax.Array]:
    """One run. wave_rewards: f at the buffer's, the measured and the grid's actions, and the grid's best action.

    Returns bias and variance over the measured actions of Q(a) - [f(a) + 0.99 f(a_pi) / 0.01], in units of return, and
    |a_pi - a*|. a_pi, the action that the trained critic likes best, is looked for on the full grid.
    """
    networks = TQC_NETWORKS if method == "TQC" else setting
    outputs = ATOMS if method == "TQC" else 1
    key_init, key_noise = jax.random.split(key)
    rewards = wave_rewards["buffer"] + NOISE * jax.random.normal(key_noise, BUFFER_ACTIONS.shape)
    optimiser = optax.adam(arguments.learning_rate)
    grid = jnp.asarray(GRID)

    def value(parameters, actions):
        return bootstrap_atoms(method, setting, apply_networks(parameters, actions)).mean(1)

    def best_action(parameters):
        if arguments.full_search:
            return grid[jnp.argmax(value(parameters, grid))]
        near = COARSE * jnp.argmax(value(parameters, grid[::COARSE])) + jnp.arange(-COARSE, COARSE + 1)
        candidates = grid[jnp.clip(near, 0, len(GRID) - 1)]
        return candidates[jnp.argmax(value(parameters, candidates))]

    def loss(parameters, target):
        predicted = apply_networks(parameters, jnp.asarray(BUFFER_ACTIONS))
        if method == "TQC":
            return quantile_huber_loss(predicted, target, midpoints(ATOMS), over_predicted="mean").mean()
        return jnp.square(predicted[..., 0] - target).mean(0).sum()  # each network minimises its own mean

    def update(carry, _):
        parameters, optimiser_state = carry
        atoms = bootstrap_atoms(method, setting, apply_networks(parameters, best_action(parameters)[None]))
        gradient = jax.grad(loss)(parameters, rewards[:, None] + DISCOUNT * atoms)
        step, optimiser_state = optimiser.update(gradient, optimiser_state)
        return (optax.apply_updates(parameters, step), optimiser_state), None

    parameters = init_networks(key_init, networks, outputs)
    carry = parameters, optimiser.init(parameters)
    (parameters, _), _ = jax.lax.scan(update, carry, length=arguments.iterations)

    chosen = jnp.argmax(value(parameters, grid))
    truth = wave_rewards["measured"] + DISCOUNT / (1 - DISCOUNT) * wave_rewards["grid"][chosen]
    error = value(parameters, jnp.asarray(MEASURED_ACTIONS)) - truth
    return {
        "bias": error.mean(),
        "variance": error.var(),
        "action_error": jnp.abs(grid[chosen] - wave_rewards["best_action"]),
    }


# -- results ----------------------------------------------------------------------------------------------------------


def run_setting(method: str, setting: int, arguments: Arguments) -> pd.DataFrame:
    """All seeds and both rewards of one setting in one compiled program: a tidy frame, one row per run."""
    frames = []
    program = jax.jit(
        lambda runs: jax.lax.map(
            lambda run: train_and_measure(*run, method=method, setting=setting, arguments=arguments), runs
        )
    )
    waves = [
        {
            "buffer": mean_reward(BUFFER_ACTIONS, wave),
            "measured": mean_reward(MEASURED_ACTIONS, wave),
            "grid": mean_reward(GRID, wave),
            "best_action": GRID[np.argmax(mean_reward(GRID, wave))],
        }
        for wave in WAVES
    ]
    # The seed alone decides networks and noise, so the settings are compared on the same draws.
    keys = jax.random.split(jax.random.key(0), arguments.seeds)
    of_run = np.repeat(np.arange(len(WAVES)), arguments.seeds)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)[of_run], jnp.float32), *waves)
    outcome = jax.device_get(program((keys[np.tile(np.arange(arguments.seeds), len(WAVES))], stacked)))
    for number, wave in enumerate(WAVES):
        rows = {"method": method, "setting": setting, "g": wave, "seed": np.arange(arguments.seeds)}
        frames.append(pd.DataFrame({**rows, **{name: outcome[name][of_run == number] for name in MEASURES}}))
    return pd.concat(frames, ignore_index=True)


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds without the lowest and the highest 10 %, as in the paper, and the number of seeds."""
    groups = results.groupby(["method", "setting", "g"], sort=False)
    trimmed = groups[list(MEASURES)].agg(lambda column: scipy.stats.trim_mean(column, 0.1))
    return trimmed.assign(seeds=groups.size()).reset_index()


def check(summary: pd.DataFrame) -> None:
    """What must hold if truncation works as the paper says; AssertionError says what does not."""
    for wave in WAVES:
        rows = summary[summary.g == wave].set_index(["method", "setting"])
        average, truncated = rows.loc["AVG"].bias.sort_index(), rows.loc["TQC"].bias.sort_index()
        assert average.is_monotonic_decreasing, f"g={wave}: the bias of AVG does not fall with N: {dict(average)}"
        assert average.min() > 0, f"g={wave}: AVG under-estimates: {dict(average)}"
        assert truncated[0] > 100 * abs(truncated[7]), f"g={wave}: TQC's bias stays large: {dict(truncated)}"
        assert truncated[0] > 0 > truncated[16], f"g={wave}: TQC's bias keeps its sign: {dict(truncated)}"
        minimum = rows.variance["MIN", 2]
        for dropped in (7, 10, 13, 16):
            variance = rows.variance["TQC", dropped]
            assert variance < minimum, f"g={wave}: TQC d={dropped} has variance {variance}, MIN N=2 only {minimum}"


def draw(summary: pd.DataFrame, path: Path) -> None:
    """Bias against variance, one line per method, every point labelled with its N or d."""
    looks = {"AVG": ("#0072B2", "o", "N"), "MIN": ("#009E73", "s", "N"), "TQC": ("#D55E00", "D", "d")}
    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, wave in zip(figure.subplots(1, 2, sharey=True), WAVES, strict=True):
        axes.axvline(0, color="#6B7280", linewidth=1, zorder=1)
        for method, (colour, marker, letter) in looks.items():
            rows = summary[(summary.g == wave) & (summary.method == method)]
            what = {"AVG": "mean of N networks", "MIN": "minimum of N networks", "TQC": "truncated, d atoms dropped"}
            axes.plot(
                rows.bias, rows.variance, color=colour, marker=marker, linewidth=1, markersize=6, zorder=2,
                label=f"{method}: {what[method]}",
            )  # fmt: skip
            for row in rows.itertuples():
                axes.annotate(
                    f"{letter}={row.setting}", (row.bias, row.variance), xytext=(5, 5), textcoords="offset points",
                    fontsize=8, color=colour,
                )  # fmt: skip
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("log")
        axes.set_xlabel("bias of Q (symlog; 0 is right)")
        axes.set_title(f"g = {wave}", loc="left", fontsize=11)
        axes.grid(color="#E5E7EB", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("variance of Q's error over actions")
    figure.axes[0].legend(frameon=False, loc="upper left", fontsize=9)
    seeds = int(summary.seeds.iloc[0])
    title = f"Single-state MDP: truncation tunes the bias at low variance (10 % trimmed mean of {seeds} seeds)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    figure.savefig(path, dpi=160)


def main(arguments: Arguments) -> None:
    """Run every setting, write the results and, when all settings were run, check what the paper claims."""
    names = {f"{method}-{setting}": (method, setting) for method in SETTINGS for setting in SETTINGS[method]}
    if unknown := [name for name in arguments.only if name not in names]:
        raise ValueError(f"only holds {unknown[0]!r}, but a setting is one of {', '.join(names)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    started, frames = time.perf_counter(), []
    for name in arguments.only or names:
        frames.append(run_setting(*names[name], arguments))
        rows = summarise(frames[-1]).to_dict("records")
        line = "; ".join(f"g={row['g']} bias {row['bias']:.4g} variance {row['variance']:.3g}" for row in rows)
        print(f"{time.perf_counter() - started:6.0f} s  {name:7} {line}", flush=True)
    results = pd.concat(frames, ignore_index=True)
    summary = summarise(results)
    results.to_csv(arguments.out / "results.csv", index=False, float_format="%.6g")
    summary.to_csv(arguments.out / "summary.csv", index=False, float_format="%.6g")
    record = {
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started),
        "seeds": arguments.seeds,
        "iterations": arguments.iterations,
        "learning_rate": arguments.learning_rate,
        "full_search": arguments.full_search,
        "versions": versions(),
    }
    (arguments.out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(summary, arguments.out / "figure.png")
    if not arguments.only:
        check(summary)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))

"""Over-estimation on a single-state MDP: averaging, minimum and truncation side by side.

Reproduces the bias and variance experiment of "Controlling Overestimation Bias with Truncated Mixture of Continuous
Distributional Quantile Critics" (TQC, arXiv 2005.04269), from its appendix. One state, actions in [-1, 1],
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
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.stats
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from jaxrl_dist.distributional.quantile import midpoints, quantile_huber_loss, truncate_pooled
from jaxrl_dist.records.recording import command_line, versions
from jaxrl_dist.records.statistics import bootstrap_interval

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
    """Mean over seeds without the lowest and the highest 10 %, as in the paper, and a 95 % interval of the bias."""
    groups = results.groupby(["method", "setting", "g"], sort=False)
    summary = groups[list(MEASURES)].agg(trimmed_mean)
    interval = groups.bias.agg(partial(bootstrap_interval, statistic=trimmed_mean))
    summary = summary.assign(bias_low=interval.str[0], bias_high=interval.str[1], seeds=groups.size())
    return summary.reset_index()


def trimmed_mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return scipy.stats.trim_mean(values, 0.1, axis=axis)


def check(summary: pd.DataFrame) -> None:
    """What must hold if truncation works as the paper says; AssertionError says what does not."""
    for wave in WAVES:
        rows = summary[summary.g == wave].set_index(["method", "setting"])
        average, truncated = rows.loc["AVG"].bias.sort_index(), rows.loc["TQC"].bias.sort_index()
        # Neighbours such as N = 10 and N = 20 are within each other's noise, hence every second one.
        assert (average.diff(2).dropna() < 0).all(), f"g={wave}: the bias of AVG does not fall with N: {dict(average)}"
        assert average.min() > 0, f"g={wave}: AVG under-estimates: {dict(average)}"
        assert truncated[0] > 100 * abs(truncated[7]), f"g={wave}: TQC's bias stays large: {dict(truncated)}"
        assert truncated[0] > 0 > truncated[16], f"g={wave}: TQC's bias keeps its sign: {dict(truncated)}"
        minimum = rows.variance["MIN", 2]
        for dropped in (7, 10, 13, 16):
            variance = rows.variance["TQC", dropped]
            assert variance < minimum, f"g={wave}: TQC d={dropped} has variance {variance}, MIN N=2 only {minimum}"


# -- figure -----------------------------------------------------------------------------------------------------------

LOOKS = {
    "AVG": ("#0072B2", "o", "N", "mean of N networks"),
    "MIN": ("#009E73", "s", "N", "minimum of N networks"),
    "TQC": ("#D55E00", "D", "d", "2 networks, d atoms of each dropped"),
}


def draw(summary: pd.DataFrame, path: Path) -> None:
    """Bias against variance, one line per method, every point labelled with its N or d."""
    figure = Figure(figsize=(12, 6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots(1, 2, sharey=True, sharex=True)
    for axes, wave in zip(figure.axes, WAVES, strict=True):
        axes.axvline(0, color="#4D4D4D", linewidth=1, zorder=1)
        for method, (colour, marker, _, meaning) in LOOKS.items():
            rows = summary[(summary.g == wave) & (summary.method == method)]
            axes.plot(
                rows.bias, rows.variance, color=colour, marker=marker, linewidth=1.2, markersize=6, zorder=4,
                label=f"{method}: {meaning}",
            )  # fmt: skip
            axes.hlines(rows.variance, rows.bias_low, rows.bias_high, color=colour, linewidth=3, alpha=0.2, zorder=3)
        axes.set_xscale("symlog", linthresh=10, linscale=1.6)
        axes.set_xticks([-10, -5, 0, 5, 10, 100, 1000, 10_000], ["−10", "−5", "0", "5", "10", "100", "1k", "10k"])  # noqa: RUF001
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.004)
        axes.set_xlabel("bias of the value (linear to 10, then logarithmic; 0 is right)")
        axes.set_title(f"reward with g = {wave}", loc="left", fontsize=11)
        axes.grid(color="#E5E7EB", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("variance of the value's error over actions")
    figure.axes[0].legend(frameon=False, loc="upper left", fontsize=9)
    title = "Single-state MDP: truncation tunes the bias and keeps the variance low"
    note = f"10 % trimmed mean of {summary.seeds.iloc[0]} seeds; bars: 95 % bootstrap interval of the bias"
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.01, 0.925, note, fontsize=9.5, color="#6B7280")
    figure.canvas.draw()  # settles the layout, which the labels are fitted into
    for axes, wave in zip(figure.axes, WAVES, strict=True):
        label_points(axes, summary[summary.g == wave])
    figure.savefig(path, dpi=160)


def label_points(axes: Axes, rows: pd.DataFrame) -> None:
    """Put each label at the nearest place round its point where it covers neither a point nor another label."""
    points = axes.transData.transform(rows[["bias", "variance"]].to_numpy())
    taken = [Bbox.from_extents(*(point - 4), *(point + 4)) for point in points]
    places = [(20, -25), (20, 155), (11, -90), (11, 90)]
    places += [(radius, angle) for radius in (26, 34, 43, 53) for angle in (-90, 90, -60, 120, -120, 60, -25, 155)]
    leader = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0}
    for row in rows.itertuples():
        colour, _, letter, _ = LOOKS[row.method]
        for radius, angle in places:
            offset = radius * np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
            label = axes.annotate(
                f"{letter}={row.setting}", (row.bias, row.variance), xytext=offset, textcoords="offset points",
                ha="center", va="center", fontsize=8, color=colour, zorder=5,
                arrowprops=leader | {"color": colour} if radius > 20 else None,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
            label.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # the words alone, without the leader
            inside = axes.bbox.contains(*box.min) and axes.bbox.x0 <= box.x1 <= axes.figure.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


# -- command line -----------------------------------------------------------------------------------------------------


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

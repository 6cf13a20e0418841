"""What does the recursion of N-VR-PG gain over plain normalised policy gradients, for a utility that is no reward?

An agent in the corner of a grid of 5 x 5 cells without walls shall visit all of them evenly: F is the entropy of its
discounted visits (discount 0.9). The policy is a table of logits. Two methods, each with 1 and with 10 trajectories of
50 steps per iteration, and with two lengths of the first step:

    recursion   N-VR-PG: estimates of visits and gradient go on from those before (`--memory-exponent 2/3`)
    plain       eta = 1: both are of the new trajectories alone (`--memory-exponent 0`)

    results.csv   per run and iteration, of the exact visits of the policy: `entropy`, and `share`, of the largest
                  entropy that any policy has; `visits_error`, the L1 distance of the estimated to the exact shares of
                  states; `largest_weight` and `smallest_weight`, of the trajectories since the row before
    summary.csv   of the last iteration: interquartile mean of `share` and 95 % bootstrap interval over seeds; the first
                  iteration at which all seeds have 95 %; means of the errors, extremes of all weights

The largest entropy is bounded from both sides by Frank and Wolfe's algorithm; `share` is of the upper bound.

    python experiments/general_utilities/run.py            # about two minutes on one core
"""

import dataclasses
import datetime
import itertools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl_dist.algorithms.policy_gradient import variance_reduced
from jaxrl_dist.distributional.tabular import MDP, mdp_from_outcomes
from jaxrl_dist.envs.tabular import MOVES, Tabular
from jaxrl_dist.records import recording
from jaxrl_dist.records.statistics import bootstrap_interval, interquartile_mean

HERE = Path(__file__).parent
SIDE, DISCOUNT, HORIZON = 5, 0.9, 50
METHODS = {"recursion": (2 / 3, "#0072B2"), "plain": (0.0, "#D55E00")}
BATCHES, STEP_LENGTHS = (1, 10), (0.2, 0.5)
GOOD = 0.95


def grid(side: int = SIDE) -> Tabular:
    """Cells without walls, rewards or an end; the border stops. Starts in a corner."""
    cells = [*itertools.product(range(side), repeat=2)]

    def to(cell, move) -> int:
        row, column = (min(max(x + y, 0), side - 1) for x, y in zip(cell, move, strict=True))
        return side * row + column

    table = [[[(1.0, to(cell, move), 0.0, False)] for move in MOVES.values()] for cell in cells]
    return Tabular(mdp_from_outcomes(table), np.eye(side**2)[0], cells, "grid", max_steps_in_episode=HORIZON)


# -- exact visits -----------------------------------------------------------------------------------------------------


def visits(mdp: MDP, policy: jax.Array) -> jax.Array:
    """The share of each state in the discounted visits of a policy `[states, actions]`, by the linear system; from
    state 0, for certain moves."""
    states = len(policy)
    moves = jax.nn.one_hot(mdp.next_state[..., 0], states)
    chain = jnp.einsum("sa,sat->ts", policy, moves)
    return (1 - DISCOUNT) * jnp.linalg.solve(jnp.eye(states) - DISCOUNT * chain, jnp.eye(states)[0])


def entropy(shares: np.ndarray) -> np.ndarray:
    """Of shares `[..., states]`."""
    return -(shares * np.log(np.maximum(shares, 1e-12))).sum(-1)


def bounds_of_the_optimum(mdp: MDP, iterations: int = 300) -> tuple[float, float]:
    """Bounds from below and above of the largest entropy of discounted visits.

    Visits of all policies are a polytope on which the entropy is concave. Each turn goes towards the corner that is
    best for the rewards -log share, which value iteration finds; how far that is above the present value bounds the
    optimum (Frank & Wolfe 1956).
    """
    following = np.asarray(mdp.next_state)[..., 0]
    states, actions = following.shape
    visits_of = jax.jit(lambda policy: visits(mdp, policy))
    shares, upper = np.asarray(visits_of(jnp.full((states, actions), 1 / actions)), np.float64), np.inf
    for _ in range(iterations):
        reward, value = -np.log(np.maximum(shares, 1e-12)) - 1, np.zeros(states)
        for _ in range(200):
            value = reward + DISCOUNT * value[following].max(1)
        corner = np.asarray(visits_of(jnp.eye(actions)[value[following].argmax(1)]), np.float64)
        upper = min(upper, entropy(shares) + (corner - shares) @ reward)
        mixes = shares + np.linspace(0, 0.5, 201)[:, None] * (corner - shares)
        shares = mixes[entropy(mixes).argmax()]
    return float(entropy(shares)), float(upper)


# -- runs -------------------------------------------------------------------------------------------------------------


def train(key: jax.Array, step_length: jax.Array, method: str, batch: int, iterations: int, every: int) -> dict:
    """One run: what results.csv says, leaves `[iterations / every + 1]`; the first is of the even policy."""
    env = grid()
    config = dataclasses.replace(
        variance_reduced.Config(), utility="entropy", hidden=(), horizon=HORIZON, discount=DISCOUNT, num_envs=batch,
        step_length=step_length, memory_exponent=METHODS[method][0],
    )  # fmt: skip
    agent = variance_reduced.make_agent(config, env, env.default_params)
    mdp = env.default_params.mdp

    def look(state) -> dict:
        learner = state.learner
        exact = visits(mdp, jax.nn.softmax(learner.parameters["params"]["table"]))
        # The estimate is of the policy before the last step.
        before = visits(mdp, jax.nn.softmax(learner.optimizer.previous["params"]["table"]))
        estimated = variance_reduced.shares(jnp.maximum(learner.optimizer.occupancy.table, 0))
        return {"visits": exact, "visits_error": jnp.abs(estimated - before).sum()}

    def some(state, _):
        state, metrics = jax.lax.scan(lambda state, _: agent.step(state), state, length=every)
        weights = metrics["largest_weight"].total.max(), metrics["smallest_weight"].total.min()
        return state, look(state) | {"largest_weight": weights[0], "smallest_weight": weights[1]}

    state = agent.init(key)
    first = look(state) | {"largest_weight": jnp.float32(1), "smallest_weight": jnp.float32(1)}
    rest = jax.lax.scan(some, state, length=iterations // every)[1]
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, rest)


def run(method: str, batch: int, seeds: int, iterations: int, every: int, optimum: float) -> pd.DataFrame:
    """All seeds and lengths of the first step in one program; the same seeds for all methods."""
    keys = jax.random.split(jax.random.key(0), seeds)
    lengths = jnp.array(STEP_LENGTHS)

    def one(key, length):
        return train(key, length, method, batch, iterations, every)

    found = jax.device_get(jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))(keys, lengths))
    found["entropy"] = entropy(found.pop("visits"))
    found["share"] = found["entropy"] / optimum
    axes = [STEP_LENGTHS, range(seeds), range(0, iterations + 1, every)]
    rows = pd.MultiIndex.from_product(axes, names=["step_length", "seed", "iteration"]).to_frame(index=False)
    columns = ("entropy", "share", "visits_error", "largest_weight", "smallest_weight")
    rows = rows.assign(**{name: found[name].ravel() for name in columns})
    rows.insert(0, "batch", batch)
    rows.insert(0, "method", method)
    return rows


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """One row per method, batch and length of the first step."""
    rows = []
    for label, table in results.groupby(["method", "batch", "step_length"], sort=False):
        last = table[table.iteration == table.iteration.max()]
        low, high = bootstrap_interval(last.share.to_numpy())
        worst = table.groupby("iteration").share.min()
        good = worst.index[worst.to_numpy() >= GOOD]
        rows.append({
            "method": label[0], "batch": label[1], "step_length": label[2], "seeds": len(last),
            "share": interquartile_mean(last.share.to_numpy()), "share_low": low, "share_high": high,
            "all_have_95": good[0] if len(good) else -1, "visits_error": last.visits_error.mean(),
            "largest_weight": table.largest_weight.max(), "smallest_weight": table.smallest_weight.min(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def check(summary: pd.DataFrame) -> None:
    """What must hold if the recursion is worth it; AssertionError says what does not."""
    rows = summary.set_index(["method", "batch", "step_length"])
    for batch, length in itertools.product(BATCHES, STEP_LENGTHS):
        ours, plain = rows.loc[("recursion", batch, length)], rows.loc[("plain", batch, length)]
        assert ours.share_low > plain.share_high, f"batch {batch}, step {length}: {ours.share} against {plain.share}"
        assert ours.visits_error < plain.visits_error, f"batch {batch}, step {length}: visits are no better known"
    for length in STEP_LENGTHS:
        share = rows.loc[("recursion", 10, length)].share_low
        assert share >= GOOD, f"batch 10, step {length}: a share of {share}"


# -- figure -----------------------------------------------------------------------------------------------------------


def draw(results: pd.DataFrame, path: Path) -> None:
    """A column for each batch; above the entropy reached, below what is wrong with the estimated visits."""
    figure = Figure(figsize=(11, 7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(BATCHES), sharex=True, sharey="row")
    for column, batch in enumerate(BATCHES):
        for (method, (_, colour)), (length, style) in itertools.product(
            METHODS.items(), zip(STEP_LENGTHS, ("--", "-"), strict=True)
        ):
            rows = results[(results.method == method) & (results.batch == batch) & (results.step_length == length)]
            for row, measure in enumerate(("share", "visits_error")):
                table = rows[rows.iteration > 0].groupby("iteration")[measure]
                label = f"{method}, first step {length:g}"
                axes[row, column].plot(table.mean(), color=colour, linestyle=style, label=label)
                axes[row, column].fill_between(
                    table.mean().index, table.min(), table.max(), color=colour, alpha=0.15, linewidth=0
                )
        axes[0, column].axhline(GOOD, color="#4D4D4D", linewidth=1)
        title = f"{batch} {'trajectory' if batch == 1 else 'trajectories'} per iteration"
        axes[0, column].set_title(title, loc="left", fontsize=11)
        axes[1, column].set(xlabel="iteration", yscale="log", xscale="log")
    axes[0, 0].set_ylabel("entropy of visits / largest possible")
    axes[1, 0].set_ylabel("error of the estimated visits (L1)")
    axes[0, 1].legend(frameon=False, fontsize=9, loc="lower right")
    for axis in axes.flat:
        axis.grid(color="#E5E7EB", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)


def main(seeds: int = 6, iterations: int = 2000, every: int = 20, out: Path = HERE) -> None:
    """Run everything, write tables and picture, and check what is said of them."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    low, optimum = bounds_of_the_optimum(grid().default_params.mdp)
    print(f"the largest entropy is between {low:.4f} and {optimum:.4f}", flush=True)
    frames = []
    for batch, method in itertools.product(BATCHES, METHODS):
        frames.append(run(method, batch, seeds, iterations, every, optimum))
        print(f"{time.perf_counter() - started:4.0f} s  {method}, batch {batch}", flush=True)
    results = pd.concat(frames, ignore_index=True)
    summary = summarise(results)
    results.to_csv(out / "results.csv", index=False, float_format="%.5g")
    summary.to_csv(out / "summary.csv", index=False, float_format="%.5g")
    record = {
        "command": recording.command_line(), "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "wall_seconds": round(time.perf_counter() - started), "seeds": seeds, "iterations": iterations,
        "side": SIDE, "discount": DISCOUNT, "horizon": HORIZON, "largest_entropy": [low, optimum],
        "versions": recording.versions(),
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(results, out / "figure.png")
    print(summary.to_string(index=False))
    if iterations >= 2000:
        check(summary)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

"""Does choosing levels pay? Domain randomisation, PLR and robust PLR on mazes of 7 x 7, measured on mazes never seen.

`results.csv` has a row per method, seed and time: environment steps and gradient updates of the student, the share of
held-out levels that its policy solves within the time limit, drawing its actions and by the mode, the return in parts
of the best possible one, and the mean number of actions that the levels in the buffer need. Held out are 100 mazes
carved by a depth-first search (`corridors`), which differ from all that are trained on, and 400 solvable levels drawn
as in training (`random`). `summary.csv` holds interquartile means with 95 % intervals at the last time, and at the time
when a method that learns from all it plays has had as many updates as robust PLR in the end.

`scores.csv`, of domain randomisation: what scores say of the held-out random levels to an agent that chose none.
Rank correlations over levels of each score (of 128 steps, as in training) with the true regret, the best return that is
possible minus the mean of 32 episodes, and with the number of actions that a level needs; the same for MaxMC with the
mean return of the level in place of V; and regret and needed actions of the fifth of the levels that a score ranks
first.

    python experiments/levels/run.py
    python experiments/levels/run.py --no-shows-time --total-steps 4000000 --evaluations 16 \
      --out experiments/levels/time_hidden
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
from jaxrl_dist.running import problem, training

HERE = Path(__file__).parent
METHODS = {
    "domain randomisation": {"robust": False, "replay_probability": 0.0},
    "PLR": {"robust": False},
    "robust PLR": {},
    "robust PLR, positive value loss": {"score": "positive_value_loss"},
}
MEASURES = ("corridors_solved", "corridors_solved_by_mode", "random_solved", "random_part_of_best_return")


def main(
    methods: tuple[str, ...] = tuple(METHODS), num_seeds: int = 6, total_steps: int = 2_000_000, evaluations: int = 8,
    view: int = 5, shows_time: bool = True, out: Path = HERE,
) -> None:  # fmt: skip
    """Train methods and write the tables and the figure.

    Args:
        methods: which methods.
        num_seeds: seeds per method, trained together.
        total_steps: environment steps of each.
        evaluations: how often each is measured.
        view: cells that the agent sees before it and to both sides; 13: everything.
        shows_time: whether it sees the time.
        out: folder to write to.
    """
    cli.spread_over_cores()  # before environments are imported, which starts JAX
    from jaxrl_dist import envs
    from jaxrl_dist.algorithms.environment_design import plr

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    env, params = envs.make("maze", view=view, shows_time=shows_time)
    held_out = {"corridors": corridors(env.size, 100), "random": solvable(env, 400)}
    preset = problem.split_preset(plr.PRESETS["maze"])[1]
    rows = []
    for method in methods:
        config = plr.Config(**preset | METHODS[method])
        programs = training.Programs(plr.make_agent, config, env, params, num_runs=num_seeds, eval_states=0)
        agent = programs.agent
        measure = jax.jit(jax.vmap(measurer(agent, config.num_levels, env, params, held_out)))
        keys = jax.random.split(jax.random.key(0), num_seeds)
        runs, done = programs.begin(keys), 0
        for boundary in np.round(np.linspace(0, programs.agent.clock.iterations(total_steps), evaluations + 1))[1:]:
            runs = programs.advance(runs, int(boundary) - done)
            done = int(boundary)
            found = jax.device_get(measure(runs.state, jax.vmap(jax.random.fold_in, (0, None))(keys, done)))
            for seed in range(num_seeds):
                rows.append({
                    "method": method, "seed": seed, "env_steps": programs.agent.clock.env_steps_at(done),
                    **{name: round(float(x[seed]), 4) for name, x in found.items()},
                })  # fmt: skip
            print(pd.DataFrame(rows[-num_seeds:]).drop(columns="method").mean().round(3).to_dict(), method, flush=True)
        if method == "domain randomisation":
            scored = jax.jit(jax.vmap(scorer(agent, config, env, params, held_out["random"])))
            found = jax.device_get(scored(runs.state, jax.vmap(jax.random.fold_in, (0, None))(keys, 10**6)))
            correlations(found).to_csv(out / "scores.csv", index=False)
    results = pd.DataFrame(rows)
    results.to_csv(out / "results.csv", index=False)
    summarise(results, out)
    about = {
        "command": recording.command_line(), "seconds": round(time.perf_counter() - started),
        "date": time.strftime("%Y-%m-%d"), "versions": recording.versions(), "preset": preset,
    }  # fmt: skip
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")


# -- levels -----------------------------------------------------------------------------------------------------------


def corridors(size: int, count: int):
    """Mazes whose every two places are joined by exactly one way, carved by a depth-first search: `[count, ...]`."""
    from jaxrl_dist.envs import maze

    random, found = np.random.default_rng(0), []
    while len(found) < count:
        walls = np.ones((size, size), bool)
        walls[0, 0] = False
        stack = [(0, 0)]
        while stack:
            x, y = stack[-1]
            ways = [(dx, dy) for dx, dy in ((2, 0), (-2, 0), (0, 2), (0, -2))
                    if 0 <= x + dx < size and 0 <= y + dy < size and walls[y + dy, x + dx]]  # fmt: skip
            if not ways:
                stack.pop()
                continue
            dx, dy = ways[random.integers(len(ways))]
            walls[y + dy // 2, x + dx // 2] = walls[y + dy, x + dx] = False
            stack.append((x + dx, y + dy))
        free = np.argwhere(~walls)[:, ::-1]
        goal, start = free[random.choice(len(free), 2, replace=False)]
        found.append(maze.Level(walls, goal.astype(np.int32), start.astype(np.int32), np.int32(random.integers(4))))
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def solvable(env, count: int):
    """Levels drawn as in training, without those that have no way: `[count, ...]`."""
    from jaxrl_dist.envs import maze

    levels = jax.vmap(env.draw)(jax.random.split(jax.random.key(12345), 2 * count))
    there = np.flatnonzero(jax.vmap(maze.actions_needed)(levels) > 0)[:count]
    assert len(there) == count
    return jax.tree.map(lambda x: x[there], levels)


# -- measures ---------------------------------------------------------------------------------------------------------


def measurer(agent, num_levels: int, env, params, held_out: dict):
    """`(state, key)` -> all columns of a row but the first."""
    from jaxrl_dist.envs import maze
    from jaxrl_dist.learning import interaction, rollouts

    needed = {name: jax.vmap(maze.actions_needed)(levels) for name, levels in held_out.items()}

    def play(state, levels, key, policy):
        """The return of one episode in each level."""
        count = levels.direction.shape[0]
        each = jax.vmap(lambda level: params.replace(level=level, fresh_levels=jnp.zeros((), bool)))(levels)
        start_key, key = jax.random.split(key)
        now = interaction.start(env, each, start_key, count, per_environment=True)
        follow = lambda observation, memory, key: (policy(state, observation, key), memory, ())  # noqa: E731
        steps = params.max_steps_in_episode
        _, (lived, _), _ = rollouts.collect(env, each, now, key, steps, follow, per_environment=True)
        done = lived.terminated | lived.truncated
        first = jnp.cumsum(done, axis=0) - done == 0
        return (lived.reward * first).sum(0)

    def measure(state, key):
        known = jnp.arange(num_levels) < state.levels.size
        actions = jax.vmap(maze.actions_needed)(state.levels.level.level)
        found = {
            "student_updates": state.learner.optimizer[1][0].count,
            "unsolvable_in_buffer": (known & (actions < 0)).sum() / jnp.maximum(known.sum(), 1),
            "actions_needed_in_buffer": jnp.where(known & (actions > 0), actions, 0).sum()
            / jnp.maximum((known & (actions > 0)).sum(), 1),
        }
        for name, levels in held_out.items():
            best = 1 - 0.9 * needed[name] / params.time_scale
            key, drawn_key, mode_key = jax.random.split(key, 3)
            drawn = play(state, levels, drawn_key, lambda *x: agent.claim.policy(*x)[0])
            mode = play(state, levels, mode_key, lambda state, observation, key: agent.policy.act(
                state, observation, (), key)[0])  # fmt: skip
            found |= {
                f"{name}_solved": (drawn > 0).mean(), f"{name}_solved_by_mode": (mode > 0).mean(),
                f"{name}_part_of_best_return": (drawn / best).mean(),
            }  # fmt: skip
        return found

    return measure


def scorer(agent, config, env, params, held_out):
    """`(state, key)` -> of every level its scores, true regret and needed actions."""
    from jaxrl_dist.distributional import law
    from jaxrl_dist.envs import maze
    from jaxrl_dist.learning import interaction, levels, returns, rollouts

    count, episodes = held_out.direction.shape[0], 32
    needed = jax.vmap(maze.actions_needed)(held_out)
    each = jax.vmap(lambda level: params.replace(level=level, fresh_levels=jnp.zeros((), bool)))(held_out)

    def score(state, key):
        def follow(observation, memory, key):
            return agent.claim.policy(state, observation, key)[0], memory, ()

        def values(observation):
            flat = observation.reshape(-1, observation.shape[-1])
            return law.mean(agent.claim.law(state, flat, jnp.zeros(len(flat)))).reshape(observation.shape[:-1])

        def play(key, steps):
            start_key, key = jax.random.split(key)
            now = interaction.start(env, each, start_key, count, per_environment=True)
            return rollouts.collect(env, each, now, key, steps, follow, per_environment=True)[1].transition

        key, long_key = jax.random.split(key)
        lived = play(key, config.num_steps)
        done = lived.terminated | lived.truncated
        value, following = values(lived.observation), values(lived.next_observation)
        advantage = returns.gae(
            lived.reward, value, following, lived.terminated, lived.truncated, config.discount, config.gae_decay
        )
        many = play(long_key, episodes * params.max_steps_in_episode)
        mean = many.reward.sum(0) / (many.terminated | many.truncated).sum(0)
        largest = levels.largest_return(lived.reward, done)
        return {
            "MaxMC": levels.maximum_monte_carlo(value, largest, done),
            "MaxMC with true returns": largest - mean,
            "PVL": levels.positive_value_loss(advantage, done),
            "regret": 1 - 0.9 * needed / params.time_scale - mean, "needed": needed.astype(jnp.float32),
        }  # fmt: skip

    return score


def correlations(found: dict) -> pd.DataFrame:
    rows = []
    for seed in range(len(found["regret"])):
        levels = pd.DataFrame({name: x[seed] for name, x in found.items()})
        ranks = levels.corr(method="spearman")
        for score in ("MaxMC", "MaxMC with true returns", "PVL"):
            first = levels.nlargest(len(levels) // 5, score)
            rows.append({
                "score": score, "seed": seed, "with_regret": round(ranks.regret[score], 3),
                "with_needed_actions": round(ranks.needed[score], 3), "mean_regret": round(levels.regret.mean(), 3),
                "mean_regret_of_first_fifth": round(first.regret.mean(), 3),
                "needed_actions": round(levels.needed.mean(), 2),
                "needed_actions_of_first_fifth": round(first.needed.mean(), 2),
            })  # fmt: skip
    return pd.DataFrame(rows)


def summarise(results: pd.DataFrame, out: Path) -> None:
    last = results[results.env_steps == results.env_steps.max()]
    updates = last.groupby("method").student_updates.mean().min()
    # Methods that learn from all they play have had as many updates at about half of the steps.
    times = {
        method: group.groupby("env_steps").student_updates.mean()
        for method, group in results.groupby("method", sort=False)
    }
    rows = []
    for method in times:
        of_method = results[results.method == method]
        for when, env_steps in (
            ("all steps", of_method.env_steps.max()), ("as many updates", (times[method] - updates).abs().idxmin())
        ):  # fmt: skip
            at = of_method[of_method.env_steps == env_steps]
            row = {"method": method, "at": when, "env_steps": env_steps, "seeds": len(at),
                   "student_updates": round(at.student_updates.mean())}  # fmt: skip
            for column in MEASURES:
                values = at[column].to_numpy()
                low, high = statistics.bootstrap_interval(values)
                row |= {column: round(statistics.interquartile_mean(values), 3),
                        f"{column}_low": round(low, 3), f"{column}_high": round(high, 3)}  # fmt: skip
            rows.append(row)
    table = pd.DataFrame(rows)
    table.to_csv(out / "summary.csv", index=False)
    print(table.to_string(index=False))
    frames = {method: group for method, group in results.groupby("method", sort=False)}
    title = f"mazes of 7 x 7, {results.seed.nunique()} seeds"
    plotting.learning_curve(frames, out / "figure.png", title=title, metric="corridors_solved")


if __name__ == "__main__":
    tyro.cli(main)

"""Exported policies in Gymnasium's own environments: does what was learned in the jitted ones hold there?

Five of gymnax's environments are rewrites of Gymnasium's: CartPole-v1, Acrobot-v1, Pendulum-v1, MountainCar-v0 and
MountainCarContinuous-v0. Read side by side (gymnax 1.0.1, Gymnasium 1.3.0; a test steps both), they have the same
equations, integrators (an explicit Euler step for CartPole, one Runge-Kutta step of 0.2 s for Acrobot, a semi-implicit
Euler step for the others), rewards, initial distributions, action bounds, termination and time limits, and the time
limit is a truncation in both. They differ in this:

- Precision. gymnax computes in float32, Gymnasium keeps its state in float64 (MountainCarContinuous in float32); only
  its observations are float32. One step agrees to rounding; Acrobot is chaotic, so its trajectories part in the end.
- MountainCarContinuous-v0, left wall. Gymnasium stops a car that runs into it: its velocity becomes 0. gymnax does
  not: the car stays at the wall with the velocity it had, until gravity and force have used that up. So swinging back
  takes longer, and every step costs its action: full force in the direction of the velocity returns 91 in Gymnasium
  and 88 in gymnax (82 in the episodes that meet the wall).
- MountainCarContinuous-v0, goal. gymnax sets a negative velocity beyond the goal to 0, which is then a success with
  its reward of 100. An episode cannot get there: it ends when the car arrives, with a velocity that is not negative.
- Acrobot-v1: an angle of exactly pi is wrapped to -pi by gymnax and kept by Gymnasium; what is observed is the same.
- Steps after the end of an episode (CartPole's reward 0 there): gymnax resets by itself, Gymnasium must be reset.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxrl_dist.configuration import ConfigurationError, require
from jaxrl_dist.learning import portable
from jaxrl_dist.records import recording
from jaxrl_dist.running import best, results


def make(env_id: str) -> Any:
    """Gymnasium's environment with its own time limit; ConfigurationError where it or Gymnasium itself is missing."""
    try:
        import gymnasium
    except ImportError:
        raise ConfigurationError("evaluating in Gymnasium needs the package gymnasium: pip install gymnasium") from None
    try:
        environment = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError) as error:  # an unknown id, or one whose own packages are missing
        raise ConfigurationError(f"--env-id is {env_id!r}, which Gymnasium cannot make: {error}") from None
    require(environment.spec.max_episode_steps is not None, f"--env-id is {env_id!r}, which has no time limit")
    return environment


class Played(NamedTuple):
    """Undiscounted returns of episodes `[episodes]`, and those of each component of a vector of rewards by name."""

    episode_return: np.ndarray
    parts: dict[str, np.ndarray]


def episode_returns(env_id: str, policy: Callable[[np.ndarray], np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """`play` without the components."""
    return play(env_id, policy, seeds).episode_return


def play(env_id: str, policy: Callable[[np.ndarray], np.ndarray], seeds: Sequence[int]) -> Played:
    """One episode for each seed of Gymnasium's environment.

    Rewards may be vectors, as MO-Gymnasium has them, whose sum is then the return, or numbers with a vector in
    `info["rewards"]`, as ours. policy: observations `[batch, *observation]` -> actions in the environment's units,
    `[batch, *action]`. The episodes advance side by side, so the policy is called once per time step for all that still
    run.
    """
    environments = [make(env_id) for _ in seeds]
    starts = zip(environments, seeds, strict=True)
    observations = np.stack([environment.reset(seed=int(seed))[0] for environment, seed in starts])
    returns, vectors = np.zeros(len(environments)), [0.0] * len(environments)
    running = list(range(len(environments)))
    while running:
        actions = policy(observations[running])
        still_running = []
        for index, action in zip(running, actions, strict=True):
            observations[index], reward, terminated, truncated, info = environments[index].step(action)
            returns[index] += np.sum(reward)
            if np.ndim(reward) or "rewards" in info:
                vectors[index] = vectors[index] + np.asarray(info.get("rewards", reward), np.float64)
            if not (terminated or truncated):
                still_running.append(index)
        running = still_running
    for environment in environments:
        environment.close()
    if not np.ndim(vectors[0]):
        return Played(returns, {})
    return Played(returns, {f"rewards_{i}": part for i, part in enumerate(np.stack(vectors).T)})


def evaluate_policy(path: Path, env_id: str, *, episodes: int, seed: int) -> np.ndarray:
    """`play_policy` without the components, `[episodes]`."""
    return play_policy(path, env_id, episodes=episodes, seed=seed).episode_return


def play_policy(path: Path, env_id: str, *, episodes: int, seed: int) -> Played:
    """Episodes of a policy file of `portable.save_policy` in Gymnasium's `env_id`.

    The same file and `seed` play the same episodes again. ConfigurationError where the file or the environment is
    missing, or where they do not fit together.
    """
    require(episodes >= 1, f"--episodes is {episodes}; it must be at least 1")
    require(seed >= 0, f"--seed is {seed}; it must be at least 0")
    require(path.is_file(), f"RUN is {path}, which does not exist")
    _require_fit(path, make(env_id))
    # Two files of a run (seed_0, seed_1) get other episodes.
    seeds = np.random.SeedSequence([seed, *path.stem.encode()]).generate_state(episodes)
    return play(env_id, portable.load_policy(path), seeds)


def _require_fit(path: Path, environment: Any) -> None:
    """ConfigurationError unless the policy takes the environment's observations and gives actions within its bounds."""
    from gymnasium import spaces

    space, env_id = environment.action_space, environment.spec.id
    arrays, policy = portable.load_arrays(path), portable.load_policy(path)
    try:
        action = policy(np.stack([environment.reset(seed=0)[0]]))[0]
    except (ValueError, TypeError):  # a matrix product of the wrong size; no array at all
        observed = environment.observation_space
        raise ConfigurationError(
            f"RUN is {path}, whose policy cannot take the observations of {env_id}, {observed}"
        ) from None
    if "num_actions" in arrays:
        gives = f"one of {arrays['num_actions']} actions"
        fits = isinstance(space, spaces.Discrete) and (space.start, space.n) == (0, arrays["num_actions"])
    elif "action_counts" in arrays and "action_low" not in arrays:
        gives = f"one of {arrays['action_counts'].tolist()} choices each"
        fits = isinstance(space, spaces.MultiDiscrete) and np.array_equal(space.nvec, arrays["action_counts"])
        fits = fits and not space.start.any()
    else:
        low, high = arrays["action_low"], arrays["action_high"]
        gives = f"actions of shape {action.shape} from {low} to {high}"
        fits = isinstance(space, spaces.Box) and action.shape == space.shape
        fits = fits and bool((low >= space.low).all() and (high <= space.high).all())
    require(fits, f"RUN is {path}, whose policy gives {gives}, but the actions of {env_id} are {space}")


# -- against our own evaluation ---------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Of two means, with its bootstrap interval (NaN where a mean is of fewer than two episodes)."""

    mean: float
    low: float
    high: float


def difference_of_means(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Mean return in `first` less that in `second`, of the same policies: `[episodes]` of each, averaged over policies.

    Percentile bootstrap: the policies are given, so only episodes are resampled, those of each policy and of each of
    the two evaluations apart.
    """
    generator = np.random.default_rng(seed)

    def resampled_means(returns: np.ndarray) -> np.ndarray:
        return returns[generator.integers(len(returns), size=(resamples, len(returns)))].mean(1)

    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(first, second, strict=True)]
    mean = np.mean([a.mean() - b.mean() for a, b in pairs])
    if min(len(x) for pair in pairs for x in pair) < 2:
        return Difference(float(mean), np.nan, np.nan)
    resampled = np.mean([resampled_means(a) - resampled_means(b) for a, b in pairs], axis=0)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(float(mean), float(low), float(high))


class Comparison(NamedTuple):
    """Returns of a run's policies in Gymnasium and as our own last evaluation recorded them, both per seed; parts: in
    Gymnasium, of each component of a vector of rewards `[seeds, episodes]` by name."""

    env_id: str
    seeds: list[int]
    gymnasium: list[np.ndarray]
    recorded: list[np.ndarray]
    parts: dict[str, np.ndarray]


def evaluate_run(folder: Path, *, episodes: int, seed: int, policy: Literal["last", "best"] = "last") -> Comparison:
    """Play the policies that a finished run saved in Gymnasium's environment of the same name.

    policy: the last ones, beside their last evaluation, or the best ones, beside the new episodes that they played when
    the run ended.

    Where actions were cut into bins, `discretised/NAME`, the policies give values in NAME's own bounds; `mujoco/NAME`
    is Gymnasium's own NAME.
    """
    saved = recording.read_config(folder, {"options.seed": int, "options.num_seeds": int, "options.env_options": list})
    options = saved["options"]
    require(options["num_seeds"] >= 1, f"{folder / 'config.json'}: options.num_seeds is {options['num_seeds']}")
    require(not saved.get("configurations"), f"RUN is {folder}, a wave of a study; give one of its policies instead")
    seeds = list(range(options["seed"], options["seed"] + options["num_seeds"]))
    results.require_policy(policy, folder, options.get("keep_best", False))
    place = folder / "policies" / (best.FOLDER if policy == "best" else "")
    paths = [place / f"seed_{number}.npz" for number in seeds]
    require(paths[-1].is_file(), f"RUN is {folder}, which holds no policies yet: a run saves them when it ends")
    if policy == "best":
        last = best.read_episodes(folder)
    else:
        records = recording.read_evaluations(folder)
        axis = recording.axis_of(records)
        last = records[records[axis] == records[axis].max()]
    env_id = options["env_id"].removeprefix("discretised/").removeprefix("mujoco/")
    missing = sorted({*seeds} - {*last.seed})
    require(not missing, f"{folder / 'evaluations.csv'} lacks seeds {missing} at its last evaluation")
    played = [play_policy(path, env_id, episodes=episodes, seed=seed) for path in paths]
    return Comparison(
        env_id, seeds, [found.episode_return for found in played],
        [last.episode_return[last.seed == number].to_numpy() for number in seeds],
        {name: np.stack([found.parts[name] for found in played]) for name in played[0].parts},
    )  # fmt: skip


def print_policy(path: Path, env_id: str, console: Console, *, episodes: int, seed: int) -> None:
    """Evaluate one policy file and print its table."""
    found = play_policy(path, env_id, episodes=episodes, seed=seed)
    console.print(f"{path} in Gymnasium's {env_id}")
    parts = {name: values[None] for name, values in found.parts.items()}
    results.print_results(console, [path.stem], found.episode_return[None], parts=parts)


def print_run(
    folder: Path, console: Console, *, episodes: int, seed: int, policy: Literal["last", "best"] = "last"
) -> None:
    """Evaluate a run's policies and print their table, and beside our own evaluation."""
    found = evaluate_run(folder, episodes=episodes, seed=seed, policy=policy)
    console.print(f"{folder} in Gymnasium's {found.env_id}")
    results.print_results(console, found.seeds, np.stack(found.gymnasium), parts=found.parts)
    table = Table(
        "seed", "Gymnasium", f"our {'last evaluation' if policy == 'last' else 'new episodes'}", "difference",
        "95 % interval",
        title=f"mean returns of {episodes} and of {len(found.recorded[0])} episodes",
    )  # fmt: skip
    rows = {str(number): [i] for i, number in enumerate(found.seeds)}
    finite = [i for i, returns in enumerate(found.recorded) if np.isfinite(returns).all()]
    if len(rows) > 1 and finite:
        rows["all" if len(finite) == len(rows) else f"{len(finite)} finite"] = finite
    for name, chosen in rows.items():
        theirs, ours = ([returns[i] for i in chosen] for returns in (found.gymnasium, found.recorded))
        means = (np.mean([x.mean() for x in returns]) for returns in (theirs, ours))
        difference, low, high = difference_of_means(theirs, ours)
        table.add_row(name, *(f"{x:.1f}" for x in means), f"{difference:+.1f}", f"[{low:+.1f}, {high:+.1f}]")
    console.print(table)
    changed = recording.read_config(folder)["options"]["env_options"]
    if changed:
        console.print(
            f"[yellow]the run had --env-options {' '.join(changed)}; Gymnasium's environment has its own settings"
        )

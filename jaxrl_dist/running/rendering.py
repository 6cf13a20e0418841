"""Watch an agent: episodes of a saved run as moving pictures, with what it believes about its return under them.

`play` records episodes of a policy in one compiled program: states, rewards, and at each step the law of the return
that the critic predicts for the action taken. Everything is drawn afterwards, on the CPU and without a screen, so
rendering never happens in training. How an environment looks is said by its own `picture(state, params)`, or by
`envs/drawings.py`.

The episodes are those of `jaxrl-dist evaluate` with the same `--seed` and `--episodes`. Beside each prediction stands
the discounted return that then followed. A critic that bootstraps at time limits predicts the return of the task
without one, so the episode is played on beyond what is shown, until less than 1 % of the discounted weight is left;
where that cannot be, marks are hollow.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxrl_dist import outside
from jaxrl_dist.agent import Agent, nothing_to_remember
from jaxrl_dist.configuration import require
from jaxrl_dist.distributional.law import Law
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.keys import is_key
from jaxrl_dist.records import films
from jaxrl_dist.records.films import Episode, Film
from jaxrl_dist.running import evaluation, folders, results, training
from jaxrl_dist.running.catalog import display_name
from jaxrl_dist.wording import alternatives, counted

FORMATS = (".gif", ".html", ".mp4")
Which = Literal["all", "best", "median", "worst"]
"""Which of the episodes that were played are shown."""


class Options(NamedTuple):
    """What is played and how it is shown."""

    seeds: tuple[int, ...] = ()
    """of the run, side by side; (): all, up to 4"""
    policy: Literal["last", "best"] = "last"
    """the last policies, or the best ones of a run that kept them"""
    episodes: int = 1
    """played by each seed"""
    episode: Which = "all"
    """shown of them: one after the other, or the one of the best, median or worst return"""
    seed: int = 0
    """of starts, steps and actions, as of `jaxrl-dist evaluate`"""
    max_steps: int = 0
    """shown of an episode; 0: all"""
    every: int = 1
    """steps from one picture to the next; the last one of an episode is always shown"""
    fps: float = 0.0
    """pictures per second; 0: 30, fewer for episodes that would be over in less than six seconds"""
    scale: float = 1.0
    """size; at 1 a seed is 320 pixels wide"""
    explore: bool = False
    """show the policy that the critic's claim is about, in place of the evaluated one"""
    observations: bool = False
    """draw what the agent sees in place of the environment"""
    mujoco: bool = False
    """draw bodies of MuJoCo by its own renderer, which needs EGL or OSMesa"""
    viewer: bool = False
    """make brax's own page, in which one can turn the camera; a browser loads its scripts from the network"""


class Played(NamedTuple):
    """An episode, and what it is good to know about it.

    observations: `[T + 1, ...]`. missing: `[T]`, the part of the discounted weight of what followed that was not
    played. other: part of the steps at which the policy that the critic's claim is about would do something else, or
    be paid a bonus.
    """

    episode: Episode
    observations: np.ndarray
    missing: np.ndarray
    other: float


# -- playing ----------------------------------------------------------------------------------------------------------


def player(agent: Agent, env: Any, env_params: Any, options: Options, *, limit: int) -> Callable[..., list[Played]]:
    """`play(state, key) -> episodes` of one run's agent state; compiled once for all runs.

    limit: steps after which an episode ends at the latest, `evaluation.episode_limit`. The evaluated policy plays the
    episodes of `evaluation.evaluate` with the same key.
    """
    claim = agent.claim
    require(
        not options.explore or claim is not None,
        "--explore is for agents that make a claim about returns; this one makes none",
    )
    steps = min(limit, options.max_steps or limit)
    endless = evaluation.without_time_limit(env, env_params) if claim else None
    further = int(evaluation.horizon(claim.discount)) if endless is not None else 0
    record = jax.jit(
        functools.partial(
            _record, agent, env, env_params, env_params if endless is None else endless, options, steps, further
        )
    )
    judge = jax.jit(
        lambda state, key: (
            evaluation.evaluate(
                agent, env, env_params, state, key, episodes=options.episodes, max_steps=limit
            ).episode_return
        )
    )

    def play(state: Any, key: jax.Array) -> list[Episode]:
        lanes = np.arange(options.episodes)
        if options.episode != "all":
            returns = np.asarray(judge(state, jax.random.clone(key)))
            order = np.argsort(returns, kind="stable")
            place = {"worst": 0, "median": (len(order) - 1) // 2, "best": len(order) - 1}[options.episode]
            lanes = order[place : place + 1]
        found = _arrays(record(state, key, lanes))
        return [_episode(found, lane, claim, steps, limit) for lane in range(len(lanes))]

    return play


class _Step(NamedTuple):
    """What is recorded of a step, leaves `[steps, lanes, ...]`; `after` is the true successor, `known` if it is."""

    after: Any
    known: jax.Array
    next_observation: jax.Array
    raw_reward: jax.Array
    predicted: Any
    other: jax.Array


class _Paid(NamedTuple):
    """What returns are made of, `[steps + further, lanes]`."""

    reward: jax.Array
    bonus: jax.Array
    terminated: jax.Array
    truncated: jax.Array


def _record(agent: Agent, env, env_params, endless, options: Options, steps: int, further: int, state, key, lanes):
    """First states and observations `[lanes, ...]`, then every step; keys are split as `evaluation.evaluate` does."""
    claim, policy, episodes = agent.claim, agent.policy, options.episodes
    remember = nothing_to_remember if options.explore else policy.start
    start_key, loop_key = jax.random.split(key)
    if agent.adapt:
        start_key, adapt_key = jax.random.split(start_key)
        state = agent.adapt(state, env_params, adapt_key)
    chosen = functools.partial(jax.tree.map, lambda x: x[lanes])

    def follow(now, time):
        """One step; also its key again, and what the claim says of it."""
        act_key, step_key = jax.random.split(jax.random.fold_in(loop_key, time))
        bonus = other = jnp.zeros(episodes)
        if options.explore:
            (action, bonus), memory = claim.policy(state, now.observation, act_key), ()
        else:
            action, memory = policy.act(state, now.observation, now.memory, act_key)
            if claim:
                # Only whether it differs is asked, so any key will do.
                else_done, else_paid = claim.policy(state, now.observation, jax.random.fold_in(jax.random.key(0), time))
                differs = (else_done != action).reshape(episodes, -1).any(-1) | (else_paid != 0)
                other = differs.astype(jnp.float32)
        again = jax.random.clone(step_key)
        following, lived, _ = interaction.step(env, endless, now, action, step_key, memory, remember)
        paid = _Paid(lived.reward, bonus, lived.terminated, lived.truncated)
        return following, lived, paid, action, other, again

    def shown(now, time):
        following, lived, paid, action, other, again = follow(now, time)
        after, known = following.environment, jnp.zeros(episodes, bool)
        if hasattr(env, "step_env"):
            keys = jax.vmap(lambda key: jax.random.split(key)[0])(jax.random.split(again, episodes))
            seen, after, *_ = jax.vmap(env.step_env, in_axes=(0, 0, 0, None))(keys, now.environment, action, endless)
            after = jax.tree.map(lambda x, like: x if is_key(x) else x.astype(like.dtype), after, now.environment)
            # The same but for rounding: an environment may draw by other keys than its `step`.
            close = jnp.isclose(*(jnp.asarray(x, jnp.float32) for x in (seen, lived.next_observation)), 1e-3, 1e-4)
            known = close.reshape(episodes, -1).all(-1)
        predicted = claim.law(state, chosen(now.observation), chosen(action)) if claim else ()
        step = _Step(after, known, lived.next_observation, interaction.raw_reward(lived), (), other)
        return following, (chosen(step)._replace(predicted=predicted), chosen(paid))

    def beyond(now, time):
        following, _, paid, *_ = follow(now, time)
        return following, chosen(paid)

    now = interaction.start(env, endless, start_key, episodes, remember)
    first = chosen((now.environment, now.observation))
    now, (lived, paid) = jax.lax.scan(shown, now, jnp.arange(steps))
    if further:
        _, rest = jax.lax.scan(beyond, now, steps + jnp.arange(further))
        paid = jax.tree.map(lambda *parts: jnp.concatenate(parts), paid, rest)
    return first, lived, paid


def _arrays(tree: Any) -> Any:
    return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), tree)


def _episode(found: tuple, lane: int, claim: Any, steps: int, limit: int) -> Played:
    """One lane of what `_record` found, up to its end."""
    first, lived, paid = found
    paid = _Paid(*(np.asarray(x[:, lane]) for x in paid))
    ends = np.flatnonzero(paid.terminated | paid.truncated)
    played = int(ends[0]) + 1 if len(ends) else len(paid.reward)
    count = min(played, steps)
    terminated = bool(paid.terminated[played - 1])
    lived = jax.tree.map(lambda x: x[:count, lane], lived)
    end = "cut short" if steps < limit else "time limit"
    if played <= steps and len(ends):
        end = "ended" if terminated else "time limit"

    # After the last step environments begin anew; where they ended is known of those that can step without that.
    until = count if lived.known[-1] else count - 1

    def with_first(begin, later):
        join = jnp.concatenate if is_key(begin) else np.concatenate
        return join([begin[lane][None], later[:until]])

    states = jax.tree.map(with_first, first[0], lived.after)
    observations = np.concatenate([first[1][lane][None], lived.next_observation])
    followed = missing = np.zeros(0)
    predicted = None
    if claim:
        discount = float(claim.discount)
        followed = returns_of(paid.reward[:played], paid.bonus[:played], discount, claim.of_states)[:count]
        missing = np.zeros(count) if terminated else discount ** (played - np.arange(count, dtype=float))
        predicted = Law(*np.broadcast_arrays(*(np.asarray(x, np.float64) for x in lived.predicted)))
    episode = Episode(states, lived.raw_reward, predicted, followed, missing <= evaluation.NEGLIGIBLE_WEIGHT, end)
    return Played(episode, observations, missing, float(lived.other.mean()))


def returns_of(reward: np.ndarray, bonus: np.ndarray, discount: float, of_states: bool = False) -> np.ndarray:
    """Discounted return from each step on, `[steps]`, in float64; the bonus of its own step counts in claims about
    states only."""
    followed, later = np.zeros(len(reward)), 0.0
    for step in reversed(range(len(reward))):
        followed[step] = reward[step] + of_states * bonus[step] + discount * later
        later = reward[step] + bonus[step] + discount * later
    return followed


# -- films ------------------------------------------------------------------------------------------------------------


def of_run(folder: Path, find_algorithm: Callable, options: Options, say: Callable[[str], None]) -> Film:
    """The newest checkpoint of a run, played; what is worth saying goes to `say`, a line each."""
    check(options)
    run = results.load_run(folder, find_algorithm, episodes=1, policy=options.policy)
    problem, held = run.problem, [int(seed) for seed in run.seeds]
    missing = sorted(set(options.seeds) - set(held))
    require(not missing, f"--seeds has {', '.join(map(str, missing))}; the run holds the seeds {held}")
    seeds = options.seeds or tuple(held[: films.IN_A_ROW])
    if not options.seeds and len(held) > films.IN_A_ROW:
        say(f"the run has {len(held)} seeds; the first {films.IN_A_ROW} are shown (--seeds chooses)")
    env, env_params, agent = problem.env, problem.env_params, problem.agent()
    draw = _picture_of(env, env_params, options)
    limit = evaluation.episode_limit(env_params, problem.options.eval_max_steps)
    play = player(agent, env, env_params, options, limit=limit)
    keys = jax.random.split(jax.random.key(options.seed), len(held))
    states, columns = training.without_replay(run.state.state), []
    for seed in seeds:
        index = held.index(seed)
        columns.append(play(training.one_run(states, index), keys[index]))
        for number, (episode, *_) in enumerate(columns[-1]):
            total = f"return {episode.reward.sum():.1f} in {counted(len(episode.reward), 'step')}, {episode.end}"
            say(f"seed {seed}, {_label(options, number)}: {total}")
    if agent.claim is None:
        say("the algorithm claims nothing about returns, so nothing is drawn under the pictures")
    elif any(played.other > 0 for row in columns for played in row):
        say(
            "what is believed is the return of the policy that the critic learns about, which is not quite the one "
            "that is shown (--explore shows that one)"
        )
    if any(played.episode.pictures == len(played.episode.reward) for row in columns for played in row):
        say("where episodes end is not shown: the environment has no `step_env` that would tell")
    laws = [played.episode.predicted for row in columns for played in row if played.episode.predicted]
    if not all(np.isfinite(law.atoms).all() for law in laws):
        say("what is believed is not finite, and then not drawn")
    if not all(played.episode.seen.all() for row in columns for played in row):
        say("hollow marks: more than 1 % of the discounted weight of what followed was not played")
    title = f"{display_name(problem.algorithm)} on {outside.shown(problem.options.env_id)}"
    clock = agent.clock
    note = "the best policy of" if options.policy == "best" else "after"
    note += f" {clock.now(run.iteration):,} {clock.unit}"
    note += f", discount {float(agent.claim.discount):g}" if agent.claim else ""
    note += ", exploring" if options.explore else ""
    scenes = [[_shown(played, options) for played in scene] for scene in zip(*columns, strict=True)]
    return Film(
        title, note, tuple(f"seed {seed}" for seed in seeds), scenes,
        tuple(_label(options, number) for number in range(len(scenes))), draw,
        bool(agent.claim and agent.claim.learns_mean), options.every, options.fps, options.scale,
    )  # fmt: skip


def _shown(played: Played, options: Options) -> Episode:
    return played.episode._replace(states=played.observations) if options.observations else played.episode


def check(options: Options) -> None:
    """ConfigurationError for what no film can be made with."""
    for name, least in (("episodes", 1), ("every", 1), ("max_steps", 0), ("seed", 0)):
        value = getattr(options, name)
        require(value >= least, f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    require(0 <= options.fps <= 50, f"--fps is {options.fps:g}; it must be in (0, 50], or 0 for what fits")
    require(0.25 <= options.scale <= 4, f"--scale is {options.scale:g}; it must be in [0.25, 4]")
    twice = [seed for seed in set(options.seeds) if options.seeds.count(seed) > 1]
    require(not twice, f"--seeds has {twice} twice")
    require(
        options.episode == "all" or options.episodes > 1,
        f"--episode is {options.episode}, of one; --episodes says of how many",
    )


def _label(options: Options, number: int) -> str:
    if options.episode != "all":
        return f"{options.episode} of {options.episodes} episodes"
    return f"episode {number + 1}" + (f" of {options.episodes}" if options.episodes > 1 else "")


def _picture_of(env: Any, env_params: Any, options: Options) -> Callable[[Any], np.ndarray]:
    from jaxrl_dist.envs import drawings

    if options.observations:
        return drawings.observed
    if options.viewer:
        return drawings.by_brax(env)
    if options.mujoco:
        return drawings.by_mujoco(env)
    drawings.require_picture(env)
    return lambda state: drawings.picture(env, state, env_params)


# -- files ------------------------------------------------------------------------------------------------------------


def render(folder: Path, find_algorithm: Callable, out: Path, console: Console, options: Options) -> None:
    """Play the newest checkpoint of a run and write what is seen to `out`, .gif, .html or .mp4."""
    require_film(out)
    check(options)
    require(
        not options.viewer or out.suffix.lower() == ".html",
        f"--out is {out}; brax's page (--viewer) must end with .html",
    )
    film = of_run(folder, find_algorithm, options, lambda line: console.print(line, markup=False, highlight=False))
    if options.viewer:
        out.write_text(film.picture(film.scenes[0][0].states), encoding="utf-8")
        console.print(f"wrote {out}, brax's page of {film.names[0]}, whose scripts a browser loads from the network")
        return
    stage = films.Stage(film)
    makers = {".gif": films.gif, ".html": lambda stage: films.page(stage).encode(), ".mp4": films.mp4}
    data = makers[out.suffix.lower()](stage)
    out.write_bytes(data)
    count, seconds = len(stage.moments()), sum(films.seconds(stage))
    about = f"{counted(count, 'picture')}, {stage.size[0]} x {stage.size[1]}, {seconds:.0f} s, {len(data) / 1e3:.0f} kB"
    console.print(f"wrote {out} ({about})", soft_wrap=True, highlight=False)


def require_film(out: Path) -> None:
    """ConfigurationError unless `out` can be written and is of a format that we can make."""
    require(out.suffix.lower() in FORMATS, f"--out is {out}; it must end with {alternatives(FORMATS)}")
    folders.require_output(out)
    require(
        out.suffix.lower() != ".mp4" or importlib.util.find_spec("imageio_ffmpeg") is not None,
        f"--out is {out}, which needs the package imageio-ffmpeg: pip install 'jaxrl-dist[video]'",
    )

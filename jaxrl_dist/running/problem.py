"""What is asked for: a run's options, and an algorithm on an environment with every setting checked."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_dist import switches
from jaxrl_dist.agent import Agent
from jaxrl_dist.configuration import (
    LARGEST,
    Bounds,
    ConfigurationError,
    Count,
    Natural,
    Seed,
    check_configuration,
    option,
    require,
)
from jaxrl_dist.learning import interaction
from jaxrl_dist.learning.spaces import bounds_of, kind_of
from jaxrl_dist.running import doctor, evaluation, training

# The host keeps a row of every run for every evaluation.
MOST_RUNS = 1_000_000


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to run and what to keep of it."""

    env_id: str = "Pendulum-v1"
    """environment: a gymnax name, or brax/NAME; `jaxrl-dist list` shows all"""
    env_options: tuple[str, ...] = ()
    """settings of the environment as name=value, such as backend=mjx or max_steps_in_episode=500"""
    preset: str = "auto"
    """named defaults of the algorithm: auto (those for the environment, if any), none, or a name"""
    total_steps: Natural = 0
    """environment steps of every seed, warm-up included; 0: 20,000, or twice the warm-up where that is more"""
    seed: Seed = 0
    """first seed; run i has seed + i and draws the same random numbers whatever the other seeds are"""
    num_seeds: Annotated[int, Bounds(1, MOST_RUNS)] = 4
    """runs with different seeds, trained together in one program"""

    probe_support: Literal["off", "rewards", "returns"] = "off"
    """for algorithms with a fixed support, set v_min and v_max from a random rollout: its smallest and largest rewards
    for ever, or the returns that it found, with a margin"""

    eval_every: Natural = 0
    """environment steps between evaluations; 0: a twentieth of the total"""
    eval_episodes: Count = 20
    """episodes per evaluation and seed"""
    eval_max_steps: Natural = 0
    """longest evaluation episode, for environments without a time limit of their own"""

    eval_states: Natural = 4
    """states per evaluation from which learned return distributions are compared with Monte-Carlo returns
    (calibration_w1, overestimation); 0: no comparison"""
    eval_rollouts: Count = 32
    """Monte-Carlo returns per state"""

    checkpoint_every: Natural = 0
    """environment steps between checkpoints; 0: a quarter of the total"""
    checkpoint_keep: Count = 2
    """newest checkpoints kept"""
    resume: str = ""
    """continue the run called --name: `latest` checkpoint, `auto` (the newest intact one), or an iteration number; with
    a larger --total-steps it is trained longer"""
    damaged_records: Literal["refuse", "keep"] = "refuse"
    """at a resume, where metrics.csv or evaluations.csv are not what was written: refuse, or keep what can be read"""
    on_divergence: Literal["freeze", "stop"] = "freeze"
    """when a metric of a run becomes NaN or infinite: freeze that run at its last finite learner and go on with the
    others, or stop all"""

    name: str = ""
    """name of the run's folder; the date and time if empty"""
    runs_folder: str = "runs"
    """where run folders are made: RUNS_FOLDER/ALGORITHM/ENVIRONMENT/NAME"""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """what to run on; stops if it is not there"""
    compile_cache: str = "auto"
    """where compiled programs are kept for the next start: auto (your cache folder, or JAX_COMPILATION_CACHE_DIR), off,
    or a folder that nobody else can write to, for what is read from it is executed"""
    devices: str = "all"
    """devices of that kind over which runs are spread, evenly: all, or at most so many"""
    data_parallel: bool = False
    """split the environments and batches of every run over the devices, instead of spreading runs over them"""
    distributed: str = "off"
    """with `auto`, this command runs on several processes that JAX finds through SLURM, Cloud TPU, Kubernetes or Open
    MPI; HOST:PORT is where process 0 waits for processes that are started by hand"""
    num_processes: Natural = 0
    """with --distributed HOST:PORT: how many processes there are"""
    process_id: int = -1
    """with --distributed HOST:PORT: number of this process, from 0"""
    memory: Literal["check", "ignore"] = "check"
    """check: refuse a run whose predicted memory is more than there is, or whose checkpoints are more than the disk
    takes; ignore: try it all the same"""
    runs_mode: training.RunsMode = "auto"
    """how the seeds of one device run: vmap (together) or map (one after another, bit for bit as if alone)"""
    plots: bool = True
    """draw the learning curve and the return distributions at the end"""
    tensorboard: bool = False
    """write TensorBoard event files as well"""
    wandb: str = ""
    """weights & biases project to send the metrics to"""


def split_preset(preset: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a preset says of the run (fields of `RunOptions`, such as total_steps), and what of the algorithm."""
    of_the_run = {field.name for field in dataclasses.fields(RunOptions)}
    return (
        {name: value for name, value in preset.items() if name in of_the_run},
        {name: value for name, value in preset.items() if name not in of_the_run},
    )


def with_total_steps(options: RunOptions, *configs: Any) -> RunOptions:
    """The options with the `total_steps` that 0 stands for, the same for all `configs`: an agent has to learn too."""
    longest_warmup = max(config.warmup_steps for config in configs)
    return dataclasses.replace(options, total_steps=options.total_steps or max(20_000, 2 * longest_warmup))


class Problem(NamedTuple):
    """An algorithm on an environment, checked, with the configuration that will really run.

    In a sweep the floats of `config` are arrays `[runs]`, and `configurations` are the numbers of the configurations
    that run together, each with all seeds in turn.
    """

    algorithm: str
    make_agent: Callable
    config: Any
    env: Any
    env_params: Any
    options: RunOptions
    configurations: tuple[int, ...] = ()

    def fitted(self, total_steps: int) -> "Problem":
        """The same problem, whose agents have no more room in their replay than `total_steps` environment steps fill.

        A ring that never wraps holds the same rows at any larger size. `config` stays what was asked for, so that it is
        what is recorded and compared.
        """
        as_written = getattr(self.make_agent, "as_written", self.make_agent)

        def make_agent(config, env, env_params):
            return as_written(_without_spare_room(config, total_steps), env, env_params)

        make_agent.as_written = as_written
        return self._replace(make_agent=make_agent)


def _without_spare_room(config: Any, total_steps: int) -> Any:
    warmup_steps = -(-config.warmup_steps // config.num_envs) * config.num_envs
    per_iteration = config.num_envs * getattr(config, "steps_per_iteration", 1)
    needed = warmup_steps + max(0, -(-(total_steps - warmup_steps) // per_iteration)) * per_iteration
    return config if config.replay_capacity <= needed else dataclasses.replace(config, replay_capacity=needed)


def prepare(algorithm: str, make_agent: Callable, config: Any, options: RunOptions) -> Problem:
    """Check every setting before anything compiles; raises ConfigurationError (or ValueError) with one clear line."""
    check_configuration(options)
    check_configuration(config)
    options = with_total_steps(options, config)
    doctor.require_platform(options.device)
    switches.settle()
    device_count(options)
    env, env_params = _make_env(options)
    if options.probe_support != "off":
        config = _with_probed_support(config, options)
    if options.data_parallel:
        _check_data_parallel(config, device_count(options))
    problem = Problem(algorithm, make_agent, config, env, env_params, options).fitted(options.total_steps)
    agent = problem.make_agent(config, env, env_params)
    _check_counters(agent, options, evaluation.episode_limit(env_params, options.eval_max_steps))
    if options.resume:
        require(
            options.resume in ("latest", "auto") or options.resume.isdecimal(),
            f"--resume is {options.resume!r}; it must be 'latest', 'auto' or an iteration number",
        )
        require(options.name != "", "--resume needs --name, the run to continue")
    return problem


def _make_env(options: RunOptions) -> tuple[Any, Any]:
    from jaxrl_dist import envs  # the toolkit knows the environments by name only

    env_options = _parse_env_options(options.env_options)
    try:
        return envs.make(options.env_id, **env_options)
    except Exception as error:  # whatever an environment's own code makes of an odd value
        if isinstance(error, OSError) or not (env_options or isinstance(error, ValueError)):
            raise
        given = " ".join(["--env-id", options.env_id, *["--env-options"][: len(env_options)], *options.env_options])
        raise ConfigurationError(f"{given}: {str(error) or type(error).__name__}") from error


def _check_counters(agent: Agent, options: RunOptions, episode_limit: int) -> None:
    """Refuse what would overflow a counter on the device, or wrap around to another seed."""
    last_seed = options.seed + options.num_seeds - 1
    require(
        last_seed < 2**32,
        f"--seed is {options.seed} and --num-seeds {options.num_seeds}, so the last seed is {last_seed}; it must be "
        "below 2^32, where JAX would begin again at 0",
    )
    iterations = training.iterations_for(agent, options.total_steps)
    env_steps = agent.warmup_steps + iterations * agent.steps_per_iteration
    updates = iterations * agent.updates_per_iteration
    require(
        env_steps <= LARGEST,
        f"--total-steps is {options.total_steps}, {env_steps} in whole iterations; at most {LARGEST} can be counted",
    )
    require(
        updates <= LARGEST,
        f"--updates-per-iteration is {agent.updates_per_iteration}, {updates} updates in all; at most {LARGEST} can be "
        "counted",
    )
    # `evaluation.return_distributions` multiplies a state's number by the steps over which states are spread.
    most = min(math.isqrt(LARGEST), LARGEST // max(1, episode_limit // 4))
    require(
        options.eval_states <= most,
        f"--eval-states is {options.eval_states}; with episodes of up to {episode_limit} steps it must be at most "
        f"{most}",
    )


def device_count(options: RunOptions) -> int:
    """The most devices that runs may be spread over; more than there are is an error.

    With several processes each of them takes as many devices, and as many seeds, as the others.
    """
    there, processes = jax.device_count(), jax.process_count()
    require(
        options.devices == "all" or (options.devices.isdecimal() and processes <= int(options.devices) <= there),
        f"--devices is {options.devices}; it must be all or a number from {processes} to {there}, the devices that "
        "there are",
    )
    count = there if options.devices == "all" else int(options.devices)
    if options.data_parallel:
        require(count % processes == 0, f"--devices is {count}; it must be a multiple of the {processes} processes")
    else:
        require(
            options.num_seeds % processes == 0,
            f"--num-seeds is {options.num_seeds}; with {processes} processes it must be a multiple of {processes}, so "
            "that each of them holds some",
        )
    return count


def _check_data_parallel(config: Any, devices: int) -> None:
    for field in ("num_envs", "batch_size"):
        rows = getattr(config, field)
        require(
            rows % devices == 0,
            f"{option(field)} is {rows}; with --data-parallel it must be a multiple of the {devices} devices over "
            "which it is split (--devices says how many)",
        )


def _with_probed_support(config: Any, options: RunOptions) -> Any:
    """The configuration with v_min and v_max that cover what a random policy sees (`--probe-support`)."""
    require(
        hasattr(config, "v_min"),
        f"--probe-support is {options.probe_support}; it is for algorithms with a fixed support (--v-min, --v-max)",
    )
    rewards, ended = _random_rewards(options.env_id, options.env_options, options.seed)
    if options.probe_support == "rewards":
        # For as long as the discount lets rewards count, which is beyond any time limit: targets bootstrap there.
        require(config.discount < 1, "--probe-support is rewards; it needs --discount below 1")
        low, high = (float(bound) / (1 - config.discount) for bound in (rewards.min(), rewards.max()))
        low, high = (min(low, 0.0), max(high, 0.0)) if ended.any() else (low, high)
    else:
        returns, following = np.zeros_like(rewards), np.full(rewards.shape[1], np.nan)  # unfinished episodes: NaN
        for time in reversed(range(len(rewards))):
            returns[time] = following = rewards[time] + config.discount * np.where(ended[time], 0, following)
        require(
            bool(np.isfinite(returns).any()),
            f"--probe-support is returns, but no episode ended in {len(rewards)} random steps; use rewards",
        )
        low, high = float(np.nanmin(returns)), float(np.nanmax(returns))
        low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    require(low < high, f"--probe-support is {options.probe_support}, but random actions found no reward but {low:g}")
    return dataclasses.replace(config, v_min=low, v_max=high)


@functools.lru_cache(maxsize=1)  # all configurations of a sweep ask for the same one
def _random_rewards(env_id: str, env_options: tuple[str, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from jaxrl_dist import envs

    env, env_params = envs.make(env_id, **_parse_env_options(env_options))
    return tuple(map(np.asarray, jax.jit(_random_rollout, static_argnums=0)(env, env_params, np.uint32(seed))))


def _random_rollout(env, env_params, seed, steps: int = 1_000, num_envs: int = 32):
    """Rewards of uniform random actions, and where episodes ended: both `[steps, num_envs]`."""
    start_key, loop_key = jax.random.split(jax.random.key(seed))

    def one(batch, time):
        action_key, step_key = jax.random.split(jax.random.fold_in(loop_key, time))
        action = interaction.random_action(env, env_params, action_key, num_envs)
        batch, transition, _ = interaction.step(env, env_params, batch, action, step_key)
        return batch, (transition.reward, transition.terminated | transition.truncated)

    return jax.lax.scan(one, interaction.start(env, env_params, start_key, num_envs), jnp.arange(steps))[1]


def _parse_env_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        require(bool(name and equals), f"--env-options has {pair!r}; each one must be name=value")
        require(name not in found, f"--env-options gives {name} twice; give it once")
        try:
            number = float(value)
        except ValueError:  # a name
            number = 0.0
        require(
            abs(number) <= LARGEST, f"--env-options has {pair!r}; a number must be finite and at most {LARGEST} in size"
        )
        found[name] = value
    return found


def action_bounds(env, env_params) -> tuple[np.ndarray, ...]:
    """The environment's own action bounds (low, high), behind the rescaling of `envs.make`; () for discrete actions."""
    space = (env.env if hasattr(env, "inner_action") else env).action_space(env_params)
    return bounds_of(space) if kind_of(space) == "continuous" else ()

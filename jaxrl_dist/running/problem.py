"""What is asked for: a run's options, and an algorithm on an environment with every setting checked."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np

from jaxrl_dist import outside, switches
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
from jaxrl_dist.learning import datasets
from jaxrl_dist.learning.interaction import Interaction
from jaxrl_dist.learning.settings import Settings
from jaxrl_dist.learning.spaces import SEVERAL, bounds_of, counts_of, kind_of
from jaxrl_dist.running import doctor, evaluation, support, training

# The host keeps a row of every run for every evaluation.
MOST_RUNS = 1_000_000


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to run and what to keep of it."""

    env_id: str = "Pendulum-v1"
    """environment: a name that `jaxrl-dist list` shows, or your own as path/file.py:name or module:name (a class, an
    instance, or a function that makes one)"""
    env_options: tuple[str, ...] = ()
    """settings of the environment as name=value, such as backend=mjx or max_steps_in_episode=500"""
    preset: str = "auto"
    """named defaults of the algorithm: auto (those for the environment, if any), none, or a name"""
    dataset: str = ""
    """for algorithms that learn from recorded transitions: their file (.npz with D4RL's names)"""
    total_steps: Natural = 0
    """environment steps of every seed, warm-up included; 0: 20,000, or twice the warm-up where that is more. Of
    algorithms that take no environment steps: their updates"""
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

    stop_at: str = ""
    """end the run at the first evaluation in which the mean return of every seed (but diverged ones) is at least this
    number, as if --total-steps were reached there; empty: never"""
    keep_best: bool = False
    """keep the best policy of every seed beside the last, by its evaluations, and let it play new episodes at the end,
    since the evaluation that chose it flatters"""

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
    """devices of that kind over which runs are spread, evenly: all, or at most so many. On a CPU these are its cores,
    and 1 is the fastest for one seed of a small network"""
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
    longest_warmup = max((config.warmup_steps for config in configs if isinstance(config, Settings)), default=0)
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
    data: tuple = ()
    """what `make_agent` takes besides; nothing, or one pytree of arrays"""

    def agent(self, config: Any = None) -> Agent:
        """The agent of a configuration, by default the problem's own."""
        return self.make_agent(self.config if config is None else config, self.env, self.env_params, *self.data)

    def fitted(self, total_steps: int) -> "Problem":
        """The same problem, whose agents have no more room in their replay than `total_steps` environment steps fill.

        A ring that never wraps holds the same rows at any larger size. `config` stays what was asked for, so that it is
        what is recorded and compared.
        """
        as_written = getattr(self.make_agent, "as_written", self.make_agent)
        if not isinstance(self.config, Settings):
            return self

        def make_agent(config, *world):
            return as_written(config.fitted(total_steps), *world)

        make_agent.as_written = as_written
        return self._replace(make_agent=make_agent)


def prepare(algorithm: str, make_agent: Callable, config: Any, options: RunOptions) -> Problem:
    """Check every setting before anything compiles; raises ConfigurationError (or ValueError) with one clear line."""
    check_configuration(options)
    check_configuration(config)
    options = dataclasses.replace(with_total_steps(options, config), env_id=outside.absolute(options.env_id))
    doctor.require_platform(options.device)
    switches.settle()
    device_count(options)
    env, env_params = make_env(options.env_id, options.env_options)
    if options.probe_support != "off":
        support.require_support(config, options.probe_support)
        seen = _random_rewards(options.env_id, options.env_options, options.seed)
        config = support.covering(config, options.probe_support, *seen)
    problem = Problem(algorithm, make_agent, config, env, env_params, options)
    problem = problem._replace(data=_data(problem))
    problem = problem.fitted(options.total_steps)
    agent = problem.agent()
    if options.data_parallel:
        _check_data_parallel(agent, config, device_count(options))
    _check_counters(agent, options, evaluation.episode_limit(env_params, options.eval_max_steps))
    _check_choosing(agent, options)
    if options.resume:
        require(
            options.resume in ("latest", "auto") or options.resume.isdecimal(),
            f"--resume is {options.resume!r}; it must be 'latest', 'auto' or an iteration number",
        )
        require(options.name != "", "--resume needs --name, the run to continue")
    return problem


def make_env(env_id: str, pairs: tuple[str, ...]) -> tuple[Any, Any]:
    """Environment and parameters of --env-id and --env-options; ConfigurationError in one line where there is none."""
    from jaxrl_dist import envs  # the toolkit knows the environments by name only

    env_options = _parse_env_options(pairs)
    try:
        return envs.make(env_id, **env_options)
    except ConfigurationError:
        raise
    except Exception as error:  # whatever an environment's own code makes of an odd value
        if isinstance(error, OSError) or not (env_options or isinstance(error, ValueError)):
            raise
        given = " ".join(["--env-id", env_id, *["--env-options"][: len(env_options)], *pairs])
        raise ConfigurationError(f"{given}: {str(error) or type(error).__name__}") from error


def _check_counters(agent: Agent, options: RunOptions, episode_limit: int) -> None:
    """Refuse what would overflow a counter on the device, or wrap around to another seed."""
    last_seed = options.seed + options.num_seeds - 1
    require(
        last_seed < 2**32,
        f"--seed is {options.seed} and --num-seeds {options.num_seeds}, so the last seed is {last_seed}; it must be "
        "below 2^32, where JAX would begin again at 0",
    )
    clock = agent.clock
    iterations = clock.iterations(options.total_steps)
    now, updates = clock.now(iterations), clock.updates_at(iterations)
    require(
        now <= LARGEST,
        f"--total-steps is {options.total_steps}, {now} in whole iterations; at most {LARGEST} can be counted",
    )
    require(
        updates <= LARGEST,
        f"--updates-per-iteration is {clock.updates}, {updates} updates in all; at most {LARGEST} can be counted",
    )
    # `evaluation.return_distributions` multiplies a state's number by the steps over which states are spread.
    most = min(math.isqrt(LARGEST), LARGEST // max(1, episode_limit // 4))
    require(
        options.eval_states <= most,
        f"--eval-states is {options.eval_states}; with episodes of up to {episode_limit} steps it must be at most "
        f"{most}",
    )


def stop_target(options: RunOptions) -> float | None:
    """The return of --stop-at; None where it is empty. ConfigurationError unless it is a finite number."""
    if not options.stop_at:
        return None
    try:
        target = float(options.stop_at)
    except ValueError:
        target = math.nan
    require(
        math.isfinite(target), f"--stop-at is {options.stop_at!r}; it must be a finite number, a mean episode return"
    )
    return target


def _check_choosing(agent: Agent, options: RunOptions) -> None:
    """Refuse --stop-at and --keep-best where no evaluation comes before the last one, to decide by."""
    stop_target(options)
    given = ["--stop-at"] * bool(options.stop_at) + ["--keep-best"] * options.keep_best
    if given and options.eval_every:
        require(
            agent.clock.interval(options.eval_every) < agent.clock.iterations(options.total_steps),
            f"--eval-every is {options.eval_every}, so {' and '.join(given)} would have no evaluation to decide by "
            f"before the last, at --total-steps {options.total_steps}; it must be less",
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


def _check_data_parallel(agent: Agent, config: Any, devices: int) -> None:
    state = jax.eval_shape(agent.init, jax.random.key(0))
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Interaction))
    counts = [("num_envs", node.episode_return.shape[0]) for node in nodes if isinstance(node, Interaction)]
    if isinstance(config, Settings):
        counts.append(("batch_size", config.batch_size))
    for field, rows in counts:
        require(
            rows % devices == 0,
            f"{option(field)} is {rows}; with --data-parallel it must be a multiple of the {devices} devices over "
            "which it is split (--devices says how many)",
        )


def takes_data(make_agent: Callable) -> bool:
    """Whether the algorithm learns from given arrays: a fourth argument of its `make_agent`."""
    return len(inspect.signature(make_agent).parameters) > 3


def _data(problem: Problem) -> tuple:
    """What the algorithm learns from beside an environment, out of --dataset; () where it takes nothing."""
    wanted, options = takes_data(problem.make_agent), problem.options
    require(bool(options.dataset) or not wanted, "--dataset is missing; this algorithm learns from a file of data")
    require(wanted or not options.dataset, f"--dataset is {options.dataset!r}; this algorithm learns from none")
    if not wanted:
        return ()
    path = Path(options.dataset)
    data = datasets.load(path)
    datasets.require_of(data, problem.env, problem.env_params, path, options.env_id)
    return (data,)


@functools.lru_cache(maxsize=1)  # all configurations of a sweep ask for the same one
def _random_rewards(env_id: str, env_options: tuple[str, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    from jaxrl_dist import envs

    return support.random_rewards(*envs.make(env_id, **_parse_env_options(env_options)), seed)


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
    """The environment's own action bounds (low, high), behind the rescaling of `envs.make`; () for discrete actions.

    Of continuous actions in bins (low, high, number of bins), each `[factors]`.
    """
    taken = env.action_space(env_params)
    while hasattr(env, "inner_action"):
        env = env.env
    space = env.action_space(env_params)
    if kind_of(space) != "continuous":
        return ()
    return (*bounds_of(space), counts_of(taken)) if kind_of(taken) == SEVERAL else bounds_of(space)

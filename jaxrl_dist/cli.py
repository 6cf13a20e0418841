"""The command line: `python algorithms/FAMILY/NAME.py ...`, and `jaxrl-dist` with one of `COMMANDS`.

Algorithms and environments are found by name and imported only when asked for. Whatever ends a command is one line on
stderr, `error: ...`, and exit code 2 (bad input), 1 (it broke) or 130 (Ctrl-C); a traceback is a bug of ours.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jaxrl_dist import outside
from jaxrl_dist.configuration import ConfigurationError, Count, Seed, check_value, require
from jaxrl_dist.running import arguments as words_of
from jaxrl_dist.running.catalog import agents, algorithms, display_name, find_algorithm, title
from jaxrl_dist.wording import alternatives, counted, nearest

BROKEN = 1
USAGE_ERROR = 2
INTERRUPTED = 130
COMMANDS = ("list", "train", "evaluate", "collect", "plot", "render", "report", "compare", "doctor")


def main(config_type: type, make_agent: Callable, presets: Mapping[str, Mapping[str, Any]], arguments=None) -> None:
    """Entry point of an algorithm file: parse options, train; exits with 1 (broke), 2 (bad input) or 130 (Ctrl-C).

    The environment's preset, if there is one, becomes the defaults; options given on the command line override it. A
    preset may also set options of the run, such as total_steps. The first preset is that of the default environment.
    With `--sweep.FIELD VALUES...` every combination of the values is trained (`study`), or what Optuna proposes of them
    (`optuna_study`). With `--distributed` the same command runs on several processes (`hosts`), of which the first one
    prints.
    """
    from jaxrl_dist.configuration import option
    from jaxrl_dist.running import compile_cache, folders, hosts, problem, session, stopping
    from jaxrl_dist.studies import optuna_study, study, sweeps

    algorithm = Path(sys.modules[make_agent.__module__].__file__).stem
    program = f"{algorithm}.py" if arguments is None else f"jaxrl-dist train {algorithm}"
    console = Console()
    with hosts.leaving(), _clear_errors():
        arguments, swept = sweeps.split_arguments(sys.argv[1:] if arguments is None else arguments)
        given = words_of.split(arguments)
        # The defaults of all other options depend on these two.
        env_id, preset_name = (
            words_of.read(f"--{name}", str, given.get(name.replace("-", "_"), [default]))
            for name, default in (("env-id", next(iter(presets))), ("preset", problem.RunOptions.preset))
        )
        given |= {"env_id": [outside.absolute(env_id)]} if "env_id" in given else {}
        preset_name = env_id if preset_name == "auto" and env_id in presets else preset_name
        known = ("auto", "none", *presets)
        require(preset_name in known, f"--preset is {preset_name!r}; it must be {alternatives(known)}")
        preset = presets.get(preset_name, {})
        of_the_run, of_the_algorithm = problem.split_preset({"env_id": next(iter(presets)), **preset})
        defaults = (problem.RunOptions(**of_the_run), sweeps.SweepOptions(), config_type(**of_the_algorithm))
        if "help" in given:
            groups = zip(("run", "sweep", "algorithm"), defaults, strict=True)  # as the help calls their options
            fields = [(name, type(each), dataclasses.field(default=each)) for name, each in groups]
            arguments_type = dataclasses.make_dataclass("Arguments", fields, frozen=True)
            _show_help(program, _description(make_agent, preset_name if preset else ""), arguments_type)
        read = words_of.values([*map(type, defaults)], given, program)
        options, sweep, config = (
            dataclasses.replace(default, **values) for default, values in zip(defaults, read, strict=True)
        )
        if swept or sweep.sweep_file:
            stopping.refuse_in_sweeps(options)
        spread_over_cores(int(options.devices) if options.devices.isdecimal() else None)
        hosts.join(options.distributed, options.num_processes, options.process_id, options.device)
        if options.distributed != "off":
            options = dataclasses.replace(options, name=options.name or hosts.by_first(folders.date_and_time))
            hosts.watch(f"--name {options.name} --resume auto")
            console = Console(quiet=not hosts.is_first())
        # Any name does here, and asking the other processes for theirs would start JAX before --device is heeded.
        somewhere = dataclasses.replace(options, name=options.name or folders.date_and_time())
        folders.require_run_folder(folders.folder_of(algorithm, somewhere), options.runs_folder)
        compile_cache.use(options.compile_cache, console)
        if preset:
            console.print(f"preset {preset_name} (--preset none for the defaults): {dict(preset)}")
        if sweep.sweep_optuna and (swept or sweep.sweep_file):
            axes = sweeps.parse(config_type, swept, random=True)
            folder = optuna_study.train(algorithm, make_agent, config, options, axes, console, sweep)
        elif swept or sweep.sweep_file:
            found = sweeps.configurations(config_type, swept, sweep)
            folder = study.train(algorithm, make_agent, config, options, found, console, sweep)
        else:
            given = [name for name, default in vars(sweeps.SweepOptions()).items() if getattr(sweep, name) != default]
            require(not given, f"{', '.join(map(option, given))} need --sweep.FIELD VALUES")
            folder = session.train(problem.prepare(algorithm, make_agent, config, options), console)
        if hosts.is_first():
            _require_sound(folder)


def _require_sound(folder: Path) -> None:
    """End with an error where runs of a training or a study diverged, after all its results are there."""
    from jaxrl_dist.records import recording, tables
    from jaxrl_dist.studies import study

    metrics = tables.read(folder / "results.csv") if study.is_study(folder) else recording.read_metrics(folder)
    lost = recording.divergences(metrics)
    if len(lost):
        lanes = len(metrics[[column for column in ("configuration", "seed") if column in metrics]].drop_duplicates())
        first = lost.iloc[0]
        name = recording.run_name(first.to_dict(), " ").replace("_", " ")
        _stop(
            f"{len(lost)} of {counted(lanes, 'run')} diverged (the first: {name}, {first.metric} at iteration "
            f"{first.iteration}) and ended as they were before; results of all are in {folder}",
            BROKEN,
        )


def spread_over_cores(most: int | None = None) -> None:
    """On CPU, give JAX one device per core, so that seeds train side by side; must run before JAX starts.

    most: no more cores than that, for the threads of one device, too; None for all that this process may use.
    """
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if most and most < cores:
            cores = most
            os.environ.setdefault("PJRT_NPROC", str(cores))  # which XLA reads when it starts its threads
        jax.config.update("jax_num_cpu_devices", cores)


def _show_help(program: str, description: str, options_type: type) -> None:
    """Print the help of a dataclass, or of several in one, and exit."""
    import tyro  # here, since only the help needs it

    tyro.cli(
        options_type, args=["--help"], prog=program, description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )  # fmt: skip


def solve(config_type: type, solver: Callable, arguments: Sequence[str] | None = None) -> None:
    """Entry point of a file that has no agent to train: parse `Config` and call `solver(config, console)`.

    Exits like `main`: with 2 for bad input, in one line.
    """
    from jaxrl_dist.configuration import check_configuration
    from jaxrl_dist.running import compile_cache

    source = Path(sys.modules[solver.__module__].__file__)
    program = source.name if arguments is None else f"jaxrl-dist train {source.stem}"
    with _clear_errors():
        given = words_of.split(sys.argv[1:] if arguments is None else arguments)
        if "help" in given:
            _show_help(program, _description(solver, ""), config_type)
        (read,) = words_of.values([config_type], given, program)
        config = config_type(**read)
        check_configuration(config)
        console = Console()
        compile_cache.use("auto", console)
        solver(config, console)


def _description(make_agent, preset_name: str) -> str:
    text = (sys.modules[make_agent.__module__].__doc__ or "").strip().split("\n\n")
    shown = f"The defaults shown are those of the preset {preset_name}.\n\n" if preset_name else ""
    return "\n\n".join([*text[:2], shown])


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends in one line and exit code 2, a broken run in one line and 1, Ctrl-C in 130: no tracebacks."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if str(error).startswith("RESOURCE_EXHAUSTED"):  # XLA's word for it
            _stop(f"out of memory: {str(error).partition(': ')[2]}", BROKEN)
        # Only errors raised on purpose are one line; anything else is a bug and keeps its traceback.
        if not _is_ours(error):
            raise
        _stop(str(error), USAGE_ERROR if isinstance(error, ValueError) else BROKEN)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN)
    except OSError as error:
        _stop(f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error), BROKEN)
    except MemoryError as error:
        _stop(f"out of memory: {error}", BROKEN)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _stop(message: str, status: int) -> None:
    """Say why in one line, with whatever a terminal would obey made visible, and exit."""
    line = "".join(x if x.isprintable() else repr(x)[1:-1] for x in " ".join(message.splitlines()))
    Console(stderr=True).print(f"error: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)


def _is_ours(error: BaseException) -> bool:
    """Whether the exception is of a class of ours, or a ValueError that a line of this project raised.

    Other errors may be a library's in spite of their last line: XLA's seem to come from the line that ran a program.
    """
    if type(error).__module__.startswith("jaxrl_dist"):
        return True
    if not isinstance(error, ValueError):
        return False
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", "").startswith("jaxrl_dist")


# -- jaxrl-dist -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as everything else does, in one line and without a usage text."""

    def error(self, message: str):
        raise ConfigurationError(re.sub(r"^argument (\S+?): ", r"\1 ", message))


def _typed(hint: Any) -> Callable[[str], Any]:
    """Reads a word as a value of this type, for argparse."""

    def read(word: str) -> Any:
        try:
            value = words_of.read("", hint, [word])
            check_value("", hint, value)
        except ConfigurationError as error:
            raise argparse.ArgumentTypeError(str(error).strip()) from None
        return value

    return read


def command(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `jaxrl-dist` and `python -m jaxrl_dist`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with _clear_errors():
        _command(arguments)


def _command(arguments: list[str]) -> None:
    parser = _Parser(prog="jaxrl-dist", description="Fully jitted distributional reinforcement learning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="algorithms and environments")
    train = commands.add_parser(
        "train", help="train an algorithm: jaxrl-dist train NAME [options of NAME]",
        usage="jaxrl-dist train NAME [options of NAME]",
        description="The options of an algorithm: jaxrl-dist train NAME --help",
    )  # fmt: skip
    train.add_argument("name", metavar="NAME", help=", ".join(algorithms()))
    evaluate = commands.add_parser("evaluate", help="evaluate the newest checkpoint of a run, or a saved policy")
    evaluate.add_argument("run", metavar="RUN", type=Path, help="folder of the run, or the .npz file of one policy")
    evaluate.add_argument("--episodes", type=_typed(Count), default=100, help="episodes per seed (default: 100)")
    evaluate.add_argument("--seed", type=_typed(Seed), default=0, help="seed of the evaluation (default: 0)")
    evaluate.add_argument(
        "--gymnasium", action="store_true",
        help="play the run's saved policies in Gymnasium's own environment, beside what our last evaluation found",
    )  # fmt: skip
    evaluate.add_argument("--env-id", help="for a policy file: Gymnasium's environment to play it in")
    evaluate.add_argument(
        "--policy", choices=("last", "best"), default="last",
        help="of a run: its last policies (default), or the best ones, which --keep-best True keeps",
    )  # fmt: skip
    collect = commands.add_parser(
        "collect", help="write episodes of a trained agent or a scripted controller to a file, for offline algorithms"
    )
    collect.add_argument(
        "source", metavar="SOURCE",
        help="folder of a run, or a function (observation, key) -> action as module:name or path/file.py:name",
    )  # fmt: skip
    collect.add_argument("--out", type=Path, required=True, help="file to write (.npz)")
    collect.add_argument("--episodes", type=_typed(Count), default=100, help="whole episodes (default: 100)")
    collect.add_argument("--seed", type=_typed(Seed), default=0, help="seed of starts, steps and actions (default: 0)")
    collect.add_argument(
        "--random", type=_typed(float), nargs="+", default=[0.0], metavar="P",
        help="probability of a uniform random action instead; two: of the first and of the last episode",
    )  # fmt: skip
    collect.add_argument("--noise", type=_typed(float), default=0.0, help="deviation of Gaussian noise on actions")
    collect.add_argument("--explore", action="store_true", help="of a run: the policy that its claim is about")
    collect.add_argument("--run-seed", type=_typed(Seed), help="of a run: which of its seeds (default: the first)")
    collect.add_argument("--env-id", help="of a controller: its environment")
    collect.add_argument("--env-options", nargs="+", default=[], help="of a controller: name=value, as in training")
    plot = commands.add_parser("plot", help="compare the learning curves of runs, or draw learned distributions of one")
    plot.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, or one folder of a study")
    plot.add_argument("--metric", default="evaluation_return", help="column of metrics.csv to draw")
    plot.add_argument("--out", type=Path, help="picture to write (default: comparison.png or distribution.png)")
    plot.add_argument(
        "--distribution", action="store_true",
        help="of one run: learned return distributions against Monte-Carlo returns of the same policy",
    )  # fmt: skip
    plot.add_argument(
        "--states", type=_typed(Count), default=6, help="with --distribution: number of states (default: 6)"
    )
    plot.add_argument(
        "--run-seed", type=_typed(Seed), help="with --distribution: which seed of the run (default: its first)"
    )
    plot.add_argument("--seed", type=_typed(Seed), default=0, help="with --distribution: seed of states and rollouts")
    _add_render(commands)
    report = commands.add_parser("report", help="one HTML page to compare runs: curves, intervals, settings, warnings")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs or studies")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (default: report.html)")
    report.add_argument(
        "--normalize", metavar="FILE", type=Path,
        help="JSON file {environment: [low, high]}: the returns whose normalized scores are 0 and 1",
    )  # fmt: skip
    compare = commands.add_parser(
        "compare", help="is one run better than another: differences with intervals, tests, and seeds needed to know"
    )
    compare.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+",
        help="folders of runs or studies, or STUDY/configuration_3; every two on one environment are compared",
    )  # fmt: skip
    compare.add_argument("--metric", default="evaluation_return", help="column of metrics.csv to compare")
    compare.add_argument(
        "--at", choices=("last", "area"), default="last",
        help="the last evaluation (default), or the area under the learning curve",
    )  # fmt: skip
    compare.add_argument(
        "--pairing", choices=("auto", "paired", "unpaired"), default="auto",
        help="whether equal seeds belong together: auto (where both were evaluated in the same episodes), or as given",
    )  # fmt: skip
    compare.add_argument("--out", type=Path, help="table to write (.csv or .json)")
    commands.add_parser("doctor", help="versions, devices, and whether what was asked for is what is used")

    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        near = nearest(arguments[0], COMMANDS) or COMMANDS
        parser.error(f"COMMAND is {arguments[0]!r}; did you mean {alternatives(near)}?")
    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        module = find_algorithm(arguments[1])
        if hasattr(module, "make_agent"):
            main(module.Config, module.make_agent, module.PRESETS, arguments[2:])
        else:
            solve(module.Config, module.solve, arguments[2:])
        return
    parsed, unknown = parser.parse_known_args(arguments)
    program = f"jaxrl-dist {parsed.command}"
    for word in unknown:
        known = set(vars(parsed)) - {"command", "name", "run", "runs", "source"}
        require(word.startswith("--"), f"{word!r} is one word too many for {program}; see {program} --help")
        words_of.require_known(word[2:].partition("=")[0].replace("-", "_"), known, program)
    console = Console()
    if parsed.command == "train":
        parser.error("NAME must come first: jaxrl-dist train NAME [options of NAME]")
    if parsed.command == "list":
        _list(console)
    elif parsed.command == "evaluate":
        if parsed.gymnasium or parsed.env_id or parsed.run.suffix == ".npz":
            _evaluate_in_gymnasium(parsed, console)
        else:
            _evaluate(parsed.run, parsed.episodes, parsed.seed, parsed.policy, console)
    elif parsed.command == "collect":
        _collect(parsed, console)
    elif parsed.command == "plot":
        if parsed.distribution:
            _plot_distribution(parsed, console)
        else:
            _plot(parsed.runs, parsed.metric, parsed.out, console)
    elif parsed.command == "render":
        _render(parsed, console)
    elif parsed.command == "report":
        from jaxrl_dist.reports.write import write

        write(parsed.runs, parsed.out, parsed.normalize, console)
    elif parsed.command == "compare":
        from jaxrl_dist.reports.compare import compare

        how = {"metric": parsed.metric, "at": parsed.at, "pairing": parsed.pairing}
        compare(parsed.runs, console, **how, out=parsed.out)
    elif parsed.command == "doctor":
        from jaxrl_dist.running import doctor

        sys.exit(doctor.main())


def _list(console: Console) -> None:
    from jaxrl_dist import envs
    from jaxrl_dist.envs import registry

    table = Table("family", "algorithm", "what it is", title="algorithms")
    for name, module in sorted(algorithms().items(), key=lambda item: item[1]):
        table.add_row(module.split(".")[-2], name, title(name))
    console.print(table)
    console.print(_support(envs.available()))
    others = ", ".join(f"{package}NAME" for package in registry.PACKAGES)
    console.print(f"where their packages are installed, also {others}")


def _support(environments: Mapping[str, Sequence[str]]) -> Table:
    """What accepts what: algorithms with the same answers share a row for each of them, with its environments."""
    from jaxrl_dist.running import compatibility

    trained = agents()
    refusals = {
        env_id: row for ids in environments.values() for env_id, row in compatibility.refusals(trained, ids).items()
    }
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in trained:
        groups.setdefault(tuple(row[name] for row in refusals.values()), []).append(name)
    # Narrow ones, so that on 80 characters no name of an environment is broken.
    narrow = Column("algorithms", width=max(map(len, trained))), Column("trains", width=13)
    table = Table(*narrow, "environments", title="what trains on what")
    for answers, group in groups.items():
        ids_of: dict[str, list[str]] = {}
        for env_id, why in zip(refusals, answers, strict=True):
            ids_of.setdefault(why, []).append(env_id)
        for why in sorted(ids_of):  # "" first
            of_group = ", ".join(group) if why == min(ids_of) else ""
            answer = f"no: {why}" if why else "yes"
            table.add_row(of_group, answer, ", ".join(ids_of[why]), end_section=why == max(ids_of))
    return table


def _evaluate(folder: Path, episodes: int, seed: int, policy: str, console: Console) -> None:
    spread_over_cores()
    from jaxrl_dist.records import recording
    from jaxrl_dist.running import compile_cache, results

    compile_cache.use("auto", console)
    console.print(f"evaluating {folder} ...")
    seeds, returns, parts = results.evaluate_run(folder, find_algorithm, episodes=episodes, seed=seed, policy=policy)
    diverged = {}
    if (folder / "metrics.csv").exists():
        diverged = results.diverged_seeds(recording.read_metrics(folder))
    results.print_results(console, seeds, returns, diverged, parts)


def _evaluate_in_gymnasium(parsed: argparse.Namespace, console: Console) -> None:
    from jaxrl_dist.running import gymnasium_evaluation

    how = {"episodes": parsed.episodes, "seed": parsed.seed}
    if parsed.run.suffix == ".npz":
        require(bool(parsed.env_id), f"RUN is {parsed.run}, a policy; --env-id must say where Gymnasium is to play it")
        require(parsed.policy == "last", f"RUN is {parsed.run}, one policy; --policy best is for the folder of a run")
        gymnasium_evaluation.print_policy(parsed.run, parsed.env_id, console, **how)
    else:
        require(not parsed.env_id, f"--env-id is {parsed.env_id!r}; it is for a policy file (.npz), not for a run")
        gymnasium_evaluation.print_run(parsed.run, console, **how, policy=parsed.policy)


def _collect(parsed: argparse.Namespace, console: Console) -> None:
    from jaxrl_dist.running import collecting, compile_cache

    compile_cache.use("auto", console)
    require(len(parsed.random) <= 2, f"--random has {len(parsed.random)} values; one or two are allowed")
    if outside.is_outside(parsed.source):
        require(bool(parsed.env_id), f"SOURCE is {parsed.source!r}, a controller; --env-id must say for what")
        require(
            not parsed.explore and parsed.run_seed is None,
            f"SOURCE is {parsed.source!r}, a controller; --explore and --run-seed are for the folder of a run",
        )
        source = collecting.of_controller(parsed.source, parsed.env_id, tuple(parsed.env_options))
    else:
        require(
            not (parsed.env_id or parsed.env_options),
            f"SOURCE is {parsed.source!r}, a run, which has its environment; --env-id and --env-options are for "
            "controllers",
        )
        how = {"run_seed": parsed.run_seed, "explore": parsed.explore}
        source = collecting.of_run(Path(parsed.source), find_algorithm, **how)
    behaviour = collecting.Behaviour((parsed.random[0], parsed.random[-1]), parsed.noise)
    collecting.write(source, parsed.out, behaviour, console, episodes=parsed.episodes, seed=parsed.seed)


def _add_render(commands: Any) -> None:
    """The options of `render`; their defaults are those of `rendering.Options`, which loads JAX."""
    render = commands.add_parser(
        "render", help="watch the policies of a run, and what they believe of their return: a film"
    )
    render.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    render.add_argument("--out", type=Path, required=True, help="film to write: .gif, .html (a page) or .mp4")
    render.add_argument(
        "--seeds", type=_typed(Seed), nargs="+", default=[], help="of the run, side by side (default: all, up to 4)"
    )
    render.add_argument(
        "--policy", choices=("last", "best"), default="last",
        help="its last policies (default), or the best ones, which --keep-best True keeps",
    )  # fmt: skip
    render.add_argument("--episodes", type=_typed(Count), default=1, help="played by each seed (default: 1)")
    render.add_argument(
        "--episode", choices=("all", "best", "median", "worst"), default="all",
        help="shown of them: all, one after the other, or the one with this return",
    )  # fmt: skip
    render.add_argument("--seed", type=_typed(Seed), default=0, help="of the episodes, as of evaluate (default: 0)")
    render.add_argument("--max-steps", type=_typed(Count), default=0, help="shown of an episode (default: all)")
    render.add_argument("--every", type=_typed(Count), default=1, help="steps from picture to picture (default: 1)")
    render.add_argument(
        "--fps", type=_typed(float), default=0.0,
        help="pictures per second (default: 30, fewer where an episode would take less than six seconds)",
    )  # fmt: skip
    render.add_argument("--scale", type=_typed(float), default=1.0, help="size; 1: a seed is 320 pixels wide")
    render.add_argument("--explore", action="store_true", help="the policy that the run's claim is about")
    render.add_argument("--observations", action="store_true", help="draw what the agent sees, not the environment")
    render.add_argument(
        "--mujoco", action="store_true", help="draw bodies by MuJoCo's own renderer, which needs EGL or OSMesa"
    )
    render.add_argument(
        "--viewer", action="store_true",
        help="make brax's own page, with a camera to turn, whose scripts a browser loads from the network",
    )  # fmt: skip


def _render(parsed: argparse.Namespace, console: Console) -> None:
    if parsed.mujoco:  # before MuJoCo is imported
        os.environ.setdefault("MUJOCO_GL", "egl")
    from jaxrl_dist.running import compile_cache, rendering

    compile_cache.use("auto", console)
    chosen = {name: getattr(parsed, name) for name in rendering.Options._fields}
    options = rendering.Options(**chosen | {"seeds": tuple(parsed.seeds)})
    rendering.render(parsed.run, find_algorithm, parsed.out, console, options)


def _plot(chosen: Sequence[Path], metric: str, out: Path | None, console: Console) -> None:
    from jaxrl_dist.records import plotting, recording
    from jaxrl_dist.running import folders
    from jaxrl_dist.studies import study

    studies = any(map(study.is_study, chosen))
    if out or not studies:
        folders.require_picture(out or Path("comparison.png"))
    if studies:
        require(len(chosen) == 1, f"RUN is {len(chosen)} folders, one of them a study; a study is plotted by itself")
        study.collect(chosen[0], console, metric, out)
        return
    out = out or Path("comparison.png")
    configs, frames = [recording.read_config(folder) for folder in chosen], {}
    environments = sorted({outside.shown(config["options"]["env_id"]) for config in configs})
    for folder, config in zip(chosen, configs, strict=True):
        label = display_name(config["algorithm"]) + f" {folder.name}" * (len(chosen) > 1)
        label += f" on {outside.shown(config['options']['env_id'])}" * (len(environments) > 1)
        if label in frames:
            label = str(folder)
        frames[label] = recording.read_metrics(folder)
    plotting.learning_curve(frames, out, title=" and ".join(environments), metric=metric)
    if len(environments) > 1:
        console.print(
            f"warning: these runs are on {len(environments)} environments ({', '.join(environments)}), whose returns "
            "do not compare", style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
    console.print(f"wrote {out}")


def _plot_distribution(parsed: argparse.Namespace, console: Console) -> None:
    spread_over_cores()
    from jaxrl_dist.running import compile_cache, folders, results

    compile_cache.use("auto", console)
    require(len(parsed.runs) == 1, f"RUN is {len(parsed.runs)} folders; --distribution draws one")
    out = parsed.out or Path("distribution.png")
    folders.require_picture(out)
    results.plot_distribution(
        parsed.runs[0], find_algorithm, out, console,
        run_seed=parsed.run_seed, states=parsed.states, seed=parsed.seed,
    )  # fmt: skip
    console.print(f"wrote {out}")

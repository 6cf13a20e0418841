"""The command line: `python algorithms/FAMILY/NAME.py ...` and `jaxrl-dist list|train|evaluate|plot|report|doctor`.

Algorithms and environments are found by name and imported only when asked for.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

USAGE_ERROR = 2
INTERRUPTED = 130


def main(config_type: type, make_agent: Callable, presets: Mapping[str, Mapping[str, Any]], arguments=None) -> None:
    """Entry point of an algorithm file: parse options, train; exits with 1 (broke), 2 (bad input) or 130 (Ctrl-C).

    The environment's preset, if there is one, becomes the defaults; options given on the command line override it. A
    preset may also set options of the run, such as total_steps. The first preset is that of the default environment.
    With `--sweep.FIELD VALUES...` every combination of the values is trained (`study`), or what Optuna proposes of them
    (`optuna_study`). With `--distributed` the same command runs on several processes (`hosts`), of which the first one
    prints.
    """
    spread_over_cores()
    from jaxrl_dist import compile_cache, hosts, optuna_study, problem, runner, study, sweeps
    from jaxrl_dist.agent import option, require

    algorithm = Path(sys.modules[make_agent.__module__].__file__).stem
    console = Console()
    default_env = next(iter(presets))
    with hosts.leaving(), _clear_errors(console):
        arguments, swept = sweeps.split_arguments(sys.argv[1:] if arguments is None else arguments)
        env_id = _peek(arguments, "--env-id", default_env)
        preset_name = _peek(arguments, "--preset", problem.RunOptions.preset)
        preset_name = env_id if preset_name == "auto" and env_id in presets else preset_name
        if preset_name not in ("auto", "none", *presets):
            raise ValueError(f"--preset is {preset_name!r}; it must be auto, none or one of {', '.join(presets)}")
        preset = presets.get(preset_name, {})
        options, sweep, config = _parse(
            problem.RunOptions, config_type, {"env_id": default_env, **preset}, arguments, prog=f"{algorithm}.py",
            description=_description(make_agent, preset_name if preset else ""),
        )  # fmt: skip
        hosts.join(options.distributed, options.num_processes, options.process_id, options.device)
        if options.distributed != "off":
            options = dataclasses.replace(options, name=options.name or hosts.by_first(runner.date_and_time))
            hosts.watch(f"--name {options.name} --resume auto")
            console = Console(quiet=not hosts.is_first())
        compile_cache.use(options.compile_cache, console)
        if preset:
            console.print(f"preset {preset_name} (--preset none for the defaults): {dict(preset)}")
        if sweep.sweep_optuna and (swept or sweep.sweep_file):
            axes = sweeps.parse(config_type, swept, random=True)
            optuna_study.train(algorithm, make_agent, config, options, axes, console, sweep)
        elif swept or sweep.sweep_file:
            found = sweeps.configurations(config_type, swept, sweep)
            study.train(algorithm, make_agent, config, options, found, console, sweep)
        else:
            given = [name for name, default in vars(sweeps.SweepOptions()).items() if getattr(sweep, name) != default]
            require(not given, f"{', '.join(map(option, given))} need --sweep.FIELD VALUES")
            runner.train(problem.prepare(algorithm, make_agent, config, options), console)


def spread_over_cores() -> None:
    """On CPU, give JAX one device per core, so that seeds train side by side; must run before JAX starts."""
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", cores)


def _parse(options_type, config_type, preset, arguments, *, prog: str, description: str):
    """Options of the run, of a sweep and of the algorithm in groups of one flat command line."""
    from jaxrl_dist.problem import split_preset
    from jaxrl_dist.sweeps import SweepOptions

    of_the_run, of_the_algorithm = split_preset(preset)
    run, algorithm = options_type(**of_the_run), config_type(**of_the_algorithm)

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        run: options_type = dataclasses.field(default_factory=lambda: run)
        sweep: SweepOptions = dataclasses.field(default_factory=SweepOptions)
        algorithm: config_type = dataclasses.field(default_factory=lambda: algorithm)

    parsed = tyro.cli(
        Arguments, args=arguments, prog=prog, description=description,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )  # fmt: skip
    return parsed.run, parsed.sweep, parsed.algorithm


def solve(config_type: type, solver: Callable, arguments: Sequence[str] | None = None) -> None:
    """Entry point of a file that has no agent to train: parse `Config` and call `solver(config, console)`.

    Exits like `main`: with 2 for bad input, in one line.
    """
    from jaxrl_dist import compile_cache
    from jaxrl_dist.agent import check_configuration

    console = Console()
    source = Path(sys.modules[solver.__module__].__file__)
    with _clear_errors(console):
        config = tyro.cli(
            config_type, args=arguments, prog=source.name, description=_description(solver, ""),
            config=(tyro.conf.FlagConversionOff,),
        )  # fmt: skip
        check_configuration(config)
        compile_cache.use("auto", console)
        solver(config, console)


def _description(make_agent, preset_name: str) -> str:
    text = (sys.modules[make_agent.__module__].__doc__ or "").strip().split("\n\n")
    shown = f"The defaults shown are those of the preset {preset_name}.\n\n" if preset_name else ""
    return "\n\n".join([*text[:2], shown])


def _peek(arguments: Sequence[str], name: str, default: str) -> str:
    """The value of one option before the full parser, whose defaults depend on it, exists."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(name, name.replace("-", "_").replace("__", "--", 1), dest="value", default=default)
    return parser.parse_known_args(arguments)[0].value


@contextlib.contextmanager
def _clear_errors(console: Console) -> Iterator[None]:
    """Bad input ends in one line and exit code 2, a broken run in one line and 1, Ctrl-C in 130: no tracebacks."""
    from jaxrl_dist.runner import NonFiniteMetric

    try:
        yield
    except ValueError as error:
        # Only errors raised on purpose are one line; anything else is a bug and keeps its traceback.
        if not _is_ours(error):
            raise
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(USAGE_ERROR)
    except NonFiniteMetric as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _is_ours(error: BaseException) -> bool:
    """Whether the exception was raised by a line of this project rather than inside a library."""
    traceback = error.__traceback__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_globals.get("__name__", "").startswith("jaxrl_dist")


# -- jaxrl-dist -------------------------------------------------------------------------------------------------------


def algorithms() -> dict[str, str]:
    """Name of every algorithm -> its module, found by looking, not by registration."""
    root = importlib.import_module("jaxrl_dist.algorithms")
    found = {}
    for family in pkgutil.iter_modules(root.__path__, f"{root.__name__}."):
        if family.ispkg:
            package = importlib.import_module(family.name)
            found |= {
                m.name.rsplit(".", 1)[1]: m.name for m in pkgutil.iter_modules(package.__path__, f"{family.name}.")
            }
    return found


def find_algorithm(name: str):
    """Import the module of an algorithm; an unknown name is a ValueError with the nearest ones."""
    known = algorithms()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known ones: {', '.join(sorted(known))}"
        raise ValueError(f"NAME is {name!r}, which is no algorithm; {hint}")
    return importlib.import_module(known[name])


def command(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `jaxrl-dist` and `python -m jaxrl_dist`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="jaxrl-dist", description="Fully jitted distributional reinforcement learning."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="algorithms and environments")
    train = commands.add_parser(
        "train", help="train an algorithm: jaxrl-dist train NAME [options of NAME]", add_help=False
    )
    train.add_argument("name", metavar="NAME")
    evaluate = commands.add_parser("evaluate", help="evaluate the newest checkpoint of a run, or a saved policy")
    evaluate.add_argument("run", metavar="RUN", type=Path, help="folder of the run, or the .npz file of one policy")
    evaluate.add_argument("--episodes", type=int, default=100, help="episodes per seed (default: 100)")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the evaluation (default: 0)")
    evaluate.add_argument(
        "--gymnasium", action="store_true",
        help="play the run's saved policies in Gymnasium's own environment, beside what our last evaluation found",
    )  # fmt: skip
    evaluate.add_argument("--env-id", help="for a policy file: Gymnasium's environment to play it in")
    plot = commands.add_parser("plot", help="compare the learning curves of runs, or draw learned distributions of one")
    plot.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs, or one folder of a study")
    plot.add_argument("--metric", default="evaluation_return", help="column of metrics.csv to draw")
    plot.add_argument("--out", type=Path, help="picture to write (default: comparison.png or distribution.png)")
    plot.add_argument(
        "--distribution", action="store_true",
        help="of one run: learned return distributions against Monte-Carlo returns of the same policy",
    )  # fmt: skip
    plot.add_argument("--states", type=int, default=6, help="with --distribution: number of states (default: 6)")
    plot.add_argument("--run-seed", type=int, help="with --distribution: which seed of the run (default: its first)")
    plot.add_argument("--seed", type=int, default=0, help="with --distribution: seed of states and rollouts")
    report = commands.add_parser("report", help="one HTML page to compare runs: curves, intervals, settings, warnings")
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (default: report.html)")
    report.add_argument(
        "--normalize", metavar="FILE", type=Path,
        help="JSON file {environment: [low, high]}: the returns whose normalized scores are 0 and 1",
    )  # fmt: skip
    commands.add_parser("doctor", help="versions, devices, and whether what was asked for is what is used")

    if arguments[:1] == ["train"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        console = Console()
        with _clear_errors(console):
            module = find_algorithm(arguments[1])
        if hasattr(module, "make_agent"):
            main(module.Config, module.make_agent, module.PRESETS, arguments[2:])
        else:
            solve(module.Config, module.solve, arguments[2:])
        return
    parsed = parser.parse_args(arguments)
    console = Console()
    with _clear_errors(console):
        if parsed.command == "list":
            _list(console)
        elif parsed.command == "evaluate":
            if parsed.gymnasium or parsed.env_id or parsed.run.suffix == ".npz":
                _evaluate_in_gymnasium(parsed, console)
            else:
                _evaluate(parsed.run, parsed.episodes, parsed.seed, console)
        elif parsed.command == "plot":
            if parsed.distribution:
                _plot_distribution(parsed, console)
            else:
                _plot(parsed.runs, parsed.metric, parsed.out, console)
        elif parsed.command == "report":
            from jaxrl_dist.report import write

            write(parsed.runs, parsed.out, parsed.normalize, console)
        elif parsed.command == "doctor":
            from jaxrl_dist import doctor

            sys.exit(doctor.main())


def _list(console: Console) -> None:
    from jaxrl_dist import envs

    table = Table("family", "algorithm", "what it is", title="algorithms")
    for name, module in sorted(algorithms().items(), key=lambda item: item[1]):
        # The first line of the docstring, read without importing the algorithm (and JAX with it).
        source = Path(importlib.util.find_spec(module).origin).read_text()
        table.add_row(module.split(".")[-2], name, source.split('"""')[1].splitlines()[0])
    console.print(table)
    table = Table("family", "environments", title="environments")
    for family, ids in envs.available().items():
        table.add_row(family, ", ".join(ids))
    console.print(table)


def _evaluate(folder: Path, episodes: int, seed: int, console: Console) -> None:
    spread_over_cores()
    from jaxrl_dist import compile_cache, reporting

    compile_cache.use("auto", console)
    console.print(f"evaluating {folder} ...")
    seeds, returns = reporting.evaluate_run(folder, find_algorithm, episodes=episodes, seed=seed)
    reporting.print_results(console, seeds, returns)


def _evaluate_in_gymnasium(parsed: argparse.Namespace, console: Console) -> None:
    from jaxrl_dist import gymnasium_evaluation
    from jaxrl_dist.agent import require

    how = {"episodes": parsed.episodes, "seed": parsed.seed}
    if parsed.run.suffix == ".npz":
        require(bool(parsed.env_id), f"RUN is {parsed.run}, a policy; --env-id must say where Gymnasium is to play it")
        gymnasium_evaluation.print_policy(parsed.run, parsed.env_id, console, **how)
    else:
        require(not parsed.env_id, f"--env-id is {parsed.env_id!r}; it is for a policy file (.npz), not for a run")
        gymnasium_evaluation.print_run(parsed.run, console, **how)


def _plot(folders: Sequence[Path], metric: str, out: Path | None, console: Console) -> None:
    from jaxrl_dist import plotting, recording, study
    from jaxrl_dist.agent import require

    if any(map(study.is_study, folders)):
        require(len(folders) == 1, f"RUN is {len(folders)} folders, one of them a study; a study is plotted by itself")
        study.collect(folders[0], console, metric, out)
        return
    out = out or Path("comparison.png")
    frames = {}
    for folder in folders:
        config = recording.read_config(folder)
        label = f"{config['algorithm']} {folder.name}" if len(folders) > 1 else config["algorithm"]
        if label in frames:
            label = str(folder)
        frames[label] = recording.read_metrics(folder)
    environments = sorted({recording.read_config(folder)["options"]["env_id"] for folder in folders})
    plotting.learning_curve(frames, out, title=", ".join(environments), metric=metric)
    console.print(f"wrote {out}")


def _plot_distribution(parsed: argparse.Namespace, console: Console) -> None:
    spread_over_cores()
    from jaxrl_dist import compile_cache, reporting
    from jaxrl_dist.agent import require

    compile_cache.use("auto", console)
    require(len(parsed.runs) == 1, f"RUN is {len(parsed.runs)} folders; --distribution draws one")
    out = parsed.out or Path("distribution.png")
    reporting.plot_distribution(
        parsed.runs[0], find_algorithm, out, console,
        run_seed=parsed.run_seed, states=parsed.states, seed=parsed.seed,
    )  # fmt: skip
    console.print(f"wrote {out}")

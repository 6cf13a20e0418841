"""The pages of the site that no hand writes: of algorithms, environments, experiments, notebooks and modules.

They are Markdown, made of docstrings, settings, committed results and pictures. Links in them are relative to a file of
the repository, as they are in the hand-written pages; `site_hooks` turns both into links between pages.
"""

import ast
import base64
import csv
import dataclasses
import functools
import importlib.metadata
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl_dist import envs
from jaxrl_dist.configuration import Bounds, option
from jaxrl_dist.envs import gym_wrappers
from jaxrl_dist.envs.factored import DiscretisedActions
from jaxrl_dist.envs.gym_wrappers import OPTIONS as AROUND
from jaxrl_dist.envs.registry import FINITE, PREFIXES
from jaxrl_dist.envs.velocity_free import VelocityFree
from jaxrl_dist.envs.wrapper import Wrapper
from jaxrl_dist.learning.spaces import SEVERAL, counts_of, kind_of
from jaxrl_dist.running import arguments, catalog, compatibility
from jaxrl_dist.running.problem import RunOptions, takes_data
from jaxrl_dist.studies.sweeps import SweepOptions

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.parent for path in (ROOT / "experiments").glob("*/README.md"))
# What a family's folder is called in the menu.
FAMILIES = {
    "value_based": "A choice of actions", "actor_critic": "Continuous actions", "policy_gradient": "On-policy",
    "offline": "Logged data", "environment_design": "Levels", "sequences": "Sequences",
    "dynamic_programming": "Whole laws, without an agent",
}  # fmt: skip


class Page(NamedTuple):
    """A page of the site."""

    uri: str
    text: str
    """Markdown; links are relative to `origin`"""
    origin: str
    """file of the repository"""
    stands_for: tuple[str, ...] = ()
    """files and folders of the repository that this page shows"""
    section: tuple[str, ...] = ()
    """where it is in the menu; () for nowhere"""
    pictures: Mapping[str, bytes] = types.MappingProxyType({})
    """files that belong to it, by uri"""


# -- Markdown ---------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [list(header), ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(word: Any) -> str:
    return f"`{word}`" if str(word) else ""


def fold(title: str, text: str) -> str:
    """Text that is folded away until somebody asks for it."""
    return f'??? note "{title}"\n\n{textwrap.indent(text, "    ")}'


def prose(docstring: str) -> str:
    """A docstring as Markdown: what it says is text, what is indented a formula, what follows "Run:" a command."""
    parts, formula = [], []
    for block in re.split(r"\n[ \t]*\n", docstring.strip("\n")):
        if block.startswith("    "):
            formula.append(block)
            continue
        if formula:
            parts.append(_formula(formula))
            formula = []
        parts.append(_run(block) if block.startswith("Run:") else _paragraph(block))
    return "\n\n".join([*parts, *([_formula(formula)] if formula else [])])


def _formula(blocks: Sequence[str]) -> str:
    return f"```text\n{textwrap.dedent(chr(10).join(blocks))}\n```"


def _run(block: str) -> str:
    """The commands, then what is expected of them."""
    run, _, expected = block.removeprefix("Run:").partition("\nExpected:")
    lines = [line.strip() for line in run.splitlines()]
    commands = [line for line in lines if not line.startswith("(")]
    asides = [_paragraph(line) for line in lines if line.startswith("(")]
    text = "\n\n".join(["## Run it", "```bash\n" + "\n".join(commands) + "\n```", *asides])
    return text + (f"\n\n**Expected:** {_paragraph(' '.join(expected.split()))}" if expected else "")


def _paragraph(block: str) -> str:
    """Plain text as Markdown: what is not meant as Markdown is kept from being taken for it; sources become links."""
    if block.lstrip().startswith("|"):
        return block
    label = re.match(r"(Papers?|Differences[^:\n]*):", block)
    before = f"**{label[0]}**" if label else ""
    pieces = re.split(r"(`[^`]*`)", block[label.end() :] if label else block)
    return before + "".join(_named_file(piece) if piece.startswith("`") else _plain(piece) for piece in pieces)


def _plain(text: str) -> str:
    text = text.replace("<", "&lt;")
    # An asterisk is emphasis only where it stands at both ends of words.
    emphasis = re.compile(r"(?<![\w*\\])(\*{1,2})(\w(?:[^*\n]*[\w.!?])?)\1(?![\w*])")
    kept = [match.span() for match in emphasis.finditer(text)]
    text = "".join(
        "\\*" if letter == "*" and not any(start <= place < end for start, end in kept) else letter
        for place, letter in enumerate(text)
    )
    text = re.sub(r"\barXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"\bdoi\s+(10\.\d+/[^\s),;]*\w)", r"[doi \1](https://doi.org/\1)", text)
    return re.sub(r"\bexperiments/(\w+)", lambda it: _link_to(f"experiments/{it[1]}", it[0]), text)


def _named_file(piece: str) -> str:
    """A file of ours in backticks as a link to it: `envs/maze.py`, `value_based/dqn.py`, `ppo.py`."""
    name = piece.strip("`")
    if re.fullmatch(r"[\w/]+\.py", name):
        for place in (name, f"algorithms/{name}", f"jaxrl_dist/{name}"):
            if (ROOT / place).is_file():
                return _link_to(place, piece)
    return piece


def _link_to(place: str, shown: str) -> str:
    return f"[{shown}](/{place})" if (ROOT / place).exists() else shown


# -- settings ---------------------------------------------------------------------------------------------------------


@functools.cache
def _help_in(cls: type) -> dict[str, str]:
    """The texts under the fields of a class itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body, found = tree.body[0].body, {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = inspect.cleandoc(text.value.value)
    return found


def help_of(config: type) -> dict[str, str]:
    """What the options of a configuration are for, from the class that says it last."""
    found = {}
    for cls in reversed(config.__mro__):
        if dataclasses.is_dataclass(cls):
            found |= _help_in(cls)
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(config)}


def type_of(hint: Any) -> str:
    """What a value of a field is, with its range."""
    ranges = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bounds)]
    hint = hint.__origin__ if ranges else hint
    said = arguments.kind(hint).partition(",")[0] if typing.get_origin(hint) is not typing.Literal else ""
    if not said:
        return arguments.kind(hint)
    for bounds in ranges:
        low, high = np.isfinite(bounds.low), np.isfinite(bounds.high) and bounds.high < 2**31 - 1
        over = f"above {bounds.low:g}" if bounds.open_below else f"at least {bounds.low:g}"
        said += f" in {bounds}" if low and high else f", {over}" if low else ""
    return said


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or '""'
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


def settings(config: type) -> str:
    hints, texts = typing.get_type_hints(config, include_extras=True), help_of(config)
    listed = table(
        ("option", "what it is", "default", "value"),
        [
            (
                code(option(field.name)),
                _paragraph(texts[field.name]),
                code(shown(field.default)),
                type_of(hints[field.name]),
            )
            for field in dataclasses.fields(config)
        ],
    )
    return f'<div class="settings" markdown>\n\n{listed}\n\n</div>'


# -- algorithms -------------------------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower()).strip("_")


@functools.cache
def _names() -> dict[str, str]:
    """What tables call algorithms -> the algorithm."""
    found = {_normal(catalog.display_name(name)): name for name in catalog.algorithms()}
    return found | {name: name for name in catalog.algorithms()}


def algorithm_called(text: str) -> str:
    """The algorithm that a cell of a table is about, with or without more words (`robust PLR`); "" for none."""
    words = f"_{_normal(text)}_"
    found = [known for known in _names() if f"_{known}_" in words]
    return _names()[max(found, key=len)] if found else ""


@functools.cache
def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def results_of(name: str) -> list[tuple[str, str, str, str, str]]:
    """Committed returns with intervals, from every summary that has them: experiment, world, agent, length, return."""
    found = []
    for path in sorted((ROOT / "experiments").rglob("summary.csv")):
        for row in _rows(path):
            if {"algorithm", "iqm", "interval_low"} <= row.keys() and algorithm_called(row["algorithm"]) == name:
                steps, of = (row["env_steps"], "steps") if "env_steps" in row else (row["updates"], "updates")
                interval = "{iqm} [{interval_low}, {interval_high}]".format(**row)
                world = row.get("environment") or row.get("data", "")
                world = world.removeprefix("on-policy/")
                place = path.parent.relative_to(ROOT)
                found.append(
                    (str(place), world, row["algorithm"], f"{int(steps):,} {of}, {row['seeds']} seeds", interval)
                )
    return found


@functools.cache
def _about(experiment: Path) -> frozenset[str]:
    """The algorithms that an experiment names: in its text, by what it imports, in its tables, by its files."""
    found = set()
    readme, known = (experiment / "README.md").read_text(encoding="utf-8"), catalog.algorithms()
    script = (experiment / "run.py").read_text(encoding="utf-8")
    imported = " ".join(re.findall(r"^ *from jaxrl_dist\.algorithms\S* import .*$", script, re.MULTILINE))
    for name, module in known.items():
        family = module.split(".")[-2]
        if f"{family}/{name}.py" in readme or re.search(rf"\b{name}\b", imported):
            found.add(name)
    for path in experiment.rglob("*.csv"):
        if path.stem in known:
            found.add(path.stem)
        elif path.stem.endswith("summary"):
            for column in {"algorithm", "method", "agent"} & _rows(path)[0].keys():
                found |= {algorithm_called(row[column]) for row in _rows(path)} - {""}
    for name in known:
        if f"experiments/{experiment.name}" in (inspect.getdoc(catalog.find_algorithm(name)) or ""):
            found.add(name)
    return frozenset(found)


def title_of(experiment: Path) -> str:
    return (experiment / "README.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _figures(experiment: Path, name: str) -> Iterator[str]:
    """The pictures of an experiment: those of the folders that hold the algorithm's table, else the first one."""
    own = sorted({path.parent for path in experiment.rglob(f"{name}.csv")} - {experiment})
    own = [folder for folder in own if (folder / "figure.png").is_file()]
    for folder in own:
        yield from (
            path for path in (folder / "figure.png", folder / f"{name}_return_distribution.png") if path.is_file()
        )
    text = (experiment / "README.md").read_text(encoding="utf-8")
    if not own and (found := re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)):
        yield experiment / found[0]


def picture(path: Path, caption: str, more: str = "") -> str:
    return f"![{caption}](/{path.relative_to(ROOT)}){{ loading=lazy {more}}}"


def _evidence(name: str) -> str:
    parts = []
    if found := results_of(name):
        rows = [(f"[{world}](/{place})", agent, length, interval) for place, world, agent, length, interval in found]
        parts += [
            "Returns of the last policy: interquartile mean over seeds with its 95 % bootstrap interval.",
            table(("on", "agent", "after", "return"), rows),
        ]
    about = [experiment for experiment in EXPERIMENTS if name in _about(experiment)]
    said = inspect.getdoc(catalog.find_algorithm(name))
    # First what the algorithm's own text points to, then what holds its results; others are named only.
    shown_ones = [x for x in about if f"experiments/{x.name}" in said or [*x.rglob(f"{name}.csv")]]
    for experiment in sorted(shown_ones, key=lambda x: f"experiments/{x.name}" not in said):
        figures = [picture(path, _caption(path, experiment)) for path in _figures(experiment, name)]
        parts.append(f"**[{title_of(experiment)}](/experiments/{experiment.name})**")
        if len(figures) > 2:
            figures = [fold(f"{len(figures)} pictures", "\n\n".join(figures))]
        parts += figures
    if others := [f"[{title_of(x)}](/experiments/{x.name})" for x in about if x not in shown_ones]:
        parts.append("It is also in: " + "; ".join(others))
    return "\n\n".join(parts or ["Nothing is committed yet."])


def _caption(path: Path, experiment: Path) -> str:
    folder = path.parent.relative_to(experiment)
    what = "learned return distributions against Monte-Carlo returns" if "distribution" in path.stem else "results"
    return f"{what}{f' on {folder}' if folder.parts else ''}".replace("on-policy-", "")


def _tests_of(name: str) -> list[str]:
    """The file named after the algorithm, or those that import it; and that of every agent."""
    folder = ROOT / "tests" / "algorithms"
    found = [folder / f"test_{name}.py"]
    if not found[0].is_file():
        imports = re.compile(rf"^(?:from|import) .*\b{name}\b", re.MULTILINE)
        found = [path for path in sorted(folder.glob("test_*.py")) if imports.search(path.read_text(encoding="utf-8"))]
    every = [folder / "test_every_agent.py"] * hasattr(catalog.find_algorithm(name), "make_agent")
    return [str(path.relative_to(ROOT)) for path in [*found, *every]]


def algorithm_pages(refused: Mapping[str, Mapping[str, str]]) -> Iterator[Page]:
    order = [*FAMILIES, *{module.split(".")[-2] for module in catalog.algorithms().values()}]
    by_family = sorted(catalog.algorithms().items(), key=lambda item: (order.index(item[1].split(".")[-2]), item[0]))
    for name, module_name in by_family:
        module, family = catalog.find_algorithm(name), module_name.split(".")[-2]
        file = f"algorithms/{family}/{name}.py"
        first, _, rest = inspect.getdoc(module).partition("\n")
        tests = ", ".join(f"[{Path(path).stem}](/{path})" for path in _tests_of(name))
        parts = [
            f"---\ntitle: {json.dumps(catalog.display_name(name))}\n---",
            f"# {_paragraph(first.rstrip('.'))}",
            f"One file: [`{file}`](source:{file}). Tests: {tests}.",
            prose(rest),
        ]
        parts += ["## What was measured", _evidence(name)]
        if presets := getattr(module, "PRESETS", {}):
            of_the_run = {field.name for field in dataclasses.fields(RunOptions)}
            rows = [
                (code(preset), " ".join(
                    code(f"{option(key)} {shown(value)}") for key, value in
                    sorted(values.items(), key=lambda item: item[0] not in of_the_run)
                ) or "the defaults")
                for preset, values in presets.items()
            ]  # fmt: skip
            data = " with `--dataset`" if takes_data(module.make_agent) else ""
            parts += [
                "## Presets",
                f"`--env-id NAME`{data} takes the preset of that environment; `--preset none` takes the defaults "
                "below. Any option overrides either.",
                table(("preset", "what it changes"), rows),
            ]
        run = "; [those of every run](/docs/guides/runs.md#options-of-every-run) come on top" if presets else ""
        sweep = "Numbers (not whole ones) can be swept within one compiled program. " if presets else ""
        parts += [
            "## Settings",
            f"{sweep}`python {file} --help` lists them in the shell{run}.",
            settings(module.Config),
        ]
        if name in next(iter(refused.values())):
            trains = [_env_link(env_id) for env_id, row in refused.items() if not row[name]]
            why = {}
            for env_id, row in refused.items():
                why.setdefault(row[name], []).append(env_id)
            rows = [(reason, ", ".join(map(_env_link, ids))) for reason, ids in sorted(why.items()) if reason]
            text = ", ".join(trains) + ("\n\nNot on:\n\n" + table(("because", "environments"), rows) if rows else "")
            parts += ["## Environments", fold(f"Trains on {len(trains)} of the {len(refused)} named ones", text)]
        yield Page(
            f"algorithms/{name}.md", "\n\n".join(parts), file, (file,), ("Algorithms", FAMILIES.get(family, family))
        )


# -- environments -----------------------------------------------------------------------------------------------------


def env_uri(env_id: str) -> str:
    return f"environments/{env_id}.md"


def _env_link(env_id: str) -> str:
    return f"[{env_id}](page:{env_uri(env_id)})"


def space(of: Any) -> str:
    """What a space holds, in words."""
    kind = kind_of(of)
    if kind == "discrete":
        return f"a choice of {of.n}"
    if kind == SEVERAL:
        return "choices of " + ", ".join(map(str, np.ravel(counts_of(of)).tolist())) + " at once"
    if kind in ("continuous", "integers"):
        low, high = (np.unique(np.asarray(bound, np.float32)) for bound in (of.low, of.high))
        finite = len(low) == len(high) == 1 and np.isfinite([low[0], high[0]]).all() and abs(high[0]) < 1e30
        size = " x ".join(map(str, of.shape)) or "1"
        what = f"image of {size}" if len(of.shape) > 1 else "1 number" if size == "1" else f"{size} numbers"
        return what + (f" in [{low[0]:g}, {high[0]:g}]" if finite else "")
    return kind


def _bare(env: Any) -> Any:
    """The environment within what `make` puts around it."""
    while isinstance(env, Wrapper) and not isinstance(env, VelocityFree | DiscretisedActions):
        env = env.env
    return env


def _options(env_id: str, constructor: Any, params: Any) -> list[tuple[str, str]]:
    """Name and default of every `--env-options`: arguments of the constructor, and fields of the parameters."""
    fields = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)} if params is not None else {}
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p for p in inspect.signature(constructor).parameters.values() if p.kind in keywords]
    defaults = {p.name: p.default for p in taken} | fields
    names = [*defaults]
    if env_id.startswith(PREFIXES):  # those of the environment inside, too: `make` says them when asked for another one
        try:
            envs.make(env_id, **{"?": 0})
        except ValueError as error:
            names = str(error).partition("allowed: ")[2].split(", ")
    found = []
    for name in names:
        value = defaults.get(name)
        if name in AROUND and name not in defaults:
            continue  # what all have
        if value is None or value is inspect.Parameter.empty:
            found.append((name, "chosen by the environment"))
        elif isinstance(value, str | bool | int | float) or getattr(value, "ndim", 1) == 0:
            found.append((name, code(shown(value.item() if hasattr(value, "dtype") else value))))
        elif isinstance(value, tuple) and all(isinstance(x, str | int | float) for x in value):
            found.append((name, code(",".join(map(shown, value)))))
    return found


def _constructor(env_id: str, bare: Any) -> Any:
    """What `make` calls, and whose arguments are options."""
    if env_id in FINITE:
        return FINITE[env_id]
    if env_id.startswith("mujoco/"):
        from jaxrl_dist.envs import gym_mujoco

        return gym_mujoco.TASKS[env_id.removeprefix("mujoco/")]
    return type(bare.env if env_id.startswith(("brax/", "velocity_free/")) else bare)


def environment_pages(refused: Mapping[str, Mapping[str, str]]) -> tuple[list[Page], str]:
    """The pages, and the table of all of them."""
    found, parts = [], []
    for family, ids in envs.available().items():
        rows = []
        for env_id in ids:
            page, facts = _environment(env_id, family, refused.get(env_id, {}))
            found.append(page)
            rows.append((_env_link(env_id), *facts))
        parts.append(f"## {family}\n\n" + table(("environment", "observations", "actions", "longest episode"), rows))
    return found, "\n\n".join(parts)


def _environment(env_id: str, family: str, refused: Mapping[str, str]) -> tuple[Page, tuple[str, str, str]]:
    """The page of one environment, and what the list of all says of it: observations, actions, longest episode."""
    env, params = envs.make(env_id)
    bare = _bare(env)
    made_by = FINITE.get(env_id, type(bare))
    described = type(bare.env) if family == "brax" else made_by
    module, file = inspect.getmodule(made_by), Path(inspect.getsourcefile(made_by)).resolve()
    ours = any(file.is_relative_to(ROOT / folder) for folder in ("envs", "jaxrl_dist"))
    source = f"[`{file.relative_to(ROOT)}`](source:{file.relative_to(ROOT)})" if ours else f"`{module.__name__}`"
    package = family if family == "brax" else "" if ours else "gymnax"
    limit = np.max(getattr(params, "max_steps_in_episode", np.inf))
    facts = (
        space(env.observation_space(params)), space(env.action_space(params)),
        f"{int(limit):,} steps" if limit < 10**9 else "none",
    )  # fmt: skip
    parts = [f"---\ntitle: {json.dumps(env_id)}\n---", f"# {env_id}"]
    drawing = ROOT / "docs" / "environments" / f"{env_id.replace('/', '-')}.png"
    if drawing.is_file():
        parts.append(picture(drawing, f"a drawing of {env_id}", "width=420 "))
    own, of_module = (inspect.getdoc(each) or "" if each.__doc__ else "" for each in (described, module))
    texts = [own] if package else [of_module, own] if env_id == family else [own, of_module]  # the nearest one first
    texts = [text.removeprefix("See the module's text.").lstrip() for text in dict.fromkeys(texts)]
    parts.append(_foreign(texts[0]) if package else prose(texts[0]))
    made = f"{package} {importlib.metadata.version(package)}, {source}" if package else source
    about = (*facts, _speed(env_id), made)
    names = ("observations", "actions", "longest episode", "steps per second", "made by")
    parts += [table(("what", ""), zip(names, about, strict=True)), *_training(env_id, refused)]
    if choices := _options(env_id, _constructor(env_id, bare), params):
        parts += [
            "## Options", "`--env-options NAME=VALUE ...`, or `envs.make(ID, NAME=VALUE)`; "
            "[what every environment takes](/docs/environments.md#around-every-environment) comes on top.",
            table(("option", "default"), [(code(name), value) for name, value in choices]),
        ]  # fmt: skip
    if any(texts[1:]):
        parts += ["## More about it", prose(texts[1])]
    if found := [experiment for experiment in EXPERIMENTS if _is_on(experiment, env_id)]:
        listed = "\n".join(f"- [{title_of(experiment)}](/experiments/{experiment.name})" for experiment in found)
        parts += ["## Measured on it", listed]
    stands_for = (f"envs/{file.name}",) if ours and env_id == family else ()
    origin = f"envs/{file.name}" if ours else "envs/registry.py"
    return Page(env_uri(env_id), "\n\n".join(parts), origin, stands_for, ("Environments", family)), facts


def _training(env_id: str, refused: Mapping[str, str]) -> list[str]:
    """Who can be trained on it, and how."""
    online = {name: module for name, module in catalog.agents().items() if not takes_data(module.make_agent)}
    accepting = [name for name in online if refused.get(name) == ""]
    best = [name for name in accepting if env_id in online[name].PRESETS]
    usual = [name for name in ("dqn", "sac", "ppo") if name in best]
    if not accepting:
        return ["No algorithm takes it as it is."]

    def links(names: Sequence[str]) -> str:
        return ", ".join(f"[{catalog.display_name(name)}](page:algorithms/{name}.md)" for name in names)

    return [
        "## Train on it", f"```bash\njaxrl-dist train {(usual or best or accepting)[0]} --env-id {env_id}\n```",
        f"Presets for it: {links(best)}." if best else "No algorithm has a preset for it yet.",
        fold(f"{len(accepting)} algorithms accept it", links(accepting)),
    ]  # fmt: skip


def _foreign(docstring: str) -> str:
    """Another library's docstring: its headings would be ours."""
    return re.sub(r"^#+\s*(.+)$", r"**\1**", docstring, flags=re.MULTILINE)


def _is_on(experiment: Path, env_id: str) -> bool:
    slug = env_id.replace("/", "-")
    folders = {path.name.removeprefix("on-policy-") for path in experiment.iterdir() if path.is_dir()}
    text = (experiment / "README.md").read_text(encoding="utf-8") + (experiment / "run.py").read_text(encoding="utf-8")
    plain = "/" in env_id or "-" in env_id  # `maze` is a word, too
    return slug in folders or (plain and re.search(rf"(?<![\w/-]){re.escape(env_id)}(?![\w/-])", text) is not None)


def _speed(env_id: str) -> str:
    """Committed steps per second: of any table of `experiments/throughput` that has them by environment."""
    found = []
    for path in sorted((ROOT / "experiments" / "throughput").glob("*.csv")):
        for row in _rows(path):
            if row.get("environment") == env_id and row.get("steps_per_second"):
                envs_at_once = f" with {row['num_envs']} at once" if row.get("num_envs") else ""
                found.append(f"{float(row['steps_per_second']):,.0f}{envs_at_once}")
    return "; ".join(found) or "not measured by itself; [of whole agents](/docs/speed.md)"


# -- experiments, notebooks, modules ----------------------------------------------------------------------------------


def experiment_pages() -> Iterator[Page]:
    for folder in EXPERIMENTS:
        place = f"experiments/{folder.name}"
        text = (folder / "README.md").read_text(encoding="utf-8")
        files = ", ".join(
            f"[{path.name}]({path.name})" for path in sorted(folder.iterdir())
            if path.is_file() and path.suffix in (".py", ".csv", ".json")
        )  # fmt: skip
        names = [name for name in catalog.algorithms() if name in _about(folder)]
        about = ", ".join(f"[{catalog.display_name(name)}](page:algorithms/{name}.md)" for name in names)
        text += f"\n\n## What is committed\n\nFiles: {files}.\n" + (f"\nAlgorithms in it: {about}.\n" if names else "")
        yield Page(f"{place}.md", text, f"{place}/README.md", (place, f"{place}/README.md"), ("Experiments",))


def _with_mathml(text: str) -> str:
    """Formulas between dollars as what browsers show by themselves."""
    from latex2mathml.converter import convert  # here, since only building the site needs it

    text = re.sub(r"\$\$(.+?)\$\$", lambda it: convert(it[1], display="block"), text, flags=re.DOTALL)
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = (re.sub(r"\$([^$\n]+)\$", lambda it: convert(it[1]), piece) for piece in pieces[::2])
    return "".join(pieces)


def notebook_pages() -> Iterator[Page]:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        uri, parts, pictures = f"notebooks/{path.stem}.md", [], {}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(_with_mathml(source))
                continue
            parts.append(f"```python\n{source}\n```")
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                if "image/png" in data:
                    name = f"{path.stem}_{len(pictures)}.png"
                    pictures[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                    parts.append(f"![output of the cell above](page:notebooks/{name})")
                elif text := "".join(data.get("text/plain", output.get("text", ""))).strip():
                    parts.append(f"```text\n{text}\n```")
        file = f"notebooks/{path.name}"
        parts.insert(1, f"The notebook itself: [`{file}`](asset:{file}).")
        yield Page(uri, "\n\n".join(parts), file, (file,), ("Guides", "Notebooks"), pictures)


def module_pages() -> Iterator[Page]:
    """The reference: one page per module of the toolkit and of the environments."""
    rows = []
    for folder in ("jaxrl_dist", "envs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            if parts[-1] in ("__init__", "__main__") or not text:
                continue
            module = ".".join(["jaxrl_dist", *(parts[1:] if folder == "jaxrl_dist" else parts)])
            file = str(path.relative_to(ROOT))
            uri = f"reference/{'/'.join(module.split('.')[1:])}.md"
            page = (
                f"---\ntitle: {parts[-1]}\n---\n\n# `{module}`\n\nSource: [`{file}`](source:{file}).\n\n::: {module}\n"
            )
            wing = module.split(".")[1] if module.count(".") > 1 else "the rest"
            rows.append((wing, f"[`{module}`](page:{uri})", _paragraph(text.splitlines()[0])))
            yield Page(uri, page, file, (), ("Reference", wing))
    intro = (
        "# Reference\n\nEvery module of the toolkit and of the environments, from its docstrings. "
        "[CONTRIBUTING](/CONTRIBUTING.md#the-house) says how they lie above each other."
    )
    listed = table(("wing", "module", "what it is"), sorted(rows))
    yield Page("reference.md", f"{intro}\n\n{listed}", "README.md", ("jaxrl_dist",))


def project_pages() -> Iterator[Page]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    yield Page("index.md", f"---\nhide: [navigation]\n---\n\n{readme}", "README.md", ("README.md", "docs"))
    for file in ("CONTRIBUTING.md", "CHANGELOG.md"):
        yield Page(file.lower(), (ROOT / file).read_text(encoding="utf-8"), file, (file,), ("Project",))


class Made(NamedTuple):
    """All that is made."""

    pages: list[Page]
    insertions: dict[str, str]
    """what takes the place of a comment in a hand-written page, by its words"""


def make() -> Made:
    refused = {}
    for ids in envs.available().values():
        refused |= compatibility.refusals(catalog.agents(), ids)
    environments, listed = environment_pages(refused)
    made = [
        algorithm_pages(refused), environments, experiment_pages(), notebook_pages(), module_pages(), project_pages(),
    ]  # fmt: skip
    named = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    others = [folder for folder in EXPERIMENTS if f"experiments/{folder.name})" not in named]
    further = "\n".join(f"- [`experiments/{x.name}`](/experiments/{x.name}): {title_of(x)}" for x in others)
    insertions = {
        "experiments that are not named above": f"## Others\n\n{further}" if others else "",
        "all environments": listed,
        "what may stand around an environment": prose(inspect.getdoc(gym_wrappers)),
        "options of every run": settings(RunOptions),
        "options of sweeps": settings(SweepOptions),
    }
    return Made([page for group in made for page in group], insertions)

"""What people read: links lead somewhere, commands are understood, every algorithm and option is told of."""

import ast
import dataclasses
import importlib.util
import json
import posixpath
import re
import shlex
import types
from pathlib import Path

import pytest

from jaxrl_dist import cli, envs, outside
from jaxrl_dist.configuration import check_configuration
from jaxrl_dist.reports import compare, write
from jaxrl_dist.running import catalog, compile_cache, doctor, hosts, problem, session
from jaxrl_dist.studies import optuna_study, study

ROOT = Path(__file__).parents[1]
HAND_WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = [*HAND_WRITTEN, *sorted(ROOT.glob("experiments/**/*.md"))]
FENCE = re.compile(r"^```.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
MOST_LINES_OF_README = 130


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def texts() -> dict[str, str]:
    """All Markdown by the file that it is in; of notebooks, their cells of text."""
    found = {name_of(path): path.read_text(encoding="utf-8") for path in PAGES}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        markdown = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        found[name_of(path)] = "\n\n".join(markdown)
    return found


# -- links ------------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those in code."""
    plain = re.sub(r"`[^`\n]*`(?!\])", "", FENCE.sub("", text))
    return re.findall(r"\]\(([^()\s]+(?:\([^()\s]*\))?)\)", plain)


def anchors(text: str) -> set[str]:
    """What headings are called in links, as code hosts and the site do it."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    words = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings]
    return {re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", word)) for word in words}


def broken(text: str, file: str, known: dict[str, str]) -> list[str]:
    found = []
    for target in links(text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(file), path)) if path else file
        if place.startswith("..") or not (ROOT / place).exists():
            found.append(f"{file}: {target} is not there")
        elif anchor and anchor not in anchors(known.get(place, "")):
            found.append(f"{file}: {target} has no such heading")
    return found


def test_every_link_leads_somewhere():
    known = texts()
    assert [line for file, text in known.items() for line in broken(text, file, known)] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("[a](README.md)", 0), ("[a](docs/nothing.md)", 1), ("[a](#b-c)\n\n# B, `c`", 0), ("[a](#b)\n\n# C", 1),
        ("```\n[a](nothing.md)\n```", 0), ("`[a](nothing.md)`", 0), ("[`a`](nothing.md)", 1), ("![a](nothing.png)", 1),
        ("[a](https://nowhere.invalid/x)", 0), ("[a](../outside.md)", 1), ("[a](docs/speed.md#speed)", 0),
    ],
)  # fmt: skip
def test_the_check_of_links_finds_what_is_broken(text, count):
    known = texts()
    assert len(broken(text, "CHANGELOG.md", known | {"CHANGELOG.md": text})) == count


# -- commands ---------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of every command of ours in the shell blocks of a text, wherever in its line it stands."""
    found = []
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        given = dict(re.findall(r'^([A-Z]+)="(.*)"$', block, re.MULTILINE))
        for name, value in given.items():
            block = block.replace(f"${name}", value)
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            found += _commands_in(line)
    return found


def _commands_in(line: str) -> list[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # no command line
        return []
    if words and re.fullmatch(r"[A-Z]+=.*", words[0]):
        return []
    inner = [command for word in words if ".py --" in word for command in _commands_in(word)]
    for place, word in enumerate(words):
        if word == "jaxrl-dist" or re.fullmatch(r"(algorithms|experiments)/\S+\.py", word):
            end = next((i for i, later in enumerate(words) if i > place and later in ("&", "|", "&&")), len(words))
            return [*inner, words[place:end]]
    return inner


@pytest.fixture
def only_understood(monkeypatch, tmp_path):
    """Everything up to what a command would do: options are read and checked, agents made, and nothing is trained."""

    def prepare(algorithm, make_agent, config, options):
        options = problem.with_total_steps(options, config)
        check_configuration(options)
        check_configuration(config)
        if not outside.is_outside(options.env_id):
            data = (None,) * problem.takes_data(make_agent)
            make_agent(config, *problem.make_env(options.env_id, options.env_options), *data)

    def several(algorithm, make_agent, config, options, *rest):
        prepare(algorithm, make_agent, config, options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problem, "prepare", prepare)
    for module in (study, optuna_study):
        monkeypatch.setattr(module, "train", several)
    nothing = ((session, "train"), (hosts, "join"), (hosts, "watch"), (compile_cache, "use"))
    nothing += ((write, "write"), (compare, "compare"))
    # What `jaxrl-dist` calls when it has read its words.
    called = ("_list", "_evaluate", "_evaluate_in_gymnasium", "_collect", "_plot", "_plot_distribution", "_render")
    called += ("_require_sound", "spread_over_cores")
    for module, name in (*nothing, *((cli, name) for name in called)):
        monkeypatch.setattr(module, name, lambda *_, **__: None, raising=False)
    monkeypatch.setattr(doctor, "main", lambda: 0)


# Pages whose commands are run as they stand: test_own_problems.py.
RUN_ELSEWHERE = ("own_environment", "own_algorithm")
COMMANDS = sorted(
    {shlex.join(words): words for path in HAND_WRITTEN if path.stem not in RUN_ELSEWHERE
     for words in commands(path.read_text(encoding="utf-8"))}.items()
)  # fmt: skip


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[line for line, _ in COMMANDS])
def test_commands_are_understood(words, only_understood, capsys):
    program, *arguments = words
    if program.startswith("experiments/"):
        source = (ROOT / program).read_text(encoding="utf-8")
        flags = [word.partition("=")[0][2:] for word in arguments if word.startswith("--")]
        assert [flag for flag in flags if flag not in source and flag.replace("-", "_") not in source] == []
        return
    try:
        if program == "jaxrl-dist":
            cli.command(arguments)
        else:
            module = catalog.find_algorithm(Path(program).stem)
            assert Path(module.__file__).resolve() == ROOT / program
            if hasattr(module, "make_agent"):
                cli.main(module.Config, module.make_agent, module.PRESETS, arguments)
            else:
                cli.solve(module.Config, module.solve, arguments) if "--help" in arguments else None
    except SystemExit as ended:
        if ended.code:
            pytest.fail(capsys.readouterr().err)


def test_commands_are_found_and_wrong_ones_are_not_understood(only_understood, capsys):
    text = """
```bash
srun -n 2 python algorithms/actor_critic/tqc.py --nothing 3 &   # a remark
jaxrl-dist plot runs/*/a --out \\
  b.png | cat
```
"""
    first, second = commands(text)
    assert first == ["algorithms/actor_critic/tqc.py", "--nothing", "3"]
    assert second == ["jaxrl-dist", "plot", "runs/*/a", "--out", "b.png"]
    with pytest.raises(pytest.fail.Exception, match="--nothing is no option of jaxrl-dist train tqc"):
        test_commands_are_understood(first, only_understood, capsys)


def python_blocks() -> list[tuple[str, str]]:
    found = []
    for path in HAND_WRITTEN:
        if path.stem not in RUN_ELSEWHERE:
            blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
            found += [(f"{name_of(path)}:{number}", block) for number, block in enumerate(blocks)]
    return found


@pytest.mark.parametrize(("where", "block"), python_blocks(), ids=lambda value: value if ":" in value[:60] else "")
def test_python_in_pages_begins_as_it_should(where, block):
    """It can be read, and what can run without what stands before it does, up to where something would be trained."""
    ast.parse(block)
    before = block.partition(".jit(")[0].rpartition("\n")[0]
    if "jaxrl_dist import envs" in block:
        exec(compile(before, where, "exec"), {})


# -- what is told -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site_pages() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_algorithm_has_a_row():
    table = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    files = {name: f"algorithms/{module.split('.')[-2]}/{name}.py" for name, module in catalog.algorithms().items()}
    assert [name for name, file in files.items() if file not in table] == []


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


def test_every_option_says_what_it_is_for(site_pages):
    for name in catalog.algorithms():
        config = catalog.find_algorithm(name).Config
        texts_of = site_pages.help_of(config)
        assert [*texts_of] == [field.name for field in dataclasses.fields(config)]
        assert [option for option, text in texts_of.items() if not text] == [], name
        assert site_pages.settings(config).count("\n| `--") == len(texts_of)


def test_docstrings_become_markdown(site_pages):
    made = site_pages.prose(
        'Paper: "A", arXiv 1707.06347, of `value_based/dqn.py`; Q*(s) < A*(s), *every* one.\n\n    y = a * b\n\n'
        "Run:      python x.py\n          python y.py\nExpected: much, experiments/offline."
    )
    assert made == (
        '**Paper:** "A", [arXiv 1707.06347](https://arxiv.org/abs/1707.06347), of '
        "[`value_based/dqn.py`](/algorithms/value_based/dqn.py); Q\\*(s) &lt; A\\*(s), *every* one.\n\n"
        "```text\ny = a * b\n```\n\n## Run it\n\n```bash\npython x.py\npython y.py\n```\n\n"
        "**Expected:** much, [experiments/offline](/experiments/offline)."
    )


def test_results_and_experiments_are_found_by_what_they_hold(site_pages):
    assert site_pages.algorithm_called("ppo-quantile") == "ppo"
    assert site_pages.algorithm_called("dsac_t") == "dsac_t"
    assert site_pages.algorithm_called("robust PLR, positive value loss") == "plr"
    assert site_pages.algorithm_called("DecQN") == "decoupled_dqn"
    assert site_pages.algorithm_called("domain randomisation") == ""
    assert {row[1] for row in site_pages.results_of("tqc")} >= {"Pendulum-v1", "brax/inverted_double_pendulum"}
    by_name = {folder.name: folder for folder in site_pages.EXPERIMENTS}
    assert "iqn" in site_pages._about(by_name["risk_bridge"])
    assert "sac" in site_pages._about(by_name["inverted_pendulum"])


def test_spaces_are_said_in_words(site_pages):
    said = {
        name: tuple(site_pages.space(space(params)) for space in (env.observation_space, env.action_space))
        for name in ("CartPole-v1", "Breakout-MinAtar", "Pendulum-v1", "factored")
        for env, params in (envs.make(name),)
    }
    assert said["CartPole-v1"] == ("4 numbers", "a choice of 2")
    assert said["Breakout-MinAtar"][0].startswith("image of 10 x 10 x 4")
    assert said["Pendulum-v1"][1] == "1 number in [-1, 1]"
    assert said["factored"][1].startswith("choices of")

"""The house rules that tools do not check: imports only go down, and what is installed is what is in the repository."""

import ast
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_FOLDERS = ("jaxrl_dist", "algorithms", "envs")  # installed; the top-level two inside of `jaxrl_dist`
FOR_USERS = ("LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md")
CODE_FOLDERS = (*PACKAGE_FOLDERS, "experiments", "tests")
# Floors, the lowest first: what a file in this folder may not import, at whatever place in the file.
FORBIDDEN = {
    "jaxrl_dist": ("jaxrl_dist.envs", "jaxrl_dist.algorithms", "experiments", "tests"),
    "envs": ("jaxrl_dist.algorithms", "experiments", "tests"),
    "algorithms": ("jaxrl_dist.algorithms", "experiments", "tests"),
    "experiments": ("tests",),
    "tests": (),
}
# Wings of the toolkit, the highest first: a file imports from its own and from lower ones, at whatever place in it.
WINGS = (
    "__main__", "cli", "reports", "studies", "running", "learning", "records", "agent", "distributional", "switches",
    "threefry", "outside", "configuration", "wording",
)  # fmt: skip
# What algorithm files are made of, beside environments: nothing that runs them but the command line's last line.
FOR_ALGORITHMS = ("agent", "cli", "configuration", "distributional", "learning", "records")
# The toolkit knows environments and algorithms by name: the import stands in the function that was given one.
LAZY = {"jaxrl_dist": ("jaxrl_dist.envs", "jaxrl_dist.algorithms")}


def module_name(path: Path) -> str:
    """Name under which a file of the repository is imported: `envs/probe.py` -> `jaxrl_dist.envs.probe`."""
    parts = list(path.with_suffix("").parts)
    if parts[0] in ("algorithms", "envs"):
        parts.insert(0, "jaxrl_dist")
    return ".".join(parts)


def imports(source: str, module: str) -> Iterator[tuple[str, int, bool]]:
    """Every import as (absolute name, line, whether it is inside a function); `from a import b` is named `a.b`."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {child for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.lineno, node in inside


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def broken_rules(path: Path, source: str) -> list[str]:
    """Imports of a file (path relative to the repository) that the floors forbid, as `path:line: what`."""
    folder, module = path.parts[0], module_name(path)
    found = []
    for name, line, lazy in imports(source, module):
        for package in FORBIDDEN[folder]:
            if is_in(name, package) and not (lazy and package in LAZY.get(folder, ())):
                found.append(f"{path}:{line}: imports {name}, which is not below it")
        wing = name.split(".")[1] if is_in(name, "jaxrl_dist") and "." in name else ""
        of_the_toolkit = folder == "jaxrl_dist" and module != "jaxrl_dist" and wing in WINGS
        if of_the_toolkit and WINGS.index(wing) < WINGS.index(module.split(".")[1]):
            found.append(f"{path}:{line}: imports {name}, which is in a higher wing")
        if folder == "algorithms" and wing in WINGS and wing not in FOR_ALGORITHMS:
            found.append(f"{path}:{line}: imports {name}, which runs algorithms")
        if name.split(".")[0] in ("envs", "algorithms"):
            found.append(f"{path}:{line}: imports {name}; its installed name is jaxrl_dist.{name}")
    return found


def source_files(*folders: str) -> list[Path]:
    return sorted(
        path.relative_to(REPOSITORY)
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("jaxrl_dist/learning/replay.py", "import jax\nfrom jaxrl_dist.learning import returns", False),
        ("jaxrl_dist/learning/replay.py", "from jaxrl_dist.configuration import require", False),
        ("jaxrl_dist/learning/replay.py", "from jaxrl_dist.running import training", True),
        ("jaxrl_dist/learning/replay.py", "def f():\n    from jaxrl_dist.running import training", True),
        ("jaxrl_dist/learning/replay.py", "import jaxrl_dist.running.training", True),
        ("jaxrl_dist/records/tables.py", "from ..learning import replay", True),
        ("jaxrl_dist/agent.py", "from jaxrl_dist import cli", True),
        ("jaxrl_dist/cli.py", "from jaxrl_dist.studies import study", False),
        ("jaxrl_dist/learning/replay.py", "from jaxrl_dist.envs import make", True),
        ("jaxrl_dist/learning/replay.py", "from jaxrl_dist import envs", True),
        ("jaxrl_dist/learning/replay.py", "import jaxrl_dist.algorithms.actor_critic.tqc as tqc", True),
        ("jaxrl_dist/cli.py", "from . import envs", True),
        ("jaxrl_dist/distributional/risk.py", "from ..envs import make", True),
        ("jaxrl_dist/distributional/risk.py", "from . import quantile", False),
        ("jaxrl_dist/learning/replay.py", "import experiments.throughput.run", True),
        ("jaxrl_dist/cli.py", "def train():\n    from jaxrl_dist import envs", False),
        ("jaxrl_dist/cli.py", "def train():\n    import experiments", True),
        ("jaxrl_dist/cli.py", "if True:\n    from jaxrl_dist import envs", True),
        ("jaxrl_dist/cli.py", "class A:\n    from jaxrl_dist import envs", True),
        ("envs/probe.py", "from jaxrl_dist.learning import interaction", False),
        ("envs/probe.py", "from jaxrl_dist.envs import brax", False),
        ("envs/probe.py", "def f():\n    from jaxrl_dist.algorithms import actor_critic", True),
        ("algorithms/actor_critic/tqc.py", "from jaxrl_dist.envs import make", False),
        ("algorithms/actor_critic/tqc.py", "from jaxrl_dist.algorithms.actor_critic import sac", True),
        ("algorithms/actor_critic/tqc.py", "from . import sac", True),
        ("algorithms/actor_critic/tqc.py", "from jaxrl_dist.running import training", True),
        ("algorithms/actor_critic/tqc.py", "from jaxrl_dist.learning import experience", False),
        ("algorithms/actor_critic/tqc.py", "def f():\n    from .sac import State", True),
        ("algorithms/actor_critic/tqc.py", "from algorithms.actor_critic import sac", True),
        ("experiments/throughput/run.py", "from jaxrl_dist.algorithms.actor_critic import tqc", False),
        ("experiments/throughput/run.py", "import envs", True),
        ("tests/test_envs.py", "from envs import make", True),
        ("tests/test_envs.py", "def f():\n    import algorithms.actor_critic.tqc", True),
        ("tests/test_envs.py", "import gymnax.environments", False),
    ],
)
def test_the_rules_find_what_breaks_them(path, source, broken):
    assert bool(broken_rules(Path(path), source)) == broken


def test_imports_only_go_down():
    files = source_files(*CODE_FOLDERS)
    assert {path.parts[0] for path in files} >= {"jaxrl_dist", "algorithms", "envs", "tests"}
    found = [line for path in files for line in broken_rules(path, (REPOSITORY / path).read_text(encoding="utf-8"))]
    assert found == []


def test_every_room_is_in_a_wing_and_no_two_rooms_have_one_name():
    rooms = [path for path in source_files("jaxrl_dist") if path.stem != "__init__"]
    assert {module_name(path).split(".")[1] for path in rooms} == {*WINGS}
    names = [path.stem for path in rooms]
    assert sorted({*names}) == sorted(names)


def test_no_two_files_import_each_other():
    """Not through others either; what a function imports when it is called is no circle."""
    files = {module_name(path): path for path in source_files(*PACKAGE_FOLDERS)}
    below = {}
    for module, path in files.items():
        names = imports((REPOSITORY / path).read_text(encoding="utf-8"), module)
        found = {name if name in files else name.rpartition(".")[0] for name, _, lazy in names if not lazy}
        below[module] = (found & {*files}) - {module}
    while leaves := {module for module, others in below.items() if not others & {*below}}:
        below = {module: others for module, others in below.items() if module not in leaves}
    assert below == {}


def test_every_package_folder_is_listed_and_every_listed_one_exists():
    setuptools = PYPROJECT["tool"]["setuptools"]
    folders = {path.parent for path in source_files(*PACKAGE_FOLDERS)}
    assert sorted(setuptools["packages"]) == sorted(module_name(folder) for folder in folders)
    for folder in folders:
        assert (REPOSITORY / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
    for package, folder in setuptools["package-dir"].items():
        assert module_name(Path(folder)) == package


def test_installed_version_and_source_agree():
    import importlib.metadata

    import jaxrl_dist

    assert jaxrl_dist.__version__ == PYPROJECT["project"]["version"]
    assert importlib.metadata.version("jaxrl-dist") == jaxrl_dist.__version__


def test_licence_citation_and_changelog_say_what_the_package_is():
    licence = " ".join((REPOSITORY / "LICENSE").read_text(encoding="utf-8").split())
    assert licence.startswith("Apache License Version 2.0, January 2004")
    assert licence.endswith("limitations under the License.")
    project = PYPROJECT["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format 1.2.0 asks for
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changes.index("\n## [Unreleased]\n") < changes.index(f"\n## [{project['version']}] - ")


def test_modules_that_windows_lacks_are_imported_in_functions_only():
    """So that Windows gets the sentence of `doctor.require_platform` rather than an ImportError."""
    lacking = ("fcntl", "resource", "termios", "pwd", "grp")
    for path in source_files(*PACKAGE_FOLDERS):
        source = (REPOSITORY / path).read_text(encoding="utf-8")
        if any(f"import {module}" in source for module in lacking):
            for name, line, lazy in imports(source, module_name(path)):
                assert lazy or name not in lacking, f"{path}:{line} imports {name}"


def test_the_wheel_holds_every_module_under_one_import_root(tmp_path):
    """Built without isolation, so without a network, in a copy, since setuptools leaves its `build` folder behind."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "MANIFEST.in", "Makefile", "constraints.txt", *FOR_USERS):
        shutil.copy(REPOSITORY / name, copy)
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"from setuptools import build_meta as build; build.build_sdist({str(tmp_path)!r})"
    program += f"; build.build_wheel({str(tmp_path)!r})"
    built = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (REPOSITORY / "LICENSE").read_bytes()
    assert "jaxrl_dist/py.typed" in names
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    assert in_source >= {*FOR_USERS, "constraints.txt", "Makefile", "jaxrl_dist/py.typed"}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {module_name(path).replace(".", "/") + ".py" for path in source_files(*PACKAGE_FOLDERS)}
    assert "jaxrl_dist/algorithms/actor_critic/tqc.py" in modules
    assert "jaxrl_dist/envs/__init__.py" in modules
    assert {name.split("/")[0] for name in names} == {"jaxrl_dist", wheel.name.rsplit("-", 3)[0] + ".dist-info"}

    # The wheel alone is enough, beside a user's own `envs` and `algorithms`.
    user = tmp_path / "user"
    for name in ("envs", "algorithms"):
        (user / name).mkdir(parents=True)
        (user / name / "__init__.py").write_text("mine = True\n")
    program = f"""
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, {str(wheel)!r})
import algorithms, envs
assert envs.mine and algorithms.mine
for name in ("envs", "algorithms"):
    print(importlib.util.find_spec(f"jaxrl_dist.{{name}}").origin)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=user, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(wheel)) == 2


def test_constraints_pin_every_dependency_within_its_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pins = {}
    for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line:
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            assert pin.url is None, line
            pins[canonicalize_name(pin.name)] = specifier.version
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["dev"] + extras["docs"]:
        requirement = Requirement(line)
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line}: constraints.txt pins {version}"


# ------------------------------------------------------------------------------- what tests/conftest.py promises


def test_tests_run_on_the_cpu():
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.vmap(f, axis_size=3, in_axes=None)])
def test_a_key_used_twice_is_an_error(wrap):
    def use_twice(key):
        return jax.random.normal(key) + jax.random.uniform(key)

    def use_once(key):
        first, second = jax.random.split(key)
        return jax.random.normal(first) + jax.random.uniform(second)

    wrap(use_once)(jax.random.key(0))
    with pytest.raises(jax.errors.KeyReuseError):
        wrap(use_twice)(jax.random.key(0))


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning])
def test_a_deprecation_that_our_code_sets_off_is_an_error(category):
    def warn_from(module: str) -> None:
        exec("import warnings\nwarnings.warn('going away', category)", {"__name__": module, "category": category})

    with pytest.raises(category):
        warn_from("jaxrl_dist.algorithms.actor_critic.tqc")
    with warnings.catch_warnings(record=True) as caught:
        warn_from("somebody.elses.package")
    assert len(caught) == 1  # a warning as ever


def test_every_test_has_a_time_limit(request):
    assert 0 < float(request.config.getini("timeout")) <= 900
    assert request.config.getini("timeout_method") == "thread"


# -- algorithm files --------------------------------------------------------------------------------------------------

ALGORITHM_FILES = sorted(path for path in (REPOSITORY / "algorithms").rglob("*.py") if path.name != "__init__.py")
MOST_LINES = 330


@pytest.mark.parametrize("path", ALGORITHM_FILES, ids=lambda path: path.stem)
def test_algorithm_files_stay_short(path):
    """One file is one paper; what makes it longer belongs to the toolkit, or to another paper."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


# What an agent without a loss has in its place.
ESTIMATES = {"variance_reduced": ("shares", "discounts", "importance_weight")}
WITH_LOSSES = [*ALGORITHM_FILES, REPOSITORY / "jaxrl_dist" / "learning" / "clipped.py"]


@pytest.mark.parametrize("path", WITH_LOSSES, ids=lambda path: path.stem)
def test_losses_and_targets_of_agents_begin_with_the_shapes_they_take(path):
    """What broadcasts in silence is wrong in silence. Some agents have their losses from the toolkit."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if path in ALGORITHM_FILES and not any(node.name == "make_agent" for node in functions):
        pytest.skip("no agent")
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    if "jaxrl_dist.learning.clipped" in {node.module for node in imported}:
        return
    estimates = ESTIMATES.get(path.stem, ())
    found = [x for x in functions if "loss" in x.name or x.name.startswith("target_") or x.name in estimates]
    assert found
    for node in found:
        first = node.body[1] if ast.get_docstring(node) else node.body[0]
        while isinstance(first, ast.Assign):  # names for sizes may come before
            first = node.body[node.body.index(first) + 1]
        assert ast.unparse(first).startswith("chex.assert_"), f"{path.name}: {node.name}"

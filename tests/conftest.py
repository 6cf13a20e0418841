"""What holds in every test: the CPU, an error wherever a random key is used twice, and programs compiled only once."""

import functools
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, and inherited by the processes that tests start
# Most of the suite's time is compiling, and many tests compile the same programs. The processes of pytest-xdist and
# those that tests start inherit the folder; it goes when the first process ends.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="jaxrl_dist-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import proofs
import pytest

from jaxrl_dist.running import catalog

# A pytest plug-in may have imported jax before this file.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Sees typed keys only, in jit, scan and vmap. gymnax 1.0.1 (its 25 environments that need no download) and the
# resets of brax 0.14.2 were checked under it and reuse none, so there is no switch to turn it off.
jax.config.update("jax_debug_key_reuse", True)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="tests, too, whose subject has not changed: see proofs.py")
    parser.addoption("--prove", action="store_true", help="note in proofs.json what passes")


def group_of(nodeid: str) -> str:
    """The agent that a test of the algorithms is about, else the file that it is in."""
    return proofs.agent_of(nodeid) or nodeid.partition("::")[0]


def pytest_collection_modifyitems(items):
    """Tests of one agent follow each other, and those of one file: they share what is compiled."""
    groups = [group_of(item.nodeid) for item in items]
    place = {group: index for index, group in reversed([*enumerate(groups)])}
    items[:] = [item for _, item in sorted(zip(groups, items, strict=True), key=lambda pair: place[pair[0]])]


def pytest_xdist_make_scheduler(config, log):
    """A group stays in one process. (The `loadgroup` of pytest-xdist 3.8 does nothing with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)  # before fixtures do what the test then does not need
def pytest_runtest_setup(item):
    if mark := item.get_closest_marker("proves"):
        proofs.check(item, proofs.sources(*mark.args, item.nodeid.partition("::")[0]))
    elif found := proofs.group(item):
        name, subject = found
        proofs.check(item, subject, name)


@pytest.fixture
def proof(request):
    """`proof(subject)` skips the test if it has passed with this subject before: see `proofs.py`."""
    return functools.partial(proofs.check, request.node)


def pytest_sessionfinish(session):
    if session.config.option.prove and not hasattr(session.config, "workerinput"):
        stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
        # What a missing package left untried is not proven.
        untried = [report for report in stats.get("skipped", ()) if "is not installed" in str(report.longrepr)]
        proofs.write(stats.get("passed", ()), [*stats.get("failed", ()), *stats.get("error", ()), *untried])


def pytest_terminal_summary(terminalreporter):
    """Seconds of all tests by folder, family and algorithm: what adding one costs, and where CI's time goes."""
    sums, modules = {"folder": Counter(), "family": Counter(), "algorithm": Counter()}, catalog.algorithms()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            path = report.nodeid.partition("::")[0]
            folder = Path(path).parts[1] if path.count("/") > 1 else Path(path).stem
            sums["folder"][folder] += report.duration
            for name in proofs.algorithms_of(report.nodeid):
                sums["algorithm"][name] += report.duration
                sums["family"][modules[name].split(".")[-2]] += report.duration
    for title, seconds in sums.items():
        terminalreporter.section(f"seconds by {title}")
        terminalreporter.write_line("  ".join(f"{name} {total:.0f}" for name, total in seconds.most_common()))

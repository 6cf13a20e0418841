"""What holds in every test: the CPU, an error wherever a random key is used twice, and programs compiled only once."""

import os
import re
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
import pytest

# A pytest plug-in may have imported jax before this file.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
# Sees typed keys only, in jit, scan and vmap. gymnax 1.0.1 (its 25 environments that need no download) and the
# resets of brax 0.14.2 were checked under it and reuse none, so there is no switch to turn it off.
jax.config.update("jax_debug_key_reuse", True)


def pytest_terminal_summary(terminalreporter):
    """Seconds of all tests by folder and by algorithm: what adding one costs, and where CI's time goes."""
    import toys

    folders, algorithms, names = Counter(), Counter(), toys.agents()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            path, _, rest = report.nodeid.partition("::")
            folders[Path(path).parts[1] if path.count("/") > 1 else Path(path).stem] += report.duration
            words = {Path(path).stem.removeprefix("test_"), *re.findall(r"\w+", rest.partition("[")[2])}
            for name in words & {*names}:
                algorithms[name] += report.duration
    for title, seconds in (("folder", folders), ("algorithm", algorithms)):
        terminalreporter.section(f"seconds by {title}")
        terminalreporter.write_line("  ".join(f"{name} {total:.0f}" for name, total in seconds.most_common()))

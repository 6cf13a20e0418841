"""The session of two guides, typed as it stands, in a folder outside the clone: an environment, then an algorithm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("docs/guides/own_environment.md", "docs/guides/own_algorithm.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
@pytest.mark.proves(*PAGES, "jaxrl_dist/outside.py", "jaxrl_dist/running/catalog.py", "jaxrl_dist/cli.py")
def test_the_session_is_what_it_says(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "COLUMNS": "120", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    for language, text in BLOCKS:
        if language == "python" and (file := re.match(r"# (\w+\.py)\n", text)):
            (tmp_path / file[1]).write_text(text)
            continue
        program = ["bash", "-e"] if language == "bash" else [sys.executable]
        done = subprocess.run(
            [*program, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    returns = {
        folder: pd.read_csv(tmp_path / "runs" / folder / "evaluations.csv")
        for folder in ("ppo/rail.py-Rail/first", "dqn/rail.py-Rail/second", "reinforce/rail.py-Rail/second")
    }
    for folder, episodes in returns.items():
        steps = sorted(episodes.env_steps.unique())
        first, last = (episodes[episodes.env_steps == step].episode_return.mean() for step in (steps[0], steps[-1]))
        assert last > first + 3, folder  # of 50
    assert {"rail.png", "rail.html", "reinforce.html", "rail.npz"} <= {path.name for path in tmp_path.iterdir()}

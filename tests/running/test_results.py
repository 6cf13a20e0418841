"""What is said of runs that are over, and runs whose `config.json` is not what this version writes."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.algorithms.value_based import dqn
from jaxrl_dist.running import results
from jaxrl_dist.running.problem import RunOptions


def shown(*arguments) -> str:
    text = io.StringIO()
    results.print_results(Console(file=text, width=120), *arguments)
    return text.getvalue()


RETURNS = np.array([[1.0, 3.0], [np.nan, 5.0], [4.0, 4.0]])


def test_returns_that_are_not_finite_are_left_out_and_said():
    text = shown([0, 1, 2], RETURNS, {1: "at iteration 7: loss"})
    assert "IQM over 2 seeds: 3.0, 95 % interval [2.0, 4.0] (1 of 3 left out: not finite)" in text
    assert "CVaR 10 % of all 4 episode returns: 1.0" in text
    (row,) = (line for line in text.splitlines() if "not finite" in line and "IQM" not in line)
    assert "at iteration 7: loss" in row
    assert "no seed has finite returns" in shown([0], RETURNS[1:2])
    assert "diverged" not in shown([0, 2], RETURNS[::2])
    assert "left out" not in shown([0, 2], RETURNS[::2])


GOOD = {
    "algorithm": "dqn", "config": dataclasses.asdict(dqn.Config()), "runs_mode": "map", "configurations": [],
    "options": dataclasses.asdict(RunOptions(env_id="CartPole-v1", num_seeds=1)),
}  # fmt: skip


def changed(group: str, **fields) -> dict:
    return GOOD | {group: {name: x for name, x in (GOOD[group] | fields).items() if x is not ...}}


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("", "config.json is empty"),
        ('{"algorithm": "dqn", "conf', "config.json is damaged: no complete JSON"),
        ({name: GOOD[name] for name in GOOD if name != "runs_mode"}, "config.json has no field 'runs_mode'"),
        (GOOD | {"config": None}, "config.json: config is null; it must be an object"),
        (GOOD | {"algorithm": "dqnn"}, "config.json: NAME is 'dqnn', which is no algorithm; did you mean dqn"),
        (GOOD | {"runs_mode": "fast"}, "options.runs_mode is 'fast'; it must be one of 'auto', 'vmap'"),
        (changed("config", gone=1), "config.json: config has the field 'gone', which this version"),
        (changed("options", gone=1), "config.json: options has the field 'gone', which this version"),
        (changed("config", learning_rate="1e-3"), "config.json: config.learning_rate is '1e-3'; it must be a number"),
        (changed("config", batch_size=32.0), "config.json: config.batch_size is 32.0; it must be a whole number"),
        (changed("config", hidden=[64, "64"]), r"config.hidden is \[64, '64'\]; it must be a list, each part of"),
        (changed("options", plots=1), "config.json: options.plots is 1; it must be true or false"),
        (changed("config", discount=2), "config.json: --discount is 2; it must be"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_one_line_wherever_it_is_read(tmp_path, saved, message):
    (tmp_path / "config.json").write_text(saved if isinstance(saved, str) else json.dumps(saved))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=message) as raised:
        results.load_run(tmp_path, cli.find_algorithm, episodes=1)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)


def test_a_config_of_an_older_version_gets_defaults_and_says_which(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed("config", discount=...)))
    with (
        pytest.warns(UserWarning, match=r"config\.json: config lacks fields .*; taken as discount = 0\.99"),
        pytest.raises(ValueError, match="which holds no checkpoint"),
    ):
        results.load_run(tmp_path, cli.find_algorithm, episodes=1)


@pytest.mark.parametrize("command", ["evaluate", "evaluate --gymnasium", "plot", "plot --distribution", "report"])
def test_no_command_answers_a_damaged_folder_with_a_traceback(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    monkeypatch.chdir(tmp_path)
    for text in ("", "{", "[]", "{}", "\udcff", json.dumps(GOOD | {"options": {}})):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(SystemExit, match="2"):
            cli.command([*command.split(), str(tmp_path)])
        captured = capsys.readouterr()
        (said,) = captured.err.splitlines()
        assert said.startswith("error: ")
        assert str(tmp_path / "config.json") in said
        assert "Traceback" not in captured.out

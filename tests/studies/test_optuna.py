"""Studies whose configurations Optuna proposes: a real one, and many whose training is a formula."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from rich.console import Console
from toys import LearnerConfig, make_learner

from jaxrl_dist import cli
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording
from jaxrl_dist.running import folders, memory, problem, session
from jaxrl_dist.studies import optuna_study
from jaxrl_dist.studies.sweeps import Span, SweepOptions

CONFIG = LearnerConfig()
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=10",), total_steps=48, num_seeds=2, eval_episodes=2, eval_states=0,
    plots=False, device="cpu", name="some", runs_mode="map",
)  # fmt: skip
AXES = {"push": Span(-1.0, 1.0, 0, False), "width": [1, 2]}
BEST = 0.3


def train(folder: Path, trials: int, axes=AXES, console: Console | None = None, **changes) -> Path:
    of_the_sweep = {name: changes.pop(name) for name in [*changes] if name.startswith("sweep_")}
    options = dataclasses.replace(OPTIONS, runs_folder=str(folder), **changes)
    sweep = SweepOptions(sweep_optuna=trials, **of_the_sweep)
    console = console or Console(quiet=True)
    return optuna_study.train("toy", make_learner, CONFIG, options, axes, console, sweep)


def trials(folder: Path) -> list:
    """What stands in the journal, read with Optuna alone."""
    journal = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
    return optuna.load_study(study_name="jaxrl_dist", storage=optuna.storages.JournalStorage(journal)).trials


def told(folder: Path) -> list[tuple]:
    return [(trial.number, trial.state.name, trial.params, trial.value) for trial in trials(folder)]


@pytest.fixture
def trained(monkeypatch) -> list[tuple[int, ...]]:
    """Training by a formula: the configurations of every wave in turn. Width 2 is better, and so are pushes near .3."""
    waves = []

    def formula(one, console, programs, leg=None):
        assert leg is None
        assert programs is None
        waves.append(one.configurations)
        pushes, seeds = np.reshape(one.config.push, (-1, 2)), range(2)
        rows = [
            {"env_steps": steps, "configuration": number, "seed": seed, "seconds": 0.0,
             "evaluation_return": (steps == 48) * (one.config.width - (push[seed] - BEST) ** 2 + seed - 0.5)}
            for steps in (8, 48) for number, push in zip(one.configurations, pushes, strict=True) for seed in seeds
        ]  # fmt: skip
        recording.Recorder(folders.folder_of(one.algorithm, one.options)).append(rows)

    monkeypatch.setattr(session, "train", formula)
    monkeypatch.setattr(session, "make_programs", lambda one: None)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    return waves


def test_a_real_study_trains_what_is_proposed_and_tells_the_best(tmp_path):
    text = io.StringIO()
    folder = train(tmp_path, 3, {"push": AXES["push"]}, Console(file=text, width=300), sweep_parallel=3)
    found, results = trials(folder), pd.read_csv(folder / "results.csv")
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 3
    last = results[results.env_steps == 48].groupby("configuration")
    assert [trial.value for trial in found] == pytest.approx(list(last.evaluation_return.mean()))
    assert [trial.params["push"] for trial in found] == list(last.push.first())
    assert len({trial.value for trial in found}) == 3, "the proposed float reaches its run"
    assert list(results.groupby("configuration").seed.nunique()) == [2, 2, 2]
    assert [path.name for path in folder.glob("batch_*/wave_*")] == ["wave_00"], "floats alone: one program, one wave"
    best = max(found, key=lambda trial: trial.value)
    assert pd.read_csv(folder / "ranking.csv").configuration[0] == best.number
    assert f"best: {best.value:.4g}, trial {best.number}" in text.getvalue()
    assert f"best: --push {best.params['push']:g}" in text.getvalue()
    assert (folder / "ranking.png").read_bytes().startswith(b"\x89PNG")


def test_it_climbs(tmp_path, trained):
    values = [trial.value for trial in trials(train(tmp_path, 40))]
    assert np.mean(values[-10:]) > np.mean(values[:10]) + 0.3
    assert max(values) == pytest.approx(2, abs=0.01)
    assert trained == [(number,) for number in range(40)]


def test_batches_train_together_where_floats_alone_differ(tmp_path, trained):
    folder = train(tmp_path, 8, sweep_parallel=4)
    widths = [trial.params["width"] for trial in trials(folder)]
    for batch in (range(4), range(4, 8)):
        groups = {tuple(n for n in batch if widths[n] == width) for width in (1, 2)} - {()}
        assert groups == {wave for wave in trained if wave[0] in batch}
    assert len(trained) < 8
    assert train(tmp_path, 8, sweep_parallel=4, name="again", sweep_seed=1) != folder
    assert told(folder) != told(folder.with_name("again"))


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_killed_study_goes_on_with_the_same_proposals(tmp_path, trained, monkeypatch, parallel):
    expected = told(train(tmp_path, 11, name="whole", sweep_parallel=parallel))
    waves, formula, calls = len(trained), session.train, []

    def killed(*arguments):
        calls.append(arguments[0].configurations)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        formula(*arguments)

    tell = optuna.Study.tell

    def killed_after_telling(*arguments, **more):
        tell(*arguments, **more)
        raise KeyboardInterrupt

    trained.clear()
    monkeypatch.setattr(session, "train", killed)
    for attempt in range(3):
        if attempt == 2:
            monkeypatch.setattr(optuna.Study, "tell", killed_after_telling)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, 11, resume="auto", sweep_parallel=parallel)
    monkeypatch.setattr(optuna.Study, "tell", tell)
    monkeypatch.setattr(session, "train", formula)
    folder = train(tmp_path, 11, resume="auto", sweep_parallel=parallel)
    assert told(folder) == expected
    assert len(trained) == len(set(trained)) == waves, "no wave twice"
    assert sorted(pd.read_csv(folder / "results.csv").configuration.unique()) == list(range(11))

    before = trained.copy()
    assert told(train(tmp_path, 11, resume="auto", sweep_parallel=parallel)) == expected
    assert trained == before, "nothing is left to do"
    assert told(train(tmp_path, 13, resume="auto", sweep_parallel=1))[:11] == expected
    assert [number for wave in trained[len(before) :] for number in wave] == [11, 12]


def test_what_was_trained_before_is_not_trained_again(tmp_path, trained):
    axes = {"width": [1, 2], "num_envs": [2, 4]}
    folder = train(tmp_path, 20, axes, sweep_parallel=3)
    found = told(folder)
    assert len(found) == 20
    assert {state for _, state, _, _ in found} == {"COMPLETE"}
    numbers = [number for wave in trained for number in wave]
    assert len(numbers) == len({json.dumps(found[number][2]) for number in numbers}) <= 4
    for _, _, params, value in found:
        assert {other[3] for other in found if other[2] == params} == {value}
    assert sorted(pd.read_csv(folder / "results.csv").configuration.unique()) == sorted(numbers)


def test_a_configuration_that_cannot_work_or_breaks_is_a_failed_trial(tmp_path, trained, monkeypatch):
    formula = session.train

    def breaks(one, *arguments):
        if one.config.width == 3:
            raise session.NonFiniteMetric("loss became non-finite")
        formula(one, *arguments)

    monkeypatch.setattr(session, "train", breaks)
    text = io.StringIO()
    axes = {"width": [1, 3, 9], "num_envs": [2, 4]}
    folder = train(tmp_path, 12, axes, Console(file=text, width=200))
    found = told(folder)
    states = {params["width"]: state for _, state, params, _ in found}
    assert states == {1: "COMPLETE", 3: "FAIL", 9: "FAIL"}
    assert "--width is 9; it must be below 9" in text.getvalue()
    assert "loss became non-finite" in text.getvalue()
    results = pd.read_csv(folder / "results.csv")
    assert set(results.width) == {1}
    count = len(trained)
    assert told(train(tmp_path, 12, axes, resume="auto")) == found
    assert len(trained) == count


def test_widths_are_choices_and_a_range_may_have_a_count(tmp_path, monkeypatch):
    """What the command line makes of words reaches Optuna as distributions, and comes back as values of the fields."""
    found = {}
    monkeypatch.setattr(cli, "_require_sound", lambda folder: None)

    def proposed(algorithm, make_agent, config, options, axes, console, sweep):
        (tmp_path / "some").mkdir()
        proposals = optuna_study._Proposals(tmp_path / "some", axes, sweep)
        (number,) = proposals.ask()
        found.update(space=proposals.space, values=proposals.values(number), stored=proposals.trials[number].params)

    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    monkeypatch.setattr(optuna_study, "train", proposed)
    module = cli.find_algorithm("tqc")
    words = "--sweep.actor-hidden 8,8 16 --sweep.polyak 1e-3:0.1:log --sweep.discount 0.9:1:5 --sweep.num-quantiles 5 9"
    cli.main(module.Config, module.make_agent, module.PRESETS, [*words.split(), "--sweep-optuna", "3"])
    optuna_float, choice = optuna.distributions.FloatDistribution, optuna.distributions.CategoricalDistribution
    assert found["space"] == {
        "actor_hidden": choice(("8,8", "16")), "polyak": optuna_float(1e-3, 0.1, log=True),
        "discount": optuna_float(0.9, 1), "num_quantiles": choice((5, 9)),
    }  # fmt: skip
    assert found["values"]["actor_hidden"] in ((8, 8), (16,))
    assert ",".join(map(str, found["values"]["actor_hidden"])) == found["stored"]["actor_hidden"]
    assert found["values"]["num_quantiles"] in (5, 9)


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ({"learning_rate": Span(-1, 1, 0, False)}, {}, "--learning-rate is -1; it must be finite and in"),
        ({"num_envs": [2, 0]}, {}, "--num-envs is 0"),
        (AXES, {"total_steps": 8}, "--total-steps is 8; it must be above the 8 steps of the warm-up"),
        (AXES, {"sweep_halving": 2}, "--sweep-optuna is 2 and --sweep-halving is 2"),
        (AXES, {"sweep_parallel": 0}, "--sweep-parallel is 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_proposed(axes, changes, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, 2, axes, **changes)
    assert not list(tmp_path.iterdir())


def test_a_configuration_of_which_a_seed_diverges_is_a_failed_trial(tmp_path, trained, monkeypatch):
    """It is told to nobody as a score, however high; the others of its wave are."""
    append = recording.Recorder.append

    def diverge(self, rows):
        broken = {"diverged_at": 1, "diverged_metric": "loss", "evaluation_return": 1e9}
        append(self, [row | broken if row["configuration"] % 2 and row["seed"] else row for row in rows])

    monkeypatch.setattr(recording.Recorder, "append", lambda self, rows: diverge(self, [
        {"iteration": row["env_steps"], "diverged_at": None, "diverged_metric": None, **row} for row in rows
    ]))  # fmt: skip
    text = io.StringIO()
    folder = train(tmp_path, 4, {"push": AXES["push"]}, Console(file=text, width=200), sweep_parallel=2)
    assert [trial.state.name for trial in trials(folder)] == ["COMPLETE", "FAIL"] * 2
    assert "trial 1 failed: not all of its seeds came to the end with finite returns" in text.getvalue()
    ranking = pd.read_csv(folder / "ranking.csv")
    assert sorted(ranking.configuration[:2]) == [0, 2]
    assert list(ranking.diverged) == [0, 0, 1, 1]


def lines(change):
    """Damage the journal by a function of its lines."""

    def damage(folder: Path) -> None:
        path = folder / "optuna.log"
        path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return damage


DAMAGES = [
    (lambda folder: (folder / "optuna.log").unlink(), "optuna.log does not exist, but the study has 2 trials"),
    (lines(lambda lines: []), r"optuna\.log has None as trial 0, not \{"),
    (lines(lambda lines: lines[:5]), r"optuna\.log has None as trial 1, not \{"),
    (lines(lambda lines: [lines[0], b"{]\n", *lines[1:]]), "optuna.log is damaged"),
    (lines(lambda lines: [lines[0], b"\xff\n", *lines[1:]]), "optuna.log is damaged"),
    (lines(lambda lines: lines[1:]), "optuna.log "),
    (lines(lambda lines: [line.replace(b'"push"', b'"shove"') for line in lines]), "has None as trial 0"),
    (lambda folder: (folder / "batch_000" / "waves.json").write_text("[[7]]"), "waves.json has trial 7, of which"),
    (lambda folder: (folder / "study.json").write_text("{"), "study.json is damaged"),
]


def test_a_damaged_record_is_one_line(tmp_path, trained):
    whole = train(tmp_path, 2)
    count = len(trained)
    for number, (damage, message) in enumerate(DAMAGES):
        folder = shutil.copytree(whole, whole.with_name(f"damaged_{number}"))
        damage(folder)
        with pytest.raises(ValueError, match=message) as raised:
            train(tmp_path, 2, resume="auto", name=folder.name)
        assert str(folder) in str(raised.value)
        assert cli._is_ours(raised.value)
    assert len(trained) == count


def test_a_torn_last_line_of_the_journal_is_dropped_and_what_it_told_told_again(tmp_path, trained):
    folder = train(tmp_path, 2)
    expected, count = told(folder), len(trained)
    path = folder / "optuna.log"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"optuna\.log: dropped an incomplete last line"):
        train(tmp_path, 2, resume="auto")
    assert told(folder) == expected
    assert len(trained) == count


def test_a_study_is_resumed_as_it_was_started(tmp_path, trained):
    train(tmp_path, 2)
    for axes, changes, message in (
        ({"width": [1, 2]}, {}, "was started with 2 other axes"),
        (AXES, {"sweep_seed": 5}, "--sweep-seed is 5, but the study to resume was started with 0"),
        (AXES, {"num_seeds": 3}, "--num-seeds is 3, but the run to resume was started with 2"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train(tmp_path, 2, axes, resume="auto", **changes)


def test_without_optuna_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    module = cli.find_algorithm("tqc")
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            module.Config, module.make_agent, module.PRESETS,
            ["--sweep.num-critics", "2", "3", "--sweep-optuna", "2", "--runs-folder", str(tmp_path)],
        )  # fmt: skip
    assert "--sweep-optuna needs the package optuna: pip install optuna\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""A study from the command line to its pictures: each run is the run alone, and a killed study goes on."""

import dataclasses
import io
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from toys import run_with_devices

from jaxrl_dist import cli
from jaxrl_dist.algorithms.actor_critic import tqc
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording, tables
from jaxrl_dist.running import memory, problem, session
from jaxrl_dist.running.checkpointing import Checkpoints
from jaxrl_dist.studies import study

CONFIG = tqc.Config(
    num_envs=2, warmup_steps=32, batch_size=8, actor_hidden=(8,), critic_hidden=(8,), num_critics=2, num_quantiles=3,
    quantiles_dropped=1,
)  # fmt: skip
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=232, num_seeds=2, eval_every=100, eval_episodes=3,
    eval_states=0, checkpoint_every=50, plots=False, device="cpu", name="some",
)  # fmt: skip
RATES, COUNTS = (1e-3, 1e-1), (3, 4)
GRID = [{"critic_learning_rate": rate, "num_quantiles": count} for rate in RATES for count in COUNTS]


def train(folder: Path, found, console: Console | None = None, **changes) -> Path:
    options = dataclasses.replace(OPTIONS, runs_folder=str(folder), **changes)
    return study.train("tqc", tqc.make_agent, CONFIG, options, found, console or Console(quiet=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, int]:
    """A study of four configurations in waves of one, and how many programs it compiled."""
    compiled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "MEMORY_TO_FILL", 1e-12)  # one configuration at a time
        compile_all = study.session.training.Programs.compile

        def counted(self):
            compiled.append(not self.compiled)
            compile_all(self)

        patch.setattr(study.session.training.Programs, "compile", counted)
        folder = train(tmp_path_factory.mktemp("finished"), GRID)
    return folder, sum(compiled)


def test_waves_of_one_group_share_what_is_compiled(finished):
    folder, compiled = finished
    assert sorted(wave.name for wave in folder.glob("wave_*")) == [f"wave_{i:02d}" for i in range(4)]
    assert compiled == 2, "two numbers of quantiles, two programs"


def test_the_table_holds_every_run_with_its_settings(finished):
    folder, _ = finished
    results = pd.read_csv(folder / "results.csv")
    assert len(results.groupby(["configuration", "seed"])) == 4 * 2
    for number, fields in enumerate(GRID):
        rows = results[results.configuration == number]
        assert set(rows.critic_learning_rate) == {fields["critic_learning_rate"]}
        assert set(rows.num_quantiles) == {fields["num_quantiles"]}
    described = json.loads((folder / "study.json").read_text())
    assert described["fields"] == ["critic_learning_rate", "num_quantiles"]
    ranking = pd.read_csv(folder / "ranking.csv")
    assert ranking.evaluation_return.is_monotonic_decreasing
    for picture in ("ranking.png", "response.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    policies = {path.name for wave in folder.glob("wave_*") for path in (wave / "policies").glob("*.npz")}
    assert policies == {f"configuration_{number}_seed_{seed}.npz" for number in range(4) for seed in range(2)}


def test_a_run_of_a_study_is_the_run_alone(finished, tmp_path):
    """The swept float reaches the right run: configuration 2 has the large step size and three quantiles."""
    folder, _ = finished
    config = dataclasses.replace(CONFIG, critic_learning_rate=RATES[1])
    options = dataclasses.replace(OPTIONS, runs_folder=str(tmp_path))
    alone = recording.read_metrics(session.train(problem.prepare("tqc", tqc.make_agent, config, options)))
    results = tables.read(folder / "results.csv").query("configuration == 2").reset_index()
    columns = [name for name in alone if name != "seconds"]
    pd.testing.assert_frame_equal(alone[columns], results[columns], rtol=1e-6)
    other = pd.read_csv(folder / "results.csv").query("configuration == 0")
    assert not (other.critic_loss.to_numpy() == alone.critic_loss.to_numpy()).any()


def test_a_stopped_study_goes_on_and_equals_the_uninterrupted_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MEMORY_TO_FILL", 1e-12)
    grid = [fields for fields in GRID if fields["num_quantiles"] == 3]  # configurations 0 and 2 of the other study
    save = Checkpoints.save

    def save_then_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        if "wave_01" in str(self.folder):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, grid)
    monkeypatch.setattr(Checkpoints, "save", save)
    folder = tmp_path / "tqc" / "Pendulum-v1" / "some"
    assert (folder / "wave_00" / "finished").exists()
    assert not (folder / "wave_01" / "finished").exists()
    first_wave = (folder / "wave_00" / "metrics.csv").stat().st_mtime_ns

    with pytest.raises(ConfigurationError, match=r"was started with 2 other configurations"):
        train(tmp_path, GRID[1:3], resume="auto")
    train(tmp_path, grid, resume="auto")
    assert (folder / "wave_00" / "metrics.csv").stat().st_mtime_ns == first_wave, "a finished wave is not trained again"
    expected = pd.read_csv(finished[0] / "results.csv").query("num_quantiles == 3").drop(columns=["seconds"])
    expected = expected.replace({"configuration": {2: 1}}).reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv")[expected.columns], expected, check_exact=True)


def train_on_devices(folder: str) -> None:
    """The same study on one device and on all of them; runs in a process that has eight."""
    for devices in ("1", "all"):
        train(Path(folder) / devices, GRID[::2], num_seeds=4, devices=devices, runs_mode="map")


@pytest.mark.slow
@pytest.mark.proves("jaxrl_dist/running", "jaxrl_dist/studies", "jaxrl_dist/learning/devices.py")
def test_eight_devices_give_the_study_of_one(tmp_path):
    run_with_devices(8, f"import test_study; test_study.train_on_devices({str(tmp_path)!r})")
    one, eight = (tmp_path / devices / "tqc" / "Pendulum-v1" / "some" for devices in ("1", "all"))
    used = [recording.read_config(study_folder / "wave_00")["num_devices"] for study_folder in (one, eight)]
    assert used == [1, 8]
    columns = [name for name in pd.read_csv(one / "results.csv") if name != "seconds"]
    results = [pd.read_csv(study_folder / "results.csv")[columns] for study_folder in (one, eight)]
    assert len(results[0].groupby(["configuration", "seed"])) == 8
    pd.testing.assert_frame_equal(*results, check_exact=True)  # one run after another: bit for bit


def test_every_configuration_is_checked_before_anything_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "make_programs", lambda *_: pytest.fail("compiles"))
    with pytest.raises(ConfigurationError, match="--quantiles-dropped is 1"):
        train(tmp_path, [{"num_quantiles": 3}, {"num_quantiles": 1}])
    assert not list(tmp_path.iterdir())


def test_waves_fill_what_is_comfortable_of_the_available_memory(monkeypatch, tmp_path):
    one = problem.prepare("tqc", tqc.make_agent, CONFIG, OPTIONS)
    programs = session.make_programs(one)
    prediction, compiling = memory.predict(programs), memory.COMPILING_BYTES
    waves = study.Waves(tmp_path, dict(enumerate([one] * 9)), OPTIONS, Console(quiet=True))
    monkeypatch.setattr(session, "make_programs", lambda *_: programs)
    for configurations, sizes in ((0.5, [1] * 9), (4.5, [3, 3, 3]), (5.5, [5, 4]), (None, [9])):
        room = configurations and (configurations * prediction.of_the_runs + compiling) / memory.COMFORTABLE
        monkeypatch.setattr(memory, "available_bytes", lambda room=room: room)
        assert [len(wave.numbers) for wave in waves.cut(f"{room}", range(9)).values()] == sizes


def test_a_ranking_fits_eighty_columns():
    """Three fields with long names, under halving: no line is longer, and no number is cut."""
    fields = ["temperature_learning_rate", "target_entropy_per_action", "normalize_observations"]
    ranking = pd.DataFrame(
        [[12, 2, 100_000, 0.00012345, -1.2345, "True", -1234.5, -1300.25, -1200.75, 0.975],
         [3, 1, 50_000, 0.00012345, -1.2345, "False", -1334.5, -1400.25, -1250.75, float("nan")]],
        columns=["configuration", "rung", "env_steps", *fields, "evaluation_return", "low", "high", "best"],
    )  # fmt: skip
    text = io.StringIO()
    study._print_ranking(Console(file=text, width=80), {"fields": fields}, ranking, "evaluation_return", False)
    *lines, best = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert best.startswith("best: --temperature-learning-rate 0.00012345 --target-entropy-per-action -1.2345 --norm")
    for word in ("12", "2", "0.0001234", "-1.234", "False", "-1234", "[-1300,", "-1201]", "0.975", "entropy"):
        assert word in text.getvalue().split(), word
    assert "\N{HORIZONTAL ELLIPSIS}" not in text.getvalue()


# -- studies of tables made by hand -----------------------------------------------------------------------------------


def by_hand(folder: Path, returns: dict[int, list[float]], diverged: dict[int, int] | None = None) -> Path:
    """A finished study of one wave: the last returns of every configuration's seeds; `diverged`: one seed of each."""
    folder.mkdir()
    configurations = [{"configuration": number, "discount": 0.9 + 0.01 * number} for number in returns]
    recording.write_json(folder / "study.json", {
        "algorithm": "tqc", "fields": ["discount"], "configurations": configurations, "config": {},
        "options": {"env_id": "Pendulum-v1"},
    })  # fmt: skip
    recording.write_json(folder / "waves.json", [list(returns)])
    wave = recording.Recorder(folder / "wave_00")
    wave.append([
        {"iteration": 5, "env_steps": 50, "configuration": number, "seed": seed, "evaluation_return": value,
         "diverged_at": 3 if diverged and diverged.get(number) == seed else None,
         "diverged_metric": "loss" if diverged and diverged.get(number) == seed else None}
        for number, values in returns.items() for seed, value in enumerate(values)
    ])  # fmt: skip
    recording.write_json(folder / "wave_00" / "finished", {"records": recording.seal_of(folder / "wave_00")})
    return folder


def printed(folder: Path) -> str:
    text = io.StringIO()
    study.collect(folder, Console(file=text, width=200))
    return text.getvalue()


def test_a_study_shows_who_diverged_and_prefers_who_did_not(tmp_path):
    folder = by_hand(tmp_path / "s", {0: [9.0, float("nan")], 1: [2.0, 3.0], 2: [8.0, 8.0]}, {0: 1, 2: 0})
    said = printed(folder)
    assert "best: --discount 0.91" in said
    ranking = pd.read_csv(folder / "ranking.csv")
    assert list(ranking.configuration) == [1, 0, 2]
    assert list(ranking.diverged) == [0, 1, 1]
    assert list(ranking.left_out) == [0, 1, 0]
    for column in ("diverged", "left out"):
        assert column in said
    assert (folder / "ranking.png").read_bytes().startswith(b"\x89PNG")
    assert set(pd.read_csv(folder / "results.csv").diverged_metric.dropna()) == {"loss"}


def test_a_study_of_which_all_diverged_still_has_its_table(tmp_path):
    nan = float("nan")
    for name, value in (("gone", nan), ("frozen", 5.0)):
        folder = by_hand(tmp_path / name, {0: [value], 1: [value]}, {0: 0, 1: 0})
        said = printed(folder)
        assert "0.9" in said
        assert "best: none; every seed of every configuration diverged" in said
        assert list(pd.read_csv(folder / "ranking.csv").diverged) == [1, 1]
    with pytest.raises(ConfigurationError, match="--metric is 'diverged_metric'; the study has iteration, env_steps"):
        study.collect(folder, Console(quiet=True), "diverged_metric")


def rewrite(name: str, change):
    """Damage a file by a function of its bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def change_study(**changes):
    def change(folder: Path) -> None:
        path = folder / "study.json"
        path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewrite("study.json", lambda data: b""), "study.json is empty"),
        (rewrite("study.json", lambda data: data[:-20]), "study.json is damaged: no complete JSON"),
        (rewrite("study.json", lambda data: b"\xff" + data), "study.json is not UTF-8"),
        (change_study(fields=...), "study.json has no field 'fields'"),
        (change_study(options=3), "study.json: options is 3; it must be an object"),
        (change_study(fields=["polyak"]), r"study.json: configurations\[0\] is .*; it must have configuration, polyak"),
        (change_study(configurations=[1]), r"study.json: configurations\[0\] is 1"),
        (change_study(configurations=[{"configuration": 0, "discount": 1}]), r"lacks the configurations \[1\]"),
        (rewrite("wave_00/metrics.csv", lambda data: b""), "wave_00/metrics.csv is empty"),
        (rewrite("wave_00/metrics.csv", lambda data: data.replace(b"2.0", b"2.5")), "metrics.csv: row 3 is not as it"),
        (lambda folder: (folder / "wave_00" / "metrics.csv").unlink(), "wave_00/metrics.csv does not exist"),
        (rewrite("wave_00/finished", lambda data: data[:-5]), "wave_00/finished is damaged"),
        (rewrite("wave_00/finished", lambda data: b"{}"), "wave_00/finished has no field 'records'"),
        (lambda folder: (folder / "wave_00" / "finished").unlink(), "no wave is finished yet"),
    ],
)
def test_a_damaged_study_is_one_line(tmp_path, damage, message):
    folder = by_hand(tmp_path / "s", {0: [1.0], 1: [2.0]})
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        study.collect(folder, Console(quiet=True))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)


def test_older_marks_are_empty_and_older_tables_lack_what_is_new(tmp_path):
    folder = by_hand(tmp_path / "s", {0: [1.0], 1: [2.0]})
    (folder / "wave_00" / "finished").write_bytes(b"")
    path = folder / "wave_00" / "metrics.csv"
    pd.read_csv(path).drop(columns=["diverged_at", "diverged_metric"]).to_csv(path, index=False)
    assert "best: --discount 0.91" in printed(folder)
    path.write_text(path.read_text().replace("configuration", "config"))
    with pytest.raises(ValueError, match=r"wave_00/metrics\.csv row 1: no column configuration"):
        study.collect(folder, Console(quiet=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "waves.json is empty"),
        ("[[0, 1]", "waves.json is damaged: no complete JSON"),
        ("{}", "waves.json is damaged: it must be lists of the numbers"),
        ("[]", "waves.json is damaged: it must be lists"),
        ("[[0], []]", "waves.json is damaged: it must be lists"),
        ('[[0, "1"]]', "waves.json is damaged: it must be lists"),
        ("[[0, 1], [1]]", "waves.json is damaged: .* each number once"),
        ("[[0, 2]]", r"waves.json has the configurations \[0, 2\]; they must be \[0, 1\]"),
    ],
)
def test_damaged_waves_are_one_line(tmp_path, text, message):
    (tmp_path / "waves.json").write_text(text)
    waves = study.Waves(tmp_path, {}, OPTIONS, Console(quiet=True))
    with pytest.raises(ValueError, match=message):
        waves.cut("", [0, 1])


def test_a_study_is_plotted_by_its_folder(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "spread_over_cores", lambda most=None: None)
    out = tmp_path / "picture.png"
    cli.command(["plot", str(finished[0]), "--metric", "critic_loss", "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="2"):
        cli.command(["plot", str(finished[0]), "--metric", "none"])
    with pytest.raises(SystemExit, match="2"):
        cli.command(["plot", str(finished[0] / "wave_00")])
    with pytest.raises(SystemExit, match="2"):
        cli.command(["evaluate", str(finished[0] / "wave_00")])

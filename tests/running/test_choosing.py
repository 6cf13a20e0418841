"""`--stop-at`: a run that ends when it is good enough; `--keep-best`: the best policies beside the last ones."""

import dataclasses
import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from toys import LearnerConfig, make_learner

from jaxrl_dist import cli
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.learning import portable
from jaxrl_dist.records import recording
from jaxrl_dist.running import best, gymnasium_evaluation, problem, results, session, stopping, training
from jaxrl_dist.running.checkpointing import Checkpoints

CONFIG = LearnerConfig(num_envs=4)
OPTIONS = problem.RunOptions(
    env_options=("max_steps_in_episode=20",), total_steps=200, num_seeds=3, eval_every=16, eval_episodes=2,
    eval_states=0, checkpoint_every=16, checkpoint_keep=100, plots=False, device="cpu", name="run",
)  # fmt: skip
PLACE = Path("toy") / "Pendulum-v1" / "run"


def train(runs: Path, make_agent=make_learner, console: Console | None = None, **changes) -> Path:
    options = dataclasses.replace(OPTIONS, runs_folder=str(runs), **changes)
    prepared = problem.prepare("toy", make_agent, CONFIG, options)
    return session.train(prepared, console or Console(quiet=True))


def said(runs: Path, **changes) -> str:
    text = io.StringIO()
    train(runs, console=Console(file=text, width=300), **changes)
    return " ".join(text.getvalue().split())


def tables(folder: Path) -> list[pd.DataFrame]:
    return [recording.read_metrics(folder).drop(columns="seconds"), recording.read_evaluations(folder)]


def means(folder: Path) -> pd.DataFrame:
    """Mean returns, a row per iteration, a column per seed."""
    return recording.read_evaluations(folder).pivot_table("episode_return", "iteration", "seed")


def weights(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["weights"]


def stop_when_saved(monkeypatch, at: int) -> None:
    """Ctrl-C right after the checkpoint of an iteration."""
    save = Checkpoints.save

    def save_then_stop(self, iteration, tree, about):
        save(self, iteration, tree, about)
        if iteration == at:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "save", save_then_stop)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run that neither stops early nor keeps anything."""
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The same, with the best policies."""
    return train(tmp_path_factory.mktemp("kept"), keep_best=True)


# -- --stop-at --------------------------------------------------------------------------------------------------------


def reachable(folder: Path) -> tuple[float, int]:
    """A return that all seeds have reached together for the first time at an evaluation in the middle, and that one."""
    lowest = means(folder).min(axis=1).iloc[1:]
    rising = [i for i in range(1, len(lowest) - 2) if lowest.iloc[i] > lowest.iloc[:i].max()]
    iteration = int(lowest.index[rising[0]])
    return float(lowest[iteration]), iteration


def test_a_run_stops_at_the_first_evaluation_in_which_every_seed_is_good_enough(plain, tmp_path):
    target, iteration = reachable(plain)
    text = said(tmp_path, stop_at=repr(target))
    folder = tmp_path / PLACE
    for stopped, full in zip(tables(folder), tables(plain), strict=True):
        expected = full[full.iteration <= iteration].reset_index(drop=True)
        pd.testing.assert_frame_equal(stopped, expected, check_exact=True)
    assert Checkpoints(folder / "checkpoints").newest() == iteration
    assert len(list((folder / "policies").glob("*.npz"))) == 3
    full = means(plain)
    firsts = {seed: int(full.index[full[seed] >= target][0]) for seed in full}
    reached = recording.read_config(folder)["reached"]
    assert (reached["return"], reached["stopped"], reached["iteration"]) == (target, True, iteration)
    assert {each["seed"]: each["iteration"] for each in reached["first"]} == firsts
    assert [each["env_steps"] for each in reached["first"]] == [8 + 4 * firsts[seed] for seed in range(3)]
    assert f"seed 0 at {8 + 4 * firsts[0]}" in text
    assert "the last evaluation ended the run, so it flatters" in text


def test_a_stopped_run_says_how_to_go_on_and_can(plain, tmp_path, monkeypatch):
    target, iteration = reachable(plain)
    folder = train(tmp_path, stop_at=repr(target))
    with monkeypatch.context() as patch:
        patch.setattr(training.Programs, "compile", lambda self: pytest.fail("compiled"))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        text = said(tmp_path, stop_at=repr(target), resume="latest")
        assert f"at {8 + 4 * iteration} env steps every seed's evaluation had reached --stop-at" in text
        assert "a higher --stop-at, or none, trains on" in text
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert "had reached" in said(tmp_path, stop_at=repr(target - 1), resume="auto"), "so it had a lower one"
    train(tmp_path, resume="latest")
    for one, other in zip(tables(folder), tables(plain), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert "reached" not in recording.read_config(folder)


def test_a_run_that_was_interrupted_stops_where_it_would_have(plain, tmp_path, monkeypatch):
    target, iteration = reachable(plain)
    with monkeypatch.context() as patch:
        stop_when_saved(patch, iteration - 4)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, stop_at=repr(target))
    folder = train(tmp_path, stop_at=repr(target), resume="latest")
    assert means(folder).index[-1] == iteration
    # Killed after the last checkpoint, before policies were there: they are made.
    for path in (folder / "policies").iterdir():
        path.unlink()
    train(tmp_path, stop_at=repr(target), resume="latest")
    assert len(list((folder / "policies").glob("*.npz"))) == 3


def test_a_return_that_nobody_reaches_changes_nothing_and_is_noted(plain, tmp_path):
    text = said(tmp_path, stop_at="1e6")
    for one, other in zip(tables(tmp_path / PLACE), tables(plain), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    reached = recording.read_config(tmp_path / PLACE)["reached"]
    assert not reached["stopped"]
    assert reached["first"][0] == {"seed": 0, "iteration": None, "env_steps": None, "updates": None}
    assert "seed 0 never, seed 1 never" in text


def test_all_reached_by_hand():
    returns = np.float32([[1, 3], [2, 2], [5, 0]])
    assert stopping.all_reached(2.0, returns, [])
    assert not stopping.all_reached(2.1, returns, [])
    assert not stopping.all_reached(None, returns, [])
    returns[1] = np.nan
    assert not stopping.all_reached(2.0, returns, [])
    assert stopping.all_reached(2.0, returns, {1: (3, "loss")}), "a seed that diverged changes no more"
    assert not stopping.all_reached(-9.0, returns, [0, 1, 2]), "nobody has reached anything"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop_at": "nan"}, "--stop-at is 'nan'; it must be a finite number"),
        ({"stop_at": "inf"}, "--stop-at is 'inf'; it must be a finite number"),
        ({"stop_at": "good"}, "--stop-at is 'good'; it must be a finite number"),
        ({"stop_at": "1", "eval_every": 300}, "--eval-every is 300, so --stop-at would have no evaluation to decide"),
        ({"keep_best": True, "eval_every": 192}, r"--keep-best would .*--total-steps 200; it must"),
        ({"keep_best": "yes"}, "--keep-best is yes; it must be True or False"),
    ],
)  # fmt: skip
def test_what_cannot_be_decided_is_refused_in_one_line(changes, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, **changes)
    assert not any(tmp_path.rglob("*"))


def test_sweeps_refuse_both(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in ("--stop-at -5", "--keep-best True"):
        with pytest.raises(SystemExit, match="2"):
            cli.command(["train", "dqn", "--sweep.discount", "0.9", "0.99", *given.split()])
        assert f"error: {given.split()[0]} is for a single run; the configurations" in capsys.readouterr().err
    assert not any(tmp_path.rglob("*"))


# -- --keep-best ------------------------------------------------------------------------------------------------------


def test_keeping_the_best_changes_nothing_else(plain, kept):
    for one, other in zip(tables(kept), tables(plain), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    for seed in range(3):
        np.testing.assert_array_equal(*(weights(run / "policies" / f"seed_{seed}.npz") for run in (plain, kept)))
    assert not (plain / best.TABLE).exists()
    assert not (plain / "policies" / "best").exists()


def test_without_it_no_program_and_no_array_is_more():
    prepared = [
        problem.prepare("toy", make_learner, CONFIG, dataclasses.replace(OPTIONS, keep_best=on)) for on in (False, True)
    ]
    off, on = map(session.make_programs, prepared)
    assert on.traces.keys() - off.traces.keys() == {"keep_better"}
    assert set(off.abstract_checkpoint) == {"training", "seconds"}
    assert off.abstract_best == ()
    assert [x.shape for x in on.abstract_best] == [(3, 1)], "the weights of three seeds, without replay and keys"


def test_the_policy_of_the_best_evaluation_is_kept(kept):
    """The first of the highest, of each seed for itself: its weights are those of that checkpoint."""
    found, recorded = best.read(kept), means(kept)
    prepared = problem.prepare("toy", make_learner, CONFIG, dataclasses.replace(OPTIONS, keep_best=True))
    programs, checkpoints = session.make_programs(prepared), Checkpoints(kept / "checkpoints")
    chosen = [int(recorded.index[np.argmax(recorded[seed])]) for seed in range(3)]
    assert found.iteration == chosen
    assert len({*chosen}) > 1, "else this test shows little"
    assert found.steps == [8 + 4 * iteration for iteration in chosen]
    np.testing.assert_allclose(found.chosen, recorded.max(), rtol=1e-6)
    np.testing.assert_allclose(found.last, recorded.iloc[-1], rtol=1e-6)
    for seed, iteration in enumerate(chosen):
        if iteration == 0:
            expected = np.zeros(1)  # there is no checkpoint of what had not learned yet
        else:
            expected = checkpoints.load(iteration, programs.abstract_checkpoint)["training"].state.weights[seed]
        np.testing.assert_array_equal(weights(kept / "policies" / "best" / f"seed_{seed}.npz"), expected)
    assert (kept / "policies" / "best" / "seed_0.stablehlo").is_file()


def test_the_best_plays_new_episodes(kept):
    """As many evaluations' worth as said, with random numbers of their own, by the policies that are saved."""
    episodes = best.read_episodes(kept)
    assert len(episodes) == 3 * best.FRESH_EVALUATIONS * 2
    assert list(episodes.columns) == list(recording.read_evaluations(kept).columns)
    assert not set(episodes.episode_return) & set(recording.read_evaluations(kept).episode_return)
    prepared = problem.prepare("toy", make_learner, CONFIG, dataclasses.replace(OPTIONS, keep_best=True))
    programs = session.make_programs(prepared)
    loaded = Checkpoints(kept / "checkpoints").load(48, programs.abstract_checkpoint)
    keys = jax.vmap(training.run_keys)(training.seed_keys(np.arange(3)))[1]
    first = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, np.uint32(2**31))
    found = programs.evaluate(training.with_policy(loaded["training"], loaded["best"]), first)
    own = episodes[episodes.episode < 2].pivot_table("episode_return", "seed", "episode")
    np.testing.assert_array_equal(own.to_numpy(np.float32), found.episode_return)


def test_what_is_printed_names_both_numbers():
    found = best.Found(
        [{"seed": 3}, {"seed": 4}], [5, 0], [1500, 100], [10.0, 20.0], [np.array([1.0, 3.0]), np.array([5.0, 5.0])],
        [4.0, 4.5],
    )  # fmt: skip
    text = io.StringIO()
    best.print_found(found, Console(file=text, width=120), "env steps")
    rows = [line.split("│")[1:-1] for line in text.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["3", "1,500", "10.0", "2.0", "[1.0, 3.0]", "4.0"], ["4", "100", "20.0", "5.0", "[5.0, 5.0]", "4.5"],
    ]  # fmt: skip
    assert "IQM over 2 seeds: 3.5 in new episodes, 95 % interval [2.0, 5.0]; 15.0 when chosen" in text.getvalue()


def test_the_first_of_equal_ones_and_never_one_that_is_not_finite():
    kept = []
    programs = SimpleNamespace(
        num_runs=3, nothing_kept=lambda: ("nothing",),
        keep_better=lambda before, state, better: kept.append(better.tolist()) or (state,),
    )  # fmt: skip
    chosen = best.Best(programs)
    nan = np.nan
    for iteration, returns in enumerate([[1.0, nan, 5.0], [1.0, nan, 4.0], [3.0, 2.0, nan], [0.0, np.inf, 5.0]]):
        chosen.look_at(iteration, np.array(returns)[:, None] * np.ones(2), iteration)
    assert kept == [[True, True, True], [True, True, False]]
    assert chosen.iterations.tolist() == [2, 2, 0]
    assert chosen.about() == {"iteration": [2, 2, 0], "evaluation_return": [3.0, 2.0, 5.0]}
    assert chosen.kept == (2,)
    first = best.Best(programs)
    first.look_at(0, np.full((3, 2), nan), 0)
    assert first.about() == {"iteration": [0, 0, 0], "evaluation_return": [None, None, None]}
    again = best.Best(programs, first.about(), first.kept)
    again.look_at(1, np.zeros((3, 2)), 1)
    assert again.iterations.tolist() == [1, 1, 1]


@pytest.mark.parametrize("at", [12, 28])
def test_killed_and_resumed_keeps_the_same(kept, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patch:
        stop_when_saved(patch, at)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, keep_best=True)
    with pytest.raises(ConfigurationError, match="--keep-best is False, but the run to resume was started with True"):
        train(tmp_path, resume="latest")
    folder = train(tmp_path, keep_best=True, resume="latest")
    assert (folder / best.TABLE).read_bytes() == (kept / best.TABLE).read_bytes()
    for name in ("policies/best/seed_0.npz", "policies/best/seed_2.npz", "policies/seed_1.npz"):
        np.testing.assert_array_equal(weights(folder / name), weights(kept / name))


def test_a_run_that_is_trained_longer_goes_on_with_its_best(kept, tmp_path):
    folder = train(tmp_path, keep_best=True, total_steps=136)
    shorter = best.read(folder).chosen
    train(tmp_path, keep_best=True, resume="latest")
    np.testing.assert_allclose(best.read(folder).chosen, best.read(kept).chosen)
    assert (folder / best.TABLE).read_bytes() == (kept / best.TABLE).read_bytes()
    assert all(before <= after for before, after in zip(shorter, best.read(folder).chosen, strict=True))


def test_a_finished_run_shows_its_best_again_and_makes_what_is_missing(kept, tmp_path):
    import shutil

    shutil.copytree(kept, tmp_path / PLACE)
    before = (tmp_path / PLACE / best.TABLE).read_bytes()
    assert "10 new episodes each say" in said(tmp_path, keep_best=True, resume="latest")
    (tmp_path / PLACE / best.TABLE).unlink()
    (tmp_path / PLACE / "policies" / "best" / "seed_1.npz").unlink()
    assert "when chosen, which flatters" in said(tmp_path, keep_best=True, resume="latest")
    assert (tmp_path / PLACE / best.TABLE).read_bytes() == before
    assert (tmp_path / PLACE / "policies" / "best" / "seed_1.npz").is_file()


def test_both_together(plain, tmp_path):
    target, iteration = reachable(plain)
    folder = train(tmp_path, keep_best=True, stop_at=repr(target))
    recorded = means(folder)
    assert recorded.index[-1] == iteration
    assert best.read(folder).iteration == [int(recorded.index[np.argmax(recorded[seed])]) for seed in range(3)]


def test_evaluate_plays_the_policies_that_were_asked_for(kept, plain):
    find = lambda *_: SimpleNamespace(Config=LearnerConfig, make_agent=make_learner)  # noqa: E731
    how = {"episodes": 3, "seed": 5}
    _, last, _ = results.evaluate_run(kept, find, **how)
    _, also_last, _ = results.evaluate_run(plain, find, **how)
    _, of_best, _ = results.evaluate_run(kept, find, **how, policy="best")
    np.testing.assert_array_equal(last, also_last)
    improved = [seed for seed, iteration in enumerate(best.read(kept).iteration) if iteration != 48]
    assert improved
    assert all((last[seed] != of_best[seed]).any() for seed in improved)
    with pytest.raises(ConfigurationError, match=r"--policy is best, but .* kept its last policies only; --keep-best"):
        results.evaluate_run(plain, find, **how, policy="best")


def test_gymnasium_plays_the_best_policies_beside_their_new_episodes(tmp_path, capsys):
    """CartPole: the last policy only ever pushes to one side (9 steps), the best one to where the pole leans (40)."""
    pytest.importorskip("gymnasium")
    recorder = recording.Recorder(tmp_path)
    options = {"env_id": "CartPole-v1", "env_options": [], "seed": 0, "num_seeds": 1, "keep_best": True}
    recorder.write_config({"algorithm": "dqn", "config": {}, "options": options})
    rows = [
        {"iteration": i, "env_steps": 10 * i, "seed": 0, "episode": episode, "episode_return": 50.0 * (2 - i)}
        for i in (1, 2) for episode in (0, 1)
    ]  # fmt: skip
    recorder.append_evaluations(rows)
    for place, kernel in ((tmp_path / "policies", 0.0), (tmp_path / "policies" / "best", 1.0)):
        place.mkdir()
        layers = {
            "kernel_0": np.float32([[[0, 0], [0, 0], [-kernel, kernel], [0, 0]]]),
            "bias_0": np.float32([[1 - kernel, 0]]),
        }
        arrays = portable.greedy_policy({"head": {"advantage": {"layers": layers}}}, 2)
        portable.save_policy(place / "seed_0.npz", arrays)
    command = ["evaluate", str(tmp_path), "--gymnasium", "--episodes", "5"]
    with pytest.raises(SystemExit, match="2"):
        cli.command([*command, "--policy", "best"])
    assert "which holds no best_evaluations.csv yet" in capsys.readouterr().err
    pd.DataFrame(rows[:2]).assign(episode_return=[39.0, 41.0]).to_csv(tmp_path / best.TABLE, index=False)
    last, of_best = (
        gymnasium_evaluation.evaluate_run(tmp_path, episodes=5, seed=0, policy=p) for p in ("last", "best")
    )
    assert last.gymnasium[0].max() < 12
    assert of_best.gymnasium[0].min() > 20
    assert (last.recorded[0].tolist(), of_best.recorded[0].tolist()) == ([0.0, 0.0], [39.0, 41.0])
    cli.command(command)
    assert "our last evaluation" in capsys.readouterr().out
    cli.command([*command, "--policy", "best"])
    assert "our new episodes" in capsys.readouterr().out
    recorder.write_config({"algorithm": "dqn", "config": {}, "options": options | {"keep_best": False}})
    for arguments, message in (
        ([*command, "--policy", "best"], "--policy is best, but "),
        (
            ["evaluate", str(tmp_path / "policies" / "seed_0.npz"), "--env-id", "CartPole-v1", "--policy", "best"],
            "--policy best is for the folder of a run",
        ),
        ([*command, "--policy", "worst"], "--policy"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.command(arguments)
        assert message in " ".join(capsys.readouterr().err.split())

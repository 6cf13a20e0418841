"""`jaxrl-dist compare`: its numbers by hand, which seeds are paired, what is refused and what is warned of."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_report import FOUR, make_run, page_of

from jaxrl_dist import cli
from jaxrl_dist.configuration import ConfigurationError
from jaxrl_dist.records import recording, statistics
from jaxrl_dist.reports.compare import compare, compared, said_of_many
from jaxrl_dist.reports.numbers import digits_for, p_value
from jaxrl_dist.reports.runs import grouped, read_run

LOW = {0: 0.0, 1: 1.0, 2: 2.0, 3: 0.5}
SIX = {seed: float(seed) for seed in range(6)}


def said(paths, **how) -> tuple[list, str]:
    text = io.StringIO()
    pairs = compare(paths, Console(file=text, width=80), **how)
    return pairs, text.getvalue()


def shifted(scores, by):
    return {seed: score + by for seed, score in scores.items()}


def test_two_runs_by_hand(tmp_path):
    """DQN scores 1, 2, 4, 9 and C51 0, 1, 2, 0.5: IQM 3 (of 2 and 4) and 0.75 (of 0.5 and 1)."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "c51", final=LOW)]
    (pair,), text = said(runs)
    assert (pair.first.label, pair.second.label, pair.environment) == ("DQN", "C51", "CartPole-v1")
    assert not pair.paired, "four pairs cannot reach .05"
    assert pair.difference.value == pytest.approx(2.25)
    assert pair.difference.low <= 2.25 <= pair.difference.high
    # Of 16 pairs DQN wins against each of 0, 1, 2, 0.5: by 1 two and a tie, by 2 three and a tie, by 4 and 9 all four.
    assert pair.improvement.value == pytest.approx((2.5 + 3.5 + 4 + 4) / 16)
    x, y = np.array([1.0, 2, 4, 9]), np.array([0.0, 1, 2, 0.5])
    assert pair.test == statistics.unpaired_test(x, y)
    assert pair.adjusted == pair.test.p
    needed, largest, smallest = pair.seeds_needed
    assert needed == statistics.seeds_needed(x, y)
    low, high = statistics.difference_interval(x, y, np.mean)
    variance = np.var(x, ddof=1) + np.var(y, ddof=1)
    assert largest == max(4, math.ceil(7.849 * variance / high**2))
    assert smallest == (math.inf if low <= 0 else math.ceil(7.849 * variance / low**2))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "evaluation return on CartPole-v1, last evaluation"
    assert "DQN 4 3.000 [1.000, 9.000]" in lines
    assert any(line.startswith("DQN \N{MINUS SIGN} C51 2.250 88% apart") for line in lines)
    assert "Holm" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_order_is_the_users_and_the_sign_with_it(tmp_path):
    runs = [make_run(tmp_path / "b", "dqn"), make_run(tmp_path / "a", "c51", final=LOW)]
    (one,), _ = said(runs)
    (other,), _ = said(runs[::-1])
    assert (one.first.label, other.first.label) == ("DQN", "C51")
    assert one.difference.value == -other.difference.value
    assert one.test.p == pytest.approx(other.test.p)


def test_the_area_under_the_curve_and_other_metrics(tmp_path):
    """Returns rise from 0 at step 100 to the score at step 200: half of it on average."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "c51", final=LOW)]
    (pair,), text = said(runs, at="area")
    assert pair.x.tolist() == [0.5, 1.0, 2.0, 4.5]
    assert pair.difference.value == pytest.approx(2.25 / 2)
    assert "area under the curve" in text
    (pair,), text = said(runs, metric="loss")
    assert pair.x.tolist() == pair.y.tolist() == [1.0] * 4
    assert pair.test.p == 1
    assert [*pair.seeds_needed] == [math.inf] * 3
    assert "loss on CartPole-v1" in text
    with pytest.raises(ConfigurationError, match=r"--metric is 'lss'; .*/a has loss$"):
        said(runs, metric="lss")


def test_seeds_with_the_same_episodes_are_paired(tmp_path):
    """Six equal seeds, evaluated after the same iterations; what they share then does not count."""
    close = {seed: score + 0.1 + 0.01 * seed for seed, score in SIX.items()}
    runs = [make_run(tmp_path / "a", final=close), make_run(tmp_path / "b", "c51", final=SIX)]
    (pair,), text = said(runs)
    assert pair.paired
    assert pair.test == pytest.approx((2 / 64, 2 / 64))
    assert pair.correlation > 0.99
    assert pair.difference.low > 0
    assert pair.seeds_needed[0] == 6
    assert "r = 1.00" in text
    (pair,), text = said(runs, pairing="unpaired")
    assert not pair.paired
    assert pair.test.p > 0.5
    assert "apart" in text
    others = make_run(tmp_path / "c", "iqn", final={seed + 1: score for seed, score in SIX.items()})
    assert not said([runs[0], others])[0][0].paired, "other seeds"
    with pytest.raises(
        ConfigurationError, match="--pairing is paired, but DQN has the seeds 0, 1, 2, 3, 4, 5 and IQN 1"
    ):
        said([runs[0], others], pairing="paired")
    (pair,), _ = said([make_run(tmp_path / "d"), make_run(tmp_path / "e", "c51", final=LOW)], pairing="paired")
    assert pair.paired, "as asked"


def with_iterations(folder, per_iteration):
    for name in recording.TABLES:
        table = pd.read_csv(folder / name)
        table.insert(0, "iteration", table.env_steps // per_iteration)
        table.to_csv(folder / name, index=False)
    return folder


def test_other_iterations_are_other_episodes(tmp_path):
    """The key of an evaluation is the seed's with the iteration folded in: four steps per iteration, or two."""
    runs = [make_run(tmp_path / name, name, final=SIX) for name in ("dqn", "c51", "iqn")]
    for run, per_iteration in zip(runs, (4, 2, 2), strict=True):
        with_iterations(run, per_iteration)
    assert [pair.paired for pair in said(runs)[0]] == [False, False, True]
    (pair,) = compared(grouped([read_run(run) for run in runs[1:]]), "loss")
    assert not pair.paired, "a loss is not of the evaluation's episodes"


def test_what_equal_seeds_share():
    """What the first words of `compare` say: a seed is evaluated in the same episodes, whatever was trained."""
    import jax
    from toys import LearnerConfig, make_learner

    from jaxrl_dist.running import evaluation, problem, training

    options = problem.RunOptions(total_steps=64, num_seeds=1, env_options=("max_steps_in_episode=20",), device="cpu")
    starts = []
    for width in (1, 2):
        config = LearnerConfig(num_envs=2, warmup_steps=8, width=width)
        one = problem.prepare("toy", make_learner, config, options)
        agent = one.agent()
        key, evaluation_key = training.run_keys(jax.random.key(3))
        agent = agent._replace(policy=agent.policy._replace(act=lambda s, o, m, k: (jax.numpy.zeros((len(o), 1)), m)))
        key_now = jax.random.fold_in(evaluation_key, 7)
        played = evaluation.evaluate(agent, one.env, one.env_params, agent.init(key), key_now, episodes=3, max_steps=20)
        starts.append(np.asarray(played.episode_return))
    np.testing.assert_array_equal(*starts)
    assert len({*starts[0]}) == 3


def test_holm_over_all_that_is_compared(tmp_path):
    runs = [
        make_run(tmp_path / f"{index}{env_id}", name, env_id, final=shifted(SIX, shift))
        for env_id in ("CartPole-v1", "Acrobot-v1")
        for index, (name, shift) in enumerate((("dqn", 0.0), ("c51", 4.0), ("iqn", 9.0)))
    ]
    pairs, text = said(runs)
    assert len(pairs) == 6
    assert [pair.adjusted for pair in pairs] == pytest.approx(statistics.holm([pair.test.p for pair in pairs]))
    assert min(pair.test.p for pair in pairs) == pytest.approx(2 / 64)
    assert "Holm: p corrected for all 6 comparisons." in text
    assert "warning: with 6 pairs p cannot be below .031 times 6 for the comparisons: .05 is out of reach" in text
    assert text.count("evaluation return on") == 2
    assert all(len(line) <= 80 for line in text.splitlines() if "warning" not in line)


def test_the_report_names_how_many_are_compared(tmp_path):
    """Three groups of eight seeds, of which one is far above: it differs from both after Holm, they do not."""
    eight = {seed: float(seed % 4) for seed in range(8)}
    noise = {seed: float((seed * 3) % 7) / 3 for seed in range(8)}
    runs = [
        make_run(tmp_path / "a", "dqn", final=eight), make_run(tmp_path / "b", "c51", final=noise),
        make_run(tmp_path / "c", "iqn", final=shifted(noise, 50)),
    ]  # fmt: skip
    page, _ = page_of(tmp_path, runs)
    assert "3 pairs are looked at here at once, each interval for itself. After Holm's correction" in page.text
    p = p_value(3 * 2 / 2**8)
    assert f"sign flips of pairs), these differ at .05: C51 and IQN (p = {p}), DQN and IQN (p = {p})." in page.text
    page, _ = page_of(tmp_path, runs[:1])
    assert "at once" not in page.text
    page, _ = page_of(tmp_path, [make_run(tmp_path / "d"), make_run(tmp_path / "e", "c51", final=shifted(FOUR, 99))])
    assert "The permutation test of equal means has p = .029." in page.text
    more = [make_run(tmp_path / f"{name}2", name, "Acrobot-v1") for name in ("dqn", "c51", "iqn")]
    page, _ = page_of(tmp_path, [*runs, *more])
    assert "3 pairs are looked at here at once, each with an interval of its own" in page.text, "over all environments"
    assert said_of_many([]) == ""


def test_settings_of_one_algorithm_and_of_a_study(tmp_path):
    runs = [
        make_run(tmp_path / name, config={"learning_rate": rate}, final=final)
        for name, rate, final in (("fast", 0.5, SIX), ("slow", 0.1, shifted(SIX, -1.0)))
    ]
    (pair,), text = said(runs)
    assert (pair.first.label, pair.first.detail) == ("DQN 1", "learning_rate=0.5")
    assert "learning_rate=0.5" in text

    study = tmp_path / "study"
    study.mkdir()
    recording.write_json(study / "study.json", {
        "algorithm": "dqn", "fields": ["learning_rate"], "config": {"learning_rate": 0.5},
        "configurations": [{"configuration": i, "learning_rate": rate} for i, rate in enumerate((0.5, 0.1))],
        "options": {"env_id": "CartPole-v1"},
    })  # fmt: skip
    wave = recording.Recorder(study / "wave_00")
    wave.write_config({
        "algorithm": "dqn", "config": {"learning_rate": [0.5] * 6 + [0.1] * 6}, "configurations": [0, 1],
        "options": {"env_id": "CartPole-v1", "env_options": [], "total_steps": 200, "num_seeds": 6},
    })  # fmt: skip
    rows = [
        {"iteration": step // 4, "env_steps": step, "updates": 0, "configuration": number, "seed": seed}
        for step in (100, 200) for number in (0, 1) for seed in range(6)
    ]  # fmt: skip
    score = lambda row: row["seed"] + 3 * row["configuration"] * (row["env_steps"] == 200)  # noqa: E731
    wave.append([row | {"evaluation_return": float(score(row))} for row in rows])
    wave.append_evaluations(
        [row | {"episode": 0, "episode_return": float(score(row)), "episode_length": 7} for row in rows]
    )
    recording.write_json(study / "wave_00" / "finished", {"records": recording.seal_of(study / "wave_00")})
    (pair,), _ = said([study])
    assert pair.paired, "the same evaluations, of six equal seeds"
    assert pair.difference.value == pytest.approx(-3)
    (other,), _ = said([study / "configuration_1", study / "configuration_0"])
    assert other.difference.value == pytest.approx(3)
    with pytest.raises(ConfigurationError, match=r"configuration_7; of the study these are finished: 0, 1"):
        said([study / "configuration_1", study / "configuration_7"])


def test_files_hold_what_was_printed(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "c51", final=LOW)]
    (pair,), text = said(runs, out=tmp_path / "c.csv")
    assert "wrote" in text
    (row,) = pd.read_csv(tmp_path / "c.csv").to_dict("records")
    assert (row["first"], row["second"], row["metric"], row["at"]) == ("DQN", "C51", "evaluation_return", "last")
    assert (row["difference"], row["p"], row["p_holm"]) == pytest.approx((2.25, pair.test.p, pair.test.p))
    assert row["seeds_needed"] == pair.seeds_needed[0]
    close = make_run(tmp_path / "c", "iqn", final={0: 1.0, 1: 3.0, 2: 2.0, 3: 8.0})
    said([*runs, close], out=tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text(), parse_constant=lambda x: pytest.fail(x))
    assert content["pairs"][0]["difference"] == pytest.approx(2.25)
    assert content["scores"]["CartPole-v1"]["C51"] == {"0": 0.0, "1": 1.0, "2": 2.0, "3": 0.5}
    assert content["pairs"][1]["second"] == "IQN"
    assert content["pairs"][1]["seeds_needed_at_smallest"] is None, "no number of seeds"
    assert content["warnings"] == [
        "with 4 and 4 seeds p cannot be below .029 times 3 for the comparisons: .05 is out of reach"
    ]


def test_what_there_is_too_little_of(tmp_path):
    one = make_run(tmp_path / "one", final={0: 1.0})
    four, elsewhere = make_run(tmp_path / "four", "c51"), make_run(tmp_path / "else", "c51", "Acrobot-v1")
    with pytest.raises(ConfigurationError, match=r"RUN has 1 seed of DQN on CartPole-v1 .* at least two on each side"):
        said([one, four])
    with pytest.raises(
        ConfigurationError, match="RUN is C51 on CartPole-v1, C51 on Acrobot-v1; a comparison needs two"
    ):
        said([four, elsewhere])
    with pytest.raises(ConfigurationError, match="RUN is C51 on CartPole-v1; a comparison needs two runs"):
        said([four])
    with pytest.raises(ConfigurationError, match="twice; give each run once"):
        said([four, four])
    with pytest.raises(ConfigurationError, match=r"--out is .*c\.xls; it must end with \.csv or \.json"):
        said([four, elsewhere], out=tmp_path / "c.xls")
    longer = make_run(tmp_path / "longer", "iqn", last=300)
    lonely = make_run(tmp_path / "lonely", "iqn", "Acrobot-v1")
    _, text = said([four, longer, lonely])
    assert "warning: CartPole-v1: runs end at different env steps: C51 at 200, IQN at 300" in text
    assert "warning: IQN is alone on Acrobot-v1: not compared" in text
    few = [make_run(tmp_path / f"few{name}", name, final={0: 1.0, 1: 5.0}) for name in ("dqn", "iqn")]
    assert "warning: with 2 and 2 seeds p cannot be below .333: .05 is out of reach" in said(few)[1]
    broken = make_run(tmp_path / "broken", "qr_dqn", final={**SIX, 6: math.nan})
    (pair,), text = said([broken, make_run(tmp_path / "sound", "dqn", final=SIX)])
    assert len(pair.x) == 6
    assert "are not finite" in text
    stopped = make_run(
        tmp_path / "stopped", "ddpg", options={"total_steps": 900},
        about={"reached": {"return": 3.0, "stopped": True, "iteration": 9, "first": []}},
    )  # fmt: skip
    assert (
        "ended at 200 of 900 env steps, when every seed had reached --stop-at 3: its last" in said([stopped, four])[1]
    )


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a"), make_run(tmp_path / "b", "c51", final=LOW)
    cli.command(["compare", "a", "b", "--at", "area", "--pairing", "paired", "--out", "c.csv"])
    assert "area under the curve" in capsys.readouterr().out
    assert (tmp_path / "c.csv").is_file()
    for arguments, message in (
        (["a"], "a comparison needs two runs"),
        (["a", "nowhere"], "run folder nowhere does not exist"),
        (["a", "b", "--at", "best"], "--at"),
        (["a", "b", "--metric", "x"], "--metric is 'x'"),
        (["a", "b", "--out", "x/c.csv"], "--out is x/c.csv; it must be a file in a folder that exists"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.command(["compare", *arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line


def test_numbers_for_people():
    assert [p_value(p) for p in (0.0312, 0.0002, 1.0, 0.9996)] == [".031", "<.001", "1.000", "1.000"]
    assert [digits_for(x) for x in (1234, 12, 1, 0.5, 0.02, 0)] == [1, 2, 3, 3, 4, 3]

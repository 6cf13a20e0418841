"""The page of `jaxrl-dist report`: its numbers, what it warns of, what it refuses, and that it needs nothing else."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from jaxrl_dist import cli
from jaxrl_dist.records import recording
from jaxrl_dist.records.recording import Recorder
from jaxrl_dist.reports import runs as of_runs
from jaxrl_dist.reports import write

CURVES = Path(__file__).parents[2] / "experiments" / "learning_curves"
NOTHING_INSIDE = ("meta", "br", "link", "img", "hr", "input")
# Final returns of four seeds: IQM (2 + 4) / 2 = 3, median 3, mean 4.
FOUR = {0: 1.0, 1: 2.0, 2: 4.0, 3: 9.0}


def make_run(
    folder, algorithm="dqn", env_id="CartPole-v1", final=FOUR, *, config=None, options=None, about=None, last=200
):
    """A run folder by the recorder itself: returns 0 at env step 100 and `final` +- 1 at `last`, two episodes each."""
    recorder = Recorder(folder)
    recorder.write_config({
        "algorithm": algorithm, "command": f"python {algorithm}.py", "date": "2026-01-01T00:00:00+00:00",
        "config": {"learning_rate": 0.5, "hidden": [8, 8], **(config or {})},
        "options": {"env_id": env_id, "env_options": [], "total_steps": last, "name": folder.name, **(options or {})},
        "runs_mode": "vmap", "num_devices": 1,
        "versions": {"jax": "1.2.3", "device_kind": "cpu", "devices": 1}, **(about or {}),
    })  # fmt: skip
    for step, seconds in ((100, 0.0), (last, 4.0)):
        recorder.append_evaluations([
            {"env_steps": step, "seed": seed, "episode": episode, "episode_return": value, "episode_length": 7}
            for seed, score in final.items()
            for episode, value in enumerate((0.0, 0.0) if step == 100 else (score - 1, score + 1))
        ])  # fmt: skip
        recorder.append([
            {"env_steps": step, "updates": (step - 100) // 2, "seconds": seconds, "seed": seed, "loss": 1.0}
            for seed in final
        ])  # fmt: skip
    recorder.close()
    return folder


class Page(html.parser.HTMLParser):
    """What a page holds, as far as the tests ask; raises on tags that do not balance."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.tables, self.words, self.outside = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes, tuple(self.open)))
        if tag not in NOTHING_INSIDE:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open, f"{tag} was never opened"
        assert self.open.pop() == tag, f"line {self.getpos()[0]}: </{tag}> does not close what is open"

    def handle_data(self, data):
        self.words.append(data)
        if any(cell in self.open for cell in ("td", "th")):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def table(self, column, number=0):
        """Rows by their first cell, each a mapping by column, of the n-th table with this column."""
        found = [[[" ".join(cell.split()) for cell in row] for row in table] for table in self.tables]
        head, *rows = [table for table in found if column in table[0]][number]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def page_of(tmp_path, runs, normalize=None):
    """The page about the runs and what was printed."""
    with open(tmp_path / "printed.txt", "w+") as printed:
        write.write(runs, tmp_path / "page.html", normalize, Console(file=printed, width=80))
        printed.seek(0)
        return Page((tmp_path / "page.html").read_text()), printed.read()


def check_page(page, text):
    """Balanced (by parsing), reads nothing from elsewhere, and says in words what its figures show."""
    tags = [tag for tag, _, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "base"} & set(tags)
    assert tags.count("html") == tags.count("main") == tags.count("h1") == 1
    ids = [attributes["id"] for _, attributes, _ in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for tag, attributes, inside in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "data", "action", "background"), name
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), value
                assert value[1:] in ids, value
            for reference in re.findall(r"url\(([^)]*)\)", value or ""):
                assert reference.startswith("#"), reference
                assert reference[1:] in ids, reference
        if tag == "svg":
            assert "figure" in inside
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 20
            assert "viewbox" in attributes
            assert "width" not in attributes  # so that the page's style scales it
        if tag == "figure":
            assert "section" in inside
        if tag == "table":
            assert inside[-1] == "div"  # its own scroll box
    assert tags.count("svg") == tags.count("figure") == tags.count("figcaption") >= 1
    boxes = [attributes for tag, attributes, _ in page.tags if tag == "div"]
    assert len(boxes) == tags.count("table")
    assert all(box["class"] == "box" and box["aria-label"] and box["tabindex"] == "0" for box in boxes)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert not re.search(r": #[0-9a-fA-F]{6}", svg), "a colour that does not follow the colour scheme"
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert ".box { overflow-x: auto;" in text
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", text))


def test_numbers_by_hand(tmp_path):
    runs = [make_run(tmp_path / "dqn"), make_run(tmp_path / "c51", "c51", final={0: 5.0, 1: 5.0, 2: 5.0, 3: 5.0})]
    page, printed = page_of(tmp_path, runs)
    check_page(page, (tmp_path / "page.html").read_text())
    assert "warning" not in printed
    assert "Before you compare" not in page.text
    rows = page.table("CVaR 10 %")
    assert list(rows) == ["C51", "DQN"]  # the better IQM first
    assert rows["DQN"]["IQM"].startswith("3.000 [")
    assert rows["DQN"]["median"] == "3.000"
    assert rows["DQN"]["mean"] == "4.000"
    # Eight last episodes, 0 the lowest: the worst tenth is less than one of them.
    assert rows["DQN"]["CVaR 10 %"] == "0.000"
    # From 0 to the final return in a straight line: the mean return over training is half of it.
    assert rows["DQN"]["AUC"].startswith("1.500 [")
    assert rows["C51"]["AUC"] == "2.500 [2.500, 2.500]"
    # Lowest 1 and highest 9: normalized 0, 1/8, 3/8 and 1, so the gap is 1 - 12/32; c51 misses a half.
    assert rows["DQN"]["optimality gap"].startswith("0.625 [")
    assert rows["C51"]["optimality gap"] == "0.500 [0.500, 0.500]"
    assert "Normalized from low 1 and high 9." in page.text
    assert (rows["DQN"]["seeds"], rows["DQN"]["env steps"]) == ("4", "200")
    # A c51 run (5) is above three of the four dqn runs.
    matrix = page.table("row over column")
    assert matrix["C51"]["DQN"].startswith("0.75 [")
    assert matrix["DQN"]["C51"].startswith("0.25 [")
    low, high = (float(end) for end in re.findall(r"[\d.]+(?=[,\]])", matrix["C51"]["DQN"]))
    assert matrix["DQN"]["C51"] == f"0.25 [{1 - high:.2f}, {1 - low:.2f}]"
    # Four seeds did 100 env steps and 50 updates each in 4 seconds.
    time = page.table("updates/s")["DQN"]
    assert (time["env steps/s"], time["updates/s"]) == ("100", "50")
    assert (time["training seconds"], time["wall seconds"], time["devices"]) == ("4.0", "\N{EN DASH}", "1 x cpu")
    assert page.table("command")["DQN"]["command"] == "python dqn.py"
    assert [tag for tag, _, _ in page.tags].count("svg") == 1  # one environment and no bounds: no profile
    assert not page.text.count("Performance profile")
    label = next(attributes["aria-label"] for tag, attributes, _ in page.tags if tag == "svg")
    assert label == "Learning curves on CartPole-v1; interquartile means at the end: C51 5.000, DQN 3.000"


def test_over_environments(tmp_path):
    """Two environments, of which c51 ran on both and dqn2 on one; seeds differ between environments."""
    runs = [
        make_run(tmp_path / "a", "c51", final={0: 0.0, 1: 10.0, 2: 10.0}),
        make_run(tmp_path / "b", "c51", "Catch", final={0: 40.0, 1: 20.0}),
        make_run(tmp_path / "c", "dqn", final={0: 5.0, 1: 5.0, 2: 5.0}),
        make_run(tmp_path / "d", "dqn", "Catch", final={0: 20.0, 1: 30.0}),
        make_run(tmp_path / "e", "iqn", "Catch", final={0: 30.0, 1: 30.0}),
    ]
    page, printed = page_of(tmp_path, runs)
    check_page(page, (tmp_path / "page.html").read_text())
    assert "IQN is left out: it did not run on CartPole-v1." in page.text
    assert "C51 has 2 to 3 seeds; here the first 2 count." in page.text
    rows = page.table("optimality gap")
    # Seeds 0 and 1: c51 has 0, 1 and 1, 0; dqn has 0.5, 0.5 and 0, 0.5.
    assert list(rows) == ["C51", "DQN"]
    assert rows["C51"]["mean"].startswith("0.500 [")
    assert rows["C51"]["optimality gap"].startswith("0.500 [")
    assert rows["DQN"]["mean"].startswith("0.375 [")
    assert rows["DQN"]["seeds"] == "2"
    # On CartPole-v1 1/2 of the pairs, on Catch 40 wins twice, 20 ties with 20 and loses: 2.5 of 4.
    matrix = page.table("row over column")
    assert matrix["C51"]["DQN"].startswith("0.56 [")
    assert page.table("row over column", 1)["C51"]["DQN"].startswith("0.67 [")  # CartPole-v1 alone, all three seeds
    assert "Performance profile" in page.text
    labels = [attributes["aria-label"] for tag, attributes, _ in page.tags if tag == "svg"]
    assert labels[0] == "Performance profiles; runs with a normalized score above 0.5: C51 50%, DQN 0%"
    assert "lowest and highest final score of any seed in this report" in page.text
    assert "seeds" not in printed  # within an environment all have as many


def test_given_bounds_normalize_one_environment_too(tmp_path):
    bounds = tmp_path / "bounds.json"
    bounds.write_text('{"CartPole-v1": [0, 4], "another": [0, 1]}')
    page, _ = page_of(tmp_path, [make_run(tmp_path / "dqn")], bounds)
    rows = page.table("optimality gap")
    # 1/4, 1/2, 1 and 9/4, which counts as 1 in the gap alone.
    assert rows["DQN"]["mean"].startswith("1.000 [")
    assert rows["DQN"]["optimality gap"].startswith("0.312 [")
    assert page.text.count("the bounds in bounds.json") == 2
    assert "Normalized from low 0 and high 4 (bounds.json)." in page.text
    assert "Performance profile" in page.text
    assert "There is one run" in page.text


def test_one_seed_has_no_interval_and_equal_seeds_nothing_to_normalize_by(tmp_path):
    runs = [make_run(tmp_path / "a", final={0: 3.0}), make_run(tmp_path / "b", "c51", final={0: 3.0})]
    page, _ = page_of(tmp_path, runs)
    rows = page.table("CVaR 10 %")
    assert rows["DQN"]["IQM"] == "3.000"
    assert rows["DQN"]["optimality gap"] == "\N{EN DASH}"
    assert page.table("row over column")["DQN"]["C51"] == "0.50"
    assert "nothing to normalize by" in page.text


def test_committed_runs_agree_with_their_summary():
    """Against the table that `experiments/learning_curves/run.py` has written by itself."""
    summary = pd.read_csv(CURVES / "CartPole-v1" / "summary.csv").set_index("algorithm")
    groups = of_runs.grouped([of_runs.read_run(CURVES / "CartPole-v1" / f"{name}.json") for name in summary.index])
    assert {group.runs[0].algorithm for group in groups} == set(summary.index)
    for group in groups:
        expected, found = summary.loc[group.runs[0].algorithm], write.estimate(group.scores)
        np.testing.assert_allclose(found, expected[["iqm", "interval_low", "interval_high"]].astype(float), atol=0.051)
        assert len(group.scores) == expected.seeds
        assert group.runs[0].metrics is not None


# -- groups -----------------------------------------------------------------------------------------------------------


def groups_of(runs):
    return {
        (group.label, group.environment): (group.detail, group.scores.tolist())
        for group in of_runs.grouped([run for path in runs for run in of_runs.read_runs(path)])
    }


def test_runs_that_differ_in_seeds_alone_are_pooled(tmp_path):
    runs = [make_run(tmp_path / "a", final={0: 1.0}), make_run(tmp_path / "b", final={1: 2.0}, options={"seed": 1})]
    assert groups_of(runs) == {("DQN", "CartPole-v1"): ("", [1.0, 2.0])}


def test_settings_tell_groups_apart_by_the_same_numbers_everywhere(tmp_path):
    runs = [
        make_run(tmp_path / "a", final={0: 1.0}, config={"learning_rate": 0.1}),
        make_run(tmp_path / "b", final={0: 2.0}),
        make_run(tmp_path / "c", env_id="Catch", final={0: 3.0}),
        make_run(tmp_path / "d", "c51", final={0: 4.0}, config={"atoms": 51}),
        make_run(tmp_path / "e", final={0: 5.0}, options={"env_options": ["length=2"]}),
    ]
    assert groups_of(runs) == {
        ("C51", "CartPole-v1"): ("", [4.0]),
        ("DQN 1", "CartPole-v1"): ("learning_rate=0.1", [1.0]),
        ("DQN 2", "CartPole-v1"): ("learning_rate=0.5", [2.0]),
        ("DQN 2", "CartPole-v1 length=2"): ("learning_rate=0.5", [5.0]),
        ("DQN 2", "Catch"): ("learning_rate=0.5", [3.0]),
    }
    page, _ = page_of(tmp_path, runs)
    settings = page.table("field")
    assert set(settings) == {"learning_rate", "atoms"}  # and not the names of the runs
    assert list(settings["atoms"].values())[1:] == ["51", *"\N{EN DASH}" * 4]
    everything = page.table("field", 1)
    assert {"hidden", "name", "env_options", "runs_mode"} <= set(everything)
    assert "[8, 8]" in everything["hidden"].values()
    assert page.table("field", 2).keys() == {"jax", "device_kind", "devices"}


def test_equal_runs_with_the_same_seeds_are_not_pooled(tmp_path):
    runs = [make_run(tmp_path / "lr0.1", final={0: 1.0}), make_run(tmp_path / "lr0.2", final={0: 2.0})]
    assert groups_of(runs) == {
        ("DQN 1", "CartPole-v1"): ("run=lr0.1", [1.0]),
        ("DQN 2", "CartPole-v1"): ("run=lr0.2", [2.0]),
    }
    page, printed = page_of(tmp_path, runs)
    assert "runs with equal settings share seeds" in page.text
    assert "shown apart and not pooled: DQN 1, DQN 2" in printed


# -- warnings ---------------------------------------------------------------------------------------------------------


def edit(run, change, name="evaluations.csv", more=b""):
    """Rewrite a table by a function of its lines, and add bytes."""
    path = run / name
    path.write_bytes("".join(change(path.read_text().splitlines(keepends=True))).encode() + more)
    return run


def test_warnings_stand_on_the_page_and_the_console(tmp_path):
    short = make_run(tmp_path / "short", "c51", final={0: 1.0, 1: 2.0}, options={"total_steps": 1000}, last=300)
    broken = make_run(tmp_path / "broken", "iqn")
    edit(broken, lambda lines: [line.replace("8.0", "nan").replace("10.0", "inf") for line in lines])
    holed = edit(make_run(tmp_path / "holed", "fqf", last=400), lambda lines: [*lines[:7], *lines[10:], "400,3"])
    other = make_run(tmp_path / "other", "sac", about={"versions": {"device_kind": "H200", "devices": 1}})
    with open(holed / "metrics.csv", "a") as metrics:
        metrics.write("300,150,5.0,3,inf\n")
    page, printed = page_of(tmp_path, [make_run(tmp_path / "dqn"), short, broken, holed, other])
    check_page(page, (tmp_path / "page.html").read_text())
    assert str(tmp_path) not in (tmp_path / "page.html").read_text()
    for said in (
        "short: the last evaluation is at 300 of 1,000 env steps",
        "broken: 2 of 16 episode returns are not finite; the seeds with one (3) are left out",
        "holed: 1 of 8 evaluations (env steps x seeds) are missing",
        "holed: evaluations have from 1 to 2 episodes",
        "holed: metrics are not finite: loss",
        "holed/evaluations.csv: dropped an incomplete last line, '400,3'",
        "CartPole-v1: runs end at different env steps: C51 at 300, DQN at 200, FQF at 400",
        "CartPole-v1: different numbers of seeds: C51 has 2, DQN has 4, FQF has 4, IQN has 3, SAC has 4",
        "runs come from different devices, so their times do not compare: H200, cpu",
    ):
        assert said in page.text, said
        assert said in " ".join(printed.split()), said
    # Of the broken run the seeds 0 to 2 count: 1, 2 and 4, of which nothing is trimmed.
    assert page.table("CVaR 10 %")["IQN"]["mean"] == "2.333"


def test_diverged_seeds_are_left_out_where_they_have_no_return_and_shown_everywhere(tmp_path):
    """Of dqn seed 3 diverged and has no returns any more, of c51 seed 0 diverged and kept its learner, of iqn all."""
    dqn, c51, iqn = (make_run(tmp_path / name, name) for name in ("dqn", "c51", "iqn"))
    for run, seeds in ((dqn, (3,)), (c51, (0,)), (iqn, range(4))):
        metrics = pd.read_csv(run / "metrics.csv").assign(iteration=lambda rows: (rows.env_steps - 100) // 10)
        late = (metrics.env_steps == 200) & metrics.seed.isin(seeds)
        metrics.assign(diverged_at=late.map({True: 7.0}), diverged_metric=late.map({True: "loss"})).to_csv(
            run / "metrics.csv", index=False
        )
    for run, returns in ((dqn, ("8.0", "10.0")), (iqn, ("0.0", "1.0", "2.0", "3.0", "5.0", "8.0", "10.0"))):
        broken = "|".join(map(re.escape, returns))
        edit(run, lambda lines, broken=broken: [re.sub(rf",({broken}),7", ",nan,7", line) for line in lines])
    page, printed = page_of(tmp_path, [dqn, c51, iqn])
    check_page(page, (tmp_path / "page.html").read_text())
    rows = page.table("CVaR 10 %")
    assert list(rows) == ["C51", "DQN", "IQN"]
    assert [row["diverged"] for row in rows.values()] == ["1 of 4", "1 of 4", "4 of 4"]
    assert [row["seeds"] for row in rows.values()] == ["4", "3", "0"]
    assert rows["DQN"]["mean"] == "2.333"
    assert {rows["IQN"][column] for column in ("IQM", "median", "mean", "AUC", "optimality gap")} == {"\N{EN DASH}"}
    assert set(page.table("row over column")) == {"C51", "DQN"}
    assert "crosses: 6 diverged" in page.text
    for said in (
        "dqn: 2 of 16 episode returns are not finite; the seeds with one (3) are left out",
        "dqn: 1 of 4 seeds diverged: 3 (loss at iteration 7)",
        "iqn: 4 of 4 seeds diverged: 0 (loss at iteration 7), 1 (",
    ):
        assert said in page.text, said
        assert said in " ".join(printed.split()), said


def test_a_run_without_any_finite_return_is_shown_as_such(tmp_path):
    """Of before divergence was recorded; beside another environment, where all is well."""
    broken = edit(make_run(tmp_path / "a"), lambda lines: [re.sub(r",\d\.0,7|,10.0,7", ",inf,7", x) for x in lines])
    page, _ = page_of(tmp_path, [broken, make_run(tmp_path / "b", env_id="Catch")])
    assert "No seed has finite returns." in page.text
    assert "DQN is left out: no seed has finite returns on CartPole-v1." in page.text
    assert page.table("CVaR 10 %")["DQN"]["IQM"] == "\N{EN DASH}"
    assert page.table("CVaR 10 %", 1)["DQN"]["IQM"].startswith("3.000")


# -- what comes from files is text, never markup ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # a label as long as the figure
def test_everything_from_files_is_escaped(tmp_path):
    evil = '"><script>alert(1)</script><img src=http://example.org/$x_{$>'
    run = make_run(
        tmp_path / "<b>name&amp;", evil, f"env{evil}", config={evil: evil}, about={"command": evil, "date": evil},
        options={"other": {evil: [evil]}},
    )  # fmt: skip
    other = make_run(tmp_path / "other", evil, f"env{evil}", config={evil: 3})
    page, _ = page_of(tmp_path, [run, other])
    check_page(page, (tmp_path / "page.html").read_text())
    assert evil in page.text
    assert "<script" not in (tmp_path / "page.html").read_text()


# -- what is refused --------------------------------------------------------------------------------------------------


def without(name):
    return lambda run: (run / name).unlink()


def as_config(text):
    return lambda run: (run / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "run folder .*run does not exist"),
        (without("config.json"), "run/config.json does not exist: no run folder"),
        (without("evaluations.csv"), "run, which holds no evaluations"),
        (as_config("{"), "run/config.json is damaged: no complete JSON"),
        (as_config("[]"), r"run/config.json: the whole is \[\]; it must be an object"),
        (as_config('{"algorithm": "dqn", "config": {}, "options": {}}'), "config.json has no field 'options.env_id'"),
        (as_config('{"algorithm": "a", "config": {}, "options": {"env_id": "b"}, "configurations": [1]}'), "a study"),
        (lambda run: (run / "evaluations.csv").write_text(""), "run/evaluations.csv is empty"),
        (lambda run: edit(run, lambda lines: lines[:1]), "run/evaluations.csv has no rows after its header"),
        (
            lambda run: edit(run, lambda lines: ["a,b\n", "1,2\n"]),
            "row 1: no column env_steps, seed, episode",
        ),
        (lambda run: edit(run, lambda lines: [*lines, lines[-1]]), "row 18: there is another row about env_steps 200"),
        (lambda run: edit(run, lambda lines: [*lines, "x,0,9,1.0,7\n"]), "evaluations.csv row 18: env_steps is 'x'"),
        (lambda run: edit(run, lambda lines: [*lines, "1,2,3,4,5,6,7\n"]), "row 18: 7 cells, but 5 columns"),
        (lambda run: edit(run, lambda lines: ["\0" * 9]), "run/evaluations.csv is empty"),
        (lambda run: edit(run, lambda lines: lines, "metrics.csv", b"\xff\n"), "run/metrics.csv row 10: not UTF-8"),
        (
            lambda run: edit(run, lambda lines: ["a,b\n", "1,2\n"], "metrics.csv"),
            "metrics.csv row 1: no column env_steps",
        ),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, damage, message):
    damage(make_run(tmp_path / "run"))
    with pytest.raises(ValueError, match=message) as raised:
        page_of(tmp_path, [tmp_path / "run"])
    assert "\n" not in str(raised.value)
    assert cli._is_ours(raised.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "which is no file"),
        ("[1", "is damaged: no complete JSON"),
        ("[1]", "must be an object"),
        ("{}", "has no 'CartPole-v1'"),
        ('{"CartPole-v1": 3}', "has 3 for 'CartPole-v1'"),
        ('{"CartPole-v1": [1, 1]}', "low < high"),
        ('{"CartPole-v1": [0, NaN]}', "low < high"),
        ('{"CartPole-v1": [false, true]}', "low < high"),
    ],
)
def test_bounds_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "bounds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"--normalize is .*bounds.json.*{message}"):
        page_of(tmp_path, [make_run(tmp_path / "run")], path)


def test_arguments_that_cannot_be_used(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="RUN is empty"):
        page_of(tmp_path, [])
    with pytest.raises(ValueError, match=r"RUN has .* twice"):
        page_of(tmp_path, [run, tmp_path / "elsewhere" / ".." / "run"])
    with pytest.raises(ValueError, match=r"--out is .*nowhere"):
        write.write([run], tmp_path / "nowhere" / "page.html", None, Console())
    with pytest.raises(ValueError, match=r"RUN is .*x\.json, which does not exist"):
        page_of(tmp_path, [tmp_path / "x.json"])
    (tmp_path / "x.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"RUN is .*x\.json, which holds no evaluations \(.*x\.csv does not exist\)"):
        page_of(tmp_path, [tmp_path / "x.json"])


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "page.html"
    bounds = tmp_path / "bounds.json"
    bounds.write_text('{"CartPole-v1": [0, 4]}')
    cli.command(["report", str(make_run(tmp_path / "run")), "--out", str(out), "--normalize", str(bounds)])
    assert f"wrote {out}" in capsys.readouterr().out
    assert Page(out.read_text()).table("optimality gap")["DQN"]["mean"].startswith("1.000")
    with pytest.raises(SystemExit) as stopped:
        cli.command(["report", str(tmp_path), "--out", str(out)])
    assert stopped.value.code == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'config.json'} does not exist" in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        cli.command(["report"])
    assert stopped.value.code == cli.USAGE_ERROR
    assert "required: RUN" in capsys.readouterr().err


def make_study(folder, returns: dict[int, float]):
    """A finished study of configurations with those returns, seeds 0 and 1, in two waves."""
    single = {"rate": 0.5, "other": 1.0, "hidden": [8, 8]}
    recording.write_json(folder / "study.json", {"config": single, "fields": ["rate"]})
    numbers = list(returns)
    for index, wave in enumerate((numbers[:1], numbers[1:])):
        rates = [float(number) for number in wave for _ in range(2)]
        recorder = Recorder(folder / f"wave_{index:02d}")
        recorder.write_config({
            "algorithm": "qr_dqn", "config": single | {"rate": rates, "other": [1.0] * len(rates)},
            "configurations": wave, "options": {"env_id": "Catch", "num_seeds": 2, "total_steps": 100},
        })  # fmt: skip
        rows = [{"env_steps": 100, "configuration": number, "seed": seed} for number in wave for seed in range(2)]
        recorder.append_evaluations([
            row | {"episode": 0, "episode_return": returns[row["configuration"]], "episode_length": 7} for row in rows
        ])  # fmt: skip
        recorder.append([row | {"evaluation_return": returns[row["configuration"]]} for row in rows])
        (recorder.folder / "finished").touch()
    return folder


def test_a_study_is_reported_by_its_folder_a_group_per_configuration(tmp_path):
    (tmp_path / "sweep").mkdir()
    assert groups_of([make_study(tmp_path / "sweep", {0: 1.0, 1: 3.0, 2: 2.0})]) == {
        ("QR-DQN 1", "Catch"): ("rate=0.0", [1.0, 1.0]),
        ("QR-DQN 2", "Catch"): ("rate=1.0", [3.0, 3.0]),
        ("QR-DQN 3", "Catch"): ("rate=2.0", [2.0, 2.0]),
    }
    page, _ = page_of(tmp_path, [tmp_path / "sweep", make_run(tmp_path / "alone", env_id="Catch")])
    assert list(page.table("optimality gap")) == ["DQN", "QR-DQN 2rate=1.0", "QR-DQN 3rate=2.0", "QR-DQN 1rate=0.0"]


def test_of_a_large_study_the_best_are_reported_and_the_page_says_so(tmp_path):
    (tmp_path / "sweep").mkdir()
    runs = of_runs.read_runs(make_study(tmp_path / "sweep", {number: float(number) for number in range(12)}))
    assert [run.settings["rate"] for run in runs] == [float(number) for number in range(4, 12)]
    assert runs[0].warnings == ("sweep: the 8 best of 12 configurations are shown, so they flatter",)


def test_numbers_as_people_write_them():
    assert write.number(1234.56) == "1,234.6"
    assert write.number(-1.25, 1) == "\N{MINUS SIGN}1.2"
    assert write.number(-0.001, 2) == "0.00"
    assert write.number(np.nan) == write.number(np.inf) == "\N{EN DASH}"
    assert of_runs.show([1, True, None]) == "[1, true, null]"
    assert of_runs.show(...) == "\N{EN DASH}"

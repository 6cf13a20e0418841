import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.text import Text

from jaxrl_dist.distributional.law import Law
from jaxrl_dist.records.plotting import COLOURS, learning_curve, ranking, response, return_distribution
from jaxrl_dist.records.statistics import bootstrap_interval


def run(scores, metric="evaluation_return"):
    """A frame as read_metrics gives it, from scores [log points, seeds]; every second log point has no evaluation."""
    rows = []
    for point, row in enumerate(np.asarray(scores, dtype=float)):
        for seed, score in enumerate(row):
            rows.append({"env_steps": 1000 * point, "seed": seed, "loss": 1.0, metric: score})
            rows.append({"env_steps": 1000 * point + 500, "seed": seed, "loss": 1.0, metric: np.nan})
    return pd.DataFrame(rows)


def even(atoms):
    """The law of equally weighted atoms, `[states, atoms]`."""
    atoms = np.asarray(atoms, float)
    return Law(atoms, np.full(atoms.shape, 1 / atoms.shape[-1]))


scores = np.random.default_rng(0).normal(size=(5, 8)).cumsum(axis=0)


def lines_of(figure, wider_than):
    return [line for line in figure.axes[0].get_lines() if line.get_linewidth() > wider_than]


def test_one_run_shows_iqm_interval_and_seeds(tmp_path):
    figure = learning_curve({"tqc": run(scores)}, tmp_path / "curve.png", title="TQC")
    assert isinstance(figure, Figure)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (centre,) = lines_of(figure, wider_than=2)
    np.testing.assert_array_equal(centre.get_xdata(), [0, 1000, 2000, 3000, 4000])
    np.testing.assert_allclose(centre.get_ydata(), np.sort(scores, axis=1)[:, 2:6].mean(axis=1))  # middle 4 of 8
    thin = [line for line in figure.axes[0].get_lines() if line is not centre]
    np.testing.assert_allclose([line.get_ydata() for line in thin], scores.T)
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    for point in range(5):
        heights = corners[corners[:, 0] == 1000 * point, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], bootstrap_interval(scores[point]))
    assert any("8 seeds" in text.get_text() for text in figure.axes[0].texts)


def test_several_runs_are_labelled_apart():
    runs = {label: run(scores + 0.01 * number) for number, label in enumerate(["TQC", "SAC", "TD3", "REDQ", "DroQ"])}
    figure = learning_curve(runs, title="five that end together")
    figure.canvas.draw()
    assert len(figure.axes[0].get_lines()) == 5
    labels = [text for text in figure.axes[0].texts if text.get_text() in runs]
    assert len(labels) == 5
    assert len({text.get_color() for text in labels}) == 5
    boxes = [Text.get_window_extent(text) for text in labels]  # the words, without the line that leads to them
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.get_points())
    heights = {text.get_text(): text.get_position()[1] for text in labels}
    assert sorted(heights, key=heights.get) == list(runs)  # the labels stand in the order of the curves' ends


def test_more_runs_than_colours_differ_by_dashes():
    figure = learning_curve({f"run {number}": run(scores + number) for number in range(9)}, title="many")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 9
    assert len({colour for colour, _ in looks}) == len(COLOURS)


def test_one_seed_has_no_interval():
    figure = learning_curve({"tqc": run(scores[:, :1])}, title="one")
    assert len(figure.axes[0].get_lines()) == 1
    assert any("no interval" in text.get_text() for text in figure.axes[0].texts)


def test_a_missing_seed_is_left_out_of_its_log_point():
    holed = scores.copy()
    holed[2, :4] = np.nan
    figure = learning_curve({"tqc": run(holed)}, title="holed")
    (centre,) = lines_of(figure, wider_than=2)
    assert centre.get_ydata()[2] == pytest.approx(np.sort(scores[2, 4:])[1:3].mean())
    assert any("4 to 8 seeds" in text.get_text() for text in figure.axes[0].texts)


def crosses(figure):
    return [line for line in figure.axes[0].get_lines() if line.get_marker() == "x" and np.size(line.get_xdata())]


def diverging(values, **diverged):
    """A run of three log points at iterations 0, 10 and 20, in which `seed_N` diverged at an iteration."""
    frame = pd.DataFrame([
        {"iteration": 10 * point, "env_steps": 100 + 40 * point, "seed": seed, "evaluation_return": value}
        for point, row in enumerate(values) for seed, value in enumerate(row)
    ])  # fmt: skip
    at = frame.seed.map(lambda seed: diverged.get(f"seed_{seed}")).where(frame.iteration == 20)
    return frame.assign(diverged_at=at, diverged_metric=at.notna().map({True: "loss", False: None}))


def test_a_cross_marks_where_a_seed_diverged():
    frame = diverging([[0, 0, np.nan], [4, 1, np.nan], [np.inf, 2, np.nan]], seed_0=5, seed_2=0)
    figure = learning_curve({"tqc": frame}, title="two diverged")
    centre = lines_of(figure, wider_than=2)[0]
    np.testing.assert_allclose(centre.get_ydata(), [0, 2.5, 2])  # without what is not finite
    found = [(*np.ravel(line.get_xdata()), *np.ravel(line.get_ydata())) for line in crosses(figure)]
    assert found == [(120, 2), (100, 0)]  # half-way between two log points; without any value on the axis
    assert crosses(figure)[0].get_transform() == figure.axes[0].transData
    assert crosses(figure)[1].get_transform() != figure.axes[0].transData
    assert any("crosses: 2 diverged" in text.get_text() for text in figure.axes[0].texts)
    assert not crosses(learning_curve({"tqc": frame.drop(columns=["diverged_at", "diverged_metric"])}, title="older"))


def test_a_run_of_which_nothing_is_left_is_drawn_as_crosses(tmp_path):
    gone = diverging(np.full((3, 2), np.nan), seed_0=1, seed_1=2)
    figure = learning_curve({"tqc": gone}, title="gone")
    assert len(crosses(figure)) == 2
    assert any("no seed has a finite value" in text.get_text() for text in figure.axes[0].texts)
    figure = learning_curve({"tqc": gone, "sac": run(scores)}, tmp_path / "both.png", title="both")
    assert len(crosses(figure)) == 2
    assert (tmp_path / "both.png").exists()


def test_the_pictures_of_a_study_mark_diverged_configurations(tmp_path):
    table = pd.DataFrame({
        "configuration": [1, 0, 2], "x": [0.1, 0.2, 0.3], "evaluation_return": [1.0, 9.0, np.nan],
        "diverged": [0, 1, 2], "low": [0.5, 8.0, np.nan], "high": [2.0, 10.0, np.nan],
    })  # fmt: skip
    figure = ranking(table, ["x"], tmp_path / "a.png", title="a", metric="evaluation_return")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["x 0.1", "x 0.2  (1 diverged)", "x 0.3  (2 diverged)"]
    figure = response(table, ["x"], title="b", metric="evaluation_return")
    assert [list(line.get_xdata()) for line in crosses(figure)] == [[0.2, 0.3]]
    assert "cross: a seed diverged" in figure.get_supxlabel()
    assert not crosses(response(table.drop(columns="diverged"), ["x"], title="older", metric="evaluation_return"))
    ranking(table.iloc[2:], ["x"], tmp_path / "c.png", title="nobody is left", metric="evaluation_return")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({}, "frames is empty"),
        ({"tqc": run(scores).assign(evaluation_return="text")}, "run 'tqc' has no metric 'evaluation_return', but"),
        ({"tqc": run(scores, metric="other")}, "run 'tqc' has no metric 'evaluation_return', but"),
        ({"tqc": run(np.full((2, 2), np.nan))}, "run 'tqc' has no value of 'evaluation_return'"),
        ({"tqc": pd.concat([run(scores)] * 2)}, "has seed 0 twice at env_steps 0"),
    ],
)
def test_learning_curve_rejects(frames, message):
    with pytest.raises(ValueError, match=message):
        learning_curve(frames, title="wrong")


def test_return_distribution_panels(tmp_path):
    rng = np.random.default_rng(1)
    predicted, monte_carlo = rng.normal(size=(5, 25)), rng.normal(1, 2, size=(5, 40))
    figure = return_distribution(
        tmp_path / "returns.svg", predicted=even(predicted), monte_carlo=monte_carlo, title="learned against observed"
    )
    assert "<svg" in (tmp_path / "returns.svg").read_text()
    panels = [axes for axes in figure.axes if axes.get_lines()]
    assert len(panels) == 5
    for state, axes in enumerate(panels):
        assert axes.get_title("left") == f"state {state + 1}"
        distance = scipy.stats.wasserstein_distance(predicted[state], monte_carlo[state])
        difference = predicted[state].mean() - monte_carlo[state].mean()
        _, shown_distance, _, shown_difference = axes.get_title("right").split()
        assert float(shown_distance) == pytest.approx(distance, rel=0.01)
        assert float(shown_difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(difference, rel=0.01)


def test_return_distribution_draws_the_distribution_functions():
    figure = return_distribution(predicted=even([[3.0, 1.0]]), monte_carlo=np.array([[2.0] * 7]), title="by hand")
    observed, learned = figure.axes[0].get_lines()
    np.testing.assert_allclose(learned.get_xdata()[1:-1], [1, 2, 3])
    np.testing.assert_allclose(learned.get_ydata(), [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(observed.get_ydata(), [0, 0, 1, 1, 1])
    assert {line.get_drawstyle() for line in (observed, learned)} == {"steps-post"}


def test_return_distribution_weighs_atoms_by_their_masses():
    masses = np.array([[0.25, 0.0, 0.75]])
    figure = return_distribution(
        predicted=Law(np.array([[3.0, 1e6, 1.0]]), masses), monte_carlo=np.array([[2.0, 4.0]]), title="by hand"
    )
    _, learned = figure.axes[0].get_lines()
    np.testing.assert_allclose(learned.get_xdata()[1:-1], [1, 2, 3, 4])  # not the atom that has no mass
    np.testing.assert_allclose(learned.get_ydata(), [0, 0.75, 0.75, 1, 1, 1])
    # |F - G| is .75, .25 and .5 on [1, 2], [2, 3] and [3, 4]; the means are 1.5 and 3.
    assert figure.axes[0].get_title("right").split() == ["W₁", "1.50", "Δmean", "\N{MINUS SIGN}1.50"]


def test_return_distribution_of_certain_returns():
    figure = return_distribution(predicted=even(np.zeros((2, 3))), monte_carlo=np.zeros((2, 4)), title="all zero")
    assert figure.axes[0].get_title("right").split() == ["W₁", "0", "Δmean", "0"]


@pytest.mark.parametrize(
    ("predicted", "monte_carlo", "message"),
    [
        (even(np.zeros(3)), np.zeros((1, 3)), r"predicted has shape \(3,\)"),
        (even(np.zeros((1, 3))), np.zeros((1, 0)), r"monte_carlo has shape \(1, 0\)"),
        (even(np.zeros((2, 3))), np.zeros((3, 3)), "predicted has 2 states, but monte_carlo has 3"),
        (even(np.full((1, 3), np.nan)), np.zeros((1, 3)), "predicted holds 3 values that are not finite"),
        (Law(np.zeros((1, 2)), np.full((1, 2), np.inf)), np.zeros((1, 3)), "masses holds 2 values that are not"),
    ],
)
def test_return_distribution_rejects(predicted, monte_carlo, message):
    with pytest.raises(ValueError, match=message):
        return_distribution(predicted=predicted, monte_carlo=monte_carlo, title="wrong")


def test_leaves_pyplot_backend_and_settings_alone(tmp_path):
    program = f"""
import sys, matplotlib, pandas, numpy
settings = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
before = settings()  # without the backend, whose mere look-up imports pyplot to choose one
from jaxrl_dist.records.plotting import Law, learning_curve, return_distribution
frame = pandas.DataFrame({{"env_steps": [0, 0, 9, 9], "seed": [0, 1, 0, 1], "evaluation_return": [1.0, 2, 3, 4]}})
learning_curve({{"a": frame, "b": frame}}, {str(tmp_path / "a.png")!r}, title="a")
law = Law(numpy.eye(2), numpy.full((2, 2), 0.5))
return_distribution({str(tmp_path / "b.png")!r}, predicted=law, monte_carlo=numpy.eye(2), title="b")
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "b.png").exists()

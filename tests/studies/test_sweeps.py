"""What a sweep asks for, which configurations run together, and how they are ranked."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from jaxrl_dist.configuration import ConfigurationError, Count, Layers, Positive, configuration
from jaxrl_dist.studies import sweeps
from jaxrl_dist.studies.sweeps import SweepOptions


@configuration
class Config:
    learning_rate: Positive = 1e-3
    discount: float = 0.99
    batch_size: Count = 32
    hidden: Layers = (8,)
    duelling: bool = False
    risk: str = "neutral"


def found(words: dict[str, str], **options):
    return sweeps.configurations(Config, {k: v.split() for k, v in words.items()}, SweepOptions(**options))


def test_arguments_are_told_apart():
    rest, swept = sweeps.split_arguments(
        ["--env-id", "CartPole-v1", "--sweep.learning-rate", "1e-3", "-1", "--name", "a", "--sweep.discount=0.9:1:3"]
    )
    assert rest == ["--env-id", "CartPole-v1", "--name", "a"]
    assert swept == {"learning_rate": ["1e-3", "-1"], "discount": ["0.9:1:3"]}


def test_a_grid_has_every_combination_with_values_of_the_right_type():
    configurations = found({
        "learning_rate": "1e-4:1e-2:3:log", "hidden": "8 16,16", "duelling": "true False", "risk": "neutral cvar:0.1",
    })  # fmt: skip
    assert len(configurations) == 3 * 2 * 2 * 2
    assert configurations[0] == {"learning_rate": 1e-4, "hidden": (8,), "duelling": True, "risk": "neutral"}
    assert configurations[-1] == {"learning_rate": 1e-2, "hidden": (16, 16), "duelling": False, "risk": "cvar:0.1"}
    assert sorted({c["learning_rate"] for c in configurations}) == [1e-4, 1e-3, 1e-2]
    discounts = [c["discount"] for c in found({"discount": "0.98:0.999:4"})]
    assert discounts == pytest.approx([0.98, 0.98633333, 0.99266667, 0.999])


def test_random_configurations_lie_in_their_ranges_and_repeat_with_the_seed():
    words = {"learning_rate": "1e-5:1e-1:log", "discount": "0.9:1", "batch_size": "16 32"}
    some = found(words, sweep_samples=200, sweep_seed=1)
    assert some == found(words, sweep_samples=200, sweep_seed=1)
    assert some != found(words, sweep_samples=200, sweep_seed=2)
    rates = np.array([c["learning_rate"] for c in some])
    assert rates.min() > 1e-5
    assert rates.max() < 1e-1
    # Evenly spread in the logarithm: half of them lie below the geometric mean of the ends.
    assert (rates < 1e-3).mean() == pytest.approx(0.5, abs=0.12)
    assert {c["batch_size"] for c in some} == {16, 32}
    assert len(found({"batch_size": "16 32"}, sweep_samples=50)) == 2, "the same configuration is not trained twice"


def test_a_file_gives_one_configuration_per_row(tmp_path):
    file = tmp_path / "some.csv"
    file.write_text('learning_rate,hidden\n1e-3,"8,8"\n1e-2,16\n')
    assert found({}, sweep_file=str(file)) == [
        {"learning_rate": 1e-3, "hidden": (8, 8)}, {"learning_rate": 1e-2, "hidden": (16,)},
    ]  # fmt: skip
    assert len(found({"discount": "0.9 0.99"}, sweep_file=str(file))) == 4
    with pytest.raises(ConfigurationError, match=r"--sweep-file and --sweep\.hidden give the same field"):
        found({"hidden": "8"}, sweep_file=str(file))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"learning_rat": "1"}, r"--sweep\.learning-rat is no field .* did you mean --sweep\.learning-rate"),
        ({"discount": ""}, r"--sweep\.discount has no values"),
        ({"discount": "0.9:0.9:3"}, r"--sweep\.discount is 0\.9:0\.9:3, an empty range"),
        ({"discount": "0.9:1"}, r"--sweep\.discount is 0\.9:1; it must be LOW:HIGH:COUNT"),
        ({"discount": "0.9:1:1"}, "COUNT must be at least 2"),
        ({"discount": "0:1:3:log"}, "LOW must be above 0 for log"),
        ({"discount": "low:high:3"}, "it must be LOW:HIGH:COUNT"),
        ({"discount": "0.9 0.9"}, "every value once"),
        ({"discount": "0.9 much"}, r"--sweep\.discount is 'much'; it must be a number"),
        ({"batch_size": "16:64:3"}, r"batch_size is static \(it selects a compiled program\)"),
        ({"batch_size": "1.5"}, "it must be a whole number"),
        ({"duelling": "maybe"}, "True or False"),
        ({"hidden": "a,b"}, "64,64"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_line(words, message):
    with pytest.raises(ConfigurationError, match=message):
        found(words)


def test_other_bad_input(tmp_path):
    with pytest.raises(ConfigurationError, match="--sweep-samples is -1"):
        found({"discount": "0.9 1"}, sweep_samples=-1)
    with pytest.raises(ConfigurationError, match="which is no file"):
        found({}, sweep_file=str(tmp_path / "none.csv"))
    with pytest.raises(ConfigurationError, match="given twice"):
        sweeps.split_arguments(["--sweep.a", "1", "--sweep.a", "2"])


def test_floats_share_a_program_and_static_fields_part_waves():
    configs = [
        dataclasses.replace(Config(), learning_rate=rate, batch_size=size)
        for rate in (0.1, 0.2, 0.3)
        for size in (16, 32)
    ]
    largest = {sweeps.static_fields(config): 2 if config.batch_size == 16 else 9 for config in configs}
    waves = sweeps.waves(configs, 2, largest)
    assert [wave.numbers for wave in waves] == [(0, 2), (4,), (1, 3, 5)]
    assert [wave.config.batch_size for wave in waves] == [16, 16, 32]
    np.testing.assert_allclose(waves[2].config.learning_rate, [0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    np.testing.assert_allclose(waves[1].config.learning_rate, [0.3, 0.3])


def test_ranking_by_hand():
    rows = [
        {"configuration": c, "learning_rate": rate, "seed": seed, "env_steps": steps, "evaluation_return": value}
        for c, rate, values in ((0, 0.1, (1, 2, 3, 4)), (1, 0.2, (11, 12, 13, 100)))
        for seed, value in enumerate(values)
        for steps, value in ((10, 1_000), (20 + c, value))  # the last evaluation of each, whenever it was
    ]
    table = sweeps.ranking(pd.DataFrame(rows), ["learning_rate"])
    assert list(table.configuration) == [1, 0]
    assert list(table.learning_rate) == [0.2, 0.1]
    assert list(table.evaluation_return) == [12.5, 2.5]  # the middle half of four
    assert list(table.best) == [1.0, 0.0]
    assert 1 <= table.low[1] < 2.5 < table.high[1] <= 4


def test_ranking_of_equals_is_undecided_and_one_seed_has_no_interval():
    rows = [
        {"configuration": c, "x": c, "seed": seed, "env_steps": 1, "evaluation_return": float(value)}
        for c in (0, 1)
        for seed, value in enumerate(np.random.default_rng(c).permutation(20))
    ]
    table = sweeps.ranking(pd.DataFrame(rows), ["x"])
    assert table.best.sum() == pytest.approx(1)
    assert 0.3 < table.best[0] < 0.7
    alone = sweeps.ranking(pd.DataFrame([row for row in rows if row["seed"] == 0]), ["x"])
    assert list(alone.columns) == ["configuration", "x", "evaluation_return"]


def outcomes(rows: dict[int, list[tuple[float, int | None]]], **columns) -> pd.DataFrame:
    """Of every configuration the last return of each seed, and the iteration at which it diverged."""
    return pd.DataFrame([
        {"configuration": c, "x": c, "seed": seed, "iteration": i, "env_steps": 10 * i,
         "evaluation_return": value if i else 0, "diverged_at": diverged if i else None,
         **{name: values[c] for name, values in columns.items()}}
        for c, seeds in rows.items() for seed, (value, diverged) in enumerate(seeds) for i in (0, 3)
    ])  # fmt: skip


NAN = float("nan")
MIXED = {
    0: [(NAN, None)] * 3,
    1: [(1, None), (2, None), (3, None)],
    2: [(100, None), (NAN, 2), (100, None)],
    3: [(1000, 1)] * 3,
    4: [(2, None), (3, None), (4, None)],
    5: [(50, None), (float("inf"), None), (50, 2)],
}


def test_configurations_with_diverged_seeds_stand_below_all_others():
    table = sweeps.ranking(outcomes(MIXED), ["x"])
    assert list(table.configuration) == [4, 1, 2, 5, 3, 0]
    np.testing.assert_array_equal(table.evaluation_return, [3, 2, 100, 50, 1000, NAN])
    assert list(table.diverged) == [0, 0, 1, 1, 3, 0]
    assert list(table.left_out) == [0, 0, 1, 1, 0, 3]
    assert table.best[:2].sum() == pytest.approx(1)
    assert table.best[2:].isna().all()
    np.testing.assert_array_equal(table.low[2:], [100, 50, 1000, NAN])
    for count, expected in ((1, [4]), (2, [1, 4]), (4, [1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5])):
        assert sweeps.best(outcomes(MIXED), count) == expected
    assert sweeps.score(outcomes(MIXED), 4) == 3
    assert (
        sweeps.score(outcomes(MIXED), 2) is sweeps.score(outcomes(MIXED), 3) is sweeps.score(outcomes(MIXED), 0) is None
    )


def test_a_diverged_configuration_that_came_further_does_not_win():
    table = sweeps.ranking(outcomes(MIXED, rung={0: 0, 1: 0, 2: 1, 3: 2, 4: 0, 5: 1}), ["x"])
    assert list(table.configuration) == [4, 1, 2, 5, 3, 0]


def test_where_all_diverged_there_is_still_a_table():
    for all_broken in ([(NAN, 1), (NAN, 2)], [(5, 1), (6, 2)]):
        results = outcomes({0: all_broken, 1: all_broken})
        table = sweeps.ranking(results, ["x"])
        assert list(table.diverged) == [2, 2]
        assert table.best.isna().all()
        assert (sweeps.standings(results) == sweeps.ALL_BROKEN).all()
        assert sweeps.best(results, 1) == [0]
    some = sweeps.ranking(outcomes({0: MIXED[2], 1: MIXED[5]}), ["x"])
    assert list(some.best) == [1, 0], "among those with diverged seeds, by the seeds that are left"


def test_a_row_that_is_missing_counts_like_one_that_is_not_finite():
    results = outcomes({0: [(9, None)] * 2, 1: [(1, None)] * 2})
    table = sweeps.ranking(results.drop(index=results.index[3]), ["x"])
    assert list(table.configuration) == [1, 0]
    assert list(table.left_out) == [0, 1]
    assert "diverged" not in table


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    file = tmp_path / "some.csv"
    for text, message in (
        ("learning_rate,hidden\n1e-3,8\n1e-2,wide\n", r"some\.csv, row 3, hidden is 'wide'; it must be whole numbers"),
        ("discount\n0.9:1:3\n", "row 2, discount is '0.9:1:3'; it must be a number"),  # a cell is one value
        ("depth\n1\n", "whose column 'depth' is no field of the algorithm"),
        ("", "which is no CSV file with a header"),
        ("discount\n", "which has no rows"),
        ("discount\n0.9\n0.99,1\n", "row 3, has 2 cells, but the header 1"),
        ("discount,discount\n0.9,0.8\n", "has the column 'discount' twice"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            found({}, sweep_file=str(file))
    file.write_bytes(b"discount\n\xff\xfe\n")
    with pytest.raises(ConfigurationError, match="which is no CSV file with a header: 'utf-8' codec"):
        found({}, sweep_file=str(file))

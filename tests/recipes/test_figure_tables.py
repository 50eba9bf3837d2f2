"""figure_results.py and figure_tables.py: numbers against ones computed otherwise, and made-up mistakes in results."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from recipes.made_up_sweeps import ACCURACIES, TINY, points, run, smallest, write_curve, write_sweep, write_tiny

from trl_recipes.arguments import RecipeError
from trl_recipes.figure_drawing import draw
from trl_recipes.figure_results import Results, comparable
from trl_recipes.figure_spec import Curves
from trl_recipes.figure_tables import table_of


@pytest.fixture
def sweeps(tmp_path) -> Path:
    return write_tiny(tmp_path / "sweeps")


def test_a_marker_is_the_mean_and_the_sample_deviation_over_seeds(sweeps):
    table = table_of(points(TINY, untrained="none"), Results(sweeps))
    assert table["x"].tolist() == [1, 13, 25, 49]
    for _, row in table.iterrows():
        accuracies = np.array(ACCURACIES[row["point"]])
        assert row["mean"] == pytest.approx(accuracies.sum() / accuracies.size)
        squares = ((accuracies - accuracies.mean()) ** 2).sum()
        expected = math.sqrt(squares / (accuracies.size - 1)) if accuracies.size > 1 else math.nan
        assert row["standard_deviation"] == pytest.approx(expected, nan_ok=True)
    assert table["seeds"].tolist() == [3, 3, 2, 1]
    assert table["hollow"].tolist() == [False, False, True, True]
    assert table["learning_rate"].tolist() == [0.01] * 4


def test_only_measured_runs_at_the_chosen_rate_count(sweeps):
    rows = [
        run("1", 1, 0, 0.5),
        run("1", 1, 0, 0.9, chosen=False, learning_rate=0.1),
        run("1", 1, 100, 0.8, stage="choose"),
        run("1", 1, 1, "", chosen=""),
    ]
    write_sweep(sweeps, "tiny", rows)
    [row] = table_of(points(TINY, untrained="none"), Results(sweeps)).to_dict("records")
    assert (row["mean"], row["seeds"]) == (0.5, 1)


def test_the_untrained_model_is_one_line_or_one_for_each_series(sweeps):
    write_sweep(sweeps, "large", [run("1", 1, seed, 0.9, greedy_before=0.6) for seed in range(3)])
    series = TINY | {"large": {"sweeps": ["large"]}}
    lines = table_of(points(series, untrained="each"), Results(sweeps)).query("x.isna()")
    assert dict(zip(lines["series"], lines["mean"], strict=True)) == {
        "untrained, TinyLoRA": 0.4,
        "untrained, large": 0.6,
    }
    [line] = table_of(points(TINY, y="sampled_after"), Results(sweeps)).query("x.isna()").to_dict("records")
    assert line["mean"] == pytest.approx(statistics.mean([0.30, 0.31, 0.32]))
    assert line["standard_deviation"] == pytest.approx(0.01)
    picture = draw(points(series, untrained="each"), table_of(points(series, untrained="each"), Results(sweeps)))
    flat = [line.get_ydata()[0] for line in picture.axes[0].lines if line.get_linestyle() == ":"]
    assert flat == [0.4, 0.6]


def test_a_series_takes_points_of_several_sweeps_by_their_options(sweeps):
    other = [run("2", 25, seed, 0.8, **{"option:tinylora_dtype": "bfloat16"}) for seed in range(3)]
    write_sweep(sweeps, "other", other + [run("7", 7, seed, 0.7) for seed in range(3)])
    both = {"sweeps": ["tiny", "other"]}
    series = {
        "fp32": both | {"where": {"option:tinylora_dtype": "float32", "option:tinylora_u": 1}},
        "bf16": both | {"where": {"option:tinylora_dtype": "bfloat16"}},
        "two sizes": both | {"where": {"trained_parameters": [1, 7.0]}},
    }
    table = table_of(points(series, untrained="none"), Results(sweeps))
    assert {name: rows["x"].tolist() for name, rows in table.groupby("series")} == {
        "fp32": [1, 7, 13, 25, 49],
        "bf16": [25],
        "two sizes": [1, 7],
    }


def test_a_configuration_of_several_sweeps_is_one_point_that_of_the_first(sweeps):
    write_sweep(sweeps, "again", [run(point, int(point), seed, 0.75) for point in ("13", "7") for seed in range(3)])
    table = table_of(points({"both": {"sweeps": ["again", "tiny"]}}, untrained="none"), Results(sweeps))
    assert table["x"].tolist() == [1, 7, 13, 25, 49]
    assert table["sweep"].tolist() == ["tiny", "again", "again", "tiny", "tiny"]
    assert table["mean"].tolist()[1:3] == [0.75, 0.75]


def test_each_value_of_a_column_makes_a_line_in_the_order_of_numbers(tmp_path):
    rows = [
        run(f"{r},{u}", 13 * u, seed, 0.5 + u / 100, **{"option:tinylora_r": r, "option:tinylora_u": u})
        for r in (1, 2, 64)
        for u in (16, 4, 1)
        for seed in range(3)
    ]
    write_sweep(tmp_path, "rank", rows)
    series = {"u = {value}": {"sweeps": ["rank"], "each": "option:tinylora_u"}}
    figure = points(series, x="option:tinylora_r", untrained="none")
    table = table_of(figure, Results(tmp_path))
    assert table["series"].unique().tolist() == ["u = 1", "u = 4", "u = 16"]
    assert table["x"].tolist() == [1, 2, 64] * 3
    axes = draw(figure, table).axes[0]
    assert axes.xaxis.get_transform().base == 2
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "64"]


# The paper's Figure 1 as decoded from its picture: accuracy by number of trained parameters. Its Figure 3 says what is
# the smallest update of this model that reaches 90, 95 and 97.5% of the peak: 13, 49 and 1,600.
FIGURE_1 = {
    **{1: 0.799, 2: 0.843, 4: 0.854, 7: 0.844, 13: 0.907, 25: 0.923, 49: 0.929, 98: 0.936, 196: 0.9485, 1600: 0.954},
    **{4096: 0.950, 12544: 0.961, 102400: 0.963, 2523136: 0.972, 51380224: 0.974, 7615616512: 0.9696},
}


def test_the_smallest_update_is_the_papers_for_the_papers_own_numbers(tmp_path):
    rows = [run(str(n), n, seed, accuracy) for n, accuracy in FIGURE_1.items() for seed in range(3)]
    write_sweep(tmp_path, "small_updates", rows[: 3 * 9])
    write_sweep(tmp_path, "large_updates", rows[3 * 9 :])  # the peak is that of all sizes, so of both sweeps
    model = {"model_parameters": 7615616512, "sweeps": ["small_updates", "large_updates"]}
    table = table_of(smallest({"7B": model}), Results(tmp_path))
    assert table["series"].tolist() == ["90% of peak", "95% of peak", "97.5% of peak"]
    assert table["trained_parameters"].tolist() == [13, 49, 1600]
    assert table["peak"].tolist() == [0.974] * 3
    assert table["low"].tolist() == table["high"].tolist() == [13, 49, 1600]  # no deviation, no bar


def test_the_bar_of_a_smallest_update_is_what_a_deviation_would_change(tmp_path):
    # means 0.40, 0.80, 0.92, 1.00 with deviations 0, 0.1, 0.02, 0.03: 90% of the peak is reached by 13;
    # a deviation higher, by 4 already; a deviation lower, 13 is at 0.90 and still does. 97.5% only by 49: not so lower.
    accuracies = {1: (0.4, 0.4, 0.4), 4: (0.7, 0.8, 0.9), 13: (0.9, 0.92, 0.94), 49: (0.97, 1.0, 1.0)}
    rows = [run(str(n), n, seed, acc) for n, all_ in accuracies.items() for seed, acc in enumerate(all_)]
    write_sweep(tmp_path, "sweep", rows)
    figure = smallest({"a": {"model_parameters": 1000, "sweeps": ["sweep"]}}, shares=[0.9, 0.99])
    table = table_of(figure, Results(tmp_path))
    assert table["trained_parameters"].tolist() == [13, 49]
    assert table["low"].tolist() == [4, 49]
    assert table["high"].tolist() == pytest.approx([13, math.nan], nan_ok=True)
    picture = draw(figure, table)
    assert len(picture.axes[0].texts) == 1  # the arrow
    assert "arrow: not reached" in picture.get_supxlabel()


def test_a_curve_is_the_mean_over_seeds_of_each_runs_moving_mean(tmp_path):
    write_sweep(tmp_path, "tiny", [run("13", 13, seed, 0.9) for seed in range(3)])
    curves = [[0.0, 0.2, 0.4], [0.3, 0.5, 0.1], [0.6, 0.2]]  # the third run is still being written
    for seed, rewards in enumerate(curves):
        write_curve(tmp_path / "tiny" / "13" / f"lr_0.01_seed_{seed}", rewards)
    with (tmp_path / "tiny/13/lr_0.01_seed_2/reward_curve.csv").open("a") as file:
        file.write("3,0.")
    figure = Curves.model_validate({"kind": "curves", "title": "a figure", "series": TINY, "moving_mean": 2})
    table = table_of(figure, Results(tmp_path))
    assert table["x"].tolist() == [1, 2, 3]
    smooth = [[0.0, 0.1, 0.3], [0.3, 0.4, 0.3], [0.6, 0.4]]
    for step in range(3):
        values = [run_[step] for run_ in smooth if len(run_) > step]
        row = table.iloc[step]
        assert row["mean"] == pytest.approx(statistics.mean(values))
        assert row["standard_deviation"] == pytest.approx(statistics.stdev(values))
        assert (row["seeds"], row["hollow"]) == (len(values), len(values) < 3)


def without(column: str) -> list[dict]:
    return [{name: value for name, value in run("1", 1, 0, 0.5).items() if name != column}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (without("chosen"), "no column 'chosen'"),
        (without("greedy_after"), "no column 'greedy_after'; there are"),
        ([run("1", 1, 0, 0.5), run("1", 1, 0, 0.6)], "point '1' has seed 0 twice"),
        ([run("1", 1, 0, 0.5), run("1", 1, 1, 0.6, learning_rate=0.1)], "point '1' has 2 chosen learning rates"),
        ([run("1", 1, 0, 0.5), run("1", 2, 1, 0.6)], "point '1' differ in trained_parameters"),
        ([run("1", 1, 0, 50.3)], "greedy_after of point '1' is 50.3: a share is between 0 and 1"),
        ([run("1", 1, 0, 0.5, sampled_after="half")], "sampled_after is 'half', which is no number"),
        ([run("1", 1, 0, 0.5, greedy_before=math.inf)], "greedy_before is 'inf', which is no number"),
        ([run("1", 1, 0, ""), run("2", 2, 0, math.nan)], "series 'TinyLoRA': no run has a value of 'greedy_after'"),
        ([run("1", 0, 0, 0.5)], "trained_parameters of tiny/1 is 0.0: a logarithmic axis needs a number above 0"),
        ([run("1", "", 0, 0.5)], "trained_parameters of tiny/1 is ''"),
        (
            [run("1", 1, 0, 0.5), run("b", 1, 0, 0.6, **{"option:tinylora_n_tie": "1"})],
            "series 'TinyLoRA': tiny/1 and tiny/b have the same options",
        ),
    ],
)
def test_results_that_cannot_be_drawn_are_named_in_one_line(tmp_path, rows, message):
    write_sweep(tmp_path, "tiny", rows)
    with pytest.raises(RecipeError) as error:
        table_of(points(TINY), Results(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_an_accuracy_is_a_seed_less(sweeps):
    write_sweep(
        sweeps, "tiny", [run("1", 1, 0, 0.5), run("1", 1, 1, ""), run("1", 1, 2, 0.7), run("1", 1, 3, math.nan)]
    )
    [row] = table_of(points(TINY, untrained="none"), Results(sweeps)).to_dict("records")
    assert (row["mean"], row["seeds"], row["hollow"]) == (0.6, 2, True)


def test_a_column_that_a_filter_or_a_split_needs_is_named_with_its_file(sweeps):
    for series in ({"where": {"option:lora_r": 1}}, {"each": "option:lora_r"}):
        name = "x {value}" if "each" in series else "x"
        with pytest.raises(RecipeError, match=r"tiny/results.csv: no column 'option:lora_r'; there are"):
            table_of(points({name: {"sweeps": ["tiny"]} | series}), Results(sweeps))


def test_a_row_that_is_being_written_is_left_for_later_and_one_cut_off_before_is_not(sweeps):
    path = sweeps / "tiny" / "results.csv"
    text = path.read_text()
    path.write_text(text[:-25])  # within the last row
    runs = Results(sweeps).of("tiny")
    assert len(runs) == sum(map(len, ACCURACIES.values())) - 1
    lines = text.splitlines()
    lines[3] = lines[3][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecipeError, match=r"row 4 has \d+ cells and the header \d+"):
        Results(sweeps).of("tiny")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as text"):
        Results(sweeps).of("tiny")


def test_a_curve_of_several_points_or_of_a_lost_run_is_refused(sweeps):
    figure = {"kind": "curves", "title": "t", "series": TINY}
    with pytest.raises(RecipeError, match="series 'TinyLoRA' has 4 points"):
        table_of(Curves.model_validate(figure), Results(sweeps))
    figure["series"] = {"13": {"sweeps": ["tiny"], "where": {"point": "13"}}}
    with pytest.raises(RecipeError, match=r"lr_0.01_seed_0: neither reward_curve.csv nor loss_curve.csv"):
        table_of(Curves.model_validate(figure), Results(sweeps))
    for seed in range(3):
        write_curve(sweeps / "tiny" / "13" / f"lr_0.01_seed_{seed}", [])
    with pytest.raises(RecipeError, match="nothing is logged as 'reward' yet"):
        table_of(Curves.model_validate(figure), Results(sweeps))
    (sweeps / "tiny/13/lr_0.01_seed_0/reward_curve.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(RecipeError, match="no column 'reward'; there are step, loss"):
        table_of(Curves.model_validate(figure), Results(sweeps))


def test_values_are_compared_as_what_they_mean():
    assert comparable(4) == comparable("4") == comparable("4.0") == 4
    assert comparable(None) == comparable("") == comparable(math.nan) == comparable("None") == ""
    assert comparable(True) == "True" != comparable("true")

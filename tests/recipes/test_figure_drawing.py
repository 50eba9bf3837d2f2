"""figure_drawing.py: what matplotlib was given against the CSV beside the picture."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from PIL import Image
from recipes.made_up_sweeps import TINY, points, run, smallest, write_curve, write_sweep, write_tiny

from trl_recipes import figures
from trl_recipes.figure_drawing import draw, plain_count, with_room
from trl_recipes.figure_results import Results
from trl_recipes.figure_spec import Curves
from trl_recipes.figure_tables import table_of


WHITE = (1.0, 1.0, 1.0)


@pytest.fixture
def sweeps(tmp_path) -> Path:
    return write_tiny(tmp_path / "sweeps")


def shown(axes: Axes, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and the ends of the bars (points, 2) of a series, as matplotlib has them."""
    [container] = [one for one in axes.containers if one.get_label() == name]
    line, _, (bars,) = container
    ends = [segment[:, 1] if len(segment) else (math.nan, math.nan) for segment in bars.get_segments()]
    return np.array(line.get_xdata(), float), np.array(line.get_ydata(), float), np.array(ends)


def shown_line(axes: Axes, name: str):
    return next(container for container in axes.containers if container.get_label() == name)[0]


def save_and_read(figure, sweeps: Path, folder: Path) -> tuple[list[Axes], pd.DataFrame]:
    table = table_of(figure, Results(sweeps))
    picture = draw(figure, table)
    figures.save(picture, table, folder, "name")
    assert sorted(path.name for path in folder.iterdir()) == ["name.csv", "name.png"]
    with Image.open(folder / "name.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 1000
    return picture.axes, pd.read_csv(folder / "name.csv")


def test_the_csv_beside_a_picture_of_points_is_what_is_drawn(sweeps, tmp_path):
    write_sweep(sweeps, "xs", [run(f"r{n}", n, seed, 0.9 + seed / 50) for n in (49, 196) for seed in range(3)])
    panels = [{"y": "greedy_after", "title": "greedy"}, {"y": "sampled_after", "title": "sampled"}]
    figure = points(TINY | {"LoRA-XS": {"sweeps": ["xs"]}}, panels=panels)
    all_axes, numbers = save_and_read(figure, sweeps, tmp_path / "out")
    assert len(all_axes) == 2
    for panel, axes in enumerate(all_axes):
        for name in ("TinyLoRA", "LoRA-XS"):
            rows = numbers[(numbers["panel"] == panel) & (numbers["series"] == name)]
            x, y, bars = shown(axes, name)
            assert rows["quantity"].unique() == [panels[panel]["y"]]
            np.testing.assert_allclose(x, rows["x"])
            np.testing.assert_allclose(y, rows["mean"])
            np.testing.assert_allclose(bars[:, 0], rows["mean"] - rows["standard_deviation"])
            np.testing.assert_allclose(bars[:, 1], rows["mean"] + rows["standard_deviation"])
        [untrained] = [line for line in axes.lines if line.get_label() == "untrained model"]
        [row] = numbers[(numbers["panel"] == panel) & (numbers["series"] == "untrained")].to_dict("records")
        assert untrained.get_ydata()[0] == pytest.approx(row["mean"])


def test_points_with_fewer_than_three_seeds_are_drawn_hollow_and_said_so(sweeps, tmp_path):
    [axes], numbers = save_and_read(points(TINY), sweeps, tmp_path / "out")
    [hollow] = [line for line in axes.lines if line.get_label() == "_TinyLoRA, hollow"]
    assert hollow.get_xdata().tolist() == [25, 49] == numbers[numbers["hollow"]]["x"].tolist()
    assert to_rgb(hollow.get_markerfacecolor()) == WHITE
    assert to_rgb(shown_line(axes, "TinyLoRA").get_markerfacecolor()) != WHITE
    assert "hollow: fewer than 3 seeds" in axes.figure.get_supxlabel().replace("\n", " ")
    assert "1,024 held-out problems; mean of 1 to 3 seeds; bars: standard deviation" in axes.figure.get_supxlabel()


def test_what_the_paper_reports_is_dashed_and_only_beside_greedy_accuracy(sweeps):
    rows = [run(str(n), n, seed, 0.9, reported=0.8 if n > 1 else "") for n in (1, 4, 13) for seed in range(3)]
    write_sweep(sweeps, "tiny", rows)
    figure = points(TINY, panels=[{"y": "greedy_after"}, {"y": "sampled_after"}])
    greedy, sampled = draw(figure, table_of(figure, Results(sweeps))).axes
    [reported] = [line for line in greedy.lines if line.get_linestyle() == "--"]
    assert (reported.get_xdata().tolist(), reported.get_ydata().tolist()) == ([4, 13], [0.8, 0.8])
    assert not [line for line in sampled.lines if line.get_linestyle() == "--"]


def test_the_csv_beside_smallest_updates_is_what_is_drawn(sweeps, tmp_path):
    write_sweep(sweeps, "large", [run(str(n), n, seed, n / 50) for n in (10, 20, 45, 48) for seed in range(3)])
    models = {
        "b": {"model_parameters": 4000, "sweeps": ["large"]},
        "a": {"model_parameters": 1000, "sweeps": ["tiny"]},
    }
    [axes], numbers = save_and_read(smallest(models, shares=[0.5, 0.9]), sweeps, tmp_path / "out")
    for name in ("50% of peak", "90% of peak"):
        rows = numbers[numbers["series"] == name].sort_values("x")
        x, y, bars = shown(axes, name)
        assert x.tolist() == rows["x"].tolist() == [1000, 4000]
        assert y.tolist() == rows["trained_parameters"].tolist()
        np.testing.assert_allclose(bars[:, 0], rows["low"])
        np.testing.assert_allclose(bars[:, 1], rows["high"].fillna(rows["trained_parameters"]))


def test_the_csv_beside_curves_is_what_is_drawn(sweeps, tmp_path):
    for seed in range(3):
        write_curve(sweeps / "tiny" / "13" / f"lr_0.01_seed_{seed}", [0.1 * seed, 0.2, 0.3])
    series = {"13": {"sweeps": ["tiny"], "where": {"point": 13}}}
    figure = Curves.model_validate({"kind": "curves", "title": "a figure", "series": series})
    [axes], numbers = save_and_read(figure, sweeps, tmp_path / "out")
    [line] = axes.lines
    np.testing.assert_allclose(line.get_xdata(), numbers["x"])
    np.testing.assert_allclose(line.get_ydata(), numbers["mean"])
    [band] = axes.collections
    edge = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    for sign in (-1, 1):
        side = numbers["mean"] + sign * numbers["standard_deviation"]
        assert {tuple(np.round(corner, 9)) for corner in zip(numbers["x"], side, strict=True)} <= edge


def test_a_series_looks_the_same_in_every_panel_and_unlike_any_other(sweeps):
    names = [f"series {i}" for i in range(9)]
    series = dict.fromkeys(names, TINY["TinyLoRA"])
    figure = points({}, panels=[{"series": series}, {"series": dict(reversed(series.items()))}])
    left, right = draw(figure, table_of(figure, Results(sweeps))).axes
    looks = {name: (shown_line(left, name).get_color(), shown_line(left, name).get_marker()) for name in names}
    assert len(set(looks.values())) == len(names)
    for name, look in looks.items():
        assert (shown_line(right, name).get_color(), shown_line(right, name).get_marker()) == look


def test_a_third_panel_goes_below_and_leaves_the_fourth_place_empty(sweeps):
    figure = points(TINY, panels=[{"y": "greedy_after"}, {"y": "sampled_after"}, {"y": "greedy_after"}])
    picture = draw(figure, table_of(figure, Results(sweeps)))
    assert picture.axes[0].get_gridspec().get_geometry() == (2, 2)
    assert [axes.axison for axes in picture.axes] == [True, True, True, False]


@pytest.mark.parametrize(
    ("count", "text"),
    [(1, "1"), (13, "13"), (999, "999"), (1000, "1k"), (1600, "1.6k"), (12544, "13k"), (999_999, "1M")]
    + [(1_057_664, "1.1M"), (51_380_224, "51M"), (7_615_616_512, "7.6B")],
)
def test_counts_are_written_as_a_reader_would(count, text):
    assert plain_count(count) == text


def test_ticks_leave_room_for_their_labels():
    assert list(with_room([5], [1.0], 4.0)) == [5]
    assert list(with_room([1, 10, 100], [0.5] * 3, 4.0)) == [1, 10, 100]
    assert list(with_room([1, 1.1, 10, 95, 100], [0.5] * 5, 4.0)) == [1, 10, 100]

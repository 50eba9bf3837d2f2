"""From the numbers of a figure to its picture, for the width of a README (some 850 pixels)."""

import math
import textwrap
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Picture  # not pyplot, which would pick a display
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from trl_recipes.figure_spec import Curves, FilledPanel, Points, SmallestUpdate
from trl_recipes.figure_tables import FEWEST_SEEDS, UNTRAINED


# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is too light for a line.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LIGHTEST = 0.85  # of viridis, 0 to 1, that can be seen on white
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LABELS = {
    "trained_parameters": "trained parameters",
    "greedy_after": "correct, greedy",
    "sampled_after": "correct, sampled",
    "option:tinylora_r": "frozen rank r",
    "option:tinylora_u": "u, trained numbers a group",
    "option:tinylora_n_tie": "n_tie, modules in a group",
    "option:lora_r": "rank",
    "reward": "reward, mean",
    "completion_tokens": "completion length (tokens)",
    "zero_std_groups": "groups with equal rewards",
    "loss": "loss (nats a token)",
    "token_accuracy": "right tokens (share)",
    "grad_norm": "gradient norm",
    "v_norm": "norm of v",
}
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
WIDTH, HEIGHT, DPI = 9.0, 4.6, 150  # inches, inches, dots an inch
UNTRAINED_LABEL, REPORTED_LABEL = "untrained model", "in the paper"
CAPTION_CHARACTERS = 115  # of a line under a picture of that width
MOST_COLUMNS, MORE_HEIGHT = 2, 3.4  # panels in a row, inches for each further row
MARGIN = 1.0  # inches of a panel that are not its axis
CHARACTER, GAP, LINE_OF_TEXT = 0.1, 0.12, 0.22  # inches of a tick's label


def draw(figure: Points | SmallestUpdate | Curves, table: pd.DataFrame) -> Picture:
    """
    Draws a figure from its table alone.

    Args:
        figure ([`Points`], [`SmallestUpdate`] or [`Curves`]):
            Titles, axes and panels.
        table (`pd.DataFrame`):
            What [`table_of`] made of it.

    Returns:
        `matplotlib.figure.Figure`: a legend name is the label of its line in each panel.
    """
    with rc_context(cast(Any, STYLE)):  # matplotlib's type is of a literal for each name
        panels = [] if isinstance(figure, SmallestUpdate) else figure.filled_panels()
        count = max(len(panels), 1)
        rows, columns = math.ceil(count / MOST_COLUMNS), min(count, MOST_COLUMNS)
        picture = Picture(figsize=(WIDTH, HEIGHT + (rows - 1) * MORE_HEIGHT), dpi=DPI, layout="constrained")
        same_y = isinstance(figure, Points)
        grid = list(picture.subplots(rows, columns, squeeze=False, sharex=same_y, sharey=same_y).flat)
        styles = styles_of(figure, table["series"])
        if isinstance(figure, SmallestUpdate):
            draw_smallest_update(grid[0], table, styles)
        for number, (panel, axes) in enumerate(zip(panels, grid, strict=False)):
            if isinstance(figure, Points):
                draw_points(axes, figure, panel, table[table["panel"] == number], styles)
                if len({one.y for one in panels}) == 1:
                    axes.label_outer()
                else:
                    axes.tick_params(labelleft=True)
            else:
                draw_curves(axes, panel, table[table["panel"] == number], styles)
        for axes in grid[:count]:
            axes.grid(alpha=0.25)
        for axes in grid[count:]:
            axes.set_axis_off()
        add_title_and_legend(picture, figure.title)
        picture.supxlabel(caption_of(figure, table), x=0.01, ha="left", fontsize=10, color="#444444")
    return picture


def by_series(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each series by its name, in the order in which they come."""
    for name, line in rows.groupby("series", sort=False):
        yield str(name), line


def draw_points(axes: Axes, figure: Points, panel: FilledPanel, rows: pd.DataFrame, styles: dict[str, dict]) -> None:
    """Markers with a bar each, joined; the untrained model as a horizontal line, reported values dashed."""
    for name, line in by_series(rows):
        if line["x"].isna().all():
            of = name.removeprefix(UNTRAINED).removeprefix(", ")
            style = {"color": styles[of]["color"], "linestyle": ":"} if of else {"color": "#555555", "linestyle": "-."}
            label = "_" + name if of else UNTRAINED_LABEL
            axes.axhline(line["mean"].iloc[0], linewidth=1.5, zorder=1, label=label, **style)
            continue
        draw_line(axes, name, line["x"], line["mean"], line["standard_deviation"], line["hollow"], styles[name])
        reported = line[line["reported"].notna()] if panel.y == "greedy_after" else line.iloc[:0]
        if not reported.empty:
            style = styles[name] | {"linestyle": "--", "alpha": 0.7, "markersize": 3}
            axes.plot(reported["x"], reported["reported"], label=REPORTED_LABEL, **style)
    plain_log_axis(axes, "x", rows["x"].dropna(), base=2 if figure.x != "trained_parameters" else 10)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set(xlabel=LABELS.get(figure.x, figure.x), ylabel=panel.y_label or LABELS.get(panel.y, panel.y))
    axes.set_title(panel.title, fontsize=12)


def draw_line(
    axes: Axes,
    name: str,
    x: pd.Series,
    y: pd.Series,
    bars: pd.Series | np.ndarray,
    hollow: pd.Series,
    style: dict,
) -> None:
    """Draws one series: bars of `y` (points,) or (2, points), and white-filled markers where `hollow`."""
    style = {"markersize": 7} | style
    axes.errorbar(x, y, yerr=bars, label=name, capsize=3, linewidth=1.8, elinewidth=1.2, **style)
    if hollow.any():
        empty = style | {"linestyle": "none", "markerfacecolor": "white", "zorder": 5}
        axes.plot(x[hollow], y[hollow], label=f"_{name}, hollow", **empty)


def draw_curves(axes: Axes, panel: FilledPanel, rows: pd.DataFrame, styles: dict[str, dict]) -> None:
    """Means over seeds in a band of a standard deviation to each side."""
    for name, line in by_series(rows):
        mean, deviation = line["mean"], line["standard_deviation"]
        style = {"color": styles[name]["color"], "linestyle": "--" if line["hollow"].all() else "-"}
        axes.plot(line["x"], mean, label=name, linewidth=1.8, **style)
        axes.fill_between(line["x"], mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel=panel.y_label or LABELS.get(panel.y, panel.y))
    axes.set_title(panel.title, fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_smallest_update(axes: Axes, rows: pd.DataFrame, styles: dict[str, dict]) -> None:
    """A line for each share of the peak; an arrow up where the bar has no upper end."""
    sizes = iter(np.linspace(12, 6, rows["series"].nunique()))  # lines often meet: the later inside the earlier
    for name, line in by_series(rows):
        line = line.sort_values("x")
        count, low, high = line["trained_parameters"], line["low"], line["high"]
        bars = np.array([count - low, (high - count).fillna(0)])
        style = styles[name] | {"markersize": next(sizes)}
        draw_line(axes, name, line["x"], count, bars, line["hollow"], style)
        open_ended = line[high.isna()]
        for x, y in zip(open_ended["x"], open_ended["trained_parameters"], strict=True):
            arrow = {"arrowstyle": "->", "color": styles[name]["color"], "linewidth": 1.2}
            axes.annotate("", (x, y), (0, 24), textcoords="offset points", arrowprops=arrow | {"arrowstyle": "<-"})
    plain_log_axis(axes, "x", rows["x"], base=10)
    plain_log_axis(axes, "y", rows["trained_parameters"], base=10)
    axes.set(xlabel="parameters of the model", ylabel="trained parameters needed")


def styles_of(figure: Points | SmallestUpdate | Curves, names: pd.Series) -> dict[str, dict]:
    """Gives each series a colour and a marker, the same in every panel; from dark to light where they are in an order."""
    series = [name for name in names.unique() if not name.startswith(UNTRAINED)]
    in_order = isinstance(figure, SmallestUpdate) or any(
        one.each for panel in figure.filled_panels() for one in panel.series.values()
    )
    colours: Iterable[str] = cycle(COLOURS)
    if in_order:
        colours = [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, LIGHTEST, len(series)))]
    return {
        name: {"color": colour, "marker": marker}
        for name, colour, marker in zip(series, colours, cycle(MARKERS), strict=False)
    }


def plain_log_axis(axes: Axes, which: str, values: pd.Series, base: int) -> None:
    """Makes an axis logarithmic, with ticks at the values themselves where there is room, written as plain counts."""
    ticks = sorted(values.unique())
    axis: Axis
    if which == "x":
        grid = axes.get_gridspec()
        assert grid is not None  # as subplots are in one
        axis, length = axes.xaxis, WIDTH / grid.ncols - MARGIN
        sizes = [CHARACTER * len(plain_count(value)) + GAP for value in ticks]
        axes.set_xscale("log", base=base)
    else:
        axis, length = axes.yaxis, HEIGHT - 2 * MARGIN
        sizes = [LINE_OF_TEXT] * len(ticks)
        axes.set_yscale("log", base=base)
    axis.set_major_locator(FixedLocator(list(with_room(ticks, sizes, length))))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain_count(value)))


def with_room(values: list[float], sizes: list[float], length: float) -> Iterator[float]:
    """Yields the last of ascending values, and from the first on those whose labels touch no other on a log axis.

    Args:
        values (`list[float]`): above 0.
        sizes (`list[float]`): of their labels along the axis, in inches.
        length (`float`): from the first value to the last, in inches.
    """
    places = np.log(values) / max(np.log(values[-1] / values[0]), 1e-9) * length
    free = -np.inf
    for value, place, size in zip(values[:-1], places[:-1], sizes[:-1], strict=True):
        if place - size / 2 >= free and place + size / 2 <= places[-1] - sizes[-1] / 2:
            free = place + size / 2
            yield value
    yield values[-1]


def plain_count(value: float) -> str:
    """Writes a count in few characters: 13, 196, 1.6k, 13k, 1.1M, 7.6B."""
    for size, letter in [(1e9, "B"), (1e6, "M"), (1e3, "k")]:
        if value >= 0.9995 * size:
            return (
                f"{value / size:.1f}".removesuffix(".0") + letter
                if value < 9.95 * size
                else f"{value / size:.0f}{letter}"
            )
    return f"{value:g}"


def add_title_and_legend(picture: Picture, title: str) -> None:
    """The title, and below it one legend for all panels: series, then lines that are none."""
    entries: dict[str, Artist] = {}
    for axes in picture.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in entries}
    if REPORTED_LABEL in entries:
        entries[REPORTED_LABEL] = Line2D([], [], color="#555555", linestyle="--", marker=".")
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0] in (UNTRAINED_LABEL, REPORTED_LABEL)))
    for rows in range(1, len(entries) + 1):
        legend = picture.legend(
            entries.values(),
            entries,
            loc="outside upper left",
            ncols=math.ceil(len(entries) / rows),
            frameon=False,
            fontsize=11,
            columnspacing=1.4,
            handletextpad=0.5,
            title=title,
            title_fontproperties={"weight": "bold", "size": 14},
            alignment="left",
        )
        if legend.get_window_extent().width <= picture.bbox.width or rows == len(entries):
            return
        legend.remove()


def caption_of(figure: Points | SmallestUpdate | Curves, table: pd.DataFrame) -> str:
    """The figure's own caption, then problems, seeds, what the bars are, and what is hollow."""
    parts = [figure.caption] if figure.caption else []
    markers = table[table["x"].notna()]
    if not isinstance(figure, Curves) and markers["problems"].notna().any():
        problems = sorted(markers["problems"].dropna().unique())
        parts.append(f"{' or '.join(f'{n:,.0f}' for n in problems)} held-out problems")
    fewest, most = markers["seeds"].min(), markers["seeds"].max()
    parts.append("1 seed" if most == 1 else f"mean of {most if fewest == most else f'{fewest} to {most}'} seeds")
    if isinstance(figure, SmallestUpdate):
        parts.append("bars: with every mean a standard deviation over seeds higher or lower")
        parts += ["arrow: not reached with lower ones"] if table["high"].isna().any() else []
    else:
        parts.append(f"{'band' if isinstance(figure, Curves) else 'bars'}: standard deviation over seeds")
    if isinstance(figure, Curves) and figure.moving_mean > 1:
        parts.append(f"moving mean of {figure.moving_mean} logged steps")
    if markers["hollow"].any():
        parts.append(f"{'dashed' if isinstance(figure, Curves) else 'hollow'}: fewer than {FEWEST_SEEDS} seeds")
    return "\n".join(textwrap.wrap("; ".join(parts) + ".", CAPTION_CHARACTERS))

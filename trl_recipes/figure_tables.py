"""From measured runs to the numbers of a figure: means and standard deviations over seeds, a row a marker.

A table is what the picture is drawn from and the CSV beside it, whole. Standard deviations are those of a sample
(divided by seeds - 1), empty for a single seed. A marker with fewer than `FEWEST_SEEDS` is `hollow`.
"""

import math
from statistics import mean, stdev

import pandas as pd

from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.figure_results import Results, comparable
from trl_recipes.figure_spec import Curves, FilledPanel, Points, Series, SmallestUpdate


FEWEST_SEEDS = 3
UNTRAINED = "untrained"
ROUNDING = 1e-9  # of shares: one that is exactly the target reaches it


def table_of(figure: Points | SmallestUpdate | Curves, results: Results) -> pd.DataFrame:
    """
    Returns the numbers of a figure.

    Args:
        figure ([`Points`], [`SmallestUpdate`] or [`Curves`]):
            What it shows.
        results ([`Results`]):
            The measured runs, with at least one of each sweep.

    Returns:
        `pd.DataFrame`: of [`points_table`], [`smallest_update_table`] or [`curves_table`].

    Raises:
        RecipeError: if a column is missing, a series has no run or has one twice, or a number cannot be drawn.
    """
    if isinstance(figure, Points):
        return points_table(figure, results)
    if isinstance(figure, Curves):
        return curves_table(figure, results)
    return smallest_update_table(figure, results)


def points_table(figure: Points, results: Results) -> pd.DataFrame:
    """A row for each marker: panel (from 0), quantity, series, x, mean, standard_deviation, seeds, hollow, learning_rate,
    trained_parameters, reported, problems, sweep, point. Rows with series `untrained` (for `each`, `untrained, NAME`)
    have no x: their mean is a line.
    """
    rows = []
    for number, panel in enumerate(figure.filled_panels()):
        runs_of = expanded(panel, results)
        place = {"panel": number, "quantity": panel.y}
        for name, runs in runs_of.items():
            rows += [place | {"series": name} | row for row in markers(runs, panel.y, figure.x, name)]
        shared = {UNTRAINED: pd.concat(runs_of.values())}
        each = {f"{UNTRAINED}, {name}": runs for name, runs in runs_of.items()}
        lines = {"shared": shared, "each": each, "none": {}}[figure.untrained]
        rows += [place | {"series": name} | row for name, runs in lines.items() for row in untrained(runs, panel.y)]
    return pd.DataFrame(rows)


def curves_table(figure: Curves, results: Results) -> pd.DataFrame:
    """A row for each step of a series: panel (from 0), quantity, series, x, mean, standard_deviation, seeds, hollow,
    learning_rate, trained_parameters, sweep, point. x is the step.
    """
    rows = []
    for number, panel in enumerate(figure.filled_panels()):
        for name, runs in expanded(panel, results).items():
            points = list(runs.groupby(["sweep", "point"], sort=False))
            if len(points) > 1:
                names = ", ".join("/".join(map(str, key)) for key, _ in points)
                raise RecipeError(f"series {shown(name)} has {len(points)} points ({names}), and a curve is of one.")
            curves = [results.curve(folder, panel.y) for folder in runs["folder"]]
            means = [curve.rolling(figure.moving_mean, min_periods=1).mean() for curve in curves]
            by_step = pd.concat(means, axis="columns").sort_index()
            if by_step.empty:
                raise RecipeError(f"series {shown(name)}: nothing is logged as {shown(panel.y)} yet.")
            place = {"panel": number, "quantity": panel.y, "series": name}
            rows += [place | {"x": step} | over_seeds(values) | facts(runs) for step, values in by_step.iterrows()]
    return pd.DataFrame(rows)


def smallest_update_table(figure: SmallestUpdate, results: Results) -> pd.DataFrame:
    """A row for each share and model: quantity, series (the share), model, x (model_parameters), trained_parameters (the
    smallest number whose mean reaches the target), low and high (the same with a standard deviation added to or taken
    from every mean; high is empty where no size reaches it then), target, peak, mean, standard_deviation, seeds,
    hollow, learning_rate, reported, problems, sweep, point. Mean to point are of the update found.
    """
    rows = []
    for name, model in figure.models.items():
        runs = results.select(model.sweeps, model.where, f"model {shown(name)}")
        points = pd.DataFrame(markers(runs, figure.y, "trained_parameters", name))
        deviations = points["standard_deviation"].fillna(0)
        peak = points["mean"].max()
        for share in figure.shares:
            target = share * peak
            found = points[points["mean"] >= target - ROUNDING].iloc[0]  # the points are sorted by size
            low, high = (
                points["trained_parameters"][points["mean"] + sign * deviations >= target - ROUNDING].min()
                for sign in (1, -1)
            )
            place = {"quantity": figure.y, "series": f"{100 * share:g}% of peak", "model": name}
            size = {"x": model.model_parameters, "low": low, "high": high, "target": target, "peak": peak}
            rows.append(place | size | found.drop("x").to_dict())
    return pd.DataFrame(rows)


def expanded(panel: FilledPanel, results: Results) -> dict[str, pd.DataFrame]:
    """Returns the runs of each line of a panel by its name, those of `each` apart."""
    lines = {}
    for name, series in panel.series.items():
        runs = results.select(series.sweeps, series.where, f"series {shown(name)}")
        if series.each is None:
            lines[name] = runs
        else:
            lines |= {name.replace("{value}", value): part for value, part in split(runs, series, results)}
    return lines


def split(runs: pd.DataFrame, series: Series, results: Results) -> list[tuple[str, pd.DataFrame]]:
    """Splits runs by the value of `series.each`, numbers in ascending order, then text."""
    assert series.each is not None
    for sweep in series.sweeps:
        results.column(results.of(sweep), series.each, sweep)
    keys = runs[series.each].map(comparable)
    values = sorted(keys.unique(), key=lambda value: (isinstance(value, str), value))
    return [(value if isinstance(value, str) else f"{value:g}", runs[keys == value]) for value in values]


def markers(runs: pd.DataFrame, y: str, x: str, name: str) -> list[dict]:
    """Returns a row for each point of a series, by ascending x; runs without a value of y do not count."""
    for column in (x, y):
        if column not in runs:
            raise RecipeError(
                f"series {shown(name)}: no column {shown(column)}; there are {in_one_line(', '.join(runs.columns))}."
            )
    if not pd.api.types.is_numeric_dtype(runs[y]):
        raise RecipeError(
            f"series {shown(name)}: {in_one_line(y)} is no number: take greedy_after, sampled_after or a benchmark: column."
        )
    valued = runs[runs[y].notna()]
    if valued.empty:
        raise RecipeError(f"series {shown(name)}: no run has a value of {shown(y)}.")
    rows = []
    for (sweep, point), ones in valued.groupby(["sweep", "point"], sort=False):
        place = comparable(ones[x].iloc[0])
        if isinstance(place, str) or not 0 < place < math.inf:
            raise RecipeError(
                f"series {shown(name)}: {in_one_line(x)} of {sweep}/{point} is {shown(place)}: a logarithmic axis needs a number above 0."
            )
        rows.append({"x": place} | over_seeds(ones[y]) | facts(ones))
    return sorted(rows, key=lambda row: row["x"])


def untrained(runs: pd.DataFrame, y: str) -> list[dict]:
    """Returns the accuracy before training, each seed's mean over its runs and then over seeds; nothing without it."""
    before = y.removesuffix("_after") + "_before"
    known = runs[runs[before].notna()] if before in runs else runs.iloc[:0]
    return [] if known.empty else [over_seeds(known.groupby("seed")[before].agg(mean))]


def over_seeds(values: pd.Series) -> dict:
    """Mean and standard deviation over seeds, and how many seeds there are."""
    known = values.dropna().tolist()
    return {
        "mean": mean(known),
        "standard_deviation": stdev(known) if len(known) > 1 else math.nan,
        "seeds": len(known),
        "hollow": len(known) < FEWEST_SEEDS,
    }


def facts(runs: pd.DataFrame) -> dict:
    """What the runs of a point have in common."""
    columns = ["learning_rate", "trained_parameters", "reported", "problems", "sweep", "point"]
    return {column: runs[column].iloc[0] if column in runs else None for column in columns}

"""The results of sweeps, as the figures need them: the measured runs at the chosen learning rate.

Enters: `<sweeps>/<name>/results.csv`, perhaps while a sweep is writing it, and the curves in the runs' folders. Leaves:
data frames with a row a run, or a row a step.
"""

import csv
import io
import math
from pathlib import Path

import pandas as pd

from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.figure_spec import Value


NEEDED = [
    "point",
    "stage",
    "learning_rate",
    "seed",
    "chosen",
    "trained_parameters",
    "problems",
    "folder",
    "configuration",
]
SHARES = ["greedy_before", "greedy_after", "sampled_before", "sampled_after", "reported"]
NUMBERS = ["learning_rate", "seed", "trained_parameters", "problems"]
CURVES = ["reward_curve.csv", "loss_curve.csv"]


class Results:
    """
    Measured runs by the name of their sweep; each file is read once, so that all figures are of the same state.

    Args:
        folder (`Path`):
            Where the sweeps are: `folder/<name>/results.csv`.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.read: dict[str, pd.DataFrame] = {}

    def of(self, sweep: str) -> pd.DataFrame:
        """
        Returns a sweep's measured runs with the chosen rate, a row each; none where there is no results.csv yet.

        `sweep` is the folder's name, and `folder` a whole path. Numbers are float64, an empty cell NaN; options stay
        text.

        Raises:
            RecipeError: if a column is missing, a cell is no number, or a share is not between 0 and 1.
        """
        if sweep not in self.read:
            path = self.folder / sweep / "results.csv"
            runs = read_whole_rows(path)
            self.read[sweep] = runs if runs.empty else measured(runs, path).assign(sweep=sweep)
        return self.read[sweep]

    def missing(self, sweeps: list[str]) -> list[str]:
        """Returns those of the sweeps that have no measured run yet."""
        return [sweep for sweep in sweeps if self.of(sweep).empty]

    def select(self, sweeps: list[str], where: dict[str, Value | list[Value]], what: str) -> pd.DataFrame:
        """
        Returns the runs of some sweeps that have the values asked for.

        Args:
            sweeps (`list[str]`), where (`dict`):
                As in [`~figure_spec.Series`].
            what (`str`):
                What it is for, for errors.

        Raises:
            RecipeError: if a sweep lacks a column, no run has the values, or a sweep has a configuration twice.
        """
        chosen = []
        for sweep in sweeps:
            runs = self.of(sweep)
            for column, values in where.items():
                allowed = {comparable(value) for value in (values if isinstance(values, list) else [values])}
                runs = runs[self.column(runs, column, sweep).map(comparable).isin(allowed)]
            chosen.append(runs)
        runs = pd.concat(chosen, ignore_index=True)
        if runs.empty:
            raise RecipeError(
                f"{what}: no measured run of {', '.join(sweeps)} has {where}: not run yet, or a wrong value."
            )
        return without_repeats(runs, what)

    def column(self, runs: pd.DataFrame, column: str, sweep: str) -> pd.Series:
        """Returns a column, or raises [`RecipeError`] where it is not in the sweep's results."""
        if column not in runs:
            path = self.folder / sweep / "results.csv"
            raise RecipeError(f"{path}: no column {shown(column)}; there are {in_one_line(', '.join(runs.columns))}.")
        return runs[column]

    def curve(self, folder: Path, column: str) -> pd.Series:
        """
        Returns a logged quantity of a run by step, empty where nothing is logged.

        Raises:
            RecipeError: if the run has no curve, or the curve no such column or a cell that is no number.
        """
        path = next((Path(folder) / name for name in CURVES if (Path(folder) / name).exists()), None)
        if path is None:
            raise RecipeError(f"{folder}: neither {' nor '.join(CURVES)}: the run's folder is gone or was moved.")
        rows = read_whole_rows(path)
        if not rows.empty and not {"step", column} <= set(rows.columns):
            raise RecipeError(f"{path}: no column {shown(column)}; there are {in_one_line(', '.join(rows.columns))}.")
        if rows.empty:
            return pd.Series(dtype=float)
        rows = rows.assign(step=to_numbers(rows["step"], path), value=to_numbers(rows[column], path))
        return rows.drop_duplicates("step", keep="last").set_index("step")["value"].dropna()


def read_whole_rows(path: Path) -> pd.DataFrame:
    """
    Reads a CSV as text, without a last line that is still being written; empty where there is no file or no row.

    Raises:
        RecipeError: if a row before the last has another number of cells than the first.
    """
    if not path.exists():
        return pd.DataFrame()
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as text ({error}): is it a CSV file?") from error
    whole = text[: text.rfind("\n") + 1]
    try:
        rows = [row for row in csv.reader(io.StringIO(whole, newline="")) if row]
    except csv.Error as error:
        raise RecipeError(f"{path} cannot be read as text ({error}): is it a CSV file?") from error
    if len(rows) < 2:
        return pd.DataFrame()
    header, *rows = rows
    if repeated := [name for name in header if header.count(name) > 1]:
        raise RecipeError(f"{path}: the column {shown(repeated[0])} is there twice: is it the CSV of one run?")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise RecipeError(
                f"{path}: row {number} has {len(row)} cells and the header {len(header)}: was it cut off?"
            )
    return pd.DataFrame(rows, columns=header)


def measured(runs: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Checks the columns and returns the runs that count: stage `measure`, at the rate chosen for their point."""
    missing = [column for column in NEEDED if column not in runs]
    if missing:
        raise RecipeError(f"{path}: no column {', '.join(map(repr, missing))}: was it written by sweep.py?")
    runs = runs[(runs["stage"] == "measure") & (runs["chosen"] == "True")].copy()
    shares = [name for name in map(str, runs) if name in SHARES or name.startswith("benchmark:")]
    for column in [*(name for name in NUMBERS if name in runs), *shares]:
        runs[column] = to_numbers(runs[column], path)
    for column in shares:
        wrong = runs[(runs[column] < 0) | (runs[column] > 1)]
        if not wrong.empty:
            raise RecipeError(
                f"{path}: {in_one_line(column)} of point {shown(wrong.iloc[0]['point'])} is {wrong.iloc[0][column]:g}: "
                "a share is between 0 and 1."
            )
    runs["folder"] = [path.parent / folder for folder in runs["folder"]]
    for point, ones in runs.groupby("point", sort=False):
        if ones["learning_rate"].nunique() > 1:
            raise RecipeError(
                f"{path}: point {shown(point)} has {ones['learning_rate'].nunique()} chosen learning rates."
            )
        if ones["seed"].duplicated().any():
            seed = ones["seed"][ones["seed"].duplicated()].iloc[0]
            raise RecipeError(f"{path}: point {shown(point)} has seed {seed:g} twice: take one of the two rows out.")
        if ones["trained_parameters"].nunique() > 1:
            raise RecipeError(f"{path}: the runs of point {shown(point)} differ in trained_parameters.")
    return runs


def without_repeats(runs: pd.DataFrame, what: str) -> pd.DataFrame:
    """Returns the runs with each configuration from the first sweep that has it: twice would be one point drawn twice.

    Raises:
        RecipeError: if two points of one sweep are the same configuration.
    """
    points = runs.drop_duplicates(["sweep", "point"])
    first: dict[str, tuple[str, str]] = {}
    repeated = []
    for _, row in points.iterrows():
        sweep, point = first.setdefault(row["configuration"], (row["sweep"], row["point"]))
        if sweep == row["sweep"] and point != row["point"]:
            both = in_one_line(f"{sweep}/{point}"), in_one_line(f"{sweep}/{row['point']}")
            raise RecipeError(f"{what}: {' and '.join(both)} have the same options: leave one out by `where`.")
        if sweep != row["sweep"]:
            repeated.append((row["sweep"], row["point"]))
    return runs[[key not in repeated for key in zip(runs["sweep"], runs["point"], strict=True)]]


def to_numbers(cells: pd.Series, path: Path) -> pd.Series:
    """Converts cells to float64, empty ones and "nan" to NaN; raises [`RecipeError`] for other text and infinity."""
    numbers = pd.to_numeric(cells.mask(cells.str.strip().isin(["", "None"])), errors="coerce").astype(float)
    wrong = cells[
        (numbers.isna() & ~cells.str.strip().str.lower().isin(["", "none", "nan"])) | numbers.abs().eq(math.inf)
    ]
    if not wrong.empty:
        raise RecipeError(f"{path}: {in_one_line(cells.name)} is {shown(wrong.iloc[0])}, which is no number.")
    return numbers


def comparable(value: object) -> float | str:
    """Makes `4`, `"4"` and `"4.0"` the same, and `None`, NaN and `""`."""
    text = str(value).strip()
    if text.lower() in ("", "none", "nan"):
        return ""
    try:
        return float(text)
    except ValueError:
        return text

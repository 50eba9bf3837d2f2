"""What a figure shows, as a YAML file says it: a mapping of figure name -> [`Points`], [`SmallestUpdate`] or [`Curves`].

The classes hold the keys and check them; an unknown key or a wrong value is an error that names its place in the file.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.yaml_files import read_yaml


Value = bool | int | float | str | None


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Series(Strict):
    """
    Which points of which sweeps make a line.

    Args:
        sweeps (`list[str]`):
            Names of sweeps; their points are taken together, and a configuration that several have from the first.
        where (`dict[str, Value or list[Value]]`, *optional*):
            Column of results.csv -> the value, or one of the values, that a point must have there. Numbers are compared
            as numbers; null is an empty cell.
        each (`str`, *optional*):
            A column: a line for each value of it, with the value in place of `{value}` in the series' name.
    """

    sweeps: list[str] = Field(min_length=1)
    where: dict[str, Value | list[Value]] = {}
    each: str | None = None


class Panel(Strict):
    """
    One of the plots of a figure, two in a row. What it leaves out is the figure's.

    Args:
        title (`str`, *optional*, defaults to `""`):
            One or two words above it.
        y (`str`, *optional*):
            The column shown.
        y_label (`str`, *optional*):
            What the axis says, where the column's own description does not do.
        series (`dict[str, Series]`, *optional*):
            Name in the legend -> what it shows. A name has the same colour in all panels.
    """

    title: str = ""
    y: str | None = None
    y_label: str | None = None
    series: dict[str, Series] | None = None


class FilledPanel(Panel):
    """A panel with everything that the figure gives it."""

    y: str
    series: dict[str, Series]


class Lines(Strict):
    """
    What figures made of series have in common.

    Args:
        title (`str`):
            One short line above the picture.
        caption (`str`, *optional*, defaults to `""`):
            Model and data, under the picture; problems, seeds and what the bars are follow by themselves.
        y, y_label, series (*optional*):
            Of the panels that have none of their own.
        panels (`list[Panel]`, *optional*):
            By default one.
    """

    title: str
    caption: str = ""
    y: str
    y_label: str | None = None
    series: dict[str, Series] = {}
    panels: list[Panel] = Field(default=[Panel()], min_length=1)

    @model_validator(mode="after")
    def check_series(self) -> "Lines":
        """Every panel has series, and a name with a value in it exactly where there are several values."""
        for panel in self.filled_panels():
            if not panel.series:
                raise ValueError("no series: name some for the figure or for each panel")
            for name, series in panel.series.items():
                if (series.each is not None) != ("{value}" in name):
                    raise ValueError(f"series {shown(name)}: `each` and {{value}} in the name go together")
        return self

    def filled_panels(self) -> list[FilledPanel]:
        """The panels with everything that the figure gives them."""
        return [
            FilledPanel(
                title=panel.title,
                y=panel.y or self.y,
                y_label=panel.y_label or (None if panel.y else self.y_label),
                series=panel.series or self.series,
            )
            for panel in self.panels
        ]

    def sweeps(self) -> list[str]:
        """Every sweep that the figure needs, once, in order."""
        return list(
            dict.fromkeys(
                name for panel in self.filled_panels() for series in panel.series.values() for name in series.sweeps
            )
        )


class Points(Lines):
    """
    An accuracy against what was varied, a marker for each point of a sweep.

    Args:
        x (`str`, *optional*, defaults to `"trained_parameters"`):
            A column of numbers above 0; the axis is logarithmic.
        y (`str`, *optional*, defaults to `"greedy_after"`):
            A column of shares, 0 to 1.
        untrained (`str`, *optional*, defaults to `"shared"`):
            A line at the accuracy before training: one for all series (`shared`), one for `each`, or `none`.
    """

    kind: Literal["points"]
    x: str = "trained_parameters"
    y: str = "greedy_after"
    untrained: Literal["shared", "each", "none"] = "shared"


class Curves(Lines):
    """
    A logged quantity against the training step, for one point a series: the mean over seeds in a band.

    Args:
        y (`str`, *optional*, defaults to `"reward"`):
            A column of reward_curve.csv or loss_curve.csv.
        moving_mean (`int`, *optional*, defaults to `1`):
            Rows over which each run's curve is averaged before the seeds are.
    """

    kind: Literal["curves"]
    y: str = "reward"
    moving_mean: int = Field(default=1, ge=1)


class SizedModel(Strict):
    """
    All the points of one model.

    Args:
        model_parameters (`int`):
            Its size.
        sweeps, where:
            As in [`Series`].
    """

    model_parameters: int = Field(gt=0)
    sweeps: list[str] = Field(min_length=1)
    where: dict[str, Value | list[Value]] = {}


class SmallestUpdate(Strict):
    """
    The smallest number of trained parameters that reaches a share of a model's peak, against the model's size.

    The paper's Figure 3: the peak is the best mean accuracy over all sizes of update of that model.

    Args:
        title, caption:
            As in [`Lines`].
        y (`str`, *optional*, defaults to `"greedy_after"`):
            A column of shares, 0 to 1.
        shares (`list[float]`, *optional*, defaults to `[0.9, 0.95, 0.975]`):
            Shares of the peak, a line each.
        models (`dict[str, SizedModel]`):
            Name -> size and sweeps.
    """

    kind: Literal["smallest_update"]
    title: str
    caption: str = ""
    y: str = "greedy_after"
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(default=[0.9, 0.95, 0.975], min_length=1)
    models: dict[str, SizedModel] = Field(min_length=1)

    def sweeps(self) -> list[str]:
        """Every sweep that the figure needs, once, in order."""
        return list(dict.fromkeys(name for model in self.models.values() for name in model.sweeps))


Figure = Annotated[Points | SmallestUpdate | Curves, Field(discriminator="kind")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


def read_figures(path: Path) -> dict[str, Points | SmallestUpdate | Curves]:
    """
    Reads a file of figures.

    Raises:
        RecipeError: if it is missing, no YAML mapping, or a key or value is not accepted.
    """
    content = read_yaml(path, "file of figures")
    try:
        return TypeAdapter(Annotated[dict[FileName, Figure], Field(min_length=1)]).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ": ".join(
            in_one_line(part) for part in first["loc"] if part not in ("points", "smallest_update", "curves")
        )
        got = "" if isinstance(first["input"], dict) else f", got {shown(first['input'])}"
        raise RecipeError(f"{path}: {place}: {first['msg']}{got}.") from error

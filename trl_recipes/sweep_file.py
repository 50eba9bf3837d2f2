"""A sweep file (YAML) -> the runs that it asks for.

Enters: what to reproduce, which recipe and config to start from, the points, the learning rates and the seeds; a file may
extend another. Leaves: [`Run`]s, each a recipe config of its own, in a folder whose name says which one it is.

    reproduces: "Figure 1, TinyLoRA"     one sentence
    left_open: [...]                     what the paper does not say, and what is taken here
    extends: other.yaml                  whose keys are the defaults; `options` are merged key by key
    recipe: grpo                         or sft
    config: trl_recipes/configs/....yaml what every run starts from, from the repository's root
    options: {max_steps: 40}             over it, in every run
    points: {"13": {tinylora_n_tie: 4}}  a setting each; or the product of lists, grid: {tinylora_u: [1, 4], ...}
    learning_rates: [0.01, 0.03]         the best one is chosen for each point, as the paper does; a point may have its own
    seeds: [0, 1, 2]
    seeded: [seed]                       the options that a seed sets: tinylora_projection_seed too, say
    choose: {seeds: [100], options: {}}  choose the rate in these runs instead, and let only that one run with `seeds`
    evaluate: [math500]                  benchmarks to score each measured run on
    reported: {"13": 0.907}              what the paper reports, share correct
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from trl_recipes.errors import RecipeError, in_one_line, shown
from trl_recipes.yaml_files import read_yaml


RECIPES = ("grpo", "sft")
CHOOSE, MEASURE = "choose", "measure"
KINDS = {
    **dict.fromkeys(("reproduces", "extends", "recipe", "config"), str),
    **dict.fromkeys(("left_open", "learning_rates", "seeds", "seeded", "evaluate"), list),
    **dict.fromkeys(("options", "points", "grid", "choose", "reported"), dict),
}
NAMES = {str: "text", list: "list", dict: "mapping"}
MOST_POINTS = 10_000  # of a grid
MOST_CHARACTERS = 200  # of a folder's name


@dataclass(frozen=True)
class Choose:
    """The runs that a learning rate is chosen by, where those that are measured shall not choose it themselves.

    Args:
        seeds (`list[int]`):
            Their seeds.
        options (`dict[str, object]`, *optional*):
            Of the recipe, over those of the point: other problems, say.
    """

    seeds: list[int]
    options: Mapping[str, object]


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Args:
        sweep (`str`): the sweep's name.
        point (`str`): which setting.
        stage (`str`): "choose" or "measure".
        learning_rate (`float`, *optional*): `None` for the one of the config.
        seed (`int`): what the options that the sweep calls seeded are set to.
        options (`dict[str, object]`): the whole recipe config, without `output_dir`.
    """

    sweep: str
    point: str
    stage: str
    learning_rate: float | None
    seed: int
    options: Mapping[str, object]

    @property
    def folder(self) -> Path:
        """Where it goes, from the sweep's folder."""
        rate = "" if self.learning_rate is None else f"lr_{self.learning_rate:g}_"
        return Path(self.point) / f"{self.stage}_{rate}seed_{self.seed}"

    def __str__(self) -> str:
        rate = "" if self.learning_rate is None else f" at {self.learning_rate:g}"
        return f"{self.sweep} {self.point}{rate}, seed {self.seed}" + (" (choosing)" if self.stage == CHOOSE else "")


@dataclass(frozen=True)
class Sweep:
    """A sweep file as it was read; the module's docstring says what its keys mean.

    `name` is that of the file, `points` are those of `grid` too, and `rates` are the learning rates of each point.
    """

    name: str
    reproduces: str
    left_open: list[str]
    recipe: str
    config: Mapping[str, object]
    points: Mapping[str, Mapping[str, object]]
    rates: Mapping[str, list[float | None]]
    seeds: list[int]
    seeded: list[str]
    choose: Choose | None
    evaluate: list[str]
    reported: Mapping[str, float]

    def first_runs(self) -> list[Run]:
        """Returns the runs that need no other: those that choose the rate, where there are such, or else all of them."""
        stage, seeds = (MEASURE, self.seeds) if self.choose is None else (CHOOSE, self.choose.seeds)
        return [
            self._run(point, rate, seed, stage)
            for point in self.points
            for rate in self.rates[point]
            for seed in seeds
        ]

    def last_runs(self, rates: Mapping[str, float | None]) -> list[Run]:
        """Returns the runs with the chosen rates (point -> rate): none where the first runs are the measured ones."""
        if self.choose is None:
            return []
        return [self._run(point, rates[point], seed, MEASURE) for point, seed in product(self.points, self.seeds)]

    def _run(self, point: str, rate: float | None, seed: int, stage: str) -> Run:
        options = {**self.config, **self.points[point]}
        if stage == CHOOSE and self.choose is not None:
            options |= self.choose.options
        options |= dict.fromkeys(self.seeded, seed) | ({} if rate is None else {"learning_rate": rate})
        options.pop("output_dir", None)
        return Run(self.name, point, stage, rate, seed, options)


def load_sweep(path: Path, root: Path) -> Sweep:
    """
    Reads a sweep file.

    Args:
        path (`Path`):
            The YAML file.
        root (`Path`):
            The folder that `config` is relative to: the repository's.

    Raises:
        RecipeError: if a file is missing or no YAML mapping, a key is unknown or missing, or a value cannot be meant.
    """
    values = merged(Path(path))
    for key in ("reproduces", "recipe", "config", "seeds"):
        if not values.get(key):
            raise RecipeError(f"{path}: {key} is missing.")
    if values["recipe"] not in RECIPES:
        raise RecipeError(f"{path}: recipe: {shown(values['recipe'])}: allowed are {', '.join(RECIPES)}.")
    points = points_of(path, values)
    rates = {}
    for name, options in points.items():
        rates[name] = options.pop("learning_rates", None) or values.get("learning_rates") or [None]
        check_rates(path, as_list(path, "learning_rates", rates[name]))
    choose = values.get("choose")
    if choose is not None:
        options = choose.get("options") or {}
        if not choose.get("seeds") or choose.keys() - {"seeds", "options"} or not isinstance(options, dict):
            raise RecipeError(f"{path}: choose: wants seeds, and may have options, and got {shown(choose)}.")
        choose = Choose(check_seeds(path, "choose.seeds", choose["seeds"]), options)
    reported = values.get("reported") or {}
    strangers = sorted(map(str, reported.keys() - points.keys()))
    if strangers:
        raise RecipeError(f"{path}: reported: {shown(strangers[0])} is no point: {in_one_line(', '.join(points))}.")
    evaluate = values.get("evaluate") or []
    for name in evaluate:  # becomes a file's name, and a folder's that is removed before it is made
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]+", name):
            raise RecipeError(f"{path}: evaluate: {shown(name)} is no name of a benchmark.")
    return Sweep(
        name=Path(path).stem,
        reproduces=values["reproduces"],
        left_open=values.get("left_open") or [],
        recipe=values["recipe"],
        config=read_mapping(root / values["config"]) | (values.get("options") or {}),
        points=points,
        rates=rates,
        seeds=check_seeds(path, "seeds", values["seeds"]),
        seeded=as_list(path, "seeded", values.get("seeded", ["seed"])),
        choose=choose,
        evaluate=evaluate,
        reported=reported,
    )


def merged(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Reads a sweep file over the one that it extends."""
    path = path.resolve()
    if path in below:
        raise RecipeError(f"{path}: extends itself, by {' -> '.join(p.name for p in (*below, path))}.")
    values = read_mapping(path)
    unknown = sorted(map(str, values.keys() - KINDS.keys()))
    if unknown:
        raise RecipeError(f"{path}: unknown key {shown(unknown[0])}: allowed are {', '.join(sorted(KINDS))}.")
    for key, value in values.items():
        if value is not None and not isinstance(value, KINDS[key]):
            raise RecipeError(f"{path}: {key}: wants a {NAMES[KINDS[key]]}, and got {shown(value)}.")
    extends = values.pop("extends", None)
    if extends is None:
        return values
    base = merged(path.parent / extends, (*below, path))
    if {
        "points",
        "grid",
    } & values.keys():  # a file's own points take the place of the other's, whichever form they have
        base.pop("points", None)
        base.pop("grid", None)
    options = {**(base.get("options") or {}), **(values.get("options") or {})}
    return base | values | {"options": options}


def points_of(path: Path, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the points by name, from `points` or from the product of `grid`."""
    points, grid = values.get("points"), values.get("grid")
    if (points is None) == (grid is None):
        raise RecipeError(f"{path}: wants points or grid, one of them.")
    if grid is not None:
        lists = [[(name, value) for value in as_list(path, f"grid.{name}", some)] for name, some in grid.items()]
        if math.prod(map(len, lists)) > MOST_POINTS:
            raise RecipeError(f"{path}: grid: asks for more than {MOST_POINTS} points.")
        points = {",".join(f"{name}={value}" for name, value in pairs): dict(pairs) for pairs in product(*lists)}
    if not points:
        raise RecipeError(f"{path}: points: wants a mapping of names to options, and got {shown(points)}.")
    for name, options in points.items():
        if not isinstance(options, dict):
            raise RecipeError(f"{path}: points: {shown(name)}: wants a mapping of options, and got {shown(options)}.")
        if not isinstance(name, str) or not name.strip(". ") or set(name) & set('/\\:*?"<>|') or not is_short(name):
            raise RecipeError(
                f"{path}: points: {shown(name)} becomes a folder's name: take a string that can be one, of at most "
                f"{MOST_CHARACTERS} characters."
            )
    return points


def is_short(name: str) -> bool:
    """Whether a name can be seen as a whole."""
    return name.isprintable() and len(name) <= MOST_CHARACTERS


def check_seeds(path: Path, key: str, seeds: object) -> list[int]:
    """Returns a list of integers; refuses anything else by the key."""
    listed = as_list(path, key, seeds)
    for seed in listed:
        if type(seed) is not int:
            raise RecipeError(f"{path}: {key}: {shown(seed)} is no integer.")
    return listed


def check_rates(path: Path, rates: list) -> None:
    """Raises [`RecipeError`] for what is no learning rate."""
    for rate in rates:
        if rate is not None and (
            isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf
        ):
            raise RecipeError(
                f"{path}: learning_rates: {shown(rate)} is no positive number (YAML reads 1e-4 as text: write 1.0e-4)."
            )


def as_list(path: Path, key: str, value: object) -> list:
    """Returns a list without repetitions as it is, and refuses anything else by the key."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{path}: {key}: wants a list, and got {shown(value)}.")
    repeated = next((one for i, one in enumerate(value) if one in value[:i]), None)
    if repeated is not None:
        raise RecipeError(f"{path}: {key}: {shown(repeated)} is there twice.")
    return value


def read_mapping(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: wants a mapping, and holds {type(values).__name__}.")
    return values

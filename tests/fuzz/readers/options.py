"""A recipe's options (arguments.py), and what a run of a sweep left (sweep_run.py)."""

import os

from fuzz.harness import Reader, workplace
from fuzz.readers.sweeps import BOMB, DEEP, ITSELF, MERGED, RECIPE, YAML, written
from trl import ModelConfig

from trl_recipes.arguments import GRPOArguments, RecipeError, TinyLoraArguments, parse
from trl_recipes.sweep_file import Run
from trl_recipes.sweep_run import CONFIG, RESULT, read_result


def parse_recipe(data: bytes) -> None:
    before = dict(os.environ)
    try:
        parse(
            (GRPOArguments, ModelConfig, TinyLoraArguments), "usage", ["--config", str(written("recipe.yaml", data))]
        )
    except SystemExit as stop:
        assert stop.code == 2  # argparse's, with one line on stderr: a value of another type
    finally:  # `env` of a recipe sets variables
        os.environ.clear()
        os.environ.update(before)


def read_run(data: bytes) -> None:
    """The first line is result.json, the others are run.yaml."""
    result, _, config = data.partition(b"\n")
    written(f"run/{RESULT}", result)
    written(f"run/{CONFIG}", config)
    read_result(Run("sweep", "13", "measure", None, 0, {"max_steps": 40}), workplace() / "run")


LONG = RECIPE.replace(b"{question}", b"[" * 10_000)

READERS = [
    Reader(
        "recipe",
        parse_recipe,
        (RecipeError,),
        lambda: [RECIPE],
        YAML,
        found=(BOMB, MERGED, ITSELF, DEEP, LONG),
        is_slow=True,
    ),
    Reader("run", read_run, (RecipeError,), lambda: [b'{"greedy": 0.5}\nmax_steps: 40\noutput_dir: a\n'], YAML),
]

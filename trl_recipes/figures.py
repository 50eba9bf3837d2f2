"""Draws the paper's figures from the results of sweeps.

    python trl_recipes/figures.py --figures trl_recipes/sweeps/embedded/figures.yaml --sweeps outputs/sweeps \
        --output_dir outputs/figures

Enters: a YAML file of figures (figure_spec.py says its keys) and `results.csv` of the sweeps they name. Leaves, for each
figure whose sweeps are all there, NAME.png and the numbers in it as NAME.csv; one line for each that has to wait.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path


# bitsandbytes, which TRL imports, warns that an optional CPU kernel is missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from peft_tinylora.versions import check_libraries_of_recipes  # noqa: E402


check_libraries_of_recipes()

import pandas as pd  # noqa: E402
from matplotlib.figure import Figure as Picture  # noqa: E402

from trl_recipes.arguments import run_script  # noqa: E402
from trl_recipes.errors import RecipeError  # noqa: E402
from trl_recipes.figure_drawing import draw  # noqa: E402
from trl_recipes.figure_results import Results  # noqa: E402
from trl_recipes.figure_spec import read_figures  # noqa: E402
from trl_recipes.figure_tables import table_of  # noqa: E402


def main() -> None:
    """Draws what can be drawn; fails in the end if a figure had an error, or none could be drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--figures", type=Path, required=True, help="YAML file, figure name -> what it shows")
    parser.add_argument("--sweeps", type=Path, default=Path("outputs/sweeps"), help="folder with NAME/results.csv")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/figures"), help="where PNG and CSV go")
    arguments = parser.parse_args()
    figures, results = read_figures(arguments.figures), Results(arguments.sweeps)

    drawn, failed = [], []
    for name, figure in figures.items():
        try:
            missing = results.missing(figure.sweeps())
            if missing:
                print(f"{name}: not drawn, no measured run yet of {', '.join(missing)}")
                continue
            table = table_of(figure, results)
            save(draw(figure, table), table, arguments.output_dir, name)
            print(f"{name}: {arguments.output_dir / name}.png and .csv")
            drawn.append(name)
        except RecipeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise RecipeError(f"not drawn: {', '.join(failed)}, for the reasons above.")
    if not drawn:
        raise RecipeError(f"nothing to draw in {arguments.sweeps}: run the sweeps named above, or set --sweeps.")


def save(picture: Picture, table: pd.DataFrame, folder: Path, name: str) -> None:
    """
    Writes NAME.csv and NAME.png, each of them whole or not at all.

    Raises:
        RecipeError: if they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
            png, numbers = Path(temporary, f"{name}.png"), Path(temporary, f"{name}.csv")
            picture.savefig(png)
            table.convert_dtypes().to_csv(numbers, index=False)  # counts as whole numbers
            os.replace(numbers, folder / numbers.name)
            os.replace(png, folder / png.name)
    except OSError as error:
        raise RecipeError(f"{folder / name} cannot be written ({error.strerror}): set --output_dir.") from error


if __name__ == "__main__":
    run_script(main)

"""Results of sweeps that were never run, for the tests of figures."""

import csv
from pathlib import Path

from trl_recipes.figure_spec import Points, SmallestUpdate


OPTIONS = {
    "option:method": "tinylora",
    "option:tinylora_r": 2,
    "option:tinylora_u": 1,
    "option:tinylora_tie": "tiled",
    "option:tinylora_dtype": "float32",
}


def run(point: str, trained: int, seed: int, greedy: float | str, **changes) -> dict:
    """A row of results.csv; n_tie is the point's name, so that points differ in an option as real ones do."""
    row = {
        "sweep": "made_up",
        "point": point,
        "stage": "measure",
        "learning_rate": 0.01,
        "seed": seed,
        "chosen": True,
        "trained_parameters": trained,
        "greedy_before": 0.4,
        "greedy_after": greedy,
        "sampled_before": 0.3 + seed / 100,
        "sampled_after": greedy and greedy / 2,
        "problems": 1024,
        "seconds": 9.5,
        "folder": f"{point}/lr_0.01_seed_{seed}",
        "option:tinylora_n_tie": point,
        "reported": "",
    }
    row = OPTIONS | row | changes
    options = [f"{name}={value}" for name, value in row.items() if name.startswith("option:")]
    return {"configuration": " ".join(options)} | row


def write_sweep(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_curve(folder: Path, rewards: list[float]) -> None:
    folder.mkdir(parents=True)
    rows = "".join(f"{step},{reward}\n" for step, reward in enumerate(rewards, start=1))
    (folder / "reward_curve.csv").write_text("step,reward\n" + rows)


def points(series: dict, **settings) -> Points:
    return Points.model_validate({"kind": "points", "title": "a figure", "series": series} | settings)


TINY = {"TinyLoRA": {"sweeps": ["tiny"]}}
ACCURACIES = {"13": (0.90, 0.93, 0.84), "1": (0.5, 0.6, 0.7), "49": (0.95,), "25": (0.92, 0.96)}


def write_tiny(folder: Path) -> Path:
    """Writes the sweep `tiny`: four points, not in the order of their size, two of them with too few seeds."""
    rows = [run(point, int(point), seed, acc) for point, all_ in ACCURACIES.items() for seed, acc in enumerate(all_)]
    write_sweep(folder, "tiny", rows)
    return folder


def smallest(models: dict, **settings) -> SmallestUpdate:
    content = {"kind": "smallest_update", "title": "a figure", "models": models} | settings
    return SmallestUpdate.model_validate(content)

"""Recipes as a user runs them, in a new process, and what they leave behind."""

import csv
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import trl_recipes


ROOT = Path(trl_recipes.__file__).parents[1]


@dataclass
class Run:
    """A finished run: its output folder, command and output."""

    folder: Path
    command: list[str]
    stdout: str
    stderr: str = ""

    @property
    def result(self) -> dict:
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def curve(self) -> list[dict[str, str]]:
        [path] = self.folder.glob("*_curve.csv")
        with path.open(newline="") as file:
            return list(csv.DictReader(file))


def in_new_process(*command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def launch_recipe(recipe: str, folder: Path, *options: str) -> Run:
    """Starts a recipe with the embedded config and more options, as the README says to."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", "trl_recipes/accelerate_configs/cpu.yaml"),
        *(f"trl_recipes/{recipe}.py", "--config", f"trl_recipes/configs/embedded_{recipe}.yaml"),
        *("--output_dir", str(folder), *options),
    ]
    finished = in_new_process(*command)
    assert finished.returncode == 0, finished.stderr
    return Run(folder, command, finished.stdout, finished.stderr)


def score_again(run: Run) -> dict:
    """Scores the saved adapter in a new process, by the command that the recipe printed."""
    [line] = [line for line in run.stdout.splitlines() if line.startswith("score it again: python ")]
    finished = in_new_process(sys.executable, *shlex.split(line.partition(": python ")[2]))
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)

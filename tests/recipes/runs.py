"""Recipes as a user runs them, in a process of their own, and what they leave behind.

A new Python takes some eight seconds for its imports. So what is about the start of a process, and the first run of each
recipe, is in a new one, and the rest in forks of one that has them (`support.warm_python`), and nothing of this project.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from support import IMPORT_PATH, warm_python
from transformers import AutoModelForCausalLM

import trl_recipes


ROOT = Path(trl_recipes.__file__).parents[1]
FORKED = str(Path(__file__).with_name("forked.py"))
LAUNCH = ("accelerate", "launch")
LEARNING_RATE = 0.05


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


def in_new_process(
    *command: str, more: Mapping[str, str] | None = None, seconds: float = 300
) -> subprocess.CompletedProcess:
    """Runs a command in the repository's root, offline, with one thread, and `more` in its environment."""
    environment = (
        os.environ | (more or {}) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": IMPORT_PATH}
    )
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)


def in_fork(
    script: str, *options: str, more: Mapping[str, str] | None = None, seconds: float = 300
) -> subprocess.CompletedProcess:
    """Runs a script in a fork of a process that has done the imports."""
    return in_new_process(*warm_python(), FORKED, script, *options, more=more, seconds=seconds)


def launch_recipe(recipe: str, folder: Path, *options: str, is_new: bool = False) -> Run:
    """Starts a recipe by `accelerate launch` with the embedded config and more options; `is_new`: as the README says to."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"] if is_new else [*warm_python()[:-1], *LAUNCH]
    command = [
        *(*launcher, "--config_file", "trl_recipes/accelerate_configs/cpu.yaml", *(() if is_new else (FORKED,))),
        *(f"trl_recipes/{recipe}.py", "--config", f"trl_recipes/configs/embedded_{recipe}.yaml"),
        *("--output_dir", str(folder), *options),
    ]
    finished = in_new_process(*command)
    assert finished.returncode == 0, finished.stderr
    return Run(folder, command, finished.stdout, finished.stderr)


def launch_tiny(recipe: str, tiny_model_dir: Path, folder: Path, *options: str, is_new: bool = False) -> Run:
    """Two steps of a recipe on the tiny model."""
    return launch_recipe(
        *(recipe, folder, "--model_name_or_path", str(tiny_model_dir)),
        *("--max_steps", "2", "--learning_rate", str(LEARNING_RATE), "--per_device_train_batch_size", "32"),
        *("--max_completion_length", "6", "--score_batch_size", "16", *options),
        is_new=is_new,
    )


def logged_v(run: Run, size: int) -> torch.Tensor:
    """The last v of a run, of which no number fits in bf16: it was not rounded on its way."""
    logged = torch.tensor([float(run.curve[-1][f"v_{i}"]) for i in range(size)])
    assert (logged.bfloat16().float() != logged).all()
    return logged


def check_v(run: Run, tiny_model_dir: Path) -> None:
    """Each of the four numbers moved at both steps, and was saved as it was logged, in fp32."""
    assert [row["step"] for row in run.curve] == ["1", "2"]
    logged = logged_v(run, 4)
    assert (logged != 0).all()
    assert logged.abs().max() <= 2 * LEARNING_RATE * 1.01  # Adam moves at most the rate a step
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run.folder)
    loaded = [p for name, p in model.named_parameters() if "tinylora_v" in name]
    assert {p.dtype for p in loaded} == {torch.float32}
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in loaded]), logged, rtol=1e-6, atol=0)


def score_again(run: Run, *, is_new: bool = False) -> dict:
    """Scores the saved adapter in another process, by the command that the recipe printed."""
    [line] = [line for line in run.stdout.splitlines() if line.startswith("score it again: python ")]
    script = shlex.split(line.partition(": python ")[2])
    finished = in_new_process(sys.executable, *script) if is_new else in_fork(*script)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)

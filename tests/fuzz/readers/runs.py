"""What a trainer held from step to step (resuming.py), the rows that it trains on (problems.py), and messages (rewards.py)."""

import io
import shutil
import types
from pathlib import Path
from unittest import mock

import datasets
import torch
from fuzz.harness import Reader, workplace

from trl_recipes.arguments import ProblemArguments, RecipeError
from trl_recipes.problems import load_rows, to_problems
from trl_recipes.resuming import ResumableTrainer


ROWS = b'{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "2 + 2 =", "answer": "#### 4"}\n'


def between_steps() -> bytes:
    held = {
        "_tr_loss": torch.tensor(0.5),
        "order": {"torch": torch.get_rng_state()},
        "metrics": {"train": {"a": [1.0]}, "eval": {}},
    }
    file = io.BytesIO()
    torch.save(held, file)
    return file.getvalue()


class Resumed(ResumableTrainer):
    """As much of a trainer as `restore` asks for."""

    def __init__(self, folder: Path) -> None:
        self._resumes_from = folder
        self.args = types.SimpleNamespace(device=torch.device("cpu"), process_index=0, world_size=1)
        self.order = types.SimpleNamespace(restore=lambda state: None)
        self._metrics: dict[str, dict] = {"train": {}, "eval": {}}


def resume(data: bytes) -> None:
    trainer = Resumed(workplace())
    (workplace() / trainer._between_steps_file()).write_bytes(data)
    trainer.restore()


def read_rows(data: bytes) -> None:
    """The rows of a JSONL file become problems, or it is said why not."""
    path = workplace() / "rows.jsonl"
    path.write_bytes(data)
    try:
        with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", workplace() / "datasets"):
            rows = load_rows(str(path))
            for problem in to_problems(rows, ProblemArguments(), has_chat_template=False):
                assert isinstance(problem["answer"], str)
    finally:
        shutil.rmtree(workplace() / "datasets", ignore_errors=True)


READERS = [
    Reader(
        "between_steps",
        resume,
        (RecipeError,),
        lambda: [between_steps()],
        (b"c__builtin__\neval\n", b"cos\nsystem\n", b"."),
    ),
    Reader(
        "rows",
        read_rows,
        (RecipeError,),
        lambda: [ROWS],
        (b'"prompt": ', b"[1]\n", b"\x00", b"{}\n"),
        found=(b"",),
        is_slow=True,
    ),
]

"""What a trainer held from step to step (resuming.py), the rows that it trains on (problems.py), and messages (rewards.py)."""

import io
import json
import shutil
import types
from functools import partial
from pathlib import Path
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
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


def parquet() -> bytes:
    """The same rows in Parquet."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in ROWS.splitlines()]), file, compression="none")
    return file.getvalue()


def read_rows(suffix: str, data: bytes) -> None:
    """The rows of a file become problems, or it is said why not."""
    path = workplace() / f"rows{suffix}"
    path.write_bytes(data)
    try:
        with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", workplace() / "datasets"):
            rows = load_rows(str(path))
            for problem in to_problems(rows, ProblemArguments(), has_chat_template=False):
                assert isinstance(problem["answer"], str) and isinstance(problem["prompt"], str | list)
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
        partial(read_rows, ".jsonl"),
        (RecipeError,),
        lambda: [ROWS],
        (b'"prompt": ', b"[1]\n", b"\x00", b"{}\n", b"\nnull"),
        found=(b"", b"null", b"\xefnull", b"\r null\n" + ROWS),
        is_slow=True,
    ),
    Reader(
        "parquet",
        partial(read_rows, ".parquet"),
        (RecipeError,),
        lambda: [parquet()],
        found=(b"", parquet().replace(b"2 + 2", b"\xb1 + 2")),
        is_slow=True,
    ),
]

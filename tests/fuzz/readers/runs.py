"""What a broken-off run left (answer_log.py, checkpoints.py, resuming.py), and the rows that one trains on (problems.py)."""

import io
import json
import shutil
import types
from pathlib import Path

import datasets
import torch
from fuzz.harness import Reader, workplace

from trl_recipes.answer_log import FILE, Answer, AnswerLog
from trl_recipes.arguments import ProblemArguments, RecipeError
from trl_recipes.checkpoints import MARKER, choose, complaint, read_marker
from trl_recipes.problems import load_rows, to_problems
from trl_recipes.resuming import ResumableMixin


SETTINGS = {"model": "a/b", "samples": 2}
LOG = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in (
        {"settings": SETTINGS},
        {"variant": "adapter", "decoding": "greedy", "problem": 0, "sample": 0, "completion": "#### 1"},
        {"variant": "base", "decoding": "samples", "problem": 1, "sample": 3, "completion": "\u2028 two"},
    )
)
MARKED = json.dumps(
    {"files": {"rng_state.pth": 4, "optimizer.pt": 4}, "settings": {"seed": 0}, "adapter": {"u": 1}}
).encode()
ROWS = b'{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "2 + 2 =", "answer": "#### 4"}\n'


def read_log(data: bytes) -> None:
    """Every answer is what its line says, and the file goes on from what was read."""
    folder = workplace() / "log"
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(data)
    log = None
    try:
        log = AnswerLog(folder, SETTINGS)
        said = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()[1:]]
        assert list(log.answers.values()) == list({Answer(**line).key: Answer(**line) for line in said}.values())
        assert all(isinstance(answer.completion, str) for answer in log.answers.values())
    finally:
        if log is not None:
            log.file.close()


def read_checkpoint(data: bytes) -> None:
    """Whether a checkpoint is whole is said, whatever its marker holds."""
    folder = workplace() / "run_of_checkpoints"
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in ("rng_state.pth", "optimizer.pt"):
        (checkpoint / name).write_bytes(b"1234")
    (checkpoint / MARKER).write_bytes(data)
    reason = complaint(checkpoint)
    found, _ = choose("true", folder)
    assert (found == checkpoint) == (reason is None)
    assert reason is None or len(reason.splitlines()) == 1
    if reason is None:
        assert set(read_marker(checkpoint)) >= {"files", "settings", "adapter"}


def between_steps() -> bytes:
    held = {
        "_tr_loss": torch.tensor(0.5),
        "order": {"torch": torch.get_rng_state()},
        "metrics": {"train": {"a": [1.0]}},
    }
    file = io.BytesIO()
    torch.save(held, file)
    return file.getvalue()


class Resumed(ResumableMixin):
    """As much of a trainer as `_restore_between_steps` asks for."""

    def __init__(self, folder: Path) -> None:
        self._resumes_from = folder
        self.args = types.SimpleNamespace(device=torch.device("cpu"), process_index=0, world_size=1)
        self._order = types.SimpleNamespace(restore=lambda state: None)
        self._metrics: dict[str, dict] = {"train": {}, "eval": {}}


def resume(data: bytes) -> None:
    trainer = Resumed(workplace())
    (workplace() / trainer._between_steps_file()).write_bytes(data)
    trainer._restore_between_steps()


def read_rows(data: bytes) -> None:
    """The rows of a JSONL file become problems, or it is said why not."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = workplace() / "datasets"
    path = workplace() / "rows.jsonl"
    path.write_bytes(data)
    try:
        rows = load_rows(str(path))
        for problem in to_problems(rows, ProblemArguments(), has_chat_template=False):
            assert isinstance(problem["answer"], str)
    finally:
        shutil.rmtree(workplace() / "datasets", ignore_errors=True)


READERS = [
    Reader(
        "answer_log",
        read_log,
        (RecipeError,),
        lambda: [LOG],
        (b'"problem": ', b'{"settings": 1}\n', b"[]\n", b"\xe2\x80\xa8"),
    ),
    Reader("checkpoint", read_checkpoint, (RecipeError,), lambda: [MARKED], (b'"files": ', b"rng_state", b"a" * 300)),
    Reader(
        "between_steps",
        resume,
        (RecipeError,),
        lambda: [between_steps()],
        (b"c__builtin__\neval\n", b"cos\nsystem\n", b"."),
    ),
    Reader(
        "rows", read_rows, (RecipeError,), lambda: [ROWS], (b'"prompt": ', b"[1]\n", b"\x00", b"{}\n"), is_slow=True
    ),
]

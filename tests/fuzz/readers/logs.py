"""What a broken-off evaluation or run left (answer_log.py, checkpoints.py)."""

import json

from fuzz.harness import Reader, workplace

from trl_recipes.answer_log import FILE, Answer, AnswerLog
from trl_recipes.checkpoints import MARKER, choose, complaint, read_marker
from trl_recipes.errors import RecipeError


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


READERS = [
    Reader(
        "answer_log",
        read_log,
        (RecipeError,),
        lambda: [LOG],
        (b'"problem": ', b'{"settings": 1}\n', b"[]\n", b"\xe2\x80\xa8"),
    ),
    Reader("checkpoint", read_checkpoint, (RecipeError,), lambda: [MARKED], (b'"files": ', b"rng_state", b"a" * 300)),
]

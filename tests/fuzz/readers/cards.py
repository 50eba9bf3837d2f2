"""A card (README.md, card.json; card.py, hub.py), and what is typed behind `peft-tinylora` (cli.py)."""

import contextlib
import io
import json
import os
import shutil
from unittest import mock

from fuzz.harness import Reader, workplace
from fuzz.readers.adapter import sound_files, written

from peft_tinylora import card, cli
from peft_tinylora.describe import describe
from peft_tinylora.errors import AdapterFileError, ConfigError
from peft_tinylora.hub import check_metadata


MEASURED = card.Evaluation("user/data", 10, {"greedy": 0.25}, {"greedy": 0.5}, split="test")


def folder_with_card():
    folder = written(sound_files("compact"))
    for name in ("README.md", card.FACTS_FILE):
        (folder / name).unlink(missing_ok=True)
    return folder


def sound_card() -> list[bytes]:
    """What somebody wrote, and README.md as a recipe writes it."""
    folder = folder_with_card()
    made = str(card.write_card(folder, describe(folder), "user/adapter", card.Facts(evaluation=MEASURED)))
    return [made.encode(), b"---\nbase_model: user/base\ntags: [a]\n---\n# Mine\n"]


def sound_facts() -> list[bytes]:
    sound_card()
    return [(folder_of_facts() / card.FACTS_FILE).read_bytes()]


def folder_of_facts():
    """An adapter's folder with a card that a recipe wrote."""
    folder = folder_with_card()
    card.write_card(folder, describe(folder), "user/adapter", card.Facts(evaluation=MEASURED))
    return folder


def read_card(data: bytes) -> None:
    """A measurement is added to anybody's card, and the card may be pushed, unless its metadata cannot be read."""
    folder = folder_with_card()
    readme = folder / "README.md"
    readme.write_bytes(data)
    text = data.decode("utf-8", errors="replace")
    with contextlib.suppress(ConfigError):
        check_metadata(text, readme)
    card.add_evaluation(folder, MEASURED)


def read_facts(data: bytes) -> None:
    """What was kept of a card makes one again, or counts for nothing."""
    folder = folder_of_facts()
    (folder / card.FACTS_FILE).write_bytes(data)
    adapter = describe(folder)
    facts = card.read_facts(folder, adapter)
    if facts is not None:
        assert str(card.make_card(adapter, "user/adapter", facts))
        assert isinstance(card.eval_result_files(facts), dict)


def run_command(data: bytes) -> None:
    """A command line ends with 0, 1 and one line, or 2 and argparse's; it opens no connection and writes where it was told."""
    arguments = data.decode("utf-8", errors="surrogateescape").split("\n")
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    here = workplace() / "here"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    os.chdir(here)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.dict(os.environ, {"PEFT_TINYLORA_CACHE": str(workplace() / "empty_cache")}),
            mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
            mock.patch("socket.socket.connect", side_effect=AssertionError("a connection was opened")),
        ):
            status = cli.main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
    assert status in (0, 1, 2)
    if status == 1 and err.getvalue():
        assert len(err.getvalue().strip().splitlines()) == 1 and err.getvalue().startswith("error: ")


def commands() -> list[bytes]:
    folder = str(workplace() / "compact")
    sound_files("compact")
    return ["\n".join(line).encode() for line in (
        ("inspect", folder), ("inspect", "user/adapter", "--revision", "main"), ("pull", "user/adapter", "target"),
        ("basis", "list"), ("basis", "verify"), ("basis", "clear", "user/base"), ("inspect", folder, "--subfolder", "a"),
        ("inline", folder, "--base", "user/base"), ("export", folder, "target", "--to", "portable", "--base", "nowhere"),
    )]  # fmt: skip


READERS = [
    Reader(
        "card",
        read_card,
        (AdapterFileError,),
        sound_card,
        (b"---\n", b"model-index:\n", b"- results: ", b"&a ", b"*a ", b"!!timestamp x"),
        is_slow=True,
    ),
    Reader(
        "facts",
        read_facts,
        (AdapterFileError,),
        sound_facts,
        (b'"after": ', b'"training": ', b'"more": [', json.dumps("x").encode()),
        is_slow=True,
    ),
    Reader(
        "command",
        run_command,
        (),
        commands,
        (b"\n", b"--help", b"--r", b"..", b"\x00", b"\n--to\n", b"%s"),
        is_slow=True,
    ),
]

"""Every completion of an evaluation on disk as it comes, so that one that was broken off goes on where it stopped.

The first line of the file holds the settings, each other one a completion:

    {"variant": "adapter", "decoding": "greedy", "problem": 3, "sample": 0, "completion": "..."}

Verdicts are not here: they are passed anew whenever the answers are summed up, by one version of the rules for all of them.
A line is written whole or, by a process that was killed, in part: what follows the last newline is cut off on opening.
"""

import fcntl
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from trl_recipes.errors import RecipeError, in_one_line, shown


FILE = "completions.jsonl"
BEGINNING = b'{"settings"'
MOST_NAMED = 2  # differing settings in a message


@dataclass(frozen=True)
class Answer:
    """One completion.

    Args:
        variant (`str`): which model, such as "adapter".
        decoding (`str`): "greedy", "sampled" or "samples".
        problem (`int`): index of the problem.
        sample (`int`): which of the problem's samples.
        completion (`str`): the text.
    """

    variant: str
    decoding: str
    problem: int
    sample: int
    completion: str

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What there is one answer for."""
        return self.variant, self.decoding, self.problem, self.sample


class AnswerLog:
    """
    The answers of one evaluation, in memory and, where it has a folder, on disk.

    Args:
        folder (`Path`, *optional*):
            Where the file is or shall be; without it nothing is written.
        settings (`dict`):
            All that the answers depend on, as JSON can hold it.

    Attributes:
        answers (`dict`): the answers so far, by [`Answer.key`].

    Raises:
        RecipeError: if the file is that of other settings, or no such file, or another process writes it.
    """

    def __init__(self, folder: Path | None, settings: dict[str, object]) -> None:
        self.answers: dict[tuple[str, str, int, int], Answer] = {}
        self.file: BinaryIO | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = file = (folder / FILE).open("a+b")
        except OSError as error:
            raise RecipeError(f"output_dir: cannot write {folder / FILE}: {error.strerror}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
        except BlockingIOError as error:
            raise RecipeError(
                f"{folder / FILE} is being written by another score.py: wait, or name another output_dir."
            ) from error
        except OSError:  # a file system without locks
            pass
        self._read(file, folder / FILE, settings)

    def _read(self, file: BinaryIO, path: Path, settings: dict[str, object]) -> None:
        """Reads what is there, or begins it."""
        file.seek(0)
        data = file.read()
        if not data.startswith(BEGINNING) and not BEGINNING.startswith(data):  # all of it, or torn
            raise RecipeError(f"{path} is no file of score.py: name another output_dir.")
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            file.truncate(0)
            write_lines(file, [json.dumps({"settings": settings})])
            return
        try:
            first, *others = map(json.loads, whole.splitlines())
            found = dict(first["settings"])
            answers = [_answer_of(fields) for fields in others]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RecipeError(
                f"{path} is no file of score.py ({in_one_line(error)}): name another output_dir."
            ) from error
        wanted = json.loads(json.dumps(settings))
        other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        if other:
            named = ", ".join(
                f"{in_one_line(name)}={shown(found.get(name))} there and {shown(wanted.get(name))} now"
                for name in other[:MOST_NAMED]
            )
            raise RecipeError(
                f"{path} holds answers of other settings ({named}): name another output_dir, or remove it."
            )
        file.truncate(len(whole))  # of a file that is one of these
        self.answers = {answer.key: answer for answer in answers}

    def add(self, answers: Iterable[Answer]) -> None:
        """Takes those that are not there yet."""
        new = [answer for answer in answers if answer.key not in self.answers]
        self.answers |= {answer.key: answer for answer in new}
        if self.file is not None and new:
            write_lines(self.file, [json.dumps(asdict(answer)) for answer in new])


def write_lines(file: BinaryIO, lines: list[str]) -> None:
    """Writes lines that are on their way to the disk when this returns."""
    file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
    file.flush()


def _answer_of(line: dict[str, Any]) -> Answer:
    """The answer in a line; raises [`TypeError`] where the line is none."""
    answer = Answer(**line)
    for field in fields(answer):
        if type(getattr(answer, field.name)) is not field.type:
            raise TypeError(f"{field.name} is of type {type(getattr(answer, field.name)).__name__}")
    return answer

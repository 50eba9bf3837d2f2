"""answer_log.py: what is on disk is there after any interruption, and never mixed with anything else."""

import json
import multiprocessing
from pathlib import Path

import pytest

from trl_recipes.answer_log import FILE, Answer, AnswerLog
from trl_recipes.arguments import RecipeError


SETTINGS = {"model": "a/b", "samples": 2, "problems_sha256": "0" * 16}
SOME = [Answer("adapter", "greedy", n, 0, f"ü\u2028\n{n}\ud800") for n in range(5)]


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, SETTINGS)
    log.add(SOME[:3])
    log.file.close()
    again = AnswerLog(tmp_path, SETTINGS)
    assert list(again.answers.values()) == SOME[:3]
    again.add(SOME)
    again.file.close()
    assert list(AnswerLog(tmp_path, SETTINGS).answers.values()) == SOME
    assert len((tmp_path / FILE).read_text().splitlines()) == 6


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_an_answer_less(tmp_path: Path, cut: int) -> None:
    log = AnswerLog(tmp_path, SETTINGS)
    log.add(SOME)
    log.file.close()
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    again = AnswerLog(tmp_path, SETTINGS)
    assert list(again.answers.values()) == SOME[:4]
    again.add(SOME)
    again.file.close()
    assert list(AnswerLog(tmp_path, SETTINGS).answers.values()) == SOME


def test_a_torn_first_line_is_a_new_file(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"settings": {"mod')
    assert AnswerLog(tmp_path, SETTINGS).answers == {}
    assert json.loads((tmp_path / FILE).read_text()) == {"settings": SETTINGS}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    AnswerLog(tmp_path, SETTINGS).file.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(RecipeError, match=r"samples=2 there and 4 now\): name another output_dir"):
        AnswerLog(tmp_path, SETTINGS | {"samples": 4})
    with pytest.raises(RecipeError, match="top_p=None there and 0.9 now"):
        AnswerLog(tmp_path, SETTINGS | {"top_p": 0.9})
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "no JSON\n",
        "[1]\n",
        "a text without an end of line",
        "\x00",
        '{"settings": {}}\n{"a": 1}\n',
        '{"other": 1}\n',
        "{}\n\n",
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(RecipeError, match="name another output_dir"):
        AnswerLog(tmp_path, {})
    assert (tmp_path / FILE).read_text() == content


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="output_dir: cannot write"):
        AnswerLog(tmp_path / "file" / "below", SETTINGS)


def refused(folder: Path, answer: multiprocessing.Queue) -> None:
    try:
        AnswerLog(folder, SETTINGS)
        answer.put(None)
    except RecipeError as error:
        answer.put(str(error))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, SETTINGS)
    log.add(SOME[:1])
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    other = context.Process(target=refused, args=(tmp_path, answer))
    other.start()
    assert "another score.py" in answer.get(timeout=60)
    other.join()
    log.file.close()
    assert list(AnswerLog(tmp_path, SETTINGS).answers.values()) == SOME[:1]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = AnswerLog(None, SETTINGS)
    log.add(SOME)
    assert len(log.answers) == 5 and not list(tmp_path.iterdir())

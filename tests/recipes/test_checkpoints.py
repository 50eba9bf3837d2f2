"""checkpoints.py: folders made by hand, and what may be taken for a checkpoint."""

import json
import os
from pathlib import Path

import pytest

from trl_recipes.arguments import RecipeError
from trl_recipes.checkpoints import (
    MARKER,
    UNFINISHED,
    checkpoints_in,
    choose,
    complaint,
    differences,
    publish,
    rotate,
    tidy,
)


def written(folder: Path, step: int, text: str = "numbers") -> Path:
    """A checkpoint that was written, not moved yet."""
    unfinished = folder / UNFINISHED / f"checkpoint-{step}"
    (unfinished / "shards").mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "shards/0.pt"):
        (unfinished / name).write_text(text)
    return unfinished


def published(folder: Path, step: int, text: str = "numbers") -> Path:
    place = folder / f"checkpoint-{step}"
    publish(written(folder, step, text), place, {"settings": {"seed": 1}, "adapter": {}})
    return place


def test_what_was_written_appears_whole_and_in_place_of_what_was_there(tmp_path):
    place = published(tmp_path, 7)
    assert complaint(place) is None
    assert json.loads((place / MARKER).read_text())["files"] == {
        **{"trainer_state.json": 7, "optimizer.pt": 7, "rng_state.pth": 7, "shards/0.pt": 7}
    }
    published(tmp_path, 7, "others")
    assert (place / "shards" / "0.pt").read_text() == "others" and complaint(place) is None
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {UNFINISHED, "checkpoint-7", "shards"}


def test_the_newest_whole_one_is_taken_and_those_that_are_torn_are_named(tmp_path):
    for step in (9, 10, 11, 12):
        published(tmp_path, step)
    (tmp_path / "checkpoint-12" / MARKER).unlink()
    (tmp_path / "checkpoint-11" / "shards" / "0.pt").write_text("num")
    for name in ("checkpoint-13", "checkpoint-best", "checkpoint-14.bak"):
        (tmp_path / name).mkdir()
    found, lines = choose("true", tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert len(lines) == 3
    assert "checkpoint-13: it was cut short" in lines[0] and f"no {MARKER}" in lines[1]
    assert "checkpoint-11: it was cut short: shards/0.pt has 3 bytes instead of 7" in lines[2]
    assert choose(True, tmp_path)[0] == found
    for no in (None, False, "false"):
        assert choose(no, tmp_path) == (None, [])


def test_without_a_checkpoint_a_run_starts_from_the_beginning_and_says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "not there yet"):
        found, [line] = choose("true", folder)
        assert found is None and "starting from the beginning" in line and str(folder) in line


def no_folder(checkpoint: Path) -> str:
    os.rename(checkpoint, checkpoint.with_name("elsewhere"))
    return "there is no such folder"


def no_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).unlink()
    return f"no {MARKER}"


def cut_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).write_text('{"files": {')
    return f"its {MARKER} cannot be read"


def another_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).write_text("[]")
    return f"its {MARKER} cannot be read"


def binary_marker(checkpoint: Path) -> str:
    (checkpoint / MARKER).write_bytes(b"\xff\xfe\x00")
    return f"its {MARKER} cannot be read"


def lost_file(checkpoint: Path) -> str:
    (checkpoint / "optimizer.pt").unlink()
    return "optimizer.pt is missing"


def short_file(checkpoint: Path) -> str:
    os.truncate(checkpoint / "optimizer.pt", 3)
    return "optimizer.pt has 3 bytes instead of 7"


def no_optimizer(checkpoint: Path) -> str:
    marker = json.loads((checkpoint / MARKER).read_text())
    del marker["files"]["rng_state.pth"]
    (checkpoint / MARKER).write_text(json.dumps(marker))
    return "save_only_model"


@pytest.mark.parametrize(
    "damage",
    [no_folder, no_marker, cut_marker, another_marker, binary_marker, lost_file, short_file, no_optimizer],
    ids=lambda damage: damage.__name__,
)
def test_a_named_folder_that_is_no_whole_checkpoint_is_refused_by_name(tmp_path, damage):
    checkpoint = published(tmp_path, 3)
    assert choose(str(checkpoint), tmp_path / "another run")[0] == checkpoint
    reason = damage(checkpoint)
    with pytest.raises(RecipeError) as error:
        choose(str(checkpoint), tmp_path)
    assert str(checkpoint) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_the_folder_of_a_run_is_not_taken_for_a_checkpoint_and_the_newest_in_it_is_named(tmp_path):
    published(tmp_path, 2)
    published(tmp_path, 10)
    with pytest.raises(RecipeError, match="name one of them .*checkpoint-10"):
        choose(str(tmp_path), tmp_path)


def test_those_written_first_are_deleted_and_the_newest_and_the_best_never(tmp_path):
    places = [published(tmp_path, step) for step in (20, 5, 6, 7)]  # went on from further back than 20
    for age, place in enumerate(places):
        os.utime(place, ns=(age, age))
    rotate(tmp_path, None, {places[-1]})
    rotate(tmp_path, 0, {places[-1]})
    assert len(checkpoints_in(tmp_path)) == 4
    rotate(tmp_path, 3, {places[-1]})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
    rotate(tmp_path, 1, {places[-1], places[1]})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-7"]
    assert list((tmp_path / UNFINISHED).iterdir()) == []


def test_what_a_killed_run_left_goes_and_what_only_lacked_its_place_gets_it(tmp_path):
    whole = published(tmp_path, 4)
    os.rename(whole, tmp_path / UNFINISHED / "checkpoint-4")  # killed between the two renames of `publish`
    written(tmp_path, 5)  # killed before its last file
    (tmp_path / ".saving").mkdir()
    (tmp_path / UNFINISHED / "old-checkpoint-4").mkdir()
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"] and complaint(whole) is None
    tidy(tmp_path / "not there yet")


def test_differences_are_of_what_both_say_and_few_are_named():
    assert differences({"u": 1, "r": 2, "new": 3}, {"u": 2, "r": 2}) == "u=1 there and 2 here"
    assert differences({"u": 1}, {"r": 2}) is None
    assert differences(dict(zip("abcde", range(5), strict=True)), dict.fromkeys("abcde", 9)).endswith(", and 2 more")

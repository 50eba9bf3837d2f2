"""Checkpoint folders that are there whole or not at all, and which of them a run may go on from.

A checkpoint is written under `UNFINISHED`, a name that nobody takes for a checkpoint, synced to disk, described by
`MARKER`, its last file, and moved to its place by one rename. It goes the same way: renamed first, deleted then. So a
`checkpoint-N` is whole at any moment, whenever the process is killed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_recipes.errors import RecipeError, in_one_line, shown


MARKER = "checkpoint.json"  # {"files": {name: bytes}, "settings": {...}, "adapter": {...}}
UNFINISHED = ".unfinished"  # of a run's folder: where checkpoints are written, and where they are deleted
NAME = re.compile(r"checkpoint-(\d+)")
MOST_NAMED = 3  # differences in a message
MOST_CHARACTERS = 200  # of a file's name


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a `checkpoint-N` was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders in a run's folder, by step."""
    found = [path for path in Path(folder).glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def publish(unfinished: Path, place: Path, run: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Moves a checkpoint that was written to its place, where it appears whole; one that is there makes way.

    Args:
        unfinished (`Path`):
            The folder that was written, on the file system of `place`.
        place (`Path`):
            Its `checkpoint-N`.
        run (`dict[str, dict]`):
            "settings" and "adapter" of the run, JSON values.
    """
    files = {
        path.relative_to(unfinished).as_posix(): path.stat().st_size
        for path in sorted(unfinished.rglob("*"))
        if path.is_file()
    }
    for name in files:
        _sync(unfinished / name)
    marker = unfinished / MARKER
    marker.write_text(json.dumps({"files": files, **run}, indent=2) + "\n", encoding="utf-8")
    _sync(marker)
    for folder in (*(path for path in unfinished.rglob("*") if path.is_dir()), unfinished):
        _sync(folder)
    old = unfinished.with_name(f"old-{place.name}")
    if place.exists():
        os.replace(place, old)  # a kill between this and the next line is mended by `tidy`
    os.replace(unfinished, place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: set[Path]) -> None:
    """
    Deletes checkpoints until `limit` are left, those written first before others; each disappears at once.

    Args:
        folder (`Path`):
            The run's.
        limit (`int`, *optional*):
            `save_total_limit`; `None` and 0: no limit.
        keep (`set[Path]`):
            Those that stay in any case: the newest, without which a run that is killed now starts anew, and the best.
    """
    checkpoints = checkpoints_in(folder)
    # As transformers does; a step may have been written before a smaller one, by a run that went on from further back.
    oldest_first = sorted(checkpoints, key=lambda path: (path.stat().st_mtime_ns, step_of(path)))
    surplus = len(checkpoints) - limit if limit else 0
    for checkpoint in [path for path in oldest_first if path not in keep][: max(surplus, 0)]:
        doomed = folder / UNFINISHED / f"old-{checkpoint.name}"
        doomed.parent.mkdir(exist_ok=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Removes what a killed run left half-written; what was whole and only lacked its last rename gets its place."""
    for path in checkpoints_in(folder / UNFINISHED):
        if complaint(path) is None and not (folder / path.name).exists():
            os.replace(path, folder / path.name)
    for name in (UNFINISHED, ".saving"):  # the second is that of `save_adapter`
        shutil.rmtree(folder / name, ignore_errors=True)


def complaint(checkpoint: Path) -> str | None:
    """Says why a run cannot go on from a folder, or `None` if it is a whole checkpoint."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        marker = read_marker(checkpoint)
    except FileNotFoundError:
        inside = checkpoints_in(checkpoint)
        if inside:
            return f"it is no checkpoint, but holds some: name one of them ({inside[-1]})"
        return f"it was cut short, or these recipes did not write it (no {MARKER})"
    except (OSError, ValueError) as error:
        return f"its {MARKER} cannot be read ({in_one_line(error)})"
    for name, size in marker["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"it was cut short: {name} is missing"
        if path.stat().st_size != size:
            return f"it was cut short: {name} has {path.stat().st_size} bytes instead of {size}"
    if not any(name.startswith("rng_state") for name in marker["files"]):
        return "it was written with save_only_model, and lacks the optimizer's state"
    return None


def read_marker(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Reads `MARKER`. Raises `ValueError` if it is not what `publish` writes."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(marker, dict) or not all(
        isinstance(marker.get(key), dict) for key in ("files", "settings", "adapter")
    ):
        raise ValueError("not a description of a checkpoint")
    for name, size in marker["files"].items():
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if type(size) is not int or not (name.isprintable() and len(name) <= MOST_CHARACTERS and is_inside):
            raise ValueError(f"{name[:MOST_CHARACTERS]!r} is no file of a checkpoint with its size")
    return marker


def choose(wanted: str | bool | None, folder: Path) -> tuple[Path | None, list[str]]:
    """
    Finds the checkpoint that `resume_from_checkpoint` means.

    Args:
        wanted (`str` or `bool`, *optional*):
            "true" for the newest whole one, "false" or None for none, or a folder.
        folder (`Path`):
            The run's, whose newest checkpoint is meant.

    Returns:
        The checkpoint, `None` to start from the beginning; and lines to say: which are passed over and why.

    Raises:
        RecipeError: if a folder is named that is no whole checkpoint.
    """
    if wanted is None or str(wanted).lower() == "false":
        return None, []
    if str(wanted).lower() != "true":
        checkpoint = Path(str(wanted))
        reason = complaint(checkpoint)
        if reason is not None:
            raise RecipeError(f"resume_from_checkpoint={str(wanted)!r}: {reason}.")
        return checkpoint, []
    lines: list[str] = []
    for checkpoint in reversed(checkpoints_in(folder)):
        reason = complaint(checkpoint)
        if reason is None:
            return checkpoint, lines
        lines.append(f"passed over {checkpoint}: {reason}")
    return None, [*lines, f"no checkpoint in {folder} to resume from: starting from the beginning"]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Says in which of the names that both have two mappings differ, or `None`: "u=1 there and 2 here"."""
    names = sorted(name for name in there.keys() & here.keys() if there[name] != here[name])
    if not names:
        return None
    named = ", ".join(f"{name}={shown(there[name])} there and {shown(here[name])} here" for name in names[:MOST_NAMED])
    return named + (f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if os.name == "nt":  # has no such call for folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

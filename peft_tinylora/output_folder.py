"""A folder that gets all of its new files, or none of them, whatever happens on the way."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AdapterFileError


@contextmanager
def written_at_once(target: str | Path) -> Iterator[Path]:
    """A folder to write to, the files of which move into `target` when all are there.

    Args:
        target (`str` or `Path`): made if there is none; what is in it stays.

    Raises:
        AdapterFileError: if `target` has a file of one of the names; it is as it was before.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    moved: list[Path] = []
    try:
        yield partial
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for file in files:
            if (target / file.relative_to(partial)).exists():
                raise AdapterFileError(
                    f"{target} has a file {file.relative_to(partial)} already: name another folder, or remove it first."
                )
        for file in files:
            path = target / file.relative_to(partial)
            path.parent.mkdir(parents=True, exist_ok=True)
            file.replace(path)
            moved.append(path)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""A folder that gets all of its new files, or none of them, whatever happens on the way."""

import glob
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import AdapterFileError
from .trouble import disk_trouble_named, remove_stale


@contextmanager
def written_at_once(target: str | Path) -> Iterator[Path]:
    """A folder to write to, the files of which move into `target` when all are there.

    A folder that is new appears by one rename. In one that was there the weights come last: a process that is killed
    between two files leaves no adapter and no model, but a folder that is refused until those files are removed.

    Args:
        target (`str` or `Path`): made if there is none; what is in it stays.

    Raises:
        AdapterFileError: if `target` has a file of one of the names; it is as it was before.
        DiskError: if the disk is full or read-only; `target` is as it was before.
    """
    target = Path(target).resolve()
    prefix = f".{target.name}.tinylora-"
    with disk_trouble_named(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path for path in target.parent.glob(f"{glob.escape(prefix)}????????") if path.is_dir())
        within = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    partial = within / target.name
    moved: list[Path] = []
    try:
        with disk_trouble_named(target.parent):
            partial.mkdir()  # with the permissions of any new folder, which those of `mkdtemp` are not
            yield partial
            if not target.exists():
                partial.rename(target)
                return
            files = sorted(
                (path for path in partial.rglob("*") if path.is_file()),
                key=lambda path: (path.suffix == ".safetensors", path),
            )
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
        shutil.rmtree(within, ignore_errors=True)

"""What a machine lacks, said in one line: room on a disk that is full or read-only, memory. And what killed processes left."""

import errno
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import DiskError, TinyLoraError


FULL = (errno.ENOSPC, errno.EDQUOT)
STALE_SECONDS = 3600  # what was half-written for longer was left by a killed process
SAID_BY_RUST = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers, which raise errors of their own
SAID_BY_TORCH = re.compile(
    r"PytorchStreamWriter failed|unexpected pos|iostream error"
)  # torch.save, when a write fails
SAID_BY_CPU = "can't allocate memory"  # torch's allocator for the CPU, by a RuntimeError


def disk_trouble(error: BaseException, folder: str | Path) -> str | None:
    """What is wrong with the disk and what to do, without a full stop; `None` where that is not what an error says.

    Args:
        error (`BaseException`): from writing; those that it came from are looked at too.
        folder (`str` or `Path`): where was written, for errors that do not say it.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = _number_of(cause)
        named = getattr(cause, "filename2", None) or getattr(cause, "filename", None)  # of a copy: where to
        where = Path(named).parent if isinstance(named, str) and Path(named).is_absolute() else Path(folder)
        if number in FULL:
            return f"no space left on the disk of {where}: free some there, or name a folder on another disk"
        if number == errno.EROFS:
            return f"the disk of {where} is read-only: make it writable, or name a folder on another disk"
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def disk_trouble_named(folder: str | Path) -> Iterator[None]:
    """Turns the error of a full or read-only disk, from writing to a folder, into a [`DiskError`]."""
    try:
        yield
    except TinyLoraError:  # says what to do already
        raise
    except Exception as error:
        trouble = disk_trouble(error, folder)
        if trouble is None:
            raise
        raise DiskError(f"{trouble}.") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, of a GPU or of the machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    by_cpu = isinstance(error, RuntimeError) and SAID_BY_CPU in str(error)
    return by_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def remove_stale(paths: Iterable[Path]) -> None:
    """Removes what nobody has written to for an hour: files, and folders with all that is in them."""
    for path in paths:
        with suppress(OSError):  # removed by another process in the meantime
            newest = max(inside.stat().st_mtime for inside in (path, *path.rglob("*")))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _number_of(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := SAID_BY_RUST.search(str(error)):
        return int(found[1])
    return errno.ENOSPC if isinstance(error, RuntimeError) and SAID_BY_TORCH.search(str(error)) else None

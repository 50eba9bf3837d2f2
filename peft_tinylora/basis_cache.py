"""Factors kept on disk, one safetensors file for a base model and settings; nothing in it is believed unchecked.

    $HF_HOME/peft_tinylora/basis/            PEFT_TINYLORA_CACHE names another folder, `off` switches the cache off
        Qwen--Qwen2.5-7B-Instruct/           the base model; a local folder's name and a hash of its path
            r2-float-3fa9c1d2e4b5c6d7.safetensors        rank, form of the weights, hash of modules and shapes

In a file, for each adapted module NAME: `NAME.A` (r, in), `NAME.B` (out, r), singular values on the left, and
`NAME.angle`, the certificate. Its metadata holds a SHA-256 of all its other bytes. A file is written beside its place and
moved there, so that readers see all of it or the one before, however many processes write. Above the size limit (2 GB;
PEFT_TINYLORA_CACHE_GB) the files that were not used for longest are removed, and a warning names them.

What this file does not check: whether the factors are those of the weights at hand. build.py does, for every hit.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import safetensors
import safetensors.torch
import torch

from .basis import Basis
from .errors import ConfigError
from .trouble import disk_trouble, remove_stale


logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".safetensors"
MOST_GB = 2.0
NO_DIGEST = b"0" * 64
DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')


class Entry(NamedTuple):
    """A file of the cache.

    Args:
        path (`Path`): where it is.
        size_bytes (`int`): of the file.
        used (`float`): when it was last read or written, seconds since the epoch.
        metadata (`dict[str, str]`): base, weights, r, modules; empty for a file that is damaged.
    """

    path: Path
    size_bytes: int
    used: float
    metadata: dict[str, str]


def cache_folder() -> Path | None:
    """The folder of the cache, or `None` where it is switched off."""
    named = os.environ.get("PEFT_TINYLORA_CACHE")
    if named == "off":
        return None
    return Path(named) if named else Path(huggingface_hub.constants.HF_HOME) / "peft_tinylora" / "basis"


def size_limit_bytes() -> int:
    """The most that all files together may take.

    Raises:
        ConfigError: if PEFT_TINYLORA_CACHE_GB is no positive number.
    """
    named = os.environ.get("PEFT_TINYLORA_CACHE_GB", str(MOST_GB))
    try:
        limit = float(named)
    except ValueError:
        limit = -1.0
    if not 0 < limit < float("inf"):
        raise ConfigError(f"PEFT_TINYLORA_CACHE_GB={named!r}: must be a positive number of gigabytes.")
    return int(limit * 1e9)


def file_name(weights: str, canonical: bool, modules: Iterable[tuple[str, tuple[int, ...], int]]) -> str:
    """The name of a basis file, the same on every machine.

    Args:
        weights (`str`): the form of the weights, "float" or such as "bnb 4bit nf4".
        canonical (`bool`): as in [`compute_basis`].
        modules: (name, shape of W, r) of each, in any order.
    """
    modules = sorted(modules)
    digest = hashlib.sha256(json.dumps([FORMAT, weights, canonical, modules]).encode()).hexdigest()[:16]
    r = max((r for _, _, r in modules), default=0)
    return f"r{r}-{_slug(weights)}-{digest}{SUFFIX}"


def place(base: str, name: str) -> Path | None:
    """Where the basis of a base model is kept; `None` for a model without a name, or without a cache.

    Args:
        base (`str`): id or folder of the base model. A model that was built in memory has none, and would not be
            recognised again.
        name (`str`): from [`file_name`].
    """
    folder = cache_folder()
    return folder / base_folder(base) / name if folder is not None and base else None


def find(base: str, r: int, weights: str) -> list[Path]:
    """The files that are kept of a base model for a rank and form of weights, by name alone; of any set of modules."""
    folder = cache_folder()
    if folder is None or not base:
        return []
    return sorted((folder / base_folder(base)).glob(f"r{r}-{_slug(weights)}-*{SUFFIX}"))


def base_folder(base: str) -> str:
    """The name of the folder of a base model: its id, or the name of its local folder with a hash of the path."""
    if not os.path.isdir(base):
        return _slug(base.replace("/", "--"))
    path = os.path.realpath(base)
    return f"{_slug(os.path.basename(path))}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "model"


def read(path: Path) -> dict[str, Basis]:
    """The factors in a file, singular values on the left.

    Returns:
        `dict[str, Basis]`: by module; empty, with a warning, where the file is damaged, and without where there is none.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return {}
    if _checked_metadata(data) is None:
        logger.warning("the basis cache file %s is damaged and is not used; it will be written anew.", path)
        return {}
    with suppress(OSError):  # a cache that is shared read-only
        os.utime(path)  # says when it was last used
    try:
        return _to_bases(safetensors.torch.load(data))
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError):
        logger.warning("%s is no basis file, for all that its checksum is right, and is not used.", path)
        return {}


def _to_bases(tensors: Mapping[str, torch.Tensor]) -> dict[str, Basis]:
    names = [key.removesuffix(".angle") for key in tensors if key.endswith(".angle")]
    if any(tensor.dtype not in (torch.float32, torch.float64) for tensor in tensors.values()):  # none is written so
        raise TypeError("factors are in float32 or better")
    return {name: Basis(tensors[f"{name}.A"], tensors[f"{name}.B"], tensors[f"{name}.angle"].item()) for name in names}


def write(path: Path, bases: Mapping[str, Basis], base: str, weights: str) -> None:
    """Write a file, all of it or nothing, and make room for it. Where that fails, warns: a cache is not needed.

    Args:
        path (`Path`): from [`place`].
        bases (`Mapping[str, Basis]`): by module, singular values on the left.
        base (`str`): id or folder of the base model, for people.
        weights (`str`): the form of the weights, for people.
    """
    tensors = {}
    for name, basis in bases.items():
        tensors[f"{name}.A"] = basis.A.cpu().contiguous()
        tensors[f"{name}.B"] = basis.B.cpu().contiguous()
        tensors[f"{name}.angle"] = torch.tensor(basis.angle, dtype=torch.float32)
    r = max(basis.A.shape[-2] for basis in bases.values())
    # Of a local folder the name alone: the file may be pushed.
    base = os.path.basename(os.path.realpath(base)) if os.path.isdir(base) else base
    metadata = {"format": "pt", "base": base, "weights": weights, "r": str(r), "modules": str(len(bases))}
    data = signed(safetensors.torch.save(tensors, {**metadata, "sha256": NO_DIGEST.decode()}))
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
        os.replace(temporary, path)
        _make_room(keep=path)
    except OSError as error:
        reason = disk_trouble(error, path.parent) or error
        logger.warning("the basis could not be kept in %s (%s); it will be computed again.", path, reason)
        if temporary is not None:
            with suppress(OSError):  # a disk that became read-only meanwhile keeps it
                temporary.unlink(missing_ok=True)


def signed(data: bytes) -> bytes:
    """The bytes of a file with zeros for its SHA-256 -> with the SHA-256 of those bytes in their place."""
    digest = hashlib.sha256(data).hexdigest().encode()
    return data.replace(b'"sha256":"' + NO_DIGEST, b'"sha256":"' + digest, 1)


def is_sound(path: Path) -> bool:
    """Whether a file holds what was written, to the last byte."""
    try:
        return _checked_metadata(path.read_bytes()) is not None
    except OSError:
        return False


def entries() -> list[Entry]:
    """All files of the cache, the last used first."""
    found = []
    for path, status in _statuses(_files()).items():
        with suppress(OSError):
            metadata = _checked_metadata(path.read_bytes()) or {}
            found.append(Entry(path, status.st_size, status.st_mtime, metadata))
    return sorted(found, key=lambda entry: -entry.used)


def clear(base: str | None = None) -> list[Path]:
    """Remove the files of a base model, or all. Returns which they were."""
    folder = cache_folder()
    if folder is None or not folder.is_dir():
        return []
    wanted = folder if base is None else folder / base_folder(base)
    removed = [path for path in _files() if wanted in path.parents]
    shutil.rmtree(wanted, ignore_errors=True)
    return removed


def _files() -> Iterator[Path]:
    folder = cache_folder()
    if folder is not None and folder.is_dir():
        yield from sorted(folder.glob(f"*/*{SUFFIX}"))


def _make_room(keep: Path) -> None:
    remove_stale(keep.parent.parent.glob("*/.writing-*"))
    limit = size_limit_bytes()
    sizes = _statuses(_files())
    total = sum(status.st_size for status in sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path].st_mtime):
        if total <= limit:
            return
        if path != keep:
            path.unlink(missing_ok=True)
            total -= sizes[path].st_size
            logger.warning(
                "removed %s from the basis cache to stay under %.3g GB; PEFT_TINYLORA_CACHE_GB sets another limit.",
                path,
                limit / 1e9,
            )


def _statuses(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    statuses = {}
    for path in paths:
        with suppress(OSError):  # removed by another process in the meantime
            statuses[path] = path.stat()
    return statuses


def _checked_metadata(data: bytes) -> dict[str, str] | None:
    """The metadata of a file's bytes, or `None` where they are not what was written."""
    found = DIGEST.search(data)
    if found is None:
        return None
    blank = data[: found.start(1)] + NO_DIGEST + data[found.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != found.group(1):
        return None
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None  # not one of ours
    is_of_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    return metadata if is_of_text else None

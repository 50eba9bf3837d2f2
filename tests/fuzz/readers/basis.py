"""Files of factors (basis_cache.py, published ones too), and the index of a base model's checkpoint (original.py)."""

import functools
import os
from pathlib import Path
from unittest import mock

import torch
from fuzz.harness import Reader, workplace
from fuzz.readers.adapter import make_base

from peft_tinylora import TinyLoraConfig, basis_cache, cli
from peft_tinylora.assignment import requests_of
from peft_tinylora.basis import residual
from peft_tinylora.build import KEPT_TOLERANCE, Request, build_bases, verified
from peft_tinylora.errors import BasisError
from peft_tinylora.original import OriginalWeights


@functools.cache
def requests() -> list[Request]:
    return requests_of(make_base(), TinyLoraConfig(r=2, tie="none", target_modules="all-linear"))[0]


@functools.cache
def sound_file() -> bytes:
    """A file of the cache, as it is written."""
    found, source = requests_of(make_base(), TinyLoraConfig(r=2, tie="none", target_modules="all-linear"))
    path = workplace() / "written" / "base" / "r2-float.safetensors"
    basis_cache.write(path, build_bases(found, source, sigma="left", canonical=True), "user/base", "float")
    return path.read_bytes()


def unsigned() -> bytes:
    """The same with zeros for its SHA-256, which whoever publishes a file computes as he likes."""
    found = basis_cache.DIGEST.search(sound_file())
    return sound_file().replace(found.group(1), basis_cache.NO_DIGEST)


def read_kept(data: bytes) -> None:
    """What a file has is used where it is of the weights, and never an error; the commands list it."""
    folder = workplace() / "cache"
    path = folder / "base" / "r2-float.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    kept = basis_cache.read(path)
    assert basis_cache.is_sound(path) or not kept
    for request in requests():
        W = request.read()
        basis = verified(kept.get(request.key), W, request)
        if basis is not None:
            assert basis.A.dtype == basis.B.dtype == torch.float32 and residual(W, basis.A, basis.B) <= KEPT_TOLERANCE
    with mock.patch.dict(os.environ, {"PEFT_TINYLORA_CACHE": str(folder)}):
        assert len(basis_cache.entries()) == 1
        assert cli.main(["basis", "list"]) == 0
        assert cli.main(["basis", "verify"]) in (0, 1)


def read_published(data: bytes) -> None:
    read_kept(basis_cache.signed(data))


def read_index(data: bytes) -> None:
    """Nothing but files of the checkpoint's own folder is opened."""
    folder = workplace() / "sharded"
    (folder / "inside").mkdir(parents=True, exist_ok=True)
    (workplace() / "secret.safetensors").write_bytes(b"not to be opened")
    (folder / "model.safetensors.index.json").write_bytes(data)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(b"\0" * 16)
    base = make_base()
    base.name_or_path = str(folder)
    for path in OriginalWeights(base)._file_of.values():
        assert Path(os.path.abspath(path)).is_relative_to(folder), path


INDEX = b'{"metadata": {}, "weight_map": {"model.x.weight": "a.safetensors", "model.y.weight": "b.safetensors"}}'

READERS = [
    Reader("basis_file", read_kept, (), lambda: [sound_file()], (b'"__metadata__":[]', b'"sha256":"'), is_slow=True),
    Reader(
        "basis_published",
        read_published,
        (),
        lambda: [unsigned()],
        (b'"__metadata__":[]', b'"dtype":"F4"', b'"dtype":"C64"', b'"dtype":"I64"', b'"shape":[]', b"\x7f\xc0\0\0"),
        is_slow=True,
    ),
    Reader(
        "checkpoint_index",
        read_index,
        (BasisError,),
        lambda: [INDEX],
        (b"../secret.safetensors", b"inside"),
        is_slow=True,
    ),
]

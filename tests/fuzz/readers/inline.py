"""Adapters in a request (inline.py, served.py), and what the owner of a server lets in (vllm/settings.py)."""

import base64
import functools
import hashlib
import struct

from fuzz.harness import Reader, workplace
from fuzz.readers.adapter import make_base, sound_model

from peft_tinylora import inline_adapter
from peft_tinylora.errors import AdapterFileError, BasisMismatchError, ConfigError
from peft_tinylora.inline import CHECKSUM_BYTES, HEAD, PREFIX, VERSION, InlineAdapter, parse_inline
from peft_tinylora.served import ServedBase
from peft_tinylora.vllm.settings import INLINE, VARIABLE, read_settings


MOST = 65536  # characters, what a server takes unless its owner says otherwise


@functools.cache
def sound_text() -> str:
    return inline_adapter(sound_model()).text()


def body_of(text: str) -> bytes:
    """The bytes of a text, without the checksum."""
    encoded = text.partition(".")[2]
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[:-CHECKSUM_BYTES]


def text_of(body: bytes) -> str:
    """The text of some bytes, with the checksum that they have: anybody can compute it."""
    data = body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]
    return f"{PREFIX}{VERSION}.{base64.urlsafe_b64encode(data).decode().rstrip('=')}"


def says(adapter: InlineAdapter, body: bytes) -> None:
    """Fails unless an adapter is what the bytes say, read by the table in inline.py's docstring alone."""
    r, flags, u, rows, modules, seed, digest = HEAD.unpack_from(body)
    groups = struct.unpack_from(f"<{modules}H", body, HEAD.size)
    width = 2 if flags & 1 else 4
    v = body[len(body) - rows * u * width :]
    assert (adapter.r, adapter.u, adapter.projection_seed, adapter.digest) == (r, u, seed, digest.hex())
    assert adapter.groups == tuple(group - 1 if group else None for group in groups)
    assert adapter.v.shape == (rows, u) and bytes(adapter.v.flatten().untyped_storage()) == v
    assert adapter.v.isfinite().all() and adapter.sketches.isfinite().all()
    assert (adapter.sigma, adapter.from_paper) == ("split" if flags & 2 else "left", not flags & 4)
    assert adapter.text() == text_of(body)


def read_text(data: bytes) -> None:
    text = data.decode("utf-8", errors="surrogateescape")
    adapter = parse_inline(text, MOST)
    says(adapter, body_of(text))


def read_body(data: bytes) -> None:
    says(parse_inline(text_of(data), MOST), data)


@functools.cache
def served_base() -> ServedBase:
    make_base().save_pretrained(workplace() / "base")
    return ServedBase(str(workplace() / "base"), 2)


def serve(data: bytes) -> None:
    tensors = served_base().lora(parse_inline(text_of(data), MOST))
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def allow(data: bytes) -> None:
    values = data.decode("utf-8", errors="surrogateescape").split("\n")
    names = ("", "_RANK", "_CHARACTERS", "_RATE")
    read_settings({f"{VARIABLE}{name}": value for name, value in zip(names, values, strict=False)})


READERS = [
    Reader(
        "inline_text", read_text, (AdapterFileError,), lambda: [sound_text().encode()], (b"tinylora:", b"1.", b"=")
    ),
    Reader("inline_body", read_body, (AdapterFileError,), lambda: [body_of(sound_text())]),
    Reader("served", serve, (AdapterFileError, BasisMismatchError), lambda: [body_of(sound_text())], is_slow=True),
    Reader(
        "vllm_settings",
        allow,
        (ConfigError,),
        lambda: [f"{INLINE},user/adapter,a={workplace()}\n2\n65536\n20".encode(), b"inline\n\n1\n1"],
        (b"=", b"tinylora:", b"/"),
    ),
]

"""An adapter <-> text that fits into the `model` field of a request: v, which v each module reads, and the fingerprint.

    tinylora:1.AgABAA0AMQAqAAAAAAAAA...               base64url of the bytes below, without padding

    u8  r        u8  1: v is bfloat16, 2: sigma is "split", 4: projections seeded as PEFT does
    u16 u        u16 groups        u16 modules       all linear modules of the base but its output layer, in model order
    i64 projection_seed            8 bytes           digest of {module: group}, `fingerprint["groups"]`
    u16 for each module            0: not adapted, g + 1: reads row g of v
    bf16 x (2r + 1)                for each adapted module: its sketch, `fingerprint["modules"]`
    f32 or bf16                    v, shape (groups, u)
    8 bytes                        of the SHA-256 of all bytes before

Numbers only, little endian: nothing in it names a file or is run. Who has the base model has everything else, and the
digest and the sketches tell whether it is that base. 13 numbers on Qwen2.5-7B take 3.3 kB, most of it sketches.
"""

import base64
import binascii
import copy
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from . import compact, fingerprint
from .adapter_files import find_adapter, packed_vectors, read_adapter
from .assignment import groups_of
from .config import TinyLoraConfig, conventions_of
from .errors import AdapterFileError
from .source import FLOAT
from .targets import find_targets, target_names


PREFIX = "tinylora:"
VERSION = 1
HEAD = struct.Struct("<BBHHHq8s")
CHECKSUM_BYTES = 8
IN_BFLOAT16, SPLIT_SIGMA, PEFT_PROJECTIONS = 1, 2, 4
MOST_16_BITS = 2**16 - 1


@dataclass(frozen=True, eq=False)  # tensors; `text()` is what two are compared by
class InlineAdapter:
    """What the text of an adapter says.

    Args:
        r (`int`): rank.
        sigma (`str`): `"left"` or `"split"`.
        from_paper (`bool`): whether projections are seeded by module name; otherwise by index, as PEFT does.
        projection_seed (`int`): of all of them.
        digest (`str`): of {module: group}, 16 hex digits.
        groups (`tuple[int | None, ...]`): for each linear module of the base, in model order, the row of v that it
            reads; `None` where it is not adapted.
        sketches (`torch.Tensor`): shape (adapted modules, 2r + 1), bfloat16.
        v (`torch.Tensor`): shape (groups, u), float32 or bfloat16.
    """

    r: int
    sigma: str
    from_paper: bool
    projection_seed: int
    digest: str
    groups: tuple[int | None, ...]
    sketches: torch.Tensor
    v: torch.Tensor

    @property
    def u(self) -> int:
        """Trained numbers in a group."""
        return self.v.shape[1]

    def text(self) -> str:
        """The text, for the `model` field of a request."""
        flags = IN_BFLOAT16 * (self.v.dtype == torch.bfloat16)
        flags |= SPLIT_SIGMA * (self.sigma == "split") | PEFT_PROJECTIONS * (not self.from_paper)
        rows = [0 if group is None else group + 1 for group in self.groups]
        head = (self.r, flags, self.u, len(self.v), len(rows), self.projection_seed, bytes.fromhex(self.digest))
        data = HEAD.pack(*head) + struct.pack(f"<{len(rows)}H", *rows) + _bytes(self.sketches) + _bytes(self.v)
        data += hashlib.sha256(data).digest()[:CHECKSUM_BYTES]
        return f"{PREFIX}{VERSION}.{_encoded(data)}"

    def with_vectors(self, v: torch.Tensor) -> "InlineAdapter":
        """The same adapter with other numbers, shape (groups, u), as after a step of training."""
        if v.shape != self.v.shape:
            raise AdapterFileError(f"v has shape {tuple(v.shape)}, and this adapter's {tuple(self.v.shape)}.")
        return replace(self, v=_finite(v.detach().to("cpu", self.v.dtype, copy=True)))


def name_of(text: str) -> str:
    """A short name for an inline adapter, the same everywhere: what a server calls it in its answers and its log."""
    return f"{PREFIX}{VERSION}:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def inline_adapter(model: PeftModel, adapter_name: str = "default") -> InlineAdapter:
    """The text form of an adapter that is in a model, trained or being trained.

    Args:
        model ([`~peft.PeftModel`]): a model with a TinyLoRA.
        adapter_name (`str`, *optional*, defaults to `"default"`): which.

    Raises:
        AdapterFileError: if it is more than v on the base's float weights; says what, and what to do.
    """
    trained = model.peft_config.get(adapter_name)
    if not isinstance(trained, TinyLoraConfig):
        found = f"not there, only {list(model.peft_config)}" if trained is None else f"of {type(trained).__name__}"
        raise AdapterFileError(
            f"adapter {adapter_name!r} is no TinyLoRA of peft_tinylora, but {found}: make it with peft_tinylora.TinyLoraConfig."
        )
    config = copy.copy(trained)
    config.save_basis, config.save_dtype = False, None  # v alone, and not rounded
    model.peft_config[adapter_name] = config
    try:
        tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    finally:
        model.peft_config[adapter_name] = trained
    return _inline(config, tensors, model.get_base_model())


def inline_adapter_of_folder(source: str | Path, base_model: nn.Module) -> InlineAdapter:
    """The text form of a saved adapter.

    Args:
        source (`str` or `Path`): folder, or id on the Hub, of a compact adapter.
        base_model (`nn.Module`): its base, for the names of its modules; may be on the meta device.

    Raises:
        AdapterFileError, ConfigError, HubError: as [`adapter_files.read_adapter`], and as [`inline_adapter`].
    """
    config, tensors = read_adapter(find_adapter(source))
    if packed_vectors(tensors) is None:
        raise AdapterFileError(
            f"{source} holds its frozen factors too, and a request carries v alone: `peft-tinylora export {source} "
            "FOLDER --to compact`."
        )
    return _inline(config, tensors, base_model)


def parse_inline(text: str, most_characters: int) -> InlineAdapter:
    """Text -> adapter, from a stranger.

    Args:
        text (`str`): from [`InlineAdapter.text`].
        most_characters (`int`): longer text is refused unread.

    Raises:
        AdapterFileError: if it is no such text, is damaged, or cannot be meant; says what and what to do.
    """
    if len(text) > most_characters:
        raise AdapterFileError(
            f"The inline adapter has {len(text)} characters, and this server takes {most_characters} at most: use a "
            "smaller u or fewer groups, or ask the server's owner for more (PEFT_TINYLORA_VLLM_CHARACTERS)."
        )
    version, dot, encoded = text.removeprefix(PREFIX).partition(".")
    if not text.startswith(PREFIX) or not dot:
        raise AdapterFileError(f"{text[:40]!r} is no inline adapter, which is like 'tinylora:1.AgAB...'. {_AGAIN}")
    if version != str(VERSION):
        raise AdapterFileError(
            f"The inline adapter has format version {version[:20]!r}, and this peft_tinylora reads {VERSION}: use the "
            "same version on both sides."
        )
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise AdapterFileError(f"The inline adapter is no base64url ({error}). {_AGAIN}") from error
    if _encoded(data) != encoded:  # or one adapter would have many texts, and be another one for each of them
        raise AdapterFileError(f"The inline adapter is no base64url without padding. {_AGAIN}")
    if len(data) < HEAD.size + CHECKSUM_BYTES:
        raise AdapterFileError(f"The inline adapter holds {len(data)} bytes, which are too few. {_AGAIN}")
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if hashlib.sha256(body).digest()[:CHECKSUM_BYTES] != checksum:
        raise AdapterFileError(f"The inline adapter is cut short or damaged: its checksum is wrong. {_AGAIN}")

    r, flags, u, rows, modules, seed, digest = HEAD.unpack_from(body)
    end_of_groups = HEAD.size + 2 * modules
    if not (r and u and rows and modules) or flags > 7 or len(body) < end_of_groups:
        raise AdapterFileError(
            f"The inline adapter cannot be meant: r={r}, u={u}, {rows} groups, {modules} modules, flags {flags}. {_AGAIN}"
        )
    numbers = struct.unpack_from(f"<{modules}H", body, HEAD.size)
    groups = tuple(number - 1 if number else None for number in numbers)
    used = sorted({group for group in groups if group is not None})
    if used != list(range(rows)):
        raise AdapterFileError(
            f"The inline adapter has {rows} groups, and its {modules} modules read {len(used)} of them up to number "
            f"{max(used, default=-1)}: each must be read, and no other. {_AGAIN}"
        )
    adapted = modules - groups.count(None)
    dtype = torch.bfloat16 if flags & IN_BFLOAT16 else torch.float32
    end_of_sketches = end_of_groups + 2 * adapted * (2 * r + 1)
    wanted = end_of_sketches + rows * u * dtype.itemsize
    if len(body) != wanted:
        raise AdapterFileError(
            f"The inline adapter has {len(body)} bytes, and r={r}, u={u}, {rows} groups and {adapted} modules ask for "
            f"{wanted}. {_AGAIN}"
        )
    sketches = _tensor(body[end_of_groups:end_of_sketches], torch.bfloat16, (adapted, 2 * r + 1))
    v = _tensor(body[end_of_sketches:], dtype, (rows, u))
    if not (v.isfinite().all() and sketches.isfinite().all()):
        raise AdapterFileError(f"The inline adapter holds NaN or Inf. {_AGAIN}")
    sigma = "split" if flags & SPLIT_SIGMA else "left"
    return InlineAdapter(r, sigma, not flags & PEFT_PROJECTIONS, seed, digest.hex(), groups, sketches, v)


_AGAIN = "Make it again with peft_tinylora.inline_adapter, or `peft-tinylora inline`."


def linear_modules(base_model: nn.Module) -> list[str]:
    """The modules that an inline adapter numbers: all linear ones of a base model but its output layer, in model order."""
    return target_names(base_model, TinyLoraConfig(target_modules="all-linear"))


def _inline(config: TinyLoraConfig, tensors: Mapping[str, torch.Tensor], base_model: nn.Module) -> InlineAdapter:
    """The text form of what a compact file and its config hold."""
    saved = compact.fingerprint_of(config)
    v = packed_vectors(tensors)
    assert v is not None  # of a compact file
    others = [name for name in tensors if not name.endswith(compact.VECTORS)]
    if others:
        raise AdapterFileError(
            f"The adapter is more than v: it has {len(others)} other tensors, such as {min(others)!r}, and a request "
            "carries v alone. Serve it as a LoRA: `peft-tinylora export ADAPTER FOLDER --to lora`."
        )
    if saved["weights"] != FLOAT:
        raise AdapterFileError(
            f"The adapter's basis is that of {saved['weights']} weights, which the checkpoint of the base model does not "
            "hold. Train it with basis='full-precision' (recipes: --tinylora_basis full-precision), or serve it as a LoRA: "
            "`peft-tinylora export ADAPTER FOLDER --to lora`."
        )
    group_of = groups_of(find_targets(base_model, config), config)
    if fingerprint.digest_of_groups({name: str(group) for name, group in group_of.items()}) != saved["groups"]:
        raise AdapterFileError(
            "The adapter's modules are not those of this base model, or do not share numbers as they did when it was "
            "saved: it belongs to another base model, or its config was edited."
        )
    names = linear_modules(base_model)
    unknown = sorted(group_of.keys() - set(names))
    if unknown:
        raise AdapterFileError(
            f"The adapter adapts {unknown[0]!r}, and a request carries adapters of linear modules but the output layer. "
            "Serve it as a LoRA: `peft-tinylora export ADAPTER FOLDER --to lora`."
        )
    if max(len(names), len(v), config.u) > MOST_16_BITS or config.r > 255:
        raise AdapterFileError(
            f"The adapter is too large for a request: r={config.r}, u={config.u}, {len(v)} groups, {len(names)} modules."
        )
    conventions = conventions_of(config)
    try:
        sketches = fingerprint.decode(saved["modules"], [config.r] * len(group_of))
    except AdapterFileError as error:
        raise AdapterFileError(
            f"The adapter's modules do not all have rank {config.r}, or it belongs to another base model. Serve it as a LoRA: "
            "`peft-tinylora export ADAPTER FOLDER --to lora`."
        ) from error
    return InlineAdapter(
        r=config.r,
        sigma=conventions.sigma,
        from_paper=conventions.from_paper,
        projection_seed=config.projection_seed,
        digest=saved["groups"],
        groups=tuple(group_of.get(name) for name in names),
        sketches=torch.stack(sketches).bfloat16(),
        v=_finite(v.detach().to("cpu", v.dtype if v.dtype == torch.bfloat16 else torch.float32, copy=True)),
    )


def _finite(v: torch.Tensor) -> torch.Tensor:
    if not v.isfinite().all():
        raise AdapterFileError(
            "v holds NaN or Inf: the training diverged. Go back to a checkpoint, with a smaller step."
        )
    return v


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)

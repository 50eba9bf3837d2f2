"""An adapter's folder -> what it is, in words and numbers, without its base model."""

import base64
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from . import basis_cache
from .adapter_files import ADAPTER_FILES, packed_vectors, read_adapter
from .compact import fingerprint_of
from .config import TinyLoraConfig
from .source import FLOAT


MOST_CHARACTERS = 4000  # of a line
MOST_SHOWN = 64  # trained numbers, in a terminal or a card


@dataclass(frozen=True)
class Description:
    """What an adapter is.

    Args:
        config ([`TinyLoraConfig`]): as saved.
        is_compact (`bool`): whether the file leaves the frozen factors to the base model.
        weights (`str`): form of the weights that it was trained on, "float" or such as "bnb 4bit nf4".
        vectors (`torch.Tensor`): v, shape (groups, u), in the dtype of the file. Of a portable file whose
            `tie` is "structured" or a mapping, the distinct ones.
        modules (`int`, *optional*): how many are adapted; `None` where the files do not say.
        others (`list[str]`): names of the file's other tensors (`modules_to_save`, biases, tokens).
        sizes_bytes (`dict[str, int]`): of the two files, by name.
        basis (`str`): where the frozen factors are.
    """

    config: TinyLoraConfig
    is_compact: bool
    weights: str
    vectors: torch.Tensor
    modules: int | None
    others: list[str]
    sizes_bytes: dict[str, int]
    basis: str

    @property
    def numbers(self) -> list[float]:
        """All v, group after group."""
        return self.vectors.flatten().tolist()

    @property
    def tying(self) -> str:
        """How modules share v."""
        config = self.config
        if config.tie is None:
            return f"weight_tying={config.weight_tying:g}, PEFT's rule"
        tie = config.tie if isinstance(config.tie, str) else f"{len(config.tie)} patterns"
        return tie if config.n_tie is None else f"{tie}, n_tie={config.n_tie}"


def describe(folder: Path) -> Description:
    """Read an adapter's folder.

    Args:
        folder (`Path`): from [`find_adapter`].

    Raises:
        AdapterFileError, ConfigError: as [`read_adapter`].
    """
    config, tensors = read_adapter(folder)
    packed = packed_vectors(tensors)
    adapted = {name.rpartition(".tinylora_A")[0] for name in tensors if name.endswith(".tinylora_A")}
    modules: int | None
    if packed is None:
        vectors, modules, basis = vectors_of_groups(config, tensors), len(adapted), "in the file"
    else:
        vectors, modules = packed, count_of_modules(config)
        basis = place_of_basis(config, len(adapted))
    return Description(
        config=config,
        is_compact=packed is not None,
        weights=(config.fingerprint or {}).get("weights", FLOAT),
        vectors=vectors,
        modules=modules,
        others=sorted(name for name in tensors if "tinylora_" not in name),
        sizes_bytes={name: (folder / name).stat().st_size for name in ADAPTER_FILES},
        basis=basis,
    )


def vectors_of_groups(config: TinyLoraConfig, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The v of a portable file, (groups, u), which has a copy for each module unless PEFT's groups are the adapter's."""
    found = {name.rpartition(".")[2]: v for name, v in tensors.items() if ".tinylora_v." in name}
    ordered = [found[key] for key in sorted(found, key=lambda key: (len(key), key))]
    if config.tie == "full":
        ordered = ordered[:1]
    elif config.tie == "tiled":
        ordered = ordered[:: config.n_tie]
    elif config.tie not in (None, "none"):
        ordered = list({tuple(v.tolist()): v for v in ordered}.values())  # the order of the modules is not in the file
    return torch.stack(ordered)


def count_of_modules(config: TinyLoraConfig) -> int | None:
    """How many modules the fingerprint of a compact file is of; `None` where their ranks differ."""
    try:
        numbers = len(base64.b64decode(fingerprint_of(config)["modules"], validate=True)) // 2
    except ValueError:
        return None
    modules, rest = divmod(numbers, 2 * config.r + 1)
    return None if rest else modules


def place_of_basis(config: TinyLoraConfig, in_file: int) -> str:
    """Where loading will find the factors of a compact file."""
    base = config.base_model_name_or_path or ""
    kept = basis_cache.find(base, config.r, fingerprint_of(config)["weights"])
    places = [f"of {in_file} modules in the file"] if in_file else []
    if kept:
        places.append(f"kept in {kept[0]}, checked against the base model on loading")
    elif config.basis_repo is not None:
        places.append(f"in the repository {config.basis_repo}, or computed on loading")
    else:
        places.append("computed from the base model on loading")
    return "; ".join(places)


def printable(text: str) -> str:
    """Text of a file that may be anybody's, for a terminal: no characters that would act there, and not for ever."""
    escaped = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:MOST_CHARACTERS])
    return escaped + (" ..." if len(text) > MOST_CHARACTERS else "")


def lines(source: str, found: Description) -> list[str]:
    """The description as lines of text."""
    config = found.config
    form = f"compact, format {config.format_version}" if found.is_compact else "portable: stock PEFT loads it"
    writer = config.peft_tinylora_version
    targets = ", ".join(sorted(config.target_modules or [])) if not isinstance(config.target_modules, str) else None
    groups, u = found.vectors.shape
    numbers = found.vectors.numel()
    rows = [
        ("adapter", source),
        ("form", f"{form}{f', written by peft-tinylora {writer}' if writer else ''}"),
        ("base", f"{config.base_model_name_or_path or 'not named'} ({found.weights} weights)"),
        ("modules", f"{found.modules or 'ranks differ'}: {targets or config.target_modules}"),
        ("rank", f"{config.r}, singular values {'on the left' if config.sigma == 'left' else 'split'}"),
        ("tying", f"{found.tying}: {groups} groups of u={u}"),
        ("projection", f"seed {config.projection_seed}"),
        ("basis", found.basis),
        ("bytes", f"{numbers * found.vectors.element_size()} of numbers, in files of "
         + " and ".join(f"{size} ({name})" for name, size in found.sizes_bytes.items())),
    ]  # fmt: skip
    if found.others:
        kinds = Counter(name.removeprefix("base_model.model.").rpartition(".")[0] for name in found.others)
        rows.append(("besides", f"{len(found.others)} tensors of {', '.join(kinds)}"))
    rows.append(("trained", f"{numbers} numbers in {str(found.vectors.dtype).removeprefix('torch.')}"))
    text = [f"{name:<12}{printable(value)}" for name, value in rows]
    shown = found.numbers[:MOST_SHOWN]
    for start in range(0, len(shown), 7):
        text.append(" " * 12 + " ".join(f"{value:+.6f}" for value in shown[start : start + 7]))
    if len(shown) < numbers:
        text.append(f"{'':<12}and {numbers - len(shown)} more")
    return text

"""TinyLoraConfig: PEFT's own, plus how modules share v and where the singular values go.

A config that names PEFT's fields only means what it means in PEFT. Naming any of this package's fields (`tie`, `n_tie`,
`sigma`, `exclude_modules`, `target_parameters`) chooses this package's conventions: sigma on the left as in the paper,
projections seeded by module name, canonical signs.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, get_type_hints

import peft
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from .errors import AdapterFileError, ConfigError


TIES = ("none", "full", "tiled", "structured")
SIGMAS = ("left", "split")
BASES = ("base", "full-precision", "unchecked")
SAVE_DTYPES = ("float32", "bfloat16")
BIASES = ("none", "all", "tinylora_only")
MOST_NUMBERS = 2**20  # r is at most the shorter side of a weight; nobody trains so many numbers in a group as u
MOST_ENTRIES = 100_000  # of a list in a file
FORMAT_VERSION = 1  # of the compact file; docs/format.md

OWN_FIELDS = (
    "tie",
    "n_tie",
    "sigma",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "save_basis",
    "save_dtype",
    "basis",
    "basis_repo",
    "fingerprint",
    "format_version",
    "peft_tinylora_version",
)


class Conventions(NamedTuple):
    """What a config chooses beyond the numbers r and u, resolved for a stock config and for ours alike."""

    tie: str | Mapping[str, str] | None  # None: PEFT's rule, by `weight_tying`
    n_tie: int | None
    sigma: str
    from_paper: bool  # projections seeded by module name and canonical signs, rather than PEFT's index and LAPACK's


def conventions_of(config: peft.TinyLoraConfig) -> Conventions:
    """The conventions of a config, PEFT's for one that names fields of PEFT only."""
    if isinstance(config, TinyLoraConfig) and config.uses_paper_conventions:
        assert config.sigma is not None  # filled in when the config was made
        return Conventions(config.tie, config.n_tie, config.sigma, from_paper=True)
    return Conventions(None, None, "split", from_paper=False)


@dataclass
class TinyLoraConfig(peft.TinyLoraConfig):
    """Configuration of a TinyLoRA adapter, used as `LoraConfig` is.

    The update of a module with weight W = U S V^T is U S (sum_i v_i P_i) V^T, where only v is trained
    (https://huggingface.co/papers/2602.04118). The trained count is `u` times the number of groups.

    All fields of `peft.TinyLoraConfig` keep their meaning: `r` (frozen rank), `u` (length of v), `weight_tying`,
    `projection_seed`, `target_modules`, `modules_to_save`, `layers_to_transform`, `bias`, `tinylora_dropout`, ...

    Args:
        tie (`str` or `Mapping[str, str]`, *optional*):
            Which modules share a v. `"tiled"`: every `n_tie` neighbours in model order, whatever their type;
            `"structured"`: every `n_tie` neighbours of the same type; `"none"`: no sharing; `"full"`: all share one.
            A mapping of group name to a regular expression over full module names makes a group for each name, split
            into runs of `n_tie` where that is given.
        n_tie (`int`, *optional*):
            How many modules share a v: ceil(modules / n_tie) groups. Needed with "tiled" and "structured".
        sigma (`str`, *optional*):
            Where the singular values go: `"left"`, as in the paper, or `"split"`, as in PEFT. Defaults to "split" when
            only fields of PEFT are named and to "left" otherwise. The two need learning rates of their own.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, or a regular expression over names, of modules not to adapt, as in `LoraConfig`.
        target_parameters (`list[str]`, *optional*):
            Names, or ends of names, of parameters to adapt where they are not the weight of a linear layer: the fused
            experts of a mixture of experts, such as `mlp.experts.gate_up_proj`. As in `LoraConfig`. Each expert's
            matrix gets a basis of its own, and counts as a module in `tie`, named like `mlp.experts.0.gate_up_proj`.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Tokens whose embeddings are trained too, as in `LoraConfig`.
        save_basis (`bool`, *optional*):
            Whether the file holds the frozen factors. `False`: v alone, 26 bytes for 13 bfloat16 numbers; the factors are
            found again from the base model. `True`: the portable form, which stock PEFT loads. Defaults to `False`, and
            to `True` when only fields of PEFT are named.
        save_dtype (`str`, *optional*):
            `"float32"` or `"bfloat16"`, what v is rounded to in a compact file, checkpoints of a run included. Defaults
            to the dtype it was trained in.
        basis (`str`, *optional*, defaults to `"base"`):
            The weights that the factors come from. `"base"`: those of the base model as it is loaded, dequantized if it
            is quantized. `"full-precision"`: those of its checkpoint, also where it is loaded quantized, so that the
            adapter fits every form of the base. `"unchecked"`, for loading only: those at hand, with a warning where
            the adapter was trained with others.
        basis_repo (`str`, *optional*):
            Hub id of a repository of basis files, asked where the cache has none.
        fingerprint (`dict`, *optional*):
            What a compact file's factors are known again by; filled in on saving.
        format_version (`int`, *optional*):
            Of the compact file; filled in on saving.
        peft_tinylora_version (`str`, *optional*):
            Version of this package that wrote the file; filled in on saving.

    Raises:
        ConfigError: (a `ValueError`) for a value that cannot be meant; names the field, the value and what is allowed.

    Example:
        ```python
        >>> from peft_tinylora import TinyLoraConfig
        >>> config = TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=16, target_modules="all-linear")
        >>> config.sigma
        'left'

        ```
    """

    tie: str | dict[str, str] | None = field(
        default=None,
        metadata={"help": "Which modules share a v: none, full, tiled, structured, or {group: pattern}."},
    )
    n_tie: int | None = field(default=None, metadata={"help": "How many modules share a v."})
    sigma: str | None = field(default=None, metadata={"help": "Where the singular values go: left or split."})
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression over names, of modules not to adapt."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names, or ends of names, of parameters to adapt, such as fused experts."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained too."}
    )
    save_basis: bool | None = field(
        default=None, metadata={"help": "Whether the adapter file holds the frozen factors, for stock PEFT to load."}
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "What v is rounded to in a compact file: float32 or bfloat16."}
    )
    basis: str | None = field(
        default=None, metadata={"help": "The weights the factors come from: base, full-precision or unchecked."}
    )
    basis_repo: str | None = field(default=None, metadata={"help": "Hub id of a repository of basis files."})
    fingerprint: dict[str, str] | None = field(
        default=None, metadata={"help": "What the factors are known again by, leave empty."}
    )
    format_version: int | None = field(default=None, metadata={"help": "Of the compact file, leave empty."})
    peft_tinylora_version: str | None = field(
        default=None, metadata={"help": "Version of peft_tinylora that wrote the file, leave empty."}
    )

    def __post_init__(self) -> None:
        # Only in a file is the type a plain string; the factors are then about to be loaded, not computed.
        self.adapted_modules: list[str] = []  # filled in where a portable file must name them for stock PEFT
        self.is_from_file = self.peft_type is not None and not isinstance(self.peft_type, peft.PeftType)
        if self.is_from_file:
            check_types(self)
        if self.peft_type is not None:  # as from `to_dict`, or a file
            self._read_compact_fields()
        check_peft_fields(self)
        check_own_fields(self)
        try:
            super().__post_init__()
        except ValueError as error:  # PEFT's, of task_type and of layers_to_transform
            raise ConfigError(" ".join(str(error).split())) from error
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]  # as PEFT does with its own
        if self.uses_paper_conventions:
            self._fill_paper_conventions()

    @property
    def uses_paper_conventions(self) -> bool:
        """Whether a field of this package is named, rather than PEFT's only."""
        own = (self.tie, self.n_tie, self.sigma, self.exclude_modules, self.target_parameters)
        return any(value is not None for value in own)

    @property
    def is_compact(self) -> bool:
        """Whether the adapter is saved without its frozen factors."""
        return self.uses_paper_conventions if self.save_basis is None else not self.save_basis

    def _read_compact_fields(self) -> None:
        if self.format_version is not None and self.format_version != FORMAT_VERSION:
            raise AdapterFileError(
                f"format_version={shortened(self.format_version)} in adapter_config.json: this version reads {FORMAT_VERSION}. The "
                f"adapter was written by peft-tinylora {str(self.peft_tinylora_version)[:40]}: pip install -U peft-tinylora."
            )
        ratio = self.weight_tying  # type: ignore[has-type]  # a field of PEFT's
        if isinstance(ratio, (int, float)) and ratio <= -1:
            self.weight_tying = -1.0 - ratio

    def _fill_paper_conventions(self) -> None:
        if self.tie is None:
            self.tie = {0.0: "none", 1.0: "full"}.get(self.weight_tying)
            if self.tie is None:
                raise ConfigError(
                    f"weight_tying={self.weight_tying} cannot be combined with `n_tie`, `sigma`, `exclude_modules` or "
                    "`target_parameters`: say how modules share a v with `tie` and `n_tie` instead."
                )
        elif self.weight_tying != 0.0:
            raise ConfigError(
                f"weight_tying={self.weight_tying} and tie={self.tie!r} both say how modules share a v: name one."
            )
        self.weight_tying = 0.0
        check_tie(self.tie, self.n_tie)
        if self.sigma is None:
            self.sigma = "left"
        if self.sigma not in SIGMAS:
            raise ConfigError(f"sigma={shortened(self.sigma)}: allowed are 'left' (paper) and 'split' (PEFT).")

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary of what goes into `adapter_config.json`.

        A config whose adapter is saved with its factors is written so that stock PEFT reads it. Of a compact one stock
        PEFT would drop the fields that it does not know, with a warning, and go on with factors of its own: its
        `weight_tying` is written as -1 - weight_tying, which stock PEFT refuses.
        """
        from . import __version__

        output = super().to_dict()
        if self.is_compact or self.uses_paper_conventions:
            output["peft_tinylora_version"] = __version__
        if self.is_compact or not self.stock_peft_can_follow:
            output["weight_tying"] = -1.0 - self.weight_tying
        elif self.uses_paper_conventions:
            # Stock PEFT neither excludes modules nor draws these projections.
            output["save_projection"] = True
            if self.exclude_modules is not None:
                output["exclude_modules"], output["target_modules"] = None, self.adapted_modules
        if not self.is_compact and self.stock_peft_can_follow:
            output["fingerprint"] = output["format_version"] = None
        for name in OWN_FIELDS:
            if output[name] is None:
                del output[name]
        return output

    @property
    def stock_peft_can_follow(self) -> bool:
        """Whether stock PEFT can hold what is adapted: it knows neither experts nor single tokens."""
        return self.target_parameters is None and self.trainable_token_indices is None


def check_types(config: TinyLoraConfig) -> None:
    """Check that every field of a config that was read from a file has a value of its type.

    Raises:
        AdapterFileError: names the field, the value and what is allowed.
    """
    for name, (schema, hint) in _schemas().items():
        value = getattr(config, name)
        if isinstance(value, (list, dict)) and len(value) > MOST_ENTRIES:
            raise AdapterFileError(
                f"{name} in adapter_config.json has {len(value)} entries, and a config at most {MOST_ENTRIES}: ask for "
                "the one that the adapter was saved with."
            )
        try:
            validate_typed_dict(schema, {name: value})
        except StrictDataclassError as error:
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise AdapterFileError(f"{name}={shortened(value)} in adapter_config.json: must be {wanted}.") from error
    if "" in (config.modules_to_save or ()):  # every name ends with it: PEFT would copy each module, and those in it
        raise AdapterFileError(
            f"modules_to_save={shortened(config.modules_to_save)} in adapter_config.json: '' is no name."
        )
    if any(isinstance(value, (list, dict)) for value in (config.auto_mapping or {}).values()):
        raise AdapterFileError(
            f"auto_mapping={shortened(config.auto_mapping)} in adapter_config.json: must be names of a class and its library."
        )


@functools.cache
def _schemas() -> dict[str, tuple[type, Any]]:
    """Of each field, what it is validated against, and its type."""
    return {
        # JSON writes 1.0 as 1 where another program saved it.
        name: (TypedDict(name, {name: float | int if hint is float else hint}), hint)  # type: ignore[operator]  # mypy knows literal ones only
        for name, hint in get_type_hints(TinyLoraConfig).items()
    }


def shortened(value: Any) -> str:
    """`value` as it is shown in an error: not all of it where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_peft_fields(config: peft.TinyLoraConfig) -> None:
    """Check the values of PEFT's own fields, of which PEFT itself lets many through.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    for name in ("r", "u"):
        value = getattr(config, name)
        check_positive_integer(name, value)
        if value > MOST_NUMBERS:
            raise ConfigError(f"{name}={shortened(value)}: must be {MOST_NUMBERS} at most.")
    seed = config.projection_seed
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"projection_seed={shortened(seed)}: must be an integer of 64 bits.")
    ratio = config.weight_tying
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0.0 <= ratio <= 1.0:
        raise ConfigError(
            f"`weight_tying` should be a float between 0.0 and 1.0 but the value passed is {ratio!r}. To name a way of "
            "tying, use `tie`."
        )
    if not isinstance(config.init_weights, bool) and config.init_weights != "uniform":
        raise ConfigError(
            f"init_weights={shortened(config.init_weights)}: allowed are True (zeros), 'uniform' and False (both random)."
        )
    if config.bias not in BIASES:
        raise ConfigError(f"bias={shortened(config.bias)}: allowed are {', '.join(map(repr, BIASES))}.")
    dropout = config.tinylora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ConfigError(f"tinylora_dropout={shortened(dropout)}: must be a number from 0 to 1.")
    bound = config.init_v_bound
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not (math.isfinite(bound) and bound >= 0):
        raise ConfigError(f"init_v_bound={bound!r}: must be a finite number, 0 or more.")


def check_own_fields(config: TinyLoraConfig) -> None:
    """Check what a config says of its file and of where its factors come from.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    if config.save_basis not in (None, True, False):
        raise ConfigError(f"save_basis={config.save_basis!r}: allowed are True and False.")
    for name, allowed in (("basis", BASES), ("save_dtype", SAVE_DTYPES)):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}={shortened(value)}: allowed are {', '.join(map(repr, allowed))}.")
    if config.layers_to_transform is not None and isinstance(config.target_modules, str) and not config.is_from_file:
        # As LoraConfig does. PEFT would leave the layers out of account, and not when the adapter is loaded again.
        raise ConfigError(
            f"target_modules={config.target_modules!r} with layers_to_transform={config.layers_to_transform}: name the "
            "modules in a list, such as ['q_proj', 'v_proj']."
        )
    if config.basis_repo is not None:
        try:
            validate_repo_id(config.basis_repo)
        except HFValidationError as error:
            raise ConfigError(
                f"basis_repo={shortened(config.basis_repo)}: must be the id of a repository on the Hub, 'user/name'."
            ) from error


def check_tie(tie: Any, n_tie: Any) -> None:
    """Check `tie` and `n_tie` together.

    Raises:
        ConfigError: names the field, the value and what is allowed.
    """
    if isinstance(tie, Mapping):
        if not tie or not all(isinstance(text, str) for pair in tie.items() for text in pair):
            raise ConfigError(
                f"tie={shortened(dict(tie))}: a mapping needs group names with a pattern each, all of them strings."
            )
    elif tie not in TIES:
        raise ConfigError(
            f"tie={shortened(tie)}: allowed are {', '.join(map(repr, TIES))}, or a mapping of group name to pattern."
        )
    if n_tie is not None:
        check_positive_integer("n_tie", n_tie)
    if tie in ("tiled", "structured") and n_tie is None:
        raise ConfigError(f"tie={tie!r} needs `n_tie`, the number of modules that share a v; got None.")
    if tie in ("none", "full") and n_tie is not None:
        raise ConfigError(f"tie={tie!r} takes no `n_tie`; got {n_tie}. Use tie='tiled' or 'structured' with it.")


def check_positive_integer(name: str, value: Any) -> None:
    """Raise a [`ConfigError`] that names the field unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"`{name}` should be a positive integer value but the value passed is {shortened(value)}")

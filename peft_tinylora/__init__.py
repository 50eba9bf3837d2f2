"""TinyLoRA for the Hugging Face ecosystem: a fine-tune in 13 numbers.

Importing this package puts its tuner behind PEFT's TINYLORA; see register.py. Read the files in the order of the
data's way: versions, internals, errors, trouble; weight, gather, original -> triplets, basis -> basis_cache, build ->
projection, tying -> vector -> delta, thin, product -> layer, linear, embedding, experts -> model -> fingerprint, compact,
checkpoint -> merging -> mixed, bank, combine -> adapter_files, untrusted, describe -> export, card, published, hub ->
inline, served, vllm.

Method: "Learning to Reason in 13 Parameters", https://huggingface.co/papers/2602.04118
"""

__version__ = "0.1.0"

from .versions import check_libraries


check_libraries()  # before the files below import them

from .bank import AdapterBank  # noqa: E402
from .config import TinyLoraConfig  # noqa: E402
from .errors import (  # noqa: E402
    AdapterFileError,
    BasisError,
    BasisMismatchError,
    ConfigError,
    MergeError,
    TinyLoraError,
    TyingError,
    UnsupportedModuleError,
)
from .export import export_adapter  # noqa: E402
from .inline import inline_adapter  # noqa: E402
from .layer import TinyLoraLayer  # noqa: E402
from .model import TinyLoraModel  # noqa: E402
from .plan import plan  # noqa: E402
from .register import register, unregister  # noqa: E402


__all__ = [
    "AdapterBank",
    "AdapterFileError",
    "BasisError",
    "BasisMismatchError",
    "ConfigError",
    "MergeError",
    "TinyLoraConfig",
    "TinyLoraError",
    "TinyLoraLayer",
    "TinyLoraModel",
    "TyingError",
    "UnsupportedModuleError",
    "export_adapter",
    "inline_adapter",
    "plan",
    "register",
    "unregister",
]

register()

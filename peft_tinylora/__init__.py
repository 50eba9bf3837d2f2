"""TinyLoRA for the Hugging Face ecosystem: a fine-tune in 13 numbers.

Importing this package puts its tuner behind PEFT's TINYLORA; see register.py. Read the files in the order of the
data's way: weight, internals, gather, original -> triplets, basis -> basis_cache, build -> projection, tying -> vector -> delta, thin,
product -> layer, linear, embedding, experts -> model -> fingerprint, compact, checkpoint -> merging -> mixed, bank,
combine -> adapter_files, untrusted, describe -> export, card, published, hub -> inline, served, vllm.

Method: "Learning to Reason in 13 Parameters", https://huggingface.co/papers/2602.04118
"""

__version__ = "0.1.0"

from .bank import AdapterBank
from .config import TinyLoraConfig
from .errors import (
    AdapterFileError,
    BasisError,
    BasisMismatchError,
    ConfigError,
    MergeError,
    TinyLoraError,
    TyingError,
    UnsupportedModuleError,
)
from .export import export_adapter
from .inline import inline_adapter
from .layer import TinyLoraLayer
from .model import TinyLoraModel
from .plan import plan
from .register import register, unregister


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

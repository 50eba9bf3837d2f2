"""What this package uses of PEFT, transformers, accelerate and torch that they do not call public: each with its reason.

It is here, so that a release which moves one of these names breaks one file (tests/test_private_names.py sees to that, and
lists the exceptions). vllm/worker.py has vLLM's, which can be imported in vLLM's processes only. The tuner and its layers
override, and use, members with a leading underscore that they inherit from PEFT's `BaseTuner` and `BaseTunerLayer` and torch's
`nn.Module`; on the way of decoding they look into `nn.Module`'s dictionaries, past its `__getattr__`.
"""

from collections.abc import Collection
from typing import Any

import torch
from peft import PeftConfig

# A dictionary of buffers, which torch does not have. Watch: whether PEFT makes it public, or torch adds `nn.BufferDict`.
from peft.tuners._buffer_dict import BufferDict

# There is no public way to ask which modules "all-linear" means. Watch: what PEFT's own LoRA calls in its place.
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks_of_all_modules
from transformers import PreTrainedModel


__all__ = [
    "NONE_IF_MISSING",
    "TRANSFORMERS_MARK",
    "BufferDict",
    "adapters_of",
    "commit_of",
    "has_transformers_adapters",
    "hook_of_accelerate",
    "is_taken_apart",
    "is_view",
    "is_watched",
    "mark_without_adapters",
    "name_without_fsdp",
    "three_versions_of",
    "version_of",
    "with_all_linear_layers",
]


def with_all_linear_layers(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """`config` itself, its `target_modules` changed from "all-linear" to the names of PEFT's linear modules."""
    return _maybe_include_all_linear_layers(config, model)


def adapters_of(wrapper: AuxiliaryTrainingWrapper) -> Collection[str]:
    """The adapters that have their own copy of a module, for `modules_to_save` or single tokens.

    Public is only the dictionary of copies, which the wrapper of single tokens has not.
    """
    return wrapper._adapters


def has_transformers_adapters(model: PreTrainedModel) -> bool:
    """Whether transformers' own `add_adapter` or `load_adapter` put an adapter in.

    `peft_config` is there after PEFT's as well; asking by `active_adapters` raises where there is none.
    """
    return model._hf_peft_config_loaded


# What `add_adapter` leaves on a model, to be taken off after one that failed.
TRANSFORMERS_MARK = "_hf_peft_config_loaded"


def mark_without_adapters(model: PreTrainedModel) -> None:
    """Have transformers know that the last adapter was removed, as its own `delete_adapter` does not let it be."""
    model._hf_peft_config_loaded = False


def commit_of(model: PreTrainedModel) -> str | None:
    """The commit that a model from the Hub was loaded from; a local one has none. Public is only what was asked for."""
    return getattr(model.config, "_commit_hash", None)


# `cached_file` otherwise raises for a file that a repository has not, with the same error as for one out of reach.
NONE_IF_MISSING = {"_raise_exceptions_for_missing_entries": False}


def hook_of_accelerate(layer: nn.Module) -> Any:
    """What accelerate runs around a layer that it offloaded, or `None`: its `pre_forward` brings the weights.

    Public is `align_module_device`, which brings them without the hook's own way back. Watch: `add_hook_to_module`.
    """
    return getattr(layer, "_hf_hook", None)


def name_without_fsdp(name: str) -> str:
    """A module's name in the state dict of a model that FSDP1 wrapped, which names its wrappers in `named_modules` only."""
    return name.replace("_fsdp_wrapped_module.", "")


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; those made in inference mode do not count, and can be written to there only.

    torch documents the counter ("in-place correctness checks") and its name has an underscore.
    """
    return 0 if tensor.is_inference() else tensor._version


def three_versions_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> tuple[int, int, int]:
    """Of three tensors that were not made in inference mode, by one call."""
    return a._version, b._version, c._version


def is_view(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a view for autograd; `is_leaf` and `storage_offset` do not tell."""
    return tensor._is_view()


def is_watched(layer: nn.Module) -> bool:
    """Whether calling a layer does or shows to others something beside its class's own `forward`.

    torch asks the same in `nn.Module._call_impl`, before it calls `forward` alone. Watch: that condition.
    """
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or hooks_of_all_modules._global_forward_hooks
        or hooks_of_all_modules._global_forward_pre_hooks
        or hooks_of_all_modules._global_backward_hooks
        or hooks_of_all_modules._global_backward_pre_hooks
        or "forward" in vars(layer)
        or "_compiled_call_impl" in vars(layer)
        or "weight" not in layer._parameters  # of FSDP1 and of parametrizations
    )


def is_taken_apart() -> bool:
    """Whether torch.compile, torch.export, torch.func, forward-mode differentiation or a mode follows the computation.

    Public is the first of these only. Watch: what torch.autograd.Function.apply asks.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )

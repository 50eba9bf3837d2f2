"""A model and a config -> the names of the modules to adapt, in model order.

Follows PEFT's own matching, so that `target_modules`, `exclude_modules`, `layers_to_transform` and "all-linear" mean
what they mean for LoRA. Modules inside a layer that is wrapped already (its `base_layer`) are never counted, so a second
adapter sees the same list as a first.
"""

import copy

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# Not public, and there is no public way to ask which modules a config matches.
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists  # isort: skip


def target_names(model: nn.Module, config: peft.PeftConfig) -> list[str]:
    """Names of the modules of `model` that `config` targets, in model order.

    Args:
        model (`nn.Module`): the base model, or one into which adapters were injected already.
        config (`peft.PeftConfig`): its `target_modules` must be set. Not changed.

    Returns:
        `list[str]`: full names; empty where nothing matches.
    """
    config = _maybe_include_all_linear_layers(copy.copy(config), model)
    names = []
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        if name and check_target_module_exists(config, name):
            names.append(name)
    return names

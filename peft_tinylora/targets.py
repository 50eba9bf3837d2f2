"""A model and a config -> the names of the modules to adapt, in model order.

Follows PEFT's own matching, so that `target_modules`, `exclude_modules`, `layers_to_transform` and "all-linear" mean
what they mean for LoRA, as does `target_parameters`, which names parameters such as the fused experts of a mixture of
experts. Modules inside a layer that is wrapped already (its `base_layer`) are never counted, so a second adapter sees
the same list as a first.
"""

import copy
from typing import NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .errors import AdapterFileError
from .internals import with_all_linear_layers
from .weight import PLAIN_LAYERS, quantization_backend


class Target(NamedTuple):
    """A module or a parameter to adapt.

    `key` is its name in the model. `names` has one name for each of its matrices, by which they share v and seed P: the
    key itself, or, for a parameter (experts, ., .) "mlp.experts.gate_up_proj", "mlp.experts.0.gate_up_proj" and so on.
    """

    key: str
    names: list[str]
    parameter_name: str | None


def find_targets(model: nn.Module, config: peft.PeftConfig) -> list[Target]:
    """What of `model` a config targets, in model order.

    Args:
        model (`nn.Module`): the base model, or one into which adapters were injected already.
        config (`peft.PeftConfig`): its `target_modules`, or its `target_parameters`, must be set. Not changed.

    Returns:
        `list[Target]`: empty where nothing matches.
    """
    config = expand_all_linear(copy.copy(config), model)
    parameters = tuple(getattr(config, "target_parameters", None) or ())
    targets = []
    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        wrapped = isinstance(module, BaseTunerLayer)
        inside = f"{name}." if wrapped else None
        if name and config.target_modules and check_target_module_exists(config, name):
            targets.append(Target(name, [name], None))
        base = module.get_base_layer() if wrapped else module
        for parameter_name, parameter in base.named_parameters(recurse=False):
            key = f"{name}.{parameter_name}"
            if key in parameters or key.endswith(tuple(f".{suffix}" for suffix in parameters)):
                experts = range(parameter.shape[0]) if parameter.ndim == 3 else None
                names = [key] if experts is None else [f"{name}.{expert}.{parameter_name}" for expert in experts]
                targets.append(Target(key, names, parameter_name))
    return targets


def target_names(model: nn.Module, config: peft.PeftConfig) -> list[str]:
    """Names of the matrices that a config targets, in model order; see [`find_targets`]."""
    return [name for target in find_targets(model, config) for name in target.names]


def expand_all_linear(config: peft.PeftConfig, model: nn.Module) -> peft.PeftConfig:
    """Replace `target_modules="all-linear"` in place by the names of all linear modules but the output layer.

    PEFT's own finds only what derives from `nn.Linear`, and so misses HQQ, GPTQ and AWQ layers.
    """
    is_all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    config = with_all_linear_layers(config, model)
    if is_all_linear:
        quantized = {
            name
            for name, module in model.named_modules()
            # The shape is asked first, because asking PEFT imports every quantization library there is.
            if not isinstance(module, (BaseTunerLayer, *PLAIN_LAYERS))
            and hasattr(module, "in_features")
            and "base_layer" not in name.split(".")
            and quantization_backend(module, model) is not None
        }
        config.target_modules = set(config.target_modules) | quantized
    return config


def targets_in_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> list[Target]:
    """The modules that the keys of an adapter's state dict belong to, in model order.

    Raises:
        AdapterFileError: if the model has no such module; names it.
    """
    wanted = {key.rpartition(".tinylora_")[0] for key in state_dict if ".tinylora_v" not in key} - {""}
    names = [name for name, _ in model.named_modules() if name in wanted]
    unknown = sorted(wanted - set(names))
    if unknown:
        raise AdapterFileError(
            f"The state dict names {len(unknown)} modules that the model lacks, such as {unknown[0]!r}."
        )
    return [Target(name, [name], None) for name in names]

"""The tensors of an adapter <-> the tensors of its file, `adapter_model.safetensors`.

In the file, for each adapted module NAME of the base model, and each group G of modules that share a v:

    base_model.model.NAME.tinylora_A    (r, in)        frozen factor
    base_model.model.NAME.tinylora_B    (out, r)       frozen factor
    base_model.model.NAME.tinylora_P    (u, r, r)      projections, unless `save_projection` is off
    base_model.model.tinylora_v.G       (u,)           the trained numbers

A config that names fields of PEFT only keeps PEFT's key for the last, `base_model.tinylora_v.G`. Loading takes either.

Nothing is loaded unless everything fits: a tensor that is missing, too many, of the wrong shape or not finite is an
error, and so is a basis of other weights than those of the model.
"""

import warnings
from collections.abc import Iterable, Iterator

import torch
from peft import PeftConfig
from torch import nn

from .basis import residual
from .config import conventions_of
from .errors import AdapterFileError, BasisMismatchError
from .layer import TinyLoraLayer


# `basis.residual` of the factors in a file against the loaded weight. Factors rounded to bf16 give about 0.003, the
# same weights rounded to bf16 less; a weight changed by 5% gives more than this, another model about 1.
BASIS_TOLERANCE = 0.01


def tensors_to_save(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    own: dict[str, torch.Tensor],
    state_dict: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the names of the file, except that they still hold the adapter's name.

    Args:
        model (`nn.Module`): the `PeftModel`, or the transformers model with the adapter in it.
        config (`PeftConfig`): the adapter's.
        adapter_name (`str`): its name.
        own (`dict`): what PEFT found in the state dict to belong to the adapter.
        state_dict (`dict`): the whole state dict of `model`.

    Returns:
        `dict[str, torch.Tensor]`
    """
    tensors = {key: tensor for key, tensor in own.items() if config.save_projection or ".tinylora_P." not in key}
    for name, layer in _adapted_layers(model, adapter_name).items():
        for kind, factor in _factors(layer, adapter_name, config.save_projection):
            # A state dict of the trained parameters only, such as DeepSpeed's, lacks the frozen factors.
            tensors.setdefault(f"{name}.tinylora_{kind}.{adapter_name}", factor)
    vectors_name, vectors = _vectors(model, adapter_name)
    keys = {f"{vectors_name}.{adapter_name}.{group}": group for group in vectors}
    prefix = "base_model.model.tinylora_v" if conventions_of(config).from_paper else "base_model.tinylora_v"
    if not vectors_name.startswith("base_model."):
        prefix = "tinylora_v"  # transformers puts "base_model.model." before every key itself
    for key, group in keys.items():
        tensors.pop(key, None)
        tensors[f"{prefix}.{adapter_name}.{group}"] = state_dict.get(key, vectors[group])
    return tensors


def tensors_to_load(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a file under the names of the model's state dict, after all of them were checked.

    Args:
        model (`nn.Module`): the `PeftModel`, or the transformers model, with the adapter already in place.
        config (`PeftConfig`): the adapter's.
        adapter_name (`str`): the name that the adapter has in `model`.
        state_dict (`dict`): as read from the file; tensors that are not TinyLoRA's (biases, `modules_to_save`) are
            already under the names of the model.

    Returns:
        `dict[str, torch.Tensor]`: v, A, B and P in the dtype of the model's own.

    Raises:
        AdapterFileError: if a tensor is missing, too many, misshapen or not finite.
        BasisMismatchError: if the basis is of other weights than the model's. For a file in PEFT's layout, which may
            hold any factors, this is a warning.
    """
    layers = _adapted_layers(model, adapter_name)
    if not layers:
        return state_dict
    slots = _slots(model, config, adapter_name, layers)
    found = {_name_in_base_model(key): tensor for key, tensor in state_dict.items() if "tinylora_" in key}
    others = {key: tensor for key, tensor in state_dict.items() if "tinylora_" not in key}
    unknown = others.keys() - _known_names(model)
    # PEFT saves the biases of `modules_to_save` under a second name, which no model has.
    unknown = {key for key in unknown if ".modules_to_save." not in key}
    broken = [key for key, tensor in others.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if len(found) + len(others) != len(state_dict):
        raise AdapterFileError("The adapter file has a tensor under two names. Nothing was loaded. Save it anew.")
    _check(slots, found, sorted(unknown), broken)
    _check_basis(layers, found, config)

    for layer in layers.values():
        weight = layer.stored_tensor()
        for factors in (layer.tinylora_A, layer.tinylora_B):
            if factors[adapter_name].is_meta and not weight.is_meta:
                factors[adapter_name] = torch.empty_like(factors[adapter_name], device=weight.device)
    device = next(iter(layers.values())).stored_tensor().device
    tensors = dict(others)
    for name, (key, slot) in slots.items():
        tensors[key] = found[name].to(device if slot.is_meta else slot.device, slot.dtype)
    if not config.save_projection:
        # Regenerated, but named here so that PEFT does not report them as missing.
        tensors |= {
            f"{name}.tinylora_P.{adapter_name}": layer.tinylora_P[adapter_name] for name, layer in layers.items()
        }
    return tensors


def check_loaded(model: nn.Module, config: PeftConfig, adapter_name: str, keys: Iterable[str]) -> None:
    """Check an adapter that transformers' `load_adapter` put into its model, past [`tensors_to_load`].

    Args:
        model (`nn.Module`): the transformers model.
        config (`PeftConfig`): the adapter's.
        adapter_name (`str`): its name in `model`.
        keys (`Iterable[str]`): the keys that transformers found missing or unexpected.

    Raises:
        AdapterFileError, BasisMismatchError: as [`tensors_to_load`].
    """
    layers = _adapted_layers(model, adapter_name)
    slots = _slots(model, config, adapter_name, layers)
    by_key = {key: name for name, (key, _) in slots.items()}
    wrong = {by_key.get(key, key) for key in keys}
    found = {name: slot for name, (_, slot) in slots.items() if name not in wrong}
    found |= {name: torch.empty(0) for name in wrong - slots.keys()}
    _check(slots, found)
    _check_basis(layers, found, config)


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, TinyLoraLayer]:
    """Name in the state dict of `model` -> layer, for those that have the adapter."""
    return {
        name: module
        for name, module in _named_modules(model)
        if isinstance(module, TinyLoraLayer) and adapter_name in module.tinylora_A
    }


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # FSDP wraps modules in others, which its state dict does not name.
    for name, module in model.named_modules():
        yield name.replace("_fsdp_wrapped_module.", ""), module


def _vectors(model: nn.Module, adapter_name: str) -> tuple[str, nn.ParameterDict]:
    """Name in the state dict of the dictionary of all vectors, and the vectors of one adapter."""
    shared = next(iter(_adapted_layers(model, adapter_name).values())).tinylora_v
    return next(name for name, module in _named_modules(model) if module is shared), shared[adapter_name]


def _slots(
    model: nn.Module, config: PeftConfig, adapter_name: str, layers: dict[str, TinyLoraLayer]
) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in the base model -> key in the state dict of `model`, and the tensor that is there now."""
    vectors_name, vectors = _vectors(model, adapter_name)
    slots = {f"tinylora_v.{group}": (f"{vectors_name}.{adapter_name}.{group}", v) for group, v in vectors.items()}
    for name, layer in layers.items():
        for kind, tensor in _factors(layer, adapter_name, config.save_projection):
            slots[_name_in_base_model(f"{name}.tinylora_{kind}")] = (f"{name}.tinylora_{kind}.{adapter_name}", tensor)
    return slots


def _factors(layer: TinyLoraLayer, adapter_name: str, save_projection: bool) -> list[tuple[str, torch.Tensor]]:
    factors = [("A", layer.tinylora_A[adapter_name]), ("B", layer.tinylora_B[adapter_name])]
    return factors + [("P", layer.tinylora_P[adapter_name])] * save_projection


def _name_in_base_model(key: str) -> str:
    for prefix in ("base_model.model.", "base_model."):
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _known_names(model: nn.Module) -> set[str]:
    # Not `model.state_dict()`, which would compute the bases that are about to be loaded.
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return names | {f"base_model.model.{name}" for name in names}


def _check(
    slots: dict[str, tuple[str, torch.Tensor]],
    found: dict[str, torch.Tensor],
    unknown: Iterable[str] = (),
    broken: Iterable[str] = (),
) -> None:
    problems = []
    missing = sorted(slots.keys() - found.keys())
    extra = sorted(found.keys() - slots.keys()) + [*unknown]
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if extra:
        problems.append(f"{len(extra)} that the adapter does not have ({_some(extra)})")
    both = sorted(slots.keys() & found.keys())
    misshapen = [
        f"{name}: {tuple(found[name].shape)} instead of {tuple(slots[name][1].shape)}"
        for name in both
        if found[name].shape != slots[name][1].shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of the wrong shape ({_some(misshapen)})")
    broken = [*broken] + [name for name in both if not found[name].is_meta and not torch.isfinite(found[name]).all()]
    if broken:
        problems.append(f"{len(broken)} with NaN or Inf ({_some(broken)})")
    if problems:
        raise AdapterFileError(
            f"The adapter file does not fit its config and this base model; tensors: {'; '.join(problems)}. Nothing "
            "was loaded. Load it onto the base model that adapter_config.json names, with the config it was saved with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_basis(layers: dict[str, TinyLoraLayer], found: dict[str, torch.Tensor], config: PeftConfig) -> None:
    """One product with each weight: are the factors singular factors of it?"""
    for name, layer in layers.items():
        if layer.stored_tensor().is_meta:
            continue
        module = _name_in_base_model(name)
        error = residual(layer.unmerged_matrix(), found[f"{module}.tinylora_A"], found[f"{module}.tinylora_B"])
        if error <= BASIS_TOLERANCE:
            continue
        message = (
            f"The adapter's basis is not that of this base model: module {module!r} has residual {error:.3g}, allowed "
            f"is {BASIS_TOLERANCE:g}. It was trained on other weights"
        )
        if config.base_model_name_or_path:
            message += f" ({config.base_model_name_or_path})"
        message += ", or on another quantization of these"
        if conventions_of(config).from_paper:
            raise BasisMismatchError(f"{message}: load it onto what it was trained on. Nothing was loaded.")
        warnings.warn(f"{message}, or holds other factors; its update is not the one that was trained.", stacklevel=2)
        return

"""The tensors of an adapter <-> the tensors of its file, `adapter_model.safetensors`.

The compact form, of which compact.py knows what is inside, is v alone; the factors come from the base model again:

    base_model.tinylora_v                        (groups, u)    the trained numbers

The portable form, which stock PEFT reads, has for each adapted module NAME of the base model and each of PEFT's groups G:

    base_model.model.NAME.tinylora_A             (r, in)        frozen factor
    base_model.model.NAME.tinylora_B             (out, r)       frozen factor
    base_model.model.NAME.tinylora_P             (u, r, r)      projections
    base_model.tinylora_v.G                      (u,)           the trained numbers

Where a config says how modules share v in a way that PEFT has not, PEFT's groups are the modules, each with a copy of its
v. transformers' own `save_pretrained` writes "base_model.model." before every key; loading takes either.

Nothing is loaded unless everything fits: a tensor that is missing, too many, of the wrong shape or not finite is an
error, and so is a basis of other weights than those of the model.
"""

import warnings
from collections.abc import Container, Iterable, Mapping

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from . import compact
from .adapter_files import is_finite
from .assignment import groups_of, read_from_file
from .basis import residual
from .compact import VECTORS
from .config import TinyLoraConfig, conventions_of
from .errors import AdapterFileError, BasisMismatchError
from .internals import name_without_fsdp
from .layer import TinyLoraLayer, layers_of
from .targets import find_targets


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
        config (`PeftConfig`): the adapter's. For a compact file, its `fingerprint` is set.
        adapter_name (`str`): its name.
        own (`dict`): what PEFT found in the state dict to belong to the adapter.
        state_dict (`dict`): the whole state dict of `model`.

    Returns:
        `dict[str, torch.Tensor]`
    """
    tensors = {key: tensor for key, tensor in own.items() if "tinylora_" not in key}
    layers = _adapted_layers(model, adapter_name)
    vectors_name, own_vectors = _vectors(model, adapter_name)
    # Where the state dict is one of gathered pieces, v is whole in it and not in the model.
    vectors = {group: state_dict.get(f"{vectors_name}.{adapter_name}.{group}", v) for group, v in own_vectors.items()}
    in_peft_model = vectors_name.startswith("base_model.")  # transformers writes prefixes itself
    prefix = "base_model." if in_peft_model else ""
    if _is_compact(config):
        packed = compact.pack(_base_of(model), config, adapter_name, _by_name(layers), vectors)
        tensors[f"{prefix}{VECTORS}.{adapter_name}"] = packed.pop(VECTORS)
        model_prefix = "base_model.model." if in_peft_model else ""
        return tensors | {f"{model_prefix}{key}.{adapter_name}": tensor for key, tensor in packed.items()}

    from_paper = conventions_of(config).from_paper
    for index, (name, layer) in enumerate(layers.items()):
        layer.ensure_basis(adapter_name)
        # PEFT would draw a projection that is not in the file by rules of its own.
        for kind, factor in _factors(layer, adapter_name, config.save_projection or from_paper):
            tensors[f"{name}.tinylora_{kind}.{adapter_name}"] = factor
        if from_paper:
            tensors[f"{prefix}{VECTORS}.{adapter_name}.{index}"] = vectors[layer.groups(adapter_name)[0]]
    if from_paper:
        config.adapted_modules = [layer.weight_names[adapter_name] for layer in layers.values()]
        return tensors
    return tensors | {f"{prefix}{VECTORS}.{adapter_name}.{group}": v for group, v in vectors.items()}


def tensors_to_load(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    state_dict: dict[str, torch.Tensor],
    file_config: PeftConfig | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a file under the names of the model's state dict, after all of them were checked.

    Args:
        model (`nn.Module`): the `PeftModel`, or the transformers model, with the adapter already in place.
        config (`PeftConfig`): the adapter's.
        adapter_name (`str`): the name that the adapter has in `model`.
        state_dict (`dict`): as read from the file; tensors that are not TinyLoRA's (biases, `modules_to_save`) are
            already under the names of the model.
        file_config (`PeftConfig`, *optional*): as it was saved with the file. Without it the adapter's own stands in,
            if that came from a file and its factors are still to be found; tensors that are given into an adapter that
            is there are not compared with any.

    Returns:
        `dict[str, torch.Tensor]`: v, A, B and P in the dtype of the model's own.

    Raises:
        AdapterFileError: if a tensor is missing, too many, misshapen or not finite, or the config was edited.
        BasisMismatchError: if the basis is of other weights than the model's. For a file in PEFT's layout, which may
            hold any factors, this is a warning.
    """
    layers = _adapted_layers(model, adapter_name)
    if not layers:
        return state_dict
    found = {_name_in_base_model(key): tensor for key, tensor in state_dict.items() if "tinylora_" in key}
    others = {key: tensor for key, tensor in state_dict.items() if "tinylora_" not in key}
    unknown = others.keys() - _known_names(model)
    # PEFT saves the biases of `modules_to_save` under a second name, which no model has.
    unknown = {key for key in unknown if ".modules_to_save." not in key}
    broken = [key for key, tensor in others.items() if tensor.is_floating_point() and not is_finite(tensor)]
    if len(found) + len(others) != len(state_dict):
        raise AdapterFileError("The adapter file has a tensor under two names. Nothing was loaded. Save it anew.")
    is_compact = VECTORS in found
    if file_config is None and read_from_file(config):
        is_awaited = any(layer.tinylora_A[adapter_name].is_meta for layer in layers.values())
        file_config = config if is_awaited else None
    fingerprint = None
    if is_compact:
        fingerprint = None if file_config is None else compact.fingerprint_of(file_config)
        found |= compact.unpack_vectors(config, found.pop(VECTORS), fingerprint)
    slots = _slots(model, config, adapter_name, layers, found if is_compact else None)
    has_copies = not is_compact and conventions_of(config).from_paper
    if has_copies:
        slots = _with_copies(slots, layers, adapter_name)
    _check(slots, found, sorted(unknown), broken)
    by_name = _by_name(layers)
    if has_copies:
        _one_for_each_group({name: layer.groups(adapter_name)[0] for name, layer in by_name.items()}, found)
    carried = {name: layer for name, layer in layers.items() if f"{_name_in_base_model(name)}.tinylora_A" in found}
    _check_basis(carried, found, config)
    bases = {}
    if fingerprint is not None:
        bases = compact.rebuild_bases(_base_of(model), config, fingerprint, adapter_name, by_name, found)

    # Nothing was changed up to here, and nothing can fail from here on.
    for name, basis in bases.items():
        by_name[name].set_basis(adapter_name, basis)
    for layer in carried.values():
        layer.basis_angles[adapter_name] = None
        for factors in (layer.tinylora_A, layer.tinylora_B):
            if factors[adapter_name].is_meta and layer.has_weight():
                factors[adapter_name] = torch.empty_like(factors[adapter_name], device=layer.compute_device())
    device = next(iter(layers.values())).compute_device()
    tensors = dict(others)
    for name, (key, slot) in slots.items():
        tensors[key] = found[name].to(device if slot.is_meta else slot.device, slot.dtype)
    # Not read from the file, but named here so that PEFT does not report them as missing.
    for name, layer in layers.items():
        for kind, factor in _factors(layer, adapter_name, with_projection=True):
            tensors.setdefault(f"{name}.tinylora_{kind}.{adapter_name}", factor)
    return tensors


def damaged_file(error: SafetensorError) -> AdapterFileError:
    """What to raise for a file that safetensors cannot read."""
    return AdapterFileError(
        f"The adapter file is cut short or damaged ({str(error)[:200]}). Nothing was loaded. Save or download it again."
    )


def _is_compact(config: PeftConfig) -> bool:
    return isinstance(config, TinyLoraConfig) and (config.is_compact or not config.stock_peft_can_follow)


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _by_name(layers: Mapping[str, TinyLoraLayer]) -> dict[str, TinyLoraLayer]:
    return {_name_in_base_model(name): layer for name, layer in layers.items()}


def _with_copies(
    slots: dict[str, tuple[str, torch.Tensor]], layers: Mapping[str, TinyLoraLayer], adapter_name: str
) -> dict[str, tuple[str, torch.Tensor]]:
    """Slots of v for each group -> for each module, as a portable file has them."""
    copies = {f"{VECTORS}.{index}": layer.groups(adapter_name)[0] for index, layer in enumerate(layers.values())}
    others = {name: slot for name, slot in slots.items() if not name.startswith(f"{VECTORS}.")}
    return others | {name: slots[f"{VECTORS}.{group}"] for name, group in copies.items()}


def _one_for_each_group(groups: Mapping[str, str], found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A portable file's copies of v, one for each module -> one for each group; raises where they differ.

    Args:
        groups (`Mapping[str, str]`): module -> group, in model order.
        found (`Mapping[str, torch.Tensor]`): "tinylora_v.INDEX" -> v (u,), one for each module.
    """
    grouped: dict[str, torch.Tensor] = {}
    for index, (name, group) in enumerate(groups.items()):
        v = found[f"{VECTORS}.{index}"]
        if not torch.equal(grouped.setdefault(f"{VECTORS}.{group}", v), v):
            raise AdapterFileError(
                f"The adapter file has other numbers for module {name!r} than for a module that shares them: `tie` or "
                "`n_tie` was edited in adapter_config.json, or v was trained without this package. Nothing was loaded. "
                "Name `tie` as the file was trained, 'none' for stock PEFT."
            )
    return grouped


def unpack_file(
    model: nn.Module, config: TinyLoraConfig, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a file, in either form, with one v for each group, under the prefix that transformers reads.

    Args:
        model (`nn.Module`): the transformers model, without the adapter.
        config ([`TinyLoraConfig`]): the adapter's.
        state_dict (`Mapping[str, torch.Tensor]`): as read from the file.

    Raises:
        AdapterFileError: as [`tensors_to_load`].
    """
    others = {key: tensor for key, tensor in state_dict.items() if not _name_in_base_model(key).startswith(VECTORS)}
    found = {_name_in_base_model(key): tensor for key, tensor in state_dict.items() if key not in others}
    if VECTORS in found:
        found = compact.unpack_vectors(config, found[VECTORS], compact.fingerprint_of(config))
    else:
        groups = {name: str(group) for name, group in groups_of(find_targets(model, config), config).items()}
        copies = [f"{VECTORS}.{index}" for index in range(len(groups))]
        _check({name: ("", found.get(name, torch.empty(config.u))) for name in copies}, found)
        found = _one_for_each_group(groups, found)
    return others | {f"base_model.model.{name}": v for name, v in found.items()}


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
    is_compact = isinstance(config, TinyLoraConfig) and config.format_version is not None
    keys, in_file = {*keys}, None
    if is_compact:
        # transformers found those factors missing that are not in the file, and left their buffers with any numbers.
        factors = {
            f"{name}.tinylora_{kind}.{adapter_name}": f"{_name_in_base_model(name)}.tinylora_{kind}"
            for name in layers
            for kind in "ABP"
        }
        in_file = {name for key, name in factors.items() if key not in keys}
        keys -= factors.keys()
    carried = {name for name in layers if in_file is None or f"{_name_in_base_model(name)}.tinylora_A" in in_file}
    slots = _slots(model, config, adapter_name, layers, in_file)
    by_key = {key: name for name, (key, _) in slots.items()}
    wrong = {by_key.get(key, key) for key in keys}
    found = {name: slot for name, (_, slot) in slots.items() if name not in wrong}
    found |= {name: torch.empty(0) for name in wrong - slots.keys()}
    _check(slots, found)
    _check_basis({name: layer for name, layer in layers.items() if name in carried}, found, config)
    if is_compact:
        by_name, saved = _by_name(layers), compact.fingerprint_of(config)
        for name, basis in compact.rebuild_bases(_base_of(model), config, saved, adapter_name, by_name, found).items():
            by_name[name].set_basis(adapter_name, basis)


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, TinyLoraLayer]:
    """Name in the state dict of `model` -> layer, for those that have the adapter."""
    return {
        name_without_fsdp(name): layer for name, layer in layers_of(model).items() if adapter_name in layer.tinylora_A
    }


def _vectors(model: nn.Module, adapter_name: str) -> tuple[str, nn.ParameterDict]:
    """Name in the state dict of the dictionary of all vectors, and the vectors of one adapter."""
    shared = next(iter(_adapted_layers(model, adapter_name).values())).tinylora_v
    name = next(name for name, module in model.named_modules() if module is shared)
    return name_without_fsdp(name), shared[adapter_name]


def _slots(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str,
    layers: dict[str, TinyLoraLayer],
    in_file: Container[str] | None,
) -> dict[str, tuple[str, torch.Tensor]]:
    """Name in the base model -> key in the state dict of `model`, and the tensor that is there now.

    Of a compact file, `in_file` says which factors it has; of another, all must be there.
    """
    vectors_name, vectors = _vectors(model, adapter_name)
    slots = {f"tinylora_v.{group}": (f"{vectors_name}.{adapter_name}.{group}", v) for group, v in vectors.items()}
    for name, layer in layers.items():
        short = _name_in_base_model(name)
        has_factors = in_file is None or any(f"{short}.tinylora_{kind}" in in_file for kind in "AB")
        has_projection = config.save_projection if in_file is None else f"{short}.tinylora_P" in in_file
        for kind, tensor in _factors(layer, adapter_name, with_projection=True):
            if has_projection if kind == "P" else has_factors:
                slots[f"{short}.tinylora_{kind}"] = (f"{name}.tinylora_{kind}.{adapter_name}", tensor)
    return slots


def _factors(layer: TinyLoraLayer, adapter_name: str, with_projection: bool) -> list[tuple[str, torch.Tensor]]:
    factors = [("A", layer.tinylora_A[adapter_name]), ("B", layer.tinylora_B[adapter_name])]
    return factors + [("P", layer.tinylora_P[adapter_name])] * with_projection


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
    broken = [*broken] + [name for name in both if not found[name].is_meta and not is_finite(found[name])]
    if broken:
        problems.append(f"{len(broken)} with NaN or Inf ({_some(broken)})")
    if problems:
        raise AdapterFileError(
            f"The adapter file does not fit its config and this base model; tensors: {'; '.join(problems)}. Nothing "
            "was loaded. Load it onto the base model that adapter_config.json names, with the config it was saved with."
        )


def _some(names: list[str]) -> str:
    return ", ".join(name[:100] for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _check_basis(layers: dict[str, TinyLoraLayer], found: dict[str, torch.Tensor], config: PeftConfig) -> None:
    """One product with each weight: are the factors singular factors of it?"""
    for name, layer in layers.items():
        if not layer.has_weight():
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
            message += f" ({config.base_model_name_or_path[:100]})"
        message += ", or on another quantization of these"
        if conventions_of(config).from_paper:
            raise BasisMismatchError(f"{message}: load it onto what it was trained on. Nothing was loaded.")
        warnings.warn(f"{message}, or holds other factors; its update is not the one that was trained.", stacklevel=2)
        return

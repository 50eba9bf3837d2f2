"""The compact form of an adapter file: v alone, as one tensor (groups, u), and in the config what its factors are.

    base_model.tinylora_v                        (groups, u)   float32, or what `save_dtype` says
    base_model.model.NAME.tinylora_A, _B, _P                   only of a module whose factors the base does not determine

Saving says in `config.fingerprint` what the factors are known again by: "weights", the form of the base's weights;
"modules", a sketch of A, B and P of each module; "groups", which v each module reads; "v", a digest of the tensor.
Loading takes the factors from the base again and refuses them unless all of it fits. docs/format.md has the rules.
"""

import functools
import warnings
from collections.abc import Mapping

import torch
from peft import PeftConfig
from torch import nn

from . import fingerprint
from .assignment import projection_of, request_of
from .basis import Basis
from .build import Request, build_bases
from .config import FORMAT_VERSION, TinyLoraConfig, conventions_of
from .errors import AdapterFileError, BasisMismatchError
from .layer import TinyLoraLayer
from .source import FLOAT, WeightSource


VECTORS = "tinylora_v"  # the one tensor, without PEFT's prefix
# The distance of a sketch that is accepted on loading: about the relative error of the update.
SKETCH_TOLERANCE = 0.02
# Relative difference of factors from those of the base up to which they are left out of the file.
SAME_FACTORS = 1e-3
MOST_CHARACTERS = 200  # in the fingerprint, but for "modules"
LOAD_APART = "Load it by model.load_adapter(...), and open a bank over that for others like it. Nothing was added."
ANOTHER_BASIS = "The adapter was trained with another basis than that of this base model"


def pack(
    base_model: nn.Module,
    config: TinyLoraConfig,
    adapter_name: str,
    layers: Mapping[str, TinyLoraLayer],
    vectors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tensors of a compact file, and `config.fingerprint` to go with them.

    Args:
        base_model (`nn.Module`): the model that the adapter is in.
        config ([`TinyLoraConfig`]): the adapter's; its `fingerprint` and `format_version` are set.
        adapter_name (`str`): its name in the layers.
        layers (`Mapping[str, TinyLoraLayer]`): name in the base model -> layer, in model order.
        vectors (`Mapping[str, torch.Tensor]`): group -> v (u,).

    Returns:
        `dict[str, torch.Tensor]`: "tinylora_v", and "NAME.tinylora_A" and so on for what the base does not determine.

    Raises:
        AdapterFileError: if the factors were never computed, the base being on the meta device.
    """
    v = torch.stack([vectors[group].detach() for group in sorted(vectors, key=int)])
    if config.save_dtype is not None:
        v = v.to(getattr(torch, config.save_dtype))
    tensors = {VECTORS: v}
    source = WeightSource(base_model, config, layers.values())
    _compare_with_base(source, config, adapter_name, layers)
    sketches = []
    for index, (name, layer) in enumerate(layers.items()):
        basis, P = layer.basis(adapter_name), layer.tinylora_P[adapter_name]
        if basis.A.is_meta:
            raise AdapterFileError(
                f"The factors of module {name!r} cannot be described: its weight is on the meta device. Load the base "
                "model's weights before saving."
            )
        sketches.append(fingerprint.sketch(basis, P))
        if not basis.determined or config.save_basis:
            tensors |= {f"{name}.tinylora_A": basis.A, f"{name}.tinylora_B": basis.B}
        names, r = layer.matrix_names[adapter_name], layer.r[adapter_name]
        seeded = projection_of(config, names, index, r, stacked=P.ndim == 4).to(P)
        if not torch.allclose(seeded, P, rtol=1e-4, atol=1e-5):
            tensors[f"{name}.tinylora_P"] = P
    config.format_version = FORMAT_VERSION
    config.fingerprint = {
        "weights": source.form,
        "modules": fingerprint.encode(sketches),
        "groups": digest_of_groups(layers, adapter_name),
        "v": fingerprint.digest_of_tensor(v),
    }
    return tensors


def unpack_vectors(config: PeftConfig, v: torch.Tensor, saved: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
    """The one tensor of a compact file -> "tinylora_v.GROUP" (u,).

    Args:
        config (`PeftConfig`): the adapter's.
        v (`torch.Tensor`): shape (groups, u).
        saved (`Mapping[str, str]`, *optional*): the fingerprint that was saved with the tensor, if there is one.

    Raises:
        AdapterFileError: if the tensor does not fit the config, or is not the one that the fingerprint was saved with.
    """
    check_shape(config, tuple(v.shape))
    if saved is not None and fingerprint.digest_of_tensor(v) != saved["v"]:
        raise AdapterFileError(
            "The numbers in the adapter file are not those that adapter_config.json was saved with. Nothing was "
            "loaded. Take both files from the same save, or download the adapter again."
        )
    return {f"{VECTORS}.{group}": numbers for group, numbers in enumerate(v)}


def check_shape(config: PeftConfig, shape: tuple[int, ...]) -> None:
    """Raise an [`AdapterFileError`] unless `shape`, that of the one tensor of a compact file, is (groups, u)."""
    if len(shape) != 2 or shape[1] != config.u:
        raise AdapterFileError(
            f"The adapter file does not fit its config: {VECTORS} has shape {shape}, and u={config.u} asks for "
            f"(groups, {config.u}). Nothing was loaded. Load the file with the config it was saved with."
        )


def rebuild_bases(
    base_model: nn.Module,
    config: PeftConfig,
    saved: Mapping[str, str],
    adapter_name: str,
    layers: Mapping[str, TinyLoraLayer],
    found: Mapping[str, torch.Tensor],
) -> dict[str, Basis]:
    """The factors of a compact file's adapter, taken from the base model and compared with its fingerprint.

    Args:
        base_model (`nn.Module`): the model that the adapter is in.
        config (`PeftConfig`): the adapter's.
        saved (`Mapping[str, str]`): the fingerprint that was saved with the file.
        adapter_name (`str`): its name in the layers.
        layers (`Mapping[str, TinyLoraLayer]`): name in the base model -> layer, in model order.
        found (`Mapping[str, torch.Tensor]`): the tensors of the file, "NAME.tinylora_A" and so on.

    Returns:
        `dict[str, Basis]`: by name, without those that are in the file, and without those whose weight is on the meta
        device, which are computed and compared at their first use.

    Raises:
        AdapterFileError: if the config was edited: names what does not fit.
        BasisMismatchError: if the factors are not those that v was trained with; names the module and what to do.
    """
    sketches = fingerprint.decode(saved["modules"], (layer.r[adapter_name] for layer in layers.values()))
    if digest_of_groups(layers, adapter_name) != saved["groups"]:
        raise AdapterFileError(
            "The adapter's modules do not read the numbers that they read when it was saved: `tie`, `n_tie`, "
            "`weight_tying` or `target_modules` was edited in its config, or this is another base model. "
            "Nothing was loaded."
        )
    source = WeightSource(base_model, config, layers.values())
    if source.form != saved["weights"] and config.basis != "unchecked":
        raise BasisMismatchError(_other_form(saved["weights"], source.form))
    checks = {
        name: functools.partial(
            _checked, config=config, name=name, saved=sketch, trained=saved["weights"], weights=source.form
        )
        for name, sketch in zip(layers, sketches, strict=True)
    }
    bases, requests = {}, []
    for index, (name, layer) in enumerate(layers.items()):
        P = found.get(f"{name}.tinylora_P", layer.tinylora_P[adapter_name])
        if f"{name}.tinylora_A" in found:
            basis = Basis(found[f"{name}.tinylora_A"], found[f"{name}.tinylora_B"])
            if not _fits(basis, P, sketches[index]):
                raise AdapterFileError(
                    f"The factors of module {name!r} in the adapter file, or its projection, are not those that the "
                    "adapter was trained with. Nothing was loaded. Take both files from the same save."
                )
        elif not layer.has_weight():
            layer.check_basis_with(adapter_name, checks[name])
        elif not layer.tinylora_A[adapter_name].is_meta and _fits(layer.basis(adapter_name), P, sketches[index]):
            bases[name] = layer.basis(adapter_name)  # another adapter's, or those of a run that resumes
        else:
            requests.append(_request(source, layer, adapter_name))
    built = _build(source, config, requests)
    for name, layer in layers.items():
        computed = built.get(layer.weight_names[adapter_name])
        if computed is not None:
            P = found.get(f"{name}.tinylora_P", layer.tinylora_P[adapter_name])
            bases[name] = checks[name](computed, P)
    if config.basis == "unchecked":
        saved_by_name = dict(zip(layers, sketches, strict=True))
        _warn_of_another({name: fingerprint.factor_distance(b, saved_by_name[name]) for name, b in bases.items()})
    return bases


def check_same_basis(
    source: str, saved: Mapping[str, str], adapter_name: str, layers: Mapping[str, TinyLoraLayer]
) -> None:
    """Check that a compact file's v means on the factors of an adapter in the model what it meant when it was trained.

    Args:
        source (`str`): the file's folder or Hub id, for the message.
        saved (`Mapping[str, str]`): the fingerprint that was saved with the file.
        adapter_name (`str`): the adapter whose factors are meant.
        layers (`Mapping[str, TinyLoraLayer]`): name in the base model -> layer, in model order.

    Raises:
        AdapterFileError: if the modules are others, or read other numbers.
        BasisMismatchError: if a module's factors or projection are others; names it.
    """
    if digest_of_groups(layers, adapter_name) != saved["groups"]:
        raise AdapterFileError(
            f"{source}: its modules are not those of adapter {adapter_name!r}, or do not share numbers as those do "
            f"(`target_modules`, `tie`, `n_tie`). {LOAD_APART}"
        )
    sketches = fingerprint.decode(saved["modules"], (layer.r[adapter_name] for layer in layers.values()))
    for (name, layer), sketch in zip(layers.items(), sketches, strict=True):
        found = distances(layer.basis(adapter_name), layer.tinylora_P[adapter_name], sketch)
        if not are_within_tolerance(found):
            raise BasisMismatchError(
                f"{source} was trained with another basis or projection than adapter {adapter_name!r} has: module {name!r} "
                f"differs by {found[0]:.2g} and {found[1]:.2g}, allowed is {SKETCH_TOLERANCE:g}. {LOAD_APART}"
            )


def sketches_of(layers: Mapping[str, TinyLoraLayer], adapter_name: str) -> list[torch.Tensor]:
    """The sketch of the factors and the projection of each module."""
    return [fingerprint.sketch(layer.basis(adapter_name), layer.tinylora_P[adapter_name]) for layer in layers.values()]


def distances(basis: Basis, P: torch.Tensor, saved: torch.Tensor) -> tuple[float, float]:
    """Estimates of the relative distances of factors, and of a projection, from those that `saved` is a sketch of."""
    return fingerprint.factor_distance(basis, saved), fingerprint.projection_distance(P, saved)


def are_within_tolerance(distances: tuple[float, float]) -> bool:
    """Whether both are small enough to be rounding; NaN is not."""
    return all(distance <= SKETCH_TOLERANCE for distance in distances)


def _checked(
    basis: Basis, P: torch.Tensor, *, config: PeftConfig, name: str, saved: torch.Tensor, trained: str, weights: str
) -> Basis:
    """`basis` with the signs of the one that v was trained with; raises if it is another."""
    basis = fingerprint.align(basis, saved)
    if not fingerprint.projection_distance(P, saved) <= SKETCH_TOLERANCE:
        raise AdapterFileError(
            f"The projection of module {name!r} is not the one that the adapter was trained with: projection_seed="
            f"{config.projection_seed}, r or u is not what it was saved with. Nothing was loaded."
        )
    of_factors = fingerprint.factor_distance(basis, saved)
    if of_factors <= SKETCH_TOLERANCE or config.basis == "unchecked":
        return basis
    trained_on = f"It was trained on {(config.base_model_name_or_path or 'a model without a name')[:100]}"
    raise BasisMismatchError(
        f"{ANOTHER_BASIS}: module {name!r} differs by {of_factors:.2g}, allowed is {SKETCH_TOLERANCE:g}. {trained_on} "
        f"({trained} weights; here {weights}): load that, in the dtype it was trained in, or set "
        "basis='unchecked' in its config to use the basis at hand all the same. Nothing was loaded."
    )


def _warn_of_another(distances: Mapping[str, float]) -> None:
    """One warning for all modules whose basis is another one than that of training, where the user took it unchecked."""
    others = {name: distance for name, distance in distances.items() if not distance <= SKETCH_TOLERANCE}
    if others:
        worst = max(others, key=others.__getitem__)
        warnings.warn(
            f"{ANOTHER_BASIS}: {len(others)} of {len(distances)} modules differ, most of all {worst!r} by "
            f"{others[worst]:.2g}. The update is another one here.",
            stacklevel=2,
        )


def _fits(basis: Basis, P: torch.Tensor, saved: torch.Tensor) -> bool:
    """Whether these are the factors, signs included, and the projection that `saved` is a sketch of."""
    return are_within_tolerance(distances(basis, P, saved))


def _other_form(trained: str, weights: str) -> str:
    message = (
        f"The adapter's basis is that of {trained} weights, and the base model's are {weights} here. Nothing was loaded. "
        "Load the base model as it was trained on"
    )
    if trained == FLOAT:
        message += ", or take the basis from its original weights: set basis='full-precision' in the adapter's config"
    else:
        message += (
            ", or use the basis at hand, with an update that is another one: set basis='unchecked' in its config"
        )
    return f"{message}, and pass it as PeftModel.from_pretrained(..., config=config)."


def fingerprint_of(config: PeftConfig) -> dict[str, str]:
    """The fingerprint in a config that was saved with a compact file; raises [`AdapterFileError`] if it is not whole."""
    saved = config.fingerprint if isinstance(config, TinyLoraConfig) else None
    wanted = ("weights", "modules", "groups", "v")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), str) for key in wanted):
        raise AdapterFileError(
            "The adapter file is a compact one, and adapter_config.json has no whole `fingerprint` of its factors: "
            f"{', '.join(wanted)}. Nothing was loaded. Take both files from the same save."
        )
    for key in ("weights", "groups", "v"):
        if len(saved[key]) > MOST_CHARACTERS:
            raise AdapterFileError(
                f"`fingerprint` in adapter_config.json has {len(saved[key])} characters in {key!r}, and a saved one a few. "
                "Nothing was loaded. Take both files from the same save."
            )
    return saved


def _request(source: WeightSource, layer: TinyLoraLayer, adapter_name: str) -> Request:
    return request_of(source, layer.weight_names[adapter_name], layer, layer.r[adapter_name])


def _build(source: WeightSource, config: PeftConfig, requests: list[Request]) -> dict[str, Basis]:
    # Truncated also for conventions of PEFT: the fingerprint says which signs LAPACK had.
    return build_bases(requests, source, sigma=conventions_of(config).sigma, canonical=True)


def _compare_with_base(
    source: WeightSource, config: PeftConfig, adapter_name: str, layers: Mapping[str, TinyLoraLayer]
) -> None:
    """Find out of factors that came from a file, or from LAPACK, whether the base determines them."""
    from_paper = conventions_of(config).from_paper
    requests = []
    for layer in layers.values():
        angle = layer.basis_angles[adapter_name]
        unknown = angle is None or (not from_paper and angle == float("inf"))
        if unknown and layer.has_weight() and not layer.tinylora_A[adapter_name].is_meta:
            requests.append(_request(source, layer, adapter_name))
    computed_bases = _build(source, config, requests)
    for layer in layers.values():
        computed = computed_bases.get(layer.weight_names[adapter_name])
        if computed is None:
            continue
        given, P = layer.basis(adapter_name), layer.tinylora_P[adapter_name]
        computed = fingerprint.align(computed, fingerprint.sketch(given, P))
        same = all(_relative(a, b) <= SAME_FACTORS for a, b in ((given.A, computed.A), (given.B, computed.B)))
        layer.basis_angles[adapter_name] = computed.angle if same else float("inf")


def _relative(given: torch.Tensor, computed: torch.Tensor) -> float:
    return ((given - computed).norm() / computed.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()


def digest_of_groups(layers: Mapping[str, TinyLoraLayer], adapter_name: str) -> str:
    """16 hex digits for which v each matrix of an adapter reads."""
    groups: dict[str, str] = {}
    for layer in layers.values():
        groups |= zip(layer.matrix_names[adapter_name], layer.groups(adapter_name), strict=True)
    return fingerprint.digest_of_groups(groups)

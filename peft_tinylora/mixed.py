"""A batch in which every row has an adapter of its own: names -> a v for each row -> R (rows, r, r) in each module.

Adapters over one basis share A, B and P and differ in v alone, so a batch of them costs the products of one adapter and,
between them, an r x r matrix for each row. Those over other bases go through the layers once more, with v = 0 in
the rows that are not theirs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from .experts import ParamWrapper
from .internals import adapters_of
from .layer import TinyLoraLayer, layers_of
from .vector import Vectors


BASE = "__base__"  # PEFT's name for a row without an adapter


class Rows:
    """The rows of a batch that one basis serves; v is zero in the others.

    Args:
        adapter_name (`str`): the adapter of the model whose A, B and P they have.
        vectors (`torch.Tensor`): shape (rows, groups, u).
    """

    def __init__(self, adapter_name: str, vectors: torch.Tensor) -> None:
        self.adapter_name, self.vectors = adapter_name, vectors
        self._mixing: dict[int, torch.Tensor] = {}

    def mixing_matrices(self, layer: TinyLoraLayer) -> torch.Tensor:
        """R of each row in a module, shape (rows, r, r); kept, since the v of a batch stay as they are."""
        if layer.position not in self._mixing:
            [group] = layer.groups(self.adapter_name)
            P = layer.tinylora_P[self.adapter_name]
            v = self.vectors[:, layer.tinylora_v.groups_of(self.adapter_name).index(group)].to(P)
            self._mixing[layer.position] = (v @ P.flatten(1)).view(-1, *P.shape[1:])
        return self._mixing[layer.position]


class Batch:
    """What the layers are told of a mixed batch.

    Args:
        served (`Sequence[Rows]`): by basis.
        size (`int`): number of rows.
        copies (`int`): how often `generate` repeats each row, for beams or several sequences.
    """

    def __init__(self, served: Sequence[Rows], size: int, copies: int) -> None:
        self.size = size
        self._by_size = {size: served}
        if copies > 1:
            self._by_size[size * copies] = [
                Rows(rows.adapter_name, rows.vectors.repeat_interleave(copies, dim=0)) for rows in served
            ]

    def rows(self, layer: TinyLoraLayer, size: int) -> list[Rows]:
        """Those that `layer` has factors for, in a batch of `size` rows; raises `ValueError` if that is another batch."""
        if size not in self._by_size:
            [name] = set(layer.weight_names.values())
            raise ValueError(
                f"adapter_names has {self.size} names, and module {name!r} sees {size} rows: give one name for each row "
                f"of the batch, {BASE!r} for none. Modules that see something else than its rows (flattened tokens, "
                "positions, images) cannot take part."
            )
        return [rows for rows in self._by_size[size] if rows.adapter_name in layer.tinylora_A]


@contextmanager
def mixed_batch(
    model: nn.Module,
    vectors: Vectors,
    adapter_names: Sequence[str],
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> Iterator[None]:
    """While this lasts, the layers of `model` take each row's adapter from `adapter_names`, in this thread.

    A layer goes by the first dimension of what it is given. What has another meaning there than rows (a model that computes
    the sequence first, or an image tower) is refused where the number differs, and cannot be told where it is the same.

    Args:
        model (`nn.Module`): the base model, with the layers in it.
        vectors ([`Vectors`]): theirs.
        adapter_names (`Sequence[str]`): an adapter of the model or of a bank over one, or `"__base__"`, for each row.
        args, options: what `forward` or `generate` was called with beside it.

    Raises:
        ValueError: if a name is unknown, or the model cannot compute a mixed batch; nothing was computed.
        TypeError: if `adapter_names` is no list of names.
    """
    thread, batches = get_ident(), vectors.mixed_batches
    outer = batches.get(thread)  # of a model that is called while it generates
    batch = batches[thread] = _make_batch(model, vectors, adapter_names, args, options)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [_tell(wrapper, batches, batch, list(adapter_names)) for wrapper in wrappers]
    try:
        yield
    finally:
        if outer is None:
            del batches[thread]
        else:
            batches[thread] = outer
        for handle in handles:
            handle.remove()


@torch.compiler.disable
def _make_batch(
    model: nn.Module,
    vectors: Vectors,
    adapter_names: Sequence[str],
    args: Sequence[Any],
    options: Mapping[str, Any],
) -> Batch:
    layers = [layer for layer in layers_of(model).values() if layer.weight_names]
    _check(model, layers, adapter_names)
    return Batch(_served(layers, vectors, adapter_names), len(adapter_names), _copies(model, args, options))


def _check(model: nn.Module, layers: Sequence[TinyLoraLayer], adapter_names: Sequence[str]) -> None:
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r}: a list of adapter names is needed, one for each row.")
    if model.training:
        raise ValueError("adapter_names is for inference, and the model is in training mode: call model.eval() first.")
    for layer in layers:
        name = next(iter(layer.weight_names.values()))
        if layer.merged:
            raise ValueError(f"adapter_names needs the base weights, and adapters are merged into {name!r}: unmerge.")
        if isinstance(layer, ParamWrapper) or ".experts." in name:
            raise ValueError(
                f"adapter_names: {name!r} belongs to experts, which see tokens and not the rows of a batch. Run one "
                "batch for each adapter, with model.set_adapter(name)."
            )


# One of these among the options tells `generate` from `forward`.
GENERATION_OPTIONS = frozenset(
    ("generation_config", "do_sample", "max_length", "max_new_tokens", "min_new_tokens", "num_beams")
    + ("num_return_sequences", "stopping_criteria", "logits_processor")
)


def _copies(model: nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row of its batch before it decodes; 1 for `forward`."""
    given = [options.get("generation_config"), *(arg for arg in args if isinstance(arg, GenerationConfig))]
    if not GENERATION_OPTIONS & options.keys() and not any(given):
        return 1
    configs = [config for config in (*given, getattr(model, "generation_config", None)) if config is not None]
    found = []
    for name in ("num_beams", "num_return_sequences"):
        values = [options.get(name), *(getattr(config, name, None) for config in configs)]
        found.append(next((value for value in values if value is not None), 1))
    return max(found)


def _served(layers: Sequence[TinyLoraLayer], vectors: Vectors, adapter_names: Sequence[str]) -> list[Rows]:
    """The rows by basis: adapters with the same factors, and those of a bank over one of them, go together."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(adapter_names):
        places.setdefault(name, []).append(place)
    places.pop(BASE, None)
    served: dict[str, torch.Tensor] = {}
    for name, (holder, v) in _found(vectors, places).items():
        basis = next((other for other in served if have_same_basis(layers, vectors, holder, other)), holder)
        if basis not in served:
            dtype = torch.promote_types(v.dtype, torch.float32)
            served[basis] = v.new_zeros(len(adapter_names), *v.shape, dtype=dtype, device="cpu")
        served[basis][places[name]] = v.to(served[basis])
    return [Rows(basis, v.to(vectors.vectors_of(basis).device)) for basis, v in served.items()]


def _found(vectors: Vectors, names: Iterable[str]) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> the adapter of the model whose factors it has, and its v (groups, u)."""
    found, banks, unknown = {}, {}, []
    for name in names:
        bank = vectors.bank_with(name)
        try:
            v = vectors.vectors_of(name) if bank is None else bank[name]
        except KeyError:
            unknown.append(name)  # also one that another thread removes just now
            continue
        if bank is not None:
            banks[bank.adapter_name] = bank
        found[name] = (name if bank is None else bank.adapter_name), v
    if unknown:
        held = ", ".join(map(repr, [*vectors][:10]))
        others = f", and {sum(map(len, vectors.adapter_banks.values()))} in banks" if vectors.adapter_banks else ""
        raise ValueError(
            f"adapter_names has unknown adapters: {', '.join(map(repr, sorted(unknown)[:10]))}. The model has {held}{others}."
        )
    for bank in banks.values():
        bank.check_factors()
    return found


def have_same_basis(layers: Sequence[TinyLoraLayer], vectors: Vectors, name: str, other: str) -> bool:
    """Whether two adapters of a model differ in nothing but v."""
    return name == other or (
        vectors.groups_of(name) == vectors.groups_of(other)
        and all(layer.has_same_factors(name, other) for layer in layers)
    )


def _tell(
    wrapper: AuxiliaryTrainingWrapper, batches: Mapping[int, Batch], batch: Batch, adapter_names: list[str]
) -> RemovableHandle:
    """Have a module that was trained whole, for `modules_to_save`, take the rows of this batch as PEFT does."""
    adapters = adapters_of(wrapper)
    known = [name if name in adapters else BASE for name in adapter_names]

    def tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if batches.get(get_ident()) is not batch:  # another thread's pass through the same module
            return args, kwargs
        copies = len(args[0]) // max(1, len(known))
        return args, {**kwargs, "adapter_names": [name for name in known for _ in range(max(1, copies))]}

    return wrapper.register_forward_pre_hook(tell, with_kwargs=True)

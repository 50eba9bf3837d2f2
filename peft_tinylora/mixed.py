"""A batch in which every row has an adapter of its own: names -> a v for each row -> R (rows, r, r) in each module.

Adapters over one basis share A, B and P and differ in v alone, so a batch of them costs the products of one adapter and,
between them, an r x r matrix for each row. Those over other bases go through the layers once more, with v = 0 in
the rows that are not theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .experts import ParamWrapper
from .layer import TinyLoraLayer
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
        self._by_size = {
            size: list(served),
            size * copies: [Rows(rows.adapter_name, rows.vectors.repeat_interleave(copies, dim=0)) for rows in served],
        }

    def rows(self, layer: TinyLoraLayer, size: int) -> list[Rows]:
        """Those that `layer` has factors for, in a batch of `size` rows; raises `ValueError` if that is another batch."""
        if size not in self._by_size:
            [name] = set(layer.weight_names.values())
            raise ValueError(
                f"adapter_names has {self.size} names, and module {name!r} sees {size} rows: give one name for each row "
                f"of the batch, {BASE!r} for none."
            )
        return [rows for rows in self._by_size[size] if rows.adapter_name in layer.tinylora_A]


@contextmanager
def mixed_batch(
    model: nn.Module, vectors: Vectors, adapter_names: Sequence[str], options: Mapping[str, Any]
) -> Iterator[None]:
    """While this lasts, the layers of `model` take each row's adapter from `adapter_names`, in this thread.

    Args:
        model (`nn.Module`): the base model, with the layers in it.
        vectors ([`Vectors`]): theirs.
        adapter_names (`Sequence[str]`): an adapter of the model or of a bank over one, or `"__base__"`, for each row.
        options (`Mapping[str, Any]`): what `forward` or `generate` was called with beside it.

    Raises:
        ValueError: if a name is unknown, or the model cannot compute a mixed batch; nothing was computed.
        TypeError: if `adapter_names` is no list of names.
    """
    vectors.mixed_batches[get_ident()] = _make_batch(model, vectors, adapter_names, options)
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    handles = [_tell(wrapper, adapter_names) for wrapper in wrappers]
    try:
        yield
    finally:
        del vectors.mixed_batches[get_ident()]
        for handle in handles:
            handle.remove()


@torch.compiler.disable
def _make_batch(model: nn.Module, vectors: Vectors, adapter_names: Sequence[str], options: Mapping[str, Any]) -> Batch:
    layers = [module for module in model.modules() if isinstance(module, TinyLoraLayer)]
    _check(model, layers, vectors, adapter_names)
    return Batch(_served(layers, vectors, adapter_names), len(adapter_names), _copies(model, options))


def _check(model: nn.Module, layers: Sequence[TinyLoraLayer], vectors: Vectors, adapter_names: Sequence[str]) -> None:
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"adapter_names={adapter_names!r}: a list of adapter names is needed, one for each row.")
    if model.training:
        raise ValueError("adapter_names is for inference, and the model is in training mode: call model.eval() first.")
    unknown = sorted(name for name in {*adapter_names} - {BASE, *vectors} if vectors.bank_with(name) is None)
    if unknown:
        held = ", ".join(map(repr, [*vectors][:10]))
        banks = f", and {sum(map(len, vectors.adapter_banks.values()))} in banks" if vectors.adapter_banks else ""
        raise ValueError(
            f"adapter_names has unknown adapters: {', '.join(map(repr, unknown[:10]))}. The model has {held}{banks}."
        )
    for layer in layers:
        name = next(iter(layer.weight_names.values()))
        if layer.merged:
            raise ValueError(f"adapter_names needs the base weights, and adapters are merged into {name!r}: unmerge.")
        if isinstance(layer, ParamWrapper) or ".experts." in name:
            raise ValueError(
                f"adapter_names: {name!r} belongs to experts, which see tokens and not the rows of a batch. Run one "
                "batch for each adapter, with model.set_adapter(name)."
            )


def _copies(model: nn.Module, options: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row of its batch before it decodes."""
    defaults = options.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [
        options.get(name) or getattr(defaults, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    ]
    return max(wanted)


def _served(layers: Sequence[TinyLoraLayer], vectors: Vectors, adapter_names: Sequence[str]) -> list[Rows]:
    """The rows by basis: adapters with the same factors, and those of a bank over one of them, go together."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(adapter_names):
        places.setdefault(name, []).append(place)
    places.pop(BASE, None)
    served: dict[str, torch.Tensor] = {}
    for name, own in places.items():
        bank = vectors.bank_with(name)
        holder = name if bank is None else bank.adapter_name
        basis = next((other for other in served if have_same_basis(layers, vectors, holder, other)), holder)
        if basis not in served:
            table = vectors.vectors_of(basis)
            served[basis] = table.new_zeros(len(adapter_names), *table.shape)
        served[basis][own] = (vectors.vectors_of(name) if bank is None else bank[name]).to(served[basis])
    return [Rows(basis, v) for basis, v in served.items()]


def have_same_basis(layers: Sequence[TinyLoraLayer], vectors: Vectors, name: str, other: str) -> bool:
    """Whether two adapters of a model differ in nothing but v."""
    return name == other or (
        vectors.groups_of(name) == vectors.groups_of(other)
        and all(layer.has_same_factors(name, other) for layer in layers)
    )


def _tell(wrapper: AuxiliaryTrainingWrapper, adapter_names: Sequence[str]) -> Any:
    """Have a module that was trained whole, for `modules_to_save`, take its rows as PEFT does."""
    return wrapper.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "adapter_names": list(adapter_names)}), with_kwargs=True
    )

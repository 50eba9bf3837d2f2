"""The layer that stands in for an adapted linear layer, and chooses how the update is computed.

One adapter, computed eagerly: product.py. A batch of several adapters: mixed.py. Otherwise the formula itself, which
torch.compile, torch.export and torch.func take apart themselves, and which adds several active adapters with one rounding.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import delta
from .internals import is_taken_apart, is_view, is_watched
from .layer import TinyLoraLayer
from .product import AddUpdate, Folded, without_autocast
from .vector import Vectors


if TYPE_CHECKING:
    from .mixed import Batch


class Linear(TinyLoraLayer):
    """An adapted `nn.Linear`, transformers `Conv1D` or quantized linear layer: y = base(x) + B R A x."""

    def __init__(self, base_layer: nn.Module, vectors: Vectors, backend: QuantizationBackend | None = None) -> None:
        super().__init__(base_layer, vectors, backend)
        self._folded: dict[str, Folded] = {}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out), in the dtype that the base layer returns."""
        # Decoding comes here for each layer and token. What it does not need is tested for as cheaply as can be, past
        # calls and attributes of nn.Module.
        base_layer: Any = self._modules["base_layer"]
        if (self._disable_adapters or self.merged_adapters) and self._base_alone():
            return base_layer(x, *args, **kwargs)
        watched = is_watched(base_layer)
        if type(base_layer) is nn.Linear and not (watched or args or kwargs):
            parameters: Any = base_layer._parameters
            result = F.linear(x, parameters["weight"], parameters["bias"])
        else:
            result = base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None and x.requires_grad:
            self._warn_if_gradient_ends(result, self.quantization_backend.backend_name)
        # Whether nobody but this layer holds what the base layer returned, so that it may be written to.
        owned = not watched and result.is_contiguous()
        owned = owned and (type(base_layer) in (nn.Linear, Conv1D) or self.quantization_backend is not None)
        names = self._active_here()
        vectors = self._shared_vectors[0]
        if len(names) != 1 or vectors.mixed_batches or torch.is_autocast_enabled(x.device.type) or is_taken_apart():
            with without_autocast(x.device.type):
                return self._add(result, x, names, owned)
        return self._add_one(result, x, names[0], owned)

    def _warn_if_gradient_ends(self, result: torch.Tensor, backend_name: str) -> None:
        if not result.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"{backend_name} passes no gradient through this base layer: what lies below it "
                "is trained wrongly. Quantize weights only, not activations.",
                stacklevel=3,
            )

    def _add(self, result: torch.Tensor, x: torch.Tensor, names: list[str], owned: bool) -> torch.Tensor:
        batch = self.mixed_batch()
        if batch is not None:
            return self._add_rows(result, x, batch, owned)
        if len(names) == 1 and not is_taken_apart():
            return self._add_one(result, x, names[0], owned)
        return self._add_all(result, x, names)

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str, owned: bool) -> torch.Tensor:
        """Add the update of one adapter by the fused product."""
        folded = self.folded(name)
        dropouts: Any = self._modules["tinylora_dropout"]
        dropout = dropouts._modules[name]
        if type(dropout) is not nn.Identity:
            x = dropout(x)
        if not torch.is_grad_enabled():
            return folded.add_update(result if owned else _copy(result), x)
        [v] = self.vectors(name)
        # A view cannot be written to without copying its gradient, and others may keep their output for backward.
        in_place = owned and type(self.base_layer) is nn.Linear and not is_view(result)
        return AddUpdate.apply(result, x, v, folded, in_place)

    def _add_all(self, result: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Add the updates of any number of adapters by the formula, and round once."""
        dtype = result.dtype
        for name in names:
            self.ensure_basis(name)
            A, B = self.tinylora_A[name], self.tinylora_B[name]
            dropped = self.tinylora_dropout[name](x).to(A.dtype)
            result = result + delta.multiply(dropped, A, B, self.mixing_matrix(name))
        return result.to(dtype)

    def _add_rows(self, result: torch.Tensor, x: torch.Tensor, batch: "Batch", owned: bool) -> torch.Tensor:
        """Add to each row of a mixed batch the update of its own adapter."""
        for rows in batch.rows(self, len(x)):
            R = rows.mixing_matrices(self)
            if x.requires_grad or result.requires_grad or is_taken_apart():
                self.ensure_basis(rows.adapter_name)
                A, B = self.tinylora_A[rows.adapter_name], self.tinylora_B[rows.adapter_name]
                result = (result + delta.multiply_rows(x.to(A.dtype), A, B, R)).to(result.dtype)
            else:
                result, owned = result if owned else _copy(result), True
                self.folded(rows.adapter_name).add_update_of_rows(result, x, R)
        return result

    def folded(self, adapter_name: str) -> Folded:
        """What this layer multiplies by for an adapter, folded anew if v or a factor has another value."""
        modules: dict[str, Any] = self._modules
        vectors = self._shared_vectors[0]
        A = modules["tinylora_A"]._buffers[adapter_name]
        B = modules["tinylora_B"]._buffers[adapter_name]
        P = modules["tinylora_P"]._buffers[adapter_name]
        [group] = self._groups[adapter_name]
        v, values = vectors.vector_of(adapter_name, group), None
        known = self._folded.get(adapter_name)
        if known is not None and not known.has_factors(A, B, P):
            known = None
        if is_compared_at_once(v):
            if known is not None and known.v.is_cpu and known.v.dtype == v.dtype and torch.equal(known.v, v):
                return known
        else:
            values = vectors.values_in_this_pass(adapter_name, group, self.position)
            if known is not None and known.values is values:
                return known
            v = values[list(vectors[adapter_name]).index(group)]
        self.ensure_basis(adapter_name)
        A, B = self.tinylora_A[adapter_name], self.tinylora_B[adapter_name]
        self._folded[adapter_name] = Folded(A, B, P, v, values)
        return self._folded[adapter_name]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        self._folded.clear()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_folded": {}}

    def forget(self, adapter_name: str) -> None:
        """Drop what this layer holds of an adapter; see [`TinyLoraLayer.forget`]."""
        self._folded.pop(adapter_name, None)
        super().forget(adapter_name)


def _copy(result: torch.Tensor) -> torch.Tensor:
    return result.clone(memory_format=torch.contiguous_format)


def is_compared_at_once(v: torch.Tensor) -> bool:
    """Whether the value of v can be looked at without waiting for a device."""
    return v.is_cpu

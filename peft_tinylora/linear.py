"""The layer that stands in for an adapted linear layer, and chooses how the update is computed.

One adapter, computed eagerly: product.py. A batch of several adapters: mixed.py. Otherwise the formula itself, which
torch.compile, torch.export and torch.func take apart themselves, and which adds several active adapters with one rounding.
"""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn

from . import delta
from .layer import TinyLoraLayer
from .product import AddUpdate, Folded, without_autocast
from .vector import Vectors


if TYPE_CHECKING:
    from .mixed import Batch


class Linear(TinyLoraLayer, nn.Module):
    """An adapted `nn.Linear`, transformers `Conv1D` or quantized linear layer: y = base(x) + B R A x."""

    def __init__(self, base_layer: nn.Module, vectors: Vectors, backend: QuantizationBackend | None = None) -> None:
        nn.Module.__init__(self)
        TinyLoraLayer.__init__(self, base_layer, vectors, backend)
        self._folded: dict[str, Folded] = {}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in) -> (..., out), in the dtype that the base layer returns."""
        # Decoding comes here for each layer and token. What it does not need is tested for as cheaply as can be: a call
        # or an attribute of nn.Module takes as long as half a product.
        base_layer = self._modules["base_layer"]
        if (self._disable_adapters or self.merged_adapters) and self._base_alone():
            return base_layer(x, *args, **kwargs)
        result = base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None and x.requires_grad:
            self._warn_if_gradient_ends(result)
        names = self._active_here()
        vectors = self._shared_vectors[0]
        if len(names) != 1 or vectors.mixed_batches or torch.is_autocast_enabled(x.device.type) or _is_taken_apart():
            with without_autocast(x.device.type):
                return self._add(result, x, names)
        return self._add_one(result, x, names[0])

    def _warn_if_gradient_ends(self, result: torch.Tensor) -> None:
        if not result.requires_grad and torch.is_grad_enabled():
            warnings.warn(
                f"{self.quantization_backend.backend_name} passes no gradient through this base layer: what lies below it "
                "is trained wrongly. Quantize weights only, not activations.",
                stacklevel=3,
            )

    def _add(self, result: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        batch = self.mixed_batch()
        if batch is not None:
            return self._add_rows(result, x, batch)
        if len(names) == 1 and not _is_taken_apart():
            return self._add_one(result, x, names[0])
        return self._add_all(result, x, names)

    def _add_one(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """Add the update of one adapter by the fused product."""
        folded = self.folded(name)
        if self.training:
            x = self.tinylora_dropout[name](x)
        owned = self._is_owned(result)
        if not torch.is_grad_enabled():
            return folded.add_update(result if owned else _copy(result), x)
        [v] = self.vectors(name)
        # A view cannot be written to without copying its gradient, and others may keep their output for backward.
        in_place = owned and type(self.base_layer) is nn.Linear and not result._is_view()
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

    def _add_rows(self, result: torch.Tensor, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """Add to each row of a mixed batch the update of its own adapter."""
        for rows in batch.rows(self, len(x)):
            R = rows.mixing_matrices(self)
            if torch.is_grad_enabled() or _is_taken_apart():
                self.ensure_basis(rows.adapter_name)
                A, B = self.tinylora_A[rows.adapter_name], self.tinylora_B[rows.adapter_name]
                result = (result + delta.multiply_rows(x.to(A.dtype), A, B, R)).to(result.dtype)
            else:
                result = result if self._is_owned(result) else _copy(result)
                self.folded(rows.adapter_name).add_update_of_rows(result, x, R)
        return result

    def _is_owned(self, result: torch.Tensor) -> bool:
        """Whether nobody but this layer holds what the base layer returned, so that it may be written to."""
        return result.is_contiguous() and not self._modules["base_layer"]._forward_hooks

    def folded(self, adapter_name: str) -> Folded:
        """What this layer multiplies by for an adapter, folded anew if v or a factor has another value."""
        values = self._shared_vectors[0].current_vectors(adapter_name, self.position)
        modules = self._modules
        A = modules["tinylora_A"]._buffers[adapter_name]
        B = modules["tinylora_B"]._buffers[adapter_name]
        P = modules["tinylora_P"]._buffers[adapter_name]
        known = self._folded.get(adapter_name)
        if known is None or not known.is_of(values, A, B, P):
            self.ensure_basis(adapter_name)
            A, B = self.tinylora_A[adapter_name], self.tinylora_B[adapter_name]
            known = self._folded[adapter_name] = Folded(values, A, B, P, *self.vectors(adapter_name))
        return known

    def forget(self, adapter_name: str) -> None:
        """Drop what this layer holds of an adapter; see [`TinyLoraLayer.forget`]."""
        self._folded.pop(adapter_name, None)
        super().forget(adapter_name)


def _copy(result: torch.Tensor) -> torch.Tensor:
    return result.clone(memory_format=torch.contiguous_format)


def _is_taken_apart() -> bool:
    """Whether torch.compile, torch.export or torch.func follows the computation."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()

"""Parameters adapted where they stand: the fused experts of a mixture of experts, and what multiplies by them.

transformers 5 keeps all experts of a layer in one parameter (experts, out, in), or (experts, in, out) where the module
says `is_transposed`, and reads it in several ways: one expert at a time, a batch of selected experts, a grouped product.
While the module computes, an [`AdaptedWeight`] takes the parameter's place; it answers those products with
base + B R A x, so that the update is never added to a bf16 weight, where rounding would lose it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import delta
from .errors import UnsupportedModuleError
from .layer import TinyLoraLayer
from .product import without_autocast
from .vector import Vectors
from .weight import parameter_is_transposed, parameter_matrix, parameter_shape


class AdaptedWeight:
    """W + left right, where the sum is never formed; stands in for W (..., m, n) in products.

    Args:
        weight (`torch.Tensor`): W, shape (..., m, n), in the dtype that it is stored in.
        left (`torch.Tensor`): shape (..., m, r), float32 or float64.
        right (`torch.Tensor`): shape (..., r, n), in the dtype of `left`.
    """

    def __init__(self, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        self.weight, self.left, self.right = weight, left, right
        self.dtype, self.device, self.shape = weight.dtype, weight.device, weight.shape

    def __getitem__(self, experts: Any) -> "AdaptedWeight":
        return AdaptedWeight(self.weight[experts], self.left[experts], self.right[experts])

    def size(self, dim: int) -> int:
        """As `torch.Tensor.size`."""
        return self.shape[dim]

    def data_ptr(self) -> int:
        """As `torch.Tensor.data_ptr`: transformers looks at its alignment before it takes torch's own product, up to torch 2.10."""
        return self.weight.data_ptr()

    def transpose(self, dim0: int, dim1: int) -> "AdaptedWeight":
        """The last two dimensions exchanged."""
        if sorted(dim % len(self.shape) for dim in (dim0, dim1)) != [len(self.shape) - 2, len(self.shape) - 1]:
            raise _unsupported(f"transpose({dim0}, {dim1})")
        return AdaptedWeight(self.weight.mT, self.right.mT, self.left.mT)

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return _matmul(self, x)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__
        if name == "linear":
            return _linear(*args, **(kwargs or {}))
        if name in ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm"):
            return _matmul(*args)
        if name in ("_grouped_mm", "grouped_mm_fallback"):
            return _grouped_mm(func, *args, **(kwargs or {}))
        raise _unsupported(name)


def _linear(x: torch.Tensor, weight: AdaptedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return _plus(F.linear(x, weight.weight, bias), lambda: _low(x, weight) @ weight.right.mT @ weight.left.mT, weight)


def _matmul(a: torch.Tensor | AdaptedWeight, b: torch.Tensor | AdaptedWeight) -> torch.Tensor:
    if isinstance(a, AdaptedWeight):
        assert isinstance(b, torch.Tensor)
        return _plus(a.weight @ b, lambda: a.left @ (a.right @ _low(b, a)), a)
    assert isinstance(b, AdaptedWeight)
    return _plus(a @ b.weight, lambda: _low(a, b) @ b.left @ b.right, b)


def _grouped_mm(
    func: Callable, x: torch.Tensor, weight: AdaptedWeight, offs: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    def update() -> torch.Tensor:
        # Rows past the last offset belong to no expert; the kernel leaves them undefined, and so may this.
        rows = torch.arange(x.shape[0], device=offs.device, dtype=offs.dtype)
        expert = torch.searchsorted(offs, rows, right=True).clamp_max(weight.shape[0] - 1)
        return (_low(x, weight)[:, None, :] @ weight.left[expert] @ weight.right[expert])[:, 0, :]

    return _plus(func(x, weight.weight, offs=offs, **kwargs), update, weight)


def _low(x: torch.Tensor, weight: AdaptedWeight) -> torch.Tensor:
    return x.to(weight.left.dtype)


def _plus(base: torch.Tensor, update: Callable[[], torch.Tensor], weight: AdaptedWeight) -> torch.Tensor:
    with without_autocast(weight.device.type):
        return (base + update()).to(base.dtype)


def _unsupported(what: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"An adapted expert weight cannot take part in {what!r}. Load the model with experts_implementation='eager', "
        "'batched_mm' or 'grouped_mm', or leave the parameter out of `target_parameters`."
    )


# PEFT tells by this class name that a parameter is wrapped, and not the module that has it.
class ParamWrapper(TinyLoraLayer):
    """A module of which one parameter is adapted; for several, wrappers are nested, as in PEFT's LoRA.

    Args:
        base_layer (`nn.Module`): the module, or a wrapper around it.
        vectors ([`Vectors`]): adapter name -> group -> v, owned by the tuner.
        parameter_name (`str`): which parameter: a matrix (out, in), or (experts, out, in).
    """

    def __init__(self, base_layer: nn.Module, vectors: Vectors, parameter_name: str) -> None:
        self.parameter_name = parameter_name  # asked for when it is made
        super().__init__(base_layer, vectors)

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape (out, in) or (experts, out, in)."""
        return parameter_shape(self.get_base_layer(), self.parameter_name)

    def stored_tensor(self) -> torch.Tensor:
        """The adapted parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def dense_matrix(self) -> torch.Tensor:
        """W (out, in) or (experts, out, in), in fp32 or better."""
        return parameter_matrix(self.get_base_layer(), self.parameter_name)

    def to_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """From (..., out, in) to the orientation of the parameter."""
        return matrix.mT if parameter_is_transposed(self.get_base_layer(), self.parameter_name) else matrix

    def mixing_matrix(self, adapter_name: str) -> torch.Tensor:
        """R (r, r), or (experts, r, r), of an adapter, differentiable in v."""
        P = self.tinylora_P[adapter_name]
        vectors = self.vectors(adapter_name)
        return delta.mix_each(torch.stack(vectors), P) if P.ndim == 4 else delta.mix(vectors[0], P)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        base_alone = self._base_alone()
        names = [] if base_alone else self._active_here()
        if not names:
            return self.base_layer(*args, **kwargs)
        for name in names:
            self.ensure_basis(name)
        with without_autocast(self.stored_tensor().device.type):
            left = torch.cat([self.tinylora_B[name] @ self.mixing_matrix(name) for name in names], dim=-1)
            right = torch.cat([self.tinylora_A[name] for name in names], dim=-2)
        module = self.get_base_layer()
        if parameter_is_transposed(module, self.parameter_name):
            left, right = right.mT, left.mT
        adapted = AdaptedWeight(self.stored_tensor(), left, right)
        with standing_in(module, self.parameter_name, adapted):
            return self.base_layer(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without its wrappers; PEFT calls this rather than [`merge`] when it unloads."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


def wrapper_of_parameter(module: nn.Module, parameter_name: str) -> ParamWrapper | None:
    """The wrapper of a parameter among those nested around a module."""
    while isinstance(module, ParamWrapper):
        if module.parameter_name == parameter_name:
            return module
        module = module.base_layer
    return None


@contextmanager
def standing_in(module: nn.Module, parameter_name: str, adapted: AdaptedWeight) -> Iterator[None]:
    """Let `module` see `adapted` in place of a parameter of its own."""
    # Python looks into the instance before it asks nn.Module for a parameter.
    vars(module)[parameter_name] = adapted
    try:
        yield
    finally:
        del vars(module)[parameter_name]

"""The layers that stand in for the adapted modules. They hold the factors and call `delta`; no maths of their own.

What is kept where: A, B and P are buffers of the layer, one entry per adapter; v is not. The vectors are shared between
layers, so they are registered once, in [`Vectors`], `tinylora_v` of the tuner, and a layer keeps an unregistered
reference to it and the key of its own group. Registered in each layer, 196 modules would give 38,612 keys in the state
dict and break FSDP2 and safetensors.

A and B may be on the meta device: then they are about to be loaded from a file. `ensure_basis` computes them where that
did not happen.
"""

from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, Self

import torch
from peft.utils.quantization_utils import QuantizationBackend, quantization_extra_repr
from torch import nn

from . import delta
from .basis import Basis
from .gather import device_of, is_offloaded
from .internals import BufferDict, version_of
from .merging import Mergeable
from .vector import Vectors
from .weight import dense_matrix, matrix_shape, stored_tensor, to_stored, working_dtype


if TYPE_CHECKING:
    from .mixed import Batch

FactorState = list[tuple[torch.Tensor, int]]


class TinyLoraLayer(Mergeable, nn.Module):
    """What the layer types share: the factors of each adapter, merging and unmerging.

    Args:
        base_layer (`nn.Module`): the adapted layer.
        vectors ([`Vectors`]): adapter name -> group -> v, owned by the tuner.
        backend (`QuantizationBackend`, *optional*): what reads and writes the weight, if it is quantized.
    """

    adapter_layer_names = ("tinylora_v",)
    other_param_names = ("tinylora_A", "tinylora_B", "tinylora_P")
    parameter_name = "weight"  # what of the base layer is adapted

    if TYPE_CHECKING:  # of BaseTunerLayer, for a type checker that reads nn.Module, and not PEFT
        active_adapters: list[str]
        disable_adapters: bool
        merged: bool
        get_base_layer: Callable[[], nn.Module]
        _get_embed_scale: Callable[[], torch.Tensor | None]

    def __init__(self, base_layer: nn.Module, vectors: Vectors, backend: QuantizationBackend | None = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = backend
        self.out_features, self.in_features = self.matrix_shape()[-2:]
        self.tinylora_A = BufferDict({}, persistent=True)  # each (r, in)
        self.tinylora_B = BufferDict({}, persistent=True)  # each (out, r)
        self.tinylora_P = BufferDict({}, persistent=True)  # each (u, r, r)
        self.tinylora_dropout = nn.ModuleDict({})
        self.r: dict[str, int] = {}
        self.u: dict[str, int] = {}
        self._groups: dict[str, tuple[str, ...]] = {}
        self._tinylora_v_key: dict[str, str] = {}  # the first of them, under the name that PEFT's layers have for it
        # Name of the adapted weight in the base model, and of its matrices: itself, or one for each expert.
        self.weight_names: dict[str, str] = {}
        self.matrix_names: dict[str, tuple[str, ...]] = {}
        self._basis_makers: dict[str, Callable[[TinyLoraLayer], Basis]] = {}
        # As in `Basis`; None for factors that came from a file.
        self.basis_angles: dict[str, float | None] = {}
        self._shared_vectors = (vectors,)  # in a tuple, or nn.Module would register it here
        self.position = vectors.next_position()
        self._compared: dict[tuple[str, str], tuple[FactorState, FactorState, bool]] = {}
        self._kept = None
        self.survival = None
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []

    @property
    def tinylora_v(self) -> Vectors:
        """Adapter name -> group -> v (u,), shared by all layers of the model."""
        return self._shared_vectors[0]

    def update_layer(
        self,
        adapter_name: str,
        *,
        weight_name: str,
        matrix_names: tuple[str, ...],
        groups: tuple[str, ...],
        basis: Basis | None,
        make_basis: Callable[["TinyLoraLayer"], Basis],
        r: int,
        projection: torch.Tensor,
        dropout: float,
    ) -> None:
        """Add an adapter to this layer.

        Args:
            adapter_name (`str`): its name.
            weight_name (`str`): name of the adapted weight in the base model.
            matrix_names (`tuple[str, ...]`): of its matrices: itself, or one for each expert.
            groups (`tuple[str, ...]`): which v of the adapter this layer reads; of experts, one each.
            basis ([`Basis`], *optional*): the factors; `None` leaves room for those that are about to be loaded.
            make_basis (`Callable`): this layer -> its [`Basis`], for when none is loaded after all.
            r (`int`): rank of the basis.
            projection (`torch.Tensor`): P, shape (u, r, r), or (experts, u, r, r).
            dropout (`float`): probability, applied to the input of the update.
        """
        weight = self.stored_tensor()
        dtype = working_dtype(weight.dtype)
        if basis is None:
            *experts, out_features, in_features = self.matrix_shape()
            A = torch.empty(*experts, r, in_features, dtype=dtype, device="meta")
            B = torch.empty(*experts, out_features, r, dtype=dtype, device="meta")
        else:
            A, B = basis.A, basis.B
        self.tinylora_A[adapter_name] = A
        self.tinylora_B[adapter_name] = B
        self.basis_angles[adapter_name] = None if basis is None else basis.angle
        # On the CPU while the weight is on the meta device, where its numbers would be lost.
        device = self.compute_device()
        self.tinylora_P[adapter_name] = projection.to("cpu" if device.type == "meta" else device, dtype)
        self.tinylora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.r[adapter_name] = r
        self.u[adapter_name] = projection.shape[-3]
        self._groups[adapter_name] = groups
        self._tinylora_v_key[adapter_name] = groups[0]
        self.weight_names[adapter_name] = weight_name
        self.matrix_names[adapter_name] = matrix_names
        self._basis_makers[adapter_name] = make_basis

    def ensure_basis(self, adapter_name: str) -> None:
        """Compute A and B from the weight if they were left for a file that did not come. Needs a real weight."""
        missing = self.tinylora_A[adapter_name].is_meta or self.tinylora_B[adapter_name].is_meta
        if missing and self.has_weight():
            self.set_basis(adapter_name, self._basis_makers[adapter_name](self))

    def set_basis(self, adapter_name: str, basis: Basis) -> None:
        """Give an adapter of this layer factors that were computed from the weight."""
        self.tinylora_A[adapter_name] = basis.A
        self.tinylora_B[adapter_name] = basis.B
        self.basis_angles[adapter_name] = basis.angle

    def check_basis_with(self, adapter_name: str, check: Callable[[Basis, torch.Tensor], Basis]) -> None:
        """Have a basis that is yet to be computed checked, together with P; `check` returns the one to use."""
        make = self._basis_makers[adapter_name]
        self._basis_makers[adapter_name] = partial(
            _made_and_checked, adapter_name=adapter_name, make=make, check=check
        )

    def basis(self, adapter_name: str) -> Basis:
        """The factors of an adapter, computed if that was left for a file."""
        self.ensure_basis(adapter_name)
        angle = self.basis_angles[adapter_name]
        A, B = self.tinylora_A[adapter_name], self.tinylora_B[adapter_name]
        return Basis(A, B) if angle is None else Basis(A, B, angle)

    def compute_device(self) -> torch.device:
        """Where this layer computes."""
        return device_of(self.get_base_layer(), self.stored_tensor())

    def has_weight(self) -> bool:
        """Whether there is a weight to take a basis from, here or where accelerate offloaded it."""
        return not self.stored_tensor().is_meta or is_offloaded(self.get_base_layer())

    def copy_of_factors(self, adapter_name: str) -> tuple[Basis, torch.Tensor]:
        """The basis and P of an adapter, for another one that must have the same."""
        basis = self.basis(adapter_name)
        return Basis(basis.A.clone(), basis.B.clone(), basis.angle), self.tinylora_P[adapter_name].clone()

    def has_same_factors(self, adapter_name: str, other: str) -> bool:
        """Whether two adapters differ in nothing but v here; so do two that are not here."""
        present = [name for name in (adapter_name, other) if name in self.tinylora_A]
        if len(present) != 2 or self.groups(adapter_name) != self.groups(other):
            return not present
        own, others = self.state_of_factors(adapter_name), self.state_of_factors(other)
        known = self._compared.get((adapter_name, other))
        if known is None or not (is_same_state(known[0], own) and is_same_state(known[1], others)):
            same = all(a.shape == b.shape and torch.equal(a, b) for (a, _), (b, _) in zip(own, others, strict=True))
            known = self._compared[adapter_name, other] = own, others, same
        return known[2]

    def state_of_factors(self, adapter_name: str) -> FactorState:
        """A, B and P of an adapter, each with torch's version: another one if they are replaced or written to."""
        self.ensure_basis(adapter_name)
        tensors = [factors[adapter_name] for factors in (self.tinylora_A, self.tinylora_B, self.tinylora_P)]
        return [(tensor, version_of(tensor)) for tensor in tensors]

    def mixed_batch(self) -> "Batch | None":
        """The mixed batch that this thread computes now, if it computes one."""
        batches = self.tinylora_v.mixed_batches
        return _batch_of_this_thread(batches) if batches else None

    def matrix_shape(self) -> tuple[int, ...]:
        """Shape (out, in) of the weight W."""
        return matrix_shape(self.get_base_layer())

    def stored_tensor(self) -> torch.Tensor:
        """The stored weight, or a part of a quantized one: says where it is, and in which precision to work with it."""
        return stored_tensor(self.get_base_layer())

    def dense_matrix(self) -> torch.Tensor:
        """The weight W (out, in) that the base layer multiplies by now, in fp32 or better."""
        return dense_matrix(self.get_base_layer(), self.quantization_backend)

    def to_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix (out, in) in the orientation that the base layer stores."""
        return to_stored(matrix, self.get_base_layer())

    def groups(self, adapter_name: str) -> tuple[str, ...]:
        """Which v this layer reads for an adapter: one, or one for each expert."""
        return self._groups[adapter_name]

    def vectors(self, adapter_name: str) -> list[torch.Tensor]:
        """The v that this layer reads for an adapter: one, or one for each expert."""
        return [self.tinylora_v[adapter_name][group] for group in self.groups(adapter_name)]

    def mixing_matrix(self, adapter_name: str) -> torch.Tensor:
        """R (r, r) of an adapter, differentiable in v."""
        [v] = self.vectors(adapter_name)
        return delta.mix(v, self.tinylora_P[adapter_name])

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update of an adapter in the orientation that the base layer stores, in fp32 or better."""
        self.ensure_basis(adapter_name)
        update = delta.dense(
            self.tinylora_A[adapter_name], self.tinylora_B[adapter_name], self.mixing_matrix(adapter_name)
        )
        return self.to_stored(update)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer; see `BaseTunerLayer.delete_adapter`."""
        self.forget(adapter_name)
        super().delete_adapter(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Drop what this layer holds of an adapter. Its v, and which adapters are active, stay as they are."""
        factors = (self.tinylora_A, self.tinylora_B, self.tinylora_P, self.tinylora_dropout)
        for entries in (
            *factors,
            self.r,
            self.u,
            self._groups,
            self._tinylora_v_key,
            self.weight_names,
            self.matrix_names,
            self._basis_makers,
            self.basis_angles,
        ):
            if adapter_name in entries:
                del entries[adapter_name]
        self._compared.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`, for the vectors that this layer reads too: transformers freezes layer by layer."""
        for adapter_name in self._groups:
            for v in self.vectors(adapter_name):
                v.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # its overloads
        """As that of every module; factors that are still to be computed are computed first."""
        for name in self.tinylora_A.keys():
            self.ensure_basis(name)
        return super().state_dict(*args, **kwargs)

    def _get_available_adapters(self) -> set[str]:
        return set(self.tinylora_A.keys())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would cast the shared v, and the factors, to the dtype of the base layer.
        device = self.compute_device() if device is None else device
        if device.type == "meta":
            return  # the factors stay where they were computed
        for buffers in (self.tinylora_A, self.tinylora_B, self.tinylora_P):
            if adapter_name in buffers and not buffers[adapter_name].is_meta:
                buffers[adapter_name] = buffers[adapter_name].to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        for name in self.tinylora_A.keys():
            self.ensure_basis(name)
        if self._kept is not None:
            self._kept.move(fn)
        return super()._apply(fn, recurse)

    def _base_alone(self) -> bool:
        """Whether the base layer alone gives the output; unmerges where adapters are disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.disable_adapters or self.merged

    def _active_here(self) -> list[str]:
        factors: Any = self._modules["tinylora_A"]
        here = factors._buffers
        return [name for name in self.active_adapters if name in here]

    def extra_repr(self) -> str:
        """How the base layer is quantized, for `print(model)`."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "tinylora." + super().__repr__()


def layers_of(model: nn.Module) -> dict[str, TinyLoraLayer]:
    """The adapted layers of a model by their names in it, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TinyLoraLayer)}


def _made_and_checked(
    layer: TinyLoraLayer,
    *,
    adapter_name: str,
    make: Callable[[TinyLoraLayer], Basis],
    check: Callable[[Basis, torch.Tensor], Basis],
) -> Basis:
    return check(make(layer), layer.tinylora_P[adapter_name])


def is_same_state(before: FactorState, now: FactorState) -> bool:
    """Whether no factor was replaced or written to in between."""
    pairs = zip(before, now, strict=True)
    return all(tensor is other and version == of_other for (tensor, version), (other, of_other) in pairs)


# torch.compile cannot ask for the thread: in a compiled model a mixed batch breaks the graph here.
@torch.compiler.disable
def _batch_of_this_thread(batches: "dict[int, Batch]") -> "Batch | None":
    return batches.get(get_ident())

"""The trained vectors v, one for each group: the only numbers that a TinyLoRA adapter learns.

v is made in fp32 (float64 on a float64 base) whatever the base's dtype, and stays so unless the user casts the whole
model, as with `model.to(torch.bfloat16)`: in bf16 an Adam step of 1e-4 on |v| = 0.03
rounds to nothing, and the paper finds fp32 the best even for the bytes it takes (section 6, figure 4).
"""

from collections.abc import ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .internals import version_of


if TYPE_CHECKING:
    from .bank import AdapterBank
    from .mixed import Batch


def new_vector(u: int, init_weights: bool | str, init_v_bound: float, dtype: torch.dtype) -> nn.Parameter:
    """A new v.

    Args:
        u (`int`): length.
        init_weights (`bool` or `str`): `True` for zeros, so that a new adapter changes nothing; `"uniform"` or `False`
            for draws from [-init_v_bound, init_v_bound] with torch's global generator.
        init_v_bound (`float`): bound of the draws.
        dtype (`torch.dtype`): float32 or float64.

    Returns:
        `nn.Parameter`: shape (u,), on the CPU.
    """
    v = nn.Parameter(torch.zeros(u, dtype=dtype))
    if init_weights is not True:
        nn.init.uniform_(v, -init_v_bound, init_v_bound)
    return v


class Vectors(nn.ModuleDict):
    """Adapter name -> `nn.ParameterDict` of group -> v (u,), and what the layers of a model know together.

    An adapter cannot have the name of an attribute of this class, which is why those are long.

    Attributes:
        mixed_batches (`dict[int, Batch]`): thread -> the mixed batch that it computes now.
        adapter_banks (`dict[str, AdapterBank]`): adapter name -> the bank over its factors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed_batches: dict[int, Batch] = {}
        self.adapter_banks: dict[str, AdapterBank] = {}
        self._layers = 0
        self._seen: dict[str, _Seen] = {}

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> nn.ParameterDict: ...
        def values(self) -> ValuesView[nn.ParameterDict]: ...

    def next_position(self) -> int:
        """A layer's place in the order in which layers were made."""
        self._layers += 1
        return self._layers

    def vector_of(self, adapter_name: str, group: str) -> torch.Tensor:
        """The v of a group, shape (u,)."""
        # Not through ParameterDict, which would take several calls for each layer and token of decoding.
        of_adapter: Any = self._modules[adapter_name]
        registered = of_adapter._parameters
        return registered[group] if group in registered else self[adapter_name][group]

    def groups_of(self, adapter_name: str) -> list[str]:
        """The groups of an adapter in the order in which its file has them."""
        return sorted(self[adapter_name], key=int)

    def vectors_of(self, adapter_name: str) -> torch.Tensor:
        """All v of an adapter as its file has them, shape (groups, u), a copy on the device of the first."""
        vectors = [self[adapter_name][group].detach() for group in self.groups_of(adapter_name)]
        return torch.stack([v.to(vectors[0].device) for v in vectors])

    def values_in_this_pass(self, adapter_name: str, group: str, position: int) -> torch.Tensor:
        """All v of an adapter, and the same tensor object as long as they have these values; for v on an accelerator.

        Comparing values there waits for all that was launched before. So it is done once in each pass over the layers,
        and where torch's version of the layer's own v has changed, which it does not by every way of writing: `v.data`,
        fused optimizers and the all-gather of FSDP2 leave it as it was.

        Args:
            adapter_name (`str`): the adapter.
            group (`str`): of the layer that asks.
            position (`int`): of that layer. A pass begins with one that has asked in this pass already; one that is not
                further on than the last may begin another part of the model, and they are looked at again.

        Returns:
            `torch.Tensor`: shape (groups, u), groups in the order in which they were made.
        """
        seen = self._seen.get(adapter_name)
        v = self.vector_of(adapter_name, group)
        capturing = v.is_cuda and torch.cuda.is_current_stream_capturing()
        if seen is not None and not capturing and seen.serves(position, group, v):
            return seen.values
        vectors = {name: self.vector_of(adapter_name, name) for name in self[adapter_name]}
        values = torch.stack([vector.detach().to(v.device) for vector in vectors.values()])
        if capturing:
            return values  # not kept: the graph computes with what v holds when it is replayed
        if seen is not None and _have_same_value(seen.values, values):
            values = seen.values
        versions = {name: version_of(vector) for name, vector in vectors.items()}
        asked = set() if seen is None or position in seen.asked else seen.asked
        self._seen[adapter_name] = _Seen(values, versions, position, asked | {position})
        return values

    def bank_with(self, name: str) -> "AdapterBank | None":
        """The bank that holds an adapter of this name, if one does."""
        return next((bank for bank in list(self.adapter_banks.values()) if name in bank), None)

    def forget_adapter(self, adapter_name: str) -> None:
        """Drop what is known of an adapter beside its v."""
        self._seen.pop(adapter_name, None)
        self.adapter_banks.pop(adapter_name, None)


class _Seen:
    """All v of an adapter when they were looked at last, and which layers asked for them in this pass."""

    def __init__(self, values: torch.Tensor, versions: dict[str, int], position: int, asked: set[int]) -> None:
        self.values, self.asked = values, asked
        self._versions, self._last = versions, position

    def serves(self, position: int, group: str, v: torch.Tensor) -> bool:
        """Whether the layer at `position` is one of this pass, and nobody is known to have written to its v."""
        if position <= self._last or position in self.asked or version_of(v) != self._versions[group]:
            return False
        self._last = position
        self.asked.add(position)
        return True


def _have_same_value(seen: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether two tensors are of one kind and hold the same numbers."""
    same_kind = seen.device == now.device and seen.dtype == now.dtype and not now.is_meta
    return same_kind and torch.equal(seen, now)

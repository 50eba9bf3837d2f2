"""The trained vectors v, one for each group: the only numbers that a TinyLoRA adapter learns.

v is made in fp32 (float64 on a float64 base) whatever the base's dtype, and stays so unless the user casts the whole
model, as with `model.to(torch.bfloat16)`: in bf16 an Adam step of 1e-4 on |v| = 0.03
rounds to nothing, and the paper finds fp32 the best even for the bytes it takes (section 6, figure 4).
"""

from typing import TYPE_CHECKING

import torch
from torch import nn


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

    def next_position(self) -> int:
        """A layer's place in the order in which layers were made, which is the order of a forward pass."""
        self._layers += 1
        return self._layers

    def groups_of(self, adapter_name: str) -> list[str]:
        """The groups of an adapter in the order in which its file has them."""
        return sorted(self[adapter_name], key=int)

    def vectors_of(self, adapter_name: str) -> torch.Tensor:
        """All v of an adapter as its file has them, shape (groups, u), a copy."""
        return torch.stack([self[adapter_name][group].detach().clone() for group in self.groups_of(adapter_name)])

    def current_vectors(self, adapter_name: str, position: int) -> torch.Tensor:
        """All v of an adapter as they are now, and the same tensor object as long as they have these values.

        The values are compared, once in each pass over the layers, because nothing else tells: writing to `v.data`, the
        all-gather of FSDP2 and some optimizers leave a tensor's version as it was. On a GPU the comparison waits for
        what was launched before, which is why it is not done at each layer.

        Args:
            adapter_name (`str`): the adapter.
            position (`int`): of the layer that asks. A position that is not further on than the last one begins a pass.
        """
        seen = self._seen.get(adapter_name)
        if seen is None or position <= seen.position or seen.values.is_cuda:
            return self._look(adapter_name, position)
        seen.position = position
        return seen.values

    def _look(self, adapter_name: str, position: int) -> torch.Tensor:
        seen = self._seen.get(adapter_name)
        capturing = next(iter(self[adapter_name].values())).is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing:
            return self._stacked(adapter_name)  # not kept: the graph computes with what v holds when it is replayed
        if seen is None or position <= seen.position:
            values = self._stacked(adapter_name)
            if seen is not None and _are_equal(seen.values, values):
                values = seen.values
            seen = self._seen[adapter_name] = _Seen(values)
        seen.position = position
        return seen.values

    def _stacked(self, adapter_name: str) -> torch.Tensor:
        vectors = self[adapter_name]
        registered = vectors._parameters  # read one at a time through ParameterDict they take 20 times as long
        source = registered if len(registered) == len(vectors) else vectors
        values = [source[group].detach() for group in source]  # DeepSpeed gathers what is asked for by its name
        return torch.stack([v.to(values[0].device) for v in values])

    def bank_with(self, name: str) -> "AdapterBank | None":
        """The bank that holds an adapter of this name, if one does."""
        return next((bank for bank in self.adapter_banks.values() if name in bank), None)

    def forget_adapter(self, adapter_name: str) -> None:
        """Drop what is known of an adapter beside its v."""
        self._seen.pop(adapter_name, None)
        self.adapter_banks.pop(adapter_name, None)


class _Seen:
    """All v of an adapter at the beginning of a pass, and the position of the last layer that asked for them."""

    __slots__ = ("position", "values")

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


def _are_equal(seen: torch.Tensor, values: torch.Tensor) -> bool:
    same_kind = (seen.device, seen.dtype) == (values.device, values.dtype) and not values.is_meta
    return same_kind and torch.equal(seen, values)

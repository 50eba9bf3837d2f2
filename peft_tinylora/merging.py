"""Base weight and update -> merged weight, rounded once, and how much of the update was left.

The update is added in fp32 or better and the sum is rounded to the stored form at the end. What rounding takes is large
for a small update: into bf16, 96% of an update of relative size 1e-4 is lost; into NF4, what is left has cosine 0.03
with it. That is why every merge is measured, why unmerging puts the kept original back rather than subtracting, and why
an adapter is best left unmerged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import MergeError


# A merge that loses more than this share of the update warns.
TOLERATED_LOSS = 0.1


@dataclass(frozen=True)
class Survival:
    """How much of an update was left after rounding, from sums over the entries of one weight or of many.

    Args:
        update (`float`): sum of squares of the exact update B R A.
        survived (`float`): sum of squares of merged weight - base weight, both as stored.
        product (`float`): sum of their products.
        error (`float`): sum of squares of their difference.
    """

    update: float
    survived: float
    product: float
    error: float

    @property
    def cosine(self) -> float:
        """Cosine between what survived and the exact update; 1.0 where both are zero."""
        if self.update == 0.0 or self.survived == 0.0:
            return float(self.update == self.survived)
        return self.product / math.sqrt(self.update * self.survived)

    @property
    def relative_error(self) -> float:
        """|survived - update| / |update|, which is what was lost: 0 is exact, 1 is as bad as no merge at all."""
        if self.update == 0.0:
            return 0.0 if self.error == 0.0 else math.inf
        return math.sqrt(self.error / self.update)

    def __add__(self, other: "Survival") -> "Survival":
        return Survival(
            self.update + other.update,
            self.survived + other.survived,
            self.product + other.product,
            self.error + other.error,
        )


class MergeReport(dict[str, Survival]):
    """What each module of a merge kept of its update: module name -> [`Survival`]. Prints as a table."""

    @property
    def total(self) -> Survival:
        """All modules taken together."""
        return sum(self.values(), start=Survival(0.0, 0.0, 0.0, 0.0))

    def __str__(self) -> str:
        width = max(map(len, [*self, "module"]))
        rows = [*self.items(), ("total", self.total)]
        lines = [f"{name:<{width}}{s.cosine:>10.4f}{s.relative_error:>16.3g}" for name, s in rows]
        return "\n".join([f"{'module':<{width}}{'cosine':>10}{'relative error':>16}", *lines])


def survival(update: torch.Tensor, survived: torch.Tensor) -> Survival:
    """Compare the exact update with what is left of it, two tensors of the same shape and dtype."""

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        return torch.sum(a * b, dtype=torch.float64).item()

    error = survived - update
    return Survival(dot(update, update), dot(survived, survived), dot(update, survived), dot(error, error))


def rounded(total: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    """Round to the dtype that a weight is stored in, to nearest or stochastically.

    Args:
        total (`torch.Tensor`): weight plus update, float32 or float64.
        dtype (`torch.dtype`): the stored dtype.
        generator (`torch.Generator`, *optional*): on the CPU. With it bf16 is rounded up or down with probabilities
            such that the mean is exact; the same generator state gives the same result on any device. Without it, to
            nearest.
    """
    if generator is None or dtype != torch.bfloat16:
        return total.to(dtype)
    # bf16 is the upper half of fp32: adding 16 random bits to the lower half carries with the right probability.
    total = total.to(torch.float32).contiguous()
    noise = torch.randint(0, 1 << 16, total.shape, dtype=torch.int32, generator=generator).to(total.device)
    up_or_down = ((total.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(total.isfinite(), up_or_down, total).to(torch.bfloat16)


class KeptBase:
    """References to all that merging replaces in a base layer, so that unmerging is exact.

    Args:
        tuner_layer (`TinyLoraLayer`): the layer that merges; hqq's backend replaces its whole base layer.
    """

    def __init__(self, tuner_layer: BaseTunerLayer) -> None:
        self._tuner_layer = tuner_layer
        self._inner = tuner_layer.base_layer
        self._base_layer = tuner_layer.get_base_layer()
        self._backend = tuner_layer.quantization_backend
        # None where the weight is no parameter, as in HQQLinear.
        self.parameter: nn.Parameter | None = self._base_layer._parameters.get(tuner_layer.parameter_name)
        # bitsandbytes keeps scales beside the weight: on the parameter, on a 4-bit layer, in an 8-bit layer's state.
        layer_attributes = vars(self._base_layer)
        self._attributes: list[tuple[Any, dict[str, Any]]] = [
            (owner, dict(vars(owner)))
            for owner in (self.parameter, layer_attributes.get("state"))
            if owner is not None
        ]
        if "quant_state" in layer_attributes:
            self._attributes.append((self._base_layer, {"quant_state": layer_attributes["quant_state"]}))

    def restore_attributes(self) -> None:
        """Undo what a backend changed on the kept parameter while it made another from it."""
        for owner, attributes in self._attributes:
            if owner is self.parameter:
                vars(owner).clear()
                vars(owner).update(attributes)

    def restore(self) -> None:
        """Put everything back, the parameter as the same object."""
        self._tuner_layer.base_layer = self._inner
        self._tuner_layer.quantization_backend = self._backend
        for owner, attributes in self._attributes:
            vars(owner).update(attributes)
        if self.parameter is not None:
            setattr(self._base_layer, self._tuner_layer.parameter_name, self.parameter)

    def move(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply what is applied to the model's parameters (a move, a cast) to the kept one.

        Raises:
            MergeError: if that would move a quantized weight to another device, away from its scales.
        """
        if self.parameter is None:
            return
        moved = fn(self.parameter.data)
        if type(self.parameter) is not nn.Parameter and moved.device != self.parameter.device:
            raise MergeError(
                f"Adapters are merged into quantized weights: unmerge before moving the model to {moved.device}."
            )
        self.parameter.data = moved

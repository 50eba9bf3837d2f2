"""Base weight and update -> merged weight, rounded once, and how much of the update was left.

The update is added in fp32 or better and the sum is rounded to the stored form at the end. What rounding takes is large
for a small update: into bf16, 96% of an update of relative size 1e-4 is lost; into NF4, what is left has cosine 0.03
with it. That is why every merge is measured, why unmerging puts the kept original back rather than subtracting, and why
an adapter is best left unmerged.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from tqdm import tqdm

from .errors import MergeError
from .projection import seed_of_module
from .survival import MergeReport, Survival, survival
from .weight import floating_linear


# A merge that loses more than this share of the update warns.
TOLERATED_LOSS = 0.1


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
        own_parameters = dict(self._base_layer.named_parameters(recurse=False))
        # None where the weight is no parameter, as in HQQLinear.
        self.parameter: nn.Parameter | None = own_parameters.get(tuner_layer.parameter_name)
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


class Mergeable(BaseTunerLayer):
    """The part of a layer that merges: what `TinyLoraLayer` has beside the factors."""

    base_layer: nn.Module
    quantization_backend: QuantizationBackend | None
    survival: Survival | None  # of the update, in the last merge
    _kept: KeptBase | None  # the original while merged

    def unmerged_matrix(self) -> torch.Tensor:
        """The weight W (out, in) that the base model came with, in fp32 or better, also while adapters are merged."""
        if self._kept is None:
            return self.dense_matrix()
        merged = KeptBase(self)
        self._kept.restore()
        W = self.dense_matrix()
        merged.restore()
        return W

    def check_mergeable(self, name: str, dequantize: bool, stochastic: bool) -> None:
        """Raise if merging cannot be done as asked, before anything is changed.

        Args:
            name (`str`): this layer's name in the model, for the message.
            dequantize (`bool`): whether the layer becomes a floating point one.
            stochastic (`bool`): whether rounding is stochastic.

        Raises:
            MergeError: names the layer and what to do instead.
        """
        backend = self.quantization_backend
        if backend is None or dequantize:
            return
        if not backend.supports_merge:
            raise MergeError(
                f"Adapters cannot be merged into module {name!r}: {backend.backend_name} cannot quantize its weight "
                "again. Leave the adapter unmerged, or use merge_and_unload(dequantize=True)."
            )
        if stochastic:
            raise MergeError(
                f"stochastic_rounding_seed is for bfloat16 weights, and module {name!r} is quantized "
                f"({backend.backend_name}): leave it out, or use merge_and_unload(dequantize=True)."
            )

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize_to: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        round_to: torch.dtype | None = None,
    ) -> None:
        """Merge adapters into the base weight; the original is kept and comes back, bit for bit, on unmerging.

        Args:
            safe_merge (`bool`, *optional*, defaults to `False`): refuse to merge this layer where the result is not
                finite.
            adapter_names (`list[str]`, *optional*): which to merge, defaults to the active ones.
            dequantize_to (`torch.dtype`, *optional*): replace a quantized base layer by an `nn.Linear` of this dtype.
            generator (`torch.Generator`, *optional*): round bf16 stochastically; see [`rounded`].
            round_to (`torch.dtype`, *optional*): of a merged weight that is not quantized, defaults to its own.

        Raises:
            ValueError: with `safe_merge`, if the merged weight holds NaN or Inf; this layer is left as it was.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tinylora_A]
        if not names:
            return
        update = functools.reduce(torch.add, map(self.get_delta_weight, self.merged_adapters + names))
        before = KeptBase(self)
        original = self._kept or before
        original.restore()
        base = self.to_stored(self.dense_matrix())
        total = base + update
        if safe_merge and not torch.isfinite(total).all():
            before.restore()
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        if self.quantization_backend is None:
            stored = self.stored_tensor()
            dtype = round_to or stored.dtype
            self._replace_weight(nn.Parameter(rounded(total, dtype, generator), stored.requires_grad))
            base = base.to(dtype).to(base.dtype)  # what rounding does to the base alone is no loss of the update
        elif dequantize_to is not None:
            self.base_layer = floating_linear(self.get_base_layer(), rounded(total, dequantize_to, generator))
            self.quantization_backend = None
            base = base.to(dequantize_to).to(base.dtype)
        else:
            self._quantize_again(total, original)
        self.survival = survival(update, self.to_stored(self.dense_matrix()) - base)
        self._kept = original
        self.merged_adapters.extend(names)

    def _replace_weight(self, weight: nn.Parameter) -> None:
        # A new parameter, not new data in the old one, which a tied layer such as lm_head may hold as well.
        setattr(self.get_base_layer(), self.parameter_name, weight)

    def _quantize_again(self, total: torch.Tensor, original: KeptBase) -> None:
        backend = self.quantization_backend
        assert backend is not None
        if not backend.backend_name.startswith("bnb"):  # the others compute in the dtype of what they quantize
            total = total.to(backend.get_base_weight(self.get_base_layer()).dtype)
        backend.set_base_weight(self, total)
        original.restore_attributes()
        if backend.backend_name == "bnb 4bit":
            # The dtype of what it dequantizes to: that of the model, and not that of `total`.
            before: Any = original.parameter
            self.get_base_layer().weight.quant_state.dtype = before.quant_state.dtype

    def unmerge(self) -> None:
        """Put the original base weight back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        assert self._kept is not None
        self._kept.restore()
        self._kept = None
        self.merged_adapters.clear()


def merge_layers(
    layers: dict[str, Mergeable],
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    stochastic_rounding_seed: int | None = None,
    dequantize_to: torch.dtype | None = None,
    progressbar: bool = False,
    round_to: torch.dtype | None = None,
) -> MergeReport:
    """Merge adapters into all layers, or into none.

    Args:
        layers (`dict[str, Mergeable]`): name in the model -> layer.
        adapter_names (`list[str]`, *optional*): which to merge, defaults to the active ones.
        safe_merge (`bool`, *optional*, defaults to `False`): refuse where a result is not finite.
        stochastic_rounding_seed (`int`, *optional*): round bf16 stochastically; every layer has draws of its own.
        dequantize_to (`torch.dtype`, *optional*): replace quantized base layers by `nn.Linear`s of this dtype.
        progressbar (`bool`, *optional*, defaults to `False`): whether to show one.
        round_to (`torch.dtype`, *optional*): of merged weights that are not quantized, defaults to their own.

    Returns:
        [`MergeReport`]: empty where there was nothing to merge.

    Raises:
        MergeError, ValueError: nothing stays merged.
    """
    for name, layer in layers.items():
        layer.check_mergeable(name, dequantize_to is not None, stochastic_rounding_seed is not None)
    report = MergeReport()
    try:
        for name, layer in tqdm(layers.items(), desc="Merging", disable=not progressbar):
            before = len(layer.merged_adapters)
            generator = None
            if stochastic_rounding_seed is not None:
                generator = torch.Generator().manual_seed(seed_of_module(stochastic_rounding_seed, name))
            with onload_layer(layer):
                layer.merge(safe_merge, adapter_names, dequantize_to, generator, round_to)
            if len(layer.merged_adapters) > before:
                report[name] = layer.survival
    except Exception:
        for name in report:
            layers[name].unmerge()
        raise
    return report


def warn_of_loss(total: Survival, quantized: bool, has_chosen_dtype: bool) -> None:
    """Warn of what a merge lost, with the figure and the remedy."""
    if not math.isfinite(total.relative_error):
        warnings.warn("Merging gave NaN or Inf: unmerge, and check the adapter.", stacklevel=5)
        return
    remedy = "use merge_and_unload(dequantize=True)" if quantized else "load the base model in float32 to merge"
    remedy = "choose float32" if has_chosen_dtype else remedy
    warnings.warn(
        f"Merging lost {min(total.relative_error, 9.99):.0%} of the update to rounding (cosine with the exact one "
        f"{total.cosine:.2f}; `merge_report` has every module). Keep the adapter unmerged, or {remedy}.",
        stacklevel=5,
    )

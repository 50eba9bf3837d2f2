"""A config and a base model -> the weights that its bases are taken from, and what they are called.

An adapter's basis is that of some form of its base model: the weights as loaded, dequantized if they are quantized, or
with `basis="full-precision"` those of the checkpoint. The form is written into a compact file, so that loading onto
another one is noticed before any number is compared.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from peft import PeftConfig
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers import PreTrainedModel

from .config import TinyLoraConfig
from .original import OriginalWeights


FLOAT = "float"  # not quantized; the dtype does not matter, since the same numbers give the same basis in each


class AdaptedWeight(Protocol):
    """What an adapted layer, and a target that is about to be one, say of their weight."""

    quantization_backend: QuantizationBackend | None

    def get_base_layer(self) -> nn.Module:
        """The module without a tuner's layer around it."""


class WeightSource:
    """Where the weights of an adapter's bases are read.

    Args:
        model (`nn.Module`): the base model.
        config (`PeftConfig`): the adapter's.
        weights (`Iterable[TinyLoraLayer]`): what is adapted, or is about to be.

    Raises:
        BasisError: if the original weights are asked for and there is no checkpoint to read.
    """

    def __init__(self, model: nn.Module, config: PeftConfig, weights: Iterable["AdaptedWeight"]) -> None:
        forms = {form_of_weights(weight.get_base_layer(), weight.quantization_backend) for weight in weights}
        is_quantized = bool(forms - {FLOAT})
        self._original: OriginalWeights | None = None
        if is_quantized and isinstance(config, TinyLoraConfig) and config.basis == "full-precision":
            self._original = OriginalWeights(model)
            is_quantized = False
        # A model may keep some layers as they are; its form is that of the quantized ones.
        self.form = ", ".join(sorted(forms - {FLOAT})) if is_quantized else FLOAT
        self.base = model.name_or_path if isinstance(model, PreTrainedModel) else ""
        self.repository = config.basis_repo if isinstance(config, TinyLoraConfig) else None

    def read_original(
        self, key: str, layer: nn.Module, backend: QuantizationBackend | None, shape: tuple[int, ...]
    ) -> torch.Tensor | None:
        """W (out, in) from the checkpoint, on the layer's device; `None` where the loaded weight is meant."""
        if self._original is None or backend is None:
            return None
        device = next(layer.parameters()).device
        return self._original.read(key, layer, shape).to("cpu" if device.type == "meta" else device)


def form_of_weights(layer: nn.Module, backend: QuantizationBackend | None) -> str:
    """ "float", or how a layer is quantized, such as "bnb 4bit nf4"."""
    if backend is None:
        return FLOAT
    if backend.backend_name == "bnb 4bit":
        weight: Any = layer.weight
        return f"{backend.backend_name} {weight.quant_type}"
    return backend.backend_name

"""LoRA-XS, a baseline: W' = W + U S R V^T, of which R (r, r) alone is trained (paper, section 4; arXiv 2405.17604).

No tuner of its own: a LoRA of PEFT without a scale, lora_alpha = r, whose lora_A is V^T and whose lora_B is U S times R.
U, S and V are those that TinyLoRA takes from the same weight, by the same code and out of the same cache. R starts at
zero, so that a new adapter changes nothing. After training it is folded: lora_B = U S R, and what is saved is a LoRA that
any PEFT loads.

The one trap: PEFT makes every parameter of a LoRA trainable again whenever adapters are switched on, as after scoring the
base. So what is frozen is a buffer here. A checkpoint of the Trainer holds all three factors, so that a run that resumes
has the signs that it began with.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_tinylora.assignment import TargetWeight, request_of
from peft_tinylora.build import build_bases
from peft_tinylora.source import WeightSource
from trl_recipes.errors import RecipeError, shown


ADAPTER = "default"


class FrozenFactor(nn.Module):
    """lora_A: x -> V^T x.

    Args:
        A (`torch.Tensor`): V^T, shape (r, in).
    """

    def __init__(self, A: torch.Tensor) -> None:
        super().__init__()
        self.weight: torch.Tensor
        self.register_buffer("weight", A)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., r)."""
        return F.linear(x, self.weight)


class MixedFactor(nn.Module):
    """lora_B: h -> U S R h, with R trained.

    Args:
        US (`torch.Tensor`): shape (out, r), float32.
    """

    def __init__(self, US: torch.Tensor) -> None:
        super().__init__()
        self.US: torch.Tensor
        self.register_buffer("US", US)
        self.R = nn.Parameter(US.new_zeros(US.shape[1], US.shape[1]))

    @property
    def weight(self) -> torch.Tensor:
        """U S R, shape (out, r): what PEFT reads to merge."""
        return self.US @ self.R

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h (..., r) -> (..., out)."""
        return F.linear(F.linear(h, self.R), self.US)


def install(model: PeftModel) -> None:
    """
    Turns the LoRA of a model into a LoRA-XS, in place; call it before training.

    Args:
        model ([`~peft.PeftModel`]): with a new LoRA with lora_alpha = r, on linear layers, quantized or not.

    Raises:
        RecipeError: for a layer that is not linear; names it.
        BasisError: if a weight has fewer than r rows or columns, or holds NaN; names the module.
        UnsupportedModuleError: if no singular vectors can be taken from a weight; names the module.
    """
    base, config = model.get_base_model(), model.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig)
    layers = lora_layers(model)
    for name, layer in layers.items():
        if ADAPTER not in layer.lora_B:
            raise RecipeError(
                f"lora-xs adapts linear layers, and {shown(name)} is none: take it out of lora_target_modules."
            )
    weights = {name: TargetWeight(base, name, None) for name in layers}
    source = WeightSource(base, config, weights.values())
    requests = [request_of(source, name, weight, config.r) for name, weight in weights.items()]
    bases = build_bases(requests, source, sigma="left", canonical=True)
    for name, layer in layers.items():
        training = layer.lora_B[ADAPTER].training
        device = layer.lora_B[ADAPTER].get_parameter("weight").device
        layer.lora_A[ADAPTER] = FrozenFactor(bases[name].A.to(device, torch.float32)).train(training)
        layer.lora_B[ADAPTER] = MixedFactor(bases[name].B.to(device, torch.float32)).train(training)


def fold(model: PeftModel) -> None:
    """Turns a trained LoRA-XS into the LoRA that it is, in place: lora_A = V^T, lora_B = U S R, rounded once to fp32."""
    for layer in lora_layers(model).values():
        A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        assert isinstance(A, FrozenFactor) and isinstance(B, MixedFactor)
        layer.lora_A[ADAPTER] = linear(A.weight)
        layer.lora_B[ADAPTER] = linear((B.US.double() @ B.R.detach().double()).to(B.R.dtype))


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by their names in the base model, in model order."""
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def linear(weight: torch.Tensor) -> nn.Linear:
    """A layer without a bias that multiplies by `weight` (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer

"""An adapted layer against the formula in float64, whatever the layer type and dtype."""

import warnings

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_tinylora import BasisError, TinyLoraConfig, UnsupportedModuleError


class Toy(nn.Module):
    """One module of each supported type; ids (batch, length) -> (batch, length, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.linear = nn.Linear(10, 8)
        self.conv = Conv1D(6, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(ids))))


TARGETS = ["embed", "linear", "conv"]
IDS = torch.tensor([[0, 3, 10], [7, 7, 1]])


def adapted(dtype: torch.dtype = torch.float32, **fields: object) -> nn.Module:
    config = {"r": 2, "u": 3, "tie": "full", "target_modules": TARGETS, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Toy().to(dtype), TinyLoraConfig(**config))
    fill_vectors(model, scale=0.5)
    return model


def reference(model: nn.Module, sigma: str) -> torch.Tensor:
    """The forward in float64 from the dense formula W' = W + U S (sum_i v_i P_i) V^T, decomposing W here."""
    toy = model.base_model.model
    weights = {}
    for name in TARGETS:
        layer = getattr(toy, name)
        stored = layer.base_layer.weight.detach().double()
        W = stored.T if name == "conv" else stored
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        U, S, Vh = U[:, :2], S[:2], Vh[:2]
        # the sign of a pair is a choice, taken from the layer; everything else is computed here
        signs = (layer.tinylora_A["default"].double() * Vh).sum(dim=1).sign()
        U, Vh = U * signs, Vh * signs[:, None]
        [v] = [v.detach().double() for v in layer.vectors("default")]
        R = sum(v[i] * layer.tinylora_P["default"][i].double() for i in range(len(v)))
        if sigma == "left":
            update = U @ torch.diag(S) @ R @ Vh
        else:
            update = U @ torch.diag(S.sqrt()) @ R @ torch.diag(S.sqrt()) @ Vh
        weights[name] = W + update
    hidden = torch.tanh(weights["embed"][IDS] @ weights["linear"].T + toy.linear.base_layer.bias.detach().double())
    return hidden @ weights["conv"].T + toy.conv.base_layer.bias.detach().double()


@pytest.mark.parametrize("sigma", ["left", "split"])
def test_forward_is_the_formula_in_float64(sigma: str) -> None:
    model = adapted(sigma=sigma)
    base = model.get_base_model()
    expected = reference(model, sigma)
    torch.testing.assert_close(model(IDS).double(), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert (base(IDS).double() - expected).abs().max() > 0.02  # the adapter does something


@pytest.mark.parametrize("sigma", ["left", "split"])
def test_gradient_of_v_by_finite_differences(sigma: str) -> None:
    model = adapted(torch.float64, sigma=sigma, tie="none")
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert [p.dtype for p in parameters] == [torch.float64] * 3
    model(IDS).pow(2).sum().backward()
    step = 1e-6
    for v in parameters:
        for i in range(len(v)):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    v[i] += sign * step
                    losses.append(model(IDS).pow(2).sum())
                    v[i] -= sign * step
            torch.testing.assert_close(v.grad[i], (losses[0] - losses[1]) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_v_and_factors_stay_fp32_on_a_low_precision_base(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer = model.base_model.model.linear
    assert {layer.tinylora_A["default"].dtype, layer.tinylora_B["default"].dtype} == {torch.float32}
    output = model(IDS)
    assert output.dtype == dtype
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), reference(model, "left"), rtol=8 * resolution, atol=8 * resolution)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_update(dtype: torch.dtype) -> None:
    model = adapted()
    layer = model.base_model.model.linear
    x = torch.randn(64, 10)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(x).dtype == dtype
    # the update alone: a base of zeros leaves nothing else
    layer.base_layer.weight.data.zero_()
    layer.base_layer.bias.data.zero_()
    expected = x.double() @ layer.get_delta_weight("default").detach().double().T
    with torch.autocast("cpu", dtype=dtype):
        got = layer(x).double()
    # one rounding at the very end
    torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_does_not_round_the_update_of_an_embedding() -> None:
    model = adapted()
    wanted = model.base_model.model.embed(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.base_model.model.embed(IDS), wanted, rtol=1e-6, atol=1e-6)


def test_new_adapter_changes_nothing_to_the_bit() -> None:
    toy = Toy()
    before = toy(IDS)
    model = get_peft_model(toy, TinyLoraConfig(u=1, tie="full", target_modules=TARGETS))
    assert torch.equal(model(IDS), before)


def test_dropout_acts_in_training_only() -> None:
    model = adapted(tinylora_dropout=0.5)
    model.eval()
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_scaled_embedding_scales_its_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    toy = Toy()
    toy.embed = Scaled(11, 10)
    model = get_peft_model(toy, TinyLoraConfig(u=1, tie="full", target_modules=["embed"]))
    fill_vectors(model)
    output = model(IDS)
    torch.testing.assert_close(model.merge_and_unload()(IDS), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_weights", ["uniform", False])
def test_random_start_is_within_its_bound(init_weights: object) -> None:
    config = TinyLoraConfig(
        u=50, tie="full", target_modules=TARGETS, r=6, init_weights=init_weights, init_v_bound=0.25
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v = get_peft_model(Toy(), config).tinylora_v["default"]["0"]
    assert 0.1 < v.abs().max() <= 0.25


def test_too_many_numbers_for_the_modules_warns() -> None:
    with pytest.warns(UserWarning, match=r"u=13 numbers are trained for 1 module\(s\) with r=2, .* only 4 of them"):
        get_peft_model(Toy(), TinyLoraConfig(u=13, tie="none", target_modules=TARGETS))


def test_refused_before_anything_is_wrapped() -> None:
    for fields, error, message in [
        ({"r": 9, "target_modules": TARGETS}, BasisError, r"r=9 is larger than the smallest side of module 'linear'"),
        ({"target_modules": [*TARGETS, "norm"]}, UnsupportedModuleError, r"'norm' \(LayerNorm\) is not supported"),
        ({"target_modules": ["lin"]}, ValueError, r"Target modules \{'lin'\} not found in the base model"),
    ]:
        toy = Toy()
        toy.norm = nn.LayerNorm(6)
        names = [name for name, _ in toy.named_modules()]
        with pytest.raises(error, match=message):
            get_peft_model(toy, TinyLoraConfig(u=1, tie="full", **fields))
        assert [name for name, _ in toy.named_modules()] == names


def test_broken_weight_is_refused_by_name_before_anything_is_wrapped() -> None:
    toy = Toy()
    toy.conv.weight.data[0, 0] = float("nan")
    with pytest.raises(BasisError, match=r"weight of module 'conv' holds NaN or Inf"):
        get_peft_model(toy, TinyLoraConfig(u=1, tie="full", target_modules=TARGETS))
    assert isinstance(toy.linear, nn.Linear)


def test_quantized_weight_is_refused_by_name() -> None:
    toy = Toy()
    toy.linear.weight = nn.Parameter(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModuleError, match=r"'linear' stores its weight as torch.uint8"):
        get_peft_model(toy, TinyLoraConfig(u=1, tie="full", target_modules=TARGETS))

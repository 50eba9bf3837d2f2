"""weight.py: what a basis can be taken from, what is refused, and the dense weight of a quantized layer."""

from types import SimpleNamespace

import bitsandbytes.functional as F
import pytest
import torch
from peft import get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from quantized import BACKENDS, GROUP, HUB, skip_unless_installed
from support import make_tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_tinylora import TinyLoraConfig, UnsupportedModuleError
from peft_tinylora import weight as weight_module
from peft_tinylora.weight import check_supported, dense_matrix, dequantize_model, quantization_backend


CONFIG = {"r": 2, "u": 1, "tie": "full", "target_modules": "all-linear"}


@pytest.fixture
def folder(tmp_path):
    make_tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    return tmp_path


def test_dense_matrix_of_plain_layers_is_out_by_in():
    for layer in (nn.Linear(5, 3), nn.Embedding(3, 5)):
        assert torch.equal(dense_matrix(layer, None), layer.weight)
    conv = Conv1D(3, 5)
    assert torch.equal(dense_matrix(conv, None), conv.weight.T)
    assert dense_matrix(nn.Linear(5, 3, dtype=torch.bfloat16), None).dtype == torch.float32
    assert dense_matrix(nn.Linear(5, 3, dtype=torch.float64), None).dtype == torch.float64


def test_a_plain_layer_asks_no_quantization_library(monkeypatch):
    monkeypatch.setattr(weight_module, "resolve_quantization_backend", lambda *a, **k: pytest.fail("asked"))
    assert quantization_backend(nn.Linear(2, 2), nn.Identity()) is None
    get_peft_model(make_tiny_llama(), TinyLoraConfig(**CONFIG))


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_dequantized_weight_is_code_times_scale(folder, quantization):
    """bitsandbytes' own numbers, put together by hand."""
    layer = BACKENDS[f"bnb-{quantization}"](folder).model.layers[0].mlp.down_proj
    packed, state = layer.weight.data.flatten(), layer.weight.quant_state
    codes = state.code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()]
    by_hand = (codes.view(-1, state.blocksize) * state.absmax[:, None]).view(layer.out_features, layer.in_features)
    torch.testing.assert_close(dense_matrix(layer, quantization_backend(layer, nn.Identity())), by_hand)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_dtype_without_singular_vectors_is_refused_by_name(dtype):
    model = make_tiny_llama()
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    before = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModuleError, match=r"layers\.1\.self_attn\.k_proj.*float8|int8.*load_in_4bit"):
        get_peft_model(model, TinyLoraConfig(**CONFIG))
    assert [type(module) for module in model.modules()] == before


def test_a_weight_packed_for_inference_is_refused(folder):
    model = BACKENDS["bnb-nf4"](folder)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data, layer.weight.quant_state = F._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(UnsupportedModuleError, match=r"mlp\.up_proj.*packed.*before the first forward"):
        get_peft_model(model, TinyLoraConfig(**CONFIG))


def test_rows_that_the_cpu_kernel_misreads_are_refused(tmp_path):
    make_tiny_llama(hidden_size=96, intermediate_size=128, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModuleError, match=r"rows \(96\) are no multiple of its block size \(64\)"):
        get_peft_model(BACKENDS["bnb-nf4"](tmp_path), TinyLoraConfig(**CONFIG))
    # 128 of them is a multiple
    get_peft_model(BACKENDS["bnb-nf4"](tmp_path), TinyLoraConfig(**CONFIG | {"target_modules": ["down_proj"]}))


def test_that_kernel_still_misreads_them():
    """Fails when bitsandbytes reads such rows: then the refusal above can go, with its version."""
    W = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    quantized, state = F.quantize_4bit(W, quant_type="nf4", blocksize=64)
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the kernel in question needs AVX512")
    assert (F.dequantize_4bit(quantized, state) - W).norm() / W.norm() > 0.15  # 0.09 is the error of NF4


class ComputesOnly(nn.Module):
    """A layer whose weight cannot be read, as GPTQ's, AWQ's and AQLM's."""

    def __init__(self, out_features: int, in_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("hidden", torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.hidden, self.bias).to(x.dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_that_cannot_be_read_is_asked_of_the_forward(monkeypatch, bias):
    monkeypatch.setattr(weight_module, "IDENTITY_ROWS", 16)  # several blocks, the last one smaller
    layer = ComputesOnly(24, 40, bias)
    W = dense_matrix(layer, ForwardOnlyQuantizationBackend("gptq"))
    torch.testing.assert_close(W, layer.hidden, atol=4e-3, rtol=2e-3)  # through float16


def packed_layer(method: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """A real layer of that method, (96, 64), and the weight that it was made of.

    Its bias is of the size of Qwen2's: in float16, a weight and such a bias add up to the bias.
    """
    skip_unless_installed(method)
    linear = nn.Linear(64, 96, bias=False).requires_grad_(False)
    weight = linear.weight.detach().clone()
    layer = HUB[method][0](linear, dtype).eval()
    layer.bias = nn.Parameter((100 * torch.randn(96)).to(dtype), requires_grad=False)
    return layer, weight


def numbers_in(packed: torch.Tensor, axis: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """The 4-bit numbers in int32: eight in each, in this order, one after the other along `axis`."""
    return torch.stack([packed >> 4 * place & 15 for place in order], dim=axis + 1).flatten(axis, axis + 1).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_weight_of_gptq_and_awq_is_scale_times_number_less_zero(method, dtype):
    """Put together by hand from the packed buffers, which stay as they were."""
    layer, _ = packed_layer(method, dtype)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    order = (0, 4, 1, 5, 2, 6, 3, 7) if method == "awq" else tuple(range(8))
    numbers = numbers_in(layer.qweight, 1 if method == "awq" else 0, order).T.view(96, -1, GROUP)
    zeros, scales = numbers_in(layer.qzeros, 1, order).T[:, :, None], layer.scales.float().T[:, :, None]
    W = dense_matrix(layer, quantization_backend(layer, nn.Identity()))
    rounding = torch.finfo(dtype).eps  # it multiplies in that dtype
    torch.testing.assert_close(W, ((numbers - zeros) * scales).flatten(1), atol=0, rtol=rounding)
    after = layer.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_of_aqlm_is_its_codebook(dtype):
    layer, weight = packed_layer("aqlm", dtype)
    W = dense_matrix(layer, quantization_backend(layer, nn.Identity()))
    assert torch.equal(W, weight.to(dtype).float())


def test_a_weight_that_gptqmodel_packed_for_inference_is_refused(folder, tokens):
    skip_unless_installed("gptq")
    model = BACKENDS["gptq-hub"](folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model(tokens)
    with pytest.raises(UnsupportedModuleError, match=r"gptqmodel has packed.*before the first forward"):
        get_peft_model(model, TinyLoraConfig(**CONFIG))


def test_layers_of_transformer_engine_with_a_norm_are_refused():
    """Stands in for layers whose library needs CUDA to be built."""
    layer = type("LayerNormLinear", (nn.Module,), {})()
    with pytest.raises(UnsupportedModuleError, match=r"'qkv' .LayerNormLinear.* normalizes its input"):
        check_supported(layer, "qkv", ForwardOnlyQuantizationBackend("te"))


def test_another_layer_is_refused_by_name():
    with pytest.raises(UnsupportedModuleError, match="'conv' .Conv2d. is not supported"):
        check_supported(nn.Conv2d(1, 1, 1), "conv", None)


def test_torchao_without_its_config_is_trained_and_not_merged(folder):
    skip_unless_installed("torchao")
    from torchao import quantize_
    from torchao.quantization import Int8WeightOnlyConfig

    from peft_tinylora import MergeError

    model = make_tiny_llama(num_hidden_layers=1)
    quantize_(model.model, Int8WeightOnlyConfig())
    model = get_peft_model(model, TinyLoraConfig(**CONFIG))
    with pytest.raises(MergeError, match="torchao cannot quantize its weight again.*dequantize=True"):
        model.merge_adapter()
    model.merge_and_unload(dequantize=True)


def test_a_base_that_passes_no_gradient_is_warned_of(tokens):
    skip_unless_installed("torchao")
    from torchao import quantize_
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = make_tiny_llama(num_hidden_layers=1)
    quantize_(model.model, Int8DynamicActivationInt8WeightConfig())
    model = get_peft_model(model, TinyLoraConfig(**CONFIG))
    with pytest.warns(UserWarning, match="torchao passes no gradient.*Quantize weights only"):
        model(tokens)


def test_dequantizing_leaves_no_mark_of_quantization(folder):
    model = BACKENDS["bnb-int8"](folder)
    dequantize_model(model, torch.bfloat16)
    assert {module.weight.dtype for module in model.model.modules() if isinstance(module, nn.Linear)} == {
        torch.bfloat16
    }
    assert not model.is_quantized and not hasattr(model.config, "quantization_config")


def test_a_backend_whose_gradient_vanishes_is_refused_by_name() -> None:
    """Stands in for Intel Neural Compressor's fp8 layers, whose library no test environment has."""
    with pytest.raises(UnsupportedModuleError, match=r"'model\.q_proj' is quantized by Intel Neural Compressor"):
        check_supported(nn.Linear(4, 4), "model.q_proj", SimpleNamespace(backend_name="inc"))

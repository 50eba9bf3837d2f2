"""What every quantized base must do, on real models of each backend that runs on a CPU."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantized import BACKENDS, CANNOT_MERGE, skip_unless_installed
from support import TRANSFORMERS_REFUSES_PEFT, fill_vectors, make_tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_tinylora import BasisMismatchError, MergeError, TinyLoraConfig
from peft_tinylora.layer import layers_of


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Merging lost"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),  # it names a kernel that can be trained
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A float model whose shapes every backend takes: bitsandbytes' rows are multiples of 64."""
    folder = tmp_path_factory.mktemp("model")
    model = make_tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    # Two leading directions that stand out, or float32 and float64 would not agree on them to the stated tolerance.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in (m for m in model.model.modules() if isinstance(m, nn.Linear)):
            U, S, Vh = torch.linalg.svd(torch.randn(layer.weight.shape, generator=generator), full_matrices=False)
            scale = torch.linalg.matrix_norm(layer.weight, 2)
            layer.weight += scale * (1.5 * U[:, :1] @ Vh[:1] + 0.8 * U[:, 1:2] @ Vh[1:2])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Its name, wherever its library is installed."""
    skip_unless_installed(request.param)
    return request.param


@pytest.fixture
def load(backend, folder) -> Callable[..., PreTrainedModel]:
    """Loads the base model, freshly quantized at each call."""
    return lambda dtype=torch.float32: BACKENDS[backend](folder, dtype=dtype)


@pytest.fixture
def load_mergeable(backend, load) -> Callable[..., PreTrainedModel]:
    """As `load`, of the backends that can quantize a changed weight again."""
    if backend in CANNOT_MERGE:
        pytest.skip(f"{backend} cannot merge: test_merging_where_it_cannot_be_done")
    return load


def adapt(base: PreTrainedModel, **fields: object) -> PeftModel:
    settings = {"r": 2, "u": 2, "tie": "tiled", "n_tie": 3, "target_modules": "all-linear"} | fields
    return get_peft_model(base, TinyLoraConfig(**settings)).eval()


@torch.no_grad()
def what_it_multiplies_by(layer: nn.Module) -> np.ndarray:
    """W (out, in) in float64 from the quantized kernel itself: its product with the identity.

    In training mode, for bitsandbytes' 8-bit layers round their input in evaluation mode.
    """
    return layer.train()(torch.eye(layer.in_features)).T.double().numpy()


def test_every_linear_module_is_adapted_and_v_is_fp32(load):
    model = adapt(load(torch.bfloat16))
    assert len(layers_of(model)) == 14
    assert all(layer.quantization_backend is not None for layer in layers_of(model).values())
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 and set(trained.values()) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_op_at_zero_to_the_bit(load, tokens, dtype):
    base = load(dtype)
    model = adapt(load(dtype))
    assert torch.equal(model(tokens).logits, untouched_logits(base, tokens))


def untouched_logits(base: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # the tuner sets this too, and the next, and says why
        if hasattr(module, "linear_mode"):
            module.linear_mode = "train"
    return base(tokens).logits


@torch.no_grad()
def test_the_update_is_that_of_float64(load):
    """Stated tolerance: 1e-4 of the update's norm, beside the rounding of a float32 sum with the base's output."""
    model = adapt(load())
    fill_vectors(model)
    for name, layer in layers_of(model).items():
        U, S, Vh = np.linalg.svd(what_it_multiplies_by(layer.base_layer))
        signs = np.sign(Vh[np.arange(2), np.abs(Vh[:2]).argmax(axis=1)])
        U, S, Vh = U[:, :2] * signs, S[:2], Vh[:2] * signs[:, None]
        [v] = layer.vectors("default")
        P = layer.tinylora_P["default"].double().numpy()
        delta = U * S @ np.einsum("u,urs->rs", v.double().numpy(), P) @ Vh
        x = torch.randn(5, layer.in_features)
        base = layer.base_layer(x)
        update = (layer(x) - base).double().numpy()
        expected = x.double().numpy() @ delta.T
        error = np.linalg.norm(update - expected)
        assert error <= 1e-4 * np.linalg.norm(expected) + 1e-6 * base.norm().item(), name


def test_the_gradient_is_that_of_finite_differences(backend, load, tokens):
    # gptqmodel's AWQ layers compute in float16, whatever they are given, which drowns small differences.
    step, atol = (0.1, 5e-5) if backend == "awq" else (0.01, 2e-5)
    model = adapt(load(), u=1).train()
    fill_vectors(model, 0.1)
    loss_of = lambda: model(tokens).logits.double().logsumexp(-1).mean()  # noqa: E731
    loss_of().backward()
    for group, v in model.tinylora_v["default"].items():
        with torch.no_grad():
            v += step
            above = loss_of()
            v -= 2 * step
            below = loss_of()
            v += step
        assert v.grad.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=0.02, abs=atol), group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_after_generation(load, tokens, dtype):
    """GRPO generates first. Then bitsandbytes (with AVX512-BF16) and gptqmodel (in bf16) pack 4-bit weights on a CPU, and
    no gradient passes."""
    model = adapt(load(dtype))
    fill_vectors(model, 0.1)
    model.generate(tokens, max_new_tokens=2, do_sample=False)
    fresh = adapt(load(dtype))
    fill_vectors(fresh, 0.1)
    for each in (model, fresh):
        each.train()(input_ids=tokens, labels=tokens).loss.backward()
    for v, other in zip(model.tinylora_v["default"].values(), fresh.tinylora_v["default"].values(), strict=True):
        assert torch.equal(v.grad, other.grad) and v.grad.abs().sum() > 0


@torch.no_grad()
def test_a_saved_adapter_does_the_same_on_a_freshly_quantized_base(load, tokens, tmp_path):
    model = adapt(load())
    fill_vectors(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert torch.equal(again(tokens).logits, expected)
    assert not torch.allclose(expected, load()(tokens).logits, atol=1e-3)


def test_training_lowers_the_loss(load, tokens):
    model = adapt(load()).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02


def state_of(model: PeftModel) -> dict[str, object]:
    """The state dict, torchao's tensors as the plain ones that they consist of, which can be compared."""
    state = {}
    for key, value in model.base_model.model.state_dict().items():
        names = value.__tensor_flatten__()[0] if type(value).__module__.startswith("torchao") else []
        state |= {f"{key}.{name}": getattr(value, name) for name in names} or {key: value}
    return state


@torch.no_grad()
def test_unmerging_gives_back_the_base_bit_for_bit(load_mergeable, tokens):
    model = adapt(load_mergeable())
    fill_vectors(model)
    before = copy.deepcopy(state_of(model))
    logits = model(tokens).logits
    parameters = dict(model.named_parameters())
    model.merge_adapter()
    assert not torch.equal(model(tokens).logits, logits)
    model.unmerge_adapter()
    after = state_of(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, key
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(tokens).logits, logits)


@torch.no_grad()
def test_the_report_is_that_of_the_weights_before_and_after(load_mergeable):
    model = adapt(load_mergeable())
    fill_vectors(model)
    layers = layers_of(model.base_model.model)
    before = {name: what_it_multiplies_by(layer.base_layer) for name, layer in layers.items()}
    exact = {name: layer.get_delta_weight("default").double().numpy() for name, layer in layers.items()}
    model.merge_adapter()
    assert model.merge_report.keys() == layers.keys()
    for name, layer in layers.items():
        survived = what_it_multiplies_by(layer.base_layer) - before[name]
        error = np.linalg.norm(survived - exact[name]) / np.linalg.norm(exact[name])
        cosine = (survived * exact[name]).sum() / np.linalg.norm(survived) / np.linalg.norm(exact[name])
        assert model.merge_report[name].relative_error == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert model.merge_report[name].cosine == pytest.approx(cosine, abs=1e-3)


@torch.no_grad()
def test_merging_where_it_cannot_be_done(backend, load, tokens):
    if backend not in CANNOT_MERGE:
        pytest.skip(f"{backend} can merge: test_unmerging_gives_back_the_base_bit_for_bit")
    model = adapt(load())
    fill_vectors(model)
    logits = model(tokens).logits
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            MergeError, match=r"'model\.layers\.0\.self_attn\.[qk]_proj'.*merge_and_unload\(dequantize=True\)"
        ):
            merge()
        assert torch.equal(model(tokens).logits, logits)


@torch.no_grad()
def test_merging_and_dequantizing_gives_a_float_model(backend, load, tokens, tmp_path):
    model = adapt(load(), target_modules=["q_proj", "down_proj"])  # the others are to be dequantized too
    fill_vectors(model)
    expected = model.train()(tokens).logits  # bitsandbytes' 8-bit layers round their input in evaluation mode
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is lost, so nothing is warned of
        merged = model.merge_and_unload(dequantize=True).eval()
    assert {type(module) for module in merged.modules() if hasattr(module, "in_features")} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    atol, rtol = (1e-3, 1e-2) if backend == "awq" else (1e-5, 1e-4)  # which computes in float16
    torch.testing.assert_close(merged(tokens).logits, expected, atol=atol, rtol=rtol)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, merged(tokens).logits)


@torch.no_grad()
def test_a_second_adapter_and_switching(load, tokens):
    model = adapt(load())
    fill_vectors(model)
    first = model(tokens).logits
    model.add_adapter("second", TinyLoraConfig(r=2, u=1, tie="full", target_modules="all-linear"))
    model.set_adapter("second")
    fill_vectors(model, adapter_name="second")
    second = model(tokens).logits
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(model(tokens).logits, first)
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, untouched_logits(model.base_model.model, tokens))


@torch.no_grad()
def test_what_users_do_around_an_adapter(backend, load, tokens, tmp_path):
    """low_cpu_mem_usage, deepcopy, moving to the same device."""
    model = adapt(load())
    fill_vectors(model)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "peft")
    low = PeftModel.from_pretrained(load(), tmp_path / "peft", low_cpu_mem_usage=True).eval()
    assert torch.equal(low(tokens).logits, expected)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    if backend not in CANNOT_MERGE:
        model.merge_adapter()
        model.to("cpu")
        model.unmerge_adapter()
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.skipif(TRANSFORMERS_REFUSES_PEFT, reason="transformers wants a newer PEFT for its own adapter methods")
def test_an_adapter_that_transformers_adds_is_that_of_peft(load, tokens):
    model = adapt(load())
    fill_vectors(model)
    base = load()
    base.add_adapter(model.peft_config["default"])
    fill_vectors(base)
    assert torch.equal(base.eval()(tokens).logits, model(tokens).logits)


def test_prepare_model_for_kbit_training_and_gradient_checkpointing(load, tokens):
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = adapt(base).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    plain = adapt(load()).train()
    plain(input_ids=tokens, labels=tokens).loss.backward()
    for v, other in zip(model.tinylora_v["default"].values(), plain.tinylora_v["default"].values(), strict=True):
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.grad, other.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("other", ["bnb-fp4", None])
def test_another_quantization_of_the_base_is_refused(folder, tmp_path, other):
    adapt(BACKENDS["bnb-nf4"](folder)).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder) if other is None else BACKENDS[other](folder)
    with pytest.raises(BasisMismatchError, match="adapter's basis is that of bnb 4bit nf4 weights"):
        PeftModel.from_pretrained(base, tmp_path)

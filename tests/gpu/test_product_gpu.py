"""The fused product on a GPU: against float64, in CUDA graphs, and in mixed batches."""

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors, make_tiny_llama

from peft_tinylora import AdapterBank, TinyLoraConfig
from peft_tinylora.thin import CONVERTED_UP_TO, Thin


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DEVICE = "cuda"
TILED = {"r": 2, "u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("rows", [3, CONVERTED_UP_TO // 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thin_products_are_those_in_float64(rows: int, dtype: torch.dtype) -> None:
    M = Thin(torch.randn(2, 96, device=DEVICE))
    x, y, h = torch.randn(rows, 96).to(DEVICE, dtype), torch.randn(rows, 96).to(DEVICE, dtype), torch.randn(rows, 2)
    h = 0.01 * h.to(DEVICE)
    exact = x.double() @ M.M.double().T
    assert ((M.project(x).double() - exact).abs() <= 2**-14 * (x.double().abs() @ M.M.double().abs().T)).all()
    exact = y.double() + h.double() @ M.M.double()
    M.add_to(y, h)
    assert ((y.double() - exact).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_and_gradients_are_those_of_the_cpu(tokens, dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", DEVICE):
        model = get_peft_model(make_tiny_llama().to(dtype), TinyLoraConfig(**TILED)).to(device)
        fill_vectors(model, 0.3)
        logits = model(tokens.to(device)).logits
        logits.float().square().mean().backward()
        gradients = torch.stack([v.grad for v in model.tinylora_v["default"].values()])
        results.append((logits.float().cpu(), gradients.cpu()))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)


def test_a_captured_graph_follows_v(tokens) -> None:
    model = get_peft_model(make_tiny_llama().to(DEVICE), TinyLoraConfig(**TILED)).eval()
    ids = tokens.to(DEVICE)
    fill_vectors(model, 0.3)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(ids, use_cache=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(ids, use_cache=False).logits
    for seed in range(3):
        fill_vectors(model, 0.3, seed=seed)
        graph.replay()
        replayed = captured.clone()
        with torch.no_grad():
            torch.testing.assert_close(replayed, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_follows_v(tokens) -> None:
    model = get_peft_model(make_tiny_llama().to(DEVICE), TinyLoraConfig(**TILED)).eval()
    compiled = torch.compile(model.get_base_model(), mode="reduce-overhead", fullgraph=True)
    for seed in range(3):
        fill_vectors(model, 0.3, seed=seed)
        with torch.no_grad():
            got = compiled(tokens.to(DEVICE), use_cache=False).logits.clone()
            torch.testing.assert_close(got, model(tokens.to(DEVICE)).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_its_own_adapter(tokens, dtype: torch.dtype) -> None:
    model = get_peft_model(make_tiny_llama().to(DEVICE, dtype), TinyLoraConfig(**TILED)).eval()
    bank = AdapterBank(model)
    for name in "ab":
        bank[name] = 0.5 * torch.randn(7, 1)
    ids = tokens.to(DEVICE)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["a", "b", "__base__"]).logits
        for row, name in enumerate("ab"):
            for group, v in enumerate(bank[name]):
                model.tinylora_v["default"][str(group)].copy_(v)
            tolerance = 1e-4 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(mixed[row], model(ids).logits[row], rtol=tolerance, atol=tolerance)

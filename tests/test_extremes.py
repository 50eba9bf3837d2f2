"""Weights and vectors at the ends of what numbers can be, against torch.linalg.svd and the formula in float64."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import run_python_process
from torch import nn

from peft_tinylora import BasisError, TinyLoraConfig, TinyLoraLayer
from peft_tinylora.basis import compute_basis, residual
from peft_tinylora.survival import survival


WEIGHT = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))


def single(W: torch.Tensor, r: int = 2, sigma: str = "left", v: float | None = None) -> PeftModel:
    """A linear layer of weight W, named "0", with an adapter of u=2."""
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    linear.weight.data = W.clone()
    model = get_peft_model(
        nn.Sequential(linear), TinyLoraConfig(r=r, u=2, tie="none", sigma=sigma, target_modules=["0"])
    )
    if v is not None:
        model.tinylora_v["default"]["0"].data.copy_(torch.tensor([v, -0.5 * v]))
    return model


def layer_of(model: PeftModel) -> TinyLoraLayer:
    return model.base_model.model[0]


def exact_output(model: PeftModel, W: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x (W + U S R V^T)^T in float64, by a decomposition of its own; v and P are the model's."""
    v, P = model.tinylora_v["default"]["0"].detach().double(), layer_of(model).tinylora_P["default"].double()
    r = P.shape[-1]
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh[:r]])
    update = (U[:, :r] * S[:r] * signs) @ torch.einsum("u,urs->rs", v, P) @ (signs[:, None] * Vh[:r])
    return x.double() @ (W.double() + update).T


@pytest.mark.parametrize("sigma", ["left", "split"])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(torch.float32, exponent) for exponent in (-38, -30, -20, -16, 0, 16, 20, 30, 36)]
    + [(torch.float64, exponent) for exponent in (-300, -200, -160, -30, 0, 30, 160, 300)],
)
def test_the_basis_of_tiny_and_huge_weights(exponent: int, dtype: torch.dtype, sigma: str) -> None:
    W = WEIGHT.to(dtype) * 10.0**exponent
    A, B, angle = compute_basis(W, 2, sigma)
    U, S, Vh = torch.linalg.svd(W.double() / 10.0**exponent)
    product = (B.double() / 10.0**exponent) @ A.double()
    assert angle < 1e-4
    torch.testing.assert_close(product, (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-6 * S[0].item())
    lengths = [A.double().norm(dim=1), (B.double() / 10.0**exponent).norm(dim=0)]
    expected = [torch.ones(2).double(), S[:2]]
    if sigma == "split":
        lengths, expected = [A.double().norm(dim=1) / 10.0 ** (exponent / 2)], [S[:2].sqrt()]
    torch.testing.assert_close(lengths, expected, rtol=1e-6, atol=0)
    other = WEIGHT.flip(0).to(dtype) * 10.0**exponent
    assert residual(W, A, B) < 1e-6 and residual(other, A, B) > 0.1


def test_subnormal_weights_have_the_basis_of_the_bits_that_are_left() -> None:
    W = WEIGHT * 1e-42
    A, B, angle = compute_basis(W, 2, "split")
    U, S, Vh = torch.linalg.svd(W.double())
    assert angle < 1e-4
    torch.testing.assert_close(B.double() @ A.double(), (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-3 * S[0].item())


@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_a_merge_is_measured_whatever_the_size_of_the_weights(exponent: int) -> None:
    W = WEIGHT * 10.0**exponent
    model = single(W, v=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that NaN or Inf came out of it
        model.merge_adapter()
    total = model.merge_report.total
    assert 1e-6 < total.relative_error < 1e-3 and total.cosine == pytest.approx(1.0, abs=1e-6)
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, W)
    lost = survival(W, torch.zeros_like(W))
    assert (lost.cosine, lost.relative_error) == (0.0, 1.0)


@pytest.mark.parametrize("v", [1e4, -1e4, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_with_a_huge_or_tiny_v(v: float, dtype: torch.dtype) -> None:
    W = WEIGHT.to(dtype)
    model, x = single(W, v=v), torch.randn(5, 24).to(dtype)
    expected = exact_output(model, W, x)
    # bfloat16 keeps 8 bits of what the base gives and of the sum.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    assert (model(x).double() - expected).abs().max() < 2 * tolerance * expected.abs().max()


def test_training_with_far_too_large_a_learning_rate_keeps_base_and_formula() -> None:
    model = single(WEIGHT)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(64, 24, generator=generator)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    v = model.tinylora_v["default"]["0"]
    assert v.isfinite().all() and v.abs().max() > 1e3
    expected = exact_output(model, WEIGHT, x)
    assert (model(x).double() - expected).abs().max() < 2e-6 * expected.abs().max()
    model.merge_adapter()
    assert (model(x).double() - expected).abs().max() < 2e-6 * expected.abs().max()
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, WEIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_v_of_zero_changes_no_bit(dtype: torch.dtype) -> None:
    W, x = WEIGHT.to(dtype), torch.randn(5, 24).to(dtype)
    model = single(W)
    assert torch.equal(model(x), nn.functional.linear(x, W))
    model.merge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, W)
    assert model.merge_report.total.relative_error == 0.0


def test_a_weight_of_zeros_is_not_changed_and_gives_gradients_of_zero() -> None:
    model = single(torch.zeros(12, 8), v=3.0)
    output = model(torch.randn(4, 8))
    output.sum().backward()
    assert not output.any() and not model.tinylora_v["default"]["0"].grad.any()
    assert layer_of(model).basis("default").determined


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (400, 600)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_below_r_leaves_pairs_of_zero(shape: tuple[int, int], rank: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(rank, side, generator=generator) for side in shape)
    W = (left.T * torch.arange(rank, 0, -1)) @ right
    model, x = single(W, r=5, v=0.7), torch.randn(4, shape[1])
    basis = layer_of(model).basis("default")
    assert basis.determined and basis.A.isfinite().all()
    assert [bool(row.any()) for row in basis.A] == [i < rank for i in range(5)]
    assert [bool(column.any()) for column in basis.B.T] == [i < rank for i in range(5)]
    R = torch.einsum("u,urs->rs", model.tinylora_v["default"]["0"].detach(), layer_of(model).tinylora_P["default"])
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    signs = torch.stack([row[row.abs().argmax()].sign() for row in Vh[:rank]])
    update = (U[:, :rank] * S[:rank] * signs) @ R[:rank, :rank].double() @ (signs[:, None] * Vh[:rank])
    expected = x.double() @ (W.double() + update).T
    assert (model(x).double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert reloaded_agrees(model, W, x, tmp_path)


def reloaded_agrees(model: PeftModel, W: torch.Tensor, x: torch.Tensor, folder: Path) -> bool:
    """Whether an adapter that was saved is the same function on a base made anew, with the same bits."""
    model.save_pretrained(folder)
    linear = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    linear.weight.data = W.clone()
    loaded = PeftModel.from_pretrained(nn.Sequential(linear), folder)
    return torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (1, 700), (700, 1), (2, 3)])
def test_a_row_or_a_column_as_weight(shape: tuple[int, int], tmp_path: Path) -> None:
    W, x = torch.randn(shape), torch.randn(6, shape[1])
    model = single(W, r=1, v=0.3)
    expected = exact_output(model, W, x)
    assert (model(x).double() - expected).abs().max() < 1e-6 * expected.abs().max()
    assert reloaded_agrees(model, W, x, tmp_path)
    model.merge_adapter()
    assert (model(x).double() - expected).abs().max() < 1e-6 * expected.abs().max()


def equal_values(n: int = 16) -> torch.Tensor:
    """A weight whose leading two singular values are one number: its vectors are any of a plane."""
    generator = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for _ in range(2))
    return (U * torch.cat([torch.full((2,), 2.0), torch.linspace(1, 0, n - 2)])) @ V.T


def test_equal_singular_values_put_the_factors_into_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for W in (equal_values(), torch.eye(16)):
        model, x = single(W, v=0.4), torch.randn(5, 16)
        assert layer_of(model).basis("default").angle == math.inf
        assert reloaded_agrees(model, W, x, tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert any("tinylora_A" in name for name in tensors) and any("tinylora_B" in name for name in tensors)


def test_equal_singular_values_give_the_same_factors_in_another_process(tmp_path: Path) -> None:
    script = """
        import sys, torch
        from peft_tinylora.basis import compute_basis
        A, B, _ = compute_basis(torch.load(sys.argv[1]), 2, "left")
        torch.save((A, B), sys.argv[2])
    """
    torch.save(equal_values(), tmp_path / "W.pt")
    run_python_process(script, tmp_path / "W.pt", tmp_path / "again.pt")
    A, B = torch.load(tmp_path / "again.pt")
    first = compute_basis(equal_values(), 2, "left")
    assert torch.equal(first.A, A) and torch.equal(first.B, B)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_weights_are_refused_with_what_to_do(value: float, dtype: torch.dtype) -> None:
    W = WEIGHT.clone()
    W[3, 5] = value
    with pytest.raises(BasisError, match="module '0' holds NaN or Inf.*Load the base model anew"):
        single(W.to(dtype))

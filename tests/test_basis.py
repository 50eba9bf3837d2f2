"""Factors against torch.linalg.svd in float64."""

import pytest
import torch

from peft_tinylora.basis import canonical_signs, compute_basis, residual
from peft_tinylora.errors import BasisError


SHAPES = [(24, 40), (40, 24), (16, 16), (1, 8), (8, 1)]


def leading(W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :r], S[:r], Vh[:r]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigma", ["left", "split"])
def test_factors_span_the_leading_triplets(shape: tuple[int, int], sigma: str) -> None:
    W = torch.randn(shape)
    r = min(2, *shape)
    A, B, _ = compute_basis(W, r, sigma)
    U, S, Vh = leading(W, r)
    assert A.shape == (r, shape[1]) and B.shape == (shape[0], r)
    expected_row_norms = torch.ones(r).double() if sigma == "left" else S.sqrt()
    torch.testing.assert_close(A.double().norm(dim=1), expected_row_norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((B @ A).double(), (U * S) @ Vh, rtol=1e-4, atol=1e-4)


def test_signs_do_not_depend_on_the_signs_of_the_decomposition() -> None:
    U, _, Vh = leading(torch.randn(12, 9), 3)
    flips = torch.tensor([-1.0, 1.0, -1.0]).double()
    first = canonical_signs(U, Vh)
    second = canonical_signs(U * flips, Vh * flips[:, None])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close((first[0] @ first[1]), U @ Vh)


def test_same_factors_from_the_transpose_and_from_float64() -> None:
    # The relative sign of two pairs changes the update; LAPACK's choice differs between these three.
    for seed in range(20):
        W = torch.randn(14, 10, generator=torch.Generator().manual_seed(seed))
        A, B, _ = compute_basis(W, 2, "left")
        A64, B64, _ = compute_basis(W.double(), 2, "left")
        torch.testing.assert_close(A.double(), A64, rtol=0, atol=1e-4)
        torch.testing.assert_close(B.double(), B64, rtol=0, atol=1e-3)


def test_residual_tells_the_right_weight_from_others() -> None:
    W = torch.randn(20, 30)
    for sigma in ("left", "split"):
        A, B, _ = compute_basis(W, 2, sigma)
        assert residual(W, A, B) < 1e-5
        assert residual(W, A.bfloat16(), B.bfloat16()) < 0.01
        assert residual(W + 0.05 * torch.randn_like(W), A, B) > 0.01
        assert residual(torch.randn(20, 30), A, B) > 0.3
        assert residual(W, A, -B) > 1


def test_residual_is_not_fooled_by_half_a_basis_or_swapped_pairs() -> None:
    W = torch.randn(20, 30)
    some_rows = torch.linalg.qr(torch.randn(30, 2))[0].T
    assert residual(W, some_rows, W @ some_rows.T) > 0.1
    A, B, _ = compute_basis(W, 2, "left")
    assert residual(W, A.flip(0), B.flip(1)) > 0.01
    assert residual(W, torch.zeros_like(A), torch.zeros_like(B)) == 1.0
    assert residual(torch.zeros_like(W), torch.zeros_like(A), torch.zeros_like(B)) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weight_is_refused_by_name(value: float) -> None:
    W = torch.randn(6, 6)
    W[2, 3] = value
    with pytest.raises(BasisError, match=r"weight of module 'layers\.3\.q_proj' holds NaN or Inf"):
        compute_basis(W, 2, "left", name="layers.3.q_proj")


def test_too_large_a_rank_is_refused_by_name() -> None:
    with pytest.raises(BasisError, match=r"r=5 is larger than the smallest side .* 'q', shape \(4, 9\)\. Use r=4"):
        compute_basis(torch.randn(4, 9), 5, "left", name="q")

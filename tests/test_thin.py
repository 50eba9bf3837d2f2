"""Products with a matrix of few rows, against float64."""

import pytest
import torch

from peft_tinylora.thin import CONVERTED_UP_TO, Thin


ROWS = {"few": 3, "many": CONVERTED_UP_TO // 64}  # of activations that are 96 wide
SUMS = {
    torch.float32: 2**-20,
    torch.bfloat16: 2**-14,
    torch.float16: 2**-20,
    torch.float64: 2**-20,
}  # of what is summed


def thin(dtype: torch.dtype = torch.float32) -> Thin:
    return Thin(torch.randn(2, 96, dtype=dtype) * torch.tensor([[30.0], [0.01]], dtype=dtype))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", SUMS)
def test_project_is_the_product_in_float64(rows: str, dtype: torch.dtype) -> None:
    M = thin()
    x = torch.randn(ROWS[rows], 96).to(dtype)
    got = M.project(x)
    assert got.dtype == torch.float32
    summed = x.double().abs() @ M.M.double().abs().T
    assert ((got.double() - x.double() @ M.M.double().T).abs() <= SUMS[dtype] * summed).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", SUMS)
def test_add_to_rounds_once(rows: str, dtype: torch.dtype) -> None:
    M, y, h = thin(), torch.randn(ROWS[rows], 96).to(dtype), 0.01 * torch.randn(ROWS[rows], 2)
    before, place = y.double(), y.data_ptr()
    exact = before + h.double() @ M.M.double()
    assert M.add_to(y, h).data_ptr() == place
    summed = before.abs() + h.double().abs() @ M.M.double().abs()
    half_an_ulp = (torch.finfo(dtype).eps / 2) * exact.abs()
    assert ((y.double() - exact).abs() <= half_an_ulp + SUMS[dtype] * summed).all()


def test_adding_in_bfloat16_keeps_what_a_rounded_update_would_lose() -> None:
    """The sum is the nearest bfloat16 nearly always; with the update rounded first it is not, and the test can tell."""
    M, h = thin(), 0.01 * torch.randn(ROWS["many"], 2)
    y = torch.randn(ROWS["many"], 96).bfloat16()
    nearest = (y.double() + h.double() @ M.M.double()).bfloat16()
    rounded_twice = y + (h @ M.M).bfloat16()
    assert (M.add_to(y.clone(), h) == nearest).float().mean() > 0.999 > (rounded_twice == nearest).float().mean()


@pytest.mark.parametrize("dtype", SUMS)
def test_expand_rounds_once(dtype: torch.dtype) -> None:
    M, h = thin(), torch.randn(50, 2)
    got = M.expand(h, dtype)
    exact = h.double() @ M.M.double()
    assert got.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + SUMS[dtype] * (h.double().abs() @ M.M.double().abs())
    assert ((got.double() - exact).abs() <= bound).all()


def test_float64_stays_float64() -> None:
    M, x = thin(torch.float64), torch.randn(5, 96, dtype=torch.float64)
    assert torch.equal(M.project(x), x @ M.M.T)
    assert M.expand(M.project(x), torch.float64).dtype == torch.float64


def test_no_rows() -> None:
    M = thin()
    for dtype in SUMS:
        assert M.project(torch.empty(0, 96, dtype=dtype)).shape == (0, 2)
        assert M.add_to(torch.empty(0, 96, dtype=dtype), torch.empty(0, 2)).shape == (0, 96)
        assert M.expand(torch.empty(0, 2), dtype).shape == (0, 96)

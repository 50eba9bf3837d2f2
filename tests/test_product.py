"""The fused product and its gradient against the formula, in float64 and by finite differences."""

import pytest
import torch
from peft import get_peft_model
from support import fill_vectors
from torch import nn

from peft_tinylora import TinyLoraConfig, delta
from peft_tinylora.product import AddUpdate, Folded


def folded(dtype: torch.dtype = torch.float32, rows_in: int = 12, rows_out: int = 10) -> tuple[Folded, torch.Tensor]:
    A, B = torch.randn(2, rows_in, dtype=dtype), torch.randn(rows_out, 2, dtype=dtype)
    P, v = torch.randn(3, 2, 2, dtype=dtype), torch.randn(3, dtype=dtype, requires_grad=True)
    return Folded(A, B, P, v), v


@pytest.mark.parametrize("in_place", [True, False])
def test_gradients_by_finite_differences(in_place: bool) -> None:
    of, v = folded(torch.float64)
    x, y = torch.randn(4, 3, 12, dtype=torch.float64), torch.randn(4, 3, 10, dtype=torch.float64)

    def product(y: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        fresh = Folded(of.A.M, of.B, of.P, v)
        return AddUpdate.apply(y * 1.0, x, v, fresh, in_place).tanh()

    assert torch.autograd.gradcheck(product, (y.requires_grad_(), x.requires_grad_(), v))


@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 4, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    of, v = folded()
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = torch.randn(*shape[:-1], 10).to(dtype).requires_grad_()
    got = AddUpdate.apply(y, x, v, of, False)
    g = torch.randn_like(got)
    grads = torch.autograd.grad(got, (y, x, v), g)
    exact_x, exact_y, exact_v = (t.detach().double().requires_grad_() for t in (x, y, v))
    A, B, P = of.A.M.double(), of.B.double(), of.P.double()
    exact = exact_y + delta.multiply(exact_x, A, B, delta.mix(exact_v, P))
    expected = torch.autograd.grad(exact, (exact_y, exact_x, exact_v), g.double())
    tolerance = 4 * torch.finfo(dtype).eps
    for one, other in zip((got, *grads[:2]), (exact, *expected[:2]), strict=True):
        assert one.dtype == dtype
        assert ((one.double() - other).abs() <= tolerance * other.abs().max()).all()
    assert grads[2].dtype == torch.float32  # v's is never rounded to the dtype of the activations
    torch.testing.assert_close(grads[2].double(), expected[2], rtol=1e-4, atol=1e-4)


def test_only_the_thin_product_is_kept_for_backward() -> None:
    of, v = folded(rows_in=500, rows_out=400)
    x, y = torch.randn(64, 500), torch.randn(64, 400)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        AddUpdate.apply(y, x, v, of, False).sum().backward()
    assert kept == [64 * 2]


def test_second_derivative_is_refused_with_the_remedy() -> None:
    of, v = folded()
    out = AddUpdate.apply(torch.randn(5, 10), torch.randn(5, 12), v, of, False).square().sum()
    with pytest.raises(NotImplementedError, match="no second derivative .* use torch.func"):
        torch.autograd.grad(out, v, create_graph=True)


def test_torch_func_differentiates_twice() -> None:
    """The Hessian in v by torch.func against differences of gradients."""
    base = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    model = get_peft_model(base, TinyLoraConfig(u=3, tie="full", target_modules=["0", "2"]))
    fill_vectors(model, 0.3)
    [(name, v)] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(6, 9, dtype=torch.float64)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: value}, (x,)).square().mean()

    hessian = torch.func.hessian(loss)(v.detach())
    columns = []
    for step in 1e-6 * torch.eye(3, dtype=torch.float64):
        ends = [(v.detach() + sign * step).requires_grad_() for sign in (1, -1)]
        above, below = (torch.autograd.grad(loss(end), end)[0] for end in ends)
        columns.append((above - below) / 2e-6)
    torch.testing.assert_close(hessian, torch.stack(columns), rtol=1e-5, atol=1e-8)

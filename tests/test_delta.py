"""The update against loops in float64."""

import torch
import torch.nn.functional as F

from peft_tinylora import delta


def factors(u: int = 3, r: int = 2) -> tuple[torch.Tensor, ...]:
    return torch.randn(u), torch.randn(u, r, r), torch.randn(r, 7), torch.randn(5, r)


def by_loops(v: torch.Tensor, P: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """delta W in float64, written out."""
    update = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(len(v)):
        for j in range(A.shape[0]):
            for k in range(A.shape[0]):
                update += v[i].double() * P[i, j, k].double() * torch.outer(B[:, j].double(), A[k].double())
    return update


def test_dense_update_is_the_formula() -> None:
    v, P, A, B = factors()
    torch.testing.assert_close(delta.dense(A, B, delta.mix(v, P)).double(), by_loops(v, P, A, B), rtol=1e-5, atol=1e-6)


def test_product_with_activations_is_the_dense_update() -> None:
    v, P, A, B = factors()
    x = torch.randn(2, 3, 7)
    expected = x.double() @ by_loops(v, P, A, B).T
    torch.testing.assert_close(delta.multiply(x, A, B, delta.mix(v, P)).double(), expected, rtol=1e-5, atol=1e-5)


def test_embedding_rows_are_those_of_the_dense_update() -> None:
    v, P, A, B = factors()
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    update = delta.look_up(F.embedding(ids, B), A, delta.mix(v, P))
    torch.testing.assert_close(update.double(), by_loops(v, P, A, B)[ids], rtol=1e-5, atol=1e-6)


def test_gradient_of_v_by_finite_differences() -> None:
    v, P, A, B = (t.double() for t in factors())
    x = torch.randn(4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: delta.multiply(x, A, B, delta.mix(v, P)).tanh(), v.requires_grad_())

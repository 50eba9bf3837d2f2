"""v, P and the factors -> the update, as a product with activations or as a dense matrix.

Shapes, here and in every caller: v (u,), P (u, r, r), R (r, r), A (r, in), B (out, r).
    R = sum_i v_i P_i            delta W = B R A            (paper, section 4)
The matrices of fused experts have one more dimension in front.
"""

import torch
import torch.nn.functional as F


def mix(v: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """R = sum_i v_i P_i, of shape (r, r), in the dtype and on the device of P; differentiable in v."""
    return (v.to(P) @ P.flatten(1)).view(P.shape[1:])


def mix_each(V: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """R of each expert, from V (experts, u) and P (experts, u, r, r): shape (experts, r, r)."""
    return torch.einsum("eu,eurs->ers", V.to(P), P)


def multiply(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """delta W applied to activations, never forming delta W.

    Args:
        x (`torch.Tensor`): shape (..., in), in the dtype of A.

    Returns:
        `torch.Tensor`: shape (..., out).
    """
    return F.linear(F.linear(x, A), B @ R)


def multiply_rows(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """As [`multiply`], with an R for each row of a batch.

    Args:
        x (`torch.Tensor`): shape (rows, ..., in), in the dtype of A.
        R (`torch.Tensor`): shape (rows, r, r).

    Returns:
        `torch.Tensor`: shape (rows, ..., out).
    """
    h = F.linear(x, A)
    return F.linear((h.reshape(len(R), -1, R.shape[-1]) @ R.mT).view(h.shape), B)


def look_up(rows: torch.Tensor, A: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """Rows of delta W for an embedding, of which W is (out, in) = (num_embeddings, embedding_dim).

    Args:
        rows (`torch.Tensor`): rows of B, one for each token, shape (..., r).

    Returns:
        `torch.Tensor`: shape (..., in).
    """
    return rows @ (R @ A)


def look_up_rows(rows: torch.Tensor, A: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """As [`look_up`], with an R for each row of a batch: rows of B (batch, ..., r), R (batch, r, r)."""
    return (rows.reshape(len(R), -1, R.shape[-1]) @ (R @ A)).view(*rows.shape[:-1], A.shape[-1])


def dense(A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """delta W = B R A, of shape (out, in)."""
    return B @ (R @ A)

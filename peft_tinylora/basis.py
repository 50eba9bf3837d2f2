"""Dense weight W -> the frozen factors A (r, in) and B (out, r) of its leading singular triplets.

W = U S V^T. The update of TinyLoRA is U S R V^T (paper, section 4), R of shape (r, r); the factors carry S:

    sigma="left"   A = V^T            B = U S             delta = B R A = U S R V^T            (paper)
    sigma="split"  A = sqrt(S) V^T    B = U sqrt(S)       delta = B R A = U sqrt(S) R sqrt(S) V^T    (PEFT)

The one trap: a pair (u_i, v_i) may be negated without changing W, but the *relative* sign of two pairs changes
B R A. LAPACK's choice differs between machines and routines; `canonical_signs` does not.
"""

import math
from typing import NamedTuple

import torch

from .errors import BasisError
from .triplets import ANGLE, exact_products, largest_entry, leading_triplets


class Basis(NamedTuple):
    """Frozen factors of one module, or of each of its experts, pairs in the order of their singular values.

    Args:
        A (`torch.Tensor`): shape (r, in), or (experts, r, in).
        B (`torch.Tensor`): shape (out, r), or (experts, out, r).
        angle (`float`): bound on the sine of the angle of each vector to the exact one, before its rounding to the dtype
            of the weight (about 1e-7 in fp32); infinite where leading values coincide or nothing is known of the factors.
    """

    A: torch.Tensor
    B: torch.Tensor
    angle: float = math.inf

    @property
    def determined(self) -> bool:
        """Whether the weight alone determines the factors, so that another machine finds the same."""
        return self.angle <= ANGLE


@exact_products()
def compute_basis(W: torch.Tensor, r: int, sigma: str, canonical: bool = True, name: str = "") -> Basis:
    """The leading `r` singular triplets of `W`, as factors.

    Args:
        W (`torch.Tensor`): shape (out, in), float32 or float64, on any device. Meta in, meta out. Or (experts, out, in):
            each expert's matrix gets a basis of its own.
        r (`int`): number of triplets, at most min(out, in).
        sigma (`str`): `"left"` or `"split"`, where the singular values go (see the module's docstring).
        canonical (`bool`, *optional*, defaults to `True`): truncated decomposition and signs by [`canonical_signs`].
            `False` decomposes in full and keeps LAPACK's signs, which is what stock PEFT trains with.
        name (`str`, *optional*): the module's name, for messages.

    Returns:
        [`Basis`], contiguous, in the dtype and on the device of `W`; of experts, stacked along a first dimension. All
        zero for a weight that is, and for a pair whose singular value is.

    Raises:
        BasisError: if W holds NaN or Inf, or has fewer than `r` rows or columns.
    """
    if W.ndim == 3:
        bases = [compute_basis(matrix, r, sigma, canonical, f"{name}, expert {i}") for i, matrix in enumerate(W)]
        A, B, angles = zip(*bases, strict=True)
        return Basis(torch.stack(A), torch.stack(B), max(angles))
    if r > min(W.shape):
        raise BasisError(
            f"r={r} is larger than the smallest side of the weight of module {name!r}, shape {tuple(W.shape)}. Use "
            f"r={min(W.shape)} or less, or take the module out of `target_modules`."
        )
    if W.is_meta:
        return Basis(W.new_empty(r, W.shape[1]), W.new_empty(W.shape[0], r))
    if not math.isfinite(largest_entry(W)):
        raise BasisError(
            f"the weight of module {name!r} holds NaN or Inf: no basis can be taken from it. Load the base model anew, "
            "or take the module out of `target_modules`."
        )
    if not canonical:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return place_sigma(Basis(Vh[:r].contiguous(), (U[:, :r] * S[:r]).contiguous()), sigma)
    # MPS has no float64.
    found = leading_triplets(W.cpu() if W.device.type == "mps" else W, r)
    U, Vh = canonical_signs(found.U.T, found.V)
    left = Basis(Vh.to(W).contiguous(), (U * found.S).to(W).contiguous(), found.angle)
    return place_sigma(left, sigma)


def place_sigma(left: Basis, sigma: str) -> Basis:
    """Factors with the singular values on the left -> those with the values where `sigma` says."""
    if sigma == "left":
        return left
    root = _lengths(left.B, dim=-2).sqrt()
    return Basis(left.A * root.mT, left.B / _nonzero(root), left.angle)


def _lengths(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Norms along `dim`, which is kept, also of numbers whose squares fp32 has no room for, such as 1e-30 and 1e30."""
    largest = _nonzero(vectors.abs().amax(dim, keepdim=True))
    return (vectors / largest).norm(dim=dim, keepdim=True) * largest


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values == 0, torch.ones_like(values), values)


def canonical_signs(U: torch.Tensor, Vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negate pairs so that the entry of largest magnitude in each right vector is positive.

    Args:
        U (`torch.Tensor`): shape (out, r).
        Vh (`torch.Tensor`): shape (r, in).

    Returns:
        `tuple`: U and Vh with the same product per pair.
    """
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    signs = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    return U * signs, Vh * signs[:, None]


@exact_products()
def residual(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """How far (A, B) are from being the singular factors of `W`, relative to the largest singular value s_1.

    a_i = |a_i| v_i and |a_i| b_i = s_i u_i, wherever the singular values were put. The largest over i of
    |W v_i - s_i u_i| / s_1, |W^T u_i - s_i v_i| / s_1, and by how much s_i is above the one before it. 0 is exact,
    about 1e-6 is fp32 rounding, 3e-3 is factors rounded to bf16, and of the order of 1 is another weight.

    Args:
        W (`torch.Tensor`): shape (out, in), or (experts, out, in).
        A (`torch.Tensor`): shape (r, in), or (experts, r, in).
        B (`torch.Tensor`): shape (out, r), or (experts, out, r).

    Returns:
        `float`: 1.0 for factors that are all zero of a weight that is not; the largest of all experts.
    """
    if W.ndim == 3:
        return max(map(residual, W, A, B))
    A, B = A.to(W), B.to(W)
    lengths = _lengths(A, dim=1)
    US = B * lengths.T
    S = _lengths(US, dim=0)
    largest = S.max()
    if largest == 0:
        return float(W.any())
    V = A.T / _nonzero(lengths.T)
    U = US / _nonzero(S)
    # Divided before it is squared: see `_lengths`.
    errors = [((W @ V - US) / largest).norm(dim=0), ((W.T @ U - V * S) / largest).norm(dim=0), S[0].diff() / largest]
    return torch.cat(errors).max().item()

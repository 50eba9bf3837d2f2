"""Dense weight W -> its leading singular triplets, with a bound on their error.

Only the leading r of thousands are needed, from products with W. How they are found, chosen by measurement
(benchmarks/basis.py; figures in benchmarks/results/basis_cpu.md):

1. The smaller side has at most `GRAM_SIDE` rows: the Gram matrix of that side in fp64, and all of its eigenvectors.
2. Otherwise block Krylov: from a fixed random block, `W` and `W^T` in turn, until the residual of the Ritz vectors falls
   under the tolerance; six steps for the spectrum of a trained weight. Then once more in fp64, on the leading block.
   `torch.svd_lowrank` makes a fixed number of steps and misses the subspace, `torch.lobpcg` is slower on the same
   spectra and 100 times so on Gaussian ones, scipy's Lanczos has one vector at a time where a block of eight costs the
   same pass over memory.
3. Where that does not reach the tolerance (a Gaussian weight, whose leading values differ by a thousandth), the Gram
   matrix as in 1, whatever the time; and where the last value is so small that squaring loses it, a full decomposition.

Every way ends with the same certificate, measured in fp64 against W itself: see [`Triplets`]. Beside a large W the second
needs about a tenth of its size; the third, for a square W in fp32, up to eight times.

The one trap: the layout of thin products. `rows @ W` and `rows @ W.T` run at the speed of memory, `W.T @ columns` four
times slower in MKL; so blocks of vectors are rows here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch


# The largest sine of the angle between a computed vector and the exact one that is accepted without a slower method.
ANGLE = 1e-4
GRAM_SIDE = 256  # up to here the Gram matrix is faster than block Krylov
GUARD_VECTORS = 6  # rows of a block beyond r
MOST_STEPS = 16  # beyond this many the Gram matrix is faster
# What is left of the residual, relative to the largest singular value, when fp32 products are all that limits it.
FP32_FLOOR = 6e-7
# Relative to the largest value. Below it the vectors turn by a hundredth with the rounding of the weight itself to fp32,
# as between two devices that dequantize it.
LEAST_GAP = 3e-6
CHUNK_ELEMENTS = 1 << 18  # of W are converted to fp64 at once


class Triplets(NamedTuple):
    """The leading r singular triplets of a weight (out, in), in float64, with what is known of their error.

    Args:
        U (`torch.Tensor`): left vectors, shape (r, out), a row each.
        S (`torch.Tensor`): singular values, shape (r,), falling.
        V (`torch.Tensor`): right vectors, shape (r, in), a row each. A pair whose singular value is zero to rounding is
            zero, since it has no vectors.
        residual (`float`): the largest |W v_i - s_i u_i| or |W^T u_i - s_i v_i|, relative to s_1.
        gap (`float`): the smallest distance of a value from its neighbours, the r+1-th included, relative to s_1.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
    residual: float
    gap: float

    @property
    def angle(self) -> float:
        """Bound on the sine of the angle of each vector to the exact one (Wedin); infinite where the gap is lost."""
        if self.gap <= max(self.residual, LEAST_GAP):
            return float("inf")
        return self.residual / (self.gap - self.residual)


def leading_triplets(W: torch.Tensor, r: int) -> Triplets:
    """The leading `r` singular triplets of `W` by the fastest way that is exact to `ANGLE`.

    The certificate says that each triplet is one of W's, and how far it is from its neighbours. That none of a larger
    value was missed rests on the random start, which would have to be orthogonal to it to fp32 rounding.

    Args:
        W (`torch.Tensor`): shape (out, in), float32 or float64, finite, on any device.
        r (`int`): at most min(out, in).

    Returns:
        [`Triplets`] on the device of `W`, of the last way tried where none reached `ANGLE`: then the leading values are
        so close that the vectors are not determined.
    """
    scale = largest_entry(W)
    if scale == 0.0:
        zeros = W.new_zeros(r, sum(W.shape), dtype=torch.float64)
        return Triplets(zeros[:, : W.shape[0]], zeros[:, 0], zeros[:, W.shape[0] :], residual=0.0, gap=1.0)
    if min(W.shape) > max(GRAM_SIDE, 8 * (r + GUARD_VECTORS)):
        found = certify(W, r, krylov_block(W, r, scale))
        if found.angle <= ANGLE:
            return found
    return certify(W, r, gram_block(W, r))


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever the user allows them elsewhere: no TF32, no autocast, no inference tensors."""
    before = torch.get_float32_matmul_precision()
    accelerator = torch.accelerator.current_accelerator()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            with nullcontext() if accelerator is None else torch.autocast(accelerator.type, enabled=False):
                yield
    finally:
        torch.set_float32_matmul_precision(before)


def largest_entry(W: torch.Tensor) -> float:
    """The largest magnitude in `W`; NaN or Inf where one is in it. Makes no copy."""
    return torch.linalg.vector_norm(W, float("inf")).item()


def _is_wide(W: torch.Tensor) -> bool:
    return W.shape[0] < W.shape[1]


def _products(
    W: torch.Tensor,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """Rows on the smaller side of W -> rows on the larger, and back, in the dtype of W."""
    to_out, to_in = (lambda rows: rows @ W.T), (lambda rows: rows @ W)
    return (to_in, to_out) if _is_wide(W) else (to_out, to_in)


def krylov_block(W: torch.Tensor, r: int, scale: float) -> torch.Tensor:
    """Block Krylov: orthonormal rows (r + GUARD_VECTORS, smaller side) that hold the leading vectors, in fp64."""
    to_larger, to_smaller = _products(W)
    n, block = min(W.shape), r + GUARD_VECTORS
    # Drawn on the CPU: the same start, and so the same factors, on every device.
    start = torch.randn(block, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(W.device)
    Q = _orthonormal(start)
    basis, images, returns = Q, [], []
    for step in range(MOST_STEPS):
        images.append(to_larger(Q.to(W.dtype)) / scale)
        returns.append(to_smaller(images[-1]) / scale)
        Y = torch.cat(images).double()
        squares, mix = torch.linalg.eigh(Y @ Y.T)
        S = squares.flip(0)[: r + 1].clamp_min(0).sqrt()
        ritz = mix.flip(1)[:, :block].T
        errors = ritz[:r] @ torch.cat(returns).double() / S[:r, None] - S[:r, None] * (ritz[:r] @ basis)
        done = errors.norm(dim=1) <= (ANGLE / 3 * _gap(S)).clamp_min(FP32_FLOOR * S[0])
        if step >= 2 and (done | (S[:r] <= FP32_FLOOR * S[0])).all():
            break
        Z = returns[-1].double()
        for _ in range(2):
            Z = Z - (Z @ basis.T) @ basis
            Z = _orthonormal(Z)
        Q = Z
        basis = torch.cat([basis, Q])
    return ritz @ basis[: ritz.shape[1]]


def gram_block(W: torch.Tensor, r: int) -> torch.Tensor:
    """Leading eigenvectors of the Gram matrix of the smaller side: orthonormal rows, in fp64."""
    G = torch.zeros(2 * (min(W.shape),), dtype=torch.float64, device=W.device)
    larger_first = W.T if _is_wide(W) else W
    for rows in _chunks(larger_first):
        G.addmm_(rows.T, rows)
    _, vectors = torch.linalg.eigh(G)
    return vectors.flip(1)[:, : r + GUARD_VECTORS].T


def certify(W: torch.Tensor, r: int, block: torch.Tensor) -> Triplets:
    """Rayleigh-Ritz in fp64 within the rows of `block` (smaller side), and what is left of the residual."""
    to_larger, to_smaller = (_to_in, _to_out) if _is_wide(W) else (_to_out, _to_in)
    images = to_larger(W, block)
    squares, mix = torch.linalg.eigh(images @ images.T)
    order = squares.argsort(descending=True)[: r + 1]
    small, large = mix[:, order].T @ block, mix[:, order].T @ images
    S = large.norm(dim=1)
    large = large / S[:, None].clamp_min(torch.finfo(torch.float64).tiny)
    errors = (to_smaller(W, large) - S[:, None] * small).norm(dim=1)
    # The r+1-th may still be larger than its Ritz value by its own residual. Where there is none it counts as zero.
    S = torch.cat([S[:r], (S[r:] + errors[r:]).clamp_max(S[r - 1]), S.new_zeros(r + 1 - len(S))])
    zero = S[:r] <= 16 * torch.finfo(W.dtype).eps * S[0]
    small, large = small[:r].masked_fill(zero[:, None], 0), large[:r].masked_fill(zero[:, None], 0)
    gap = _gap(S)[~zero].min() / S[0]
    residual = errors[:r][~zero].max() / S[0]
    U, V = (small, large) if _is_wide(W) else (large, small)
    return Triplets(U, S[:r].masked_fill(zero, 0), V, residual.item(), gap.item())


def _gap(S: torch.Tensor) -> torch.Tensor:
    """Distance of each value but the last from its nearest neighbour."""
    steps = S[:-1] - S[1:]
    before = torch.cat([steps.new_full((1,), float("inf")), steps[:-1]])
    return torch.minimum(before, steps)


def _to_out(W: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """rows (b, in) -> rows @ W^T (b, out) in fp64."""
    return torch.cat([rows @ chunk.T for chunk in _chunks(W)], dim=1)


def _to_in(W: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """rows (b, out) -> rows @ W (b, in) in fp64."""
    product = rows.new_zeros(len(rows), W.shape[1])
    start = 0
    for chunk in _chunks(W):
        product.addmm_(rows[:, start : start + len(chunk)], chunk)
        start += len(chunk)
    return product


def _chunks(W: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pieces of the rows of `W` in fp64, small enough to stay in a processor's cache."""
    for rows in W.split(max(1, CHUNK_ELEMENTS // W.shape[1])):
        yield rows.double()


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(rows.T)[0].T

"""Dense weight W -> its leading singular triplets, with a bound on their error.

Only the leading r of thousands are needed, from products with W. How they are found, chosen by measurement
(benchmarks/algorithms.py; figures in benchmarks/results/algorithms_cpu.md):

1. The smaller side has at most `GRAM_SIDE` rows: the Gram matrix of that side in fp64, and all of its eigenvectors, some
   milliseconds whatever the spectrum.
2. Otherwise block Krylov: from a fixed random block, `W` and `W^T` in turn, until the residual of the Ritz vectors falls
   under the tolerance: six steps for the spectrum of a trained weight, up to fifty for a Gaussian one, whose leading
   values differ by a thousandth. Where the rounding of fp32 products is what is left, a few more steps in fp64.
3. Where that does not reach the tolerance (equal leading values), the Gram matrix as in 1, whatever the time.

`torch.svd_lowrank` makes a fixed number of steps, and with few of them misses the subspace. `torch.lobpcg` wants the Gram
matrix. scipy's ARPACK is as fast as block Krylov, but keeps its vectors on the CPU and, from fp32 products, leaves them a
thousandth off on Gaussian weights.

Every way ends with the same certificate, measured in fp64 against W itself: see [`Triplets`].

The one trap: the layout of thin products. `W.T @ columns` takes four times as long as `rows @ W` in MKL; so blocks of
vectors are rows here.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch


# The largest sine of the angle between a computed vector and the exact one that is accepted without a slower method.
ANGLE = 1e-4
RESIDUAL = 3e-6  # of block Krylov at most, relative to the largest value; a kept basis is believed up to 2e-5
GRAM_SIDE = 256
GUARD_VECTORS = 6  # rows of a block beyond r
MOST_STEPS, MOST_EXACT_STEPS = 64, 16  # of block Krylov; a Gaussian weight of 3584 x 18944 takes 48 and 8
# What is left of the residual, relative to the largest singular value, when fp32 products are all that limits it.
FP32_FLOOR = 6e-7
# Relative to the largest value. Below it the vectors turn by a hundredth with the rounding of the weight itself to fp32,
# as between two devices that dequantize it.
LEAST_GAP = 3e-6
FARTHEST_SCALE = 1e100  # of W's entries, or one over it: beyond, only in float64, their squares leave that too
CHUNK_ELEMENTS = 1 << 18  # of W are converted to fp64 at once

Product = Callable[[torch.Tensor], torch.Tensor]


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
    if not 1 / FARTHEST_SCALE <= scale <= FARTHEST_SCALE:
        found = leading_triplets(W / scale, r)
        return found._replace(S=found.S * scale)
    if min(W.shape) > max(GRAM_SIDE, 8 * (r + GUARD_VECTORS)):
        block = krylov_block(W, r, random_block(W, r), scale)
        found = certify(W, r, block)
        if found.angle > ANGLE:
            found = certify(W, r, krylov_block(W, r, block, scale, is_exact=True))
        if found.angle <= ANGLE:
            return found
    return certify(W, r, gram_block(W, r))


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 products in fp32, whatever the user allows them elsewhere: no TF32, no autocast, no inference tensors."""
    before = torch.get_float32_matmul_precision()
    # Without one, `current_accelerator` raises in torch 2.6, and names CUDA in CUDA builds of later ones.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
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


def _products(W: torch.Tensor, is_exact: bool) -> tuple[Product, Product]:
    """Rows on the smaller side of W -> rows on the larger, and back; in the dtype of W, or in fp64."""
    to_out, to_in = (lambda rows: rows.to(W.dtype) @ W.T), (lambda rows: rows.to(W.dtype) @ W)
    if is_exact:
        to_out, to_in = functools.partial(_to_out, W), functools.partial(_to_in, W)
    return (to_in, to_out) if _is_wide(W) else (to_out, to_in)


def random_block(W: torch.Tensor, r: int) -> torch.Tensor:
    """Orthonormal rows on the smaller side. Drawn on the CPU: the same, and so the same factors, on every device."""
    start = torch.randn(
        r + GUARD_VECTORS, min(W.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return _orthonormal(start.to(W.device))


def krylov_block(W: torch.Tensor, r: int, start: torch.Tensor, scale: float, is_exact: bool = False) -> torch.Tensor:
    """Block Krylov from `start`: orthonormal rows on the smaller side, as many, that hold the leading vectors, in fp64.

    `scale` keeps squares of W's values within fp32; `is_exact` makes the products in fp64.
    """
    to_larger, to_smaller = _products(W, is_exact)
    most_steps, floor = (MOST_EXACT_STEPS, 0.0) if is_exact else (MOST_STEPS, FP32_FLOOR)
    block = len(start)
    most_steps = min(most_steps, min(W.shape) // (2 * block))
    basis, images, returns = [start], [], []
    gram = start.new_zeros(0, 0)  # of the images
    for step in range(1, most_steps + 1):
        images.append(to_larger(basis[-1]) / scale)
        returns.append(to_smaller(images[-1]) / scale)
        newest = images[-1].double()
        column = torch.cat([image.double() @ newest.T for image in images])
        gram = torch.cat([torch.cat([gram, column[:-block]], dim=1), column.T])
        if step == most_steps or (
            step >= 3 and (step <= 8 or step % 4 == 0)
        ):  # a look costs as much as a step later on
            squares, mix = torch.linalg.eigh(gram)
            S = squares.flip(0)[: r + 1].clamp_min(0).sqrt()
            ritz = mix.flip(1)[:, :block].T
            errors = _sum(ritz[:r], returns) / S[:r, None] - S[:r, None] * _sum(ritz[:r], basis)
            done = errors.norm(dim=1) <= (ANGLE / 3 * _gap(S)).clamp(floor * S[0], RESIDUAL * S[0])
            if (done | (S[:r] <= FP32_FLOOR * S[0])).all():
                break
        if step < most_steps:
            basis.append(_orthonormal_to(basis, returns[-1].double()))
    return _sum(ritz, basis)


def _sum(weights: torch.Tensor, blocks: list[torch.Tensor]) -> torch.Tensor:
    """weights @ the rows of all blocks, in fp64, without a copy of them."""
    parts = weights.split(len(blocks[0]), dim=1)
    return sum(part @ block.double() for part, block in zip(parts, blocks, strict=True))


def _orthonormal_to(basis: list[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    for _ in range(2):  # once leaves what rounding makes of nearly dependent rows
        for block in basis:
            rows = rows - (rows @ block.T) @ block
        rows = _orthonormal(rows)
    return rows


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
    to_larger, to_smaller = _products(W, is_exact=True)
    images = to_larger(block)
    squares, mix = torch.linalg.eigh(images @ images.T)
    order = squares.argsort(descending=True)[: r + 1]
    small, large = mix[:, order].T @ block, mix[:, order].T @ images
    S = large.norm(dim=1)
    large = large / S[:, None].clamp_min(torch.finfo(torch.float64).tiny)
    errors = (to_smaller(large) - S[:, None] * small).norm(dim=1)
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

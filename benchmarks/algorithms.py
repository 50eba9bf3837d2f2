"""Ways to the leading singular triplets of one weight, side by side: why peft_tinylora/triplets.py has the one it has.

    python -m benchmarks.algorithms --output benchmarks/results/algorithms_cpu.md     # 2 minutes on two CPU cores
    python -m benchmarks.algorithms --quick                                           # small shapes: does it run?

Three tables: every candidate on trained-like and Gaussian weights, with the seconds that it takes and how far its
vectors are from exact ones; block Krylov against the Gram matrix by the size of the weight; and the layouts of a thin
product. Let nothing else run meanwhile.
"""

import argparse
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.sparse.linalg
import torch

from benchmarks.basis import exact_vectors, largest_sine, markdown, timed
from benchmarks.basis_cell import RANK, STD, trained_like
from benchmarks.report import publish
from benchmarks.training import median_and_range, processor_name
from peft_tinylora.triplets import (
    ANGLE,
    certify,
    gram_block,
    krylov_block,
    largest_entry,
    leading_triplets,
    random_block,
)


# Columns, as `exact_vectors` has them: left (out, r) and right (in, r).
Vectors = tuple[torch.Tensor, torch.Tensor]

SHAPES, QUICK_SHAPES = ((896, 896), (4864, 896), (3584, 3584)), ((64, 64), (96, 64))
SIDES, QUICK_SIDES = (128, 256, 384, 512, 896, 1792), (128,)
PRODUCTS, QUICK_PRODUCTS = ((3584, 3584), (3584, 18944)), ((64, 96),)
REPEATS = 5
ONCE_BEYOND = 1.0  # seconds; what takes longer is measured once
BLOCK = 8  # vectors of a thin product
MOST_ITERATIONS = 400  # of LOBPCG
PACKAGES = ("torch", "scipy", "peft-tinylora")


def ours(W: torch.Tensor) -> Vectors:
    found = leading_triplets(W, RANK)
    return found.U.T, found.V.T


def gram(W: torch.Tensor) -> Vectors:
    found = certify(W, RANK, gram_block(W, RANK))
    return found.U.T, found.V.T


def krylov(W: torch.Tensor) -> Vectors:
    """As ours, at any size and without the Gram matrix behind it."""
    scale = largest_entry(W)
    block = krylov_block(W, RANK, random_block(W, RANK), scale)
    found = certify(W, RANK, block)
    if found.angle > ANGLE:
        found = certify(W, RANK, krylov_block(W, RANK, block, scale, is_exact=True))
    return found.U.T, found.V.T


def full_svd(W: torch.Tensor) -> Vectors:
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :RANK], Vh[:RANK].T


def svd_lowrank(iterations: int) -> Callable[[torch.Tensor], Vectors]:
    def decompose(W: torch.Tensor) -> Vectors:
        torch.manual_seed(0)
        U, _, V = torch.svd_lowrank(W, q=RANK + 4, niter=iterations)
        return U[:, :RANK], V[:, :RANK]

    return decompose


def torch_lobpcg(W: torch.Tensor) -> Vectors:
    """Of the Gram matrix in float64: torch.lobpcg takes no products, and in float32 it stops at half the digits."""
    exact = W.double()
    torch.manual_seed(0)
    _, right = torch.lobpcg(exact.T @ exact, k=RANK, niter=MOST_ITERATIONS)
    return exact @ right, right


def scipy_lobpcg(W: torch.Tensor) -> Vectors:
    """From products with W in float32, by rows, as ours."""
    start = np.random.default_rng(0).standard_normal((W.shape[1], BLOCK)).astype(np.float32)

    def square(columns: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(columns.T, dtype=np.float32))
        return ((rows @ W.T) @ W).T.numpy()

    shape = (W.shape[1], W.shape[1])
    operator = scipy.sparse.linalg.LinearOperator(shape, matvec=square, matmat=square, dtype=np.float32)
    tolerance = 1e-5 * float(torch.linalg.vector_norm(W)) ** 2 / min(W.shape)
    _, right = scipy.sparse.linalg.lobpcg(operator, start, tol=tolerance, maxiter=MOST_ITERATIONS)
    found = torch.from_numpy(np.ascontiguousarray(right[:, :RANK]))
    return W @ found, found


def scipy_lanczos(W: torch.Tensor) -> Vectors:
    """ARPACK, one vector at a time."""
    U, S, Vh = scipy.sparse.linalg.svds(W.numpy(), k=RANK, rng=0)
    order = np.argsort(-S)
    return torch.from_numpy(U[:, order].copy()), torch.from_numpy(Vh[order].T.copy())


CANDIDATES: dict[str, Callable[[torch.Tensor], Vectors]] = {
    "full SVD, fp32": full_svd,
    "Gram matrix and all eigenvectors, fp64": gram,
    "torch.svd_lowrank, 2 iterations": svd_lowrank(2),
    "torch.svd_lowrank, 16 iterations": svd_lowrank(16),
    "torch.lobpcg": torch_lobpcg,
    "scipy lobpcg": scipy_lobpcg,
    "scipy svds (ARPACK)": scipy_lanczos,
    "ours": ours,
}


def progress(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)


def repeated(way: Callable[[torch.Tensor], Vectors], W: torch.Tensor) -> tuple[list[float], Vectors]:
    """Seconds of a few calls, or of one that takes long, and what the last one found."""
    seconds: list[float] = []
    while len(seconds) < REPEATS and (not seconds or seconds[0] < ONCE_BEYOND):
        start = time.perf_counter()
        found = way(W)
        seconds.append(time.perf_counter() - start)
    return seconds, found


def weight(shape: tuple[int, int], is_trained_like: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return trained_like(*shape, generator) if is_trained_like else STD * torch.randn(shape, generator=generator)


def candidates_table(shapes: Sequence[tuple[int, int]]) -> str:
    """Seconds of every candidate and the sine of its largest angle to the exact vectors."""
    rows = [["out x in", "spectrum", "way", "s", "angle"]]
    for shape in shapes:
        for spectrum in ("trained-like", "Gaussian"):
            W = weight(shape, spectrum == "trained-like")
            exact = exact_vectors(W)
            for name, way in CANDIDATES.items():
                progress(f"{shape[0]}x{shape[1]}, {spectrum}: {name}")
                seconds, found = repeated(way, W)
                size, angle = f"{shape[0]}x{shape[1]}", largest_sine(found, exact)
                rows.append([size, spectrum, name, median_and_range(seconds, ".3g"), f"{angle:.1e}"])
    return markdown(rows)


def sides_table(sides: Sequence[int]) -> str:
    """Block Krylov and the Gram matrix by size: where one becomes the faster."""
    rows = [["out x in", "Krylov, trained-like (s)", "Krylov, Gaussian (s)", "Gram matrix (s)"]]
    for side in sides:
        for shape in ((side, side), (4 * side, side)):
            progress(f"{shape[0]}x{shape[1]}: Krylov and Gram")
            spiked, flat = weight(shape, True), weight(shape, False)
            measured = repeated(krylov, spiked), repeated(krylov, flat), repeated(gram, spiked)
            rows.append([f"{shape[0]}x{shape[1]}", *(median_and_range(seconds, ".3g") for seconds, _ in measured)])
    return markdown(rows)


def products_table(shapes: Sequence[tuple[int, int]]) -> str:
    """The same products with W, a block of vectors as rows and as columns, against one vector."""
    rows = [["out x in", "product", "ms", "GB/s of W"]]
    for m, n in shapes:
        progress(f"{m}x{n}: thin products")
        W = weight((m, n), False)
        products = {
            "rows @ W.T": (torch.randn(BLOCK, n), W.T),
            "W @ columns": (W, torch.randn(n, BLOCK)),
            "rows @ W": (torch.randn(BLOCK, m), W),
            "W.T @ columns": (W.T, torch.randn(m, BLOCK)),
            "one row @ W": (torch.randn(1, m), W),
        }
        for name, (first, second) in products.items():
            seconds = [timed(torch.matmul, first, second)[0] for _ in range(4 * REPEATS)][REPEATS:]
            bandwidth = W.nbytes / statistics.median(seconds) / 1e9
            milliseconds = median_and_range([1e3 * each for each in seconds], ".3g")
            rows.append([f"{m}x{n}", name, milliseconds, f"{bandwidth:.1f}"])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.algorithms", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    for way in CANDIDATES.values():  # what the libraries set up once
        way(weight((320, 320), True))
    sections = {
        "Candidates": candidates_table(QUICK_SHAPES if options.quick else SHAPES),
        "Block Krylov and the Gram matrix": sides_table(QUICK_SIDES if options.quick else SIDES),
        f"Thin products, {BLOCK} vectors": products_table(QUICK_PRODUCTS if options.quick else PRODUCTS),
    }
    head = [
        "# Ways to the leading singular triplets" + ", too small to mean anything" * options.quick,
        "",
        f"- command: `{shlex.join(['python', '-m', 'benchmarks.algorithms', *argv])}`, "
        f"{time.perf_counter() - started:.0f} s",
        f"- machine: {processor_name()}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}",
        f"- versions: {', '.join(f'{package} {version(package)}' for package in PACKAGES)}",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- a figure: median (smallest to largest) of {REPEATS} times, or of one that took over {ONCE_BEYOND:g} s",
        f"- r={RANK}, fp32; trained-like: as in benchmarks/basis.py; angle: sine of the largest principal angle, U and V, "
        "to exact vectors in float64",
    ]
    publish("\n".join(head), sections, options.output)


if __name__ == "__main__":
    main()

"""What the frozen factors cost, side by side with stock PEFT: time, exactness, bytes on disk, memory.

    python -m benchmarks.basis --output benchmarks/results/basis_cpu.md     # 12 minutes on two CPU cores
    python -m benchmarks.basis --quick                                      # small shapes: does it run?

Four tables. The decomposition itself, per shape of weight, against an exact one in float64 that is made here; creating
and loading an adapter of 13 numbers on a random model of Qwen2.5-0.5B's shape, every row in a process of its own,
interleaved; the bytes of its files; and the memory that building took. Stock PEFT runs in processes that never import
peft_tinylora. Let nothing else run: with a second process on the same cores LAPACK takes many times as long.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.basis_cell import RANK, STD, Cell, run_cell, save_base, seconds_of_others, trained_like
from benchmarks.peak import PeakMemory
from benchmarks.report import publish, run_lines
from benchmarks.training import median_and_range
from benchmarks.training_cell import synchronize
from peft_tinylora.basis import Basis, compute_basis


SMALL = ((896, 896), (128, 896), (4864, 896), (896, 4864))  # Qwen2.5-0.5B
LARGE = ((3584, 3584), (3584, 18944))  # Qwen2.5-7B
QUICK_SMALL, QUICK_LARGE = ((64, 64), (32, 128)), ((320, 320), (320, 640))
SPECTRA = ("trained-like", "Gaussian")
REPEATS = 5
STOCK_ONCE_BEYOND, OURS_ONCE_BEYOND = 2.0, 5.0  # seconds; what takes longer is measured once
SVD_ELEMENTS = 10_000_000  # a larger matrix gets its exact vectors from its Gram matrix
ROUNDS = 3
STOCK_ROUNDS = 2  # of those; a minute each for creating and for loading
TARGET_BASIS, TARGET_ANGLE, TARGET_LOAD = 40, 1e-3, 30
PACKAGES = ("torch", "transformers", "peft", "safetensors", "peft-tinylora")
SEVEN_B = "Qwen/Qwen2.5-7B-Instruct"
# task, project, which cache: a fresh one for each run, or that of the round's first creation
Row = tuple[str, str, str]
ROWS: tuple[Row, ...] = (
    ("create", "stock", ""),
    ("create", "ours", "cold"),
    ("create", "ours", "warm"),
    ("load", "stock", ""),
    ("load", "ours", "cold"),
    ("load", "ours", "warm"),
)


class Decomposition(NamedTuple):
    """Both projects on one matrix: seconds of each repeat, sines of the largest angle to the exact subspace."""

    stock_seconds: list[float]  # empty: not measured
    ours_seconds: list[float]
    stock_angle: float
    ours_angle: float
    certificate: float
    peak_weights: float  # bytes of tensors that ours made beside W at most, in those of W


def progress(text: str) -> None:
    """One line to stderr, with the seconds since the command began."""
    print(f"{time.perf_counter() - STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)


def ratios(stock: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Stock over ours, repeat by repeat; stock's last stands in where it was measured fewer times."""
    return [stock[min(i, len(stock) - 1)] / seconds for i, seconds in enumerate(ours) if stock]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table of its head and its rows."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def timed(function: Callable, *arguments: object, **options: object) -> tuple[float, Any]:
    """Calls a function; returns its seconds, those of the GPU with them, and its result."""
    synchronize()
    start = time.perf_counter()
    result = function(*arguments, **options)
    synchronize()
    return time.perf_counter() - start, result


def decompose(W: torch.Tensor, with_stock: bool) -> Decomposition:
    """Measures both projects on one matrix, in turns."""
    stock_seconds: list[float] = []
    ours_seconds: list[float] = []
    stock_angle = float("nan")
    exact = exact_vectors(W)
    for repeat in range(REPEATS):
        if with_stock and (repeat == 0 or stock_seconds[0] < STOCK_ONCE_BEYOND):
            seconds, (U, _, Vh) = timed(torch.linalg.svd, W.float(), full_matrices=False)
            stock_seconds.append(seconds)
            stock_angle = largest_sine((U[:, :RANK], Vh[:RANK].T), exact)
            del U, Vh
        if repeat == 0 or ours_seconds[0] < OURS_ONCE_BEYOND:
            seconds, basis = timed(compute_basis, W, RANK, "left")
            ours_seconds.append(seconds)
    assert isinstance(basis, Basis)
    ours_angle = largest_sine((basis.B, basis.A.T), exact)
    del exact
    with PeakMemory() as memory:
        compute_basis(W, RANK, "left")
    peak_weights = (memory.peak_bytes - memory.start_bytes) / (W.numel() * W.element_size())
    return Decomposition(stock_seconds, ours_seconds, stock_angle, ours_angle, basis.angle, peak_weights)


def exact_vectors(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left (out, r) and right (in, r) singular vectors in float64."""
    exact = W.double()
    if W.numel() < SVD_ELEMENTS:
        U, _, Vh = torch.linalg.svd(exact, full_matrices=False)
        return U[:, :RANK], Vh[:RANK].T
    is_wide = W.shape[0] <= W.shape[1]
    wide = exact if is_wide else exact.T
    small = torch.linalg.eigh(wide @ wide.T)[1][:, -RANK:]
    large = wide.T @ small
    large = large / large.norm(dim=0)
    return (small, large) if is_wide else (large, small)


def largest_sine(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Sine of the largest principal angle between spans of columns, the larger one of U and V."""
    sines = []
    for columns, reference in zip(found, exact, strict=True):
        Q = torch.linalg.qr(columns.double())[0]
        # Not by the cosine, which is 1 to rounding for all angles under 1e-8.
        sines.append(torch.linalg.matrix_norm(Q - reference @ (reference.T @ Q), 2).item())
    return max(sines)


def basis_tables(quick: bool, device: str = "cpu") -> str:
    """The first table, and what is asked of it."""
    small, large = (QUICK_SMALL, QUICK_LARGE) if quick else (SMALL, LARGE)
    compute_basis(torch.randn(300, 300, device=device), RANK, "left")  # what the libraries set up once
    torch.linalg.svd(torch.randn(300, 300, device=device))
    measured = {}
    for seed, shape in enumerate((*small, *large)):
        for spectrum in SPECTRA:
            progress(f"basis of {shape[0]}x{shape[1]}, {spectrum}")
            generator = torch.Generator().manual_seed(seed)
            is_spiked = spectrum == SPECTRA[0]
            W = (
                trained_like(shape[0], shape[1], generator)
                if is_spiked
                else STD * torch.randn(shape, generator=generator)
            )
            measured[shape, spectrum] = decompose(W.to(device), with_stock=is_spiked or shape != large[-1])
    head = "out x in,spectrum,stock (s),ours (s),ratio,angle of ours,certificate,angle of stock,peak (W)".split(",")
    rows = [[f"{m}x{n}", spectrum, *basis_cells(found)] for ((m, n), spectrum), found in measured.items()]
    return f"{markdown([head, *rows])}\n\n{basis_target([measured[shape, SPECTRA[0]] for shape in large])}"


def basis_cells(found: Decomposition) -> list[str]:
    """Stock, ours, ratio, angles and peak of a row."""
    was_measured = bool(found.stock_seconds)
    return [
        median_and_range(found.stock_seconds, ".3g") if was_measured else "not measured, for time",
        median_and_range(found.ours_seconds, ".3g"),
        median_and_range(ratios(found.stock_seconds, found.ours_seconds), ".3g") if was_measured else "",
        f"{found.ours_angle:.1e}",
        f"{found.certificate:.1e}",
        f"{found.stock_angle:.1e}" if was_measured else "",
        f"{found.peak_weights:.2f}",
    ]


def basis_target(large: Sequence[Decomposition]) -> str:
    """The large shapes together: stock's seconds over ours, and the angle."""
    stock = sum(statistics.median(found.stock_seconds) for found in large)
    reached = [stock / sum(pick(found.ours_seconds) for found in large) for pick in (statistics.median, max, min)]
    angle = max(found.ours_angle for found in large)
    target = f"target at least {TARGET_BASIS}x with an angle under {TARGET_ANGLE:g}"
    reached_text = f"reached {reached[0]:.1f}x ({reached[1]:.1f} to {reached[2]:.1f}), angle {angle:.1e}"
    return f"The large shapes with a trained-like spectrum, seconds summed: {target}; {reached_text}."


def measure_adapters(folder: Path, rounds: int) -> dict[Row, list[dict]]:
    """Every row once, then every row again, and so on; stock in the first rounds only."""
    results: dict[Row, list[dict]] = {row: [] for row in ROWS}
    for count in range(rounds):
        for row in ROWS:
            if row[1] == "ours" or count < STOCK_ROUNDS:
                results[row].append(run_row(row, folder, f"round {count + 1} of {rounds}"))
    return results


def run_row(row: Row, folder: Path, name: str, **options: bool) -> dict:
    """Runs a row. A round's cold creation fills the cache that is warm afterwards; cold loading has one of its own."""
    progress(f"{name}: {' '.join(row)}")
    cache = folder / f"cache of {name}{', loading' * (row == ('load', 'ours', 'cold'))}"
    return run_cell(Cell(*row[:2], str(folder / "model"), str(folder / "adapter" / row[1])), cache, **options)


def seconds_table(results: dict[Row, list[dict]]) -> str:
    """The second table, and what is asked of it."""
    lines = [["what", "project", "cache", "s", "ratio: stock / this"]]
    found = {row: [repeat["seconds"] for repeat in repeats] for row, repeats in results.items()}
    for (task, project, cache), seconds in found.items():
        ratio = ratios(found[task, "stock", ""], seconds) if project == "ours" else [1.0]
        name = {"create": "`get_peft_model`", "load": "`PeftModel.from_pretrained`"}[task]
        lines.append([name, project, cache, median_and_range(seconds, ".3g"), median_and_range(ratio, ".3g")])
    reached = median_and_range(ratios(found["load", "stock", ""], found["load", "ours", "warm"]), ".1f")
    return f"{markdown(lines)}\n\nLoading with a warm cache: target at least {TARGET_LOAD}x; reached {reached}x."


def files_table(small: dict[str, dict[str, int]], large: dict[str, dict[str, int]]) -> str:
    """The third table: form -> bytes of both files, on the small model and on the 7B."""
    lines = [["base", "form", "adapter_model.safetensors, bytes", "adapter_config.json, bytes"]]
    for base, forms in (("0.5B", small), ("7B", large)):
        for form, files in forms.items():
            lines.append([base, form, *(f"{count:,}" for count in files.values())])
    return markdown(lines)


def memory_table(results: dict[Row, list[dict]], compacted: dict[Row, dict], largest_bytes: int) -> str:
    """The fourth table."""
    lines = [["what", "project", "cache", "peak above the model, MB", "without what malloc keeps, MB", "in weights"]]
    for row, repeats in results.items():
        found, least = [repeat["peak_bytes"] / 1e6 for repeat in repeats], compacted[row]["peak_bytes"]
        lines.append([*row, median_and_range(found, ".1f"), f"{least / 1e6:.1f}", f"{least / largest_bytes:.2f}"])
    return markdown(lines)


def describe(argv: Sequence[str], quick: bool, others_seconds: float, largest_bytes: int) -> str:
    """What was measured, where, when and how, as Markdown."""
    return "\n".join(
        [
            "# Frozen factors side by side with stock PEFT" + ", too small and too short to mean anything" * quick,
            "",
            *run_lines("benchmarks.basis", argv, STARTED, others_seconds, PACKAGES),
            "- a figure: median (smallest to largest), where there was more than one; ratio: stock / ours, repeat by "
            "repeat",
            f"- basis: r={RANK}, fp32; stock is `torch.linalg.svd(W.float(), full_matrices=False)`, in turns with "
            f"ours, {REPEATS} times each; once where it took over {STOCK_ONCE_BEYOND:g} s (ours: {OURS_ONCE_BEYOND:g} s)",
            "- trained-like: N(0, 0.02^2) plus 8 spikes of 4 to 1.2 times its largest singular value; angle: sine of "
            "the largest principal angle, U and V, to exact vectors in float64 (SVD; above 10M elements from the Gram "
            "matrix); certificate: ours, a bound for each vector, known without them; peak: "
            "tensors of ours beside W at most, in bytes of W",
            "- adapter: 13 numbers (ours: u=1, tie='tiled'; stock: u=13, weight_tying=1.0), all linear layers of a "
            "random model of Qwen2.5-0.5B's shape, bfloat16, 1024 tokens, three spikes a weight; the base is loaded before",
            f"- every row in a process of its own, {1 if quick else ROUNDS} round(s), interleaved; stock in the first "
            f"{1 if quick else STOCK_ROUNDS}",
            "- memory: the kernel's high-water mark of the process above what it had with the base loaded, 1 MB = 1e6 "
            "bytes; once more with MALLOC_MMAP_THRESHOLD_, so that malloc gives back what is freed: what building "
            f"needs, also in multiples of the largest weight in fp32, {largest_bytes / 1e6:.1f} MB",
            f"- 7B files: of a model of {SEVEN_B}'s shape on the meta device; the factors are placeholders (ours "
            "random, stock's zeros, in the shape and dtype that it made them), which take the same bytes",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.basis", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and a small model, to see that it runs")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    others_before = seconds_of_others()
    basis = basis_tables(options.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        progress("making the base model")
        largest_bytes = save_base(folder / "model", options.quick)
        results = measure_adapters(folder, 1 if options.quick else ROUNDS)
        compacted = {row: run_row(row, folder, "memory", keep_nothing=True) for row in ROWS}
        small = compacted["create", "stock", ""]["files"] | compacted["create", "ours", "cold"]["files"]
        large: dict[str, dict[str, int]] = {}
        for project in ("stock", "ours"):
            progress(f"files on a 7B, {project}")
            large |= run_cell(Cell("weigh", project, SEVEN_B, str(folder / "7B" / project)), folder / "cache")["files"]
    sections = {
        "Basis of one weight": basis,
        "Creating and loading an adapter": seconds_table(results),
        "Files": files_table(small, large),
        "Memory while building": memory_table(results, compacted, largest_bytes),
    }
    head = describe(argv, options.quick, seconds_of_others() - others_before, largest_bytes)
    publish(head, sections, options.output)
    if options.output is not None:
        progress(f"written to {options.output}")


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

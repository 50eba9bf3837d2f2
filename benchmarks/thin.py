"""The two ways in which a bfloat16 activation meets a float32 matrix of few rows, by how many numbers there are.

    python -m benchmarks.thin --output benchmarks/results/thin_cpu.md     # half a minute on two CPU cores

Converting the activations to float32 against products with the matrix in bfloat16 parts (peft_tinylora/thin.py), in turns:
why its limit is what it is. Let nothing else run meanwhile.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.basis import markdown
from benchmarks.basis_cell import seconds_of_others
from benchmarks.report import publish, run_lines
from peft_tinylora import thin


RANK, ROUNDS = 2, 200
SHAPES = (
    (1, 512),
    (16, 512),
    (64, 512),
    (128, 512),
    (256, 512),
    (1024, 512),
    (1024, 1408),
    (1024, 4864),
    (4096, 512),
    (4096, 3584),
)


def microseconds(run: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - started)


def ratios(rows: int, width: int) -> dict[str, list[float]]:
    """Converting to parts, round by round, for both products."""
    M = thin.Thin(torch.randn(RANK, width))
    x, h = torch.randn(rows, width).bfloat16(), torch.randn(rows, RANK)
    found: dict[str, list[float]] = {"project": [], "add_to": []}
    runs = {"project": lambda: M.project(x), "add_to": lambda: M.add_to(x, h)}
    for name, run in runs.items():
        for round_ in range(-5, ROUNDS):  # the first are to warm up
            seconds = []
            for thin.CONVERTED_UP_TO in (x.numel(), 0):  # converted, in parts
                seconds.append(microseconds(run))
            if round_ >= 0:
                found[name].append(seconds[0] / seconds[1])
    return found


def median_and_quartiles(values: Sequence[float]) -> str:
    """Such as "1.20 (1.10 to 1.30)"."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.thin", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    others_before, limit = seconds_of_others(), thin.CONVERTED_UP_TO
    lines = [["activations", "numbers", "project, converted to parts", "add_to, converted to parts"]]
    for rows, width in SHAPES:
        cells = [median_and_quartiles(values) for values in ratios(rows, width).values()]
        lines.append([f"{rows} x {width}", f"{rows * width:,}", *cells])
    thin.CONVERTED_UP_TO = limit
    head = "\n".join(
        [
            "# Activations of bfloat16: converted, or multiplied in parts",
            "",
            *run_lines("benchmarks.thin", argv, STARTED, seconds_of_others() - others_before, ("torch",)),
            f"- r={RANK}; ratio of seconds over {ROUNDS} rounds in turns, median (quartiles); above 1, parts are faster",
            f"- thin.py converts up to {limit:,} numbers",
            "",
            markdown(lines),
        ]
    )
    publish(head, {}, options.output)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

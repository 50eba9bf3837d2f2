"""What an adapter costs in time and memory, side by side: the bare model, TinyLoRA, stock PEFT's, LoRA.

    python -m benchmarks.speed --output benchmarks/results/speed_cpu.md     # 10 minutes on two CPU cores
    python -m benchmarks.speed --quick                                      # a tiny model: does it run?

Three tables: seconds of a forward pass, a forward and backward pass, and decoding, as ratios to the bare model in the same
round; the peak memory of the activations; and the operators that one adapted module adds. Every model is measured in a
process of its own, in which all contenders take turns. A 7B in bfloat16 and NF4 where there is a GPU (not run to the
end yet), small models on a CPU. Let nothing else run meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import PYTHONPATH
from benchmarks.basis import markdown
from benchmarks.basis_cell import seconds_of_others
from benchmarks.report import publish, run_lines
from benchmarks.speed_cell import BARE, OURS, Cell
from benchmarks.training import median_and_range


CELLS = {
    "cpu": (
        Cell("small", "float32", batch=4, tokens=256, new_tokens=32, rounds=15, stock=True),
        Cell("small", "bfloat16", batch=4, tokens=256, new_tokens=32, rounds=15, stock=True),
        Cell("0.5B", "float32", batch=1, tokens=256, new_tokens=16, rounds=5, stock=True),
    ),
    "gpu": (
        Cell("7B", "bfloat16", batch=4, tokens=512, new_tokens=32, rounds=3, stock=False),
        Cell("7B", "4-bit", batch=4, tokens=512, new_tokens=32, rounds=3, stock=False),
    ),
    "quick": (Cell("tiny", "float32", batch=2, tokens=8, new_tokens=2, rounds=1, stock=True),),
}
TARGETS = {  # ratio to the bare model
    "cpu": {"forward": 1.10, "forward and backward": 1.12, "decoding": 1.15},
    "gpu": {"forward": 1.05, "forward and backward": 1.05, "decoding": 1.05},
}
TARGETS["quick"] = TARGETS["cpu"]
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "peft-tinylora")


def title_of(cell: Cell) -> str:
    """How a model is called in the tables."""
    return f"{cell.model}, {cell.dtype}, {cell.batch} x {cell.tokens} tokens"


def run_cell(cell: Cell) -> dict:
    """Runs [`Cell`] in a process of its own; returns what it measured."""
    print(title_of(cell), file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "benchmarks.speed_cell", json.dumps(asdict(cell))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Of a contender to the bare model, round by round."""
    return [own / bare for own, bare in zip(seconds[name], seconds[BARE], strict=True)]


def seconds_table(results: dict[Cell, dict]) -> str:
    """Rows are contenders, columns are tasks, for each model."""
    tasks = list(next(iter(results.values()))["seconds"])
    lines = [["model", "", *tasks]]
    for cell, result in results.items():
        bare = [f"{statistics.median(result['seconds'][task][BARE]):.3g} s" for task in tasks]
        lines.append([title_of(cell), BARE, *bare])
        for name in result["operators"]:
            own = [median_and_range(ratios(result["seconds"][task], name), ".3f") for task in tasks]
            lines.append(["", name, *own])
    return markdown(lines)


def targets(results: dict[Cell, dict], wanted: dict[str, float]) -> str:
    """One line for each model and task: what was aimed at, what was reached, and if it was missed, what is in the way."""
    lines = []
    for cell, result in results.items():
        for task, target in wanted.items():
            seconds = result["seconds"][task]
            reached = ratios(seconds, OURS)
            missed = statistics.median(reached) > target
            verdict = "missed" if missed else "reached"
            figures = median_and_range(reached, ".3f")
            lines.append(f"- {title_of(cell)}, {task}: target at most {target:.2f}; {verdict} with {figures}")
            if missed:
                more = 1000 * (statistics.median(seconds[OURS]) - statistics.median(seconds[BARE]))
                lines.append(f"  - {in_the_way(result['profile'][task], more)}")
    return "\n".join(lines)


def in_the_way(profile: list[list], more_milliseconds: float) -> str:
    """The profile of a task in one line."""
    *operators, (_, milliseconds, calls) = profile
    named = ", ".join(f"{name.removeprefix('aten::')} {own:.2f} ({count:+,})" for name, own, count in operators)
    return (
        f"{more_milliseconds:.1f} ms more than the bare model. By the profiler, which slows them down, its {calls:,} "
        f"further operators take {milliseconds:.1f} ms, the rest is Python; most of all, in ms and with their calls: {named}"
    )


def memory_table(results: dict[Cell, dict]) -> str:
    """Peak bytes of a forward and backward pass, above what was there before."""
    names = list(next(iter(results.values()))["peaks"])
    lines = [["model", *names]]
    for cell, result in results.items():
        peaks = result["peaks"]
        cells = [f"{peaks[name] / 1e6:,.1f} MB ({peaks[name] / peaks[BARE]:.3f})" for name in names]
        lines.append([title_of(cell), *cells])
    return markdown(lines)


def operators_table(results: dict[Cell, dict]) -> str:
    """What an adapted module adds, on average, and in brackets with the operators that those call."""
    lines = [["model", "", *next(iter(next(iter(results.values()))["operators"].values()))]]
    for cell, result in results.items():
        for row, (name, by_task) in enumerate(result["operators"].items()):
            counts = [f"{outermost:.1f} ({every:.1f})" for outermost, every in by_task.values()]
            lines.append(["" if row else title_of(cell), name, *counts])
    return markdown(lines)


def describe(argv: Sequence[str], others_seconds: float) -> str:
    """What was measured, where, when and how, as Markdown."""
    return "\n".join(
        [
            "# Time and memory side by side with the bare model, LoRA and stock PEFT",
            "",
            *run_lines("benchmarks.speed", argv, STARTED, others_seconds, PACKAGES),
            "- models: random, Qwen2-shaped; small: hidden 512, 8 layers; 0.5B and 7B: Qwen2.5's; eager mode",
            "- adapters: all linear layers of the blocks; TinyLoRA of 13 numbers (small: 12; r=2, u=1, tiled); all with "
            "values that are not zero",
            "- time: ratio to the bare model in the same round, median (smallest to largest); each round in another "
            "order, after one to warm up; all contenders share the base model's tensors",
            "- forward: no_grad; backward: to the input embeddings, the base frozen, no checkpointing; decoding: greedy, "
            "one sequence of 16 tokens",
            "- memory: the most bytes of tensors in a forward and backward pass above those before it, and the ratio to the "
            "bare model; 1 MB = 1e6 bytes",
            "- operators: by torch's profiler, those of the bare model taken off, by the number of adapted modules; "
            "outermost ones, and in brackets all of them",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    chosen = "quick" if options.quick else "gpu" if torch.cuda.is_available() else "cpu"
    others_before = seconds_of_others()
    results = {cell: run_cell(cell) for cell in CELLS[chosen]}
    sections = {
        "Time": f"{seconds_table(results)}\n\n{targets(results, TARGETS[chosen])}",
        "Memory of the activations": memory_table(results),
        "Operators of an adapted module": operators_table(results),
    }
    publish(describe(argv, seconds_of_others() - others_before), sections, options.output)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

"""What GRPO and SFT cost, side by side: 4-bit and 16-bit bases, TinyLoRA and LoRA, and stock PEFT's TinyLoRA.

    python -m benchmarks.training                     # chooses GPU or CPU itself; 11 minutes on a shared CPU core
    python -m benchmarks.training --repeats 5 --output benchmarks/results/h200.md

Real TRL trainers on random models: a 7B-shaped one where there is a GPU (made in place, nothing is downloaded), a
small Llama on a CPU. Every row is measured in a process of its own, GRPO first and then SFT,
and the repeats are interleaved, so that a machine that grows slower does so for all of them. What a row cannot do
stands in it as the error.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import PYTHONPATH
from benchmarks.training_cell import Cell


ROWS = [  # base, adapter; the first is the reference of all ratios
    ("16-bit", "LoRA r=8"),
    ("16-bit", "LoRA r=1"),
    ("16-bit", "TinyLoRA"),
    ("16-bit", "TinyLoRA of stock PEFT"),
    ("4-bit", "LoRA r=8"),
    ("4-bit", "LoRA r=1"),
    ("4-bit", "TinyLoRA"),
    ("4-bit", "TinyLoRA of stock PEFT"),
]
# Few, for they take minutes. Not stock PEFT on the 16-bit base: it decomposes every weight of a 7B in full.
ROWS_OF_A_7B = [row for row in ROWS if row[1] != "LoRA r=1" and row != ("16-bit", "TinyLoRA of stock PEFT")]
WORKLOADS = {
    "smallest": {
        "model": "a Llama of 1.4M parameters",
        "completions": 4,
        "micro_batch": 4,
        "prompt_tokens": 4,
        "completion_tokens": 4,
        "timed_steps": 1,
    },
    "cpu": {
        "model": "a Llama of 50M parameters",
        "completions": 8,  # few, so that as on a 7B the weights are most of the memory
        "micro_batch": 4,
        "prompt_tokens": 32,
        "completion_tokens": 32,
        "timed_steps": 3,
    },
    "gpu": {
        "model": "a 7B (the shape of Qwen2.5-7B)",
        "completions": 32,
        "micro_batch": 8,
        "prompt_tokens": 128,
        "completion_tokens": 32,  # generating is most of the time
        "timed_steps": 2,
    },
}
METHODS = ("grpo", "sft")
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "peft-tinylora")
SECONDS_A_ROW = 150


def measure_row(cell: Cell) -> dict:
    """Runs [`Cell`] in a process of its own; returns what it printed, or {"error": its last line}."""
    command = [sys.executable, "-m", "benchmarks.training_cell", json.dumps(asdict(cell))]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS_A_ROW)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {SECONDS_A_ROW} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(rows: Sequence[tuple[str, str]], workload: dict, repeats: int) -> dict[tuple[str, str], list[dict]]:
    """Measures every row once, then every row again, and so on; one that failed is not tried again."""
    results: dict[tuple[str, str], list[dict]] = {row: [] for row in rows}
    for repeat in range(repeats):
        for row in rows:
            if any("error" in result for result in results[row]):
                continue
            print(f"{repeat + 1}/{repeats}  {', '.join(row)}", file=sys.stderr, flush=True)
            results[row].append(measure_row(Cell(*row, **workload)))
    return results


def median_and_range(values: Sequence[float], form: str) -> str:
    """
    Formats repeats as their median and, in brackets, their range where there is one.

    Example:
        >>> median_and_range([2.0, 1.0, 4.0], ".1f")
        '2.0 (1.0 to 4.0)'
    """
    median, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return median if low == high else f"{median} ({low} to {high})"


def table(results: dict[tuple[str, str], list[dict]]) -> str:
    """
    Formats the results as a Markdown table.

    Args:
        results (`dict`): row -> its repeats, as [`measure`] returns them. Ratios are to the first row, and left out if
            that failed; a repeat's step time is the mean over its timed steps.
    """
    errors = {row: result["error"] for row, repeats in results.items() for result in repeats if "error" in result}
    figures = {row: figures_of(repeats) for row, repeats in results.items() if row not in errors}
    reference = figures.get(next(iter(results)))
    head = ["base", "adapter", "trained"]
    for method in METHODS:
        head += [f"{method.upper()} peak, MB", "ratio", f"{method.upper()} step, s", "ratio"]
    lines = [head, ["---"] * len(head)]
    for row, repeats in results.items():
        if row in errors:
            error = " ".join(errors[row].split()).replace("|", "\\|")
            lines.append([*row, "", error] + [""] * (len(head) - 4))
            continue
        cells = [*row, f"{repeats[0][METHODS[0]]['trained']:,}"]
        for quantity, values in figures[row].items():
            own = statistics.median(values)
            ratio = "" if reference is None else f"{own / statistics.median(reference[quantity]):.2f}"
            form = ",.1f" if quantity.endswith("megabytes") else ".2f"
            cells += [median_and_range(values, form), ratio]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures_of(repeats: Sequence[dict]) -> dict[str, list[float]]:
    """What a table's row shows, in its order -> a number for each repeat."""
    figures = {}
    for method in METHODS:
        figures[f"{method} megabytes"] = [repeat[method]["peak_bytes"] / 1e6 for repeat in repeats]
        figures[f"{method} seconds"] = [statistics.mean(repeat[method]["step_seconds"]) for repeat in repeats]
    return figures


def describe(workload: dict, repeats: int, load: float, argv: Sequence[str]) -> str:
    """What was measured, where, when and how, as Markdown."""
    on_gpu = torch.cuda.is_available()
    threads = "" if on_gpu else f", {torch.get_num_threads()} thread(s), load average {load:.1f} before it began"
    device = (torch.cuda.get_device_name() if on_gpu else processor_name()) + threads
    memory = "torch.cuda.max_memory_allocated" if on_gpu else "tensors alive, by PyTorch's profiler (peak.py)"
    command = shlex.join(["python", "-m", "benchmarks.training", *argv])
    updates = workload["completions"] // workload["micro_batch"]
    return "\n".join(
        [
            "# GRPO and SFT side by side",
            "",
            f"- command: `{command}`",
            f"- machine: {device}; Python {platform.python_version()}",
            f"- versions: {', '.join(f'{package} {version(package)}' for package in PACKAGES)}",
            f"- date: {datetime.now(UTC):%Y-%m-%d}",
            f"- model: {workload['model']}, random; bfloat16, or NF4 with double quantization",
            f"- a step: {workload['completions']} completions (GRPO, 4 a prompt) or texts (SFT) in {updates} micro-"
            f"batches, {workload['prompt_tokens']} + {workload['completion_tokens']} tokens each, gradient "
            "checkpointing, bf16 autocast",
            f"- peak: {memory}, in one step; 1 MB = 1e6 bytes",
            f"- {repeats} repeat(s), interleaved, a process for each: median (smallest to largest); a repeat's time is "
            f"the mean of {workload['timed_steps']} step(s) after one to warm up",
            f"- ratio: to {', '.join(ROWS[0])}",
        ]
    )


def processor_name() -> str:
    """The CPU's own name where Linux tells it, and how many cores this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it."""
    argv = sys.argv[1:] if argv is None else argv
    chosen = "gpu" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="how often each row is measured (default: 3)")
    parser.add_argument(
        "--output", type=Path, help="Markdown file to write (default: benchmarks/results/training_*.md)"
    )
    parser.add_argument("--workload", choices=WORKLOADS, default=chosen, help="default: cpu or gpu, by what is there")
    options = parser.parse_args(argv)
    workload = WORKLOADS[options.workload]
    output = options.output or Path(__file__).parent / "results" / f"training_{options.workload}.md"
    load = os.getloadavg()[0]
    results = measure(ROWS_OF_A_7B if options.workload == "gpu" else ROWS, workload, options.repeats)
    text = f"{describe(workload, options.repeats, load, argv)}\n\n{table(results)}\n"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print(text)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What the frozen factors cost on a GPU: of one weight beside stock PEFT's SVD, and an adapter on a whole 7B.

    python -m benchmarks.basis_gpu --output benchmarks/results/basis_gpu.md     # a minute on an H200

The first table is that of basis.py, its weights and both projects on the GPU. The second creates an adapter of 13
numbers on a random model of Qwen2.5-7B's shape, in bfloat16 and in NF4, beside LoRA. Stock PEFT's adapter is not in it:
196 decompositions in full.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model

from benchmarks.basis import basis_tables, markdown, progress, timed
from benchmarks.basis_cell import seconds_of_others
from benchmarks.report import publish, run_lines
from benchmarks.shapes import shape_of
from benchmarks.training import median_and_range
from benchmarks.training_cell import lora, random_model, tinylora


ROUNDS = 3
MODEL = "Qwen/Qwen2.5-7B-Instruct"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "peft-tinylora")


def seconds_to_create(config: PeftConfig, base: torch.nn.Module) -> float:
    """Puts an adapter on a base, and takes it off again."""
    seconds, model = timed(get_peft_model, base, config)
    model.unload()
    return seconds


def adapter_table() -> str:
    """Rows are bases, columns are adapters."""
    shape = shape_of(MODEL)
    lines = [["base", "LoRA r=8 (s)", "TinyLoRA, nothing cached (s)", "TinyLoRA, cached (s)"]]
    for dtype in ("16-bit", "4-bit"):
        base = random_model(shape, dtype)
        found: dict[str, list[float]] = {"lora": [], "cold": [], "warm": []}
        for round_ in range(ROUNDS):
            progress(f"adapters on a 7B, {dtype}, round {round_ + 1} of {ROUNDS}")
            with tempfile.TemporaryDirectory() as cache:
                os.environ["PEFT_TINYLORA_CACHE"] = cache
                found["lora"].append(seconds_to_create(lora(8), base))
                found["cold"].append(seconds_to_create(tinylora(shape), base))
                found["warm"].append(seconds_to_create(tinylora(shape), base))
        lines.append([f"{MODEL}'s shape, {dtype}", *(median_and_range(seconds, ".3g") for seconds in found.values())])
        del base
        torch.cuda.empty_cache()
    return markdown(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.basis_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    others_before = seconds_of_others()
    sections = {
        "Basis of one weight": basis_tables(quick=False, device="cuda"),
        "Creating an adapter": adapter_table(),
    }
    lines = [
        "# Frozen factors on a GPU",
        "",
        *run_lines("benchmarks.basis_gpu", argv, STARTED, seconds_of_others() - others_before, PACKAGES),
        "- basis of one weight: as in basis_cpu.md, the weight on the GPU; a figure: median (smallest to largest)",
        f"- adapters: 13 numbers, r=2, all 196 linear layers; {ROUNDS} rounds in one process, the base already loaded",
    ]
    publish("\n".join(lines), sections, options.output)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

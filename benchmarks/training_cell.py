"""One row of the table of training.py, in a process of its own: a base, an adapter -> GRPO and SFT, measured.

    python -m benchmarks.training_cell '{"base": "4-bit", "adapter": "LoRA r=8", ...}'      a `Cell` as JSON

The last line of stdout is JSON: {"grpo": {"trained": 13, "peak_bytes": ..., "step_seconds": [...]}, "sft": {...}}.

The trap: `peft_tinylora` puts its tuner in the place of PEFT's when it is imported, so the rows of stock PEFT must not
import it, nor trl_recipes, which does.
"""

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from benchmarks.peak import PeakMemory  # noqa: E402
from benchmarks.shapes import shape_of  # noqa: E402


TOKENIZER = Path(__file__).parents[1] / "trl_recipes" / "embedded" / "model"
TRAINED_NUMBERS = 13  # of TinyLoRA, as in the paper


@dataclass(frozen=True)
class Cell:
    """
    What one process measures.

    Args:
        base (`str`): `"16-bit"` or `"4-bit"`.
        adapter (`str`): a key of `ADAPTERS`.
        model (`str`): a key of `MODELS`.
        completions (`int`): completions, or SFT texts, in an optimizer step.
        micro_batch (`int`): of them in a forward pass.
        prompt_tokens (`int`): length of each prompt.
        completion_tokens (`int`): length of each completion, all alike.
        timed_steps (`int`): optimizer steps that are timed; one goes before them, one after, for the memory.
    """

    base: str
    adapter: str
    model: str
    completions: int
    micro_batch: int
    prompt_tokens: int
    completion_tokens: int
    timed_steps: int


def llama(layers: int, hidden: int, intermediate: int) -> LlamaConfig:
    """A Llama around the embedded model's 184 tokens, with half as many key and value heads as query heads."""
    return LlamaConfig(
        vocab_size=184,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


# 7 layers of 7 linear modules, 4 of them to a number: ceil(49 / 4) = 13
MODELS = {
    "a Llama of 1.4M parameters": llama(7, 128, 384),
    "a Llama of 22M parameters": llama(7, 512, 1536),
    "a Llama of 50M parameters": llama(7, 768, 2304),
    "a 7B (the shape of Qwen2.5-7B)": shape_of("Qwen/Qwen2.5-7B-Instruct"),
}


def lora(rank: int) -> PeftConfig:
    """LoRA on every linear module."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def tinylora(config: PretrainedConfig) -> PeftConfig:
    """This project's TinyLoRA with the paper's tiling."""
    from peft_tinylora import TinyLoraConfig

    n_tie = -(-7 * config.num_hidden_layers // TRAINED_NUMBERS)
    return TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=n_tie, target_modules="all-linear", task_type="CAUSAL_LM")


def stock_tinylora(config: PretrainedConfig) -> PeftConfig:
    """PEFT's own TinyLoRA, with the share of its weight_tying that gives as many numbers."""
    from peft import TinyLoraConfig

    if "peft_tinylora" in sys.modules:
        raise RuntimeError("peft_tinylora was imported: this process no longer has stock PEFT's TinyLoRA.")
    weight_tying = 1 - TRAINED_NUMBERS / (7 * config.num_hidden_layers)
    return TinyLoraConfig(r=2, u=1, weight_tying=weight_tying, target_modules="all-linear", task_type="CAUSAL_LM")


ADAPTERS = {
    "LoRA r=8": lambda config: lora(8),
    "LoRA r=1": lambda config: lora(1),
    "TinyLoRA": tinylora,
    "TinyLoRA of stock PEFT": stock_tinylora,
}


def random_model(config: PretrainedConfig, base: str) -> PreTrainedModel:
    """
    Builds a random model as `from_pretrained` would, in bfloat16 or quantized to NF4 with double quantization.

    No file is read, and no more than one weight is ever there in fp32. The state dict lies on the device where the
    model will be, in bfloat16; transformers takes one weight after the other from it and quantizes it there.
    """
    device = PartialState().device
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    weights = {
        name: random_weight(parameter.shape, generator)
        for name, parameter in empty.named_parameters()  # a tied lm_head is not among them
    }
    quantization_config = None
    if base == "4-bit":
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return type(empty).from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.bfloat16,
        quantization_config=quantization_config,
        device_map={"": device},
    )


def random_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm or bias; for a matrix noise and two strong directions, which a trained weight has and noise has not."""
    device = generator.device
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02, generator=generator)
    for strength in (0.02, 0.01):
        left, right = (torch.empty(size, device=device).normal_(generator=generator) for size in shape)
        weight += (strength * torch.outer(left, right)).bfloat16()
    return weight


class StepMeter(TrainerCallback):
    """Times all optimizer steps but the first and the last, and takes the peak memory of the last."""

    def __init__(self, steps: int):
        self.steps = steps
        self.step_seconds: list[float] = []
        self.memory = PeakMemory()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps - 1:
            self.memory.__enter__()
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        synchronize()
        seconds = time.perf_counter() - self.started
        if state.global_step == self.steps:
            self.memory.__exit__(None, None, None)
        elif state.global_step > 1:
            self.step_seconds.append(seconds)


def synchronize() -> None:
    """Waits for what the GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def grpo_trainer(model: PreTrainedModel, cell: Cell, common: dict, adapter: PeftConfig) -> Trainer:
    """TRL's GRPO on prompts of one length; completions go on to the last token, whatever the random model says."""
    args = GRPOConfig(
        num_generations=4,
        max_completion_length=cell.completion_tokens,
        generation_kwargs={"min_new_tokens": cell.completion_tokens},
        beta=0.0,
        **common,
    )
    word = "one "
    prompts = Dataset.from_dict({"prompt": [word * cell.prompt_tokens] * (cell.completions * args.max_steps)})
    return GRPOTrainer(
        model=model,
        # Of the completions to a prompt, some are rewarded and some are not: equal rewards would teach nothing.
        reward_funcs=lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))],
        args=args,
        train_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left"),
        peft_config=adapter,
    )


def sft_trainer(model: PreTrainedModel, cell: Cell, common: dict, adapter: PeftConfig) -> Trainer:
    """TRL's SFT on texts as long as GRPO's prompt and completion."""
    length = cell.prompt_tokens + cell.completion_tokens
    args = SFTConfig(max_length=length, **common)
    texts = Dataset.from_dict(
        {"input_ids": [[5 + i % 7 for i in range(length)]] * (cell.completions * args.max_steps)}
    )
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=texts,
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=adapter,
    )


TRAINERS = {"grpo": grpo_trainer, "sft": sft_trainer}


def measure(cell: Cell, method: str) -> dict:
    """
    Trains for some steps.

    Returns:
        `dict`: "trained" numbers, "peak_bytes" of a step, "step_seconds" of each timed step.
    """
    config = MODELS[cell.model]
    steps = cell.timed_steps + 2
    common = {
        "output_dir": "outputs/benchmark",
        "per_device_train_batch_size": cell.micro_batch,
        "gradient_accumulation_steps": cell.completions // cell.micro_batch,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "bf16": True,
        "gradient_checkpointing": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }
    torch.manual_seed(0)
    trainer = TRAINERS[method](random_model(config, cell.base), cell, common, ADAPTERS[cell.adapter](config))
    if cell.adapter == "TinyLoRA":
        from trl_recipes.trainer_setup import keep_vector_in_fp32

        keep_vector_in_fp32(trainer)  # as the recipes do
    meter = StepMeter(steps)
    trainer.add_callback(meter)
    trainer.train()
    return {
        "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_bytes": meter.memory.peak_bytes,
        "step_seconds": meter.step_seconds,
    }


def main() -> None:
    """Measures the cell given as JSON, GRPO first, and prints JSON."""
    cell = Cell(**json.loads(sys.argv[1]))
    results = {}
    for method in TRAINERS:
        results[method] = measure(cell, method)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(json.dumps({**asdict(cell), **results}), flush=True)


if __name__ == "__main__":
    main()

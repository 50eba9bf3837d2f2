"""TRL's trainers on the tiny model, saving after each step."""

from pathlib import Path

import torch
from datasets import Dataset
from recipes.conftest import all_sums
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_tinylora import TinyLoraConfig


def tiny_trainer(base: Path, folder: Path, trainer_class: type[Trainer], *, rows: int = 100, **options) -> Trainer:
    """A trainer on the first `rows` sums, as the recipes build it; `u` and `projection_seed` are the adapter's."""
    adapter = {name: options.pop(name) for name in ("u", "projection_seed") if name in options}
    common = {
        "model": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        "processing_class": AutoTokenizer.from_pretrained(base, padding_side="left"),
        "peft_config": TinyLoraConfig(
            r=2, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM", **{"u": 1} | adapter
        ),
    }
    options = {
        **{"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "seed": 3},
        **{"learning_rate": 0.05, "per_device_train_batch_size": 8, "gradient_checkpointing": False},
        **{"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "report_to": "none", "disable_tqdm": True},
    } | options
    sums = all_sums()[:rows]
    if issubclass(trainer_class, SFTTrainer):
        data = Dataset.from_list([{"prompt": row["prompt"], "completion": f" #### {row['answer']}"} for row in sums])
        more = {"eval_dataset": data} if options.get("eval_strategy", "no") != "no" else {}
        return trainer_class(args=SFTConfig(**options), train_dataset=data, **more, **common)
    assert issubclass(trainer_class, GRPOTrainer)
    return trainer_class(
        args=GRPOConfig(num_generations=4, max_completion_length=4, **options),
        reward_funcs=lambda completions, **kwargs: [float("####" in text) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in sums]),
        **common,
    )

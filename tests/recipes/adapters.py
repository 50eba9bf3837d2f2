"""Adapters of the tiny model that were never trained, and how they are scored."""

from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM


LENGTH, BATCH = 6, 16
OPTIONS = (
    *("--max_completion_length", str(LENGTH), "--batch_size", str(BATCH)),
    *("--use_cpu", "true", "--dtype", "float32"),
)


def add_adapter(model_dir: Path, config: PeftConfig, folder: Path, size: float = 0.3) -> Path:
    """Saves an adapter whose numbers are drawn, and change many answers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tinylora_v" in name or "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder

"""What changes where several processes train one model, each on a part of the data: DDP, FSDP2 and DeepSpeed ZeRO-3.

Under FSDP2 and ZeRO-3 a process has only a part of each parameter, v included. Whatever reads a whole one is collective:
every process must call it, or the others wait for it until they time out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config
from trl.models import unwrap_model_for_generation

from peft_tinylora.gather import is_zero3
from trl_recipes.errors import RecipeError


def send_gradients_only(training_args: TrainingArguments) -> None:
    """Keeps DDP from sending the model's buffers at each step: the frozen factors, which every process has made."""
    if training_args.ddp_broadcast_buffers is None:
        training_args.ddp_broadcast_buffers = False


def refuse_mixed_precision_where_sharded(trainer: Trainer) -> None:
    """Raises [`RecipeError`] for mixed precision under FSDP2 or DeepSpeed, which make v half precision before it is used."""
    if is_sharded(trainer) and trainer.accelerator.mixed_precision != "no":
        raise RecipeError(
            f"mixed precision ({trainer.accelerator.mixed_precision}) with FSDP2 or DeepSpeed, which would round v at every "
            "step: set bf16: false and fp16: false; the base computes in the dtype that it is loaded in (dtype: bfloat16)."
        )


def is_sharded(trainer: Trainer) -> bool:
    """Whether a process has only a part of each parameter, once training has begun, and none on its device before."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


@contextmanager
def partitioned_in(dtype: str | torch.dtype | None) -> Iterator[None]:
    """Has ZeRO-3 keep a base in `dtype` that is loaded meanwhile: without mixed precision it would make it fp32."""
    config = deepspeed_config()
    if config is None or dtype not in ("bfloat16", torch.bfloat16):
        yield
        return
    with_mixed_precision = config.get("bf16")
    config["bf16"] = {"enabled": True}
    try:
        yield
    finally:
        config["bf16"] = with_mixed_precision


@contextmanager
def gathered_parameters(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """While this lasts, parameters that ZeRO-3 has partitioned are whole, and what process 0 writes to them is kept."""
    gathering = nullcontext()
    if any(is_zero3(parameter) for parameter in parameters):
        import deepspeed

        gathering = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    with gathering:
        yield


@contextmanager
def ready_to_generate(trainer: Trainer) -> Iterator[PeftModel]:
    """While this lasts, the trained model without what wraps it, so that all processes together can generate."""
    # Without the wrapper of mixed precision: scored as a later process will score it.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        yield model

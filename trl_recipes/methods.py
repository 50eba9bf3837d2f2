"""What a recipe trains: a TinyLoRA, or one of the paper's baselines beside it, with the same data, trainer and scores.

    method      trained                    options that it reads                         left in output_dir
    tinylora    v, some numbers            tinylora_*                                    the adapter, with its card
    lora        A and B of PEFT's LoRA     lora_*, use_rslora, use_dora                  a LoRA
    lora-xs     R (r, r) of each module    lora_r, lora_dropout, lora_target_modules     a LoRA: A = V^T, B = U S R
    full        all weights                none                                          a model with its tokenizer

LoRA's options are TRL's own and have TRL's defaults (lora_r 16, lora_alpha 32, lora_dropout 0.05), but that all linear
layers are adapted where `lora_target_modules` is not set. A baseline does not read `tinylora_*`, so that any config of a
TinyLoRA runs with another method by that one option; it wants another learning rate.

A recipe asks in this order: what is refused, the config for PEFT, what is to be done to the trainer before training, and
to the model after it, and what to save.
"""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import ModelConfig, get_peft_config

from peft_tinylora import TinyLoraConfig
from peft_tinylora.adapter_files import ADAPTER_FILES, WEIGHTS_FILE
from peft_tinylora.card import FACTS_FILE
from peft_tinylora.errors import first_line
from peft_tinylora.hub import REPORT_FILES
from peft_tinylora.targets import find_targets
from peft_tinylora.weight import keep_differentiable
from trl_recipes import lora_xs
from trl_recipes.arguments import (
    GRPOArguments,
    RecipeArguments,
    TinyLoraArguments,
    refuse_lora_options,
)
from trl_recipes.errors import RecipeError, shown
from trl_recipes.sharding import is_sharded, refuse_mixed_precision_where_sharded
from trl_recipes.trainer_setup import keep_vector_in_fp32, model_of, round_vector, save_adapter, tinylora_config


MODEL_WEIGHTS = "model*.safetensors*"  # one file, or several and their index
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


def refuse_unread_options(
    recipe_args: RecipeArguments, training_args: TrainingArguments, model_args: ModelConfig
) -> None:
    """Raises [`RecipeError`] for options that the method does not heed, or that it cannot be trained with."""
    method = recipe_args.method
    refuse_lora_options(model_args, method)
    if method == "tinylora":
        return
    if training_args.push_to_hub:
        raise RecipeError(
            f"push_to_hub with method: {method}: this recipe publishes TinyLoRA adapters only, with their card: leave it "
            "out, and upload output_dir by `hf upload REPOSITORY FOLDER` afterwards."
        )
    if isinstance(recipe_args, GRPOArguments) and recipe_args.rollout != "transformers":
        raise RecipeError(
            f"rollout: {recipe_args.rollout} with method: {method}: requests to vLLM carry the numbers of a TinyLoRA: "
            "leave it out, or use TRL's own vLLM by use_vllm: true."
        )
    if method == "full":
        if model_args.load_in_4bit or model_args.load_in_8bit:
            raise RecipeError(
                "method: full on a quantized base, whose weights cannot be trained: leave load_in_4bit and load_in_8bit "
                "out, or set method: lora."
            )
        if model_args.use_peft:
            raise RecipeError(
                "use_peft with method: full, which has no adapter: leave use_peft out, or set method: lora."
            )
    else:
        if model_args.lora_r < 1:
            raise RecipeError(f"lora_r={model_args.lora_r}: must be 1 or more.")
        if not 0 <= model_args.lora_dropout < 1:
            raise RecipeError(f"lora_dropout={model_args.lora_dropout}: must be 0 or more, and less than 1.")


def remarks(recipe_args: RecipeArguments, model_args: ModelConfig, tinylora_args: TinyLoraArguments) -> list[str]:
    """What the user should know of these options before the run, a line each."""
    if recipe_args.method == "tinylora":
        if tinylora_args.tinylora_dtype == "float32":
            return []
        return ["tinylora_dtype: bfloat16: steps that are small beside v round to nothing; for comparisons only"]
    lines = []
    defaults = TinyLoraArguments()
    given = [f.name for f in fields(defaults) if getattr(tinylora_args, f.name) != getattr(defaults, f.name)]
    if given:
        lines.append(f"method: {recipe_args.method} does not read {', '.join(given)}")
    if recipe_args.method == "full" and model_args.dtype != "float32":
        lines.append(
            f"method: full with dtype: {model_args.dtype}: the weights are trained in that dtype, where small steps may "
            "round to nothing; dtype: float32 with bf16: true computes in bf16 and keeps them"
        )
    return lines


def peft_config_of(
    method: str, tinylora_args: TinyLoraArguments, model_args: ModelConfig, model: PreTrainedModel
) -> PeftConfig | None:
    """
    Builds the config of the adapter for a base model; `None` for full fine-tuning.

    Raises:
        RecipeError: with the config's own words where a value is not allowed, or where it adapts nothing.
    """
    if method == "full":
        return None
    config: TinyLoraConfig | LoraConfig
    if method == "tinylora":
        config = tinylora_config(tinylora_args, model_args.model_revision)
    else:
        config = lora_config(method, model_args)
    if not find_targets(model, config):
        name = "tinylora_target_modules" if method == "tinylora" else "lora_target_modules"
        raise RecipeError(
            f"{name}={shown(config.target_modules)}: the model has no such module; all-linear adapts all linear ones."
        )
    return config


def lora_config(method: str, model_args: ModelConfig) -> LoraConfig:
    """
    Builds the config of a LoRA from TRL's options, for `"lora"` and for `"lora-xs"`, which has no scale.

    Raises:
        RecipeError: with the config's own words where a value is not allowed.
    """
    targets = model_args.lora_target_modules
    if targets is None and model_args.lora_target_parameters is None:
        targets = ["all-linear"]  # ModelConfig makes one of a list of one
    alpha = model_args.lora_r if method == "lora-xs" else model_args.lora_alpha
    try:
        config = get_peft_config(replace(model_args, use_peft=True, lora_target_modules=targets, lora_alpha=alpha))
    except ValueError as error:
        raise RecipeError(first_line(error)) from error
    assert isinstance(config, LoraConfig)  # and not None, as use_peft is set
    config.revision = None if model_args.model_revision == "main" else model_args.model_revision  # TRL's default
    return config


def prepare(trainer: Trainer, method: str, tinylora_dtype: str) -> None:
    """
    Does to a trainer what the method needs; call it between building the trainer and training.

    What is trained beside a base is trained in fp32, whatever TRL cast it to; all weights, in the dtype of the base.

    Args:
        trainer ([`~transformers.Trainer`]):
            As TRL built it.
        method (`str`):
            One of `METHODS`.
        tinylora_dtype (`str`):
            "float32", or "bfloat16" for a v that is rounded at each step.

    Raises:
        RecipeError: for what would round v at each step, or shard the factors of LoRA-XS.
        BasisError, UnsupportedModuleError: if LoRA-XS cannot take its factors from a weight.
    """
    if is_sharded(trainer) and getattr(trainer.model, "is_quantized", False):
        raise RecipeError(
            "a quantized base with FSDP2 or DeepSpeed, which nobody has tried with these recipes: start it with DDP, or leave "
            "load_in_4bit and load_in_8bit out."
        )
    if method == "full":
        return
    model = model_of(trainer)
    if method == "tinylora":
        refuse_mixed_precision_where_sharded(trainer)
    keep_vector_in_fp32(trainer)
    keep_differentiable(model)
    if method == "lora-xs":
        if is_sharded(trainer):
            raise RecipeError(
                "method: lora-xs with FSDP2 or DeepSpeed, which would shard its factors: start it with DDP."
            )
        assert isinstance(model, PeftModel)
        lora_xs.install(model)
    if method == "tinylora" and tinylora_dtype != "float32":
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "tinylora_v" in name:
                parameter.data = parameter.data.to(getattr(torch, tinylora_dtype))


def trained_dtypes(model: torch.nn.Module) -> str:
    """What is trained in: "fp32", or "bf16 and fp32" say."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    return " and ".join(sorted(SHORT_NAMES.get(dtype, str(dtype)) for dtype in dtypes))


def without_adapter(model: PreTrainedModel | PeftModel) -> AbstractContextManager:
    """While this lasts, a model answers as its base does. One without an adapter is its base, before training."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def finish(model: PreTrainedModel | PeftModel, method: str, tinylora_save_dtype: str) -> None:
    """Brings a trained model, not wrapped by a trainer, into the form in which it is saved and scored."""
    if not isinstance(model, PeftModel):
        return
    if method == "tinylora":
        round_vector(model, tinylora_save_dtype)
    if method == "lora-xs":
        lora_xs.fold(model)


def finished_in(output_dir: Path, resume_from_checkpoint: str | bool | None) -> str | None:
    """
    What a run must not replace unasked in a folder: "adapter", "model", or `None`.

    Not what a run left that was killed between saving it and drawing its curve, its last file, where this run goes on from a checkpoint.
    """
    goes_on = str(resume_from_checkpoint).lower() not in ("none", "false")
    if goes_on and not any(output_dir.glob("[!.]*_curve.png")):
        return None
    if (output_dir / WEIGHTS_FILE).exists():
        return "adapter"
    return "model" if any(output_dir.glob(MODEL_WEIGHTS)) else None


def save(trainer: Trainer, output_dir: Path, tokenizer_of_base: PreTrainedTokenizerBase, keep: str) -> None:
    """
    Saves what was trained: an adapter as [`save_adapter`] does, or a model with its tokenizer.

    What a run with another method left in the folder goes: a model beside an adapter would be loaded with it.
    """
    if isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        save_adapter(trainer, output_dir, tokenizer_of_base, keep)
        if trainer.is_world_process_zero():
            for path in (*output_dir.glob(MODEL_WEIGHTS), output_dir / "config.json"):
                path.unlink(missing_ok=True)
            (output_dir / "generation_config.json").unlink(missing_ok=True)
        return
    temporary = output_dir / ".saving"
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        names = {path.name for path in temporary.iterdir()} - {"training_args.bin"}
        old = {path.name for path in output_dir.glob(MODEL_WEIGHTS)}
        for name in ({*REPORT_FILES, FACTS_FILE, *ADAPTER_FILES} | old) - {keep}:
            (output_dir / name).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: Path(name).match(MODEL_WEIGHTS)):  # the weights last
            os.replace(temporary / name, output_dir / name)
        shutil.rmtree(temporary)

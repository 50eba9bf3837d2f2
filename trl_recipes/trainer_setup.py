"""What each recipe does around a TRL trainer: load the base, configure the adapter, keep v in fp32.

The trap: TRL casts every trainable parameter of a quantized base to bf16 when it builds the trainer, and in bf16 the
small Adam steps of a tiny v round to nothing. `keep_vector_in_fp32` must run after the trainer is built and before
training, while v is still at its start, so that nothing has been rounded yet.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from datasets import disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import GRPOConfig, ModelConfig, get_quantization_config

from peft_tinylora import TinyLoraConfig
from peft_tinylora.adapter_files import ADAPTER_FILES
from peft_tinylora.card import FACTS_FILE
from peft_tinylora.errors import first_line
from peft_tinylora.gather import stored_shape, whole
from peft_tinylora.hub import REPORT_FILES, TOKENIZER_FILES, is_changed
from trl_recipes.arguments import TinyLoraArguments
from trl_recipes.errors import RecipeError, shown
from trl_recipes.sharding import gathered_parameters, partitioned_in


def hide_known_noise() -> None:
    """Hides the bars of data that loads in a moment, and the warnings that nobody but TRL can act on."""
    disable_progress_bars()
    # TRL 1.16 sets and reads gradient_checkpointing, which transformers 5.23 calls activation_checkpointing. Remove
    # when TRL does too.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    # torch 2.13 has another name for what transformers passes on; see send_gradients_only.
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)


def model_name(model_args: ModelConfig) -> str:
    """The base model's id or folder; raises [`RecipeError`] where none is set."""
    if model_args.model_name_or_path is None:
        raise RecipeError("no model: set model_name_or_path to a model id or a folder.")
    return model_args.model_name_or_path


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Loads the base model's tokenizer, padding on the left as generation needs; see [`load_model`]."""
    name = model_name(model_args)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=model_args.model_revision,
            trust_remote_code=trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except (OSError, ValueError) as error:
        guess = "" if Path(name).is_dir() else " (no such folder, so taken for a model id)"
        raise RecipeError(f"cannot load the tokenizer of {shown(name)}{guess}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    model_args: ModelConfig, trust_remote_code: bool, extra_kwargs: dict[str, Any] | None = None
) -> PreTrainedModel:
    """
    Loads the base model, the same way for training and for scoring.

    Args:
        model_args ([`~trl.ModelConfig`]):
            Which model, in which dtype, quantized or not.
        trust_remote_code (`bool`):
            Whether to run the code that a model ships with.
        extra_kwargs (`dict`, *optional*):
            More arguments of [`~transformers.AutoModelForCausalLM.from_pretrained`], which win.

    Raises:
        RecipeError: if there is no such model.
    """
    name = model_name(model_args)
    kwargs: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": trust_remote_code,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        kwargs |= {"quantization_config": quantization_config, "device_map": {"": PartialState().device}}
    try:
        with partitioned_in(model_args.dtype):
            return AutoModelForCausalLM.from_pretrained(name, **kwargs | (extra_kwargs or {}))
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot load model {shown(name)}: {first_line(error)}") from error


def quantization_of(model_args: ModelConfig) -> str:
    """Says how the base is quantized, for the card."""
    if model_args.load_in_8bit:
        return "8 bits"
    if not model_args.load_in_4bit:
        return "none"
    nested = ", the scales quantized too" if model_args.use_bnb_nested_quant else ""
    return f"4 bits, {model_args.bnb_4bit_quant_type}{nested}"


def tinylora_config(arguments: TinyLoraArguments, revision: str | None = None) -> TinyLoraConfig:
    """
    Builds the adapter's config.

    Args:
        arguments ([`TinyLoraArguments`]):
            What was set.
        revision (`str`, *optional*):
            Of the base model, which whoever loads the adapter by its name alone needs too.

    Raises:
        RecipeError: with the config's own words where a value is not allowed.
    """

    def names_or_pattern(names: list[str] | None) -> list[str] | str | None:
        # The command line gives a list; one element is a keyword (all-linear) or a pattern, as in TRL's ModelConfig.
        return names[0] if isinstance(names, list) and len(names) == 1 else names

    try:
        return TinyLoraConfig(
            task_type="CAUSAL_LM",
            revision=None if revision == "main" else revision,  # TRL's default
            r=arguments.tinylora_r,
            u=arguments.tinylora_u,
            tie=arguments.tinylora_tie,
            n_tie=arguments.tinylora_n_tie,
            sigma=arguments.tinylora_sigma,
            target_modules=names_or_pattern(arguments.tinylora_target_modules),
            exclude_modules=names_or_pattern(arguments.tinylora_exclude_modules),
            target_parameters=arguments.tinylora_target_parameters,
            modules_to_save=arguments.tinylora_modules_to_save,
            projection_seed=arguments.tinylora_projection_seed,
            basis=arguments.tinylora_basis,
            save_basis=arguments.tinylora_save_basis,
        )
    except ValueError as error:
        raise RecipeError(first_line(error)) from error


def refuse_rounding_options(training_args: GRPOConfig) -> None:
    """Raises [`RecipeError`] for the options with which TRL casts the whole model, v included, between steps."""
    if training_args.use_transformers_continuous_batching and (training_args.bf16 or training_args.fp16):
        raise RecipeError(
            "use_transformers_continuous_batching casts the adapter to half precision at every step: set it to false, "
            "or set bf16 and fp16 to false."
        )


def model_of(trainer: Trainer) -> PreTrainedModel | PeftModel:
    """The model of one of TRL's trainers. transformers' type allows none and any module, which TRL's are not given."""
    return cast(PreTrainedModel | PeftModel, trainer.model)


def keep_vector_in_fp32(trainer: Trainer) -> int:
    """
    Casts the trained parameters back to fp32 where TRL cast them; call it between building the trainer and training.

    Returns:
        `int`: how many parameter tensors had to be cast back.
    """
    rounded = [p for p in model_of(trainer).parameters() if p.requires_grad and p.dtype != torch.float32]
    for parameter in rounded:
        parameter.data = parameter.data.float()
    return len(rounded)


def trained_numbers(model: PeftModel) -> torch.Tensor:
    """
    Returns a copy of all v, in the model's order: shape (groups * u,), fp32, on the CPU; of baselines, shape (0,).

    Every process calls it.
    """
    vectors = [p for name, p in model.named_parameters() if p.requires_grad and "tinylora_v" in name]
    with gathered_parameters(vectors):
        return torch.cat([torch.zeros(0), *(whole(v.detach()).flatten().float().cpu() for v in vectors)])


def count_trained(model: PreTrainedModel | PeftModel) -> int:
    """Counts the numbers that training changes: v, and the modules to save where there are any."""
    return sum(stored_shape(p).numel() for p in model.parameters() if p.requires_grad)


def round_vector(model: PeftModel, save_dtype: str) -> None:
    """
    Rounds v to `save_dtype`, in the model and in what is saved from now on: what is scored is what was saved.

    Call it after training, on every process: a checkpoint of the run is saved as it trains.

    Args:
        model ([`~peft.PeftModel`]):
            The trained model, not wrapped by a trainer.
        save_dtype (`str`):
            "float32" or "bfloat16".
    """
    vectors = [p for name, p in model.named_parameters() if p.requires_grad and "tinylora_v" in name]
    with gathered_parameters(vectors), torch.no_grad():
        for v in vectors:
            v.copy_(v.to(getattr(torch, save_dtype)))
    for config in model.peft_config.values():
        assert isinstance(config, TinyLoraConfig)
        config.save_dtype = save_dtype


def save_adapter(
    trainer: Trainer, output_dir: Path, tokenizer_of_base: PreTrainedTokenizerBase, keep: str | None = None
) -> None:
    """
    Saves the adapter, config before weights: a folder that holds the weights is finished.

    Written elsewhere first and moved, so that Ctrl-C leaves either the old adapter or the new one. The base is not saved,
    and the tokenizer only where training gave it a chat template or tokens that the base's does not have. Every process
    calls it, for FSDP.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer after training.
        output_dir (`Path`):
            The adapter's folder.
        tokenizer_of_base ([`~transformers.PreTrainedTokenizerBase`]):
            The base model's tokenizer, as it was before training.
        keep (`str`, *optional*):
            The file of this run that is there already; what an earlier run reported goes with its adapter.
    """
    temporary = output_dir / ".saving"
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        # TRL's trainers may be given a processor of images too; these recipes give them a tokenizer.
        changed = is_changed(cast(PreTrainedTokenizerBase, trainer.processing_class), tokenizer_of_base)
        for name in (*REPORT_FILES, FACTS_FILE):
            if name != keep:
                (output_dir / name).unlink(missing_ok=True)
        for name in TOKENIZER_FILES:
            (output_dir / name).unlink(missing_ok=True)
            if changed and (temporary / name).exists():
                os.replace(temporary / name, output_dir / name)
        (output_dir / ADAPTER_FILES[-1]).unlink(
            missing_ok=True
        )  # a kill must not leave these weights with the new config
        for name in ADAPTER_FILES:
            os.replace(temporary / name, output_dir / name)
        shutil.rmtree(temporary)

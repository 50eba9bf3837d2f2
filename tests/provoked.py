"""What docs/troubleshooting.md quotes, provoked: each function does what a user does wrong, in a folder of its own.

What needs another machine is stood in for: an error of a full disk or of want of memory is raised by hand where the
package would catch it, and a library that is old or missing is only said to be.
"""

import errno
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from support import fill_vectors
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from trl import GRPOConfig, ModelConfig

from peft_tinylora import AdapterBank, TinyLoraConfig, plan, versions
from peft_tinylora.adapter_files import explained
from peft_tinylora.hub import public_base, refuse_tokens
from peft_tinylora.inline import inline_adapter_of_folder
from peft_tinylora.trouble import disk_trouble_named
from peft_tinylora.vllm.settings import read_settings
from trl_recipes import arguments, ending
from trl_recipes.arguments import GRPOArguments, TinyLoraArguments, parse, refuse_lora_options
from trl_recipes.methods import refuse_unread_options
from trl_recipes.problems import check_chat, check_columns, load_rows
from trl_recipes.rewards import check_rewards, load_rewards
from trl_recipes.rollouts import make_rollouts
from trl_recipes.trainer_setup import refuse_rounding_options


EMBEDDED = Path(__file__).resolve().parents[1] / "trl_recipes" / "embedded" / "model"
FIELDS = {"u": 1, "tie": "tiled", "n_tie": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PROVOKED: list[Callable] = []


def provoked(function: Callable) -> Callable:
    PROVOKED.append(function)
    return function


def base(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=dtype)


def adapted(model: PreTrainedModel | None = None, scale: float = 0.3, **fields: object) -> PeftModel:
    model = get_peft_model(model or base(), TinyLoraConfig(**FIELDS | fields)).eval()
    fill_vectors(model, scale)
    return model


def saved(folder: Path = Path("outputs/mine"), **fields: object) -> Path:
    adapted(**fields).save_pretrained(folder)
    return folder


def edit(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- installing


@provoked
def an_old_peft() -> None:
    version = importlib.metadata.version
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.20.0" if name == "peft" else version(name))
        versions.check_libraries()


@provoked
def a_full_disk() -> None:
    with disk_trouble_named("/home/ada/outputs"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@provoked
def too_little_memory() -> None:
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_completion_length": 256}
    options = SimpleNamespace(output_dir="outputs/mine", **sizes)
    with ending.explained(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@provoked
def no_bitsandbytes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "is_bitsandbytes_available", lambda: False)
        arguments.refuse_quantization_options(ModelConfig(load_in_4bit=True))


@provoked
def stock_peft_reads_a_compact_file() -> None:
    from peft.tuners.tinylora.config import TinyLoraConfig as Stock

    Stock(weight_tying=-1.0)


# --- creating


@provoked
def tiled_without_n_tie() -> None:
    TinyLoraConfig(tie="tiled")


@provoked
def full_with_n_tie() -> None:
    TinyLoraConfig(tie="full", n_tie=4)


@provoked
def an_unknown_tie() -> None:
    TinyLoraConfig(tie="layers")


@provoked
def both_ways_of_tying() -> None:
    TinyLoraConfig(weight_tying=0.5, n_tie=16)


@provoked
def u_of_zero() -> None:
    TinyLoraConfig(u=0)


@provoked
def more_numbers_than_can_be_told_apart() -> None:
    adapted(u=8, tie="none", n_tie=None)


@provoked
def a_rank_above_the_weight() -> None:
    adapted(r=200)


@provoked
def a_module_that_is_not_linear() -> None:
    adapted(target_modules=["norm"])


@provoked
def a_pattern_that_misses_modules() -> None:
    adapted(tie={"mlp": r".*\.mlp\..*"}, n_tie=None)


@provoked
def a_plan_without_modules() -> None:
    plan(base(), 13, target_modules=["query"])


@provoked
def a_weight_with_nan() -> None:
    model = base()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = float("nan")
    adapted(model)


@provoked
def an_adapter_called_train() -> None:
    get_peft_model(base(), TinyLoraConfig(**FIELDS), adapter_name="train")


# --- recipes: data, rewards, options


@provoked
def no_config_file() -> None:
    parse((GRPOArguments, GRPOConfig, ModelConfig, TinyLoraArguments), "", ["--config", "mine.yaml"])


@provoked
def no_dataset_file() -> None:
    load_rows("problems.jsonl")


@provoked
def no_such_column() -> None:
    check_columns(load_rows(str(EMBEDDED.parent / "data/tuning.jsonl")), question_column="question")


@provoked
def chat_without_a_template() -> None:
    check_chat(GRPOArguments(chat=True), AutoTokenizer.from_pretrained(EMBEDDED).chat_template is not None)


@provoked
def a_reward_without_a_module() -> None:
    load_rewards(GRPOArguments(reward_funcs=["right"]))


@provoked
def a_reward_that_is_not_there() -> None:
    Path("my_empty_rewards.py").touch()
    load_rewards(GRPOArguments(reward_funcs=["my_empty_rewards.right"]))


@provoked
def a_reward_that_reads_a_missing_column() -> None:
    def right(completions: list, solution: list, **others: object) -> list[float]:
        return [1.0]

    check_rewards({"my_rewards.right": right}, ["prompt", "answer"], "Problem: ...")


@provoked
def lora_options_for_a_tinylora() -> None:
    refuse_lora_options(ModelConfig(lora_r=8))


@provoked
def four_bits_without_a_dtype() -> None:
    arguments.refuse_quantization_options(ModelConfig(load_in_4bit=True, dtype="auto"))


@provoked
def vllm_on_four_bits() -> None:
    arguments.refuse_quantization_options(ModelConfig(load_in_4bit=True, dtype="bfloat16"), use_vllm=True)


@provoked
def continuous_batching_in_bf16() -> None:
    refuse_rounding_options(SimpleNamespace(use_transformers_continuous_batching=True, bf16=True, fp16=False))


@provoked
def rollouts_on_four_bits() -> None:
    recipe = GRPOArguments(rollout="vllm-colocate")
    training = SimpleNamespace(use_vllm=False, world_size=1, loss_type="dapo", vllm_server_base_url=None)
    make_rollouts(recipe, training, ModelConfig(load_in_4bit=True, dtype="bfloat16"), TinyLoraArguments())


@provoked
def full_fine_tuning_of_four_bits() -> None:
    model_args = ModelConfig(load_in_4bit=True, dtype="bfloat16")
    refuse_unread_options(GRPOArguments(method="full"), SimpleNamespace(push_to_hub=False), model_args)


# --- training


@provoked
def a_second_derivative() -> None:
    model = adapted().train()
    loss = model(torch.tensor([[5, 6, 7]])).logits.square().sum()
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], create_graph=True)


# --- saving and loading


@provoked
def another_base() -> None:
    folder = saved()
    model = base()
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    PeftModel.from_pretrained(model, folder)


@provoked
def numbers_of_another_save() -> None:
    folder = saved()
    adapted(scale=0.5).save_pretrained("outputs/other")
    shutil.copy("outputs/other/adapter_model.safetensors", folder)
    PeftModel.from_pretrained(base(), folder)


@provoked
def an_edited_n_tie() -> None:
    folder = saved(tie="structured", n_tie=7)  # seven groups either way
    edit(folder, tie="tiled")
    PeftModel.from_pretrained(base(), folder)


@provoked
def an_edited_seed() -> None:
    folder = saved()
    edit(folder, projection_seed=7)
    PeftModel.from_pretrained(base(), folder)


@provoked
def a_newer_format() -> None:
    folder = saved()
    edit(folder, format_version=2, peft_tinylora_version="9.0.0")
    PeftModel.from_pretrained(base(), folder)


@provoked
def a_file_cut_short() -> None:
    weights = saved() / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    PeftModel.from_pretrained(base(), weights.parent)


@provoked
def a_pickle() -> None:
    folder = saved()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    PeftModel.from_pretrained(base(), folder)


@provoked
def a_folder_that_is_no_adapter() -> None:
    Path("outputs/mine").mkdir(parents=True)
    inline_adapter_of_folder("outputs/mine", base())


@provoked
def writing_a_pickle() -> None:
    adapted().save_pretrained("outputs/mine", safe_serialization=False)


@provoked
def a_base_that_is_not_quantized() -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, quantization_config=four_bits)
    adapted(model).save_pretrained("outputs/mine")
    PeftModel.from_pretrained(base(), "outputs/mine")


# --- merging


@provoked
def merging_into_bfloat16() -> None:
    adapted(base(torch.bfloat16), scale=0.003).merge_adapter()


# --- the Hub


@provoked
def a_base_in_a_folder() -> None:
    Path("my_base").mkdir()
    public_base(
        HfApi(), SimpleNamespace(config=SimpleNamespace(base_model_name_or_path="my_base")), Path("outputs/mine"), None
    )


@provoked
def a_token_in_a_file() -> None:
    refuse_tokens({"recipe.yaml": b"hub_token: hf_" + b"a" * 34}, None)


@provoked
def no_id_of_the_hub() -> None:
    with explained("user/my adapter"):
        HfApi().model_info("user/my adapter")


# --- many adapters


@provoked
def a_mixed_batch_in_training() -> None:
    adapted().train()(torch.tensor([[5, 6, 7]]), adapter_names=["default"])


@provoked
def too_few_names() -> None:
    adapted()(torch.tensor([[5, 6, 7], [5, 6, 7]]), adapter_names=["default"])


@provoked
def an_unknown_name() -> None:
    adapted()(torch.tensor([[5, 6, 7]]), adapter_names=["ada"])


@provoked
def a_bank_of_another_seed() -> None:
    folder = saved(projection_seed=7)
    AdapterBank(adapted()).load(folder, name="ada")


# --- serving


@provoked
def the_text_of_a_portable_adapter() -> None:
    inline_adapter_of_folder(saved(save_basis=True), base())


@provoked
def an_unknown_source() -> None:
    read_settings({"PEFT_TINYLORA_VLLM": "math=outputs/maths"})

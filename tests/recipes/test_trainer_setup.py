"""trainer_setup.py: the cast that TRL makes, undone; the adapter's folder, whole at any moment."""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from peft_tinylora import TinyLoraConfig
from trl_recipes.trainer_setup import keep_vector_in_fp32, round_vector, save_adapter, trained_numbers


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tinylora_v = torch.nn.ParameterDict({"0": torch.zeros(2), "1": torch.zeros(1)})
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)


def test_what_trl_cast_is_cast_back_and_the_base_is_not():
    model = Model()
    trainer = SimpleNamespace(model=model)
    assert keep_vector_in_fp32(trainer) == 0
    for parameter in model.parameters():  # what TRL does to a quantized base
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert keep_vector_in_fp32(trainer) == 2
    assert {p.dtype for p in model.tinylora_v.values()} == {torch.float32}
    assert model.weight.dtype == torch.bfloat16


# --- what that does in TRL's trainers, on a 4-bit base. Between 2**-6 and 2**-5 the bf16 numbers are 1.2e-4 apart, and
# an Adam step is at most the learning rate: from 0.03 on, steps of 5e-5 round to nothing.
START = 0.03
LEARNING_RATE = 5e-5


@pytest.fixture(params=["sft", "grpo"])
def make_trainer(request, tiny_model_dir, sums, tmp_path):
    """() -> a new trainer of a new adapter on a 4-bit base, as TRL builds it, that saves a checkpoint every 2 steps."""

    def make_trainer() -> SFTTrainer | GRPOTrainer:
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        common = {
            "model": AutoModelForCausalLM.from_pretrained(
                tiny_model_dir, quantization_config=quantized, device_map={"": "cpu"}, dtype=torch.float32
            ),
            "processing_class": AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left"),
            "peft_config": TinyLoraConfig(
                r=2, u=1, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        }
        options = {
            **{"output_dir": str(tmp_path), "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "seed": 0},
            **{"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8},
            **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False},
            **{"report_to": "none", "disable_tqdm": True},
        }
        if request.param == "sft":
            rows = [{"prompt": row["prompt"], "completion": f" #### {row['answer']}"} for row in sums]
            return SFTTrainer(args=SFTConfig(**options), train_dataset=Dataset.from_list(rows), **common)
        return GRPOTrainer(
            args=GRPOConfig(num_generations=4, max_completion_length=4, **options),
            reward_funcs=lambda completions, **kwargs: [float("####" in text) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in sums]),
            **common,
        )

    return make_trainer


def set_numbers(trainer: SFTTrainer | GRPOTrainer, value: float) -> torch.Tensor:
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(value)
    return trained_numbers(trainer.model)


def saved_numbers(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors, key=in_order) if "tinylora_v" in name])


def in_order(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def optimizer_state(folder: Path) -> list[torch.Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return [tensor for entry in state.values() for name, tensor in sorted(entry.items()) if name != "step"]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.recipe
def test_in_bf16_v_freezes_and_in_fp32_it_moves(make_trainer, tmp_path):
    as_trl_builds_it = make_trainer()
    assert {p.dtype for p in as_trl_builds_it.model.parameters() if p.requires_grad} == {torch.bfloat16}
    start = set_numbers(as_trl_builds_it, START)
    as_trl_builds_it.train()
    assert torch.equal(trained_numbers(as_trl_builds_it.model), start)

    trainer = make_trainer()
    assert keep_vector_in_fp32(trainer) > 0
    start = set_numbers(trainer, START)
    trainer.train()
    v = trained_numbers(trainer.model)
    moved = (v - start).abs()
    assert (moved > 0).all() and (moved <= 4 * LEARNING_RATE * 1.01).all()
    assert moved.max() > LEARNING_RATE  # more than one step's worth
    assert (v.bfloat16().float() != v).any()  # not rounded on the way
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}

    # saved as they were: numbers and Adam's two moments in fp32
    assert torch.equal(saved_numbers(tmp_path / "checkpoint-4"), v)
    last = optimizer_state(tmp_path / "checkpoint-4")
    assert len(last) == 2 * len([p for p in trainer.model.parameters() if p.requires_grad])
    assert {tensor.dtype for tensor in last} == {torch.float32}

    # resumed half-way: the same numbers and the same moments to the bit
    resumed = make_trainer()
    keep_vector_in_fp32(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(trained_numbers(resumed.model), v)
    again = optimizer_state(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(again, last, strict=True))


def test_trained_numbers_are_a_copy_in_order():
    model = Model()
    with torch.no_grad():
        model.tinylora_v["0"].copy_(torch.tensor([1.0, 2.0]))
        model.tinylora_v["1"].copy_(torch.tensor([3.0]))
    numbers = trained_numbers(model)
    assert numbers.tolist() == [1.0, 2.0, 3.0]
    numbers.zero_()
    assert model.tinylora_v["0"].tolist() == [1.0, 2.0]


class SavingTrainer:
    """As much of a Trainer as saving needs: it writes what a Trainer writes, or is interrupted before the weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, interrupted: bool = False) -> None:
        self.processing_class, self.interrupted = tokenizer, interrupted

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(exist_ok=True)
        self.processing_class.save_pretrained(folder)
        for name in ("adapter_config.json", "README.md", "training_args.bin", "adapter_model.safetensors"):
            if self.interrupted and name == "adapter_model.safetensors":
                raise KeyboardInterrupt
            (Path(folder) / name).write_text("new")

    def is_world_process_zero(self) -> bool:
        return True


@pytest.fixture
def tokenizer(tiny_model_dir) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("interrupted", [True, False])
def test_the_folder_holds_the_old_adapter_or_the_new_one(tmp_path, tokenizer, interrupted):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("old")
    trainer = SavingTrainer(tokenizer, interrupted)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            save_adapter(trainer, tmp_path, tokenizer)
    else:
        save_adapter(trainer, tmp_path, tokenizer)
        assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    text = "old" if interrupted else "new"
    assert (tmp_path / "adapter_config.json").read_text() == text
    assert (tmp_path / "adapter_model.safetensors").read_text() == text


@pytest.mark.parametrize("killed_at", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_kill_between_the_two_files_leaves_no_weights_with_a_config_that_is_not_theirs(
    tmp_path, tokenizer, monkeypatch, killed_at
):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("old")
    replace = os.replace

    def killed(source, place) -> None:
        if Path(place).name == killed_at:
            raise KeyboardInterrupt
        replace(source, place)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(SavingTrainer(tokenizer), tmp_path, tokenizer)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_tokenizer_is_saved_where_training_changed_it_and_that_of_an_earlier_run_goes(tmp_path, tokenizer):
    def saved(change) -> set[str]:
        trained = copy.deepcopy(tokenizer)
        change(trained)
        save_adapter(SavingTrainer(trained), tmp_path, tokenizer)
        return {path.name for path in tmp_path.iterdir()} - {"adapter_config.json", "adapter_model.safetensors"}

    files = {"tokenizer.json", "tokenizer_config.json"}
    assert saved(lambda t: t.add_tokens(["<think>"])) == files
    assert saved(lambda t: setattr(t, "chat_template", "{{ messages }}")) == files | {"chat_template.jinja"}
    assert saved(lambda t: setattr(t, "eos_token", "####")) == files
    assert saved(lambda t: setattr(t, "pad_token", "so")) == set()  # what it pads with is no change
    assert saved(lambda t: t(["3 + 4 ="] * 2, padding=True, truncation=True, max_length=2)) == set()


def test_v_is_rounded_in_the_model_and_in_what_is_saved(tmp_path, tiny_llama):
    model = get_peft_model(tiny_llama(), TinyLoraConfig(u=1, tie="full", target_modules=["q_proj"]))
    v = model.tinylora_v["default"]["0"]
    v.data.fill_(0.1)
    round_vector(model, "bfloat16")
    assert v.dtype == torch.float32 and v.item() == torch.tensor(0.1).bfloat16().item() != torch.tensor(0.1).item()
    model.save_pretrained(tmp_path)
    [saved] = load_file(tmp_path / "adapter_model.safetensors").values()
    assert saved.dtype == torch.bfloat16 and saved.item() == v.item()

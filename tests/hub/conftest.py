"""A Hub, an adapter as a recipe leaves it, and the machines of who trained it and of somebody else."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import loopback
from hub.machine import EMBEDDED, PROMPT, Machine
from peft import PeftModel, get_peft_model
from support import fill_vectors
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_tinylora import TinyLoraConfig
from peft_tinylora.card import Evaluation, Facts, Training, write_card
from peft_tinylora.describe import describe


CONFIG = TinyLoraConfig(
    u=1, tie="tiled", n_tie=4, target_modules="all-linear", task_type="CAUSAL_LM", basis_repo="user/basis"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the adapter and the machines are."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def adapter(folder) -> Path:
    """An adapter of the embedded model as a recipe leaves it, with a Hub dataset, and with what is not to be pushed."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    model = get_peft_model(base, CONFIG)
    fill_vectors(model, scale=0.3)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    path = folder / "trained"
    model.save_pretrained(path)
    training = Training("GRPO", ["openai/gsm8k"], "reward", {"seed": 7}, "python grpo.py", has_config_file=True)
    evaluation = Evaluation(
        dataset="openai/gsm8k",
        config="main",
        split="test",
        problems=1319,
        before={"greedy": 0.4, "sampled": 0.3},
        after={"greedy": 0.91234, "sampled": 0.6},
        score_options="--dataset openai/gsm8k",
    )
    write_card(path, describe(path), str(path), Facts(training, evaluation, PROMPT, 40))
    (path / "recipe.yaml").write_text("learning_rate: 0.03\n")
    (path / "reward_curve.csv").write_text("step,reward\n1,0.5\n")
    (path / "reward_curve.png").write_bytes(b"\x89PNG")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)  # as every Trainer does
    for name in ("training_args.bin", "checkpoint-1/optimizer.pt", ".env", "completions/a.parquet", "notes/README.md"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"private")
    return path


@pytest.fixture(scope="module")
def running(folder) -> Iterator[loopback.Hub]:
    with loopback.running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running) -> loopback.Hub:
    """A Hub that has the base model and nothing else."""
    base = {path.name: path.read_bytes() for path in EMBEDDED.iterdir() if path.is_file()}
    running.repositories = {"user/base": base}
    running.faults, running.private, running.tokens, running.forbidden_namespaces = {}, set(), set(), set()
    running.lfs_names = {"*.safetensors"}
    running.lfs_objects.clear()
    return running


@pytest.fixture(scope="module")
def trainer(running, folder) -> Iterator[Machine]:
    """The machine that the adapter was trained on."""
    yield from machine(running, folder / "trainer")


@pytest.fixture(scope="module")
def user(running, folder) -> Iterator[Machine]:
    """The machine of somebody else."""
    yield from machine(running, folder / "user")


def machine(running, home: Path) -> Iterator[Machine]:
    machine = Machine(running, home)
    yield machine
    machine.close()


@pytest.fixture(scope="module")
def other(folder) -> Path:
    """An adapter with the same config and other numbers."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(EMBEDDED), CONFIG)
    fill_vectors(model, scale=0.3, seed=1)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(folder / "other")
    return folder / "other"


@pytest.fixture(scope="module")
def here(adapter) -> tuple[str, float]:
    """What the adapter answers where it was trained, and the sum of its logits."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    def answer(model: torch.nn.Module) -> tuple[str, float]:
        text = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=40)[0], skip_special_tokens=True)
        return text.strip(), model(ids).logits.double().abs().sum().item()

    without = answer(base)
    found = answer(PeftModel.from_pretrained(base, adapter))
    assert found[0] != without[0]
    return found

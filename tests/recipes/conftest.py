"""A model that is made in seconds: two layers, twenty words, and sums that it half knows.

It is taught to add two digits. It mostly marks the answer where the sum is even and mostly doesn't where it is odd, so
that its greedy accuracy lies between 0 and 1 and the samples of one group earn different rewards: without that a
two-step run would learn nothing, and a test that compares accuracies would compare zeros.
"""

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipes.adapters import add_adapter
from recipes.fake_vllm import FakeServer, threads_left
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from peft_tinylora import TinyLoraConfig
from trl_recipes import vllm_servers


WORDS = ["<pad>", "<eos>", "<unk>", "####", "+", "=", "so", *map(str, range(19))]


def all_sums() -> list[dict]:
    """All sums of two digits: {"prompt": "3 + 4 =", "answer": "7"}."""
    return [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(10) for b in range(10)]


@pytest.fixture(scope="session")
def sums() -> list[dict]:
    """The problems of the tiny model."""
    return all_sums()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A folder with a Llama of two layers and its tokenizer, trained for a few seconds."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=64,  # and 128: 4-bit weights need rows that are multiples of 64 on a CPU
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        texts = []
        for problem in rng.choices(all_sums(), k=64):
            marked = rng.random() < (0.2 if int(problem["answer"]) % 2 else 0.7)
            texts.append(f"{problem['prompt']} {'####' if marked else 'so'} {problem['answer']} <eos>")
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def problem_files(tmp_path_factory) -> tuple[Path, Path]:
    """A JSONL file of 60 problems to train on, and one of 40 held out."""
    folder = tmp_path_factory.mktemp("problems")
    rows = all_sums()
    random.Random(0).shuffle(rows)
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for file, part in zip(files, (rows[:60], rows[60:]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


@pytest.fixture(scope="session")
def adapter(tiny_model_dir: Path, tmp_path_factory) -> Path:
    """The folder of a TinyLoRA of the tiny model."""
    config = TinyLoraConfig(task_type="CAUSAL_LM", tie="tiled", n_tie=2, target_modules="all-linear")
    return add_adapter(tiny_model_dir, config, tmp_path_factory.mktemp("adapters") / "tinylora", 1.0)


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path, adapter: Path) -> PeftModel:
    """The tiny model with that adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    """The tiny model's."""
    return AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")


@pytest.fixture
def start(monkeypatch) -> Iterator[Callable[..., FakeServer]]:
    """Starts a [`FakeServer`], which is killed after the test; the client's pauses are short."""
    pauses = {"FIRST_PAUSE_SECONDS": 0.1, "LONGEST_PAUSE_SECONDS": 0.4, "POLL_SECONDS": 0.02, "LATE_SECONDS": 0.3}
    for name, seconds in pauses.items():
        monkeypatch.setattr(vllm_servers, name, seconds)
    servers = []

    def start(*args, **kwargs) -> FakeServer:
        servers.append(FakeServer(*args, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        if not server.killed.is_set():
            server.kill()
    assert not threads_left()


@pytest.fixture
def log(caplog) -> Callable[[], list[tuple[str, str]]]:
    """What the client of vLLM's servers has logged so far: (level, message)."""
    caplog.set_level(logging.INFO, logger=vllm_servers.__name__)
    return lambda: [(r.levelname, r.getMessage()) for r in caplog.records if r.name == vllm_servers.__name__]

"""Fixtures of every test file."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import make_tiny_llama
from transformers import LlamaForCausalLM


@pytest.fixture(autouse=True)
def basis_cache_folder(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A basis cache for each test, in place of the user's."""
    folder = tmp_path_factory.mktemp("basis")
    monkeypatch.setenv("PEFT_TINYLORA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a small model; see `support.make_tiny_llama`."""
    return make_tiny_llama


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of token ids, shape (3, 10)."""
    return torch.randint(1, 48, (3, 10), generator=torch.Generator().manual_seed(1))

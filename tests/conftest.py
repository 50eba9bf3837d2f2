"""Fixtures of every test file."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import make_tiny_llama
from tally import pytest_terminal_summary  # noqa: F401
from transformers import LlamaForCausalLM

from peft_tinylora import build


def pytest_configure() -> None:
    # Each of the workers of `make test` would start as many threads as there are cores, to wait for those of the others.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def _not_the_users_cache(tmp_path_factory) -> Iterator[None]:
    """A basis cache for what fixtures of modules make, in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_TINYLORA_CACHE", str(tmp_path_factory.mktemp("basis")))
        yield


@pytest.fixture(autouse=True)
def basis_cache_folder(tmp_path_factory) -> Iterator[Path]:
    """A basis cache of its own for each test."""
    folder = tmp_path_factory.mktemp("basis")
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which other fixtures want undone first
        patch.setenv("PEFT_TINYLORA_CACHE", str(folder))
        yield folder


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


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    """A base model on disk, so that it has a name and a checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Names of the modules whose basis was computed."""
    names = []
    original = build.compute_basis
    monkeypatch.setattr(build, "compute_basis", lambda *a: names.append(a[-1]) or original(*a))
    return names

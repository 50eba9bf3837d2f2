"""A bank of adapters from the Hub, by the real client, over a loopback server."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from hub import loopback
from peft import get_peft_model
from support import fill_vectors, make_tiny_llama, warm_python

from peft_tinylora import TinyLoraConfig


USE = """
    import sys
    from peft import get_peft_model
    from support import make_tiny_llama
    from peft_tinylora import AdapterBank, TinyLoraConfig
    model = get_peft_model(make_tiny_llama(), TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear")).eval()
    bank = AdapterBank(model)
    try:
        print(bank.load_collection(sys.argv[1]))
        bank.load("user/a0", name="by id")
    except Exception as error:
        print(type(error).__name__, error)
    print(len(bank), [round(v.sum().item(), 4) for v in bank.values()])
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with three adapters over one basis, one of another base, and collections of them."""
    with loopback.running_hub() as hub:
        for name, base_seed in {"a0": 0, "a1": 0, "a2": 0, "other": 1}.items():
            folder = tmp_path_factory.mktemp(name)
            config = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear")
            model = get_peft_model(make_tiny_llama(base_seed), config)
            fill_vectors(model, seed=ord(name[-1]))
            model.save_pretrained(folder)
            files = ("adapter_config.json", "adapter_model.safetensors")
            hub.repositories[f"user/{name}"] = {file: (folder / file).read_bytes() for file in files}
        hub.collections["user/adapters-1"] = ["user/a0", "user/a1", "user/a2"]
        hub.collections["user/mixed-2"] = ["user/a0", "user/other"]
        hub.collections["user/empty-3"] = []
        yield hub


def use(hub, slug: str, home: Path) -> str:
    own = {
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_secret",
    }
    done = subprocess.run(
        [*warm_python(), "-c", textwrap.dedent(USE), slug],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
    )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout


def total(seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    return round(sum(torch.randn(1, generator=generator).item() for _ in range(7)), 4)


def test_a_collection_is_loaded_by_its_slug(hub, tmp_path) -> None:
    names, held = use(hub, "user/adapters-1", tmp_path).splitlines()
    assert names == "['user/a0', 'user/a1', 'user/a2']"
    expected = [total(ord(digit)) for digit in "0120"]
    assert held == f"4 {expected}"
    asked = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert asked == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_collection_with_another_base_adds_nothing(hub, tmp_path) -> None:
    error, held = use(hub, "user/mixed-2", tmp_path).splitlines()
    assert error.startswith(
        "BasisMismatchError user/other was trained with another basis or projection than adapter 'default' has: module"
    )
    assert held == "0 []"


def test_an_empty_collection_says_so(hub, tmp_path) -> None:
    error, _ = use(hub, "user/empty-3", tmp_path).splitlines()
    assert error == "AdapterFileError The collection user/empty-3 has no models in it."

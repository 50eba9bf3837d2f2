"""What several test files call: a small model, a way to make its adapter do something, and a process without the plugin."""

import atexit
import functools
import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import huggingface_hub
import peft
import torch
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION


# transformers 5.24 adds, switches and deletes adapters with PEFT 0.22 only, which was not released when it was; it loads them
# with an older one.
TRANSFORMERS_REFUSES_PEFT = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
IS_TORCH_2_6 = Version(torch.__version__).release[:2] == (2, 6)
IS_HUB_1 = Version(huggingface_hub.__version__).major == 1
HTTPX = importlib.import_module("httpx" if IS_HUB_1 else "httpx2")  # huggingface_hub's own client


def make_tiny_llama(seed: int = 0, **fields: object) -> LlamaForCausalLM:
    """The same random 4-layer Llama (28 linear modules) at each call, unless `seed` or config fields say otherwise."""
    settings = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    config = LlamaConfig(**{**settings, **fields})
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    # Trained weights are not close to the Gaussian start, where the leading singular values nearly coincide.
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim == 2):
            weight.mul_(2.0)
    return model


TESTS = Path(__file__).parent
IMPORT_PATH = os.pathsep.join((str(TESTS.parent), str(TESTS)))


@functools.cache
def warm_python() -> tuple[str, ...]:
    """What to write in place of `python` in a command, to have it in milliseconds rather than some ten seconds.

    The command runs in a fork of an interpreter that has imported torch and the like, and nothing of this project; see
    hub/warm.py. That one starts at the first use in a test process, and ends with it.
    """
    folder = tempfile.mkdtemp(prefix="warm-")
    warm, address = str(TESTS / "hub" / "warm.py"), f"{folder}/socket"
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", warm, "serve", address],
        env={**os.environ, "PYTHONPATH": IMPORT_PATH, "HF_HOME": folder},
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    assert server.stdout.readline() == "ready\n"
    return sys.executable, "-IS", warm, "run", address, "python"


def run_python_process(script: str, *arguments: object) -> str:
    """Run a script in a process that has not imported the plugin, with this folder on its path: what it printed."""
    done = subprocess.run(
        [*warm_python(), "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": IMPORT_PATH},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def fill_vectors(model: torch.nn.Module, scale: float = 1.0, seed: int = 7, adapter_name: str = "default") -> None:
    """Set v of an adapter to known random numbers, so that the adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in model.tinylora_v[adapter_name].values():
            v.copy_(scale * torch.randn(v.shape, generator=generator))

"""Real servers of the embedded model. The tests are skipped where vLLM is not installed; `make test-vllm` has it."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hub import loopback
from hub.machine import Machine
from recipes.runs import ROOT

from benchmarks.vllm_server import EMBEDDED, Server


ADAPTER = ROOT / "model_cards/embedded_grpo"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip("vLLM is not installed here: make test-vllm"))


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Iterator[Callable[..., Server]]:
    """Starts servers, which end with the tests."""
    folder = tmp_path_factory.mktemp("servers")
    started = []

    def start_server(*options: str, model: Path = EMBEDDED, port: int | None = None, **environment: str) -> Server:
        started.append(Server(model, folder / f"{len(started)}.log", *options, port=port, **environment))
        return started[-1]

    yield start_server
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def lora(tmp_path_factory) -> Path:
    """The adapter as a plain LoRA, exported as a user does."""
    from transformers import AutoModelForCausalLM

    from peft_tinylora import export_adapter

    folder = tmp_path_factory.mktemp("exported") / "lora"
    export_adapter(ADAPTER, folder, "lora", AutoModelForCausalLM.from_pretrained(EMBEDDED))
    return folder


@pytest.fixture(scope="session")
def server(start, lora, tmp_path_factory) -> Iterator[Server]:
    """A server that serves adapters in the request, one of a folder, one of the Hub, and the exported LoRA."""
    home = tmp_path_factory.mktemp("home")
    template = home / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    with loopback.running_hub() as hub:
        machine = Machine(hub, home)
        done = machine.command("push", ADAPTER, "user/adapter", "--base", "user/base")
        machine.close()
        assert done.status == 0, done.stderr
        yield start(
            *("--lora-modules", f"exported={lora}", "--chat-template", str(template)),
            PEFT_TINYLORA_VLLM=f"inline, user/adapter, folder={ADAPTER}",
            HF_ENDPOINT=hub.url,
            HF_TOKEN="hf_secret",
            HF_HOME=str(home),
            HF_HUB_OFFLINE="0",
        ).wait()

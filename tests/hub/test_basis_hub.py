"""Basis files pushed to a Hub and fetched from it, by the real client, over a loopback server."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest
from hub import loopback
from support import make_tiny_llama, warm_python


# A machine: a folder with caches of its own.
SETUP = """
    import sys, logging, torch
    logging.basicConfig(format="%(message)s")
    from peft import PeftModel, get_peft_model
    from transformers import LlamaForCausalLM
    import peft_tinylora
    from peft_tinylora import TinyLoraConfig, build
    computed = []
    original = build.compute_basis
    build.compute_basis = lambda *a: computed.append(a[-1]) or original(*a)
    base, adapter = sys.argv[1:3]
"""
TRAIN = """
    config = TinyLoraConfig(u=1, tie="tiled", n_tie=4, target_modules="all-linear", basis_repo="user/basis")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for index, v in enumerate(model.tinylora_v["default"].values()):
        v.data.fill_(index / 10)
    model.save_pretrained(adapter)
"""
USE = """
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    print("computed", len(computed))
    print("logits", model(torch.arange(1, 9)[None]).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the base, the adapter and the machines are."""
    folder = tmp_path_factory.mktemp("hub")
    make_tiny_llama().save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    """A Hub with the basis of the base, pushed from the machine that trained the adapter."""
    with loopback.running_hub() as hub:
        script(hub, folder, "trainer", TRAIN)
        pushed = cli(hub, folder, "trainer", "basis", "push", str(folder / "base"), "user/basis")
        assert pushed.returncode == 0, pushed.stderr
        [(name, data)] = hub.repositories["user/basis"].items()
        assert name.startswith("r2-float-") and f"pushed {name}" in pushed.stdout
        assert "hf_secret" not in pushed.stdout + pushed.stderr and b"hf_secret" not in data
        assert str(folder).encode() not in data  # where the base is on that machine
        yield hub


def run(hub, folder: Path, machine: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command on a machine of some name: a process with caches of its own."""
    own = {
        "HF_HOME": str(folder / machine),
        "PEFT_TINYLORA_CACHE": str(folder / machine / "basis"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [*warm_python(), *command],
        capture_output=True,
        text=True,
        env={**os.environ, **own, **environment},
    )


def script(hub, folder: Path, machine: str, code: str, **environment: str) -> subprocess.CompletedProcess:
    code = textwrap.dedent(SETUP) + textwrap.dedent(code)
    done = run(hub, folder, machine, "-c", code, str(folder / "base"), str(folder / "adapter"), **environment)
    assert done.returncode == 0, done.stderr
    return done


def cli(hub, folder: Path, machine: str, *arguments: str) -> subprocess.CompletedProcess:
    return run(hub, folder, machine, "-m", "peft_tinylora.cli", *arguments)


def test_who_downloads_an_adapter_computes_nothing(hub, folder) -> None:
    first = script(hub, folder, "user", USE)
    assert "computed 0" in first.stdout
    fetches = [request for request in hub.requests if "/resolve/" in request]
    again = script(hub, folder, "user", USE)
    assert again.stdout == first.stdout
    assert [request for request in hub.requests if "/resolve/" in request] == fetches  # from the local cache
    assert script(hub, folder, "another", USE, PEFT_TINYLORA_CACHE="off").stdout == first.stdout
    pulled = cli(hub, folder, "third", "basis", "pull", str(folder / "base"), "user/basis")
    assert pulled.returncode == 0 and "28 modules verified" in pulled.stdout


SAID = {
    "one byte": "is damaged and is not used",
    "of other weights": "28 of 28 modules have other weights than the kept basis",
    "no such file": "no basis r2-float-",
    "no such repository": "no basis r2-float-",
}


@pytest.mark.parametrize("damage", SAID)
def test_a_basis_that_cannot_be_used_is_computed(hub, folder, monkeypatch, damage: str) -> None:
    [(name, data)] = hub.repositories["user/basis"].items()
    repositories = {"user/basis": {name: data}}
    if damage == "one byte":
        repositories["user/basis"][name] = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    elif damage == "of other weights":
        make_tiny_llama(seed=1).save_pretrained(folder / "other")
        assert cli(hub, folder, "trainer", "basis", "push", str(folder / "other"), "user/other").returncode == 0
        repositories["user/basis"] = hub.repositories.pop("user/other")
    elif damage == "no such file":
        repositories["user/basis"].clear()
    else:
        repositories.clear()
    monkeypatch.setattr(hub, "repositories", repositories)
    pulled = cli(hub, folder, "puller", "basis", "pull", str(folder / "base"), "user/basis")
    assert pulled.returncode == 1
    assert "has no basis of 28 of 28 modules" in pulled.stderr.strip().splitlines()[-1]
    assert not list((folder / "puller" / "basis").glob("*/*"))
    done = script(hub, folder, damage.replace(" ", "_"), USE)
    assert done.stdout.splitlines()[0] == "computed 28"
    assert SAID[damage] in done.stderr
    expected = script(hub, folder, "trainer", USE).stdout
    assert float(done.stdout.split()[-1]) == pytest.approx(float(expected.split()[-1]), abs=1e-4)


def test_a_hub_that_refuses_is_named_in_one_line_and_nothing_is_half_pushed(hub, folder) -> None:
    base = str(folder / "base")
    for faults, status in (({"/api/repos/create": [401]}, "401"), ({"/commit/": [500]}, "500")):
        hub.faults = faults
        refused = cli(hub, folder, "trainer", "basis", "push", base, "user/second")
        assert refused.returncode == 1 and refused.stderr.strip().splitlines()[-1].startswith("error: ")
        assert status in refused.stderr and "hf_secret" not in refused.stderr
        assert not hub.repositories.get("user/second")
    assert cli(hub, folder, "trainer", "basis", "push", base, "user/second").returncode == 0
    assert hub.repositories["user/second"] == hub.repositories["user/basis"]


def test_offline_the_basis_is_computed(hub, folder) -> None:
    done = script(hub, folder, "offline", USE, HF_HUB_OFFLINE="1")
    assert "computed 28" in done.stdout
    assert "it is computed" in done.stderr

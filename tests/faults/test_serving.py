"""What serves adapters, when servers, clients and files break off: no answer is lost or another's, no file is half believed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.injecting import Points
from peft import get_peft_model
from recipes.conftest import start  # noqa: F401
from recipes.fake_vllm import MODEL, expected, make_prompts, threads_left
from recipes.killed_runs import exit_status, fork
from support import fill_vectors, make_tiny_llama

from peft_tinylora import AdapterBank, TinyLoraConfig, TinyLoraError, served, trouble
from peft_tinylora.inline import inline_adapter
from peft_tinylora.served import FOLDER, ServedBase
from trl_recipes.vllm_servers import VllmServers


CONFIG = TinyLoraConfig(r=2, u=1, tie="tiled", n_tie=4, target_modules="all-linear")


def half(answer: dict) -> bytes:
    """The first half of an answer, as of a server that is killed while it writes."""
    data = json.dumps(answer).encode()
    return data[: len(data) // 2]


def fewer(answer: dict) -> dict:
    """An answer that lacks a completion."""
    return answer | {"choices": answer["choices"][:-1]}


def aborted(answer: dict) -> dict:
    """What a server sends that is stopped: what it has so far."""
    return answer | {"choices": [choice | {"finish_reason": "abort"} for choice in answer["choices"]]}


DELAY = 0.4  # seconds; no fault
FAULTS = [(500, "Broken."), (503, "Starting."), (429, "Busy."), half, fewer, aborted, DELAY]


def served_amid_faults(start: Callable, points: Points, batches: int) -> int:  # noqa: F811
    """Batches of prompts to three servers that fail now and then, one of which dies; how many faults came."""
    survived = 0
    for _ in range(batches):
        laid = [[points.choice([None, points.choice(FAULTS)]) for _ in range(8)] for _ in range(3)]
        dies = points.randint(0, 7)
        laid[0][dies:] = ["kill"]
        servers = [start(delay=0.005, faults=list(faults)) for faults in laid]
        client = VllmServers([server.url for server in servers], slots=2, patience=20)
        for _ in range(2):
            prompts = make_prompts(20, n=2)
            assert client.generate(MODEL, prompts, max_tokens=8) == expected(prompts), laid
        for server, faults in zip(servers, laid, strict=True):
            survived += sum(fault not in (None, DELAY) for fault in faults[: len(faults) - len(server.faults)])
    assert threads_left() == []
    return survived


def test_no_answer_is_lost_and_none_is_anothers(start, points: Points, record_property) -> None:  # noqa: F811
    record_property("faults survived", served_amid_faults(start, points, 2))


@pytest.mark.slow
def test_no_answer_is_lost_and_none_is_anothers_many_times(start, points: Points, record_property) -> None:  # noqa: F811
    record_property("faults survived", served_amid_faults(start, points, 20))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder of two adapters of one base."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("ada", "bob")):
        model = get_peft_model(make_tiny_llama(), CONFIG)
        fill_vectors(model, 0.5, seed=seed)
        model.save_pretrained(root / name)
    return root


def cut_files(adapters: Path, root: Path, points: Points, times: int) -> int:
    """A bank and a model refuse an adapter of which a file is half there, in a line that names it, and keep what they had."""
    model = get_peft_model(make_tiny_llama(), CONFIG)
    bank = AdapterBank(model)
    bank.load(adapters / "ada", name="kept")
    for turn in range(times):
        folder = root / str(turn)
        shutil.copytree(adapters, folder)
        file = folder / "bob" / points.choice(("adapter_config.json", "adapter_model.safetensors"))
        size = points.randrange(file.stat().st_size)
        os.truncate(file, size)
        for load in (bank.load_folder, lambda folder: bank.load(folder / "bob")):
            with pytest.raises(TinyLoraError) as refused:
                load(folder)
            assert "\n" not in str(refused.value) and "bob" in str(refused.value), (file.name, size)
            assert list(bank) == ["kept"], (file.name, size)
        shutil.rmtree(folder)
    bank.load_folder(adapters)
    assert torch.equal(bank["ada"], bank["kept"]) and not torch.equal(bank["bob"], bank["kept"])
    return times


def test_of_files_that_are_half_there_nothing_is_loaded(adapters, tmp_path, points: Points, record_property) -> None:
    record_property("files tried", cut_files(adapters, tmp_path, points, 10))


@pytest.mark.slow
def test_of_many_files_that_are_half_there_nothing_is_loaded(adapters, tmp_path, points, record_property) -> None:
    record_property("files tried", cut_files(adapters, tmp_path, points, 100))


def test_what_a_killed_server_left_in_memory_is_swept_away_by_the_next(tmp_path, monkeypatch, record_property) -> None:
    monkeypatch.setattr(served, "folder_in_memory", lambda free_bytes: tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    base = make_tiny_llama(num_hidden_layers=1)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapter = inline_adapter(get_peft_model(base, CONFIG))
    serving = ServedBase(str(tmp_path / "base"), 2)

    def killed() -> None:
        torch.set_num_threads(1)
        with serving.lora_folder(adapter):
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(3):
        assert exit_status(fork(killed)) == -signal.SIGKILL
    left = list((tmp_path / "memory").glob(f"{FOLDER}*"))
    assert len(left) == 3
    with serving.lora_folder(adapter) as folder:
        assert all(path.exists() for path in left)  # another server may be reading them
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for path in left:
        for inside in (*path.iterdir(), path):
            os.utime(inside, (0, time.time() - 2 * trouble.STALE_SECONDS))
    with serving.lora_folder(adapter) as folder:
        assert list((tmp_path / "memory").iterdir()) == [folder]
    record_property("faults survived", 3)

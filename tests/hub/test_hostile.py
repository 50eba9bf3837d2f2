"""Adapters that mean harm, by every way that somebody loads one: nothing happens but an error that says what is wrong.

Repositories are served by a loopback Hub. All of them are tried in two processes, each of which watches what it opens and
how much memory it takes; folders on this machine are tried in this one.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import loopback
from hub.hostile import (
    ALL,
    AUTO,
    AUTO_PEFT,
    BANK,
    CASES,
    CONFIG,
    EXPORT,
    INSPECT,
    PEFT,
    PULL,
    SECOND,
    TILED,
    TRANSFORMERS,
    WEIGHTS,
    Files,
    Payload,
)
from hub.machine import environment
from peft import PeftModel, get_peft_model
from support import fill_vectors, make_tiny_llama

from peft_tinylora import AdapterBank, TinyLoraConfig, untrusted
from peft_tinylora.errors import TinyLoraError


PROCESSES = ((PEFT, SECOND, TRANSFORMERS, BANK), (AUTO_PEFT, AUTO, INSPECT, PULL, EXPORT))

MOST_SECONDS = 10
MOST_BYTES = 1_500_000_000  # PyTorch and transformers take 0.6 GB


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the base, the adapters, the machines, the marker and what must not be opened are."""
    folder = tmp_path_factory.mktemp("hostile")
    make_tiny_llama().save_pretrained(folder / "base")
    shutil.copytree(folder / "base", folder / "secret")
    (folder / "evil_module.py").write_text(f"import pathlib; pathlib.Path({str(folder / 'marker')!r}).touch()\n")
    model = get_peft_model(make_tiny_llama(), TinyLoraConfig(**TILED))
    fill_vectors(model, 0.5)
    model.peft_config["default"].base_model_name_or_path = "user/base"
    model.save_pretrained(folder / "sound")
    return folder


def files_of(case: str, folder: Path) -> Files:
    """The files of a case, by name."""
    files = {name: (folder / "sound" / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    CASES[case].make(files, folder)
    return files


# Loads each repository by each way, and says of each what came of it: a line of JSON.
DRIVER = """
import contextlib, io, json, os, re, shutil, sys, time, warnings
from pathlib import Path
folder, home, work = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, str(folder))  # where evil_module is
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from support import make_tiny_llama
from peft_tinylora import AdapterBank, cli, untrusted
from peft_tinylora.errors import TinyLoraError
untrusted.MOST_PATTERN_SECONDS = 0.7

opened, watched = [], [False]
def watch(event, arguments):
    if event == "open" and watched[0] and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        own = path.startswith((str(home), "/dev/null")) or "__pycache__" in path
        if path.startswith(str(folder / "secret")) or (writes and not own):
            opened.append(path)
sys.addaudithook(watch)

def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([*arguments])
    if status:
        raise SystemExit(err.getvalue().strip().splitlines()[-1])
    assert "\\x1b" not in out.getvalue() and "\\x07" not in out.getvalue()

def prepare(way, source):
    base, target = make_tiny_llama(), home / "target"
    if way == "PeftModel.from_pretrained":
        return base, lambda: PeftModel.from_pretrained(base, source)
    if way in ("PeftModel.load_adapter", "AdapterBank.load"):
        model = PeftModel.from_pretrained(base, folder / "sound")
        bank = AdapterBank(model)
        return base, (lambda: bank.load(source)) if "Bank" in way else lambda: model.load_adapter(source, "second")
    if way == "load_adapter of transformers":
        return base, lambda: base.load_adapter(source)
    if way == "AutoPeftModelForCausalLM":
        return base, lambda: AutoPeftModelForCausalLM.from_pretrained(source)
    if way == "AutoModelForCausalLM":
        return base, lambda: AutoModelForCausalLM.from_pretrained(source)
    arguments = {
        "inspect": (source,),
        "pull": (source, str(target)),
        "export": (source, str(target), "--to", "portable", "--base", "user/base"),
    }
    return base, lambda: command(way, *arguments[way])

def most_bytes():
    # Not getrusage's, which in a new process begins with what the one took that started it.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def state(model):
    types = [(name, type(module).__name__) for name, module in model.named_modules()]
    return types, {name: value.clone() for name, value in model.state_dict().items()}

warnings.simplefilter("ignore")
for way, case, source in work:
    shutil.rmtree(home / "target", ignore_errors=True)
    base, load = prepare(way, source)
    types, values = state(base)
    kind, message, start = None, "", time.monotonic()
    watched[0] = True
    try:
        load()
    except BaseException as error:
        kind = "ours" if isinstance(error, (TinyLoraError, SystemExit)) else type(error).__name__
        message = str(error)
    watched[0] = False
    seconds = time.monotonic() - start
    types_now, values_now = state(base)
    same = types_now == types and values_now.keys() == values.keys()
    same = same and all(torch.equal(value, values_now[name]) for name, value in values.items())
    report = {
        "way": way, "case": case, "kind": kind, "message": message[:3000], "length": len(message), "seconds": seconds,
        "is_same": same, "has_marker": (folder / "marker").exists(), "opened": opened[:],
        "target": sorted(str(path.relative_to(home)) for path in home.glob("*target*/**/*") if path.is_file()),
        "bytes": most_bytes(),
    }
    opened.clear()
    print(json.dumps(report), flush=True)
"""


@pytest.fixture(scope="module")
def reports(folder) -> Iterator[dict[tuple[str, str], dict]]:
    """Way and case -> what came of it, of all repositories on a Hub."""
    with loopback.running_hub() as hub:
        base = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
        hub.repositories["user/base"] = base
        for index, case in enumerate(CASES):
            hub.repositories[f"user/evil-{index}"] = files_of(case, folder)
        running = []
        for number, ways in enumerate(PROCESSES):
            work = [
                (way, name, f"user/evil-{index}")
                for index, (name, case) in enumerate(CASES.items())
                for way in ways
                if way in case.ways
            ]
            home = folder / f"machine-{number}"
            home.mkdir()
            command = [sys.executable, "-c", DRIVER, str(folder), str(home), json.dumps(work)]
            running.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=home,
                    env=environment(hub, home, PYTHONDONTWRITEBYTECODE="1"),
                )
            )
        found = {}
        try:
            for process in running:
                out, err = process.communicate(timeout=200)
                assert process.returncode == 0, err[-3000:]
                for report in map(json.loads, out.splitlines()):
                    found[report["way"], report["case"]] = report
        finally:
            for process in running:
                process.kill()  # one that hangs
        yield found


def test_the_payload_leaves_its_mark_where_it_is_unpickled(tmp_path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


PAIRS = [
    pytest.param(way, name, id=f"{name}-{way}") for name, case in CASES.items() for way in ALL if way in case.ways
]


@pytest.mark.parametrize(("way", "case"), PAIRS)
def test_a_hostile_repository_does_nothing_but_fail_with_a_reason(
    reports, way: str, case: str, record_property
) -> None:
    report, expected = reports[way, case], CASES[case]
    if expected.message is None:
        assert report["kind"] is None, report["message"]
    elif way in expected.theirs:
        assert report["kind"] not in (None, "KeyboardInterrupt", "MemoryError")
    else:
        assert report["kind"] == "ours", report
        assert re.search(expected.message, report["message"], re.DOTALL), report["message"]
        assert report["length"] < 1000
    assert not report["has_marker"], "code of the repository ran"
    assert report["opened"] == [], "a path was opened that only the repository names, or written to"
    assert report["seconds"] < MOST_SECONDS
    assert report["bytes"] < MOST_BYTES
    if expected.message is not None:
        assert report["target"] == [], "the target folder was half written"
        assert report["is_same"], "the base model is not as before"
    elif way == PULL:
        assert {CONFIG, WEIGHTS} >= {Path(name).name for name in report["target"]} and len(report["target"]) == 2
    record_property("files tried", 1)


LOCAL: dict[str, Callable[[Path, torch.nn.Module], Any]] = {
    PEFT: lambda path, base: PeftModel.from_pretrained(base, path),
    TRANSFORMERS: lambda path, base: base.load_adapter(str(path)),
    BANK: lambda path, base: AdapterBank(PeftModel.from_pretrained(base, path.parent / "sound")).load(path),
}


@pytest.mark.parametrize("way", LOCAL)
def test_a_hostile_folder_does_nothing_but_fail(folder, monkeypatch, way: str, record_property) -> None:
    monkeypatch.setattr(untrusted, "MOST_PATTERN_SECONDS", 0.7)
    wrong, tried = [], 0
    for name, case in CASES.items():
        if way not in case.ways or case.message is None or way in case.theirs:
            continue
        path = folder / "evil"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for file, data in files_of(name, folder).items():
            (path / file).write_bytes(data)
        tried += 1
        base = make_tiny_llama()
        before = {key: value.clone() for key, value in base.state_dict().items()}
        start = time.monotonic()
        with pytest.raises(TinyLoraError, match=f"(?s){case.message}"):
            LOCAL[way](path, base)
        if time.monotonic() - start > MOST_SECONDS:
            wrong.append(f"{name}: too slow")
        if way != BANK and (base.state_dict().keys() != before.keys() or hasattr(base, "peft_config")):
            wrong.append(f"{name}: the base is another one")
        if way != BANK and not all(torch.equal(value, base.state_dict()[key]) for key, value in before.items()):
            wrong.append(f"{name}: the base has other weights")
    assert not wrong
    assert not (folder / "marker").exists()
    record_property("files tried", tried)

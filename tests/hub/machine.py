"""Machines of users: processes that talk to a loopback Hub, each with caches of its own, and live for many commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "trl_recipes" / "embedded" / "model"
PROMPT = "Problem: Ben has 28 euros saved. He spends 7. How many euros are left?\nSolution:"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
REPORT = {"README.md", "recipe.yaml", "reward_curve.csv", "reward_curve.png"}
RESULTS = {".eval_results/peft_tinylora_openai--gsm8k--main--test.yaml"}
WORKER = """
import contextlib, io, json, sys, time, traceback
waits, sleep, space = [], time.sleep, {}
def short_sleep(seconds):
    waits.append(seconds)
    sleep(min(seconds, 0.01))
time.sleep = short_sleep
from peft_tinylora import cli
for line in sys.stdin:
    waits.clear()
    job, status = json.loads(line), 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(job) if isinstance(job, list) else exec(job, space) or 0
        except SystemExit as stop:
            status = stop.code
        except Exception:
            status = 1
            traceback.print_exc()
    print(json.dumps([status, out.getvalue(), err.getvalue(), waits]), file=sys.__stdout__, flush=True)
"""


class Done(tuple):
    """What a job left: status, stdout, stderr, and the seconds that were waited, though not really."""

    status = property(lambda self: self[0])
    stdout = property(lambda self: self[1])
    stderr = property(lambda self: self[2])
    waits = property(lambda self: self[3])


def environment(hub: Any, home: Path, **more: str) -> dict[str, str]:
    """The environment of a process that has a folder for its caches and a Hub."""
    own = {
        "HF_HOME": str(home),
        "PEFT_TINYLORA_CACHE": str(home / "basis"),
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    }
    return os.environ | own | more


class Machine:
    """A process that runs `peft-tinylora` commands and scripts, one after the other."""

    def __init__(self, hub: Any, home: Path, **more: str) -> None:
        home.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(hub, home, **more),
            cwd=home,
        )

    def start(self, job: list | str) -> None:
        """Begin a job without waiting for it."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Done:
        """Wait for the job."""
        return Done(json.loads(self.process.stdout.readline()))

    def command(self, *arguments: Any) -> Done:
        """Run `peft-tinylora ARGUMENTS`."""
        self.start([str(argument) for argument in arguments])
        return self.finish()

    def script(self, code: str) -> str:
        """Run Python, which finds what earlier scripts left, and return what it printed."""
        self.start(code)
        done = self.finish()
        assert done.status == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(adapter: Path, folder: Path) -> Path:
    return Path(shutil.copytree(adapter, folder / "copy"))


def pushed(hub: Any, trainer: Machine, adapter: Path, *options: str) -> None:
    done = trainer.command("push", adapter, "user/x", *options)
    assert done.status == 0, done.stderr


def refused(done: Done, *parts: str) -> None:
    """A command that failed with one line that says all these, without the token."""
    assert done.status == 1, done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line
    assert "hf_secret" not in done.stdout + done.stderr

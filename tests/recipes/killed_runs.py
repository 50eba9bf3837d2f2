"""Runs recipes, and kills them where it is told to: `python killed_runs.py JOBS.json`, a process for a test to start.

It imports the recipes once and forks for each job, in order: {"recipe": "grpo" or "sft", "options": [...], "log": file,
"kill": [place, n] or null}. A place is a kind of moment, counted from 1 over the job: the n-th time that it comes the job
kills itself (SIGKILL, which nothing can catch). The last line of stdout is JSON: for each job its exit status, and how often
each place came.

- "file": before a file or folder in the run's folder is opened for writing, made, renamed or removed
- "half": when half of a file of tensors was written
- "generate", "backward": in the middle of completions, and of a step
- "optimizer": after v has changed, before anybody knows
"""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from transformers import GenerationMixin

from trl_recipes import grpo, sft


WRITES = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0}  # audit event -> which argument


class Killer:
    """Counts places, and kills this process at one of them."""

    def __init__(self, folder: Path, kill: tuple[str, int] | None) -> None:
        self.folder, self.kill, self.counts = str(folder), kill, Counter()

    def reach(self, place: str) -> bool:
        """Counts, and says whether it is time."""
        self.counts[place] += 1
        return self.kill is not None and tuple(self.kill) == (place, self.counts[place])

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        if event not in WRITES or not isinstance(arguments[WRITES[event]], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if str(arguments[WRITES[event]]).startswith(self.folder) and self.reach("file"):
            self.die()

    def before(self, owner: object, name: str, place: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if self.reach(place):
                self.die()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def after(self, owner: object, name: str, place: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            result = original(*args, **kwargs)
            if self.reach(place):
                self.die()
            return result

        setattr(owner, name, wrapped)

    def half(self, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(content, file, *args, **kwargs):
            result = original(content, file, *args, **kwargs)
            if self.reach("half"):
                os.truncate(file, os.path.getsize(file) // 2)
                self.die()
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        self.half(torch, "save")
        self.half(safetensors.torch, "save_file")
        self.before(GenerationMixin, "_sample", "generate")
        self.before(torch.Tensor, "backward", "backward")
        self.after(torch.optim.AdamW, "step", "optimizer")
        sys.addaudithook(self.audit)


def in_child(log: Path, work: Callable[[], None]) -> int:
    """Does the work in a fork of this process and returns its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(job: dict) -> tuple[int, dict[str, int]]:
    """Runs one job in a child; its exit status and counts."""
    folder = Path(job["options"][job["options"].index("--output_dir") + 1])
    counts = Path(job["log"]).with_suffix(".counts")

    def work() -> None:
        killer = Killer(folder, job["kill"])
        killer.install()
        sys.argv = [f"trl_recipes/{job['recipe']}.py", *job["options"]]
        {"grpo": grpo, "sft": sft}[job["recipe"]].main()
        counts.write_text(json.dumps(killer.counts))

    counts.unlink(missing_ok=True)
    status = in_child(Path(job["log"]), work)
    return status, json.loads(counts.read_text()) if counts.exists() else {}


if __name__ == "__main__":
    print(json.dumps([run(job) for job in json.loads(Path(sys.argv[1]).read_text())]))

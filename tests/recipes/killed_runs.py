"""Runs recipes, and kills them where it is told to: `python killed_runs.py JOBS.json`, a process for a test to start.

It imports the recipes once and forks for each job, in order: {"recipe": "grpo" or "sft", "options": [...], "processes": 1,
"log": file, "kill": [place, when] or null}. The job kills itself (SIGKILL, which nothing can catch) when a place comes for
the n-th time, or at that share of what the first job of the recipe, which nothing kills, counted:

- "file": before a file or folder in the run's folder is opened for writing, made, renamed or removed
- "rename": of these, before a rename
- "half": when half of a file of tensors is written
- "generate", "backward": before completions, and before gradients
- "optimizer": after v has changed, before anybody knows

The last line of stdout is JSON, for each job {"status": exit status or minus the signal, "counts": {place: number},
"torn": what in the folder's checkpoints is not whole}.
"""

import json
import os
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import peft.peft_model
import safetensors.torch
import torch
from recipes.forks import exit_status, fork
from support import free_port
from transformers import GenerationMixin

from trl_recipes import grpo, sft


WRITES = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0}  # audit event -> argument: the path


class Killer:
    """Counts places, and kills this process at one of them."""

    def __init__(self, folder: Path, kill: tuple[str, int] | None) -> None:
        self.folder, self.kill, self.counts = str(folder), kill and tuple(kill), Counter()

    def reach(self, place: str, first: Callable[[], None] = lambda: None) -> None:
        """Counts, and if it is time does what comes first and kills."""
        self.counts[place] += 1
        if self.kill == (place, self.counts[place]):
            first()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        if event not in WRITES or not isinstance(arguments[WRITES[event]], (str, os.PathLike)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        is_in_open_folder = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # as shutil.rmtree goes about
        if is_in_open_folder or str(arguments[WRITES[event]]).startswith(self.folder):
            self.reach("file")
            if event == "os.rename":
                self.reach("rename")

    def wrap(self, owner: object, name: str, place: str, when: str) -> None:
        """Makes a function a place, "before" or "after" it."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if when == "before":
                self.reach(place)
            result = original(*args, **kwargs)
            if when == "half":
                file = args[1]
                self.reach(place, lambda: os.truncate(file, os.path.getsize(file) // 2))
            elif when == "after":
                self.reach(place)
            return result

        setattr(owner, name, wrapped)

    def install(self) -> None:
        self.wrap(torch, "save", "half", "half")
        self.wrap(peft.peft_model, "safe_save_file", "half", "half")  # the name that it has there
        self.wrap(GenerationMixin, "_sample", "generate", "before")
        self.wrap(torch.Tensor, "backward", "backward", "before")
        self.wrap(torch.optim.AdamW, "step", "optimizer", "after")
        sys.addaudithook(self.audit)


def torn_in(folder: Path) -> list[str]:
    """What in the checkpoints of a folder is not whole, read without the code that is tested."""
    torn = []
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / "trainer_state.json").exists() or not (checkpoint / "optimizer.pt").exists():
            torn.append(f"{checkpoint.name} lacks files")
        for file in checkpoint.iterdir():
            try:
                if file.suffix == ".json":
                    json.loads(file.read_text())
                elif file.suffix == ".safetensors":
                    safetensors.torch.load_file(file)
                elif file.suffix in (".pt", ".pth", ".bin"):
                    with zipfile.ZipFile(file) as archive:
                        assert archive.testzip() is None
            except Exception as error:
                torn.append(f"{file.relative_to(folder)}: {error!r}")
    return torn


def run(job: dict, whole: dict[str, int]) -> dict:
    """Runs one job: see above."""
    folder = Path(job["options"][job["options"].index("--output_dir") + 1])
    log, kill = Path(job["log"]), job["kill"]
    if kill is not None and isinstance(kill[1], float):
        kill = [kill[0], 1 + int(kill[1] * whole[kill[0]])]
    counts = log.with_suffix(".counts")
    counts.unlink(missing_ok=True)
    processes = job.get("processes", 1)
    port = free_port()

    def work(rank: int) -> None:
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        killer = Killer(folder, kill if rank == 0 else None)
        killer.install()
        sys.argv = [f"trl_recipes/{job['recipe']}.py", *job["options"]]
        {"grpo": grpo, "sft": sft}[job["recipe"]].main()
        if rank == 0:
            counts.write_text(json.dumps(killer.counts))

    pids = [fork(lambda rank=rank: work(rank), log if rank == 0 else Path(os.devnull)) for rank in range(processes)]
    status = exit_status(pids[0])
    for pid in pids[1:]:  # as a launcher does when one is gone
        if status:
            os.kill(pid, signal.SIGKILL)
        exit_status(pid)
    return {
        "status": status,
        "counts": json.loads(counts.read_text()) if counts.exists() else {},
        "torn": torn_in(folder),
    }


def main() -> None:
    whole: dict[str, dict[str, int]] = {}
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        results.append(run(job, whole.get(job["recipe"], {})))
        whole.setdefault(job["recipe"], results[-1]["counts"])
    print(json.dumps(results))


if __name__ == "__main__":
    main()

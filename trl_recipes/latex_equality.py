"""Two answers in LaTeX -> whether math_verify takes them for equal; from any thread, never for longer than some seconds.

math_verify reads what a model wrote with a parser and an algebra system, of which a few characters (`9^{9^{9^9}}`) ask for
all memory and all time. So it runs in a process of its own, latex_worker.py, which is started with the first pair that
needs it, ends with this one, and is replaced when a pair has ended it: that pair is not equal.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path


WORKER = Path(__file__).with_name("latex_worker.py")


class _Worker:
    """The process, and who started it: after a fork the child needs one of its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = -1

    def agree(self, found: str, gold: str) -> bool:
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.start()
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps([found, gold]) + "\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            if not answer:  # the pair ended it, by a signal
                status = self.process.wait()
                self.process = None
                if status >= 0:
                    raise RuntimeError(f"{WORKER.name} ended with status {status}: run it by hand to see why.")
            return answer == "true\n"

    def start(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # this folder's modules are none of its business
        )


_worker = _Worker()
os.register_at_fork(
    after_in_child=lambda: setattr(_worker, "lock", threading.Lock())
)  # another thread may have held it


@functools.lru_cache(maxsize=4096)  # the samples of one problem are often the same answer
def latex_agrees(found: str, gold: str) -> bool:
    """Says whether two answers, without the dollars around them, are equal mathematically."""
    return _worker.agree(found, gold)

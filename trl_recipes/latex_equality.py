r"""Two answers in LaTeX -> whether math_verify takes them for equal; from any thread, never for longer than some seconds.

math_verify reads what a model wrote with a parser and an algebra system, of which a few characters (`9^{9^{9^9}}`) ask for
all memory and all time. So the plainest of these are refused, and it runs in a process of its own, latex_worker.py, which
is started with the first pair that needs it, ends with this one, and is replaced when a pair has ended it: that pair is
not equal. Where something else has ended it, such as a machine without memory, the pair is asked again.
"""

import functools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO


WORKER = Path(__file__).with_name("latex_worker.py")
START_SECONDS = 120.0  # until it has imported the algebra system
ANSWER_SECONDS = 10.0  # for one pair, by the clock; its own limit is a second of the processor
OWN_FAULT = {-signal.SIGPROF, -signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT}
MOST_EXPONENT, MOST_FACTORIAL = 100, 1000
EXPONENT = re.compile(r"\^\s*\{?\s*[-+]?\s*(\d+)")
FACTORIAL = re.compile(r"(\d+)\s*[)}]*\s*!")
TOWER = re.compile(r"\d\s*[)}]*\s*\^[\s{(]*\d+\s*[)}]*\s*\^|\^[^!]*[)}]\s*!|!\s*[)}]*\s*!")


class _NoVerdict(Exception):
    """The worker was ended, twice, by something that is not the pair."""


class _Worker:
    """The process, and who started it: after a fork the child needs one of its own."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = -1
        self.asked = 0

    def agree(self, found: str, gold: str) -> bool:
        with self.lock:
            for _ in range(2):
                try:
                    if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                        self.start()
                    self.asked += 1
                    write, _ = self.pipes()
                    write.write(json.dumps([self.asked, found, gold]).encode() + b"\n")
                    write.flush()
                    number, verdict = self.read(ANSWER_SECONDS)
                    if number == self.asked:
                        return verdict
                except (BrokenPipeError, EOFError):
                    status = self.stop()
                    if status in OWN_FAULT:
                        return False
                    if status >= 0:
                        raise RuntimeError(f"{WORKER.name} ended with {status}: run it by hand to see why.") from None
                except TimeoutError:
                    break
                except BaseException:  # such as Ctrl-C: the verdict would be taken for that of the next pair
                    self.stop()
                    raise
            self.stop()
            raise _NoVerdict

    def start(self) -> None:
        self.owner, self.asked = os.getpid(), 0
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONSAFEPATH": "1"},  # this folder's modules are none of its business
            start_new_session=True,  # Ctrl-C is for this process
        )
        self.read(START_SECONDS)

    def pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """What it reads from, and what it writes to."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def read(self, seconds: float) -> tuple[int, bool]:
        """The next line: there is never more than one."""
        line, deadline = b"", time.monotonic() + seconds
        _, answers = self.pipes()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([answers], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(answers.fileno(), 4096)
            if not part:
                raise EOFError
            line += part
        return json.loads(line)

    def stop(self) -> int:
        """Ends it, if it has not ended, and returns its status; 0 or more where it ended of itself."""
        if self.process is None:
            return -signal.SIGKILL
        write, answers = self.pipes()
        process, self.process = self.process, None
        try:
            status = process.wait(1)  # one that was ended closes its pipes first
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        answers.close()
        try:
            write.close()
        except BrokenPipeError:
            pass
        return status


_worker = _Worker()
os.register_at_fork(
    after_in_child=lambda: setattr(_worker, "lock", threading.Lock())
)  # another thread may have held it


@functools.lru_cache(maxsize=4096)  # the samples of one problem are often the same answer
def _verdict(found: str, gold: str) -> bool:
    return _worker.agree(found, gold)


def latex_agrees(found: str, gold: str) -> bool:
    """Says whether two answers, without the dollars around them, are equal mathematically; no where nobody can say."""
    if is_heavy(found) or is_heavy(gold):
        return False
    try:
        return _verdict(found, gold)
    except _NoVerdict:
        return False


def is_heavy(answer: str) -> bool:
    """Whether its powers or factorials have more digits than an answer has."""
    return (
        TOWER.search(answer) is not None
        or any(len(e) > 9 or int(e) > MOST_EXPONENT for e in EXPONENT.findall(answer))
        or any(len(n) > 9 or int(n) > MOST_FACTORIAL for n in FACTORIAL.findall(answer))
    )

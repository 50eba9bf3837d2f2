"""Breaks a piece of work at a point, in a fork of this process, and says how it ended.

A fault befalls the work when a place (see [`recipes.killed_runs`]) comes for the n-th time:

    kill      SIGKILL, which nothing can catch
    term      SIGTERM, which schedulers send before it
    memory    torch.OutOfMemoryError, as a GPU's allocator raises it
    readonly  from then on nothing in the folder can be written: what Linux does to a disk with errors

Two places more than those: "asked" and "answered", before and after an HTTP request; and "time", seconds of wall-clock in
the place of n. A disk that is full, or read-only from the start, is a real one: [`SmallDisk`].

Random points come from a seed that is printed; TINYLORA_FAULTS_SEED repeats them.
"""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from recipes.killed_runs import Killer, exit_status, fork
from support import HTTPX


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
DISK_PLACES = ("file", "rename")


class Fault(NamedTuple):
    """What befalls the work, and when: the how manieth time that a place comes, or seconds."""

    kind: str
    place: str
    when: float


class Ended(NamedTuple):
    """How the work ended: exit status (minus the signal), how often each place came, what it printed, seconds."""

    status: int
    counts: dict[str, int]
    log: str
    seconds: float

    @property
    def error(self) -> str:
        """Its last line, which is the only one about the error: there is no traceback."""
        assert "Traceback" not in self.log, self.log
        return self.log.strip().splitlines()[-1]


class Injector(Killer):
    """Counts places, and lets a fault befall this process at one of them."""

    def __init__(self, folder: Path, fault: Fault | None) -> None:
        super().__init__(folder, None)
        self.fault, self.is_readonly = fault, False

    def reach(self, place: str, first: Callable[[], None] = lambda: None) -> None:
        """Counts, and if it is time lets the fault happen."""
        self.counts[place] += 1
        is_now = self.fault is not None and self.fault[1:] == (place, self.counts[place])
        if is_now and self.fault.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if is_now and self.fault.kind in SIGNALS:
            if self.fault.kind == "kill":
                first()
            os.kill(os.getpid(), SIGNALS[self.fault.kind])
        self.is_readonly |= is_now and self.fault.kind == "readonly"
        if self.is_readonly and place in DISK_PLACES:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{self.folder}/file")

    def install(self) -> None:
        super().install()
        self.wrap(HTTPX.HTTPTransport, "handle_request", "asked", "before")
        self.wrap(HTTPX.HTTPTransport, "handle_request", "answered", "after")


def ended(
    work: Callable[[], None],
    folder: Path,
    log: Path,
    fault: Fault | None = None,
    places: Sequence[tuple[object, str, str, str]] = (),
) -> Ended:
    """Does the work in a fork of this process, with a fault.

    Args:
        work (`Callable`): what to do.
        folder (`Path`): where "file" and "rename" are counted.
        log (`Path`): where its output goes; made anew.
        fault ([`Fault`], *optional*): what befalls it.
        places (`Sequence`): more places: the owner of a function, its name, the place, and "before" or "after" it.
    """
    counts = log.with_suffix(".counts")
    for file in (log, counts):
        file.unlink(missing_ok=True)

    def child() -> None:
        # The test runner's own would be written to otherwise.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        torch.set_num_threads(1)  # those of the process that was forked are not there
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        injector = Injector(folder, fault)
        injector.install()
        for place in places:
            injector.wrap(*place)
        try:
            work()
        finally:
            counts.write_text(json.dumps(injector.counts))

    started = time.monotonic()
    pid = fork(child, log)
    if fault is not None and fault.place == "time":
        while time.monotonic() - started < fault.when:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        with suppress(ProcessLookupError):
            os.kill(pid, SIGNALS[fault.kind])
    status = exit_status(pid)
    seconds = time.monotonic() - started
    found = json.loads(counts.read_text()) if counts.exists() and counts.stat().st_size else {}
    return Ended(status, found, log.read_text(errors="replace") if log.exists() else "", seconds)


def command(arguments: list[object]) -> Callable[[], None]:
    """The work of `peft-tinylora ARGUMENTS`."""
    from peft_tinylora import cli

    return lambda: sys.exit(cli.main([str(argument) for argument in arguments]))


class Points(random.Random):
    """Random points of a test: printed, so that they can be repeated."""

    def __init__(self) -> None:
        seed = int(os.environ.get("TINYLORA_FAULTS_SEED", random.SystemRandom().randrange(2**32)))
        print(f"TINYLORA_FAULTS_SEED={seed} repeats these points")
        super().__init__(seed)

    def fault(self, kinds: dict[str, tuple[str, ...]], whole: Ended) -> Fault:
        """A fault of a random kind, at a random time of one of the kind's places, as often as a whole run comes there."""
        kind = self.choice(list(kinds))
        place = self.choice([place for place in kinds[kind] if place == "time" or whole.counts.get(place)])
        if place == "time":
            return Fault(kind, place, self.uniform(0, whole.seconds))
        return Fault(kind, place, self.randint(1, whole.counts[place]))


class SmallDisk:
    """A file system of a few pages in memory, of a size that can be changed. Skips the test where it cannot be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-t", "tmpfs", "-o", "size=1g,mode=755", "tmpfs"]
        with suppress(FileNotFoundError):
            if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0:
                return
        pytest.skip("a small disk can be mounted by root only, on Linux")

    def used(self) -> int:
        """Bytes, in whole pages."""
        status = os.statvfs(self.folder)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def remount(self, option: str) -> None:
        """Sets an option: `size=BYTES`, `ro` or `rw`."""
        subprocess.run(["mount", "-o", f"remount,{option}", str(self.folder)], check=True)

    def leave(self, free: int) -> None:
        """So many bytes are free from now on."""
        self.remount(f"size={max(self.used() + free, 4096)}")  # 0 would be no limit

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """A [`SmallDisk`] at a folder, while this lasts."""
    disk = SmallDisk(folder)
    try:
        yield disk
    finally:
        disk.close()

"""Work in a fork of this process, which can be sent signals, and killed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], None], log: Path | None = None) -> int:
    """Starts the work in a fork of this process and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if log is not None:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        work()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(pid: int, seconds: float = 600) -> int:
    """Waits for a process; its exit status, negative for a signal.

    Raises:
        TimeoutError: if it was not over by then; it is killed.
    """
    deadline = time.monotonic() + seconds
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} was not over after {seconds:g} seconds")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])

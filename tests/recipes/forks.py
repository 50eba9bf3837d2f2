"""Work in a fork of this process, which can be sent signals, and killed."""

import os
import sys
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


def exit_status(pid: int) -> int:
    """Waits for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

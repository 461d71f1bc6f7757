"""Work done by a process that dies in the end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def work_and_die(work: Callable[[], None]) -> None:
    """Do the work in a child of this process, which is killed right after it. Asserts that the work came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the work itself failed"

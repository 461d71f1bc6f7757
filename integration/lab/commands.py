"""Running programs on the host, for the laboratory's own use."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


class LabError(RuntimeError):
    """The laboratory itself, not the code under test, could not do something."""


def run(command: Sequence[str | Path], *, timeout_s: float = 60.0, environment: Mapping[str, str] | None = None) -> str:
    """Run `command` (no shell) and return its stdout as text. `environment` is added to this process's own.

    Raises `LabError` with the command line and the end of its stderr if it cannot start, times out, or exits with
    anything but zero.
    """
    line = [str(word) for word in command]
    try:
        done = subprocess.run(
            line,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{shlex.join(line)}: {error}") from error
    if done.returncode != 0:
        raise LabError(f"{shlex.join(line)}: exit status {done.returncode}: {done.stderr.strip()[-4000:]}")
    return done.stdout

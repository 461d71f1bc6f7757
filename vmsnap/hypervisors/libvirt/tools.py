"""Running the host's programs for images and mounts."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from vmsnap.errors import DeadlineError, DriverError, NoSpaceError, PreconditionError, ToolError

_ENVIRONMENT = {**os.environ, "LC_ALL": "C"}


def run_tool(argv: tuple[str, ...], *, timeout_seconds: float = 60, stdout_to: IO[str] | None = None) -> str:
    """Run a program and return its stdout; ``stdout_to`` takes it instead, where given.

    Raises PreconditionError where it is not installed, DeadlineError where it does not end, NoSpaceError, ToolError.
    """
    try:
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE if stdout_to is None else stdout_to,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
            env=_ENVIRONMENT,
        )
    except FileNotFoundError as error:
        raise PreconditionError(
            f"the program {argv[0]!r} is not installed", remedy=f"install the package with {argv[0]}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"{argv[0]} did not end within {timeout_seconds:g} s", details=" ".join(argv)) from error
    if done.returncode == 0:
        return done.stdout or ""
    kind = NoSpaceError if "No space left on device" in done.stderr else ToolError
    raise kind(f"{argv[0]} failed with status {done.returncode}", details=f"{' '.join(argv)}\n{done.stderr.strip()}")


@contextmanager
def translated_os(doing: str) -> Iterator[None]:
    """Turn the system's errors in the block into vmsnap's; ``doing`` completes 'could not ...'.

    Raises NoSpaceError, PreconditionError for what is missing or forbidden, DriverError for all others.
    """
    try:
        yield
    except OSError as error:
        text = f"could not {doing}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(text, remedy="make room") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
            raise PreconditionError(text, remedy="see that the folder exists and root may write to it") from error
        raise DriverError(text) from error

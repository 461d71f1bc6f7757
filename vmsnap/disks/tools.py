"""Running the host's programs: argument lists, a time limit, a checked exit status."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import IO

from vmsnap.errors import PreconditionError, ToolError

_PACKAGES = {
    "blkid": "util-linux",
    "btrfs": "btrfs-progs",
    "debugfs": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "umount": "mount",
    "xfs_db": "xfsprogs",
    "xfs_logprint": "xfsprogs",
}
_LONGEST_COMPLAINT = 2000


@dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """What a program wrote, and its exit status."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Return stdout as text; bytes that are not UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")


class Deadline:
    """A point in time that several programs share."""

    def __init__(self, timeout: timedelta) -> None:
        self._end = time.monotonic() + timeout.total_seconds()

    def left(self) -> timedelta:
        """Return the time that is left, at least a millisecond."""
        return timedelta(seconds=max(0.001, self._end - time.monotonic()))

    @property
    def over(self) -> bool:
        """Tell whether no time is left."""
        return time.monotonic() >= self._end


def environment() -> dict[str, str]:
    """Return the environment for host programs: messages in English, and the administrator's folders in the path."""
    path = os.environ.get("PATH", os.defpath)
    return {"LC_ALL": "C", "PATH": f"{path}:/usr/local/sbin:/usr/sbin:/sbin"}


def missing(program: str) -> PreconditionError:
    """Return the error for a program that is not installed."""
    package = _PACKAGES.get(program, program)
    return PreconditionError(
        f"the program {program} is not installed", remedy=f"install it (Debian: apt install {package})"
    )


def run_tool(
    argv: Sequence[str],
    *,
    timeout: timedelta,
    accepted: frozenset[int] = frozenset({0}),
    stdout_to: IO[bytes] | None = None,
) -> ToolOutput:
    """Run a program and return what it wrote; ``stdout_to`` takes its standard output instead, where given.

    Raises ToolError where it does not end in time or its exit status is not accepted, PreconditionError where it is
    not installed.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout_to is None else stdout_to,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=timeout.total_seconds(),
            check=False,
        )
    except FileNotFoundError as error:
        raise missing(argv[0]) from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(
            f"{argv[0]} did not end within {timeout.total_seconds():.0f} s",
            details=" ".join(argv),
            remedy="look whether the host's disks are slow or overloaded, then try again",
        ) from error
    output = ToolOutput(
        status=done.returncode, stdout=done.stdout or b"", stderr=done.stderr.decode("utf-8", "replace").strip()
    )
    if output.status not in accepted:
        raise failure(argv, status=output.status, complaint=output.stderr)
    return output


def failure(argv: Sequence[str], *, status: int, complaint: str) -> ToolError:
    """Return the error for a program that failed."""
    return ToolError(
        f"{argv[0]} failed with exit status {status}: {complaint[:_LONGEST_COMPLAINT] or 'it gave no reason'}",
        details=" ".join(argv),
        remedy="the message of the program names the cause; run it by hand to see more",
    )

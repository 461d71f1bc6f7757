"""``qemu-storage-daemon``: images of any format as plain files, by FUSE.

One daemon serves the images it was started with. It dies with the thread that started it (``PR_SET_PDEATHSIG``, see
prctl(2)), so start it from a thread that lives as long as the files are needed. What a killed daemon leaves is a mount
that answers 'not connected'; ``sweep`` removes that.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import stat
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from vmsnap.disks.tools import Deadline, environment, failure, missing, run_tool
from vmsnap.errors import DeadlineError, DriverError, ToolError, VmsnapError

JsonValue = str | int | bool | Mapping[str, "JsonValue"]

_POLL_SECONDS = 0.01
_GRACE = timedelta(seconds=5)
_OCTAL = re.compile(rb"\\([0-7]{3})")
_MOUNTPOINT_FIELD = 4


@dataclass(frozen=True, kw_only=True)
class ServedImage:
    """One image to serve: a block node as QEMU's ``blockdev-add`` takes it, and the file it shall appear as."""

    node: Mapping[str, JsonValue]
    path: Path


def protocol_node(path: str) -> dict[str, JsonValue]:
    """Return the node for a file or a block device on the host, opened for reading.

    QEMU's own image locks stay on: opening fails while another QEMU may write to the image, and no other QEMU can
    begin to write while it is open.
    """
    try:
        block = stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError as error:
        raise DriverError(f"the image {path} cannot be opened: {error.strerror}") from error
    return {"driver": "host_device" if block else "file", "filename": path, "read-only": True}


class StorageDaemon:
    """A running daemon. ``folder`` is its own: it holds the served files, a pid file and a log."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @staticmethod
    def start(folder: Path, *, images: Sequence[ServedImage], timeout: timedelta) -> StorageDaemon:
        """Start a daemon and return once all files can be read.

        Raises ToolError with the daemon's own message where an image cannot be opened, DeadlineError where it does
        not answer in time, PreconditionError where it is not installed.
        """
        pid_file = folder / "daemon.pid"
        log_file = folder / "daemon.log"
        pid_file.unlink(missing_ok=True)
        argv = ["setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon", "--pidfile", str(pid_file)]
        for index, image in enumerate(images):
            image.path.touch(mode=0o400)
            node = {**image.node, "node-name": f"disk{index}", "read-only": True}
            export: dict[str, JsonValue] = {
                "type": "fuse",
                "id": f"export{index}",
                "node-name": f"disk{index}",
                "mountpoint": str(image.path),
                "writable": False,
                "allow-other": "off",
            }
            argv += ["--blockdev", json.dumps(node), "--export", json.dumps(export)]
        with log_file.open("wb") as log:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=environment(),
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise missing("setpriv") from error
        daemon = StorageDaemon(process)
        deadline = Deadline(timeout)
        # The daemon writes its pid file after all its options, and so its exports, are in force.
        while not pid_file.exists():
            if (status := process.poll()) is not None:
                raise _start_failure(status=status, log_file=log_file)
            if deadline.over:
                daemon.stop()
                raise DeadlineError(
                    f"qemu-storage-daemon did not open the images within {timeout.total_seconds():.0f} s",
                    details=_read_log(log_file),
                    remedy="look whether the host's disks are slow or overloaded, then try again",
                )
            time.sleep(_POLL_SECONDS)
        return daemon

    def stop(self) -> None:
        """End the daemon; its mounts go with it where it ends in order. May be repeated."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_GRACE.total_seconds())
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def sweep(folder: Path, *, deadline: timedelta) -> None:
    """End daemons that serve files in ``folder`` and take their mounts away. Content where there are none.

    Raises ToolError where a mount stays, DeadlineError where a daemon does.
    """
    end = Deadline(deadline)
    for pid in _daemons(folder):
        _end_process(pid, folder=folder, deadline=end)
    # A daemon that was killed leaves its mounts; the newest lies on top.
    for mountpoint in reversed(mounts_below(folder)):
        try:
            run_tool(["umount", "--no-canonicalize", "--lazy", str(mountpoint)], timeout=end.left())
        except ToolError:
            if mountpoint in mounts_below(folder):
                raise


def mounts_below(folder: Path) -> list[Path]:
    """Return mount points inside ``folder``, oldest first. Format: proc_pid_mountinfo(5)."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        field = line.split(b" ")[_MOUNTPOINT_FIELD]
        path = Path(os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)))
        if folder in path.parents:
            mounts.append(path)
    return mounts


def _daemons(folder: Path) -> list[int]:
    numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in numbers if _serves(pid, folder=folder)]


def _serves(pid: int, *, folder: Path) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    prefix = os.fsencode(folder) + b"/"
    return any(word == b"--pidfile" and value.startswith(prefix) for word, value in pairwise(argv))


def _end_process(pid: int, *, folder: Path, deadline: Deadline) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # Asked again now that the handle cannot come to mean another process.
        if not _serves(pid, folder=folder):
            return
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not select.select([handle], [], [], deadline.left().total_seconds())[0]:
            raise DeadlineError(
                f"qemu-storage-daemon (process {pid}) does not end", remedy=f"look why process {pid} hangs"
            )
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def _read_log(log_file: Path) -> str:
    return log_file.read_text(encoding="utf-8", errors="replace").strip()


def _start_failure(*, status: int, log_file: Path) -> VmsnapError:
    complaint = _read_log(log_file)
    if "failed to execute" in complaint:
        return missing("qemu-storage-daemon")
    error = failure(["qemu-storage-daemon"], status=status, complaint=complaint)
    if "lock" in complaint:
        error.remedy = "another program has the image open for writing; it must not change while it is read"
    elif "fuse" in complaint.lower():
        error.remedy = "the host's kernel needs FUSE: look whether /dev/fuse is there"
    return error

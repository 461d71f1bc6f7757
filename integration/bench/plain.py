"""What there is without vmsnap: `virsh snapshot-create-as --live` with the memory in a file on a disk."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import libvirt

from integration.lab.guest import LabGuest
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.events import Pause, PauseRecorder

_POLL_S = 0.2


@dataclass(frozen=True)
class PlainCapture:
    """What came of it: `pause` is None where the guest did not converge and the attempt was ended."""

    pause: Pause | None
    stream_bytes: int
    seconds: float


def plain_capture(guest: LabGuest, *, limit_s: float = 600.0, limit_bytes: int | None = None) -> PlainCapture:
    """Capture once and put the guest back on its own disk; ended after `limit_s` or when the file outgrows `limit_bytes`."""
    folder = guest.lab.guests / "plain-virsh"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)  # QEMU runs as a user of its own
    memory, overlay, target = folder / "memory", folder / "overlay.qcow2", guest.disks[0].target
    connection = Connection("qemu:///system")
    domain = connection.domain(guest.name)
    command = ["virsh", "-q", "snapshot-create-as", guest.name, "--no-metadata", "--atomic", "--live"]
    command += ["--memspec", f"file={memory},snapshot=external"]
    command += ["--diskspec", f"{target},file={overlay},snapshot=external"]
    began = time.monotonic()
    try:
        with PauseRecorder(connection.get(), domain) as recorder:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            watched = _watch(process, domain=domain, memory=memory, until_s=began + limit_s, limit_bytes=limit_bytes)
            _, complaint = process.communicate(timeout=60)
            pause = recorder.pause(timeout_seconds=10) if process.returncode == 0 else None
        seconds = time.monotonic() - began
        assert watched.given_up or process.returncode == 0, complaint
        size = memory.stat().st_size if memory.exists() else watched.largest_bytes
        memory.unlink(missing_ok=True)  # before the commit, which would else wait for the disk to take it
        if process.returncode == 0:
            commit = ["virsh", "-q", "blockcommit", guest.name, target, "--active", "--pivot", "--wait"]
            subprocess.run(commit, check=True, capture_output=True, timeout=600)
        return PlainCapture(pause=pause, stream_bytes=size, seconds=seconds)
    finally:
        connection.close()
        shutil.rmtree(folder)


@dataclass
class _Watched:
    given_up: bool = False
    largest_bytes: int = 0


def _watch(
    process: subprocess.Popen[str],
    *,
    domain: libvirt.virDomain,
    memory: Path,
    until_s: float,
    limit_bytes: int | None,
) -> _Watched:
    """Wait for the end, or bring it about."""
    watched = _Watched()
    while process.poll() is None:
        with suppress(FileNotFoundError):  # libvirt removes it where it gives up
            watched.largest_bytes = max(watched.largest_bytes, memory.stat().st_size)
        outgrown = limit_bytes is not None and watched.largest_bytes > limit_bytes
        if outgrown or time.monotonic() > until_s:
            watched.given_up = True
            with suppress(libvirt.libvirtError):  # just over
                domain.abortJob()
        time.sleep(_POLL_S)
    return watched

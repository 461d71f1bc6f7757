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
            given_up = _watch(process, domain=domain, memory=memory, until_s=began + limit_s, limit_bytes=limit_bytes)
            _, complaint = process.communicate(timeout=60)
            pause = recorder.pause(timeout_seconds=10) if process.returncode == 0 else None
        seconds = time.monotonic() - began
        assert given_up or process.returncode == 0, complaint
        size = memory.stat().st_size if memory.exists() else 0
        memory.unlink(missing_ok=True)  # before the commit, which would else wait for the disk to take it
        if process.returncode == 0:
            commit = ["virsh", "-q", "blockcommit", guest.name, target, "--active", "--pivot", "--wait"]
            subprocess.run(commit, check=True, capture_output=True, timeout=600)
        return PlainCapture(pause=pause, stream_bytes=size, seconds=seconds)
    finally:
        connection.close()
        shutil.rmtree(folder)


def _watch(
    process: subprocess.Popen[str],
    *,
    domain: libvirt.virDomain,
    memory: Path,
    until_s: float,
    limit_bytes: int | None,
) -> bool:
    """Wait for the end. Returns whether it had to be ended."""
    given_up = False
    while process.poll() is None:
        outgrown = limit_bytes is not None and memory.exists() and memory.stat().st_size > limit_bytes
        if outgrown or time.monotonic() > until_s:
            given_up = True
            with suppress(libvirt.libvirtError):  # just over
                domain.abortJob()
        time.sleep(_POLL_S)
    return given_up

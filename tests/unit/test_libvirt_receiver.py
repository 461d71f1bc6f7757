"""The FIFO that a clone is made from: who waits in it is let go, and what is read tells that the clone is there."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from vmsnap.errors import CancelledError, DeadlineError, DriverError
from vmsnap.hypervisors.libvirt import memory, processes, receiver
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.receiver import CloneReceiver
from vmsnap.hypervisors.libvirt.relay import STREAM_BEGIN
from vmsnap.testing.cancels import NeverCancelled
from vmsnap.testing.threads import no_thread_left

HEADER = b"the header that libvirt reads"


class Cancelled(NeverCancelled):
    def check(self) -> None:
        raise CancelledError("cancelled")


class Libvirtd:
    """Restores as libvirt does: reads the header by itself, and leaves the rest to QEMU."""

    def __init__(self) -> None:
        self.qemu_reads = threading.Event()
        self.refuses = False
        self.opens_late = False
        self.stream = b""

    def restoreFlags(self, path: str, xml: object, flags: int) -> None:  # noqa: N802 - libvirt's name
        assert (xml, flags) == (None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        if self.opens_late:
            time.sleep(0.5)
        with Path(path).open("rb", buffering=0) as fifo:
            if fifo.read(len(HEADER)) != HEADER:
                raise libvirt.libvirtError("failed to read qemu header")
            if self.refuses:
                raise libvirt.libvirtError("no such overlay")
            self.qemu_reads.wait(10)
            while piece := fifo.read(1 << 16):
                self.stream += piece


class OneConnection(Connection):
    def __init__(self, uri: str) -> None:
        super().__init__(uri)

    def get(self) -> Any:
        return self.uri


@pytest.fixture
def libvirtd(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libvirtd]:
    made = Libvirtd()
    monkeypatch.setattr(OneConnection, "get", lambda _self: made)
    monkeypatch.setattr(receiver, "Connection", OneConnection)
    monkeypatch.setattr(processes.FirstToDie, "require_done", lambda _self: None)
    yield made
    made.qemu_reads.set()


def receiving(folder: Path) -> CloneReceiver:
    return CloneReceiver(Connection("test:///default"), clone="clone", fifo=folder / memory.FIFO_NAME, header=HEADER)


def test_a_clone_is_there_when_it_has_read_the_beginning(tmp_path: Path, libvirtd: Libvirtd) -> None:
    with receiving(tmp_path) as clone:
        with pytest.raises(DeadlineError, match="the guest was not stopped"):
            clone.wait_until_it_reads(timeout_seconds=0.3, cancel=NeverCancelled())
        libvirtd.qemu_reads.set()
        clone.wait_until_it_reads(timeout_seconds=10, cancel=NeverCancelled())
        os.write(clone.sink, b"pages")
    clone.wait_complete(timeout_seconds=10)
    assert libvirtd.stream == STREAM_BEGIN + b"pages"
    assert list(tmp_path.iterdir()) == []


def test_a_clone_can_be_given_up_before_libvirt_has_begun_with_it(tmp_path: Path, libvirtd: Libvirtd) -> None:
    libvirtd.qemu_reads.set()
    libvirtd.opens_late = True
    began = time.monotonic()
    with no_thread_left(), pytest.raises(CancelledError), receiving(tmp_path) as clone:
        clone.wait_until_it_reads(timeout_seconds=10, cancel=Cancelled())
    assert time.monotonic() - began < 10


def test_what_libvirt_says_is_said_before_the_guest_is_stopped(tmp_path: Path, libvirtd: Libvirtd) -> None:
    libvirtd.refuses = True
    with pytest.raises(DriverError, match="no such overlay"), receiving(tmp_path) as clone:
        clone.wait_until_it_reads(timeout_seconds=10, cancel=NeverCancelled())


def test_whoever_waits_in_a_fifo_of_a_dead_run_is_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    memory.create_passage(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    os.mkfifo(folder / memory.FIFO_NAME)
    with subprocess.Popen(["cat", folder / memory.FIFO_NAME]) as waiting:
        try:
            # It sleeps when it waits for the other end: proc(5).
            until = time.monotonic() + 10
            while not Path(f"/proc/{waiting.pid}/stat").read_text().startswith(f"{waiting.pid} (cat) S"):
                assert time.monotonic() < until
                time.sleep(0.01)
            memory.remove(folder)
            assert waiting.wait(timeout=5) == 0
        finally:
            waiting.kill()
    assert not folder.exists()
    memory.remove(folder)

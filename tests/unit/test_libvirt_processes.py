"""A clone's process is marked to end first, from its beginning, and no other process is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.memory import host_memory
from vmsnap.hypervisors.libvirt.processes import (
    CLONE_OOM_SCORE,
    FirstToDie,
    is_written_for,
    pid_of,
    resident_bytes,
    started_at,
)
from vmsnap.model.ids import RunId

CLONE = "vmsnap-clone-0123456789"


@contextmanager
def process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def score(child: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{child.pid}/oom_score_adj").read_text())


def test_a_clone_that_begins_meanwhile_is_marked(tmp_path: Path) -> None:
    with FirstToDie(CLONE, pid_files=tmp_path) as doomed, process("-name", f"guest={CLONE},debug-threads=on") as clone:
        (tmp_path / f"{CLONE}.pid").write_text(f"{clone.pid}\n")
        until = time.monotonic() + 10
        while score(clone) != CLONE_OOM_SCORE:
            assert time.monotonic() < until
            time.sleep(0.01)
        doomed.require_done()
        assert pid_of(CLONE, pid_files=tmp_path) == clone.pid
        while resident_bytes(clone.pid) <= 1 << 20:  # it has only just begun
            assert time.monotonic() < until
            time.sleep(0.01)
    assert resident_bytes(clone.pid) == 0


def test_a_process_of_another_name_is_left_alone(tmp_path: Path) -> None:
    with process("-name", "guest=db1,debug-threads=on") as other:
        before = score(other)
        (tmp_path / f"{CLONE}.pid").write_text(f"{other.pid}\n")
        with FirstToDie(CLONE, pid_files=tmp_path) as doomed, pytest.raises(DriverError, match="could not be made"):
            doomed.require_done()
        assert score(other) == before


def test_when_a_process_was_started() -> None:
    before = time.time()
    with process() as child:
        started = started_at(child.pid)
        assert started is not None
        # The kernel tells its boot to a second.
        assert before - 2 < started < time.time() + 2
    assert started_at(child.pid) is None


def test_whose_memory_image_libvirt_writes() -> None:
    sleep = "import time; time.sleep(60)"
    argv = ["/usr/lib/libvirt/libvirt_iohelper", "-c", sleep, "/run/vmsnap/00000000ab/memory/ram.save", "1", "0"]
    with subprocess.Popen(argv, executable=sys.executable) as helper:
        try:
            until = time.monotonic() + 10
            while not is_written_for(RunId("00000000ab")):
                assert time.monotonic() < until
                time.sleep(0.01)
            assert not is_written_for(RunId("00000000ac"))
        finally:
            helper.kill()
    assert not is_written_for(RunId("00000000ab"))


def test_without_a_process_it_fails(tmp_path: Path) -> None:
    with FirstToDie(CLONE, pid_files=tmp_path) as doomed, pytest.raises(DriverError):
        doomed.require_done()


def test_what_a_run_has_taken_is_its_image_and_its_clone(tmp_path: Path) -> None:
    runtime, pid_files = tmp_path / "runtime", tmp_path / "pids"
    assert host_memory(runtime, pid_files=pid_files).taken_bytes == {}
    (runtime / "0123456789" / "memory").mkdir(parents=True)  # not mounted yet
    (runtime / "lost+found").mkdir()
    pid_files.mkdir()
    (pid_files / "db1.pid").write_text("1")
    assert host_memory(runtime, pid_files=pid_files).taken_bytes == {RunId("0123456789"): 0}
    # This one's image was given back, and its folder with it.
    pid_file = pid_files / "vmsnap-clone-00000000aa.pid"
    pid_file.write_text(str(os.getpid()))
    memory = host_memory(runtime, pid_files=pid_files)
    assert memory.taken_bytes[RunId("00000000aa")] > 1 << 20
    assert memory.available_bytes > 0
    pid_file.write_text("not yet written")
    assert RunId("00000000aa") not in host_memory(runtime, pid_files=pid_files).taken_bytes

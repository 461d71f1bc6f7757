"""Processes that outlive their agent: in scopes of their own where systemd runs, deaf to signals, and no worse without it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from vmsnap.hypervisors.libvirt import outliving as module
from vmsnap.hypervisors.libvirt import tools
from vmsnap.hypervisors.libvirt.outliving import outliving
from vmsnap.hypervisors.libvirt.relay import STREAM_BEGIN
from vmsnap.hypervisors.libvirt.relayed import RelayedStream
from vmsnap.hypervisors.libvirt.stopped import StoppedHere
from vmsnap.hypervisors.libvirt.vcpulimits import SlowedVcpus, read_limit
from vmsnap.hypervisors.libvirt.watchdog import Watchdog

# libvirt's driver for tests has this domain, in the process that opens it.
TEST_UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
# As systemd-run(1) with --scope: it becomes the command, in another control group.
_SCOPE = """#!/bin/sh
echo "$@" >>{log}
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


class Systemd:
    """A systemd that gives scopes, and tells which."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "scopes"
        self.program = folder / "systemd-run"
        self.put(_SCOPE.format(log=self.log))

    def put(self, script: str) -> None:
        self.program.write_text(script)
        self.program.chmod(0o755)

    def started(self) -> list[str]:
        """What was started in a scope, each tried before."""
        lines = self.log.read_text().splitlines()
        assert all(line.startswith("--scope ") for line in lines)
        assert all(line.endswith(" true") for line in lines[::2])
        return lines[1::2]


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    folder = tmp_path / "bin"
    folder.mkdir()
    path = f"{folder}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(tools, "_ENVIRONMENT", {**os.environ, "PATH": path})
    monkeypatch.setattr(module, "_SYSTEMD", folder)
    return Systemd(folder)


def test_without_systemd_it_is_the_command_itself(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SYSTEMD", systemd.log)
    assert outliving(("sleep", "1"), what="a test") == ("sleep", "1")


def test_a_scope_that_is_refused_is_told_and_done_without(systemd: Systemd, caplog: pytest.LogCaptureFixture) -> None:
    systemd.put("#!/bin/sh\necho 'Failed to start transient scope unit' >&2\nexit 1\n")
    with caplog.at_level(logging.WARNING):
        assert outliving(("sleep", "1"), what="a test") == ("sleep", "1")
    assert "a test would end with this service" in caplog.text


def test_the_guard_of_cpu_limits_works_in_a_scope(systemd: Systemd, tmp_path: Path) -> None:
    group = tmp_path / "vcpu0"
    group.mkdir()
    (group / "cpu.max").write_text("max 100000\n")
    before = read_limit(str(group))
    slowed = SlowedVcpus((before,), limit_seconds=60)
    slowed.slow_down()
    assert read_limit(str(group)).is_lower_than(before)
    slowed.let_go()
    assert read_limit(str(group)) == before
    (started,) = systemd.started()
    assert "vmsnap.hypervisors.libvirt.vcpulimits" in started


def test_the_relay_works_in_a_scope(systemd: Systemd) -> None:
    reader, sink = os.pipe()
    with RelayedStream(sink=sink, held=False, stall=timedelta(seconds=30), writer_pid=os.getpid()) as stream:
        os.close(sink)
        os.write(stream.writer, STREAM_BEGIN + b"pages")
        stream.close_writer()
        stream.let_flow()
        assert os.read(reader, 100) == b"pages"
        stream.require_ended(timeout_seconds=10)
    os.close(reader)
    (started,) = systemd.started()
    assert "vmsnap.hypervisors.libvirt.relay" in started


def test_the_watchdog_works_in_a_scope_and_a_claim_is_noted(systemd: Systemd, tmp_path: Path) -> None:
    stopped = StoppedHere(tmp_path)
    with Watchdog("test:///default", uuid=TEST_UUID, limit_seconds=60, folder=tmp_path / "memory") as watchdog:
        assert not stopped.is_noted()
        watchdog.claim_next_pause()
        assert stopped.is_noted()
        watchdog.pause_is_over()
        watchdog.pause_is_over()
        assert not stopped.is_noted()
    (started,) = systemd.started()
    assert "vmsnap.hypervisors.libvirt.watchdog" in started


def test_a_claimed_pause_that_its_agent_did_not_end_stays_noted(tmp_path: Path) -> None:
    with Watchdog("test:///default", uuid=TEST_UUID, limit_seconds=60, folder=tmp_path / "memory") as watchdog:
        watchdog.claim_next_pause()
    assert StoppedHere(tmp_path).is_noted()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_such_a_process_listens_to_no_signal(number: signal.Signals) -> None:
    """A scope's processes get SIGTERM as soon as the host shuts down."""
    script = "from vmsnap.hypervisors.libvirt.outliving import outlive; outlive(); print('on', flush=True); input()"
    child = subprocess.Popen((sys.executable, "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "on\n"
    child.send_signal(number)
    child.communicate("\n", timeout=20)
    assert child.returncode == 0

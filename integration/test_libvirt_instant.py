"""Mode ``instant`` on a real guest: what it takes, and that the guest is unharmed whatever goes wrong in mid-stream."""

from __future__ import annotations

import difflib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import libvirt
import libvirt_qemu
import pytest

from integration.lab import host_settings
from integration.lab.domain import GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    DEADLINE,
    INSTANT,
    PATIENT,
    Cancel,
    DriverRun,
    child_of_run,
    definitions,
    idle_when_accepted,
    is_running,
    memory_writer,
    new_driver,
    restart_libvirtd,
    run_in_clone,
    run_of,
    wait_until,
    write_file,
)
from integration.test_libvirt_capture import give_up_at_once
from vmsnap.errors import CancelledError, DriverError, VmsnapError
from vmsnap.hypervisors.libvirt import background
from vmsnap.hypervisors.libvirt.processes import pid_of
from vmsnap.model.capture import CaptureChoice, CaptureMode, OnNoConvergence
from vmsnap.model.guest import GuestState

BEFORE = "/var/tmp/before"
# Files of consecutive numbers, each written anew and put on disk, over and over; and whether each is one.
_WRITE_SCRIPT = "i=0; while :; do i=$((i+1)); seq $i $((i+3000)) >/var/tmp/w.$((i%10)); sync -f /var/tmp; done"
_GIVEN_UP = 3
_CHECK_SCRIPT = """set -e
systemctl stop lab-disk-writer lab-memory-writer; sync; echo 3 >/proc/sys/vm/drop_caches
for file in /var/tmp/w.*; do head -n -1 $file | awk 'NR>1 && $1!=last+1 {exit 1} {last=$1}'; done
! dmesg | grep -E 'EXT4-fs (error|warning)|I/O error'"""


@pytest.fixture(autouse=True)
def _userfaultfd() -> Iterator[None]:
    with host_settings.lent(host_settings.USERFAULTFD):
        yield


@pytest.fixture(scope="module")
def own_guest(lab: Lab) -> Iterator[LabGuest]:
    """A small guest for this file: its domain is marked as tainted by what the tests do."""
    with LabGuest(lab, GuestSpec(memory_mib=512)) as guest:
        yield guest


def instantly(run: DriverRun) -> DriverRun:
    run.plan = replace(run.plan, choice=INSTANT)
    return run


def ask(guest: LabGuest, command: str) -> object:
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(guest.domain, json.dumps({"execute": command}), 0))
    return answer["return"]


def settings_of_qemu(guest: LabGuest) -> tuple[list[str], int]:
    """The migration capabilities that are on, and the bandwidth."""
    capabilities = ask(guest, "query-migrate-capabilities")
    parameters = ask(guest, "query-migrate-parameters")
    assert isinstance(capabilities, list)
    assert isinstance(parameters, dict)
    return sorted(item["capability"] for item in capabilities if item["state"]), parameters["max-bandwidth"]


def streams(guest: LabGuest) -> bool:
    """Whether the guest's memory is on its way."""
    info = ask(guest, "query-migrate")
    assert isinstance(info, dict)
    return info.get("status") == "active" and background.has_begun(info)


def relays() -> list[int]:
    """The processes that relay streams."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and b"vmsnap.hypervisors.libvirt.relay\0" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def expect_unharmed(run: DriverRun, guest: LabGuest, before: tuple[tuple[str, str], tuple[list[str], int]]) -> None:
    """The guest runs and writes, on its own disks, and nothing tells of a capture but the taint."""
    run.release()
    assert is_running(guest)
    assert run.driver.source_is_home(run.plan.guest)
    for was, now in zip(before[0], definitions(guest), strict=True):
        # Sorted: a libvirtd that is started again writes the controllers of a running guest in an order of its own.
        assert list(difflib.unified_diff(sorted(was.splitlines()), sorted(now.splitlines()), lineterm="", n=0)) == []
    assert settings_of_qemu(guest) == before[1]
    assert guest.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
    assert relays() == []
    assert run.overlay_files() == []
    write_file(guest, BEFORE, "still writing")


@pytest.mark.parametrize("held", [True, False])
def test_a_guest_is_taken_in_one_stop_while_it_writes(
    lab: Lab,
    own_guest: LabGuest,
    held: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both orders: QEMU kept waiting with everything prepared, and (as from QEMU 8.2 on) prepared within the pause."""
    guest = own_guest
    held = held and background.can_be_held(guest.connection.getVersion())
    monkeypatch.setattr(background, "can_be_held", lambda _version: held)
    idle = idle_when_accepted(monkeypatch)
    before = definitions(guest), settings_of_qemu(guest)
    with memory_writer(guest), run_of(lab, guest) as run:
        instantly(run).prepare()
        # It goes on writing its disk while the clone, which has opened it already, waits.
        guest.run(["systemd-run", "--unit=lab-disk-writer", "--collect", "sh", "-c", _WRITE_SCRIPT])
        try:
            capture = run.capture()
            assert capture.mode is CaptureMode.INSTANT
            assert capture.reason == "the test says so"
            assert 0 < capture.pause_ms < 1000 * lab.time_factor
            assert sum(part.ms for part in capture.parts) == pytest.approx(capture.pause_ms)
            assert capture.ram_bytes > 100 << 20
            assert is_running(guest)
            assert settings_of_qemu(guest) == before[1]
            assert guest.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
            clone = run.restore()
            # The guest waits for it while it is loaded.
            assert idle == ["0"]
            assert run.driver.clone_state(clone) is GuestState.PAUSED
            run.resume()
            # Its disks are of the instant of its memory: what it had not in its cache is read from them now.
            run_in_clone(run, ("sh", "-c", _CHECK_SCRIPT))
        finally:
            guest.exec(["systemctl", "stop", "lab-disk-writer"])
    with run_of(lab, guest) as run:
        expect_unharmed(run, guest, before)
    if held:
        restart_libvirtd(guest)
        assert is_running(guest)
        assert guest.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
        # libvirt writes the live definition anew when it starts; the persistent one is a file.
        assert (definitions(guest)[1], settings_of_qemu(guest)) == (before[0][1], before[1])
        assert run.driver.source_is_home(run.plan.guest)


def test_whatever_dies_in_mid_stream_the_guest_is_unharmed(lab: Lab, own_guest: LabGuest) -> None:
    guest = own_guest
    before = definitions(guest), settings_of_qemu(guest)
    with memory_writer(guest):
        ends: tuple[Callable[[LabGuest, DriverRun], bool | None], ...]
        ends = (_cut_the_stream, _kill_the_clone, _restart_libvirtd, _cancel)
        for end in ends:
            with run_of(lab, guest) as run:
                instantly(run).prepare()
                once = _Once(lambda: streams(guest), partial(end, guest, run))
                with pytest.raises(VmsnapError) as caught:
                    run.capture(Cancel(when=once))
                assert once.done, end
                assert isinstance(caught.value, CancelledError if end is _cancel else DriverError), end
                expect_unharmed(run, guest, before)


class _Once:
    """Does something once, when a condition is true. Tells whether the capture is to be cancelled."""

    def __init__(self, condition: Callable[[], bool], act: Callable[[], bool | None]) -> None:
        self.condition = condition
        self.act = act
        self.done = False
        self.answer = False

    def __call__(self) -> bool:
        if not self.done and self.condition():
            self.done = True
            self.answer = bool(self.act())
        return self.answer


def _cut_the_stream(_guest: LabGuest, _run: DriverRun) -> None:
    (relay,) = relays()
    os.kill(relay, signal.SIGKILL)


def _kill_the_clone(_guest: LabGuest, run: DriverRun) -> None:
    pid = pid_of(f"vmsnap-clone-{run.plan.run}")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def _restart_libvirtd(guest: LabGuest, _run: DriverRun) -> None:
    restart_libvirtd(guest)


def _cancel(_guest: LabGuest, _run: DriverRun) -> bool:
    return True


def test_an_operator_works_on_the_guest_in_mid_stream(lab: Lab, own_guest: LabGuest) -> None:
    """Balloon, hot-plug, a reboot from inside: refused or done, the capture stays right and the guest unharmed."""
    guest = own_guest
    before = definitions(guest), settings_of_qemu(guest)
    kib = guest.domain.info()[2]
    disk = guest.lab.guests / "plugged.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "8M"], check=True)
    xml = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>"
        "<target dev='vdz' bus='virtio'/></disk>"
    )

    def work() -> bool:
        guest.domain.setMemory(kib - 32 * 1024)
        with pytest.raises(libvirt.libvirtError):
            guest.domain.attachDevice(xml)
        guest.domain.reset()
        return False

    with memory_writer(guest), run_of(lab, guest) as run:
        instantly(run).prepare()
        once = _Once(lambda: streams(guest), work)
        boot_id = guest.run(["cat", "/proc/sys/kernel/random/boot_id"])
        capture = run.capture(Cancel(when=once))
        assert once.done
        assert capture.pause_ms > 0
        run.restore()
        run.resume()
        assert run_in_clone(run, ("cat", "/proc/sys/kernel/random/boot_id")) == boot_id
        guest.wait_for_agent()
        assert guest.run(["cat", "/proc/sys/kernel/random/boot_id"]) != boot_id
        guest.domain.setMemory(kib)
        guest.wait_for_postgresql()
        run.release()
    disk.unlink()
    wait_until(lambda: guest.domain.info()[2] == kib, "the guest's memory back")
    with run_of(lab, guest) as run:
        expect_unharmed(run, guest, before)


def test_an_agent_killed_at_any_step_leaves_nothing(lab: Lab, own_guest: LabGuest) -> None:
    """The process dies without a word; the relay goes with it, and another process puts everything back."""
    guest = own_guest
    before = definitions(guest), settings_of_qemu(guest)
    moments = {
        "allowed": lambda: "background-snapshot" in settings_of_qemu(guest)[0],
        "streaming": lambda: streams(guest),
    }
    with memory_writer(guest):
        for name, moment in moments.items():
            with run_of(lab, guest) as run:
                instantly(run)
                run.note()
                with child_of_run(run.plan.run, guest.name, stage="instantly") as child:
                    try:
                        wait_until(moment, name)
                    finally:
                        child.kill()
                wait_until(lambda: relays() == [], "the end of the relay", limit_s=10)
                assert guest.run(["echo", "alive"]) == "alive\n"
                fresh = new_driver(lab)
                try:
                    run.release(driver=fresh)
                finally:
                    fresh.close()
                expect_unharmed(run, guest, before)


def test_a_clone_that_is_given_up_as_it_is_complete_leaves_libvirtd_alive(lab: Lab, own_guest: LabGuest) -> None:
    """libvirt 9.0's daemon may die where a domain is destroyed at the moment when its memory is complete."""
    for _ in range(_GIVEN_UP):
        with run_of(lab, own_guest) as run:
            instantly(run).prepare()
            run.capture()
            run.release()
        assert own_guest.connection.isAlive()
        assert is_running(own_guest)


def test_a_guest_that_qemu_cannot_migrate_any_more_is_mended_by_the_next_capture(lab: Lab, own_guest: LabGuest) -> None:
    """QEMU before 8.1, after a background snapshot that failed: ``auto`` goes by ``instant``, and then ``live`` works again."""
    guest = own_guest
    with memory_writer(guest), run_of(lab, guest) as run:
        instantly(run).prepare()
        with pytest.raises(CancelledError):
            run.capture(Cancel(when=lambda: streams(guest)))
    left = guest.connection.getVersion() < 8_001_000
    assert background.is_left_by_a_failure(guest.domain) is left
    for expected in (CaptureMode.INSTANT if left else CaptureMode.LIVE, CaptureMode.LIVE):
        with run_of(lab, guest) as run:
            choice = run.driver.choose_mode(run.plan.guest, settings=replace(PATIENT, mode=CaptureChoice.AUTO))
            assert choice.mode is expected, choice.reason
            run.plan = replace(run.plan, choice=choice)
            run.prepare()
            assert run.capture().mode is expected
            run.restore()
            assert not background.is_left_by_a_failure(guest.domain)


@pytest.fixture
def unhurt_guest(lab: Lab) -> Iterator[LabGuest]:
    """A guest whose QEMU no background snapshot has failed in: QEMU 7.2 cannot migrate it any more then (docs/instant.md)."""
    with LabGuest(lab, GuestSpec(memory_mib=512)) as guest:
        yield guest


def test_a_guest_that_does_not_converge_is_taken_instantly(
    lab: Lab, unhurt_guest: LabGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = unhurt_guest
    give_up_at_once(monkeypatch)
    before = definitions(guest), settings_of_qemu(guest)
    settings = replace(PATIENT, max_pause=timedelta(milliseconds=2), on_no_convergence=OnNoConvergence.INSTANT)
    with memory_writer(guest), run_of(lab, guest, settings) as run:
        run.prepare()
        capture = run.capture()
        assert capture.mode is CaptureMode.INSTANT
        assert "not live" in capture.reason
        assert run.driver.clone_state(run.restore()) is GuestState.PAUSED
        run.driver.release(run.driver.memory_resource(run.plan), deadline=DEADLINE)
        expect_unharmed(run, guest, before)

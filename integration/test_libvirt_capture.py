"""A real guest with one qcow2 disk: captured, cloned, and put back on its own disk; captures that are given up."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import libvirt
import pytest

from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    DEADLINE,
    HASTY,
    PATIENT,
    RUNTIME,
    Cancel,
    DriverRun,
    capture_job_runs,
    definitions,
    drop_caches,
    idle_when_accepted,
    is_running,
    memory_writer,
    run_of,
    wait_until,
    write_file,
)
from integration.memory_use import MemoryUse
from vmsnap.errors import (
    BugError,
    CancelledError,
    DeadlineError,
    GuestCommandError,
    GuestNotFoundError,
    NotCleanError,
    NotConvergingError,
)
from vmsnap.hypervisors.libvirt import pauses, yielding
from vmsnap.hypervisors.libvirt.capturewatch import CaptureWatch
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.processes import CLONE_OOM_SCORE, pid_of
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CaptureSettings, CloneLimits, OnNoConvergence
from vmsnap.model.guest import GuestState, Severity
from vmsnap.model.journal import ResourceKind

BEFORE, MEANWHILE = "/var/tmp/before", "/var/tmp/meanwhile"
SHUTDOWN = timedelta(seconds=120)


def is_in_clone(run: DriverRun, *, domain: str, path: str) -> bool:
    """Whether a file is in the clone, by its agent's word."""
    request = json.dumps({"execute": "guest-file-open", "arguments": {"path": path, "mode": "r"}})
    try:
        run.driver.agent(domain).send(request, timeout=timedelta(seconds=30))
    except GuestCommandError as error:
        if "No such file" not in str(error):
            raise
        return False
    return True


def oom_score(domain: str) -> int:
    pid = pid_of(domain)
    assert pid is not None
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def check_limits(clone: libvirt.virDomain, limits: CloneLimits) -> None:
    """The clone's limits are as wished."""
    scheduler = clone.schedulerParameters()
    assert scheduler["vcpu_quota"] * 100 == scheduler["vcpu_period"] * (limits.cpu_percent or 0)
    tune = clone.blockIoTune("vda")
    assert (tune["total_bytes_sec"], tune["total_iops_sec"]) == (
        limits.disk_bytes_per_second,
        limits.disk_operations_per_second,
    )


def cache_modes(guest: LabGuest, name: str) -> set[str | None]:
    root = parse(guest.connection.lookupByName(name).XMLDesc())
    return {driver.get("cache") for driver in root.findall("devices/disk/driver")}


def giving_way(monkeypatch: pytest.MonkeyPatch) -> list[yielding.GivingWay]:
    """Return a list that gets what lets clones give way, when it begins."""
    seen: list[yielding.GivingWay] = []
    begin = yielding.GivingWay.begin

    def noted(self: yielding.GivingWay) -> None:
        seen.append(self)
        begin(self)

    monkeypatch.setattr(yielding.GivingWay, "begin", noted)
    return seen


def weight_of(guest: LabGuest, name: str) -> int:
    return int(guest.connection.lookupByName(name).schedulerParameters()["cpu_shares"])


def test_a_run_leaves_the_source_as_it_was_and_keeps_what_it_wrote(
    lab: Lab, guest: LabGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yielding, "SECONDS", 600.0)
    idle, ways = idle_when_accepted(monkeypatch), giving_way(monkeypatch)
    before = definitions(guest)
    downtime_ms = guest.domain.migrateGetMaxDowntime()
    boot_id = guest.run(["cat", "/proc/sys/kernel/random/boot_id"])
    source_score = oom_score(guest.name)
    write_file(guest, BEFORE, "written before the capture")
    guest.run(["rm", "-f", MEANWHILE])
    # Not of its network cards: for those libvirt needs a queueing discipline (sfq) that not every test host's kernel has.
    limits = CloneLimits(cpu_percent=90, disk_bytes_per_second=1 << 30, disk_operations_per_second=100_000)
    with run_of(lab, guest, replace(PATIENT, limits=limits)) as run, MemoryUse(RUNTIME) as memory_use:
        refused = [f for f in run.driver.findings(run.plan.guest, settings=PATIENT) if f.severity is Severity.REFUSAL]
        assert refused == []
        run.prepare()
        (mount,) = [line for line in Path("/proc/mounts").read_text().splitlines() if run.plan.run in line]
        assert "noswap" in mount.split()[3].split(",")
        capture = run.capture()
        assert 0 < capture.pause_ms < PATIENT.max_pause.total_seconds() * 1000
        assert [part.name for part in capture.parts] == [*pauses.ORDER, pauses.RESUMING]
        assert sum(part.ms for part in capture.parts) == pytest.approx(capture.pause_ms)
        assert capture.captured < capture.resumed
        assert 0 < capture.ram_bytes <= run.plan.guest.memory_bytes
        assert is_running(guest)
        assert not run.driver.source_is_home(run.plan.guest)
        guest.run(["sh", "-c", f"seq 200000 >{MEANWHILE} && sync"])

        clone = run.restore()
        assert run.driver.clone_state(clone) is GuestState.PAUSED
        assert cache_modes(guest, clone.name) == {"unsafe"}
        assert "unsafe" not in cache_modes(guest, guest.name)
        assert idle == ["1"]
        group = yielding.group_of(clone.name, run=clone.run)
        assert group is not None
        assert (group / "cpu.idle").read_text() == "1\n"
        ways[0].cease()
        assert (group / "cpu.idle").read_text() == "0\n"
        assert weight_of(guest, clone.name) == weight_of(guest, guest.name) * PATIENT.cpu_shares // 1024
        memory = guest.connection.lookupByName(clone.name).memoryParameters()
        assert memory["hard_limit"] * 1024 == run.plan.guest.memory_bytes * 5 // 4 + (1 << 30)
        check_limits(guest.connection.lookupByName(clone.name), limits)
        scores = [oom_score(name) for name in (guest.name, clone.name)]
        assert scores == [source_score, CLONE_OOM_SCORE]
        assert run.driver.host_memory().taken_bytes[run.plan.run] > capture.ram_bytes // 2
        assert {resource.kind for resource in run.driver.owned()} == {
            ResourceKind.CLONE, ResourceKind.CLONE_OVERLAYS, ResourceKind.SOURCE_OVERLAYS, ResourceKind.MEMORY,
        }  # fmt: skip
        assert list(Path("/run/vmsnap").glob("*/memory/ram.save")) == []
        assert guest.name in run.driver.guests()
        assert clone.name not in run.driver.guests()

        run.resume()
        assert capture.ram_bytes < memory_use.peak_bytes < 1.2 * run.plan.guest.memory_bytes
        assert is_in_clone(run, domain=clone.name, path=BEFORE)
        assert not is_in_clone(run, domain=clone.name, path=MEANWHILE)
        assert (
            run.driver.shut_down_clone(clone, agent_answers=True, deadline=SHUTDOWN, cancel=Cancel()) == "guest agent"
        )
        with pytest.raises(GuestNotFoundError):
            run.driver.clone_state(clone)
        run.release()

        assert run.overlay_files() == []
        assert run.driver.source_is_home(run.plan.guest)
        assert definitions(guest) == before
        assert guest.domain.migrateGetMaxDowntime() == downtime_ms
        drop_caches(guest)
        guest.run(["sh", "-c", f"seq 200000 | cmp - {MEANWHILE}"])
        assert guest.run(["cat", "/proc/sys/kernel/random/boot_id"]) == boot_id


def test_links_of_a_clone_can_be_pulled_and_of_a_guest_not(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        (nic,) = run.plan.guest.nics
        with pytest.raises(BugError, match="tag"):
            run.driver.set_link(guest.name, mac=nic.mac, up=False)
        assert "<link state='down'/>" not in guest.domain.XMLDesc()
        run.prepare()
        run.capture()
        clone = run.restore()
        domain = guest.connection.lookupByName(clone.name)
        run.driver.set_link(clone.name, mac=nic.mac.upper(), up=False)
        assert "<link state='down'/>" in domain.XMLDesc()
        run.driver.set_link(clone.name, mac=nic.mac, up=True)
        assert "<link state='down'/>" not in domain.XMLDesc()

        # A clone that was killed before it was asked to shut down is no clean one.
        domain.destroy()
        with pytest.raises(NotCleanError, match="before it was asked"):
            run.driver.shut_down_clone(clone, agent_answers=True, deadline=SHUTDOWN, cancel=Cancel())


def test_a_clone_killed_while_it_shuts_down_is_not_clean(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        clone = run.restore()
        domain = guest.connection.lookupByName(clone.name)
        # Paused, it cannot answer the power button.
        with pytest.raises(DeadlineError):
            run.driver.shut_down_clone(clone, agent_answers=False, deadline=timedelta(seconds=1), cancel=Cancel())
        killer = threading.Timer(1.5, domain.destroy)
        killer.start()
        with pytest.raises(NotCleanError, match="not by a shutdown of its guest"):
            run.driver.shut_down_clone(clone, agent_answers=False, deadline=SHUTDOWN, cancel=Cancel())
        killer.join()


def test_the_disks_of_a_clone_whose_emulator_was_killed_are_not_read(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        clone = run.restore()
        run.resume()
        write = {"path": "/bin/sh", "arg": ["-c", "seq 100000 >/var/tmp/written && sync && touch /run/synced"]}
        request = json.dumps({"execute": "guest-exec", "arguments": write})
        run.driver.agent(clone.name).send(request, timeout=timedelta(seconds=30))
        wait_until(lambda: is_in_clone(run, domain=clone.name, path="/run/synced"), "the writing in the clone")
        pid = pid_of(clone.name)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        there = guest.connection.listAllDomains
        wait_until(lambda: clone.name not in {domain.name() for domain in there()}, "the clone's end")
        with pytest.raises(NotCleanError, match="before it had written all"):
            run.driver.clone_images(run.plan)


def expect_home(run: DriverRun, guest: LabGuest, definitions_before: tuple[str, str]) -> None:
    """The capture was given up: the guest runs on its own disk, and nothing was switched."""
    assert is_running(guest)
    assert run.driver.source_is_home(run.plan.guest)
    assert definitions(guest) == definitions_before
    assert guest.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
    assert guest.run(["echo", "alive"]) == "alive\n"


def test_a_cancelled_capture_leaves_the_guest_at_home(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    with memory_writer(guest), run_of(lab, guest, HASTY) as run:
        run.prepare()
        with pytest.raises(CancelledError):
            run.capture(Cancel(when=lambda: capture_job_runs(guest)))
        expect_home(run, guest, before)
        # Nothing is half done: a second attempt of the same run may follow. This one may be cancelled too late, when
        # all is taken already; then the release brings the guest home.
        # The first attempt's image may still fill the tmpfs, which is noticed as well.
        with pytest.raises((CancelledError, NotConvergingError)):
            run.capture(Cancel(when=lambda: True))
        assert is_running(guest)
        run.release()
        expect_home(run, guest, before)
        assert guest.domain.migrateGetMaxDowntime() == 300


def give_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the watcher give up at the first pass: on a busy host any guest may converge, whatever it writes."""
    hopeless = Convergence(ceiling_ms=1, downtime_ms=1, raised_at_pass=-5, raised_at=-5.0)
    monkeypatch.setattr(Convergence, "for_plan", staticmethod(lambda _plan: hopeless))


@pytest.mark.parametrize("mode", [OnNoConvergence.ABORT, OnNoConvergence.SUSPEND])
def test_a_guest_that_does_not_converge_is_left_alone(
    lab: Lab, guest: LabGuest, mode: OnNoConvergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_at_once(monkeypatch)
    # How much is left at the first look depends on the host's speed; here it never fits into the pause.
    monkeypatch.setattr(CaptureWatch, "_fits", lambda *_arguments: False)
    before = definitions(guest)
    settings = CaptureSettings(max_pause=HASTY.max_pause, on_no_convergence=mode, min_overlay_free_bytes=1 << 20)
    with memory_writer(guest), run_of(lab, guest, settings) as run:
        run.prepare()
        with pytest.raises(NotConvergingError) as caught:
            run.capture()
        assert caught.value.remedy is not None
        assert "capture.max_pause" in caught.value.remedy
        expect_home(run, guest, before)


def test_a_guest_suspended_for_the_rest_is_captured_and_runs_on(
    lab: Lab, guest: LabGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_at_once(monkeypatch)
    monkeypatch.setattr(CaptureWatch, "_fits", lambda *_arguments: True)
    settings = CaptureSettings(
        max_pause=timedelta(seconds=30), on_no_convergence=OnNoConvergence.SUSPEND, min_overlay_free_bytes=1 << 20
    )
    with memory_writer(guest), run_of(lab, guest, settings) as run:
        run.prepare()
        capture = run.capture()
        assert 0 < capture.pause_ms < settings.max_pause.total_seconds() * 1000
        assert is_running(guest)
        run.driver.release(run.driver.memory_resource(run.plan), deadline=DEADLINE)


def test_a_guest_suspended_for_too_long_is_let_go_on(
    lab: Lab, guest: LabGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = definitions(guest)
    give_up_at_once(monkeypatch)
    monkeypatch.setattr(CaptureWatch, "_fits", lambda *_arguments: True)
    settings = CaptureSettings(
        max_pause=timedelta(milliseconds=1), on_no_convergence=OnNoConvergence.SUSPEND, min_overlay_free_bytes=1 << 20
    )
    with memory_writer(guest), run_of(lab, guest, settings) as run:
        run.prepare()
        began = time.monotonic()
        # On a fast host the rest is copied before it can be aborted; then nothing is lost by keeping it.
        with suppress(NotConvergingError):
            run.capture()
        assert time.monotonic() - began < 30
        assert is_running(guest)
        run.release()
        expect_home(run, guest, before)


def test_a_deadline_ends_the_capture(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    settings = CaptureSettings(timeout=timedelta(seconds=0), min_overlay_free_bytes=1 << 20)
    with memory_writer(guest), run_of(lab, guest, settings) as run:
        run.prepare()
        with pytest.raises(DeadlineError, match="did not end within"):
            run.capture()
        expect_home(run, guest, before)

"""A real guest comes home whatever died in the middle: the run's process, libvirtd, the guest itself, the room it had."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import libvirt
import pytest

from integration.lab.commands import run as host_run
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    DEADLINE,
    HASTY,
    PATIENT,
    RUNTIME,
    DriverRun,
    child_of_run,
    definitions,
    drop_caches,
    is_running,
    memory_writer,
    new_driver,
    read_file_from_disk,
    restart_libvirtd,
    run_of,
    wait_until,
    write_file,
)
from vmsnap.errors import SafetyError, VmsnapError
from vmsnap.hypervisors.libvirt.memory import IMAGE_NAME
from vmsnap.hypervisors.libvirt.processes import pid_of
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.journal import ResourceKind
from vmsnap.network.fence import NetworkFence

MEANWHILE = "/var/tmp/meanwhile"


def image_grows(run: DriverRun) -> bool:
    """Whether a capture has begun. Asked of libvirt, the answer may come on a fast host when the capture is over."""
    image = Path(run.driver.memory_resource(run.plan).name) / IMAGE_NAME
    return image.exists() and image.stat().st_size > 0


@contextmanager
def killed_at(run: DriverRun, guest: LabGuest, *, stage: str) -> Iterator[None]:
    """Do the run in a process of its own and kill it at a stage."""
    child = child_of_run(run.plan.run, guest.name, stage=stage)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == stage:
                break
        if stage == "capturing":
            wait_until(lambda: image_grows(run), "the capture in the child")
        if stage == "restoring":
            clone = run.driver.clone_resource(run.plan).name
            wait_until(lambda: pid_of(clone) is not None, "the clone's process")
        assert child.poll() is None
        child.kill()
        child.wait(timeout=30)
        yield
    finally:
        child.kill()
        child.wait(timeout=30)
        if child.stdout is not None:
            child.stdout.close()


def everything_of(run: DriverRun) -> None:
    """What a journal would hold of a run that died: the intents, in their order."""
    driver, plan = run.driver, run.plan
    run.resources = [
        driver.overlays_resource(plan),
        driver.clone_overlays_resource(plan),
        driver.memory_resource(plan),
        driver.clone_resource(plan),
    ]


def test_killed_in_mid_capture(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    max_downtime_ms = guest.domain.migrateGetMaxDowntime()
    with memory_writer(guest), run_of(lab, guest) as run:
        # Noted before anything is made, as the journal does.
        everything_of(run)
        run.resources.insert(0, run.network.resource(run.fence))
        with killed_at(run, guest, stage="capturing"):
            run.release(driver=new_driver(lab))
            assert is_running(guest)
            assert definitions(guest) == before
            assert guest.domain.migrateGetMaxDowntime() == max_downtime_ms
            assert guest.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE
            assert run.overlay_files() == []


def test_killed_right_after_the_capture(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    max_downtime_ms = guest.domain.migrateGetMaxDowntime()
    with run_of(lab, guest) as run, killed_at(run, guest, stage="captured"):
        run.resources.append(run.network.resource(run.fence))
        write_file(guest, MEANWHILE, "written while the run was dead")
        # Without a journal: what is found by names and tags alone is enough.
        fresh = new_driver(lab)
        found = fresh.owned()
        assert {resource.kind for resource in found} == {
            ResourceKind.CLONE_OVERLAYS, ResourceKind.SOURCE_OVERLAYS, ResourceKind.MEMORY,
        }  # fmt: skip
        assert {resource.run for resource in found} == {run.plan.run}
        for resource in found:
            fresh.release(resource, deadline=DEADLINE)
        assert fresh.owned() == ()
        assert is_running(guest)
        assert definitions(guest) == before
        assert read_file_from_disk(guest, MEANWHILE) == "written while the run was dead"
    # What QEMU was allowed before is in the journal alone.
    guest.domain.migrateSetMaxDowntime(max_downtime_ms)


@pytest.mark.parametrize("stage", ["restoring", "restored"])
def test_killed_with_a_clone(lab: Lab, guest: LabGuest, stage: str) -> None:
    before = definitions(guest)
    with run_of(lab, guest) as run:
        with killed_at(run, guest, stage=stage):
            everything_of(run)
            # A fence is the last thing to go in a real run too: the clone's links are on it.
            run.resources.insert(0, NetworkFence().resource(run.fence))
            run.release(driver=new_driver(lab))
        # Nothing of the guest's memory is left, read or not.
        assert list(RUNTIME.glob("*/memory")) == []
        assert run.plan.run not in Path("/proc/mounts").read_text()
        assert pid_of(run.driver.clone_resource(run.plan).name) is None
        assert is_running(guest)
        assert definitions(guest) == before


def test_libvirtd_dies_in_mid_capture(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    failures: list[VmsnapError] = []
    with memory_writer(guest), run_of(lab, guest, HASTY) as run:
        run.prepare()

        def capture() -> None:
            try:
                run.capture()
            except VmsnapError as error:
                failures.append(error)

        worker = threading.Thread(target=capture)
        worker.start()
        wait_until(lambda: image_grows(run), "the capture")
        restart_libvirtd(guest)
        worker.join(timeout=120)
        assert not worker.is_alive()
        (failure,) = failures
        assert not isinstance(failure, SafetyError)
        assert is_running(guest)
        run.release()
        # A new libvirtd numbers the images in the live definition anew.
        assert definitions(guest)[1] == before[1]


def test_libvirtd_restarts_between_capture_and_return(lab: Lab, guest: LabGuest) -> None:
    before = definitions(guest)
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        write_file(guest, MEANWHILE, "written before libvirtd died")
        restart_libvirtd(guest)
        assert is_running(guest)
        run.release()
        assert definitions(guest)[1] == before[1]
        assert read_file_from_disk(guest, MEANWHILE) == "written before libvirtd died"


def snapshot_by_another(guest: LabGuest, file: Path) -> None:
    """What an operator or another tool does: one more overlay on top."""
    guest.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda' snapshot='external'><source file='{file}'/></disk></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )


def merge_of_another(guest: LabGuest, file: Path, below: str) -> None:
    guest.domain.blockCommit("vda", below, str(file), 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    wait_until(lambda: "ready='yes'" in guest.domain.XMLDesc(), "the other tool's commit")
    guest.domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    file.unlink()


def test_a_snapshot_by_somebody_else_on_top_is_respected(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        overlays = run.overlay_files()
        theirs = guest.disks[0].file.with_name("theirs.qcow2")
        snapshot_by_another(guest, theirs)
        resource = run.driver.overlays_resource(run.plan)
        with pytest.raises(SafetyError, match=r"theirs\.qcow2") as caught:
            run.driver.release(resource, deadline=DEADLINE)
        assert caught.value.remedy is not None
        assert run.overlay_files() == overlays
        assert str(theirs) in guest.domain.XMLDesc()
        assert is_running(guest)
        # As the remedy says.
        merge_of_another(guest, theirs, str(overlays[0]))
        run.release()


def test_another_tools_copy_is_not_taken_for_ours(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        copy = guest.disks[0].file.with_name("copy.qcow2")
        target = f"<disk type='file'><source file='{copy}'/><driver type='qcow2'/></disk>"
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        guest.domain.blockCopy("vda", target, {}, flags)
        try:
            with pytest.raises(VmsnapError, match="another block job"):
                run.driver.release(run.driver.overlays_resource(run.plan), deadline=DEADLINE)
            assert str(run.overlay_files()[0]) in guest.domain.XMLDesc()
        finally:
            guest.domain.blockJobAbort("vda", 0)
            copy.unlink()
        run.release()


def test_a_full_overlay_file_system_pauses_the_guest_until_it_is_home(lab: Lab, guest: LabGuest) -> None:
    folder = lab.scratch / "small"
    folder.mkdir()
    host_run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=755", "small", folder])
    try:
        settings = CaptureSettings(max_pause=PATIENT.max_pause, overlay_dir=str(folder), min_overlay_free_bytes=1 << 20)
        with run_of(lab, guest, settings) as run:
            run.prepare()
            run.capture()
            script = f"head -c 100000000 /dev/urandom >{MEANWHILE} && sync && sha256sum <{MEANWHILE} >{MEANWHILE}.sum"
            guest.run(["systemd-run", "--unit=lab-fill", "--collect", "sh", "-c", script])
            wait_until(lambda: guest.domain.state() == [3, libvirt.VIR_DOMAIN_PAUSED_IOERROR], "the full overlay")
            run.release()
            assert is_running(guest)
            wait_until(
                lambda: guest.exec(["test", "-s", f"{MEANWHILE}.sum"]).exit_status == 0, "the end of the writing"
            )
            drop_caches(guest)
            script = f"sha256sum <{MEANWHILE} | cmp - {MEANWHILE}.sum && rm {MEANWHILE} {MEANWHILE}.sum"
            guest.run(["sh", "-c", script])
    finally:
        host_run(["umount", folder])
        folder.rmdir()


def test_a_deadline_leaves_the_commit_running_and_the_next_try_ends_it(lab: Lab, guest: LabGuest) -> None:
    with run_of(lab, guest) as run:
        run.prepare()
        run.capture()
        guest.run(["sh", "-c", f"head -c 30000000 /dev/urandom >{MEANWHILE} && sync"])
        with pytest.raises(VmsnapError):
            run.driver.release(run.driver.overlays_resource(run.plan), deadline=timedelta(seconds=-1))
        assert len(run.overlay_files()) == 1
        assert is_running(guest)
        run.release()

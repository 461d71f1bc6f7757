"""A real guest whose clone runs on copies of its disks: reflinks made at the capture, or snapshots of its storage.

Reflinks stand for a storage's snapshots as well.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest

from integration.installation import Installation, default_policy
from integration.lab.client import LabClient
from integration.lab.commands import run as host_run
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import DEADLINE, PATIENT, drop_caches, is_running, run_in_clone, run_of, wait_until
from integration.test_kill import _kill_at, _reconcile, _require_home, _write
from integration.test_libvirt_contract import LibvirtHarness
from vmsnap.hypervisors.libvirt import copies, overlays
from vmsnap.hypervisors.libvirt.copies import CopiesDetail, CopyDetail
from vmsnap.linux.reflink import exclusive_bytes
from vmsnap.model.capture import CaptureSettings, Detach, DiskSnapshot, StorageCommands
from vmsnap.testing.hypervisor_contract import CopyingContract, HypervisorHarness

AT_ONCE = '[capture]\ndetach = "reflink"\n'
MIB = 1 << 20
BY_COMMAND = replace(
    PATIENT,
    disk_snapshot=DiskSnapshot.STORAGE,
    storage=StorageCommands(
        snapshot=("cp", "--reflink=always", "--preserve=ownership", "{source}", "{snapshot}"),
        remove=("rm", "{snapshot}"),
    ),
)
SUMS = (
    "sh",
    "-c",
    "sync; echo 3 >/proc/sys/vm/drop_caches; head -c 4000000 /dev/vdb | cat /var/tmp/root - | sha256sum",
)
LIMIT_S = 3
HANGS_S = 61.25  # no other program sleeps so long


@pytest.fixture(scope="module")
def on_xfs(lab: Lab) -> Iterator[LabGuest]:
    """A guest with a qcow2 and a raw disk on XFS."""
    disks = (DiskSpec(folder=lab.reflink), DiskSpec(content="blank", format="raw", folder=lab.reflink, blank_mib=64))
    with LabGuest(lab, GuestSpec(name=f"xfs-{secrets.token_hex(3)}", memory_mib=512, disks=disks)) as guest:
        yield guest


class TestLibvirtWithReflinks(CopyingContract):
    @pytest.fixture
    def harness(self, lab: Lab, on_xfs: LabGuest) -> Iterator[HypervisorHarness]:
        harness = LibvirtHarness(lab, on_xfs)
        harness.settings = replace(PATIENT, detach=Detach.AUTO)
        yield harness
        harness.close()


class TestLibvirtWithStorageSnapshots(CopyingContract):
    @pytest.fixture
    def harness(self, lab: Lab, on_xfs: LabGuest) -> Iterator[HypervisorHarness]:
        harness = LibvirtHarness(lab, on_xfs)
        harness.settings = replace(PATIENT, disk_snapshot=DiskSnapshot.STORAGE)
        yield harness
        harness.close()


def policy_at_once(lab: Lab) -> str:
    return AT_ONCE + default_policy(lab).split("\n", 1)[1]


def test_production_is_home_within_two_seconds_of_a_capture_under_load(on_xfs: LabGuest, vmsnap: Installation) -> None:
    vmsnap.policy(on_xfs.name, policy_at_once(on_xfs.lab))
    assert any(item["check"] == "detach" for item in vmsnap.ok("doctor", on_xfs.name)["findings"])
    on_xfs.start_pgbench(clients=2)
    try:
        with LabClient(on_xfs.address()) as client:
            client.wait_for_more(5)
            report = vmsnap.ok("backup", on_xfs.name)
            client.wait_for_more(5)
    finally:
        on_xfs.stop_pgbench()
    seconds = report["capture"]["on_overlay_seconds"]
    steps = {step["name"]: step["seconds"] for step in report["steps"]}
    print(f"on its overlays for {seconds} s of a run of {sum(steps.values()):.0f} s; detach took {steps['detach']} s")
    assert seconds < 2
    assert not list(on_xfs.lab.reflink.glob("*/vmsnap-*"))


@pytest.mark.parametrize(("step", "delay_s"), [("detach", 0.05), ("drain", 0.0)])
def test_a_run_with_copies_killed(on_xfs: LabGuest, vmsnap: Installation, step: str, delay_s: float) -> None:
    vmsnap.policy(on_xfs.name, policy_at_once(on_xfs.lab))
    on_xfs.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    _kill_at(vmsnap, "backup", on_xfs.name, step=step, delay_s=delay_s)
    _write(on_xfs, 2)
    if step == "drain":
        assert ".source.qcow2" not in on_xfs.domain.XMLDesc(0), "it was home long before"
    _reconcile(vmsnap)
    _require_home(on_xfs, counter=2)
    assert not list(on_xfs.lab.reflink.glob("*/vmsnap-*"))


@pytest.fixture(params=["xfs", "btrfs", "btrfs without copy-on-write"])
def file_system(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a file system with reflinks."""
    folder = lab.scratch / "shares"
    backing = lab.scratch / "shares.raw"
    with backing.open("wb") as file:
        file.truncate(512 * MIB)
    host_run([*(("mkfs.xfs", "-q") if request.param == "xfs" else ("mkfs.btrfs", "-q")), backing])
    folder.mkdir()
    host_run(["mount", "-o", "loop", backing, folder])
    try:
        yield folder
    finally:
        host_run(["umount", folder])
        folder.rmdir()
        backing.unlink()


def test_a_copy_keeps_what_its_disk_held(file_system: Path, request: pytest.FixtureRequest) -> None:
    """Also of a disk that libvirt made without copy-on-write, as it does on btrfs, in a folder that has it."""
    disk = file_system / "db1.raw"
    disk.touch()
    if "without" in str(request.node.name):
        subprocess.run(["chattr", "+C", str(disk)], check=True)
    disk.write_bytes(os.urandom(8 * MIB))
    before = disk.read_bytes()
    copy = file_system / "vmsnap-0123456789-vda.base"
    detail = CopiesDetail(copies=(CopyDetail(target="vda", path=str(copy), disk=str(disk)),))
    copies.create(detail, min_free_bytes=1)
    copies.fill(detail)
    with disk.open("r+b") as file:
        file.write(os.urandom(4 * MIB))
        os.fsync(file.fileno())
    assert copy.read_bytes() == before
    assert (exclusive_bytes(copy) or 0) <= 5 * MIB
    copies.delete(detail)
    assert not copy.exists()


def test_a_copy_of_a_chain_stands_on_the_same_base(file_system: Path) -> None:
    """A qcow2 disk names its own base by a path relative to itself; the clone's overlay is over the copy."""
    base, disk = file_system / "base.raw", file_system / "db1.qcow2"
    base.write_bytes(b"a" * MIB)
    host_run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", disk])
    host_run(["qemu-io", "-c", "write -P 0x62 0 64k", disk])
    copy, overlay = file_system / "vmsnap-0123456789-vda.base", file_system / "vmsnap-0123456789-vda.clone.qcow2"
    detail = CopiesDetail(copies=(CopyDetail(target="vda", path=str(copy), disk=str(disk)),))
    copies.create(detail, min_free_bytes=1)
    overlays.create_overlay(overlay, base=str(copy), base_format="qcow2", size_bytes=MIB)
    copies.fill(detail)
    host_run(["qemu-io", "-c", "write -P 0x63 0 1M", disk])
    host_run(["qemu-img", "convert", "-O", "raw", overlay, file_system / "seen.raw"])
    assert (file_system / "seen.raw").read_bytes() == b"b" * 65536 + b"a" * (MIB - 65536)


def _write_both(guest: LabGuest) -> str:
    for path in ("/var/tmp/root", "/dev/vdb"):
        guest.run(["sh", "-c", f"head -c 4000000 /dev/urandom >{path}"])
    return guest.run(SUMS)


@pytest.mark.parametrize("settings", [BY_COMMAND, replace(PATIENT, detach=Detach.REFLINK)], ids=["storage", "reflinks"])
def test_the_clone_reads_what_was_frozen_while_production_writes_to_its_own_disks(
    lab: Lab, on_xfs: LabGuest, settings: CaptureSettings
) -> None:
    before = on_xfs.domain.XMLDesc(0)
    old = _write_both(on_xfs)
    with run_of(lab, on_xfs, settings) as run:
        run.resources.append(run.driver.copies_resource(run.plan))
        run.driver.prepare_copies(run.plan)
        run.prepare()
        capture = run.capture()
        print(f"stood still for {capture.pause_ms:.0f} ms: {[(part.name, round(part.ms)) for part in capture.parts]}")
        assert is_running(on_xfs)
        run.driver.release(run.driver.overlays_resource(run.plan), deadline=DEADLINE)
        assert run.driver.source_is_home(run.plan.guest)
        assert len(list(lab.reflink.glob("*/vmsnap-*.base"))) == 2
        new = _write_both(on_xfs)
        assert new != old
        run.restore()
        run.resume()
        assert run_in_clone(run, SUMS) == old
    assert on_xfs.domain.XMLDesc(0) == before
    assert not list(lab.reflink.glob("*/vmsnap-*"))
    drop_caches(on_xfs)
    assert on_xfs.run(SUMS) == new


def _policy(lab: Lab, *, began: Path) -> str:
    script = f"touch {began}; cp --reflink=always $1 $2; exec sleep {HANGS_S}"
    return (
        f'[capture]\ndisk_snapshot = "storage"\nstorage_timeout = "{LIMIT_S}s"\n'
        + default_policy(lab).split("\n", 1)[1]
        + f'[capture.storage]\nsnapshot = ["sh", "-c", "{script}", "sh", "{{source}}", "{{snapshot}}"]\n'
        + 'remove = ["rm", "{snapshot}"]\n'
    )


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_the_guest_goes_on_whatever_becomes_of_the_agent(
    on_xfs: LabGuest, vmsnap: Installation, fate: signal.Signals
) -> None:
    """The agent dies, or hangs, in the middle of the storage's work."""
    began = on_xfs.lab.scratch / f"storage-{fate.name}"
    vmsnap.policy(on_xfs.name, _policy(on_xfs.lab, began=began))
    on_xfs.psql("DELETE FROM markers; INSERT INTO markers VALUES (1)")
    with vmsnap.start("backup", on_xfs.name) as process:
        limit_s = 60 * on_xfs.lab.time_factor
        wait_until(lambda: began.exists() or process.poll() is not None, "the storage's command", limit_s=limit_s)
        assert process.poll() is None, process.communicate()[0]
        assert on_xfs.domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
        os.kill(process.pid, fate)
        at = time.monotonic()
        wait_until(lambda: is_running(on_xfs), "the guest", limit_s=30)
        seconds = time.monotonic() - at
        print(f"{fate.name}: the guest went on after {seconds:.2f} s")
        assert seconds < (1 if fate == signal.SIGKILL else LIMIT_S + 2 + 1) * max(1.0, on_xfs.lab.time_factor / 4)
        _write(on_xfs, 2)
        os.kill(process.pid, signal.SIGCONT)
        output = process.communicate(timeout=120 * on_xfs.lab.time_factor)[0]
    assert process.returncode == (-9 if fate == signal.SIGKILL else 6), output
    _reconcile(vmsnap)
    _require_home(on_xfs, counter=2)
    assert not vmsnap.ok("list", on_xfs.name)["snapshots"]
    assert not list(on_xfs.lab.reflink.glob("*/vmsnap-*"))
    began.unlink()
    sleeping = subprocess.run(["pgrep", "-f", f"sleep {HANGS_S}"], capture_output=True, text=True, check=False).stdout
    assert not sleeping, "the command ended with its agent"

"""A real guest whose storage takes the snapshots while it stands still; reflink copies stand for a storage's snapshots."""

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
from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import PATIENT, drop_caches, is_running, run_in_clone, run_of, wait_until
from integration.test_kill import _reconcile, _require_home, _write
from integration.test_libvirt_contract import LibvirtHarness
from vmsnap.model.capture import DiskSnapshot, StorageCommands
from vmsnap.testing.hypervisor_contract import CopyingContract, HypervisorHarness

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
    with LabGuest(lab, GuestSpec(name=f"storage-{secrets.token_hex(3)}", memory_mib=512, disks=disks)) as guest:
        yield guest


class TestLibvirtWithStorageSnapshots(CopyingContract):
    @pytest.fixture
    def harness(self, lab: Lab, on_xfs: LabGuest) -> Iterator[HypervisorHarness]:
        harness = LibvirtHarness(lab, on_xfs)
        harness.settings = replace(PATIENT, disk_snapshot=DiskSnapshot.STORAGE)
        yield harness
        harness.close()


def _write_both(guest: LabGuest) -> str:
    for path in ("/var/tmp/root", "/dev/vdb"):
        guest.run(["sh", "-c", f"head -c 4000000 /dev/urandom >{path}"])
    return guest.run(SUMS)


def test_the_clone_reads_what_the_storage_froze_and_production_never_leaves_its_disks(
    lab: Lab, on_xfs: LabGuest
) -> None:
    before = on_xfs.domain.XMLDesc(0)
    old = _write_both(on_xfs)
    with run_of(lab, on_xfs, BY_COMMAND) as run:
        run.resources.append(run.driver.copies_resource(run.plan))
        run.driver.prepare_copies(run.plan)
        run.prepare()
        run.build_fence()
        capture = run.capture()
        print(f"stood still for {capture.pause_ms:.0f} ms: {[(part.name, round(part.ms)) for part in capture.parts]}")
        assert is_running(on_xfs)
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
        wait_until(began.exists, "the storage's command", limit_s=60 * on_xfs.lab.time_factor)
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

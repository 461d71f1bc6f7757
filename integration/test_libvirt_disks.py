"""A real guest with firmware and three kinds of disks: taken and put back in one go."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from integration.lab.domain import DiskSpec, GuestSpec
from integration.lab.guest import LabGuest
from integration.lab.lab import Lab
from integration.libvirt_runs import (
    PATIENT,
    Cancel,
    DriverRun,
    definitions,
    drop_caches,
    is_running,
    run_in_clone,
    run_of,
)
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.guest import DiskKind, Severity

# What a guest made by virt-manager has beside disks and NICs: a screen behind a password, and USB for its viewer.
DESKTOP = (
    "<graphics type='spice' autoport='yes' passwd='lab-pass'><listen type='address'/></graphics>",
    "<graphics type='vnc' port='-1' autoport='yes' passwd='lab-pass'><listen type='address'/></graphics>",
    "<video><model type='qxl'/></video>",
    "<controller type='usb' model='qemu-xhci' ports='15'/>",
    "<input type='tablet' bus='usb'/>",
    "<redirdev bus='usb' type='spicevmc'/>",
    "<channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>",
    "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>",
)
LIBOSINFO = """
<metadata>
  <libosinfo:libosinfo xmlns:libosinfo="http://libosinfo.org/xmlns/libvirt/domain/1.0">
    <libosinfo:os id="http://debian.org/debian/12"/>
  </libosinfo:libosinfo>
</metadata>
"""
SUMS = ("sha256sum", "/data/raw", "/mnt/blank/block", "/var/tmp/root")


@pytest.fixture(scope="module")
def rich_guest(lab: Lab) -> Iterator[LabGuest]:
    """A guest with a qcow2, a raw and a block disk, firmware variables, and what desktops have."""
    spec = GuestSpec(
        name=f"rich-{secrets.token_hex(3)}",
        disks=(DiskSpec(), DiskSpec(content="data", format="raw"), DiskSpec(content="blank", format="block")),
        nvram=True,
        extra_devices=DESKTOP,
        extra_domain=(LIBOSINFO,),
    )
    with LabGuest(lab, spec) as guest:
        guest.run(["sh", "-c", "mkfs.ext4 -q /dev/vdc && mkdir /mnt/blank && mount /dev/vdc /mnt/blank"])
        yield guest


@pytest.fixture
def overlay_dir(lab: Lab) -> Iterator[Path]:
    folder = lab.scratch / "overlays"
    folder.mkdir(mode=0o711)
    yield folder
    folder.rmdir()


def write_everywhere(guest: LabGuest) -> str:
    """Write to all three disks; returns the checksums."""
    for path in ("/data/raw", "/mnt/blank/block", "/var/tmp/root"):
        guest.run(["sh", "-c", f"head -c 5000000 /dev/urandom >{path}"])
    guest.run(["sync"])
    return guest.run(SUMS)


def test_a_block_device_needs_a_folder_for_its_overlay(lab: Lab, rich_guest: LabGuest) -> None:
    with run_of(lab, rich_guest) as run:
        assert [disk.kind for disk in run.plan.guest.disks] == [DiskKind.FILE, DiskKind.FILE, DiskKind.BLOCK]
        found = run.driver.findings(run.plan.guest, settings=PATIENT)
        (refusal,) = (finding for finding in found if finding.severity is Severity.REFUSAL)
        assert refusal.check == "disk vdc"
        assert refusal.remedy is not None
        assert "capture.overlay_dir" in refusal.remedy


def test_all_disks_are_taken_at_one_instant_and_come_back(lab: Lab, rich_guest: LabGuest, overlay_dir: Path) -> None:
    settings = CaptureSettings(
        max_pause=PATIENT.max_pause,
        min_overlay_free_bytes=1 << 20,
        overlay_dir=str(overlay_dir),
        allow_emulation=True,
    )
    before = definitions(rich_guest)
    assert before[1].count("passwd='lab-pass'") == 2
    old = write_everywhere(rich_guest)
    with run_of(lab, rich_guest, settings) as run:
        found = run.driver.findings(run.plan.guest, settings=settings)
        assert [finding for finding in found if finding.severity is Severity.REFUSAL] == []
        run.prepare()
        capture = run.capture()
        assert 0 < capture.pause_ms < settings.max_pause.total_seconds() * 1000
        assert {path.parent for path in run.overlay_files()} == {overlay_dir}
        new = write_everywhere(rich_guest)
        assert new != old

        clone = run.restore()
        assert run.driver.clone_nvram(run.plan) != run.plan.guest.nvram
        run.resume()
        assert clone_sums(run) == old
        assert (
            run.driver.shut_down_clone(clone, agent_answers=True, deadline=timedelta(seconds=180), cancel=Cancel())
            == "guest agent"
        )
        images = run.driver.clone_images(run.plan)
        assert [image.target for image in images] == ["vda", "vdb", "vdc"]
        assert all(Path(image.path).is_file() for image in images)

        run.release()
        assert is_running(rich_guest)
        assert definitions(rich_guest) == before
        assert list(overlay_dir.iterdir()) == []
        drop_caches(rich_guest)
        assert rich_guest.run(SUMS) == new


def clone_sums(run: DriverRun) -> str:
    """The checksums as the clone reads them from its disks, not from the memory it inherited."""
    run_in_clone(run, ("sh", "-c", "sync; echo 3 >/proc/sys/vm/drop_caches"))
    return run_in_clone(run, SUMS)

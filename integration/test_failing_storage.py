"""What a clone wrote into the page cache and the host could not write to its disk: seen, before the overlay counts as whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from integration.lab.commands import run
from integration.lab.lab import Lab
from vmsnap.errors import NotCleanError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail
from vmsnap.model.guest import DiskKind

MIB = 1 << 20


@pytest.fixture
def thin(lab: Lab) -> Iterator[Path]:
    """A file system on a disk that promises more than it has, as a thin pool that runs full does."""
    under, mount = lab.scratch / "thin-pool", lab.scratch / "thin"
    with ExitStack() as stack:
        for folder in (under, mount):
            folder.mkdir()
            stack.callback(shutil.rmtree, folder)
        run(["mount", "-t", "tmpfs", "-o", "size=40m", "thin", under])
        stack.callback(run, ["umount", under])
        run(["truncate", "--size", "400M", under / "disk"])
        # Nothing is left to be initialised later, and nothing is discarded.
        run(["mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=0", "-O", "^has_journal", under / "disk"])
        run(["mount", "-o", "loop", under / "disk", mount])
        stack.callback(run, ["umount", mount])
        yield mount


def overlay_on(folder: Path) -> OverlaysDetail:
    base = folder / "base.raw"
    run(["truncate", "--size", str(200 * MIB), base])
    disk = OverlayDetail(
        target="vda",
        overlay=str(folder / "vmsnap-0123456789-vda.clone.qcow2"),
        base=str(base),
        base_format="raw",
        base_kind=DiskKind.FILE,
        size_bytes=200 * MIB,
    )
    detail = OverlaysDetail(uuid="0b0f1e4c-7d2d-4f0e-8a3e-2f6f2d9d3c11", disks=(disk,))
    overlays.create(detail, marked=True)
    return detail


def write(detail: OverlaysDetail, *, mib: int) -> None:
    """Write as a clone does; QEMU hears of no error, and closes the overlay in order."""
    command = ["-c", f"write -P 7 0 {mib}M", "-c", "flush"]
    run(["qemu-io", "-t", "unsafe", "-f", "qcow2", *command, detail.disks[0].overlay])


def test_an_overlay_that_the_hosts_disk_did_not_take_is_not_whole(thin: Path) -> None:
    detail = overlay_on(thin)
    write(detail, mib=4)
    overlays.require_whole(detail)
    write(detail, mib=100)
    with pytest.raises(NotCleanError, match="could not write all of the clone's disk vda") as caught:
        overlays.require_whole(detail)
    assert caught.value.remedy is not None

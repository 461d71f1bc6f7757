"""Copies by reflink: their names, when they can be made, and what is said where they cannot."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.libvirt_domains import RUN, domain_xml, plan_of
from vmsnap.errors import DriverError, NoSpaceError, VmsnapError
from vmsnap.hypervisors.libvirt import copies, overlays
from vmsnap.hypervisors.libvirt.copies import CopiesDetail, CopyDetail
from vmsnap.model.capture import CaptureMode, CapturePlan, CaptureSettings, Detach, OnNoConvergence
from vmsnap.model.guest import Disk, DiskKind, Severity

MIB = 1 << 20


def disk(source: Path, *, target: str = "vda", kind: DiskKind = DiskKind.FILE) -> Disk:
    return Disk(target=target, kind=kind, source=str(source), image_format="raw", size_bytes=MIB)


def plan_on(*disks: Disk, detach: Detach = Detach.REFLINK) -> CapturePlan:
    plan = plan_of(domain_xml())
    return replace(plan, guest=replace(plan.guest, disks=disks), settings=CaptureSettings(detach=detach))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "db1.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture
def can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.linux.reflink.can_reflink", lambda folder: True)


@pytest.fixture
def cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmsnap.linux.reflink.can_reflink", lambda folder: False)


def test_a_copy_lies_beside_its_disk_and_its_name_tells_run_and_target(image: Path) -> None:
    (copy,) = copies.describe(plan_on(disk(image))).copies
    assert Path(copy.path).parent == image.parent
    assert copies.parse_name(copy.path) == (RUN, "vda")
    assert overlays.parse_name(copy.path) is None
    assert [copies.parse_name(name) for name in ("db1.raw", f"my-{Path(copy.path).name}", f"{copy.path}.bak")] == [
        None
    ] * 3


def test_the_clones_overlays_are_over_the_copies_and_the_sources_over_the_disks(image: Path) -> None:
    plan = plan_on(disk(image))
    (copy,) = copies.describe(plan).copies
    assert [item.base for item in overlays.describe(plan, role="clone").disks] == [copy.path]
    assert [item.base for item in overlays.describe(plan, role="source").disks] == [str(image)]
    late = plan_on(disk(image), detach=Detach.LATE)
    assert [item.base for item in overlays.describe(late, role="clone").disks] == [str(image)]


@pytest.mark.usefixtures("can")
def test_auto_is_reflink_only_where_every_disk_can(image: Path, tmp_path: Path) -> None:
    auto = CaptureSettings(detach=Detach.AUTO)
    good = plan_on(disk(image)).guest
    assert copies.settle(good, settings=auto, mode=CaptureMode.LIVE) is Detach.REFLINK
    for other in (
        disk(Path("/dev/sda"), target="vdb", kind=DiskKind.BLOCK),
        disk(tmp_path / "gone.raw", target="vdb"),
    ):
        mixed = plan_on(disk(image), other).guest
        assert copies.settle(mixed, settings=auto, mode=CaptureMode.LIVE) is Detach.LATE
        finding = copies.check(mixed, settings=auto, mode=CaptureMode.LIVE)
        assert finding.severity is Severity.OK
        assert "vdb" in finding.message
        refusal = copies.check(mixed, settings=CaptureSettings(detach=Detach.REFLINK), mode=CaptureMode.LIVE)
        assert (refusal.severity, refusal.check) == (Severity.REFUSAL, "detach")
        assert "vdb" in refusal.message
        assert 'capture.detach = "auto"' in (refusal.remedy or "")


@pytest.mark.usefixtures("can")
def test_a_capture_that_may_be_instant_waits(image: Path) -> None:
    """Its clone opens its disks before the capture, so that there is nothing in the copies yet."""
    guest = plan_on(disk(image)).guest
    falls_back = CaptureSettings(detach=Detach.AUTO, on_no_convergence=OnNoConvergence.INSTANT)
    auto = CaptureSettings(detach=Detach.AUTO)
    assert copies.settle(guest, settings=falls_back, mode=CaptureMode.LIVE) is Detach.LATE
    assert copies.settle(guest, settings=falls_back, mode=CaptureMode.BOOT) is Detach.REFLINK
    assert copies.settle(guest, settings=auto, mode=CaptureMode.INSTANT) is Detach.LATE
    refusal = copies.check(guest, settings=CaptureSettings(detach=Detach.REFLINK), mode=CaptureMode.INSTANT)
    assert refusal.severity is Severity.REFUSAL


@pytest.mark.usefixtures("can")
def test_a_link_to_another_file_system_cannot_be_copied(tmp_path: Path) -> None:
    target = Path("/dev/shm") / f"vmsnap-test-{os.getpid()}"
    assert target.parent.stat().st_dev != tmp_path.stat().st_dev
    target.write_bytes(b"")
    try:
        (tmp_path / "link").symlink_to(target)
        assert "link" in (copies.obstacle(disk(tmp_path / "link")) or "")
    finally:
        target.unlink()


def test_a_policy_that_waits_asks_no_file_system(image: Path, cannot: None) -> None:
    late = CaptureSettings(detach=Detach.LATE)
    guest = plan_on(disk(image)).guest
    assert copies.settle(guest, settings=late, mode=CaptureMode.LIVE) is Detach.LATE
    assert "until the clone's disks are stored" in copies.check(guest, settings=late, mode=CaptureMode.LIVE).message
    assert copies.settle(guest, settings=CaptureSettings(detach=Detach.AUTO), mode=CaptureMode.LIVE) is Detach.LATE


@pytest.mark.usefixtures("can")
def test_copies_are_made_empty_private_and_anew(image: Path) -> None:
    image.chmod(0o664)
    detail = copies.describe(plan_on(disk(image)))
    path = Path(detail.copies[0].path)
    path.write_bytes(b"left by somebody")
    copies.create(detail, min_free_bytes=1)
    status = path.stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_uid) == (0, 0o600, image.stat().st_uid)
    copies.delete(detail)
    copies.delete(detail)
    assert not path.exists()
    with pytest.raises(NoSpaceError):
        copies.create(detail, min_free_bytes=1 << 60)
    assert not path.exists()


def test_a_file_system_without_reflinks_is_an_error_with_a_way_out(image: Path) -> None:
    """Where this test runs on a file system with reflinks, the copy has to be right instead."""
    detail = copies.describe(plan_on(disk(image)))
    copies.create(detail, min_free_bytes=1)
    image.write_bytes(b"x" * MIB)
    try:
        copies.fill(detail)
    except VmsnapError as error:
        assert 'capture.detach = "late"' in (error.remedy or "")  # noqa: PT017 - or no error
    else:
        assert Path(detail.copies[0].path).read_bytes() == image.read_bytes()
    copies.delete(detail)


def test_no_other_file_is_deleted(image: Path) -> None:
    with pytest.raises(DriverError, match="left alone"):
        copies.delete(CopiesDetail(copies=(CopyDetail(target="vda", path=str(image), disk=str(image)),)))
    assert image.exists()

"""Overlays: their names, their files, and what may be asked of them."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.libvirt_domains import RUN, SIZE_BYTES, UUID, domain_xml, plan_of
from vmsnap.errors import DriverError, NotCleanError, PreconditionError, ToolError, VmsnapError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlayName, OverlaysDetail
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.guest import DiskKind
from vmsnap.model.ids import RunId

MIB = 1 << 20


def qemu_io(path: Path, *, command: str) -> None:
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", command, str(path)], check=True, capture_output=True, timeout=30)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "db1.raw"
    path.write_bytes(b"production" * 1000)
    os.truncate(path, MIB)
    return path


def detail_of(folder: Path, *, base: Path, role: str = "source") -> OverlaysDetail:
    return OverlaysDetail(
        uuid=UUID,
        disks=(
            OverlayDetail(
                target="vda",
                overlay=str(folder / f"vmsnap-{RUN}-vda.{role}.qcow2"),
                base=str(base),
                base_format="raw",
                base_kind=DiskKind.FILE,
                size_bytes=MIB,
            ),
        ),
    )


@given(
    run=st.text("0123456789abcdef", min_size=10, max_size=10),
    target=st.text("abcdefghijklmnopqrstuvwxyzABCDEF0123456789", min_size=1, max_size=8),
    role=st.sampled_from(["source", "clone"]),
)
def test_a_name_says_run_target_and_role(run: str, target: str, role: str) -> None:
    parsed = overlays.parse_name(f"/srv/images/vmsnap-{run}-{target}.{role}.qcow2")
    assert parsed == OverlayName(run=RunId(run), target=target, role=role)


@pytest.mark.parametrize(
    "path",
    [
        "/srv/images/db1.qcow2",
        "/srv/vmsnap-0123456789-vda.source.qcow2/db1.qcow2",
        "/srv/vmsnap-0123456789-vda.source.qcow2.bak",
        "/srv/vmsnap-012345678-vda.source.qcow2",
        "/srv/vmsnap-0123456789-vda.other.qcow2",
        "/srv/my-vmsnap-0123456789-vda.source.qcow2",
        "/srv/vmsnap-0123456789-.source.qcow2",
        "/srv/vmsnap-0123456789-v/../a.source.qcow2",
        "",
    ],
)
def test_other_files_are_not_ours(path: str) -> None:
    assert overlays.parse_name(path) is None


def test_overlays_lie_beside_their_disks_or_in_the_policys_folder() -> None:
    beside = overlays.describe(plan_of(domain_xml("disk raw")), role="source")
    assert [(disk.overlay, disk.base, disk.base_format, disk.size_bytes) for disk in beside.disks] == [
        (f"/srv/images/vmsnap-{RUN}-vda.source.qcow2", "/srv/images/db1.qcow2", "qcow2", SIZE_BYTES),
        (f"/srv/images/vmsnap-{RUN}-vdb.source.qcow2", "/srv/images/db1-data.raw", "raw", SIZE_BYTES),
    ]
    plan = plan_of(domain_xml("disk block"), settings=CaptureSettings(overlay_dir="/srv/overlays"))
    elsewhere = overlays.describe(plan, role="clone")
    assert [(disk.overlay, disk.base_kind) for disk in elsewhere.disks] == [
        (f"/srv/overlays/vmsnap-{RUN}-vda.clone.qcow2", DiskKind.FILE),
        (f"/srv/overlays/vmsnap-{RUN}-sdb.clone.qcow2", DiskKind.BLOCK),
    ]
    assert beside.uuid == elsewhere.uuid == UUID


def test_what_the_journal_keeps_can_be_read_again() -> None:
    detail = overlays.describe(plan_of(domain_xml("disk raw", "disk block")), role="source")
    assert OverlaysDetail.model_validate_json(detail.model_dump_json()) == detail


def test_a_fresh_overlay_is_private_empty_and_reads_as_its_base(tmp_path: Path, base: Path) -> None:
    detail = detail_of(tmp_path, base=base)
    overlays.create(detail)
    path = Path(detail.disks[0].overlay)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size < MIB
    assert not overlays.holds_data(str(path))
    compared = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, base], capture_output=True, timeout=30, check=False
    )
    assert compared.returncode == 0, compared.stdout


@pytest.mark.parametrize("command", ["write -P 7 0 64k", "write -z 0 64k", "discard 0 64k"])
def test_whatever_is_written_counts_as_data_until_it_is_committed(tmp_path: Path, base: Path, command: str) -> None:
    detail = detail_of(tmp_path, base=base)
    overlays.create(detail)
    path = Path(detail.disks[0].overlay)
    qemu_io(path, command=command)
    assert overlays.holds_data(str(path))
    subprocess.run(["qemu-img", "commit", "-q", "-f", "qcow2", path], check=True, timeout=30)
    assert not overlays.holds_data(str(path))


def test_an_overlay_tells_whether_qemu_wrote_all_of_it(tmp_path: Path, base: Path) -> None:
    detail = detail_of(tmp_path, base=base, role="clone")
    overlays.create(detail, marked=True)
    overlays.require_whole(detail)
    path = Path(detail.disks[0].overlay)
    qemu_io(path, command="write -P 7 0 64k")
    overlays.require_whole(detail)
    killed = ("qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -P 8 64k 64k", "-c", "flush", "-c", "sigraise 9")
    assert subprocess.run([*killed, path], check=False, capture_output=True, timeout=30).returncode == -signal.SIGKILL
    with pytest.raises(NotCleanError, match="disk vda") as caught:
        overlays.require_whole(detail)
    assert caught.value.remedy is not None
    path.unlink()
    with pytest.raises(ToolError):
        overlays.require_whole(detail)


def test_a_missing_overlay_holds_nothing_and_an_unreadable_one_is_not_guessed_about(tmp_path: Path, base: Path) -> None:
    assert not overlays.holds_data(str(tmp_path / "gone.qcow2"))
    detail = detail_of(tmp_path, base=base)
    overlays.create(detail)
    base.unlink()
    with pytest.raises(VmsnapError):
        overlays.holds_data(detail.disks[0].overlay)


@contextmanager
def lock(path: Path, *, kind: int, start: int) -> Iterator[None]:
    """Hold one of QEMU's locks on an image: of an open file description, as QEMU's are."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, 1, 0))
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("start", [100, 101, 201, 203])
def test_sees_that_a_qemu_has_an_image_open(base: Path, start: int) -> None:
    assert not overlays.is_open(str(base))
    with lock(base, kind=fcntl.F_RDLCK, start=start):
        assert overlays.is_open(str(base))
    assert not overlays.is_open(str(base))


def test_locks_of_other_programs_do_not_count(base: Path) -> None:
    with lock(base, kind=fcntl.F_WRLCK, start=5):
        assert not overlays.is_open(str(base))


def test_a_missing_file_is_not_open(tmp_path: Path) -> None:
    assert not overlays.is_open(str(tmp_path / "gone.qcow2"))


def test_asking_leaves_no_lock_behind(base: Path) -> None:
    overlays.is_open(str(base))
    with lock(base, kind=fcntl.F_WRLCK, start=100):
        pass


def test_deleting_is_content_with_what_is_gone(tmp_path: Path, base: Path) -> None:
    detail = detail_of(tmp_path, base=base)
    overlays.create(detail)
    overlays.delete(detail)
    overlays.delete(detail)
    assert list(tmp_path.iterdir()) == [base]


def test_a_file_of_another_name_is_never_deleted(tmp_path: Path, base: Path) -> None:
    (disk,) = detail_of(tmp_path, base=base).disks
    with pytest.raises(DriverError, match="left alone"):
        overlays.delete(OverlaysDetail(uuid=UUID, disks=(disk.model_copy(update={"overlay": str(base)}),)))
    assert base.exists()


def test_a_link_in_the_place_of_an_overlay_is_not_followed(tmp_path: Path, base: Path) -> None:
    detail = detail_of(tmp_path, base=base)
    before = base.read_bytes()
    Path(detail.disks[0].overlay).symlink_to(base)
    with pytest.raises(VmsnapError):
        overlays.create(detail)
    assert base.read_bytes() == before


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path, base: Path) -> None:
    detail = detail_of(tmp_path / "gone", base=base)
    with pytest.raises(PreconditionError, match="gone") as caught:
        overlays.create(detail)
    assert caught.value.remedy
    with pytest.raises(PreconditionError):
        overlays.free_bytes(detail)

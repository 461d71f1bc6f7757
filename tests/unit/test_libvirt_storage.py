"""Snapshots that a guest's storage takes: by commands of the policy, while the guest stands still."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.sax.saxutils import escape

import libvirt
import pytest

from tests.unit.libvirt_domains import RUN, domain_xml, plan_of
from tests.unit.libvirt_fakes import RUNNING, FakeConnection, FakeDomain, disk_xml, domain_of
from vmsnap.errors import DeadlineError, DriverError, SafetyError, ToolError
from vmsnap.hypervisors.libvirt import copies, overlays, storage
from vmsnap.hypervisors.libvirt.commit import SourceReturn
from vmsnap.hypervisors.libvirt.events import Pause, PauseRecorder
from vmsnap.hypervisors.libvirt.overlays import OverlaysDetail
from vmsnap.hypervisors.libvirt.request import snapshot_xml
from vmsnap.hypervisors.libvirt.storage import AtRest, CommandSnapshot, ReflinkSnapshot
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CaptureMode, CapturePlan, CaptureSettings, DiskSnapshot, StorageCommands
from vmsnap.model.guest import Disk, DiskKind, Severity

COPY = StorageCommands(snapshot=("cp", "{source}", "{snapshot}"), remove=("rm", "{snapshot}"))
LVM = StorageCommands(
    snapshot=("lvcreate", "-s", "-n", "{snapshot}", "{source}"),
    remove=("lvremove", "-f", "{snapshot}"),
    path="/dev/vg0/{disk}-{name}",
)


def plan_with(commands: StorageCommands | None, *sources: Path) -> CapturePlan:
    plan = plan_of(domain_xml())
    disks = tuple(
        Disk(target=f"vd{'ab'[number]}", kind=DiskKind.FILE, source=str(source), image_format="raw", size_bytes=1 << 20)
        for number, source in enumerate(sources)
    )
    settings = CaptureSettings(disk_snapshot=DiskSnapshot.STORAGE, storage=commands)
    return replace(plan, guest=replace(plan.guest, disks=disks), settings=settings)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "db1 <1>.raw"
    path.write_bytes(b"as it is now")
    return path


class Recorder(PauseRecorder):
    """``went_on``: QEMU said so."""

    def __init__(self, *, went_on: bool = False) -> None:
        super().__init__(None, None)
        self._went_on = went_on

    def pause(self, *, timeout_seconds: float) -> Pause | None:
        now = datetime.now(UTC)
        return Pause(stopped=now, resumed=now) if self._went_on else None


class Guest(FakeDomain):
    def __init__(self) -> None:
        xml = domain_of(disk_xml("vda", "/srv/images/db1.raw"))
        super().__init__(live=xml, definition=xml)
        self.states = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN)


def test_a_snapshot_is_taken_of_each_disk_and_removed_again(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(b"another")
    plan = plan_with(COPY, image, other)
    detail = copies.describe(plan)
    assert isinstance(storage.storage_of(plan.settings), CommandSnapshot)
    guest = Guest()
    AtRest(plan)(guest, Recorder())
    assert guest.calls == ["resume"]
    assert [Path(copy.path).read_bytes() for copy in detail.copies] == [b"as it is now", b"another"]
    assert [item.base for item in overlays.describe(plan, role="clone").disks] == [copy.path for copy in detail.copies]
    kept = copies.CopiesDetail.model_validate_json(detail.model_dump_json())
    copies.delete(kept)
    copies.delete(kept)
    assert sorted(tmp_path.iterdir()) == sorted([image, other])


def test_where_a_storage_shows_its_snapshots(image: Path) -> None:
    (copy,) = copies.describe(plan_with(LVM, Path("/dev/vg0/db1"))).copies
    assert copy.path == f"/dev/vg0/db1-vmsnap-{RUN}-vda.base"
    assert copy.remove == ("lvremove", "-f", copy.path)
    assert isinstance(storage.storage_of(plan_with(None, image).settings), ReflinkSnapshot)


@pytest.mark.parametrize("went_on", [True, False], ids=["by QEMU's word", "by libvirt's word"])
def test_snapshots_of_a_guest_that_went_on_are_worth_nothing(image: Path, went_on: bool) -> None:  # noqa: FBT001
    guest = Guest()
    if not went_on:
        guest.states = RUNNING
    with pytest.raises(SafetyError, match="went on while its storage"):
        AtRest(plan_with(COPY, image))(guest, Recorder(went_on=went_on))
    assert guest.calls == []


def test_a_command_that_fails_or_hangs_is_an_error(image: Path) -> None:
    for snapshot, error in ((("false",), ToolError), (("sleep", "30"), DeadlineError)):
        commands = StorageCommands(snapshot=(*snapshot,), remove=("rm", "{snapshot}"))
        plan = plan_with(commands, image)
        hasty = replace(plan, settings=replace(plan.settings, storage_timeout=plan.settings.storage_timeout / 50))
        with pytest.raises(error):
            AtRest(hasty)(Guest(), Recorder())


def test_a_removal_that_removed_nothing_is_an_error(image: Path) -> None:
    plan = plan_with(StorageCommands(snapshot=COPY.snapshot, remove=("true", "{snapshot}")), image)
    AtRest(plan)(Guest(), Recorder())
    with pytest.raises(DriverError, match="still there"):
        copies.delete(copies.describe(plan))


def test_doctor_says_what_the_storage_lacks(image: Path) -> None:
    def found(commands: StorageCommands | None, mode: CaptureMode = CaptureMode.LIVE) -> list[tuple[Severity, str]]:
        plan = plan_with(commands, image)
        return [(item.severity, item.message) for item in storage.check(plan.guest, settings=plan.settings, mode=mode)]

    assert [severity for severity, _ in found(COPY)] == [Severity.OK]
    for commands, mode, says in (
        (COPY, CaptureMode.BOOT, "need mode live"),
        (StorageCommands(snapshot=("no-such-program",), remove=("rm",)), CaptureMode.LIVE, "no-such-program"),
    ):
        ((severity, message),) = found(commands, mode)
        assert severity is Severity.REFUSAL
        assert says in message


def test_libvirt_is_asked_for_the_memory_and_no_disk(image: Path) -> None:
    plan = plan_with(COPY, image)
    domain = parse(domain_of(disk_xml("vda", escape(str(image)), kind="raw")))
    detail = overlays.describe(plan, role="source")
    request = parse(snapshot_xml(domain, detail=detail, image=Path("/run/x/ram.save"), manual=True))
    assert [disk.attrib for disk in request.findall("disks/disk")] == [{"name": "vda", "snapshot": "manual"}]
    memory = request.find("memory")
    assert memory is not None
    assert memory.get("snapshot") == "external"


def test_a_guest_that_was_left_to_its_storage_goes_on_at_reconcile(image: Path) -> None:
    """Nobody else's pause of that kind is touched."""
    for by_storage, calls in ((True, ["resume"]), (False, [])):
        guest = Guest()
        detail = OverlaysDetail(uuid=guest.UUIDString(), disks=(), storage=by_storage)
        run = plan_with(COPY, image).run
        SourceReturn(FakeConnection(guest), run=run, guest="db1", detail=detail).run(deadline=timedelta(seconds=5))
        assert guest.calls == calls

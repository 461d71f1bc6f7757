"""Bitmaps of the guest's QEMU: which can be used, what they say, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import libvirt_qemu
import pytest

from tests.unit.libvirt_fakes import FakeDomain, disk_xml, domain_of
from vmsnap.errors import BugError, DriverError
from vmsnap.hypervisors.libvirt.bitmaps import parse_bitmap
from vmsnap.hypervisors.libvirt.hints import LibvirtHints
from vmsnap.model.capture import CapturePlan, CaptureSettings
from vmsnap.model.guest import Disk, DiskKind, Guest, GuestState
from vmsnap.model.ids import RunId, SnapshotId, new_run_id
from vmsnap.model.journal import Resource, ResourceKind

BASE = RunId("0123456789")
GUEST = Guest(
    name="db1",
    uuid="u",
    state=GuestState.RUNNING,
    memory_bytes=1 << 30,
    vcpus=1,
    disks=(Disk(target="vda", kind=DiskKind.FILE, source="/images/a", image_format="raw", size_bytes=1 << 20),),
    nics=(),
    has_agent_channel=False,
)
PLAN = CapturePlan(run=new_run_id(), guest=GUEST, settings=CaptureSettings())


class Qemu(FakeDomain):
    """A domain whose one disk has bitmaps: its file, and what QEMU says of each."""

    monitor_used = True

    def __init__(self) -> None:
        super().__init__(live=domain_of(disk_xml("vda", "/images/a")), definition=None)
        self.file = "/images/a"
        self.bitmaps: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []

    def note(self, name: str, **differently: object) -> None:
        self.bitmaps[name] = {"name": name, "recording": True, "busy": False, "count": 0} | differently

    def answer(self, request: dict[str, Any]) -> object:
        command, arguments = request["execute"], request.get("arguments", {})
        self.asked.append(command)
        if command == "query-named-block-nodes":
            return [
                {"node-name": "n1", "file": self.file, "dirty-bitmaps": list(self.bitmaps.values())},
                {"node-name": "n2"},
            ]
        if command == "query-block":
            return [{"inserted": {"file": self.file, "node-name": "n1"}}, {"device": "empty drive"}]
        if command == "query-block-exports":
            return []
        if command == "block-dirty-bitmap-add":
            self.note(arguments["name"])
        elif command == "block-dirty-bitmap-remove":
            del self.bitmaps[arguments["name"]]
        else:
            pytest.fail(f"QEMU is asked for {command}")
        return {}


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> Qemu:
    domain = Qemu()

    def command(_domain: object, text: str, _flags: int) -> str:
        return json.dumps({"return": domain.answer(json.loads(text))})

    monkeypatch.setattr(libvirt_qemu, "qemuMonitorCommand", command)
    return domain


@pytest.fixture
def hints(qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LibvirtHints:
    made = LibvirtHints("test:///none", runtime=tmp_path)
    monkeypatch.setattr(made._connection, "find_by_uuid", lambda _uuid: qemu)
    return made


@pytest.mark.parametrize(
    ("differently", "reason"),
    [
        ({"recording": False}, "somebody uses or has stopped"),
        ({"busy": True}, "somebody uses or has stopped"),
        ({"inconsistent": True}, "somebody uses or has stopped"),
    ],
)
def test_a_bitmap_that_cannot_be_used_is_a_reason_to_read_everything(
    hints: LibvirtHints, qemu: Qemu, differently: dict[str, bool], reason: str
) -> None:
    qemu.note(f"vmsnap-{BASE}-vda", **differently)
    (hint,) = hints.read(PLAN, since=SnapshotId(BASE))
    assert hint.written is None
    assert reason in hint.reason
    assert hints.known_since(GUEST) == ()


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [
        (f"vmsnap-{BASE}-vda", "/images/another", "are of /images/another, and disk vda is on /images/a now"),
        (f"vmsnap-{BASE}-vdb", "/images/a", "no notes since"),
        (f"vmsnap-{BASE}-vda-copy", "/images/a", "no notes since"),
        ("vmsnap-9876543210-vda", "/images/a", "no notes since"),
        (f"{BASE}-vda", "/images/a", "no notes since"),
    ],
)
def test_a_bitmap_of_another_disk_or_snapshot_says_nothing(
    hints: LibvirtHints, qemu: Qemu, name: str, file: str, reason: str
) -> None:
    qemu.file = file
    qemu.note(name)
    (hint,) = hints.read(PLAN, since=SnapshotId(BASE))
    assert hint.written is None
    assert reason in hint.reason
    assert SnapshotId(BASE) not in hints.known_since(GUEST)


def test_a_disk_that_qemu_does_not_show_has_no_notes(hints: LibvirtHints, qemu: Qemu) -> None:
    qemu.file = "json:{}"
    with pytest.raises(DriverError, match="which of its nodes"):
        hints.begin(PLAN)
    assert qemu.bitmaps == {}


def test_bitmaps_of_others_are_left_alone(hints: LibvirtHints, qemu: Qemu) -> None:
    for name in ("backup-of-another-tool", "vmsnap-nonsense", "libvirt-tmp", f"x-vmsnap-{BASE}-vda"):
        qemu.note(name)
    others = dict(qemu.bitmaps)
    hints.begin(PLAN)
    hints.keep(GUEST, run=None)
    hints.begin(PLAN)
    hints.release(hints.resource(PLAN), deadline=CaptureSettings().timeout)
    assert qemu.bitmaps == others


def test_a_guest_whose_monitor_nobody_used_is_not_asked(hints: LibvirtHints, qemu: Qemu) -> None:
    """Looking must not taint it."""
    qemu.monitor_used = False
    assert hints.known_since(GUEST) == ()
    hints.keep(GUEST, run=None)
    hints.release(hints.resource(PLAN), deadline=CaptureSettings().timeout)
    assert qemu.asked == []


def test_a_guest_that_is_off_or_gone_has_nothing_to_release(
    hints: LibvirtHints, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu.live, qemu.definition = None, domain_of()
    hints.release(hints.resource(PLAN), deadline=CaptureSettings().timeout)
    monkeypatch.setattr(hints._connection, "find_by_uuid", lambda _uuid: None)
    hints.release(hints.resource(PLAN), deadline=CaptureSettings().timeout)
    with pytest.raises(DriverError, match="gone"):
        hints.begin(PLAN)
    other = Resource(kind=ResourceKind.CLONE, run=PLAN.run, guest="db1", name="c")
    with pytest.raises(BugError):
        hints.release(other, deadline=CaptureSettings().timeout)


def test_marked_stretches_are_those_without_data() -> None:
    text = """[{ "start": 0, "length": 65536, "depth": 0, "present": false, "zero": false, "data": false},
        { "start": 65536, "length": 131072, "depth": 0, "present": true, "zero": false, "data": true, "offset": 65536}]"""
    assert list(parse_bitmap(text.splitlines(), size_bytes=196608)) == [(0, 65536)]


@pytest.mark.parametrize("text", ["", "[", "{}", "[{}]", '[{"start": "x", "length": 1, "data": false}]', "[1]", "null"])
def test_nonsense_is_not_taken_for_a_bitmap(text: str) -> None:
    with pytest.raises(DriverError):
        list(parse_bitmap([text], size_bytes=1))


def test_what_does_not_tell_of_the_whole_disk_is_no_answer() -> None:
    """What is left out would be taken for unchanged."""
    first, third = ({"start": start, "length": 65536, "data": True} for start in (0, 131072))
    for entries in ([], [first], [first, third], [third]):
        with pytest.raises(DriverError, match="bytes"):
            list(parse_bitmap(map(json.dumps, entries), size_bytes=196608))

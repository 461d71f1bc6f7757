"""What a capture asks of libvirt, and when it lets the guest stand still for longer or gives up."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.libvirt_domains import DISK_QCOW2, PARTS, domain_xml, plan_of
from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt import overlays, pauses
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.pauses import Mark
from vmsnap.hypervisors.libvirt.request import snapshot_xml
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import MEMORY_PART, CaptureSettings

IMAGE = Path("/run/vmsnap/0123456789/memory/ram.save")
pauses_ms = st.integers(1, 60_000)
# How many passes over memory QEMU has begun, as asked again and again: never fewer than before.
passes = st.lists(st.integers(0, 3), max_size=60).map(lambda steps: [sum(steps[: n + 1]) for n in range(len(steps))])
# How long a pass takes: long ones are those of a guest that writes a lot, short ones those of one that nearly converges.
SLOW_S, FAST_S = 1.0, 0.01
pass_seconds = st.floats(0.001, 10)


def decider(pause_ms: int, *, rest_ms: float | None = None) -> Convergence:
    settings = CaptureSettings(max_pause=timedelta(milliseconds=pause_ms))
    return Convergence.for_plan(replace(plan_of(domain_xml()), settings=settings, usual_rest_ms=rest_ms))


@given(pause_ms=pauses_ms, seen=passes, each_s=pass_seconds)
def test_the_last_pass_never_gets_longer_than_the_pause_allows(pause_ms: int, seen: list[int], each_s: float) -> None:
    convergence = decider(pause_ms)
    allowed = [convergence.downtime_ms]
    for number in seen:
        raised = convergence.after_pass(number, at=number * each_s)
        if raised is not None:
            assert raised == convergence.downtime_ms
            assert raised > allowed[-1]
            allowed.append(raised)
    assert allowed[0] <= 10
    assert all(0 < downtime <= max(1, pause_ms) for downtime in allowed)
    assert all(downtime <= convergence.ceiling_ms for downtime in allowed)


@given(pause_ms=pauses_ms, seen=passes, each_s=pass_seconds)
def test_it_is_raised_once_a_pass_and_not_before_the_third(pause_ms: int, seen: list[int], each_s: float) -> None:
    convergence = decider(pause_ms)
    raised_at = [number for number in seen if convergence.after_pass(number, at=number * each_s) is not None]
    assert all(number >= 3 for number in raised_at)
    assert len(raised_at) == len(set(raised_at))


def test_it_is_not_raised_faster_than_qemu_goes_by_it() -> None:
    convergence = decider(500)
    raised = {number: convergence.after_pass(number, at=number * FAST_S) for number in range(100)}
    assert {number: limit for number, limit in raised.items() if limit} == {33: 10, 63: 20, 93: 40}


@given(pause_ms=pauses_ms)
def test_every_guest_ends_converged_or_given_up(pause_ms: int) -> None:
    convergence = decider(pause_ms)
    for number in range(200):
        convergence.after_pass(number, at=number * SLOW_S)
        if convergence.gave_up(number, at=number * SLOW_S):
            assert convergence.downtime_ms == convergence.ceiling_ms
            return
    pytest.fail("never gave up")


@given(pause_ms=pauses_ms, seen=passes, each_s=pass_seconds)
def test_it_does_not_give_up_before_the_longest_pass_was_tried(pause_ms: int, seen: list[int], each_s: float) -> None:
    convergence = decider(pause_ms)
    changed_at = 0.0
    for number in seen:
        at, before = number * each_s, convergence.downtime_ms
        convergence.after_pass(number, at=at)
        changed_at = at if convergence.downtime_ms != before else changed_at
        if at - changed_at < 0.29 or convergence.downtime_ms < convergence.ceiling_ms:
            assert not convergence.gave_up(number, at=at)


@given(pause_ms=pauses_ms, rest_ms=st.floats(0, 1000))
def test_the_measured_rest_of_the_pause_is_left_free(pause_ms: int, rest_ms: float) -> None:
    convergence = decider(pause_ms, rest_ms=rest_ms)
    for number in range(100):
        convergence.after_pass(number, at=number * SLOW_S)
        # However long the rest was, a quarter of the promise is left: else such a guest could never be captured again.
        least_ms = max(1, round(pause_ms / 4))
        assert convergence.downtime_ms <= least_ms or convergence.downtime_ms + rest_ms <= pause_ms + 1


def at(ms: float) -> datetime:
    return datetime(2026, 11, 21, tzinfo=UTC) + timedelta(milliseconds=ms)


def test_the_parts_of_a_pause_add_up_to_it() -> None:
    marks = [
        Mark(part=pauses.STOPPING, at=at(-1)),  # an earlier pass
        Mark(part=pauses.STOPPING, at=at(4)),
        Mark(part=pauses.DISKS, at=at(15)),  # QEMU lets go of the disks; not the transaction yet
        Mark(part=MEMORY_PART, at=at(16)),
        Mark(part=pauses.IMAGE, at=at(20)),
        Mark(part=pauses.IMAGE, at=at(22)),
        Mark(part=pauses.DISKS, at=at(30)),
        Mark(part=pauses.DISKS, at=at(400)),  # the guest writes again
    ]
    parts = pauses.parts_of(stopped=at(0), resumed=at(33), marks=marks)
    assert [(part.name, round(part.ms, 3)) for part in parts] == [
        ("stop", 4), ("last pass and devices", 12), ("memory image", 6), ("disk transaction", 8), ("resume", 3),
    ]  # fmt: skip


def test_parts_that_were_not_seen_are_in_the_next() -> None:
    parts = pauses.parts_of(stopped=at(0), resumed=at(33), marks=[Mark(part=MEMORY_PART, at=at(16))])
    assert [(part.name, part.ms) for part in parts] == [("last pass and devices", 16), ("resume", 17)]
    parts = pauses.parts_of(stopped=at(0), resumed=at(33), marks=[])
    assert [(part.name, part.ms) for part in parts] == [("resume", 33)]


@given(moments=st.lists(st.tuples(st.sampled_from([*pauses.ORDER]), st.floats(-50, 150)), max_size=20))
def test_parts_add_up_whatever_was_seen(moments: list[tuple[str, float]]) -> None:
    marks = [Mark(part=part, at=at(moment)) for part, moment in moments]
    parts = pauses.parts_of(stopped=at(0), resumed=at(100), marks=marks)
    assert sum(part.ms for part in parts) == pytest.approx(100)
    assert all(part.ms >= 0 for part in parts)


def request(xml: str, *, of: str | None = None) -> ET.Element:
    """The request for a guest that is as ``xml`` says now and was as ``of`` says when the run began."""
    detail = overlays.describe(plan_of(of or xml), role="source")
    return parse(snapshot_xml(parse(xml), detail=detail, image=IMAGE))


def test_takes_memory_and_every_writable_disk_in_one_go() -> None:
    root = request(domain_xml("disk raw", "disk block", "cdrom empty", "cdrom with iso"))
    (memory,) = root.findall("memory")
    assert memory.attrib == {"snapshot": "external", "file": str(IMAGE)}
    disks = {disk.get("name"): disk for disk in root.findall("disks/disk")}
    assert {name: disk.get("snapshot") for name, disk in disks.items()} == {
        "vda": "external", "vdb": "external", "sdb": "external", "sda": "no", "sdc": "no",
    }  # fmt: skip
    for name in ("vda", "vdb", "sdb"):
        assert disks[name].get("type") == "file"
        assert [driver.get("type") for driver in disks[name].findall("driver")] == ["qcow2"]
        sources = [source.get("file") for source in disks[name].findall("source")]
        assert sources == [f"/srv/overlays/vmsnap-0123456789-{name}.source.qcow2"]


@pytest.mark.parametrize(
    ("now", "of", "says"),
    [
        (domain_xml("disk raw"), domain_xml(), "was added"),
        (domain_xml(), domain_xml("disk raw"), "was taken"),
        (domain_xml(disks=DISK_QCOW2.replace("db1.qcow2", "db1.snap1")), domain_xml(), "changed"),
        (
            domain_xml(disks=DISK_QCOW2.replace("<serial>", "<mirror type='file' job='copy'/><serial>")),
            domain_xml(),
            "changed",
        ),
    ],
)
def test_disks_that_are_not_those_of_the_overlays_are_refused(now: str, of: str, says: str) -> None:
    with pytest.raises(SafetyError, match=says) as caught:
        request(now, of=of)
    assert caught.value.remedy


def test_a_cdrom_that_was_changed_meanwhile_does_not_matter() -> None:
    other = domain_xml("cdrom with iso").replace("debian-12.iso", "debian-13.iso")
    assert PARTS["cdrom with iso"].xml
    request(other, of=domain_xml("cdrom empty"))

"""What a capture asks of libvirt, and when it lets the guest stand still for longer or gives up."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.libvirt_domains import DISK_QCOW2, PARTS, domain_xml, plan_of
from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt import overlays
from vmsnap.hypervisors.libvirt.convergence import Convergence
from vmsnap.hypervisors.libvirt.request import snapshot_xml
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import CaptureSettings

IMAGE = Path("/run/vmsnap/0123456789/memory/ram.save")
pauses_ms = st.integers(1, 60_000)
# How many passes over memory QEMU has begun, as asked again and again: never fewer than before.
passes = st.lists(st.integers(0, 3), max_size=60).map(lambda steps: [sum(steps[: n + 1]) for n in range(len(steps))])


def decider(pause_ms: int) -> Convergence:
    return Convergence.for_settings(CaptureSettings(max_pause=timedelta(milliseconds=pause_ms)))


@given(pause_ms=pauses_ms, seen=passes)
def test_the_last_pass_never_gets_longer_than_the_pause_allows(pause_ms: int, seen: list[int]) -> None:
    convergence = decider(pause_ms)
    allowed = [convergence.downtime_ms]
    for number in seen:
        raised = convergence.after_pass(number)
        if raised is not None:
            assert raised == convergence.downtime_ms
            assert raised > allowed[-1]
            allowed.append(raised)
    assert allowed[0] <= 10
    assert all(0 < downtime <= max(1, pause_ms) for downtime in allowed)
    assert all(downtime <= convergence.ceiling_ms for downtime in allowed)


@given(pause_ms=pauses_ms, seen=passes)
def test_it_is_raised_once_a_pass_and_not_before_the_third(pause_ms: int, seen: list[int]) -> None:
    convergence = decider(pause_ms)
    raised_at = [number for number in seen if convergence.after_pass(number) is not None]
    assert all(number >= 3 for number in raised_at)
    assert len(raised_at) == len(set(raised_at))


@given(pause_ms=pauses_ms)
def test_every_guest_ends_converged_or_given_up(pause_ms: int) -> None:
    convergence = decider(pause_ms)
    for number in range(200):
        convergence.after_pass(number)
        if convergence.gave_up(number):
            assert convergence.downtime_ms == convergence.ceiling_ms
            return
    pytest.fail("never gave up")


@given(pause_ms=pauses_ms, seen=passes)
def test_it_does_not_give_up_before_the_longest_pass_was_tried(pause_ms: int, seen: list[int]) -> None:
    convergence = decider(pause_ms)
    for number in seen:
        before = convergence.downtime_ms
        convergence.after_pass(number)
        if convergence.downtime_ms != before or convergence.downtime_ms < convergence.ceiling_ms:
            assert not convergence.gave_up(number)


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

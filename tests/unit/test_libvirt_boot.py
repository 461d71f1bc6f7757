"""A clone that boots goes without what ties its original to the host; everything else is as in any clone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.libvirt_domains import (
    CLONABLE,
    CLONE_NVRAM,
    LOADER,
    NVRAM_TEXT,
    PARTS,
    REFUSED,
    RUN,
    UUID,
    domain_xml,
    plan_of,
)
from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt import audit, boot, overlays
from vmsnap.hypervisors.libvirt.clones import clone_of
from vmsnap.hypervisors.libvirt.inspect import memory_bytes, nic_mac
from vmsnap.hypervisors.libvirt.stripping import strip
from vmsnap.hypervisors.libvirt.xml import devices, parse, read_tag
from vmsnap.model.capture import CapturePlan, CaptureSettings
from vmsnap.model.guest import Severity
from vmsnap.model.isolation import FencePlan

GIB = 1 << 30
ARGUMENTS = """
<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='-device'/><arg value='ivshmem'/></commandline>
"""
SRIOV = (
    "<interface type='hostdev' managed='yes'><mac address='52:54:00:AA:00:02'/>"
    "<driver name='vfio'/>"
    "<source><address type='pci' domain='0x0000' bus='0x81' slot='0x10' function='0x2'/></source>"
    "<teaming type='transient' persistent='ua-backup'/>"
    "<address type='pci' domain='0x0000' bus='0x05' slot='0x00' function='0x0'/></interface>"
)


def booting(xml: str, *, plan: CapturePlan | None = None) -> str:
    plan = plan or plan_of(xml)
    fence = FencePlan.for_guest(RUN, guest=plan.guest)
    nvram = None if plan.guest.nvram is None else CLONE_NVRAM
    text = boot.clone_xml(xml, plan=plan, fence=fence, nvram=nvram)
    detail = overlays.describe(plan, role="clone")
    assert (
        audit.breaches(
            parse(text),
            overlays={disk.target: disk.overlay for disk in detail.disks},
            bridges={port.mac: port.bridge for port in fence.ports},
            nvram=nvram,
        )
        == ()
    )
    return text


@pytest.mark.parametrize("part", sorted({*CLONABLE, *REFUSED}))
def test_no_part_of_a_guest_reaches_production(part: str) -> None:
    booting(domain_xml(part))


def test_all_of_them_together_do_not() -> None:
    parts = [part for part in PARTS if part not in {"vnc", "vnc on a socket"}]
    domain = parse(booting(domain_xml(*parts, boot=LOADER + NVRAM_TEXT, around=ARGUMENTS)))
    tag = read_tag(domain)
    assert tag is not None
    assert (tag.run, tag.kind, domain.findtext("name")) == (RUN, "clone", clone_of(RUN, guest="db1").name)
    assert domain.findtext("uuid") != UUID
    assert not [element for element in domain.iter() if "commandline" in element.tag]


def test_its_flushes_are_kept_back_too() -> None:
    drivers = parse(booting(domain_xml("disk raw"))).findall("devices/disk/driver")
    assert [driver.get("cache") for driver in drivers] == ["unsafe", "unsafe"]


@pytest.mark.parametrize("part", sorted(REFUSED))
def test_doctor_names_what_the_clone_goes_without(part: str) -> None:
    first, *rest = boot.check_devices(parse(domain_xml(part)))
    assert first.severity is Severity.WARNING
    assert "the clone will be without: " in first.message
    assert [finding.severity for finding in rest] == [Severity.OK]


def test_a_guest_that_can_be_cloned_loses_nothing_a_guest_sees() -> None:
    for part in CLONABLE:
        assert strip(parse(domain_xml(part))) == (), part
    (finding,) = boot.check_devices(parse(domain_xml()))
    assert finding.severity is Severity.OK


def test_a_disk_that_does_not_keep_what_was_flushed_is_refused() -> None:
    unsafe = domain_xml("disk raw").replace("type='raw' cache='none'", "type='raw' cache='unsafe'")
    refused = [item for item in boot.check_devices(parse(unsafe)) if item.severity is Severity.REFUSAL]
    assert [item.check for item in refused] == ["disk vdb"]
    assert "cache='unsafe'" in refused[0].message
    assert not any(item.severity is Severity.REFUSAL for item in boot.check_devices(parse(domain_xml("disk raw"))))


def test_encrypted_memory_and_writable_firmware_stay_refused() -> None:
    for around, where in (("<launchSecurity type='sev'/>", "devices"), ("", "firmware")):
        loader = "" if around else "<loader type='pflash'>/srv/fw.fd</loader>"
        found = list(boot.check_devices(parse(domain_xml(around=around, boot=loader))))
        assert [(item.check, item.severity) for item in found] == [(where, Severity.REFUSAL)]


def test_a_nic_that_is_passed_through_becomes_one_in_the_fence_with_its_mac() -> None:
    domain = parse(booting(domain_xml(nics=SRIOV)))
    (interface,) = domain.findall("devices/interface")
    assert (interface.get("type"), nic_mac(interface)) == ("bridge", "52:54:00:aa:00:02")
    assert {child.tag for child in interface} == {"mac", "model", "source", "target", "address"}


@pytest.mark.parametrize(
    ("around", "wish", "comes_to"),
    [
        ("", GIB // 2, GIB // 2),
        ("", None, GIB),
        ("", 16 * GIB, GIB),
        ("<cpu><numa><cell id='0' cpus='0' memory='1' unit='GiB'/></numa></cpu>", GIB // 2, GIB),
    ],
)
def test_the_policy_may_give_it_less_memory(around: str, wish: int | None, comes_to: int) -> None:
    xml = domain_xml(around=around)
    plan = replace(plan_of(xml), settings=CaptureSettings(boot_memory_bytes=wish))
    assert memory_bytes(parse(booting(xml, plan=plan))) == comes_to
    assert boot.clone_memory_bytes(parse(xml), settings=plan.settings) == comes_to


def test_the_host_needs_memory_for_the_clone_only() -> None:
    domain = parse(domain_xml())
    enough = boot.check_memory(domain, settings=CaptureSettings(), available_bytes=GIB + (256 << 20))
    assert enough.severity is Severity.OK
    short = boot.check_memory(domain, settings=CaptureSettings(), available_bytes=GIB)
    assert short.severity is Severity.REFUSAL
    assert "clone.boot_memory_mib" in (short.remedy or "")
    less = CaptureSettings(boot_memory_bytes=GIB // 2)
    assert boot.check_memory(domain, settings=less, available_bytes=GIB).severity is Severity.OK


def test_a_disk_or_nic_that_came_after_the_capture_is_noticed() -> None:
    plan = plan_of(domain_xml())
    fence = FencePlan.for_guest(RUN, guest=plan.guest)
    for later in (domain_xml("disk raw"), domain_xml("nic network")):
        with pytest.raises(SafetyError, match="after the run began"):
            boot.clone_xml(later, plan=plan, fence=fence, nvram=None)


def test_the_clone_is_a_generation_of_its_own_and_shares_no_memory() -> None:
    around = (
        "<genid>0b0f1e4c-0000-4000-8000-2f6f2d9d3c11</genid>"
        "<memoryBacking><hugepages/><access mode='shared'/><locked/></memoryBacking>"
    )
    domain = parse(booting(domain_xml(around=around)))
    assert domain.find("genid") is not None
    assert not domain.findtext("genid")
    assert domain.find("memoryBacking") is None
    assert devices(domain).find("emulator") is not None

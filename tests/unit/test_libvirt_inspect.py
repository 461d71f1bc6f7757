"""What the driver reads from a domain's XML, and the tags it puts there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.libvirt_domains import (
    DISK_QCOW2,
    LOADER,
    NVRAM_SOURCE,
    NVRAM_TEXT,
    RUN,
    SIZE_BYTES,
    UUID,
    domain_xml,
    guest_of,
)
from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt.inspect import agent_is_connected, memory_bytes
from vmsnap.hypervisors.libvirt.xml import Tag, parse, read_tag, set_tag, unparse
from vmsnap.model.guest import DiskKind, GuestState


def test_describes_a_guest() -> None:
    guest = guest_of(domain_xml("disk raw", "disk block", "cdrom empty", "cdrom with iso", "nic network", "agent"))
    assert (guest.name, guest.uuid, guest.state) == ("db1", UUID, GuestState.RUNNING)
    assert (guest.memory_bytes, guest.vcpus, guest.has_agent_channel, guest.nvram) == (1 << 30, 2, True, None)
    assert [(disk.target, disk.kind, disk.source, disk.image_format, disk.size_bytes) for disk in guest.disks] == [
        ("vda", DiskKind.FILE, "/srv/images/db1.qcow2", "qcow2", SIZE_BYTES),
        ("vdb", DiskKind.FILE, "/srv/images/db1-data.raw", "raw", SIZE_BYTES),
        ("sdb", DiskKind.BLOCK, "/dev/vg0/db1-wal", "raw", SIZE_BYTES),
    ]
    assert [(nic.index, nic.mac, nic.attached_to, nic.tap, nic.mtu) for nic in guest.nics] == [
        (0, "52:54:00:aa:00:01", "br-prod", "vnet3", 9000),
        (1, "52:54:00:aa:00:02", "ovsbr0", "vnet4", None),
    ]


@pytest.mark.parametrize("store", [NVRAM_TEXT, NVRAM_SOURCE])
def test_finds_the_firmware_variables_in_either_form(store: str) -> None:
    assert guest_of(domain_xml(boot=LOADER + store)).nvram == "/var/lib/libvirt/qemu/nvram/db1_VARS.fd"


def test_a_disk_without_a_driver_is_raw() -> None:
    disk = DISK_QCOW2.replace("<driver name='qemu' type='qcow2' cache='none' discard='unmap'/>", "")
    assert guest_of(domain_xml(disks=disk)).disks[0].image_format == "raw"


def test_a_read_only_disk_and_an_empty_floppy_are_not_captured() -> None:
    disks = (
        DISK_QCOW2
        + "<disk type='file' device='disk'><source file='/srv/images/tools.img'/><target dev='vdz'/><readonly/></disk>"
        + "<disk type='file' device='floppy'><target dev='fda'/></disk>"
    )
    assert [disk.target for disk in guest_of(domain_xml(disks=disks)).disks] == ["vda"]


@pytest.mark.parametrize(("state", "expected"), [("connected", True), ("disconnected", False)])
def test_an_agent_counts_when_it_opened_its_end(state: str, *, expected: bool) -> None:
    domain = parse(domain_xml("agent").replace("state='connected'", f"state='{state}'"))
    assert agent_is_connected(domain) is expected
    assert agent_is_connected(parse(domain_xml("spice channel"))) is False


@pytest.mark.parametrize(
    ("unit", "number", "expected"),
    [("KiB", 1024, 1 << 20), ("MiB", 3, 3 << 20), ("GiB", 2, 2 << 30), ("b", 7, 7), ("GB", 1, 10**9), (None, 4, 4096)],
)
def test_units_of_memory(unit: str | None, number: int, expected: int) -> None:
    attribute = f" unit='{unit}'" if unit else ""
    assert memory_bytes(parse(f"<domain><memory{attribute}>{number}</memory></domain>")) == expected


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff"), min_size=1
    )
)
def test_a_tag_survives_libvirts_text_whatever_the_guest_is_called(name: str) -> None:
    domain = parse(domain_xml())
    tag = Tag(run=RUN, kind="clone", guest=name)
    set_tag(domain, tag)
    assert read_tag(parse(unparse(domain))) == tag


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "<metadata/>",
        "<metadata><run id='0123456789' kind='clone' guest='db1'/></metadata>",
        "<metadata><x:run xmlns:x='https://vmsnap.org/xmlns/domain/1' id='not-an-id' kind='clone'/></metadata>",
        "<metadata><x:run xmlns:x='https://elsewhere.example/1' id='0123456789' kind='clone'/></metadata>",
    ],
)
def test_other_domains_bear_no_tag(metadata: str) -> None:
    assert read_tag(parse(f"<domain>{metadata}<devices/></domain>")) is None


def test_broken_xml_is_libvirts_fault() -> None:
    with pytest.raises(DriverError, match="cannot be parsed"):
        parse("<domain><name>db1</domain>")

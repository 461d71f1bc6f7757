"""A clone's XML keeps nothing of production that it could write to, speak to or listen on, and the audit says so."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.libvirt_domains import (
    CLONABLE,
    CLONE_NVRAM,
    DISK_QCOW2,
    LOADER,
    NIC_BRIDGE,
    NVRAM_SOURCE,
    NVRAM_TEXT,
    PARTS,
    REFUSED,
    RUN,
    UUID,
    all_strings,
    domain_xml,
    guest_of,
    plan_of,
)
from vmsnap.errors import BugError, SafetyError
from vmsnap.hypervisors.libvirt import audit, overlays, rewrite
from vmsnap.hypervisors.libvirt.clones import clone_of, clone_xml
from vmsnap.hypervisors.libvirt.xml import Tag, devices, parse, read_tag, unparse
from vmsnap.model.isolation import FencePlan

# Attributes by which libvirt names things of the host, wherever they stand.
NAMING = frozenset(
    {
        "file", "dev", "path", "dir", "bridge", "network", "portgroup", "portid", "host", "service", "socket", "address",
        "port", "tlsPort", "websocket", "tty", "filter", "interfaceid", "passwd", "serverName", "log", "evdev",
    }
)  # fmt: skip
READ_ONLY = "os/loader", "os/kernel", "os/initrd", "devices/emulator", "devices/rng"
parts_of_guests = st.lists(st.sampled_from(CLONABLE), unique=True).filter(
    lambda chosen: len({"spice", "vnc", "vnc on a socket"} & set(chosen)) <= 1
)
boots = st.sampled_from(("", LOADER + NVRAM_TEXT, LOADER + NVRAM_SOURCE))


def names_of_production(xml: str) -> frozenset[str]:
    """What an XML names on the host: paths, bridges, networks, ports, sockets. What is read only does not count."""
    root = parse(xml)
    for path in READ_ONLY:
        parent = root.find(path.rpartition("/")[0]) if "/" in path else root
        assert parent is not None
        for element in root.findall(path):
            parent.remove(element)
    for disk in devices(root).findall("disk"):
        if disk.find("readonly") is not None:
            devices(root).remove(disk)
    found = set()
    for element in root.iter():
        # A device's address and a port in the guest's eyes ('target') are not the host's.
        if element.tag in ("address", "mac", "controller", "boot") or (element.tag == "target" and element.get("bus")):
            continue
        if element.tag == "target" and "port" in element.attrib:
            continue
        found |= {value for name, value in element.attrib.items() if name in NAMING or value.startswith("/")}
        if (element.text or "").strip().startswith("/"):
            found.add((element.text or "").strip())
    return frozenset(found) - {"-1"}


def rewritten(xml: str) -> str:
    plan = plan_of(xml)
    fence = FencePlan.for_guest(RUN, guest=plan.guest)
    return clone_xml(xml, plan=plan, fence=fence, nvram=CLONE_NVRAM if plan.guest.nvram else None)


def breaches_of(xml: str, *, original: str) -> tuple[str, ...]:
    plan = plan_of(original)
    fence = FencePlan.for_guest(RUN, guest=plan.guest)
    return audit.breaches(
        parse(xml),
        overlays={disk.target: disk.overlay for disk in overlays.describe(plan, role="clone").disks},
        bridges={port.mac: port.bridge for port in fence.ports},
        nvram=CLONE_NVRAM if plan.guest.nvram else None,
    )


@given(parts=parts_of_guests, boot=boots)
def test_nothing_of_production_is_left(parts: list[str], boot: str) -> None:
    original = domain_xml(*parts, boot=boot)
    clone = rewritten(original)
    named = names_of_production(original)
    assert {"/srv/images/db1.qcow2", "br-prod", "vnet3"} <= named
    assert named & names_of_production(clone) == frozenset()
    # Not even in an attribute that nobody thought of.
    assert {text for text in named if not text.isdigit()} & all_strings(clone) == frozenset()


@given(parts=parts_of_guests, boot=boots)
def test_the_audit_passes_the_clone_and_objects_to_everything_of_the_original(parts: list[str], boot: str) -> None:
    original = domain_xml(*parts, boot=boot)
    assert breaches_of(rewritten(original), original=original) == ()
    expected = 2 + bool(boot) + sum(PARTS[part].breach for part in parts if part != "agent")
    assert len(breaches_of(original, original=original)) >= expected


@pytest.mark.parametrize("part", sorted(name for name, part in PARTS.items() if part.breach))
def test_the_audit_objects_to_each_part_by_itself(part: str) -> None:
    plain = len(breaches_of(domain_xml(), original=domain_xml()))
    original = domain_xml(part)
    # A clone has another id than the original, so the original's agent socket is not one of its own.
    live = original.replace("id='4'", "id='9'")
    assert len(breaches_of(live, original=original)) > plain


# A NIC is made the clone's own even where preflight had refused it.
@pytest.mark.parametrize("part", sorted(REFUSED - {"macvtap"}))
def test_what_preflight_refuses_would_not_pass_the_audit_either(part: str) -> None:
    original = domain_xml(part)
    assert breaches_of(rewritten(original), original=original)


def live_clone(**changes: str) -> str:
    """What libvirt says of a restored clone."""
    clone = parse(rewritten(domain_xml("agent", "vnc", boot=LOADER + NVRAM_TEXT)))
    clone.set("id", "7")
    parts = devices(clone)
    (channel,) = parts.findall("channel")
    folder = changes.get("channel", "/var/lib/libvirt/qemu/channel/target/domain-7-vmsnap-clone-01234567")
    ET.SubElement(channel, "source", {"mode": "bind", "path": f"{folder}/org.qemu.guest_agent.0"})
    (listen,) = parts.findall("graphics/listen")
    listen.set("socket", changes.get("vnc", "/var/lib/libvirt/qemu/domain-7-vmsnap-clone-01234567/vnc.sock"))
    return unparse(clone)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel": "/run/libvirt/qemu/channel/7-vmsnap-clone-01234567"},  # libvirt 9.8 and later
    ],
)
def test_the_audit_accepts_the_sockets_libvirt_made_for_the_clone(changes: Mapping[str, str]) -> None:
    original = domain_xml("agent", "vnc", boot=LOADER + NVRAM_TEXT)
    assert breaches_of(live_clone(**changes), original=original) == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"channel": "/var/lib/libvirt/qemu/channel/target/domain-4-db1"},
        {"channel": "/var/lib/libvirt/qemu/channel/target/domain-77-db7"},
        {"channel": "/run/libvirt/qemu/channel/4-db1"},
        {"channel": "/srv/channel"},
        {"vnc": "/var/lib/libvirt/qemu/domain-4-db1/vnc.sock"},
        {"vnc": "/srv/consoles/db1.vnc"},
    ],
)
def test_the_audit_objects_to_another_domains_sockets(changes: Mapping[str, str]) -> None:
    original = domain_xml("agent", "vnc", boot=LOADER + NVRAM_TEXT)
    assert len(breaches_of(live_clone(**changes), original=original)) == 1


def test_a_breach_stops_the_clone_and_is_named() -> None:
    with pytest.raises(SafetyError) as caught:
        audit.require_private(parse(domain_xml()), overlays={}, bridges={}, nvram=None, name="the clone")
    assert caught.value.details is not None
    assert "/srv/images/db1.qcow2" in caught.value.details
    assert "br-prod" in caught.value.details


def test_a_writable_firmware_file_is_a_breach() -> None:
    boot = "<loader type='pflash'>/srv/images/db1-ovmf.fd</loader>"
    assert any("db1-ovmf.fd" in line for line in breaches_of(domain_xml(boot=boot), original=domain_xml(boot=boot)))


def test_what_the_guest_sees_stays() -> None:
    original = parse(domain_xml("disk raw", "cdrom with iso", "usb redirection", "spice", "spice channel"))
    clone = parse(rewritten(unparse(original)))
    kept = (
        "target", "model", "mtu", "serial", "boot", "address", "alias", "mac", "readonly",
    )  # fmt: skip
    for tag in ("disk", "interface", "channel", "redirdev", "controller", "memballoon"):
        before, after = devices(original).findall(tag), devices(clone).findall(tag)
        assert len(before) == len(after)
        for old, new in zip(before, after, strict=True):
            for name in kept:
                if tag == "interface" and name == "target":
                    continue
                assert [unparse(e).strip() for e in old.findall(name)] == [
                    unparse(e).strip() for e in new.findall(name)
                ]
    for path in ("memory", "currentMemory", "vcpu", "iothreads", "features", "clock", "os/type", "os/boot"):
        assert [unparse(e) for e in original.findall(path)] == [unparse(e) for e in clone.findall(path)]


def test_the_clone_has_a_name_a_uuid_and_a_tag_of_its_own() -> None:
    clone = parse(rewritten(domain_xml(name="db &lt;1&gt;")))
    mine = clone_of(RUN, guest="db <1>")
    assert (clone.findtext("name"), clone.findtext("uuid")) == (mine.name, mine.uuid)
    assert mine.uuid != UUID
    assert "id" not in clone.attrib
    assert clone.findtext("sysinfo/system/entry[@name='uuid']") == mine.uuid
    assert clone.findtext("sysinfo/system/entry[@name='serial']") == "S-1"
    assert read_tag(clone) == Tag(run=RUN, kind="clone", guest="db <1>")
    assert len(clone.findall("metadata/*")) == 1
    assert clone.find("description") is None


def test_the_clone_ends_rather_than_reboots_and_has_no_privileges_of_the_guest() -> None:
    clone = parse(rewritten(domain_xml("watchdog")))
    assert [clone.findtext(tag) for tag in ("on_poweroff", "on_reboot", "on_crash")] == ["destroy"] * 3
    assert clone.findall("cputune/*") == []
    assert [element.get("action") for element in clone.findall("devices/watchdog")] == ["none"]


def test_the_clone_takes_no_huge_pages_and_leaves_no_tpm_state() -> None:
    backing = "<memoryBacking><hugepages><page size='2048' unit='KiB'/></hugepages><locked/></memoryBacking>"
    clone = parse(rewritten(domain_xml("tpm", around=backing)))
    assert clone.find("memoryBacking/hugepages") is None
    assert clone.find("memoryBacking/locked") is not None
    (backend,) = devices(clone).findall("tpm/backend")
    assert backend.attrib == {"type": "emulator", "version": "2.0"}


def test_the_end_of_the_backing_chain_is_not_written_into_the_clone() -> None:
    clone = parse(rewritten(domain_xml("disk raw", "disk block")))
    for disk in devices(clone).findall("disk"):
        assert disk.find("backingStore") is None
        assert disk.get("type") == "file"
        driver = disk.find("driver")
        assert driver is not None
        assert driver.get("type") == "qcow2"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("cache='none' io='native'", {"cache": "unsafe"}),
        ("cache='writeback' io='io_uring'", {"cache": "unsafe", "io": "io_uring"}),
        ("cache='default' discard='unmap'", {"cache": "unsafe", "discard": "unmap"}),
        ("queues='2'", {"cache": "unsafe", "queues": "2"}),
        # Without a write cache the guest does not flush, and it must not find one after a migration.
        ("cache='writethrough'", {"cache": "writethrough"}),
        ("cache='directsync' io='native'", {"cache": "directsync", "io": "native"}),
    ],
)
def test_no_flush_of_the_clone_reaches_the_hosts_disks(before: str, after: Mapping[str, str]) -> None:
    original = domain_xml("disk raw").replace("type='raw' cache='none' io='native'", f"type='raw' {before}")
    driver = devices(parse(rewritten(original))).find("disk[2]/driver")
    assert driver is not None
    assert driver.attrib == {"name": "qemu", "type": "qcow2", **after}


def test_the_agents_channel_has_no_path_so_that_libvirt_makes_one() -> None:
    (channel,) = devices(parse(rewritten(domain_xml("agent")))).findall("channel")
    assert channel.get("type") == "unix"
    assert channel.find("source") is None


@pytest.mark.parametrize("boot", [LOADER + NVRAM_TEXT, LOADER + NVRAM_SOURCE])
def test_the_firmware_gets_variables_of_its_own(boot: str) -> None:
    store = parse(rewritten(domain_xml(boot=boot))).find("os/nvram")
    assert store is not None
    assert store.text == CLONE_NVRAM
    assert len(store) == 0
    assert store.attrib == {}


def test_firmware_chosen_by_libvirt_gets_the_store_as_well() -> None:
    domain = parse("<domain><os firmware='efi'><type>hvm</type></os></domain>")
    rewrite.set_nvram(domain, "/a/nvram.fd")
    assert domain.findtext("os/nvram") == "/a/nvram.fd"
    rewrite.set_nvram(domain, None)
    assert domain.find("os/nvram") is None


def test_a_fence_for_other_nics_is_refused() -> None:
    one = domain_xml()
    two = domain_xml(nics=NIC_BRIDGE + NIC_BRIDGE.replace("AA:00:01", "AA:00:05"))
    fence = FencePlan.for_guest(RUN, guest=guest_of(one))
    with pytest.raises(BugError, match="fence"):
        clone_xml(two, plan=plan_of(two), fence=fence, nvram=None)


def test_a_nic_too_many_is_never_left_on_productions_bridge() -> None:
    with pytest.raises(ValueError, match="zip"):
        rewrite.set_nics(parse(domain_xml()), ())


def test_a_disk_without_an_overlay_is_never_left_on_productions_file() -> None:
    with pytest.raises(KeyError):
        rewrite.set_disks(parse(domain_xml(disks=DISK_QCOW2)), {})


def test_an_environment_gets_macs_and_a_network() -> None:
    domain = parse(domain_xml("nic ethernet"))
    rewrite.set_nics(
        domain,
        tuple(rewrite.NicAttachment(network="test", mac=f"52:54:00:00:00:0{number}") for number in (1, 2)),
    )
    for number, interface in enumerate(devices(domain).findall("interface"), start=1):
        assert interface.get("type") == "network"
        assert [element.attrib for element in interface.findall("source")] == [{"network": "test"}]
        assert [element.get("address") for element in interface.findall("mac")] == [f"52:54:00:00:00:0{number}"]
        assert interface.find("script") is None

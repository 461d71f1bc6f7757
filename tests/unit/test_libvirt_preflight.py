"""Preflight: every refusal has its fixture here, with what it says and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.libvirt_domains import CLONABLE, DISK_QCOW2, LOADER, NVRAM_TEXT, domain_xml
from vmsnap.hypervisors.libvirt import preflight
from vmsnap.hypervisors.libvirt.xml import devices, parse
from vmsnap.model.capture import CaptureSettings
from vmsnap.model.guest import Finding, Severity

GIB = 1 << 30


def findings(xml: str, *, settings: CaptureSettings, meminfo: str = "MemAvailable: 99999999 kB\n") -> Iterator[Finding]:
    root = parse(xml)
    yield from preflight.check_devices(root)
    yield from preflight.check_memory_backing(root)
    yield from preflight.check_disks(root, settings=settings)
    yield from preflight.check_agent(root)
    yield from preflight.check_memory(root, meminfo=meminfo, settings=CaptureSettings())


def refusals(xml: str, *, settings: CaptureSettings) -> list[Finding]:
    return [finding for finding in findings(xml, settings=settings) if finding.severity is Severity.REFUSAL]


@pytest.mark.parametrize(
    ("kind", "qemu_version", "wish", "found"),
    [
        ("kvm", 7_002_022, CaptureSettings(), []),
        ("qemu", 9_000_000, CaptureSettings(), []),
        ("qemu", 8_002_009, CaptureSettings(), [Severity.REFUSAL]),
        ("qemu", 8_002_009, CaptureSettings(allow_emulation=True), [Severity.WARNING]),
    ],
)
def test_an_emulated_guest_that_may_be_copied_wrongly_is_refused(
    kind: str, qemu_version: int, wish: CaptureSettings, found: list[Severity]
) -> None:
    domain = parse(domain_xml())
    domain.set("type", kind)
    seen = preflight.check_emulation(domain, qemu_version=qemu_version, settings=wish)
    assert [finding.severity for finding in seen] == found


def test_what_is_attached_to_the_running_guest_only_is_named() -> None:
    full, poor = parse(domain_xml("disk raw")), parse(domain_xml())
    assert list(preflight.check_definition(full, definition=full)) == []
    (found,) = preflight.check_definition(full, definition=poor)
    assert found.severity is Severity.WARNING
    assert "running guest only" in found.message
    assert "--config" in (found.remedy or "")
    for interface in poor.findall("devices/interface"):
        devices(poor).remove(interface)
    assert len(list(preflight.check_definition(full, definition=poor))) > 1


@pytest.fixture
def settings(tmp_path: Path) -> CaptureSettings:
    return CaptureSettings(overlay_dir=str(tmp_path), min_overlay_free_bytes=1 << 20)


@pytest.mark.parametrize("part", CLONABLE)
def test_accepts_each_part_that_can_be_cloned(part: str, settings: CaptureSettings) -> None:
    assert refusals(domain_xml(part), settings=settings) == []


def test_accepts_all_of_them_together(settings: CaptureSettings) -> None:
    assert refusals(domain_xml(*CLONABLE, boot=LOADER + NVRAM_TEXT), settings=settings) == []


@pytest.mark.parametrize(
    ("part", "says", "remedy"),
    [
        ("hostdev", "host device", "take the device away"),
        ("virtiofs", "folder of the host", "<filesystem>"),
        ("shmem", "shared memory", "<shmem>"),
        ("tpm of the host", "'passthrough'", "emulator"),
        ("tpm at a path", "fixed path", "<source>"),
        ("nvdimm", "nvdimm", "<memory>"),
        ("evdev", "input device", "<input>"),
        ("input passthrough", "input device", "<input>"),
        ("usb over tcp", "USB", "spicevmc"),
        ("entropy daemon", "egd", "random"),
        ("vsock", "past the fence", "<vsock>"),
        ("fixed vsock", "past the fence", "<vsock>"),
        ("macvtap", "'direct'", "bridge"),
        ("vhost-user video", "vhost-user", "vhostuser"),
    ],
)
def test_refuses_a_device(part: str, says: str, remedy: str, settings: CaptureSettings) -> None:
    (found,) = refusals(domain_xml(part), settings=settings)
    assert says in found.message
    assert found.remedy is not None
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("device", "says", "remedy"),
    [
        ("<smartcard mode='host'/>", "smart card", "<smartcard>"),
        ("<lease><key>a</key></lease>", "lease", "<lease>"),
        ("<pstore backend='acpi-erst'><path>/srv/pstore</path></pstore>", "pstore", "<pstore>"),
        ("<graphics type='sdl' display=':0.0'/>", "'sdl'", "vnc"),
        ("<graphics type='egl-headless'/>", "'egl-headless'", "vnc"),
        ("<interface type='user'><mac address='52:54:00:00:00:01'/></interface>", "'user'", "bridge"),
        ("<interface type='vhostuser'><mac address='52:54:00:00:00:01'/></interface>", "'vhostuser'", "bridge"),
        ("<interface type='hostdev'><mac address='52:54:00:00:00:01'/></interface>", "'hostdev'", "bridge"),
        ("<video><model type='virtio'><acceleration accel3d='yes'/></model></video>", "3D", "<acceleration>"),
    ],
)
def test_refuses_other_devices(device: str, says: str, remedy: str, settings: CaptureSettings) -> None:
    (found,) = refusals(domain_xml(nics=device), settings=settings)
    assert says in found.message
    assert found.remedy is not None
    assert remedy in found.remedy


@pytest.mark.parametrize(
    ("around", "boot", "says"),
    [
        ("<launchSecurity type='sev'><policy>1</policy></launchSecurity>", "", "launchSecurity"),
        ("<cpu mode='host-model'><feature policy='require' name='invtsc'/></cpu>", "", "invtsc"),
        (
            "<commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='-s'/></commandline>",
            "",
            "qemu:commandline",
        ),
        ("", "<loader type='pflash'>/srv/images/ovmf.fd</loader>", "one writable file"),
        ("", LOADER + "<nvram type='network'><source protocol='iscsi' name='iqn'/></nvram>", "not in a file"),
    ],
)
def test_refuses_what_stands_beside_the_devices(around: str, boot: str, says: str, settings: CaptureSettings) -> None:
    (found,) = refusals(domain_xml(around=around, boot=boot), settings=settings)
    assert says in found.message
    assert found.remedy


def test_accepts_invtsc_with_a_frequency(settings: CaptureSettings) -> None:
    around = """
      <cpu mode='host-model'><feature policy='require' name='invtsc'/></cpu>
      <clock offset='utc'><timer name='tsc' frequency='2400000000'/></clock>"""
    assert refusals(domain_xml().replace("<clock offset='utc'/>", around), settings=settings) == []


def disk(
    *, kind: str = "file", device: str = "disk", image: str = "qcow2", bus: str = "virtio", inside: str = ""
) -> str:
    name = {"file": "file", "block": "dev"}.get(kind, "name")
    return f"""
    <disk type='{kind}' device='{device}'>
      <driver name='qemu' type='{image}'/><source {name}='/srv/images/db1.img'/><target dev='vda' bus='{bus}'/>{inside}
    </disk>"""


@pytest.mark.parametrize(
    ("disks", "says", "remedy"),
    [
        ("", "no writable disk", "nothing to back up"),
        (disk(kind="network"), "'network'", "move it"),
        (disk(kind="volume"), "'volume'", "move it"),
        (disk(kind="nvme"), "'nvme'", "move it"),
        (disk(kind="block", device="lun", image="raw"), "SCSI commands", "device='disk'"),
        (disk(inside="<shareable/>"), "shared", "cluster"),
        (disk(inside="<transient/>"), "transient", "<transient/>"),
        (disk(inside="<encryption format='luks'/>"), "encrypted", "inside the guest"),
        (disk(bus="nvme"), "NVMe", "virtio"),
        (
            disk(image="raw").replace(
                "db1.img'/>", "db1.img'><slices><slice type='storage' offset='512'/></slices></source>"
            ),
            "slice",
            "file of its own",
        ),
        (disk(image="vmdk"), "'vmdk'", "convert"),
        (
            disk().replace("/srv/images/db1.img", "/srv/images/vmsnap-0123456789-vda.source.qcow2"),
            "already on an overlay",
            "vmsnap reconcile",
        ),
        (disk() + disk(device="floppy", image="raw").replace("vda", "fda"), "floppy fda", "eject"),
    ],
)
def test_refuses_a_disk(disks: str, says: str, remedy: str, settings: CaptureSettings) -> None:
    (found,) = refusals(domain_xml(disks=disks), settings=settings)
    assert says in found.message
    assert found.remedy is not None
    assert remedy in found.remedy


def test_refuses_a_block_device_without_a_folder_for_its_overlay() -> None:
    (found,) = refusals(domain_xml(disks=disk(kind="block", image="raw")), settings=CaptureSettings())
    assert "no room for an overlay" in found.message
    assert found.remedy is not None
    assert "capture.overlay_dir" in found.remedy


def test_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (found,) = refusals(domain_xml(), settings=CaptureSettings(overlay_dir=str(tmp_path / "gone")))
    assert "cannot be used" in found.message
    assert found.remedy


def test_refuses_a_folder_with_too_little_room(tmp_path: Path) -> None:
    wish = CaptureSettings(overlay_dir=str(tmp_path), min_overlay_free_bytes=1 << 60)
    (found,) = refusals(domain_xml(), settings=wish)
    assert "MiB free" in found.message
    assert found.remedy is not None
    assert "capture.min_overlay_free_mib" in found.remedy


def test_without_a_folder_the_overlay_goes_beside_the_disk(tmp_path: Path) -> None:
    disks = DISK_QCOW2.replace("/srv/images/db1.qcow2", f"{tmp_path}/db1.qcow2")
    wish = CaptureSettings(min_overlay_free_bytes=1)
    assert refusals(domain_xml(disks=disks), settings=wish) == []


@pytest.mark.parametrize(
    ("available_bytes", "refused"), [(GIB + (256 << 20), True), (GIB * 6 // 5 + (257 << 20), False), (0, True)]
)
def test_needs_ram_for_the_image_and_the_clone(available_bytes: int, *, refused: bool) -> None:
    meminfo = f"MemTotal: 99999999 kB\nMemAvailable:    {available_bytes // 1024} kB\n"
    (found,) = preflight.check_memory(parse(domain_xml()), meminfo=meminfo, settings=CaptureSettings())
    assert (found.severity is Severity.REFUSAL) is refused
    assert bool(found.remedy) is refused


def test_an_unknown_amount_of_memory_is_none() -> None:
    assert preflight.available_memory_bytes("MemTotal: 1 kB\n") == 0


@pytest.mark.parametrize(
    ("part", "state", "severity"),
    [
        ("agent", "connected", Severity.OK),
        ("agent", "disconnected", Severity.WARNING),
        ("tablet", "", Severity.WARNING),
    ],
)
def test_an_agent_is_wished_for_not_required(part: str, state: str, severity: Severity) -> None:
    xml = domain_xml(part).replace("state='connected'", f"state='{state}'")
    (found,) = preflight.check_agent(parse(xml))
    assert found.severity is severity
    assert (found.remedy is None) is (severity is Severity.OK)


def test_locked_memory_is_warned_about_and_huge_pages_are_told(settings: CaptureSettings) -> None:
    around = "<memoryBacking><hugepages/><locked/></memoryBacking>"
    found = list(preflight.check_memory_backing(parse(domain_xml("agent", around=around))))
    assert [finding.severity for finding in found] == [Severity.OK, Severity.WARNING]


def test_what_a_tpm_means_for_test_vms_is_told() -> None:
    assert list(preflight.check_tpm(parse(domain_xml("agent")))) == []
    (found,) = preflight.check_tpm(parse(domain_xml("tpm")))
    assert found.severity is Severity.WARNING
    assert "test VM" in found.message

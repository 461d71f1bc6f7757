"""Whether a guest can be captured: each check says what it saw and, where it refuses, what to change."""

from __future__ import annotations

import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from vmsnap.hypervisors.libvirt.inspect import (
    agent_is_connected,
    disk_format,
    disk_source,
    disk_target,
    has_agent_channel,
    memory_bytes,
    nic_mac,
    writable_disks,
)
from vmsnap.hypervisors.libvirt.xml import QEMU_NAMESPACE, devices
from vmsnap.model.capture import CaptureSettings, OnNoConvergence
from vmsnap.model.guest import Finding, Severity

_QEMU_9 = 9_000_000
_MIB = 1 << 20
_FORMATS = ("raw", "qcow2")
KEEP_FREE_BYTES = 256 * _MIB
# How much of a guest's RAM an image may hold: what the guest rewrites meanwhile is in it twice. A guest that is stopped or
# slowed down where it does not converge is read more often before that.
_IMAGE_FACTOR = 1.2
_STUBBORN_IMAGE_FACTOR = 1.5
_REFUSED_DEVICES = {
    "hostdev": ("a host device is passed through", "take the device away, or back this guest up in another way"),
    "filesystem": ("a folder of the host is shared (virtiofs or 9p)", "take the <filesystem> away"),
    "shmem": ("it has shared memory with other programs", "take the <shmem> away"),
    "smartcard": ("a smart card of the host is passed through", "take the <smartcard> away"),
    "lease": ("it holds a lock-manager lease", "take the <lease> away"),
    "pstore": ("it has a pstore device, which writes to a file of the host", "take the <pstore> away"),
    # Whatever its own number: the host is number 2 to every VM, and no fence sees what goes there (vsock(7)).
    "vsock": (
        "it has a vsock, on which its clone could reach programs of the host past the fence",
        "take the <vsock> away",
    ),
}
_NIC_TYPES = ("bridge", "network", "ethernet")


def _refusal(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, severity=Severity.REFUSAL, message=message, remedy=remedy)


def _warning(check: str, message: str, remedy: str | None = None) -> Finding:
    return Finding(check=check, severity=Severity.WARNING, message=message, remedy=remedy)


def _ok(check: str, message: str) -> Finding:
    return Finding(check=check, severity=Severity.OK, message=message)


def check_devices(domain: ET.Element) -> Iterator[Finding]:
    """Check for devices that cannot be cloned or fenced."""
    parts = devices(domain)
    refused = False
    for tag, (reason, remedy) in _REFUSED_DEVICES.items():
        if parts.find(tag) is not None:
            refused = True
            yield _refusal("devices", f"the guest cannot be cloned: {reason}", remedy)
    for interface in parts.findall("interface"):
        if interface.get("type") not in _NIC_TYPES:
            refused = True
            yield _refusal(
                "network",
                f"a network interface of type {interface.get('type')!r} cannot be moved into a fence",
                "connect the guest through a bridge or a libvirt network of bridge type",
            )
    for finding in _check_kinds(domain):
        refused = True
        yield finding
    for graphics in parts.findall("graphics"):
        if graphics.get("type") not in ("vnc", "spice"):
            refused = True
            yield _refusal(
                "devices", f"graphics of type {graphics.get('type')!r} need the host's display", "use vnc or spice"
            )
    if domain.find(f"{{{QEMU_NAMESPACE}}}commandline") is not None:
        refused = True
        yield _refusal(
            "devices",
            "the guest has <qemu:commandline> arguments; what they open on the host cannot be judged",
            "use libvirt's own elements instead",
        )
    if not refused:
        yield _ok("devices", "every device can be cloned and fenced")


def _check_kinds(domain: ET.Element) -> Iterator[Finding]:
    """Check devices of which some kinds can be cloned and others not."""
    parts = devices(domain)
    if any(device.get("type") in ("passthrough", "evdev") for device in parts.findall("input")):
        yield _refusal("devices", "an input device of the host is passed through", "take that <input> away")
    if any(device.get("type") != "spicevmc" for device in parts.findall("redirdev")):
        yield _refusal("devices", "USB is redirected from a network address", "use type='spicevmc', or take it away")
    if any(device.get("model") not in ("dimm", "virtio-mem") for device in parts.findall("memory")):
        yield _refusal(
            "devices",
            "it has memory that is a file of the host (nvdimm, pmem), which the clone would write to",
            "take that <memory> away",
        )
    if any(backend.get("model") == "egd" for backend in parts.findall("rng/backend")):
        yield _refusal("devices", "its random numbers come from another program (egd)", "use <backend model='random'>")
    for model in parts.findall("video/model"):
        acceleration = model.find("acceleration")
        if acceleration is not None and acceleration.get("accel3d") == "yes":
            yield _refusal("devices", "3D acceleration cannot be migrated", "take <acceleration> away")
    if any(driver.get("name") == "vhostuser" for driver in parts.findall("video/driver")):
        yield _refusal("devices", "its video card is a vhost-user program", "take <driver name='vhostuser'> away")
    yield from _check_tpm(parts)
    if domain.find("launchSecurity") is not None:
        yield _refusal("devices", "its memory is encrypted (launchSecurity) and cannot be copied", "none by vmsnap")
    for loader in domain.findall("os/loader"):
        if loader.get("type") == "pflash" and loader.get("readonly") != "yes":
            yield _refusal(
                "firmware",
                "firmware and its variables are in one writable file, which the clone would write to",
                "give <loader readonly='yes'> and an <nvram> of its own",
            )
    for store in domain.findall("os/nvram"):
        if store.get("type", "file") != "file":
            yield _refusal("firmware", "the firmware variables are not in a file", "move them to a file")


def _check_tpm(parts: ET.Element) -> Iterator[Finding]:
    """Check that a TPM is libvirt's own: its state is then in the memory stream, and the clone's gets a place of its own."""
    for backend in parts.findall("tpm/backend"):
        if backend.get("type") != "emulator":
            yield _refusal(
                "devices",
                f"it has a TPM of type {backend.get('type')!r}, which the clone would share",
                "use <backend type='emulator'>",
            )
        elif backend.find("source") is not None:
            yield _refusal(
                "devices", "its TPM's state is at a fixed path, which the clone would share", "take that <source> away"
            )


def check_tpm(domain: ET.Element) -> Iterator[Finding]:
    """Say what a TPM means for test VMs: the clone has the guest's, snapshots have none."""
    if devices(domain).find("tpm") is not None:
        yield _warning(
            "tpm",
            "snapshots do not keep the TPM's state; a test VM gets a new TPM and cannot open what was sealed in the guest's",
            "keep another way in to disks whose keys are sealed in the TPM, such as a passphrase",
        )


def check_emulation(domain: ET.Element, *, qemu_version: int, settings: CaptureSettings) -> Iterator[Finding]:
    """Check for software emulation, for which QEMU before 9.0 may lose writes of the guest while it copies its memory.

    QEMU clears its record of written pages without telling the emulator (``cpu_physical_memory_sync_dirty_bitmap``;
    repaired by "physmem: Fix migration dirty bitmap coherency with TCG memory access"). On a busy host 4 of 13 copies
    made by QEMU 7.2 differed from the stopped guest's memory. ``qemu_version``: as libvirt gives it, 7002022 for 7.2.22.
    """
    if domain.get("type") != "qemu" or qemu_version >= _QEMU_9:
        return
    message = (
        "the guest runs in software emulation, and QEMU before 9.0 may lose what it writes while its memory is copied"
    )
    if settings.allow_emulation:
        yield _warning("emulation", message, "use KVM for anything but tests")
    else:
        yield _refusal("emulation", message, "use KVM or QEMU 9.0; for trials set capture.allow_emulation = true")


def check_definition(domain: ET.Element, *, definition: ET.Element) -> Iterator[Finding]:
    """Check that what runs is what is defined: test VMs are made from the definition (its INACTIVE XML)."""
    defined = {(disk_target(disk), disk_source(disk)) for disk in writable_disks(definition)}
    macs = {nic_mac(interface) for interface in devices(definition).findall("interface")}
    for disk in writable_disks(domain):
        if (disk_target(disk), disk_source(disk)) not in defined:
            yield _warning(
                f"disk {disk_target(disk)}",
                f"{disk_source(disk)} is attached to the running guest only; test VMs from the snapshot will lack it",
                "attach it with 'virsh attach-disk --config' as well",
            )
    for interface in devices(domain).findall("interface"):
        if nic_mac(interface) not in macs:
            yield _warning(
                f"interface {nic_mac(interface)}",
                "it is attached to the running guest only; test VMs from the snapshot will lack it",
                "attach it with 'virsh attach-interface --config' as well",
            )


def check_memory_backing(domain: ET.Element) -> Iterator[Finding]:
    """Check how the guest's RAM is backed, and its CPU features."""
    for feature in domain.findall("cpu/feature"):
        if feature.get("name") == "invtsc" and feature.get("policy") in ("require", "force"):
            timers = domain.findall("clock/timer")
            if not any(timer.get("name") == "tsc" and timer.get("frequency") for timer in timers):
                yield _refusal(
                    "cpu",
                    "the CPU has invtsc without a fixed frequency; such a guest cannot be saved",
                    'give <timer name="tsc" frequency="..."/> in <clock>, or take invtsc away',
                )
    if domain.find("memoryBacking/hugepages") is not None:
        yield _ok("memory", "the guest uses huge pages; the clone and test VMs use ordinary memory")
    if domain.find("memoryBacking/locked") is not None:
        yield _warning("memory", "the guest's memory is locked; the clone's will be too")


def check_disks(domain: ET.Element, *, settings: CaptureSettings) -> Iterator[Finding]:
    """Check each disk: kind, format, sharing, and room for its overlay."""
    disks = writable_disks(domain)
    if not disks:
        yield _refusal("disks", "the guest has no writable disk", "there is nothing to back up")
    for disk in disks:
        yield from _check_disk(disk, settings)
    parts = devices(domain)
    for disk in parts.findall("disk"):
        if disk.get("device") == "floppy" and disk.find("source") is not None and disk.find("readonly") is None:
            yield _refusal("disks", f"floppy {disk_target(disk)} is writable", "eject it")


def _check_disk(disk: ET.Element, settings: CaptureSettings) -> Iterator[Finding]:
    target, source = disk_target(disk), disk_source(disk)
    check = f"disk {target}"
    if disk.get("type") not in ("file", "block"):
        yield _refusal(
            check, f"it is a {disk.get('type')!r} disk; only files and block devices can be captured", "move it to one"
        )
        return
    if disk.get("device") == "lun":
        yield _refusal(check, "it passes SCSI commands to the host's device", "use device='disk'")
    if disk.find("shareable") is not None:
        yield _refusal(check, "it is shared with other guests", "a shared disk belongs to a cluster: back it up there")
    if disk.find("transient") is not None:
        yield _refusal(check, "it is transient", "take <transient/> away")
    if disk.find("encryption") is not None or disk.find("source/encryption") is not None:
        yield _refusal(check, "it is encrypted by QEMU", "encrypt inside the guest instead")
    if disk.find("source/slices") is not None:
        yield _refusal(
            check, "it is a slice of a larger file, which an overlay cannot stand on", "give it a file of its own"
        )
    target_element = disk.find("target")
    if target_element is not None and target_element.get("bus") == "nvme":
        yield _refusal(check, "emulated NVMe cannot be migrated", "use virtio or SCSI")
    if disk_format(disk) not in _FORMATS:
        yield _refusal(check, f"its format is {disk_format(disk)!r}; raw and qcow2 can be captured", "convert it")
    if "vmsnap-" in Path(source).name:
        yield _refusal(
            check,
            f"it is already on an overlay of vmsnap: {source}",
            "an earlier run did not end; run 'vmsnap reconcile', and where that does not know the run, as after the state "
            "directory was lost, 'vmsnap reconcile --adopt RUN' with the run that it names",
        )
    folder = overlay_folder(disk, settings)
    if folder is None:
        yield _refusal(
            check,
            f"{source} is a block device, which has no room for an overlay beside it",
            "set capture.overlay_dir in the policy to a folder with room for what the guest writes during a run",
        )
        return
    yield from _check_room(check, folder, settings)


def _check_room(check: str, folder: Path, settings: CaptureSettings) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield _refusal(
            check, f"its overlay folder {folder} cannot be used: {error.strerror}", "make the folder, or name another"
        )
        return
    if not os.access(folder, os.W_OK):
        yield _refusal(check, f"its overlay folder {folder} is not writable", "mount it for writing")
    elif free < settings.min_overlay_free_bytes:
        yield _refusal(
            check,
            f"{folder} has {free // _MIB} MiB free; the overlay needs room for what the guest writes during a run",
            f"make room; the policy's capture.min_overlay_free_mib is {settings.min_overlay_free_bytes // _MIB}",
        )
    else:
        yield _ok(check, f"can take an overlay in {folder}, {free // _MIB} MiB free")


def overlay_folder(disk: ET.Element, settings: CaptureSettings) -> Path | None:
    """Return where a disk's overlay goes: the policy's folder, else beside the disk, None for a block device alone."""
    if settings.overlay_dir is not None:
        return Path(settings.overlay_dir)
    return None if disk.get("type") == "block" else Path(disk_source(disk)).parent


def check_agent(domain: ET.Element) -> Iterator[Finding]:
    """Check whether the guest agent can be used. A guest without one needs SSH, which the backup checks."""
    if agent_is_connected(domain):
        yield _ok("agent", "the guest agent is connected")
    elif has_agent_channel(domain):
        yield _warning(
            "agent",
            "there is a channel for the guest agent, but no agent has opened it",
            "start qemu-guest-agent in the guest",
        )
    else:
        yield _warning(
            "agent",
            "the guest has no agent channel",
            "add the channel org.qemu.guest_agent.0, or set [control.ssh] in the policy",
        )


def available_memory_bytes(meminfo: str) -> int:
    """Return MemAvailable of /proc/meminfo in bytes, 0 where it is not given."""
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return 0


def memory_image_bytes(ram_bytes: int, *, settings: CaptureSettings) -> int:
    """Return how large a memory image may get: RAM, and what changed while it was read.

    Image and clone together take no more than that at any time: the image is given back as the clone is loaded from it.
    """
    stubborn = settings.on_no_convergence in (OnNoConvergence.SUSPEND, OnNoConvergence.THROTTLE)
    return int(ram_bytes * (_STUBBORN_IMAGE_FACTOR if stubborn else _IMAGE_FACTOR))


def peak_bytes(ram_bytes: int, *, settings: CaptureSettings) -> int:
    """Return what has to be free for image and clone: what they need together at most, and what the host keeps."""
    return memory_image_bytes(ram_bytes, settings=settings) + KEEP_FREE_BYTES


def check_memory(domain: ET.Element, *, meminfo: str, settings: CaptureSettings) -> Iterator[Finding]:
    """Check that the host has RAM for the memory image and the clone."""
    needed = peak_bytes(memory_bytes(domain), settings=settings)
    free = available_memory_bytes(meminfo)
    if free < needed:
        yield _refusal(
            "memory",
            f"the host has {free // _MIB} MiB of memory available; the clone and its memory image need {needed // _MIB} MiB",
            "run fewer guests or clones on this host at a time, or add memory",
        )
    else:
        yield _ok("memory", f"{free // _MIB} MiB available, {needed // _MIB} MiB needed")

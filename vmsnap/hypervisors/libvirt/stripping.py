"""Leaving out of a definition what ties a VM to its host, for VMs that boot: a booting system does without.

A clone that is loaded with the original's memory must keep every device; ``rewrite`` cares for those.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator

from vmsnap.hypervisors.libvirt.inspect import memory_bytes
from vmsnap.hypervisors.libvirt.xml import QEMU_NAMESPACE, child, devices, drop

_DEVICES = {
    "hostdev": "a host device",
    "filesystem": "a shared folder of the host",
    "shmem": "shared memory",
    "smartcard": "a smart card",
    "lease": "a lock-manager lease",
    "pstore": "a pstore device",
    "vsock": "a vsock",
}


def _is_tied_tpm(backend: ET.Element) -> bool:
    return backend.get("type") != "emulator" or backend.find("source") is not None


# Elements that only some devices of their kind have reason to be left out for.
_KINDS: dict[str, tuple[str, Callable[[ET.Element], bool]]] = {
    "input": ("an input device of the host", lambda device: device.get("type") in ("passthrough", "evdev")),
    "redirdev": ("a redirected USB device", lambda device: device.get("type") != "spicevmc"),
    "memory": ("memory in a file of the host", lambda device: device.get("model") not in ("dimm", "virtio-mem")),
    "graphics": ("a screen on the host's display", lambda device: device.get("type") not in ("vnc", "spice")),
    "tpm": (
        "a TPM that is not libvirt's own",
        lambda device: any(_is_tied_tpm(item) for item in device.findall("backend")),
    ),
    "rng": (
        "random numbers from another program",
        lambda device: any(backend.get("model") == "egd" for backend in device.findall("backend")),
    ),
}
_PLAIN_NICS = ("bridge", "network", "ethernet")


def strip(domain: ET.Element) -> tuple[str, ...]:
    """Take out of a definition what a VM apart from its host cannot have; return what that was, for people.

    NICs stay, with their MACs: one that is passed through, or otherwise on no bridge, becomes a virtio NIC on one, to be
    attached by ``rewrite.set_nics``.
    """
    return tuple(dict.fromkeys(_strip(domain)))


def _strip(domain: ET.Element) -> Iterator[str]:
    parts = devices(domain)
    for tag, what in _DEVICES.items():
        for device in parts.findall(tag):
            parts.remove(device)
            yield what
    for tag, (what, is_tied) in _KINDS.items():
        for device in parts.findall(tag):
            if is_tied(device):
                parts.remove(device)
                yield what
    yield from _strip_video(parts)
    for interface in parts.findall("interface"):
        if interface.get("type") not in _PLAIN_NICS:
            yield f"the way a NIC of type {interface.get('type')!r} reaches its network"
            _make_plain(interface)
    for tag in ("commandline", "override"):
        if domain.find(f"{{{QEMU_NAMESPACE}}}{tag}") is not None:
            drop(domain, f"{{{QEMU_NAMESPACE}}}{tag}")
            yield "arguments of QEMU"
    # How RAM is backed, which a guest cannot see: shared with other programs, on huge pages, locked.
    drop(domain, "memoryBacking")
    for cell in domain.findall("cpu/numa/cell"):
        cell.attrib.pop("memAccess", None)


def _strip_video(parts: ET.Element) -> Iterator[str]:
    for video in parts.findall("video"):
        if any(driver.get("name") == "vhostuser" for driver in video.findall("driver")):
            drop(video, "driver")
            yield "a vhost-user video program"
        for model in video.findall("model"):
            if any(item.get("accel3d") == "yes" for item in model.findall("acceleration")):
                drop(model, "acceleration")
                yield "3D acceleration"


def _make_plain(interface: ET.Element) -> None:
    interface.set("type", "bridge")
    interface.attrib.pop("managed", None)
    drop(interface, "source", "driver", "teaming", "virtualport", "portForward", "backend", "rom")
    if interface.find("model") is None:
        child(interface, "model").set("type", "virtio")


def can_lower_memory(domain: ET.Element) -> bool:
    """Tell whether a VM's memory can be set to less: it is neither in NUMA cells nor in modules."""
    return domain.find("cpu/numa") is None and devices(domain).find("memory") is None


def lower_memory(domain: ET.Element, memory: int | None) -> None:
    """Give a VM at most ``memory`` bytes, where that can be set."""
    if memory is None or not can_lower_memory(domain) or memory >= memory_bytes(domain):
        return
    set_memory(domain, memory)


def set_memory(domain: ET.Element, memory: int) -> None:
    """Give a VM ``memory`` bytes."""
    for tag in ("memory", "currentMemory"):
        element = child(domain, tag)
        element.set("unit", "b")
        element.text = str(memory)

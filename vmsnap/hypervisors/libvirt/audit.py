"""Reading a clone's live XML back: what it could touch, held against what it may touch.

This is a list of what is allowed. Whatever libvirt has that is not on it is a breach.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt.inspect import disk_source, disk_target, is_writable_disk
from vmsnap.hypervisors.libvirt.xml import devices

# Devices that live inside QEMU and have no host end, or one that is read-only or random data.
_HARMLESS = frozenset(
    {
        "emulator",
        "controller",
        "input",
        "video",
        "memballoon",
        "rng",
        "watchdog",
        "panic",
        "sound",
        "audio",
        "iommu",
        "hub",
        "memory",
        "vsock",
        "tpm",
        "crypto",
    }
)
_CHARACTER = frozenset({"serial", "console", "parallel", "channel"})


def breaches(
    domain: ET.Element, *, overlays: Mapping[str, str], bridges: Mapping[str, str], nvram: str | None
) -> tuple[str, ...]:
    """Return a line for everything in a live XML that could reach production.

    ``overlays`` are the only files the domain may write, by target; ``bridges`` the only bridges, by MAC.
    """
    return tuple(_breaches(domain, overlays=overlays, bridges=bridges, nvram=nvram))


def require_private(
    domain: ET.Element, *, overlays: Mapping[str, str], bridges: Mapping[str, str], nvram: str | None, name: str
) -> None:
    """Raise SafetyError where the live XML has a breach."""
    found = breaches(domain, overlays=overlays, bridges=bridges, nvram=nvram)
    if found:
        raise SafetyError(
            f"{name} is not cut off from production and will not run",
            details="\n".join(found),
            remedy="please report this with the output of 'virsh dumpxml' of the guest",
        )


def _breaches(
    domain: ET.Element, *, overlays: Mapping[str, str], bridges: Mapping[str, str], nvram: str | None
) -> Iterator[str]:
    for device in devices(domain):
        if device.tag == "disk":
            yield from _disk(device, overlays)
        elif device.tag == "interface":
            yield from _interface(device, bridges)
        elif device.tag in _CHARACTER:
            yield from _character(device)
        elif device.tag == "graphics":
            yield from _graphics(device)
        elif device.tag == "rng":
            yield from _rng(device)
        elif device.tag not in _HARMLESS:
            yield f"device <{device.tag}> is not known to be harmless"
    live_nvram = (domain.findtext("os/nvram") or "").strip()
    if live_nvram and live_nvram != nvram:
        yield f"firmware variables at {live_nvram}"


def _disk(disk: ET.Element, overlays: Mapping[str, str]) -> Iterator[str]:
    target = disk_target(disk)
    if is_writable_disk(disk):
        if disk.get("type") != "file" or disk_source(disk) != overlays.get(target):
            yield f"disk {target} writes to {disk_source(disk) or disk.get('type')!r}"
    elif disk.get("type") not in ("file", "block", None) and disk.find("source") is not None:
        yield f"disk {target} reads from a {disk.get('type')} source"


def _interface(interface: ET.Element, bridges: Mapping[str, str]) -> Iterator[str]:
    mac = interface.find("mac")
    address = "" if mac is None else mac.get("address", "").lower()
    source = interface.find("source")
    bridge = None if source is None else source.get("bridge")
    if interface.get("type") != "bridge" or bridge is None or bridge != bridges.get(address):
        yield f"interface {address} is of type {interface.get('type')} on {bridge!r}"


def _character(device: ET.Element) -> Iterator[str]:
    kind = device.get("type")
    source = device.find("source")
    if kind == "unix" and device.tag == "channel":
        # libvirt's own place for a domain's channels holds the domain's name, so it is never the original's socket.
        path = "" if source is None else source.get("path", "")
        if (source is not None and source.get("mode") != "bind") or "/channel/" not in path:
            yield f"{device.tag} on the socket {path!r}"
    elif kind not in ("pty", "null", "spicevmc"):
        yield f"{device.tag} of type {kind}"


def _graphics(graphics: ET.Element) -> Iterator[str]:
    for listen in graphics.findall("listen"):
        if listen.get("type") not in ("none", "socket"):
            yield f"{graphics.get('type')} graphics listens on {listen.get('address') or listen.get('type')!r}"
    if graphics.get("port", "-1") not in ("-1", "0"):
        yield f"{graphics.get('type')} graphics on port {graphics.get('port')}"


def _rng(device: ET.Element) -> Iterator[str]:
    for backend in device.findall("backend"):
        if backend.get("model") not in ("random", "builtin"):
            yield f"random numbers from {backend.get('model')}"

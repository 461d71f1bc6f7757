"""Reading a clone's live XML back: what it could touch, held against what it may touch.

This is a list of what is allowed. Whatever libvirt has that is not on it is a breach.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping

from vmsnap.errors import SafetyError
from vmsnap.hypervisors.libvirt.inspect import disk_source, disk_target, is_writable_disk, nvram_path
from vmsnap.hypervisors.libvirt.xml import devices

# Devices that live inside QEMU and have no host end, or one that is read-only or random data.
_HARMLESS = frozenset(
    {
        "emulator",
        "controller",
        "memballoon",
        "watchdog",
        "panic",
        "sound",
        "iommu",
        "hub",
    }
)
_CHARACTER = frozenset({"serial", "console", "parallel", "channel"})
# Kinds of a device, told by one attribute, that have no host end either.
_HARMLESS_KINDS: Mapping[str, tuple[str, frozenset[str | None]]] = {
    "input": ("type", frozenset({"mouse", "tablet", "keyboard"})),
    "audio": ("type", frozenset({"none", "spice"})),
    # It speaks to the clone's own SPICE server, which listens nowhere.
    "redirdev": ("type", frozenset({"spicevmc"})),
    # All other models keep their contents in a file of the host.
    "memory": ("model", frozenset({"dimm", "virtio-mem"})),
    "crypto": ("model", frozenset({"virtio"})),
}


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
            yield from _character(device, domain)
        elif device.tag in _BY_TAG:
            yield from _BY_TAG[device.tag](device)
        elif device.tag == "graphics":
            yield from _graphics(device, domain)
        elif device.tag in _HARMLESS_KINDS:
            attribute, kinds = _HARMLESS_KINDS[device.tag]
            if device.get(attribute) not in kinds:
                yield f"{device.tag} of {attribute} {device.get(attribute)}"
        elif device.tag not in _HARMLESS:
            yield f"device <{device.tag}> is not known to be harmless"
    yield from _firmware(domain, nvram)


def _firmware(domain: ET.Element, nvram: str | None) -> Iterator[str]:
    for store in domain.findall("os/nvram"):
        if store.get("type", "file") != "file" or (nvram_path(domain) and nvram_path(domain) != nvram):
            yield f"firmware variables at {nvram_path(domain) or store.get('type')}"
    for loader in domain.findall("os/loader"):
        if loader.get("type") == "pflash" and loader.get("readonly") != "yes":
            yield f"firmware at {(loader.text or '').strip()} is writable"


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


def _is_own_socket(path: str, domain: ET.Element) -> bool:
    """Tell whether a socket is in a folder that libvirt made for this domain: its name begins with the domain's id.

    ``domain-7-NAME`` (virDomainDefGetShortName), since libvirt 9.8 plain ``7-NAME`` for channels.
    """
    number = re.escape(domain.get("id", ""))
    return bool(number) and re.search(rf"/(domain-)?{number}-[^/]*/", path) is not None


def _character(device: ET.Element, domain: ET.Element) -> Iterator[str]:
    kind = device.get("type")
    source = device.find("source")
    if kind == "unix" and device.tag == "channel":
        path = "" if source is None else source.get("path", "")
        # Without a source libvirt makes the socket in a place of its own when the domain starts.
        if source is not None and (source.get("mode") != "bind" or not _is_own_socket(path, domain)):
            yield f"{device.tag} on the socket {path!r}"
    elif kind not in ("pty", "null", "spicevmc"):
        yield f"{device.tag} of type {kind}"
    if device.find("log") is not None:
        yield f"{device.tag} with a log file"


def _graphics(graphics: ET.Element, domain: ET.Element) -> Iterator[str]:
    kind = graphics.get("type")
    listens = graphics.findall("listen")
    if kind not in ("vnc", "spice") or not listens:
        yield f"{kind} graphics that listens nobody knows where"
    for listen in listens:
        socket = listen.get("socket")
        if listen.get("type") not in ("none", "socket") or (socket and not _is_own_socket(socket, domain)):
            yield f"{kind} graphics listens on {listen.get('address') or socket or listen.get('type')!r}"
    for attribute in ("port", "tlsPort", "websocket"):
        if graphics.get(attribute, "-1") not in ("-1", "0"):
            yield f"{kind} graphics on {attribute} {graphics.get(attribute)}"


def _rng(device: ET.Element) -> Iterator[str]:
    for backend in device.findall("backend"):
        if backend.get("model") not in ("random", "builtin"):
            yield f"random numbers from {backend.get('model')}"


def _vsock(_device: ET.Element) -> Iterator[str]:
    # Programs of the host listen there, and no rule of a fence sees it.
    yield "vsock, which reaches the host"


def _video(device: ET.Element) -> Iterator[str]:
    if any(driver.get("name") == "vhostuser" for driver in device.findall("driver")):
        yield "video through a vhost-user program"


def _tpm(device: ET.Element) -> Iterator[str]:
    # Without a source its state is in a folder that libvirt names by the domain's UUID.
    for backend in device.findall("backend"):
        if backend.get("type") != "emulator" or backend.find("source") is not None:
            yield f"TPM of type {backend.get('type')} with a state of its own choosing"


_BY_TAG = {"rng": _rng, "vsock": _vsock, "video": _video, "tpm": _tpm}

"""Disks that an NBD server at a Unix socket holds, below overlays of environments: names, and living through its restarts.

QEMU gives a lost NBD server up at once unless its node has a ``reconnect-delay`` (qapi/block-core.json, BlockdevOptionsNbd).
libvirt sets that from ``<reconnect delay=...>``, which those older than 9.1 do not know. There the node below the overlay is
replaced, through QEMU's monitor, by one that has it (``blockdev-reopen``, QEMU 6.1).
"""

from __future__ import annotations

import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import libvirt

from vmsnap.errors import DriverError
from vmsnap.hypervisors.libvirt import rewrite
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_target, writable_disks
from vmsnap.hypervisors.libvirt.monitor import Monitor, MonitorError
from vmsnap.hypervisors.libvirt.processes import PID_FILES, pid_of
from vmsnap.hypervisors.libvirt.xml import parse, unparse
from vmsnap.model.capture import DiskImage

FORMAT = "nbd"
RECONNECT_SECONDS = 7 * 24 * 3600
"""How long a guest waits for its export before its reads fail."""
_LOG = logging.getLogger(__name__)
_QEMU_MODELS = ("qemu", "kvm")


def uri(image: DiskImage) -> str:
    """Return the URI of a served image (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md)."""
    return f"nbd+unix:///{quote(image.target, safe='')}?socket={quote(image.path)}"


def define(connection: Any, text: str, *, socket: str) -> None:
    """Define a domain whose disks are served, with what this libvirt knows of reconnecting. Raises libvirtError."""
    flags = libvirt.VIR_DOMAIN_DEFINE_VALIDATE
    try:
        connection.defineXMLFlags(_with(text, socket=socket, reconnect_seconds=RECONNECT_SECONDS), flags)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_XML_INVALID_SCHEMA:
            raise
        connection.defineXMLFlags(_with(text, socket=socket, reconnect_seconds=None), flags)


def _with(text: str, *, socket: str, reconnect_seconds: int | None) -> str:
    domain = parse(text)
    rewrite.set_served(domain, socket=socket, reconnect_seconds=reconnect_seconds)
    return unparse(domain)


def is_served(disk: ET.Element) -> bool:
    """Tell whether a disk's overlay is over an NBD export."""
    source = disk.find("backingStore/source")
    return source is not None and source.get("protocol") == "nbd"


def keep_reconnecting(domain: Any, *, pid_files: Path = PID_FILES) -> None:
    """Replace the NBD nodes of a running domain that would give up at once. May be repeated. Raises DriverError."""
    with translated("look at an environment's disks"):
        live = parse(domain.XMLDesc(0))
        name = domain.name()
    disks = [disk for disk in writable_disks(live) if is_served(disk)]
    if all(disk.find("backingStore/source/reconnect") is not None for disk in disks):
        return
    monitor = Monitor(domain)
    nodes = {node["node-name"] for node in monitor.ask("query-named-block-nodes", flat=True)}
    options = {option["node-name"]: option for option in _options_of(name, pid_files=pid_files)}
    for disk in disks:
        node = node_name(disk_target(disk))
        host, source = disk.find("backingStore/source/host"), disk.find("source")
        if node in nodes or host is None or source is None:
            continue
        top = f"libvirt-{source.get('index', '')}-format"
        if top not in options:
            raise DriverError(
                f"QEMU's options for disk {disk_target(disk)} of {name!r} are not known, so its export must not restart",
                remedy="use libvirt 9.1 or newer, which keeps such disks itself",
            )
        monitor.ask(
            "blockdev-add",
            driver="nbd",
            server={"type": "unix", "path": host.get("socket", "")},
            export=disk_target(disk),
            node_name=node,
            read_only=True,
            reconnect_delay=RECONNECT_SECONDS,
        )
        try:
            monitor.ask("blockdev-reopen", options=[{**options[top], "backing": node}])
        except MonitorError:
            forget(domain, target=disk_target(disk))
            raise
        _LOG.debug("disk %s of %s waits for its export from now on", disk_target(disk), name)


def node_name(target: str) -> str:
    """Return the name of the node that replaces libvirt's below a disk's overlay."""
    return f"vmsnap-{target}"


def forget(domain: Any, *, target: str) -> None:
    """Remove the node again, once nothing is over it. Content where there is none."""
    try:
        Monitor(domain).ask("blockdev-del", node_name=node_name(target))
    except MonitorError as error:
        _LOG.debug("node of disk %s: %s", target, error)


def _options_of(name: str, *, pid_files: Path) -> Iterator[dict[str, Any]]:
    """Yield the ``-blockdev`` options that a domain's QEMU was started with: reopening a node wants all of them again."""
    pid = pid_of(name, pid_files=pid_files)
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") if pid is not None else []
    except OSError as error:
        raise DriverError(f"QEMU's command line for {name!r} cannot be read: {error.strerror}") from error
    for before, word in pairwise(words):
        if before == b"-blockdev" and word.startswith(b"{"):
            option = json.loads(word)
            if "node-name" in option:
                yield option


def reader_of(connection: Connection) -> tuple[int, int] | None:
    """Return the user and group that libvirt runs QEMU as; None where it runs it as itself."""
    with translated("ask libvirt what QEMU runs as"):
        capabilities = parse(connection.get().getCapabilities())
    for model in capabilities.findall("host/secmodel"):
        if model.findtext("model") != "dac":
            continue
        for label in model.findall("baselabel"):
            if label.get("type") in _QEMU_MODELS and label.text:
                # Numbers with a plus sign, see "Security label" in libvirt's formatdomain.
                user, _, group = label.text.partition(":")
                try:
                    return int(user), int(group)
                except ValueError:
                    return None
    return None

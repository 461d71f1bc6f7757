"""Bringing an environment home: from overlays over an NBD export to overlays over local images of the same content.

A running one is mirrored, shallow, into a new overlay over the local image, and pivoted to it: only what it wrote is copied.
One that is off has the backing of its overlay named anew. Each disk is looked at first, so that whatever a process that died
left is finished or begun again.
"""

from __future__ import annotations

import copy
import time
import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import DeadlineError, DriverError, EnvironmentNotFoundError
from vmsnap.hypervisors.libvirt import overlays, rewrite, served
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_source, find_disk
from vmsnap.hypervisors.libvirt.tools import run_tool, translated_os
from vmsnap.hypervisors.libvirt.xml import drop, parse, unparse
from vmsnap.model.capture import DiskImage

_POLL_SECONDS = 0.02
_COPY = (
    libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW
    | libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
    # A persistent domain wants to hear that the job ends with its process.
    | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
)


class Localising:
    """One environment to bring home. Use once."""

    def __init__(self, connection: Connection, *, name: str, folder: Path, images: tuple[DiskImage, ...]) -> None:
        self._connection = connection
        self._name = name
        self._folder = folder
        self._images = images

    def run(self, *, deadline: timedelta) -> None:
        """Do it. Raises EnvironmentNotFoundError, DeadlineError (it goes on by itself; call again), DriverError."""
        until = time.monotonic() + deadline.total_seconds()
        domain = self._connection.find_domain(self._name)
        if domain is None:
            raise EnvironmentNotFoundError(
                f"the VM of environment {self._name!r} is gone", remedy=f"vmsnap env destroy {self._name}"
            )
        for image in self._images:
            if domain.isActive():
                self._localise_live(domain, image, until=until)
            else:
                self._localise_definition(domain, image)
        for image in self._images:
            self._require_local(domain, image)
        for image in self._images:
            self._remove_unused(domain, image)

    def _old(self, image: DiskImage) -> Path:
        return self._folder / f"{image.target}.qcow2"

    def _new(self, image: DiskImage) -> Path:
        return self._folder / f"{image.target}.local.qcow2"

    def _disk(self, domain: Any, image: DiskImage, *, flags: int = 0) -> ET.Element:
        with translated(f"look at the environment {self._name!r}"):
            found = find_disk(parse(domain.XMLDesc(flags)), image.target)
        if found is None:
            raise DriverError(f"the environment {self._name!r} has no disk {image.target}")
        return found

    def _localise_live(self, domain: Any, image: DiskImage, *, until: float) -> None:
        disk = self._disk(domain, image)
        if not served.is_served(disk):
            return
        mirror = disk.find("mirror")
        if mirror is not None and not _goes_to(mirror, self._new(image)):
            raise DriverError(
                f"disk {image.target} of {self._name!r} has a block job of somebody else's",
                remedy=f"wait until it ends, or end it with 'virsh blockjob {self._name} {image.target} --abort'",
            )
        if mirror is None:
            self._begin_copy(domain, image, disk=disk)
        self._wait_ready(domain, image, until=until)
        with translated(f"put disk {image.target} of {self._name!r} on its local image"):
            domain.blockJobAbort(image.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        while self._disk(domain, image).find("mirror") is not None:
            self._require_time(image, until=until)
            time.sleep(_POLL_SECONDS)
        served.forget(domain, target=image.target)

    def _begin_copy(self, domain: Any, image: DiskImage, *, disk: ET.Element) -> None:
        new = self._new(image)
        overlays.create_overlay(new, base=image.path, base_format=image.image_format, size_bytes=image.size_bytes)
        wanted = copy.deepcopy(disk)
        rewrite.set_local(wanted, overlay=str(new), image=image.path)
        drop(wanted, "target", "alias", "address", "boot", "serial", "wwn", "vendor", "product", "iotune")
        with translated(f"copy what disk {image.target} of {self._name!r} has of its own"):
            domain.blockCopy(image.target, unparse(wanted), {}, _COPY)

    def _wait_ready(self, domain: Any, image: DiskImage, *, until: float) -> None:
        while True:
            mirror = self._disk(domain, image).find("mirror")
            if mirror is None:
                raise DriverError(
                    f"the copy of disk {image.target} of {self._name!r} ended before it was whole",
                    remedy="look at /var/log/libvirt/qemu and at the room in the store; it is tried again",
                )
            if mirror.get("ready") == "yes":
                return
            self._require_time(image, until=until)
            time.sleep(_POLL_SECONDS)

    def _require_time(self, image: DiskImage, *, until: float) -> None:
        if time.monotonic() > until:
            raise DeadlineError(
                f"disk {image.target} of {self._name!r} is not on its local image yet; it goes on by itself"
            )

    def _localise_definition(self, domain: Any, image: DiskImage) -> None:
        disk = self._disk(domain, image, flags=libvirt.VIR_DOMAIN_XML_INACTIVE)
        if not served.is_served(disk):
            return
        overlay = self._old(image)
        # -u: only the name in the header changes; what is below holds the same.
        run_tool(("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", image.path, "-F", image.image_format, str(overlay)))
        with translated(f"define the environment {self._name!r} anew"):
            definition = parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
            found = find_disk(definition, image.target)
            assert found is not None  # noqa: S101 - it was there
            rewrite.set_local(found, overlay=str(overlay), image=image.path)
            self._connection.get().defineXML(unparse(definition))

    def _require_local(self, domain: Any, image: DiskImage) -> None:
        wrong = [
            said
            for said, flags in (("", 0), ("the definition of ", libvirt.VIR_DOMAIN_XML_INACTIVE))
            if served.is_served(self._disk(domain, image, flags=flags))
        ]
        if wrong:
            raise DriverError(
                f"{wrong[0]}disk {image.target} of {self._name!r} is on its export still; it is tried again"
            )

    def _remove_unused(self, domain: Any, image: DiskImage) -> None:
        used = {disk_source(self._disk(domain, image, flags=flags)) for flags in (0, libvirt.VIR_DOMAIN_XML_INACTIVE)}
        for path in (self._old(image), self._new(image)):
            if str(path) not in used:
                with translated_os(f"remove {path}"):
                    path.unlink(missing_ok=True)


def _goes_to(mirror: ET.Element, path: Path) -> bool:
    source = mirror.find("source")
    return str(path) in (mirror.get("file"), None if source is None else source.get("file"))

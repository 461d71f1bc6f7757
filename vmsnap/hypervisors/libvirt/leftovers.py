"""Finding what runs left, from tags alone: domains' metadata and the names of overlays and copies."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import libvirt

from vmsnap.errors import VmsnapError
from vmsnap.hypervisors.libvirt import copies
from vmsnap.hypervisors.libvirt.connection import Connection, translate, translated
from vmsnap.hypervisors.libvirt.copies import CopyDetail
from vmsnap.hypervisors.libvirt.inspect import disk_source, writable_disks
from vmsnap.hypervisors.libvirt.overlays import OverlayDetail, OverlaysDetail, parse_name
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.hypervisors.libvirt.xml import parse, read_tag, text_of
from vmsnap.model.guest import DiskKind
from vmsnap.model.ids import RunId
from vmsnap.model.journal import Resource, ResourceKind

_KINDS = {"source": ResourceKind.SOURCE_OVERLAYS, "clone": ResourceKind.CLONE_OVERLAYS}


def image_resources(connection: Connection) -> tuple[Resource, ...]:
    """Return resources for all overlays of vmsnap beside the disks of any guest, and for copies of those disks.

    What stands on a copy, and the copy, may be beside the disks of several guests; it is said to be the first one's.
    """
    found: dict[tuple[RunId, str, str, str], list[OverlayDetail]] = defaultdict(list)
    copied: dict[tuple[RunId, str], list[CopyDetail]] = defaultdict(list)
    seen: set[str] = set()
    for guest, uuid, sources in _guests(connection):
        details = [
            detail
            for path in _overlay_files({Path(source).parent for source in sources})
            if (detail := _describe(path)) is not None
        ]
        # A guest in the middle of a run is on an overlay; its own disk is what that overlay is over.
        own = sources | {detail.base for detail in details if detail.overlay in sources}
        for detail in details:
            name = parse_name(detail.overlay)
            if name is None or detail.overlay in seen:
                continue
            if detail.base in own or copies.parse_name(detail.base) is not None:
                seen.add(detail.overlay)
                found[name.run, name.role, guest, uuid].append(detail)
        for path, (run, target) in _copy_files({Path(source).parent for source in own}):
            if str(path) not in seen:
                seen.add(str(path))
                copied[run, guest].append(CopyDetail(target=target, path=str(path), disk=""))
    overlaid = [
        Resource(
            kind=_KINDS[role],
            run=run,
            guest=guest,
            name=f"{role} overlays of {guest}",
            detail=OverlaysDetail(uuid=uuid, disks=tuple(details)).model_dump_json(),
        )
        for (run, role, guest, uuid), details in found.items()
    ]
    return (
        *overlaid,
        *(copies.resource(run, guest=guest, detail=tuple(those)) for (run, guest), those in copied.items()),
    )


def _guests(connection: Connection) -> Iterator[tuple[str, str, set[str]]]:
    with translated("list its guests"):
        domains = connection.get().listAllDomains(0)
    for domain in domains:
        try:
            text = domain.XMLDesc(0)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise translate(error, doing="describe a guest") from error
            # It ended between the listing and the question.
            continue
        root = parse(text)
        if read_tag(root) is None:
            disks = writable_disks(root)
            yield text_of(root, "name"), text_of(root, "uuid"), {disk_source(d) for d in disks} - {""}


def _copy_files(folders: set[Path]) -> Iterator[tuple[Path, tuple[RunId, str]]]:
    for folder in folders:
        if folder.is_dir():
            for entry in sorted(folder.iterdir()):
                name = copies.parse_name(entry.name)
                if name is not None:
                    yield entry, name


def _overlay_files(folders: set[Path]) -> Iterator[Path]:
    for folder in folders:
        if folder.is_dir():
            yield from sorted(entry for entry in folder.iterdir() if parse_name(entry.name) is not None)


def _describe(path: Path) -> OverlayDetail | None:
    """Return what the overlay's own header says, or None for a file that cannot be read (half made: no data in it)."""
    name = parse_name(str(path))
    if name is None:
        return None
    try:
        info = json.loads(run_tool(("qemu-img", "info", "-U", "--output=json", "-f", "qcow2", str(path))))
        base = str(info["full-backing-filename"])
        return OverlayDetail(
            target=name.target,
            overlay=str(path),
            base=base,
            base_format=str(info["backing-filename-format"]),
            base_kind=DiskKind.BLOCK if Path(base).is_block_device() else DiskKind.FILE,
            size_bytes=int(info["virtual-size"]),
        )
    except (VmsnapError, KeyError, ValueError):
        return None


def jobs_on(connection: Connection, guest: str) -> tuple[str, ...]:
    """Return the job that libvirt does on a running guest, as a sentence: a capture, a migration, a save, a dump."""
    domain = connection.find_domain(guest) if guest else None
    if domain is None:
        return ()
    with translated(f"look at jobs of {guest!r}"):
        if not domain.isActive() or domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE:
            return ()
    shown = f"'virsh domjobinfo {guest}' shows it, 'virsh domjobabort {guest}' ends one that nobody waits for"
    return (f"libvirt does a job on {guest!r}, perhaps a capture: {shown}",)

"""Small helpers over libvirt's XML, and the tag that vmsnap puts on domains of its own."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass

from vmsnap.errors import DriverError
from vmsnap.model.ids import RunId, is_run_id

TAG_NAMESPACE = "https://vmsnap.org/xmlns/domain/1"
TAG_PREFIX = "vmsnap"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"

# ElementTree renames unknown prefixes to ns0; libvirt accepts that, people reading dumpxml would not.
ET.register_namespace(TAG_PREFIX, TAG_NAMESPACE)
ET.register_namespace("qemu", QEMU_NAMESPACE)


def parse(text: str) -> ET.Element:
    """Parse XML that libvirt wrote. Raises DriverError."""
    try:
        return ET.fromstring(text)  # noqa: S314 - written by libvirtd, which is trusted with the host already
    except ET.ParseError as error:
        raise DriverError(f"libvirt returned XML that cannot be parsed: {error}") from error


def unparse(element: ET.Element) -> str:
    """Return the XML as text."""
    return ET.tostring(element, encoding="unicode")


def text_of(element: ET.Element, path: str, *, default: str = "") -> str:
    """Return the text of a child, or the default."""
    return (element.findtext(path) or default).strip()


def child(element: ET.Element, tag: str) -> ET.Element:
    """Return the child of that tag, made at the end where there is none."""
    found = element.find(tag)
    return found if found is not None else ET.SubElement(element, tag)


def drop(element: ET.Element, *tags: str) -> None:
    """Remove all direct children with these tags."""
    for tag in tags:
        for found in element.findall(tag):
            element.remove(found)


def devices(domain: ET.Element) -> ET.Element:
    """Return the ``<devices>`` element. Raises DriverError where there is none."""
    found = domain.find("devices")
    if found is None:
        raise DriverError("libvirt returned a domain without devices")
    return found


@dataclass(frozen=True, kw_only=True)
class Tag:
    """What vmsnap writes into the metadata of domains it made. ``kind``: ``clone`` or ``environment``."""

    run: RunId
    kind: str
    guest: str


def set_tag(domain: ET.Element, tag: Tag) -> None:
    """Put the tag into the domain's metadata; every other metadata of the original goes (it describes the original)."""
    drop(domain, "metadata")
    metadata = ET.SubElement(domain, "metadata")
    ET.SubElement(metadata, f"{{{TAG_NAMESPACE}}}run", {"id": tag.run, "kind": tag.kind, "guest": tag.guest})


def read_tag(domain: ET.Element) -> Tag | None:
    """Return the tag of a domain that vmsnap made, or None for any other domain."""
    element = domain.find(f"metadata/{{{TAG_NAMESPACE}}}run")
    if element is None or not is_run_id(element.get("id", "")):
        return None
    return Tag(run=RunId(element.get("id", "")), kind=element.get("kind", ""), guest=element.get("guest", ""))

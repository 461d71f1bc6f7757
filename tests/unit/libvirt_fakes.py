"""A libvirt domain in memory, as far as the return of a source to its own disks goes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from typing import Any

import libvirt

from tests.unit.libvirt_domains import UUID
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.inspect import find_disk
from vmsnap.hypervisors.libvirt.xml import child, devices, drop, parse, unparse

RUNNING = (libvirt.VIR_DOMAIN_RUNNING, 1)


def disk_xml(target: str, source: str, *, kind: str = "qcow2", inside: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{kind}'/><source file='{source}'/>{inside}"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


def domain_of(*disks: str, name: str = "db1") -> str:
    return f"<domain><name>{name}</name><uuid>{UUID}</uuid><devices>{''.join(disks)}</devices></domain>"


class FakeDomain:
    """``live`` None: the guest is off. ``definition`` None: it is transient. ``calls`` lists what was changed."""

    monitor_used = False

    def __init__(self, *, live: str | None, definition: str | None) -> None:
        self.live = live
        self.definition = definition
        self.calls: list[str] = []
        self.states = RUNNING
        self.job: int | None = None
        self.saved = False
        self.ready_after = 1
        self.pivot_updates_definition = True
        self.max_downtime_ms = 300

    def isActive(self) -> int:  # noqa: N802 - libvirt's names
        return int(self.live is not None)

    def isPersistent(self) -> int:  # noqa: N802
        return int(self.definition is not None)

    def messages(self, flags: int) -> list[str]:
        assert flags == 0
        return ["tainted: custom monitor control commands issued"] if self.monitor_used else []

    def UUIDString(self) -> str:  # noqa: N802
        return UUID

    def name(self) -> str:
        return parse(self.live or self.definition or "").findtext("name") or ""

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        inactive = self.live is None or flags & libvirt.VIR_DOMAIN_XML_INACTIVE
        text = self.definition if inactive else self.live
        assert text is not None
        if not inactive:
            self._tick()
        return text

    def _tick(self) -> None:
        """Let running commits come nearer to READY."""
        assert self.live is not None
        root = parse(self.live)
        for mirror in devices(root).findall("disk/mirror"):
            if mirror.get("polls"):
                left = int(mirror.get("polls", "0")) - 1
                mirror.set("polls", str(left))
                if left <= 0:
                    del mirror.attrib["polls"]
                    mirror.set("ready", "yes")
        self.live = unparse(root)

    def jobInfo(self) -> Sequence[int]:  # noqa: N802
        return [libvirt.VIR_DOMAIN_JOB_NONE if self.job is None else libvirt.VIR_DOMAIN_JOB_UNBOUNDED]

    def jobStats(self) -> dict[str, int]:  # noqa: N802
        return {} if self.job is None else {"operation": self.job}

    def migrateGetMaxDowntime(self) -> int:  # noqa: N802
        return self.max_downtime_ms

    def migrateSetMaxDowntime(self, milliseconds: int, flags: int) -> None:  # noqa: N802
        assert flags == 0
        self.max_downtime_ms = milliseconds

    def abortJob(self) -> None:  # noqa: N802
        self.calls.append("abort job")
        self.job = None

    def state(self) -> Sequence[int]:
        return list(self.states)

    def resume(self) -> None:
        self.calls.append("resume")
        self.states = RUNNING

    def blockCommit(self, target: str, base: str, top: str, bandwidth: int, flags: int) -> None:  # noqa: N802
        assert (bandwidth, flags) == (0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        root, disk = self._disk(target)
        source = disk.find("source")
        assert source is not None
        assert source.get("file") == top
        self.calls.append(f"commit {target}")
        mirror = ET.SubElement(disk, "mirror", {"type": "file", "job": "active-commit", "polls": str(self.ready_after)})
        ET.SubElement(mirror, "source", {"file": base})
        self.live = unparse(root)

    def blockJobAbort(self, target: str, flags: int) -> None:  # noqa: N802
        assert flags == libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT
        root, disk = self._disk(target)
        mirror = disk.find("mirror")
        assert mirror is not None
        assert mirror.get("ready") == "yes", "not ready for pivot yet"
        self.calls.append(f"pivot {target}")
        base = mirror.findall("source")[0].get("file", "")
        self._move(disk, base)
        self.live = unparse(root)
        if self.definition is not None and self.pivot_updates_definition:
            definition = parse(self.definition)
            persistent = find_disk(definition, target)
            if persistent is not None:
                self._move(persistent, base)
                self.definition = unparse(definition)

    def _disk(self, target: str) -> tuple[ET.Element, ET.Element]:
        assert self.live is not None
        root = parse(self.live)
        disk = find_disk(root, target)
        assert disk is not None
        return root, disk

    def _move(self, disk: ET.Element, base: str) -> None:
        drop(disk, "source", "mirror", "backingStore")
        ET.SubElement(disk, "source", {"file": base})
        child(disk, "driver").set("type", "raw")

    def hasManagedSaveImage(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return int(self.saved)

    def updateDeviceFlags(self, text: str, flags: int) -> None:  # noqa: N802
        assert flags == libvirt.VIR_DOMAIN_AFFECT_CONFIG
        assert self.definition is not None
        new = parse(text)
        root = parse(self.definition)
        target = child(new, "target").get("dev", "")
        old = find_disk(root, target)
        assert old is not None
        devices(root).remove(old)
        devices(root).append(new)
        self.definition = unparse(root)
        self.calls.append(f"define {target}")


class FakeConnection(Connection):
    """A connection that knows these domains."""

    def __init__(self, *domains: FakeDomain) -> None:
        super().__init__("fake:///")
        self._domains = domains

    def get(self) -> Any:
        return self

    def listAllDomains(self, flags: int) -> list[FakeDomain]:  # noqa: N802
        assert flags == 0
        return list(self._domains)

    def find_by_uuid(self, uuid: str) -> Any | None:
        return next((domain for domain in self._domains if domain.UUIDString() == uuid), None)

    def domain(self, name: str) -> Any:
        (found,) = (domain for domain in self._domains if domain.name() == name)
        return found

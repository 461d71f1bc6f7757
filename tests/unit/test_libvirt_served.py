"""Environments over an NBD export: how they are defined, and how those that are off come home."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.unit.libvirt_domains import RUN, domain_xml
from tests.unit.libvirt_fakes import FakeConnection, FakeDomain
from vmsnap.errors import EnvironmentNotFoundError
from vmsnap.hypervisors.libvirt import localising, overlays, served
from vmsnap.hypervisors.libvirt.connection import Connection
from vmsnap.hypervisors.libvirt.environments import EnvironmentFolders, Environments
from vmsnap.hypervisors.libvirt.inspect import disk_source, writable_disks
from vmsnap.hypervisors.libvirt.tools import run_tool
from vmsnap.hypervisors.libvirt.xml import parse
from vmsnap.model.capture import DiskImage
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.manifest import MachineRecord

SOCKET = "/run/vmsnap/x/replica/nbd"
PLAN = EnvironmentPlan(
    run=RUN,
    guest="db1",
    name="db1-test",
    uuid="5f1d2b52-7a39-4d0b-8a37-3d2f0d1b8c44",
    macs=("52:54:00:00:00:01",),
    network="test",
    export_socket=SOCKET,
)


class Defining:
    """A libvirt that knows ``<reconnect>``, or does not."""

    def __init__(self, *, knows: bool) -> None:
        self.knows = knows
        self.defined: list[str] = []

    def defineXMLFlags(self, text: str, flags: int) -> None:  # noqa: N802 - libvirt's names
        assert flags == libvirt.VIR_DOMAIN_DEFINE_VALIDATE
        if "<reconnect" in text and not self.knows:
            error = libvirt.libvirtError("no such element")
            error.err = (libvirt.VIR_ERR_XML_INVALID_SCHEMA, 0, "no such element", 2, "", None, None, 0, 0)
            raise error
        self.defined.append(text)


def definition(folder: Path) -> str:
    machine = MachineRecord(
        hypervisor="libvirt", definition=domain_xml(), uuid="u", memory_bytes=1, vcpus=1, nvram=None, macs=PLAN.macs
    )
    environments = Environments(FakeConnection(), folders=EnvironmentFolders(folder))
    defining = Defining(knows=False)
    served.define(defining, environments.xml(PLAN, machine=machine, fence=None), socket=SOCKET)
    (text,) = defining.defined
    return text


@pytest.mark.parametrize("knows", [True, False])
def test_every_disk_is_over_its_export_and_waits_for_it_where_libvirt_can_say_so(
    tmp_path: Path, *, knows: bool
) -> None:
    defining = Defining(knows=knows)
    served.define(defining, definition(tmp_path), socket=SOCKET)
    (text,) = defining.defined
    disks = writable_disks(parse(text))
    assert disks
    for disk in disks:
        source, host = disk.find("backingStore/source"), disk.find("backingStore/source/host")
        assert source is not None
        assert host is not None
        target = disk.find("target")
        assert target is not None
        assert (source.get("protocol"), source.get("name")) == ("nbd", target.get("dev"))
        assert host.attrib == {"transport": "unix", "socket": SOCKET}
        assert disk.find("backingStore/backingStore") is not None, "the chain ends there"
        assert (disk.find("backingStore/source/reconnect") is not None) == knows
        assert served.is_served(disk)


def test_other_errors_of_libvirt_are_not_hidden() -> None:
    class Refusing:
        def defineXMLFlags(self, text: str, flags: int) -> None:  # noqa: N802
            raise libvirt.libvirtError("no")

    with pytest.raises(libvirt.libvirtError):
        served.define(Refusing(), domain_xml(), socket=SOCKET)


def test_a_socket_of_any_name_has_a_uri() -> None:
    image = DiskImage(target="vda", path="/run/a b/?&x", image_format="nbd", size_bytes=1)
    assert served.uri(image) == "nbd+unix:///vda?socket=/run/a%20b/%3F%26x"


@pytest.mark.parametrize(
    ("model", "reader"),
    [
        ("<model>dac</model><baselabel type='kvm'>+64055:+108</baselabel>", (64055, 108)),
        ("<model>dac</model><baselabel type='kvm'>qemu:qemu</baselabel>", None),
        ("<model>selinux</model><baselabel type='kvm'>system_u</baselabel>", None),
    ],
)
def test_who_reads_the_disks(model: str, reader: tuple[int, int] | None) -> None:
    class Capable:
        def getCapabilities(self) -> str:  # noqa: N802
            return f"<capabilities><host><secmodel>{model}</secmodel></host></capabilities>"

    assert served.reader_of(_connection(Capable())) == reader


def _connection(inner: Any) -> Connection:
    class Connected(FakeConnection):
        def get(self) -> Any:
            return inner

    return Connected()


class Off(FakeDomain):
    """A domain that is off."""


class Redefining:
    def __init__(self, domain: FakeDomain) -> None:
        self.domain = domain

    def defineXML(self, text: str) -> None:  # noqa: N802 - libvirt's names
        self.domain.definition = text


def test_one_that_is_off_comes_home_by_its_definition(tmp_path: Path) -> None:
    folder = tmp_path / RUN
    folder.mkdir()
    text = definition(tmp_path)
    images = []
    for disk in writable_disks(parse(text)):
        target = disk.find("target")
        assert target is not None
        name = target.get("dev", "")
        raw = tmp_path / f"{name}.raw"
        raw.write_bytes(bytes(1 << 20))
        images.append(DiskImage(target=name, path=str(raw), image_format="raw", size_bytes=1 << 20))
    for one in images:
        away = DiskImage(target=one.target, path=SOCKET, image_format="nbd", size_bytes=one.size_bytes)
        overlays.create_overlay(
            folder / f"{one.target}.qcow2", base=served.uri(away), base_format="raw", size_bytes=one.size_bytes
        )
    domain = Off(live=None, definition=text)

    class Connected(FakeConnection):
        def get(self) -> Any:
            return Redefining(domain)

        def find_domain(self, name: str) -> Any:
            return domain if name == PLAN.name else None

    for _ in range(2):
        coming = localising.Localising(Connected(), name=PLAN.name, folder=folder, images=tuple(images))
        coming.run(deadline=timedelta(seconds=10))
    for disk, image in zip(writable_disks(parse(domain.definition or "")), images, strict=True):
        assert not served.is_served(disk)
        backing = disk.find("backingStore/source")
        assert backing is not None
        assert backing.get("file") == image.path
        assert f'"backing-filename": "{image.path}"' in run_tool(
            ("qemu-img", "info", "--output=json", disk_source(disk))
        )
    gone = localising.Localising(Connected(), name="other", folder=folder, images=tuple(images))
    with pytest.raises(EnvironmentNotFoundError):
        gone.run(deadline=timedelta(seconds=1))

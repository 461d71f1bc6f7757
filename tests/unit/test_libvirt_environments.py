"""Environments on a libvirt network: their NICs are their operator's choice, everything else is checked all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.libvirt_domains import RUN, domain_xml
from tests.unit.libvirt_fakes import FakeConnection, FakeDomain
from vmsnap.errors import PreconditionError, SafetyError
from vmsnap.hypervisors.libvirt.environments import EnvironmentFolders, Environments
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.manifest import MachineRecord

PLAN = EnvironmentPlan(
    run=RUN,
    guest="db1",
    name="db1-test",
    uuid="5f1d2b52-7a39-4d0b-8a37-3d2f0d1b8c44",
    macs=("52:54:00:00:00:01",),
    network="test",
)


class Startable(FakeDomain):
    def createWithFlags(self, flags: int) -> None:  # noqa: N802 - libvirt's names
        self.calls.append("create")


def attach(folder: Path, *, definition: str) -> None:
    machine = MachineRecord(
        hypervisor="libvirt", definition=definition, uuid="u", memory_bytes=1, vcpus=1, nvram=None, macs=PLAN.macs
    )
    folders = EnvironmentFolders(folder)
    xml = Environments(FakeConnection(), folders=folders).xml(PLAN, machine=machine, fence=None)
    connection = FakeConnection(Startable(live=xml, definition=xml))
    Environments(connection, folders=folders).attach(PLAN, fence=None, nvram=False)


def test_a_network_of_the_operators_choice_is_no_breach(tmp_path: Path) -> None:
    attach(tmp_path, definition=domain_xml())


class Networks(FakeConnection):
    """A connection with one network, which goes on to a bridge of the host."""

    def __init__(self, *, bridge: str) -> None:
        super().__init__()
        self.bridge = bridge
        self.defined: list[str] = []

    def networkLookupByName(self, name: str) -> Networks:  # noqa: N802
        assert name == "test"
        return self

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        assert flags == 0
        return f"<network><name>test</name><forward mode='bridge'/><bridge name='{self.bridge}'/></network>"

    def find_domain(self, name: str) -> None:
        assert name == PLAN.name

    def defineXMLFlags(self, xml: str, flags: int) -> None:  # noqa: N802
        self.defined.append(xml)


@pytest.mark.parametrize(("bridge", "refused"), [("br-prod", True), ("br-test", False)])
def test_the_network_of_the_original_is_refused(tmp_path: Path, bridge: str, *, refused: bool) -> None:
    networks = Networks(bridge=bridge)
    machine = MachineRecord(
        hypervisor="libvirt", definition=domain_xml(), uuid="u", memory_bytes=1, vcpus=1, nvram=None, macs=PLAN.macs
    )
    environments = Environments(networks, folders=EnvironmentFolders(tmp_path))
    if refused:
        with pytest.raises(PreconditionError, match="would take its address") as caught:
            environments.define(PLAN, machine=machine, fence=None)
        assert "env serve" in str(caught.value.remedy)
    else:
        environments.define(PLAN, machine=machine, fence=None)
    assert bool(networks.defined) is not refused


def test_a_folder_of_the_host_is_left_out(tmp_path: Path) -> None:
    shared = "<filesystem type='mount'><source dir='/srv/production'/><target dir='share'/></filesystem>"
    attach(tmp_path, definition=domain_xml().replace("</devices>", f"{shared}</devices>"))


def test_a_device_that_nobody_knows_is_a_breach(tmp_path: Path) -> None:
    unknown = "<portal><source path='/srv/production'/></portal>"
    with pytest.raises(SafetyError) as caught:
        attach(tmp_path, definition=domain_xml().replace("</devices>", f"{unknown}</devices>"))
    assert "portal" in str(caught.value.details)

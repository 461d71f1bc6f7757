"""Environments: VMs over stored images, defined anew from the machine's XML in the manifest."""

from __future__ import annotations

import logging
import shutil
import stat
import xml.etree.ElementTree as ET
from datetime import timedelta
from pathlib import Path
from typing import Any

import libvirt

from vmsnap.errors import BugError, EnvironmentNotFoundError, PreconditionError
from vmsnap.hypervisors.libvirt import audit, localising, overlays, rewrite, served
from vmsnap.hypervisors.libvirt.clones import state_of
from vmsnap.hypervisors.libvirt.connection import Connection, translated
from vmsnap.hypervisors.libvirt.inspect import disk_target, nic_mac, writable_disks
from vmsnap.hypervisors.libvirt.stripping import set_memory, strip
from vmsnap.hypervisors.libvirt.xml import Tag, child, devices, drop, parse, unparse
from vmsnap.model.capture import DiskImage
from vmsnap.model.environment import EnvironmentPlan
from vmsnap.model.guest import GuestState
from vmsnap.model.ids import is_run_id
from vmsnap.model.isolation import FencePlan, IsolationProof
from vmsnap.model.manifest import MachineRecord

_LOG = logging.getLogger(__name__)
_NVRAM = "nvram.fd"


class EnvironmentFolders:
    """Where environments keep their overlays: ``<folder>/<run>/<target>.qcow2``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, plan: EnvironmentPlan) -> Path:
        """Return the folder of an environment."""
        return self._folder / plan.run

    def folder_of(self, run: str) -> Path:
        """Return the folder of a run's environment."""
        return self._folder / run

    def prepare(self, plan: EnvironmentPlan, *, images: tuple[DiskImage, ...], nvram: str | None) -> None:
        """Make the overlays. QEMU's user must be able to pass through the folder, not to list it."""
        folder = self.of(plan)
        folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        for path in (folder, *(Path(image.path).parent for image in images)):
            _require_passable(path)
        for image in images:
            overlays.create_overlay(
                folder / f"{image.target}.qcow2",
                base=served.uri(image) if image.image_format == served.FORMAT else image.path,
                base_format="raw" if image.image_format == served.FORMAT else image.image_format,
                size_bytes=image.size_bytes,
            )
        if nvram is not None:
            shutil.copyfile(nvram, folder / _NVRAM)
            (folder / _NVRAM).chmod(0o600)

    def remove(self, run: str) -> None:
        """Remove an environment's folder. Content where it is gone."""
        if not is_run_id(run):
            raise BugError(f"{run!r} is not a run's id; no folder of that name is removed")
        if (self._folder / run).exists():
            shutil.rmtree(self._folder / run)

    def runs(self) -> tuple[str, ...]:
        """Return the runs that have a folder."""
        if not self._folder.is_dir():
            return ()
        return tuple(sorted(entry.name for entry in self._folder.iterdir() if is_run_id(entry.name)))

    def written_bytes(self, run: str) -> int:
        """Return what an environment's overlays occupy."""
        folder = self._folder / run
        if not folder.is_dir():
            return 0
        return sum(path.stat().st_blocks * 512 for path in folder.glob("*.qcow2"))


def _require_passable(path: Path) -> None:
    """Raise PreconditionError where QEMU's user cannot pass through a folder on the way to a file."""
    for folder in (path, *path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            raise PreconditionError(
                f"QEMU runs as a user of its own, which cannot pass through {folder}",
                remedy=f"chmod o+x {folder} (it lets others pass, not list; the images themselves stay private)",
            )


def _described(network: Any) -> ET.Element:
    with translated("describe a network"):
        return parse(network.XMLDesc(0))


class Environments:
    """All environments of one connection."""

    def __init__(self, connection: Connection, *, folders: EnvironmentFolders) -> None:
        self._connection = connection
        self._folders = folders

    def define(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> None:
        """Define the VM, not started. See ports.hypervisor."""
        if self._connection.find_domain(plan.name) is not None:
            raise PreconditionError(f"there is already a VM named {plan.name!r}", remedy="choose another with --name")
        if plan.network is not None:
            self._require_network(plan.network, original=parse(machine.definition))
        text = self.xml(plan, machine=machine, fence=fence)
        with translated(f"define the environment {plan.name!r}"):
            if plan.export_socket is not None:
                served.define(self._connection.get(), text, socket=plan.export_socket)
                return
            self._connection.get().defineXMLFlags(text, libvirt.VIR_DOMAIN_DEFINE_VALIDATE)

    def xml(self, plan: EnvironmentPlan, *, machine: MachineRecord, fence: FencePlan | None) -> str:
        """Return the environment's XML."""
        domain = parse(machine.definition)
        left_out = strip(domain)
        if left_out:
            _LOG.info("the environment %r goes without: %s", plan.name, ", ".join(left_out))
        folder = self._folders.of(plan)
        rewrite.set_identity(
            domain,
            rewrite.Identity(
                name=plan.name, uuid=plan.uuid, tag=Tag(run=plan.run, kind="environment", guest=plan.guest)
            ),
        )
        targets = [disk_target(disk) for disk in writable_disks(domain)]
        rewrite.set_disks(domain, {target: str(folder / f"{target}.qcow2") for target in targets})
        if fence is not None:
            attachments = tuple(
                rewrite.NicAttachment(bridge=port.bridge, tap=port.tap, mac=port.mac) for port in fence.ports
            )
        else:
            attachments = tuple(rewrite.NicAttachment(network=plan.network, mac=mac) for mac in plan.macs)
        rewrite.set_nics(domain, attachments)
        rewrite.privatise_host_ends(domain)
        rewrite.set_nvram(domain, str(folder / _NVRAM) if machine.nvram is not None else None)
        rewrite.set_life(domain, reboot="restart", crash="destroy")
        if plan.memory_bytes is not None:
            set_memory(domain, plan.memory_bytes)
        if plan.vcpus is not None:
            drop(domain, "vcpus")
            for topology in domain.findall("cpu/topology"):
                child(domain, "cpu").remove(topology)
            element = child(domain, "vcpu")
            element.attrib.pop("current", None)
            element.text = str(plan.vcpus)
        return unparse(domain)

    def _require_network(self, name: str, *, original: ET.Element) -> None:
        """Refuse a network that is not there, or that the original is in.

        An environment has the original's host name, machine-id and addresses: beside it, it would answer for it, or take its
        DHCP lease, whose client identifier may be made of the machine-id (RFC 4361) and not of the MAC.
        """
        try:
            network = self._connection.get().networkLookupByName(name)
        except libvirt.libvirtError as error:
            raise PreconditionError(
                f"there is no libvirt network {name!r}",
                remedy="see 'virsh net-list --all', or leave --network out to get a fence",
            ) from error
        description = _described(network)
        bridge = description.find("bridge")
        mine = {name} if bridge is None else {name, bridge.get("name", "")}
        for source in devices(original).findall("interface/source"):
            if mine & {source.get("network", ""), source.get("bridge", "")} - {""}:
                raise PreconditionError(
                    f"the original is in the network {name!r}, and a test VM beside it would take its address",
                    remedy="name a libvirt network that the original is not in, or leave --network out and use "
                    "'vmsnap env serve' or 'vmsnap env forward'",
                )

    def attach(self, plan: EnvironmentPlan, *, fence: FencePlan | None, nvram: bool) -> None:
        """Create the environment's process, paused, and check what it could touch; its NICs only where it has a fence."""
        domain = self._connection.domain(plan.name)
        with translated(f"start the environment {plan.name!r}"):
            domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            live = parse(domain.XMLDesc(0))
        if plan.export_socket is not None:
            served.keep_reconnecting(domain)
        if fence is None:
            for interface in devices(live).findall("interface"):
                devices(live).remove(interface)
        folder = self._folders.of(plan)
        audit.require_private(
            live,
            overlays={disk_target(disk): str(folder / f"{disk_target(disk)}.qcow2") for disk in writable_disks(live)},
            bridges={} if fence is None else {port.mac: port.bridge for port in fence.ports},
            nvram=str(folder / _NVRAM) if nvram else None,
            name=f"the environment {plan.name!r}",
        )

    def start(self, plan: EnvironmentPlan, *, fenced: bool, proof: IsolationProof | None) -> None:
        """Let it boot. Raises BugError where it has a fence and no proof of it."""
        if fenced and (proof is None or proof.run != plan.run):
            raise BugError(f"the environment {plan.name!r} has a fence that was not proven")
        domain = self._connection.domain(plan.name)
        with translated(f"resume the environment {plan.name!r}"):
            domain.resume()

    def keep_reconnecting(self, name: str) -> None:
        """See to it that a running environment outlives its export. Does nothing where its disks are local."""
        domain = self.domain(name)
        if domain.isActive():
            served.keep_reconnecting(domain)

    def localise(self, name: str, *, run: str, images: tuple[DiskImage, ...], deadline: timedelta) -> None:
        """Put an environment on local images. See ports.hypervisor."""
        localising.Localising(self._connection, name=name, folder=self._folders.folder_of(run), images=images).run(
            deadline=deadline
        )

    def state(self, name: str) -> GuestState:
        """Return an environment's state. Raises EnvironmentNotFoundError."""
        return state_of(self.domain(name))

    def domain(self, name: str) -> Any:
        """Return an environment's domain. Raises EnvironmentNotFoundError."""
        domain = self._connection.find_domain(name)
        if domain is None:
            raise EnvironmentNotFoundError(
                f"the VM of environment {name!r} is gone", remedy=f"vmsnap env destroy {name}"
            )
        return domain


def macs_of(machine: MachineRecord) -> int:
    """Return how many NICs a stored machine has."""
    return len([nic_mac(interface) for interface in devices(parse(machine.definition)).findall("interface")])

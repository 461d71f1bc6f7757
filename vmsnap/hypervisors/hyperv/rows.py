"""What scripts answer, as values: a script emits objects of texts, numbers and truths, and nothing else is believed."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from vmsnap.errors import DriverError
from vmsnap.hypervisors.hyperv.connection import Row
from vmsnap.hypervisors.hyperv.tags import Tag, read_tag
from vmsnap.model.guest import GuestState

_STATES = {
    "Running": GuestState.RUNNING,
    "Paused": GuestState.PAUSED,
    # Its memory waits in a file: it executes nothing, and goes on where it was.
    "Saved": GuestState.PAUSED,
    "Off": GuestState.SHUT_OFF,
}


def text(row: Row, name: str) -> str:
    """Return a text of a row. Raises DriverError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise _unexpected(name, value)
    return value


def number(row: Row, name: str) -> int:
    """Return a whole number of a row. Raises DriverError."""
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _unexpected(name, value)
    return value


def measure(row: Row, name: str) -> float:
    """Return a number of a row. Raises DriverError."""
    value = row.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _unexpected(name, value)
    return float(value)


def flag(row: Row, name: str) -> bool:
    """Return a truth of a row. Raises DriverError."""
    value = row.get(name)
    if not isinstance(value, bool):
        raise _unexpected(name, value)
    return value


def _unexpected(name: str, value: object) -> DriverError:
    return DriverError(
        f"the Hyper-V host's answer makes no sense: {name} is {value!r}",
        remedy="is the module Hyper-V of the host one of Windows Server 2016 or later? 'vmsnap doctor' looks",
    )


def state_of(word: str) -> GuestState:
    """Return a state of Hyper-V (VMState) as vmsnap's."""
    return _STATES.get(word, GuestState.OTHER)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A VM as it is listed. ``state`` is Hyper-V's word; ``folder`` where its configuration is."""

    id: str
    name: str
    state: str
    notes: str
    folder: str

    @property
    def tag(self) -> Tag | None:
        """Return whose it is, or None for a VM that is not vmsnap's by its notes."""
        return read_tag(self.notes)


def machine_of(row: Row) -> Machine:
    """Return a VM of a row."""
    return Machine(
        id=text(row, "Id"),
        name=text(row, "Name"),
        state=text(row, "State"),
        notes=text(row, "Notes"),
        folder=text(row, "Folder"),
    )


@dataclass(frozen=True, kw_only=True)
class Drive:
    """A hard disk of a VM. ``physical``: a disk of the host passed through. ``parent`` empty: it stands on no other."""

    controller: str
    number: int
    location: int
    path: str
    physical: bool
    shared: bool
    vhd_format: str
    parent: str
    size_bytes: int
    file_bytes: int

    @property
    def target(self) -> str:
        """Return the disk's name: where it is plugged in."""
        return f"{self.controller.lower()}-{self.number}-{self.location}"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A network adapter of a VM. ``mac`` as ``00:15:5d:...``; ``switch`` and ``switch_id`` empty: not connected."""

    name: str
    mac: str
    dynamic: bool
    switch: str
    switch_id: str
    iov_weight: int
    addresses: tuple[IPv4Address, ...]


@dataclass(frozen=True, kw_only=True)
class Service:
    """An integration service by its GUID, which is the same on every host."""

    guid: str
    enabled: bool
    status: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """One VM as it is now. ``product_type`` is what its Windows says it is (2: a domain controller); 0: nobody said."""

    machine: Machine
    generation: int
    memory_bytes: int
    assigned_bytes: int
    processors: int
    clustered: bool
    replication: str
    checkpoints: int
    devices: int
    fibre_channel: int
    secure_boot: bool
    secure_boot_template: str
    tpm: bool
    shielded: bool
    product_type: int
    drives: tuple[Drive, ...]
    adapters: tuple[Adapter, ...]
    services: tuple[Service, ...]


def description_of(rows: tuple[Row, ...]) -> Description:
    """Return the VM that the rows of ``describe_machine`` tell of. Raises DriverError."""
    of_kind: dict[str, list[Row]] = {"machine": [], "disk": [], "adapter": [], "service": []}
    for row in rows:
        of_kind.setdefault(text(row, "Kind"), []).append(row)
    if len(of_kind["machine"]) != 1:
        raise _unexpected("Kind", [text(row, "Kind") for row in rows])
    (row,) = of_kind["machine"]
    return Description(
        machine=machine_of(row),
        generation=number(row, "Generation"),
        memory_bytes=number(row, "MemoryBytes"),
        assigned_bytes=number(row, "AssignedBytes"),
        processors=number(row, "Processors"),
        clustered=flag(row, "Clustered"),
        replication=text(row, "ReplicationState"),
        checkpoints=number(row, "Checkpoints"),
        devices=number(row, "AssignedDevices"),
        fibre_channel=number(row, "FibreChannel"),
        secure_boot=flag(row, "SecureBoot"),
        secure_boot_template=text(row, "SecureBootTemplate"),
        tpm=flag(row, "Tpm"),
        shielded=flag(row, "Shielded"),
        product_type=number(row, "ProductType"),
        drives=tuple(
            sorted(map(_drive, of_kind["disk"]), key=lambda drive: (drive.controller, drive.number, drive.location))
        ),
        adapters=tuple(map(_adapter, of_kind["adapter"])),
        services=tuple(map(_service, of_kind["service"])),
    )


def _drive(row: Row) -> Drive:
    return Drive(
        controller=text(row, "Controller"),
        number=number(row, "Number"),
        location=number(row, "Location"),
        path=text(row, "Path"),
        physical=flag(row, "Physical"),
        shared=flag(row, "Shared"),
        vhd_format=text(row, "Format"),
        parent=text(row, "Parent"),
        size_bytes=number(row, "SizeBytes"),
        file_bytes=number(row, "FileBytes"),
    )


def mac_of(digits: str) -> str:
    """Return a MAC as Hyper-V writes it, twelve digits, with colons and in small letters."""
    digits = digits.lower()
    return ":".join(digits[place : place + 2] for place in range(0, len(digits), 2))


def _adapter(row: Row) -> Adapter:
    return Adapter(
        name=text(row, "Name"),
        mac=mac_of(text(row, "Mac")),
        dynamic=flag(row, "Dynamic"),
        switch=text(row, "Switch"),
        switch_id=text(row, "SwitchId"),
        iov_weight=number(row, "IovWeight"),
        addresses=tuple(_addresses(text(row, "Addresses"))),
    )


def _addresses(words: str) -> list[IPv4Address]:
    found = []
    for word in words.split():
        try:
            found.append(IPv4Address(word))
        except ValueError:
            continue  # IPv6
    return found


def _service(row: Row) -> Service:
    return Service(guid=text(row, "Service"), enabled=flag(row, "Enabled"), status=text(row, "Status"))


@dataclass(frozen=True, kw_only=True)
class Switch:
    """A virtual switch. ``kind`` is Hyper-V's word; ``uplinks``: what of the host's hardware it is on."""

    id: str
    name: str
    kind: str
    notes: str
    uplinks: str
    with_host: bool


def switch_of(row: Row) -> Switch:
    """Return a switch of a row."""
    return Switch(
        id=text(row, "Id"),
        name=text(row, "Name"),
        kind=text(row, "Type"),
        notes=text(row, "Notes"),
        uplinks=text(row, "Uplinks"),
        with_host=flag(row, "WithHost"),
    )


@dataclass(frozen=True, kw_only=True)
class Plug:
    """An adapter of any VM, or of the host itself, and the switch it is on."""

    machine_id: str
    machine: str
    of_host: bool
    mac: str
    switch_id: str
    switch: str


def plug_of(row: Row) -> Plug:
    """Return an adapter of a row of ``list_adapters``."""
    return Plug(
        machine_id=text(row, "MachineId"),
        machine=text(row, "Machine"),
        of_host=flag(row, "OfHost"),
        mac=mac_of(text(row, "Mac")),
        switch_id=text(row, "SwitchId"),
        switch=text(row, "Switch"),
    )


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a host has left."""

    computer: str
    free_memory_bytes: int
    free_bytes: int
    file_system: str


def room_of(row: Row) -> Room:
    """Return the host of a row."""
    return Room(
        computer=text(row, "Computer"),
        free_memory_bytes=number(row, "FreeMemoryBytes"),
        free_bytes=number(row, "FreeBytes"),
        file_system=text(row, "FileSystem"),
    )


@dataclass(frozen=True, kw_only=True)
class CheckedDisk:
    """A virtual disk that was looked at."""

    path: str
    sound: bool
    vhd_format: str
    parent: str
    size_bytes: int


def checked_of(row: Row) -> CheckedDisk:
    """Return a disk of a row of ``check_disks``."""
    return CheckedDisk(
        path=text(row, "Path"),
        sound=flag(row, "Sound"),
        vhd_format=text(row, "Format"),
        parent=text(row, "Parent"),
        size_bytes=number(row, "SizeBytes"),
    )

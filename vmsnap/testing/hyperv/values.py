"""What is on a Hyper-V host, with the properties that cmdlets show, and in ``Truth`` what no cmdlet shows."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Protocol


class VMState(StrEnum):
    """``Microsoft.HyperV.PowerShell.VMState``."""

    OTHER = "Other"
    RUNNING = "Running"
    OFF = "Off"
    STOPPING = "Stopping"
    SAVED = "Saved"
    PAUSED = "Paused"
    STARTING = "Starting"
    RESET = "Reset"
    SAVING = "Saving"
    PAUSING = "Pausing"
    RESUMING = "Resuming"
    FAST_SAVED = "FastSaved"
    FAST_SAVING = "FastSaving"
    FORCE_SHUTDOWN = "ForceShutdown"
    RUNNING_CRITICAL = "RunningCritical"
    OFF_CRITICAL = "OffCritical"
    STOPPING_CRITICAL = "StoppingCritical"
    SAVED_CRITICAL = "SavedCritical"
    PAUSED_CRITICAL = "PausedCritical"
    STARTING_CRITICAL = "StartingCritical"


SETTLED = frozenset({VMState.RUNNING, VMState.OFF, VMState.SAVED, VMState.PAUSED})
"""States that are neither on the way to another one nor critical."""
ALIVE = frozenset(
    {VMState.RUNNING, VMState.PAUSED, VMState.STARTING, VMState.STOPPING, VMState.SAVING, VMState.RUNNING_CRITICAL}
    | {VMState.PAUSED_CRITICAL, VMState.PAUSING, VMState.RESUMING, VMState.STOPPING_CRITICAL, VMState.STARTING_CRITICAL}
)
"""States in which a VM has a worker process, memory, open disks and live ports."""


class SwitchType(StrEnum):
    """``Microsoft.HyperV.PowerShell.VMSwitchType``."""

    PRIVATE = "Private"
    INTERNAL = "Internal"
    EXTERNAL = "External"


class VhdType(StrEnum):
    """``Microsoft.Vhd.PowerShell.VhdType``."""

    FIXED = "Fixed"
    DYNAMIC = "Dynamic"
    DIFFERENCING = "Differencing"


class Controller(StrEnum):
    """``Microsoft.HyperV.PowerShell.ControllerType``."""

    IDE = "IDE"
    SCSI = "SCSI"


class ReturnValue(IntEnum):
    """Return values of methods of Hyper-V's WMI classes."""

    DONE = 0
    JOB_STARTED = 4096
    FAILED = 32768
    ACCESS_DENIED = 32769
    NOT_SUPPORTED = 32770
    INVALID_STATE = 32775
    NOT_READY = 32780


class Inside(Protocol):
    """What runs in a VM."""

    @property
    def shutdown_takes(self) -> int:
        """Return how many calls to the host a shutdown in order takes."""

    @property
    def obeys(self) -> bool:
        """Tell whether the guest shuts down when it is asked to."""

    @property
    def ends_in_order(self) -> bool:
        """Tell whether a guest that shuts down also does so in order, and not by a crash on the way."""

    @property
    def heartbeat(self) -> bool:
        """Tell whether the guest's integration services answer."""

    def captured(self) -> Inside:
        """Return a copy that was frozen at this instant; its life goes on apart from this one's."""

    def booted(self) -> Inside:
        """Return what comes of it where it boots from its disks as they are."""

    def ended(self, *, in_order: bool) -> tuple[Path | None, ...]:
        """End it. Return, for each disk, a file with what the disk holds then; None: it holds what it held."""


class Silent:
    """A guest that nothing is known of. It stops as it is told."""

    shutdown_takes = 1
    obeys = True
    ends_in_order = True
    heartbeat = True

    def captured(self) -> Silent:
        """Return another."""
        return Silent()

    def booted(self) -> Silent:
        """Return another."""
        return Silent()

    def ended(self, *, in_order: bool) -> tuple[Path | None, ...]:
        """Leave the disks as they are."""
        del in_order
        return ()


@dataclass(kw_only=True)
class VMSwitch:
    """``Get-VMSwitch``."""

    name: str
    switch_type: SwitchType
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    notes: str = ""
    allow_management_os: bool = False
    iov_enabled: bool = False
    net_adapter_interface_descriptions: tuple[str, ...] = ()


class DhcpClient(StrEnum):
    """What in a guest asks for an adapter's address, which no cmdlet shows: also when its link comes back, only when told."""

    SENSES_LINK = "senses link"
    WHEN_TOLD = "when told"
    NONE = "none"


@dataclass(kw_only=True)
class VMNetworkAdapter:
    """``Get-VMNetworkAdapter``. ``mac_address`` is twelve digits; ``switch_name`` empty: not connected."""

    name: str = "Network Adapter"
    id: str = ""
    mac_address: str
    dynamic_mac_address_enabled: bool = True
    switch_name: str = ""
    switch_id: str = ""
    is_legacy: bool = False
    ip_addresses: tuple[str, ...] = ()
    iov_weight: int = 0
    vlan_id: int | None = None
    is_management_os: bool = False
    vm_name: str = ""
    vm_id: str = ""
    client: DhcpClient = DhcpClient.SENSES_LINK

    @property
    def connected(self) -> bool:
        """Tell whether it is on a switch."""
        return self.switch_name != ""


@dataclass(kw_only=True)
class HardDiskDrive:
    """``Get-VMHardDiskDrive``. ``disk_number``: a disk of the host that is passed through."""

    controller_type: Controller = Controller.SCSI
    controller_number: int = 0
    controller_location: int = 0
    path: str = ""
    disk_number: int | None = None
    support_persistent_reservations: bool = False
    vm_name: str = ""
    vm_id: str = ""


@dataclass(kw_only=True)
class IntegrationService:
    """``Get-VMIntegrationService``. ``name`` is translated; the end of ``id`` is the same on every host."""

    name: str
    id: str
    enabled: bool
    primary_operational_status: str | None
    primary_status_description: str | None


@dataclass(kw_only=True)
class VMSnapshot:
    """``Get-VMSnapshot``: a checkpoint. ``snapshot_type`` is Standard, Production or Recovery (a backup's)."""

    name: str
    vm_name: str
    vm_id: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    snapshot_type: str = "Standard"


@dataclass(kw_only=True)
class SavedState:
    """Memory and devices in a file. They fit only the VM they were taken of, as it was."""

    inside: Inside
    macs: tuple[str, ...]
    memory_bytes: int
    processors: int
    drives: int


@dataclass(kw_only=True)
class Truth:
    """What no cmdlet shows. ``origin`` is the id of the VM that an imported copy was made of.

    ``serves``: it has a DHCP server, whose addresses begin so.
    """

    inside: Inside = field(default_factory=Silent)
    saved: SavedState | None = None
    origin: str | None = None
    planned: bool = False
    shutdown_left: int | None = None
    serves: str = ""
    files: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False)
class VirtualMachine:
    """``Get-VM``. ``status`` is translated text; scripts must not read it."""

    name: str
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    state: VMState = VMState.OFF
    generation: int = 2
    version: str = "9.0"
    memory_startup: int = 1 << 30
    dynamic_memory_enabled: bool = False
    processor_count: int = 1
    secure_boot: bool = True
    secure_boot_template: str = "MicrosoftWindows"
    tpm_enabled: bool = False
    scsi_controllers: int = 1
    first_boot_device: str = ""
    assigned_devices: int = 0
    product_type: int = 3
    fibre_channel: int = 0
    notes: str = ""
    path: str = ""
    configuration_location: str = ""
    automatic_start_action: str = "StartIfRunning"
    automatic_stop_action: str = "Save"
    automatic_checkpoints_enabled: bool = False
    checkpoint_type: str = "Production"
    is_clustered: bool = False
    replication_state: str = "Disabled"
    shielded: bool = False
    status: str = "Operating normally"
    network_adapters: list[VMNetworkAdapter] = field(default_factory=list)
    hard_drives: list[HardDiskDrive] = field(default_factory=list)
    snapshots: list[VMSnapshot] = field(default_factory=list)
    disabled_services: set[str] = field(default_factory=set)
    truth: Truth = field(default_factory=Truth)

    @property
    def memory_assigned(self) -> int:
        """Return the memory that the VM takes of the host now, in bytes."""
        return self.memory_startup if self.state in ALIVE else 0

    @property
    def uptime_ms(self) -> float:
        """Return how long it runs: on the clock of this machine, as if it had started with it."""
        return time.monotonic() * 1000 if self.state in ALIVE else 0.0

    @property
    def heartbeat(self) -> str | None:
        """Return ``OkApplicationsUnknown`` where the guest's integration services answer."""
        if self.state is not VMState.RUNNING:
            return None
        return "OkApplicationsUnknown" if self.truth.inside.heartbeat else "NoContact"


@dataclass(kw_only=True)
class Incompatibility:
    """One line of a report. ``message`` is translated."""

    message_id: int
    message: str
    source: VMNetworkAdapter | HardDiskDrive | VirtualMachine


@dataclass(kw_only=True, eq=False)
class CompatibilityReport:
    """``Compare-VM``: a planned VM, and what stands against its becoming one."""

    vm: VirtualMachine
    incompatibilities: list[Incompatibility] = field(default_factory=list)
    vhds: list[tuple[str, str]] = field(default_factory=list)
    exported: str = ""
    copy: bool = True


@dataclass(frozen=True, kw_only=True)
class VirtualHardDisk:
    """``Get-VHD``. Sizes in bytes; ``parent_path`` empty: it stands alone."""

    path: str
    vhd_format: str
    vhd_type: VhdType
    size: int
    file_size: int
    parent_path: str
    attached: bool
    disk_identifier: str
    logical_sector_size: int = 512


@dataclass(frozen=True, kw_only=True)
class Item:
    """A file or folder."""

    full_name: str
    name: str
    length: int
    is_container: bool


@dataclass(frozen=True, kw_only=True)
class SmbShare:
    """``Get-SmbShare``."""

    name: str
    path: str
    encrypt_data: bool = False

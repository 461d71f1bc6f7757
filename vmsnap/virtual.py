"""The drivers of the hypervisor that the settings name, for ``bootstrap``."""

from __future__ import annotations

from dataclasses import dataclass

from vmsnap.config.credentials import guest_accounts_of, host_account_of
from vmsnap.config.settings import HypervSettings, Settings
from vmsnap.hypervisors.hyperv.addressing import HyperVAddressing
from vmsnap.hypervisors.hyperv.connection import Authentication, HostConnection, Login
from vmsnap.hypervisors.hyperv.driver import HyperVHypervisor
from vmsnap.hypervisors.hyperv.fence import HyperVFence
from vmsnap.hypervisors.hyperv.host import Host
from vmsnap.hypervisors.hyperv.responder import Responder
from vmsnap.hypervisors.hyperv.running import LateRunner, ScriptRunner
from vmsnap.hypervisors.hyperv.tags import RunFolders
from vmsnap.hypervisors.hyperv.unaddressed import NoResidences
from vmsnap.hypervisors.hyperv.unhinted import NoHints
from vmsnap.hypervisors.libvirt.driver import LibvirtFolders, LibvirtHypervisor
from vmsnap.hypervisors.libvirt.hints import LibvirtHints
from vmsnap.network.fence import NetworkFence
from vmsnap.network.ladder import NetworkAddressing
from vmsnap.network.residence import FenceResidences
from vmsnap.ports.clock import Clock
from vmsnap.ports.hints import ChangeHints
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.ports.network import Addressing, Fence
from vmsnap.ports.service import Residences


@dataclass(frozen=True, kw_only=True)
class Virtual:
    """What depends on the hypervisor: it, what it notes of guests' writes, and the networks it puts clones into."""

    hypervisor: Hypervisor
    hints: ChangeHints
    fence: Fence
    addressing: Addressing
    residences: Residences


def open_virtual(settings: Settings, *, clock: Clock) -> Virtual:
    """Return the drivers for the hypervisor that the settings name. Opens nothing yet."""
    if settings.hypervisor == "hyperv" and settings.hyperv is not None:
        return _hyperv(settings.hyperv, clock=clock)
    return Virtual(
        hypervisor=LibvirtHypervisor(
            settings.libvirt.uri,
            folders=LibvirtFolders(runtime=settings.runtime.path, environments=settings.store.path / ".environments"),
            clock=clock,
        ),
        hints=LibvirtHints(settings.libvirt.uri, runtime=settings.runtime.path),
        fence=NetworkFence(),
        addressing=NetworkAddressing(clock=clock),
        residences=FenceResidences(),
    )


def _hyperv(settings: HypervSettings, *, clock: Clock) -> Virtual:
    host = Host(
        LateRunner(lambda: _commands(settings)),
        folders=RunFolders(root=settings.export_folder, mounted=str(settings.export_mounted)),
    )
    responder = None if settings.responder_vm is None else Responder(host, name=settings.responder_vm, clock=clock)
    fence = HyperVFence(host, responder=responder)
    return Virtual(
        hypervisor=HyperVHypervisor(host, clock=clock, logins=_GuestLogins(settings)),
        hints=NoHints(),
        fence=fence,
        addressing=HyperVAddressing(host, fence=fence, responder=responder, clock=clock),
        residences=NoResidences(),
    )


def _commands(settings: HypervSettings) -> ScriptRunner:
    # pypsrp takes a good part of a second to load, and most installations have no use for it.
    from vmsnap.hypervisors.hyperv.commands import Commands  # noqa: PLC0415
    from vmsnap.hypervisors.hyperv.transport import Transport  # noqa: PLC0415

    return Commands(Transport(_connection(settings)))


def _connection(settings: HypervSettings) -> HostConnection:
    account = host_account_of(settings)
    return HostConnection(
        host=settings.host,
        port=settings.port,
        tls=settings.tls,
        authentication=Authentication(settings.authentication),
        login=None if account is None else Login(user=account.user, password=account.password),
        authority=None if settings.authority is None else str(settings.authority),
        certificate=None if settings.certificate is None else str(settings.certificate),
        key=None if settings.key is None else str(settings.key),
        configuration=settings.configuration,
        connect_timeout=settings.connect_timeout,
        operation_timeout=settings.operation_timeout,
    )


class _GuestLogins:
    """Accounts in the guests of a Hyper-V host, read anew each time: a password that was changed counts at once."""

    def __init__(self, settings: HypervSettings) -> None:
        self._settings = settings

    def login(self, guest: str) -> Login | None:
        account = guest_accounts_of(self._settings).of(guest)
        return None if account is None else Login(user=account.user, password=account.password)

"""Rung 'agent': tell the clone's own DHCP clients, through the guest agent, to begin anew.

Which commands are right follows from what runs in the guest. They are fixed argument lists; only names of the guest's
network interfaces, as its kernel lists them, are put in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from vmsnap.errors import DeadlineError, DriverError, GuestCommandError, GuestUnreachableError, VmsnapError
from vmsnap.model.command import Command, CommandResult
from vmsnap.network.rungs import Dhcp, Timer, wait_for_answer
from vmsnap.ports.guest import GuestControl
from vmsnap.ports.network import AddressRequest, LinkControl

_LOG = logging.getLogger(__name__)
_LONGEST_COMMAND = timedelta(seconds=30)
SILENCE_SECONDS = 8.0
_INTERFACES = "/sys/class/net"
_COMM_BYTES = 15  # the kernel cuts names of processes there (proc(5))


@dataclass(frozen=True, kw_only=True)
class _Client:
    """A DHCP client: the name of its process, and groups of commands, each tried where the one before did not help."""

    process: str
    renewals: Callable[[str], tuple[tuple[tuple[str, ...], ...], ...]]


_CLIENTS = (
    _Client(
        process="systemd-networkd",
        renewals=lambda nic: ((("networkctl", "renew", nic),), (("networkctl", "reconfigure", nic),)),
    ),
    _Client(
        process="NetworkManager",
        renewals=lambda nic: (
            (("nmcli", "--wait", "0", "device", "disconnect", nic), ("nmcli", "--wait", "0", "device", "connect", nic)),
        ),
    ),
    _Client(process="dhcpcd", renewals=lambda nic: ((("dhcpcd", "-n", nic),),)),
    _Client(
        process="dhclient",
        renewals=lambda nic: ((("dhclient", "-4", "-r", nic), ("dhclient", "-4", "-nw", nic)),),
    ),
    # Release, then ask anew: its two signals.
    _Client(
        process="udhcpc",
        renewals=lambda _: ((("pkill", "-USR2", "-x", "udhcpc"), ("pkill", "-USR1", "-x", "udhcpc")),),
    ),
)


class AgentRung:
    """Moves clones that have a guest agent. ``silence_seconds``: the wait for a DHCP message after each command."""

    def __init__(self, *, silence_seconds: float = SILENCE_SECONDS) -> None:
        self._silence_seconds = silence_seconds

    def climb(
        self,
        request: AddressRequest,
        *,
        links: LinkControl,  # noqa: ARG002 - no cable is touched
        timer: Timer,
        dhcp: Dhcp,
    ) -> str:
        """See ``RungDriver``. All NICs are renewed; the first that answers at its lease counts."""
        if request.agent is None:
            raise DriverError("the guest has no agent", remedy="install and start qemu-guest-agent in the guest")
        guest = _Guest(request.agent, timer=timer)
        running = guest.processes()
        clients = [client for client in _CLIENTS if client.process[:_COMM_BYTES] in running]
        if not clients:
            raise DriverError(
                "no DHCP client that is known runs in the clone",
                details=f"known: {', '.join(client.process for client in _CLIENTS)}",
                remedy="use the rung 'link-flap' or 'old-address'",
            )
        macs = {port.mac.lower() for port in request.fence.ports} - {mac.lower() for mac in request.static_macs}
        nics = tuple(guest.interfaces(macs))
        if not nics:
            raise DriverError("no network interface in the clone has the MAC of one of its NICs that use DHCP")
        failures: list[str] = []
        for client in clients:
            for step in zip(*(client.renewals(nic) for nic in nics), strict=True):
                failures.extend(guest.try_all(command for commands in step for command in commands))
                address = wait_for_answer(dhcp, timer=timer, silence=self._silence_seconds)
                if address is not None:
                    return address
        raise DriverError(
            f"the clone sent no DHCP message after {' and '.join(client.process for client in clients)} was told to renew",
            details="\n".join(failures) or None,
            remedy="use the rung 'link-flap' or 'old-address'",
        )


class _Guest:
    """Short commands in the clone, each within the rung's time."""

    def __init__(self, control: GuestControl, *, timer: Timer) -> None:
        self._control = control
        self._timer = timer

    def processes(self) -> frozenset[str]:
        """Return the names of the programs that run. Needs neither procps nor a shell in the guest."""
        found = self._run("find", "/proc", "-maxdepth", "2", "-name", "comm", "-exec", "cat", "{}", "+")
        return frozenset(found.text.split("\n"))

    def interfaces(self, macs: set[str]) -> Iterator[str]:
        """Yield the network interfaces that have one of the MACs."""
        for name in self._run("ls", _INTERFACES).text.split():
            told = self._run("cat", f"{_INTERFACES}/{name}/address")
            if told.exit_status == 0 and told.text.strip().lower() in macs:
                yield name

    def try_all(self, commands: Iterator[tuple[str, ...]]) -> Iterator[str]:
        """Run commands and yield what went wrong with each: a client may not manage every interface."""
        for command in commands:
            try:
                done = self._run(*command)
            except (DeadlineError, GuestCommandError, GuestUnreachableError) as exc:
                yield f"{' '.join(command)}: {exc.brief}"
                continue
            if done.exit_status != 0:
                yield f"{' '.join(command)}: status {done.exit_status}: {done.error_text.strip()}"

    def _run(self, *argv: str) -> CommandResult:
        self._timer.cancel.check()
        timeout = min(_LONGEST_COMMAND, timedelta(seconds=max(self._timer.left(), 1)))
        try:
            return self._control.run(Command(argv=argv), timeout=timeout)
        except VmsnapError as exc:
            _LOG.debug("%s in the clone: %s", argv[0], exc.brief)
            raise

"""Whose DHCP exchanges are watched: the policies are read anew at each look, so that a file that comes or goes counts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from vmsnap.config.policies import PolicyBook, PolicyCheck
from vmsnap.errors import ConfigError, PreconditionError, VmsnapError
from vmsnap.model.guest import Nic
from vmsnap.model.isolation import Exchange
from vmsnap.model.policy import Policy
from vmsnap.network.watcher import DhcpWatcher, Watched, bridges_of
from vmsnap.ports.clock import Cancel
from vmsnap.ports.hypervisor import Hypervisor
from vmsnap.workflow.world import World

_LOG = logging.getLogger(__name__)


class GuestWatch:
    """The guests whose exchanges are kept, and where. For one thread.

    ``guests``: these only; none: all whose policies want it. A policy file that is wrong stops its own guest and no other; what
    it said before stays. It is told once.
    """

    def __init__(
        self, hypervisor: Hypervisor, *, policies: PolicyBook, guests: tuple[str, ...], interfaces: tuple[str, ...] = ()
    ) -> None:
        self._hypervisor = hypervisor
        self._policies = policies
        self._guests = guests
        self._interfaces = frozenset(interfaces)
        self._by_path: Mapping[Path, Policy] = {}
        self._wrong: Mapping[Path, str] = {}
        self._unusable = ""
        self._names: dict[str, str] = {}

    def begin(self) -> None:
        """Read the policies for the first time.

        Raises ConfigError where the folder cannot be used, or the file of a guest that was named is wrong; PreconditionError
        where a guest that was named has no policy, and where no policy wants anybody watched.
        """
        for guest in self._guests:
            self._policies.get(guest)
        self._take(self._policies.check())
        if not self.watched and not self._wrong:
            raise PreconditionError(
                "no policy wants its guest's DHCP exchanges watched",
                remedy='write a policy, or set isolation.exchanges = "watch" in it',
            )

    @property
    def watched(self) -> tuple[str, ...]:
        """Return the guests that are watched by the policies that were read last."""
        named = frozenset(self._guests)
        return tuple(
            sorted(
                policy.guest
                for policy in self._by_path.values()
                if policy.isolation.exchanges == "watch" and (not named or policy.guest in named)
            )
        )

    def look(self) -> Watched:
        """Read the policies again, and return whose exchanges to keep, and where. Raises DriverError."""
        before = self.watched
        self._read_again()
        for guest in sorted(frozenset(self.watched) ^ frozenset(before)):
            _LOG.info("the DHCP exchanges of %r are %s", guest, "watched" if guest in self.watched else "let go")
        self._names.clear()
        taps: set[str] = set()
        for guest in self.watched:
            for nic in self._nics(guest):
                self._names[nic.mac.lower()] = guest
                taps.update(() if nic.tap is None else (nic.tap,))
        found = self._interfaces or frozenset(bridges_of(frozenset(taps)))
        return Watched(macs=frozenset(self._names), interfaces=found)

    def guest_of(self, mac: str) -> str:
        """Return whose NIC it is, by the last look; "" where nobody's."""
        return self._names.get(mac, "")

    def _read_again(self) -> None:
        try:
            checks = self._policies.check()
        except ConfigError as error:
            if error.brief != self._unusable:
                _LOG.warning("the policies cannot be read again, and stay what they were: %s", error.brief)
            self._unusable = error.brief
            return
        self._unusable = ""
        self._take(checks)

    def _take(self, checks: tuple[PolicyCheck, ...]) -> None:
        good = {check.path: check.policy for check in checks if check.policy is not None}
        wrong = {check.path: check.error for check in checks if check.error is not None}
        guests = {policy.guest for policy in good.values()}
        kept = {path: self._by_path[path] for path in wrong if path in self._by_path}
        # A guest that another file has taken over meanwhile is that file's.
        self._by_path = {**good, **{path: policy for path, policy in kept.items() if policy.guest not in guests}}
        self._tell(wrong)

    def _tell(self, wrong: Mapping[Path, ConfigError]) -> None:
        for path, error in wrong.items():
            if self._wrong.get(path) != error.brief:
                kept = "; what it said before stays" if path in self._by_path else ""
                remedy = f" What to do: {error.remedy}" if error.remedy else ""
                _LOG.warning("refused %s: %s%s.%s", path, error.brief, kept, remedy)
        for path in self._wrong.keys() - wrong.keys():
            _LOG.info("%s is right again, or gone", path)
        self._wrong = {path: error.brief for path, error in wrong.items()}

    def _nics(self, guest: str) -> tuple[Nic, ...]:
        """Return a guest's NICs; none where it cannot be described now: watching the others goes on."""
        try:
            return self._hypervisor.inspect(guest).nics
        except VmsnapError as error:
            _LOG.warning("the DHCP exchanges of %r are not watched for now: %s", guest, error.brief)
            return ()


def watch_dhcp(world: World, *, watch: GuestWatch, tell: Callable[[str, Exchange], None], cancel: Cancel) -> None:
    """Keep the last DHCP exchange of guests until cancelled. Raises what ``GuestWatch.begin`` raises, and DriverError."""
    watch.begin()

    def told(exchange: Exchange) -> None:
        tell(watch.guest_of(exchange.mac), exchange)

    DhcpWatcher(world.exchanges, look=watch.look, tell=told).run(cancel=cancel)

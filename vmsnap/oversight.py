"""Puts the monitor together from the settings: for the daemon, which has its own, and for commands that make runs."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from vmsnap.config.credentials import Addressees, addressees_of
from vmsnap.config.policies import PolicyBook
from vmsnap.config.settings import Settings, listen_address
from vmsnap.errors import ConfigError, StoreUnreachableError, VmsnapError
from vmsnap.model.alarms import Ledger, Rules
from vmsnap.model.due import ReplicateEntry
from vmsnap.model.facts import Facts, Problem, Room
from vmsnap.model.guest import Finding, Severity
from vmsnap.monitoring.lookout import Lookout, Outlets, Subject
from vmsnap.monitoring.monitor import Monitor
from vmsnap.monitoring.ping import DeadManPing, ping_findings
from vmsnap.monitoring.probe import Probe
from vmsnap.monitoring.standing import Standing, unreachable
from vmsnap.ports.clock import Clock
from vmsnap.ports.observer import ChoreDone
from vmsnap.state.alarms import FileAlarmBook
from vmsnap.workflow.facts import Stock, gather, overlay_room
from vmsnap.workflow.run import as_vmsnap_error
from vmsnap.workflow.world import World

if TYPE_CHECKING:
    from vmsnap.monitoring.exposition import Endpoint, Shelf
    from vmsnap.monitoring.metrics import Metric

_LOG = logging.getLogger(__name__)
_COPIES = "replicate"
_PROBE_EVERY = timedelta(minutes=5)
_PATIENCE = timedelta(seconds=45)
_PROBE_PATIENCE = timedelta(seconds=5)


class Oversight:
    """Makes monitors, one a command. ``world``: drivers of its own, because it looks from other threads than runs do."""

    def __init__(self, settings: Settings, *, policies: PolicyBook, world: World) -> None:
        self._settings = settings
        self._policies = policies
        self._world = world
        self._stock = Stock(world)

    def observers(self) -> tuple[Monitor, ...]:
        """Return the daemon's observer, not started; none where nobody wants to know anything."""
        if not self._told and self._settings.metrics.listen is None:
            return ()
        return (self._monitor(patience=timedelta(0), listening=True),)

    @property
    def _told(self) -> bool:
        wanted = self._settings.notifications
        tells = wanted.urls or wanted.credential or wanted.dead_man_url
        return bool(tells) or self._settings.metrics.textfile is not None

    @contextmanager
    def of_runs(self, *, rounds: bool) -> Iterator[Hearing]:
        """Watch the runs that the body makes, and look at all guests once more at its end; the body is not held up.

        ``rounds``: the body is a round over all guests, and the dead-man's ping is sent if it does not fail.
        """
        monitor = self._begun()
        healthy = False
        try:
            yield Hearing(monitor)
            healthy = rounds
        finally:
            if monitor is not None:
                monitor.conclude(healthy=healthy, patience=_PATIENCE)

    def _begun(self) -> Monitor | None:
        """Return a monitor at work; None where nobody wants to know anything. Never fails: a run is more important."""
        if not self._told:
            return None
        try:
            monitor = self._monitor(patience=_PROBE_PATIENCE, listening=False)
            monitor.start()
        except Exception as error:  # noqa: BLE001 - as the docstring says
            _LOG.error("alarms are not looked at: %r", error, exc_info=error)
            return None
        return monitor

    def metrics(self) -> tuple[Metric, ...]:
        """Look once, and return all metrics. Tells nobody, and changes nothing. Raises VmsnapError."""
        from vmsnap.monitoring.metrics import metrics_of  # noqa: PLC0415 - only this command needs it

        ledger = FileAlarmBook(self._settings.state.path).load()
        facts = self._gather(self._subject(), ledger, probe=self._probe(), patience=_PROBE_PATIENCE)
        return metrics_of(facts, ledger=ledger)

    def _monitor(self, *, patience: timedelta, listening: bool) -> Monitor:
        settings = self._settings
        probe = self._probe() if listening or settings.metrics.textfile is not None else None
        lookout = Lookout(
            lambda subject, ledger: self._gather(subject, ledger, probe=probe, patience=patience),
            outlets=_outlets(settings),
            book=FileAlarmBook(settings.state.path),
            locks=self._world.locks,
            clock=self._world.clock,
        )
        return Monitor(
            lookout,
            subject=self._subject,
            clock=self._world.clock,
            listen=_listen(settings) if listening and settings.metrics.listen is not None else None,
        )

    def _probe(self) -> Probe:
        return Probe(self._overlay_room, every=_PROBE_EVERY)

    def _overlay_room(self) -> Mapping[str, int]:
        return overlay_room(self._world, policies=self._subject().policies)

    def _gather(self, subject: Subject, ledger: Ledger, *, probe: Probe | None, patience: timedelta) -> Facts:
        facts = gather(self._world, policies=subject.policies, ledger=ledger, stock=self._stock, room=self._room)
        return facts if probe is None else replace(facts, overlay_free_bytes=probe.seen(patience=patience))

    def _subject(self) -> Subject:
        checks = self._policies.check()
        problems = (
            Problem(about=f"policy: {check.path.name}", guest=check.guest or "", error=check.error)
            for check in checks
            if check.error is not None
        )
        return Subject(
            policies=tuple(check.policy for check in checks if check.policy is not None), problems=tuple(problems)
        )

    def _room(self) -> Room | None:
        try:
            found = os.statvfs(self._settings.store.path)
        except OSError:
            return None
        return Room(free_bytes=found.f_bavail * found.f_frsize, size_bytes=found.f_blocks * found.f_frsize)


class Hearing:
    """Passes on how runs, and copies, end."""

    def __init__(self, monitor: Monitor | None) -> None:
        self._monitor = monitor

    @contextmanager
    def run(self, guest: str) -> Iterator[None]:
        """Watch one run. May be used in several threads."""
        try:
            yield
        except Exception as error:
            if self._monitor is not None:
                self._monitor.heard(guest, error=as_vmsnap_error(error, doing="the backup"))
            raise
        if self._monitor is not None:
            self._monitor.heard(guest, error=None)

    def of_copies(self, entries: Iterable[ReplicateEntry], *, clock: Clock) -> Iterator[ReplicateEntry]:
        """Pass on how sending each copy ends, as it ends, and what is sent. An outage of the replica is one problem."""
        standing = Standing()
        away: dict[str, VmsnapError] = {}
        for entry in entries:
            if isinstance(entry.error, StoreUnreachableError):
                away.setdefault(entry.guest, entry.error)
            elif entry.error is not None:
                self._pass_on(standing, ChoreDone(name=_COPIES, at=clock.now(), guest=entry.guest, error=entry.error))
            yield entry
        self._pass_on(standing, ChoreDone(name=_COPIES, at=clock.now(), error=unreachable(away) if away else None))

    def _pass_on(self, standing: Standing, done: ChoreDone) -> None:
        standing.hear(done)
        if self._monitor is not None:
            self._monitor.stands(standing.problems, heard=standing.heard)


def _outlets(settings: Settings) -> Outlets:
    from vmsnap.monitoring.channels import Channels  # noqa: PLC0415 - apprise takes long to load

    wanted = settings.notifications
    try:
        addressees = addressees_of(wanted)
    except ConfigError as error:
        # A command in a shell has no credential of a unit: what it leaves untold, the unit tells.
        unit_only = wanted.credential is not None and "/" not in wanted.credential
        _LOG.log(logging.INFO if unit_only else logging.ERROR, "nobody can be notified: %s", error.brief)
        addressees = Addressees()
    ping = addressees.dead_man_url
    return Outlets(
        host=socket.gethostname(),
        channels=Channels(addressees.urls, timeout=wanted.timeout),
        rules=Rules(remind_after=wanted.remind_after, at_most_every=wanted.at_most_every),
        ping=None if ping is None else DeadManPing(ping, method=wanted.dead_man_method, timeout=wanted.timeout),
        textfile=settings.metrics.textfile,
    )


def _listen(settings: Settings) -> Callable[[Shelf], Endpoint]:
    from vmsnap.monitoring.exposition import Endpoint  # noqa: PLC0415 - only the daemon needs it

    address, port = listen_address(settings.metrics.listen or "")
    return lambda shelf: Endpoint(address, port=port, shelf=shelf)


def findings_of(settings: Settings, *, file: Path) -> tuple[Finding, ...]:
    """Return what can be told of [metrics] and [notifications] without sending anything. ``file``: the settings' own."""
    found: list[Finding] = []
    listen = settings.metrics.listen
    if listen is not None and not listen_address(listen)[0].is_loopback:
        found.append(
            Finding(
                check="metrics",
                severity=Severity.WARNING,
                message=f"{listen} is no loopback address: whoever reaches it reads the guests' names and how they fare",
                remedy="listen at 127.0.0.1 and let Prometheus come through a proxy or a tunnel, or keep others out by rules",
            )
        )
    wanted = settings.notifications
    if (wanted.urls or wanted.dead_man_url) and _others_may_read(file):
        found.append(
            Finding(
                check="notifications",
                severity=Severity.WARNING,
                message=f"others may read '{file}', and it holds notification URLs",
                remedy=f"chmod 600 '{file}', or move the URLs to a file that notifications.credential names",
            )
        )
    try:
        addressees = addressees_of(wanted)
    except VmsnapError as error:
        finding = Finding(check="notifications", severity=Severity.WARNING, message=error.brief, remedy=error.remedy)
        return (*found, finding)
    if addressees.urls:
        from vmsnap.monitoring.channels import findings_of as url_findings  # noqa: PLC0415 - apprise takes long to load

        found += url_findings(addressees.urls)
    return (*found, *ping_findings(addressees.dead_man_url))


def silence_of(settings: Settings) -> tuple[Finding, ...]:
    """Return a warning where nobody hears of backups that fail: neither by a message or a ping nor by metrics."""
    wanted, metrics = settings.notifications, settings.metrics
    if wanted.urls or wanted.credential or wanted.dead_man_url or metrics.listen or metrics.textfile:
        return ()
    return (
        Finding(
            check="notifications",
            severity=Severity.WARNING,
            message="nobody is told when backups fail: vmsnap.toml has neither [notifications] nor [metrics]",
            remedy="name somebody in [notifications], or let Prometheus read [metrics]; docs/monitoring.md shows how",
        ),
    )


def _others_may_read(file: Path) -> bool:
    try:
        return bool(file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False

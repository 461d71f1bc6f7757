"""One look at all guests: metrics are shown, the ledger of alarms is brought up to date, and somebody is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from vmsnap.errors import BusyError, VmsnapError
from vmsnap.model.alarms import Breach, Ledger, Notice, Rules, acquainted, settle, told, trying, with_breach
from vmsnap.model.facts import Facts, Problem
from vmsnap.model.policy import Policy
from vmsnap.monitoring.channels import Message
from vmsnap.monitoring.exposition import Shelf, write_textfile
from vmsnap.monitoring.metrics import metrics_of
from vmsnap.monitoring.wording import message_of
from vmsnap.ports.alarms import AlarmBook
from vmsnap.ports.clock import Clock
from vmsnap.ports.state import Locks

_LOG = logging.getLogger(__name__)
_TURN_PATIENCE = timedelta(seconds=20)
_TURN_STEP = timedelta(seconds=1)


class Sender(Protocol):
    """Tells somebody. See ``Channels``."""

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nobody to tell."""

    def send(self, message: Message) -> bool:
        """Tell whether anybody took the message. Raises nothing, and returns in a bounded time."""


class Pinger(Protocol):
    """Pings. See ``DeadManPing``."""

    def send(self) -> None:
        """Send one ping. Raises nothing, and returns in a bounded time."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whom to look at: the policies, and what is wrong with those that are not among them."""

    policies: tuple[Policy, ...] = ()
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, kw_only=True)
class News:
    """What is not to be found in the store: breaches, when retention was applied ("": to all), and chores that fail.

    ``heard``: the chores of which ``problems`` has all; None: of all chores.
    """

    breaches: tuple[tuple[str, Breach], ...] = ()
    pruned: Mapping[str, datetime] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    heard: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Outlets:
    """Whom to tell, and how often. ``host``: this one's name, for messages."""

    host: str
    channels: Sender
    rules: Rules = field(default_factory=Rules)
    ping: Pinger | None = None
    textfile: Path | None = None


class Lookout:
    """Looks when it is told to. For one thread; other processes may do the same."""

    def __init__(
        self,
        gather: Callable[[Subject, Ledger], Facts],
        *,
        outlets: Outlets,
        book: AlarmBook,
        locks: Locks,
        clock: Clock,
    ) -> None:
        """``gather`` returns what is stored of the guests; it may raise any VmsnapError."""
        self.shelf = Shelf()
        self._gather = gather
        self._outlets = outlets
        self._book = book
        self._locks = locks
        self._clock = clock
        self._written = Ledger()
        self._unwritten: Ledger | None = None

    def look(self, subject: Subject, *, news: News, ping: bool) -> bool:
        """Look once, and tell and show what is to be told and shown. False: another process does so just now.

        What cannot be told is told at a later look. ``ping``: the dead-man's ping may be sent, if all is well or told.
        """
        try:
            with self._turn():
                facts, ledger, notice = self._settled(subject, news=news)
            self._show(facts, ledger=ledger)
            if notice is not None and self._outlets.channels.send(message_of(notice, host=self._outlets.host)):
                # Nobody else has told it meanwhile: the ledger says that it was just tried.
                with self._turn():
                    ledger = told(self._load(), notice, now=facts.at)
                    self._write(ledger)
                self._show(facts, ledger=ledger)
        except BusyError as error:
            _LOG.info("alarms are not looked at: %s", error.brief)
            return False
        # What waits for its turn will be told; what was tried in vain, or has nobody to hear it, is not.
        waits = not self._outlets.channels.is_empty
        known = all(
            item.told is not None or item.over is not None or (waits and item.tried is None) for item in ledger.raised
        )
        if ping and self._outlets.ping is not None and self._unwritten is None and known and facts.unseen is not None:
            # The ping says: nothing is wrong that nobody hears of.
            self._outlets.ping.send()
        return True

    def _settled(self, subject: Subject, *, news: News) -> tuple[Facts, Ledger, Notice | None]:
        ledger = self._load()
        for guest, breach in news.breaches:
            ledger = with_breach(ledger, guest=guest, breach=breach)
        now = self._clock.now()
        # A guest whose policy file is wrong just now is not forgotten, and not looked at either.
        wrong = {problem.guest for problem in subject.problems if problem.guest}
        ledger = acquainted(ledger, guests={*wrong, *(policy.guest for policy in subject.policies)}, now=now)
        ledger = replace(ledger, pruned={**ledger.pruned, **news.pruned})
        # Written before the look: a breach is known from now on, whatever becomes of this process.
        self._write(ledger)
        facts = self._gather(subject, ledger)
        wrong -= {policy.guest for policy in subject.policies}
        facts = replace(
            facts,
            problems=(*subject.problems, *news.problems, *facts.problems),
            unseen=None if facts.unseen is None else facts.unseen | wrong,
            heard=news.heard,
        )
        ledger, notice = settle(ledger, facts=facts, rules=self._outlets.rules)
        if self._outlets.channels.is_empty:
            notice = None
        if notice is not None:
            ledger = trying(ledger, notice, now=facts.at)
        self._write(ledger)
        return facts, ledger, notice

    def _show(self, facts: Facts, *, ledger: Ledger) -> None:
        metrics = metrics_of(facts, ledger=ledger)
        self.shelf.put(metrics)
        if self._outlets.textfile is not None:
            try:
                write_textfile(self._outlets.textfile, metrics=metrics)
            except VmsnapError as error:
                _LOG.error("%s", error.brief)

    def _load(self) -> Ledger:
        if self._unwritten is not None:
            return self._unwritten
        try:
            self._written = self._book.load()
        except VmsnapError as error:
            _LOG.error("the ledger of alarms cannot be read: %s", error.brief)
            self._written = Ledger()
        return self._written

    def _write(self, ledger: Ledger) -> None:
        """Write the ledger where it changed. Where that fails it is remembered: this process tells nothing twice."""
        if self._unwritten is None and ledger == self._written:
            return
        try:
            self._book.replace(ledger)
        except VmsnapError as error:
            _LOG.error("the ledger of alarms cannot be written: %s", error.brief)
            self._unwritten = ledger
            return
        self._written, self._unwritten = ledger, None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the ledger. Raises BusyError where another process holds it for long: its look hangs."""
        with ExitStack() as stack:
            waited = timedelta(0)
            while True:
                try:
                    stack.enter_context(self._locks.alarms())
                    break
                except BusyError:
                    if waited >= _TURN_PATIENCE:
                        raise
                    self._clock.sleep(_TURN_STEP)
                    waited += _TURN_STEP
            yield

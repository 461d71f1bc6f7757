"""Who hears what the daemon does: metrics, notifications."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from vmsnap.errors import VmsnapError
from vmsnap.model.due import DueEntry
from vmsnap.model.facts import Problem
from vmsnap.model.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What one look at all guests found. ``running``: guests that the daemon backs up now.

    ``entries``: guests that were not taken: not due, disabled, passed over, or not to be judged; those taken are running.
    ``problems``: what is wrong with the configuration files; the daemon goes on with what they said before.
    ``chores``: what is wrong by the chores, and ``heard`` those of which all is known: they had a whole pass.
    """

    at: datetime
    policies: tuple[Policy, ...]
    entries: tuple[DueEntry, ...]
    running: tuple[str, ...]
    problems: tuple[VmsnapError, ...] = ()
    chores: tuple[Problem, ...] = ()
    heard: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ChoreDone:
    """A chore (``reconcile``, ``prune``, ``expire``, ``verify`` and so on) says how it goes.

    Of one guest where that is named; otherwise its pass over all guests is over. ``whole``: it came to all of them.
    """

    name: str
    at: datetime
    guest: str | None = None
    error: VmsnapError | None = None
    whole: bool = True


class Observer(Protocol):
    """Hears what the daemon does. Methods are called one at a time, in the daemon's main thread.

    They must return within a second: who sends something anywhere does so in a thread of its own. What they raise is logged
    and changes nothing else, apart from ``start``.
    """

    def start(self) -> None:
        """Begin, before the daemon is ready. Raises any VmsnapError, which ends the daemon."""

    def ticked(self, tick: Tick) -> None:
        """Hear what a look at all guests found. Called after each."""

    def run_ended(self, entry: DueEntry) -> None:
        """Hear how a due run ended."""

    def chore_done(self, done: ChoreDone) -> None:
        """Hear what a chore says."""

    def close(self) -> None:
        """End. Called once, also where ``start`` failed."""

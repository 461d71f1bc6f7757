"""What is known of all guests at one moment, for metrics and alarms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from vmsnap.errors import VmsnapError
from vmsnap.model.freshness import Expected
from vmsnap.model.history import RunEntry
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import Due, FailedAttempt

_CHORE = "chore: "


@dataclass(frozen=True, kw_only=True)
class GuestFacts:
    """One guest. ``policy`` None: it has none any more, and its snapshots are still there.

    ``verified``: when one of its snapshots was last found whole. ``damaged``: how many were last found not to be.
    ``failures``: scheduled attempts since the newest snapshot that failed. ``running``: a backup goes on now.
    ``last``: the newest backup whose end is known. ``pruned``: when retention was last applied to it.
    ``newest_copy``: when the newest snapshot of which the replica is known to have a copy was captured.
    ``copies_lacking``: snapshots that its policy wants there and that are not known to be; None: it wants none.
    """

    guest: str
    policy: Policy | None
    snapshots: int = 0
    newest: Snapshot | None = None
    verified: datetime | None = None
    damaged: int = 0
    due: Due | None = None
    expected: Expected | None = None
    failures: tuple[FailedAttempt, ...] = ()
    running: bool = False
    last: RunEntry | None = None
    pruned: datetime | None = None
    environments: int = 0
    environments_expired: int = 0
    newest_copy: datetime | None = None
    copies_lacking: int | None = None

    @property
    def watched(self) -> bool:
        """Tell whether its schedule is to back it up."""
        return self.policy is not None and self.policy.enabled


@dataclass(frozen=True, kw_only=True)
class Room:
    """Free space and size of a file system."""

    free_bytes: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that keeps vmsnap from its work, or from looking. ``guest``: "" where it concerns all, or nobody can tell.

    ``about`` names it, so that it is the same problem as long as it lasts.
    """

    about: str
    error: VmsnapError
    guest: str = ""


def chore_problem(chore: str, *, guest: str, error: VmsnapError) -> Problem:
    """Return what is wrong by a chore of the daemon, with one guest or ("") with all."""
    return Problem(about=f"{_CHORE}{chore} {guest}".rstrip(), error=error, guest=guest)


def chore_of(about: str) -> str | None:
    """Return the chore that a problem is of, by what it is about; None: it is of none."""
    return about.removeprefix(_CHORE).partition(" ")[0] if about.startswith(_CHORE) else None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything at one moment.

    ``unseen``: guests that could not be looked at; None: no guest could. ``overlay_free_bytes``: by guest, as found lately.
    ``heard``: the daemon's chores of which all problems are known; None: of all chores.
    """

    at: datetime
    guests: tuple[GuestFacts, ...]
    unseen: frozenset[str] | None = frozenset()
    problems: tuple[Problem, ...] = ()
    store: Room | None = None
    overlay_free_bytes: Mapping[str, int] = field(default_factory=dict)
    heard: frozenset[str] | None = None

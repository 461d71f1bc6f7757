"""When a stored snapshot is to be read again, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from vmsnap.errors import VerificationError, VmsnapError
from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.model.report import VerifyReport

_FUTURE_SLACK = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of ``of`` parts of everything, to be read in one go; the numbers 0 to ``of`` - 1 in turn come to all of it."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number + 1} of {self.of}"

    def has(self, place: int) -> bool:
        """Tell whether what has this number is in the share."""
        return place % self.of == self.number


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What reading a copy of a snapshot again came to: blocks read, a line a defect, the names of the objects to blame."""

    blocks: int
    defects: tuple[str, ...]
    bad: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class VerifyWish:
    """What to read again, and what then. ``replica``: the copy there. ``share`` None: all of it."""

    replica: bool = False
    repair: bool = False
    share: Share | None = None


def share_of_day(share_per_day: float, *, day: date) -> Share:
    """Return the share to read on a day: with 0.05 one of 20, another one each day.

    The count of shares is never divisible by 7: whoever leaves out each Sunday leaves out another share each time.
    """
    of = max(1, math.ceil(round(1 / share_per_day, 6)))
    of += of % 7 == 0
    return Share(number=day.toordinal() % of, of=of)


@dataclass(frozen=True, kw_only=True)
class VerifyChoice:
    """What an operator asks for. ``sample``: the part of it to read today, such as 0.05; None: all of it."""

    replica: bool = False
    repair: bool = False
    sample: float | None = None

    def on(self, day: date) -> VerifyWish:
        """Return what that is on a day."""
        share = None if self.sample is None else share_of_day(self.sample, day=day)
        return VerifyWish(replica=self.replica, repair=self.repair, share=share)


@dataclass(frozen=True, kw_only=True)
class VerifyEntry:
    """One snapshot that was due, or (``snapshot`` None) one guest whose snapshots could not be looked at."""

    guest: str
    snapshot: SnapshotId | None = None
    report: VerifyReport | None = None
    error: VmsnapError | None = None


def last_read(snapshot: Snapshot) -> datetime:
    """Return when a snapshot was last read and compared: when it was verified, or else when it was made."""
    verification = snapshot.marks.verification
    return snapshot.manifest.created if verification is None else verification.at


def is_verification_due(snapshot: Snapshot, *, every: timedelta | None, now: datetime) -> bool:
    """Tell whether a snapshot is to be read again. A time far ahead of ``now`` is of a clock that was wrong: it is."""
    return every is not None and not _is_lately(last_read(snapshot), every=every, now=now)


@dataclass(frozen=True, kw_only=True)
class VerifyTurn:
    """A snapshot that is to be read again. ``since``: it waits from then on.

    ``for_guest``: nothing of its guest was found whole lately, so it goes before those that are only due by themselves.
    ``unless``: it can wait where that one is found whole in the same round.
    """

    snapshot: Snapshot
    since: datetime
    for_guest: bool = False
    unless: SnapshotId | None = None

    @property
    def rank(self) -> tuple[bool, datetime, SnapshotId]:
        """Return what to sort by: the smaller, the sooner it is to be read."""
        return not self.for_guest, self.since, self.snapshot.id


def turns_of(snapshots: Sequence[Snapshot], *, every: timedelta | None, now: datetime) -> tuple[VerifyTurn, ...]:
    """Return which of one guest's snapshots are to be read again, by their ranks. ``every`` None: none.

    Each that was not read for ``every``. Retention may remove all of them before that, so the newest one, too, where none of
    those made within ``every`` was found whole. So always something of the guest that is still there was read within
    ``every``. A newest one that was found damaged is not read again before its time.

    The newest verified one can wait for the newest: often it was kept for being that alone, and goes then.
    """
    if every is None:
        return ()
    believed = [one for one in snapshots if one.manifest.ranked <= now + _FUTURE_SLACK]
    whole = [one for one in believed if _is_whole(one)]
    newest = max(believed, key=_age, default=None)
    due = [one for one in snapshots if is_verification_due(one, every=every, now=now)]
    if newest is None or _is_enough(newest, whole=whole, every=every, now=now):
        return _ranked(VerifyTurn(snapshot=one, since=last_read(one)) for one in due)
    waits = max(map(last_read, whole), default=min(one.manifest.created for one in believed))
    spare = max(whole, key=_age, default=None)
    others = [
        VerifyTurn(snapshot=one, since=last_read(one), unless=newest.id if one is spare else None)
        for one in due
        if one.id != newest.id
    ]
    return _ranked([VerifyTurn(snapshot=newest, since=waits, for_guest=True), *others])


def _ranked(turns: Iterable[VerifyTurn]) -> tuple[VerifyTurn, ...]:
    return tuple(sorted(turns, key=lambda turn: turn.rank))


def _is_enough(newest: Snapshot, *, whole: Sequence[Snapshot], every: timedelta, now: datetime) -> bool:
    """Tell whether the newest was read within ``every``, or one that was made within it was found whole."""
    verification = newest.marks.verification
    if verification is not None and _is_lately(verification.at, every=every, now=now):
        return True
    return any(_is_lately(one.manifest.created, every=every, now=now) for one in whole)


def _is_lately(moment: datetime, *, every: timedelta, now: datetime) -> bool:
    return now - moment < every and moment <= now + _FUTURE_SLACK


def _is_whole(snapshot: Snapshot) -> bool:
    verification = snapshot.marks.verification
    return verification is not None and not verification.bad_blocks


def _age(snapshot: Snapshot) -> tuple[datetime, SnapshotId]:
    return snapshot.manifest.ranked, snapshot.id


def damage(report: VerifyReport, *, guest: str) -> VerificationError | None:
    """Return the error that a damaged snapshot is; None for an intact one."""
    if not report.defects:
        return None
    where, option = (" at the replica", " --replica") if report.replica else ("", "")
    return VerificationError(
        f"snapshot {report.snapshot} of '{guest}' is damaged{where}: {report.defects[0]}",
        details="\n".join(report.defects[:20]),
        remedy=f"'vmsnap verify {report.snapshot}{option} --repair' repairs it where the other copy is intact; or use another "
        "snapshot. Test the store's disk and this host's memory",
    )

"""Which snapshots stay. A pure decision: the same snapshots, policy, holds and time give the same answer.

A rule looks at one guest's snapshots, newest first, and says which it keeps and why. A snapshot stays where any rule
keeps it; one that no rule keeps goes. More rules (hourly, daily, ...) are more entries in ``_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial

from vmsnap.model.ids import SnapshotId
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import RetentionPolicy
from vmsnap.model.report import PruneDecision

Rule = Callable[[Sequence[Snapshot]], Iterator[tuple[SnapshotId, str]]]


def decide(
    snapshots: Sequence[Snapshot], *, policy: RetentionPolicy, held: frozenset[SnapshotId], now: datetime
) -> tuple[PruneDecision, ...]:
    """Return what retention says of each of one guest's snapshots, oldest first, with its reasons.

    ``held`` are in use (by environments). ``now`` is aware and only matters for pins that end. The newest snapshot is
    always kept, and the newest without known damage. Raises ValueError for snapshots of several guests.
    """
    if len({snapshot.manifest.guest for snapshot in snapshots}) > 1:
        msg = "retention decides for one guest at a time"
        raise ValueError(msg)
    newest_first = sorted(snapshots, key=lambda snapshot: (snapshot.manifest.captured, snapshot.id), reverse=True)
    kept: dict[SnapshotId, list[str]] = {}
    for rule in _rules(policy, held=held, now=now):
        for snapshot_id, reason in rule(newest_first):
            kept.setdefault(snapshot_id, []).append(reason)
    return tuple(
        PruneDecision(
            snapshot=snapshot,
            keep=snapshot.id in kept,
            reasons=tuple(kept.get(snapshot.id, ())) or _why_not(snapshot, policy=policy),
        )
        for snapshot in reversed(newest_first)
    )


def _rules(policy: RetentionPolicy, *, held: frozenset[SnapshotId], now: datetime) -> tuple[Rule, ...]:
    return (
        _newest,
        partial(_last, count=policy.keep_last),
        partial(_pinned, now=now),
        partial(_held, held=held),
    )


def _newest(snapshots: Sequence[Snapshot]) -> Iterator[tuple[SnapshotId, str]]:
    if snapshots:
        yield snapshots[0].id, "the newest"
    sound = next((snapshot for snapshot in snapshots if not _is_damaged(snapshot)), None)
    if sound is not None and sound is not snapshots[0]:
        yield sound.id, "the newest without known damage"


def _last(snapshots: Sequence[Snapshot], *, count: int) -> Iterator[tuple[SnapshotId, str]]:
    for snapshot in snapshots[:count]:
        yield snapshot.id, f"among the newest {count} (keep_last)"


def _pinned(snapshots: Sequence[Snapshot], *, now: datetime) -> Iterator[tuple[SnapshotId, str]]:
    for snapshot in snapshots:
        pin = snapshot.marks.pin
        if pin is not None and (pin.until is None or now < pin.until):
            end = f" until {pin.until:%Y-%m-%d %H:%MZ}" if pin.until is not None else ""
            yield snapshot.id, f"pinned by {pin.owner}{end}: {pin.reason}"


def _held(snapshots: Sequence[Snapshot], *, held: frozenset[SnapshotId]) -> Iterator[tuple[SnapshotId, str]]:
    for snapshot in snapshots:
        if snapshot.id in held:
            yield snapshot.id, "in use by an environment"


def _is_damaged(snapshot: Snapshot) -> bool:
    verification = snapshot.marks.verification
    return verification is not None and verification.bad_blocks > 0


def _why_not(snapshot: Snapshot, *, policy: RetentionPolicy) -> tuple[str, ...]:
    reasons = [f"not among the newest {policy.keep_last} (keep_last)"]
    pin = snapshot.marks.pin
    if pin is not None and pin.until is not None:
        reasons.append(f"its pin ended {pin.until:%Y-%m-%d %H:%MZ}")
    return tuple(reasons)

"""From facts to metrics: pure, and without a library, so that a test can read off it what is told.

Names follow Prometheus' practice: base units in the name, moments as Unix time in seconds (an age is ``time() - moment``,
and stays right when nothing is scraped). Labels are guests with a policy or a snapshot, steps of a run and outcomes: all few,
and none of them made anew by each run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from vmsnap import __version__
from vmsnap.model.alarms import Breach, Ledger
from vmsnap.model.facts import Facts, GuestFacts
from vmsnap.model.history import RunOutcome
from vmsnap.model.manifest import Manifest

ENDED = tuple(outcome for outcome in RunOutcome if outcome is not RunOutcome.RUNNING)
MOST_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One value, and the labels beside ``guest`` that tell it from others of its metric."""

    value: float
    labels: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric with all its samples. All are gauges. ``label_names``: the same for each sample."""

    name: str
    text: str
    label_names: tuple[str, ...]
    samples: tuple[Sample, ...]


def metrics_of(facts: Facts, *, ledger: Ledger) -> tuple[Metric, ...]:
    """Return all metrics, always the same ones in the same order; one that nothing is known for has no samples."""
    return (
        *(
            Metric(name=name, text=text, label_names=(), samples=_single(read(facts, ledger)))
            for name, text, read in _HOST
        ),
        Metric(
            name="vmsnap_build_info",
            text="The version that gathered these metrics; always 1.",
            label_names=("version",),
            samples=(Sample(value=1, labels={"version": __version__}),),
        ),
        *(_of_guests(name, text, read, facts=facts) for name, text, read in _GUEST),
        *(_of_breaches(name, text, read, facts=facts, ledger=ledger) for name, text, read in _BREACH),
        Metric(
            name="vmsnap_guest_overlay_free_bytes",
            text="Free space where the guest's overlays grow during a run, as found lately.",
            label_names=("guest",),
            samples=tuple(
                Sample(value=free, labels={"guest": guest}) for guest, free in sorted(facts.overlay_free_bytes.items())
            ),
        ),
        Metric(
            name="vmsnap_guest_last_run_outcome",
            text="1 for what became of the guest's last backup, 0 for what did not.",
            label_names=("guest", "outcome"),
            samples=tuple(_outcomes(facts)),
        ),
        Metric(
            name="vmsnap_guest_last_run_step_seconds",
            text="How long each step of the guest's last backup took.",
            label_names=("guest", "step"),
            samples=tuple(_steps(facts)),
        ),
    )


def _single(value: float | None) -> tuple[Sample, ...]:
    return () if value is None else (Sample(value=value, labels={}),)


def _of_guests(name: str, text: str, read: Callable[[GuestFacts, Facts], float | None], *, facts: Facts) -> Metric:
    values = ((guest.guest, read(guest, facts)) for guest in facts.guests)
    samples = tuple(Sample(value=value, labels={"guest": guest}) for guest, value in values if value is not None)
    return Metric(name=name, text=text, label_names=("guest",), samples=samples)


def _of_breaches(
    name: str, text: str, read: Callable[[Breach | None], float | None], *, facts: Facts, ledger: Ledger
) -> Metric:
    values = ((guest.guest, read(ledger.breaches.get(guest.guest))) for guest in facts.guests)
    samples = tuple(Sample(value=value, labels={"guest": guest}) for guest, value in values if value is not None)
    return Metric(name=name, text=text, label_names=("guest",), samples=samples)


def _outcomes(facts: Facts) -> Iterator[Sample]:
    for guest in facts.guests:
        if guest.last is not None:
            for outcome in ENDED:
                labels = {"guest": guest.guest, "outcome": outcome.value}
                yield Sample(value=float(guest.last.outcome is outcome), labels=labels)


def _steps(facts: Facts) -> Iterator[Sample]:
    for guest in facts.guests:
        seconds: dict[str, float] = {}
        for step in () if guest.last is None else guest.last.steps:
            if step.seconds is not None:
                seconds[step.name] = seconds.get(step.name, 0) + step.seconds
        for name, value in sorted(seconds.items())[:MOST_STEPS]:
            yield Sample(value=value, labels={"guest": guest.guest, "step": name})


def _moment(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _manifest(guest: GuestFacts) -> Manifest | None:
    return None if guest.newest is None else guest.newest.manifest


def _pause_seconds(guest: GuestFacts) -> float | None:
    return None if guest.newest is None else guest.newest.manifest.capture.pause_ms / 1000


def _stored(guest: GuestFacts, *, new: bool) -> float | None:
    manifest = _manifest(guest)
    if manifest is None:
        return None
    return manifest.store.new_bytes if new else manifest.store.logical_bytes


def _read(guest: GuestFacts) -> float | None:
    manifest = _manifest(guest)
    return None if manifest is None else manifest.store.read_bytes


def _distrusted(guest: GuestFacts) -> float | None:
    newest = guest.newest
    return None if newest is None else float(newest.hints_distrusted is not None)


def _overdue(guest: GuestFacts, facts: Facts) -> float | None:
    if not guest.watched:
        return None
    return float(guest.expected is not None and guest.expected.is_overdue(facts.at))


def _missed(guest: GuestFacts, facts: Facts) -> float | None:
    if not guest.watched:
        return None
    return float(guest.expected is not None and guest.expected.missed_window(facts.at) and not guest.running)


_HOST: tuple[tuple[str, str, Callable[[Facts, Ledger], float | None]], ...] = (
    (
        "vmsnap_facts_timestamp_seconds",
        "When these metrics were gathered.",
        lambda facts, _: facts.at.timestamp(),
    ),
    (
        "vmsnap_problems",
        "Policy files that are wrong, and guests or stores that could not be looked at.",
        lambda facts, _: len(facts.problems),
    ),
    (
        "vmsnap_alarms",
        "Things that are wrong now, over all guests.",
        lambda _, ledger: sum(item.over is None for item in ledger.raised),
    ),
    (
        "vmsnap_alarms_untold",
        "Things that are wrong and that nobody could be told of yet.",
        lambda _, ledger: sum(item.told is None and item.over is None for item in ledger.raised),
    ),
    (
        "vmsnap_last_notification_timestamp_seconds",
        "When a notification was last sent, or tried.",
        lambda _, ledger: _moment(ledger.message),
    ),
    (
        "vmsnap_store_free_bytes",
        "Free space on the store's file system.",
        lambda facts, _: None if facts.store is None else facts.store.free_bytes,
    ),
    (
        "vmsnap_store_size_bytes",
        "Size of the store's file system.",
        lambda facts, _: None if facts.store is None else facts.store.size_bytes,
    ),
)

_GUEST: tuple[tuple[str, str, Callable[[GuestFacts, Facts], float | None]], ...] = (
    (
        "vmsnap_guest_enabled",
        "Whether the guest has a policy that is enabled.",
        lambda guest, _: float(guest.watched),
    ),
    ("vmsnap_guest_snapshots", "Snapshots of the guest.", lambda guest, _: guest.snapshots),
    (
        "vmsnap_guest_newest_snapshot_timestamp_seconds",
        "When the guest's newest proven-clean snapshot was captured.",
        lambda guest, _: None if guest.newest is None else guest.newest.manifest.captured.timestamp(),
    ),
    (
        "vmsnap_guest_last_verification_timestamp_seconds",
        "When a snapshot of the guest was last read again and found whole.",
        lambda guest, _: _moment(guest.verified),
    ),
    (
        "vmsnap_guest_damaged_snapshots",
        "Snapshots of the guest that are not what their digests say.",
        lambda guest, _: guest.damaged,
    ),
    (
        "vmsnap_guest_next_run_timestamp_seconds",
        "When the guest's next run may start, failures and their backoff reckoned in.",
        lambda guest, _: None if guest.due is None else _moment(guest.due.at),
    ),
    (
        "vmsnap_guest_backup_deadline_timestamp_seconds",
        "Until when the next snapshot must be there by the guest's policy.",
        lambda guest, _: None if guest.expected is None else guest.expected.deadline.timestamp(),
    ),
    ("vmsnap_guest_overdue", "Whether that deadline has passed.", _overdue),
    ("vmsnap_guest_missed_window", "Whether the window meant for the next snapshot is over without it.", _missed),
    (
        "vmsnap_guest_failed_attempts",
        "Scheduled attempts since the guest's newest snapshot that failed.",
        lambda guest, _: len(guest.failures) if guest.watched else None,
    ),
    ("vmsnap_guest_running", "Whether a backup of the guest goes on.", lambda guest, _: float(guest.running)),
    (
        "vmsnap_guest_last_run_end_timestamp_seconds",
        "When the guest's last backup ended, whatever became of it.",
        lambda guest, _: None if guest.last is None else _moment(guest.last.ended),
    ),
    (
        "vmsnap_guest_last_run_seconds",
        "How long the guest's last backup took.",
        lambda guest, _: None if guest.last is None else guest.last.seconds,
    ),
    (
        "vmsnap_guest_snapshot_pause_seconds",
        "How long the guest stood still for its newest snapshot.",
        lambda guest, _: _pause_seconds(guest),
    ),
    (
        "vmsnap_guest_snapshot_logical_bytes",
        "Size of all disks of the guest's newest snapshot.",
        lambda guest, _: _stored(guest, new=False),
    ),
    (
        "vmsnap_guest_snapshot_new_bytes",
        "Bytes that were written for the guest's newest snapshot; it shares the rest with those before.",
        lambda guest, _: _stored(guest, new=True),
    ),
    (
        "vmsnap_guest_snapshot_read_bytes",
        "Bytes that were read of the clone's disks for the guest's newest snapshot.",
        lambda guest, _: _read(guest),
    ),
    (
        "vmsnap_guest_hints_distrusted",
        "Whether a hint of what changed was wrong, so that backups of the guest read everything.",
        lambda guest, _: _distrusted(guest),
    ),
    (
        "vmsnap_guest_last_prune_timestamp_seconds",
        "When retention was last applied to the guest, whether or not anything went.",
        lambda guest, _: _moment(guest.pruned),
    ),
    (
        "vmsnap_guest_newest_copy_timestamp_seconds",
        "When the newest snapshot of the guest that is known to be at the replica was captured.",
        lambda guest, _: _moment(guest.newest_copy),
    ),
    (
        "vmsnap_guest_copies_lacking",
        "Snapshots of the guest that its policy wants at the replica and that are not known to be there.",
        lambda guest, _: guest.copies_lacking,
    ),
    ("vmsnap_guest_environments", "Test VMs of the guest's snapshots.", lambda guest, _: guest.environments),
    (
        "vmsnap_guest_environments_expired",
        "Test VMs of the guest's snapshots whose time is over and that are still there.",
        lambda guest, _: guest.environments_expired,
    ),
)

_BREACH: tuple[tuple[str, str, Callable[[Breach | None], float | None]], ...] = (
    (
        "vmsnap_guest_isolation_breaches",
        "How often the isolation of the guest's clones was broken, as far as known.",
        lambda breach: 0 if breach is None else breach.count,
    ),
    (
        "vmsnap_guest_last_isolation_breach_timestamp_seconds",
        "When the isolation of a clone of the guest was last broken.",
        lambda breach: None if breach is None else breach.at.timestamp(),
    ),
)

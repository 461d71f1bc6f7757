"""Whether the scheduled backups find the time they need, by how long each guest's last one took."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from vmsnap.errors import VmsnapError
from vmsnap.model.durations import format_duration
from vmsnap.model.guest import Finding, Severity
from vmsnap.model.journal import RunKind
from vmsnap.model.load import usual_interval
from vmsnap.model.policy import Policy
from vmsnap.workflow.world import World

_CHECK = "schedule"
_MOST_NAMED = 3


def load_findings(world: World, *, policies: Sequence[Policy], per_host: int) -> tuple[Finding, ...]:
    """Compare what the schedules of all guests ask for with what ``per_host`` runs at a time can do. Changes nothing.

    Guests without a backup to judge by are left out; without any there is no finding. Raises nothing: the history that
    this goes by is needed by no backup.
    """
    try:
        done = world.history.last_done(kind=RunKind.BACKUP)
    except VmsnapError as error:
        message = f"how long the last backups took cannot be told: {error.brief}"
        return (Finding(check=_CHECK, severity=Severity.WARNING, message=message, remedy=error.remedy),)
    now = world.clock.now()
    shares: dict[str, float] = {}
    for policy in policies:
        took = done[policy.guest].seconds if policy.enabled and policy.guest in done else None
        between = None if took is None else usual_interval(policy, now=now)
        if took is not None and between is not None:
            shares[policy.guest] = took / between.total_seconds() / per_host
    if not shares:
        return ()
    whole = sum(shares.values())
    at_a_time = f"{per_host} at a time" if per_host > 1 else "one after another"
    message = f"by how long the last ones took, backups need {whole:.0%} of the time there is, {at_a_time}"
    if whole <= 1:
        return (Finding(check=_CHECK, severity=Severity.OK, message=message),)
    most = sorted(shares, key=lambda guest: shares[guest], reverse=True)[:_MOST_NAMED]
    named = ", ".join(f"{guest} ({_minutes(done[guest].seconds)})" for guest in most)
    return (
        Finding(
            check=_CHECK,
            severity=Severity.WARNING,
            message=f"{message}: some will be late. The most is for {named}",
            remedy="back up more rarely ([schedule] of the policies), or let more runs go on at a time "
            "([limits] runs_per_host) where memory and disks allow it",
        ),
    )


def _minutes(seconds: float | None) -> str:
    return format_duration(timedelta(seconds=round(seconds or 0)))

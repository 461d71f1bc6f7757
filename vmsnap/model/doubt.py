"""How much of the time that a clock says has passed is in doubt. Pure.

Between two snapshots of a guest, and after its newest, no more time passes than its backups are usually apart. Where the
clock says so all the same, backups paused, or the clock jumped ahead: nobody can tell which by looking at the clock, nor by
further backups that the same clock dates. All of such a gap is in doubt. Each snapshot's manifest says how much time before it
was, added up over the gaps before, so that it is known after the snapshots around a gap were removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.model.retention_policy import RetentionPolicy
from vmsnap.model.schedule import next_due
from vmsnap.model.selection import Candidate

_LEAST = timedelta(days=2)
_WITHOUT_MAX_AGE = timedelta(days=35)
_NONE = timedelta(0)


def credible_gap(policy: RetentionPolicy) -> timedelta:
    """Return the longest gap that is not in doubt: half of ``max_age``, two days at least; 35 days where there is none."""
    return _WITHOUT_MAX_AGE if policy.max_age is None else max(policy.max_age / 2, _LEAST)


def doubt_up_to(now: datetime, *, past: Iterable[Candidate], policy: RetentionPolicy) -> timedelta:
    """Return how much of the time up to ``now`` is in doubt, by one guest's snapshots from before."""
    return _least(((one.captured, one.doubt) for one in past), until=now, credible=credible_gap(policy))


def doubt_before(captured: datetime, *, snapshots: Iterable[Snapshot], policy: Policy) -> timedelta:
    """Return how much of the time before a new snapshot is in doubt. ``snapshots``: what its guest has so far.

    A gap twice as long as the schedule wants it is credible too.
    """
    earlier = [one.manifest for one in snapshots if one.manifest.captured <= captured]
    credible = credible_gap(policy.retention)
    if earlier:
        newest = max(one.captured for one in earlier)
        wanted = next_due(policy, newest=newest, now=newest).at
        credible = max(credible, 2 * (wanted - newest)) if wanted is not None else credible
    known = ((one.captured, timedelta(seconds=one.clock_doubt_seconds)) for one in earlier)
    return _least(known, until=captured, credible=credible)


def _least(known: Iterable[tuple[datetime, timedelta]], *, until: datetime, credible: timedelta) -> timedelta:
    """Return the least doubt that any earlier snapshot leaves: one that a wrong clock dated does not spoil the others."""
    return min(
        (doubt + (_NONE if until - captured <= credible else until - captured) for captured, doubt in known),
        default=_NONE,
    )

"""Until when a guest's next snapshot must be there, and which opening was meant for it. Pure.

That a run is due says little: it may be waiting for its turn, or for its window. What matters to whoever relies on backups is
that the policy's next snapshot is there in time, whatever kept it: a failure, a backoff, a daemon that is not running. So
failures do not put this off, unlike the time of the next attempt (``model.schedule``).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from vmsnap.model.openings import Openings, parse_span
from vmsnap.model.policy import Policy
from vmsnap.model.schedule import next_due

_LONGEST_OPENING = timedelta(days=14)


@dataclass(frozen=True, kw_only=True)
class Expected:
    """When the next snapshot's run starts if nothing goes wrong, and until when the snapshot must be there.

    ``closes``: the end of the opening that the run starts in; None where it lasts for weeks, as it does without windows.
    """

    start: datetime
    deadline: datetime
    closes: datetime | None = None

    def is_overdue(self, now: datetime) -> bool:
        """Tell whether there should be a newer snapshot by now."""
        return now >= self.deadline

    def missed_window(self, now: datetime) -> bool:
        """Tell whether the opening that was meant for the run is over."""
        return self.closes is not None and now >= self.closes


def expected_of(policy: Policy, *, newest: datetime | None, since: datetime) -> Expected | None:
    """Return what is expected of a guest after its newest snapshot; None where its schedule never wants another.

    ``newest``: when that was captured. A guest that has none is reckoned with from ``since``, when its policy came.
    """
    due = next_due(policy, newest=newest, now=since if newest is None else newest)
    if due.at is None:
        return None
    deadline = due.at + policy.schedule.overdue_after
    return Expected(start=due.at, deadline=deadline, closes=_closing(policy, start=due.at))


def _closing(policy: Policy, *, start: datetime) -> datetime | None:
    schedule = policy.schedule
    if not schedule.windows and not schedule.blackouts:
        return None
    limit = start + _LONGEST_OPENING
    closes = _openings(schedule.windows, schedule.blackouts, policy.time_zone).closes(start, limit=limit)
    return closes if closes < limit else None


@lru_cache(maxsize=256)
def _openings(windows: tuple[str, ...], blackouts: tuple[str, ...], time_zone: str) -> Openings:
    return Openings(
        windows=tuple(parse_span(text) for text in windows),
        blackouts=tuple(parse_span(text) for text in blackouts),
        zone=UTC if time_zone == "UTC" else ZoneInfo(time_zone),
    )

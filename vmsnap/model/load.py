"""How much of the time there is the scheduled backups take. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice

from vmsnap.model.policy import Policy
from vmsnap.model.schedule import upcoming

_LOOK_AHEAD = 15


def usual_interval(policy: Policy, *, now: datetime) -> timedelta | None:
    """Return the mean time between the next runs of a guest, as if each succeeded at once; None where there are no two."""
    moments = [due.at for due in islice(upcoming(policy, newest=now, now=now), _LOOK_AHEAD) if due.at is not None]
    if len(moments) < 2 or moments[-1] <= moments[0]:
        return None
    return (moments[-1] - moments[0]) / (len(moments) - 1)

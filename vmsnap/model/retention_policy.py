"""The section ``[retention]`` of a policy: which snapshots stay, and for how long."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vmsnap.model.durations import Duration, PositiveDuration, format_duration

DEFAULT_KEEP_LAST = 7

# The newest snapshots of N periods span N - 2 whole ones at least, and none is shorter than this.
SHORTEST_PERIOD = {
    "keep_hourly": timedelta(hours=1),
    "keep_daily": timedelta(hours=23),
    "keep_weekly": timedelta(days=7) - timedelta(hours=1),
    "keep_monthly": timedelta(days=28),
    "keep_yearly": timedelta(days=365),
}
_KEEP = ("keep_last", *SHORTEST_PERIOD)


class Counting(StrEnum):
    """How the ``keep_*`` rules count beside each other.

    ``OVERLAPPING``: each counts from the newest snapshot, as in restic; a snapshot may be kept by several.
    ``IN_TURN``: each begins where the one before it ended (last, hourly, ..., yearly), as in Proxmox Backup Server.
    """

    OVERLAPPING = "overlapping"
    IN_TURN = "in-turn"


class RetentionPolicy(BaseModel):
    """Which snapshots stay. ``vmsnap.model.retention`` says what stays in any case.

    ``keep_last`` is 7 where no ``keep_*`` is given, and 0 where another one is, or ``replace_on_next``.
    ``replace_on_next``: a snapshot stays only until a newer one is there. ``min_age``: nothing younger goes.
    ``max_age``: no ``keep_*`` keeps anything older.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_last: int = Field(default=DEFAULT_KEEP_LAST, ge=0)
    keep_hourly: int = Field(default=0, ge=0)
    keep_daily: int = Field(default=0, ge=0)
    keep_weekly: int = Field(default=0, ge=0)
    keep_monthly: int = Field(default=0, ge=0)
    keep_yearly: int = Field(default=0, ge=0)
    counting: Counting = Counting.OVERLAPPING
    replace_on_next: bool = False
    min_age: Duration = timedelta(0)
    max_age: PositiveDuration | None = None

    @model_validator(mode="before")
    @classmethod
    def _last_gives_way_to_others(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "keep_last" in given:
            return given
        if given.get("replace_on_next") or any(given.get(name) for name in SHORTEST_PERIOD):
            return {**given, "keep_last": 0}
        if given.get("max_age") is not None and not given.get("min_age"):
            msg = (
                "max_age says what goes, and nothing says what stays: add keep_last, keep_daily or another keep_*, "
                "or min_age to keep everything that is younger"
            )
            raise ValueError(msg)
        return given

    @model_validator(mode="after")
    def _is_no_contradiction(self) -> RetentionPolicy:
        wanted = {name: getattr(self, name) for name in _KEEP if getattr(self, name)}
        if not wanted and not self.replace_on_next:
            msg = (
                "every keep_* is 0, so each snapshot would go as soon as there is a newer one: "
                "if that is meant, say so with replace_on_next = true, otherwise keep_last must be at least 1"
            )
            raise ValueError(msg)
        if wanted and self.replace_on_next:
            given = ", ".join(f"{name} = {count}" for name, count in wanted.items())
            msg = f"replace_on_next = true contradicts {given}: keep one of the two"
            raise ValueError(msg)
        if self.max_age is not None:
            self._fits_into(self.max_age)
        return self

    def _fits_into(self, max_age: timedelta) -> None:
        if self.min_age > max_age:
            msg = f"min_age {format_duration(self.min_age)} is longer than max_age {format_duration(max_age)}"
            raise ValueError(msg)
        for name, shortest in SHORTEST_PERIOD.items():
            count = getattr(self, name)
            if count - 2 > max_age / shortest:
                msg = (
                    f"{name} = {count} cannot be had with max_age {format_duration(max_age)}: "
                    f"make max_age longer, or {name} smaller"
                )
                raise ValueError(msg)

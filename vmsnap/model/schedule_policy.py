"""The section ``[schedule]`` of a policy: when backups are due, and when they may start."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from vmsnap.model.calendar import parse_calendar
from vmsnap.model.durations import Duration, PositiveDuration, format_duration
from vmsnap.model.openings import parse_span

_TIME_OF_DAY = re.compile(r"(?:[01]\d|2[0-3]):[0-5]\d\Z")


def _calendar(text: str) -> str:
    parse_calendar(text)
    return text


def _span(text: str) -> str:
    parse_span(text)
    return text


def _time_of_day(text: str) -> str:
    if not _TIME_OF_DAY.match(text):
        msg = 'a time of day such as "02:00" is allowed'
        raise ValueError(msg)
    return text


def _no_longer_than(limit: timedelta) -> AfterValidator:
    def check(value: timedelta) -> timedelta:
        if value > limit:
            raise ValueError(f"must be at most {format_duration(limit)}")
        return value

    return AfterValidator(check)


class SchedulePolicy(BaseModel):
    """When backups are due: ``every`` so often, or at times of day and calendar times. See ``vmsnap.model.schedule``.

    Where none of the three is given, they are due every day. Times are by the clocks of the policy's ``time_zone``.
    ``overdue_after`` a run was to start its snapshot must be there, or somebody is told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: Annotated[PositiveDuration, _no_longer_than(timedelta(days=3660))] | None = None
    at: tuple[Annotated[str, AfterValidator(_time_of_day)], ...] = ()
    calendar: tuple[Annotated[str, AfterValidator(_calendar)], ...] = ()
    windows: tuple[Annotated[str, AfterValidator(_span)], ...] = ()
    blackouts: tuple[Annotated[str, AfterValidator(_span)], ...] = ()
    jitter: Annotated[Duration, _no_longer_than(timedelta(days=1))] = timedelta(0)
    retry_after: PositiveDuration = timedelta(minutes=15)
    retry_at_most: Annotated[PositiveDuration, _no_longer_than(timedelta(days=30))] = timedelta(hours=6)
    overdue_after: Annotated[PositiveDuration, _no_longer_than(timedelta(days=366))] = timedelta(hours=1)
    storage: str | None = Field(default=None, min_length=1, max_length=255)

    @model_validator(mode="after")
    def _rules_agree(self) -> SchedulePolicy:
        if self.every is not None and (self.at or self.calendar):
            msg = "every counts from the newest snapshot, at and calendar name times: give one or the other"
            raise ValueError(msg)
        if self.retry_at_most < self.retry_after:
            msg = "retry_at_most must not be less than retry_after"
            raise ValueError(msg)
        return self

    @property
    def interval(self) -> timedelta | None:
        """Return how long after the newest snapshot a backup is due; None where it is due at certain times."""
        return None if self.at or self.calendar else self.every or timedelta(days=1)

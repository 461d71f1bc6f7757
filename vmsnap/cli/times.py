"""Points in time and time spans on the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from vmsnap.errors import ConfigError

_SPANS = 'write it like this: 90m, 12h, 14d, 2y, or "1d 12h"'
_LONGEST = timedelta(days=365_000)
"""So that no moment a span from now is beyond what can be reckoned with."""


def parse_time(text: str, *, option: str) -> datetime:
    """Return the UTC time a text names. Raises ConfigError, also for a time without a zone: it would be a guess."""
    try:
        value = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"{option}: '{text}' is no time",
            remedy='write it like this: 2026-11-21T02:00Z, or "2026-11-21 02:00+01:00"',
        ) from error
    if value.tzinfo is None:
        raise ConfigError(f"{option}: '{text}' has no time zone", remedy="add Z for UTC, or an offset such as +01:00")
    return value.astimezone(UTC)


def parse_span(text: str, *, option: str) -> timedelta:
    """Return the time span a text such as ``2h`` or ``1d 12h`` names. Raises ConfigError, also for none at all."""
    from vmsnap.model.durations import parse_duration  # noqa: PLC0415 - pydantic is slow to load, and --help needs none

    try:
        span = parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{option}: given '{text}'; {error}", remedy=_SPANS) from error
    if span <= timedelta(0):
        raise ConfigError(f"{option}: given '{text}'; it must be longer than nothing", remedy=_SPANS)
    if span > _LONGEST:
        raise ConfigError(f"{option}: given '{text}'; that is more than a thousand years", remedy=_SPANS)
    return span


def reference_time(value: datetime) -> str:
    """Return a time as it stands after the ``@`` of a reference."""
    return value.isoformat().replace("+00:00", "Z")

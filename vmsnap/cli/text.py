"""Values as people read them, and texts that are safe to print."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def printable(text: str) -> str:
    """Return a text on one line without control characters: names come from guests and may hold anything."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode("ascii")
        for character in text
    )


def printable_lines(text: str) -> list[str]:
    """Return the lines of a text, each safe to print; tabs become blanks."""
    return [printable(line.replace("\t", "    ")) for line in text.splitlines()]


def size(count_bytes: int) -> str:
    """Return a number of bytes in the unit that suits it: ``1.2 GiB``, ``300 MiB``."""
    value = float(count_bytes)
    units = iter(_UNITS)
    unit = next(units)
    while value >= 999.5 and unit != _UNITS[-1]:
        value /= 1024
        unit = next(units)
    return f"{value:.1f} {unit}" if unit != "B" and value < 99.95 else f"{value:.0f} {unit}"


def seconds(value: float) -> str:
    """Return a time span: ``0.4 s``, ``12.3 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def milliseconds(value: float) -> str:
    """Return a short time span: ``4.2 ms``, ``420 ms``, ``1.4 s``."""
    if value < 10:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 1000 else seconds(value / 1000)


def moment(value: datetime | None, *, none: str = "-") -> str:
    """Return a time in UTC to the second: ``2026-11-21 02:00:03Z``."""
    return none if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def minute(value: datetime | None, *, none: str = "-") -> str:
    """Return a time in UTC to the minute, for tables: ``2026-11-21 02:00Z``."""
    return none if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%MZ}"


def day(value: datetime) -> str:
    """Return the day of a time in UTC: ``2026-11-21``."""
    return f"{value.astimezone(UTC):%Y-%m-%d}"


def count(number: int, *, thing: str, things: str | None = None) -> str:
    """Return a number with its noun: ``1 block``, ``3 blocks``, ``no blocks``."""
    noun = thing if number == 1 else things or f"{thing}s"
    return f"{number or 'no'} {noun}"


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, for output that is no terminal. No line ends with blanks."""
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]

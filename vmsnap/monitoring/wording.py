"""What a notification says: what is wrong, since when, and what to do; short enough for a pager."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from vmsnap.model.alarms import WORST_FIRST, AlarmKind, Notice, Raised
from vmsnap.monitoring.channels import Message, Tone

MOST_SHOWN = 20
_LONGEST = 400
_NAMES = {
    AlarmKind.BREACH: "ISOLATION BREACH",
    AlarmKind.DAMAGED: "damaged snapshots",
    AlarmKind.OVERDUE: "no fresh backup",
    AlarmKind.MISSED_WINDOW: "missed its window",
    AlarmKind.FAILURE: "backup failed",
    AlarmKind.PROBLEM: "cannot be looked after",
}


def message_of(notice: Notice, *, host: str) -> Message:
    """Return a notice as a message."""
    wrong = _sorted((*notice.begun, *notice.going_on))
    lines = [line for item in wrong[:MOST_SHOWN] for line in _lines(item, again=item in notice.going_on)]
    if len(wrong) > MOST_SHOWN:
        lines.append(
            f"... and {len(wrong) - MOST_SHOWN} more: 'vmsnap run --due --dry-run' and 'vmsnap history' show all"
        )
    over = _sorted(notice.over)
    lines += [
        f"Over: {_subject(item)}: {_NAMES[item.alarm.kind]} (since {_minute(item.since)})" for item in over[:MOST_SHOWN]
    ]
    if len(over) > MOST_SHOWN:
        lines.append(f"... and {len(over) - MOST_SHOWN} more are over")
    return Message(
        title=f"vmsnap on {host}: {_title(wrong, over=over, reminds=not notice.begun)}",
        body="\n".join(lines),
        tone=_tone(notice),
    )


def _title(wrong: Sequence[Raised], *, over: Sequence[Raised], reminds: bool) -> str:
    items = wrong or over
    first = items[0]
    text = f"{_subject(first)}: {_NAMES[first.alarm.kind]}"
    if not wrong:
        text = f"{_subject(first)}: recovered"
    elif reminds:
        text = f"still: {text}"
    others = {item.alarm.guest for item in items} - {first.alarm.guest}
    return f"{text}, and {len(others)} more" if others else text


def _tone(notice: Notice) -> Tone:
    if notice.begun:
        return Tone.BAD
    return Tone.WORRYING if notice.going_on else Tone.GOOD


def _lines(item: Raised, *, again: bool) -> list[str]:
    since = f" (since {_minute(item.since)})" if again else ""
    lines = [f"{_subject(item)}: {_NAMES[item.alarm.kind]}{since}: {_short(item.alarm.text)}"]
    if item.alarm.remedy:
        lines.append(f"  What to do: {_short(item.alarm.remedy)}")
    return lines


def _subject(item: Raised) -> str:
    return "".join(character if character.isprintable() else "?" for character in item.alarm.guest) or "this host"


def _sorted(items: Sequence[Raised]) -> list[Raised]:
    return sorted(items, key=lambda item: (WORST_FIRST.index(item.alarm.kind), item.alarm.guest))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%MZ}"

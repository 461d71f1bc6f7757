"""What SQL Server's error log says of how the server ended.

The log is UTF-16 with a byte order mark, a line an event: time, source, text. Its language is the server's. A shutdown in
order ends it with message 6006 (``SHUTDOWN``), 17148 (the service was told to stop) or 17147 (Windows shut down) of
``sys.messages``; ``SHUTDOWN WITH NOWAIT`` has words of its own, and a crash none.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_ENDINGS = (
    # English, then German: a server in another language is refused, since nobody here has seen its words.
    re.compile(r"Server shut down by request from login \S.*\."),
    re.compile(r"SQL Server is terminating in response to a 'stop' request from Service Control Manager\."),
    re.compile(r"SQL Server is terminating because of a system shutdown\."),
    re.compile(r"Der Server wurde aufgrund der Anforderung der Anmeldung \S.* heruntergefahren\."),
)
_EVENT = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d\d) (\S+) +(.*)")
_AFTERWARDS = re.compile(r"SQL Trace (was )?stopped|\.NET Framework runtime has been stopped|Dump|Service Broker")
_LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class LogVerdict:
    """Whether the server ended in order, and the line that says so."""

    clean: bool
    observed: tuple[tuple[str, str], ...]


def read_log(content: bytes | None) -> LogVerdict:
    """Judge an error log. The ending must be among its last lines: a server that ran on would have written more."""
    if content is None:
        return LogVerdict(clean=False, observed=(("ERRORLOG", "missing"),))
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    events = [match for line in content.decode(encoding, "replace").splitlines() if (match := _EVENT.match(line))]
    if not events:
        return LogVerdict(clean=False, observed=(("ERRORLOG", "holds no event"),))
    last = events[-_LAST_LINES:]
    ending = next((event for event in reversed(last) if any(words.match(event[3]) for words in _ENDINGS)), None)
    if ending is None:
        return LogVerdict(clean=False, observed=(("last event", f"{events[-1][1]} {events[-1][3][:200]}"),))
    later = [event for event in last[last.index(ending) + 1 :] if not _AFTERWARDS.search(event[3])]
    observed = [("shut down", f"{ending[1]} {ending[3][:200]}")]
    if later:
        observed.append(("after that", later[-1][3][:200]))
    return LogVerdict(clean=not later, observed=tuple(observed))

"""The daemon's log: one line a record, for the journal or for a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TextIO

_CONTEXT = ("run", "guest", "step")
# The levels of syslog(3), which the journal takes from the beginning of a line (sd-daemon(3)).
_LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7))


class LineFormatter(logging.Formatter):
    """One line a record, with its guest, run and step; a record of several lines has them joined by ' | '."""

    def __init__(self, *, for_journal: bool) -> None:
        super().__init__()
        self._for_journal = for_journal

    def format(self, record: logging.LogRecord) -> str:
        """Return the line. Control characters become spaces: a guest's words must not make lines of their own."""
        said = record.getMessage()
        if record.exc_info:
            said = f"{said}\n{self.formatException(record.exc_info)}"
        context = " ".join(f"{name}={value}" for name in _CONTEXT if (value := getattr(record, name, None)))
        text = " | ".join(filter(None, map(_printable, said.splitlines())))
        line = f"{text} [{_printable(context)}]" if context else text
        if self._for_journal:
            return f"<{next((number for level, number in _LEVELS if record.levelno >= level), 7)}>{line}"
        return f"{self.formatTime(record)} {record.levelname.lower()}: {line}"


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()


def set_up_logging(stream: TextIO, *, level: int, environment: Mapping[str, str]) -> None:
    """Send vmsnap's records from ``level`` on, and warnings of the libraries it uses, to the stream, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(for_journal="JOURNAL_STREAM" in environment))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("vmsnap").setLevel(level)
    # The daemon's own progress says each step once, with the guest's name.
    logging.getLogger("vmsnap.workflow.run").setLevel(logging.WARNING if level > logging.DEBUG else level)

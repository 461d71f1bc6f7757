"""Log lines to stderr, with the run, guest and step they belong to."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.text import Text

from vmsnap.cli.text import printable

_CONTEXT = ("run", "guest", "step")
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}


class ConsoleHandler(logging.Handler):
    """Prints records through the console that also draws the progress, so that neither destroys the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record. Never raises."""
        try:
            context = " ".join(f"{name}={value}" for name in _CONTEXT if (value := getattr(record, name, None)))
            head = f"{record.levelname.lower()}: " + (f"[{context}] " if context else "")
            text = Text(printable(head + record.getMessage()), style=_STYLES.get(record.levelname, "dim"))
            if record.exc_info:
                text.append("\n" + logging.Formatter().formatException(record.exc_info))
            self._console.print(text, soft_wrap=True)
        except Exception:  # noqa: BLE001 - the contract of logging.Handler
            self.handleError(record)


def set_up_logging(console: Console, *, level: int) -> None:
    """Send vmsnap's records from ``level`` on, and warnings of the libraries it uses, to the console.

    Libraries are kept at warnings at any level: nobody here answers for secrets in what they would print below.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, ConsoleHandler):
            root.removeHandler(handler)
    root.addHandler(ConsoleHandler(console))
    logging.getLogger("vmsnap").setLevel(level)

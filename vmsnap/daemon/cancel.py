"""The one ``Cancel`` of everything that the daemon has going on."""

from __future__ import annotations

import threading

from vmsnap.errors import CancelledError


class StopCancel:
    """The port ``Cancel``, set when the daemon is to stop. May be used from several threads."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def is_set(self) -> bool:
        """Tell whether the daemon stops."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise CancelledError where the daemon stops."""
        if self._event.is_set():
            raise CancelledError(
                "the daemon was stopped; what the run had made was undone",
                remedy="start the daemon again: what is due then is backed up",
            )

    def set(self) -> None:
        """Ask everything to stop."""
        self._event.set()

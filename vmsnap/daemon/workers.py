"""Threads for what takes long, so that the daemon's loop goes round whatever hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Workers(Protocol):
    """Does work beside the loop. Tests do it at once."""

    def start(self, work: Callable[[], None], *, name: str) -> None:
        """Do the work, which raises nothing. Returns at once."""


class ThreadWorkers:
    """Each piece of work in a thread of its own. How many there are at a time is the callers' business.

    They do not keep the process alive: at its end, the daemon waits for them as long as its settings say.
    """

    def start(self, work: Callable[[], None], *, name: str) -> None:
        """Do the work in a thread."""
        threading.Thread(target=work, name=name, daemon=True).start()

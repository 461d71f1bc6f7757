"""Who runs scripts on a Hyper-V host."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol

from vmsnap.hypervisors.hyperv.connection import Parameter, Row
from vmsnap.ports.clock import Cancel

CHANGE = timedelta(minutes=2)
"""How long a script may take that does one thing."""


class ScriptRunner(Protocol):
    """Runs constant scripts of this package on the host. ``vmsnap.hypervisors.hyperv.commands.Commands`` is one."""

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = CHANGE,
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script by its name and return what it emitted; ``doing`` completes 'the Hyper-V host could not ...'."""

    def close(self) -> None:
        """Let go of the host. May be repeated."""


class LateRunner:
    """A ScriptRunner that is made when it is first needed: many commands never ask the host, nor need its credential."""

    def __init__(self, make: Callable[[], ScriptRunner]) -> None:
        self._make = make
        self._made: ScriptRunner | None = None
        self._lock = threading.Lock()

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = CHANGE,
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script. Raises ConfigError where the runner cannot be made."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            runner = self._made
        return runner.run(name, doing=doing, parameters=parameters, timeout=timeout, cancel=cancel)

    def close(self) -> None:
        """Let go of the host, where it was ever asked."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            made.close()

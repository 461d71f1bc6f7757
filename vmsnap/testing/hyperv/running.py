"""Running scripts on the simulated host by their twins: without a wire between, or behind the WinRM endpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from threading import RLock

from vmsnap.errors import VmsnapError
from vmsnap.hypervisors.hyperv.connection import Parameter, Row
from vmsnap.hypervisors.hyperv.failures import ErrorRecord, translate
from vmsnap.ports.clock import Cancel
from vmsnap.testing.hyperv import twins_doctor, twins_host, twins_machines
from vmsnap.testing.hyperv.dispatch import Invocation, PowerShellError, Streams
from vmsnap.testing.hyperv.failures import CmdletError
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.twins import TWINS, Emitted, Values, digest_of

ALL = (twins_host, twins_machines, twins_doctor)
"""Where the twins are; importing them registers them."""


def run_twin(host: HyperVHost, name: str, *, values: Values) -> list[Emitted]:
    """Run a script's twin. Raises CmdletError, LookupError for a script that has none, or was edited since."""
    found = TWINS.get(name)
    if found is None or found.sha256 != digest_of(name):
        raise LookupError(f"the script {name!r} has no twin, or was edited since its twin was looked at")
    return list(found.body(host, values))


def _quiet(_: str) -> None:
    """Stand for a hook nobody set."""


class TwinDispatcher:
    """What is behind the endpoint (``dispatch.Dispatcher``): scripts are known by their text, to the last byte."""

    def __init__(self, host: HyperVHost) -> None:
        self.host = host
        self._lock = RLock()
        self._names = {twin.sha256: name for name, twin in TWINS.items()}

    def __call__(self, invocation: Invocation, streams: Streams) -> None:
        """Run the twin of the script that came. Raises PowerShellError as the script would end."""
        text = invocation.call.text
        name = self._names.get(hashlib.sha256(text.encode()).hexdigest())
        if name is None:
            raise PowerShellError(f"nobody here knows the script: {text[:200]}", error_id="UnknownScript")
        try:
            with self._lock:
                emitted = run_twin(self.host, name, values=dict(invocation.call.parameters))
        except CmdletError as error:
            raise PowerShellError(
                error.message,
                error_id=error.error_id,
                category=error.category.value,
                hresult=error.hresult,
                exception_type=error.exception_type,
                target=error.target,
            ) from error
        for item in emitted:
            streams.write(item)


class TwinRunner:
    """``Commands`` over a simulated host in this process. ``before`` and ``after`` are called with each script's name.

    What they raise, the caller gets: an UnknownOutcomeError from ``after`` is a lost reply.
    """

    where = "the simulated host"

    def __init__(
        self, host: HyperVHost, *, before: Callable[[str], None] = _quiet, after: Callable[[str], None] = _quiet
    ) -> None:
        self.host = host
        self.before = before
        self.after = after
        self._lock = RLock()

    def run(
        self,
        name: str,
        *,
        doing: str,
        parameters: Mapping[str, Parameter] | None = None,
        timeout: timedelta = timedelta(minutes=2),
        cancel: Cancel | None = None,
    ) -> tuple[Row, ...]:
        """Run a script as the host would, and fail as ``Commands`` would."""
        del timeout, cancel
        self.before(name)
        # Hyper-V's management service does one thing after the other, as far as a client can tell.
        with self._lock:
            try:
                rows = tuple(run_twin(self.host, name, values=dict(parameters or {})))
            except CmdletError as error:
                raise self.translated(error, doing=doing) from error
        self.after(name)
        return rows

    def translated(self, error: CmdletError, *, doing: str) -> VmsnapError:
        """Return what the driver is told of a script's failure."""
        record = ErrorRecord(
            error_id=error.error_id, hresult=error.hresult, category=error.category, message=error.message
        )
        return translate(record, doing=doing)

    def close(self) -> None:
        """Do nothing."""

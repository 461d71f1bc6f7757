"""Running scripts on the simulated host by their twins, without a wire between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from threading import RLock

from vmsnap.hypervisors.hyperv.connection import Parameter, Row
from vmsnap.hypervisors.hyperv.failures import ErrorRecord, translate
from vmsnap.ports.clock import Cancel
from vmsnap.testing.hyperv import twins_host, twins_machines
from vmsnap.testing.hyperv.failures import CmdletError
from vmsnap.testing.hyperv.machine import HyperVHost
from vmsnap.testing.hyperv.twins import TWINS, Emitted, Values, digest_of

ALL = (twins_host, twins_machines)
"""Where the twins are; importing them registers them."""


def run_twin(host: HyperVHost, name: str, *, values: Values) -> list[Emitted]:
    """Run a script's twin. Raises CmdletError, LookupError for a script that has none, or was edited since."""
    found = TWINS.get(name)
    if found is None or found.sha256 != digest_of(name):
        raise LookupError(f"the script {name!r} has no twin, or was edited since its twin was looked at")
    return list(found.body(host, values))


def _quiet(_: str) -> None:
    """Stand for a hook nobody set."""


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
                record = ErrorRecord(
                    error_id=error.error_id, hresult=error.hresult, category=error.category, message=error.message
                )
                raise translate(record, doing=doing) from error
        self.after(name)
        return rows

    def close(self) -> None:
        """Do nothing."""

"""Waiting for the databases of a clone that boots: they start, and recover as after a power cut, at their own pace."""

from __future__ import annotations

from datetime import timedelta

from vmsnap.errors import DeadlineError, PreconditionError
from vmsnap.model.command import Command
from vmsnap.model.drain import Instance
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.engine import Engine
from vmsnap.ports.guest import GuestControl
from vmsnap.workflow.talk import converse

# systemctl(1), is-system-running: the words of a boot that goes on.
_BOOTING = frozenset({"initializing", "starting"})
_ASK_SYSTEMD = Command(argv=("systemctl", "is-system-running"))
_BETWEEN = timedelta(seconds=1)


def discover_booted(
    engine: Engine, *, policy: Policy, control: GuestControl, clock: Clock, cancel: Cancel
) -> tuple[Instance, ...]:
    """Return the clone's database instances, once they are up.

    Where the policy does not name them, the boot has to be over first, as far as systemd can tell: one that starts later
    would be overlooked. Raises DeadlineError with what was missing last.
    """
    deadline = policy.clone.recovery_deadline
    until = clock.monotonic() + deadline.total_seconds()
    timeout = policy.control.command_timeout
    named = bool(policy.database.clusters)
    while True:
        cancel.check()
        missing = None if named else _boot_goes_on(control, timeout=timeout)
        if missing is None:
            try:
                return converse(engine.discover(), control=control, timeout=timeout, cancel=cancel)
            except PreconditionError as error:
                missing = error
        if clock.monotonic() > until:
            raise DeadlineError(
                f"the databases of the clone were not up within {deadline}: {missing.brief}",
                details=missing.details,
                remedy="raise clone.recovery_deadline; the clone has no network that could answer what its boot waits for",
            ) from missing
        clock.sleep(_BETWEEN)


def _boot_goes_on(control: GuestControl, *, timeout: timedelta) -> PreconditionError | None:
    said = control.run(_ASK_SYSTEMD, timeout=timeout).text.strip()
    return PreconditionError(f"its boot is not over, systemd says {said!r}") if said in _BOOTING else None

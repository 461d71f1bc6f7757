"""Waiting for the databases of a clone that boots: they start, and recover as after a power cut, at their own pace."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from vmsnap.errors import DeadlineError, PreconditionError
from vmsnap.model.command import Command
from vmsnap.model.drain import Instance
from vmsnap.model.manifest import Snapshot
from vmsnap.model.policy import Policy
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.engine import Engine
from vmsnap.ports.guest import GuestControl
from vmsnap.workflow.talk import converse

# systemctl(1), is-system-running: the words of a boot that goes on, or is not one to the usual end.
_BOOTING = frozenset({"initializing", "starting", "maintenance", "stopping"})
_ASK_SYSTEMD = Command(argv=("systemctl", "is-system-running"))
_BETWEEN = timedelta(seconds=1)
_REMEDY = "raise clone.recovery_deadline; the clone has no network that could answer what its boot waits for"


def discover_booted(
    engine: Engine,
    *,
    policy: Policy,
    control: GuestControl,
    clock: Clock,
    cancel: Cancel,
    snapshots: Iterable[Snapshot],
) -> tuple[Instance, ...]:
    """Return the clone's database instances, once they are up.

    Where the policy does not name them, the boot has to be over first, as far as systemd can tell: one that starts later
    would be overlooked; and every instance in the newest of the guest's snapshots has to be there. Raises DeadlineError with
    what was missing last, PreconditionError for an instance whose recovery cannot be trusted.
    """
    deadline = policy.clone.recovery_deadline
    until = clock.monotonic() + deadline.total_seconds()
    timeout = policy.control.command_timeout
    named = bool(policy.database.clusters)
    before = () if named else tuple(snapshots)
    while True:
        cancel.check()
        missing = None if named else _boot_goes_on(control, timeout=timeout)
        if missing is None:
            try:
                instances = converse(engine.discover(), control=control, timeout=timeout, cancel=cancel)
                _require_those_of(before, instances=instances, engine=engine)
                break
            except PreconditionError as error:
                missing = error
        if clock.monotonic() > until:
            raise DeadlineError(
                f"the databases of the clone were not up within {deadline}: {missing.brief}",
                details=missing.details,
                remedy="; ".join(filter(None, (_REMEDY, missing.remedy))),
            ) from missing
        clock.sleep(_BETWEEN)
    for instance in instances:
        converse(engine.require_recoverable(instance), control=control, timeout=timeout, cancel=cancel)
    return instances


def absent_since(snapshots: Iterable[Snapshot], *, instances: Iterable[Instance], engine: str) -> tuple[str, ...]:
    """Return the data directories in the newest of these snapshots on which none of ``instances`` runs."""
    newest = max(snapshots, key=lambda snapshot: snapshot.manifest.capture.captured, default=None)
    if newest is None:
        return ()
    known = {item.data_directory for item in newest.manifest.clean.instances if item.engine == engine}
    return tuple(sorted(known - {instance.data_directory for instance in instances}))


def _require_those_of(snapshots: Iterable[Snapshot], *, instances: Iterable[Instance], engine: Engine) -> None:
    for folder in absent_since(snapshots, instances=instances, engine=engine.name):
        raise PreconditionError(
            f"the server on {folder}, which is in the newest snapshot, is not among them",
            remedy="if it was taken away on purpose, name those that are left in the policy's [[database.clusters]]",
        )


def _boot_goes_on(control: GuestControl, *, timeout: timedelta) -> PreconditionError | None:
    said = control.run(_ASK_SYSTEMD, timeout=timeout).text.strip()
    return PreconditionError(f"its boot is not over, systemd says {said!r}") if said in _BOOTING else None

"""Holding a conversation between an engine's procedure and a guest."""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

from vmsnap.errors import GuestUnreachableError, VmsnapError
from vmsnap.model.command import Procedure
from vmsnap.ports.clock import Cancel, Clock
from vmsnap.ports.guest import GuestControl

T = TypeVar("T")
_PING_TIMEOUT = timedelta(seconds=5)
_BETWEEN_PINGS = timedelta(milliseconds=300)


def converse(procedure: Procedure[T], *, control: GuestControl, timeout: timedelta, cancel: Cancel) -> T:
    """Run a procedure's commands in a guest and return its finding.

    An error of the control is thrown into the procedure, which may have another way; what it does not catch is raised.
    """
    try:
        command = next(procedure)
        while True:
            cancel.check()
            try:
                result = control.run(command, timeout=timeout)
            except VmsnapError as error:
                command = procedure.throw(error)
            else:
                command = procedure.send(result)
    except StopIteration as stop:
        finding: T = stop.value
        return finding
    finally:
        procedure.close()


def wait_until_answers(control: GuestControl, *, deadline: timedelta, clock: Clock, cancel: Cancel) -> None:
    """Ping until the guest answers. Raises GuestUnreachableError when the deadline passed."""
    until = clock.monotonic() + deadline.total_seconds()
    while True:
        cancel.check()
        try:
            control.ping(timeout=_PING_TIMEOUT)
        except GuestUnreachableError as error:
            if clock.monotonic() > until:
                raise GuestUnreachableError(
                    f"the guest did not answer by {control.method} within {deadline}",
                    details=error.brief,
                    remedy="is qemu-guest-agent, the SSH server or, for PowerShell Direct, the service vmicvmsession "
                    "running in the guest, and enabled at boot?",
                ) from error
            clock.sleep(_BETWEEN_PINGS)
        else:
            return

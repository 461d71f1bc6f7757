"""Every error vmsnap raises.

An error says what happened (``brief``), what else is known (``details``) and what the operator can do
(``remedy``). The exit code of the program is a property of the error's class, in one table here.
Drivers translate the errors of their libraries into these at their edge.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the program. They are an interface: scripts depend on them."""

    DONE = 0
    CONFIGURATION = 2
    PRECONDITION = 3
    BUSY = 4
    SAFETY = 5
    DEADLINE = 6
    DRIVER = 7
    CLEANUP = 8
    BUG = 70


_WORST_FIRST = (
    ExitCode.SAFETY,
    ExitCode.CLEANUP,
    ExitCode.BUG,
    ExitCode.DRIVER,
    ExitCode.DEADLINE,
    ExitCode.PRECONDITION,
    ExitCode.CONFIGURATION,
    ExitCode.BUSY,
)


def worst_of(codes: Collection[ExitCode]) -> ExitCode:
    """Return the worst of the exit codes of several things; DONE where there is none."""
    return next((code for code in _WORST_FIRST if code in codes), ExitCode.DONE)


class VmsnapError(Exception):
    """Base of all errors that are shown to an operator.

    ``brief`` is one sentence. ``details`` is evidence, for example the output of a tool. ``remedy`` says what to do.
    ``also`` holds errors met while cleaning up after this one; they never replace it.
    """

    exit_code = ExitCode.BUG
    transient = False

    def __init__(self, brief: str, *, details: str | None = None, remedy: str | None = None) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.remedy = remedy
        self.also: list[VmsnapError] = []


class ConfigError(VmsnapError):
    """A configuration file, a policy or a command line is wrong. Nothing was done."""

    exit_code = ExitCode.CONFIGURATION


class PreconditionError(VmsnapError):
    """The run cannot start, or go on, because something it needs is not there. The source was not touched."""

    exit_code = ExitCode.PRECONDITION


class GuestNotFoundError(PreconditionError):
    """The hypervisor knows no guest of that name."""


class SnapshotNotFoundError(PreconditionError):
    """No snapshot matches, or more than one does."""


class EnvironmentNotFoundError(PreconditionError):
    """No environment of that name."""


class NoSpaceError(PreconditionError):
    """A file system has too little room."""


class HeldError(PreconditionError):
    """The thing is in use or pinned and is not removed."""


class BusyError(VmsnapError):
    """Somebody else works on the same guest or snapshot. Try again later."""

    exit_code = ExitCode.BUSY


class SafetyError(VmsnapError):
    """A safety rule would be broken. Never retried, nothing stored."""

    exit_code = ExitCode.SAFETY


class IsolationError(SafetyError):
    """The fence is not what it must be."""


class NotCleanError(SafetyError):
    """The database, a file system or the guest did not end in order, or it could not be proven."""


class VerificationError(SafetyError):
    """Stored data is not what its digests say."""


class DeadlineError(VmsnapError):
    """A step did not end in time. It was undone."""

    exit_code = ExitCode.DEADLINE


class NotConvergingError(DeadlineError):
    """The guest writes memory faster than it can be copied within the pause its policy allows."""


class CancelledError(VmsnapError):
    """A signal asked the run to stop; what it had made was undone."""

    exit_code = ExitCode.DEADLINE


class DriverError(VmsnapError):
    """The hypervisor, a tool or a guest failed in a way vmsnap cannot handle."""

    exit_code = ExitCode.DRIVER


class ToolError(DriverError):
    """A host program ended with a failure."""


class GuestCommandError(DriverError):
    """A command in a guest failed, or its answer made no sense."""


class HostUnreachableError(DriverError):
    """The hypervisor's host does not answer, or refused for want of room. What was asked of it was not done."""

    transient = True


class UnknownOutcomeError(DriverError):
    """The line to a host broke after it had been asked to do something: it may have been done, or not, or may go on.

    Never repeated blindly: look for what bears the run's id.
    """


class GuestUnreachableError(DriverError):
    """The guest's agent or SSH server does not answer."""

    transient = True


class ObjectNotFoundError(DriverError):
    """An object store has no object of that name."""


class ObjectConflictError(DriverError):
    """An object was there already, or is not the one that was to be replaced."""


class StoreUnreachableError(DriverError):
    """An object store did not answer, or not to the end. Whether a change was made is not known."""

    transient = True


class CleanupError(VmsnapError):
    """Something a run made could not be removed. ``vmsnap reconcile`` tries again."""

    exit_code = ExitCode.CLEANUP

    def __init__(self, brief: str, *, causes: Sequence[VmsnapError], remedy: str | None = None) -> None:
        super().__init__(
            brief,
            details="\n".join(cause.brief for cause in causes),
            remedy=remedy or "run 'vmsnap reconcile'; if it fails again, its message names the thing and the reason",
        )
        self.causes = tuple(causes)


class BugError(VmsnapError):
    """vmsnap broke a rule of its own. Please report it."""

    exit_code = ExitCode.BUG


class IllegalTransitionError(BugError):
    """An event that the life cycle does not allow in this state."""

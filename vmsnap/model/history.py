"""What is kept of every run after it is over, and the audit trail of what was done to snapshots and environments.

The journal (``model.journal``) is for undoing a run; the history is for people and for alarms. Losing it harms nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from vmsnap.errors import CancelledError, ExitCode, VmsnapError
from vmsnap.model.ids import RunId, SnapshotId
from vmsnap.model.journal import RunKind


class Trigger(StrEnum):
    """What started something."""

    OPERATOR = "operator"
    TIMER = "timer"
    DAEMON = "daemon"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Starter:
    """Who or what started something.

    ``user``: who logged in, also before sudo; empty where nobody did. ``detail``: the systemd unit, or the command line.
    """

    trigger: Trigger
    user: str = ""
    detail: str = ""

    def __str__(self) -> str:
        """Return it in a few words."""
        return self.user or self.trigger.value


class RunOutcome(StrEnum):
    """What became of a run. ``DIED``: its process ended without saying how, by a crash, kill -9 or a power cut."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    DIED = "died"


@dataclass(frozen=True, kw_only=True)
class RunStep:
    """One step of a run. Seconds are of a clock that never goes back; ``seconds`` None: it is not known to have ended."""

    name: str
    began_after_seconds: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. ``exit_code`` None: its process died. Figures are None where the run did not get that far.

    ``new_bytes`` were written to the store, ``logical_bytes`` is the size of all disks. ``warnings``: as in the report.
    """

    outcome: RunOutcome
    exit_code: int | None = None
    error: str | None = None
    remedy: str | None = None
    snapshot: SnapshotId | None = None
    environment: str | None = None
    pause_ms: float | None = None
    new_bytes: int | None = None
    logical_bytes: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run. ``ended`` and ``result`` are None while it goes on, or until it is known that it died.

    ``ended`` of one that died is when that was noticed. ``seconds``: how long it took, where it lived to say so.
    """

    run: RunId
    kind: RunKind
    guest: str
    started: datetime
    starter: Starter
    steps: tuple[RunStep, ...] = ()
    ended: datetime | None = None
    seconds: float | None = None
    result: RunResult | None = None

    @property
    def outcome(self) -> RunOutcome:
        """Return what became of it."""
        return RunOutcome.RUNNING if self.result is None else self.result.outcome


class Action(StrEnum):
    """What the audit trail tells of."""

    PROVISION = "provision"
    DESTROY = "destroy"
    EXTEND = "extend"
    EXPIRE = "expire"
    REGISTER = "register"
    PRUNE = "prune"
    PIN = "pin"
    UNPIN = "unpin"
    VERIFY = "verify"
    RECONCILE = "reconcile"
    REPLICATE = "replicate"
    RESTORE = "restore"
    EXPORT = "export"
    COLLECT = "collect"
    FORGET = "forget"


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """Who did what, when and to what. ``subject``: the snapshot's id, the environment's name, or the run's id.

    ``guest`` is empty where nothing tells it. ``failure``: why it was not done; None where it was.
    """

    at: datetime
    action: Action
    starter: Starter
    guest: str
    subject: str
    detail: str = ""
    failure: str | None = None


def failed(error: VmsnapError) -> RunResult:
    """Return the result of a run that ended with an error."""
    stopped = isinstance(error, CancelledError)
    return RunResult(
        outcome=RunOutcome.STOPPED if stopped else RunOutcome.FAILED,
        exit_code=int(error.exit_code),
        error=error.brief,
        remedy=error.remedy,
    )


def died(last_step: str | None) -> RunResult:
    """Return the result of a run whose process ended without saying how."""
    where = "before its first step" if last_step is None else f"in step '{last_step}'"
    return RunResult(
        outcome=RunOutcome.DIED, error=f"its process ended {where}: killed, crashed, or the host went down"
    )


def done() -> RunResult:
    """Return the result of a run that succeeded, without figures."""
    return RunResult(outcome=RunOutcome.DONE, exit_code=int(ExitCode.DONE))

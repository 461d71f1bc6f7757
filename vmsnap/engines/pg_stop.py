"""Stopping a drained PostgreSQL server in order, and asking its own tools whether it did."""

from __future__ import annotations

import math
import posixpath
from datetime import timedelta

from vmsnap.engines.asking import PLAIN_MESSAGES, ask, last_words
from vmsnap.engines.pg_control import ClusterState
from vmsnap.engines.pg_discovery import read_lock_file
from vmsnap.errors import DeadlineError, GuestCommandError, NotCleanError
from vmsnap.model.command import Command, Procedure
from vmsnap.model.drain import Instance, InstanceEvidence

_MARGIN = timedelta(seconds=30)
_STATE = "Database cluster state"
_WANTED = {
    _STATE: "state",
    "Database system identifier": "system identifier",
    "Latest checkpoint location": "checkpoint",
}


def stop(instance: Instance, *, deadline: timedelta) -> Procedure[None]:
    """Stop the server by ``pg_ctl stop -m fast``, never ``immediate``. May be repeated; stopped already is fine.

    Raises DeadlineError where it still runs after the deadline, NotCleanError where something started it again.
    """
    before = yield from read_lock_file(instance.data_directory, user=instance.user)
    if before is None:
        return
    seconds = max(1, math.ceil(deadline.total_seconds()))
    command = Command(
        argv=(
            *PLAIN_MESSAGES,
            posixpath.join(instance.programs, "pg_ctl"),
            *("stop", "-D", instance.data_directory, "-m", "fast", "-w", "-t", str(seconds)),
        ),
        user=instance.user,
        timeout=timedelta(seconds=seconds) + _MARGIN,
    )
    result = yield command
    after = yield from read_lock_file(instance.data_directory, user=instance.user)
    if after is None:
        return
    if after.pid != before.pid:
        raise _started_again(instance)
    if result.exit_status == 0:
        raise NotCleanError(
            f"pg_ctl says that {instance.name} stopped, but its postmaster.pid is still there",
            details=last_words(result),
        )
    if "does not shut down" in result.error_text + result.text:
        raise DeadlineError(
            f"the PostgreSQL server {instance.name} did not stop within {seconds} s",
            details=last_words(result),
            remedy="its log in the guest tells what it waited for: a checkpoint (raise database.stop_deadline), or "
            "an archive_command that cannot reach its target in the fence",
        )
    raise GuestCommandError(f"cannot stop the PostgreSQL server {instance.name}", details=last_words(result))


def evidence_in_guest(instance: Instance) -> Procedure[InstanceEvidence]:
    """Read the stopped server's state with ``pg_controldata``. May be repeated.

    Raises NotCleanError where the server runs again, GuestCommandError where the tool fails.
    """
    if (yield from read_lock_file(instance.data_directory, user=instance.user)) is not None:
        raise _started_again(instance)
    result = yield from ask(
        Command(
            argv=(
                *PLAIN_MESSAGES,
                posixpath.join(instance.programs, "pg_controldata"),
                *("-D", instance.data_directory),
            ),
            user=instance.user,
        ),
        what=f"cannot read the state of {instance.name}",
    )
    said = parse_controldata(result.text)
    if _STATE not in said:
        raise GuestCommandError("the output of pg_controldata makes no sense", details=result.text[:500])
    return InstanceEvidence(
        engine=instance.engine,
        instance=instance.name,
        data_directory=instance.data_directory,
        method="in-guest",
        # The tool only warns about a control file that is damaged, and prints guesses.
        clean=said[_STATE] == ClusterState.SHUT_DOWN.text
        and not result.error_text.strip()
        and "WARNING" not in result.text,
        observed=tuple((name, said[label]) for label, name in _WANTED.items() if label in said),
    )


def parse_controldata(text: str) -> dict[str, str]:
    """Return the ``label: value`` lines that ``pg_controldata`` prints."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {label.strip(): value.strip() for label, colon, value in pairs if colon}


def _started_again(instance: Instance) -> NotCleanError:
    return NotCleanError(
        f"something started the PostgreSQL server {instance.name} again after it was stopped",
        remedy="stop what does (Patroni, repmgrd, pg_auto_failover, a watchdog) first, with the policy's "
        "database.before_drain",
    )
